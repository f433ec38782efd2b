"""HiRA: a low-rank matrix that multiplies the weight entry by entry (Huang et al. 2025,
https://openreview.net/forum?id=TwJrTz9cRS).

y = x (W + W ∘ (A B)) + b        A: [in, r], B: [r, out]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import POSITIVE_INT, RATE, Rule
from jpeft.core.geometry.embedding import Lookup
from jpeft.core.interchange import CONVOLUTION, EMBEDDING, FAN_IN_FAN_OUT, LINEAR, Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod, normal
from jpeft.methods.families import kernels
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.kaiming import kaiming


@dataclass(frozen=True, kw_only=True)
class HiRA(WeightMethod):
    """Updates of high rank with the parameters of a LoRA: what the weight has, scaled by a low-rank matrix.

    Attributes:
      rank: r.
      dropout: rate on the adapter's input, while the caller trains.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``hira_a [in, r]``, ``hira_b [r, out]``. B starts at zero; at an embedding table, A does.

    >>> import jpeft
    >>> method = jpeft.methods.HiRA(rank=16, targets=r".*/(query|value)")
    """

    rank: int = 32
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://openreview.net/forum?id=TwJrTz9cRS"
    learning_rate: ClassVar[float] = 4.5e-3
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"hira_a": ("in", None), "hira_b": (None, "out")}
    resizable: ClassVar[frozenset[str]] = frozenset({"rank"})
    neutral: ClassVar[float | None] = 0.0
    per_site: ClassVar[tuple[str, ...]] = ("rank", "dropout", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"rank": POSITIVE_INT, "dropout": RATE}

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        shape_a, shape_b = (site.inputs, self.rank), (self.rank, site.outputs)
        if site.lookup:
            return {"hira_a": jnp.zeros(shape_a, self.dtype), "hira_b": normal(key, shape_b, 1.0, self.dtype)}
        a = kaiming(key, shape_a, site.inputs, self.dtype)
        return {"hira_a": a, "hira_b": jnp.zeros(shape_b, self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if isinstance(x, Lookup):  # rows of the table
            y = base(x)
            one = Lookup(x.ids, None, x.dtype)
            return y + y * ((one @ leaves["hira_a"]) @ leaves["hira_b"])
        dropped = base.dropout(x, self.dropout)
        if dropped is x:
            return super().apply(leaves, base, x)
        # Checkpointed: the backward pass computes the update again instead of keeping it.
        update = jax.checkpoint(lambda x, w, a, b: x @ (w * (a @ b)))
        return base(x) + update(dropped, base.weight, leaves["hira_a"], leaves["hira_b"])

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return w + w * (leaves["hira_a"] @ leaves["hira_b"]), b


_BOTH = (LINEAR, CONVOLUTION)
HiRA.hf = HFSpec(
    peft_type="HIRA",
    tensors=(
        Tensor("hira_A", "hira_a", functions=(kernels.rows_to_tree, kernels.rows_to_torch), kinds=_BOTH),
        Tensor("hira_B", "hira_b", functions=(kernels.columns_to_tree, kernels.columns_to_torch), kinds=_BOTH),
        Tensor("hira_embedding_A", "hira_a", "ri->ir", kinds=(EMBEDDING,)),
        Tensor("hira_embedding_B", "hira_b", "or->ro", kinds=(EMBEDDING,)),
    ),
    fields=(
        Field("r", "rank", 32, POSITIVE_INT),
        dropout_field("hira_dropout"),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_weights", "rank_pattern"}),  # PEFT itself gives every module the rank r
)
