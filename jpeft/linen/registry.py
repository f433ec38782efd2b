"""The registry of geometries: a call's geometry, by the class that defines the called method or that class's name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import string
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jpeft.core.geometry.base import Call, Geometry
from jpeft.core.geometry.contraction import Contraction, labels_of
from jpeft.core.geometry.convolution import Convolution
from jpeft.core.geometry.embedding import Embedding

Factory = Callable[[Call], "Geometry | None"]


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
    xs, outs = string.ascii_lowercase[: x.ndim], string.ascii_uppercase[: len(features)]
    if not dims and axis == tuple(range(x.ndim - len(axis), x.ndim)):  # the last axes: inputs of any rank
        ins = xs[: len(axis)]
        return Contraction(spec=f"...{ins},{ins}{outs}->...{outs}", shape=shape, stored=stored)
    batch, ins = "".join(xs[d] for d in dims), "".join(xs[a] for a in axis)
    rest = "".join(c for c in xs if c not in batch + ins)
    return Contraction(spec=f"{xs},{batch}{ins}{outs}->{batch}{rest}{outs}", shape=shape, stored=stored)


def _einsum(call: Call) -> Geometry | None:
    """``nn.Einsum(x[, eqn])``; and Gemma's and openpi's ``Einsum(eqn, x)``, whose parameter is called ``w``."""
    strings = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, str)]
    spec = strings[0] if strings else getattr(call.module, "einsum_str", None)
    argument = next((i for i, a in enumerate(call.args) if not isinstance(a, str)), None)
    weights = [n for n, s in call.shapes.items() if n != "bias" and len(s) >= 2]
    if spec is None or argument is None or len(weights) != 1:
        return None
    try:
        labels_of(spec)
    except ValueError:
        return None  # not a matrix, e.g. because the einsum sums over an axis of the weight alone
    shape = call.shapes[weights[0]]
    return Contraction(leaf=weights[0], argument=argument, spec=spec.replace(" ", ""), shape=shape, stored=shape)


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


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# The methods of a class that use its weight, and the factory of their geometry. A class of another package is matched
# by its bare name, so that the package need not be imported.
REGISTRY: dict[str, tuple[tuple[str, ...], Factory]] = {
    _full_name(nn.Dense): (("__call__",), _dense("...i,io->...o")),
    _full_name(nn.DenseGeneral): (("__call__",), _dense_general),
    _full_name(nn.Einsum): (("__call__",), _einsum),
    _full_name(nn.Conv): (("__call__",), _conv),
    _full_name(nn.ConvTranspose): (("__call__",), _conv),
    _full_name(nn.Embed): (("__call__", "attend"), _embed),
    # transformers' GPT-2 stores its kernel as (out, in).
    "FlaxConv1D": (("__call__",), _dense("...i,oi->...o")),
    "Einsum": (("__call__",), _einsum),
    "DenseGeneral": (("__call__",), _dense_general),
}
# A private base class defines nn.Conv's __call__.
REGISTRY[_full_name(nn.Conv.__mro__[1])] = REGISTRY[_full_name(nn.Conv)]


def register_geometry(owner: type | str, geometry: Geometry | Factory | str, methods: tuple[str, ...] = ("__call__",)):
    """Registers how a module uses its weight.

    Args:
      owner: the module's class, or its name, which needs no import.
      geometry: an einsum of input and weight such as ``"...i,oi->...o"``, for an owner with a single matrix; or a
        `Geometry`; or a function from a `Call` to a geometry, or to None for a call that it cannot explain.
      methods: names of the methods that use the weight this way.

    Raises:
      ValueError: a malformed einsum.
      TypeError: ``geometry`` is none of the three.

    >>> register_geometry("MyLinear", "...i,oi->...o")
    """
    name = owner if isinstance(owner, str) else _full_name(owner)
    REGISTRY[name] = (tuple(methods), _factory(geometry))


def _factory(geometry: Geometry | Factory | str) -> Factory:
    if isinstance(geometry, str):
        labels_of(geometry)  # raises if malformed
        return functools.partial(_by_spec, spec=geometry)
    if isinstance(geometry, Geometry):
        return lambda call: geometry
    if callable(geometry):
        return geometry
    raise TypeError(f"geometry must be an einsum, a Geometry or a function of a Call; got {geometry!r}")


def _by_spec(call: Call, spec: str) -> Geometry:
    """The contraction of an owner's only parameter of the weight's rank."""
    weights = [n for n, s in call.shapes.items() if len(s) == len(labels_of(spec)[1])]
    if len(weights) != 1:
        raise ValueError(
            f"geometry {spec!r} for {type(call.module).__name__}: expected one parameter of rank "
            f"{len(labels_of(spec)[1])}, found {dict(call.shapes)}; register a Contraction with leaf= instead"
        )
    shape = call.shapes[weights[0]]
    bias = "bias" if "bias" in call.shapes else None
    return Contraction(leaf=weights[0], bias=bias, spec=spec, shape=shape, stored=shape)


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


@functools.lru_cache(maxsize=1024)
def signature_of(function: Any) -> inspect.Signature | None:
    """A method's signature, with ``self``; None for a callable without one."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def by_position(function: Any, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with those given by name moved to their position, where geometries and hooks read them."""
    signature = signature_of(getattr(function, "func", function))
    try:
        bound = signature.bind(module, *args, **kwargs) if kwargs and signature is not None else None
    except TypeError:  # wrong arguments: the module itself raises
        bound = None
    return (args, dict(kwargs)) if bound is None else (bound.args[1:], bound.kwargs)


def owner_of(function: Any) -> str:
    """The full name of the class that defines a method. A subclass that overrides the method is another owner."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    return f"{function.__module__}.{function.__qualname__.rsplit('.', 1)[0]}"


def find(owner: str, method: str) -> Factory | None:
    """The registered geometry for a method of ``owner`` (see `owner_of`), by full name or by bare class name."""
    entry = REGISTRY.get(owner) or REGISTRY.get(owner.rsplit(".", 1)[-1])
    return entry[1] if entry and method in entry[0] else None
