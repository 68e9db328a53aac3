"""Replay buffer, updates, rollout, clock, record and resumption of the off-policy scripts; what each has of its own
is in tests/test_td3.py, tests/test_sac.py and tests/test_mpo.py.

Where a test gives a tolerance without a word it is the rounding of float32: 1e-6, 1e-5 through some updates (compiled
code adds up in another order), 1e-4 of their losses.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shlex
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

import mpo_jax
import sac_jax
import td3_jax
from benchmarks.records import config_and_rows
from tests import environments
from tests.backends import compilations, unfinished_zero
from tests.test_ppo_torch import assert_times_add_up, watched_clock
from tests.test_reliability import (
    ROOT,
    assert_a_signal_leaves_a_checkpoint,
    assert_refused,
    checkpoints,
    main,
    step_of,
)

MODULES = [td3_jax, sac_jax, mpo_jax]
each = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
SMALL = {"hidden_sizes": (32, 32), "learning_starts": 50, "batch_size": 16, "log_interval": 40, "eval_interval": 0}
SMALL |= {"vectorization": "sync", "buffer_size": 1000, "eval_episodes": 0, "wandb_mode": "disabled"}


@pytest.fixture(autouse=True)
def forget_compiled_functions():
    """Each run compiles its own, and pytest would hold gigabytes of them."""
    yield
    jax.clear_caches()


def configured(module: ModuleType, env: str = "Counter", kwargs: dict | None = None, **flags):
    kwargs = {"box": True} if kwargs is None else kwargs
    env_id = env if "-v" in env else f"tests.environments:{env}-v0"
    return module.Config(env_id=env_id, env_kwargs=json.dumps(kwargs), **SMALL | flags)


def sizes(observation_dim: int = 3, action_dim: int = 2) -> SimpleNamespace:
    return SimpleNamespace(observation_dim=observation_dim, action_dim=action_dim)


def random_buffer(module: ModuleType, config, rng: np.random.Generator, observation_dim: int = 3, action_dim: int = 2):
    """Of a hundred transitions"""
    buffer = module.ReplayBuffer(dataclasses.replace(config, total_timesteps=200), 1, observation_dim, action_dim)
    for _ in range(100):
        observations, next_observations = rng.standard_normal((2, 1, observation_dim))
        actions, terminated = rng.uniform(-1, 1, (1, action_dim)), rng.random(1) < 0.3
        ends = next_observations[~terminated]
        buffer.add(observations, actions, rng.standard_normal(1), terminated, ~terminated, next_observations, ends)
    return buffer


def random_batch(
    module: ModuleType, config, updates: range, observation_dim: int = 3, action_dim: int = 2, seed: int = 0
):
    """As `sample_batch` makes it, of transitions at random"""
    rng = np.random.default_rng(seed)
    buffer = random_buffer(module, config, rng, observation_dim, action_dim)
    return module.sample_batch(buffer, updates, config, rng)


def model_after(module: ModuleType, directory: Path, **flags) -> dict[str, np.ndarray]:
    module.train(configured(module, **{"total_timesteps": 160, **flags}, run_dir=str(directory)))
    return module.load_arrays(directory / "model.safetensors")[0]


# --------------------------------------------------------------------------------------------------- replay buffer


class Slow:
    """The replay buffer as a list of whole transitions, for each step of the environments"""

    def __init__(self, steps: int):
        self.steps, self.transitions = steps, []

    def add(self, observations, actions, rewards, terminated, truncated, next_observations, final_observations):
        true_next, final_observations = next_observations.copy(), iter(final_observations)
        for n in np.flatnonzero(truncated):
            true_next[n] = next(final_observations)
        self.transitions.append(list(zip(observations, actions, rewards, terminated, true_next, strict=True)))
        self.transitions = self.transitions[-self.steps :]


def drive(
    module: ModuleType, buffer, steps: int, num_envs: int, rng: np.random.Generator, restart_every: int = 0, twin=None
):
    """Adds steps of environments whose every observation is another number; ends episodes at random."""
    numbers = itertools.count(int(rng.integers(1, 10**5)))
    observations = np.array([[next(numbers)] for _ in range(num_envs)], np.float32)
    for step in range(steps):
        actions, rewards = rng.uniform(-1, 1, (num_envs, 2)).astype(np.float32), rng.random(num_envs).astype(np.float32)
        terminated, truncated = rng.random((2, num_envs)) < 0.2
        truncated &= ~terminated
        ends = np.array([[next(numbers)] for _ in range(truncated.sum())], np.float32).reshape(-1, 1)
        following = np.array([[next(numbers)] for _ in range(num_envs)], np.float32)
        transition = observations, actions, rewards, terminated, truncated, following, ends
        buffer.add(*transition)
        if twin:
            twin.add(*transition)
        observations = following
        if restart_every and step % restart_every == restart_every - 1:
            buffer.end_episodes()
            observations = np.array([[next(numbers)] for _ in range(num_envs)], np.float32)


def contents(buffer) -> dict[float, tuple]:
    """What sampling finds, by the (unique) observation; the next observation only where it is of use."""
    sample = buffer.sample((20 * buffer.num_transitions,), np.random.default_rng(1))
    found = {}
    for observation, action, reward, terminated, following in zip(
        *(sample[name] for name in ("observations", "actions", "rewards", "terminated", "next_observations")),
        strict=True,
    ):
        found[observation[0]] = (*action, reward, bool(terminated), None if terminated else following[0])
    return found


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [5, 10, 11, 37])
@pytest.mark.parametrize("restart_every", [0, 4])
@each
def test_the_buffer_gives_back_whole_transitions(module, num_envs, steps, restart_every):
    """Against a list of them, before and after the ring is full, over truncations and new beginnings."""
    config = configured(
        module, buffer_size=10 * num_envs + num_envs // 2, total_timesteps=1000, num_envs=num_envs, log_interval=30
    )
    buffer, slow = module.ReplayBuffer(config, num_envs, 1, 2), Slow(10)
    drive(module, buffer, steps, num_envs, np.random.default_rng(steps), restart_every, slow)
    expected = {
        observation[0]: (*action, reward, bool(terminated), None if terminated else following[0])
        for step in slow.transitions
        for observation, action, reward, terminated, following in step
    }
    assert buffer.num_transitions == len(expected) == min(steps, 10) * num_envs
    assert contents(buffer) == expected


@each
def test_the_buffer_survives_a_checkpoint(module, tmp_path):
    config = configured(module, buffer_size=30, total_timesteps=1000, num_envs=3, log_interval=30)
    one, other = (module.ReplayBuffer(config, 3, 1, 2) for _ in range(2))
    drive(module, one, 27, 3, np.random.default_rng(0))
    module.save_arrays(tmp_path / "buffer.safetensors", one.to_numpy(), {})
    other.from_numpy(module.load_arrays(tmp_path / "buffer.safetensors")[0])
    one.end_episodes()
    assert contents(one) == contents(other)
    for buffer in one, other:
        drive(module, buffer, 5, 3, np.random.default_rng(1))
    assert contents(one) == contents(other)
    first, second = (buffer.sample((7, 5), np.random.default_rng(2)) for buffer in (one, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@each
def test_a_full_buffer_of_a_finished_run_grows_with_the_run(module):
    short, long = (configured(module, buffer_size=500, total_timesteps=steps) for steps in (40, 400))
    one, other = module.ReplayBuffer(short, 1, 1, 2), module.ReplayBuffer(long, 1, 1, 2)
    drive(module, one, 40, 1, np.random.default_rng(0))
    other.from_numpy(one.to_numpy())
    assert contents(one) == contents(other) and len(contents(other)) == 40
    drive(module, other, 100, 1, np.random.default_rng(1))
    assert other.num_transitions == 140


@each
def test_the_buffer_draws_evenly_and_stores_each_observation_once(module):
    config = configured(module, buffer_size=20, total_timesteps=1000, num_envs=2, log_interval=40)
    buffer = module.ReplayBuffer(config, 2, 1, 2)
    drive(module, buffer, 33, 2, np.random.default_rng(0))
    drawn = buffer.sample((40_000,), np.random.default_rng(0))["observations"].ravel()
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == 20
    assert (abs(counts - 2000) < 6 * math.sqrt(2000)).all()
    assert buffer.arrays["observations"].shape == (22, 1)


@each
def test_a_buffer_that_does_not_fit_is_refused(module):
    config = configured(module, buffer_size=2 * 10**9, total_timesteps=10**10, log_interval=10**6)
    with pytest.raises(module.BadInput, match=r"--buffer-size 2000000000: .* would take 156\.0 GB of"):
        module.train(config)
    module.ReplayBuffer(dataclasses.replace(config, total_timesteps=10**3), 1, 3, 2)  # this run needs no more than that


# --------------------------------------------------------------------------------------------------------- actions


@each
def test_actions_are_scaled_to_each_dimension_and_stored_as_they_were(module):
    """Echo gives back the action that it got, bounds [-0.5, 1] and [-2, 0.25], and refuses one beyond them."""
    config = configured(module, "Echo", {"space": "bounded"}, total_timesteps=400)
    buffer = module.ReplayBuffer(config, 1, 3, 2)
    rng, learner = np.random.default_rng(0), module.new_learner(sizes(), config)
    stopwatch = module.new_stopwatch()
    with contextlib.closing(module.Environments(config, 1)) as envs:
        envs.restart(0)
        for step in range(100):
            module.interact(learner.actor, envs, buffer, step, config, rng, stopwatch.timed)
    actions = buffer.newest(100)["actions"]
    sample = buffer.sample((2000,), rng)
    assert abs(actions).max() <= 1 and actions.min() < -0.9 and actions.max() > 0.9
    low, high = np.array([-0.5, -2.0]), np.array([1.0, 0.25])
    given = sample["next_observations"][:, :2]
    np.testing.assert_allclose(given, low + (sample["actions"] + 1) / 2 * (high - low), atol=1e-6)
    steps = sample["next_observations"][:, 2]
    assert set(steps) == {1, 2, 3, 4, 5, 6, 7}  # 7 is the last observation of a truncated episode
    assert not sample["terminated"].any()


def test_scaled_actions():
    space = td3_jax.spaces.Box(np.array([-1.0, 0.0, -3.0]), np.array([1.0, 10.0, -2.0]))
    actions = np.array([[-1, -1, -1], [1, 1, 1], [0, 0.5, -0.5]], np.float32)
    expected = [[-1, 0, -3], [1, 10, -2], [0, 7.5, -2.75]]
    for module in MODULES:
        np.testing.assert_array_equal(module.environment_actions(actions, space), np.array(expected))


@each
def test_bounds_whose_distance_is_no_float(module):
    largest = np.finfo(np.float32).max
    space = module.spaces.Box(-largest, largest, (1,), np.float32)
    actions = module.environment_actions(np.array([[-1], [0], [0.5], [1]], np.float32), space)
    np.testing.assert_array_equal(actions, [[-largest], [0], [largest / 2], [largest]])


@pytest.mark.parametrize("flag", ["terminated", "truncated", "both"])
@each
def test_a_truncation_is_not_terminal(module, flag):
    config = configured(
        module, "Counter", {"ends": flag, "box": True}, num_envs=2, log_interval=40, total_timesteps=400
    )
    buffer, rng = module.ReplayBuffer(config, 2, 3, 2), np.random.default_rng(0)
    learner, stopwatch = module.new_learner(sizes(), config), module.new_stopwatch()
    with contextlib.closing(module.Environments(config, 2)) as envs:
        envs.restart(0)
        for step in range(40):
            module.interact(learner.actor, envs, buffer, step, config, rng, stopwatch.timed)
    sample = buffer.sample((500,), rng)
    (seed, episode, step), after = sample["observations"].T, sample["next_observations"]
    is_last = step + 1 == 3 + (seed + episode) % 4
    assert np.array_equal(sample["terminated"], is_last & (flag != "truncated"))
    counts = ~sample["terminated"]
    assert np.array_equal(after[counts], np.stack([seed, episode, step + 1], -1)[counts])


@each
def test_repeated_actions_count_as_steps(module, tmp_path):
    """Pendulum's 200 steps with each action taken twice: 100 transitions, whose rewards are sums of two."""
    config = configured(module, "Pendulum-v1", {}, total_timesteps=400, action_repeat=2, learning_starts=300)
    with contextlib.closing(module.Environments(config, 1)) as envs:
        envs.restart(0)
        rewards = [envs.step(np.zeros((1, 1), np.float32))[1][0] for _ in range(100)]
        ((_, episode_return, length),) = envs.pop_episodes()
    assert (sum(rewards), 200) == (pytest.approx(episode_return), length)
    once = dataclasses.replace(config, action_repeat=1)
    with contextlib.closing(module.Environments(once, 1)) as envs:
        envs.restart(0)
        single = [envs.step(np.zeros((1, 1), np.float32))[1][0] for _ in range(200)]
    np.testing.assert_allclose(rewards, np.reshape(single, (100, 2)).sum(1), rtol=1e-6)
    module.train(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
    arrays, _ = module.load_arrays(checkpoints(tmp_path / "run")[-1])
    assert arrays["buffer.progress"].tolist()[1] == 200


# --------------------------------------------------------------------------------------------------------- updates


@each
def test_the_noise_of_a_batch_is_of_its_own_everywhere(module):
    """Standard Gaussian (TD3's times σ), other numbers in each update, sample and dimension, and in each array"""
    config = configured(module, batch_size=256, **({"policy_noise": 0.25} if module is td3_jax else {}))
    batch = random_batch(module, config, range(1, 41))
    noises = [getattr(batch, name) for name in batch._fields if "noise" in name]
    assert len(noises) == (2 if module is sac_jax else 1)
    for noise in noises:
        shape = (config.num_action_samples, 256, 2) if module is mpo_jax else (256, 2)
        assert noise.shape == (40, *shape) and noise.dtype == np.float32
        std, count = 0.25 if module is td3_jax else 1.0, noise.size
        assert abs(noise.mean()) < 5 * std / math.sqrt(count)  # five standard errors, here and below
        assert abs(noise.std() / std - 1) < 5 / math.sqrt(2 * count)
        assert len(np.unique(noise)) > 0.99 * count  # float32 has few numbers to itself near 0
    rng = np.random.default_rng(0)
    buffer = random_buffer(module, config, rng)
    first, second = (module.sample_batch(buffer, range(1, 2), config, rng) for _ in range(2))
    assert np.isin(first.next_noise, second.next_noise).mean() < 0.01
    assert all(not np.array_equal(one, two) for one, two in itertools.combinations(noises, 2))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [0, 0, 0, 1, 2, 3, 4]),
        ({"updates_per_step": 0.5}, [0, 0, 0, 0, 1, 1, 2]),
        ({"updates_per_step": 3.0}, [0, 0, 0, 3, 6, 9, 12]),
        ({"num_envs": 4, "learning_starts": 6}, [0, 0, 0, 4, 8, 12, 16]),
        ({"num_envs": 4, "updates_per_step": 0.1}, [0, 0, 0, 0, 1, 1, 2]),
        ({"action_repeat": 2}, [0, 0, 1, 2, 3, 4, 5]),
    ],
)
@each
def test_number_of_updates(module, flags, expected):
    config = configured(module, **{"learning_starts": 2, **flags})
    assert [module.num_updates(step * config.vector_step, config) for step in range(7)] == expected


@pytest.mark.parametrize("module", [sac_jax, mpo_jax], ids=lambda module: module.__name__)
def test_losses_are_averaged_over_all_updates_of_an_iteration(module):
    names = module.Metrics._fields
    updates = [np.arange(len(names))[:, None] + np.array(x) for x in ([[0.0, 1.0]], [[8.0]])]
    expected = {f"losses/{name}": k + 3 for k, name in enumerate(names)}
    assert module.mean_metrics(updates) == expected and module.mean_metrics([]) == {}


@each
def test_no_update_is_lost_to_rounding(module):
    for ratio in (0.1, 0.3, 0.7, 1 / 3, 1.1):
        config = configured(module, updates_per_step=ratio, num_envs=10, learning_starts=0)
        counts = np.diff([module.num_updates(step, config) for step in range(0, 10**5, 10)])
        assert set(counts) <= {math.floor(ratio * 10 + 1e-6), math.ceil(ratio * 10 - 1e-6)}
        assert sum(counts) == math.floor(ratio * 10 * len(counts) + 1e-6)


@each
def test_an_update_fused_and_phase_by_phase(module):
    """Five updates in one call and five times phase by phase: the same weights; and those of five calls of one."""
    config = configured(module)
    learner, stopwatch = module.new_learner(sizes(), config), module.new_stopwatch()
    batch = random_batch(module, config, range(1, 6))
    fused, fused_metrics = stopwatch.fused(None, module.update, module.copied(learner), batch, config, stopwatch.fused)
    timed, timed_metrics = module.update(module.copied(learner), batch, config, stopwatch.timed)
    single = module.copied(learner)
    for u in range(5):
        part = jax.tree.map(lambda x, u=u: x[u : u + 1], batch)
        single, _ = stopwatch.fused(None, module.update, single, part, config, stopwatch.fused)
    np.testing.assert_allclose(fused_metrics, timed_metrics, rtol=1e-4, atol=1e-5)
    before = module.to_numpy(learner)
    for name, x in module.to_numpy(fused).items():
        np.testing.assert_allclose(module.to_numpy(timed)[name], x, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(module.to_numpy(single)[name], x, atol=1e-5, err_msg=name)
        assert not np.array_equal(x, before[name]), name


@each
def test_targets_move_by_tau(module):
    config = configured(module, tau=0.25)
    learner = module.new_learner(sizes(), config)
    learner = learner._replace(critics=jax.tree.map(lambda x: x + 1, learner.critics))
    moved = module.update_targets(learner, config)
    for before, target in zip(*map(jax.tree.leaves, (learner.target_critics, moved.target_critics)), strict=True):
        np.testing.assert_allclose(target, before + 0.25, rtol=1e-5)


@each
def test_weights_begin_as_documented(module):
    learner = module.new_learner(sizes(17, 6), configured(module, hidden_sizes=(256, 256)))
    arrays = module.to_numpy(learner)
    count = 1 if module is mpo_jax else 2
    assert arrays["critics.0.weight"].shape == (count, 256, 23) and arrays["actor.2.weight"].shape == (256, 256)
    for name, x in arrays.items():
        if name.endswith("bias") and not name.startswith("optimizer"):
            assert not x.any()
        elif name.endswith("weight") and not name.startswith("optimizer"):
            bound = 1 / math.sqrt(x.shape[-1])
            assert 0.95 * bound < abs(x).max() <= bound and abs(x.mean()) < 0.1 * bound, name
    assert count == 1 or not np.array_equal(*arrays["critics.0.weight"])
    for name in arrays:
        if name.startswith("target_"):
            assert np.array_equal(arrays[name], arrays[name.removeprefix("target_")])


@each
def test_the_warm_up_compiles_all(module, tmp_path, caplog):
    """Nothing is compiled after the clock has started, and no phase twice: `descend` is one for each field."""
    flags = {"total_timesteps": 400, "timing_interval": 3, "eval_episodes": 1, "eval_interval": 80}
    flags |= {"checkpoint_interval": 120, "wandb_mode": "offline", "run_dir": str(tmp_path / "run")}
    names, late = compilations(module, configured(module, **flags), caplog)
    assert late == []
    own = [name for name in names if hasattr(module, name)]
    assert {"update", "critic_gradient", "actor_gradient", "descend"} <= set(own)
    assert max(own.count(name) for name in set(own) - {"compiled_call", "compiled_policy", "descend"}) == 1, names


@each
def test_a_bandit_is_solved(module, tmp_path):
    """One step an episode, bounds [-0.5, 1] and [2, 10], another best action for either observation; found to a
    twentieth of the bounds, where an untrained policy is half of them away. The seed is none of the README's."""
    flags = {"learning_starts": 200, "batch_size": 64, "log_interval": 500, "total_timesteps": 3000}
    flags |= {
        td3_jax: {"learning_rate": 1e-3},
        sac_jax: {"q_lr": 1e-3, "alpha": 1e-4, "autotune": False},
        mpo_jax: {"q_lr": 1e-3, "policy_lr": 1e-3, "epsilon_cov": 1e-3},
    }[module]
    result = module.train(configured(module, "Bandit", {}, **flags, seed=11, run_dir=str(tmp_path / "run")))
    space = td3_jax.spaces.Box(np.array([-0.5, 2.0]), np.array([1.0, 10.0]))
    actions = module.act(result.learner.actor, np.array([[1], [-1]], np.float32))
    best = np.array([[0.7, 4.0], [-0.2, 8.0]])
    assert (abs(module.environment_actions(actions, space) - best) / (space.high - space.low)).max() < 0.05


# ----------------------------------------------------------------------------------------------------------- clock


def laps(module: ModuleType, config, heavy: str = "", times: int = 1) -> dict[str, float]:
    """Seconds per phase of a step with an update, phase by phase, the quickest of thirty; of four, where `heavy` is
    computed so many times instead of once."""
    with contextlib.closing(module.Environments(config, config.num_envs)) as envs:
        envs.restart(0)
        learner, rng, stopwatch = module.new_learner(envs, config), np.random.default_rng(0), module.new_stopwatch()
        module.warm_up(learner, envs, config, stopwatch)
        buffer = module.ReplayBuffer(config, config.num_envs, envs.observation_dim, envs.action_dim)
        if heavy:
            function = envs.step if heavy == "step" else getattr(module, heavy)
            light = stopwatch.compiled.get(function, function)

            def repeated(*arguments):
                for _ in range(times - 1):
                    copies = (module.copied(x) if isinstance(x, module.Learner) else x for x in arguments)
                    stopwatch.fence(light(*copies))
                return light(*arguments)

            stopwatch.compiled[function] = repeated
        found = []
        for step in range(config.learning_starts, config.learning_starts + (6 if heavy else 32)):
            module.interact(learner.actor, envs, buffer, step, config, rng, stopwatch.timed)
            batch = stopwatch.timed("sample", module.sample_batch, buffer, range(2, 3), config, rng)
            learner, _ = module.update(learner, batch, config, stopwatch.timed)
            found.append(stopwatch.lap())
        return min(found[2:], key=lambda lap: lap["iteration"])


PHASES = {"forward", "step", "sample", "loss", "weight_update", "target_update", "other", "record", "iteration"}
HEAVY = {
    "forward": "explore",
    "step": "step",
    "sample": "sample_batch",
    "loss/critic": "critic_gradient",
    "loss/actor": "actor_gradient",
    "weight_update": "descend",
    "target_update": "update_targets",
}
EACH_HEAVY = [(module, *item) for module in MODULES for item in HEAVY.items()]
EACH_HEAVY += [(sac_jax, "loss/alpha", "alpha_gradient")]
EACH_HEAVY += [(mpo_jax, "loss/dual", "solve_by_newton"), (mpo_jax, "kl", "policy_metrics")]


@pytest.mark.clock
@pytest.mark.parametrize(("module", "phase", "function"), EACH_HEAVY, ids=lambda x: getattr(x, "__name__", x))
def test_a_heavier_phase_shows_in_its_own_key(module, phase, function):
    config = configured(module, total_timesteps=1000)
    often = 500 if phase in ("forward", "step", "sample") else 200  # they take less than what others differ by
    light, heavy = laps(module, config), laps(module, config, function, often)
    growth = {key: heavy[key] - light[key] for key in heavy}
    assert growth[phase] > 0.5 * growth["iteration"] > 0, growth
    assert heavy[phase] > 20 * light[phase]
    assert growth[phase.split("/")[0]] > 0.5 * growth["iteration"]


@pytest.mark.clock
@each
def test_a_slow_environment_shows_in_step_alone(module):
    lap, awake = (laps(module, configured(module, env, total_timesteps=1000)) for env in ("Slow", "Counter"))
    assert {phase for phase in lap if "/" not in phase} - {"kl"} == PHASES
    growth = {key: lap[key] - awake[key] for key in ("step", "iteration")}
    assert lap["step"] > environments.Slow.seconds > 4 * (growth["iteration"] - growth["step"]), growth


@pytest.mark.clock
@each
def test_a_phase_ends_when_its_result_is_there(module):
    config = configured(module, total_timesteps=1000)
    np.asarray(unfinished_zero(module))  # compiled
    start = time.perf_counter()
    np.asarray(unfinished_zero(module))
    seconds = time.perf_counter() - start
    learner, stopwatch = module.new_learner(sizes(), config), module.new_stopwatch()
    batch = random_batch(module, config, range(2, 3))
    learner, _ = module.update(learner, batch, config, stopwatch.timed)
    quick = stopwatch.compiled[module.critic_gradient]

    def slow(*arguments):
        gradient, *rest = quick(*arguments)
        zero = unfinished_zero(module)
        return jax.tree.map(lambda x: x + zero, gradient), *rest

    stopwatch.compiled[module.critic_gradient] = slow
    for _ in range(2):  # the additions are compiled at the first
        stopwatch.lap()
        learner, _ = module.update(learner, batch, config, stopwatch.timed)
    lap = stopwatch.lap()
    assert lap["loss"] > 0.5 * seconds > lap["weight_update"], (seconds, lap)


README = ROOT / "README.md"
OF_TIMED = {f"times/loss/{part}" for part in ("critic", "actor", "alpha", "dual")} | {"times/target_update"}
OF_SAC = {"losses/alpha", "losses/alpha_loss", "times/loss/alpha"}
OF_MPO = {f"losses/{name}" for name in mpo_jax.Metrics._fields} - {"losses/critic_loss", "losses/q_mean"}
OF_MPO = OF_MPO - {"losses/actor_loss"} | {"times/loss/dual"}
MISSING = {td3_jax: OF_SAC | OF_MPO, sac_jax: OF_MPO, mpo_jax: OF_SAC}  # of the glossary


@pytest.mark.clock
@pytest.mark.parametrize("timing_interval", [1, 0])
@each
def test_the_record_adds_up_to_the_wall_clock(module, timing_interval, tmp_path, monkeypatch):
    flags = {
        "total_timesteps": 1600,
        "log_interval": 200,
        "learning_starts": 200,
        "eval_interval": 400,
        "eval_episodes": 2,
    }
    flags |= {
        "wandb_mode": "offline",
        "hidden_sizes": (256, 256),
        "batch_size": 256,
        "timing_interval": timing_interval,
    }
    config = configured(module, "Pendulum-v1", {}, **flags, run_dir=str(tmp_path / "run"))
    clock = watched_clock(module, monkeypatch)
    module.train(config)
    recorded_config, rows = config_and_rows(tmp_path / "run")
    covered = assert_times_add_up(rows, clock)
    timed = [row for row, _ in covered if "times/loss" in row]
    assert len(timed) == 7 * timing_interval
    fused = [row for row, _ in covered if "times/update" in row]
    assert len(fused) == 7 * (1 - timing_interval)
    for row in timed or fused:
        assert {"times/forward", "times/step", "times/sample", "losses/critic_loss", "losses/actor_loss"} <= row.keys()
    if timed:
        assert np.median([row["times/other"] / row["times/iteration"] for row in timed]) < 0.1
        assert {"times/loss/critic", "times/loss/actor", "times/weight_update", "times/target_update"} <= timed[
            0
        ].keys()
    glossary, besides = re.search(r"(?ms)^## Glossary$(.*?)(?=^## |\Z)", README.read_text())[1].split(
        "The off-policy scripts"
    )
    keys = {key.partition(".")[0] for row in rows for key in row if not key.startswith("_")}
    assert sorted(key for key in keys if f"`{key}`" not in glossary + besides) == []
    own = set(re.findall(r"(?m)^\| `((?:losses|times)/[\w/]+)`", besides))
    assert sorted(own - keys) == sorted(own & (MISSING[module] | (set() if timing_interval else OF_TIMED)))
    assert recorded_config["framework"] == "jax" and recorded_config["algorithm"] == module.ALGORITHM


@each
def test_a_row_whose_iterations_differ_in_their_phases(module, tmp_path, monkeypatch):
    """One row holds iterations before the first update and after it: its phases still partition its mean iteration."""
    monkeypatch.setattr(module, "SECONDS_OF_A_ROW", math.inf)
    flags = {"total_timesteps": 200, "learning_starts": 130, "timing_interval": 0, "checkpoint_interval": 0}
    module.train(configured(module, **flags, wandb_mode="offline", run_dir=str(tmp_path / "run")))
    (row,) = [row for row in config_and_rows(tmp_path / "run")[1] if "times/iteration" in row]
    parts = sum(row[f"times/{phase}"] for phase in ("forward", "step", "sample", "update", "record", "other"))
    assert parts == pytest.approx(row["times/iteration"], rel=1e-9)


# ---------------------------------------------------------------------------------------------------- same, and again


@each
def test_timing_leaves_the_weights_alone(module, tmp_path):
    fused, timed = (model_after(module, tmp_path / str(k), timing_interval=k, total_timesteps=80) for k in (0, 1))
    untrained = model_after(module, tmp_path / "untrained", total_timesteps=0)
    for name in fused:
        np.testing.assert_allclose(timed[name], fused[name], rtol=0, atol=1e-5)
        assert not np.array_equal(fused[name], untrained[name]), name


@each
def test_a_seed_decides_everything(module, tmp_path):
    first, again = (model_after(module, tmp_path / str(k)) for k in (0, 1))
    other = model_after(module, tmp_path / "other", seed=2)
    for name in first:
        assert np.array_equal(first[name], again[name]), name
        assert not np.array_equal(first[name], other[name]), name


@pytest.mark.parametrize("flags", [{"num_envs": 4, "updates_per_step": 0.5}, {"num_envs": 2, "vectorization": "async"}])
@each
def test_several_environments(module, flags, tmp_path):
    arrays = model_after(module, tmp_path / "run", total_timesteps=160, **flags)
    assert all(np.isfinite(x).all() for x in arrays.values())
    saved, _ = module.load_arrays(checkpoints(tmp_path / "run")[-1])
    updates = int(saved["optimizer.critics.0.count"])
    config = configured(module, total_timesteps=160, **flags)
    assert updates == module.num_updates(160, config) > 0


@each
def test_an_iteration_has_whole_steps_of_all_environments(module, tmp_path):
    config = configured(module, num_envs=3, action_repeat=2, log_interval=40, total_timesteps=160, learning_starts=6)
    assert (config.iteration_steps, config.num_iterations) == (42, 3)
    module.train(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
    arrays, progress = module.load_arrays(checkpoints(tmp_path / "run")[-1])
    assert progress["global_step"] == 126
    assert arrays["buffer.progress"].tolist()[1] == 63


FLAGS = shlex.split(
    "--env-id Pendulum-v1 --hidden-sizes 32 32 --learning-starts 200 --batch-size 16 --log-interval 100 --num-envs 2 "
    "--eval-interval 0 --eval-episodes 1 --vectorization sync --buffer-size 700"
)


@each
def test_a_signal_ends_the_run_and_leaves_a_checkpoint(module, tmp_path):
    assert_a_signal_leaves_a_checkpoint(ROOT / f"{module.__name__}.py", tmp_path, *FLAGS)


# ------------------------------------------------------------------------------------------------- models and input


@each
def test_a_model_is_loaded_and_evaluated(module, tmp_path, monkeypatch):
    trained = configured(module, "Pendulum-v1", {}, total_timesteps=160, eval_episodes=3, run_dir=str(tmp_path / "run"))
    returns = module.train(trained).evaluation_returns
    model = str(tmp_path / "run/model.safetensors")
    only = dataclasses.replace(trained, total_timesteps=0, load_model=model, run_dir=str(tmp_path / "only"))
    assert module.train(only).evaluation_returns == returns
    arrays, _ = module.load_arrays(model)
    assert not any(name.startswith(("optimizer.", "buffer.")) for name in arrays)
    restore, begun = module.Run.restore, {}

    def noted(run, learner, *rest):
        begun.update(module.to_numpy(learner))
        return restore(run, learner, *rest)

    monkeypatch.setattr(module.Run, "restore", noted)
    module.train(dataclasses.replace(trained, load_model=model, run_dir=str(tmp_path / "further")))
    assert all(np.array_equal(begun[name], array) for name, array in arrays.items())


BAD = {
    "--env-id Nope-v0": "Nope",
    "--env-id CartPole-v1": "Discrete(2)",
    '--env-id tests.environments:Echo-v0 --env-kwargs {"space":"unbounded"}': "finite bounds",
    "--env-id CarRacing-v3": "not supported",
    "--total-timesteps 10": "must be 0 or at least an iteration of 1000 (--log-interval)",
    "--total-timesteps 1000 --num-envs 16": "an iteration of 1008",
    "--batch-size 10000000000000000000": "--batch-size 10000000000000000000: Input should be less than",
    "--total-timesteps 20000 --learning-starts 20000": "ends before the first update",
    "--total-timesteps 2000 --learning-starts 0 --updates-per-step 1e-5": "ends before the first update",
    "--buffer-size 3 --num-envs 4": "--buffer-size 3",
    "--updates-per-step 0": "--updates-per-step",
    "--tau 1.5": "--tau",
    "--env-id Pendulum-v1 --device gpu": "--device gpu is not there",
    "--env-id Pendulum-v1 --load-model nothing.safetensors": "nothing.safetensors",
    "--resume nowhere": "--resume nowhere",
    "--eval-interval -1": "--eval-interval",
    "--capture-video --eval-episodes 0": "--capture-video --eval-episodes 0",
    f"--wandb-project {129 * 'x'}": "--wandb-project",
}


@pytest.mark.parametrize("flags", BAD)
@each
def test_bad_input_is_one_line(module, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(main(*flags.split(), "--wandb-mode", "disabled", module=module), BAD[flags], module=module)
    assert not list(tmp_path.iterdir())


@each
def test_a_model_of_another_shape_is_refused(module, tmp_path):
    module.train(configured(module, total_timesteps=0, run_dir=str(tmp_path / "run")))
    model = str(tmp_path / "run/model.safetensors")
    with pytest.raises(module.BadInput, match=r"actor\.\d\.(weight|bias) is"):
        module.train(configured(module, "Pendulum-v1", {}, load_model=model, run_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("what", ["observation", "reward"])
@each
def test_an_environment_that_gives_nan_is_named(module, what, tmp_path):
    kwargs = {"what": what, "at": 7, "which": -1, "box": True}
    from tests.environments import NotANumber

    NotANumber.instances = itertools.count(-1)
    config = configured(module, "NotANumber", kwargs, total_timesteps=160, run_dir=str(tmp_path / "run"))
    with pytest.raises(module.TrainingFailed, match=f"NotANumber-v0: the {what} is not finite"):
        module.train(config)


@each
def test_a_loss_that_is_not_finite_ends_the_run(module, tmp_path, monkeypatch):
    """After a checkpoint, which stays. It is the last update of an iteration: nobody acts with these weights."""
    config = configured(module, total_timesteps=400, checkpoint_interval=80, run_dir=str(tmp_path / "run"))
    sample, last = module.sample_batch, module.num_updates(160, config)

    def poisoned(buffer, updates, *arguments):
        batch = sample(buffer, updates, *arguments)
        return batch._replace(rewards=batch.rewards * (np.nan if last in updates else 1))

    monkeypatch.setattr(module, "sample_batch", poisoned)
    with pytest.raises(module.TrainingFailed, match="the loss or its gradient is not finite at step 160"):
        module.train(config)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [80]


@each
def test_it_acts_with_current_weights(module, tmp_path, monkeypatch):
    """Every action after learning starts is chosen by an actor that the update before has just made."""
    seen, explore, update = [], module.explore, module.Stopwatch.timed
    monkeypatch.setattr(module, "explore", lambda actor, *rest: (seen.append(actor), explore(actor, *rest))[1])
    made = []

    def timed(self, phase, function, *arguments, **options):
        result = update(self, phase, function, *arguments, **options)
        if phase == "update":
            made.append(result[0].actor)
        return result

    monkeypatch.setattr(module.Stopwatch, "timed", timed)
    module.train(configured(module, total_timesteps=80, timing_interval=0, run_dir=str(tmp_path / "run")))
    assert len(made) == 30 and [id(actor) for actor in seen[-29:]] == [id(actor) for actor in made[:-1]]
