"""Shardings of an adapter, which follow from the base weights'.

A takes the sharding of W's input axes, B that of its output axes, rank is never sharded, vectors follow the axis they
scale, and a leaf that stands in for a base leaf is sharded like it. Everything else is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flax.core import meta
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.sites import Site, derive_entries
from jpeft.tree import Path, Tree, flatten, like, peek, unflatten

if TYPE_CHECKING:
    from jpeft.peft import Peft


def adapter_shardings(peft: Peft, params: Tree) -> Any:
    """The sharding of every adapter leaf, for ``jax.jit(..., out_shardings=...)`` or ``jax.device_put``.

    Args:
      peft: the bound method.
      params: the base tree, its leaves carrying ``NamedSharding``s (arrays or ``jax.ShapeDtypeStruct``s).

    Returns:
      A tree like the adapter with a ``NamedSharding`` for every leaf. Optimiser state made from a sharded adapter
      takes the same.

    Raises:
      ValueError: no base leaf carries a ``NamedSharding``.
    """
    base = flatten(params)
    meshes = [s.mesh for leaf in base.values() if (s := named_sharding(leaf)) is not None]
    if not meshes:
        raise ValueError("no leaf of params carries a NamedSharding: device_put it on a mesh first")
    replicated = NamedSharding(meshes[0], PartitionSpec())
    out = {path: leaf_sharding(base, site, roles) or replicated for path, (site, roles) in peft.leaf_sites().items()}
    return like(unflatten(out), params)


def named_sharding(leaf: Any) -> NamedSharding | None:
    """A leaf's ``NamedSharding`` on more than nothing, or None: traced and single-device leaves have none."""
    leaf = peek(leaf)
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def leaf_sharding(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None) -> Any:
    """The sharding of one adapter leaf, or None where the base says nothing about it."""
    if site is None or roles is None:
        return None
    sharding = named_sharding(base[site.weight_path])
    if sharding is None:
        return None
    if site.kind == "leaf":
        return sharding
    entries = list(derive_entries(site, roles, tuple(sharding.spec)))
    while entries and entries[-1] is None:  # as XLA spells its outputs: jit takes another spelling for another input
        entries.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def box_like(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None, value: Any) -> Any:
    """An adapter leaf in the same kind of box as the base weight, with logical names derived from the weight's."""
    if site is None or roles is None:
        return value
    box = base[site.weight_path]
    box = getattr(box, "codes", box)  # of a quantised weight, these are in the box
    if not isinstance(box, meta.AxisMetadata):
        return value
    if site.kind == "leaf":
        return meta.replace_boxed(box, value)
    if not isinstance(box, meta.Partitioned):
        return value
    return box.replace(value=value, names=derive_entries(site, roles, box.names))
