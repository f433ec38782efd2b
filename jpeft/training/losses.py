"""Losses of language models that never materialize the logits of all positions."""

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
    """The weighted sums of cross-entropies and of correct predictions, with logits for ``chunk`` tokens at a time.

    The backward pass recomputes the logits of a chunk. Logits are [batch, length, vocabulary] in float32, and so is
    their gradient: 805 MB for both with 4 x 256 tokens and a vocabulary of 49,152. This holds those of a few chunks.

    Args:
      logits: the output head, e.g. ``lambda h: peft.apply(params, adapter, h, method="logits")``.
      states: the hidden states that the head takes.
      targets: the correct token at each position.
      weight: the weight of each position; the target of a position with weight 0 is ignored.
      chunk: tokens per chunk, over the whole batch; at least one position of each row. With rows sharded over devices,
        each device has its part of every chunk and gathers a sharded head once per chunk: multiply ``chunk`` by the
        number of shards.

    Returns:
      The sum of ``weight`` times the cross-entropy, and the sum of ``weight`` where the argmax is the target.

    Raises:
      ValueError: ``chunk`` is below 1.

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

    def chunks(x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [chunks, batch, size, ...]; the batch stays an axis and keeps its sharding."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_sums(states: jax.Array, targets: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits(states).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.where(weight == 0, 0, targets))
        weight = weight.astype(jnp.float32)
        return (losses * weight).sum(), jnp.where(scores.argmax(-1) == targets, weight, 0).sum()

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, chunk_sums(*part)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), tuple(map(chunks, (states, targets, weight))))[0]
