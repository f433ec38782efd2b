"""BERT and its family as one Linen encoder: bert, roberta, xlm-roberta, camembert, electra, distilbert.

Devlin et al. 2018, https://arxiv.org/abs/1810.04805. The parameter tree carries the names of HuggingFace's torch modules
with ``/`` for ``.`` and Flax's leaf names: ``encoder/layer/0/attention/self/query/kernel`` is torch's
``encoder.layer.0.attention.self.query.weight``, transposed. So a HuggingFace PEFT key names the same weight here.

From the embeddings to the output the states are flat, ``[batch * length, hidden]``: XLA CPU is more than twice as slow
at a contraction over ``[batch, length, features]`` (a dense layer with its weight gradient, 32 x 64 tokens of 384:
37.8 ms against 16.4), and no other backend minds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)``, by erf as torch computes it (``nn.gelu``'s erfc takes XLA CPU four times as long)."""
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    # gelu' = Phi(x) + x phi(x), known in the forward pass: the one residual, where autodiff would keep three.
    (x,), (dx,) = primals, tangents
    return gelu(x), dx * (_normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


@jax.custom_jvp
def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax over the last axis, where ``mask`` is True."""
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights * (1 / weights.sum(axis=-1, keepdims=True))


@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    # d softmax = p (ds - <p, ds>): p is the one residual, and is 0 where masked, so that the mask is not needed again.
    weights, ds = masked_softmax(*primals), tangents[0]
    return weights, weights * (ds - (weights * ds).sum(axis=-1, keepdims=True))


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_fast": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """What of a ``config.json`` shapes the encoder; names and defaults are those of HuggingFace's ``BertConfig``."""

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    embedding_size: int | None = None  # electra: where its embeddings are narrower than its layers
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0


class _Module(nn.Module):
    """The fields that every module below has."""

    config: BertConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def fields(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "param_dtype": self.param_dtype}

    def dense(self, features: int, name: str | None = None) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)

    def embed(self, rows: int, features: int, name: str) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, features, dtype=self.dtype, param_dtype=self.param_dtype, embedding_init=init, name=name)

    def layer_norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def dropout(self, x: jax.Array, deterministic: bool) -> jax.Array:
        return nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)


class Embeddings(_Module):
    """Ids ``[batch, length]`` to states ``[batch, length, embedding]``: word, position and token type, normalised."""

    @nn.compact
    def __call__(self, input_ids, token_type_ids, position_ids, deterministic):
        cfg = self.config
        width = cfg.embedding_size or cfg.hidden_size
        if position_ids is None:
            position_ids = default_positions(cfg, input_ids)
        states = self.embed(cfg.vocab_size, width, "word_embeddings")(input_ids)
        states += self.embed(cfg.max_position_embeddings, width, "position_embeddings")(position_ids)
        if cfg.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            states += self.embed(cfg.type_vocab_size, width, "token_type_embeddings")(types)
        return self.dropout(self.layer_norm("LayerNorm")(states), deterministic)


def default_positions(cfg: BertConfig, input_ids: jax.Array) -> jax.Array:
    """Positions ``[batch or 1, length]``: from 0; in the roberta family real tokens count from ``pad_token_id + 1``."""
    if cfg.model_type not in ("roberta", "xlm-roberta", "camembert"):
        return jnp.arange(input_ids.shape[1])[None]
    real = (input_ids != cfg.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + cfg.pad_token_id


class SelfAttention(_Module):
    """Multi-head self-attention over flat states ``[batch * length, hidden]``, before the output projection."""

    @nn.compact
    def __call__(self, x, batch, mask, deterministic):
        query, key, value = (self.project(x, batch, name) for name in ("query", "key", "value"))
        return self.attend(query, key, value, mask, deterministic).reshape(x.shape)

    def project(self, x, batch, name):
        """Flat states to ``[batch, length, heads, head_dim]``."""
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        return self.dense(width, name)(x).reshape(batch, -1, heads, width // heads)

    def attend(self, query, key, value, mask, deterministic):
        """Softmax attention; the one place where keys, values and mask pass.

        Args:
            query: ``[batch, q_length, heads, head_dim]``.
            key, value: ``[batch, kv_length, heads, head_dim]``; ``kv_length`` may differ from ``q_length``.
            mask: boolean, broadcastable to ``[batch, heads, q_length, kv_length]``, True where a query may attend; or None.
            deterministic: no dropout on the attention weights.

        Returns:
            ``[batch, q_length, heads, head_dim]``.
        """
        # Heads before positions, so that all five products of the forward and backward pass are over [length, head_dim]
        # matrices as they lie.
        query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        weights = masked_softmax(jnp.einsum("bhqd,bhkd->bhqk", query, key), mask)
        weights = nn.Dropout(self.config.attention_probs_dropout_prob)(weights, deterministic=deterministic)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, value).swapaxes(1, 2)


class AddNorm(_Module):
    """Dense, dropout, residual sum, LayerNorm: the end of BERT's two sublayers."""

    @nn.compact
    def __call__(self, x, residual, deterministic):
        x = self.dropout(self.dense(self.config.hidden_size, "dense")(x), deterministic)
        return self.layer_norm("LayerNorm")(x + residual)


class Attention(_Module):
    @nn.compact
    def __call__(self, x, batch, mask, deterministic):
        context = SelfAttention(**self.fields(), name="self")(x, batch, mask, deterministic)
        return AddNorm(**self.fields(), name="output")(context, x, deterministic)


class Intermediate(_Module):
    @nn.compact
    def __call__(self, x):
        return ACTIVATIONS[self.config.hidden_act](self.dense(self.config.intermediate_size, "dense")(x))


class Layer(_Module):
    """One transformer layer on flat states ``[batch * length, hidden]``."""

    @nn.compact
    def __call__(self, x, batch, mask, deterministic):
        x = Attention(**self.fields(), name="attention")(x, batch, mask, deterministic)
        hidden = Intermediate(**self.fields(), name="intermediate")(x)
        return AddNorm(**self.fields(), name="output")(hidden, x, deterministic)


class DistilAttention(SelfAttention):
    """DistilBERT's attention, which holds its output projection."""

    @nn.compact
    def __call__(self, x, batch, mask, deterministic):
        query, key, value = (self.project(x, batch, name) for name in ("q_lin", "k_lin", "v_lin"))
        context = self.attend(query, key, value, mask, deterministic).reshape(x.shape)
        return self.dense(self.config.hidden_size, "out_lin")(context)


class DistilFeedForward(_Module):
    @nn.compact
    def __call__(self, x, deterministic):
        hidden = ACTIVATIONS[self.config.hidden_act](self.dense(self.config.intermediate_size, "lin1")(x))
        return self.dropout(self.dense(self.config.hidden_size, "lin2")(hidden), deterministic)


class DistilLayer(_Module):
    """The same layer under DistilBERT's names."""

    @nn.compact
    def __call__(self, x, batch, mask, deterministic):
        attended = DistilAttention(**self.fields(), name="attention")(x, batch, mask, deterministic)
        x = self.layer_norm("sa_layer_norm")(attended + x)
        return self.layer_norm("output_layer_norm")(
            DistilFeedForward(**self.fields(), name="ffn")(x, deterministic) + x
        )


class LayerStack(_Module):
    """The layers, named "0", "1", …"""

    block: type[nn.Module] = Layer

    @nn.compact
    def __call__(self, x, batch, mask, deterministic):
        for i in range(self.config.num_hidden_layers):
            x = self.block(**self.fields(), name=str(i))(x, batch, mask, deterministic)
        return x


class Encoder(_Module):
    """States ``[batch, length, hidden]`` and a mask as in :meth:`SelfAttention.attend` to states of the same shape."""

    block: type[nn.Module] = Layer

    @nn.compact
    def __call__(self, states, mask, deterministic):
        flat = states.reshape(-1, states.shape[-1])
        flat = LayerStack(**self.fields(), block=self.block, name="layer")(flat, states.shape[0], mask, deterministic)
        return flat.reshape(states.shape)


class Bert(_Module):
    """A BERT-family encoder."""

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        cfg = self.config
        states = Embeddings(**self.fields(), name="embeddings")(input_ids, token_type_ids, position_ids, deterministic)
        if cfg.embedding_size not in (None, cfg.hidden_size):
            states = self.dense(cfg.hidden_size, "embeddings_project")(states)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        if cfg.model_type == "distilbert":
            return Encoder(**self.fields(), block=DistilLayer, name="transformer")(states, mask, deterministic)
        return Encoder(**self.fields(), name="encoder")(states, mask, deterministic)


# --- HuggingFace's side: what jpeft.models.loading asks of a family ---

_PREFIX = {
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "camembert": "roberta.",
    "electra": "electra.",
    "distilbert": "distilbert.",
}
_ARCHITECTURE = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "electra": "ElectraModel",
    "distilbert": "DistilBertModel",
}
_ROBERTA = {"vocab_size": 50265, "pad_token_id": 1}
_ELECTRA = {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
_DEFAULTS = {  # where HuggingFace's config class differs from BertConfig
    "roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta": {"pad_token_id": 1},
    "electra": _ELECTRA,
    "distilbert": {"type_vocab_size": 0},
}
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# config.json fields that change the maths in a way this encoder does not follow, with the only value it accepts.
_FIXED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
}
EXTRAS = re.compile(  # tensors beside the encoder: kept by save, not part of the tree
    r"(embeddings\.(position_ids|token_type_ids)|(pooler|cls|lm_head|classifier|pre_classifier|qa_outputs|score"
    r"|vocab_\w+|generator_\w+|discriminator_predictions)\..*)"
)


def from_config(config: Mapping[str, Any], *, dtype: Any = None, param_dtype: Any = jnp.float32) -> Bert:
    """The encoder that a ``config.json`` describes; ValueError names a field that it cannot follow."""
    for field, accepted in _FIXED.items():
        if (config.get(field) or accepted) != accepted:
            raise ValueError(f"config.json: {field}={config[field]!r} is not supported (only {accepted!r})")
    model_type = config["model_type"]
    names = _DISTILBERT_NAMES if model_type == "distilbert" else {}
    given = {"model_type": model_type, **_DEFAULTS.get(model_type, {})}
    for field in dataclasses.fields(BertConfig):
        for name in (field.name, names.get(field.name)):
            if config.get(name) is not None:
                given[field.name] = config[name]
    return Bert(_checked(BertConfig(**given)), dtype=dtype, param_dtype=param_dtype)


def to_config(model: Bert) -> dict[str, Any]:
    """Inverse of :func:`from_config`: the fields of a ``config.json``."""
    config = {name: value for name, value in dataclasses.asdict(model.config).items() if value is not None}
    names = _DISTILBERT_NAMES if model.config.model_type == "distilbert" else {}
    config = {names.get(name, name): value for name, value in config.items()}
    return {"architectures": [_ARCHITECTURE[model.config.model_type]], **config}


def prefix(model: Bert) -> str:
    """What stands before the encoder's tensor names in a checkpoint that also holds a head."""
    return _PREFIX[model.config.model_type]


def example_inputs(model: Bert) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest inputs that the model takes, abstract."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def _checked(cfg: BertConfig) -> BertConfig:
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        whole = field.type.startswith("int")
        if whole and value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(f"config.json: {field.name}={value!r} is not a whole number")
        if field.type == "float" and not isinstance(value, int | float):
            raise ValueError(f"config.json: {field.name}={value!r} is not a number")
    if cfg.hidden_act not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={cfg.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    if cfg.num_attention_heads < 1 or cfg.hidden_size % cfg.num_attention_heads:
        raise ValueError(
            f"config.json: hidden_size={cfg.hidden_size} is not a multiple of "
            f"num_attention_heads={cfg.num_attention_heads}"
        )
    return cfg
