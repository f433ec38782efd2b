"""The interface of a model family."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn

from jpeft.core.tree import Path
from jpeft.models.buffers import Buffers
from jpeft.models.naming import Naming


class Family(Protocol):
    """The interface of a module in `FAMILIES`. The `config` of its Linen modules has a `model_type`."""

    @property
    def IS_DECODER(self) -> bool:
        """Whether the models are causal language models. The others are encoders."""
        ...

    @property
    def OPTIONS(self) -> frozenset[str]:
        """The keyword arguments of `from_config` beside the dtypes."""
        ...

    @property
    def from_config(self) -> Callable[..., nn.Module]:
        """`(config, *, dtype, param_dtype, **options)` to the module that a `config.json` describes.

        Raises a ValueError that names the field if one has a value that the module does not support.
        """
        ...

    def to_config(self, model: Any) -> dict[str, Any]:
        """The `config.json` of a model. Inverse of `from_config`."""
        ...

    def namings(self, model: Any) -> Sequence[Naming]:
        """The forms in which a checkpoint may name the model's tensors; `save` without a source writes the first."""
        ...

    def buffers(self, model: Any) -> Buffers:
        """Tensors of old checkpoints that follow from the config, by the model's own names."""
        ...

    def extras(self, model: Any) -> re.Pattern[str]:
        """Matches the model's own names of other tensors that a checkpoint may hold beside it, such as heads."""
        ...

    def problem(self, model: Any, names: Collection[str]) -> str:
        """Why a checkpoint with tensors of these names, the model's own, is not of the model; empty if it may be."""
        ...

    def copies(self, model: Any) -> Mapping[str, str]:
        """Tensors that a checkpoint may hold a second time, and the original, by the model's own names."""
        ...

    def parts(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The options of `from_config` that follow from a checkpoint: its optional parts, by the tensors' shapes."""
        ...

    def example_inputs(self, model: Any) -> tuple[Any, ...]:
        """The smallest inputs of the model, abstract."""
        ...

    def axis_names(self, path: Path) -> tuple[str | None, ...]:
        """The logical axis names of a parameter whose box has none."""
        ...
