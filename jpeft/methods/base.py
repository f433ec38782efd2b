"""What a method is: a frozen dataclass of configuration, and a few short functions of one site.

Subclass `WeightMethod` for a method that changes a weight (it writes maths for one matrix ``[in, out]``; scans,
experts, heads and convolutions are the core's business), `OutputMethod` for one that works on a module's output,
`AttentionMethod` for one that adds keys and values, `LeafMethod` for one that trains base leaves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from jpeft.core.method import Leaves, Linear, widened
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import ALL_LINEAR, TargetError, Targets, compile_pattern, matches_entry, select

if TYPE_CHECKING:
    from jpeft.core.peft import Peft


@dataclass(frozen=True, kw_only=True)
class Method:
    """Configuration common to all methods.

    Attributes:
      targets: what to act on, see `jpeft.targets`; None is the method's own default.
      exclude: what to leave out; it wins.
      overrides: fields by target pattern, e.g. ``{r".*/query": {"rank": 16}}``; the first pattern that matches counts.
    """

    targets: Targets = None
    exclude: Targets = None
    overrides: Mapping[str, Mapping[str, Any]] = FrozenDict()

    mergeable: ClassVar[bool] = True
    # What each axis of a leaf is ("in", "out" or None), for leaves that take a base weight's sharding.
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {}
    # Leaves that the adapter holds but that never train.
    non_trainable: ClassVar[frozenset[str]] = frozenset()
    # Fields that may be given per site.
    per_site: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
        overrides = FrozenDict({k: FrozenDict(v) for k, v in self.overrides.items()})
        object.__setattr__(self, "overrides", overrides)
        for pattern, fields in overrides.items():
            compile_pattern(pattern)
            for field in fields:
                if field not in self.per_site:
                    raise ValueError(
                        f"{self.name}: overrides[{pattern!r}] sets {field!r}; per site there are {list(self.per_site)}"
                    )
            self._replaced(dict(fields))  # validates the values

    # --- what a subclass may give -------------------------------------------------------------------------------

    def candidates(self, survey: Survey) -> Sequence[Site]:
        """The sites of a model that this kind of method can act on."""
        return survey.weights

    def default_targets(self) -> Targets:
        return ALL_LINEAR

    def prepare(self, site: Site) -> Site:
        """The site as this method sees it; raises ValueError on one it cannot act on."""
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        """The leaves at one site. ``w`` is the base weight as ``[in, out]`` (for "leaf" sites, the leaf)."""
        return {}

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        """Leaves that all sites share, kept at the adapter's root under the method's name."""
        return {}

    def expand(self, shared: Leaves, leaves: Leaves) -> Leaves:
        """The leaves that `apply` and `merge` take, from those that are stored. The identity unless overridden."""
        return leaves

    def columns(self) -> Mapping[str, str]:
        """Columns of its own in `Peft.summary`, such as ``{"rank": "8"}``."""
        return {}

    @property
    def input_dropout(self) -> float:
        """The rate at which ``apply`` drops entries of its input; 0.0 for none."""
        return 0.0

    # --- what the core calls ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The class's name, which messages and configurations use."""
        return type(self).__name__

    @property
    def slug(self) -> str:
        """The key of shared leaves in the adapter: the name in snake case."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name).lower()

    @property
    def expands(self) -> bool:
        """Whether `expand` computes anything: whether a subclass overrides it."""
        return type(self).expand is not Method.expand

    @property
    def changes_bias(self) -> bool:
        """Whether it changes the bias beside a weight."""
        return False

    def sites(self, survey: Survey) -> list[Site]:
        """The sites that ``targets`` names in a model."""
        targets = self.default_targets() if self.targets is None else self.targets
        chosen = select(self.candidates(survey), targets, self.exclude, what=self.name, others=survey.names)
        for pattern in self.overrides:
            if not any(_override_matches(pattern, site) for site in chosen):
                names = ", ".join(s.name for s in chosen[:8])
                raise TargetError(f"{self.name}: overrides pattern {pattern!r} matches none of its sites: {names}")
        return [self.at(s).prepare(s) for s in chosen]

    def at(self, site: Site) -> Method:
        """This method with the overrides that hold at a site."""
        for pattern, fields in self.overrides.items():
            if _override_matches(pattern, site):
                return self._replaced(dict(fields))
        return self if not self.overrides else self._replaced({})

    def _replaced(self, fields: dict[str, Any]) -> Any:
        return dataclasses.replace(self, **{**fields, "overrides": FrozenDict()})

    def bind(self, model: Any, params: Any, /, *inputs: Any, **kwargs: Any) -> Peft:
        """Finds this method's sites in a model by one abstract call, and returns the bound `Peft`.

        Args:
          model: any Linen module, unchanged.
          params: its parameters, or all its variables ``{"params": ..., "batch_stats": ...}``; may be abstract.
          *inputs, **kwargs: as for ``model.apply``; arrays may be ``jax.ShapeDtypeStruct``.

        Raises:
          TargetError: a target that matches nothing. ValueError: a site that the method cannot act on.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> peft = jpeft.LoRA(rank=2, targets="layers_0").bind(model, params, x)
        >>> [site.name for site in peft.sites]
        ['layers_0']
        """
        from jpeft.binding import bind

        return bind(self, model, params, *inputs, **kwargs)

    def methods(self) -> tuple[Method, ...]:
        """The simple methods this one is made of: itself, or a chain's."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values. Inverse of `jpeft.methods.from_dict`."""
        out: dict[str, Any] = {"method": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if callable(value):
                raise ValueError(
                    f"{self.name}.{field.name} is a function, which has no JSON form; give patterns instead"
                )
            value = json.loads(json.dumps(value, default=_jsonable))
            out[field.name] = value
        return out


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} has no JSON form")


def _override_matches(pattern: str, site: Site) -> bool:
    return any(compile_pattern(pattern).fullmatch(n) or matches_entry(pattern, n) for n in site.names)


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """A method that changes a weight. Subclasses give ``init``, ``merge`` and, where it is cheaper, ``apply``.

    Attributes:
      parts: blocks of equal size that the outputs of a fused weight (q, k, v in one) consist of; each gets leaves of
        its own. Usually given per site: ``overrides={r".*/qkv": {"parts": 3}}``.
    """

    parts: int = 1

    per_site: ClassVar[tuple[str, ...]] = ("parts",)

    def prepare(self, site: Site) -> Site:
        if not jnp.issubdtype(jnp.dtype(site.dtype), jnp.floating):
            raise ValueError(
                f"{self.name}: the weight of {site.name!r} is {site.dtype}, and only a floating one can be changed; "
                f"leave it out with exclude=[{site.name!r}]"
            )
        return site.split(self.parts)

    @property
    def changes_bias(self) -> bool:
        """Whether a subclass overrides `merge_bias`."""
        return type(self).merge_bias is not WeightMethod.merge_bias

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        """The changed operation on ``x: [tokens..., in]``. By default it follows from `merge`."""
        y = x @ self.merge(leaves, base.weight).astype(x.dtype)
        return y if base.bias is None else y + self.merge_bias(leaves, base.bias).astype(y.dtype)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The changed weight."""
        raise TypeError(f"{self.name} does not define merge")

    def merge_bias(self, leaves: Leaves, b: Float[Array, " out"]) -> Float[Array, " out"]:
        """The changed bias; unchanged unless overridden."""
        return b


@dataclass(frozen=True, kw_only=True)
class OutputMethod(Method):
    """A method that works on a module's output ``[..., features]``: the first, where it returns a tuple."""

    mergeable: ClassVar[bool] = False

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.outputs

    def apply(self, leaves: Leaves, y: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        """The changed output."""
        raise TypeError(f"{self.name} does not define apply")


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """A method that changes the keys, values and mask of an attention, after any position encoding."""

    mergeable: ClassVar[bool] = False

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.attentions

    def default_targets(self) -> Targets:
        return r".*"

    def apply(self, leaves: Leaves, key: Array, value: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
        """The changed keys and values ``[..., length, heads, head_dim]`` and mask ``[..., query, length]``."""
        raise TypeError(f"{self.name} does not define apply")


@dataclass(frozen=True, kw_only=True)
class LeafMethod(Method):
    """A method whose adapter leaves take the place of base leaves, and start as their copies.

    Floating leaves narrower than float32 get float32 copies, since small updates would be lost in rounding; the model
    sees them in the base's dtype.
    """

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.leaves

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        wide = widened(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w.dtype
        # A copy, not the base's own buffer: a donated training state must not take the base away.
        return {"": jnp.array(w, wide, copy=True)}


def dtype_name(dtype: Any) -> str:
    """A floating dtype by name, so that configuration is JSON: ``jnp.bfloat16`` -> ``"bfloat16"``."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype {dtype!r} is none that numpy or jax knows; e.g. 'float32', 'bfloat16'") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"adapter leaves must be floating, got dtype {dtype.name!r}")
    return dtype.name


def check_fields(method: Method, rules: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raises a ValueError that names the field, what was expected and what came."""
    for field, (ok, expected) in rules.items():
        value = getattr(method, field)
        try:
            good = ok(value)
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"{method.name}.{field} must be {expected}, got {value!r}")


def positive_int(value: Any) -> bool:
    """Whether a value is a whole number above 0; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


POSITIVE_INT = (positive_int, "a positive integer")
RATE = (lambda v: 0 <= v < 1, "a rate in [0, 1)")


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float, dtype: str) -> Array:
    """Normal numbers, drawn in float32 whatever the dtype, so that runs in other dtypes start alike."""
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
