"""Compacter: bottlenecks of hypercomplex layers (Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647).

h <- h + s (f(h D + d) U + u)        D, U = Σ_i A_i ⊗ W_i,  W_i = L_i R_i,  i = 1 … n
                                     A_i: [n, n], L_i: [in/n, r], R_i: [r, out/n]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, Rule, one_of
from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.methods.base import normal
from jpeft.methods.families.bottleneck import IDENTITY, SequentialBottleneck
from jpeft.methods.families.sublayers import BOTH

_RULES = ("rule", "rule_left", "rule_right")
_LAYERS = ("down", "up")


@dataclass(frozen=True, kw_only=True)
class Compacter(SequentialBottleneck):
    """Bottlenecks after both sublayers whose matrices are sums of Kronecker products, with small factors.

    Compacter++ is ``Compacter(sublayers="feed_forward")``; AdapterHub's has ``original_ln_before`` too.

    Attributes:
      targets, sublayers, original_ln_before: see `jpeft.Bottleneck`.
      phm_dim: n, the number of products in a sum; it divides the features and the bottleneck's size.
      phm_rank: r, the rank of the factors W_i.
      factorized_phm_w: whether W_i is L_i R_i, rather than a matrix.
      shared_w_phm: whether all sites share W_i, one for D and one for U.
      shared_phm_rule: whether D and U of all sites share A_i, the rule of the products.
      factorized_phm_rule: whether A_i is a product of a column and a row.
      learn_phm: whether A_i trains.
      phm_c_init: the start of A_i, "normal" or "uniform".
      phm_init_range: the standard deviation of a shared A_i that is normal. The others start in ±1 (shared and
        uniform), ±0.01 (uniform) or with 0.01 (normal), as in AdapterHub's library.
      phm_bias: whether there are d and u.
      init_weights: "compacter": W_i, or its factors, are normal with the standard deviation of Glorot and Bengio; or
        "identity": those of U are zero (R_i, if factorized), so that a fresh adapter changes nothing.
      reduction, size, activation, scale, gating, dropout, init_std, dtype, exclude, overrides: see `jpeft.Bottleneck`.
      ln_before, ln_after, adapter_residual_before_ln: see `jpeft.Bottleneck`.

    Leaves at a site: ``compacter_down_left [n, features/n, r]``, ``compacter_down_right [n, r, size/n]`` and
    ``compacter_down_bias [size]``, the same of ``compacter_up``, and those of `jpeft.Bottleneck` that are asked for. A
    shared leaf: ``rule [n, n, n]``.

    >>> import jpeft
    >>> method = jpeft.methods.Compacter(reduction=32, phm_dim=4)
    """

    sublayers: str = BOTH
    reduction: float = 32
    activation: str = "gelu"
    init_weights: str = "compacter"
    phm_dim: int = 4
    phm_rank: int = 1
    factorized_phm_w: bool = True
    shared_w_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    learn_phm: bool = True
    phm_c_init: str = "normal"
    phm_init_range: float = 1e-4
    phm_bias: bool = True

    prefix: ClassVar[str] = "compacter"
    starts: ClassVar[tuple[str, ...]] = ("compacter", IDENTITY)
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.04647"
    resizable: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[float | None] = None  # matrices may be shared by all sites  # type: ignore[assignment]
    rules: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys(("phm_dim", "phm_rank"), POSITIVE_INT),
        **dict.fromkeys(
            ("factorized_phm_w", "shared_w_phm", "shared_phm_rule", "factorized_phm_rule", "learn_phm", "phm_bias"),
            BOOL,
        ),
        "phm_c_init": one_of(("normal", "uniform")),
        "phm_init_range": NUMBER,
    }

    @property
    def non_trainable(self) -> frozenset[str]:  # type: ignore[override]
        """The rule, unless it is learned."""
        if self.learn_phm:
            return frozenset()
        own = (f"{self.prefix}_{layer}_{rule}" for layer in _LAYERS for rule in _RULES)
        return frozenset(_RULES if self.shared_phm_rule else own)

    def prepare(self, site: Site) -> Site:
        site, n = super().prepare(site), self.phm_dim
        for what, size in (("features", self.features(site)), ("size", self.width(site))):
            if size % n:
                hint = f"; set size={max(n, round(size / n) * n)}" if what == "size" else ""
                raise ValueError(
                    f"{self.name}.phm_dim is {n}, which does not divide the {what} {size} at {site.name!r}{hint}"
                )
        return site

    # --- leaves -------------------------------------------------------------------------------------------------------

    def init_linear(self, key: Key[Array, ""], name: str, shape: tuple[int, int]) -> dict[str, Array]:
        key_w, key_rule = jax.random.split(key)
        leaves = {f"{name}_bias": jnp.zeros((shape[1],), self.dtype)} if self.phm_bias else {}
        if not self.shared_w_phm:
            leaves |= self._w(key_w, name, shape)
        if not self.shared_phm_rule:
            leaves |= {f"{name}_{part}": leaf for part, leaf in self._rule(key_rule, 0.01, 0.01).items()}
        return leaves

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        key_rule, *keys = jax.random.split(key, 3)
        leaves = self._rule(key_rule, self.phm_init_range, 1.0) if self.shared_phm_rule else {}
        if self.shared_w_phm:
            (features, size, outputs), *others = {(self.features(s), self.width(s), s.outputs) for s in sites}
            if others:
                raise ValueError(
                    f"{self.name}: sites of different sizes cannot share W_i; set shared_w_phm=False, or name targets "
                    "of one size"
                )
            for key, name, shape in zip(keys, _LAYERS, ((features, size), (size, outputs)), strict=True):
                leaves |= self._w(key, name, shape)
        return leaves

    def _w(self, key: Key[Array, ""], name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """W_i or its factors."""
        n, r, (inputs, outputs) = self.phm_dim, self.phm_rank, (size // self.phm_dim for size in shape)
        shapes = (
            {"left": (n, inputs, r), "right": (n, r, outputs)} if self.factorized_phm_w else {"w": (n, inputs, outputs)}
        )
        leaves = {}
        for own, (part, dims) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
            is_zero = self.init_weights == IDENTITY and name == "up" and part != "left"
            std = 0.0 if is_zero else math.sqrt(2 / (dims[1] + dims[2]))
            leaves[f"{name}_{part}"] = normal(own, dims, std, self.dtype)
        return leaves

    def _rule(self, key: Key[Array, ""], std: float, bound: float) -> dict[str, Array]:
        """A_i or its factors."""
        n = self.phm_dim
        shapes = {"rule_left": (n, n, 1), "rule_right": (n, 1, n)} if self.factorized_phm_rule else {"rule": (n, n, n)}
        leaves = {}
        for own, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
            if self.phm_c_init == "normal":
                leaves[name] = normal(own, shape, std, self.dtype)
            else:
                leaves[name] = jax.random.uniform(own, shape, jnp.float32, -bound, bound).astype(self.dtype)
        return leaves

    # --- the matrices -------------------------------------------------------------------------------------------------

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        own, out = self.own(leaves), {}
        for name in _LAYERS:
            parts = {k: v for k, v in shared.items() if k in _RULES or k.startswith(f"{name}_")} | own
            rule = _product(parts, "" if self.shared_phm_rule else f"{name}_", "rule", "rule_left", "rule_right")
            out[f"{self.prefix}_{name}"] = kronecker_sum(rule, _product(parts, f"{name}_", "w", "left", "right"))
        factors = {f"{name}_{part}" for name in _LAYERS for part in ("w", "left", "right", *_RULES)}
        return out | {f"{self.prefix}_{name}": leaf for name, leaf in own.items() if name not in factors}


def _product(leaves: Leaves, prefix: str, whole: str, left: str, right: str) -> Array:
    """A stack of matrices, or the product of its factors."""
    if (found := leaves.get(prefix + whole)) is not None:
        return found
    return leaves[prefix + left] @ leaves[prefix + right]


def kronecker_sum(a: Float[Array, "n p q"], w: Float[Array, "n i o"]) -> Float[Array, "pi qo"]:
    """Σ_i a_i ⊗ w_i.

    >>> kronecker_sum(jnp.eye(2)[None], jnp.array([[[3.0]]])).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """
    (_, p, q), (_, i, o) = a.shape, w.shape
    return jnp.einsum("npq,nio->piqo", a, w).reshape(p * i, q * o)
