"""MiSS: matrix shard sharing; its first form was called Bone (Kang and Yin 2024, https://arxiv.org/abs/2409.15371).

The inputs are cut into groups of r, of which the last may be shorter; for "bat" the outputs too.

"miss"   y = x W + b + (sum of the groups of x) D        D: [r, out]
"mini"   the same, where D is a matrix [r, m], repeated out / m times
"bat"    W'[g, n] = W[g, n] + D[n] W[g, n] + D[n]        D[n]: [r, r], for group g of inputs and group n of outputs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import POSITIVE_INT, RATE, Rule, one_of
from jpeft.core.geometry.embedding import Lookup
from jpeft.core.interchange import Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.low_rank import added

_LEAVES = {"miss": "miss_block", "mini": "miss_mini", "bat": "miss_bat"}


@dataclass(frozen=True, kw_only=True)
class MiSS(WeightMethod):
    """Updates whose rows repeat: all groups of inputs share one small matrix.

    Attributes:
      rank: r, the size of a group.
      variant: "miss", "mini" (fewer parameters) or "bat" (an update that depends on the weight; r must divide both
        sizes). PEFT's ``init_weights``.
      mini_rank: m, for "mini"; it must divide the outputs.
      dropout: rate on the adapter's input, while the caller trains; not for "bat".
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site, zeros at first: ``miss_block [r, out]``, ``miss_mini [r, m]`` or ``miss_bat [out / r, r, r]``.

    >>> import jpeft
    >>> method = jpeft.methods.MiSS(rank=16, targets=r".*/(query|value)")
    """

    rank: int = 64
    variant: str = "miss"
    mini_rank: int = 1
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.15371"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 1e-4
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"miss_block": (None, "out")}
    per_site: ClassVar[tuple[str, ...]] = ("rank", "variant", "mini_rank", "dropout", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "mini_rank": POSITIVE_INT, "variant": one_of(tuple(_LEAVES)), "dropout": RATE
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "bat" and self.dropout:
            raise ValueError(f"MiSS: variant 'bat' changes the weight and drops no inputs; got dropout={self.dropout}")

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        sizes, r, m = f"{site.name!r} is {site.inputs} x {site.outputs}", self.rank, self.mini_rank
        if r > site.inputs:
            raise ValueError(f"MiSS: {sizes}, but rank is {r}; it can be at most the number of inputs")
        if self.variant == "bat" and (site.inputs % r or site.outputs % r):
            raise ValueError(f"MiSS: {sizes}; for variant 'bat', rank must divide both, and is {r}")
        if self.variant == "mini" and site.outputs % m:
            raise ValueError(f"MiSS: {sizes}; mini_rank must divide the outputs, and is {m}")
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        r, name = self.rank, _LEAVES[self.variant]
        shapes = {"miss": (r, site.outputs), "mini": (r, self.mini_rank), "bat": (site.outputs // r, r, r)}
        return {name: jnp.zeros(shapes[self.variant], self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if self.variant == "bat":
            return super().apply(leaves, base, x)
        sides, d = jax.eval_shape(lambda: base.weight).shape, leaves[_LEAVES[self.variant]]
        form, change = partial(self._times, sides), partial(self._update, sides)
        return added(base, x, d, form, change, sides, dropout=self.dropout, recompute=False)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        d, r = leaves[_LEAVES[self.variant]], self.rank
        if self.variant != "bat":
            return w + self._update(w.shape, d), b
        blocks = w.reshape(w.shape[0] // r, r, w.shape[1] // r, r)
        update = jnp.einsum("nij,gjno->gino", d, blocks) + jnp.swapaxes(d, 0, 1)
        return w + update.reshape(w.shape), b

    def _times(self, sides: Sequence[int], x: Any, d: Float[Array, "rank m"]) -> Float[Array, "*tokens out"]:
        """``x`` times the update, by the sums of its groups."""
        r = self.rank
        if isinstance(x, jax.Array):
            padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % r)])
            y = padded.reshape(*x.shape[:-1], -1, r).sum(-2) @ d
        elif isinstance(x, Lookup):
            ids = jnp.where(x.ids < 0, x.ids + sides[0], x.ids)  # as jnp.take counts them
            y = Lookup(ids % r, x.weight, x.dtype) @ d
        else:  # windows: the sums are a product with identity matrices, one below the other
            y = (x @ jnp.eye(r, dtype=x.dtype)[jnp.arange(sides[0]) % r]) @ d
        return jnp.tile(y, sides[1] // d.shape[1])

    def _update(self, sides: Sequence[int], d: Float[Array, "rank m"]) -> Float[Array, "in out"]:
        return jnp.tile(d[jnp.arange(sides[0]) % self.rank], sides[1] // d.shape[1])


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------


def _read_variant(init: bool | str, site: Site | None) -> str:
    return init if isinstance(init, str) else "miss"


def _write_variant(method: MiSS, site: Site, config: Mapping[str, Any]) -> bool | str:
    return True if method.variant == "miss" else method.variant


MiSS.hf = HFSpec(
    peft_type="MISS",
    tensors=(
        Tensor("miss_block", "miss_block"),
        Tensor("miss_block", "miss_mini"),
        Tensor("miss_block", "miss_bat", "noi->nio"),
    ),
    fields=(
        Field("r", "rank", 64, POSITIVE_INT),
        Field("mini_r", "mini_rank", 1, POSITIVE_INT),
        dropout_field("miss_dropout"),
        Field(
            "init_weights",
            "variant",
            True,
            (
                lambda v: isinstance(v, bool) or one_of(("bat", "mini"))[0](v),
                "true, false, 'bat' or 'mini'",
            ),
            read=_read_variant,
            write=_write_variant,
        ),
    ),
    bias="MiSS_only",
)
