"""Lookups of token ids in the trace of a model's call: whether ids beyond a table reach it, and no other table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jpeft.core.dataflow.axes import DATA, WEIGHT
from jpeft.core.dataflow.jaxprs import bind
from jpeft.core.dataflow.program import IDENTITY, Atom, Node, Program, Value, dtype_of, flatten, shape_of
from jpeft.core.tree import Path, join


def lost_ids(jaxpr: Any, origins: Sequence[str], parameters: Sequence[Path], table: Path, rows: int) -> str:
    """Why ids beyond the rows of a table do not reach its lookup; empty if they do, or if the trace does not show it.

    The integers that the model's call computes from its ids are computed for such ids, which are all different.

    Args:
      jaxpr: the trace of the model's call.
      origins: what each of its inputs is, see `jpeft.core.dataflow.attention.find`.
      parameters: the paths of the parameters, its first inputs.
      table: the path of the table.
      rows: the number of its rows.
    """
    program = flatten(jaxpr)
    places: dict[Atom, Path] = dict(zip(program.inputs, parameters, strict=False))
    gathers = [(places.get(_unchanged(node.inputs[0])), node.inputs[1]) for node in program.nodes if _is_lookup(node)]
    lookups = [(path, index) for path, index in gathers if path is not None]
    ids = [v for v, origin in zip(program.inputs, origins, strict=False) if origin == DATA and _is_integer(v)]
    seen: set[Value] = set()
    for path, index in lookups:
        if path != table or not (reached := [one for one in ids if one in _sources(index)]):
            continue
        found = [one for one in reached if _kept(program, origins, index, one, rows)]
        if not found:
            return "the model changes its token ids before it looks them up, and ids beyond the table are lost"
        seen |= set(found)
    for path, index in lookups:
        if path != table and any(_kept(program, origins, index, one, rows, some=True) for one in seen):
            return f"the token ids look up rows of {join(path)!r} too, which has none for virtual tokens"
    return ""


def _unchanged(atom: Atom) -> Atom:
    while not isinstance(atom, Literal) and atom.node is not None and atom.node.name in IDENTITY:
        atom = atom.node.inputs[0]
    return atom


def _is_lookup(node: Node) -> bool:
    return node.name == "gather" and not isinstance(_unchanged(node.inputs[0]), Literal)


def _is_integer(value: Value) -> bool:
    return bool(value.shape) and jnp.issubdtype(value.aval.dtype, jnp.integer)


def _sources(atom: Atom) -> set[Value]:
    """The inputs of the program that an array is computed from."""
    found, left, seen = set[Value](), [atom], set[int]()
    while left:
        one = left.pop()
        if isinstance(one, Literal) or id(one) in seen:
            continue
        seen.add(id(one))
        if one.node is None:
            found.add(one)
        else:
            left += one.node.inputs
    return found


def _kept(program: Program, origins: Sequence[str], index: Atom, ids: Value, rows: int, some: bool = False) -> bool:
    """Whether an array holds all (or some) of the ids beyond the rows of a table, if the call is given those.

    Other arrays of the call are ones, as masks are. One that depends on parameters is taken to hold all, and not some.
    """
    probe = rows + np.arange(np.prod(ids.shape), dtype=np.int32).reshape(ids.shape)
    if probe.size and probe.max() > jnp.iinfo(ids.aval.dtype).max:
        return not some
    known = {v for v, origin in zip(program.inputs, origins, strict=False) if origin != WEIGHT}
    if not _sources(index) <= known | program.consts.keys():
        return not some
    with jax.ensure_compile_time_eval():
        values = _computed(index, program.consts | {ids: jnp.asarray(probe, ids.aval.dtype)})
    # A model that shifts its ids to the right drops the last.
    held = np.isin(probe[..., : max(1, probe.shape[-1] - 1)], np.asarray(values))
    return bool(held.any() if some else held.all())


def _computed(atom: Atom, known: dict[Value, Any]) -> Any:
    """The value of an array, in which inputs that are not known are ones."""
    if isinstance(atom, Literal):
        return atom.val
    if atom not in known:
        if atom.node is None:
            known[atom] = jnp.ones(shape_of(atom), dtype_of(atom))
        else:
            node: Node = atom.node
            values = bind(node.eqn, [_computed(one, known) for one in node.inputs])
            known.update(zip(node.outputs, values, strict=True))
    return known[atom]
