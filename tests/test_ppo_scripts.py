"""What every PPO script promises of its clock, record, resumption and training, checked in each backend.

The plumbing is the same text in all of them (tests/test_twins.py) and is tested at length with ppo_torch.py; here is
what depends on how a framework computes: fences, compilation, saved state, random numbers.
"""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imageio.v3 import imiter

import ppo_jax
import ppo_lstm_jax
import ppo_mlx
import ppo_torch
import vpg_torch
from benchmarks.records import config_and_rows
from tests import environments
from tests.backends import compilations, unfinished_zero
from tests.test_ppo_torch import (
    PHASES,
    assert_times_add_up,
    assert_true_last_observations,
    assert_written_down,
    watched_clock,
)
from tests.test_reliability import ROOT, assert_a_signal_leaves_a_checkpoint, assert_resumes_to_the_bit

OTHERS = [ppo_mlx, ppo_jax, ppo_lstm_jax]
each_other = pytest.mark.parametrize("module", OTHERS, ids=lambda module: module.__name__)
each_with_vpg = pytest.mark.parametrize("module", [vpg_torch, ppo_torch, *OTHERS], ids=lambda module: module.__name__)
each = pytest.mark.parametrize("module", [ppo_torch, *OTHERS], ids=lambda module: module.__name__)
PLACES = [pytest.param(module, "CartPole-v1", id=module.__name__) for module in (ppo_torch, *OTHERS)]
ON_DEVICE = "gymnax/CartPole-v1"
PLACES += [pytest.param(module, ON_DEVICE, id=f"{module.__name__} gymnax") for module in (ppo_jax, ppo_lstm_jax)]
SMALL = {"num_envs": 4, "num_steps": 16, "vectorization": "sync"}
OF_MEMORY = {"sequence_length": 8, "burn_in": 2, "recompute_hidden": True, "recompute_advantages": True}


def configured(module: ModuleType, **flags):
    return module.Config(**(OF_MEMORY if module is ppo_lstm_jax else {}) | flags)


def known(module: ModuleType, name: str, kwargs: dict | None = None, **flags):
    flags = {"env_id": f"tests.environments:{name}-v0", "env_kwargs": json.dumps(kwargs or {})} | SMALL | flags
    return configured(module, **flags)


def collect(module: ModuleType, agent, envs, config, rng: np.random.Generator, timed):
    carry = [agent.first_carry(config.num_envs)] if module is ppo_lstm_jax else []
    return module.collect_rollout(agent, *carry, envs, config, rng, timed)


def model_after(module: ModuleType, directory: Path, **flags) -> dict[str, np.ndarray]:
    flags = {"total_timesteps": 3 * 64, "eval_episodes": 0, "wandb_mode": "disabled", **SMALL} | flags
    flags |= {"learning_rate": 1e-3}
    module.train(configured(module, run_dir=str(directory), **flags))
    return module.load_arrays(directory / "model.safetensors")[0]


@pytest.mark.parametrize("ends", ["truncated", "terminated", "both"])
@pytest.mark.parametrize("module", [ppo_mlx, ppo_jax], ids=lambda module: module.__name__)
def test_rollouts_hold_the_true_last_observations(module, ends):
    """Those of ppo_torch.py, and what is made of them, are in tests/test_ppo_torch.py, ppo_lstm_jax.py's in its own."""
    config = known(module, "Counter", {"ends": ends}, num_envs=3, num_steps=11, num_minibatches=1)
    with contextlib.closing(module.Environments(config, 3)) as envs:
        envs.restart(0)
        learner, rng = module.new_learner(envs, config), np.random.default_rng(0)
        timed, collected, episodes = module.new_stopwatch(learner, config).fused, [], []
        for _ in range(3):
            collected.append(module.collect_rollout(learner.agent, envs, config, rng, timed))
            episodes.append(envs.pop_episodes())
    assert_true_last_observations(collected, assert_written_down(collected, episodes, ends))


@each
def test_a_policy_that_is_not_finite_is_to_blame(module, monkeypatch):
    config = known(module, "Counter", {"box": True})
    no_numbers = np.full((config.num_envs, 2), np.nan, np.float32)
    monkeypatch.setattr(module, "sample_actions", lambda *_: no_numbers)
    with contextlib.closing(module.Environments(config, config.num_envs)) as envs:
        envs.restart(0)
        learner, rng = module.new_learner(envs, config), np.random.default_rng(0)
        timed = module.new_stopwatch(learner, config).fused
        with pytest.raises(module.TrainingFailed, match="the policy gives an action that is not finite"):
            collect(module, learner.agent, envs, config, rng, timed)


@each
def test_an_environment_is_to_blame_for_what_follows_from_its_observation(module):
    observations, actions = np.zeros((5, 2, 3)), np.zeros((4, 2, 1))
    module.check_actions(observations, actions)
    actions[2:, 0] = np.nan
    observations[3:] = np.inf  # too late
    with pytest.raises(module.TrainingFailed, match="the policy"):
        module.check_actions(observations, actions)
    observations[2, 0, 1] = np.nan
    module.check_actions(observations, actions)


# ---------------------------------------------------------------------------------------------------------- timing


@contextlib.contextmanager
def ready(module: ModuleType, config) -> Iterator[tuple]:
    """Learner, stopwatch, and what runs an iteration phase by phase: learner -> learner"""
    with contextlib.closing(module.Environments(config, config.num_envs)) as envs:
        envs.restart(0)
        rng = np.random.default_rng(0)
        if module is vpg_torch:
            learner = module.new_learner(envs.observation_dim, envs.parts, config)
            stopwatch = module.new_stopwatch(learner)
        else:
            learner = module.new_learner(envs, config)
            stopwatch = module.new_stopwatch(learner, config)
            module.warm_up(learner, envs, config, stopwatch)

        def iterate(learner):
            if module is vpg_torch:
                batch = module.collect_rollout(learner.policy, envs, config, rng, stopwatch.timed)
                return module.update(learner, batch, config, stopwatch.timed)[0]
            rollout = collect(module, learner.agent, envs, config, rng, stopwatch.timed)
            return module.update(learner, rollout, config, rng, stopwatch.timed)[0]

        yield learner, stopwatch, envs, iterate


def laps(module: ModuleType, config, number: int = 4, heavy: str = "", times: int = 1) -> list[dict[str, float]]:
    """Seconds per phase of iterations, after one that warms up; `heavy`: a function that is computed, to its end, so
    many times instead of once."""
    found = []
    with ready(module, config) as (learner, stopwatch, envs, iterate):
        if heavy:
            function = envs.step if heavy == "step" else getattr(module, heavy)
            light = stopwatch.compiled.get(function, function)

            def copied(x):
                is_donated = module.FRAMEWORK == "jax" and isinstance(x, module.Learner)
                return jax.tree.map(jnp.copy, x) if is_donated else x

            def repeated(*arguments):
                for _ in range(times - 1):
                    stopwatch.fence(light(*map(copied, arguments)))
                return light(*arguments)

            stopwatch.compiled[function] = repeated
        for _ in range(number + 1):
            learner = iterate(learner)
            found.append(stopwatch.lap())
    return found[1:]


def phases_of(module: ModuleType) -> set[str]:
    return PHASES - {"shuffle"} | {"loss/policy", "loss/value"} if module is vpg_torch else PHASES


@pytest.mark.clock
@each_with_vpg
def test_a_slow_environment_shows_in_step_alone(module):
    found, awake = (laps(module, known(module, env, num_envs=2)) for env in ("Slow", "Counter"))
    waited = 2 * 16 * environments.Slow.seconds
    for lap in found:
        assert lap.keys() == phases_of(module) | {"iteration"}
        assert lap["step"] > waited
    elsewhere = [min(lap["iteration"] - lap["step"] for lap in laps) for laps in (found, awake)]
    assert elsewhere[0] - elsewhere[1] < 0.25 * waited, elsewhere


FUNCTIONS = {
    "forward": "act",
    "step": "step",
    "gae": "make_batch",
    "shuffle": "minibatches",
    "loss": "loss_and_gradient",
    "kl": "kl_and_clip_fraction",
    "weight_update": "apply_gradient",
}
OF_VPG = {"forward": "act", "step": "step", "gae": "targets", "loss": "with_gradient", "kl": "kl_divergence"}
OF_VPG |= {"weight_update": "descend"}
HEAVY = [(module, *item) for module in [ppo_torch, *OTHERS] for item in FUNCTIONS.items()]
HEAVY += [(vpg_torch, *item) for item in OF_VPG.items()]


@pytest.mark.clock
@pytest.mark.parametrize(("module", "phase", "function"), HEAVY, ids=lambda x: getattr(x, "__name__", x))
def test_a_heavier_phase_shows_in_its_own_key(module, phase, function):
    """300 times the work gives 25 times the seconds or more, and the iteration grows by little else."""
    few = {"value_iters": 1} if module is vpg_torch else {"num_minibatches": 2, "update_epochs": 1}
    config = known(module, "Counter", **few)
    often = 2000 if phase == "kl" else 300  # it takes less than what other phases differ by
    light, heavy = (laps(module, config, 4, function, times) for times in (1, often))
    light, heavy = ({key: min(lap[key] for lap in found) for key in found[0]} for found in (light, heavy))
    growth = {key: heavy[key] - light[key] for key in heavy}
    assert growth[phase] > 0.5 * growth["iteration"], growth
    assert heavy[phase] > 25 * light[phase]


@each
def test_parts_of_the_loss_go_by_their_names(module, tmp_path, monkeypatch):
    timed, seen = module.Stopwatch.timed, {}

    def noted(self, phase, function, *arguments, **options):
        seen.setdefault(phase, set()).add(getattr(function, "__name__", type(function).__name__))
        return timed(self, phase, function, *arguments, **options)

    monkeypatch.setattr(module.Stopwatch, "timed", noted)
    model_after(module, tmp_path / "run", timing_interval=1, total_timesteps=64)
    forward = {ppo_torch: "Agent", ppo_lstm_jax: "forward"}.get(module, "__call__")
    parts = {"forward": forward, "policy": "policy_loss", "value": "value_loss"}
    assert {phase: seen[f"loss/{phase}"] for phase in parts} == {phase: {name} for phase, name in parts.items()}


@pytest.mark.clock
@each
def test_a_phase_ends_when_its_result_is_there(module):
    """The gradient is asked for at once and computed late: all of that is the loss, nothing of it is left for later."""
    config = known(module, "Counter", num_minibatches=1, update_epochs=1)
    np.asarray(unfinished_zero(module))  # compiled
    start = time.perf_counter()
    np.asarray(unfinished_zero(module))
    seconds = time.perf_counter() - start
    with ready(module, config) as (learner, stopwatch, _, iterate):
        quick = stopwatch.compiled.get(module.loss_and_gradient, module.loss_and_gradient)

        def slow(*arguments):
            gradient, losses, log_ratio = quick(*arguments)
            return gradient + unfinished_zero(module), losses, log_ratio

        stopwatch.compiled[module.loss_and_gradient] = slow
        stopwatch.lap()
        iterate(learner)
        lap = stopwatch.lap()
    assert lap["loss"] > 0.5 * seconds > lap["weight_update"], (seconds, lap)


@pytest.mark.parametrize("module", [ppo_jax, ppo_lstm_jax], ids=lambda module: module.__name__)
def test_nothing_is_compiled_after_the_clock_has_started(module, tmp_path, caplog):
    flags = {"total_timesteps": 640, "timing_interval": 3, "eval_interval": 160, "checkpoint_interval": 200}
    flags |= {"norm_obs": True, "eval_episodes": 2, "run_dir": str(tmp_path / "run")}
    names, late = compilations(module, known(module, "Counter", **flags), caplog)
    assert late == [] and len(names) > 5


@pytest.mark.clock
@pytest.mark.parametrize("timing_interval", [1, 0])
@each_other
def test_the_record_adds_up_to_the_wall_clock(module, timing_interval, tmp_path, monkeypatch):
    config = module.Config(
        total_timesteps=30 * 2048,
        num_steps=512,
        timing_interval=timing_interval,
        eval_interval=16384,
        vectorization="sync",
        run_dir=str(tmp_path / "run"),
    )
    clock = watched_clock(module, monkeypatch)
    module.train(config)
    recorded_config, rows = config_and_rows(tmp_path / "run")
    covered = assert_times_add_up(rows, clock)
    timed = [row for row, _ in covered if "times/loss" in row]
    assert len(timed) == 30 * timing_interval
    if timed:
        assert np.median([row["times/other"] / row["times/iteration"] for row in timed]) < 0.1
        assert {"times/loss/forward", "times/loss/policy", "times/loss/value"} <= timed[0].keys()
    assert recorded_config["framework"] == module.FRAMEWORK
    assert module.FRAMEWORK in recorded_config["versions"]


# ---------------------------------------------------------------------------------------------------- same, and again


@pytest.mark.parametrize(("target_kl", "epochs"), [(1e-12, 1), (None, 3)])
@pytest.mark.parametrize(("module", "env_id"), PLACES)
def test_parts_of_the_loss_are_those_of_the_epochs_that_ran(module, env_id, target_kl, epochs, tmp_path, monkeypatch):
    weights, timed = {}, module.Stopwatch.timed

    def spy(self, phase, function, *arguments, **options):
        weights[phase] = options.get("weight", 1)
        return timed(self, phase, function, *arguments, **options)

    monkeypatch.setattr(module.Stopwatch, "timed", spy)
    flags = {"update_epochs": 3, "num_minibatches": 2, "target_kl": target_kl, "timing_interval": 1, "env_id": env_id}
    model_after(module, tmp_path / "run", **flags)
    parts = {"loss/forward", "loss/policy", "loss/value"}
    assert {phase: weight for phase, weight in weights.items() if weight != 1} == dict.fromkeys(parts, 2 * epochs)


@pytest.mark.parametrize("module", [ppo_torch, ppo_mlx], ids=lambda module: module.__name__)
def test_without_training_no_loss_is_compiled(module, tmp_path, monkeypatch):
    monkeypatch.delattr(module, "policy_loss")
    model_after(module, tmp_path / "run", total_timesteps=0)


@each_other
def test_timing_leaves_the_weights_alone(module, tmp_path):
    """To 1e-5 over three iterations where compiled code sums in another order; MLX's sums in the same."""
    fused, timed = (model_after(module, tmp_path / str(k), timing_interval=k) for k in (0, 1))
    untrained = model_after(module, tmp_path / "untrained", total_timesteps=0)
    for name in fused:
        np.testing.assert_allclose(timed[name], fused[name], rtol=0, atol=0 if module is ppo_mlx else 1e-5)
        assert np.abs(fused[name] - untrained[name]).max() > 1e-4, name


@each_other
def test_a_seed_decides_everything(module, tmp_path):
    first, again = (model_after(module, tmp_path / str(k)) for k in (0, 1))
    other = model_after(module, tmp_path / "other", seed=2)
    for name in first:
        assert np.array_equal(first[name], again[name]), name
        assert not np.array_equal(first[name], other[name]), name


FLAGS = ["--num-envs", "2", "--num-steps", "16", "--eval-episodes", "1", "--vectorization", "sync", "--norm-obs"]


def flags_of(module: ModuleType) -> list[str]:
    memory = ["--sequence-length", "4", "--burn-in", "2", "--recompute-hidden", "--mask-velocity"]
    return FLAGS + (memory if module is ppo_lstm_jax else [])


def test_killed_and_resumed(tmp_path):
    """With a memory; the other scripts are killed in tests/test_faults.py."""
    flags = [*flags_of(ppo_lstm_jax), "--total-timesteps", "1600", "--checkpoint-interval", "160"]
    assert_resumes_to_the_bit(ROOT / "ppo_lstm_jax.py", tmp_path, *flags)


@each_other
def test_a_signal_ends_the_run_and_leaves_a_checkpoint(module, tmp_path):
    assert_a_signal_leaves_a_checkpoint(ROOT / f"{module.__name__}.py", tmp_path, *flags_of(module))


# ------------------------------------------------------------------------------------------------------------- training


@each_other
def test_video(module, tmp_path):
    """As many frames as the first episode has steps, none of them of one colour"""
    config = module.Config(total_timesteps=0, eval_episodes=2, capture_video=True, wandb_mode="disabled")
    first, _ = module.train(dataclasses.replace(config, run_dir=str(tmp_path / "run"))).evaluation_returns
    (video,) = (tmp_path / "run/videos").glob("*.mp4")
    frames = list(imiter(video, plugin="FFMPEG"))
    assert abs(len(frames) - first) <= 1  # the encoder rounds times
    assert all(frame.std() > 1 for frame in frames)


@pytest.mark.parametrize("module", [ppo_torch, ppo_lstm_jax], ids=lambda module: module.__name__)
def test_a_trained_model_acts_as_in_the_readme(module, tmp_path):
    """One episode; the statistics of the observations are those of training, and stay."""
    arrays = model_after(module, tmp_path / "run", norm_obs=True)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = (text for text in snippets if f"from {module.__name__} import Config, Environments" in text)
    names = {}
    exec(snippet.replace("runs/NAME", str(tmp_path / "run")), names)
    ((number, episode_return, length),) = names["envs"].episodes
    assert number == 0 and episode_return == length > 7
    for name, statistic in names["envs"].to_numpy().items():
        assert np.array_equal(statistic, arrays[name]), name


@each_other
def test_cartpole_is_learnt(module, tmp_path):
    steps = 98304 if module is ppo_lstm_jax else 65536  # an LSTM learns later
    config = module.Config(total_timesteps=steps, vectorization="sync", run_dir=str(tmp_path / "run"))
    result = module.train(dataclasses.replace(config, wandb_mode="disabled"))
    assert np.mean(result.evaluation_returns) > 300  # an untrained policy gets about 10, the best 500


@each_other
def test_a_device_that_is_not_there(module):
    device = "gpu"
    config = module.Config(device=device, total_timesteps=0, vectorization="sync", wandb_mode="disabled")
    with pytest.raises(module.BadInput, match=f"--device {device} is not there"):
        module.train(config)
