"""Peft: a method bound to a model, with its sites and pure functions of trees."""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer

from jpeft.core.actions import Action, by_weight, init_leaves, layer_mask, merge_stored
from jpeft.core.adapter_placement import box_like, leaf_sharding
from jpeft.core.arguments import adapter_leaves, check_order
from jpeft.core.entering import Entry, entries
from jpeft.core.finite import check_merged, is_finite
from jpeft.core.frontend import FrontEnd, is_bypassed
from jpeft.core.method import Method, slugs
from jpeft.core.placement import place, replicated_like
from jpeft.core.quantized import Quantized, requantize_leaf
from jpeft.core.rows import PerRow
from jpeft.core.rows import run as run_rows
from jpeft.core.sites import BOX, FUSED, MERGE, Site, map_axes, stack_first
from jpeft.core.statistics import check_statistics
from jpeft.core.summary import Member, Row, summary
from jpeft.core.targets import Matched
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
    unflatten,
)

Structure = tuple[tuple[Path, tuple[tuple[int, ...], str]], ...]


@functools.partial(jax.jit, static_argnums=0)
def _init_jitted(action: Action, key: jax.Array, w: Any, statistics: Any) -> dict[str, jax.Array]:
    # Jitted so that a weight that `init` does not use is neither viewed nor dequantized nor sent to the device. Sites
    # that differ only in their path share the compiled function.
    return init_leaves(action.method, action.site, key, None if w is None else meta.unbox(w), statistics)


@dataclass(frozen=True, eq=False)
class Peft:
    """A method bound to a model: static and hashable, with pure functions of trees.

    Attributes:
      model: the model, unchanged.
      method: the method.
      frontend: the front end that runs the model.
      actions: the method's actions, one per site and member of a chain.
      structure: path, shape and dtype of every adapter leaf.
      shared_paths: paths of the adapter leaves that several sites share.
      base_size: number of parameters of the base.
      left_alone: paths of the base's parameters of two or more axes that the method does not act on: embeddings, heads,
        what no target names, and what the model did not use in the call that it was bound with.
      weights: the model's weights, changed or not, as the survey found them.
      form: the form of the call that the method was bound with, see `jpeft.core.sites.Survey`.
      matched: for each member of a chain, how many sites the entries of its targets matched.
    """

    model: Any
    method: Method
    frontend: FrontEnd
    actions: tuple[Action, ...]
    structure: Structure
    shared_paths: tuple[Path, ...]
    base_size: int
    left_alone: tuple[str, ...] = ()
    weights: tuple[Site, ...] = ()
    form: Any = None
    matched: tuple[Sequence[Matched], ...] = ()

    def __hash__(self) -> int:
        return hash((self.method, self.structure))  # without the model, whose fields may be unhashable

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Peft):
            return NotImplemented
        same = self.model is other.model or self.model == other.model
        return same and self.actions == other.actions and self.structure == other.structure

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that the method acts on."""
        return tuple(a.site for a in self.actions)

    @property
    def non_trainable_paths(self) -> frozenset[Path]:
        """Paths of the adapter leaves that never train."""
        own = {a.leaf_path(n) for a in self.actions for n in a.stored if n in a.non_trainable}
        by_slug = dict(zip(slugs(self.method), self.method.methods(), strict=True))
        return frozenset(own | {path for path in self.shared_paths if not by_slug[path[0]].trains(path[1])})

    @property
    def mergeable(self) -> bool:
        """Whether an adapter can be merged into the base at every site."""
        return all(action.mergeable for action in self.actions)

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The members of the method that have to do with the model's own call."""
        return entries(self.method, self.actions, self.weights)

    @property
    def virtual_tokens(self) -> int:
        """The number of positions that the method adds to every sequence, and to a cache of keys and values."""
        return sum(member.virtual_tokens() for member in self.method.methods())

    @property
    def observes(self) -> bool:
        """Whether `init` needs statistics of data, from `jpeft.observe`."""
        return any(action.method.observes is not None for action in self.actions)

    @property
    def penalized(self) -> bool:
        """Whether a method has a loss of its own, see `penalty`."""
        return any(action.method.penalized for action in self.actions)

    def leaf_sites(self) -> dict[Path, tuple[Site | None, Any]]:
        """For every adapter leaf, the site whose weight it is sharded like and its axes' roles; or (None, None)."""
        out: dict[Path, tuple[Site | None, Any]] = dict.fromkeys(self.shared_paths, (None, None))
        for action in self.actions:
            follows = action.site.kind in ("weight", "leaf")
            for name in action.stored:
                roles = action.method.roles.get(name, () if action.site.kind == "leaf" else None)
                out[action.leaf_path(name)] = (action.site, roles) if follows else (None, None)
        return out

    # --- trees ------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array, params: Tree, statistics: Mapping[str, Any] | None = None) -> Any:
        """A fresh adapter: a small tree in the container type of ``params``. The base is only read.

        Args:
          key: a PRNG key. A site's leaves depend only on it and on the site's path (and weight).
          params: the base tree. The adapter takes over its shardings and boxes with logical names. If leaves are
            ``jax.ShapeDtypeStruct``s, so are the adapter's.
          statistics: for a method whose start depends on data, what `jpeft.observe` found.

        Raises:
          ValueError: a start depends on data and there are no statistics, or they are of another model.
        """
        tree = self.frontend.tree(params)
        base = flatten(tree)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base)):
            shapes = {p: jax.ShapeDtypeStruct(s, jnp.dtype(d)) for p, (s, d) in self.structure}
            return like(unflatten(self.place_like_base(shapes, base)), tree)
        check_statistics(self.actions, statistics, base)
        leaves = self.init_shared(key)
        for action in self.actions:
            w = _base_leaf(base, action.site)
            own = self.init_action(action, key, w, statistics)
            leaves |= {action.leaf_path(n): x for n, x in own.items()}
        return like(unflatten(self.place_like_base(leaves, base)), tree)

    def init_shared(self, key: jax.Array) -> dict[Path, Any]:
        """Fresh shared leaves, by path."""
        leaves: dict[Path, Any] = {}
        for i, (slug, member) in enumerate(zip(slugs(self.method), self.method.methods(), strict=True)):
            if any(p[0] == slug for p in self.shared_paths):
                sites = [a.site for a in self.actions if a.member == i]
                leaves |= {(slug, n): x for n, x in member.shared(_fold(key, slug), sites).items()}
        return leaves

    def init_action(self, action: Action, key: jax.Array, w: Any, statistics: Any = None) -> dict[str, jax.Array]:
        """Fresh leaves at one site, by name, from the base's weight there. See `init`."""
        placeless = replace(action, site=replace(action.site, path=()), changes_bias=False)
        found = None if action.method.observes is None or statistics is None else dict(statistics[action.site.name])
        return _init_jitted(placeless, _fold(key, f"{action.member}/{action.site.name}"), w, found)

    def regenerated(self, base: Mapping[Path, Any]) -> dict[Path, Any]:
        """The leaves that the configuration gives back bit for bit, whatever the key, by path.

        Args:
          base: the base's leaves by path; abstract where such leaves do not depend on them.
        """
        key, names, out = jax.random.key(0), slugs(self.method), {}
        wanted = {slug: m.regenerated for slug, m in zip(names, self.method.methods(), strict=True)}
        if any(path[1] in wanted[path[0]] for path in self.shared_paths):
            out |= {p: x for p, x in self.init_shared(key).items() if p[1] in wanted[p[0]]}
        for action in self.actions:
            if action.mask in action.stored:
                out[action.leaf_path(action.mask)] = layer_mask(action.site)
            if held := action.method.regenerated & set(action.stored):
                w = _base_leaf(base, action.site)
                if isinstance(peek(w), jax.ShapeDtypeStruct):
                    w = jnp.zeros(peek(w).shape, peek(w).dtype)
                own = self.init_action(action, key, w)
                out |= {action.leaf_path(name): own[name] for name in held}
        return out

    def place_like_base(self, leaves: Mapping[Path, Any], base: Mapping[Path, Any]) -> dict[Path, Any]:
        """Adapter leaves with the shardings and boxes that follow from the base's."""
        out, replicated = {}, replicated_like(base.values())
        for path, (site, roles) in self.leaf_sites().items():
            leaf, sharding = leaves[path], leaf_sharding(base, site, roles) or replicated
            if sharding is not None and not isinstance(leaf, Tracer):
                leaf = place(leaf, sharding)
            out[path] = box_like(base, site, roles, leaf)
        return out

    def labels(self, tree: Tree) -> Any:
        """The label of every leaf, "trainable" or "frozen", for `partition`, `masked` or ``optax.multi_transform``.

        Args:
          tree: the full tree, the adapter alone, or the base.
        """
        trainable = {p for p, _ in self.structure} - self.non_trainable_paths
        tree = self.frontend.tree(tree) if self.frontend.holds_params else tree
        return map_with_path(lambda p, _: TRAINABLE if p in trainable else FROZEN, tree)

    def axes(self, adapter: Tree) -> Any:
        """The ``in_axes`` of an adapter for `jax.vmap`: None for leaves that are shared or do not train, else 0.

        Args:
          adapter: an adapter, or several stacked. Leaves that are stacked have 0 in any case, and those that differ
            between adapters must be: positions or factors from different keys, or what all sites of one adapter share
            and trains.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
        >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> peft = jpeft.methods.VeRA(rank=2, targets="layers_0").bind(model, params, x)
        >>> adapters = [peft.init(jax.random.key(seed), params) for seed in range(3)]
        >>> axes = peft.axes(adapters[0])
        >>> def stacked(axis, *leaves):
        ...     return leaves[0] if axis is None else jnp.stack(leaves)
        >>> bank = jax.tree.map(stacked, axes, *adapters, is_leaf=lambda axis: axis is None)
        >>> jax.vmap(peft.apply, in_axes=(None, axes, None))(params, bank, x).shape
        (3, 1, 8)
        """
        held_once, structure = self.non_trainable_paths | set(self.shared_paths), dict(self.structure)

        def axis(path: Path, leaf: Any) -> int | None:
            single = path in structure and np.ndim(peek(leaf)) == len(structure[path][0])
            return None if path in held_once and single else 0

        return map_with_path(axis, adapter)

    def penalty(self, adapter: Tree) -> jax.Array:
        """The loss that methods have of their own, such as AdaLoRA's for the orthogonality of its factors.

        `train_step` adds it to the user's loss. 0.0 for methods that have none.
        """
        leaves = self.check(adapter)
        totals: dict[int, list[jax.Array]] = {}
        counts: dict[int, int] = {}
        for action in self.actions:
            if action.method.penalized:
                own = {n: stack_first(meta.unbox(x), action.site.stack) for n, x in self.own(action, leaves).items()}
                sizes = [n for _, n in action.site.stack] + list(action.site.batch)
                on = own.pop(action.mask)[..., 0] if action.mask in own else True
                terms = map_axes(lambda own, method=action.method: jnp.asarray(method.penalty(own)), len(sizes))(own)
                terms = jnp.where(on, terms, jnp.zeros_like(terms))
                totals.setdefault(action.member, []).append(terms.astype(jnp.float32).sum())
                counts[action.member] = counts.get(action.member, 0) + math.prod(sizes)
        members = self.method.methods()
        each = [
            sum(found) / (counts[member] if members[member].penalty_reduction == "mean" else 1)
            for member, found in totals.items()
        ]
        return jnp.asarray(sum(each), jnp.float32)

    def check(self, adapter: Tree) -> dict[Path, Any]:
        """The adapter's leaves by path.

        Raises:
          TypeError: it is no tree.
          ValueError: a leaf is missing, has no place in this Peft, or has another shape.
        """
        return adapter_leaves(dict(self.structure), adapter, self.method.name)

    def check_order(self, params: Tree, adapter: Tree, call: str, *, values: bool = True) -> None:
        """Checks that ``params`` and ``adapter`` are not each other, or something else, by their structure alone.

        Args:
          call: the call as it should be, for the errors.
          values: whether the values of ``params`` are needed, so that these may not be abstract.

        Raises:
          TypeError: one of the two is no tree.
          ValueError: they are other trees, such as each other, or abstract.
        """
        own = dict(self.structure)
        weight = next((site.weight_path for site in self.weights if site.weight_path not in own), None)
        with contextlib.suppress(TypeError):  # told below
            params = self.frontend.tree(params)
        check_order(own, weight, params, adapter, call, values=values)

    def merge(self, params: Tree, adapter: Tree, *, requantize: bool = False, safe: bool = True) -> Any:
        """Merged weights for the unmodified model, whose outputs are then those of `apply`.

        Pure and differentiable in the adapter. Weights keep their dtype; sums are computed in at least float32.

        Args:
          params: the base tree.
          adapter: the adapter.
          requantize: True quantizes merged weights again if they were quantized; by default they are returned
            dequantized, equal to those of `apply`. Quantizing rounds the sum: NF4 moves a weight by up to 0.14 of the
            largest in its block, int4 by 1/14, int8 by 1/254 and float8 by 1/28 (and up to 0.2 % more with quantized
            scales). With few bits, most of what an adapter learned is rounded away. If you have the unquantized base,
            merge into that and quantize the result.
          safe: False also merges into weights that are then not finite. They are looked at with one reduction for each
            weight that changes; traced ones (under ``jax.jit`` or ``jax.grad``) cannot be.

        Raises:
          ValueError: a method cannot be merged at a site (prefix tuning, bottleneck adapters, a bias where the module
            has none), or ``requantize`` is True and no merged weight is quantized.
          MergeError: a merged weight holds NaN or infinities, or is beyond the range of the base's dtype.
        """
        self.check_order(params, adapter, "peft.merge(params, adapter)")
        for action in self.actions:
            if not action.mergeable:
                raise ValueError(
                    f"{action.method.name} at {action.site.name!r} cannot be merged: no weight there can hold what it "
                    "does; use peft.apply or peft.module"
                )
        base = flatten(self.frontend.tree(params))
        out = self.replaced(dict(base), leaves := self.check(adapter))
        flags = {a.site.path: is_finite(out[a.site.path]) for a in self.actions if safe and a.site.kind == "leaf"}
        found = False

        def check(flags: Mapping[Path, Any]) -> None:
            check_merged(flags, base, lambda path: self._leaves_at(path, leaves))

        for path, actions in by_weight(self.actions, (FUSED, BOX, MERGE)).items():
            own, shared = [self.own(a, leaves) for a in actions], [self.shared(a, leaves) for a in actions]
            stored, bias = out[path], actions[0].site.bias_path
            merged, added = merge_stored(actions, shared, own, stored, out.get(bias) if bias else None)
            out[path] = merged
            flags[path] = is_finite(merged) if safe else None
            if requantize and isinstance(stored, Quantized):
                check({path: flags[path]})  # codes represent no NaN, and would not say whose it is
                out[path], found = requantize_leaf(stored, merged), True
            if bias in out and any(a.changes_bias for a in actions):
                out[bias] = added
                flags[bias] = is_finite(added) if safe else None
        check(flags)
        if requantize and not found:
            raise ValueError("requantize=True, but no weight that the adapter changes is quantized")
        return self.frontend.like(unflatten(out), params)

    def own(self, action: Action, leaves: Mapping[Path, Any]) -> dict[str, Any]:
        """The leaves of one action as they are stored, by name, of an adapter's leaves by path."""
        return {n: leaves[action.leaf_path(n)] for n in action.stored}

    def shared(self, action: Action, leaves: Mapping[Path, Any]) -> dict[str, Any]:
        """The leaves that an action's sites share, by name, of an adapter's leaves by path."""
        if not action.shared:
            return {}
        return {p[1]: meta.unbox(leaves[p]) for p in self.shared_paths if p[0] == action.shared}

    def _leaves_at(self, path: Path, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
        """The adapter's leaves that change a base leaf."""
        at = [a for a in self.actions if path in (a.site.weight_path, a.site.bias_path)]
        own = [a.leaf_path(name) for a in at for name in a.stored]
        return {path: leaves[path] for path in (*own, *self.shared_paths)}

    def replaced(self, base: dict[Path, Any], leaves: Mapping[Path, Any]) -> dict[Path, Any]:
        """The base leaves, with those of "leaf" sites replaced by the adapter's.

        Raises:
          ValueError: the base has no weight at a site.
        """
        for action in self.actions:
            if action.site.kind == "leaf":
                path = action.site.path
                _base_leaf(base, action.site)
                # The adapter's copy may be wider (float32 for bfloat16); the model needs the base's dtype.
                value, dtype = meta.unbox(leaves[path]), peek(base[path]).dtype
                base[path] = meta.replace_boxed(leaves[path], value.astype(dtype))
            else:
                _base_leaf(base, action.site)
        return base

    def by_owner(self) -> dict[Path, tuple[Action, ...]]:
        """The actions that run in a module's call, by the module's path."""
        out: dict[Path, tuple[Action, ...]] = {}
        for action in self.actions:
            if action.site.kind != "leaf":
                out[action.site.path] = (*out.get(action.site.path, ()), action)
        return out

    # --- running ----------------------------------------------------------------------------------------------------

    def apply(self, params: Tree, adapter: Tree, *inputs: Any, **kwargs: Any) -> Any:
        """The outputs of the model under the adapter: ``model.apply`` with one more tree.

        Args:
          params: the base tree, or all variables ``{"params": ..., "batch_stats": ...}``.
          adapter: the adapter, as from `init`; or a bank of adapters, as from `jpeft.stack`.
          *inputs: as for ``model.apply``.
          **kwargs: as for ``model.apply``: rngs, mutable, method, capture_intermediates, ... With a bank also
            ``adapter_ids``, the adapter of each row: names, None for the base, or slots; and, where it cannot be told,
            ``row_axes``, the axis of rows of inputs by number and of other arguments by name, such as ``{1: None}``.
        """
        if isinstance(adapter, PerRow):
            return run_rows(adapter, self, params, inputs, kwargs)
        if not is_bypassed():
            self.check_order(params, adapter, "peft.apply(params, adapter, *inputs)")
        return self.frontend.run(self, params, adapter, inputs, kwargs)

    def overlay(self, params: Tree, adapter: Tree) -> Any:
        """The tree that the unmodified model runs on inside `intercept`.

        It is ``combine(params, adapter)``, except that a weight that no module call explains is in a box, and a weight
        that is read from another module is merged.
        """
        self.check_order(params, adapter, "peft.overlay(params, adapter)")
        return self.frontend.overlay(self, params, adapter)

    def intercept(self) -> AbstractContextManager[None]:
        """The bare interceptor, for code that calls modules itself: ``model.generate(ids, params=full)``.

        Give the model ``combine(params, adapter)`` or, if `summary` lists sites that are not fused or leaves that sites
        share, ``overlay(...)``.
        Enter it inside the function that is jitted: a function that was traced before ignores it.
        """
        return self.frontend.intercept(self)

    @property
    def module(self) -> Any:
        """A module with the model's call signature, whose parameters are ``combine(params, adapter)``."""
        return self.frontend.module(self)

    def split(self, full: Tree) -> tuple[Any, Any]:
        """``(params, adapter)`` from a full tree. Inverse of ``combine(params, adapter)``.

        Base leaves that the adapter replaced are gone: both trees hold the adapter's.
        """
        expected = {p for p, _ in self.structure}
        leaves = flatten(full)
        own = {a.leaf_path(n) for a in self.actions if a.site.kind == "leaf" for n in a.stored}
        params = {p: x for p, x in leaves.items() if p not in expected or p in own}
        return like(unflatten(params), full), like(unflatten({p: leaves[p] for p in expected if p in leaves}), full)

    def summary(self, expand: bool = False) -> str:
        """A table of the sites, with path, shape, rank, bytes and the path taken; what the targets matched; totals.

        Sites that differ in numbers of their paths alone, as layers do, share a row: ``layer/{0..5}/query ×6``. Its
        parameters and bytes are written as a product, ``6 × 6,144``: so many sites of so many each.

        Args:
          expand: True gives each site a row, and each weight that was left alone its name.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
        >>> model, x = nn.Sequential([nn.Dense(4), nn.Dense(4), nn.Dense(2)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> print(jpeft.LoRA(rank=2, targets=r"layers_[01]").bind(model, params, x).summary())
        site             owner  weight  rank  parameters   bytes  method  via
        ---------------  -----  ------  ----  ----------  ------  ------  -----
        layers_{0,1} ×2  Dense  4×4        2      2 × 16  2 × 64  LoRA    fused
        <BLANKLINE>
        targets: 'layers_[01]' 2 sites
        2 sites; 32 trainable of 50 base parameters (64.000 %); adapter 128 bytes
        left alone: 1 parameter of two or more axes, listed by .left_alone: layers_2/kernel
        """
        sizes = dict(self.structure)
        members = [Member(m.name, found) for m, found in zip(self.method.methods(), self.matched, strict=True)]
        rows = [
            Row(a.site, a.member, a.method.columns(), tuple(sizes[a.leaf_path(n)] for n in a.stored))
            for a in self.actions
        ]
        shared = [(path, sizes[path]) for path in self.shared_paths]
        frozen = [sizes[path] for path in self.non_trainable_paths]
        return summary(rows, members, shared, frozen, self.base_size, self.left_alone, expand)


def _base_leaf(base: Mapping[Path, Any], site: Site) -> Any:
    """The base's leaf at a site; None for a site without a weight.

    Raises:
      ValueError: it is missing, or has another shape.
    """
    if not site.stored and site.kind != "leaf":
        return None
    path = site.weight_path
    if path not in base:
        raise ValueError(
            f"params lack {join(path)!r}, which this Peft was bound to{nearest(join(path), map(join, base))}"
        )
    if (found := np.shape(peek(base[path]))) != site.stored:
        raise ValueError(f"params have {join(path)!r} of shape {found}, and this Peft was bound to {site.stored}")
    return base[path]


def _fold(key: jax.Array, text: str) -> jax.Array:
    """A key that depends on a name, in the same way in every process (Python's hash does not)."""
    return jax.random.fold_in(key, zlib.crc32(text.encode()))


def adapter_shardings(peft: Peft, params: Tree) -> Any:
    """The sharding of every adapter leaf, for ``jax.jit(..., out_shardings=...)`` or ``jax.device_put``.

    Args:
      peft: the bound method.
      params: the base tree, whose leaves (arrays or ``jax.ShapeDtypeStruct``s) have ``NamedSharding``s.

    Returns:
      A tree like the adapter with a ``NamedSharding`` for every leaf. Optimizer state that is created from the sharded
      adapter has the same shardings.

    Raises:
      ValueError: no base leaf has a ``NamedSharding``.
    """
    base = flatten(params)
    replicated = replicated_like(base.values())
    if replicated is None:
        raise ValueError("no leaf of params has a NamedSharding; put params on a mesh with jpeft.shard")
    out = {path: leaf_sharding(base, site, roles) or replicated for path, (site, roles) in peft.leaf_sites().items()}
    return like(unflatten(out), params)
