"""Buffers in old checkpoints: tensors that follow from the config, which torch's modules saved beside the weights.

transformers does not read them. One that says something else than the config is an error here: the config may be that
of another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jpeft.errors import ModelError
from jpeft.models.folder import Tensor

#: A pattern for the whole name, and a function from the values in a file to those that the config gives.
Buffers = Mapping[str, Callable[[np.ndarray], np.ndarray]]

_PRECISION = {"bfloat16": 2.0**-8, "float16": 2.0**-10}  # relative; torch's float32 powers are exact to 1e-6


def causal_mask(mask: np.ndarray) -> np.ndarray:
    """An attention's buffer `bias`: 1 where a query may attend.

    >>> causal_mask(np.zeros((1, 1, 2, 2))).tolist()
    [[[[1.0, 0.0], [1.0, 1.0]]]]
    """
    return np.broadcast_to(np.tri(*mask.shape[-2:]), mask.shape) if mask.ndim > 1 else np.ones(mask.shape)


def masked_bias(value: np.ndarray) -> np.ndarray:
    """An attention's buffer `masked_bias`: any large negative number.

    >>> masked_bias(np.array([-1e4, 3.0])).tolist()
    [-10000.0, -1000000000.0]
    """
    return np.where(value <= -1e4, value, -1e9)


def positions(ids: np.ndarray) -> np.ndarray:
    """The buffer `position_ids`: 0, 1, …

    >>> positions(np.zeros((1, 3))).tolist()
    [[0.0, 1.0, 2.0]]
    """
    return np.broadcast_to(np.arange(ids.shape[-1], dtype=np.float64) if ids.ndim else np.zeros(()), ids.shape)


def is_buffer(buffers: Buffers, name: str) -> bool:
    """Whether a tensor of this name is a buffer.

    >>> is_buffer({r"embeddings\\.position_ids": positions}, "embeddings.position_ids")
    True
    """
    return any(re.fullmatch(pattern, name) for pattern in buffers)


def check_buffer(buffers: Buffers, name: str, tensor: Tensor) -> None:
    """Raises a ModelError if a buffer of this name has other values than the config gives."""
    expect = next(expect for pattern, expect in buffers.items() if re.fullmatch(pattern, name))
    stored: Any = tensor.read()
    found = np.asarray(stored, np.float64)
    want = expect(found)
    where = f"{tensor.path}: the buffer {tensor.name}"
    if want.shape != found.shape:
        raise ModelError(f"{where} has shape {found.shape}, but config.json gives {want.shape}")
    rtol = _PRECISION.get(stored.dtype.name, 1e-5)
    if (wrong := ~np.isclose(found, want, rtol=rtol, atol=2.0**-24)).any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ModelError(
            f"{where} has {found[at]:.6g} at {list(at)}, but config.json gives {want[at]:.6g}: correct the config, or "
            "remove the tensor if the config is right"
        )
