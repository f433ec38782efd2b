"""The start of torch's linear layers, which HuggingFace PEFT gives most factors."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def kaiming(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int, dtype: str) -> Array:
    """Uniform numbers in ±1/sqrt(fan_in), as from torch's ``kaiming_uniform_`` with ``a=sqrt(5)``.

    They are drawn in float32, so that all dtypes start from the same numbers.
    """
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
