"""Peft: a method bound to a model. The sites found, and pure functions of trees."""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax.core import lift, meta, unfreeze
from jax.core import Tracer

from jpeft import inject
from jpeft.inject import MARKER, Action, Changed, Marker, changes_bias, merge_bias, merge_weight
from jpeft.methods.base import Leaves, Method
from jpeft.quantization import Quantized, dequantize_leaf, requantize_leaf
from jpeft.sharding import box_like, everywhere, leaf_sharding, place
from jpeft.sites import BOX, FUSED, MERGE, Site, map_axes, stack_back, stack_first
from jpeft.summary import summary
from jpeft.survey import Survey, survey
from jpeft.tree import (
    FROZEN,
    TRAINABLE,
    Path,
    Tree,
    box_as,
    combine,
    flatten,
    join,
    like,
    map_with_path,
    nearest,
    peek,
    unflatten,
)

Structure = tuple[tuple[Path, tuple[tuple[int, ...], str]], ...]


def split_variables(params: Tree) -> tuple[Tree, dict[str, Any]]:
    """The parameters, and the other collections where all of a model's variables were given."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a tree of mappings, got {type(params).__name__}")
    if isinstance(params.get("params"), Mapping) and all(isinstance(v, Mapping) for v in params.values()):
        return params["params"], {k: v for k, v in params.items() if k != "params"}
    return params, {}


def bind(method: Method, model: nn.Module, params: Tree, /, *inputs: Any, **kwargs: Any) -> Peft:
    """See `jpeft.methods.base.Method.bind`."""
    return bind_seen(method, model, params, look(model, params, inputs, kwargs))


def look(model: nn.Module, params: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """What the model offers to methods: the half of `bind` that depends on no method."""
    if not isinstance(model, nn.Module):
        hint = "; bind its .module, which is one" if isinstance(getattr(model, "module", None), nn.Module) else ""
        raise TypeError(f"model must be a flax.linen Module, got {type(model).__name__}{hint}")
    tree, others = split_variables(params)
    try:
        return survey(model, {"params": tree, **others}, inputs, kwargs)
    except (errors.ScopeParamNotFoundError, errors.ScopeParamShapeError, errors.ScopeCollectionNotFound) as e:
        raise ValueError(f"params do not fit {type(model).__name__}: {e}") from e


def bind_seen(method: Method, model: nn.Module, params: Tree, seen: Survey) -> Peft:
    """The other half of `bind`, for a model that was looked at already."""
    base = flatten(split_variables(params)[0])
    structure: dict[Path, tuple[tuple[int, ...], str]] = {}
    actions: list[Action] = []
    shared: list[Path] = []
    for i, member in enumerate(method.methods()):
        sites = member.sites(seen)
        root = jax.eval_shape(lambda key, m=member, s=sites: m.shared(key, s), jax.random.key(0))
        _claim(structure, {(_slug(method, i), n): x for n, x in root.items()}, base, member)
        shared += [(_slug(method, i), n) for n in root]
        for site in sites:
            if site.kind == "leaf" and isinstance(leaf := base[site.path], Quantized):
                raise ValueError(
                    f"{member.name} would train {join(site.path)!r}, which is quantised ({leaf.scheme}): codes have no "
                    "gradient; exclude it, or leave it out of jpeft.quantize"
                )
            action = _action(member, i, site, base, root)
            stored = jax.eval_shape(lambda key, a=action: _init_one(a, key, _like_weight(a, base)), jax.random.key(0))
            _claim(structure, {action.leaf_path(n): x for n, x in stored.items()}, base, member, site.kind == "leaf")
            actions.append(action)
    size = sum(math.prod(np.shape(peek(x))) for x in base.values())
    return Peft(model, method, tuple(actions), tuple(sorted(structure.items())), tuple(shared), size)


def _slug(method: Method, index: int) -> str:
    """The name under which a method keeps what its sites share: ``prefix_tuning``, ``prefix_tuning_1`` for a second."""
    members = method.methods()
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", members[index].name).lower()
    before = sum(m.name == members[index].name for m in members[:index])
    return f"{name}_{before}" if before else name


def _action(member: Method, index: int, site: Site, base: Mapping[Path, Any], shared: Leaves) -> Action:
    own = member.at(site)
    draft = Action(own, site, (), (), index)
    stored = jax.eval_shape(lambda: own.init(jax.random.key(0), site, _matrix(draft, base)))
    names = jax.eval_shape(own.expand, shared, stored)
    return replace(draft, stored=tuple(stored), names=tuple(names))


def _like_weight(action: Action, base: Mapping[Path, Any]) -> jax.Array | None:
    """Zeros in the shape of the stored weight, for abstract evaluation."""
    if not action.site.stored:
        return None
    leaf = peek(base[action.site.weight_path])
    return jnp.zeros(leaf.shape, leaf.dtype)


def _matrix(action: Action, base: Mapping[Path, Any]) -> jax.Array | None:
    """The same as one matrix."""
    site = action.site
    return jnp.zeros((site.inputs, site.outputs), jnp.float32) if site.kind == "weight" else _like_weight(action, base)


def _claim(
    structure: Any, leaves: Mapping[Path, Any], base: Mapping[Path, Any], method: Method, stands_in: bool = False
) -> None:
    for path, leaf in leaves.items():
        if path in structure:
            raise ValueError(
                f"two methods of the chain both keep a leaf at {join(path)!r} (the second is {method.name}); "
                "give them different targets"
            )
        if not stands_in and (path in base or any(p[: len(path)] == path for p in base)):
            raise ValueError(f"{method.name} would keep a leaf at {join(path)!r}, where the model has one already")
        structure[path] = (tuple(leaf.shape), leaf.dtype.name)


def _init_one(action: Action, key: jax.Array, w: jax.Array | None) -> dict[str, jax.Array]:
    """The leaves at one site in their stored layout: mapped over scanned layers and over batch axes."""
    site = action.site
    if site.kind == "leaf":
        return dict(action.method.init(key, site, w))
    sizes = [n for _, n in site.stack] + list(site.batch)
    keys = jax.random.split(key, math.prod(sizes)).reshape(*sizes, *key.shape) if sizes else key
    if site.kind == "weight" and site.geometry is not None:
        assert w is not None
        w = map_axes(site.geometry.view, len(site.stack))(stack_first(w, site.stack))
        leaves = map_axes(lambda k, w: dict(action.method.init(k, site, w)), len(sizes))(keys, w)
    else:
        leaves = map_axes(lambda k: dict(action.method.init(k, site, None)), len(sizes))(keys)
    return {n: stack_back(x, site.stack) for n, x in leaves.items()}


@functools.partial(jax.jit, static_argnums=0)
def _init_jitted(action: Action, key: jax.Array, w: Any) -> dict[str, jax.Array]:
    # Jitted so that a weight that `init` does not use is neither viewed nor sent to the device; sites that differ in
    # nothing but their path share the trace. The box is opened inside: a quantised weight would be dequantised.
    return _init_one(action, key, None if w is None else meta.unbox(w))


@dataclass(frozen=True, eq=False)
class Peft:
    """A method bound to a model: static and hashable, with pure functions of trees.

    Attributes:
      model: the Linen module, unchanged. method: what was bound.
      actions: a method at a site each. structure: path, shape and dtype of every adapter leaf.
      shared_paths: those of them that belong to no site. base_size: parameters of the base.
    """

    model: nn.Module
    method: Method
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
    def fixed_paths(self) -> frozenset[Path]:
        """Adapter leaves that never train."""
        members = self.method.methods()
        fixed = {a.leaf_path(n) for a in self.actions for n in a.stored if n in a.method.fixed}
        shared = {p for i, m in enumerate(members) for p in self.shared_paths
                  if p[0] == _slug(self.method, i) and p[1] in m.fixed}  # fmt: skip
        return frozenset(fixed | shared)

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
            return like(unflatten(self.dress(shapes, base)), tree)
        leaves: dict[Path, Any] = {}
        for i, member in enumerate(self.method.methods()):
            slug = _slug(self.method, i)
            if any(p[0] == slug for p in self.shared_paths):
                sites = [a.site for a in self.actions if a.member == i]
                shared = member.shared(_fold(key, slug), sites)
                leaves |= {(slug, n): x for n, x in shared.items()}
        for action in self.actions:
            w = _base_leaf(base, action.site.weight_path) if action.site.stored else None
            placeless = replace(action, site=replace(action.site, path=()))
            own = _init_jitted(placeless, _fold(key, f"{action.member}/{action.site.name}"), w)
            leaves |= {action.leaf_path(n): x for n, x in own.items()}
        return like(unflatten(self.dress(leaves, base)), tree)

    def dress(self, leaves: Mapping[Path, Any], base: Mapping[Path, Any]) -> dict[Path, Any]:
        """Leaves with the shardings and boxes that follow from the base's."""
        out, replicated = {}, everywhere(base.values())
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
        trainable = {p for p, _ in self.structure} - self.fixed_paths
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

    def overlay(self, params: Tree, adapter: Tree) -> Any:
        """The tree that the unmodified model runs on inside `intercept`.

        ``combine(params, adapter)``, and more where a site asks for it: a box around a weight that no module call
        explains, the merged weight where a model reaches into another module's variables, shared leaves expanded.
        """
        tree, _ = split_variables(params)
        laid = self._replaced(flatten(tree), leaves := self.check(adapter))
        used = self._expanded(leaves)
        markers: dict[Path, list[Action]] = {}
        for path, actions in _by_weight(self.actions, (BOX, MERGE)).items():
            own = [used[a] for a in actions]
            targets = [(path, False)]
            bias = actions[0].site.bias_path
            if bias in laid and any(changes_bias(a.method) for a in actions):
                targets.append((bias, True))
            for target, is_bias in targets:
                if actions[0].site.via == BOX:
                    laid[target] = Changed(laid[target], tuple(own), tuple(actions), is_bias)
                else:
                    laid[target] = _merged(actions, own, laid[target], is_bias)
        for action in self.actions:
            if action.site.kind != "leaf" and action.site.via == FUSED:
                laid |= {action.used_path(n): x for n, x in used[action].items()}
                markers.setdefault(action.site.path, []).append(action)
        laid |= {(*path, MARKER): Marker(tuple(actions)) for path, actions in markers.items()}
        return unflatten(laid)

    def merge(self, params: Tree, adapter: Tree, *, requantize: bool = False) -> Any:
        """A plain base tree for the unmodified model, which then computes what `apply` does.

        Pure and differentiable in the adapter. Weights keep their dtype; the sum is made in at least float32.

        Args:
          requantize: a quantised weight that something is merged into comes back dequantised, and equal to `apply`;
            True quantises it again, as it was. That rounds the sum: NF4 moves a weight by up to 0.14 of the largest in
            its block, int4 by 1/14, int8 by 1/254 and float8 by 1/28 (and by up to 0.2 % more for quantised scales).
            In few bits most of what an adapter learnt is rounded back to the codes it was learnt over; merge into the
            unquantised base and quantise that instead, where there is one.

        Raises:
          ValueError: a method that changes more than weights (prefix tuning, bottleneck adapters) cannot be merged; or
            nothing that was merged into is quantised, and ``requantize`` asks for it.
        """
        for action in self.actions:
            if not action.method.mergeable:
                raise ValueError(
                    f"{action.method.name} at {action.site.name!r} cannot be merged: it is no change of a weight; "
                    "use peft.apply or peft.module"
                )
        tree, _ = split_variables(params)
        out = self._replaced(flatten(tree), leaves := self.check(adapter))
        used, found = self._expanded(leaves), False
        for path, actions in _by_weight(self.actions, (FUSED, BOX, MERGE)).items():
            own, stored = [used[a] for a in actions], out[path]
            out[path] = _merged(actions, own, stored, False)
            if requantize and isinstance(stored, Quantized):
                out[path], found = requantize_leaf(stored, out[path]), True
            bias = actions[0].site.bias_path
            if bias in out and any(changes_bias(a.method) for a in actions):
                out[bias] = _merged(actions, own, out[bias], True)
        if requantize and not found:
            raise ValueError("requantize=True, but no weight that the adapter changes is quantised")
        return like(unflatten(out), tree)

    def _replaced(self, base: dict[Path, Any], leaves: Mapping[Path, Any]) -> dict[Path, Any]:
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

    def _expanded(self, leaves: Mapping[Path, Any]) -> dict[Action, dict[str, Any]]:
        """The leaves that each action takes: as stored, unless its method computes them from shared ones."""
        out = {}
        for action in self.actions:
            own = {n: leaves[action.leaf_path(n)] for n in action.stored}
            if type(action.method).expand is not Method.expand:
                slug = _slug(self.method, action.member)
                shared = {p[1]: meta.unbox(leaves[p]) for p in self.shared_paths if p[0] == slug}
                site = action.site
                first = {n: stack_first(meta.unbox(x), site.stack) for n, x in own.items()}
                expand = map_axes(lambda o, a=action, s=shared: dict(a.method.expand(s, o)),
                                  len(site.stack) + len(site.batch))  # fmt: skip
                own = {n: stack_back(x, site.stack) for n, x in expand(first).items()}
            out[action] = own
        return out

    # --- running ----------------------------------------------------------------------------------------------------

    def apply(self, params: Tree, adapter: Tree, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model under the adapter: ``model.apply`` with one more tree.

        Args:
          params: the base tree, or all variables ``{"params": ..., "batch_stats": ...}``.
          adapter: as from `init`.
          *inputs, **kwargs: as for ``model.apply`` (rngs, mutable, method, capture_intermediates, ...).
        """
        tree, others = split_variables(params)
        if inject.is_bypassed():
            return self.model.apply({**others, "params": tree}, *inputs, **kwargs)
        laid = self.overlay(tree, adapter)
        with self.intercept():
            out = self.model.apply({**others, "params": laid}, *inputs, **kwargs)
        return _without_adapter(out, tree) if kwargs.get("mutable") else out

    @contextmanager
    def intercept(self) -> Iterator[None]:
        """The bare interceptor, for code that calls modules itself: ``model.generate(ids, params=full)``.

        Give the model ``combine(params, adapter)`` or, if `summary` shows sites other than fused, ``overlay(...)``.
        Enter it inside what is jitted: a function traced before ignores it.
        """
        with inject.intercept(self._table()):
            yield

    def _table(self) -> dict[Path, tuple[Action, ...]]:
        table: dict[Path, tuple[Action, ...]] = {}
        for action in self.actions:
            if action.site.kind != "leaf":
                table[action.site.path] = (*table.get(action.site.path, ()), action)
        return table

    @property
    def module(self) -> PeftModule:
        """An ``nn.Module`` with the model's own call signature, whose parameters are ``combine(params, adapter)``."""
        return PeftModule(self)

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
        return summary(self)


def _base_leaf(base: Mapping[Path, Any], path: Path) -> Any:
    if path not in base:
        raise ValueError(
            f"params lack {join(path)!r}, which this Peft was bound to{nearest(join(path), map(join, base))}"
        )
    return base[path]


def _fold(key: jax.Array, text: str) -> jax.Array:
    """A key that depends on a name: the same in every process, unlike Python's hash."""
    return jax.random.fold_in(key, zlib.crc32(text.encode()))


def _by_weight(actions: tuple[Action, ...], via: tuple[str, ...]) -> dict[Path, list[Action]]:
    out: dict[Path, list[Action]] = {}
    for action in actions:
        if action.site.kind == "weight" and action.site.via in via:
            out.setdefault(action.site.weight_path, []).append(action)
    return out


def _merged(actions: list[Action], leaves: list[dict[str, Any]], stored: Any, is_bias: bool) -> Any:
    """A stored weight (or bias) with its actions merged in, a scanned layer at a time."""
    stack = actions[0].site.stack
    first = jax.tree.map(lambda x: stack_first(x, stack), [meta.unbox(own) for own in leaves])
    w = stack_first(jnp.asarray(dequantize_leaf(stored)), stack)
    fn = merge_bias if is_bias else merge_weight
    merged = map_axes(lambda o, w: fn(actions, o, w), len(stack))(first, w)
    return box_as(stored, stack_back(merged, stack))


def _without_adapter(out: Any, params: Tree) -> Any:
    """``(y, state)`` with no trace of the adapter in ``state["params"]``."""
    y, state = out
    if "params" not in state:
        return out
    found = flatten(state["params"])
    kept = {p: x.value if isinstance(x := found[p], Changed) else x for p in flatten(params) if p in found}
    return y, like({**{k: v for k, v in state.items() if k != "params"}, "params": unflatten(kept)}, state)


class PeftModule(nn.Module):
    """The adapted model as a module. Its parameters are the full tree, with the model's own paths."""

    peft: Peft

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """``model.apply`` on the full tree: ``method=`` and captured paths are the model's own."""
        params, adapter = self.peft.split(variables["params"])
        others = {k: v for k, v in variables.items() if k != "params"}
        return self.peft.apply({"params": params, **others} if others else params, adapter, *args, **kwargs)

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a part of a larger module, or under ``init`` and ``bind``."""
        peft, scope = self.peft, self.scope
        assert scope is not None
        if self.is_initializing() and not _has_adapter(peft, scope.variables().get("params", {})):
            y = peft.model.clone(parent=scope, name=None)(*args, **kwargs)
            params = unfreeze(dict(scope.variables()["params"]))
            adapter = unfreeze(peft.init(self.make_rng("params"), params))
            for name, value in combine(params, adapter).items():
                scope.put_variable("params", name, value)
            return y

        def body(inner: Any, *args: Any) -> Any:
            with inject.intercept(peft._table(), inner.path):
                return peft.model.clone(parent=inner, name=None)(*args, **kwargs)

        def lay(variables: Any) -> Any:
            full = variables.get("params")
            return {**variables, "params": peft.overlay(*peft.split(full))} if full else variables

        return lift.map_variables(body, "params", lay, mutable=False)(scope, *args)


def _has_adapter(peft: Peft, params: Any) -> bool:
    found = flatten(params)
    return all(p in found for p, _ in peft.structure)
