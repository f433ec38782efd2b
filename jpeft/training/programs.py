"""Which members of a population one program can train, and what is data of it: their scales and their sizes.

A smaller rank is trained in the leaves of a larger one, whose added entries are zero, and another scale as a factor on
a leaf. Both are one multiplication inside the loss, so that the added entries have no gradient, and a stored leaf gets
the updates that it would have alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.core.actions import Action
from jpeft.core.fitting import leaf_factors, pairs
from jpeft.core.peft import Peft
from jpeft.core.sites import derive_entries
from jpeft.core.tree import Path, Tree, join, map_with_path

# Fields that matter to a fresh adapter alone, or that the sites have taken up already.
_STARTS = frozenset({
    "targets", "exclude", "overrides", "init_weights", "init_std", "init_options", "init_ids",
})  # fmt: skip


def grouped(pefts: Sequence[Peft]) -> tuple[tuple[Peft, ...], tuple[int, ...]]:
    """The Pefts that train all of them, each the largest of its kind; and for each Peft the index of its one.

    >>> import flax.linen as nn, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> methods = [jpeft.LoRA(rank=2, targets=".*"), jpeft.IA3(targets=".*"), jpeft.LoRA(rank=4, alpha=1, targets=".*")]
    >>> chosen, indices = grouped([method.bind(model, params, x) for method in methods])
    >>> [peft.method.name for peft in chosen], chosen[0].method.rank, indices
    (['LoRA', 'IA3'], 4, (0, 1, 0))
    """
    largest: list[Peft] = []
    for peft in sorted(dict.fromkeys(pefts), key=_size, reverse=True):
        if not any(why_not(other, peft) is None for other in largest):
            largest.append(peft)
    place = {peft: next(i for i, other in enumerate(largest) if why_not(other, peft) is None) for peft in set(pefts)}
    order = list(dict.fromkeys(place[peft] for peft in pefts))  # as the members come
    return tuple(largest[i] for i in order), tuple(order.index(place[peft]) for peft in pefts)


def _size(peft: Peft) -> int:
    return sum(int(np.prod(shape)) for _, (shape, _) in peft.structure)


def why_not(peft: Peft, other: Peft) -> str | None:
    """Why the program of ``peft`` cannot train an adapter of ``other``, in words; None if it can."""
    if peft == other:
        return None
    try:
        found = list(pairs(peft, other))
    except ValueError as error:
        return str(error)
    if len(found) != len(peft.actions):
        return f"it acts on {len(found)} sites, and the population's on {len(peft.actions)}"
    for mine, theirs in found:
        if difference := _difference(mine, theirs):
            return f"{theirs.method.name} at {theirs.site.name!r}: {difference}"
    return _misfit(peft, other)


def _difference(mine: Action, theirs: Action) -> str | None:
    """What differs between two actions of one class at one site so that they do not train alike, in words."""
    method, other = mine.method, theirs.method
    data = {*_STARTS, *method.resizable, *method.rescaled}
    for field in dataclasses.fields(method):
        a, b = getattr(method, field.name), getattr(other, field.name)
        if field.name not in data and a != b:
            return f"its {field.name} is {b!r}, and the population's {a!r}"
    if (mine.site, mine.member) != (theirs.site, theirs.member):
        return "it has another place in its chain, or acts on other layers"
    if mine.non_trainable != theirs.non_trainable:
        return "it trains other leaves"
    return None


def _misfit(peft: Peft, other: Peft) -> str | None:
    """The leaf that does not fit, in words."""
    sizes, fixed = dict(peft.structure), _fixed(peft)
    for path, (shape, dtype) in other.structure:
        there, there_dtype = sizes.get(path, ((), ""))
        fits = len(there) == len(shape) and all(a <= b for a, b in zip(shape, there, strict=True))
        if (dtype, fits) != (there_dtype, True) or (path in fixed and shape != there):
            return f"its leaf {join(path)!r} is {dtype}{list(shape)}, and the population's {there_dtype}{[*there]}"
    return None


def _fixed(peft: Peft) -> set[Path]:
    """Leaves whose sizes are those of all members: where a method has a loss of its own, padding may change it."""
    if peft.penalized:
        return {path for path, _ in peft.structure}
    return {path for path, _ in peft.structure} - {p for p, _ in size_axes(peft)}


# --- scales and sizes as data ---------------------------------------------------------------------------------------


def factor_paths(peft: Peft) -> tuple[Path, ...]:
    """The leaves that have a factor for each member, in order."""
    found = [(action, name) for action in peft.actions for name in action.method.factors(action.method)]
    return tuple(action.leaf_path(name) for action, name in found if name in action.stored)


def size_axes(peft: Peft) -> tuple[tuple[Path, int], ...]:
    """The axes of leaves that may be shorter for some members, in order: those of a rank or a size."""
    shapes, out = dict(peft.structure), []
    for action in peft.actions:
        for name in action.stored if action.method.resizable else ():
            path = action.leaf_path(name)
            out += [(path, axis) for axis in _free_axes(action, name, len(shapes[path][0])) if name != action.mask]
    return tuple(out)


def _free_axes(action: Action, name: str, axes: int) -> list[int]:
    """The axes of a leaf that are not the weight's; all where its roles do not say."""
    roles, site = action.method.roles.get(name), action.site
    if roles is None or site.geometry is None:
        return list(range(axes))
    entries = derive_entries(site, roles, ["the weight's"] * len(site.stored))
    return [axis for axis, entry in enumerate(entries) if entry is None]


def factors_of(peft: Peft, other: Peft) -> Float[Array, " paths"] | None:
    """The factors of a member in the order of `factor_paths`; None if there are none."""
    given, paths = leaf_factors(peft, other), factor_paths(peft)
    return jnp.asarray([given.get(path, 1.0) for path in paths], jnp.float32) if paths else None


def sizes_of(peft: Peft, other: Peft) -> Int[Array, " axes"] | None:
    """The sizes of a member's leaves in the order of `size_axes`; None if there are none."""
    shapes, axes = dict(other.structure), size_axes(peft)
    return jnp.asarray([shapes[path][0][axis] for path, axis in axes], jnp.int32) if axes else None


def as_own(peft: Peft, adapter: Tree, factors: Any, sizes: Any) -> Any:
    """A member's leaves under which ``peft`` does what the member's own Peft does: scaled, and zero beyond its sizes.

    Args:
      peft: the Peft of the program.
      adapter: the member's leaves, in the shapes of ``peft``.
      factors: `factors_of` the member.
      sizes: `sizes_of` the member.
    """
    scales = {path: factors[i] for i, path in enumerate(factor_paths(peft))}
    ends: dict[Path, dict[int, Any]] = {}
    for i, (path, axis) in enumerate(size_axes(peft)):
        ends.setdefault(path, {})[axis] = sizes[i]

    def own(path: Path, leaf: Any) -> Any:
        return jax.tree.map(lambda x: _within(x, ends.get(path, {}), scales.get(path)), leaf)  # it may be in a box

    return map_with_path(own, adapter)


def _within(x: Array, ends: Mapping[int, Any], factor: Any) -> Array:
    if factor is not None:
        x = x * factor.astype(x.dtype)
    for axis, end in ends.items():
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < end, x, jnp.zeros((), x.dtype))
    return x
