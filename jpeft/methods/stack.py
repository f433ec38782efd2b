"""Stack: adapters one after the other at a place, as in MAD-X (Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052).

h <- a_n(… a_1(h))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jpeft.core.method import Leaves, ModuleContext
from jpeft.methods.families.members import Composition, Tokens, part


@dataclass(frozen=True, kw_only=True)
class Stack(Composition):
    """Adapters one after the other at each place: each sees the output that those before it have changed.

    Methods that change weights are stacked by `jpeft.Chain`.

    Attributes:
      members: methods by name, in their order: `jpeft.Bottleneck`, `jpeft.methods.LoReFT` or another that changes the
        outputs of modules, at the same targets; or a composition.
      frozen: the names of members that do not train, such as the adapter of a language below that of a task.

    Leaves at a site: those of the members, with their names in front, ``fr_bottleneck_down``.
    `jpeft.methods.with_members` fills in adapters that were trained by themselves.

    >>> import jpeft
    >>> method = jpeft.methods.Stack(members={"fr": jpeft.Bottleneck(), "ner": jpeft.Bottleneck()}, frozen=["fr"])
    """

    frozen: Sequence[str] = ()

    paper: ClassVar[str] = "https://arxiv.org/abs/2005.00052"

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        super().__post_init__()
        if unknown := [name for name in self.frozen if name not in self.named]:
            raise ValueError(f"Stack.frozen names {unknown[0]!r}, which is no member: {', '.join(self.named)}")

    @property
    def frozen_members(self) -> tuple[str, ...]:
        return tuple(self.frozen)

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        total, seen = None, (x, y)
        for i, (name, member) in enumerate(self.members):
            own = context.part(i)
            change = member.change(part(leaves, name), *seen, own)
            total, seen = change if total is None else total + change, member.add(change, *seen, own)
        assert total is not None
        return total

    def add(self, change: Tokens, x: Any, y: Tokens, context: ModuleContext) -> tuple[Any, Tokens]:
        return self.members[-1][1].add(change, x, y, context)

    def apply(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        for i, (name, member) in enumerate(self.members):
            own = context.part(i)
            x, y = member.add(member.change(part(leaves, name), x, y, own), x, y, own)
        return y
