"""A jaxpr as one flat list of equations: jitted functions stand in place of their calls, loops keep their bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jpeft.core.dataflow.jaxprs import INLINED, open_jaxpr

_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_CHECKPOINT = ("remat", "checkpoint")
LOOPS = ("scan", "while", "cond")
# Equations whose output has the values of their operand, up to rounding.
IDENTITY = frozenset({
    "convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint", "optimization_barrier",
    "pvary",
})  # fmt: skip


@dataclass(eq=False)
class Value:
    """An array of a program.

    Attributes:
      aval: its shape and dtype.
      node: the node that computes it; None for an input or a constant.
    """

    aval: Any
    node: Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape


Atom = Value | Literal


@dataclass(eq=False)
class Node:
    """An equation.

    Attributes:
      eqn: the equation.
      inputs: its operands.
      outputs: its outputs.
      within: the call with a derivative rule of its own that it is a part of. Such a call runs as it is; its parts tell
        what it computes.
      parts: for such a call, what its outputs are among its parts; else empty.
      bodies: the programs that a loop, a branch or a checkpoint runs.
    """

    eqn: Any
    inputs: list[Atom]
    outputs: list[Value]
    within: Node | None = None
    parts: list[Atom] = field(default_factory=list)
    bodies: tuple[Program, ...] = ()

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params


@dataclass(eq=False)
class Program:
    """A jaxpr as a flat list of nodes, in the order in which they run.

    Attributes:
      inputs: its inputs.
      consts: the values of its constants, where they are known.
      nodes: its nodes. The parts of a call come before the call.
      outputs: its outputs.
    """

    inputs: list[Value]
    consts: dict[Value, Any]
    nodes: list[Node]
    outputs: list[Atom]


def flatten(jaxpr: Any, consts: Sequence[Any] = ()) -> Program:
    """A jaxpr as a program.

    Args:
      jaxpr: the jaxpr.
      consts: the values of its constants.

    >>> import jax
    >>> closed = jax.make_jaxpr(jax.jit(lambda x: x + 1))(2.0)
    >>> [node.name for node in flatten(closed.jaxpr, closed.consts).nodes]
    ['add']
    """
    program = Program([Value(v.aval) for v in jaxpr.invars], {}, [], [])
    env: dict[Any, Atom] = dict(zip(jaxpr.invars, program.inputs, strict=True))
    env |= _constants(program, jaxpr, consts)
    _append(program, jaxpr, env, None)
    program.outputs = [_read(env, v) for v in jaxpr.outvars]
    return program


def _constants(program: Program, jaxpr: Any, consts: Sequence[Any]) -> dict[Any, Value]:
    values = {v: Value(v.aval) for v in jaxpr.constvars}
    program.consts.update({values[v]: c for v, c in zip(jaxpr.constvars, consts, strict=False)})
    return values


def _read(env: Mapping[Any, Atom], atom: Any) -> Atom:
    return atom if isinstance(atom, Literal) else env[atom]


def _append(program: Program, jaxpr: Any, env: dict[Any, Atom], within: Node | None) -> None:
    for eqn in jaxpr.eqns:
        inputs, name = [_read(env, v) for v in eqn.invars], eqn.primitive.name
        inner = _called(eqn) if name in INLINED or name.startswith(_CUSTOM) else None
        if inner is not None and name in INLINED:
            env.update(zip(eqn.outvars, _inline(program, inner, inputs, within), strict=True))
            continue
        node = Node(eqn, inputs, [], within)
        node.outputs = [Value(v.aval, node) for v in eqn.outvars]
        if inner is not None:
            node.parts = _inline(program, inner, inputs, within or node)
        else:
            node.bodies = tuple(flatten(*_opened(body)) for body in bodies_of(eqn))
        program.nodes.append(node)
        env.update(zip(eqn.outvars, node.outputs, strict=True))


def _inline(program: Program, closed: Any, inputs: list[Atom], within: Node | None) -> list[Atom]:
    jaxpr, consts = _opened(closed)
    env: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True)) | _constants(program, jaxpr, consts)
    _append(program, jaxpr, env, within)
    return [_read(env, v) for v in jaxpr.outvars]


def _called(eqn: Any) -> Any:
    """The jaxpr that a call runs on all of its operands, if it shows one."""
    for value in eqn.params.values():
        jaxpr = open_jaxpr(value)
        if jaxpr is not None and len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars):
            return value
    return None


def _opened(closed: Any) -> tuple[Any, Sequence[Any]]:
    return open_jaxpr(closed), getattr(closed, "consts", ())


def bodies_of(eqn: Any) -> tuple[Any, ...]:
    """The jaxprs of an equation that `jpeft.core.dataflow.evaluate` can run with changes.

    For a loop its body, for a branch all branches.
    """
    name = eqn.primitive.name
    if name == "scan":
        return (eqn.params["jaxpr"],)
    if name == "while":
        return (eqn.params["body_jaxpr"],)
    if name == "cond":
        return tuple(eqn.params["branches"])
    if name.startswith(_CHECKPOINT):
        return (eqn.params["jaxpr"],)
    return ()


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of an operand."""
    return np.shape(atom.val) if isinstance(atom, Literal) else atom.shape


def dtype_of(atom: Atom) -> Any:
    """The dtype of an operand."""
    return np.asarray(atom.val).dtype if isinstance(atom, Literal) else atom.aval.dtype
