"""Batches on a device mesh: their shardings, the rows that a process reads, and activations sharded like the batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.core.frontend import mapped_outputs
from jpeft.core.placement import AnyMesh, automatic, num_shards, place, trimmed
from jpeft.core.tree import abstract_array, named_sharding
from jpeft.linen.activations import map_outputs
from jpeft.parallel.mesh import DATA_AXES, SEQUENCE_AXIS


def batch_shardings(batch: Any, mesh: AnyMesh) -> Any:
    """The shardings of a batch's arrays: rows over "data" and "fsdp", tokens over "sequence", if the mesh has them.

    Raises:
      ValueError: rows or tokens that do not divide over the mesh.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> batch_shardings(np.ones((8, 16)), mesh).spec
    P('data',)
    """
    mesh = automatic(mesh)
    rows = tuple(name for name in DATA_AXES if name in mesh.axis_names)
    tokens = SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.axis_names else None
    entry = rows[0] if len(rows) == 1 else rows or None

    def sharding(path: Any, x: Any) -> NamedSharding:
        spec = (entry, tokens)[: np.ndim(x)]
        for size, name in zip(np.shape(x), spec, strict=False):
            if size % (shards := num_shards(mesh, name)):
                raise ValueError(
                    f"the batch's {jax.tree_util.keystr(path) or 'array'} of shape {np.shape(x)}: {size} does not "
                    f"divide over {name!r}, which is {shards} wide"
                )
        return NamedSharding(mesh, trimmed(spec))

    return jax.tree_util.tree_map_with_path(sharding, batch)


def shard_batch(batch: Any, mesh: AnyMesh, rows: int | None = None) -> Any:
    """The batch, sharded over a mesh.

    Args:
      batch: a tree of arrays whose first axis is the batch.
      mesh: the mesh.
      rows: the number of rows of the global batch, if ``batch`` holds only the rows of this process's devices (see
        `local_rows`). None: ``batch`` is the global batch on every process.

    Raises:
      ValueError: rows or tokens that do not divide over the mesh.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> shard_batch({"ids": np.ones((8, 16))}, mesh)["ids"].shape
    (8, 16)
    """
    if rows is None:
        return jax.tree.map(place, batch, batch_shardings(batch, mesh))
    whole = jax.tree.map(lambda x: abstract_array(x).update(shape=(rows, *x.shape[1:])), batch)

    def assemble(local: Any, sharding: NamedSharding, whole: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, local, whole.shape)

    return jax.tree.map(assemble, batch, batch_shardings(whole, mesh), whole)


def data_ways(mesh: AnyMesh) -> int:
    """The number of shards of a batch's rows on a mesh.

    >>> data_ways(jax.make_mesh((1,), ("tensor",)))
    1
    """
    return math.prod(mesh.shape[name] for name in DATA_AXES if name in mesh.axis_names)


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, and that it has to read.

    >>> local_rows(4, jax.make_mesh((1,), ("data",)))
    array([0, 1, 2, 3])
    """
    sharding = batch_shardings(jax.ShapeDtypeStruct((rows,), np.int32), mesh)
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


class Layout(NamedTuple):
    """The sharding of a batch's leading axes.

    Attributes:
      mesh: the mesh.
      spec: for rows or for rows and tokens.
      shape: the number of rows and, for arrays that have them, of tokens in a row.
    """

    mesh: Any
    spec: PartitionSpec
    shape: tuple[int, ...]

    def of(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of an array with the batch's leading axes, or with rows and tokens merged into one axis.

        The other axes are unconstrained. None for an array of any other shape.
        """
        n = len(self.spec)
        flat = n == 1 and shape[:1] == (math.prod(self.shape),)
        if len(shape) <= n or not (flat or shape[:n] == self.shape[:n]):
            return None
        return NamedSharding(self.mesh, PartitionSpec(*self.spec, *[PartitionSpec.UNCONSTRAINED] * (len(shape) - n)))


def layout_on(mesh: Mesh | None, batch: Any) -> Layout | None:
    """The `Layout` that `shard_batch` gives a batch on this mesh; None without a mesh. Works on traced arrays."""
    if mesh is None:
        return None
    first = max(jax.tree.leaves(batch), key=np.ndim)
    spec = trimmed(batch_shardings(first, mesh).spec)
    return Layout(automatic(mesh), spec, first.shape[:2]) if spec else None


def layout_of(batch: Any, parts: int = 1) -> Layout | None:
    """The `Layout` of one of ``parts`` micro-batches of a batch, read off its first sharded array; None if none is."""
    for x in jax.tree.leaves(batch):
        sharding = named_sharding(x)
        if sharding is not None and (spec := trimmed(sharding.spec)) and x.shape[0] % parts == 0:
            return Layout(sharding.mesh, spec, (x.shape[0] // parts, *x.shape[1:2]))
    return None


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def constrained(layout: Layout | None) -> Iterator[None]:
    """Inside, constrains module outputs to keep the batch's row sharding; XLA chooses the other axes.

    Without it XLA may follow the weights instead: an embedding sharded over its width would give activations that are
    sharded over their width, with every row on every device.
    """
    if layout is None:
        yield
        return

    def pin(x: Any) -> Any:
        sharding = layout.of(x.shape) if isinstance(x, jax.Array) else None
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    token = _current.set(layout)
    try:
        with map_outputs(pin), mapped_outputs(pin):  # of any Linen module, and of NNX models that run with a Peft
            yield
    finally:
        _current.reset(token)


def tokens_are_spread() -> bool:
    """Whether this is traced inside `constrained` with a layout that shards the tokens of a row."""
    layout = _current.get()
    return layout is not None and any(entry is not None for entry in layout.spec[1:])
