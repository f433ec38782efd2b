"""Boxes: leaves of ``params`` that return the merged weight when a module asks for its parameter.

They serve weights that the interceptor cannot reach, such as ``self.param("w")`` used inside a larger method.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft.core.actions import Action, by_weight, merge_layer, merge_stored
from jpeft.core.method import Leaves
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized, unreadable
from jpeft.core.sites import BOX, FUSED, MERGE
from jpeft.core.tree import Path, Tree, box_as, flatten, peek, split_variables, unflatten


def overlay(peft: Peft, params: Tree, adapter: Tree) -> Any:
    """See `Peft.overlay`."""
    tree, _ = split_variables(params)
    leaves = peft.check(adapter)
    full = peft.replaced(flatten(tree), leaves)
    for site in peft.weights:  # the base may be quantized after the method was bound
        if site.via == MERGE and isinstance(leaf := full.get(site.weight_path), Quantized):
            raise ValueError(unreadable(site.weight_path, leaf))
    token = Token() if any(action.needs_call for action in peft.actions) else None
    for path, actions in by_weight(peft.actions, (BOX, MERGE)).items():
        own, bias = [peft.own(a, leaves) for a in actions], actions[0].site.bias_path
        pair = (full[path], full.get(bias) if bias else None)
        if actions[0].site.via == BOX:
            boxes = [Changed(*pair, tuple(own), tuple(actions), is_bias, token) for is_bias in (False, True)]
        else:
            boxes = merge_stored(actions, [peft.shared(a, leaves) for a in actions], own, *pair)
        full[path] = boxes[0]
        if bias in full and any(a.changes_bias for a in actions):
            full[bias] = boxes[1]
    markers: dict[Path, list[Action]] = {}
    for action in peft.actions:
        if action.site.kind != "leaf" and action.site.via == FUSED:
            path = action.site.weight_path
            if action.site.kind == "weight" and action.site.geometry is not None and action.site.geometry.calls:
                full[path] = _identifiable(full[path], path)
            full |= {action.leaf_path(n): x for n, x in peft.own(action, leaves).items()}
            markers.setdefault(action.site.path, []).append(action)
    full |= {(*path, MARKER): Marker(tuple(actions), token) for path, actions in markers.items()}
    if token is not None:
        full |= {path: leaves[path] for path in peft.shared_paths} | {(ROOT_MARKER,): Marker((), token)}
    return unflatten(full)


def _identifiable(leaf: Any, path: Path) -> Any:
    """A weight in a form that is recognized in the trace of a call: the same array whenever it is read."""
    if isinstance(leaf, (Quantized, Opened)):
        return leaf if isinstance(leaf, Opened) else Opened(leaf, path)
    return box_as(leaf, jnp.asarray(peek(leaf))) if isinstance(peek(leaf), np.ndarray) else leaf


class Token:
    """The identity of one `overlay`, under which the leaves that sites share are found while the model runs.

    It also keeps ``nn.jit`` from using a trace again that has captured something of another call.
    """


@jax.tree_util.register_static
@dataclass(frozen=True)
class Marker:
    """A static leaf beside a site's leaves, which makes the tree structure depend on the method.

    ``nn.jit`` caches a module's trace by that structure. Without the marker, a LoRA with another alpha would reuse the
    trace of the first; without the token, a module would reuse a trace that has captured shared leaves of another call.
    """

    actions: tuple[Action, ...]
    token: Token | None = None


MARKER = "jpeft"
ROOT_MARKER = "jpeft_shared"  # at the model's root, beside the shared leaves

_shared: contextvars.ContextVar[Mapping[Any, Mapping[str, Leaves]]] = contextvars.ContextVar(
    "shared", default=MappingProxyType({})
)


@contextlib.contextmanager
def sharing(variables: Mapping[str, Any], slugs: Collection[str]) -> Iterator[None]:
    """A context in which `shared_leaves` finds the shared leaves that an overlay put at the root of a model.

    Modules get them from here, not from their own variables, since the model's scans slice all of these.

    Args:
      variables: the parameters of the model's root.
      slugs: the keys of the shared leaves.
    """
    marker = variables.get(ROOT_MARKER)
    found = {slug: meta.unbox(dict(variables[slug])) for slug in slugs if slug in variables}
    if not isinstance(marker, Marker):
        yield
        return
    token = _shared.set({**_shared.get(), marker.token: found})
    try:
        yield
    finally:
        _shared.reset(token)


def shared_leaves(action: Action, token: Token | None) -> Leaves:
    """The leaves that an action's sites share, of the overlay with this token."""
    return _shared.get()[token][action.shared] if action.shared else {}


class _Box(meta.AxisMetadata):
    """A box whose axes are those of the boxes in it."""

    value: Any

    def replace_boxed(self, val: Any) -> Any:
        return box_as(self.value, val)

    def _map_axis(self, fn: Callable[[Any], Any]) -> Any:
        children, structure = jax.tree.flatten(self, is_leaf=lambda x: x is not self and _is_box(x))
        return jax.tree.unflatten(structure, [fn(child) for child in children])

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return self._map_axis(lambda x: x.add_axis(index, params) if _is_box(x) else x)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return self._map_axis(lambda x: x.remove_axis(index, params) if _is_box(x) else x)


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


@jax.tree_util.register_pytree_node_class
class Changed(_Box):
    """A weight or bias with its adapter leaves. Unboxed, it is the merged one, one layer at a time under a scan.

    Attributes:
      weight: the base weight.
      bias: the base bias beside it, or None.
      leaves: the adapter leaves of each action.
      actions: the actions, in order.
      is_bias: whether this takes the place of the bias.
      token: of the overlay that made it.
    """

    def __init__(
        self, weight: Any, bias: Any, leaves: tuple[Leaves, ...], actions: tuple[Action, ...], is_bias: bool, token: Any
    ):
        self.weight, self.bias, self.leaves = weight, bias, leaves
        self.actions, self.is_bias, self.token = actions, is_bias, token

    @property
    def value(self) -> Any:
        """The base leaf whose place it takes."""
        return self.bias if self.is_bias else self.weight

    def unbox(self) -> jax.Array:
        shared = [shared_leaves(action, self.token) for action in self.actions]
        leaves = [meta.unbox(own) for own in self.leaves]
        pair = merge_layer(self.actions, shared, leaves, meta.unbox(self.weight), meta.unbox(self.bias))
        merged = pair[self.is_bias]
        assert merged is not None
        return merged

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.weight, self.bias, self.leaves), (self.actions, self.is_bias, self.token)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Changed:
        return cls(*children, *aux)


_opened: contextvars.ContextVar[tuple[tuple[Path, jax.Array], ...]] = contextvars.ContextVar("opened", default=())


@contextlib.contextmanager
def opened(weights: Mapping[Path, jax.Array]) -> Iterator[None]:
    """A context in which the `Opened` weights at these paths are read as the given arrays."""
    token = _opened.set((*weights.items(), *_opened.get()))
    try:
        yield
    finally:
        _opened.reset(token)


@jax.tree_util.register_pytree_node_class
class Opened(_Box):
    """A quantized weight that a call reads as one array, dequantized before the call is traced.

    Attributes:
      value: the quantized weight.
      path: its path.
    """

    def __init__(self, value: Any, path: Path):
        self.value, self.path = value, path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def unbox(self) -> jax.Array:
        found = [array for path, array in _opened.get() if path == self.path]
        return found[0] if found else meta.unbox(self.value)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.value,), self.path

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Opened:
        return cls(children[0], aux)


@jax.tree_util.register_pytree_node_class
class TrialBox(_Box):
    """A box for trying whether a model opens it. Opened, it is one array; a function of the tree reaches another too.

    Attributes:
      hidden: the array that the model must not use.
      value: the parameter.
    """

    def __init__(self, hidden: Any, value: Any):
        self.hidden, self.value = hidden, value

    def unbox(self) -> Any:
        return meta.unbox(self.value)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.hidden, self.value), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> TrialBox:
        return cls(*children)
