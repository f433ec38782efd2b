"""Which backend what is being traced will run on: XLA's backends are fast at different forms of one computation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_target: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """`cpu`, `gpu` or `tpu`: what `compiling_for` says, else JAX's default.

    >>> with compiling_for("tpu"): backend()
    'tpu'
    """
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str | None) -> Iterator[None]:
    """What is traced in here is compiled for another backend than the default. None is the default."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
