"""Equations and updates of sac_jax.py against literal values, numerical integrals and PyTorch.

Where a test gives a tolerance without a word it is the rounding of float64 (1e-9 through an update) or of float32
(1e-6, 1e-5 through a network, 1e-4 through an update), of finite differences and grids (their spacing), or five
standard errors and more of the moments of a sample.
"""

import math

import jax
import numpy as np
import pytest
import torch

import sac_jax
from sac_jax import actions_and_log_probs, actor_loss, alpha_loss, critic_targets, sample_actions
from tests.backends import jax_doubled as doubled
from tests.test_off_policy import configured, random_batch, sizes
from tests.torch_twin import Twin, compare


def test_log_probabilities_against_an_inverted_tanh():
    """u from a by bisection on tanh; the derivative da/du by central differences."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        means, log_stds, noise = rng.uniform(-1.5, 1.5, (3, 40, 3))
        actions, log_probs = map(np.asarray, actions_and_log_probs(means, log_stds, noise))
    low, high = np.full_like(actions, -20), np.full_like(actions, 20)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = np.where(np.tanh(middle) < actions, middle, low), np.where(np.tanh(middle) < actions, high, middle)
    u = (low + high) / 2
    slope = (np.tanh(u + 1e-6) - np.tanh(u - 1e-6)) / 2e-6
    density = np.exp(-0.5 * ((u - means) / np.exp(log_stds)) ** 2) / (np.exp(log_stds) * math.sqrt(2 * math.pi)) / slope
    well = (abs(actions) < 0.9999).all(-1)  # beyond, the inverse has too few digits
    assert well.sum() > 20
    np.testing.assert_allclose(log_probs[well], np.log(density).sum(-1)[well], rtol=1e-5)


def test_the_density_of_an_action_integrates_to_one():
    with jax.enable_x64(True):
        noise = np.linspace(-9, 9, 200_001)[:, None]
        actions, log_probs = map(np.asarray, actions_and_log_probs(np.array([[0.4]]), np.array([[-0.3]]), noise))
    assert np.trapezoid(np.exp(log_probs), actions[:, 0]) == pytest.approx(1, abs=1e-6)


def test_log_probabilities_where_tanh_is_one():
    """In float32 tanh(20) is 1: log(1 - tanh²) would be -inf, and is 2 (log 2 - 20)."""
    _, log_probs = actions_and_log_probs(np.float32([[20.0], [-20.0]]), np.float32([[0.0], [0.0]]), np.zeros((2, 1)))
    expected = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 20)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-6)


def test_targets_and_losses():
    rewards, terminated = np.array([1.0, 2.0, 3.0]), np.array([False, True, False])
    next_q, next_log_probs = np.array([[10.0, 10.0, -4.0], [8.0, 7.0, 5.0]]), np.array([1.0, 1.0, -2.0])
    targets = critic_targets(rewards, terminated, next_q, next_log_probs, 0.5, 0.5)
    np.testing.assert_allclose(targets, [1 + 0.5 * (8 - 0.5), 2, 3 + 0.5 * (-4 + 1)])
    assert actor_loss(np.array([[1.0, 5.0], [2.0, 3.0]]), np.array([4.0, -2.0]), 0.5) == (2 - 1 + -1 - 3) / 2
    assert alpha_loss(np.log(2.0), np.array([1.0, 3.0]), -1.5) == pytest.approx(-2 * (2 - 1.5))


def test_the_temperature_rises_where_the_entropy_is_too_low():
    """Entropy -log π below H = -2: the gradient by log α is negative, so α grows."""
    too_low, too_high = (jax.grad(alpha_loss)(0.0, np.array([log_prob]), -2.0) for log_prob in (2.5, 1.5))
    assert too_low < 0 < too_high


@pytest.mark.parametrize("autotune", [True, False])
def test_ten_updates_against_torch(autotune):
    """Weights, targets, temperature and losses in float64, to 1e-9"""
    config = configured(sac_jax, policy_lr=1e-2, q_lr=2e-2, tau=0.1, autotune=autotune, alpha=0.3)
    batch = random_batch(sac_jax, config, range(1, 11))

    def policy(observations, noise):
        means, log_stds = twin("actor", observations).chunk(2, -1)
        std = (-5 + 3.5 * (torch.tanh(log_stds) + 1)).exp()
        u = means + std * noise
        gaussian = torch.distributions.Normal(means, std).log_prob(u)
        return torch.tanh(u), (gaussian - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)

    with jax.enable_x64(True):
        learner, batch = doubled(sac_jax.new_learner(sizes(), config)), doubled(batch)
        twin = Twin(sac_jax.to_numpy(learner), config.tau)
        log_alpha = twin.params["log_alpha"] if autotune else torch.tensor(math.log(0.3), dtype=torch.float64)
        adams = {name: torch.optim.Adam(twin.weights(name), lr=lr) for name, lr in (("actor", 1e-2), ("critics", 2e-2))}
        adams["log_alpha"] = torch.optim.Adam([log_alpha], lr=2e-2)

        def descend(name: str, loss: torch.Tensor) -> None:
            adams[name].zero_grad()
            loss.backward()
            adams[name].step()

        expected = []
        for u in range(10):
            observations, actions, rewards, terminated, following, next_noise, noise = (
                torch.tensor(x[u]) for x in batch
            )
            with torch.no_grad():
                next_actions, next_log_probs = policy(following, next_noise)
                next_v = torch.minimum(*twin.q("target_critics", following, next_actions))
                targets = rewards + config.gamma * (~terminated).double() * (next_v - log_alpha.exp() * next_log_probs)
            q = twin.q("critics", observations, actions)
            loss = sum(torch.nn.functional.mse_loss(values, targets) for values in q)
            descend("critics", loss)
            chosen, log_probs = policy(observations, noise)
            alpha = log_alpha.exp().detach()
            policy_loss = (alpha * log_probs - torch.minimum(*twin.q("critics", observations, chosen))).mean()
            descend("actor", policy_loss)
            log_probs = log_probs.detach()
            temperature_loss = torch.zeros(())
            if autotune:
                temperature_loss = -(log_alpha.exp() * (log_probs - 2)).mean()
                descend("log_alpha", temperature_loss)
            twin.move_targets("critics")
            losses = loss, torch.stack(q).mean(), policy_loss, -log_probs.mean(), temperature_loss, alpha
            expected.append([x.item() for x in losses])
        learner, metrics = jax.jit(sac_jax.update, static_argnames=("config", "timed"))(
            learner, batch, config, sac_jax.new_stopwatch().fused
        )
        np.testing.assert_allclose(metrics, np.transpose(expected), rtol=1e-9)
        compare(sac_jax.to_numpy(learner), twin)
    assert (log_alpha.item() == math.log(0.3)) == (not autotune)


def test_exploration():
    """Uniform at first, then draws from the policy; greedily the tanh of the mean."""
    config = configured(sac_jax, learning_starts=10)
    learner, rng = sac_jax.new_learner(sizes(), config), np.random.default_rng(0)
    observations = np.tile(np.float32([0.3, -1.0, 2.0]), (20_000, 1))
    uniform = sac_jax.explore(learner.actor, observations, 2, 9, config, rng)
    np.testing.assert_allclose(uniform.std(0), 1 / np.sqrt(3), atol=0.01)
    means, log_stds = (np.asarray(x[0]) for x in learner.actor(observations[:1]))
    drawn = np.arctanh(sac_jax.explore(learner.actor, observations, 2, 10, config, rng).astype(float))
    np.testing.assert_allclose(drawn.mean(0), means, atol=0.02)
    np.testing.assert_allclose(drawn.std(0), np.exp(log_stds), rtol=0.03)
    np.testing.assert_allclose(sac_jax.act(learner.actor, observations[:1])[0], np.tanh(means), rtol=1e-6)
    assert (log_stds > -5).all() and (log_stds < 2).all()


def test_noise_is_the_policys_own():
    assert sample_actions(np.array([0.5]), np.array([math.log(2)]), np.array([0.25])) == pytest.approx(math.tanh(1.0))
