"""GGUF files of Llama-family decoders: the config, the tensors and the tokenizer that HuggingFace would publish.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp's converter changed is changed
back: `llama` files hold the rows of q and k in the order of Meta's rotary embedding, gemma's norms hold `1 + weight`.
`gguf` dequantizes, but the header is parsed here: `gguf.GGUFReader` takes 4.5 s for SmolLM2's vocabulary of 49,152
tokens where this takes 0.2, and a corrupt count keeps it busy until the memory is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jpeft.errors import ModelError
from jpeft.models import gguf_tokenizer
from jpeft.models.gguf_file import File, Source, open_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: `general.architecture` → `model_type` of a `config.json`. Mistral and SmolLM2 are `llama` as well.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}

_EMBEDDING, _HEAD, _ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `config.json` that describes the file's model.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: it is no whole GGUF file, of another architecture, or without a field that is needed.

    >>> read_config("SmolLM2-135M-Instruct.Q4_1.gguf")["hidden_size"]  # doctest: +SKIP
    576
    """
    file = open_file(path)
    arch, get = _architecture(file), file.field
    heads, hidden = get("attention.head_count", int), get("embedding_length", int)
    head_dim = get("attention.key_length", int, get("rope.dimension_count", int, hidden // max(heads, 1)))
    for key, only in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)):
        if (value := get(key, int, only)) != only:
            raise ModelError(f"{file.path}: {arch}.{key} is {value}, only {only} is supported")
    if _EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path}: no tensor {_EMBEDDING}; is it a vocabulary or an adapter alone?")
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
        "rope_theta": get("rope.freq_base", float, 1e6 if arch == "gemma3" else 1e4),  # HuggingFace's and llama.cpp's
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": _HEAD not in file.tensors,
        "attention_bias": any(re.fullmatch(r"blk\.\d+\.attn_\w+\.bias", name) for name in file.tensors),
        **{f"{name}_token_id": gguf_tokenizer.special_id(file, name) for name in ("bos", "eos", "pad")},
    }
    return config | (_gemma_fields(file, arch, config) if arch.startswith("gemma") else _llama_fields(file, arch))


def _llama_fields(file: File, arch: str) -> dict[str, Any]:
    fields = {"hidden_act": "silu"}  # no file says so: it is what every published Llama, Mistral and Qwen has
    if arch != "llama":
        return fields | {"use_sliding_window": False, "sliding_window": None}  # as every published Qwen
    if window := file.field("attention.sliding_window", int, 0):  # HuggingFace's Llama has none
        return fields | {"model_type": "mistral", "sliding_window": window}
    return fields | {"mlp_bias": any(re.fullmatch(r"blk\.\d+\.ffn_\w+\.bias", name) for name in file.tensors)}


def _gemma_fields(file: File, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    get, two, layers = file.field, arch == "gemma2", config["num_hidden_layers"]
    window = get("attention.sliding_window", int, 4096 if two else 0)
    period = get("attention.sliding_window_pattern", int, 2 if two else 6) if window else 1
    # No file says by what queries are scaled. Like llama.cpp (src/models/gemma2.cpp, gemma3.cpp) this goes by the
    # number of layers: hidden_size / heads in the two 27B models, head_dim in all others.
    largest = layers == (46 if two else 62)
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",  # of every published Gemma
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or None,
        "layer_types": [
            "full_attention" if period and (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
        ],
        # Gemma 2's are the published values, which llama.cpp falls back to; Gemma 3 has none.
        "attn_logit_softcapping": get("attn_logit_softcapping", float, 50.0) if two else None,
        "final_logit_softcapping": get("final_logit_softcapping", float, 30.0 if two else 0.0) or None,
    } | ({} if two else {"rope_local_base_freq": get("rope.freq_base_swa", float, 1e4)})  # of every published Gemma 3


def _rope_scaling(file: File) -> dict[str, Any] | None:
    get = file.field
    if _ROPE_FREQS in file.tensors:
        return _llama3_scaling(file)
    factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 0.0))  # the second is the older key
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


def _llama3_scaling(file: File) -> dict[str, Any] | None:
    """What is behind `rope_freqs.weight [head_dim / 2]`, the divisors of the frequencies, which alone are in the file.

    The factor is the largest divisor, and every Llama from 3.1 on has the same `low`, `high` and `length`; together
    they have to give the tensor again.
    """
    divisors = _Tensor(file, _ROPE_FREQS).read().astype(np.float64).ravel()
    low, high, length, factor = 1.0, 4.0, 8192, float(divisors.max())
    theta = file.field("rope.freq_base", float, 1e4)
    turns = length * theta ** (-np.arange(divisors.size) / divisors.size) / (2 * math.pi)  # of each angle in `length`
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: the frequency as it was, 0: divided by the factor
    if not np.allclose(divisors, 1 / ((1 - kept) / factor + kept), rtol=1e-5, atol=0):
        raise ModelError(
            f"{file.path}: {_ROPE_FREQS} is not llama3's scaling with low_freq_factor {low:g}, high_freq_factor "
            f"{high:g} and original_max_position_embeddings {length}, the only one that is recognized"
        )
    scaling = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
    return {"rope_type": "llama3", "factor": float(f"{factor:.6g}"), **scaling} if factor != 1.0 else None


# --- tensors ---


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[dict[str, _Tensor]]:
    """The file's tensors by HuggingFace's names; one that no such model has keeps its GGUF name.

    Raises:
        FileNotFoundError, ModelError: as `read_config`; `read()` for a type that cannot be dequantized.

    >>> with open_tensors("SmolLM2-135M-Instruct.Q4_1.gguf") as tensors:  # doctest: +SKIP
    ...     tensors["model.layers.0.self_attn.k_proj.weight"].shape
    (192, 576)
    """
    file = open_file(path)
    arch = _architecture(file)
    # `rope_freqs.weight` is in the config.
    yield {_torch_name(arch, name): _tensor(file, arch, name) for name in file.tensors if name != _ROPE_FREQS}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of an open file, `name` in the file: its shape costs nothing, its bytes are read when asked for."""

    file: File
    name: str
    heads: int = 0  # of q or k, where the converter has permuted the rows
    shift: float = 0.0  # what the converter has added

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's order."""
        return self.file.tensors[self.name].shape

    def read(self) -> np.ndarray:
        """As HuggingFace's checkpoint holds it: in the file's own dtype, or in float32 if it is quantized."""
        info = self.file.tensors[self.name]
        raw = self.file.data[info.start : info.start + info.nbytes]
        if info.type.name in _DTYPES:
            value = np.array(raw).view(_DTYPES[info.type.name]).reshape(info.shape)  # a copy: it outlives the file
        else:
            import gguf

            try:
                value = gguf.dequantize(raw.reshape(math.prod(info.shape[:-1]), -1), info.type).reshape(info.shape)
            except NotImplementedError:
                raise ModelError(
                    f"{self.path}: {self.name} is of type {info.type.name}, which gguf does not dequantize; "
                    "take a file with another quantization"
                ) from None
        if self.shift:
            value = value.astype(np.float32) - np.float32(self.shift)
        return _to_halves(value, self.heads) if self.heads else value


_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def _tensor(file: File, arch: str, name: str) -> _Tensor:
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return _Tensor(file, name, shift=1.0)
    match = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
    if arch != "llama" or match is None:
        return _Tensor(file, name)
    heads, rows = file.field("attention.head_count", int), file.tensors[name].shape[0]
    heads = heads if match[1] == "q" else file.field("attention.head_count_kv", int, heads)
    if heads < 1 or rows % (2 * heads):
        raise ModelError(f"{file.path}: {name} has {rows} rows, which {heads} heads of even width do not fill")
    return _Tensor(file, name, heads)


def _to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """From each row beside the one it rotates with to half a head away from it. E.g. 0 1 2 3 4 5 to 0 2 4 1 3 5."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _torch_name(arch: str, name: str) -> str:
    """`blk.0.attn_q.weight` to `model.layers.0.self_attn.q_proj.weight`; an unknown name stays."""
    known = _GEMMA_NAMES if arch.startswith("gemma") else _LAYER_NAMES
    owner, _, leaf = name.rpartition(".")
    if owner in _NAMES:
        return f"{_NAMES[owner]}.{leaf}"
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)", owner)) and match[2] in known:
        return f"model.layers.{match[1]}.{known[match[2]]}.{leaf}"
    return name


# --- the tokenizer ---


def read_tokenizer(path: Source) -> Tokenizer:
    """The tokenizer in the file's metadata: byte-level BPE (`gpt2`), or SentencePiece's BPE (`llama`).

    Control tokens are special tokens, user-defined ones added tokens; bos and eos are added where the file says so.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: no tokenizer or one of another kind, an unknown pre-tokenizer, or more tokens than embeddings.

    >>> read_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf").encode("Hello world").ids  # doctest: +SKIP
    [19556, 905]
    """
    return gguf_tokenizer.build(open_file(path))


def read_special(path: Source) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token` and `pad_token` as a chat template names them, those that there are.

    >>> read_special("SmolLM2-135M-Instruct.Q4_1.gguf")["eos_token"]  # doctest: +SKIP
    '<|im_end|>'
    """
    return gguf_tokenizer.special_tokens(open_file(path))


def write_tokenizer(path: Source, folder: Path) -> None:
    """The file's tokenizer, special tokens, chat template and stop ids as a HuggingFace folder keeps them.

    >>> write_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf", Path("smollm2"))  # doctest: +SKIP
    """
    file = open_file(path)
    read_tokenizer(file).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **read_special(file)}
    if (template := read_chat_template(file)) is not None:
        config["chat_template"] = template
    stops = {"eos_token_id": list(stop_ids(file))}
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_ids(path: Source) -> tuple[int, ...]:
    """The tokens that end a text or a turn, eos first.

    >>> stop_ids("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    (2,)
    """
    return gguf_tokenizer.stop_ids(open_file(path))


def read_chat_template(path: Source) -> str | None:
    """The file's Jinja chat template.

    >>> read_chat_template("SmolLM2-135M-Instruct.Q4_1.gguf")[:26]  # doctest: +SKIP
    '{% for message in messages'
    """
    return open_file(path).get("tokenizer.chat_template", str, None)


def _architecture(file: File) -> str:
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ModelError(f"{file.path}: architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    return arch
