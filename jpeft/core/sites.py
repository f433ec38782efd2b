"""Sites: the places in a model that a method acts on, and the stacking of leaves there by scans."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jpeft.core.tree import Path, join

if TYPE_CHECKING:
    from jpeft.core.geometry.base import Geometry

# (axis, size) of each stacking of a stored leaf, outermost first: the axes that nn.scan and nn.vmap slice off.
Stack = tuple[tuple[int, int], ...]

FUSED = "fused"  # computed inside the module's own call
BOX = "box"  # the changed weight is computed when the module asks for its parameter
MERGE = "merge"  # the changed weight is computed before the model runs
REPLACE = "replace"  # an adapter leaf takes the place of a base leaf

# Names of output heads in transformers and Linen models, for models that wrap their output.
HEAD_NAMES = {"lm_head", "classifier", "score", "head", "logits_dense"}


@dataclass(frozen=True)
class FoundAttention:
    """An attention in the trace of a call.

    Attributes:
      call: full name of the method that is called.
      layouts: what the axes are of every attention in that call, in order; see `jpeft.core.dataflow.attention`.
      place: the number of this one.
    """

    call: str
    layouts: tuple[Any, ...]
    place: int


@dataclass(frozen=True)
class HiddenAttention:
    """An attention that no method can act on.

    Attributes:
      name: path of the module.
      owner: class name of the module.
      reason: why not.
      seen: whether the trace shows one; otherwise the module's name alone says so.
    """

    name: str
    owner: str
    reason: str
    seen: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The path that targets use."""
        return (self.name,)


@dataclass(frozen=True)
class Site:
    """One place that a method acts on: a weight, a module's output, an attention, or a leaf.

    Attributes:
      path: path of the owner module in the parameter tree; for a "leaf" site, of the leaf.
      kind: "weight", "output", "attention" or "leaf".
      owner: class name of the owner.
      leaf: name of the weight in its owner; "" for a site that is not a weight.
      geometry: how the owner uses the weight; for an "output" site, that of the weight that computes it, if any.
      inputs: number of rows of the weight as a matrix; for an "output" site, the number of features of its input.
      outputs: number of its columns; for an "output" site, the number of features.
      heads: (number of key/value heads, key dimension, value dimension) of an attention.
      dtype: dtype of the weight, output or leaf.
      stored: shape of the weight or leaf in the parameter tree.
      stack: the scanned and vmapped axes of leaves here.
      via: the path taken: "fused", "box", "merge" or "replace".
      head: whether the weight's output is the model's output.
      bias: whether the owner has a bias.
      named: whether the weight is named ``owner/leaf``: a raw weight, or one of several in its scope.
      role: set by a method for its own use, such as "feedforward".
      calls_alone: set by a method that acts in calls of the weight's module alone, whatever else reads the weight.
      layers: of a weight that a scan stacks, the layers that the method acts on; None for all.
      attention: for an attention that no hook is registered for, how it was found.
      projections: for an attention, the parameters that project states to its keys and to its values, see
        `jpeft.core.dataflow.projections`, or why they are not known.
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
    named: bool = False
    role: str = ""
    calls_alone: bool = False
    layers: tuple[int, ...] | None = None
    attention: FoundAttention | None = None
    projections: tuple[Any, Any] | str = ""

    @property
    def name(self) -> str:
        """The path that targets match: the owner's, or ``owner/leaf`` for a weight with a name of its own."""
        return join((*self.path, self.leaf)) if self.prefix else join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """All paths that targets may use for this site."""
        if self.kind == "leaf":
            return tuple(join(self.path[: n + 1]) for n in range(len(self.path)))
        return (self.name, join((*self.path, self.leaf))) if self.leaf else (self.name,)

    @property
    def weight_path(self) -> Path:
        """Path of the base weight (or leaf) in the parameter tree."""
        return self.path if self.kind == "leaf" else (*self.path, self.leaf)

    @property
    def bias_path(self) -> Path | None:
        """Path of the bias in the parameter tree; None without a bias."""
        return (*self.path, self.geometry.bias) if self.bias and self.geometry and self.geometry.bias else None

    @property
    def linear(self) -> bool:
        """Whether "all-linear" includes it: a linear weight or its output, but no embedding and not the output head."""
        return self.geometry is not None and self.geometry.linear and not self.head

    @property
    def lookup(self) -> bool:
        """Whether the weight is an embedding table."""
        return self.geometry is not None and self.geometry.lookup

    @property
    def prefix(self) -> str:
        """Prefix of the names of adapter leaves. Two weights of one scope need different names."""
        return f"{self.leaf}_" if self.named else ""

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes of the weight as a matrix: heads, experts, groups, parts."""
        return self.geometry.batch if self.geometry is not None and self.kind == "weight" else ()

    @property
    def channels(self) -> int:
        """Number of distinct input features: the rows of the matrix or, for a convolution, its input channels."""
        return (self.geometry.channels if self.geometry is not None else None) or self.inputs

    def split(self, parts: int) -> Site:
        """The same weight as ``parts`` matrices, each with an equal block of the outputs.

        Raises:
          ValueError: the outputs do not divide into ``parts``.
        """
        if parts == 1 or self.geometry is None:
            return self
        if self.outputs % parts:
            raise ValueError(f"{self.name!r} has {self.outputs} outputs, which do not divide into {parts} parts")
        return replace(self, geometry=self.geometry.split(parts), outputs=self.outputs // parts)


@dataclass(frozen=True)
class Survey:
    """The candidate sites of a model, by kind.

    Attributes:
      weights: its weights.
      outputs: the outputs of its modules.
      leaves: the leaves of its parameter tree.
      names: the paths of all its modules and leaves.
      unused: parameters of two or more stored axes that the call did not use.
      form: the Python values and the structure of the call's arguments, if they are hashable.
      boxable: of some parameters, those that the model itself reads in a way that opens a box, so that it can be given
        boxes for them.
      find_attentions: finds its attentions, and those that cannot be acted on.
      lost_ids: ``(path of a table, its rows) -> reason``: why ids beyond the table do not reach its lookup alone.
    """

    weights: tuple[Site, ...]
    outputs: tuple[Site, ...]
    leaves: tuple[Site, ...]
    names: tuple[str, ...]
    unused: tuple[Path, ...] = ()
    form: Hashable = None
    boxable: Callable[[Collection[Path]], Collection[Path]] = lambda paths: ()
    find_attentions: Callable[[], tuple[tuple[Site, ...], tuple[HiddenAttention, ...]]] = lambda: ((), ())
    lost_ids: Callable[[Path, int], str] = lambda table, rows: ""

    @functools.cached_property
    def attentions(self) -> tuple[Site, ...]:
        """The attentions of the model."""
        return self._found[0]

    @property
    def hidden_attentions(self) -> tuple[HiddenAttention, ...]:
        """The attentions that no method can act on, and the modules whose names are those of attentions."""
        return self._found[1]

    @functools.cached_property
    def _found(self) -> tuple[tuple[Site, ...], tuple[HiddenAttention, ...]]:
        return self.find_attentions()


def is_of_positions(name: str) -> bool:
    """Whether a weight is a table of positions, by its name."""
    return any(part in name.lower() for part in ("position", "wpe"))


def no_projections(site: Site) -> str:
    """The error of a method that projects states at an attention whose projections are not known."""
    reason = site.projections or "the trace of the model does not show them"
    return (
        f"the projections of {site.name!r} to keys and values are not known: {reason}; a method that projects states "
        f"needs them; leave it out with exclude=[{site.name!r}]"
    )


def without_stack(stored: tuple[int, ...], stack: Stack) -> tuple[int, ...]:
    """The shape of one layer of a stored leaf.

    >>> without_stack((4, 12, 3), ((1, 12),))
    (4, 3)
    """
    rest = list(stored)
    for axis, _ in stack:
        rest.pop(axis)
    return tuple(rest)


def stack_first(x: Any, stack: Stack) -> jax.Array:
    """A stored leaf with its stacked axes in front, outermost first. Inverse of `stack_back`."""
    for i, (axis, _) in enumerate(stack):
        x = jnp.moveaxis(x, axis + i if axis >= 0 else axis, i)
    return x


def stack_back(x: jax.Array, stack: Stack) -> jax.Array:
    """A leaf with its stacked axes where they are stored. Inverse of `stack_first`."""
    for i, (axis, _) in reversed(list(enumerate(stack))):
        x = jnp.moveaxis(x, i, axis + i if axis >= 0 else axis)
    return x


def map_axes(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """``fn`` vmapped over ``depth`` leading axes."""
    for _ in range(depth):
        fn = jax.vmap(fn)
    return fn


def derive_entries(site: Site, roles: Sequence[str | None], entries: Sequence[Any]) -> tuple[Any, ...]:
    """The partition spec entries of an adapter leaf, from those of the base weight that it belongs to.

    Args:
      site: the weight.
      roles: the role of each axis of the leaf: "in", "out", or None (rank).
      entries: a mesh axis, a logical name or None for each stored axis of the base weight.

    Returns:
      Entries for each stored axis of the leaf. An axis that merges several axes of the weight is sharded as the major
      one, and not at all if a minor one is sharded: its shards would not be contiguous.
    """
    assert site.geometry is not None
    rest = list(entries) + [None] * (len(site.stored) - len(entries))
    stacked = [rest.pop(axis) for axis, _ in site.stack]
    batch_axes, in_axes, out_axes = site.geometry.axes()

    def merged(axes: tuple[int, ...]) -> Any:
        return rest[axes[0]] if axes and all(rest[a] is None for a in axes[1:]) else None

    by_role = {"in": merged(in_axes), "out": merged(out_axes), None: None}
    batch = [merged(batch_axes)] + [None] * (len(site.batch) - 1) if site.batch else []
    leaf = batch + [by_role.get(role) for role in roles]
    for (axis, _), entry in reversed(list(zip(site.stack, stacked, strict=True))):
        leaf.insert(axis if axis >= 0 else len(leaf) + 1 + axis, entry)
    return tuple(leaf)
