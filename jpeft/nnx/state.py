"""States of NNX as the nested mappings of arrays that the core works on, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.core.tree import Path, flatten, join


def is_variable(x: Any) -> bool:
    """Whether a value is a Variable of NNX."""
    return isinstance(x, nnx.Variable)


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


def to_state(reference: Any, leaves: Mapping[Path, Any], path: Path = ()) -> Any:
    """Leaves by path in the containers and Variables of a state or mapping.

    Raises:
      ValueError: a leaf is missing.
    """
    if isinstance(reference, Mapping):
        kind: Any = type(reference)
        return kind({key: to_state(child, leaves, (*path, str(key))) for key, child in reference.items()})
    if path not in leaves:
        raise ValueError(f"params lack {join(path)!r}, which the model has")
    value = leaves[path]
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


def modules(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """The modules of a model with their paths, the model first. A module that is reached twice has the first path."""
    found = [(tuple(str(key) for key in path), module) for path, module in nnx.iter_modules(model)]
    yield from sorted(found, key=lambda pair: len(pair[0]))


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """The Variables that are attributes of a module, by name, behind any property of its class."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Variable)}
