"""Products with low-rank matrices, in the fastest form for each backend."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from jpeft.core import backend
from jpeft.core.method import Linear
from jpeft.methods.families.summed import added

_FEW = 32  # below this number of tokens, a call is assumed to be decoding, which nobody differentiates


def low_rank(
    base: Linear, x: Any, a: Float[Array, "in rank"], b: Float[Array, "rank out"], dropout: float = 0.0
) -> Float[Array, "*tokens out"]:
    """``base(x) + (dropout(x) a) b``.

    Computed as ``x (w + a b)`` if it is differentiated and that is less work, see `jpeft.methods.families.summed`. The
    gradients of ``a`` and ``b`` are low-rank products in both forms.
    """
    sides = a.shape[0], b.shape[1]
    return added(base, x, (a, b), _factored, _multiplied, sides, dropout=dropout, recompute=False)


def _factored(x: Any, factors: tuple[jax.Array, jax.Array]) -> jax.Array:
    a, b = factors
    return narrow(x, a) @ b


def _multiplied(factors: tuple[jax.Array, jax.Array]) -> jax.Array:
    # The batch axis of size one keeps `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` from saving this
    # product of weights.
    a, b = factors
    return (a[None] @ b[None])[0]


def narrow(x: Any, a: Float[Array, "in rank"]) -> Float[Array, "*tokens rank"]:
    """``x @ a`` for a matrix with few columns.

    XLA's CPU backend is slow at the gradient ``x.T @ dy`` of ``a``, and rewrites other forms into this one. Behind an
    optimization barrier, ``dy.T @ x`` stays (forward and backward, 2,048 tokens: 384 -> 8 -> 384 3.1 ms instead of 4.5,
    1536 -> 8 -> 384 6.3 instead of 12.1). On other backends it is the plain product.
    """
    if not isinstance(x, jax.Array) or not backend.flatten_tokens() or x.size // x.shape[-1] < _FEW:
        return x @ a
    transposed = jax.lax.optimization_barrier(a.T)
    return jax.lax.dot_general(x, transposed, (((x.ndim - 1,), (1,)), ((), ())))
