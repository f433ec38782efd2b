"""The codes of quantized weights: the schemes, and the codebook of quantized scales."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# bitsandbytes 0.50, `functional.get_4bit_type("nf4")`: quantiles of the normal distribution, scaled to a largest of 1.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
GROUP = 256  # the number of scales that share a group scale in double quantization


def _dynamic_map() -> np.ndarray:
    """The codebook of quantized scales: the 256 values of bitsandbytes' `create_dynamic_map()`, sorted."""
    f32 = np.float32
    first, last, values = f32(0.1), f32(1), []
    for exponent in range(7):
        # As torch.linspace(0.1, 1) computes it: from both ends to the middle, each product and sum rounded once.
        pieces = 2**exponent
        step, i = np.float64((last - first) / f32(pieces)), np.arange(pieces + 1)
        ends = np.where(2 * i < pieces, first + step * i, last - step * (pieces - i)).astype(f32)
        values.append(f32(10.0 ** (exponent - 6)) * ((ends[1:] + ends[:-1]) / f32(2)))
    positive = np.concatenate(values)
    return np.sort(np.concatenate([-positive, [f32(0)], positive, [f32(1)]]))


SCALE_CODES = _dynamic_map()


@dataclass(frozen=True)
class Scheme:
    """A code for weights in [-1, 1].

    Attributes:
      bits: bits of a code; two 4-bit codes share a byte.
      encode: weights to codes.
      decode: codes to weights in float32.
    """

    bits: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def _encode_nf4(x: jax.Array) -> jax.Array:
    levels = np.asarray(NF4, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    return functools.reduce(jnp.add, [(x > m).astype(jnp.uint8) for m in middles])


def _decode_nf4(codes: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(codes, tpu=_decode_nf4_by_bits, default=_decode_nf4_by_lookup)


def _decode_nf4_by_lookup(codes: jax.Array) -> jax.Array:
    return jnp.asarray(NF4, jnp.float32).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _decode_nf4_by_bits(codes: jax.Array) -> jax.Array:
    # A tree of selects, one level for each bit, because gathers are slow on TPUs. On CPU, XLA would hoist every level
    # out of the scan as an array of the weight's size.
    values: list[Any] = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _encode_int(x: jax.Array, largest: int) -> jax.Array:
    return jnp.clip(jnp.round(x * largest), -largest, largest)


def _encode_int4(x: jax.Array) -> jax.Array:
    return (_encode_int(x, 7) + 8).astype(jnp.uint8)


def _decode_int4(codes: jax.Array) -> jax.Array:
    return (codes.astype(jnp.float32) - 8) / 7


def _encode_int8(x: jax.Array) -> jax.Array:
    return _encode_int(x, 127).astype(jnp.int8)


def _decode_int8(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) / 127


_FP8_MAX = 448.0  # the largest float8_e4m3fn


def _encode_fp8(x: jax.Array) -> jax.Array:
    # Stored as bytes: XLA CPU would convert a stack of float8 to float16 outside the scan that slices it.
    return jax.lax.bitcast_convert_type((x * _FP8_MAX).astype(jnp.float8_e4m3fn), jnp.uint8)


def _decode_fp8(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32) / _FP8_MAX


SCHEMES: Mapping[str, Scheme] = {
    "nf4": Scheme(4, _encode_nf4, _decode_nf4),
    "int4": Scheme(4, _encode_int4, _decode_int4),
    "int8": Scheme(8, _encode_int8, _decode_int8),
    "fp8": Scheme(8, _encode_fp8, _decode_fp8),
}
