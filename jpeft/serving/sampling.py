"""Sampling of the next token: settings, their checks, and the draw, each row under its own settings.

    p(token) ~ exp(logit / temperature)     over the `top_k` most likely, and of these the fewest that make up `top_p`

A row's draw depends on its key, on how many tokens it has, and on its logits, and on nothing of other rows.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jpeft.checks import is_number

INVALID = -2  # the token of a row whose logits are not finite
_HOTTEST = 1e9  # a temperature at which all tokens are equally likely in float32
_STOP_IDS = 8  # stop ids are padded to a multiple of it


class GenerationError(ValueError):
    """Prompts or settings that generation cannot run with."""


@dataclass(frozen=True)
class Settings:
    """Arguments of `jpeft.generate`.

    >>> Settings(max_new_tokens=0).check()
    Traceback (most recent call last):
    jpeft.serving.sampling.GenerationError: max_new_tokens must be a positive integer, got 0
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_ids: Sequence[int] | None = None
    key: Key[Array, ""] | None = None
    vocabulary: int | None = None
    min_prompt_length: int = 16

    def check(self) -> None:
        """Raises a `GenerationError` if a setting is out of range."""
        for name in ("max_new_tokens", "top_k", "vocabulary"):
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and value > 0):
                raise GenerationError(f"{name} must be a positive integer, got {value!r}")
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise GenerationError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise GenerationError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        stop_ids = () if self.stop_ids is None else self.stop_ids
        if not isinstance(stop_ids, Collection) or not all(_is_integer(i) and i >= 0 for i in stop_ids):
            raise GenerationError(f"stop_ids must be token ids, from 0 on, got {stop_ids!r}")
        if self.temperature > 0 and self.key is None:
            raise GenerationError("sampling with a temperature above 0 needs a key, e.g. key=jax.random.key(0)")

    def stops(self, config: Any) -> list[int]:
        """The token ids that end a row; by default, those of a model's config."""
        eos = config.eos_token_id if self.stop_ids is None else tuple(self.stop_ids)
        return [int(i) for i in (eos if isinstance(eos, tuple) else () if eos is None else (eos,))]

    def sampling(self, config: Any, batch: int) -> Sampling:
        """The settings as arrays, the same for each row but its key, with the defaults of a model's config."""
        stops = self.stops(config)
        stops += [-1] * (-len(stops) % _STOP_IDS or (0 if stops else _STOP_IDS))
        size = config.vocab_size
        vocabulary = size if self.vocabulary is None else min(self.vocabulary, size)
        key = jax.random.key(0) if self.key is None else self.key  # unused at a temperature of 0
        top_k = vocabulary if self.top_k is None else min(self.top_k, vocabulary)
        return Sampling(
            keys=_row_keys(key, batch),
            temperature=np.full((batch,), min(self.temperature, _HOTTEST), np.float32),
            top_k=np.full((batch,), top_k, np.int32),
            top_p=np.full((batch,), 1.0 if self.top_p is None else self.top_p, np.float32),
            stop_ids=np.full((batch, len(stops)), stops, np.int32),
            vocabulary=np.full((batch,), vocabulary, np.int32),
        )


@functools.partial(jax.jit, static_argnums=1)
def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class Sampling(NamedTuple):
    """The sampling settings of each row as arrays, so that other values compile nothing new.

    Attributes:
      keys: random keys.
      temperature: 0: greedy.
      top_k: the size of the vocabulary: off.
      top_p: 1: off.
      stop_ids: ids that end a row, padded with -1.
      vocabulary: ids from here on are never generated.
    """

    keys: Key[Array, " batch"]
    temperature: Float[Array | np.ndarray, " batch"]
    top_k: Int[Array | np.ndarray, " batch"]
    top_p: Float[Array | np.ndarray, " batch"]
    stop_ids: Int[Array | np.ndarray, "batch stops"]
    vocabulary: Int[Array | np.ndarray, " batch"]

    def stops(self, token: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        """Whether the token of each row ends it."""
        return (token[:, None] == self.stop_ids).any(axis=1)


def check_prompts(prompts: Sequence[Sequence[int]], config: Any, new: int, virtual: int) -> list[np.ndarray]:
    """The prompts as arrays, if the model takes each of them with `new` tokens and the adapter's `virtual` ones.

    Raises:
      GenerationError: there are none, or one is empty, too long, or has ids outside the vocabulary.

    >>> from jpeft.models.decoder import DecoderConfig
    >>> check_prompts([[3, 1]], DecoderConfig(vocab_size=50), new=5, virtual=0)
    [array([3, 1])]
    """
    if not len(prompts):
        raise GenerationError("no prompts")
    return [check_prompt(prompt, config, new, virtual, f"prompt {i}") for i, prompt in enumerate(prompts)]


def check_prompt(
    prompt: Sequence[int], config: Any, new: int, virtual: int = 0, name: str = "the prompt"
) -> np.ndarray:
    """A prompt as an array. Arguments and errors as for `check_prompts`.

    >>> from jpeft.models.decoder import DecoderConfig
    >>> check_prompt([3, 99], DecoderConfig(vocab_size=50), new=5)
    Traceback (most recent call last):
    jpeft.serving.sampling.GenerationError: the prompt has the token id 99, but the vocabulary is 0 to 49
    """
    row = np.asarray(prompt)
    if row.ndim != 1 or not row.size:
        raise GenerationError(f"{name} is {'not a sequence of token ids' if row.size else 'empty'}")
    if not np.issubdtype(row.dtype, np.integer):
        raise GenerationError(f"{name} has the dtype {row.dtype.name}, expected integer token ids")
    if row.min() < 0 or row.max() >= config.vocab_size:
        bad = row[(row < 0) | (row >= config.vocab_size)][0]
        raise GenerationError(f"{name} has the token id {bad}, but the vocabulary is 0 to {config.vocab_size - 1}")
    if row.size + new + virtual > config.context:
        raise GenerationError(
            f"{name} has {row.size} tokens; with {new} new ones{_and_virtual(virtual)} it exceeds the model's "
            f"context of {config.context}; shorten it, or reduce max_new_tokens"
        )
    return row


def _and_virtual(virtual: int) -> str:
    return f" and the {virtual} virtual tokens of the adapter" if virtual else ""


def sample(logits: Float[Array, "batch vocabulary"], sampling: Sampling, count: Any) -> Int[Array, " batch"]:
    """The next token of each row; `INVALID` where the logits are not finite.

    Args:
      logits: the logits.
      sampling: the settings of each row.
      count: the number of tokens that a row has, one for all or one for each.

    >>> from jpeft.models.decoder import DecoderConfig
    >>> sampling = Settings().sampling(DecoderConfig(vocab_size=3), batch=1)
    >>> sample(jnp.array([[0.1, 0.7, 0.2]]), sampling, 0).tolist()
    [1]
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < sampling.vocabulary[:, None], logits, -jnp.inf)
    greedy, warm = logits.argmax(axis=-1), sampling.temperature > 0

    def sampled() -> jax.Array:
        # The largest logit becomes 0, so that no temperature is low enough to make it infinite; and those that are out
        # of the question stay so, which a product with 1 / temperature would not see to.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(warm, sampling.temperature, 1.0)[:, None]
        scaled = jnp.where(jnp.isneginf(logits), -jnp.inf, scaled)
        narrow = warm & ((sampling.top_k < sampling.vocabulary) | (sampling.top_p < 1.0))
        top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
        kept = jax.lax.cond(narrow.any(), lambda: most_likely(scaled, top_k, top_p), lambda: scaled)
        counts = jnp.broadcast_to(jnp.asarray(count, jnp.int32), warm.shape)
        keys = jax.vmap(jax.random.fold_in)(sampling.keys, counts)
        return jnp.where(warm, jax.vmap(jax.random.categorical)(keys, kept), greedy)

    token = jax.lax.cond(warm.any(), sampled, lambda: greedy)
    finite = jnp.isfinite(logits.max(axis=-1))
    return jnp.where(finite, token, INVALID).astype(jnp.int32)


def most_likely(logits: Float[Array, "batch vocabulary"], top_k: Any, top_p: Any) -> jax.Array:
    """Logits of the `top_k` most likely tokens, and of these the fewest that make up `top_p`; -inf elsewhere.

    Args:
      logits: the logits.
      top_k: one for all rows, or `[batch, 1]`.
      top_p: likewise; 1 keeps all.

    >>> most_likely(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), 3, 0.7).tolist()[0][0]
    -inf
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    ordered = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf)
    share = jax.nn.softmax(ordered, axis=-1)
    above = jnp.cumsum(share, axis=-1) - share
    ordered = jnp.where((above < top_p) | (top_p >= 1), ordered, -jnp.inf)  # rounded, `above` may reach 1
    return jnp.put_along_axis(logits, order, ordered, axis=-1, inplace=False)
