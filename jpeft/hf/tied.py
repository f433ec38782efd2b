"""Heads that are tied to an embedding.

Here they are one weight, ``model/embed_tokens/embedding``, and what changes it changes both. In torch they are two
modules, ``model.embed_tokens`` and ``lm_head``, and PEFT changes only the one that is named, unless the configuration
has ``ensure_weight_tying``: then a file holds the embedding's tensors once more as the head's, and the function is the
same as ours.

A model says by an attribute ``tied_modules`` which of torch's modules are one weight here: head and embedding by their
paths, e.g. ``{"lm_head": "model/embed_tokens"}``, or ``{}``. Without it, nothing is known of the model's ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.core.interchange import HFSpec
from jpeft.errors import AdapterError
from jpeft.hf.config import Config, named
from jpeft.hf.names import ROOT, Names
from jpeft.hf.tensors import TensorFile

_BASE = {"weight": "weight", "base_layer.weight": "base_layer.weight"}  # base weights, which are not transposed


def tied_names(model: Any, names: Names) -> dict[str, str]:
    """The torch modules that are tied: the head, and its embedding."""
    tied: Mapping[str, str] = getattr(model, "tied_modules", {})
    return {names.torch(tuple(head.split("/"))): names.torch(tuple(own.split("/"))) for head, own in tied.items()}


def head_tensors(tied: Mapping[str, str], spec: HFSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors to write for tied heads; empty if their embeddings have none. Inverse of `merge_heads`.

    Args:
      tied: as from `tied_names`.
      spec: the method's form.
      tensors: the other tensors of the file.

    Raises:
      ValueError: the method has no tensors for a head.
    """
    of_head = {own: head for head, own in {**_BASE, **spec.tied}.items()}
    out = {}
    for head, embedding in tied.items():
        start = f"{ROOT}{embedding}."
        for name, x in tensors.items():
            if name.startswith(start):
                suffix = name.removeprefix(start)
                if not spec.tied or suffix not in of_head:
                    raise ValueError(
                        f"{embedding!r} has no counterpart in HuggingFace PEFT: {spec.peft_type} cannot change the "
                        f"head {head!r} with it, to which it is tied"
                    )
                out[f"{ROOT}{head}.{of_head[suffix]}"] = x if suffix in _BASE or spec.ties else x.T
    return out


def merge_heads(model: Any, config: Config, file: TensorFile) -> None:
    """Moves the tensors of tied heads in a file to their embeddings, in place. Inverse of `head_tensors`.

    Raises:
      AdapterError: only one of embedding and head changes, or they change differently; or the configuration ties them
        and the model does not say whether it does.
    """
    if config.ensure_weight_tying and not hasattr(model, "tied_modules"):
        raise AdapterError(
            f"{file.path.parent}: ensure_weight_tying=True is not supported for {type(model).__name__}, only for a "
            "decoder of jpeft.models; merge it in PEFT instead"
        )
    for head, embedding in tied_names(model, Names()).items():
        _merge_head(_in_file(head, file), _in_file(embedding, file), config, file)


def _in_file(module: str, file: TensorFile) -> str:
    """The name of a module in a file, where a wrapper's may stand before it."""
    last = module.rpartition(".")[2]
    return next((m for m in sorted(file.modules) if named([last], m)), module)


def _merge_head(head: str, embedding: str, config: Config, file: TensorFile) -> None:
    if not (config.ensure_weight_tying or config.spec.ties):
        for module in (embedding, head):
            if module in file.adapted or (module in file.others and config.saves(module)):
                raise AdapterError(
                    f"{file.path} changes {module!r} alone, but this model's head and embedding are one weight: train "
                    "it in PEFT with ensure_weight_tying=True, load a base that is not tied, or leave it out: "
                    f"ignore=[{module!r}]"
                )
    if head in file.adapted and (difference := config.difference(embedding, head)):
        raise AdapterError(f"{file.path.parent}: {difference}; expected the same of tied modules")
    of_embedding = {**_BASE, **config.spec.tied}
    for kind in (file.adapted, file.others):
        for suffix, x in kind.pop(head, {}).items():
            name = f"{ROOT}{head}.{suffix}"
            if suffix not in of_embedding:
                raise AdapterError(f"{file.path} has {name!r}, which no tied head has")
            own, x = kind.setdefault(embedding, {}), x if suffix in _BASE or config.spec.ties else x.T
            if not np.array_equal(own.setdefault(of_embedding[suffix], x), x):
                raise AdapterError(
                    f"{file.path}: {name!r} differs from the tensor of {embedding!r}, but this model's head and "
                    "embedding are one weight: load a base that is not tied"
                )
