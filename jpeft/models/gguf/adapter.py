"""LoRA as a GGUF file, in the form of llama.cpp's ``convert_lora_to_gguf.py``.

For a tensor of the model such as ``blk.0.attn_q.weight [out, in]`` the file has ``….lora_a [r, in]`` and ``….lora_b
[out, r]``, and llama.cpp computes W + (alpha / r) B A with the one alpha of the file and the r of each tensor. The rows
of B are permuted as the model's are; A of the embedding is transposed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import UserError
from jpeft.files import write_atomically
from jpeft.models.decoder import DecoderConfig
from jpeft.models.gguf.config import ARCHITECTURES
from jpeft.models.gguf.tensors import gguf_name, permute
from jpeft.storage import as_path

Factors = tuple[np.ndarray, np.ndarray]


def write_adapter(
    path: str | os.PathLike[str], config: DecoderConfig, factors: Mapping[str, Factors], *, name: str = "adapter"
) -> None:
    """Writes a LoRA for a decoder as a GGUF adapter.

    Args:
      path: the file to write; one of this name is replaced.
      config: the model's configuration.
      factors: by HuggingFace's names of modules, such as ``model.layers.0.self_attn.q_proj``, the pair ``(A [in, r], B
        [r, out])`` with a scale of 1, in float32 or float16.
      name: the adapter's name.

    Raises:
      UserError: llama.cpp has no such architecture, or no such tensor.

    >>> a, b = np.ones((8, 2), np.float32), np.ones((2, 8), np.float32)
    >>> config = DecoderConfig(hidden_size=8, num_attention_heads=2)
    >>> file = Path(tempfile.mkdtemp()) / "adapter.gguf"
    >>> write_adapter(file, config, {"model.layers.0.self_attn.q_proj": (a, b)})
    """
    import gguf

    arch = _architecture(config)
    alpha = max(a.shape[1] for a, _ in factors.values())
    tensors = {}
    for module, pair in factors.items():
        if (target := gguf_name(arch, f"{module}.weight")) is None:
            raise UserError(f"llama.cpp has no tensor for {module!r} of {config.model_type}")
        a, b = _stored(arch, config, target, pair, alpha)
        tensors |= {f"{target}.lora_a": a, f"{target}.lora_b": b}
    with tempfile.TemporaryDirectory(prefix="jpeft-") as folder:
        writer = gguf.GGUFWriter(file := Path(folder) / "adapter.gguf", arch)
        _write(writer, name, alpha, tensors)
        write_atomically(as_path(path), file.read_bytes())


def _write(writer: Any, name: str, alpha: int, tensors: Mapping[str, np.ndarray]) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for own, x in tensors.items():
        writer.add_tensor(own, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(config: DecoderConfig) -> str:
    known = {"mistral": "llama"} | {model_type: arch for arch, model_type in ARCHITECTURES.items()}
    if config.model_type not in known:
        raise UserError(f"llama.cpp's {config.model_type!r} is not one of {', '.join(known)}")
    return known[config.model_type]


def _stored(arch: str, config: DecoderConfig, target: str, pair: Factors, alpha: float) -> Factors:
    """``lora_a`` and ``lora_b`` of a tensor, for a scale of alpha / r."""
    a, b = pair[0].T, pair[1].T
    b = b * np.asarray(len(a) / alpha, b.dtype)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if arch == "llama" and (count := heads.get(target.split(".")[-2])):
        b = permute(b, count)
    return (a.T, b) if target == "token_embd.weight" else (a, b)
