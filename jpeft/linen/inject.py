"""The interceptor: applies adapters inside the calls of a Linen model's own modules.

It reads adapter leaves from the called module's scope, where the model's own scans have sliced them together with the
base. Weights whose use cannot be attributed to a module call go through `jpeft.linen.box`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype
from jax.core import Tracer

from jpeft.core import backend
from jpeft.core.actions import Action, cast_leaves, merge_layer, merge_matrix, used_leaves
from jpeft.core.dataflow.views import Product
from jpeft.core.geometry import Call, Contraction, Geometry, Lookup, Parts, Patches, attend
from jpeft.core.method import Leaves
from jpeft.core.quantized import Quantized
from jpeft.core.sites import FUSED, Site, map_axes
from jpeft.core.tree import Path, join, peek
from jpeft.linen import attention, registry, rewrite
from jpeft.linen.box import MARKER, Marker, Opened, opened, shared_leaves, sharing

_active: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("active", default=())


@contextlib.contextmanager
def intercept(actions: Mapping[Path, tuple[Action, ...]], prefix: Path = ()) -> Iterator[None]:
    """A context in which module calls apply actions. Enter it inside the function that is jitted.

    Args:
      actions: the actions on each module, by its path.
      prefix: path of the model, if it is part of a larger module.
    """
    active = _active.get()
    if (actions, prefix) in active:  # e.g. peft.apply inside peft.intercept(): applying twice would be wrong
        yield
        return
    token = _active.set((*active, (actions, prefix)))
    try:
        with nn.intercept_methods(Interceptor(actions, prefix)):
            yield
    finally:
        _active.reset(token)


# --- intercepted calls ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ModuleCall:
    """An intercepted call of a module's method; `owner` is the class that defines the method."""

    next_fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module
    method: str
    owner: str

    @classmethod
    def of(cls, next_fun: Any, args: Any, kwargs: Any, context: Any) -> _ModuleCall:
        """The call from the arguments of an interceptor. Arguments given by name are moved to their position."""
        owner = registry.owner_of(context.orig_method)
        args, kwargs = registry.by_position(context.orig_method, context.module, args, kwargs)
        return cls(next_fun, args, kwargs, context.module, context.method_name, owner)

    @property
    def variables(self) -> Mapping[str, Any]:
        """The module's own parameters, with adapter leaves."""
        return self.module.variables.get("params", {})

    def without(self, adapter_leaves: Collection[str]) -> Call:
        """The call as a geometry sees it: a geometry finds its weight among the module's own parameters."""
        own = {n: v for n, v in self.variables.items() if n not in adapter_leaves}
        shapes = {n: jnp.shape(peek(v)) for n, v in own.items() if not isinstance(v, (Mapping, Marker))}
        return registry.make_call(self.module, self.method, self.args, self.kwargs, shapes)

    def run(self) -> Any:
        """Runs the original method."""
        return self.next_fun(*self.args, **self.kwargs)

    def run_on(self, argument: int, x: Any) -> Any:
        """Runs the original method with another positional argument."""
        return self.next_fun(*_with_item(self.args, argument, x), **self.kwargs)


@dataclass(frozen=True)
class _OpenCall:
    """A module call that has not returned yet, and its ``deterministic`` flag."""

    module: nn.Module
    deterministic: Any


class Interceptor:
    """The function that `nn.intercept_methods` calls for every method call of every module."""

    def __init__(self, actions: Mapping[Path, tuple[Action, ...]], prefix: Path = ()):
        self.actions, self.prefix = actions, prefix
        self.open_calls: list[_OpenCall] = []
        self.context: Mapping[str, Any] = {}

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        path = module.scope.path
        inside = path[: len(self.prefix)] == self.prefix
        actions = self.actions.get(path[len(self.prefix) :], ()) if inside else ()
        nested = any(outer.module.scope is module.scope for outer in self.open_calls)
        outermost: AbstractContextManager[None] = contextlib.nullcontext()
        if not self.open_calls:
            outermost, self.context = self._sharing(module), self._context_of(context, args, kwargs)
        self.open_calls.append(_OpenCall(module, _deterministic(context, args, kwargs)))
        try:
            with outermost:
                call = _ModuleCall.of(next_fun, args, kwargs, context)
                return self._run(call, actions, nested) if actions else _unchanged(call)
        finally:
            self.open_calls.pop()

    def _context_of(self, context: Any, args: Any, kwargs: Any) -> Mapping[str, Any]:
        """The arguments of the outermost call by name, if a method reads them."""
        if not any(action.method.reads_context for own in self.actions.values() for action in own):
            return {}
        module, found = context.module, dict(kwargs)
        signature = registry.signature_of(getattr(context.orig_method, "func", context.orig_method))
        if signature is not None:
            with contextlib.suppress(TypeError):
                found = {**dict(list(signature.bind(module, *args, **kwargs).arguments.items())[1:]), **kwargs}
        of_module = bool(module.variables.get("cache")) or module.is_mutable_collection("cache")
        held = (value for name, value in found.items() if "cache" in name or "past_key_values" in name)
        return {**found, "cached": of_module or any(value is not None and value is not False for value in held)}

    def _sharing(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context with the leaves that sites share, for the outermost call."""
        slugs = {action.shared for own in self.actions.values() for action in own if action.shared}
        scope = module.scope
        while slugs and scope is not None and len(scope.path) > len(self.prefix) and scope.parent is not None:
            scope = scope.parent
        return sharing(scope.variables().get("params", {}), slugs) if slugs and scope else contextlib.nullcontext()

    def _run(self, call: _ModuleCall, actions: tuple[Action, ...], nested: bool) -> Any:
        """The outputs of a call under actions on its weight, its attention or its output."""
        found = [active for action in actions if (active := _read(call.module, action, self.context)) is not None]
        on = {kind: [a for a in found if a.site.kind == kind] for kind in ("weight", "attention", "output")}
        name = f"{call.owner}.{call.method}"
        weight = [a for a in on["weight"] if not _whole(a.site).calls]
        if products := [a for a in on["weight"] if name in _whole(a.site).calls]:
            y = self._with_changed_products(call, products, weight)
        elif weight and registry.find(call.owner, call.method):
            y = self._with_changed_weight(call, weight)
        elif on["attention"] and (hook := attention.find(call.owner, call.method)):
            extend = functools.partial(_extend, on["attention"])
            y = hook(call.next_fun, call.args, call.kwargs, call.module, extend)
        else:
            y = _unchanged(call)
        # A subclass whose __call__ calls its parent's passes here twice; the output is the outer call's.
        if call.method == "__call__" and not nested:
            for active in on["output"]:
                y = _change_output(active, y)
        return y

    def _with_changed_weight(self, call: _ModuleCall, actions: Sequence[_Active]) -> Any:
        """The outputs of a call whose weight the actions change one after the other."""
        added = {active.action.leaf_path(n)[-1] for active in actions for n in active.action.stored}
        seen = call.without(added)
        factory = registry.find(call.owner, call.method)
        found = factory(seen) if factory is not None else None
        # Other methods of the module may use another of its weights.
        actions = [active for active in actions if found is None or active.site.leaf == found.leaf]
        if not actions:
            return _recomputed(call.run, call.variables)
        site = actions[0].site
        geometry = _check_geometry(site, found, f"{call.owner}.{call.method}")
        operation = _Operation.of(call, seen, site, geometry)
        for active in actions:
            dropout = self._dropout(call.module, active.action.method.input_dropout)
            operation = dataclasses.replace(operation, dropout=dropout)
            change = _change_attend if call.method == "attend" else _ChangedOperation
            operation = operation.then(active, change(active, operation))
        return _recomputed(lambda: operation.run(call.args[geometry.argument]), call.variables)

    def _with_changed_products(self, call: _ModuleCall, products: Sequence[_Active], weight: Sequence[_Active]) -> Any:
        """The outputs of a call in which the actions change products of the module's parameters.

        Args:
          call: the call.
          products: the actions on products.
          weight: other actions on a weight of the module.
        """

        def run() -> Any:
            is_linear = weight and registry.find(call.owner, call.method)
            return self._with_changed_weight(call, weight) if is_linear else call.run()

        changes: dict[str, list[_Active]] = {}
        for active in products:
            changes.setdefault(active.site.leaf, []).append(active)

        def change(name: str, eqn: Any, found: Product, x: Any, w: Any) -> Any:
            return self._changed_product(call, changes[name], eqn, found, x, w)

        def fits(name: str) -> bool:  # a scan around the module passes here too, with the weights of all layers
            return jnp.shape(peek(call.variables[name])) == _whole(changes[name][0].site).shape

        if not (names := [name for name in changes if fits(name)]):
            return run()
        boxes = {name: call.variables[name] for name in names}
        for name, box in boxes.items():
            if isinstance(peek(box), np.ndarray) or isinstance(box, Quantized):
                raise ValueError(_needs_overlay(changes[name][0].site))
        # The arrays that a box holds: opening one may add a sharding constraint.
        values = {n: box.unbox() if isinstance(box, Opened) else jax.tree.leaves(box)[0] for n, box in boxes.items()}
        with opened({changes[name][0].site.weight_path: value for name, value in values.items()}):
            return rewrite.run(call.module, run, values, change)

    def _changed_product(
        self, call: _ModuleCall, actions: Sequence[_Active], eqn: Any, found: Product, x: Any, w: Any
    ) -> Any:
        """The output of a product whose weight the actions change one after the other."""
        whole, out = _whole(actions[0].site), eqn.outvars[0].aval
        geometry, operand, output = whole.contraction(found, x.shape)
        raw, stored = x.reshape(operand), call.variables[whole.leaf]

        def weight() -> jax.Array:
            return whole.weight_of(meta.unbox(stored), found)

        def multiply(z: Any, w: Any) -> jax.Array:
            if geometry.takes_operand:  # tokens may be flattened
                dims = (((z.ndim - 1,), (found.contracted[0][0],)), ((), ()))
                return jax.lax.dot_general_p.bind(z, w, **{**eqn.params, "dimension_numbers": dims})
            operands = (z.reshape(x.shape), w)[:: 1 if found.operand else -1]
            return jax.lax.dot_general_p.bind(*operands, **eqn.params).reshape(output)

        def run(z: Any) -> jax.Array:
            if isinstance(stored, Opened):  # the backward pass dequantizes again
                return jax.checkpoint(
                    lambda z, box: multiply(
                        z, whole.arranged(whole.weight_of(box.unbox(), found), found).astype(w.dtype)
                    )
                )(z, stored.value)
            return multiply(z, w)

        no_call = Call(call.module, call.method, (raw,), {}, {})
        plain = eqn.params["precision"] is None and not isinstance(stored, Opened)
        operation = _Operation(no_call, run, weight, lambda: None, x.dtype, plain, _no_dropout)
        for active in actions:
            action = active.action
            parts = action.site.geometry.parts if isinstance(action.site.geometry, Parts) else 1
            own = dataclasses.replace(action, site=dataclasses.replace(action.site, geometry=geometry.split(parts)))
            index, sizes, depth = whole.index(found), own.site.batch, len(action.site.batch)
            taken = {n: leaf[index].reshape(*sizes, *leaf.shape[depth:]) for n, leaf in active.leaves.items()}
            part = _Active(own, taken, active.shared, active.context)
            operation = dataclasses.replace(operation, dropout=self._dropout(call.module, action.method.input_dropout))
            operation = operation.then(part, _ChangedOperation(part, operation))
        return operation.run(raw).astype(out.dtype).reshape(out.shape)

    def _dropout(self, module: nn.Module, rate: float) -> Callable[[Any, float], Any]:
        """Dropout on an adapter's input; off if the nearest enclosing call that has the flag is deterministic.

        It is also off without a "dropout" rng. The key is drawn here: Flax draws none in a call that is traced to be
        rematerialized.
        """
        flags = (outer.deterministic for outer in reversed(self.open_calls))
        deterministic = next((flag for flag in flags if flag is not None), False)
        if rate == 0.0 or (not isinstance(deterministic, jax.Array) and deterministic):
            return _no_dropout
        scope = module.scope  # not `module.path` and `module.make_rng`: fields of a module may have these names
        assert scope is not None
        if not _has_dropout_rng(module):
            if _has_dropout_rng(self.open_calls[0].module):
                raise ValueError(
                    f"adapter dropout at {join(scope.path)!r}: a transform around it does not pass on the "
                    "'dropout' rng; add split_rngs={'dropout': True} to the nn.scan, or set dropout=0.0"
                )
            return _no_dropout
        return functools.partial(_dropped, scope.make_rng("dropout"), deterministic)


def _unchanged(call: _ModuleCall) -> Any:
    """The outputs of a call that no method changes."""
    return _recomputed(call.run, call.variables) if registry.find(call.owner, call.method) else call.run()


def _recomputed(run: Callable[[], Any], variables: Mapping[str, Any]) -> Any:
    """The outputs of a linear layer's call; the backward pass dequantizes a quantized weight again.

    Nothing else is computed twice: the layer's output is not needed to differentiate it, only its input is kept.
    """
    if any(isinstance(leaf, Quantized) for leaf in variables.values()):
        return jax.checkpoint(run)()
    return run()


@dataclass(frozen=True, eq=False)
class _Active:
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


def _read(module: nn.Module, action: Action, context: Mapping[str, Any]) -> _Active | None:
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
    return _Active(action, leaves, shared_leaves(action, token), context)


def _needs_overlay(site: Site, shared: str = "") -> str:
    fused = "has leaves that other sites share" if shared else "depends on the arguments of the model's call"
    why = fused if site.via == FUSED else "is changed before its module is called"
    return (
        f"{site.name!r} {why} (path taken: {site.via}); inside intercept(), give the model "
        "peft.overlay(params, adapter) instead of combine(params, adapter)"
    )


def _whole(site: Site) -> Any:
    """The geometry of the whole weight, where a method splits it into parts."""
    return site.geometry.inner if isinstance(site.geometry, Parts) else site.geometry


def _extend(actions: Sequence[_Active], key: jax.Array, value: jax.Array, mask: Any) -> Any:
    """An attention's keys, values and mask, changed by each action in turn."""
    for active in actions:
        leaves = active.used(active.leaves, key.dtype)
        key, value, mask = active.action.method.apply(leaves, key, value, mask)
    return key, value, mask


def _change_output(active: _Active, y: Any) -> Any:
    """A module's output, or the first element of a tuple, changed by one action."""
    first = y[0] if isinstance(y, tuple) else y
    tokens = first.reshape(-1, first.shape[-1]) if backend.flatten_tokens() else first
    leaves = active.used(active.leaves, first.dtype)
    changed = active.action.method.apply(leaves, tokens).reshape(first.shape)
    if not isinstance(y, tuple):
        return changed
    return type(y)(changed, *y[1:]) if hasattr(y, "_fields") else (changed, *y[1:])


# --- calls of linear layers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation:
    """The operation at a site, as the next method finds it: the module's own, changed by the methods so far.

    Attributes:
      call: the call as geometries see it.
      run: computes the output from an input, both in the module's own layout.
      weight: computes the weight as it is stored.
      bias: computes the bias as it is stored.
      dtype: dtype of the computation.
      plain: see `jpeft.core.method.Linear.plain`.
      dropout: the dropout of the next method's input.
    """

    call: Call
    run: Callable[[Any], Any]
    weight: Callable[[], jax.Array]
    bias: Callable[[], jax.Array | None]
    dtype: Any
    plain: bool
    dropout: Callable[[Any, float], Any]

    @classmethod
    def of(cls, call: _ModuleCall, seen: Call, site: Site, geometry: Geometry) -> _Operation:
        """The module's own operation."""
        variables, x = call.variables, call.args[geometry.argument]
        weight_dtype = jnp.zeros((), peek(variables[site.leaf]).dtype)
        if hasattr(call.module, "dtype"):
            is_index = site.lookup and call.method == "__call__"
            dtype = canonicalize_dtype(*([] if is_index else [x]), weight_dtype, dtype=call.module.dtype)
        else:
            dtype = canonicalize_dtype(x, weight_dtype)
        bias = meta.unbox(variables.get(geometry.bias)) if geometry.bias is not None else None
        return cls(
            call=seen,
            run=functools.partial(call.run_on, geometry.argument),
            # Unboxed where it is used, and again where it is recomputed.
            weight=lambda: meta.unbox(variables[site.leaf]),
            bias=lambda: bias,
            dtype=dtype,
            plain=_is_plain(call.module, call.owner, geometry),
            dropout=_no_dropout,
        )

    def then(self, active: _Active, run: Callable[[Any], Any]) -> _Operation:
        """The operation after one more action, which computes its output by ``run``."""

        def merged() -> tuple[jax.Array, jax.Array | None]:
            return merge_layer([active.action], [active.shared], [active.leaves], self.weight(), self.bias())

        bias = (lambda: merged()[1]) if active.action.changes_bias else self.bias
        return dataclasses.replace(self, run=run, weight=lambda: merged()[0], bias=bias, plain=False)


class _Linear:
    """The original operation, as a weight method sees it: see `jpeft.core.method.Linear`."""

    def __init__(
        self, call: Callable[[Any], jax.Array], merged: Callable[[Any], jax.Array],
        weight: Any, bias: Any, dropout: Any, context: Mapping[str, Any], plain: bool = False,
    ):  # fmt: skip
        self._call, self._weight, self._bias = call, weight, bias
        self.merged, self.dropout, self.context, self.plain = merged, dropout, context, plain

    def __call__(self, x: Any) -> jax.Array:
        return self._call(x)

    @property
    def weight(self) -> jax.Array:
        return self._weight()

    @property
    def bias(self) -> jax.Array | None:
        return self._bias()


class _ChangedOperation:
    """An operation changed by one action: a function of the input in the module's own layout."""

    def __init__(self, active: _Active, operation: _Operation):
        self.active, self.operation = active, operation
        self.geometry: Any = active.site.geometry

    def __call__(self, raw: Any) -> Any:
        geometry, call = self.geometry, self.operation.call
        call = dataclasses.replace(call, args=_with_item(call.args, geometry.argument, raw))
        x = geometry.operand(call, self.operation.dtype)
        y = self._batched(call, raw, x) if geometry.batch else self._single(call, raw, x)
        return geometry.output(call, y)

    def weight(self) -> jax.Array:
        return self.geometry.view(self.operation.weight().astype(self.operation.dtype))

    def bias(self) -> jax.Array | None:
        b = self.operation.bias()
        return None if b is None else self.geometry.view_bias(b.astype(self.operation.dtype))

    def _single(self, call: Call, raw: Any, x: Any) -> jax.Array:
        """The output ``[tokens..., out]`` of a weight that is one matrix."""
        geometry, operation = self.geometry, self.operation

        def original(z: Any) -> jax.Array:
            if geometry.takes_operand:
                return operation.run(z)
            if z is x:
                return geometry.result(call, operation.run(raw))
            restored = geometry.restore(call, z)
            if restored is not None:
                return geometry.result(call, operation.run(restored))
            return _affine(z, self.weight(), self.bias())

        return self._applied(self.active.leaves, original, self.weight, self.bias, x, operation.plain)

    def _batched(self, call: Call, raw: Any, x: Any) -> jax.Array:
        """The output ``[batch..., tokens..., out]`` of several matrices: the method is mapped over them.

        The module is called once, outside of the map.
        """
        geometry = self.geometry
        y0 = geometry.result(call, self.operation.run(raw))

        def one(leaves: Leaves, x: Any, y0: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
            def original(z: Any) -> jax.Array:
                return y0 if z is x else _affine(z, w, b)

            return self._applied(leaves, original, lambda: w, lambda: b, x)

        # The parts of a fused weight share their input; experts and groups each have their own.
        shared = isinstance(geometry, Parts)
        mapped = jax.vmap(one, in_axes=(0, None, 0, 0, 0)) if shared else one
        mapped = map_axes(mapped, len(geometry.batch) - shared)
        return mapped(self.active.leaves, x, y0, self.weight(), self.bias())

    def _applied(self, leaves: Leaves, original: Any, weight: Any, bias: Any, x: Any, plain: bool = False) -> jax.Array:
        """The method's output for one matrix.

        Args:
          leaves: its leaves as they are stored.
          original: the operation without it.
          weight: computes the weight.
          bias: computes the bias.
          x: the input.
          plain: see `jpeft.core.method.Linear.plain`.
        """
        dtype, action = self.operation.dtype, self.active.action
        merged = functools.partial(_merged_product, self.active, leaves, weight, bias, dtype)
        base = _Linear(original, merged, weight, bias, self.operation.dropout, self.active.context, plain)
        return action.apply(self.active.used(leaves, dtype), leaves, base, x)


def _merged_product(active: _Active, leaves: Leaves, weight: Any, bias: Any, dtype: Any, z: Any) -> jax.Array:
    """See `jpeft.core.method.Linear.merged`."""

    @jax.checkpoint
    def product(leaves: Leaves, w: jax.Array, b: jax.Array | None) -> jax.Array:
        w, b = merge_matrix(active.action, active.shared, leaves, w, b)
        return _affine(z, w.astype(dtype), None if b is None else b.astype(dtype))

    return product(leaves, weight(), bias())


def _change_attend(active: _Active, operation: _Operation) -> Callable[[Any], Any]:
    """`nn.Embed.attend` changed by one action: the changed lookup, transposed."""
    leaves, dtype = active.used(active.leaves, operation.dtype), operation.dtype

    def weight() -> jax.Array:
        return operation.weight().astype(dtype)

    merged = functools.partial(_merged_product, active, active.leaves, weight, lambda: None, dtype)
    base = _Linear(lambda z: z @ weight(), merged, weight, lambda: None, _no_dropout, active.context)

    def run(query: Any) -> Any:
        lookup = functools.partial(active.action.apply, leaves, active.leaves, base)
        return attend(lookup, query.astype(dtype), active.site.inputs)

    return run


def _affine(x: Any, w: jax.Array, b: jax.Array | None) -> jax.Array:
    y = x @ w
    return y if b is None else y + b


def _with_item(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _check_geometry(site: Site, found: Any, what: str) -> Any:
    """The geometry of a call, if it is the one that the site was bound with.

    Raises:
      ValueError: the call has another geometry, or none.
    """
    bound = _whole(site)
    if found is None:
        raise ValueError(
            f"{site.name!r} was bound as {bound}, but {what} is called in a form that no geometry explains; bind with "
            "inputs of the same form"
        )
    if found != bound:
        raise ValueError(
            f"{site.name!r} was bound as {bound}, but this call uses its weight as {found}; "
            "bind with inputs of the same form"
        )
    return found


def _is_plain(module: nn.Module, owner: str, geometry: Geometry) -> bool:
    """Whether a module is one of Flax's own linear layers with the default product."""
    fields = ("dot_general", "dot_general_cls", "precision")
    is_default = all(getattr(module, name, None) is None for name in fields)
    return isinstance(geometry, Contraction) and owner.startswith("flax.linen.") and is_default


# --- dropout --------------------------------------------------------------------------------------------------------

_TRAINING = ("train", "training", "is_training")


def _deterministic(context: Any, args: Any, kwargs: Any) -> Any:
    """The call's ``deterministic`` flag, from its arguments, their defaults or module fields; None if unspecified."""
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


def _has_dropout_rng(module: nn.Module) -> bool:
    return module.scope is not None and module.scope.has_rng("dropout")


def _no_dropout(x: Any, rate: float) -> Any:
    return x


def _dropped(key: jax.Array, deterministic: Any, x: Any, rate: float) -> Any:
    """``x`` with entries dropped at a rate and the rest scaled up; token ids are not dropped."""
    if rate == 0.0 or isinstance(x, Lookup):
        return x
    if isinstance(x, Patches):
        return x.map(lambda image: _dropped(key, deterministic, image, rate))
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    dropped = jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))
    return jnp.where(deterministic, x, dropped) if isinstance(deterministic, jax.Array) else dropped
