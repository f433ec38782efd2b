"""OFT: orthogonal finetuning (Qiu et al. 2023, https://arxiv.org/abs/2306.07280; OFTv2, Qiu et al. 2025,
https://arxiv.org/abs/2506.19847).

y = (x R) W + b        R: block-diagonal, each block a rotation from a skew-symmetric Q
R = I + 2 Q + 2 Q² + 2 Q³ + Q⁴ ≈ (I + Q) (I - Q)⁻¹, or R = (I - Q) (I + Q)⁻¹ if ``exact``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, Rule, is_int, is_number
from jpeft.core.interchange import CONVOLUTION, EMBEDDING, FAN_IN_FAN_OUT, LINEAR, Field, HFSpec, Tensor, window
from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.methods.families.rotation import BlockRotation, block_fields, cayley, neumann, skew, times_blocks

_TERMS: Rule = (lambda value: is_int(value) and 2 <= value <= 100, "an integer from 2 to 100")
_LENGTH: Rule = (lambda value: is_number(value) and value > 0, "a positive number")


@dataclass(frozen=True, kw_only=True)
class OFT(BlockRotation):
    """Rotations of a weight's inputs, block by block.

    The two forms of R turn in opposite directions, as in HuggingFace PEFT: an adapter trained with one is another
    function with the other. PEFT's convolutions with a window of more than one position add up overlapping windows, so
    that they are no change of a weight; here R W replaces the kernel's matrix, as where PEFT merges.

    Attributes:
      block_size: the size of a block; by default 32. It must divide the inputs.
      blocks: the number of blocks, in place of their size (PEFT's ``r``).
      share: whether all blocks of a weight are the same (PEFT's ``block_share``).
      exact: whether R is exactly orthogonal, by a solve (``use_cayley_neumann=False``), or the sum of a series.
      terms: the number of terms of the series, as PEFT counts them (``num_cayley_neumann_terms``).
      coft: whether Q is kept near 0: one whose norm, relative to 1 / sqrt(blocks), is above ``eps`` acts as if it were
        cut to that length. PEFT also cuts what it stores, at each call.
      eps: the largest norm for ``coft``.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``oft_q [blocks, n (n - 1) / 2]``, the part of each Q above its diagonal; with ``share`` one row.

    >>> import jpeft
    >>> method = jpeft.methods.OFT(block_size=16, targets=r".*/(query|value)")
    """

    share: bool = False
    exact: bool = False
    terms: int = 5
    coft: bool = False
    eps: float = 6e-5

    family: ClassVar[str] = "rotation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07280"
    per_site: ClassVar[tuple[str, ...]] = (*BlockRotation.per_site, "share", "exact", "terms", "coft", "eps")
    rules: ClassVar[Mapping[str, Rule]] = {
        "share": BOOL,
        "exact": BOOL,
        "terms": _TERMS,
        "coft": BOOL,
        "eps": _LENGTH,
    }

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        blocks, n = self.shape(site)
        return {"oft_q": jnp.zeros((1 if self.share else blocks, n * (n - 1) // 2), self.dtype)}

    def rotation(self, site: Site, leaves: Leaves) -> Leaves:
        n = self.shape(site)[1]
        # Checkpointed: the backward pass computes the powers of Q again.
        return {"oft_r": jax.checkpoint(lambda q: self._rotations(q, n))(leaves["oft_q"])}

    def _rotations(self, q: Float[Array, "blocks entries"], n: int) -> Float[Array, "blocks n n"]:
        if self.coft:
            length = math.sqrt(2 * len(q)) * jnp.linalg.norm(jax.lax.stop_gradient(q), axis=-1, keepdims=True)
            cut = q * jnp.minimum(1, self.eps / jnp.maximum(length, jnp.finfo(q.dtype).tiny))
            q = q + jax.lax.stop_gradient(cut - q)
        skewed = skew(q, n)
        return cayley(skewed) if self.exact else neumann(skewed, self.terms)

    def rotate(self, factors: Leaves, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return times_blocks(x, factors["oft_r"])


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------


def _divisor(size: int, given: int) -> int:
    """The divisor that PEFT takes for a block size, or number of blocks, that does not divide the inputs."""
    if given >= size:
        return size
    lower = next(n for n in range(given, 0, -1) if size % n == 0)
    higher = next(n for n in range(given, size + 1) if size % n == 0)
    return lower if given - lower <= higher - given else higher


def _checked(q: np.ndarray, site: Site) -> np.ndarray:
    if max(window(site), default=1) > 1:
        raise ValueError(
            f"OFT at {site.name!r}: PEFT's convolution with a window of {'×'.join(map(str, window(site)))} adds up "
            "overlapping windows, which no weight of the model does; merge the adapter in the tool that wrote it"
        )
    return q


OFT.hf = HFSpec(
    peft_type="OFT",
    tensors=(
        Tensor("oft_R.weight", "oft_q", functions=(_checked, _checked), kinds=(LINEAR, CONVOLUTION)),
        Tensor("oft_embedding_R.weight", "oft_q", kinds=(EMBEDDING,)),
    ),
    fields=(
        *block_fields("r", "oft_block_size", 32, _divisor),
        Field("block_share", "share", False, BOOL),
        Field(
            "use_cayley_neumann",
            "exact",
            True,
            BOOL,
            read=lambda neumann, site: not neumann,
            write=lambda method, site, config: not method.exact,
        ),
        Field("num_cayley_neumann_terms", "terms", 5, _TERMS),
        Field("coft", "coft", False, BOOL),
        Field("eps", "eps", 6e-5, _LENGTH),
        FAN_IN_FAN_OUT,
    ),
    constants={"module_dropout": 0.0},
    ignored=frozenset({"init_weights"}),
    bias="oft_only",
)
