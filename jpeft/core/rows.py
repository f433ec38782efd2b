"""Rows of a batch that each run under an adapter of their own: `jax.vmap` of the model over them, and nothing else.

Every row runs as a batch of one. Which arguments have rows is found by abstract calls with one row more: inputs have
them on their first axis or are given to all rows; keyword arguments and variables, such as caches, may have them on
another axis. Where more than one reading fits, the caller says which by ``row_axes``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.interpreters.partial_eval import dce_jaxpr

from jpeft.checks import is_int, shown
from jpeft.core.frontend import is_bypassed
from jpeft.core.tree import abstract_array, is_array, split_arrays, split_variables, unflatten

IDS, AXES = "adapter_ids", "row_axes"
_MOST = 256  # ways to read the arguments that are tried

Axis = int | None


class PerRow:
    """Several adapters, of which rows choose. See `jpeft.core.bank.Bank`.

    Attributes:
      peft: the Peft that runs one of them.
      source: the Peft that they belong to.
    """

    peft: Any
    source: Any

    def ids(self, names: Any) -> np.ndarray:
        """The slots of adapters by name."""
        raise TypeError(f"{type(self).__name__} does not define ids")

    def take(self, slots: Any, params: Any) -> Any:
        """The adapters in slots, as one tree for ``peft``."""
        raise TypeError(f"{type(self).__name__} does not define take")


class Grouping(NamedTuple):
    """Rows by their adapters.

    Attributes:
      slots: the slot of each group, ``[groups]``.
      size: the number of rows in each, which lie together.
    """

    slots: Any
    size: int


def group(slots: Any) -> Grouping:
    """Rows of one adapter that lie together, if all groups are of one size; otherwise each row by itself.

    >>> group(np.array([3, 3, 1, 1]))
    Grouping(slots=array([3, 1]), size=2)
    >>> group(np.array([3, 1, 3])).size
    1
    """
    if isinstance(slots, np.ndarray):
        starts = np.flatnonzero(np.diff(slots, prepend=slots[0] - 1))
        sizes = np.diff(starts, append=len(slots))
        if len(set(sizes.tolist())) == 1:
            return Grouping(slots[starts], int(sizes[0]))
    return Grouping(slots, 1)


def run(bank: PerRow, peft: Any, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The outputs of the model, each row under its own adapter. See `Peft.apply`.

    Raises:
      TypeError: there are no ``adapter_ids``, or no keys in ``rngs``.
      ValueError: the bank is another Peft's; an adapter is not in it; the arguments have no rows, or not as many, or
        may be read in several ways; an output is one for all rows, such as a loss.
    """
    own = dict(kwargs)
    if own.get(IDS) is None:
        raise TypeError("peft.apply(params, bank, *inputs, adapter_ids=[...]): say which adapter each row runs under")
    if peft != bank.source:
        raise ValueError(f"the bank is of another Peft than this one of {peft.method.name}: stack its own adapters")
    slots, stated = _slots(bank, own.pop(IDS)), own.pop(AXES, None)
    if is_bypassed():
        return peft.frontend.run(peft, params, {}, inputs, own)
    rngs = own.pop("rngs", None)
    call = _Call.of(bank, params, inputs, own, stated)
    found, groups = _Axes.of(call, len(slots), rngs), group(slots)
    return _mapped(call, found, bank.take(jnp.asarray(groups.slots), params), groups.size, _keys(rngs, len(slots)))


def _slots(bank: PerRow, ids: Any) -> Any:
    if isinstance(ids, Tracer):
        if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{IDS} must be a slot for each row, got {ids.dtype.name}{list(ids.shape)}")
        return ids
    slots = bank.ids(np.asarray(ids).tolist() if is_array(ids) else ids)
    if not len(slots):
        raise ValueError(f"{IDS} is empty")
    return slots


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of the model under one adapter, as a function of the arrays among its arguments.

    Attributes:
      arrays: these arrays.
      names: for each the argument that holds it: the number of an input, the name of a keyword or of a collection.
      stated: for each whether its axis is stated, and that axis.
      run: ``run(adapter, arrays, rngs) -> outputs``.
      shapes: the adapter's leaves, abstract.
      peft: its Peft.
    """

    arrays: list[Any]
    names: list[int | str]
    stated: list[tuple[bool, Axis]]
    run: Callable[[Any, Sequence[Any], Any], Any]
    shapes: Any
    peft: Any

    @classmethod
    def of(cls, bank: PerRow, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], stated: Any) -> _Call:
        tree, others = params, {}
        if isinstance(params, Mapping):
            tree, others = split_variables(params)
        # A collection may have the name of an argument, as "cache" may.
        collections = {n: f"{n} of the variables" if n in kwargs else n for n in others}
        given = {**{collections[n]: x for n, x in others.items()}, **kwargs, **dict(enumerate(inputs))}
        arrays, names, restores = [], [], {}
        for name, value in given.items():
            own, restores[name] = split_arrays(value)
            arrays += own
            names += [name] * len(own)

        def run(adapter: Any, arrays: Sequence[Any], rngs: Any) -> Any:
            back = {n: restores[n]([x for x, own in zip(arrays, names, strict=True) if own == n]) for n in restores}
            own = {n: back[n] for n in kwargs} | ({} if rngs is None else {"rngs": rngs})
            given = {**{n: back[key] for n, key in collections.items()}, "params": tree} if others else tree
            return bank.peft.apply(given, adapter, *(back[i] for i in range(len(inputs))), **own)

        shapes = {p: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for p, (shape, dtype) in bank.peft.structure}
        return cls(arrays, names, _stated(given, names, stated), run, unflatten(shapes), bank.peft)

    @property
    def first(self) -> int:
        """The index of the first array among the inputs; of all, if they are none."""
        return next((i for i, x in enumerate(self.arrays) if isinstance(self.names[i], int) and np.ndim(x)), 0)

    def choices(self, i: int, rows: int, anywhere: bool) -> list[Axis]:
        """The axes that may be that of the rows in an array; None for all rows alike."""
        known, axis = self.stated[i]
        sizes = np.shape(self.arrays[i])
        if known:
            return [axis]
        if sizes[:1] == (rows,) and (isinstance(self.names[i], int) or not anywhere):
            return [0, None]
        if isinstance(self.names[i], int):
            return [None]
        return [*(k for k, n in enumerate(sizes) if n == rows), None]


def _stated(given: Mapping[Any, Any], names: Sequence[Any], axes: Any) -> list[tuple[bool, Axis]]:
    """For each array whether ``row_axes`` states its axis, and that axis.

    Raises:
      TypeError: it is no mapping.
      ValueError: an argument that is not there, or an axis that none of its arrays has.
    """
    if axes is None:
        return [(False, None)] * len(names)
    if isinstance(axes, (tuple, list)):
        axes = dict(enumerate(axes))
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"{AXES} must be a tuple with the axis of rows of each input, or a mapping from the numbers of inputs and "
            f"names of arguments to axes; got {shown(axes)}"
        )
    for name, axis in axes.items():
        if name not in given:
            raise ValueError(f"{AXES} names {name!r}, and the call's arguments are {', '.join(map(repr, given))}")
        if axis is not None and (not is_int(axis) or any(np.ndim(x) <= axis for x in split_arrays(given[name])[0])):
            raise ValueError(
                f"{AXES}[{name!r}] must be an axis of that argument, from 0 on, or None; got {shown(axis)}"
            )
    return [(name in axes, axes.get(name)) for name in names]


class _Axes(NamedTuple):
    """The axes of rows in a call.

    Attributes:
      inputs: the axis of rows of each array among the arguments; None for one that all rows share.
      outputs: the same of the outputs.
    """

    inputs: list[Axis]
    outputs: list[Axis]

    @classmethod
    def of(cls, call: _Call, rows: int, rngs: Any) -> _Axes:
        """Finds them by abstract calls.

        Raises:
          ValueError: no way to read the arguments fits, or several do.
        """
        shapes = [abstract_array(x) for x in call.arrays]
        if not any(rows in shape.shape for shape in shapes):
            raise ValueError(f"{IDS} has {rows} entries, and no argument has as many rows: {_listed(call, shapes)}")
        before = _evaluated(call, shapes, rngs)
        used = _used(call, shapes, rngs)
        failures: list[Exception] = []
        for anywhere in (False, True):
            choices = [call.choices(i, rows, anywhere) if used[i] else [None] for i in range(len(shapes))]
            ways = itertools.islice(_ways(call, shapes, choices), _MOST)
            found = [way for axes in ways if (way := _tried(call, shapes, axes, before, rngs, failures))]
            # Outputs have rows on their first axis, too: so a mask of [length, length] is not taken for as many rows.
            # Other outputs, such as those stacked over layers, follow the first input.
            usual = [way for way in found if next(a for a in way.outputs if a is not None) == 0]
            found = usual or [way for way in found if way.inputs[call.first] is not None]
            if len(found) == 1 or (found and rows == 1):  # one row is the same however it is read
                return found[0]
            if found:
                raise ValueError(_ambiguous(call, shapes, found))
        why = f" ({type(failures[0]).__name__}: {shown(str(failures[0]))})" if failures else ""
        raise ValueError(
            f"{IDS} has {rows} entries, and the model does not take one row more on the first axis of its inputs, "
            f"{_listed(call, shapes)}: each row must be independent of the others, and an output must have them; say "
            f"where rows are by {AXES}={{0: 1}}, for axis 1 of the first input{why}"
        ) from (failures[0] if failures else None)


def _tried(
    call: _Call, shapes: Sequence[Any], axes: Sequence[Axis], before: Any, rngs: Any, failures: list[Exception]
) -> _Axes | None:
    """A way to read the arguments, if the model takes one row more of them and returns one more."""
    if all(axis is None for axis in axes):
        return None
    try:
        after = _evaluated(call, [_longer(s, axis) for s, axis in zip(shapes, axes, strict=True)], rngs)
    except Exception as error:  # of the model's own, which does not take such arguments
        failures.append(error)
        return None
    grown = _grown(before, after)
    return None if grown is None or all(axis is None for axis in grown) else _Axes(list(axes), grown)


def _used(call: _Call, shapes: Sequence[Any], rngs: Any) -> list[bool]:
    """Whether an output depends on each array: others may be read in any way."""

    def flat(*arrays: Any) -> Any:
        adapter = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), call.shapes)
        return jax.tree.leaves(call.run(adapter, list(arrays), rngs))

    traced = jax.make_jaxpr(flat)(*shapes)
    return dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[1]


def _ambiguous(call: _Call, shapes: Sequence[Any], found: Sequence[_Axes]) -> str:
    i = next(i for i in range(len(shapes)) if len({way.inputs[i] for way in found}) > 1)
    name, axes = call.names[i], dict.fromkeys(way.inputs[i] for way in found)
    what = f"input {name}" if isinstance(name, int) else f"the argument {name!r}"
    ways = " or ".join("one for all rows" if axis is None else f"with rows on axis {axis}" for axis in axes)
    return (
        f"{what}, {shapes[i].dtype.name}{list(shapes[i].shape)}, may be read as {ways}: the model takes both; say "
        f"which by {AXES}={{{name!r}: {next(iter(axes))}}}, or {next(reversed(axes))}"
    )


def _evaluated(call: _Call, shapes: Sequence[Any], rngs: Any) -> tuple[list[Any], Any]:
    outputs = jax.eval_shape(lambda adapter, arrays: call.run(adapter, arrays, rngs), call.shapes, list(shapes))
    return jax.tree.flatten(outputs)


def _ways(call: _Call, shapes: Sequence[Any], choices: Sequence[Sequence[Axis]]) -> Iterator[tuple[Axis, ...]]:
    """The ways to read the arguments. Arrays of one shape in one argument, such as those of a cache, are read alike."""
    kinds = [(call.names[i], shapes[i].shape, tuple(choices[i])) for i in range(len(shapes))]
    distinct = list(dict.fromkeys(kinds))
    for way in itertools.product(*(choice for _, _, choice in distinct)):
        axis = dict(zip(distinct, way, strict=True))
        yield tuple(axis[kind] for kind in kinds)


def _longer(shape: Any, axis: Axis) -> Any:
    if axis is None:
        return shape
    sizes = list(shape.shape)
    sizes[axis] += 1
    return jax.ShapeDtypeStruct(tuple(sizes), shape.dtype)


def _grown(before: tuple[list[Any], Any], after: tuple[list[Any], Any]) -> list[Axis] | None:
    """The axis by which each output is longer; None where the outputs are others."""
    (old, structure), (new, other) = before, after
    if structure != other or any(len(a.shape) != len(b.shape) for a, b in zip(old, new, strict=True)):
        return None
    found: list[Axis] = []
    for a, b in zip(old, new, strict=True):
        axes = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(axes) > 1 or any(b.shape[i] != a.shape[i] + 1 for i in axes):
            return None
        found.append(axes[0] if axes else None)
    return found


def _keys(rngs: Any, rows: int) -> Any:
    """The keys of each row: with one for all, they would all have the same dropout."""
    if rngs is None:
        return None
    keys = jax.tree.leaves(rngs)
    if (not isinstance(rngs, Mapping) and not is_array(rngs)) or not all(is_array(key) for key in keys):
        raise TypeError(f"with a bank, rngs must be a key, or keys by name, got {shown(rngs)}")
    return jax.tree.map(lambda key: jax.random.split(key, rows), rngs)


def _mapped(call: _Call, axes: _Axes, adapters: Any, size: int, rngs: Any) -> Any:
    """The outputs of all rows, each alone, from adapters of groups of ``size`` rows."""
    given = [_to_front(x, axis, size) for x, axis in zip(call.arrays, axes.inputs, strict=True)]
    keys = jax.tree.map(lambda x: _to_front(x, 0, size), rngs)
    structure: list[Any] = []

    def one(adapter: Any, arrays: Sequence[Any], rngs: Any) -> list[Any]:
        back = [x if axis is None else jnp.expand_dims(x, axis) for x, axis in zip(arrays, axes.inputs, strict=True)]
        outputs, found = jax.tree.flatten(call.run(adapter, back, rngs))
        structure.append(found)
        return [y if axis is None else jnp.squeeze(y, axis) for y, axis in zip(outputs, axes.outputs, strict=True)]

    where = [None if axis is None else 0 for axis in axes.inputs]
    out_axes, key_axis = [None if axis is None else 0 for axis in axes.outputs], None if rngs is None else 0
    of_one_adapter = jax.vmap(one, (None, where, key_axis), out_axes)
    try:
        outputs = jax.vmap(of_one_adapter, (call.peft.axes(adapters), where, key_axis), out_axes)(adapters, given, keys)
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            "an output of the model is one for all rows, such as a mean over the batch or statistics of it, and rows "
            "of different adapters have none in common; compute it from outputs that have rows"
        ) from error
    together = [_to_place(y, axis) for y, axis in zip(outputs, axes.outputs, strict=True)]
    return jax.tree.unflatten(structure[-1], together)


def _to_front(x: Any, axis: Axis, size: int) -> Any:
    """``[groups, size, ...]`` of an array with rows."""
    if axis is None:
        return x
    x = jnp.moveaxis(jnp.asarray(x), axis, 0)
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])


def _to_place(y: Any, axis: Axis) -> Any:
    """Inverse of `_to_front`."""
    return y if axis is None else jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, axis)


def _listed(call: _Call, shapes: Sequence[Any]) -> str:
    found = [f"{name}: {s.dtype.name}{list(s.shape)}" for name, s in zip(call.names, shapes, strict=True)]
    return ", ".join(found[:8]) + (", …" if len(found) > 8 else "") if found else "no arrays"
