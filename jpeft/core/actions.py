"""Actions: one method at one site, its leaves there, and the weights that actions merge into."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
      member: index of the method in its chain.
      shared: the key of the leaves that the method's sites share; empty if there are none.
      changes_bias: whether the method, merged, changes the bias beside a weight.
    """

    method: Any  # a jpeft.core.method.Method, whose functions depend on the kind of the site
    site: Site
    stored: tuple[str, ...]
    member: int = 0
    shared: str = ""
    changes_bias: bool = False

    @property
    def needs_call(self) -> bool:
        """Whether the method needs something of the model's own call: leaves that its sites share, or its arguments."""
        return bool(self.shared) or self.method.reads_context

    @property
    def mergeable(self) -> bool:
        """Whether the method can be merged at the site."""
        return self.method.mergeable(self.site)

    @property
    def mask(self) -> str:
        """The name of the leaf that tells on which of a scan's layers the method acts; it is stored unless on all."""
        return mask_name(self.method)

    @property
    def non_trainable(self) -> frozenset[str]:
        """Names of the leaves that never train."""
        return frozenset(n for n in self.stored if not self.method.trains(n)) | {self.mask}

    def apply(self, used: Leaves, stored: Leaves, base: Any, x: Any) -> jax.Array:
        """The method's output for one matrix; in a layer that it does not act on, that of the original operation.

        Args:
          used: the leaves that ``apply`` takes.
          stored: the leaves as they are stored.
          base: the original operation.
          x: the input.
        """
        if (on := stored.get(self.mask)) is None:
            return self.method.apply(used, base, x)
        on = on.reshape(())
        base = _Masked(base, on, x)
        y = self.method.apply(used, base, x)
        return jnp.where(on, y, base.output().astype(y.dtype))

    def leaf_path(self, name: str) -> Path:
        """Path of a leaf in the adapter."""
        return self.site.path if self.site.kind == "leaf" else (*self.site.path, self.site.prefix + name)


class _Masked:
    """The original operation where the method may not act: it then gets its own input. A module can run only once."""

    plain = False

    def __init__(self, base: Any, on: jax.Array, x: Any):
        self.base, self.on, self.x, self.outputs = base, on, x, []

    def __call__(self, z: Any) -> jax.Array:
        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(self.on, new, old.astype(new.dtype))

        self.outputs.append(self.base(z if z is self.x else jax.tree.map(chosen, z, self.x)))
        return self.outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def output(self) -> jax.Array:
        """The operation's output without the method, where that does not act."""
        return self.outputs[0] if self.outputs else self.base(self.x)


def mask_name(method: Any) -> str:
    """See `Action.mask`."""
    return f"{method.slug}_layers"


def acts_on(site: Site) -> np.ndarray:
    """Whether a method acts on each matrix of a site, with the stacked axes in front."""
    mask = np.full((*(n for _, n in site.stack), *site.batch), site.layers is None)
    if site.layers:
        mask[list(site.layers) if site.stack else ...] = True
    return mask


def layer_mask(site: Site) -> np.ndarray:
    """Whether a method acts on each matrix of a site: ``[1]`` for each, stacked as the site's leaves are.

    A leaf without an axis of its own could not be stacked along any but the first.
    """
    mask = acts_on(site)[..., None]
    for i, (axis, _) in reversed(list(enumerate(site.stack))):
        mask = np.moveaxis(mask, i, axis + i if axis >= 0 else axis)
    return mask


def init_leaves(
    method: Any, site: Site, key: jax.Array, w: jax.Array | None, statistics: Leaves | None = None
) -> dict[str, jax.Array]:
    """Fresh leaves at a site as they are stored: ``init`` mapped over scanned layers and batch axes.

    Args:
      method: the method at the site.
      site: the site.
      key: a PRNG key.
      w: the base weight (for a "leaf" site, the leaf) as it is stored; None for a site without one.
      statistics: what was observed at the site, with the axes of its stack in front.
    """
    if site.kind == "leaf":
        return dict(method.init(key, site, w))
    sizes = [n for _, n in site.stack] + list(site.batch)
    keys = jax.random.split(key, math.prod(sizes)).reshape(*sizes, *key.shape) if sizes else key
    if site.kind == "weight" and site.geometry is not None:
        assert w is not None
        w = map_axes(site.geometry.view, len(site.stack))(stack_first(w, site.stack))
    else:
        w = None
    found = None if statistics is None else dict(statistics)

    def init(key: jax.Array, w: Any, found: Leaves | None) -> dict[str, Any]:
        return dict(method.init(key, site, w) if method.observes is None else method.init(key, site, w, found))

    leaves = map_axes(init, len(sizes))(keys, w, found)
    out = {n: stack_back(x, site.stack) for n, x in leaves.items()}
    return out if site.layers is None else out | {mask_name(method): jnp.asarray(layer_mask(site))}


# --- one matrix -------------------------------------------------------------------------------------------------------


def used_leaves(action: Action, shared: Leaves, leaves: Leaves) -> dict[str, Any]:
    """The leaves that ``apply`` and ``merge`` take, for one matrix: ``expand`` in at least float32."""
    leaves = dict(leaves)
    if (on := leaves.pop(action.mask, None)) is not None:
        on = on.reshape(())
        # Where the method does not act, its leaves may be zeros, whose norms have no gradient.
        leaves = {n: jnp.where(on, x, _neutral(x.dtype)) for n, x in leaves.items()}
    if not action.method.expands:
        return dict(leaves)
    return dict(action.method.expand(action.site, _wide(shared), _wide(leaves)))


def _neutral(dtype: Any) -> jax.Array:
    return jnp.asarray(0.01 if jnp.issubdtype(dtype, jnp.floating) else 0, dtype)


def cast_leaves(leaves: Leaves, dtype: Any, uncast: Collection[str] = ()) -> dict[str, jax.Array]:
    """The leaves, with floating ones cast to ``dtype``, but for those named ``uncast``."""
    return {k: v if k in uncast or not _is_floating(v) else v.astype(dtype) for k, v in leaves.items()}


def _wide(leaves: Leaves) -> dict[str, jax.Array]:
    return {k: v.astype(widened(v.dtype)) if _is_floating(v) else v for k, v in leaves.items()}


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@dataclass(frozen=True, eq=False)
class Active:
    """An action in a call: its leaves as they are stored, those that its sites share, and the model's arguments."""

    action: Action
    leaves: Leaves
    shared: Leaves
    context: Mapping[str, Any]

    @property
    def site(self) -> Site:
        return self.action.site

    def used(self, leaves: Leaves, dtype: Any) -> Leaves:
        """The leaves that ``apply`` takes, for one matrix, from its stored ones."""
        return cast_leaves(used_leaves(self.action, self.shared, leaves), dtype, self.action.method.uncast)


def merge_matrix(
    action: Action, shared: Leaves, leaves: Leaves, w: jax.Array, b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The merged weight ``[in, out]`` and bias ``[out]`` of one matrix.

    They are in at least float32, as low precision would round the change, and then the sum.
    """
    used = used_leaves(action, shared, leaves)
    wide = widened(w.dtype)
    old = w.astype(wide), None if b is None else b.astype(wide)
    out = action.method.merge(cast_leaves(used, wide), *old)
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{action.method.name}.merge(leaves, w, b) must return (w, b), got {type(out).__name__}")
    if action.mask not in leaves:
        return out
    # A bias that is given back stays the same object, by which `changes_bias` tells.
    on, kept = leaves[action.mask].reshape(()), out[1] is old[1]
    w, b = jax.tree.map(functools.partial(jnp.where, on), out, old)
    return w, old[1] if kept else b


def changes_bias(action: Action, shared: Leaves, leaves: Leaves) -> bool:
    """Whether a method, merged, changes the bias. Abstract.

    Args:
      action: the method at a site.
      shared: its shared leaves; may be abstract.
      leaves: its leaves there as they are stored; may be abstract.

    Raises:
      ValueError: it would add a bias to a module that has none.
      TypeError: ``merge`` returns something else than a weight and a bias.
    """
    site, method = action.site, action.method

    def one(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape[len(site.batch) :], x.dtype)

    first = {n: jax.eval_shape(lambda x: stack_first(x, site.stack), x) for n, x in leaves.items()}
    matrix = {n: one(jax.ShapeDtypeStruct(x.shape[len(site.stack) :], x.dtype)) for n, x in first.items()}
    w = jax.ShapeDtypeStruct((site.inputs, site.outputs), jnp.float32)
    b = jax.ShapeDtypeStruct((site.outputs,), jnp.float32) if site.bias else None
    traced, shapes = jax.make_jaxpr(functools.partial(merge_matrix, action), return_shape=True)(shared, matrix, w, b)
    new_w, new_b = shapes
    for name, new, old in (("weight", new_w, w), ("bias", new_b, b)):
        if new is not None and old is not None and new.shape != old.shape:
            raise TypeError(f"{method.name}.merge: the {name} of {site.name!r} is {old.shape}, got {new.shape}")
    if new_b is not None and b is None:
        raise ValueError(
            f"{method.name} adds a bias at {site.name!r}, whose module has none to merge it into; leave it out with "
            f"exclude=[{site.name!r}]"
        )
    return b is not None and traced.jaxpr.outvars[-1] is not traced.jaxpr.invars[-1]


# --- weights as they are stored ---------------------------------------------------------------------------------------


def by_weight(actions: Iterable[Action], via: Sequence[str]) -> dict[Path, list[Action]]:
    """The actions on weights whose site takes one of the paths ``via``, by the weight's path."""
    out: dict[Path, list[Action]] = {}
    for action in actions:
        if action.site.kind == "weight" and action.site.via in via:
            out.setdefault(action.site.weight_path, []).append(action)
    return out


def merge_layer(
    actions: Sequence[Action], shared: Sequence[Leaves], leaves: Sequence[Leaves], w: jax.Array, b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The merged weight and bias of one layer, in their stored shapes and dtypes.

    Args:
      actions: the actions on the weight, in order.
      shared: for each, the leaves that its sites share.
      leaves: for each, its leaves at this layer.
      w: the weight.
      b: the bias, or None.
    """
    for action, common, own in zip(actions, shared, leaves, strict=True):
        geom = action.site.geometry
        assert geom is not None
        merge = map_axes(functools.partial(merge_matrix, action, common), len(geom.batch))
        m, c = merge(own, geom.view(w), None if b is None else geom.view_bias(b))
        w = geom.unview(m).astype(w.dtype)
        b = None if b is None else geom.unview_bias(c, b.shape).astype(b.dtype)
    return w, b


def merge_stored(
    actions: Sequence[Action], shared: Sequence[Leaves], leaves: Sequence[Mapping[str, Any]], stored: Any, bias: Any
) -> tuple[Any, Any]:
    """The merged weight and bias of all layers, in their stored layout and box. ``bias`` may be None."""
    stack = actions[0].site.stack
    first = jax.tree.map(lambda x: stack_first(x, stack), [meta.unbox(own) for own in leaves])
    w = stack_first(jnp.asarray(dequantize_leaf(stored)), stack)
    b = None if bias is None else stack_first(jnp.asarray(meta.unbox(bias)), stack)
    merged, added = map_axes(functools.partial(merge_layer, actions, shared), len(stack))(first, w, b)
    back = None if bias is None else box_as(bias, stack_back(added, stack))
    return box_as(stored, stack_back(merged, stack)), back
