"""torchrun: several processes of a PyTorch script learn as one would with all their data, and end as one."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo_torch
import vpg_torch
from tests.test_reliability import DIES_IN, ROOT, Process, assert_same_model, checkpoints, step_of, wait_for
from tests.torchrun_worker import COLUMNS, updated

each = pytest.mark.parametrize("module", [ppo_torch, vpg_torch], ids=lambda module: module.__name__)


def torchrun(folder: Path, number: int, *command: str | Path) -> Process:
    prefix = ("-m", "torch.distributed.run", "--nproc-per-node", str(number))
    prefix += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # a free port
    return Process(folder, *command[1:], prefix=prefix, script=command[0])


# ---------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@each
def test_two_processes_with_half_the_batch_each_update_as_one_with_all(module, precision, tolerance, tmp_path):
    arguments = ROOT / "tests/torchrun_worker.py", module.__name__, tmp_path, precision
    for number in (1, 2):
        outcome = torchrun(tmp_path / "output", number, *arguments).end()
        assert outcome.code == 0, outcome.err
    one, first, second = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("1-0", "2-0", "2-1"))
    assert "losses/policy_loss" in one and one.get("losses/clipfrac", 1) > 0
    for name in one:
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], one[name], rtol=tolerance, atol=tolerance, err_msg=name)
    alone = updated(module, 2, slice(0, COLUMNS // 2)) if precision == "float32" else {}
    for name in alone:  # it does matter what the other process has
        assert (
            name.endswith("step") or np.size(alone[name]) == 0 or np.abs(alone[name] - one[name]).max() > 10 * tolerance
        ), name


def test_statistics_of_two_processes_are_those_of_all_that_they_saw(tmp_path):
    """Merged after every rollout, in which each sees as much as the other"""
    (tmp_path / "worker.py").write_text(
        "import os, sys\nsys.path.insert(0, os.getcwd())\nfrom types import SimpleNamespace\nimport numpy as np\n"
        "import ppo_torch\n"
        "rank = int(os.environ['RANK'])\n"
        "with ppo_torch.processes(ppo_torch.Config()):\n"
        "    seen = np.load(sys.argv[1])[rank]\n"
        "    moments = SimpleNamespace(mean=seen.mean(0), var=seen.var(0), count=5.0)\n"
        "    ppo_torch.share_statistics(SimpleNamespace(statistics={'observation': moments}))\n"
        "    np.savez(f'{sys.argv[2]}/{rank}.npz', **vars(moments))\n"
    )
    seen = np.random.default_rng(0).normal([1, 2, 3], [1, 5, 0.1], (2, 5, 3))
    np.save(tmp_path / "seen.npy", seen)
    outcome = torchrun(tmp_path / "output", 2, tmp_path / "worker.py", tmp_path / "seen.npy", tmp_path).end()
    assert outcome.code == 0, outcome.err
    for rank in range(2):
        statistics = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(statistics["mean"], seen.reshape(10, 3).mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics["var"], seen.reshape(10, 3).var(0), rtol=1e-12)
        assert statistics["count"] == 5


# ------------------------------------------------------------------------------------------------------- whole runs

FLAGS = ["--num-envs", "2", "--num-steps", "16", "--eval-episodes", "1", "--vectorization", "sync"]
FLAGS += ["--wandb-mode", "disabled"]
OF_SCRIPT = {
    ppo_torch: ["--env-id", "CartPole-v1", "--norm-obs", "--norm-reward"],
    vpg_torch: ["--env-id", "tests.test_vpg:Mixed-v0", "--value-iters", "3"],
}


@each
def test_a_run_of_two_processes(module, tmp_path):
    """One run directory, written by the first. Where that one dies torchrun says so, and ends the other; resumed it
    ends with the same bytes."""
    script, flags = ROOT / f"{module.__name__}.py", [*FLAGS, *OF_SCRIPT[module], "--checkpoint-interval", "320"]
    flags += ["--total-timesteps", "3200"]
    outcome = torchrun(tmp_path / "o1", 2, script, *flags, "--run-dir", tmp_path / "run").end()
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("evaluation:") == outcome.out.count("written to") == 1
    names = {"checkpoints", "config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 1
    assert step_of(checkpoints(tmp_path / "run")[-1]) == 3200  # steps of both

    (tmp_path / "dies.py").write_text(DIES_IN)
    dying = tmp_path / "dies.py", "replace", "0960.safetensors", script
    killed = torchrun(tmp_path / "o2", 2, *dying, *flags, "--run-dir", tmp_path / "k")
    outcome = killed.end()
    assert outcome.code == 1 and any("Signal 9 (SIGKILL)" in line for line in outcome.err), outcome
    wait_for(lambda: not killed.children())
    assert [step_of(path) for path in checkpoints(tmp_path / "k")] == [320, 640]
    assert not (tmp_path / "k/model.safetensors").exists()
    outcome = torchrun(tmp_path / "o3", 2, script, "--resume", tmp_path / "k").end()
    assert outcome.code == 0, outcome.err
    assert_same_model(tmp_path / "k", tmp_path / "run")


@each
def test_bad_input_that_one_process_finds_ends_all_without_a_traceback(module, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    flags = [*FLAGS, *OF_SCRIPT[module], "--total-timesteps", "3200", "--run-dir", tmp_path / "run"]
    outcome = torchrun(tmp_path / "output", 2, ROOT / f"{module.__name__}.py", *flags).end()
    assert outcome.code != 0
    assert sum("holds a run" in line for line in outcome.err) == 1, outcome.err
    assert not any(f'{module.__name__}.py", line' in line for line in outcome.err), outcome.err


@pytest.mark.parametrize("everywhere", [False, True], ids=["launcher", "everywhere"])
@each
def test_sigterm_stops_all_processes_with_a_checkpoint(module, everywhere, tmp_path):
    """To torchrun, which passes it on; or to each process, as batch systems do, and again from torchrun"""
    flags = [*FLAGS, *OF_SCRIPT[module], "--total-timesteps", "10000000", "--checkpoint-interval", "320"]
    script = ROOT / f"{module.__name__}.py"
    process = torchrun(tmp_path / "o1", 2, script, *flags, "--run-dir", tmp_path / "run")
    wait_for(lambda: checkpoints(tmp_path / "run"), process)
    workers = [pid for pid, command in process.children().items() if script.name in command]
    assert len(workers) == 2
    for pid in [*workers, process.pid] if everywhere else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    outcome = process.end()
    assert outcome.code != 0
    assert sum("go on with: torchrun --nproc-per-node 2 " in line for line in outcome.err) == 1, outcome.err
    assert not any(f'{script.name}", line' in line for line in outcome.err), outcome.err
    assert not (tmp_path / "run/model.safetensors").exists()
    wait_for(lambda: not process.children())
    kept = checkpoints(tmp_path / "run")
    longer = "--resume", tmp_path / "run", "--total-timesteps", step_of(kept[-1]) + 64
    outcome = Process(tmp_path / "o2", *longer, script=script).end()  # one process would count other steps
    assert outcome.code == 2 and f"is of step {step_of(kept[-1])}, here {step_of(kept[-1]) // 2};" in outcome.err[0]
    assert checkpoints(tmp_path / "run") == kept
    assert torchrun(tmp_path / "o3", 2, script, *longer).end().code == 0
    assert step_of(checkpoints(tmp_path / "run")[-1]) == step_of(kept[-1]) + 64


@pytest.mark.parametrize(
    ("module", "function", "optimizer"),
    [(ppo_torch, "apply_gradient", "x[0].optimizer"), (vpg_torch, "descend", "x[0]")],
    ids=["ppo_torch", "vpg_torch"],
)
def test_processes_with_other_weights_are_found_out(module, function, optimizer, tmp_path):
    name = module.__name__
    (tmp_path / "worker.py").write_text(
        f"import os, sys\nsys.path.insert(0, os.getcwd())\nimport {name}\n"
        f"step = {name}.{function}\n"
        f"def {function}(*x):\n"
        "    result = step(*x)\n"
        f"    {optimizer}.param_groups[0]['params'][0].data[0] += 1e-6 * int(os.environ['RANK'])\n"
        "    return result\n"
        f"{name}.{function} = {function}\n"
        f"sys.exit({name}.main())\n"
    )
    flags = [*FLAGS, *OF_SCRIPT[module], "--total-timesteps", "320", "--run-dir", tmp_path / "run"]
    outcome = torchrun(tmp_path / "output", 2, tmp_path / "worker.py", *flags).end()
    assert outcome.code != 0
    assert any("have different weights at step 64" in line for line in outcome.err), outcome.err


@each
def test_a_process_that_loses_another_says_so(module, monkeypatch):
    def lost(*_):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(module.dist, "all_reduce", lost)
    with pytest.raises(module.TrainingFailed, match="another process has ended"):
        module.over_processes(module.dist.all_reduce, torch.zeros(1))


@each
def test_a_signal_in_the_last_meeting_of_the_processes_is_kept(module, monkeypatch):
    """It came after this process said that it had heard of none."""
    run = module.SharedRun.__new__(module.SharedRun)
    run.config, run.iteration, run.stop_signal, run.learner = SimpleNamespace(num_iterations=1), 1, None, None

    def meeting(exchange, x, operation):
        run.on_signal(signal.SIGTERM, None)

    monkeypatch.setattr(module, "to_numpy", lambda learner: {})
    monkeypatch.setattr(module, "over_processes", meeting)
    monkeypatch.setattr(module.Run, "iterations", lambda self: iter([1]))
    assert list(run.iterations()) == [1] and run.stop_signal == signal.SIGTERM


@each
def test_a_batch_of_all_processes_is_needed(module, monkeypatch):
    monkeypatch.setattr(module, "num_processes", lambda: 8)
    config = module.Config(num_envs=4, num_steps=128, total_timesteps=2000)
    with pytest.raises(module.BadInput, match="4096 steps"):
        module.validate(config)
