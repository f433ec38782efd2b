"""A model whose vocabulary or head is another one than that of its source: what `save` writes for it.

`jpeft.models.vocabulary` makes such models.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# The fields of a configuration that `jpeft.models.vocabulary` changes.
_CHANGED = ("vocab_size", "tie_word_embeddings")
# Heads with a row for each token that a folder may hold beside an encoder, by the names of their tensors.
_HEADS = re.compile(r"(.*\.)?(lm_head|predictions|vocab_projector)\..*")


def with_config(model: Any, **fields: Any) -> Any:
    """The model with other fields of its configuration."""
    return model.clone(config=dataclasses.replace(model.config, **fields))


def mean_rows(x: np.ndarray, axis: int) -> np.ndarray:
    """The mean along an axis, which stays.

    In numpy and float64: every machine and every mesh computes the same bits, so that an adapter fits the base again.
    """
    return np.mean(x, axis=axis, dtype=np.float64, keepdims=True).astype(x.dtype)


def extended(xp: Any, x: Any, row: Any, axis: int, size: int) -> Any:
    """An array with an axis of `size`, whose new places hold `row`. `xp` is numpy or jax.numpy."""
    new = (*x.shape[:axis], size - x.shape[axis], *x.shape[axis + 1 :])
    return xp.concatenate([x, xp.broadcast_to(row, new)], axis)


def as_in_source(model: Any, config: Any) -> Any:
    """The model with the vocabulary and the tie of another configuration of its class."""
    return with_config(
        model, **{n: getattr(config, n) for n in _CHANGED if hasattr(config, n) and hasattr(model.config, n)}
    )


def update_config(fields: Mapping[str, Any], before: Any, after: Any) -> dict[str, Any]:
    """A `config.json` of the model `before`, changed to that of `after`.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> before, after = (Decoder(DecoderConfig(vocab_size=size)) for size in (8, 9))
    >>> update_config({"text_config": {"vocab_size": 8}}, before, after)
    {'text_config': {'vocab_size': 9}}
    """
    old, new = ({name: getattr(m.config, name, None) for name in _CHANGED} for m in (before, after))
    changed = {name: value for name, value in new.items() if value != old[name]}
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        return {**fields, **changed}
    tie = {name: value for name, value in changed.items() if name != "vocab_size"}  # of a vision-language model
    return {**fields, **tie, "text_config": {**text, **changed}}


def grow_head(name: str, x: np.ndarray, before: Any, after: Any) -> np.ndarray:
    """A tensor beside the model `before` as it stands beside `after`: a head over its tokens gets rows too."""
    old, new = before.config.vocab_size, after.config.vocab_size
    if old == new or x.shape[:1] != (old,) or not _HEADS.fullmatch(name):
        return x
    return extended(np, x, mean_rows(x, 0), 0, new)
