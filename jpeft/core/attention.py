"""Attention hooks: they run a registered attention module under methods, after any position encoding.

Keys and values are ``[..., length, heads, head_dim]``. The mask is boolean and broadcasts to
``[..., heads, query_length, length]``, or is None. An attention that is not registered is found in the trace of its
module's call, see `jpeft.core.dataflow`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.method import Prefix, pad_left

# (query, key, value, mask, prefix=None) -> output; a mask that is True hides nothing
Operation = Callable[..., jax.Array]
# (operation, query, key, value, mask) -> output under methods
Wrap = Callable[[Operation, jax.Array, jax.Array, jax.Array, Any], jax.Array]
# (next_fun, args, kwargs, module, wrap) -> output
Hook = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, Wrap], Any]


def attend_hook(next_fun: Any, args: Any, kwargs: Any, module: Any, wrap: Wrap) -> Any:
    """The hook for a method ``attend(query, key, value, mask, ...)``, as jpeft's own models have it.

    If the method has a parameter ``prefix``, it gets a prefix of keys and values by that; otherwise they are put before
    its own.
    """
    query, key, value, *rest = args
    mask = kwargs.get("mask", rest[0] if rest else None)

    def operation(query: Any, key: Any, value: Any, mask: Any, **prefix: Any) -> jax.Array:
        mask = jnp.ones((1, 1, 1, key.shape[-3]), bool) if mask is True else mask  # None is causal in jpeft's models
        if "mask" in kwargs:
            return next_fun(query, key, value, *rest, **{**kwargs, "mask": mask, **prefix})
        return next_fun(query, key, value, mask, *rest[1:], **kwargs, **prefix)

    if "prefix" not in inspect.signature(next_fun).parameters:
        operation = longer(operation)
    return wrap(operation, query, key, value, mask)


def longer(operation: Operation) -> Operation:
    """An operation that takes a prefix as more keys and values before its own."""

    def with_prefix(query: Any, key: Any, value: Any, mask: Any, prefix: Prefix | None = None) -> jax.Array:
        if prefix is None:
            return operation(query, key, value, mask)
        keys, values = prefix
        if mask is not None:  # every query attends to the prefix, also in a causal attention
            length = key.shape[-3]
            mask = pad_left(mask, keys.shape[-3], length, True if mask.dtype == jnp.bool_ else 1)
        return operation(query, _prepend(keys, key), _prepend(values, value), mask)

    return with_prefix


def _prepend(prefix: Any, x: jax.Array) -> jax.Array:
    prefix = jnp.broadcast_to(prefix.astype(x.dtype), (*x.shape[:-3], *prefix.shape[-3:]))
    return jnp.concatenate([prefix, x], axis=-3)


def wrapped(attention_fn: Callable[..., Any], wrap: Wrap) -> Callable[..., Any]:
    """Flax's ``attention_fn`` under methods; a bias grows as keys do."""

    @functools.wraps(attention_fn)  # Flax passes only the arguments in the signature
    def under_methods(query: jax.Array, key: jax.Array, value: jax.Array, *rest: Any, **kw: Any) -> Any:
        def operation(query: Any, longer_key: Any, value: Any, mask: Any) -> Any:
            if mask is True:  # other keys alone, for which no bias is known
                own = {**kw, **{name: None for name in ("mask", "bias") if name in kw}}
                return attention_fn(query, longer_key, value, *rest, **own)
            own = {**kw, "mask": mask} if "mask" in kw or mask is not None else dict(kw)
            if kw.get("bias") is not None:
                length = key.shape[-3]
                own["bias"] = pad_left(kw["bias"], longer_key.shape[-3] - length, length, 0)
            return attention_fn(query, longer_key, value, *rest, **own)

        return wrap(longer(operation), query, key, value, kw.get("mask"))

    return under_methods


# The method of a class that computes an attention, and its hook, by the class's full or bare name.
REGISTERED: dict[str, tuple[str, Hook]] = {}


def register_attention(owner: type | str, method: str = "attend", hook: Hook = attend_hook) -> None:
    """Registers an attention module, for one whose attention is not found in the trace of its call.

    Args:
      owner: the attention module's class, or its name.
      method: name of the method that computes the attention.
      hook: runs that method under methods. The default is for ``attend(query, key, value, mask, ...)``. One of your own
        is called as ``hook(next_fun, args, kwargs, module, wrap)``; it returns the module's output, in which
        ``wrap(operation, query, key, value, mask)`` takes the place of the attention
        ``operation(query, key, value, mask, prefix=None)``.

    >>> register_attention("MyAttention")
    """
    name = owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}"
    REGISTERED[name] = (method, hook)


def find(owner: str, method: str, attentions: Mapping[str, tuple[str, Hook]]) -> Hook | None:
    """The hook for a method of ``owner`` (see `jpeft.core.signatures.owner_of`), or None.

    Args:
      owner: the class that defines the method.
      method: the method's name.
      attentions: those that a front end knows; what `register_attention` adds comes before them.
    """
    for name in (owner, owner.rsplit(".", 1)[-1]):
        if entry := REGISTERED.get(name) or attentions.get(name):
            return entry[1] if entry[0] == method else None
    return None
