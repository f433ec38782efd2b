"""Adapters of one Peft in the leaves of another: of smaller ranks, other scales, or of some of its methods alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft.checks import shown
from jpeft.core.actions import Action
from jpeft.core.method import slugs
from jpeft.core.peft import Peft
from jpeft.core.sites import Site
from jpeft.core.tree import Path, Tree, join, like, nearest, unflatten


def pad(peft: Peft, other: Peft, adapter: Tree) -> Any:
    """An adapter of ``other`` with zeros up to the shapes of ``peft``. Inverse of `crop`.

    With its leaves times `leaf_factors`, ``peft`` does what ``other`` does.

    Args:
      peft: a Peft of the same methods at the same sites, with ranks that are as large or larger.
      other: the adapter's Peft.
      adapter: the adapter.

    Raises:
      ValueError: ``peft`` cannot do what ``other`` does, or has sites that ``other`` has not.

    >>> import flax.linen as nn, jax, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> small, large = (jpeft.LoRA(rank=n, targets="layers_0").bind(model, params, x) for n in (2, 4))
    >>> pad(large, small, small.init(jax.random.key(1), params))["layers_0"]["lora_a"].shape
    (4, 4)
    """
    leaves = padded(peft, other, adapter)
    if missing := [path for path, _ in peft.structure if path not in leaves]:
        raise ValueError(f"the adapter of {other.method.name} has no leaf {join(missing[0])!r}, which this Peft has")
    return like(unflatten(leaves), adapter)


def crop(peft: Peft, other: Peft, adapter: Tree) -> Any:
    """The leaves of ``other`` in an adapter of ``peft``. Inverse of `pad`.

    Raises:
      ValueError: ``peft`` cannot do what ``other`` does.
    """
    leaves = peft.check(adapter)
    own = dict(other.structure)
    out = {there: _cropped(leaves[here], own[there][0]) for here, there in _leaf_pairs(peft, other)}
    return like(unflatten(out), adapter)


def leaf_factors(peft: Peft, other: Peft) -> dict[Path, float]:
    """The factors on leaves of ``peft`` under which it does what ``other`` does with them. The others' are 1.

    Raises:
      ValueError: ``peft`` cannot do what ``other`` does.
    """
    return {
        action.leaf_path(name): factor
        for action, theirs in pairs(peft, other)
        for name, factor in action.method.factors(theirs.method).items()
        if factor != 1.0 and name in action.stored
    }


def padded(peft: Peft, other: Peft, adapter: Tree) -> dict[Path, Any]:
    """The leaves of `pad` by path; of sites that ``other`` has alone."""
    leaves, sizes, out = other.check(adapter), dict(peft.structure), {}
    for here, there in _leaf_pairs(peft, other):
        out[here] = _padded(meta.unbox(leaves[there]), sizes[here][0], there)
    return out


def pairs(peft: Peft, other: Peft) -> Iterator[tuple[Action, Action]]:
    """The actions of ``peft`` and ``other`` that correspond: of one class at one site.

    Raises:
      ValueError: an action of ``other`` has none in ``peft``, or one that cannot do what it does.
    """
    free = list(peft.actions)
    for theirs in other.actions:
        same = [a for a in free if _place(a.site) == _place(theirs.site) and type(a.method) is type(theirs.method)]
        found = next((a for a in same if _difference(a, theirs) is None), None)
        if found is None:
            raise ValueError(_no_pair(peft, theirs, same))
        free.remove(found)
        yield found, theirs


def _no_pair(peft: Peft, theirs: Action, same: list[Action]) -> str:
    name, site = theirs.method.name, theirs.site.name
    if same:
        return f"{name} at {site!r}: {_difference(same[0], theirs)}"
    sites = {a.site.name for a in peft.actions if type(a.method) is type(theirs.method)}
    if not sites:
        return f"the adapter is of {name}, and this Peft is of {', '.join(m.name for m in peft.method.methods())}"
    return f"the adapter acts on {site!r}, where this Peft has no {name}{nearest(site, sites)}"


def _place(site: Site) -> tuple[Any, ...]:
    return site.path, site.leaf, site.kind


def _difference(action: Action, theirs: Action) -> str | None:
    """Why an action cannot do what another one of its class does, in words."""
    mine, other = action.method, theirs.method
    free = {*mine.inert, *mine.resizable, *mine.rescaled}
    for field in dataclasses.fields(mine):
        a, b = getattr(mine, field.name), getattr(other, field.name)
        if field.name not in free and a != b:
            return f"{field.name} is {shown(b)} in the adapter, and {shown(a)} here"
    if action.site.role != theirs.site.role:
        return f"its role is {theirs.site.role!r} in the adapter, and {action.site.role!r} here"
    if lacks := set(action.stored) ^ set(theirs.stored):
        where = "here" if lacks <= set(theirs.stored) else "in the adapter"
        return f"there is no leaf {min(lacks)!r} {where}"
    return None


def _leaf_pairs(peft: Peft, other: Peft) -> Iterator[tuple[Path, Path]]:
    """The paths in ``peft`` and in ``other`` of the leaves that correspond, those that sites share among them."""
    members: dict[int, int] = {}
    for action, theirs in pairs(peft, other):
        members[theirs.member] = action.member
        yield from ((action.leaf_path(name), theirs.leaf_path(name)) for name in theirs.stored)
    here, there = slugs(peft.method), slugs(other.method)
    for member, place in members.items():
        yield from ((((here[place], p[1])), p) for p in other.shared_paths if p[0] == there[member])


def _padded(leaf: Any, shape: tuple[int, ...], path: Path) -> Any:
    if np.ndim(leaf) != len(shape) or any(a > b for a, b in zip(np.shape(leaf), shape, strict=True)):
        raise ValueError(f"the adapter's leaf {join(path)!r} has shape {np.shape(leaf)}, above the {shape} that fit")
    widths = [(0, b - a) for a, b in zip(np.shape(leaf), shape, strict=True)]
    return jnp.pad(leaf, widths) if any(after for _, after in widths) else leaf


def _cropped(leaf: Any, shape: tuple[int, ...]) -> Any:
    leaf = meta.unbox(leaf)
    return leaf if np.shape(leaf) == shape else leaf[tuple(map(slice, shape))]


def scaled(leaves: Mapping[Path, Any], factors: Mapping[Path, Any]) -> dict[Path, Any]:
    """Leaves times their factors, in their dtypes."""
    return {p: (x * jnp.asarray(factors[p], x.dtype) if p in factors else x) for p, x in leaves.items()}
