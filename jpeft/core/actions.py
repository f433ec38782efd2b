"""Actions: one method at one site, its leaves there, and the weights that actions merge into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jpeft.core.method import Leaves, widened
from jpeft.core.quantized import dequantize_leaf
from jpeft.core.sites import Site, map_axes, stack_back, stack_first
from jpeft.core.tree import Path, box_as


@dataclass(frozen=True)
class Action:
    """One method at one site.

    Attributes:
      method: the method, with the overrides for this site applied.
      site: the site.
      stored: names of the leaves in the adapter.
      names: names of the leaves that ``apply`` and ``merge`` take: the stored ones, unless the method expands them.
      member: index of the method in its chain.
    """

    method: Any  # a jpeft.core.method.Method, whose functions depend on the kind of the site
    site: Site
    stored: tuple[str, ...]
    names: tuple[str, ...]
    member: int = 0

    def leaf_path(self, name: str) -> Path:
        """Path of a leaf, in the adapter or, if expanded, in the tree that the model runs on."""
        return self.site.path if self.site.kind == "leaf" else (*self.site.path, self.site.prefix + name)


def init_leaves(method: Any, site: Site, key: jax.Array, w: jax.Array | None) -> dict[str, jax.Array]:
    """Fresh leaves at a site as they are stored: ``init`` mapped over scanned layers and batch axes.

    Args:
      w: the base weight (for a "leaf" site, the leaf) as it is stored; None for a site without one.
    """
    if site.kind == "leaf":
        return dict(method.init(key, site, w))
    sizes = [n for _, n in site.stack] + list(site.batch)
    keys = jax.random.split(key, math.prod(sizes)).reshape(*sizes, *key.shape) if sizes else key
    if site.kind == "weight" and site.geometry is not None:
        assert w is not None
        w = map_axes(site.geometry.view, len(site.stack))(stack_first(w, site.stack))
        leaves = map_axes(lambda k, w: dict(method.init(k, site, w)), len(sizes))(keys, w)
    else:
        leaves = map_axes(lambda k: dict(method.init(k, site, None)), len(sizes))(keys)
    return {n: stack_back(x, site.stack) for n, x in leaves.items()}


def expand_leaves(method: Any, site: Site, shared: Leaves, leaves: Leaves) -> dict[str, Any]:
    """The leaves that ``apply`` and ``merge`` take: ``expand`` mapped over scanned layers and batch axes."""
    if not method.expands:
        return dict(leaves)
    first = {n: stack_first(meta.unbox(x), site.stack) for n, x in leaves.items()}
    expand = map_axes(lambda own: dict(method.expand(shared, own)), len(site.stack) + len(site.batch))
    return {n: stack_back(x, site.stack) for n, x in expand(first).items()}


def by_weight(actions: Iterable[Action], via: Sequence[str]) -> dict[Path, list[Action]]:
    """The actions on weights whose site takes one of the paths ``via``, by the weight's path."""
    out: dict[Path, list[Action]] = {}
    for action in actions:
        if action.site.kind == "weight" and action.site.via in via:
            out.setdefault(action.site.weight_path, []).append(action)
    return out


def merge_weight(actions: Sequence[Action], leaves: Sequence[Leaves], w: jax.Array) -> jax.Array:
    """The merged weight of one layer, in its stored shape and dtype."""
    for action, own in zip(actions, leaves, strict=True):
        geom = action.site.geometry
        assert geom is not None
        merge = map_axes(action.method.merge, len(geom.batch))
        # In at least float32: low precision would round the change, and then the sum.
        wide = widened(w.dtype)
        m = merge(cast_leaves(own, wide), geom.view(w.astype(wide)))
        w = geom.unview(m).astype(w.dtype)
    return w


def merge_bias(actions: Sequence[Action], leaves: Sequence[Leaves], b: jax.Array) -> jax.Array:
    """The merged bias of one layer."""
    for action, own in zip(actions, leaves, strict=True):
        geom = action.site.geometry
        assert geom is not None
        wide = widened(b.dtype)
        m = map_axes(action.method.merge_bias, len(geom.batch))(cast_leaves(own, wide), geom.view_bias(b.astype(wide)))
        b = geom.unview_bias(m, b.shape).astype(b.dtype)
    return b


def merge_leaf(actions: Sequence[Action], leaves: Sequence[Mapping[str, Any]], stored: Any, is_bias: bool) -> Any:
    """The merged weight (or bias) of all layers, in its stored layout and box."""
    stack = actions[0].site.stack
    first = jax.tree.map(lambda x: stack_first(x, stack), [meta.unbox(own) for own in leaves])
    w = stack_first(jnp.asarray(dequantize_leaf(stored)), stack)
    merge = merge_bias if is_bias else merge_weight
    merged = map_axes(lambda own, w: merge(actions, own, w), len(stack))(first, w)
    return box_as(stored, stack_back(merged, stack))


def cast_leaves(leaves: Leaves, dtype: Any) -> dict[str, jax.Array]:
    """The leaves, with floating ones cast to ``dtype``."""
    return {k: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in leaves.items()}
