"""Llama and its family as one Linen decoder: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text).

Touvron et al. 2023, https://arxiv.org/abs/2302.13971. The parameter tree carries the names of HuggingFace's torch
modules with `/` for `.`, and Flax's leaf names. The layers are stacked below `model/layers`, so that one layer is
traced and compiled whatever their number: `model/layers/self_attn/q_proj/kernel` is `[layers, in, out]`. With
`scan_layers=False` each has its own subtree, `model/layers/0/self_attn/q_proj/kernel`; `jpeft.core.stacking` converts
one tree into the other.

The members of the family differ in data only (`DecoderConfig`), down to the kind of each layer: layers with a sliding
window and layers with full attention differ in their mask and rotary table only, so one scan runs both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from jpeft.core.attention import register_attention
from jpeft.models import ops
from jpeft.models.kv_cache import write_layer
from jpeft.models.remat import LAYER_INPUT, remat_policy
from jpeft.models.rotary import Rotary, rotate

States = Float[Array, "*tokens hidden"]  # [batch, length, hidden] or [tokens, hidden], see `ops.tokens_in_one`
Heads = Float[Array, "batch length heads head_dim"]
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The configuration of the decoder. Names are those of HuggingFace's configs as far as these have the field.

    >>> DecoderConfig(model_type="llama", vocab_size=100, hidden_size=64, num_attention_heads=4).head_dim
    16
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    attention_bias: bool = False  # biases of the query, key and value projections
    output_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # normalizes queries and keys by head, before rotation
    gemma: bool = False  # norms scale by 1 + w, also after sublayers; embeddings scale by sqrt(hidden_size)
    query_pre_attn_scalar: float = 0.0  # scores are divided by its square root; 0: head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()  # of each layer; (): full attention in all
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    rotary_sliding: Rotary | None = None  # of sliding layers; None: the same
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
        """The number of positions that the model supports."""
        return self.rotary.context(self.max_position_embeddings)

    @property
    def sliding(self) -> bool | tuple[bool, ...]:
        """Whether layers have a sliding window: one flag if all are alike, else one for each."""
        flags = tuple(kind == SLIDING for kind in self.layer_types)
        return flags[0] if len(set(flags)) == 1 else flags


@flax.struct.dataclass
class Context:
    """Inputs that all layers share in one call. A pair is for full and sliding layers; both may be the same object.

    Attributes:
      rotary: a pair of tables, see `Rotary.table`.
      masks: a pair of `[batch, 1, queries, keys]`; None: causal over the queries' own keys.
      index: the position in the cache of the first new key.
      shape: batch and length.
    """

    rotary: tuple[Any, Any]
    masks: tuple[Any, Any]
    index: Any = None
    shape: tuple[int, int] = flax.struct.field(default=(0, 0), pytree_node=False)


class _Module(nn.Module):
    """Base class: the common fields and submodules."""

    config: DecoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def fields(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "param_dtype": self.param_dtype}

    def dense(self, x: jax.Array, features: int, name: str, axes: tuple[str, str], bias: bool = False) -> jax.Array:
        """A linear layer; `axes` are the logical names of its input and output."""
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
    """Grouped-query attention with rotary embedding, and its projections."""

    sliding: bool | None = None
    deterministic: bool = True

    def setup(self) -> None:
        self.weights_dropout = nn.Dropout(self.config.attention_dropout)

    @nn.compact
    def __call__(self, x: States, cache: Any, layer: Any, sliding: Any, context: Context) -> tuple[States, Any]:
        """The output states, and the cache with the new keys and values.

        Args:
          x: the input states.
          cache: `{"key", "value"}` of all layers, `[layers, batch, kv_heads, capacity, head_dim]`, or None.
          layer: this layer's number.
          sliding: whether this layer has a sliding window.
          context: the inputs that all layers share.
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
            cache, key, value = write_layer(cache, key, value, layer, context.index)
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
        prefix: ops.Prefix | None = None,
    ) -> Float[Array, "batch queries heads head_dim"]:
        """Attention over rotated queries and keys; the only use of keys, values and mask, with or without a cache.

        Args:
          query: the queries.
          key: the keys.
          value: the values.
          mask: broadcasts to `[batch, heads, queries, keys]`, True where a query may attend. None: causal; the last
            keys are the queries' own, and all queries attend to the keys before those.
          causal: the given mask hides all keys after a query's own, and the last keys are the queries' own.
          prefix: keys and values `[n, kv_heads, head_dim]` that all queries attend to beside the others.
        """
        cfg = self.config
        dropout = None
        if cfg.attention_dropout and not self.deterministic:
            dropout = functools.partial(self.weights_dropout, deterministic=False)
        return ops.attention(
            query,
            key,
            value,
            mask,
            scale=cfg.query_pre_attn_scalar**-0.5,
            window=cfg.sliding_window if self.sliding else None,
            softcap=cfg.attn_logit_softcapping,
            dropout=dropout,
            causal=causal,
            prefix=prefix,
        )


def _pick(sliding: Any, pair: tuple[Any, Any]) -> Any:
    """One of (full, sliding); a `where` if `sliding` is traced, in a scan over layers of both kinds."""
    if isinstance(sliding, bool):
        return pair[sliding]
    return pair[0] if pair[0] is pair[1] else jax.tree.map(lambda f, s: jnp.where(sliding, s, f), *pair)


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
    """One decoder layer, the body of the scan. `sliding` is None in a scan over layers of both kinds."""

    sliding: bool | None = None
    deterministic: bool = True

    @nn.compact
    def __call__(self, carry: tuple[States, Any], inputs: tuple[Any, Any], context: Context) -> tuple[Any, None]:
        """The new carry.

        Args:
          carry: the states, and the cache of all layers or None.
          inputs: the layer's number, and whether it has a sliding window (used if the field is None).
          context: the inputs that all layers share.
        """
        (x, cache), (layer, sliding) = carry, inputs
        x = checkpoint_name(x, LAYER_INPUT)
        sliding = sliding if self.sliding is None else self.sliding
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
    """Unstacked layers, named `0`, `1`, …"""

    layer: Any = Layer
    deterministic: bool = True

    @nn.compact
    def __call__(self, carry: Any, inputs: Any, context: Context) -> tuple[Any, None]:
        for i, kind in enumerate(self.config.layer_types):
            layer = self.layer(**self.fields(), sliding=kind == SLIDING, deterministic=self.deterministic, name=str(i))
            carry, _ = layer(carry, (i, None), context)
        return carry, None


class Model(_Module):
    """The decoder without its head: token ids to the normalized states of the last layer."""

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
            layer = nn.remat(Layer, policy=remat_policy(self.remat), prevent_cse=not self.scan_layers)
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

    Attributes:
      config: the configuration.
      dtype: the dtype of computation; None: the parameters' dtype.
      param_dtype: the dtype of the parameters.
      scan_layers: whether the layers are stacked and scanned.
      remat: the activations of a layer that are saved for the backward pass. None: all; `"full"`: only its input;
        `"offload"`: only its input, in host memory; `"dots"`: the products with weights; or the name of one of
        `jax.checkpoint_policies` that takes no arguments, see `jpeft.models.remat`.

    >>> from jpeft.models.kv_cache import init_cache
    >>> cfg = DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                     num_attention_heads=4, num_key_value_heads=2)
    >>> model, ids = Decoder(cfg), jnp.array([[3, 1, 4, 1, 5]])
    >>> params = nn.meta.unbox(model.init(jax.random.key(0), ids)["params"])
    >>> model.apply({"params": params}, ids).shape
    (1, 5, 50)
    >>> logits, cache = model.apply({"params": params}, ids, cache=init_cache(model, batch=1, capacity=8))
    >>> logits, cache = model.apply({"params": params}, jnp.array([[9]]), cache=cache)  # continues there
    >>> logits.shape, int(cache["index"])
    ((1, 1, 50), 6)
    """

    scan_layers: bool = True
    remat: str | None = None
    shared_segment: ClassVar[int] = -(2**15)  # the id of a segment at the beginning of rows that all others see, too

    @property
    def stacked_layers(self) -> str | None:
        """The path in the parameter tree below which all layers are stacked, or None. See `jpeft.core.stacking`."""
        return "model/layers" if self.scan_layers else None

    @property
    def tied_modules(self) -> dict[str, str]:
        """The modules of HuggingFace's model that share a weight here: the head, if it is tied to the embedding."""
        return {"lm_head": "model/embed_tokens"} if self.config.tie_word_embeddings else {}

    @nn.nowrap
    def default_positions(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Shaped[Array, "batch length"] | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> Int[Array, "#batch length"]:
        """The positions of a call that gives none: from 0; with a cache of tokens only, continuing those in it."""
        if cache is None:
            return jnp.arange(input_ids.shape[1])[None]
        real = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
        counted = cache["seen"].sum(axis=1, keepdims=True) + jnp.cumsum(real, axis=1) - 1
        return jnp.maximum(counted, 0)  # padding before the first token

    @nn.nowrap
    def unrolled(self) -> Decoder:
        """The same model with unstacked layers."""
        return self.clone(scan_layers=False)

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
        """The logits of each token, or with a cache `(logits, cache)`.

        Args:
          input_ids: the token ids.
          attention_mask: 1 for tokens, 0 for padding on either side; None: all are tokens. With a cache, of new tokens.
          position_ids: None: counted from 0, padding included; with a cache, tokens only, continuing those in it.
          segment_ids: tokens attend within their own segment only (several examples packed in one row), and to that of
            the id `shared_segment`, for virtual tokens that all examples share.
          cache: from `init_cache` or the previous call.
          logits_to_keep: the number of last positions to compute logits for; 0: all.
          deterministic: disables dropout on the attention weights; otherwise `rngs={"dropout": key}` is needed.

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
        """The input of `logits`, `[batch, length, hidden]`; with a cache `(states, cache)`. Arguments as for a call."""
        if cache is None:
            context = self._context(input_ids, attention_mask, position_ids, segment_ids)
            return self.model(input_ids, None, context, deterministic)[0]
        if segment_ids is not None:
            raise ValueError("segment_ids cannot be combined with a cache, which holds one sequence per row")
        context, seen = self._cached_context(input_ids, attention_mask, position_ids, cache)
        held = {name: cache[name] for name in ("key", "value")}
        states, held = self.model(input_ids, held, context, deterministic)
        # Tokens beyond the capacity overwrite the last ones, and a traced index cannot raise: NaN, not wrong logits.
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
        positions = self.default_positions(input_ids) if position_ids is None else position_ids
        if attention_mask is None and segment_ids is None and isinstance(self.config.sliding, bool):
            return Context(self._tables(positions), (None, None))
        allowed = jnp.ones((1, 1, 1, length), bool)
        if attention_mask is not None:
            allowed = jnp.asarray(attention_mask, bool)[:, None, None, :]
        shared = False
        if segment_ids is not None:
            shared = (segment_ids == self.shared_segment)[:, None, None, :]
            allowed &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None] | shared
        full = near = ops.causal_mask(length, length) & allowed
        if (window := self.config.sliding_window) is not None and self.config.sliding is not False:
            near = ops.causal_mask(length, length, window)
            if segment_ids is not None:  # tokens of other texts lie between a token and those that all share
                near = jnp.where(shared, (positions[:, :, None] - positions[:, None, :] < window)[:, None], near)
            near &= full
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
            positions = self.default_positions(input_ids, attention_mask, cache)
        index = cache["index"]
        seen = jax.lax.dynamic_update_slice(cache["seen"], real, (0, index))
        full = near = ops.causal_mask(length, capacity, None, index) & seen[:, None, None, :]
        if self.config.sliding is not False:  # a window counts tokens, not the padding between them
            tokens = jnp.cumsum(seen, axis=1)
            own = jax.lax.dynamic_slice_in_dim(tokens, index, length, axis=1)
            near = full & (own[:, :, None] - tokens[:, None, :] < (self.config.sliding_window or capacity))[:, None]
        return Context(self._tables(positions), (full, near), index), seen

    def _tables(self, positions: Int[Array, "#batch length"]) -> tuple[Any, Any]:
        cfg = self.config
        tables = {
            r: r.table(positions, cfg.head_dim, cfg.max_position_embeddings)
            for r in dict.fromkeys((cfg.rotary, cfg.rotary_sliding or cfg.rotary))  # in the same order on all processes
        }
        return tables[cfg.rotary], tables[cfg.rotary_sliding or cfg.rotary]


register_attention(SelfAttention)  # for prefix tuning
