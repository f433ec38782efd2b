"""Reads the tensors of a checkpoint one at a time, in the model's layout and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import fingerprint
from jpeft.core.quantized import Quantized, quantize_part
from jpeft.errors import ModelError
from jpeft.models.folder import Tensor
from jpeft.models.layout import Slot


class ReadTensor(NamedTuple):
    """A tensor on the host.

    Attributes:
        value: in the model's layout and dtype; quantized if it is stored so or is to be.
        has_stored_origin: whether the `origin` of a quantized value comes from the file. It is then the checksum of the
            whole leaf; else it is this tensor's contribution to it.
    """

    value: np.ndarray | Quantized
    has_stored_origin: bool = False


class TensorReader(NamedTuple):
    """Reads a model's tensors.

    Attributes:
        names: the tensor's name of each slot.
        tensors: the tensors by name.
        dtype: the dtype of the parameters.
        planned: the leaves to quantize while reading, abstract, by path.
    """

    names: Mapping[Slot, str]
    tensors: Mapping[str, Tensor]
    dtype: Any
    planned: Mapping[str, Quantized]

    def file(self, slot: Slot) -> Path:
        """The file that holds a slot's tensor."""
        return self.tensors[self.names[slot]].path

    def read(self, slot: Slot) -> ReadTensor:
        """A slot's tensor.

        Raises:
            ModelError: it cannot be read, has no floating dtype, or cannot be quantized.
        """
        tensor = self.tensors[self.names[slot]]
        value: Any = tensor.read()  # `Quantized` from a `QuantizedTensor`
        if isinstance(value, Quantized):
            if slot.path in self.planned:
                raise ModelError(f"{tensor.path}: {tensor.name} is quantized already, as {value.scheme}")
            value = dataclasses.replace(slot.transpose(value), dtype=np.dtype(self.dtype))
            stored = value.origin is not None
            return ReadTensor(value if stored else _with_origin(slot, value), stored)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ModelError(
                f"{tensor.path}: {tensor.name} is {value.dtype}; quantized weights of this form are not supported"
            )
        value = slot.transpose(value).astype(self.dtype, copy=False)
        if (like := self.planned.get(slot.path)) is None:
            return ReadTensor(value)
        try:
            return ReadTensor(quantize_part(like, value, slot.start))
        except ValueError as error:
            raise ModelError(f"{tensor.path}: cannot quantize {tensor.name}: it {error}") from None


def _with_origin(slot: Slot, value: Quantized) -> Quantized:
    """Adds the checksum of the dequantized weight, for a file that does not hold that of the original weight.

    It dequantizes outside of jit, an operation at a time: fusing a product with a sum would round differently on some
    devices.
    """
    weight = np.asarray(jax.tree.map(jnp.asarray, value).unbox())
    return dataclasses.replace(value, origin=fingerprint.sums_of(weight, slot.start))
