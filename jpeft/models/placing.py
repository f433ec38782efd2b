"""Places a model's tensors on devices as they are read, so that host memory holds one or two of them at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jpeft.core import tree
from jpeft.core.quantized import Quantized, origin_of_stack, shardings_like
from jpeft.core.stacking import DIFFER
from jpeft.errors import ModelError
from jpeft.models.layout import Slot, first_names
from jpeft.models.reading import TensorReader


def shardings_by_path(shardings: Any, model: nn.Module, shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sharding of each leaf by path, from the `shardings` argument of `load`.

    Raises:
        ModelError: a tree of shardings does not have the parameters' structure.
    """
    if callable(shardings) and not isinstance(shardings, Sharding):
        shardings = shardings(model)
    if shardings is None or isinstance(shardings, Sharding):
        return dict.fromkeys(shapes, shardings)
    by_path = {tree.join(path): leaf for path, leaf in tree.flatten(shardings).items()}
    if by_path.keys() != shapes.keys():
        differ = sorted(by_path.keys() ^ shapes.keys())
        raise ModelError(
            f"the tree of shardings does not match the parameters: {first_names(differ)} in one of them only"
        )
    return by_path


def place_leaves(
    shapes: Mapping[str, Any], slots: Sequence[Slot], reader: TensorReader, shardings: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads every tensor and places it. The result has the order of ``shapes``.

    The largest tensors go first, while there is room for a second copy of them.
    """
    placed: dict[str, Any] = {}
    origins: dict[str, list[np.ndarray]] = {}
    has_stored_origin: dict[str, bool] = {}
    for slot in sorted(slots, key=lambda slot: -math.prod(slot.shape)):
        (value, stored), path, sharding = reader.read(slot), slot.path, shardings[slot.path]
        if isinstance(value, Quantized):
            origins.setdefault(path, []).append(np.asarray(value.origin))
            has_stored_origin[path] = has_stored_origin.get(path, False) or stored
        if slot.layer is None:
            placed[path] = _map_arrays(_put, value, _array_shardings(value, sharding))
            continue
        if path not in placed:
            placed[path] = _empty_stack(value, shapes[path].shape[0], sharding)
        if jax.tree.structure(placed[path]) != jax.tree.structure(value):
            raise ModelError(f"{reader.file(slot)}: {path} is not quantized alike in all layers: {DIFFER}")
        stack_shardings = _array_shardings(placed[path], sharding)
        layer = _map_arrays(_put, value, [_layer_sharding(sharding) for sharding in stack_shardings])
        del value  # before the next tensor is read
        placed[path] = _set_layer(placed[path], layer, slot.layer, stack_shardings)
        del layer
    for path, own in origins.items():
        # Contributions of layers add up to the checksum of the stack.
        origin = origin_of_stack(own) if has_stored_origin[path] else np.sum(own, axis=0, dtype=np.uint32)
        placed[path] = _replace_origin(placed[path], origin, shardings[path])
    return {path: placed[path] for path in shapes}


def _replace_origin(leaf: Quantized, origin: Any, sharding: Any) -> Quantized:
    rows = np.broadcast_to(origin, leaf.origin.shape)
    return dataclasses.replace(leaf, origin=_put(rows, _array_shardings(leaf, sharding)[-1]))


def _array_shardings(leaf: Any, sharding: Any) -> list[Any]:
    """The shardings of a leaf's arrays. A plain leaf is one array, a quantized one several."""
    if isinstance(leaf, Quantized) and isinstance(sharding, NamedSharding):
        return jax.tree.leaves(shardings_like(leaf, sharding))
    return [sharding] * len(jax.tree.leaves(leaf))


def _layer_sharding(sharding: Any) -> Any:
    """The sharding of one layer of a stacked array."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _map_arrays(fn: Callable[[Any, Any], Any], leaf: Any, shardings: Sequence[Any]) -> Any:
    """Maps `fn(array, sharding)` over a leaf's arrays."""
    arrays, structure = jax.tree.flatten(leaf)
    return jax.tree.unflatten(structure, [fn(x, sharding) for x, sharding in zip(arrays, shardings, strict=True)])


def _put(value: Any, sharding: Any) -> jax.Array:
    if sharding is None:
        array = jax.device_put(value, may_alias=False)  # a copy: the file's own memory is unmapped later
    else:
        value = np.asarray(value)
        array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.block_until_ready(array)  # a transfer that is not finished keeps the value in host memory


def _empty_stack(layer: Any, layers: int, sharding: Any) -> Any:
    """A leaf of zeros for as many layers as this one."""

    def zeros(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        # Not a lambda, which would be compiled again for every leaf.
        return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(x.shape, x.dtype)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), layer)
    return _map_arrays(zeros, shapes, _array_shardings(shapes, sharding))


def _set_layer(stack: Any, layer: Any, i: int, shardings: Sequence[Any]) -> Any:
    """Writes a layer into a stacked leaf, in place."""
    arrays = zip(jax.tree.leaves(stack), jax.tree.leaves(layer), shardings, strict=True)
    written = [_set_jitted(sharding)(x, own, i) for x, own, sharding in arrays]
    return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(stack), written))


@functools.cache
def _set_jitted(sharding: Any) -> Any:
    def set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)
