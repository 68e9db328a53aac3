"""What it costs to record a run and to time its phases: whole runs with both at their defaults, and with neither.

    python benchmarks/recording.py    writes results/recording.csv and prints the table

(A quick look: `--repeats 1 --output quick.csv`.)

Each script is a process of its own, in which runs of either kind take turns after one of each that does not count; the
one that begins a turn ends the next. Each cost compares the two runs of a turn. Seconds are those of the loop after
compilation, without evaluation, checkpoints and model. A run with neither has `--timing-interval 0`, and only drops
what would be recorded. Off-policy an iteration has 100 steps here, for one in twenty to be timed in a short run; by
default it has 1000, which are recorded for the price of 100.
"""

import contextlib
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from compare import markdown  # noqa: E402

CARTPOLE = {"env_id": "CartPole-v1"}
HALFCHEETAH = {"env_id": "HalfCheetah-v5", "learning_starts": 1000, "total_timesteps": 3000, "log_interval": 100}
SCRIPTS = {
    "ppo_torch": CARTPOLE | {"total_timesteps": 50_000},
    "ppo_jax": CARTPOLE | {"total_timesteps": 100_000},
    "ppo_mlx": CARTPOLE | {"total_timesteps": 30_000},
    "ppo_lstm_jax": CARTPOLE | {"total_timesteps": 50_000},
    "td3_jax": HALFCHEETAH,
    "sac_jax": HALFCHEETAH,
    "mpo_jax": HALFCHEETAH,
    "vpg_torch": CARTPOLE | {"total_timesteps": 50_000},
}


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # turns
    output: Path = ROOT / "results" / "recording.csv"  # one row a turn
    only: str | None = None  # measure this script in this process, and print the seconds of each turn


@contextlib.contextmanager
def clocked(module: ModuleType, is_recorded: bool) -> Iterator[list[float]]:
    """-> seconds of the loops that run meanwhile"""
    seconds = []

    class Clocked(module.Run):
        def iterations(self) -> Iterator[int]:
            start = time.perf_counter()
            yield from super().iterations()
            seconds.append(time.perf_counter() - start)

        def record(self, *arguments) -> None:
            if is_recorded:
                super().record(*arguments)
            else:
                self.envs.pop_episodes()
                self.stopwatch.lap()

    with mock.patch.object(module, "Run", Clocked):
        yield seconds


def loop_seconds(script: str, is_recorded: bool) -> float:
    module = importlib.import_module(script)
    bare = {} if is_recorded else {"wandb_mode": "disabled", "timing_interval": 0}
    with tempfile.TemporaryDirectory() as folder, clocked(module, is_recorded) as seconds:
        without = {"eval_episodes": 0, "checkpoint_interval": 0, "save_model": False, "run_dir": f"{folder}/run"}
        module.train(module.Config(**SCRIPTS[script] | bare | without | {"device": "cpu"}))
    return seconds[0]


def markdown_table(rows: list[tuple[int, str, float, float]]) -> str:
    """Medians over the turns, of the seconds of a loop and of what recording and timing add to the bare ones"""
    lines = []
    for script, flags in SCRIPTS.items():
        turns = [seconds for _, name, *seconds in rows if name == script]
        neither, both = (statistics.median(x) for x in zip(*turns, strict=True))
        costs = files.median_and_range([100 * (recorded / bare - 1) for bare, recorded in turns], ".1f")
        lines.append([f"`{script}`", flags["env_id"], f"{neither:.2f}", f"{both:.2f}", costs])
    return markdown(["script", "environment", "s, neither", "s, both", "cost of both, %"], lines)


def read(path: Path) -> list[tuple[int, str, float, float]]:
    return [(int(repeat), script, float(bare), float(both)) for repeat, script, bare, both in files.load(path)]


def main(config: Config) -> None:
    if config.only:
        for turn in range(config.repeats + 1):
            order = (False, True) if turn % 2 else (True, False)
            seconds = {is_recorded: round(loop_seconds(config.only, is_recorded), 4) for is_recorded in order}
            if turn:
                print("seconds", seconds[False], seconds[True])
        return
    rows = []
    for script in SCRIPTS:
        output = files.in_own_process(__file__, "--only", script, "--repeats", config.repeats)
        turns = [line.split()[1:] for line in output.splitlines() if line.startswith("seconds")]
        rows += [(repeat, script, *map(float, turn)) for repeat, turn in enumerate(turns)]
        print(*rows[-config.repeats :], sep="\n", file=sys.stderr)
    command = f"python benchmarks/recording.py --repeats {config.repeats}"
    packages = "torch", "jax", "mlx", "wandb", "gymnasium", "numpy"
    files.save(config.output, command, packages, ("repeat", "script", "neither", "both"), rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
