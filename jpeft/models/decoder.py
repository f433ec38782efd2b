"""Llama and its family as one Linen decoder: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text).

Touvron et al. 2023, https://arxiv.org/abs/2302.13971. The parameter tree carries the names of HuggingFace's torch
modules with `/` for `.`, and Flax's leaf names. The layers lie stacked below `model/layers`, so that one layer is
traced and compiled whatever their number: `model/layers/self_attn/q_proj/kernel` is `[layers, in, out]`. With
`scan_layers=False` each has its own subtree, `model/layers/0/self_attn/q_proj/kernel`; `jpeft.models.stacking` turns
one tree into the other.

What the members of the family do differently is data here (`DecoderConfig`), down to the kind of each layer: a layer
that sees a window and one that sees everything differ in their mask and rotary table only, so one scan holds both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from jpeft.attention import register_attention
from jpeft.models import ops
from jpeft.models.rotary import Rotary, rotate
from jpeft.models.rotary import from_config as rotary_from_config
from jpeft.models.rotary import to_config as rotary_to_config
from jpeft.tree import Path

States = Float[Array, "*tokens hidden"]  # [batch, length, hidden], or with the two in one (`ops.tokens_in_one`)
Heads = Float[Array, "batch length heads head_dim"]
SLIDING, FULL = "sliding_attention", "full_attention"

_SAVEABLE = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
)
_LAYER_INPUT = "layer_input"
#: Names for `Decoder.remat`, and what they are called in `jax.checkpoint_policies`; its others want arguments.
REMAT = {
    "full": "nothing_saveable",
    "dots": "dots_with_no_batch_dims_saveable",
    "offload": "save_and_offload_only_these_names",  # what comes into each layer, to the host's memory
    **{name: name for name in _SAVEABLE},
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What shapes the decoder. Names are those of HuggingFace's configs where they have one.

    >>> DecoderConfig(model_type="llama", vocab_size=100, hidden_size=64, num_attention_heads=4).head_dim
    16
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as there are query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalised, head by head, before they are turned
    gemma: bool = False  # norms scale by 1 + w and stand after sublayers too; embeddings scale by sqrt(hidden_size)
    query_pre_attn_scalar: float = 0.0  # scores scale by its -1/2th power; 0: head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()  # of each layer; (): all see everything
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    rotary_sliding: Rotary | None = None  # of sliding layers, where they have their own
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // max(1, self.num_attention_heads),
            "layer_types": (FULL,) * self.num_hidden_layers,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "query_pre_attn_scalar", self.query_pre_attn_scalar or float(self.head_dim))

    @property
    def context(self) -> int:
        """The number of positions that the model is made for."""
        return self.rotary.context(self.max_position_embeddings)

    @property
    def sliding(self) -> bool | tuple[bool, ...]:
        """Whether all layers see a window only, or none, or which."""
        flags = tuple(kind == SLIDING for kind in self.layer_types)
        return flags[0] if len(set(flags)) == 1 else flags


@flax.struct.dataclass
class Context:
    """What all layers share in one call. Pairs are for full and for sliding layers; they may be one and the same."""

    rotary: tuple[Any, Any]  # tables, see `Rotary.table`
    masks: tuple[Any, Any]  # [batch, 1, queries, keys], or None for causal ones over the queries' own keys
    index: Any = None  # where in the cache the queries' own keys go
    shape: tuple[int, int] = flax.struct.field(default=(0, 0), pytree_node=False)  # batch, length


class _Module(nn.Module):
    """The fields and submodules that the modules below have in common."""

    config: DecoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def fields(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "param_dtype": self.param_dtype}

    def dense(self, x: jax.Array, features: int, name: str, axes: tuple[str, str], bias: bool = False) -> jax.Array:
        """A linear layer called `name`; `axes` are the logical names of its input and output."""
        init = nn.initializers.normal(self.config.initializer_range)
        layer = nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.with_logical_partitioning(init, axes),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
            name=name,
        )
        return layer(x)

    def norm(self, x: jax.Array, name: str, axis: str = "embed") -> jax.Array:
        return RMSNorm(**self.fields(), axis=axis, name=name)(x)


class RMSNorm(_Module):
    """`x / rms(x) * scale` over the last axis, in float32; Gemma's scale is `1 + w`."""

    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        offset = 1.0 if self.config.gemma else 0.0
        init = nn.with_logical_partitioning(nn.initializers.constant(1.0 - offset), (self.axis,))
        scale: Any = self.param("scale", init, x.shape[-1:], self.param_dtype)
        dtype = self.dtype or jnp.promote_types(x.dtype, scale.dtype)
        return ops.rms_norm(x, scale, self.config.rms_norm_eps, offset, jnp.dtype(dtype))


class SelfAttention(_Module):
    """Grouped-query attention with rotary positions, and its projections."""

    sliding: bool | None = None
    deterministic: bool = True

    def setup(self) -> None:
        self.weights_dropout = nn.Dropout(self.config.attention_dropout)

    @nn.compact
    def __call__(self, x: States, cache: Any, layer: Any, sliding: Any, context: Context) -> tuple[States, Any]:
        """Args:
        cache: `{"key", "value"}` of all layers, `[layers, batch, kv_heads, capacity, head_dim]`, or None.
        layer: this layer's number. sliding: whether it is a sliding one.
        """
        cfg = self.config
        query = self.project(x, context.shape, cfg.num_attention_heads, "q")
        key = self.project(x, context.shape, cfg.num_key_value_heads, "k")
        value = self.project(x, context.shape, cfg.num_key_value_heads, "v")
        if cfg.qk_norm:
            query, key = self.norm(query, "q_norm", "head_dim"), self.norm(key, "k_norm", "head_dim")
        table = _pick(sliding, context.rotary)
        query, key = rotate(query, table), rotate(key, table)
        if cache is not None:
            cache, key, value = _remember(cache, key, value, layer, context.index)
        out = self.attend(query, key, value, _pick(sliding, context.masks), causal=cache is None)
        out = out.reshape(*x.shape[:-1], cfg.num_attention_heads * cfg.head_dim)
        return self.dense(out, cfg.hidden_size, "o_proj", ("heads", "embed"), cfg.output_bias), cache

    def project(self, x: States, shape: tuple[int, int], heads: int, name: str) -> Heads:
        """Queries, keys or values, split by example and head."""
        width = heads * self.config.head_dim
        axes = ("embed", "heads" if name == "q" else "kv_heads")
        y = self.dense(x, width, f"{name}_proj", axes, self.config.attention_bias)
        return y.reshape(*shape, heads, self.config.head_dim)

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        mask: ops.Mask,
        causal: bool = False,
    ) -> Float[Array, "batch queries heads head_dim"]:
        """The one place where keys, values and mask pass, turned by their positions, with and without a cache.

        Args:
          mask: broadcasts to `[batch, heads, queries, keys]`, True where a query may attend. None is causal: the last
            keys are the queries' own, and what stands before those is seen by all.
          causal: whether a mask that is given lets no query attend to keys after its own, with the keys ending so.
        """
        cfg = self.config
        drop = None
        if cfg.attention_dropout and not self.deterministic:
            drop = lambda weights: self.weights_dropout(weights, deterministic=False)  # noqa: E731
        return ops.attention(
            query,
            key,
            value,
            mask,
            scale=cfg.query_pre_attn_scalar**-0.5,
            window=cfg.sliding_window if self.sliding else None,
            softcap=cfg.attn_logit_softcapping,
            dropout=drop,
            causal=causal,
        )


def _known_remat(name: Any) -> str:
    if not isinstance(name, str) or name not in REMAT:
        raise ValueError(f"remat={name!r} is none of {', '.join(REMAT)}")
    return name


def _policy(name: str) -> Any:
    policy = getattr(jax.checkpoint_policies, REMAT[_known_remat(name)])
    if name != "offload":
        return policy
    return policy(names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT],
                  offload_src="device", offload_dst="pinned_host")  # fmt: skip


def _pick(sliding: Any, pair: tuple[Any, Any]) -> Any:
    """Of (full, sliding): statically, or in a scan over layers of both kinds."""
    if isinstance(sliding, bool):
        return pair[sliding]
    return pair[0] if pair[0] is pair[1] else jax.tree.map(lambda f, s: jnp.where(sliding, s, f), *pair)


def _remember(cache: Any, key: Heads, value: Heads, layer: Any, index: Any) -> tuple[Any, Heads, Heads]:
    """The cache with this layer's new keys and values from `index` on, and all that it then holds of the layer."""
    new, held = {}, []
    for name, x in (("key", key), ("value", value)):
        block = x.swapaxes(1, 2).astype(cache[name].dtype)[None]
        new[name] = jax.lax.dynamic_update_slice(cache[name], block, (layer, 0, 0, index, 0))
        held.append(jax.lax.dynamic_index_in_dim(new[name], layer, keepdims=False).swapaxes(1, 2).astype(x.dtype))
    return new, *held


class MLP(_Module):
    """The gated feed-forward sublayer."""

    @nn.compact
    def __call__(self, x: States) -> States:
        width = self.config.intermediate_size
        gate = self.dense(x, width, "gate_proj", ("embed", "mlp"), self.config.mlp_bias)
        up = self.dense(x, width, "up_proj", ("embed", "mlp"), self.config.mlp_bias)
        wide = ops.gated(gate, up, self.config.hidden_act)
        return self.dense(wide, self.config.hidden_size, "down_proj", ("mlp", "embed"), self.config.mlp_bias)


class Layer(_Module):
    """One decoder layer, as the body of a scan. `sliding` is None where layers of both kinds are scanned."""

    sliding: bool | None = None
    deterministic: bool = True

    @nn.compact
    def __call__(self, carry: tuple[States, Any], inputs: tuple[Any, Any], context: Context) -> tuple[Any, None]:
        """Args:
        carry: the states, and the cache of all layers or None. inputs: the layer's number, and whether it slides.
        """
        (x, cache), (layer, slides) = carry, inputs
        x = checkpoint_name(x, _LAYER_INPUT)
        sliding = slides if self.sliding is None else self.sliding
        attention = SelfAttention(
            **self.fields(), sliding=self.sliding, deterministic=self.deterministic, name="self_attn"
        )
        y, cache = attention(self.norm(x, "input_layernorm"), cache, layer, sliding, context)
        if self.config.gemma:  # norms before and after both sublayers
            x = x + self.norm(y, "post_attention_layernorm")
            y = MLP(**self.fields(), name="mlp")(self.norm(x, "pre_feedforward_layernorm"))
            x = x + self.norm(y, "post_feedforward_layernorm")
        else:
            x = x + y
            x = x + MLP(**self.fields(), name="mlp")(self.norm(x, "post_attention_layernorm"))
        return (x, cache), None


class Layers(_Module):
    """The layers one by one, named `0`, `1`, …"""

    layer: Any = Layer
    deterministic: bool = True

    @nn.compact
    def __call__(self, carry: Any, inputs: Any, context: Context) -> tuple[Any, None]:
        for i, kind in enumerate(self.config.layer_types):
            layer = self.layer(**self.fields(), sliding=kind == SLIDING, deterministic=self.deterministic, name=str(i))
            carry, _ = layer(carry, (i, None), context)
        return carry, None


class Model(_Module):
    """Token ids to the normalised states of the last layer."""

    scan_layers: bool = True
    remat: str | None = None

    def setup(self) -> None:
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        self.embed_tokens = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(init, ("vocab", "embed")),
        )

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "batch length"], cache: Any, context: Context, deterministic: bool
    ) -> tuple[States, Any]:
        cfg = self.config
        x = self.embed_tokens(input_ids)
        if cfg.gemma:
            x *= jnp.asarray(cfg.hidden_size**0.5, x.dtype)
        x, context = ops.tokens_in_one(x), dataclasses.replace(context, shape=input_ids.shape)
        layer: Any = Layer
        if self.remat is not None:
            layer = nn.remat(Layer, policy=_policy(self.remat), prevent_cse=not self.scan_layers)
        carry = (x, cache)
        if self.scan_layers:
            numbers = jnp.arange(cfg.num_hidden_layers)
            mixed = isinstance(cfg.sliding, tuple)
            layers = nn.scan(
                layer,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
                length=cfg.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(
                **self.fields(),
                sliding=None if mixed else cfg.sliding,
                deterministic=deterministic,
                name="layers",
            )
            carry, _ = layers(carry, (numbers, jnp.asarray(cfg.sliding) if mixed else numbers), context)
        else:
            layers = Layers(**self.fields(), layer=layer, deterministic=deterministic, name="layers")
            carry, _ = layers(carry, None, context)
        x, cache = carry
        return self.norm(x, "norm").reshape(*input_ids.shape, cfg.hidden_size), cache


class Decoder(_Module):
    """A causal language model of the Llama family: token ids to logits.

    Fields: `config`; `dtype`, what it computes in (None follows the parameters); `param_dtype`; `scan_layers`, whether
    the layers are stacked and scanned; `remat`, what the backward pass may read back from the forward pass of a layer:
    None for everything, `"full"` for nothing but what comes into the layer, `"offload"` for that, from the host's
    memory, `"dots"` for the products with weights, or the name of one of `jax.checkpoint_policies` that takes no
    arguments (`REMAT`).

    >>> cfg = DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                     num_attention_heads=4, num_key_value_heads=2)
    >>> model, ids = Decoder(cfg), jnp.array([[3, 1, 4, 1, 5]])
    >>> params = nn.meta.unbox(model.init(jax.random.key(0), ids)["params"])
    >>> model.apply({"params": params}, ids).shape
    (1, 5, 50)
    >>> logits, cache = model.apply({"params": params}, ids, cache=init_cache(model, batch=1, capacity=8))
    >>> logits, cache = model.apply({"params": params}, jnp.array([[9]]), cache=cache)  # goes on where that ended
    >>> logits.shape, int(cache["index"])
    ((1, 1, 50), 6)
    """

    scan_layers: bool = True
    remat: str | None = None

    @property
    def stacked_layers(self) -> str | None:
        """Below which path of its parameters all layers lie stacked, see `jpeft.models.stacking`."""
        return "model/layers" if self.scan_layers else None

    def setup(self) -> None:
        cfg = self.config
        self.model = Model(**self.fields(), scan_layers=self.scan_layers, remat=self.remat)
        if not cfg.tie_word_embeddings:
            init = nn.initializers.normal(cfg.initializer_range)
            self.lm_head = nn.Dense(
                cfg.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.with_logical_partitioning(init, ("embed", "vocab")),
            )

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Shaped[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: Mapping[str, Any] | None = None,
        logits_to_keep: int = 0,
        deterministic: bool = True,
    ) -> Any:
        """Args:
          attention_mask: 1 for tokens, 0 for padding on either side; None is all tokens. With a cache, of the new ones.
          position_ids: None counts from 0, padding included; with a cache, tokens only, on from what it holds.
          segment_ids: tokens attend within their own segment only (several examples in one row).
          cache: as `init_cache` made it or the last call returned it.
          logits_to_keep: of how many last positions; 0 is all.
          deterministic: no dropout on the attention weights; otherwise `rngs={"dropout": key}` is needed.

        Returns:
          Logits, float32 `[batch, length, vocabulary]`; with a cache, `(logits, cache)`.
        """
        states = self.hidden_states(
            input_ids, attention_mask, position_ids, segment_ids, cache=cache, deterministic=deterministic
        )
        states, cache = states if cache is not None else (states, None)
        logits = self.logits(states[:, -logits_to_keep:])
        return logits if cache is None else (logits, cache)

    def hidden_states(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Shaped[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: Mapping[str, Any] | None = None,
        deterministic: bool = True,
    ) -> Any:
        """What `logits` takes, `[batch, length, hidden]`; with a cache, `(states, cache)`. Arguments as for a call."""
        if cache is None:
            context = self._context(input_ids, attention_mask, position_ids, segment_ids)
            return self.model(input_ids, None, context, deterministic)[0]
        if segment_ids is not None:
            raise ValueError("segment_ids and a cache do not go together: a cache holds one sequence a row")
        context, seen = self._cached_context(input_ids, attention_mask, position_ids, cache)
        held = {name: cache[name] for name in ("key", "value")}
        states, held = self.model(input_ids, held, context, deterministic)
        # What does not fit is written over the end, and a traced index cannot refuse it: NaN then, not wrong numbers.
        fits = cache["index"] + input_ids.shape[1] <= cache["seen"].shape[1]
        states = jnp.where(fits, states, jnp.nan)
        return states, {**held, "seen": seen, "index": cache["index"] + input_ids.shape[1]}

    def logits(self, states: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocabulary"]:
        """The output head over `hidden_states`, in float32."""
        head = self.model.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        logits = head(ops.tokens_in_one(states)).reshape(*states.shape[:-1], -1).astype(jnp.float32)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = jnp.tanh(logits / cap) * cap
        return logits

    def _context(self, input_ids: jax.Array, attention_mask: Any, position_ids: Any, segment_ids: Any) -> Context:
        length = input_ids.shape[1]
        positions = jnp.arange(length)[None] if position_ids is None else position_ids
        if attention_mask is None and segment_ids is None and isinstance(self.config.sliding, bool):
            return Context(self._tables(positions), (None, None))
        allowed = jnp.ones((1, 1, 1, length), bool)
        if attention_mask is not None:
            allowed = jnp.asarray(attention_mask, bool)[:, None, None, :]
        if segment_ids is not None:
            allowed &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        full = near = ops.causal_mask(length, length) & allowed
        if self.config.sliding is not False:
            near = ops.causal_mask(length, length, self.config.sliding_window) & allowed
        return Context(self._tables(positions), (full, near))

    def _cached_context(
        self, input_ids: jax.Array, attention_mask: Any, position_ids: Any, cache: Mapping[str, Any]
    ) -> tuple[Context, Bool[Array, "batch capacity"]]:
        length, (rows, capacity) = input_ids.shape[1], cache["seen"].shape
        held = cache["index"]
        full = not isinstance(held, Tracer) and int(held) + length > capacity
        if rows != input_ids.shape[0] or length > capacity or full:
            raise ValueError(
                f"input_ids {list(input_ids.shape)} do not fit a cache of {rows} rows and capacity {capacity}"
                + (f", of which {int(held)} are used" if full else "")
            )
        real = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
        positions = position_ids
        if positions is None:
            counted = cache["seen"].sum(axis=1, keepdims=True) + jnp.cumsum(real, axis=1) - 1
            positions = jnp.maximum(counted, 0)  # padding before the first token
        index = cache["index"]
        seen = jax.lax.dynamic_update_slice(cache["seen"], real, (0, index))
        full = near = ops.causal_mask(length, capacity, None, index) & seen[:, None, None, :]
        if self.config.sliding is not False:  # a window counts tokens, not the padding that may lie between them
            tokens = jnp.cumsum(seen, axis=1)
            own = jax.lax.dynamic_slice_in_dim(tokens, index, length, axis=1)
            near = full & (own[:, :, None] - tokens[:, None, :] < (self.config.sliding_window or capacity))[:, None]
        return Context(self._tables(positions), (full, near), index), seen

    def _tables(self, positions: Int[Array, "#batch length"]) -> tuple[Any, Any]:
        cfg = self.config
        tables = {
            r: r.table(positions, cfg.head_dim, cfg.max_position_embeddings)
            for r in dict.fromkeys((cfg.rotary, cfg.rotary_sliding or cfg.rotary))  # in one order in all processes
        }
        return tables[cfg.rotary], tables[cfg.rotary_sliding or cfg.rotary]


register_attention(SelfAttention)  # where prefixes go in


def init_cache(model: Decoder, batch: int, capacity: int, dtype: Any = None) -> dict[str, jax.Array]:
    """An empty cache: a plain tree. Rows hold one sequence each; padding in it is never attended to.

    `key` and `value` are `[layers, batch, kv_heads, capacity, head_dim]`; `seen` `[batch, capacity]` says which slots
    hold tokens; `index` is the next free slot, the same in all rows. A call that does not fit is a ValueError; inside
    `jax.jit`, where the index is not known, it gives NaN.

    Args:
      dtype: of keys and values; None is what the model computes in.

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


def grow_cache(cache: Mapping[str, jax.Array], capacity: int) -> dict[str, jax.Array]:
    """The same cache with free slots up to `capacity`.

    >>> cfg = DecoderConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    >>> grow_cache(init_cache(Decoder(cfg), batch=3, capacity=16), 32)["value"].shape
    (2, 3, 2, 32, 8)
    """
    free = (0, capacity - cache["seen"].shape[1])
    return {
        "key": jnp.pad(cache["key"], ((0, 0), (0, 0), (0, 0), free, (0, 0))),
        "value": jnp.pad(cache["value"], ((0, 0), (0, 0), (0, 0), free, (0, 0))),
        "seen": jnp.pad(cache["seen"], ((0, 0), free)),
        "index": cache["index"],
    }


# --- HuggingFace's side: a `jpeft.models.loading.Family` --------------------------------------------------------------

_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 4, "vocab_size": 256000,
          "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
          "query_pre_attn_scalar": 256.0, "sliding_window": 4096, "tie_word_embeddings": True,
          "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
         "sliding_window": 4096}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {  # where HuggingFace's config class departs from DecoderConfig
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {**_GEMMA, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0},
    "gemma3_text": {**_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072},
}  # fmt: skip
_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_THETA = {"gemma3_text": 1e6}
# Fields that change the maths in a way this decoder does not follow, each with the one value that is accepted.
_FIXED = {"use_bidirectional_attention": False, "partial_rotary_factor": 1.0}

OPTIONS = frozenset({"scan_layers", "remat"})


def from_config(
    config: Mapping[str, Any], *, dtype: Any = None, param_dtype: Any = jnp.float32, **options: Any
) -> Decoder:
    """The decoder that a `config.json` describes. `options`: `scan_layers`, `remat`. Inverse of `to_config`.

    Raises:
      ValueError: a field has a value that the decoder does not follow.

    >>> from_config({"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 8}).config.num_key_value_heads
    8
    """
    if config["model_type"] == "gemma3":  # the text part of a model that also sees
        config = _text_config(config)
    kind = config["model_type"]
    for name, accepted in _FIXED.items():
        if config.get(name) not in (None, accepted):
            raise ValueError(f"{name}={config[name]!r} is not supported, only {accepted!r}")
    if config.get("quantization_config"):
        raise ValueError("its weights are quantised (quantization_config), which is not read here; load the original")
    given = _given(kind, config)
    _check_fields(given)
    given |= _attention_kinds(kind, config, given)
    cfg = DecoderConfig(model_type=kind, **given, **_rotary(kind, config))
    _check(cfg)
    if options.get("remat") is not None:
        _known_remat(options["remat"])
    return Decoder(cfg, dtype=dtype, param_dtype=param_dtype, **options)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model that also sees: its text part, with what it says of both."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config={text!r} is not an object")
    both = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
    return {**{name: config[name] for name in both if name in config}, **text, "model_type": "gemma3_text"}


def _given(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that carry over by name."""
    gemma = kind.startswith("gemma")
    given = dict(_DEFAULTS[kind])
    special = {"model_type", "layer_types", "rotary", "rotary_sliding", "qk_norm", "gemma", "output_bias"}
    for field in dataclasses.fields(DecoderConfig):
        name = {"hidden_act": "hidden_activation"}.get(field.name, field.name) if gemma else field.name
        null_means_none = field.name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
                                         "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
        if field.name not in special and name in config and (config[name] is not None or null_means_none):
            given[field.name] = config[name]
    if isinstance(given.get("eos_token_id"), list):
        given["eos_token_id"] = tuple(given["eos_token_id"])
    given["gemma"] = gemma
    given["qk_norm"] = kind in ("qwen3", "gemma3_text")
    given["output_bias"] = bool(given.get("attention_bias"))
    if kind == "qwen2":  # biases are fixed there, in these places
        given |= {"attention_bias": True, "output_bias": False}
    if kind == "mistral":
        given |= {"attention_bias": False, "output_bias": False}
    if kind != "llama":
        given["mlp_bias"] = False
    if not gemma:
        given["query_pre_attn_scalar"] = 0.0
    if kind != "gemma2":  # transformers' gemma 3 has the field and does not use it
        given["attn_logit_softcapping"] = None
    if not gemma:
        given["final_logit_softcapping"] = None
    return given


def _attention_kinds(kind: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    layers, window = given.get("num_hidden_layers", DecoderConfig.num_hidden_layers), given.get("sliding_window")
    if layers > 10_000:
        raise ValueError(f"num_hidden_layers={layers} is not a number of layers")
    if kind == "llama" or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        window = None
    listed = config.get("layer_types") if kind != "llama" else None
    if listed is not None:
        known = isinstance(listed, list | tuple) and all(entry in (SLIDING, FULL) for entry in listed)
        if not known or len(listed) != layers:
            raise ValueError(f"layer_types={listed!r} does not say {SLIDING} or {FULL} for each of {layers} layers")
        if kind == "mistral" and len(set(listed)) > 1:
            raise ValueError("mistral with layers of both kinds is another model (ministral), which is not supported")
        types = tuple(listed)
    elif kind.startswith("gemma"):
        every = 2 if kind == "gemma2" else _whole(config, "sliding_window_pattern", 6, at_least=1)
        types = tuple(SLIDING if (i + 1) % every else FULL for i in range(layers))
    elif kind.startswith("qwen"):
        first = _whole(config, "max_window_layers", 28)
        types = tuple(SLIDING if window is not None and i >= first else FULL for i in range(layers))
    else:
        types = ((FULL if window is None else SLIDING),) * layers
    if SLIDING in types and window is None:
        raise ValueError(f"there are layers with {SLIDING}, but there is no sliding_window")
    return {"layer_types": types, "sliding_window": window if SLIDING in types else None}


def _whole(config: Mapping[str, Any], name: str, default: int, at_least: int = 0) -> int:
    value = default if config.get(name) is None else config[name]
    if not _is_whole(value) or value < at_least:
        raise ValueError(f"{name}={value!r} is not a whole number that is at least {at_least}")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rotary(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    theta = _THETA.get(kind, 10000.0) if config.get("rope_theta") is None else config["rope_theta"]
    scaling = next((config[k] for k in ("rope_parameters", "rope_scaling") if config.get(k) is not None), {})
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling={scaling!r} is not an object")
    if kind != "gemma3_text":
        return {"rotary": rotary_from_config(scaling, theta)}
    local = config.get("rope_local_base_freq") or 10000.0
    if FULL in scaling or SLIDING in scaling:  # transformers 5 has one for each kind of layer
        return {
            "rotary": rotary_from_config(scaling.get(FULL), theta),
            "rotary_sliding": rotary_from_config(scaling.get(SLIDING), local),
        }
    return {"rotary": rotary_from_config(scaling, theta), "rotary_sliding": rotary_from_config(None, local)}


def _check_fields(given: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(DecoderConfig):
        name, kind = field.name, str(field.type)
        if name not in given or (given[name] is None and kind.endswith("None")):
            continue
        value = given[name]
        if name.endswith("_token_id"):
            ids = value if isinstance(value, tuple) and "tuple" in kind else (value,)
            if not all(map(_is_whole, ids)):
                raise ValueError(f"{name}={value!r} is not a token id")
        elif "int" in kind and not (_is_whole(value) and 0 < value < 1 << 31):
            raise ValueError(f"{name}={value!r:.40} is not a positive whole number of a size that can be")
        elif kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is neither true nor false")
        elif "float" in kind:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value < 1e30):
                raise ValueError(f"{name}={value!r:.40} is not a number that is at least 0")
            if value == 0 and name.endswith("_softcapping"):
                raise ValueError(f"{name}={value!r} leaves nothing of what it caps; null caps nothing")


def _check(cfg: DecoderConfig) -> None:
    if not isinstance(cfg.hidden_act, str) or cfg.hidden_act not in ops.ACTIVATIONS:
        raise ValueError(f"hidden_act={cfg.hidden_act!r} is not supported, only {', '.join(ops.ACTIVATIONS)}")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ValueError(
            f"{cfg.num_attention_heads} query heads do not split over {cfg.num_key_value_heads} key and value heads"
        )
    if cfg.head_dim > 1 << 16:
        raise ValueError(f"head_dim={cfg.head_dim} is more than any model's")
    if cfg.head_dim < 2 or cfg.head_dim % 2:
        raise ValueError(f"head_dim={cfg.head_dim} is no even number, but rotary positions turn pairs")


def to_config(model: Decoder) -> dict[str, Any]:
    """The `config.json` of a decoder. Inverse of `from_config`.

    >>> to_config(from_config({"model_type": "gemma2"}))["hidden_activation"]
    'gelu_pytorch_tanh'
    """
    cfg, kind = model.config, model.config.model_type
    fields = dataclasses.asdict(cfg)
    for name in ("gemma", "qk_norm", "output_bias", "rotary", "rotary_sliding"):
        del fields[name]
    fields |= {"rope_theta": cfg.rotary.theta, "rope_scaling": rotary_to_config(cfg.rotary)}
    fields["layer_types"] = list(cfg.layer_types)
    if isinstance(cfg.eos_token_id, tuple):
        fields["eos_token_id"] = list(cfg.eos_token_id)
    if cfg.gemma:
        fields["hidden_activation"] = fields.pop("hidden_act")
    else:
        del fields["query_pre_attn_scalar"], fields["attn_logit_softcapping"], fields["final_logit_softcapping"]
    if kind in ("llama", "mistral"):
        del fields["layer_types"]
    if kind == "llama":
        del fields["sliding_window"]
    else:
        del fields["mlp_bias"]
    if kind in ("mistral", "qwen2"):
        del fields["attention_bias"]
    if kind.startswith("qwen"):
        fields["use_sliding_window"] = cfg.sliding_window is not None
    if cfg.rotary_sliding is not None:
        fields["rope_local_base_freq"] = cfg.rotary_sliding.theta
        if (scaling := rotary_to_config(cfg.rotary_sliding)) is not None:  # which only transformers 5 can say
            fields["rope_parameters"] = {FULL: fields.pop("rope_scaling"), SLIDING: scaling}
    return {"architectures": [_ARCHITECTURE[kind]], **fields}


def prefix(model: Decoder) -> str:
    """What stands before the text model's tensor names in a checkpoint that also sees.

    >>> prefix(Decoder(DecoderConfig()))
    'language_model.'
    """
    return "language_model."


def extras(model: Decoder) -> re.Pattern[str]:
    """The tensors that may stand beside the decoder: buffers of old checkpoints, and a tied head.

    >>> bool(extras(Decoder(DecoderConfig(tie_word_embeddings=True))).fullmatch("lm_head.weight"))
    True
    """
    buffers = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return re.compile(rf"{buffers}|lm_head\.weight" if model.config.tie_word_embeddings else buffers)


def axis_names(path: Path) -> tuple[str | None, ...]:
    """None beside those that the parameters' boxes tell.

    >>> axis_names(("model", "norm", "scale"))
    ()
    """
    return ()


def example_inputs(model: Decoder) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest inputs that the model takes, abstract.

    >>> example_inputs(Decoder(DecoderConfig()))
    (ShapeDtypeStruct(shape=(1, 1), dtype=int32),)
    """
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
