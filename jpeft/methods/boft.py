"""BOFT: orthogonal finetuning by a product of butterfly factors (Liu et al. 2023, https://arxiv.org/abs/2311.06243).

y = s ∘ ((x R) W) + b        R = B_m ... B_1, each B_i block-diagonal in an order of its own: R mixes blocks
                             a block of B_i: (I - Q) (I + Q)⁻¹ with Q = (M - Mᵀ) / 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import Rule, is_int
from jpeft.core.geometry.convolution import Patches
from jpeft.core.interchange import CONVOLUTION, FAN_IN_FAN_OUT, LINEAR, Field, HFSpec, Tensor, window
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.families.rotation import BlockRotation, block_fields, cayley, times_butterfly


@dataclass(frozen=True, kw_only=True)
class BOFT(BlockRotation):
    """Rotations of a weight's inputs by sparse factors, and a scale for each output.

    HuggingFace PEFT computes more than one factor only with its CUDA kernel; the folders are the same.

    Attributes:
      block_size: the size of a block; by default 4. It must divide the inputs.
      blocks: the number of blocks, in place of their size.
      factors: m, the number of factors (PEFT's ``boft_n_butterfly_factor``): after m of them, an input reaches
        2^(m - 1) blocks. More than one needs an even block size, and a multiple of 2^(m - 1) blocks.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``boft_m [m, blocks, n, n]``, ``boft_s [out]``.

    >>> import jpeft
    >>> method = jpeft.methods.BOFT(block_size=8, targets=r".*/(query|value)")
    """

    factors: int = 1

    family: ClassVar[str] = "rotation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.06243"
    default_size: ClassVar[int] = 4
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"boft_s": ("out",)}
    per_site: ClassVar[tuple[str, ...]] = (*BlockRotation.per_site, "factors")
    rules: ClassVar[Mapping[str, Rule]] = {"factors": (lambda v: is_int(v) and 0 < v <= 31, "an integer from 1 to 31")}

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        (blocks, n), mixed = self.shape(site), 2 ** (self.factors - 1)
        if self.factors > 1 and (blocks % mixed or n % 2):
            raise ValueError(
                f"BOFT: {self.factors} factors need blocks of an even size, and a multiple of {mixed} of them; "
                f"{site.name!r} has {blocks} of size {n}; set overrides={{{site.name!r}: {{'factors': 1}}}}"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        blocks, n = self.shape(site)
        shape = (self.factors, blocks, n, n)
        return {"boft_m": jnp.zeros(shape, self.dtype), "boft_s": jnp.ones((site.outputs,), self.dtype)}

    def rotation(self, site: Site, leaves: Leaves) -> Leaves:
        m = leaves["boft_m"]
        return {"boft_r": jax.checkpoint(cayley)((m - jnp.swapaxes(m, -1, -2)) / 2)}

    def rotate(self, factors: Leaves, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        r = factors["boft_r"]
        for i in reversed(range(len(r))):
            x = times_butterfly(x, r[i], 2**i)
        return x

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        return {**super().expand(site, shared, leaves), "boft_s": leaves["boft_s"]}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        y = super().apply(leaves, base, x)
        if isinstance(x, Patches):  # computed with the merged weight
            return y
        s = leaves["boft_s"].astype(y.dtype)
        return y * s if base.bias is None else y * s + base.bias * (1 - s)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        w, b = super().merge(leaves, w, b)
        return w * leaves["boft_s"], b


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

BOFT.hf = HFSpec(
    peft_type="BOFT",
    tensors=(
        Tensor("boft_R", "boft_m", kinds=(LINEAR, CONVOLUTION)),
        Tensor(
            "boft_s",
            "boft_s",
            functions=(lambda s, site: s.reshape(-1), lambda s, site: s[None] if window(site) else s[:, None]),
            kinds=(LINEAR, CONVOLUTION),
        ),
    ),
    fields=(
        *block_fields("boft_block_num", "boft_block_size", 4),
        Field("boft_n_butterfly_factor", "factors", 1, BOFT.rules["factors"]),
        FAN_IN_FAN_OUT,
    ),
    constants={"boft_dropout": 0.0},
    ignored=frozenset({"init_weights"}),
    bias="boft_only",
)
