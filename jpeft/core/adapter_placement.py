"""Shardings and boxes of adapter leaves, which follow from those of the base weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax.core import meta
from jax.sharding import NamedSharding

from jpeft.core.placement import trimmed
from jpeft.core.sites import Site, derive_entries
from jpeft.core.tree import Path, named_sharding


def leaf_sharding(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None) -> Any:
    """The sharding of an adapter leaf, or None if the base does not determine it."""
    if site is None or roles is None:
        return None
    sharding = named_sharding(base[site.weight_path])
    if sharding is None or site.kind == "leaf":
        return sharding
    return NamedSharding(sharding.mesh, trimmed(derive_entries(site, roles, tuple(sharding.spec))))


def box_like(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None, value: Any) -> Any:
    """An adapter leaf in the same kind of box as the base weight, with logical names derived from the weight's."""
    if site is None or roles is None:
        return value
    box = base[site.weight_path]
    box = getattr(box, "codes", box)  # a quantized weight has its box around the codes
    if not isinstance(box, meta.AxisMetadata):
        return value
    if site.kind == "leaf":
        return meta.replace_boxed(box, value)
    if not isinstance(box, meta.Partitioned):
        return value
    return box.replace(value=value, names=derive_entries(site, roles, box.names))
