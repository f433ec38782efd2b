"""Losses for language models that never hold the logits of all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped


def chunked_cross_entropy(
    logits: Callable[[Float[Array, "batch chunk hidden"]], Float[Array, "batch chunk vocabulary"]],
    states: Float[Array, "batch length hidden"],
    targets: Int[Array, "batch length"],
    weight: Shaped[Array, "batch length"],
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sum of cross-entropies, and that of right guesses, with the logits of ``chunk`` tokens at a time.

    The backward pass makes a chunk's logits again. Logits are [batch, length, vocabulary] in float32, and as much again
    for their gradient: 805 MB for 4 x 256 tokens of 49,152 and their gradient, where this holds some chunks.

    Args:
      logits: the output head, e.g. ``lambda h: peft.apply(params, adapter, h, method="logits")``.
      states: what it takes. targets: the right token at each position.
      weight: how much each position counts; where it is 0 the target is not looked at.
      chunk: tokens at a time, over the whole batch; at least one position of each row. Where the rows are spread over
        devices, each has its part of a chunk, and gathers a sharded head for each chunk: give as many times more.

    >>> head, states = jnp.eye(4), jnp.zeros((2, 6, 4))
    >>> total, _ = chunked_cross_entropy(lambda h: h @ head, states, jnp.ones((2, 6), int), jnp.ones((2, 6)), chunk=4)
    >>> round(float(total) / 12, 4)  # log 4
    1.3863
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    batch, length = targets.shape
    size = min(length, max(1, chunk // batch))
    padding = -length % size

    def pieces(x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [pieces, batch, size, ...]: the batch stays an axis, so its sharding does."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(states: jax.Array, targets: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits(states).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.where(weight == 0, 0, targets))
        weight = weight.astype(jnp.float32)
        return (losses * weight).sum(), jnp.where(scores.argmax(-1) == targets, weight, 0).sum()

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*piece)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), tuple(map(pieces, (states, targets, weight))))[0]
