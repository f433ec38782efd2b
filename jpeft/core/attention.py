"""Attention hooks: they run an attention module with changed keys, values and mask, after any position encoding.

Keys and values are ``[..., length, heads, head_dim]``. The mask is boolean and broadcasts to
``[..., heads, query_length, length]``, or is None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jpeft.core.method import pad_left

# (key, value, mask) -> changed (key, value, mask)
Extend = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array, Any]]
# (next_fun, args, kwargs, module, extend) -> output
Hook = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, Extend], Any]


def attend_hook(next_fun: Any, args: Any, kwargs: Any, module: Any, extend: Extend) -> Any:
    """The hook for a method ``attend(query, key, value, mask, ...)``, as jpeft's own models have it."""
    query, key, value, *rest = args
    mask = kwargs.get("mask", rest[0] if rest else None)
    key, value, mask = extend(key, value, mask)
    if "mask" in kwargs:
        return next_fun(query, key, value, *rest, **{**kwargs, "mask": mask})
    return next_fun(query, key, value, mask, *rest[1:], **kwargs)


def extended(attention_fn: Callable[..., Any], extend: Extend) -> Callable[..., Any]:
    """Flax's ``attention_fn`` on keys, values and a mask that ``extend`` has changed; a bias grows as keys do."""

    @functools.wraps(attention_fn)  # Flax passes only the arguments in the signature
    def wrapped(query: jax.Array, key: jax.Array, value: jax.Array, *rest: Any, **kw: Any) -> Any:
        length = key.shape[-3]
        key, value, mask = extend(key, value, kw.get("mask"))
        if "mask" in kw:
            kw["mask"] = mask
        if kw.get("bias") is not None:
            kw["bias"] = pad_left(kw["bias"], key.shape[-3] - length, length, 0)
        return attention_fn(query, key, value, *rest, **kw)

    return wrapped


# The method of a class that computes an attention, and its hook, by the class's full or bare name.
REGISTERED: dict[str, tuple[str, Hook]] = {}


def register_attention(owner: type | str, method: str = "attend", hook: Hook = attend_hook) -> None:
    """Registers an attention module, so that prefix tuning finds its keys and values.

    Args:
      owner: the attention module's class, or its name.
      method: name of the method that computes the attention.
      hook: runs that method with changed keys and values. The default is for ``attend(query, key, value, mask, ...)``.

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
