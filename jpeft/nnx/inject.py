"""Applies adapters inside the calls of the modules of a copy of an NNX model, which hold the adapter's leaves."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft.core.actions import Action, Active, merge_layer, merge_stored
from jpeft.core.dataflow.replace import Change, Evaluate, evaluate
from jpeft.core.entering import Entry, RootCall, context_of, run_root
from jpeft.core.geometry import Call, Contraction, Geometry
from jpeft.core.injection import ModuleCall, run_call, unchanged
from jpeft.core.method import Leaves
from jpeft.core.operation import whole_geometry
from jpeft.core.quantized import Quantized, dequantize_leaf
from jpeft.core.signatures import by_position, owner_of
from jpeft.core.sites import Site, without_stack
from jpeft.core.tree import Path, split_arrays
from jpeft.nnx import attention, layers
from jpeft.nnx.adapted import original
from jpeft.nnx.dropout import draw, dropout
from jpeft.nnx.plain import is_plain, run_plain
from jpeft.nnx.state import copied, modules, raw, variables
from jpeft.nnx.variables import AdapterParam, DropoutKey, FrozenAdapterParam

CHANGES = "jpeft_changes"  # the attribute of a module that holds its `Changes`


class Token:
    """The identity of one copy of a model, under which its modules find what belongs to the call of the whole model.

    It also keeps ``nnx.jit`` from using a trace again that has captured something of another call.
    """


@dataclass(frozen=True)
class Read:
    """A parameter whose reading is changed.

    Attributes:
      leaf: the parameter's name in this module.
      weight: name of the weight here, for a weight that is merged as it is read.
      bias: name of the bias beside it, or None.
      actions: the actions that merge into the two; none for a weight that is only dequantized or cast.
      dtype: the dtype in which it is read, for one that trains in another.
      fused: whether the actions change calls of the module. It is merged where the model reads it outside of these,
        as in a method that it was not bound with.
    """

    leaf: str
    weight: str = ""
    bias: str | None = None
    actions: tuple[Action, ...] = ()
    dtype: Any = None
    fused: bool = False


@dataclass(frozen=True, repr=False)
class Changes:
    """The changes of a module: a static attribute, and so part of the graphdef and of the key of every cache.

    Attributes:
      actions: the actions on the module's calls.
      reads: the parameters whose reading is changed.
      token: of the copy, if something here belongs to the call of the whole model.
      added: names of the attributes that were added to the module.
    """

    actions: tuple[Action, ...] = ()
    reads: tuple[Read, ...] = ()
    token: Token | None = None
    added: tuple[str, ...] = ()

    def __repr__(self) -> str:
        actions = (*self.actions, *(action for how in self.reads for action in how.actions))
        return f"<{', '.join(dict.fromkeys(action.method.name for action in actions)) or 'changed'}>"

    @property
    def holds_adapter(self) -> bool:
        """Whether anything here is an adapter's: a quantized weight is dequantized without one."""
        return bool(self.actions or self.added or any(how.actions or how.dtype is not None for how in self.reads))

    def read(self, name: str) -> Read | None:
        """How a parameter is read, if that is changed."""
        return next((read for read in self.reads if read.leaf == name), None)


# --- the call of the whole model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """The needs of the call of the whole model: a static attribute of the root beside its `Changes`.

    Attributes:
      shared: names of the root's attributes that hold leaves which sites share, with the key and the leaf's name.
      reads_context: whether a method reads the model's arguments.
      entries: the members of the method that change these arguments, and the outputs.
    """

    shared: tuple[tuple[str, str, str], ...] = ()
    reads_context: bool = False
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class _Running:
    """The values that modules find while the model runs."""

    shared: Mapping[str, Leaves] = field(default_factory=lambda: MappingProxyType({}))
    context: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


ROOT = "jpeft_root"

_running: contextvars.ContextVar[Mapping[Any, _Running]] = contextvars.ContextVar(
    "running", default=MappingProxyType({})
)


def _run_root(module: Any, function: Callable[..., Any], method: str, args: Any, kwargs: Any) -> Any:
    """Runs a method of the model, in whose modules leaves that sites share and the call's arguments are found."""
    root: Root = vars(module)[ROOT]
    shared: dict[str, dict[str, Any]] = {}
    for attribute, slug, name in root.shared:
        shared.setdefault(slug, {})[name] = raw(vars(module)[attribute])
    draw(module, lambda own: next(a.site for a in vars(own)[CHANGES].actions if a.method.draws))
    plain = getattr(original(type(module)), method)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], context: Mapping[str, Any]) -> Any:
        token = _running.set({**_running.get(), vars(module)[CHANGES].token: _Running(shared, context)})
        try:
            return _run(module, function, method, args, kwargs)
        finally:
            _running.reset(token)

    if root.entries:
        unchanged_pass = functools.partial(run_plain, module, method)

        def outputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return jax.eval_shape(lambda: unchanged_pass("", args, kwargs))

        has_cache = _has_cache(module)
        call = RootCall(plain, module, has_cache, run, outputs, unchanged_pass, lambda slug: shared.get(slug, {}))
        return run_root(call, root.entries, args, kwargs)
    context = context_of(plain, module, _has_cache(module), args, kwargs) if root.reads_context else {}
    return run(args, kwargs, context)


def _has_cache(module: Any) -> bool:
    return any(isinstance(v, nnx.Cache) for _, v in nnx.to_flat_state(nnx.state(module, nnx.Cache)))


# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NnxCall(ModuleCall):
    """A call of a module of the copy, which holds its parameters and the adapter's leaves as attributes."""

    @property
    def changes(self) -> Changes:
        return vars(self.module)[CHANGES]

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(raw(v), Quantized) for v in variables(self.module).values())

    @property
    def is_simple(self) -> bool:
        own = variables(self.module).values()
        inside = any(module is not self.module for _, module in modules(self.module))
        return not inside and all(isinstance(state, nnx.Param) for state in own)

    def _rerun(self, x: Any) -> Any:
        return self.next_fun(x, *self.args[1:], **self.kwargs)

    def stored(self, name: str) -> Any:
        return raw(vars(self.module)[name])

    def codes(self, name: str) -> Quantized | None:
        found = self.stored(name)
        return found if isinstance(found, Quantized) else None

    def value(self, name: str) -> jax.Array | None:
        return _plain_value(self.module, name)

    def value_below(self, path: Path) -> jax.Array:
        owner = next(module for at, module in modules(self.module) if at == path[:-1])
        if CHANGES in vars(owner):
            return jnp.asarray(_plain_value(owner, path[-1]))
        return jnp.asarray(dequantize_leaf(raw(vars(owner)[path[-1]])))

    def without(self, adapter_leaves: Collection[str]) -> Call:
        shapes = {n: np.shape(raw(v)) for n, v in variables(self.module).items() if _is_base(v, self.changes, n)}
        return layers.make_call(self.module, self.method, self.args, self.kwargs, shapes)

    @property
    def factory(self) -> Any:
        return layers.find(self.owner, self.method)

    @property
    def hook(self) -> Any:
        return attention.find(self.owner, self.method)

    def is_plain(self, geometry: Geometry) -> bool:
        own = vars(self.module)
        is_default = own.get("dot_general") in (None, jax.lax.dot_general) and all(
            own.get(name) is None for name in ("dot_general_cls", "precision", "preferred_element_type")
        )
        is_linear = self.owner.startswith("flax.nnx.") and isinstance(geometry, Contraction)
        is_sharded = len(self.args) > 1 and self.args[1] is not None and not isinstance(self.args[1], str)
        return is_linear and is_default and not is_sharded

    def with_products(self, sites: Mapping[str, Site], run: Callable[[Any], Any], change: Change) -> Any:
        values = {name: jnp.asarray(self.value(name)) for name in sites}
        return _Rewritten(self, run, values)(functools.partial(evaluate, change))

    def with_trace(self, run: Callable[[Any], Any], evaluate: Evaluate) -> Any:
        return _Rewritten(self, run, {})(evaluate)


class _Rewritten:
    """A call as a function from nothing to arrays, on a copy of the module and of its arguments.

    What it changes in their Variables is changed in the originals afterwards.
    """

    def __init__(self, call: _NnxCall, run: Callable[[Any], Any], values: Mapping[str, Any]):
        self.call, self.run, self.values, self.tag = call, run, values, object()
        self.restore: Callable[[list[Any]], Any] = list

    def __call__(self, evaluate: Evaluate) -> Any:
        """The outputs, as ``evaluate`` computes them from the trace, its constants and those that are weights."""
        call = self.call
        with nnx.update_context(self.tag):
            with nnx.split_context(self.tag) as context:
                graphdef, state = context.split((call.module, call.args, call.kwargs))
            closed = jax.make_jaxpr(functools.partial(self._traced, graphdef, state))()
            names = {id(value): name for name, value in self.values.items()}
            pairs = zip(closed.jaxpr.constvars, closed.consts, strict=True)
            weights = {v: names[id(c)] for v, c in pairs if id(c) in names}
            graphdef, state = self.restore(evaluate(closed.jaxpr, closed.consts, weights))
            with nnx.merge_context(self.tag, inner=False) as context:
                return context.merge(graphdef, state)[-1]

    def _traced(self, graphdef: Any, state: Any) -> list[Any]:
        with nnx.merge_context(self.tag, inner=True) as context:
            module, args, kwargs = context.merge(graphdef, copied(state))
        held = vars(module)
        own = {name: held[name] for name in self.values}
        held.update({name: own[name].replace(value) for name, value in self.values.items()})
        method = getattr(original(type(module)), self.call.method)
        copy = dataclasses.replace(
            self.call, module=module, next_fun=functools.partial(method, module), args=args, kwargs=kwargs
        )
        y = self.run(copy)
        held.update(own)
        with nnx.split_context(self.tag) as context:
            out = context.split((module, args, kwargs, y))
        arrays, self.restore = split_arrays(out)
        return arrays


# The calls of modules that run, and the weights that the actions change in each.
_calls: contextvars.ContextVar[tuple[tuple[Changes, Collection[str]], ...]] = contextvars.ContextVar(
    "calls", default=()
)


@contextlib.contextmanager
def _calling(changes: Changes, call: _NnxCall) -> Iterator[None]:
    """A context in which the module reads the weights that the actions change in its call as they are."""
    weights = {
        action.site.leaf
        for action in changes.actions
        if action.site.kind == "weight"
        and (call.name in calls if (calls := whole_geometry(action.site).calls) else call.factory is not None)
    }
    token = _calls.set((*_calls.get(), (changes, weights)))
    try:
        yield
    finally:
        _calls.reset(token)


def _is_outside(changes: Changes, how: Read) -> bool:
    """Whether the model runs, and reads a weight outside of the calls that change it."""
    running = _calls.get()
    return bool(running) and not any(how.weight in weights and own == changes for own, weights in running)


def run(module: Any, function: Callable[..., Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a method of a module under the actions on it."""
    if is_plain():
        return function(*args, **kwargs)
    if ROOT in vars(module) and vars(module)[CHANGES].token not in _running.get():
        return _run_root(module, function, method, args, kwargs)
    return _run(module, function, method, args, kwargs)


def _run(module: Any, function: Callable[..., Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    changes: Changes = vars(module)[CHANGES]
    plain = getattr(original(type(module)), method)
    args, kwargs = by_position(plain, module, args, kwargs)
    call = _NnxCall(function, args, kwargs, module, method, owner_of(plain))
    with _calling(changes, call):
        if not changes.actions:
            return unchanged(call)
        active = [_active(module, action) for action in changes.actions]
        return run_call(call, active, functools.partial(dropout, module))


def _active(module: Any, action: Action) -> Active:
    held, found = vars(module), _found(module, action)
    leaves = {name: raw(held[action.leaf_path(name)[-1]]) for name in action.stored}
    return Active(action, leaves, found.shared.get(action.shared, {}), found.context)


def _found(module: Any, action: Action) -> _Running:
    """The values that belong to the call of the whole model.

    Raises:
      ValueError: the model does not run.
    """
    if not action.needs_call:
        return _Running()
    token = vars(module)[CHANGES].token
    if token not in _running.get():
        what = "leaves that all sites share" if action.shared else "the arguments of the model's call"
        raise ValueError(
            f"{action.method.name} at {action.site.name!r} needs {what}: call the whole model, not a module of it"
        )
    return _running.get()[token]


# --- reads ------------------------------------------------------------------------------------------------------------


def read(module: Any, name: str) -> Any:
    """The value that a module reads as a changed attribute: for a Variable, another with the changed value."""
    if name == attention.ATTENTION_FN:
        return attention.read_attention_fn(module)
    variable, changes = vars(module)[name], vars(module)[CHANGES]
    how = changes.read(name)
    if how is not None and how.actions and not is_plain() and (not how.fused or _is_outside(changes, how)):
        return variable.replace(_merged(module, how))
    value = _plain_value(module, name)
    return variable if value is raw(variable) else variable.replace(value)


def _merged(module: Any, how: Read) -> jax.Array:
    """A weight or bias as the actions merge into it: of one layer, or of all where the model reads the whole stack."""
    weight, bias = _plain_value(module, how.weight), _plain_value(module, how.bias) if how.bias else None
    active = [_active(module, action) for action in how.actions]
    shared, leaves = [a.shared for a in active], [a.leaves for a in active]
    site = how.actions[0].site
    is_layer = np.shape(weight) == without_stack(site.stored, site.stack)
    pair = (merge_layer if is_layer else merge_stored)(how.actions, shared, leaves, weight, bias)
    merged = pair[0] if how.leaf == how.weight else pair[1]
    assert merged is not None
    return merged


def _plain_value(module: Any, name: str) -> Any:
    """A parameter without the actions' changes: dequantized, and in the dtype that the model reads."""
    variable = vars(module).get(name)
    if variable is None:
        return None
    value, how = dequantize_leaf(raw(variable)), vars(module)[CHANGES].read(name)
    return value if how is None or how.dtype is None or value is None else value.astype(how.dtype)


def _is_base(variable: nnx.Variable, changes: Changes, name: str) -> bool:
    """Whether a Variable is a parameter of the model, not a leaf of an adapter."""
    if isinstance(variable, AdapterParam):  # one that takes the place of a parameter trains in it
        how = changes.read(name)
        return how is not None and how.dtype is not None
    return isinstance(variable, nnx.Param) and not isinstance(variable, (FrozenAdapterParam, DropoutKey))
