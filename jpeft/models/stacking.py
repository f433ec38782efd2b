"""Layers stacked along one axis, and the same layers one by one.

A scan over layers wants each leaf of all of them in one array, `model/layers/mlp/up_proj/kernel [layers, in, out]`: one
layer is compiled, whatever the depth. Layers one by one, `model/layers/0/mlp/up_proj/kernel [in, out]`, are read where
they lie: XLA CPU copies a layer's slice out of a stack before it multiplies by it, which costs a decoding step a third
of its speed. It is also how torch names them, and so how HuggingFace adapters do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft import tree
from jpeft.peft import Peft


def unstack(full: Mapping[str, Any], at: str = "model/layers") -> dict[str, Any]:
    """A tree of parameters or of an adapter with the layers below `at` one by one. Inverse of `stack`.

    Leaves elsewhere are the same objects; boxes with the names of axes are taken off.

    Raises:
      ValueError: the leaves below `at` do not have one first axis in common.

    >>> one_by_one = unstack({"model": {"layers": {"w": np.zeros((2, 3))}, "norm": 1.0}})
    >>> sorted(one_by_one["model"]["layers"]), one_by_one["model"]["layers"]["1"]["w"].shape
    (['0', '1'], (3,))
    """
    inside, outside = _split(full, at)
    lengths = {np.shape(leaf)[:1] for leaf in inside.values()}
    if len(lengths) > 1 or () in lengths:
        raise ValueError(f"the leaves below {at} are not stacked alike: first axes {sorted(lengths)}")
    for path, leaf in inside.items():
        for i in range(leaf.shape[0]):
            outside[*at.split("/"), str(i), *path] = _take(leaf, i)
    return tree.unflatten(outside)


def stack(one_by_one: Mapping[str, Any], at: str = "model/layers") -> dict[str, Any]:
    """Inverse of `unstack`.

    Raises:
      ValueError: the layers are not numbered from 0, or do not hold the same leaves in the same shapes.

    >>> stack({"model": {"layers": {"0": {"w": np.zeros(3)}, "1": {"w": np.ones(3)}}}})["model"]["layers"]["w"].shape
    (2, 3)
    """
    inside, outside = _split(one_by_one, at)
    layers: dict[str, dict[tuple[str, ...], Any]] = {}
    for (number, *path), leaf in inside.items():
        layers.setdefault(number, {})[tuple(path)] = leaf
    if layers.keys() != {str(i) for i in range(len(layers))}:
        raise ValueError(f"the layers below {at} are not numbered 0 to {len(layers) - 1}: {', '.join(sorted(layers))}")
    for path in sorted({path for leaves in layers.values() for path in leaves}):
        if lacking := [i for i, leaves in layers.items() if path not in leaves]:
            raise ValueError(
                f"{tree.join(path)} is missing in layer {lacking[0]} below {at}: layers that differ cannot be stacked; "
                "use the model with scan_layers=False"
            )
        leaves = [layers[str(i)][path] for i in range(len(layers))]
        if len({np.shape(leaf) for leaf in leaves}) > 1:
            raise ValueError(
                f"{tree.join(path)} has different shapes in the layers below {at}: they cannot be stacked; "
                "use the model with scan_layers=False"
            )
        outside[*at.split("/"), *path] = _put_together(leaves)
    return tree.unflatten(outside)


def _split(full: Mapping[str, Any], at: str) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]:
    """The leaves below `at` by the rest of their path, and the others."""
    start, inside, outside = tuple(at.split("/")), {}, {}
    for path, leaf in tree.flatten(meta.unbox(full)).items():
        if path[: len(start)] == start:
            inside[path[len(start) :]] = leaf
        else:
            outside[path] = leaf
    return inside, outside


def _take(leaf: Any, i: int) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[i]


def _put_together(leaves: list[Any]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)


def unroll(model: nn.Module, params: Any, peft: Peft | None = None, adapter: Any = None) -> tuple[Any, Any, Any, Any]:
    """A model of `jpeft.models` and its trees with the layers one by one, as generation on a CPU wants them.

    The Peft keeps its method, whose targets are paths in the stacked tree: save from the one it came from.

    Returns:
      `(model, params, peft, adapter)`; as they were, where the layers are not stacked.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> model, params, _, _ = unroll(model, params)
    >>> model.scan_layers, sorted(params["model"]["layers"])
    (False, ['0', '1'])
    """
    at = stacked_at(model)
    if at is None:
        return model, params, peft, adapter
    params = unstack(params, at)
    model = model.clone(scan_layers=False)
    if peft is None:
        return model, params, None, None
    return model, params, _unroll_peft(peft, model, at), unstack(adapter, at)


def stacked_at(model: Any) -> str | None:
    """Below which path a model's layers lie stacked; None where they do not, or the model is not one of ours.

    >>> stacked_at(nn.Dense(3)) is None
    True
    """
    return getattr(model, "stacked_layers", None)


def _unroll_peft(peft: Peft, model: nn.Module, at: str) -> Peft:
    actions = []
    for action in peft.actions:
        site = action.site
        for path in _numbered(site.path, at, site.stack[0][1] if site.stack else (site.stored or (0,))[0]):
            one = site if path == site.path else dataclasses.replace(
                site, path=path, stored=site.stored[1:], stack=site.stack[1:]
            )  # fmt: skip
            actions.append(dataclasses.replace(action, site=one))
    structure = {}
    for path, (shape, dtype) in peft.structure:
        for own in _numbered(path, at, shape[0] if shape else 0):
            structure[own] = (shape if own == path else shape[1:], dtype)
    return dataclasses.replace(peft, model=model, actions=tuple(actions), structure=tuple(sorted(structure.items())))


def _numbered(path: tree.Path, at: str, layers: int) -> list[tree.Path]:
    """A path below `at` with each layer's number in it; another as it is."""
    start = tuple(at.split("/"))
    if path[: len(start)] != start:
        return [path]
    return [(*start, str(i), *path[len(start) :]) for i in range(layers)]
