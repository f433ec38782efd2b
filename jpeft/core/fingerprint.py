"""Fingerprints of a base tree: they identify the model that an adapter was trained on.

Every leaf has a checksum over its bits and their positions, in wrapping 32-bit arithmetic: the same from numpy, on an
accelerator and across shards. It detects mistakes (another model, revision or dtype), not forgeries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.tree import Tree, flatten, join, peek

_CHUNK = 1 << 18  # elements at a time on the host, so that temporaries fit in cache


def fingerprint(params: Tree) -> dict[str, str]:
    """Dtype, shape and checksum by path: ``{"encoder/.../kernel": "float32[384,384]:1f0c99aa5e0b2d17", ...}``.

    Abstract leaves (``jax.ShapeDtypeStruct``) have no checksum: ``"float32[384,384]:"``.

    >>> fingerprint({"w": np.zeros(2, np.float32)})["w"].split(":")[0]
    'float32[2]'
    """
    return {join(path): _leaf(peek(leaf)) for path, leaf in flatten(params).items()}


def difference(saved: dict[str, str], params: Tree) -> str | None:
    """The first difference between ``params`` and the base with the fingerprint ``saved``, in words; None if equal."""
    leaves: dict[str, Any] = {join(path): peek(leaf) for path, leaf in flatten(params).items()}
    for name in sorted(saved.keys() | leaves.keys()):
        if name not in leaves:
            return f"it lacks {name!r} ({saved[name].split(':')[0]})"
        if name not in saved:
            return f"it has {name!r}, which the other lacks"
        shape = saved[name].split(":")[0]
        if shape != _shape(leaves[name]):
            return f"{name!r} is {_shape(leaves[name])}, expected {shape}"
    for name in sorted(saved):
        now = _leaf(leaves[name])
        if saved[name] != now and not (saved[name].endswith(":") or now.endswith(":")):
            return f"the values of {name!r} differ (checksum {now.split(':')[1]}, expected {saved[name].split(':')[1]})"
    return None


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _leaf(leaf: Any) -> str:
    origin = getattr(leaf, "origin", None)  # of a quantized weight, the checksum of the weight before
    if isinstance(leaf, jax.ShapeDtypeStruct) or isinstance(origin, jax.ShapeDtypeStruct):
        return _shape(leaf) + ":"
    if origin is not None:
        return f"{_shape(leaf)}:{in_hex(np.asarray(origin).reshape(-1, 2)[0])}"
    return f"{_shape(leaf)}:{in_hex(sums_of(leaf))}"


def sums_of(leaf: Any, start: int = 0) -> np.ndarray:
    """The two 32-bit sums of a leaf's checksum; or of a part of the leaf, which begins at element ``start``.

    The sums of the parts add up to those of the leaf.

    >>> whole = np.arange(6, dtype=np.float32)
    >>> np.array_equal(sums_of(whole), sums_of(whole[:4]) + sums_of(whole[4:], 4))
    True
    """
    on_host = not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())
    )
    return _on_host(np.asarray(leaf), start) if on_host else np.asarray(checksum(leaf, np.uint32(start % 2**32)))


def in_hex(sums: Any) -> str:
    """Two sums as 16 hexadecimal digits. Inverse of `from_hex`."""
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def from_hex(digits: str) -> np.ndarray:
    """Two sums from 16 hexadecimal digits. Inverse of `in_hex`.

    >>> in_hex(from_hex("1f0c99aa5e0b2d17"))
    '1f0c99aa5e0b2d17'
    """
    if len(digits) != 16:
        raise ValueError(f"{digits!r} is not 16 hexadecimal digits")
    return np.array([int(digits[:8], 16), int(digits[8:], 16)], np.uint32)


def _mix(bits: Any, index: Any) -> Any:
    """Murmur3's finalizer of a value and its position, for numpy and jax arrays of uint32."""
    u = np.uint32
    v = bits ^ (index * u(0x9E3779B9))
    v = (v ^ (v >> u(16))) * u(0x85EBCA6B)
    v = (v ^ (v >> u(13))) * u(0xC2B2AE35)
    return v ^ (v >> u(16))


def _on_host(x: np.ndarray, first: int = 0) -> np.ndarray:
    """`sums_of` in numpy."""
    x = np.ascontiguousarray(x.astype(np.int8) if x.dtype.name in ("int4", "uint4", "bool") else x).reshape(-1)
    width = min(x.dtype.itemsize, 4)
    bits = x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[width])
    total = np.zeros(2, np.uint32)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(first + start, first + start + part.size, dtype=np.uint64).astype(np.uint32)
        v = _mix(part, index)
        total = total + np.stack([v.sum(dtype=np.uint32), (v * (index | np.uint32(1))).sum(dtype=np.uint32)])
    return total


@jax.jit
def checksum(x: jax.Array, start: Any = 0) -> jax.Array:
    """`sums_of` on the leaf's own devices; traceable. ``start`` is below 2^32."""
    x = x.astype(jnp.int8) if x.dtype.name in ("int4", "uint4", "bool") else x
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
    # The row-major position of every element, from one axis after the other: without a reshape, shards stay in place.
    index, stride = jnp.full(bits.shape, start, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    v = _mix(bits, index)
    return jnp.stack([v.sum(dtype=jnp.uint32), (v * (index | jnp.uint32(1))).sum(dtype=jnp.uint32)])
