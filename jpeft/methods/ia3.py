"""IA3: learned scales of activations (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

y = (x W + b) * l           l: [out], for key and value projections
y = (x * l) W + b           l: [in], for the second layer of a feed-forward block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jpeft.core.interchange import CONVOLUTION, FAN_IN_FAN_OUT, LINEAR, Field, HFSpec, Tensor, window
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.core.targets import Targets, matches, select
from jpeft.methods.base import WeightMethod


@dataclass(frozen=True, kw_only=True)
class IA3(WeightMethod):
    """Scales the outputs of weights or, where ``feedforward`` matches, their inputs.

    Attributes:
      feedforward: the targets whose input is scaled: a regular expression, a list of paths, or None for no target.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`.

    Leaves at a site, all ones at first: ``ia3_out [out]`` or ``ia3_in [in]`` (for a convolution, one per channel).

    >>> import jpeft
    >>> method = jpeft.IA3(targets=["key", "value", "output/dense"], feedforward=["output/dense"])
    """

    feedforward: Targets = None
    dtype: Any = "float32"

    family: ClassVar[str] = "scaling"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.05638"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"ia3_in": ("in",), "ia3_out": ("out",)}
    inert: ClassVar[frozenset[str]] = WeightMethod.inert | {"feedforward"}  # a site's role says it
    neutral: ClassVar[float | None] = 1.0
    learning_rate: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        if isinstance(self.feedforward, (list, tuple)):
            object.__setattr__(self, "feedforward", tuple(self.feedforward))
        super().__post_init__()

    def sites(self, survey: Any) -> list[Site]:
        sites = super().sites(survey)
        if self.feedforward is not None:  # raises if an entry matches no site
            select(sites, self.feedforward, what="IA3.feedforward", others=survey.names)
        return sites

    def prepare(self, site: Site) -> Site:
        return replace(super().prepare(site), role="feedforward" if matches(self.feedforward, site) else "")

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        if site.role == "feedforward":
            return {"ia3_in": jnp.ones((site.channels,), self.dtype)}
        return {"ia3_out": jnp.ones((site.outputs,), self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if "ia3_in" in leaves:  # y = (x * l) W + b
            return base(x * leaves["ia3_in"])
        y = base(x)  # y = (x W + b) * l
        return y * leaves["ia3_out"].astype(y.dtype)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        if "ia3_in" in leaves:  # the rows of a convolution's matrix are (position in the window, channel)
            scale = leaves["ia3_in"]
            return w * jnp.tile(scale, w.shape[0] // scale.shape[0])[:, None], b
        return w * leaves["ia3_out"], None if b is None else b * leaves["ia3_out"]


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------


def _to_tree(scale: np.ndarray, site: Site) -> np.ndarray:
    return scale.reshape(-1)


def _in_to_torch(scale: np.ndarray, site: Site) -> np.ndarray:
    """``[1, in]``, for a convolution ``[1, in, 1...]``."""
    return scale.reshape(1, -1, *(1 for _ in window(site)))


def _out_to_torch(scale: np.ndarray, site: Site) -> np.ndarray:
    """``[out, 1]``, for a convolution ``[1, out, 1...]``."""
    return _in_to_torch(scale, site) if window(site) else scale.reshape(-1, 1)


IA3.hf = HFSpec(
    peft_type="IA3",
    tensors=(
        Tensor("ia3_l", "ia3_in", functions=(_to_tree, _in_to_torch), kinds=(LINEAR, CONVOLUTION)),
        Tensor("ia3_l", "ia3_out", functions=(_to_tree, _out_to_torch), kinds=(LINEAR, CONVOLUTION)),
    ),
    fields=(
        Field("feedforward_modules", "feedforward", chooses=True, write=lambda m, site, c: site.role == "feedforward"),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_ia3_weights"}),
)
