"""How the order of the frameworks changes with the width of the networks: milliseconds of each phase.

    python benchmarks/widths.py                          writes results/widths.csv and prints the table

CartPole-v1, 4 environments x 128 steps, 4 epochs of 4 minibatches, two hidden layers of 64, 256 and 1024 units; medians
over iterations that run phase by phase, and of the same updates run fused. Each contestant is a process of its own.
"""

import importlib
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from benchmarks.unfenced import ready  # noqa: E402
from compare import markdown  # noqa: E402

CONTESTANTS = ("ppo_torch", "ppo_torch --num-threads 2", "ppo_torch --compile", "ppo_jax", "ppo_mlx")
WIDTHS = {64: 40, 256: 15, 1024: 3}  # iterations of each
PHASES = ("forward", "gae", "loss", "weight_update", "update")  # `step` knows nothing of networks


@dataclass(frozen=True)
class Config:
    output: Path = ROOT / "results" / "widths.csv"  # one row for a contestant, a width and a phase
    only: str | None = None  # measure this contestant in this process, and print its milliseconds


def measure(contestant: str, width: int, iterations: int) -> dict[str, float]:
    """Milliseconds an iteration for each phase; `update` is the whole update, fused."""
    script, *flags = contestant.split()
    module = importlib.import_module(script)
    flags += ["--device", "cpu", "--vectorization", "sync", "--hidden-sizes", str(width), str(width)]
    config = module.parse(flags, module.Config())
    laps = []
    with ready(module, config) as (envs, learner, stopwatch, rng):
        for _ in range(iterations + 2):
            rollout = module.collect_rollout(learner.agent, envs, config, rng, stopwatch.timed)
            learner, _, _ = module.update(learner, rollout, config, rng, stopwatch.timed)
            rollout = module.collect_rollout(learner.agent, envs, config, rng, stopwatch.fused)
            arguments = learner, rollout, config, rng, stopwatch.fused
            learner, _, _ = stopwatch.timed("update", module.update, *arguments)
            laps.append(stopwatch.lap())
    return {phase: 1e3 * statistics.median(lap[phase] for lap in laps[2:]) for phase in PHASES}


def markdown_table(rows: list[tuple[str, int, str, float]]) -> str:
    milliseconds = {row[:3]: row[3] for row in rows}
    lines = [
        [str(width), contestant, *(f"{milliseconds[contestant, width, phase]:.1f}" for phase in PHASES)]
        for width in WIDTHS
        for contestant in CONTESTANTS
    ]
    return markdown(["width", "script (ms an iteration)", *PHASES], lines)


def read(path: Path) -> list[tuple[str, int, str, float]]:
    return [(name, int(width), phase, float(ms)) for name, width, phase, ms in files.load(path)]


def main(config: Config) -> None:
    if config.only:
        print(json.dumps([measure(config.only, *item) for item in WIDTHS.items()]))
        return
    rows = []
    for contestant in CONTESTANTS:
        output = files.in_own_process(__file__, "--only", contestant)
        for width, found in zip(WIDTHS, json.loads(output.splitlines()[-1]), strict=True):
            rows += [(contestant, width, phase, round(found[phase], 3)) for phase in PHASES]
    header = "contestant", "width", "phase", "milliseconds"
    files.save(config.output, "python benchmarks/widths.py", ("torch", "jax", "mlx"), header, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
