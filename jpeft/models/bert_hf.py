"""The HuggingFace configuration and tensor names of a BERT-family encoder, see `jpeft.models.families.Family`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.tree import Path, join
from jpeft.models.bert import LOGITS, POOLED, STATES, Bert, BertConfig, torch_names
from jpeft.models.buffers import Buffers, positions
from jpeft.models.naming import Naming
from jpeft.models.ops import ACTIVATIONS

_ARCHITECTURE = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "electra": "ElectraModel",
    "distilbert": "DistilBertModel",
}
_POOLED = {"bert", "roberta", "xlm-roberta", "camembert"}
_DEFAULTS = {  # where HuggingFace's config class has other defaults than BertConfig
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
    "camembert": {"vocab_size": 50265, "pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "distilbert": {"type_vocab_size": 0, "classifier_dropout": 0.2},
}
_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}
# Fields that would change the computation, each with the only supported value.
_FIXED = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute", "pruned_heads": {}}

IS_DECODER = False
OPTIONS = frozenset({"pooler", "head", "output"})
_EXTRAS = re.compile(
    r"(pooler|cls|classifier|pre_classifier|lm_head|qa_outputs|vocab_\w+|generator_\w+|discriminator_\w+)\..*"
)


def from_config(
    config: Mapping[str, Any],
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    pooler: bool | None = None,
    head: bool | None = None,
    output: str = STATES,
) -> Bert:
    """The encoder that a `config.json` describes. Inverse of `to_config`.

    Args:
      config: the contents of a `config.json`.
      dtype: the dtype of computation; None: the parameters' dtype.
      param_dtype: the dtype of the parameters.
      pooler: whether the model has a pooler; None: if a head needs it.
      head: whether it has the head of a sequence classifier; None: if the config is a classifier's.
      output: what a call returns, see `Bert`.

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
    labels = _num_labels(config) if (_is_classifier(config) if head is None else head) else 0
    needed = bool(labels) and model_type == "bert"
    has_pooler = needed if pooler is None else pooler
    if needed and not has_pooler:
        raise ValueError("the head of a BertForSequenceClassification needs the pooler; give head=False too")
    if has_pooler and model_type not in _POOLED:
        raise ValueError(f"pooler=True: {model_type} models have no pooler")
    _check_output(output, has_pooler, labels)
    return Bert(cfg, dtype=dtype, param_dtype=param_dtype, pooler=has_pooler, num_labels=labels, output=output)


def _check_output(output: str, pooler: bool, labels: int) -> None:
    there = [STATES] + [POOLED] * pooler + [LOGITS] * bool(labels)
    if output not in there:
        hint = "; head=True reads a classifier that architectures does not name" if output == LOGITS else ""
        raise ValueError(f"output={output!r}: this checkpoint has {', '.join(there)}{hint}")


def _check(cfg: BertConfig) -> None:
    for field in dataclasses.fields(cfg):
        value, kind = getattr(cfg, field.name), str(field.type)
        if kind.startswith("int") and value is not None and not (isinstance(value, int) and value >= 0):
            raise ValueError(f"{field.name}={value!r} is not a non-negative integer")
        if kind.startswith("float") and value is not None and not (isinstance(value, int | float) and value >= 0):
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
    return {"architectures": [_ARCHITECTURE[model.config.model_type]], **fields, **head_fields(model)}


def head_fields(model: Bert) -> dict[str, Any]:
    """The fields of a `config.json` that a head adds.

    >>> head_fields(Bert(BertConfig(), num_labels=1))
    {'architectures': ['BertForSequenceClassification'], 'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
    """
    if not model.num_labels:
        return {}
    names = [f"LABEL_{i}" for i in range(model.num_labels)]
    return {
        "architectures": [_ARCHITECTURE[model.config.model_type].replace("Model", "ForSequenceClassification")],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def namings(model: Bert) -> tuple[Naming, ...]:
    """The forms of the tensor names: a classifier's encoder has a prefix.

    >>> namings(Bert(BertConfig(model_type="camembert")))[1].in_file("pooler.dense.bias")
    'roberta.pooler.dense.bias'
    """
    classifier = Naming({own.replace("/", "."): file for own, file in torch_names(model.config.model_type).items()})
    plain = Naming({"": ""})
    return (classifier, plain) if model.num_labels else (plain, classifier)


def buffers(model: Bert) -> Buffers:
    """The buffers of old checkpoints: positions and token types.

    >>> sorted(buffers(Bert(BertConfig())))
    ['embeddings\\\\.position_ids', 'embeddings\\\\.token_type_ids']
    """
    return {r"embeddings\.position_ids": positions, r"embeddings\.token_type_ids": np.zeros_like}


def extras(model: Bert) -> re.Pattern[str]:
    """Matches the names of heads that a checkpoint may hold beside the model.

    >>> bool(extras(Bert(BertConfig())).fullmatch("cls.predictions.bias"))
    True
    """
    return _EXTRAS


def problem(model: Bert, names: Collection[str]) -> str:
    """The problem of a checkpoint with a part of the pooler.

    >>> problem(Bert(BertConfig(), pooler=True), ["pooler.dense.weight"])
    'no pooler.dense.bias beside pooler.dense.weight; load it without a pooler: pooler=False'
    """
    have, lack = (
        [n for n in ("pooler.dense.weight", "pooler.dense.bias") if (n in names) is found] for found in (True, False)
    )
    if not model.pooler or not lack:
        return ""
    beside = f" beside {have[0]}" if have else ""
    return f"no {lack[0]}{beside}; load it without a pooler: pooler=False"


def copies(model: Bert) -> dict[str, str]:
    """No tensor is there twice.

    >>> copies(Bert(BertConfig()))
    {}
    """
    return {}


def parts(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The options for the parts that a checkpoint has: a pooler, and the head of a sequence classifier.

    >>> parts({"model_type": "bert"}, {"bert.pooler.dense.weight": (8, 8)})
    {'pooler': True, 'head': False}
    """
    start = torch_names(config["model_type"])[""]
    own = {name.removeprefix(start) for name in shapes}
    head = _is_classifier(config) and any(name.startswith("classifier.") for name in own)
    pooler = config["model_type"] in _POOLED and any(name.startswith("pooler.dense.") for name in own)
    return {"pooler": pooler, "head": head}


def _is_classifier(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or ()
    return any(isinstance(name, str) and name.endswith("ForSequenceClassification") for name in names)


def _num_labels(config: Mapping[str, Any]) -> int:
    """The number of labels, as transformers reads it."""
    names, number = config.get("id2label"), config.get("num_labels")
    labels = len(names) if isinstance(names, Mapping) else 2 if number is None else number
    if not isinstance(labels, int) or isinstance(labels, bool) or labels < 1:
        raise ValueError(f"num_labels={labels!r} is not a positive integer")
    return labels


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
    (r"(pooler|classifier)/dense|pre_classifier|classifier(/out_proj)?", ("embed", None)),
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
