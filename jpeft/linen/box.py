"""Boxes: leaves of ``params`` that return the merged weight when a module asks for its parameter.

They serve weights that the interceptor cannot reach, such as ``self.param("w")`` used inside a larger method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax.core import meta

from jpeft.core.actions import Action, by_weight, merge_bias, merge_leaf, merge_weight
from jpeft.core.method import Leaves
from jpeft.core.peft import Peft
from jpeft.core.sites import BOX, FUSED, MERGE
from jpeft.core.tree import Path, Tree, box_as, flatten, split_variables, unflatten


def overlay(peft: Peft, params: Tree, adapter: Tree) -> Any:
    """See `Peft.overlay`."""
    tree, _ = split_variables(params)
    leaves = peft.check(adapter)
    full, used = peft.replaced(flatten(tree), leaves), peft.expanded(leaves)
    for path, actions in by_weight(peft.actions, (BOX, MERGE)).items():
        own, bias = [used[a] for a in actions], actions[0].site.bias_path
        changed = [(path, False)]
        if bias in full and any(a.method.changes_bias for a in actions):
            changed.append((bias, True))
        for target, is_bias in changed:
            if actions[0].site.via == BOX:
                full[target] = Changed(full[target], tuple(own), tuple(actions), is_bias)
            else:
                full[target] = merge_leaf(actions, own, full[target], is_bias)
    markers: dict[Path, list[Action]] = {}
    for action in peft.actions:
        if action.site.kind != "leaf" and action.site.via == FUSED:
            full |= {action.leaf_path(n): x for n, x in used[action].items()}
            markers.setdefault(action.site.path, []).append(action)
    full |= {(*path, MARKER): Marker(tuple(actions)) for path, actions in markers.items()}
    return unflatten(full)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Marker:
    """A static leaf beside a site's leaves, which makes the tree structure depend on the method.

    ``nn.jit`` caches a module's trace by that structure. Without the marker, a LoRA with another alpha would reuse the
    trace of the first.
    """

    actions: tuple[Action, ...]


MARKER = "jpeft"


@jax.tree_util.register_pytree_node_class
class Changed(meta.AxisMetadata):
    """A weight or bias with its adapter leaves. Unboxed, it is the merged one, one layer at a time under a scan.

    Attributes:
      value: the base weight or bias.
      leaves: the adapter leaves of each action.
      actions: the actions, in order.
      bias: whether this is a bias.
    """

    def __init__(self, value: Any, leaves: tuple[Leaves, ...], actions: tuple[Action, ...], bias: bool = False):
        self.value, self.leaves, self.actions, self.bias = value, leaves, actions, bias

    def unbox(self) -> jax.Array:
        merge = merge_bias if self.bias else merge_weight
        return merge(self.actions, [meta.unbox(own) for own in self.leaves], meta.unbox(self.value))

    def replace_boxed(self, val: Any) -> Any:
        return box_as(self.value, val)

    def _map_axis(self, fn: Callable[[Any], Any]) -> Changed:
        value, leaves = jax.tree.map(fn, (self.value, self.leaves), is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
        return Changed(value, leaves, self.actions, self.bias)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Changed:
        return self._map_axis(lambda x: x.add_axis(index, params) if isinstance(x, meta.AxisMetadata) else x)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Changed:
        return self._map_axis(lambda x: x.remove_axis(index, params) if isinstance(x, meta.AxisMetadata) else x)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.value, self.leaves), (self.actions, self.bias)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Changed:
        return cls(*children, *aux)
