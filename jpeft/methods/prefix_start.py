"""Starts of prefixes: the keys and values of a text, or of several prefixes one after the other.

P_k, P_v = the keys and values of the first ``length`` tokens, which a run of the base computes at every attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jpeft.core.actions import Action, init_leaves
from jpeft.core.method import Attend, Leaves, Project
from jpeft.core.peft import Peft
from jpeft.core.sites import Site, map_axes, stack_back, stack_first
from jpeft.core.tree import Tree, flatten, like, unflatten
from jpeft.methods.base import AttentionMethod
from jpeft.methods.families import prefixes
from jpeft.methods.families.prefixes import KEY, VALUE


def from_text(peft: Peft, params: Tree, adapter: Tree, *inputs: Any, **kwargs: Any) -> Any:
    """An adapter whose prefix is the keys and values of a text, as the base computes them.

    With ``shift_positions=True``, the model with the prefix of a text is the model after that text: what comes next has
    the positions that it would have there.

    Args:
      peft: a bound `PrefixTuning` or `Cartridge`, alone or in a chain.
      params: the base.
      adapter: a fresh adapter.
      *inputs: what the model is called with: one text, of as many tokens as the prefix or more; without padding.
      **kwargs: as for ``peft.apply``.

    Raises:
      ValueError: several texts, one that is too short, or a prefix that a network computes.

    >>> import flax.linen as nn, jpeft
    >>> from jpeft.methods.prefix_start import from_text
    >>> model, x = nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((1, 5, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.PrefixTuning(length=3).bind(model, params, x)
    >>> from_text(peft, params, peft.init(jax.random.key(0), params), x)["prefix_key"].shape
    (3, 2, 2)
    """
    reader = _reader(peft)
    zeros = {a.leaf_path(n): x for a in reader.actions for n, x in _zeros(a.method, a.site).items()}

    def total(leaves: Tree) -> jax.Array:
        outputs = jax.tree.leaves(reader.apply(params, leaves, *inputs, **kwargs))
        floats = [x for x in outputs if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((x.astype(jnp.float32).sum() for x in floats), jnp.zeros(()))

    leaves = flatten(jax.jit(jax.grad(total))(unflatten(zeros)))
    read = {}
    for action in reader.actions:
        own = {name: stack_first(leaves[action.leaf_path(name)], action.site.stack) for name in (KEY, VALUE)}
        if not all(bool(x.any()) for x in own.values()):
            raise ValueError(f"the outputs of the call do not depend on the attention of {action.site.name!r}")
        read[action.site.name] = own
    return prefixes.with_prefixes(peft, adapter, read)


def from_keys_values(peft: Peft, adapter: Tree, layers: Sequence[tuple[Any, Any]]) -> Any:
    """An adapter whose prefix is the keys and values of a text in a cache, such as HuggingFace's ``past_key_values``.

    Args:
      peft: a bound `PrefixTuning` or `Cartridge`, alone or in a chain.
      adapter: a fresh adapter.
      layers: of each layer a key and a value ``[kv_heads, tokens, head_dim]``, or with an axis of one text in front.

    Raises:
      ValueError: another number of layers, several texts, one that is too short, or a prefix that a network computes.

    >>> # from_keys_values(peft, adapter, zip(cache["key"][:, 0], cache["value"][:, 0])); cache: jpeft.models.kv_cache
    """
    length = prefixes.prefix_actions(peft)[0].method.length

    def first(x: Any) -> jax.Array:
        return _leading(jnp.swapaxes(jnp.asarray(x), -3, -2), length)

    found = [(first(key), first(value)) for key, value in layers]
    return prefixes.with_prefixes(peft, adapter, prefixes.in_sites(peft, found))


def compose(*pairs: tuple[Peft, Tree]) -> tuple[Any, Any]:
    """Several prefixes one after the other: the method and the adapter, whose length is the sum of theirs.

    Bind the method to the model as the others were. Of cartridges, the first one's tokens stay frozen.

    Args:
      *pairs: bound methods with their adapters, two or more, of the same kind at the same attentions.

    Raises:
      ValueError: fewer than two; a chain, or a prefix that a network computes; other attentions.

    >>> import flax.linen as nn, jpeft
    >>> from jpeft.methods.prefix_start import compose
    >>> model, x = nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((1, 5, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.methods.Cartridge(length=3, shift_positions=False).bind(model, params, x)
    >>> first, second = (peft.init(jax.random.key(seed), params) for seed in (0, 1))
    >>> method, adapter = compose((peft, first), (peft, second))
    >>> method.length, method.bind(model, params, x).apply(params, adapter, x).shape
    (6, (1, 5, 4))
    """
    if len(pairs) < 2:
        raise ValueError(f"compose takes two prefixes or more, got {len(pairs)}")
    first, method = pairs[0][0], cast(Any, pairs[0][0].method)
    for peft, _ in pairs:
        if type(peft.method) is not type(method) or [a.site for a in peft.actions] != [a.site for a in first.actions]:
            raise ValueError(f"compose takes prefixes of one kind at the same attentions, got {peft.method.name}")
    found = [prefixes.prefixes(peft, adapter) for peft, adapter in pairs]
    lengths = [prefixes.prefix_actions(peft)[0].method.length for peft, _ in pairs]
    longer = dataclasses.replace(method, length=sum(lengths))
    leaves = {}
    for action in prefixes.prefix_actions(first):
        stack = action.site.stack
        both = {n: jnp.concatenate([own[action.site.name][n] for own in found], axis=-3) for n in (KEY, VALUE)}
        stored = map_axes(longer.stored, len(stack))(both)
        leaves |= {action.leaf_path(name): stack_back(x, stack) for name, x in stored.items()}
    return longer, like(unflatten(leaves), pairs[0][1])


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Reader(AttentionMethod):
    """A method that leaves the outputs as they are; its leaves' gradients are the first keys and values."""

    length: int

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        heads, key_dim, value_dim = site.heads
        return {KEY: jnp.zeros((self.length, heads, key_dim)), VALUE: jnp.zeros((self.length, heads, value_dim))}

    def attend(
        self, leaves: Leaves, attend: Attend, query: Array, key: Array, value: Array, mask: Any, project: Project
    ) -> Array:
        first = (_leading(x, self.length) for x in (key, value))
        return _observed(attend(query, key, value, mask), *first, leaves[KEY], leaves[VALUE])


def _reader(peft: Peft) -> Peft:
    """A reader at the attentions where a prefix is."""
    found = prefixes.prefix_actions(peft)
    method = _Reader(length=found[0].method.length)
    actions = tuple(Action(method, action.site, (KEY, VALUE)) for action in found)
    shapes = {a.leaf_path(n): (x.shape, x.dtype.name) for a in actions for n, x in _zeros(method, a.site).items()}
    structure = tuple(sorted(shapes.items()))
    return dataclasses.replace(peft, method=method, actions=actions, structure=structure, shared_paths=(), matched=())


def _zeros(method: Any, site: Site) -> dict[str, jax.Array]:
    return init_leaves(method, site, jax.random.key(0), None)


def _leading(x: jax.Array, length: int) -> jax.Array:
    """The first ``length`` keys or values of the only text, of ``[..., tokens, heads, head_dim]``."""
    if math.prod(x.shape[:-3]) != 1 or x.shape[-3] < length:
        raise ValueError(
            f"a prefix of {length} tokens starts from the keys and values of one text of as many tokens or more, got "
            f"[..., tokens, heads, features] {list(x.shape)}"
        )
    return x.reshape(x.shape[-3:])[:length]


@jax.custom_vjp
def _observed(
    out: jax.Array, key: jax.Array, value: jax.Array, read_key: jax.Array, read_value: jax.Array
) -> jax.Array:
    return out


def _observed_forward(out: jax.Array, key: Any, value: Any, read_key: Any, read_value: Any) -> Any:
    return out, (key, value)


def _observed_backward(read: Any, gradient: jax.Array) -> Any:
    key, value = read
    return gradient, jnp.zeros_like(key), jnp.zeros_like(value), key, value


_observed.defvjp(_observed_forward, _observed_backward)
