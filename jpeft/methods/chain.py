"""Chain: several methods on one model, each with its own leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax.core import FrozenDict

from jpeft.methods.base import Method


@dataclass(frozen=True, init=False)
class Chain(Method):
    """Several methods on one model. On a weight that several change, each acts on the result of those before it.

    Attributes:
      members: the methods; a chain among them is replaced by its members.

    >>> import jpeft
    >>> method = jpeft.Chain(jpeft.LoRA(rank=8), jpeft.BitFit(), jpeft.Train(r"classifier"))
    """

    members: tuple[Method, ...]

    def __init__(self, *methods: Method):
        if not methods or not all(isinstance(m, Method) for m in methods):
            raise ValueError(f"Chain takes one method or more, e.g. Chain(LoRA(), BitFit()); got {methods!r}")
        object.__setattr__(self, "members", tuple(member for m in methods for member in m.methods()))
        object.__setattr__(self, "targets", None)
        object.__setattr__(self, "exclude", None)
        object.__setattr__(self, "overrides", FrozenDict())

    def __hash__(self) -> int:
        return hash(self.members)

    def methods(self) -> tuple[Method, ...]:
        return self.members

    def to_dict(self) -> dict[str, Any]:
        return {"method": "Chain", "methods": [m.to_dict() for m in self.members]}
