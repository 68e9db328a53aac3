"""Steps per second of the PPO scripts beside PPO of Stable-Baselines3 and of SBX: same environment, sizes and machine.

    python benchmarks/ppo_speed.py                       writes results/ppo_speed.csv and prints the table
    python benchmarks/ppo_speed.py --repeats 1           a quick look

Every measurement is a fresh process, the contestants take turns, and each ratio compares runs of the same turn. Ours
is the whole run after compilation, as its own record has it: iterations (recording and timing included), probes and
checkpoints. SB3's and SBX's is the wall clock of `learn` after a warm-up, without any recording, torch at one thread
(its fastest).
"""

import csv
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("sb3", "sbx", "ppo_torch", "ppo_torch --compile", "ppo_jax", "ppo_mlx")
PEERS = {"sb3": "stable_baselines3", "sbx": "sbx"}
TITLES = {"sb3": "SB3", "sbx": "SBX"}
VERSIONS = ("stable-baselines3", "sbx-rl", "torch", "jax", "mlx", "gymnasium", "numpy")


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # runs of each contestant
    total_timesteps: int = 500_000  # steps of a run
    output: Path = ROOT / "results" / "ppo_speed.csv"  # one row a run
    only: str | None = None  # measure this contestant once, in this process, and print its steps per second


def measure_peer(package: str, total_timesteps: int) -> float:
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    settings = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
    if package == "stable_baselines3":
        settings |= {"clip_range_vf": 0.2, "device": "cpu"}  # SBX has no value clipping
    envs = make_vec_env("CartPole-v1", n_envs=4, seed=1)
    model = importlib.import_module(package).PPO("MlpPolicy", envs, clip_range=0.2, seed=1, **settings)
    model.learn(5_000)
    start = time.perf_counter()
    model.learn(total_timesteps)
    return total_timesteps / (time.perf_counter() - start)


def measure_ours(contestant: str, total_timesteps: int) -> float:
    script, *flags = contestant.split()
    return recorded_speed(script, total_timesteps=total_timesteps, **{flag.removeprefix("--"): True for flag in flags})


def recorded_speed(script: str, **settings: object) -> float:
    """Steps per second of a whole run (of many seeds: of one) after compilation, evaluation aside"""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        config = module.Config(**settings, eval_episodes=0, run_dir=f"{folder}/run")
        module.train(config)
        first_of_many_seeds = Path(folder) / "run" / "seed_0"
        rows = recorded_rows(first_of_many_seeds if first_of_many_seeds.exists() else first_of_many_seeds.parent)
    seconds, iterations = 0.0, 0
    for row in rows:
        if "charts/iteration" in row:
            seconds += row["times/iteration"] * (row["charts/iteration"] - iterations)
            iterations = row["charts/iteration"]
        seconds += row.get("times/checkpoint", 0) + row.get("times/probe", 0)
    return iterations * config.iteration_steps / seconds


def recorded_rows(run_dir: Path) -> list[dict]:
    """What a run gave W&B, read once its record has an end"""
    (record,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", record]
    lines = []
    while not any('"type":"exit"' in line for line in lines):  # W&B may still be writing
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line)["history"]["item"] for line in lines if '"type":"history"' in line]


def main(config: Config) -> None:
    if config.only:
        peer = PEERS.get(config.only)
        measure = partial(measure_peer, peer) if peer else partial(measure_ours, config.only)
        print(measure(config.total_timesteps))
        return
    print(markdown_table(in_turns(config, __file__, CONTESTANTS, VERSIONS), TITLES))


def in_turns(
    config: Config, benchmark: str, contestants: tuple[str, ...], packages: tuple[str, ...]
) -> list[tuple[int, str, int]]:
    """(repeat, contestant, steps per second) of fresh processes of this benchmark's file, recorded with its command"""
    rows = []
    for repeat in range(config.repeats):
        for contestant in contestants:
            command = [
                sys.executable,
                benchmark,
                "--only",
                contestant,
                "--total-timesteps",
                str(config.total_timesteps),
            ]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append((repeat, contestant, round(float(output.split()[-1]))))
            print(*rows[-1], file=sys.stderr)
    versions = " ".join(f"{name} {version(name)}" for name in packages)
    command = f"python {Path(benchmark).resolve().relative_to(ROOT)} --repeats {config.repeats}"
    command += f" --total-timesteps {config.total_timesteps}"
    with open(config.output, "w", newline="") as file:
        print(f"# {command}; {versions}; {platform.machine()}, {os.cpu_count()} cores", file=file)
        csv.writer(file).writerows([("repeat", "contestant", "steps_per_second"), *rows])
    return rows


def markdown_table(rows: list[tuple[int, str, int]], peers: dict[str, str]) -> str:
    """Medians over the repeats, of steps per second and of the ratios to the peers in the same repeat."""
    speed = {(repeat, contestant): steps_per_second for repeat, contestant, steps_per_second in rows}
    titles = ["contestant", "steps/s, median (min to max)", *(f"ratio to {title}" for title in peers.values())]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for contestant in dict.fromkeys(name for _, name, _ in rows):
        speeds = [value for (_, name), value in speed.items() if name == contestant]
        cells = [f"{statistics.median(speeds):,.0f} ({min(speeds):,} to {max(speeds):,})"]
        for peer in peers:
            ratios = [value / speed[repeat, peer] for (repeat, name), value in speed.items() if name == contestant]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
