"""Binding: a method and a model become a `Peft`.

A front end finds the sites of the model in one abstract call; the method chooses among them and says, abstractly, which
leaves it keeps there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.actions import Action, expand_leaves, init_leaves
from jpeft.core.frontend import FrontEnd
from jpeft.core.method import Leaves, Method, slugs
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized
from jpeft.core.sites import Site, Survey
from jpeft.core.tree import Path, Tree, flatten, join, peek, split_variables


def bind(method: Method, model: Any, params: Tree, /, *inputs: Any, **kwargs: Any) -> Peft:
    """See `jpeft.methods.base.Method.bind`."""
    return bind_survey(method, model, params, survey_model(model, params, inputs, kwargs))


def front_end(model: Any) -> FrontEnd:
    """The front end that runs a model.

    Raises:
      TypeError: ``model`` is no module that a front end accepts.
    """
    # Imported when something is bound: `jpeft.methods` stays free of module systems.
    from jpeft.linen.frontend import LINEN

    if LINEN.accepts(model):
        return LINEN
    hint = "; bind its .module, which is one" if LINEN.accepts(getattr(model, "module", None)) else ""
    raise TypeError(f"model must be a flax.linen Module, got {type(model).__name__}{hint}")


def survey_model(model: Any, params: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """The sites of a model: the first half of `bind`, which depends on no method.

    Raises:
      TypeError: ``model`` is no module. ValueError: ``params`` do not fit it.
    """
    return front_end(model).survey(model, params, inputs, kwargs)


def bind_survey(method: Method, model: Any, params: Tree, survey: Survey) -> Peft:
    """The second half of `bind`, for a model that was surveyed already."""
    base = flatten(split_variables(params)[0])
    structure: dict[Path, tuple[tuple[int, ...], str]] = {}
    actions: list[Action] = []
    shared_paths: list[Path] = []
    # Sites that differ in their path alone have leaves of the same shapes: an initialization that takes an SVD is
    # traced once, not once a layer.
    shapes: dict[tuple[Method, Site], tuple[Leaves, tuple[str, ...]]] = {}
    for i, (slug, member) in enumerate(zip(slugs(method), method.methods(), strict=True)):
        sites = member.sites(survey)
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
                weight = peek(base[site.weight_path]) if site.stored else None
                shapes[own, placeless] = _leaf_shapes(own, placeless, weight, shared)
            stored, names = shapes[own, placeless]
            action = Action(own, site, tuple(stored), names, i)
            _claim(structure, {action.leaf_path(n): x for n, x in stored.items()}, base, member, site.kind == "leaf")
            actions.append(action)
    size = sum(math.prod(np.shape(peek(x))) for x in base.values())
    laid = tuple(sorted(structure.items()))
    return Peft(model, method, front_end(model), tuple(actions), laid, tuple(shared_paths), size)


def _leaf_shapes(method: Method, site: Site, weight: Any, shared: Leaves) -> tuple[Leaves, tuple[str, ...]]:
    """The leaves at a site, abstract and as stored, and the names of those that the method expands them to."""

    def init(key: jax.Array) -> Leaves:
        return init_leaves(method, site, key, None if weight is None else jnp.zeros(weight.shape, weight.dtype))

    stored = jax.eval_shape(init, jax.random.key(0))
    return stored, tuple(jax.eval_shape(lambda s, own: expand_leaves(method, site, s, own), shared, stored))


def _claim(
    structure: dict[Path, tuple[tuple[int, ...], str]],
    leaves: Mapping[Path, Any],
    base: Mapping[Path, Any],
    method: Method,
    stands_in: bool = False,
) -> None:
    """Adds leaves to the structure.

    Raises:
      ValueError: a path that is taken, by another method or by the model (unless the leaf stands in for the model's).
    """
    for path, leaf in leaves.items():
        if path in structure:
            raise ValueError(
                f"two methods of the chain both keep a leaf at {join(path)!r} (the second is {method.name}); "
                "give them different targets"
            )
        if not stands_in and (path in base or any(p[: len(path)] == path for p in base)):
            raise ValueError(f"{method.name} would keep a leaf at {join(path)!r}, where the model has one already")
        structure[path] = (tuple(leaf.shape), leaf.dtype.name)
