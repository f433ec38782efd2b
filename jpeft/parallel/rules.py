"""Sharding rules: from parameter paths or logical axis names to the sharding of every base weight.

    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    params = shard(params, mesh)  # by logical axis names, or the longer side of each matrix over "fsdp"
    adapter = peft.init(key, params)  # sharded like the base
    state, metrics = step(state, params, shard_batch(batch, mesh))

The shardings of an adapter follow from those of its base. A is sharded like the input axes of W, B like its output
axes, rank never, vectors like the axis that they scale, and a leaf in place of a base leaf like that leaf. Everything
else is replicated.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core.placement import AnyMesh, automatic, axes_of, num_shards, place, trimmed
from jpeft.core.quantized import Quantized, shardings_like
from jpeft.core.tree import Path, Tree, flatten, join, like, peek, unflatten
from jpeft.frontends import as_tree, axis_names
from jpeft.parallel.mesh import POPULATION_AXIS, SEQUENCE_AXIS

Rules = Sequence[tuple[str, Any]]
# The default mesh axes of a model's logical axes.
LOGICAL_RULES: Rules = (
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)


def shard(params: Tree, mesh: AnyMesh, rules: Rules | None = None, *, names: Tree | None = None) -> Any:
    """The tree, sharded over a mesh. `param_shardings` describes the rules and errors.

    Leaves may be NumPy arrays, of which each device gets its shard, JAX arrays, abstract, boxed or quantized. With
    several processes, each passes the same values, and only the shards of its own devices are moved.

    >>> import numpy as np
    >>> mesh = jax.make_mesh((1,), ("fsdp",))
    >>> shard({"dense": {"kernel": np.ones((8, 4))}}, mesh)["dense"]["kernel"].sharding.spec
    P('fsdp',)
    """
    names = axis_names(params) if names is None else names
    params, restore = as_tree(params)
    shardings = flatten(param_shardings(params, mesh, rules, names=names))
    leaves = {path: jax.tree.map(place, leaf, shardings[path]) for path, leaf in flatten(params).items()}
    return restore(like(unflatten(leaves), params))


def param_shardings(params: Tree, mesh: AnyMesh, rules: Rules | None = None, *, names: Tree | None = None) -> Any:
    """A ``NamedSharding`` for every array of a tree, from rules.

    A rule is a pair. With a ``PartitionSpec`` it applies to the leaves whose whole path its regular expression matches:
    ``(".*/query/kernel", P("fsdp", "tensor"))``. Otherwise it maps a logical axis to a mesh axis, a tuple of mesh axes
    or None: ``("embed", "fsdp")``. A name without a rule that is an axis of the mesh is that axis. Rules for paths go
    before rules for names, earlier rules before later ones. A leaf that no rule matches is replicated.

    Args:
      params: the base tree, concrete or abstract. The codes and scales of a quantized weight are sharded like it.
      mesh: a mesh with any axes.
      rules: None: `LOGICAL_RULES` if axes have logical names, otherwise the longer side of each matrix over "fsdp".
      names: logical axis names by leaf, as from ``nn.get_partition_spec`` or `jpeft.models.logical_names`, for leaves
        that are not in boxes with names. Variables of NNX have theirs in their metadata, ``out_sharding``.

    Returns:
      A tree like ``params``, boxes and quantized leaves included; of an NNX module, nested dicts.

    Raises:
      ValueError: a rule or name that matches nothing, a mesh axis that does not exist, an axis that does not divide.
      TypeError: a leaf that is not an array.

    Warns: without rules, of every mesh axis except "data", "sequence" and "population" that shards no leaf.

    >>> import numpy as np
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> rules = [(".*kernel", PartitionSpec(None, "tensor"))]
    >>> param_shardings({"dense": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}, mesh, rules)["dense"]["kernel"].spec
    P(None, 'tensor')
    """
    names = axis_names(params) if names is None else names
    tree, restore = as_tree(params)
    mesh, leaves = automatic(mesh), flatten(tree)
    for path, leaf in leaves.items():
        if not hasattr(peek(leaf), "shape"):
            raise TypeError(f"{join(path)} is a {type(leaf).__name__}, expected an array")
    known = {path: _names_of(leaf) for path, leaf in leaves.items()} | _given_names(names, leaves)
    by_path, by_name = _read_rules(mesh, rules, leaves, known)
    unnamed = rules is None and not any(known.values())
    specs = {}
    for path, leaf in leaves.items():
        shape = peek(leaf).shape
        spec = next((spec for pattern, spec in by_path if pattern.fullmatch(join(path))), None)
        if spec is None and known[path]:
            spec = _spec_from_names(path, known[path], by_name, mesh)
        if spec is None:
            spec = _longer_side(shape, mesh) if unnamed else PartitionSpec()
        specs[path] = _checked(path, shape, spec, mesh)
    if rules is None:
        _warn_of_idle_axes(mesh, specs.values())
    out = {path: _in_boxes(leaf, NamedSharding(mesh, specs[path])) for path, leaf in leaves.items()}
    shardings = like(unflatten(out), tree)
    return restore(shardings) if isinstance(params, Mapping) else shardings


def _given_names(names: Tree | None, leaves: Mapping[Path, Any]) -> dict[Path, tuple[Any, ...]]:
    """The logical names from the caller, checked against the leaves."""
    out = {}
    for path, entries in flatten(names or {}).items():
        if entries is None:
            continue
        if path not in leaves:
            raise ValueError(
                f"names has an entry for {join(path)}, which is not a leaf; the leaves are {_some(leaves)}"
            )
        shape = peek(leaves[path]).shape
        if isinstance(entries, str) or len(entries) not in (0, len(shape)):
            raise ValueError(f"names of {join(path)}: expected one per axis of shape {shape}, got {entries!r}")
        out[path] = tuple(entries)
    return out


def _some(leaves: Mapping[Path, Any]) -> str:
    """The first few paths, for error messages."""
    return ", ".join([*(join(path) for path in list(leaves)[:3]), "…"])


def _warn_of_idle_axes(mesh: AnyMesh, specs: Iterable[PartitionSpec]) -> None:
    used = {name for spec in specs for name in axes_of(spec)} | {"data", SEQUENCE_AXIS, POPULATION_AXIS}
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            warnings.warn(
                f"no weight is sharded over the mesh's axis {name!r}, which is {size} wide: each device along it holds "
                "them all. Pass rules, or logical axis names: jpeft.models.logical_names(model) for jpeft's models",
                stacklevel=4,
            )


def _names_of(leaf: Any) -> tuple[Any, ...]:
    """The logical names of a leaf's axes, if its box has them."""
    box = getattr(leaf, "codes", leaf)  # a quantized weight has its box around the codes
    return tuple(box.names) if isinstance(box, meta.Partitioned) else ()


def _read_rules(
    mesh: AnyMesh, rules: Rules | None, leaves: Mapping[Path, Any], known: Mapping[Path, tuple[Any, ...]]
) -> tuple[list[tuple[re.Pattern[str], PartitionSpec]], list[tuple[str, Any]]]:
    """Rules for paths and rules for names. Raises a ValueError for one that is malformed or matches nothing."""
    if rules is None:
        return [], [(name, axis) for name, axis in LOGICAL_RULES if axis in mesh.axis_names]
    if isinstance(rules, Mapping):
        raise ValueError("rules must be a list of pairs, of which the first match counts; got a mapping")
    by_path, by_name = [], []
    names = {name for names in known.values() for name in names if name is not None}
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"a rule must be a pair of a path or an axis name and its target, got {rule!r}")
        pattern, target = rule
        if unknown := sorted(axes_of(target) - set(mesh.axis_names)):
            raise ValueError(f"the rule for {pattern!r} names the axis {unknown[0]!r}; the mesh has {mesh.axis_names}")
        if isinstance(target, PartitionSpec):
            by_path.append((_compiled(pattern, leaves), target))
        elif pattern in names:
            by_name.append((pattern, target))
        else:
            found = f"the axes are named {', '.join(sorted(names))}" if names else "no axis of the tree has a name"
            raise ValueError(
                f"the rule for {pattern!r} matches nothing: {found}; a rule for paths needs a PartitionSpec"
            )
    return by_path, by_name


def _compiled(pattern: str, leaves: Mapping[Path, Any]) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the rule {pattern!r} is not a regular expression: {error}") from error
    if not any(compiled.fullmatch(join(path)) for path in leaves):
        raise ValueError(f"the rule {pattern!r} matches no leaf; the leaves are {_some(leaves)}")
    return compiled


def _spec_from_names(path: Path, names: tuple[Any, ...], rules: list[tuple[str, Any]], mesh: AnyMesh) -> PartitionSpec:
    """The spec of named axes, as Flax's ``logical_to_mesh_axes`` gives it.

    A rule applies if its name has no rule yet and none of its mesh axes shards another axis of the leaf. A name that no
    rule has and that is an axis of the mesh is that axis.
    """
    logical = [name for name in names if isinstance(name, str)]
    if len(set(logical)) < len(logical):
        raise ValueError(f"{join(path)}: the axis names {names} name an axis twice")
    entries = {}
    used = {axis for name in names if not isinstance(name, str) for axis in axes_of(name)}
    for name, target in rules:
        if name in logical and name not in entries and not used & axes_of(target):
            entries[name] = target
            used |= axes_of(target)
    taken = used | {name for name, _ in rules}
    entries |= {name: name for name in logical if name in mesh.axis_names and name not in taken}
    return PartitionSpec(*(entries.get(name) if isinstance(name, str) else name for name in names))


def _longer_side(shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Shards the longer side of a matrix that divides over "fsdp"; leading axes, of stacked layers, stay whole."""
    if len(shape) < 2 or "fsdp" not in mesh.shape:
        return PartitionSpec()
    sides = [i for i in (len(shape) - 2, len(shape) - 1) if shape[i] % mesh.shape["fsdp"] == 0]
    return PartitionSpec(*[None] * max(sides, key=lambda i: shape[i]), "fsdp") if sides else PartitionSpec()


def _checked(path: Path, shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh) -> PartitionSpec:
    """The spec without trailing Nones. Raises a ValueError if it does not fit the leaf."""
    if len(spec) > len(shape):
        raise ValueError(f"{join(path)}: shape {shape} has fewer axes than its rule, {spec}")
    if PartitionSpec.UNCONSTRAINED in spec:
        raise ValueError(f"{join(path)}: {spec} leaves an axis unconstrained; a weight needs a definite sharding")
    axes = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    if len(set(axes)) < len(axes):
        raise ValueError(f"{join(path)}: {spec} names an axis of the mesh twice")
    for size, entry in zip(shape, spec, strict=False):
        if size % (shards := num_shards(mesh, entry)):
            raise ValueError(
                f"{join(path)}: an axis of {size} does not divide over {entry!r}, which is {shards} wide "
                f"(shape {shape}, {spec})"
            )
    return trimmed(spec)


def _in_boxes(leaf: Any, sharding: NamedSharding) -> Any:
    """The shardings of a leaf's arrays, in the leaf's boxes."""
    if isinstance(leaf, Quantized):
        return shardings_like(leaf, sharding)
    return meta.replace_boxed(leaf, sharding) if isinstance(leaf, meta.AxisMetadata) else sharding
