"""Arrays on device meshes: mesh axes, partition specs, and placing an array with a sharding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jpeft.core.tree import named_sharding

AnyMesh = Mesh | AbstractMesh


def automatic(mesh: AnyMesh) -> Any:
    """The mesh with automatic axes, along which XLA propagates shardings.

    ``jax.make_mesh`` makes explicit axes, where the user must give the sharding of every ambiguous product. Flax
    modules do not.

    >>> automatic(jax.make_mesh((1,), ("data",))).axis_types
    (Auto,)
    """
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == kinds:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def axes_of(entries: Any) -> set[str]:
    """The mesh axes that a partition spec, or one entry of it, names.

    >>> sorted(axes_of(PartitionSpec(("data", "fsdp"), None, "tensor")))
    ['data', 'fsdp', 'tensor']
    """
    if isinstance(entries, str):
        return {entries}
    nested = entries if isinstance(entries, PartitionSpec | tuple | list) else ()
    return {name for entry in nested for name in axes_of(entry)}


def num_shards(mesh: Any, entry: Any) -> int:
    """The number of shards that one entry of a partition spec cuts an axis into.

    >>> num_shards(AbstractMesh((2, 4), ("data", "fsdp")), ("data", "fsdp"))
    8
    """
    return math.prod(mesh.shape[name] for name in axes_of(entry))


def trimmed(entries: Iterable[Any]) -> PartitionSpec:
    """The partition spec of entries without trailing Nones.

    XLA's outputs have specs of this form; jit would compile again for an input whose spec is written otherwise.

    >>> trimmed(["data", None])
    P('data',)
    """
    kept = list(entries)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def place(value: Any, sharding: Any) -> Any:
    """An array with a sharding. Of a NumPy array, every process moves only the shards of its own devices."""
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
    """The sharding of an array that every device of a mesh holds whole."""
    return NamedSharding(automatic(mesh), PartitionSpec())


def replicated_like(leaves: Iterable[Any]) -> NamedSharding | None:
    """Replicated over the mesh that the leaves are on; None if they are on none."""
    mesh = next((s.mesh for leaf in leaves if (s := named_sharding(leaf)) is not None), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())
