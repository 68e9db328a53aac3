"""vpg_torch.py: its equations against literals, NumPy and torch.distributions, actions of several parts against an
environment whose optimum is known for each.

Where a test gives a tolerance without a word it is the rounding of float64 (1e-12), relative to numbers of about 1.
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from scipy import special, stats
from torch.distributions import Categorical, Normal

import vpg_torch
from benchmarks.records import config_and_rows
from tests.backends import double_precision
from tests.test_equivalence import assert_orthogonal
from tests.test_ppo_torch import (
    assert_in_action_space,
    assert_times_add_up,
    assert_written_down,
    call,
    slow_gae,
    watched_clock,
)
from tests.test_reliability import (
    DEADLINE,
    ROOT,
    assert_a_signal_leaves_a_checkpoint,
    assert_one_line,
    assert_resumes_to_the_bit,
    main,
)
from vpg_torch import (
    Batch,
    Config,
    Environments,
    Learner,
    Part,
    Policy,
    act,
    action_noise,
    action_parts,
    collect_rollout,
    environment_actions,
    gae,
    leaves,
    log_probs_and_entropies,
    mapped,
    new_learner,
    policy_loss,
    sample_actions,
    targets,
    train,
    update,
    value_loss,
    with_gradient,
)

MIXED = spaces.Dict(
    {
        "gear": spaces.Discrete(3, start=-1),
        "arm": spaces.Tuple(
            [
                spaces.MultiDiscrete([2, 3], start=[5, -7]),
                spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32)),
                spaces.Dict({"free": spaces.Box(-np.inf, np.inf, (1, 2), np.float64)}),
            ]
        ),
    }
)
PARTS = {"arm": (Part((2,), (2, 3)), Part((2,)), {"free": Part((1, 2))}), "gear": Part((), (3,))}


class Mixed(gym.Env):
    """Shows a sign, anew in each of 10 steps, and gives a point for each entry of the action that is right for it: the
    very choice, or less by the square of the distance, in halves of the range or, unbounded, in ones."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = MIXED
    RIGHT = {  # noqa: RUF012
        -1: {"gear": 1, "arm": ([5, -5], [0.5, 1.0], {"free": [[1.0, -2.0]]})},
        1: {"gear": -1, "arm": ([6, -7], [-0.5, 3.0], {"free": [[-1.5, 0.5]]})},
    }
    OPTIMUM = 10 * 7

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation(), {}

    def observation(self):
        self.sign = self.np_random.choice([-1, 1])
        return np.array([self.sign], np.float32)

    def points(self, action) -> dict[str, float]:
        """Of each part"""
        right = self.RIGHT[int(self.sign)]
        (pair, box, nested), (best_pair, best_box, best_nested) = action["arm"], right["arm"]
        return {
            "gear": float(action["gear"] == right["gear"]),
            "pair": float(np.sum(np.equal(pair, best_pair))),
            "box": float(2 - np.sum(((box - best_box) / [1.0, 2.0]) ** 2)),
            "free": float(2 - np.sum((nested["free"] - best_nested["free"]) ** 2)),
        }

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = sum(self.points(action).values())
        self.steps += 1
        return self.observation(), reward, False, self.steps == 10, {}


class Refused(Mixed):
    """Spaces by name"""

    SPACES = {  # noqa: RUF012
        "text": spaces.Text(5),
        "graph": spaces.Graph(spaces.Box(0, 1, (2,), np.float32), None),
        "inside": spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Tuple([spaces.Text(5)])}),
        "integers": spaces.Box(0, 5, (2,), np.int64),
    }

    def __init__(self, name: str, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space = self.SPACES[name]


for environment in (Mixed, Refused):
    if f"{environment.__name__}-v0" not in gym.registry:  # pytest and gymnasium import this file by two names
        gym.register(f"{environment.__name__}-v0", environment, disable_env_checker=True)

SMALL = {"num_envs": 2, "num_steps": 16, "vectorization": "sync", "value_iters": 3, "hidden_sizes": (8,)}
MIXED_SMALL = Config(env_id="tests.test_vpg:Mixed-v0", **SMALL)


@pytest.fixture(name="double_precision")
def in_double_precision():
    with double_precision(vpg_torch):
        yield


def random_policy(parts=PARTS, observation_dim: int = 3, **flags) -> Policy:
    """Its weights and log-stds are off their initial values."""
    torch.manual_seed(3)
    policy = Policy(observation_dim, parts, Config(hidden_sizes=(7, 6), **flags))
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def random_batch(shape: tuple[int, int] = (9, 4), parts=PARTS, observation_dim: int = 3, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    observations, next_observations = rng.normal(size=(2, *shape, observation_dim))

    def actions(part: Part) -> np.ndarray:
        entries = np.stack([rng.integers(n, size=shape) for n in part.choices], -1) if part.choices else None
        return rng.normal(size=(*shape, *part.shape)) if entries is None else entries.reshape(*shape, *part.shape)

    terminated, truncated = rng.random((2, *shape)) < 0.2
    return Batch(observations, mapped(actions, parts), rng.normal(size=shape), terminated, truncated, next_observations)


def weights(learner: Learner) -> dict[str, np.ndarray]:
    return {name: x.copy() for name, x in vpg_torch.to_numpy(learner).items() if not name.startswith("optimizer.")}


# ------------------------------------------------------------------------------------------------- nested actions


def test_parts_of_spaces():
    assert action_parts(MIXED) == PARTS
    assert action_parts(spaces.Discrete(4)) == Part((), (4,))
    assert action_parts(spaces.Tuple([spaces.Box(-1, 1, ())])) == (Part(()),)
    assert action_parts(spaces.MultiDiscrete([[2, 3], [4, 5]])) == Part((2, 2), (2, 3, 4, 5))


def test_dicts_match_by_key_not_by_order():
    assert leaves({"a": 1, "b": (2, 3)}, {"b": (20, 30), "a": 10}) == [(1, 10), (2, 20), (3, 30)]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("ends", ["truncated", "terminated", "both"])
def test_batches_hold_the_true_next_observations(ends, vectorization):
    kwargs = json.dumps({"ends": ends})
    flags = {"env_id": "tests.environments:Counter-v0", "env_kwargs": kwargs}
    config = Config(**flags, num_steps=11, vectorization=vectorization)
    with contextlib.closing(Environments(config, 3)) as envs:
        envs.restart(0)
        policy = new_learner(envs.observation_dim, envs.parts, config).policy
        collected, episodes, rng = [], [], np.random.default_rng(0)
        for _ in range(3):
            batch = collect_rollout(policy, envs, config, rng, call)
            collected.append(batch._replace(truncated=batch.truncated & ~batch.terminated))  # termination goes first
            episodes.append(envs.pop_episodes())
    expected = assert_written_down(collected, episodes, ends)
    for i, batch in enumerate(collected):
        for name in ("observations", "next_observations"):
            np.testing.assert_array_equal(getattr(batch, name), expected[name][11 * i : 11 * (i + 1)])


@pytest.mark.parametrize("vector_class", [SyncVectorEnv, partial(AsyncVectorEnv, context="forkserver")])
def test_environments_take_what_the_policy_gives(vector_class):
    """Every environment gets an action that its space contains (it asserts that), and the points for its own."""
    with contextlib.closing(vector_class([Mixed] * 3, autoreset_mode=AutoresetMode.SAME_STEP)) as vector:
        signs, _ = vector.reset(seed=0)
        right = {
            "gear": np.where(signs[:, 0] > 0, 0, 2),
            "arm": (
                np.where(signs > 0, [1, 0], [0, 2]),
                np.where(signs > 0, [-0.5, 0.5], [0.5, -0.5]).astype(np.float32),
                {"free": np.where(signs > 0, [-1.5, 0.5], [1.0, -2.0])[:, None]},
            ),
        }
        _, rewards, *_ = vector.step(environment_actions(right, MIXED))
        np.testing.assert_allclose(rewards, Mixed.OPTIMUM / 10)
        right["arm"][1][1] = [-7, 9]  # clipped to its bounds on the way
        _, rewards, *_ = vector.step(environment_actions(right, MIXED))
    assert right["arm"][1][1].tolist() == [-7, 9]


def test_bounds_whose_distance_is_no_float():
    largest = np.finfo(np.float32).max
    actions = environment_actions(
        np.array([[-1], [0], [1]], np.float32), spaces.Box(-largest, largest, (1,), np.float32)
    )
    np.testing.assert_array_equal(actions, [[-largest], [0], [largest]])


@pytest.mark.parametrize(
    ("space", "actions", "expected"),
    [
        (spaces.Discrete(3, start=2, dtype=np.int32), [0, 2], [2, 4]),
        (spaces.MultiDiscrete([2, 3], dtype=np.int32), [[0, 2], [1, 0]], [[0, 2], [1, 0]]),
        (spaces.Box(-1, 2, (1,), np.float16), [[-3.0], [0.5]], [[-1], [1.25]]),
        (spaces.Box(-np.inf, 2, (1,), np.float64), [[-3.0], [4.0]], [[-3], [2]]),
    ],
    ids=str,
)
def test_what_an_environment_takes_is_in_its_action_space(space, actions, expected):
    assert_in_action_space(vpg_torch, space, actions, expected)


def test_a_batch_keeps_the_structure_of_its_actions():
    with contextlib.closing(Environments(MIXED_SMALL, 2)) as envs:
        envs.restart(0)
        learner = new_learner(envs.observation_dim, envs.parts, MIXED_SMALL)
        batch = collect_rollout(learner.policy, envs, MIXED_SMALL, np.random.default_rng(0), call)
    shapes = mapped(lambda part, x: (x.shape, x.dtype), envs.parts, batch.actions)
    integers, floats = np.dtype(np.int64), np.dtype(np.float32)
    arm = ((16, 2, 2), integers), ((16, 2, 2), floats), {"free": ((16, 2, 1, 2), floats)}
    assert shapes == {"arm": arm, "gear": ((16, 2), integers)}
    assert np.abs(batch.actions["arm"][1]).max() > 1  # as it was sampled, beyond its bounds
    assert set(batch.actions["gear"].ravel()) == {0, 1, 2}


# ------------------------------------------------------------------------------------------------------- equations


def test_gae_is_that_of_the_double_loop():
    batch, rng = random_batch((40, 6)), np.random.default_rng(1)
    values, next_values = rng.normal(size=(2, 40, 6))
    arrays = (batch.rewards, values, next_values, batch.terminated, batch.terminated | batch.truncated)
    found = gae(*(torch.from_numpy(array).double() for array in arrays), 0.97, 0.9)
    np.testing.assert_allclose(found, slow_gae(*arrays, 0.97, 0.9), rtol=0, atol=1e-12)


def test_rewards_to_go(double_precision):
    """γ = 1/2 and V(s) = s. Columns: the batch ends at s' = 8; terminated in the second step; truncated there at
    s' = 16; both flags there, which cuts as termination does. The next row then begins another episode."""
    rewards = np.array([[1.0], [2.0], [4.0]]).repeat(4, 1)
    observations = np.zeros((3, 4, 1))
    next_observations = np.array([[0.0] * 4, [0, 16, 16, 16], [8.0] * 4])[..., None]
    flags = np.zeros((2, 3, 4))
    flags[0, 1, [1, 3]] = flags[1, 1, [2, 3]] = 1
    batch = Batch(observations, (), rewards, *flags, next_observations)
    critic = torch.nn.Sequential(torch.nn.Identity())
    batch = Batch(*(torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in batch))
    values, advantages, returns = targets(critic, batch, Config(gamma=0.5, gae_lambda=0.5))
    assert returns.tolist() == [[4, 2, 6, 2], [6, 2, 10, 2], [8, 8, 8, 8]]
    assert not values.any()
    assert advantages.tolist() == [[1 + (2 + 8 / 4) / 4, 1.5, 3.5, 1.5], [4, 2, 10, 2], [8, 8, 8, 8]]


def reference_log_probs(policy: Policy, observations, actions):
    """By torch.distributions, entry by entry, from the weights' names"""
    named = dict(policy.named_parameters())
    x = observations
    for layer in (0, 2):
        x = (x @ named[f"trunk.{layer}.weight"].T + named[f"trunk.{layer}.bias"]).tanh()
    outputs = [x @ named[f"heads.{i}.weight"].T + named[f"heads.{i}.bias"] for i in range(len(policy.heads))]
    (pair, box, free), gear = actions["arm"], actions["gear"]
    drawn = [(Categorical(logits=outputs[0][..., :2]), pair[..., 0])]
    drawn += [(Categorical(logits=outputs[0][..., 2:]), pair[..., 1]), (Categorical(logits=outputs[3]), gear)]
    for i, continuous in ((1, box), (2, free["free"][..., 0, :])):
        std = named[f"log_stds.{i}"].exp()
        drawn += [(Normal(outputs[i][..., k], std[k]), continuous[..., k]) for k in range(2)]
    return sum(of.log_prob(x) for of, x in drawn), sum(of.entropy() for of, _ in drawn)


def tensor_batch(policy: Policy, batch: Batch) -> Batch:
    return Batch(*vpg_torch.to_tensors(policy, batch))


def test_log_probs_and_entropies_add_over_parts(double_precision):
    policy = random_policy()
    batch = tensor_batch(policy, random_batch())
    found = log_probs_and_entropies(policy, batch.observations, batch.actions)
    expected = reference_log_probs(policy, batch.observations, batch.actions)
    assert found[0].shape == found[1].shape == (9, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_policy_gradient_is_the_sum_of_weighted_scores(double_precision):
    """- mean of Â ∇ log π, one sample at a time, - c₂ ∇ entropy; and the loss by finite differences."""
    policy = random_policy()
    batch, ent_coef = tensor_batch(policy, random_batch()), 0.3
    advantages = torch.from_numpy(np.random.default_rng(2).normal(size=(9, 4)))
    gradient, (loss, score, entropy, log_probs) = with_gradient(policy_loss, policy, batch, advantages, ent_coef)
    expected_log_probs, entropies = reference_log_probs(policy, batch.observations, batch.actions)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(score.item() - ent_coef * entropy.item(), abs=1e-12)
    assert entropy.item() == pytest.approx(entropies.mean().item(), abs=1e-12)

    def flat_gradient(x):
        gradients = torch.autograd.grad(x, policy.parameters(), retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in gradients])

    scores = [flat_gradient(log_prob) for log_prob in expected_log_probs.flatten()]
    expected = -sum(a * s for a, s in zip(advantages.flatten(), scores, strict=True)) / 36
    expected -= ent_coef * flat_gradient(entropies.mean())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)

    direction = torch.from_numpy(np.random.default_rng(4).normal(size=len(gradient)))
    vector = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    either_side = []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(vector + step * direction, policy.parameters())
        either_side.append(policy_loss(policy, batch, advantages, ent_coef)[0].item())
    slope = (either_side[0] - either_side[1]) / 2e-5
    assert slope == pytest.approx((gradient @ direction).item(), rel=1e-8)


def test_value_loss():
    critic = torch.nn.Sequential(torch.nn.Identity())
    batch = Batch(torch.tensor([[[1.0], [4.0]]]), *[None] * 5)
    assert value_loss(critic, batch, torch.tensor([[3.0, 3.0]]))[0].item() == (4 + 1) / 4


def test_kl_estimates():
    policy = random_policy({"a": Part((), (2,))})
    batch = tensor_batch(policy, random_batch(parts={"a": Part((), (2,))}))
    log_probs, _ = log_probs_and_entropies(policy, batch.observations, batch.actions)
    kl = vpg_torch.kl_divergence(policy, batch, log_probs.detach() - np.log(2))  # twice as likely now
    assert kl["approx_kl"].item() == pytest.approx(1 - np.log(2), abs=1e-6)
    assert kl["old_approx_kl"].item() == pytest.approx(-np.log(2), abs=1e-6)


def test_normalised():
    found = vpg_torch.normalised(torch.tensor([[1.0, 3.0], [5.0, 7.0]]).double())
    np.testing.assert_allclose(found, np.array([[-3, -1], [1, 3]]) / np.sqrt(5), rtol=0, atol=1e-7)
    assert vpg_torch.normalised(torch.ones(2, 3)).tolist() == [[0] * 3] * 2


def test_actions_without_noise_are_the_most_likely():
    outputs = [np.array([[0.1, 0.3, 5, -1, 2], [1, -4, 0, 0.5, 0.2]]), np.array([[7.0, 8], [9, 10]])]
    actions = sample_actions(outputs, (Part((2,), (2, 3)), {"a": Part((1, 2))}))
    assert actions[0].tolist() == [[1, 0], [0, 1]]
    assert actions[1]["a"].tolist() == [[[7, 8]], [[9, 10]]]


def test_actions_follow_the_distribution():
    policy = random_policy()
    observation = np.full((1, 3), 0.5, np.float32)
    outputs = [head.detach().numpy()[0] for head in policy(torch.from_numpy(observation))]
    noise = action_noise(np.random.default_rng(0), (20_000,), policy)
    (pair, box, free), gear = (actions := act(policy, observation, noise))["arm"], actions["gear"]
    for drawn, logits in (pair[:, 0], outputs[0][:2]), (pair[:, 1], outputs[0][2:]), (gear, outputs[3]):
        counts = np.bincount(drawn, minlength=len(logits))
        assert stats.chisquare(counts, 20_000 * special.softmax(logits.astype(float))).pvalue > 0.01
    for drawn, mean, log_std in (
        (box, outputs[1], policy.log_stds[1].detach()),
        (free["free"][:, 0], outputs[2], policy.log_stds[2].detach()),
    ):
        for k in range(2):
            assert stats.kstest(drawn[:, k], stats.norm(mean[k], log_std[k].exp().item()).cdf).pvalue > 0.01
    columns = [pair[:, 0], pair[:, 1], gear, *box.T, *free["free"][:, 0].T]
    correlations = np.corrcoef(columns)[np.triu_indices(7, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(20_000)


# ---------------------------------------------------------------------------------------------------------- update


def adam(vector: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    """Kingma & Ba 2014, Algorithm 1"""
    first = second = np.zeros_like(vector)
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        vector = vector - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return vector


def test_the_optimizer_takes_the_annealed_learning_rate(tmp_path):
    """That of the last of two iterations is half of the first's; the value function's stays."""
    flags = {"total_timesteps": 64, "eval_episodes": 0, "wandb_mode": "disabled", "run_dir": str(tmp_path / "run")}
    learner = train(Config(**SMALL | flags, policy_lr=0.01, value_lr=0.02)).learner
    rates = [x.param_groups[0]["lr"] for x in (learner.policy_optimizer, learner.critic_optimizer)]
    assert rates == pytest.approx([0.005, 0.02])


def test_initial_weights():
    """Orthogonal with gains √2, 0.01 (policy) and 1 (value), biases 0"""
    last = {**{f"policy.heads.{k}.weight": 0.01 for k in range(4)}, "critic.4.weight": 1}
    arrays = vpg_torch.to_numpy(new_learner(3, PARTS, Config(hidden_sizes=(8, 6))))
    assert arrays.keys() > last.keys()
    for name, x in arrays.items():
        if name.endswith("weight"):
            assert_orthogonal(x, last.get(name, np.sqrt(2)))
        assert not (name.endswith("bias") and x.any()), name


@pytest.mark.parametrize("norm_adv", [True, False])
def test_one_policy_step_and_k_value_steps(norm_adv, double_precision):
    """In the order of the pseudo-code: advantages and targets from the value function before its own steps."""
    config = Config(value_iters=3, hidden_sizes=(7,), policy_lr=0.01, value_lr=0.02, ent_coef=0.3, norm_adv=norm_adv)
    data = random_batch()
    learner, reference = (new_learner(3, PARTS, config) for _ in range(2))
    batch = tensor_batch(reference.critic, data)
    _, advantages, returns = targets(reference.critic, batch, config)
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    gradient, results = with_gradient(policy_loss, reference.policy, batch, advantages, 0.3)
    (vector,) = reference.policy_optimizer.param_groups[0]["params"]
    expected_policy = adam(vector.detach().numpy(), [gradient.numpy()], 0.01)
    (vector,) = reference.critic_optimizer.param_groups[0]["params"]
    first_critic, value_gradients, value_losses = vector.detach().numpy().copy(), [], []
    for _ in range(3):
        value_gradient, (loss,) = with_gradient(value_loss, reference.critic, batch, returns)
        value_losses.append(loss.item())
        value_gradients.append(value_gradient.numpy().copy())
        vpg_torch.descend(reference.critic_optimizer, value_gradient)
    returned, metrics = update(learner, data, config)
    assert returned is learner
    found = torch.nn.utils.parameters_to_vector(learner.policy.parameters()).detach().numpy()
    np.testing.assert_allclose(found, expected_policy, rtol=0, atol=1e-12)
    found = torch.nn.utils.parameters_to_vector(learner.critic.parameters()).detach().numpy()
    np.testing.assert_allclose(found, adam(first_critic, value_gradients, 0.02), rtol=0, atol=1e-12)
    assert metrics["losses/value_loss"] == pytest.approx(np.mean(value_losses), abs=1e-12)
    assert metrics["losses/grad_norm"] == pytest.approx(gradient.norm().item(), abs=1e-12)
    assert metrics["losses/policy_loss"] == pytest.approx(results[1].item(), abs=1e-12)
    errors = returns - targets(new_learner(3, PARTS, config).critic, batch, config)[0]
    assert metrics["losses/explained_variance"] == pytest.approx((1 - errors.var() / returns.var()).item(), abs=1e-9)
    assert metrics["losses/approx_kl"] > 0


def test_timed_and_fused_give_the_same_weights():
    config = Config(**SMALL)
    stopwatch = vpg_torch.Stopwatch(lambda result: None, {})
    learners = []
    for timed in (stopwatch.timed, stopwatch.fused):
        learner = new_learner(3, PARTS, config)
        for seed in range(3):
            learner, _ = update(learner, random_batch(seed=seed), config, timed)
        learners.append(weights(learner))
    for name in learners[0]:
        assert np.array_equal(learners[0][name], learners[1][name]), name
    seconds = stopwatch.seconds
    assert seconds["loss"] >= seconds["loss/policy"] + seconds["loss/value"]


def test_a_bandit_is_learnt_from_data_alone():
    snippet = re.search(
        r"```python\n(import numpy as np\nfrom vpg_torch.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    found = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert found.stdout.strip() == "{'arm': array([2])}", found.stderr


# -------------------------------------------------------------------------------------------------- whole runs


def test_the_readme_quotes_both_updates():
    """In its table of VPG beside PPO; flags stand there without their underscores"""
    header = "| | `vpg_torch.py` | `ppo_torch.py` |\n"
    rows = (ROOT / "README.md").read_text().split(header)[1].split("\n\n")[0].splitlines()[1:]
    quoted = 0
    for column, name in (2, "vpg_torch.py"), (3, "ppo_torch.py"):
        source = (ROOT / name).read_text()
        for quote in re.findall("`(.*?)`", " ".join(row.split(" | ")[column - 1] for row in rows)):
            assert quote.removeprefix("--").replace("-", "_" if quote.startswith("--") else "-") in source, quote
            quoted += 1
    assert quoted > 15


def test_every_part_of_a_mixed_action_is_learnt(tmp_path):
    flags = {"total_timesteps": 60_000, "num_envs": 16, "num_steps": 32, "value_iters": 10, "vectorization": "sync"}
    flags |= {"gamma": 0.0, "wandb_mode": "disabled"}  # no step has a part in the next
    config = Config(
        env_id="tests.test_vpg:Mixed-v0", seed=11, run_dir=str(tmp_path / "run"), **flags
    )  # as in the README
    result = train(config)
    assert np.mean(result.evaluation_returns) > 0.95 * Mixed.OPTIMUM
    for sign in (-1, 1):
        env = Mixed()
        env.sign = sign
        actions = act(result.learner.policy, np.array([[sign]], np.float32))
        points = env.points(mapped(lambda x: x[0], environment_actions(actions, MIXED)))
        assert points["gear"] == 1 and points["pair"] == 2
        assert points["box"] > 1.9 and points["free"] > 1.9, points


def test_cartpole_is_learnt(tmp_path):
    config = Config(total_timesteps=60_000, vectorization="sync", run_dir=str(tmp_path / "run"))
    result = train(config)
    assert np.mean(result.evaluation_returns) > 150  # an untrained policy gets about 10, the best 500
    _, rows = config_and_rows(tmp_path / "run")
    keys = {key for row in rows for key in row}
    names = "policy_loss value_loss entropy approx_kl old_approx_kl explained_variance grad_norm"
    assert {f"losses/{name}" for name in names.split()} <= keys
    phases = "forward step gae loss loss/policy loss/value kl weight_update other iteration record update"
    assert {f"times/{name}" for name in phases.split()} <= keys
    histograms = ["actions", "advantages", "values", "episodic_return", "episodic_length"]
    assert {f"histograms/{name}._type" for name in histograms} <= keys
    assert {"charts/episodic_return", "charts/learning_rate", "charts/SPS", "charts/evaluation_return"} <= keys


@pytest.mark.clock
@pytest.mark.parametrize("timing_interval", [1, 0])
def test_the_phases_partition_the_run(timing_interval, tmp_path, monkeypatch):
    flags = {"num_steps": 512, "timing_interval": timing_interval, "eval_interval": 8192, "vectorization": "sync"}
    config = Config(total_timesteps=10 * 2048, run_dir=str(tmp_path / "run"), **flags)
    clock = watched_clock(vpg_torch, monkeypatch)
    train(config)
    _, rows = config_and_rows(tmp_path / "run")
    assert_times_add_up(rows, clock)
    timed = [row for row in rows if "times/loss" in row]
    assert len(timed) == 10 * timing_interval
    phases = ("forward", "step", "gae", "loss", "kl", "weight_update", "record", "other")
    for row in timed:
        assert sum(row[f"times/{name}"] for name in phases) == pytest.approx(row["times/iteration"], rel=1e-6)
        assert row["times/loss/policy"] + row["times/loss/value"] <= row["times/loss"]
    if timed:
        assert np.median([row["times/other"] / row["times/iteration"] for row in timed]) < 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "tests.test_vpg:Refused-v0", "--env-kwargs", f'{{"name": "{name}"}}'], ["action space", word])
        for name, word in [("text", "Text"), ("graph", "Graph"), ("inside", "Text"), ("integers", "int64")]
    ]
    + [
        (["--env-id", "Nonsense-v0"], ["Nonsense"]),
        (["--env-id", "tests.environments:Picture-v0"], ["observation space"]),
        (["--num-envs", "0"], ["--num-envs"]),
        (["--total-timesteps", "100"], ["--total-timesteps"]),
        (["--num-envs", "1", "--num-steps", "1"], ["--num-steps"]),
        (["--policy-lr", "nan"], ["--policy-lr"]),
        (["--load-model", "nowhere.safetensors"], ["nowhere"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--learning-rate", "1"], ["learning-rate"]),
    ],
)
def test_bad_input_is_one_line(flags, words, tmp_path):
    flags += [] if "--resume" in flags else ["--run-dir", tmp_path / "run"]
    assert_one_line(main(*flags, module=vpg_torch), 2, *words, module=vpg_torch)
    assert not (tmp_path / "run").exists()


def test_not_a_number_is_named(tmp_path):
    flags = ["--env-id", "tests.environments:NotANumber-v0", "--num-envs", "1", "--num-steps", "16"]
    flags += ["--run-dir", tmp_path / "run", "--wandb-mode", "disabled", "--vectorization", "sync"]
    assert_one_line(main(*flags, module=vpg_torch), 1, "the observation is not finite", module=vpg_torch)


FLAGS = ["--num-envs", "2", "--num-steps", "16", "--eval-episodes", "1", "--vectorization", "sync"]
FLAGS += ["--wandb-mode", "disabled", "--value-iters", "3", "--env-id", "tests.test_vpg:Mixed-v0"]


def test_killed_and_resumed(tmp_path):
    flags = [*FLAGS, "--total-timesteps", "1600", "--checkpoint-interval", "320"]
    assert_resumes_to_the_bit(ROOT / "vpg_torch.py", tmp_path, *flags)


def test_a_signal_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    assert_a_signal_leaves_a_checkpoint(ROOT / "vpg_torch.py", tmp_path, *FLAGS)


def test_a_saved_model_acts_the_same(tmp_path):
    flags = {"wandb_mode": "disabled", "eval_episodes": 3}
    config = dataclasses.replace(MIXED_SMALL, total_timesteps=640, run_dir=str(tmp_path / "run"), **flags)
    trained = train(config)
    model = str(tmp_path / "run" / "model.safetensors")
    flags = {"total_timesteps": 0, "load_model": model, "run_dir": str(tmp_path / "again"), "seed": config.seed}
    loaded = train(dataclasses.replace(config, **flags))
    assert loaded.evaluation_returns == trained.evaluation_returns
    for name, x in weights(trained.learner).items():
        assert np.array_equal(x, weights(loaded.learner)[name]), name
