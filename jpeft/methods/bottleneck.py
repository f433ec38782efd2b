"""Bottleneck adapters after a sublayer (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247; Houlsby et al. 2019).

h <- h + s (f(h D + d) U + u)        D: [features, size], U: [size, features]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.core.targets import Targets
from jpeft.methods.base import POSITIVE_INT, OutputMethod, check_fields, dtype_name, normal
from jpeft.methods.families.low_rank import narrow

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(OutputMethod):
    """A small two-layer network after each target's output, before the residual sum that the model itself makes.

    Attributes:
      targets: paths of modules, e.g. ``r".*/layer/[0-9]+/output/dense"``, the feed-forward sublayer of BERT (Pfeiffer);
        add the attention's output for Houlsby's. By default every linear layer's output but the head's.
      reduction: features / size, if ``size`` is None. size: width of the bottleneck.
      activation: "relu", "gelu", "silu" or "tanh". scale: s. init_std: of D; U starts at zero, so that the model is
        unchanged at first. dtype: of the leaves.

    Leaves at a site: ``bottleneck_down``, ``bottleneck_down_bias``, ``bottleneck_up``, ``bottleneck_up_bias``.

    >>> import jpeft
    >>> method = jpeft.Bottleneck(targets=r".*/output/dense", reduction=16)
    """

    reduction: int = 16
    size: int | None = None
    activation: str = "relu"
    scale: float = 1.0
    init_std: float = 0.02
    dtype: Any = "float32"

    per_site = ("reduction", "size", "activation", "scale", "init_std", "dtype")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        rules = {
            "reduction": POSITIVE_INT,
            "size": (lambda v: v is None or POSITIVE_INT[0](v), "a positive integer or None"),
            "activation": (lambda v: v in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}"),
        }
        check_fields(self, rules)
        super().__post_init__()

    def default_targets(self) -> Targets:
        return "all-linear"

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        size = self.size or max(1, site.outputs // self.reduction)
        return {
            "bottleneck_down": normal(key, (site.outputs, size), self.init_std, self.dtype),
            "bottleneck_down_bias": jnp.zeros((size,), self.dtype),
            "bottleneck_up": jnp.zeros((size, site.outputs), self.dtype),
            "bottleneck_up_bias": jnp.zeros((site.outputs,), self.dtype),
        }

    def apply(self, leaves: Leaves, y: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        # h + s (f(h D + d) U + u)
        hidden = _ACTIVATIONS[self.activation](narrow(y, leaves["bottleneck_down"]) + leaves["bottleneck_down_bias"])
        return y + self.scale * (hidden @ leaves["bottleneck_up"] + leaves["bottleneck_up_bias"])
