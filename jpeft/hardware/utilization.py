"""How much of a chip a step uses: model FLOPs utilization (MFU), as in PaLM (Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, appendix B), counted for weights that are frozen.

    share = step_flops(model, params, tokens=4096, length=512) / seconds / (devices * peak_flops(kind))

A frozen weight costs 2 FLOPs a token forward and 2 backward, for there is no gradient of it: two thirds of what full
fine-tuning costs. What is computed again in the backward pass (remat, codes opened anew) does not count as useful.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

from jpeft.core.tree import Tree, flatten, peek


def peak_flops(kind: str) -> float | None:
    """The bfloat16 FLOP/s that a device of this kind is sold with; None where it is not known, as of CPUs.

    A device is what JAX shows as one: of TPU v2, v3 and 7x, half a chip.

    >>> peak_flops("NVIDIA H200"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    return next((peak for pattern, peak in _peaks() if re.search(pattern, kind)), None)


@functools.cache
def _peaks() -> tuple[tuple[str, float], ...]:
    # Not by way of `jpeft.planning`, whose package imports far more than this file.
    chips = json.loads((resources.files("jpeft") / "hardware" / "chips.json").read_text(encoding="utf-8"))
    return tuple((chip["device_kind"], chip["peak_flops"]) for chip in chips)


def peft_flops(peft: Any, params: Tree, adapter: Tree, *, tokens: int, length: int) -> float:
    """`step_flops` of a step that trains an adapter, whose leaves may be new or stand in for some of the base's.

    >>> peft_flops(peft, params, adapter, tokens=4096, length=512)  # doctest: +SKIP
    """
    base = flatten(params)
    weights = {path: leaf for path, leaf in flatten(adapter).items() if _multiplies(path, peek(leaf), False)}
    trained, stand_in = (sum(peek(leaf).size for path, leaf in weights.items() if (path in base) == there)
                         for there in (False, True))  # fmt: skip
    # Counted as frozen below, those that stand in need 2 more, for their own gradient.
    own = step_flops(peft.model, params, tokens=tokens, length=length, trained=trained)
    return own + 2.0 * tokens * stand_in


def _multiplies(path: tuple[str, ...], leaf: Any, tied: bool) -> bool:
    table = path[-1] == "embedding" and not (tied and "embed_tokens" in path)
    return len(leaf.shape) >= 2 and path[-1] not in ("scale", "bias") and not table


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
    weights = sum(peek(leaf).size for path, leaf in flatten(params).items() if _multiplies(path, peek(leaf), tied))
    attention = 0
    if config is not None and hasattr(config, "num_hidden_layers"):
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        attention = 12 * config.num_hidden_layers * width * length
    return float(tokens) * (4 * weights + 6 * trained + attention)
