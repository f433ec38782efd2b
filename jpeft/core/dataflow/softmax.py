"""Softmax attentions in a program: a product of queries and keys, a softmax over its keys, a product with values.

Every array is followed from the first product on, as one of five: logits (elementwise functions of the product), their
exponentials, the sum of these, probabilities (the quotient, and linear functions of it), and values of whole rows (the
maximum, which a stable softmax takes off). Derivative rules hide nothing: the parts of such a call are followed too.
The quotient may come after the product with values. Logits may be longer than the product, by those of sinks, whose
probabilities nothing uses. What is an attention but is followed no further is told, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jax.extend.core import Literal

from jpeft.core.dataflow.factors import Axes, Axis, joined
from jpeft.core.dataflow.program import Atom, Node, Program, Value
from jpeft.core.dataflow.softmax_facts import (
    Derived,
    Exp,
    Known,
    Logits,
    Lost,
    Match,
    Mixed,
    Numerator,
    Probabilities,
    Sum,
    axes_of,
    dots_of,
    free_outputs,
)
from jpeft.core.dataflow.softmax_rules import RULES, derived, in_shape, is_test, scaled


def matches(program: Program) -> list[Match]:
    """The attentions of a program and of the programs inside of it, in the order of their outputs."""
    return found(program)[0]


def found(program: Program) -> tuple[list[Match], list[Lost]]:
    """The attentions of a program, and those that are followed no further."""
    finder = _Finder()
    matched = list(finder.run(program, (), ()))
    unfinished = (lost for lost in finder.numerators.values() if lost is not None)
    return matched, [*finder.lost, *unfinished, *finder.changed]


_IN_BLOCKS = "its softmax is normalized after products with blocks of values: an online softmax"
_OF_SEVERAL = "its softmax runs over the logits of several products"
_CHANGED = (
    "its softmax is not one of its logits alone: they, their exponentials or the probabilities are changed by what "
    "depends on them or on other products, and what that is for other keys is not known"
)
_IN_KERNEL = "its softmax is hidden in the kernel {!r}, which gives no normalizer"
_IN_CUDNN = "its softmax is hidden in a kernel of cuDNN, whose normalizer has no gradient; use implementation='xla'"
_KERNELS = {"pallas_call", "tpu_custom_call", "ffi_call", "custom_call", "triton_kernel_call"}
_CUDNN = "dot_product_attention_fwd"  # jax.nn.dot_product_attention(..., implementation="cudnn")


class _Finder:
    def __init__(self) -> None:
        self.facts: dict[Value, Any] = {}
        self.calls: dict[Node, tuple[int, ...]] = {}  # the calls that a product lies in
        self.depths: dict[Node, int] = {}  # how many calls a loop lies in
        self.numerators: dict[Node, Lost | None] = {}  # those that no quotient has followed
        self.lost: list[Lost] = []
        self.changed: list[Lost] = []

    def run(self, program: Program, trail: tuple[Any, ...], calls: tuple[int, ...]) -> Iterator[Match]:
        for node in program.nodes:
            if node.name == "call_mark":
                calls = _marked(node, calls)
                continue
            if node.bodies:
                self.depths[node] = len(calls)
            for i, body in enumerate(node.bodies):
                yield from self.run(body, (*trail, (node, i)), calls)
            if kernel := _kernel(node):
                reason = _IN_CUDNN if kernel == _CUDNN else _IN_KERNEL.format(kernel)
                self.lost.append(Lost(reason, calls, kernel=kernel))
            if node.parts:
                made = [self.fact(part) for part in node.parts]
            else:
                if node.name == "dot_general":
                    self.calls[node] = calls
                made = self.step(node)
                made = made if isinstance(made, list) else [made]
                if (match := self.match(node, trail, calls)) is not None:
                    yield match
                    if node.name != "dot_general":  # no longer a part of the attention
                        made = [None]
            self.facts.update({v: fact for v, fact in zip(node.outputs, made, strict=False) if fact is not None})

    def fact(self, atom: Atom) -> Any:
        return None if isinstance(atom, Literal) else self.facts.get(atom)

    def step(self, node: Node) -> Any:
        """The fact of the (first) output of an equation."""
        known = [(i, fact) for i, atom in enumerate(node.inputs) if (fact := self.fact(atom)) is not None]
        if any(not isinstance(fact, Mixed) for _, fact in known):  # a bias may be of several products
            known = [(i, fact) for i, fact in known if not isinstance(fact, Mixed) or fact.stage]
        if node.name == "dot_general":
            return self.product(node, known)
        if not known or is_test(node, known):
            return None
        fact = self.followed(node, known)
        return derived(node, known) if fact is None else fact

    def followed(self, node: Node, known: Known) -> Any:
        """The fact of the output of an equation that is no product; None if it is followed no further."""
        own = [(i, fact) for i, fact in known if not isinstance(fact, Derived)]
        dots = frozenset[Node]().union(*(dots_of(fact) for _, fact in own))
        if any(dots & fact.dots for _, fact in known if isinstance(fact, Derived)):
            return None
        for kinds, rule in RULES:
            if any(isinstance(fact, kinds) for _, fact in own):
                return rule(node, own)
        return None

    def product(self, node: Node, known: Known) -> Any:
        """The fact of the output of a product."""
        linear = [own for i, fact in known if (own := scaled(node, i, fact)) is not None]
        if len(linear) == 1:
            return linear[0]
        for operand, fact in known:
            contracted = node.params["dimension_numbers"][0][operand]
            if isinstance(fact, Mixed) and fact.stage == 3 and contracted:
                self.lost.append(Lost(_OF_SEVERAL, self.calls[node]))
            if isinstance(fact, Derived) and fact.exp and contracted:
                self.changed += [Lost(_CHANGED, self._shared(dot, self.calls[node]), (dot, -1)) for dot in fact.dots]
            if _mixes_heads(fact, contracted):
                return Derived(dots_of(fact), isinstance(fact, Probabilities))
            if not isinstance(fact, Exp) or not contracted:
                continue
            if (key := _is_over(fact.axes, contracted, fact.logits)) is not None:
                self.numerators[node] = Lost(_IN_BLOCKS, self.calls[node], (fact.logits.dot, key))
                return Numerator(fact, node, operand, axes_of(node))
        return Logits(node, axes_of(node))

    def match(self, node: Node, trail: tuple[Any, ...], calls: tuple[int, ...]) -> Match | None:
        """The attention that an equation ends."""
        facts = [(i, self.fact(atom)) for i, atom in enumerate(node.inputs)]
        if node.name in ("div", "mul"):
            return self.divided(node, facts, trail, calls)
        own = [(i, fact) for i, fact in facts if isinstance(fact, Probabilities)]
        if node.name != "dot_general" or len(own) != 1:
            return None
        ((operand, probabilities),) = own
        return self.matched(node, node, axes_of(node), operand, probabilities, trail, calls)

    def divided(self, node: Node, facts: Any, trail: Any, calls: tuple[int, ...]) -> Match | None:
        """The attention that a quotient ends: of a product of exponentials and values, and their sum."""
        numerators = [(i, fact) for i, fact in facts if isinstance(fact, Numerator)]
        sums = [fact for _, fact in facts if isinstance(fact, Sum)]
        if len(numerators) != 1 or len(sums) != 1 or not in_shape(node, numerators[0][0]):
            return None
        ((place, fact),), (total,) = numerators, sums
        is_quotient = node.name == "div" and place == 0 and not total.inverse
        if total.logits is not fact.exp.logits or not (is_quotient or (node.name == "mul" and total.inverse)):
            return None
        probabilities = Probabilities(total, fact.exp.axes)
        match = self.matched(fact.product, node, fact.axes, fact.operand, probabilities, trail, calls)
        if match is not None:
            self.numerators[fact.product] = None
        return match

    def matched(
        self, product: Node, end: Node, axes: Axes, operand: int, probabilities: Probabilities, trail: Any, calls: Any
    ) -> Match | None:
        contracted, logits = product.params["dimension_numbers"][0][operand], probabilities.sum.logits
        key = _is_over(probabilities.axes, contracted, logits, probabilities.sum.summed)
        if key is None:
            return None
        shared = self._shared(logits.dot, calls)
        loops = tuple(loop for loop, _ in trail if self.depths[loop] >= len(shared))
        return Match(logits.dot, product, end, axes, probabilities, operand, key, trail, shared, loops)

    def _shared(self, dot: Node, calls: Sequence[int]) -> tuple[int, ...]:
        """The calls that a product lies in too."""
        return tuple(a for a, b in zip(self.calls[dot], calls, strict=False) if a == b)


def _mixes_heads(fact: Any, contracted: Sequence[int]) -> bool:
    """Whether a product of logits or probabilities contracts axes that both operands of theirs share, and no other."""
    if not isinstance(fact, (Logits, Probabilities)) or not contracted:
        return False
    (dot,) = dots_of(fact)
    shared = len(dot.params["dimension_numbers"][1][0])
    tags = {f.tag for i in contracted for f in fact.axes[i]}
    return bool(tags) and all(tag < shared for tag in tags)


def _kernel(node: Node) -> str:
    """The name of a kernel that an equation runs; "" for another equation."""
    if node.name.startswith(_CUDNN):
        return _CUDNN
    if node.name not in _KERNELS:
        return ""
    names = [node.params.get(name) for name in ("name", "name_and_src_info", "call_target_name")]
    debug = getattr(node.params.get("jaxpr"), "debug_info", None)  # "kernel at file:line"
    names.append(str(getattr(debug, "func_src_info", "") or "").partition(" ")[0])
    return next((str(getattr(name, "name", name)) for name in names if name), node.name)


def _marked(node: Node, calls: tuple[int, ...]) -> tuple[int, ...]:
    call = node.params["call"]
    if node.params["kind"] == "begin":
        return (*calls, call)
    return calls[: calls.index(call)] if call in calls else calls


def _is_over(axes: Axes, contracted: Sequence[int], logits: Logits, summed: Axis | None = None) -> int | None:
    """The operand of the product of queries and keys that is the keys, if an array is contracted over them alone.

    Args:
      axes: the axes of the array, as factors of those of the product.
      contracted: those that are contracted.
      logits: the logits that the array was computed from.
      summed: the axes that their softmax runs over, if that is known.
    """
    own = joined(f for i in contracted for f in axes[i])
    if summed is not None and logits.own is not None:
        summed = tuple(replace(f, size=logits.own[2]) for f in summed)
    if summed is not None and _long(own) != _long(summed):
        return None
    return _key_operand(logits.dot, own if summed is None else summed)


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
