"""ppo_jax.py on gymnax environments, against slow loops in NumPy, its own Gymnasium path, and itself run otherwise.

Where a test gives a tolerance of 1e-5 it compares code that was compiled in two ways, which add up in another order.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
import ppo_lstm_jax
from benchmarks.records import config_and_rows
from ppo_jax import BadInput, Config, GymnaxEnvironments
from tests.gymnax_environments import ENDS
from tests.test_ppo_torch import PHASES, assert_times_add_up, watched_clock
from tests.test_reliability import (
    ROOT,
    assert_a_signal_leaves_a_checkpoint,
    assert_refused,
    assert_resumes_to_the_bit,
    assert_same_model,
    checkpoints,
    environment_variables,
    main,
)

SCRIPT = ROOT / "ppo_jax.py"
SMALL = {"num_envs": 4, "num_steps": 16, "eval_episodes": 0, "wandb_mode": "disabled", "learning_rate": 1e-3}


def config_of(name: str = "CartPole-v1", kwargs: dict | None = None, **flags) -> Config:
    return Config(env_id=f"gymnax/{name}", env_kwargs=json.dumps(kwargs or {}), **SMALL | flags)


def opened(config: Config) -> tuple[ppo_jax.Learner, GymnaxEnvironments]:
    envs = GymnaxEnvironments(config, config.num_envs)
    learner = ppo_jax.new_learner(envs, config)
    envs.restart(0)
    return learner, envs


def collected(config: Config, number: int) -> tuple[ppo_jax.Learner, GymnaxEnvironments, list[ppo_jax.Transition]]:
    """Rollouts of an untrained policy, episodes going on from one to the next"""
    learner, envs = opened(config)
    collect = ppo_jax.compiled_on_device(envs)[ppo_jax.collect_on_device]
    found = []
    for _ in range(number):
        envs.simulator, transitions = collect(learner.agent, envs.simulator, envs, config, envs.plainly)
        found.append(jax.tree.map(np.asarray, transitions))
    return learner, envs, found


def model_after(directory: Path, **flags) -> dict[str, np.ndarray]:
    flags = {"total_timesteps": 3 * 64, "run_dir": str(directory)} | flags
    ppo_jax.train(config_of(**flags))
    return ppo_jax.load_arrays(directory / "model.safetensors")[0]


# ---------------------------------------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("ends", ENDS)
def test_transitions_and_episodes(ends):
    """Against a count of steps in Python, over two rollouts"""
    terminates, cut = ENDS[ends]
    config = config_of("Counter", {"length": terminates, "max_steps_in_episode": cut}, num_envs=2)
    _, envs, rollouts = collected(config, 2)
    time, episode_return = 0, 0.0
    for rollout in rollouts:
        for t in range(config.num_steps):
            assert np.allclose(rollout.observations[t, :, 0], time / 100)
            time, episode_return = time + 1, episode_return + time + 1
            assert np.allclose(rollout.final_observations[t, :, 0], time / 100)
            assert (rollout.rewards[t] == time).all()
            assert (rollout.terminated[t] == (time == terminates)).all()
            assert (rollout.truncated[t] == (time == cut != terminates)).all()
            assert (rollout.returns[t] == episode_return).all() and (rollout.lengths[t] == time).all()
            if time in (terminates, cut):
                time, episode_return = 0, 0.0
    envs.add_episodes(rollouts[0])
    episodes = [] if ends == "never" else [(n, 15.0, 5) for _ in range(3) for n in range(2)]
    assert envs.pop_episodes() == episodes and envs.pop_episodes() == []


@pytest.mark.parametrize("ends", ENDS)
def test_advantages(ends):
    """Against GAE's definition, a sum over the rest of an episode; where it is cut off, or the rollout ends, V of the
    true next observation stands for what would have come"""
    terminates, cut = ENDS[ends]
    config = config_of("Counter", {"length": terminates, "max_steps_in_episode": cut})
    learner, envs, (rollout,) = collected(config, 1)
    on_device = jax.tree.map(jnp.asarray, rollout)
    batch = ppo_jax.make_batch(learner.agent, ppo_jax.as_rollout(on_device, envs.simulator), config)
    values, next_values = (np.asarray(learner.agent(x)[1]) for x in (rollout.observations, rollout.final_observations))
    expected = np.zeros_like(values)
    for n, start in itertools.product(range(config.num_envs), range(config.num_steps)):
        for t in range(start, config.num_steps):
            future = 0.0 if rollout.terminated[t, n] else next_values[t, n]
            delta = rollout.rewards[t, n] + config.gamma * future - values[t, n]
            expected[start, n] += (config.gamma * config.gae_lambda) ** (t - start) * delta
            if rollout.terminated[t, n] or rollout.truncated[t, n]:
                break
    np.testing.assert_allclose(batch.advantages.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.values.reshape(values.shape), values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch.returns, batch.advantages + batch.values, rtol=1e-6)


def test_cartpole_is_gymnasiums():
    """From the same states the same actions lead to the same states, rewards and ends in Gymnasium's CartPole."""
    config = config_of(num_steps=64, num_envs=3)
    _, _, (rollout,) = collected(config, 1)
    assert rollout.terminated.sum() > 5
    with contextlib.closing(ppo_jax.Environments(dataclasses.replace(config, env_id="CartPole-v1"), 3)) as gym_envs:
        gym_envs.restart(0)
        for n, env in enumerate(gym_envs.vector.envs):
            for t in range(config.num_steps):
                env.unwrapped.state = rollout.observations[t, n].astype(float)
                env.unwrapped.steps_beyond_terminated = None
                observation, reward, terminated, _, _ = env.unwrapped.step(int(rollout.actions[t, n, 0]))
                np.testing.assert_allclose(rollout.final_observations[t, n], observation, rtol=1e-5, atol=1e-6)
                assert (reward, terminated) == (rollout.rewards[t, n], rollout.terminated[t, n])


def test_box_actions_are_clipped_for_the_environment_alone():
    config = config_of("Counter", {"box": True}, num_steps=64)
    learner, envs = opened(config)
    collect = ppo_jax.compiled_on_device(envs)[ppo_jax.collect_on_device]
    _, rollout = collect(learner.agent, envs.simulator, envs, config, envs.plainly)
    assert (np.abs(rollout.actions) > 1).sum() > 20
    seen = 100 * np.asarray(rollout.final_observations[..., 2])
    np.testing.assert_allclose(seen, rollout.actions[..., 0].clip(-1, 1), rtol=1e-6)


def test_draws_are_new_in_every_step_environment_and_rollout():
    learner, _, rollouts = collected(config_of("Counter", {"box": True, "length": 4}), 2)
    noises = [rollout.actions - np.asarray(learner.agent(rollout.observations)[0]) for rollout in rollouts]
    noises = np.concatenate(noises).ravel().round(4)  # the same would differ by rounding alone
    assert len(np.unique(noises)) > 0.95 * noises.size
    starts = np.concatenate([rollout.observations[::4, :, 1] for rollout in rollouts])  # the first of each episode
    assert len(np.unique(starts)) == starts.size == 2 * 4 * 4


def test_permutations_hold_every_sample_once():
    _, envs = opened(config_of())
    found = [np.asarray(ppo_jax.random_permutation(envs.simulator, epoch, 1000)) for epoch in range(2)]
    for permutation in found:
        assert np.array_equal(np.sort(permutation), np.arange(1000))
    assert not np.array_equal(*found)
    assert abs(np.corrcoef(found[0], np.arange(1000))[0, 1]) < 0.1  # three standard deviations


def test_compiled_epochs_after_the_last_are_not_in_the_means():
    """Whatever they are: they are computed, and dropped."""
    config = config_of(update_epochs=3, target_kl=1.0)
    learner, _ = opened(config)

    def epoch(learner, permutation):
        return learner, {"approx_kl": jnp.where(permutation[0] > 0, jnp.nan, 2.0)}

    permutations = [np.full(3, k) for k in range(3)]
    _, metrics = jax.jit(lambda x: ppo_jax.each_epoch(epoch, x, permutations, config))(learner)
    assert metrics["approx_kl"] == 2


GAMES = [name for name in gymnax.registered_envs if name not in ("MNISTBandit-bsuite", "FrozenLake-misc")]


@pytest.mark.parametrize("name", GAMES)
def test_every_environment_fits(name):
    """Each is traced through a whole iteration, whose learner and simulator look as before it."""
    config = config_of(name)
    learner, envs = opened(config)
    iterate = jax.jit(ppo_jax.iterate_on_device, static_argnums=(2, 3, 4))
    after = iterate.eval_shape(learner, envs.simulator, envs, config, envs.plainly)[:2]
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in ((learner, envs.simulator), after))
    assert before == after


# ----------------------------------------------------------------------------------------------------------- update


def test_timing_leaves_the_weights_alone(tmp_path):
    fused, timed = (model_after(tmp_path / str(k), timing_interval=k) for k in (0, 1))
    untrained = model_after(tmp_path / "untrained", total_timesteps=0)
    for name in fused:
        np.testing.assert_allclose(timed[name], fused[name], rtol=0, atol=1e-5)
        assert np.abs(fused[name] - untrained[name]).max() > 1e-4, name


def calls_and_record(folder: Path, monkeypatch, steps_of_a_call: int, **flags) -> tuple[int, dict, list[dict]]:
    """How many calls a run takes, its model, its rows"""
    monkeypatch.setattr(ppo_jax, "STEPS_OF_A_CALL", steps_of_a_call)
    clock = watched_clock(ppo_jax, monkeypatch)
    model = model_after(folder / str(steps_of_a_call), wandb_mode="offline", eval_episodes=2, **flags)
    return len(clock) - 1, model, config_and_rows(folder / str(steps_of_a_call))[1]


def test_iterations_that_share_a_call_are_the_same_iterations(tmp_path, monkeypatch):
    """Evaluations after 3 and 6, a checkpoint after 5, the end after 8: calls of 3, 2, 1 and 2 iterations"""
    flags = {"total_timesteps": 8 * 64, "timing_interval": 0, "eval_interval": 3 * 64, "checkpoint_interval": 5 * 64}
    flags["anneal_lr"] = True
    calls, model, rows = calls_and_record(tmp_path, monkeypatch, 8 * 64, **flags)
    one_by_one, expected, expected_rows = calls_and_record(tmp_path, monkeypatch, 64, **flags)
    assert (calls, one_by_one) == (4, 8)
    for name in expected:
        np.testing.assert_allclose(model[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    for key in ("charts/evaluation_return", "charts/return_last_100"):
        assert rows[-1][key] == expected_rows[-1][key]
    rates = [1e-3 * (1 - k / 8) for k in range(8)]  # of each iteration; the last row has those since the row before
    last = next(row for row in reversed(rows) if "charts/learning_rate" in row)
    first = max((row["charts/iteration"] for row in rows if row.get("charts/iteration", 8) < 8), default=0)
    assert last["charts/learning_rate"] == pytest.approx(np.mean(rates[first:]))


def test_every_second_call_is_a_timed_iteration(tmp_path, monkeypatch):
    """Of 8 iterations otherwise: 8, one timed, 8, one timed, and the last 2"""
    flags = {"total_timesteps": 20 * 64, "timing_interval": 2, "checkpoint_interval": 10**6}
    calls, _, rows = calls_and_record(tmp_path, monkeypatch, 8 * 64, **flags)
    timed = [row["charts/iteration"] for row in rows if "times/loss" in row]
    assert (calls, timed) == (5, [9, 18])


@pytest.mark.parametrize("sizes", [(5, 3), (3, 5), (4, 4)])
def test_the_gradient_of_a_product(sizes):
    """In each of the three orders, by the formulas x' dy and dy W' in float64"""
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.normal(size=size) for size in ((7, sizes[0]), sizes, (7, sizes[1])))
    layer = ppo_jax.Dense(sizes[1], use_bias=False)
    inputs = jnp.float32(x), jnp.float32(kernel)
    y, gradients = jax.vjp(lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x), *inputs)
    for found, expected in zip((y, *gradients(jnp.float32(dy))), (x @ kernel, dy @ kernel.T, x.T @ dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_target_kl_ends_an_update_in_compiled_code_too(tmp_path):
    """After the first epoch, as with --update-epochs 1; phase by phase likewise"""
    config = config_of(target_kl=1e-9)
    outcomes = []
    for one in (config, dataclasses.replace(config, target_kl=None, update_epochs=1), config):
        learner, envs = opened(one)
        stopwatch = ppo_jax.new_stopwatch(learner, one)
        stopwatch.compiled |= ppo_jax.compiled_on_device(envs)
        learner, _, _, metrics = ppo_jax.collect_and_update(learner, envs, [1e-3], one, stopwatch, len(outcomes) == 2)
        outcomes.append((np.asarray(learner.agent.weights), metrics))
    for weights, metrics in outcomes:
        np.testing.assert_allclose(weights, outcomes[1][0], rtol=0, atol=1e-6)
        assert metrics == pytest.approx(outcomes[1][1], rel=1e-4, abs=1e-6)


def test_a_seed_decides_everything(tmp_path):
    first, again, other = (model_after(tmp_path / str(k), seed=seed) for k, seed in enumerate((1, 1, 2)))
    for name in first:
        assert np.array_equal(first[name], again[name]), name
        assert not np.array_equal(first[name], other[name]), name


def test_a_convolution_as_a_product():
    """Beside XLA's own"""
    rng = np.random.default_rng(0)
    images, kernel = (jnp.array(rng.normal(size=size), jnp.float32) for size in ((2, 7, 6, 3), (3, 2, 3, 5)))
    expected = jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(ppo_jax.convolution(images, kernel), expected, rtol=0, atol=1e-5)


def test_a_small_image(tmp_path):
    """The CNN of MinAtar by torch's names; what the environment gives as (height, width, channels) is turned around."""
    model = model_after(tmp_path / "run", name="Breakout-MinAtar", num_steps=8, total_timesteps=32, eval_episodes=1)
    assert model["encoder.0.weight"].shape == (16, 4, 3, 3) and model["encoder.3.weight"].shape == (128, 16 * 8 * 8)
    assert model["actor.0.weight"].shape == (3, 128)


def test_cartpole_is_learnt(tmp_path):
    config = config_of(num_steps=128, learning_rate=2.5e-4, total_timesteps=100_000, eval_episodes=10)
    result = ppo_jax.train(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
    assert np.mean(result.evaluation_returns) > 400  # an untrained policy gets about 10, the best 500


# ------------------------------------------------------------------------------------------------- record and timing


@pytest.mark.clock
@pytest.mark.parametrize("timing_interval", [1, 0])
def test_the_record_adds_up_to_the_wall_clock(timing_interval, tmp_path, monkeypatch):
    config = config_of(num_steps=512, total_timesteps=30 * 2048, wandb_mode="offline", timing_interval=timing_interval)
    clock = watched_clock(ppo_jax, monkeypatch)
    ppo_jax.train(dataclasses.replace(config, eval_interval=16384, eval_episodes=2, run_dir=str(tmp_path / "run")))
    _, rows = config_and_rows(tmp_path / "run")
    covered = assert_times_add_up(rows, clock)
    phases = PHASES | {"iteration", "update/rollout"} if timing_interval else {"update", "record", "other", "iteration"}
    assert {f"times/{phase}" for phase in phases} <= covered[0][0].keys()
    glossary = (ROOT / "README.md").read_text()
    assert all(f"`{key}`" in glossary for row in rows for key in row if key.startswith(("times/", "losses/")))
    assert ("times/loss" in covered[0][0]) == bool(timing_interval)
    if timing_interval:
        assert np.median([row["times/other"] / row["times/iteration"] for row, _ in covered]) < 0.1
    returns = [row["charts/episodic_return"] for row in rows if "charts/episodic_return" in row]
    assert returns and returns == [row["charts/episodic_length"] for row in rows if "charts/episodic_length" in row]
    assert {"losses/policy_loss", "losses/explained_variance", "charts/SPS"} <= covered[0][0].keys()


FIVE_ITERATIONS = SMALL | {"env_id": "gymnax/Counter", "num_steps": 32, "total_timesteps": 5 * 128}
FIVE_ITERATIONS |= {"checkpoint_interval": 0}  # so that one call holds them


@pytest.mark.parametrize(
    ("module", "box", "bad_step"),
    [(ppo_jax, False, 3), (ppo_jax, True, 0), (ppo_jax, True, 100), (ppo_lstm_jax, True, 3)],
)
def test_an_environment_that_gives_no_number_is_named(module, box, bad_step, tmp_path):
    """Actions that are not finite follow from the observation, weights from both, and actions in the next iteration of
    the same call from these. (The warm-up takes 96 steps.)"""
    kwargs = json.dumps({"bad_step": bad_step, "length": 105, "box": box})
    config = module.Config(**FIVE_ITERATIONS, env_kwargs=kwargs, run_dir=str(tmp_path / "run"))
    with pytest.raises(module.TrainingFailed, match="gymnax/Counter: the observation is not finite"):
        module.train(config)


@pytest.mark.parametrize("module", [ppo_jax, ppo_lstm_jax], ids=lambda module: module.__name__)
def test_a_policy_that_is_not_finite_is_to_blame(module, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "draw_noise", lambda *_: jnp.full((32, 4, 1), jnp.nan))
    config = module.Config(**FIVE_ITERATIONS, env_kwargs='{"box": true}', run_dir=str(tmp_path / "run"))
    with pytest.raises(module.TrainingFailed, match="the policy gives an action that is not finite"):
        module.train(config)


@pytest.mark.parametrize("value", ["x", [1], None])
@pytest.mark.parametrize("module", [ppo_jax, ppo_lstm_jax], ids=lambda module: module.__name__)
def test_parameters_that_the_game_cannot_take_are_refused(module, value, tmp_path):
    kwargs = json.dumps({"max_steps_in_episode": value})
    flags = ["--env-id", "gymnax/CartPole-v1", "--env-kwargs", kwargs, "--wandb-mode", "disabled"]
    assert_refused(main(*flags, "--run-dir", tmp_path / "run", module=module), "--env-kwargs", module=module)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [ppo_jax, ppo_lstm_jax], ids=lambda module: module.__name__)
def test_parameters_are_those_of_the_game_that_was_asked_for(module):
    """DeepSea's episodes are as long as the sea is wide."""
    config = module.Config(env_id="gymnax/DeepSea-bsuite", env_kwargs='{"size": 20, "deterministic": false}')
    _, params, _ = module.make_gymnax(config)
    assert (params.max_steps_in_episode, params.deterministic) == (20, False)


def test_an_evaluation_counts_no_episode_of_the_one_before():
    config = config_of("Counter", {"length": 1}, eval_episodes=3)
    _, envs = opened(config)
    for _ in range(2):
        evaluated = envs.for_evaluation()
        assert evaluated.episodes == []
        evaluated.restart(0)
        evaluated.step(np.zeros((3, 1), np.int32))
        assert len(evaluated.episodes) == 3


# ------------------------------------------------------------------------------------------------------- resumption

FLAGS = ["--env-id", "gymnax/CartPole-v1", "--num-envs", "2", "--num-steps", "16", "--eval-episodes", "1"]


def test_killed_and_resumed(tmp_path):
    """Episodes go on where they were: no environment is reset."""
    flags = [*FLAGS, "--total-timesteps", "16000", "--checkpoint-interval", "1600"]
    assert_resumes_to_the_bit(SCRIPT, tmp_path, *flags)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_signal_ends_the_run_and_leaves_a_checkpoint(num_seeds, tmp_path):
    assert_a_signal_leaves_a_checkpoint(SCRIPT, tmp_path, *FLAGS, "--num-seeds", num_seeds)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_checkpoint_holds_all_that_follows_from_it(num_seeds, tmp_path):
    """From the last but one of a finished run to its end again, to the bit"""
    config = config_of(num_seeds=num_seeds, total_timesteps=6 * 64, checkpoint_interval=128, timing_interval=2)
    whole, again = tmp_path / "whole", tmp_path / "again"
    ppo_jax.train(dataclasses.replace(config, run_dir=str(whole)))
    shutil.copytree(whole, again)
    checkpoints(again)[-1].unlink()
    models = list(again.glob("**/model.safetensors"))
    for path in models:
        path.unlink()
    assert main("--resume", again, module=ppo_jax).code == 0
    assert len(models) == num_seeds
    for path in models:
        assert_same_model(path.parent, whole / path.parent.relative_to(again))


def test_a_model_goes_on_and_evaluates(tmp_path):
    first = ppo_jax.train(config_of(total_timesteps=640, eval_episodes=3, run_dir=str(tmp_path / "first")))
    flags = {"load_model": str(tmp_path / "first/model.safetensors"), "eval_episodes": 3}
    again = ppo_jax.train(config_of(total_timesteps=0, run_dir=str(tmp_path / "again"), **flags))
    assert again.evaluation_returns == first.evaluation_returns and len(first.evaluation_returns) == 3
    more = model_after(tmp_path / "more", **flags)
    assert np.abs(more["actor.0.weight"] - ppo_jax.load_arrays(flags["load_model"])[0]["actor.0.weight"]).max() > 1e-4


# ------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("timing_interval", [0, 1])
def test_each_of_many_seeds_learns_as_by_itself(timing_interval, tmp_path):
    """To 1e-5 over three iterations, because products of many matrices at once add up in another order"""
    flags = {"timing_interval": timing_interval, "eval_episodes": 2}
    many = ppo_jax.train(config_of(seed=5, num_seeds=3, total_timesteps=192, run_dir=str(tmp_path / "many"), **flags))
    returns = []
    for k in range(3):
        directory = tmp_path / f"single {k}"
        single = ppo_jax.train(config_of(seed=5 + k, total_timesteps=192, run_dir=str(directory), **flags))
        returns += single.evaluation_returns
        expected, _ = ppo_jax.load_arrays(directory / "model.safetensors")
        found, metadata = ppo_jax.load_arrays(tmp_path / f"many/seed_{k}/model.safetensors")
        assert found.keys() == expected.keys() and metadata["config"]["seed"] == 5 + k
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert many.evaluation_returns == returns


def test_each_of_many_seeds_has_a_record(tmp_path):
    config = config_of(seed=5, num_seeds=2, total_timesteps=40 * 64, eval_episodes=2, wandb_mode="offline")
    result = ppo_jax.train(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
    recorded = [config_and_rows(tmp_path / f"run/seed_{k}") for k in range(2)]
    assert [config["seed"] for config, _ in recorded] == [5, 6]
    for k, (_, rows) in enumerate(recorded):
        assert rows[-1]["charts/evaluation_return"] == np.mean(result.evaluation_returns[2 * k : 2 * k + 2])
        assert {"losses/policy_loss", "charts/episodic_return", "times/update"} <= {key for row in rows for key in row}
        assert not any("seed_" in key for row in rows for key in row)
    losses = [[row["losses/entropy"] for row in rows if "losses/entropy" in row] for _, rows in recorded]
    assert losses[0] != losses[1] and len(losses[0]) == len(losses[1])
    ids = {next((tmp_path / f"run/seed_{k}").glob("wandb/*run-*/run-*.wandb")).stem for k in range(2)}
    assert len(ids) == 2


def test_a_timed_call_of_many_seeds_has_a_row_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_jax, "SECONDS_OF_A_ROW", 1e9)
    flags = {"num_steps": 4096, "total_timesteps": 6 * 4 * 4096}  # an iteration fills a call
    config = config_of(num_seeds=2, timing_interval=2, checkpoint_interval=0, **flags)
    ppo_jax.train(dataclasses.replace(config, wandb_mode="offline", run_dir=str(tmp_path / "run")))
    _, rows = config_and_rows(tmp_path / "run/seed_0")
    timed = [row for row in rows if "times/loss" in row]
    assert timed and not any("times/update" in row for row in timed)
    phases = [f"times/{phase}" for phase in PHASES]
    assert all(sum(row.get(phase, 0) for phase in phases) == pytest.approx(row["times/iteration"]) for row in timed)


# ----------------------------------------------------------------------------------------------------------- devices

WORKER = """
import json, sys
import jax, numpy as np
import ppo_jax
config = ppo_jax.validate(ppo_jax.Config(**json.loads(sys.argv[1])))
envs = ppo_jax.GymnaxEnvironments(config, config.num_envs)
learner = envs.on_devices(ppo_jax.new_learner(envs, config))
stopwatch = ppo_jax.new_stopwatch(learner, config)
ppo_jax.warm_up(learner, envs, config, stopwatch)
found, late = [], []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: late.append(name))
for is_timed in (False, False, True):
    learner = ppo_jax.with_learning_rate(learner, 1e-3)
    learner, _, batch, metrics = ppo_jax.collect_and_update(learner, envs, [1e-3], config, stopwatch, is_timed)
    found.append({name: np.asarray(x).tolist() for name, x in metrics.items()})
    ppo_jax.probe(learner, envs, batch, config, stopwatch)
    arrays = ppo_jax.to_numpy(learner) | envs.to_numpy()
late = [name for name in late if "backend_compile" in name]
split = [x for x in jax.tree.leaves(envs.simulator) if not x.sharding.is_fully_replicated]
print(json.dumps([found, envs.mesh.size, len(split), len(late), np.asarray(learner.agent.weights).ravel().tolist()]))
"""


def on_devices(number: int, folder: Path, **flags) -> tuple[list[dict], int, int, int, list[float]]:
    variables = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number}", "PYTHONPATH": str(ROOT)}
    variables["PYTHONPATH"] += ":" + ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", WORKER, json.dumps(dataclasses.asdict(config_of(**flags)))]
    variables = environment_variables(folder) | variables
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_several_devices_learn_what_one_learns(num_seeds, tmp_path):
    """Losses of three updates, two fused and one phase by phase; after the warm-up nothing is compiled"""
    flags = {"num_envs": 8, "num_seeds": num_seeds}
    losses, size, split, late, weights = on_devices(1, tmp_path, **flags)
    assert (size, split, late) == (1, 0, 0)
    for number in (2, 4)[: 3 - num_seeds]:
        found, size, split, late, found_weights = on_devices(number, tmp_path, **flags)
        assert size == number and split >= 8 and late == 0
        for one, other in zip(found, losses, strict=True):
            for name in other:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found_weights, weights, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "--env-id gymnax/Nothing-v0": ["gymnax/Nothing-v0", "not in registered"],
    "--env-id gymnax/FrozenLake-misc": ["observation space", "Box is"],
    "--env-id gymnax/MNISTBandit-bsuite": ["download"],
    "--env-id gymnax/CartPole-v1 --norm-obs": ["--norm-obs"],
    "--env-id gymnax/CartPole-v1 --norm-reward": ["--norm-reward"],
    "--env-id gymnax/CartPole-v1 --capture-video": ["--capture-video"],
    '--env-id gymnax/CartPole-v1 --env-kwargs {"nothing":1}': ["nothing"],
    "--env-id gymnax/CartPole-v1 --num-seeds 2 --target-kl 0.1": ["--target-kl 0.1"],
    "--num-seeds 2": ["--num-seeds 2"],
    "--env-id gymnax/CartPole-v1 --num-seeds 0": ["--num-seeds 0"],
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_in_one_line(flags, tmp_path):
    outcome = main(*flags.split(), "--run-dir", tmp_path / "run", module=ppo_jax)
    assert_refused(outcome, *BAD[flags], module=ppo_jax)
    assert not (tmp_path / "run").exists()


def test_without_gymnax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(BadInput, match=r"requirements/all\.txt"):
        ppo_jax.train(config_of(run_dir=str(tmp_path / "run")))


def test_environment_arguments_reach_the_game_or_its_parameters():
    envs = GymnaxEnvironments(config_of("Counter", {"length": 9, "box": True}), 2)
    assert (envs.params.length, envs.game.box) == (9, True)
    assert math.isinf(envs.game.observation_space(envs.params).high)
