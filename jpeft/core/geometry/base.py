"""The interface of a geometry, and the two geometries that hold for any weight: `Parts` and `Raw`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.dataflow.views import CONVOLUTION, DOT, Use


@dataclass(frozen=True)
class Call:
    """One call of a module, as a geometry sees it. While a method is bound, arrays are abstract.

    Attributes:
      module: the called module; a geometry may read its fields.
      method: name of the called method.
      args: positional arguments.
      kwargs: keyword arguments.
      shapes: shapes of the module's own parameters, in its scope.
      convolve: ``(image, kernel) -> image``, for a convolution: the module's convolution (stride, padding, …) with
        another kernel in the stored layout, without bias or groups.
    """

    module: Any
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    convolve: Callable[[jax.Array, jax.Array], jax.Array] | None = None


@dataclass(frozen=True)
class Geometry:
    """A module's use of one weight. Static and hashable: it is part of a `Peft`.

    A subclass defines `view` and `unview` (the weight). If a call can be computed without the changed weight
    (``fused``), it also defines `operand` and `restore` (the input) and `result` and `output` (the output).

    Attributes:
      leaf: name of the weight in its owner.
      bias: name of the bias, or None.
      argument: index of the positional argument that is the input.
      linear: whether "all-linear" includes the weight.
      lookup: whether the input is an index into the weight.
      fused: whether a call can be computed without materializing the changed weight.
      channels: number of distinct input features, if the matrix has more rows than that (convolutions).
      calls: names of the module's calls whose products use the weight, if a trace showed them.
      window: the sizes of a convolution's window.
    """

    leaf: str = "kernel"
    bias: str | None = "bias"
    argument: int = 0

    linear = True
    lookup = False
    fused = True
    channels: ClassVar[int | None] = None
    calls: ClassVar[tuple[str, ...]] = ()
    window: ClassVar[tuple[int, ...]] = ()

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the leading axes of the view. The core maps methods over them."""
        return ()

    def view(self, w: jax.Array) -> jax.Array:
        """The weight as ``[batch..., in, out]``. Inverse of `unview`."""
        raise TypeError(f"{type(self).__name__} does not define view")

    def unview(self, m: jax.Array) -> jax.Array:
        """The weight as it is stored. Inverse of `view`."""
        raise TypeError(f"{type(self).__name__} does not define unview")

    def view_bias(self, b: jax.Array) -> jax.Array:
        """The bias as ``[batch..., out]``. Inverse of `unview_bias`."""
        return b.reshape(*self.batch, -1)

    def unview_bias(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The bias as it is stored, in ``shape``. Inverse of `view_bias`."""
        return m.reshape(shape)

    def operand(self, call: Call, dtype: Any) -> Any:
        """The call's input as ``[batch..., tokens..., in]``, an array or something that multiplies like one."""
        raise TypeError(f"{type(self).__name__} does not define operand")

    def restore(self, call: Call, x: Any) -> Any:
        """The input in the module's own layout; None if a changed operand has no such form. Inverse of `operand`."""
        raise TypeError(f"{type(self).__name__} does not define restore")

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        """The module's output as ``[batch..., tokens..., out]``. Inverse of `output`."""
        raise TypeError(f"{type(self).__name__} does not define result")

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        """The output in the module's own layout. Inverse of `result`."""
        raise TypeError(f"{type(self).__name__} does not define output")

    @property
    def takes_operand(self) -> bool:
        """Whether the module itself accepts `operand` as its input and then returns `result`."""
        return False

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes of the stored weight that are its batch, its inputs and its outputs, major first; for shardings."""
        return (), (), ()

    def explains(self, use: Use, shape: tuple[int, ...]) -> bool:
        """Whether a trace shows that the call uses the weight as this geometry says.

        Otherwise the geometry is not believed: the product is changed where it is computed, or the whole weight.

        Args:
          use: the only use of the weight in the call.
          shape: shape of the call's input.
        """
        return use.product.kind in (DOT, CONVOLUTION) and not use.product.weight.fixed and use.returned is not None

    def split(self, parts: int) -> Geometry:
        """The same weight as ``parts`` matrices, each with an equal block of the outputs (a fused q, k, v)."""
        return self if parts == 1 else Parts(self.leaf, self.bias, self.argument, self, parts)


@dataclass(frozen=True)
class Parts(Geometry):
    """A weight whose outputs are equal blocks: each block is a matrix of its own, with the same input.

    Attributes:
      inner: geometry of the whole weight.
      parts: number of blocks.
    """

    inner: Geometry = dataclasses.field(default_factory=Geometry)
    parts: int = 1

    @property
    def batch(self) -> tuple[int, ...]:
        return (*self.inner.batch, self.parts)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.inner.linear

    @property
    def fused(self) -> bool:  # type: ignore[override]
        return self.inner.fused

    @property
    def calls(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.calls

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        batch, inputs, _ = self.inner.axes()
        return batch, inputs, ()  # the boundary of a block need not be one of a shard

    def view(self, w: jax.Array) -> jax.Array:
        m = self.inner.view(w)
        return jnp.moveaxis(m.reshape(*m.shape[:-1], self.parts, -1), -2, -3)

    def unview(self, m: jax.Array) -> jax.Array:
        m = jnp.moveaxis(m, -3, -2)
        return self.inner.unview(m.reshape(*m.shape[:-2], -1))

    def view_bias(self, b: jax.Array) -> jax.Array:
        m = self.inner.view_bias(b)
        return m.reshape(*m.shape[:-1], self.parts, -1)

    def unview_bias(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.inner.unview_bias(m.reshape(*m.shape[:-2], -1), shape)

    def operand(self, call: Call, dtype: Any) -> Any:
        """The input of the whole weight. The parts share it: the core does not map over it."""
        return self.inner.operand(call, dtype)

    def restore(self, call: Call, x: Any) -> Any:
        return self.inner.restore(call, x)

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        y = self.inner.result(call, y)
        return jnp.moveaxis(y.reshape(*y.shape[:-1], self.parts, -1), -2, len(self.inner.batch))

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y, len(self.inner.batch), -2)
        return self.inner.output(call, y.reshape(*y.shape[:-2], -1))


@dataclass(frozen=True)
class Raw(Geometry):
    """A parameter that is read inside a larger method: ``[batch..., in, out]`` as it is stored.

    Attributes:
      shape: shape of the parameter in its scope.
    """

    bias: str | None = None
    shape: tuple[int, ...] = ()

    linear = False
    fused = False

    @property
    def batch(self) -> tuple[int, ...]:
        return self.shape[:-2]

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        n = len(self.shape)
        return tuple(range(n - 2)), (n - 2,), (n - 1,)

    def view(self, w: jax.Array) -> jax.Array:
        return w

    def unview(self, m: jax.Array) -> jax.Array:
        return m
