"""Virtual tokens before a text: the arguments of a model's call that grow with them, and outputs without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Inputs
from jpeft.core.tree import is_array

# What models call the arguments that grow with the token ids. Others of the shape of the token ids are refused.
IDS = ("input_ids", "tokens", "token_ids", "ids", "inputs", "encoder_input_tokens", "last_tokens")
EMBEDDED = ("inputs_embeds", "input_embeds", "embeddings", "embedded_prefix")
MASKS = ("attention_mask", "mask", "attn_mask", "padding_mask", "input_mask", "encoder_mask")
POSITIONS = ("position_ids", "positions", "segment_positions", "segment_pos", "input_positions", "encoder_positions")
SEGMENTS = ("segment_ids", "encoder_segment_ids")
TYPES = ("token_type_ids",)
_KEPT = ("cache", "past_key_values")  # outputs that keep the virtual tokens


def find_ids(inputs: Inputs, name: str) -> str | None:
    """The name of the argument that holds the token ids; None if the call has none, such as one of the head alone.

    Args:
      inputs: the call.
      name: the method's name, for the error.

    Raises:
      ValueError: the call has embeddings of the text in place of token ids.
    """
    given = inputs.arguments
    found = next((n for n in IDS if _is_ids(given.get(n))), None)
    if found is None:
        others = (*MASKS, *POSITIONS, *SEGMENTS, *TYPES)
        found = next((n for n, x in given.items() if _is_ids(x) and n not in others), None)
    embedded = next((n for n in EMBEDDED if given.get(n) is not None), None)
    if found is None and embedded is not None:
        raise ValueError(
            f"{name}: the call has {embedded!r} and no token ids, so that no embedding is looked up; give token ids, "
            "or put the virtual tokens' embeddings before your own"
        )
    return found


def _is_ids(value: Any) -> bool:
    return is_array(value) and value.ndim > 0 and jnp.issubdtype(value.dtype, jnp.integer)


def with_tokens(inputs: Inputs, name: str, argument: str, tokens: jax.Array, pad: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with virtual tokens before each text.

    Args:
      inputs: the call.
      name: the method's name, for errors.
      argument: the name of the token ids.
      tokens: the virtual tokens' ids ``[n]``.
      pad: for arguments of names that are not known, what they hold for virtual tokens.

    Raises:
      ValueError: it is not known how an argument grows, or the model has too few positions.
    """
    given, ids = dict(inputs.arguments), jnp.asarray(inputs.arguments[argument])
    n, length = tokens.size, ids.shape[-1]
    if inputs.positions is not None and n + length > inputs.positions:
        raise ValueError(
            f"{name}: {n} virtual tokens and {length} of {argument!r} are {n + length} positions, and the model has "
            f"{inputs.positions}; shorten one of the two"
        )
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))
    given[argument] = before(ids, tokens.astype(ids.dtype))
    side = argument.split("_")[0] if argument.startswith("decoder_") else ""
    for other, value in inputs.arguments.items():
        if other == argument or not is_array(value) or (other.startswith("decoder_") and not side):
            continue
        own = other.removeprefix("decoder_") if side else other
        if other in pad:
            given[other] = before(value, jnp.full((n,), pad[other], value.dtype))
        elif own in MASKS:
            given[other] = _longer_mask(name, other, jnp.asarray(value), n, length)
        elif own in POSITIONS:
            places = jnp.arange(n, dtype=value.dtype)
            given[other] = before(jnp.asarray(value) + n, places)
        elif own in TYPES:
            given[other] = before(value, jnp.zeros((n,), value.dtype))
        elif own in SEGMENTS:
            given[other] = _longer_segments(inputs, name, other, value, n)
        elif value.shape[: ids.ndim] == inputs.arguments[argument].shape:
            raise ValueError(
                f"{name}: the argument {other!r} is {value.shape}, like the token ids, and what it holds for virtual "
                f"tokens is not known; say so with pad={{{other!r}: 0}}"
            )
    return given


def before(x: Any, front: jax.Array) -> jax.Array:
    """``x [..., length]`` with ``front [n]`` before each row."""
    x = jnp.asarray(x)
    return jnp.concatenate([jnp.broadcast_to(front, (*x.shape[:-1], front.size)), x], axis=-1)


def _longer_mask(name: str, argument: str, mask: jax.Array, n: int, length: int) -> jax.Array:
    """A mask that hides no virtual token: ``[..., keys]``, or ``[..., queries, keys]`` of as many queries or of one."""
    seen = jnp.ones((n,), mask.dtype)
    if mask.ndim <= 2 and mask.shape[-1] == length:
        return before(mask, seen)
    if mask.shape[-1] == length and mask.shape[-2] in (1, length) and not jnp.issubdtype(mask.dtype, jnp.floating):
        if mask.shape[-2] == 1:
            return before(mask, seen)
        # A virtual token sees what the first token does: all tokens and virtual tokens or, if causal, those before it.
        first = mask[..., :1, :]
        sees_later = (first[..., 1:] != 0).any(-1, keepdims=True)
        own = jnp.where(sees_later, jnp.ones((n, n), mask.dtype), jnp.tri(n, dtype=mask.dtype))
        rest = jnp.where(sees_later, first, jnp.zeros_like(first))
        rest = jnp.broadcast_to(rest, (*own.shape[:-1], length))
        return jnp.concatenate([jnp.concatenate([own, rest], -1), before(mask, seen)], axis=-2)
    raise ValueError(
        f"{name}: it is not known how {argument!r} {mask.dtype.name}{list(mask.shape)} grows with {n} virtual tokens "
        f"before {length} tokens; give a mask [batch, length], or a boolean one [..., length, length]"
    )


def _longer_segments(inputs: Inputs, name: str, argument: str, value: Any, n: int) -> jax.Array:
    """Segment ids in which virtual tokens belong to all segments of a row."""
    shared = getattr(inputs.model, "shared_segment", None)
    if shared is None:
        raise ValueError(
            f"{name}: {argument!r} tells apart texts that are packed in a row, and {type(inputs.model).__name__} has "
            "no segment that all texts see, for the virtual tokens; give one text in each row"
        )
    return before(value, jnp.full((n,), shared, jnp.asarray(value).dtype))


def cut(name: str, output: Any, plain: Any, n: int) -> Any:
    """Outputs without the virtual tokens: an axis that is longer than in the plain outputs loses its first places.

    A cache of keys and values keeps them.

    Args:
      name: the method's name, for the error.
      output: the outputs with virtual tokens.
      plain: the shapes of the outputs without.
      n: the number of virtual tokens.

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
        if np.ndim(x) != np.ndim(like) or not all(0 <= extra <= n for extra in more):
            raise ValueError(
                f"{name}: an output has the shape {np.shape(x)} with {n} virtual tokens and {np.shape(like)} without; "
                "where they lie in it is not clear: set keep=True and take them off yourself"
            )
        return x[tuple(slice(extra, None) for extra in more)]

    return jax.tree.unflatten(structure, [one(p, x, like) for (p, x), like in zip(found, shapes, strict=True)])
