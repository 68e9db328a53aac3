# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0",
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
"""Proximal policy optimisation (PPO) in PyTorch, in one file.

    python ppo_torch.py --env-id CartPole-v1
    torchrun --nproc-per-node 2 ppo_torch.py --env-id CartPole-v1

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

Processes that torchrun starts have N environments each, and learn as one process with all their batches would; the
first records the run, and its own episodes.
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
from datetime import timedelta
from functools import cache, cached_property, partial, reduce
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import pydantic
import safetensors.numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
import wandb
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

FRAMEWORK = "torch"

# ---------------------------------------------------------------------------------------------------------- Config

Count = Annotated[int, Field(ge=1, lt=2**31)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Config:
    env_id: str = "CartPole-v1"  # Gymnasium id, module:Id-v0, ALE/Game-v5 or dm_control/domain-task-v0
    env_kwargs: str = "{}"  # JSON passed to the environment, such as '{"gravity": 5.0}'
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seed of weights, actions, minibatches and environments
    total_timesteps: Steps = 500_000  # environment steps of the whole run, all environments and processes together
    learning_rate: Positive = 2.5e-4  # Adam's learning rate at the start
    final_learning_rate: NonNegative = 0.0  # learning rate at the end of an annealed run
    anneal_lr: bool = True  # go linearly from --learning-rate to --final-learning-rate
    num_envs: Count = 4  # N, environments that step together, in each process
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one, mps for images, else cpu
    compile: bool = False  # torch.compile the loss with its gradient (needs a C++ compiler)
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0  # CPU threads of torch; 0: 1 for vectors, all for images
    timing_interval: Steps = 20  # every K-th iteration runs phase by phase, fenced; 1: always, 0: never
    eval_episodes: Steps = 10  # episodes of an evaluation: deterministic policy, fresh environments; 0: none
    eval_interval: Steps = 0  # environment steps between evaluations; 0: only one at the end
    checkpoint_interval: Steps | None = None  # steps to a checkpoint (new episodes); None: 1/10, ≥5000 N; 0: on signals
    capture_video: bool = False  # film the first episode of every evaluation, 2000 steps at most
    save_model: bool = True  # write model.safetensors at the end
    load_model: str | None = None  # start from this model.safetensors: its weights and normalisation statistics
    resume: str | None = None  # go on with the run in this directory; needs no other flag
    run_dir: str | None = None  # directory of the run's files; None: runs/<env>__<script>__<seed>__<time>
    exp_name: str = "ppo_torch"  # <script> in the name of the run
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline: nothing leaves the machine
    wandb_project: Annotated[str, Field(pattern=r"^[^/\\#?%:]+$", max_length=128)] = "deep-rl-scripts"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group; None: <env>__<script>, so that seeds fall together

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def iteration_steps(self) -> int:
        return self.batch_size * num_processes()

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.iteration_steps

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax vpg_torch
    @property
    def checkpoint_every(self) -> int:
        default = max(self.total_timesteps // 10, 5000 * self.num_envs)  # so that episodes end in between
        return default if self.checkpoint_interval is None else self.checkpoint_interval


# -------------------------------------------------------------------------------------------------------- networks


class Agent(nn.Module):
    """Policy and value function: two tanh networks, or two linear heads on a shared CNN for images.

    The actor gives the logits of all discrete choices side by side, or the mean of a Gaussian whose standard deviation
    exp(log_std) does not depend on the state (log_std is None for discrete actions).
    """

    def __init__(self, observation_shape: tuple[int, ...], nvec: tuple[int, ...], action_dim: int, config: Config):
        super().__init__()
        is_image = len(observation_shape) == 3
        sizes = (512,) if is_image else (*observation_shape, *config.hidden_sizes)
        self.nvec = nvec  # choices of each discrete action dimension; () for continuous actions
        self.encoder = NatureCNN(observation_shape) if is_image else None
        self.actor = MLP(*sizes, sum(nvec) or action_dim, gain=0.01)
        self.critic = MLP(*sizes, 1, gain=1.0)
        self.log_std = None if nvec else nn.Parameter(torch.zeros(action_dim))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *O) -> logits (B, sum(nvec)) or means (B, A), values (B,)"""
        features = self.encode(observations)
        return self.actor(features), self.critic(features).squeeze(-1)

    def encode(self, observations: Tensor) -> Tensor:
        return self.encoder(observations) if self.encoder else observations

    @cached_property
    def parameter_list(self) -> list[nn.Parameter]:
        return list(self.parameters())


class MLP(nn.Sequential):
    """Linear layers of these sizes with tanh between them; `gain` is the last layer's."""

    def __init__(self, *sizes: int, gain: float):
        hidden = [(initialised(nn.Linear(*pair)), nn.Tanh()) for pair in itertools.pairwise(sizes[:-1])]
        super().__init__(*sum(hidden, ()), initialised(nn.Linear(*sizes[-2:]), gain))
        self.hidden = [(linear.weight, linear.bias, activation.forward) for linear, activation in hidden]
        self.last = self[-1].weight, self[-1].bias

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Sequential's, in half the time for a few observations: no hooks, no look-up of the weights."""
        for weight, bias, activation in self.hidden:
            x = activation(F.linear(x, weight, bias))
        return F.linear(x, *self.last)


SMALLEST_IMAGE = 36  # pixels a side of which the convolutions leave something


class NatureCNN(nn.Sequential):
    """Byte images (B, channels, height, width) -> (B, 512) (Mnih et al. 2015, "Human-level control …")"""

    def __init__(self, observation_shape: tuple[int, ...]):
        channels, *sides = observation_shape
        flat = 64 * math.prod(((side - 8) // 4 + 1 - 4) // 2 + 1 - 2 for side in sides)
        layers = [nn.Conv2d(channels, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)]
        convolutions = sum(((initialised(layer), nn.ReLU()) for layer in layers), ())
        super().__init__(*convolutions, nn.Flatten(), initialised(nn.Linear(flat, 512)), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        channels_last = torch.channels_last  # 1.4 times as fast on CPU
        return super().forward(images.to(self[0].weight.dtype, memory_format=channels_last) / 255)


# twin: ppo_torch vpg_torch
def initialised(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014) times a gain, biases zero."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------------------------ data


# twin: ppo_torch ppo_mlx
class Rollout(NamedTuple):
    """What the environments gave."""

    observations: np.ndarray  # (T + 1, N, *O); the last row begins the next rollout
    actions: np.ndarray  # (T, N, A)
    rewards: np.ndarray  # (T, N)
    terminated: np.ndarray  # (T, N)
    truncated: np.ndarray  # (T, N), without those that terminated in the same step
    final_observations: np.ndarray  # (L, *O): true last observations of the L truncated episodes, in (T, N) order


# twin: ppo_torch ppo_mlx ppo_jax
class Batch(NamedTuple):
    """A whole rollout or one minibatch on the device, one sample a row."""

    observations: Tensor  # (B, *O)
    actions: Tensor  # (B, A)
    log_probs: Tensor  # (B,), of the policy that acted
    values: Tensor  # (B,), before the update
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


class Learner(NamedTuple):
    """What an update changes, in place: `to_numpy` makes a copy."""

    agent: Agent
    weights: nn.Parameter  # all of the agent's, in one vector; its layers hold views of it
    optimizer: torch.optim.Adam


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


def log_probs_and_entropies(
    policy: Tensor, log_std: Tensor | None, actions: Tensor, nvec: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """log π(a|s) and entropy of π(·|s), one each of a sample, summed over the independent action dimensions."""
    if not nvec:
        log_probs = -0.5 * ((actions - policy) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        entropies = (log_std + 0.5 * math.log(2 * math.pi * math.e)).expand_as(log_probs)
        return log_probs.sum(-1), entropies.sum(-1)
    logits = policy.split(nvec, -1) if len(nvec) > 1 else [policy]  # a split costs more than a softmax
    parts = [part.log_softmax(-1) for part in logits]
    log_probs = [part.gather(-1, action).squeeze(-1) for part, action in zip(parts, actions.split(1, -1), strict=True)]
    entropies = [-(part.exp() * part).sum(-1) for part in parts]
    return reduce(torch.add, log_probs), reduce(torch.add, entropies)


# twin: ppo_torch vpg_torch
def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages by GAE eq. 16, everything (T, N): δ_t = r_t + γ V(s'_t) - V(s_t), Â_t = δ_t + γλ Â_{t+1}.

    s'_t is the true next observation. Only termination cuts V(s'_t); any end of an episode (`done`) cuts Â_{t+1}.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    decays = gamma * lam * (1 - done)
    advantages = [torch.zeros_like(deltas[0])]
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind()), strict=True):
        advantages.append(torch.addcmul(delta, decay, advantages[-1]))
    return torch.stack(advantages[:0:-1])


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """-L^CLIP (PPO eq. 7), the mean over all samples; log_ratio = log π(a|s) - log π_old(a|s)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """½ (V - R)² (PPO eq. 9 has no ½), mean over all samples; V gains nothing beyond V_old ± clip_coef, if given."""
    squared_errors = (values - returns) ** 2
    if clip_coef is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        squared_errors = torch.maximum(squared_errors, (clipped_values - returns) ** 2)
    return 0.5 * squared_errors.mean()


def kl_and_clip_fraction(log_ratio: Tensor, clip_coef: float) -> dict[str, Tensor]:
    """KL(π_old ‖ π) by estimators k3 and k1 (Schulman 2020, "Approximating KL Divergence"); clipped fraction."""
    ratio = log_ratio.exp()
    is_clipped = ((ratio - 1).abs() > clip_coef).to(ratio.dtype)
    k1, k3 = -log_ratio, ratio - 1 - log_ratio
    return {"approx_kl": k3.mean(), "old_approx_kl": k1.mean(), "clipfrac": is_clipped.mean()}


def explained_variance(batch: Batch) -> Tensor:
    """Of the returns by the values: 1 - Var(R - V) / Var(R), with R - V = Â, over all processes"""
    return 1 - moments(batch.advantages)[1] / moments(batch.returns)[1]


# twin: ppo_torch vpg_torch
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all processes"""
    mean = mean_over_processes(x.mean())
    return mean, mean_over_processes(((x - mean) ** 2).mean())


# twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax
def annealed_learning_rate(iteration: int, config: Config) -> float:
    """From --learning-rate at the first update to --final-learning-rate one update after the last."""
    progress = (iteration - 1) / config.num_iterations if config.anneal_lr else 0.0
    return (1 - progress) * config.learning_rate + progress * config.final_learning_rate


# ---------------------------------------------------------------------------------------------------------- update


def loss_and_gradient(agent: Agent, minibatch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO eq. 9 -> its gradient as a vector of all weights, the three losses, log-ratio (B,)"""
    policy, values = agent(minibatch.observations)
    log_probs, entropies = log_probs_and_entropies(policy, agent.log_std, minibatch.actions, agent.nvec)
    log_ratio, value_clip = log_probs - minibatch.log_probs, config.clip_coef if config.clip_vloss else None
    losses = {
        "policy_loss": policy_loss(log_ratio, minibatch.advantages, config.clip_coef),
        "value_loss": value_loss(values, minibatch.values, minibatch.returns, value_clip),
        "entropy": entropies.mean(),
    }
    loss = losses["policy_loss"] + config.vf_coef * losses["value_loss"] - config.ent_coef * losses["entropy"]
    gradients = torch.autograd.grad(loss, agent.parameter_list)
    gradient = torch.cat([part.flatten() for part in gradients])
    return gradient, {name: value.detach() for name, value in losses.items()}, log_ratio.detach()


def apply_gradient(learner: Learner, gradient: Tensor, config: Config) -> tuple[Learner, Tensor]:
    """Scales the gradient by min(1, max_grad_norm / (norm + 1e-6)); one step of Adam -> learner, norm before"""
    gradient = mean_over_processes(gradient)
    norm = gradient.norm()
    learner.weights.grad = gradient * (config.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    learner.optimizer.step()
    return learner, norm


@torch.no_grad()
def make_batch(agent: Agent, rollout: Rollout, config: Config) -> Batch:
    """Log-probabilities and values of the whole rollout in one call, then advantages and returns."""
    observations, actions, rewards, terminated, truncated, final_observations = to_tensors(agent, *rollout)
    policy, values = agent(observations.flatten(0, 1))
    values = values.reshape(observations.shape[:2])  # (T + 1, N)
    next_values = values[1:].clone()
    if len(final_observations):
        _, next_values[truncated.bool()] = agent(final_observations)
    done = terminated + truncated
    advantages = gae(rewards, values[:-1], next_values, terminated, done, config.gamma, config.gae_lambda).flatten()
    observations, actions, values = observations[:-1].flatten(0, 1), actions.flatten(0, 1), values[:-1].flatten()
    log_probs, _ = log_probs_and_entropies(policy[: config.batch_size], agent.log_std, actions, agent.nvec)
    return Batch(observations, actions, log_probs, values, advantages, returns=advantages + values)


def minibatches(batch: Batch, permutation: np.ndarray, config: Config) -> list[Batch]:
    """One epoch: each sample once, in the order given; advantages are normalised within each minibatch, that of all
    processes together."""
    indices = torch.from_numpy(permutation).to(batch.values.device).reshape(config.num_minibatches, -1)
    shuffled = Batch(*(field[indices] for field in batch))
    if config.norm_adv:
        advantages = shuffled.advantages  # (M, B / M)
        deviations = advantages - mean_over_processes(advantages.mean(1, keepdim=True))
        size = advantages.shape[1] * num_processes()
        variances = mean_over_processes(deviations.square().mean(1, keepdim=True)) * size / (size - 1)
        shuffled = shuffled._replace(advantages=deviations / (variances.sqrt() + 1e-8))
    return list(map(Batch, *shuffled))


# twin: ppo_torch ppo_mlx ppo_jax
def update_minibatch(learner: Learner, minibatch: Batch, config: Config, timed: Callable):
    """-> learner, losses and norm of the gradient, log-ratio (B,)"""
    gradient, losses, log_ratio = timed("loss", loss_and_gradient, learner.agent, minibatch, config)
    learner, gradient_norm = timed("weight_update", apply_gradient, learner, gradient, config)
    return learner, losses | {"grad_norm": gradient_norm}, log_ratio


def update_epoch(learner: Learner, batch: Batch, permutation: np.ndarray, config: Config, timed: Callable):
    """-> learner, means over the minibatches of what the record calls losses/…"""
    losses, log_ratios = [], []
    for minibatch in timed("shuffle", minibatches, batch, permutation, config):
        learner, minibatch_losses, log_ratio = update_minibatch(learner, minibatch, config, timed)
        losses.append(minibatch_losses)
        log_ratios.append(log_ratio)
    losses, log_ratios = timed("loss", averaged, losses, log_ratios)
    metrics = timed("kl", kl_and_clip_fraction, log_ratios, config.clip_coef) | losses
    means = mean_over_processes(torch.stack(list(metrics.values())))
    return learner, dict(zip(metrics, means, strict=True))


# twin: ppo_torch ppo_mlx
def update(
    learner: Learner, rollout: Rollout, config: Config, rng: np.random.Generator, timed: Callable
) -> tuple[Learner, Batch, dict[str, float]]:
    """At most K epochs -> learner, the batch, losses/… averaged over all minibatches

    `timed(phase, function, *arguments)` is function(*arguments), clocked as that phase where the update is not fused.
    """
    batch = timed("gae", make_batch, learner.agent, rollout, config)
    epochs: list[dict[str, Tensor]] = []
    for _ in range(config.update_epochs):
        permutation = rng.permutation(config.batch_size)
        learner, metrics = timed(None, update_epoch, learner, batch, permutation, config, timed)
        epochs.append(metrics)
        if config.target_kl is not None and metrics["approx_kl"] > config.target_kl:
            break
    metrics = {f"losses/{name}": sum(float(epoch[name]) for epoch in epochs) / len(epochs) for name in epochs[0]}
    metrics["losses/explained_variance"] = float(timed("gae", explained_variance, batch))
    return learner, batch, metrics


# --------------------------------------------------------------------------------------------------------- rollout


def action_noise(rng: np.random.Generator, shape: tuple[int, ...], agent: Agent) -> np.ndarray:
    """(*shape, ·) for `sample_actions`"""
    if agent.nvec:
        return rng.gumbel(size=(*shape, sum(agent.nvec))).astype(np.float32)
    std = np.exp(agent.log_std.numpy(force=True))
    return std * rng.standard_normal((*shape, len(std)), np.float32)


def act(agent: Agent, observations: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """(N, *O), (N, ·) -> (N, A). An environment needs the action alone; `make_batch` computes the rest at once."""
    observations = torch.from_numpy(observations).to(agent.parameter_list[0].device)
    return sample_actions(agent.actor(agent.encode(observations)).numpy(force=True), noise, agent.nvec)


@np.errstate(invalid="ignore")  # what is not finite is found at the end
@torch.inference_mode()
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
    share_statistics(envs)
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
    config = validate(config)
    if config.capture_video:
        make_vector(config, 1, is_evaluation=True).close()  # raises BadInput where nothing can be filmed
    with processes(config) as own, contextlib.closing(Environments(own, own.num_envs)) as envs:
        learner, rng = new_learner(envs, own), np.random.default_rng(own.seed)
        if config.load_model and not has_checkpoint(config):
            learner = load_model(config.load_model, learner, envs)
        stopwatch = new_stopwatch(learner, config)
        with new_run(config, envs, stopwatch, algorithm="ppo", device=device_name(learner)) as run:
            learner = run.restore(learner, rng, envs)
            stopwatch.timed("compile", warm_up, learner, envs, config, stopwatch)
            for iteration in run.iterations():
                rate = annealed_learning_rate(iteration, config)
                learner = with_learning_rate(learner, rate)
                rollout = collect_rollout(learner.agent, envs, config, rng, stopwatch.timed)
                arguments = learner, rollout, config, rng
                if run.is_timed(iteration):
                    learner, batch, metrics = update(*arguments, stopwatch.timed)
                    stopwatch.timed("probe", probe, learner.agent, batch, config, stopwatch)
                else:
                    learner, batch, metrics = stopwatch.timed("update", update, *arguments, stopwatch.fused)
                run.check(metrics)
                if run.is_due(config.eval_interval):
                    run.evaluate(partial(act, learner.agent))
                run.record(metrics | {"charts/learning_rate": rate}, partial(histogram_samples, rollout, batch))
                if run.is_due(config.checkpoint_every):
                    run.save_checkpoint(learner)
                    stopwatch.timed("checkpoint", envs.restart, run.global_step)
            returns = run.conclude(partial(act, learner.agent), learner)
    return Result(learner, returns, run.directory)


# ----------------------------------------------------------------------------------------------------------- torch


def new_learner(envs: "Environments", config: Config) -> Learner:
    is_image = len(envs.observation_shape) == 3
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if config.device not in ("auto", *available):
        raise BadInput(f"--device {config.device} is not there; this machine has {' and '.join(available)}")
    auto = "cpu" if available[0] == "mps" and not is_image else available[0]  # small networks: cpu is faster than mps
    if config.num_threads or not is_image:
        torch.set_num_threads(config.num_threads or 1)
    torch.manual_seed(config.seed)
    agent = Agent(envs.observation_shape, envs.nvec, envs.action_dim, config)
    agent.to(auto if config.device == "auto" else config.device)
    weights = nn.Parameter(nn.utils.parameters_to_vector(agent.parameters()).detach())
    nn.utils.vector_to_parameters(weights, agent.parameters())
    return Learner(agent, weights, torch.optim.Adam([weights], config.learning_rate, eps=config.adam_eps, fused=True))


def device_name(learner: Learner) -> str:
    device = learner.weights.device
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def new_stopwatch(learner: Learner, config: Config) -> "Stopwatch":
    device, compiled = learner.weights.device.type, {}
    if config.compile:
        if device == "cpu":
            check_compiler()
        torch._dynamo.config.trace_autograd_ops = True  # loss and gradient in one graph: 2.4 times as fast
        compiled = {loss_and_gradient: torch.compile(loss_and_gradient, dynamic=False)}
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    return Stopwatch(lambda result: synchronize(), compiled)


def check_compiler() -> None:
    """Raises BadInput where torch.compile would find none."""
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except RuntimeError as error:
        raise BadInput(f"--compile: {one_line(error)}") from error


def with_learning_rate(learner: Learner, rate: float) -> Learner:
    learner.optimizer.param_groups[0]["lr"] = rate
    return learner


def warm_up(learner: Learner, envs: "Environments", config: Config, stopwatch: "Stopwatch") -> None:
    """Compiles what is to be compiled, on a minibatch of zeros; the weights stay as they are."""
    if not config.num_iterations:
        return
    size = config.batch_size // config.num_minibatches
    observations = np.zeros((size, *envs.observation_shape), envs.observation_dtype)
    actions = act(learner.agent, observations)
    minibatch = Batch(*to_tensors(learner.agent, observations, actions, *np.zeros((4, size), np.float32)))
    stopwatch.fused(None, loss_and_gradient, learner.agent, minibatch, config)


def probe(agent: Agent, batch: Batch, config: Config, stopwatch: "Stopwatch") -> None:
    """Clocks parts of the loss, never compiled, on one minibatch, as seconds of all minibatches."""
    minibatch = Batch(*(field[: config.batch_size // config.num_minibatches] for field in batch))
    stopwatch.fence((minibatch, agent(minibatch.observations)))  # the first call after a rollout finds cold caches
    timed = partial(stopwatch.timed, weight=stopwatch.calls["kl"] * config.num_minibatches)  # an epoch has one
    policy, values = timed("loss/forward", agent, minibatch.observations)
    log_probs, _ = log_probs_and_entropies(policy, agent.log_std, minibatch.actions, agent.nvec)
    log_ratio = log_probs - minibatch.log_probs
    stopwatch.fence(log_ratio)
    timed("loss/policy", policy_loss, log_ratio, minibatch.advantages, config.clip_coef)
    value_clip = config.clip_coef if config.clip_vloss else None
    timed("loss/value", value_loss, values, minibatch.values, minibatch.returns, value_clip)


def averaged(losses: list[dict[str, Tensor]], log_ratios: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Of all minibatches -> mean losses, log-ratios (M, B / M)"""
    return {name: torch.stack([x[name] for x in losses]).mean() for name in losses[0]}, torch.stack(log_ratios)


def to_tensors(agent: Agent, *arrays: np.ndarray) -> list[Tensor]:
    """On the agent's device. Floats and booleans take the dtype of the weights, integers keep theirs."""
    weight = agent.parameter_list[0]
    tensors = [torch.from_numpy(array).to(weight.device) for array in arrays]
    return [x.to(weight.dtype) if x.is_floating_point() or x.dtype == torch.bool else x for x in tensors]


def histogram_samples(rollout: Rollout, batch: Batch) -> dict[str, np.ndarray]:
    """What the record has a histogram of, or a picture"""
    images = {"observation": rollout.observations[-1, 0, -1]} if rollout.observations.dtype == np.uint8 else {}
    return images | {name: getattr(batch, name).numpy(force=True) for name in ("actions", "advantages", "values")}


def to_numpy(learner: Learner) -> dict[str, np.ndarray]:
    """Weights by torch's names and layouts; Adam's step and moments as optimizer.<which>, in the weights' order"""
    adam = {f"optimizer.{name}": value for name, value in learner.optimizer.state[learner.weights].items()}
    return {name: x.numpy(force=True) for name, x in (dict(learner.agent.named_parameters()) | adam).items()}


def from_numpy(learner: Learner, arrays: dict[str, np.ndarray]) -> Learner:
    """The inverse of `to_numpy`; without moments the optimizer stays as it is."""
    for name, weight in learner.agent.named_parameters():
        weight.data.copy_(torch.from_numpy(arrays[name]))
    adam = [name for name in arrays if name.startswith("optimizer.")]
    for name, value in zip(adam, to_tensors(learner.agent, *(arrays[name] for name in adam)), strict=True):
        learner.optimizer.state[learner.weights][name.removeprefix("optimizer.")] = value
    return learner


# ------------------------------------------------------------------------------------------------ several processes


# twin: ppo_torch vpg_torch
def num_processes() -> int:
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


# twin: ppo_torch vpg_torch
@contextlib.contextmanager
def processes(config: Config) -> Iterator[Config]:
    """Joins the processes that torchrun started -> the config with a seed of this one's own, the first's as it is."""
    if not dist.is_torchelastic_launched():
        yield config
        return
    rank, local_rank, number = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number and config.device in ("auto", "cuda"):
        if local_rank >= number:
            raise BadInput(f"--nproc-per-node: more processes than GPUs, {number}; --device cpu takes any number")
        torch.cuda.set_device(local_rank)
    # gloo for tensors on the CPU, nccl for those on a GPU; all wait while the first evaluates
    dist.init_process_group(timeout=timedelta(days=1))
    try:
        seed = np.random.SeedSequence([config.seed, rank]).generate_state(1, np.uint64)[0] >> 1
        yield dataclasses.replace(config, seed=int(seed)) if rank else config
    finally:
        dist.destroy_process_group()


# twin: ppo_torch vpg_torch
def mean_over_processes(x: Tensor) -> Tensor:
    """Of means, each over as many samples as any other"""
    if not dist.is_initialized():
        return x
    total = x.clone()
    over_processes(dist.all_reduce, total)
    return total / dist.get_world_size()


# twin: ppo_torch vpg_torch
def over_processes(exchange: Callable, *arguments) -> None:
    try:
        exchange(*arguments)
    except RuntimeError as error:  # the one that failed says why
        raise TrainingFailed("another process has ended") from error


# twin: ppo_torch vpg_torch
def new_run(config: Config, envs: "Environments", stopwatch: "Stopwatch", **about: str) -> "Run":
    if not dist.is_initialized():
        return Run(config, envs, stopwatch, **about)
    if dist.get_rank() > 0:
        return Follower(config, envs, stopwatch)
    return SharedRun(config, envs, stopwatch, processes=str(dist.get_world_size()), **about)


def share_statistics(envs: "Environments") -> None:
    """Moments over all processes, each of which has seen as many samples as any other"""
    for statistics in envs.statistics.values() if dist.is_initialized() else ():
        mean, var = torch.as_tensor(statistics.mean), torch.as_tensor(statistics.var)
        shared = mean_over_processes(mean)
        statistics.mean, statistics.var = shared.numpy(), mean_over_processes(var + (mean - shared) ** 2).numpy()


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


# twin: ppo_torch vpg_torch
class SharedRun(Run):
    """A run of several processes: they begin with the same weights, keep them, and stop after the same iteration."""

    heard = 0  # the signal that this process got

    @property
    def launcher(self) -> str:
        return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"

    def restore(self, learner: Learner, rng: np.random.Generator, memory) -> Learner:
        self.learner = super().restore(learner, rng, memory)
        first = [(self.state(learner), self.iteration)]
        over_processes(dist.broadcast_object_list, first)
        arrays, self.iteration = first[0]
        memory.from_numpy(arrays)
        return from_numpy(learner, arrays)

    def on_signal(self, number: int, frame) -> None:
        """Is heard by one process, and heeded when all know. A second one changes nothing: torchrun sends one to all
        that still run when the first process has ended, and kills those that take too long."""
        self.heard = number
        if self.iteration == self.config.num_iterations:  # nobody waits for anybody any more
            self.stop_signal = number

    def is_stopped(self) -> bool:
        return bool(self.heard or self.stop_signal)

    def iterations(self) -> Iterator[int]:
        for iteration in super().iterations():
            yield iteration
            weights = sum(float(x.sum(dtype=np.float64)) for x in to_numpy(self.learner).values())
            own = torch.tensor([self.heard, weights, -weights], dtype=torch.float64)
            over_processes(dist.all_reduce, own, dist.ReduceOp.MAX)
            number, most, minus_least = own.tolist()
            self.stop_signal = self.stop_signal or int(number)  # which may have come meanwhile
            if most != -minus_least:
                raise TrainingFailed(f"the processes have different weights at step {self.global_step}")


# twin: ppo_torch vpg_torch
class Follower(SharedRun):
    """The run as all processes but the first see it: nothing is recorded, evaluated or written."""

    def __init__(self, config: Config, envs: Environments, stopwatch: Stopwatch):
        self.config, self.envs, self.stopwatch = config, envs, stopwatch
        self.iteration, self.checkpoint, self.stop_signal, self.directory = 0, {}, None, None
        self.row = defaultdict(list)
        self.bar, self.wandb = tqdm(disable=True), wandb.init(mode="disabled")

    def restore(self, learner: Learner, rng: np.random.Generator, memory) -> Learner:
        learner = super().restore(learner, rng, memory)
        self.reseed()
        return learner

    def reseed(self) -> None:
        """At every checkpoint, so that a resumed run finds this state again without a file"""
        fresh = np.random.default_rng([self.envs.config.seed, self.global_step])
        self.rng.bit_generator.state = fresh.bit_generator.state

    def record(self, metrics: dict[str, float], samples: Callable[[], dict[str, np.ndarray]]) -> None:
        self.envs.pop_episodes()
        self.stopwatch.lap()

    def evaluate(self, act: Callable) -> list[float]:
        return []

    def save_checkpoint(self, learner: Learner) -> None:
        self.reseed()

    def conclude(self, act: Callable, learner: Learner) -> list[float]:
        if self.stop_signal:
            raise SystemExit(128 + self.stop_signal)
        return []


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
