"""Calls of another form than a method was bound with: another method, other flags, other arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jpeft.core.geometry import Traced, TracedTable
from jpeft.core.peft import Peft
from jpeft.core.signatures import form_of
from jpeft.core.sites import BOX, FUSED, MERGE, Site, Survey
from jpeft.core.tree import Tree, abstract_array, is_array, join
from jpeft.linen.survey import survey


class _Found(Exception):
    """The first call of a model."""


def called(model: nn.Module, run: Callable[..., Any], *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of a model in ``run(*args)``, as for ``model.apply``; arrays are abstract.

    Raises:
      ValueError: it does not call the model.
    """

    def look(next_fun: Any, inputs: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        if scope is None or scope.path or type(context.module) is not type(model) or context.method_name == "setup":
            return next_fun(*inputs, **kwargs)
        own = dict(kwargs)
        if context.method_name != "__call__":
            own["method"] = context.method_name
        if scope.rngs:
            own["rngs"] = {name: jax.random.key(0) for name in scope.rngs}
        if scope.mutable:
            own["mutable"] = scope.mutable
        raise _Found(*jax.tree.map(_abstract, (inputs, own)))

    try:
        with nn.intercept_methods(look):
            jax.eval_shape(run, *args)
    except _Found as found:
        inputs, kwargs = found.args
        return inputs, kwargs
    raise ValueError(f"loss_fn does not call {type(model).__name__}; it must run the model that is bound")


def _abstract(x: Any) -> Any:
    return abstract_array(x) if is_array(x) else x


def check_form(peft: Peft, variables: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Checks that a call uses the weights that it changes in the way that the method was bound with.

    A call of the form that was bound, or that was checked before, costs nothing; another one is traced once.

    Raises:
      ValueError: it uses a weight otherwise, e.g. outside of the call that changes it.
    """
    form = form_of(inputs, kwargs)
    if peft.form is None or form is None or form == peft.form:
        return
    flat, treedef = jax.tree.flatten((variables, inputs, dict(kwargs)), is_leaf=lambda x: x is None)
    abstract = [_Abstract(np.shape(x), x.dtype) if is_array(x) else x for x in flat]
    if problem := _problem(peft, treedef, tuple(abstract)):
        raise ValueError(problem)


class _Abstract(jax.ShapeDtypeStruct):
    """An abstract array that all others are equal to, so that calls of one form are checked once."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Abstract)


@functools.lru_cache(maxsize=256)
def _problem(peft: Peft, treedef: Any, leaves: tuple[Any, ...]) -> str | None:
    variables, inputs, kwargs = jax.tree.unflatten(treedef, leaves)
    try:
        found: Survey = survey(peft.model, variables, inputs, kwargs)
    except Exception:  # the call itself raises it too, or it needs values
        return None
    sites = {site.weight_path: site for site in found.weights}
    for bound in dict.fromkeys(a.site for a in peft.actions if a.site.kind == "weight"):
        now = sites.get(bound.weight_path)
        if now is not None and not _same_use(bound, now):
            return (
                f"this call uses {join(bound.weight_path)!r} in another way than the call that {peft.method.name} was "
                f"bound with ({_way(now)} instead of {_way(bound)}), and would not see its change; bind with the "
                "method= and flags of this call"
            )
    return None


def _same_use(bound: Site, now: Site) -> bool:
    """Whether the change of a weight that was bound reaches all uses of it in another call."""
    if bound.via == MERGE or bound.calls_alone:
        return True
    if now.via == MERGE:
        return False
    if bound.via == BOX:
        return True
    whole = getattr(bound.geometry, "inner", bound.geometry)
    if now.via == FUSED and isinstance(now.geometry, TracedTable):
        return whole is not None and set(now.geometry.calls) <= set(whole.calls)
    if now.via != FUSED or not isinstance(now.geometry, Traced):
        return now.via == FUSED
    if not isinstance(whole, Traced) or (whole.atoms, whole.roles) != (now.geometry.atoms, now.geometry.roles):
        return False
    return set(now.geometry.calls) <= set(whole.calls)


def _way(site: Site) -> str:
    return f"path {site.via!r}, {site.geometry}"
