"""Model FLOPs utilization (MFU) as in PaLM (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B), for
models with frozen weights.

    mfu = step_flops(model, params, tokens=4096, length=512) / seconds / (devices * peak_flops(kind))

A frozen weight costs 2 FLOPs per token forward and 2 backward, because it has no gradient: two thirds of full
fine-tuning. Recomputation in the backward pass (remat, repeated dequantization) does not count.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

from jpeft.core.tree import Tree, flatten, peek
from jpeft.frontends import as_tree


def peak_flops(kind: str) -> float | None:
    """The peak dense bfloat16 FLOP/s of a JAX device; None if unknown, as for CPUs.

    A JAX device of TPU v2, v3 and 7x is half a chip.

    Args:
      kind: the device's `device_kind`.

    >>> peak_flops("NVIDIA H200"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    return next((peak for pattern, peak in _peaks() if re.search(pattern, kind)), None)


@functools.cache
def _peaks() -> tuple[tuple[str, float], ...]:
    chips = json.loads((resources.files("jpeft") / "hardware" / "chips.json").read_text(encoding="utf-8"))
    return tuple((chip["device_kind"], chip["peak_flops"]) for chip in chips)


def peft_flops(peft: Any, params: Tree, adapter: Tree, *, tokens: int, length: int) -> float:
    """`step_flops` of a step that trains an adapter, whose leaves may be new or may replace leaves of the base.

    >>> peft_flops(peft, params, adapter, tokens=4096, length=512)  # doctest: +SKIP
    """
    base = flatten(as_tree(params)[0])
    weights = {path: peek(leaf).size for path, leaf in flatten(adapter).items() if _is_multiplied(path, peek(leaf))}
    new = sum(size for path, size in weights.items() if path not in base)
    replaced = sum(size for path, size in weights.items() if path in base)
    own = step_flops(peft.model, params, tokens=tokens, length=length, trained=new)
    return own + 2.0 * tokens * replaced  # they count as frozen in `own`; their gradient comes on top


def _is_multiplied(path: tuple[str, ...], leaf: Any, tied: bool = False) -> bool:
    """True for a weight of a matrix product; an embedding table is one only as a tied output head."""
    table = path[-1] == "embedding" and not (tied and "embed_tokens" in path)
    return len(leaf.shape) >= 2 and path[-1] not in ("scale", "bias") and not table


def step_flops(model: Any, params: Tree, *, tokens: int, length: int, trained: int = 0) -> float:
    """FLOPs that a training step with a frozen base needs.

    Each token costs 4 per frozen weight, 6 per trained weight, and, if the model's configuration has layers and heads,
    12 per position and unit of attention width in every layer.

    Args:
      model: the model, or None; its `.config` or `.encoder.config` describes attention and a tied output head.
      params: the base, concrete or abstract. Embedding tables do not count, unless the output head is tied to one.
      tokens: tokens in the batch, padding included.
      length: tokens in a row.
      trained: the number of adapter weights.

    >>> import numpy as np
    >>> step_flops(None, {"dense": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}, tokens=10, length=5)
    1280.0
    """
    config: Any = getattr(getattr(model, "encoder", model), "config", None)
    tied = hasattr(config, "head_dim") and config.tie_word_embeddings  # a decoder's
    leaves = flatten(as_tree(params)[0])
    weights = sum(peek(leaf).size for path, leaf in leaves.items() if _is_multiplied(path, peek(leaf), tied))
    attention = 0
    if config is not None and hasattr(config, "num_hidden_layers"):
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        attention = 12 * config.num_hidden_layers * width * length
    return float(tokens) * (4 * weights + 6 * trained + attention)
