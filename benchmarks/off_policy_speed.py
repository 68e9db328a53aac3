"""Seconds per 1000 environment steps of td3_jax.py, sac_jax.py and mpo_jax.py beside TD3 and SAC of SBX and of
Stable-Baselines3, on HalfCheetah-v5: one update a step, networks of 256 x 256, 256 transitions a minibatch. Neither
has MPO (20 samples of an action here), whose ratios are to their SAC.

    python benchmarks/off_policy_speed.py                writes results/off_policy_speed.csv and prints the table
    python benchmarks/off_policy_speed.py --repeats 1    a quick look

Every measurement is a fresh process, the contestants take turns, and each ratio compares runs of the same turn. Ours
is the whole run after compilation, with recording and timing at their defaults, as its own record has it: iterations
and checkpoints. SB3's and SBX's is the wall clock of `learn` after a warm-up, without any recording, SB3 with
`--sb3-threads` threads of torch: try 1 and all, and take the faster.
"""

import csv
import importlib
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
sys.path.insert(0, str(ROOT))
from benchmarks.ppo_speed import recorded_rows  # noqa: E402

CONTESTANTS = ("sb3 td3", "sbx td3", "ours td3", "sb3 sac", "sbx sac", "ours sac", "ours mpo")
PACKAGES = {"sb3": "stable_baselines3", "sbx": "sbx"}
VERSIONS = ("stable-baselines3", "sbx-rl", "torch", "jax", "gymnasium", "mujoco", "numpy")
LEARNING_STARTS = 1000


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # runs of each contestant
    steps: int = 10_000  # with an update each, of a measurement
    sb3_threads: int = 2  # torch's
    output: Path = ROOT / "results" / "off_policy_speed.csv"  # one row a run
    only: str | None = None  # measure this contestant ("sbx td3") once, in this process, and print its seconds


def measure_peer(package: str, algorithm: str, config: Config) -> float:
    import gymnasium as gym
    import torch

    torch.set_num_threads(config.sb3_threads)
    settings = {"learning_starts": LEARNING_STARTS, "batch_size": 256, "train_freq": 1, "gradient_steps": 1, "seed": 1}
    settings |= {"buffer_size": 100_000, "policy_kwargs": {"net_arch": [256, 256]}}
    settings |= {"device": "cpu"} if package == "sb3" else {}
    peer = getattr(importlib.import_module(PACKAGES[package]), algorithm.upper())
    model = peer("MlpPolicy", gym.make("HalfCheetah-v5"), **settings)
    model.learn(LEARNING_STARTS + 500)
    start = time.perf_counter()
    model.learn(config.steps, reset_num_timesteps=False)
    return (time.perf_counter() - start) / config.steps * 1000


def measure_ours(algorithm: str, steps: int, **flags) -> float:
    module = importlib.import_module(f"{algorithm}_jax")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"learning_starts": LEARNING_STARTS, "total_timesteps": LEARNING_STARTS + steps}
        module.train(module.Config(**settings, **flags, eval_episodes=0, run_dir=f"{folder}/run"))
        rows = recorded_rows(Path(folder) / "run")
    learning = [row for row in rows if row["global_step"] > LEARNING_STARTS]
    seconds = sum(row.get(f"times/{phase}", 0) for row in learning for phase in ("iteration", "checkpoint"))
    return seconds / steps * 1000


def main(config: Config) -> None:
    if config.only:
        package, algorithm = config.only.split()
        print(measure_ours(algorithm, config.steps) if package == "ours" else measure_peer(package, algorithm, config))
        return
    rows = []
    for repeat in range(config.repeats):
        for contestant in CONTESTANTS:
            flags = ["--steps", str(config.steps), "--sb3-threads", str(config.sb3_threads)]
            command = [sys.executable, __file__, "--only", contestant, *flags]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            package, algorithm = contestant.split()
            rows.append((repeat, algorithm, package, round(float(output.split()[-1]), 3)))
            print(*rows[-1], file=sys.stderr)
    versions = " ".join(f"{name} {version(name)}" for name in VERSIONS)
    command = f"python benchmarks/off_policy_speed.py --repeats {config.repeats} --steps {config.steps}"
    with open(config.output, "w", newline="") as file:
        print(f"# {command}; {versions}; {platform.machine()}, {os.cpu_count()} cores", file=file)
        csv.writer(file).writerows([("repeat", "algorithm", "contestant", "seconds_per_1000_steps"), *rows])
    print(markdown_table(rows))


def markdown_table(rows: list[tuple[int, str, str, float]]) -> str:
    """Mean ± std of the seconds; medians of the ratios to the peers in the same repeat, which for MPO are SAC."""
    seconds = {(algorithm, contestant, repeat): value for repeat, algorithm, contestant, value in rows}
    header = ["algorithm", "contestant", "s / 1000 steps, mean ± std", "of SBX's", "of SB3's"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    names = {"ours": "`{}_jax.py`", "sbx": "SBX (JAX)", "sb3": "SB3 (PyTorch)"}
    for algorithm, contestant in dict.fromkeys((a, c) for a, c, _ in seconds):
        repeats = [repeat for a, c, repeat in seconds if (a, c) == (algorithm, contestant)]
        values = [seconds[algorithm, contestant, repeat] for repeat in repeats]
        cells = [algorithm.upper(), names[contestant].format(algorithm)]
        cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}")
        for peer in ("sbx", "sb3"):
            reference = "sac" if algorithm == "mpo" else algorithm
            ratios = [seconds[algorithm, contestant, repeat] / seconds[reference, peer, repeat] for repeat in repeats]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
