"""The interface of a method, as the engine sees it.

The engine knows methods by this interface alone: it asks no method for a field of its own. The base classes that
methods extend are in `jpeft.methods.base`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.core.sites import Site, Survey

Leaves = Mapping[str, Any]  # the adapter leaves at one site, by name


class Method(Protocol):
    """A method with its configuration: static and hashable.

    How it acts on a site depends on the site's kind. A "weight" method has ``apply(leaves, base, x)``,
    ``merge(leaves, w)`` and ``merge_bias(leaves, b)``; an "output" method ``apply(leaves, y)``; an "attention" method
    ``apply(leaves, key, value, mask)``; a "leaf" method has leaves that stand in for the base's.
    """

    mergeable: ClassVar[bool]  # whether its change is a change of weights
    roles: ClassVar[Mapping[str, Sequence[str | None]]]  # the axes of each leaf: "in", "out", or None
    non_trainable: ClassVar[frozenset[str]]  # leaves that never train

    @property
    def name(self) -> str:
        """The name that messages and configurations use."""
        ...

    @property
    def slug(self) -> str:
        """The key of shared leaves in the adapter, such as ``prefix_tuning``."""
        ...

    @property
    def expands(self) -> bool:
        """Whether `expand` computes anything."""
        ...

    @property
    def changes_bias(self) -> bool:
        """Whether it changes the bias beside a weight."""
        ...

    @property
    def input_dropout(self) -> float:
        """The rate at which ``apply`` drops entries of its input; 0.0 for none."""
        ...

    def columns(self) -> Mapping[str, str]:
        """Columns of its own in `Peft.summary`, such as ``{"rank": "8"}``."""
        ...

    def methods(self) -> tuple[Method, ...]:
        """The simple methods that it consists of: itself, or the members of a chain."""
        ...

    def sites(self, survey: Survey) -> list[Site]:
        """The sites of a model that it acts on."""
        ...

    def at(self, site: Site) -> Method:
        """The method with the overrides that hold at a site."""
        ...

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        """The leaves at one site."""
        ...

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        """The leaves that all its sites share."""
        ...

    def expand(self, shared: Leaves, leaves: Leaves) -> Leaves:
        """The leaves that ``apply`` and ``merge`` take, computed from the stored ones."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Its configuration as JSON values."""
        ...


class Linear(Protocol):
    """The original operation at a site, as a weight method sees it: ``base(x)`` is ``x @ weight + bias``."""

    def __call__(self, x: Any) -> Float[Array, "*tokens out"]: ...

    @property
    def weight(self) -> Float[Array, "in out"]:
        """The weight as a matrix; read (and paid for) only where it is used."""
        ...

    @property
    def bias(self) -> Float[Array, " out"] | None: ...

    @property
    def plain(self) -> bool:
        """Whether this is exactly ``x @ weight + bias`` with the model's own weight.

        False if another method changed the weight before, or if the module multiplies in a way of its own. If True,
        ``x @ changed + bias`` may stand in for it.
        """
        ...

    def dropout(self, x: Any, rate: float) -> Any:
        """``x`` with entries dropped while the caller trains with a "dropout" rng; otherwise ``x`` itself."""
        ...


def widened(dtype: Any) -> Any:
    """The dtype, or float32 if it is narrower. Decided by size: strict promotion has no common type of two dtypes."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def pad_left(x: jax.Array, n: int, length: int, fill: Any) -> jax.Array:
    """The last axis (key positions, possibly broadcast from 1) widened by ``n`` on the left."""
    x = jnp.broadcast_to(x, (*x.shape[:-1], length))
    return jnp.concatenate([jnp.full((*x.shape[:-1], n), fill, x.dtype), x], axis=-1)


def slugs(method: Method) -> tuple[str, ...]:
    """A key for the shared leaves of each member: ``prefix_tuning``, and ``prefix_tuning_1`` for a second one."""
    own = [member.slug for member in method.methods()]
    return tuple(f"{slug}_{n}" if (n := own[:i].count(slug)) else slug for i, slug in enumerate(own))
