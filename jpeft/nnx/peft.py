"""A method bound to an NNX model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx

from jpeft.core.peft import Peft
from jpeft.core.tree import unflatten
from jpeft.nnx.module import adapter_variables, without_adapter


@dataclass(frozen=True, eq=False, repr=False)
class NnxPeft(Peft):
    """A method bound to an NNX model. ``params`` are a ``nnx.State``, nested mappings or a module, everywhere.

    `Peft.apply` runs a state or mappings in the model as it was when the method was bound. A module runs as it is now:
    in the mode of its ``train()`` or ``eval()``, with its own other state. It must have the modules and parameters that
    were bound, and is never changed. `Peft.apply` also takes

    - ``rest``: state that is no parameter, ``nnx.state(model, nnx.Not(nnx.Param))``. By default it is that of a module,
      or what lies beside the parameters, or as it was when the method was bound.
    - ``mutable``: True returns ``(y, rest)``.
    - ``rngs``: a key, or keys by stream, ``{"dropout": key}``, for the adapter's dropout and the model's generators;
      a ``nnx.Rngs`` for the adapter alone. A model whose method has an argument ``rngs`` gets it too.
    - ``method``: the name of the model's method.
    """

    def __repr__(self) -> str:
        frontend: Any = self.frontend
        return f"NnxPeft({self.method!r}, bound to {len(self.sites)} sites of a {frontend.classes[()].__name__})"

    def adapter(self, model: nnx.Module) -> dict[str, Any]:
        """The adapter in a module that `attach` or `module` made: the small tree that is saved.

        Raises:
          ValueError: the module holds no adapter of this Peft.
        """
        return unflatten({path: v.get_raw_value() for path, v in adapter_variables(self, model).items()})

    def detach(self, model: nnx.Module) -> nnx.Module:
        """A new module of the model's own classes, over the same arrays, without the adapter.

        Leaves of the base that the adapter replaced are those of the adapter.

        Raises:
          ValueError: the module holds no adapter of this Peft.
        """
        return without_adapter(self, model)
