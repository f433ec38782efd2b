"""The trees of mixtures whose experts are trained LoRAs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft.core.sites import stack_back, stack_first
from jpeft.core.targets import matches_entry
from jpeft.core.tree import Path, box_as, join, like, natural, unflatten
from jpeft.methods.lora import LoRA

if TYPE_CHECKING:
    from jpeft.core.actions import Action
    from jpeft.core.peft import Peft


def with_experts(peft: Peft, adapter: Any, experts: Sequence[tuple[Peft, Any]]) -> Any:
    """The adapter of a mixture whose experts are trained LoRAs.

    Args:
      peft: a bound `MoLE` or `XLoRA`.
      adapter: its adapter, as from ``peft.init``. It is not changed.
      experts: ``(peft, adapter)`` of each LoRA, in order. They may differ in rank, scale and weights; where one has
        none, that expert adds nothing.

    Raises:
      ValueError: the number of LoRAs is not ``n_experts``; one is no LoRA, has a larger rank than the mixture, or acts
        on a weight that the mixture does not.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> lora = jpeft.LoRA(rank=2, init_weights="random", targets="layers_0").bind(model, params, x)
    >>> trained = [lora.init(jax.random.key(seed), params) for seed in range(3)]
    >>> peft = jpeft.methods.MoLE(rank=2, n_experts=3, targets="layers_0").bind(model, params, x)
    >>> adapter = peft.init(jax.random.key(0), params)
    >>> adapter = jpeft.methods.with_experts(peft, adapter, [(lora, own) for own in trained])
    >>> adapter["layers_0"]["mole_b"].shape
    (6, 8)
    """
    leaves = dict(peft.check(adapter))
    mixtures = {a.site.weight_path: a for a in peft.actions if hasattr(a.method, "expert_leaves")}
    if not mixtures:
        raise ValueError(f"with_experts fills a MoLE or an XLoRA, and this is {peft.method.name}")
    trained = [_factors(i, own, tree, mixtures) for i, (own, tree) in enumerate(experts)]
    for path, action in mixtures.items():
        count: int = action.method.n_experts
        if len(trained) != count:
            raise ValueError(f"{action.method.name} has n_experts={count}, and with_experts got {len(trained)} LoRAs")
        names = [action.leaf_path(name) for name in action.method.expert_leaves]
        held = [stack_first(meta.unbox(leaves[name]), action.site.stack) for name in names]
        each = [_like(i, own.get(path), held, count, action) for i, own in enumerate(trained)]
        for name, parts, axis in zip(names, zip(*each, strict=True), (-1, -2), strict=True):
            leaves[name] = box_as(leaves[name], stack_back(jnp.concatenate(parts, axis), action.site.stack))
    return like(unflatten(leaves), adapter)


def with_classifier(peft: Peft, adapter: Any, tensors: Mapping[str, Any], order: Sequence[str] = ()) -> Any:
    """The adapter of an X-LoRA with the classifier that HuggingFace PEFT has trained.

    PEFT 0.21 does not save it whole: of names like ``internal_xlora_classifier.layers.0.weight``, it drops those that
    hold the name of a LoRA between dots. Take the tensors from the model itself, before it is saved:
    ``model.base_model.internal_xlora_classifier.state_dict()``.

    Args:
      peft: a bound `XLoRA`.
      adapter: its adapter. It is not changed.
      tensors: the classifier's tensors as numpy arrays, by names that end in ``layers.<n>.weight`` or ``.bias``.
      order: with ``layerwise``, the names of a layer's weights in torch's order, such as ``["q_proj", "v_proj"]``.

    Raises:
      ValueError: a layer of the classifier is missing, or has another shape; a weight is not in ``order``.
    """
    method: Any = peft.method
    if not hasattr(method, "layerwise"):
        raise ValueError(f"with_classifier fills an XLoRA, and this is {method.name}")
    leaves, layers = dict(peft.check(adapter)), _layers(tensors)
    if len(layers) != method.depth:
        raise ValueError(
            f"XLoRA.depth is {method.depth}, and the classifier has the layers {[n for n, _ in layers]}: PEFT drops "
            "some as it saves; take them from model.base_model.internal_xlora_classifier.state_dict()"
        )
    *trunk, (_, (head, bias)) = layers
    new: dict[Path, np.ndarray] = {}
    for i, (_, (kernel, shift)) in enumerate(trunk):
        new |= {(method.slug, f"kernel_{i}"): kernel, (method.slug, f"bias_{i}"): shift}
    if method.layerwise:
        new |= _heads(peft, head, bias, order)
    else:
        new |= {(method.slug, "xlora_head"): head, (method.slug, "xlora_head_bias"): bias}
    for path, x in new.items():
        old = meta.unbox(leaves[path])
        if old.shape != x.shape:
            raise ValueError(f"{join(path)!r} is {list(old.shape)}, and PEFT's classifier has {list(x.shape)} for it")
        leaves[path] = box_as(leaves[path], jnp.asarray(x, old.dtype))
    return like(unflatten(leaves), adapter)


def _layers(tensors: Mapping[str, Any]) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """The kernel ``[in, out]`` and bias of each layer with its number, in order."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, x in tensors.items():
        if match := re.search(r"(?:^|\.)layers\.(\d+)\.(weight|bias)$", name):
            found.setdefault(int(match[1]), {})[match[2]] = np.asarray(x)
    whole = {n: own for n, own in found.items() if own.keys() == {"weight", "bias"}}
    return [(n, (own["weight"].T, own["bias"])) for n, own in sorted(whole.items())]


def _heads(peft: Peft, head: np.ndarray, bias: np.ndarray, order: Sequence[str]) -> dict[Path, np.ndarray]:
    """The part of PEFT's last layer at each weight: one after the other, as torch lists the weights of all layers."""
    method: Any = peft.method
    count, places = method.n_experts, {}  # the index of each weight's outputs, of all its layers
    seen = dict.fromkeys(order, 0)
    for action in sorted(peft.actions, key=lambda action: natural(action.site.path)):
        site = action.site
        name = next((entry for entry in order if matches_entry(entry, site.name)), None)
        if name is None:
            raise ValueError(f"{site.name!r} is none of order={list(order)}, the weights of a layer in torch's order")
        layers = range(seen[name], seen[name] + (site.stack[0][1] if site.stack else 1))
        seen[name] += len(layers)
        places[action] = [(layer * len(order) + list(order).index(name)) * count for layer in layers]
    if (total := sum(seen.values()) * count) != bias.size or len(set(seen.values())) > 1:
        raise ValueError(
            f"PEFT's classifier has {bias.size} outputs, and the weights of order={list(order)} take {total}"
        )
    out = {}
    for action, first in places.items():
        for leaf, x in (("xlora_head", head), ("xlora_head_bias", bias)):
            own = [x[..., i : i + count] for i in first]
            out[action.leaf_path(leaf)] = np.stack(own) if action.site.stack else own[0]
    return out


def _factors(index: int, peft: Peft, adapter: Any, mixtures: Mapping[Path, Action]) -> dict[Path, tuple[Any, Any]]:
    """A and s B of a LoRA by the path of the weight, with the axes of stacks in front."""
    leaves, out = peft.check(adapter), {}
    for action in peft.actions:
        site, method = action.site, action.method
        if type(method) is not LoRA:
            raise ValueError(f"expert {index} has {method.name} at {site.name!r}; with_experts takes LoRAs alone")
        if site.weight_path not in mixtures:
            raise ValueError(
                f"expert {index} has a LoRA at {site.name!r}, where the mixture has none; bind the mixture with "
                "targets that cover those of all experts"
            )
        own = {name: stack_first(meta.unbox(x), site.stack) for name, x in peft.own(action, leaves).items()}
        on = own.pop(action.mask, None)
        found = method.expand(site, {}, own)
        b = found["lora_b"] * method.scale
        out[site.weight_path] = found["lora_a"], b if on is None else jnp.where(on[..., None], b, jnp.zeros_like(b))
    return out


def _like(
    index: int, factors: tuple[Any, Any] | None, held: Sequence[jax.Array], count: int, action: Action
) -> tuple[jax.Array, jax.Array]:
    """An expert's A and B in the sizes and dtypes of the mixture's, with zeros in the ranks that it lacks."""
    (*lead, rows, ranks), (*_, columns) = held[0].shape, held[1].shape
    rank = ranks // count
    empty = jnp.zeros((*lead, rows, 0)), jnp.zeros((*lead, 0, columns))
    a, b = empty if factors is None else factors
    free = rank - a.shape[-1]
    if a.shape[:-1] != (*lead, rows) or b.shape[-1] != columns or free < 0:
        raise ValueError(
            f"expert {index} at {action.site.name!r} has factors {list(a.shape)} and {list(b.shape)}, and the mixture "
            f"takes {[*lead, rows, rank]} and {[*lead, rank, columns]}, or a smaller rank"
        )
    none = [(0, 0)] * (a.ndim - 2)
    a, b = jnp.pad(a, (*none, (0, 0), (0, free))), jnp.pad(b, (*none, (0, free), (0, 0)))
    return a.astype(held[0].dtype), b.astype(held[1].dtype)
