"""The `config.json` that describes the model of a GGUF file."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import numpy as np

from jpeft.errors import ModelError
from jpeft.models.gguf.file import GGUFFile, open_file

#: `general.architecture` → `model_type` of a `config.json`. Mistral and SmolLM2 are `llama` as well.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name: GGUF's
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # llama.cpp's defaults
ROPE_FREQS = "rope_freqs.weight"  # the divisors of Llama 3's rotary frequencies
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def architecture(file: GGUFFile) -> str:
    """The file's `general.architecture`.

    Raises:
        ModelError: it is missing or not supported.
    """
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ModelError(f"{file.path}: architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    return arch


def special_token_id(file: GGUFFile, name: str) -> int | None:
    """The id of `bos`, `eos`, `unk`, `pad`, `eot` or `eom`; None if the file does not define it."""
    key, tokens = f"tokenizer.ggml.{SPECIAL.get(name, name)}_token_id", file.get("tokenizer.ggml.tokens", list, None)
    default = _SENTENCEPIECE_IDS.get(name) if file.get("tokenizer.ggml.model", str, None) == "llama" else None
    index = file.get(key, int, default)
    if index is not None and tokens is not None and not 0 <= index < len(tokens):
        raise ModelError(f"{file.path}: {key} is {index}, but there are {len(tokens)} tokens")
    return index


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `config.json` that describes the file's model.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: not a complete GGUF file, an architecture that is not supported, or a required field is missing.

    >>> read_config("SmolLM2-135M-Instruct.Q4_1.gguf")["hidden_size"]  # doctest: +SKIP
    576
    """
    file = open_file(path)
    arch, get = architecture(file), file.field
    heads, hidden = get("attention.head_count", int), get("embedding_length", int)
    head_dim = get("attention.key_length", int, get("rope.dimension_count", int, hidden // max(heads, 1)))
    for key, only in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)):
        if (value := get(key, int, only)) != only:
            raise ModelError(f"{file.path}: {arch}.{key} is {value}, only {only} is supported")
    if _EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path}: no tensor {_EMBEDDING}; does the file hold only a vocabulary or an adapter?")
    if (layers := get("block_count", int)) > len(file.tensors):
        raise ModelError(f"{file.path}: {arch}.block_count is {layers:,}, but there are {len(file.tensors)} tensors")
    config = {
        "model_type": ARCHITECTURES[arch],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors[_EMBEDDING].shape[0],
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": get(
            "rope.freq_base", float, 1e6 if arch == "gemma3" else 1e4
        ),  # the defaults of HuggingFace and llama.cpp
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": _HEAD not in file.tensors,
        "attention_bias": any(re.fullmatch(r"blk\.\d+\.attn_\w+\.bias", name) for name in file.tensors),
        **{f"{name}_token_id": special_token_id(file, name) for name in ("bos", "eos", "pad")},
    }
    return config | (_gemma_fields(file, arch, config) if arch.startswith("gemma") else _llama_fields(file, arch))


def _llama_fields(file: GGUFFile, arch: str) -> dict[str, Any]:
    fields = {"hidden_act": "silu"}  # not in the file; the same in every published Llama, Mistral and Qwen
    if arch != "llama":
        return fields | {"use_sliding_window": False, "sliding_window": None}  # as in every published Qwen
    if window := file.field("attention.sliding_window", int, 0):  # HuggingFace's Llama has no window
        return fields | {"model_type": "mistral", "sliding_window": window}
    return fields | {"mlp_bias": any(re.fullmatch(r"blk\.\d+\.ffn_\w+\.bias", name) for name in file.tensors)}


def _gemma_fields(file: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    get, is_gemma2, layers = file.field, arch == "gemma2", config["num_hidden_layers"]
    window = get("attention.sliding_window", int, 4096 if is_gemma2 else 0)
    period = get("attention.sliding_window_pattern", int, 2 if is_gemma2 else 6) if window else 1
    # The scale of the queries is not in the file. As in llama.cpp (src/models/gemma2.cpp, gemma3.cpp) it follows from
    # the number of layers: hidden_size / heads in the two 27B models, head_dim in all others.
    is_27b = layers == (46 if is_gemma2 else 62)
    fields = {
        "hidden_activation": "gelu_pytorch_tanh",  # in every published Gemma
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
        ),
        "sliding_window": window or None,
        "layer_types": [
            "full_attention" if period and (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
        ],
        # The defaults of Gemma 2 are the published values, as in llama.cpp; Gemma 3 has no soft-caps.
        "attn_logit_softcapping": get("attn_logit_softcapping", float, 50.0) if is_gemma2 else None,
        "final_logit_softcapping": get("final_logit_softcapping", float, 30.0 if is_gemma2 else 0.0) or None,
    }
    if not is_gemma2:
        fields["rope_local_base_freq"] = get("rope.freq_base_swa", float, 1e4)  # 1e4 in every published Gemma 3
    return fields


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    get = file.field
    if ROPE_FREQS in file.tensors:
        return _llama3_scaling(file)
    factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 0.0))  # the second key is older
    kind = get("rope.scaling.type", str, "linear")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ModelError(f"{file.path}: rope.scaling.type {kind!r} is not one of none, linear, yarn")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if (value := get(f"rope.scaling.{key}", float, 1.0)) != 1.0:
            raise ModelError(f"{file.path}: rope.scaling.{key} is {value}, only 1.0 is supported")
    length = get("rope.scaling.original_context_length", int, get("context_length", int))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": get("rope.scaling.yarn_beta_slow", float, 1.0),
    }


def _llama3_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """The `llama3` scaling behind `rope_freqs.weight [head_dim / 2]`, the only part of it that the file holds.

    The tensor holds the divisors of the frequencies. The factor is the largest of them; the other three numbers are
    the same in every Llama from 3.1 on. A ModelError is raised unless the four reproduce the tensor.
    """
    divisors = file.read_tensor(ROPE_FREQS).astype(np.float64).ravel()
    low, high, length, factor = 1.0, 4.0, 8192, float(divisors.max())
    theta = file.field("rope.freq_base", float, 1e4)
    turns = length * theta ** (-np.arange(divisors.size) / divisors.size) / (2 * math.pi)  # per frequency
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: frequency unchanged, 0: divided by the factor
    if not np.allclose(divisors, 1 / ((1 - kept) / factor + kept), rtol=1e-5, atol=0):
        raise ModelError(
            f"{file.path}: {ROPE_FREQS} is not llama3's scaling with low_freq_factor {low:g}, high_freq_factor "
            f"{high:g} and original_max_position_embeddings {length}, the only form that is supported"
        )
    scaling = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
    return {"rope_type": "llama3", "factor": float(f"{factor:.6g}"), **scaling} if factor != 1.0 else None
