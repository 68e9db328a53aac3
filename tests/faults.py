"""What happens to real runs, done to every script on purpose: one row of results/faults.csv a script and fault.

    python tests/faults.py --whole                            all of it (an hour on two cores), and the README's table
    python tests/faults.py --whole --script vpg_torch --kind killed stopped          a part; other rows stay
    python tests/faults.py                                    each fault once

Processes, files, signals, mounts and networks are real. What a fault needs that is not there (root, for a small disk)
is left out with a word. Faults that need no process of their own run in this one, through the script's `main`.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import compare  # noqa: E402
from benchmarks import files  # noqa: E402
from tests.test_reliability import (  # noqa: E402
    DAMAGES,
    Outcome,
    Process,
    assert_one_line,
    assert_same_model,
    checkpoints,
    corrupted,
    damage,
    main,
    step_of,
    tensors,
    wait_for,
)

SCRIPTS = ("vpg_torch", "ppo_torch", "ppo_mlx", "ppo_jax", "ppo_lstm_jax", "td3_jax", "sac_jax", "mpo_jax")
RESULTS = ROOT / "results" / "faults.csv"
KINDS = ("killed", "stopped", "damaged", "environment", "machine", "input", "reproducible")

COMMON = "--num-envs 2 --eval-episodes 2 --vectorization sync --seed 3"
ON_POLICY = "--env-id CartPole-v1 --num-steps 16 --eval-interval 384 --total-timesteps 1280"
OFF_POLICY = "--env-id Pendulum-v1 --hidden-sizes 16 16 --learning-starts 200 --batch-size 8 --log-interval 50 "
OFF_POLICY += "--eval-interval 500 --total-timesteps 1600 --buffer-size 1000"
OFTEN = {"on": "128", "off": "200"}  # steps between checkpoints


@dataclass(frozen=True)
class Script:
    name: str
    folder: Path  # for all that its faults write

    @property
    def path(self) -> Path:
        return ROOT / f"{self.name}.py"

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    @property
    def is_off_policy(self) -> bool:
        return self.name in ("td3_jax", "sac_jax", "mpo_jax")

    @property
    def flags(self) -> list[str]:
        """Of a run that ends after a second or two, with ten checkpoints and three evaluations"""
        flags = [*COMMON.split(), *(OFF_POLICY if self.is_off_policy else ON_POLICY).split()]
        flags += ["--checkpoint-interval", OFTEN["off" if self.is_off_policy else "on"]]
        flags += ["--norm-obs", "--norm-reward"] if self.name.startswith("ppo") else []
        flags += ["--value-iters", "3"] if self.name == "vpg_torch" else []
        return flags + (["--sequence-length", "8"] if self.name == "ppo_lstm_jax" else [])

    @property
    def short(self) -> list[str]:
        """The same with few iterations, unrecorded"""
        steps, interval = ("600", "200") if self.is_off_policy else ("320", "96")
        shorter = ["--total-timesteps", steps, "--checkpoint-interval", interval, "--eval-interval", "0"]
        return [*self.flags, *shorter, "--wandb-mode", "disabled"]

    @property
    def endless(self) -> list[str]:
        return [
            *self.flags,
            "--total-timesteps",
            "100000000",
            "--checkpoint-interval",
            "100000000",
            "--eval-interval",
            "0",
        ]

    @property
    def iteration_steps(self) -> int:
        return 50 if self.is_off_policy else 32

    def environment(self, name: str, **kwargs) -> list[str]:
        """Flags of a misbehaving environment with the actions that this script takes"""
        kwargs |= {"box": True} if self.is_off_policy else {}
        return ["--env-id", f"tests.environments:{name}-v0", "--env-kwargs", json.dumps(kwargs)]

    def new(self, name: str) -> Path:
        """A folder that is not there yet"""
        return next(path for n in itertools.count() if not (path := self.folder / f"{name} {n}").exists())

    def main(self, *flags: str | Path) -> Outcome:
        """In this process; compiled functions are forgotten, as JAX would keep those of every run."""
        try:
            return main(*flags, module=self.module)
        finally:
            jax.clear_caches()

    def start(self, *flags: str | Path, prefix: tuple = (), **variables: str) -> Process:
        return Process(self.new("output"), *flags, prefix=prefix, script=self.path, **variables)

    @cached_property
    def finished(self) -> Path:
        """A finished run with two checkpoints, only to be read"""
        directory = self.new("finished")
        assert self.main(*self.short, "--run-dir", directory).code == 0
        return directory

    @cached_property
    def elsewhere(self) -> Path:
        """A finished run in an environment with other shapes"""
        directory = self.new("elsewhere")
        env_id = "MountainCarContinuous-v0" if self.is_off_policy else "Acrobot-v1"
        assert self.main(*self.short, "--env-id", env_id, "--run-dir", directory).code == 0
        return directory

    def reference(self, timing: int) -> tuple[Path, float]:
        """A recorded run that nothing interrupted, and how many seconds it took"""
        key = f"reference {timing}"
        if key not in self.__dict__:
            directory, start = self.new(key), time.monotonic()
            assert self.main(*self.flags, "--timing-interval", str(timing), "--run-dir", directory).code == 0
            self.__dict__[key] = directory, time.monotonic() - start
        return self.__dict__[key]


class Fault(NamedTuple):
    kind: str
    name: str  # as the table has it
    times: int  # in the whole form
    function: Callable[[Script, int, random.Random], Iterator[str | None]]  # yields once a try: None, or what broke


FAULTS: list[Fault] = []


def fault(kind: str, name: str, times: int = 1):
    """Registers a generator that tries a fault so many times and yields None where it held, else what did not."""

    def register(function: Callable) -> Callable:
        FAULTS.append(Fault(kind, name, times, function))
        return function

    return register


def tried(attempt: Callable, *arguments) -> str | None:
    """What did not hold, if anything"""
    try:
        attempt(*arguments)
    except NotImplementedError:
        raise
    except (Exception, pytest.fail.Exception) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{arguments} {where.name}:{where.lineno} {type(error).__name__}: {str(error)[:1000]}"
    return None


def kill_all(process: Process) -> None:
    for pid in [*process.children(), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.popen.wait()


# -------------------------------------------------------------------------------------------------------------- killed

# A process that dies in the n-th call of a phase, after a share of the seconds that the call before took.
DIES_IN_PHASE = """
import importlib, os, signal, sys, threading, time
from pathlib import Path
_, phase, number, share, *sys.argv = sys.argv
sys.path.insert(0, os.getcwd())
module, number, seconds = importlib.import_module(Path(sys.argv[0]).stem), int(number), 0.0
original = module.Stopwatch.timed
def timed(self, name, *arguments, **options):
    global number, seconds
    if name != phase:
        return original(self, name, *arguments, **options)
    number -= 1
    start = time.perf_counter()
    if number == 0:
        threading.Timer(float(share) * seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    result = original(self, name, *arguments, **options)
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    seconds = time.perf_counter() - start
    return result
module.Stopwatch.timed = timed
sys.exit(module.main())
"""


def phases(script: Script, timing: int) -> dict[str, int]:
    """Where to die, and the calls of each in about a quarter of the run"""
    iterations = 8 if script.is_off_policy else 10
    steps = 25 if script.is_off_policy else 16  # of an iteration
    calls = {"step": steps * iterations, "checkpoint": 5, "record": iterations if timing else 3, "evaluation": 1}
    if timing:
        return calls | {"forward": steps * iterations, "loss": iterations, "weight_update": iterations}
    return calls | {"update": iterations}


def kill_once(script: Script, where: str, command: list, seconds: float, timing: int, rng: random.Random) -> bool:
    """Whether the process was killed, and had not ended before"""
    if where == "any moment":
        process = script.start(*command)
        wait_for(lambda: "step/s" in process.err.read_text() or process.popen.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(rng.uniform(0, 0.5 * seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    else:
        least = 3 if where == "checkpoint" else 1  # two calls each: there is one to resume from
        number = rng.randint(least, phases(script, timing)[where])
        process = script.start(*command, prefix=("-c", DIES_IN_PHASE, where, str(number), str(rng.random())))
    outcome = process.end()
    assert outcome.code in (0, -signal.SIGKILL), outcome
    assert where != "checkpoint" or checkpoints(command[-1])
    wait_for(lambda: not process.children())  # W&B's server has written all that it got
    return outcome.code == -signal.SIGKILL


def killed_chain(script: Script, moments: list[str], timing: int, rng: random.Random) -> int:
    """One run, killed and resumed again and again -> how many times before it ended"""
    reference, seconds = script.reference(timing)
    directory = script.new("killed")
    command, kills = [*script.flags, "--timing-interval", str(timing), "--run-dir", directory], 0
    for where in moments:
        is_killed = kill_once(script, where, command, seconds, timing, rng)
        if (directory / "config.json").exists():
            command = ["--resume", directory]
        if not is_killed:
            break
        kills += 1
    outcome = script.start(*command).end()
    assert outcome.code == 0 and all("no checkpoint yet" in line for line in outcome.err), outcome
    assert_same_model(directory, reference)
    assert [step_of(path) for path in checkpoints(directory)] == [step_of(path) for path in checkpoints(reference)]
    assert_same_record(script, directory, reference, timing)
    shutil.rmtree(directory)
    return kills


def assert_same_record(script: Script, directory: Path, reference: Path, timing: int) -> None:
    """As compare.py joins it no step is missing or twice there; where each iteration has a row, rows are the same."""
    ours, theirs = (
        {row["global_step"]: row for row in compare.read_directory(d)[0].rows} for d in (directory, reference)
    )
    last = max(theirs)
    assert max(ours) == last
    if timing:
        assert list(ours) == list(theirs) == list(range(script.iteration_steps, last + 1, script.iteration_steps))
        for step in ours:
            same = {key for key in theirs[step] if key.startswith("losses/") or key == "charts/evaluation_return"}
            assert {key: ours[step].get(key) for key in same} == {key: theirs[step][key] for key in same}, step
    interval = int(OFTEN["off" if script.is_off_policy else "on"])  # a checkpoint ends a row
    assert set(range(interval, last + 1, interval)) <= ours.keys(), sorted(ours)


MOMENTS = ("checkpoint", "any moment", "step", "update", "checkpoint", "any moment", "record", "evaluation")
MOMENTS_TIMED = ("loss", "any moment", "weight_update", "checkpoint", "forward", "record", "evaluation", "any moment")


@fault("killed", "`kill -9` at random moments, `--resume`: same weights and record, to the bit", times=20)
def killed(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    wheres = [itertools.cycle(MOMENTS), itertools.cycle(MOMENTS_TIMED)]
    for chain in itertools.count():
        timing, kills = chain % 2, 0
        moments = list(itertools.islice(wheres[timing], min(4, times)))

        def attempt(moments: list[str], timing: int) -> None:
            nonlocal kills
            kills = killed_chain(script, moments, timing, rng)

        problem = tried(attempt, moments, timing)
        yield from [problem] if problem else [None] * min(kills, times)
        times -= 1 if problem else kills
        if times <= 0:
            return


# ------------------------------------------------------------------------------------------------------------- stopped


def stopped_once(script: Script, number: int, everyone: bool, vectorization: str, delay: float) -> None:
    directory = script.new("stopped")
    process = script.start(*script.endless, "--vectorization", vectorization, "--run-dir", directory)
    try:
        wait_for(lambda: process.err.read_text().count("step/s") > 3, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(delay)
        (os.killpg if everyone else os.kill)(process.pid, number)
        outcome = process.end()
        assert outcome.code == 128 + number, outcome
        assert len(outcome.err) == 1 and f"--resume {directory}" in outcome.err[0], outcome
        wait_for(lambda: not process.children())
    finally:
        kill_all(process)
    step = step_of(checkpoints(directory)[-1])
    assert step > 0 and not (directory / "model.safetensors").exists()
    assert compare.read_directory(directory)[0].rows[-1]["global_step"] == step
    further = step + 2 * script.iteration_steps
    outcome = script.main("--resume", directory, "--total-timesteps", further, "--wandb-mode", "disabled")
    assert outcome.code == 0 and step_of(checkpoints(directory)[-1]) == further, outcome


@fault("stopped", "SIGINT or SIGTERM at random moments: exit code, checkpoint, no process left, resumed", times=6)
def stopped(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    ways = list(itertools.product((signal.SIGINT, signal.SIGTERM), (False, True), ("sync", "async")))
    for way in rng.sample(ways, min(times, len(ways))):
        yield tried(stopped_once, script, *way, rng.uniform(0, 1.5))


# ------------------------------------------------------------------------------------------------------------- damaged


def copied(script: Script) -> tuple[Path, Path, Path]:
    """A copy of the finished run without its model, its older and its newest checkpoint"""
    directory = Path(shutil.copytree(script.finished, script.new("copied")))
    (directory / "model.safetensors").unlink()
    return directory, *checkpoints(directory)


def falls_back(script: Script, change: Callable[[Path], None]) -> None:
    directory, _, newest = copied(script)
    change(newest)
    outcome = script.main("--resume", directory)
    assert outcome.code == 0 and len(outcome.err) == 1, outcome
    assert outcome.err[0].startswith("warning: ") and str(newest) in outcome.err[0], outcome
    assert_same_model(directory, script.finished)
    shutil.rmtree(directory)


@fault("damaged", "newest checkpoint cut, flipped, emptied, a pickle: the one before is used", times=len(DAMAGES))
def damaged_checkpoint(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    for how in rng.sample(list(DAMAGES), times):
        yield tried(falls_back, script, lambda path, how=how: damage(path, how))


@fault("damaged", "newest checkpoint of another script, environment, seed or version: the one before is used", times=4)
def foreign_checkpoint(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    other = Script("ppo_mlx" if script.name == "ppo_torch" else "ppo_torch", script.folder)
    seed = script.new("seed")
    assert script.main(*script.short, "--seed", "4", "--run-dir", seed).code == 0

    def of_old_version(path: Path) -> None:
        arrays, progress = script.module.load_arrays(path)
        script.module.save_arrays(path, arrays, {name: x for name, x in progress.items() if name != "run_id"})

    foreign = [lambda path, d=d: shutil.copy(checkpoints(d)[-1], path) for d in (script.elsewhere, seed)]
    if times > 2:
        foreign.append(lambda path: shutil.copy(checkpoints(other.finished)[-1], path))
    for change in [of_old_version, *foreign][:times]:
        yield tried(falls_back, script, change)


@fault("damaged", "no checkpoint left that can be used, or `config.json` of another version: exit 2, one line", times=4)
def damaged_run(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def both_checkpoints() -> None:
        directory, *paths = copied(script)
        for path in paths:
            damage(path, rng.choice(list(DAMAGES)))
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.stem != "config"}
        outcome = script.main("--resume", directory)
        assert outcome.code == 2 and outcome.err[-1].startswith(f"{script.name}.py: ") and len(outcome.err) == 3, (
            outcome
        )
        assert all(path.read_bytes() == data for path, data in before.items())

    def config(change: Callable[[dict], object]) -> Callable[[], None]:
        def attempt() -> None:
            directory, *_ = copied(script)
            path = directory / "config.json"
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
            outcome = script.main("--resume", directory)
            assert outcome.code == 2 and outcome.err[-1].startswith(f"{script.name}.py: "), outcome

        return attempt

    without = config(lambda recorded: {name: x for name, x in recorded.items() if name != "gamma"})
    wider = config(lambda recorded: recorded | {"hidden_sizes": [24, 24]})
    empty = config(lambda recorded: {})
    for attempt in [both_checkpoints, without, wider, empty][:times]:
        yield tried(attempt)


@fault("damaged", "`model.safetensors` cut, flipped, emptied, a pickle: exit 2, one line", times=len(DAMAGES))
def damaged_model(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def refused(how: str) -> None:
        model = Path(shutil.copy(script.finished / "model.safetensors", script.new("model")))
        damage(model, how)
        directory = script.new("unused")
        outcome = script.main(*script.short, "--load-model", model, "--run-dir", directory)
        assert_one_line(outcome, 2, str(model), module=script.module)
        assert not directory.exists()

    for how in rng.sample(list(DAMAGES), times):
        yield tried(refused, how)


@fault("damaged", "`model.safetensors` of another script or environment: exit 2, one line", times=2)
def foreign_model(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def refused(run: Path) -> None:
        outcome = script.main(
            *script.short, "--load-model", run / "model.safetensors", "--run-dir", script.new("unused")
        )
        assert_one_line(outcome, 2, "--load-model", " is ", module=script.module)

    yield tried(refused, script.elsewhere)
    if times > 1:
        other = Script(
            "ppo_torch" if not script.name.startswith("ppo") or "lstm" in script.name else "vpg_torch", script.folder
        )
        yield tried(refused, other.finished)


@fault("damaged", "random corruption of a checkpoint: refused, or the very same arrays", times=300)
def fuzzed(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    ignored = shutil.ignore_patterns("wandb")
    directory = Path(shutil.copytree(script.reference(0)[0], script.new("copied"), ignore=ignored))
    older, newest = checkpoints(directory)
    older.unlink()
    run_id = json.loads((directory / "config.json").read_text())["wandb_id"]
    whole, (arrays, progress) = newest.read_bytes(), script.module.load_arrays(newest)
    _, undamaged = script.module.newest_checkpoint(directory, run_id)
    assert undamaged == progress  # one that refuses all would hold too

    def attempt() -> None:
        newest.write_bytes(corrupted(whole, rng))
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                found, found_progress = script.module.newest_checkpoint(directory, run_id)
            except script.module.BadInput:
                return
        assert found_progress == progress and found.keys() == arrays.keys()
        assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
        assert all((found[name].dtype, found[name].shape) == (x.dtype, x.shape) for name, x in arrays.items())

    for _ in range(times):
        yield tried(attempt)


# --------------------------------------------------------------------------------------------------------- environment


def refused_number(script: Script, directory: Path, what: str, value: float, **kwargs) -> None:
    kwargs = {"at": 7, "which": 1, "length": 9} | kwargs
    flags = script.environment("NotANumber", what=what, value=value, **kwargs)
    outcome = script.main(*script.short, *flags, "--run-dir", directory)
    assert_one_line(outcome, 1, "NotANumber-v0", what, "not finite", module=script.module)
    assert not (directory / "model.safetensors").exists()


@fault("environment", "NaN or infinite observation or reward, a last observation too: named, exit 1", times=5)
def not_a_number(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    numbers = math.nan, -math.inf
    ways = [("observation", math.nan, {"truncate": True, "at": 9})]
    ways += [("observation", value, {"box": True}) for value in numbers]  # what follows are actions that are no numbers
    ways += [("reward", value, {}) for value in numbers]
    for what, value, kwargs in ways[:times]:
        yield tried(lambda: refused_number(script, script.new("nan"), what, value, **kwargs))  # noqa: B023 (called here)


@fault("environment", "exception in `step` or `reset`, in one process or several: it comes through, named", times=4)
def raises(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt(where: str, vectorization: str) -> None:
        flags = [*script.environment("Raises", where=where, at=2 if where == "reset" else 30)]
        flags += ["--vectorization", vectorization, "--run-dir", script.new("raises")]
        process = script.start(*script.short, *flags)
        outcome = process.end()
        text = "\n".join(outcome.err)
        assert outcome.code == 1 and f"the {where} of this environment is broken" in text, outcome
        assert outcome.err[-1] == "in the step of tests.environments:Raises-v0"
        wait_for(lambda: not process.children())

    for where, vectorization in list(itertools.product(("step", "reset"), ("sync", "async")))[:times]:
        yield tried(attempt, where, vectorization)


@fault(
    "environment", "observation or reward of another shape or type, in one process or several: named, exit 1", times=10
)
def wrong_shape(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt(what: str, vectorization: str) -> None:
        flags = [*script.environment("Faulty", what=what), "--vectorization", vectorization]
        process = script.start(*script.short, *flags, "--run-dir", script.new("shape"))
        outcome = process.end()
        assert outcome.code == 1 and any("tests.environments:Faulty-v0" in line for line in outcome.err[-1:]), outcome
        wait_for(lambda: not process.children())

    kinds = ("longer", "shorter", "text", "no reward", "two rewards")
    for what, vectorization in list(itertools.product(kinds, ("sync", "async")))[:times]:
        yield tried(attempt, what, vectorization)


@fault("environment", "an episode in every step, terminated or truncated: trained", times=2)
def ends_every_step(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt(truncate: bool) -> None:
        flags = [*script.environment("EndsEveryStep", truncate=truncate), "--run-dir", script.new("every")]
        outcome = script.main(*script.short, *flags)
        assert outcome.code == 0 and outcome.err == [] and "return 1.0 ± 0.0" in outcome.out, outcome

    for truncate in (True, False)[:times]:
        yield tried(attempt, truncate)


@fault("environment", "episodes that never end: trained, the evaluation gives up and says so")
def never_ends(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script.module, "LONGEST_EVALUATION", 200)
            outcome = script.main(*script.short, *script.environment("NeverEnds"), "--run-dir", script.new("never"))
        assert outcome.code == 0 and "did not end" in outcome.err[0], outcome

    yield tried(attempt)


IMPATIENT = (
    "import importlib, os, sys; from pathlib import Path; sys.path.insert(0, os.getcwd()); del sys.argv[0]; "
    "module = importlib.import_module(Path(sys.argv[0]).stem); module.LONGEST_STEP = 1; sys.exit(module.main())"
)


@fault("environment", "an environment's process hangs in a step, or dies: named, exit 1, no process left", times=2)
def worker(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt(what: str, words: str) -> None:
        flags = [*script.environment("Faulty", what=what), "--vectorization", "async", "--run-dir", script.new("hangs")]
        process = script.start(*script.short, *flags, prefix=("-c", IMPATIENT))
        try:
            assert_one_line(process.end(), 1, "tests.environments:Faulty-v0", words, module=script.module)
            wait_for(lambda: not process.children())
        finally:
            kill_all(process)

    for way in [("hangs", "timed out after 1 second"), ("dies", "died")][:times]:
        yield tried(attempt, *way)


# ------------------------------------------------------------------------------------------------------------- machine


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """A file system of one's own, which takes root."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", *arguments, folder], capture_output=True).returncode:
        raise NotImplementedError("mount is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@fault("machine", "disk full while recording, writing a checkpoint or the model: one line; resumed to the bit", times=4)
def disk_full(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    reference, _ = script.reference(0)

    def attempt() -> None:
        whole = size_of(reference)
        size = math.ceil((2 * whole + 1e6) / 4096) * 4096  # what a resumed run needs too
        with mounted(script.new("disk"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as disk:
            (disk / "ballast").write_bytes(bytes(size - int(rng.uniform(0.02, 0.9) * whole)))
            command = [*script.flags, "--timing-interval", "0", "--run-dir", disk / "run"]
            process = script.start(*command)
            outcome = process.end()
            wait_for(lambda: not process.children())
            if outcome.code == 0:  # the record alone did not fit, and W&B lets no one know
                assert_same_model(disk / "run", reference)
                return
            assert outcome.code in (1, 2) and "Traceback" not in "\n".join(outcome.err), outcome
            assert "No space left" in outcome.err[-1], outcome
            (disk / "ballast").unlink()
            again = ["--resume", disk / "run"] if (disk / "run/config.json").exists() else command
            outcome = script.start(*again, "--wandb-mode", "disabled").end()
            assert outcome.code == 0, outcome
            assert_same_model(disk / "run", reference)

    for _ in range(times):
        yield tried(attempt)


@fault("machine", "directory that cannot be written to, or a file in its place: exit 2, one line", times=2)
def unwritable(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def read_only() -> None:
        with mounted(script.new("read only"), "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs") as disk:
            outcome = script.main(*script.short, "--run-dir", disk / "run")
            assert_one_line(outcome, 2, str(disk), "Read-only", module=script.module)

    def file() -> None:
        path = script.new("file")
        path.write_text("")
        assert_one_line(script.main(*script.short, "--run-dir", path / "run"), 2, str(path), module=script.module)

    for attempt in (file, read_only)[:times]:
        yield tried(attempt)


@fault("machine", "no home directory: trained and recorded", times=2)
def no_home(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt(home: str) -> None:
        directory = script.new("homeless")
        flags = [*script.short, "--wandb-mode", "offline", "--run-dir", directory]
        prefix = ("-c", "import os, runpy, sys; del sys.argv[0]; os.environ.pop('HOME')\n" + RUN) if not home else ()
        outcome = script.start(*flags, prefix=prefix, **({"HOME": home} if home else {})).end()
        assert outcome.code == 0 and outcome.err == [], outcome
        assert_same_model(directory, script.finished)
        assert compare.read_directory(directory)

    for home in ("/proc/nowhere", "")[:times]:
        yield tried(attempt, home)


RUN = "sys.path.insert(0, os.getcwd()); runpy.run_path(sys.argv[0], run_name='__main__')"


@fault("machine", "`--wandb-mode online` without a network: trained and recorded, or exit 2 before training, one line")
def no_network(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt() -> None:
        directory = script.new("online")
        flags = [*script.short, "--wandb-mode", "online", "--run-dir", directory]
        outside = ("-c", UNSHARE)
        process = script.start(*flags, prefix=outside, WANDB_API_KEY="0" * 40)
        outcome = process.end()
        wait_for(lambda: not process.children())
        if outcome.code == 0:
            assert_same_model(directory, script.finished)
        else:
            assert_one_line(outcome, 2, "--wandb-mode online", "offline needs no account", module=script.module)
            assert not (directory / "config.json").exists()

    yield tried(attempt)


UNSHARE = (
    """
import ctypes, os, runpy, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
    sys.exit("a network of one's own takes root")
del sys.argv[0]
"""
    + RUN
)


@fault("machine", "W&B's server killed: one warning, trained to the end", times=2)
def no_server(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    reference, _ = script.reference(0)

    def attempt() -> None:
        directory = script.new("server")
        process = script.start(*script.flags, "--timing-interval", "0", "--run-dir", directory)
        number = rng.randrange(3)
        wait_for(lambda: "step/s" in process.err.read_text() and len(checkpoints(directory)) >= number, process)
        os.kill(next(pid for pid, command in process.children().items() if "wandb-core" in command), signal.SIGKILL)
        outcome = process.end()
        assert outcome.code == 0 and all(line.startswith("warning: the W&B record") for line in outcome.err), outcome
        assert_same_model(directory, reference)

    for _ in range(times):
        yield tried(attempt)


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static time_t shift(void) {  /* two hours back, from the second second of the process on */
    struct timespec now;
    static time_t start;
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_MONOTONIC, &now);
    if (!start) start = now.tv_sec;
    return now.tv_sec - start > 1 ? 7200 : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= shift();
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec t;
    int result = clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec;
    now->tv_usec = t.tv_nsec / 1000;
    return result;
}
time_t time(time_t *now) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (now) *now = t.tv_sec;
    return t.tv_sec;
}
"""


@fault("machine", "clock set back by two hours, killed and resumed: same weights and record, no negative time")
def clock_set_back(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    reference, _ = script.reference(1)

    def attempt() -> None:
        source, library = script.folder / "clock.c", script.folder / "clock.so"
        source.write_text(CLOCK)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
        directory = script.new("clock")
        prefix = ("-c", DIES_IN_PHASE, "checkpoint", "7", "0.5")
        outcome = script.start(*script.flags, "--timing-interval", "1", "--run-dir", directory, prefix=prefix).end()
        assert outcome.code == -signal.SIGKILL, outcome
        outcome = script.start("--resume", directory, LD_PRELOAD=str(library)).end()
        assert outcome.code == 0 and outcome.err == [], outcome
        assert_same_model(directory, reference)
        assert_same_record(script, directory, reference, timing=1)
        rows = compare.read_directory(directory)[0].rows
        assert all(value >= 0 for row in rows for key, value in row.items() if key.startswith("times/"))

    yield tried(attempt)


@fault("machine", "replay buffer or rollout beyond memory: one line", times=1)
def beyond_memory(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def attempt() -> None:
        huge = str(10**13)
        flags = ["--buffer-size", huge] if script.is_off_policy else ["--num-steps", huge]
        outcome = script.main(
            *script.short, *flags, "--total-timesteps", "1" + "0" * 16, "--run-dir", script.new("huge")
        )
        assert_one_line(outcome, 2 if script.is_off_policy else 1, module=script.module)
        assert ("--buffer-size" if script.is_off_policy else "allocate") in outcome.err[0], outcome

    yield tried(attempt)


# --------------------------------------------------------------------------------------------------------------- input

STRANGE = ["", "0", "-0", "1", "-1", "2", "7", "1e3", "0.5", "1e400", "nan", "-inf", "x", "None", "True", "auto", "cpu"]
STRANGE += [
    "{}",
    "[1]",
    "a/b",
    "1_000",
    "٣",
    "-",
    "--",
    "--seed",
    "=",
    "/",
    ".",
    "~",
    "%s",
    "{0}",
    "${HOME}",
    "99" * 20,
]


def command_lines(module: ModuleType) -> st.SearchStrategy[list[str]]:
    """Flags of the script and others, with values of their types and with none of any"""
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Config)]
    names += [name.replace("--", "--no-") for name in names] + ["--nonsense", "-x", "positional", "--help-me"]
    printable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
    values = st.one_of(st.sampled_from(STRANGE), st.integers().map(str), st.floats().map(str), printable)
    flags = st.tuples(st.sampled_from(names), st.lists(values, max_size=2)).map(lambda flag: [flag[0], *flag[1]])
    return st.lists(flags, max_size=5).map(lambda flags: [text for flag in flags for text in flag])


@fault("input", "any command line (property-based): a valid config, or one line that says what is wrong", times=300)
def any_input(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    problems, count = [], 0

    @hypothesis.settings(
        max_examples=times, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.seed(rng.randrange(10**6))
    @hypothesis.given(command_lines(script.module))
    def check(arguments: list[str]) -> None:
        nonlocal count
        count += 1
        try:
            config = script.module.validate(script.module.parse_config(arguments))
        except script.module.BadInput as error:
            message = str(error)
            assert "\n" not in message and ("--" in message or any(x in message for x in arguments if x)), message
        except SystemExit as stop:
            assert not stop.code and ("--help" in arguments or "-h" in arguments)
        else:
            assert script.module.validate(config) == config

    with contextlib.redirect_stdout(io.StringIO()):
        problem = tried(check)
    problems = [problem] * (problem is not None)
    yield from problems + [None] * (count - len(problems))


SMALL_VALUES = {
    "num_envs": "1 2 3",
    "num_steps": "1 2 7 16",
    "num_minibatches": "1 2 3 4",
    "update_epochs": "1 2",
    "total_timesteps": "0 31 64 100 200",
    "learning_rate": "1e-3 1e30",
    "policy_lr": "1e-3 1e30",
    "q_lr": "1e-3 1e30",
    "gamma": "0 0.9 1",
    "gae_lambda": "0 1",
    "hidden_sizes": "1 8 1,5",
    "eval_episodes": "0 1 3",
    "eval_interval": "0 1 50",
    "timing_interval": "0 1 2",
    "checkpoint_interval": "0 1 50",
    "target_kl": "1e-9 1",
    "max_grad_norm": "1e-9 1e9",
    "log_interval": "1 10 25 60",
    "learning_starts": "0 5 100",
    "updates_per_step": "0.1 1 3",
    "action_repeat": "1 2",
    "batch_size": "1 5",
    "buffer_size": "1 7 1000",
    "tau": "0 1",
    "lstm_size": "1 3",
    "lstm_layers": "1 2",
    "sequence_length": "1 2 7 8",
    "burn_in": "0 1 100",
    "value_iters": "1 2",
    "num_critics": "1 2 3",
    "num_action_samples": "2 3",
    "temperature_solver": "newton slsqp adam",
    "seed": "0 9223372036854775807",
}


@fault(
    "input", "random combinations of valid values: trained, or one line; nothing outside the run directory", times=12
)
def combinations(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    fields = [field for field in dataclasses.fields(script.module.Config) if field.name in SMALL_VALUES]
    booleans = [
        f.name for f in dataclasses.fields(script.module.Config) if f.type is bool and f.name != "capture_video"
    ]
    booleans = [name for name in booleans if name not in ("episodic_life", "compile")]

    def attempt(flags: list[str], is_process: bool) -> None:
        here = script.new("here")
        here.mkdir()
        before = set(ROOT.iterdir())
        if is_process:
            process = script.start(*script.short, *flags, "--run-dir", here / "run", "--wandb-mode", "offline")
            outcome = process.end()
            wait_for(lambda: not process.children())
            written = [path.name for path in process.out.parent.iterdir()]  # its home and its temporary files
            known = "stdout", "stderr", "torchinductor", "mlx", "wandb_symon"  # of PyTorch, MLX and W&B, temporary
            assert all(name.startswith(known) for name in written), written
        else:
            with contextlib.chdir(here):
                outcome = script.main(*script.short, *flags, "--run-dir", here / "run")
        assert set(here.iterdir()) <= {here / "run"} and set(ROOT.iterdir()) == before
        if outcome.code == 0:
            assert all(line.startswith("warning: ") for line in outcome.err), outcome
        else:
            assert_one_line(outcome, outcome.code, module=script.module)
            assert outcome.code in (1, 2), outcome

    for number in range(times):
        flags = []
        for field in rng.sample(fields, 6):
            flags += [f"--{field.name.replace('_', '-')}", *rng.choice(SMALL_VALUES[field.name].split()).split(",")]
        for name in rng.sample(booleans, min(2, len(booleans))):
            flags.append(f"--{rng.choice(('', 'no-'))}{name.replace('_', '-')}")
        yield tried(attempt, flags, number % 6 == 5)


# -------------------------------------------------------------------------------------------------------- reproducible


@fault("reproducible", "same seed twice: the same model, to the bit; another seed: another", times=2)
def same_seed(script: Script, times: int, rng: random.Random) -> Iterator[str | None]:
    def run(seed: str) -> dict:
        directory = script.new("seed")
        assert script.main(*script.short, "--seed", seed, "--run-dir", directory).code == 0
        return tensors(directory / "model.safetensors")

    def same() -> None:
        assert run("3") == tensors(script.finished / "model.safetensors")

    def other() -> None:
        ours, theirs = run("5"), tensors(script.finished / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if name.endswith("weight") and ours[name] == theirs[name]] == []

    for attempt in (same, other)[:times]:
        yield tried(attempt)


# --------------------------------------------------------------------------------------------------------- the command


class Row(NamedTuple):
    script: str
    kind: str
    fault: str
    tried: int
    held: int


def run(script: Script, a_fault: Fault, times: int, rng: random.Random) -> Row:
    results = []
    try:
        for problem in a_fault.function(script, times, rng):
            results.append(problem)
            if problem:
                print(f"{script.name}: {a_fault.name}: {problem}", file=sys.stderr)
    except NotImplementedError as error:
        print(f"{script.name}: {a_fault.name}: left out, {error}", file=sys.stderr)
    return Row(script.name, a_fault.kind, a_fault.name, len(results), results.count(None))


def read() -> list[Row]:
    if not RESULTS.exists():
        return []
    return [Row(*names, int(tried), int(held)) for *names, tried, held in files.load(RESULTS)]


def write(rows: list[Row]) -> None:
    """Rows of faults that were not run now stay as they were."""
    kept = {(row.script, row.fault): row for row in [*read(), *rows] if row.tried}
    order = {name: n for n, name in enumerate([*SCRIPTS, *(a_fault.name for a_fault in FAULTS)])}
    known = [row for row in kept.values() if row.fault in order]
    rows = sorted(known, key=lambda row: (order[row.script], order[row.fault]))
    files.save(RESULTS, "python tests/faults.py --whole", ("torch", "jax", "mlx", "wandb"), Row._fields, rows)


def markdown_table(rows: list[Row]) -> str:
    """How many times each fault was tried on each script, and where not all held"""
    lines = []
    for a_fault in FAULTS:
        of_fault = [row for row in rows if row.fault == a_fault.name]
        if of_fault:
            times = sorted({row.tried for row in of_fault})
            broken = [f"`{row.script}`: **{row.held} of {row.tried}**" for row in of_fault if row.held < row.tried]
            lines.append([a_fault.name, " or ".join(map(str, times)), ", ".join(broken) or "all"])
    return compare.markdown(["what was tried", "times, on each script", "held"], lines)


@dataclass(frozen=True)
class Config:
    whole: bool = False  # as often as the README's table says, and write results/faults.csv; else each fault once
    script: tuple[str, ...] = SCRIPTS  # scripts
    kind: tuple[str, ...] = KINDS  # kinds of faults
    times: int = 1000  # of each fault, at most
    fault: str = ""  # only faults with this in their name
    seed: int = 0  # of the moments, places and values


def faults() -> int:
    config = tyro.cli(Config, description=__doc__)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in config.script:
            script = Script(name, Path(folder) / name)
            script.folder.mkdir()
            for a_fault in FAULTS:
                if a_fault.kind not in config.kind or config.fault not in a_fault.name:
                    continue
                start = time.monotonic()
                rng = random.Random(f"{config.seed} {name} {a_fault.name}")
                row = run(script, a_fault, min(config.times, a_fault.times) if config.whole else 1, rng)
                rows.append(row)
                print(
                    f"{row.held:3} of {row.tried:3}  {name}: {row.fault} ({time.monotonic() - start:.0f} s)", flush=True
                )
                if config.whole:
                    write(rows)
            shutil.rmtree(script.folder)
    print(markdown_table(rows))
    return int(any(row.held < row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(faults())
