"""A text classifier: an encoder with a linear head on its mean-pooled states, or with the head of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft.models.bert import LOGITS, POOLED, STATES, Bert, sequence_logits

HEAD = "classifier"  # the head's name in the parameter tree, `{"encoder": …, "classifier": …}`
_LAYER_BEFORE = "pre_classifier"  # beside the head, in distilbert


class Classifier(nn.Module):
    """Logits from the mean of an encoder's states over the tokens that are not padding.

    Attributes:
        encoder: any Linen module `(input_ids, attention_mask=, deterministic=) -> [batch, length, hidden]`, which takes
            `position_ids` too, if they are given.
        num_labels: the number of classes.
        pretrained: whether the head is that of HuggingFace's sequence classifier, on the first token; see
            `with_own_head`.

    >>> Classifier(encoder, num_labels=2).apply({"params": params}, input_ids, attention_mask)  # doctest: +SKIP
    """

    encoder: nn.Module
    num_labels: int
    pretrained: bool = False

    @nn.nowrap
    def default_positions(self, input_ids: Int[Array, "batch length"]) -> Int[Array, "#batch length"]:
        """The positions of a call that gives none: the encoder's own."""
        own = getattr(self.encoder, "default_positions", None)
        return jnp.arange(input_ids.shape[1])[None] if own is None else own(input_ids)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        deterministic: bool = True,
        position_ids: Int[Array, "#batch length"] | None = None,
    ) -> Float[Array, "batch labels"]:
        options = {} if position_ids is None else {"position_ids": position_ids}
        states = self.encoder(input_ids, attention_mask=attention_mask, deterministic=deterministic, **options)
        if self.pretrained:
            features = states if states.ndim == 2 else states[:, 0]
            return sequence_logits(cast(Any, self.encoder), features, self.num_labels, deterministic)
        return nn.Dense(self.num_labels, name=HEAD)(mean_pool(states, attention_mask))


def with_own_head(model: Any, params: Mapping[str, Any]) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of an encoder that was loaded with its head. Inverse of `as_loaded`.

    >>> from jpeft.models.bert import BertConfig
    >>> model = Bert(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), num_labels=2, pooler=True)
    >>> with_own_head(model, {"embeddings": 1, "pooler": 2, "classifier": 3})[1]
    {'encoder': {'embeddings': 1, 'pooler': 2}, 'classifier': 3}
    """
    head = {name: part for name, part in params.items() if name in (HEAD, _LAYER_BEFORE)}
    encoder = {name: part for name, part in params.items() if name not in head}
    output = POOLED if model.config.model_type == "bert" else STATES
    bare = model.clone(num_labels=0, output=output)
    return Classifier(bare, model.num_labels, pretrained=True), {"encoder": encoder, **head}


def as_loaded(classifier: Classifier, params: Mapping[str, Any]) -> tuple[Bert, dict[str, Any]]:
    """The model and the tree of a classifier with its folder's head, as `save` takes them. Inverse of `with_own_head`.

    >>> from jpeft.models.bert import BertConfig
    >>> model = Bert(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), num_labels=2, pooler=True)
    >>> as_loaded(*with_own_head(model, {"embeddings": 1, "classifier": 3}))[1]
    {'embeddings': 1, 'classifier': 3}
    """
    model = classifier.encoder.clone(num_labels=classifier.num_labels, output=LOGITS)
    assert isinstance(model, Bert)
    return model, {**params["encoder"], **{name: part for name, part in params.items() if name != "encoder"}}


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


def without_parts(model: nn.Module, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder without its pooler and head, which do not change its states.

    >>> from jpeft.models.bert import BertConfig
    >>> without_parts(Bert(BertConfig(), pooler=True), {"embeddings": 1, "pooler": 2})[1]
    {'embeddings': 1}
    """
    if not isinstance(model, Bert):
        return model, dict(params)
    kept = {name: part for name, part in params.items() if name not in model.optional_parts}
    return model.clone(pooler=False, num_labels=0, output=STATES), kept
