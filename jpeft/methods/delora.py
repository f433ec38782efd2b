"""DeLoRA: a LoRA whose direction and strength are apart (Bini et al. 2025, https://arxiv.org/abs/2503.18225).

y = x (W + (lambda / r) diag(n) A diag(1 / (|a_i| |b_i|)) B) + b

A: [in, r] with columns a_i, B: [r, out] with rows b_i, n: the norms of W's rows at the start, lambda: a number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import NONZERO, POSITIVE_INT, Rule
from jpeft.core.interchange import Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear, widened
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import low_rank

_LEAST = 1e-4  # PEFT's least norm


@dataclass(frozen=True, kw_only=True)
class DeLoRA(WeightMethod):
    """Low-rank updates of bounded size: lambda, which trains, bounds their norm relative to the weight's.

    As in PEFT, the bound holds for each input by the norm of its row of W, where the paper has W's whole norm.

    Attributes:
      rank: r.
      boundary: lambda's start (PEFT's ``delora_lambda``).
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``delora_a [in, r]``, ``delora_b [r, out]``, ``delora_lambda [1]``, and ``delora_w_norm [in]``,
    which does not train.

    >>> import jpeft
    >>> method = jpeft.methods.DeLoRA(rank=16, targets=r".*/(query|value)")
    """

    rank: int = 8
    boundary: float = 15.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.18225"
    learning_rate: ClassVar[float] = 3e-3
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "delora_a": ("in", None), "delora_b": (None, "out"), "delora_w_norm": ("in",),
    }  # fmt: skip
    non_trainable: ClassVar[frozenset[str]] = frozenset({"delora_w_norm"})
    per_site: ClassVar[tuple[str, ...]] = ("rank", "boundary", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"rank": POSITIVE_INT, "boundary": NONZERO}

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return {
            "delora_a": kaiming(key, (site.inputs, self.rank), site.inputs, self.dtype),
            "delora_b": jnp.zeros((self.rank, site.outputs), self.dtype),
            "delora_lambda": jnp.full((1,), self.boundary, self.dtype),
            "delora_w_norm": jnp.linalg.norm(w.astype(widened(w.dtype)), axis=1).astype(self.dtype),
        }

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        a, b = leaves["delora_a"], leaves["delora_b"]
        scale = leaves["delora_lambda"] / self.rank / (_norm(a, 0) * _norm(b, 1))
        return {"a": leaves["delora_w_norm"][:, None] * a * scale, "b": b}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        return low_rank(base, x, leaves["a"], leaves["b"])

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return w + leaves["a"] @ leaves["b"], b


def _norm(x: Float[Array, "m n"], axis: int) -> Float[Array, " rank"]:
    """Norms, and at least PEFT's. Below that they have no gradient: that of a root at zero would be infinite."""
    return jnp.sqrt(jnp.maximum((x * x).sum(axis), _LEAST**2))


DeLoRA.hf = HFSpec(
    peft_type="DELORA",
    tensors=(
        Tensor("delora_A", "delora_a", "ri->ir"),
        Tensor("delora_B", "delora_b", "or->ro"),
        Tensor("delora_lambda", "delora_lambda"),
        Tensor("delora_w_norm", "delora_w_norm"),
    ),
    fields=(
        Field("r", "rank", 8, POSITIVE_INT, pattern="rank_pattern"),
        Field("delora_lambda", "boundary", 15, NONZERO, pattern="lambda_pattern"),
    ),
    constants={"module_dropout": 0.0},
    ignored=frozenset({"init_weights"}),
    bias="delora_only",
)
