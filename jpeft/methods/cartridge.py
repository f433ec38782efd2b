"""Cartridges: a trained cache of keys and values in place of a long text (Eyuboglu et al. 2025,
https://arxiv.org/abs/2506.06266).

softmax(Q [P_k; K]^T) [P_v; V]           P_k, P_v: [length, heads, head_dim], the first ``frozen_tokens`` of them fixed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Key

from jpeft.checks import Rule, is_int
from jpeft.core.interchange import KEYS_VALUES, Field, HFSpec
from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.methods.prefix import PREFIX_CONSTANTS, PREFIX_FIELDS, PREFIX_IMPLIED, PREFIX_TENSORS, PrefixTuning

_FROZEN: Rule = (lambda value: is_int(value) and value >= 0, "a number of tokens, 0 or more")
_NAMES = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class Cartridge(PrefixTuning):
    """Learned keys and values that every query attends to, the first of which stay as they are.

    Models put much of their attention on the first token, so that training is steadier where that does not change. A
    cartridge starts from a text's own keys and values: see `jpeft.methods.prefix_start.from_text`. Several are put
    together by `jpeft.methods.prefix_start.compose`.

    Attributes:
      frozen_tokens: number of virtual tokens at the beginning that do not train; fewer than ``length``.
      shift_positions: whether positions of tokens begin at ``length``, after the cartridge, or at 0, as without it.
      length, init_weights, init_std, dtype, targets, exclude, overrides: see `PrefixTuning`.

    Leaves at a site: ``frozen_key [frozen_tokens, kv_heads, head_dim]``, ``frozen_value``, ``prefix_key [length -
    frozen_tokens, kv_heads, head_dim]``, ``prefix_value``.

    >>> import jpeft
    >>> method = jpeft.methods.Cartridge(length=32, frozen_tokens=1)
    """

    frozen_tokens: int = 1
    shift_positions: bool = True

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.06266"
    non_trainable: ClassVar[frozenset[str]] = frozenset({"frozen_key", "frozen_value"})
    rules: ClassVar[Mapping[str, Rule]] = {
        "frozen_tokens": _FROZEN,
        "reparametrize": (lambda value: value is False, "False: its keys and values are what trains"),
    }
    hf: ClassVar[HFSpec] = HFSpec(
        "CARTRIDGE",
        PREFIX_TENSORS,
        (*PREFIX_FIELDS, Field("num_frozen_tokens", "frozen_tokens", default=1, rule=_FROZEN)),
        constants=PREFIX_CONSTANTS,
        prompt=KEYS_VALUES,
        implied=PREFIX_IMPLIED,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen_tokens >= self.length:
            raise ValueError(
                f"{self.name}.frozen_tokens must be fewer than length, {self.length}, or nothing trains; got "
                f"{self.frozen_tokens}"
            )

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return self.stored(super().init(key, site, w))

    def stored(self, prefix: Leaves) -> Leaves:
        n = self.frozen_tokens
        frozen = {f"frozen_{name}": prefix[f"prefix_{name}"][:n] for name in _NAMES} if n else {}
        return {**frozen, **{f"prefix_{name}": prefix[f"prefix_{name}"][n:] for name in _NAMES}}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        if not self.frozen_tokens:
            return leaves
        return {
            f"prefix_{name}": jnp.concatenate([leaves[f"frozen_{name}"], leaves[f"prefix_{name}"]]) for name in _NAMES
        }
