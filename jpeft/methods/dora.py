"""DoRA: the columns of a weight have learned norms, and LoRA changes their directions (Liu et al. 2024,
https://arxiv.org/abs/2402.09353).

y = x V m / |V| + b, V = W + s A B        m: [out], |V|: the norms of V's columns, constants for the gradient
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jpeft.core.interchange import CONVOLUTION, EMBEDDING, LINEAR, PARAMETER, SWAPPED, HFSpec, Tensor, window
from jpeft.core.method import Leaves, Linear, widened
from jpeft.core.sites import Site
from jpeft.methods.families.low_rank import low_rank
from jpeft.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA with a learned norm for every column of the weight. It costs about as much as LoRA.

    The norms of W + s A B are computed from W and the factors, without the sum. As in HuggingFace PEFT they are
    constants for the gradient, and a bias is not scaled. ``dropout`` acts on the input of A B alone; PEFT's, in
    training, also on that of a part of W.

    Attributes: those of `LoRA`.

    Leaves at a site: ``lora_a [in, r]``, ``lora_b [r, out]``, ``dora_m [out]``, at first the norms of W's columns.

    >>> import jpeft
    >>> jpeft.methods.DoRA(rank=8, alpha=16, targets=r".*/(query|value)").scale
    2.0
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.09353"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {**LoRA.roles, "dora_m": ("out",)}
    uncast: ClassVar[frozenset[str]] = frozenset({"dora_m"})  # in low precision m would lose what it learned

    neutral: ClassVar[float | None] = None  # the norms are those of the weight

    @property
    def identity_at_init(self) -> bool:
        """False for a dtype that may round the norms, and for "random"."""
        return super().identity_at_init and jnp.dtype(self.dtype).itemsize >= 4

    def init(self, key: Key[Array, ""], site: Site, w: Any, statistics: Leaves | None = None) -> Leaves:
        leaves = super().init(key, site, w, statistics)
        m = self._norm(LoRA.expand(self, site, {}, leaves), w.astype(widened(w.dtype)))
        return {**leaves, "dora_m": m.astype(self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        y = low_rank(base, x, self.scale * leaves["lora_a"], leaves["lora_b"], self.dropout)
        b = jnp.zeros((), y.dtype) if base.bias is None else base.bias
        norm = self._norm(leaves, base.weight)
        return _scaled(y, leaves["dora_m"].astype(norm.dtype), norm, b)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        changed, b = super().merge(leaves, w, b)
        return changed * (leaves["dora_m"] / self._norm(leaves, w)).astype(w.dtype), b

    def _norm(self, leaves: Leaves, w: Float[Array, "in out"]) -> Float[Array, " out"]:
        """The norms of the columns of W + s A B: |w|² + 2 b · Aᵀ w + b · (Aᵀ A) b, in at least float32."""
        wide = widened(w.dtype)
        a, b = (self.scale * leaves["lora_a"]).astype(w.dtype), leaves["lora_b"]
        w, a, b = jax.lax.stop_gradient((w, a, b))
        both = jnp.matmul(a.T, w, preferred_element_type=wide)
        product = jnp.matmul(a.T, a, preferred_element_type=wide)
        b = b.astype(wide)
        squares = jnp.square(w.astype(wide)).sum(0) + (b * (2 * both + product @ b)).sum(0)
        return jnp.sqrt(jnp.maximum(squares, jnp.finfo(wide).tiny))


@jax.custom_jvp
def _scaled(y: Array, m: Array, norm: Array, b: Array) -> Array:
    """``(y - b) m / norm + b``, in the dtype of ``y``."""
    out = (y.astype(m.dtype) - b.astype(m.dtype)) * (m / norm) + b.astype(m.dtype)
    return out.astype(y.dtype)


@_scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # The gradient of m needs y - b. Computed from the output, which the next layer mostly keeps anyway, it keeps
    # nothing of its own; checkpointed, so that it is the output that is kept.
    out = _scaled(*primals)
    return out, jax.checkpoint(_tangent, prevent_cse=False)(*tangents, out, *primals[1:])


def _tangent(dy: Array, dm: Array, dnorm: Array, db: Array, out: Array, m: Array, norm: Array, b: Array) -> Array:
    wide = m.dtype
    of_m = (out.astype(wide) - b.astype(wide)) * (dm / jnp.where(m == 0, jnp.inf, m))
    d = dy.astype(wide) * (m / norm) + of_m + db.astype(wide) * (1 - m / norm)
    return d.astype(out.dtype)


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

assert isinstance(LoRA.hf, HFSpec)


def _to_torch(m: np.ndarray, site: Site) -> np.ndarray:
    """``[out]``, for a convolution ``[1, out, 1...]``."""
    return m.reshape(1, -1, *(1 for _ in window(site))) if window(site) else m.reshape(-1)


_MAGNITUDE = Tensor(
    "lora_magnitude_vector",
    "dora_m",
    functions=(lambda m, site: m.reshape(-1), _to_torch),
    kinds=(LINEAR, CONVOLUTION, EMBEDDING),
)
DoRA.hf = dataclasses.replace(
    LoRA.hf,
    tensors=(*(t for t in LoRA.hf.tensors if not {PARAMETER, SWAPPED} & {*t.kinds}), _MAGNITUDE),
    when={"use_dora": True},
    constants={key: value for key, value in LoRA.hf.constants.items() if key != "use_dora"}
    | {"target_parameters": None},
    parameters="",
    tied={},  # a column of an embedding is a feature, a column of its head a token
)
