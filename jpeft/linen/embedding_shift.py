"""An array added to the output of a model's first embedding, to differentiate by without an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn


@contextlib.contextmanager
def shift_embedding(shift: Any, found: list[Any]) -> Iterator[None]:
    """A context in which the output of the first lookup in an `nn.Embed` has ``shift`` added.

    Args:
      shift: an array like that output; None adds nothing.
      found: gets the output's shape and dtype, once. It stays empty if the model embeds nothing.
    """
    done: list[bool] = []

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if not isinstance(context.module, nn.Embed) or context.method_name != "__call__" or done:
            return y
        done.append(True)
        found.append((y.shape, y.dtype))
        return y if shift is None else y + shift

    with nn.intercept_methods(interceptor):
        yield
