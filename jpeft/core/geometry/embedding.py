"""Embedding tables: indexed by token id, and used transposed as an output head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.dataflow.views import DOT, LOOKUP, Use, View
from jpeft.core.geometry.base import Call, Geometry


@jax.tree_util.register_pytree_node_class
@dataclass
class Lookup:
    """The one-hot matrix ``[tokens..., vocabulary]`` of token ids, never materialized.

    Attributes:
      ids: the token ids.
      weight: a factor for each token, or None.
      dtype: dtype of products with the matrix.
    """

    ids: jax.Array
    weight: jax.Array | None
    dtype: Any

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.ids, self.weight), self.dtype

    @classmethod
    def tree_unflatten(cls, dtype: Any, children: Any) -> Lookup:
        ids, weight = children
        return cls(ids, weight, dtype)

    def __matmul__(self, a: jax.Array) -> jax.Array:
        rows = jnp.take(a.astype(self.dtype), self.ids, axis=0)
        return rows if self.weight is None else rows * self.weight[..., None]

    def __mul__(self, scale: jax.Array) -> Lookup:
        picked = jnp.take(scale.astype(self.dtype), self.ids, axis=0)
        return Lookup(self.ids, picked if self.weight is None else picked * self.weight, self.dtype)


@dataclass(frozen=True)
class Embedding(Geometry):
    """A table ``[vocabulary, features]``: indexed by token id or, in ``attend``, used transposed."""

    leaf: str = "embedding"
    bias: str | None = None

    linear = False
    lookup = True

    def explains(self, use: Use, shape: tuple[int, ...]) -> bool:
        found = use.product
        if use.returned is None or found.weight.fixed or found.weight.flipped:
            return False
        if found.kind == DOT:  # attend: the features are summed over
            summed = [atom.axis for i, _ in found.contracted for atom in found.weight.axes[i]]
            return use.operand is not None and summed == [1]
        return found.kind == LOOKUP

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (), (0,), (1,)

    def view(self, w: jax.Array) -> jax.Array:
        return w

    def unview(self, m: jax.Array) -> jax.Array:
        return m

    def operand(self, call: Call, dtype: Any) -> Any:
        return Lookup(jnp.asarray(call.args[0]), None, dtype)

    def restore(self, call: Call, x: Any) -> None:
        return None  # a changed one-hot matrix is not an id; the caller multiplies by the weight instead

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        return y

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        return y


@dataclass(frozen=True)
class TracedTable(Embedding):
    """A table that was seen to be looked up in calls of its module, and used transposed: both are changed as it runs.

    Attributes:
      shape: shape of the table in its scope.
      calls: names of the calls, such as "module.Class.encode".
    """

    shape: tuple[int, ...] = ()
    calls: tuple[str, ...] = ()  # type: ignore[assignment]


def traced_table(leaf: str, shape: tuple[int, ...], uses: Sequence[Use], calls: Iterable[str]) -> TracedTable | None:
    """The geometry of a weight with these uses; None if they are not lookups of rows, and products with all rows."""
    found = [use.product for use in uses]
    if len(shape) != 2 or 0 in shape or LOOKUP not in {product.kind for product in found}:
        return None
    whole = View.of(shape)
    for product in found:
        if product.kind == LOOKUP and product.weight == whole:
            continue
        rows = [product.weight.axes[i] for i in product.free]
        is_transposed = product.weight in (whole, whole.transpose((1, 0))) and rows == [whole.axes[0]]
        if product.kind != DOT or product.batch or not is_transposed:
            return None
    return TracedTable(leaf, None, shape=shape, calls=tuple(dict.fromkeys(calls)))


def attend(view: Callable[[Any], jax.Array], query: jax.Array, vocabulary: int) -> jax.Array:
    """``query @ W.T`` for a linear map ``view: x -> x @ W``, by transposing the map; ``W`` is never materialized."""
    x = jax.ShapeDtypeStruct((*query.shape[:-1], vocabulary), query.dtype)
    (y,) = jax.linear_transpose(view, x)(query)
    return y
