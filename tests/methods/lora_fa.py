"""LoRA-FA (Zhang et al. 2023, https://arxiv.org/abs/2308.03303), as someone outside of jpeft would write it.

y = x W + s (x A) B        A: [in, r], random and frozen, B: [r, out], s = alpha / r
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.methods import WeightMethod


@dataclass(frozen=True, kw_only=True)
class LoRAFA(WeightMethod):
    """Low-rank updates of which only B trains."""

    rank: int = 4
    alpha: float = 8.0

    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"fa_a": ("in", None), "fa_b": (None, "out")}
    non_trainable: ClassVar[frozenset[str]] = frozenset({"fa_a"})
    per_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "parts")

    def init(self, key: jax.Array, site: Any, w: Any) -> Mapping[str, jax.Array]:
        a = jax.random.normal(key, (site.inputs, self.rank), jnp.float32) / site.inputs**0.5
        return {"fa_a": a, "fa_b": jnp.zeros((self.rank, site.outputs))}

    def merge(self, leaves: Mapping[str, jax.Array], w: jax.Array, b: Any) -> tuple[jax.Array, Any]:
        # W' = W + s A B
        return w + self.alpha / self.rank * leaves["fa_a"] @ leaves["fa_b"], b
