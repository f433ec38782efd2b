"""MoLE: LoRA experts mixed by token as MoLORA has them (Zadouri et al. 2023, https://arxiv.org/abs/2309.05444).

y = x W + s Σ_i g_i (x A_i) B_i          g = softmax(x G / τ), A_i: [in, r], B_i: [r, out], G: [in, experts]

With ``top_k``, the largest gates alone count, and sum to one (Chen et al. 2024, https://arxiv.org/abs/2401.16160). Over
trained LoRAs that stay as they are, it learns to combine them (as Wu et al. 2024, https://arxiv.org/abs/2404.13628, do
with gates for whole texts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NONZERO, POSITIVE_INT, RATE, Rule, or_none
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod, normal
from jpeft.methods.families.experts import POSITIVE, check_top_k, init_experts, mixed, top_k
from jpeft.methods.families.tokens import check_sees_tokens


@dataclass(frozen=True, kw_only=True)
class MoLE(WeightMethod):
    """LoRA experts whose shares each token chooses at each weight, by the weight's input there.

    A token's gates depend on its own states alone, so that a causal model stays causal, and a cache of keys and values
    changes nothing.

    Attributes:
      rank: r, the rank of each expert.
      alpha: numerator of the scale s = alpha / r; by default the rank, for a scale of 1.
      n_experts: number of experts at each weight.
      top_k: number of experts that count for a token; None for all.
      temperature: the divisor of the gates' logits.
      freeze_experts: whether the gates alone train, over trained LoRAs, see `jpeft.methods.with_experts`.
      dropout: rate on the experts' input, while the caller trains.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. Weights that see tokens: no embeddings, convolutions or
        experts.

    Leaves at a site: ``mole_a [in, experts * r]``, ``mole_b [experts * r, out]``, ``mole_gate [in, experts]``.

    It cannot be merged. With ``freeze_experts``, fresh experts are random, until trained ones take their place.

    >>> import jpeft
    >>> method = jpeft.methods.MoLE(rank=8, n_experts=4, top_k=2)
    """

    rank: int = 8
    alpha: float | None = None
    n_experts: int = 4
    top_k: int | None = None
    temperature: float = 1.0
    freeze_experts: bool = False
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "routing"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.05444"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "mole_a": ("in", None), "mole_b": (None, "out"), "mole_gate": ("in", None)
    }  # fmt: skip
    inert: ClassVar[frozenset[str]] = WeightMethod.inert | {"freeze_experts"}
    rescaled: ClassVar[frozenset[str]] = frozenset({"alpha"})
    neutral: ClassVar[float | None] = 0.0
    expert_leaves: ClassVar[tuple[str, str]] = ("mole_a", "mole_b")
    per_site: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "n_experts", "top_k", "temperature", "freeze_experts", "dropout", "dtype", "parts"
    )  # fmt: skip
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "alpha": or_none(NONZERO), "n_experts": POSITIVE_INT, "top_k": or_none(POSITIVE_INT),
        "temperature": POSITIVE, "freeze_experts": BOOL, "dropout": RATE,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_k(self.name, self.top_k, self.n_experts)

    @property
    def scale(self) -> float:
        """s, the factor on the experts' outputs."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self, other: MoLE) -> Mapping[str, float]:
        return {"mole_b": other.scale / self.scale}

    @property
    def identity_at_init(self) -> bool:
        """Whether B starts at zero: where experts train."""
        return not self.freeze_experts

    @property
    def non_trainable(self) -> frozenset[str]:
        return frozenset(self.expert_leaves if self.freeze_experts else ())

    def mergeable(self, site: Site) -> bool:
        return False

    def prepare(self, site: Site) -> Site:
        check_sees_tokens(self.name, site)
        return super().prepare(site)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_e, key_g = jax.random.split(key)
        zero = not self.freeze_experts
        a, b = init_experts(key_e, site, self.n_experts, self.rank, self.dtype, zero)
        gate = normal(key_g, (site.inputs, self.n_experts), 0.02, self.dtype)
        return {"mole_a": a, "mole_b": b, "mole_gate": gate}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        logits = (x @ leaves["mole_gate"]).astype(jnp.float32) / float(self.temperature)
        if self.top_k is not None:
            logits = jnp.where(top_k(logits, self.top_k), logits, -jnp.inf)
        gates = jax.nn.softmax(logits)
        return mixed(base, x, leaves["mole_a"], self.scale * leaves["mole_b"], gates, self.dropout)
