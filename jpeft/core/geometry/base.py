"""What a geometry is, and the two that hold for any weight: split into parts, and raw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Call:
    """One call of a module, as a geometry sees it. While a method is bound, arrays are abstract.

    Attributes:
      module: the called module, whose fields a geometry may read.
      method: the name of its method.
      args, kwargs: the call's arguments.
      shapes: the shapes of the module's own parameters, in its scope.
      convolve: ``(image, kernel) -> image``, of a convolution: the module's own, with its stride and padding, by another
        kernel in the stored layout and without bias or groups.
    """

    module: Any
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    convolve: Callable[[jax.Array, jax.Array], jax.Array] | None = None


@dataclass(frozen=True)
class Geometry:
    """How a module uses one weight. Static and hashable: it becomes part of a `Peft`.

    Subclasses give ``view``/``unview`` (the weight), and for the fused path ``operand``/``restore`` (the input) and
    ``result``/``output`` (the output). ``batch`` are the leading axes of the view; the core maps methods over them.
    """

    leaf: str = "kernel"
    bias: str | None = "bias"
    argument: int = 0  # which positional argument of the call is the input

    linear = True  # is it part of "all-linear"?
    lookup = False  # is the input a table index?
    fused = True  # can a call be computed without materializing the changed weight?
    channels: ClassVar[int | None] = (
        None  # distinct input features, where they are fewer than the matrix's rows (convolution)
    )

    @property
    def batch(self) -> tuple[int, ...]:
        return ()

    def view(self, w: jax.Array) -> jax.Array:
        """The weight as ``[batch..., in, out]``. Inverse of `unview`."""
        raise TypeError(f"{type(self).__name__} does not define view")

    def unview(self, m: jax.Array) -> jax.Array:
        """Inverse of `view`."""
        raise TypeError(f"{type(self).__name__} does not define unview")

    def view_bias(self, b: jax.Array) -> jax.Array:
        """The bias as ``[batch..., out]``. Inverse of `unview_bias`."""
        return b.reshape(*self.batch, -1)

    def unview_bias(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Inverse of `view_bias`."""
        return m.reshape(shape)

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Which axes of the stored weight are its batch, its inputs and its outputs, major first: for shardings."""
        return (), (), ()

    def split(self, parts: int) -> Geometry:
        """The same weight as ``parts`` equal blocks of outputs, each with leaves of its own (a fused q, k, v)."""
        return self if parts == 1 else Parts(self.leaf, self.bias, self.argument, self, parts)


@dataclass(frozen=True)
class Parts(Geometry):
    """A weight whose outputs are equal blocks, each a matrix of its own over the same input."""

    inner: Any = dataclasses.field(default_factory=Geometry)
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

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        both, ins, _ = self.inner.axes()
        return both, ins, ()  # a block boundary need not be a shard boundary

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
        return self.inner.operand(call, dtype)  # shared by the parts: the core does not map it

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
    """A parameter that is read inside a larger method: ``[batch..., in, out]`` as it is stored."""

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
