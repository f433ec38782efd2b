"""The record of one abstract call of a model, and the candidate sites in it: the same for every front end.

A front end runs the model as it is, on plain parameters, and marks in the trace where each module call begins and ends;
`jpeft.core.dataflow` then shows what becomes of every parameter. A geometry is believed only where the trace shows that
the call uses its weight in that way.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jpeft.core.attention import Hook, Operation, Wrap
from jpeft.core.dataflow import marks
from jpeft.core.dataflow.views import Use
from jpeft.core.dataflow.walk import Flow
from jpeft.core.geometry import Call, Contraction, Geometry, Raw
from jpeft.core.geometry.embedding import traced_table
from jpeft.core.geometry.traced import Traced, traced
from jpeft.core.nested import first_array
from jpeft.core.sites import BOX, FUSED, HEAD_NAMES, MERGE, REPLACE, Site, Stack, Survey, without_stack
from jpeft.core.tree import Path, join

Shape = tuple[int, ...]

# --- what is recorded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeafRecord:
    """A leaf of the parameter tree, as it is stored."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class ModuleRecord:
    """A called module.

    Attributes:
      owner: its class name.
      shape: the shape of its first floating output; None if it has none.
      dtype: the dtype of that.
      inputs: the number of features of its first floating input; 0 if it has none.
    """

    owner: str
    shape: Shape | None
    dtype: str
    inputs: int = 0


@dataclass(frozen=True)
class CallRecord:
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


@dataclass(frozen=True)
class Caller:
    """A call of any module.

    Attributes:
      path: the module's path.
      name: full name of the method.
      hooked: whether an attention hook is registered for it.
    """

    path: Path
    name: str
    hooked: bool


@dataclass(eq=False)
class Record:
    """The record of one abstract call.

    Attributes:
      leaves: the parameters of the model.
      calls: the calls of modules with parameters of their own, by number.
      callers: all calls of modules, by the number that `marks.begin_call` has.
      declared: the registered geometry of each weight, from the first call that has one.
      biases: the biases of the calls with a registered geometry.
      modules: the modules whose ``__call__`` ran.
      scopes: the axes that scans and vmaps had sliced off each scope.
      below: for a module without parameters of its own, the path of one below it; a shared module lies elsewhere.
      shapes: the shape of each parameter as its module saw it last.
      heads: (number of key/value heads, key dimension, value dimension) of each attention.
      flow: the uses of the parameters.
    """

    leaves: dict[Path, LeafRecord]
    calls: dict[int, CallRecord] = field(default_factory=dict)
    callers: list[Caller] = field(default_factory=list)
    declared: dict[Path, Geometry] = field(default_factory=dict)
    biases: set[Path] = field(default_factory=set)
    modules: dict[Path, ModuleRecord] = field(default_factory=dict)
    scopes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    below: dict[Path, Path] = field(default_factory=dict)
    shapes: dict[Path, Shape] = field(default_factory=dict)
    heads: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)

    def watch(
        self,
        path: Path,
        owner: str,
        call: Call,
        run: Callable[..., Any],
        own: Mapping[str, Any],
        factory: Callable[[Call], Geometry | None] | None,
        hook: Hook | None,
    ) -> Any:
        """The output of a call of a module, which is recorded, and marked in the trace.

        Args:
          path: the module's path.
          owner: full name of the class that defines the method.
          call: the call.
          run: runs it.
          own: the module's own parameters by name, as the call sees them.
          factory: the registered geometry of the method.
          hook: the attention hook of the method.
        """
        number = self._enter(path, owner, call, factory, own) if own else None
        self.callers.append(Caller(path, f"{owner}.{call.method}", hook is not None))
        caller = len(self.callers) - 1
        marks.begin_call(caller, [x for x in jax.tree.leaves((call.args, call.kwargs)) if isinstance(x, jax.Array)])
        if hook is not None:
            y = hook(run, call.args, dict(call.kwargs), call.module, self._heads_recorder(path))
        else:
            y = run(*call.args, **call.kwargs)
        if call.method == "__call__":
            self._ran(path, call, y)
        marks.end_call(caller)
        if number is not None:
            self._leave(number, y, own)
        return y

    def _enter(
        self,
        path: Path,
        owner: str,
        call: Call,
        factory: Callable[[Call], Geometry | None] | None,
        own: Mapping[str, Any],
    ) -> int:
        """Records a call of a module with parameters of its own, marks its beginning, and returns its number."""
        number = len(self.calls)
        found = None if factory is None else factory(call)
        geometry = found if found is not None and found.leaf in own else None
        x = None
        if geometry is not None:
            x = call.args[geometry.argument]
            self.declared.setdefault((*path, geometry.leaf), geometry)
            if geometry.bias is not None:
                self.biases.add((*path, geometry.bias))
        self.calls[number] = CallRecord(f"{owner}.{call.method}", path, geometry, () if x is None else np.shape(x))
        for name, value in own.items():
            self.shapes[*path, name] = np.shape(value)
            marks.mark(value, marks.ENTER, number, name)
        if isinstance(x, jax.Array):
            marks.mark(x, marks.INPUT, number)
        return number

    def _leave(self, number: int, y: Any, own: Mapping[str, Any]) -> None:
        """Marks the end of a call and its output ``y``."""
        if isinstance(first := first_array(y, floating=False), jax.Array):
            marks.mark(first, marks.OUTPUT, number)
        marks.mark(next(iter(own.values())), marks.EXIT, number)

    def _ran(self, path: Path, call: Call, y: Any) -> None:
        """Records that a module's ``__call__`` ran, with its output."""
        x, first = first_array((call.args, call.kwargs)), first_array(y)
        shape, inputs = None if first is None else np.shape(first), 0 if x is None else np.shape(x)[-1]
        self.modules[path] = ModuleRecord(type(call.module).__name__, shape, str(getattr(first, "dtype", "")), inputs)

    def _heads_recorder(self, path: Path) -> Wrap:
        """The function that an attention hook calls in place of the attention: it runs that, and records its heads."""

        def wrap(operation: Operation, query: jax.Array, key: jax.Array, value: jax.Array, mask: Any) -> jax.Array:
            self.heads[path] = (key.shape[-2], key.shape[-1], value.shape[-1])
            return operation(query, key, value, mask)

        return wrap

    def survey(self, **fields: Any) -> Survey:
        """The candidate sites, once `flow` is known; ``fields`` are the others of a `Survey`."""
        weights = _named([site for path in self.leaves if (site := _weight_site(self, path)) is not None], self)
        geometry_of = {site.path: site.geometry for site in weights if site.linear and not site.named}
        transformed = self.flow.transformed
        return Survey(
            weights=tuple(weights),
            outputs=tuple(
                _output_site(self, path, geometry_of.get(path))
                for path, module in self.modules.items()
                if module.shape and path and path not in transformed
            ),
            leaves=tuple(_leaf_site(self, path) for path in self.leaves),
            names=tuple(dict.fromkeys([join(p) for p in self.modules] + [join(p) for p in self.leaves])),
            unused=tuple(p for p, leaf in self.leaves.items() if len(leaf.shape) >= 2 and p not in self.flow.uses),
            **fields,
        )


# --- sites from the record ------------------------------------------------------------------------------------------


def _weight_site(record: Record, path: Path) -> Site | None:
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
    stack = next((s for s in stacks if without_stack(leaf.shape, s) == record.shapes.get(path)), stacks[-1])
    shape = without_stack(leaf.shape, stack)
    registered = _registered(record, path, uses)
    calls = [_name_of(record, use) for use in uses]
    geometry = registered or traced(name, shape, uses, calls) or traced_table(name, shape, uses, calls)
    if geometry is None or any(use.call is None for use in uses) or owner in record.flow.transformed:
        declared = record.declared.get(path)
        if record.shapes.get(path, shape) != shape:  # its module sees another array, which tells nothing of this one
            declared, shape, stack = None, leaf.shape, ()
        geometry = declared or (Raw(leaf=name, shape=shape) if len(shape) >= 2 and uses else None)
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


def _registered(record: Record, path: Path, uses: Sequence[Use]) -> Geometry | None:
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


def _name_of(record: Record, use: Use) -> str:
    return record.calls[use.call].name if use.call is not None else ""


def _is_head(record: Record, path: Path, geometry: Geometry, uses: Sequence[Use]) -> bool:
    """Whether a weight's output is an output of the model, or its module has the name of a head."""
    if not isinstance(geometry, (Contraction, Traced)):
        return False
    is_named = len(path) > 1 and path[-2] in HEAD_NAMES
    returned = [use.call in record.flow.returned if isinstance(geometry, Contraction) else use.final for use in uses]
    return is_named or (bool(returned) and all(returned))


def _named(sites: Sequence[Site], record: Record) -> list[Site]:
    """The sites, with names of their own for raw weights and for several weights of one scope."""
    declared = Counter(s.path for s in sites if s.weight_path in record.declared)
    return [dataclasses.replace(s, named=s.weight_path not in record.declared or declared[s.path] > 1) for s in sites]


def _output_site(record: Record, path: Path, geometry: Geometry | None) -> Site:
    module = record.modules[path]
    assert module.shape
    return Site(
        path=path,
        kind="output",
        owner=module.owner,
        geometry=geometry,
        inputs=module.inputs,
        outputs=module.shape[-1],
        dtype=module.dtype,
        stack=scope_stack(record, path),
    )


def _leaf_site(record: Record, path: Path) -> Site:
    owner = record.modules[path[:-1]].owner if path[:-1] in record.modules else ""
    leaf = record.leaves[path]
    return Site(path=path, kind="leaf", owner=owner, dtype=leaf.dtype, stored=leaf.shape, via=REPLACE)


def scope_stack(record: Record, path: Path) -> Stack:
    """The stacking of a module's scope or, if it has no parameters, of the nearest scope around it that has."""
    scope = _nearest_scope(record, path)
    if scope is None:
        return ()
    below = record.below.get(scope) or next(path for path in record.leaves if path[: len(scope)] == scope)
    return _stack(record.scopes[scope], record.leaves[below].shape)


def _nearest_scope(record: Record, path: Path) -> Path | None:
    """The innermost scope with parameters that is at a path or around it."""
    return next((path[:n] for n in range(len(path), -1, -1) if path[:n] in record.scopes), None)


def _stack(axes: tuple[int, ...], stored: Shape) -> Stack:
    """Each sliced axis with its size, from the stored shape."""
    rest = list(stored)
    return tuple((axis, rest.pop(axis)) for axis in axes)
