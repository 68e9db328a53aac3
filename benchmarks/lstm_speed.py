"""Steps per second of ppo_lstm_jax.py beside RecurrentPPO of sb3-contrib: CartPole-v1, 8 environments, LSTMs of 64
units for policy and value function, 4 epochs of minibatches of 256 steps, on the same machine.

    python benchmarks/lstm_speed.py                      writes results/lstm_speed.csv and prints the table
    python benchmarks/lstm_speed.py --repeats 1          a quick look

Done as benchmarks/ppo_speed.py does it: fresh processes in turn, compilation apart, torch at one thread.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import ppo_speed  # noqa: E402

TITLES = {"sb3-contrib": "sb3-contrib"}
ENVIRONMENTS = {"ppo_lstm_jax": "CartPole-v1", "ppo_lstm_jax on gymnax": "gymnax/CartPole-v1"}
CONTESTANTS = (*TITLES, *ENVIRONMENTS)
VERSIONS = ("sb3-contrib", "stable-baselines3", "torch", "jax", "gymnasium", "gymnax", "numpy")


@dataclass(frozen=True)
class Config(ppo_speed.Config):
    total_timesteps: int = 100_000  # steps of a run
    output: Path = ROOT / "results" / "lstm_speed.csv"  # one row a run


def measure_peer(total_timesteps: int) -> float:
    import torch
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    settings = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
    settings |= {"clip_range": 0.2, "clip_range_vf": 0.2, "policy_kwargs": {"lstm_hidden_size": 64}}
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=1)
    model = RecurrentPPO("MlpLstmPolicy", envs, seed=1, device="cpu", **settings)
    model.learn(2_000)
    start = time.perf_counter()
    model.learn(total_timesteps)
    return model.num_timesteps / (time.perf_counter() - start)  # whole rollouts


def main(config: Config) -> None:
    if config.only in TITLES:
        print(measure_peer(config.total_timesteps))
    elif config.only:
        settings = {"env_id": ENVIRONMENTS[config.only], "num_envs": 8, "total_timesteps": config.total_timesteps}
        print(ppo_speed.recorded_speed("ppo_lstm_jax", **settings))
    else:
        print(ppo_speed.markdown_table(ppo_speed.in_turns(config, __file__, CONTESTANTS, VERSIONS), TITLES))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
