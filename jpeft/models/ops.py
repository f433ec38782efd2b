"""What the models compute in common: activations, softmax, attention, each in the form that its backend is fast at."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jpeft.core import backend
from jpeft.parallel.batches import tokens_are_spread

Mask = Bool[Array, "*#scores"] | None

# Milliseconds below are forward + backward on one core of XLA CPU.


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """`x * Phi(x)`, by erf as torch computes it.

    `nn.gelu` goes by erfc, which takes four times as long (2,048 x 1,536: 31 ms against 8). Checkpointed, because
    computing erf and exp again costs less than reading them back (6.5), and only `x` stays in memory, not three arrays.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def masked_softmax(scores: Float[Array, "*batch q k"], mask: Mask) -> Float[Array, "*batch q k"]:
    """Softmax over the last axis where `mask` is True, in float32 or wider."""
    wide = scores.astype(scores.dtype if scores.dtype.itemsize >= 4 else jnp.float32)
    if mask is not None:
        wide = jnp.where(mask, wide, jnp.finfo(wide.dtype).min)
    weights = jnp.exp(wide - wide.max(axis=-1, keepdims=True))
    return (weights * (1 / weights.sum(axis=-1, keepdims=True))).astype(scores.dtype)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # d softmax = p (ds - <p, ds>). p is the one residual, where autodiff keeps three; it is 0 where masked, so the mask
    # is not needed again.
    weights, ds = masked_softmax(*primals), tangents[0]
    return weights, weights * (ds - (weights * ds).sum(axis=-1, keepdims=True))


_TANH_GELU = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}


@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def rms_norm(
    x: Float[Array, "*batch features"], scale: Float[Array, " features"], eps: float, offset: float, dtype: Any
) -> Float[Array, "*batch features"]:
    """`x / rms(x) * (scale + offset)` over the last axis, in float32; for the backward pass only `x` stays in memory.

    >>> y = rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), 0.0, 0.0, jnp.float32)
    >>> [round(value, 4) for value in y.tolist()]
    [0.8485, 1.1314]
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * (scale.astype(jnp.float32) + offset)).astype(dtype)


@functools.partial(jax.checkpoint, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """`activation(gate) * up`; for the backward pass only these two stay in memory, not the three made between."""
    return ACTIVATIONS[activation](gate) * up


def tokens_in_one(x: Float[Array, "*batch features"]) -> Float[Array, "*tokens features"]:
    """`[batch, length, features]` as `[tokens, features]` where that is faster, else as it is.

    XLA CPU is: see `jpeft.geometry.base.flatten_tokens`. Whole layers run on it, so that what the backward pass needs
    is not kept in both shapes.

    >>> tokens_in_one(jnp.ones((4, 5, 3))).shape
    (20, 3)
    """
    return x.reshape(-1, x.shape[-1]) if backend.flatten_tokens() else x


def causal_mask(queries: int, keys: int, window: int | None = None, offset: Any = None) -> Bool[Array, "queries keys"]:
    """Which keys each query may see: those up to its own, and of these the last `window`, where one is given.

    Args:
      offset: the index among the keys of the first query's own. By default the keys end with the queries' own, and
        those before the first query's own (a prefix) are seen by all of them, whatever the window.

    >>> causal_mask(2, 3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    >>> causal_mask(3, 3, window=2).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    prefix = keys - queries if offset is None else 0
    key = jnp.arange(keys)[None]
    query = jnp.arange(queries)[:, None] + (keys - queries if offset is None else offset)
    seen = key <= query
    if window is not None:
        seen &= (query - key < window) | (key < prefix)
    return seen


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    causal: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention; each group of `heads / kv_heads` query heads shares a key and a value head.

    Args:
      mask: broadcasts to `[batch, heads, queries, keys]`, True where a query may attend. None is `causal_mask`.
      scale: of the scores. softcap: `c tanh(scores / c)` after it. window: of the causal mask, where `mask` is None.
      dropout: applied to the weights.
      causal: whether `mask` hides, as `causal_mask` does, all keys after a query's own: they need not be looked at.

    >>> x = jnp.ones((1, 3, 4, 8))
    >>> attention(x, x[:, :, :2], x[:, :, :2], scale=0.5).shape
    (1, 3, 4, 8)
    """
    queries, keys = query.shape[1], key.shape[1]
    if softcap is not None or dropout is not None or backend.flatten_tokens():
        mask = causal_mask(queries, keys, window) if mask is None else mask
        # Checkpointed: the weights are quadratic in the length, and kept for every layer they would outweigh all else.
        plain = _plain_attention if dropout else jax.checkpoint(_plain_attention, static_argnums=(4, 5, 6))
        return plain(query, key, value, mask, scale, softcap, dropout)
    cudnn = _cudnn_can(query, queries, keys, mask)
    if cudnn == "xla" and queries >= 2 * _BLOCK and queries <= keys and not tokens_are_spread():
        causal = causal or mask is None
        mask = causal_mask(queries, keys, window)[None, None] if mask is None else mask
        return _in_blocks(query, key, value, mask, scale, causal)
    if mask is None and queries == keys:
        # (left, right) keys beside a query's own
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=True, local_window_size=local, implementation=cudnn
        )
    mask = causal_mask(queries, keys, window)[None, None] if mask is None else mask
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=cudnn)


_BLOCK = 512  # queries
_BLOCKS = 8  # at most: each is compiled for itself


def _in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float, causal: bool
) -> jax.Array:
    """Some queries after the others, for XLA writes their scores to memory, in float32: 8 rows of 2,048 tokens in 32
    heads are 4 GiB, twice. The backward pass makes them again. Keys after a block's last query are left out, which is
    three eighths of all scores in four blocks."""
    queries, keys = query.shape[1], key.shape[1]
    size = max(_BLOCK, -(-queries // _BLOCKS))
    attend = jax.checkpoint(functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="xla"))
    out = []
    for first in range(0, queries, size):
        last = min(queries, first + size)
        seen = keys - queries + last if causal else keys
        part = mask[:, :, first if mask.shape[2] > 1 else 0 : last, : seen if mask.shape[3] > 1 else 1]
        block = query[:, first:last]
        if out:  # one after the other, forward and backward, or several would lie in memory at once
            block, out[-1] = jax.lax.optimization_barrier((block, out[-1]))
        out.append(attend(block, key[:, :seen], value[:, :seen], mask=part))
    return jnp.concatenate(out, axis=1)


def _cudnn_can(query: jax.Array, queries: int, keys: int, mask: Mask) -> Any:
    """ "cudnn" where its flash attention takes such operands, forward and backward, else "xla"."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    even = mask is None or (queries % 2 == 0 and keys % 2 == 0)
    cuda = (
        backend.backend() == jax.default_backend() == "gpu" and "cuda" in jax.local_devices()[0].client.platform_version
    )
    return "cudnn" if half and fits and even and cuda else "xla"


def _plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float, softcap: Any, dropout: Any
) -> jax.Array:
    # Heads go before positions once, and the query heads of a group are rows of one matrix, so that all products find
    # [rows, head_dim] matrices as they lie (4 x 256 tokens, 9 heads over 3 of 64: 27 ms, dot_product_attention 44).
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    query = (query * jnp.asarray(scale, query.dtype)).swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # [batch or 1, heads or 1, queries, keys]
    by_head = (mask.shape[0], kv_heads if mask.shape[1] > 1 else 1, heads // kv_heads, queries, keys)
    mask = jnp.broadcast_to(mask.reshape(mask.shape[0], by_head[1], -1, queries, keys), by_head)
    mask = mask.reshape(*by_head[:2], -1, keys)
    scores = jnp.einsum("bkqd,bksd->bkqs", query, key)
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    weights = masked_softmax(scores, mask)
    if dropout is not None:
        weights = dropout(weights)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, value)
    return out.reshape(batch, heads, queries, head_dim).swapaxes(1, 2)
