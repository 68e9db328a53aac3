# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "jax==0.10.2",
#     "flax==0.12.8",
#     "optax==0.2.8",
#     "gymnasium[box2d,classic-control,mujoco,other]==1.3.0",
#     "mujoco==3.17.0",
#     "numpy==2.4.6",
#     "psutil==7.2.2",
#     "pydantic==2.14.3",
#     "safetensors==0.8.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Maximum a posteriori policy optimisation (MPO) in JAX, in one file.

    python mpo_jax.py --env-id HalfCheetah-v5

Papers, all by Abdolmaleki et al.: "Maximum a Posteriori Policy Optimisation", arXiv 1806.06920 (MPO below), "Relative
Entropy Regularized Policy Iteration", arXiv 1812.02256 (REPI), and "A Distributional View on Multi-Objective Policy
Optimization", arXiv 2005.07513 (MO-MPO), for the penalty on actions out of bounds.

    initialise policy π and critic Q, and targets π', Q' as copies of them; temperature η, multipliers α_μ and α_Σ
    repeat
        act with π in N environments, but at random and without updates in the first `learning_starts` steps
        keep the transitions (s, a, r, s') in the replay buffer
        repeat `updates_per_step` times for each transition
            sample a minibatch of B transitions
            a₁ … a_S ~ π'(·|s')
            y = r + γ mean Q'(s', aⱼ), but y = r where s' is terminal
            minimise  mean (Q(s, a) - y)²
            E-step: minimise  η ε + η mean log mean exp(Q'(s', aⱼ) / η)  over η;  wⱼ = softmax Q'(s', aⱼ) / η
                with the action penalty the same for -‖aⱼ - clip aⱼ‖, its own η and ε; wⱼ is the sum of both
            M-step: maximise  mean Σ wⱼ (log N(aⱼ; μ, Σ') + log N(aⱼ; μ', Σ))  over μ, Σ of π, with the KL from π' to π
                at most ε_μ for its means and ε_Σ for its covariances: α_μ and α_Σ, learned, are the prices of these
            move π', Q' by the fraction τ towards π, Q

These choices leave the papers:

- The actions are sampled in the next states of the minibatch (as in Acme's TensorFlow MPO): so the critic's targets and
  the weights share the S·B values of Q', most of an update's work.
- The targets follow by τ at every update; MPO copies the networks after each M-step, Acme at every hundredth update.
  The KLs are to the target policy, so that τ sets the pace of the policy too.
- The critic's targets are of one step, as in most of REPI; MPO has Retrace.
- With --temperature-solver adam, η moves before the weights are taken; in Acme afterwards.
- The KLs are held in each dimension of an action (as in Acme; `--no-per-dim-kl` holds their sum).
- Where no sampled action is out of bounds, the penalty's weights are even, and draw the policy back to π' (as in Acme).
- Where an episode terminated, the policy is fitted to the first state of the next: the replay buffer holds that one.
- Learning rates, limits and first multipliers are not Acme's (1e-4; ε_μ = 2.5e-3, ε_Σ = 1e-6; 10 and 1000 there, with
  returns of five steps), gradients are not clipped, and the first actions are uniformly random.

Shapes: N environments, B samples of a minibatch, S actions sampled in each state, C critics, K objectives (Q and the
action penalty), U updates in one compiled call, O observation, A dimensions of an action. The policy is a Gaussian
without tanh. What it samples is clipped to [-1, 1] before the environment, the replay buffer or a critic sees it
(`environment_actions` alone scales to the bounds of the environment); log-probabilities and KLs are of the Gaussian.
"""

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import secrets
import signal
import sys
import threading
import time
import timeit
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pydantic
import safetensors.numpy
import tyro
import wandb
from flax import linen as nn
from flax import struct
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from jax import Array as Tensor
from jax.tree_util import tree_leaves_with_path, tree_map_with_path
from pydantic import Field
from tqdm import tqdm

FRAMEWORK = "jax"
ALGORITHM = "mpo"
INITIAL_STD, MIN_STD = 0.5, 1e-3  # of the policy, in half ranges
INITIAL_TEMPERATURE, INITIAL_ALPHA_MEAN, INITIAL_ALPHA_COV = 1.0, 1.0, 100.0
MIN_DUAL = 1e-8  # of temperatures and multipliers: a constraint that does not bind would send them to 0

# ---------------------------------------------------------------------------------------------------------- Config

Count = Annotated[int, Field(ge=1, lt=2**31)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Epsilon = Annotated[float, Field(ge=1e-5, allow_inf_nan=False)]  # a smaller KL is lost in the rounding of float32


@dataclasses.dataclass(frozen=True)
class Config:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id, module:Id-v0 or dm_control/domain-task-v0
    env_kwargs: str = "{}"  # JSON passed to the environment, such as '{"gravity": 5.0}'
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seed of weights, actions, minibatches and environments
    total_timesteps: Steps = 1_000_000  # environment steps of the whole run, in whole iterations
    policy_lr: Positive = 3e-4  # Adam's learning rate of the policy
    q_lr: Positive = 3e-4  # Adam's learning rate of the critics
    dual_lr: Positive = 1e-2  # Adam's learning rate of the multipliers, and of the temperature with adam
    num_envs: Count = 1  # N, environments that step together
    action_repeat: Count = 1  # times that the environment takes an action; each counts, even if the episode ends sooner
    buffer_size: Count = 1_000_000  # transitions that the replay buffer keeps
    learning_starts: Steps = 5_000  # steps with random actions before the first update
    batch_size: Count = 256  # B, transitions of a minibatch
    updates_per_step: Positive = 1.0  # updates for each transition: times N for a step of all environments
    gamma: Fraction = 0.99  # discount factor γ
    tau: Fraction = 0.005  # τ, how far the targets move towards their networks, and with them the policy
    num_critics: Count = 1  # C, critics; of several the minimum counts
    num_action_samples: Annotated[int, Field(ge=2)] = 20  # S, actions of the target policy in each state
    temperature_solver: Literal["newton", "slsqp", "adam"] = "newton"  # newton, slsqp: to the optimum; adam: one step
    epsilon: Epsilon = 0.1  # ε, KL from the weights of the samples to uniform ones
    epsilon_mean: Positive = 1e-2  # ε_μ, most KL(π' ‖ π) by the means, averaged over states
    epsilon_cov: Positive = 1e-4  # ε_Σ, most KL(π' ‖ π) by the covariances, likewise
    per_dim_kl: bool = True  # hold each action dimension to ε_μ and ε_Σ; else their sum, which needs larger ones
    action_penalty: bool = True  # pull actions into [-1, 1], by a second objective
    epsilon_penalty: Epsilon = 1e-3  # ε of the action penalty
    hidden_sizes: tuple[Count, ...] = (256, 256)  # widths; ReLU, but layer normalisation and tanh after the first
    vectorization: Literal["auto", "sync", "async"] = "auto"  # one process, or one an environment; auto: the faster
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # auto: what JAX finds, an accelerator before the cpu
    log_interval: Count = 1000  # steps of an iteration, the unit of record and timing; rounded up to whole steps of N
    timing_interval: Steps = 20  # every K-th iteration runs phase by phase, fenced; 1: always, 0: never
    eval_episodes: Steps = 10  # episodes of an evaluation: deterministic policy, fresh environments; 0: none
    eval_interval: Steps = 5000  # environment steps between evaluations; 0: only one at the end
    checkpoint_interval: Steps | None = None  # steps to a checkpoint (new episodes); None: 1/10, ≥5000 N; 0: on signals
    capture_video: bool = False  # film the first episode of every evaluation, 2000 steps at most
    save_model: bool = True  # write model.safetensors at the end
    load_model: str | None = None  # start from this model.safetensors: its weights
    resume: str | None = None  # go on with the run in this directory; needs no other flag
    run_dir: str | None = None  # directory of the run's files; None: runs/<env>__<script>__<seed>__<time>
    exp_name: str = "mpo_jax"  # <script> in the name of the run
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline: nothing leaves the machine
    wandb_project: Annotated[str, Field(pattern=r"^[^/\\#?%:]+$", max_length=128)] = "deep-rl-scripts"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group; None: <env>__<script>, so that seeds fall together

    @property
    def iteration_steps(self) -> int:
        """A log interval, in whole steps of all environments"""
        return math.ceil(self.log_interval / self.vector_step) * self.vector_step

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.iteration_steps

    @property
    def vector_step(self) -> int:
        """Environment steps that one step of all environments together makes"""
        return self.num_envs * self.action_repeat

    # twin: td3_jax sac_jax mpo_jax
    @property
    def checkpoint_every(self) -> int:
        default = max(self.total_timesteps // 10, 5000 * self.vector_step)  # so that episodes end in between
        return default if self.checkpoint_interval is None else self.checkpoint_interval


# -------------------------------------------------------------------------------------------------------- networks


# twin: td3_jax sac_jax mpo_jax
class Network(struct.PyTreeNode):
    """A flax module and its weights."""

    params: dict
    module: nn.Module = struct.field(pytree_node=False)

    @classmethod
    def create(cls, module: nn.Module, key: Tensor, *inputs: Tensor) -> "Network":
        return cls(jax.jit(module.init)(key, *inputs)["params"], module)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.module.apply({"params": self.params}, *inputs)


# twin: td3_jax sac_jax mpo_jax
class Critics(Network):
    """C critics, their weights stacked: one batched product takes less than several."""

    @classmethod
    def create(cls, module: nn.Module, keys: Tensor, *inputs: Tensor) -> "Critics":
        init = jax.jit(jax.vmap(lambda key: module.init(key, *inputs)["params"]))
        return cls(init(keys), module)

    def __call__(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(…, O), (…, A) -> (C, …)"""
        return jax.vmap(lambda params: Network(params, self.module)(observations, actions))(self.params)


class Actor(nn.Module):
    """Gaussian: (B, O) -> means and standard deviations, (B, A) each"""

    hidden_sizes: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        means, stds = jnp.split(mlp(observations, *self.hidden_sizes, 2 * self.action_dim), 2, -1)
        return means, MIN_STD + INITIAL_STD * nn.softplus(stds) / math.log(2)


# twin: td3_jax sac_jax mpo_jax
class Critic(nn.Module):
    """Q: (B, O), (B, A) -> (B,)"""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observations: Tensor, actions: Tensor) -> Tensor:
        return mlp(jnp.concatenate([observations, actions], -1), *self.hidden_sizes, 1).squeeze(-1)


def mlp(x: Tensor, *sizes: int) -> Tensor:
    """Linear layers, ReLU between them but for the first: after it layer normalisation and tanh, as in REPI and Acme.

    That bounds the first layer: large observations cannot carry the means, which no tanh bounds, away with them.
    Weights begin uniform in ±1/√inputs, biases 0.
    """
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    for i, size in enumerate(sizes[:-1]):
        x = nn.Dense(size, kernel_init=uniform, name=f"{2 * i}")(x)  # torch counts the ReLU too
        x = nn.relu(x) if i else nn.tanh(nn.LayerNorm(name="norm")(x))
    return nn.Dense(sizes[-1], kernel_init=uniform, name=f"{2 * len(sizes) - 2}")(x)


# ------------------------------------------------------------------------------------------------------------ data


class Batch(NamedTuple):
    """What U updates need, made on the host."""

    observations: np.ndarray  # (U, B, O)
    actions: np.ndarray  # (U, B, A)
    rewards: np.ndarray  # (U, B)
    terminated: np.ndarray  # (U, B)
    next_observations: np.ndarray  # (U, B, O), true ones where an episode was truncated
    next_noise: np.ndarray  # (U, S, B, A), standard Gaussian, for aⱼ


class Gaussian(NamedTuple):
    means: Tensor  # (B, A)
    stds: Tensor  # (B, A)


class Samples(NamedTuple):
    """What π' does in the next states, and what comes of it."""

    target: Gaussian  # π'(·|s')
    actions: Tensor  # aⱼ, (S, B, A), not clipped
    values: Tensor  # (K, S, B): Q'(s', aⱼ) and, with the action penalty, minus its cost


class Multipliers(NamedTuple):
    """Of the constraints on the KL, for each dimension (A,) or for their sum (): KLs, α, what `positive` makes α of"""

    mean: Tensor
    cov: Tensor


class Optimizers(NamedTuple):
    actor: optax.OptState
    critics: optax.OptState
    multipliers: optax.OptState
    temperatures: optax.OptState | tuple[()]  # with adam alone


class Learner(NamedTuple):
    """What an update changes."""

    actor: Network
    critics: Critics
    target_actor: Network
    target_critics: Critics
    temperatures: Tensor  # what `positive` makes η of, one for each objective (K,)
    multipliers: Multipliers
    optimizer: Optimizers


class Metrics(NamedTuple):
    """losses/… of the record, of one update () or of several (U,)"""

    critic_loss: Tensor
    q_mean: Tensor  # of all critics
    actor_loss: Tensor
    temperature: Tensor  # η of Q
    temperature_error: Tensor  # its relative distance from η*, which minimises the dual: |η / η* - 1|
    kl_mean: Tensor  # mean over the dimensions, or their sum with --no-per-dim-kl
    kl_cov: Tensor  # likewise
    alpha_mean: Tensor  # α_μ, mean over the dimensions
    alpha_cov: Tensor  # α_Σ, likewise
    std: Tensor  # of the policy, mean over states and dimensions
    excess: Tensor  # mean distance of aⱼ from its clipped self


# ------------------------------------------------------------------------------------------------------- equations


def sample_actions(policy: Gaussian, noise: Tensor | float) -> Tensor:
    """mean + std · noise, of the shape of the noise (…, B, A); noise 0 gives the most likely actions."""
    return policy.means + policy.stds * noise


def critic_targets(rewards: Tensor, terminated: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """y = r + γ mean Q'(s', aⱼ), (B,) from next_q (S, B): the expectation under π' by its samples, as in Acme

    Only termination cuts it. This is the first step of the Retrace target that MPO eq. 13 has.
    """
    return rewards + gamma * (1 - terminated) * next_q.mean(0)


# twin: td3_jax sac_jax mpo_jax
def critic_loss(q: Tensor, targets: Tensor) -> Tensor:
    """Σ_c mean (Q_c(s, a) - y)² from (C, B) and (B,)"""
    return ((q - targets) ** 2).mean(1).sum()


def action_cost(actions: Tensor) -> Tensor:
    """Distance from [-1, 1]: ‖a - clip(a)‖₂, (…, A) -> (…,), minus the second objective (MO-MPO; this one is Acme's)"""
    return jnp.linalg.norm(actions - actions.clip(-1, 1), axis=-1)


def temperature_dual(temperature: Tensor, values: Tensor, epsilon: float) -> Tensor:
    """g(η) = η ε + η mean log mean exp(Q / η) (MPO eq. 9), () from values (S, B): log over the mean of samples

    It is convex; its minimum holds the KL from the weights to uniform ones, mean over states, at ε, or is at the floor
    of η where no weights come so far from uniform ones.
    """
    log_means = jax.nn.logsumexp(values / temperature, 0) - math.log(len(values))  # (B,)
    return temperature * (epsilon + log_means.mean())


def minus_best(values: Tensor) -> Tensor:
    """(S, B) less the best of each state: the same weights and best temperature, of numbers that are rounded less"""
    return values - values.max(0)


def sample_weights(temperature: Tensor, values: Tensor) -> Tensor:
    """wⱼ = exp(Qⱼ / η) / Σ exp(Q / η), (S, B) (MPO eq. 8, with samples of π' for π'; REPI section 4.1)"""
    return jax.nn.softmax(minus_best(values) / temperature, 0)


def weights_kl(temperature: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """KL from the weights to uniform ones, mean over states, and its derivative by log η, () each

    The KL is Σ wⱼ log(S wⱼ) = ε - g'(η). Its derivative is minus the variance of Q / η, or of log w, under the weights.
    """
    log_ratios = jax.nn.log_softmax(values / temperature, 0) + math.log(len(values))  # log S w, (S, B)
    weights = jnp.exp(log_ratios) / len(values)
    kl = (weights * log_ratios).sum(0)  # (B,)
    return kl.mean(), -(weights * (log_ratios - kl) ** 2).sum(0).mean()


def largest_temperature(values: Tensor, epsilon: float) -> Tensor:
    """η* is at most this, (S, B) -> (): where values have a range R, the KL is at most R² / 8η² (Hoeffding)."""
    ranges = values.max(0) - values.min(0)  # (B,)
    return jnp.maximum(MIN_DUAL, jnp.sqrt((ranges**2).mean() / (8 * epsilon)))


def optimal_temperature(values: Tensor, epsilon: float, start: Tensor) -> Tensor:
    """η* that minimises g, by Newton's method for log KL = log ε over log η, (S, B) -> ()

    The KL falls with η, from at most log S to 0, and where η is large log KL is a straight line of slope -2 in log η. A
    Newton step that leaves the bracket or does not halve the one before gives way to bisection, so that it always
    converges.
    """
    values = minus_best(values)
    low, high = jnp.full_like(start, math.log(MIN_DUAL)), jnp.log(largest_temperature(values, epsilon))
    high = jnp.where(weights_kl(MIN_DUAL, values)[0] > epsilon, high, low)  # else the constraint does not bind

    def is_far(state: tuple) -> Tensor:
        _, _, _, step, count = state
        return (jnp.abs(step) > 1e-5) & (count < 100)

    def closer(state: tuple) -> tuple:
        here, low, high, step_before, count = state
        kl, derivative = weights_kl(jnp.exp(here), values)
        low, high = jnp.where(kl > epsilon, here, low), jnp.where(kl > epsilon, high, here)
        newton = -jnp.log(kl / epsilon) * kl / derivative
        is_safe = (low <= here + newton) & (here + newton <= high) & (jnp.abs(newton) < 0.5 * jnp.abs(step_before))
        step = jnp.where(is_safe, newton, 0.5 * (low + high) - here)
        return here + step, low, high, step, count + 1

    start = jnp.log(start).clip(low, high)
    return jnp.exp(jax.lax.while_loop(is_far, closer, (start, low, high, high - low, 0))[0])


def log_density(actions: Tensor, policy: Gaussian) -> Tensor:
    """log N(a; mean, std), (S, B) from (S, B, A)"""
    z = (actions - policy.means) / policy.stds
    return (-0.5 * z**2 - jnp.log(policy.stds) - 0.5 * math.log(2 * math.pi)).sum(-1)


def actor_loss(weights: Tensor, actions: Tensor, policy: Gaussian, target: Gaussian) -> Tensor:
    """-mean Σ wⱼ (log N(aⱼ; μ, Σ') + log N(aⱼ; μ', Σ)), from (S, B) and (S, B, A)

    The weighted maximum likelihood of MPO eq. 10, where each half of the policy is fitted beside the other half of π':
    so Σ cannot shrink because μ moves (REPI section 4.2.1). Σ wⱼ is K, as each objective's add up to 1.
    """
    log_densities = log_density(actions, Gaussian(policy.means, target.stds))
    log_densities += log_density(actions, Gaussian(target.means, policy.stds))
    return -(weights * log_densities).sum(0).mean()


def kl_mean(policy: Gaussian, target: Gaussian) -> Tensor:
    """KL(N(μ', Σ') ‖ N(μ, Σ')) = ½ (μ - μ')² / σ'² of each dimension, (B, A)

    MPO eq. 27 (which prints the names C_μ and C_Σ the other way round) with Σ' for Σ, as in REPI 4.2.1 and in Acme.
    """
    return 0.5 * ((policy.means - target.means) / target.stds) ** 2


def kl_cov(policy: Gaussian, target: Gaussian) -> Tensor:
    """KL(N(μ', Σ') ‖ N(μ', Σ)) = log σ/σ' + ½ σ'²/σ² - ½ of each dimension, (B, A) (likewise)"""
    change = (target.stds - policy.stds) / policy.stds
    return 0.5 * change**2 + change - jnp.log1p(change)  # differences of numbers near 1 would be lost in float32


def multipliers_loss(multipliers: Multipliers, kls: Multipliers, limits: Multipliers) -> Tensor:
    """Σ α (ε - KL), what α minimises of the Lagrangian (MPO appendix D.3): a KL above its ε raises its price."""
    alphas = jax.tree.map(positive, multipliers)
    return (alphas.mean * (limits.mean - kls.mean)).sum() + (alphas.cov * (limits.cov - kls.cov)).sum()


def positive(x: Tensor) -> Tensor:
    """Temperatures and multipliers from what Adam descends on"""
    return nn.softplus(x)


def before_positive(y: Tensor) -> Tensor:
    """The inverse of `positive`: log(exp y - 1)"""
    return y + jnp.log(-jnp.expm1(-y))


# twin: td3_jax sac_jax mpo_jax
def polyak(target: Network, network: Network, tau: float) -> Network:
    """θ' ← τ θ + (1 - τ) θ'"""
    return jax.tree.map(lambda old, new: (1 - tau) * old + tau * new, target, network)


# ---------------------------------------------------------------------------------------------------------- update


def sample_values(learner: Learner, batch: Batch, config: Config) -> Samples:
    """-> what π' does in the next states, and Q' of it"""
    policy = Gaussian(*learner.target_actor(batch.next_observations))
    actions = sample_actions(policy, batch.next_noise)  # (S, B, A)
    observations = jnp.broadcast_to(batch.next_observations, (*actions.shape[:-1], batch.observations.shape[-1]))
    q = learner.target_critics(observations, actions.clip(-1, 1)).min(0)  # (S, B)
    return Samples(policy, actions, jnp.stack([q, -action_cost(actions)] if config.action_penalty else [q]))


def critic_gradient(learner: Learner, batch: Batch, samples: Samples, config: Config) -> tuple[Critics, Tensor, Tensor]:
    """-> gradient of the critics' loss, the loss, mean Q"""
    targets = critic_targets(batch.rewards, batch.terminated, samples.values[0], config.gamma)

    def loss_of(critics: Critics) -> tuple[Tensor, Tensor]:
        q = critics(batch.observations, batch.actions)
        return critic_loss(q, targets), q.mean()

    (loss, q_mean), gradient = jax.value_and_grad(loss_of, has_aux=True)(learner.critics)
    return gradient, loss, q_mean


def solve_by_newton(learner: Learner, values: Tensor, config: Config) -> Learner:
    """To the optimum of each objective's dual, values (K, S, B)"""
    optimal = map(optimal_temperature, values, epsilons(config), positive(learner.temperatures))
    return learner._replace(temperatures=before_positive(jnp.stack(list(optimal))))


def solve_by_slsqp(learner: Learner, values: Tensor, config: Config) -> Learner:
    """To the optimum on the host, by scipy's sequential least squares, which asks JAX for g and its gradient

    Its tolerance is absolute: so it gets η and g in units in which both are near 1 (and η* at most 1).
    """
    minimize = importlib.import_module("scipy.optimize").minimize  # comes with JAX; only this solver needs it

    def optimal(start: float, values: Tensor, epsilon: float) -> float:
        def dual(scaled: np.ndarray) -> tuple[float, float]:
            return tuple(float(x) / epsilon for x in compiled_dual(scaled[0], scaled_values, epsilon))

        unit = float(compiled_largest(values, epsilon))
        scaled_values, bounds = minus_best(values) / unit, [(MIN_DUAL / unit, None)]
        found = minimize(dual, min(start / unit, 1), jac=True, method="SLSQP", bounds=bounds, options={"ftol": 1e-9})
        return found.x[0] * unit

    starts = np.asarray(positive(learner.temperatures))
    temperatures = list(map(optimal, starts.tolist(), values, epsilons(config)))
    return learner._replace(temperatures=before_positive(jnp.array(temperatures, starts.dtype)))


def solve_by_adam(learner: Learner, values: Tensor, config: Config) -> Learner:
    """One step of descent on the sum of the duals"""

    def loss_of(temperatures: Tensor) -> Tensor:
        return sum(map(temperature_dual, positive(temperatures), map(minus_best, values), epsilons(config)))

    learner = descend(learner, "temperatures", jax.grad(loss_of)(learner.temperatures), config.dual_lr)
    return learner._replace(temperatures=bounded(learner.temperatures))


SOLVERS = {"newton": solve_by_newton, "slsqp": solve_by_slsqp, "adam": solve_by_adam}


def epsilons(config: Config) -> tuple[float, ...]:
    """Of the objectives"""
    return (config.epsilon, config.epsilon_penalty) if config.action_penalty else (config.epsilon,)


def bounded(duals):
    """At least MIN_DUAL, as in Acme: those of slack constraints would go ever further down. (The way back from there is
    slow: their gradients are small beside Adam's epsilon.)"""
    return jax.tree.map(lambda x: jnp.maximum(x, math.log(MIN_DUAL)), duals)


def divergences(policy: Gaussian, target: Gaussian, config: Config) -> Multipliers:
    """The KLs that are held to their ε: mean over states, of each dimension (A,) or of their sum ()"""
    kls = Multipliers(kl_mean(policy, target), kl_cov(policy, target))
    return jax.tree.map(lambda kl: kl.mean(0) if config.per_dim_kl else kl.sum(-1).mean(), kls)


def actor_gradient(
    learner: Learner, batch: Batch, samples: Samples, config: Config
) -> tuple[Network, Tensor, Gaussian]:
    """-> gradient of the policy's loss, the loss, π(·|s'). The weights of the objectives add up, as in Acme."""
    weights = sum(map(sample_weights, positive(learner.temperatures), samples.values))  # (S, B)
    alphas = jax.tree.map(positive, learner.multipliers)

    def loss_of(actor: Network) -> tuple[Tensor, Gaussian]:
        policy = Gaussian(*actor(batch.next_observations))
        kls = divergences(policy, samples.target, config)
        penalty = (alphas.mean * kls.mean).sum() + (alphas.cov * kls.cov).sum()
        return actor_loss(weights, samples.actions, policy, samples.target) + penalty, policy

    (loss, policy), gradient = jax.value_and_grad(loss_of, has_aux=True)(learner.actor)
    return gradient, loss, policy


def multipliers_gradient(
    learner: Learner, policy: Gaussian, samples: Samples, config: Config
) -> tuple[Multipliers, Multipliers]:
    """-> gradient of the multipliers' loss, the KLs"""
    kls = divergences(policy, samples.target, config)
    limits = Multipliers(config.epsilon_mean, config.epsilon_cov)
    return jax.grad(multipliers_loss)(learner.multipliers, kls, limits), kls


def policy_metrics(
    learner: Learner, policy: Gaussian, samples: Samples, kls: Multipliers, config: Config
) -> tuple[Tensor, ...]:
    """The fields of Metrics from the temperature on"""
    temperature = positive(learner.temperatures[0])
    error = jnp.abs(temperature / optimal_temperature(samples.values[0], config.epsilon, temperature) - 1)
    alphas = jax.tree.map(positive, learner.multipliers)
    means = map(jnp.mean, (*kls, *alphas, policy.stds, action_cost(samples.actions)))
    return temperature, error, *means


begin_adam = optax.adam(0.0).init  # moments alone: each step brings its learning rate


# twin: td3_jax sac_jax mpo_jax
def descend(learner: Learner, name: str, gradient: Network | Tensor, learning_rate: float) -> Learner:
    """One step of Adam on this field of the learner"""
    changes, optimizer = optax.adam(learning_rate).update(gradient, getattr(learner.optimizer, name))
    updated = optax.apply_updates(getattr(learner, name), changes)
    return learner._replace(**{name: updated, "optimizer": learner.optimizer._replace(**{name: optimizer})})


def update_multipliers(learner: Learner, gradient: Multipliers, config: Config) -> Learner:
    learner = descend(learner, "multipliers", gradient, config.dual_lr)
    return learner._replace(multipliers=bounded(learner.multipliers))


# twin: td3_jax mpo_jax
def update_targets(learner: Learner, config: Config) -> Learner:
    target_actor = polyak(learner.target_actor, learner.actor, config.tau)
    target_critics = polyak(learner.target_critics, learner.critics, config.tau)
    return learner._replace(target_actor=target_actor, target_critics=target_critics)


def update_minibatch(learner: Learner, batch: Batch, config: Config, timed: Callable) -> tuple[Learner, Metrics]:
    """Policy evaluation, E-step and M-step (REPI algorithm 1) on a batch without the axis U

    `timed(phase, function, *arguments)` is function(*arguments), clocked as that phase where the update is not fused.
    """

    def timed_loss(part: str, *call):
        """Clocked twice: as the loss and as a part of it"""
        return timed("loss", timed, f"loss/{part}", *call)

    batch = timed("sample", jax.device_put, batch)  # once, and not in the clock of the loss
    samples = timed_loss("critic", sample_values, learner, batch, config)  # for the weights as well
    gradient, critics_loss, q_mean = timed_loss("critic", critic_gradient, learner, batch, samples, config)
    learner = timed("weight_update", descend, learner, "critics", gradient, config.q_lr)
    learner = timed_loss("dual", SOLVERS[config.temperature_solver], learner, samples.values, config)
    gradient, policy_loss, policy = timed_loss("actor", actor_gradient, learner, batch, samples, config)
    learner = timed("weight_update", descend, learner, "actor", gradient, config.policy_lr)
    gradient, kls = timed("kl", multipliers_gradient, learner, policy, samples, config)
    measures = timed("kl", policy_metrics, learner, policy, samples, kls, config)
    learner = timed("weight_update", update_multipliers, learner, gradient, config)
    learner = timed("target_update", update_targets, learner, config)
    return learner, Metrics(critics_loss, q_mean, policy_loss, *measures)


# twin: td3_jax sac_jax mpo_jax
def update(learner: Learner, batch: Batch, config: Config, timed: Callable) -> tuple[Learner, Tensor]:
    """U updates -> learner, Metrics as an array (·, U)"""
    return each(partial(update_minibatch, config=config, timed=timed), learner, batch)


# --------------------------------------------------------------------------------------------------------- rollout


# twin: sac_jax mpo_jax
def act(actor: Network, observations: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """(N, O), (N, A) -> (N, A), greedily without noise"""
    return np.asarray(compiled_policy(actor, observations, noise))


# twin: sac_jax mpo_jax
def explore(
    actor: Network, observations: np.ndarray, action_dim: int, step: int, config: Config, rng: np.random.Generator
) -> np.ndarray:
    """(N, O) -> (N, A): uniform until learning starts, then drawn from the policy"""
    shape = len(observations), action_dim
    if step < config.learning_starts:
        return rng.uniform(-1, 1, shape).astype(np.float32)
    return act(actor, observations, rng.standard_normal(shape, np.float32))


# twin: td3_jax sac_jax mpo_jax
def interact(
    actor: Network,
    envs: "Environments",
    buffer: "ReplayBuffer",
    step: int,
    config: Config,
    rng: np.random.Generator,
    timed: Callable,
) -> None:
    """One step of all environments, into the replay buffer"""
    observations = envs.observations
    actions = timed("forward", explore, actor, observations, envs.action_dim, step, config, rng)
    if not np.isfinite(actions).all():
        raise TrainingFailed(f"the policy gives an action that is not finite at step {step}")
    next_observations, rewards, terminated, truncated, final_observations = timed("step", envs.step, actions)
    check_finite(config.env_id, observation=next_observations, reward=rewards, final_observation=final_observations)
    transition = observations, actions, rewards, terminated, truncated, next_observations, final_observations
    timed("sample", buffer.add, *transition)


# twin: td3_jax sac_jax mpo_jax
def num_updates(step: int, config: Config) -> int:
    """Updates of the run until this environment step"""
    start = math.ceil(config.learning_starts / config.vector_step) * config.vector_step
    transitions = max(step - start, 0) // config.action_repeat
    return math.floor(config.updates_per_step * transitions + 1e-6)  # a product such as 0.7 · 10 may be 6.999…


def sample_batch(buffer: "ReplayBuffer", updates: range, config: Config, rng: np.random.Generator) -> Batch:
    """For so many updates"""
    transitions = buffer.sample((len(updates), config.batch_size), rng)
    shape = len(updates), config.num_action_samples, *transitions["actions"].shape[1:]
    return Batch(**transitions, next_noise=rng.standard_normal(shape, np.float32))


# ----------------------------------------------------------------------------------------------------------- train


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
class Result(NamedTuple):
    learner: Learner
    evaluation_returns: list[float]  # of each episode
    run_dir: Path


# twin: td3_jax sac_jax mpo_jax
def train(config: Config) -> Result:
    """The whole run. Raises BadInput before training, TrainingFailed where it cannot go on, and SystemExit after
    SIGINT or SIGTERM, once a checkpoint is written."""
    config = validate(config)
    if config.capture_video:
        make_vector(config, 1, is_evaluation=True).close()  # raises BadInput where nothing can be filmed
    with contextlib.closing(Environments(config, config.num_envs)) as envs:
        learner, rng = new_learner(envs, config), np.random.default_rng(config.seed)
        buffer = ReplayBuffer(config, config.num_envs, envs.observation_dim, envs.action_dim)
        if config.load_model and not has_checkpoint(config):
            learner = load_model(config.load_model, learner)
        stopwatch = new_stopwatch()
        with Run(config, envs, stopwatch, algorithm=ALGORITHM, device=device_name(learner)) as run:
            learner = run.restore(learner, rng, buffer)
            stopwatch.timed("compile", warm_up, learner, envs, config, stopwatch)
            for iteration in run.iterations():
                metrics = []
                for step in range(run.global_step - config.iteration_steps, run.global_step, config.vector_step):
                    interact(learner.actor, envs, buffer, step, config, rng, stopwatch.timed)
                    updates = range(num_updates(step, config) + 1, num_updates(step + config.vector_step, config) + 1)
                    if not updates:
                        continue
                    batch = stopwatch.timed("sample", sample_batch, buffer, updates, config, rng)
                    if run.is_timed(iteration):  # the same update, phase by phase or in one compiled call
                        learner, values = update(learner, batch, config, stopwatch.timed)
                    else:
                        learner, values = stopwatch.timed("update", update, learner, batch, config, stopwatch.fused)
                    metrics.append(values)
                means = mean_metrics(metrics)
                run.check(means)
                if run.is_due(config.eval_interval):
                    run.evaluate(partial(act, learner.actor))
                run.record(means, partial(histogram_samples, learner, buffer, config))
                if run.is_due(config.checkpoint_every):
                    run.save_checkpoint(learner)
                    # simulators are not saved: new episodes, here as in a run that is resumed here
                    stopwatch.timed("checkpoint", envs.restart, run.global_step)
                    buffer.end_episodes()
            returns = run.conclude(partial(act, learner.actor), learner)
    return Result(learner, returns, run.directory)


# ------------------------------------------------------------------------------------------------------------- jax


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def set_up_jax(config: Config) -> None:
    """Raises BadInput for a device that is not there."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # handing 20 µs of work to a thread costs 20 µs more
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 on a GPU, as PyTorch's; JAX would take TF32
    available = {}
    for platform_name in ("gpu", "tpu", "cpu"):
        with contextlib.suppress(RuntimeError):
            available[platform_name] = jax.devices(platform_name)[0]
    if config.device not in ("auto", *available):
        raise BadInput(f"--device {config.device} is not there; this machine has {' and '.join(available)}")
    jax.config.update("jax_default_device", available.get(config.device))  # None: JAX chooses


def new_learner(envs: "Environments", config: Config) -> Learner:
    set_up_jax(config)
    actor_key, critics_key = jax.random.split(jax.random.key(config.seed))
    observations, actions = jnp.zeros((1, envs.observation_dim)), jnp.zeros((1, envs.action_dim))
    actor = Network.create(Actor(config.hidden_sizes, envs.action_dim), actor_key, observations)
    critic_keys = jax.random.split(critics_key, config.num_critics)
    critics = Critics.create(Critic(config.hidden_sizes), critic_keys, observations, actions)
    temperatures = before_positive(jnp.full(len(epsilons(config)), INITIAL_TEMPERATURE, jnp.float32))
    shape = (envs.action_dim,) if config.per_dim_kl else ()
    alphas = (jnp.full(shape, alpha, jnp.float32) for alpha in (INITIAL_ALPHA_MEAN, INITIAL_ALPHA_COV))
    multipliers = Multipliers(*map(before_positive, alphas))
    is_learned = config.temperature_solver == "adam"
    moments = (*map(begin_adam, (actor, critics, multipliers)), begin_adam(temperatures) if is_learned else ())
    return Learner(actor, critics, *copied((actor, critics)), temperatures, multipliers, Optimizers(*moments))


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def device_name(learner: Learner) -> str:
    (device,) = jax.tree.leaves(learner)[0].devices()
    return device.platform if device.platform == "cpu" else f"{device.platform} ({device.device_kind})"


def new_stopwatch() -> "Stopwatch":
    static, donated = {"static_argnames": "config"}, {"donate_argnames": "learner"}
    whole = jax.jit(update, static_argnames=("config", "timed"), **donated)

    def compiled_update(learner: Learner, batch: Batch, config: Config, timed: Callable) -> tuple[Learner, Tensor]:
        """In one piece, but around a solver on the host in compiled pieces"""
        return (update if config.temperature_solver == "slsqp" else whole)(learner, batch, config, timed)

    gradients = critic_gradient, actor_gradient, multipliers_gradient
    steps = solve_by_newton, solve_by_adam, update_multipliers, update_targets
    compiled = {f: jax.jit(f, **static) for f in (sample_values, *gradients, policy_metrics)}
    compiled[descend] = jax.jit(descend, static_argnames=("name", "learning_rate"), **donated)
    compiled |= {f: jax.jit(f, **static, **donated) for f in steps} | {update: compiled_update}
    return Stopwatch(jax.block_until_ready, compiled)


# twin: td3_jax sac_jax mpo_jax
def warm_up(learner: Learner, envs: "Environments", config: Config, stopwatch: "Stopwatch") -> None:
    """Compiles what is to be compiled, by updates in either form on zeros; the weights stay as they are."""
    if config.eval_episodes:
        act(learner.actor, np.zeros((config.eval_episodes, envs.observation_dim), np.float32))
    if not config.num_iterations:
        return
    rng, observations = np.random.default_rng(0), np.zeros((config.num_envs, envs.observation_dim), np.float32)
    explore(learner.actor, observations, envs.action_dim, config.learning_starts, config, rng)
    capacity = min(config.buffer_size, config.iteration_steps // config.action_repeat)
    one_iteration = dataclasses.replace(config, buffer_size=capacity)
    buffer = ReplayBuffer(one_iteration, config.num_envs, envs.observation_dim, envs.action_dim)
    buffer.num_transitions = buffer.num_places - config.num_envs  # zeros, as many as an iteration gives
    histogram_samples(learner, buffer, config)
    updates_at_once = config.updates_per_step * config.num_envs
    for count in {math.floor(updates_at_once), math.ceil(updates_at_once)} - {0}:
        batch = sample_batch(buffer, range(count), config, rng)  # TD3's policy moves in update 0
        stopwatch.fused(None, update, copied(learner), batch, config, stopwatch.fused)
    update(copied(learner), batch, config, Stopwatch(stopwatch.fence, stopwatch.compiled).timed)


@jax.jit
def compiled_policy(actor: Network, observations: np.ndarray, noise: np.ndarray | float) -> Tensor:
    return sample_actions(Gaussian(*actor(observations)), noise).clip(-1, 1)


compiled_dual = jax.jit(jax.value_and_grad(temperature_dual))  # -> the dual, its derivative
compiled_largest = jax.jit(largest_temperature)


# twin: td3_jax sac_jax mpo_jax
@jax.jit
def compiled_call(network: Network, *inputs: np.ndarray) -> Tensor:
    return network(*inputs)


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def is_traced(x: Tensor) -> bool:
    """Whether compiled code is being made, in which a loop is a jax.lax.scan."""
    return isinstance(x, jax.core.Tracer)


# twin: td3_jax sac_jax mpo_jax
def each(step: Callable, learner: Learner, batch: Batch) -> tuple[Learner, Tensor]:
    """jax.lax.scan over U where JAX traces, and else the same as a loop, whose steps are calls that can be timed.

    Metrics come as one array (·, U), which a call returns faster than several.
    """
    if is_traced(batch.rewards):
        learner, metrics = jax.lax.scan(step, learner, batch)
        return learner, jnp.stack(metrics)
    metrics = []
    for minibatch in map(Batch, *batch):
        learner, values = step(learner, minibatch)
        metrics.append([np.asarray(x) for x in values])
    return learner, np.array(metrics).T


# twin: sac_jax mpo_jax
def mean_metrics(arrays: list[Tensor]) -> dict[str, float]:
    """losses/… of the record over the updates of an iteration, {} before the first"""
    if not arrays:
        return {}
    means = np.concatenate(jax.device_get(arrays), -1).mean(-1)
    return {f"losses/{name}": float(mean) for name, mean in zip(Metrics._fields, means, strict=True)}


# twin: td3_jax sac_jax mpo_jax
def copied(tree):
    return jax.tree.map(jnp.copy, tree)


# twin: td3_jax sac_jax mpo_jax
def histogram_samples(learner: Learner, buffer: "ReplayBuffer", config: Config) -> dict[str, np.ndarray]:
    """What the record has a histogram of: the actions of this iteration and Q of them"""
    newest = buffer.newest(config.iteration_steps // config.action_repeat)
    actions, values = newest["actions"], compiled_call(learner.critics, newest["observations"], newest["actions"])
    return {"actions": actions, "values": np.asarray(values)}


# twin: td3_jax sac_jax mpo_jax
def to_numpy(learner: Learner) -> dict[str, np.ndarray]:
    """Weights by torch's names, in its layout (out, in), and the optimizers' moments"""
    return {array_name(path): as_torch(path, np.asarray(x)) for path, x in tree_leaves_with_path(learner)}


# twin: td3_jax sac_jax mpo_jax
def from_numpy(learner: Learner, arrays: dict[str, np.ndarray]) -> Learner:
    """The inverse of `to_numpy`; the optimizers stay as they are where a model has no moments for them."""

    def read(path: tuple, old: Tensor) -> Tensor:
        is_kept = array_name(path).startswith(TRAINING_ONLY) and array_name(path) not in arrays
        return old if is_kept else jnp.array(as_torch(path, arrays[array_name(path)]), old.dtype)

    return tree_map_with_path(read, learner)


# twin: td3_jax sac_jax mpo_jax
def array_name(path: tuple) -> str:
    """Such as target_critics.0.weight or optimizer.actor.0.mu.2.bias"""
    return jax.tree_util.keystr(path, simple=True, separator=".").replace("params.", "").replace("kernel", "weight")


# twin: td3_jax sac_jax mpo_jax
def as_torch(path: tuple, x: np.ndarray) -> np.ndarray:
    """Between flax's kernels (in, out) and torch's weights (out, in), either way"""
    return x.swapaxes(-1, -2) if array_name(path).endswith("weight") else x


# --------------------------------------------------------------------------------------------------- replay buffer


# twin: td3_jax sac_jax mpo_jax
class ReplayBuffer:
    """The last transitions, in a ring of places.

    Those of one step of the N environments stand side by side. So the next observation of a transition is the
    observation N places further on and is not stored again, but for the last one of an episode that was truncated.
    (Where an episode terminated, the next one's first observation stands there, which the targets ignore.)
    """

    def __init__(self, config: Config, num_envs: int, observation_dim: int, action_dim: int):
        transitions = min(config.buffer_size, config.total_timesteps // config.action_repeat)
        self.num_envs, self.num_places = num_envs, (transitions // num_envs + 1) * num_envs
        shapes = {"observations": (observation_dim,), "actions": (action_dim,), "rewards": ()}
        size = self.num_places * (4 * (observation_dim + action_dim + 1) + 2)  # bytes
        size *= 3  # safetensors makes two copies of what it writes; a signal writes a checkpoint in any case
        available = psutil.virtual_memory().available
        if size > available:
            what = f"--buffer-size {config.buffer_size}: replay buffer and checkpoints would take {size / 1e9:.1f} GB"
            raise BadInput(f"{what} of the {available / 1e9:.1f} GB that are free")
        self.arrays = {name: np.zeros((self.num_places, *shape), np.float32) for name, shape in shapes.items()}
        self.arrays |= {name: np.zeros(self.num_places, bool) for name in ("terminated", "truncated")}
        self.final_observations: dict[int, np.ndarray] = {}  # by the place of the transition
        self.position = self.num_transitions = 0  # where the next ones go; how many there are

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        next_observations: np.ndarray,
        final_observations: np.ndarray,
    ) -> None:
        """Of one step: (N, ·) each, and the true last observations of the truncated episodes"""
        here = slice(self.position, self.position + self.num_envs)
        fields = observations, actions, rewards, terminated, truncated
        for array, values in zip(self.arrays.values(), fields, strict=True):
            array[here] = values
        for place in self.final_observations.keys() & set(range(here.start, here.stop)):
            del self.final_observations[place]
        places = (here.start + np.flatnonzero(truncated)).tolist()
        self.final_observations |= zip(places, final_observations, strict=True)
        self.position = here.stop % self.num_places
        self.arrays["observations"][self.position : self.position + self.num_envs] = next_observations
        self.num_transitions = min(self.num_transitions + self.num_envs, self.num_places - self.num_envs)

    def end_episodes(self) -> None:
        """The environments begin anew: whatever episode is under way was truncated."""
        if not self.num_transitions:
            return
        for n in range(self.num_envs):
            place = (self.position - self.num_envs + n) % self.num_places
            if not (self.arrays["terminated"][place] or self.arrays["truncated"][place]):
                self.arrays["truncated"][place] = True
                self.final_observations[place] = self.arrays["observations"][self.position + n].copy()

    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Transitions drawn evenly, with replacement; (*shape, ·) each"""
        places = (self.position - 1 - rng.integers(self.num_transitions, size=shape)) % self.num_places
        sample = {name: array.take(places, 0) for name, array in self.arrays.items()}
        next_observations = self.arrays["observations"].take(places + self.num_envs, 0, mode="wrap")
        for index in zip(*np.nonzero(sample.pop("truncated")), strict=True):
            next_observations[index] = self.final_observations[places[index]]
        return sample | {"next_observations": next_observations}

    def newest(self, count: int) -> dict[str, np.ndarray]:
        places = self.position - 1 - np.arange(min(count, self.num_transitions))
        return {name: array.take(places, 0, mode="wrap") for name, array in self.arrays.items()}

    def to_numpy(self) -> dict[str, np.ndarray]:
        filled = self.num_transitions + self.num_envs  # the observations after the newest transitions stand behind them
        arrays = {name: array[:filled] for name, array in self.arrays.items()}
        places, final_observations = list(self.final_observations), list(self.final_observations.values())
        arrays |= {"final_places": np.array(places, int), "final_observations": np.array(final_observations)}
        arrays["progress"] = np.array([self.position, self.num_transitions])
        return {f"buffer.{name}": array for name, array in arrays.items()}

    def from_numpy(self, arrays: dict[str, np.ndarray]) -> None:
        for name, array in self.arrays.items():
            saved = arrays[f"buffer.{name}"]
            array[: len(saved)] = saved
        places = arrays["buffer.final_places"].tolist()
        self.final_observations = dict(zip(places, arrays["buffer.final_observations"], strict=True))
        self.position, self.num_transitions = arrays["buffer.progress"].tolist()
        self.end_episodes()


# ---------------------------------------------------------------------------------------------------- environments


# twin: td3_jax sac_jax mpo_jax
class Environments:
    """N environments that reset in the very step that ends an episode; adds up returns."""

    def __init__(self, config: Config, num_envs: int, is_evaluation: bool = False):
        self.config, self.num_envs, self.is_evaluation, self.is_fresh = config, num_envs, is_evaluation, True
        self.vector = make_vector(config, num_envs, is_evaluation)
        (self.observation_dim,) = self.vector.single_observation_space.shape
        self.action_dim = math.prod(self.vector.single_action_space.shape)

    # twin: td3_jax sac_jax mpo_jax vpg_torch
    def restart(self, *seed: int) -> None:
        """First episodes in environments made anew, so that the seed alone decides what follows."""
        if not self.is_fresh:
            self.close()
            self.vector = make_vector(self.config, self.num_envs, self.is_evaluation)
        self.is_fresh = False
        seed = np.random.SeedSequence([self.config.seed, *seed]).generate_state(1)[0] >> 1
        observations, _ = call_environments(self.vector, self.config.env_id, "reset", seed=int(seed))
        self.returns, self.lengths = np.zeros((2, self.num_envs))
        self.observations, self.episodes = observations.astype(np.float32), []
        check_finite(self.config.env_id, observation=self.observations)

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
    def close(self) -> None:
        try:
            self.vector.close()
        except Exception:  # a worker is gone; the others would outlive this process: they do not heed SIGTERM
            for process in getattr(self.vector, "processes", ()):
                process.kill()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(N, A) -> observations, rewards, terminated, truncated, true last observations of truncated episodes"""
        env_actions = environment_actions(actions, self.vector.single_action_space)
        stepped = call_environments(self.vector, self.config.env_id, "step", env_actions)
        observations, rewards, terminated, truncated, info = stepped
        self.returns += rewards
        self.lengths += self.config.action_repeat
        truncated, final_observations = truncated & ~terminated, ()
        if "final_obs" in info:
            done = terminated | truncated
            self.episodes += [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in np.flatnonzero(done)]
            self.returns[done] = self.lengths[done] = 0
            final_observations = tuple(info["final_obs"][truncated])
        final_observations = np.array(final_observations, np.float32).reshape(-1, self.observation_dim)
        self.observations = observations.astype(np.float32)
        return self.observations, rewards, terminated, truncated, final_observations

    def for_evaluation(self) -> "Environments":
        return Environments(self.config, self.config.eval_episodes, is_evaluation=True)

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
    def pop_episodes(self) -> list[tuple[int, float, int]]:
        """(environment, return, length) of the episodes that ended since the last call"""
        episodes, self.episodes = self.episodes, []
        return episodes

    def frame(self) -> np.ndarray:
        """Picture of the first environment, (height, width, 3)"""
        return self.vector.envs[0].render()


# twin: td3_jax sac_jax mpo_jax
def make_vector(config: Config, num_envs: int, is_evaluation: bool) -> gym.vector.VectorEnv:
    is_filmed, mode = is_evaluation and config.capture_video, {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        kwargs = json.loads(config.env_kwargs)
        if is_filmed:
            importlib.import_module("moviepy")  # missed now, not after the training
        kwargs |= {"render_mode": "rgb_array"} if is_filmed else {}
        make = partial(make_env, config.env_id, kwargs, config.action_repeat)
        is_auto = config.vectorization == "auto" and num_envs > 1 and not is_evaluation
        if (config.vectorization == "async" and not is_evaluation) or (is_auto and async_pays(make, num_envs)):
            multiprocessing.set_forkserver_preload([FRAMEWORK, "gymnasium", "tyro", "wandb"])  # not once a worker
            with contextlib.ExitStack() as stack:
                with signals_held():  # a worker that finds its parent gone prints a traceback
                    vector = AsyncVectorEnv([make] * num_envs, context="forkserver", **mode)  # a fork copies held locks
                    stack.enter_context(contextlib.closing(vector))  # after a signal
                stack.pop_all()
                return vector
        vector = SyncVectorEnv([make] * num_envs, copy=False, **mode)
        if is_filmed:
            vector.reset()
            if vector.render()[0] is None:
                raise ValueError("it renders no picture")
        return vector
    except Exception as error:
        is_missing = isinstance(error, (ImportError, DependencyNotInstalled))
        flags = f"--env-id {config.env_id} --env-kwargs {config.env_kwargs}" + " --capture-video" * is_filmed
        hint = "; pip install -r requirements/all.txt" if is_missing and ":" not in config.env_id else ""
        raise BadInput(f"{flags}: {one_line(error)}{hint}") from error


# twin: td3_jax sac_jax mpo_jax
def make_env(env_id: str, kwargs: dict, action_repeat: int) -> gym.Env:
    if multiprocessing.parent_process():  # signals reach all processes; the parent alone ends the run
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if env_id.startswith("dm_control/"):
        gym.register_envs(importlib.import_module("shimmy"))
    quieten_mujoco(env_id)
    env = gym.make(env_id, **kwargs)
    actions, observations = env.action_space, env.observation_space
    is_float_box = isinstance(actions, spaces.Box) and np.issubdtype(actions.dtype, np.floating)
    if not (is_float_box and actions.is_bounded() and (actions.low < actions.high).all()):
        raise ValueError(f"the action space {actions} is not supported; a float Box with finite bounds is")
    is_image = isinstance(observations, spaces.Box) and observations.dtype == np.uint8 and len(observations.shape) > 1
    if is_image or not observations.is_np_flattenable or isinstance(observations, spaces.Text):
        raise ValueError(f"the observation space {observations} is not supported; what flattens to a vector is")
    if isinstance(observations, spaces.Box) and len(observations.shape) == 1:
        env = gym.wrappers.TransformObservation(env, np.copy, observations)  # a reset may write over an episode's last
    else:
        env = gym.wrappers.FlattenObservation(env)
    return gym.wrappers.RepeatAction(env, action_repeat) if action_repeat > 1 else env


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
@cache
def quieten_mujoco(env_id: str) -> None:
    """MuJoCo repeats its notes on Gymnasium's models at each making and keeps them in MUJOCO_LOG.TXT; once will do."""
    spec = gym.registry.get(env_id)
    if spec and "gymnasium.envs.mujoco" in str(spec.entry_point):
        importlib.import_module("mujoco").set_mju_user_warning(cache(warn))


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end, and not at all in processes that are started meanwhile."""
    held, is_main = [], threading.current_thread() is threading.main_thread()
    numbers = STOP_SIGNALS if is_main else ()
    resource_tracker.ensure_running()  # it unblocks them when it starts
    handlers = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def async_pays(make: Callable[[], gym.Env], num_envs: int) -> bool:
    """Whether processes save more than the 40 µs an environment that talking to them costs."""
    with contextlib.closing(SyncVectorEnv([make], autoreset_mode=AutoresetMode.SAME_STEP)) as vector:
        vector.reset(seed=0)
        actions = vector.action_space.sample()
        seconds = min(timeit.repeat(lambda: vector.step(actions), number=1, repeat=20))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # a job's own
    return seconds * (num_envs - math.ceil(num_envs / cores)) > 40e-6 * num_envs


# twin: td3_jax sac_jax mpo_jax
def environment_actions(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    """(N, A) in [-1, 1] -> what the environments take, each dimension from its low to its high"""
    middle, half = space.high / 2 + space.low / 2, space.high / 2 - space.low / 2  # neither overflows
    scaled = middle + half * actions.reshape(-1, *space.shape).clip(-1, 1)
    return scaled.clip(space.low, space.high).astype(space.dtype)


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def call_environments(vector: gym.vector.VectorEnv, env_id: str, name: str, *arguments, **options):
    """`step` or `reset` of all environments. One whose process hangs or dies is told apart from one that raises."""
    try:
        if not isinstance(vector, AsyncVectorEnv):
            return getattr(vector, name)(*arguments, **options)
        try:
            getattr(vector, f"{name}_async")(*arguments, **options)
            result = getattr(vector, f"{name}_wait")(timeout=LONGEST_STEP)
            if name == "step" and result[1].ndim != 1:  # AsyncVectorEnv stacks whatever came
                raise ValueError(f"a reward of shape {result[1].shape[1:]} is not a number")
            return result
        except (ConnectionError, EOFError, multiprocessing.TimeoutError) as error:
            for process in vector.processes:
                process.kill()
            vector.closed = True  # to close it would be to wait for an answer
            raise TrainingFailed(f"{env_id}: a process died or hangs in a {name} ({one_line(error)})") from error
    except Exception as error:
        error.add_note(f"in the {name} of {env_id}")
        raise


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def check_finite(env_id: str, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if array.dtype != np.uint8 and not np.isfinite(array).all():
            raise TrainingFailed(f"{env_id}: the {name.replace('_', ' ')} is not finite")


# twin: ppo_torch ppo_mlx ppo_jax td3_jax sac_jax mpo_jax vpg_torch
def evaluate(
    act: Callable, trained: Environments, video: Path | None = None, is_stopped: Callable = lambda: False
) -> list[float]:
    """Returns of the first episode in each of E fresh environments, greedily; nothing is learned from them."""
    first_returns, frames = {}, []
    with contextlib.closing(trained.for_evaluation()) as envs:
        envs.restart(0, 1)  # the same episodes in every evaluation, none of them of training
        for _ in range(LONGEST_EVALUATION):
            if video and 0 not in first_returns and len(frames) < LONGEST_FILM:
                frames.append(envs.frame())
            envs.step(act(envs.observations))
            ended = {n: episode_return for n, episode_return, _ in envs.pop_episodes()}
            returns = np.array([*envs.returns, *ended.values()])
            check_finite(envs.config.env_id, observation=envs.observations, reward=returns)
            if is_stopped():
                return []
            first_returns = ended | first_returns
            if len(first_returns) == envs.num_envs:
                break
        else:
            warn(f"{envs.num_envs - len(first_returns)} evaluation episodes did not end, and do not count")
    if frames:
        clip = importlib.import_module("moviepy").ImageSequenceClip(frames, fps=30)
        try:
            video.parent.mkdir(exist_ok=True)
            clip.write_videofile(str(video), logger=None)
        except OSError as error:  # which is no reason to lose a run
            warn(f"no film of step {video.stem.removeprefix('step_')}: {one_line(error)}")
    return list(first_returns.values())


# ------------------------------------------------------------------------------------------------- stopwatch and run

OUTSIDE = ("compile", "evaluation", "checkpoint", "probe")  # phases that are in no iteration
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LONGEST_STEP = 600  # seconds of a step or a reset in a process of its own, which hangs if it takes longer
LONGEST_EVALUATION = 100_000  # steps; an episode that goes on for longer is left out
LONGEST_FILM = 2000  # frames, which stay in memory until it is written: 1.4 GB of MuJoCo's
SECONDS_TO_WRITE_A_ROW = 5  # W&B's server writes what it got once a second, and does not when it is left alone
SECONDS_OF_A_ROW = 0.2  # of iterations, at least: a row with its histograms costs up to 4 ms
TRAINING_ONLY = ("optimizer.", "buffer.")  # arrays of a checkpoint that a model does not need


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
class Stopwatch:
    """Seconds per phase, read after a fence. The phases partition an iteration, but for those OUTSIDE of it; a phase
    with a slash is part of another."""

    def __init__(self, fence: Callable[[object], object], compiled: dict[Callable, Callable]):
        self.fence, self.compiled = fence, compiled  # the fence waits for a result; what runs in place of a function
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.lap_start = time.perf_counter()

    def timed(self, phase: str | None, function: Callable, *arguments, weight: float = 1):
        """Phase None: the function clocks phases of its own, so `fused` alone may put compiled code in its place."""
        if phase is None:
            return function(*arguments)
        start = time.perf_counter()
        result = self.compiled.get(function, function)(*arguments)
        self.fence(result)
        self.seconds[phase] += weight * (time.perf_counter() - start)
        self.calls[phase] += 1
        return result

    def fused(self, phase: str | None, function: Callable, *arguments):
        """Clocks and waits for nothing, so that phases may run into one another."""
        return self.compiled.get(function, function)(*arguments)

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, of the whole `iteration`, and of its `other` rest."""
        now, seconds = time.perf_counter(), {"record": 0.0} | self.seconds
        inside = sum(value for phase, value in seconds.items() if phase not in OUTSIDE and "/" not in phase)
        seconds["iteration"] = now - self.lap_start - sum(seconds.get(phase, 0) for phase in OUTSIDE)
        seconds["other"] = seconds["iteration"] - inside
        self.seconds.clear()
        self.calls.clear()
        self.lap_start = now
        return seconds


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
class Run:
    """A run's directory, W&B record, progress bar, checkpoints and signals."""

    launcher = "python"

    def __init__(self, config: Config, envs: Environments, stopwatch: Stopwatch, **about: str):
        self.config, self.envs, self.stopwatch = config, envs, stopwatch
        if config.wandb_mode == "online" and not is_logged_in():
            raise BadInput("--wandb-mode online: no W&B key; `wandb login` stores one, and offline needs no account")
        self.directory, self.run_id = directory_of_run(config)
        self.checkpoint, progress = newest_checkpoint(self.directory, self.run_id) if config.resume else ({}, {})
        self.iteration, self.rng_state = progress.get("iteration", 0), progress.get("rng")
        if (step := progress.get("global_step", self.global_step)) != self.global_step:
            why = "it was started with other environments, steps or processes"
            what = f"its checkpoint is of step {step}, here {self.global_step}"
            raise BadInput(f"--resume {self.directory}: {what}; {why}")
        if self.iteration > config.num_iterations:
            raise BadInput(f"--total-timesteps {config.total_timesteps}: the run is at step {self.global_step} already")
        text = json.dumps(dataclasses.asdict(config) | {"resume": None, "wandb_id": self.run_id}, indent=2)
        write_whole(self.directory / "config.new", text.encode(), BadInput)
        self.recent_returns = deque(progress.get("recent_returns", ()), maxlen=100)
        self.row: defaultdict[str, list[float]] = defaultdict(list)  # of the iterations since the last row
        self.episodes, self.histograms_at, self.stop_signal = [], self.iteration, None
        versions = {name: version(name) for name in (FRAMEWORK, "gymnasium", "numpy")}
        about |= {"framework": FRAMEWORK, "versions": versions | {"python": platform.python_version()}}
        about |= {"cpu": f"{cpu_name()}, {os.cpu_count()} cores", "resumed_at": self.global_step}
        about |= {"segment": len(list(self.directory.glob("**/wandb/*run-*")))}  # in order, whatever the clock says
        if config.wandb_mode != "online":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B would call home
        with contextlib.suppress(ImportError):
            importlib.import_module("pandas")  # where it is there, W&B's first histogram would, in an iteration
        if config.wandb_mode != "disabled":
            os.environ.setdefault("WANDB_CACHE_DIR", str(self.directory.resolve() / "wandb"))  # its logs, else below ~
        try:
            if config.wandb_mode != "disabled":
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                wandb.setup()  # inherits the mask: a signal to all processes of a job leaves the record alive
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.wandb = self.open_record(dataclasses.asdict(config) | about, id=self.run_id, dir=self.directory)
        except wandb.Error as error:
            (self.directory / "config.new").unlink()
            raise BadInput(f"--wandb-mode {config.wandb_mode}: {one_line(error)}; offline needs no account") from error
        os.replace(self.directory / "config.new", self.directory / "config.json")  # now the run is there to be resumed
        self.wandb.define_metric("*", step_metric="global_step")
        self.log, self.unwritten = self.wandb.log, deque()
        for row in progress.get("rows", ()):  # which a killed run may have lost
            self.unwritten.append((time.monotonic(), row))
            self.log(row)
        steps = config.num_iterations * config.iteration_steps
        self.bar = tqdm(total=steps, initial=self.global_step, unit="step", unit_scale=True, dynamic_ncols=True)

    def open_record(self, about: dict, **where: str | Path):
        config = self.config
        return wandb.init(
            **{"project": config.wandb_project, "entity": config.wandb_entity, "mode": config.wandb_mode},
            **{"group": config.wandb_group or f"{config.env_id}__{config.exp_name}", "resume": "allow"},
            **{"name": self.directory.name, "config": about} | where,
            settings=wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=1),
        )

    def __enter__(self) -> "Run":
        is_main = threading.current_thread() is threading.main_thread()
        self.handlers = {number: signal.signal(number, self.on_signal) for number in STOP_SIGNALS} if is_main else {}
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        try:
            self.wandb.finish(exit_code=int(exception[0] not in (None, SystemExit)))
        except Exception as error:
            warn(f"the W&B record has no end: {one_line(error)}")
            with contextlib.suppress(Exception):
                wandb.teardown()  # W&B's own hook at exit would print a traceback
        gc.unfreeze()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame) -> None:
        """Ends the run after this iteration; a second signal of the same kind ends it at once."""
        self.stop_signal = number
        signal.signal(number, self.handlers[number])

    def restore(self, learner: Learner, rng: np.random.Generator, memory) -> Learner:
        """The state of the checkpoint, where there is one; `memory` has a part in it besides."""
        self.rng, self.memory = rng, memory
        arrays, self.checkpoint = self.checkpoint, {}  # which may hold a replay buffer
        if not arrays:
            return learner
        try:
            memory.from_numpy(arrays)
            rng.bit_generator.state = self.rng_state
            for name, array in to_numpy(learner).items():
                if arrays[name].shape != array.shape:
                    raise ValueError(f"{name} is {arrays[name].shape} there and {array.shape} here")
            return from_numpy(learner, arrays)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"the checkpoint is not of this run: {one_line(error)}"
            raise BadInput(f"--resume {self.directory}: {what}") from error

    def iterations(self) -> Iterator[int]:
        """Counted from 1, until the last or until a signal."""
        self.row["times/compile"].append(self.stopwatch.lap()["compile"])
        self.bar.unpause()  # its steps/s begin here too
        if self.iteration < self.config.num_iterations:
            self.stopwatch.timed("checkpoint", self.envs.restart, self.global_step)  # as after every checkpoint
        gc.freeze()  # to look through all that imports and compilers left takes 0.1 s, in the middle of some phase
        while self.iteration < self.config.num_iterations and not self.stop_signal:
            self.iteration += 1
            yield self.iteration

    @property
    def global_step(self) -> int:
        return self.iteration * self.config.iteration_steps

    def is_timed(self, iteration: int) -> bool:
        """Whether this iteration runs phase by phase."""
        return self.config.timing_interval > 0 and iteration % self.config.timing_interval == 0

    def is_due(self, interval: int) -> bool:
        """Whether this iteration reached another multiple of the interval (in steps; 0: never)."""
        before = self.global_step - self.config.iteration_steps
        is_last = self.iteration == self.config.num_iterations  # `conclude` does what is due then
        return interval > 0 and self.global_step // interval > before // interval and not is_last

    def check(self, metrics: dict[str, float]) -> None:
        # returns that are all equal have no explained variance: it may be NaN
        if not all(math.isfinite(x) or name == "losses/explained_variance" for name, x in metrics.items()):
            raise TrainingFailed(f"the loss or its gradient is not finite at step {self.global_step}")

    def record(self, metrics: dict[str, float], samples: Callable[[], dict[str, np.ndarray]]) -> None:
        """Adds an iteration to the row; a timed iteration has a row of its own."""
        episodes = self.envs.pop_episodes()
        for _, episode_return, length in episodes:
            self.add({"charts/episodic_return": episode_return, "charts/episodic_length": length})
        self.episodes += episodes
        self.recent_returns.extend(episode_return for _, episode_return, _ in episodes)
        self.add(metrics | {f"times/{phase}": seconds for phase, seconds in self.stopwatch.lap().items()})
        is_beside_timed = self.is_timed(self.iteration) or self.is_timed(self.iteration + 1)
        is_last = self.iteration == self.config.num_iterations
        is_evaluated = "charts/evaluation_return" in self.row  # of this step, and not a mean of several
        is_long = sum(self.row["times/iteration"]) >= SECONDS_OF_A_ROW
        if not (is_beside_timed or is_last or is_evaluated or is_long):
            return
        is_due = is_last or self.iteration - self.histograms_at >= self.config.num_iterations // 100
        self.stopwatch.timed("record", self.send_row, partial(self.media, samples) if is_due else dict)

    def media(self, samples: Callable[[], dict[str, np.ndarray]]) -> dict:
        _, returns, lengths = zip(*self.episodes, strict=True) if self.episodes else ((), (), ())
        self.histograms_at, self.episodes, media = self.iteration, [], {}
        episodes = {"episodic_return": np.array(returns), "episodic_length": np.array(lengths)}
        for name, x in (samples() | episodes).items():
            if x.dtype == np.uint8:
                media[f"images/{name}"] = wandb.Image(x)
            elif len(x):  # float32 in float64: np.histogram refuses values that differ by a rounding error alone
                media[f"histograms/{name}"] = wandb.Histogram(x.astype(np.float32).astype(np.float64))
        return media

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            if math.isfinite(value):  # the explained variance of constant returns is not
                self.row[key].append(value)

    def send_row(self, media: Callable[[], dict] = dict) -> None:
        if not self.row:
            return
        totals, iterations, row = {f"times/{phase}" for phase in OUTSIDE}, len(self.row.get("times/iteration", ())), {}
        for key, values in self.row.items():  # a phase may be missing in some of the iterations
            row[key] = sum(values) / (1 if key in totals else iterations if key.startswith("times/") else len(values))
        if "times/iteration" in row:
            row["charts/SPS"] = self.config.iteration_steps / row["times/iteration"]
            row["charts/iteration"] = self.iteration
        if self.recent_returns:
            row["charts/return_last_100"] = sum(self.recent_returns) / len(self.recent_returns)
            self.bar.set_postfix_str(f"return {row['charts/return_last_100']:.4g}", refresh=False)
        self.bar.update(self.global_step - self.bar.n)
        self.row.clear()
        try:
            self.unwritten.append((time.monotonic(), row | {"global_step": self.global_step}))
            while time.monotonic() - self.unwritten[0][0] > SECONDS_TO_WRITE_A_ROW:
                self.unwritten.popleft()
            self.log(row | media() | {"global_step": self.global_step})
        except Exception as error:  # a broken record must not end the training
            warn(f"the W&B record ends before step {self.global_step}: {one_line(error)}")
            self.log = lambda row: None

    def is_stopped(self) -> bool:
        return bool(self.stop_signal)

    def evaluate(self, act: Callable) -> list[float]:
        if not self.config.eval_episodes:
            return []
        video = self.directory / "videos" / f"step_{self.global_step}.mp4" if self.config.capture_video else None
        returns = self.stopwatch.timed("evaluation", evaluate, act, self.envs, video, self.is_stopped)
        self.add({"charts/evaluation_return": sum(returns) / len(returns)} if returns else {})
        return returns

    def state(self, learner: Learner) -> dict[str, np.ndarray]:
        """All that a checkpoint keeps as arrays"""
        return to_numpy(learner) | self.memory.to_numpy()

    def save_checkpoint(self, learner: Learner) -> None:
        """Keeps this checkpoint and the one before it."""
        self.stopwatch.timed("record", self.send_row)  # rows end where a resumed run may begin
        self.stopwatch.timed("checkpoint", self.write_checkpoint, learner)

    def write_checkpoint(self, learner: Learner) -> None:
        progress = {"iteration": self.iteration, "global_step": self.global_step, "rng": self.rng.bit_generator.state}
        progress |= {"recent_returns": list(self.recent_returns), "run_id": self.run_id}
        progress["rows"] = [{key: float(value) for key, value in row.items()} for _, row in self.unwritten]
        path = self.directory / "checkpoints" / f"step_{self.global_step:012d}.safetensors"
        save_arrays(path, self.state(learner), progress)
        for old in sorted(path.parent.glob("*.safetensors"))[:-2]:
            old.unlink()

    def save_model(self, directory: Path, config: Config, arrays: dict[str, np.ndarray]) -> None:
        model = {name: array for name, array in arrays.items() if not name.startswith(TRAINING_ONLY)}
        metadata = {"config": dataclasses.asdict(config), "global_step": self.global_step}
        save_arrays(directory / "model.safetensors", model, metadata)

    def conclude(self, act: Callable, learner: Learner) -> list[float]:
        """Last checkpoint, model, evaluation and a word about them; after a signal the checkpoint alone."""
        if self.stop_signal or (self.config.checkpoint_every and self.iteration):
            self.save_checkpoint(learner)
        if self.config.save_model and not self.stop_signal:
            self.stopwatch.timed("checkpoint", self.save_model, self.directory, self.config, self.state(learner))
        returns = [] if self.stop_signal else self.evaluate(act)
        if self.stop_signal:  # perhaps during the evaluation
            self.bar.close()
            print(f"stopped; go on with: {self.launcher} {sys.argv[0]} --resume {self.directory}", file=sys.stderr)
            raise SystemExit(128 + self.stop_signal)
        self.add({f"times/{phase}": seconds for phase, seconds in self.stopwatch.lap().items() if phase in OUTSIDE})
        self.send_row()
        self.bar.close()
        for name, what, of in ("training", "last {}", self.recent_returns), ("evaluation", "{} greedy", returns):
            if of:
                spread = f"{np.mean(of):.1f} ± {np.std(of):.1f} (mean ± std, {what.format(len(of))} episodes)"
                print(f"{name + ':':11} return {spread}")
        print(f"written to  {self.directory}: {', '.join(sorted(path.name for path in self.directory.iterdir()))}")
        return returns


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def is_logged_in() -> bool:
    """Whether there is a W&B account to record in"""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # W&B says the same in its own words
            return wandb.login(prompt=False)
    except wandb.Error as error:
        raise BadInput(f"--wandb-mode online: {one_line(error)}; offline needs no account") from error


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model = re.search(r"model name\s*: (.*)", info)
    return model[1] if model else platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------- files


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Safetensors with JSON metadata and a checksum of both. Raises TrainingFailed where a number is not finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise TrainingFailed(f"{name} is not finite at step {metadata['global_step']}")
    text, arrays = json.dumps(metadata), {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = safetensors.numpy.save(arrays, {"json": text, "sha256": checksum(arrays, text)})
    write_whole(path, data, TrainingFailed)


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def write_whole(path: Path, data: bytes, failure: type[Exception]) -> None:
    """The file appears whole or not at all; until then it stays as it was."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        what = f"cannot write {path}: {one_line(error)}"
        raise failure(f"{what}; make room there, or choose another --run-dir for a new run") from error


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def load_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], dict]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
        if metadata.get("sha256") != checksum(arrays, metadata.get("json", "")):
            raise ValueError("its checksum is wrong, or none of these scripts wrote it")
        return arrays, json.loads(metadata["json"])
    except Exception as error:  # safetensors raises whatever a foreign header leads to
        raise BadInput(f"cannot use {path}: {one_line(error)}") from error


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def has_checkpoint(config: Config) -> bool:
    return config.resume is not None and any(Path(config.resume).glob("checkpoints/*.safetensors"))


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def newest_checkpoint(directory: Path, run_id: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and progress: the last checkpoint, the one before where that is damaged, nothing where there is none."""
    paths = sorted((directory / "checkpoints").glob("*.safetensors"), reverse=True)
    for path in paths:
        try:
            arrays, progress = load_arrays(path)
            if progress.get("run_id") != run_id:
                raise BadInput(f"cannot use {path}: it is of another run, or no checkpoint")
            return arrays, progress
        except BadInput as error:
            warn(str(error))
    if paths:
        raise BadInput(f"--resume {directory}: no checkpoint there can be used")
    warn(f"{directory} has no checkpoint yet; the run begins anew")
    return {}, {}


# twin: td3_jax sac_jax mpo_jax vpg_torch
def load_model(path: str, learner: Learner) -> Learner:
    """The weights of a model.safetensors that this script wrote."""
    arrays, _ = load_arrays(path)
    expected = {name: array for name, array in to_numpy(learner).items() if not name.startswith(TRAINING_ONLY)}
    for name in sorted(arrays.keys() | expected.keys()):
        there, here = (getattr(side.get(name), "shape", "missing") for side in (arrays, expected))
        if there != here:
            why = "another script or environment made it, or other flags"
            raise BadInput(f"--load-model {path}: {name} is {there} there and {here} here; {why}")
    return from_numpy(learner, arrays)


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def directory_of_run(config: Config) -> tuple[Path, str]:
    """The directory, of a new run or the one that is resumed, and the run's W&B id"""
    if config.resume:
        directory = Path(config.resume)
        return directory, json.loads((directory / "config.json").read_text())["wandb_id"]
    name = f"{config.env_id}__{config.exp_name}__{config.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    directory, run_id = Path(config.run_dir or "runs/" + re.sub(r"[/:]", "-", name)), secrets.token_hex(4)
    if os.path.exists(directory / "config.json"):  # Path.exists raises where it may not look
        raise BadInput(f"{directory} holds a run: --resume {directory}, or choose another --run-dir")
    if not config.run_dir:
        try:
            directory.mkdir(parents=True)
        except FileExistsError:  # another run began in the same second
            directory = Path(f"{directory}-{run_id}")
        except OSError:
            pass  # `write_whole` will say it
    return directory, run_id


# ---------------------------------------------------------------------------------------------------- command line


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
class BadInput(Exception):
    """The run cannot begin; the message says what would be right."""


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
class TrainingFailed(Exception):
    """The run cannot go on; the message says why."""


def validate(config: Config) -> Config:
    """Raises BadInput where a value is not what Config allows, or where values do not go together."""
    config = checked_fields(config)
    if 0 < config.total_timesteps < config.iteration_steps:
        needed = f"must be 0 or at least an iteration of {config.iteration_steps} (--log-interval)"
        raise BadInput(f"--total-timesteps {config.total_timesteps}: {needed}")
    if config.total_timesteps and not num_updates(config.num_iterations * config.iteration_steps, config):
        learning = f"--learning-starts {config.learning_starts}, --updates-per-step {config.updates_per_step}"
        raise BadInput(f"--total-timesteps {config.total_timesteps}: ends before the first update ({learning})")
    if config.buffer_size < config.num_envs:
        raise BadInput(f"--buffer-size {config.buffer_size}: must hold a transition of each of the environments")
    largest = math.log(config.num_action_samples)  # KL, where one sample has all the weight
    for name in ("epsilon", "epsilon_penalty")[: len(epsilons(config))]:
        if (value := getattr(config, name)) >= largest:
            samples = f"log of --num-action-samples {config.num_action_samples}"
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be less than {largest:.3f}, the {samples}")
    return config


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def checked_fields(config: Config) -> Config:
    try:
        config = pydantic.TypeAdapter(Config).validate_python(dataclasses.asdict(config))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        raise BadInput(f"--{str(wrong['loc'][0]).replace('_', '-')} {wrong['input']}: {wrong['msg']}") from error
    if config.capture_video and not config.eval_episodes:
        raise BadInput("--capture-video --eval-episodes 0: evaluations are what is filmed")
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(json.loads(config.env_kwargs), dict):
            return config
    raise BadInput(f'--env-kwargs {config.env_kwargs}: must be JSON such as {{"gravity": 5.0}}')


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def parse(arguments: list[str], default: Config) -> Config:
    """The command line as tyro reads it, its boxed complaints as one line."""
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.cli(Config, args=arguments, default=default, description=__doc__)
    except SystemExit as stop:
        if stop.code:
            raise BadInput(" ".join(re.sub("[─-╿]", " ", complaints.getvalue()).split())) from stop
        raise


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def parse_config(arguments: list[str]) -> Config:
    """A resumed run takes its flags from its directory. Few may differ."""
    config = parse(arguments, Config())
    if not config.resume:
        return config
    try:
        recorded = json.loads((Path(config.resume) / "config.json").read_text())
        values = {field.name: recorded[field.name] for field in dataclasses.fields(Config)}
        _, recorded = recorded["wandb_id"], validate(Config(**values | {"resume": config.resume}))
    except (BadInput, OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume {config.resume}: no run of this script is there ({one_line(error)})") from error
    config = parse(arguments, recorded)
    free = {"total_timesteps", "device", "wandb_mode", "eval_episodes", "eval_interval", "capture_video", "save_model"}
    for name, value in dataclasses.asdict(config).items():
        if name not in free and value != getattr(recorded, name):
            flag = f"--{name.replace('_', '-')}"
            raise BadInput(f"{flag} cannot change in a resumed run; it is {getattr(recorded, name)}")
    return config


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
def main() -> int:
    try:
        train(parse_config(sys.argv[1:]))
        return 0
    except (BadInput, TrainingFailed, MemoryError, KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocat" not in str(error):  # as all frameworks say it of memory
            raise
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        return {BadInput: 2, KeyboardInterrupt: 130}.get(type(error), 1)


if __name__ == "__main__":
    sys.exit(main())
