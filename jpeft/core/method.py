"""The interface of a method, as the engine sees it.

The engine uses only these members: it never reads a field of a particular method, or branches on its name. The base
classes that methods extend are in `jpeft.methods.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.core.sites import Site, Survey
from jpeft.core.targets import Matched

Leaves = Mapping[str, Any]  # the adapter leaves at a site, by name


class Method(Protocol):
    """A method with its configuration: static and hashable.

    Its functions at a site depend on the site's kind:

    - "weight": ``apply(leaves, base, x) -> y`` with a `Linear` as base, and ``merge(leaves, w, b) -> (w, b)``, each for
      one matrix, with ``b`` None where the module has no bias;
    - "output": ``apply(leaves, x, y, context) -> y``, for a module's input and output;
    - "attention": ``attend(leaves, attend, query, key, value, mask, project) -> out``, with an `Attend`;
    - "leaf": none, its leaf replaces the base's.

    Attributes:
      roles: for each leaf, the roles of its axes ("in", "out" or None), for leaves that are sharded like the weight.
      non_trainable: names of the leaves, at a site or shared, that never train; they may be integers.
      regenerated: names of the non-trainable leaves that the configuration gives back bit for bit, whatever the key.
      uncast: names of the leaves that ``apply`` gets in their own dtype, not in that of the computation.
      reads_context: whether ``apply`` reads `Linear.context`.
      arguments: names of arguments of the model's call that are the method's own; the model does not get them.
      observes: the statistic of the data that ``init`` takes as its last argument, or None.
      penalty_reduction: how the terms of `penalty` combine, "sum" or "mean".
      inert: names of fields that do not matter to what a trained adapter does, such as those of its start.
      resizable: names of fields that may be larger than those of an adapter, whose leaves are padded with zeros.
      rescaled: names of fields that differ from those of an adapter by factors on its leaves alone.
      neutral: the number under which the method changes nothing at a site, if all its leaves there are it; or None.
    """

    inert: ClassVar[frozenset[str]]
    resizable: ClassVar[frozenset[str]]
    rescaled: ClassVar[frozenset[str]]
    neutral: ClassVar[float | None]
    roles: ClassVar[Mapping[str, Sequence[str | None]]]
    non_trainable: ClassVar[frozenset[str]]
    regenerated: ClassVar[frozenset[str]]
    uncast: ClassVar[frozenset[str]]
    reads_context: ClassVar[bool]
    arguments: ClassVar[tuple[str, ...]]
    observes: ClassVar[str | None]
    penalty_reduction: ClassVar[str]

    @property
    def name(self) -> str:
        """The name in messages and configurations."""
        ...

    @property
    def slug(self) -> str:
        """The key of shared leaves in the adapter, such as ``prefix_tuning``."""
        ...

    @property
    def checks(self) -> bool:
        """Whether `check` does anything."""
        ...

    @property
    def enters(self) -> bool:
        """Whether `enter` and `leave` do anything."""
        ...

    @property
    def expands(self) -> bool:
        """Whether `expand` computes anything."""
        ...

    @property
    def penalized(self) -> bool:
        """Whether `penalty` computes anything."""
        ...

    @property
    def input_dropout(self) -> float:
        """The rate at which ``apply`` drops entries of its input; 0.0 for none."""
        ...

    @property
    def draws(self) -> bool:
        """Whether ``apply`` draws random numbers while the caller trains: by dropout or `Linear.sampled`."""
        ...

    def factors(self, other: Any) -> Mapping[str, float]:
        """The factors on leaves, by name, under which it does what ``other``, of its class, does with them."""
        ...

    def columns(self) -> Mapping[str, str]:
        """The method's own columns in `Peft.summary`, such as ``{"rank": "8"}``."""
        ...

    def methods(self) -> tuple[Method, ...]:
        """The members of a chain; for another method, the method itself."""
        ...

    def sites(self, survey: Survey) -> list[Site]:
        """The sites of a model that the method acts on.

        Raises:
          TargetError: a target matches nothing.
          ValueError: the method cannot act on a site.
        """
        ...

    def matched(self, survey: Survey, sites: Sequence[Site]) -> Sequence[Matched]:
        """The number of sites that each entry of its targets matched, for `Peft.summary`; it acts on ``sites``."""
        ...

    def at(self, site: Site) -> Method:
        """The method with the overrides for a site applied."""
        ...

    def trains(self, leaf: str) -> bool:
        """Whether a leaf, at a site or shared, ever trains."""
        ...

    def mergeable(self, site: Site) -> bool:
        """Whether what the method does at a site can be merged into the base's leaves."""
        ...

    @property
    def init(self) -> Callable[..., Leaves]:
        """``init(key, site, w)``: fresh leaves at a site, for one matrix.

        ``w`` is the weight as ``[in, out]``, the leaf, or None. Where the method ``observes`` data, it is called with a
        fourth argument: the statistic by name, for this matrix, or None.
        """
        ...

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        """Fresh leaves that all sites share."""
        ...

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        """The leaves that ``apply`` and ``merge`` take, from shared leaves and those at a site, for one matrix."""
        ...

    def check(self, site: Site, leaves: Leaves) -> None:
        """Checks the leaves of one matrix that were read from a file, as numpy arrays; their shapes fit already.

        Raises:
          ValueError: they are none that the method can use.
        """
        ...

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The arguments of the model's own call as the model gets them, and the method's part of the context."""
        ...

    def leave(self, output: Any, context: Mapping[str, Any]) -> Any:
        """The output of the model's own call as the caller gets it."""
        ...

    def virtual_tokens(self) -> int:
        """The number of positions that the method adds to every sequence, and to a cache of keys and values."""
        ...

    def penalty(self, leaves: Leaves) -> Any:
        """The method's own term of the loss, for one matrix."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        ...


# states [n, features] -> a module's projections of them to keys [n, kv_heads, key_dim] and values
# [n, kv_heads, value_dim], without position encoding
Project = Callable[[Any], tuple[Any, Any]]
Prefix = tuple[Any, Any]  # keys [n, kv_heads, key_dim] and values [n, kv_heads, value_dim]


class Attend(Protocol):
    """The original operation of an attention, as an attention method sees it."""

    def __call__(self, query: Any, key: Any, value: Any, mask: Any, prefix: Prefix | None = None) -> Array:
        """The output ``[..., queries, heads, value_dim]``.

        Args:
          query: the queries, as the method got them or changed.
          key: the keys.
          value: the values.
          mask: the mask, as the method got it.
          prefix: keys and values that every query attends to beside the others, whatever the mask.
        """
        ...

    def over(self, query: Any, keys: Any, values: Any) -> Array:
        """The module's attention, with its scale and soft cap, of the queries over other keys alone: all of them."""
        ...


@dataclass(frozen=True)
class Inputs:
    """The outermost call of a model, as `Method.enter` sees it.

    Attributes:
      arguments: its arguments by name, as the members of a chain before this one have changed them.
      model: the model, for what it says of itself in attributes.
      accepted: the names that the called method takes.
      sites: the sites of this method.
      context: what earlier members have put into the context.
      continues: whether the call continues a cache of keys and values that an earlier call has begun.
      positions: the number of positions that the model has embeddings for; None if there is no such number.
      outputs: computes the shapes of the outputs that the model has for these arguments.
      shared: the leaves that the method's sites share.
      run: computes outputs of the model without methods, see `Run`.
    """

    arguments: Mapping[str, Any]
    model: Any
    accepted: tuple[str, ...]
    sites: tuple[Site, ...]
    context: Mapping[str, Any]
    continues: bool
    positions: int | None
    outputs: Callable[[], Any]
    shared: Leaves
    run: Run


class Run(Protocol):
    """A pass of the model without methods, before its own call."""

    def __call__(self, arguments: Mapping[str, Any], method: str = "", at: str | None = None) -> Any:
        """The outputs of the model, on a state that it keeps for itself: what it writes there is lost.

        Leaves of the base that a method replaces, such as `jpeft.BitFit`'s, are those of the adapter.

        Args:
          arguments: the arguments by name.
          method: another method than the one that is called. It gets the arguments that it takes.
          at: the path of a module, "" for the model.

        Returns:
          The outputs; with ``at`` a pair, whose second is the output of the module's last call. None if the method
          needs arguments that are not there.

        Raises:
          ValueError: the pass does not call the module at that path.
        """
        ...


class Linear(Protocol):
    """The original operation at a site, as a weight method sees it: ``base(x)`` computes ``x @ weight + bias``."""

    def __call__(self, x: Any) -> Float[Array, "*tokens out"]: ...

    @property
    def weight(self) -> Float[Array, "in out"]:
        """The weight as a matrix, computed when it is read."""
        ...

    @property
    def bias(self) -> Float[Array, " out"] | None:
        """The bias as a vector; None without one."""
        ...

    @property
    def context(self) -> Mapping[str, Any]:
        """The arguments of the model's own call, by name; only for a method that `reads_context`.

        ``"cached"`` beside them tells whether the model keeps keys and values of earlier calls, whose arguments are not
        known.
        """
        ...

    @property
    def plain(self) -> bool:
        """Whether ``x @ changed + bias`` may replace a call: it is the default product with the model's own weight.

        False if another method changed the weight before, or if the module has its own product or precision.
        """
        ...

    def merged(self, x: Any) -> Float[Array, "*tokens out"]:
        """The product with the method's merged weight, which is computed in at least float32.

        The backward pass computes the merged weight again, so that no copy of it is kept.
        """
        ...

    def dropout(self, x: Any, rate: float) -> Any:
        """``x`` with entries dropped if the caller trains and gives a "dropout" rng; otherwise ``x`` itself."""
        ...

    def sampled(self, sample: Callable[[Array], Array], otherwise: Array) -> Array:
        """``sample(key)`` if the caller trains and gives a "dropout" rng; otherwise ``otherwise``.

        Only for a method that `draws`.
        """
        ...


class Drops(Protocol):
    """The dropout of a method in a call, see `ModuleContext`."""

    def __call__(self, x: Any, rate: float) -> Any: ...

    def part(self, index: int) -> Drops:
        """The dropout of one part of the method."""
        ...


@dataclass(frozen=True, eq=False)
class ModuleContext(Mapping[str, Any]):
    """The call around a module, as an output method sees it.

    A mapping of the arguments of the model's own call by name, for a method that `reads_context`.

    Attributes:
      arguments: these arguments.
      dropout: ``dropout(x, rate)`` is ``x`` with entries dropped if the caller trains and gives a "dropout" rng;
        otherwise, and for a method whose `input_dropout` is 0.0, ``x`` itself.
      rerun: ``rerun(x)`` is the output of the module for another first argument: of one that has parameters alone, such
        as a norm.
    """

    arguments: Mapping[str, Any]
    dropout: Drops
    rerun: Callable[[Any], Any]

    def part(self, index: int) -> ModuleContext:
        """The context of one of the methods of which a method is made, whose dropout is independent of the others'."""
        return replace(self, dropout=self.dropout.part(index))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arguments)

    def __len__(self) -> int:
        return len(self.arguments)


def widened(dtype: Any) -> Any:
    """The dtype, or float32 if it is narrower. Decided by size, since strict promotion finds no common dtype."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def pad_left(x: jax.Array, n: int, length: int, fill: Any) -> jax.Array:
    """``x`` with ``n`` entries ``fill`` before its last axis, which is broadcast to ``length`` first."""
    x = jnp.broadcast_to(x, (*x.shape[:-1], length))
    return jnp.concatenate([jnp.full((*x.shape[:-1], n), fill, x.dtype), x], axis=-1)


def slugs(method: Method) -> tuple[str, ...]:
    """The key of each member's shared leaves: ``prefix_tuning``, and ``prefix_tuning_1`` for a second such member."""
    own = [member.slug for member in method.methods()]
    return tuple(f"{slug}_{n}" if (n := own[:i].count(slug)) else slug for i, slug in enumerate(own))
