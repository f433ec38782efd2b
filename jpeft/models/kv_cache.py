"""The key-value cache of a decoder, for generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "batch length heads head_dim"]


def init_cache(model: Any, batch: int, capacity: int, dtype: Any = None) -> dict[str, jax.Array]:
    """An empty cache: a plain tree. Each row holds one sequence; padding in it is never attended to.

    `key` and `value` are `[layers, batch, kv_heads, capacity, head_dim]`; `seen` `[batch, capacity]` is True for slots
    that hold tokens; `index` is the next free slot, the same in all rows. A call that exceeds the capacity raises a
    ValueError; inside `jax.jit`, where the index is traced, it returns NaN.

    Args:
      model: a `Decoder`.
      batch: the number of rows.
      capacity: the number of slots in a row.
      dtype: the dtype of keys and values; None: the model's dtype of computation.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> cfg = DecoderConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    >>> init_cache(Decoder(cfg), batch=3, capacity=16)["key"].shape
    (2, 3, 2, 16, 8)
    """
    cfg = model.config
    shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, capacity, cfg.head_dim)
    dtype = dtype or model.dtype or model.param_dtype
    return {
        "key": jnp.zeros(shape, dtype),
        "value": jnp.zeros(shape, dtype),
        "seen": jnp.zeros((batch, capacity), bool),
        "index": jnp.zeros((), jnp.int32),
    }


def grow_cache(cache: Mapping[str, Any], capacity: int) -> dict[str, Any]:
    """The same cache with free slots up to `capacity`, and so any other in it, such as that of X-LoRA's first pass.

    Its leaves may have more axes in front, of caches that were mapped.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> cfg = DecoderConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    >>> grow_cache(init_cache(Decoder(cfg), batch=3, capacity=16), 32)["value"].shape
    (2, 3, 2, 32, 8)
    """
    free = (0, capacity - cache["seen"].shape[-1])

    def pad(name: str, behind: int) -> jax.Array:
        x = cache[name]
        return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1 - behind), free, *[(0, 0)] * behind])

    inner = {name: grow_cache(held, capacity) for name, held in cache.items() if isinstance(held, Mapping)}
    return {
        **inner,
        "key": pad("key", 1),
        "value": pad("value", 1),
        "seen": pad("seen", 0),
        "index": cache["index"],
    }


def write_layer(cache: Any, key: Heads, value: Heads, layer: Any, index: Any) -> tuple[Any, Heads, Heads]:
    """Writes a layer's new keys and values at `index`; the cache, and all of the layer's keys and values in it."""
    new, held = {}, []
    for name, x in (("key", key), ("value", value)):
        block = x.swapaxes(1, 2).astype(cache[name].dtype)[None]
        new[name] = jax.lax.dynamic_update_slice(cache[name], block, (layer, 0, 0, index, 0))
        held.append(jax.lax.dynamic_index_in_dim(new[name], layer, keepdims=False).swapaxes(1, 2).astype(x.dtype))
    return new, *held
