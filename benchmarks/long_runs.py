"""Whether a script that runs for long keeps to its memory, files, threads and compiled functions.

    python benchmarks/long_runs.py                             ten minutes of each script, one after the other
    python benchmarks/long_runs.py --jobs 2                    two at a time
    python benchmarks/long_runs.py --script vpg_torch          that script again, the others as they are recorded

(A quick look: `--minutes 1 --output quick.csv --figure quick.png`.)

Writes results/long_runs.csv, a row every two seconds, and images/long_runs.png, and prints the slopes that least
squares fits to the second half of each run. A thread in the process reads the numbers, the rest is the script as it
is, with evaluations and checkpoints often. "Compilations" counts what JAX compiled since the start of the process.
"""

import contextlib
import csv
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from compare import SCRIPT_COLOURS, markdown  # noqa: E402

RESULTS = ROOT / "results" / "long_runs.csv"
OFF_POLICY = {"td3_jax", "sac_jax", "mpo_jax"}
COMMON = "--total-timesteps 1000000000 --eval-interval 5000 --checkpoint-interval 5000 --eval-episodes 2"
COMMON += " --vectorization sync"
OF_ON_POLICY = "--env-id CartPole-v1"
OF_OFF_POLICY = (
    "--env-id Pendulum-v1 --hidden-sizes 64 64 --learning-starts 1000 --buffer-size 10000 --log-interval 200"
)

WATCHED = """
import csv, importlib, os, sys, threading, time
from pathlib import Path
_, path, *sys.argv = sys.argv
sys.path.insert(0, os.getcwd())
import psutil
process, compilations, start = psutil.Process(), 0, time.perf_counter()
def watch():
    with open(path, "w", newline="") as file:
        while True:
            values = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads(), compilations
            csv.writer(file).writerow([round(time.perf_counter() - start, 1), *values])
            file.flush()
            time.sleep(2)
def count(name, seconds, **about):
    global compilations
    compilations += name == "/jax/core/compile/backend_compile_duration"
module = importlib.import_module(Path(sys.argv[0]).stem)
if module.FRAMEWORK == "jax":
    importlib.import_module("jax").monitoring.register_event_duration_secs_listener(count)
threading.Thread(target=watch, daemon=True).start()
sys.exit(module.main())
"""


class Sample(NamedTuple):
    seconds: float
    memory: float  # MiB, resident
    files: float  # open file descriptors
    threads: float
    compilations: float


PANELS = {"memory": "memory (MiB)", "files": "open files", "threads": "threads", "compilations": "compilations"}


@dataclass(frozen=True)
class Config:
    minutes: float = 10  # of each script
    script: tuple[str, ...] = tuple(SCRIPT_COLOURS)  # scripts
    jobs: int = 1  # runs at a time
    output: Path = RESULTS
    figure: Path = ROOT / "images" / "long_runs.png"


def watch(script: str, minutes: float) -> list[Sample]:
    flags = f"{COMMON} {OF_OFF_POLICY if script in OFF_POLICY else OF_ON_POLICY}".split()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.csv"
        command = [sys.executable, "-c", WATCHED, samples, f"{script}.py", *flags, "--run-dir", f"{folder}/run"]
        with open(Path(folder) / "stderr", "w+") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
            while process.poll() is None and not list(Path(folder).glob("run/checkpoints/*")):
                time.sleep(0.1)  # compiling is not counted
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60 * minutes)
            process.terminate()
            if process.wait() != 143:
                raise SystemExit(f"{script} ended by itself: {Path(stderr.name).read_text()[-2000:]}")
        return [Sample(*map(float, line)) for line in csv.reader(samples.read_text().splitlines())]


def slope(samples: list[Sample], what: str) -> float:
    """A minute, over the second half"""
    half = samples[len(samples) // 2 :]
    return float(np.polyfit([s.seconds / 60 for s in half], [getattr(s, what) for s in half], 1)[0])


def markdown_table(runs: dict[str, list[Sample]]) -> str:
    header = ["script", "minutes", "memory, MiB", "MiB a minute", "open files", "threads", "compilations"]
    lines = []
    for script, samples in runs.items():
        middle, last = samples[len(samples) // 2], samples[-1]
        counts = (f"{getattr(middle, what):.0f} → {getattr(last, what):.0f}" for what in list(PANELS)[1:])
        memory = f"{middle.memory:.0f} → {last.memory:.0f}", f"{slope(samples, 'memory'):+.2f}"
        lines.append([f"`{script}`", f"{last.seconds / 60:.0f}", *memory, *counts])
    return markdown(header, lines)


def draw(runs: dict[str, list[Sample]]) -> Figure:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (what, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for script, samples in runs.items():
            values = [getattr(sample, what) for sample in samples]
            style = "--" if "torch" in script else "-"  # the same number of files or threads hides a line
            axes.plot([s.seconds / 60 for s in samples], values, style, color=SCRIPT_COLOURS[script], label=script)
        axes.set(xlabel="minutes", title=label, ylim=(0, None))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    return figure


def read(path: Path = RESULTS) -> dict[str, list[Sample]]:
    runs: dict[str, list[Sample]] = {}
    for script, *values in files.load(path) if path.exists() else ():
        runs.setdefault(script, []).append(Sample(*map(float, values)))
    return runs


def write(runs: dict[str, list[Sample]], config: Config) -> None:
    rows = [
        (script, *(f"{x:g}" for x in sample)) for script in filter(runs.get, SCRIPT_COLOURS) for sample in runs[script]
    ]
    command = f"python benchmarks/long_runs.py --minutes {config.minutes:g} --jobs {config.jobs}"
    files.save(config.output, command, ("torch", "jax", "mlx", "wandb"), ("script", *Sample._fields), rows)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    with ThreadPoolExecutor(config.jobs) as pool:
        watched = {pool.submit(watch, script, config.minutes): script for script in config.script}
        for future in as_completed(watched):
            write(read(config.output) | {watched[future]: future.result()}, config)
    runs = read(config.output)
    matplotlib.use("agg")
    draw(runs).savefig(config.figure, dpi=130)
    print(markdown_table(runs))


if __name__ == "__main__":
    main()
