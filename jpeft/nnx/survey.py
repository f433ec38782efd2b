"""The candidate sites of an NNX model, found in one abstract call.

The call runs on a copy of the model whose modules watch themselves: they mark in the trace where each call begins and
ends. `jpeft.core.dataflow` then shows what becomes of every parameter, and which axes scans and vmaps take off it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jpeft.core.attention_sites import attention_sites
from jpeft.core.dataflow import marks
from jpeft.core.dataflow.axes import DATA, STATE, WEIGHT
from jpeft.core.dataflow.lookups import lost_ids
from jpeft.core.dataflow.walk import unused, walk
from jpeft.core.signatures import by_position, form_of, owner_of
from jpeft.core.sites import Survey
from jpeft.core.survey import LeafRecord, Record
from jpeft.core.tree import Path, flatten, split_arrays
from jpeft.nnx import attention, layers
from jpeft.nnx.adapted import methods_of, original, subclass
from jpeft.nnx.state import become, copied, is_opaque, modules, put, raw, to_state, to_tree, variables

WATCH = "jpeft_watch"
METHOD = "method"  # the name of the called method among the arguments of a form
TRIAL = "jpeft_trial_"  # prefix of the arrays that a property returns while it is tried whether the model reads those


@dataclass(frozen=True)
class _Watch:
    """Where a module lies, and the record that it writes: a static attribute, and so part of the key of every cache.

    Attributes:
      path: the module's path.
      record: the record of this abstract call; compared by identity.
    """

    path: Path
    record: Record


def survey(model: nnx.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], method: str) -> Survey:
    """The candidate sites of a model, found by an abstract call of its method.

    Raises:
      Exception: whatever the model raises for these inputs.
    """
    call = _AbstractCall(model, inputs, dict(kwargs), method)
    record, plain, origins = call.trace()
    record.flow = walk(plain, list(record.leaves), {number: c.path for number, c in record.calls.items()}, indexed=True)
    record.scopes = {path: _whole_stack(record, path, axes) for path, axes in record.flow.slices.items()}
    form = form_of(inputs, {**kwargs, METHOD: method})
    return record.survey(
        boxable=functools.partial(_boxable, call, plain),
        form=form,
        find_attentions=functools.partial(attention_sites, record, plain, origins),
        lost_ids=functools.partial(lost_ids, plain, origins, list(record.leaves)),
    )


def _whole_stack(record: Record, path: Path, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that were sliced off a module's parameters, with those of size one, which a trace does not show."""
    for leaf, seen in record.shapes.items():
        if leaf[:-1] == path:
            stored = list(record.leaves[leaf].shape)
            for axis in axes:
                stored.pop(axis)
            while len(stored) > len(seen) and 1 in stored:
                axes = (*axes, stored.index(1))
                stored.remove(1)
            break
    return axes


class _AbstractCall:
    """An abstract call of a copy of a model."""

    def __init__(self, model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], method: str):
        self.graphdef, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        self.args, self.kwargs, self.method = args, kwargs, method
        self.leaves = flatten(to_tree(self.params))

    def trace(self, hidden: Collection[Path] = ()) -> tuple[Record, Any, list[str]]:
        """The record of the call, its jaxpr, marked, and what the jaxpr's inputs are; the first are the parameters.

        Args:
          hidden: parameters that the modules read through properties. The jaxpr's last inputs are the arrays that lie
            in their place, which only a function of the state can reach.
        """
        record = Record({p: LeafRecord(np.shape(x), str(x.dtype)) for p, x in self.leaves.items()})
        arrays, restore = split_arrays((self.args, self.kwargs))
        paths = list(hidden)

        def run(values: list[Any], others: Any, arrays: list[Any], inner: list[Any]) -> list[Any]:
            args, kwargs = restore(arrays)
            given = dict(zip(self.leaves, values, strict=True))
            behind = dict(zip(paths, inner, strict=True))
            model = nnx.merge(self.graphdef, to_state(self.params, {**given, **behind}), copied(others))
            _watch_all(model, record, {path: given[path] for path in behind})
            out = getattr(model, self.method)(*args, **kwargs)
            moved = nnx.state(model, nnx.Not(nnx.Param))
            return [x for x in jax.tree.leaves((out, moved, args, kwargs)) if isinstance(x, jax.Array)]

        shapes = {p: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for p, x in self.leaves.items()}
        inputs = list(shapes.values()), self.rest, arrays, [shapes[p] for p in paths]
        kinds = zip((WEIGHT, STATE, DATA, WEIGHT), inputs, strict=True)
        origins = [kind for kind, part in kinds for _ in jax.tree.leaves(part)]
        return record, jax.make_jaxpr(run)(*inputs).jaxpr, origins


def _watch_all(model: nnx.Module, record: Record, read: Mapping[Path, Any]) -> None:
    """Makes the modules of a model watch themselves.

    Args:
      model: the model.
      record: what they write.
      read: for parameters that are read through a property, the values that it returns.
    """
    holders = {id(variable): x for path, x in read.items() for variable in _at(model, path)}
    for path, module in modules(model):
        if is_opaque(module):
            continue
        own = {name: holders[id(v)] for name, v in variables(module).items() if id(v) in holders}
        for name, value in own.items():
            put(module, TRIAL + name, nnx.Param(value))
        put(module, WATCH, nnx.static(_Watch(path, record)))
        cls = type(module)
        attributes = list(own)
        if attention.ATTENTION_FN in vars(module):
            attributes.append(attention.ATTENTION_FN)
        become(module, subclass(cls, _watched, tuple(methods_of(cls)), _read, tuple(attributes)))


def _at(model: nnx.Module, path: Path) -> list[nnx.Variable]:
    return [v for own, m in modules(model) if own == path[:-1] for n, v in variables(m).items() if n == path[-1]]


def _read(module: Any, name: str) -> Any:
    if name == attention.ATTENTION_FN:
        return attention.read_attention_fn(module)
    held = vars(module)
    return held[name].replace(raw(held[TRIAL + name])) if TRIAL + name in held else held[name]


def _watched(module: Any, run: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a method, and records the call."""
    watch: _Watch = vars(module)[WATCH]
    path, record, cls = watch.path, watch.record, original(type(module))
    plain = getattr(cls, method)
    owner = owner_of(plain)
    args, kwargs = by_position(plain, module, args, kwargs)
    own = {n: raw(v) for n, v in variables(module).items() if (*path, n) in record.leaves}
    if not own:
        _mark_scope(module, path, record)
    call = layers.make_call(module, method, args, kwargs, {n: np.shape(x) for n, x in own.items()})
    return record.watch(path, owner, call, run, own, layers.find(owner, method), attention.find(owner, method))


def _mark_scope(module: Any, path: Path, record: Record) -> None:
    """Marks a parameter below a module without parameters of its own, which shows how the module is stacked."""
    for _, below in nnx.iter_modules(module):
        watch = vars(below).get(WATCH)
        if watch is None:
            continue
        for name, variable in variables(below).items():
            if (leaf := (*watch.path, name)) in record.leaves:
                record.below[path] = leaf
                marks.mark(raw(variable), marks.SCOPE, -1, (path, leaf))
                return


def _boxable(call: _AbstractCall, plain: Any, paths: Collection[Path]) -> set[Path]:
    """Those of some parameters that the model reads as attributes of its modules only."""
    if not paths:
        return set()
    try:
        _, jaxpr, _ = call.trace(list(paths))
    except Exception:  # whatever a model raises that does not expect properties
        return set()
    return unused(jaxpr, plain, paths)
