"""Acting inside a Linen model without touching its code: the interceptor and the box.

With `jpeft.survey`, the only module that knows Flax internals. The interceptor (`intercept`) reads adapter leaves from
the called module's own scope, where the model's own scans have sliced them with the base; the box (`Changed`) is a
leaf of ``params`` that gives the changed weight when a module asks for its parameter.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype
from jax.core import Tracer

from jpeft import attention, geometry
from jpeft.geometry import Call, Contraction, Lookup, Parts, Patches
from jpeft.methods.base import Leaves, WeightMethod, widened
from jpeft.quantization import Quantized
from jpeft.sites import FUSED, Site, map_axes
from jpeft.tree import Path, box_as, join, peek


@dataclass(frozen=True)
class Action:
    """One method at one site: what the core carries out."""

    method: Any  # a Method, with the overrides of this site applied
    site: Site
    stored: tuple[str, ...]  # names of the leaves that the adapter holds
    names: tuple[str, ...]  # of those that `apply` and `merge` take: the same unless the method computes them
    member: int = 0  # which method of a chain this is

    def leaf_path(self, name: str) -> Path:
        """Where the adapter keeps a leaf."""
        return self.site.path if self.site.kind == "leaf" else (*self.site.path, self.site.prefix + name)

    used_path = leaf_path  # where the running model finds a leaf


@jax.tree_util.register_static
@dataclass(frozen=True)
class Marker:
    """Lies among a site's leaves, holds no array, and makes the tree structure tell one method from another.

    ``nn.jit`` caches a module's trace by that structure: without the marker, a LoRA of another alpha would be served
    the trace of the first.
    """

    actions: tuple[Action, ...]


MARKER = "jpeft"


# --- the box: weights that no interceptor can see -------------------------------------------------------------------


def merge_weight(actions: Sequence[Action], leaves: Sequence[Leaves], w: jax.Array) -> jax.Array:
    """The changed weight in one scope: not stacked, in its stored shape and dtype."""
    for action, own in zip(actions, leaves, strict=True):
        geom = action.site.geometry
        assert geom is not None
        merge = map_axes(action.method.merge, len(geom.batch))
        # Low precision would round the sum twice.
        wide = widened(w.dtype)
        m = merge(_cast(own, wide), geom.view(w.astype(wide)))
        w = geom.unview(m).astype(w.dtype)
    return w


def merge_bias(actions: Sequence[Action], leaves: Sequence[Leaves], b: jax.Array) -> jax.Array:
    """The changed bias in one scope."""
    for action, own in zip(actions, leaves, strict=True):
        geom = action.site.geometry
        assert geom is not None
        wide = widened(b.dtype)
        m = map_axes(action.method.merge_bias, len(geom.batch))(_cast(own, wide), geom.view_bias(b.astype(wide)))
        b = geom.unview_bias(m, b.shape).astype(b.dtype)
    return b


def changes_bias(method: Any) -> bool:
    """Whether a method has something to say about the bias."""
    return type(method).merge_bias is not WeightMethod.merge_bias


def _cast(leaves: Leaves, dtype: Any) -> dict[str, jax.Array]:
    return {k: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in leaves.items()}


@jax.tree_util.register_pytree_node_class
class Changed(meta.AxisMetadata):
    """A weight or bias with its adapter leaves: opened, it gives the changed one, a layer at a time under a scan."""

    def __init__(self, value: Any, leaves: tuple[Leaves, ...], actions: tuple[Action, ...], bias: bool = False):
        self.value, self.leaves, self.actions, self.bias = value, leaves, actions, bias

    def unbox(self) -> jax.Array:
        merge = merge_bias if self.bias else merge_weight
        return merge(self.actions, [meta.unbox(own) for own in self.leaves], meta.unbox(self.value))

    def replace_boxed(self, val: Any) -> Any:
        return box_as(self.value, val)

    def _map_axis(self, fn: Callable[[Any], Any]) -> Changed:
        value, leaves = jax.tree.map(fn, (self.value, self.leaves), is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
        return Changed(value, leaves, self.actions, self.bias)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Changed:
        return self._map_axis(lambda x: x.add_axis(index, params) if isinstance(x, meta.AxisMetadata) else x)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Changed:
        return self._map_axis(lambda x: x.remove_axis(index, params) if isinstance(x, meta.AxisMetadata) else x)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.value, self.leaves), (self.actions, self.bias)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Changed:
        return cls(*children, *aux)


# --- the interceptor ------------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """A module call that is running: who, and whether its caller said that it is deterministic."""

    module: nn.Module
    path: Path
    deterministic: Any


_TRAINING = ("train", "training", "is_training")


def _said_deterministic(context: Any, args: Any, kwargs: Any) -> Any:
    """What a call's arguments, their defaults or the module's fields say; None where they say nothing."""
    signature = geometry.signature_of(getattr(context.orig_method, "func", context.orig_method))
    given: Mapping[str, Any] = kwargs
    if signature is not None:
        with contextlib.suppress(TypeError):
            bound = signature.bind(context.module, *args, **kwargs)
            bound.apply_defaults()
            given = {**bound.arguments, **kwargs}
    for source in (given, vars(context.module)):
        if source.get("deterministic") is not None:
            return source["deterministic"]
        for name in _TRAINING:
            if isinstance(value := source.get(name), (bool, np.bool_, jax.Array)):
                return jnp.logical_not(value) if isinstance(value, Tracer) else not value
    return None


class _Base:
    """The `jpeft.methods.base.Linear` of one call."""

    def __init__(self, call: Callable[[Any], jax.Array], weight: Any, bias: Any, dropout: Any, plain: bool = False):
        self._call, self._weight, self._bias, self.dropout, self.plain = call, weight, bias, dropout, plain

    def __call__(self, x: Any) -> jax.Array:
        return self._call(x)

    @property
    def weight(self) -> jax.Array:
        return self._weight()

    @property
    def bias(self) -> jax.Array | None:
        return self._bias()


@dataclass
class _Running:
    """One site's call: its weight and bias as the next method finds them, and the operation itself."""

    call: Call
    run: Callable[[Any], Any]  # input in the module's own layout -> output
    weight: Callable[[], jax.Array]
    bias: Callable[[], jax.Array | None]
    dtype: Any
    dropout: Callable[[Any, float], Any]
    plain: bool  # see `jpeft.methods.base.Linear.plain`


def _apply_weight(action: Action, leaves: Leaves, at: _Running) -> Callable[[Any], Any]:
    """The module's operation changed by one method: input in the module's own layout -> output."""
    geom: Any = action.site.geometry
    leaves = _cast(leaves, at.dtype)

    def bias() -> jax.Array | None:
        b = at.bias()
        return None if b is None else geom.view_bias(b.astype(at.dtype))

    def run(raw: Any) -> Any:
        args = list(at.call.args)
        args[geom.argument] = raw
        call = dataclasses.replace(at.call, args=tuple(args))
        x = geom.operand(call, at.dtype)
        view = lambda: geom.view(at.weight().astype(at.dtype))  # noqa: E731
        if geom.batch:
            return geom.output(call, _apply_batched(action, leaves, geom, x, call, at, view, bias))
        flat = getattr(geom, "flat_call", lambda c: False)(call)

        def original(z: Any) -> jax.Array:
            if flat:  # the operand is the input with its tokens in one axis: the module takes that as it is
                return at.run(z)
            if z is x:
                return geom.result(call, at.run(raw))
            changed = geom.restore(call, z)
            if changed is not None:
                return geom.result(call, at.run(changed))
            y, b = z @ view(), bias()
            return y if b is None else y + b

        y = action.method.apply(leaves, _Base(original, view, bias, at.dropout, at.plain), x)
        return geom.output(call, y)

    return run


def _apply_batched(
    action: Action, leaves: Leaves, geom: Any, x: Any, call: Call, at: _Running, view: Any, bias: Any
) -> jax.Array:
    """The same over the matrices of a batched weight: the method is mapped, with the module's own output as base."""
    y0 = geom.result(call, at.run(call.args[geom.argument]))

    def one(leaves: Leaves, x: Any, y0: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
        def original(z: Any) -> jax.Array:
            if z is x:
                return y0
            return z @ w if b is None else z @ w + b

        return action.method.apply(leaves, _Base(original, lambda: w, lambda: b, at.dropout), x)

    # The parts of a fused weight share their input; experts and groups each have their own.
    shared = isinstance(geom, Parts)
    fn = jax.vmap(one, in_axes=(0, None, 0, 0, 0)) if shared else one
    fn = map_axes(fn, len(geom.batch) - shared)
    return fn(leaves, x, y0, view(), bias())


def _attend(action: Action, leaves: Leaves, at: _Running, query: Any) -> Any:
    """An embedding used as an output head: the changed lookup, transposed."""
    leaves = _cast(leaves, at.dtype)
    weight = lambda: at.weight().astype(at.dtype)  # noqa: E731
    base = _Base(lambda z: z @ weight(), weight, lambda: None, lambda z, rate: z)
    assert action.site.geometry is not None
    rows = action.site.inputs
    return geometry.attend(lambda x: action.method.apply(leaves, base, x), query.astype(at.dtype), rows)


class Interceptor:
    """What `nn.intercept_methods` calls for every method of every module, under one `Peft`."""

    def __init__(self, table: Mapping[Path, tuple[Action, ...]], prefix: Path = ()):
        self.table, self.prefix = table, prefix
        self.frames: list[_Frame] = []

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        path = module.scope.path
        inside = path[: len(self.prefix)] == self.prefix
        actions = self.table.get(path[len(self.prefix) :], ()) if inside else ()
        nested = any(f.module.scope is module.scope for f in self.frames)
        self.frames.append(_Frame(module, path, _said_deterministic(context, args, kwargs)))
        try:
            if actions:
                return self._call(next_fun, args, kwargs, context, actions, nested)
            return _unchanged(next_fun, args, kwargs, context)
        finally:
            self.frames.pop()

    def _call(self, next_fun: Any, args: Any, kwargs: Any, context: Any, actions: Any, nested: bool) -> Any:
        module, method = context.module, context.method_name
        owner = geometry.owner_of(context.orig_method)
        args, kwargs = geometry.by_position(context.orig_method, module, args, kwargs)
        by_kind: dict[str, list[tuple[Action, Leaves]]] = {"weight": [], "attention": [], "output": []}
        for action in actions:
            leaves = _read(module, action)
            if leaves is not None:
                by_kind[action.site.kind].append((action, leaves))
        if by_kind["weight"] and geometry.find(owner, method):
            y = self._weights(by_kind["weight"], next_fun, args, kwargs, module, method, owner)
        elif by_kind["attention"] and (hook := attention.find(owner, method)):
            y = hook(next_fun, args, kwargs, module, functools.partial(_extend, by_kind["attention"]))
        else:
            y = _unchanged(next_fun, args, kwargs, context)
        # A subclass whose __call__ calls its parent's passes here twice; the output is the outer one's.
        if method == "__call__" and not nested:
            for action, leaves in by_kind["output"]:
                y = _on_output(action, leaves, y)
        return y

    def _weights(
        self, pairs: Any, next_fun: Any, args: Any, kwargs: Any, module: nn.Module, method: str, owner: str
    ) -> Any:
        own = module.variables["params"]
        # A geometry tells its weight from the module's own parameters; the adapter's leaves are none of them.
        added = {action.leaf_path(n)[-1] for action, leaves in pairs for n in (*action.stored, *leaves)}
        shapes = {k: jnp.shape(peek(v)) for k, v in own.items()
                  if k not in added and not isinstance(v, (Mapping, Marker))}  # fmt: skip
        call = Call(module, method, args, kwargs, shapes)
        factory = geometry.find(owner, method)
        found = factory(call) if factory is not None else None
        # Other methods of an owner may use another of its weights.
        pairs = [(a, leaves) for a, leaves in pairs if found is None or a.site.leaf == found.leaf]
        if not pairs:
            return _recomputed(lambda: next_fun(*args, **kwargs), own)
        site = pairs[0][0].site
        plain = site.geometry.inner if isinstance(site.geometry, Parts) else site.geometry
        if found is None:
            raise ValueError(f"{site.name!r} was bound as {plain}, but {owner}.{method} is called in a form that no "
                             "geometry explains; bind with inputs of the same form")  # fmt: skip
        if found != plain:
            raise ValueError(
                f"{site.name!r} was bound as {plain}, but this call uses its weight as {found}; "
                "bind with inputs of the same form"
            )
        weight = lambda: meta.unbox(own[site.leaf])  # noqa: E731 (opened where it is used, and again where recomputed)
        x, like = args[found.argument], jnp.zeros((), peek(own[site.leaf]).dtype)
        dtype = canonicalize_dtype(*([] if site.lookup and method == "__call__" else [x]), like, dtype=module.dtype) \
            if hasattr(module, "dtype") else canonicalize_dtype(x, like)  # fmt: skip
        bias = meta.unbox(own[found.bias]) if found.bias is not None and found.bias in own else None

        def original(raw: Any) -> Any:
            new = list(args)
            new[found.argument] = raw
            return next_fun(*new, **kwargs)

        at = _Running(call, original, weight, lambda: bias, dtype, lambda x, rate: x, _is_plain(module, owner, found))
        for i, (action, leaves) in enumerate(pairs):
            at.dropout = self._dropout(module, getattr(action.method, "dropout", 0.0))
            if method == "attend":
                run = functools.partial(_attend, action, leaves, at)
            else:
                run = _apply_weight(action, leaves, at)
            done, used = [a for a, _ in pairs[: i + 1]], [own for _, own in pairs[: i + 1]]
            at = dataclasses.replace(
                at,
                run=run,
                weight=lambda d=done, u=used: merge_weight(d, u, weight()),
                bias=lambda d=done, u=used: None if bias is None else merge_bias(d, u, bias),
                plain=False,
            )
        return _recomputed(lambda: at.run(x), own)

    def _dropout(self, module: nn.Module, rate: float) -> Callable[[Any, float], Any]:
        """Dropout on an adapter's input: as the nearest enclosing call says, and off without a "dropout" rng.

        Its key is drawn here: Flax draws none where a call is traced to be recomputed.
        """
        off = lambda x, rate: x  # noqa: E731
        said = next((f.deterministic for f in reversed(self.frames) if f.deterministic is not None), False)
        if rate == 0.0 or (not isinstance(said, jax.Array) and said):
            return off
        if not module.scope.has_rng("dropout"):  # type: ignore[union-attr]
            if self.frames[0].module.scope.has_rng("dropout"):  # type: ignore[union-attr]
                raise ValueError(
                    f"adapter dropout at {join(module.scope.path)!r}: a transform around it does not pass on the "  # type: ignore[union-attr]
                    "'dropout' rng; add split_rngs={'dropout': True} to the nn.scan, or set dropout=0.0"
                )
            return off
        key = module.scope.make_rng("dropout")  # type: ignore[union-attr]

        def drop(a: jax.Array, rate: float) -> jax.Array:
            keep = jax.random.bernoulli(key, 1.0 - rate, a.shape)
            dropped = jnp.where(keep, a / jnp.asarray(1.0 - rate, a.dtype), jnp.zeros_like(a))
            return jnp.where(said, a, dropped) if isinstance(said, jax.Array) else dropped

        def apply(x: Any, rate: float) -> Any:
            if rate == 0.0 or isinstance(x, Lookup):
                return x
            return x.map(lambda a: drop(a, rate)) if isinstance(x, Patches) else drop(x, rate)

        return apply


def _unchanged(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """A call that no method changes. One that multiplies by a quantised weight of its module is recomputed."""
    if geometry.find(geometry.owner_of(context.orig_method), context.method_name):
        return _recomputed(lambda: next_fun(*args, **kwargs), context.module.variables.get("params", {}))
    return next_fun(*args, **kwargs)


def _recomputed(run: Callable[[], Any], own: Mapping[str, Any]) -> Any:
    """The call, whose backward pass dequantises its weight again: what was made for the forward pass is not kept.

    Nothing else is done twice. The product is not needed to differentiate it, so what stays of the call is its input.
    """
    if any(isinstance(leaf, Quantized) for leaf in own.values()):
        return jax.checkpoint(run)()
    return run()


def _is_plain(module: nn.Module, owner: str, geom: Any) -> bool:
    """Whether a module is one of Flax's own linear layers, and multiplies as any other does."""
    own_way = any(getattr(module, name, None) is not None for name in ("dot_general", "dot_general_cls", "precision"))
    return isinstance(geom, Contraction) and owner.startswith("flax.linen.") and not own_way


def _read(module: nn.Module, action: Action) -> Leaves | None:
    """An action's leaves from the called module's scope, or None where the scope is not the adapted one.

    HuggingFace's tied heads call ``module.apply({...}, x)`` inside the model: a scope of its own, without adapter.
    """
    own = module.variables.get("params", {})
    key = lambda name: action.leaf_path(name)[-1]  # noqa: E731
    needs_overlay = action.site.via != FUSED or action.names != action.stored
    if needs_overlay and any(key(n) in own for n in action.stored):
        raise ValueError(
            f"{action.site.name!r} is changed before its module is called (path taken: {action.site.via}); inside "
            "intercept(), give the model peft.overlay(params, adapter) instead of combine(params, adapter)"
        )
    if action.site.via != FUSED or not any(key(n) in own for n in action.names):
        return None
    return {name: meta.unbox(own[key(name)]) for name in action.names}


def _extend(pairs: Any, key: jax.Array, value: jax.Array, mask: Any) -> Any:
    for action, leaves in pairs:
        key, value, mask = action.method.apply(_cast(leaves, key.dtype), key, value, mask)
    return key, value, mask


def _on_output(action: Action, leaves: Leaves, y: Any) -> Any:
    first = y[0] if isinstance(y, tuple) else y
    tokens = first.reshape(-1, first.shape[-1]) if geometry.base.flatten_tokens() else first
    changed = action.method.apply(_cast(leaves, first.dtype), tokens).reshape(first.shape)
    if not isinstance(y, tuple):
        return changed
    return type(y)(changed, *y[1:]) if hasattr(y, "_fields") else (changed, *y[1:])


_bypassed: contextvars.ContextVar[bool] = contextvars.ContextVar("bypassed", default=False)


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """In here `Peft.apply` runs the model as if there were no adapter: what an adapter costs is seen against that."""
    token = _bypassed.set(True)
    try:
        yield
    finally:
        _bypassed.reset(token)


def is_bypassed() -> bool:
    """Whether this runs within `bypassed`."""
    return _bypassed.get()


_running: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("running", default=())


@contextlib.contextmanager
def intercept(table: Mapping[Path, tuple[Action, ...]], prefix: Path = ()) -> Iterator[None]:
    """Runs what is called inside under the actions. Enter it inside what is jitted: a trace made before ignores it."""
    running = _running.get()
    if (table, prefix) in running:  # e.g. peft.apply inside peft.intercept(): once is enough, twice would be wrong
        yield
        return
    token = _running.set((*running, (table, prefix)))
    try:
        with nn.intercept_methods(Interceptor(table, prefix)):
            yield
    finally:
        _running.reset(token)
