"""The checks of an adapter that is loaded: that it is finite, and that it changes something."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.actions import Action, cast_leaves, merge_matrix, used_leaves
from jpeft.core.method import ModuleContext
from jpeft.core.operation import no_dropout
from jpeft.core.peft import Peft
from jpeft.core.sites import stack_first
from jpeft.core.tree import Path, join, peek
from jpeft.errors import AdapterError


def check_loaded(source: Any, peft: Peft, leaves: Mapping[Path, np.ndarray], base: Mapping[Path, Any]) -> None:
    """Checks the leaves of an adapter that was read, and warns with a `UserWarning` if they change nothing.

    Args:
      source: the file that they were read from, for messages.
      peft: the bound method.
      leaves: the adapter's leaves, on the host.
      base: the base's leaves; may be abstract.

    Raises:
      AdapterError: a leaf holds NaN or infinities, or a method cannot use its leaves.
    """
    for path, x in leaves.items():
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
            raise AdapterError(
                f"{source}: {join(path)!r} holds NaN or infinity; outputs would be NaN: use an earlier checkpoint, or "
                "train again with a lower learning rate"
            )
    for action in peft.actions:
        if action.method.checks:
            for own in _matrices(action, leaves):
                try:
                    action.method.check(action.site, own)
                except ValueError as error:
                    raise AdapterError(f"{source}: {action.site.name!r}: {error}") from None
    if changes_nothing(peft, leaves, base):
        warnings.warn(
            f"{source}: this {peft.method.name} changes nothing: every update in it is zero, and the outputs are the "
            "base's. It was saved before it was trained, or its training did not reach it",
            stacklevel=3,
        )


def _matrices(action: Action, leaves: Mapping[Path, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """A site's leaves on the host, one matrix after the other."""
    site = action.site
    own = {name: np.asarray(stack_first(leaves[action.leaf_path(name)], site.stack)) for name in action.stored}
    on = own.pop(action.mask, None)
    for index in np.ndindex(*(size for _, size in site.stack), *site.batch):
        if on is None or on[index]:
            yield {name: x[index] for name, x in own.items()}


def changes_nothing(peft: Peft, leaves: Mapping[Path, np.ndarray], base: Mapping[Path, Any]) -> bool:
    """Whether the outputs under an adapter are known to be those of the base.

    A weight method changes nothing if it merges to the same weight, which is asked of a made-up one, so that neither
    the base's numbers nor their placement matter; an output method, if it gives back a made-up output; leaves that
    replace the base's, if they are equal. False where this cannot be told.
    """
    if not peft.actions or any(_is_varied(leaves, action) for action in peft.actions):
        return False

    def is_neutral(action: Action) -> bool:
        if action.site.kind == "leaf":
            return _is_copy(leaves[action.site.path], base.get(action.site.path))
        if action.site.kind == "attention" or not (action.mergeable or action.site.kind == "output"):
            return False  # added keys take a part of the attention
        if action.site.kind == "output" and action.method.reads_context:
            return False  # the model's call is not known
        own, shared = (
            {n: jnp.asarray(x) for n, x in d.items()} for d in (peft.own(action, leaves), peft.shared(action, leaves))
        )
        try:
            return bool(_gives_back(replace(action, site=replace(action.site, path=())), shared, own))
        except _NotKnown:
            return False

    return all(map(is_neutral, peft.actions))


class _NotKnown(Exception):
    """A method runs the module again, of which only the output is made up."""


def _not_known(x: Any) -> Any:
    raise _NotKnown


def _is_varied(leaves: Mapping[Path, np.ndarray], action: Action) -> bool:
    """Whether no leaf at a site is constant, as one must be to change nothing; then nothing need be computed."""
    own = [leaves[action.leaf_path(name)] for name in action.stored]
    return action.site.kind != "leaf" and bool(own) and not any(x.size and (x == x.flat[0]).all() for x in own)


def _is_copy(leaf: np.ndarray, stored: Any) -> bool:
    """Whether a leaf that replaces one of the base is the same. False for a base that is abstract or elsewhere."""
    weight = peek(stored)
    if not isinstance(weight, np.ndarray | jax.Array) or not getattr(weight, "is_fully_addressable", True):
        return False
    return np.array_equal(np.asarray(leaf).astype(weight.dtype), np.asarray(weight))


@functools.partial(jax.jit, static_argnums=0)
def _gives_back(action: Action, shared: Mapping[str, Any], leaves: Mapping[str, Any]) -> jax.Array:
    """Whether a method at a site gives back what it is given."""
    site, method = action.site, action.method
    first = {name: stack_first(x, site.stack) for name, x in leaves.items()}

    def one(own: Mapping[str, Any]) -> jax.Array:
        if site.kind == "output":
            used = cast_leaves(used_leaves(action, shared, own), jnp.float32)
            x = _numbers((2, site.inputs)) if site.inputs else jnp.zeros((2,), jnp.int32)
            context = ModuleContext({}, no_dropout, _not_known)
            return _same(lambda y: method.apply(used, x, y, context), (2, site.outputs))
        b = _numbers((site.outputs,)) if site.bias else None
        w = _numbers((site.inputs, site.outputs))
        same = jnp.bool_(True)
        for scale in (0.0, 1.0):  # to zeros the smallest sum shows, to numbers a product does
            old = (scale * w, None if b is None else scale * b)
            for was, now in zip(old, merge_matrix(action, shared, own, *old), strict=True):
                same &= jnp.bool_(True) if was is None else (was == now).all()
        return same

    for _ in (*site.stack, *site.batch):  # a matrix at a time
        one = functools.partial(lambda inner, own: jax.lax.map(inner, own).all(), one)
    return one(first)


def _numbers(shape: tuple[int, ...]) -> jax.Array:
    return jnp.cos(jnp.arange(1, 1 + math.prod(shape), dtype=jnp.float32)).reshape(shape)


def _same(function: Any, shape: tuple[int, ...]) -> jax.Array:
    """Whether a function gives back zeros, to which the smallest sum shows, and numbers, to which a product does."""
    numbers = _numbers(shape)
    zeros = jnp.zeros_like(numbers)
    return (function(zeros) == zeros).all() & (function(numbers) == numbers).all()
