"""The attention of Flax Linen, which runs under methods; see `jpeft.core.attention`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jpeft.core import attention
from jpeft.core.attention import Hook, Wrap, wrapped


def attention_fn_hook(next_fun: Any, args: Any, kwargs: Any, module: nn.Module, wrap: Wrap) -> Any:
    """The hook for ``nn.MultiHeadDotProductAttention``: replaces its ``attention_fn`` during the call."""
    inner = module.attention_fn  # type: ignore[attr-defined]
    # The bound module is a clone that Flax made for this call; the user's module is not changed.
    object.__setattr__(module, "attention_fn", wrapped(inner, wrap))
    try:
        return next_fun(*args, **kwargs)
    finally:
        object.__setattr__(module, "attention_fn", inner)


ATTENTIONS: dict[str, tuple[str, Hook]] = {
    f"{nn.MultiHeadDotProductAttention.__module__}.MultiHeadDotProductAttention": ("__call__", attention_fn_hook),
}


def find(owner: str, method: str) -> Hook | None:
    """The hook for a method of the class ``owner``, registered or one of `ATTENTIONS`."""
    return attention.find(owner, method, ATTENTIONS)
