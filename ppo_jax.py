# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "jax==0.10.2",
#     "flax==0.12.8",
#     "optax==0.2.8",
#     "gymnasium[box2d,classic-control,mujoco,other]==1.3.0",
#     "mujoco==3.17.0",
#     "numpy==2.4.6",
#     "pydantic==2.14.3",
#     "safetensors==0.8.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal policy optimisation (PPO) in JAX, in one file.

    python ppo_jax.py --env-id CartPole-v1
    python ppo_jax.py --env-id gymnax/CartPole-v1 --num-envs 64    # environments and learning in one compiled call

Papers: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347 (PPO below); advantages from
Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438 (GAE);
details that the papers leave out from Huang et al., "The 37 Implementation Details of Proximal Policy Optimization",
ICLR blog track 2022. The defaults are CleanRL's for CartPole-v1; the README has commands for other environments.

    initialise policy π and value function V
    repeat
        anneal the learning rate
        act with π for T steps in N environments
        compute advantages Â with GAE(λ) from V, and returns R = Â + V
        repeat K epochs, for M minibatches of the T·N samples
            minimise  -min(r Â, clip(r, 1-ε, 1+ε) Â) + c₁ (V - R)² / 2 - c₂ entropy(π),   r = π(a|s) / π_old(a|s)

Shapes: T steps, N environments, B samples of a batch or minibatch, *O the shape of one observation, A dimensions of an
action. Actions always have the last axis A, also for Discrete (A = 1). The rollout keeps a continuous action as it was
sampled; `environment_actions` clips it to its bounds for the environment alone.
"""

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import io
import itertools
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
from functools import cache, cached_property, partial, reduce
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
import safetensors.numpy
import tyro
import wandb
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from jax import Array as Tensor
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from pydantic import Field
from tqdm import tqdm

FRAMEWORK = "jax"

# ---------------------------------------------------------------------------------------------------------- Config

Count = Annotated[int, Field(ge=1, lt=2**31)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Config:
    env_id: str = "CartPole-v1"  # Gymnasium id, module:Id-v0, ALE/Game-v5, dm_control/domain-task-v0, gymnax/Id
    env_kwargs: str = "{}"  # JSON passed to the environment, such as '{"gravity": 5.0}'
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seed of weights, actions, minibatches and environments
    num_seeds: Count = 1  # gymnax: so many seeds from --seed on learn at once, each alone; steps are of each of them
    total_timesteps: Steps = 500_000  # environment steps of the whole run, all environments together
    learning_rate: Positive = 2.5e-4  # Adam's learning rate at the start
    final_learning_rate: NonNegative = 0.0  # learning rate at the end of an annealed run
    anneal_lr: bool = True  # go linearly from --learning-rate to --final-learning-rate
    num_envs: Count = 4  # N, environments that step together
    num_steps: Count = 128  # T, steps of each environment between two updates
    gamma: Fraction = 0.99  # discount factor γ
    gae_lambda: Fraction = 0.95  # λ of generalised advantage estimation
    num_minibatches: Count = 4  # M, minibatches of an epoch
    update_epochs: Count = 4  # K, passes over a rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: Positive = 0.2  # ε: the probability ratio gains nothing beyond 1 ± ε
    clip_vloss: bool = True  # limit the value's change by --clip-coef too
    ent_coef: NonNegative = 0.01  # c₂, weight of the entropy bonus
    vf_coef: NonNegative = 0.5  # c₁, weight of the value loss
    max_grad_norm: Positive = 0.5  # largest global norm of the gradient
    target_kl: Positive | None = None  # stop an update after an epoch whose mean KL exceeds this
    adam_eps: Positive = 1e-5  # Adam's ε
    hidden_sizes: tuple[Count, ...] = (64, 64)  # widths of the tanh layers for vector observations
    norm_obs: bool = False  # normalise vector observations by their running mean and variance, to ±10 at most
    norm_reward: bool = False  # divide rewards by the running std of the discounted return, to ±10 at most
    clip_reward: bool = False  # learn from rewards clipped to [-1, 1], before --norm-reward; reported returns never are
    episodic_life: bool = False  # Atari: learn as if a lost life ended the game; reported returns are whole games
    vectorization: Literal["auto", "sync", "async"] = "auto"  # one process, or one an environment; auto: the faster
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # auto: what JAX finds, an accelerator before the cpu
    timing_interval: Steps = 20  # every K-th iteration (gymnax: call) runs phase by phase, fenced; 0: never
    eval_episodes: Steps = 10  # episodes of an evaluation: deterministic policy, fresh environments; 0: none
    eval_interval: Steps = 0  # environment steps between evaluations; 0: only one at the end
    checkpoint_interval: Steps | None = None  # steps to a checkpoint (new episodes); None: 1/10, ≥5000 N; 0: on signals
    capture_video: bool = False  # film the first episode of every evaluation, 2000 steps at most
    save_model: bool = True  # write model.safetensors at the end
    load_model: str | None = None  # start from this model.safetensors: its weights and normalisation statistics
    resume: str | None = None  # go on with the run in this directory; needs no other flag
    run_dir: str | None = None  # directory of the run's files; None: runs/<env>__<script>__<seed>__<time>
    exp_name: str = "ppo_jax"  # <script> in the name of the run
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline: nothing leaves the machine
    wandb_project: Annotated[str, Field(pattern=r"^[^/\\#?%:]+$", max_length=128)] = "deep-rl-scripts"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group; None: <env>__<script>, so that seeds fall together

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def iteration_steps(self) -> int:
        return self.batch_size

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.iteration_steps

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax vpg_torch
    @property
    def checkpoint_every(self) -> int:
        default = max(self.total_timesteps // 10, 5000 * self.num_envs)  # so that episodes end in between
        return default if self.checkpoint_interval is None else self.checkpoint_interval


# -------------------------------------------------------------------------------------------------------- networks


class Agent(struct.PyTreeNode):
    """Policy and value function: two tanh networks, or two linear heads on a shared CNN for images.

    The actor gives the logits of all discrete choices side by side, or the mean of a Gaussian whose standard deviation
    exp(log_std) does not depend on the state (log_std is None for discrete actions).
    """

    weights: Tensor  # of all networks in one vector: a call costs by the array
    to_params: Callable[[Tensor], dict] = struct.field(pytree_node=False)
    nvec: tuple[int, ...] = struct.field(pytree_node=False)  # choices of each discrete dimension; () for continuous
    encoder: nn.Module | None = struct.field(pytree_node=False)
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)

    @classmethod
    def create(cls, observation_shape: tuple[int, ...], nvec: tuple[int, ...], action_dim: int, config: Config):
        is_image = len(observation_shape) == 3
        encoder = None
        if is_image:
            encoder = NatureCNN() if min(observation_shape[1:]) >= SMALLEST_IMAGE else MinAtarCNN()
        sizes, features = ((), (encoder.features,)) if is_image else (config.hidden_sizes, observation_shape)
        actor = MLP((*sizes, sum(nvec) or action_dim), gain=0.01)
        critic = MLP((*sizes, 1), gain=1.0)
        inputs = {"encoder": (encoder, observation_shape), "actor": (actor, features), "critic": (critic, features)}
        params = {} if nvec else {"log_std": jnp.zeros(action_dim, jnp.float32)}
        keys = jax.random.split(jax.random.key(config.seed), len(inputs))
        for key, (name, (network, shape)) in zip(keys, inputs.items(), strict=True):
            if network:
                params[name] = initial_params(network, key, shape)
        return cls(*ravel_pytree(params), nvec, encoder, actor, critic)

    @property
    def params(self) -> dict:
        """Of encoder, actor and critic under these names, and log_std"""
        return self.to_params(self.weights)

    @property
    @jax.jit
    def log_std(self) -> Tensor | None:
        return self.params.get("log_std")

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *O) -> logits (B, sum(nvec)) or means (B, A), values (B,)"""
        features, params = observations, self.params  # once: the gradient through each use is a vector of all weights
        if self.encoder:
            features = self.encoder.apply({"params": params["encoder"]}, observations.astype(self.weights.dtype))
        policy, values = (getattr(self, name).apply({"params": params[name]}, features) for name in ("actor", "critic"))
        return policy, values.squeeze(-1)

    @jax.jit
    def policy(self, observations: np.ndarray) -> Tensor:
        """The actor's output alone; XLA leaves out what it does not need."""
        return self(observations)[0]


@partial(jax.jit, static_argnums=(0, 2))
def initial_params(network: nn.Module, key: Tensor, shape: tuple[int, ...]) -> dict:
    return network.init(key, jnp.zeros((1, *shape)))["params"]


class MLP(nn.Module):
    """Linear layers of these sizes with tanh between them; `gain` is the last layer's."""

    sizes: tuple[int, ...]  # without the input's
    gain: float

    @nn.compact
    def __call__(self, x: Tensor) -> Tensor:
        for i, size in enumerate(self.sizes[:-1]):
            x = nn.tanh(initialised(Dense)(size, name=f"{2 * i}")(x))  # torch's names, which count the tanh too
        return initialised(Dense, self.gain)(self.sizes[-1], name=f"{2 * len(self.sizes) - 2}")(x)


SMALLEST_IMAGE = 36  # pixels a side of which the convolutions leave something


# twin: ppo_jax ppo_lstm_jax
class NatureCNN(nn.Module):
    """Byte images (B, channels, height, width) -> (B, 512) (Mnih et al. 2015, "Human-level control …")"""

    features: int = 512

    @nn.compact
    def __call__(self, images: Tensor) -> Tensor:
        x = images.transpose(0, 2, 3, 1) / 255
        for i, (channels, side, stride) in enumerate([(32, 8, 4), (64, 4, 2), (64, 3, 1)]):
            layer = initialised(nn.Conv)(channels, (side, side), stride, padding="VALID", name=f"{2 * i}")
            x = nn.relu(layer(x))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch's order, so that its weights fit
        return nn.relu(initialised(Dense)(self.features, name="7")(x))


# twin: ppo_jax ppo_lstm_jax
class MinAtarCNN(nn.Module):
    """Small images (B, channels, height, width) of numbers about 1 -> (B, 128) (Young & Tian 2019, "MinAtar", §3)"""

    features: int = 128

    @nn.compact
    def __call__(self, images: Tensor) -> Tensor:
        layer = initialised(nn.Conv)(16, (3, 3), padding="VALID", conv_general_dilated=convolution, name="0")
        x = nn.relu(layer(images.transpose(0, 2, 3, 1)))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch's order, as above
        return nn.relu(initialised(Dense)(self.features, name="3")(x))


# twin: ppo_jax ppo_lstm_jax
def initialised(layer: Callable[..., nn.Module], gain: float = math.sqrt(2)) -> Callable[..., nn.Module]:
    """Orthogonal weights (Saxe et al. 2014) times a gain, biases zero."""
    return partial(layer, kernel_init=nn.initializers.orthogonal(gain), bias_init=nn.initializers.zeros)


# ------------------------------------------------------------------------------------------------------------ data


class Rollout(NamedTuple):
    """What the environments gave."""

    observations: np.ndarray  # (T + 1, N, *O); the last row begins the next rollout
    actions: np.ndarray  # (T, N, A)
    rewards: np.ndarray  # (T, N)
    terminated: np.ndarray  # (T, N)
    truncated: np.ndarray  # (T, N), without those that terminated in the same step
    final_observations: np.ndarray  # (L, *O): true last observations of the L truncated episodes, in (T, N) order; or
    # (T, N, *O): what each step led to


# twin: ppo_torch ppo_mlx ppo_jax
class Batch(NamedTuple):
    """A whole rollout or one minibatch on the device, one sample a row."""

    observations: Tensor  # (B, *O)
    actions: Tensor  # (B, A)
    log_probs: Tensor  # (B,), of the policy that acted
    values: Tensor  # (B,), before the update
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


# twin: ppo_jax ppo_lstm_jax
class Learner(NamedTuple):
    """What an update changes."""

    agent: Agent
    optimizer: optax.OptState  # moments in the order of `agent.weights`
    learning_rate: Tensor  # (), an array, so that a new rate compiles nothing


# ------------------------------------------------------------------------------------------------------- equations


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def sample_actions(policy: np.ndarray, noise: np.ndarray, nvec: tuple[int, ...]) -> np.ndarray:
    """Output of the actor (N, ·), noise of that shape -> actions (N, A); noise 0 gives the most likely ones.

    Continuous: mean + noise, which is std · standard Gaussian. Discrete: argmax(logits + Gumbel noise), which is a draw
    from softmax(logits) (Maddison et al. 2014, "A* Sampling", §2).
    """
    perturbed = policy + noise
    if not nvec:
        return perturbed
    actions = np.empty((len(perturbed), len(nvec)), np.int64)
    for i, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(nvec, initial=0))):
        perturbed[:, start:end].argmax(-1, out=actions[:, i])
    return actions


# twin: ppo_jax ppo_lstm_jax
def log_probs_and_entropies(
    policy: Tensor, log_std: Tensor | None, actions: Tensor, nvec: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """log π(a|s) and entropy of π(·|s), one each of a sample, summed over the independent action dimensions."""
    if not nvec:
        log_probs = -0.5 * ((actions - policy) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        entropies = jnp.broadcast_to(log_std + 0.5 * math.log(2 * math.pi * math.e), log_probs.shape)
        return log_probs.sum(-1), entropies.sum(-1)
    logits = jnp.split(policy, np.cumsum(nvec)[:-1], -1)
    parts = [nn.log_softmax(part) for part in logits]
    choices = jnp.split(actions, len(nvec), -1)
    chosen = [action == jnp.arange(n) for action, n in zip(choices, nvec, strict=True)]  # to gather would be slower
    log_probs = [jnp.where(is_chosen, part, 0).sum(-1) for is_chosen, part in zip(chosen, parts, strict=True)]
    entropies = [-(jnp.exp(part) * part).sum(-1) for part in parts]
    return reduce(jnp.add, log_probs), reduce(jnp.add, entropies)


# twin: ppo_jax ppo_lstm_jax
def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages by GAE eq. 16, everything (T, N): δ_t = r_t + γ V(s'_t) - V(s_t), Â_t = δ_t + γλ Â_{t+1}.

    s'_t is the true next observation. Only termination cuts V(s'_t); any end of an episode (`done`) cuts Â_{t+1}.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    decays = gamma * lam * (1 - done)

    def step(advantage: Tensor, delta_and_decay: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        delta, decay = delta_and_decay
        advantage = delta + decay * advantage
        return advantage, advantage

    return jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, decays), reverse=True)[1]


# twin: ppo_jax ppo_lstm_jax
def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """-L^CLIP (PPO eq. 7), the mean over all samples; log_ratio = log π(a|s) - log π_old(a|s)."""
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(ratio * advantages, ratio.clip(1 - clip_coef, 1 + clip_coef) * advantages).mean()


# twin: ppo_jax ppo_lstm_jax
def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """½ (V - R)² (PPO eq. 9 has no ½), mean over all samples; V gains nothing beyond V_old ± clip_coef, if given."""
    squared_errors = (values - returns) ** 2
    if clip_coef is not None:
        clipped_values = old_values + (values - old_values).clip(-clip_coef, clip_coef)
        squared_errors = jnp.maximum(squared_errors, (clipped_values - returns) ** 2)
    return 0.5 * squared_errors.mean()


# twin: ppo_jax ppo_lstm_jax
def kl_and_clip_fraction(log_ratio: Tensor, clip_coef: float) -> dict[str, Tensor]:
    """KL(π_old ‖ π) by estimators k3 and k1 (Schulman 2020, "Approximating KL Divergence"); clipped fraction."""
    ratio = jnp.exp(log_ratio)
    is_clipped = (jnp.abs(ratio - 1) > clip_coef).astype(ratio.dtype)
    k1, k3 = -log_ratio, ratio - 1 - log_ratio
    return {"approx_kl": k3.mean(), "old_approx_kl": k1.mean(), "clipfrac": is_clipped.mean()}


# twin: ppo_mlx ppo_jax ppo_lstm_jax
def explained_variance(batch: Batch) -> Tensor:
    """Of the returns by the values: 1 - Var(R - V) / Var(R), with R - V = Â"""
    return 1 - batch.advantages.var() / batch.returns.var()


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def annealed_learning_rate(iteration: int, config: Config) -> float:
    """From --learning-rate at the first update to --final-learning-rate one update after the last."""
    progress = (iteration - 1) / config.num_iterations if config.anneal_lr else 0.0
    return (1 - progress) * config.learning_rate + progress * config.final_learning_rate


# ---------------------------------------------------------------------------------------------------------- update


def loss_and_gradient(agent: Agent, minibatch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO eq. 9 -> its gradient as a vector of all weights, the three losses, log-ratio (B,)"""

    def loss_of(agent: Agent) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
        policy, values = agent(minibatch.observations)
        log_probs, entropies = log_probs_and_entropies(policy, agent.log_std, minibatch.actions, agent.nvec)
        log_ratio, value_clip = log_probs - minibatch.log_probs, config.clip_coef if config.clip_vloss else None
        losses = {
            "policy_loss": policy_loss(log_ratio, minibatch.advantages, config.clip_coef),
            "value_loss": value_loss(values, minibatch.values, minibatch.returns, value_clip),
            "entropy": entropies.mean(),
        }
        loss = losses["policy_loss"] + config.vf_coef * losses["value_loss"] - config.ent_coef * losses["entropy"]
        return loss, (losses, log_ratio)

    gradient, (losses, log_ratio) = jax.grad(loss_of, has_aux=True)(agent)
    return gradient.weights, losses, log_ratio


# twin: ppo_jax ppo_lstm_jax
def apply_gradient(learner: Learner, gradient: Tensor, config: Config) -> tuple[Learner, Tensor]:
    """Scales the gradient by min(1, max_grad_norm / (norm + 1e-6)); one step of Adam -> learner, norm before"""
    norm = jnp.linalg.norm(gradient)
    gradient *= (config.max_grad_norm / (norm + 1e-6)).clip(max=1)
    adam = optax.adam(learner.learning_rate, eps=config.adam_eps)
    changes, optimizer = adam.update(gradient, learner.optimizer)
    agent = learner.agent.replace(weights=learner.agent.weights + changes)
    return learner._replace(agent=agent, optimizer=optimizer), norm


def make_batch(agent: Agent, rollout: Rollout, config: Config) -> Batch:
    """Log-probabilities and values of the whole rollout in one call, then advantages and returns."""
    observations, actions, rewards, terminated, truncated, final_observations = to_tensors(agent, *rollout)
    policy, values = agent(flatten(observations))
    values = values.reshape(observations.shape[:2])  # (T + 1, N)
    next_values = values[1:]
    if final_observations.ndim == observations.ndim:  # one for each step: compiled code cannot leave any out
        final_values = jax.lax.cond(
            (truncated > 0).any(),
            lambda: agent(flatten(final_observations))[1].reshape(truncated.shape),
            lambda: next_values,
        )
        next_values = jnp.where(truncated > 0, final_values, next_values)
    elif len(final_observations):
        _, final_values = agent(final_observations)
        rows = jnp.cumsum(truncated > 0).reshape(truncated.shape) - 1
        next_values = jnp.where(truncated > 0, final_values[rows], next_values)
    done = terminated + truncated
    advantages = gae(rewards, values[:-1], next_values, terminated, done, config.gamma, config.gae_lambda).flatten()
    observations, actions, values = flatten(observations[:-1]), flatten(actions), values[:-1].flatten()
    log_probs, _ = log_probs_and_entropies(policy[: config.batch_size], agent.log_std, actions, agent.nvec)
    return Batch(observations, actions, log_probs, values, advantages, returns=advantages + values)


def minibatches(batch: Batch, permutation: np.ndarray, config: Config) -> list[Batch]:
    """One epoch: each sample once, in the order given; advantages are normalised within each minibatch."""
    indices = permutation.reshape(config.num_minibatches, -1)
    shuffled = Batch(*(field[indices] for field in batch))
    if config.norm_adv:
        advantages = shuffled.advantages  # (M, B / M)
        deviations = advantages - advantages.mean(1, keepdims=True)
        shuffled = shuffled._replace(advantages=deviations / (advantages.std(1, ddof=1, keepdims=True) + 1e-8))
    return list(map(Batch, *shuffled))


# twin: ppo_torch ppo_mlx ppo_jax
def update_minibatch(learner: Learner, minibatch: Batch, config: Config, timed: Callable):
    """-> learner, losses and norm of the gradient, log-ratio (B,)"""
    gradient, losses, log_ratio = timed("loss", loss_and_gradient, learner.agent, minibatch, config)
    learner, gradient_norm = timed("weight_update", apply_gradient, learner, gradient, config)
    return learner, losses | {"grad_norm": gradient_norm}, log_ratio


def update_epoch(learner: Learner, batch: Batch, permutation: np.ndarray, config: Config, timed: Callable):
    """-> learner, means over the minibatches of what the record calls losses/…"""

    def step(learner: Learner, minibatch: Batch) -> tuple[Learner, tuple[dict[str, Tensor], Tensor]]:
        learner, losses, log_ratio = update_minibatch(learner, minibatch, config, timed)
        return learner, (losses, log_ratio)

    parts = timed("shuffle", minibatches, batch, permutation, config)
    learner, losses, log_ratios = each_minibatch(step, learner, parts, timed)
    kl = timed("kl", kl_and_clip_fraction, log_ratios, config.clip_coef)
    return learner, on_host(kl | losses)


def update(
    learner: Learner, rollout: Rollout, config: Config, rng: np.random.Generator, timed: Callable
) -> tuple[Learner, Batch, dict[str, float]]:
    """At most K epochs -> learner, the batch, losses/… averaged over all minibatches

    `timed(phase, function, *arguments)` is function(*arguments), clocked as that phase where the update is not fused.
    """
    batch = timed("gae", make_batch, learner.agent, rollout, config)

    def epoch(learner: Learner, permutation: np.ndarray) -> tuple[Learner, dict[str, Tensor]]:
        return timed(None, update_epoch, learner, batch, permutation, config, timed)

    permutations = (rng.permutation(config.batch_size) for _ in range(config.update_epochs))
    learner, metrics = each_epoch(epoch, learner, permutations, config)
    metrics |= on_host({"explained_variance": timed("gae", explained_variance, batch)})
    return learner, batch, {f"losses/{name}": value for name, value in metrics.items()}


# --------------------------------------------------------------------------------------------------------- rollout


# twin: ppo_jax ppo_lstm_jax
def action_noise(rng: np.random.Generator, shape: tuple[int, ...], agent: Agent) -> np.ndarray:
    """(*shape, ·) for `sample_actions`"""
    if agent.nvec:
        return rng.gumbel(size=(*shape, sum(agent.nvec))).astype(np.float32)
    std = np.exp(agent.log_std)
    return std * rng.standard_normal((*shape, len(std)), np.float32)


def act(agent: Agent, observations: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """(N, *O), (N, ·) -> (N, A). An environment needs the action alone; `make_batch` computes the rest at once."""
    return sample_actions(np.asarray(agent.policy(observations)), noise, agent.nvec)


# twin: ppo_mlx ppo_jax
@np.errstate(invalid="ignore")  # what is not finite is found at the end
def collect_rollout(
    agent: Agent, envs: "Environments", config: Config, rng: np.random.Generator, timed: Callable
) -> Rollout:
    noise = timed("forward", action_noise, rng, (config.num_steps, config.num_envs), agent)
    observations = np.empty((config.num_steps + 1, *envs.observations.shape), envs.observations.dtype)
    rewards = np.empty((config.num_steps, config.num_envs), np.float32)
    terminated, truncated = np.empty((2, *rewards.shape), bool)
    actions, final_observations = [], []
    observations[0] = envs.observations
    for t in range(config.num_steps):
        actions.append(timed("forward", act, agent, observations[t], noise[t]))
        observations[t + 1], rewards[t], terminated[t], truncated[t], ended = timed("step", envs.step, actions[t])
        final_observations.extend(ended)
    actions = np.array(actions)
    check_actions(observations, actions)
    final_observations = np.array(final_observations, observations.dtype).reshape(-1, *observations.shape[2:])
    returns = np.array([*envs.returns, *(episode_return for _, episode_return, _ in envs.episodes)])  # never clipped
    check_finite(config.env_id, observation=observations, reward=returns, final_observation=final_observations)
    return Rollout(observations, actions, rewards, terminated, truncated, final_observations)


# ----------------------------------------------------------------------------------------------------------- train


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
class Result(NamedTuple):
    learner: Learner
    evaluation_returns: list[float]  # of each episode
    run_dir: Path


def train(config: Config) -> Result:
    """The whole run. Raises BadInput before training, TrainingFailed where it cannot go on, and SystemExit after
    SIGINT or SIGTERM, once a checkpoint is written."""
    config = checked_for_gymnax(validate(config))
    if config.capture_video:
        make_vector(config, 1, is_evaluation=True).close()  # raises BadInput where nothing can be filmed
    new_environments = GymnaxEnvironments if is_gymnax(config) else Environments
    with contextlib.closing(new_environments(config, config.num_envs)) as envs:
        learner, rng = new_learner(envs, config), np.random.default_rng(config.seed)
        if config.load_model and not has_checkpoint(config):
            learner = loaded(config.load_model, learner, envs)
        stopwatch = new_stopwatch(learner, config)
        new_run = Run if not is_gymnax(config) else DeviceRun if config.num_seeds == 1 else SeedsRun
        with new_run(config, envs, stopwatch, algorithm="ppo", device=device_name(learner)) as run:
            learner = run.restore(learner, rng, envs)
            stopwatch.timed("compile", warm_up, learner, envs, config, stopwatch)
            for iteration in run.iterations():
                rate = annealed_learning_rate(iteration, config)
                learner = with_learning_rate(learner, rate)
                is_timed = run.is_timed(iteration)
                if is_gymnax(config):
                    rates = [annealed_learning_rate(i, config) for i in run.iterations_of_call()]
                    rate = sum(rates) / len(rates)  # of the record, a mean over the call as the losses are
                    outcome = collect_and_update(learner, envs, rates, config, stopwatch, is_timed)
                    learner, rollout, batch, metrics = outcome
                else:
                    rollout = collect_rollout(learner.agent, envs, config, rng, stopwatch.timed)
                    arguments = learner, rollout, config, rng
                    if is_timed:
                        learner, batch, metrics = update(*arguments, stopwatch.timed)
                    else:
                        learner, batch, metrics = stopwatch.timed("update", update, *arguments, stopwatch.fused)
                if is_timed:
                    stopwatch.timed("probe", probe, learner, envs, batch, config, stopwatch)
                run.check(metrics)
                if run.is_due(config.eval_interval):
                    run.evaluate(greedy(learner))
                run.record(metrics | {"charts/learning_rate": rate}, partial(histogram_samples, rollout, batch))
                if run.is_due(config.checkpoint_every):
                    run.save_checkpoint(learner)
                    stopwatch.timed("checkpoint", envs.restart, run.global_step)
            returns = run.conclude(greedy(learner), learner)
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


# twin: ppo_jax ppo_lstm_jax
@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Tensor, kernel: Tensor, dimension_numbers: tuple, precision: None) -> Tensor:
    """(B, I), (I, J) -> (B, J)"""
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision)


# twin: ppo_jax ppo_lstm_jax
def product_and_inputs(x: Tensor, kernel: Tensor, *how) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return product(x, kernel, *how), (x, kernel)


# twin: ppo_jax ppo_lstm_jax
def product_gradients(dimension_numbers: tuple, precision: None, inputs: tuple, dy: Tensor) -> tuple[Tensor, Tensor]:
    """What JAX would find, in an order that XLA is fast at: for B >> I = J, xᵀ dy takes a CPU 2.5 times as long as x W,
    and half of that once xᵀ stands in memory; for J << I a tenth, as (dyᵀ x)ᵀ."""
    (x, kernel), in_memory = inputs, jax.lax.optimization_barrier
    if dy.shape[1] < x.shape[1]:
        kernel_gradient = in_memory(dy.T @ x).T
    else:
        kernel_gradient = (in_memory(x.T) if dy.shape[1] == x.shape[1] else x.T) @ dy
    return dy @ kernel.T, kernel_gradient


product.defvjp(product_and_inputs, product_gradients)
Dense = partial(nn.Dense, dot_general=product)  # of (B, I) alone


# twin: ppo_jax ppo_lstm_jax
def convolution(images: Tensor, kernel: Tensor, *_, **__) -> Tensor:
    """(B, H, W, I), (h, w, I, J) -> (B, H - h + 1, W - w + 1, J) as one product; XLA's own takes a CPU 20 times as long
    in the loops of compiled code."""
    h, w, _, outputs = kernel.shape
    height, width = images.shape[1] - h + 1, images.shape[2] - w + 1
    patches = [images[:, i : i + height, j : j + width] for i in range(h) for j in range(w)]
    x = jnp.concatenate(patches, -1).reshape(len(images) * height * width, -1)
    return product(x, kernel.reshape(-1, outputs), (((1,), (0,)), ((), ())), None).reshape(-1, height, width, outputs)


def new_learner(envs: "Environments", config: Config) -> Learner:
    if config.num_seeds > 1:
        return stacked([new_learner(envs, one) for one in seeds(config)])
    set_up_jax(config)
    agent = Agent.create(envs.observation_shape, envs.nvec, envs.action_dim, config)
    optimizer = optax.adam(config.learning_rate, eps=config.adam_eps).init(agent.weights)
    return with_learning_rate(Learner(agent, optimizer, config.learning_rate), config.learning_rate)


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def device_name(learner: Learner) -> str:
    (device,) = jax.tree.leaves(learner)[0].devices()
    return device.platform if device.platform == "cpu" else f"{device.platform} ({device.device_kind})"


def new_stopwatch(learner: Learner, config: Config) -> "Stopwatch":
    whole_batch = jax.jit(make_batch, static_argnames="config")
    whole_epoch = jax.jit(update_epoch, static_argnames=("config", "timed"))

    def compiled_epoch(*arguments) -> tuple[Learner, dict[str, np.ndarray]]:
        learner, metrics = whole_epoch(*arguments)
        return learner, on_host(metrics)

    compiled = {
        make_batch: lambda agent, rollout, config: whole_batch(agent, padded(rollout), config),
        update_epoch: compiled_epoch,
        minibatches: jax.jit(minibatches, static_argnames="config"),
        loss_and_gradient: jax.jit(loss_and_gradient, static_argnames="config"),
        apply_gradient: jax.jit(apply_gradient, static_argnames="config"),
        log_probs_and_entropies: jax.jit(log_probs_and_entropies, static_argnames="nvec"),
    }
    others = averaged, kl_and_clip_fraction, explained_variance, policy_loss, value_loss, Agent.__call__
    return Stopwatch(jax.block_until_ready, compiled | {function: jax.jit(function) for function in others})


def with_learning_rate(learner: Learner, rate: float) -> Learner:
    weights = learner.agent.weights
    return learner._replace(learning_rate=np.full(weights.shape[:-1], rate, weights.dtype))


def warm_up(learner: Learner, envs: "Environments", config: Config, stopwatch: "Stopwatch") -> None:
    """Compiles what is to be compiled, by an update in either form on a rollout of zeros; the weights stay as they are.

    One rollout has no final observation and the other has one: `make_batch` is compiled for both.
    """
    if isinstance(envs, GymnaxEnvironments):
        return warm_up_on_device(learner, envs, config, stopwatch)
    if config.eval_episodes:
        act(learner.agent, np.zeros((config.eval_episodes, *envs.observation_shape), envs.observation_dtype))
    to_numpy(learner)  # or the first checkpoint would compile it
    if not config.num_iterations:
        return
    observations = np.zeros((config.num_steps + 1, config.num_envs, *envs.observation_shape), envs.observation_dtype)
    actions = np.array([act(learner.agent, observations[0])] * config.num_steps)
    rewards = np.zeros(actions.shape[:2], np.float32)
    rollout = Rollout(observations, actions, rewards, rewards > 0, rewards > 0, observations[0, :0])
    update(learner, rollout, config, np.random.default_rng(0), stopwatch.fused)
    truncated = np.arange(rewards.size).reshape(rewards.shape) == 0
    rollout = rollout._replace(truncated=truncated, final_observations=observations[0, :1])
    unread = Stopwatch(stopwatch.fence, stopwatch.compiled)
    timed = unread.timed if config.timing_interval else stopwatch.fused
    _, batch, _ = update(learner, rollout, config, np.random.default_rng(0), timed)
    if config.timing_interval:
        probe(learner, envs, batch, config, unread)


def probe(learner: Learner, envs: "Environments", batch: Batch, config: Config, stopwatch: "Stopwatch") -> None:
    """Clocks parts of the loss, each compiled by itself, on one minibatch, as seconds of all minibatches; and the
    rollout that one call on the device holds, by itself."""
    agent = learner.agent
    if isinstance(envs, GymnaxEnvironments):
        arguments = agent, envs.simulator, envs, config, envs.plainly
        stopwatch.timed("update/rollout", collect_on_device, *arguments)
        if config.num_seeds > 1:
            return
    minibatch = Batch(*(field[: config.batch_size // config.num_minibatches] for field in batch))
    # the first call after a rollout finds cold caches
    stopwatch.fence((minibatch, stopwatch.fused(None, Agent.__call__, agent, minibatch.observations)))
    timed = partial(stopwatch.timed, weight=stopwatch.calls["kl"] * config.num_minibatches)  # an epoch has one
    policy, values = timed("loss/forward", Agent.__call__, agent, minibatch.observations)
    arguments = policy, agent.log_std, minibatch.actions, agent.nvec
    log_probs, _ = stopwatch.fused(None, log_probs_and_entropies, *arguments)
    log_ratio = log_probs - minibatch.log_probs
    stopwatch.fence(log_ratio)
    timed("loss/policy", policy_loss, log_ratio, minibatch.advantages, config.clip_coef)
    value_clip = config.clip_coef if config.clip_vloss else None
    timed("loss/value", value_loss, values, minibatch.values, minibatch.returns, value_clip)


# twin: ppo_jax ppo_lstm_jax
def padded(rollout: Rollout) -> Rollout:
    """With T · N final observations where there are any: each other number would be compiled anew."""
    observations = rollout.final_observations
    if not len(observations):
        return rollout
    padding = np.zeros((rollout.rewards.size - len(observations), *observations.shape[1:]), observations.dtype)
    return rollout._replace(final_observations=np.concatenate([observations, padding]))


# twin: ppo_jax ppo_lstm_jax
def on_host(metrics: dict[str, Tensor]) -> dict[str, Tensor] | dict[str, float]:
    """NumPy's floats, unless JAX traces; float(x) would take 10 µs each."""
    return {name: x if is_traced(x) else np.asarray(x, np.float64)[()] for name, x in metrics.items()}


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def is_traced(x: Tensor) -> bool:
    """Whether compiled code is being made, in which a loop is a jax.lax.scan."""
    return isinstance(x, jax.core.Tracer)


# twin: ppo_jax ppo_lstm_jax
def flatten(x: Tensor) -> Tensor:
    """(T, N, …) -> (T · N, …)"""
    return x.reshape(-1, *x.shape[2:])


def each_epoch(
    epoch: Callable, learner: Learner, permutations: Iterator[np.ndarray], config: Config
) -> tuple[Learner, dict[str, Tensor]]:
    """-> learner, metrics averaged over the epochs until one passes --target-kl"""
    limit = math.inf if config.target_kl is None else config.target_kl
    if not is_traced(learner.agent.weights):
        epochs: list[dict[str, float]] = []
        for permutation in permutations:
            learner, metrics = epoch(learner, permutation)
            epochs.append(metrics)
            if np.all(metrics["approx_kl"] > limit):
                break
        return learner, {name: sum(metrics[name] for metrics in epochs) / len(epochs) for name in epochs[0]}

    def step(carry: tuple[Learner, Tensor], permutation: Tensor) -> tuple:
        learner, is_over = carry
        updated, metrics = epoch(learner, permutation)
        if config.target_kl is None:
            return (updated, is_over), (metrics, is_over)
        learner = jax.tree.map(partial(jnp.where, is_over), learner, updated)
        return (learner, is_over | (metrics["approx_kl"] > limit)), (metrics, is_over)

    (learner, _), (metrics, is_over) = jax.lax.scan(step, (learner, jnp.array(False)), jnp.stack([*permutations]))
    count = (~is_over).sum()  # epochs after that are computed all the same, and may be of any size
    return learner, {name: jnp.where(is_over, 0, x).sum() / count for name, x in metrics.items()}


def each_minibatch(
    step: Callable, learner: Learner, parts: list[Batch], timed: Callable
) -> tuple[Learner, dict[str, Tensor], Tensor]:
    """-> learner, mean losses, log-ratios (M, B / M). jax.lax.scan where JAX traces the whole epoch, and else the same
    as a loop, whose steps are calls that can be timed."""
    if is_traced(parts[0].values):
        unroll = bool(learner.agent.encoder)  # XLA's convolutions on CPU take 14 times as long inside a loop of its own
        learner, outputs = jax.lax.scan(step, learner, stacked(parts), unroll=unroll)
        return learner, *averaged(outputs)
    outputs = []
    for part in parts:
        learner, output = step(learner, part)
        outputs.append(output)
    return learner, *timed("loss", averaged, outputs)


# twin: ppo_jax ppo_lstm_jax
def averaged(outputs: tuple | list[tuple]) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and log-ratios of all minibatches, stacked or in a list -> mean losses, log-ratios (M, …)"""
    losses, log_ratios = stacked(outputs) if isinstance(outputs, list) else outputs
    return {name: x.mean() for name, x in losses.items()}, log_ratios


# twin: ppo_jax ppo_lstm_jax
def stacked(trees: list) -> object:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def unstacked(learner: Learner) -> list[Learner]:
    """Of many seeds, each by itself"""
    return [jax.tree.map(lambda x, k=k: x[k], learner) for k in range(len(learner.agent.weights))]


# twin: ppo_jax ppo_lstm_jax
def to_tensors(agent: Agent, *arrays: np.ndarray) -> list[Tensor]:
    """Floats and booleans take the dtype of the weights, integers keep theirs."""
    tensors, dtype = [jnp.asarray(array) for array in arrays], agent.weights.dtype
    return [x.astype(dtype) if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.floating) else x for x in tensors]


# twin: ppo_mlx ppo_jax ppo_lstm_jax
def histogram_samples(rollout: Rollout, batch: Batch) -> dict[str, np.ndarray]:
    """What the record has a histogram of, or a picture"""
    images = {"observation": rollout.observations[-1, 0, -1]} if rollout.observations.dtype == np.uint8 else {}
    return images | {name: np.asarray(getattr(batch, name)) for name in ("actions", "advantages", "values")}


def to_numpy(learner: Learner) -> dict[str, np.ndarray]:
    """Weights by torch's names and layouts; Adam's step and moments as optimizer.<which>, in the weights' order"""
    if learner.agent.weights.ndim > 1:
        parts = [to_numpy(one) for one in unstacked(learner)]
        return {f"seed_{k}.{name}": x for k, part in enumerate(parts) for name, x in part.items()}
    adam, _ = learner.optimizer
    arrays = {f"optimizer.{name}": np.asarray(value) for name, value in adam._asdict().items()}
    for name, x in flatten_dict(learner.agent.params, sep=".").items():
        order = (-1, -2, *range(x.ndim - 2)) if name.endswith("kernel") else (0,)  # (h, w, in, out) or (in, out)
        arrays[name.replace("kernel", "weight")] = np.asarray(x).transpose(order).copy()
    return arrays


def from_numpy(learner: Learner, arrays: dict[str, np.ndarray]) -> Learner:
    """The inverse of `to_numpy`; without moments the optimizer stays as it is."""
    if learner.agent.weights.ndim > 1:
        return stacked([from_numpy(one, of_seed(k, arrays)) for k, one in enumerate(unstacked(learner))])
    params, (adam, rest) = {}, learner.optimizer
    for name, weight in flatten_dict(learner.agent.params, sep=".").items():
        x = arrays[name.replace("kernel", "weight")]
        order = (*range(2, x.ndim), 1, 0) if name.endswith("kernel") else (0,)
        params[name] = jnp.array(x.transpose(order), weight.dtype)
    if "optimizer.count" in arrays:
        adam = type(adam)(*(jnp.array(arrays[f"optimizer.{name}"]) for name in adam._fields))
    agent = learner.agent.replace(weights=ravel_pytree(unflatten_dict(params, sep="."))[0])
    return learner._replace(agent=agent, optimizer=(adam, rest))


# ---------------------------------------------------------------------------------------------------- environments


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
class Environments:
    """N environments that reset in the very step that ends an episode; normalises, clips and adds up returns."""

    def __init__(self, config: Config, num_envs: int, is_evaluation: bool = False):
        self.config, self.num_envs, self.is_evaluation = config, num_envs, is_evaluation
        self.is_fresh, self.is_atari = True, config.env_id.startswith("ALE/")
        self.vector = make_vector(config, num_envs, is_evaluation)
        self.observation_shape = self.vector.single_observation_space.shape
        self.observation_dtype = np.uint8 if len(self.observation_shape) == 3 else np.float32
        self.nvec, self.action_dim = action_sizes(self.vector.single_action_space)
        if config.norm_obs and self.observation_dtype == np.uint8:
            raise BadInput("--norm-obs is for vector observations; images are divided by 255 in any case")
        self.statistics = {"observation": RunningMeanStd(shape=self.observation_shape)} if config.norm_obs else {}
        self.statistics |= {"return": RunningMeanStd()} if config.norm_reward else {}

    def restart(self, *seed: int) -> None:
        """First episodes in environments made anew, so that the seed alone decides what follows."""
        if not self.is_fresh:
            self.close()
            self.vector = make_vector(self.config, self.num_envs, self.is_evaluation)
        self.is_fresh = False
        seed = np.random.SeedSequence([self.config.seed, *seed]).generate_state(1)[0] >> 1
        observations, info = call_environments(self.vector, self.config.env_id, "reset", seed=int(seed))
        self.returns, self.lengths, self.discounted_returns = np.zeros((3, self.num_envs))
        self.lives, self.episodes = info["lives"] if self.is_atari else None, []
        self.observations = self.normalize(observations)

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
    def close(self) -> None:
        try:
            self.vector.close()
        except Exception:  # a worker is gone; the others would outlive this process: they do not heed SIGTERM
            for process in getattr(self.vector, "processes", ()):
                process.kill()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """(N, A) -> observations, rewards, terminated, truncated, true last observations of truncated episodes"""
        env_actions = environment_actions(actions, self.vector.single_action_space)
        stepped = call_environments(self.vector, self.config.env_id, "step", env_actions)
        observations, rewards, terminated, truncated, info = stepped
        self.returns += rewards
        self.lengths += 1
        if self.config.clip_reward:
            rewards = rewards.clip(-1, 1)
        if self.config.norm_reward and not self.is_evaluation:
            rewards = self.normalize_rewards(rewards, terminated | truncated)
        final_observations = []
        if "final_obs" in info:
            game_over = terminated | truncated
            if self.is_atari:  # after a lost life the game goes on, a new one has as many or more
                game_over &= truncated | (info["lives"] >= self.lives)
            self.episodes += [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in np.flatnonzero(game_over)]
            self.returns[game_over] = self.lengths[game_over] = 0
            truncated = truncated & ~terminated
            final_observations = [self.normalize(last, learn=False) for last in info["final_obs"][truncated]]
        if self.is_atari:
            self.lives = info["lives"]
        self.observations = self.normalize(observations)
        return self.observations, rewards, terminated, truncated, final_observations

    def normalize(self, observations: np.ndarray, learn: bool = True) -> np.ndarray:
        if self.config.norm_obs:
            if learn and not self.is_evaluation:
                self.statistics["observation"].update(observations)
            mean, var = self.statistics["observation"].mean, self.statistics["observation"].var
            observations = ((observations - mean) / np.sqrt(var + 1e-8)).clip(-10, 10)
        return observations.astype(self.observation_dtype, copy=False)

    def normalize_rewards(self, rewards: np.ndarray, done: np.ndarray) -> np.ndarray:
        self.discounted_returns = self.config.gamma * self.discounted_returns + rewards
        self.statistics["return"].update(self.discounted_returns)
        self.discounted_returns[done] = 0
        return (rewards / np.sqrt(self.statistics["return"].var + 1e-8)).clip(-10, 10)

    def for_evaluation(self) -> "Environments":
        """E fresh ones with these statistics, which they do not change"""
        envs = Environments(self.config, self.config.eval_episodes, is_evaluation=True)
        envs.statistics = self.statistics
        return envs

    def to_numpy(self) -> dict[str, np.ndarray]:
        return {f"{name}_{key}": np.asarray(x) for name, s in self.statistics.items() for key, x in vars(s).items()}

    def from_numpy(self, arrays: dict[str, np.ndarray]) -> None:
        for name, statistics in self.statistics.items():
            vars(statistics).update({key: arrays[f"{name}_{key}"] for key in ("mean", "var", "count")})

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax vpg_torch
    def pop_episodes(self) -> list[tuple[int, float, int]]:
        """(environment, return, length) of the episodes that ended since the last call"""
        episodes, self.episodes = self.episodes, []
        return episodes

    def frame(self) -> np.ndarray:
        """Picture of the first environment, (height, width, 3)"""
        return np.stack([self.observations[0, -1]] * 3, -1) if self.is_atari else self.vector.envs[0].render()


# twin: ppo_torch ppo_mlx ppo_jax
def make_vector(config: Config, num_envs: int, is_evaluation: bool) -> gym.vector.VectorEnv:
    is_filmed, mode = is_evaluation and config.capture_video, {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        kwargs = json.loads(config.env_kwargs)
        if is_filmed:
            importlib.import_module("moviepy")  # missed now, not after the training
        if config.env_id.startswith("ALE/"):  # preprocessed as Mnih et al. 2015; sticky actions if kwargs say so
            gym.register_envs(importlib.import_module("ale_py"))
            mode |= {"life_loss_info": config.episodic_life, "reward_clipping": False, "repeat_action_probability": 0.0}
            vector = gym.make_vec(config.env_id, num_envs, "vector_entry_point", **mode | kwargs)
            shape = vector.single_observation_space.shape
            if len(shape) != 3 or min(shape[1:]) < SMALLEST_IMAGE:
                raise ValueError(f"the CNN needs grey images, {SMALLEST_IMAGE} a side or more, these are {shape[1:]}")
            return vector
        kwargs |= {"render_mode": "rgb_array"} if is_filmed else {}
        make = partial(make_env, config.env_id, kwargs)
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


# twin: ppo_torch ppo_mlx ppo_jax
def make_env(env_id: str, kwargs: dict) -> gym.Env:
    if multiprocessing.parent_process():  # signals reach all processes; the parent alone ends the run
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if env_id.startswith("dm_control/"):
        gym.register_envs(importlib.import_module("shimmy"))
    quieten_mujoco(env_id)
    env = gym.make(env_id, **kwargs)
    action_sizes(env.action_space)  # raises where it is not supported
    space = env.observation_space
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        channels = -1 if space.shape[-1] in (1, 3, 4) else 0  # axis
        space = spaces.Box(0, 255, np.moveaxis(space.sample(), channels, 0).shape, np.uint8)
        if min(space.shape[1:]) < SMALLEST_IMAGE:
            raise ValueError(f"the CNN needs images, {SMALLEST_IMAGE} a side or more, these are {space.shape[1:]}")
        return gym.wrappers.TransformObservation(env, lambda image: np.moveaxis(image, channels, 0).copy(), space)
    if not space.is_np_flattenable or isinstance(space, spaces.Text):
        raise ValueError(f"the observation space {space} is not supported; images and what flattens to a vector are")
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return gym.wrappers.TransformObservation(env, np.copy, space)  # a reset may write over an episode's last
    return gym.wrappers.FlattenObservation(env)


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


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def action_sizes(space: gym.Space) -> tuple[tuple[int, ...], int]:
    """(choices of each discrete dimension, none for a Box), A"""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), 1
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return tuple(space.nvec.tolist()), len(space.nvec)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return (), math.prod(space.shape)
    raise ValueError(f"the action space {space} is not supported; Discrete, flat MultiDiscrete and float Box are")


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def environment_actions(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """(N, A) as the policy chose them -> what the environments take. Box actions are clipped here and nowhere else."""
    if isinstance(space, spaces.Discrete):
        return (actions[:, 0] + space.start).astype(space.dtype)
    if isinstance(space, spaces.MultiDiscrete):
        return (actions + space.start).astype(space.dtype)
    return actions.reshape(-1, *space.shape).clip(space.low, space.high).astype(space.dtype)


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


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def check_actions(observations: np.ndarray, actions: np.ndarray) -> None:
    """Raises TrainingFailed where an action (T, …) is not finite though all observations until then are."""
    is_bad = ~np.isfinite(actions).all((1, 2))  # (T,)
    if is_bad.any() and np.isfinite(observations[: is_bad.argmax() + 1]).all():
        raise TrainingFailed("the policy gives an action that is not finite")


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


# ---------------------------------------------------------------------------------------------------------- gymnax

BEGIN, STEP, RESET, ACT, SHUFFLE = range(5)  # what random numbers are for
STEPS_OF_A_CALL = 16_384  # in which iterations of fewer steps share a call, whose price is some milliseconds


# twin: ppo_jax ppo_lstm_jax
class Simulator(NamedTuple):
    """N gymnax environments on the device, and all that decides what they do next."""

    keys: Tensor  # (5,), from BEGIN to SHUFFLE; folded with `steps`, a draw has one of its own
    steps: Tensor  # (), of each environment so far
    observations: Tensor  # (N, *O)
    states: object  # gymnax's, (N, …)
    returns: Tensor  # (N,), of the episodes so far, never clipped
    lengths: Tensor  # (N,)


# twin: ppo_jax ppo_lstm_jax
class Transition(NamedTuple):
    """One step (N, …), or a rollout of them (T, N, …)."""

    observations: Tensor  # (N, *O)
    actions: Tensor  # (N, A)
    rewards: Tensor  # (N,)
    terminated: Tensor  # (N,)
    truncated: Tensor  # (N,), without those that terminated in the same step
    final_observations: Tensor  # (N, *O), what the step led to, before any reset
    returns: Tensor  # (N,), of the episodes so far
    lengths: Tensor  # (N,)


class GymnaxEnvironments:
    """What `Environments` is to Gymnasium. The methods that take a simulator are pure, for compiled code."""

    def __init__(self, config: Config, num_envs: int):
        # XLA's newer scheduler can hang on the CPU in loops over seeds; a version may stop at a flag it does not know
        older, flags = " --xla_cpu_enable_concurrency_optimized_scheduler=false", os.environ.get("XLA_FLAGS", "")
        if version("jax") == "0.10.2" and older not in flags:
            os.environ["XLA_FLAGS"] = flags + older  # read when JAX first computes
        set_up_jax(config)
        self.config, self.num_envs = config, num_envs
        self.game, self.params, self.action_space = make_gymnax(config)
        self.nvec, self.action_dim = action_sizes(self.action_space)
        observation, _ = jax.eval_shape(self.first_observation, jax.random.key(0))
        self.observation_shape, self.observation_dtype = observation.shape, observation.dtype
        self.begin = compiled(self.first_episodes, config.num_seeds > 1)
        self.advance_alone = jax.jit(self.advance)
        self.simulator, self.episodes = None, []
        self.evaluated, self.evaluated_seed = None, 0  # from --seed on
        is_image = len(self.observation_shape) == 3  # the Nature CNN's convolutions are slow in a loop
        self.iterations_per_call = 1 if is_image else max(1, STEPS_OF_A_CALL // config.batch_size)

    def restart(self, *seed: int) -> None:
        """First episodes, where there are none yet: those of training, or of a checkpoint, go on."""
        if self.simulator is None:
            entropy = [[one.seed, *seed] for one in seeds(self.config)]
            keys = [jax.random.key(np.random.SeedSequence(words).generate_state(1)[0]) for words in entropy]
            self.simulator = self.on_devices(self.begin(keys[0] if len(keys) == 1 else jnp.stack(keys)))

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """As many local devices as divide the seeds, or the environments and minibatches of a single one"""
        config, devices = self.config, jax.local_devices(backend=jnp.zeros(()).device.platform)
        minibatch = config.batch_size // config.num_minibatches
        sizes = [config.num_seeds] if config.num_seeds > 1 else [self.num_envs, minibatch]
        return jax.sharding.Mesh(devices[: math.gcd(*sizes, len(devices))], ("devices",))

    def on_devices(self, tree: Learner | Simulator) -> Learner | Simulator:
        """Seeds are split among them; of a single one its environments, and the rest is on every device."""
        if self.mesh.size == 1:
            return tree
        split, whole = jax.NamedSharding(self.mesh, jax.P("devices")), jax.NamedSharding(self.mesh, jax.P())
        if self.config.num_seeds > 1:
            return jax.device_put(tree, split)
        if isinstance(tree, Simulator):
            return Simulator(*jax.device_put(tree[:2], whole), *jax.device_put(tree[2:], split))
        return jax.device_put(tree, whole)

    def plainly(self, phase: str | None, function: Callable, *arguments):
        """The `timed` of compiled code. Devices that share a seed act in their environments each by itself; minibatches
        are split, and XLA adds up what the devices compute of them."""
        if self.config.num_seeds > 1 or self.mesh.size == 1:
            return function(*arguments)
        whole, split = jax.P(), jax.P("devices")
        if function is collect_on_device:
            agent, simulator, *_ = arguments
            collect = partial(function, envs=self, config=self.config, timed=self.by_itself)
            of_simulator = Simulator(whole, whole, *[split] * len(simulator[2:]))
            specs = {"in_specs": (whole, of_simulator), "out_specs": (of_simulator, jax.P(None, "devices"))}
            return jax.shard_map(collect, mesh=self.mesh, check_vma=False, **specs)(agent, simulator)
        result = function(*arguments)
        if function is minibatches:
            return jax.lax.with_sharding_constraint(result, jax.NamedSharding(self.mesh, split))
        return result

    def by_itself(self, phase: str | None, function: Callable, *arguments):
        """The `timed` of a device that acts by itself"""
        result = function(*arguments)
        return self.part(result, 1) if function is draw_noise else result

    # twin: ppo_jax ppo_lstm_jax
    def first_episodes(self, key: Tensor) -> Simulator:
        keys, zeros = jax.random.split(key, 5), jnp.zeros(self.num_envs, jnp.int32)
        observations, states = jax.vmap(self.first_observation)(jax.random.split(keys[BEGIN], self.num_envs))
        states = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), states)  # some are weakly typed
        return Simulator(keys, jnp.int32(0), observations, states, zeros.astype(jnp.float32), zeros)

    # twin: ppo_jax ppo_lstm_jax
    def first_observation(self, key: Tensor) -> tuple[Tensor, object]:
        observation, state = self.game.reset_env(key, self.params)
        return network_input(observation), state

    # twin: ppo_jax ppo_lstm_jax
    def advance(self, simulator: Simulator, actions: Tensor) -> tuple[Simulator, Transition]:
        """(N, A) -> all environments one step on; an episode that ends there is followed by the next at once"""

        def step(key: Tensor, state: object, action: Tensor) -> tuple:
            action = action[0] if self.nvec else action.reshape(self.action_space.shape)
            observation, state, reward, terminated, _ = self.game.step_env(key, state, action, self.params)
            truncated = self.game.is_truncated(state, self.params) & ~terminated
            return network_input(observation), state, jnp.float32(reward).reshape(()), terminated, truncated

        def with_next_episodes() -> tuple:
            keys = self.each_key(simulator, RESET)
            fresh = *jax.vmap(self.first_observation)(keys), jnp.zeros_like(returns), jnp.zeros_like(lengths)
            return jax.tree.map(lambda x, y: jax.vmap(jnp.where)(done, x, y), fresh, after)

        bounds = () if self.nvec else (self.action_space.low.ravel(), self.action_space.high.ravel())
        env_actions = actions.clip(*bounds) if bounds else actions  # here and nowhere else
        keys = self.each_key(simulator, STEP)
        observations, states, rewards, terminated, truncated = jax.vmap(step)(keys, simulator.states, env_actions)
        returns, lengths = simulator.returns + rewards, simulator.lengths + 1
        after = observations, states, returns, lengths
        after = jax.tree.map(lambda x, like: x.astype(like.dtype), after, simulator[2:])  # some games mix them
        rewards = rewards.clip(-1, 1) if self.config.clip_reward else rewards
        transition = simulator.observations, actions, rewards, terminated, truncated, observations, returns, lengths
        done = terminated | truncated
        following = self.if_any(done, with_next_episodes, lambda: after)
        return Simulator(simulator.keys, simulator.steps + 1, *following), Transition(*transition)

    def each_key(self, simulator: Simulator, purpose: int) -> Tensor:
        """Each environment's own; of a device that is by itself, those of its environments"""
        keys = jax.random.split(draw(simulator, purpose), self.num_envs)
        return self.part(keys, 0) if len(simulator.lengths) < self.num_envs else keys

    def part(self, x: Tensor, axis: int) -> Tensor:
        """What belongs to the environments of this device, of what belongs to all"""
        size = self.num_envs // self.mesh.size
        return jax.lax.dynamic_slice_in_dim(x, size * jax.lax.axis_index("devices"), size, axis)

    def if_any(self, done: Tensor, then: Callable[[], tuple], otherwise: Callable[[], tuple]) -> tuple:
        """A reset costs as much as a step; devices that would have to ask one another wait for longer than that."""
        is_whole = len(done) == self.num_envs
        return then() if is_whole and self.mesh.size > 1 else jax.lax.cond(done.any(), then, otherwise)

    # twin: ppo_jax ppo_lstm_jax
    def write(self, simulator: Simulator, transitions: Transition, actions: Tensor, t: Tensor) -> tuple:
        """`advance`, the step written into row t of (T, N, …)"""
        simulator, transition = self.advance(simulator, actions)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=t, axis=0)
        return simulator, jax.tree.map(put, transitions, transition)

    # twin: ppo_jax ppo_lstm_jax
    def blank(self, simulator: Simulator) -> Transition:
        """(T, N, …), to be written"""
        actions = jnp.zeros((len(simulator.lengths), self.action_dim), jnp.int32 if self.nvec else jnp.float32)
        _, transition = jax.eval_shape(self.advance, simulator, actions)
        return jax.tree.map(lambda x: jnp.zeros((self.config.num_steps, *x.shape), x.dtype), transition)

    @property
    def observations(self) -> np.ndarray:
        return np.asarray(self.simulator.observations)

    @property
    def returns(self) -> np.ndarray:
        return np.asarray(self.simulator.returns)

    def step(self, actions: np.ndarray) -> None:
        """`advance`, for an evaluation"""
        self.simulator, transition = self.advance_alone(self.simulator, actions)
        self.add_episodes(transition)

    def add_episodes(self, transitions: Transition) -> None:
        """Those that ended in a step (N, …), in a rollout (T, N, …), or in one of many seeds (S, T, N, …)"""
        done = np.asarray(transitions.terminated) | np.asarray(transitions.truncated)
        returns, lengths = (np.asarray(x)[done].tolist() for x in (transitions.returns, transitions.lengths))
        *seed, _, env = np.nonzero(np.atleast_2d(done))
        env = env + self.num_envs * seed[0] if seed else env
        self.episodes += zip(env.tolist(), returns, lengths, strict=True)

    # twin: ppo_jax ppo_lstm_jax
    def pop_episodes(self) -> list[tuple[int, float, int]]:
        """(environment, return, length) of the episodes that ended since the last call"""
        episodes, self.episodes = self.episodes, []
        return episodes

    def for_evaluation(self) -> "GymnaxEnvironments":
        """E fresh ones; the same object each time, which keeps what is compiled"""
        config = dataclasses.replace(self.config, seed=self.config.seed + self.evaluated_seed, num_seeds=1)
        self.evaluated = self.evaluated or GymnaxEnvironments(config, config.eval_episodes)
        self.evaluated.config, self.evaluated.simulator = config, None
        self.evaluated.episodes = []  # where the warm-up left some
        return self.evaluated

    def close(self) -> None:
        """Nothing runs outside this process."""

    def to_numpy(self) -> dict[str, np.ndarray]:
        """The simulator by its paths, such as environment.states.time"""
        if self.simulator is None:
            return {}
        simulator = self.simulator._replace(keys=jax.random.key_data(self.simulator.keys))
        return {f"environment{keystr(path)}": np.asarray(x) for path, x in tree_leaves_with_path(simulator)}

    def from_numpy(self, arrays: dict[str, np.ndarray]) -> None:
        if "environment.steps" not in arrays:
            return  # a model
        like = jax.eval_shape(self.first_episodes, jax.random.key(0))
        simulator = tree_map_with_path(lambda path, _: jnp.asarray(arrays[f"environment{keystr(path)}"]), like)
        self.simulator = self.on_devices(simulator._replace(keys=jax.random.wrap_key_data(simulator.keys)))


# twin: ppo_jax ppo_lstm_jax
class Permutations:
    """What `update` asks of NumPy's generator, drawn on the device"""

    def __init__(self, simulator: Simulator, timed: Callable):
        self.simulator, self.timed, self.epoch = simulator, timed, itertools.count()

    def permutation(self, size: int) -> Tensor:
        return self.timed("shuffle", random_permutation, self.simulator, next(self.epoch), size)


# twin: ppo_jax ppo_lstm_jax
def random_permutation(simulator: Simulator, epoch: int, size: int) -> Tensor:
    """Sorts random numbers whose last bits are the positions; XLA sorts one array five times as fast as a pair."""
    positions = jnp.uint32(2 ** (size - 1).bit_length() - 1)
    bits = jax.random.bits(jax.random.fold_in(draw(simulator, SHUFFLE), epoch), (size,))
    shuffled = jnp.sort(bits & ~positions | jnp.arange(size, dtype=jnp.uint32)) & positions
    return shuffled.astype(jnp.int32)  # unsigned, a position before the first would be one far behind the last


# twin: ppo_jax ppo_lstm_jax
def draw(simulator: Simulator, purpose: int) -> Tensor:
    """A key of its own for each purpose and step"""
    return jax.random.fold_in(simulator.keys[purpose], simulator.steps)


# twin: ppo_jax ppo_lstm_jax
def draw_noise(agent: Agent, simulator: Simulator, config: Config) -> Tensor:
    """`action_noise` on the device, (T, N, ·)"""
    shape, key = (config.num_steps, config.num_envs), draw(simulator, ACT)
    if agent.nvec:
        return jax.random.gumbel(key, (*shape, sum(agent.nvec)))
    return jnp.exp(agent.log_std) * jax.random.normal(key, (*shape, len(agent.log_std)))


def choose_actions(agent: Agent, observations: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`act` on the device: (N, *O), (T, N, ·) -> (N, A)"""
    policy, _ = agent(observations)
    return (policy + noise[t]).argmax(-1, keepdims=True) if agent.nvec else policy + noise[t]


def collect_on_device(
    agent: Agent, simulator: Simulator, envs: GymnaxEnvironments, config: Config, timed: Callable
) -> tuple[Simulator, Transition]:
    """`collect_rollout` on the device: jax.lax.scan where JAX traces it, and else a loop of calls that can be timed"""
    noise = timed("forward", draw_noise, agent, simulator, config)

    def step(carry: tuple[Simulator, Transition], t: Tensor) -> tuple[tuple[Simulator, Transition], None]:
        simulator, transitions = carry
        actions = timed("forward", choose_actions, agent, simulator.observations, noise, t)
        return timed("step", envs.write, simulator, transitions, actions, t), None

    carry, ts = (simulator, timed("step", envs.blank, simulator)), np.arange(config.num_steps, dtype=np.int32)
    if is_traced(simulator.steps):
        return jax.lax.scan(step, carry, ts)[0]
    for t in ts:
        carry, _ = step(carry, t)
    return carry


def as_rollout(transitions: Transition, simulator: Simulator) -> Rollout:
    """Of the transitions and the simulator that they led to, on the device; a final observation (T, N, *O) a step"""
    observations = jnp.concatenate([transitions.observations, simulator.observations[None]])
    return Rollout(observations, *transitions[1:6])


# twin: ppo_jax ppo_lstm_jax
def digest(transitions: Transition) -> tuple[Transition, dict[str, Tensor]]:
    """What the host reads: of observations the newest alone, and since when numbers are not finite"""
    newest = transitions._replace(observations=transitions.observations[-1:, :1], final_observations=(), actions=())

    def since(x: Tensor, delay: int) -> Tensor:
        """Half steps (+ 1) to the end of the rollout from the first (T, …) that is not finite, 0 where there is none"""
        is_bad = ~jnp.isfinite(x).all(range(1, x.ndim))
        return jnp.where(is_bad, 2 * (len(x) - jnp.arange(len(x))) + 1 - delay, 0).max()

    observation = jnp.maximum(since(transitions.observations, 0), since(transitions.final_observations, 2))
    found = {"observation": observation, "action": since(transitions.actions, 1)}
    return newest, found | {"reward": since(transitions.returns, 2)}


# twin: ppo_jax ppo_lstm_jax
def check_digest(env_id: str, not_finite_since: dict[str, Tensor]) -> None:
    """Raises TrainingFailed with the name of what was not finite first: the others followed from it."""
    longest = {name: np.max(x) for name, x in not_finite_since.items()}
    first = max(longest, key=longest.get)
    if longest[first]:
        what = "the policy gives an action that" if first == "action" else f"{env_id}: the {first}"
        raise TrainingFailed(f"{what} is not finite")


def iterate_on_device(
    learner: Learner, simulator: Simulator, envs: GymnaxEnvironments, config: Config, timed: Callable
) -> tuple[Learner, Simulator, tuple, Batch, dict[str, Tensor]]:
    """Rollout and update -> learner, simulator, what the host reads of the rollout, batch, metrics"""
    simulator, transitions = timed(None, collect_on_device, learner.agent, simulator, envs, config, timed)
    rollout = timed("gae", as_rollout, transitions, simulator)
    learner, batch, metrics = update(learner, rollout, config, Permutations(simulator, timed), timed)
    return learner, simulator, timed("step", digest, transitions), batch, metrics


def iterate_fused(
    learner: Learner, simulator: Simulator, rates: Tensor, envs: GymnaxEnvironments, config: Config, count: Tensor
) -> tuple[Learner, Simulator, tuple, Batch, dict[str, Tensor]]:
    """`count` iterations in one call, with a learning rate each -> as one iteration: the rollouts follow one another in
    the transitions (zeros after the last), the batch is the last, metrics are means"""
    iterate = partial(iterate_on_device, envs=envs, config=config, timed=envs.plainly)
    if len(rates) == 1:
        return iterate(learner, simulator)

    def iteration(i: Tensor, carry: tuple) -> tuple:
        learner, simulator, (transitions, earlier), _, totals = carry
        learner = learner._replace(learning_rate=jnp.full_like(learner.learning_rate, rates[i]))
        learner, simulator, (newest, later), batch, metrics = iterate(learner, simulator)
        put = jax.lax.dynamic_update_slice_in_dim
        transitions = jax.tree.map(lambda whole, x: put(whole, x, i * len(x), 0), transitions, newest)
        is_found, totals = sum(earlier.values()) > 0, jax.tree.map(jnp.add, totals, metrics)
        earliest = jax.tree.map(partial(jnp.where, is_found), earlier, later)  # what comes later follows from it
        return learner, simulator, (transitions, earliest), batch, totals

    outputs = jax.tree.map(jnp.zeros_like, jax.eval_shape(iterate, learner, simulator)[2:])
    (transitions, not_finite_since), *rest = outputs
    transitions = jax.tree.map(lambda x: jnp.repeat(x, len(rates), 0), transitions)
    carry = learner, simulator, (transitions, not_finite_since), *rest
    *outcome, totals = jax.lax.fori_loop(0, count, iteration, carry)
    return *outcome, jax.tree.map(lambda x: x / count, totals)


def collect_and_update(
    learner: Learner,
    envs: GymnaxEnvironments,
    rates: list[float],
    config: Config,
    stopwatch: "Stopwatch",
    is_timed: bool,
) -> tuple[Learner, Transition, Batch, dict[str, float]]:
    """One iteration phase by phase, or one for each learning rate in one call"""
    if is_timed:
        outcome = iterate_on_device(learner, envs.simulator, envs, config, stopwatch.timed)
    else:
        all_rates = np.zeros(envs.iterations_per_call, learner.agent.weights.dtype)
        all_rates[: len(rates)] = rates
        arguments = learner, envs.simulator, all_rates, envs, config, np.int32(len(rates))
        outcome = stopwatch.timed("update", iterate_fused, *arguments)
    learner, envs.simulator, (transitions, not_finite_since), batch, metrics = outcome
    check_digest(config.env_id, not_finite_since)
    envs.add_episodes(transitions)
    return learner, transitions, batch, on_host(metrics)


def compiled_on_device(envs: GymnaxEnvironments) -> dict[Callable, Callable]:
    """What runs in place of each function: compiled, and for many seeds at once where there are many"""
    over_seeds = partial(compiled, over_seeds=envs.config.num_seeds > 1)
    plain = envs.blank, as_rollout, digest, averaged, explained_variance
    with_config = draw_noise, make_batch, minibatches, loss_and_gradient, apply_gradient
    return {
        iterate_fused: over_seeds(iterate_fused, shared=(2, 5), constant=(3, 4), donated=(0, 1)),
        collect_on_device: over_seeds(partial(envs.plainly, None, collect_on_device), constant=(2, 3, 4)),
        envs.write: over_seeds(envs.write, shared=(3,), donated=(0, 1)),
        choose_actions: over_seeds(choose_actions, shared=(3,)),
        random_permutation: over_seeds(random_permutation, shared=(1,), constant=(2,)),
        kl_and_clip_fraction: over_seeds(kl_and_clip_fraction, constant=(1,)),
        **{function: over_seeds(function, constant=(2,)) for function in with_config},
        **{function: over_seeds(function) for function in plain},
    }


def compiled(
    function: Callable,
    over_seeds: bool,
    constant: tuple[int, ...] = (),
    shared: tuple[int, ...] = (),
    donated: tuple[int, ...] = (),
) -> Callable:
    """Positions of arguments: constants of the code, arrays that all seeds share, arrays that it may overwrite"""

    def mapped(*arguments):
        axes = [None if i in constant + shared else 0 for i in range(len(arguments))]
        return jax.vmap(function, axes)(*arguments)

    return jax.jit(mapped if over_seeds else function, static_argnums=constant, donate_argnums=donated)


def warm_up_on_device(learner: Learner, envs: GymnaxEnvironments, config: Config, stopwatch: "Stopwatch") -> None:
    """`warm_up`, by two fused iterations and one phase by phase on copies, which these use up"""
    stopwatch.compiled |= compiled_on_device(envs)
    if config.eval_episodes:
        evaluated = envs.for_evaluation()
        evaluated.restart(0)
        agent = learner.agent if config.num_seeds == 1 else unstacked(learner)[0].agent
        evaluated.step(act(agent, evaluated.observations))
    if not config.num_iterations:
        return
    envs.restart(0)
    simulator, unread = envs.simulator, Stopwatch(stopwatch.fence, stopwatch.compiled)
    learner, envs.simulator = jax.tree.map(jnp.copy, (learner, simulator))
    for is_timed in (False, False, config.timing_interval > 0):
        learner = with_learning_rate(learner, config.learning_rate)
        learner, _, batch, _ = collect_and_update(learner, envs, [config.learning_rate], config, unread, is_timed)
        to_numpy(learner)  # or the first checkpoint would compile it
    if config.timing_interval:
        probe(learner, envs, batch, config, unread)
    envs.simulator, envs.episodes = simulator, []


# twin: ppo_jax ppo_lstm_jax
def network_input(observation: Tensor) -> Tensor:
    """An image as (channels, height, width), bytes as they are; anything else as a vector"""
    observation = jnp.moveaxis(observation, -1, 0) if observation.ndim == 3 else observation.ravel()
    return observation if observation.dtype == jnp.uint8 else observation.astype(jnp.float32)


def seeds(config: Config) -> list[Config]:
    """The runs of --num-seeds, each by itself"""
    numbers = range(config.seed, config.seed + config.num_seeds)
    return [dataclasses.replace(config, seed=seed, num_seeds=1) for seed in numbers]


def of_seed(k: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = f"seed_{k}."
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def loaded(path: str, learner: Learner, envs: "Environments") -> Learner:
    """`load_model`, every seed from the same"""
    if learner.agent.weights.ndim == 1:
        return load_model(path, learner, envs)
    return stacked([load_model(path, one, envs) for one in unstacked(learner)])


def greedy(learner: Learner) -> Callable | list[Callable]:
    """Observations -> most likely actions; for each of many seeds"""
    is_single = learner.agent.weights.ndim == 1
    return partial(act, learner.agent) if is_single else [partial(act, one.agent) for one in unstacked(learner)]


# twin: ppo_jax ppo_lstm_jax
def is_gymnax(config: Config) -> bool:
    return config.env_id.startswith("gymnax/")


def checked_for_gymnax(config: Config) -> Config:
    """Raises BadInput for flags that do not go with environments on the device."""
    if config.num_seeds > 1 and not is_gymnax(config):
        raise BadInput(f"--num-seeds {config.num_seeds}: environments outside the device have one seed a run")
    if config.num_seeds > 1 and config.target_kl is not None:
        raise BadInput(f"--target-kl {config.target_kl}: seeds that learn at once take the same number of epochs")
    for name in ("norm_obs", "norm_reward", "episodic_life", "capture_video"):
        if is_gymnax(config) and getattr(config, name):
            flag = name.replace("_", "-")
            raise BadInput(f"--{flag}: not for {config.env_id}, which runs on the device; leave it out")
    return config


# twin: ppo_jax ppo_lstm_jax
def make_gymnax(config: Config) -> tuple[object, object, gym.Space]:
    """The game, its parameters, and its action space as Gymnasium's"""
    try:
        gymnax = importlib.import_module("gymnax")
        name, kwargs = config.env_id.removeprefix("gymnax/"), json.loads(config.env_kwargs)
        if name == "MNISTBandit-bsuite":
            raise ValueError("it would download its images")
        _, params = gymnax.make(name)
        changed = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(params) if field.name in kwargs}
        game, params = gymnax.make(name, **kwargs)
        params = params.replace(**changed)
        space, spaces = game.observation_space(params), gymnax.environments.spaces
        if not isinstance(space, spaces.Box):
            raise ValueError(f"the observation space {space} is not supported; Box is")
        if len(space.shape) == 3 and min(space.shape[:2]) >= SMALLEST_IMAGE and space.dtype != jnp.uint8:
            raise ValueError(f"images of {SMALLEST_IMAGE} x {SMALLEST_IMAGE} or more must be bytes")
        action_space = spaces.gymnax_space_to_gym_space(game.action_space(params))
        action_sizes(action_space)  # raises where it is not supported

        def begin_and_step(key: Tensor) -> tuple:
            _, states = game.reset(key, params)
            return game.step(key, states, game.action_space(params).sample(key), params)

        jax.eval_shape(begin_and_step, jax.eval_shape(partial(jax.random.key, 0)))  # raises where parameters do not fit
        return game, params, action_space
    except Exception as error:
        hint = "; pip install -r requirements/all.txt" if isinstance(error, ImportError) else ""
        raise BadInput(f"--env-id {config.env_id} --env-kwargs {config.env_kwargs}: {one_line(error)}{hint}") from error


# ------------------------------------------------------------------------------------------------- stopwatch and run

OUTSIDE = ("compile", "evaluation", "checkpoint", "probe")  # phases that are in no iteration
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LONGEST_STEP = 600  # seconds of a step or a reset in a process of its own, which hangs if it takes longer
LONGEST_EVALUATION = 100_000  # steps; an episode that goes on for longer is left out
LONGEST_FILM = 2000  # frames, which stay in memory until it is written: 1.4 GB of MuJoCo's
SECONDS_TO_WRITE_A_ROW = 5  # W&B's server writes what it got once a second, and does not when it is left alone
SECONDS_OF_A_ROW = 0.2  # of iterations, at least: a row with its histograms costs up to 4 ms
TRAINING_ONLY = ("optimizer.", "buffer.", "environment.")  # arrays of a checkpoint that a model does not need


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


class DeviceRun(Run):
    """Where a fused call holds several iterations: then every --timing-interval-th call is a timed iteration."""

    def __init__(self, *arguments, **about: str):
        super().__init__(*arguments, **about)
        self.added = self.iteration  # to the row

    def restore(self, learner: Learner, rng: np.random.Generator, memory: GymnaxEnvironments) -> Learner:
        return memory.on_devices(super().restore(learner, rng, memory))

    def is_timed(self, iteration: int) -> bool:
        interval = self.config.timing_interval
        return interval > 0 and iteration % ((interval - 1) * self.envs.iterations_per_call + 1) == 0

    def iterations_of_call(self) -> range:
        """From this iteration to the last that the next call holds: until one is timed or something is due"""
        first, config = self.iteration, self.config
        while not (
            self.iteration - first == self.envs.iterations_per_call - 1
            or self.iteration == config.num_iterations
            or self.is_timed(self.iteration)
            or self.is_timed(self.iteration + 1)
            or self.is_due(config.eval_interval)
            or self.is_due(config.checkpoint_every)
        ):
            self.iteration += 1
        return range(first, self.iteration + 1)

    def add(self, values: dict[str, float]) -> None:
        """A call's seconds are shared by its iterations."""
        num_iterations = 1
        if "times/iteration" in values:
            num_iterations, self.added = self.iteration - self.added, self.iteration
        values = {name: x / num_iterations if name.startswith("times/") else x for name, x in values.items()}
        for _ in range(num_iterations):
            super().add(values)


class SeedsRun(DeviceRun):
    """Many seeds, a W&B run each in seed_<k>/. A row's values of seed k go by the name seed_<k>.…, the rest to all, but
    for what would mix the seeds (POOLED)."""

    POOLED = ("charts/episodic", "charts/return", "charts/evaluation", "histograms/")  # what is not of one seed

    def open_record(self, about: dict, **where: str | Path):
        self.records, self.sent_at = [], -math.inf
        for k, one in enumerate(seeds(self.config)):
            part = self.directory / f"seed_{k}"
            part.mkdir(exist_ok=True)
            more = {
                "id": f"{where['id']}-{k}",
                "dir": part,
                "name": f"{self.directory.name}-{k}",
                "reinit": "create_new",
            }
            self.records.append(super().open_record(about | dataclasses.asdict(one), **more))
        return self

    def define_metric(self, *arguments, **options) -> None:
        for record in self.records:
            record.define_metric(*arguments, **options)

    def log(self, row: dict) -> None:
        everyones = {name: x for name, x in row.items() if not name.startswith(("seed_", *self.POOLED))}
        for k, record in enumerate(self.records):
            record.log(everyones | of_seed(k, row))

    def send_row(self, media: Callable[[], dict] = dict) -> None:
        """A row costs by the seed, so many seeds wait longer for one; the last rows do not."""
        is_long = time.perf_counter() - self.sent_at >= SECONDS_OF_A_ROW * self.config.num_seeds / 8
        is_beside_timed = self.is_timed(self.iteration) or self.is_timed(self.iteration + 1)
        is_last = self.iteration == self.config.num_iterations or "times/iteration" not in self.row
        if is_long or is_beside_timed or is_last or "charts/evaluation_return" in self.row:
            super().send_row(media)
            self.sent_at = time.perf_counter()

    def save_checkpoint(self, learner: Learner) -> None:
        self.sent_at = -math.inf
        super().save_checkpoint(learner)

    def finish(self, exit_code: int) -> None:
        for record in self.records:
            record.finish(exit_code=exit_code)

    def check(self, metrics: dict[str, float]) -> None:
        super().check({name: np.sum(x) for name, x in metrics.items()})

    def record(self, metrics: dict[str, float], samples: Callable[[], dict[str, np.ndarray]]) -> None:
        own = {name: x for name, x in metrics.items() if np.ndim(x)}
        for k in range(self.config.num_seeds):
            self.add({f"seed_{k}.{name}": x[k] for name, x in own.items()})
        for env, episode_return, length in self.envs.episodes:
            seed = f"seed_{env // self.envs.num_envs}"
            self.add({f"{seed}.charts/episodic_return": episode_return, f"{seed}.charts/episodic_length": length})
        super().record({name: x for name, x in metrics.items() if name not in own}, dict)

    def evaluate(self, act: list[Callable]) -> list[float]:
        returns = []
        for k, act_of_seed in enumerate(act):
            self.envs.evaluated_seed = k
            found = super().evaluate(act_of_seed)
            self.add({f"seed_{k}.charts/evaluation_return": sum(found) / len(found)} if found else {})
            returns += found
        return returns

    def save_model(self, directory: Path, config: Config, arrays: dict[str, np.ndarray]) -> None:
        for k, one in enumerate(seeds(config)):
            super().save_model(directory / f"seed_{k}", one, of_seed(k, arrays))


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


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def load_model(path: str, learner: Learner, envs: Environments) -> Learner:
    """Weights and statistics of a model.safetensors that a script with the same networks wrote."""
    arrays, _ = load_arrays(path)
    expected = to_numpy(learner) | envs.to_numpy()
    expected = {name: array for name, array in expected.items() if not name.startswith(TRAINING_ONLY)}
    for name in sorted(arrays.keys() | expected.keys()):
        there, here = (getattr(side.get(name), "shape", "missing") for side in (arrays, expected))
        if there != here:
            why = "another script or environment made it, or other flags of networks and statistics"
            raise BadInput(f"--load-model {path}: {name} is {there} there and {here} here; {why}")
    envs.from_numpy(arrays)
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


# twin: ppo_torch ppo_mlx ppo_jax
def validate(config: Config) -> Config:
    """Raises BadInput where a value is not what Config allows, or where values do not go together."""
    config = checked_fields(config)
    rollout = f"{config.num_envs} environments x {config.num_steps} steps"
    if config.batch_size % config.num_minibatches or config.batch_size == config.num_minibatches:
        raise BadInput(f"--num-minibatches {config.num_minibatches}: must split {rollout} into parts of 2 or more")
    if 0 < config.total_timesteps < config.iteration_steps:
        steps = f"{config.iteration_steps} steps"
        raise BadInput(f"--total-timesteps {config.total_timesteps}: must be 0 or reach one rollout, {steps}")
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
