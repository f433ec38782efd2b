"""Meshes: the axes that jpeft knows, parsing ``"data=2,fsdp=4"``, and construction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jpeft.errors import UserError

DATA_AXES = ("data", "fsdp")  # the axes that the rows of a batch are spread over
SEQUENCE_AXIS = "sequence"  # the axis that the tokens of a row are spread over
AXES = (*DATA_AXES, "tensor", SEQUENCE_AXIS)  # the axes that `jpeft finetune` spreads over


def parse_axes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes, in their order.

    Raises:
      UserError: it is malformed, or names an axis twice.

    >>> parse_axes("data=2, fsdp=4")
    {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if not name or name in sizes or not (size.isdecimal() and int(size)):
            raise UserError(f"--mesh {text}: expected axes such as data=2,fsdp=4, each once")
        sizes[name] = int(size)
    return sizes


def format_axes(sizes: Mapping[Any, int]) -> str:
    """Inverse of `parse_axes`.

    >>> format_axes({"data": 2, "fsdp": 4})
    'data=2,fsdp=4'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def check_count(sizes: Mapping[Any, int], devices: int, owner: str) -> None:
    """Checks that axes make up all devices.

    Raises:
      UserError: they do not; ``owner`` is the subject of the message, such as ``v5e:4x4 has``.
    """
    if not sizes or min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
        product = " × ".join(map(str, sizes.values()))
        product += f" is {math.prod(sizes.values())}" if len(sizes) > 1 else ""
        raise UserError(f"--mesh {format_axes(sizes)}: {product}, but {owner} {devices} devices")


def device_mesh(text: str | None) -> Mesh:
    """The mesh ``"data=2,fsdp=4"`` over all devices of all processes; None is one axis, ``fsdp``.

    Raises:
      UserError: it is malformed, has an axis that jpeft does not know, or does not make up all devices.

    >>> device_mesh(None).axis_names
    ('fsdp',)
    """
    count = jax.device_count()
    sizes = parse_axes(text or f"fsdp={count}")
    if unknown := [name for name in sizes if name not in AXES]:
        raise UserError(f"--mesh {text}: {unknown[0]!r} is none of the axes {', '.join(AXES)}")
    check_count(sizes, count, "there are")
    return make_mesh(sizes)


def abstract_mesh(asked: Any, devices: int, owner: str) -> AbstractMesh:
    """A mesh without devices, from ``"fsdp=8,tensor=2"``, a mapping, or a mesh of any kind; None is one axis, ``fsdp``.

    Args:
      devices: how many its axes must make up.
      owner: of the devices, for the error.

    Raises:
      UserError: it is malformed, or does not make up all devices.

    >>> abstract_mesh({"fsdp": 8, "tensor": 2}, 16, "cpu:16").shape_tuple
    (('fsdp', 8), ('tensor', 2))
    """
    if asked is None or isinstance(asked, str):
        sizes: dict[Any, int] = parse_axes(asked or f"fsdp={devices}")
    else:
        try:
            sizes = dict(getattr(asked, "shape", asked))
        except TypeError:
            raise UserError(f"mesh={asked!r}: expected axes such as 'data=2,fsdp=8', a mapping or a mesh") from None
    check_count(sizes, devices, f"{owner} has")
    kinds = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, with automatic axes that lie along the links between chips if they can.

    ``jax.make_mesh`` refuses axes that cut a side of a slice in two on some chips, such as 16 by 4 on a slice of 8 by 8.

    >>> make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]).axis_names
    ('data', 'fsdp')
    """
    sizes = tuple(axes.values())
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
