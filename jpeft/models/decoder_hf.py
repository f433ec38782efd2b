"""The HuggingFace configuration and tensor names of a decoder, see `jpeft.models.families.Family`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.tree import Path
from jpeft.models import ops
from jpeft.models.buffers import Buffers, causal_mask, masked_bias
from jpeft.models.decoder import FULL, SLIDING, Decoder, DecoderConfig
from jpeft.models.naming import Naming
from jpeft.models.remat import check_remat
from jpeft.models.rotary import Rotary
from jpeft.models.rotary import from_config as rotary_from_config
from jpeft.models.rotary import to_config as rotary_to_config

_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 4, "vocab_size": 256000,
          "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
          "query_pre_attn_scalar": 256.0, "sliding_window": 4096, "tie_word_embeddings": True,
          "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
         "sliding_window": 4096}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {  # where HuggingFace's config class has other defaults
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
_HEAD = "lm_head."
# A null in these fields is a value; in the others it stands for the default.
_NULLABLE = frozenset(
    {
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
)
# Fields that would change the computation, each with the only supported value.
_FIXED = {"use_bidirectional_attention": False, "partial_rotary_factor": 1.0}

IS_DECODER = True
OPTIONS = frozenset({"scan_layers", "remat"})


def from_config(
    config: Mapping[str, Any], *, dtype: Any = None, param_dtype: Any = jnp.float32, **options: Any
) -> Decoder:
    """The decoder that a `config.json` describes. `options`: `scan_layers`, `remat`. Inverse of `to_config`.

    Raises:
      ValueError: a field has a value that the decoder does not support.

    >>> from_config({"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 8}).config.num_key_value_heads
    8
    """
    if config["model_type"] == "gemma3":  # the text part of a vision-language model
        config = _text_config(config)
    kind = config["model_type"]
    for name, accepted in _FIXED.items():
        if config.get(name) not in (None, accepted):
            raise ValueError(f"{name}={config[name]!r} is not supported, only {accepted!r}")
    if config.get("quantization_config"):
        raise ValueError("its weights are quantized (quantization_config), which is not supported; load the original")
    given = _plain_fields(kind, config)
    _check_fields(given)
    given |= _attention_kinds(kind, config, given)
    cfg = DecoderConfig(model_type=kind, **given, **_rotary(kind, config))
    _check_config(cfg)
    if options.get("remat") is not None:
        check_remat(options["remat"])
    return Decoder(cfg, dtype=dtype, param_dtype=param_dtype, **options)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a vision-language model's config, with the fields that apply to both parts."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config={text!r} is not an object")
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
    return {**{name: config[name] for name in shared if name in config}, **text, "model_type": "gemma3_text"}


def _plain_fields(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `DecoderConfig` fields that follow from single fields of a config."""
    gemma = kind.startswith("gemma")
    given = dict(_DEFAULTS[kind])
    special = {"model_type", "layer_types", "rotary", "rotary_sliding", "qk_norm", "gemma", "output_bias"}
    for field in dataclasses.fields(DecoderConfig):
        name = {"hidden_act": "hidden_activation"}.get(field.name, field.name) if gemma else field.name
        if field.name not in special and name in config and (config[name] is not None or field.name in _NULLABLE):
            given[field.name] = config[name]
    if isinstance(given.get("eos_token_id"), list):
        given["eos_token_id"] = tuple(given["eos_token_id"])
    given["gemma"] = gemma
    given["qk_norm"] = kind in ("qwen3", "gemma3_text")
    given["output_bias"] = bool(given.get("attention_bias"))
    if kind == "qwen2":  # it has no field for them
        given |= {"attention_bias": True, "output_bias": False}
    if kind == "mistral":
        given |= {"attention_bias": False, "output_bias": False}
    if kind != "llama":
        given["mlp_bias"] = False
    if not gemma:
        given |= {"query_pre_attn_scalar": 0.0, "final_logit_softcapping": None}
    if kind != "gemma2":  # transformers' Gemma 3 has the field but does not use it
        given["attn_logit_softcapping"] = None
    return given


def _attention_kinds(kind: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    layers, window = given.get("num_hidden_layers", DecoderConfig.num_hidden_layers), given.get("sliding_window")
    if layers > 10_000:
        raise ValueError(f"num_hidden_layers={layers} is more than 10,000")
    if kind == "llama" or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        window = None
    listed = config.get("layer_types") if kind != "llama" else None
    if listed is not None:
        known = isinstance(listed, list | tuple) and all(entry in (SLIDING, FULL) for entry in listed)
        if not known or len(listed) != layers:
            raise ValueError(f"layer_types={listed!r} must list {SLIDING} or {FULL} for each of {layers} layers")
        if kind == "mistral" and len(set(listed)) > 1:
            raise ValueError("mistral with layers of both kinds is another model (ministral), which is not supported")
        types = tuple(listed)
    elif kind.startswith("gemma"):
        every = 2 if kind == "gemma2" else _integer(config, "sliding_window_pattern", 6, at_least=1)
        types = tuple(SLIDING if (i + 1) % every else FULL for i in range(layers))
    elif kind.startswith("qwen"):
        first = _integer(config, "max_window_layers", 28)
        types = tuple(SLIDING if window is not None and i >= first else FULL for i in range(layers))
    else:
        types = ((FULL if window is None else SLIDING),) * layers
    if SLIDING in types and window is None:
        raise ValueError(f"some layers have {SLIDING}, but there is no sliding_window")
    return {"layer_types": types, "sliding_window": window if SLIDING in types else None}


def _integer(config: Mapping[str, Any], name: str, default: int, at_least: int = 0) -> int:
    value = default if config.get(name) is None else config[name]
    if not _is_integer(value) or value < at_least:
        raise ValueError(f"{name}={value!r} is not an integer that is at least {at_least}")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rotary(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    theta = _THETA.get(kind, 10000.0) if config.get("rope_theta") is None else config["rope_theta"]
    scaling = next((config[k] for k in ("rope_parameters", "rope_scaling") if config.get(k) is not None), {})
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling={scaling!r} is not an object")
    _check_one_rotary(config, scaling)
    if kind != "gemma3_text":
        return {"rotary": rotary_from_config(scaling, theta)}
    local = config.get("rope_local_base_freq") or 10000.0
    if FULL in scaling or SLIDING in scaling:  # transformers 5: one for each kind of layer
        return {
            "rotary": rotary_from_config(scaling.get(FULL), theta),
            "rotary_sliding": rotary_from_config(scaling.get(SLIDING), local),
        }
    return {"rotary": rotary_from_config(scaling, theta), "rotary_sliding": rotary_from_config(None, local)}


def _check_one_rotary(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> None:
    """Raises if the fields of transformers 4 and of transformers 5 say different things: each reads its own."""
    old, new = config.get("rope_theta"), scaling.get("rope_theta")
    if None not in (old, new) and old != new:
        raise ValueError(f"rope_theta={old!r}, but the rope scaling has rope_theta={new!r}; keep the right one")
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if None not in (old, new) and old != new:
        raise ValueError(f"rope_scaling={old!r} and rope_parameters={new!r} differ; keep the right one")


def _check_fields(given: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(DecoderConfig):
        name, kind = field.name, str(field.type)
        if name not in given or (given[name] is None and kind.endswith("None")):
            continue
        value = given[name]
        if name.endswith("_token_id"):
            ids = value if isinstance(value, tuple) and "tuple" in kind else (value,)
            if not all(map(_is_integer, ids)):
                raise ValueError(f"{name}={value!r} is not a token id")
        elif "int" in kind and not (_is_integer(value) and 0 < value < 1 << 31):
            raise ValueError(f"{name}={value!r:.40} is not a positive integer below 2**31")
        elif kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not true or false")
        elif "float" in kind:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value < 1e30):
                raise ValueError(f"{name}={value!r:.40} is not a non-negative number")
            if value == 0 and name.endswith("_softcapping"):
                raise ValueError(f"{name}={value!r} would cap every value to 0; null disables the cap")


def _check_config(cfg: DecoderConfig) -> None:
    if not isinstance(cfg.hidden_act, str) or cfg.hidden_act not in ops.ACTIVATIONS:
        raise ValueError(f"hidden_act={cfg.hidden_act!r} is not supported, only {', '.join(ops.ACTIVATIONS)}")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ValueError(
            f"{cfg.num_attention_heads} query heads do not divide over {cfg.num_key_value_heads} key and value heads"
        )
    if cfg.head_dim > 1 << 16:
        raise ValueError(f"head_dim={cfg.head_dim} is more than 65,536")
    if cfg.head_dim < 2 or cfg.head_dim % 2:
        raise ValueError(f"head_dim={cfg.head_dim} is not even, but rotary embedding rotates pairs")


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
        if (scaling := rotary_to_config(cfg.rotary_sliding)) is not None:  # only transformers 5 has a field for it
            fields["rope_parameters"] = {FULL: fields.pop("rope_scaling"), SLIDING: scaling}
    return {"architectures": [_ARCHITECTURE[kind]], **fields}


_NAMINGS = (
    Naming({"": ""}),
    Naming({"model.": "", _HEAD: _HEAD}),  # saved from AutoModel, without a head
    Naming({"": "language_model."}),  # the text model of a vision-language checkpoint, before transformers 5
    Naming({"model.": "model.language_model.", _HEAD: _HEAD}),  # and since
    Naming({"model.": "language_model.", _HEAD: _HEAD}),  # saved from AutoModel
)


def namings(model: Decoder) -> Sequence[Naming]:
    """The forms of the tensor names.

    >>> namings(Decoder(DecoderConfig()))[1].in_file("model.norm.weight")
    'norm.weight'
    """
    return _NAMINGS


def buffers(model: Decoder) -> Buffers:
    """The buffers of old checkpoints: frequencies of the rotary embedding, and masks of the attention.

    >>> from jpeft.models.buffers import is_buffer
    >>> is_buffer(buffers(Decoder(DecoderConfig())), "model.layers.3.self_attn.rotary_emb.inv_freq")
    True
    """
    cfg, attention = model.config, r"layers\.\d+\.self_attn\."
    found = {
        rf"model\.({attention})?rotary_emb\.inv_freq": _frequencies(cfg, cfg.rotary),
        rf"model\.{attention}bias": causal_mask,
        rf"model\.{attention}masked_bias": masked_bias,
    }
    if cfg.gemma:
        found[r"model\.embed_tokens\.embed_scale"] = lambda value: np.full(value.shape, cfg.hidden_size**0.5)
    if cfg.rotary_sliding is not None:
        found[r"model\.rotary_emb_local\.inv_freq"] = _frequencies(cfg, cfg.rotary_sliding)
    return found


def _frequencies(cfg: DecoderConfig, rotary: Rotary) -> Callable[[np.ndarray], np.ndarray]:
    def expect(found: np.ndarray) -> np.ndarray:
        # Before transformers 4.45, linear scaling divided the positions, and the buffer was not scaled.
        plain = dataclasses.replace(rotary, rope_type="default") if rotary.rope_type == "linear" else rotary
        either = [r.frequencies(cfg.head_dim, cfg.max_position_embeddings) for r in (rotary, plain)]
        fits = [f for f in either if f.shape == found.shape and np.allclose(f, found, rtol=0.01, atol=1e-7)]
        return np.asarray([*fits, either[0]][0], np.float64)

    return expect


def extras(model: Decoder) -> re.Pattern[str]:
    """Matches other tensors that a checkpoint may hold beside the decoder: a tied head.

    >>> bool(extras(Decoder(DecoderConfig(tie_word_embeddings=True))).fullmatch("lm_head.weight"))
    True
    """
    return re.compile(r"lm_head\.weight" if model.config.tie_word_embeddings else "(?!)")


def copies(model: Decoder) -> dict[str, str]:
    """A tied head is a copy of the embedding.

    >>> copies(Decoder(DecoderConfig(tie_word_embeddings=True)))
    {'lm_head.weight': 'model.embed_tokens.weight'}
    """
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}


def problem(model: Decoder, names: Collection[str]) -> str:
    """The problem of a checkpoint that was saved without its head.

    >>> problem(Decoder(DecoderConfig()), ["model.embed_tokens.weight"])[:17]
    'no lm_head.weight'
    """
    if model.config.tie_word_embeddings or "lm_head.weight" in names or "model.embed_tokens.weight" not in names:
        return ""
    return (
        "no lm_head.weight to compute logits with, but tie_word_embeddings is false (a folder saved from AutoModel has "
        f"no head; save {_ARCHITECTURE[model.config.model_type]}): missing lm_head/kernel"
    )


def parts(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """No options: a decoder has no optional parts.

    >>> parts({"model_type": "llama"}, {})
    {}
    """
    return {}


def axis_names(path: Path) -> tuple[str | None, ...]:
    """No axis names: the parameters' boxes have them all.

    >>> axis_names(("model", "norm", "scale"))
    ()
    """
    return ()


def example_inputs(model: Decoder) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest inputs of the model, abstract.

    >>> example_inputs(Decoder(DecoderConfig()))
    (ShapeDtypeStruct(shape=(1, 1), dtype=int32),)
    """
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
