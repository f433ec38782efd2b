"""The candidate sites of a Linen model, found in one abstract call.

The model runs as it is, on plain parameters. An interceptor marks in the trace where each module call begins and ends;
`jpeft.core.dataflow` then shows what becomes of every parameter. A geometry is believed only where the trace shows that
the call uses its weight in that way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.interpreters import partial_eval as pe

from jpeft.core.dataflow import marks
from jpeft.core.dataflow.views import Use
from jpeft.core.dataflow.walk import Flow, open_jaxpr, walk
from jpeft.core.geometry import Contraction, Geometry, Raw
from jpeft.core.geometry.traced import Traced, traced
from jpeft.core.sites import BOX, FUSED, HEAD_NAMES, MERGE, REPLACE, Site, Stack, Survey
from jpeft.core.tree import Path, box_as, flatten, join, peek, split_arrays, unflatten
from jpeft.linen import attention, registry
from jpeft.linen.axes import AxisProbe, InsideParameter, axes_in, with_probes
from jpeft.linen.axis_names import AxisEnv, with_axis_names
from jpeft.linen.box import TrialBox

Shape = tuple[int, ...]


def survey(model: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """The candidate sites of a model, found by an abstract ``model.apply(variables, *args, **kwargs)``.

    Raises:
      Exception: whatever the model raises for these inputs.
    """
    leaves = {}
    for path, x in flatten(variables["params"]).items():
        if not hasattr(peek(x), "dtype"):
            raise ValueError(f"params must be nested mappings of arrays; {join(path)!r} is a {type(x).__name__}")
        leaves[path] = _Leaf(np.shape(peek(x)), str(peek(x).dtype))
    call = _AbstractCall(model, variables, args, dict(kwargs))
    record, plain = call.trace(leaves)
    record.flow = walk(plain, list(leaves), {number: c.path for number, c in record.calls.items()})
    weights = _named([site for path in leaves if (site := _weight_site(record, path)) is not None], record)
    geometry_of = {site.path: site.geometry for site in weights if site.linear and not site.named}
    return Survey(
        weights=tuple(weights),
        outputs=tuple(
            _output_site(record, path, geometry_of.get(path))
            for path, module in record.modules.items()
            if module.shape and path and path not in record.flow.transformed
        ),
        attentions=tuple(_attention_site(record, path) for path in record.heads if path not in record.flow.transformed),
        leaves=tuple(_leaf_site(record, path) for path in leaves),
        names=tuple(dict.fromkeys([join(p) for p in record.modules] + [join(p) for p in leaves])),
        unused=tuple(p for p, leaf in leaves.items() if len(leaf.shape) >= 2 and p not in record.flow.uses),
        boxable=functools.partial(_boxable, record, call, plain),
    )


# --- what is recorded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the parameter tree, as it is stored."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class _Module:
    """A called module: its class name, and the shape and dtype of its (first) output; None if it is not an array."""

    owner: str
    shape: Shape | None
    dtype: str


@dataclass(frozen=True)
class _Call:
    """A call of a module that has parameters of its own.

    Attributes:
      name: full name of the method.
      path: the module's path.
      geometry: the registered geometry of the call.
      input: shape of the input that the geometry reads.
    """

    name: str
    path: Path
    geometry: Geometry | None
    input: Shape


@dataclass(eq=False)
class _Record:
    """The record of one abstract call.

    Attributes:
      leaves: the parameters of the model.
      calls: the calls of modules with parameters of their own, by number.
      declared: the registered geometry of each weight, from the first call that has one.
      biases: the biases of the calls with a registered geometry.
      modules: the modules whose ``__call__`` ran.
      scopes: the axes that scans and vmaps had sliced off each scope.
      shapes: the shape of each parameter as its module saw it last.
      heads: (number of key/value heads, key dimension, value dimension) of each attention.
      flow: the uses of the parameters.
    """

    leaves: dict[Path, _Leaf]
    calls: dict[int, _Call] = field(default_factory=dict)
    declared: dict[Path, Geometry] = field(default_factory=dict)
    biases: set[Path] = field(default_factory=set)
    modules: dict[Path, _Module] = field(default_factory=dict)
    scopes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[Path, Shape] = field(default_factory=dict)
    heads: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)


# --- the abstract call ----------------------------------------------------------------------------------------------


class _AbstractCall:
    """An abstract ``model.apply(variables, *args, **kwargs)``."""

    def __init__(self, model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Any):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.leaves = flatten(variables["params"])
        self.others = {name: collection for name, collection in variables.items() if name != "params"}
        self.mappings: set[Path] = set()  # parameters that are mappings of arrays

    def trace(self, leaves: dict[Path, _Leaf], hidden: Collection[Path] = ()) -> tuple[_Record, Any]:
        """The record of the call, and its jaxpr, marked by a `_Watcher`. Its first inputs are the parameters.

        Args:
          leaves: the parameters of the model.
          hidden: parameters that the model is given as boxes. Opened, a box is the parameter; the jaxpr's last inputs
            are arrays inside of the boxes, which only a function of the tree can reach.
        """
        arrays, restore = split_arrays((self.args, self.kwargs))

        def run(record: _Record, params: Any, others: Any, arrays: Sequence[Any], inner: Sequence[Any]) -> Any:
            args, kwargs = restore(arrays)
            tree = {path: box_as(box, x) for (path, box), x in zip(self.leaves.items(), params, strict=True)}
            tree |= {path: TrialBox(x, tree[path]) for path, x in zip(hidden, inner, strict=True)}
            with nn.intercept_methods(_Watcher(record)):
                params = with_probes(unflatten(tree), record, self.mappings)
                variables: Any = {**others, "params": params}
                out = self.model.apply(variables, *args, **kwargs)
            if kwargs.get("mutable", False) is not False:  # parameters that come back unchanged are not used
                y, state = out
                out = y, {name: collection for name, collection in state.items() if name != "params"}
            return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

        params = {
            p: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
            for p, x in zip(self.leaves, map(peek, self.leaves.values()), strict=True)
        }
        inputs = list(params.values()), self.others, arrays, [params[p] for p in hidden]

        def attempt(axis_env: AxisEnv) -> tuple[_Record, Any]:
            record = _Record(leaves)
            return record, jax.make_jaxpr(functools.partial(run, record), axis_env=axis_env)(*inputs).jaxpr

        while True:
            try:
                return with_axis_names(attempt)
            except InsideParameter as e:
                self.mappings.add(e.path)


def _boxable(record: _Record, call: _AbstractCall, plain: Any, paths: Collection[Path]) -> set[Path]:
    """Those of some parameters that the model opens when it is given boxes, and computes the same from."""
    candidates = [path for path in paths if path[:-1] not in record.flow.transformed]
    if not candidates:
        return set()
    try:
        _, jaxpr = call.trace(record.leaves, candidates)
    except Exception:  # whatever a model raises that does not expect boxes
        return set()
    if _primitives(jaxpr) != _primitives(plain):
        return set()
    _, used = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return {path for path, is_used in zip(candidates, used[-len(candidates) :], strict=True) if not is_used}


def _primitives(jaxpr: Any) -> list[str]:
    """The names of all primitives that the outputs of a jaxpr depend on, in their order."""

    def names(jaxpr: Any) -> Iterator[str]:
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for value in eqn.params.values():
                for part in value if isinstance(value, (tuple, list)) else (value,):
                    if (inner := open_jaxpr(part)) is not None:
                        yield from names(inner)

    return list(names(pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]))


class _Watcher:
    """The interceptor that records calls and marks them in the trace."""

    def __init__(self, record: _Record):
        self.record = record

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method, record = context.module, context.method_name, self.record
        if module.scope is None or method == "setup":
            return next_fun(*args, **kwargs)
        path, owner = module.scope.path, registry.owner_of(context.orig_method)
        args, kwargs = registry.by_position(context.orig_method, module, args, kwargs)
        variables = module.variables.get("params", {})
        if (axes := axes_in(variables)) is not None:
            record.scopes[path] = max(axes, record.scopes.get(path, ()), key=len)
        own = {
            n: jax.tree.leaves(v)[0]  # not opened: that may add a sharding constraint
            for n, v in variables.items()
            if not isinstance(v, (Mapping, AxisProbe)) and (*path, n) in record.leaves
        }
        number = self._enter(path, owner, method, module, args, kwargs, own) if own else None
        if (hook := attention.find(owner, method)) is not None:
            y = hook(next_fun, args, kwargs, module, self._heads_recorder(path))
        else:
            y = next_fun(*args, **kwargs)
        first = y[0] if isinstance(y, tuple) and y else y
        if method == "__call__":
            shape = np.shape(first) if hasattr(first, "shape") else None
            record.modules[path] = _Module(type(module).__name__, shape, str(getattr(first, "dtype", "")))
        if number is not None:
            if isinstance(first, jax.Array):
                marks.mark(first, marks.OUTPUT, number)
            marks.mark(next(iter(own.values())), marks.EXIT, number)
        return y

    def _enter(
        self, path: Path, owner: str, method: str, module: nn.Module, args: Any, kwargs: Any, own: Mapping[str, Any]
    ) -> int:
        """Records a call, marks its beginning, and returns its number."""
        number, shapes = len(self.record.calls), {n: np.shape(x) for n, x in own.items()}
        factory = registry.find(owner, method)
        found = None if factory is None else factory(registry.make_call(module, method, args, kwargs, shapes))
        geometry = found if found is not None and found.leaf in own else None
        x = None
        if geometry is not None:
            x = args[geometry.argument]
            self.record.declared.setdefault((*path, geometry.leaf), geometry)
            if geometry.bias is not None:
                self.record.biases.add((*path, geometry.bias))
        self.record.calls[number] = _Call(f"{owner}.{method}", path, geometry, () if x is None else np.shape(x))
        for name, value in own.items():
            self.record.shapes[*path, name] = shapes[name]
            marks.mark(value, marks.ENTER, number, name)
        if isinstance(x, jax.Array):
            marks.mark(x, marks.INPUT, number)
        return number

    def _heads_recorder(self, path: Path) -> attention.Extend:
        def extend(key: jax.Array, value: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array, Any]:
            self.record.heads[path] = (key.shape[-2], key.shape[-1], value.shape[-1])
            return key, value, mask

        return extend


# --- sites from the record ------------------------------------------------------------------------------------------


def _weight_site(record: _Record, path: Path) -> Site | None:
    """The site of a weight, or None for a parameter that no method can act on as a matrix."""
    owner, name, leaf = path[:-1], path[-1], record.leaves[path]
    uses = record.flow.uses.get(path, [])
    if path in record.biases:
        return None
    scope = _nearest_scope(record, owner)
    axes = () if scope is None else record.scopes[scope]
    # Axes of metadata alone (`nn.add_metadata_axis`) are not sliced off.
    lengths = range(min(len(axes), len(leaf.shape)) + 1)
    stacks = [_stack(axes[:n], leaf.shape) for n in lengths]
    stack = next((s for s in stacks if _without(leaf.shape, s) == record.shapes.get(path)), stacks[-1])
    shape = _without(leaf.shape, stack)
    registered = _registered(record, path, uses)
    geometry = registered or traced(name, shape, uses, [_name_of(record, use) for use in uses])
    if geometry is None or any(use.call is None for use in uses) or owner in record.flow.transformed:
        geometry = record.declared.get(path) or (Raw(leaf=name, shape=shape) if len(shape) >= 2 and uses else None)
        if geometry is None:
            return None
        via = MERGE if owner in record.flow.transformed else BOX
    else:
        via = FUSED
    if len(shape) < 2:
        return None
    inputs, outputs = jax.eval_shape(geometry.view, jax.ShapeDtypeStruct(shape, np.float32)).shape[-2:]
    return Site(
        path=owner,
        kind="weight",
        owner=record.modules[owner].owner if owner in record.modules else "Module",
        leaf=name,
        geometry=geometry,
        inputs=inputs,
        outputs=outputs,
        dtype=leaf.dtype,
        stored=leaf.shape,
        stack=stack,
        via=via,
        head=_is_head(record, path, geometry, uses),
        bias=geometry.bias is not None and (*owner, geometry.bias) in record.leaves,
    )


def _registered(record: _Record, path: Path, uses: Sequence[Use]) -> Geometry | None:
    """The registered geometry of a weight, if every call shows one use of it that the geometry explains."""
    found = record.declared.get(path)
    calls = [use.call for use in uses]
    if found is None or not found.fused or len(set(calls)) != len(calls):
        return None
    for use in uses:
        call = record.calls[use.call] if use.call is not None else None
        if call is None or call.geometry != found or not found.explains(use, call.input):
            return None
    return found


def _name_of(record: _Record, use: Use) -> str:
    return record.calls[use.call].name if use.call is not None else ""


def _is_head(record: _Record, path: Path, geometry: Geometry, uses: Sequence[Use]) -> bool:
    """Whether a weight's output is an output of the model, or its module has the name of a head."""
    if not isinstance(geometry, (Contraction, Traced)):
        return False
    is_named = len(path) > 1 and path[-2] in HEAD_NAMES
    returned = [use.call in record.flow.returned if isinstance(geometry, Contraction) else use.final for use in uses]
    return is_named or (bool(returned) and all(returned))


def _named(sites: Sequence[Site], record: _Record) -> list[Site]:
    """The sites, with names of their own for raw weights and for several weights of one scope."""
    declared = Counter(s.path for s in sites if s.weight_path in record.declared)
    return [dataclasses.replace(s, named=s.weight_path not in record.declared or declared[s.path] > 1) for s in sites]


def _output_site(record: _Record, path: Path, geometry: Geometry | None) -> Site:
    module = record.modules[path]
    assert module.shape
    return Site(
        path=path,
        kind="output",
        owner=module.owner,
        geometry=geometry,
        outputs=module.shape[-1],
        dtype=module.dtype,
        stack=_scope_stack(record, path),
    )


def _attention_site(record: _Record, path: Path) -> Site:
    owner = record.modules[path].owner if path in record.modules else "Attention"
    return Site(path=path, kind="attention", owner=owner, heads=record.heads[path], stack=_scope_stack(record, path))


def _leaf_site(record: _Record, path: Path) -> Site:
    owner = record.modules[path[:-1]].owner if path[:-1] in record.modules else ""
    leaf = record.leaves[path]
    return Site(path=path, kind="leaf", owner=owner, dtype=leaf.dtype, stored=leaf.shape, via=REPLACE)


def _scope_stack(record: _Record, path: Path) -> Stack:
    """The stacking of a module's scope or, if it has no parameters, of the nearest scope around it that has."""
    scope = _nearest_scope(record, path)
    if scope is None:
        return ()
    stored = next(leaf.shape for p, leaf in record.leaves.items() if p[: len(scope)] == scope)
    return _stack(record.scopes[scope], stored)


def _nearest_scope(record: _Record, path: Path) -> Path | None:
    """The innermost scope with parameters that is at a path or around it."""
    return next((path[:n] for n in range(len(path), -1, -1) if path[:n] in record.scopes), None)


def _stack(axes: tuple[int, ...], stored: Shape) -> Stack:
    """Each sliced axis with its size, from the stored shape."""
    rest = list(stored)
    return tuple((axis, rest.pop(axis)) for axis in axes)


def _without(stored: Shape, stack: Stack) -> Shape:
    """The shape of one layer of a stored leaf."""
    rest = list(stored)
    for axis, _ in stack:
        rest.pop(axis)
    return tuple(rest)
