"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its scalings to longer contexts.

    [x1, x2] -> [x1 cos(p f) - x2 sin(p f), x2 cos(p f) + x1 sin(p f)],   f_i = theta^(-2i / head_dim),   p: position

A scaling changes the frequencies f: `linear` divides them all; `dynamic` raises theta as the sequence grows beyond the
trained length; `llama3` divides the low ones; `yarn` (https://arxiv.org/abs/2309.00071) divides those that complete
less than about one turn within the trained length, and scales queries and keys up a little.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "dynamic": ("original_max_position_embeddings",),  # HuggingFace reads it but does not use it
}
_IGNORED = {"rope_type", "type", "rope_theta", "finetuned"}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The frequencies of one kind of layer. Names are those of HuggingFace's `rope_scaling`; None: not given.

    >>> Rotary(theta=10000.0).frequencies(4, 2048).tolist()
    [1.0, 0.009999999776482582]
    """

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, head_dim: int, max_positions: int) -> np.ndarray:
        """The frequencies `[head_dim / 2]` in float32; those of `dynamic` within the trained length.

        Args:
          head_dim: the size of a head.
          max_positions: the config's `max_position_embeddings`.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        f = self.theta**-exponents
        if self.rope_type == "linear":
            f = f / self.factor
        elif self.rope_type == "llama3":
            f = self._llama3(f)
        elif self.rope_type == "yarn":
            f = self._yarn(f, self.original_max_position_embeddings or max_positions)
        return f.astype(np.float32)

    def _llama3(self, f: np.ndarray) -> np.ndarray:
        assert self.original_max_position_embeddings and self.low_freq_factor and self.high_freq_factor
        turns = self.original_max_position_embeddings * f / (2 * math.pi)  # within the trained length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return (1 - kept) * f / self.factor + kept * f

    def _yarn(self, f: np.ndarray, trained: int) -> np.ndarray:
        head_dim = 2 * len(f)

        def index(turns: float) -> float:  # of the frequency that completes so many turns within the trained length
            return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = index(self.beta_fast or 32), index(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        divided = np.clip((np.arange(len(f)) - low) / (high - low or 0.001), 0, 1)
        return (1 - divided) * f + divided * f / self.factor

    def scale(self) -> float:
        """The factor of queries and keys: 1 except for yarn.

        >>> round(Rotary(rope_type="yarn", factor=4.0).scale(), 4)
        1.1386
        """
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._yarn_scale(self.mscale) / self._yarn_scale(self.mscale_all_dim)
        return self._yarn_scale(1.0)

    def _yarn_scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def context(self, max_positions: int) -> int:
        """The number of positions that a model supports, from its config's `max_position_embeddings`.

        >>> Rotary(rope_type="linear", factor=4.0).context(2048), Rotary(rope_type="llama3").context(131072)
        (8192, 131072)
        """
        # Users add these two to a config that keeps the trained length; in the other types it is the new length.
        return int(max_positions * self.factor) if self.rope_type in ("linear", "dynamic") else max_positions

    def table(
        self, positions: Int[Array, "batch length"], head_dim: int, max_positions: int
    ) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
        """The cosines and sines of each position, float32."""
        f = jnp.asarray(self.frequencies(head_dim, max_positions))
        if self.rope_type == "dynamic":
            longest = positions.max(axis=1, keepdims=True) + 1  # by row, so that a result does not depend on the batch
            longest = jnp.maximum(longest, max_positions).astype(jnp.float32)[..., None]
            grown = self.factor * longest / max_positions - (self.factor - 1)
            theta = self.theta * grown ** (head_dim / (head_dim - 2))
            f = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angles = positions.astype(jnp.float32)[..., None] * f
        return jnp.cos(angles) * self.scale(), jnp.sin(angles) * self.scale()


def rotate(
    x: Float[Array, "batch length heads head_dim"], table: tuple[jax.Array, jax.Array]
) -> Float[Array, "batch length heads head_dim"]:
    """Queries or keys rotated by their positions, in float32.

    >>> x = jnp.ones((1, 2, 3, 4))
    >>> bool((rotate(x, Rotary().table(jnp.zeros((1, 2), int), 4, 8)) == x).all())
    True
    """
    cos, sin = (t[..., None, :] for t in table)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def from_config(given: Mapping[str, Any] | None, theta: float) -> Rotary:
    """The rotary embedding that a config's `rope_scaling` (or transformers 5's `rope_parameters`) describes.

    Raises:
      ValueError: a type or a field is not supported, or a required field is missing.

    >>> from_config({"rope_type": "linear", "factor": 2}, 10000.0).factor
    2.0
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"rope_scaling={given!r} is not an object")
    given = dict(given or {})
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise ValueError(f"rope_type {kind!r} is not supported, only {', '.join(_REQUIRED)}")
    known = {*_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    if unknown := sorted(k for k in given.keys() - known - _IGNORED if given[k] is not None):
        raise ValueError(
            f"{kind} rope scaling has no {', '.join(unknown)}, only {', '.join(sorted(known)) or 'no field'}"
        )
    if missing := [name for name in _REQUIRED[kind] if given.get(name) is None]:
        raise ValueError(f"{kind} rope scaling lacks {', '.join(missing)}")
    values = {name: _number(name, given[name]) for name in known if given.get(name) is not None}
    rotary = Rotary(theta=_number("rope_theta", given.get("rope_theta", theta)), rope_type=kind, **values)
    if kind == "llama3" and not rotary.low_freq_factor < rotary.high_freq_factor:  # type: ignore[operator]
        raise ValueError("llama3 rope scaling needs low_freq_factor < high_freq_factor")
    return rotary


def _number(name: str, value: Any) -> Any:
    if name == "truncate" and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{name}={value!r:.40} in the rope scaling is not a positive number")
    return value if name == "original_max_position_embeddings" else float(value)


def to_config(rotary: Rotary) -> dict[str, Any] | None:
    """HuggingFace's `rope_scaling`; None without scaling. Inverse of `from_config`.

    >>> to_config(Rotary()), to_config(Rotary(rope_type="linear", factor=2.0))
    (None, {'rope_type': 'linear', 'factor': 2.0})
    """
    if rotary.rope_type == "default":
        return None
    names = (*_REQUIRED[rotary.rope_type], *_OPTIONAL.get(rotary.rope_type, ()))
    fields = {name: getattr(rotary, name) for name in names}
    return {"rope_type": rotary.rope_type, **{k: v for k, v in fields.items() if v is not None}}
