"""BEFT: trained biases of chosen modules (Huang et al. 2025, https://arxiv.org/abs/2509.15974).

y = x W + b + d        d: [out]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.core.interchange import HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import FUSED, Site
from jpeft.methods.base import WeightMethod


@dataclass(frozen=True, kw_only=True)
class BEFT(WeightMethod):
    """A bias added to a module's outputs, also where it has none. Then it cannot be merged.

    Its authors, and HuggingFace PEFT, train the biases of the value projections alone.

    Attributes:
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`.

    Leaves at a site: ``beft_bias [out]``.

    >>> import jpeft
    >>> method = jpeft.methods.BEFT(targets=r".*/(value|v_proj)")
    """

    dtype: Any = "float32"

    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.15974"
    learning_rate: ClassVar[float] = 2e-3
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"beft_bias": ("out",)}
    per_site: ClassVar[tuple[str, ...]] = ("dtype", "parts")

    def mergeable(self, site: Site) -> bool:
        return site.bias

    def prepare(self, site: Site) -> Site:
        if site.lookup:
            raise ValueError(f"BEFT: {site.name!r} is an embedding, whose rows have no bias; target linear layers")
        if site.via != FUSED and not site.bias:
            raise ValueError(
                f"BEFT: {site.name!r} has no bias and is reached only as a weight (path taken: {site.via}): there is "
                f"no output to add one to; leave it out with exclude=[{site.name!r}]"
            )
        return super().prepare(site)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return {"beft_bias": jnp.zeros((site.outputs,), self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        y = base(x)
        return y + leaves["beft_bias"].astype(y.dtype)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return w, None if b is None else b + leaves["beft_bias"]


BEFT.hf = HFSpec(
    peft_type="BEFT",
    tensors=(Tensor("beft_bias", "beft_bias", functions=(lambda x, site: x[0], lambda x, site: x[None])),),
    ignored=frozenset({"init_weights"}),
)
