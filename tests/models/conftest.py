"""Set-up for all tests of models."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _fast_compilation():
    """Most of the time goes into compiling programs that run once, so they need not be optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
