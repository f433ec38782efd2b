"""Conversion between layers that are stacked along one axis and unstacked layers.

A scan over layers needs each leaf of all of them in one array, `model/layers/mlp/up_proj/kernel [layers, in, out]`: one
layer is compiled, whatever the depth. Unstacked layers, `model/layers/0/mlp/up_proj/kernel [in, out]`, are faster to
decode with on a CPU: XLA CPU copies a layer's slice out of a stack before it multiplies by it, which costs a decoding
step a third of its speed. torch, and so HuggingFace adapters, also have a name for each layer.

A model supports this through two attributes: `stacked_layers`, the path below which its layers are stacked or None, and
`unrolled()`, the same model with unstacked layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import tree
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized, open_boxes, origin_of_stack
from jpeft.core.sites import Site, Survey

DIFFER = "layers that differ cannot be stacked; load the model with scan_layers=False"


def unstack(full: Mapping[str, Any], at: str = "model/layers") -> Any:
    """A tree of parameters or of an adapter with the layers below `at` unstacked. Inverse of `stack`.

    Leaves elsewhere are the same objects; boxes that name axes are removed. Quantized leaves stay quantized, and each
    layer keeps the checksum of the original stack.

    Args:
      full: the tree with stacked layers.
      at: the path below which the layers are stacked.

    Raises:
      ValueError: the leaves below `at` differ in the size of their first axis, or are one by one already.

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
            outside[*at.split("/"), str(i), *path] = _layer_of(leaf, i)
    return tree.like(tree.unflatten(outside), full)


def stack(one_by_one: Mapping[str, Any], at: str = "model/layers") -> Any:
    """A tree with the layers below `at` stacked. Inverse of `unstack`.

    Args:
      one_by_one: the tree with unstacked layers.
      at: the path below which the layers are.

    Raises:
      ValueError: the layers are not numbered from 0, or differ in their leaves or in the shape, dtype or quantization
        of one.

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
        if missing := [i for i, leaves in layers.items() if path not in leaves]:
            raise ValueError(f"{tree.join(path)} is missing in layer {missing[0]} below {at}: {DIFFER}")
        leaves = [layers[str(i)][path] for i in range(len(layers))]
        _check_alike(path, leaves, at)
        outside[*at.split("/"), *path] = _stack_leaves(leaves)
    return tree.like(tree.unflatten(outside), one_by_one)


def leaf_of(leaves: Mapping[tree.Path, Any], path: tree.Path, at: str | None) -> Any:
    """The leaf at a path of the unstacked tree, from the leaves of the tree as it is, by path.

    Args:
      leaves: the leaves, those below `at` with the layers stacked.
      path: the path in the unstacked tree.
      at: the path below which the layers are stacked; None if they are not.

    >>> leaf_of({("model", "layers", "w"): np.arange(6).reshape(2, 3)}, ("model", "layers", "1", "w"), "model/layers")
    array([3, 4, 5])
    """
    if at is None or not _is_below(path, at):
        return leaves[path]
    depth = len(at.split("/"))
    return _layer_of(open_boxes(leaves[(*path[:depth], *path[depth + 1 :])]), int(path[depth]))


def _check_alike(path: tree.Path, leaves: Sequence[Any], at: str) -> None:
    properties = {
        "shapes": {str(np.shape(leaf)) for leaf in leaves},
        "dtypes": {str(leaf.dtype) for leaf in leaves},
        "quantization": {_quantization(leaf) for leaf in leaves},
    }
    for name, values in properties.items():
        if len(values) > 1:
            raise ValueError(
                f"{tree.join(path)} has different {name} in the layers below {at} ({', '.join(sorted(values))}): "
                f"{DIFFER}"
            )


def _split(full: Mapping[str, Any], at: str) -> tuple[dict[tree.Path, Any], dict[tree.Path, Any]]:
    """The leaves below `at` by the rest of their path, and the others."""
    depth, inside, outside = len(at.split("/")), {}, {}
    for path, boxed in tree.flatten(full).items():
        leaf = open_boxes(boxed)
        if _is_below(path, at):
            inside[path[depth:]] = leaf
        else:
            outside[path] = leaf
    if () in inside:
        raise ValueError(f"{at} is a leaf, not a tree of layers")
    return inside, outside


def _layer_of(leaf: Any, i: int) -> Any:
    if isinstance(leaf, Quantized):
        return jax.tree.map(lambda x: _layer_of(x, i), leaf)
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[i]


def _quantization(leaf: Any) -> str:
    if not isinstance(leaf, Quantized):
        return "none"
    double = "" if leaf.groups is None else " with quantized scales"
    return f"{leaf.scheme} in blocks of {leaf.block} along {leaf.axis}{double}"


def _stack_leaves(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], Quantized):
        stacked = jax.tree.map(lambda *parts: _stack_leaves(parts), *leaves)
        if isinstance(stacked.origin, jax.ShapeDtypeStruct):
            return stacked
        rows = np.broadcast_to(origin_of_stack(stacked.origin), stacked.origin.shape)
        return dataclasses.replace(stacked, origin=jnp.asarray(rows))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)


def unroll(model: Any, params: Any, peft: Peft | None = None, adapter: Any = None) -> tuple[Any, Any, Any, Any]:
    """A model of `jpeft.models` and its trees with unstacked layers, for fast generation on a CPU.

    The Peft keeps its method, whose targets are paths in the stacked tree: save from the original one.

    Returns:
      `(model, params, peft, adapter)`; unchanged if the layers are not stacked.

    Raises:
      ValueError: the Peft was bound to another model, or a tree does not fit the model or the Peft.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> model, params, _, _ = unroll(model, params)
    >>> model.scan_layers, sorted(params["model"]["layers"])
    (False, ['0', '1'])
    """
    at = stacked_at(model)
    if at is None:
        return model, params, peft, adapter
    if peft is not None and peft.model != model:
        raise ValueError("the Peft was bound to another model than the one to unroll; pass peft.model")
    if peft is not None and adapter is not None:
        peft.check(adapter)
        adapter = unstack(adapter, at)
    own, others = tree.split_variables(params)
    one_by_one = unstack(own, at)
    if own is not params:  # all of the model's variables were given
        one_by_one = tree.like({**others, "params": one_by_one}, params)
    return model.unrolled(), one_by_one, peft and unroll_peft(peft), adapter


def stacked_at(model: Any) -> str | None:
    """The path below which a model's layers are stacked; None if there is none, and for models of other libraries.

    >>> stacked_at(object()) is None
    True
    """
    return getattr(model, "stacked_layers", None)


def unroll_peft(peft: Peft) -> Peft:
    """A Peft for the same model with unstacked layers, each with the settings of the stacked ones.

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
    return dataclasses.replace(
        peft,
        model=peft.model.unrolled(),
        actions=tuple(actions),
        structure=tuple(sorted(structure.items())),
        weights=tuple(own for site in peft.weights for own in unroll_site(site, at)),
    )


def unroll_site(site: Site, at: str | None) -> list[Site]:
    """The sites of the single layers for a site below `at`; any other site alone.

    The outermost stacking of a site below `at` is that of the layers; a site without one is a stacked leaf.
    """
    if at is None or not _is_below(site.path, at):
        return [site]
    count = site.stack[0][1] if site.stack else site.stored[0]
    layers = [None if site.layers is None else tuple({i} & {*site.layers}) for i in range(count)]
    return [
        dataclasses.replace(
            site,
            path=path,
            stored=site.stored[1:],
            stack=site.stack[1:],
            layers=layers[i],
            projections=_unrolled_projections(site.projections, at, count, i),
        )
        for i, path in enumerate(numbered(site.path, at, count))
    ]


def _unrolled_projections(projections: Any, at: str, layers: int, layer: int) -> Any:
    """The projections of an attention in one layer; see `Site.projections`."""
    if isinstance(projections, str):
        return projections

    def own(path: tree.Path | None) -> tree.Path | None:
        return None if path is None else numbered(path, at, layers)[layer if _is_below(path, at) else 0]

    return tuple(dataclasses.replace(p, weight=own(p.weight), bias=own(p.bias)) for p in projections)


def unroll_survey(seen: Survey, at: str | None) -> Survey:
    """The survey of the model with unstacked layers, from that of the stacked model, without tracing it."""

    def each(sites: Sequence[Site]) -> tuple[Site, ...]:
        return tuple(own for site in sites for own in unroll_site(site, at))

    if at is None:
        return seen
    kinds: dict[str, Any] = {kind: each(getattr(seen, kind)) for kind in ("weights", "outputs", "leaves")}
    names = dict.fromkeys(name for sites in kinds.values() for site in sites for name in site.names)
    unused = tuple(own for path in seen.unused for own in numbered(path, at, _layers_of(seen, at)))
    return Survey(
        **kinds,
        names=tuple(names),
        unused=unused,
        find_attentions=lambda: (each(seen.attentions), seen.hidden_attentions),
    )


def _layers_of(seen: Survey, at: str) -> int:
    return next((s.stored[0] for s in seen.leaves if _is_below(s.path, at)), 0)


def numbered(path: tree.Path, at: str, layers: int) -> list[tree.Path]:
    """The paths in the single layers for a path below `at`; any other path alone.

    >>> numbered(("layers", "mlp"), "layers", 2), numbered(("norm",), "layers", 2)
    ([('layers', '0', 'mlp'), ('layers', '1', 'mlp')], [('norm',)])
    """
    start = tuple(at.split("/"))
    if not _is_below(path, at):
        return [path]
    return [(*start, str(i), *path[len(start) :]) for i in range(layers)]


def _is_below(path: tree.Path, at: str) -> bool:
    start = tuple(at.split("/"))
    return path[: len(start)] == start
