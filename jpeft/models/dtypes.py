"""The dtypes of a model's files, and casts that lose no range."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.errors import ModelError
from jpeft.models.bitsandbytes import combine_parts
from jpeft.models.sources import open_tensors
from jpeft.storage import as_path

SOURCE = "source"  # as a dtype: the one that each tensor has in the source


def stored_dtypes(path: str | os.PathLike[str]) -> dict[str, np.dtype]:
    """The dtype of every floating tensor of a folder or a `.gguf` file, by HuggingFace's name. Reads no weights.

    A quantized tensor of a folder has the dtype of the weight that was quantized; one of a `.gguf` file, float32.

    >>> stored_dtypes("all-MiniLM-L6-v2")["embeddings.LayerNorm.weight"]  # doctest: +SKIP
    dtype('float32')
    """
    with open_tensors(as_path(path)) as stored:
        names = {name: tensor.dtype for name, tensor in combine_parts(stored).items()}
    return {name: jnp.dtype(dtype) for name, dtype in names.items() if "float" in dtype}


def narrows(dtype: Any, to: Any) -> bool:
    """Whether a cast from one floating dtype to another may change a number.

    >>> narrows("float32", "bfloat16"), narrows("bfloat16", "float16"), narrows("bfloat16", "float32")
    (True, True, False)
    """
    before, after = jnp.finfo(dtype), jnp.finfo(to)
    return bool(before.nmant > after.nmant or before.max > after.max)


def cast(name: str, value: np.ndarray, dtype: Any, safe: bool = True) -> np.ndarray:
    """A tensor in another dtype.

    Args:
        name: its name, for the error.
        value: the tensor.
        dtype: the dtype; None is the tensor's own.
        safe: False turns numbers beyond the dtype's range into infinities.

    Raises:
        ModelError: a number is beyond the dtype's range.

    >>> cast("w", np.float32([1e4]), "float16").dtype
    dtype('float16')
    """
    if dtype is None or value.dtype == (dtype := jnp.dtype(dtype)):
        return value
    with np.errstate(over="ignore"):
        out = value.astype(dtype)
    if safe and narrows(value.dtype, dtype) and (np.isfinite(value) & ~np.isfinite(out)).any():
        largest, limit = float(np.abs(value).max()), float(jnp.finfo(dtype).max)
        raise ModelError(
            f"{name} holds {largest:.4g}, beyond the range of {dtype.name} (at most {limit:.4g}): choose another dtype"
        )
    return out
