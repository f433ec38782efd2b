"""The fact of an equation's output, from those of its operands: logits, exponentials, their sum or probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jpeft.core.dataflow.factors import Axes, Axis, joined, places_of, reshape
from jpeft.core.dataflow.program import IDENTITY, Atom, Node, shape_of
from jpeft.core.dataflow.softmax_facts import (
    Derived,
    Exp,
    Known,
    Logits,
    LogProbabilities,
    LogSum,
    Mixed,
    Numerator,
    Probabilities,
    Row,
    Step,
    Sum,
    dots_of,
    free_axes,
)

# Functions of every element alone.
_UNARY = frozenset({
    "convert_element_type", "copy", "copy_p", "name", "neg", "tanh", "logistic", "sign", "abs", "sqrt", "rsqrt",
    "square", "integer_pow", "reduce_precision", "sharding_constraint", "optimization_barrier", "pvary", "erf",
    "log1p", "expm1",
})  # fmt: skip
# What keeps a sum, which is positive.
_KEEPS_SUM = frozenset({"reshape", "squeeze", "transpose", "broadcast_in_dim", "stop_gradient", "abs"})
_BINARY = frozenset({"add", "add_any", "sub", "mul", "div", "max", "min", "pow", "select_n", "clamp"})
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_NEGLIGIBLE = 1e-5  # in a sum that is at least one: the constant that keeps it from being zero


def derived(node: Node, known: Known) -> Derived | None:
    """The fact of what is followed no further."""
    dots = frozenset[Node]().union(*(dots_of(fact) for _, fact in known))
    exp = node.name in ("exp", "exp2") or any(
        fact.exp if isinstance(fact, Derived) else not isinstance(fact, (Logits, Row, Mixed)) for _, fact in known
    )
    return Derived(dots, exp) if dots else None


def is_test(node: Node, known: Known) -> bool:
    """Whether an equation tells apart only what is no number, infinite, or a sum of nothing."""
    if node.name == "is_finite":
        return not all(isinstance(fact, Row) for _, fact in known)
    if node.name not in _COMPARISONS:
        return False
    if node.inputs[0] is node.inputs[1]:  # x != x
        return True
    is_sum = len(known) == 1 and isinstance(known[0][1], Sum)
    return any(_is_all(a, np.isinf) or (is_sum and _is_all(a, lambda x: x == 0)) for a in node.inputs)


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


def in_shape(node: Node, operand: int) -> bool:
    """Whether an operand of an equation has the shape of its output."""
    return shape_of(node.inputs[operand]) == node.outputs[0].shape


def _on_logits(node: Node, known: Known) -> Any:
    logits = [(i, f) for i, f in known if isinstance(f, Logits)]
    others = [f for _, f in known if not isinstance(f, Logits)]
    # Of the sum of products (relative positions), that of the most batch axes is the product of queries and keys.
    operand, fact = max(logits, key=lambda pair: _shared_axes(pair[1].dot))
    if node.name == "concatenate":
        return Mixed() if len(logits) > 1 else _longer(node, operand, fact)
    rest = [f.dot for i, f in logits if i != operand]
    if fact.dot in rest or any(_shared_axes(dot) == _shared_axes(fact.dot) > 0 for dot in rest):
        return None
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes) if len(known) == 1 else None
    if node.name == "reduce_max":
        return Row(fact.dot, joined(f for i in node.params["axes"] for f in fact.axes[int(i)]))
    if not in_shape(node, operand):
        return None
    if node.name == "exp" and fact.axes:
        return Exp(fact, fact.axes)
    if others:
        (other,) = others if len(others) == 1 else (None,)
        if node.name != "sub" or operand != 0:
            return None
        if isinstance(other, Row) and other.dot is fact.dot and fact.shift is None:
            return replace(fact, shift=node.inputs[1], over=other.over)
        if isinstance(other, LogSum) and _changed(other.sum.logits) == _changed(fact):
            return LogProbabilities(other.sum, fact.axes)
        return None
    if fact.shift is not None and node.name not in (*IDENTITY, "select_n"):
        return None
    if node.name in _UNARY or node.name in _BINARY:
        return replace(fact, steps=(*fact.steps, Step(node, operand, fact.axes)))
    return None


def _shared_axes(dot: Node) -> int:
    """The number of axes that both operands of a product share."""
    return len(dot.params["dimension_numbers"][1][0])


def _changed(logits: Logits) -> list[Any]:
    """The product of logits, and the functions of it that change its values."""
    return [logits.dot, *(step for step in logits.steps if step.node.name not in IDENTITY)]


def _on_exp(node: Node, known: Known) -> Any:
    ((operand, fact), *more) = sorted(known, key=lambda pair: not isinstance(pair[1], Exp))
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    if node.name == "reduce_sum":
        total = Sum(fact.logits, node, fact.axes)
        return total if fact.logits.shift is None or _covers(fact.logits.over, total.summed) else None
    if not in_shape(node, operand):
        return None
    others = [f for _, f in more]
    if len(others) == 1 and isinstance(others[0], Sum) and others[0].logits is fact.logits:
        is_quotient = node.name == "div" and operand == 0 and not others[0].inverse
        if is_quotient or (node.name == "mul" and others[0].inverse):
            return Probabilities(others[0], fact.axes)
        return None
    if others:
        return None
    return fact if node.name in IDENTITY or _is_masked(node, operand) else None


def _covers(axis: Axis, part: Axis) -> bool:
    """Whether all factors of an axis, or more of each, are among those of another."""
    return all(any(f.tag == own.tag and f.size >= own.size for f in axis) for own in part)


def _is_masked(node: Node, operand: int) -> bool:
    """Whether an equation multiplies an operand with another, or sets places of it to zero."""
    if node.name == "mul":
        return True
    others = [a for i, a in enumerate(node.inputs) if i not in (0, operand)]
    return node.name == "select_n" and all(_is_all(a, lambda x: x == 0) for a in others)


def _is_all(atom: Atom, test: Callable[[Any], Any]) -> bool:
    """Whether an array is one constant of which something holds."""
    if isinstance(atom, Literal):
        return bool(np.all(test(np.asarray(atom.val))))
    node = atom.node
    kept = (*IDENTITY, "broadcast_in_dim", "reshape")
    return node is not None and node.name in kept and _is_all(node.inputs[0], test)


def _on_sum(node: Node, known: Known) -> Any:
    (operand, fact), *more = known
    if more:
        is_shifted = node.name == "add" and all(isinstance(f, (Row, LogSum)) for _, f in known)
        return next((f for _, f in known if isinstance(f, LogSum)), None) if is_shifted else None
    name = node.name
    if isinstance(fact, Sum):
        if name == "log" and not fact.inverse:
            return LogSum(fact)
        if (name == "div" and operand == 1) or (name == "integer_pow" and node.params["y"] == -1):
            is_one = name != "div" or _is_all(node.inputs[0], lambda x: x == 1)
            return replace(fact, inverse=True) if is_one and not fact.inverse else None
        if name in ("max", "add", "select_n") and not fact.inverse:  # a sum that is not zero
            others = [a for i, a in enumerate(node.inputs) if i != operand and (name != "select_n" or i)]
            test = np.isfinite if name == "select_n" else lambda x: abs(x) <= _NEGLIGIBLE
            return fact if all(_is_all(a, test) for a in others) else None
    is_same = name in IDENTITY or name in _KEEPS_SUM
    return fact if is_same else None


def _on_log_probabilities(node: Node, known: Known) -> Any:
    if len(known) > 1:
        return None
    ((_, fact),) = known
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    if node.name == "exp":
        return Probabilities(fact.sum, fact.axes)
    return fact if node.name in IDENTITY else None


def _on_probabilities(node: Node, known: Known) -> Any:
    if len(known) > 1:
        return None
    ((operand, fact),) = known
    if fact.sum.logits.own is not None and (kept := _shortened(node, fact)) is not None:
        return kept
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    if node.name in IDENTITY:
        return fact
    if not in_shape(node, operand):
        return None
    if (node.name == "div" and operand == 0) or _is_masked(node, operand):
        return replace(fact, steps=(*fact.steps, Step(node, operand, fact.axes)))
    return None


def scaled(node: Node, operand: int, fact: Any) -> Probabilities | None:
    """Probabilities times an array of some of their axes, as a product that contracts nothing."""
    contracted, batch = node.params["dimension_numbers"]
    if not isinstance(fact, Probabilities) or contracted[0] or free_axes(node, 1 - operand):
        return None
    order = [*batch[operand], *free_axes(node, operand)]
    axes = tuple(fact.axes[i] for i in order)
    return replace(fact, axes=axes, steps=(*fact.steps, Step(node, operand, fact.axes)))


def _longer(node: Node, operand: int, fact: Logits) -> Any:
    """Logits with others beside them, as those of sinks."""
    axis = node.params["dimension"]
    if len(fact.axes[axis]) != 1 or fact.own is not None or fact.shift is not None:
        return None
    (factor,) = fact.axes[axis]
    if factor.size != fact.dot.outputs[0].shape[factor.tag]:
        return None
    start = sum(shape_of(atom)[axis] for atom in node.inputs[:operand])
    axes = (*fact.axes[:axis], (replace(factor, size=node.outputs[0].shape[axis]),), *fact.axes[axis + 1 :])
    return replace(fact, axes=axes, own=(factor.tag, start, factor.size))


def _shortened(node: Node, fact: Probabilities) -> Any:
    """Probabilities without those of logits that were added; None for an equation that keeps them.

    A use of the others is one of an attention over several products.
    """
    assert fact.sum.logits.own is not None
    tag, start, size = fact.sum.logits.own
    places = [i for i, axis in enumerate(fact.axes) if any(f.tag == tag for f in axis)]
    if node.name not in ("slice", "split") or len(places) != 1 or len(fact.axes[places[0]]) != 1:
        return None
    (place,) = places
    if fact.axes[place][0].size == size:
        return None

    def part(first: int, count: int) -> Any:
        if (first, count) != (start, size):
            return Mixed(3)
        axes = list(fact.axes)
        axes[place] = (replace(fact.axes[place][0], size=size),)
        return replace(fact, axes=tuple(axes))

    if node.name == "split":
        sizes = [int(n) for n in node.params["sizes"]]
        return [part(sum(sizes[:i]), n) for i, n in enumerate(sizes)] if node.params["axis"] == place else None
    starts, stops, strides = (node.params[f"{n}"] for n in ("start_indices", "limit_indices", "strides"))
    own = shape_of(node.inputs[0])
    whole = all((a, b) == (0, n) for i, (a, b, n) in enumerate(zip(starts, stops, own, strict=True)) if i != place)
    return part(starts[place], stops[place] - starts[place]) if whole and not strides else None


def _on_mixed(node: Node, known: Known) -> Any:
    """A softmax over the logits of several products, and parts of it."""
    stages = [fact.stage for _, fact in known if isinstance(fact, Mixed)]
    if node.name == "exp" and stages == [0]:
        return Mixed(1)
    if node.name == "reduce_sum" and stages == [1]:
        return Mixed(2)
    if node.name in ("div", "mul") and set(stages) == {1, 2}:
        return Mixed(3)
    if node.name in ("reduce_max", "dot_general") or len(set(stages)) > 1:
        return None
    return [Mixed(stages[0])] * len(node.outputs)


def _on_numerator(node: Node, known: Known) -> Any:
    if len(known) > 1:
        return None
    ((_, fact),) = known
    if (axes := moved(node, fact.axes)) is not None:
        return replace(fact, axes=axes)
    return fact if node.name in IDENTITY else None


def _on_row(node: Node, known: Known) -> Any:
    facts = [fact for _, fact in known]
    if not all(isinstance(fact, Row) for fact in facts):
        return None
    rest = [a for i, a in enumerate(node.inputs) if i not in dict(known)]
    rows = math.prod(facts[0].dot.outputs[0].shape) // places_of(facts[0].over)
    if not all(math.prod(shape_of(a)) <= rows or _is_all(a, lambda x: x == x) for a in rest):
        return None  # it may differ from key to key
    if node.name.startswith(("reduce", "cum", "arg", "sort", "gather", "dynamic", "concatenate", "scatter")):
        return None
    return min(facts, key=lambda fact: len(fact.over))


RULES: Sequence[tuple[Any, Callable[[Node, Known], Any]]] = (
    (Mixed, _on_mixed),
    (Numerator, _on_numerator),
    (Probabilities, _on_probabilities),
    (LogProbabilities, _on_log_probabilities),
    (Exp, _on_exp),
    (Logits, _on_logits),
    ((Sum, LogSum), _on_sum),
    (Row, _on_row),
)
