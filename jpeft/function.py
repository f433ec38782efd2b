"""The front end for a plain function of parameters: an Equinox module, a Haiku transform, a function of one's own.

Nothing is known of its layers, so that weights are merged before it runs. A trace shows which axes of a weight are
inputs; without one, they are the last but one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.dataflow.walk import Flow, walk
from jpeft.core.frontend import is_bypassed
from jpeft.core.geometry.traced import traced
from jpeft.core.peft import Peft
from jpeft.core.sites import Site, Survey
from jpeft.core.survey import LeafRecord, Record
from jpeft.core.tree import Path, Tree, flatten, is_array, split_arrays, unflatten


@dataclass(frozen=True)
class FunctionFrontEnd:
    """Runs ``fn(params, *inputs)`` on merged parameters, which may be any pytree of arrays."""

    accepted = "a function of parameters"
    holds_params = False
    bound: type[Peft] = Peft

    def kept(self, model: Any) -> Any:
        """The function."""
        return model

    def tree(self, params: Any) -> Tree:
        """The arrays of a pytree, by their paths."""
        return unflatten(_by_path(params))

    def like(self, tree: Tree, params: Any) -> Any:
        """Arrays by their paths in the form of ``params``."""
        leaves, places = flatten(tree), list(_by_path(params))
        return jax.tree.unflatten(jax.tree.structure(params), [leaves[path] for path in places])

    def survey(self, model: Any, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
        """The weights of a function: its parameters of two or more axes, as a trace with the inputs uses them."""
        leaves = _by_path(params)
        record = Record({path: LeafRecord(np.shape(x), str(x.dtype)) for path, x in leaves.items()})
        record.flow = _flow(self, model, params, leaves, inputs, kwargs) if inputs or kwargs else _unknown(leaves)
        found = record.survey()
        return dataclasses.replace(found, weights=tuple(_as_used(site, record.flow) for site in found.weights))

    def called(self, model: Any, run: Callable[..., Any], *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Not known for a function.

        Raises:
          ValueError: always.
        """
        raise ValueError("statistics of data need a module: the inputs of a plain function's weights are not seen")

    def run(self, peft: Peft, params: Any, adapter: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The function of the merged parameters."""
        merged = params if is_bypassed() else peft.merge(params, adapter, safe=False)
        return peft.model(merged, *inputs, **kwargs)

    def overlay(self, peft: Peft, params: Any, adapter: Tree) -> Any:
        """The merged parameters."""
        return peft.merge(params, adapter, safe=False)

    def intercept(self, peft: Peft) -> AbstractContextManager[None]:
        """A context that changes nothing: `overlay` has merged."""
        return _nothing()

    def module(self, peft: Peft) -> Any:
        """The function from parameters, an adapter and inputs to outputs."""
        return peft.apply

    def shift_embedding(self, shift: Any, found: list[Any]) -> AbstractContextManager[None]:
        """A context that changes nothing: no embedding of a plain function is known."""
        return _nothing()


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _by_path(params: Any) -> dict[Path, Any]:
    """The arrays of a pytree by path: names of fields, keys of mappings, indices of sequences."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {tuple(map(_name, path)) or ("params",): x for path, x in flat}


def _name(key: Any) -> str:
    return str(next((getattr(key, name) for name in ("name", "key", "idx") if hasattr(key, name)), key))


def _flow(
    frontend: FunctionFrontEnd, fn: Any, params: Any, leaves: Mapping[Path, Any], inputs: Any, kwargs: Any
) -> Flow:
    arrays, restore = split_arrays((inputs, dict(kwargs)))

    def run(values: list[Any], arrays: list[Any]) -> list[Any]:
        args, named = restore(arrays)
        out = fn(frontend.like(unflatten(dict(zip(leaves, values, strict=True))), params), *args, **named)
        return [x for x in jax.tree.leaves(out) if is_array(x)]

    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in leaves.values()]
    return walk(jax.make_jaxpr(run)(shapes, arrays).jaxpr, list(leaves), {})


def _unknown(leaves: Mapping[Path, Any]) -> Flow:
    """A flow in which every parameter is used, in a way that is not known."""
    flow = Flow()
    for path, x in leaves.items():
        jaxpr = jax.make_jaxpr(lambda x: x)(jnp.zeros(np.shape(x), x.dtype)).jaxpr
        flow.uses |= walk(jaxpr, [path], {}).uses
    return flow


def _as_used(site: Site, flow: Flow) -> Site:
    uses = flow.uses.get(site.weight_path, [])
    geometry = traced(site.leaf, site.stored, uses, [])
    if geometry is None:
        return site
    inputs, outputs = jax.eval_shape(geometry.view, jax.ShapeDtypeStruct(site.stored, np.float32)).shape[-2:]
    return dataclasses.replace(site, geometry=geometry, inputs=inputs, outputs=outputs)
