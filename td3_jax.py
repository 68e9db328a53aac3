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
"""Twin delayed deep deterministic policy gradient (TD3) in JAX, in one file.

    python td3_jax.py --env-id HalfCheetah-v5

Paper: Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods", arXiv 1802.09477 (TD3 below).
The defaults are CleanRL's; the README has commands for other environments.

    initialise policy π, critics Q₁ and Q₂, and targets π', Q'₁, Q'₂ as copies of them
    repeat
        act with π plus noise in N environments, but at random and without updates in the first `learning_starts` steps
        keep the transitions (s, a, r, s') in the replay buffer
        repeat `updates_per_step` times for each transition
            sample a minibatch of B transitions
            ã = clip(π'(s') + clip(ε, -c, c), -1, 1),   ε ~ N(0, σ²)
            y = r + γ min(Q'₁(s', ã), Q'₂(s', ã)), but y = r where s' is terminal
            minimise  mean (Q₁(s, a) - y)² + mean (Q₂(s, a) - y)²
            every d-th time
                maximise  mean Q₁(s, π(s))
                move π', Q'₁, Q'₂ by the fraction τ towards π, Q₁, Q₂

Shapes: N environments, B samples of a minibatch, C = 2 critics, U updates in one compiled call, O observation, A
dimensions of an action. Actions are in [-1, 1] wherever this file names them, in the replay buffer too;
`environment_actions` alone scales them to the bounds of the environment, so that σ and c are in units of half the range
of each dimension.
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
ALGORITHM = "td3"

# ---------------------------------------------------------------------------------------------------------- Config

Count = Annotated[int, Field(ge=1, lt=2**31)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Config:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id, module:Id-v0 or dm_control/domain-task-v0
    env_kwargs: str = "{}"  # JSON passed to the environment, such as '{"gravity": 5.0}'
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seed of weights, actions, minibatches and environments
    total_timesteps: Steps = 1_000_000  # environment steps of the whole run, in whole iterations
    learning_rate: Positive = 3e-4  # Adam's learning rate of the policy and the critics
    num_envs: Count = 1  # N, environments that step together
    action_repeat: Count = 1  # times that the environment takes an action; each counts, even if the episode ends sooner
    buffer_size: Count = 1_000_000  # transitions that the replay buffer keeps
    learning_starts: Steps = 25_000  # steps with random actions before the first update
    batch_size: Count = 256  # B, transitions of a minibatch
    updates_per_step: Positive = 1.0  # updates for each transition: times N for a step of all environments
    gamma: Fraction = 0.99  # discount factor γ
    tau: Fraction = 0.005  # τ, how far the targets move towards their networks
    policy_frequency: Count = 2  # d: the policy and the targets move at every d-th update
    exploration_noise: NonNegative = 0.1  # standard deviation of the noise on actions, in half ranges
    policy_noise: NonNegative = 0.2  # σ, standard deviation of the noise on target actions, in half ranges
    noise_clip: NonNegative = 0.5  # c, largest noise on target actions, in half ranges
    hidden_sizes: tuple[Count, ...] = (256, 256)  # widths of the ReLU layers
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
    exp_name: str = "td3_jax"  # <script> in the name of the run
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
    """π: (B, O) -> (B, A) in [-1, 1]"""

    hidden_sizes: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observations: Tensor) -> Tensor:
        return nn.tanh(mlp(observations, *self.hidden_sizes, self.action_dim))


# twin: td3_jax sac_jax mpo_jax
class Critic(nn.Module):
    """Q: (B, O), (B, A) -> (B,)"""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observations: Tensor, actions: Tensor) -> Tensor:
        return mlp(jnp.concatenate([observations, actions], -1), *self.hidden_sizes, 1).squeeze(-1)


# twin: td3_jax sac_jax
def mlp(x: Tensor, *sizes: int) -> Tensor:
    """Linear layers with ReLU between them. Weights begin uniform in ±1/√inputs, biases 0."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    for i, size in enumerate(sizes[:-1]):
        x = nn.relu(nn.Dense(size, kernel_init=uniform, name=f"{2 * i}")(x))  # torch's names, which count the ReLU too
    return nn.Dense(sizes[-1], kernel_init=uniform, name=f"{2 * len(sizes) - 2}")(x)


# ------------------------------------------------------------------------------------------------------------ data


class Batch(NamedTuple):
    """What U updates need, made on the host."""

    observations: np.ndarray  # (U, B, O)
    actions: np.ndarray  # (U, B, A)
    rewards: np.ndarray  # (U, B)
    terminated: np.ndarray  # (U, B)
    next_observations: np.ndarray  # (U, B, O), true ones where an episode was truncated, unused where it terminated
    next_noise: np.ndarray  # (U, B, A) on the target actions, not clipped yet
    moves_policy: np.ndarray  # (U,): the policy and the targets move too


class Optimizers(NamedTuple):
    actor: optax.OptState
    critics: optax.OptState


class Learner(NamedTuple):
    """What an update changes."""

    actor: Network
    critics: Critics
    target_actor: Network
    target_critics: Critics
    optimizer: Optimizers


class Metrics(NamedTuple):
    """losses/… of the record, of one update () or of several (U,)"""

    critic_loss: Tensor
    q_mean: Tensor  # of all critics
    actor_loss: Tensor  # NaN where the policy does not move
    moves_policy: Tensor  # not recorded


# ------------------------------------------------------------------------------------------------------- equations


def smoothed_actions(actions: Tensor, noise: Tensor, noise_clip: float) -> Tensor:
    """ã of TD3 eq. 14 from π'(s') and noise of its own for each sample and dimension, (B, A) each"""
    return (actions + noise.clip(-noise_clip, noise_clip)).clip(-1, 1)


def critic_targets(rewards: Tensor, terminated: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """y of TD3 eq. 10: r + γ min Q'ᵢ(s', ã), (B,) from next_q (2, B); only termination cuts it."""
    return rewards + gamma * (1 - terminated) * next_q.min(0)


# twin: td3_jax sac_jax mpo_jax
def critic_loss(q: Tensor, targets: Tensor) -> Tensor:
    """Σ_c mean (Q_c(s, a) - y)² from (C, B) and (B,)"""
    return ((q - targets) ** 2).mean(1).sum()


def actor_loss(q: Tensor) -> Tensor:
    """-mean Q₁(s, π(s)) from (B,); its gradient is the deterministic policy gradient (Silver et al. 2014, eq. 9)"""
    return -q.mean()


# twin: td3_jax sac_jax mpo_jax
def polyak(target: Network, network: Network, tau: float) -> Network:
    """θ' ← τ θ + (1 - τ) θ'"""
    return jax.tree.map(lambda old, new: (1 - tau) * old + tau * new, target, network)


# ---------------------------------------------------------------------------------------------------------- update


def critic_gradient(learner: Learner, batch: Batch, config: Config) -> tuple[Critics, Tensor, Tensor]:
    """-> gradient of the critics' loss, the loss, mean Q"""
    actions = smoothed_actions(learner.target_actor(batch.next_observations), batch.next_noise, config.noise_clip)
    next_q = learner.target_critics(batch.next_observations, actions)
    targets = critic_targets(batch.rewards, batch.terminated, next_q, config.gamma)

    def loss_of(critics: Critics) -> tuple[Tensor, Tensor]:
        q = critics(batch.observations, batch.actions)
        return critic_loss(q, targets), q.mean()

    (loss, q_mean), gradient = jax.value_and_grad(loss_of, has_aux=True)(learner.critics)
    return gradient, loss, q_mean


def actor_gradient(learner: Learner, batch: Batch) -> tuple[Network, Tensor]:
    """-> gradient of the policy's loss, the loss"""
    q1 = Network(jax.tree.map(lambda x: x[0], learner.critics.params), learner.critics.module)

    def loss_of(actor: Network) -> Tensor:
        return actor_loss(q1(batch.observations, actor(batch.observations)))

    loss, gradient = jax.value_and_grad(loss_of)(learner.actor)
    return gradient, loss


begin_adam = optax.adam(0.0).init  # moments alone: each step brings its learning rate


# twin: td3_jax sac_jax mpo_jax
def descend(learner: Learner, name: str, gradient: Network | Tensor, learning_rate: float) -> Learner:
    """One step of Adam on this field of the learner"""
    changes, optimizer = optax.adam(learning_rate).update(gradient, getattr(learner.optimizer, name))
    updated = optax.apply_updates(getattr(learner, name), changes)
    return learner._replace(**{name: updated, "optimizer": learner.optimizer._replace(**{name: optimizer})})


# twin: td3_jax mpo_jax
def update_targets(learner: Learner, config: Config) -> Learner:
    target_actor = polyak(learner.target_actor, learner.actor, config.tau)
    target_critics = polyak(learner.target_critics, learner.critics, config.tau)
    return learner._replace(target_actor=target_actor, target_critics=target_critics)


def update_minibatch(learner: Learner, batch: Batch, config: Config, timed: Callable) -> tuple[Learner, Metrics]:
    """One update (TD3 algorithm 1, from "Sample mini-batch" on) on a batch without the axis U

    `timed(phase, function, *arguments)` is function(*arguments), clocked as that phase where the update is not fused.
    """

    def timed_loss(part: str, *call):
        """Clocked twice: as the loss and as a part of it"""
        return timed("loss", timed, f"loss/{part}", *call)

    batch = timed("sample", jax.device_put, batch)  # once, and not in the clock of the loss
    gradient, critics_loss, q_mean = timed_loss("critic", critic_gradient, learner, batch, config)
    learner = timed("weight_update", descend, learner, "critics", gradient, config.learning_rate)

    def move_policy(learner: Learner) -> tuple[Learner, Tensor]:
        gradient, loss = timed_loss("actor", actor_gradient, learner, batch)
        learner = timed("weight_update", descend, learner, "actor", gradient, config.learning_rate)
        return timed("target_update", update_targets, learner, config), loss

    learner, policy_loss = when(batch.moves_policy, move_policy, learner, critics_loss.dtype)
    return learner, Metrics(critics_loss, q_mean, policy_loss, batch.moves_policy)


# twin: td3_jax sac_jax mpo_jax
def update(learner: Learner, batch: Batch, config: Config, timed: Callable) -> tuple[Learner, Tensor]:
    """U updates -> learner, Metrics as an array (·, U)"""
    return each(partial(update_minibatch, config=config, timed=timed), learner, batch)


# --------------------------------------------------------------------------------------------------------- rollout


def act(actor: Network, observations: np.ndarray) -> np.ndarray:
    """(N, O) -> (N, A), greedily"""
    return np.asarray(compiled_call(actor, observations))


def explore(
    actor: Network, observations: np.ndarray, action_dim: int, step: int, config: Config, rng: np.random.Generator
) -> np.ndarray:
    """(N, O) -> (N, A): uniform until learning starts, then the policy's actions with Gaussian noise"""
    shape = len(observations), action_dim
    if step < config.learning_starts:
        return rng.uniform(-1, 1, shape).astype(np.float32)
    noise = config.exploration_noise * rng.standard_normal(shape, np.float32)
    return (act(actor, observations) + noise).clip(-1, 1)


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
    """For these updates of the run, counted from 1"""
    transitions = buffer.sample((len(updates), config.batch_size), rng)
    next_noise = config.policy_noise * rng.standard_normal(transitions["actions"].shape, np.float32)
    moves_policy = np.array(updates) % config.policy_frequency == 0
    return Batch(**transitions, next_noise=next_noise, moves_policy=moves_policy)


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
    critic_keys = jax.random.split(critics_key, 2)
    critics = Critics.create(Critic(config.hidden_sizes), critic_keys, observations, actions)
    return Learner(actor, critics, *copied((actor, critics)), Optimizers(*map(begin_adam, (actor, critics))))


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def device_name(learner: Learner) -> str:
    (device,) = jax.tree.leaves(learner)[0].devices()
    return device.platform if device.platform == "cpu" else f"{device.platform} ({device.device_kind})"


def new_stopwatch() -> "Stopwatch":
    static, donated = {"static_argnames": "config"}, {"donate_argnames": "learner"}
    compiled = {
        update: jax.jit(update, static_argnames=("config", "timed"), **donated),
        critic_gradient: jax.jit(critic_gradient, **static),
        actor_gradient: jax.jit(actor_gradient),
        descend: jax.jit(descend, static_argnames=("name", "learning_rate"), **donated),
        update_targets: jax.jit(update_targets, **static, **donated),
    }
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


# twin: td3_jax sac_jax mpo_jax
@jax.jit
def compiled_call(network: Network, *inputs: np.ndarray) -> Tensor:
    return network(*inputs)


# twin: ppo_jax ppo_lstm_jax td3_jax sac_jax mpo_jax
def is_traced(x: Tensor) -> bool:
    """Whether compiled code is being made, in which a loop is a jax.lax.scan."""
    return isinstance(x, jax.core.Tracer)


def when(condition: Tensor | np.ndarray, function: Callable, learner: Learner, dtype: np.dtype):
    """function(learner), or (learner, NaN): jax.lax.cond where JAX traces, and else an if."""
    if is_traced(condition):
        return jax.lax.cond(condition, function, lambda learner: (learner, jnp.full((), jnp.nan, dtype)), learner)
    return function(learner) if condition else (learner, math.nan)


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


def mean_metrics(arrays: list[Tensor]) -> dict[str, float]:
    """losses/… of the record over the updates of an iteration, {} before the first"""
    if not arrays:
        return {}
    metrics = Metrics(*np.concatenate(jax.device_get(arrays), -1))._asdict()
    metrics["actor_loss"] = metrics["actor_loss"][metrics.pop("moves_policy").astype(bool)]
    return {f"losses/{name}": float(values.mean()) for name, values in metrics.items() if len(values)}


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


# twin: td3_jax sac_jax
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
