"""Poly: skills mixed by task (Ponti et al. 2022, https://arxiv.org/abs/2202.13914), with several heads in the mixture.

y = x W + (x A_t) B_t / r            A_t = Σ_k w_tk A_k: [in, r], B_t = Σ_k w_tk B_k: [r, out], of the task t of the row
w_t = σ_t / Σ_k σ_tk                 σ_t = sigmoid(z_t); while training a sample of a relaxed Bernoulli(z_t)

With several splits (multi-head routing, Caccia et al. 2022, https://arxiv.org/abs/2211.03831), blocks of the rows of A,
and of the columns of B, have weights of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from jpeft.checks import BOOL, POSITIVE_INT, Rule
from jpeft.core.interchange import Field, HFSpec, Tensor
from jpeft.core.method import Inputs, Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import low_rank
from jpeft.methods.families.tokens import by_row, check_sees_tokens

TASKS = "task_ids"
_EPSILON = 1e-12  # HuggingFace's


@dataclass(frozen=True, kw_only=True)
class Poly(WeightMethod):
    """LoRAs, the skills, of which each task learns a mixture at every weight.

    The model's call takes one more argument: ``task_ids``, integers ``[batch]``, or one for all rows. It is not needed
    for a single task. A task that does not exist is an error or, where the ids are traced, gives NaN. While the caller
    trains and gives a "dropout" rng, the mixtures are sampled, for each row by itself.

    Attributes:
      rank: r, the rank of each skill.
      n_tasks: number of tasks.
      n_skills: number of skills at each weight.
      n_splits: number of blocks that are mixed by themselves; it divides the inputs and outputs.
      init_weights: whether B starts at zero, so that the model is unchanged.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. Weights that see tokens: no embeddings, convolutions or
        experts.

    Leaves at a site: ``poly_a [splits, skills, in / splits, r]``, ``poly_b [splits, skills, r, out / splits]``,
    ``poly_router [tasks, splits * skills]``.

    It cannot be merged.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((3, 5, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.methods.Poly(rank=2, n_tasks=2, targets="layers_0").bind(model, params, x)
    >>> adapter = peft.init(jax.random.key(0), params)
    >>> peft.apply(params, adapter, x, task_ids=jnp.array([0, 1, 0])).shape
    (3, 5, 8)
    """

    rank: int = 8
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    init_weights: bool = True
    dtype: Any = "float32"

    family: ClassVar[str] = "routing"
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.13914"
    resizable: ClassVar[frozenset[str]] = frozenset({"rank"})
    neutral: ClassVar[float | None] = 0.0
    reads_context: ClassVar[bool] = True
    arguments: ClassVar[tuple[str, ...]] = (TASKS,)
    uncast: ClassVar[frozenset[str]] = frozenset({"poly_router"})
    per_site: ClassVar[tuple[str, ...]] = ("rank", "n_skills", "n_splits", "init_weights", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "n_tasks": POSITIVE_INT, "n_skills": POSITIVE_INT, "n_splits": POSITIVE_INT,
        "init_weights": BOOL,
    }  # fmt: skip

    @property
    def roles(self) -> Mapping[str, Sequence[str | None]]:  # type: ignore[override]
        """Blocks are contiguous parts of the inputs and outputs, whose shards lie across them."""
        if self.n_splits > 1:
            return {}
        return {"poly_a": (None, None, "in", None), "poly_b": (None, None, None, "out")}

    @property
    def identity_at_init(self) -> bool:
        """Whether B starts at zero."""
        return self.init_weights

    @property
    def draws(self) -> bool:
        """True: mixtures are sampled while the caller trains."""
        return True

    def mergeable(self, site: Site) -> bool:
        return False

    def prepare(self, site: Site) -> Site:
        check_sees_tokens(self.name, site)
        site = super().prepare(site)
        if site.inputs % self.n_splits or site.outputs % self.n_splits:
            raise ValueError(
                f"{self.name}: {site.name!r} is {site.inputs} x {site.outputs}; n_splits must divide both, and is "
                f"{self.n_splits}"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_a, key_b, key_r = jax.random.split(key, 3)
        s, k, r, rows, columns = self.n_splits, self.n_skills, self.rank, site.inputs, site.outputs
        shape_b, logits = (s, k, r, columns // s), (self.n_tasks, s * k)
        return {
            "poly_a": kaiming(key_a, (s, k, rows // s, r), rows // s, self.dtype),
            "poly_b": jnp.zeros(shape_b, self.dtype) if self.init_weights else kaiming(key_b, shape_b, r, self.dtype),
            "poly_router": jax.random.uniform(key_r, logits, jnp.float32, -1e-3, 1e-3).astype(self.dtype),
        }

    def factors(self, other: Poly) -> Mapping[str, float]:
        return {"poly_b": self.rank / other.rank}  # the mean over ranks

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if (given := inputs.context.get(TASKS)) is None:
            return inputs.arguments, {}
        ids = self._checked(given)
        arrays = [np.shape(x) for x in jax.tree.leaves(inputs.arguments)]
        if ids.ndim and not any(shape[:1] == ids.shape for shape in arrays):
            raise ValueError(
                f"{self.name}: {TASKS} are of {ids.size} rows, and no argument of the model's call has so many: they "
                f"are {', '.join(str(list(shape)) for shape in arrays if shape)}"
            )
        return inputs.arguments, {TASKS: ids}

    def _checked(self, given: Any) -> Int[Array, "*rows"]:
        """The task ids, some of which may be unknown where they are traced."""
        ids = jnp.asarray(given)
        if ids.ndim > 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"{self.name}: {TASKS} must be integers [batch], or one for all rows, got {ids.dtype.name}"
                f"{list(ids.shape)}"
            )
        if not isinstance(given, Tracer) and ids.size:
            low, high = int(np.min(np.asarray(given))), int(np.max(np.asarray(given)))
            if low < 0 or high >= self.n_tasks:
                raise ValueError(
                    f"{self.name}: {TASKS} must be in 0..{self.n_tasks - 1}, of n_tasks={self.n_tasks}, got "
                    f"{low if low < 0 else high}"
                )
        return ids

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        ids = base.context.get(TASKS)
        if ids is None and self.n_tasks > 1:
            raise ValueError(
                f"{self.name}: the call needs {TASKS}, which of the {self.n_tasks} tasks each row is of, as in "
                f"peft.apply(params, adapter, x, {TASKS}=jnp.array([...]))"
            )
        a, b = self._mixed(leaves, base, jnp.int32(0) if ids is None else ids, x.dtype)
        a /= self.rank
        if a.ndim == 2:
            return low_rank(base, x, a, b)
        rows = by_row(self.name, x, base.context, a.shape[0])
        y = base(x)
        return y + ((rows @ a) @ b).reshape(y.shape).astype(y.dtype)

    def _mixed(self, leaves: Leaves, base: Linear, ids: Int[Array, "*rows"], dtype: Any) -> tuple[Any, Any]:
        """A ``[*rows, in, r]`` and B ``[*rows, r, out]`` of each row's task."""
        logits = leaves["poly_router"].astype(jnp.float32).reshape(self.n_tasks, self.n_splits, -1)
        logits = jnp.where(((ids >= 0) & (ids < self.n_tasks))[..., None, None], logits[ids], jnp.nan)

        def relaxed(key: jax.Array) -> jax.Array:  # a sample of a relaxed Bernoulli of temperature 1
            return jax.nn.sigmoid(logits + jax.random.logistic(key, logits.shape, logits.dtype))

        chosen = base.sampled(relaxed, jax.nn.sigmoid(logits))
        weights = (chosen / (chosen.sum(-1, keepdims=True) + _EPSILON)).astype(dtype)
        a = jnp.einsum("...qk,qkir->...qir", weights, leaves["poly_a"])
        b = jnp.einsum("...qk,qkro->...rqo", weights, leaves["poly_b"])
        return a.reshape(*ids.shape, -1, self.rank), b.reshape(*ids.shape, self.rank, -1)


Poly.hf = HFSpec(
    peft_type="POLY",
    tensors=(
        Tensor("poly_lora_A", "poly_a"),
        Tensor("poly_lora_B", "poly_b"),
        Tensor("poly_router.module_logits", "poly_router"),
    ),
    fields=(
        Field("r", "rank", 8, POSITIVE_INT),
        Field("n_tasks", "n_tasks", 1, POSITIVE_INT),
        Field("n_skills", "n_skills", 4, POSITIVE_INT),
        Field("n_splits", "n_splits", 1, POSITIVE_INT),
        Field("init_weights", "init_weights", True, BOOL, differ=all),
    ),
    constants={"poly_type": "poly"},
)
