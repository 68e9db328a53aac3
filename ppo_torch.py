# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[box2d,classic-control,mujoco,other]==1.3.0",
#     "mujoco==3.17.0",
#     "numpy==2.4.6",
#     "safetensors==0.8.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
"""Proximal policy optimisation (PPO) in PyTorch, in one file.

    python ppo_torch.py --env-id CartPole-v1

Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347 (PPO below); advantages from
Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438 (GAE);
details that the papers leave out from Huang et al., "The 37 Implementation Details of Proximal Policy Optimization",
ICLR blog track 2022. The defaults are CleanRL's for CartPole-v1; the README has commands for other environments.

    initialise policy π and value function V
    repeat
        act with π for T steps in N environments
        compute advantages Â with GAE(λ) from V, and returns R = Â + V
        anneal the learning rate
        repeat K epochs, for M minibatches of the T·N samples
            minimise  -min(r Â, clip(r, 1-ε, 1+ε) Â) + c₁ (V - R)² / 2 - c₂ entropy(π),   r = π(a|s) / π_old(a|s)

Shapes: T steps, N environments, B samples of a batch or minibatch, *O the shape of one observation, A dimensions of an
action. Actions always have the last axis A, also for Discrete (A = 1). The rollout keeps a continuous action as it was
sampled; `environment_actions` clips it to its bounds for the environment alone.
"""

import contextlib
import dataclasses
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
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import cache, partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import safetensors.numpy
import torch
import tyro
import wandb
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config:
    env_id: str = "CartPole-v1"  # Gymnasium id, module:Id-v0, ALE/Game-v5 or dm_control/domain-task-v0
    env_kwargs: str = "{}"  # JSON passed to the environment, such as '{"gravity": 5.0}'
    seed: int = 1  # seed of weights, actions, minibatches and environments
    total_timesteps: int = 500_000  # environment steps of the whole run, all environments together
    learning_rate: float = 2.5e-4  # Adam's learning rate at the start
    final_learning_rate: float = 0.0  # learning rate at the end of an annealed run
    anneal_lr: bool = True  # go linearly from --learning-rate to --final-learning-rate
    num_envs: int = 4  # N, environments that step together
    num_steps: int = 128  # T, steps of each environment between two updates
    gamma: float = 0.99  # discount factor γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    num_minibatches: int = 4  # M, minibatches of an epoch
    update_epochs: int = 4  # K, passes over a rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # ε, how far the probability ratio may move from 1
    clip_vloss: bool = True  # limit the value's change by --clip-coef too
    ent_coef: float = 0.01  # c₂, weight of the entropy bonus
    vf_coef: float = 0.5  # c₁, weight of the value loss
    max_grad_norm: float = 0.5  # largest global norm of the gradient
    target_kl: float | None = None  # stop an update after an epoch whose mean KL exceeds this
    adam_eps: float = 1e-5  # Adam's ε
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the tanh layers for vector observations
    norm_obs: bool = False  # normalise vector observations by their running mean and variance
    norm_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    clip_reward: bool = False  # learn from rewards clipped to [-1, 1]; reported returns are never clipped
    episodic_life: bool = False  # Atari: learn as if a lost life ended the game; reported returns are whole games
    vectorization: Literal["auto", "sync", "async"] = "auto"  # one process, or one an environment; auto: the faster
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one, else cpu
    compile: bool = False  # torch.compile the loss with its gradient (needs a C++ compiler)
    num_threads: int = 0  # CPU threads of torch; 0: one for vector observations, all for images
    timing_interval: int = 20  # every K-th iteration runs phase by phase, fenced; 1: always, 0: never
    eval_episodes: int = 10  # episodes of an evaluation: deterministic policy, fresh environments; 0: none
    eval_interval: int = 0  # environment steps between evaluations; 0: only one at the end
    checkpoint_interval: int | None = None  # steps between checkpoints (new episodes begin); None: a tenth; 0: never
    capture_video: bool = False  # film the first episode of every evaluation
    save_model: bool = True  # write model.safetensors at the end
    load_model: str | None = None  # start from this model.safetensors: weights and normalisation statistics
    resume: str | None = None  # go on with the run in this directory; needs no other flag
    run_dir: str | None = None  # directory of the run's files; None: runs/<env>__<script>__<seed>__<time>
    exp_name: str = "ppo_torch"  # <script> in the name of the run
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline: nothing leaves the machine
    wandb_project: str = "deep-rl-scripts"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group; None: <env>__<script>, so that seeds fall together

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @property
    def checkpoint_every(self) -> int:
        return self.total_timesteps // 10 if self.checkpoint_interval is None else self.checkpoint_interval


# -------------------------------------------------------------------------------------------------------- networks


class Agent(nn.Module):
    """Policy and value function: two tanh networks, or two linear heads on a shared CNN for images.

    `policy` gives the logits of all discrete choices side by side, or the mean of a Gaussian whose standard deviation
    `log_std` does not depend on the state (None for discrete actions).
    """

    def __init__(self, observation_shape: tuple[int, ...], nvec: tuple[int, ...], action_dim: int, config: Config):
        super().__init__()
        self.nvec = nvec  # choices of each discrete action dimension; () for continuous actions
        self.is_image = len(observation_shape) == 3
        self.encoder = nature_cnn(observation_shape) if self.is_image else None
        sizes = (512,) if self.is_image else (*observation_shape, *config.hidden_sizes)
        self.actor = MLP(*sizes, sum(nvec) or action_dim, gain=0.01)
        self.critic = MLP(*sizes, 1, gain=1.0)
        self.log_std = None if nvec else nn.Parameter(torch.zeros(action_dim))
        self.parameter_list = list(self.parameters())  # modules added below this line would not be trained

    def encode(self, observations: Tensor) -> Tensor:
        """(B, *O) -> (B, features)"""
        if not self.is_image:
            return observations
        dtype = self.critic[0].weight.dtype
        return self.encoder(observations.to(dtype, memory_format=torch.channels_last) / 255)

    def policy(self, observations: Tensor) -> Tensor:
        """(B, *O) -> logits (B, sum(nvec)) or means (B, A)"""
        return self.actor(self.encode(observations))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *O) -> policy (B, ·), values (B,)"""
        features = self.encode(observations)
        return self.actor(features), self.critic(features).squeeze(-1)


def initialised(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014) times a gain, biases zero."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """Linear layers of these sizes with tanh between them; `gain` is the last layer's."""

    def __init__(self, *sizes: int, gain: float):
        hidden = [(initialised(nn.Linear(*pair)), nn.Tanh()) for pair in itertools.pairwise(sizes[:-1])]
        super().__init__(*sum(hidden, ()), initialised(nn.Linear(*sizes[-2:]), gain))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer.forward(x)  # without the hooks of layer(x), which double the time of a small layer
        return x


def nature_cnn(observation_shape: tuple[int, ...]) -> nn.Sequential:
    """(channels, height, width) -> 512 features (Mnih et al. 2015, "Human-level control …")"""
    channels, *sides = observation_shape
    flat = 64 * math.prod(((side - 8) // 4 + 1 - 4) // 2 + 1 - 2 for side in sides)
    layers = [nn.Conv2d(channels, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)]
    convolutions = sum(((initialised(layer), nn.ReLU()) for layer in layers), ())
    cnn = nn.Sequential(*convolutions, nn.Flatten(), initialised(nn.Linear(flat, 512)), nn.ReLU())
    return cnn.to(memory_format=torch.channels_last)  # 1.5 times as fast on CPU


# ------------------------------------------------------------------------------------------------------------ data


class Rollout(NamedTuple):
    """What the environments gave, on the host."""

    observations: np.ndarray  # (T + 1, N, *O); the last row begins the next rollout
    actions: np.ndarray  # (T, N, A)
    rewards: np.ndarray  # (T, N)
    terminated: np.ndarray  # (T, N)
    truncated: np.ndarray  # (T, N), without those that terminated in the same step
    final_observations: np.ndarray  # (L, *O): true last observations of the L truncated episodes, in (T, N) order


class Batch(NamedTuple):
    """A whole rollout or one minibatch on the device, one sample a row."""

    observations: Tensor  # (B, *O)
    actions: Tensor  # (B, A)
    log_probs: Tensor  # (B,), of the policy that acted
    values: Tensor  # (B,), before the update
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,)


class Learner(NamedTuple):
    """What an update changes."""

    agent: Agent
    optimizer: torch.optim.Adam


# ------------------------------------------------------------------------------------------------------- equations


def sample_actions(policy: Tensor, log_std: Tensor | None, noise: Tensor, nvec: tuple[int, ...]) -> Tensor:
    """(B, ·) output of the policy, noise of that shape -> actions (B, A); noise 0.0 gives the most likely ones.

    Discrete: argmax(logits + Gumbel noise) is a draw from softmax(logits). Continuous: mean + std · Gaussian noise.
    """
    if not nvec:
        return policy + log_std.exp() * noise
    return torch.stack([logits.argmax(-1) for logits in (policy + noise).split(nvec, -1)], -1)


def log_probs_and_entropy(
    policy: Tensor, log_std: Tensor | None, actions: Tensor, nvec: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """log π(a|s) and entropy of π(·|s), (B,) each, summed over the independent action dimensions."""
    if not nvec:
        log_probs = -0.5 * ((actions - policy) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).expand_as(log_probs)
        return log_probs.sum(-1), entropy.sum(-1)
    parts = [logits.log_softmax(-1) for logits in policy.split(nvec, -1)]
    log_probs = [part.gather(-1, action).squeeze(-1) for part, action in zip(parts, actions.split(1, -1), strict=True)]
    entropies = [-(part.exp() * part).sum(-1) for part in parts]
    return reduce(torch.add, log_probs), reduce(torch.add, entropies)


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
    """-L^CLIP (PPO eq. 7), the mean over (B,); log_ratio = log π(a|s) - log π_old(a|s)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """½ (V - R)² (PPO eq. 9 has no ½), mean over (B,); with a clip_coef, V gains nothing by leaving V_old."""
    squared_errors = (values - returns) ** 2
    if clip_coef is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        squared_errors = torch.maximum(squared_errors, (clipped_values - returns) ** 2)
    return 0.5 * squared_errors.mean()


def kl_and_clip_fraction(log_ratio: Tensor, clip_coef: float) -> Tensor:
    """(3,): KL(π_old ‖ π) by estimators k3 and k1 (Schulman 2020, "Approximating KL Divergence"); clipped fraction."""
    ratio = log_ratio.exp()
    is_clipped = ((ratio - 1).abs() > clip_coef).to(ratio.dtype)
    return torch.stack([(ratio - 1 - log_ratio).mean(), -log_ratio.mean(), is_clipped.mean()])


# ---------------------------------------------------------------------------------------------------------- update

METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac", "grad_norm")


def loss_and_gradients(agent: Agent, minibatch: Batch, config: Config) -> tuple[list[Tensor], Tensor, Tensor]:
    """PPO eq. 9 -> gradients in the order of `agent.parameter_list`, the three losses (3,), log-ratio (B,)"""
    policy, values = agent(minibatch.observations)
    log_probs, entropies = log_probs_and_entropy(policy, agent.log_std, minibatch.actions, agent.nvec)
    log_ratio, advantages, entropy = log_probs - minibatch.log_probs, minibatch.advantages, entropies.mean()
    if config.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    actor_loss = policy_loss(log_ratio, advantages, config.clip_coef)
    value_clip = config.clip_coef if config.clip_vloss else None
    critic_loss = value_loss(values, minibatch.values, minibatch.returns, value_clip)
    loss = actor_loss - config.ent_coef * entropy + config.vf_coef * critic_loss
    gradients = torch.autograd.grad(loss, agent.parameter_list)
    return gradients, torch.stack([actor_loss, critic_loss, entropy]).detach(), log_ratio.detach()


def apply_gradients(learner: Learner, gradients: list[Tensor], config: Config) -> tuple[Learner, Tensor]:
    """Scales the gradients by min(1, max_grad_norm / (norm + 1e-6)), norm over all of them; one step of Adam."""
    for parameter, gradient in zip(learner.agent.parameter_list, gradients, strict=True):
        parameter.grad = gradient
    gradient_norm = nn.utils.clip_grad_norm_(learner.agent.parameter_list, config.max_grad_norm)
    learner.optimizer.step()
    return learner, gradient_norm


def update_minibatch(learner: Learner, minibatch: Batch, config: Config, timed: Callable) -> tuple[Learner, Tensor]:
    """-> learner, values of METRICS (7,)"""
    gradients, losses, log_ratio = timed("loss", loss_and_gradients, learner.agent, minibatch, config)
    kl = timed("kl", kl_and_clip_fraction, log_ratio, config.clip_coef)
    learner, gradient_norm = timed("weight_update", apply_gradients, learner, gradients, config)
    return learner, torch.cat([losses, kl, gradient_norm[None]])


@torch.no_grad()
def make_batch(agent: Agent, rollout: Rollout, config: Config) -> Batch:
    """Log-probabilities and values of the whole rollout in one call, then advantages and returns."""
    observations, actions, rewards, terminated, truncated, final_observations = to_tensors(agent, *rollout)
    policy, values = agent(observations.flatten(0, 1))
    values = values.unflatten(0, observations.shape[:2])  # (T + 1, N)
    next_values = values[1:].clone()
    if len(final_observations):
        _, next_values[truncated.bool()] = agent(final_observations)
    done = terminated + truncated
    advantages = gae(rewards, values[:-1], next_values, terminated, done, config.gamma, config.gae_lambda).flatten()
    observations, actions, values = observations[:-1].flatten(0, 1), actions.flatten(0, 1), values[:-1].flatten()
    log_probs, _ = log_probs_and_entropy(policy[: config.batch_size], agent.log_std, actions, agent.nvec)
    return Batch(observations, actions, log_probs, values, advantages, returns=advantages + values)


def minibatches(batch: Batch, config: Config, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch: each sample once, in random order."""
    permutation = torch.from_numpy(rng.permutation(config.batch_size)).to(batch.values.device)
    shuffled = Batch(*(field[permutation] for field in batch))
    return map(Batch, *(field.chunk(config.num_minibatches) for field in shuffled))


def update(
    learner: Learner, rollout: Rollout, config: Config, rng: np.random.Generator, timed: Callable
) -> tuple[Learner, Batch, dict[str, float]]:
    """K epochs -> learner, the batch, METRICS averaged over the minibatches and the explained variance of V"""
    batch = timed("gae", make_batch, learner.agent, rollout, config)
    metrics: list[Tensor] = []
    for _ in range(config.update_epochs):
        for minibatch in minibatches(batch, config, rng):
            learner, minibatch_metrics = update_minibatch(learner, minibatch, config, timed)
            metrics.append(minibatch_metrics)
        if config.target_kl is not None:
            epoch_metrics = torch.stack(metrics[-config.num_minibatches :]).mean(0)
            if epoch_metrics[METRICS.index("approx_kl")] > config.target_kl:
                break
    explained_variance = 1 - batch.advantages.var() / batch.returns.var()
    means = torch.cat([torch.stack(metrics).mean(0), explained_variance[None]]).tolist()
    metrics = {f"losses/{name}": value for name, value in zip((*METRICS, "explained_variance"), means, strict=True)}
    return learner, batch, metrics | {"charts/learning_rate": learner.optimizer.param_groups[0]["lr"]}


# --------------------------------------------------------------------------------------------------------- rollout


def action_noise(rng: np.random.Generator, shape: tuple[int, ...], agent: Agent) -> np.ndarray:
    """(*shape, ·) for `sample_actions`: Gumbel for discrete actions, Gaussian for continuous ones"""
    if agent.nvec:
        return rng.gumbel(size=(*shape, sum(agent.nvec))).astype(np.float32)
    return rng.standard_normal((*shape, len(agent.log_std)), np.float32)


@torch.inference_mode()
def act(agent: Agent, observations: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """(N, *O), (N, ·) -> (N, A). An environment needs the action alone; `make_batch` computes the rest at once."""
    device = agent.parameter_list[0].device
    policy = agent.policy(torch.as_tensor(observations, device=device))
    return sample_actions(policy, agent.log_std, torch.as_tensor(noise, device=device), agent.nvec).cpu().numpy()


def collect_rollout(
    agent: Agent, envs: "Environments", config: Config, rng: np.random.Generator, timed: Callable
) -> Rollout:
    noise = action_noise(rng, (config.num_steps, config.num_envs), agent)
    observations = np.empty((config.num_steps + 1, *envs.observations.shape), envs.observations.dtype)
    rewards = np.empty((config.num_steps, config.num_envs), np.float32)
    terminated, truncated = np.empty((2, *rewards.shape), bool)
    actions, final_observations = [], []
    observations[0] = envs.observations
    for t in range(config.num_steps):
        actions.append(timed("forward", act, agent, observations[t], noise[t]))
        observations[t + 1], rewards[t], terminated[t], truncated[t], ended = timed("step", envs.step, actions[t])
        final_observations.extend(ended)
    final_observations = np.array(final_observations, observations.dtype).reshape(-1, *observations.shape[2:])
    returns = np.array([*envs.returns, *(episode_return for _, episode_return, _ in envs.episodes)])  # never clipped
    check_finite(config.env_id, observation=observations, reward=returns, final_observation=final_observations)
    return Rollout(observations, np.array(actions), rewards, terminated, truncated, final_observations)


# ----------------------------------------------------------------------------------------------------------- train


class Result(NamedTuple):
    learner: Learner
    evaluation_returns: list[float]  # of each episode
    run_dir: Path


def train(config: Config) -> Result:
    """The whole run. Raises BadInput before training, TrainingFailed where a number is not finite, and SystemExit
    after SIGINT or SIGTERM, once a checkpoint is written."""
    validate(config)
    envs = Environments(config, config.num_envs)
    if config.capture_video:
        check_camera(config)
    rng = np.random.default_rng(config.seed)
    learner = new_learner(envs, config)
    if config.load_model and not has_checkpoint(config):
        learner = load_model(config.load_model, learner, envs)
    stopwatch = new_stopwatch(learner, config)
    with Run(config, envs, stopwatch, framework="torch", algorithm="ppo", device=device_name(learner)) as run:
        learner = run.restore(learner, rng)
        stopwatch.timed("compile", warm_up, learner, envs, config, stopwatch.fused)
        if run.iteration < config.num_iterations:
            envs.restart(run.global_step)
        for iteration in run.iterations():
            learner = anneal(learner, iteration, config)
            rollout = collect_rollout(learner.agent, envs, config, rng, stopwatch.timed)
            if run.is_timed(iteration):
                learner, batch, metrics = update(learner, rollout, config, rng, stopwatch.timed)
                stopwatch.timed("probe", probe_loss, learner.agent, batch, config, stopwatch)
            else:
                arguments = (learner, rollout, config, rng, stopwatch.fused)
                learner, batch, metrics = stopwatch.timed("update", update, *arguments)
            if run.is_due(config.eval_interval):
                run.evaluate(partial(act, learner.agent))
            run.record(metrics, rollout, partial(to_histograms, batch))
            if run.is_due(config.checkpoint_every):
                run.save_checkpoint(to_numpy(learner), rng)
                stopwatch.timed("checkpoint", envs.restart, run.global_step)
        return Result(learner, run.conclude(partial(act, learner.agent), to_numpy(learner), rng), run.directory)


# ----------------------------------------------------------------------------------------------------------- torch


def new_learner(envs: "Environments", config: Config) -> Learner:
    is_image = len(envs.observation_shape) == 3
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if config.device not in ("auto", *available):
        raise BadInput(f"--device {config.device} is not there; this machine has {' and '.join(available)}")
    auto = "cpu" if available[0] == "mps" and not is_image else available[0]  # small networks: cpu is faster than mps
    torch.set_num_threads(config.num_threads or (os.cpu_count() if is_image else 1))
    torch.manual_seed(config.seed)
    agent = Agent(envs.observation_shape, envs.nvec, envs.action_dim, config)
    agent.to(auto if config.device == "auto" else config.device)
    return Learner(agent, torch.optim.Adam(agent.parameter_list, config.learning_rate, eps=config.adam_eps, fused=True))


def device_name(learner: Learner) -> str:
    device = learner.agent.parameter_list[0].device
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def new_stopwatch(learner: Learner, config: Config) -> "Stopwatch":
    device = learner.agent.parameter_list[0].device.type
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    if not config.compile:
        return Stopwatch(synchronize, {})
    torch._dynamo.config.trace_autograd_ops = True  # loss and gradient in one graph: 2.4 times as fast
    mode = "reduce-overhead" if device == "cuda" else None  # CUDA graphs
    return Stopwatch(synchronize, {loss_and_gradients: torch.compile(loss_and_gradients, dynamic=False, mode=mode)})


def anneal(learner: Learner, iteration: int, config: Config) -> Learner:
    """From --learning-rate at the first update to --final-learning-rate one update after the last."""
    progress = (iteration - 1) / config.num_iterations if config.anneal_lr else 0.0
    rate = (1 - progress) * config.learning_rate + progress * config.final_learning_rate
    learner.optimizer.param_groups[0]["lr"] = rate
    return learner


def warm_up(learner: Learner, envs: "Environments", config: Config, fused: Callable) -> None:
    """Compiles the phases on a minibatch of zeros; the weights stay as they are."""
    size = config.batch_size // config.num_minibatches
    observations = np.zeros((size, *envs.observation_shape), envs.observation_dtype)
    actions = act(learner.agent, observations)
    minibatch = Batch(*to_tensors(learner.agent, observations, actions, *np.zeros((4, size), np.float32)))
    fused("loss", loss_and_gradients, learner.agent, minibatch, config)


def probe_loss(agent: Agent, batch: Batch, config: Config, stopwatch: "Stopwatch") -> None:
    """Clocks parts of the loss, never compiled, on one minibatch, as seconds of all minibatches."""
    minibatch = Batch(*(field[: config.batch_size // config.num_minibatches] for field in batch))
    agent(minibatch.observations)  # the first call after a rollout finds cold caches
    policy, values = stopwatch.timed("loss/forward", agent, minibatch.observations)
    log_probs, _ = log_probs_and_entropy(policy, agent.log_std, minibatch.actions, agent.nvec)
    log_ratio = log_probs - minibatch.log_probs
    stopwatch.timed("loss/policy", policy_loss, log_ratio, minibatch.advantages, config.clip_coef)
    value_clip = config.clip_coef if config.clip_vloss else None
    stopwatch.timed("loss/value", value_loss, values, minibatch.values, minibatch.returns, value_clip)
    for part in ("loss/forward", "loss/policy", "loss/value"):
        stopwatch.seconds[part] *= config.update_epochs * config.num_minibatches


def to_tensors(agent: Agent, *arrays: np.ndarray) -> list[Tensor]:
    """On the agent's device. Floats and booleans take the dtype of the weights, integers keep theirs."""
    weight = agent.parameter_list[0]
    tensors = [torch.from_numpy(array).to(weight.device) for array in arrays]
    return [x.to(weight.dtype) if x.is_floating_point() or x.dtype == torch.bool else x for x in tensors]


def to_histograms(batch: Batch) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name).cpu().numpy() for name in ("actions", "advantages", "values")}


def to_numpy(learner: Learner) -> dict[str, np.ndarray]:
    """Weights by torch's names; Adam's step and moments as optimizer.<which>.<name>."""
    tensors = dict(learner.agent.named_parameters())
    for name, parameter in learner.agent.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in learner.optimizer.state[parameter].items()}
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def from_numpy(learner: Learner, arrays: dict[str, np.ndarray]) -> Learner:
    """The inverse of `to_numpy`; without moments the optimizer stays as it is."""
    for name, parameter in learner.agent.named_parameters():
        parameter.data.copy_(torch.from_numpy(arrays[name]))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (saved := arrays.get(f"optimizer.{key}.{name}")) is not None:
                like = torch.zeros((), device=parameter.device) if key == "step" else torch.empty_like(parameter)
                learner.optimizer.state[parameter][key] = like.copy_(torch.from_numpy(saved))
    return learner


# ---------------------------------------------------------------------------------------------------- environments


class Environments:
    """N environments that reset in the very step that ends an episode; normalises, clips and adds up returns."""

    def __init__(self, config: Config, num_envs: int, film: bool = False):
        self.make = partial(make_vector, config, num_envs, film)
        self.config, self.num_envs, self.is_fresh, self.is_learning = config, num_envs, True, True
        self.vector, self.is_atari = self.make(), config.env_id.startswith("ALE/")
        self.observation_shape = self.vector.single_observation_space.shape
        self.observation_dtype = np.uint8 if len(self.observation_shape) == 3 else np.float32
        self.nvec, self.action_dim = action_sizes(self.vector.single_action_space)
        if config.norm_obs and self.observation_dtype == np.uint8:
            raise BadInput("--norm-obs is for vector observations; images are divided by 255 in any case")
        self.statistics = {"observation": RunningMeanStd(shape=self.observation_shape)} if config.norm_obs else {}
        self.statistics |= {"return": RunningMeanStd(shape=())} if config.norm_reward else {}

    def restart(self, *seed: int) -> None:
        """First episodes in environments made anew, so that the seed alone decides what follows."""
        if not self.is_fresh:
            self.vector.close()
            self.vector = self.make()
        self.is_fresh = False
        seed = np.random.SeedSequence([self.config.seed, *seed]).generate_state(1)[0] >> 1
        observations, info = self.vector.reset(seed=int(seed))
        self.returns, self.lengths, self.discounted_returns = np.zeros((3, self.num_envs))
        self.lives, self.episodes = info["lives"] if self.is_atari else None, []
        self.observations = self.normalize(observations, self.is_learning)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """(N, A) -> observations, rewards, terminated, truncated, true last observations of truncated episodes"""
        env_actions = environment_actions(actions, self.vector.single_action_space)
        observations, rewards, terminated, truncated, info = self.vector.step(env_actions)
        self.returns += rewards
        self.lengths += 1
        if self.config.clip_reward:
            rewards = rewards.clip(-1, 1)
        if "return" in self.statistics:
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
        self.observations = self.normalize(observations, self.is_learning)
        return self.observations, rewards, terminated, truncated, final_observations

    def normalize(self, observations: np.ndarray, learn: bool) -> np.ndarray:
        if statistics := self.statistics.get("observation"):
            if learn:
                statistics.update(observations)
            observations = ((observations - statistics.mean) / np.sqrt(statistics.var + 1e-8)).clip(-10, 10)
        return observations.astype(self.observation_dtype, copy=False)

    def normalize_rewards(self, rewards: np.ndarray, done: np.ndarray) -> np.ndarray:
        self.discounted_returns = self.config.gamma * self.discounted_returns + rewards
        self.statistics["return"].update(self.discounted_returns)
        self.discounted_returns[done] = 0
        return (rewards / np.sqrt(self.statistics["return"].var + 1e-8)).clip(-10, 10)

    def pop_episodes(self) -> list[tuple[int, float, int]]:
        """(environment, return, length) of the episodes that ended since the last call"""
        episodes, self.episodes = self.episodes, []
        return episodes

    def frame(self) -> np.ndarray:
        """Picture of the first environment, (height, width, 3), or (height, width) for Atari"""
        return self.observations[0, -1] if self.is_atari else self.vector.envs[0].render()

    def to_numpy(self) -> dict[str, np.ndarray]:
        moments = [(name, key) for name in self.statistics for key in ("mean", "var", "count")]
        return {f"{name}_{key}": np.asarray(getattr(self.statistics[name], key), float) for name, key in moments}

    def from_numpy(self, arrays: dict[str, np.ndarray]) -> None:
        for name, statistics in self.statistics.items():
            for key in ("mean", "var", "count"):
                setattr(statistics, key, arrays[f"{name}_{key}"])


def make_vector(config: Config, num_envs: int, film: bool) -> gym.vector.VectorEnv:
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    if film and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        kwargs = json.loads(config.env_kwargs)
        if config.env_id.startswith("ALE/"):  # preprocessed as Mnih et al. 2015; sticky actions if kwargs say so
            gym.register_envs(importlib.import_module("ale_py"))
            mode |= {"life_loss_info": config.episodic_life, "reward_clipping": False, "repeat_action_probability": 0.0}
            return gym.make_vec(config.env_id, num_envs, "vector_entry_point", **mode | kwargs)
        make = partial(make_env, config.env_id, "rgb_array" if film else None, kwargs)
        is_async = config.vectorization == "async"
        if config.vectorization == "auto":
            is_async = async_is_faster(config.env_id, config.env_kwargs, num_envs)
        if is_async and not film:  # forkserver: a fork would copy locks that threads of the framework hold
            return AsyncVectorEnv([make] * num_envs, context="forkserver", **mode)
        return SyncVectorEnv([make] * num_envs, copy=False, **mode)
    except Exception as error:
        is_missing = isinstance(error, (ImportError, DependencyNotInstalled))
        hint = "; pip install -r requirements/all.txt" if is_missing else f"; --env-kwargs are {config.env_kwargs}"
        raise BadInput(f"--env-id {config.env_id}: {one_line(error)}{hint}") from error


def make_env(env_id: str, render_mode: str | None, kwargs: dict) -> gym.Env:
    if multiprocessing.parent_process():  # Ctrl-C reaches all processes; the parent alone ends the run
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if env_id.startswith("dm_control/"):
        gym.register_envs(importlib.import_module("shimmy"))
    env = gym.make(env_id, render_mode=render_mode, **kwargs)
    space = env.observation_space
    if not (isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3):
        if not space.is_np_flattenable or isinstance(space, spaces.Text):
            raise ValueError(
                f"the observation space {space} is not supported; images and what flattens to a vector are"
            )
        return gym.wrappers.FlattenObservation(env)
    channels = -1 if space.shape[-1] in (1, 3, 4) else 0  # axis
    space = spaces.Box(0, 255, np.moveaxis(space.sample(), channels, 0).shape, np.uint8)
    env = gym.wrappers.TransformObservation(env, lambda image: np.moveaxis(image, channels, 0).copy(), space)
    if min(space.shape[1:]) < 36:
        raise ValueError(f"the CNN needs images of 36 x 36 or more, these are {space.shape[1]} x {space.shape[2]}")
    return env


@cache
def async_is_faster(env_id: str, env_kwargs: str, num_envs: int) -> bool:
    """Whether processes save more than the 40 µs an environment that talking to them costs."""
    with contextlib.closing(make_env(env_id, None, json.loads(env_kwargs))) as env:
        env.reset(seed=0)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            seconds.append(time.perf_counter() - start)
            if terminated or truncated:
                env.reset()
    return min(seconds) * (num_envs - math.ceil(num_envs / os.cpu_count())) > 40e-6 * num_envs


def action_sizes(space: gym.Space) -> tuple[tuple[int, ...], int]:
    """(choices of each discrete dimension, none for a Box), A"""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), 1
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return tuple(space.nvec.tolist()), len(space.nvec)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return (), math.prod(space.shape)
    raise BadInput(f"the action space {space} is not supported; Discrete, flat MultiDiscrete and float Box are")


def environment_actions(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """(N, A) as the policy chose them -> what the environments take. Box actions are clipped here and nowhere else."""
    if isinstance(space, spaces.Discrete):
        return actions[:, 0] + space.start
    if isinstance(space, spaces.MultiDiscrete):
        return actions + space.start
    return actions.reshape(-1, *space.shape).clip(space.low, space.high)


def check_finite(env_id: str, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if array.dtype != np.uint8 and not np.isfinite(array).all():
            raise TrainingFailed(f"{env_id} gave a {name.replace('_', ' ')} that is not finite")


def check_camera(config: Config) -> None:
    try:
        importlib.import_module("moviepy")
        envs = Environments(config, 1, film=True)
        with contextlib.closing(envs.vector):
            envs.restart(0)
            if not isinstance(envs.frame(), np.ndarray):
                raise TypeError("it renders no picture")
    except ImportError as error:
        raise BadInput(f"--capture-video: {one_line(error)}; pip install -r requirements/torch.txt") from error
    except Exception as error:
        raise BadInput(f"--capture-video: {config.env_id} cannot be filmed: {one_line(error)}") from error


def evaluate(
    act: Callable, envs: Environments, video: Path | None = None, is_stopped: Callable[[], bool] = bool
) -> list[float]:
    """Returns of the first episode in each of E fresh environments; most likely actions, frozen statistics."""
    fresh = Environments(envs.config, envs.config.eval_episodes, film=video is not None)
    fresh.statistics = {name: moments for name, moments in envs.statistics.items() if name == "observation"}
    fresh.is_learning = False
    first_returns, frames = {}, []
    with contextlib.closing(fresh.vector):
        fresh.restart(0, 1)  # the same episodes in every evaluation, none of them of training
        for _ in range(LONGEST_EVALUATION):
            if video and 0 not in first_returns:
                frames.append(fresh.frame())
            fresh.step(act(fresh.observations))
            check_finite(envs.config.env_id, observation=fresh.observations, reward=fresh.returns)
            if is_stopped():
                return []
            for n, episode_return, _ in fresh.pop_episodes():
                first_returns.setdefault(n, episode_return)
            if len(first_returns) == fresh.num_envs:
                break
        else:
            warn(f"{fresh.num_envs - len(first_returns)} evaluation episodes did not end, and do not count")
    if video:
        video.parent.mkdir(exist_ok=True)
        frames = [frame if frame.ndim == 3 else np.stack([frame] * 3, -1) for frame in frames]
        importlib.import_module("moviepy").ImageSequenceClip(frames, fps=30).write_videofile(str(video), logger=None)
    return list(first_returns.values())


LONGEST_EVALUATION = 100_000  # steps; an episode that goes on for longer is left out


# ------------------------------------------------------------------------------------------------- stopwatch and run


OUTSIDE = ("compile", "evaluation", "checkpoint", "probe")  # phases that are in no iteration


class Stopwatch:
    """Seconds per phase, read after a fence. The phases partition an iteration, but for those OUTSIDE of it; a phase
    with a slash is part of another."""

    def __init__(self, synchronize: Callable[[], None], compiled: dict[Callable, Callable]):
        self.synchronize, self.compiled = synchronize, compiled
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.lap_start = time.perf_counter()

    def timed(self, phase: str, function: Callable, *arguments):
        start = time.perf_counter()
        result = self.compiled.get(function, function)(*arguments)
        self.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        return result

    def fused(self, phase: str, function: Callable, *arguments):
        return self.compiled.get(function, function)(*arguments)

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, of the whole `iteration`, and of its `other` rest."""
        now, seconds = time.perf_counter(), dict(self.seconds)
        inside = sum(value for phase, value in seconds.items() if phase not in OUTSIDE and "/" not in phase)
        seconds["iteration"] = now - self.lap_start - sum(seconds.get(phase, 0) for phase in OUTSIDE)
        seconds["other"] = seconds["iteration"] - inside
        self.seconds.clear()
        self.lap_start = now
        return seconds


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model = re.search(r"model name\s*: (.*)", info)
    return f"{model[1] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


class Run:
    """A run's directory, W&B record, progress bar, checkpoints and signals."""

    def __init__(self, config: Config, envs: Environments, stopwatch: Stopwatch, **description):
        self.config, self.envs, self.stopwatch = config, envs, stopwatch
        if config.wandb_mode == "online" and not wandb.login(prompt=False):
            raise BadInput("--wandb-mode online: no W&B key; `wandb login` stores one, and offline needs no account")
        self.directory, run_id = open_directory(config)
        self.checkpoint, progress = newest_checkpoint(self.directory) if config.resume else ({}, {})
        self.iteration, self.rng_state = progress.get("iteration", 0), progress.get("rng")
        self.recent_returns = deque(progress.get("recent_returns", ()), maxlen=100)
        self.row: defaultdict[str, list[float]] = defaultdict(list)  # of the iterations since the last row
        self.episodes, self.histograms_at, self.received = [], self.iteration, None
        description |= {"cpu": cpu_name(), "resumed_at": self.global_step}
        versions = {name: version(name) for name in (description["framework"], "gymnasium", "numpy")}
        description["versions"] = versions | {"python": platform.python_version()}
        try:
            self.wandb = wandb.init(
                **{"project": config.wandb_project, "entity": config.wandb_entity, "mode": config.wandb_mode},
                **{"group": config.wandb_group or f"{config.env_id}__{config.exp_name}", "name": self.directory.name},
                **{"id": run_id, "resume": "allow", "dir": self.directory},
                config=dataclasses.asdict(config) | description,
                settings=wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=1),
            )
        except wandb.Error as error:
            if not config.resume:  # leave nothing behind that would stand in the way of the same command
                (self.directory / "config.json").unlink()
                shutil.rmtree(self.directory / "wandb", ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: the user's
                    self.directory.rmdir()
                    self.directory.parent.rmdir()
            raise BadInput(f"--wandb-mode {config.wandb_mode}: {one_line(error)}; offline needs no account") from error
        self.wandb.define_metric("*", step_metric="global_step")
        steps = config.num_iterations * config.batch_size
        self.bar = tqdm(total=steps, initial=self.global_step, unit="step", unit_scale=True, dynamic_ncols=True)
        self.handlers = {}

    def __enter__(self) -> "Run":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {which: signal.signal(which, self.on_signal) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        try:
            self.wandb.finish(exit_code=int(exception[0] not in (None, SystemExit)))
        except Exception as error:
            warn(f"the end of the W&B record is missing: {one_line(error)}")
        self.envs.vector.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame) -> None:
        """Ends the run after this iteration; a second signal ends it at once."""
        self.received = number
        signal.signal(number, self.handlers[number])

    def restore(self, learner: Learner, rng: np.random.Generator) -> Learner:
        if not self.checkpoint:
            return learner
        try:
            self.envs.from_numpy(self.checkpoint)
            rng.bit_generator.state = self.rng_state
            return from_numpy(learner, self.checkpoint)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BadInput(
                f"--resume {self.directory}: the checkpoint is not of this run: {one_line(error)}"
            ) from error

    def iterations(self) -> Iterator[int]:
        """Counted from 1, until the last or until a signal."""
        self.row["times/compile"].append(self.stopwatch.lap()["compile"])
        while self.iteration < self.config.num_iterations and not self.received:
            self.iteration += 1
            yield self.iteration

    @property
    def global_step(self) -> int:
        return self.iteration * self.config.batch_size

    def is_timed(self, iteration: int) -> bool:
        """Whether this iteration runs phase by phase."""
        return self.config.timing_interval > 0 and iteration % self.config.timing_interval == 0

    def is_due(self, interval: int) -> bool:
        """Whether this iteration reached another multiple of the interval (in steps; 0: never)."""
        before = self.global_step - self.config.batch_size
        is_last = self.iteration == self.config.num_iterations  # `conclude` does what is due then
        return interval > 0 and self.global_step // interval > before // interval and not is_last

    def record(self, metrics: dict[str, float], rollout: Rollout, histograms: Callable[[], dict]) -> None:
        """Adds an iteration to the row; a row takes 20 ms of iterations or more, so that recording stays cheap."""
        if not all(math.isfinite(metrics[f"losses/{name}"]) for name in ("policy_loss", "value_loss", "grad_norm")):
            raise TrainingFailed(f"the loss or its gradient is not finite at step {self.global_step}")
        episodes = self.envs.pop_episodes()
        for _, episode_return, length in episodes:
            self.add({"charts/episodic_return": episode_return, "charts/episodic_length": length})
        self.episodes += episodes
        self.recent_returns.extend(episode_return for _, episode_return, _ in episodes)
        self.add(metrics | {f"times/{phase}": seconds for phase, seconds in self.stopwatch.lap().items()})
        is_beside_timed = self.is_timed(self.iteration) or self.is_timed(self.iteration + 1)  # timed: a row of its own
        is_last = self.iteration == self.config.num_iterations
        if not (is_beside_timed or is_last or sum(self.row["times/iteration"]) >= 0.02):
            return
        media = {}
        if is_last or self.iteration - self.histograms_at >= self.config.num_iterations // 100:
            _, returns, lengths = zip(*self.episodes, strict=True) if self.episodes else ((), (), ())
            samples = histograms() | {"episodic_return": returns, "episodic_length": lengths}
            # float32 in float64: np.histogram refuses values that differ by a rounding error alone
            samples = {name: np.asarray(x, np.float32).astype(np.float64) for name, x in samples.items()}
            media = {f"histograms/{name}": wandb.Histogram(x) for name, x in samples.items() if len(x)}
            if rollout.observations.dtype == np.uint8:
                media["images/observation"] = wandb.Image(rollout.observations[-1, 0, -1])
            self.histograms_at, self.episodes = self.iteration, []
        self.send_row(media)

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            if math.isfinite(value):  # the explained variance of constant returns is not
                self.row[key].append(value)

    def send_row(self, media: dict | None = None) -> None:
        if not self.row:
            return
        totals = {f"times/{phase}" for phase in OUTSIDE}
        row = {key: float((np.sum if key in totals else np.mean)(values)) for key, values in self.row.items()}
        if "times/iteration" in row:
            row |= {"charts/SPS": self.config.batch_size / row["times/iteration"], "charts/iteration": self.iteration}
        if self.recent_returns:
            row["charts/return_last_100"] = float(np.mean(self.recent_returns))
            self.bar.set_postfix_str(f"return {row['charts/return_last_100']:.4g}", refresh=False)
        self.bar.update(self.global_step - self.bar.n)
        try:
            self.wandb.log(row | (media or {}) | {"global_step": self.global_step})
        except Exception as error:  # a broken record must not end the training
            warn(f"W&B misses step {self.global_step}: {one_line(error)}")
        self.row.clear()

    def evaluate(self, act: Callable) -> list[float]:
        if not self.config.eval_episodes:
            return []
        video = self.directory / "videos" / f"step_{self.global_step}.mp4" if self.config.capture_video else None
        returns = self.stopwatch.timed("evaluation", evaluate, act, self.envs, video, lambda: self.received is not None)
        self.add({"charts/evaluation_return": float(np.mean(returns))} if returns else {})
        return returns

    def save_checkpoint(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        """Keeps this checkpoint and the one before it."""
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise TrainingFailed(f"a weight is not finite at step {self.global_step}")
        self.send_row()  # rows end where a resumed run may begin
        progress = {"iteration": self.iteration, "rng": rng.bit_generator.state}
        progress["recent_returns"] = list(self.recent_returns)
        path = self.directory / "checkpoints" / f"step_{self.global_step:012d}.safetensors"
        self.stopwatch.timed("checkpoint", save_arrays, path, arrays | self.envs.to_numpy(), progress)
        for old in sorted(path.parent.glob("*.safetensors"))[:-2]:
            old.unlink()

    def conclude(self, act: Callable, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> list[float]:
        """Last checkpoint, model, evaluation and a word about them; after a signal the checkpoint alone."""
        if self.received or (self.config.checkpoint_every and self.iteration):
            self.save_checkpoint(arrays, rng)
        if self.config.save_model and not self.received:
            weights = {name: array for name, array in arrays.items() if not name.startswith("optimizer.")}
            metadata = {"config": dataclasses.asdict(self.config), "global_step": self.global_step}
            path = self.directory / "model.safetensors"
            self.stopwatch.timed("checkpoint", save_arrays, path, weights | self.envs.to_numpy(), metadata)
        returns = [] if self.received else self.evaluate(act)
        if self.received:  # perhaps during the evaluation
            self.bar.close()
            print(f"stopped; go on with: python {sys.argv[0]} --resume {self.directory}", file=sys.stderr)
            raise SystemExit(128 + self.received)
        self.add({f"times/{phase}": seconds for phase, seconds in self.stopwatch.lap().items() if phase in OUTSIDE})
        self.send_row()
        self.bar.close()
        if self.recent_returns:
            mean, std, number = np.mean(self.recent_returns), np.std(self.recent_returns), len(self.recent_returns)
            print(f"training:   return {mean:.1f} ± {std:.1f} (mean ± std of the last {number} episodes)")
        if returns:
            mean, std = np.mean(returns), np.std(returns)
            print(f"evaluation: return {mean:.1f} ± {std:.1f} (mean ± std of {len(returns)} episodes, greedy)")
        print(f"written to  {self.directory}: {', '.join(sorted(path.name for path in self.directory.iterdir()))}")
        return returns


# ----------------------------------------------------------------------------------------------------------- files


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Safetensors with JSON metadata and a checksum of both; the file appears whole or not at all."""
    text = json.dumps(metadata)
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".part"), "wb") as file:
        file.write(safetensors.numpy.save(arrays, {"json": text, "sha256": checksum(arrays, text)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


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


def checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def has_checkpoint(config: Config) -> bool:
    return config.resume is not None and any(Path(config.resume).glob("checkpoints/*.safetensors"))


def newest_checkpoint(directory: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and progress: the last checkpoint, the one before where that is damaged, nothing where there is none."""
    paths = sorted((directory / "checkpoints").glob("*.safetensors"), reverse=True)
    for path in paths:
        try:
            return load_arrays(path)
        except BadInput as error:
            warn(str(error))
    if paths:
        raise BadInput(f"--resume {directory}: no checkpoint there can be used")
    warn(f"{directory} has no checkpoint yet; the run begins anew")
    return {}, {}


def load_model(path: str, learner: Learner, envs: Environments) -> Learner:
    """Weights and statistics of a model.safetensors that any PPO script of this repository wrote."""
    arrays, _ = load_arrays(path)
    expected = {name: a for name, a in to_numpy(learner).items() if not name.startswith("optimizer.")} | envs.to_numpy()
    for name in sorted(arrays.keys() | expected.keys()):
        there, here = (getattr(side.get(name), "shape", "missing") for side in (arrays, expected))
        if there != here:
            why = "it was trained with another environment, --hidden-sizes, --norm-obs or --norm-reward"
            raise BadInput(f"--load-model {path}: {name} is {there} there and {here} here; {why}")
    envs.from_numpy(arrays)
    return from_numpy(learner, arrays)


def open_directory(config: Config) -> tuple[Path, str]:
    """The directory of the run, new unless it is resumed, and its W&B id."""
    if config.resume:
        return Path(config.resume), json.loads((Path(config.resume) / "config.json").read_text())["wandb_id"]
    name = f"{config.env_id}__{config.exp_name}__{config.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    directory, run_id = Path(config.run_dir or "runs/" + re.sub(r"[/:]", "-", name)), secrets.token_hex(4)
    if (directory / "config.json").exists():
        raise BadInput(f"{directory} holds a run: --resume {directory}, or choose another --run-dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config) | {"wandb_id": run_id}, indent=2))
    except OSError as error:
        raise BadInput(f"cannot write to {directory}: {one_line(error)}; choose another --run-dir") from error
    return directory, run_id


# ---------------------------------------------------------------------------------------------------- command line


class BadInput(Exception):
    """The run cannot begin; the message says what would be right."""


class TrainingFailed(Exception):
    """A number is not finite."""


def validate(config: Config) -> None:
    def require(is_right: bool, name: str, rule: str) -> None:
        if not is_right:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(config, name)}: must {rule}")

    rules = [
        (1, math.inf, "num_envs num_steps num_minibatches update_epochs"),
        (
            0,
            math.inf,
            "seed total_timesteps num_threads timing_interval eval_episodes eval_interval checkpoint_interval",
        ),
        (0, math.inf, "learning_rate final_learning_rate adam_eps clip_coef ent_coef vf_coef max_grad_norm target_kl"),
        (0, 1, "gamma gae_lambda"),
    ]
    for least, most, names in rules:
        for name in names.split():
            value = getattr(config, name)
            rule = f"be from {least} to 1" if most == 1 else f"be finite and at least {least}"
            require(value is None or (least <= value <= most and value < math.inf), name, rule)
    for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps", "target_kl"):
        require(getattr(config, name) != 0, name, "not be 0")
    require(config.seed < 2**63, "seed", "be below 2**63")
    require(config.num_threads <= 1024, "num_threads", "be at most 1024")
    require(all(size > 0 for size in config.hidden_sizes), "hidden_sizes", "be positive")
    batch = f"{config.num_envs} environments x {config.num_steps} steps"
    is_even = config.batch_size % config.num_minibatches == 0 and config.batch_size > config.num_minibatches
    require(is_even, "num_minibatches", f"split {batch} into equal parts of 2 or more")
    is_short = 0 < config.total_timesteps < config.batch_size
    require(not is_short, "total_timesteps", f"be 0 or reach one rollout, {batch}")
    try:
        is_object = isinstance(json.loads(config.env_kwargs), dict)
    except json.JSONDecodeError:
        is_object = False
    require(is_object, "env_kwargs", 'be JSON such as {"gravity": 5.0}')


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


def parse_config(arguments: list[str]) -> Config:
    """A resumed run takes its flags from its directory. Few may differ; --total-timesteps moves the annealing too."""
    config = parse(arguments, Config())
    if not config.resume:
        return config
    try:
        recorded = json.loads((Path(config.resume) / "config.json").read_text())
        names = [field.name for field in dataclasses.fields(Config)]
        recorded, _ = {name: recorded[name] for name in names}, recorded["wandb_id"]
        recorded = Config(**recorded | {"hidden_sizes": tuple(recorded["hidden_sizes"]), "resume": config.resume})
        validate(recorded)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume {config.resume}: no run of this script is there ({one_line(error)})") from error
    config = parse(arguments, recorded)
    free = {"total_timesteps", "device", "wandb_mode", "eval_episodes", "eval_interval", "capture_video", "save_model"}
    for name, value in dataclasses.asdict(config).items():
        if name not in free and value != getattr(recorded, name):
            raise BadInput(
                f"--{name.replace('_', '-')} cannot change in a resumed run; it is {getattr(recorded, name)}"
            )
    return config


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


def main() -> int:
    try:
        train(parse_config(sys.argv[1:]))
        return 0
    except (BadInput, TrainingFailed) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1


if __name__ == "__main__":
    sys.exit(main())
