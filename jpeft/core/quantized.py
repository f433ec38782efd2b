"""The quantized weight: a box of codes and scales that dequantizes itself, and quantizing one array.

`jpeft.quantization` quantizes whole parameter trees.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jpeft.core import fingerprint
from jpeft.core.placement import num_shards, place, trimmed
from jpeft.core.schemes import GROUP, SCALE_CODES, SCHEMES
from jpeft.core.tree import Path, box_as, join, named_sharding, peek

# --- the box --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Quantized(meta.AxisMetadata):
    """A weight as codes and scales. `unbox`, which Flax calls when a module reads the parameter, dequantizes it.

    Attributes:
      codes: `[..., in, out]`. int8 for "int8"; for "fp8", uint8 with the bytes of float8_e4m3fn; for 4-bit schemes,
        uint8 with two codes to a byte along `axis`, the first in the high half.
      scales: one for each block, `[..., in / block, out]` for `axis` -2. float32, or uint8 codes of `SCALE_CODES` if
        `groups` is given.
      groups: the scales of `GROUP` scales each, float32 `[..., n]`, in bitsandbytes' order of scales; or None.
      offset: the mean that was subtracted from the scales before their quantization, float32 `[...]`; or None.
      origin: the checksum of the original weight, uint32 `[..., 2]`, repeated for each matrix of a stack. It gives a
        quantized base the same fingerprint as the original one.
      scheme: a key of `SCHEMES`.
      block: the number of weights that share a scale.
      axis: the axis of one layer along which blocks run, -2 or -1.
      dtype: the dtype of the weight.
      stack: the axes of codes and scales that scans and vmaps slice off, outermost first; empty if they lead. Groups,
        offset and origin have these axes first.

    >>> q = quantize_array(jnp.ones((64, 2)), "nf4")
    >>> q.shape, q.codes.shape, q.scales.shape, float(q.unbox()[0, 0])
    ((64, 2), (32, 2), (1, 2), 1.0)
    """

    codes: Any
    scales: Any
    groups: Any
    offset: Any
    origin: Any
    scheme: str
    block: int
    axis: int
    dtype: Any
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        shape = list(np.shape(meta.unbox(self.codes)))
        if shape:
            shape[self.stored_axis] *= 8 // SCHEMES[self.scheme].bits
        return tuple(shape)

    @property
    def stored_axis(self) -> int:
        """The axis of codes and scales along which blocks run, counted from the last."""
        if not self.stack:
            return self.axis
        ndim = np.ndim(meta.unbox(self.codes))
        return stack_order(ndim, self.stack)[self.axis] - ndim

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Stored bits per weight, the checksum not counted."""
        return 8 * (self.nbytes - meta.unbox(self.origin).size * 4) / self.size

    @property
    def sharding(self) -> Any:
        """The sharding of the codes, which have the weight's axes."""
        return getattr(meta.unbox(self.codes), "sharding", None)

    def unbox(self) -> Float[Array, "*shape"]:
        """The weight, dequantized in float32 and then cast to its dtype."""
        codes, scales = meta.unbox(self.codes), self.float_scales()
        scheme, axis = SCHEMES[self.scheme], self.stored_axis
        if scheme.bits == 4:
            # The new axis comes right after `axis`, so that the reshape restores the order of the weights.
            pair = jnp.stack([codes >> 4, codes & 15], axis=axis)
            codes = pair.reshape(self.shape)
        values = _split_blocks(scheme.decode(codes), self.block, axis) * jnp.expand_dims(scales, axis)
        return values.reshape(self.shape).astype(self.dtype)

    def float_scales(self) -> Float[Array, "*scales"]:
        """The scale of each block in float32."""
        scales = meta.unbox(self.scales)
        if self.groups is None:
            return scales
        assert self.offset is not None
        order = stack_order(scales.ndim, self.stack)
        scales = jnp.transpose(scales, order)
        unit = jnp.asarray(SCALE_CODES).at[scales.astype(jnp.int32)].get(mode="promise_in_bounds")
        flat = _flatten_scales(unit, self.axis)
        # Their axes of size 1, which `remove_axis` may have added, go.
        groups, offset = (jnp.reshape(x, (*flat.shape[:-1], -1)) for x in (self.groups, self.offset))
        wide = jnp.repeat(groups, GROUP, axis=-1)[..., : flat.shape[-1]]
        return _stored(_unflatten_scales(flat * wide + offset, scales.shape, self.axis), order)

    # --- the interface that Flax and JAX call ---

    def replace_boxed(self, val: Any) -> Any:
        """An unquantized weight in the box of logical names that the codes are in."""
        return meta.replace_boxed(self.codes, val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        # Flax has stacked all arrays along this axis.
        leads = not self.stack and index % np.ndim(meta.unbox(self.codes)) == 0
        stack = () if leads else (index, *self.stack)
        new = self._map_rest(lambda x: jnp.moveaxis(x, index, 0), stack)._without_padding()
        return new._map_boxes(lambda box: box.add_axis(index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        """The weight as Flax slices it next: along this axis, in all its arrays.

        Raises:
          ValueError: blocks run along the axis.
        """
        return self._sliceable(index)._map_boxes(lambda box: box.remove_axis(index, params))

    def problem_with_stack(self, stack: Sequence[int]) -> str | None:
        """Why scans that slice off these axes cannot slice the weight, as the end of an error message; or None."""
        ndim = np.ndim(meta.unbox(self.codes))
        if ndim + self.stored_axis not in stack_order(ndim, stack)[: len(stack)]:
            return None
        return (
            f"is quantized in blocks along axis {ndim + self.stored_axis}, along which the model stacks its layers; "
            "give jpeft.quantize the model: jpeft.quantize(params, scheme, model, *inputs)"
        )

    def _sliceable(self, index: int) -> Quantized:
        ndim = np.ndim(meta.unbox(self.codes))
        at = index % ndim
        if not self.stack and at == 0:
            return self._without_padding()
        own = self if self.stack and self.stack[0] % ndim == at else self._stacked_along(at)
        return own._without_padding()._map_rest(lambda x: _place_first(x, index), own.stack[1:])

    def _stacked_along(self, at: int) -> Quantized:
        """The weight as a stack along an axis for which it was not quantized: groups of scales may cross layers."""
        if problem := self.problem_with_stack((at,)):
            raise ValueError(f"a weight of shape {self.shape} {problem}")
        ndim, axis = np.ndim(meta.unbox(self.codes)), self.stored_axis
        lead = [self.shape[i] for i in stack_order(ndim, (at,))[:-2]]
        return dataclasses.replace(
            self,
            scales=box_as(self.scales, self.float_scales()),
            groups=None,
            offset=None,
            origin=jnp.broadcast_to(jnp.reshape(self.origin, (-1, 2))[0], (*lead, 2)),
            axis=axis + 1 if at > ndim + axis else axis,
            stack=(at,),
        )

    def _without_padding(self) -> Quantized:
        """Without the axes of size 1 that `_place_first` adds, of which a slice keeps some."""
        shape = np.shape(meta.unbox(self.codes))
        lead = [shape[i] for i in stack_order(len(shape), self.stack)[:-2]]

        def reshaped(x: Any, rest: list[int]) -> Any:
            return x if x is None or np.ndim(x) == len(lead) + len(rest) else jnp.reshape(x, (*lead, *rest))

        return dataclasses.replace(
            self,
            groups=reshaped(self.groups, [-1]),
            offset=reshaped(self.offset, []),
            origin=reshaped(self.origin, [2]),
        )

    def _map_rest(self, fn: Callable[[Any], Any], stack: tuple[int, ...]) -> Quantized:
        """Maps a function over the arrays that do not have the weight's axes."""
        rest = {name: getattr(self, name) for name in ("groups", "offset", "origin")}
        return dataclasses.replace(self, **{n: None if x is None else fn(x) for n, x in rest.items()}, stack=stack)

    def _map_boxes(self, fn: Callable[[meta.AxisMetadata], Any]) -> Quantized:
        codes, scales = (fn(x) if isinstance(x, meta.AxisMetadata) else x for x in (self.codes, self.scales))
        return dataclasses.replace(self, codes=codes, scales=scales)

    def get_partition_spec(self) -> Quantized:
        """For ``nn.get_partition_spec``: codes and scales have the weight's spec, the rest is replicated."""
        spec = meta.get_partition_spec(self.codes)
        return dataclasses.replace(jax.tree.map(lambda _: PartitionSpec(), self), codes=spec, scales=spec)

    def tree_flatten(self) -> tuple[Any, Any]:
        aux = (self.scheme, self.block, self.axis, self.dtype, self.stack)
        return (self.codes, self.scales, self.groups, self.offset, self.origin), aux

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Quantized:
        return cls(*children, *aux)


def stack_order(ndim: int, stack: Sequence[int]) -> tuple[int, ...]:
    """The axes of an array with those of a stack first.

    Args:
      ndim: the number of axes.
      stack: the axes that are sliced off, outermost first, each counted without those before it.

    >>> stack_order(4, (1, 1)), stack_order(3, (-1,))
    ((1, 2, 0, 3), (2, 0, 1))
    """
    rest = list(range(ndim))
    first = [rest.pop(axis) for axis in stack]
    return (*first, *rest)


def _stored(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """The array with its axes in their places again, after ``jnp.transpose(x, order)``."""
    return jnp.transpose(x, [order.index(axis) for axis in range(len(order))])


def _place_first(x: jax.Array, index: int) -> jax.Array:
    """The array with its first axis at an index, which axes of size 1 make room for."""
    if index >= 0:
        return jnp.moveaxis(x.reshape(x.shape[0], *[1] * index, *x.shape[1:]), 0, index)
    return jnp.moveaxis(x.reshape(*x.shape, *[1] * (-1 - index)), 0, index)


def unreadable(path: Path, leaf: Quantized) -> str:
    """The error for a quantized weight that a model reads through a function of its tree."""
    return (
        f"{join(path)!r} is quantized ({leaf.scheme}), but the model reads it through a function of its parameters "
        "(nn.map_variables, weight normalization), which would see codes; leave it out of jpeft.quantize, e.g. by "
        "giving it the model"
    )


def _split_blocks(x: jax.Array, block: int, axis: int) -> jax.Array:
    """The array with an axis split in two: blocks, and weights in a block."""
    shape = list(x.shape)
    at = x.ndim + axis
    return x.reshape(*shape[:at], shape[at] // block, block, *shape[at + 1 :])


def _flatten_scales(scales: jax.Array, axis: int) -> jax.Array:
    """The scales of each matrix on one axis, in bitsandbytes' order: output by output."""
    ordered = jnp.swapaxes(scales, -1, -2) if axis == -2 else scales
    return ordered.reshape(*scales.shape[:-2], -1)


def _unflatten_scales(flat: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Inverse of `_flatten_scales`."""
    if axis == -1:
        return flat.reshape(shape)
    return jnp.swapaxes(flat.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)


def block_axis(shape: tuple[int, ...], block: int) -> int | None:
    """The axis along which blocks run: -2, or -1 if blocks do not divide -2, or None if they divide neither.

    >>> block_axis((576, 192), 64), block_axis((576, 9, 64), 64), block_axis((10, 7), 64)
    (-2, -1, None)
    """
    return next((axis for axis in (-2, -1) if len(shape) >= 2 and shape[axis] % block == 0 and shape[axis]), None)


def quantize_array(
    weight: Any, scheme: str = "nf4", block: int = 64, double: bool = True, stack: Sequence[int] = ()
) -> Quantized:
    """Quantizes one weight, `[..., in, out]`. Every matrix of a stack has its own scales.

    Args and errors as for `jpeft.quantize`. Traceable; an abstract weight gives an abstract result.

    Args:
      stack: the axes along which layers are stacked, see `Quantized`; without them, layers have the other two axes.

    >>> quantize_array(jnp.ones((2, 128, 8)), "int8").codes.dtype
    dtype('int8')
    """
    return _quantize_part(weight, scheme, block, double, 0, stack)


def quantize_part(like: Quantized, weight: Any, start: int) -> Quantized:
    """Quantizes one matrix of a stack in the same way as `like`.

    Args:
      like: sets scheme, block and double quantization.
      weight: the matrix.
      start: index of its first element in the stack. The `origin`s of all matrices add up to the stack's.

    >>> stack = jnp.ones((2, 64, 2)) * jnp.arange(2.0)[:, None, None]
    >>> whole = quantize_array(stack)
    >>> sum(quantize_part(whole, w, i * 128).origin for i, w in enumerate(stack)) == whole.origin[0]
    Array([ True,  True], dtype=bool)
    """
    return _quantize_part(weight, like.scheme, like.block, like.groups is not None, start)


def _quantize_part(
    weight: Any, scheme: str, block: int, double: bool, start: int, stack: Sequence[int] = ()
) -> Quantized:
    check_scheme(scheme, block)
    shape, dtype = np.shape(weight), np.dtype(weight.dtype)
    if isinstance(weight, Quantized):
        raise ValueError(f"is quantized already, as {weight.scheme}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"is {dtype}, expected a floating dtype")
    if not math.prod(shape):
        raise ValueError(f"has shape {shape}, which holds no elements")
    layer = tuple(shape[at] for at in stack_order(len(shape), stack)[len(stack) :])
    axis, stack = block_axis(layer, block), tuple(stack) if any(stack) else ()
    if axis is None:
        each = f" in each layer of {shape}" if stack else ""
        raise ValueError(
            f"has shape {layer if stack else shape}{each}: a block of {block} divides neither of its last two axes; "
            "try another block="
        )
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda w: _quantize(w, scheme, block, double, axis, stack, np.uint32(0)), weight)
    # Checked on the weight, not on the scales: on XLA CPU the maximum of a block with a NaN may be a number.
    if not isinstance(weight, Tracer) and not bool(jnp.isfinite(weight).all()):
        raise ValueError("holds NaN or infinity, which no code represents")
    return _quantize(weight, scheme, block, double, axis, stack, np.uint32(start % 2**32))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize(
    weight: jax.Array, name: str, block: int, double: bool, axis: int, stack: tuple[int, ...], start: Any
) -> Quantized:
    order = stack_order(weight.ndim, stack)
    own = jnp.transpose(weight, order)  # layers first
    scheme, shape = SCHEMES[name], own.shape
    wide = _split_blocks(own.astype(jnp.float32), block, axis)
    scales = jnp.abs(wide).max(axis=axis)
    # A block of zeros has scale 0.
    codes = scheme.encode(wide / jnp.expand_dims(jnp.where(scales == 0, 1.0, scales), axis)).reshape(shape)
    if scheme.bits == 4:
        pair = _split_blocks(codes, 2, axis)
        high, low = (jax.lax.index_in_dim(pair, i, axis, keepdims=False) for i in range(2))
        codes = (high << 4) | low
    sums = jnp.broadcast_to(fingerprint.checksum(weight, start), (*shape[:-2], 2))
    scales, groups, offset = _quantize_scales(scales, axis) if double else (scales, None, None)
    codes, scales = _stored(codes, order), _stored(scales, order)
    return Quantized(codes, scales, groups, offset, sums, name, block, axis, weight.dtype, stack)


def _quantize_scales(scales: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The codes, group scales and offset of scales: the double quantization of QLoRA."""
    flat = _flatten_scales(scales, axis)
    offset = _pairwise_mean(flat)
    moved = flat - offset[..., None]
    padding = -flat.shape[-1] % GROUP
    grouped = jnp.pad(moved, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
    grouped = grouped.reshape(*flat.shape[:-1], -1, GROUP)
    groups = jnp.abs(grouped).max(axis=-1)
    unit = grouped / jnp.where(groups == 0, 1.0, groups)[..., None]
    middles = jnp.asarray((SCALE_CODES[1:] + SCALE_CODES[:-1]) / 2)
    codes = jnp.searchsorted(middles, unit.reshape(-1)).astype(jnp.uint8).reshape(*flat.shape[:-1], -1)
    return _unflatten_scales(codes[..., : flat.shape[-1]], scales.shape, axis), groups, offset


def _pairwise_mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis, summed pairwise.

    The order of XLA's own sum depends on shape and device: a stack would have other scales than its layers alone.
    """
    size = x.shape[-1]
    unit = jnp.where(x.max() > 2.0**96, jnp.float32(2.0**-32), jnp.float32(1))  # keeps the sum from overflowing
    total = jnp.pad(x * unit, [(0, 0)] * (x.ndim - 1) + [(0, (1 << (size - 1).bit_length()) - size)])
    while total.shape[-1] > 1:
        low, high = jnp.split(total, 2, axis=-1)
        total = low + high
    return total[..., 0] / size / unit


def dequantize_leaf(leaf: Any) -> Any:
    """A leaf without boxes, dequantized; abstract if the leaf is abstract.

    >>> dequantize_leaf(quantize_array(jnp.ones((64, 2)))).shape
    (64, 2)
    """
    if not isinstance(leaf, Quantized):
        return meta.unbox(leaf)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)):
        return jax.eval_shape(Quantized.unbox, leaf)
    return _unbox_jitted(leaf)


def open_boxes(leaf: Any) -> Any:
    """A leaf without the boxes that name its axes; a quantized weight stays quantized.

    >>> open_boxes(quantize_array(jnp.ones((64, 2)))).scheme
    'nf4'
    """
    if not isinstance(leaf, Quantized):
        return meta.unbox(leaf)
    return dataclasses.replace(leaf, codes=meta.unbox(leaf.codes), scales=meta.unbox(leaf.scales))


def origin_of_stack(rows: Any) -> np.ndarray:
    """The checksum (`origin`) of a stack, from the checksums of its layers.

    If all are equal, the layers were cut from one stack and it is theirs. Otherwise it is a checksum of the layers'
    checksums, because the checksum of the stacked weights is not known.

    >>> origin_of_stack([[1, 2], [1, 2]]), origin_of_stack([[1, 2], [3, 4]]).shape
    (array([1, 2], dtype=uint32), (2,))
    """
    rows = np.asarray(rows, np.uint32)
    return rows[0] if (rows == rows[0]).all() else fingerprint.sums_of(rows)


def requantize_leaf(like: Quantized, weight: Any) -> Quantized:
    """Quantizes another weight in the same way as `like`.

    >>> requantize_leaf(quantize_array(jnp.ones((64, 2)), "int8"), jnp.zeros((64, 2))).scheme
    'int8'
    """
    return quantize_leaf(weight, like.scheme, like.block, like.groups is not None, like.stack)


@jax.jit
def _unbox_jitted(leaf: Quantized) -> jax.Array:
    return leaf.unbox()


def check_scheme(scheme: str, block: int) -> None:
    """Raises a ValueError for an unknown scheme or a block that is not an even number."""
    if not isinstance(scheme, str):
        raise ValueError(
            f"scheme must be one of {', '.join(SCHEMES)}, got an object of type {type(scheme).__name__}; a model or a "
            'Peft comes after it: jpeft.quantize(params, "nf4", peft)'
        )
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; expected one of {', '.join(SCHEMES)}")
    if isinstance(block, bool) or not isinstance(block, int | np.integer) or block < 2 or block % 2:
        raise ValueError(f"block must be an even number of weights, got {block!r}")


def quantize_leaf(leaf: Any, scheme: str, block: int, double: bool, stack: Sequence[int] = ()) -> Quantized:
    """Quantizes a leaf of a tree; its box and sharding stay. See `quantize_array`."""
    held = peek(leaf)
    new = quantize_array(held, scheme, block, double, stack)
    if (sharding := named_sharding(held)) is not None:
        new = jax.tree.map(place, new, shardings_like(new, sharding))
    if isinstance(leaf, meta.AxisMetadata) and not isinstance(leaf, Quantized):
        new = dataclasses.replace(
            new, codes=meta.replace_boxed(leaf, new.codes), scales=meta.replace_boxed(leaf, new.scales)
        )
    return new


def shardings_like(leaf: Quantized, sharding: NamedSharding) -> Quantized:
    """The shardings of a quantized weight's arrays, from the sharding of the weight.

    Codes and scales are sharded like the weight, except on axes that are now too short for the mesh. The other arrays
    are tiny and replicated.
    """
    spec = (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]

    def fitting(shape: tuple[int, ...]) -> NamedSharding:
        pairs = zip(shape, spec, strict=True)
        entries = [entry if size % num_shards(sharding.mesh, entry) == 0 else None for size, entry in pairs]
        return NamedSharding(sharding.mesh, trimmed(entries))

    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    codes, scales = meta.unbox(leaf.codes), meta.unbox(leaf.scales)
    rest = jax.tree.map(lambda _: replicated, leaf)
    return dataclasses.replace(rest, codes=fitting(codes.shape), scales=fitting(scales.shape))
