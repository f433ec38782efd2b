"""Products with low-rank matrices, in the fastest form for each backend."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jpeft.core import backend
from jpeft.core.method import Linear

_FEW = 32  # below this number of tokens, a call is assumed to be decoding, which nobody differentiates


def low_rank(
    base: Linear, x: Any, a: Float[Array, "in rank"], b: Float[Array, "rank out"], dropout: float = 0.0
) -> Float[Array, "*tokens out"]:
    """``base(x) + (dropout(x) a) b``.

    Computed as ``x (w + a b)`` if it is differentiated and that is less work: this saves sums of the size of the
    activations, for the output and for the gradient of the input (RunLoRA, Cherniuk et al. 2023,
    https://arxiv.org/abs/2312.03415). The gradients of ``a`` and ``b`` are low-rank products in both forms.
    """
    dropped = base.dropout(x, dropout)
    if dropped is x and _summed_is_less(base, x, a, b):
        # Checkpointed: the backward pass computes the sum again instead of keeping a second copy of the weights.
        y, bias = jax.checkpoint(_summed)(x, base.weight, a, b), base.bias
        return y if bias is None else y + bias
    y = base(x)
    return y + (narrow(dropped, a) @ b).astype(y.dtype)


def _summed_is_less(base: Linear, x: Any, a: jax.Array, b: jax.Array) -> bool:
    """Whether ``x (w + a b)`` and its gradients need less memory traffic than ``x w + (x a) b``, and round no worse.

    Measured on CPU only. False in low precision, where the sum of weights would round small updates away.
    """
    if not isinstance(x, jax.Array) or not base.plain or not backend.flatten_tokens():
        return False
    tokens, sides = x.size // x.shape[-1], (a.shape[0], b.shape[1])
    return x.dtype.itemsize >= 4 and tokens * sum(sides) > 2 * sides[0] * sides[1]


@jax.custom_jvp
def _summed(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + narrow(x, a) @ b  # without gradients, the sum would serve a single product


def _summed_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    # The derivative of `w + a b` by itself would compute a gradient of the size of w.
    x, w, a, b = primals
    dx, dw, da, db = (None if type(t) is SymbolicZero else t for t in tangents)
    # The batch axis of size one keeps `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` from saving this
    # product of weights.
    summed = w + (a[None] @ b[None])[0]
    terms = [] if dx is None else [dx @ summed]
    terms += [] if dw is None else [x @ dw]
    terms += [] if da is None else [narrow(x, da) @ b]
    terms += [] if db is None else [narrow(x, a) @ db]
    return x @ summed, functools.reduce(jnp.add, terms)


_summed.defjvp(_summed_jvp, symbolic_zeros=True)


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
