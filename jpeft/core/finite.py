"""The check that merged weights are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jpeft.core.quantized import dequantize_leaf
from jpeft.core.tree import Path, all_finite, join, peek
from jpeft.errors import MergeError

_all_finite = jax.jit(all_finite)  # compiled, it is one reduction that stores no array of booleans


def is_finite(leaf: Any) -> jax.Array | None:
    """Whether all numbers of a leaf are finite, still on its way from the device; None if the leaf cannot tell.

    Traced, abstract and integer leaves cannot.

    >>> bool(is_finite(jnp.ones(2))), is_finite(jnp.arange(2))
    (True, None)
    """
    x = dequantize_leaf(peek(leaf))
    if isinstance(x, Tracer | jax.ShapeDtypeStruct) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    return _all_finite(x)


def check_merged(
    flags: Mapping[Path, jax.Array | None], base: Mapping[Path, Any], leaves: Callable[[Path], Mapping[Path, Any]]
) -> None:
    """Checks the weights that a merge changed.

    Args:
      flags: `is_finite` of each.
      base: the base's leaves by path.
      leaves: the leaves of the adapter that change a weight.

    Raises:
      MergeError: a merged weight holds NaN or infinities. It names the weight, and where they come from: a leaf of the
        base or of the adapter, or the range of the weight's dtype.
    """
    bad = next((path for path, flag in flags.items() if flag is not None and not flag), None)
    if bad is None:
        return
    reason = f"the result is beyond the range of {peek(base[bad]).dtype.name}, the dtype of the base's weight"
    for owner, found in (("adapter", leaves(bad)), ("base", {bad: base[bad]})):
        for path, leaf in found.items():
            if (flag := is_finite(leaf)) is not None and not flag:
                reason = f"the {owner}'s {join(path)!r} holds NaN or infinity"
    raise MergeError(f"{join(bad)!r} cannot be merged: {reason}; safe=False merges it all the same")
