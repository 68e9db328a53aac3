"""Environments with known answers and with bad manners, for the tests of all scripts.

    --env-id tests.environments:EndsEveryStep-v0      from the repository root

Rewards are 1 and an observation counts the steps of its episode, unless a class says otherwise.
"""

import itertools
import math
import os
import signal
import time
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv


class Counting(gym.Env):
    """Terminates, or truncates, after `length` steps; 0: never. An observation is (steps of the episode, 1) / 100."""

    metadata: ClassVar = {"render_modes": []}
    seeds: ClassVar[list[int]] = []  # that resets of any instance in this process were given

    def __init__(self, length: int = 10, truncate: bool = False, box: bool = False, render_mode: str | None = None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32) if box else spaces.Discrete(2)
        self.length, self.truncate, self.render_mode = length, truncate, render_mode
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.seeds.append(seed)
        self.steps = 0
        return self.observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        is_over = self.steps == self.length
        return self.observation(), 1.0, is_over and not self.truncate, is_over and self.truncate, {}

    def observation(self) -> np.ndarray:
        return np.array([self.steps, 1], np.float32) / 100


class NeverEnds(Counting):
    """Its process gets SIGTERM, if asked for, in the `at`-th step of the `which`-th instance that the process made."""

    instances = itertools.count()
    all_steps = 0  # of all instances

    def __init__(self, which: int = -1, at: int = 1, box: bool = False, render_mode: str | None = None):
        super().__init__(length=0, box=box, render_mode=render_mode)
        self.at = at if next(NeverEnds.instances) == which else 0

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        NeverEnds.all_steps += 1
        if self.steps + 1 == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(action)


class EndsEveryStep(Counting):
    def __init__(self, truncate: bool = False, box: bool = False, render_mode: str | None = None):
        super().__init__(1, truncate, box, render_mode)


class NotANumber(Counting):
    """One instance, the `which`-th that its process made, gives `value` once: in the `at`-th step of an episode."""

    instances = itertools.count()

    def __init__(self, what: str = "observation", at: int = 5, value: float = np.nan, which: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.what, self.at, self.value = what, at, value
        self.is_bad = next(NotANumber.instances) == which

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.is_bad and self.steps == self.at:
            observation = observation * self.value if self.what == "observation" else observation
            reward = self.value if self.what == "reward" else reward
        return observation, reward, terminated, truncated, info


class Raises(Counting):
    """An error in the `at`-th call of the method `where`, in the instance's whole life."""

    def __init__(self, where: str = "step", at: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.where, self.at, self.calls = where, at, 0

    def count(self, where: str) -> None:
        self.calls += where == self.where
        if where == self.where and self.calls == self.at:
            raise RuntimeError(f"the {where} of this environment is broken")

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.count("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count("step")
        return super().step(action)

    def close(self) -> None:
        self.count("close")


class Faulty(Counting):
    """What is wrong with its `at`-th step: an observation or a reward of a type or shape that its spaces do not say, a
    step that does not come back, or a process that dies."""

    def __init__(self, what: str = "longer", at: int = 5, **kwargs):
        super().__init__(**kwargs)
        self.what, self.at = what, at

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.steps == self.at:
            match self.what:
                case "longer":
                    observation = np.append(observation, [0])
                case "shorter":
                    observation = observation[:1]
                case "text":
                    observation = "not an observation"
                case "no reward":
                    reward = None
                case "two rewards":
                    reward = np.ones(2)
                case "hangs":
                    time.sleep(3600)
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
        return observation, reward, terminated, truncated, info


class Spaces(Counting):
    """Spaces by name, to be refused or not; it cannot be stepped."""

    OBSERVATIONS: ClassVar = {
        "sequence": spaces.Sequence(spaces.Box(0, 1, (2,), np.float32)),
        "text": spaces.Text(5),
        "graph": spaces.Graph(spaces.Box(0, 1, (2,), np.float32), None),
        "small image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
        "vector": spaces.Box(-1, 1, (2,), np.float32),
    }
    ACTIONS: ClassVar = {
        "multi-binary": spaces.MultiBinary(3),
        "integers": spaces.Box(0, 5, (2,), np.int64),
        "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]),
        "table": spaces.MultiDiscrete([[2, 3], [4, 5]]),
        "discrete": spaces.Discrete(2),
    }

    def __init__(self, observation: str = "vector", action: str = "discrete", render_mode: str | None = None):
        super().__init__(render_mode=render_mode)
        self.observation_space, self.action_space = self.OBSERVATIONS[observation], self.ACTIONS[action]


class Mortal(CartPoleEnv):
    """CartPole that sends a signal to its own process, where the variable MORTAL says so: 'KILL 7 20' sends SIGKILL in
    the 20th step of the 7th instance that this process made."""

    instances = itertools.count(1)

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode=render_mode)
        self.instance, self.total_steps = next(Mortal.instances), 0

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.total_steps += 1
        name, instance, at = os.environ.get("MORTAL", "KILL 0 0").split()
        if (self.instance, self.total_steps) == (int(instance), int(at)):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        return super().step(action)


for environment in (Counting, NeverEnds, EndsEveryStep, NotANumber, Raises, Faulty, Spaces):
    gym.register(f"{environment.__name__}-v0", environment, disable_env_checker=True)
gym.register("Mortal-v0", Mortal, max_episode_steps=500)


class Counter(gym.Env):
    """Observes (first seed, episode, step) and ends after a known number of steps, so that the true next observation
    of every step, the return and the length of every episode can be written down. All observations are one and the same
    array, so a reset writes over an episode's last.

    Episode k of an environment that was reset with `seed` ends after 3 + (seed + k) % 4 steps: by termination, by
    truncation or with both flags, as `ends` says. The reward of step t (from 1) is (-1)^seed · t.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, ends: str = "truncated", box: bool = False, render_mode: str | None = None):
        self.ends, self.render_mode = ends, render_mode
        self.first_seed, self.episode = 0, -1
        if box:
            self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.observed = np.zeros(3, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.first_seed, self.episode = seed % 1000, -1
        self.episode, self.step_number = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.step_number += 1
        is_over = self.step_number == 3 + (self.first_seed + self.episode) % 4
        reward = float((-1) ** self.first_seed * self.step_number)
        terminated, truncated = (is_over and self.ends in (flag, "both") for flag in ("terminated", "truncated"))
        return self.observation(), reward, terminated, truncated, {}

    def observation(self):
        self.observed[:] = self.first_seed, self.episode, self.step_number
        return self.observed


ECHO_SPACES = {
    "discrete": spaces.Discrete(3, start=-1),
    "multidiscrete": spaces.MultiDiscrete([2, 3], start=[5, -7]),
    "bounded": spaces.Box(np.array([-0.5, -2.0], np.float32), np.array([1.0, 0.25], np.float32)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
}


class Echo(gym.Env):
    """Observes (the action it was given, the step); an episode has 7 steps. The action space is chosen by name."""

    def __init__(self, space: str, render_mode: str | None = None):
        self.action_space, self.render_mode = ECHO_SPACES[space], render_mode
        self.size = 1 if space == "discrete" else math.prod(self.action_space.shape)
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.size + 1,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.step_number = 0
        return np.zeros(self.size + 1), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)), f"{action} is out of bounds"
        self.step_number += 1
        observation = np.append(np.asarray(action, float).ravel(), self.step_number)
        return observation, 1.0, False, self.step_number == 7, {}


class StepNumber(gym.Env):
    """Counts the steps of its episode."""

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.step_number = 0
        return self.observation(), {}


class Nested(StepNumber):
    """Observes a dict: {"b": (t, t + 1), "a": t modulo 3 as a category} in step t of 5."""

    observation_space = spaces.Dict({"b": spaces.Box(-np.inf, np.inf, (2,), np.float64), "a": spaces.Discrete(3)})
    action_space = spaces.Discrete(2)

    def step(self, action):
        self.step_number += 1
        return self.observation(), 0.0, self.step_number == 5, False, {}

    def observation(self):
        t = self.step_number
        return {"b": np.array([t, t + 1], float), "a": t % 3}


class Picture(StepNumber):
    """Observes a 40 x 48 image, channels last, whose pixel (row, column, channel) is row + 2 column + 50 channel + t
    modulo 256 in step t of 6."""

    observation_space = spaces.Box(0, 255, (40, 48, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def step(self, action):
        self.step_number += 1
        return self.observation(), float(action == 1), False, self.step_number == 6, {}

    def observation(self):
        row, column, channel = np.indices((40, 48, 3))
        return ((row + 2 * column + 50 * channel + self.step_number) % 256).astype(np.uint8)


class Slow(Counter):
    """A Counter whose step takes `seconds` longer. Awake: a core that slept is slower in all that comes next."""

    seconds = 0.02  # of which a quarter is more than the rest of a step differs by on a busy machine

    def step(self, action):
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return super().step(action)


class Bandit(gym.Env):
    """One step an episode. The best action is `best` where the observation is 1, its mirror image within the bounds
    where it is -1; each dimension that is off by its whole range costs 1."""

    low, high, best = np.array([-0.5, 2.0], np.float32), np.array([1.0, 10.0], np.float32), np.array([0.7, 4.0])
    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(low, high)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.sign = self.np_random.choice([-1, 1])
        return np.array([self.sign], np.float32), {}

    def step(self, action):
        best = self.best if self.sign == 1 else self.low + self.high - self.best
        cost = np.sum(((action - best) / (self.high - self.low)) ** 2)
        return np.array([self.sign], np.float32), -float(cost), True, False, {}


for environment in (Bandit, Counter, Echo, Nested, Picture, Slow):
    gym.register(f"{environment.__name__}-v0", environment, disable_env_checker=True)


class Signal(gym.Env):
    """A corridor of `delay` steps behind a signal that only the first observation holds: (signal, 0), then (0, 1 in the
    last step). The reward of the last action is 1 where it repeats the signal, and -1 where not; no memory earns 0."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, delay: int = 4):
        self.delay = delay

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.signal, self.steps = int(self.np_random.integers(2)), 0
        return np.array([2 * self.signal - 1, 0], np.float32), {}

    def step(self, action):
        self.steps += 1
        is_over = self.steps > self.delay
        reward = float(2 * (action == self.signal) - 1) if is_over else 0.0
        return np.array([0, self.steps == self.delay], np.float32), reward, is_over, False, {}


gym.register("Signal-v0", Signal, disable_env_checker=True)
