"""A function applied to the outputs of all module calls, e.g. to constrain the sharding of activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax


@contextlib.contextmanager
def map_outputs(fn: Callable[[Any], Any]) -> Iterator[None]:
    """A context in which every method call of a Linen module returns its output with ``fn`` applied to each leaf."""

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return jax.tree.map(fn, call(*args, **kwargs))

    with nn.intercept_methods(interceptor):
        yield
