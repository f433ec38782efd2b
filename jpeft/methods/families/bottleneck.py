"""The small network of bottleneck adapters, its layer norms, scale, gate and start, as in AdapterHub's library.

B(h) = g s (f(LN(h) D + d) U + u)        D: [features, size], U: [size, outputs]; s: a number, learned or one a feature
                                         g: the mean over a row of sigmoid(h G + c), with ``gating``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, RATE, Rule, one_of, or_none
from jpeft.core.method import Leaves, ModuleContext, widened
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import Targets
from jpeft.methods.base import OutputMethod, check_fields, normal
from jpeft.methods.families.activations import ACTIVATION, ACTIVATIONS
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import flat, narrow
from jpeft.methods.families.positions import by_row, rows_of
from jpeft.methods.families.sublayers import AT_SUBLAYERS, FEED_FORWARD, NORM, OUTPUT, SUBLAYERS, with_sublayers

IDENTITY, BERT, MAM, HOULSBY = "identity", "bert", "mam_adapter", "houlsby"
LEARNED, CHANNEL = "learned", "channel"
_EPSILON = 1e-5  # of torch's LayerNorm
Tokens = Float[Array, "*tokens features"]


def _is_scale(value: Any) -> bool:
    return value in (LEARNED, CHANNEL) if isinstance(value, str) else NUMBER[0](value)


def _is_reduction(value: Any) -> bool:
    return NUMBER[0](value) and value > 0


@dataclass(frozen=True, kw_only=True)
class BottleneckMethod(OutputMethod):
    """The base class of methods that add the output of a small network."""

    sublayers: str = FEED_FORWARD
    reduction: float = 16
    size: int | None = None
    activation: str = "relu"
    scale: float | str = 1.0
    ln_before: bool = False
    ln_after: bool = False
    gating: bool = False
    dropout: float = 0.0
    init_weights: str = IDENTITY
    init_std: float = 0.02
    dtype: Any = "float32"

    prefix: ClassVar[str] = "bottleneck"  # of the leaves' names
    starts: ClassVar[tuple[str, ...]] = (IDENTITY, BERT, MAM, HOULSBY)  # what init_weights may be
    family: ClassVar[str] = "bottleneck"
    resizable: ClassVar[frozenset[str]] = frozenset({"size", "reduction"})
    inert: ClassVar[frozenset[str]] = OutputMethod.inert | {"sublayers"}
    per_site: ClassVar[tuple[str, ...]] = (
        "reduction", "size", "activation", "scale", "ln_before", "ln_after", "dropout", "init_weights", "init_std",
        "dtype",
    )  # fmt: skip
    rules: ClassVar[Mapping[str, Rule]] = {
        "sublayers": SUBLAYERS,
        "reduction": (_is_reduction, "a number above 0"),
        "size": or_none(POSITIVE_INT),
        "activation": ACTIVATION,
        "scale": (_is_scale, f"a finite number, {LEARNED!r} or {CHANNEL!r}"),
        **dict.fromkeys(("ln_before", "ln_after", "gating"), BOOL),
        "dropout": RATE,
        "init_std": NUMBER,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"init_weights": one_of(self.starts)})

    # --- where --------------------------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """The place at a sublayer where the method acts by default, see `sublayers`."""
        raise TypeError(f"{self.name} does not define place")

    def default_targets(self) -> Targets:
        return AT_SUBLAYERS

    def candidates(self, survey: Survey) -> Sequence[Site]:
        if self.targets is not None:
            return survey.outputs
        return with_sublayers(survey, self.place, self.sublayers, self.name)

    def prepare(self, site: Site) -> Site:
        return replace(site, role="")

    # --- leaves -------------------------------------------------------------------------------------------------------

    @property
    def identity_at_init(self) -> bool:
        """Whether U starts at zero."""
        return self.init_weights in (IDENTITY, MAM)

    @property
    def reads_context(self) -> bool:  # type: ignore[override]
        """Whether there is a gate, which is the mean over a row."""
        return self.gating

    @property
    def neutral(self) -> float | None:  # type: ignore[override]
        return 0.0

    def features(self, site: Site) -> int:
        """The number of features that the network takes."""
        return site.outputs

    def width(self, site: Site) -> int:
        """The size of the bottleneck at a site."""
        return self.size or max(1, int(self.features(site) // self.reduction))

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        inputs, size, outputs = self.features(site), self.width(site), site.outputs
        key_down, key_up, key_gate = jax.random.split(key, 3)
        leaves = {
            **self.init_linear(key_down, "down", (inputs, size)),
            **self.init_linear(key_up, "up", (size, outputs)),
        }
        if self.scale in (LEARNED, CHANNEL):
            leaves["scale"] = jnp.ones((1 if self.scale == LEARNED else outputs,), self.dtype)
        for name, on, features in (("ln_before", self.ln_before, inputs), ("ln_after", self.ln_after, outputs)):
            if on:
                leaves |= {f"{name}_scale": jnp.ones((features,), self.dtype)}
                leaves |= {f"{name}_bias": jnp.zeros((features,), self.dtype)}
        if self.gating:
            leaves["gate"] = normal(key_gate, (inputs, 1), self.init_std, self.dtype)
            leaves["gate_bias"] = jnp.zeros((1,), self.dtype)
        return {f"{self.prefix}_{name}": leaf for name, leaf in leaves.items()}

    def init_linear(self, key: Key[Array, ""], name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """Fresh leaves of D or U, by name without the prefix."""
        return {name: self.start(key, name, shape), f"{name}_bias": jnp.zeros((shape[1],), self.dtype)}

    def start(self, key: Key[Array, ""], name: str, shape: tuple[int, int]) -> Array:
        """The start of a matrix, "down" or "up"."""
        if name == "up" and self.identity_at_init:
            return jnp.zeros(shape, self.dtype)
        if self.init_weights == MAM:
            return kaiming(key, shape, shape[0], self.dtype)
        if self.init_weights == HOULSBY:
            return (0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)).astype(self.dtype)
        return normal(key, shape, self.init_std, self.dtype)

    # --- the network --------------------------------------------------------------------------------------------------

    def network(self, leaves: Leaves, h: Float[Array, "*tokens inputs"], context: ModuleContext) -> Tokens:
        """B(h) without the second norm, its tokens on one axis or as those of ``h`` are."""
        own, x = self.own(leaves), flat(h)
        x = layer_norm(x, own, "ln_before") if self.ln_before else x
        hidden = ACTIVATIONS[self.activation](_biased(narrow(x, own["down"]), own.get("down_bias")))
        change = _biased(hidden @ own["up"], own.get("up_bias"))
        scale = own["scale"] if "scale" in own else jnp.asarray(self.scale, change.dtype)
        change = context.dropout(change * scale, self.dropout)
        return self._gated(own, change, h, context) if self.gating else change

    def own(self, leaves: Leaves) -> dict[str, Any]:
        """The leaves by name without the prefix."""
        return {name.removeprefix(f"{self.prefix}_"): leaf for name, leaf in leaves.items()}

    def _gated(self, own: Leaves, change: Tokens, h: Float[Array, "*tokens inputs"], context: ModuleContext) -> Tokens:
        rows = rows_of(h, context, self.name)
        gate = jax.nn.sigmoid(by_row(h, rows) @ own["gate"] + own["gate_bias"]).mean(axis=1, keepdims=True)
        return (by_row(change, rows) * gate).reshape(change.shape)


@dataclass(frozen=True, kw_only=True)
class SequentialBottleneck(BottleneckMethod):
    """The base class of bottlenecks after a module: their network sees its output."""

    original_ln_before: bool = False
    adapter_residual_before_ln: bool = False

    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(("original_ln_before", "adapter_residual_before_ln"), BOOL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_residual_before_ln and (self.original_ln_before or not self.ln_after):
            why = "original_ln_before adds to a norm's input" if self.ln_after else "it needs ln_after"
            raise ValueError(f"{self.name}.adapter_residual_before_ln normalizes h + B(h): {why}")

    @property
    def identity_at_init(self) -> bool:
        """Whether U starts at zero, and no norm of its own is around the residual connection."""
        return super().identity_at_init and not self.adapter_residual_before_ln

    @property
    def neutral(self) -> float | None:  # type: ignore[override]
        """None with a norm of its own around the residual connection."""
        return None if self.adapter_residual_before_ln else 0.0

    @property
    def place(self) -> str:
        return NORM if self.original_ln_before else OUTPUT

    def prepare(self, site: Site) -> Site:
        if self.original_ln_before and site.inputs != site.outputs:
            raise ValueError(
                f"{self.name}: with original_ln_before, targets are norms, and {site.name!r} is a {site.owner} of "
                f"{site.inputs} features to {site.outputs}; name the norms after residual connections"
            )
        return super().prepare(site)

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        change = self.network(leaves, y, context).reshape(y.shape)
        if not self.ln_after:
            return change
        if self.adapter_residual_before_ln:
            return layer_norm(y + change, self.own(leaves), "ln_after") - y
        return layer_norm(change, self.own(leaves), "ln_after")

    def add(self, change: Tokens, x: Any, y: Tokens, context: ModuleContext) -> tuple[Any, Tokens]:
        if not self.original_ln_before:
            return x, y + change
        x = x + change.astype(x.dtype)
        return x, context.rerun(x)


def _biased(x: Tokens, bias: Array | None) -> Tokens:
    return x if bias is None else x + bias


def layer_norm(x: Float[Array, "*tokens features"], own: Leaves, name: str) -> Float[Array, "*tokens features"]:
    """``x`` normalized over its features, with the leaves ``<name>_scale`` and ``<name>_bias``."""
    wide = x.astype(widened(x.dtype))
    centered = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + _EPSILON)
    return normalized.astype(x.dtype) * own[f"{name}_scale"] + own[f"{name}_bias"]
