"""Steps per second of the scripts beside their peers from PyPI: same environment, sizes and machine.

    python benchmarks/speed.py                      writes results/speed_<suite>.csv and prints the tables
    python benchmarks/speed.py --suites ppo sac     some suites only
    python benchmarks/speed.py --quick              a look at all of them in a few minutes; nothing is written

Every measurement is a fresh process on the CPU, the contestants of a suite take turns (each turn begins with the next
of them), and each ratio compares runs of the same turn. Ours is the whole run after compilation, with recording and
timing at their defaults, as its own record has it: iterations, probes and checkpoints. (An off-policy iteration is a
twentieth of the run here, and ppo_jax.py takes twenty times the steps on gymnax, for some to be timed phase by phase as
by default.) A peer's is the wall clock of `learn` after a warm-up, without any recording, with one thread of torch's or
one for each core, whichever is faster in a short trial. The environments alone are those of the suite on the host, with
random actions.
"""

import importlib
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from benchmarks.records import config_and_rows  # noqa: E402
from compare import markdown  # noqa: E402

PEERS = ("stable-baselines3", "sb3-contrib", "sbx-rl")
VERSIONS = (*PEERS, "torch", "jax", "mlx", "gymnax", "gymnasium", "mujoco", "numpy")
LEARNING_STARTS = 1000  # of the off-policy algorithms, which are measured from there on


def measure_peer(
    algorithm: str, env_id: str, num_envs: int, steps: int, policy: str = "MlpPolicy", **settings
) -> float:
    """Of an algorithm such as sbx.PPO"""
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    package, name = algorithm.split(".")
    model_class = getattr(importlib.import_module(package), name)
    model = model_class(policy, make_vec_env(env_id, num_envs, seed=1), seed=1, device="cpu", **settings)
    few = 2000 if num_envs > 1 else 200

    def learn(steps: int) -> float:
        start, first_step = time.perf_counter(), model.num_timesteps
        model.learn(steps, reset_num_timesteps=False)
        return (model.num_timesteps - first_step) / (time.perf_counter() - start)  # whole rollouts

    def trial(threads: int) -> float:
        torch.set_num_threads(threads)
        return learn(few)

    learn(few if num_envs > 1 else LEARNING_STARTS + few)
    torch.set_num_threads(max({1, os.cpu_count()}, key=trial))
    return learn(steps)


def measure_environments(env_id: str, num_envs: int, steps: int) -> float:
    from ppo_torch import Config, make_vector

    vector = make_vector(Config(env_id=env_id, vectorization="sync"), num_envs, is_evaluation=False)
    vector.reset(seed=1)
    warm_up, *actions = (vector.action_space.sample() for _ in range(max(steps, 30_000) // num_envs))
    vector.step(warm_up)
    start = time.perf_counter()
    for action in actions:
        vector.step(action)
    return len(actions) * num_envs / (time.perf_counter() - start)


def measure_ours(script: str, steps: int, **flags) -> float:
    """Steps per second of a whole run (of many seeds: of one) after compilation, evaluation aside"""
    module = importlib.import_module(script)
    learning_starts = getattr(module.Config, "learning_starts", 0) and LEARNING_STARTS
    if learning_starts:
        flags |= {"learning_starts": learning_starts, "log_interval": steps // 20}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        steps += learning_starts
        flags |= {"device": "cpu", "eval_episodes": 0, "run_dir": str(run_dir)}
        module.train(module.Config(total_timesteps=steps, **flags))
        _, rows = config_and_rows(run_dir / "seed_0" if (run_dir / "seed_0").exists() else run_dir)
    step = iteration = counted_steps = 0
    seconds = 0.0
    for row in rows:
        is_counted = step >= learning_starts
        if "charts/iteration" in row:
            iterations, iteration = row["charts/iteration"] - iteration, row["charts/iteration"]
            new_steps, step = row["global_step"] - step, row["global_step"]
            if is_counted:
                seconds += iterations * row["times/iteration"]
                counted_steps += new_steps
        if is_counted:
            seconds += row.get("times/checkpoint", 0) + row.get("times/probe", 0)
    return counted_steps / seconds


class Suite(NamedTuple):
    title: str
    steps: int  # of a measurement
    quick_steps: int
    references: dict[str, Callable[..., float]]  # called with the steps, give steps per second
    ours: dict[str, Callable[..., float]]


ENVIRONMENTS = "the environments alone"
ON_POLICY = {"n_steps": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01, "clip_range": 0.2}
OFF_POLICY = {"learning_starts": LEARNING_STARTS, "train_freq": 1, "gradient_steps": 1, "batch_size": 256}
OFF_POLICY |= {"policy_kwargs": {"net_arch": [256, 256]}}


def ppo() -> Suite:
    task = "CartPole-v1", 4
    peer = partial(measure_peer, env_id=task[0], num_envs=task[1], batch_size=128, **ON_POLICY)
    references = {
        ENVIRONMENTS: partial(measure_environments, *task),
        "SB3": partial(peer, "stable_baselines3.PPO", clip_range_vf=0.2),
        "SBX": partial(peer, "sbx.PPO"),  # has no value clipping
    }
    ours = {
        "`ppo_torch.py`": partial(measure_ours, "ppo_torch"),
        "`ppo_torch.py --compile`": partial(measure_ours, "ppo_torch", compile=True),
        "`ppo_jax.py`": partial(measure_ours, "ppo_jax"),
        "`ppo_mlx.py`": partial(measure_ours, "ppo_mlx"),
        "`ppo_jax.py`, gymnax": lambda steps: measure_ours("ppo_jax", 20 * steps, env_id="gymnax/CartPole-v1"),
    }
    return Suite("PPO on CartPole-v1, 4 environments, 64-64", 100_000, 20_000, references, ours)


def recurrent_ppo() -> Suite:
    task = "CartPole-v1", 8
    settings = ON_POLICY | {"batch_size": 256, "clip_range_vf": 0.2, "policy_kwargs": {"lstm_hidden_size": 64}}
    settings |= {"policy": "MlpLstmPolicy"}
    references = {
        ENVIRONMENTS: partial(measure_environments, *task),
        "sb3-contrib": partial(measure_peer, "sb3_contrib.RecurrentPPO", *task, **settings),
    }
    ours = {
        "`ppo_lstm_jax.py`": partial(measure_ours, "ppo_lstm_jax", num_envs=8),
        # sb3-contrib's gradient goes back to the beginning of the episode or of the rollout
        "`ppo_lstm_jax.py --sequence-length 128`": partial(
            measure_ours, "ppo_lstm_jax", num_envs=8, sequence_length=128
        ),
        "`ppo_lstm_jax.py`, gymnax": partial(measure_ours, "ppo_lstm_jax", num_envs=8, env_id="gymnax/CartPole-v1"),
    }
    return Suite("recurrent PPO on CartPole-v1, 8 environments, LSTMs of 64", 50_000, 10_000, references, ours)


def vpg() -> Suite:  # which no peer has
    task = "CartPole-v1", 4
    references = {ENVIRONMENTS: partial(measure_environments, *task)}
    ours = {"`vpg_torch.py`": partial(measure_ours, "vpg_torch")}
    return Suite("VPG on CartPole-v1, 4 environments, 64-64", 50_000, 10_000, references, ours)


def off_policy(algorithm: str, *scripts: str) -> Suite:
    task = "HalfCheetah-v5", 1
    peer = partial(measure_peer, env_id=task[0], num_envs=task[1], **OFF_POLICY)
    references = {
        ENVIRONMENTS: partial(measure_environments, *task),
        "SB3": partial(peer, f"stable_baselines3.{algorithm}"),
        "SBX": partial(peer, f"sbx.{algorithm}"),
    }
    ours = {f"`{script}.py`": partial(measure_ours, script) for script in scripts}
    names = " and ".join(script.removesuffix("_jax").upper() for script in scripts)
    title = f"{names} on HalfCheetah-v5, an update a step, 256-256, 256 transitions a minibatch"
    return Suite(title, 3000, 500, references, ours)


SUITES = {"ppo": ppo, "recurrent_ppo": recurrent_ppo, "vpg": vpg, "td3": partial(off_policy, "TD3", "td3_jax")}
SUITES |= {"sac": partial(off_policy, "SAC", "sac_jax", "mpo_jax")}  # MPO, which no peer has, beside their SAC


@dataclass(frozen=True)
class Config:
    suites: tuple[Literal["ppo", "recurrent_ppo", "vpg", "td3", "sac"], ...] = tuple(SUITES)  # what to measure
    repeats: int = 5  # turns
    steps: int | None = None  # of a measurement; None: as many as a suite is made for
    quick: bool = False  # one turn of a few steps; nothing is written
    only: tuple[str, str] | None = None  # measure this contestant of this suite once, and print its steps per second


class Row(NamedTuple):
    repeat: int
    contestant: str
    steps_per_second: float


def main(config: Config) -> None:
    if config.only:
        suite = SUITES[config.only[0]]()
        print((suite.references | suite.ours)[config.only[1]](steps=config.steps))
        return
    for name in config.suites:
        suite = SUITES[name]()
        steps = config.steps or (suite.quick_steps if config.quick else suite.steps)
        rows = in_turns(name, suite, 1 if config.quick else config.repeats, steps)
        print(f"{suite.title}\n\n{markdown_table(rows, list(suite.references))}\n")
        if not config.quick:
            flags = f"--suites {name} --repeats {config.repeats} --steps {steps}"
            files.save(recorded(name), f"python benchmarks/speed.py {flags}", VERSIONS, Row._fields, rows)
            print(f"{files.caption(recorded(name))}\n")


def in_turns(name: str, suite: Suite, repeats: int, steps: int) -> list[Row]:
    rows, contestants = [], deque(suite.references | suite.ours)
    for repeat in range(repeats):
        for contestant in contestants:
            output = files.in_own_process(__file__, "--steps", steps, "--only", name, contestant)
            rows.append(Row(repeat, contestant, round(float(output.split()[-1]), 1)))
            print(*rows[-1], file=sys.stderr)
        contestants.rotate(-1)
    return rows


def recorded(name: str) -> Path:
    return ROOT / "results" / f"speed_{name}.csv"


def read(path: Path) -> list[Row]:
    return [Row(int(repeat), contestant, float(speed)) for repeat, contestant, speed in files.load(path)]


def markdown_table(rows: list[Row], references: list[str]) -> str:
    """Over the turns: medians of steps per second and of the ratios to each reference in the same turn; mean seconds"""
    speed = {(row.repeat, row.contestant): row.steps_per_second for row in rows}
    titles = ["", "steps/s, median (min to max)", "s / 1000 steps, mean ± std", *(f"speed / {x}" for x in references)]
    lines = []
    for contestant in dict.fromkeys(row.contestant for row in rows):
        turns = {repeat: value for (repeat, name), value in speed.items() if name == contestant}
        speeds, seconds = list(turns.values()), [1000 / value for value in turns.values()]
        cells = [contestant, files.median_and_range(speeds, ",.0f")]
        cells.append(files.mean_and_std(seconds))
        for reference in references:
            ratios = [value / speed[repeat, reference] for repeat, value in turns.items()]
            style = ".2g" if reference == ENVIRONMENTS else ".2f"
            cells.append("1" if contestant == reference else files.median_and_range(ratios, style))
        lines.append(cells)
    return markdown(titles, lines)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
