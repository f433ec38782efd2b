"""The facts of the arrays between the two products of an attention, as `jpeft.core.dataflow.softmax` follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jpeft.core.dataflow.factors import Axes, Axis, Factor, joined
from jpeft.core.dataflow.program import Atom, Node, shape_of

# The operands of an equation of which it is known what they are.
Known = Sequence[tuple[int, Any]]


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
      over: the axes of the logits along which the shift is the same.
      own: where other logits were added to a row, the axis, and the first place and the number of its own.
    """

    dot: Node
    axes: Axes
    steps: tuple[Step, ...] = ()
    shift: Atom | None = None
    over: Axis = ()
    own: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """A value that depends on logits by their maximum alone.

    Attributes:
      dot: the product that the logits are of.
      over: the axes of the logits that the maximum is over.
    """

    dot: Node
    over: Axis


@dataclass(frozen=True, eq=False)
class Derived:
    """A value that depends on products in a way that is followed no further.

    Attributes:
      dots: the products.
      exp: whether it depends on them by an exponential.
    """

    dots: frozenset[Node]
    exp: bool = False


@dataclass(frozen=True, eq=False)
class Exp:
    """The exponentials of logits."""

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
class LogSum:
    """The logarithm of a sum, with or without the shift of its logits."""

    sum: Sum


@dataclass(frozen=True, eq=False)
class LogProbabilities:
    """The logarithm of a softmax."""

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
class Numerator:
    """A product of exponentials and values, which the sum has not divided yet.

    Attributes:
      exp: the exponentials.
      product: the product.
      operand: which operand of it they are.
      axes: the axes, as factors of those of the product.
    """

    exp: Exp
    product: Node
    operand: int
    axes: Axes


@dataclass(frozen=True, eq=False)
class Mixed:
    """A part of a softmax over the logits of several products.

    Attributes:
      stage: which part: 0 for logits, 1 for exponentials, 2 for their sum, 3 for probabilities.
    """

    stage: int = 0


@dataclass(frozen=True, eq=False)
class Lost:
    """An attention that is followed no further.

    Attributes:
      reason: why.
      calls: the marked calls that contain it, outermost first.
      dot: its product of queries and keys, with the operand that is the keys, if it is one only where that is data; -1
        if it is one only where both operands are.
      kernel: the name of a kernel that may be one.
    """

    reason: str
    calls: tuple[int, ...]
    dot: tuple[Node, int] | None = None
    kernel: str = ""


@dataclass(frozen=True, eq=False)
class Match:
    """An attention.

    Attributes:
      dot: the product of queries and keys.
      product: the product of probabilities and values.
      end: the equation whose output is the attention's: `product` or, if that comes later, the quotient.
      axes: the axes of that output, as factors of those of `product`.
      probabilities: the probabilities in it.
      operand: which operand of `product` they are.
      key: which operand of `dot` the keys are.
      trail: the loops, branches and checkpoints that it lies in, outermost first, with the number of the body.
      calls: the marked calls that contain it, outermost first.
      loops: the loops, branches and checkpoints between the innermost call and it.
    """

    dot: Node
    product: Node
    end: Node
    axes: Axes
    probabilities: Probabilities
    operand: int
    key: int
    trail: tuple[tuple[Node, int], ...]
    calls: tuple[int, ...]
    loops: tuple[Node, ...] = ()

    @property
    def sum(self) -> Sum:
        return self.probabilities.sum


def dots_of(fact: Any) -> frozenset[Node]:
    """The products that a value depends on."""
    if isinstance(fact, Derived):
        return fact.dots
    if isinstance(fact, (Logits, Row)):
        return frozenset({fact.dot})
    if isinstance(fact, Mixed):
        return frozenset()
    if isinstance(fact, (Exp, Sum)):
        return frozenset({fact.logits.dot})
    return dots_of(fact.exp if isinstance(fact, Numerator) else fact.sum)


def axes_of(dot: Node) -> Axes:
    """The axes of a product's output, as factors of themselves."""
    return tuple((Factor(i, n, 1),) for i, n in enumerate(dot.outputs[0].shape))


def free_axes(dot: Node, operand: int) -> list[int]:
    """The axes of an operand of a product that are neither contracted nor shared by both operands."""
    contracted, batch = dot.params["dimension_numbers"]
    dims = range(len(shape_of(dot.inputs[operand])))
    return [i for i in dims if i not in contracted[operand] and i not in batch[operand]]


def free_outputs(dot: Node, operand: int) -> list[int]:
    """The axes of a product's output that are the free axes of an operand."""
    start = len(dot.params["dimension_numbers"][1][0]) + (len(free_axes(dot, 0)) if operand == 1 else 0)
    return list(range(start, start + len(free_axes(dot, operand))))
