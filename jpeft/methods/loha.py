"""LoHa: the product, entry by entry, of two low-rank updates (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098).

y = x (W + s (B1 A1) ∘ (B2 A2)) + b        Bi: [in, r], Ai: [r, out], s = alpha / r
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.core.geometry.embedding import Lookup
from jpeft.core.interchange import CONVOLUTION, LINEAR, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families import kernels
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import low_rank
from jpeft.methods.families.lycoris import DROPOUTS, FIELDS, LyCORIS


@dataclass(frozen=True, kw_only=True)
class LoHa(LyCORIS, WeightMethod):
    """Updates of rank up to r² with the parameters of two LoRAs of rank r.

    Attributes:
      rank: r, the rank of each of the two products.
      alpha: numerator of the scale; by default the rank, for a scale of 1.
      effective_conv: whether a convolution's factors B are split over channels and positions of the window, with fewer
        parameters (FedPara's proposition 3; PEFT's ``use_effective_conv2d``).
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site, for i = 1, 2: ``loha_wi_b [in, r]``, ``loha_wi_a [r, out]``. Of a split kernel:
    ``loha_ti_b [channels, r]``, ``loha_ti [positions, r, r]``, ``loha_ti_a [r, out]``.

    >>> import jpeft
    >>> jpeft.methods.LoHa(rank=4, alpha=8, targets=r".*/(query|value)").scale
    2.0
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2108.06098"
    resizable: ClassVar[frozenset[str]] = frozenset({"rank"})
    rescaled: ClassVar[frozenset[str]] = frozenset({"alpha"})
    neutral: ClassVar[float | None] = 0.0
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        f"loha_w{i}_{side}": axes for i in (1, 2) for side, axes in (("b", ("in", None)), ("a", (None, "out")))
    }

    def factors(self, other: LoHa) -> Mapping[str, float]:
        ratio = other.scale / self.scale
        return {"loha_w2_b": ratio, "loha_t2_b": ratio}

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        r, outputs, count, leaves = self.rank, site.outputs, kernels.positions(site), {}
        name, rows, fan_a = ("t", site.channels, outputs) if self.splits(site) else ("w", site.inputs, r)
        for i, key_i in enumerate(jax.random.split(key), start=1):
            key_a, key_b, key_t = jax.random.split(key_i, 3)
            leaves[f"loha_{name}{i}_a"] = kaiming(key_a, (r, outputs), fan_a, self.dtype)
            leaves[f"loha_{name}{i}_b"] = kaiming(key_b, (rows, r), rows, self.dtype)
            if name == "t":
                leaves[f"loha_t{i}"] = kaiming(key_t, (count, r, r), count * r, self.dtype)
        return {**leaves, f"loha_{name}2_b": jnp.zeros((rows, r), self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        b1, a1, b2, a2 = _factors(leaves)
        if isinstance(x, Lookup):  # rows of the table
            one = Lookup(x.ids, None, x.dtype)
            return base(x) + self.scale * ((x @ b1) @ a1) * ((one @ b2) @ a2)
        (rows, r), cols = b1.shape, a1.shape[1]
        if 3 * r**2 * (rows + cols) > rows * cols:
            return super().apply(leaves, base, x)
        # The update is also one product of rank r², of all pairs of columns and all pairs of rows.
        b = (b1[:, :, None] * b2[:, None, :]).reshape(rows, r**2)
        a = (a1[:, None, :] * a2[None, :, :]).reshape(r**2, cols)
        return low_rank(base, x, self.scale * b, a)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        b1, a1, b2, a2 = _factors(leaves)
        return w + self.scale * (b1 @ a1) * (b2 @ a2), b


def _factors(leaves: Leaves) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """B1, A1, B2 and A2."""
    if "loha_t1" in leaves:
        b1, b2 = (kernels.joined(leaves[f"loha_t{i}_b"], leaves[f"loha_t{i}"]) for i in (1, 2))
        return b1.reshape(-1, b1.shape[-1]), leaves["loha_t1_a"], b2.reshape(-1, b2.shape[-1]), leaves["loha_t2_a"]
    return leaves["loha_w1_b"], leaves["loha_w1_a"], leaves["loha_w2_b"], leaves["loha_w2_a"]


def _tensors(i: int) -> tuple[Tensor, ...]:
    rows, core = (kernels.flat_rows_to_tree, kernels.flat_rows_to_torch), (kernels.core_to_tree, kernels.core_to_torch)
    return (
        Tensor(f"hada_w{i}_a", f"loha_w{i}_a", "or->ro", kinds=(LINEAR, CONVOLUTION)),
        Tensor(f"hada_w{i}_b", f"loha_w{i}_b", functions=rows, kinds=(LINEAR, CONVOLUTION)),
        Tensor(f"hada_w{i}_a", f"loha_t{i}_a", kinds=(CONVOLUTION,)),
        Tensor(f"hada_w{i}_b", f"loha_t{i}_b", "rc->cr", kinds=(CONVOLUTION,)),
        Tensor(f"hada_t{i}", f"loha_t{i}", functions=core, kinds=(CONVOLUTION,)),
    )


LoHa.hf = HFSpec(
    peft_type="LOHA",
    tensors=(*_tensors(1), *_tensors(2)),
    fields=FIELDS,
    constants=DROPOUTS,
    ignored=frozenset({"init_weights"}),
)
