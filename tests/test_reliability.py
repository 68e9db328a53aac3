"""Kills, signals, damaged files, bad input and bad environments: real processes, real files, real signals.

`main` runs the script in this process; `start` runs it as a user does. Processes are waited for by polling a condition
with a deadline, never by sleeping for a guessed time.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy

import compare
import ppo_jax
import ppo_lstm_jax
import ppo_mlx
import ppo_torch
from benchmarks.records import whole
from tests import backends, environments

ROOT = Path(ppo_torch.__file__).parent
SCRIPT = ROOT / "ppo_torch.py"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and all they start
DEADLINE = 120  # seconds for anything to happen; a quiet machine needs a few
SMALL = shlex.split("--num-envs 2 --num-steps 16 --total-timesteps 320 --eval-episodes 2 --vectorization sync")
SILENT = [*SMALL, "--wandb-mode", "disabled"]
NORMALISED = ["--norm-obs", "--norm-reward"]
FINISHED = [*SILENT, *NORMALISED, "--checkpoint-interval", "32"]
ENDLESS = [*SMALL, "--total-timesteps", "1000000", "--checkpoint-interval", "1000000"]  # until a signal ends it
LAST_STEP = 320


class Outcome(NamedTuple):
    code: int
    out: str
    err: list[str]  # lines, without the progress bar


def lines(text: str) -> list[str]:
    return [
        line
        for line in text.replace("\r", "\n").splitlines()
        if line.strip() and not re.search(r"step/s|\ds/step", line)
    ]


def main(*flags: str | Path, module: ModuleType = ppo_torch) -> Outcome:
    """The script in this process; an exception that it should have reported comes through."""
    for environment in (environments.NotANumber, environments.NeverEnds):
        environment.instances = itertools.count()
    environments.Mortal.instances = itertools.count(1)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, out.getvalue(), lines(err.getvalue()))


class Process:
    """The script as a user starts it, in a process group of its own, as a terminal would."""

    def __init__(self, folder: Path, *flags: str | Path, prefix: tuple = (), script: Path = SCRIPT, **variables: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "stdout", folder / "stderr"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.popen = subprocess.Popen(
                [sys.executable, *prefix, script, *map(str, flags)],
                cwd=ROOT,
                env=environment_variables(folder) | variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self.popen.pid

    def end(self) -> Outcome:
        try:
            code = self.popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {DEADLINE} s; {self.err.read_text()[-2000:]}")
        return Outcome(code, self.out.read_text(), lines(self.err.read_text(errors="replace")))

    def children(self) -> dict[int, str]:
        """Pid and command of what this process started and what lives: its process group, W&B's server, and theirs."""
        listing = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,stat=,command="], capture_output=True, text=True
        )
        rows = [line.split(None, 4) for line in listing.stdout.splitlines()]
        rows = [(int(r[0]), int(r[1]), int(r[2]), r[4]) for r in rows if len(r) == 5 and not r[3].startswith("Z")]
        ours = {pid for pid, _, pgid, command in rows if pgid == self.pid or f"--pid {self.pid} " in f"{command} "}
        ours |= {pid for pid, parent, _, _ in rows if parent in ours}
        return {pid: command for pid, _, _, command in rows if pid in ours and pid != self.pid}

    def workers(self) -> list[int]:
        """The processes of AsyncVectorEnv: children of the fork server."""
        listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        parents = dict(map(int, line.split()) for line in listing.splitlines())
        servers = [pid for pid, command in self.children().items() if "forkserver" in command]
        return [pid for pid in servers if parents.get(pid) in servers]


def environment_variables(home: Path) -> dict[str, str]:
    """No W&B account, own home, one thread, what JAX compiled before, a folder of temporary files whose name is short:
    a socket's path may have a hundred characters."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    ours |= {"HOME": str(home), "NETRC": str(home / "netrc"), "TMPDIR": backends.TEMPORARY.name, "OMP_NUM_THREADS": "1"}
    ours |= {"JAX_COMPILATION_CACHE_DIR": backends.CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return ours | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def assert_resumes_to_the_bit(script: Path, folder: Path, *flags: str) -> None:
    """Killed as it writes the third checkpoint, and resumed: the very bytes of a run that was not killed."""
    whole = Process(folder / "one", *flags, "--run-dir", folder / "whole", script=script)
    assert whole.end().code == 0
    third = 3 * int(flags[flags.index("--checkpoint-interval") + 1])
    dying = "-c", DIES_IN, "replace", f"{third:012d}.safetensors"
    killed = Process(folder / "two", *flags, "--run-dir", folder / "killed", script=script, prefix=dying)
    assert killed.end().code == -signal.SIGKILL
    assert [step_of(path) for path in checkpoints(folder / "killed")] == [third // 3, 2 * third // 3]
    assert not (folder / "killed/model.safetensors").exists()
    outcome = Process(folder / "three", "--resume", folder / "killed", script=script).end()
    assert outcome.code == 0 and outcome.err == []
    assert_same_model(folder / "killed", folder / "whole")


def assert_a_signal_leaves_a_checkpoint(script: Path, folder: Path, *flags: str) -> None:
    endless = [*flags, "--total-timesteps", "10000000", "--checkpoint-interval", "0", "--run-dir", folder / "run"]
    process = Process(folder / "one", *endless, script=script)
    wait_for(lambda: process.err.read_text().count("step/s") > 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert step_of(assert_stopped(process, folder / "run", 143)) > 0


def wait_for(condition: Callable, process: Process | None = None):
    deadline = time.monotonic() + DEADLINE
    while not (result := condition()):
        if process and process.popen.poll() is not None:
            pytest.fail(f"ended too early: {process.err.read_text()[-2000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"nothing happened within {DEADLINE} s")
        time.sleep(0.01)
    return result


@pytest.fixture
def start(tmp_path):
    """Starts processes; what still lives at the end of the test is killed."""
    started: list[Process] = []

    def start(*flags: str | Path, **options) -> Process:
        started.append(Process(tmp_path / f"process {len(started)}", *flags, **options))
        return started[-1]

    yield start
    for process in started:
        for pid in [*process.children(), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.popen.wait()


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """Runs without --run-dir write below tmp_path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def checkpoints(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("*.safetensors"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step_"))


def tensors(path: Path) -> dict[str, tuple]:
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in safetensors.numpy.load_file(path).items()}


def assert_same_model(one: Path, other: Path) -> None:
    one, other = (tensors(directory / "model.safetensors") for directory in (one, other))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def wandb_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/*run-*/run-*.wandb"))


def assert_one_line(outcome: Outcome, code: int, *words: str, module: ModuleType = ppo_torch) -> None:
    assert outcome.code == code, outcome
    assert len(outcome.err) == 1 and outcome.err[0].startswith(f"{module.__name__}.py: "), outcome
    assert all(word in outcome.err[0] for word in words), (words, outcome.err)


def assert_refused(outcome: Outcome, *words: str, module: ModuleType = ppo_torch) -> None:
    assert_one_line(outcome, 2, *words, module=module)
    assert outcome.out == ""


def assert_failed(outcome: Outcome, *words: str) -> None:
    assert_one_line(outcome, 1, *words)


# ------------------------------------------------------------------------------------------------------ kill -9, resume

# A process that kills itself where it calls os.<function> on a path that ends in <ending>.
DIES_IN = """
import os, runpy, signal, sys
function, ending, *sys.argv = sys.argv[1:]
original = getattr(os, function)
def dies(*arguments, **options):
    if any(str(argument).endswith(ending) for argument in arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(os, function, dies)
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MORTAL = [*SILENT, *NORMALISED, "--env-id", "tests.environments:Mortal-v0"]
MORTAL += ["--checkpoint-interval", "96", "--eval-interval", "160"]  # checkpoints at 96 192 288, evaluations at 160 320
KILLS = {  # where a process dies: a step of the n-th environment that it made, or a call of os
    "in the first rollout": "KILL 1 10",
    "in the evaluation at 160": "KILL 5 3",  # 1 and 2 until 96, then 3 and 4
    "writing the first checkpoint": "replace 0096.safetensors",
    "writing the second checkpoint": "replace 0192.safetensors",
    "before the oldest checkpoint goes": "unlink 0096.safetensors",
    "writing the last checkpoint": "replace 0320.safetensors",
    "writing the model": "replace model.safetensors",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """Directories of runs that died in the ways of KILLS, and of one that did not."""
    folder = tmp_path_factory.mktemp("killed")

    def die(name: str) -> Path:
        how, directory = KILLS[name], folder / name
        prefix = () if how.startswith("KILL") else ("-c", DIES_IN, *how.split())
        variables = {"MORTAL": how} if how.startswith("KILL") else {}
        process = Process(folder / f"{name} output", *MORTAL, "--run-dir", directory, prefix=prefix, **variables)
        assert process.end().code == -signal.SIGKILL, name
        return directory

    uninterrupted = folder / "uninterrupted"
    assert main(*MORTAL, "--run-dir", uninterrupted).code == 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KILLS, pool.map(die, KILLS), strict=True)) | {"uninterrupted": uninterrupted}


@pytest.mark.parametrize("where", KILLS)
def test_a_run_killed_anywhere_ends_with_the_weights_of_one_that_was_not(where, killed):
    directory = killed[where]
    assert not (directory / "model.safetensors").exists()
    has_checkpoint = bool(checkpoints(directory))
    outcome = main("--resume", directory)
    assert outcome.code == 0
    assert outcome.err == [] if has_checkpoint else "no checkpoint" in outcome.err[0]
    assert_same_model(directory, killed["uninterrupted"])
    assert [step_of(path) for path in checkpoints(directory)] == [288, LAST_STEP]


def test_a_run_killed_twice(start, killed, tmp_path):
    """The resumed process, too, dies after a checkpoint of its own."""
    directory = tmp_path / "run"
    assert start(*MORTAL, "--run-dir", directory, MORTAL="KILL 3 20").end().code == -signal.SIGKILL
    assert [step_of(path) for path in checkpoints(directory)] == [96]
    assert start("--resume", directory, MORTAL="KILL 5 20").end().code == -signal.SIGKILL  # 3 and 4: evaluation
    assert [step_of(path) for path in checkpoints(directory)] == [96, 192]
    assert start("--resume", directory).end().code == 0
    assert_same_model(directory, killed["uninterrupted"])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_killed_from_outside_keeps_its_record_and_id(env_id, start, tmp_path):
    flags = [*SMALL, *NORMALISED, "--env-id", env_id, "--total-timesteps", "3200", "--checkpoint-interval", "320"]
    directory, reference = tmp_path / "run", tmp_path / "reference"
    process = start(*flags, "--run-dir", directory)
    wait_for(lambda: len(checkpoints(directory)) == 2, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    assert not (directory / "model.safetensors").exists()
    assert main("--resume", directory).code == 0
    assert main(*flags, "--run-dir", reference, "--wandb-mode", "disabled").code == 0
    assert_same_model(directory, reference)

    first, second = wandb_files(directory)
    wandb_id = json.loads((directory / "config.json").read_text())["wandb_id"]
    assert first.name == second.name == f"run-{wandb_id}.wandb"
    wait_for(lambda: not process.children())
    config = next(row["run"]["config"]["update"] for row in compare.inspect(second) if row["type"] == "run")
    assert config["resumed_at"] > 0


def test_rows_that_the_record_lost_are_written_again(tmp_path, monkeypatch):
    """W&B's own process writes what it got a second later, and may die with the run: the checkpoint has them too."""
    monkeypatch.setattr(ppo_torch, "SECONDS_TO_WRITE_A_ROW", math.inf)  # else as many as this machine's speed decides
    directory = tmp_path / "run"
    flags = [*SMALL, "--total-timesteps", "192", "--checkpoint-interval", "96", "--timing-interval", "1"]
    assert main(*flags, "--run-dir", directory).code == 0
    checkpoints(directory)[-1].unlink()  # the end of the run; the one before is of step 96
    shutil.rmtree(directory / "wandb")
    assert main("--resume", directory, "--total-timesteps", "320").code == 0
    (run,) = compare.read_directory(directory)
    assert [row["global_step"] for row in run.rows] == list(range(32, LAST_STEP + 1, 32))
    assert all("losses/policy_loss" in row for row in run.rows)


def test_a_finished_run_goes_on_with_more_timesteps(tmp_path):
    directory = tmp_path / "run"
    assert main(*SILENT, "--run-dir", directory).code == 0
    finished = tensors(directory / "model.safetensors")
    assert main("--resume", directory, "--total-timesteps", "640").code == 0
    assert step_of(checkpoints(directory)[-1]) == 640
    assert tensors(directory / "model.safetensors") != finished


def test_a_run_that_was_made_longer_stays_so(start, tmp_path):
    """Resumed with more steps and stopped, it goes on to the new end without a flag, and not back to fewer steps."""
    directory = tmp_path / "run"
    assert main(*SILENT, "--run-dir", directory).code == 0
    process = start("--resume", directory, "--total-timesteps", "320000")
    wait_for(lambda: step_of(checkpoints(directory)[-1]) > LAST_STEP, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.end().code == 143
    assert json.loads((directory / "config.json").read_text())["total_timesteps"] == 320_000
    assert_refused(main("--resume", directory, "--total-timesteps", "320"), "--total-timesteps 320", "already")
    assert json.loads((directory / "config.json").read_text())["total_timesteps"] == 320_000
    step = step_of(checkpoints(directory)[-1])
    assert main("--resume", directory, "--total-timesteps", str(step)).code == 0
    assert step_of(checkpoints(directory)[-1]) == step


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    flags = [*SILENT, *NORMALISED]
    assert main(*flags, "--run-dir", tmp_path / "run").code == 0
    assert main(*flags, "--run-dir", tmp_path / "reference").code == 0
    assert main("--resume", tmp_path / "run").code == 0
    assert_same_model(tmp_path / "run", tmp_path / "reference")


def test_a_resumed_run_no_longer_needs_the_model_that_it_started_from(finished, tmp_path):
    model = shutil.copy(finished / "model.safetensors", tmp_path)
    directory = tmp_path / "run"
    assert main(*SILENT, *NORMALISED, "--load-model", model, "--run-dir", directory).code == 0
    os.remove(model)
    assert main("--resume", directory, "--total-timesteps", "640").code == 0


@pytest.mark.parametrize("flags", ["--seed 2", "--learning-rate 1e-3", "--num-envs 4", "--env-id Acrobot-v1"])
def test_a_resumed_run_refuses_other_flags(flags, finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert_refused(main("--resume", finished, *flags.split()), flags.split()[0])
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_resumed_run_that_wandb_refuses_keeps_its_config(finished, monkeypatch):
    before = (finished / "config.json").read_text()

    def refuse(*_, **__):
        raise ppo_torch.wandb.Error("no such project")

    monkeypatch.setattr(ppo_torch.wandb, "init", refuse)
    assert_refused(main("--resume", finished, "--total-timesteps", "6400"), "no such project")
    assert (finished / "config.json").read_text() == before
    assert not (finished / "config.new").exists()


# -------------------------------------------------------------------------------------------------------------- signals


def assert_stopped(process: Process, directory: Path, code: int) -> Path:
    """Ended as asked, with a checkpoint, a word about resuming, and nothing left behind -> the checkpoint."""
    outcome = process.end()
    assert outcome.code == code, outcome
    assert "Traceback" not in "\n".join(outcome.err)
    assert len(outcome.err) == 1 and f"--resume {directory}" in outcome.err[0]
    wait_for(lambda: not process.children())
    assert not (directory / "model.safetensors").exists()
    return checkpoints(directory)[-1]


def assert_goes_on(directory: Path) -> None:
    step = step_of(checkpoints(directory)[-1])
    assert main("--resume", directory, "--total-timesteps", step + 64, "--wandb-mode", "disabled").code == 0
    assert step_of(checkpoints(directory)[-1]) == step + 64


def assert_whole_record(directory: Path) -> None:
    """W&B closed the record, and it has the row of the last step."""
    records = whole(wandb_files(directory)[0])
    steps = [row["history"]["item"]["global_step"] for row in records if row["type"] == "history"]
    assert steps[-1] == step_of(checkpoints(directory)[-1])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process(number, code, start, tmp_path):
    directory = tmp_path / "run"
    process = start(*ENDLESS, "--run-dir", directory)
    wait_for(lambda: process.err.read_text().count("step/s") > 3, process)
    os.kill(process.pid, number)
    assert_stopped(process, directory, code)
    assert_whole_record(directory)
    assert_goes_on(directory)


ASYNC = [*ENDLESS, "--vectorization", "async"]


def start_async(start: Callable, directory: Path, *flags: str) -> Process:
    process = start(*ASYNC, "--run-dir", directory, *flags)
    wait_for(lambda: process.err.read_text().count("step/s") > 3, process)
    assert len(process.workers()) == 2
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_signal_to_the_whole_process_group(vectorization, number, code, start, tmp_path):
    """As Ctrl-C in a terminal, or a batch system that ends a job: W&B's server and the workers get it too."""
    directory = tmp_path / "run"
    process = start_async(start, directory) if vectorization == "async" else start(*ENDLESS, "--run-dir", directory)
    wait_for(lambda: process.err.read_text().count("step/s") > 3, process)
    os.killpg(process.pid, number)
    assert_stopped(process, directory, code)
    assert_whole_record(directory)
    assert_goes_on(directory)


def test_no_worker_outlives_a_killed_run(start, tmp_path):
    process = start_async(start, tmp_path / "run")
    wait_for(lambda: wandb_files(tmp_path / "run")[0].stat().st_size > 20_000, process)  # flushed every second
    os.kill(process.pid, signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    wait_for(lambda: not process.children())
    assert any(row["type"] == "history" for row in compare.inspect(wandb_files(tmp_path / "run")[0]))


def test_a_killed_worker_ends_the_run(start, tmp_path):
    process = start_async(start, tmp_path / "run")
    os.kill(process.workers()[0], signal.SIGKILL)
    assert_failed(process.end(), "CartPole-v1: a process died or hangs in a step")
    wait_for(lambda: not process.children())
    whole(wandb_files(tmp_path / "run")[0])


def test_an_error_in_a_worker_ends_the_run(start, tmp_path):
    kwargs = json.dumps({"where": "step", "at": 100})
    process = start(
        *ASYNC, "--run-dir", tmp_path / "run", "--env-id", "tests.environments:Raises-v0", "--env-kwargs", kwargs
    )
    outcome = process.end()
    assert outcome.code == 1 and "the step of this environment is broken" in outcome.err[-2]
    assert outcome.err[-1] == "in the step of tests.environments:Raises-v0"
    wait_for(lambda: not process.children())
    whole(wandb_files(tmp_path / "run")[0])


def test_training_goes_on_without_wandb(start, tmp_path):
    """W&B's server dies in the middle of the run."""
    directory = tmp_path / "run"
    flags = [*SMALL, "--total-timesteps", "3200", "--checkpoint-interval", "320"]
    process = start(*flags, "--run-dir", directory)
    wait_for(lambda: checkpoints(directory), process)
    os.kill(next(pid for pid, command in process.children().items() if "wandb-core" in command), signal.SIGKILL)
    outcome = process.end()
    assert outcome.code == 0, outcome
    assert [line.startswith("warning: the W&B record") for line in outcome.err] == [True, True], outcome.err
    assert (directory / "model.safetensors").exists()


def never_ends(**kwargs: int) -> list[str]:
    return ["--env-id", "tests.environments:NeverEnds-v0", "--env-kwargs", json.dumps(kwargs)]


@pytest.mark.parametrize("which, at", [(0, 20), (1, 17)])
def test_a_signal_lets_the_iteration_finish(which, at, tmp_path):
    directory = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    outcome = main(*SILENT, *never_ends(which=which, at=at), "--checkpoint-interval", "0", "--run-dir", directory)
    assert outcome.code == 143 and shlex.split(outcome.err[0])[-1] == str(directory)
    assert [step_of(path) for path in checkpoints(directory)] == [64]  # the second iteration's end
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_ends_an_evaluation(tmp_path, monkeypatch):
    """An evaluation may last for hours: it must not hold up a signal."""
    monkeypatch.setattr(ppo_torch, "LONGEST_EVALUATION", 1000)
    environments.NeverEnds.all_steps = 0
    flags = [*SILENT, *never_ends(which=2, at=10), "--eval-interval", "64", "--checkpoint-interval", "0"]
    outcome = main(*flags, "--run-dir", tmp_path / "run")
    assert outcome.code == 143
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [64]
    assert environments.NeverEnds.all_steps <= 64 + 2 * 10


# -------------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with normalisation; only to be read."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert main(*FINISHED, "--run-dir", directory).code == 0
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def header_end(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


DAMAGES = {
    "emptied": lambda data: b"",
    "cut in the header's length": lambda data: data[:4],
    "cut in the header": lambda data: data[:100],
    "cut after the header": lambda data: data[: header_end(data)],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "with a byte more": lambda data: data + b"\0",
    "a bit of the header's length": lambda data: flipped(data, 0),
    "a bit of the header": lambda data: flipped(data, 50),
    "a bit of the metadata": lambda data: flipped(
        data, data.index(b"iteration") if b"iteration" in data else data.index(b"env_id")
    ),
    "a bit of the first tensor": lambda data: flipped(data, header_end(data)),
    "a bit of the last tensor": lambda data: flipped(data, len(data) - 1),
    "zeros": lambda data: bytes(len(data)),
    "a pickle": lambda data: (
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    ),
    "text": lambda data: b"not a model",
}


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_other(how, copied, finished):
    older, newest = checkpoints(copied)
    damage(newest, how)
    (copied / "model.safetensors").unlink()
    outcome = main("--resume", copied)
    assert outcome.code == 0
    assert len(outcome.err) == 1 and outcome.err[0].startswith("warning: ") and str(newest) in outcome.err[0]
    assert_same_model(copied, finished)
    assert checkpoints(copied) == [older, newest] and tensors(newest) == tensors(checkpoints(finished)[-1])


def test_two_damaged_checkpoints(copied):
    for path, how in zip(checkpoints(copied), ("cut in the middle", "a bit of the last tensor"), strict=True):
        damage(path, how)
    before = sorted(copied.rglob("*"))
    outcome = main("--resume", copied)
    assert outcome.code == 2 and outcome.err[-1].startswith("ppo_torch.py: ") and str(copied) in outcome.err[-1]
    assert [line.startswith("warning: ") for line in outcome.err[:-1]] == [True, True]
    assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize("hidden_sizes", [[32], [64, 64, 64]])
def test_a_checkpoint_of_another_shape(hidden_sizes, copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"hidden_sizes": hidden_sizes}))
    outcome = main("--resume", copied)
    assert outcome.code == 2 and outcome.err[-1].startswith("ppo_torch.py: ")


def test_a_model_is_no_checkpoint(copied):
    for path in checkpoints(copied):
        shutil.copy(copied / "model.safetensors", path)
    outcome = main("--resume", copied)
    assert outcome.code == 2 and outcome.err[-1].startswith("ppo_torch.py: ")


CHANGED_CONFIGS = {
    "a list": lambda config: list(config),
    "a text for a number": lambda config: config | {"num_envs": "two"},
    "a number for a list": lambda config: config | {"hidden_sizes": 3},
    "no W&B id": lambda config: {name: value for name, value in config.items() if name != "wandb_id"},
    "no gamma": lambda config: {name: value for name, value in config.items() if name != "gamma"},
    "gamma out of range": lambda config: config | {"gamma": 2},
}


@pytest.mark.parametrize("change", CHANGED_CONFIGS)
def test_a_damaged_config(change, copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(CHANGED_CONFIGS[change](config)))
    assert_refused(main("--resume", copied))


@pytest.mark.parametrize("text", ["", "{", "nonsense", "\udcff"])
def test_a_config_that_is_no_json(text, copied):
    (copied / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(main("--resume", copied), str(copied))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model(how, finished, tmp_path):
    model = Path(shutil.copy(finished / "model.safetensors", tmp_path))
    damage(model, how)
    assert_refused(main(*SILENT, *NORMALISED, "--load-model", model), str(model))
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "BOOL", "U16", "F4", "C64"])
def test_a_foreign_model(dtype, tmp_path):
    """A whole safetensors file of another program, with a type that numpy may lack."""
    size = {"BF16": 16, "F16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8, "F4": 4, "C64": 64}[dtype] * 8 // 8
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    (tmp_path / "foreign.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    assert_refused(main(*SILENT, "--load-model", tmp_path / "foreign.safetensors"), "foreign.safetensors")


@pytest.mark.parametrize(
    "flags",
    ["", "--norm-obs", "--norm-obs --norm-reward --hidden-sizes 32", "--norm-obs --norm-reward --env-id Pendulum-v1"],
)
def test_a_model_of_another_shape(flags, finished):
    assert_refused(
        main(*SILENT, *flags.split(), "--load-model", finished / "model.safetensors"), "--load-model", " is "
    )
    assert list(Path.cwd().iterdir()) == []


def corrupted(data: bytes, rng: random.Random) -> bytes:
    """With a few random flips, cuts, repetitions and the like"""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        i = rng.randrange(len(data))
        j = min(len(data), i + rng.randrange(1, 40))
        match rng.choice(("flip", "flip", "byte", "cut", "drop", "repeat", "noise", "swap")):
            case "flip":
                data[i] ^= 1 << rng.randrange(8)
            case "byte":
                data[i] = rng.choice(b'0129"{}[]:,\\ Ff\x00\xff')
            case "cut":
                del data[max(1, i) :]
            case "drop":
                del data[max(1, i) : j]
            case "repeat":
                data[i:i] = data[i:j]
            case "noise":
                data[i:j] = rng.randbytes(j - i)
            case "swap":
                k = rng.randrange(len(data))
                data[i], data[k] = data[k], data[i]
    return bytes(data)


def test_random_damage_is_noticed(tmp_path):
    """Either BadInput or the very same arrays, whatever happened to the file."""
    rng = random.Random(0)
    arrays = {
        "weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "mean": np.linspace(0, 1, 5),
        "count": np.array(3.5),
        "step": np.arange(6, dtype=np.int64),
        "frames": np.arange(7, dtype=np.uint8),
        "nothing": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "arrays.safetensors"
    ppo_torch.save_arrays(path, arrays, {"iteration": 7, "text": 'π " \n', "rng": {"state": 2**127}})
    whole, (_, metadata) = path.read_bytes(), ppo_torch.load_arrays(path)
    outcomes = {"same": 0, "refused": 0}
    for _ in range(400):
        data = corrupted(whole, rng)
        path.write_bytes(data)
        try:
            loaded, loaded_metadata = ppo_torch.load_arrays(path)
        except ppo_torch.BadInput as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and str(path) in str(error)
            continue
        outcomes["same"] += 1
        assert loaded_metadata == metadata and loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
            assert loaded[name].tobytes() == array.tobytes()
    assert outcomes["refused"] > 300, outcomes


@pytest.mark.parametrize("moment", ["before training", "while W&B starts"])
def test_ctrl_c_before_training(moment, start, tmp_path):
    """One line, exit 130; the same command begins anew, or --resume does where W&B has the run already."""
    directory = tmp_path / "run"
    process = start(*ENDLESS, "--run-dir", directory, "--vectorization", "async")
    if moment == "before training":
        wait_for(process.workers, process)
    else:
        wait_for(lambda: any(directory.glob("config.*")), process)
    os.killpg(process.pid, signal.SIGINT)
    outcome = process.end()
    assert outcome.code == 130 and len(outcome.err) == 1, outcome
    wait_for(lambda: not process.children())
    again = ["--resume", directory] if (directory / "config.json").exists() else [*ENDLESS, "--run-dir", directory]
    assert main(*again, "--total-timesteps", "64", "--wandb-mode", "disabled").code == 0
    assert step_of(checkpoints(directory)[-1]) == 64


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    """The disk is full in the middle of a file; here a limit of its size says so."""
    path, arrays = tmp_path / "arrays.safetensors", {"a": np.ones(10)}
    ppo_torch.save_arrays(path, arrays, {"iteration": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ppo_torch.TrainingFailed, match="File too large"):
            ppo_torch.save_arrays(path, {"a": np.zeros(10_000)}, {"iteration": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded, metadata = ppo_torch.load_arrays(path)
    assert metadata == {"iteration": 1} and np.array_equal(loaded["a"], arrays["a"])


# ------------------------------------------------------------------------------------------------------------ bad input


def case(flags: str, *words: str, marks=()) -> object:
    return pytest.param(shlex.split(flags), words, id=flags or "none", marks=marks)


def strange(**kwargs: str) -> str:
    return f"--env-id tests.environments:Spaces-v0 --env-kwargs {shlex.quote(json.dumps(kwargs))}"


NUMBERS = {  # values out of range of every flag that takes a number
    "seed": "-1 1.5 x 4294967296",
    "total_timesteps": "-1 31 x",
    "learning_rate": "0 -1 nan inf x",
    "final_learning_rate": "-1 nan inf",
    "num_envs": "0 -1",
    "num_steps": "0 -1",
    "gamma": "-0.1 1.1 nan",
    "gae_lambda": "-0.1 1.1 nan",
    "num_minibatches": "0 -1 3 32 64",
    "update_epochs": "0 -1",
    "clip_coef": "0 -1 nan inf",
    "ent_coef": "-1 nan inf",
    "vf_coef": "-1 nan inf",
    "max_grad_norm": "0 -1 nan inf",
    "target_kl": "0 -1 nan x",
    "adam_eps": "0 -1 nan inf",
    "hidden_sizes": "0 -3 x",
    "num_threads": "-1 x",
    "timing_interval": "-1 x",
    "eval_episodes": "-1 x",
    "eval_interval": "-1 x",
    "checkpoint_interval": "-1 x",
}
BAD_INPUT = [
    *(
        case(f"--{name.replace('_', '-')} {v}", f"--{name.replace('_', '-')}")
        for name in NUMBERS
        for v in NUMBERS[name].split()
    ),
    case("--num-envs 3 --num-steps 5 --num-minibatches 4", "--num-minibatches"),
    case("--env-id NoSuch-v0", "NoSuch"),
    case("--env-id CartPole-v99", "CartPole", "v1"),
    case("--env-id ''", "--env-id"),
    case("--env-id a:b:c", "a:b:c"),
    case("--env-id no_such_module:Env-v0", "no_such_module"),
    case("--env-id ALE/NoSuch-v5", "ALE/NoSuch-v5"),
    case("--env-id dm_control/no-such-v0", "dm_control/no-such-v0", marks=pytest.mark.filterwarnings("ignore")),
    *(
        case(f"--env-kwargs {shlex.quote(text)}", "--env-kwargs")
        for text in ("{", "[1]", "null", "3", "{\n", "{'a': 1}", "")
    ),
    case("""--env-kwargs '{"nonsense": 1}'""", "nonsense", "CartPole-v1"),
    *(
        case(strange(action=name), "--env-kwargs", "action space")
        for name in ("multi-binary", "integers", "tuple", "table")
    ),
    *(case(strange(observation=name), "observation space") for name in ("sequence", "text", "graph")),
    case(strange(observation="small image"), "36"),
    case("--env-id ALE/Pong-v5 --norm-obs", "--norm-obs"),
    case("""--env-id ALE/Pong-v5 --env-kwargs '{"grayscale": false}'""", "grey"),
    case("""--env-id ALE/Pong-v5 --env-kwargs '{"img_height": 20, "img_width": 20}'""", "36", "(20, 20)"),
    case("--capture-video --env-id tests.environments:Counting-v0", "--capture-video"),
    case("--device tpu", "--device"),
    case("--vectorization threads", "--vectorization"),
    case("--wandb-mode yes", "--wandb-mode"),
    case("--wandb-project a/b --wandb-mode offline", "--wandb-project", "a/b"),
    case("--load-model /no/such/file", "/no/such/file"),
    case("--load-model /", "/"),
    case(f"--load-model {SCRIPT}", str(SCRIPT)),
    case("--resume /no/such/directory", "/no/such/directory"),
    case("--resume .", "--resume"),
    case(f"--resume {SCRIPT}", "--resume"),
    case(f"--run-dir {SCRIPT}/below/a/file", "below/a/file"),
    case(f"--run-dir {SCRIPT}", str(SCRIPT), "write"),
    case("--no-such-flag 1", "--no-such-flag"),
    case("positional", "positional"),
]


@pytest.mark.parametrize("module", [ppo_torch, ppo_mlx, ppo_jax], ids=lambda module: module.__name__)
@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(flags, words, module):
    outcome = main(*flags, module=module) if "--resume" in flags else main(*SILENT, *flags, module=module)
    assert_refused(outcome, *words, module=module)
    assert list(Path.cwd().iterdir()) == []


def test_every_number_has_its_bad_values():
    numbers = {f.name for f in dataclasses.fields(ppo_torch.Config) if any(t in str(f.type) for t in ("int", "float"))}
    assert numbers == NUMBERS.keys()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device):
    import torch

    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"{device} is there")
    assert_refused(main(*SILENT, "--device", device), f"--device {device}", "cpu")


def test_a_directory_that_holds_a_run(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert_refused(main(*SILENT, "--run-dir", copied), f"--resume {copied}")
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_two_runs_of_one_second_have_a_directory_each(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda style: "now")
    (first, _), (second, _) = (ppo_torch.directory_of_run(ppo_torch.Config()) for _ in range(2))
    assert first == Path("runs/CartPole-v1__ppo_torch__1__now") and second != first
    assert second.name.startswith(first.name)


def test_a_name_that_is_too_long_for_a_directory():
    name = 260 * "x"
    assert_refused(main(*SILENT, "--exp-name", name), name, "too long")


def test_a_film_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("moviepy.ImageSequenceClip.write_videofile", full)
    outcome = main(*SILENT, "--capture-video", "--run-dir", tmp_path / "run")
    assert outcome.code == 0 and (tmp_path / "run/model.safetensors").exists()
    assert outcome.err == ["warning: no film of step 320: No space left on device"]


def test_too_many_threads_do_not_crash(start):
    assert_refused(start(*SILENT, "--num-threads", "100000", "--run-dir", Path.cwd() / "run").end(), "--num-threads")


@pytest.mark.parametrize(
    "flags, code",
    [
        ("--env-id NoSuch-v0", 2),
        ("--gamma 2", 2),
        ("--nonsense", 2),
        ("--load-model setup.cfg --vectorization async", 2),
    ],
)
def test_bad_input_of_a_real_process(flags, code, start):
    process = start(*SILENT, "--run-dir", Path.cwd() / "run", *flags.split())
    assert_refused(process.end())
    wait_for(lambda: not process.children())
    assert list(Path.cwd().iterdir()) == []


ONLINE = [*SMALL, "--wandb-mode", "online"]


def test_wandb_online_without_a_key(start, tmp_path):
    process = start(*ONLINE, "--run-dir", tmp_path / "run")
    assert_refused(process.end(), "--wandb-mode online", "key")
    assert not (tmp_path / "run").exists(), "after `wandb login` the same command would be refused"


def test_wandb_online_without_a_key_does_not_ask_for_one(tmp_path):
    """In a terminal W&B would show a menu and wait."""
    ours, theirs = pty.openpty()
    command = [sys.executable, SCRIPT, *ONLINE, "--run-dir", tmp_path / "run"]
    variables = environment_variables(tmp_path)
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        said, deadline = b"", time.monotonic() + DEADLINE
        while process.poll() is None and b"choice" not in said and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # closed
                    said += os.read(ours, 4096)
        assert process.poll() == 2, said.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{package}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize(
    "package, flags",
    [
        ("ale_py", "--env-id ALE/Pong-v5"),
        ("shimmy", "--env-id dm_control/cartpole-swingup-v0"),
        ("Box2D", "--env-id LunarLander-v3"),
        ("moviepy", "--capture-video"),
    ],
)
def test_a_missing_package(package, flags, start, tmp_path):
    """Before training, and with the requirements file that brings it."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(package=package))
    outcome = start(*SILENT, "--run-dir", tmp_path / "run", *flags.split(), PYTHONPATH=str(tmp_path)).end()
    assert_refused(outcome, "requirements/")
    assert not (tmp_path / "run").exists()


def test_a_missing_module_of_ones_own_is_in_no_requirements(start):
    outcome = start(*SILENT, "--env-id", "no_such_module:Env-v0").end()
    assert_refused(outcome, "No module named 'no_such_module'")
    assert "requirements/" not in outcome.err[0]


# --------------------------------------------------------------------------------------------------------- not a number


def assert_finite(path: Path) -> None:
    arrays, _ = ppo_torch.load_arrays(path)
    assert [name for name, array in arrays.items() if not np.isfinite(array).all()] == []


def not_a_number(**kwargs) -> list[str]:
    return [
        "--env-id",
        "tests.environments:NotANumber-v0",
        "--env-kwargs",
        json.dumps({"length": 200, "at": 70} | kwargs),
    ]


@pytest.mark.parametrize("flags", [[], NORMALISED, ["--clip-reward"]], ids=" ".join)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_an_environment_that_gives_no_number_is_named(what, value, flags, tmp_path):
    """Normalising and clipping must not hide where the number came from."""
    directory = tmp_path / "run"
    flags = [*SILENT, *flags, *not_a_number(what=what, value=value, which=1), "--checkpoint-interval", "32"]
    flags += ["--num-steps", "100", "--total-timesteps", "800"]
    outcome = main(*flags, "--run-dir", directory)
    assert_failed(outcome, "NotANumber-v0", what, "not finite")
    assert not (directory / "model.safetensors").exists()


def test_a_last_observation_that_is_no_number_is_named(tmp_path):
    """The one that a truncation bootstraps from, which no rollout holds."""
    flags = not_a_number(what="observation", length=10, at=10, truncate=True, which=1)
    assert_failed(main(*SILENT, *flags, "--run-dir", tmp_path / "run"), "NotANumber-v0", "observation", "not finite")


def test_the_last_good_checkpoint_stays(tmp_path):
    """Step 70 of an environment is in the fifth iteration, if nothing is reset before: the checkpoint of 96 is good."""
    directory = tmp_path / "run"
    flags = not_a_number(what="reward", which=3)  # 0 and 1 until 96
    flags = [*SILENT, *flags, "--checkpoint-interval", "96", "--num-steps", "24", "--num-minibatches", "2"]
    flags += ["--total-timesteps", "960"]
    assert_failed(
        main(*flags, "--run-dir", directory, "--env-kwargs", json.dumps({"what": "reward", "at": 10, "which": 3}))
    )
    assert [step_of(path) for path in checkpoints(directory)] == [96]
    assert_finite(checkpoints(directory)[0])
    assert not (directory / "model.safetensors").exists()


@pytest.mark.parametrize(("what", "at"), [("observation", 5), ("reward", 5), ("reward", 20)])
@pytest.mark.parametrize("module", [ppo_torch, ppo_lstm_jax], ids=lambda module: module.__name__)
def test_an_evaluation_that_gives_no_number_is_named(module, what, at, tmp_path):
    """Also in the last step of an episode, of 20"""
    flags = [*SILENT, *not_a_number(what=what, length=20, at=at, which=2), "--checkpoint-interval", "0"]
    flags += ["--sequence-length", "8"] if module is ppo_lstm_jax else []
    outcome = main(*flags, "--run-dir", tmp_path / "run", module=module)
    assert_one_line(outcome, 1, "NotANumber-v0", what, "not finite", module=module)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_an_exploding_run_stops(env_id, tmp_path):
    directory = tmp_path / "run"
    flags = ["--env-id", env_id, "--learning-rate", "1e30", "--checkpoint-interval", "0"]
    outcome = main(*SILENT, *flags, "--run-dir", directory)
    assert_failed(outcome, "loss", "not finite", "step 32")  # in the first iteration, not where the run would end
    assert env_id not in outcome.err[0] and not (directory / "model.safetensors").exists()


@pytest.mark.parametrize(("total_timesteps", "checkpoint_interval"), [(32, 32), (64, 32), (320, 32), (32, 0)])
def test_weights_that_are_no_numbers_stop_the_run(total_timesteps, checkpoint_interval, tmp_path):
    """One step of 3e38 from finite gradients: nothing but the weights shows it, and no environment is to blame."""
    flags = "--env-id Pendulum-v1 --learning-rate 3e38 --num-minibatches 1 --update-epochs 1 --max-grad-norm 1e9"
    flags += f" --total-timesteps {total_timesteps} --checkpoint-interval {checkpoint_interval}"
    flags = [*SILENT, *flags.split()]
    outcome = main(*flags, "--run-dir", tmp_path / "run")
    assert_failed(outcome, "not finite")
    assert "Pendulum" not in outcome.err[0]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for path in checkpoints(tmp_path / "run"):
        assert_finite(path)


@pytest.mark.parametrize(
    "flags", ["--learning-rate 1e10", "--learning-rate 1e6", "--num-minibatches 1 --max-grad-norm 1e-30"]
)
def test_a_record_that_cannot_be_drawn_stops_nothing(flags, tmp_path):
    """Advantages of 1e20 or all but equal: too much for a histogram. The run ends, or says what is not finite."""
    outcome = main(*SILENT, *flags.split(), "--run-dir", tmp_path / "run")
    assert outcome.code == 0 or "not finite" in outcome.err[-1]


# ------------------------------------------------------------------------------------------------------ reproducibility


def model_of(directory: Path, *flags: str) -> dict[str, tuple]:
    assert main(*FINISHED, *flags, "--run-dir", directory).code == 0
    return tensors(directory / "model.safetensors")


def test_a_seed_decides_everything(finished, tmp_path):
    reference = tensors(finished / "model.safetensors")
    assert model_of(tmp_path / "same") == reference
    weights = [name for name in reference if "weight" in name]
    other = model_of(tmp_path / "other", "--seed", "2")
    assert [name for name in weights if other[name] == reference[name]] == []
    untrained = [model_of(tmp_path / f"untrained {seed}", "--total-timesteps", "0", "--seed", seed) for seed in "12"]
    assert [name for name in weights if untrained[0][name] == untrained[1][name]] == []


def test_every_checkpoint_begins_other_episodes(tmp_path):
    """Seeds of environments differ between checkpoints, environments and runs, and from those of evaluation."""
    seeds = []
    for seed in ("1", "2"):
        environments.Counting.seeds.clear()
        flags = ["--env-id", "tests.environments:Counting-v0", "--checkpoint-interval", "96", "--eval-interval", "160"]
        assert main(*SILENT, *flags, "--seed", seed, "--run-dir", tmp_path / seed).code == 0
        seeds += environments.Counting.seeds
    assert len(seeds) == 2 * 2 * (4 + 2)  # starts at 0 96 192 288 and evaluations at 160 320, 2 environments each
    assert len(set(seeds)) == 2 * 2 * (4 + 1)  # evaluations of a run hold the same episodes


@pytest.mark.parametrize(
    "flags",
    ["--timing-interval 1", "--timing-interval 0", "--eval-interval 32", "--eval-episodes 0", "--wandb-mode offline"],
)
def test_what_only_watches_changes_nothing(flags, finished, tmp_path):
    """Timing, evaluation and record leave no trace in weights and statistics."""
    assert model_of(tmp_path / "run", *flags.split()) == tensors(finished / "model.safetensors")


def test_processes_learn_what_one_process_learns(start, tmp_path):
    flags = [*SILENT, *NORMALISED, "--checkpoint-interval", "160"]
    process = start(*flags, "--vectorization", "async", "--run-dir", tmp_path / "async")
    assert process.end().code == 0
    assert main(*flags, "--run-dir", tmp_path / "sync").code == 0
    assert_same_model(tmp_path / "async", tmp_path / "sync")
    wait_for(lambda: not process.children())


# -------------------------------------------------------------------------------------------- environments of all kinds


@pytest.mark.parametrize("flags", [[], NORMALISED, ["--gamma", "0"]], ids=" ".join)
@pytest.mark.parametrize("truncate", [False, True])
def test_an_environment_that_ends_in_every_step(truncate, flags, tmp_path):
    kwargs = json.dumps({"truncate": truncate})
    ends = ["--env-id", "tests.environments:EndsEveryStep-v0", "--env-kwargs", kwargs]
    outcome = main(*SILENT, *flags, *ends, "--run-dir", tmp_path / "run")
    assert outcome.code == 0
    assert "return 1.0 ± 0.0" in outcome.out
    assert_finite(tmp_path / "run" / "model.safetensors")


def test_an_environment_that_never_ends(tmp_path, monkeypatch):
    """An evaluation gives up at some point, and says so."""
    monkeypatch.setattr(ppo_torch, "LONGEST_EVALUATION", 500)
    environments.NeverEnds.all_steps = 0
    outcome = main(*SILENT, *never_ends(), "--run-dir", tmp_path / "run")
    assert outcome.code == 0
    assert environments.NeverEnds.all_steps == LAST_STEP + 2 * 500
    assert "evaluation" in outcome.out + "".join(outcome.err)
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("where, at", [("step", 1), ("step", 20), ("reset", 1), ("reset", 3), ("close", 1)])
def test_an_environment_that_raises(where, at, tmp_path):
    """The error comes through, or a line with its text; the record is closed; an error at the end loses nothing."""
    raises = ["--env-id", "tests.environments:Raises-v0", "--env-kwargs", json.dumps({"where": where, "at": at})]
    directory = tmp_path / "run"
    flags = [*SMALL, *raises, "--checkpoint-interval", "0", "--run-dir", directory]
    try:
        outcome = main(*flags)
    except RuntimeError as error:
        assert f"the {where} of this environment is broken" in str(error)
    else:
        assert (
            outcome.code == 0 if where == "close" else f"the {where} of this environment is broken" in outcome.err[-1]
        )
    assert (directory / "model.safetensors").exists() == (where == "close")
    whole(wandb_files(directory)[0])
