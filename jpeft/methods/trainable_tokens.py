"""Trainable tokens: chosen rows of an embedding table are trained, the others are frozen.

x = E[id]                   rows of E: those of ``indices`` are trained
logits = h Eᵀ + b           a head, tied or not: the same rows are the columns of its weight ``[features, vocabulary]``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jpeft.checks import Rule, is_ids
from jpeft.core.geometry.embedding import Lookup
from jpeft.core.interchange import EMBEDDING, Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import TargetError
from jpeft.methods.base import WeightMethod

_IDS: Rule = (lambda value: is_ids(value) and len(set(value)) == len(value), "different token ids, one or more")


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(WeightMethod):
    """Trains the rows of some tokens, such as those that were added to a tokenizer.

    The leaves are the rows themselves, and start as copies of the base's. A head that is tied to the table follows it;
    for an untied head, name both: ``targets=["embed_tokens", "lm_head"]``.

    Attributes:
      indices: the token ids, in the order of the leaves' rows. ``overrides`` may set others for one target.
      dtype: dtype of the leaves.
      targets: embedding tables, and heads: weights with an output for each token. By default the model's one table.
      exclude, overrides, parts: see `WeightMethod`.

    Leaves at a table: ``tokens_in [n, features]``; at a head: ``tokens_out [n, features]``.

    >>> import jpeft
    >>> method = jpeft.Chain(jpeft.LoRA(rank=8), jpeft.methods.TrainableTokens(indices=[32000, 32001]))
    """

    indices: Sequence[int]
    dtype: Any = "float32"

    family: ClassVar[str] = "selective"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"tokens_in": (None, "out"), "tokens_out": (None, "in")}
    per_site: ClassVar[tuple[str, ...]] = ("indices", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"indices": _IDS}

    def __post_init__(self) -> None:
        if isinstance(self.indices, (np.ndarray, jax.Array)):
            object.__setattr__(self, "indices", self.indices.tolist())
        super().__post_init__()
        object.__setattr__(self, "indices", tuple(self.indices))

    @property
    def identity_at_init(self) -> bool:
        """False for a dtype that may round the base's rows."""
        return jnp.dtype(self.dtype).itemsize >= 4

    def sites(self, survey: Survey) -> list[Site]:
        if self.targets is None and len(tables := [s.name for s in survey.weights if s.lookup]) != 1:
            raise TargetError(
                f"{self.name} needs targets: the model has {len(tables) or 'no'} embedding tables"
                f"{': ' * bool(tables)}{', '.join(tables)}"
            )
        return super().sites(survey)

    def default_targets(self) -> Any:
        return lambda path, site: site.lookup

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        size = site.inputs if site.lookup else site.outputs
        if max(self.indices) >= size:
            raise ValueError(
                f"{self.name}: {site.name!r} has {size} tokens, but indices has {max(self.indices)}; "
                "jpeft.models.resize_embeddings adds rows"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        name, rows = ("tokens_in", w) if site.lookup else ("tokens_out", w.T)
        return {name: rows[self._ids].astype(self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if "tokens_out" in leaves:  # y = x W + b, where columns of W are replaced
            y, rows = base(x), x @ leaves["tokens_out"].T
            rows = rows if base.bias is None else rows + base.bias[self._ids]
            return y.at[..., self._ids].set(rows.astype(y.dtype))
        rows = leaves["tokens_in"]
        if isinstance(x, Lookup):
            return self._look_up(rows, base, x)
        # A row of numbers for each token, such as a tied head transposes.
        others = x.at[..., self._ids].set(0, unique_indices=True)  # else it has no transpose
        return base(others) + x.at[..., self._ids].get(unique_indices=True) @ rows

    def _look_up(self, rows: Float[Array, "n out"], base: Linear, x: Lookup) -> Float[Array, "*tokens out"]:
        """The base's rows, with those of trained tokens in place."""
        y, size = base(x), jax.eval_shape(lambda: base.weight).shape[0]
        ids = jnp.where(x.ids < 0, x.ids + size, x.ids)  # as jnp.take counts them
        order = np.argsort(self.indices)
        place = jnp.searchsorted(self._ids[order], ids)
        place = jnp.asarray(order)[jnp.minimum(place, order.size - 1)]
        own = Lookup(place, x.weight, x.dtype) @ rows
        return jnp.where((self._ids[place] == ids)[..., None], own.astype(y.dtype), y)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        if "tokens_out" in leaves:
            return w.at[:, self._ids].set(leaves["tokens_out"].T), b
        return w.at[self._ids].set(leaves["tokens_in"]), b

    @property
    def _ids(self) -> Any:
        return jnp.asarray(np.asarray(self.indices, np.int32))


_NAME = "trainable_tokens_delta"
TrainableTokens.hf = HFSpec(
    peft_type="TRAINABLE_TOKENS",
    tensors=(Tensor(_NAME, "tokens_in", kinds=(EMBEDDING,)), Tensor(_NAME, "tokens_out")),
    fields=(Field("token_indices", "indices", (), _IDS, read=lambda ids, site: tuple(ids)),),
    ignored=frozenset({"init_weights"}),
    tied={_NAME: _NAME},
    ties=True,
    beside="trainable_token_indices",
    wrapper="token_adapter.",
    saves=False,
)
