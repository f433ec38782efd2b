"""Attentions as well-known codebases write them, each in a model of two layers; written anew, for tests.

The oracle is in the modules themselves: with a collection "by_hand", which holds keys and values by the path of the
attention, they prepend these to their own, and let all queries see them.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning

WIDTH, HEADS, KV_HEADS, DIM, DEPTH, LENGTH, SLOTS, BATCH = 16, 4, 2, 4, 2, 5, 8, 2
COLLECTION = "by_hand"


def prepended(module, k, v, mask=None, bias=None):
    """Keys and values ``[batch, keys, heads, dim]`` after those given by hand, which no mask or bias changes."""
    if not module.has_variable(COLLECTION, "prefix_key"):
        return k, v, mask, bias
    given = [module.get_variable(COLLECTION, f"prefix_{name}") for name in ("key", "value")]
    n = given[0].shape[0]
    out = []
    for x, y in zip(given, (k, v), strict=True):
        x = jnp.repeat(x, y.shape[-2] // x.shape[-2], axis=-2).astype(y.dtype)
        out.append(jnp.concatenate([jnp.broadcast_to(x, (*y.shape[:-3], *x.shape)), y], axis=-3))

    def wider(x, fill):
        return None if x is None else jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((n, 0),), constant_values=fill)

    return *out, wider(mask, True), wider(bias, 0)


def rotated(x, positions):
    """Rotary positions, half by half."""
    radians = positions[..., None, None] / 100.0 ** (jnp.arange(x.shape[-1] // 2) * 2.0 / x.shape[-1])
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(radians), jnp.cos(radians)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Einsum(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(0.5), self.shape)
        return jnp.einsum(equation, x, w.astype(x.dtype))


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],)).astype(x.dtype)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * (1 + scale)


def grouped(q, k, v, mask, cap=None):
    """``BTKGH,BSKH->BKGTS``, with logits in float32."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if cap is not None:
        logits = jnp.tanh(logits / cap) * cap
    p = jax.nn.softmax(jnp.where(mask[:, :, None], logits, -2.3819763e38), axis=-1).astype(k.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", p, v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def embedded(module, tokens):
    return nn.Embed(24, WIDTH, embedding_init=nn.initializers.normal(1.0), name="embed")(tokens).astype(module.dtype)


CAUSAL = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))


# --- big_vision: a scan over rematerialized blocks, the cache in a collection -----------------------------------------


class VisionAttention(nn.Module):
    kv_heads: int = KV_HEADS

    @nn.compact
    def __call__(self, x, positions, mask, decode):
        if self.kv_heads == HEADS:
            q, k, v = Einsum((3, HEADS, WIDTH, DIM), name="qkv_einsum")("BSD,3KDH->3BSKH", x)
        else:
            q = Einsum((HEADS, WIDTH, DIM), name="q_einsum")("BTD,NDH->BTNH", x)
            k, v = Einsum((2, self.kv_heads, WIDTH, DIM), name="kv_einsum")("BSD,2KDH->2BSKH", x)
        q, k = rotated(q, positions) * DIM**-0.5, rotated(k, positions)
        if decode:
            k, v = self.cached(k, v, mask.shape[-1])
        k, v, mask, _ = prepended(self, k, v, mask)
        return Einsum((HEADS, DIM, WIDTH), name="attn_vec_einsum")("BTNH,NHD->BTD", grouped(q, k, v, mask))

    def cached(self, k, v, slots):
        started, (batch, new, heads, dim) = self.has_variable("cache", "idx"), k.shape
        index = self.variable("cache", "idx", jnp.zeros, (batch,), jnp.int32)
        held = [
            self.variable("cache", name, jnp.zeros, (batch, slots, heads, dim), k.dtype)
            for name in ("k_cache", "v_cache")
        ]
        for cache, y in zip(held, (k, v), strict=True):
            if started:
                cache.value = jax.lax.dynamic_update_slice(cache.value, y, (0, index.value[0], 0, 0))
            else:
                cache.value = jnp.pad(y, ((0, 0), (0, slots - new), (0, 0), (0, 0)))
        index.value = index.value + new
        return held[0].value, held[1].value


class VisionBlock(nn.Module):
    kv_heads: int

    @nn.compact
    def __call__(self, x, unused, positions, mask, decode):
        x = x + VisionAttention(self.kv_heads, name="attn")(RMSNorm(name="norm")(x), positions, mask, decode)
        return x + nn.Dense(WIDTH, dtype=x.dtype, name="mlp")(nn.gelu(x)), unused


class Vision(nn.Module):
    """Gemma as big_vision has it."""

    kv_heads: int = KV_HEADS
    scan: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, positions, mask, decode=False):
        x = embedded(self, tokens)
        policy = jax.checkpoint_policies.nothing_saveable
        block = nn.remat(VisionBlock, prevent_cse=not self.scan, static_argnums=(5,), policy=policy)
        layers = self.scope.push("layers")
        if self.scan:
            axes = {"params": 0, "cache": 1, COLLECTION: 0}
            scanned = nn.scan(
                block, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=DEPTH
            )
            blocks = [scanned(parent=layers, kv_heads=self.kv_heads)]
        else:
            blocks = [block(parent=layers.push(str(i)), kv_heads=self.kv_heads) for i in range(DEPTH)]
        for one in blocks:
            x, _ = one(x, (), positions, mask, decode)
        return x


# --- openpi: experts that attend together, the cache an argument ------------------------------------------------------


class ExpertsAttention(nn.Module):
    @nn.compact
    def __call__(self, xs, positions, mask, cache):
        parts = []
        for i, x in enumerate(xs):
            if x is not None:
                q = Einsum((HEADS, WIDTH, DIM), name=f"q_einsum_{i}")("BTD,NDH->BTNH", x)
                k, v = Einsum((2, 1, WIDTH, DIM), name=f"kv_einsum_{i}")("BSD,2KDH->2BSKH", x)
                parts.append((q, k, v))
        q, k, v = (jnp.concatenate(y, axis=1) for y in zip(*parts, strict=True))
        q, k = rotated(q, positions) * DIM**-0.5, rotated(k, positions)
        if cache is not None:
            k, v = (jnp.concatenate([old, new], axis=1) for old, new in zip(cache, (k, v), strict=True))
        new_cache = k, v
        k, v, mask, _ = prepended(self, k, v, mask)
        y, outs, start = grouped(q, k, v, mask), [], 0
        for i, x in enumerate(xs):
            if x is not None:
                own = y[:, start : (start := start + x.shape[1])]
                outs.append(Einsum((HEADS, DIM, WIDTH), name=f"attn_vec_einsum_{i}")("BTNH,NHD->BTD", own))
            else:
                outs.append(None)
        return outs, new_cache


class ExpertsBlock(nn.Module):
    @nn.compact
    def __call__(self, xs, cache, positions, mask):
        normed = [None if x is None else RMSNorm(name=f"norm_{i}")(x) for i, x in enumerate(xs)]
        ys, cache = ExpertsAttention(name="attn")(normed, positions, mask, cache)
        return jax.tree.map(lambda x, y: x + y, xs, ys), cache


class Experts(nn.Module):
    """Gemma as openpi has it: two streams of tokens, each with weights of its own."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, xs, positions, mask, cache=None):
        block = nn.scan(
            nn.remat(ExpertsBlock, prevent_cse=False),
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=DEPTH,
        )
        return block(name="layers")([None if x is None else x.astype(self.dtype) for x in xs], cache, positions, mask)


# --- T5X: a relative bias, a transposed cache, an encoder -------------------------------------------------------------


class EncoderDecoderAttention(nn.Module):
    @nn.compact
    def __call__(self, x, states, mask=None, bias=None, decode=False, deterministic=True):
        def projected(name, y):
            w = partitioning.param_with_axes(
                name, nn.initializers.normal(0.4), (WIDTH, HEADS * DIM), axes=("embed", "joined_kv")
            )
            y = jax.lax.dot_general(y, w.reshape(WIDTH, HEADS, DIM).astype(y.dtype), (((y.ndim - 1,), (0,)), ((), ())))
            return nn.with_logical_constraint(y, ("batch", "length", "heads", "kv"))

        q, k, v = projected("query", x), projected("key", states), projected("value", states)
        if decode:
            k, v, mask, bias = self.cached(k, v, mask, bias)
        if mask is not None:
            full = jnp.full(mask.shape, -1e10).astype(x.dtype)
            mask = jax.lax.select(mask > 0, jnp.zeros_like(full), full)
        bias = mask if bias is None else bias if mask is None else mask + bias
        k, v, _, bias = prepended(self, k, v, None, bias)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k.astype(jnp.float32))
        logits = logits if bias is None else logits + bias.astype(logits.dtype)
        p = jax.nn.softmax(logits).astype(x.dtype)
        if not deterministic:  # of rate 0, whose operations are those of any
            keep = jnp.broadcast_to(jax.random.bernoulli(self.make_rng("dropout"), 1.0, (*p.shape[:-2], 1, 1)), p.shape)
            p = p * (keep.astype(p.dtype) / jnp.asarray(1.0, p.dtype))
        y = jnp.einsum("bhqk,bkhd->bqhd", p, v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, dtype=x.dtype, name="out")(y)

    def cached(self, k, v, mask, bias):
        started = self.has_variable("cache", "cached_key")
        shape = *k.shape[:-3], *k.shape[-2:], k.shape[-3]
        held = [self.variable("cache", f"cached_{n}", jnp.zeros, shape, k.dtype) for n in ("key", "value")]
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not started:
            return k, v, mask, bias
        slots, now = held[0].value.shape[-1], index.value
        place = jax.nn.one_hot(now, slots, dtype=k.dtype)
        for cache, y in zip(held, (k, v), strict=True):
            cache.value = cache.value + jnp.moveaxis(y, -3, -1) * place
        index.value = now + 1
        seen = jnp.broadcast_to(jnp.arange(slots) <= now, (len(k), 1, 1, slots))
        mask = seen if mask is None else jnp.logical_and(mask, seen)
        if bias is not None:
            row = jax.vmap(jax.lax.dynamic_slice_in_dim, in_axes=(None, 0, None, None))
            bias = row(jnp.squeeze(bias, axis=0), jnp.reshape(now, (-1,)), 1, -2)
        return *(jnp.moveaxis(cache.value, -1, -3) for cache in held), mask, bias


class EncoderDecoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, states, mask, bias, decode, deterministic):
        y = RMSNorm(name="norm")(x)
        x = x + EncoderDecoderAttention(name="self")(y, y, mask, bias, decode, deterministic)
        y = RMSNorm(name="cross_norm")(x)
        return x + EncoderDecoderAttention(name="cross")(y, states, deterministic=deterministic)


class EncoderDecoder(nn.Module):
    """A T5 as T5X has it: its decoder, over given states."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, states, decode=False, deterministic=True, slots=LENGTH):
        x, states = embedded(self, tokens), states.astype(self.dtype)
        table = self.param("relative", nn.initializers.normal(1.0), (HEADS, 2 * SLOTS))
        n = slots if decode else tokens.shape[1]
        near = jnp.arange(n)[None, :] - jnp.arange(n)[:, None] + SLOTS
        one_hot = jax.lax.broadcasted_iota(jnp.int32, (2 * SLOTS, 1, 1), 0) == near[None]
        bias = jax.lax.dot_general(table, one_hot.astype(table.dtype), (((1,), (0,)), ((), ())))[None]
        mask = None if decode else nn.make_causal_mask(tokens)
        for i in range(DEPTH):
            layer = nn.remat(EncoderDecoderLayer, prevent_cse=False, static_argnums=(5, 6))(name=f"layers_{i}")
            x = layer(x, states, mask, bias, decode, deterministic)
        return x


# --- EasyLM: complex rotary positions, Flax's own weights of an attention ---------------------------------------------


class ComplexAttention(nn.Module):
    def setup(self):
        self.wq, self.wk, self.wv, self.wo = (nn.Dense(HEADS * DIM, use_bias=False) for _ in range(4))
        angles = np.outer(np.arange(2 * SLOTS), 1 / 100.0 ** (np.arange(0, DIM, 2) / DIM)).astype(np.float32)
        self.turns = jnp.asarray(np.complex64(np.cos(angles) + 1j * np.sin(angles)))

    def turned(self, x, turns):
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        y = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * turns[:, :, None]
        return jnp.stack((jnp.real(y), jnp.imag(y)), axis=-1).reshape(*y.shape[:-1], -1).astype(x.dtype)

    @nn.compact
    def cached(self, k, v, q, mask):
        started = self.has_variable("cache", "cached_key")
        held = [
            self.variable("cache", f"cached_{n}", jnp.zeros, y.shape, y.dtype) for n, y in (("key", k), ("value", v))
        ]
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, dtype=jnp.int32))
        if not started:
            return k, v, mask
        *_, slots, _, _ = held[0].value.shape
        k, v = (
            jax.lax.dynamic_update_slice(cache.value, y, (0, index.value, 0, 0))
            for cache, y in zip(held, (k, v), strict=True)
        )
        held[0].value, held[1].value = k, v
        index.value = index.value + q.shape[1]
        seen = jnp.broadcast_to(jnp.arange(slots) < index.value, (len(k), 1, q.shape[1], slots))
        return k, v, nn.combine_masks(seen, mask)

    def __call__(self, x, mask, positions):
        def heads(y):
            return y.reshape(*y.shape[:2], HEADS, DIM)

        q, k, v = heads(self.wq(x)), heads(self.wk(x)), heads(self.wv(x))
        turns = jnp.take(self.turns, positions, axis=0)
        q, k = self.turned(q, turns), self.turned(k, turns)
        mask = jnp.broadcast_to(mask[:, None, None, :], (len(x), 1, x.shape[1], mask.shape[-1]))
        if self.has_variable("cache", "cached_key") or self.is_mutable_collection("cache"):
            k, v, mask = self.cached(k, v, q, mask)
        else:
            mask = nn.combine_masks(mask, nn.make_causal_mask(jnp.ones(x.shape[:2])))
        bias = jax.lax.select(
            mask > 0, jnp.full(mask.shape, 0.0, x.dtype), jnp.full(mask.shape, jnp.finfo(x.dtype).min, x.dtype)
        )
        k, v, _, bias = prepended(self, k, v, None, bias)
        p = nn.dot_product_attention_weights(q, k, bias=bias, deterministic=True, dtype=jnp.float32)
        y = jnp.einsum("...hqk,...khd->...qhd", p.astype(v.dtype), v)
        return self.wo(y.reshape(x.shape))


class ComplexBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask, positions):
        attention = partitioning.remat(ComplexAttention, policy=jax.checkpoint_policies.nothing_saveable)
        return x + attention(name="attention")(RMSNorm(name="norm")(x), mask, positions)


class Complex(nn.Module):
    """LLaMA as EasyLM has it."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, mask, positions):
        x = embedded(self, tokens)
        for i in range(DEPTH):
            x = partitioning.remat(ComplexBlock)(name=str(i))(x, mask, positions)
        return x


# --- gemma and recurrentgemma: a cache that slides, norms of queries and keys, a soft-cap -----------------------------


class SlidingAttention(nn.Module):
    window: int = 3

    @nn.compact
    def __call__(self, x, positions, cache, mask):
        q = Einsum((HEADS, WIDTH, DIM), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, KV_HEADS, WIDTH, DIM), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        q, k = RMSNorm(name="_query_norm")(q), RMSNorm(name="_key_norm")(k)
        q, k = rotated(q, positions) * DIM**-0.5, rotated(k, positions)
        if cache is not None:
            slots, index = cache["v"].shape[1], cache["end_index"][0]
            start = (0, index % slots, 0, 0)
            v = jax.lax.dynamic_update_slice(cache["v"], v, start)
            k = jax.lax.dynamic_update_slice(cache["k"], k, start)
            held = jax.lax.dynamic_update_slice(cache["positions"], positions, start[:2])
            cache = {"v": v, "k": k, "end_index": cache["end_index"] + x.shape[1], "positions": held}
        else:
            held = positions
        near = held[..., None, :] > positions[..., :, None] - self.window
        mask = (mask * near)[:, None] > 0
        k, v, mask, _ = prepended(self, k, v, mask)
        groups = q.reshape(*q.shape[:2], KV_HEADS, -1, DIM)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", groups, k).reshape(*q.shape[:3], -1)
        logits = jnp.tanh(logits / 5.0) * 5.0
        p = jax.nn.softmax(jnp.where(jnp.moveaxis(mask, 1, 2), logits, -2.3e38), axis=-1).astype(k.dtype)
        y = jnp.einsum("BTKGS,BSKH->BTKGH", p.reshape(*p.shape[:2], KV_HEADS, -1, p.shape[-1]), v)
        y = y.reshape(*q.shape)
        return cache, Einsum((HEADS, DIM, WIDTH), name="attn_vec_einsum")("BTNH,NHD->BTD", y)


class Sliding(nn.Module):
    """Gemma as gemma has it."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, positions, mask, cache=None):
        x, new = embedded(self, tokens), {}
        for i in range(DEPTH):
            own = None if cache is None else cache[f"layer_{i}"]
            new[f"layer_{i}"], y = SlidingAttention(name=f"layer_{i}")(
                RMSNorm(name=f"norm_{i}")(x), positions, own, mask
            )
            x = x + y
        return x, None if cache is None else new


# --- diffusers: heads in the batch, queries of an image over the states of a text -------------------------------------


class FoldedAttention(nn.Module):
    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context

        def fold(name, y):
            y = nn.Dense(HEADS * DIM, use_bias=False, dtype=y.dtype, name=name)(y)
            return y.reshape(*y.shape[:2], HEADS, DIM)

        q, k, v = fold("to_q", x), fold("to_k", context), fold("to_v", context)
        k, v, _, _ = prepended(self, k, v)
        q, k, v = (jnp.transpose(y, (0, 2, 1, 3)).reshape(-1, y.shape[1], DIM) for y in (q, k, v))
        p = nn.softmax(jnp.einsum("b i d, b j d->b i j", q, k) * DIM**-0.5, axis=-1)
        y = jnp.einsum("b i j, b j d -> b i d", p, v)
        y = jnp.transpose(y.reshape(-1, HEADS, y.shape[1], DIM), (0, 2, 1, 3)).reshape(*x.shape[:2], -1)
        return nn.Dense(WIDTH, dtype=x.dtype, name="to_out")(y)


class Folded(nn.Module):
    """A transformer of diffusers."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        x, context = x.astype(self.dtype), context.astype(self.dtype)
        for i in range(DEPTH):
            x = x + FoldedAttention(name=f"attn1_{i}")(x)
            x = x + FoldedAttention(name=f"attn2_{i}")(x, context)
        return x


# --- the models and their inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
      model: it.
      inputs: its arguments.
      heads: those of its sites.
      sites: how many it has.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    heads: tuple[int, int, int] = (KV_HEADS, DIM, DIM)
    sites: int = DEPTH


TOKENS = np.random.default_rng(0).integers(0, 24, (BATCH, LENGTH))
POSITIONS = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
MASK = np.broadcast_to(np.asarray(CAUSAL), (BATCH, LENGTH, LENGTH))
STATES = np.random.default_rng(1).normal(size=(BATCH, 3, WIDTH)).astype(np.float32)
STREAMS = np.random.default_rng(2).normal(size=(2, BATCH, 1, WIDTH)).astype(np.float32)

CASES = {
    "big_vision": Case(Vision(), (TOKENS, POSITIONS, MASK[:, None]), sites=1),
    "big_vision, one head": Case(Vision(1), (TOKENS, POSITIONS, MASK[:, None]), (1, DIM, DIM), sites=1),
    "big_vision, fused": Case(Vision(HEADS, scan=False), (TOKENS, POSITIONS, MASK[:, None]), (HEADS, DIM, DIM)),
    "openpi": Case(
        Experts(), ([STREAMS[0], STREAMS[1]], POSITIONS[:, :2], MASK[:, None, :2, :2]), (1, DIM, DIM), sites=1
    ),
    "t5x": Case(EncoderDecoder(), (TOKENS, STATES), (HEADS, DIM, DIM), 2 * DEPTH),
    "easylm": Case(Complex(), (TOKENS, np.ones_like(TOKENS), POSITIONS), (HEADS, DIM, DIM)),
    "gemma": Case(Sliding(), (TOKENS, POSITIONS, MASK)),
    "diffusers": Case(Folded(), (np.repeat(STREAMS[0], 4, 1), STATES), (HEADS, DIM, DIM), 2 * DEPTH),
}
