"""Equations and updates of mpo_jax.py against literal values, grids, numerical integrals and PyTorch.

Where a test gives a tolerance without a word it is the rounding of float64 (1e-9 through an update) or of float32
(1e-6, 1e-5 through a network, 1e-4 through an update), of finite differences and grids (their spacing), or five
standard errors and more of the moments of a sample.
"""

import contextlib
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import mpo_jax
from mpo_jax import Gaussian, Learner, Multipliers, Network
from tests.backends import jax_doubled as doubled
from tests.test_off_policy import configured, random_batch, sizes
from tests.torch_twin import Twin

SOLVERS = list(mpo_jax.SOLVERS)


def values_like(name: str, seed: int = 0) -> np.ndarray:
    """(S, B) of Q' as they come and as they hardly do"""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 64))
    return {
        "of one scale": x - 3,
        "small, far from 0": 1e-2 * x + 300,
        "large": 1e3 * x,
        "of many scales": x * np.exp(2 * rng.standard_normal(64)),
        "in two heaps": np.where(np.arange(64) % 2, 1e-3, 1e2) * x,
        "mostly 0": np.minimum(x + 1, 0),
    }[name]


KINDS = ["of one scale", "small, far from 0", "large", "of many scales", "in two heaps", "mostly 0"]


def literal_dual(temperature: float, values: np.ndarray, epsilon: float) -> float:
    best = values.max(0)
    means = [
        np.mean([math.exp((q - top) / temperature) for q in column]) for column, top in zip(values.T, best, strict=True)
    ]
    return temperature * epsilon + float(np.mean(best + temperature * np.log(means)))


def grid_minimum(values: np.ndarray, epsilon: float, low: float = 1e-6, high: float = 1e6) -> float:
    """By ever finer grids of log η"""
    for _ in range(4):
        grid = np.geomspace(low, high, 400)
        scaled = (values - values.max(0)) / grid[:, None, None]
        duals = grid * (epsilon + np.log(np.exp(scaled).mean(1)).mean(-1)) + values.max(0).mean()
        best = int(duals.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 399)]
    return float(grid[best])


# ---------------------------------------------------------------------------------------------------------- E-step


def test_dual_and_weights_are_what_the_paper_writes():
    values = values_like("of one scale")
    with jax.enable_x64(True):
        for temperature in (0.05, 0.7, 30.0):
            dual = mpo_jax.temperature_dual(temperature, values, 0.1)
            assert float(dual) == pytest.approx(literal_dual(temperature, values, 0.1), rel=1e-12)
            literal = np.array([[math.exp(q / temperature) for q in row] for row in values])
            literal /= literal.sum(0)
            np.testing.assert_allclose(mpo_jax.sample_weights(temperature, values), literal, rtol=1e-9)
            kl, derivative = map(float, mpo_jax.weights_kl(temperature, values))
            assert kl == pytest.approx((literal * np.log(literal * 20)).sum(0).mean(), rel=1e-9)
            more, less = (float(mpo_jax.weights_kl(temperature * math.exp(x), values)[0]) for x in (1e-4, -1e-4))
            assert derivative == pytest.approx((more - less) / 2e-4, rel=1e-4)
            assert float(jax.grad(mpo_jax.temperature_dual)(temperature, values, 0.1)) == pytest.approx(0.1 - kl)


def test_weights_of_the_smallest_temperature():
    weights = mpo_jax.sample_weights(jnp.float32(mpo_jax.MIN_DUAL), jnp.float32([[1e4], [-1e4], [9e3]]))
    np.testing.assert_array_equal(weights, [[1], [0], [0]])
    kl, derivative = mpo_jax.weights_kl(mpo_jax.MIN_DUAL, jnp.float32([[1e4], [-1e4], [9e3]]))
    assert (float(kl), float(derivative)) == (pytest.approx(math.log(3)), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_newton_finds_the_minimum_of_the_dual(kind, epsilon):
    values = values_like(kind)
    with jax.enable_x64(True):
        expected = grid_minimum(values, epsilon)
        for start in (1e-8, 1e-3, 1.0, expected, 1e7):
            found = float(mpo_jax.optimal_temperature(jnp.array(values), epsilon, jnp.array(start)))
            assert found == pytest.approx(expected, rel=1e-4), start
            assert float(mpo_jax.weights_kl(found, values)[0]) == pytest.approx(epsilon, rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_newton_in_float32(kind):
    """Close, and soon: no step is undone by rounding, neither far from the minimum nor at it."""
    values = values_like(kind)
    expected = grid_minimum(values, 0.1)
    steps, weights_kl = [], mpo_jax.weights_kl
    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpo_jax, "weights_kl", lambda *arguments: (steps.append(1), weights_kl(*arguments))[1])
        for start in (1e-8, 1.0, expected, 1e7):
            found = mpo_jax.optimal_temperature(jnp.float32(values), 0.1, jnp.float32(start))
            assert found.dtype == np.float32
            assert float(found) == pytest.approx(expected, rel=1e-4)
            assert len(steps) < (5 if start == expected else 20)
            steps.clear()


@pytest.mark.parametrize("values", [np.ones((20, 64)), np.where(np.arange(20) < 19, 0.0, -5.0)[:, None] * np.ones(64)])
def test_a_constraint_that_does_not_bind(values):
    """Even weights, or all of it on 19 of 20 samples: a KL of 0 or log 20/19, below ε at every temperature"""
    for start in (1e-8, 1.0, 1e5):
        found = mpo_jax.optimal_temperature(jnp.float32(values), 0.1, jnp.float32(start))
        assert float(found) == pytest.approx(mpo_jax.MIN_DUAL)
    assert np.isfinite(mpo_jax.sample_weights(found, jnp.float32(values))).all()


def learner_of(config) -> Learner:
    return doubled(mpo_jax.new_learner(sizes(), config))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["of one scale", "small, far from 0", "of many scales"])
def test_every_solver_reaches_the_minimum(solver, kind):
    """Newton and SLSQP at once, Adam after many steps; both objectives, each by its own ε"""
    values = values_like(kind), -np.abs(values_like("of one scale", 1))
    config = configured(mpo_jax, temperature_solver=solver, epsilon=0.2, epsilon_penalty=0.02)
    with jax.enable_x64(True):
        learner = learner_of(config)
        solve = partial(mpo_jax.SOLVERS[solver], values=jnp.array(values), config=config)
        once = solve(learner)
        if solver == "adam":
            np.testing.assert_allclose(abs(once.temperatures - learner.temperatures), config.dual_lr, rtol=1e-3)
            once = jax.jit(lambda learner: jax.lax.fori_loop(0, 20_000, lambda _, now: solve(now), learner))(learner)
        found = mpo_jax.positive(once.temperatures)
        expected = grid_minimum(values[0], 0.2), grid_minimum(values[1], 0.02)
        np.testing.assert_allclose(found, expected, rtol={"newton": 1e-4, "slsqp": 1e-2, "adam": 1e-2}[solver])


@pytest.mark.parametrize("kind", KINDS)
def test_slsqp_reaches_the_minimum_of_any_scale_from_anywhere(kind):
    """Its tolerance is absolute. rtol: where the float32 dual is flat, for ε = 1e-3 (measured: at most 5e-3)"""
    values = values_like(kind)
    config = configured(mpo_jax, temperature_solver="slsqp", epsilon=0.1, epsilon_penalty=1e-3)
    expected = np.array([grid_minimum(values, epsilon) for epsilon in (0.1, 1e-3)])
    learner = mpo_jax.new_learner(sizes(), config)
    for start in (np.full(2, 1e-8), 0.9 * expected, 1.05 * expected, np.full(2, 1.0), np.full(2, 1e7)):
        learner = learner._replace(temperatures=mpo_jax.before_positive(jnp.float32(start)))
        learner = mpo_jax.solve_by_slsqp(learner, jnp.float32([values, values]), config)
        np.testing.assert_allclose(mpo_jax.positive(learner.temperatures), expected, rtol=1e-2, err_msg=str(start))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_stay_finite_and_above_the_floor(solver):
    config = configured(mpo_jax, temperature_solver=solver, dual_lr=10.0)
    learner = mpo_jax.new_learner(sizes(), config)
    for values in (np.zeros((20, 16)), 1e5 * np.ones((20, 16)), 1e4 * values_like("of one scale")[:, :16]):
        for _ in range(3):
            learner = mpo_jax.SOLVERS[solver](learner, jnp.float32([values, values]), config)
            temperatures = np.asarray(mpo_jax.positive(learner.temperatures))
            assert np.isfinite(temperatures).all() and (temperatures > 0.99 * mpo_jax.MIN_DUAL).all()


def test_the_error_of_the_temperature_is_its_distance_from_the_minimum():
    config = configured(mpo_jax)
    with jax.enable_x64(True):
        learner, batch = learner_of(config), doubled(random_batch(mpo_jax, config, range(1, 2)))
        batch = jax.tree.map(lambda x: x[0], batch)
        samples = mpo_jax.sample_values(learner, batch, config)
        best = grid_minimum(np.asarray(samples.values[0]), config.epsilon)
        kls = Multipliers(np.zeros(2), np.zeros(2))
        for factor in (0.5, 1.0, 3.0):
            temperatures = mpo_jax.before_positive(jnp.array([factor * best, 1.0]))
            at = learner._replace(temperatures=temperatures)
            temperature, error, *_ = mpo_jax.policy_metrics(at, samples.target, samples, kls, config)
            assert float(temperature) == pytest.approx(factor * best)
            assert float(error) == pytest.approx(abs(factor - 1), abs=1e-4)


def test_positive_and_its_inverse():
    with jax.enable_x64(True):
        y = np.geomspace(mpo_jax.MIN_DUAL, 1e5, 50)
        np.testing.assert_allclose(mpo_jax.positive(mpo_jax.before_positive(y)), y, rtol=1e-7)
    y = np.float32(y)
    np.testing.assert_allclose(mpo_jax.positive(mpo_jax.before_positive(y)), y, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- M-step


def gaussians(shape: tuple[int, ...] = (5, 2), seed: int = 0) -> tuple[Gaussian, Gaussian]:
    rng = np.random.default_rng(seed)
    return tuple(Gaussian(rng.normal(0, 0.5, shape), rng.uniform(0.2, 1.5, shape)) for _ in range(2))


def test_decoupled_kls_against_integrals():
    """Each the integral of p log p/q, by the trapezoidal rule, where the two differ in one parameter alone"""

    def integral(mean: float, std: float, other_mean: float, other_std: float) -> float:
        x = np.linspace(mean - 12 * std, mean + 12 * std, 20_001)
        log_p, log_q = (-0.5 * ((x - m) / s) ** 2 - math.log(s) for m, s in ((mean, std), (other_mean, other_std)))
        return float(np.trapezoid(np.exp(log_p) / math.sqrt(2 * math.pi) * (log_p - log_q), x))

    policy, target = gaussians()
    with jax.enable_x64(True):
        by_mean, by_cov = mpo_jax.kl_mean(policy, target), mpo_jax.kl_cov(policy, target)
        assert not any(kl.any() for kl in (mpo_jax.kl_mean(target, target), mpo_jax.kl_cov(target, target)))
    for index in np.ndindex(by_mean.shape):
        mean, std, new_mean, new_std = (x[index] for x in (*target, *policy))
        assert float(by_mean[index]) == pytest.approx(integral(mean, std, new_mean, std), abs=1e-9)
        assert float(by_cov[index]) == pytest.approx(integral(mean, std, mean, new_std), abs=1e-9)


def test_a_small_kl_is_not_lost_in_float32():
    """KL is (change of σ)² to first order, here 1e-8; of numbers near 1 float32 would leave 0 or 6e-8."""
    target, policy = (Gaussian(jnp.zeros(1), jnp.float32([0.5 * x])) for x in (1.0001, 1.0))
    change = float(target.stds[0] / 0.5 - 1)
    assert float(mpo_jax.kl_cov(policy, target)[0]) == pytest.approx(change**2, rel=1e-2)


@pytest.mark.parametrize("per_dim", [True, False])
def test_divergences(per_dim):
    policy, target = gaussians()
    kls = mpo_jax.divergences(policy, target, configured(mpo_jax, per_dim_kl=per_dim))
    for kl, function in zip(kls, (mpo_jax.kl_mean, mpo_jax.kl_cov), strict=True):
        each = np.asarray(function(policy, target))
        np.testing.assert_allclose(kl, each.mean(0) if per_dim else each.sum(1).mean(), rtol=1e-6)
        assert kl.shape == ((2,) if per_dim else ())


def test_actor_loss_against_torch():
    """Each half of the policy with the other half of the target policy"""
    policy, target = gaussians()
    rng = np.random.default_rng(1)
    weights, actions = rng.random((4, 5)), rng.standard_normal((4, 5, 2))

    def log_prob(means: np.ndarray, stds: np.ndarray) -> np.ndarray:
        normal = torch.distributions.Normal(torch.tensor(means), torch.tensor(stds))
        return normal.log_prob(torch.tensor(actions)).sum(-1).numpy()

    expected = -(weights * (log_prob(policy.means, target.stds) + log_prob(target.means, policy.stds))).sum() / 5
    with jax.enable_x64(True):
        assert float(mpo_jax.actor_loss(weights, actions, policy, target)) == pytest.approx(expected, rel=1e-12)


def test_multipliers_rise_where_a_kl_is_too_high():
    multipliers = Multipliers(jnp.array([0.5, 0.5]), jnp.array([2.0, 2.0]))
    kls, limits = Multipliers(np.array([0.02, 0.005]), np.array([1e-5, 1e-3])), Multipliers(0.01, 1e-4)
    loss = mpo_jax.multipliers_loss(multipliers, kls, limits)
    prices = [math.log1p(math.exp(x)) for x in (0.5, 2.0)]
    expected = prices[0] * (-0.01 + 0.005) + prices[1] * (9e-5 - 9e-4)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    gradient = jax.grad(mpo_jax.multipliers_loss)(multipliers, kls, limits)
    assert np.sign(gradient.mean).tolist() == [-1, 1] and np.sign(gradient.cov).tolist() == [1, -1]


def test_targets_and_costs():
    rewards, terminated = np.array([1.0, 2.0, 3.0]), np.array([False, True, False])
    next_q = np.array([[10.0, 10.0, -4.0], [8.0, 7.0, 6.0]])
    np.testing.assert_allclose(mpo_jax.critic_targets(rewards, terminated, next_q, 0.5), [1 + 0.5 * 9, 2, 3 + 0.5])
    actions = jnp.array([[0.5, -1.0], [1.3, 0.0], [-4.0, 5.0]])
    np.testing.assert_allclose(mpo_jax.action_cost(actions), [0, 0.3, 5], rtol=1e-6)
    q = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert mpo_jax.critic_loss(q, np.array([0.0, 1.0])) == (1 + 1) / 2 + (9 + 16) / 2


def one(batch):
    return jax.tree.map(lambda x: x[0], batch)


@pytest.mark.parametrize("num_critics", [1, 2])
@pytest.mark.parametrize("action_penalty", [True, False])
def test_samples_are_of_the_target_networks(num_critics, action_penalty):
    """Clipped where a critic sees them, the minimum of the target critics, and unclipped where the policy is fitted"""
    config = configured(mpo_jax, num_critics=num_critics, action_penalty=action_penalty, num_action_samples=7)
    learner, batch = mpo_jax.new_learner(sizes(), config), one(random_batch(mpo_jax, config, range(1, 2)))
    learner = learner._replace(target_critics=jax.tree.map(lambda x: x + 0.01, learner.critics))
    learner = learner._replace(target_actor=jax.tree.map(lambda x: x + 0.01, learner.actor))
    samples = mpo_jax.sample_values(learner, batch, config)
    means, stds = learner.target_actor(batch.next_observations)
    assert samples.actions.shape == (7, 16, 2) and samples.values.shape == (1 + action_penalty, 7, 16)
    for j in range(7):
        actions = means + stds * batch.next_noise[j]
        np.testing.assert_allclose(samples.actions[j], actions, rtol=1e-5, atol=1e-6)
        q = learner.target_critics(batch.next_observations, actions.clip(-1, 1))
        assert q.shape == (num_critics, 16)
        np.testing.assert_allclose(samples.values[0, j], q.min(0), rtol=1e-4, atol=1e-5)
    assert float(abs(samples.actions).max()) > 1
    if action_penalty:
        assert float(samples.values[1].max()) == 0 > float(samples.values[1].min())


# --------------------------------------------------------------------------------------------------------- updates


def test_gradients_stop():
    """The targets, the weights and the prices are constants of the losses that they are in."""
    config = configured(mpo_jax, tau=0.0)
    learner, batch = mpo_jax.new_learner(sizes(), config), one(random_batch(mpo_jax, config, range(1, 2)))
    rng = np.random.default_rng(0)
    learner = learner._replace(actor=jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), learner.actor))
    timed = mpo_jax.new_stopwatch().timed

    def updated(learner: mpo_jax.Learner) -> tuple[mpo_jax.Learner, mpo_jax.Metrics]:
        return mpo_jax.update_minibatch(mpo_jax.copied(learner), batch, config, timed)

    def same(one, other) -> bool:
        return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))

    after, _ = updated(learner)
    assert same(after.target_actor, learner.target_actor) and same(after.target_critics, learner.target_critics)
    other_critics = learner._replace(critics=jax.tree.map(lambda x: 0.5 * x, learner.critics))
    assert same(updated(other_critics)[0].actor, after.actor)  # the policy is fitted to the target critics
    other_duals = learner._replace(
        temperatures=learner.temperatures + 1, multipliers=jax.tree.map(lambda x: x + 1, learner.multipliers)
    )
    assert same(updated(other_duals)[0].critics, after.critics)
    other_actor = learner._replace(actor=jax.tree.map(lambda x: 0.5 * x, learner.actor))
    assert same(updated(other_actor)[0].critics, after.critics)
    assert same(updated(other_actor)[0].temperatures, after.temperatures)

    samples = mpo_jax.sample_values(learner, batch, config)
    gradient, *_ = mpo_jax.actor_gradient(learner, batch, samples, config)
    weights = sum(map(mpo_jax.sample_weights, mpo_jax.positive(learner.temperatures), samples.values))
    prices, kls = jax.tree.map(mpo_jax.positive, learner.multipliers), mpo_jax.divergences

    def literal(actor: Network) -> jax.Array:
        policy = Gaussian(*actor(batch.next_observations))
        of_mean, of_cov = kls(policy, samples.target, config)
        penalty = (prices.mean * of_mean + prices.cov * of_cov).sum()
        return mpo_jax.actor_loss(weights, samples.actions, policy, samples.target) + penalty

    for x, y in zip(*map(jax.tree.leaves, (gradient, jax.grad(literal)(learner.actor))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flags", [{}, {"per_dim_kl": False, "action_penalty": False, "num_critics": 2}])
def test_ten_updates_are_the_same_fused_and_timed_and_again(solver, flags):
    config = configured(mpo_jax, temperature_solver=solver, policy_lr=1e-2, q_lr=1e-2, tau=0.1, **flags)
    batch = random_batch(mpo_jax, config, range(1, 11))
    with jax.enable_x64(True):
        learner, batch = learner_of(config), doubled(batch)
        results = []
        for way in ("fused", "timed", "fused"):
            call = getattr(mpo_jax.new_stopwatch(), way)
            results.append(call("update", mpo_jax.update, mpo_jax.copied(learner), batch, config, call))
        (fused, metrics), (timed, timed_metrics), (again, _) = results
        np.testing.assert_allclose(timed_metrics, metrics, rtol=1e-9, atol=1e-9)
        arrays, timed, again = map(mpo_jax.to_numpy, (fused, timed, again))
    for name, x in arrays.items():
        assert np.isfinite(x).all()
        np.testing.assert_allclose(timed[name], x, rtol=1e-9, atol=1e-9, err_msg=name)
        assert np.array_equal(again[name], x), name
    temperature_error = metrics[mpo_jax.Metrics._fields.index("temperature_error")]
    assert (temperature_error < {"newton": 1e-6, "slsqp": 1e-2, "adam": 1e3}[solver]).all()


class Torch(Twin):
    def __call__(self, network: str, x: torch.Tensor, which: int | None = None) -> torch.Tensor:
        def array(name: str) -> torch.Tensor:
            return self.params[f"{network}.{name}"] if which is None else self.params[f"{network}.{name}"][which]

        x = torch.nn.functional.linear(x, array("0.weight"), array("0.bias"))
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], array("norm.scale"), array("norm.bias"), 1e-6)
        x = torch.nn.functional.linear(torch.tanh(x), array("2.weight"), array("2.bias"))
        return torch.nn.functional.linear(torch.relu(x), array("4.weight"), array("4.bias"))

    def policy(self, network: str, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means, stds = self(network, observations).chunk(2, -1)
        return means, 1e-3 + 0.5 * torch.nn.functional.softplus(stds) / math.log(2)


@pytest.mark.parametrize("per_dim", [True, False])
def test_ten_updates_against_torch(per_dim):
    """Weights, targets, duals and losses in float64, with PyTorch's own densities, KLs and Adam"""
    lr = {"policy_lr": 1e-2, "q_lr": 2e-2, "dual_lr": 5e-2}
    config = configured(
        mpo_jax, **lr, tau=0.1, num_critics=2, per_dim_kl=per_dim, epsilon_mean=1e-4, temperature_solver="adam"
    )
    batch = random_batch(mpo_jax, config, range(1, 11))
    normal, kl_divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    with jax.enable_x64(True):
        learner, batch = learner_of(config), doubled(batch)
        twin = Torch(mpo_jax.to_numpy(learner), config.tau)
        temperatures, alpha_mean, alpha_cov = (
            twin.params[name] for name in ("temperatures", "multipliers.mean", "multipliers.cov")
        )
        softplus = torch.nn.functional.softplus
        adams = [
            torch.optim.Adam(weights, lr=rate)
            for weights, rate in (
                (twin.weights("critics"), 2e-2),
                ([temperatures], 5e-2),
                (twin.weights("actor"), 1e-2),
                ([alpha_mean, alpha_cov], 5e-2),
            )
        ]

        def descend(adam: torch.optim.Adam, loss: torch.Tensor) -> None:
            for other in adams:
                other.zero_grad()
            loss.backward()
            adam.step()

        expected = []
        for u in range(10):
            observations, actions, rewards, terminated, following, noise = (torch.tensor(x[u]) for x in batch)
            with torch.no_grad():
                target_means, target_stds = twin.policy("target_actor", following)
                chosen = target_means + target_stds * noise
                inputs = torch.cat([following.expand(20, -1, -1), chosen.clamp(-1, 1)], -1)
                q = torch.minimum(*(twin("target_critics", inputs, which)[..., 0] for which in range(2)))
                cost = (chosen - chosen.clamp(-1, 1)).norm(dim=-1)
                targets = rewards + config.gamma * (~terminated).double() * q.mean(0)
            inputs = torch.cat([observations, actions], -1)
            both = [twin("critics", inputs, which)[:, 0] for which in range(2)]
            critics_loss = sum(torch.nn.functional.mse_loss(values, targets) for values in both)
            descend(adams[0], critics_loss)
            eta = softplus(temperatures)
            duals = [
                eta[k] * (eps + ((values / eta[k]).logsumexp(0) - math.log(20)).mean())
                for k, (values, eps) in enumerate(((q, 0.1), (-cost, 1e-3)))
            ]
            descend(adams[1], sum(duals))
            eta = softplus(temperatures).detach()
            weights = torch.softmax(q / eta[0], 0) + torch.softmax(-cost / eta[1], 0)
            means, stds = twin.policy("actor", following)
            target = normal(target_means, target_stds)
            halves = normal(means, target_stds), normal(target_means, stds)
            kls = [kl_divergence(target, half) for half in halves]
            kls = [kl.mean(0) if per_dim else kl.sum(-1).mean() for kl in kls]
            prices = softplus(alpha_mean).detach(), softplus(alpha_cov).detach()
            fit = -sum((weights * half.log_prob(chosen).sum(-1)).sum(0).mean() for half in halves)
            policy_loss = fit + sum((price * kl).sum() for price, kl in zip(prices, kls, strict=True))
            descend(adams[2], policy_loss)
            limits = config.epsilon_mean, config.epsilon_cov
            slack = [limit - kl.detach() for limit, kl in zip(limits, kls, strict=True)]
            descend(adams[3], (softplus(alpha_mean) * slack[0]).sum() + (softplus(alpha_cov) * slack[1]).sum())
            twin.move_targets("actor", "critics")
            best = grid_minimum(q.numpy(), 0.1)
            losses = critics_loss, torch.stack(both).mean(), policy_loss, eta[0], abs(eta[0] / best - 1)
            about = *(kl.mean() for kl in kls), *(price.mean() for price in prices), stds.mean(), cost.mean()
            expected.append([float(x) for x in (*losses, *about)])
        learner, metrics = jax.jit(mpo_jax.update, static_argnames=("config", "timed"))(
            learner, batch, config, mpo_jax.new_stopwatch().fused
        )
        arrays = mpo_jax.to_numpy(learner)
    for name, values, wanted in zip(mpo_jax.Metrics._fields, metrics, np.transpose(expected), strict=True):
        rtol = 1e-3 if name == "temperature_error" else 1e-8
        np.testing.assert_allclose(values, wanted, rtol=rtol, atol=1e-10, err_msg=name)
    for name, x in twin.params.items():
        np.testing.assert_allclose(arrays[name], x.detach().numpy(), rtol=1e-8, atol=1e-9, err_msg=name)


class Quadratic(nn.Module):
    """Q = -‖a - a*(s)‖², a* = scale · (s₁, -s₂)"""

    scale: float

    @nn.compact
    def __call__(self, observations, actions):
        best = self.scale * observations[..., :2] * jnp.array([1.0, -1.0])
        return -((actions - best) ** 2).sum(-1) + self.param("zero", nn.initializers.zeros, ())


def improved(config, scale: float, steps: int) -> tuple[Learner, jax.Array, np.ndarray]:
    """E-step and M-step, again and again, on states in [-1, 1]² and Quadratic's values"""
    learner = mpo_jax.new_learner(sizes(2, 2), config)
    critics = mpo_jax.Critics.create(Quadratic(scale), jax.random.split(jax.random.key(0), 1), *np.zeros((2, 1, 2)))
    learner = learner._replace(critics=critics, target_critics=critics)
    states_key, noise_key = jax.random.split(jax.random.key(1))
    states = jax.random.uniform(states_key, (config.batch_size, 2), minval=-1)

    def step(learner: Learner, key: jax.Array) -> tuple[Learner, jax.Array]:
        noise = jax.random.normal(key, (config.num_action_samples, *states.shape))
        batch = mpo_jax.Batch(states, states, None, None, states, noise)
        samples = mpo_jax.sample_values(learner, batch, config)
        learner = mpo_jax.SOLVERS[config.temperature_solver](learner, samples.values, config)
        gradient, _, policy = mpo_jax.actor_gradient(learner, batch, samples, config)
        learner = mpo_jax.descend(learner, "actor", gradient, config.policy_lr)
        gradient, kls = mpo_jax.multipliers_gradient(learner, policy, samples, config)
        learner = mpo_jax.update_multipliers(learner, gradient, config)
        return mpo_jax.update_targets(learner, config), jnp.stack([kls.mean.mean(), kls.cov.mean()])

    learner, kls = jax.jit(partial(jax.lax.scan, step))(learner, jax.random.split(noise_key, steps))
    return learner, states, np.asarray(kls)


QUICK = {"hidden_sizes": (128, 128), "policy_lr": 1e-3, "tau": 0.02, "batch_size": 32, "epsilon_cov": 1e-3}


@pytest.mark.parametrize("flags", [{}, {"per_dim_kl": False}, {"temperature_solver": "adam"}])
def test_the_policy_moves_to_the_optimum_of_a_quadratic(flags):
    config = configured(mpo_jax, **QUICK | flags)
    learner, states, kls = improved(config, 0.7, 6000)
    means, stds = learner.actor(states)
    errors = abs(means - 0.7 * states * np.array([1, -1]))
    assert errors.mean() < 0.03 and errors.max() < 0.12
    assert float(stds.mean()) < 0.35  # it began at 0.5: the weights pull it to the best action
    limits = config.epsilon_mean, config.epsilon_cov
    dims = 2 if config.per_dim_kl else 1
    assert (kls[1000:].mean(0) < 1.5 * np.array(limits) * dims).all()


def test_the_penalty_pulls_actions_back():
    """The best action lies out of bounds, and beyond them all actions are the same to the critic."""
    excess = {}
    for action_penalty in (True, False):
        learner, states, _ = improved(configured(mpo_jax, **QUICK, action_penalty=action_penalty), 3.0, 6000)
        means, _ = learner.actor(states)
        best = np.clip(3 * states * np.array([1, -1]), -1, 1)
        assert abs(means.clip(-1, 1) - best).mean() < 0.05
        excess[action_penalty] = float(mpo_jax.action_cost(means).mean())
    assert excess[True] < 0.8 * excess[False]


# --------------------------------------------------------------------------------------------------------- actions


def test_exploration():
    """Uniform at first, then draws from the policy, clipped; greedily the mean."""
    config = configured(mpo_jax, learning_starts=10)
    learner, rng = mpo_jax.new_learner(sizes(), config), np.random.default_rng(0)
    observations = np.tile(np.float32([0.3, -1.0, 2.0]), (20_000, 1))
    uniform = mpo_jax.explore(learner.actor, observations, 2, 9, config, rng)
    np.testing.assert_allclose(uniform.std(0), 1 / np.sqrt(3), atol=0.01)
    means, stds = (np.asarray(x[0]) for x in learner.actor(observations[:1]))
    drawn = mpo_jax.explore(learner.actor, observations, 2, 10, config, rng)
    assert drawn.min() == -1 and drawn.max() == 1
    expected = (means + stds * rng.standard_normal((10**6, 2))).clip(-1, 1)
    np.testing.assert_allclose(drawn.mean(0), expected.mean(0), atol=0.02)
    np.testing.assert_allclose(drawn.std(0), expected.std(0), rtol=0.03)
    np.testing.assert_allclose(mpo_jax.act(learner.actor, observations[:1])[0], means.clip(-1, 1), rtol=1e-6)
    np.testing.assert_allclose(stds, mpo_jax.INITIAL_STD, rtol=0.5)


def test_observations_of_any_scale_leave_the_means_in_reach():
    learner = mpo_jax.new_learner(sizes(), configured(mpo_jax))
    for scale in (1.0, 1e3, 1e6):
        means, stds = learner.actor(scale * np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32))
        assert float(abs(means).max()) < 3 and float(stds.min()) > 0.05 and float(stds.max()) < 3


def test_the_time_limit_of_dm_control_is_not_terminal():
    pytest.importorskip("shimmy")
    config = configured(
        mpo_jax, "dm_control/cartpole-swingup-v0", {}, total_timesteps=1200, learning_starts=10**6, buffer_size=1200
    )
    rng = np.random.default_rng(0)
    with contextlib.closing(mpo_jax.Environments(config, 1)) as envs:
        envs.restart(0)
        buffer = mpo_jax.ReplayBuffer(config, 1, envs.observation_dim, envs.action_dim)
        learner, timed = mpo_jax.new_learner(envs, config), mpo_jax.new_stopwatch().timed
        for step in range(1010):
            mpo_jax.interact(learner.actor, envs, buffer, step, config, rng, timed)
        ((_, _, length),) = envs.pop_episodes()
    assert length == 1000 and np.flatnonzero(buffer.arrays["truncated"][:1010]).tolist() == [999]
    assert not buffer.arrays["terminated"][:1010].any()
    end, following = buffer.final_observations[999], buffer.arrays["observations"][1000]
    assert not np.allclose(end, following)  # the true end, not the first observation of the next episode
    sample = buffer.sample((20_000,), rng)
    assert not sample["terminated"].any() and (sample["next_observations"] == end).all(-1).any()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("num_action_samples=1", "num-action-samples 1"),
        ("epsilon=0.0", "epsilon 0.0"),
        ("epsilon_penalty=1e-6", "epsilon-penalty 1e-06: Input should be greater than or equal to 0.00001"),
        ("epsilon=3.0", "epsilon 3.0: must be less than 2.996, the log of --num-action-samples 20"),
        ("epsilon_penalty=3.0", "epsilon-penalty 3.0: must be less than 2.996"),
    ],
)
def test_bad_input(flag, message):
    name, value = flag.split("=")
    config = dataclasses.replace(configured(mpo_jax, total_timesteps=0), **{name: float(value)})
    with pytest.raises(mpo_jax.BadInput, match=message):
        mpo_jax.validate(config)
