"""What a timer without a fence would have reported: each phase of the PPO scripts, clocked with and without waiting.

    python benchmarks/unfenced.py                        writes results/unfenced.csv and prints the table

The same iterations of CartPole-v1 (4 environments x 128 steps, 4 epochs of 4 minibatches), phase by phase; medians
over iterations. Without a fence the clock is read as soon as the call returns, which is when the work is described
(MLX) or queued (JAX as it comes; CUDA would be the same), not when it is done. The rest of the work then shows up
wherever the program first needs a number. ppo_jax.py has JAX wait on a CPU, where that is faster; here it does not.
"""

import contextlib
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from compare import markdown  # noqa: E402

SCRIPTS = ("ppo_torch", "ppo_jax", "ppo_mlx")
PHASES = ("gae", "shuffle", "loss", "kl", "weight_update", "other")


@dataclass(frozen=True)
class Config:
    iterations: int = 60  # of each script, with and without fences in turn
    output: Path = ROOT / "results" / "unfenced.csv"  # one row for a script, a phase and a way to clock it


@contextlib.contextmanager
def ready(module: ModuleType, config) -> Iterator[tuple]:
    """Environments, learner, stopwatch and random numbers of a script, everything compiled."""
    with contextlib.closing(module.Environments(config, config.num_envs)) as envs:
        envs.restart(0)
        learner = module.new_learner(envs, config)
        stopwatch = module.new_stopwatch(learner, config)
        module.warm_up(learner, envs, config, stopwatch)
        yield envs, learner, stopwatch, np.random.default_rng(1)


def measure(script: str, iterations: int) -> dict[tuple[str, str], float]:
    """Milliseconds an iteration for (phase, "fenced" or "unfenced")."""
    module = importlib.import_module(script)
    config, laps = module.Config(device="cpu", vectorization="sync"), {"fenced": [], "unfenced": []}
    with ready(module, config) as (envs, learner, stopwatch, rng):
        fences: dict[str, Callable] = {"fenced": stopwatch.fence, "unfenced": lambda result: None}
        for _ in range(iterations + 5):
            for way, stopwatch.fence in fences.items():
                rollout = module.collect_rollout(learner.agent, envs, config, rng, stopwatch.timed)
                stopwatch.lap()
                learner, _, _ = module.update(learner, rollout, config, rng, stopwatch.timed)
                laps[way].append(stopwatch.lap())
    rows = {(phase, way): [lap[phase] for lap in laps[way][5:]] for way in laps for phase in PHASES}
    return {key: 1e3 * statistics.median(seconds) for key, seconds in rows.items()}


def markdown_table(found: dict[tuple[str, str, str], float]) -> str:
    ways = "fenced", "unfenced"
    cells = {
        script: [" / ".join(f"{found[script, phase, way]:.2f}" for way in ways) for phase in PHASES]
        for script in SCRIPTS
    }
    header = [f"ms of an update: {' / '.join(ways)}", *PHASES]
    return markdown(header, [[script, *cells[script]] for script in SCRIPTS])


def read(path: Path) -> dict[tuple[str, str, str], float]:
    return {(script, phase, clock): float(ms) for script, phase, clock, ms in files.load(path)}


def main(config: Config) -> None:
    jax.devices()  # asynchronous, as JAX makes its CPU; the script comes too late to choose otherwise
    found = {(script, *key): ms for script in SCRIPTS for key, ms in measure(script, config.iterations).items()}
    command = f"python benchmarks/unfenced.py --iterations {config.iterations}"
    rows = [(*key, round(ms, 4)) for key, ms in found.items()]
    files.save(config.output, command, ("torch", "jax", "mlx"), ("script", "phase", "clock", "milliseconds"), rows)
    print(markdown_table(found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
