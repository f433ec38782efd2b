"""Bottleneck adapters after a sublayer (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247; Houlsby et al. 2019).

h <- h + s (f(h D + d) U + u)        D: [features, size], U: [size, features]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import NUMBER, POSITIVE_INT, Rule, one_of, or_none
from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.core.targets import ALL_LINEAR, Targets
from jpeft.methods.base import OutputMethod, normal
from jpeft.methods.families.low_rank import flat, narrow

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(OutputMethod):
    """A small two-layer network on each target's output, before the model's own residual connection.

    Attributes:
      targets: paths of modules, e.g. ``r".*/layer/[0-9]+/output/dense"``, the feed-forward sublayer of BERT (Pfeiffer);
        with the attention's output for Houlsby's. By default all linear layers except the output head.
      reduction: features / size, if ``size`` is None.
      size: width of the bottleneck.
      activation: "relu", "gelu", "silu" or "tanh".
      scale: s, the factor on the network's output.
      init_std: standard deviation of D at first; U starts at zero, so that the model is unchanged.
      dtype: dtype of the leaves.
      exclude, overrides: see `Method`.

    Leaves at a site: ``bottleneck_down [features, size]``, ``bottleneck_down_bias [size]``,
    ``bottleneck_up [size, features]``, ``bottleneck_up_bias [features]``.

    >>> import jpeft
    >>> method = jpeft.Bottleneck(targets=r".*/output/dense", reduction=16)
    """

    reduction: int = 16
    size: int | None = None
    activation: str = "relu"
    scale: float = 1.0
    init_std: float = 0.02
    dtype: Any = "float32"

    family: ClassVar[str] = "bottleneck"
    paper: ClassVar[str] = "https://arxiv.org/abs/2005.00247"
    per_site = ("reduction", "size", "activation", "scale", "init_std", "dtype")
    rules: ClassVar[Mapping[str, Rule]] = {
        "reduction": POSITIVE_INT,
        "size": or_none(POSITIVE_INT),
        "activation": one_of(_ACTIVATIONS),
        "scale": NUMBER,
        "init_std": NUMBER,
    }

    def default_targets(self) -> Targets:
        return ALL_LINEAR

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        size = self.size or max(1, site.outputs // self.reduction)
        return {
            "bottleneck_down": normal(key, (site.outputs, size), self.init_std, self.dtype),
            "bottleneck_down_bias": jnp.zeros((size,), self.dtype),
            "bottleneck_up": jnp.zeros((size, site.outputs), self.dtype),
            "bottleneck_up_bias": jnp.zeros((site.outputs,), self.dtype),
        }

    def apply(
        self, leaves: Leaves, x: Any, y: Float[Array, "*tokens features"], context: Mapping[str, Any]
    ) -> Float[Array, "*tokens features"]:
        # h + s (f(h D + d) U + u)
        h = flat(y)
        hidden = _ACTIVATIONS[self.activation](narrow(h, leaves["bottleneck_down"]) + leaves["bottleneck_down_bias"])
        change = hidden @ leaves["bottleneck_up"] + leaves["bottleneck_up_bias"]
        return (h + float(self.scale) * change).reshape(y.shape)
