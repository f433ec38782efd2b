"""Virtual tokens before a text: the arguments of a model's call that grow with them, and outputs without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpeft.core.method import Inputs
from jpeft.core.signatures import signature_of
from jpeft.core.tree import is_array

# What models call the arguments that grow with the token ids. Others of the shape of the token ids are refused.
IDS = ("input_ids", "tokens", "token_ids", "ids", "inputs", "encoder_input_tokens", "last_tokens")
EMBEDDED = ("inputs_embeds", "input_embeds", "embeddings", "embedded_prefix")
MASKS = ("attention_mask", "mask", "attn_mask", "padding_mask", "input_mask", "encoder_mask")
POSITIONS = ("position_ids", "positions", "segment_positions", "segment_pos", "input_positions", "encoder_positions")
SEGMENTS = ("segment_ids", "encoder_segment_ids")
TYPES = ("token_type_ids",)
DECODER = "decoder_"  # before the names of a decoder's arguments, in a model that has an encoder too
CACHE = "cache"
_KEPT = (CACHE, "past_key_values")  # outputs that keep the virtual tokens


# --- token ids --------------------------------------------------------------------------------------------------------


def find_ids(inputs: Inputs, name: str) -> str | None:
    """The name of the argument that holds the token ids; None if the call has none, such as one of the head alone.

    Args:
      inputs: the call.
      name: the method's name, for the error.

    Raises:
      ValueError: the call has embeddings of the text in place of token ids.
    """
    given = inputs.arguments
    found = next((n for n in IDS if is_ids(given.get(n))), None)
    if found is None:
        others = (*MASKS, *POSITIONS, *SEGMENTS, *TYPES)
        found = next((n for n, x in given.items() if is_ids(x) and n.removeprefix(DECODER) not in others), None)
    embedded = next((n for n in EMBEDDED if given.get(n) is not None), None)
    if found is None and embedded is not None:
        raise ValueError(
            f"{name}: the call has {embedded!r} and no token ids, so that no embedding is looked up; give token ids, "
            "or put the virtual tokens' embeddings before your own"
        )
    return found


def is_ids(value: Any) -> bool:
    """Whether an argument is an array of integers ``[..., length]``."""
    return is_array(value) and value.ndim > 0 and jnp.issubdtype(value.dtype, jnp.integer)


def _side(argument: str) -> str:
    """The prefix of the names of the arguments that belong to these token ids."""
    return DECODER if argument.startswith(DECODER) else ""


# --- a call that begins with the virtual tokens -----------------------------------------------------------------------


def with_tokens(inputs: Inputs, name: str, argument: str, tokens: jax.Array, pad: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with virtual tokens before each text.

    Args:
      inputs: the call.
      name: the method's name, for errors.
      argument: the name of the token ids.
      tokens: the virtual tokens' ids, ``[n]`` or ``[batch, n]``.
      pad: for arguments of names that are not known, what they hold for virtual tokens.

    Raises:
      ValueError: it is not known how an argument grows, or the model has too few positions.
    """
    given, ids = dict(inputs.arguments), jnp.asarray(inputs.arguments[argument])
    n, length = tokens.shape[-1], ids.shape[-1]
    check_positions(inputs, name, argument, n, length)
    given[argument] = before(ids.astype(jnp.promote_types(ids.dtype, jnp.int32)), tokens)
    side = _side(argument)
    for other, value in inputs.arguments.items():
        if other == argument or not is_array(value) or _side(other) != side:
            continue
        own, value = other.removeprefix(side), jnp.asarray(value)
        if other in pad:
            given[other] = before(value, jnp.full((n,), pad[other], value.dtype))
        elif own in MASKS:
            given[other] = _longer_mask(inputs, name, other, value, n, length)
        elif own in POSITIONS:
            given[other] = before(value + n, jnp.arange(n, dtype=value.dtype))
        elif own in TYPES:
            given[other] = before(value, jnp.zeros((n,), value.dtype))
        elif own in SEGMENTS:
            given[other] = _longer_segments(inputs, name, other, value, n)
        elif value.shape[: ids.ndim] == ids.shape:
            raise ValueError(
                f"{name}: the argument {other!r} is {value.shape}, like the token ids, and what it holds for virtual "
                f"tokens is not known; say so with pad={{{other!r}: 0}}"
            )
    return given


def check_positions(inputs: Inputs, name: str, argument: str, n: int, length: int) -> None:
    """Checks that a model has positions for ``n`` virtual tokens and a text of ``length``.

    Raises:
      ValueError: it has not.
    """
    if inputs.positions is not None and n + length > inputs.positions:
        raise ValueError(
            f"{name}: {n} virtual tokens and {length} of {argument!r} are {n + length} positions, and the model has "
            f"{inputs.positions}; shorten one of the two"
        )


def before(x: Any, front: jax.Array) -> jax.Array:
    """``x [..., length]`` with ``front``, ``[n]`` or ``[..., n]``, before each row."""
    x = jnp.asarray(x)
    front = jnp.broadcast_to(front.astype(x.dtype), (*x.shape[:-1], front.shape[-1]))
    return jnp.concatenate([front, x], axis=-1)


def _longer_mask(inputs: Inputs, name: str, argument: str, mask: jax.Array, n: int, length: int) -> jax.Array:
    """A mask that hides no virtual token: ``[..., keys]``, or ``[..., queries, keys]`` of as many queries or of one.

    There are as many keys as tokens, or as a cache has places: that many are then left.
    """
    keys, seen = mask.shape[-1], jnp.ones((n,), mask.dtype)
    is_cached = keys > length and _has_places(inputs, keys)
    if keys == length or is_cached:
        if mask.ndim <= 2 or mask.shape[-2] == 1 != length:
            return before(mask, seen)[..., : keys if is_cached else None]
        if mask.shape[-2] == length and not jnp.issubdtype(mask.dtype, jnp.floating):
            return _longer_square(mask, n)[..., : keys if is_cached else None]
    raise ValueError(
        f"{name}: it is not known how {argument!r} {mask.dtype.name}{list(mask.shape)} grows with {n} virtual tokens "
        f"before {length} tokens; give a mask [batch, length], or a boolean one [..., length, length]"
    )


def _longer_square(mask: jax.Array, n: int) -> jax.Array:
    """``[..., n + queries, n + keys]``. A virtual token sees what the first token does.

    These are all tokens and virtual tokens or, in a causal mask, the virtual tokens up to itself.
    """
    keys, seen = mask.shape[-1], jnp.ones((n,), mask.dtype)
    first = mask[..., :1, :]
    sees_later = first[..., 1:].astype(bool).any(-1, keepdims=True)
    own = jnp.where(sees_later, jnp.ones((n, n), mask.dtype), jnp.tri(n, dtype=mask.dtype))
    rest = jnp.where(sees_later, first, jnp.zeros_like(first))
    rest = jnp.broadcast_to(rest, (*own.shape[:-1], keys))
    return jnp.concatenate([jnp.concatenate([own, rest], -1), before(mask, seen)], axis=-2)


def _has_places(inputs: Inputs, keys: int) -> bool:
    """Whether the call has a cache of so many places."""
    held = [x for name, x in inputs.arguments.items() if any(part in name for part in _KEPT)]
    collections = getattr(inputs.model, "variables", None)
    held.append(collections.get(CACHE, {}) if isinstance(collections, Mapping) else {})
    return any(keys in np.shape(x) for x in jax.tree.leaves(held))


def _longer_segments(inputs: Inputs, name: str, argument: str, value: jax.Array, n: int) -> jax.Array:
    """Segment ids in which virtual tokens belong to all segments of a row."""
    shared = getattr(inputs.model, "shared_segment", None)
    if shared is None:
        raise ValueError(
            f"{name}: {argument!r} tells apart texts that are packed in a row, and {type(inputs.model).__name__} has "
            "no segment that all texts see, for the virtual tokens; give one text in each row"
        )
    return before(value, jnp.full((n,), shared, value.dtype))


# --- a call that continues a cache, in which the virtual tokens are ---------------------------------------------------


def continued(inputs: Inputs, name: str, n: int) -> tuple[dict[str, Any], Any]:
    """The arguments of a call that continues a cache which begins with ``n`` virtual tokens.

    Positions that are given count from the text's first token, and a mask of the cache's places has none for them.

    Returns:
      The arguments, and whether the call's tokens have no place in the cache: a traced boolean, or None if not known.

    Raises:
      ValueError: they have none.
    """
    given, places = dict(inputs.arguments), None
    last: Any = None
    ids = next((x for name, x in given.items() if is_ids(x) and name.removeprefix(DECODER) in IDS), None)
    for other, value in inputs.arguments.items():
        own, value = other.removeprefix(DECODER), jnp.asarray(value) if is_array(value) else value
        if own in POSITIONS and is_array(value):
            given[other] = value + n
            last = given[other].max()
        elif own in MASKS and is_array(value) and ids is not None:
            keys = value.shape[-1]
            if keys > ids.shape[-1] and _has_places(inputs, keys):
                given[other] = before(value, jnp.ones((n,), value.dtype))[..., :keys]
                places = keys
    if places is None or last is None:
        return given, None
    full = last >= places
    if not isinstance(full, Tracer) and bool(full):
        raise ValueError(
            f"{name}: the cache has {places} places, of which {n} hold virtual tokens, and the next token's would be "
            f"number {int(last)}; give it {n} more"
        )
    return given, full


# --- positions --------------------------------------------------------------------------------------------------------


def shifted_positions(inputs: Inputs, name: str, n: int) -> dict[str, Any]:
    """The arguments of a call whose tokens have positions from ``n`` on.

    Args:
      inputs: the call.
      name: the method's name, for errors.
      n: the number of positions before the first token.

    Raises:
      ValueError: the model takes no positions, or has too few; or it is not known how it counts those of a cache.
    """
    argument = find_ids(inputs, name)
    if argument is None:
        return dict(inputs.arguments)
    side, ids = _side(argument), inputs.arguments[argument]
    taken = [side + own for own in POSITIONS if side + own in inputs.accepted]
    if not taken:
        raise ValueError(
            f"{name}: with shift_positions=True, positions of tokens begin at {n}, and {type(inputs.model).__name__} "
            f"takes none (looked for: {', '.join(POSITIONS)}); set shift_positions=False"
        )
    if not inputs.continues:
        check_positions(inputs, name, argument, n, ids.shape[-1])
    positions = inputs.arguments.get(taken[0])
    if positions is None:
        positions = _default_positions(inputs, name, taken[0], ids)
    return {**inputs.arguments, taken[0]: jnp.asarray(positions) + n}


def _default_positions(inputs: Inputs, name: str, argument: str, ids: Any) -> jax.Array:
    """The positions that a model has where none are given: a model's own ``default_positions``, or from 0 on."""
    if (own := getattr(inputs.model, "default_positions", None)) is not None:
        signature = signature_of(own)
        assert signature is not None
        return own(**{k: v for k, v in inputs.arguments.items() if k in signature.parameters})
    if inputs.context.get("cached"):
        raise ValueError(
            f"{name}: with shift_positions=True, a call with a cache needs {argument!r}, of tokens alone: how "
            f"{type(inputs.model).__name__} counts them is not known"
        )
    return jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)


# --- outputs ----------------------------------------------------------------------------------------------------------


def cut(name: str, output: Any, plain: Any, added: Sequence[int], ndim: int) -> Any:
    """Outputs without the virtual tokens: an axis that is longer than in the plain outputs loses its first places.

    A cache of keys and values keeps them, and is known by its name.

    Args:
      name: the method's name, for the error.
      output: the outputs with virtual tokens.
      plain: the shapes of the outputs without.
      added: the numbers by which an axis may be longer.
      ndim: the number of axes of the token ids.

    Raises:
      ValueError: it is not clear where virtual tokens lie in an output.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(output)
    shapes, expected = jax.tree.flatten(plain)
    if structure != expected:
        raise ValueError(f"{name}: the model's outputs have another structure with virtual tokens; set keep=True")

    def one(path: Any, x: Any, like: Any) -> Any:
        if np.shape(x) == np.shape(like) or any(part in jax.tree_util.keystr(path) for part in _KEPT):
            return x
        more = [a - b for a, b in zip(np.shape(x), np.shape(like), strict=False)]
        if np.ndim(x) != np.ndim(like) or not set(more) <= {0, *added}:
            raise ValueError(
                f"{name}: an output has the shape {np.shape(x)} with {added[0]} virtual tokens and {np.shape(like)} "
                "without; where they lie in it is not clear: set keep=True and take them off yourself"
            )
        grown = [axis for axis, extra in enumerate(more) if extra]
        if len(grown) == 1 and np.ndim(x) > ndim + 1 and grown[0] != np.ndim(x) - 1:
            raise ValueError(
                f"{name}: an output {np.shape(x)} holds {added[0]} virtual tokens, and it may be a cache of keys and "
                "values, which keeps them; return caches under a name with 'cache' in it, or set keep=True and take "
                "virtual tokens off the other outputs yourself"
            )
        return x[tuple(slice(extra, None) for extra in more)]

    return jax.tree.unflatten(structure, [one(p, x, like) for (p, x), like in zip(found, shapes, strict=True)])
