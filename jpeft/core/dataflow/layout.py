"""The roles of an attention's axes: examples, queries, keys, heads, and groups of heads that share keys and values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jpeft.core.dataflow.axes import DATA, REPEAT, STATE, UNKNOWN, VMAP, WEIGHT, Origins, strongest
from jpeft.core.dataflow.factors import Axis, Factor, places_of, refined
from jpeft.core.dataflow.program import Node, shape_of
from jpeft.core.dataflow.softmax_facts import Match, free_axes, free_outputs

# The roles of factors of axes.
EXAMPLE = "example"
QUERY = "query"
KEY = "key"
HEAD = "head"  # of keys and values
GROUP = "group"  # the heads of queries that share a head of keys and values
FEATURE = "feature"

# The factors of an axis, major first: a role and a size, which is None where it differs from call to call.
Roles = tuple[tuple[str, int | None], ...]


class Unclear(ValueError):
    """An attention of which the trace does not show what its axes are."""


class NoAttention(ValueError):
    """A softmax between two products that is no attention."""


@dataclass(frozen=True)
class Layout:
    """The roles of the axes of the product of queries and keys, as the module sees them.

    Attributes:
      batch: the axes that both operands share, in the order of the equation.
      query: the free axes of the queries.
      key: the free axes of the keys.
      heads: (number of key/value heads, key dimension, value dimension).
      groups: the number of heads of queries that share a head of keys and values.
    """

    batch: tuple[Roles, ...]
    query: tuple[Roles, ...]
    key: tuple[Roles, ...]
    heads: tuple[int, int, int]
    groups: int


def layout_of(match: Match, origins: Origins) -> Layout:
    """The layout of an attention.

    Raises:
      Unclear: the trace does not show it.
      NoAttention: it is none.
    """
    summed = {f.tag for f in match.sum.summed}
    dot, q, k = match.dot, 1 - match.key, match.key
    own = [origins.of(atom) for atom in dot.inputs]
    positions = [own[k][i] for i, place in zip(free_axes(dot, k), free_outputs(dot, k), strict=True) if place in summed]
    if all(f.tag == WEIGHT for axis in positions for f in axis):
        raise NoAttention("its keys are parameters, as those of a router or of a vocabulary are")
    batch_dims, values = dot.params["dimension_numbers"][1], _of_values(match, origins)
    batch = [
        _shared(own[q][i], own[k][j], values.get(place, ()))
        for place, (i, j) in enumerate(zip(batch_dims[q], batch_dims[k], strict=True))
    ]
    query = [_free_query(own[q][i]) for i in free_axes(dot, q)]
    roles = [role for axis in query for role, _ in axis]
    if QUERY not in roles and roles.count(GROUP) == 1:  # learned queries
        query = [tuple((QUERY, None) if role == GROUP else (role, size) for role, size in axis) for axis in query]
    key = [
        ((KEY, None),) if place in summed else _free_key(own[k][i])
        for i, place in zip(free_axes(dot, k), free_outputs(dot, k), strict=True)
    ]
    seen = [[axis for axis in axes if axis != ((VMAP, None),)] for axes in (batch, query, key)]
    for axis in (axis for axes in seen for axis in axes):
        if any(role == VMAP for role, _ in axis) or sum(size is None for _, size in axis) > 1:
            raise Unclear(f"an axis of its product of queries and keys is several in one: {axis}")
    sizes = {role: _product(seen, role) for role in (HEAD, GROUP)}
    heads = sizes[HEAD], _features(match, k), _value_features(match, origins)
    return Layout(tuple(seen[0]), tuple(seen[1]), tuple(seen[2]), heads, sizes[GROUP])


def keys_are_parameters(dot: Node, key: int, origins: Origins) -> bool:
    """Whether the free axes of an operand of a product are those of parameters alone."""
    axes = origins.of(dot.inputs[key])
    return all(f.tag == WEIGHT for i in free_axes(dot, key) for f in axes[i])


def _product(axes: Iterable[Iterable[Roles]], role: str) -> int:
    return math.prod(size or 1 for some in axes for axis in some for own, size in axis if own == role)


def _features(match: Match, operand: int) -> int:
    shape = shape_of(match.dot.inputs[operand])
    return math.prod(shape[i] for i in match.dot.params["dimension_numbers"][0][operand])


def _value_features(match: Match, origins: Origins) -> int:
    operand = 1 - match.operand
    atom = match.product.inputs[operand]
    axes, shape = origins.of(atom), shape_of(atom)
    free = free_axes(match.product, operand)
    return math.prod(shape[i] for i in free if not axes[i] or strongest(axes[i]) != VMAP)


def _of_values(match: Match, origins: Origins) -> dict[int, Axis]:
    """For axes of the product of queries and keys, where those of the values that meet them come from."""
    product, p, v = match.product, match.operand, 1 - match.operand
    axes, found = origins.of(product.inputs[v]), {}
    batch = product.params["dimension_numbers"][1]
    for i, j in zip(batch[p], batch[v], strict=True):
        for place, origin in refined(match.probabilities.axes[i], axes[j]) or ():
            found.setdefault(place.tag, []).append(Factor(origin.tag, origin.size))
    shape = match.dot.outputs[0].shape
    return {place: tuple(own) for place, own in found.items() if math.prod(f.size for f in own) == shape[place]}


def _shared(query: Axis, key: Axis, value: Axis) -> Roles:
    """The roles of an axis that queries and keys share."""
    n = max(places_of(query), places_of(key))
    groups = refined(query, key, *((value,) if value else ()))
    if groups is None:
        raise Unclear(f"the {n} places of an axis of its queries and keys are other parts in each")
    roles = [_shared_role([f.tag for f in group], group[0].size) for group in groups]
    return _merged([*_ones(query, key, 0), *roles, *_ones(query, key, -1)] if n > 1 else roles)


def _ones(query: Axis, key: Axis, end: int) -> list[tuple[str, int | None]]:
    """The examples of a batch of one that are folded into the heads."""
    ends = [axis[end] for axis in (query, key) if axis]
    return [(EXAMPLE, None)] if any(f.size == 1 and f.tag == DATA for f in ends) else []


def _shared_role(origins: Sequence[Any], size: int) -> tuple[str, int | None]:
    query, key, *value = origins
    if VMAP in origins:
        return VMAP, None
    if query == DATA:
        return EXAMPLE, None
    if query == WEIGHT and not (size == 1 and key == DATA):
        is_repeated = key == REPEAT and value in ([], [REPEAT])
        return (GROUP if is_repeated else HEAD), size
    if DATA in (key, *value):  # the queries are the same for all examples
        return EXAMPLE, None
    if WEIGHT in (key, *value):
        return HEAD, size
    if size == 1:
        return EXAMPLE, None
    raise Unclear(f"the trace does not show whether {size} places of its queries and keys are heads or examples")


def _free_query(axis: Axis) -> Roles:
    return _merged([_free_query_role(f) for f in axis] or [(QUERY, None)])


def _free_query_role(factor: Factor) -> tuple[str, int | None]:
    if factor.tag == VMAP:
        return VMAP, None
    return (GROUP, factor.size) if factor.tag == WEIGHT and factor.size > 1 else (QUERY, None)


def _free_key(axis: Axis) -> Roles:
    roles = {VMAP: (VMAP, None), DATA: (EXAMPLE, None)}
    if any(f.tag in (STATE, UNKNOWN) for f in axis):
        raise Unclear("the trace does not show what an axis of its keys is")
    return _merged([roles.get(f.tag, (HEAD, f.size)) for f in axis] or [(HEAD, 1)])


def _merged(roles: Iterable[tuple[str, int | None]]) -> Roles:
    """The roles of an axis, with neighbors of one role as one."""
    out: list[tuple[str, int | None]] = []
    for role, size in roles:
        if out and out[-1][0] == role:
            known = out[-1][1]
            out[-1] = (role, None if size is None or known is None else size * known)
        else:
            out.append((role, size))
    return tuple(out)


# --- arrays in a layout -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A factor of an axis of an array of an attention.

    Attributes:
      role: its role.
      place: its number among the factors of its role.
      size: its size in this call.
    """

    role: str
    place: int
    size: int


Parts = tuple[tuple[Part, ...], ...]  # of each axis of an array


class Arrangement:
    """The arrays of an attention in this call, by the parts of their axes.

    Attributes:
      query, key: the parts of the operands of the first product.
      value, out: of an operand and of the output of the second.
      sum: of the normalizer of the softmax.
      examples: the parts that are examples, in order.
    """

    def __init__(self, match: Match, layout: Layout):
        """Applies a layout.

        Raises:
          Unclear: the attention is another than the one that the layout is of.
        """
        dot, q, k = match.dot, 1 - match.key, match.key
        contracted, batch = dot.params["dimension_numbers"]
        free = [free_axes(dot, i) for i in (0, 1)]
        of_batch, of_query, of_key = _aligned(
            (layout.batch, layout.query, layout.key),
            [
                [shape_of(dot.inputs[i])[axis] for axis in axes]
                for i, axes in ((q, batch[q]), (q, free[q]), (k, free[k]))
            ],
        )
        roles = (*of_batch, *(of_query if q == 0 else of_key), *(of_key if q == 0 else of_query))
        self._axes = _parts(roles, dot.outputs[0].shape)
        operands = []
        for operand in (0, 1):
            places = {axis: self._axes[i] for i, axis in enumerate(batch[operand])}
            places |= zip(free[operand], (self._axes[i] for i in free_outputs(dot, operand)), strict=True)
            places |= _features_of(contracted[operand], shape_of(dot.inputs[operand]))
            operands.append(tuple(places[i] for i in range(len(places))))
        self.query, self.key = operands[q], operands[k]
        reduced = {int(i) for i in match.sum.node.params["axes"]}
        self.sum = self.of([axis for i, axis in enumerate(match.sum.axes) if i not in reduced])
        self.value, self.out = self._of_product(match)
        self.examples = tuple(p for axis in self._axes for p in axis if p.role == EXAMPLE)

    def _of_product(self, match: Match) -> tuple[Parts, Parts]:
        product, p, v = match.product, match.operand, 1 - match.operand
        contracted, batch = product.params["dimension_numbers"]
        own, shape = self.of(match.probabilities.axes), shape_of(product.inputs[v])
        places = {j: own[i] for pairs in (contracted, batch) for i, j in zip(pairs[p], pairs[v], strict=True)}
        features = free_axes(product, v)
        places |= _features_of(features, shape)
        free = {p: [own[i] for i in free_axes(product, p)], v: [places[i] for i in features]}
        out = [*(own[i] for i in batch[p]), *free[0], *free[1]]
        return tuple(places[i] for i in range(len(shape))), self.of(match.axes, out)

    def of(self, axes: Sequence[Axis], whole: Sequence[tuple[Part, ...]] | None = None) -> Parts:
        """The parts of an array whose axes are factors of those of another: of the product of queries and keys."""
        whole = self._axes if whole is None else whole
        left = [list(axis) for axis in whole]
        return tuple(tuple(part for f in axis for part in _taken(left[f.tag], whole[f.tag], f)) for axis in axes)

    def all(self, role: str) -> tuple[Part, ...]:
        """All parts of a role, in order."""
        return tuple(p for axis in self._axes for p in axis if p.role == role)


def _aligned(layout: Sequence[Sequence[Roles]], sizes: Sequence[Sequence[int]]) -> Sequence[Sequence[Roles]]:
    """The roles of the axes in this call, for each group of axes in a layout.

    `jnp.matmul` leaves out a batch of one, here or where the attention was bound.

    Raises:
      Unclear: the axes are others than those of the layout.
    """
    if [len(axes) for axes in layout] == [len(axes) for axes in sizes]:
        return layout
    groups = [_alignments(tuple(roles), tuple(own)) for roles, own in zip(layout, sizes, strict=True)]
    has_examples = any(role == EXAMPLE for axes in layout for roles in axes for role, _ in roles)
    possible = [made for made in itertools.product(*groups) if _is_possible(made, has_examples)]
    costs = {made: sum(one.cost for one in made) for made in possible}
    best = [made for made, cost in costs.items() if cost == min(costs.values())]
    if len(best) != 1:
        why = " and which are examples is not clear: bind with inputs of several examples" if best else ""
        raise Unclear(f"its product of queries and keys has other axes than where it was bound{why}")
    return [one.roles for one in best[0]]


@dataclass(frozen=True)
class _Alignment:
    """Roles for the axes of a group, of which some are left out of the layout, and others added as examples."""

    roles: tuple[Roles, ...] = ()
    cost: int = 0
    left_out: int = 0
    added: int = 0

    def then(self, *roles: Roles, cost: int = 0, left_out: int = 0, added: int = 0) -> _Alignment:
        return _Alignment((*roles, *self.roles), self.cost + cost, self.left_out + left_out, self.added + added)


def _alignments(roles: tuple[Roles, ...], sizes: tuple[int, ...]) -> list[_Alignment]:
    if not roles and not sizes:
        return [_Alignment()]
    out = []
    if roles and sizes and _fits(roles[0], sizes[0]):
        out += [rest.then(roles[0]) for rest in _alignments(roles[1:], sizes[1:])]
    if roles and all(role == EXAMPLE or size == 1 for role, size in roles[0]):
        out += [rest.then(cost=1, left_out=1) for rest in _alignments(roles[1:], sizes)]
    if sizes:
        several = int(sizes[0] > 1)
        example = ((EXAMPLE, None),)
        out += [rest.then(example, cost=1 + several, added=several) for rest in _alignments(roles, sizes[1:])]
    return out


def _fits(roles: Roles, n: int) -> bool:
    known = math.prod(size for _, size in roles if size is not None)
    return n % known == 0 and (n == known or any(size is None for _, size in roles))


def _is_possible(made: Sequence[_Alignment], has_examples: bool) -> bool:
    """Whether examples that are added in one group are left out of others, or of the whole layout."""
    added = sum(one.added for one in made)
    if not has_examples and added == made[0].added:  # in the axes that queries and keys share
        return added <= 1
    return added <= sum(one.left_out for one in made)


def _features_of(axes: Sequence[int], shape: Sequence[int]) -> dict[int, tuple[Part, ...]]:
    return {axis: (Part(FEATURE, place, shape[axis]),) for place, axis in enumerate(axes)}


def _parts(axes: Sequence[Roles], shape: Sequence[int]) -> list[tuple[Part, ...]]:
    counts: dict[str, int] = {}
    out = []
    for roles, n in zip(axes, shape, strict=True):
        known = math.prod(size for _, size in roles if size is not None)
        if n % known or (n != known and all(size is not None for _, size in roles)):
            raise Unclear(f"an axis of its product of queries and keys has {n} places, not a multiple of {known}")
        parts = []
        for role, size in roles:
            parts.append(Part(role, counts.get(role, 0), n // known if size is None else size))
            counts[role] = counts.get(role, 0) + 1
        out.append(tuple(parts))
    return out


def _taken(left: list[Part], axis: Sequence[Part], factor: Factor) -> list[Part]:
    """The parts of an axis that a factor of it is, which are taken off those that are left.

    Raises:
      Unclear: it is a part of one.
    """
    stride, first, last = math.prod(p.size for p in axis), factor.stride * factor.size, factor.stride
    out, is_whole = [], factor.size == stride
    for part in axis:
        start, stride = stride, stride // part.size
        if part in left and (is_whole or (start <= first and stride >= last)):
            left.remove(part)
            out.append(part)
    if math.prod(p.size for p in out) != factor.size:
        raise Unclear("a reshape between its products takes an axis apart that is one")
    return out


def arranged(x: Any, parts: Parts, order: Sequence[Sequence[Part]]) -> Any:
    """An array with one axis for each group of parts; a group that it lacks has size one.

    Inverse of `restored`.
    """
    own = [p for axis in parts for p in axis]
    wanted = [p for group in order for p in group if p in own]
    x = x.reshape([p.size for p in own])
    # Keys of repeated heads are read once.
    for axis in sorted((i for i, p in enumerate(own) if p not in wanted), reverse=True):
        x = x[(slice(None),) * axis + (0,)]
    kept = [p for p in own if p in wanted]
    x = jnp.transpose(x, [kept.index(p) for p in wanted])
    return x.reshape([math.prod(p.size for p in group if p in own) for group in order])


def restored(x: Any, parts: Parts, order: Sequence[Sequence[Part]], shape: Sequence[int]) -> Any:
    """An array from one axis for each group of parts, in its own shape; what it lacks is repeated. Inverse of
    `arranged`."""
    own = [p for axis in parts for p in axis]
    given = [p for group in order for p in group]
    x = x.reshape([p.size for p in given])
    for axis in sorted((i for i, p in enumerate(given) if p not in own), reverse=True):
        x = x[(slice(None),) * axis + (0,)]
    kept = [p for p in given if p in own]
    missing = [p for p in own if p not in kept]
    x = jnp.broadcast_to(x.reshape(x.shape + (1,) * len(missing)), (*x.shape, *(p.size for p in missing)))
    return jnp.transpose(x, [(*kept, *missing).index(p) for p in own]).reshape(shape)
