"""Products with low-rank matrices, each in the form that the backend is fast at."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jpeft.core import backend
from jpeft.core.method import Linear

_FEW = 32  # tokens, up to which nobody differentiates: what is generated one by one


def low_rank(
    base: Linear, x: Any, a: Float[Array, "in rank"], b: Float[Array, "rank out"], dropout: float = 0.0
) -> Float[Array, "*tokens out"]:
    """``base(x) + (dropout(x) a) b``.

    Where it is differentiated, and that is less work, as ``x (w + a b)``: then nothing of the size of the activations
    is added, neither to the output nor to the gradient of the input (RunLoRA, Cherniuk et al. 2023,
    https://arxiv.org/abs/2312.03415). The gradients of ``a`` and ``b`` are the low-rank ones in both forms.
    """
    dropped = base.dropout(x, dropout)
    if dropped is x and _summed_is_less(base, x, a, b):
        # Checkpointed, so that the backward pass makes the sum again instead of keeping a second copy of the weights.
        y, bias = jax.checkpoint(_summed)(x, base.weight, a, b), base.bias
        return y if bias is None else y + bias
    y = base(x)
    return y + (narrow(dropped, a) @ b).astype(y.dtype)


def _summed_is_less(base: Linear, x: Any, a: jax.Array, b: jax.Array) -> bool:
    """Whether ``x (w + a b)`` and its gradients read and write less than ``x w + (x a) b``, and round no worse.

    Measured on CPU alone, and not in low precision, where the sum of weights would swallow small updates.
    """
    if not isinstance(x, jax.Array) or not base.plain or not backend.flatten_tokens():
        return False
    tokens, sides = x.size // x.shape[-1], (a.shape[0], b.shape[1])
    return x.dtype.itemsize >= 4 and tokens * sum(sides) > 2 * sides[0] * sides[1]


@jax.custom_jvp
def _summed(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + narrow(x, a) @ b  # without gradients the sum would be made for one product alone


def _summed_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    # The plain derivative of `w + a b` would make a gradient of the size of w before it contracts it.
    x, w, a, b = primals
    dx, dw, da, db = (None if type(t) is SymbolicZero else t for t in tangents)
    # With a batch axis of one, so that `jax.checkpoint_policies.dots_with_no_batch_dims_saveable`, which keeps what was
    # made from activations, does not keep this.
    summed = w + (a[None] @ b[None])[0]
    terms = [] if dx is None else [dx @ summed]
    terms += [] if dw is None else [x @ dw]
    terms += [] if da is None else [narrow(x, da) @ b]
    terms += [] if db is None else [narrow(x, a) @ db]
    return x @ summed, functools.reduce(jnp.add, terms)


_summed.defjvp(_summed_jvp, symbolic_zeros=True)


def narrow(x: Any, a: Float[Array, "in rank"]) -> Float[Array, "*tokens rank"]:
    """``x @ a`` for a matrix of few columns.

    XLA's CPU backend is slow at the gradient of ``a`` as ``x.T @ dy``, and rewrites every formulation into it; behind a
    barrier, ``dy.T @ x`` stays what it is (forward and backward, 2,048 tokens: 384 -> 8 -> 384 4.5 ms against 3.1,
    1536 -> 8 -> 384 12.1 against 6.3). Elsewhere it is the plain product.
    """
    if not isinstance(x, jax.Array) or not backend.flatten_tokens() or x.size // x.shape[-1] < _FEW:
        return x @ a
    transposed = jax.lax.optimization_barrier(a.T)
    return jax.lax.dot_general(x, transposed, (((x.ndim - 1,), (1,)), ((), ())))
