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
"""Vanilla policy gradient (VPG, REINFORCE with a baseline) in PyTorch, in one file, for any mixture of actions.

    python vpg_torch.py --env-id CartPole-v1
    torchrun --nproc-per-node 2 vpg_torch.py --env-id CartPole-v1

Papers: Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992
(REINFORCE); Sutton et al., "Policy Gradient Methods for Reinforcement Learning with Function Approximation", 1999 (the
policy gradient theorem, PG below); advantages from Schulman et al., "High-Dimensional Continuous Control Using
Generalized Advantage Estimation", arXiv 1506.02438 (GAE). The order of steps is that of OpenAI's Spinning Up.

    initialise policy π and value function V
    repeat
        anneal the policy's learning rate
        act with π for T steps in N environments
        compute advantages Â with GAE(λ) from V, and rewards-to-go R̂, both going on with V where data ends
        one step of Adam on  -log π(a|s) (Â - mean) / std - c entropy(π)
        K steps of Adam on   (V(s) - R̂)² / 2

Shapes: T steps, N environments, O entries of an observation, A entries of a part of the action. An action is one array
or any nesting of dicts and tuples of arrays, its parts; each has a head of its own on a shared trunk, and given the
observation they are independent. Discrete parts count from 0; a continuous part is kept as it was sampled, and
`environment_actions` alone scales it to its bounds, where all are finite, or clips it to those that are.

`update` sees data alone, wherever it comes from. Processes that torchrun starts have N environments each, and learn as
one process with all their batches would; the first records the run, and its own episodes.
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
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import pydantic
import safetensors.numpy
import torch
import torch.distributed as dist
import tyro
import wandb
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
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
    env_id: str = "CartPole-v1"  # Gymnasium id, module:Id-v0 or dm_control/domain-task-v0
    env_kwargs: str = "{}"  # JSON passed to the environment, such as '{"gravity": 5.0}'
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seed of weights, actions and environments
    total_timesteps: Steps = 500_000  # environment steps of the whole run, all environments and processes together
    policy_lr: Positive = 3e-3  # Adam's learning rate of the policy at the start
    value_lr: Positive = 1e-3  # Adam's learning rate of the value function
    anneal_lr: bool = True  # go linearly from --policy-lr to 0
    value_iters: Count = 40  # K, value steps of an update
    num_envs: Count = 4  # N, environments that step together, in each process
    num_steps: Count = 256  # T, steps of each environment between two updates
    gamma: Fraction = 0.99  # discount factor γ
    gae_lambda: Fraction = 0.97  # λ of generalised advantage estimation
    norm_adv: bool = True  # normalise the advantages of a batch
    ent_coef: NonNegative = 0.0  # c, weight of the entropy bonus
    hidden_sizes: tuple[Count, ...] = (64, 64)  # widths of the tanh layers, of both networks
    vectorization: Literal["auto", "sync", "async"] = "auto"  # one process, or one an environment; auto: the faster
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one, else cpu
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0  # CPU threads of torch; 0: 1, the fastest for small networks
    timing_interval: Steps = 20  # every K-th iteration runs phase by phase, fenced; 1: always, 0: never
    eval_episodes: Steps = 10  # episodes of an evaluation: deterministic policy, fresh environments; 0: none
    eval_interval: Steps = 0  # environment steps between evaluations; 0: only one at the end
    checkpoint_interval: Steps | None = None  # steps to a checkpoint (new episodes); None: 1/10, ≥5000 N; 0: on signals
    capture_video: bool = False  # film the first episode of every evaluation, 2000 steps at most
    save_model: bool = True  # write model.safetensors at the end
    load_model: str | None = None  # start from this model.safetensors: its weights
    resume: str | None = None  # go on with the run in this directory; needs no other flag
    run_dir: str | None = None  # directory of the run's files; None: runs/<env>__<script>__<seed>__<time>
    exp_name: str = "vpg_torch"  # <script> in the name of the run
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline: nothing leaves the machine
    wandb_project: Annotated[str, Field(pattern=r"^[^/\\#?%:]+$", max_length=128)] = "deep-rl-scripts"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group; None: <env>__<script>, so that seeds fall together

    @property
    def iteration_steps(self) -> int:
        return self.num_envs * self.num_steps * num_processes()

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.iteration_steps

    # twin: ppo_torch ppo_mlx ppo_jax ppo_lstm_jax vpg_torch
    @property
    def checkpoint_every(self) -> int:
        default = max(self.total_timesteps // 10, 5000 * self.num_envs)  # so that episodes end in between
        return default if self.checkpoint_interval is None else self.checkpoint_interval


# -------------------------------------------------------------------------------------------------------- networks


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an action: real numbers, or in each of its entries one of 0, 1, …, choices - 1."""

    shape: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()  # of each entry in turn; (): real numbers


class Policy(nn.Module):
    """A tanh trunk and a head for each part: the logits of all its choices, or the mean of a Gaussian whose standard
    deviation exp(log_std) does not depend on the state."""

    def __init__(self, observation_dim: int, parts: Any, config: Config):
        super().__init__()
        self.parts, widths = parts, (observation_dim, *config.hidden_sizes)  # a Part, or dicts and tuples of them
        self.trunk = nn.Sequential(*tanh_layers(*widths))
        self.heads, self.log_stds = nn.ModuleList(), nn.ParameterList()
        for (part,) in leaves(parts):
            size = sum(part.choices) or math.prod(part.shape)
            self.heads.append(initialised(nn.Linear(widths[-1], size), 0.01))
            self.log_stds.append(
                torch.full((0 if part.choices else size,), -1.0)
            )  # more would be clipped to bounds too often to tell

    def forward(self, observations: Tensor) -> list[Tensor]:
        features = self.trunk(observations)  # (T, N, O) -> (T, N, width)
        return [head(features) for head in self.heads]  # (T, N, size) of each part in turn


def tanh_layers(*sizes: int) -> list[nn.Module]:
    return [module for pair in itertools.pairwise(sizes) for module in (initialised(nn.Linear(*pair)), nn.Tanh())]


# twin: ppo_torch vpg_torch
def initialised(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014) times a gain, biases zero."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------------------------ data


class Batch(NamedTuple):
    """Transitions from anywhere. Row t + 1 goes on where row t ends, unless an episode ends there."""

    observations: Tensor | np.ndarray  # (T, N, O)
    actions: Any  # (T, N, *shape) of each part, nested as the parts are
    rewards: Tensor | np.ndarray  # (T, N)
    terminated: Tensor | np.ndarray  # (T, N): no reward can follow
    truncated: Tensor | np.ndarray  # (T, N): the episode ends here, though rewards would follow
    next_observations: Tensor | np.ndarray  # (T, N, O): the true ones, also where an episode ends


class Learner(NamedTuple):
    """What an update changes, in place: `to_numpy` makes a copy."""

    policy: Policy
    critic: nn.Sequential  # (T, N, O) -> (T, N, 1)
    policy_optimizer: torch.optim.Adam  # of all weights in one vector, of which the layers hold views
    critic_optimizer: torch.optim.Adam


# ------------------------------------------------------------------------------------------------------- equations


def log_probs_and_entropies(policy: Policy, observations: Tensor, actions: Any) -> tuple[Tensor, Tensor]:
    """log π(a|s) and entropy of π(·|s), (T, N) each, summed over the independent parts and their entries."""
    terms = []
    heads = zip(leaves(policy.parts, actions), policy(observations), policy.log_stds, strict=True)
    for (part, action), head, log_std in heads:
        action = action.reshape(*head.shape[:2], -1)  # (T, N, A)
        if part.choices:
            for logits, choice in zip(head.split(part.choices, -1), action.split(1, -1), strict=True):
                log_p = logits.log_softmax(-1)
                terms.append((log_p.gather(-1, choice).squeeze(-1), -(log_p.exp() * log_p).sum(-1)))
        else:
            log_density = -0.5 * ((action - head) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
            entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).expand_as(head)
            terms.append((log_density.sum(-1), entropy.sum(-1)))
    return tuple(map(sum, zip(*terms, strict=True)))


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


# twin: ppo_torch vpg_torch
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all processes"""
    mean = mean_over_processes(x.mean())
    return mean, mean_over_processes(((x - mean) ** 2).mean())


def normalised(advantages: Tensor) -> Tensor:
    """(Â - mean) / std over all processes"""
    mean, variance = moments(advantages)
    return (advantages - mean) / (variance.sqrt() + 1e-8)


def policy_loss(policy: Policy, batch: Batch, advantages: Tensor, ent_coef: float) -> tuple[Tensor, ...]:
    """-mean log π(a|s) Â - c mean entropy -> loss, its first term, entropy, log π(a|s) (T, N)

    Minus the gradient of the first term estimates the policy gradient (PG theorem 1, whose γᵗ is left out as usual), up
    to the scale of Â.
    """
    log_probs, entropies = log_probs_and_entropies(policy, batch.observations, batch.actions)
    surrogate, entropy = -(log_probs * advantages).mean(), entropies.mean()
    return surrogate - ent_coef * entropy, surrogate, entropy, log_probs


def value_loss(critic: nn.Sequential, batch: Batch, returns: Tensor) -> tuple[Tensor]:
    """½ (V - R̂)², the mean over (T, N)"""
    return (0.5 * ((critic(batch.observations).squeeze(-1) - returns) ** 2).mean(),)


@torch.no_grad()
def kl_divergence(policy: Policy, batch: Batch, log_probs: Tensor) -> dict[str, Tensor]:
    """KL(π_old ‖ π) by estimators k3 and k1 (Schulman 2020, "Approximating KL Divergence")"""
    log_ratio = log_probs_and_entropies(policy, batch.observations, batch.actions)[0] - log_probs
    return {"approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(), "old_approx_kl": -log_ratio.mean()}


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Of the rewards-to-go by the values, over all processes"""
    return 1 - moments(returns - values)[1] / moments(returns)[1]


@torch.no_grad()
def targets(critic: nn.Sequential, batch: Batch, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Values V, advantages Â, rewards-to-go R̂, (T, N) each. R̂_t = r_t + γ R̂_{t+1}; where an episode is truncated or
    the batch ends r_t + γ V(s'_t), where it terminates r_t. That is Â + V with λ = 1."""
    values, next_values = (critic(x).squeeze(-1) for x in (batch.observations, batch.next_observations))
    done = torch.maximum(batch.terminated, batch.truncated)
    known = batch.rewards, values, next_values, batch.terminated, done, config.gamma
    return values, gae(*known, config.gae_lambda), gae(*known, 1.0) + values


# ---------------------------------------------------------------------------------------------------------- update


def with_gradient(
    loss: Callable[..., tuple[Tensor, ...]], network: nn.Module, *arguments
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the loss, its first result, as a vector of all weights; all results"""
    results = loss(network, *arguments)
    gradients = torch.autograd.grad(results[0], list(network.parameters()), materialize_grads=True)  # of empty log_stds
    return torch.cat([part.flatten() for part in gradients]), [result.detach() for result in results]


def descend(optimizer: torch.optim.Adam, gradient: Tensor) -> Tensor:
    """One step of Adam against the mean gradient of all processes -> its norm"""
    (weights,) = optimizer.param_groups[0]["params"]
    weights.grad = mean_over_processes(gradient)
    optimizer.step()
    return weights.grad.norm()


def update(
    learner: Learner, batch: Batch, config: Config, timed: Callable = lambda phase, function, *x: function(*x)
) -> tuple[Learner, dict[str, float]]:
    """One step of the policy, K of the value function -> learner, losses/…

    `timed(phase, function, *arguments)` is function(*arguments), clocked as that phase where the update is not fused.
    """
    policy, critic, policy_optimizer, critic_optimizer = learner

    def timed_loss(part: str, *call):
        """Clocked twice: as the loss and as a part of it"""
        return timed("loss", timed, f"loss/{part}", with_gradient, *call)

    batch = Batch(*timed("gae", to_tensors, critic, batch))
    values, advantages, returns = timed("gae", targets, critic, batch, config)
    metrics = {"explained_variance": timed("gae", explained_variance, values, returns)}
    advantages = timed("gae", normalised, advantages) if config.norm_adv else advantages
    gradient, results = timed_loss("policy", policy_loss, policy, batch, advantages, config.ent_coef)
    _, metrics["policy_loss"], metrics["entropy"], log_probs = results
    metrics["grad_norm"] = timed("weight_update", descend, policy_optimizer, gradient)
    metrics |= timed("kl", kl_divergence, policy, batch, log_probs)
    value_losses = []
    for _ in range(config.value_iters):
        gradient, (squared_error,) = timed_loss("value", value_loss, critic, batch, returns)
        timed("weight_update", descend, critic_optimizer, gradient)
        value_losses.append(squared_error)
    metrics["value_loss"] = torch.stack(value_losses).mean()
    means = mean_over_processes(torch.stack(list(metrics.values()))).tolist()
    return learner, {f"losses/{name}": mean for name, mean in zip(metrics, means, strict=True)}


# --------------------------------------------------------------------------------------------------------- rollout


def action_noise(rng: np.random.Generator, shape: tuple[int, ...], policy: Policy) -> list[np.ndarray]:
    """(*shape, size) of each part in turn, for `sample_actions`"""
    noise = []
    for head, log_std in zip(policy.heads, policy.log_stds, strict=True):
        std, size = log_std.exp().numpy(force=True), (*shape, head.out_features)
        is_continuous = len(std) > 0
        noise.append(std * rng.standard_normal(size) if is_continuous else rng.gumbel(size=size))
    return [x.astype(np.float32) for x in noise]


def sample_actions(outputs: list[np.ndarray], parts: Any) -> Any:
    """Output of each head plus noise, (N, size) -> actions (N, *shape), nested; without noise the most likely ones.

    Continuous: mean + noise, which is std · standard Gaussian. Discrete: argmax(logits + Gumbel noise), which is a draw
    from softmax(logits) (Maddison et al. 2014, "A* Sampling", §2).
    """
    outputs = iter(outputs)

    def sample(part: Part) -> np.ndarray:
        x = next(outputs)
        if part.choices:
            ends = itertools.accumulate(part.choices, initial=0)
            x = np.stack([x[:, start:end].argmax(-1) for start, end in itertools.pairwise(ends)], -1)
        return x.reshape(-1, *part.shape)

    return mapped(sample, parts)


@torch.inference_mode()
def act(policy: Policy, observations: np.ndarray, noise: Iterable[np.ndarray] = itertools.repeat(0.0)) -> Any:
    """(N, O), (N, size) of each part in turn -> actions (N, *shape), nested"""
    outputs = policy(torch.from_numpy(observations).to(policy.heads[0].weight.device))
    return sample_actions([head.numpy(force=True) + x for head, x in zip(outputs, noise, strict=False)], policy.parts)


def collect_rollout(
    policy: Policy, envs: "Environments", config: Config, rng: np.random.Generator, timed: Callable
) -> Batch:
    noise = timed("forward", action_noise, rng, (config.num_steps, envs.num_envs), policy)
    observations, next_observations = np.empty((2, config.num_steps, *envs.observations.shape), np.float32)
    rewards = np.empty((config.num_steps, envs.num_envs), np.float32)
    terminated, truncated = np.empty((2, *rewards.shape), bool)
    actions = []
    for t, noise_now in enumerate(zip(*noise, strict=True)):
        observations[t] = envs.observations
        actions.append(timed("forward", act, policy, observations[t], noise_now))
        next_observations[t], rewards[t], terminated[t], truncated[t] = timed("step", envs.step, actions[t])
    check_finite(config.env_id, observation=observations, final_observation=next_observations, reward=rewards)
    actions = mapped(lambda *steps: np.stack(steps), *actions)
    return Batch(observations, actions, rewards, terminated, truncated, next_observations)


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
        learner, rng = new_learner(envs.observation_dim, envs.parts, own), np.random.default_rng(own.seed)
        if config.load_model and not has_checkpoint(config):
            learner = load_model(config.load_model, learner)
        stopwatch = new_stopwatch(learner)
        with new_run(config, envs, stopwatch, algorithm="vpg", device=device_name(learner)) as run:
            learner = run.restore(learner, rng, envs)
            stopwatch.timed("compile", warm_up, learner, config)
            for iteration in run.iterations():
                rate = annealed_learning_rate(iteration, config)
                learner = with_learning_rate(learner, rate)
                batch = collect_rollout(learner.policy, envs, config, rng, stopwatch.timed)
                if run.is_timed(iteration):
                    learner, metrics = update(learner, batch, config, stopwatch.timed)
                else:
                    arguments = learner, batch, config, stopwatch.fused
                    learner, metrics = stopwatch.timed("update", update, *arguments)
                run.check(metrics)
                if run.is_due(config.eval_interval):
                    run.evaluate(partial(act, learner.policy))
                run.record(metrics | {"charts/learning_rate": rate}, partial(histogram_samples, learner, batch, config))
                if run.is_due(config.checkpoint_every):
                    run.save_checkpoint(learner)
                    stopwatch.timed("checkpoint", envs.restart, run.global_step)
            returns = run.conclude(partial(act, learner.policy), learner)
    return Result(learner, returns, run.directory)


def annealed_learning_rate(iteration: int, config: Config) -> float:
    """The policy's: --policy-lr at the first update, 0 one update after the last."""
    return config.policy_lr * (1 - (iteration - 1) / config.num_iterations if config.anneal_lr else 1)


# -------------------------------------------------------------------------------------------------- nested actions


def mapped(function: Callable, tree: Any, *others: Any) -> Any:
    """A nesting of dicts and tuples like `tree`, of the function's results for the leaves at each place."""
    if isinstance(tree, dict):
        return {key: mapped(function, branch, *(other[key] for other in others)) for key, branch in tree.items()}
    if isinstance(tree, tuple):
        return tuple(mapped(function, *branches) for branches in zip(tree, *others, strict=True))
    return function(tree, *others)


def leaves(*trees: Any) -> list[tuple]:
    """Those at each place of the first tree, in its order"""
    found = []
    mapped(lambda *leaf: found.append(leaf), *trees)
    return found


def named(name: str, tree: Any) -> dict[str, Any]:
    """The leaves by their places"""
    if not isinstance(tree, dict | tuple):
        return {name: tree}
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, branch in branches for path, leaf in named(f"{name}/{key}", branch).items()}


# ----------------------------------------------------------------------------------------------------------- torch


def new_learner(observation_dim: int, parts: Any, config: Config) -> Learner:
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if config.device not in ("auto", *available):
        raise BadInput(f"--device {config.device} is not there; this machine has {' and '.join(available)}")
    auto = "cuda" if "cuda" in available else "cpu"  # for small networks faster than mps
    torch.set_num_threads(config.num_threads or 1)
    torch.manual_seed(config.seed)
    policy = Policy(observation_dim, parts, config)
    sizes = observation_dim, *config.hidden_sizes
    critic = nn.Sequential(*tanh_layers(*sizes), initialised(nn.Linear(sizes[-1], 1), 1.0))
    optimizers = []
    for network, rate in (policy, config.policy_lr), (critic, config.value_lr):
        network.to(auto if config.device == "auto" else config.device)
        weights = nn.Parameter(nn.utils.parameters_to_vector(network.parameters()).detach())
        nn.utils.vector_to_parameters(weights, network.parameters())
        optimizers.append(torch.optim.Adam([weights], rate, fused=True))
    return Learner(policy, critic, *optimizers)


def device_name(learner: Learner) -> str:
    device = next(learner.policy.parameters()).device
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def new_stopwatch(learner: Learner) -> "Stopwatch":
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    fence = synchronize.get(next(learner.policy.parameters()).device.type, lambda: None)
    return Stopwatch(lambda result: fence(), {})


def with_learning_rate(learner: Learner, rate: float) -> Learner:
    learner.policy_optimizer.param_groups[0]["lr"] = rate
    return learner


def warm_up(learner: Learner, config: Config) -> None:
    """The first gradient costs what no other does; the weights stay as they are."""
    observations = np.zeros((2, config.num_envs, learner.critic[0].in_features), np.float32)
    actions, zeros = act(learner.policy, observations[0]), np.zeros((3, 2, config.num_envs), np.float32)
    actions = mapped(lambda x: np.stack([x, x]), actions)
    batch = Batch(*to_tensors(learner.critic, (observations, actions, *zeros, observations)))
    with_gradient(policy_loss, learner.policy, batch, batch.rewards, config.ent_coef)
    with_gradient(value_loss, learner.critic, batch, batch.rewards)


def to_tensors(network: nn.Module, arrays: Any) -> Any:
    """Of a nesting of arrays, on the network's device. Floats and booleans take the dtype of the weights."""
    weight = next(network.parameters())

    def to_tensor(array: np.ndarray) -> Tensor:
        x = torch.as_tensor(array)
        dtype = weight.dtype if x.is_floating_point() or x.dtype == torch.bool else x.dtype
        return x.to(dtype).to(weight.device)  # in this order: mps has no float64

    return mapped(to_tensor, arrays)


def histogram_samples(learner: Learner, batch: Batch, config: Config) -> dict[str, np.ndarray]:
    """What the record has a histogram of, after the update; a part of an action goes by its place, as actions/arm/0"""
    values, advantages, _ = targets(learner.critic, Batch(*to_tensors(learner.critic, batch)), config)
    arrays = {"advantages": advantages.numpy(force=True), "values": values.numpy(force=True)}
    return {name: x.ravel() for name, x in (named("actions", batch.actions) | arrays).items()}


def to_numpy(learner: Learner) -> dict[str, np.ndarray]:
    """Weights by torch's names; Adam's step and moments as optimizer.<network>.<which>, in the order of its weights"""
    arrays = {}
    for name, network, optimizer in trained(learner):
        arrays |= {f"{name}.{key}": x for key, x in network.named_parameters()}
        arrays |= {f"optimizer.{name}.{key}": x for state in optimizer.state.values() for key, x in state.items()}
    return {name: x.numpy(force=True) for name, x in arrays.items()}


def from_numpy(learner: Learner, arrays: dict[str, np.ndarray]) -> Learner:
    """The inverse of `to_numpy`; without moments an optimizer stays as it is."""
    for name, network, optimizer in trained(learner):
        for key, weight in network.named_parameters():
            weight.data.copy_(torch.from_numpy(arrays[f"{name}.{key}"]))
        prefix, (weights,) = f"optimizer.{name}.", optimizer.param_groups[0]["params"]
        moments = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        optimizer.state[weights] |= to_tensors(network, moments)
    return learner


def trained(learner: Learner) -> list[tuple[str, nn.Module, torch.optim.Adam]]:
    return [("policy", learner.policy, learner.policy_optimizer), ("critic", learner.critic, learner.critic_optimizer)]


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


# ---------------------------------------------------------------------------------------------------- environments


class Environments:
    """N environments that reset in the very step that ends an episode; adds up returns."""

    def __init__(self, config: Config, num_envs: int, is_evaluation: bool = False):
        self.config, self.num_envs, self.is_evaluation, self.is_fresh = config, num_envs, is_evaluation, True
        self.vector = make_vector(config, num_envs, is_evaluation)
        (self.observation_dim,) = self.vector.single_observation_space.shape
        self.parts = action_parts(self.vector.single_action_space)

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

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Actions (N, *shape), nested -> true next observations, rewards, terminated, truncated"""
        env_actions = environment_actions(actions, self.vector.single_action_space)
        stepped = call_environments(self.vector, self.config.env_id, "step", env_actions)
        observations, rewards, terminated, truncated, info = stepped
        self.returns += rewards
        self.lengths += 1
        next_observations = self.observations = observations.astype(np.float32)
        if "final_obs" in info:
            next_observations, done = next_observations.copy(), terminated | truncated
            next_observations[done] = np.stack(info["final_obs"][done])
            self.episodes += [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in np.flatnonzero(done)]
            self.returns[done] = self.lengths[done] = 0
        return next_observations, rewards, terminated, truncated

    def to_numpy(self) -> dict[str, np.ndarray]:
        return {}  # they begin anew after a checkpoint

    def from_numpy(self, arrays: dict[str, np.ndarray]) -> None:
        pass

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


def make_vector(config: Config, num_envs: int, is_evaluation: bool) -> gym.vector.VectorEnv:
    is_filmed, mode = is_evaluation and config.capture_video, {"autoreset_mode": AutoresetMode.SAME_STEP}
    try:
        kwargs = json.loads(config.env_kwargs)
        if is_filmed:
            importlib.import_module("moviepy")  # missed now, not after the training
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


def make_env(env_id: str, kwargs: dict) -> gym.Env:
    if multiprocessing.parent_process():  # signals reach all processes; the parent alone ends the run
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if env_id.startswith("dm_control/"):
        gym.register_envs(importlib.import_module("shimmy"))
    quieten_mujoco(env_id)
    env = gym.make(env_id, **kwargs)
    action_parts(env.action_space)  # raises where it is not supported
    space = env.observation_space
    is_image = isinstance(space, spaces.Box) and len(space.shape) == 3
    if is_image or not space.is_np_flattenable or isinstance(space, spaces.Text):
        raise ValueError(f"the observation space {space} is not supported; what flattens to a vector is")
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


def action_parts(space: gym.Space) -> Any:
    """Nested as the space is."""
    if isinstance(space, spaces.Dict):
        return {name: action_parts(part) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(map(action_parts, space))
    if isinstance(space, spaces.Discrete):
        return Part((), (int(space.n),))
    if isinstance(space, spaces.MultiDiscrete):
        return Part(space.shape, tuple(space.nvec.ravel().tolist()))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return Part(space.shape)
    what = "Discrete, MultiDiscrete, float Box and Dicts and Tuples of them are"
    raise ValueError(f"the action space {space} is not supported; {what}")


def environment_actions(actions: Any, space: gym.Space) -> Any:
    """Nested (N, *shape) as the policy chose them -> what the environments take. In a Box that is bounded on all sides
    -1 stands for the low and 1 for the high; here and nowhere else actions are scaled and clipped."""
    if isinstance(space, spaces.Dict):
        return {name: environment_actions(actions[name], part) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(map(environment_actions, actions, space))
    if not isinstance(space, spaces.Box):
        return (actions + space.start).astype(space.dtype)
    if space.is_bounded():
        middle, half = space.high / 2 + space.low / 2, space.high / 2 - space.low / 2  # neither overflows
        actions = middle + half * actions.clip(-1, 1)
    return actions.clip(space.low, space.high).astype(space.dtype)


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
    rollout = f"{config.num_envs} environments x {config.num_steps} steps"
    if config.iteration_steps < 2:
        raise BadInput(f"--num-steps {config.num_steps}: a batch needs 2 samples or more, not {rollout}")
    if 0 < config.total_timesteps < config.iteration_steps:
        raise BadInput(
            f"--total-timesteps {config.total_timesteps}: must be 0 or reach one batch, {config.iteration_steps} steps"
        )
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
