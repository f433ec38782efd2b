"""Geometries: how a module uses its weight, as a plain matrix problem.

A geometry views the weight as ``[batch..., in, out]``, the module's input as ``[batch..., tokens..., in]`` and its
output as ``[batch..., tokens..., out]``, so that a method is written once, for one matrix. Everything linear that an
einsum can say is a `Contraction`; a convolution is a `Convolution`; an embedding is an `Embedding`; a parameter that
no module call explains is `Raw`. `register_geometry` adds one from outside.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Call:
    """One call of a module, as a geometry sees it: while binding, arrays are abstract."""

    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # of the module's own parameters, in its scope


def _flatten_tokens() -> bool:
    """Whether to merge the token axes of an operand into one.

    XLA's CPU backend is 2-4 times slower at contractions over [batch, length, features] than over the same operands
    as [batch * length, features] (low-rank forward + backward: 8.7 against 2.2 ms). On GPU and TPU nothing is gained,
    and merging axes that are sharded differently would cost a collective.
    """
    return jax.default_backend() == "cpu"


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
    fused = True  # can a call be computed without materialising the changed weight?
    channels: ClassVar[int | None] = None  # distinct input features, where they are fewer than the matrix's rows (convolution)

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


def _labels(spec: str) -> tuple[str, str, str]:
    try:
        operands, y = spec.replace(" ", "").split("->")
        x, w = operands.split(",")
    except ValueError:
        raise ValueError(f"geometry {spec!r}: expected an einsum of two operands, such as '...i,io->...o'") from None
    used = set(w.replace("...", ""))
    if "." in w or not used <= set(x) | set(y) or len(used) != len(w):
        raise ValueError(f"geometry {spec!r}: every axis of the weight (second operand) must be in the input or output")
    return x, w, y


@dataclass(frozen=True)
class Contraction(Geometry):
    """A weight used as ``y = einsum(spec, x, w)``, e.g. ``...i,io->...o`` for a dense layer.

    Axes of the weight in x but not in y are its inputs, in y but not in x its outputs, in both its batch.
    ``shape`` is the weight's shape in the einsum; a weight that is stored flattened (T5X) is reshaped to it.
    """

    spec: str = "...i,io->...o"
    shape: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()

    @property
    def _roles(self) -> tuple[str, str, str]:
        x, w, y = _labels(self.spec)
        both = "".join(c for c in w if c in x and c in y)
        return both, "".join(c for c in w if c in x and c not in y), "".join(c for c in w if c not in x)

    def _size(self, labels: str) -> int:
        w = _labels(self.spec)[1]
        return math.prod(self.shape[w.index(c)] for c in labels)

    @property
    def batch(self) -> tuple[int, ...]:
        both = self._roles[0]
        return (self._size(both),) if both else ()

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        w = _labels(self.spec)[1]
        if self.stored and self.stored != self.shape:  # stored as [in, out]
            return (), (0,), (1,)
        both, ins, outs = (tuple(w.index(c) for c in role) for role in self._roles)
        return both, ins, outs

    def view(self, w: jax.Array) -> jax.Array:
        _, labels, _ = _labels(self.spec)
        both, ins, outs = self._roles
        w = _transpose(w.reshape(self.shape), labels, both + ins + outs)
        return w.reshape(*self.batch, self._size(ins), self._size(outs))

    def unview(self, m: jax.Array) -> jax.Array:
        _, labels, _ = _labels(self.spec)
        order = "".join(self._roles)
        m = m.reshape([self._size(c) for c in order])
        return _transpose(m, order, labels).reshape(self.stored or self.shape)

    def _bias_labels(self) -> str:
        _, w, y = _labels(self.spec)
        return "".join(c for c in y if c in w)  # a bias is added to the output, so it has the output's order

    def view_bias(self, b: jax.Array) -> jax.Array:
        labels = self._bias_labels()
        both, _, outs = self._roles
        b = _transpose(b.reshape([self._size(c) for c in labels]), labels, both + outs)
        return b.reshape(*self.batch, self._size(outs))

    def unview_bias(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        both, _, outs = self._roles
        m = m.reshape([self._size(c) for c in both + outs])
        return _transpose(m, both + outs, self._bias_labels()).reshape(shape)

    def _expand(self, x_ndim: int) -> tuple[str, str, str]:
        """x and y labels with the ellipsis written out for this rank, and the token labels."""
        x, w, y = _labels(self.spec)
        if "..." in x:
            free = [chr(0x4E00 + i) for i in range(x_ndim - len(x.replace("...", "")))]
            x, y = x.replace("...", "".join(free)), y.replace("...", "".join(free))
        if len(x) != x_ndim:
            raise ValueError(f"geometry {self.spec!r} was bound to inputs of rank {len(x)}; this call has rank {x_ndim}")
        return x, y, "".join(c for c in x if c not in w)

    def operand(self, call: Call, dtype: Any) -> jax.Array:
        """The input as ``[batch..., tokens..., in]``. Inverse of `restore`."""
        x = call.args[self.argument].astype(dtype)
        labels, _, tokens = self._expand(x.ndim)
        both, ins, _ = self._roles
        sizes = dict(zip(labels, x.shape, strict=True))
        x = _transpose(x, labels, both + tokens + ins)
        middle = [math.prod(sizes[c] for c in tokens)] if _flatten_tokens() else [sizes[c] for c in tokens]
        return x.reshape(*self.batch, *middle, self._size(ins))

    def restore(self, call: Call, x: jax.Array) -> jax.Array:
        """Inverse of `operand`."""
        old = call.args[self.argument]
        labels, _, tokens = self._expand(old.ndim)
        both, ins, _ = self._roles
        sizes = dict(zip(labels, old.shape, strict=True))
        order = both + tokens + ins
        return _transpose(x.reshape([sizes[c] for c in order]), order, labels)

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        """The module's output as ``[batch..., tokens..., out]``. Inverse of `output`."""
        x = call.args[self.argument]
        x_labels, labels, tokens = self._expand(x.ndim)
        both, _, outs = self._roles
        sizes = dict(zip(x_labels, x.shape, strict=True))
        y = _transpose(y, labels, both + tokens + outs)
        middle = [math.prod(sizes[c] for c in tokens)] if _flatten_tokens() else [sizes[c] for c in tokens]
        return y.reshape(*self.batch, *middle, self._size(outs))

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        """Inverse of `result`."""
        x = call.args[self.argument]
        x_labels, labels, tokens = self._expand(x.ndim)
        both, _, outs = self._roles
        sizes = dict(zip(x_labels, x.shape, strict=True))
        order = both + tokens + outs
        return _transpose(y.reshape([sizes[c] if c in sizes else self._size(c) for c in order]), order, labels)

    def flat_call(self, call: Call) -> bool:
        """Whether the module itself may be called on the flattened operand, its output then being the result."""
        return self.spec == "...i,io->...o"


def _transpose(x: jax.Array, labels: str, order: str) -> jax.Array:
    return x if labels == order else jnp.transpose(x, [labels.index(c) for c in order])


@dataclass(frozen=True)
class Parts(Geometry):
    """A weight whose outputs are equal blocks, each a matrix of its own over the same input."""

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


@jax.tree_util.register_pytree_node_class
@dataclass
class Lookup:
    """The one-hot matrix ``[tokens..., vocabulary]`` that an embedding's ids stand for, never materialised."""

    ids: jax.Array
    weight: jax.Array | None
    dtype: Any

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.ids, self.weight), self.dtype

    @classmethod
    def tree_unflatten(cls, dtype: Any, children: Any) -> Lookup:
        return cls(*children, dtype)

    def __matmul__(self, a: jax.Array) -> jax.Array:
        rows = jnp.take(a.astype(self.dtype), self.ids, axis=0)
        return rows if self.weight is None else rows * self.weight[..., None]

    def __mul__(self, scale: jax.Array) -> Lookup:
        picked = jnp.take(scale.astype(self.dtype), self.ids, axis=0)
        return Lookup(self.ids, picked if self.weight is None else picked * self.weight, self.dtype)


@dataclass(frozen=True)
class Embedding(Geometry):
    """A table ``[vocabulary, features]``: looked up by id, and by ``attend`` used transposed as an output head."""

    leaf: str = "embedding"
    bias: str | None = None

    linear = False
    lookup = True

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (), (0,), (1,)

    def view(self, w: jax.Array) -> jax.Array:
        return w

    def unview(self, m: jax.Array) -> jax.Array:
        return m

    def operand(self, call: Call, dtype: Any) -> Any:
        return Lookup(jnp.asarray(call.args[0]), None, dtype)

    def restore(self, call: Call, x: Any) -> None:
        return None  # a changed one-hot matrix is no longer an id: multiply by the weight instead

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        return y

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        return y


@jax.tree_util.register_pytree_node_class
@dataclass
class Patches:
    """The matrix ``[tokens..., window * channels]`` of a convolution's input windows, never materialised."""

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
        return y.reshape(-1, y.shape[-1]) if _flatten_tokens() else y

    def __mul__(self, scale: jax.Array) -> Patches:
        """Scales each input channel: ``scale`` has one entry a channel, the same at every place in the window."""
        return Patches(self.image * scale.astype(self.dtype), self.convolve)

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> Patches:
        return Patches(fn(self.image), self.convolve)


@dataclass(frozen=True)
class Convolution(Geometry):
    """A kernel ``[window..., in / groups, out]``: rows of the matrix are (place in the window, channel)."""

    shape: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False  # ConvTranspose(transpose_kernel=True) stores [window..., out, in]
    masked: bool = False  # a masked kernel is not linear in the view

    @property
    def fused(self) -> bool:  # type: ignore[override]
        return not self.masked

    @property
    def batch(self) -> tuple[int, ...]:
        return (self.groups,) if self.groups > 1 else ()

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.shape[-1 if self.transposed else -2]

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
        """The module's own convolution with another kernel ``[window * channels, k]``: its stride, padding, dilation."""
        kind = nn.ConvTranspose if isinstance(call.module, nn.ConvTranspose) else nn.Conv
        fields = {f.name: getattr(call.module, f.name) for f in dataclasses.fields(kind) if f.init}
        fields |= {"parent": None, "name": None, "use_bias": False}
        fields |= {"feature_group_count": 1} if kind is nn.Conv else {}

        def convolve(image: jax.Array, a: jax.Array) -> jax.Array:
            kernel = a.reshape(*self.shape[:-2], self.channels, a.shape[-1])
            kernel = jnp.swapaxes(kernel, -1, -2) if self.transposed else kernel
            return kind(**fields | {"features": a.shape[-1]}).apply({"params": {"kernel": kernel}}, image)

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
        return y.reshape(*self.batch, -1, y.shape[-1]) if _flatten_tokens() else y

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        spatial = jax.eval_shape(self._convolve(call), self._first(call), self._one(call)).shape[:-1]
        if self.groups > 1:
            return jnp.moveaxis(y.reshape(self.groups, *spatial, -1), 0, -2).reshape(*spatial, -1)
        return y.reshape(*spatial, -1)

    def _first(self, call: Call) -> jax.ShapeDtypeStruct:
        x = call.args[0]
        return jax.ShapeDtypeStruct((*x.shape[:-1], self.channels), x.dtype)

    def _one(self, call: Call) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((math.prod(self.shape[:-2]) * self.channels, 1), call.args[0].dtype)


# --- which geometry a call has -----------------------------------------------------------------------------------

Factory = Callable[[Call], "Geometry | None"]


def _dense(call: Call) -> Geometry:
    return Contraction(shape=call.shapes["kernel"], stored=call.shapes["kernel"])


def _dense_general(call: Call) -> Geometry | None:
    """``nn.DenseGeneral`` and, by name, T5X's and Flaxformer's, which store the kernel as a matrix."""
    module: Any = call.module
    x, stored = call.args[0], call.shapes.get("kernel")
    if stored is None or not hasattr(module, "axis") or not hasattr(module, "features"):
        return None
    as_tuple = lambda v: (v,) if isinstance(v, int) else tuple(v)  # noqa: E731
    axis = tuple(a % x.ndim for a in as_tuple(module.axis))
    if isinstance(module, nn.DenseGeneral):  # which sorts its axes; T5X keeps their order
        axis = tuple(sorted(axis))
    dims = tuple(a % x.ndim for a in as_tuple(getattr(module, "batch_dims", ())))
    shape = tuple(x.shape[d] for d in dims) + tuple(x.shape[a] for a in axis) + as_tuple(module.features)
    if math.prod(shape) != math.prod(stored):
        return None
    xs = "".join(chr(97 + i) for i in range(x.ndim))
    outs = "".join(chr(65 + i) for i in range(len(as_tuple(module.features))))
    if not dims and axis == tuple(range(x.ndim - len(axis), x.ndim)):  # any rank will do
        ins = xs[: len(axis)]
        return Contraction(spec=f"...{ins},{ins}{outs}->...{outs}", shape=shape, stored=stored)
    batch, ins = "".join(xs[d] for d in dims), "".join(xs[a] for a in axis)
    rest = "".join(c for c in xs if c not in batch + ins)
    return Contraction(spec=f"{xs},{batch}{ins}{outs}->{batch}{rest}{outs}", shape=shape, stored=stored)


def _einsum(call: Call) -> Geometry | None:
    """``nn.Einsum(x[, eqn])`` and, by name, Gemma's and openpi's ``Einsum(eqn, x)`` with their own parameter name."""
    strings = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, str)]
    spec = strings[0] if strings else getattr(call.module, "einsum_str", None)
    argument = next((i for i, a in enumerate(call.args) if not isinstance(a, str)), None)
    weights = [n for n, s in call.shapes.items() if n != "bias" and len(s) >= 2]
    if spec is None or argument is None or len(weights) != 1:
        return None
    try:
        _labels(spec)
    except ValueError:
        return None  # e.g. a weight with a summed-out axis: not a matrix
    shape = call.shapes[weights[0]]
    return Contraction(leaf=weights[0], argument=argument, spec=spec.replace(" ", ""), shape=shape, stored=shape)


def _conv(call: Call) -> Geometry | None:
    module: Any = call.module
    shape = call.shapes.get("kernel")
    if shape is None or not getattr(module, "shared_weights", True):  # ConvLocal: a kernel for every place
        return None
    transposed = bool(getattr(module, "transpose_kernel", False))
    groups = getattr(module, "feature_group_count", 1)
    masked = getattr(module, "mask", None) is not None
    return Convolution(shape=shape, groups=groups, transposed=transposed, masked=masked)


def _embed(call: Call) -> Geometry:
    return Embedding()


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# Owners by class, or by class name where importing the class would cost a dependency; method -> geometry.
_REGISTRY: dict[str, tuple[tuple[str, ...], Factory]] = {
    _full_name(nn.Dense): (("__call__",), _dense),
    _full_name(nn.DenseGeneral): (("__call__",), _dense_general),
    _full_name(nn.Einsum): (("__call__",), _einsum),
    _full_name(nn.Conv): (("__call__",), _conv),
    _full_name(nn.ConvTranspose): (("__call__",), _conv),
    _full_name(nn.Embed): (("__call__", "attend"), _embed),
    # transformers' GPT-2 keeps its kernel as (out, in).
    "FlaxConv1D": (
        ("__call__",),
        lambda c: Contraction(spec="...i,oi->...o", shape=c.shapes["kernel"], stored=c.shapes["kernel"]),
    ),
    "Einsum": (("__call__",), _einsum),
    "DenseGeneral": (("__call__",), _dense_general),
}
# nn.Conv's call is defined on a private base class.
_REGISTRY[_full_name(nn.Conv.__mro__[1])] = _REGISTRY[_full_name(nn.Conv)]


def register_geometry(owner: type | str, geometry: Geometry | Factory | str, methods: tuple[str, ...] = ("__call__",)):
    """Tells jpeft how a module uses its weight.

    Args:
      owner: the module's class, or its name (then nothing need be imported).
      geometry: an einsum of input and weight such as ``"...i,oi->...o"`` (the weight is then the owner's only matrix);
        or a `Geometry`; or a function from a `Call` to a geometry, or to None where it cannot say.
      methods: the methods that use the weight so.

    Raises:
      ValueError: an einsum that is malformed. TypeError: something else than the three.

    >>> register_geometry("MyLinear", "...i,oi->...o")
    """
    if isinstance(geometry, str):
        _labels(geometry)
        factory: Factory = lambda call, spec=geometry: _by_spec(call, spec)  # noqa: E731
    elif isinstance(geometry, Geometry):
        factory = lambda call: geometry  # noqa: E731
    elif callable(geometry):
        factory = geometry
    else:
        raise TypeError(f"geometry must be an einsum, a Geometry or a function of a Call; got {geometry!r}")
    _REGISTRY[owner if isinstance(owner, str) else _full_name(owner)] = (tuple(methods), factory)


def _by_spec(call: Call, spec: str) -> Geometry:
    weights = [n for n, s in call.shapes.items() if len(s) == len(_labels(spec)[1])]
    if len(weights) != 1:
        raise ValueError(
            f"geometry {spec!r} for {type(call.module).__name__}: expected one parameter of rank "
            f"{len(_labels(spec)[1])}, found {dict(call.shapes)}; register a Contraction with leaf= instead"
        )
    shape = call.shapes[weights[0]]
    bias = "bias" if "bias" in call.shapes else None
    return Contraction(leaf=weights[0], bias=bias, spec=spec, shape=shape, stored=shape)


@functools.lru_cache(maxsize=1024)
def signature_of(function: Any) -> inspect.Signature | None:
    """A method's signature, ``self`` included, or None for what has none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def by_position(function: Any, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with those given by name at their position, where geometries and hooks look for them."""
    signature = signature_of(getattr(function, "func", function))
    try:
        bound = signature.bind(module, *args, **kwargs) if kwargs and signature is not None else None
    except TypeError:  # the module itself will say what is wrong
        bound = None
    return (args, dict(kwargs)) if bound is None else (bound.args[1:], bound.kwargs)


def owner_of(function: Any) -> str:
    """The class that defines a method, fully named; a subclass that overrides a method is another owner."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    return f"{function.__module__}.{function.__qualname__.rsplit('.', 1)[0]}"


def find(owner: str, method: str) -> Factory | None:
    """The registered geometry for a method of ``owner`` (see `owner_of`), by full name or by bare class name."""
    entry = _REGISTRY.get(owner) or _REGISTRY.get(owner.rsplit(".", 1)[-1])
    return entry[1] if entry and method in entry[0] else None


def attend(view: Callable[[Any], jax.Array], query: jax.Array, vocabulary: int) -> jax.Array:
    """``query @ W.T`` for a linear map ``x -> x @ W``, by transposing the map rather than building ``W``."""
    x = jax.ShapeDtypeStruct((*query.shape[:-1], vocabulary), query.dtype)
    (y,) = jax.linear_transpose(view, x)(query)
    return y


__all__ = ["Call", "Contraction", "Convolution", "Embedding", "Geometry", "Raw", "attend", "register_geometry"]
