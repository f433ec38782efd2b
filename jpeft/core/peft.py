"""Peft: a method bound to a model. The sites found, and pure functions of trees."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer

from jpeft.core.actions import Action, by_weight, expand_leaves, init_leaves, merge_leaf
from jpeft.core.adapter_placement import box_like, leaf_sharding
from jpeft.core.frontend import FrontEnd
from jpeft.core.method import Method, slugs
from jpeft.core.placement import place, replicated_like
from jpeft.core.quantized import Quantized, requantize_leaf
from jpeft.core.sites import BOX, FUSED, MERGE, Site
from jpeft.core.summary import Row, summary
from jpeft.core.tree import (
    FROZEN,
    TRAINABLE,
    Path,
    Tree,
    flatten,
    join,
    like,
    map_with_path,
    nearest,
    peek,
    split_variables,
    unflatten,
)

Structure = tuple[tuple[Path, tuple[tuple[int, ...], str]], ...]


@functools.partial(jax.jit, static_argnums=0)
def _init_jitted(action: Action, key: jax.Array, w: Any) -> dict[str, jax.Array]:
    # Jitted so that a weight that `init` does not use is neither viewed nor sent to the device; sites that differ in
    # nothing but their path share the trace. The box is opened inside: a quantized weight would be dequantized.
    return init_leaves(action.method, action.site, key, None if w is None else meta.unbox(w))


@dataclass(frozen=True, eq=False)
class Peft:
    """A method bound to a model: static and hashable, with pure functions of trees.

    Attributes:
      model: the module, unchanged.
      method: the method that was bound.
      frontend: runs the model's kind of module.
      actions: one method at one site each.
      structure: path, shape and dtype of every adapter leaf.
      shared_paths: the adapter leaves that belong to no single site.
      base_size: number of parameters of the base.
    """

    model: Any
    method: Method
    frontend: FrontEnd
    actions: tuple[Action, ...]
    structure: Structure
    shared_paths: tuple[Path, ...]
    base_size: int

    def __hash__(self) -> int:
        return hash((self.method, self.structure))  # not the model: a config in its fields may have no hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Peft):
            return NotImplemented
        same = self.model is other.model or self.model == other.model
        return same and self.actions == other.actions and self.structure == other.structure

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the method acts."""
        return tuple(a.site for a in self.actions)

    @property
    def non_trainable_paths(self) -> frozenset[Path]:
        """Adapter leaves that never train."""
        own = {a.leaf_path(n) for a in self.actions for n in a.stored if n in a.method.non_trainable}
        never = {slug: m.non_trainable for slug, m in zip(slugs(self.method), self.method.methods(), strict=True)}
        return frozenset(own | {path for path in self.shared_paths if path[1] in never[path[0]]})

    def leaf_sites(self) -> dict[Path, tuple[Site | None, Any]]:
        """For every adapter leaf, the site whose base weight it follows and its axes' roles; or (None, None)."""
        out: dict[Path, tuple[Site | None, Any]] = dict.fromkeys(self.shared_paths, (None, None))
        for action in self.actions:
            follows = action.site.kind in ("weight", "leaf")
            for name in action.stored:
                roles = action.method.roles.get(name, () if action.site.kind == "leaf" else None)
                out[action.leaf_path(name)] = (action.site, roles) if follows else (None, None)
        return out

    # --- trees ------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array, params: Tree) -> Any:
        """A fresh adapter: a small tree in the container type of ``params``; the base is only read.

        Args:
          key: a PRNG key. Each site's leaves depend on it and on the site's path alone.
          params: the base tree. Leaves that are sharded or boxed give their sharding and names to the adapter's;
            if they are ``jax.ShapeDtypeStruct``s, so are the adapter's.
        """
        tree, _ = split_variables(params)
        base = flatten(tree)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base)):
            shapes = {p: jax.ShapeDtypeStruct(s, jnp.dtype(d)) for p, (s, d) in self.structure}
            return like(unflatten(self.place_like_base(shapes, base)), tree)
        leaves: dict[Path, Any] = {}
        for i, (slug, member) in enumerate(zip(slugs(self.method), self.method.methods(), strict=True)):
            if any(p[0] == slug for p in self.shared_paths):
                sites = [a.site for a in self.actions if a.member == i]
                shared = member.shared(_fold(key, slug), sites)
                leaves |= {(slug, n): x for n, x in shared.items()}
        for action in self.actions:
            w = _base_leaf(base, action.site.weight_path) if action.site.stored else None
            placeless = replace(action, site=replace(action.site, path=()))
            own = _init_jitted(placeless, _fold(key, f"{action.member}/{action.site.name}"), w)
            leaves |= {action.leaf_path(n): x for n, x in own.items()}
        return like(unflatten(self.place_like_base(leaves, base)), tree)

    def place_like_base(self, leaves: Mapping[Path, Any], base: Mapping[Path, Any]) -> dict[Path, Any]:
        """Leaves with the shardings and boxes that follow from the base's."""
        out, replicated = {}, replicated_like(base.values())
        for path, (site, roles) in self.leaf_sites().items():
            leaf, sharding = leaves[path], leaf_sharding(base, site, roles) or replicated
            if sharding is not None and not isinstance(leaf, Tracer):
                leaf = place(leaf, sharding)
            out[path] = box_like(base, site, roles, leaf)
        return out

    def labels(self, tree: Tree) -> Any:
        """ "trainable" or "frozen" for every leaf of a tree: the full one, the adapter alone, or the base.

        >>> # tx = optax.multi_transform({"trainable": adam, "frozen": optax.set_to_zero()}, peft.labels(full))
        """
        trainable = {p for p, _ in self.structure} - self.non_trainable_paths
        return map_with_path(lambda p, _: TRAINABLE if p in trainable else FROZEN, tree)

    def check(self, adapter: Tree) -> dict[Path, Any]:
        """The adapter's leaves by path, if they are what this Peft expects.

        Raises:
          ValueError: a leaf that is missing, extra or misshapen, by path.
        """
        leaves, expected = flatten(adapter), dict(self.structure)
        for path in expected.keys() - leaves.keys():
            raise ValueError(
                f"the adapter lacks {join(path)!r} ({len(leaves)} leaves, {len(expected)} expected); if it is half of "
                "a partition, combine it with the other half first"
            )
        for path in leaves.keys() - expected.keys():
            raise ValueError(f"the adapter has a leaf {join(path)!r} that {self.method.name} does not"
                             f"{nearest(join(path), map(join, expected))}")  # fmt: skip
        for path, (shape, _) in expected.items():
            got = np.shape(meta.unbox(leaves[path]))
            if got != shape:
                raise ValueError(f"adapter leaf {join(path)!r} has shape {got}, expected {shape}")
        return leaves

    def merge(self, params: Tree, adapter: Tree, *, requantize: bool = False) -> Any:
        """A plain base tree for the unmodified model, which then computes what `apply` does.

        Pure and differentiable in the adapter. Weights keep their dtype; the sum is made in at least float32.

        Args:
          requantize: a quantized weight that something is merged into comes back dequantized, and equal to `apply`;
            True quantizes it again, as it was. That rounds the sum: NF4 moves a weight by up to 0.14 of the largest in
            its block, int4 by 1/14, int8 by 1/254 and float8 by 1/28 (and by up to 0.2 % more for quantized scales).
            In few bits most of what an adapter learned is rounded back to the codes it was learned over; merge into the
            unquantized base and quantize that instead, where there is one.

        Raises:
          ValueError: a method that changes more than weights (prefix tuning, bottleneck adapters) cannot be merged; or
            nothing that was merged into is quantized, and ``requantize`` asks for it.
        """
        for action in self.actions:
            if not action.method.mergeable:
                raise ValueError(
                    f"{action.method.name} at {action.site.name!r} cannot be merged: it is no change of a weight; "
                    "use peft.apply or peft.module"
                )
        tree, _ = split_variables(params)
        out = self.replaced(flatten(tree), leaves := self.check(adapter))
        used, found = self.expanded(leaves), False
        for path, actions in by_weight(self.actions, (FUSED, BOX, MERGE)).items():
            own, stored = [used[a] for a in actions], out[path]
            out[path] = merge_leaf(actions, own, stored, False)
            if requantize and isinstance(stored, Quantized):
                out[path], found = requantize_leaf(stored, out[path]), True
            bias = actions[0].site.bias_path
            if bias in out and any(a.method.changes_bias for a in actions):
                out[bias] = merge_leaf(actions, own, out[bias], True)
        if requantize and not found:
            raise ValueError("requantize=True, but no weight that the adapter changes is quantized")
        return like(unflatten(out), tree)

    def replaced(self, base: dict[Path, Any], leaves: Mapping[Path, Any]) -> dict[Path, Any]:
        """The base with the adapter's copies in place of its leaves ("leaf" sites). Checks that all sites are there."""
        for action in self.actions:
            if action.site.kind == "leaf":
                path = action.site.path
                _base_leaf(base, path)
                # The adapter's copy may be wider than the base (a float32 master of a bfloat16 leaf): the model gets
                # the dtype it had.
                value, dtype = meta.unbox(leaves[path]), peek(base[path]).dtype
                base[path] = meta.replace_boxed(leaves[path], value.astype(dtype))
            elif action.site.stored:
                _base_leaf(base, action.site.weight_path)
        return base

    def expanded(self, leaves: Mapping[Path, Any]) -> dict[Action, dict[str, Any]]:
        """The leaves that each action takes: as stored, unless its method computes them from shared ones."""
        out, names = {}, slugs(self.method)
        for action in self.actions:
            shared = {p[1]: meta.unbox(leaves[p]) for p in self.shared_paths if p[0] == names[action.member]}
            own = {n: leaves[action.leaf_path(n)] for n in action.stored}
            out[action] = expand_leaves(action.method, action.site, shared, own)
        return out

    def by_owner(self) -> dict[Path, tuple[Action, ...]]:
        """The actions that take place in a module's call, by the module's path."""
        out: dict[Path, tuple[Action, ...]] = {}
        for action in self.actions:
            if action.site.kind != "leaf":
                out[action.site.path] = (*out.get(action.site.path, ()), action)
        return out

    # --- running ----------------------------------------------------------------------------------------------------

    def apply(self, params: Tree, adapter: Tree, *inputs: Any, **kwargs: Any) -> Any:
        """Outputs of the model under the adapter: ``model.apply`` with one more tree.

        Args:
          params: the base tree, or all variables ``{"params": ..., "batch_stats": ...}``.
          adapter: as from `init`.
          *inputs, **kwargs: as for ``model.apply`` (rngs, mutable, method, capture_intermediates, ...).
        """
        return self.frontend.run(self, params, adapter, inputs, kwargs)

    def overlay(self, params: Tree, adapter: Tree) -> Any:
        """The tree that the unmodified model runs on inside `intercept`.

        It is ``combine(params, adapter)`` and, where a site needs it, more: a box around a weight that no module call
        explains, the merged weight where a model reads another module's variables, shared leaves expanded.
        """
        return self.frontend.overlay(self, params, adapter)

    def intercept(self) -> AbstractContextManager[None]:
        """The bare interceptor, for code that calls modules itself: ``model.generate(ids, params=full)``.

        Give the model ``combine(params, adapter)`` or, if `summary` shows sites other than fused, ``overlay(...)``.
        Enter it inside the function that is jitted: a function traced before ignores it.
        """
        return self.frontend.intercept(self)

    @property
    def module(self) -> Any:
        """A module with the model's own call signature, whose parameters are ``combine(params, adapter)``."""
        return self.frontend.module(self)

    def split(self, full: Tree) -> tuple[Any, Any]:
        """``(params, adapter)`` from a full tree. Inverse of ``combine(params, adapter)`` but for base leaves that the
        adapter took the place of: they are the adapter's in both."""
        expected = {p for p, _ in self.structure}
        leaves = flatten(full)
        own = {a.leaf_path(n) for a in self.actions if a.site.kind == "leaf" for n in a.stored}
        params = {p: x for p, x in leaves.items() if p not in expected or p in own}
        return like(unflatten(params), full), like(unflatten({p: leaves[p] for p in expected if p in leaves}), full)

    def summary(self) -> str:
        """What is trained, as a table: per site its path, shape, rank, bytes and the path taken; then totals."""
        sizes = dict(self.structure)
        rows = [
            Row(a.site, a.method.name, a.method.columns(), [sizes[a.leaf_path(n)] for n in a.stored])
            for a in self.actions
        ]
        shared = [(path, sizes[path]) for path in self.shared_paths]
        frozen = [sizes[path] for path in self.non_trainable_paths]
        return summary(rows, shared, frozen, self.base_size)


def _base_leaf(base: Mapping[Path, Any], path: Path) -> Any:
    if path not in base:
        raise ValueError(
            f"params lack {join(path)!r}, which this Peft was bound to{nearest(join(path), map(join, base))}"
        )
    return base[path]


def _fold(key: jax.Array, text: str) -> jax.Array:
    """A key that depends on a name: the same in every process, unlike Python's hash."""
    return jax.random.fold_in(key, zlib.crc32(text.encode()))


def adapter_shardings(peft: Peft, params: Tree) -> Any:
    """The sharding of every adapter leaf, for ``jax.jit(..., out_shardings=...)`` or ``jax.device_put``.

    Args:
      peft: the bound method.
      params: the base tree, its leaves carrying ``NamedSharding``s (arrays or ``jax.ShapeDtypeStruct``s).

    Returns:
      A tree like the adapter with a ``NamedSharding`` for every leaf. Optimizer state made from a sharded adapter
      takes the same.

    Raises:
      ValueError: no base leaf carries a ``NamedSharding``.
    """
    base = flatten(params)
    replicated = replicated_like(base.values())
    if replicated is None:
        raise ValueError("no leaf of params carries a NamedSharding: jpeft.shard puts it on a mesh")
    out = {path: leaf_sharding(base, site, roles) or replicated for path, (site, roles) in peft.leaf_sites().items()}
    return like(unflatten(out), params)
