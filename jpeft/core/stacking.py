"""Layers stacked along one axis, and the same layers one by one.

A scan over layers wants each leaf of all of them in one array, `model/layers/mlp/up_proj/kernel [layers, in, out]`: one
layer is compiled, whatever the depth. Layers one by one, `model/layers/0/mlp/up_proj/kernel [in, out]`, are read where
they lie: XLA CPU copies a layer's slice out of a stack before it multiplies by it, which costs a decoding step a third
of its speed. It is also how torch names them, and so how HuggingFace adapters do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import tree
from jpeft.core.peft import Peft, split_variables
from jpeft.core.quantized import Quantized, open_boxes, origin_of_stack
from jpeft.core.sites import Site, Survey

DIFFER = "layers that differ cannot be stacked; load the model with scan_layers=False"


def unstack(full: Mapping[str, Any], at: str = "model/layers") -> Any:
    """A tree of parameters or of an adapter with the layers below `at` one by one. Inverse of `stack`.

    Leaves elsewhere are the same objects; boxes with the names of axes are taken off. Quantized leaves stay quantized;
    each layer keeps the checksum of the stack that was quantized.

    Raises:
      ValueError: the leaves below `at` do not have one first axis in common, or are one by one already.

    >>> one_by_one = unstack({"model": {"layers": {"w": np.zeros((2, 3))}, "norm": 1.0}})
    >>> sorted(one_by_one["model"]["layers"]), one_by_one["model"]["layers"]["1"]["w"].shape
    (['0', '1'], (3,))
    """
    inside, outside = _split(full, at)
    if numbers := sorted(path[0] for path in inside if path[0].isdecimal()):
        raise ValueError(f"the layers below {at} are one by one already: there is {at}/{numbers[0]}")
    lengths = {np.shape(leaf)[:1] for leaf in inside.values()}
    if len(lengths) > 1 or () in lengths:
        raise ValueError(f"the leaves below {at} are not stacked alike: first axes {sorted(lengths)}")
    for path, leaf in inside.items():
        for i in range(leaf.shape[0]):
            outside[*at.split("/"), str(i), *path] = _take(leaf, i)
    return tree.like(tree.unflatten(outside), full)


def stack(one_by_one: Mapping[str, Any], at: str = "model/layers") -> Any:
    """Inverse of `unstack`.

    Raises:
      ValueError: the layers are not numbered from 0, or do not hold the same leaves in the same shapes and dtypes and
        quantized alike.

    >>> stack({"model": {"layers": {"0": {"w": np.zeros(3)}, "1": {"w": np.ones(3)}}}})["model"]["layers"]["w"].shape
    (2, 3)
    """
    inside, outside = _split(one_by_one, at)
    layers: dict[str, dict[tree.Path, Any]] = {}
    for (number, *path), leaf in inside.items():
        layers.setdefault(number, {})[tuple(path)] = leaf
    if layers.keys() != {str(i) for i in range(len(layers))}:
        raise ValueError(f"the layers below {at} are not numbered 0 to {len(layers) - 1}: {', '.join(sorted(layers))}")
    for path in sorted({path for leaves in layers.values() for path in leaves}):
        if lacking := [i for i, leaves in layers.items() if path not in leaves]:
            raise ValueError(f"{tree.join(path)} is missing in layer {lacking[0]} below {at}: {DIFFER}")
        leaves = [layers[str(i)][path] for i in range(len(layers))]
        for what, kinds in (
            ("shapes", {str(np.shape(leaf)) for leaf in leaves}),
            ("dtypes", {str(leaf.dtype) for leaf in leaves}),
            ("quantization", {_quantization(leaf) for leaf in leaves}),
        ):
            if len(kinds) > 1:
                raise ValueError(
                    f"{tree.join(path)} has different {what} in the layers below {at} ({', '.join(sorted(kinds))}): "
                    f"{DIFFER}"
                )
        outside[*at.split("/"), *path] = _put_together(leaves)
    return tree.like(tree.unflatten(outside), one_by_one)


def _split(full: Mapping[str, Any], at: str) -> tuple[dict[tree.Path, Any], dict[tree.Path, Any]]:
    """The leaves below `at` by the rest of their path, and the others."""
    start, inside, outside = tuple(at.split("/")), {}, {}
    for path, boxed in tree.flatten(full).items():
        leaf = open_boxes(boxed)
        if path[: len(start)] == start:
            inside[path[len(start) :]] = leaf
        else:
            outside[path] = leaf
    if () in inside:
        raise ValueError(f"{at} is a leaf, not a tree of layers")
    return inside, outside


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, Quantized):
        return jax.tree.map(lambda x: _take(x, i), leaf)
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[i]


def _quantization(leaf: Any) -> str:
    if not isinstance(leaf, Quantized):
        return "none"
    double = "" if leaf.groups is None else " with quantized scales"
    return f"{leaf.scheme} in blocks of {leaf.block} along {leaf.axis}{double}"


def _put_together(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], Quantized):
        stacked = jax.tree.map(lambda *parts: _put_together(parts), *leaves)
        if isinstance(stacked.origin, jax.ShapeDtypeStruct):
            return stacked
        rows = np.broadcast_to(origin_of_stack(stacked.origin), stacked.origin.shape)
        return dataclasses.replace(stacked, origin=jnp.asarray(rows))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)


def unroll(model: nn.Module, params: Any, peft: Peft | None = None, adapter: Any = None) -> tuple[Any, Any, Any, Any]:
    """A model of `jpeft.models` and its trees with the layers one by one, as generation on a CPU wants them.

    The Peft keeps its method, whose targets are paths in the stacked tree: save from the one it came from.

    Returns:
      `(model, params, peft, adapter)`; as they were, where the layers are not stacked.

    Raises:
      ValueError: the Peft was bound to another model, or a tree is not the model's or the Peft's.

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
    if peft is not None and peft.model != model:
        raise ValueError("the Peft was bound to another model than the one to unroll; give unroll its peft.model")
    if peft is not None and adapter is not None:
        peft.check(adapter)
        adapter = unstack(adapter, at)
    own, others = split_variables(params)
    one_by_one = unstack(own, at)
    if own is not params:  # all of the model's variables were given
        one_by_one = tree.like({**others, "params": one_by_one}, params)
    return model.clone(scan_layers=False), one_by_one, peft and unroll_peft(peft), adapter


def stacked_at(model: Any) -> str | None:
    """Below which path a model's layers lie stacked; None where they do not, or the model is not one of ours.

    >>> stacked_at(nn.Dense(3)) is None
    True
    """
    return getattr(model, "stacked_layers", None)


def unroll_peft(peft: Peft) -> Peft:
    """A Peft for the same model with its layers one by one, each with the settings that the stacked ones had.

    >>> import jpeft
    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    >>> ids = jnp.zeros((1, 1), int)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    >>> peft = unroll_peft(jpeft.LoRA(targets=["q_proj"]).bind(model, params, ids))
    >>> [site.name for site in peft.sites]
    ['model/layers/0/self_attn/q_proj', 'model/layers/1/self_attn/q_proj']
    """
    at = stacked_at(peft.model)
    if at is None:
        return peft
    actions = [dataclasses.replace(a, site=site) for a in peft.actions for site in unroll_site(a.site, at)]
    structure = {}
    for path, (shape, dtype) in peft.structure:
        for own in numbered(path, at, shape[0] if shape else 0):
            structure[own] = (shape if own == path else shape[1:], dtype)
    model = peft.model.clone(scan_layers=False)
    return dataclasses.replace(peft, model=model, actions=tuple(actions), structure=tuple(sorted(structure.items())))


def unroll_site(site: Site, at: str | None) -> list[Site]:
    """A site below `at` in each of the layers; another as it is. It is stacked first, or is a stacked leaf."""
    if at is None or not _below(site.path, at):
        return [site]
    layers = site.stack[0][1] if site.stack else site.stored[0]
    return [
        dataclasses.replace(site, path=path, stored=site.stored[1:], stack=site.stack[1:])
        for path in numbered(site.path, at, layers)
    ]


def unroll_survey(seen: Survey, at: str | None) -> Survey:
    """What the model would show with its layers one by one, from what it shows with them stacked: nothing is traced."""

    def each(sites: Sequence[Site]) -> tuple[Site, ...]:
        return tuple(one for site in sites for one in unroll_site(site, at))

    if at is None:
        return seen
    kinds = {kind: each(getattr(seen, kind)) for kind in ("weights", "outputs", "attentions", "leaves")}
    names = dict.fromkeys(name for sites in kinds.values() for site in sites for name in site.names)
    return Survey(**kinds, names=tuple(names))


def numbered(path: tree.Path, at: str, layers: int) -> list[tree.Path]:
    """A path below `at` with each layer's number in it; another as it is.

    >>> numbered(("layers", "mlp"), "layers", 2), numbered(("norm",), "layers", 2)
    ([('layers', '0', 'mlp'), ('layers', '1', 'mlp')], [('norm',)])
    """
    start = tuple(at.split("/"))
    if not _below(path, at):
        return [path]
    return [(*start, str(i), *path[len(start) :]) for i in range(layers)]


def _below(path: tree.Path, at: str) -> bool:
    start = tuple(at.split("/"))
    return path[: len(start)] == start
