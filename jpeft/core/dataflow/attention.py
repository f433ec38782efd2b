"""Attentions in a traced call that nobody registered: where they are, and their outputs changed.

An attention is a product of queries and keys, a softmax over the keys, and a product with values. `find` finds those
of a whole model in its trace, with what their axes are; `evaluate` runs the trace of one module's call with changed
attentions:

    found = find(jaxpr, origins)                                # bind time, in the marked trace of the model
    outputs = evaluate(jaxpr, consts, layouts, change)          # run time, in the trace of a module's call

`change(n, attention)` returns the output of the ``n``-th attention, ``[batch..., queries, heads, value_dim]``, in place
of ``attention.out``. See `TracedAttention` for what it may ask for. To attend to learned keys and values too:

    change = lambda n, attention: attention.prefixed(keys, values)

In a trace, `jpeft.core.dataflow.marks.begin_call` and `end_call` bracket the calls of modules. `find` gives the
attentions to the innermost call around them; `evaluate` leaves those in marked calls alone, as each is another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

from jpeft.core.dataflow.axes import WEIGHT, Origins, scan_counts
from jpeft.core.dataflow.jaxprs import bind
from jpeft.core.dataflow.layout import (
    Arrangement,
    Layout,
    NoAttention,
    Unclear,
    keys_are_parameters,
    layout_of,
)
from jpeft.core.dataflow.program import Atom, Node, Program, Value, flatten
from jpeft.core.dataflow.projections import NotFound, Parameters, Projection, find_projection
from jpeft.core.dataflow.softmax import found, matches
from jpeft.core.dataflow.softmax_facts import Match
from jpeft.core.dataflow.traced_attention import TracedAttention
from jpeft.core.tree import Path

# (number of the attention in the call, the attention) -> its output
Change = Callable[[int, TracedAttention], Any]


@dataclass(frozen=True)
class Attention:
    """An attention in the trace of a model.

    Attributes:
      call: the number of the innermost marked call around it; None if there is none.
      place: its number among the attentions of that call.
      layout: what its axes are; None if the trace does not show that, or if it is no attention, as in a router.
      reason: what the trace does not show.
      kernel: the name of a kernel that may hide one.
      projections: the parameters that project states to its keys and to its values, or why they are not known.
    """

    call: int | None
    place: int
    layout: Layout | None
    reason: str = ""
    kernel: str = ""
    projections: tuple[Projection, Projection] | str = ""


def find(jaxpr: Any, origins: Sequence[str], owners: Mapping[int, Path] | None = None) -> list[Attention]:
    """The attentions of a model.

    Args:
      jaxpr: the trace of its call, with `marks.begin_call` and `marks.end_call` around the calls of its modules.
      origins: what each input of the jaxpr is: `axes.WEIGHT`, `axes.DATA` or, for other variables (a cache, keys of
        random numbers), `axes.STATE`.
      owners: the path of the module of each call that `marks.mark` numbers.
    """
    program = flatten(jaxpr)
    matched, lost = found(program)
    known = Origins(program, origins) if matched or lost else None
    parameters = Parameters.of(program, owners or {})
    counts: dict[int | None, int] = {}
    out: list[Attention] = []
    sums: dict[Node, list[int]] = {}
    for match in matched:
        call = match.calls[-1] if match.calls else None
        place = counts[call] = counts.get(call, -1) + 1
        try:
            if match.product.within is not None:
                raise Unclear(f"it lies in a {match.product.within.name!r}, which has a derivative of its own")
            assert known is not None
            layout = layout_of(match, known)
            if any(_is_over_layers(loop, known) for loop in match.loops):
                raise Unclear("it lies in a loop over layers, of which the calls are not seen")
            sums.setdefault(match.sum.node, []).append(len(out))
            out.append(Attention(call, place, layout, projections=_projections(match, layout, parameters)))
        except NoAttention:
            out.append(Attention(call, place, None))
        except Unclear as e:
            out.append(Attention(call, place, None, str(e)))
    for i in (i for own in sums.values() if len(own) > 1 for i in own):
        out[i] = replace(out[i], layout=None, reason="the probabilities of one softmax meet several values")
    # Those that `evaluate` does not count have no number.
    others = [one for one in lost if one.dot is None or known is None or not _is_of_parameters(*one.dot, known)]
    return out + [Attention(one.calls[-1] if one.calls else None, -1, None, one.reason, one.kernel) for one in others]


def _is_over_layers(loop: Node, known: Origins) -> bool:
    """Whether a loop takes one slice of a parameter after the other."""
    if loop.name != "scan":
        return False
    axes = [known.of(atom) for atom in loop.inputs[sum(scan_counts(loop)) :]]
    return any(own and own[0] and all(f.tag == WEIGHT for f in own[0]) for own in axes)


def _is_of_parameters(dot: Node, key: int, known: Origins) -> bool:
    """Whether the keys of a product are parameters or, if it is not known which operand they are, any of the two is."""
    return any(keys_are_parameters(dot, operand, known) for operand in ((0, 1) if key < 0 else (key,)))


def _projections(match: Match, layout: Layout, parameters: Parameters) -> tuple[Projection, Projection] | str:
    heads, key_dim, value_dim = layout.heads
    key, value = match.dot.inputs[match.key], match.product.inputs[1 - match.operand]
    try:
        return (
            find_projection(key, (heads, key_dim), parameters),
            find_projection(value, (heads, value_dim), parameters),
        )
    except NotFound as e:
        return str(e)


def evaluate(
    jaxpr: Any, consts: Sequence[Any], layouts: Sequence[Layout | None], change: Change, inputs: Sequence[Any] = ()
) -> list[Any]:
    """The outputs of a jaxpr with changed attentions.

    Args:
      jaxpr: the trace of a call of one module.
      consts: the values of its constants.
      layouts: the layouts of its attentions, in order; None for one that stays as it is.
      change: computes the output of an attention.
      inputs: the values of the inputs of the jaxpr.

    Raises:
      ValueError: the call has other attentions than those of the layouts.
    """
    program = flatten(jaxpr, consts)
    own = [match for match in matches(program) if not match.calls]
    if len(own) != len(layouts):
        raise ValueError(
            f"this call has {len(own)} attentions, but {len(layouts)} where it was bound; "
            "bind with inputs of the same form"
        )
    changed = {}
    for n, (match, layout) in enumerate(zip(own, layouts, strict=True)):
        if layout is not None:
            try:
                changed[match.end] = n, match, Arrangement(match, layout), layout
            except Unclear as e:
                raise ValueError(f"attention {n} of this call: {e}; bind with inputs of the same form") from e
    around = {node for _, match, *_ in changed.values() for node, _ in match.trail}
    return _Evaluation(changed, around, change).run(program, inputs)


class _Evaluation:
    """An evaluation of a program with changed attentions.

    Attributes:
      changed: the last equations of the attentions that change, with the number, match, arrangement and layout of each.
      around: the loops, branches and checkpoints that they lie in.
      change: see `evaluate`.
    """

    def __init__(self, changed: dict[Node, Any], around: set[Node], change: Change):
        self.changed, self.around, self.change = changed, around, change

    def run(self, program: Program, inputs: Sequence[Any]) -> list[Any]:
        env = dict(program.consts) | dict(zip(program.inputs, inputs, strict=True))

        def read(atom: Atom) -> Any:
            if isinstance(atom, Literal):
                return atom.val
            if atom not in env:  # a part of a call that runs as it is
                assert atom.node is not None
                self.node(atom.node, env, read)
            return env[atom]

        for i, node in enumerate(program.nodes):
            if node.within is not None or node.name == "call_mark":
                continue
            self.node(node, env, read)
            if node in self.changed:
                n, match, arrangement, layout = self.changed[node]
                rest = _between(program, match, i)
                attention = TracedAttention(match, arrangement, layout, read, rest)
                env[node.outputs[0]] = attention.restored(self.change(n, attention))
        return [read(atom) for atom in program.outputs]

    def node(self, node: Node, env: dict[Value, Any], read: Callable[[Atom], Any]) -> None:
        values = [read(atom) for atom in node.inputs]
        outputs = self.around_changed(node, values) if node in self.around else bind(node.eqn, values)
        env.update(zip(node.outputs, outputs, strict=True))

    def around_changed(self, node: Node, values: list[Any]) -> Sequence[Any]:
        """The outputs of a loop, a branch or a checkpoint around changed attentions."""
        bodies = [lambda *xs, body=body: self.run(body, xs) for body in node.bodies]
        if node.name == "cond":
            return jax.lax.switch(values[0], bodies, *values[1:])
        if node.name == "scan":
            return self.scan(node, values)
        if node.name == "while":
            return self.loop(node, values)
        p = node.params
        return jax.checkpoint(bodies[0], policy=p["policy"], prevent_cse=p["prevent_cse"])(*values)

    def scan(self, node: Node, values: list[Any]) -> Sequence[Any]:
        consts, carries = scan_counts(node)
        own, carry, xs = values[:consts], values[consts : consts + carries], values[consts + carries :]

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            out = self.run(node.bodies[0], [*own, *carry, *xs])
            return out[:carries], out[carries:]

        names = ("length", "reverse", "unroll", "_split_transpose")
        carry, ys = jax.lax.scan(body, carry, xs, **{name: node.params[name] for name in names if name in node.params})
        return [*carry, *ys]

    def loop(self, node: Node, values: list[Any]) -> Sequence[Any]:
        first, second = node.params["cond_nconsts"], node.params["body_nconsts"]
        test, own, carry = values[:first], values[first : first + second], values[first + second :]
        condition = jaxpr_as_fun(node.params["cond_jaxpr"])
        return jax.lax.while_loop(
            lambda carry: condition(*test, *carry)[0], lambda carry: self.run(node.bodies[0], [*own, *carry]), carry
        )


def _between(program: Program, match: Match, end: int) -> list[Node]:
    """The equations between the two products."""
    start = program.nodes.index(match.dot)
    return [node for node in program.nodes[start + 1 : end] if node.within is None]
