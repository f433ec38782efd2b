"""Average: the weighted mean of what adapters do at a place (Wang et al. 2021, https://arxiv.org/abs/2109.04877).

y <- y + Σ_i w_i (a_i(y) - y)            for adapters a_i of a module's output
W <- W + Σ_i w_i (a_i(W) - W)            for adapters of a weight, which is the same mean of the layer's outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER
from jpeft.core.method import Leaves, ModuleContext
from jpeft.core.sites import Site, Survey
from jpeft.methods.families.members import Composition, Tokens, changes, part

_WEIGHTS = "average_weights"


@dataclass(frozen=True, kw_only=True)
class Average(Composition):
    """The weighted mean of adapters at each place, in their outputs rather than in their leaves.

    Attributes:
      members: methods by name, at the same targets, of any kinds and sizes: ones that change the outputs of modules, or
        ones that change weights and merge.
      weights: one for each member; by default equal.
      normalize_weights: whether they are divided by their sum.
      learn_weights: whether they train, apart at each site. `jax.grad` reaches them in any case: they are a leaf.
      train_members: whether the members' leaves train.

    Leaves at a site: those of the members, with their names in front, ``fr_lora_a``, and ``average_weights [members]``.
    `jpeft.methods.with_members` fills in adapters that were trained by themselves.

    >>> import jpeft
    >>> members = {"fr": jpeft.LoRA(rank=8), "de": jpeft.LoRA(rank=4)}
    >>> method = jpeft.methods.Average(members=members, weights=[0.7, 0.3])
    """

    weights: Sequence[float] | None = None
    normalize_weights: bool = True
    learn_weights: bool = False
    train_members: bool = False

    paper: ClassVar[str] = "https://arxiv.org/abs/2109.04877"
    kinds: ClassVar[tuple[str, ...]] = ("output", "weight")
    rules: ClassVar = dict.fromkeys(("normalize_weights", "learn_weights", "train_members"), BOOL)
    _hint: ClassVar[str] = "its members act on the outputs of modules, or on weights"

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        super().__post_init__()
        given = self.weights
        if given is None:
            return
        if len(given) != len(self.members) or not all(map(NUMBER[0], given)):
            raise ValueError(f"Average.weights must be a number for each of {', '.join(self.named)}, got {given}")
        if self.normalize_weights and abs(sum(given)) < 1e-6:
            raise ValueError(
                f"Average.weights sum to 0 and cannot be normalized, got {given}; set normalize_weights=False"
            )

    @property
    def frozen_members(self) -> tuple[str, ...]:
        return () if self.train_members else tuple(self.named)

    @property
    def non_trainable(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.learn_weights else frozenset({_WEIGHTS})

    def sites(self, survey: Survey) -> list[Site]:
        sites = super().sites(survey)
        for site in sites:
            for name, member in self.members:
                if site.kind == "weight" and (not member.mergeable(site) or member.input_dropout):
                    why = "drops entries of its input" if member.mergeable(site) else "cannot be merged"
                    raise ValueError(f"Average: the member {name!r} ({member.name}) at {site.name!r} {why}")
        return sites

    def mergeable(self, site: Site) -> bool:
        return site.kind == "weight" and all(member.mergeable(site) for _, member in self.members)

    def init_own(self, key: Key[Array, ""], site: Site) -> Leaves:
        given = jnp.asarray(self.weights or (1.0,) * len(self.members), jnp.float32)
        return {_WEIGHTS: given / given.sum() if self.normalize_weights or self.weights is None else given}

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        return _weighted(leaves, changes(self, leaves, x, y, context))

    def add(self, change: Tokens, x: Any, y: Tokens, context: ModuleContext) -> tuple[Any, Tokens]:
        return self.members[-1][1].add(change, x, y, context)

    def apply(self, leaves: Leaves, *call: Any) -> Tokens:
        """The changed output: of a module, ``(leaves, x, y, context)``; of a weight, ``(leaves, base, x)``."""
        if len(call) == 3:
            return super().apply(leaves, *call)
        base, x = call
        return base.merged(x)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Float[Array, " out"] | None) -> Any:
        merged = [member.merge(part(leaves, name), w, b) for name, member in self.members]  # type: ignore[attr-defined]
        new = w + _weighted(leaves, [own - w for own, _ in merged])
        if all(own is b for _, own in merged):
            return new, b
        return new, b + _weighted(leaves, [own - b for _, own in merged])  # type: ignore[operator]


def _weighted(leaves: Leaves, terms: Sequence[Array]) -> Array:
    weights = leaves[_WEIGHTS]
    return sum((weights[i] * term for i, term in enumerate(terms)), jnp.zeros_like(terms[0]))
