"""BERT and its family as one Linen encoder: bert, roberta, xlm-roberta, camembert, electra, distilbert.

Devlin et al. 2018, https://arxiv.org/abs/1810.04805. The parameter tree carries the names of HuggingFace's torch
modules with `/` for `.`, and Flax's leaf names: `encoder/layer/0/attention/self/query/kernel` is torch's
`encoder.layer.0.attention.self.query.weight`, transposed. A key of HuggingFace PEFT therefore names the same weight.

Inside the layers the states are flat, `[tokens, hidden]` with `tokens = batch * length`: XLA CPU is more than twice as
slow at a contraction over `[batch, length, features]` (a dense layer with its weight gradient, 32 x 64 tokens of 384:
37.8 ms against 16.4). On other backends both forms are the same product.

A pooler and the head of a `…ForSequenceClassification` are parts of the tree where a checkpoint has them, under torch's
names; `Bert.output` says what the model returns.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int, Shaped

from jpeft.core.attention import register_attention
from jpeft.core.geometry.base import Call
from jpeft.core.geometry.contraction import Contraction
from jpeft.core.geometry.registry import register_geometry
from jpeft.core.method import widened
from jpeft.models.ops import ACTIVATIONS, Mask, Prefix, for_each_row, masked_softmax, split_softmax

Flat = Float[Array, "tokens hidden"]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The configuration of the encoder. Names and defaults are those of HuggingFace's `BertConfig`.

    >>> BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536).hidden_act
    'gelu'
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    embedding_size: int | None = None  # in electra, embeddings may be narrower than layers
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # by default that of the hidden states
    initializer_range: float = 0.02
    pad_token_id: int = 0


@dataclasses.dataclass(frozen=True)
class _Unused(Contraction):
    """A dense layer that "all-linear" leaves out."""

    linear: ClassVar[bool] = False


class UnusedDense(nn.Module):
    """A dense layer whose output the model does not return.

    Methods find its weight, as HuggingFace PEFT does in a pooler. "all-linear" leaves it out: nothing would train it.
    """

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + bias


def _unused_geometry(call: Call) -> _Unused | None:
    shape = call.shapes.get("kernel")
    return None if shape is None else _Unused(spec="...i,io->...o", shape=shape, stored=shape)


class _Module(nn.Module):
    """Base class: the common fields and submodules."""

    config: BertConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def fields(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def dense(self, features: int, name: str, used: bool = True) -> nn.Dense | UnusedDense:
        init = nn.initializers.normal(self.config.initializer_range)
        kind = nn.Dense if used else UnusedDense
        return kind(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)

    def embed(self, rows: int, features: int, name: str) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, features, dtype=self.dtype, param_dtype=self.param_dtype, embedding_init=init, name=name)

    def layer_norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def dropout(self, x: jax.Array, deterministic: bool) -> jax.Array:
        return nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)


class Embeddings(_Module):
    """The sum of word, position and token-type embeddings, normalized."""

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        deterministic: bool,
    ) -> Float[Array, "batch length embedding"]:
        cfg = self.config
        width = cfg.embedding_size or cfg.hidden_size
        positions = default_positions(cfg, input_ids) if position_ids is None else position_ids
        states = self.embed(cfg.vocab_size, width, "word_embeddings")(input_ids)
        states += self.embed(cfg.max_position_embeddings, width, "position_embeddings")(positions)
        if cfg.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            states += self.embed(cfg.type_vocab_size, width, "token_type_embeddings")(types)
        return self.dropout(self.layer_norm("LayerNorm")(states), deterministic)


def default_positions(cfg: BertConfig, input_ids: Int[Array, "batch length"]) -> Int[Array, "#batch length"]:
    """Positions from 0. In the roberta family tokens count from `pad_token_id + 1`, and padding has `pad_token_id`.

    Raises:
      ValueError: the input is longer than the model has positions.

    >>> default_positions(BertConfig(model_type="roberta", pad_token_id=1), jnp.array([[0, 7, 2, 1]])).tolist()
    [[2, 3, 4, 1]]
    """
    length = input_ids.shape[1]
    offset = cfg.pad_token_id + 1 if cfg.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    if length + offset > cfg.max_position_embeddings:
        raise ValueError(f"{length} tokens, but the model has positions for {cfg.max_position_embeddings - offset}")
    if not offset:
        return jnp.arange(length)[None]
    real = (input_ids != cfg.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + cfg.pad_token_id


class SelfAttention(_Module):
    """Multi-head self-attention, without its output projection."""

    def setup(self) -> None:
        self.weights_dropout = nn.Dropout(self.config.attention_probs_dropout_prob)

    @nn.compact
    def __call__(self, x: Flat, batch: int, mask: Mask, deterministic: bool) -> Flat:
        query, key, value = (self.project(x, batch, name) for name in ("query", "key", "value"))
        return self.attend(query, key, value, mask, deterministic).reshape(x.shape)

    def project(self, x: Flat, batch: int, name: str) -> Float[Array, "batch length heads head_dim"]:
        """Queries, keys or values, split by example and head."""
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        return self.dense(width, name)(x).reshape(batch, -1, heads, width // heads)

    def attend(
        self,
        query: Float[Array, "batch q_length heads head_dim"],
        key: Float[Array, "batch kv_length heads head_dim"],
        value: Float[Array, "batch kv_length heads head_dim"],
        mask: Mask,
        deterministic: bool,
        prefix: Prefix | None = None,
    ) -> Float[Array, "batch q_length heads head_dim"]:
        """Softmax attention; the only use of keys, values and mask. `kv_length` may differ from `q_length`.

        Args:
          mask: broadcasts to `[batch, heads, q_length, kv_length]`, True where a query may attend; None: everywhere.
          deterministic: disables dropout on the attention weights.
          prefix: keys and values `[n, heads, head_dim]` that all queries attend to beside the others.
        """
        # Heads are moved before positions once, so that the [length, head_dim] matrices of the five products of forward
        # and backward pass are contiguous (32 x 64 tokens, 12 heads of 32: 20 ms, the usual einsum 29, torch 19).
        query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key)
        if prefix is None:
            weights = self.weights_dropout(masked_softmax(scores, mask), deterministic=deterministic)
            return jnp.einsum("bhqk,bhkd->bhqd", weights, value).swapaxes(1, 2)
        front_key, front_value = (for_each_row(x, key).swapaxes(1, 2) for x in prefix)
        front, weights = split_softmax(jnp.einsum("bhqd,bhkd->bhqk", query, front_key), scores, mask)
        front, weights = (self.weights_dropout(x, deterministic=deterministic) for x in (front, weights))
        weighted = functools.partial(jnp.einsum, "bhqk,bhkd->bhqd", preferred_element_type=widened(value.dtype))
        out = weighted(front, front_value) + weighted(weights, value)
        return out.astype(value.dtype).swapaxes(1, 2)


class AddNorm(_Module):
    """The last step of both sublayers: `LayerNorm(residual + Dropout(Dense(x)))`."""

    @nn.compact
    def __call__(self, x: Float[Array, "tokens features"], residual: Flat, deterministic: bool) -> Flat:
        x = self.dropout(self.dense(self.config.hidden_size, "dense")(x), deterministic)
        return self.layer_norm("LayerNorm")(x + residual)


class Attention(_Module):
    """The attention sublayer."""

    @nn.compact
    def __call__(self, x: Flat, batch: int, mask: Mask, deterministic: bool) -> Flat:
        context = SelfAttention(**self.fields(), name="self")(x, batch, mask, deterministic)
        return AddNorm(**self.fields(), name="output")(context, x, deterministic)


class Intermediate(_Module):
    """The first half of the feed-forward sublayer."""

    @nn.compact
    def __call__(self, x: Flat) -> Float[Array, "tokens intermediate"]:
        return ACTIVATIONS[self.config.hidden_act](self.dense(self.config.intermediate_size, "dense")(x))


class Layer(_Module):
    """One transformer layer."""

    @nn.compact
    def __call__(self, x: Flat, batch: int, mask: Mask, deterministic: bool) -> Flat:
        x = Attention(**self.fields(), name="attention")(x, batch, mask, deterministic)
        wide = Intermediate(**self.fields(), name="intermediate")(x)
        return AddNorm(**self.fields(), name="output")(wide, x, deterministic)


class DistilAttention(SelfAttention):
    """DistilBERT's attention, which contains its output projection."""

    @nn.compact
    def __call__(self, x: Flat, batch: int, mask: Mask, deterministic: bool) -> Flat:
        query, key, value = (self.project(x, batch, name) for name in ("q_lin", "k_lin", "v_lin"))
        context = self.attend(query, key, value, mask, deterministic).reshape(x.shape)
        return self.dense(self.config.hidden_size, "out_lin")(context)


class DistilFeedForward(_Module):
    """DistilBERT's feed-forward sublayer, without residual and norm."""

    @nn.compact
    def __call__(self, x: Flat, deterministic: bool) -> Flat:
        wide = ACTIVATIONS[self.config.hidden_act](self.dense(self.config.intermediate_size, "lin1")(x))
        return self.dropout(self.dense(self.config.hidden_size, "lin2")(wide), deterministic)


class DistilLayer(_Module):
    """One transformer layer under DistilBERT's names."""

    @nn.compact
    def __call__(self, x: Flat, batch: int, mask: Mask, deterministic: bool) -> Flat:
        context = DistilAttention(**self.fields(), name="attention")(x, batch, mask, deterministic)
        x = self.layer_norm("sa_layer_norm")(context + x)
        narrow = DistilFeedForward(**self.fields(), name="ffn")(x, deterministic)
        return self.layer_norm("output_layer_norm")(narrow + x)


class Layers(_Module):
    """The layers, named `0`, `1`, …"""

    layer: type[_Module] = Layer

    @nn.compact
    def __call__(self, x: Flat, batch: int, mask: Mask, deterministic: bool) -> Flat:
        for i in range(self.config.num_hidden_layers):
            x = self.layer(**self.fields(), name=str(i))(x, batch, mask, deterministic)
        return x


class Encoder(_Module):
    """The layers over `[batch, length, hidden]`; `mask` as in `SelfAttention.attend`."""

    layer: type[_Module] = Layer

    @nn.compact
    def __call__(
        self, states: Float[Array, "batch length hidden"], mask: Mask, deterministic: bool
    ) -> Float[Array, "batch length hidden"]:
        batch, _, width = states.shape
        layers = Layers(**self.fields(), layer=self.layer, name="layer")
        return layers(states.reshape(-1, width), batch, mask, deterministic).reshape(states.shape)


class Pooler(_Module):
    """The pooler: a dense layer and tanh on the state of the first token."""

    used: bool = True

    @nn.compact
    def __call__(self, first: Flat) -> Flat:
        return jnp.tanh(self.dense(self.config.hidden_size, "dense", self.used)(first))


class Head(_Module):
    """The two dense layers that classify by the first token's state, in roberta and electra."""

    num_labels: int = 2
    used: bool = True

    @nn.compact
    def __call__(self, first: Flat, deterministic: bool) -> Float[Array, "batch labels"]:
        act = ACTIVATIONS["gelu"] if self.config.model_type == "electra" else jnp.tanh
        wide = self.dense(self.config.hidden_size, "dense", self.used)(head_dropout(self.config)(first, deterministic))
        wide = head_dropout(self.config)(act(wide), deterministic)
        return self.dense(self.num_labels, "out_proj", self.used)(wide)


def head_dropout(cfg: BertConfig) -> nn.Dropout:
    """The dropout of a classification head."""
    return nn.Dropout(cfg.hidden_dropout_prob if cfg.classifier_dropout is None else cfg.classifier_dropout)


STATES, POOLED, LOGITS = "last_hidden_state", "pooler_output", "logits"  # transformers' names


class Bert(_Module):
    """A BERT-family encoder: token ids to the last layer's hidden states.

    Attributes:
      config: the configuration.
      dtype: the dtype of computation; None: the parameters' dtype.
      param_dtype: the dtype of the parameters.
      pooler: whether there is a pooler, in bert, roberta, xlm-roberta and camembert.
      num_labels: the number of labels of a sequence classification head; 0: there is no head.
      output: what a call returns: "last_hidden_state" [batch, length, hidden], "pooler_output" [batch, hidden] or
        "logits" [batch, labels]. The tree is the same: `model.clone(output="logits")` takes the same parameters.

    >>> model = Bert(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
    >>> ids = jnp.array([[101, 2023, 102]])
    >>> variables = model.init(jax.random.key(0), ids)
    >>> model.apply(variables, ids, attention_mask=jnp.ones_like(ids)).shape
    (1, 3, 32)
    """

    pooler: bool = False
    num_labels: int = 0
    output: str = STATES

    @property
    def optional_parts(self) -> tuple[str, ...]:
        """Modules that torch's model of the same encoder may lack. An adapter that does not have them leaves them."""
        head = () if not self.num_labels else ("classifier", "pre_classifier")
        return ("pooler", *head) if self.pooler else head

    @property
    def torch_names(self) -> dict[str, str]:
        """The prefixes of names in HuggingFace's classifier, by prefixes of the tree; empty without a head."""
        return torch_names(self.config.model_type) if self.num_labels else {}

    @nn.nowrap
    def default_positions(self, input_ids: Int[Array, "batch length"]) -> Int[Array, "#batch length"]:
        """The positions of a call that gives none, see `default_positions`."""
        return default_positions(self.config, input_ids)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Shaped[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length hidden"] | Float[Array, "batch features"]:
        """The hidden states of the last layer; or another `output`.

        Args:
          input_ids: the token ids.
          attention_mask: 1 for tokens, 0 for padding; None: all are tokens.
          token_type_ids: None: all 0.
          position_ids: None: `default_positions`.
          deterministic: disables dropout; otherwise `rngs={"dropout": key}` is needed.
        """
        cfg = self.config
        states = Embeddings(**self.fields(), name="embeddings")(input_ids, token_type_ids, position_ids, deterministic)
        if cfg.embedding_size not in (None, cfg.hidden_size):
            states = self.dense(cfg.hidden_size, "embeddings_project")(states)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, bool)[:, None, None, :]
        if cfg.model_type == "distilbert":
            states = Encoder(**self.fields(), layer=DistilLayer, name="transformer")(states, mask, deterministic)
        else:
            states = Encoder(**self.fields(), name="encoder")(states, mask, deterministic)
        return self._returned(states, deterministic)

    def _returned(self, states: Float[Array, "batch length hidden"], deterministic: bool) -> jax.Array:
        """The output of a call. Parts that are not returned are computed too, so that methods find them."""
        results, first = {STATES: states}, states[:, 0]
        is_bert = self.config.model_type == "bert"  # its head takes the pooler's output, the others the state
        if self.pooler:
            used = self.output == POOLED or (self.output == LOGITS and is_bert)
            results[POOLED] = Pooler(**self.fields(), used=used, name="pooler")(first)
        if self.num_labels:
            used = self.output == LOGITS
            first = results[POOLED] if is_bert else first
            results[LOGITS] = sequence_logits(self, first, self.num_labels, deterministic or not used, used)
        if self.output not in results:
            raise ValueError(f"output={self.output!r}: this model has {', '.join(results)}")
        return results[self.output]


def sequence_logits(
    encoder: _Module, features: Flat, num_labels: int, deterministic: bool, used: bool = True
) -> Float[Array, "batch labels"]:
    """The head of HuggingFace's sequence classifier, as submodules of the module that is being called.

    Args:
      encoder: gives the configuration and the dtypes.
      features: the pooler's output in bert, the first token's state in the others.
      num_labels: the number of labels.
      deterministic: disables dropout.
      used: whether the logits are returned.
    """
    cfg = encoder.config
    if cfg.model_type not in ("bert", "distilbert"):
        return Head(**encoder.fields(), num_labels=num_labels, used=used, name="classifier")(features, deterministic)
    if cfg.model_type == "distilbert":
        features = nn.relu(encoder.dense(cfg.hidden_size, "pre_classifier", used)(features))
    features = head_dropout(cfg)(features, deterministic)
    return encoder.dense(num_labels, "classifier", used)(features)


def torch_names(model_type: str) -> dict[str, str]:
    """The prefixes of names in HuggingFace's classifier of a model type, by prefixes of the tree.

    >>> torch_names("camembert")[""]
    'roberta.'
    """
    encoder = {"xlm-roberta": "roberta.", "camembert": "roberta."}.get(model_type, f"{model_type}.")
    return {"": encoder, "classifier/": "classifier.", "pre_classifier/": "pre_classifier."}


register_attention(SelfAttention)  # for prefix tuning
register_geometry(UnusedDense, _unused_geometry)
