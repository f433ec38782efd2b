"""Runs a module's call with some of its operations replaced: the call is traced, and its trace evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jpeft.core.dataflow.replace import Evaluate
from jpeft.core.tree import Path, flatten, split_arrays


def run(module: nn.Module, call: Callable[[], Any], weights: Mapping[str, Any], evaluate: Evaluate) -> Any:
    """The outputs of ``call()``, as ``evaluate`` computes them from its trace.

    Args:
      module: the called module.
      call: runs its method.
      weights: values of the module's parameters, by name, as the method reads them.
      evaluate: evaluates the trace, such as `jpeft.core.dataflow.replace.evaluate` with a change.
    """
    seen = _Traced(module, call)
    closed = jax.make_jaxpr(seen)()
    names = {id(value): name for name, value in weights.items()}
    found = {v: names[id(c)] for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True) if id(c) in names}
    return seen.restored(evaluate(closed.jaxpr, closed.consts, found))


class _Traced:
    """A call as a function from nothing to arrays: its outputs and the variables that it writes."""

    def __init__(self, module: nn.Module, call: Callable[[], Any]):
        self.module, self.call = module, call
        self.restore: Callable[[list[Any]], Any] = list
        self.paths: list[tuple[str, Path]] = []

    def __call__(self) -> list[Any]:
        before = _written(self.module)
        y = self.call()
        after = {key: x for key, x in _written(self.module).items() if before.get(key) is not x}
        self.paths = list(after)
        arrays, self.restore = split_arrays((y, list(after.values())))
        return arrays

    def restored(self, arrays: list[Any]) -> Any:
        """The call's outputs, from the values of its arrays. The variables that it wrote go into their scopes."""
        y, written = self.restore(arrays)
        for (collection, path), value in zip(self.paths, written, strict=True):
            scope = self.module.scope
            assert scope is not None
            for name in path[:-1]:
                scope = scope.push(name, reuse=True)
            scope.put_variable(collection, path[-1], value)
        return y


def _written(module: nn.Module) -> dict[tuple[str, Path], Any]:
    """The variables of a module and the modules in it that a call may write, by collection and path."""
    scope = module.scope
    assert scope is not None
    mutable = {n: tree for n, tree in scope.variables().items() if scope.is_mutable_collection(n)}
    return {(name, path): x for name, tree in mutable.items() for path, x in flatten(tree).items()}
