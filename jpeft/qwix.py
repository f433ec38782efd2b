"""Adapters of qwix, whose leaves lie beside the weights in a model's own tree; tunix trains them.

qwix names the factors of a weight ``kernel`` ``kernel_lora_a`` and ``kernel_lora_b``, and gives them the axes of the
weight where it is an einsum's. Their numbers are those of a `LoRA`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.binding import bind_survey
from jpeft.core.actions import Action
from jpeft.core.peft import Peft
from jpeft.core.sites import Site, stack_back, stack_first
from jpeft.core.tree import Path, Tree, flatten, join, nearest, unflatten
from jpeft.errors import AdapterError
from jpeft.frontends import arguments, as_tree
from jpeft.methods.lora import LoRA

_A, _B = "_lora_a", "_lora_b"


def export(peft: Peft, adapter: Tree, like: Tree) -> dict[str, Any]:
    """An adapter as qwix names and shapes it, to be laid over the state of a model that qwix has given LoRA.

    qwix's ``alpha`` must be ``scale * rank`` of the method.

    Args:
      peft: a bound `LoRA`.
      adapter: its leaves.
      like: the state or tree of qwix's model, or its ``nnx.LoRAParam``s alone; may be abstract. Factors have the axes
        of the weight in an einsum, and two in any other product.

    Returns:
      Nested dicts with ``<weight>_lora_a`` and ``<weight>_lora_b`` in the shapes of ``like``, and with its keys:
      ``nnx.update(model, tree)`` takes them.

    Raises:
      ValueError: another method, a start that is carried, a weight that ``like`` has no factors for, or has them in
        another size.
    """
    leaves, out = peft.check(adapter), {}
    theirs = {path: np.shape(x) for path, x in flatten(as_tree(like)[0]).items() if path[-1].endswith((_A, _B))}
    for action in peft.actions:
        own = peft.own(action, leaves)
        if not isinstance(action.method, LoRA) or set(own) != {"lora_a", "lora_b"}:
            raise ValueError(
                f"qwix has nothing for {action.method.name} at {action.site.name!r}, only for a plain LoRA"
            )
        *owner, weight = action.site.weight_path
        for name, suffix in (("lora_a", _A), ("lora_b", _B)):
            place, x = (*owner, weight + suffix), jnp.asarray(own[name])
            if math.prod(theirs.get(place, (0,))) != x.size:
                has = f"has it in shape {theirs[place]}" if place in theirs else "lacks it"
                raise ValueError(f"{join(place)!r} has shape {x.shape} here; like {has}")
            out[place] = _reshaped(x, theirs[place], action.site)
    return _keyed_like(unflatten(out), like)


def _keyed_like(tree: Any, like: Any) -> Any:
    """Nested dicts with the keys of ``like``, which are numbers for the modules of a list."""
    if not isinstance(tree, dict) or not isinstance(like, Mapping):
        return tree
    own = {str(key): key for key in like}
    return {own[name]: _keyed_like(child, like[own[name]]) for name, child in tree.items()}


def _reshaped(x: jax.Array, shape: tuple[int, ...], site: Site) -> jax.Array:
    """A stored leaf with the axes of each layer split or joined as in ``shape``, the stacked ones in their places."""
    layer = list(shape)
    for axis, _ in site.stack:
        layer.pop(axis)
    first = stack_first(x, site.stack)
    return stack_back(first.reshape(*(n for _, n in site.stack), *layer), site.stack)


def adopt(tree: Tree, model: Any, /, *inputs: Any, alpha: float, **kwargs: Any) -> tuple[Peft, Any]:
    """A `LoRA` bound to a model, and its adapter, from the leaves of an adapter of qwix.

    Args:
      tree: a state or tree with ``<weight>_lora_a`` and ``<weight>_lora_b``; what else it holds is left alone.
      model: the model, without qwix's leaves.
      *inputs: as for ``method.bind``.
      alpha: the ``alpha`` that qwix was given, which its leaves do not tell.
      **kwargs: as for ``method.bind``.

    Returns:
      ``(peft, adapter)``.

    Raises:
      AdapterError: there are no such leaves, one of a pair is missing or has another shape, or the model has no such
        weight.
    """
    found = {p: x for p, x in flatten(as_tree(tree)[0]).items() if p[-1].endswith((_A, _B))}
    pairs = {(*p[:-1], p[-1].removesuffix(_A)) for p in found if p[-1].endswith(_A)}
    if not pairs:
        raise AdapterError(f"the tree has no leaf that ends in {_A!r}: it holds no adapter of qwix")
    frontend, params, inputs = arguments(model, inputs, "adopt(tree, model, params, *inputs)")
    survey = frontend.survey(model, params, inputs, kwargs)
    sites = {site.weight_path: site for site in survey.weights}
    ranks: dict[str, int] = {}
    for path in sorted(pairs):
        if path not in sites:
            raise AdapterError(f"the model has no weight {join(path)!r}{nearest(join(path), map(join, sites))}")
        a = found[*path[:-1], path[-1] + _A]
        ranks[sites[path].name] = np.shape(stack_first(a, sites[path].stack))[-1]
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    exact = {name: f"^{re.escape(name)}" for name in ranks}  # anchored: a bare name would match the ends of others too
    method: Any = LoRA(
        rank=common,
        alpha=alpha,
        targets="|".join(map(re.escape, ranks)),
        overrides={exact[name]: {"rank": r} for name, r in ranks.items() if r != common},
    )
    peft = bind_survey(method, model, params, survey, frontend)
    leaves = {path: x for action in peft.actions for path, x in _adopted(action, found).items()}
    return peft, unflatten(peft.place_like_base(leaves, flatten(frontend.tree(params))))


def _adopted(action: Action, found: Mapping[Path, Any]) -> dict[Path, Any]:
    site, rank = action.site, action.method.rank
    *owner, weight = site.weight_path
    matrices = {"lora_a": (site.inputs, rank), "lora_b": (rank, site.outputs)}
    sizes, out = tuple(n for _, n in site.stack), {}
    for (name, matrix), suffix in zip(matrices.items(), (_A, _B), strict=True):
        if (place := (*owner, weight + suffix)) not in found:
            raise AdapterError(f"the tree lacks {join(place)!r}")
        x = stack_first(jnp.asarray(found[place]), site.stack)
        if x.size != math.prod((*sizes, *matrix)) or x.shape[: len(sizes)] != sizes or site.batch:
            raise AdapterError(f"{join(place)!r} has shape {x.shape}, expected {(*sizes, *matrix)}")
        out[action.leaf_path(name)] = stack_back(x.reshape(*sizes, *matrix), site.stack)
    return out
