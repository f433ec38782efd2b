"""One abstract call of a model, and what it shows: which modules use which weights, and how.

Every parameter is put in a box that tells when it is read. Flax opens the box when a module asks for its own
parameter; code that reaches into another module's variables (a tied head) touches it otherwise. The output of every
call that a geometry explains is replaced by one that depends on its input alone: a weight that the model's output still
depends on is used elsewhere too, so that changing the call would not be enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.interpreters import partial_eval as pe

from jpeft.core import geometry
from jpeft.core.geometry import Geometry, Raw
from jpeft.core.sites import BOX, FUSED, HEAD_NAMES, MERGE, REPLACE, Site, Stack, Survey
from jpeft.core.tree import Path, box_as, flatten, join, peek, unflatten
from jpeft.linen import attention, registry


@dataclass
class _Record:
    """What the abstract call did. Its identity is in the boxes' tree structure, so no trace cache can replay it."""

    reads: dict[Path, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # shape in scope, axes
    foreign: set[Path] = field(default_factory=set)
    geometries: dict[Path, list[Geometry]] = field(default_factory=dict)
    modules: dict[Path, tuple[str, tuple[int, ...] | None, str]] = field(default_factory=dict)
    axes: dict[Path, tuple[Path, tuple[int, ...]]] = field(default_factory=dict)  # of a scope, by a parameter below it
    heads: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    outputs: list[tuple[Path, Any]] = field(default_factory=list)
    final: set[Path] = field(default_factory=set)
    elsewhere: set[Path] = field(default_factory=set)  # used other than by a call that a geometry explains

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@jax.tree_util.register_pytree_node_class
class _Watched(meta.AxisMetadata):
    """A parameter that reports when, where and in which shape it is read."""

    def __init__(self, value: Any, path: Path, axes: tuple[int, ...], record: _Record):
        self._value, self._path, self._axes, self._record = value, path, axes, record

    def unbox(self) -> Any:
        value = meta.unbox(self._value)
        self._record.reads[self._path] = (np.shape(value), self._axes)
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

    # From here on: someone uses the variable itself, behind the owner's back.
    def _foreign(self) -> Any:
        self._record.foreign.add(self._path)
        return meta.unbox(self._value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._foreign(), name)

    def __jax_array__(self) -> Any:
        return self._foreign()

    def __getitem__(self, index: Any) -> Any:
        return self._foreign()[index]


for _op in ("add", "radd", "sub", "rsub", "mul", "rmul", "matmul", "rmatmul", "truediv", "neg"):
    setattr(_Watched, f"__{_op}__", lambda self, *a, _op=f"__{_op}__": getattr(self._foreign(), _op)(*a))


def _first_watched(node: Any) -> _Watched | None:
    """Any parameter of a scope or below it. Scans take axes off on the way in, so its axes are those of the scope."""
    if isinstance(node, Mapping):
        return next((w for child in node.values() if (w := _first_watched(child)) is not None), None)
    return node if isinstance(node, _Watched) else None


def _is_at(node: Any, path: Path) -> bool:
    return isinstance(node, _Watched) and node._path == path


def _own_shapes(own: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    values = {k: v._value if isinstance(v, _Watched) else v for k, v in own.items() if not isinstance(v, Mapping)}
    return {k: np.shape(peek(v)) for k, v in values.items()}


def _interceptor(record: _Record):
    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if module.scope is None or method == "setup":
            return next_fun(*args, **kwargs)
        path = module.scope.path
        owner = registry.owner_of(context.orig_method)
        args, kwargs = registry.by_position(context.orig_method, module, args, kwargs)
        own = module.variables.get("params", {})
        if (first := _first_watched(own)) is not None:
            record.axes[path] = (first._path, first._axes)
        factory = registry.find(owner, method)
        found = (
            factory(registry.make_call(module, method, args, kwargs, _own_shapes(own))) if factory is not None else None
        )
        if found is not None and not _is_at(own.get(found.leaf), (*path, found.leaf)):
            found = None  # a root of its own inside the model (a tied head), given another module's weight
        hook = attention.find(owner, method)
        if hook is not None:
            watch = lambda k, v, m: (record.heads.update({path: (k.shape[-2], k.shape[-1], v.shape[-1])}), (k, v, m))[1]  # noqa: E731
            y = hook(next_fun, args, kwargs, module, watch)
        else:
            y = next_fun(*args, **kwargs)
        if found is not None:
            record.geometries.setdefault(path, []).append(found)
            x = args[found.argument]
            y = jnp.zeros(y.shape, y.dtype) + x.sum().astype(y.dtype)  # of the input alone
        first = y[0] if isinstance(y, tuple) and y else y
        if method == "__call__":
            shape = np.shape(first) if hasattr(first, "shape") else None
            record.modules[path] = (type(module).__name__, shape, str(getattr(first, "dtype", "")))
        record.outputs.append((path, first))
        return y

    return intercept


def _is_dynamic(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) or jnp.issubdtype(
        getattr(x, "dtype", np.dtype(object)), jax.dtypes.prng_key
    )


def _trace(model: nn.Module, variables: Mapping[str, Any], record: _Record, args: Any, kwargs: Any) -> None:
    leaves = flatten(variables["params"])
    others = {k: v for k, v in variables.items() if k != "params"}
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
    dynamic = [x for x in flat if _is_dynamic(x)]

    def run(arrays: list[Any], others: Any, dynamic: list[Any]) -> Any:
        it = iter(dynamic)
        a, kw = jax.tree.unflatten(treedef, [next(it) if _is_dynamic(x) else x for x in flat])
        boxes = {p: box_as(box, x) for (p, box), x in zip(leaves.items(), arrays, strict=True)}
        boxed = unflatten({p: _Watched(x, p, (), record) for p, x in boxes.items()})
        with nn.intercept_methods(_interceptor(record)):
            out = model.apply({**others, "params": boxed}, *a, **kw)
        if kw.get("mutable", False) is not False:  # parameters that come back unchanged are not used
            y, state = out
            out = y, {k: v for k, v in state.items() if k != "params"}
        out = jax.tree.leaves(out)
        final = {id(x) for x in out}
        record.final |= {path for path, y in record.outputs if id(y) in final}
        record.outputs.clear()  # tracers must not outlive their trace
        return [x for x in out if isinstance(x, jax.Array)]

    arrays = [_abstract(peek(x)) for x in leaves.values()]
    jaxpr = jax.make_jaxpr(run)(arrays, others, dynamic).jaxpr
    _, used = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    record.elsewhere = {p for p, u in zip(leaves, used, strict=False) if u}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype)


def _stack(axes: tuple[int, ...], stored: tuple[int, ...]) -> Stack:
    rest = list(stored)
    return tuple((axis, rest.pop(axis)) for axis in axes)


def survey(model: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """Calls ``model.apply`` abstractly and reports its sites.

    Raises:
      whatever the model raises on these inputs.
    """
    record = _Record()
    _trace(model, variables, record, args, dict(kwargs))
    shapes = {p: (np.shape(peek(x)), str(peek(x).dtype)) for p, x in flatten(variables["params"]).items()}
    stacks = {p: _stack(record.reads[p][1], shapes[p][0]) for p in record.reads if p in shapes}
    weights = [w for p in shapes if (w := _weight_site(record, p, shapes, stacks)) is not None]
    made_by = {w.path: w for w in weights if w.linear}
    return Survey(
        weights=tuple(weights),
        outputs=tuple(
            Site(path=p, kind="output", owner=cls, outputs=shape[-1], dtype=dtype,
                 stack=_module_stack(p, record, shapes), geometry=made_by[p].geometry if p in made_by else None)
            for p, (cls, shape, dtype) in record.modules.items()
            if shape and p
        ),
        attentions=tuple(
            Site(path=p, kind="attention", owner=record.modules.get(p, ("Attention",))[0], heads=heads,
                 stack=_module_stack(p, record, shapes))
            for p, heads in record.heads.items()
        ),
        leaves=tuple(
            Site(path=p, kind="leaf", owner=record.modules.get(p[:-1], ("",))[0], dtype=dtype, stored=shape,
                 via=REPLACE)
            for p, (shape, dtype) in shapes.items()
        ),
        names=tuple(dict.fromkeys([join(p) for p in record.modules] + [join(p) for p in shapes])),
    )  # fmt: skip


def _module_stack(path: Path, record: _Record, shapes: Mapping[Path, Any]) -> Stack:
    """The stacking of a module's own scope or, if it has no parameters, of the one around it."""
    for n in range(len(path), -1, -1):
        if path[:n] in record.axes:
            leaf, axes = record.axes[path[:n]]
            return _stack(axes, shapes[leaf][0])
    return ()


def _weight_site(record: _Record, path: Path, shapes: Mapping[Path, Any], stacks: Mapping[Path, Stack]) -> Site | None:
    owner, leaf = path[:-1], path[-1]
    stored, dtype = shapes[path]
    in_scope = record.reads[path][0] if path in record.reads else stored
    found = [g for g in record.geometries.get(owner, []) if g.leaf == leaf]
    if not found:
        if len(in_scope) < 2 or path not in record.elsewhere:
            return None
        found = [Raw(leaf=leaf, shape=in_scope)]
    geom = found[0]
    explained = geom.fused and all(g == geom for g in found) and path not in record.elsewhere
    via = FUSED if explained else MERGE if path in record.foreign else BOX
    matrix = jax.eval_shape(geom.view, jax.ShapeDtypeStruct(in_scope, np.float32)).shape
    bias = geom.bias is not None and (*owner, geom.bias) in shapes
    head = isinstance(geom, geometry.Contraction) and (
        owner in record.final or owner[-1:] in {(n,) for n in HEAD_NAMES}
    )
    return Site(
        path=owner, kind="weight", owner=record.modules.get(owner, ("Module",))[0], leaf=leaf, geometry=geom,
        inputs=matrix[-2], outputs=matrix[-1], dtype=dtype, stored=stored, stack=stacks.get(path, ()), via=via,
        head=head, bias=bias,
    )  # fmt: skip
