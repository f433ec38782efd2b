"""Products with a changed weight, low-rank or of another form, in the fastest way for each backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jpeft.core import backend
from jpeft.core.method import Linear

_FEW = 32  # below this number of tokens, a call is assumed to be decoding, which nobody differentiates
Form = Callable[[jax.Array, Any], jax.Array]  # (x, leaves) -> x change, with few operations
Change = Callable[[Any], jax.Array]  # leaves -> the change, as a matrix [in, out]


def low_rank(
    base: Linear, x: Any, a: Float[Array, "in rank"], b: Float[Array, "rank out"], dropout: float = 0.0
) -> Float[Array, "*tokens out"]:
    """``base(x) + (dropout(x) a) b``.

    Computed as ``x (w + a b)`` if it is differentiated and that is less work, see `added`. The gradients of ``a`` and
    ``b`` are low-rank products in both forms.
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


def flat(x: Float[Array, "*tokens features"]) -> jax.Array:
    """``x`` as ``[tokens, features]`` where products of that form are faster: XLA CPU; elsewhere as it is."""
    return x.reshape(-1, x.shape[-1]) if backend.flatten_tokens() else x


def added(
    base: Linear,
    x: Any,
    leaves: Any,
    form: Form,
    change: Change,
    sides: tuple[int, int],
    *,
    dropout: float = 0.0,
    recompute: bool = True,
) -> Float[Array, "*tokens out"]:
    """``base(x) + form(dropout(x), leaves)``, or the same as one product if that is less work.

    Args:
      base: the base's operation.
      x: its input.
      leaves: what the change depends on, arrays of any structure.
      form: the product of the input and the change.
      change: the change itself.
      sides: the sizes of the weight.
      dropout: the rate on the form's input.
      recompute: whether the backward pass computes the form again, rather than keep what it computes on the way.
    """
    dropped = base.dropout(x, dropout)
    if dropped is x and _is_less(base, x, sides):
        return _summed(base, x, leaves, form, change)
    y = base(x)
    return y + (jax.checkpoint(form) if recompute else form)(dropped, leaves).astype(y.dtype)


def _is_less(base: Linear, x: Any, sides: tuple[int, int]) -> bool:
    """Whether ``x (w + change)`` and its gradients need less memory traffic than ``x w + form``, and round no worse.

    Measured on CPU only. False in low precision, where the sum of weights would round small updates away.
    """
    if not isinstance(x, jax.Array) or not base.plain or not backend.flatten_tokens():
        return False
    tokens = x.size // x.shape[-1]
    return x.dtype.itemsize >= 4 and tokens * sum(sides) > 2 * sides[0] * sides[1]


def _summed(base: Linear, x: jax.Array, leaves: Any, form: Form, change: Change) -> Float[Array, "*tokens out"]:
    """``x (w + change(leaves)) + b`` if it is differentiated; the gradients of the leaves are those of the form.

    This saves sums of the size of the activations, for the output and for the gradient of the input (RunLoRA, Cherniuk
    et al. 2023, https://arxiv.org/abs/2312.03415), and a product of the size of the weight for its gradient.
    """
    # Checkpointed: the backward pass computes the sum again instead of keeping a second copy of the weights.
    y, bias = jax.checkpoint(functools.partial(_changed_product, form, change))(x, base.weight, leaves), base.bias
    return y if bias is None else y + bias


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _changed_product(form: Form, change: Change, x: jax.Array, w: jax.Array, leaves: Any) -> jax.Array:
    return x @ w + form(x, leaves).astype(x.dtype)  # without gradients, the sum would serve a single product


def _changed_product_jvp(form: Form, change: Change, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    # The derivative of `w + change` by itself would compute a gradient of the size of w.
    x, w, leaves = primals
    dx, dw, _ = tangents
    changed = w + change(leaves).astype(w.dtype)
    terms = [] if _is_zero(dx) else [dx @ changed]
    terms += [] if _is_zero(dw) else [x @ dw]
    own, structure = jax.tree.flatten(leaves)
    moves = jax.tree.leaves(tangents[2])
    if moving := [i for i, move in enumerate(moves) if not _is_zero(move)]:

        def of_moving(*values: jax.Array) -> jax.Array:
            given = dict(zip(moving, values, strict=True))
            return form(x, structure.unflatten([given.get(i, leaf) for i, leaf in enumerate(own)])).astype(x.dtype)

        terms.append(jax.jvp(of_moving, [own[i] for i in moving], [moves[i] for i in moving])[1])
    return x @ changed, functools.reduce(jnp.add, terms)


_changed_product.defjvp(_changed_product_jvp, symbolic_zeros=True)


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is SymbolicZero
