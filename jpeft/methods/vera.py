"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454).

y = x W + ((x A) * d B) * b        A: [in, r] and B: [r, out], random, frozen and shared; d: [r]; b: [out]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NONZERO, POSITIVE_INT, RATE, Rule
from jpeft.core.interchange import FAN_IN_FAN_OUT, Field, HFSpec, SharedTensor, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.low_rank import added
from jpeft.methods.families.torch_random import SEED, Generator


@dataclass(frozen=True, kw_only=True)
class VeRA(WeightMethod):
    """Trains two vectors at each weight, around random projections that all weights share.

    The projections are those of HuggingFace PEFT for the same seed and the same weights: as large as the widest needs,
    of which the others take the first rows and columns.

    Attributes:
      rank: r. It may be higher than a LoRA's, since each costs one parameter at a weight.
      d_initial: the start of all entries of d; not zero, as b starts at zero and nothing would have a gradient.
      seed: of the projections (PEFT's ``projection_prng_key``).
      save_projection: whether folders of PEFT hold the projections, rather than leave it to torch to draw them again.
        jpeft's own folders do without them.
      dropout: rate on the adapter's input, while the caller trains.
      dtype: dtype of the leaves, shared ones included.
      targets, exclude, overrides, parts: see `WeightMethod`.

    Leaves at a site: ``vera_lambda_d [r]``, ``vera_lambda_b [out]``. Shared leaves, which do not train: ``vera_a
    [widest in, r]``, ``vera_b [r, widest out]``.

    >>> import jpeft
    >>> method = jpeft.methods.VeRA(rank=256, targets=r".*/(query|value)")
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = True
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 4e-3
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"vera_lambda_d": (None,), "vera_lambda_b": ("out",)}
    non_trainable: ClassVar[frozenset[str]] = frozenset({"vera_a", "vera_b"})
    regenerated: ClassVar[frozenset[str]] = non_trainable
    per_site: ClassVar[tuple[str, ...]] = ("d_initial", "dropout", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "d_initial": NONZERO, "seed": SEED, "save_projection": BOOL, "dropout": RATE
    }  # fmt: skip

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        d = jnp.full((self.rank,), self.d_initial, self.dtype)
        return {"vera_lambda_d": d, "vera_lambda_b": jnp.zeros((site.outputs,), self.dtype)}

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        inputs, outputs = max(s.inputs for s in sites), max(s.outputs for s in sites)
        draw = Generator(self.seed).kaiming_uniform
        a, b = draw((self.rank, inputs)), draw((outputs, self.rank))
        return {"vera_a": jnp.asarray(a.T, self.dtype), "vera_b": jnp.asarray(b.T, self.dtype)}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        return {**leaves, "vera_a": shared["vera_a"][: site.inputs], "vera_b": shared["vera_b"][:, : site.outputs]}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        sides = leaves["vera_a"].shape[0], leaves["vera_b"].shape[1]
        return added(base, x, dict(leaves), _form, _change, sides, dropout=self.dropout, recompute=False)

    def merge(
        self, leaves: Leaves, w: Float[Array, "in out"], b: Float[Array, " out"] | None
    ) -> tuple[Float[Array, "in out"], Float[Array, " out"] | None]:
        return w + _change(leaves), b


def _form(x: Any, leaves: Leaves) -> Float[Array, "*tokens out"]:
    """((x A) * d) (B * b). The frozen A has no gradient, which A * d would have; B * b is not kept for the backward."""
    scaled = jax.checkpoint(lambda x, b, scale: x @ (b * scale))
    return scaled((x @ leaves["vera_a"]) * leaves["vera_lambda_d"], leaves["vera_b"], leaves["vera_lambda_b"])


def _change(leaves: Leaves) -> Float[Array, "in out"]:
    """(A * d) (B * b)."""
    return (leaves["vera_a"] * leaves["vera_lambda_d"]) @ (leaves["vera_b"] * leaves["vera_lambda_b"])


VeRA.hf = HFSpec(
    peft_type="VERA",
    tensors=(Tensor("vera_lambda_b", "vera_lambda_b"), Tensor("vera_lambda_d", "vera_lambda_d")),
    shared=(
        SharedTensor("base_model.vera_A", "vera_a", "ri->ir", field="save_projection"),
        SharedTensor("base_model.vera_B", "vera_b", "or->ro", field="save_projection"),
    ),
    fields=(
        Field("r", "rank", 256, POSITIVE_INT),
        Field("d_initial", "d_initial", 0.1, NONZERO),
        Field("projection_prng_key", "seed", 0, SEED),
        Field("save_projection", "save_projection", True, BOOL),
        dropout_field("vera_dropout"),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_weights"}),
    bias="vera_only",
)
