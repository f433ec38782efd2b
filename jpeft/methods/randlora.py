"""RandLoRA: an update of full rank from scaled random bases (Albert et al. 2025, https://arxiv.org/abs/2502.00987).

y = x W + s x Σ_j Λ_j A Γ_j B_j        A: [m, r] and B_j: [r, M], random, frozen and shared; s = alpha / r;
                                       Λ_j, Γ_j: diagonal, trained; m, M: the smaller and the larger of "in" and "out"
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

from jpeft.checks import BOOL, NONZERO, POSITIVE_INT, RATE, Rule, or_none
from jpeft.core.interchange import FAN_IN_FAN_OUT, Field, HFSpec, SharedTensor, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.low_rank import added
from jpeft.methods.families.torch_random import SEED, Generator


@dataclass(frozen=True, kw_only=True)
class RandLoRA(WeightMethod):
    """Trains the diagonals that scale n = ceil(m/r) random products of rank r: the sum has full rank.

    Bases and update are those of HuggingFace PEFT, which pairs rows and columns in another order than the paper: with
    ``k`` counting ranks and ``j`` products, entry ``k n + j`` of its scaled A meets entry ``j r + k`` of its B. The
    update has full rank all the same.

    Attributes:
      rank: r, of each product. A lower one gives more products, so more parameters.
      alpha: numerator of the scale; by default 20 r.
      seed: of the bases (PEFT's ``projection_prng_key``).
      save_projection: whether folders of PEFT hold the bases (once and, as PEFT writes them, again for every weight),
        rather than leave it to torch to draw them again. jpeft's own folders do without them.
      sparse: whether entries of the bases are -1, 0 and 1 with probabilities 1/6, 2/3 and 1/6, before they are scaled.
      very_sparse: the same with 1/(2√m) for -1 and 1, whatever ``sparse`` is.
      dropout: rate on the adapter's input, while the caller trains.
      dtype: dtype of the leaves that train. Dense bases are bfloat16, as PEFT's are; sparse ones float32.
      targets, exclude, overrides, parts: see `WeightMethod`.

    Leaves at a site: ``randlora_lambda [r, n]``, ``randlora_gamma [n, m]``. Shared leaves, which do not train:
    ``randlora_a [r, 1, m]``, ``randlora_b [M, n, r]``, as large as the widest weight needs.

    >>> import jpeft
    >>> jpeft.methods.RandLoRA(rank=32, targets=r".*/(query|value)").scale
    20.0
    """

    rank: int = 32
    alpha: float | None = None
    seed: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00987"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 1e-4
    non_trainable: ClassVar[frozenset[str]] = frozenset({"randlora_a", "randlora_b"})
    regenerated: ClassVar[frozenset[str]] = non_trainable
    per_site: ClassVar[tuple[str, ...]] = ("dropout", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "alpha": or_none(NONZERO), "seed": SEED, "dropout": RATE,
        "save_projection": BOOL, "sparse": BOOL, "very_sparse": BOOL,
    }  # fmt: skip

    @property
    def scale(self) -> float:
        """s, the factor on the update."""
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def _products(self, smaller: int) -> int:
        return math.ceil(smaller / self.rank)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        smaller = min(site.inputs, site.outputs)
        n = self._products(smaller)
        gamma = jnp.full((n, smaller), 1 / smaller, self.dtype)
        return {"randlora_lambda": jnp.zeros((self.rank, n), self.dtype), "randlora_gamma": gamma}

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        smaller, larger = sorted((max(s.inputs for s in sites), max(s.outputs for s in sites)))
        shape_a, shape_b = (self.rank, 1, smaller), (larger, self._products(smaller), self.rank)
        generator = Generator(self.seed)
        if self.sparse or self.very_sparse:
            chance = 1 / (2 * (math.sqrt(smaller) if self.very_sparse else 3))
            bases = [_ternary(generator.uniform(shape, 0, 1), chance) for shape in (shape_a, shape_b)]
        else:
            a = _uniform(generator, shape_a)
            bases = [a, np.concatenate([_uniform(generator, (larger, 1, self.rank)) for _ in range(shape_b[1])], 1)]
        scales = [base.astype(np.float64).std(ddof=1).astype(base.dtype) for base in bases]
        if not all(scales):
            raise ValueError(
                f"RandLoRA: with seed {self.seed}, a sparse base for weights of up to {smaller} x {larger} is all 0; "
                "choose another seed or denser bases"
            )
        a, b = (jnp.asarray(base / scale) for base, scale in zip(bases, scales, strict=True))
        return {"randlora_a": a, "randlora_b": b}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        smaller, larger = sorted((site.inputs, site.outputs))
        b = shared["randlora_b"][:larger, : self._products(smaller)]
        return {**leaves, "randlora_a": shared["randlora_a"][:, :, :smaller], "randlora_b": b}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        inputs, outputs = sides = jax.eval_shape(lambda: base.weight).shape

        def factors(leaves: Leaves) -> tuple[jax.Array, jax.Array]:
            return self._factors(leaves, inputs <= outputs)

        def form(x: Any, leaves: Leaves) -> jax.Array:
            a, b = factors(leaves)
            return (x @ a) @ b

        return added(
            base, x, dict(leaves), form, lambda leaves: jnp.matmul(*factors(leaves)), sides, dropout=self.dropout
        )

    def merge(
        self, leaves: Leaves, w: Float[Array, "in out"], b: Float[Array, " out"] | None
    ) -> tuple[Float[Array, "in out"], Float[Array, " out"] | None]:
        return w + jnp.matmul(*self._factors(leaves, w.shape[0] <= w.shape[1])), b

    def _factors(self, leaves: Leaves, wide: bool) -> tuple[jax.Array, jax.Array]:
        """The factors of s Σ_j Λ_j A Γ_j B_j, ``[in, n r]`` and ``[n r, out]``. ``wide``: the outputs are not fewer."""
        a, b = leaves["randlora_a"], leaves["randlora_b"]
        a = self.scale * leaves["randlora_lambda"][:, :, None] * a * leaves["randlora_gamma"]
        a, b = a.reshape(-1, a.shape[2]), b.reshape(b.shape[0], -1)
        return (a.T, b.T) if wide else (b, a)


def _uniform(generator: Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.kaiming_uniform(shape, math.sqrt(1 / 3), "bfloat16")


def _ternary(x: np.ndarray, chance: float) -> np.ndarray:
    return (x > np.float32(1 - chance)).astype(np.float32) - (x < np.float32(chance)).astype(np.float32)


RandLoRA.hf = HFSpec(
    peft_type="RANDLORA",
    tensors=(Tensor("randlora_lambda", "randlora_lambda"), Tensor("randlora_gamma", "randlora_gamma")),
    shared=(
        SharedTensor("base_model.randlora_A", "randlora_a", copied=True, field="save_projection"),
        SharedTensor("base_model.randlora_B", "randlora_b", copied=True, field="save_projection"),
    ),
    fields=(
        Field("r", "rank", 32, POSITIVE_INT),
        Field("randlora_alpha", "alpha", 640, NONZERO, write=lambda method, site, config: method.scale * method.rank),
        Field("projection_prng_key", "seed", 0, SEED),
        Field("save_projection", "save_projection", True, BOOL),
        Field("sparse", "sparse", False, BOOL),
        Field("very_sparse", "very_sparse", False, BOOL),
        dropout_field("randlora_dropout"),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_weights"}),
    bias="randlora_only",
)
