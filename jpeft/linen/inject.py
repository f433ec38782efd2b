"""The interceptor: applies adapters inside a Linen model's own module calls, without touching its code.

It reads adapter leaves from the called module's own scope, where the model's own scans have sliced them together with
the base. Weights that no call explains go through `jpeft.linen.box`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype
from jax.core import Tracer

from jpeft.core import backend, geometry
from jpeft.core.actions import Action, cast_leaves, merge_bias, merge_weight
from jpeft.core.geometry import Call, Contraction, Lookup, Parts, Patches
from jpeft.core.method import Leaves
from jpeft.core.quantized import Quantized
from jpeft.core.sites import FUSED, Site, map_axes
from jpeft.core.tree import Path, join, peek
from jpeft.linen import attention, registry
from jpeft.linen.box import Marker

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
    signature = registry.signature_of(getattr(context.orig_method, "func", context.orig_method))
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
    """The `jpeft.core.method.Linear` of one call."""

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


@dataclass(frozen=True)
class _ModuleCall:
    """An intercepted call of a module's method."""

    next_fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module
    method: str
    owner: str  # see `registry.owner_of`

    @classmethod
    def of(cls, next_fun: Any, args: Any, kwargs: Any, context: Any) -> _ModuleCall:
        """From what an interceptor is given; arguments given by name are put in their position."""
        owner = registry.owner_of(context.orig_method)
        args, kwargs = registry.by_position(context.orig_method, context.module, args, kwargs)
        return cls(next_fun, args, kwargs, context.module, context.method_name, owner)

    @property
    def variables(self) -> Mapping[str, Any]:
        """The module's own parameters, adapter leaves included."""
        return self.module.variables.get("params", {})

    def seen(self, added: Collection[str]) -> Call:
        """The call as a geometry sees it, without the adapter leaves ``added``."""
        own = {k: v for k, v in self.variables.items() if k not in added and not isinstance(v, (Mapping, Marker))}
        shapes = {k: jnp.shape(peek(v)) for k, v in own.items()}
        return registry.make_call(self.module, self.method, self.args, self.kwargs, shapes)

    def run(self) -> Any:
        """The call as it was made."""
        return self.next_fun(*self.args, **self.kwargs)

    def run_on(self, argument: int, x: Any) -> Any:
        """The call with another positional argument."""
        return self.next_fun(*self.args[:argument], x, *self.args[argument + 1 :], **self.kwargs)


@dataclass(frozen=True)
class _Running:
    """The operation at one site, as the next method finds it."""

    call: Call
    run: Callable[[Any], Any]  # input in the module's own layout -> output
    weight: Callable[[], jax.Array]
    bias: Callable[[], jax.Array | None]
    dtype: Any
    plain: bool  # see `jpeft.core.method.Linear.plain`
    original: tuple[Callable[[], jax.Array], jax.Array | None]  # the model's own weight and bias
    dropout: Callable[[Any, float], Any] = lambda x, rate: x

    @classmethod
    def start(cls, call: _ModuleCall, seen: Call, site: Site, geom: Any) -> _Running:
        """The module's own operation."""
        own = call.variables

        def weight() -> jax.Array:  # opened where it is used, and again where it is recomputed
            return meta.unbox(own[site.leaf])

        like = jnp.zeros((), peek(own[site.leaf]).dtype)
        inputs = [] if site.lookup and call.method == "__call__" else [call.args[geom.argument]]
        if hasattr(call.module, "dtype"):
            dtype = canonicalize_dtype(*inputs, like, dtype=call.module.dtype)
        else:
            dtype = canonicalize_dtype(call.args[geom.argument], like)
        bias = meta.unbox(own[geom.bias]) if geom.bias is not None and geom.bias in own else None
        run = functools.partial(call.run_on, geom.argument)
        plain = _is_plain(call.module, call.owner, geom)
        return cls(seen, run, weight, lambda: bias, dtype, plain, (weight, bias))

    def after(self, pairs: Sequence[tuple[Action, Leaves]], run: Callable[[Any], Any]) -> _Running:
        """The operation ``run``, which the actions so far have made of the module's own."""
        actions, leaves = [action for action, _ in pairs], [own for _, own in pairs]
        weight, bias = self.original
        return dataclasses.replace(
            self,
            run=run,
            weight=lambda: merge_weight(actions, leaves, weight()),
            bias=lambda: None if bias is None else merge_bias(actions, leaves, bias),
            plain=False,
        )


def _as_bound(site: Site, found: Any, what: str) -> Any:
    """The geometry of a call, if it is the one that the site was bound with.

    Raises:
      ValueError: it is another, or none.
    """
    plain = site.geometry.inner if isinstance(site.geometry, Parts) else site.geometry
    if found is None:
        raise ValueError(
            f"{site.name!r} was bound as {plain}, but {what} is called in a form that no geometry explains; bind with "
            "inputs of the same form"
        )
    if found != plain:
        raise ValueError(
            f"{site.name!r} was bound as {plain}, but this call uses its weight as {found}; "
            "bind with inputs of the same form"
        )
    return found


def _apply_weight(action: Action, leaves: Leaves, at: _Running) -> Callable[[Any], Any]:
    """The module's operation changed by one method: input in the module's own layout -> output."""
    geom: Any = action.site.geometry
    leaves = cast_leaves(leaves, at.dtype)

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


def _attend(action: Action, leaves: Leaves, at: _Running) -> Callable[[Any], Any]:
    """An embedding used as an output head: the changed lookup, transposed."""
    leaves = cast_leaves(leaves, at.dtype)

    def weight() -> jax.Array:
        return at.weight().astype(at.dtype)

    base = _Base(lambda z: z @ weight(), weight, lambda: None, lambda z, rate: z)

    def run(query: Any) -> Any:
        changed = functools.partial(action.method.apply, leaves, base)
        return geometry.attend(changed, query.astype(at.dtype), action.site.inputs)

    return run


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
            call = _ModuleCall.of(next_fun, args, kwargs, context)
            return self._call(call, actions, nested) if actions else _unchanged(call)
        finally:
            self.frames.pop()

    def _call(self, call: _ModuleCall, actions: tuple[Action, ...], nested: bool) -> Any:
        by_kind: dict[str, list[tuple[Action, Leaves]]] = {"weight": [], "attention": [], "output": []}
        for action in actions:
            leaves = _read(call.module, action)
            if leaves is not None:
                by_kind[action.site.kind].append((action, leaves))
        if by_kind["weight"] and registry.find(call.owner, call.method):
            y = self._weights(call, by_kind["weight"])
        elif by_kind["attention"] and (hook := attention.find(call.owner, call.method)):
            extend = functools.partial(_extend, by_kind["attention"])
            y = hook(call.next_fun, call.args, call.kwargs, call.module, extend)
        else:
            y = _unchanged(call)
        # A subclass whose __call__ calls its parent's passes here twice; the output is the outer one's.
        if call.method == "__call__" and not nested:
            for action, leaves in by_kind["output"]:
                y = _on_output(action, leaves, y)
        return y

    def _weights(self, call: _ModuleCall, pairs: Sequence[tuple[Action, Leaves]]) -> Any:
        """The call with its weight changed by each action in turn."""
        own = call.variables
        # A geometry tells its weight from the module's own parameters; the adapter's leaves are none of them.
        added = {action.leaf_path(n)[-1] for action, leaves in pairs for n in (*action.stored, *leaves)}
        seen = call.seen(added)
        factory = registry.find(call.owner, call.method)
        found = factory(seen) if factory is not None else None
        # Other methods of an owner may use another of its weights.
        pairs = [(a, leaves) for a, leaves in pairs if found is None or a.site.leaf == found.leaf]
        if not pairs:
            return _recomputed(call.run, own)
        site = pairs[0][0].site
        found = _as_bound(site, found, f"{call.owner}.{call.method}")
        at = _Running.start(call, seen, site, found)
        for i, (action, leaves) in enumerate(pairs):
            at = dataclasses.replace(at, dropout=self._dropout(call.module, action.method.input_dropout))
            change = _attend if call.method == "attend" else _apply_weight
            at = at.after(pairs[: i + 1], change(action, leaves, at))
        return _recomputed(lambda: at.run(call.args[found.argument]), own)

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


def _unchanged(call: _ModuleCall) -> Any:
    """A call that no method changes. One that multiplies by a quantized weight of its module is recomputed."""
    return _recomputed(call.run, call.variables) if registry.find(call.owner, call.method) else call.run()


def _recomputed(run: Callable[[], Any], own: Mapping[str, Any]) -> Any:
    """The call, whose backward pass dequantizes its weight again: what was made for the forward pass is not kept.

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
        key, value, mask = action.method.apply(cast_leaves(leaves, key.dtype), key, value, mask)
    return key, value, mask


def _on_output(action: Action, leaves: Leaves, y: Any) -> Any:
    first = y[0] if isinstance(y, tuple) else y
    tokens = first.reshape(-1, first.shape[-1]) if backend.flatten_tokens() else first
    changed = action.method.apply(cast_leaves(leaves, first.dtype), tokens).reshape(first.shape)
    if not isinstance(y, tuple):
        return changed
    return type(y)(changed, *y[1:]) if hasattr(y, "_fields") else (changed, *y[1:])


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
