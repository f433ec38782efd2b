"""AdapterFusion: attention over what several trained adapters add (Pfeiffer et al. 2021,
https://arxiv.org/abs/2005.00247).

h <- h + Σ_i softmax_i((h Q + q) · c_i K) c_i V            c_i: what adapter i adds to h
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER, RATE, Rule
from jpeft.core.method import Leaves, ModuleContext
from jpeft.core.sites import Site
from jpeft.methods.base import normal
from jpeft.methods.families.low_rank import flat
from jpeft.methods.families.members import Composition, Tokens, changes

_OFF_DIAGONAL = 1e-6  # of V at first, in AdapterHub's library
_POSITIVE: Rule = (lambda value: NUMBER[0](value) and value > 0, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Composition):
    """Mixes what several trained adapters add at each place, by an attention of the state over them.

    The members are frozen, only the attention trains: `jpeft.methods.with_members` fills in adapters that were trained
    by themselves. At a norm, with members that have ``original_ln_before``, the state is the norm's output, and the sum
    is added before it.

    Attributes:
      members: methods by name that change the outputs of modules, at the same targets.
      query, key, value: whether the state, the keys and the values have a layer of their own. AdapterHub's "static" is
        ``value=False, regularization=0.0``.
      value_initialized: whether V starts as the identity, rather than normal with ``init_std``.
      residual_before: whether the state is added to what each adapter adds, rather than to the mixture.
      temperature: the scores are divided by it. (AdapterHub lowers one from 50 to 1 over a thousand calls.)
      regularization: the factor of the squared distance of V to the identity, a term of `Peft.penalty`.
      dropout: the rate on the scores, while the caller trains.
      train_members: whether the members' leaves train too.
      init_std: standard deviation of Q and K at first.
      dtype: dtype of the leaves that are no member's.

    Leaves at a site: those of the members, with their names in front, ``fr_bottleneck_down``, and ``fusion_query
    [features, features]``, ``fusion_query_bias``, ``fusion_key`` and ``fusion_value``.

    >>> import jpeft
    >>> members = {"squad": jpeft.Bottleneck(), "mnli": jpeft.Bottleneck(), "qqp": jpeft.Bottleneck()}
    >>> method = jpeft.methods.AdapterFusion(members=members)
    """

    query: bool = True
    key: bool = True
    value: bool = True
    value_initialized: bool = True
    residual_before: bool = False
    temperature: float = 1.0
    regularization: float = 0.01
    dropout: float = 0.0
    train_members: bool = False
    init_std: float = 0.02
    dtype: Any = "float32"

    paper: ClassVar[str] = "https://arxiv.org/abs/2005.00247"
    learning_rate: ClassVar[float] = 5e-5
    rules: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys(("query", "key", "value", "value_initialized", "residual_before", "train_members"), BOOL),
        "temperature": _POSITIVE,
        "regularization": NUMBER,
        "dropout": RATE,
        "init_std": NUMBER,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_before and any(getattr(m, "original_ln_before", False) for _, m in self.members):
            raise ValueError(
                "AdapterFusion.residual_before adds the sublayer's output to each value, and a norm does not see that: "
                "its members must be without original_ln_before"
            )

    @property
    def frozen_members(self) -> tuple[str, ...]:
        return () if self.train_members else tuple(self.named)

    @property
    def identity_at_init(self) -> bool:
        """Whether the members' start is one, of which any mixture changes nothing."""
        return super().identity_at_init and not self.residual_before

    @property
    def input_dropout(self) -> float:
        return max(self.dropout, super().input_dropout)

    @property
    def draws(self) -> bool:
        return self.dropout > 0.0 or super().draws

    def init_own(self, key: Key[Array, ""], site: Site) -> Leaves:
        shape, leaves = (site.outputs, site.outputs), {}
        for own, name in zip(jax.random.split(key), ("query", "key"), strict=True):
            if getattr(self, name):
                leaves[f"fusion_{name}"] = normal(own, shape, self.init_std, self.dtype)
        if self.query:  # one of the keys would shift all scores alike, which the softmax does not see
            leaves["fusion_query_bias"] = jnp.zeros((site.outputs,), self.dtype)
        if self.value and self.value_initialized:
            eye = jnp.eye(site.outputs)
            leaves["fusion_value"] = jnp.where(eye == 1, 1.0, _OFF_DIAGONAL).astype(self.dtype)
        elif self.value:
            leaves["fusion_value"] = normal(jax.random.fold_in(key, 2), shape, self.init_std, self.dtype)
        return leaves

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        h = flat(y)
        found = [flat(change) for change in changes(self, leaves, x, y, context)]
        seen = jnp.stack([h + change if self.residual_before else change for change in found], axis=-2)
        query, keys = _linear(leaves, "query", h), _linear(leaves, "key", seen)
        scores = context.dropout(jnp.einsum("...d,...nd->...n", query, keys), self.dropout)
        shares = jax.nn.softmax(scores / jnp.asarray(self.temperature, scores.dtype))
        mixed = _linear(leaves, "value", jnp.einsum("...n,...nd->...d", shares, seen))
        return (mixed - h if self.residual_before else mixed).reshape(y.shape)

    def add(self, change: Tokens, x: Any, y: Tokens, context: ModuleContext) -> tuple[Any, Tokens]:
        return self.members[-1][1].add(change, x, y, context)

    @property
    def penalized(self) -> bool:
        return (self.value and bool(self.regularization)) or super().penalized

    def penalty(self, leaves: Leaves) -> Float[Array, ""] | float:
        own = super().penalty(leaves)
        if not (self.value and self.regularization):
            return own
        value = leaves["fusion_value"]
        return own + self.regularization * jnp.square(value - jnp.eye(value.shape[-1], dtype=value.dtype)).sum()


def _linear(leaves: Leaves, name: str, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
    """A layer of the fusion's; ``x`` without one."""
    if (kernel := leaves.get(f"fusion_{name}")) is None:
        return x
    bias = leaves.get(f"fusion_{name}_bias")
    return x @ kernel if bias is None else x @ kernel + bias
