"""The files of the benchmarks: a line with the command, versions and machine, then CSV. Cells of their tables, and how
a measurement runs in a process of its own."""

import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def in_own_process(script: str, *arguments: str | int, **variables: str) -> str:
    """What it prints, with these variables of the environment; everything on the CPU, where all peers can run"""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "WANDB_SILENT": "true"} | variables
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr}")
    return run.stdout


def save(path: Path, command: str, packages: Iterable[str], header: Iterable[str], rows: Iterable[tuple]) -> None:
    from vpg_torch import cpu_name  # the same in all scripts

    versions = " ".join(f"{name} {found}" for name in packages if (found := installed(name)))
    with open(path, "w", newline="") as file:
        print(f"# {command}; {versions}; {cpu_name()}, {os.cpu_count()} cores", file=file)
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # which a suite may do without
        return None


def caption(path: Path) -> str:
    """Command, versions and machine of a file, in Markdown"""
    return f"<sub>{path.read_text().splitlines()[0].removeprefix('# ')}</sub>"


def load(path: Path) -> list[list[str]]:
    """The rows without their header"""
    return list(csv.reader(path.read_text().splitlines()[1:]))[1:]


def median_and_range(values: Sequence[float], style: str) -> str:
    return f"{statistics.median(values):{style}} ({min(values):{style}} to {max(values):{style}})"


def mean_and_std(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")
