"""Generation with a decoder over a cache of keys and values, with or without an adapter.

    tokens = jpeft.generate(model, params, [[1, 17, 4]], max_new_tokens=64, stop_ids=(2,))
    tokens = jpeft.generate(model, params, prompts, peft=peft, adapter=adapter, temperature=0.7, key=jax.random.key(0))

Two programs are compiled for a shape: one reads the prompts and draws the first token, one loops over tokens. Prompts
are padded on the left to a power of two and so is the cache, so that lengths, limits and sampling settings change
nothing that is compiled. What a row draws depends on the key, its own number and its own tokens alone.

On a CPU, give the layers one by one (`jpeft.models.unroll`): a scan copies each layer's weights before it uses them.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jpeft.core.peft import Peft
from jpeft.models.decoder import Decoder, grow_cache, init_cache

_NO_TOKEN = -2  # where the logits are no numbers
_STOPS = 8  # stop ids are padded to a multiple of it


@dataclass(frozen=True)
class _Runner:
    """What is static in a compiled program."""

    model: Decoder
    peft: Peft | None

    def __call__(self, trees: tuple[Any, Any], input_ids: jax.Array, **kwargs: Any) -> tuple[jax.Array, Any]:
        params, adapter = trees
        if self.peft is None:
            return self.model.apply({"params": params}, input_ids, **kwargs)
        return self.peft.apply(params, adapter, input_ids, **kwargs)


class GenerationError(ValueError):
    """Prompts or settings that cannot be generated from; the message says which and why."""


class _Sampling(NamedTuple):
    """Arrays, so that another temperature is no other program."""

    keys: Key[Array, " batch"]  # one a row
    temperature: Float[Array, ""]  # 0: the likeliest token
    top_k: Int[Array, ""]  # as large as the vocabulary: off
    top_p: Float[Array, ""]  # 1: off
    stop_ids: Int[Array, " stops"]
    vocabulary: Int[Array, ""]  # ids from here on are never drawn


class _State(NamedTuple):
    """Between two tokens."""

    cache: Any
    tokens: Int[Array, "batch room"]
    done: Bool[Array, " batch"]
    count: Int[Array, ""]  # of tokens drawn


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    peft: Peft | None = None,
    adapter: Any = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    vocabulary: int | None = None,
    min_prompt_length: int = 16,
) -> list[list[int]]:
    """Continues a batch of prompts.

    Args:
      model: a decoder of `jpeft.models`. params: its tree.
      prompts: token ids, of any lengths.
      peft, adapter: to run it under; the Peft of this model.
      max_new_tokens: at most so many for each prompt. None is 256, or what the longest prompt leaves of the context.
      temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature), and `key` is
        needed. top_k: of the k likeliest only. top_p: of the likeliest that make up this probability.
      stop_ids: ids that end a row. None is what the model's config has as `eos_token_id`; () ends none.
      vocabulary: only ids below are drawn, where the embedding has more rows than the tokenizer has tokens.
      min_prompt_length: prompts are padded to this length at least; a larger one means fewer programs to compile.

    Returns:
      The new tokens of each prompt, up to and with its stop id.

    Raises:
      GenerationError: no prompts, an empty one, an id outside the vocabulary, more tokens than the model has positions
        for, a setting that makes no sense; weights under which the logits are no numbers.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> cfg = DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                     num_attention_heads=4, num_key_value_heads=2)
    >>> model = Decoder(cfg)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> [len(row) for row in generate(model, params, [[3, 1, 4], [1]], max_new_tokens=5)]
    [5, 5]
    """
    steps = _Steps(model, params, prompts, peft, adapter, max_new_tokens, temperature, top_k, top_p, stop_ids, key,
                   vocabulary, min_prompt_length)  # fmt: skip
    steps.advance(steps.limit - 1)
    return steps.rows()


def stream(
    model: Decoder, params: Any, prompts: Sequence[Sequence[int]], **settings: Any
) -> Iterator[list[int | None]]:
    """The same tokens one by one, as they are made: for each step the new token of each row, None once it has ended.

    Arguments as for `generate`; they are checked at once.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                               num_attention_heads=4))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> len(list(stream(model, params, [[3, 1, 4]], max_new_tokens=5)))
    5
    """
    return _one_by_one(_Steps(model, params, prompts, **{**(generate.__kwdefaults__ or {}), **settings}))


def _one_by_one(steps: _Steps) -> Iterator[list[int | None]]:
    before = np.zeros(steps.batch, bool)
    while True:
        count, done = steps.progress()
        token = np.asarray(steps.state.tokens[:, count - 1])
        yield [None if ended else int(t) for ended, t in zip(before, token, strict=True)]
        if count >= steps.limit or done.all():
            return
        before = done
        steps.advance(1)


def bucket(length: int, min_prompt_length: int, most: int) -> int:
    """The length that `length` is padded to: a power of two, but not below `min_prompt_length` or above `most`.

    >>> bucket(5, 16, 8192), bucket(17, 16, 8192), bucket(5000, 16, 6000)
    (16, 32, 6000)
    """
    return max(length, min(most, max(min_prompt_length, 1 << (length - 1).bit_length())))


class _Steps:
    """One generation under way."""

    def __init__(
        self,
        model: Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        peft: Peft | None,
        adapter: Any,
        max_new_tokens: int | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop_ids: Sequence[int] | None,
        key: Key[Array, ""] | None,
        vocabulary: int | None,
        min_prompt_length: int,
    ):
        if not isinstance(model, Decoder):
            raise TypeError(f"model must be a decoder of jpeft.models, got {type(model).__name__}")
        if (peft is None) != (adapter is None):
            raise GenerationError("give peft and adapter together, or neither")
        if peft is not None and peft.model != model:
            raise GenerationError(
                "the Peft was bound to another model; are layers stacked in one? see jpeft.models.unroll"
            )
        if stop_ids is None:
            eos = model.config.eos_token_id
            stop_ids = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
        _check_settings(max_new_tokens, temperature, top_k, top_p, stop_ids, key, vocabulary)
        ids, mask, max_new_tokens = _left_padded(prompts, model.config, max_new_tokens, min_prompt_length)
        self.batch, width = ids.shape
        self.limit, self.run, self.trees = max_new_tokens, _Runner(model, peft), (params, adapter)
        most = model.config.vocab_size
        vocabulary = most if vocabulary is None else min(vocabulary, most)
        stops = [int(i) for i in stop_ids]
        stops += [-1] * (-len(stops) % _STOPS or (0 if stops else _STOPS))
        key = jax.random.key(0) if key is None else key  # not used where the temperature is 0
        self.sampling = _Sampling(
            keys=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.batch)),
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(vocabulary if top_k is None else min(top_k, vocabulary)),
            top_p=jnp.float32(1.0 if top_p is None else top_p),
            stop_ids=jnp.asarray(stops, jnp.int32),
            vocabulary=jnp.int32(vocabulary),
        )
        capacity = bucket(width + max_new_tokens, min_prompt_length, 1 << 62)
        self.state = _prefill(self.run, self.trees, ids, mask, self.sampling, capacity)

    def advance(self, steps: int) -> None:
        if steps > 0:
            self.state = _decode(self.run, self.trees, self.state, self.sampling, jnp.int32(steps))

    def progress(self) -> tuple[int, np.ndarray]:
        count = int(self.state.count)
        if bool((self.state.tokens[:, count - 1] == _NO_TOKEN).any()):
            raise GenerationError("the model's logits are no numbers (NaN or infinite): look at its weights, and dtype")
        return count, np.asarray(self.state.done)

    def rows(self) -> list[list[int]]:
        count, _ = self.progress()
        stops = set(np.asarray(self.sampling.stop_ids).tolist())
        rows = []
        for row in np.asarray(self.state.tokens)[:, :count].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), count)
            rows.append(row[:end])
        return rows


@functools.partial(jax.jit, static_argnames=("run", "capacity"))
def _prefill(run: _Runner, trees: Any, ids: jax.Array, mask: jax.Array, sampling: _Sampling, capacity: int) -> _State:
    batch, width = ids.shape
    cache = init_cache(run.model, batch, width)  # as wide as the prompts: they need not look at empty slots
    logits, cache = run(trees, ids, attention_mask=mask, cache=cache, logits_to_keep=1)
    token = _draw(logits[:, -1], sampling, 0)
    tokens = jnp.zeros((batch, capacity - width), jnp.int32).at[:, 0].set(token)
    return _State(grow_cache(cache, capacity), tokens, jnp.isin(token, sampling.stop_ids), jnp.int32(1))


@functools.partial(jax.jit, static_argnames="run", donate_argnames="state")
def _decode(run: _Runner, trees: Any, state: _State, sampling: _Sampling, steps: jax.Array) -> _State:
    """Up to `steps` more tokens, until every row has ended."""
    last = state.count + steps

    def go_on(state: _State) -> jax.Array:
        failed = (jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1) == _NO_TOKEN).any()
        return (state.count < last) & ~state.done.all() & ~failed

    def step(state: _State) -> _State:
        token = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1)
        logits, cache = run(trees, token, cache=state.cache)
        token = _draw(logits[:, -1], sampling, state.count)
        tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.count, axis=1)
        return _State(cache, tokens, state.done | jnp.isin(token, sampling.stop_ids), state.count + 1)

    return jax.lax.while_loop(go_on, step, state)


def _draw(logits: Float[Array, "batch vocabulary"], sampling: _Sampling, count: Any) -> Int[Array, " batch"]:
    """The next token of each row."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < sampling.vocabulary, logits, -jnp.inf)

    def sampled() -> jax.Array:
        # The likeliest are at 0, so that no temperature is low enough to make them infinite.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
        off = (sampling.top_k >= sampling.vocabulary) & (sampling.top_p >= 1.0)
        kept = jax.lax.cond(off, lambda: scaled, lambda: _likeliest(scaled, sampling.top_k, sampling.top_p))
        keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, count)
        return jax.vmap(jax.random.categorical)(keys, kept)

    token = jax.lax.cond(sampling.temperature > 0, sampled, lambda: logits.argmax(axis=-1))
    sound = jnp.isfinite(logits.max(axis=-1))
    return jnp.where(sound, token, _NO_TOKEN).astype(jnp.int32)


def _likeliest(logits: Float[Array, "batch vocabulary"], top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Minus infinity but for the `top_k` likeliest, and of these the fewest that make up `top_p` of them."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    ordered = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf)
    share = jax.nn.softmax(ordered, axis=-1)
    above = jnp.cumsum(share, axis=-1) - share
    ordered = jnp.where((above < top_p) | (top_p >= 1), ordered, -jnp.inf)  # rounded, `above` may reach 1
    return jnp.put_along_axis(logits, order, ordered, axis=-1, inplace=False)


def _left_padded(
    prompts: Sequence[Sequence[int]], cfg: Any, new: int | None, min_prompt_length: int
) -> tuple[jax.Array, jax.Array, int]:
    """Prompts as one array, `[batch, bucket]`, where it holds tokens, and the limit of new ones."""
    if not len(prompts):
        raise GenerationError("no prompts")
    rows = []
    for i, prompt in enumerate(prompts):
        row = np.asarray(prompt)
        if row.ndim != 1 or not row.size:
            raise GenerationError(f"prompt {i} is empty" if not row.size else f"prompt {i} is no sequence of token ids")
        if not np.issubdtype(row.dtype, np.integer):
            raise GenerationError(f"prompt {i} holds {row.dtype.name}, expected token ids")
        if row.min() < 0 or row.max() >= cfg.vocab_size:
            bad = row[(row < 0) | (row >= cfg.vocab_size)][0]
            raise GenerationError(f"prompt {i} has the token id {bad}, but the vocabulary is 0 to {cfg.vocab_size - 1}")
        if row.size + (new or 1) > cfg.context:
            raise GenerationError(
                f"prompt {i} has {row.size} tokens; with {new or 1} new ones it is longer than the model's context of "
                f"{cfg.context}; shorten it, or ask for fewer new tokens"
            )
        rows.append(row)
    longest = max(row.size for row in rows)
    width = bucket(longest, min_prompt_length, cfg.context)
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, width - row.size :], mask[i, width - row.size :] = row, True
    return jnp.asarray(ids), jnp.asarray(mask), min(256, cfg.context - longest) if new is None else int(new)


def _check_settings(
    new: Any, temperature: Any, top_k: Any, top_p: Any, stop_ids: Any, key: Any, vocabulary: Any
) -> None:
    for name, value in (("max_new_tokens", new), ("top_k", top_k), ("vocabulary", vocabulary)):
        if not (_is_whole(value) and value > 0) and value is not None:
            raise GenerationError(f"{name} must be a whole number from 1, got {value!r}")
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise GenerationError(f"temperature must be a number from 0, got {temperature!r}")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise GenerationError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    if not isinstance(stop_ids, Collection) or not all(map(_is_whole, stop_ids)):
        raise GenerationError(f"stop_ids must be token ids, got {stop_ids!r}")
    if temperature > 0 and key is None:
        raise GenerationError("a temperature above 0 draws tokens at random: give a key, e.g. key=jax.random.key(0)")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
