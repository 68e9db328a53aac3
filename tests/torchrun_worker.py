"""What tests/test_processes.py runs under torchrun: updates from data, of which each process has its columns.

torchrun --nproc-per-node 2 tests/torchrun_worker.py ppo_torch FOLDER float64
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_torch
import vpg_torch

STEPS, COLUMNS, OBSERVATION = 9, 4, 3


def random_columns(seed: int, columns: slice) -> dict[str, np.ndarray]:
    """Two real numbers and a choice of three as actions; the same of every seed, of which these columns are kept"""
    rng, shape = np.random.default_rng(seed), (STEPS, COLUMNS)
    observations, next_observations = rng.normal(size=(2, *shape, OBSERVATION))
    data = {"observations": observations, "next_observations": next_observations, "rewards": rng.normal(size=shape)}
    data |= {"numbers": rng.normal(size=(*shape, 2)), "choices": rng.integers(3, size=shape)}
    data |= {"terminated": rng.random(shape) < 0.2, "truncated": rng.random(shape) < 0.2}
    return {name: x[:, columns] for name, x in data.items()}


class Sizes:
    """What a learner of ppo_torch.py has to know of its environments"""

    observation_shape, nvec, action_dim = (OBSERVATION,), (), 2


def ppo_update(number: int, columns: slice) -> dict[str, np.ndarray]:
    """Weights and record after three updates of two epochs"""
    flags = {"update_epochs": 2, "num_minibatches": 1, "hidden_sizes": (7,), "ent_coef": 0.1, "learning_rate": 5e-2}
    config = ppo_torch.Config(num_envs=COLUMNS // number, num_steps=STEPS, **flags)
    learner, rng = ppo_torch.new_learner(Sizes, config), np.random.default_rng(columns.start)  # an order of its own
    timed = ppo_torch.new_stopwatch(learner, config).timed
    for seed in range(3):
        data = random_columns(seed, columns)
        observations = np.concatenate([data["observations"], data["next_observations"][-1:]])
        final_observations = data["next_observations"][data["truncated"]]
        taken = data["numbers"], data["rewards"], data["terminated"], data["truncated"]
        rollout = ppo_torch.Rollout(observations, *taken, final_observations)
        learner, _, metrics = ppo_torch.update(learner, rollout, config, rng, timed)
    return ppo_torch.to_numpy(learner) | metrics


def vpg_update(number: int, columns: slice) -> dict[str, np.ndarray]:
    """The same after three updates of five value steps"""
    flags = {"value_iters": 5, "hidden_sizes": (7,), "ent_coef": 0.1}
    config = vpg_torch.Config(num_envs=COLUMNS // number, num_steps=STEPS, **flags)
    parts = {"numbers": vpg_torch.Part((2,)), "choices": vpg_torch.Part((), (3,))}
    learner = vpg_torch.new_learner(OBSERVATION, parts, config)
    for seed in range(3):
        data = random_columns(seed, columns)
        data["actions"] = {name: data.pop(name) for name in parts}
        learner, metrics = vpg_torch.update(learner, vpg_torch.Batch(**data), config)
    return vpg_torch.to_numpy(learner) | metrics


def updated(module: ModuleType, number: int, columns: slice) -> dict[str, np.ndarray]:
    return {ppo_torch: ppo_update, vpg_torch: vpg_update}[module](number, columns)


if __name__ == "__main__":
    module, folder, precision = importlib.import_module(sys.argv[1]), *sys.argv[2:]
    torch.set_default_dtype(getattr(torch, precision))
    number, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    config = module.Config(num_envs=COLUMNS // number, num_steps=STEPS)
    with module.processes(config) as own:
        assert config.iteration_steps == STEPS * COLUMNS
        assert (own.seed == config.seed) == (rank == 0)
        arrays = updated(module, number, slice(rank * config.num_envs, (rank + 1) * config.num_envs))
        np.savez(f"{folder}/{number}-{rank}.npz", **arrays)
