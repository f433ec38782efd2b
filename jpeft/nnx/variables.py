"""The Variables that hold an adapter in a module."""

from __future__ import annotations

from flax import nnx


class AdapterParam(nnx.LoRAParam):
    """A trainable leaf of an adapter, of any method.

    It is an ``nnx.LoRAParam``, so that filters for that type, such as that of tunix's trainer, take it.

    >>> import jax.numpy as jnp
    >>> isinstance(AdapterParam(jnp.zeros(3)), nnx.LoRAParam)
    True
    """


# The two below are Params, so that the filters by which models slice their stacked layers take them too.


class FrozenAdapterParam(nnx.Param):
    """A leaf of an adapter that never trains, such as VeRA's projections."""


class DropoutKey(nnx.Param):
    """The data of a PRNG key for the dropout of one site."""
