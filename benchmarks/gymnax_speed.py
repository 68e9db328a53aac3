"""Steps per second of ppo_jax.py with gymnax's CartPole on the device, beside PPO of Stable-Baselines3 with four
environments of Gymnasium's: 4 to 4096 environments, one device and two, one seed and eight.

    python benchmarks/gymnax_speed.py           writes results/gymnax_speed.csv, images/gymnax_speed.png; prints a table
    python benchmarks/gymnax_speed.py --draw    table and figure again

(A quick look: `--repeats 1 --output quick.csv --figure quick.png`.)

Every measurement is a fresh process, the contestants take turns (each turn begins with the next of them), and each
ratio compares runs of the same turn. Ours is the whole run after compilation, with recording and timing at their
defaults, as its own record has it; with 1024 environments and more it is too short for a call to be timed phase by
phase. Two devices are XLA's host devices, which share the machine's cores. Memory is the largest resident set of the
training process; W&B's server, a process beside ours, is not in it.
"""

import resource
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from benchmarks.speed import SUITES, measure_ours  # noqa: E402
from compare import markdown  # noqa: E402

SB3_STEPS = 100_000
VERSIONS = ("stable-baselines3", "torch", "jax", "gymnax", "gymnasium", "numpy")


class Contestant(NamedTuple):
    num_envs: int
    devices: int
    num_seeds: int
    steps: int  # of a seed; 0: SB3


CONTESTANTS = (
    Contestant(4, 1, 1, 0),
    *(Contestant(num_envs, 1, 1, 2_097_152) for num_envs in (4, 16, 64, 256, 1024)),
    Contestant(4096, 1, 1, 4_194_304),
    *(Contestant(num_envs, 2, 1, 2_097_152) for num_envs in (64, 1024)),
    *(Contestant(64, devices, 8, 524_288) for devices in (1, 2)),
)


class Row(NamedTuple):
    repeat: int
    num_envs: int
    devices: int
    num_seeds: int
    is_ours: bool
    steps_per_second: int
    mebibytes: int


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # runs of each contestant
    output: Path = ROOT / "results" / "gymnax_speed.csv"  # one row a run
    figure: Path = ROOT / "images" / "gymnax_speed.png"
    draw: bool = False  # no measurement
    only: int | None = None  # measure this contestant once, in this process, and print its steps per second and memory


def measure(contestant: Contestant) -> float:
    if not contestant.steps:
        return SUITES["ppo"]().references["SB3"](steps=SB3_STEPS)
    flags = {"num_envs": contestant.num_envs, "num_seeds": contestant.num_seeds, "steps": contestant.steps}
    return contestant.num_seeds * measure_ours("ppo_jax", env_id="gymnax/CartPole-v1", **flags)


def main(config: Config) -> None:
    if config.only is not None:
        speed = measure(CONTESTANTS[config.only])
        unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss in a mebibyte
        print(speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        return
    if not config.draw:
        record(config)
    rows = recorded(config.output)
    draw(rows, config.figure)
    print(markdown_table(rows))


def record(config: Config) -> None:
    rows, contestants = [], deque(enumerate(CONTESTANTS))
    for repeat in range(config.repeats):
        for number, contestant in contestants:
            flags = f"--xla_force_host_platform_device_count={contestant.devices}"
            output = files.in_own_process(__file__, "--only", number, XLA_FLAGS=flags)
            speed, mebibytes = map(float, output.split()[-2:])
            *which, steps = contestant
            rows.append(Row(repeat, *which, bool(steps), round(speed), round(mebibytes)))
            print(*rows[-1], file=sys.stderr)
        contestants.rotate(-1)
    command = f"python benchmarks/gymnax_speed.py --repeats {config.repeats}"
    files.save(config.output, command, VERSIONS, Row._fields, rows)


def recorded(path: Path) -> list[Row]:
    return [Row(*map(int, row[:4]), row[4] == "True", *map(int, row[5:])) for row in files.load(path)]


def markdown_table(rows: list[Row]) -> str:
    """Medians over the repeats, of steps per second and of the ratios to SB3 in the same repeat"""
    sb3 = {row.repeat: row.steps_per_second for row in rows if not row.is_ours}
    header = ["", "environments", "devices", "seeds", "steps/s, median (min to max)", "ratio to SB3's 4", "memory, MiB"]
    lines = []
    for which in dict.fromkeys(row[1:5] for row in rows):
        same = [row for row in rows if row[1:5] == which]
        speeds = [row.steps_per_second for row in same]
        ratios = [row.steps_per_second / sb3[row.repeat] for row in same]
        *numbers, is_ours = which
        cells = ["`ppo_jax.py`, gymnax" if is_ours else "SB3 (PyTorch)", *map(str, numbers)]
        cells += [files.median_and_range(speeds, ",.0f"), files.median_and_range(ratios, ".1f")]
        lines.append([*cells, f"{statistics.median(row.mebibytes for row in same):,.0f}"])
    return markdown(header, lines)


def draw(rows: list[Row], path: Path) -> None:
    """Steps per second and memory by the number of environments: medians and ranges over the repeats"""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    figure.suptitle("CartPole-v1, one seed: medians, bars from the least to the greatest", fontsize=10)
    curves = {
        "SB3 (PyTorch)": [row for row in rows if not row.is_ours],
        "ppo_jax.py, gymnax, one device": [row for row in rows if row.is_ours and row.devices == row.num_seeds == 1],
        "ppo_jax.py, gymnax, two devices": [row for row in rows if row.devices == 2 and row.num_seeds == 1],
    }
    quantities = ("steps_per_second", "steps per second"), ("mebibytes", "memory of the process, MiB")
    for ax, (field, title) in zip(axes, quantities, strict=True):
        for label, measured in curves.items():
            numbers = sorted({row.num_envs for row in measured})
            values = [[getattr(row, field) for row in measured if row.num_envs == number] for number in numbers]
            medians = [statistics.median(x) for x in values]
            below = [median - min(x) for median, x in zip(medians, values, strict=True)]
            above = [max(x) - median for median, x in zip(medians, values, strict=True)]
            places = [number * (1.1 if "two" in label else 1) for number in numbers]  # bars would hide one another
            ax.errorbar(places, medians, (below, above), marker="o", capsize=3, label=label)
        ticks = sorted({row.num_envs for row in rows})
        ax.set(xscale="log", ylim=(0, None), xlabel="environments", title=title)
        ax.set_xticks(ticks, map(str, ticks), minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=170)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
