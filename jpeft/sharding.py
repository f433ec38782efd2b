"""Shardings: of a base, by rules; of an adapter, which follow from the base's; of batches and what is made of them.

An adapter's A takes the sharding of W's input axes, B that of its output axes, rank is never sharded, vectors follow
the axis they scale, and a leaf that stands in for a base leaf is sharded like it. Everything else is replicated.

    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    params = shard(params, mesh)  # by the names of its axes, or the longer side of each matrix over "fsdp"
    adapter = peft.init(key, params)  # follows
    state, metrics = step(state, params, shard_batch(batch, mesh))
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.linen import spmd
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jpeft.quantization import Quantized, shardings_like
from jpeft.sites import Site, derive_entries
from jpeft.tree import Path, Tree, flatten, join, like, named_sharding, peek, unflatten

if TYPE_CHECKING:
    from jpeft.peft import Peft

Rules = Sequence[tuple[str, Any]]
AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone

DATA_AXES = ("data", "fsdp")  # what a batch's rows are spread over
SEQUENCE_AXIS = "sequence"
# Where the axes of a model go that names them, on a mesh that has these.
LOGICAL_RULES: Rules = (("vocab", "tensor"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"),
                        ("embed", "fsdp"))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the base


def shard(params: Tree, mesh: AnyMesh, rules: Rules | None = None, *, names: Tree | None = None) -> Any:
    """The tree with every leaf in its place on a mesh: see `param_shardings` for the rules.

    Leaves may be NumPy arrays, which go piece by piece to where they belong, JAX arrays, abstract, in boxes, or
    quantised. On several hosts each gives the same values, and only pieces of its own devices are moved.

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
      params: the base tree, concrete or abstract. A quantised weight's codes and scales follow the weight.
      mesh: any, of axes with any names.
      rules: None takes `LOGICAL_RULES` where axes have names, else each matrix's longer side over the axis "fsdp".
      names: the logical names of axes, by leaf, as ``nn.get_partition_spec`` or `jpeft.models.logical_names` give them,
        where leaves are in no boxes that tell.

    Returns:
      A tree like ``params``, boxes and quantised leaves included.

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
    used = {name for spec in specs for name in _axes_of(spec)} | {"data", SEQUENCE_AXIS}
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            warnings.warn(
                f"no weight is spread over the mesh's axis {name!r}, which is {size} wide: each device along it holds "
                "all. Give rules, or the names of axes (names=jpeft.models.logical_names(model) for jpeft's models)",
                stacklevel=4,
            )


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, whose automatic axes lie along the links between chips where they can.

    ``jax.make_mesh`` refuses axes that cut a side of a slice in two, on some chips: 16 by 4 on a slice of 8 by 8.

    >>> make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]).axis_names
    ('data', 'fsdp')
    """
    sizes = tuple(axes.values())
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def automatic(mesh: AnyMesh) -> Any:
    """The mesh with axes of the kind where XLA finds how what is computed is laid out.

    ``jax.make_mesh`` makes explicit ones, where ambiguous products must say it, which Flax's modules do not.

    >>> automatic(jax.make_mesh((1,), ("data",))).axis_types
    (Auto,)
    """
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == kinds:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def _names_of(leaf: Any) -> tuple[Any, ...]:
    """The logical names of a leaf's axes, where its box tells."""
    box = getattr(leaf, "codes", leaf)  # of a quantised weight, these are in the box
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
        if lacking := sorted(_axes_of(where) - set(mesh.axis_names)):
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


def _axes_of(where: Any) -> set[str]:
    """The mesh axes that a rule, or an entry of one, speaks of."""
    if isinstance(where, str):
        return {where}
    entries = where if isinstance(where, PartitionSpec | tuple | list) else ()
    return {name for entry in entries for name in _axes_of(entry)}


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
        ways = math.prod(mesh.shape[name] for name in _axes_of(entry))
        if size % ways:
            raise ValueError(f"{join(path)}: an axis of {size} does not divide over {entry!r}, which is {ways} wide "
                             f"(shape {shape}, {spec})")  # fmt: skip
    return PartitionSpec(*_trimmed(spec))


def _trimmed(entries: Iterable[Any]) -> list[Any]:
    """Without the empty entries at the end: as XLA spells its outputs; jit takes another spelling for another input."""
    kept = list(entries)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


def _in_boxes(leaf: Any, sharding: NamedSharding) -> Any:
    """A leaf's sharding in the boxes that the leaf is in."""
    if isinstance(leaf, Quantized):
        return shardings_like(leaf, sharding)
    return meta.replace_boxed(leaf, sharding) if isinstance(leaf, meta.AxisMetadata) else sharding


def place(value: Any, sharding: Any) -> Any:
    """One array with a sharding. Of a NumPy array, each device gets its piece, and each host moves its own alone."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if isinstance(value, Tracer):
        return jax.lax.with_sharding_constraint(value, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


# ------------------------------------------------------------------------------------------------ batches, activations


def batch_shardings(batch: Any, mesh: AnyMesh) -> Any:
    """Where the arrays of a batch go: rows over "data" and "fsdp", tokens over "sequence", as far as the mesh has them.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> batch_shardings(np.ones((8, 16)), mesh).spec
    P('data',)
    """
    mesh = automatic(mesh)
    rows = tuple(name for name in DATA_AXES if name in mesh.axis_names)
    tokens = SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.axis_names else None
    entry = rows[0] if len(rows) == 1 else rows or None

    def one(path: Any, x: Any) -> NamedSharding:
        spec = (entry, tokens)[: np.ndim(x)]
        for size, name in zip(np.shape(x), spec, strict=False):
            ways = math.prod(mesh.shape[axis] for axis in _axes_of(name))
            if size % ways:
                raise ValueError(f"the batch's {jax.tree_util.keystr(path) or 'array'} of shape {np.shape(x)}: {size} "
                                 f"does not divide over {name!r}, which is {ways} wide")  # fmt: skip
        return NamedSharding(mesh, PartitionSpec(*_trimmed(spec)))

    return jax.tree_util.tree_map_with_path(one, batch)


def shard_batch(batch: Any, mesh: AnyMesh, rows: int | None = None) -> Any:
    """A batch in its place on a mesh.

    Args:
      rows: how many the batch has, where each host gives those of its own devices alone (`local_rows`). None: each
        host gives them all, and moves its own.

    Raises:
      ValueError: rows or tokens that do not divide over the mesh.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> shard_batch({"ids": np.ones((8, 16))}, mesh)["ids"].shape
    (8, 16)
    """
    if rows is None:
        return jax.tree.map(place, batch, batch_shardings(batch, mesh))
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    put = lambda x, to, all: jax.make_array_from_process_local_data(to, x, all.shape)  # noqa: E731
    return jax.tree.map(put, batch, batch_shardings(whole, mesh), whole)


def data_ways(mesh: AnyMesh) -> int:
    """How many parts a batch's rows are spread in.

    >>> data_ways(jax.make_mesh((1,), ("tensor",)))
    1
    """
    return math.prod(mesh.shape[name] for name in DATA_AXES if name in mesh.axis_names)


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Which of a batch's rows lie on this host's devices: what it has to read.

    >>> local_rows(4, jax.make_mesh((1,), ("data",)))
    array([0, 1, 2, 3])
    """
    sharding = batch_shardings(jax.ShapeDtypeStruct((rows,), np.int32), mesh)
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


class Layout(NamedTuple):
    """How a batch's rows, and perhaps its tokens, are spread."""

    mesh: Any
    spec: PartitionSpec
    shape: tuple[int, ...]  # rows and, where it has them, tokens of a row

    def of(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array goes whose leading axes are the batch's, or its rows and tokens as one axis."""
        n = len(self.spec)
        flat = n == 1 and shape[:1] == (math.prod(self.shape),)
        if len(shape) <= n or not (flat or shape[:n] == self.shape[:n]):
            return None
        return NamedSharding(self.mesh, PartitionSpec(*self.spec, *[PartitionSpec.UNCONSTRAINED] * (len(shape) - n)))


def layout_on(mesh: Mesh | None, batch: Any) -> Layout | None:
    """That of a batch which `shard_batch` puts on a mesh; of no mesh there is none. For what is being traced."""
    if mesh is None:
        return None
    first = max(jax.tree.leaves(batch), key=np.ndim)
    spec = _trimmed(batch_shardings(first, mesh).spec)
    return Layout(automatic(mesh), PartitionSpec(*spec), first.shape[:2]) if spec else None


def layout_of(batch: Any, parts: int = 1) -> Layout | None:
    """That of a batch which is cut into so many parts, from its first array that is spread over a mesh."""
    for x in jax.tree.leaves(batch):
        sharding = named_sharding(x)
        if sharding is not None and (spec := _trimmed(sharding.spec)) and x.shape[0] % parts == 0:
            return Layout(sharding.mesh, PartitionSpec(*spec), (x.shape[0] // parts, *x.shape[1:2]))
    return None


@contextlib.contextmanager
def constrained(layout: Layout | None) -> Iterator[None]:
    """What modules called in here return keeps its rows spread as the batch's are; other axes are XLA's to choose.

    Without it XLA may follow the weights instead: an embedding sharded over its width makes activations that are
    sharded over their width, with every row on every chip.
    """
    if layout is None:
        yield
        return

    def pin(x: Any) -> Any:
        where = layout.of(x.shape) if isinstance(x, jax.Array) else None
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return jax.tree.map(pin, call(*args, **kwargs))

    token = _running.set(layout)
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        _running.reset(token)


_running: ContextVar[Layout | None] = ContextVar("running", default=None)


def tokens_are_spread() -> bool:
    """Whether what is being traced has the tokens of a row on several devices, as a batch within `constrained` says."""
    layout = _running.get()
    return layout is not None and any(entry is not None for entry in layout.spec[1:])


# -------------------------------------------------------------------------------------------------------- the adapter


def adapter_shardings(peft: Peft, params: Tree) -> Any:
    """The sharding of every adapter leaf, for ``jax.jit(..., out_shardings=...)`` or ``jax.device_put``.

    Args:
      peft: the bound method.
      params: the base tree, its leaves carrying ``NamedSharding``s (arrays or ``jax.ShapeDtypeStruct``s).

    Returns:
      A tree like the adapter with a ``NamedSharding`` for every leaf. Optimiser state made from a sharded adapter
      takes the same.

    Raises:
      ValueError: no base leaf carries a ``NamedSharding``.
    """
    base = flatten(params)
    replicated = everywhere(base.values())
    if replicated is None:
        raise ValueError("no leaf of params carries a NamedSharding: jpeft.shard puts it on a mesh")
    out = {path: leaf_sharding(base, site, roles) or replicated for path, (site, roles) in peft.leaf_sites().items()}
    return like(unflatten(out), params)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device of a mesh."""
    return NamedSharding(automatic(mesh), PartitionSpec())


def everywhere(leaves: Iterable[Any]) -> NamedSharding | None:
    """Replicated over the mesh that the leaves are on, if they are on one."""
    mesh = next((s.mesh for leaf in leaves if (s := named_sharding(leaf)) is not None), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def leaf_sharding(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None) -> Any:
    """The sharding of one adapter leaf, or None where the base says nothing about it."""
    if site is None or roles is None:
        return None
    sharding = named_sharding(base[site.weight_path])
    if sharding is None:
        return None
    if site.kind == "leaf":
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*_trimmed(derive_entries(site, roles, tuple(sharding.spec)))))


def box_like(base: Mapping[Path, Any], site: Site | None, roles: Sequence[str | None] | None, value: Any) -> Any:
    """An adapter leaf in the same kind of box as the base weight, with logical names derived from the weight's."""
    if site is None or roles is None:
        return value
    box = base[site.weight_path]
    box = getattr(box, "codes", box)  # of a quantised weight, these are in the box
    if not isinstance(box, meta.AxisMetadata):
        return value
    if site.kind == "leaf":
        return meta.replace_boxed(box, value)
    if not isinstance(box, meta.Partitioned):
        return value
    return box.replace(value=value, names=derive_entries(site, roles, box.names))
