"""The interceptor: applies adapters inside the calls of a Linen model's own modules.

It reads adapter leaves from the called module's scope, where the model's own scans have sliced them together with the
base. Weights whose use cannot be attributed to a module call go through `jpeft.linen.box`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.core.scope import union_filters
from jax.core import Tracer

from jpeft.core.actions import Action, Active
from jpeft.core.dataflow.replace import Change, Evaluate, evaluate
from jpeft.core.entering import RootCall, context_of, not_called, run_root
from jpeft.core.geometry import Call, Contraction, Geometry
from jpeft.core.injection import ModuleCall, run_call, unchanged
from jpeft.core.method import Leaves
from jpeft.core.operation import Dropout, no_dropout
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized
from jpeft.core.signatures import by_position, owner_of, signature_of
from jpeft.core.sites import FUSED, Site
from jpeft.core.tree import Path, flatten, join, peek
from jpeft.linen import attention, layers, rewrite
from jpeft.linen.box import MARKER, Changed, Marker, Opened, opened, shared_leaves, sharing

_is_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("is_plain", default=False)  # without methods
_active: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("active", default=())


@contextlib.contextmanager
def intercept(peft: Peft, prefix: Path = ()) -> Iterator[None]:
    """A context in which module calls apply a method's actions. Enter it inside the function that is jitted.

    Args:
      peft: the bound method.
      prefix: path of the model, if it is part of a larger module.
    """
    active = _active.get()
    if (peft, prefix) in active:  # e.g. peft.apply inside peft.intercept(): applying twice would be wrong
        yield
        return
    token = _active.set((*active, (peft, prefix)))
    try:
        with nn.intercept_methods(Interceptor(peft, prefix)):
            yield
    finally:
        _active.reset(token)


# --- intercepted calls ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LinenCall(ModuleCall):
    """A call of a Linen module, which reads its parameters from its scope."""

    @classmethod
    def of(cls, next_fun: Any, args: Any, kwargs: Any, context: Any) -> _LinenCall:
        """The call from the arguments of an interceptor. Arguments given by name are moved to their position."""
        owner = owner_of(context.orig_method)
        args, kwargs = by_position(context.orig_method, context.module, args, kwargs)
        return cls(next_fun, args, kwargs, context.module, context.method_name, owner)

    @property
    def variables(self) -> Mapping[str, Any]:
        """The module's own parameters, with adapter leaves."""
        return self.module.variables.get("params", {})

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(leaf, Quantized) for leaf in self.variables.values())

    @property
    def is_simple(self) -> bool:
        own = set(self.module.variables) - {"params"}
        return not own and not any(isinstance(value, Mapping) for value in self.variables.values())

    def _rerun(self, x: Any) -> Any:
        # A compact method of the module itself can run only once in a call.
        own = {name: meta.unbox(value) for name, value in self.variables.items() if name != MARKER}
        copy = self.module.clone(parent=None)
        return copy.apply({"params": own}, x, *self.args[1:], **self.kwargs, method=self.method)

    def stored(self, name: str) -> Any:
        return peek(self.variables[name])

    def codes(self, name: str) -> Quantized | None:
        leaf = self.variables[name]
        return leaf.value if isinstance(leaf, Opened) else None

    def value(self, name: str) -> jax.Array | None:
        return meta.unbox(self.variables.get(name))

    def value_below(self, path: Path) -> jax.Array:
        found: Any = self.variables
        for name in path:
            found = found[name]
        return jnp.asarray(meta.unbox(found))

    def without(self, adapter_leaves: Collection[str]) -> Call:
        own = {n: v for n, v in self.variables.items() if n not in adapter_leaves}
        shapes = {n: jnp.shape(peek(v)) for n, v in own.items() if not isinstance(v, (Mapping, Marker))}
        return layers.make_call(self.module, self.method, self.args, self.kwargs, shapes)

    @property
    def factory(self) -> Any:
        return layers.find(self.owner, self.method)

    @property
    def hook(self) -> Any:
        return attention.find(self.owner, self.method)

    def is_plain(self, geometry: Geometry) -> bool:
        fields = ("dot_general", "dot_general_cls", "precision")
        is_default = all(getattr(self.module, name, None) is None for name in fields)
        return isinstance(geometry, Contraction) and self.owner.startswith("flax.linen.") and is_default

    def with_products(self, sites: Mapping[str, Site], run: Callable[[Any], Any], change: Change) -> Any:
        boxes = {name: self.variables[name] for name in sites}
        for name, box in boxes.items():
            if isinstance(peek(box), np.ndarray) or isinstance(box, Quantized):
                raise ValueError(_needs_overlay(sites[name]))
        # The arrays that a box holds: opening one may add a sharding constraint.
        values = {n: box.unbox() if isinstance(box, Opened) else jax.tree.leaves(box)[0] for n, box in boxes.items()}
        with opened({sites[name].weight_path: value for name, value in values.items()}):
            return rewrite.run(self.module, functools.partial(run, self), values, functools.partial(evaluate, change))

    def with_trace(self, run: Callable[[Any], Any], evaluate: Evaluate) -> Any:
        return rewrite.run(self.module, functools.partial(run, self), {}, evaluate)


@dataclass(frozen=True)
class _OpenCall:
    """A module call that has not returned yet, and its ``deterministic`` flag."""

    module: nn.Module
    deterministic: Any


class Interceptor:
    """The function that `nn.intercept_methods` calls for every method call of every module."""

    def __init__(self, peft: Peft, prefix: Path = ()):
        self.peft, self.prefix = peft, prefix
        self.actions = peft.by_owner()
        self.entries = peft.entries
        self.open_calls: list[_OpenCall] = []
        self.context: Mapping[str, Any] = {}

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup" or _is_plain.get():
            return next_fun(*args, **kwargs)
        if self.open_calls:
            return self._call(next_fun, args, kwargs, context)
        with self._sharing(module):
            if self.entries and module.scope.path == self.prefix:
                return run_root(self._root_call(next_fun, context), self.entries, args, kwargs)
            self.context = self._context_of(context, args, kwargs)
            return self._call(next_fun, args, kwargs, context)

    def _call(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs a call under the actions on its module."""
        module = context.module
        path = module.scope.path
        inside = path[: len(self.prefix)] == self.prefix
        actions = self.actions.get(path[len(self.prefix) :], ()) if inside else ()
        nested = any(outer.module.scope is module.scope for outer in self.open_calls)
        self.open_calls.append(_OpenCall(module, _deterministic(context, args, kwargs)))
        try:
            call = _LinenCall.of(next_fun, args, kwargs, context)
            found = [_read(module, action, self.context) for action in actions]
            active = [own for own in found if own is not None]
            dropout = functools.partial(self._dropout, module)
            return run_call(call, active, dropout, nested) if active else unchanged(call)
        finally:
            self.open_calls.pop()

    def _root_call(self, next_fun: Any, context: Any) -> RootCall:
        """The call of the model itself."""

        def run(args: Any, kwargs: Any, found: Mapping[str, Any]) -> Any:
            self.context = found
            return self._call(next_fun, args, kwargs, context)

        module, name = context.module, context.method_name

        def plain(method: str, args: Any, kwargs: Any, at: Path | None) -> Any:
            return _plain_pass(self.peft.model, module, method or name, args, kwargs, at)(dict(module.variables))

        def shared(slug: str) -> Leaves:
            return meta.unbox(dict(module.variables.get("params", {}).get(slug, {})))

        outputs = functools.partial(_outputs, self.peft.model, module, name)
        return RootCall(context.orig_method, module, _has_cache(module), run, outputs, plain, shared)

    def _context_of(self, context: Any, args: Any, kwargs: Any) -> Mapping[str, Any]:
        """The arguments of the outermost call by name, if a method reads them."""
        if not any(action.method.reads_context for own in self.actions.values() for action in own):
            return {}
        return context_of(context.orig_method, context.module, _has_cache(context.module), args, kwargs)

    def _sharing(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context with the leaves that sites share, for the outermost call."""
        slugs = {action.shared for own in self.actions.values() for action in own if action.shared}
        scope = module.scope
        while slugs and scope is not None and len(scope.path) > len(self.prefix) and scope.parent is not None:
            scope = scope.parent
        return sharing(scope.variables().get("params", {}), slugs) if slugs and scope else contextlib.nullcontext()

    def _dropout(self, module: nn.Module, draws: bool) -> Dropout:
        """Random numbers, as of dropout; off if the nearest enclosing call that has the flag is deterministic.

        It is also off without a "dropout" rng. The key is drawn here: Flax draws none in a call that is traced to be
        rematerialized.
        """
        flags = (outer.deterministic for outer in reversed(self.open_calls))
        deterministic = next((flag for flag in flags if flag is not None), False)
        if not draws or (not isinstance(deterministic, jax.Array) and deterministic):
            return no_dropout
        scope = module.scope  # not `module.path` and `module.make_rng`: fields of a module may have these names
        assert scope is not None
        if not _has_dropout_rng(module):
            if _has_dropout_rng(self.open_calls[0].module):
                raise ValueError(
                    f"adapter dropout at {join(scope.path)!r}: a transform around it does not pass on the "
                    "'dropout' rng; add split_rngs={'dropout': True} to the nn.scan, or set dropout=0.0"
                )
            return no_dropout
        return Dropout(scope.make_rng("dropout"), deterministic)


def _has_cache(module: nn.Module) -> bool:
    return bool(module.variables.get("cache")) or module.is_mutable_collection("cache")


def _outputs(model: nn.Module, module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The shapes of the outputs that a model has without methods, see `_plain_pass`."""
    plain, variables = _plain_pass(model, module, method, args, kwargs), dict(module.variables)
    try:
        return jax.eval_shape(plain, variables)
    except RecursionError:  # inside its own nn.jit
        with jax.disable_jit():
            return jax.eval_shape(plain, variables)


def _plain_pass(
    model: nn.Module,
    module: nn.Module,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    at: Path | None = None,
) -> Callable[[Any], Any]:
    """A pass of a model without methods, as a function of its variables. What it writes to them is lost.

    Args:
      model: the model.
      module: the same, bound, in a call.
      method: the method's name.
      args: its arguments.
      kwargs: its other arguments.
      at: the path of a module, whose output is given beside the model's.
    """
    scope = module.scope
    assert scope is not None
    held: Any = scope.rngs
    rngs = {name: rng.as_jax_rng() for name, rng in held.items()}  # without drawing from the call's own
    mutable = scope.mutable if at is None else union_filters(scope.mutable, _INTERMEDIATES)

    def is_wanted(inner: nn.Module, name: str) -> bool:
        return name == "__call__" and inner.scope is not None and inner.scope.path == at

    def call(variables: Any) -> Any:
        own = {name: held for name, held in variables.items() if at is None or name != _INTERMEDIATES}
        own["params"] = jax.tree.map(_unchanged_leaf, own.get("params", {}), is_leaf=lambda x: isinstance(x, Changed))
        captured = False if at is None else is_wanted
        token = _is_plain.set(True)
        try:
            y = model.apply(
                own, *args, **kwargs, rngs=rngs, method=method, mutable=mutable, capture_intermediates=captured
            )
        finally:
            _is_plain.reset(token)
        if at is None:
            return y if mutable is False else y[0]
        found = flatten(y[1].get(_INTERMEDIATES, {})).get((*at, "__call__"))
        if found is None:
            raise ValueError(not_called(at))
        return y[0], found[-1]

    return call


_INTERMEDIATES = "intermediates"


def _unchanged_leaf(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Changed) else leaf


def _read(module: nn.Module, action: Action, context: Mapping[str, Any]) -> Active | None:
    """An action with its leaves from the called module's scope, or None if the scope has none.

    HuggingFace's tied heads call ``module.apply({...}, x)`` inside the model: a scope of its own, without an adapter.
    """
    variables = module.variables.get("params", {})
    keys = {name: action.leaf_path(name)[-1] for name in action.stored}
    if not any(key in variables for key in keys.values()):
        return None
    marker = variables.get(MARKER)
    token = marker.token if isinstance(marker, Marker) else None
    if action.site.via != FUSED or (action.needs_call and token is None):
        raise ValueError(_needs_overlay(action.site, action.shared))
    leaves = {name: meta.unbox(variables[key]) for name, key in keys.items()}
    return Active(action, leaves, shared_leaves(action, token), context)


def _needs_overlay(site: Site, shared: str = "") -> str:
    fused = "has leaves that other sites share" if shared else "depends on the arguments of the model's call"
    why = fused if site.via == FUSED else "is changed before its module is called"
    return (
        f"{site.name!r} {why} (path taken: {site.via}); inside intercept(), give the model "
        "peft.overlay(params, adapter) instead of combine(params, adapter)"
    )


# --- dropout --------------------------------------------------------------------------------------------------------

_TRAINING = ("train", "training", "is_training")


def _deterministic(context: Any, args: Any, kwargs: Any) -> Any:
    """The call's ``deterministic`` flag, from its arguments, their defaults or module fields; None if unspecified."""
    signature = signature_of(getattr(context.orig_method, "func", context.orig_method))
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


def _has_dropout_rng(module: nn.Module) -> bool:
    return module.scope is not None and module.scope.has_rng("dropout")
