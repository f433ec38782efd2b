"""An attention of a traced call, as a change of its output sees it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Float

from jpeft.core.dataflow.jaxprs import bind
from jpeft.core.dataflow.layout import (
    FEATURE,
    GROUP,
    HEAD,
    KEY,
    QUERY,
    Arrangement,
    Layout,
    Part,
    Parts,
    arranged,
    restored,
)
from jpeft.core.dataflow.program import Atom, Node, Value, dtype_of, shape_of
from jpeft.core.dataflow.softmax_facts import Match, Step


class TracedAttention:
    """An attention of a traced call.

    All arrays are as a module would have them that attends in the usual layout, whatever its own is. ``batch...`` are
    the examples, of which there may be several axes, or none. The ``heads`` of queries and outputs are ``kv_heads *
    groups``: the heads that share a head of keys and values lie together. Nothing is computed that is not asked for.

    Attributes:
      query: ``[batch..., queries, heads, key_dim]``, as it enters the product: after position encoding and scaling.
      key: ``[batch..., keys, kv_heads, key_dim]``, likewise.
      value: ``[batch..., keys, kv_heads, value_dim]``.
      out: the output ``[batch..., queries, heads, value_dim]``.
      lse: the logarithm of the softmax's normalizer, ``[batch..., queries, heads]`` in float32 or wider.
    """

    def __init__(
        self,
        match: Match,
        arrangement: Arrangement,
        layout: Layout,
        read: Callable[[Atom], Any],
        between: Sequence[Node],
    ):
        self._match, self._arrangement, self._layout = match, arrangement, layout
        self._read, self._between = read, between

    # --- its arrays ---

    @functools.cached_property
    def query(self) -> Float[Array, "*batch queries heads key_dim"]:
        return _flat_heads(self._split_query, -3)

    @functools.cached_property
    def key(self) -> Float[Array, "*batch keys kv_heads key_dim"]:
        return self._arranged(self._match.dot.inputs[self._match.key], self._arrangement.key, (KEY, HEAD, FEATURE))

    @functools.cached_property
    def value(self) -> Float[Array, "*batch keys kv_heads value_dim"]:
        return self._arranged(self._value, self._arrangement.value, (KEY, HEAD, FEATURE))

    @functools.cached_property
    def out(self) -> Float[Array, "*batch queries heads value_dim"]:
        return self._out(self._read(self._match.end.outputs[0]))

    @functools.cached_property
    def lse(self) -> Float[Array, "*batch queries heads"]:
        # log sum exp(s) = m + log sum exp(s - m): the module computes both.
        total = self._match.sum
        node, axes = total.node, tuple(int(i) for i in total.node.params["axes"])
        d = self._read(node.outputs[0])
        if d.dtype.itemsize < 4:
            d = jnp.sum(self._read(node.inputs[0]).astype(jnp.float32), axes)
        is_empty, shift = d == 0, None
        if total.logits.shift is not None:
            shift = self._shift(total.logits.shift, axes).astype(d.dtype)
            is_empty = is_empty | (shift == -jnp.inf)  # a row that is masked everywhere, whose sum is nan
        lse = jnp.where(is_empty, -jnp.inf, jnp.log(jnp.where(is_empty, jnp.ones_like(d), d)))
        if shift is not None:
            lse = jnp.where(is_empty, lse, lse + shift)
        heads = self._in_order(lse, self._arrangement.sum, (QUERY, HEAD, GROUP))
        return heads.reshape(*heads.shape[:-2], -1)

    def _shift(self, shift: Atom, axes: tuple[int, ...]) -> Any:
        """The shift that was taken off every row of the logits: it is the same at all keys."""
        m = self._read(shift)
        if not jnp.ndim(m):
            return m
        for axis in sorted(axes, reverse=True):
            m = m[(slice(None),) * axis + (0,)]
        return m

    # --- other attentions ---

    def over(
        self, keys: Float[Array, "*batch n kv_heads key_dim"], values: Float[Array, "*batch n kv_heads value_dim"]
    ) -> tuple[Float[Array, "*batch queries heads value_dim"], Float[Array, "*batch queries heads"]]:
        """The module's own attention of its queries to other keys alone, and the logarithm of its normalizer.

        The scalings and caps of the module apply to its logits; masks and biases do not.
        """
        match = self._match
        q, k_dtype = self._split_query, dtype_of(match.dot.inputs[match.key])
        dot = functools.partial(jnp.einsum, precision=match.dot.params["precision"])
        logits = dot(
            "...qhgd,...nhd->...hgqn" if keys.ndim > 3 else "...qhgd,nhd->...hgqn",
            q,
            keys.astype(k_dtype),
            preferred_element_type=dtype_of(match.dot.outputs[0]),
        )
        for step in match.sum.logits.steps:
            logits = self._step(step, logits)
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        lse = jax.nn.logsumexp(wide, axis=-1)
        p = self._scaled(jnp.exp(wide - lse[..., None]))
        p = p.astype(dtype_of(match.product.inputs[match.operand]))
        out = jnp.einsum(
            "...hgqn,...nhd->...qhgd" if values.ndim > 3 else "...hgqn,nhd->...qhgd",
            p,
            values.astype(dtype_of(match.product.inputs[1 - match.operand])),
            precision=match.product.params["precision"],
            preferred_element_type=dtype_of(match.product.outputs[0]),
        )
        lse = jnp.moveaxis(lse, -1, -3)
        return _flat_heads(out, -3), lse.reshape(*lse.shape[:-2], -1)

    def prefixed(
        self, keys: Float[Array, "*batch n kv_heads key_dim"], values: Float[Array, "*batch n kv_heads value_dim"]
    ) -> Float[Array, "*batch queries heads value_dim"]:
        """The output where every query attends to other keys too, as if they came before the module's own."""
        out, lse = self.over(keys, values)
        # o' = w o + (1 - w) o_p,  w = sigmoid(lse - lse_p)
        w = jax.nn.sigmoid(self.lse - lse)[..., None]
        own = jnp.where(w > 0, self.out, jnp.zeros_like(self.out))  # a row that is masked everywhere may be nan
        mixed = w * own.astype(w.dtype) + (1 - w) * out.astype(w.dtype)
        return mixed.astype(self.out.dtype)

    def rerun(self, query: Any = None, key: Any = None, value: Any = None) -> Any:
        """The output with other queries, keys or values of the same shapes.

        Masks, biases and dropout are those of the call.
        """
        match, arrangement = self._match, self._arrangement
        if match.dot.within is not None:
            raise ValueError(f"the products of this attention lie in a {match.dot.within.name!r}, which runs as it is")
        changed: dict[Value, Any] = {}
        operands = [self._read(atom) for atom in match.dot.inputs]
        for operand, x, parts, roles in (
            (1 - match.key, None if query is None else self._with_groups(query), arrangement.query, _OF_QUERY),
            (match.key, key, arrangement.key, (KEY, HEAD, FEATURE)),
        ):
            if x is not None:
                operands[operand] = self._restored(x, parts, roles, match.dot.inputs[operand])
        if query is not None or key is not None:
            changed[match.dot.outputs[0]] = bind(match.dot.eqn, operands)[0]
        end = match.end.outputs[0]
        for node in [*self._between, match.end]:
            given = None
            if node is match.product and value is not None:
                given = self._restored(value, arrangement.value, (KEY, HEAD, FEATURE), self._value)
            if given is not None or any(isinstance(atom, Value) and atom in changed for atom in node.inputs):
                operands = self._operands(node, changed)
                if given is not None:
                    operands[1 - match.operand] = given
                changed.update(zip(node.outputs, bind(node.eqn, operands), strict=True))
        return self._out(changed.get(end, self._read(end)))

    def _operands(self, node: Node, changed: Mapping[Value, Any]) -> list[Any]:
        is_new = [isinstance(atom, Value) and atom in changed for atom in node.inputs]
        return [changed[a] if new else self._read(a) for a, new in zip(node.inputs, is_new, strict=True)]  # pyright: ignore

    # --- between the two layouts ---

    def restored(self, out: Float[Array, "*batch queries heads value_dim"]) -> Any:
        """An output in the module's own layout and dtype."""
        atom = self._match.end.outputs[0]
        return self._restored(self._with_groups(out), self._arrangement.out, _OF_QUERY, atom)

    @property
    def _value(self) -> Any:
        return self._match.product.inputs[1 - self._match.operand]

    @functools.cached_property
    def _split_query(self) -> Any:
        """The queries ``[batch..., queries, kv_heads, groups, key_dim]``."""
        q = self._arranged(self._match.dot.inputs[1 - self._match.key], self._arrangement.query, _OF_QUERY)
        return jnp.broadcast_to(q, (*q.shape[:-3], self._layout.heads[0], self._layout.groups, q.shape[-1]))

    def _out(self, y: Any) -> Any:
        return _flat_heads(self._in_order(y, self._arrangement.out, _OF_QUERY), -3)

    def _with_groups(self, x: Any) -> Any:
        return x.reshape(*x.shape[:-2], self._layout.heads[0], self._layout.groups, x.shape[-1])

    def _order(self, roles: Sequence[str], parts: Parts) -> list[tuple[Part, ...]]:
        own = [p for axis in parts for p in axis]
        groups = [tuple(p for p in own if p.role == r) if r == FEATURE else self._arrangement.all(r) for r in roles]
        return [*((p,) for p in self._arrangement.examples), *groups]

    def _in_order(self, x: Any, parts: Parts, roles: Sequence[str]) -> Any:
        return arranged(x, parts, self._order(roles, parts))

    def _arranged(self, atom: Atom, parts: Parts, roles: Sequence[str]) -> Any:
        return self._in_order(self._read(atom), parts, roles)

    def _restored(self, x: Any, parts: Parts, roles: Sequence[str], atom: Atom) -> Any:
        order = self._order(roles, parts)
        x = jnp.broadcast_to(x, [math.prod(p.size for p in group) for group in order])
        return restored(x.astype(dtype_of(atom)), parts, order, shape_of(atom))

    # --- the module's functions of its logits ---

    def _step(self, step: Step, logits: Any) -> Any:
        """One of the functions of the logits, on other logits ``[batch..., kv_heads, groups, queries, n]``."""
        if not _arrays(step):
            return _bound(step.node, step.operand, logits, self._read)
        factor = self._per_row(step)
        if factor is None:
            return logits  # a mask or a bias
        operands = (logits, factor)[:: 1 if step.operand == 0 else -1]
        return operands[0] / operands[1] if step.node.name == "div" else operands[0] * operands[1]

    def _scaled(self, p: Any) -> Any:
        """Other probabilities ``[batch..., kv_heads, groups, queries, n]``, multiplied as the module's own are.

        Dropout, which differs from key to key, is left out with the scaling that belongs to it.
        """
        steps = self._match.probabilities.steps
        factors = {step: self._per_row(step) for step in steps if _arrays(step)}
        is_dropped = any(factor is None for factor in factors.values())
        for step in steps:
            if step in factors:
                factor = factors[step]
                p = p if factor is None else p / factor if step.node.name == "div" else p * factor
            elif not is_dropped:
                p = _bound(step.node, step.operand, p.astype(dtype_of(step.node.inputs[step.operand])), self._read)
        return p

    def _per_row(self, step: Step) -> Any:
        """A factor that is the same at all keys, beside ``[batch..., kv_heads, groups, queries, n]``; None for another:
        a mask."""
        summed, shape = {f.tag for f in self._match.sum.summed}, list(shape_of(step.node.inputs[step.operand]))
        places = [i for i, axis in enumerate(step.axes) if any(f.tag in summed for f in axis)]
        if len(places) != 1 or step.node.name not in ("mul", "div", "dot_general"):
            return None
        (place,), atom = places, step.node.inputs[1 - step.operand]
        if step.node.name == "dot_general":
            if place in step.node.params["dimension_numbers"][1][step.operand]:
                return None
            x = _beside(step, self._read(atom))
        elif _is_same_along(atom, place):
            x = self._read(atom)[(slice(None),) * place + (slice(0, 1),)]
        else:
            return None
        shape[place] = 1
        parts = list(self._arrangement.of(step.axes))
        parts[place] = ()
        return self._in_order(jnp.broadcast_to(x, shape), tuple(parts), (HEAD, GROUP, QUERY, KEY))


_OF_QUERY = (QUERY, HEAD, GROUP, FEATURE)


def _arrays(step: Step) -> list[Atom]:
    """The other operands of an equation that are no scalars."""
    return [atom for i, atom in enumerate(step.node.inputs) if i != step.operand and shape_of(atom)]


def _beside(step: Step, x: Any) -> Any:
    """The other operand of a product that contracts nothing, in the axes of the first: one place where it has none."""
    batch, shape = step.node.params["dimension_numbers"][1], shape_of(step.node.inputs[step.operand])
    own = dict(zip(batch[step.operand], batch[1 - step.operand], strict=True))
    x = jnp.transpose(x, [own[i] for i in sorted(own)])
    return x.reshape([n if i in own else 1 for i, n in enumerate(shape)])


def _bound(node: Node, operand: int, x: Any, read: Callable[[Atom], Any]) -> Any:
    """The output of an equation with another operand."""
    return bind(node.eqn, [x if i == operand else read(atom) for i, atom in enumerate(node.inputs)])[0]


def _is_same_along(atom: Atom, axis: int) -> bool:
    """Whether an array is the same at all places of an axis because it is broadcast along it."""
    while not isinstance(atom, Literal) and (node := atom.node) is not None:
        if atom.shape[axis] == 1 and not _is_boolean(atom):
            return True
        if node.name == "broadcast_in_dim":
            dims = [int(d) for d in node.params["broadcast_dimensions"]]
            if axis not in dims:
                return True
            axis = dims.index(axis)
        elif node.name != "convert_element_type":
            return False
        atom = node.inputs[0]
    return not isinstance(atom, Literal) and atom.shape[axis] == 1


def _is_boolean(atom: Value) -> bool:
    """Whether an array is a mask as numbers."""
    node = atom.node
    return node is not None and node.name == "convert_element_type" and dtype_of(node.inputs[0]) == jnp.bool_


def _flat_heads(x: Any, axis: int) -> Any:
    """``[..., kv_heads, groups, dim]`` with both as one axis."""
    return x.reshape(*x.shape[:axis], -1, x.shape[-1])
