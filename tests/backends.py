"""What the tests need to know of a framework: how to compute in float64, and how its gradients are named."""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import jax
import mlx.core as mx
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree

jax.devices()  # JAX's CPU, asynchronous as JAX makes it: the script would have calls wait, which hides a missing fence

TEMPORARY = tempfile.TemporaryDirectory()
CACHE = tempfile.TemporaryDirectory()  # a script compiles anew for each run that a test makes, and mostly the same
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def double_precision(module: ModuleType) -> Iterator[None]:
    """float64 on the CPU for what is computed inside; `doubled` makes a learner of it."""
    if module.FRAMEWORK == "torch":
        torch.set_default_dtype(torch.float64)
    # needed once, so not kept: XLA has crashed (segmentation fault) while it serialised the CNN's update for the cache
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        with jax.enable_x64(True) if module.FRAMEWORK == "jax" else contextlib.nullcontext():
            yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        torch.set_default_dtype(torch.float32)


def jax_doubled(tree):
    return jax.tree.map(lambda x: x.astype(float) if np.issubdtype(x.dtype, np.floating) else x, tree)


def doubled(module: ModuleType, learner):
    if module.FRAMEWORK == "jax":
        return jax_doubled(learner)
    if module.FRAMEWORK == "mlx":
        weights, adam = learner.weights.astype(mx.float64), learner.optimizer
        module.vector_to_parameters(weights, learner.agent)
        moments = {"exp_avg": adam.exp_avg.astype(mx.float64), "exp_avg_sq": adam.exp_avg_sq.astype(mx.float64)}
        return learner._replace(weights=weights, optimizer=adam._replace(**moments))
    return learner  # `double_precision` made it so


def first_minibatch(module: ModuleType, batch, permutation: np.ndarray, config):
    return next(iter(module.minibatches(batch, permutation, config)))


def named(module: ModuleType, learner, gradient) -> dict[str, np.ndarray]:
    """A gradient by torch's names and in its layouts; the learner's own weights may be lost."""
    if module.FRAMEWORK == "jax":
        _, to_agent = ravel_pytree(learner.agent)
        learner = learner._replace(agent=to_agent(gradient))
    elif module.FRAMEWORK == "mlx":
        module.vector_to_parameters(gradient, learner.agent)
    else:
        torch.nn.utils.vector_to_parameters(gradient, learner.agent.parameters())
    return {name: x for name, x in module.to_numpy(learner).items() if not name.startswith("optimizer.")}


def compilations(module: ModuleType, config, caplog: pytest.LogCaptureFixture) -> tuple[list[str], list[str]]:
    """What a whole run compiles, by name: before the clock starts, and after"""
    found = []

    def names() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        return [x[1] for message in messages if (x := re.search(r"Finished XLA compilation of jit\((\w+)\)", message))]

    class Noted(module.Run):
        def iterations(self) -> Iterator[int]:
            for iteration in super().iterations():
                found.append(len(names()))
                yield iteration

    with jax.log_compiles(), caplog.at_level("WARNING", "jax"), mock.patch.object(module, "Run", Noted):
        module.train(config)
    return names()[: found[0]], names()[found[0] :]


def unfinished_zero(module: ModuleType):
    """0 as a scalar of the framework that takes many milliseconds to compute, and little time to ask for."""
    library = {"torch": torch, "jax": jax.numpy, "mlx": mx}[module.FRAMEWORK]
    return (jax_zero if module.FRAMEWORK == "jax" else zero)(library.ones((400, 400)) / 400)


def zero(matrix):
    for _ in range(30):
        matrix = matrix @ matrix
    return 0 * matrix.sum()


jax_zero = jax.jit(zero)  # one call: JAX does not run ahead of a queue of many
