"""One method for adapters of several: of each class one member, at all sites and of the largest rank."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from jpeft.core.actions import Action
from jpeft.core.peft import Peft


@dataclasses.dataclass
class _Member:
    """Actions of one class that one member can take the place of."""

    method: Any
    sizes: dict[str, int]
    sites: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, action: Action) -> None:
        self.sites[action.site.name] = None
        for name in self.sizes:
            self.sizes[name] = max(self.sizes[name], getattr(action.method, name))

    def united(self, rank: int) -> Any:
        sizes = {name: max(size, rank if name == "rank" else 0) for name, size in self.sizes.items()}
        targets = "|".join(map(re.escape, self.sites))
        return dataclasses.replace(self.method, **sizes, targets=targets, exclude=None, overrides={})


def unite(pefts: Iterable[Peft], rank: int = 0) -> list[Any]:
    """The members of a method that can do what any of several bound methods does, one at a time.

    Members of one class become one, if they differ only in what an adapter can be padded or scaled to: in ranks, scales
    and targets.

    Args:
      pefts: the bound methods.
      rank: the least rank of a member that has one.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(8)]), jnp.ones((1, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> small = jpeft.LoRA(rank=2, targets="layers_0").bind(model, params, x)
    >>> large = jpeft.LoRA(rank=4, alpha=1, targets="layers_1").bind(model, params, x)
    >>> [(member.rank, member.targets) for member in unite([small, large])]
    [(4, 'layers_0|layers_1')]
    """
    members: dict[Any, _Member] = {}
    for peft in pefts:
        seen: dict[Any, list[int]] = {}
        for action in peft.actions:
            kind = _kind(action.method)
            places = seen.setdefault(kind, [])
            if action.member not in places:
                places.append(action.member)
            # A chain may have a class twice, at the same sites.
            key = kind, places.index(action.member)
            if key not in members:
                sizes = {name: getattr(action.method, name) for name in action.method.resizable}
                members[key] = _Member(action.method, sizes)
            members[key].add(action)
    return [member.united(rank) for member in members.values()]


def _kind(method: Any) -> Any:
    """The class and the fields that members must share to become one."""
    free = {*method.inert, *method.resizable, *method.rescaled}
    fields = [(f.name, getattr(method, f.name)) for f in dataclasses.fields(method) if f.name not in free]
    return type(method), tuple(fields)
