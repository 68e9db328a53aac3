"""The three solvers of MPO's temperature: what they cost, how far they leave it from the optimum, what is learnt.

    python benchmarks/mpo_solvers.py    writes results/mpo_solvers.csv and prints the table

(A quick look: `--repeats 1 --output quick.csv`.)

Seconds: of 1000 environment steps of HalfCheetah-v5 with an update each (20 action samples, networks of 256 x 256, 256
transitions a minibatch), as the run's record has them, in fresh processes that take turns; they hold the check of the
temperature against its optimum, which costs slsqp and adam a solution by Newton more. Distance: |η / η* - 1| on the
same batches for all, those of a run on Pendulum-v1 of so many updates; each solver goes on from where it was, and the
second half of the run counts. Returns: the rows mpo_pendulum_... of benchmarks/learning.py.
"""

import contextlib
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402
import mpo_jax  # noqa: E402
from benchmarks import files, learning  # noqa: E402
from benchmarks.speed import measure_ours  # noqa: E402


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # timed runs of each solver
    steps: int = 2000  # with an update each, of a timed run
    updates: int = 4000  # of the run that gives the batches
    output: Path = ROOT / "results" / "mpo_solvers.csv"  # one row a number
    only: str | None = None  # measure this solver once, in this process, and print its seconds


def distances(updates: int) -> dict[str, list[float]]:
    """|η / η* - 1| of each solver at each update of the second half"""
    configs = {name: mpo_jax.Config(env_id="Pendulum-v1", seed=0, temperature_solver=name) for name in mpo_jax.SOLVERS}
    config = configs["newton"]
    with contextlib.closing(mpo_jax.Environments(config, 1)) as envs:
        envs.restart(config.seed)
        learners = {name: mpo_jax.new_learner(envs, of_solver) for name, of_solver in configs.items()}
        learner, rng = mpo_jax.copied(learners["newton"]), np.random.default_rng(config.seed)
        buffer = mpo_jax.ReplayBuffer(config, 1, envs.observation_dim, envs.action_dim)
        stopwatch = mpo_jax.new_stopwatch()
        found, exact_optimum = {name: [] for name in configs}, jax.jit(mpo_jax.optimal_temperature)
        for step in range(config.learning_starts + updates):
            mpo_jax.interact(learner.actor, envs, buffer, step, config, rng, stopwatch.timed)
            if step < config.learning_starts:
                continue
            batch = mpo_jax.sample_batch(buffer, range(1), config, rng)
            minibatch = mpo_jax.Batch(*(x[0] for x in batch))
            values = stopwatch.fused(None, mpo_jax.sample_values, learner, minibatch, config).values
            for name, solve in mpo_jax.SOLVERS.items():
                learners[name] = stopwatch.fused(None, solve, learners[name], values, configs[name])
            if step >= config.learning_starts + updates // 2:
                with jax.enable_x64(True):
                    optimum = float(exact_optimum(np.asarray(values[0], np.float64), config.epsilon, np.ones(())))
                for name, of_solver in learners.items():
                    found[name].append(abs(float(mpo_jax.positive(of_solver.temperatures[0])) / optimum - 1))
            learner, _ = stopwatch.fused(None, mpo_jax.update, learner, batch, config, stopwatch.fused)
    return found


def markdown_table(seconds: dict[str, list[float]], distance: dict[str, tuple[float, float]]) -> str:
    """From the seconds of each run and the mean and largest distance of each solver"""
    header = ["`--temperature-solver`", "s / 1000 steps, mean ± std", "distance from η*, mean (largest)"]
    header.append("Pendulum-v1, 50k")
    lines = []
    for name, values in seconds.items():
        mean, largest = distance[name]
        path = learning.recorded(f"mpo_pendulum_{name}", "mpo_jax")
        runs = compare.read_csv(path) if path.exists() else []
        returns = compare.estimate(runs, "evaluation_return")
        lines.append([f"`{name}`", files.mean_and_std(values), f"{mean:.1e} ({largest:.1e})", returns])
    return compare.markdown(header, lines)


def main(config: Config) -> None:
    if config.only:
        print(1000 / measure_ours("mpo_jax", steps=config.steps, temperature_solver=config.only))
        return
    rows, solvers = [], deque(mpo_jax.SOLVERS)
    for repeat in range(config.repeats):
        for name in solvers:
            output = files.in_own_process(__file__, "--only", name, "--steps", config.steps)
            rows.append((name, "seconds", repeat, round(float(output.split()[-1]), 3)))
            print(*rows[-1], file=sys.stderr)
        solvers.rotate(-1)
    for name, values in distances(config.updates).items():
        rows += [
            (name, "mean distance", "", f"{np.mean(values):.3e}"),
            (name, "largest distance", "", f"{max(values):.3e}"),
        ]
    flags = f"--repeats {config.repeats} --steps {config.steps} --updates {config.updates}"
    packages, header = ("jax", "scipy", "optax", "gymnasium", "numpy"), ("solver", "quantity", "repeat", "value")
    files.save(config.output, f"python benchmarks/mpo_solvers.py {flags}", packages, header, rows)
    print(markdown_table(*read(config.output)))


def read(path: Path) -> tuple[dict[str, list[float]], dict[str, tuple[float, float]]]:
    """The arguments of `markdown_table` from the file"""
    found: dict[tuple[str, str], list[float]] = {}
    for solver, quantity, _, value in files.load(path):
        found.setdefault((solver, quantity), []).append(float(value))
    seconds = {solver: values for (solver, quantity), values in found.items() if quantity == "seconds"}
    return seconds, {name: (*found[name, "mean distance"], *found[name, "largest distance"]) for name in seconds}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
