"""The learning results of the README: its commands, run over seeds, and the table made of their records.

python benchmarks/learning.py                        prints the table from results/learning_*.csv
python benchmarks/learning.py --run cartpole         trains every seed of a row into runs/learning/cartpole and
                                                     records it in results/learning_cartpole.csv
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402


class Row(NamedTuple):
    flags: str
    seeds: int
    published: str


ROWS = {
    "cartpole": Row("--env-id CartPole-v1", 5, "490.0 ± 6.1 at 500k [1]"),
    "lunarlander": Row(
        "--env-id LunarLander-v3 --num-envs 16 --num-steps 512 --num-minibatches 64 --gamma 0.999 --gae-lambda 0.98 "
        "--learning-rate 1e-3 --no-clip-vloss --total-timesteps 1500000",
        5,
        "242 ± 32 at 1M [2]",
    ),
    "pendulum": Row(
        "--env-id Pendulum-v1 --num-steps 512 --num-minibatches 32 --update-epochs 10 --gamma 0.9 "
        "--learning-rate 1e-3 --ent-coef 0 --no-clip-vloss --total-timesteps 300000 --eval-episodes 100",
        5,
        "-172 ± 104 at 100k [2]",
    ),
    "halfcheetah": Row(
        "--env-id HalfCheetah-v5 --num-envs 8 --num-steps 256 --num-minibatches 32 --update-epochs 10 "
        "--learning-rate 3e-4 --ent-coef 0 --norm-obs --norm-reward --total-timesteps 1000000",
        3,
        "1443 ± 46 at 1M [1]",
    ),
    "pong": Row(
        "--env-id ALE/Pong-v5 --num-envs 8 --clip-coef 0.1 --num-threads 1 --eval-interval 500000 "
        "--total-timesteps 2000000",
        1,
        "20.4 ± 0.2 at 10M frames [1]",
    ),
}


@dataclass(frozen=True)
class Config:
    run: tuple[str, ...] = ()  # rows to train and record; none: print the table of what is recorded
    jobs: int = 1  # runs at a time; not more than cores, or steps/s suffer


def train(name: str, jobs: int) -> None:
    folder, waiting, running = ROOT / "runs" / "learning" / name, list(range(1, ROWS[name].seeds + 1)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            seed = str(waiting.pop(0))
            command = [sys.executable, "ppo_torch.py", *ROWS[name].flags.split(), "--seed", seed]
            running.append(subprocess.Popen([*command, "--run-dir", folder / f"seed_{seed}"], cwd=ROOT))
        process = running.pop(0)
        if process.wait():
            raise SystemExit(f"{' '.join(map(str, process.args))} failed")
    arguments = [folder, "--save", f"results/learning_{name}.csv", "--prefix", name, "--output", "images"]
    subprocess.run([sys.executable, "compare.py", *arguments], cwd=ROOT, check=True)


def table() -> str:
    header = [
        "command: `python ppo_torch.py` …",
        "seeds",
        "training",
        "evaluation",
        "worst seed",
        "steps/s",
        "published",
    ]
    lines = []
    for name, row in ROWS.items():
        path = ROOT / "results" / f"learning_{name}.csv"
        if not path.exists():
            continue
        runs = compare.read_csv(path)
        worst = min(run.summary["evaluation_return"] for run in runs)
        speeds = sorted(run.summary["steps_per_second"] for run in runs)
        estimates = [compare.estimate(runs, key) for key in ("return_last_100", "evaluation_return")]
        cells = [f"`{row.flags}`", str(len(runs)), *estimates, compare.number(worst)]
        lines.append([*cells, f"{speeds[len(speeds) // 2]:,.0f}", row.published])
    return compare.markdown(header, lines)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    for name in config.run:
        train(name, config.jobs)
    if not config.run:
        print(table())
