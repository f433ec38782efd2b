"""The geometries of NNX's own layers, and of layers of tunix that have many users."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.core.geometry import Call, Contraction, Convolution, Embedding, Geometry, registry
from jpeft.core.geometry.contraction import along_axes, einsum
from jpeft.core.geometry.registry import Factory, full_name
from jpeft.nnx.adapted import original


def _linear(call: Call) -> Geometry | None:
    shape = call.shapes.get("kernel")
    if shape is None or len(shape) != 2:
        return None
    if len(call.args) > 1 and call.args[1] is not None:  # out_sharding names the axes of the output as it is
        xs = string.ascii_lowercase[: call.args[0].ndim - 1]
        return Contraction(spec=f"{xs}I,IO->{xs}O", shape=shape, stored=shape)
    return Contraction(spec="...i,io->...o", shape=shape, stored=shape)


def _linear_general(call: Call) -> Geometry | None:
    module: Any = call.module
    x, stored = call.args[0], call.shapes.get("kernel")
    if stored is None:
        return None
    axis = tuple(sorted(a % x.ndim for a in module.axis))
    dims = tuple(sorted(a % x.ndim for a in module.batch_axis))
    return along_axes(x.ndim, axis, dims, stored, stored)


def _conv(call: Call) -> Geometry | None:
    shape, module = call.shapes.get("kernel"), call.module
    if shape is None:
        return None
    return Convolution(
        shape=shape,
        groups=getattr(module, "feature_group_count", 1),
        transposed=bool(getattr(module, "transpose_kernel", False)),
        masked=getattr(module, "mask", None) is not None,
    )


def _embed(call: Call) -> Geometry:
    return Embedding()


LAYERS: dict[str, tuple[tuple[str, ...], Factory]] = {
    full_name(nnx.Linear): (("__call__",), _linear),
    full_name(nnx.LinearGeneral): (("__call__",), _linear_general),
    full_name(nnx.Einsum): (("__call__",), einsum),
    full_name(nnx.Conv): (("__call__",), _conv),
    full_name(nnx.ConvTranspose): (("__call__",), _conv),
    full_name(nnx.Embed): (("__call__", "attend"), _embed),
    "Einsum": (("__call__",), einsum),
}


def find(owner: str, method: str) -> Factory | None:
    """The geometry for a method of the class ``owner``, registered or one of `LAYERS`."""
    return registry.find(owner, method, LAYERS)


def make_call(
    module: nnx.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Call:
    """The call as geometries see it."""
    return Call(module, method, args, kwargs, shapes, functools.partial(_convolve_like, module))


def _convolve_like(module: Any, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The module's convolution with another kernel, without bias or groups."""
    cls = original(type(module))
    like = object.__new__(cls)  # with the module's other attributes
    transposed = getattr(module, "transpose_kernel", False)
    outputs = kernel.shape[-2 if transposed else -1]
    own = {
        "kernel": nnx.Param(kernel),
        "bias": None,
        "use_bias": False,
        "kernel_shape": kernel.shape,
        "in_features": kernel.shape[-1 if transposed else -2],
        "out_features": outputs,
    }
    if hasattr(module, "feature_group_count"):
        own["feature_group_count"] = 1
    vars(like).update({**vars(module), **own})
    return cls.__call__(like, jnp.asarray(image))
