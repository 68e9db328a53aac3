"""The files of the benchmarks: a line with the command, versions and machine, then CSV. And cells of their tables."""

import csv
import os
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path


def save(path: Path, command: str, packages: Iterable[str], header: Iterable[str], rows: Iterable[tuple]) -> None:
    from vpg_torch import cpu_name  # the same in all scripts

    versions = " ".join(f"{name} {version(name)}" for name in packages)
    with open(path, "w", newline="") as file:
        print(f"# {command}; {versions}; {cpu_name()}, {os.cpu_count()} cores", file=file)
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def caption(path: Path) -> str:
    """Command, versions and machine of a file, in Markdown"""
    return f"<sub>{path.read_text().splitlines()[0].removeprefix('# ')}</sub>"


def load(path: Path) -> list[list[str]]:
    """The rows without their header"""
    return list(csv.reader(path.read_text().splitlines()[1:]))[1:]


def median_and_range(values: Sequence[float], style: str) -> str:
    return f"{statistics.median(values):{style}} ({min(values):{style}} to {max(values):{style}})"


def mean_and_std(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values) if len(values) > 1 else 0:.1g}"
