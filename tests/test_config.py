"""The command line of every script: the flags that all have, the defaults that are CleanRL's, and no number that is
taken without a look at its range."""

import dataclasses
import importlib
import typing
from types import ModuleType, NoneType

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.test_reliability import assert_one_line, main

SCRIPTS = ("vpg_torch", "ppo_torch", "ppo_mlx", "ppo_jax", "ppo_lstm_jax", "td3_jax", "sac_jax", "mpo_jax")
PPO = ("ppo_torch", "ppo_mlx", "ppo_jax", "ppo_lstm_jax")
COMMON = {"seed": 1, "env_kwargs": "{}", "vectorization": "auto", "device": "auto", "timing_interval": 20}
COMMON |= {"eval_episodes": 10, "capture_video": False, "save_model": True, "load_model": None, "run_dir": None}
COMMON |= {"checkpoint_interval": None, "resume": None, "wandb_mode": "offline", "wandb_entity": None}
COMMON |= {"wandb_group": None}
PPO_OF_CLEANRL = {"env_id": "CartPole-v1", "total_timesteps": 500_000, "learning_rate": 2.5e-4, "num_envs": 4}
PPO_OF_CLEANRL |= {"num_steps": 128, "anneal_lr": True, "gamma": 0.99, "gae_lambda": 0.95, "num_minibatches": 4}
PPO_OF_CLEANRL |= {"update_epochs": 4, "norm_adv": True, "clip_coef": 0.2, "clip_vloss": True, "ent_coef": 0.01}
PPO_OF_CLEANRL |= {"vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None, "adam_eps": 1e-5, "hidden_sizes": (64, 64)}
OF_CLEANRL = {"total_timesteps": 1_000_000, "buffer_size": 1_000_000, "gamma": 0.99, "tau": 0.005, "batch_size": 256}
OF_CLEANRL |= {"hidden_sizes": (256, 256), "num_envs": 1}
OF_CLEANRL |= COMMON | {"log_interval": 1000, "eval_interval": 5000, "updates_per_step": 1.0, "action_repeat": 1}
DEFAULTS = {script: COMMON | PPO_OF_CLEANRL | {"eval_interval": 0, "final_learning_rate": 0.0} for script in PPO}
OF_TD3 = {"learning_rate": 3e-4, "learning_starts": 25_000, "policy_frequency": 2}
OF_TD3 |= {"policy_noise": 0.2, "exploration_noise": 0.1, "noise_clip": 0.5}
OF_SAC = {"policy_lr": 3e-4, "q_lr": 1e-3, "learning_starts": 5_000, "alpha": 0.2, "autotune": True}
DEFAULTS |= {"td3_jax": OF_CLEANRL | OF_TD3, "sac_jax": OF_CLEANRL | OF_SAC, "mpo_jax": OF_CLEANRL}
DEFAULTS["vpg_torch"] = COMMON | {"env_id": "CartPole-v1", "hidden_sizes": (64, 64), "eval_interval": 0}
each = pytest.mark.parametrize("script", SCRIPTS)


def field_types(module: ModuleType) -> dict[str, set[type]]:
    """The plain types of each field: of Annotated[int, …] | None, int and None"""

    def plain(annotation) -> set[type]:
        if typing.get_origin(annotation) is typing.Literal:
            return {str}
        parts = typing.get_args(annotation)
        return set().union(*map(plain, filter(lambda part: part is not ..., parts))) if parts else {annotation}

    return {name: plain(hint) for name, hint in typing.get_type_hints(module.Config).items()}


@each
def test_flags_and_defaults(script):
    found = {field.name: field.default for field in dataclasses.fields(importlib.import_module(script).Config)}
    expected = DEFAULTS[script] | {"exp_name": script}
    assert {name: found.get(name, "missing") for name in expected} == expected


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
@each
def test_no_number_is_taken_from_outside_its_range(script, value):
    module = importlib.import_module(script)
    numbers = {name: types for name, types in field_types(module).items() if types & {int, float}}
    floats = [name for name, types in numbers.items() if float in types]
    assert len(numbers) > 15 and len(floats) > 4
    for name in numbers if np.isfinite(value) else floats:
        wrong = (value,) if isinstance(getattr(module.Config(), name), tuple) else value
        with pytest.raises(module.BadInput, match=f"--{name.replace('_', '-')} "):
            module.validate(dataclasses.replace(module.Config(), **{name: wrong}))


TOO_MUCH = {
    "torch": lambda: torch.empty(10**13),
    "jax": lambda: jnp.zeros(10**13),
}


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {"ppo_mlx"}))  # MLX ends with a segmentation fault
def test_memory_that_is_not_there_is_one_line(script, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "train", lambda config: TOO_MUCH[module.FRAMEWORK]())
    assert_one_line(main(module=module), 1, "allocat", module=module)


@each
def test_other_errors_come_through(script, monkeypatch):
    module = importlib.import_module(script)

    def fail(config):
        raise RuntimeError("something else")

    monkeypatch.setattr(module, "train", fail)
    with pytest.raises(RuntimeError, match="something else"):
        main(module=module)


@each
def test_ten_checkpoints_unless_episodes_would_not_end_in_between(script):
    config = importlib.import_module(script).Config(num_envs=4, total_timesteps=500_000)
    wide = dataclasses.replace(config, num_envs=64)
    steps = 3 if hasattr(config, "action_repeat") else 1
    wide = dataclasses.replace(wide, **{"action_repeat": 3} if steps == 3 else {})
    assert (config.checkpoint_every, wide.checkpoint_every) == (50_000, 320_000 * steps)
    assert dataclasses.replace(wide, checkpoint_interval=7).checkpoint_every == 7


def test_the_types_of_a_field_are_found():
    types = field_types(importlib.import_module("ppo_torch"))
    assert types["learning_rate"] == {float} and types["checkpoint_interval"] == {int, NoneType}
    assert types["hidden_sizes"] == {int} and types["device"] == {str}
