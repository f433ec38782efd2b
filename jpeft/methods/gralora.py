"""GraLoRA: a LoRA for every block of the weight (Jung et al. 2025, https://arxiv.org/abs/2505.20355).

The inputs and the outputs are cut into k parts, the rank r into k shares. Block (i, j), from part i of the inputs to
part j of the outputs:

W'[i, j] = W[i, j] + s A[i][:, share j] B[j][share i, :]        A[i]: [in / k, r], B[j]: [r, out / k]

With a hybrid rank h, plus s A B of rank h over the whole weight. s = alpha / (r + h).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import NONZERO, POSITIVE_INT, RATE, Rule, is_int
from jpeft.core.interchange import FAN_IN_FAN_OUT, Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import added

_NOT_NEGATIVE: Rule = (lambda value: is_int(value) and 0 <= value < 2**31, "an integer, 0 or more")


@dataclass(frozen=True, kw_only=True)
class GraLoRA(WeightMethod):
    """Updates of rank up to k r, with the parameters and the products of a LoRA of rank r.

    Attributes:
      rank: r, divisible by k.
      alpha: numerator of the scale.
      blocks: k, which must divide the inputs and the outputs (PEFT's ``gralora_k``). Its authors take 2 up to rank 32,
        and 4 from rank 64.
      hybrid_rank: h, the rank of a plain LoRA beside (PEFT's ``hybrid_r``).
      dropout: rate on the adapter's input, while the caller trains.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``gralora_a [k, in / k, r]``, ``gralora_b [k, r, out / k]``; with a hybrid rank
    ``gralora_whole_a [in, h]``, ``gralora_whole_b [h, out]``.

    >>> import jpeft
    >>> jpeft.methods.GraLoRA(rank=16, hybrid_rank=16, targets=r".*/(query|value)").scale
    2.0
    """

    rank: int = 32
    alpha: float = 64.0
    blocks: int = 2
    hybrid_rank: int = 0
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.20355"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 2e-4
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "gralora_whole_a": ("in", None), "gralora_whole_b": (None, "out"),
    }  # fmt: skip
    per_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "blocks", "hybrid_rank", "dropout", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "blocks": POSITIVE_INT, "hybrid_rank": _NOT_NEGATIVE, "alpha": NONZERO, "dropout": RATE
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.blocks:
            raise ValueError(f"GraLoRA: rank must be divisible by blocks, got {self.rank} and {self.blocks}")

    @property
    def scale(self) -> float:
        """s, the factor on the update."""
        return self.alpha / (self.rank + self.hybrid_rank)

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        if site.inputs % self.blocks or site.outputs % self.blocks:
            raise ValueError(
                f"GraLoRA: {site.name!r} is {site.inputs} x {site.outputs}; blocks must divide both, "
                f"and is {self.blocks}"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_a, key_whole = jax.random.split(key)
        k, r, h, inputs, outputs = self.blocks, self.rank, self.hybrid_rank, site.inputs, site.outputs
        a = kaiming(key_a, (k, inputs // k, r), inputs // k, self.dtype)
        leaves = {"gralora_a": a, "gralora_b": jnp.zeros((k, r, outputs // k), self.dtype)}
        if h:
            leaves["gralora_whole_a"] = kaiming(key_whole, (inputs, h), inputs, self.dtype)
            leaves["gralora_whole_b"] = jnp.zeros((h, outputs), self.dtype)
        return leaves

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        sides = self.blocks * leaves["gralora_a"].shape[1], self.blocks * leaves["gralora_b"].shape[2]
        return added(base, x, leaves, self._times, self._update, sides, dropout=self.dropout, recompute=False)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return w + self._update(leaves), b

    def _times(self, x: Any, leaves: Leaves) -> Float[Array, "*tokens out"]:
        """``x`` times the update, by its factors."""
        a, b, k = leaves["gralora_a"], leaves["gralora_b"], self.blocks
        if isinstance(x, jax.Array):
            h = jnp.stack([part @ a[i] for i, part in enumerate(jnp.split(x, k, axis=-1))], axis=-2)
        else:  # ids or windows, which multiply whole matrices only: here that with the blocks A along its diagonal
            h = x @ jnp.einsum("ipr,ij->ipjr", a, jnp.eye(k, dtype=a.dtype)).reshape(-1, k * self.rank)
            h = h.reshape(*h.shape[:-1], k, -1)
        # From the shares of each part of the inputs to those of each part of the outputs.
        h = self.scale * jnp.swapaxes(h.reshape(*h.shape[:-1], k, -1), -2, -3).reshape(h.shape)
        y = jnp.concatenate([h[..., j, :] @ b[j] for j in range(k)], axis=-1)
        if self.hybrid_rank:
            y += (self.scale * (x @ leaves["gralora_whole_a"])) @ leaves["gralora_whole_b"]
        return y

    def _update(self, leaves: Leaves) -> Float[Array, "in out"]:
        a, b, k, share = leaves["gralora_a"], leaves["gralora_b"], self.blocks, self.rank // self.blocks
        blocks = jnp.einsum("ipjq,jiqo->ipjo", a.reshape(k, -1, k, share), b.reshape(k, k, share, -1))
        update = blocks.reshape(k * a.shape[1], -1)
        if self.hybrid_rank:
            update += leaves["gralora_whole_a"] @ leaves["gralora_whole_b"]
        return self.scale * update


GraLoRA.hf = HFSpec(
    peft_type="GRALORA",
    tensors=(
        Tensor("gralora_A", "gralora_a"),
        Tensor("gralora_B", "gralora_b"),
        Tensor("gralora_A_general.weight", "gralora_whole_a", "ri->ir"),
        Tensor("gralora_B_general.weight", "gralora_whole_b", "or->ro"),
    ),
    fields=(
        Field("r", "rank", 32, POSITIVE_INT),
        Field("alpha", "alpha", 64, NONZERO),
        Field("gralora_k", "blocks", 2, POSITIVE_INT),
        Field("hybrid_r", "hybrid_rank", 0, _NOT_NEGATIVE),
        dropout_field("gralora_dropout"),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_weights"}),
    bias="gralora_only",
)
