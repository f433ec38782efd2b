"""Parameter trees: paths, overlay, partition, labels and optimizer masking.

A *tree* is nested mappings (``dict`` or ``FrozenDict``). Its leaves are arrays, abstract arrays, labels or boxes
(Flax's ``AxisMetadata``, such as ``Partitioned``); ``None`` is a *hole*. A *path* is a tuple of keys, printed with
``/``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict, freeze, meta
from jax.core import Tracer
from jax.sharding import NamedSharding

Tree = Any
Path = tuple[str, ...]

TRAINABLE = "trainable"
FROZEN = "frozen"


def join(path: Iterable[str]) -> str:
    """A path as text; the root is ``"."``.

    >>> join(("encoder", "kernel"))
    'encoder/kernel'
    """
    return "/".join(path) or "."


def flatten(tree: Tree) -> dict[Path, Any]:
    """The leaves of a tree by path, without holes. Inverse of `unflatten`.

    >>> flatten({"a": {"b": 1, "c": None}})
    {('a', 'b'): 1}
    """
    out: dict[Path, Any] = {}

    def walk(node: Any, path: Path) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                walk(child, (*path, key))
        elif node is not None:
            out[path] = node

    walk(tree, ())
    return out


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """A nested dict from leaves by path. Inverse of `flatten`.

    >>> unflatten({("a", "b"): 1})
    {'a': {'b': 1}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def like(tree: Any, reference: Tree) -> Any:
    """``tree`` in the container type of ``reference``: a ``FrozenDict`` if that is one, else as it is."""
    return freeze(tree) if isinstance(reference, FrozenDict) else tree


def peek(leaf: Any) -> Any:
    """The leaf without its box, unless the box itself has a shape and a dtype.

    A quantized weight has both; opening it would dequantize it.

    >>> peek(meta.Partitioned(jnp.ones(3), names=("embed",))).shape
    (3,)
    """
    return leaf if hasattr(leaf, "shape") else meta.unbox(leaf)


def box_as(leaf: Any, value: Any) -> Any:
    """A value in the same box as ``leaf``, or as it is if ``leaf`` has no box.

    `flax.core.meta.replace_boxed` would open the box first, which dequantizes a quantized weight.

    >>> box_as(meta.Partitioned(jnp.ones(3), names=("embed",)), jnp.zeros(2)).names
    ('embed',)
    """
    return leaf.replace_boxed(value) if isinstance(leaf, meta.AxisMetadata) else value


def split_variables(params: Tree) -> tuple[Tree, dict[str, Any]]:
    """The parameters, and the other collections if ``params`` holds all variables of a model.

    Raises:
      TypeError: not a tree of mappings.

    >>> split_variables({"params": {"w": 1}, "batch_stats": {"mean": 0}})
    ({'w': 1}, {'batch_stats': {'mean': 0}})
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a tree of mappings, got {type(params).__name__}")
    if isinstance(params.get("params"), Mapping) and all(isinstance(v, Mapping) for v in params.values()):
        return params["params"], {k: v for k, v in params.items() if k != "params"}
    return params, {}


def is_array(x: Any) -> bool:
    """Whether a value is an array, an abstract array or a PRNG key."""
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) or jnp.issubdtype(
        getattr(x, "dtype", np.dtype(object)), jax.dtypes.prng_key
    )


def abstract_array(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array or a number, as JAX takes it: numpy's 64 bits are 32 unless they are enabled.

    >>> abstract_array(np.arange(3))
    ShapeDtypeStruct(shape=(3,), dtype=int32)
    """
    return jax.eval_shape(lambda x: x, x)


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The arrays of any pytree, and the function that puts others in their places.

    Python values (flags, strings, None) stay what they are, so that a trace of the arrays keeps them.

    >>> arrays, restore = split_arrays({"x": jnp.zeros(2), "train": True})
    >>> restore([1])
    {'train': True, 'x': 1}
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
    places = [is_array(x) for x in leaves]
    rest = [None if place else x for x, place in zip(leaves, places, strict=True)]  # no tracer outlives its trace

    def restore(arrays: Iterable[Any]) -> Any:
        given = iter(arrays)
        values = [next(given) if place else x for x, place in zip(rest, places, strict=True)]
        return jax.tree.unflatten(treedef, values)

    return [x for x, place in zip(leaves, places, strict=True) if place], restore


def map_with_path(fn: Callable[[Path, Any], Any], tree: Tree, path: Path = ()) -> Any:
    """A tree of ``fn(path, leaf)``; containers and holes stay.

    >>> map_with_path(lambda path, x: join(path), {"a": {"b": 1}})
    {'a': {'b': 'a/b'}}
    """
    if isinstance(tree, Mapping):
        return like({k: map_with_path(fn, v, (*path, k)) for k, v in tree.items()}, tree)
    return None if tree is None else fn(path, tree)


def combine(base: Tree, overlay: Tree) -> Any:
    """Lays ``overlay`` over ``base``: its leaves are added to the base's or replace them.

    Where one tree has a hole (None), the other's leaf is used. Neither argument is changed and no array is copied.
    Inverse of `partition`.

    Args:
      base: e.g. the pretrained ``params``, or the ``trainable`` half of a partition.
      overlay: e.g. an adapter, or the ``frozen`` half.

    Returns:
      A new tree in ``base``'s container type.

    Raises:
      ValueError: one tree has a leaf where the other has a subtree.

    >>> combine({"dense": {"kernel": 1, "bias": 2}}, {"dense": {"bias": 3, "lora_a": 4}})
    {'dense': {'kernel': 1, 'bias': 3, 'lora_a': 4}}
    """

    def walk(a: Any, b: Any, path: Path) -> Any:
        if b is None:
            return a
        if a is None:
            return b
        a_node, b_node = isinstance(a, Mapping), isinstance(b, Mapping)
        if a_node != b_node:
            raise ValueError(
                f"cannot combine at {join(path)!r}: one tree has a leaf where the other has a subtree. "
                "Was this adapter made for another model?"
            )
        if not a_node:
            return b
        merged = {k: walk(v, b.get(k), (*path, k)) for k, v in a.items()}
        merged.update({k: v for k, v in b.items() if k not in a})
        return like(merged, a)

    return walk(base, overlay, ())


def partition(tree: Tree, labels: Tree) -> tuple[Any, Any]:
    """Splits a tree by labels into ``(trainable, frozen)``: the same structure twice, with None for the other half.

    Inverse of `combine`: ``combine(*partition(tree, labels))`` is ``tree``.

    Args:
      tree: any tree, e.g. ``combine(params, adapter)``.
      labels: "trainable" or "frozen" for every leaf, e.g. ``peft.labels(tree)``; may have more leaves than ``tree``.

    Raises:
      ValueError: a leaf without a label, or a label other than these two.

    >>> partition({"w": 1, "b": 2}, {"w": "frozen", "b": "trainable"})
    ({'w': None, 'b': 2}, {'w': 1, 'b': None})
    """
    found = _labels_for(tree, labels)
    keep = {
        which: map_with_path(lambda p, x, which=which: x if found[p] == which else None, tree)
        for which in (TRAINABLE, FROZEN)
    }
    return keep[TRAINABLE], keep[FROZEN]


def masked(tx: optax.GradientTransformation, labels: Tree) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the trainable leaves only; frozen leaves get zero updates and no optimizer state.

    For training loops that carry the full tree. It also takes a part of that tree, e.g. the adapter alone: labels are
    looked up by path.

    Raises:
      ValueError: in ``init`` and ``update``, for a leaf without a label.

    >>> import optax, jax.numpy as jnp
    >>> tx = masked(optax.adam(1e-3), {"w": "frozen", "lora_a": "trainable"})
    >>> state = tx.init({"w": jnp.ones(3), "lora_a": jnp.ones(2)})
    >>> sum(x.size for x in jax.tree.leaves(state))     # count, mu and nu of lora_a
    5
    """

    def labels_of(tree: Tree) -> Any:
        found = _labels_for(tree, labels)
        return map_with_path(lambda p, _: found[p], tree)

    return optax.multi_transform({TRAINABLE: tx, FROZEN: optax.set_to_zero()}, labels_of)


def _labels_for(tree: Tree, labels: Tree) -> dict[Path, str]:
    """The labels by path. Raises a ValueError if a leaf of ``tree`` has none, or one that is not a label."""
    known = flatten(labels)
    for path in flatten(tree):
        if path not in known:
            raise ValueError(f"no label for {join(path)!r}{nearest(join(path), map(join, known))}")
        if known[path] not in (TRAINABLE, FROZEN):
            raise ValueError(f"label at {join(path)!r} is {known[path]!r}; expected {TRAINABLE!r} or {FROZEN!r}")
    return known


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The end of an error message: the names closest to one that was not found, or an empty string."""
    depth = name.count("/") + 1

    def similarity(other: str) -> float:
        # A suffix such as `query` is far from `encoder/layer/0/attention/self/query` by edit distance alone.
        tail = "/".join(other.split("/")[-depth:])
        return max(difflib.SequenceMatcher(None, name, x).ratio() for x in (other, tail))

    scores = {other: similarity(other) for other in names}
    close = sorted((x for x in scores if scores[x] >= 0.4), key=lambda x: -scores[x])
    return f"; nearest: {', '.join(close[:n])}" if close else ""


def natural(path: Path) -> list[tuple[Any, ...]]:
    """A key that sorts paths by the numbers in them.

    >>> sorted([("layer_10",), ("layer_2",)], key=natural)
    [('layer_2',), ('layer_10',)]
    """
    split = ["".join(c if c.isdigit() else f" {c} " for c in part).split() for part in path]
    return [tuple((0, int(x), "") if x.isdigit() else (1, 0, x) for x in part) for part in split]


def size_bytes(tree: Tree) -> int:
    """The bytes of a tree's leaves, from their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def named_sharding(leaf: Any) -> NamedSharding | None:
    """A leaf's ``NamedSharding``, or None: tracers and leaves on a single device have none."""
    leaf = peek(leaf)
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def count(tree: Tree) -> int:
    """The number of parameters in a tree; a quantized weight counts as the array that it stands for."""
    return sum(peek(leaf).size for leaf in flatten(tree).values())


def all_finite(tree: Tree) -> jax.Array:
    """A scalar boolean: whether every floating leaf is free of NaN and infinity."""
    checks = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack(checks).all() if checks else jnp.asarray(True)
