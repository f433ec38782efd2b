"""Device meshes: the axes that jpeft uses, parsing ``"data=2,fsdp=4"``, and building a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jpeft.errors import UserError

DATA_AXES = ("data", "fsdp")  # the axes that shard the rows of a batch
SEQUENCE_AXIS = "sequence"  # the axis that shards the tokens of a row
POPULATION_AXIS = "population"  # the axis for the members of a `jpeft.Population`, by convention
AXES = (*DATA_AXES, "tensor", SEQUENCE_AXIS)  # the axes of `jpeft finetune --mesh`


def parse_axes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes, in order.

    Raises:
      UserError: the text is malformed or names an axis twice.

    >>> parse_axes("data=2, fsdp=4")
    {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if not name or name in sizes or not (size.isdecimal() and int(size)):
            raise UserError(f"`mesh` {text}: expected axes such as data=2,fsdp=4, each once")
        sizes[name] = int(size)
    return sizes


def format_axes(sizes: Mapping[Any, int]) -> str:
    """Inverse of `parse_axes`.

    >>> format_axes({"data": 2, "fsdp": 4})
    'data=2,fsdp=4'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def check_count(sizes: Mapping[Any, int], devices: int, owner: str) -> None:
    """Checks that the sizes of a mesh's axes multiply to the number of devices.

    Args:
      sizes: by axis.
      devices: the number of devices.
      owner: how the message introduces that number, such as ``v5e:4x4 has``.

    Raises:
      UserError: they do not.
    """
    count = math.prod(sizes.values())
    if not sizes or min(sizes.values()) < 1 or count != devices:
        product = " × ".join(map(str, sizes.values())) + f" is {count}" if len(sizes) > 1 else f"a mesh of {count}"
        raise UserError(f"`mesh` {format_axes(sizes)}: {product}, but {owner} {devices} device{'s' * (devices != 1)}")


def device_mesh(text: str | None) -> Mesh:
    """The mesh for ``"data=2,fsdp=4"``, over all devices of all processes; None is one axis, ``fsdp``.

    Raises:
      UserError: the text is malformed, names an unknown axis, or its sizes do not multiply to the number of devices.

    >>> device_mesh(None).axis_names
    ('fsdp',)
    """
    count = jax.device_count()
    sizes = parse_axes(text or f"fsdp={count}")
    if unknown := [name for name in sizes if name not in AXES]:
        raise UserError(f"`mesh` {text}: unknown axis {unknown[0]!r}; expected {', '.join(AXES)}")
    check_count(sizes, count, "there is" if count == 1 else "there are")
    return make_mesh(sizes)


def abstract_mesh(mesh: Any, devices: int, owner: str) -> AbstractMesh:
    """A mesh without devices.

    Args:
      mesh: ``"fsdp=8,tensor=2"``, a mapping, or a mesh of any kind; None is one axis, ``fsdp``.
      devices: the number of devices.
      owner: who has the devices, for the error message.

    Raises:
      UserError: the mesh is malformed, or its sizes do not multiply to the number of devices.

    >>> abstract_mesh({"fsdp": 8, "tensor": 2}, 16, "cpu:16").shape_tuple
    (('fsdp', 8), ('tensor', 2))
    """
    if mesh is None or isinstance(mesh, str):
        sizes: dict[Any, int] = parse_axes(f"fsdp={devices}" if mesh is None else mesh)
    else:
        try:
            sizes = dict(getattr(mesh, "shape", mesh))
        except TypeError:
            raise UserError(f"mesh={mesh!r}: expected axes such as 'data=2,fsdp=8', a mapping or a mesh") from None
    check_count(sizes, devices, f"{owner} has")
    kinds = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with automatic axes, along the links between chips where possible.

    Unlike ``jax.make_mesh`` it may split a side of a TPU slice over two axes, as in 16 by 4 on a slice of 8 by 8.

    Args:
      axes: the sizes, by name.
      devices: None for all devices.

    >>> make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]).axis_names
    ('data', 'fsdp')
    """
    sizes = tuple(axes.values())
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
