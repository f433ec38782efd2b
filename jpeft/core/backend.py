"""The backend that traced code will run on; some computations have a faster form on each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_target: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """The backend, "cpu", "gpu" or "tpu": that of `compiling_for`, or JAX's default.

    >>> with compiling_for("tpu"): backend()
    'tpu'
    """
    return _target.get() or jax.default_backend()


def flatten_tokens() -> bool:
    """Whether to merge the token axes of an operand into one.

    XLA's CPU backend is 2-4 times slower at contractions over [batch, length, features] than over the same operands
    as [batch * length, features] (low-rank forward + backward: 8.7 against 2.2 ms). On GPU and TPU nothing is gained,
    and merging axes that are sharded differently would cost a collective.
    """
    return backend() == "cpu"


@contextlib.contextmanager
def compiling_for(platform: str | None) -> Iterator[None]:
    """A context in which code is traced for another backend than the default. None is the default."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
