"""Rows of a batch that each run under an adapter of their own: `jax.vmap` of the model over them, and nothing else.

Which axis of an argument holds the rows is found by an abstract call with one row more: its first axis of that size, or
another one where the model does not take more of the first. Arguments without such an axis are given to all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpeft.checks import shown
from jpeft.core.frontend import is_bypassed
from jpeft.core.tree import abstract_array, is_array, split_arrays, split_variables, unflatten

IDS = "adapter_ids"
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
      ValueError: the bank is another Peft's; an adapter is not in it; the arguments have no rows, or not as many; an
        output is one for all rows, such as a loss.
    """
    own = dict(kwargs)
    if own.get(IDS) is None:
        raise TypeError("peft.apply(params, bank, *inputs, adapter_ids=[...]): say which adapter each row runs under")
    if peft != bank.source:
        raise ValueError(f"the bank is of another Peft than this one of {peft.method.name}: stack its own adapters")
    slots = _slots(bank, own.pop(IDS))
    if is_bypassed():
        return peft.frontend.run(peft, params, {}, inputs, own)
    rngs = own.pop("rngs", None)
    call = _Call.of(bank, params, inputs, own)
    found = _Axes.of(call, len(slots), rngs)
    groups = group(slots) if rngs is None else Grouping(slots, 1)
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


class _Call(NamedTuple):
    """A call of the model under one adapter, as a function of the arrays among its arguments.

    Attributes:
      arrays: these arrays.
      run: ``run(adapter, arrays, rngs) -> outputs``.
      shapes: the adapter's leaves, abstract.
      peft: its Peft.
      first: whether the first array is an input of the model, which must have the rows.
    """

    arrays: list[Any]
    run: Callable[[Any, Sequence[Any], Any], Any]
    shapes: Any
    peft: Any
    first: bool

    @classmethod
    def of(cls, bank: PerRow, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
        tree, others = params, {}
        if isinstance(params, Mapping):
            tree, others = split_variables(params)
        arrays, restore = split_arrays((inputs, dict(kwargs), others))

        def run(adapter: Any, arrays: Sequence[Any], rngs: Any) -> Any:
            inputs, own, others = restore(arrays)
            given = {**others, "params": tree} if others else tree
            return bank.peft.apply(given, adapter, *inputs, **own, **({} if rngs is None else {"rngs": rngs}))

        shapes = {p: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for p, (shape, dtype) in bank.peft.structure}
        return cls(arrays, run, unflatten(shapes), bank.peft, len(split_arrays(inputs)[0]) > 0)


class _Axes(NamedTuple):
    """Where the rows are.

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
          ValueError: no way to read the arguments fits.
        """
        shapes = [abstract_array(x) for x in call.arrays]
        before = _evaluated(call, shapes, rngs)
        if not any(rows in shape.shape for shape in shapes):
            raise ValueError(f"{IDS} has {rows} entries, and no argument has as many rows: {_listed(shapes)}")
        failure: Exception | None = None
        for axes in itertools.islice(_ways(shapes, rows), _MOST):
            if call.first and axes[0] is None:
                continue
            longer = [_longer(s, axis) for s, axis in zip(shapes, axes, strict=True)]
            try:
                after = _evaluated(call, longer, rngs)
            except Exception as error:  # of the model's own, which does not take such arguments
                failure = failure or error
                continue
            grown = _grown(before, after)
            if grown is not None and any(axis is not None for axis in grown):
                return cls(list(axes), grown)
        raise ValueError(
            f"{IDS} has {rows} entries, and the model does not take one row more along such axes of its arguments, "
            f"{_listed(shapes)}: each row must be independent of the others, and an output must have them"
            + (f" ({type(failure).__name__}: {shown(str(failure))})" if failure else "")
        ) from failure


def _evaluated(call: _Call, shapes: Sequence[Any], rngs: Any) -> tuple[list[Any], Any]:
    outputs = jax.eval_shape(lambda adapter, arrays: call.run(adapter, arrays, rngs), call.shapes, list(shapes))
    return jax.tree.flatten(outputs)


def _ways(shapes: Sequence[Any], rows: int) -> Iterator[tuple[Axis, ...]]:
    """The ways to read the arguments, likely ones first. Arrays of one shape are read alike."""
    kinds = list(dict.fromkeys(s.shape for s in shapes))
    choices = [[*(i for i, n in enumerate(shape) if n == rows), None] for shape in kinds]
    ways = sorted(itertools.product(*choices), key=lambda way: sum(_oddity(axis) for axis in way))
    for way in ways:
        axis = dict(zip(kinds, way, strict=True))
        yield tuple(axis[s.shape] for s in shapes)


def _oddity(axis: Axis) -> int:
    return 3 if axis is None else min(axis, 2)


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
    """The outputs of all rows, from adapters of groups of ``size`` rows."""
    given = [_to_front(x, axis, size) for x, axis in zip(call.arrays, axes.inputs, strict=True)]
    structure: list[Any] = []

    def one(adapter: Any, arrays: Sequence[Any], rngs: Any) -> list[Any]:
        back = [x if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip(arrays, axes.inputs, strict=True)]
        outputs, found = jax.tree.flatten(call.run(adapter, back, rngs))
        structure.append(found)
        return [y if axis is None else jnp.moveaxis(y, axis, 0) for y, axis in zip(outputs, axes.outputs, strict=True)]

    where = [None if axis is None else 0 for axis in axes.inputs]
    out_axes = [None if axis is None else 0 for axis in axes.outputs]
    try:
        outputs = jax.vmap(one, (call.peft.axes(adapters), where, None if rngs is None else 0), out_axes)(
            adapters, given, rngs
        )
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ValueError(
            "an output of the model is one for all rows, such as a mean over the batch or statistics of it, and rows "
            f"of different adapters have none in common; compute it from outputs that have rows ({error})"
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


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join(f"{s.dtype.name}{list(s.shape)}" for s in shapes[:6]) or "no arrays"
