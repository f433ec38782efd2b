"""How much of a chip a step uses: model FLOPs utilisation (MFU), as in PaLM (Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, appendix B), counted for weights that are frozen.

    share = step_flops(model, params, tokens=4096, length=512) / seconds / (devices * peak_flops(kind))

A frozen weight costs 2 FLOPs a token forward and 2 backward, for there is no gradient of it: two thirds of what full
fine-tuning costs. What is computed again in the backward pass (remat, codes opened anew) does not count as useful.
"""

from __future__ import annotations

import re
from typing import Any

from jpeft.tree import Tree, flatten, peek

# Dense bfloat16 FLOP/s of a chip, by what JAX calls its kind; from the vendors' data sheets.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"TPU v2", 45e12), (r"TPU v3", 123e12), (r"TPU v4 lite|TPU v4i", 138e12), (r"TPU v4", 275e12),
    (r"TPU v5 ?lite|TPU v5e", 197e12), (r"TPU v5p?", 459e12), (r"TPU v6 ?lite|TPU v6e", 918e12),
    (r"TPU v?7x?", 2307e12), (r"B200", 2250e12), (r"H200|H100(?!.*PCIe)|GH200", 989e12), (r"H100.*PCIe", 756e12),
    (r"A100", 312e12),
    (r"V100", 125e12), (r"L40S", 362e12), (r"L4(?!0)", 121e12), (r"A10G?(?!0)", 125e12), (r"T4", 65e12),
)  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """The bfloat16 FLOP/s that a chip of this `device_kind` is sold with; None where it is not known, as of CPUs.

    >>> peak_flops("NVIDIA H200"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, kind)), None)


def step_flops(model: Any, params: Tree, *, tokens: int, length: int, trained: int = 0) -> float:
    """FLOPs that a training step needs whose base is frozen.

    Of each token: 4 for every weight it is multiplied by, 6 for every one that trains, and, where the model's
    configuration tells its layers and heads, 12 for each position and width of the attention.

    Args:
      model: a Linen module; `.config`, or `.encoder.config`, tells of attention and of a tied head.
      params: the base, concrete or abstract. Embedding tables do not count, unless the output head is tied to one.
      tokens: in the batch, padding included. length: of a row.
      trained: weights of the adapter.

    >>> import numpy as np
    >>> step_flops(None, {"dense": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}, tokens=10, length=5)
    1280.0
    """
    config: Any = getattr(getattr(model, "encoder", model), "config", None)
    tied = hasattr(config, "head_dim") and config.tie_word_embeddings  # a decoder's
    weights = 0
    for path, leaf in flatten(params).items():
        shape = peek(leaf).shape
        table = path[-1] == "embedding"
        if len(shape) >= 2 and path[-1] not in ("scale", "bias") and (not table or (tied and "embed_tokens" in path)):
            weights += peek(leaf).size
    attention = 0
    if config is not None and hasattr(config, "num_hidden_layers"):
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        attention = 12 * config.num_hidden_layers * width * length
    return float(tokens) * (4 * weights + 6 * trained + attention)
