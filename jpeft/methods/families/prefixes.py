"""The keys and values of prefixes at all attentions of a model, as functions of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jpeft.core.actions import Action, used_leaves
from jpeft.core.peft import Peft
from jpeft.core.sites import map_axes, stack_back, stack_first
from jpeft.core.tree import Path, Tree, like, natural, unflatten

KEY, VALUE = "prefix_key", "prefix_value"
Prefixes = dict[str, dict[str, Any]]  # by site, a key and a value [layers..., length, kv_heads, head_dim]


def prefix_actions(peft: Peft) -> list[Action]:
    """The actions whose leaves are keys and values before an attention's own, in the order of layers.

    Raises:
      ValueError: there are none.
    """
    found = [a for a in peft.actions if a.site.kind == "attention" and hasattr(a.method, "stored")]
    if not found:
        raise ValueError(f"{peft.method.name} has no keys and values before an attention's own; PrefixTuning has")
    return sorted(found, key=lambda action: natural(action.site.path))


def prefixes(peft: Peft, adapter: Tree) -> Prefixes:
    """The keys and values of a prefix at each site, in the order of layers, whatever computes them."""
    leaves, out = peft.check(adapter), {}
    for action in prefix_actions(peft):
        stack = action.site.stack
        own = {n: stack_first(jnp.asarray(meta.unbox(x)), stack) for n, x in peft.own(action, leaves).items()}
        shared = peft.shared(action, leaves)
        used = map_axes(lambda own, a=action, s=shared: used_leaves(a, s, own), len(stack))(own)
        out[action.site.name] = {name: used[name] for name in (KEY, VALUE)}
    return out


def stored_leaves(peft: Peft, given: Mapping[str, Mapping[str, Any]]) -> dict[Path, jax.Array]:
    """The adapter leaves of a prefix, by path, from the keys and values at each site. Inverse of `prefixes`.

    Raises:
      ValueError: they have other shapes, or a network computes the adapter's.
    """
    leaves = {}
    for action in prefix_actions(peft):
        site, method = action.site, action.method
        heads, key_dim, value_dim = site.heads
        stack = tuple(n for _, n in site.stack)
        for name, dim in ((KEY, key_dim), (VALUE, value_dim)):
            expected, found = (*stack, method.length, heads, dim), given[site.name][name].shape
            if found != expected:
                raise ValueError(f"{site.name!r} takes {name} {list(expected)}, got {list(found)}")
        stored = map_axes(method.stored, len(stack))({name: given[site.name][name] for name in (KEY, VALUE)})
        leaves |= {action.leaf_path(name): stack_back(x, site.stack) for name, x in stored.items()}
    return leaves


def with_prefixes(peft: Peft, adapter: Tree, given: Mapping[str, Mapping[str, Any]]) -> Any:
    """An adapter with these keys and values, see `stored_leaves`."""
    leaves = dict(peft.check(adapter))
    for path, x in stored_leaves(peft, given).items():
        leaves[path] = meta.replace_boxed(leaves[path], x.astype(meta.unbox(leaves[path]).dtype))
    return like(unflatten(leaves), adapter)


def in_layers(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    """A key and a value of each layer, from those of sites, which a scan may stack. Inverse of `in_sites`."""
    out = []
    for own in found.values():
        key, value = own[KEY], own[VALUE]
        key, value = (x.reshape(-1, *x.shape[-3:]) for x in (key, value))
        out += list(zip(key, value, strict=True))
    return out


def in_sites(peft: Peft, layers: Sequence[tuple[Any, Any]]) -> Prefixes:
    """The keys and values of sites, from those of each layer. Inverse of `in_layers`.

    Raises:
      ValueError: there are more or fewer layers than the sites have.
    """
    actions, out, start = prefix_actions(peft), {}, 0
    stacks = [tuple(n for _, n in action.site.stack) for action in actions]
    counts = [math.prod(stack) for stack in stacks]
    if sum(counts) != len(layers):
        raise ValueError(f"keys and values of {len(layers)} layers, and the prefix is at {sum(counts)} attentions")
    for action, stack, count in zip(actions, stacks, counts, strict=True):
        each = layers[start : start + count]
        pair = zip((KEY, VALUE), zip(*each, strict=True), strict=True)
        own = {name: jnp.stack([jnp.asarray(x) for x in xs]) for name, xs in pair}
        out[action.site.name] = {name: x.reshape(*stack, *x.shape[1:]) for name, x in own.items()}
        start += count
    return out
