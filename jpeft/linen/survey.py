"""The candidate sites of a Linen model, found in one abstract call.

The model runs as it is, on plain parameters. An interceptor marks in the trace where each module call begins and ends;
`jpeft.core.dataflow` then shows what becomes of every parameter. A geometry is believed only where the trace shows that
the call uses its weight in that way.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jpeft.core.attention_sites import attention_sites
from jpeft.core.dataflow.axes import DATA, STATE, WEIGHT
from jpeft.core.dataflow.lookups import lost_ids
from jpeft.core.dataflow.walk import unused, walk
from jpeft.core.signatures import by_position, owner_of
from jpeft.core.sites import Survey
from jpeft.core.survey import LeafRecord, Record
from jpeft.core.tree import Path, box_as, flatten, join, peek, split_arrays, unflatten
from jpeft.linen import attention, layers
from jpeft.linen.axes import AxisProbe, InsideParameter, axes_in, with_probes
from jpeft.linen.axis_names import AxisEnv, with_axis_names
from jpeft.linen.box import TrialBox


def survey(model: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """The candidate sites of a model, found by an abstract ``model.apply(variables, *args, **kwargs)``.

    Raises:
      Exception: whatever the model raises for these inputs.
    """
    leaves = {}
    for path, x in flatten(variables["params"]).items():
        if not hasattr(peek(x), "dtype"):
            raise ValueError(f"params must be nested mappings of arrays; {join(path)!r} is a {type(x).__name__}")
        leaves[path] = LeafRecord(np.shape(peek(x)), str(peek(x).dtype))
    call = _AbstractCall(model, variables, args, dict(kwargs))
    record, plain, origins = call.trace(leaves)
    record.flow = walk(plain, list(leaves), {number: c.path for number, c in record.calls.items()})
    return record.survey(
        boxable=functools.partial(_boxable, record, call, plain),
        find_attentions=functools.partial(attention_sites, record, plain, origins),
        lost_ids=functools.partial(lost_ids, plain, origins, list(leaves)),
    )


# --- the abstract call ----------------------------------------------------------------------------------------------


class _AbstractCall:
    """An abstract ``model.apply(variables, *args, **kwargs)``."""

    def __init__(self, model: nn.Module, variables: Mapping[str, Any], args: Any, kwargs: Any):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.leaves = flatten(variables["params"])
        self.others = {name: collection for name, collection in variables.items() if name != "params"}
        self.mappings: set[Path] = set()  # parameters that are mappings of arrays

    def trace(self, leaves: dict[Path, LeafRecord], hidden: Collection[Path] = ()) -> tuple[Record, Any, list[str]]:
        """The record of the call, its jaxpr, marked by a `_Watcher`, and what the jaxpr's inputs are.

        The first are the parameters.

        Args:
          leaves: the parameters of the model.
          hidden: parameters that the model is given as boxes. Opened, a box is the parameter; the jaxpr's last inputs
            are arrays inside of the boxes, which only a function of the tree can reach.
        """
        arrays, restore = split_arrays((self.args, self.kwargs))

        def run(record: Record, params: Any, others: Any, arrays: Sequence[Any], inner: Sequence[Any]) -> Any:
            args, kwargs = restore(arrays)
            tree = {path: box_as(box, x) for (path, box), x in zip(self.leaves.items(), params, strict=True)}
            tree |= {path: TrialBox(x, tree[path]) for path, x in zip(hidden, inner, strict=True)}
            with nn.intercept_methods(_Watcher(record)):
                params = with_probes(unflatten(tree), record, self.mappings)
                variables: Any = {**others, "params": params}
                out = self.model.apply(variables, *args, **kwargs)
            if kwargs.get("mutable", False) is not False:  # parameters that come back unchanged are not used
                y, state = out
                out = y, {name: collection for name, collection in state.items() if name != "params"}
            return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

        params = {
            p: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
            for p, x in zip(self.leaves, map(peek, self.leaves.values()), strict=True)
        }
        inputs = list(params.values()), self.others, arrays, [params[p] for p in hidden]
        kinds = zip((WEIGHT, STATE, DATA, WEIGHT), inputs, strict=True)
        origins = [kind for kind, part in kinds for _ in jax.tree.leaves(part)]

        def attempt(axis_env: AxisEnv) -> tuple[Record, Any, list[str]]:
            record = Record(leaves)
            jaxpr = jax.make_jaxpr(functools.partial(run, record), axis_env=axis_env)(*inputs).jaxpr
            return record, jaxpr, origins

        while True:
            try:
                return with_axis_names(attempt)
            except InsideParameter as e:
                self.mappings.add(e.path)


def _boxable(record: Record, call: _AbstractCall, plain: Any, paths: Collection[Path]) -> set[Path]:
    """Those of some parameters that the model opens when it is given boxes, and computes the same from."""
    candidates = [path for path in paths if path[:-1] not in record.flow.transformed]
    if not candidates:
        return set()
    try:
        _, jaxpr, _ = call.trace(record.leaves, candidates)
    except Exception:  # whatever a model raises that does not expect boxes
        return set()
    return unused(jaxpr, plain, candidates)


class _Watcher:
    """The interceptor that records calls and marks them in the trace."""

    def __init__(self, record: Record):
        self.record = record

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method, record = context.module, context.method_name, self.record
        if module.scope is None or method == "setup":
            return next_fun(*args, **kwargs)
        path, owner = module.scope.path, owner_of(context.orig_method)
        args, kwargs = by_position(context.orig_method, module, args, kwargs)
        variables = module.variables.get("params", {})
        if (axes := axes_in(variables)) is not None:
            record.scopes[path] = max(axes, record.scopes.get(path, ()), key=len)
        own = {
            n: jax.tree.leaves(v)[0]  # not opened: that may add a sharding constraint
            for n, v in variables.items()
            if not isinstance(v, (Mapping, AxisProbe)) and (*path, n) in record.leaves
        }
        call = layers.make_call(module, method, args, kwargs, {n: np.shape(x) for n, x in own.items()})
        geometry, hook = layers.find(owner, method), attention.find(owner, method)
        return record.watch(path, owner, call, next_fun, own, geometry, hook)
