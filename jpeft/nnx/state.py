"""States of NNX as the nested mappings of arrays that the core works on, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jpeft.core.tree import Path, flatten, join, unflatten


def raw(x: Any) -> Any:
    """The value that a Variable holds, as it is stored; any other value as it is."""
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x


def to_tree(params: Any) -> Any:
    """The parameters of a module, or a state or any nested mappings, as nested dicts with text as keys.

    Args:
      params: a module, a ``nnx.State``, or mappings; their leaves are Variables or arrays.
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    if isinstance(params, Mapping):
        return {str(key): to_tree(child) for key, child in params.items()}
    return raw(params)


def by_path(state: Any, path: Path = ()) -> dict[Path, Any]:
    """The values of a state's Variables, or of any nested mappings, by path, whatever they are."""
    if not isinstance(state, Mapping):
        return {path: raw(state)}
    return {p: x for key, child in state.items() for p, x in by_path(child, (*path, str(key))).items()}


def to_state(reference: Any, leaves: Mapping[Path, Any], path: Path = (), *, partial: bool = False) -> Any:
    """Leaves by path in the containers and Variables of a state or mapping. A Variable without a value needs none.

    Args:
      reference: the state.
      leaves: the leaves.
      path: where ``reference`` lies.
      partial: True takes leaves that are missing from ``reference``.

    Raises:
      ValueError: a leaf is missing.
    """
    if isinstance(reference, nnx.State):  # inside of one, its mappings are plain: only so it is the same pytree
        return type(reference)(to_state(reference.raw_mapping, leaves, path, partial=partial))
    if isinstance(reference, Mapping):
        kind: Any = type(reference)
        return kind({k: to_state(x, leaves, (*path, str(k)), partial=partial) for k, x in reference.items()})
    if path not in leaves and not partial and raw(reference) is not None:
        raise ValueError(f"params lack {join(path)!r}, which the model has")
    value = leaves.get(path, raw(reference))
    return reference.replace(value) if isinstance(reference, nnx.Variable) else value


def like(tree: Any, params: Any) -> Any:
    """Nested dicts of arrays in the form of ``params``: a new module, a state, or mappings."""
    if isinstance(params, nnx.Module):
        graphdef, state, rest = nnx.split(params, nnx.Param, ...)
        return nnx.merge(graphdef, to_state(state, flatten(tree)), copied(rest))
    return to_state(params, flatten(tree))


def copied(state: Any) -> Any:
    """A state of new Variables: `nnx.merge` puts those that it is given into the module that it makes."""
    return jax.tree.map(lambda x: x, state)


def axis_names(params: Mapping[Any, Any]) -> dict[str, Any] | None:
    """The names of the axes of a state's Variables, from their metadata, as nested dicts; None where none has any."""
    found = {}
    for path, x in nnx.to_flat_state(nnx.State(params)):
        names = sharding_names(x) if isinstance(x, nnx.Variable) else None
        if names is not None and len(names) == np.ndim(x.get_raw_value()):
            found[tuple(str(key) for key in path)] = names
    return unflatten(found) if found else None


def sharding_names(variable: nnx.Variable) -> tuple[Any, ...] | None:
    """The names of a Variable's axes in its metadata; None if these have none."""
    found = (variable.get_metadata(key, None) for key in ("out_sharding", "sharding_names", "sharding"))
    return next((tuple(names) for names in found if isinstance(names, Sequence) and names), None)


def own_metadata(variable: nnx.Variable) -> dict[str, Any]:
    """The metadata of a Variable that another in its place takes: without those that tell how it holds its value."""
    return {key: x for key, x in variable.get_metadata().items() if key not in ("hijax", "ref")}


def put(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module of one's own, also where its class forbids it, as a frozen dataclass does."""
    nnx.Pytree.__setattr__(module, name, value)


def remove(module: Any, name: str) -> None:
    """Removes an attribute of a module of one's own. Inverse of `put`."""
    nnx.Pytree.__delattr__(module, name)


def become(module: Any, cls: type) -> None:
    """Gives a module of one's own another class."""
    object.__setattr__(module, "__class__", cls)


def modules(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """The modules of a model with their paths, the model first. A module that is reached twice has the first path."""
    found = [(tuple(str(key) for key in path), module) for path, module in nnx.iter_modules(model)]
    yield from sorted(found, key=lambda pair: len(pair[0]))


def is_opaque(module: nnx.Module) -> bool:
    """Whether a module takes no attributes: it gives all of its own to a Linen module. Its weights can be merged."""
    return isinstance(module, nnx.bridge.ToNNX)


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """The Variables that are attributes of a module, by name, behind any property of its class."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Variable)}
