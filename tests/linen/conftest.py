"""What every test of the Linen front end runs under."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compiles():
    """These models are tiny: XLA's optimizations cost more than they give."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
