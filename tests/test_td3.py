"""Equations and updates of td3_jax.py against literal values and against PyTorch.

Where a test gives a tolerance without a word it is the rounding of float64 (1e-9 through an update) or of float32
(1e-6, 1e-5 through a network, 1e-4 through an update), of finite differences and grids (their spacing), or five
standard errors and more of the moments of a sample.
"""

import jax
import numpy as np
import pytest
import torch

import td3_jax
from td3_jax import actor_loss, critic_loss, critic_targets, polyak, smoothed_actions
from tests.backends import jax_doubled as doubled
from tests.test_off_policy import configured, random_batch, sizes
from tests.torch_twin import Twin, compare


def test_target_actions():
    """Noise is clipped first, the action last; each entry has noise of its own."""
    actions = np.array([[0.9, -0.2], [0.0, -1.0]])
    noise = np.array([[0.3, -0.7], [0.2, -0.1]])
    np.testing.assert_allclose(smoothed_actions(actions, noise, 0.5), [[1.0, -0.7], [0.2, -1.0]], atol=1e-7)


def test_targets():
    rewards, terminated = np.array([1.0, 2.0, 3.0]), np.array([False, True, False])
    next_q = np.array([[10.0, 10.0, -4.0], [8.0, 7.0, 5.0]])
    np.testing.assert_allclose(critic_targets(rewards, terminated, next_q, 0.5), [5.0, 2.0, 1.0])


def test_losses():
    q, targets = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([0.0, 4.0])
    assert critic_loss(q, targets) == (1 + 4) / 2 + (9 + 1) / 2
    assert actor_loss(np.array([1.0, 4.0])) == -2.5
    assert polyak({"w": np.array(2.0)}, {"w": np.array(10.0)}, 0.25) == {"w": 4.0}


@pytest.mark.parametrize("policy_frequency", [1, 2, 3])
def test_ten_updates_against_torch(policy_frequency):
    """Weights, targets and losses in float64, to 1e-9"""
    config = configured(td3_jax, policy_frequency=policy_frequency, policy_noise=0.4, learning_rate=1e-2, tau=0.1)
    batch = random_batch(td3_jax, config, range(1, 11))
    with jax.enable_x64(True):
        learner, batch = doubled(td3_jax.new_learner(sizes(), config)), doubled(batch)
        twin = Twin(td3_jax.to_numpy(learner), config.tau)
        actor_adam, critics_adam = (torch.optim.Adam(twin.weights(name), lr=1e-2) for name in ("actor", "critics"))
        expected = []
        for u in range(10):
            observations, actions, rewards, terminated, following, noise = (torch.tensor(x[u]) for x in batch[:6])
            with torch.no_grad():
                next_actions = torch.tanh(twin("target_actor", following)) + noise.clamp(-0.5, 0.5)
                next_q = twin.q("target_critics", following, next_actions.clamp(-1, 1))
                targets = rewards + config.gamma * (~terminated).double() * torch.minimum(*next_q)
            q = twin.q("critics", observations, actions)
            loss = sum(torch.nn.functional.mse_loss(values, targets) for values in q)
            critics_adam.zero_grad()
            loss.backward()
            critics_adam.step()
            policy_loss, moves_policy = torch.tensor(torch.nan), (u + 1) % policy_frequency == 0
            if moves_policy:
                policy_loss = -twin.q("critics", observations, torch.tanh(twin("actor", observations)))[0].mean()
                actor_adam.zero_grad()
                policy_loss.backward()
                actor_adam.step()
                twin.move_targets("actor", "critics")
            expected.append([loss.item(), torch.stack(q).mean().item(), policy_loss.item(), moves_policy])
        learner, metrics = jax.jit(td3_jax.update, static_argnames=("config", "timed"))(
            learner, batch, config, td3_jax.new_stopwatch().fused
        )
        np.testing.assert_allclose(metrics, np.transpose(expected), rtol=1e-9)
        compare(td3_jax.to_numpy(learner), twin)


def test_the_policy_moves_at_every_second_update():
    config = configured(td3_jax)
    learner, stopwatch = td3_jax.new_learner(sizes(), config), td3_jax.new_stopwatch()
    for first, moves in (1, False), (2, True), (3, False):
        batch = random_batch(td3_jax, config, range(first, first + 1))
        after, metrics = td3_jax.update(td3_jax.copied(learner), batch, config, stopwatch.timed)
        before_and_after = td3_jax.to_numpy(learner), td3_jax.to_numpy(after)
        for name in ("actor.0.weight", "target_actor.0.weight", "target_critics.0.weight"):
            assert np.array_equal(*(arrays[name] for arrays in before_and_after)) == (not moves)
        assert not np.array_equal(*(arrays["critics.0.weight"] for arrays in before_and_after))
        assert np.isnan(metrics[2]).all() == (not moves)


def test_losses_are_averaged_over_the_updates_that_had_them():
    updates = [np.array([[1.0], [2.0], [np.nan], [0]]), np.array([[3.0, 5.0], [4, 6], [7, np.nan], [1, 0]])]
    means = td3_jax.mean_metrics(updates)
    assert means == {"losses/critic_loss": 3, "losses/q_mean": 4, "losses/actor_loss": 7}
    assert td3_jax.mean_metrics([]) == {}
    diverged = td3_jax.mean_metrics([np.array([[1, 1], [2, 2], [3, np.nan], [1, 1]])])
    assert np.isnan(diverged["losses/actor_loss"])  # which ends the run


def test_exploration():
    """Uniform at first; then Gaussian with the given deviation in each dimension, clipped to the bounds."""
    config = configured(td3_jax, learning_starts=10, exploration_noise=0.1, num_envs=20_000)
    learner, rng = td3_jax.new_learner(sizes(), config), np.random.default_rng(0)
    observations = np.tile(np.float32([0.3, -1.0, 2.0]), (20_000, 1))
    uniform = td3_jax.explore(learner.actor, observations, 2, 9, config, rng)
    np.testing.assert_allclose(uniform.std(0), 1 / np.sqrt(3), atol=0.01)
    assert abs(uniform.mean(0)).max() < 0.02 and abs(uniform).max() <= 1
    greedy = td3_jax.act(learner.actor, observations)
    noisy = td3_jax.explore(learner.actor, observations, 2, 10, config, rng)
    np.testing.assert_allclose((noisy - greedy).std(0), 0.1, rtol=0.03)
    np.testing.assert_allclose((noisy - greedy).mean(0), 0, atol=0.005)
    assert abs(np.corrcoef((noisy - greedy).T)[0, 1]) < 0.03
    wild = td3_jax.explore(learner.actor, observations, 2, 10, configured(td3_jax, exploration_noise=9.0), rng)
    assert abs(wild).max() <= 1
