"""SHiRA: sparse updates of high rank (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175).

y = x (W + D) + b        D: zero but for r (in + out) trained entries, at positions that do not change
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jpeft.checks import POSITIVE_INT, Rule, one_of, or_none
from jpeft.core.interchange import FAN_IN_FAN_OUT, Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear, widened
from jpeft.core.sites import Site
from jpeft.core.statistics import LowRank
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.torch_random import SEED, randperm

_FEW = 8  # up to this number of tokens, as in decoding, adding each entry's product is less than a copy of the weight
_MASKS = ("random", "magnitude", "gradient", "snip")


@dataclass(frozen=True, kw_only=True)
class SHiRA(WeightMethod):
    """Trains some entries of each weight, as many as a LoRA of the same rank has parameters.

    Attributes:
      rank: r, which says how many entries are trained: r (in + out). It does not limit the update's rank.
      mask: the entries: "random", or those of the largest weight ("magnitude"), gradient ("gradient") or product of the
        two ("snip"). The last two start from statistics, see `jpeft.observe`.
      seed: of a random mask; it gives HuggingFace PEFT's for the same ``random_seed``, equal in all weights of one
        shape, and is saved in its place. By default the mask is drawn with the key that starts the adapter.
      dtype: dtype of the values.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site, for n entries: ``shira_values [n]``, zero at first, and ``shira_indices [2, n]``, their inputs and
    outputs, which never train.

    >>> import jpeft
    >>> method = jpeft.methods.SHiRA(rank=8, targets=r".*/(query|value)")
    """

    rank: int = 32
    mask: str = "random"
    seed: int | None = None
    dtype: Any = "float32"

    family: ClassVar[str] = "sparse"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.13175"
    inert: ClassVar[frozenset[str]] = WeightMethod.inert | {"mask", "seed"}
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 3e-4
    non_trainable: ClassVar[frozenset[str]] = frozenset({"shira_indices"})
    per_site: ClassVar[tuple[str, ...]] = ("rank", "mask", "seed", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"rank": POSITIVE_INT, "mask": one_of(_MASKS), "seed": or_none(SEED)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None and self.mask != "random":
            raise ValueError(f"SHiRA: seed {self.seed} has no effect on mask={self.mask!r}; leave one of them out")

    @property
    def regenerated(self) -> frozenset[str]:
        """The positions, where a seed gives them."""
        return self.non_trainable if self.seed is not None else frozenset()

    @property
    def observes(self) -> str | None:
        """The statistic that the mask depends on."""
        return "gradient" if self.mask in ("gradient", "snip") else None

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        count, size = self.count(site), site.inputs * site.outputs
        if not count <= size < 2**31:
            raise ValueError(
                f"SHiRA: rank {self.rank} trains {count} entries of {site.name!r}, which has {size} ({site.inputs} "
                f"inputs x {site.outputs} outputs); it can be at most {size // (site.inputs + site.outputs)}, for a "
                "weight of less than 2³¹ entries"
            )
        return site

    def count(self, site: Site) -> int:
        """The number of trained entries."""
        return self.rank * (site.inputs + site.outputs)

    def init(self, key: Key[Array, ""], site: Site, w: Any, statistics: Any = None) -> Leaves:
        columns, rows = jnp.divmod(self._entries(key, site, w, statistics), site.inputs)
        indices = jnp.stack([rows, columns]).astype(jnp.int32)
        return {"shira_values": jnp.zeros((self.count(site),), self.dtype), "shira_indices": indices}

    def _entries(self, key: Key[Array, ""], site: Site, w: Any, statistics: Any) -> Int[Array, " n"]:
        """The trained entries of Wᵀ, which is torch's weight, in the order in which it lies in memory."""
        count, size = self.count(site), site.inputs * site.outputs
        if self.seed is not None:
            return jnp.asarray(np.sort(randperm(size, count, self.seed)), jnp.int32)
        if self.mask == "random":  # one in each of equal stretches, as a permutation of a weight would take its size
            starts = np.arange(count + 1) * size // count
            return jax.random.randint(key, (count,), *jnp.asarray([starts[:-1], starts[1:]], jnp.int32))
        g = 1.0 if statistics is None else statistics["gradient"]
        if isinstance(g, LowRank):
            raise ValueError(
                f"{self.name}: the gradient of a weight with {site.inputs} inputs was not kept whole, as its largest "
                f"entries need; observe it with jpeft.observe(..., widest={site.inputs})"
            )
        score = {"magnitude": w, "gradient": g, "snip": w * g}[self.mask]
        return jnp.sort(jax.lax.top_k(jnp.abs(score).T.reshape(-1), count)[1])

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        (rows, columns), values = leaves["shira_indices"], leaves["shira_values"]
        if not isinstance(x, jax.Array) or x.size // x.shape[-1] > _FEW:
            return super().apply(leaves, base, x)
        y = base(x)
        products = (x[..., rows] * values).astype(widened(y.dtype))
        added = jnp.zeros(y.shape, products.dtype).at[..., columns].add(products)
        return y + added.astype(y.dtype)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        rows, columns = leaves["shira_indices"]
        return w.at[rows, columns].add(leaves["shira_values"], unique_indices=True), b

    def check(self, site: Site, leaves: Leaves) -> None:
        indices, sides = leaves["shira_indices"], np.array([[site.inputs], [site.outputs]])
        if ((indices < 0) | (indices >= sides)).any():
            raise ValueError(f"shira_indices names entries outside of the weight, {site.inputs} x {site.outputs}")
        rows, columns = indices.astype(np.int64)
        if len(np.unique(rows * site.outputs + columns)) < len(rows):
            raise ValueError("shira_indices names an entry of the weight twice")


def _flipped(indices: np.ndarray, site: Site) -> np.ndarray:
    """(inputs, outputs) from (outputs, inputs), or back."""
    return indices[::-1].astype(np.int32)


SHiRA.hf = HFSpec(
    peft_type="SHIRA",
    tensors=(
        Tensor("shira_weight", "shira_values"),
        Tensor("shira_indices", "shira_indices", functions=(_flipped, _flipped)),
    ),
    fields=(
        Field("r", "rank", 32, POSITIVE_INT),
        Field("random_seed", "seed", None, or_none(SEED)),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_weights", "mask_type"}),  # the file has the positions, however they were chosen
)
