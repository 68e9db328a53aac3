"""What every module of tests needs, whatever it tests."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_goes_with_its_module():
    """JAX keeps all that it has compiled, in memory maps, and crashes where Linux gives a process no more (65,530). The
    tests of gymnax alone take a third of them."""
    yield
    jax.clear_caches()
