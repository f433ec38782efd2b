"""The tensors of a GGUF file under HuggingFace's names and in HuggingFace's layout.

llama.cpp's converter changes two things, which are undone here: `llama` files hold the rows of q and k in the order of
Meta's rotary embedding, and gemma's norms hold `1 + weight`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jpeft.errors import ModelError
from jpeft.models.gguf.config import ROPE_FREQS, architecture
from jpeft.models.gguf.file import UNQUANTIZED, GGUFFile, open_file

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
_GEMMA_LAYER_NAMES = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[dict[str, GGUFTensor]]:
    """The file's tensors by HuggingFace's names. A tensor that HuggingFace's models do not have keeps its GGUF name.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: not a complete GGUF file of a supported architecture; or, from `read`, a type that cannot be
            dequantized.

    >>> with open_tensors("SmolLM2-135M-Instruct.Q4_1.gguf") as tensors:  # doctest: +SKIP
    ...     tensors["model.layers.0.self_attn.k_proj.weight"].shape
    (192, 576)
    """
    file = open_file(path)
    arch = architecture(file)
    # `ROPE_FREQS` is part of the config, not of the parameters.
    yield {_torch_name(arch, name): _tensor(file, arch, name) for name in file.tensors if name != ROPE_FREQS}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of an open GGUF file. Only `read` reads its bytes.

    Attributes:
        file: the open file.
        name: the tensor's name in the file.
        permuted_heads: the number of heads of a q or k weight whose rows the converter permuted; else 0.
        offset: the number that the converter added.
    """

    file: GGUFFile
    name: str
    permuted_heads: int = 0
    offset: float = 0.0

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in torch's order."""
        return self.file.tensors[self.name].shape

    @property
    def dtype(self) -> str:
        """The name of the dtype: float32 for blocks of codes, which have none of their own."""
        return np.dtype(UNQUANTIZED.get(self.file.tensors[self.name].type.name, np.float32)).name

    def read(self) -> np.ndarray:
        """The tensor of HuggingFace's checkpoint, in the file's dtype or dequantized to float32."""
        value = self.file.read_tensor(self.name)
        if self.offset:
            value = value.astype(np.float32) - np.float32(self.offset)
        return _unpermute(value, self.permuted_heads) if self.permuted_heads else value


def _tensor(file: GGUFFile, arch: str, name: str) -> GGUFTensor:
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return GGUFTensor(file, name, offset=1.0)
    match = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
    if arch != "llama" or match is None:
        return GGUFTensor(file, name)
    heads, rows = file.field("attention.head_count", int), file.tensors[name].shape[0]
    heads = heads if match[1] == "q" else file.field("attention.head_count_kv", int, heads)
    if heads < 1 or rows % (2 * heads):
        raise ModelError(f"{file.path}: {name} has {rows} rows, which do not divide into {heads} heads of even width")
    return GGUFTensor(file, name, heads)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `permute`, e.g. 0 1 2 3 4 5 to 0 2 4 1 3 5."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves rows that rotate together from half a head apart to adjacent places, as llama.cpp's converter does.

    >>> permute(np.array([0, 2, 4, 1, 3, 5]), heads=1)
    array([0, 1, 2, 3, 4, 5])
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def gguf_name(arch: str, torch_name: str) -> str | None:
    """GGUF's name of a tensor from HuggingFace's; None if it has none.

    >>> gguf_name("llama", "model.layers.3.mlp.down_proj.weight")
    'blk.3.ffn_down.weight'
    """
    layer_names = {torch: own for own, torch in _layer_names(arch).items()}
    names = {torch: own for own, torch in _NAMES.items()}
    owner, _, leaf = torch_name.rpartition(".")
    if owner in names:
        return f"{names[owner]}.{leaf}"
    if (match := re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", owner)) and match[2] in layer_names:
        return f"blk.{match[1]}.{layer_names[match[2]]}.{leaf}"
    return None


def _layer_names(arch: str) -> dict[str, str]:
    return _GEMMA_LAYER_NAMES if arch.startswith("gemma") else _LAYER_NAMES


def _torch_name(arch: str, name: str) -> str:
    """HuggingFace's name, e.g. `model.layers.0.self_attn.q_proj.weight` for `blk.0.attn_q.weight`."""
    layer_names = _layer_names(arch)
    owner, _, leaf = name.rpartition(".")
    if owner in _NAMES:
        return f"{_NAMES[owner]}.{leaf}"
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)", owner)) and match[2] in layer_names:
        return f"model.layers.{match[1]}.{layer_names[match[2]]}.{leaf}"
    return name
