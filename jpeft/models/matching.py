"""Sorts the tensors of a checkpoint: those of a model's slots, those that follow from the config, and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.errors import ModelError
from jpeft.models.buffers import check_buffer, is_buffer
from jpeft.models.family import Family
from jpeft.models.folder import Tensor
from jpeft.models.layout import Slot, check_shapes
from jpeft.models.naming import Naming, choose


class Matched(NamedTuple):
    """The tensors of a checkpoint, sorted.

    Attributes:
        naming: the form of their names.
        names: the tensor's name of each slot.
        buffers: the names of those that follow from the config, by the model's own names.
        copies: pairs of names of tensors that must be equal: a tied head and its embedding.
    """

    naming: Naming
    names: dict[Slot, str]
    buffers: dict[str, str]
    copies: list[tuple[str, str]]


def match_tensors(
    source: Path, family: Family, model: Any, slots: Sequence[Slot], tensors: Mapping[str, Tensor]
) -> Matched:
    """Finds the tensor of each slot.

    Args:
        source: the folder or file, for error messages.
        family: the model's family.
        model: the model.
        slots: its slots.
        tensors: the checkpoint's tensors by name.

    Raises:
        ModelError: tensors are missing, not part of the model, there twice, or have another shape.
    """
    by_tensor_name = {slot.tensor_name: slot for slot in slots}
    naming = choose(family.namings(model), by_tensor_name.keys(), tensors)
    buffers, extras = family.buffers(model), family.extras(model)
    names, shapes, own_buffers, found = {}, {}, {}, {}
    for name, tensor in tensors.items():
        own = naming.in_model(name)
        if own is None:  # it belongs to a head, or to another model
            continue
        if own in found:
            raise ModelError(f"{source}: {found[own]} and {name} are the same tensor, {own}")
        found[own] = name
        if slot := by_tensor_name.get(own):
            names[slot] = name
            shapes[slot.name] = tensor.shape[::-1] if slot.is_kernel else tensor.shape
        elif is_buffer(buffers, own):
            own_buffers[own] = name
        elif not extras.fullmatch(own):
            shapes[name] = tensor.shape
    if problem := family.problem(model, found):
        raise ModelError(f"{source}: {problem}")
    if elsewhere := _elsewhere([slot for slot in slots if slot not in names], tensors):
        raise ModelError(f"{source}: {elsewhere}")
    check_shapes(str(source), {slot.name: slot.shape for slot in slots}, shapes)
    copies = [(found[a], found[b]) for a, b in family.copies(model).items() if a in found and b in found]
    return Matched(naming, names, own_buffers, copies)


def _elsewhere(missing: Sequence[Slot], tensors: Mapping[str, Tensor]) -> str:
    """Why a tensor is missing that the file has under another prefix; empty if it has none."""
    for slot in missing:
        for name in tensors:
            if name.endswith(f".{slot.tensor_name}"):
                prefix = name.removesuffix(slot.tensor_name)
                return f"missing {slot.name}, but there is {name}: rename the tensors, without the prefix {prefix!r}"
    return ""


def check_values(family: Family, model: Any, matched: Matched, tensors: Mapping[str, Tensor]) -> None:
    """Raises a ModelError if a buffer or a copy says something else than the config or the original."""
    buffers = family.buffers(model)
    for own, name in matched.buffers.items():
        check_buffer(buffers, own, tensors[name])
    for copy, original in matched.copies:
        a, b = tensors[copy], tensors[original]
        if a.shape != b.shape or not _is_equal(a.read(), b.read()):
            raise ModelError(
                f"{a.path}: {copy} differs from {original}, to which config.json ties it (tie_word_embeddings); set "
                "tie_word_embeddings to false, or remove the tensor"
            )


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two tensors are equal. A quantized one is never known to be."""
    return all(isinstance(x, np.ndarray) for x in (a, b)) and np.array_equal(a, b)
