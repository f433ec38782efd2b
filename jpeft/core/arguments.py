"""Checks of the trees that a `Peft` is called with, by their structure alone: a jitted program has nothing of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from jpeft.core.tree import Path, Tree, flatten, is_array, join, nearest, peek

Shapes = Mapping[Path, tuple[tuple[int, ...], str]]  # shape and dtype of each leaf


def check_order(
    own: Shapes, weight: Path | None, params: Tree, adapter: Tree, call: str, *, values: bool = True
) -> None:
    """Checks that ``params`` and ``adapter`` are not something else: each other, the inputs, or both in one.

    A mistake that it cannot tell is left to `adapter_leaves`.

    Args:
      own: the adapter's leaves.
      weight: path of a leaf that the base has and the adapter has not; None if there is none.
      call: the call as it should be, such as ``"peft.apply(params, adapter, *inputs)"``.
      values: whether the values of ``params`` are needed, so that these may not be abstract.

    Raises:
      TypeError: one of the two is no tree.
      ValueError: they are other trees, or abstract.
    """
    first = next(iter(own), None)
    for what, tree in (("params", params if values else None), ("adapter", adapter)):
        _check_values(tree, what, call)
    if isinstance(params, Mapping) and isinstance(adapter, Mapping):
        params = params["params"] if isinstance(params.get("params"), Mapping) else params
        usual = _has(params, weight) and _has(adapter, first) and not (weight and _has(adapter, weight))
        problem = None if usual or first is None else _mistaken(own, weight, params, adapter)
        if problem:
            raise ValueError(f"{call}: {problem}")
        return
    if _is_no_tree(params):
        raise TypeError(f"{call}: params must be a tree, as from model.init, got {_shown(params)}; was it left out?")
    if _is_no_tree(adapter):
        left_out = "params" if _holds(params, own) and not (weight and _has(params, weight)) else "the adapter"
        raise TypeError(
            f"{call}: adapter must be a tree, as from peft.init, got {_shown(adapter)}; was {left_out} left out?"
        )


def _check_values(tree: Tree, what: str, call: str) -> None:
    leaves = flatten(tree) if isinstance(tree, Mapping) else {}
    for path, leaf in leaves.items():
        if isinstance(peek(leaf), jax.ShapeDtypeStruct):
            raise ValueError(
                f"{call}: {what} have an abstract array at {join(path)!r}; give arrays, or trace the call with "
                "jax.eval_shape"
            )


def _mistaken(own: Shapes, weight: Path | None, params: Tree, adapter: Tree) -> str | None:
    """The mistake in two trees, in words; None if none can be told."""
    holds_base = weight is not None and _has(adapter, weight)
    if _holds(params, own) and not (weight and _has(params, weight)) and (holds_base or not _holds(adapter, own)):
        return "the two trees are in the wrong order: the adapter was given as params, and params as the adapter"
    if holds_base and _holds(adapter, own):
        return "the adapter holds the base's leaves too; give it alone: peft.split(full) returns (params, adapter)"
    if holds_base:
        return "params were given as the adapter too; make an adapter with peft.init(key, params)"
    return None


def adapter_leaves(own: Shapes, adapter: Tree, method: str) -> dict[Path, Any]:
    """The adapter's leaves by path.

    Args:
      own: the leaves that it must have.
      method: the method's name, for the errors.

    Raises:
      TypeError: it is no tree.
      ValueError: a leaf is missing, has no place in this adapter, or has another shape.
    """
    if _is_no_tree(adapter):
        raise TypeError(f"the adapter must be a tree, as from peft.init, got {_shown(adapter)}")
    leaves = flatten(adapter)
    missing = [path for path in own if path not in leaves]
    if missing and len(missing) == len(own):
        has = f"has {join(next(iter(leaves)))!r} instead: is it another Peft's?" if leaves else "has no leaves"
        raise ValueError(f"the adapter lacks {join(missing[0])!r} and all other leaves of this {method}; it {has}")
    if missing:
        raise ValueError(
            f"the adapter lacks {join(missing[0])!r} ({len(leaves)} leaves, {len(own)} expected); if it is half of a "
            "partition, combine it with the other half first"
        )
    for path in leaves:
        if path not in own:
            raise ValueError(
                f"the adapter has a leaf {join(path)!r} that {method} does not{nearest(join(path), map(join, own))}"
            )
    for path, (shape, _) in own.items():
        got = np.shape(meta.unbox(leaves[path]))
        if got != shape:
            raise ValueError(f"adapter leaf {join(path)!r} has shape {got}, expected {shape}")
    return leaves


def _is_no_tree(value: Any) -> bool:
    return is_array(value) or isinstance(value, (list, tuple, str, int, float, type(None)))


def _has(tree: Any, path: Path | None) -> bool:
    """Whether a tree has a leaf at a path; True where there is no path to ask for."""
    for key in path or ():
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return path is None or (tree is not None and not isinstance(tree, Mapping))


def _holds(tree: Any, own: Shapes) -> bool:
    return all(_has(tree, path) for path in own)


def _shown(value: Any) -> str:
    return f"an array of shape {np.shape(value)}" if is_array(value) else f"a {type(value).__name__}"
