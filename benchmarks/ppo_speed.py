"""Steps per second of ppo_torch.py beside Stable-Baselines3's PPO: same environment, sizes and machine.

    python benchmarks/ppo_speed.py                       writes results/ppo_speed.csv and prints the table
    python benchmarks/ppo_speed.py --repeats 1           a quick look

Every measurement is a fresh process, the contestants take turns, and each ratio compares two neighbours in time. Ours
is the whole run after compilation, as its own record has it: iterations (recording and timing included), probes and
checkpoints. SB3's is the wall clock of `learn` after a warm-up, without any recording, at one thread (its fastest).
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("sb3", "ppo_torch", "ppo_torch --compile")


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # runs of each contestant
    total_timesteps: int = 500_000  # steps of a run
    output: Path = ROOT / "results" / "ppo_speed.csv"  # one row a run
    only: str | None = None  # measure this contestant once, in this process, and print its steps per second


def measure_sb3(total_timesteps: int) -> float:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    settings = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
    envs = make_vec_env("CartPole-v1", n_envs=4, seed=1)
    model = PPO("MlpPolicy", envs, clip_range=0.2, clip_range_vf=0.2, seed=1, device="cpu", **settings)
    model.learn(5_000)
    start = time.perf_counter()
    model.learn(total_timesteps)
    return total_timesteps / (time.perf_counter() - start)


def measure_ours(total_timesteps: int, compile: bool) -> float:
    sys.path.insert(0, str(ROOT))
    from ppo_torch import Config, train

    with tempfile.TemporaryDirectory() as folder:
        train(Config(total_timesteps=total_timesteps, compile=compile, eval_episodes=0, run_dir=f"{folder}/run"))
        (record,) = Path(folder).glob("run/wandb/offline-run-*/run-*.wandb")
        command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", record]
        lines = []
        while not any('"type":"exit"' in line for line in lines):  # W&B may still be writing
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    seconds, iterations = 0.0, 0
    for row in (json.loads(line)["history"]["item"] for line in lines if '"type":"history"' in line):
        if "charts/iteration" in row:
            seconds += row["times/iteration"] * (row["charts/iteration"] - iterations)
            iterations = row["charts/iteration"]
        seconds += row.get("times/checkpoint", 0) + row.get("times/probe", 0)
    return iterations * 512 / seconds


def main(config: Config) -> None:
    if config.only == "sb3":
        print(measure_sb3(config.total_timesteps))
        return
    if config.only:
        print(measure_ours(config.total_timesteps, compile="--compile" in config.only))
        return
    rows = []
    for repeat in range(config.repeats):
        for contestant in CONTESTANTS:
            command = [sys.executable, __file__, "--only", contestant, "--total-timesteps", str(config.total_timesteps)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append((repeat, contestant, round(float(output.split()[-1]))))
            print(*rows[-1], file=sys.stderr)
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "stable-baselines3", "gymnasium", "numpy"))
    command = f"python benchmarks/ppo_speed.py --repeats {config.repeats} --total-timesteps {config.total_timesteps}"
    with open(config.output, "w", newline="") as file:
        print(f"# {command}; {versions}; {platform.machine()}, {os.cpu_count()} cores", file=file)
        csv.writer(file).writerows([("repeat", "contestant", "steps_per_second"), *rows])
    print(markdown_table(rows))


def markdown_table(rows: list[tuple[int, str, int]]) -> str:
    """Medians over the repeats, of steps per second and of the ratio to SB3 in the same repeat."""
    speed = {(repeat, contestant): steps_per_second for repeat, contestant, steps_per_second in rows}
    lines = ["| contestant | steps/s, median (min to max) | ratio to SB3, median (min to max) |", "|---|---|---|"]
    for contestant in CONTESTANTS:
        speeds = [value for (_, name), value in speed.items() if name == contestant]
        ratios = [value / speed[repeat, "sb3"] for (repeat, name), value in speed.items() if name == contestant]
        cells = [f"{statistics.median(speeds):,.0f} ({min(speeds):,} to {max(speeds):,})"]
        cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
