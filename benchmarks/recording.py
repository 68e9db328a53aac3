"""What it costs to record a run and to time its phases, as by default, against a run with neither.

    python benchmarks/recording.py    writes results/recording.csv and prints the table

(A quick look: `--turns 3 --output quick.csv`.)

Each script is one run in a process of its own. In one half of its blocks of 20 iterations it records and times as by
default (the last iteration of the block phase by phase), in the other half it does neither; the kind that begins a turn
of two blocks ends the next, and each cost compares the two blocks of a turn, which are seconds apart at most: whole
runs differ by more than the cost, on a machine that is shared. The first turn does not count. Seconds are all that pass
in the loop, probes included; there are no evaluations and checkpoints. Off-policy an iteration has 25 steps here, by
default 1000, which are recorded for about the price of 25.
"""

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
HALFCHEETAH = {"env_id": "HalfCheetah-v5", "learning_starts": 1000, "log_interval": 25}  # the first turn is random
SCRIPTS = dict.fromkeys(("ppo_torch", "ppo_jax", "ppo_mlx", "ppo_lstm_jax"), CARTPOLE)
SCRIPTS |= dict.fromkeys(("td3_jax", "sac_jax", "mpo_jax"), HALFCHEETAH) | {"vpg_torch": CARTPOLE}
BLOCK = 20  # iterations


@dataclass(frozen=True)
class Config:
    turns: int = 20
    output: Path = ROOT / "results" / "recording.csv"  # one row a turn
    only: str | None = None  # measure this script in this process, and print the seconds of each turn


def in_blocks(module: ModuleType, seconds: list[float]) -> type:
    """The script's Run, which records every other block alone and appends the seconds of each"""

    class InBlocks(module.Run):
        is_recorded = False

        def iterations(self) -> Iterator[int]:
            for iteration in super().iterations():
                block, place = divmod(iteration - 1, BLOCK)
                if place == 0:
                    start = time.perf_counter()
                    self.is_recorded = has_both(block)
                yield iteration
                if place == BLOCK - 1:
                    seconds.append(time.perf_counter() - start)

        def is_timed(self, iteration: int) -> bool:
            return self.is_recorded and super().is_timed(iteration)

        def record(self, *arguments) -> None:
            if self.is_recorded:
                super().record(*arguments)
            else:
                self.envs.pop_episodes()
                self.stopwatch.lap()

    return InBlocks


def has_both(block: int) -> bool:
    return block % 4 in (1, 2)


def measure(script: str, turns: int) -> list[tuple[float, float]]:
    """Seconds of a block with neither and of one with both, of each turn"""
    module, seconds = importlib.import_module(script), []
    config = module.Config(**SCRIPTS[script] | {"device": "cpu", "eval_episodes": 0, "save_model": False})
    total_timesteps = (turns + 1) * 2 * BLOCK * config.iteration_steps
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "Run", in_blocks(module, seconds)):
        of_run = {"total_timesteps": total_timesteps, "checkpoint_interval": 0, "run_dir": f"{folder}/run"}
        module.train(module.Config(**vars(config) | of_run))
    return in_turns(seconds)


def in_turns(seconds: list[float]) -> list[tuple[float, float]]:
    """Of each block -> of the block with neither and of that with both, of each turn but the first"""
    turns = (sorted((block, block + 1), key=has_both) for block in range(2, len(seconds), 2))
    return [(seconds[neither], seconds[both]) for neither, both in turns]


def markdown_table(rows: list[tuple[int, str, float, float]]) -> str:
    """Medians over the turns: milliseconds of an iteration with neither, and what both add to it in the same turn"""
    lines = []
    for script, flags in SCRIPTS.items():
        turns = [seconds for _, name, *seconds in rows if name == script]
        iteration = statistics.median(1000 * neither / BLOCK for neither, _ in turns)
        costs = [100 * (both / neither - 1) for neither, both in turns]
        low, median, high = statistics.quantiles(costs, n=4, method="inclusive")
        lines.append([f"`{script}`", flags["env_id"], f"{iteration:.1f}", f"{median:.1f} ({low:.1f} to {high:.1f})"])
    return markdown(["script", "environment", "ms an iteration", "cost of both, %, median (quartiles)"], lines)


def read(path: Path) -> list[tuple[int, str, float, float]]:
    return [(int(turn), script, float(neither), float(both)) for turn, script, neither, both in files.load(path)]


def main(config: Config) -> None:
    if config.only:
        for neither, both in measure(config.only, config.turns):
            print("seconds", round(neither, 4), round(both, 4))
        return
    rows = []
    for script in SCRIPTS:
        output = files.in_own_process(__file__, "--only", script, "--turns", config.turns)
        turns = [line.split()[1:] for line in output.splitlines() if line.startswith("seconds")]
        rows += [(turn, script, *map(float, seconds)) for turn, seconds in enumerate(turns)]
        print(script, *rows[-1][2:], file=sys.stderr)
    packages = "torch", "jax", "mlx", "wandb", "gymnasium", "numpy"
    command = f"python benchmarks/recording.py --turns {config.turns}"
    files.save(config.output, command, packages, ("turn", "script", "neither", "both"), rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
