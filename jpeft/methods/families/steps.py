"""Output methods that add something to a module's output, so that they can be stacked, averaged and fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from jpeft.core.method import Leaves, ModuleContext
from jpeft.methods.base import OutputMethod

Tokens = Float[Array, "*tokens features"]


@dataclass(frozen=True, kw_only=True)
class Step(OutputMethod):
    """The base class of output methods that add a change. A subclass defines ``init`` and ``change``."""

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        """What is added. Arguments as for `OutputMethod.apply`."""
        raise TypeError(f"{self.name} does not define change")

    def add(self, change: Tokens, x: Any, y: Tokens, context: ModuleContext) -> tuple[Any, Tokens]:
        """The module's input and output for what comes after, when a change has been added."""
        return x, y + change

    def apply(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        return self.add(self.change(leaves, x, y, context), x, y, context)[1]


def change_of(method: Any, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
    """What an output method adds: its change if it is a step, else the difference that it makes to the output."""
    if isinstance(method, Step):
        return method.change(leaves, x, y, context)
    return method.apply(leaves, x, y, context) - y


def added(method: Any, change: Tokens, x: Any, y: Tokens, context: ModuleContext) -> tuple[Any, Tokens]:
    """The module's input and output after a change by an output method."""
    return method.add(change, x, y, context) if isinstance(method, Step) else (x, y + change)
