"""Where leaves lie on a mesh: placing arrays, and the shardings of adapter leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jpeft.core.sites import Site, derive_entries
from jpeft.core.tree import Path, named_sharding

AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone


def automatic(mesh: AnyMesh) -> Any:
    """The mesh with axes of the kind where XLA finds how what is computed is laid out.

    ``jax.make_mesh`` makes explicit ones, where ambiguous products must say it, which Flax's modules do not.

    >>> automatic(jax.make_mesh((1,), ("data",))).axis_types
    (Auto,)
    """
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == kinds:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def axes_of(where: Any) -> set[str]:
    """The mesh axes that a rule, or an entry of one, speaks of."""
    if isinstance(where, str):
        return {where}
    entries = where if isinstance(where, PartitionSpec | tuple | list) else ()
    return {name for entry in entries for name in axes_of(entry)}


def trimmed(entries: Iterable[Any]) -> list[Any]:
    """Without the empty entries at the end: as XLA spells its outputs; jit takes another spelling for another input."""
    kept = list(entries)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


def place(value: Any, sharding: Any) -> Any:
    """One array with a sharding. Of a NumPy array, each device gets its piece, and each host moves its own alone."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if isinstance(value, Tracer):
        return jax.lax.with_sharding_constraint(value, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device of a mesh."""
    return NamedSharding(automatic(mesh), PartitionSpec())


def everywhere(leaves: Iterable[Any]) -> NamedSharding | None:
    """Replicated over the mesh that the leaves are on, if they are on one."""
    mesh = next((s.mesh for leaf in leaves if (s := named_sharding(leaf)) is not None), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def leaf_sharding(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None) -> Any:
    """The sharding of one adapter leaf, or None where the base says nothing about it."""
    if site is None or roles is None:
        return None
    sharding = named_sharding(base[site.weight_path])
    if sharding is None:
        return None
    if site.kind == "leaf":
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*trimmed(derive_entries(site, roles, tuple(sharding.spec)))))


def box_like(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None, value: Any) -> Any:
    """An adapter leaf in the same kind of box as the base weight, with logical names derived from the weight's."""
    if site is None or roles is None:
        return value
    box = base[site.weight_path]
    box = getattr(box, "codes", box)  # of a quantized weight, these are in the box
    if not isinstance(box, meta.AxisMetadata):
        return value
    if site.kind == "leaf":
        return meta.replace_boxed(box, value)
    if not isinstance(box, meta.Partitioned):
        return value
    return box.replace(value=value, names=derive_entries(site, roles, box.names))
