"""Batches on a mesh, and activations that keep their sharding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.core.placement import AnyMesh, automatic, axes_of, place, trimmed
from jpeft.core.tree import named_sharding
from jpeft.parallel.mesh import DATA_AXES, SEQUENCE_AXIS

# ------------------------------------------------------------------------------------------------ batches, activations


def batch_shardings(batch: Any, mesh: AnyMesh) -> Any:
    """Where the arrays of a batch go: rows over "data" and "fsdp", tokens over "sequence", as far as the mesh has them.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> batch_shardings(np.ones((8, 16)), mesh).spec
    P('data',)
    """
    mesh = automatic(mesh)
    rows = tuple(name for name in DATA_AXES if name in mesh.axis_names)
    tokens = SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.axis_names else None
    entry = rows[0] if len(rows) == 1 else rows or None

    def one(path: Any, x: Any) -> NamedSharding:
        spec = (entry, tokens)[: np.ndim(x)]
        for size, name in zip(np.shape(x), spec, strict=False):
            ways = math.prod(mesh.shape[axis] for axis in axes_of(name))
            if size % ways:
                raise ValueError(f"the batch's {jax.tree_util.keystr(path) or 'array'} of shape {np.shape(x)}: {size} "
                                 f"does not divide over {name!r}, which is {ways} wide")  # fmt: skip
        return NamedSharding(mesh, PartitionSpec(*trimmed(spec)))

    return jax.tree_util.tree_map_with_path(one, batch)


def shard_batch(batch: Any, mesh: AnyMesh, rows: int | None = None) -> Any:
    """A batch in its place on a mesh.

    Args:
      rows: how many the batch has, where each host gives those of its own devices alone (`local_rows`). None: each
        host gives them all, and moves its own.

    Raises:
      ValueError: rows or tokens that do not divide over the mesh.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> shard_batch({"ids": np.ones((8, 16))}, mesh)["ids"].shape
    (8, 16)
    """
    if rows is None:
        return jax.tree.map(place, batch, batch_shardings(batch, mesh))
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    put = lambda x, to, all: jax.make_array_from_process_local_data(to, x, all.shape)  # noqa: E731
    return jax.tree.map(put, batch, batch_shardings(whole, mesh), whole)


def data_ways(mesh: AnyMesh) -> int:
    """How many parts a batch's rows are spread in.

    >>> data_ways(jax.make_mesh((1,), ("tensor",)))
    1
    """
    return math.prod(mesh.shape[name] for name in DATA_AXES if name in mesh.axis_names)


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Which of a batch's rows lie on this host's devices: what it has to read.

    >>> local_rows(4, jax.make_mesh((1,), ("data",)))
    array([0, 1, 2, 3])
    """
    sharding = batch_shardings(jax.ShapeDtypeStruct((rows,), np.int32), mesh)
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


class Layout(NamedTuple):
    """How a batch's rows, and perhaps its tokens, are spread."""

    mesh: Any
    spec: PartitionSpec
    shape: tuple[int, ...]  # rows and, where it has them, tokens of a row

    def of(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array goes whose leading axes are the batch's, or its rows and tokens as one axis."""
        n = len(self.spec)
        flat = n == 1 and shape[:1] == (math.prod(self.shape),)
        if len(shape) <= n or not (flat or shape[:n] == self.shape[:n]):
            return None
        return NamedSharding(self.mesh, PartitionSpec(*self.spec, *[PartitionSpec.UNCONSTRAINED] * (len(shape) - n)))


def layout_on(mesh: Mesh | None, batch: Any) -> Layout | None:
    """That of a batch which `shard_batch` puts on a mesh; of no mesh there is none. For what is being traced."""
    if mesh is None:
        return None
    first = max(jax.tree.leaves(batch), key=np.ndim)
    spec = trimmed(batch_shardings(first, mesh).spec)
    return Layout(automatic(mesh), PartitionSpec(*spec), first.shape[:2]) if spec else None


def layout_of(batch: Any, parts: int = 1) -> Layout | None:
    """That of a batch which is cut into so many parts, from its first array that is spread over a mesh."""
    for x in jax.tree.leaves(batch):
        sharding = named_sharding(x)
        if sharding is not None and (spec := trimmed(sharding.spec)) and x.shape[0] % parts == 0:
            return Layout(sharding.mesh, PartitionSpec(*spec), (x.shape[0] // parts, *x.shape[1:2]))
    return None


@contextlib.contextmanager
def constrained(layout: Layout | None) -> Iterator[None]:
    """What modules called in here return keeps its rows spread as the batch's are; other axes are XLA's to choose.

    Without it XLA may follow the weights instead: an embedding sharded over its width makes activations that are
    sharded over their width, with every row on every chip.
    """
    if layout is None:
        yield
        return

    def pin(x: Any) -> Any:
        where = layout.of(x.shape) if isinstance(x, jax.Array) else None
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return jax.tree.map(pin, call(*args, **kwargs))

    token = _running.set(layout)
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        _running.reset(token)


_running: ContextVar[Layout | None] = ContextVar("running", default=None)


def tokens_are_spread() -> bool:
    """Whether what is being traced has the tokens of a row on several devices, as a batch within `constrained` says."""
    layout = _running.get()
    return layout is not None and any(entry is not None for entry in layout.spec[1:])
