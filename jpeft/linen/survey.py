"""Finds the sites of a Linen model in one abstract call: which modules use which weights, and how.

Every parameter is put in a box that records its reads. Flax opens the box when a module asks for its own parameter;
code that reads another module's variables (a tied head) uses the box itself. To detect such other uses, the output of
each call that a geometry explains is replaced by one that depends on the input alone. If the model's output still
depends on a weight, the weight is used elsewhere too, and changing the call would not be enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.interpreters import partial_eval as pe

from jpeft.core.geometry import Contraction, Geometry, Raw
from jpeft.core.sites import BOX, FUSED, HEAD_NAMES, MERGE, REPLACE, Site, Stack, Survey
from jpeft.core.tree import Path, box_as, flatten, join, peek, unflatten
from jpeft.linen import attention, registry

Shape = tuple[int, ...]


def survey(model: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """The candidate sites of a model, found by an abstract ``model.apply(variables, *args, **kwargs)``.

    Raises:
      Exception: whatever the model raises for these inputs.
    """
    record = _Record({p: _Leaf(np.shape(peek(x)), str(peek(x).dtype)) for p, x in flatten(variables["params"]).items()})
    _trace(model, variables, record, args, dict(kwargs))
    weights = tuple(site for path in record.leaves if (site := _weight_site(record, path)) is not None)
    geometry_of = {site.path: site.geometry for site in weights if site.linear}
    return Survey(
        weights=weights,
        outputs=tuple(
            _output_site(record, path, geometry_of.get(path))
            for path, module in record.modules.items()
            if module.shape and path
        ),
        attentions=tuple(_attention_site(record, path) for path in record.heads),
        leaves=tuple(_leaf_site(record, path) for path in record.leaves),
        names=tuple(dict.fromkeys([join(p) for p in record.modules] + [join(p) for p in record.leaves])),
    )


# --- what is recorded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the parameter tree, as it is stored."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class _Read:
    """A module's read of its own parameter: the shape that it saw, and the axes that scans had sliced off."""

    shape: Shape
    axes: tuple[int, ...]


@dataclass(frozen=True)
class _Module:
    """A called module: its class name, and the shape and dtype of its (first) output; None if it is not an array."""

    owner: str
    shape: Shape | None
    dtype: str


@dataclass(eq=False)
class _Record:
    """The record of one abstract call.

    It is part of the boxes' tree structure and hashed by identity, so that no trace cache can replay an earlier call.

    Attributes:
      leaves: the parameters of the model.
      reads: the last read of each parameter by its own module.
      foreign: parameters that code outside of their module read.
      geometries: the geometries of each module's calls.
      modules: the modules whose ``__call__`` ran.
      scopes: for each scope, a parameter in it and the axes that scans had sliced off.
      heads: (number of key/value heads, key dimension, value dimension) of each attention.
      outputs: the outputs of all calls, during the call of the model only.
      final: modules whose output is an output of the model.
      used_elsewhere: parameters that the output depends on other than by a call that a geometry explains.
    """

    leaves: dict[Path, _Leaf]
    reads: dict[Path, _Read] = field(default_factory=dict)
    foreign: set[Path] = field(default_factory=set)
    geometries: dict[Path, list[Geometry]] = field(default_factory=dict)
    modules: dict[Path, _Module] = field(default_factory=dict)
    scopes: dict[Path, tuple[Path, tuple[int, ...]]] = field(default_factory=dict)
    heads: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    outputs: list[tuple[Path, Any]] = field(default_factory=list)
    final: set[Path] = field(default_factory=set)
    used_elsewhere: set[Path] = field(default_factory=set)


@jax.tree_util.register_pytree_node_class
class _Watched(meta.AxisMetadata):
    """A parameter that records when, where and in which shape it is read."""

    def __init__(self, value: Any, path: Path, axes: tuple[int, ...], record: _Record):
        self._value, self._path, self._axes, self._record = value, path, axes, record

    def unbox(self) -> Any:
        value = meta.unbox(self._value)
        self._record.reads[self._path] = _Read(np.shape(value), self._axes)
        return value

    def replace_boxed(self, val: Any) -> Any:
        return box_as(self._value, val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> _Watched:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> _Watched:
        value = self._value
        value = value.remove_axis(index, params) if isinstance(value, meta.AxisMetadata) else value
        return _Watched(value, self._path, (*self._axes, index), self._record)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self._value,), (self._path, self._axes, self._record)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> _Watched:
        return cls(children[0], *aux)

    # What follows runs only in code that reads the variable itself, without its owner.

    def _array(self) -> Any:
        self._record.foreign.add(self._path)
        return meta.unbox(self._value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._array(), name)

    def __jax_array__(self) -> Any:
        return self._array()

    def __getitem__(self, index: Any) -> Any:
        return self._array()[index]

    def __neg__(self) -> Any:
        return -self._array()

    def __add__(self, other: Any) -> Any:
        return self._array() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._array()

    def __sub__(self, other: Any) -> Any:
        return self._array() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self._array()

    def __mul__(self, other: Any) -> Any:
        return self._array() * other

    def __rmul__(self, other: Any) -> Any:
        return other * self._array()

    def __truediv__(self, other: Any) -> Any:
        return self._array() / other

    def __matmul__(self, other: Any) -> Any:
        return self._array() @ other

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self._array()


# --- the abstract call ----------------------------------------------------------------------------------------------


def _trace(model: nn.Module, variables: Mapping[str, Any], record: _Record, args: Any, kwargs: Any) -> None:
    """Traces the model on watched parameters and fills the record."""
    leaves = flatten(variables["params"])
    others = {name: collection for name, collection in variables.items() if name != "params"}
    # Python values (flags, strings, None) stay what they are; only arrays are traced.
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)

    def run(params: Sequence[Any], others: Any, arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        args, kwargs = jax.tree.unflatten(treedef, [next(remaining) if _is_array(x) else x for x in flat])
        boxes = {path: box_as(box, x) for (path, box), x in zip(leaves.items(), params, strict=True)}
        watched = unflatten({path: _Watched(x, path, (), record) for path, x in boxes.items()})
        with nn.intercept_methods(_Watcher(record)):
            out = model.apply({**others, "params": watched}, *args, **kwargs)
        if kwargs.get("mutable", False) is not False:  # parameters that come back unchanged are not used
            y, state = out
            out = y, {name: collection for name, collection in state.items() if name != "params"}
        out = jax.tree.leaves(out)
        returned = {id(x) for x in out}
        record.final |= {path for path, y in record.outputs if id(y) in returned}
        record.outputs.clear()  # tracers must not outlive their trace
        return [x for x in out if isinstance(x, jax.Array)]

    params = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in map(peek, leaves.values())]
    jaxpr = jax.make_jaxpr(run)(params, others, [x for x in flat if _is_array(x)]).jaxpr
    _, used = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    record.used_elsewhere |= {path for path, is_used in zip(leaves, used, strict=False) if is_used}


class _Watcher:
    """The interceptor that records calls."""

    def __init__(self, record: _Record):
        self.record = record

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method, record = context.module, context.method_name, self.record
        if module.scope is None or method == "setup":
            return next_fun(*args, **kwargs)
        path, owner = module.scope.path, registry.owner_of(context.orig_method)
        args, kwargs = registry.by_position(context.orig_method, module, args, kwargs)
        own = module.variables.get("params", {})
        if (watched := _first_watched(own)) is not None:
            record.scopes[path] = (watched._path, watched._axes)
        geometry = _geometry(module, owner, method, args, kwargs)
        if (hook := attention.find(owner, method)) is not None:
            y = hook(next_fun, args, kwargs, module, self._heads_recorder(path))
        else:
            y = next_fun(*args, **kwargs)
        if geometry is not None:
            record.geometries.setdefault(path, []).append(geometry)
            x = args[geometry.argument]
            y = jnp.zeros(y.shape, y.dtype) + x.sum().astype(y.dtype)  # depends on the input, not on the weight
        first = y[0] if isinstance(y, tuple) and y else y
        if method == "__call__":
            shape = np.shape(first) if hasattr(first, "shape") else None
            record.modules[path] = _Module(type(module).__name__, shape, str(getattr(first, "dtype", "")))
        record.outputs.append((path, first))
        return y

    def _heads_recorder(self, path: Path) -> attention.Extend:
        def extend(key: jax.Array, value: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array, Any]:
            self.record.heads[path] = (key.shape[-2], key.shape[-1], value.shape[-1])
            return key, value, mask

        return extend


def _geometry(module: nn.Module, owner: str, method: str, args: Any, kwargs: Any) -> Geometry | None:
    """The geometry of a call; None if no geometry explains it."""
    factory = registry.find(owner, method)
    if factory is None:
        return None
    own = module.variables.get("params", {})
    values = {n: v._value if isinstance(v, _Watched) else v for n, v in own.items() if not isinstance(v, Mapping)}
    shapes = {n: np.shape(peek(v)) for n, v in values.items()}
    found = factory(registry.make_call(module, method, args, kwargs, shapes))
    if found is None:
        return None
    # A nested root inside the model (a tied head) may be given the weight of another module. The path is the scope's: a
    # module may have a field called `path`.
    weight, scope = own.get(found.leaf), module.scope
    assert scope is not None
    is_own = isinstance(weight, _Watched) and weight._path == (*scope.path, found.leaf)
    return found if is_own else None


def _first_watched(node: Any) -> _Watched | None:
    """Any parameter in a scope or below. Scans slice axes off on the way in: its axes are those of the scope."""
    if isinstance(node, Mapping):
        return next((w for child in node.values() if (w := _first_watched(child)) is not None), None)
    return node if isinstance(node, _Watched) else None


def _is_array(x: Any) -> bool:
    """Whether an argument is an array, abstract array or PRNG key."""
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) or jnp.issubdtype(
        getattr(x, "dtype", np.dtype(object)), jax.dtypes.prng_key
    )


# --- sites from the record ------------------------------------------------------------------------------------------


def _weight_site(record: _Record, path: Path) -> Site | None:
    """The site of a weight, or None for a parameter that no method can act on as a matrix."""
    owner, name, leaf = path[:-1], path[-1], record.leaves[path]
    read = record.reads.get(path)
    shape = leaf.shape if read is None else read.shape
    elsewhere = path in record.used_elsewhere
    found = [g for g in record.geometries.get(owner, []) if g.leaf == name]
    if not found:
        if len(shape) < 2 or not elsewhere:
            return None
        found = [Raw(leaf=name, shape=shape)]
    geometry = found[0]
    explained = geometry.fused and all(g == geometry for g in found) and not elsewhere
    inputs, outputs = jax.eval_shape(geometry.view, jax.ShapeDtypeStruct(shape, np.float32)).shape[-2:]
    named_head = bool(owner) and owner[-1] in HEAD_NAMES
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
        stack=() if read is None else _stack(read.axes, leaf.shape),
        via=FUSED if explained else MERGE if path in record.foreign else BOX,
        head=isinstance(geometry, Contraction) and (owner in record.final or named_head),
        bias=geometry.bias is not None and (*owner, geometry.bias) in record.leaves,
    )


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
    for n in range(len(path), -1, -1):
        if path[:n] in record.scopes:
            leaf, axes = record.scopes[path[:n]]
            return _stack(axes, record.leaves[leaf].shape)
    return ()


def _stack(axes: tuple[int, ...], stored: Shape) -> Stack:
    """Each sliced axis with its size, from the stored shape."""
    rest = list(stored)
    return tuple((axis, rest.pop(axis)) for axis in axes)
