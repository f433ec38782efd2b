"""The correspondence between the leaves of a parameter tree and the tensors of a checkpoint.

A leaf's path is its tensor's name with `/` for `.` and Flax's leaf name: `…/query/kernel` is `….query.weight`
transposed, `…/LayerNorm/scale` is `….LayerNorm.weight`, `…/word_embeddings/embedding` is `….word_embeddings.weight`. A
leaf of stacked layers is one tensor per layer. The leaves themselves follow from the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core import tree
from jpeft.core.quantized import Quantized, open_boxes
from jpeft.errors import ModelError
from jpeft.models import bitsandbytes

_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Slot(NamedTuple):
    """The place of one tensor: a leaf, or one layer of a stacked leaf.

    Attributes:
        name: the leaf's path, with the layer's number where torch has it.
        path: the leaf's path.
        layer: the layer's number; None if the leaf is not stacked.
        shape: the shape in the model's layout.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether torch stores the transpose."""
        return self.path.endswith("/kernel")

    @property
    def start(self) -> int:
        """The position of the tensor's first element in its leaf."""
        return (self.layer or 0) * math.prod(self.shape)

    @property
    def tensor_name(self) -> str:
        """torch's name of the tensor, e.g. `….query.weight` for `…/query/kernel`."""
        owner, _, leaf = self.name.replace("/", ".").rpartition(".")
        return f"{owner}.{_TORCH_LEAF.get(leaf, leaf)}"

    def transpose(self, value: Any) -> Any:
        """Changes a tensor from the model's layout to torch's or back."""
        if not self.is_kernel:
            return value
        return bitsandbytes.transposed(value) if isinstance(value, Quantized) else value.T


def leaves_by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree by `/`-separated path, without the boxes that name axes. Inverse of `tree_of`."""
    return {tree.join(path): open_boxes(leaf) for path, leaf in tree.flatten(params).items()}


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of leaves by `/`-separated path. Inverse of `leaves_by_path`."""
    return tree.unflatten({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def list_slots(shapes: Mapping[str, Any], stacked: str | None) -> list[Slot]:
    """The slots of a model with these leaves, whose layers are stacked below the path ``stacked``."""
    slots = []
    for path, leaf in shapes.items():
        if stacked is None or not path.startswith(f"{stacked}/"):
            slots.append(Slot(path, path, None, leaf.shape))
            continue
        rest = path.removeprefix(stacked)
        slots += [Slot(f"{stacked}/{i}{rest}", path, i, leaf.shape[1:]) for i in range(leaf.shape[0])]
    return slots


def torch_value(slot: Slot, leaves: Mapping[str, Any]) -> np.ndarray | Quantized:
    """A slot's tensor on the host, in torch's layout."""
    leaf = leaves[slot.path]
    if slot.layer is not None:
        leaf = jax.tree.map(lambda x: x[slot.layer], leaf)
    return slot.transpose(jax.tree.map(np.asarray, jax.device_get(leaf)))


def check_shapes(where: str, expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Raises a ModelError that starts with ``where`` unless both have the same names with the same shapes."""
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelError(f"{where}: missing {first_names(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        raise ModelError(f"{where}: not part of the model: {first_names(extra)}")
    for path, shape in expected.items():
        if found[path] != shape:
            raise ModelError(f"{where}: {path} has shape {found[path]}, the model needs {shape}")


def first_names(names: list[str], at_most: int = 3) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
