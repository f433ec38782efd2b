"""Equations of a jaxpr as steps from one view to another, and as products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jpeft.core.dataflow.views import CONVOLUTION, DOT, LOOKUP, OTHER, Axis, Product, View

_SAME = frozenset({"copy", "copy_p", "sharding_constraint", "pvary"})


def step(eqn: Any, view: View) -> tuple[View | None, ...]:
    """The outputs of an equation as views, given the view that its first operand is; None for one that is no view.

    A cast is a view if it keeps at least 16 bits: a narrower one is another function of the array.
    """
    name, p = eqn.primitive.name, eqn.params
    if name in _SAME:
        return (view,)
    if name == "convert_element_type":
        dtype = p["new_dtype"]
        return (view if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2 else None,)
    if name == "transpose":
        return (view.transpose(p["permutation"]),)
    if name == "reshape":
        return (view.reshape(p["new_sizes"]) if p.get("dimensions") is None else None,)
    if name == "squeeze":
        return (view.squeeze(d % len(view.axes) for d in p["dimensions"]),)
    if name == "broadcast_in_dim":
        return (view.expand(p["shape"], p["broadcast_dimensions"]),)
    if name == "slice":
        is_dense = p["strides"] is None or set(p["strides"]) == {1}
        return (view.slice(p["start_indices"], p["limit_indices"]) if is_dense else None,)
    if name == "split":
        return _split(view, p["sizes"], p["axis"])
    if name == "unstack":
        axis, count = p["axis"] % len(view.axes), len(eqn.outvars)
        return tuple(None if v is None else v.squeeze([axis]) for v in _split(view, [1] * count, axis))
    if name == "rev":
        return (View(view.axes, view.fixed, True),)
    return (None,) * len(eqn.outvars)


def taken(eqn: Any, view: View) -> tuple[View, tuple[int, ...]] | None:
    """The output of an equation that takes one or more places of one axis of a stored array, and all of the others.

    The places are not told apart: the axis becomes one of so many places, of one atom even if that is a single place.

    Returns:
      The view and, if the axis is gone, the axis of the stored array that it was; None for any other equation.
    """
    name, p, shape = eqn.primitive.name, eqn.params, view.shape
    if name == "slice" and (p["strides"] is None or set(p["strides"]) == {1}):
        sizes = [stop - start for start, stop in zip(p["start_indices"], p["limit_indices"], strict=True)]
    elif name in ("dynamic_slice", "gather"):
        sizes = list(p["slice_sizes"])
    else:
        return None
    changed = [i for i, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
    if len(changed) != 1 or len(atoms := view.axes[changed[0]]) != 1:
        return None
    (place,), atom = changed, atoms[0]
    axes = list(view.axes)
    if name != "gather":
        axes[place] = (replace(atom, size=sizes[place]),)
        return replace(view, axes=tuple(axes)), ()
    numbers, out = p["dimension_numbers"], eqn.outvars[0].aval.shape
    if not tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (place,) or sizes[place] != 1:
        return None
    axes.pop(place)
    batch = [i for i in range(len(out)) if i not in numbers.offset_dims]
    if len(batch) > 1:
        return None
    for i in batch:
        axes.insert(i, (replace(atom, size=out[i]),))
    return replace(view, axes=tuple(axes)), () if batch else (atom.axis,)


def _split(view: View, sizes: Sequence[int], axis: int) -> tuple[View | None, ...]:
    out, start = [], 0
    for size in sizes:
        starts, stops = [0] * len(view.axes), list(view.shape)
        starts[axis], stops[axis] = start, start + int(size)
        out.append(view.slice(starts, stops))
        start += int(size)
    return tuple(out)


def product(eqn: Any, operand: int, weight: View) -> Product:
    """The use that an equation makes of a weight, which is its operand of that index."""
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        contracted, batch = p["dimension_numbers"]
        pairs = [tuple(zip(own[operand], own[1 - operand], strict=True)) for own in (contracted, batch)]
        return Product(DOT, weight, operand, *pairs)
    if name == "conv_general_dilated" and operand == 1:
        return Product(CONVOLUTION, weight, operand)
    if name == "gather" and operand == 0 and _takes_rows(eqn, weight):
        return Product(LOOKUP, weight, operand)
    return Product(OTHER, weight, operand)


def _takes_rows(eqn: Any, weight: View) -> bool:
    """Whether a gather picks one place of the weight's first axis, and all of the others, which come last."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows = [i for i, axis in enumerate(weight.axes) if any(a.source == "w" and a.axis == 0 for a in axis)]
    if rows and not tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == tuple(rows):
        return False
    last = eqn.outvars[0].aval.ndim - len(numbers.offset_dims)
    if any(place < last for place in numbers.offset_dims):
        return False
    return all(
        size == 1 if i in rows else size in (1, _size(axis))
        for i, (axis, size) in enumerate(zip(weight.axes, sizes, strict=True))
    )


def _size(axis: Axis) -> int:
    return View((axis,)).shape[0]
