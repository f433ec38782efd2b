"""Evaluates a jaxpr with the products of some weights replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend.core import Literal

from jpeft.core.dataflow.jaxprs import INLINED, bind, open_jaxpr
from jpeft.core.dataflow.steps import product, step
from jpeft.core.dataflow.views import DOT, LOOKUP, Product, View

# The output in place of a dot or a lookup: a function of the name of the weight, the equation, the product, the other
# operand and the weight.
Change = Callable[[str, Any, Product, Any, Any], Any]
# (jaxpr, the values of its constants, the names of the constants that are weights) -> its outputs
Evaluate = Callable[[Any, Sequence[Any], Mapping[Any, str]], list[Any]]


def evaluate(change: Change, jaxpr: Any, consts: Sequence[Any], weights: Mapping[Any, str]) -> list[Any]:
    """The outputs of a jaxpr without inputs, with ``change`` in place of every product that a weight reaches as a view.

    Args:
      change: computes the output of a product.
      jaxpr: the jaxpr.
      consts: the values of its constants.
      weights: the variables that are weights, with the name of each.

    Raises:
      ValueError: a weight is used in another way; the message names it.
    """
    views = {v: (name, View.of(v.aval.shape)) for v, name in weights.items()}
    return _evaluate(jaxpr, dict(zip(jaxpr.constvars, consts, strict=True)), views, change)


def _evaluate(jaxpr: Any, env: dict[Any, Any], views: dict[Any, tuple[str, View]], change: Change) -> list[Any]:
    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        known = [(i, views[v]) for i, v in enumerate(eqn.invars) if not isinstance(v, Literal) and v in views]
        if known and eqn.primitive.name in INLINED:
            outputs = _inlined(eqn, values, views, change)
        elif known and not _passed_on(eqn, known):
            outputs = _used(eqn, values, known, views, change)
        else:
            outputs = bind(eqn, values)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _used(eqn: Any, values: list[Any], known: Any, views: dict[Any, Any], change: Change) -> Sequence[Any]:
    """The outputs of an equation that takes a weight: another view of it, or a product."""
    index, (name, view) = known[0]
    made = step(eqn, view) if index == 0 and len(known) == 1 else (None,)
    if all(v is not None for v in made):
        views.update({var: (name, v) for var, v in zip(eqn.outvars, made, strict=True)})
        return bind(eqn, values)
    found = product(eqn, index, view)
    if found.kind not in (DOT, LOOKUP) or len(known) != 1:
        raise ValueError(f"this call uses {name!r} in {eqn.primitive.name!r}, not in a product")
    return [change(name, eqn, found, values[1 - index], values[index])]


def _inlined(eqn: Any, values: list[Any], views: dict[Any, Any], change: Change) -> list[Any]:
    """The outputs of a jitted function that takes a weight, evaluated in place of its call."""
    closed = next(p for p in eqn.params.values() if open_jaxpr(p) is not None)
    jaxpr = open_jaxpr(closed)
    inner = {
        own: views[v]
        for own, v in zip(jaxpr.invars, eqn.invars, strict=True)
        if not isinstance(v, Literal) and v in views
    }
    env = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True)) | dict(
        zip(jaxpr.invars, values, strict=True)
    )
    outputs = _evaluate(jaxpr, env, inner, change)
    for var, own in zip(eqn.outvars, jaxpr.outvars, strict=True):
        if not isinstance(own, Literal) and own in inner:
            views[var] = inner[own]
    return outputs


def _passed_on(eqn: Any, known: Any) -> bool:
    """Whether an equation runs calls that see whole weights: those calls change their own products."""
    name = eqn.primitive.name
    runs_modules = name.startswith(("remat", "checkpoint")) or name in ("scan", "while", "cond")
    return runs_modules and all(v == View.of(v.shape) for _, (_, v) in known)
