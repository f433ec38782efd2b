"""HRA: Householder reflection adaptation (Yuan et al. 2024, https://arxiv.org/abs/2405.17484).

y = (x R) W + b        R = H_r ... H_1, H_i = I - 2 u_i u_iᵀ / |u_i|², U: [in, r]
                       R = I - U T Uᵀ with a triangular T, the product's WY form: no reflection is applied alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, POSITIVE_INT, Rule
from jpeft.core.geometry.convolution import Patches
from jpeft.core.interchange import CONVOLUTION, LINEAR, Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.families import kernels
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import low_rank, narrow
from jpeft.methods.families.rotation import Rotation, reflections


@dataclass(frozen=True, kw_only=True)
class HRA(Rotation):
    """Reflections of a weight's inputs: a rotation of low rank.

    Attributes:
      rank: r, the number of reflections. Equal ones undo each other: a fresh adapter of even rank changes nothing.
      orthogonal: whether the vectors are made orthogonal to each other first (PEFT's ``apply_GS``). No such product is
        the identity, so a fresh adapter changes the model. PEFT starts it from equal vectors, of which Gram-Schmidt
        makes noise or NaN; here they are all different.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``hra_u [in, r]``; at an embedding, whose features are rotated, ``hra_u [features, r]``.

    >>> import jpeft
    >>> method = jpeft.methods.HRA(rank=4, targets=r".*/(query|value)")
    """

    rank: int = 8
    orthogonal: bool = False
    dtype: Any = "float32"

    family: ClassVar[str] = "rotation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.17484"
    per_site: ClassVar[tuple[str, ...]] = ("rank", "orthogonal", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"rank": POSITIVE_INT, "orthogonal": BOOL}

    @property
    def identity_at_init(self) -> bool:
        """False for an odd number of reflections, or for orthogonal ones."""
        return self.rank % 2 == 0 and not self.orthogonal

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        if self.orthogonal and self.rank > self.size(site):
            raise ValueError(
                f"HRA: {site.name!r} has {self.size(site)} inputs, which hold no {self.rank} orthogonal vectors; set "
                f"overrides={{{site.name!r}: {{'rank': {self.size(site)}}}}}"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        pairs = 2 if self.identity_at_init else 1
        count = self.rank // pairs
        return {"hra_u": jnp.repeat(kaiming(key, (self.size(site), count), count, self.dtype), pairs, axis=1)}

    def rotation(self, site: Site, leaves: Leaves) -> Leaves:
        a, b = reflections(leaves["hra_u"], self.orthogonal)
        return {"hra_a": a, "hra_b": b}

    def rotate(self, factors: Leaves, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return x - narrow(x, factors["hra_a"]) @ factors["hra_b"]

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if isinstance(x, Patches):  # x W - (x A) (B W)
            return low_rank(base, x, leaves["hra_a"], -leaves["hra_b"] @ base.weight)
        return super().apply(leaves, base, x)


HRA.hf = HFSpec(
    peft_type="HRA",
    tensors=(
        Tensor(
            "hra_u",
            "hra_u",
            functions=(
                lambda u, site: kernels.flat_rows_to_tree(u.T, site),
                lambda u, site: kernels.flat_rows_to_torch(u, site).T,
            ),
            kinds=(LINEAR, CONVOLUTION),
        ),
    ),
    fields=(Field("r", "rank", 8, POSITIVE_INT), Field("apply_GS", "orthogonal", False, BOOL)),
    ignored=frozenset({"init_weights"}),
    bias="hra_only",
)
