"""RoAd: rotations and scales of pairs of outputs (Liao and Monz 2024, https://arxiv.org/abs/2409.00119).

(y1, y2) -> (u1 y1 - v1 y2, u2 y2 + v2 y1)        y = x W + b; u = a cos(t), v = a sin(t), a and t trained
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import Rule, is_size, one_of
from jpeft.core.interchange import Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod

_EVEN: Rule = (lambda value: is_size(value) and value % 2 == 0, "a positive even integer")
_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # angles, and scales, for each output
_VARIANT = one_of(_SIZES)


@dataclass(frozen=True, kw_only=True)
class RoAd(WeightMethod):
    """Rotates and scales the outputs of weights in pairs; a bias turns with them.

    Attributes:
      variant: "road_1" (an angle and a scale for each pair), "road_2" (for each output) or "road_4" (for each entry of
        a pair's matrix: two for each output).
      group_size: an even divisor of the outputs. In each group, the first half is paired with the second. It changes
        no more than which outputs are paired.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``road_theta`` and ``road_alpha``, each ``[out / 2]``, ``[out]`` or ``[2 out]`` by the variant.

    >>> import jpeft
    >>> method = jpeft.methods.RoAd(variant="road_2", targets=r".*/(query|value)")
    """

    variant: str = "road_1"
    group_size: int = 64
    dtype: Any = "float32"

    family: ClassVar[str] = "rotation"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.00119"
    learning_rate: ClassVar[float] = 1e-3
    per_site: ClassVar[tuple[str, ...]] = ("variant", "group_size", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"variant": _VARIANT, "group_size": _EVEN}

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        if site.outputs % self.group_size:
            raise ValueError(
                f"RoAd: group_size {self.group_size} does not divide the {site.outputs} outputs of {site.name!r}; give "
                "an even divisor of them"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        size = int(_SIZES[self.variant] * site.outputs)
        return {"road_theta": jnp.zeros((size,), self.dtype), "road_alpha": jnp.ones((size,), self.dtype)}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        theta, alpha = leaves["road_theta"], leaves["road_alpha"]
        u, v = alpha * jnp.cos(theta), alpha * jnp.sin(theta)
        half = self.group_size // 2
        if self.variant == "road_1":  # one for both of a pair
            u, v = (jnp.repeat(x.reshape(-1, 1, half), 2, axis=1) for x in (u, v))
        if self.variant == "road_4":  # by group, those of u and those of v
            u, v = u.reshape(-1, 2, 2, half)[:, 0], v.reshape(-1, 2, 2, half)[:, 1]
        return {"road_u": u.reshape(-1, 2, half), "road_v": v.reshape(-1, 2, half)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        return self._turned(leaves, base(x))

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return self._turned(leaves, w), None if b is None else self._turned(leaves, b)

    def _turned(self, leaves: Leaves, y: Float[Array, "*rows out"]) -> Float[Array, "*rows out"]:
        u, v = leaves["road_u"].astype(y.dtype), leaves["road_v"].astype(y.dtype)
        pairs = y.reshape(*y.shape[:-1], *u.shape)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = [first * u[:, 0] - second * v[:, 0], second * u[:, 1] + first * v[:, 1]]
        return jnp.stack(turned, axis=-2).reshape(y.shape)


RoAd.hf = HFSpec(
    peft_type="ROAD",
    tensors=(Tensor("road_theta", "road_theta"), Tensor("road_alpha", "road_alpha")),
    fields=(Field("variant", "variant", "road_1", _VARIANT), Field("group_size", "group_size", 64, _EVEN)),
    ignored=frozenset({"init_weights"}),
)
