"""Convolutions: the kernel is a matrix that multiplies the windows of the input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import backend
from jpeft.core.dataflow.views import CONVOLUTION, Use
from jpeft.core.geometry.base import Call, Geometry


@jax.tree_util.register_pytree_node_class
@dataclass
class Patches:
    """The matrix ``[tokens..., window * channels]`` of a convolution's input windows, never materialized.

    Attributes:
      image: the input.
      convolve: ``(image, matrix) -> image``: the convolution with a kernel ``[window * channels, k]``.
    """

    image: jax.Array
    convolve: Callable[[jax.Array, jax.Array], jax.Array]

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.image,), self.convolve

    @classmethod
    def tree_unflatten(cls, convolve: Any, children: Any) -> Patches:
        return cls(children[0], convolve)

    @property
    def dtype(self) -> Any:
        return self.image.dtype

    def __matmul__(self, a: jax.Array) -> jax.Array:
        y = self.convolve(self.image, a)
        return y.reshape(-1, y.shape[-1]) if backend.flatten_tokens() else y

    def __mul__(self, scale: jax.Array) -> Patches:
        """The windows with scaled channels. ``scale`` has one entry per channel, for all positions in the window."""
        return Patches(self.image * scale.astype(self.dtype), self.convolve)

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> Patches:
        """The windows of ``fn(image)``."""
        return Patches(fn(self.image), self.convolve)


@dataclass(frozen=True)
class Convolution(Geometry):
    """A kernel ``[window..., in / groups, out]``. Rows of the matrix are (position in the window, channel).

    Attributes:
      shape: shape of the kernel.
      groups: number of feature groups.
      transposed: whether the kernel is stored as ``[window..., out, in]`` (``ConvTranspose(transpose_kernel=True)``).
      masked: whether the module masks its kernel. Such a call is not linear in the kernel's view.
    """

    shape: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    masked: bool = False

    @property
    def fused(self) -> bool:  # type: ignore[override]
        return not self.masked

    @property
    def batch(self) -> tuple[int, ...]:
        return (self.groups,) if self.groups > 1 else ()

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.shape[-1 if self.transposed else -2]

    @property
    def window(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.shape[:-2]

    def explains(self, use: Use, shape: tuple[int, ...]) -> bool:
        found = use.product
        is_whole = found.kind == CONVOLUTION and not found.weight.fixed and use.returned is not None
        return is_whole and (self.transposed or not found.weight.flipped)

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (), (), (len(self.shape) - (2 if self.transposed else 1),) if self.groups == 1 else ()

    def view(self, w: jax.Array) -> jax.Array:
        w = jnp.swapaxes(w, -1, -2) if self.transposed else w
        m = w.reshape(-1, w.shape[-1])
        return m if self.groups == 1 else jnp.moveaxis(m.reshape(m.shape[0], self.groups, -1), 1, 0)

    def unview(self, m: jax.Array) -> jax.Array:
        m = m if self.groups == 1 else jnp.moveaxis(m, 0, 1).reshape(m.shape[1], -1)
        w = m.reshape(*self.shape[:-2], self.channels, -1)
        return jnp.swapaxes(w, -1, -2) if self.transposed else w

    def _convolve(self, call: Call) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The module's convolution with another kernel, given as ``[window * channels, k]``."""

        def convolve(image: jax.Array, a: jax.Array) -> jax.Array:
            assert call.convolve is not None
            kernel = a.reshape(*self.shape[:-2], self.channels, a.shape[-1])
            return call.convolve(image, jnp.swapaxes(kernel, -1, -2) if self.transposed else kernel)

        return convolve

    def operand(self, call: Call, dtype: Any) -> Patches:
        image = call.args[0].astype(dtype)
        if self.groups > 1:
            image = jnp.moveaxis(image.reshape(*image.shape[:-1], self.groups, -1), -2, 0)
        return Patches(image, self._convolve(call))

    def restore(self, call: Call, x: Patches) -> jax.Array:
        image = x.image if self.groups == 1 else jnp.moveaxis(x.image, 0, -2)
        return image.reshape(call.args[0].shape)

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        if self.groups > 1:
            y = jnp.moveaxis(y.reshape(*y.shape[:-1], self.groups, -1), -2, 0)
        return y.reshape(*self.batch, -1, y.shape[-1]) if backend.flatten_tokens() else y

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        x = call.args[0]
        one_group = jax.ShapeDtypeStruct((*x.shape[:-1], self.channels), x.dtype)
        one_filter = jax.ShapeDtypeStruct((math.prod(self.shape[:-2]) * self.channels, 1), x.dtype)
        spatial = jax.eval_shape(self._convolve(call), one_group, one_filter).shape[:-1]
        if self.groups > 1:
            return jnp.moveaxis(y.reshape(self.groups, *spatial, -1), 0, -2).reshape(*spatial, -1)
        return y.reshape(*spatial, -1)
