"""VB-LoRA: the factors of all updates are mixed from one bank of vectors (Li et al. 2024,
https://arxiv.org/abs/2405.15179).

y = x W + (x A) B        A: [in, r], B: [r, out]; each run of v entries along "in" or "out" is Σ_k softmax(l)_k bank_k
                         over the k with the largest logits l
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jpeft.checks import NUMBER, POSITIVE_INT, RATE, Rule
from jpeft.core.interchange import FAN_IN_FAN_OUT, Field, HFSpec, SharedTensor, Tensor, Tensors
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod, normal
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.low_rank import low_rank


@dataclass(frozen=True, kw_only=True)
class VBLoRA(WeightMethod):
    """Low-rank updates whose factors are mixtures of a few vectors each, from a bank that all weights share.

    A fresh adapter changes the model: of a bank of zeros nothing would have a gradient.

    Attributes:
      rank: r, the number of columns of A and of rows of B.
      num_vectors: the number of vectors in the bank.
      vector_length: v, the length of each; it divides "in" and "out" of every weight.
      topk: the number of vectors in a mixture.
      init_vector_bank_bound: the bank starts uniform in ± this.
      init_logits_std: the logits start normal, with this standard deviation.
      dropout: rate on the adapter's input, while the caller trains.
      dtype: dtype of the leaves, the shared one included.
      targets, exclude, overrides, parts: see `WeightMethod`.

    Leaves at a site: ``vblora_logits_a [r, in/v, num_vectors]``, ``vblora_logits_b [out/v, r, num_vectors]``. A shared
    leaf: ``vblora_vector_bank [num_vectors, v]``.

    >>> import jpeft
    >>> method = jpeft.methods.VBLoRA(num_vectors=90, vector_length=64, targets=r".*/(query|value)")
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.15179"
    learning_rate: ClassVar[float] = 1e-2
    per_site: ClassVar[tuple[str, ...]] = ("rank", "dropout", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys(("rank", "num_vectors", "vector_length", "topk"), POSITIVE_INT),
        **dict.fromkeys(("init_vector_bank_bound", "init_logits_std"), NUMBER),
        "dropout": RATE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(f"VBLoRA.topk is {self.topk}, more than the {self.num_vectors} vectors of the bank")

    @property
    def identity_at_init(self) -> bool:
        """False: the bank and its mixtures start away from zero."""
        return False

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        if site.inputs % self.vector_length or site.outputs % self.vector_length:
            raise ValueError(
                f"VBLoRA.vector_length is {self.vector_length}, which does not divide both sides of {site.name!r}: "
                f"{site.inputs} inputs, {site.outputs} outputs; {self._length(site)} does, or leave it out with "
                f"exclude=[{site.name!r}]"
            )
        return site

    def _length(self, site: Site) -> int:
        """The largest length up to the one that was given that divides both sides."""
        common = math.gcd(site.inputs, site.outputs)
        return next(n for n in range(min(common, self.vector_length), 0, -1) if common % n == 0)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        (key_a, key_b), v, n = jax.random.split(key), self.vector_length, self.num_vectors
        shape_a, shape_b = (self.rank, site.inputs // v, n), (site.outputs // v, self.rank, n)
        return {
            "vblora_logits_a": normal(key_a, shape_a, self.init_logits_std, self.dtype),
            "vblora_logits_b": normal(key_b, shape_b, self.init_logits_std, self.dtype),
        }

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        shape, bound = (self.num_vectors, self.vector_length), float(self.init_vector_bank_bound)
        return {"vblora_vector_bank": jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(self.dtype)}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        def mixed(logits: jax.Array) -> jax.Array:
            top, place = jax.lax.top_k(logits, self.topk)
            return jnp.einsum("...k,...kv->...v", jax.nn.softmax(top), shared["vblora_vector_bank"][place])

        a, b = mixed(leaves["vblora_logits_a"]), mixed(leaves["vblora_logits_b"])  # [r, in/v, v], [out/v, r, v]
        return {"vblora_a": a.reshape(self.rank, -1).T, "vblora_b": b.swapaxes(0, 1).reshape(self.rank, -1)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        return low_rank(base, x, leaves["vblora_a"], leaves["vblora_b"], self.dropout)

    def merge(
        self, leaves: Leaves, w: Float[Array, "in out"], b: Float[Array, " out"] | None
    ) -> tuple[Float[Array, "in out"], Float[Array, " out"] | None]:
        return w + leaves["vblora_a"] @ leaves["vblora_b"], b


_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_NEVER, _RARELY = -1e4, -1e3  # logits of vectors outside of the mixture, and the least inside; both finite in float16


def _unpack(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Logits from the indices and all weights but the last of each mixture: what ``save_only_topk_weights`` writes."""
    out, n = dict(tensors), config.get("num_vectors", 256)
    for key in [key for key in out if key.endswith(_INDICES)]:
        name = key.removesuffix(_INDICES)
        place, weights = out.pop(key).astype(np.int64), out.pop(name + _WEIGHTS, None)
        if weights is None or (*weights.shape[:-1], weights.shape[-1] + 1) != place.shape:
            raise ValueError(f"{key!r} needs a {name + _WEIGHTS!r} of one fewer along its last axis, {place.shape}")
        if place.size and not 0 <= place.min() <= place.max() < n:
            raise ValueError(f"{key!r} has indices outside of the bank of num_vectors={n}")
        if not np.diff(np.sort(place)).all():
            raise ValueError(f"{key!r} has an index twice in one mixture")
        weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True, dtype=weights.dtype)], -1)
        logits = np.full((*place.shape[:-1], n), _NEVER, weights.dtype)
        chosen = np.maximum(np.log(np.maximum(weights.astype(np.float64), 1e-300)), _RARELY)
        np.put_along_axis(logits, place, chosen.astype(weights.dtype), -1)
        out[name] = logits
    return out


VBLoRA.hf = HFSpec(
    peft_type="VBLORA",
    tensors=(Tensor("vblora_logits_A", "vblora_logits_a"), Tensor("vblora_logits_B", "vblora_logits_b")),
    shared=(SharedTensor("base_model.vblora_vector_bank", "vblora_vector_bank"),),
    fields=(
        Field("r", "rank", 4, POSITIVE_INT),
        Field("num_vectors", "num_vectors", 256, POSITIVE_INT),
        Field("vector_length", "vector_length", 256, POSITIVE_INT),
        Field("topk", "topk", 2, POSITIVE_INT),
        Field("init_vector_bank_bound", "init_vector_bank_bound", 0.02, NUMBER),
        Field("init_logits_std", "init_logits_std", 0.1, NUMBER),
        dropout_field("vblora_dropout"),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"save_only_topk_weights"}),
    bias="vblora_only",
    unpack=_unpack,
)
