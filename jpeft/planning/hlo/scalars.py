"""Integers that a program computes, and the trip counts of loops that follow from them."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jpeft.planning.hlo.parse import Computation, Instruction, Module

Value = Callable[[int | None], int]  # of a tuple: from an element's index to its value; None asks for a scalar


class UnknownValue(Exception):
    """The text alone does not determine a value."""


class Frame(NamedTuple):
    """A computation with the values of its parameters."""

    computation: Computation
    parameters: Sequence[Value]


def unknown(_: int | None) -> int:
    """The value of a parameter that is only known at run time."""
    raise UnknownValue


def opaque(computation: Computation) -> Frame:
    """A computation whose parameters are unknown."""
    return Frame(computation, [unknown] * len(computation.parameters))


def _select(condition: int, on_true: int, on_false: int) -> int:
    return on_true if condition else on_false


def _clamp(low: int, x: int, high: int) -> int:
    return min(max(low, x), high)


_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "negate": operator.neg,
    "not": operator.not_,
    "select": _select,
    "clamp": _clamp,
}
_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_IDENTITIES = {
    "copy", "bitcast", "convert", "copy-done", "reshape", "broadcast", "optimization-barrier", "bitcast-convert"
}  # fmt: skip


def evaluate(module: Module, frame: Frame, name: str, index: int | None) -> int:
    """The integer that an instruction computes, or an element of its tuple.

    Raises:
      UnknownValue: it depends on what is only known at run time.
    """
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    value = functools.partial(evaluate, module, frame)
    if opcode == "parameter":
        return frame.parameters[int(instruction.argument)](index)
    if opcode == "constant":
        return _constant(instruction.argument)
    if opcode == "tuple" and index is not None:
        return value(operands[index], None)
    if opcode == "get-tuple-element" and index is None:
        return value(operands[0], instruction.index)
    if opcode == "copy-start" and index in (0, 1):
        return value(operands[0], None)
    if opcode == "copy-done":
        return value(operands[0], 0)
    if opcode in _IDENTITIES:
        return value(operands[0], index)
    if opcode in ("fusion", "call"):
        callee = module.computations[instruction.attribute("calls") or instruction.attribute("to_apply")]
        arguments = [functools.partial(value, operand) for operand in operands]
        return evaluate(module, Frame(callee, arguments), callee.root.name, index)
    if opcode == "while" and index is not None:
        body = module.computations[instruction.attribute("body")]
        return loop_invariant(body, functools.partial(value, operands[0]), index)
    if opcode == "compare":
        comparison = _COMPARISONS[instruction.attribute("direction")]
        return comparison(*(value(operand, None) for operand in operands))
    if opcode in _ARITHMETIC:
        return _ARITHMETIC[opcode](*(value(operand, None) for operand in operands))
    raise UnknownValue


def _constant(text: str) -> int:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if text in ("true", "false"):
        return text == "true"
    raise UnknownValue


def loop_invariant(body: Computation, init: Value, index: int | None) -> int:
    """An element of a loop's state that the body passes on unchanged.

    Raises:
      UnknownValue: the body changes it.
    """
    root = body.root
    if index is not None and root.opcode == "tuple":
        passed = body.instructions[root.operands[index]]
        own = passed.opcode == "get-tuple-element" and passed.operands[0] == body.parameters[0].name
        if own and passed.index == index:
            return init(index)
    raise UnknownValue


def trip_count(module: Module, loop: Instruction, init: Value) -> int:
    """The trip count of a loop: from XLA's annotation, or derived from its condition.

    Raises:
      UnknownValue: the condition reads more than counters that change by a constant amount.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    body = module.computations[loop.attribute("body")]
    condition = module.computations[loop.attribute("condition")]

    def after(state: Value, index: int | None) -> int:
        """An element of the state after one run of the body."""
        return evaluate(module, Frame(body, [state]), body.root.name, index)

    @functools.cache
    def start_and_step(index: int | None) -> tuple[int, int]:
        start = init(index)
        first = after(lambda i: start if i == index else init(i), index)
        second = after(lambda i: first if i == index else init(i), index)
        if second - first != first - start:
            raise UnknownValue
        return start, first - start

    def holds(n: int) -> bool:
        """The condition after n runs of the body."""

        def state(index: int | None) -> int:
            start, step = start_and_step(index)
            return start + n * step

        return bool(evaluate(module, Frame(condition, [state]), condition.root.name, None))

    return _first_failure(holds)


def _first_failure(holds: Callable[[int], bool]) -> int:
    """The smallest n for which a condition fails; beyond 4096, by bisection."""
    for n in range(4096):
        if not holds(n):
            return n
    low, high = 4095, 8192
    while holds(high):
        low, high = high, 2 * high
        if high > 2**40:
            raise UnknownValue
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high
