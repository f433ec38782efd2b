"""A decoder's head that is tied to its embedding.

Here they are one weight, ``model/embed_tokens/embedding``, and what changes it changes both. In torch they are two
modules, ``model.embed_tokens`` and ``lm_head``, and PEFT changes only the one that it is told to, unless the
configuration has ``ensure_weight_tying``: then a file holds the embedding's tensors once more as the head's, and the
function is the same as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from jpeft.errors import AdapterError
from jpeft.hf import config as hf
from jpeft.hf.names import ROOT, Names
from jpeft.models.decoder import Decoder

_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
# The head multiplies by the transpose of what the embedding looks up in: W + A^T B^T against W^T + B A.
_OF_EMBEDDING = {
    "lora_A.weight": "lora_embedding_B",
    "lora_B.weight": "lora_embedding_A",
    "weight": "weight",
    "base_layer.weight": "base_layer.weight",
}
_OF_HEAD = {embedding: head for head, embedding in _OF_EMBEDDING.items()}


def embedding_name(names: Names) -> str:
    """The torch module that is the embedding."""
    return names.torch(("model", _EMBEDDING))


def head_name(names: Names) -> str:
    """The torch module that is the head."""
    return names.torch((_HEAD,))


def head(model: Any, names: Names, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a file must hold for the tied head, where it has anything for the embedding. Inverse of `merge_head`."""
    if not _is_tied(model):
        return {}
    start = f"{ROOT}{embedding_name(names)}."
    own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    return {f"{ROOT}{head_name(names)}.{_OF_HEAD[s]}": _turned(s, x) for s, x in own.items()}


def merge_head(
    model: Any,
    config: hf.LoraConfig,
    path: FilePath,
    lora: dict[str, dict[str, np.ndarray]],
    others: dict[str, dict[str, np.ndarray]],
) -> None:
    """Takes the tied head's tensors out of what a file holds, in place: they are the embedding's. Inverse of `head`.

    Raises:
      AdapterError: only one of embedding and head changes, or they change differently; or the model is none of which
        it is known whether it is tied.
    """
    if config.ensure_weight_tying and not isinstance(model, Decoder):
        raise AdapterError(
            f"{path.parent}: ensure_weight_tying=True is not supported for {type(model).__name__}, only for a decoder "
            "of jpeft.models; merge it in PEFT instead"
        )
    if not _is_tied(model):
        return
    modules = {*lora, *others}
    embedding = next((m for m in sorted(modules) if hf.named([_EMBEDDING], m)), f"model.{_EMBEDDING}")
    head = next((m for m in sorted(modules) if hf.named([_HEAD], m)), _HEAD)
    if not config.ensure_weight_tying:
        for module in (embedding, head):
            if module in lora or (module in others and config.saves(module)):
                raise AdapterError(
                    f"{path} changes {module!r} alone, but this model's head and embedding are one weight: train it in "
                    "PEFT with ensure_weight_tying=True, load a base that is not tied, or leave it out: "
                    f"ignore=[{module!r}]"
                )
    for of in ("rank", "alpha"):
        here, there = getattr(config, of)(embedding), getattr(config, of)(head)
        if head in lora and here != there:
            raise AdapterError(
                f"{path.parent}: {embedding!r} has {of} {here}, {head!r} has {there}; expected the same of tied modules"
            )
    for kind in (lora, others):
        for suffix, x in kind.pop(head, {}).items():
            if suffix not in _OF_EMBEDDING:
                raise AdapterError(f"{path} has {f'{ROOT}{head}.{suffix}'!r}, which no tied head has")
            x = _turned(suffix, x)
            own = kind.setdefault(embedding, {})
            if not np.array_equal(own.setdefault(_OF_EMBEDDING[suffix], x), x):
                raise AdapterError(
                    f"{path}: {f'{ROOT}{head}.{suffix}'!r} is not that of {embedding!r}, but this model's head and "
                    "embedding are one weight: load a base that is not tied"
                )


def _is_tied(model: Any) -> bool:
    return isinstance(model, Decoder) and model.config.tie_word_embeddings


def _turned(suffix: str, x: np.ndarray) -> np.ndarray:
    return x.T if suffix.startswith("lora_") else x
