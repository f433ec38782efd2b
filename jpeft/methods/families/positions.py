"""The positions of tokens in their rows, from the arguments of a model's call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Rows = tuple[int, int]  # batch and length

_MASKS = ("attention_mask", "decoder_attention_mask")


def rows_of(y: jax.Array, context: Mapping[str, Any], what: str) -> Rows:
    """The batch and length of a module's output ``[batch, length, features]``, or ``[batch * length, features]``.

    Args:
      y: the output.
      context: the arguments of the model's call. Where the tokens lie on one axis, an array ``[batch, length]`` of as
        many tokens tells.
      what: the method's name, for errors.

    Raises:
      ValueError: the output has no axis of positions, or nothing tells which.

    >>> rows_of(jnp.ones((6, 4)), {"input_ids": np.ones((2, 3), int)}, "LoReFT")
    (2, 3)
    """
    tokens = y.shape[:-1]
    if len(tokens) == 2:
        return tokens[0], tokens[1]
    if len(tokens) == 1:
        shapes = [np.shape(x) for x in context.values() if isinstance(x, jax.Array | np.ndarray)]
        for shape in (shape for n in (2, 3) for shape in shapes if len(shape) == n):
            if math.prod(shape[:2]) == tokens[0]:
                return shape[0], shape[1]
    raise ValueError(
        f"{what} needs the positions of tokens, and no argument of the model's call tells those of an output of shape "
        f"{y.shape}: it acts on outputs [batch, length, features]; leave this module out of its targets"
    )


def by_row(y: Float[Array, "*tokens features"], rows: Rows) -> Float[Array, "batch length features"]:
    """An output as ``[batch, length, features]``."""
    return y.reshape(*rows, y.shape[-1])


def real_tokens(context: Mapping[str, Any], rows: Rows, what: str) -> Bool[Array, "batch length"] | None:
    """Whether each token is no padding, by the call's attention mask; None if it has none.

    Raises:
      ValueError: it has one for each of two sequences of this shape, or one of another shape.

    >>> real_tokens({"attention_mask": np.array([[1, 1, 0]])}, (1, 3), "LoReFT").tolist()
    [[True, True, False]]
    """
    masks = {n: context[n] for n in _MASKS if context.get(n) is not None}
    if context.get("cached"):  # of transformers' caches, the mask is as long as these: the call's tokens go first
        masks = {n: x[:, : rows[1]] if np.ndim(x) == 2 else x for n, x in masks.items()}
    fitting = {n: x for n, x in masks.items() if np.shape(x) == rows}
    if len(fitting) > 1:
        raise ValueError(
            f"{what}: the call has {' and '.join(fitting)}, both {list(rows)}; which of them tells the padding here is "
            "not known: pad the two sequences to different lengths"
        )
    if masks and not fitting:
        shapes = ", ".join(f"{n} {np.shape(x)}" for n, x in masks.items())
        raise ValueError(f"{what} needs an attention mask [batch, length] = {list(rows)} here, got {shapes}")
    return jnp.asarray(next(iter(fitting.values())), bool) if fitting else None


def places(
    rows: Rows, real: Bool[Array, "batch length"] | None, segments: Int[Array, "batch length"] | None
) -> tuple[Int[Array, "#batch length"], Int[Array, "#batch length"]]:
    """The number of real tokens before and after each token, in its row or, with segments, in its segment.

    Args:
      rows: batch and length.
      real: which tokens are no padding; None for all.
      segments: the segment of each token, of several texts packed in one row; None for one text a row.

    >>> before, after = places((1, 5), jnp.array([[0, 1, 1, 1, 0]], bool), None)
    >>> before.tolist(), after.tolist()
    ([[0, 0, 1, 2, 3]], [[3, 2, 1, 0, 0]])
    >>> before, after = places((1, 5), None, jnp.array([[1, 1, 2, 2, 2]]))
    >>> before.tolist(), after.tolist()
    ([[0, 1, 0, 1, 2]], [[1, 0, 2, 1, 0]])
    """
    if real is None and segments is None:
        place = jnp.arange(rows[1])[None]
        return place, rows[1] - 1 - place
    own = (jnp.ones(rows, bool) if real is None else real).astype(jnp.int32)
    segments = None if segments is None else jnp.asarray(segments)
    through = jnp.cumsum(own, axis=1)  # real tokens up to each token, itself included
    first, last = jnp.zeros_like(through), through[:, -1:]
    if segments is not None:
        begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
        ends = jnp.diff(segments, axis=1, append=segments[:, -1:] - 1) != 0
        first = jax.lax.cummax(jnp.where(begins, through - own, 0), axis=1)
        last = jax.lax.cummin(jnp.where(ends, through, rows[1] + 1), axis=1, reverse=True)
    return through - own - first, last - through
