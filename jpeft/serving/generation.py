"""Generation of token ids with a decoder and a key-value cache, with or without an adapter.

    tokens = jpeft.generate(model, params, [[1, 17, 4]], max_new_tokens=64, stop_ids=(2,))
    tokens = jpeft.generate(model, params, prompts, peft=peft, adapter=adapter, temperature=0.7, key=jax.random.key(0))

Two programs are compiled per shape: prefill reads the prompts and samples the first token, decode loops over further
tokens. Prompts are padded on the left to a power of two, and so is the cache; other lengths, limits and sampling
settings compile nothing new. The samples of a row depend on the key, its index and its own tokens only. Virtual tokens
of an adapter come in with the prompts; they take positions and places in the cache. Adapters of a bank run in one
batch.

On a CPU, unroll the layers (`jpeft.models.unroll`): a scan copies each layer's weights before it uses them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jpeft.core.bank import Bank
from jpeft.core.peft import Peft
from jpeft.core.rows import Grouping, group
from jpeft.core.tree import split_arrays
from jpeft.models.decoder import Decoder
from jpeft.models.kv_cache import grow_cache, init_cache
from jpeft.serving.rows import Forward
from jpeft.serving.sampling import INVALID, GenerationError, Sampling, Settings, check_prompts, sample


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    peft: Peft | None = None,
    adapter: Any = None,
    adapter_ids: Sequence[Any] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    vocabulary: int | None = None,
    min_prompt_length: int = 16,
    arguments: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts.

    Args:
      model: a decoder of `jpeft.models`.
      params: its parameters.
      prompts: token ids, of any lengths.
      peft: the bound method of `adapter`.
      adapter: an adapter to apply; or a bank of adapters, from `jpeft.stack`.
      adapter_ids: with a bank, the adapter of each prompt: its name, None for the base, or its slot. Prompts of one
        adapter share its copy, if all have as many.
      max_new_tokens: the maximum for each prompt. None: 256, or as many as the longest prompt leaves of the context.
      temperature: 0: greedy decoding. Above 0: sampling from softmax(logits / temperature), which needs a `key`.
      top_k: sample from the k most likely tokens.
      top_p: sample from the most likely tokens with this total probability.
      stop_ids: token ids that end a row. None: the `eos_token_id` of the model's config. (): none.
      key: the random key for sampling.
      vocabulary: never generate ids from here on; for embeddings with more rows than the tokenizer has tokens.
      min_prompt_length: pad prompts to at least this length. A larger one means fewer programs to compile.
      arguments: arguments of the model's call that are the adapter's own, such as `{"task_ids": jnp.array([0, 1])}`.

    Returns:
      The new tokens of each prompt, including its stop id.

    Raises:
      GenerationError: a prompt is empty, too long for the model's context or has ids outside the vocabulary; a setting
        is out of range; the logits are not finite.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> cfg = DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                     num_attention_heads=4, num_key_value_heads=2)
    >>> model = Decoder(cfg)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> [len(row) for row in generate(model, params, [[3, 1, 4], [1]], max_new_tokens=5)]
    [5, 5]
    """
    settings = Settings(max_new_tokens, temperature, top_k, top_p, stop_ids, key, vocabulary, min_prompt_length)
    decoding = _Decoding.of(model, params, peft, adapter, adapter_ids, arguments, prompts, settings)
    decoding.advance(decoding.limit - 1)
    return decoding.rows()


def stream(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    peft: Peft | None = None,
    adapter: Any = None,
    adapter_ids: Sequence[Any] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    key: Key[Array, ""] | None = None,
    vocabulary: int | None = None,
    min_prompt_length: int = 16,
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[list[int | None]]:
    """Yields the tokens of `generate` step by step: the new token of each row, None once the row has ended.

    Args: as for `generate`. They are checked at once, before the first token is requested.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...                               num_attention_heads=4))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> len(list(stream(model, params, [[3, 1, 4]], max_new_tokens=5)))
    5
    """
    settings = Settings(max_new_tokens, temperature, top_k, top_p, stop_ids, key, vocabulary, min_prompt_length)
    return _Decoding.of(model, params, peft, adapter, adapter_ids, arguments, prompts, settings).steps()


def bucket(length: int, min_prompt_length: int, most: int) -> int:
    """The padded length: a power of two, at least `min_prompt_length` and at most `most`.

    >>> bucket(5, 16, 8192), bucket(17, 16, 8192), bucket(5000, 16, 6000)
    (16, 32, 6000)
    """
    return max(length, min(most, max(min_prompt_length, 1 << (length - 1).bit_length())))


# -------------------------------------------------------------------------------------------------------- arguments


class _Trees(NamedTuple):
    """The trees of a call: the model's parameters, an adapter or None, and arguments that are the adapter's."""

    params: Any
    adapter: Any
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Forward(Forward):
    """The model, with its bound method if there is one, for rows that may be grouped.

    Attributes:
      model, peft: see `Forward`.
      size: the number of rows that lie together and share an adapter; 0: all rows share one. Otherwise groups of rows
        stand in front of adapters and caches: so each has its keys and values in one place.
    """

    size: int = 0

    @classmethod
    def of(cls, model: Any, peft: Peft | None, adapter: Any) -> _Forward:
        if not isinstance(model, Decoder):
            raise TypeError(
                f"model must be a decoder of jpeft.models, got {type(model).__name__}; another decoder has its own "
                "sampler, which takes peft.module(params, adapter)"
            )
        peft = adapter.source if peft is None and isinstance(adapter, Bank) else peft
        if (peft is None) != (adapter is None):
            raise GenerationError("peft and adapter must be given together")
        if peft is not None and peft.model != model:
            raise GenerationError(
                "the Peft was bound to another model; if the layers of one are unrolled, see jpeft.models.unroll"
            )
        return cls(model, peft)

    def logits(
        self, trees: _Trees, input_ids: jax.Array, cache: Any, continues: bool, **kwargs: Any
    ) -> tuple[jax.Array, Any]:
        """The logits of the last token, and the cache; `continues`: whether an earlier call has begun the cache."""
        if self.size:
            return self._by_group(trees, input_ids, cache, continues, kwargs)
        params, adapter, arguments = trees
        return self(params, adapter, input_ids, cache, continues, **arguments, **kwargs)

    def _by_group(
        self, trees: _Trees, input_ids: jax.Array, cache: Any, continues: bool, kwargs: Mapping[str, Any]
    ) -> tuple[jax.Array, Any]:
        """As `logits`, each group of rows under its own adapter."""
        peft, rows, structure = self.peft, len(input_ids), []
        assert peft is not None
        one_group = replace(self, size=0)

        def one(adapter: Any, given: Any, held: Any) -> Any:
            ids, own = restore(given)
            with_own = trees._replace(adapter=adapter, arguments={n: own.pop(n) for n in trees.arguments})
            logits, cache = one_group.logits(with_own, ids, begun.unflatten(held), continues, **own)
            leaves, ended = jax.tree.flatten(cache)
            structure.append(ended)
            return logits, [x for x in leaves if x.ndim], [x for x in leaves if not x.ndim]

        arrays, restore = split_arrays((input_ids, {**trees.arguments, **kwargs}))
        per_row = [np.ndim(x) > 0 and len(x) == rows for x in arrays]
        arrays = [x.reshape(-1, self.size, *x.shape[1:]) if own else x for x, own in zip(arrays, per_row, strict=True)]
        held, begun = jax.tree.flatten(cache)
        axes = (
            peft.axes(trees.adapter),
            [0 if own else None for own in per_row],
            [0 if x.ndim else None for x in held],
        )
        logits, own, shared = jax.vmap(one, axes, (0, 0, None))(trees.adapter, arrays, held)
        return logits.reshape(rows, *logits.shape[2:]), _merged(structure[-1], own, shared)

    def empty_cache(self, rows: int, capacity: int) -> Any:
        """A cache for rows, in the form of a call."""
        cache = init_cache(self.model, self.size or rows, capacity)
        if not self.size:
            return cache
        return {n: jnp.zeros((rows // self.size, *x.shape), x.dtype) if x.ndim else x for n, x in cache.items()}


def _merged(structure: Any, own: Sequence[Any], shared: Sequence[Any]) -> Any:
    """A cache from the leaves that groups have each, and those that all share, which are numbers."""
    taken = jax.tree.unflatten(structure, range(structure.num_leaves))
    numbers = [path[-1] == jax.tree_util.DictKey("index") for path, _ in jax.tree.leaves_with_path(taken)]
    each, one = iter(own), iter(shared)
    return structure.unflatten([next(one) if is_number else next(each) for is_number in numbers])


def _left_padded(rows: Sequence[np.ndarray], width: int) -> tuple[jax.Array, jax.Array]:
    """Token ids `[batch, width]`, padded on the left, and their mask."""
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, width - row.size :], mask[i, width - row.size :] = row, True
    return jnp.asarray(ids), jnp.asarray(mask)


# --------------------------------------------------------------------------------------------------------- decoding


class _State(NamedTuple):
    """The state between two tokens."""

    cache: Any
    tokens: Int[Array, "batch room"]
    done: Bool[Array, " batch"]
    count: Int[Array, ""]  # new tokens so far


class _Decoding:
    """The generation of one batch. Prefill runs at once, decode on request."""

    @classmethod
    def of(
        cls,
        model: Any,
        params: Any,
        peft: Any,
        adapter: Any,
        ids: Any,
        arguments: Any,
        prompts: Any,
        settings: Settings,
    ) -> _Decoding:
        """The generation of prompts, after checks of its trees. Arguments as for `generate`."""
        forward, given = _Forward.of(model, peft, adapter), dict(arguments or {})
        peft = forward.peft
        own = {name for member in (() if peft is None else peft.method.methods()) for name in member.arguments}
        if unknown := [name for name in given if name not in own]:
            known = f"{peft.method.name} has {', '.join(sorted(own)) or 'none'}" if peft else "there is no adapter"
            raise GenerationError(f"arguments: {unknown[0]!r} is none of the adapter's own; {known}")
        trees = _Trees(params, adapter, given)
        if not isinstance(adapter, Bank):
            if ids is not None:
                raise GenerationError(
                    "adapter_ids choose from a bank of adapters, as from jpeft.stack; give it as adapter"
                )
            return cls(forward, trees, prompts, settings)
        return cls._of_bank(forward, trees, ids, prompts, settings)

    @classmethod
    def _of_bank(
        cls, forward: _Forward, trees: _Trees, ids: Any, prompts: Sequence[Sequence[int]], settings: Settings
    ) -> _Decoding:
        """The generation of prompts under adapters of a bank, those of one adapter side by side."""
        bank = trees.adapter
        if forward.peft != bank.source:
            raise GenerationError("the bank is of another Peft than the one that is given")
        try:
            slots = bank.ids(ids)
        except ValueError as error:
            raise GenerationError(str(error)) from error
        if len(slots) != len(prompts):
            raise GenerationError(f"adapter_ids has {len(slots)} entries for {len(prompts)} prompts")
        order = np.argsort(slots, kind="stable")
        groups = group(slots[order])
        if groups.size == 1:
            order, groups = np.arange(len(slots)), Grouping(slots, 1)
        given = {n: x[order] if np.ndim(x) and len(x) == len(slots) else x for n, x in trees.arguments.items()}
        rows = bank.take(jnp.asarray(groups.slots), trees.params)
        forward = replace(forward, peft=bank.peft, size=groups.size)
        return cls(forward, _Trees(trees.params, rows, given), [prompts[i] for i in order.tolist()], settings, order)

    def __init__(
        self,
        forward: _Forward,
        trees: _Trees,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        order: np.ndarray | None = None,
    ):
        settings.check()
        config, virtual = forward.model.config, forward.virtual_tokens
        rows = check_prompts(prompts, config, settings.max_new_tokens or 1, virtual)
        longest, room = max(row.size for row in rows), config.context - virtual
        new = settings.max_new_tokens
        self.limit = min(256, room - longest) if new is None else int(new)
        self.forward, self.trees = forward, trees
        self.order = np.arange(len(rows)) if order is None else order  # the number of each row's prompt
        self.sampling = jax.tree.map(lambda x: x[self.order], settings.sampling(config, len(rows)))
        width = bucket(longest, settings.min_prompt_length, room)
        capacity = virtual + bucket(width + self.limit, settings.min_prompt_length, 1 << 62)
        self.state = _prefill(forward, trees, *_left_padded(rows, width), self.sampling, capacity)

    def advance(self, steps: int) -> None:
        """Decodes up to `steps` more tokens."""
        if steps > 0:
            self.state = _decode(self.forward, self.trees, self.state, self.sampling, jnp.int32(steps))

    def progress(self) -> tuple[int, np.ndarray]:
        """The number of new tokens, and which rows have ended."""
        count = int(self.state.count)
        if bool((self.state.tokens[:, count - 1] == INVALID).any()):
            raise GenerationError("the model's logits are not finite (NaN or infinite); check its weights and dtype")
        return count, np.asarray(self.state.done)

    def rows(self) -> list[list[int]]:
        """The new tokens of each row, up to its stop id."""
        count, _ = self.progress()
        stops = set(np.asarray(self.sampling.stop_ids[0]).tolist())
        rows = []
        for row in np.asarray(self.state.tokens)[:, :count].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), count)
            rows.append(row[:end])
        return self._as_given(rows)

    def _as_given(self, rows: Sequence[Any]) -> list[Any]:
        """Values of rows in the order of the prompts."""
        return [rows[i] for i in np.argsort(self.order)]

    def steps(self) -> Iterator[list[int | None]]:
        """The new token of each row, step by step."""
        ended = np.zeros(self.state.done.shape, bool)
        while True:
            count, done = self.progress()
            tokens = np.asarray(self.state.tokens[:, count - 1]).tolist()
            yield self._as_given([None if end else token for end, token in zip(ended, tokens, strict=True)])
            if count >= self.limit or done.all():
                return
            ended = done
            self.advance(1)


@functools.partial(jax.jit, static_argnames=("forward", "capacity"))
def _prefill(
    forward: _Forward, trees: Any, ids: jax.Array, mask: jax.Array, sampling: Sampling, capacity: int
) -> _State:
    """Reads the prompts and samples the first token."""
    batch, width = ids.shape[0], ids.shape[1] + forward.virtual_tokens
    cache = forward.empty_cache(batch, width)  # no wider, so that attention skips the empty slots
    logits, cache = forward.logits(trees, ids, cache, continues=False, attention_mask=mask)
    token = sample(logits, sampling, 0)
    tokens = jnp.zeros((batch, capacity - width), jnp.int32).at[:, 0].set(token)
    return _State(grow_cache(cache, capacity), tokens, sampling.stops(token), jnp.int32(1))


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="state")
def _decode(forward: _Forward, trees: Any, state: _State, sampling: Sampling, steps: jax.Array) -> _State:
    """Generates up to `steps` more tokens, until every row has ended."""
    last = state.count + steps

    def unfinished(state: _State) -> jax.Array:
        failed = (jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1) == INVALID).any()
        return (state.count < last) & ~state.done.all() & ~failed

    def step(state: _State) -> _State:
        token = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1)
        logits, cache = forward.logits(trees, token, state.cache, continues=True)
        token = sample(logits, sampling, state.count)
        tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.count, axis=1)
        return _State(cache, tokens, state.done | sampling.stops(token), state.count + 1)

    return jax.lax.while_loop(unfinished, step, state)
