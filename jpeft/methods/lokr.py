"""LoKr: an update that is a Kronecker product (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).

y = x (W + s W1 ⊗ W2) + b        W1: [in1, out1], W2: [in2, out2], in = in1 in2, out = out1 out2, s = alpha / r

Each of W1 and W2 is whole, or a product of rank r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, Rule, is_int, is_positive_int
from jpeft.core.geometry.embedding import Lookup
from jpeft.core.interchange import CONVOLUTION, LINEAR, Field, HFSpec, Tensor, window
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families import kernels
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import added
from jpeft.methods.families.lycoris import DROPOUTS, FIELDS, LyCORIS

_FACTOR: Rule = (
    lambda value: is_positive_int(value) or (is_int(value) and value == -1),
    "a positive integer, or -1 for the square root",
)


@dataclass(frozen=True, kw_only=True)
class LoKr(LyCORIS, WeightMethod):
    """Updates by two small matrices: every entry of the first scales a copy of the second.

    The scale is alpha / r even where neither matrix is a product, as in PEFT.

    Attributes:
      rank: r. W2 is a product where r < max(in2, out2) / 2, otherwise whole.
      alpha: numerator of the scale; by default the rank, for a scale of 1.
      decompose_both: whether W1 too is a product where r < max(in1, out1) / 2.
      decompose_factor: in1 and out1, where it divides in and out; otherwise they are the largest divisors up to it and
        up to the square root. -1 sets no limit but the square root.
      effective_conv: whether W2's first factor, of a convolution, is split over channels and positions of the window
        (PEFT's ``use_effective_conv2d``).
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``lokr_w1 [in1, out1]``, or ``lokr_w1_b [in1, r]`` and ``lokr_w1_a [r, out1]``; the same for W2.
    Of a convolution, in is the number of channels, and ``lokr_w2`` and ``lokr_w2_b`` begin with an axis of positions;
    of a split one, ``lokr_t2_b [in2, r]``, ``lokr_t2 [positions, r, r]`` and ``lokr_t2_a [r, out2]`` make W2.

    >>> import jpeft
    >>> method = jpeft.methods.LoKr(rank=16, decompose_factor=4, targets=r".*/(query|value)")
    """

    decompose_both: bool = False
    decompose_factor: int = -1

    paper: ClassVar[str] = "https://arxiv.org/abs/2309.14859"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 3e-3
    per_site: ClassVar[tuple[str, ...]] = (*LyCORIS.per_site, "decompose_both", "decompose_factor")
    rules: ClassVar[Mapping[str, Rule]] = {
        **LyCORIS.rules, "decompose_both": BOOL, "decompose_factor": _FACTOR
    }  # fmt: skip

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        (in1, in2), (out1, out2) = (factorized(n, self.decompose_factor) for n in (site.channels, site.outputs))
        key1, key2, key3, key4 = jax.random.split(key, 4)
        r, dtype, count = self.rank, self.dtype, kernels.positions(site)
        if self.decompose_both and r < max(in1, out1) / 2:
            leaves = {"lokr_w1_b": kaiming(key1, (in1, r), in1, dtype), "lokr_w1_a": jnp.zeros((r, out1), dtype)}
        else:
            leaves = {"lokr_w1": jnp.zeros((in1, out1), dtype)}
        count_axis = (count,) if window(site) else ()
        if r >= max(in2, out2) / 2:
            return {**leaves, "lokr_w2": kaiming(key2, (*count_axis, in2, out2), in2 * count, dtype)}
        if not self.splits(site):
            return {
                **leaves,
                "lokr_w2_b": kaiming(key2, (*count_axis, in2, r), in2 * count, dtype),
                "lokr_w2_a": kaiming(key3, (r, out2), r, dtype),
            }
        return {
            **leaves,
            "lokr_t2_b": kaiming(key2, (in2, r), in2, dtype),
            "lokr_t2": kaiming(key4, (count, r, r), count * r, dtype),
            "lokr_t2_a": kaiming(key3, (r, out2), out2, dtype),
        }

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if not isinstance(x, jax.Array | Lookup):  # a convolution
            return super().apply(leaves, base, x)
        (in1, out1), (in2, out2) = ((w[0].shape[0], w[-1].shape[1]) for w in (_factors(leaves, 1), _factors(leaves, 2)))
        sides = in1 * in2, out1 * out2
        return added(base, x, leaves, self._times, self._update, sides, recompute=False)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return w + self._update(leaves), b

    def _update(self, leaves: Leaves) -> Float[Array, "in out"]:
        update = jnp.einsum("ac,...bd->...abcd", *(_product(_factors(leaves, i)) for i in (1, 2)))
        return self.scale * update.reshape(-1, update.shape[-2] * update.shape[-1])

    def _times(self, x: Any, leaves: Leaves) -> Float[Array, "*tokens out"]:
        """``x`` times the update, by its factors."""
        w1, (first, *rest) = _factors(leaves, 1), _factors(leaves, 2)
        if isinstance(x, Lookup):  # row id of the product: row id // in2 of W1 by row id % in2 of W2
            in2 = first.shape[0]
            rows1 = _product([Lookup(x.ids // in2, x.weight, x.dtype), *w1])
            rows2 = _product([Lookup(x.ids % in2, None, x.dtype), first, *rest])
            return self.scale * (rows1[..., :, None] * rows2[..., None, :]).reshape(*x.ids.shape, -1)
        z = x.reshape(*x.shape[:-1], -1, first.shape[0]) @ first  # [in1, r], if W2 is a product of rank r
        z = jnp.swapaxes(_product([jnp.swapaxes(z, -1, -2), *w1]), -1, -2)  # [out1, r]
        return _product([self.scale * z, *rest]).reshape(*x.shape[:-1], -1)


def factorized(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is ``size``, the first as `LoKr.decompose_factor` says.

    >>> factorized(768), factorized(768, 4), factorized(127)
    ((24, 32), (4, 192), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(n for n in range(1, limit + 1) if size % n == 0)
    return first, size // first


def _factors(leaves: Leaves, i: int) -> list[jax.Array]:
    """The matrices whose product is Wi: itself, or two."""
    if f"lokr_w{i}" in leaves:
        return [leaves[f"lokr_w{i}"]]
    if f"lokr_t{i}" in leaves:
        return [kernels.joined(leaves[f"lokr_t{i}_b"], leaves[f"lokr_t{i}"]), leaves[f"lokr_t{i}_a"]]
    return [leaves[f"lokr_w{i}_b"], leaves[f"lokr_w{i}_a"]]


def _product(matrices: list[Any]) -> jax.Array:
    return functools.reduce(lambda x, w: x @ w, matrices)


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------


def _to_torch(w: np.ndarray, site: Site) -> np.ndarray:
    """``[out, in]`` of a matrix, ``[out, channels, window...]`` of a kernel."""
    return kernels.rows_to_torch(w, site)


def _to_tree(w: np.ndarray, site: Site) -> np.ndarray:
    w = np.moveaxis(w, (0, 1), (-1, -2))
    return w.reshape(-1, *w.shape[-2:]) if window(site) else w


def _whole_to_torch(w2: np.ndarray, site: Site) -> np.ndarray:
    if len(window(site)) == 1:
        raise ValueError(
            f"{site.name!r} is a 1-D convolution with a whole W2, for which PEFT computes W2 ⊗ W1 instead of W1 ⊗ W2; "
            "set a smaller rank there, or save it with jpeft.save"
        )
    return _to_torch(w2, site)


def _flat_to_torch(b: np.ndarray, site: Site) -> np.ndarray:
    return _to_torch(b, site).reshape(b.shape[-1], -1)


def _flat_to_tree(b: np.ndarray, site: Site) -> np.ndarray:
    return _to_tree(b.reshape(b.shape[0], -1, *window(site)), site)


_ALL = (LINEAR, CONVOLUTION)
LoKr.hf = HFSpec(
    peft_type="LOKR",
    tensors=(
        Tensor("lokr_w1", "lokr_w1", "oi->io", kinds=_ALL),
        Tensor("lokr_w1_a", "lokr_w1_a", "or->ro", kinds=_ALL),
        Tensor("lokr_w1_b", "lokr_w1_b", "ri->ir", kinds=_ALL),
        Tensor("lokr_w2", "lokr_w2", functions=(_to_tree, _whole_to_torch), kinds=_ALL),
        Tensor("lokr_w2_a", "lokr_w2_a", "or->ro", kinds=_ALL),
        Tensor("lokr_w2_b", "lokr_w2_b", functions=(_flat_to_tree, _flat_to_torch), kinds=_ALL),
        Tensor("lokr_w2_a", "lokr_t2_a", kinds=(CONVOLUTION,)),
        Tensor("lokr_w2_b", "lokr_t2_b", "ri->ir", kinds=(CONVOLUTION,)),
        Tensor("lokr_t2", "lokr_t2", functions=(kernels.core_to_tree, kernels.core_to_torch), kinds=(CONVOLUTION,)),
    ),
    fields=(
        *FIELDS,
        Field("decompose_both", "decompose_both", False, BOOL),
        Field("decompose_factor", "decompose_factor", -1, _FACTOR),
    ),
    constants=DROPOUTS,
    ignored=frozenset({"init_weights", "rank_dropout_scale"}),
)
