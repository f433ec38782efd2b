"""Binds a method to a model: the result is a `Peft`.

A front end finds the sites of the model in one abstract call. The method selects some of them, and its ``init`` is
evaluated abstractly for the shapes of its leaves there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.actions import Action, changes_bias, init_leaves
from jpeft.core.entering import model_kwargs
from jpeft.core.frontend import FrontEnd
from jpeft.core.method import Leaves, Method, slugs
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized, unreadable
from jpeft.core.sites import BOX, FUSED, MERGE, Site, Survey
from jpeft.core.statistics import COVARIANCE
from jpeft.core.tree import Path, Tree, flatten, join, peek
from jpeft.frontends import arguments, front_end


def bind(method: Method, model: Any, /, *inputs: Any, **kwargs: Any) -> Peft:
    """See `jpeft.methods.base.Method.bind`."""
    found, params, inputs = arguments(model, inputs, "bind(model, params, *inputs)")
    survey = found.survey(model, params, inputs, model_kwargs(method, kwargs))
    return bind_survey(method, model, params, survey, found)


def survey_model(model: Any, params: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """The candidate sites of a model: the half of `bind` that does not depend on the method.

    Raises:
      TypeError: no front end accepts ``model``.
      ValueError: ``params`` do not fit it.
    """
    return front_end(model).survey(model, params, inputs, kwargs)


def bind_survey(method: Method, model: Any, params: Tree, survey: Survey, frontend: FrontEnd | None = None) -> Peft:
    """The other half of `bind`, for a model that was surveyed before.

    Args:
      method: the method.
      model: the model.
      params: its parameters.
      survey: its sites.
      frontend: its front end, if that is known.

    Raises:
      TargetError: a target matches nothing.
      ValueError: the method cannot act on a site, or a leaf's path is taken.
    """
    frontend = front_end(model) if frontend is None else frontend
    base = flatten(frontend.tree(params))
    structure: dict[Path, tuple[tuple[int, ...], str]] = {}
    actions: list[Action] = []
    shared_paths: list[Path] = []
    # Sites that differ only in their path have leaves of the same shapes. An initialization with an SVD takes long to
    # trace, so it is traced once, not once per layer.
    shapes: dict[tuple[Method, Site], tuple[Leaves, bool]] = {}
    chosen = _settled([member.sites(survey) for member in method.methods()], survey)
    _check_quantized(base, survey)
    for i, (slug, member) in enumerate(zip(slugs(method), method.methods(), strict=True)):
        sites = chosen[i]
        shared = jax.eval_shape(lambda key, m=member, s=sites: m.shared(key, s), jax.random.key(0))
        _claim(structure, {(slug, n): x for n, x in shared.items()}, base, member)
        shared_paths += [(slug, n) for n in shared]
        for site in sites:
            if site.kind == "leaf" and isinstance(leaf := base[site.path], Quantized):
                raise ValueError(
                    f"{member.name} would train {join(site.path)!r}, which is quantized ({leaf.scheme}): codes have no "
                    "gradient; exclude it, or leave it out of jpeft.quantize"
                )
            own, placeless = member.at(site), replace(site, path=())
            if (own, placeless) not in shapes:
                weight = peek(base[site.weight_path]) if site.stored or site.kind == "leaf" else None
                stored = _leaf_shapes(own, site, weight)
                shapes[own, placeless] = stored, _merges(Action(own, site, tuple(stored), i), shared, stored)
            stored, with_bias = shapes[own, placeless]
            action = Action(own, site, tuple(stored), i, slug if shared else "", with_bias)
            _claim(structure, {action.leaf_path(n): x for n, x in stored.items()}, base, member, site.kind == "leaf")
            actions.append(action)
    size = sum(math.prod(np.shape(peek(x))) for x in base.values())
    return frontend.bound(
        model=frontend.kept(model),
        method=method,
        frontend=frontend,
        actions=tuple(actions),
        structure=tuple(sorted(structure.items())),
        shared_paths=tuple(shared_paths),
        base_size=size,
        left_alone=_left_alone(survey, actions),
        weights=survey.weights,
        matched=tuple(tuple(m.matched(survey, s)) for m, s in zip(method.methods(), chosen, strict=True)),
        form=survey.form,
    )


def _left_alone(survey: Survey, actions: Sequence[Action]) -> tuple[str, ...]:
    """The weights that no action changes or replaces, and those that the model did not use."""
    changed = {a.site.weight_path for a in actions if a.site.kind in ("weight", "leaf")}
    weights = [site.weight_path for site in survey.weights] + list(survey.unused)
    return tuple(join(path) for path in weights if path not in changed)


def _settled(chosen: Sequence[Sequence[Site]], survey: Survey) -> list[list[Site]]:
    """The sites of each method; weights that the model reads in no way that opens a box are merged before it runs."""
    paths = dict.fromkeys(s.weight_path for sites in chosen for s in sites if s.kind == "weight" and s.via == BOX)
    boxable = survey.boxable(list(paths)) if paths else ()
    merged = set(paths) - set(boxable)
    return [
        [replace(s, via=MERGE) if s.kind == "weight" and s.weight_path in merged else s for s in sites]
        for sites in chosen
    ]


def _check_quantized(base: Mapping[Path, Any], survey: Survey) -> None:
    """Checks that the model opens its quantized weights.

    Raises:
      ValueError: it reads one through a function of the tree, which would compute with codes and scales, or its blocks
        lie across layers.
    """
    sites = {site.weight_path: site for site in survey.weights}
    paths = [p for p, x in base.items() if isinstance(x, Quantized) and (p not in sites or sites[p].via != FUSED)]
    unread = set(paths) - set(survey.boxable(paths)) if paths else ()
    for path in paths:
        if path in unread:
            raise ValueError(unreadable(path, base[path]))
    for path, site in sites.items():
        leaf = base.get(path)
        if isinstance(leaf, Quantized) and not leaf.stack:
            problem = leaf.problem_with_stack([axis for axis, _ in site.stack])
            if problem:
                raise ValueError(f"{join(path)!r} {problem}")


def _leaf_shapes(method: Method, site: Site, weight: Any) -> Leaves:
    """The abstract leaves at a site as they are stored."""

    def init(key: jax.Array) -> Leaves:
        w = None if weight is None else jnp.zeros(weight.shape, weight.dtype)
        return init_leaves(method, site, key, w, _observed(method, site))

    return jax.eval_shape(init, jax.random.key(0))


def _observed(method: Method, site: Site) -> Leaves | None:
    """Zeros in the shape of what the method observes at a site."""
    if method.observes is None:
        return None
    matrix = (site.inputs, site.inputs if method.observes == COVARIANCE else site.outputs)
    lead = (*(n for _, n in site.stack), *site.batch)
    return {method.observes: jnp.zeros((*lead, *matrix))}


def _merges(action: Action, shared: Leaves, stored: Leaves) -> bool:
    """Whether a method changes the bias at a site when it is merged there.

    Raises:
      ValueError: it cannot be merged at a site that is reached only as a weight, or adds a bias where there is none.
    """
    site, method = action.site, action.method
    if site.kind != "weight":
        return False
    if method.mergeable(site):
        return changes_bias(action, shared, stored)
    if site.via in (BOX, MERGE):
        raise ValueError(
            f"{method.name} cannot be merged at {site.name!r}, which is reached only as a weight (path taken: "
            f"{site.via}); leave it out with exclude=[{site.name!r}]"
        )
    return False


def _claim(
    structure: dict[Path, tuple[tuple[int, ...], str]],
    leaves: Mapping[Path, Any],
    base: Mapping[Path, Any],
    method: Method,
    stands_in: bool = False,
) -> None:
    """Adds leaves to the structure.

    Args:
      stands_in: whether the leaves replace leaves of the model.

    Raises:
      ValueError: another method or the model has a leaf at one of the paths.
    """
    for path, leaf in leaves.items():
        if path in structure:
            raise ValueError(
                f"two methods of the chain both keep a leaf at {join(path)!r} (the second is {method.name}); "
                "give them different targets; two that change a module's output can be members of jpeft.methods.Stack"
            )
        if not stands_in and (path in base or any(p[: len(path)] == path for p in base)):
            raise ValueError(f"{method.name} would keep a leaf at {join(path)!r}, where the model has one already")
        structure[path] = (tuple(leaf.shape), leaf.dtype.name)
