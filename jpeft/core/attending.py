"""The operation of an attention, changed by one method after the other: the same in every module system."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.actions import Active
from jpeft.core.attention import Operation
from jpeft.core.method import Prefix, Project


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention's operation, as an attention method finds it: see `jpeft.core.method.Attend`.

    Attributes:
      operation: the module's own, with the prefix of keys and values as its last argument.
      prefixes: prefixes of methods that come after this one.
    """

    operation: Operation
    prefixes: tuple[Prefix, ...] = ()

    def __call__(self, query: Any, key: Any, value: Any, mask: Any, prefix: Prefix | None = None) -> jax.Array:
        found = self.prefixes if prefix is None else (*self.prefixes, prefix)
        if not found:
            return self.operation(query, key, value, mask)
        if len(found) == 1:
            return self.operation(query, key, value, mask, prefix=found[0])
        keys, values = (jnp.concatenate([p[i] for p in found], axis=-3) for i in (0, 1))
        return self.operation(query, key, value, mask, prefix=(keys, values))

    def over(self, query: Any, keys: Any, values: Any) -> jax.Array:
        lead = query.shape[:-3]
        keys, values = (jnp.broadcast_to(x.astype(query.dtype), (*lead, *x.shape[-3:])) for x in (keys, values))
        return self.operation(query, keys, values, True)


@dataclass(frozen=True, eq=False)
class _ChangedAttention:
    """An attention under one more action."""

    active: Active
    attention: Attention | _ChangedAttention
    project: Project

    def __call__(self, query: Any, key: Any, value: Any, mask: Any, prefix: Prefix | None = None) -> jax.Array:
        inner = self.attention if prefix is None else _with_prefix(self.attention, prefix)
        leaves, action = self.active.used(self.active.leaves, key.dtype), self.active.action
        if (on := self.active.leaves.get(action.mask)) is None:
            return action.method.attend(leaves, inner, query, key, value, mask, self.project)
        plain = _Plain(inner, (query, key, value, mask))
        y = action.method.attend(leaves, plain, query, key, value, mask, self.project)
        return jnp.where(on.reshape(()), y, plain.output().astype(y.dtype))

    def over(self, query: Any, keys: Any, values: Any) -> jax.Array:
        return self.attention.over(query, keys, values)


class _Plain:
    """An attention in a layer that a method may not act on: its output without the method is computed once."""

    def __init__(self, attention: Attention | _ChangedAttention, operands: tuple[Any, ...]):
        self.attention, self.operands, self.outputs = attention, operands, []

    def __call__(self, query: Any, key: Any, value: Any, mask: Any, prefix: Prefix | None = None) -> jax.Array:
        given = query, key, value, mask
        if prefix is None and all(x is own for x, own in zip(given, self.operands, strict=True)):
            return self.output()
        return self.attention(query, key, value, mask, prefix)

    def over(self, query: Any, keys: Any, values: Any) -> jax.Array:
        return self.attention.over(query, keys, values)

    def output(self) -> jax.Array:
        if not self.outputs:
            self.outputs.append(self.attention(*self.operands))
        return self.outputs[0]


def _with_prefix(attention: Any, prefix: Prefix) -> Any:
    if isinstance(attention, Attention):
        return dataclasses.replace(attention, prefixes=(*attention.prefixes, prefix))
    return dataclasses.replace(attention, attention=_with_prefix(attention.attention, prefix))


def attend(
    actions: Sequence[Active], project: Project, operation: Operation, query: Any, key: Any, value: Any, mask: Any
) -> jax.Array:
    """An attention's output under each action in turn."""
    attention: Attention | _ChangedAttention = Attention(operation)
    for active in actions:
        attention = _ChangedAttention(active, attention, project)
    return attention(query, key, value, mask)
