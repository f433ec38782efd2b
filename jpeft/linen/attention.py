"""Attention hooks: they run an attention module with changed keys, values and mask, after any position encoding.

Keys and values are ``[..., length, heads, head_dim]``. The mask is boolean and broadcasts to
``[..., heads, query_length, length]``, or is None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jpeft.core.method import pad_left

# (key, value, mask) -> changed (key, value, mask)
Extend = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array, Any]]
# (next_fun, args, kwargs, module, extend) -> output
Hook = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], nn.Module, Extend], Any]


def attend_hook(next_fun: Any, args: Any, kwargs: Any, module: nn.Module, extend: Extend) -> Any:
    """The hook for a method ``attend(query, key, value, mask, ...)``, as jpeft's own models have it."""
    query, key, value, *rest = args
    mask = kwargs.get("mask", rest[0] if rest else None)
    key, value, mask = extend(key, value, mask)
    if "mask" in kwargs:
        return next_fun(query, key, value, *rest, **{**kwargs, "mask": mask})
    return next_fun(query, key, value, mask, *rest[1:], **kwargs)


def attention_fn_hook(next_fun: Any, args: Any, kwargs: Any, module: nn.Module, extend: Extend) -> Any:
    """The hook for ``nn.MultiHeadDotProductAttention``: replaces its ``attention_fn`` during the call."""
    inner = module.attention_fn  # type: ignore[attr-defined]

    @functools.wraps(inner)  # Flax passes only the arguments in the signature
    def wrapped(query: jax.Array, key: jax.Array, value: jax.Array, *rest: Any, **kw: Any) -> Any:
        length = key.shape[-3]
        key, value, mask = extend(key, value, kw.get("mask"))
        if "mask" in kw:
            kw["mask"] = mask
        if kw.get("bias") is not None:
            kw["bias"] = pad_left(kw["bias"], key.shape[-3] - length, length, 0)
        return inner(query, key, value, *rest, **kw)

    # The bound module is a clone that Flax made for this call; the user's module is not changed.
    object.__setattr__(module, "attention_fn", wrapped)
    try:
        return next_fun(*args, **kwargs)
    finally:
        object.__setattr__(module, "attention_fn", inner)


_REGISTRY: dict[str, tuple[str, Hook]] = {
    f"{nn.MultiHeadDotProductAttention.__module__}.MultiHeadDotProductAttention": ("__call__", attention_fn_hook),
}


def register_attention(owner: type | str, method: str = "attend", hook: Hook = attend_hook) -> None:
    """Registers an attention module, so that prefix tuning finds its keys and values.

    Args:
      owner: the attention module's class, or its name.
      method: name of the method that computes the attention.
      hook: runs that method with changed keys and values. The default is for ``attend(query, key, value, mask, ...)``.

    >>> register_attention("MyAttention")
    """
    name = owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}"
    _REGISTRY[name] = (method, hook)


def find(owner: str, method: str) -> Hook | None:
    """The hook for a method of ``owner`` (see `registry.owner_of`), or None."""
    entry = _REGISTRY.get(owner) or _REGISTRY.get(owner.rsplit(".", 1)[-1])
    return entry[1] if entry and entry[0] == method else None
