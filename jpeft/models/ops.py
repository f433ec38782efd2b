"""Operations that the models share: activations, softmax, attention, each in the form that is fast on its backend."""

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
from jpeft.core.method import widened
from jpeft.parallel.batches import tokens_are_spread

Mask = Bool[Array, "*#scores"] | None
Prefix = tuple[jax.Array, jax.Array]  # keys [..., n, kv_heads, head_dim] and values that all queries attend to

# Times below are of forward + backward pass on one core of XLA CPU.


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """`x * Phi(x)` by erf, as in torch.

    `nn.gelu` uses erfc, which takes four times as long (2,048 x 1,536: 31 ms against 8). Checkpointed, because
    recomputing erf and exp is faster than reading them back (6.5 ms), and only `x` is saved instead of three arrays.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def masked_softmax(scores: Float[Array, "*batch q k"], mask: Mask) -> Float[Array, "*batch q k"]:
    """Softmax over the last axis where `mask` is True, in float32 or wider."""
    wide = scores.astype(widened(scores.dtype))
    if mask is not None:
        wide = jnp.where(mask, wide, jnp.finfo(wide.dtype).min)
    weights = jnp.exp(wide - wide.max(axis=-1, keepdims=True))
    return (weights * (1 / weights.sum(axis=-1, keepdims=True))).astype(scores.dtype)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # d softmax = p (ds - <p, ds>). p is the only residual; autodiff saves three. It is 0 where masked, so the mask is
    # not needed again.
    weights, ds = masked_softmax(*primals), tangents[0]
    return weights, weights * (ds - (weights * ds).sum(axis=-1, keepdims=True))


@jax.custom_jvp
def split_softmax(
    front: Float[Array, "*batch q n"], scores: Float[Array, "*batch q k"], mask: Mask
) -> tuple[Float[Array, "*batch q n"], Float[Array, "*batch q k"]]:
    """`masked_softmax` over scores that lie in two arrays, of which the mask hides none of the first.

    Both share a maximum and a sum, so that neither they nor what they are multiplied with need be copied into one
    array. A row of which the mask hides all is the softmax of its front.

    >>> front, rest = split_softmax(jnp.zeros((1, 1)), jnp.zeros((1, 3)), jnp.array([[True, False, True]]))
    >>> [round(float(weight), 4) for weight in (*front[0], *rest[0])]
    [0.3333, 0.3333, 0.0, 0.3333]
    """
    wide, front_wide = (x.astype(widened(x.dtype)) for x in (scores, front))
    if mask is not None:
        wide = jnp.where(mask, wide, jnp.finfo(wide.dtype).min)
    highest = jnp.maximum(wide.max(axis=-1, keepdims=True), front_wide.max(axis=-1, keepdims=True))
    first, rest = jnp.exp(front_wide - highest), jnp.exp(wide - highest)
    share = 1 / (first.sum(axis=-1, keepdims=True) + rest.sum(axis=-1, keepdims=True))
    return (first * share).astype(front.dtype), (rest * share).astype(scores.dtype)


@split_softmax.defjvp
def _split_softmax_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    first, rest = split_softmax(*primals)  # the only residuals, as in `masked_softmax`
    d_front, d_scores = tangents[:2]
    mean = (first * d_front).sum(axis=-1, keepdims=True) + (rest * d_scores).sum(axis=-1, keepdims=True)
    return (first, rest), (first * (d_front - mean), rest * (d_scores - mean))


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
    """`x / rms(x) * (scale + offset)` over the last axis, in float32; only `x` is saved for the backward pass.

    >>> y = rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), 0.0, 0.0, jnp.float32)
    >>> [round(value, 4) for value in y.tolist()]
    [0.8485, 1.1314]
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * (scale.astype(jnp.float32) + offset)).astype(dtype)


@functools.partial(jax.checkpoint, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """`activation(gate) * up`; only these two are saved for the backward pass, not the three intermediate arrays."""
    return ACTIVATIONS[activation](gate) * up


def tokens_in_one(x: Float[Array, "*batch features"]) -> Float[Array, "*tokens features"]:
    """`[batch, length, features]` as `[tokens, features]` on backends where that is faster, else unchanged.

    It is faster on XLA CPU, see `jpeft.core.backend.flatten_tokens`. Whole layers run in this form, so that residuals
    are not saved in both shapes.

    >>> tokens_in_one(jnp.ones((4, 5, 3))).shape
    (20, 3)
    """
    return x.reshape(-1, x.shape[-1]) if backend.flatten_tokens() else x


def causal_mask(queries: int, keys: int, window: int | None = None, offset: Any = None) -> Bool[Array, "queries keys"]:
    """A causal mask: each query attends to the keys up to its own, or to the last `window` of these.

    Args:
      queries: the number of queries.
      keys: the number of keys.
      window: the size of the sliding window.
      offset: the index of the first query's own key. By default the last keys are the queries' own, and all queries
        attend to the keys before those (a prefix), whatever the window.

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
    prefix: Prefix | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention; each group of `heads / kv_heads` query heads shares a key and a value head.

    Args:
      query: the queries.
      key: the keys.
      value: the values.
      mask: broadcasts to `[batch, heads, queries, keys]`, True where a query may attend. None: `causal_mask`.
      scale: multiplies the scores.
      window: the sliding window of the causal mask, if `mask` is None.
      softcap: `c` of `c tanh(scores / c)`, applied after the scale.
      dropout: a function of the attention weights.
      causal: `mask` hides all keys after a query's own, as `causal_mask` does, so that they can be skipped.
      prefix: keys and values `[n, kv_heads, head_dim]`, or with a batch axis, that all queries attend to beside the
        others. It takes part in the softmax without a copy of the others.

    >>> x = jnp.ones((1, 3, 4, 8))
    >>> attention(x, x[:, :, :2], x[:, :, :2], scale=0.5).shape
    (1, 3, 4, 8)
    """
    queries, keys = query.shape[1], key.shape[1]
    if prefix is not None:
        prefix = for_each_row(prefix[0], key), for_each_row(prefix[1], value)
    if softcap is not None or dropout is not None or backend.flatten_tokens():
        mask = causal_mask(queries, keys, window) if mask is None else mask
        return _attend(query, key, value, mask, prefix, scale, softcap, dropout)
    implementation = _implementation(query, keys, mask, prefix)
    if prefix is not None and implementation == "cudnn":
        key, value, mask = _longer(key, value, causal_mask(queries, keys, window) if mask is None else mask, prefix)
        prefix = None
    if implementation == "xla" and queries >= 2 * _MIN_BLOCK and queries <= keys and not tokens_are_spread():
        causal = mask is None or (causal and mask.shape[-2] == queries)
        mask = causal_mask(queries, keys, window)[None, None] if mask is None else mask
        return _in_blocks(query, key, value, mask, prefix, scale, causal)
    if prefix is not None:
        mask = causal_mask(queries, keys, window) if mask is None else mask
        return _attend(query, key, value, mask, prefix, scale)
    if mask is None and queries == keys:
        # the numbers of keys to the left and right of a query's own
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=True, local_window_size=local, implementation=implementation
        )
    mask = causal_mask(queries, keys, window)[None, None] if mask is None else mask
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)


def for_each_row(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """A prefix as `[batch, n, kv_heads, head_dim]`; a product with one that all rows share is slower on XLA CPU."""
    return jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape[-3:]))


def _longer(key: jax.Array, value: jax.Array, mask: jax.Array, prefix: Prefix) -> tuple[jax.Array, ...]:
    """Keys, values and mask with a prefix before them: an even number, which cuDNN needs, by a key that is hidden."""
    n = prefix[0].shape[1]
    odd = (n + key.shape[1]) % 2
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], key.shape[1]))
    seen = jnp.broadcast_to(jnp.arange(n + odd) >= odd, (*mask.shape[:-1], n + odd))
    hidden = ((0, 0), (odd, 0), (0, 0), (0, 0))
    key, value = (
        jnp.concatenate([jnp.pad(front, hidden), x], axis=1) for front, x in zip(prefix, (key, value), strict=True)
    )
    return key, value, jnp.concatenate([seen, mask], axis=-1)


_MIN_BLOCK = 512  # queries in a block
_MAX_BLOCKS = 8  # each block is compiled separately


def _in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    prefix: Prefix | None,
    scale: float,
    causal: bool,
) -> jax.Array:
    """Attention over blocks of queries, one after the other, because XLA writes the scores to memory in float32.

    The scores of 8 rows of 2,048 tokens in 32 heads are 4 GiB, twice. The backward pass recomputes them. Keys after a
    block's last query are skipped: three eighths of all scores in four blocks.
    """
    queries, keys = query.shape[1], key.shape[1]
    size = max(_MIN_BLOCK, -(-queries // _MAX_BLOCKS))
    plain = jax.checkpoint(functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="xla"))
    out = []
    for first in range(0, queries, size):
        last = min(queries, first + size)
        seen = keys - queries + last if causal else keys
        part = mask[:, :, first if mask.shape[2] > 1 else 0 : last, : seen if mask.shape[3] > 1 else 1]
        block = query[:, first:last]
        if out:  # forces an order, forward and backward; else several blocks would be in memory at once
            block, out[-1] = jax.lax.optimization_barrier((block, out[-1]))
        if prefix is None:
            out.append(plain(block, key[:, :seen], value[:, :seen], mask=part))
        else:
            out.append(_attend(block, key[:, :seen], value[:, :seen], part, prefix, scale))
    return jnp.concatenate(out, axis=1)


def _implementation(query: jax.Array, keys: int, mask: Mask, prefix: Prefix | None) -> Any:
    """ "cudnn" if its flash attention supports these operands, forward and backward, else "xla"."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    even = query.shape[1] % 2 == 0 and (keys % 2 == 0 or prefix is not None)  # see `_longer`
    even = even or (mask is None and prefix is None)
    cuda = (
        backend.backend() == jax.default_backend() == "gpu" and "cuda" in jax.local_devices()[0].client.platform_version
    )
    return "cudnn" if half and fits and even and cuda else "xla"


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    prefix: Prefix | None,
    scale: float,
    softcap: float | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    # Checkpointed: the weights are quadratic in the length; saved for every layer they would dominate memory.
    attend = _plain_attention if dropout else jax.checkpoint(_plain_attention, static_argnums=(5, 6, 7))
    return attend(query, key, value, mask, prefix, scale, softcap, dropout)


def _plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, prefix: Any, scale: float, softcap: Any,
    dropout: Any,
) -> jax.Array:  # fmt: skip
    # Heads are moved before positions once, and the query heads of a group are rows of one matrix, so that all products
    # have contiguous [rows, head_dim] matrices (4 x 256 tokens, 9 heads over 3 of 64: 27 ms, dot_product_attention 44).
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    query = (query * jnp.asarray(scale, query.dtype)).swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # [batch or 1, heads or 1, queries, keys]
    by_head = (mask.shape[0], kv_heads if mask.shape[1] > 1 else 1, heads // kv_heads, queries, keys)
    mask = jnp.broadcast_to(mask.reshape(mask.shape[0], by_head[1], -1, *mask.shape[2:]), by_head)
    mask = mask.reshape(*by_head[:2], -1, keys)

    wide = None if prefix is None else widened(query.dtype)  # two products, which are added before they are rounded

    def scores(key: jax.Array) -> jax.Array:
        found = jnp.einsum("bkqd,bksd->bkqs", query, key.swapaxes(1, 2), preferred_element_type=wide)
        return found if softcap is None else jnp.tanh(found / softcap) * softcap

    def weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
        weights = (weights if dropout is None else dropout(weights)).astype(value.dtype)
        return jnp.einsum("bkqs,bksd->bkqd", weights, value.swapaxes(1, 2), preferred_element_type=wide)

    if prefix is None:
        out = weighted(masked_softmax(scores(key), mask), value)
    else:
        front, rest = split_softmax(scores(prefix[0]), scores(key), mask)
        out = (weighted(front, prefix[1]) + weighted(rest, value)).astype(value.dtype)
    return out.reshape(batch, heads, queries, -1).swapaxes(1, 2)
