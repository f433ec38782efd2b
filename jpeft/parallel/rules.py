"""Shardings: of a base, by rules; of an adapter, which follow from the base's; of batches and what is made of them.

An adapter's A takes the sharding of W's input axes, B that of its output axes, rank is never sharded, vectors follow
the axis they scale, and a leaf that stands in for a base leaf is sharded like it. Everything else is replicated.

    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    params = shard(params, mesh)  # by the names of its axes, or the longer side of each matrix over "fsdp"
    adapter = peft.init(key, params)  # follows
    state, metrics = step(state, params, shard_batch(batch, mesh))
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta
from flax.linen import spmd
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core.placement import AnyMesh, automatic, axes_of, place, trimmed
from jpeft.core.quantized import Quantized, shardings_like
from jpeft.core.tree import Path, Tree, flatten, join, like, peek, unflatten
from jpeft.parallel.mesh import SEQUENCE_AXIS

Rules = Sequence[tuple[str, Any]]
# Where the axes of a model go that names them, on a mesh that has these.
LOGICAL_RULES: Rules = (("vocab", "tensor"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"),
                        ("embed", "fsdp"))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the base


def shard(params: Tree, mesh: AnyMesh, rules: Rules | None = None, *, names: Tree | None = None) -> Any:
    """The tree with every leaf in its place on a mesh: see `param_shardings` for the rules.

    Leaves may be NumPy arrays, which go piece by piece to where they belong, JAX arrays, abstract, in boxes, or
    quantized. On several hosts each gives the same values, and only pieces of its own devices are moved.

    >>> mesh = jax.make_mesh((1,), ("fsdp",))
    >>> shard({"dense": {"kernel": np.ones((8, 4))}}, mesh)["dense"]["kernel"].sharding.spec
    P('fsdp',)
    """
    shardings = flatten(param_shardings(params, mesh, rules, names=names))
    leaves = {path: jax.tree.map(place, leaf, shardings[path]) for path, leaf in flatten(params).items()}
    return like(unflatten(leaves), params)


def param_shardings(params: Tree, mesh: AnyMesh, rules: Rules | None = None, *, names: Tree | None = None) -> Any:
    """A ``NamedSharding`` for every array of a tree, from rules.

    A rule is a pair. With a ``PartitionSpec``, it is for the leaves whose whole path a regular expression matches:
    ``(".*/query/kernel", P("fsdp", "tensor"))``. Else it is for a logical axis, and gives a mesh axis, a tuple of them
    or None: ``("embed", "fsdp")``. Paths go before names; the first that matches counts; what no rule speaks of is
    replicated.

    Args:
      params: the base tree, concrete or abstract. A quantized weight's codes and scales follow the weight.
      mesh: any, of axes with any names.
      rules: None takes `LOGICAL_RULES` where axes have names, else each matrix's longer side over the axis "fsdp".
      names: the logical names of axes, by leaf, as ``nn.get_partition_spec`` or `jpeft.models.logical_names` give them,
        where leaves are in no boxes that tell.

    Returns:
      A tree like ``params``, boxes and quantized leaves included.

    Raises:
      ValueError: a rule or a name that is for nothing, an axis that the mesh lacks, a dimension that does not divide.
      TypeError: a leaf that is no array.

    Warns, where no rules are given, of an axis of the mesh, but for "data" and "sequence", that no leaf is spread over.

    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> rules = [(".*kernel", PartitionSpec(None, "tensor"))]
    >>> param_shardings({"dense": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}, mesh, rules)["dense"]["kernel"].spec
    P(None, 'tensor')
    """
    mesh, leaves = automatic(mesh), flatten(params)
    for path, leaf in leaves.items():
        if not hasattr(peek(leaf), "shape"):
            raise TypeError(f"{join(path)} is a {type(leaf).__name__}, expected an array")
    known = {path: _names_of(leaf) for path, leaf in leaves.items()} | _given_names(names, leaves)
    by_path, by_name = _read_rules(mesh, rules, leaves, known)
    unnamed = rules is None and not any(known.values())
    spread = {}
    for path, leaf in leaves.items():
        shape = peek(leaf).shape
        spec = next((spec for pattern, spec in by_path if pattern.fullmatch(join(path))), None)
        if spec is None and known[path]:
            spec = spmd.logical_to_mesh_axes(known[path], by_name)
        if spec is None:
            spec = _longer_side(shape, mesh) if unnamed else PartitionSpec()
        spread[path] = _checked(path, shape, spec, mesh)
    if rules is None:
        _warn_of_idle_axes(mesh, spread.values())
    out = {path: _in_boxes(leaf, NamedSharding(mesh, spread[path])) for path, leaf in leaves.items()}
    return like(unflatten(out), params)


def _given_names(names: Tree | None, leaves: Mapping[Path, Any]) -> dict[Path, tuple[Any, ...]]:
    """The names of axes that a caller gives, each of which is for something."""
    out = {}
    for path, entries in flatten(names or {}).items():
        if entries is None:
            continue
        if path not in leaves:
            some = ", ".join(join(path) for path in list(leaves)[:3])
            raise ValueError(f"names are given for {join(path)}, which is no leaf; there are {some}, …")
        shape = peek(leaves[path]).shape
        if isinstance(entries, str) or len(entries) not in (0, len(shape)):
            raise ValueError(f"names of {join(path)}: expected one for each axis of shape {shape}, got {entries!r}")
        out[path] = tuple(entries)
    return out


def _warn_of_idle_axes(mesh: AnyMesh, specs: Iterable[PartitionSpec]) -> None:
    used = {name for spec in specs for name in axes_of(spec)} | {"data", SEQUENCE_AXIS}
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            warnings.warn(
                f"no weight is spread over the mesh's axis {name!r}, which is {size} wide: each device along it holds "
                "all. Give rules, or the names of axes (names=jpeft.models.logical_names(model) for jpeft's models)",
                stacklevel=4,
            )


def _names_of(leaf: Any) -> tuple[Any, ...]:
    """The logical names of a leaf's axes, where its box tells."""
    box = getattr(leaf, "codes", leaf)  # of a quantized weight, these are in the box
    return tuple(box.names) if isinstance(box, meta.Partitioned) else ()


def _read_rules(
    mesh: AnyMesh, rules: Rules | None, leaves: Mapping[Path, Any], known: Mapping[Path, tuple[Any, ...]]
) -> tuple[list[tuple[re.Pattern[str], PartitionSpec]], list[tuple[str, Any]]]:
    """Rules for paths and for names, each of which says something."""
    if rules is None:
        return [], [(name, axis) for name, axis in LOGICAL_RULES if axis in mesh.axis_names]
    if isinstance(rules, Mapping):
        raise ValueError("rules are a list of pairs, of which the first that matches counts; got a mapping")
    by_path, by_name = [], []
    there = {name for names in known.values() for name in names if name is not None}
    had = f"the axes are called {', '.join(sorted(there))}" if there else "no axis of the tree has a name"
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"a rule is a pair of a path or an axis's name and where it goes, got {rule!r}")
        what, where = rule
        if lacking := sorted(axes_of(where) - set(mesh.axis_names)):
            raise ValueError(f"the rule for {what!r} names the axis {lacking[0]!r}; the mesh has {mesh.axis_names}")
        if not isinstance(where, PartitionSpec):
            if what not in there:
                raise ValueError(
                    f"the rule for {what!r} matches nothing: {had}; a rule for paths gives a PartitionSpec"
                )
            by_name.append((what, where))
            continue
        try:
            pattern = re.compile(what)
        except re.error as error:
            raise ValueError(f"the rule {what!r} is no regular expression: {error}") from error
        if not any(pattern.fullmatch(join(path)) for path in leaves):
            some = ", ".join(join(path) for path in list(leaves)[:3])
            raise ValueError(f"the rule {what!r} matches no leaf; there are {some}, …")
        by_path.append((pattern, where))
    return by_path, by_name


def _longer_side(shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The longer of a matrix's sides that divides over "fsdp"; leading axes, of stacked layers, stay whole."""
    if len(shape) < 2 or "fsdp" not in mesh.shape:
        return PartitionSpec()
    sides = [i for i in (len(shape) - 2, len(shape) - 1) if shape[i] % mesh.shape["fsdp"] == 0]
    return PartitionSpec(*[None] * max(sides, key=lambda i: shape[i]), "fsdp") if sides else PartitionSpec()


def _checked(path: Path, shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh) -> PartitionSpec:
    """A spec that a leaf can have, without the empty entries at its end."""
    if len(spec) > len(shape):
        raise ValueError(f"{join(path)}: shape {shape} has fewer axes than its rule, {spec}")
    if PartitionSpec.UNCONSTRAINED in spec:
        raise ValueError(f"{join(path)}: {spec} leaves an axis open; a weight's place has to be told")
    named = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
    if len(set(named)) < len(named):
        raise ValueError(f"{join(path)}: {spec} names an axis of the mesh twice")
    for size, entry in zip(shape, spec, strict=False):
        ways = math.prod(mesh.shape[name] for name in axes_of(entry))
        if size % ways:
            raise ValueError(f"{join(path)}: an axis of {size} does not divide over {entry!r}, which is {ways} wide "
                             f"(shape {shape}, {spec})")  # fmt: skip
    return PartitionSpec(*trimmed(spec))


def _in_boxes(leaf: Any, sharding: NamedSharding) -> Any:
    """A leaf's sharding in the boxes that the leaf is in."""
    if isinstance(leaf, Quantized):
        return shardings_like(leaf, sharding)
    return meta.replace_boxed(leaf, sharding) if isinstance(leaf, meta.AxisMetadata) else sharding
