"""The registry of geometries: a call's geometry, by the class that defines the called method or that class's name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from jpeft.core.geometry.base import Call, Geometry
from jpeft.core.geometry.contraction import Contraction, labels_of

Factory = Callable[[Call], "Geometry | None"]
# The methods of a class that use its weight, and the factory of their geometry, by the class's full name. A class of
# another package is matched by its bare name, so that the package need not be imported.
Layers = Mapping[str, tuple[tuple[str, ...], Factory]]

REGISTERED: dict[str, tuple[tuple[str, ...], Factory]] = {}


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
    name = owner if isinstance(owner, str) else full_name(owner)
    REGISTERED[name] = (tuple(methods), _factory(geometry))


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


def full_name(cls: type) -> str:
    """The name by which a class is registered."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find(owner: str, method: str, layers: Layers) -> Factory | None:
    """The geometry for a method of ``owner``, by full name or by bare class name.

    Args:
      owner: the class that defines the method, see `jpeft.core.signatures.owner_of`.
      method: the method's name.
      layers: the geometries that a front end knows; what `register_geometry` adds comes before them.
    """
    for name in (owner, owner.rsplit(".", 1)[-1]):
        entry = REGISTERED.get(name) or layers.get(name)
        if entry:
            return entry[1] if method in entry[0] else None
    return None
