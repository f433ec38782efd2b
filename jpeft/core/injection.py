"""The calls of a model's own modules under methods: the same for every front end, which intercepts the calls."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.actions import Active
from jpeft.core.attending import attend
from jpeft.core.attention import Hook
from jpeft.core.dataflow import marks
from jpeft.core.dataflow.attention import evaluate
from jpeft.core.dataflow.jaxprs import bind
from jpeft.core.dataflow.projections import Projection
from jpeft.core.dataflow.replace import Change, Evaluate
from jpeft.core.dataflow.traced_attention import TracedAttention
from jpeft.core.dataflow.views import LOOKUP, Product
from jpeft.core.geometry import Call, Geometry, Parts, TracedTable
from jpeft.core.operation import (
    ChangedOperation,
    Dropout,
    Operation,
    change_attend,
    change_inputs,
    change_output,
    no_dropout,
    whole_geometry,
    with_item,
)
from jpeft.core.quantized import Quantized
from jpeft.core.sites import Site, no_projections
from jpeft.core.tree import Path

# whether a method draws random numbers -> those that it draws in this call
Draw = Callable[[bool], Dropout]


@dataclass(frozen=True)
class ModuleCall(ABC):
    """A call of a module's method that a front end has intercepted.

    Attributes:
      next_fun: runs the method.
      args: its positional arguments, with those that were given by name and have a position.
      kwargs: its other arguments.
      module: the module.
      method: the method's name.
      owner: full name of the class that defines the method.
    """

    next_fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: Any
    method: str
    owner: str

    @property
    def name(self) -> str:
        """Full name of the method."""
        return f"{self.owner}.{self.method}"

    def run(self) -> Any:
        """Runs the original method."""
        return self.next_fun(*self.args, **self.kwargs)

    def run_on(self, argument: int, x: Any) -> Any:
        """Runs the original method with another positional argument."""
        return self.next_fun(*with_item(self.args, argument, x), **self.kwargs)

    def rerun(self, x: Any) -> Any:
        """Runs the original method once more, on another first argument.

        Raises:
          ValueError: the module has others inside, or more than parameters, which would run twice.
        """
        if not self.args or not self.is_simple:
            raise ValueError(f"{self.name} cannot run again on another input: only a module without others inside can")
        return self._rerun(x)

    def project(self, site: Site, states: Any) -> tuple[Any, Any]:
        """See `jpeft.core.method.Project`."""
        if isinstance(site.projections, str):
            raise ValueError(no_projections(site))
        return tuple(self._projected(one, len(site.path), states) for one in site.projections)  # pyright: ignore

    def _projected(self, projection: Projection, depth: int, states: Any) -> Any:
        weight = self.value_below(projection.weight[depth:])
        return projection(states, weight, projection.bias and self.value_below(projection.bias[depth:]))

    def on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """The call with other arguments."""
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    # --- what a front end defines ---

    @property
    @abstractmethod
    def is_simple(self) -> bool:
        """Whether the module has parameters alone: no modules inside, and no other state."""

    @abstractmethod
    def _rerun(self, x: Any) -> Any:
        """Runs the original method of a simple module on another first argument."""

    @property
    @abstractmethod
    def is_quantized(self) -> bool:
        """Whether the module reads a parameter of its own that is quantized."""

    @abstractmethod
    def stored(self, name: str) -> Any:
        """A parameter as it is stored, with its shape and dtype."""

    @abstractmethod
    def codes(self, name: str) -> Quantized | None:
        """A quantized parameter inside `with_products`, where the module reads it as an array; None if it is none."""

    @abstractmethod
    def value(self, name: str) -> jax.Array | None:
        """A parameter as the module reads it, dequantized; None if the module has none of that name."""

    @abstractmethod
    def value_below(self, path: Path) -> jax.Array:
        """A parameter of the module or of one inside of it as that module reads it, dequantized."""

    @abstractmethod
    def without(self, adapter_leaves: Collection[str]) -> Call:
        """The call as a geometry sees it: a geometry finds its weight among the module's own parameters."""

    @property
    @abstractmethod
    def factory(self) -> Callable[[Call], Geometry | None] | None:
        """The registered geometry of the method."""

    @property
    @abstractmethod
    def hook(self) -> Hook | None:
        """The registered attention of the method."""

    @abstractmethod
    def is_plain(self, geometry: Geometry) -> bool:
        """Whether the module is one of Flax's own linear layers with the default product."""

    @abstractmethod
    def with_products(self, sites: Mapping[str, Site], run: Callable[[Any], Any], change: Change) -> Any:
        """The outputs of ``run(call)``, with ``change`` in place of every product that a weight of ``sites`` reaches.

        ``call`` is this call, or the same of a copy of the module.
        """

    @abstractmethod
    def with_trace(self, run: Callable[[Any], Any], evaluate: Evaluate) -> Any:
        """The outputs of ``run(call)``, as ``evaluate`` computes them from its trace, of which no constant is a weight.

        ``call`` is this call, or the same of a copy of the module.
        """


def run_call(call: ModuleCall, actions: Sequence[Active], dropout: Draw, is_inner: bool = False) -> Any:
    """The outputs of a call under actions on its weight, its attention or its output.

    Args:
      call: the call.
      actions: the actions on the module.
      dropout: the dropout in this call.
      is_inner: whether the call runs inside another of the same module, as a subclass's does that calls its parent's:
        then the output is not the module's.
    """
    on = {kind: [a for a in actions if a.site.kind == kind] for kind in ("weight", "attention", "output")}
    is_whole = call.method == "__call__" and not is_inner
    for active in on["output"]:
        if is_whole and active.action.method.feeds:
            drop = dropout(active.action.method.draws)
            args, kwargs = change_inputs(active, (call.args, call.kwargs), drop)
            call = call.on(args, kwargs)
    with _marked(call):
        y = _with_changed_attention(call, on["attention"], lambda call: _with_weights(call, on["weight"], dropout))
    if is_whole:
        for active in on["output"]:
            drop = dropout(active.action.method.draws)
            y = change_output(active, (call.args, call.kwargs), y, drop, call.rerun)
    return y


def unchanged(call: ModuleCall) -> Any:
    """The outputs of a call that no method changes."""
    with _marked(call):
        return _unchanged(call)


def _unchanged(call: ModuleCall) -> Any:
    return _recomputed(call, call.run) if call.factory else call.run()


def _with_weights(call: ModuleCall, actions: Sequence[Active], dropout: Draw) -> Any:
    """The outputs of a call under the actions on the module's weights."""
    weight = [a for a in actions if not whole_geometry(a.site).calls]
    if products := [a for a in actions if call.name in whole_geometry(a.site).calls]:
        return _with_changed_products(call, products, weight, dropout)
    return _with_changed_weight(call, weight, dropout) if weight and call.factory else _unchanged(call)


# --- attentions in a module's call ------------------------------------------------------------------------------------

_calls: contextvars.ContextVar[Iterator[int] | None] = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def _marked(call: ModuleCall) -> Iterator[None]:
    """A context in which a call is bracketed by marks, where a call around it is traced for its own attentions."""
    if (numbers := _calls.get()) is None:
        yield
        return
    number = next(numbers)
    marks.begin_call(number, [x for x in jax.tree.leaves((call.args, call.kwargs)) if isinstance(x, jax.Array)])
    yield
    marks.end_call(number)


def _with_changed_attention(call: ModuleCall, actions: Sequence[Active], run: Callable[[Any], Any]) -> Any:
    """The outputs of a call whose attentions the actions change.

    Args:
      call: the call.
      actions: the actions on attentions of the module.
      run: runs the call under the other actions on the module.
    """
    if not actions:
        return run(call)
    if (hook := call.hook) is not None:
        project = functools.partial(call.project, actions[0].site)
        wrap = functools.partial(attend, actions, project)
        return hook(lambda *args, **kwargs: run(call.on(args, kwargs)), call.args, call.kwargs, call.module, wrap)
    own = [(active, found) for active in actions if (found := active.site.attention) and found.call == call.name]
    if not own:
        return run(call)
    layouts, places = own[0][1].layouts, {found.place for _, found in own}

    def change(place: int, attention: TracedAttention) -> Any:
        changed = [active for active, found in own if found.place == place]
        arrays = attention.query, attention.key, attention.value
        project = functools.partial(call.project, changed[0].site)
        return attend(changed, project, functools.partial(_traced, attention), *arrays, None)

    def traced(call: Any) -> Any:
        token = _calls.set(itertools.count())
        try:
            return run(call)
        finally:
            _calls.reset(token)

    chosen = [layout if place in places else None for place, layout in enumerate(layouts)]
    return call.with_trace(traced, lambda jaxpr, consts, _: evaluate(jaxpr, consts, chosen, change))


def _traced(attention: TracedAttention, query: Any, key: Any, value: Any, mask: Any, prefix: Any = None) -> Any:
    """A found attention as an operation, see `jpeft.core.attention.Operation`.

    Raises:
      ValueError: it is given a mask: that of the module is not known.
    """
    if mask is not None and mask is not True:
        raise ValueError("the mask of an attention that was found in the trace of a call cannot be changed")
    changed = {"query": query, "key": key, "value": value}
    changed = {name: x for name, x in changed.items() if x is not getattr(attention, name)}
    if mask is True:
        attention = attention.rerun(query=query) if "query" in changed else attention
        return attention.over(key, value)[0]
    attention = attention.rerun(**changed) if changed else attention
    return attention.out if prefix is None else attention.prefixed(*prefix)


def _recomputed(call: ModuleCall, run: Callable[[], Any]) -> Any:
    """The outputs of a linear layer's call; the backward pass dequantizes a quantized weight again.

    Nothing else is computed twice: the layer's output is not needed to differentiate it, only its input is kept.
    """
    return jax.checkpoint(run)() if call.is_quantized else run()


def _with_changed_weight(call: ModuleCall, actions: Sequence[Active], dropout: Draw) -> Any:
    """The outputs of a call whose weight the actions change one after the other."""
    added = {active.action.leaf_path(n)[-1] for active in actions for n in active.action.stored}
    seen = call.without(added)
    found = call.factory(seen) if call.factory is not None else None
    # Other methods of the module may use another of its weights.
    actions = [active for active in actions if found is None or active.site.leaf == found.leaf]
    if not actions:
        return _recomputed(call, call.run)
    site = actions[0].site
    geometry = _check_geometry(site, found, call.name)
    operation = _operation(call, seen, site, geometry)
    for active in actions:
        operation = dataclasses.replace(operation, dropout=dropout(active.action.method.draws))
        change = change_attend if call.method == "attend" else ChangedOperation
        operation = operation.then(active, change(active, operation))
    return _recomputed(call, lambda: operation.run(call.args[geometry.argument]))


def _operation(call: ModuleCall, seen: Call, site: Site, geometry: Geometry) -> Operation:
    """The module's own operation."""
    x, like = call.args[geometry.argument], jnp.zeros((), call.stored(site.leaf).dtype)
    if hasattr(call.module, "dtype"):
        is_index = site.lookup and call.method == "__call__"
        dtype = _computed_in(*([] if is_index else [x]), like, dtype=call.module.dtype)
    else:
        dtype = _computed_in(x, like)
    bias = call.value(geometry.bias) if geometry.bias is not None else None

    def weight() -> jax.Array:  # read where it is used, and again where it is recomputed
        w = call.value(site.leaf)
        assert w is not None
        return w

    return Operation(
        call=seen,
        run=functools.partial(call.run_on, geometry.argument),
        weight=weight,
        bias=lambda: bias,
        dtype=dtype,
        plain=call.is_plain(geometry),
        dropout=no_dropout,
    )


def _computed_in(*arrays: Any, dtype: Any = None) -> Any:
    """The dtype that a layer of Flax computes in: ``dtype`` or, if that is None, the floating one of its operands."""
    if dtype is not None:
        return dtype
    found = jnp.result_type(*arrays)
    return found if jnp.issubdtype(found, jnp.inexact) else jnp.promote_types(jnp.float32, found)


def _check_geometry(site: Site, found: Any, what: str) -> Any:
    """The geometry of a call, if it is the one that the site was bound with.

    Raises:
      ValueError: the call has another geometry, or none.
    """
    bound = whole_geometry(site)
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


# --- products inside of a module's call -------------------------------------------------------------------------------


def _with_changed_products(
    call: ModuleCall, products: Sequence[Active], weight: Sequence[Active], dropout: Draw
) -> Any:
    """The outputs of a call in which the actions change products of the module's parameters.

    Args:
      call: the call.
      products: the actions on products.
      weight: other actions on a weight of the module.
      dropout: the dropout in this call.
    """

    def run(call: ModuleCall) -> Any:
        return _with_changed_weight(call, weight, dropout) if weight and call.factory else call.run()

    changes: dict[str, list[Active]] = {}
    for active in products:
        # A scan around the module passes here too, with the weights of all layers.
        if np.shape(call.stored(active.site.leaf)) == whole_geometry(active.site).shape:
            changes.setdefault(active.site.leaf, []).append(active)

    def change(name: str, eqn: Any, found: Product, x: Any, w: Any) -> Any:
        is_table = isinstance(whole_geometry(changes[name][0].site), TracedTable)
        changed = _changed_use_of_table if is_table else _changed_product
        return changed(call, changes[name], dropout, eqn, found, x, w)

    if not changes:
        return run(call)
    return call.with_products({name: own[0].site for name, own in changes.items()}, run, change)


def _changed_product(
    call: ModuleCall, actions: Sequence[Active], dropout: Draw, eqn: Any, found: Product, x: Any, w: Any
) -> Any:
    """The output of a product whose weight the actions change one after the other."""
    whole, out = whole_geometry(actions[0].site), eqn.outvars[0].aval
    geometry, operand, output = whole.contraction(found, x.shape)
    raw, codes = x.reshape(operand), call.codes(whole.leaf)

    def weight() -> jax.Array:
        return whole.weight_of(call.value(whole.leaf), found)

    def multiply(z: Any, w: Any) -> jax.Array:
        if geometry.takes_operand:  # tokens may be flattened
            dims = (((z.ndim - 1,), (found.contracted[0][0],)), ((), ()))
            return jax.lax.dot_general_p.bind(z, w, **{**eqn.params, "dimension_numbers": dims})
        operands = (z.reshape(x.shape), w)[:: 1 if found.operand else -1]
        return jax.lax.dot_general_p.bind(*operands, **eqn.params).reshape(output)

    def run(z: Any) -> jax.Array:
        if codes is None:
            return multiply(z, w)

        def dequantized(z: Any, codes: Quantized) -> jax.Array:
            part = whole.weight_of(codes.unbox(), found)
            return multiply(z, whole.arranged(part, found).astype(w.dtype))

        return jax.checkpoint(dequantized)(z, codes)  # the backward pass dequantizes again

    no_call = Call(call.module, call.method, (raw,), {}, {})
    plain = eqn.params["precision"] is None and codes is None
    operation = Operation(no_call, run, weight, lambda: None, x.dtype, plain, no_dropout)
    for active in actions:
        action = active.action
        parts = action.site.geometry.parts if isinstance(action.site.geometry, Parts) else 1
        own = dataclasses.replace(action, site=dataclasses.replace(action.site, geometry=geometry.split(parts)))
        index, sizes, depth = whole.index(found), own.site.batch, len(action.site.batch)
        taken = {n: leaf[index].reshape(*sizes, *leaf.shape[depth:]) for n, leaf in active.leaves.items()}
        part = Active(own, taken, active.shared, active.context)
        operation = dataclasses.replace(operation, dropout=dropout(action.method.draws))
        operation = operation.then(part, ChangedOperation(part, operation))
    return operation.run(raw).astype(out.dtype).reshape(out.shape)


def _changed_use_of_table(
    call: ModuleCall, actions: Sequence[Active], dropout: Draw, eqn: Any, found: Product, x: Any, w: Any
) -> Any:
    """The output of a lookup in a table, or of a product with all of its rows, which the actions change in order."""
    leaf, out, codes = actions[0].site.leaf, eqn.outvars[0].aval, call.codes(actions[0].site.leaf)

    def weight() -> jax.Array:
        table = call.value(leaf)
        assert table is not None
        return table

    def looked_up(codes: Quantized | None = None) -> jax.Array:
        return bind(eqn, [w if codes is None else codes.unbox().astype(w.dtype), x])[0]

    def run(ids: Any) -> jax.Array:  # the backward pass dequantizes again
        return looked_up() if codes is None else jax.checkpoint(looked_up)(codes)

    def not_run(query: Any) -> jax.Array:
        raise AssertionError("a product with all rows is computed from the changed rows")

    is_lookup = found.kind == LOOKUP
    raw = x[..., 0] if is_lookup else jnp.moveaxis(x, found.contracted[0][1], -1)
    no_call = Call(call.module, call.method, (raw,), {}, {})
    operation = Operation(no_call, run if is_lookup else not_run, weight, lambda: None, w.dtype, False, no_dropout)
    for active in actions:
        operation = dataclasses.replace(operation, dropout=dropout(active.action.method.draws))
        change = ChangedOperation if is_lookup else change_attend
        operation = operation.then(active, change(active, operation))
    y = operation.run(raw)
    if not is_lookup and found.operand == 0:
        y = jnp.moveaxis(y, -1, 0)
    return y.astype(out.dtype).reshape(out.shape)
