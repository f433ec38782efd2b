"""Softmax attentions in a program: a product of queries and keys, a softmax over its keys, a product with values.

Every array is followed from the first product on, as one of five: logits (elementwise functions of the product), their
exponentials, the sum of these, probabilities (the quotient, and linear functions of it), and values of whole rows (the
maximum, which a stable softmax takes off). Derivative rules hide nothing: the parts of such a call are followed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jpeft.core.dataflow.factors import Axes, Axis, Factor, joined, reshape
from jpeft.core.dataflow.program import Atom, Node, Program, Value, shape_of

# Functions of every element alone.
_UNARY = frozenset({
    "convert_element_type", "copy", "copy_p", "name", "neg", "tanh", "logistic", "sign", "abs", "sqrt", "rsqrt",
    "square", "integer_pow", "reduce_precision", "sharding_constraint", "optimization_barrier", "pvary", "erf",
    "log1p", "expm1",
})  # fmt: skip
_IDENTITY = frozenset({
    "convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint", "optimization_barrier",
    "pvary",
})  # fmt: skip
# What keeps a sum, which is positive.
_KEEPS_SUM = frozenset({"reshape", "squeeze", "transpose", "broadcast_in_dim", "stop_gradient", "abs"})
_BINARY = frozenset({"add", "add_any", "sub", "mul", "div", "max", "min", "pow", "select_n", "clamp"})


@dataclass(frozen=True, eq=False)
class Step:
    """An elementwise function of logits.

    Attributes:
      node: the equation.
      operand: which of its operands are the logits.
      axes: the axes of the logits at this place, as factors of the axes of the first product.
    """

    node: Node
    operand: int
    axes: Axes


@dataclass(frozen=True, eq=False)
class Logits:
    """An elementwise function of a product.

    Attributes:
      dot: the product.
      axes: the axes, as factors of the axes of the product, whose tags are the numbers of these.
      steps: the functions since the product, in order.
      shift: what a stable softmax has subtracted of every row.
    """

    dot: Node
    axes: Axes
    steps: tuple[Step, ...] = ()
    shift: Atom | None = None


@dataclass(frozen=True, eq=False)
class _Row:
    """A value that depends on the logits of a whole row by their maximum."""

    dot: Node


@dataclass(frozen=True, eq=False)
class _Exp:
    logits: Logits
    axes: Axes


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of the exponentials of logits.

    Attributes:
      logits: the logits that were exponentiated.
      node: the sum.
      axes: the axes of what is summed.
      inverse: whether a value is the inverse of the sum.
    """

    logits: Logits
    node: Node
    axes: Axes
    inverse: bool = False

    @property
    def summed(self) -> Axis:
        """The axes that the softmax runs over, as one."""
        return joined(f for i in self.node.params["axes"] for f in self.axes[int(i)])


@dataclass(frozen=True, eq=False)
class _LogSum:
    """The logarithm of a sum, with or without the shift of its logits."""

    sum: Sum


@dataclass(frozen=True, eq=False)
class _LogProbabilities:
    sum: Sum
    axes: Axes


@dataclass(frozen=True, eq=False)
class Probabilities:
    """A linear function of a softmax.

    Attributes:
      sum: the normalizer of the softmax.
      axes: the axes, as factors of the axes of the first product.
      steps: the linear functions since the softmax that are no mere rearrangements: multiplications with a scalar or an
        array, as of dropout and of factors of heads, and zeros in some places.
    """

    sum: Sum
    axes: Axes
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, eq=False)
class Match:
    """An attention.

    Attributes:
      dot: the product of queries and keys.
      product: the product of probabilities and values.
      probabilities: the probabilities in it.
      operand: which operand of `product` they are.
      key: which operand of `dot` the keys are.
      trail: the loops, branches and checkpoints that it lies in, outermost first, with the number of the body.
      calls: the marked calls that contain it, outermost first.
    """

    dot: Node
    product: Node
    probabilities: Probabilities
    operand: int
    key: int
    trail: tuple[tuple[Node, int], ...]
    calls: tuple[int, ...]

    @property
    def sum(self) -> Sum:
        return self.probabilities.sum


def matches(program: Program) -> list[Match]:
    """The attentions of a program and of the programs inside of it, in the order of their last products."""
    return list(_Finder().run(program, (), ()))


class _Finder:
    def __init__(self) -> None:
        self.facts: dict[Value, Any] = {}
        self.calls: dict[Node, tuple[int, ...]] = {}  # the calls that a product lies in

    def run(self, program: Program, trail: tuple[Any, ...], calls: tuple[int, ...]) -> Iterator[Match]:
        for node in program.nodes:
            if node.name == "call_mark":
                calls = _marked(node, calls)
                continue
            for i, body in enumerate(node.bodies):
                yield from self.run(body, (*trail, (node, i)), calls)
            if node.parts:
                made = [self.fact(part) for part in node.parts]
            else:
                made = [self.step(node)]
                if node.name == "dot_general":
                    self.calls[node] = calls
                    if (match := self.match(node, trail, calls)) is not None:
                        yield match
            self.facts.update({v: fact for v, fact in zip(node.outputs, made, strict=False) if fact is not None})

    def fact(self, atom: Atom) -> Any:
        return None if isinstance(atom, Literal) else self.facts.get(atom)

    def step(self, node: Node) -> Any:
        """What the (first) output of an equation is."""
        known = [(i, fact) for i, atom in enumerate(node.inputs) if (fact := self.fact(atom)) is not None]
        if node.name == "dot_general":
            scaled = [own for i, fact in known if (own := _scaled(node, i, fact)) is not None]
            own = Logits(node, tuple((Factor(i, n, 1),) for i, n in enumerate(node.outputs[0].shape)))
            return scaled[0] if len(scaled) == 1 else own
        if not known:
            return None
        for kinds, rule in _RULES:
            if any(isinstance(fact, kinds) for _, fact in known):
                return rule(node, known)
        return None

    def match(self, node: Node, trail: tuple[Any, ...], calls: tuple[int, ...]) -> Match | None:
        """The attention that a product ends."""
        found = [(i, f) for i, atom in enumerate(node.inputs) if isinstance(f := self.fact(atom), Probabilities)]
        if len(found) != 1:
            return None
        ((operand, probabilities),) = found
        contracted = node.params["dimension_numbers"][0][operand]
        summed = probabilities.sum.summed
        if _long(joined(f for i in contracted for f in probabilities.axes[i])) != _long(summed):
            return None
        dot = probabilities.sum.logits.dot
        key = _key_operand(dot, summed)
        if key is None:
            return None
        shared = [a for a, b in zip(self.calls[dot], calls, strict=False) if a == b]
        return Match(dot, node, probabilities, operand, key, trail, tuple(shared))


def _marked(node: Node, calls: tuple[int, ...]) -> tuple[int, ...]:
    call = node.params["call"]
    if node.params["kind"] == "begin":
        return (*calls, call)
    return calls[: calls.index(call)] if call in calls else calls


def _long(axis: Axis) -> Axis:
    """An axis without its factors of size one, unless it has no other."""
    return tuple(f for f in axis if f.size > 1) or ()


def _key_operand(dot: Node, summed: Axis) -> int | None:
    """The operand of a product whose free axes are those that are summed over; None if there is none."""
    dims = {f.tag for f in summed}
    shape = dot.outputs[0].shape
    if not dims or any(f.size != shape[f.tag] for f in summed):
        return None
    for operand in (0, 1):
        if dims <= set(free_outputs(dot, operand)):
            return operand
    return None


def free_axes(dot: Node, operand: int) -> list[int]:
    """The axes of an operand of a product that are neither contracted nor shared by both operands."""
    contracted, batch = dot.params["dimension_numbers"]
    dims = range(len(shape_of(dot.inputs[operand])))
    return [i for i in dims if i not in contracted[operand] and i not in batch[operand]]


def free_outputs(dot: Node, operand: int) -> list[int]:
    """The axes of a product's output that are the free axes of an operand."""
    start = len(dot.params["dimension_numbers"][1][0]) + (len(free_axes(dot, 0)) if operand == 1 else 0)
    return list(range(start, start + len(free_axes(dot, operand))))


# --- rules ------------------------------------------------------------------------------------------------------------

_Known = Sequence[tuple[int, Any]]


def moved(node: Node, axes: Axes) -> Axes | None:
    """The axes of the output of an equation that only rearranges its operand; None for another."""
    name, p = node.name, node.params
    if name == "transpose":
        return tuple(axes[i] for i in p["permutation"])
    if name == "reshape":
        return reshape(axes, p["new_sizes"]) if p.get("dimensions") is None else None
    if name == "squeeze":
        dropped = {d % len(axes) for d in p["dimensions"]}
        return tuple(axis for i, axis in enumerate(axes) if i not in dropped)
    if name == "broadcast_in_dim":
        own = shape_of(node.inputs[0])
        if any(p["shape"][dim] != n for dim, n in zip(p["broadcast_dimensions"], own, strict=True)):
            return None
        out: list[Axis] = [()] * len(p["shape"])
        for axis, dim in zip(axes, p["broadcast_dimensions"], strict=True):
            out[dim] = axis
        return tuple(out) if all(axis or n == 1 for axis, n in zip(out, p["shape"], strict=True)) else None
    return None


def _in_shape(node: Node, operand: int) -> bool:
    return shape_of(node.inputs[operand]) == node.outputs[0].shape


def _on_logits(node: Node, known: _Known) -> Any:
    logits = [(i, f) for i, f in known if isinstance(f, Logits)]
    others = [f for _, f in known if not isinstance(f, Logits)]
    # Of the sum of products (relative positions), that of the most batch axes is the product of queries and keys.
    operand, fact = max(logits, key=lambda pair: len(pair[1].dot.params["dimension_numbers"][1][0]))
    if any(f.dot is fact.dot for i, f in logits if i != operand):
        return None
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes) if len(known) == 1 else None
    if node.name == "reduce_max":
        return _Row(fact.dot)
    if not _in_shape(node, operand):
        return None
    if node.name == "exp" and fact.axes:
        return _Exp(fact, fact.axes)
    if others:
        (other,) = others if len(others) == 1 else (None,)
        if node.name != "sub" or operand != 0:
            return None
        if isinstance(other, _Row) and other.dot is fact.dot and fact.shift is None:
            return replace(fact, shift=node.inputs[1])
        if isinstance(other, _LogSum) and other.sum.logits.dot is fact.dot:
            return _LogProbabilities(other.sum, fact.axes)
        return None
    if fact.shift is not None and node.name not in (*_IDENTITY, "select_n"):
        return None
    if node.name in _UNARY or node.name in _BINARY:
        return replace(fact, steps=(*fact.steps, Step(node, operand, fact.axes)))
    return None


def _on_exp(node: Node, known: _Known) -> Any:
    ((operand, fact), *more) = sorted(known, key=lambda pair: not isinstance(pair[1], _Exp))
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    if node.name == "reduce_sum":
        return Sum(fact.logits, node, fact.axes)
    if not _in_shape(node, operand):
        return None
    others = [f for _, f in more]
    if len(others) == 1 and isinstance(others[0], Sum) and others[0].logits is fact.logits:
        is_quotient = node.name == "div" and operand == 0 and not others[0].inverse
        if is_quotient or (node.name == "mul" and others[0].inverse):
            return Probabilities(others[0], fact.axes)
        return None
    if others:
        return None
    return fact if node.name in _IDENTITY or _is_masked(node, operand) else None


def _is_masked(node: Node, operand: int) -> bool:
    """Whether an equation multiplies an operand with another, or sets places of it to zero."""
    if node.name == "mul":
        return True
    return node.name == "select_n" and all(_is_zero(a) for i, a in enumerate(node.inputs) if i not in (0, operand))


def _is_zero(atom: Atom) -> bool:
    if isinstance(atom, Literal):
        return not np.any(atom.val)
    node = atom.node
    return node is not None and node.name in (*_IDENTITY, "broadcast_in_dim", "reshape") and _is_zero(node.inputs[0])


def _on_sum(node: Node, known: _Known) -> Any:
    (operand, fact), *more = known
    if more:
        is_shifted = node.name == "add" and all(isinstance(f, (_Row, _LogSum)) for _, f in known)
        return next((f for _, f in known if isinstance(f, _LogSum)), None) if is_shifted else None
    name = node.name
    if isinstance(fact, Sum):
        if name == "log" and not fact.inverse:
            return _LogSum(fact)
        if (name == "div" and operand == 1) or (name == "integer_pow" and node.params["y"] == -1):
            is_one = name != "div" or _is_one(node.inputs[0])
            return replace(fact, inverse=True) if is_one and not fact.inverse else None
        if name in ("max", "add", "select_n") and not fact.inverse:  # a sum that is not zero
            return fact
    is_same = name in _IDENTITY or name in _KEEPS_SUM
    return fact if is_same else None


def _is_one(atom: Atom) -> bool:
    if isinstance(atom, Literal):
        return bool(np.all(np.asarray(atom.val) == 1))
    node = atom.node
    return node is not None and node.name in (*_IDENTITY, "broadcast_in_dim", "reshape") and _is_one(node.inputs[0])


def _on_log_probabilities(node: Node, known: _Known) -> Any:
    if len(known) > 1:
        return None
    ((_, fact),) = known
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    if node.name == "exp":
        return Probabilities(fact.sum, fact.axes)
    return fact if node.name in _IDENTITY else None


def _on_probabilities(node: Node, known: _Known) -> Any:
    if len(known) > 1:
        return None
    ((operand, fact),) = known
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    if node.name in _IDENTITY:
        return fact
    if not _in_shape(node, operand):
        return None
    if (node.name == "div" and operand == 0) or _is_masked(node, operand):
        return replace(fact, steps=(*fact.steps, Step(node, operand, fact.axes)))
    return None


def _scaled(node: Node, operand: int, fact: Any) -> Probabilities | None:
    """Probabilities times an array of some of their axes, as a product that contracts nothing."""
    contracted, batch = node.params["dimension_numbers"]
    if not isinstance(fact, Probabilities) or contracted[0] or free_axes(node, 1 - operand):
        return None
    order = [*batch[operand], *free_axes(node, operand)]
    axes = tuple(fact.axes[i] for i in order)
    return replace(fact, axes=axes, steps=(*fact.steps, Step(node, operand, fact.axes)))


def _on_row(node: Node, known: _Known) -> Any:
    return known[0][1] if all(isinstance(f, _Row) for _, f in known) else None


_RULES: Sequence[tuple[Any, Callable[[Node, _Known], Any]]] = (
    (Probabilities, _on_probabilities),
    (_LogProbabilities, _on_log_probabilities),
    (_Exp, _on_exp),
    (Logits, _on_logits),
    ((Sum, _LogSum), _on_sum),
    (_Row, _on_row),
)
