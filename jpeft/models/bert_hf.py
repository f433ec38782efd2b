"""The HuggingFace configuration and tensor names of a BERT-family encoder, see `jpeft.models.families.Family`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.tree import Path, join
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.ops import ACTIVATIONS

_ARCHITECTURE = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "electra": "ElectraModel",
    "distilbert": "DistilBertModel",
}
_PREFIX = {"xlm-roberta": "roberta.", "camembert": "roberta."}  # by default the model type itself
_DEFAULTS = {  # where HuggingFace's config class has other defaults than BertConfig
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
    "camembert": {"vocab_size": 50265, "pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "distilbert": {"type_vocab_size": 0},
}
_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# Fields that would change the computation, each with the only supported value.
_FIXED = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute", "pruned_heads": {}}

IS_DECODER = False
OPTIONS: frozenset[str] = frozenset()
_EXTRAS = re.compile(
    r"embeddings\.(position_ids|token_type_ids)"  # buffers of old checkpoints
    r"|(pooler|cls|classifier|pre_classifier|lm_head|qa_outputs|vocab_\w+|generator_\w+|discriminator_\w+)\..*"
)


def from_config(config: Mapping[str, Any], *, dtype: Any = None, param_dtype: Any = jnp.float32) -> Bert:
    """The encoder that a `config.json` describes. Inverse of `to_config`.

    Raises:
      ValueError: a field has a value that the encoder does not support.

    >>> from_config({"model_type": "distilbert", "dim": 128, "n_heads": 2}).config.hidden_size
    128
    """
    for name, accepted in _FIXED.items():
        if (config.get(name) or accepted) != accepted:
            raise ValueError(f"{name}={config[name]!r} is not supported, only {accepted!r}")
    model_type = config["model_type"]
    names = _DISTILBERT if model_type == "distilbert" else {}
    given = {"model_type": model_type, **_DEFAULTS.get(model_type, {})}
    for field in dataclasses.fields(BertConfig):
        value = config.get(names.get(field.name, field.name))
        if value is not None:
            given[field.name] = value
    cfg = BertConfig(**given)
    _check(cfg)
    return Bert(cfg, dtype=dtype, param_dtype=param_dtype)


def _check(cfg: BertConfig) -> None:
    for field in dataclasses.fields(cfg):
        value, kind = getattr(cfg, field.name), str(field.type)
        if kind.startswith("int") and value is not None and not (isinstance(value, int) and value >= 0):
            raise ValueError(f"{field.name}={value!r} is not a non-negative integer")
        if kind == "float" and not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{field.name}={value!r} is not a non-negative number")
    if not isinstance(cfg.hidden_act, str) or cfg.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={cfg.hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if not cfg.num_attention_heads or cfg.hidden_size % cfg.num_attention_heads:
        raise ValueError(f"hidden_size={cfg.hidden_size} does not split into {cfg.num_attention_heads} attention heads")


def to_config(model: Bert) -> dict[str, Any]:
    """The `config.json` of an encoder. Inverse of `from_config`.

    >>> to_config(from_config({"model_type": "distilbert", "dim": 128, "n_heads": 2}))["dim"]
    128
    """
    names = _DISTILBERT if model.config.model_type == "distilbert" else {}
    fields = {names.get(k, k): v for k, v in dataclasses.asdict(model.config).items() if v is not None}
    return {"architectures": [_ARCHITECTURE[model.config.model_type]], **fields}


def prefix(model: Bert) -> str:
    """The prefix of the encoder's tensor names in a checkpoint that also holds a head.

    >>> prefix(Bert(BertConfig(model_type="camembert")))
    'roberta.'
    """
    return _PREFIX.get(model.config.model_type, f"{model.config.model_type}.")


def extras(model: Bert) -> re.Pattern[str]:
    """Matches tensors that a checkpoint may hold beside the encoder: heads, and buffers of old checkpoints.

    >>> bool(extras(Bert(BertConfig())).fullmatch("pooler.dense.weight"))
    True
    """
    return _EXTRAS


def example_inputs(model: Bert) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest inputs of the model, abstract.

    >>> example_inputs(Bert(BertConfig()))
    (ShapeDtypeStruct(shape=(1, 1), dtype=int32),)
    """
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


_AXES: Sequence[tuple[str, tuple[str | None, ...]]] = (
    (r".*/(query|key|value|[qkv]_lin)", ("embed", "heads")),
    (r".*/(attention/output/dense|out_lin)", ("heads", "embed")),
    (r".*/(intermediate/dense|lin1)", ("embed", "mlp")),
    (r".*/(output/dense|lin2)", ("mlp", "embed")),
    (r".*_embeddings", (None, "embed")),  # encoder vocabularies rarely divide over a mesh axis
)


def axis_names(path: Path) -> tuple[str | None, ...]:
    """The logical axis names of a parameter.

    >>> axis_names(("encoder", "layer", "0", "attention", "self", "query", "kernel"))
    ('embed', 'heads')
    """
    owner, leaf = join(path[:-1]), path[-1]
    names = next((names for pattern, names in _AXES if re.fullmatch(pattern, owner)), ())
    if leaf == "bias":
        return names[1:] if names and names[1] != "embed" else ()
    return names if leaf in ("kernel", "embedding") else ()
