"""Representation fine-tuning: what interventions of low rank share, as in AdapterHub's library.

h <- h + (f(h W + b) - h R) Rᵀ        W, R: [features, r], at the first and last tokens of each text
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jpeft.checks import BOOL, POSITIVE_INT, RATE, Rule, is_int
from jpeft.core.method import Leaves, ModuleContext
from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.methods.base import OutputMethod
from jpeft.methods.families.activations import ACTIVATION, ACTIVATIONS
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import flat, narrow
from jpeft.methods.families.positions import places, real_tokens, rows_of

Tokens = Float[Array, "*tokens features"]
_COUNT: Rule = (lambda value: is_int(value) and 0 <= value < 2**31, "an integer, 0 or more")
# A layer of a list, "encoder/layer/0" or "Transformer/encoderblock_0", that is in no other: T5's blocks hold layers.
_ITEM = r"(layers?|h|blocks?|\w*block)[/_]\d+"
_BLOCK = re.compile(rf"(?!(.*/)?{_ITEM}/)(.*/)?{_ITEM}")
_SCANNED = re.compile(r"(.*/)?(layers?|h|blocks?|\w*block)")


class _Blocks:
    """The target of the layers of a model, one by one or scanned."""

    __name__ = "blocks"

    def __call__(self, path: str, site: Site) -> bool:
        return bool(_BLOCK.fullmatch(path) or (site.stack and _SCANNED.fullmatch(path)))

    def __repr__(self) -> str:
        return "blocks (modules called layer/0, h/0, block_0, …, or a scanned layers)"


BLOCKS = _Blocks()


@dataclass(frozen=True, kw_only=True)
class ReFT(OutputMethod):
    """The base class of interventions on the states of some tokens."""

    rank: int = 1
    prefix_positions: int = 3
    suffix_positions: int = 0
    tied_weights: bool = False
    activation: str = "linear"
    dropout: float = 0.05
    dtype: Any = "float32"

    orthogonal: ClassVar[bool] = False  # whether the columns of R are made orthonormal
    subtracts: ClassVar[bool] = True  # whether what is in the subspace is taken away
    family: ClassVar[str] = "representation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.03592"
    learning_rate: ClassVar[float] = 9e-4
    reads_context: ClassVar[bool] = True
    per_site: ClassVar[tuple[str, ...]] = ("rank", "prefix_positions", "suffix_positions", "dropout", "dtype")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT,
        **dict.fromkeys(("prefix_positions", "suffix_positions"), _COUNT),
        "tied_weights": BOOL,
        "activation": ACTIVATION,
        "dropout": RATE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prefix_positions and not self.suffix_positions:
            raise ValueError(f"{self.name} acts at no position: prefix_positions and suffix_positions are both 0")

    @property
    def identity_at_init(self) -> bool:
        """False: a subspace is overwritten from the start."""
        return False

    def default_targets(self) -> Targets:
        return BLOCKS

    def prepare(self, site: Site) -> Site:
        if self.orthogonal and self.rank > site.outputs:
            raise ValueError(
                f"{self.name}: {site.name!r} has {site.outputs} features, which hold no {self.rank} orthogonal "
                f"directions; set overrides={{{site.name!r}: {{'rank': {site.outputs}}}}}"
            )
        return site

    @property
    def units(self) -> tuple[str, ...]:
        """The interventions: one at the first tokens and one at the last, or one at both."""
        own = ("prefix",) * bool(self.prefix_positions) + ("suffix",) * bool(self.suffix_positions)
        return ("both",) if self.tied_weights else own

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        leaves: dict[str, Array] = {}
        for unit, own in zip(self.units, jax.random.split(key, len(self.units)), strict=True):
            key_w, key_b, key_r = jax.random.split(own, 3)
            shape = (site.outputs, self.rank)
            r = kaiming(key_r, shape, site.outputs, "float32")
            leaves |= {
                f"reft_{unit}_source": kaiming(key_w, shape, site.outputs, self.dtype),
                f"reft_{unit}_bias": kaiming(key_b, (self.rank,), site.outputs, self.dtype),
                f"reft_{unit}_rotation": (orthonormal(r) if self.orthogonal else r).astype(self.dtype),
            }
        return leaves

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        if not self.orthogonal:
            return leaves
        return {name: orthonormal(x) if name.endswith("_rotation") else x for name, x in leaves.items()}

    def apply(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        if context.get("continues"):  # the tokens that a text begins and ends with were in an earlier call
            return y
        h = flat(y)
        out = h
        for unit, where in self._positions(y, context).items():
            changed = context.dropout(h + self._added(leaves, unit, h), self.dropout)
            out = jnp.where(where.reshape(*h.shape[:-1], 1), changed, out)
        return out.reshape(y.shape)

    def _added(self, leaves: Leaves, unit: str, h: Tokens) -> Tokens:
        """The term that an intervention adds at every token."""
        source, bias, r = (leaves[f"reft_{unit}_{name}"] for name in ("source", "bias", "rotation"))
        target = ACTIVATIONS[self.activation](narrow(h, source) + bias)
        return (target - narrow(h, r) if self.subtracts else target) @ r.T

    def _positions(self, y: Tokens, context: ModuleContext) -> dict[str, Bool[Array, "batch length"]]:
        """The tokens that each intervention acts at; one of the first and of the last is left to that at the last."""
        rows = rows_of(y, context, self.name)
        real = real_tokens(context, rows, self.name)
        before, after = places(rows, real, context.get("segment_ids"))
        near = {"prefix": before < self.prefix_positions, "suffix": after < self.suffix_positions}
        if self.tied_weights:
            near["both"] = near["prefix"] | near["suffix"]
        return {unit: jnp.broadcast_to(near[unit] if real is None else near[unit] & real, rows) for unit in self.units}


def orthonormal(a: Float[Array, "features rank"]) -> Float[Array, "features rank"]:
    """The orthonormal columns Q of A = Q Lᵀ, with L from Cholesky's decomposition of Aᵀ A: that of Gram and Schmidt.

    >>> q = orthonormal(jnp.array([[3.0, 1.0], [0.0, 2.0], [4.0, 1.0]]))
    >>> jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6).item()
    True
    """
    lower = jnp.linalg.cholesky(a.T @ a)
    return jax.scipy.linalg.solve_triangular(lower, a.T, lower=True).T
