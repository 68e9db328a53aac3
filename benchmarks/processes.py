"""Steps per second of the PyTorch scripts in one process and, started by torchrun, in two.

    python benchmarks/processes.py    writes results/processes.csv and prints the table

(A quick look: `--repeats 1 --output quick.csv`.)

Each process has its own environments, so two collect twice the batch of one between two updates. The contestants take
turns, and each ratio compares runs of the same turn. Steps per second are those of the run's own record after the
first row: everything but compilation, evaluations, checkpoints and probes.
"""

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from benchmarks.records import config_and_rows  # noqa: E402
from compare import markdown  # noqa: E402

SCRIPTS = ("vpg_torch.py", "ppo_torch.py")
ENVIRONMENTS = ("CartPole-v1", "HalfCheetah-v5")


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # runs of each contestant
    total_timesteps: int = 100_000  # steps of one process; two take twice as many together
    output: Path = ROOT / "results" / "processes.csv"  # one row a run


def measure(script: str, env_id: str, processes: int, total_timesteps: int) -> float:
    flags = ["--env-id", env_id, "--total-timesteps", total_timesteps * processes, "--eval-episodes", 0]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, script, *flags, "--vectorization", "sync", "--run-dir", f"{folder}/run"]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
        rows = [row for row in config_and_rows(Path(folder) / "run")[1] if "charts/SPS" in row]
    steps = [row["global_step"] for row in rows]
    seconds = [(end - start) / row["charts/SPS"] for start, end, row in zip(steps, steps[1:], rows[1:], strict=False)]
    return (steps[-1] - steps[0]) / sum(seconds)


def markdown_table(rows: list[tuple[int, str, str, int, int]]) -> str:
    """Medians over the repeats, of steps per second and of the ratios in the same repeat"""
    speed = {(repeat, *contestant): value for repeat, *contestant, value in rows}
    lines = []
    for script, env_id in dict.fromkeys((script, env_id) for _, script, env_id, _, _ in rows):
        repeats = sorted({repeat for repeat, *contestant in speed if contestant[:2] == [script, env_id]})
        one, two = ([speed[repeat, script, env_id, number] for repeat in repeats] for number in (1, 2))
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        medians = (f"{statistics.median(x):,.0f}" for x in (one, two))
        lines.append([f"`{script}`", env_id, *medians, files.median_and_range(ratios, ".2f")])
    return markdown(["script", "environment", "steps/s, 1 process", "2 processes", "ratio"], lines)


def read(path: Path) -> list[tuple[int, str, str, int, int]]:
    rows = files.load(path)
    return [(int(repeat), *names, int(processes), int(speed)) for repeat, *names, processes, speed in rows]


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    rows = []
    for repeat in range(config.repeats):
        for script in SCRIPTS:
            for env_id in ENVIRONMENTS:
                for processes in (1, 2):
                    speed = measure(script, env_id, processes, config.total_timesteps)
                    rows.append((repeat, script, env_id, processes, round(speed)))
                    print(*rows[-1], file=sys.stderr)
    command = f"python benchmarks/processes.py --repeats {config.repeats} --total-timesteps {config.total_timesteps}"
    header = "repeat", "script", "environment", "processes", "steps_per_second"
    files.save(config.output, command, ("torch", "gymnasium", "numpy"), header, rows)
    print(markdown_table(rows))
