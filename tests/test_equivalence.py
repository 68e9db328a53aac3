"""The three PPO scripts compute the same numbers: each against ppo_torch.py, from the same weights, rollouts and order
of minibatches; and each loads the others' models.

In float64 what is left is the order of sums: 1e-9 after ten updates. In float32 the first minibatch agrees to 1e-5 of
each tensor's largest entry; later, rounding grows through the updates.
"""

import ast
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

import ppo_jax
import ppo_lstm_jax
import ppo_mlx
import ppo_torch
import vpg_torch
from tests.backends import double_precision, doubled, first_minibatch, named
from tests.test_ppo_torch import call

ROOT = Path(ppo_torch.__file__).parent
OTHERS = [ppo_mlx, ppo_jax]
CARTPOLE = {"env_id": "CartPole-v1", "num_envs": 4, "num_steps": 32}
CASES = {
    "discrete": CARTPOLE | {"norm_obs": True},
    "multidiscrete": CARTPOLE | {"env_id": "tests.environments:Echo-v0", "env_kwargs": '{"space": "multidiscrete"}'},
    "gaussian": CARTPOLE | {"env_id": "Pendulum-v1", "norm_reward": True, "clip_vloss": False},
    "bounded": CARTPOLE | {"env_id": "tests.environments:Echo-v0", "env_kwargs": '{"space": "bounded"}'},
    "plain": CARTPOLE | {"norm_adv": False, "ent_coef": 0.1, "hidden_sizes": (16,)},
    "images": {"env_id": "tests.environments:Picture-v0", "num_steps": 8, "num_minibatches": 2, "update_epochs": 2},
}


def name(module: ModuleType) -> str:
    return module.__name__


def config_of(module: ModuleType, **flags):
    return module.Config(**{"vectorization": "sync", "learning_rate": 1e-3, "wandb_mode": "disabled"} | flags)


@cache
def collected(case: str) -> list[ppo_torch.Rollout]:
    """Ten rollouts of one untrained policy, its episodes going on from one to the next."""
    config = config_of(ppo_torch, **CASES[case])
    envs, rng = ppo_torch.Environments(config, config.num_envs), np.random.default_rng(0)
    with contextlib.closing(envs):
        envs.restart(0)
        agent = ppo_torch.new_learner(envs, config).agent
        return [ppo_torch.collect_rollout(agent, envs, config, rng, call) for _ in range(10)]


@contextlib.contextmanager
def learner_of(module: ModuleType, config, arrays: dict[str, np.ndarray]) -> Iterator:
    with contextlib.closing(module.Environments(dataclasses.replace(config), config.num_envs)) as envs:
        yield module.from_numpy(module.new_learner(envs, config), arrays)


def initial_arrays(case: str) -> dict[str, np.ndarray]:
    """Weights by torch's names, off the initial values where these are zero."""
    config, rng = config_of(ppo_torch, **CASES[case]), np.random.default_rng(1)
    with contextlib.closing(ppo_torch.Environments(config, config.num_envs)) as envs:
        arrays = ppo_torch.to_numpy(ppo_torch.new_learner(envs, config))
    return {key: (x + 0.05 * rng.standard_normal(x.shape)).astype(np.float32) for key, x in arrays.items()}


def updated(module: ModuleType, case: str) -> list[tuple[dict[str, float], dict[str, np.ndarray]]]:
    """Metrics and arrays (weights, optimizer) after each of ten updates in float64, annealed."""
    flags = CASES[case]
    config = config_of(module, **flags)
    rollouts, arrays = collected(case), initial_arrays(case)
    config = dataclasses.replace(config, total_timesteps=len(rollouts) * config.batch_size)
    found, rng = [], np.random.default_rng(2)
    with double_precision(module), learner_of(module, config, arrays) as learner:
        learner = doubled(module, learner)
        fused = module.new_stopwatch(learner, config).fused
        for iteration, rollout in enumerate(rollouts, 1):
            rate = module.annealed_learning_rate(iteration, config)
            learner, _, metrics = module.update(module.with_learning_rate(learner, rate), rollout, config, rng, fused)
            found.append((metrics, {key: np.array(x) for key, x in module.to_numpy(learner).items()}))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("module", OTHERS, ids=name)
def test_ten_updates_in_float64(module, case):
    expected, found = updated(ppo_torch, case), updated(module, case)
    if case != "plain":  # else without clipping the updates would be the same without it too
        assert any(metrics["losses/clipfrac"] > 0 for metrics, _ in expected)
        assert any(metrics["losses/grad_norm"] > 0.5 for metrics, _ in expected)
    for (metrics, arrays), (found_metrics, found_arrays) in zip(expected, found, strict=True):
        assert found_metrics.keys() == metrics.keys()
        for key, value in metrics.items():
            assert found_metrics[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
        weights = [key for key in arrays if not key.startswith("optimizer.")]
        for key in weights:
            assert found_arrays[key].dtype == np.float64
            np.testing.assert_allclose(found_arrays[key], arrays[key], rtol=0, atol=1e-9, err_msg=key)
    before, after = expected[0][1], expected[-1][1]
    assert max(np.abs(after[key] - before[key]).max() for key in before if key in weights) > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("module", OTHERS, ids=name)
def test_first_minibatch_in_float32(module, case):
    found = {}
    for one in (ppo_torch, module):
        config = config_of(one, **CASES[case])
        with learner_of(one, config, initial_arrays(case)) as learner:
            batch = one.make_batch(learner.agent, collected(case)[0], config)
            permutation = np.random.default_rng(0).permutation(config.batch_size)
            minibatch = first_minibatch(one, batch, permutation, config)
            gradient, losses, log_ratio = one.loss_and_gradient(learner.agent, minibatch, config)
            kl = one.kl_and_clip_fraction(log_ratio, config.clip_coef)
            found[one] = named(one, learner, gradient), {key: float(x) for key, x in (losses | kl).items()}
    (expected, expected_losses), (gradient, losses) = found[ppo_torch], found[module]
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
    for key, value in expected.items():
        assert gradient[key].dtype == np.float32 and np.abs(value).max() > 0, key
        np.testing.assert_allclose(gradient[key], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=key)


# ------------------------------------------------------------------------------------------------------------ models


class Model(NamedTuple):
    path: Path
    evaluation_returns: list[float]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[tuple[str, str], Model]:
    """A trained model of every script, of vector and image environments."""
    found = {}
    for module in (ppo_torch, *OTHERS):
        for case in ("gaussian", "images", "discrete"):
            flags = CASES[case]
            config = config_of(module, **flags | {"total_timesteps": 64 if case == "images" else 256})
            directory = tmp_path_factory.mktemp(f"{name(module)}-{case}") / "run"
            episodes = 3 if case == "discrete" else 0
            result = module.train(dataclasses.replace(config, run_dir=str(directory), eval_episodes=episodes))
            found[name(module), case] = Model(directory / "model.safetensors", result.evaluation_returns)
    return found


def assert_orthogonal(weights: np.ndarray, gain: float) -> None:
    """(out, …) or (out, in): rows or columns, whichever are fewer, of length `gain` and at right angles"""
    matrix = weights.reshape(len(weights), -1).astype(float)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), rtol=0, atol=1e-5 * gain**2)


@pytest.mark.parametrize("case", ["images", "bounded"])
@pytest.mark.parametrize("module", [ppo_torch, *OTHERS], ids=name)
def test_initial_weights(module, case):
    """Orthogonal with gains √2, 0.01 (policy) and 1 (value), biases 0, log-std 0 (details 2 and 3 of the 37)."""
    config = config_of(module, **CASES[case] | {"hidden_sizes": (8, 6)})
    with contextlib.closing(module.Environments(config, 1)) as envs:
        arrays = module.to_numpy(module.new_learner(envs, config))
    weights = {key: x for key, x in arrays.items() if not key.startswith("optimizer.")}
    number = 0 if case == "images" else 4
    last = {f"actor.{number}.weight": 0.01, f"critic.{number}.weight": 1}
    assert weights.keys() > last.keys()
    for key, x in weights.items():
        if key.endswith("weight"):
            assert_orthogonal(x, last.get(key, np.sqrt(2)))
        else:
            assert not x.any(), key


@pytest.mark.parametrize("module", [*OTHERS, ppo_torch, ppo_lstm_jax], ids=name)
def test_the_optimizer_takes_the_annealed_learning_rate(module, tmp_path):
    """That of the last of two iterations is half of the first's."""
    flags = CARTPOLE | {"total_timesteps": 256, "eval_episodes": 0, "run_dir": str(tmp_path / "run")}
    learner = module.train(config_of(module, **flags)).learner
    if module is ppo_torch:
        rate = learner.optimizer.param_groups[0]["lr"]
    else:
        rate = learner.optimizer.learning_rate if module is ppo_mlx else learner.learning_rate
    assert float(rate) == pytest.approx(0.5e-3)


@pytest.mark.parametrize("case", ["discrete", "gaussian", "images"])
@pytest.mark.parametrize("writer", [ppo_torch, *OTHERS], ids=name)
def test_every_script_loads_every_model(writer, case, models):
    flags, rollout = CASES[case], collected(case)[0]
    observations = rollout.observations.reshape(-1, *rollout.observations.shape[2:])[:16]
    actions, outputs = {}, {}
    for reader in (ppo_torch, *OTHERS):
        config = config_of(reader, **flags)
        with contextlib.closing(reader.Environments(config, 2)) as envs:
            path = models[name(writer), case].path
            learner = reader.load_model(str(path), reader.new_learner(envs, config), envs)
            actions[reader] = np.asarray(reader.act(learner.agent, observations))
            policy, values = learner.agent(*reader.to_tensors(learner.agent, observations))  # alike where actions are
            outputs[reader] = [x.detach().numpy() if reader is ppo_torch else np.array(x) for x in (policy, values)]
            arrays, _ = reader.load_arrays(path)
            weights = {key: x for key, x in reader.to_numpy(learner).items() if not key.startswith("optimizer.")}
            assert arrays.keys() == weights.keys() | envs.to_numpy().keys()
            for key, value in weights.items():
                np.testing.assert_array_equal(value, arrays[key], err_msg=key)
    for reader in OTHERS:
        np.testing.assert_allclose(actions[reader], actions[ppo_torch], rtol=0, atol=1e-5)
        for found, expected in zip(outputs[reader], outputs[ppo_torch], strict=True):
            assert expected.std(0).max() > 1e-3
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["discrete", "gaussian"])
@pytest.mark.parametrize("writer", [ppo_torch, *OTHERS], ids=name)
def test_every_script_goes_on_with_every_model(writer, case, models, tmp_path):
    """Rollout and update after --load-model: the same weights in all three, whoever wrote the file."""
    path = models[name(writer), case].path
    before, _ = writer.load_arrays(path)
    after = {}
    for reader in (ppo_torch, *OTHERS):
        flags = {"load_model": str(path), "run_dir": str(tmp_path / name(reader))}
        flags |= {"total_timesteps": 128, "eval_episodes": 0}
        reader.train(config_of(reader, **CASES[case] | flags))
        after[reader], _ = reader.load_arrays(tmp_path / name(reader) / "model.safetensors")
    for key, expected in after[ppo_torch].items():
        for reader in OTHERS:
            np.testing.assert_allclose(after[reader][key], expected, rtol=1e-5, atol=1e-5, err_msg=key)
    assert max(np.abs(after[ppo_torch][key] - before[key]).max() for key in before) > 1e-3


@pytest.mark.parametrize("writer", [ppo_torch, *OTHERS], ids=name)
@pytest.mark.parametrize("reader", [ppo_torch, *OTHERS], ids=name)
def test_a_loaded_model_evaluates_as_where_it_was_trained(reader, writer, models, tmp_path):
    """The same greedy episodes of CartPole, to the step."""
    path, evaluation_returns = models[name(writer), "discrete"]
    flags = {"total_timesteps": 0, "eval_episodes": 3, "load_model": str(path), "run_dir": str(tmp_path / "run")}
    returns = reader.train(config_of(reader, **CASES["discrete"] | flags)).evaluation_returns
    assert returns == evaluation_returns and len(returns) == 3


# ------------------------------------------------------------------------------------------------- the files themselves


MAY_DIFFER = {"device", "compile", "num_threads", "num_seeds", "exp_name"}
OF_MEMORY = {"lstm_size", "lstm_layers", "sequence_length", "burn_in", "mask_velocity"}
OF_MEMORY |= {"recompute_hidden", "recompute_advantages"}


@pytest.mark.parametrize("module", [*OTHERS, ppo_lstm_jax], ids=name)
def test_flags_and_defaults(module):
    def flags(one: ModuleType) -> dict:
        return {
            field.name: (str(field.type), field.default)
            for field in dataclasses.fields(one.Config)
            if field.name not in MAY_DIFFER | (OF_MEMORY if one is ppo_lstm_jax else set())
        }

    assert list(flags(module).items()) == list(flags(ppo_torch).items())
    assert module.Config().exp_name == name(module)


def outline(module: ModuleType) -> list[str]:
    """Headings, functions and classes in their order."""
    source = Path(module.__file__).read_text()
    tree = ast.parse(source)
    found = [(node.lineno, node.name) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    headings = [(number, line) for number, line in enumerate(source.splitlines(), 1) if line.startswith("# -----")]
    return [text for _, text in sorted(found + headings)]


@pytest.mark.parametrize("module", [*OTHERS, ppo_lstm_jax], ids=name)
def test_same_functions_in_the_same_order(module):
    """What one framework alone needs is left out; all that both have stands in the same order."""
    ours, theirs = outline(module), outline(ppo_torch)
    common, of_torch = set(ours) & set(theirs), set(outline(vpg_torch)) - set(ours)  # several processes, with torchrun
    common -= {"NatureCNN"} if module is ppo_lstm_jax else set()  # which has a section of images, for its budget
    assert [item for item in ours if item in common] == [item for item in theirs if item in common]
    assert len(common) > 0.9 * len(set(theirs) - of_torch)


def test_a_run_names_its_framework(models):
    for (script, _), (path, _) in models.items():
        _, metadata = ppo_torch.load_arrays(path)
        assert metadata["config"]["exp_name"] == script
        assert json.loads((path.parent / "config.json").read_text())["exp_name"] == script
