"""The geometries of Linen's own layers, and of those of other packages that have many users."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jpeft.core.geometry import registry
from jpeft.core.geometry.base import Call, Geometry
from jpeft.core.geometry.contraction import Contraction, along_axes, einsum
from jpeft.core.geometry.convolution import Convolution
from jpeft.core.geometry.embedding import Embedding
from jpeft.core.geometry.registry import Factory, full_name


def _dense(spec: str) -> Factory:
    """The factory for a layer with a two-dimensional ``kernel``, used in an einsum."""

    def factory(call: Call) -> Geometry | None:
        shape = call.shapes.get("kernel")  # None if the parameters do not fit the model: Flax raises
        return None if shape is None else Contraction(spec=spec, shape=shape, stored=shape)

    return factory


def _dense_general(call: Call) -> Geometry | None:
    """``nn.DenseGeneral``; and T5X's and Flaxformer's ``DenseGeneral``, which store the kernel as a matrix."""
    module: Any = call.module
    x, stored = call.args[0], call.shapes.get("kernel")
    if stored is None or not hasattr(module, "axis") or not hasattr(module, "features"):
        return None
    features = _as_tuple(module.features)
    axis = tuple(a % x.ndim for a in _as_tuple(module.axis))
    if isinstance(module, nn.DenseGeneral):  # nn.DenseGeneral sorts its axes, T5X does not
        axis = tuple(sorted(axis))
    dims = tuple(a % x.ndim for a in _as_tuple(getattr(module, "batch_dims", ())))
    shape = tuple(x.shape[d] for d in dims) + tuple(x.shape[a] for a in axis) + features
    if math.prod(shape) != math.prod(stored):
        return None
    return along_axes(x.ndim, axis, dims, shape, stored)


def _conv(call: Call) -> Geometry | None:
    """``nn.Conv`` and ``nn.ConvTranspose``, but not ``nn.ConvLocal``, which has a kernel for every position."""
    module: Any = call.module
    shape = call.shapes.get("kernel")
    if shape is None or not getattr(module, "shared_weights", True):
        return None
    transposed = bool(getattr(module, "transpose_kernel", False))
    groups = getattr(module, "feature_group_count", 1)
    masked = getattr(module, "mask", None) is not None
    return Convolution(shape=shape, groups=groups, transposed=transposed, masked=masked)


def _embed(call: Call) -> Geometry:
    return Embedding()


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


LAYERS: dict[str, tuple[tuple[str, ...], Factory]] = {
    full_name(nn.Dense): (("__call__",), _dense("...i,io->...o")),
    full_name(nn.DenseGeneral): (("__call__",), _dense_general),
    full_name(nn.Einsum): (("__call__",), einsum),
    full_name(nn.Conv): (("__call__",), _conv),
    full_name(nn.ConvTranspose): (("__call__",), _conv),
    full_name(nn.Embed): (("__call__", "attend"), _embed),
    # transformers' GPT-2 stores its kernel as (out, in).
    "FlaxConv1D": (("__call__",), _dense("...i,oi->...o")),
    "Einsum": (("__call__",), einsum),
    "DenseGeneral": (("__call__",), _dense_general),
}
# A private base class defines nn.Conv's __call__.
LAYERS[full_name(nn.Conv.__mro__[1])] = LAYERS[full_name(nn.Conv)]


def make_call(
    module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Call:
    """The call as geometries see it."""
    return Call(module, method, args, kwargs, shapes, functools.partial(_convolve_like, module))


def _convolve_like(module: nn.Module, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The module's convolution with another kernel, without bias or groups."""
    kind: Any = nn.ConvTranspose if isinstance(module, nn.ConvTranspose) else nn.Conv
    fields: dict[str, Any] = {f.name: getattr(module, f.name) for f in dataclasses.fields(kind) if f.init}
    fields |= {"parent": None, "name": None, "use_bias": False}
    fields |= {"feature_group_count": 1} if kind is nn.Conv else {}
    features = kernel.shape[-2 if getattr(module, "transpose_kernel", False) else -1]
    convolution: Any = kind(**{**fields, "features": features})
    return convolution.apply({"params": {"kernel": kernel}}, image)


def find(owner: str, method: str) -> Factory | None:
    """The geometry for a method of the class ``owner``, registered or one of `LAYERS`."""
    return registry.find(owner, method, LAYERS)
