"""A text classifier: an encoder with a linear head on its mean-pooled states."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Int

HEAD = "classifier"  # the head's name in the parameter tree, `{"encoder": …, "classifier": …}`


class Classifier(nn.Module):
    """Logits from the mean of an encoder's states over the tokens that are not padding.

    Attributes:
        encoder: any Linen module `(input_ids, attention_mask=, deterministic=) -> [batch, length, hidden]`.
        num_labels: the number of classes.

    >>> Classifier(encoder, num_labels=2).apply({"params": params}, input_ids, attention_mask)  # doctest: +SKIP
    """

    encoder: nn.Module
    num_labels: int

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"]:
        states = self.encoder(input_ids, attention_mask=attention_mask, deterministic=deterministic)
        return nn.Dense(self.num_labels, name=HEAD)(mean_pool(states, attention_mask))


def mean_pool(
    states: Float[Array, "batch length hidden"], mask: Int[Array, "batch length"]
) -> Float[Array, "batch hidden"]:
    """The mean of each row's states where the mask is 1.

    >>> import jax.numpy as jnp
    >>> mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    weights = mask.astype(states.dtype)[..., None]
    return (states * weights).sum(axis=1) / weights.sum(axis=1)
