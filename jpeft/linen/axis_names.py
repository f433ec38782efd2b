"""Mapped axes that a model names, such as ``nn.BatchNorm(axis_name="batch")``, while it is traced outside of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

AxisEnv = Sequence[tuple[str, int]]

_UNBOUND = re.compile(r"unbound axis name: (.+?)(?:\. To fix this|$)", re.MULTILINE)


def with_axis_names(trace: Callable[[AxisEnv], T]) -> T:
    """``trace(axis_env)``, with an axis of size 1 for every name that it finds unbound.

    A model that is to run inside ``jax.vmap``, ``jax.pmap`` or ``jax.shard_map`` averages over their axes. The shapes
    of what it computes do not depend on them, so that it can be traced outside of them.

    Args:
      trace: traces from the beginning whenever it is called; ``axis_env`` is for ``jax.make_jaxpr``.

    Raises:
      NameError: a name stays unbound.

    >>> import jax
    >>> with_axis_names(lambda env: jax.make_jaxpr(lambda x: jax.lax.pmean(x, "batch"), axis_env=env)(1.0)).in_avals
    [ShapedArray(float32[], weak_type=True)]
    """
    env: list[tuple[str, int]] = []
    while True:
        try:
            return trace(tuple(env))
        except NameError as error:
            found = _UNBOUND.search(str(error))
            if found is None or (found[1], 1) in env:
                raise
            env.append((found[1], 1))
