"""The two programs of an engine, over rows that hold one request each: prefill of a chunk of one, and decode of all.

A row is a batch of one for the model, mapped over rows: it has its own place in its own cache, its own adapter,
gathered once, and its own sampling. Only the model is mapped: a mapped branch, as sampling has, runs both its sides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jpeft.core.actions import Action
from jpeft.core.entering import continuing
from jpeft.core.peft import Peft
from jpeft.core.sites import stack_first
from jpeft.core.tree import Path, flatten, unflatten
from jpeft.models.decoder import Decoder
from jpeft.models.kv_cache import init_cache
from jpeft.serving.sampling import INVALID, Sampling, sample

NOTHING = -1  # the token of a row that decodes none
_LARGE = ("key", "value")


@dataclass(frozen=True)
class Forward:
    """A decoder with its bound method, if there is one. Static in compiled programs.

    Attributes:
      model: the decoder.
      peft: the bound method.
    """

    model: Decoder
    peft: Peft | None

    @property
    def virtual_tokens(self) -> int:
        """The number of positions, and of places in a cache, that an adapter adds to a prompt."""
        return 0 if self.peft is None else self.peft.virtual_tokens

    @property
    def begins_apart(self) -> bool:
        """Whether a call that begins a text computes something else than one that continues it."""
        return self.peft is not None and any(member.enters for member in self.peft.method.methods())

    @property
    def reads_whole_prompts(self) -> bool:
        """Whether a method acts on tokens by their place in the prompt, which must then be read at once."""
        actions = () if self.peft is None else self.peft.actions
        return any(a.method.reads_context and not a.method.enters and not a.method.arguments for a in actions)

    def __call__(
        self, params: Any, adapter: Any, ids: Any, cache: Any, continues: bool, **kwargs: Any
    ) -> tuple[jax.Array, Any]:
        """The logits of the last token `[batch, vocabulary]`, and the cache."""
        if self.peft is None:
            logits, cache = self.model.apply({"params": params}, ids, cache=cache, logits_to_keep=1, **kwargs)
        else:
            with continuing(continues):
                logits, cache = self.peft.apply(params, adapter, ids, cache=cache, logits_to_keep=1, **kwargs)
        return logits[:, -1], cache


class Rows(NamedTuple):
    """The state of all rows. Leaves of `cache` and `adapter` have the rows in front of those of a batch of one.

    Attributes:
      cache: each row's own cache.
      adapter: each row's own adapter: its leaves, without those that a bank holds once.
      token: the last token.
      count: the number of new tokens.
      limit: the most of them.
      sampling: the settings.
    """

    cache: Any
    adapter: list[jax.Array]
    token: Int[Array, " rows"]
    count: Int[Array, " rows"]
    limit: Int[Array, " rows"]
    sampling: Sampling

    def unfinished(self) -> Bool[Array, " rows"]:
        """Whether a row has tokens to come, if it holds a request."""
        return (self.token != INVALID) & ~self.sampling.stops(self.token) & (self.count < self.limit)


class Chunk(NamedTuple):
    """A part of a request's prompt, and the request's settings.

    Attributes:
      ids: the token ids, padded on the left.
      mask: whether each is a token.
      row: the row of the request.
      slot: the slot of its adapter.
      first: whether it is the first chunk.
      limit: the most tokens to generate.
      sampling: its settings, of one row.
    """

    ids: Int[Array | np.ndarray, "1 length"]
    mask: Bool[Array | np.ndarray, "1 length"]
    row: Any
    slot: Any
    first: Any
    limit: Any
    sampling: Sampling


def empty_rows(forward: Forward, params: Any, bank: Any, rows: int, places: int, sampling: Sampling) -> Rows:
    """Rows without requests.

    Args:
      forward: the model and its method.
      params: the model's parameters; may be abstract.
      bank: the bank of adapters; None without a method.
      rows: the number of rows.
      places: the number of places in each row's cache.
      sampling: settings of one row, for the shapes.
    """
    if forward.peft is not None:
        for member in forward.peft.method.methods():
            if member.arguments:
                raise ValueError(
                    f"{member.name} reads {', '.join(member.arguments)} of each call, which requests do not have; "
                    "use jpeft.generate(…, arguments=…)"
                )

    def begun() -> tuple[Any, Any]:
        own = own_leaves(forward, bank, params, 0)
        cache, ids = init_cache(forward.model, 1, places), jnp.zeros((1, 1), jnp.int32)
        return forward(params, with_own_leaves(bank, own), ids, cache, continues=False)[1], own

    cache, adapter = jax.eval_shape(begun)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros((rows, *x.shape), x.dtype))
    token, count, limit = (jnp.zeros((rows,), jnp.int32) for _ in range(3))  # each donated, so none twice
    repeated = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), rows, axis=0), sampling)
    return Rows(zeros(cache), zeros(adapter), token, count, limit, repeated)


# --- adapters ---------------------------------------------------------------------------------------------------------


def own_leaves(forward: Forward, bank: Any, params: Any, slot: Any) -> list[jax.Array]:
    """The leaves of one adapter of a bank but for those that all share, in the dtype that they are computed in.

    Args:
      forward: the model and its method.
      bank: the bank; None without a method.
      params: the model's parameters.
      slot: the adapter's slot.
    """
    if bank is None:
        return []
    leaves, dtypes = flatten(bank.row(slot, params)), _dtypes(forward)
    return [leaves[path].astype(dtypes.get(path, leaves[path].dtype)) for path in _own_paths(bank)]


def with_own_leaves(bank: Any, own: list[jax.Array]) -> Any:
    """A row's adapter, from its own leaves and those that all adapters of a bank share. Inverse of `own_leaves`."""
    if bank is None:
        return None
    return unflatten({**flatten(bank.leaves), **dict(zip(_own_paths(bank), own, strict=True))})


def _own_paths(bank: Any) -> list[Path]:
    """The paths of the leaves that differ between adapters."""
    return sorted(path for path, axis in flatten(bank.axes).items() if axis is not None)


def _dtypes(forward: Forward) -> dict[Path, Any]:
    """The dtype of the computation for each leaf of floating numbers that methods cast to it in every call.

    Leaves that a method takes as they are, or computes others from, keep theirs.
    """
    peft, dtype = forward.peft, jnp.dtype(forward.model.dtype or forward.model.param_dtype)
    assert peft is not None
    sizes = {path: jax.ShapeDtypeStruct(shape, own) for path, (shape, own) in peft.structure}
    actions = [a for a in peft.actions if a.site.kind != "leaf" and not _computes(peft, a, sizes)]
    cast = {a.leaf_path(name) for a in actions for name in a.stored if name not in {*a.method.uncast, a.mask}}
    return {path: dtype for path in cast if jnp.issubdtype(sizes[path].dtype, jnp.floating)}


def _computes(peft: Peft, action: Action, sizes: Mapping[Path, Any]) -> bool:
    """Whether a method computes the leaves that it applies from those that are stored."""
    if not action.method.expands:
        return False
    own, stack = peft.own(action, sizes), action.site.stack
    first = {n: jax.eval_shape(lambda x: stack_first(x, stack), x).shape for n, x in own.items() if n != action.mask}
    drop = len(stack) + len(action.site.batch)
    matrix = {n: jax.ShapeDtypeStruct(shape[drop:], own[n].dtype) for n, shape in first.items()}
    expand = functools.partial(action.method.expand, action.site)
    return bool(jax.make_jaxpr(lambda *args: dict(expand(*args)))(peft.shared(action, sizes), matrix).eqns)


# --- programs ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("forward", "continues"), donate_argnames="rows")
def prefill(
    forward: Forward, params: Any, bank: Any, rows: Rows, chunk: Chunk, continues: bool
) -> tuple[Rows, Int[Array, ""]]:
    """Reads a chunk of a prompt into its row, and samples the token after it, which counts after the last chunk.

    Args:
      forward: the model and its method.
      params: the model's parameters.
      bank: the bank of adapters.
      rows: all rows, which are donated.
      chunk: the chunk.
      continues: whether the model's call continues a text, see `Forward.begins_apart`.
    """
    at, first = chunk.row, chunk.first
    held = [x[at] for x in rows.adapter]
    new = own_leaves(forward, bank, params, chunk.slot)
    own = [jnp.where(first, x, old) for x, old in zip(new, held, strict=True)]
    # Zeros, since a value that is not finite would reach all tokens, with a weight of zero.
    cache = jax.tree.map(lambda x: jnp.where(first, jnp.zeros_like(x[at]), x[at]), rows.cache)
    if not continues:
        cache = {name: cache[name] for name in init_cache(forward.model, 1, 1)}
    logits, cache = forward(params, with_own_leaves(bank, own), chunk.ids, cache, continues, attention_mask=chunk.mask)
    token = sample(logits, chunk.sampling, 0)
    sampling = jax.tree.map(lambda x: x[0], chunk.sampling)
    row = Rows(cache, own, token[0], jnp.int32(1), chunk.limit, sampling)
    return jax.tree.map(lambda x, one: x.at[at].set(one), rows, row), token[0]


@functools.partial(jax.jit, static_argnames=("forward", "steps"), donate_argnames="rows")
def decode(
    forward: Forward, params: Any, bank: Any, rows: Rows, live: Bool[Array, " rows"], steps: int
) -> tuple[Rows, Int[Array, "steps rows"]]:
    """Up to `steps` more tokens of each row that is live and not finished, and `NOTHING` for the others.

    Args:
      forward: the model and its method.
      params: the model's parameters.
      bank: the bank of adapters, of which the leaves are used that it holds once.
      rows: all rows, which are donated.
      live: whether each row holds a request whose prompt is read.
      steps: the most tokens.
    """

    def one(own: Any, cache: Any, token: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = forward(params, with_own_leaves(bank, own), token[None, None], cache, continues=True)
        return logits[0], cache

    def unfinished(carry: tuple[Rows, jax.Array, jax.Array]) -> jax.Array:
        rows, _, step = carry
        return (live & rows.unfinished()).any() & (step < steps)

    def advance(carry: tuple[Rows, jax.Array, jax.Array]) -> tuple[Rows, jax.Array, jax.Array]:
        rows, tokens, step = carry
        on = live & rows.unfinished()
        logits, cache = jax.vmap(one)(rows.adapter, rows.cache, jnp.maximum(rows.token, 0))
        # A row that is off must not widen what is computed for the others.
        sampling = rows.sampling._replace(temperature=jnp.where(on, rows.sampling.temperature, 0.0))
        token = sample(logits, sampling, rows.count)
        new = rows._replace(
            cache=_advanced(on, cache, rows.cache),
            token=jnp.where(on, token, rows.token),
            count=rows.count + on.astype(jnp.int32),
        )
        return new, tokens.at[step].set(jnp.where(on, token, NOTHING)), step + 1

    empty = jnp.full((steps, live.shape[0]), NOTHING, jnp.int32)
    rows, tokens, _ = jax.lax.while_loop(unfinished, advance, (rows, empty, jnp.int32(0)))
    return rows, tokens


def _advanced(on: jax.Array, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """The caches after a step, in which rows that are off stay where they are.

    Their keys and values are left as the step wrote them, after their last token, where nothing attends to.
    """
    out = {}
    for name, x in new.items():
        if isinstance(x, Mapping):
            out[name] = _advanced(on, x, old[name])
        else:
            is_on = on.reshape(-1, *(1,) * (x.ndim - 1))
            out[name] = x if name in _LARGE else jnp.where(is_on, x, old[name])
    return out
