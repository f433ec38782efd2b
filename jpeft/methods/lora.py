"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

y = x W + s (x A) B        A: [in, r], B: [r, out], s = alpha / r, or alpha / sqrt(r) for rsLoRA (2312.03732)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import BOX, MERGE, Site
from jpeft.methods.base import POSITIVE_INT, RATE, WeightMethod, check_fields, dtype_name, normal
from jpeft.methods.families.low_rank import low_rank

_INITS = ("kaiming", "gaussian", "orthogonal", "random")


@dataclass(frozen=True, kw_only=True)
class LoRA(WeightMethod):
    """Low-rank updates of weights.

    Attributes:
      rank: r. alpha: numerator of the scale; by default the rank, i.e. scale 1. ``rslora``: scale alpha / sqrt(r).
      dropout: rate on the adapter's input, while the caller trains.
      init_weights: "kaiming" (A uniform in ±1/sqrt(in), B zero: HuggingFace's default), "gaussian" (A normal, std 1/r),
        "orthogonal" (A and B on orthogonal subspaces, so that A B = 0; even r), "random" (A as kaiming and B
        not zero: the model changes at once). Embedding tables take A = 0 and B normal.
      dtype: of the leaves; they are cast to the activation's dtype once.
      targets, exclude, overrides: see `Method`; every other field may differ per site.

    Leaves at a site: ``lora_a [in, r]``, ``lora_b [r, out]``.

    >>> import jpeft
    >>> jpeft.LoRA(rank=8, alpha=16, targets=r".*/(query|value)").scale
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    init_weights: str = "kaiming"
    dtype: Any = "float32"

    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"lora_a": ("in", None), "lora_b": (None, "out")}
    per_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rslora", "dropout", "init_weights", "dtype", "parts")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        rules = {
            "rank": POSITIVE_INT,
            "parts": POSITIVE_INT,
            "dropout": RATE,
            "alpha": (lambda v: v is None or math.isfinite(v), "a finite number"),
            "init_weights": (lambda v: v in _INITS, f"one of {', '.join(_INITS)}"),
        }
        check_fields(self, rules)
        if self.alpha == 0:
            raise ValueError("LoRA.alpha is 0: the update would be 0 whatever it learns; None is scale 1")
        if self.init_weights == "orthogonal" and self.rank % 2:
            raise ValueError(f"LoRA: orthogonal initialization needs an even rank, got {self.rank}")
        super().__post_init__()

    @property
    def scale(self) -> float:
        """s, the factor on A B."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def input_dropout(self) -> float:
        """The rate ``dropout``."""
        return self.dropout

    def columns(self) -> Mapping[str, str]:
        """The rank."""
        return {"rank": str(self.rank)}

    def prepare(self, site: Site) -> Site:
        if self.dropout and site.via in (BOX, MERGE):
            raise ValueError(
                f"LoRA: dropout acts on a module's input, but {site.name!r} is reached only as a weight (path taken: "
                f"{site.via}); set overrides={{{site.name!r}: {{'dropout': 0.0}}}}"
            )
        return super().prepare(site)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_a, key_b = jax.random.split(key)
        shape_a, shape_b = (site.inputs, self.rank), (self.rank, site.outputs)
        zeros_b = jnp.zeros(shape_b, self.dtype)
        # torch's kaiming_uniform with a = sqrt(5) is uniform in ±1/sqrt(fan_in).
        bound = 1 / math.sqrt(site.inputs)
        kaiming = jax.random.uniform(key_a, shape_a, jnp.float32, -bound, bound).astype(self.dtype)
        if site.lookup and self.init_weights != "random":
            return {"lora_a": jnp.zeros(shape_a, self.dtype), "lora_b": normal(key_b, shape_b, 1.0, self.dtype)}
        if self.init_weights == "orthogonal":
            return self._orthogonal(key_a, key_b, site)
        if self.init_weights == "gaussian":
            return {"lora_a": normal(key_a, shape_a, 1 / self.rank, self.dtype), "lora_b": zeros_b}
        if self.init_weights == "random":
            bound = 1 / math.sqrt(self.rank)
            b = jax.random.uniform(key_b, shape_b, jnp.float32, -bound, bound).astype(self.dtype)
            return {"lora_a": kaiming, "lora_b": b}
        return {"lora_a": kaiming, "lora_b": zeros_b}

    def _orthogonal(self, key_a: Key[Array, ""], key_b: Key[Array, ""], site: Site) -> Leaves:
        # Rows of one orthogonal Q are shared out: A lives on the odd ones, B on the even, hence A B = 0.
        key_q, key_a = jax.random.split(key_a)
        q, _ = jnp.linalg.qr(jax.random.normal(key_q, (self.rank, self.rank), jnp.float32))
        half = self.rank // 2
        a = jax.random.normal(key_a, (site.inputs, half), jnp.float32) @ q[0::2] / 10
        b = q[1::2].T @ jax.random.normal(key_b, (half, site.outputs), jnp.float32) / 10
        return {"lora_a": a.astype(self.dtype), "lora_b": b.astype(self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        # y = x W + s (x A) B
        return low_rank(base, x, self.scale * leaves["lora_a"], leaves["lora_b"], self.dropout)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
        # W' = W + s A B
        return w + self.scale * (leaves["lora_a"] @ leaves["lora_b"])
