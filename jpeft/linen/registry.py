"""Which geometry a call has: by the class that defines the called method, or by that class's name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jpeft.core.geometry.base import Call, Geometry
from jpeft.core.geometry.contraction import Contraction, labels_of
from jpeft.core.geometry.convolution import Convolution
from jpeft.core.geometry.embedding import Embedding

Factory = Callable[[Call], "Geometry | None"]


def _stored_as(spec: str) -> Factory:
    def factory(call: Call) -> Geometry | None:
        shape = call.shapes.get("kernel")  # None: parameters that are not this model's, which Flax will say
        return None if shape is None else Contraction(spec=spec, shape=shape, stored=shape)

    return factory


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
        labels_of(spec)
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
REGISTRY: dict[str, tuple[tuple[str, ...], Factory]] = {
    _full_name(nn.Dense): (("__call__",), _stored_as("...i,io->...o")),
    _full_name(nn.DenseGeneral): (("__call__",), _dense_general),
    _full_name(nn.Einsum): (("__call__",), _einsum),
    _full_name(nn.Conv): (("__call__",), _conv),
    _full_name(nn.ConvTranspose): (("__call__",), _conv),
    _full_name(nn.Embed): (("__call__", "attend"), _embed),
    # transformers' GPT-2 keeps its kernel as (out, in).
    "FlaxConv1D": (("__call__",), _stored_as("...i,oi->...o")),
    "Einsum": (("__call__",), _einsum),
    "DenseGeneral": (("__call__",), _dense_general),
}
# nn.Conv's call is defined on a private base class.
REGISTRY[_full_name(nn.Conv.__mro__[1])] = REGISTRY[_full_name(nn.Conv)]


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
        labels_of(geometry)
        factory: Factory = lambda call, spec=geometry: _by_spec(call, spec)  # noqa: E731
    elif isinstance(geometry, Geometry):
        factory = lambda call: geometry  # noqa: E731
    elif callable(geometry):
        factory = geometry
    else:
        raise TypeError(f"geometry must be an einsum, a Geometry or a function of a Call; got {geometry!r}")
    REGISTRY[owner if isinstance(owner, str) else _full_name(owner)] = (tuple(methods), factory)


def _by_spec(call: Call, spec: str) -> Geometry:
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
    """A convolution with the module's stride and padding, by another kernel and without bias or groups."""
    kind: Any = nn.ConvTranspose if isinstance(module, nn.ConvTranspose) else nn.Conv
    fields: dict[str, Any] = {f.name: getattr(module, f.name) for f in dataclasses.fields(kind) if f.init}
    fields |= {"parent": None, "name": None, "use_bias": False}
    fields |= {"feature_group_count": 1} if kind is nn.Conv else {}
    features = kernel.shape[-2 if getattr(module, "transpose_kernel", False) else -1]
    convolution: Any = kind(**{**fields, "features": features})
    return convolution.apply({"params": {"kernel": kernel}}, image)


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
    entry = REGISTRY.get(owner) or REGISTRY.get(owner.rsplit(".", 1)[-1])
    return entry[1] if entry and method in entry[0] else None
