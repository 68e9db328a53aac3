"""ppo_lstm_jax.py: its unrolled sequences against a network in NumPy that takes one step of one environment at a time
and knows the weights by their names alone; and what only a memory can do.

Weights are far from their initial values, where an action hardly depends on the carry and a ratio is 1 whatever the
carry is. Tolerances without a word are the rounding of float64 (1e-12) or of float32 (1e-5), of numbers of about 1.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree
from scipy.special import expit, log_softmax

import ppo_jax
import ppo_lstm_jax
from benchmarks.records import config_and_rows
from ppo_lstm_jax import (
    Batch,
    Config,
    Environments,
    GymnaxEnvironments,
    Learner,
    Minibatch,
    Rollout,
    act,
    collect_rollout,
    evaluate,
    new_learner,
    new_stopwatch,
    to_numpy,
    train,
    update,
)
from tests.backends import double_precision, doubled
from tests.gymnax_environments import ENDS
from tests.test_equivalence import assert_orthogonal
from tests.test_ppo_torch import PHASES, assert_times_add_up, call, slow_gae, watched_clock
from tests.test_reliability import (
    BAD_INPUT,
    NUMBERS,
    SILENT,
    assert_refused,
    assert_same_model,
    case,
    checkpoints,
    main,
)

SMALL = Config(
    **{"num_envs": 3, "num_steps": 12, "sequence_length": 4, "num_minibatches": 3, "update_epochs": 3},
    **{"hidden_sizes": (8,), "lstm_size": 5, "lstm_layers": 2, "vectorization": "sync", "wandb_mode": "disabled"},
)


def known(name: str, kwargs: dict | None = None, **flags) -> Config:
    """A config for an environment of tests/environments.py. Episodes of a Counter end after 3 to 6 steps."""
    flags = {"env_id": f"tests.environments:{name}-v0", "env_kwargs": json.dumps(kwargs or {})} | flags
    return dataclasses.replace(SMALL, **flags)


KINDS = {
    "truncated": known("Counter", norm_obs=True),
    "terminated": known("Counter", {"ends": "terminated"}, norm_obs=True),
    "both": known("Counter", {"ends": "both"}, norm_obs=True, lstm_layers=1),
    "multidiscrete": known("Echo", {"space": "multidiscrete"}),
    "gaussian": known("Echo", {"space": "bounded"}, hidden_sizes=()),
    "image": known("Picture", lstm_layers=1),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def changed(learner: Learner, seed: int) -> Learner:
    """With other weights; those of a CNN, which adds up hundreds of inputs, stay."""
    params, rng = learner.agent.params, np.random.default_rng(seed)
    for name in params.keys() - {"encoder"}:
        noise = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), params[name])
        params[name] = jax.tree.map(jnp.add, params[name], noise)
    return learner._replace(agent=learner.agent.replace(weights=ravel_pytree(params)[0]))


def prepared(config: Config, number: int = 1, timed: Callable = call) -> tuple[Learner, list[Rollout], Callable]:
    """A learner, rollouts of it that go on from one to the next, and how to call what is compiled."""
    with contextlib.closing(Environments(config, config.num_envs)) as envs:
        envs.restart(0)
        learner, rng, found = changed(new_learner(envs, config), 0), np.random.default_rng(0), []
        fused, carry = new_stopwatch(learner, config).fused, learner.agent.first_carry(config.num_envs)
        for _ in range(number):
            found.append(collect_rollout(learner.agent, carry, envs, config, rng, timed))
            carry = fused(None, ppo_lstm_jax.make_batch, learner.agent, found[-1], config).carries[-1]
    return learner, found, fused


class Slow:
    """One of the networks for one environment and one step, in float64."""

    def __init__(self, learner: Learner, network: str):
        arrays = {name: array.astype(float) for name, array in to_numpy(learner).items() if name.startswith(network)}
        self.arrays = {name.removeprefix(f"{network}."): array for name, array in arrays.items()}

    def __call__(self, x: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(F,), (layers, 2, H) -> output, carry after the step"""
        get, after = self.arrays.get, []
        for i, (h, c) in enumerate(carry):
            gates = get(f"lstm.weight_ih_l{i}") @ x + get(f"lstm.weight_hh_l{i}") @ h + get(f"lstm.bias_ih_l{i}")
            into, keep, new, out = np.split(gates, 4)
            c = expit(keep) * c + expit(into) * np.tanh(new)
            x = expit(out) * np.tanh(c)
            after.append((x, c))
        for i in range(len([name for name in self.arrays if name[0].isdigit() and name.endswith("weight")])):
            x = np.tanh(get(f"{2 * i}.weight") @ x + get(f"{2 * i}.bias"))
        return get("head.weight") @ x + get("head.bias"), np.array(after)


def unrolled(learner: Learner, rollout: Rollout) -> dict[str, np.ndarray]:
    """What the networks say of a rollout of vectors, by the book; carries after each step are not yet reset."""
    networks = [Slow(learner, "actor"), Slow(learner, "critic")]
    T, N = rollout.rewards.shape
    carry_shape = rollout.carry.shape[1:]
    found = {"policy": [[None] * N for _ in range(T)], "carries": np.zeros((T + 1, N, *carry_shape))}
    found |= {"values": np.zeros((T, N)), "next_values": np.zeros((T, N))}
    last = iter(rollout.final_observations)
    final = {(t, n): next(last) for t, n in np.argwhere(rollout.truncated)}
    for n in range(N):
        carry = np.asarray(rollout.carry[n], float)
        for t in range(T):
            found["carries"][t, n] = carry
            (policy, actor), (value, critic) = (
                f(rollout.observations[t, n], c) for f, c in zip(networks, carry, strict=True)
            )
            carry, found["policy"][t][n], found["values"][t, n] = np.array([actor, critic]), policy, value[0]
            following = final.get((t, n), rollout.observations[t + 1, n])
            found["next_values"][t, n] = networks[1](following, critic)[0][0]  # not used after a termination
            if rollout.terminated[t, n] or rollout.truncated[t, n]:
                carry = np.zeros(carry_shape)
        found["carries"][T, n] = carry
    return found | {"policy": np.array(found["policy"])}


def log_probs_of(policy: np.ndarray, rollout: Rollout, agent) -> np.ndarray:
    if not agent.nvec:
        log_std = np.asarray(agent.log_std, float)
        z = (rollout.actions - policy) / np.exp(log_std)
        return (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    parts = np.split(policy, np.cumsum(agent.nvec)[:-1], -1)
    chosen = np.split(rollout.actions, len(agent.nvec), -1)
    return sum(np.take_along_axis(log_softmax(p, -1), a, -1)[..., 0] for p, a in zip(parts, chosen, strict=True))


def slow_batch(learner: Learner, rollout: Rollout, config: Config) -> dict[str, np.ndarray]:
    found = unrolled(learner, rollout)
    done = rollout.terminated | rollout.truncated
    found["advantages"] = slow_gae(
        *(rollout.rewards, found["values"], found["next_values"], rollout.terminated, done),
        *(config.gamma, config.gae_lambda),
    )
    found["returns"] = found["advantages"] + found["values"]
    found["log_probs"] = log_probs_of(found["policy"], rollout, learner.agent)
    return found


# -------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_is_torchs(layers):
    """Weights load into torch.nn.LSTM by their names, and give the same outputs and the same last carry."""
    learner, _, _ = prepared(known("Counter", lstm_layers=layers), 0)
    arrays = {name: torch.tensor(array) for name, array in to_numpy(learner).items()}
    prefix = "actor.lstm."
    state = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    state |= {name.replace("ih", "hh"): torch.zeros_like(x) for name, x in state.items() if name.startswith("bias")}
    lstm, rng = torch.nn.LSTM(3, 5, layers), np.random.default_rng(0)
    lstm.load_state_dict(state)
    x, carry = rng.standard_normal((7, 4, 3)).astype(np.float32), rng.standard_normal((4, 2, layers, 2, 5))
    carry = carry.astype(np.float32)
    policy, _, carries = jax.jit(type(learner.agent).__call__)(learner.agent, x, carry, np.zeros((7, 4)))
    h, c = (torch.from_numpy(carry[:, 0, :, k].swapaxes(0, 1).copy()) for k in (0, 1))
    outputs, (h, c) = lstm(torch.from_numpy(x), (h, c))
    features = torch.tanh(outputs @ arrays["actor.0.weight"].T + arrays["actor.0.bias"])
    expected = features @ arrays["actor.head.weight"].T + arrays["actor.head.bias"]
    np.testing.assert_allclose(policy, expected.detach(), rtol=0, atol=1e-5)
    last = torch.stack([h, c], 2).detach().swapaxes(0, 1)  # (B, layers, 2, H)
    np.testing.assert_allclose(carries[-1, :, 0], last, rtol=0, atol=1e-5)


def test_initial_weights():
    """Orthogonal, with the gains of the heads; the forget gate's bias is 1, all others are 0."""
    with contextlib.closing(Environments(SMALL, 1)) as envs:
        arrays = to_numpy(new_learner(envs, SMALL))
    for network, gain in (("actor", 0.01), ("critic", 1.0)):
        head = arrays[f"{network}.head.weight"]
        np.testing.assert_allclose(head @ head.T, gain**2 * np.eye(len(head)), rtol=0, atol=1e-6 * gain**2)
        for i in range(2):
            np.testing.assert_array_equal(arrays[f"{network}.lstm.bias_ih_l{i}"], np.repeat([0, 1, 0, 0], 5))
            for which in ("ih", "hh"):
                assert_orthogonal(arrays[f"{network}.lstm.weight_{which}_l{i}"], 1)
    assert not np.array_equal(arrays["actor.lstm.weight_hh_l0"], arrays["critic.lstm.weight_hh_l0"])


def test_unrolled_is_step_by_step():
    """Episodes begin anywhere, in the first step of the sequence too."""
    learner, _, _ = prepared(known("Counter"), 0)
    rng = np.random.default_rng(0)
    x, carry = rng.standard_normal((9, 4, 3)), rng.standard_normal((4, 2, 2, 2, 5))
    starts = rng.random((9, 4)) < 0.3
    starts[0] = [False, True, False, True]
    networks = [Slow(learner, "actor"), Slow(learner, "critic")]
    with double_precision(ppo_lstm_jax):
        agent = doubled(ppo_lstm_jax, learner).agent
        policy, values, carries = jax.jit(type(agent).__call__)(agent, x, carry, starts.astype(float))
        one = [agent.policy(x[0], carry[:, 0], starts[0])]
        for t in range(1, 9):
            one.append(agent.policy(x[t], one[-1][1], starts[t]))
    for n in range(4):
        state = carry[n]
        for t in range(9):
            state = np.zeros_like(state) if starts[t, n] else state
            (expected, actor), (value, critic) = (f(x[t, n], s) for f, s in zip(networks, state, strict=True))
            state = np.array([actor, critic])
            np.testing.assert_allclose(policy[t, n], expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(values[t, n], value[0], rtol=0, atol=1e-12)
            np.testing.assert_allclose(carries[t, n], state, rtol=0, atol=1e-12)
            np.testing.assert_allclose(one[t][0][n], expected, rtol=0, atol=1e-12)  # as it acts
            np.testing.assert_allclose(one[t][1][n], actor, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- batch


@each_kind
def test_the_ratio_is_one_at_the_first_minibatch(kind):
    """In the second rollout, whose first carry is the first's last, across ends of episodes, behind any burn-in; with
    the very log-probabilities of the policies that acted."""
    config, policies, tolerance = KINDS[kind], [], 1e-4 if kind == "image" else 1e-5  # the CNN adds up 512 features

    def timed(phase, function, *arguments):
        if function is act:
            policies.append(arguments[0].policy(*arguments[1:4])[0])
        return function(*arguments)

    learner, (_, rollout), fused = prepared(config, 2, timed)
    assert (rollout.terminated | rollout.truncated).any()
    batch = fused(None, ppo_lstm_jax.make_batch, learner.agent, rollout, config)
    acted = log_probs_of(np.array(policies[config.num_steps :]), rollout, learner.agent)
    np.testing.assert_allclose(batch.log_probs, acted, rtol=0, atol=tolerance)
    permutation = np.random.default_rng(0).permutation(config.num_sequences)
    for burn_in in (3,) if kind == "image" else (0, 3, 8):
        config = dataclasses.replace(config, burn_in=burn_in)
        for minibatch in fused(None, ppo_lstm_jax.minibatches, batch, permutation, config):
            _, _, log_ratio = fused(None, ppo_lstm_jax.loss_and_gradient, learner.agent, minibatch, config)
            assert log_ratio.shape == (4, 3)
            np.testing.assert_allclose(log_ratio, 0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "image"])
def test_a_batch_is_what_a_slow_loop_makes(kind):
    """Carries, log-probabilities and values; advantages that bootstrap at a truncation from the true last observation
    and the carry after the step before it; the carry that begins the next rollout."""
    config = KINDS[kind]
    learner, collected, fused = prepared(config, 3)
    with double_precision(ppo_lstm_jax):
        learner = doubled(ppo_lstm_jax, learner)
        for rollout in collected:
            expected = slow_batch(learner, rollout, config)
            batch = fused(None, ppo_lstm_jax.make_batch, learner.agent, rollout, config)
            for name in ("carries", "log_probs", "values", "advantages", "returns"):
                np.testing.assert_allclose(getattr(batch, name), expected[name], rtol=0, atol=1e-10, err_msg=name)
            done = rollout.terminated | rollout.truncated
            np.testing.assert_array_equal(batch.starts, [np.zeros(3), *done[:-1]])
    for before, after in itertools.pairwise(collected):
        np.testing.assert_allclose(after.carry, slow_batch(learner, before, config)["carries"][-1], rtol=0, atol=1e-5)
    ends = [rollout.truncated.sum() for rollout in collected]
    assert (min(ends) > 2) if kind != "terminated" and kind != "both" else not any(ends)


def numbered(config: Config) -> Batch:
    """Every number tells its step and environment."""
    T, N = config.num_steps, config.num_envs
    t, n = np.mgrid[: T + 1, :N].astype(np.float32)
    x = 100 * t + n
    carries = np.broadcast_to(x[..., None, None, None, None], (T + 1, N, 2, 1, 2, 3))
    starts = np.isin(x[:-1], [100, 502, 801]).astype(np.float32)
    fields = x[:-1, :, None], starts, carries, x[:-1, :, None], *[x[:-1] + k / 8 for k in range(4)]
    return Batch(*map(jnp.asarray, fields))


@pytest.mark.parametrize("burn_in", [0, 2, 4, 7, 8])
@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("drawn_on", ["host", "device"])
def test_minibatches_are_whole_sequences_behind_their_burn_in(burn_in, norm_adv, drawn_on):
    config = dataclasses.replace(SMALL, burn_in=burn_in, norm_adv=norm_adv)
    batch, permutation = numbered(config), np.random.default_rng(0).permutation(9)
    if drawn_on == "device":
        _, envs = opened(on_gymnax("CartPole-v1"))
        permutation = ppo_lstm_jax.random_permutation(envs.simulator, 0, 9)
    parts = jax.jit(ppo_lstm_jax.minibatches, static_argnames="config")(batch, permutation, config)
    found = []
    for part in parts:
        assert isinstance(part, Minibatch) and part.observations.shape == (burn_in + 4, 3, 1)
        advantages = np.asarray(part.log_probs, float) + 2 / 8
        if norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
        np.testing.assert_allclose(part.advantages, advantages, rtol=1e-5, atol=1e-5)
        for k in range(3):
            steps, n = np.divmod(np.asarray(part.log_probs[:, k]).astype(int), 100)
            first, n = steps[0], n[0]
            assert steps.tolist() == list(range(first, first + 4)) and first % 4 == 0
            found.append(first // 4 * 3 + n)
            real = min(burn_in, first)
            assert part.burn_in[k] == real
            assert (np.asarray(part.carry[k]) == 100 * (first - real) + n).all()
            seen = [*range(first - real, first), *range(first, first + 4)]
            here = [*range(real), *range(burn_in, burn_in + 4)]
            assert part.observations[here, k, 0].tolist() == [100 * t + n for t in seen]
            assert part.starts[here, k].tolist() == [batch.starts[t, n] for t in seen]
            for name in ("values", "returns", "actions"):
                expected = getattr(batch, name)[first : first + 4, n]
                np.testing.assert_array_equal(getattr(part, name)[:, k], expected, err_msg=name)
    assert found == permutation.tolist()


@pytest.mark.parametrize("burn_in", [0, 2, 4, 7])
def test_burn_in_brings_a_stored_carry_up_to_date(burn_in):
    """The carry is that of the weights that acted; the steps of burn-in and of the sequence are those of today's."""
    config = dataclasses.replace(KINDS["truncated"], burn_in=burn_in)
    learner, (rollout,), fused = prepared(config)
    newer = changed(learner, 1)
    stored = unrolled(learner, rollout)["carries"]
    networks = [Slow(newer, "actor"), Slow(newer, "critic")]
    starts = np.array([np.zeros(3), *(rollout.terminated | rollout.truncated)])
    with double_precision(ppo_lstm_jax):
        learner, newer = doubled(ppo_lstm_jax, learner), doubled(ppo_lstm_jax, newer)
        batch = fused(None, ppo_lstm_jax.make_batch, learner.agent, rollout, config)
        for m, part in enumerate(fused(None, ppo_lstm_jax.minibatches, batch, np.arange(9), config)):
            policy, values = fused(None, ppo_lstm_jax.forward, newer.agent, part, config)
            for n in range(3):  # minibatch m holds the m-th sequence of every environment
                begin = max(4 * m - burn_in, 0)
                carry = stored[begin, n]
                for t in range(begin, 4 * m + 4):
                    carry = np.zeros_like(carry) if starts[t, n] else carry
                    (expected, actor), (value, critic) = (
                        f(rollout.observations[t, n], c) for f, c in zip(networks, carry, strict=True)
                    )
                    carry = np.array([actor, critic])
                    if t >= 4 * m:
                        np.testing.assert_allclose(policy[t - 4 * m, n], expected, rtol=0, atol=1e-10)
                        np.testing.assert_allclose(values[t - 4 * m, n], value[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "clip_vloss"), [("multidiscrete", True), ("gaussian", False)])
def test_loss_against_a_formula(kind, clip_vloss):
    """PPO eq. 9 of what the network puts out, with weights that have moved; its gradient by finite differences."""
    config = dataclasses.replace(KINDS[kind], clip_vloss=clip_vloss, clip_coef=0.1, vf_coef=0.7, ent_coef=0.2)
    learner, (rollout,), fused = prepared(config)
    newer = changed(learner, 1)

    def loss_of(agent: ppo_lstm_jax.Agent, part: Minibatch) -> tuple[float, float, float]:
        policy, values = map(np.asarray, jax.jit(ppo_lstm_jax.forward, static_argnums=2)(agent, part, config))
        log_probs = log_probs_of(policy, part, agent)
        if agent.nvec:
            logits = [log_softmax(x, -1) for x in np.split(policy, np.cumsum(agent.nvec)[:-1], -1)]
            entropy = -sum((np.exp(x) * x).sum(-1) for x in logits).mean()
        else:
            entropy = (np.asarray(agent.log_std) + 0.5 * np.log(2 * np.pi * np.e)).sum()
        ratio, advantages, old, returns = np.exp(log_probs - part.log_probs), part.advantages, part.values, part.returns
        policy_loss = -np.minimum(ratio * advantages, ratio.clip(0.9, 1.1) * advantages).mean()
        errors = [values - returns, old + (values - old).clip(-0.1, 0.1) - returns][: 1 + clip_vloss]
        return float(policy_loss), 0.5 * float(np.max(np.square(errors), 0).mean()), float(entropy)

    with double_precision(ppo_lstm_jax):
        learner, newer = doubled(ppo_lstm_jax, learner), doubled(ppo_lstm_jax, newer)
        batch = fused(None, ppo_lstm_jax.make_batch, learner.agent, rollout, config)
        part = fused(None, ppo_lstm_jax.minibatches, batch, np.arange(9), config)[0]
        gradient, losses, _ = fused(None, ppo_lstm_jax.loss_and_gradient, newer.agent, part, config)
        direction = np.random.default_rng(2).standard_normal(gradient.shape)
        around = [newer.agent.replace(weights=newer.agent.weights + x * direction) for x in (0, 1e-6, -1e-6)]
        here, above, below = (np.array(loss_of(agent, part)) for agent in around)
    found = [losses[name] for name in ("policy_loss", "value_loss", "entropy")]
    np.testing.assert_allclose(found, here, rtol=1e-9)
    slope = (above - below) @ [1, 0.7, -0.2] / 2e-6
    assert np.asarray(gradient) @ direction == pytest.approx(slope, rel=1e-5)


def test_burn_in_has_no_gradient():
    """The gradient is that of sequences which begin with the carry that the burn-in led to, as a constant."""
    config = dataclasses.replace(KINDS["multidiscrete"], burn_in=3)
    plain = dataclasses.replace(config, burn_in=0)
    learner, (rollout,), fused = prepared(config)
    newer = changed(learner, 1)
    with double_precision(ppo_lstm_jax):
        learner, newer = doubled(ppo_lstm_jax, learner), doubled(ppo_lstm_jax, newer)
        batch = fused(None, ppo_lstm_jax.make_batch, learner.agent, rollout, config)
        part = fused(None, ppo_lstm_jax.minibatches, batch, np.arange(9)[::-1].copy(), config)[0]
        unroll = jax.jit(type(newer.agent).__call__)
        _, _, carries = unroll(newer.agent, part.observations[:3], part.carry, part.starts[:3])
        warm = part._replace(observations=part.observations[3:], starts=part.starts[3:], carry=carries[-1])
        cold = warm._replace(carry=part.carry)
        gradient, losses, log_ratio = fused(None, ppo_lstm_jax.loss_and_gradient, newer.agent, part, config)
        expected = [fused(None, ppo_lstm_jax.loss_and_gradient, newer.agent, other, plain) for other in (warm, cold)]
    np.testing.assert_allclose(gradient, expected[0][0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_ratio, expected[0][2], rtol=0, atol=1e-12)
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected[0][1][name]), abs=1e-12)
    assert np.abs(gradient - expected[1][0]).max() > 1e-4


@pytest.mark.parametrize("advantages", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_computed_anew_before_an_epoch(hidden, advantages):
    """An epoch's minibatches hold what a slow loop makes with the weights at its beginning, or at the first's."""
    config = dataclasses.replace(KINDS["truncated"], recompute_hidden=hidden, recompute_advantages=advantages)
    config = dataclasses.replace(config, norm_adv=False, learning_rate=0.03)
    learner, (rollout,), _ = prepared(config)
    agents, parts = [], []

    def timed(phase, function, *arguments):
        if function is ppo_lstm_jax.loss_and_gradient:
            agents.append(arguments[0])
            parts.append(arguments[1])
        return stopwatch.fused(phase, function, *arguments) if phase else function(*arguments)

    with double_precision(ppo_lstm_jax):
        learner = doubled(ppo_lstm_jax, learner)
        learner = ppo_lstm_jax.with_learning_rate(learner, config.learning_rate)
        stopwatch = new_stopwatch(learner, config)
        _, before, _ = update(learner, rollout, config, np.random.default_rng(0), timed)
        rng, slow = np.random.default_rng(0), []
        for epoch in range(3):
            slow.append(slow_batch(learner._replace(agent=agents[3 * epoch]), rollout, config))
            newest = {"hidden": slow[epoch * hidden], "advantages": slow[epoch * advantages]}
            order = rng.permutation(9).reshape(3, 3)
            for m, sequences in enumerate(order):
                part = parts[3 * epoch + m]
                for k, sequence in enumerate(sequences):
                    first, n = 4 * (sequence // 3), sequence % 3
                    carry = newest["hidden"]["carries"][first, n]
                    np.testing.assert_allclose(part.carry[k], carry, rtol=0, atol=1e-10)
                    for name in ("values", "advantages", "returns"):
                        expected = newest["advantages"][name][first : first + 4, n]
                        np.testing.assert_allclose(getattr(part, name)[:, k], expected, rtol=0, atol=1e-10)
                    log_probs = slow[0]["log_probs"][first : first + 4, n]  # of the policy that acted
                    np.testing.assert_allclose(part.log_probs[:, k], log_probs, rtol=0, atol=1e-10)
        np.testing.assert_allclose(before.carries, slow[0]["carries"], rtol=0, atol=1e-10)  # the next rollout's too
        np.testing.assert_allclose(before.advantages, slow[0]["advantages"], rtol=0, atol=1e-10)
    assert np.abs(slow[1]["carries"] - slow[0]["carries"]).max() > 1e-3
    assert np.abs(slow[1]["advantages"] - slow[0]["advantages"]).max() > 1e-3


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_carries_and_resets_the_state():
    """Every action is that of the slow network, in episodes that begin after others ended too."""
    config = dataclasses.replace(KINDS["truncated"], eval_episodes=3)
    learner, _, _ = prepared(config, 0)
    seen = []

    def watched(observations, carry, starts):
        actions, after = act(learner.agent, observations, carry, starts)
        policy, _ = learner.agent.policy(
            observations, learner.agent.first_carry(3)[:, 0] if carry is None else carry, starts
        )
        seen.append((observations.copy(), np.asarray(policy)))
        return actions, after

    mean, var = np.array([500.0, 1.0, 2.0]), np.array([1e5, 4.0, 9.0])
    with contextlib.closing(Environments(config, 3)) as envs:
        envs.from_numpy({"observation_mean": mean, "observation_var": var, "observation_count": np.array(100.0)})
        for _ in range(2):  # the second evaluation remembers nothing of the first
            assert len(evaluate(watched, envs)) == 3
    network, begun, carry = Slow(learner, "actor"), 0, None
    for n in range(3):
        for observations, policy in seen:
            is_start = round(observations[n, 2] * 3 + 2) == 0  # the last number is the step of the episode
            begun += is_start
            carry = np.zeros((2, 2, 5)) if is_start else carry
            expected, carry = network(observations[n], carry)
            np.testing.assert_allclose(policy[n], expected, rtol=0, atol=1e-5)
    assert begun > 2 * 3


def test_a_loaded_model_evaluates_as_where_it_was_trained(tmp_path):
    flags = {"total_timesteps": 3 * 36, "eval_episodes": 3, "norm_obs": True}
    config = dataclasses.replace(SMALL, env_id="Pendulum-v1", **flags)
    first = train(dataclasses.replace(config, run_dir=str(tmp_path / "first")))
    model = str(tmp_path / "first/model.safetensors")
    flags = {"load_model": model, "total_timesteps": 0, "run_dir": str(tmp_path / "second")}
    assert train(dataclasses.replace(config, **flags)).evaluation_returns == first.evaluation_returns
    for what, value in {"lstm_size": 6, "lstm_layers": 1}.items():
        flags |= {what: value, "run_dir": str(tmp_path / what)}
        expected = r"actor\.(0|lstm)\S* .* there and .* here.*flags of networks"
        with pytest.raises(ppo_lstm_jax.BadInput, match=expected):
            train(dataclasses.replace(config, **flags))


# ----------------------------------------------------------------------------------------------------- whole updates


def test_the_carry_goes_on_until_new_episodes_begin(tmp_path, monkeypatch):
    """Across rollouts, and not across a checkpoint, which makes the environments anew."""
    begun, collect = [], ppo_lstm_jax.collect_rollout

    def watched(agent, carry, *arguments):
        begun.append((agent, collect(agent, carry, *arguments)))
        return begun[-1][1]

    monkeypatch.setattr(ppo_lstm_jax, "collect_rollout", watched)
    flags = {"total_timesteps": 5 * 36, "checkpoint_interval": 3 * 36, "eval_interval": 36, "eval_episodes": 2}
    flags |= {"learning_rate": 0.03, "run_dir": str(tmp_path / "run")}
    config = dataclasses.replace(known("Echo", {"space": "discrete"}), **flags)  # 7 steps an episode, 12 a rollout
    learner = train(config).learner
    for i, (_, rollout) in enumerate(begun):
        if i in (0, 3):
            assert not np.any(rollout.carry)
            continue
        agent, before = begun[i - 1]
        expected = slow_batch(learner._replace(agent=agent), before, config)["carries"][-1]
        np.testing.assert_allclose(rollout.carry, expected, rtol=0, atol=1e-5)
        assert np.abs(rollout.carry).max() > 0.01
    assert len(begun) == 5


def test_target_kl_stops_after_an_epoch():
    config = dataclasses.replace(KINDS["truncated"], learning_rate=0.03, update_epochs=5)
    learner, (rollout,), fused = prepared(config)
    learner = ppo_lstm_jax.with_learning_rate(learner, config.learning_rate)
    for target_kl, epochs in ((None, 5), (1e9, 5), (1e-9, 1)):
        shapes = []

        def timed(phase, function, *arguments, shapes=shapes):
            if phase == "kl":
                shapes.append(arguments[0].shape)
            return fused(phase, function, *arguments) if phase else function(*arguments)

        update(learner, rollout, dataclasses.replace(config, target_kl=target_kl), np.random.default_rng(0), timed)
        assert shapes == [(3, 4, 3)] * epochs  # of all minibatches


SIGNAL = {
    **{"env_id": "tests.environments:Signal-v0", "vectorization": "sync", "wandb_mode": "disabled"},
    **{"num_envs": 8, "num_steps": 32, "learning_rate": 3e-3, "gamma": 0.95, "ent_coef": 0.01},
    **{"eval_episodes": 100, "checkpoint_interval": 0, "total_timesteps": 25_600},
}


def test_memory_matters(tmp_path):
    """The signal is shown once and asked for 4 steps later: with the LSTM every episode is won, a policy that sees
    the last observation alone wins every other one."""
    with_memory = Config(**SIGNAL, sequence_length=16, lstm_size=16, run_dir=str(tmp_path / "with"))
    without = ppo_jax.Config(**SIGNAL, run_dir=str(tmp_path / "without"))
    assert np.mean(train(with_memory).evaluation_returns) == 1
    assert abs(np.mean(ppo_jax.train(without).evaluation_returns)) < 0.5  # 5 standard deviations of a hundred coins


# --------------------------------------------------------------------------------------------------------- velocities


def observed(env_id: str, state: Callable, **flags) -> tuple[np.ndarray, np.ndarray]:
    """Observations of 8 steps, and the same made of the environment's own state."""
    config = Config(env_id=env_id, num_envs=1, vectorization="sync", mask_velocity=True, **flags)
    found, rng = [], np.random.default_rng(0)
    with contextlib.closing(Environments(config, 1)) as envs:
        envs.restart(0)
        for _ in range(8):
            found.append((envs.observations[0].copy(), state(envs.vector.envs[0].unwrapped)))
            actions = rng.integers(0, envs.nvec[0], (1, 1)) if envs.nvec else rng.uniform(-1, 1, (1, envs.action_dim))
            envs.step(actions)
    return tuple(np.array(column, float) for column in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("env_id", "state"),
    [
        ("CartPole-v1", lambda env: [env.state[0], 0, env.state[2], 0]),
        ("Pendulum-v1", lambda env: [np.cos(env.state[0]), np.sin(env.state[0]), 0]),
        ("MountainCar-v0", lambda env: [env.state[0], 0]),
        ("MountainCarContinuous-v0", lambda env: [env.state[0], 0]),
        ("Acrobot-v1", lambda env: [f(env.state[i]) for i in (0, 1) for f in (np.cos, np.sin)] + [0, 0]),
        (
            "LunarLander-v3",
            lambda env: [
                env.lander.position.x / 10 - 1,
                (env.lander.position.y - env.helipad_y - 18 / 30) / (400 / 30 / 2),
                *(0, 0, env.lander.angle, 0, 0, 0),
            ],
        ),
    ],
)
def test_masked_velocities(env_id, state):
    found, expected = observed(env_id, state)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    hidden = (expected == 0).all(0)
    with contextlib.closing(gym.make(env_id)) as env:
        env.reset(seed=0)
        env.action_space.seed(0)
        seen = np.array([env.step(env.action_space.sample())[0] for _ in range(8)])
    assert (np.abs(seen[:, hidden]).max(0) > 0)[: 3 if "Lunar" in env_id else None].all()  # but for legs in the air


def test_velocities_that_are_not_known():
    for env_id in ("Blackjack-v1", "HalfCheetah-v5", "ALE/Pong-v5", "Nonsense"):
        outcome = main(*QUIET, "--mask-velocity", "--env-id", env_id, module=ppo_lstm_jax)
        assert_refused(outcome, "--mask-velocity", env_id, "CartPole", "LunarLander", module=ppo_lstm_jax)


# -------------------------------------------------------------------------------------------------------------- gymnax


def on_gymnax(name: str, kwargs: dict | None = None, **flags) -> Config:
    """A config for a game of gymnax's, or the Counter of tests/gymnax_environments.py"""
    flags = {"env_id": f"gymnax/{name}", "env_kwargs": json.dumps(kwargs or {}), "eval_episodes": 0} | flags
    return dataclasses.replace(SMALL, **flags)


def opened(config: Config) -> tuple[Learner, GymnaxEnvironments]:
    envs = GymnaxEnvironments(config, config.num_envs)
    learner = changed(new_learner(envs, config), 0)
    envs.restart(0)
    return learner, envs


def stepped(envs: GymnaxEnvironments, simulator: ppo_lstm_jax.Simulator, actions: np.ndarray) -> dict[str, np.ndarray]:
    """What gymnax's own functions make of these actions (T, N, 1), one environment and one step at a time"""
    T, N = actions.shape[:2]
    found = {name: [] for name in ("observations", "final_observations", "rewards", "terminated", "truncated")}
    states = [jax.tree.map(lambda x, n=n: x[n], simulator.states) for n in range(N)]
    observations = [*simulator.observations]
    for t, n in itertools.product(range(T), range(N)):
        step_key, reset_key = (
            jax.random.split(jax.random.fold_in(simulator.keys[purpose], simulator.steps + t), N)[n]
            for purpose in (ppo_lstm_jax.STEP, ppo_lstm_jax.RESET)
        )
        found["observations"].append(observations[n])
        action = actions[t, n].clip(-1, 1)
        observations[n], states[n], reward, terminated, _ = envs.game.step_env(step_key, states[n], action, envs.params)
        truncated = envs.game.is_truncated(states[n], envs.params)
        found["final_observations"].append(observations[n])
        found["rewards"].append(reward)
        found["terminated"].append(terminated)
        found["truncated"].append(truncated and not terminated)
        if terminated or truncated:
            observations[n], states[n] = envs.game.reset_env(reset_key, envs.params)
    return {name: np.array(x).reshape(T, N, *np.shape(x[0])) for name, x in found.items()}


@pytest.mark.parametrize("ends", ENDS)
def test_on_the_device_is_what_slow_loops_make(ends):
    """Two rollouts: gymnax's own steps, actions of the slow network that remembers an episode from the one rollout to
    the other, and the batch made of them. Returns are about 100, of which 1e-4 is float32's rounding."""
    terminates, cut = ENDS[ends]
    config = on_gymnax("Counter", {"length": terminates, "max_steps_in_episode": cut, "box": True})
    learner, envs = opened(config)
    compiled, carry = ppo_lstm_jax.compiled_on_device(envs), learner.agent.first_carry(3)
    for number in range(2):
        before, agent = envs.simulator, learner.agent
        collect = compiled[ppo_lstm_jax.collect_on_device]
        envs.simulator, transitions = collect(agent, before, carry, envs, config, ppo_lstm_jax.plainly)
        on_device = ppo_lstm_jax.as_rollout(transitions, envs.simulator, carry)
        batch = compiled[ppo_lstm_jax.make_batch](agent, on_device, config)
        rollout = Rollout(*map(np.asarray, on_device))
        for name, expected in stepped(envs, before, rollout.actions).items():
            steps = getattr(rollout, name)[: config.num_steps]
            np.testing.assert_allclose(steps, expected, rtol=0, atol=1e-6, err_msg=name)
        ended = rollout.final_observations[rollout.truncated]
        assert bool(len(ended)) == (ends == "truncates") and np.any(carry) == (number == 1)
        expected = slow_batch(learner, rollout._replace(final_observations=ended), config)
        noise = ppo_lstm_jax.draw_noise(agent, before, config)
        np.testing.assert_allclose(rollout.actions, expected["policy"] + noise, rtol=0, atol=1e-5)
        for name in ("carries", "log_probs", "values", "advantages", "returns"):
            np.testing.assert_allclose(getattr(batch, name), expected[name], rtol=1e-5, atol=1e-4, err_msg=name)
        carry = batch.carries[-1]


def test_fused_is_timed():
    """Two iterations in compiled calls and phase by phase: the same weights and losses. An update that --target-kl
    stops is that of one epoch."""
    outcomes, everything = {}, {"burn_in": 3, "recompute_hidden": True, "recompute_advantages": True}
    for kind, flags in {"all": {}, "stopped": {"target_kl": 1e-9}, "one epoch": {"update_epochs": 1}}.items():
        config = on_gymnax("CartPole-v1", learning_rate=0.01, lstm_layers=1, **everything, **flags)
        for is_timed in (False, True)[: 1 if kind == "one epoch" else 2]:
            learner, envs = opened(config)
            stopwatch = new_stopwatch(learner, config)
            stopwatch.compiled |= ppo_lstm_jax.compiled_on_device(envs)
            learner = ppo_lstm_jax.with_learning_rate(learner, config.learning_rate)
            carry = learner.agent.first_carry(config.num_envs)
            for _ in range(2):
                arguments = learner, envs, carry, config, stopwatch, is_timed
                learner, _, batch, metrics = ppo_lstm_jax.collect_and_update(*arguments)
                carry = batch.carries[-1]
            outcomes[kind, is_timed] = np.asarray(learner.agent.weights), metrics
    for kind in ("all", "stopped"):
        (fused, metrics), (timed, expected) = outcomes[kind, False], outcomes[kind, True]
        np.testing.assert_allclose(fused, timed, rtol=0, atol=1e-5)  # added up in another order
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(outcomes["stopped", False][0], outcomes["one epoch", False][0], rtol=0, atol=1e-6)
    assert np.abs(outcomes["all", False][0] - outcomes["stopped", False][0]).max() > 1e-3


def test_a_checkpoint_before_the_first_rollout():
    """As a signal during the compilation leaves it: the episodes, and no memory"""
    _, envs = opened(on_gymnax("CartPole-v1"))
    before, arrays = envs.observations, envs.to_numpy()
    envs.simulator = None
    envs.from_numpy(arrays)
    assert np.array_equal(envs.observations, before) and envs.carry is None


def test_resumed_on_gymnax(tmp_path):
    """To the bit, from the last checkpoint but one of a finished run: no episode begins anew, and no memory is lost."""
    flags = {"total_timesteps": 6 * 36, "checkpoint_interval": 72, "timing_interval": 2, "eval_episodes": 2}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(on_gymnax("CartPole-v1", **flags, run_dir=str(whole)))
    shutil.copytree(whole, again)
    checkpoints(again)[-1].unlink()
    (again / "model.safetensors").unlink()
    assert np.abs(ppo_lstm_jax.load_arrays(checkpoints(again)[-1])[0]["environment.carry"]).max() > 0.01
    assert main("--resume", again, module=ppo_lstm_jax).code == 0
    assert_same_model(again, whole)


@pytest.mark.clock
@pytest.mark.parametrize("timing_interval", [1, 0])
def test_the_record_of_gymnax_adds_up_to_the_wall_clock(timing_interval, tmp_path, monkeypatch):
    flags = {"num_steps": 480, "total_timesteps": 24 * 1440, "timing_interval": timing_interval, "eval_episodes": 2}
    flags |= {"wandb_mode": "offline", "eval_interval": 11520, "run_dir": str(tmp_path / "run"), "lstm_size": 64}
    clock = watched_clock(ppo_lstm_jax, monkeypatch)
    train(on_gymnax("CartPole-v1", **flags))
    _, rows = config_and_rows(tmp_path / "run")
    covered = assert_times_add_up(rows, clock)
    phases = PHASES | {"iteration", "update/rollout"} if timing_interval else {"update", "record", "other", "iteration"}
    assert {f"times/{phase}" for phase in phases} <= covered[0][0].keys()
    if timing_interval:
        assert np.median([row["times/other"] / row["times/iteration"] for row, _ in covered]) < 0.1
    assert {"losses/policy_loss", "losses/explained_variance", "charts/SPS"} <= covered[0][0].keys()


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1"]
)
def test_masked_velocities_on_gymnax(name):
    """First observations and those of each step are the game's own, with zeros where Gymnasium's are hidden."""
    config = on_gymnax(name, mask_velocity=True, num_envs=2)
    envs, plain = (GymnaxEnvironments(c, 2) for c in (config, dataclasses.replace(config, mask_velocity=False)))
    hidden = list(ppo_lstm_jax.VELOCITIES[name.rpartition("-")[0]])
    for one in (envs, plain):
        one.restart(0)
    for t in range(4):
        found, expected = envs.observations, plain.observations.copy()
        assert np.abs(expected[:, hidden]).max() > 0 or t == 0
        expected[:, hidden] = 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        for one in (envs, plain):
            one.step(np.full((2, 1), 1 if one.nvec else 0.5))


def test_compiled_epochs_after_the_last_are_not_in_the_means():
    """Whatever they are: they are computed, and dropped."""
    config = on_gymnax("CartPole-v1", update_epochs=3, target_kl=1.0)
    learner, _ = opened(config)

    def epoch(learner, batch, permutation):
        return learner, {"approx_kl": jnp.where(permutation[0] > 0, jnp.nan, 2.0)}

    permutations = [np.full(3, k) for k in range(3)]
    _, metrics = jax.jit(lambda x: ppo_lstm_jax.each_epoch(epoch, x, None, None, permutations, config))(learner)
    assert metrics["approx_kl"] == 2


def test_an_image_game_on_the_device():
    """The learner and the simulator look after a whole iteration as before it."""
    config = on_gymnax("Breakout-MinAtar", lstm_layers=1)
    envs = GymnaxEnvironments(config, 3)
    learner = new_learner(envs, config)
    envs.restart(0)
    carry = learner.agent.first_carry(3)
    iterate = jax.jit(ppo_lstm_jax.iterate_on_device, static_argnums=(3, 4, 5))
    after = iterate.eval_shape(learner, envs.simulator, carry, envs, config, ppo_lstm_jax.plainly)[:2]
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in ((learner, envs.simulator), after))
    assert before == after


def test_masked_cartpole_is_learnt_on_gymnax(tmp_path):
    flags = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "sequence_length": 16, "hidden_sizes": ()}
    flags |= {"lstm_size": 32, "lstm_layers": 1, "update_epochs": 4, "learning_rate": 3e-3, "eval_episodes": 10}
    flags |= {"total_timesteps": 100_000, "mask_velocity": True, "run_dir": str(tmp_path / "run")}
    assert np.mean(train(on_gymnax("CartPole-v1", **flags)).evaluation_returns) > 200


BAD_ON_GYMNAX = {
    "--env-id gymnax/Nothing-v0": ["gymnax/Nothing-v0", "not in registered"],
    "--env-id gymnax/CartPole-v1 --norm-obs": ["--norm-obs"],
    "--env-id gymnax/CartPole-v1 --norm-reward": ["--norm-reward"],
    "--env-id gymnax/CartPole-v1 --capture-video": ["--capture-video"],
    "--env-id gymnax/Breakout-MinAtar --mask-velocity": ["--mask-velocity", "Breakout-MinAtar", "CartPole"],
    "--env-id gymnax/Catch-bsuite --mask-velocity": ["--mask-velocity", "Catch-bsuite", "CartPole"],
}


@pytest.mark.parametrize("flags", BAD_ON_GYMNAX)
def test_bad_input_on_gymnax_is_refused_in_one_line(flags, tmp_path):
    outcome = main(*flags.split(), "--run-dir", tmp_path / "run", module=ppo_lstm_jax)
    assert_refused(outcome, *BAD_ON_GYMNAX[flags], module=ppo_lstm_jax)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- reliability


QUIET = [*SILENT, "--sequence-length", "1"]  # so that minibatches are refused where those of ppo_jax.py are
OWN_NUMBERS = {
    "--lstm-size": "0 -1 1.5",
    "--lstm-layers": "0 -1",
    "--sequence-length": "0 -1 3 32",
    "--burn-in": "-1 16 17 x",
}


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = main(*([] if "--resume" in flags else QUIET), *flags, module=ppo_lstm_jax)
    assert_refused(outcome, *words, module=ppo_lstm_jax)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        *(case(f"{flag} {value}", flag) for flag, values in OWN_NUMBERS.items() for value in values.split()),
        case("--sequence-length 8 --num-minibatches 8", "--num-minibatches 8", "4 sequences"),
        case("--sequence-length 16 --num-envs 3 --num-minibatches 2", "--num-minibatches 2", "3 sequences"),
    ],
)
def test_bad_sequences_are_refused_in_one_line(flags, words):
    assert_refused(main(*QUIET, *flags, module=ppo_lstm_jax), *words, module=ppo_lstm_jax)


def test_every_number_has_its_bad_values():
    numbers = {f.name for f in dataclasses.fields(Config) if any(t in str(f.type) for t in ("int", "float"))}
    own = {flag.removeprefix("--").replace("-", "_") for flag in OWN_NUMBERS}
    assert numbers == NUMBERS.keys() - {"num_threads"} | own


def test_a_model_without_a_memory_is_refused(tmp_path):
    config = ppo_jax.Config(total_timesteps=0, eval_episodes=0, wandb_mode="disabled", vectorization="sync")
    ppo_jax.train(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
    outcome = main(*QUIET, "--load-model", tmp_path / "run/model.safetensors", module=ppo_lstm_jax)
    assert_refused(outcome, "actor.0.weight", "there and", "here", "another script", module=ppo_lstm_jax)
