"""The attention of Flax NNX, which runs under methods; see `jpeft.core.attention`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from jpeft.core import attention
from jpeft.core.attention import Hook, Wrap, wrapped
from jpeft.core.geometry.registry import full_name

ATTENTION_FN = "attention_fn"

_replaced: contextvars.ContextVar[tuple[tuple[Any, Callable[..., Any]], ...]] = contextvars.ContextVar(
    "replaced", default=()
)


@contextlib.contextmanager
def _replacing(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    token = _replaced.set((*_replaced.get(), (module, function)))
    try:
        yield
    finally:
        _replaced.reset(token)


def read_attention_fn(module: Any) -> Any:
    """A module's ``attention_fn`` or, in a call that changes keys and values, the function that takes its place."""
    found = [function for other, function in _replaced.get() if other is module]
    return found[-1] if found else vars(module)[ATTENTION_FN]


def attention_fn_hook(next_fun: Any, args: Any, kwargs: Any, module: Any, wrap: Wrap) -> Any:
    """The hook for ``nnx.MultiHeadAttention``: replaces its ``attention_fn`` during the call."""
    with _replacing(module, wrapped(vars(module)[ATTENTION_FN], wrap)):
        return next_fun(*args, **kwargs)


ATTENTIONS: dict[str, tuple[str, Hook]] = {full_name(nnx.MultiHeadAttention): ("__call__", attention_fn_hook)}


def find(owner: str, method: str) -> Hook | None:
    """The hook for a method of the class ``owner``, registered or one of `ATTENTIONS`."""
    return attention.find(owner, method, ATTENTIONS)
