"""An environment whose numbers are known, registered with gymnax."""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

ENDS = {  # how an episode of the counter ends: steps until it terminates and until it is cut off
    "terminates": (5, 1000),
    "truncates": (1000, 5),
    "both at once": (5, 5),
    "never": (1000, 1000),
}


@struct.dataclass
class State(environment.EnvState):
    action: jax.Array
    start: jax.Array


@struct.dataclass
class Params(environment.EnvParams):
    length: int = 7  # steps until it terminates
    max_steps_in_episode: int = 1000
    bad_step: int = -1  # where its observation is no number


class Counter(environment.Environment[State, Params]):
    """An observation is (steps of the episode, a random number of the episode, last action) / 100; the reward is the
    step."""

    def __init__(self, box: bool = False):
        super().__init__()
        self.box = box

    @property
    def default_params(self) -> Params:
        return Params()

    def step_env(self, key, state, action, params):
        state = State(state.time + 1, jnp.asarray(action, jnp.float32).reshape(()), state.start)
        is_over = state.time >= params.length
        return self.get_obs(state, params), state, jnp.float32(state.time), is_over, {}

    def reset_env(self, key, params):
        state = State(0, jnp.float32(0), jax.random.uniform(key))
        return self.get_obs(state, params), state

    def get_obs(self, state, params=None, key=None):
        observation = jnp.stack([jnp.float32(state.time), state.start, state.action]) / 100
        return jnp.where(state.time == params.bad_step, jnp.nan, observation)

    def observation_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (3,), jnp.float32)

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (1,), jnp.float32) if self.box else spaces.Discrete(2)


gymnax.registration.register("Counter", Counter)
