"""The stacked axes of a model's scopes, recorded without a change of what the model sees."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax.core import meta

from jpeft.core.tree import Path

KEY = "jpeft:axes"


@jax.tree_util.register_pytree_node_class
class AxisProbe(meta.AxisMetadata):
    """An entry of a scope's parameters without an array. Flax tells it every axis that a scan or vmap slices off.

    Functions of trees do not see it: it has no leaf. It belongs to one abstract call, which is part of the tree's
    structure and compared by identity, so that no cache of traces replays an earlier call.

    Attributes:
      axes: the axes that were sliced off, outermost first.
      path: path of the mapping that holds it.
      call: an object of the abstract call.
    """

    def __init__(self, axes: tuple[int, ...], path: Path, call: object):
        self.axes, self.path, self.call = axes, path, call

    def unbox(self) -> Any:
        raise InsideParameter(self.path)  # Flax unboxes parameters, not scopes

    def replace_boxed(self, val: Any) -> AxisProbe:
        return self

    def add_axis(self, index: int, params: dict[Any, Any]) -> AxisProbe:
        return AxisProbe(self.axes[:-1], self.path, self.call)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> AxisProbe:
        return AxisProbe((*self.axes, index), self.path, self.call)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (), (self.axes, self.path, self.call)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> AxisProbe:
        return cls(*aux)


class InsideParameter(Exception):
    """A mapping with a probe turned out to be one parameter, not a scope.

    Attributes:
      path: its path.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.path = path


def with_probes(tree: Any, call: object, skip: Collection[Path] = (), path: Path = ()) -> Any:
    """A tree of parameters with a probe in every mapping that holds one, except in the mappings ``skip``."""
    if not isinstance(tree, Mapping) or path in skip:
        return tree
    out = {name: with_probes(child, call, skip, (*path, name)) for name, child in tree.items()}
    has_leaf = any(not isinstance(child, Mapping) for child in tree.values())
    return {**out, KEY: AxisProbe((), path, call)} if has_leaf else out


def axes_in(scope: Any) -> tuple[int, ...] | None:
    """The axes that were sliced off a scope, from the first probe in it or below; None without parameters."""
    if isinstance(scope, AxisProbe):
        return scope.axes
    if isinstance(scope, Mapping):
        if KEY in scope:
            return scope[KEY].axes
        return next((axes for child in scope.values() if (axes := axes_in(child)) is not None), None)
    return None
