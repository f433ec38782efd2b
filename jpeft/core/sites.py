"""Sites: the places of a model that a method acts on, and how leaves there are stacked by scans and experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.geometry.base import Geometry, Raw
from jpeft.core.tree import Path, join

# (axis, size) of each stacking, outermost first: what nn.scan and nn.vmap take off a stored leaf on the way in.
Stack = tuple[tuple[int, int], ...]

FUSED = "fused"  # computed inside the module's own call
BOX = "box"  # the changed weight is built when the module asks for its parameter
MERGE = "merge"  # the changed weight is built before the model runs
REPLACE = "replace"  # a base leaf of the adapter's own


@dataclass(frozen=True)
class Site:
    """One place that a method acts on: a weight, a module's output, an attention, or a leaf.

    Attributes:
      path: of the owner module in the parameter tree (of the leaf itself for ``kind="leaf"``).
      kind: "weight" | "output" | "attention" | "leaf".
      owner: the owner's class name.
      leaf: the weight's name in its owner, "" where the site is no weight.
      geometry: how the owner uses the weight; for an output, that of the weight which makes it, if one does.
      inputs, outputs: sizes of the matrix; ``outputs`` is the feature size for "output" sites.
      heads: (key/value heads, key dimension, value dimension) of an attention.
      stack: the scanned and vmapped axes of leaves here.
      via: the path taken: "fused", "box", "merge" or "replace".
      bias: whether the owner has one. role: what a method noted about the site.
      head: whether its output is the model's output.
    """

    path: Path
    kind: str
    owner: str = ""
    leaf: str = ""
    geometry: Geometry | None = None
    inputs: int = 0
    outputs: int = 0
    heads: tuple[int, int, int] = (0, 0, 0)
    dtype: str = "float32"
    stored: tuple[int, ...] = ()
    stack: Stack = ()
    via: str = FUSED
    head: bool = False
    bias: bool = False
    role: str = ""

    @property
    def name(self) -> str:
        """What targets match: the owner's path, or ``owner/leaf`` for a raw weight."""
        return join((*self.path, self.leaf)) if self.prefix else join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Every path that this site answers to."""
        if self.kind == "leaf":
            return tuple(join(self.path[: n + 1]) for n in range(len(self.path)))
        return (self.name, join((*self.path, self.leaf))) if self.leaf else (self.name,)

    @property
    def weight_path(self) -> Path:
        """Where the base weight (or leaf) lies in the tree."""
        return self.path if self.kind == "leaf" else (*self.path, self.leaf)

    @property
    def bias_path(self) -> Path | None:
        """Where its bias lies, if it has one."""
        return (*self.path, self.geometry.bias) if self.bias and self.geometry and self.geometry.bias else None

    @property
    def linear(self) -> bool:
        """Whether "all-linear" means this: a linear weight (or its output), no embedding and not the output head."""
        return self.geometry is not None and self.geometry.linear and not self.head

    @property
    def lookup(self) -> bool:
        return self.geometry is not None and self.geometry.lookup

    @property
    def conv(self) -> bool:
        return self.geometry is not None and self.geometry.channels is not None

    @property
    def prefix(self) -> str:
        """Put before the names of adapter leaves, so that two raw weights of one owner have leaves of their own."""
        return f"{self.leaf}_" if isinstance(self.geometry, Raw) else ""

    @property
    def batch(self) -> tuple[int, ...]:
        return self.geometry.batch if self.geometry is not None else ()

    @property
    def channels(self) -> int:
        """Distinct input features: those of the matrix, or fewer for a convolution."""
        return (self.geometry.channels if self.geometry is not None else None) or self.inputs

    def split(self, parts: int) -> Site:
        """The same weight as ``parts`` equal blocks of outputs."""
        if parts == 1 or self.geometry is None:
            return self
        if self.outputs % parts:
            raise ValueError(f"{self.name!r} has {self.outputs} outputs, which do not divide into {parts} parts")
        return replace(self, geometry=self.geometry.split(parts), outputs=self.outputs // parts)


def stack_first(x: jax.Array, stack: Stack) -> jax.Array:
    """Moves the stacked axes of a stored leaf to the front, outermost first. Inverse of `stack_back`."""
    for i, (axis, _) in enumerate(stack):
        x = jnp.moveaxis(x, axis + i if axis >= 0 else axis, i)
    return x


def stack_back(x: jax.Array, stack: Stack) -> jax.Array:
    """Inverse of `stack_first`."""
    for i, (axis, _) in reversed(list(enumerate(stack))):
        x = jnp.moveaxis(x, i, axis + i if axis >= 0 else axis)
    return x


def map_axes(fn: Callable[..., Any], depth: int, in_axes: Any = 0) -> Callable[..., Any]:
    """``fn`` vmapped over ``depth`` leading axes."""
    for _ in range(depth):
        fn = jax.vmap(fn, in_axes=in_axes)
    return fn


def derive_entries(site: Site, roles: Sequence[str | None], entries: Sequence[Any]) -> tuple[Any, ...]:
    """The sharding entries of an adapter leaf from those of the base weight it belongs to.

    Args:
      site: the weight.
      roles: what each axis of the leaf is: "in", "out", or None (rank).
      entries: a mesh axis, a logical name or None for each stored axis of the base weight.

    Returns:
      Entries for each stored axis of the leaf. An axis that merges several axes of the weight takes the sharding of
      the major one, and none where a minor one is sharded: only then are the shards contiguous.
    """
    assert site.geometry is not None
    rest = list(entries) + [None] * (len(site.stored) - len(entries))
    stacked = [rest.pop(axis) for axis, _ in site.stack]
    both, ins, outs = site.geometry.axes()

    def major(axes: tuple[int, ...]) -> Any:
        return rest[axes[0]] if axes and all(rest[a] is None for a in axes[1:]) else None

    batch = [major(both)] + [None] * (len(site.batch) - 1) if site.batch else []
    leaf = batch + [major(ins) if r == "in" else major(outs) if r == "out" else None for r in roles]
    for (axis, _), entry in reversed(list(zip(site.stack, stacked, strict=True))):
        leaf.insert(axis if axis >= 0 else len(leaf) + 1 + axis, entry)
    return tuple(leaf)


# Heads by the names that transformers and Linen models give them, for where a wrapper hides the model's output.
HEAD_NAMES = {"lm_head", "classifier", "score", "head", "logits_dense"}


@dataclass(frozen=True)
class Survey:
    """What a model offers to methods: candidate sites of each kind, and every path in it."""

    weights: tuple[Site, ...]
    outputs: tuple[Site, ...]
    attentions: tuple[Site, ...]
    leaves: tuple[Site, ...]
    names: tuple[str, ...]
