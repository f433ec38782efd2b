"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

y = x W + s (x A) B        A: [in, r], B: [r, out], s = alpha / r, or alpha / sqrt(r) for rsLoRA (2312.03732)
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

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, RATE, one_of, or_none, shown
from jpeft.core.geometry.base import Parts
from jpeft.core.geometry.convolution import Convolution
from jpeft.core.interchange import (
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    PARAMETER,
    SWAPPED,
    Convert,
    Field,
    HFSpec,
    Tensor,
    is_stack,
)
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import BOX, FUSED, MERGE, Site
from jpeft.methods.base import WeightMethod, check_fields, dtype_name, normal
from jpeft.methods.families.low_rank import low_rank

_INITS = ("kaiming", "gaussian", "orthogonal", "random")


@dataclass(frozen=True, kw_only=True)
class LoRA(WeightMethod):
    """Low-rank updates of weights.

    Attributes:
      rank: r, the number of columns of A and of rows of B.
      alpha: numerator of the scale; by default the rank, for a scale of 1.
      rslora: whether the scale is alpha / sqrt(r).
      dropout: rate on the adapter's input, while the caller trains.
      init_weights: "kaiming" (A uniform in ±1/sqrt(in), B zero: HuggingFace's default), "gaussian" (A normal, std 1/r),
        "orthogonal" (A and B on orthogonal subspaces, so that A B = 0; r must be even), or "random" (A as for kaiming,
        B not zero: a fresh adapter changes the model). Embedding tables start from A = 0 and a normal B.
      dtype: dtype of the leaves; they are cast to the activation's dtype once.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``lora_a [in, r]``, ``lora_b [r, out]``.

    >>> import jpeft
    >>> jpeft.LoRA(rank=8, alpha=16, targets=r".*/(query|value)").scale
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    init_weights: str = "kaiming"
    dtype: Any = "float32"

    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"lora_a": ("in", None), "lora_b": (None, "out")}
    per_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rslora", "dropout", "init_weights", "dtype", "parts")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        rules = {
            "rank": POSITIVE_INT,
            "parts": POSITIVE_INT,
            "dropout": RATE,
            "alpha": or_none(NUMBER),
            "rslora": BOOL,
            "init_weights": one_of(_INITS),
        }
        check_fields(self, rules)
        if self.alpha == 0:
            raise ValueError("LoRA.alpha is 0: the update would always be 0; None gives a scale of 1")
        if self.init_weights == "orthogonal" and self.rank % 2:
            raise ValueError(f"LoRA: orthogonal initialization needs an even rank, got {self.rank}")
        super().__post_init__()

    @property
    def scale(self) -> float:
        """s, the factor on A B."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def identity_at_init(self) -> bool:
        """False for "random", where B is not zero."""
        return self.init_weights != "random"

    def prepare(self, site: Site) -> Site:
        if self.dropout and site.via in (BOX, MERGE):
            raise ValueError(
                f"LoRA: dropout acts on a module's input, but {site.name!r} is reached only as a weight (path taken: "
                f"{site.via}); set overrides={{{site.name!r}: {{'dropout': 0.0}}}}"
            )
        return super().prepare(site)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_a, key_b = jax.random.split(key)
        shape_a, shape_b = (site.inputs, self.rank), (self.rank, site.outputs)
        zeros_b = jnp.zeros(shape_b, self.dtype)
        # torch's kaiming_uniform with a = sqrt(5) is uniform in ±1/sqrt(fan_in).
        bound = 1 / math.sqrt(site.inputs)
        kaiming = jax.random.uniform(key_a, shape_a, jnp.float32, -bound, bound).astype(self.dtype)
        if site.lookup and self.init_weights != "random":
            return {"lora_a": jnp.zeros(shape_a, self.dtype), "lora_b": normal(key_b, shape_b, 1.0, self.dtype)}
        if self.init_weights == "orthogonal":
            return self._orthogonal(key_a, key_b, site)
        if self.init_weights == "gaussian":
            return {"lora_a": normal(key_a, shape_a, 1 / self.rank, self.dtype), "lora_b": zeros_b}
        if self.init_weights == "random":
            bound = 1 / math.sqrt(self.rank)
            b = jax.random.uniform(key_b, shape_b, jnp.float32, -bound, bound).astype(self.dtype)
            return {"lora_a": kaiming, "lora_b": b}
        return {"lora_a": kaiming, "lora_b": zeros_b}

    def _orthogonal(self, key_a: Key[Array, ""], key_b: Key[Array, ""], site: Site) -> Leaves:
        # A is in the span of every other row of an orthogonal Q, B in that of the rest, so A B = 0.
        key_q, key_a = jax.random.split(key_a)
        q, _ = jnp.linalg.qr(jax.random.normal(key_q, (self.rank, self.rank), jnp.float32))
        half = self.rank // 2
        a = jax.random.normal(key_a, (site.inputs, half), jnp.float32) @ q[0::2] / 10
        b = q[1::2].T @ jax.random.normal(key_b, (half, site.outputs), jnp.float32) / 10
        return {"lora_a": a.astype(self.dtype), "lora_b": b.astype(self.dtype)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        # y = x W + s (x A) B
        return low_rank(base, x, self.scale * leaves["lora_a"], leaves["lora_b"], self.dropout)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        # W' = W + s A B
        return w + self.scale * (leaves["lora_a"] @ leaves["lora_b"]), b


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

# PEFT's initializations, and ours. They matter only to a new adapter, unless they moved a part of the base into it.
_HF_INITS = {True: "kaiming", False: "random", "gaussian": "gaussian", "orthogonal": "orthogonal"}
_HF_INITS_OF_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _read_init(init: bool | str | None, site: Site | None) -> str:
    if isinstance(init, str) and init.lower().startswith(_HF_INITS_OF_BASE):
        raise ValueError(
            f"init_lora_weights={shown(init)} took a part of the base weights into the adapter, so it does not fit the "
            "original base; save it in PEFT with path_initial_model_for_weight_conversion, as an ordinary LoRA"
        )
    if init in (None, "eva", "mica"):  # these leave the base as it is
        return "kaiming"
    if init not in _HF_INITS:
        raise ValueError(f"init_lora_weights={shown(init)} is unknown: it may have changed the base")
    return _HF_INITS[init]


def _write_init(method: LoRA, site: Site, config: Mapping[str, Any]) -> bool | str:
    return next(key for key, ours in _HF_INITS.items() if ours == method.init_weights)


def _read_dropout(rate: float, site: Site | None) -> float:
    return rate if site is None or _drops(site) else 0.0


def _write_dropout(method: LoRA, site: Site, config: Mapping[str, Any]) -> float | None:
    if method.dropout and is_stack(site):
        raise ValueError(f"HuggingFace has no dropout before {site.name!r}, whose experts PEFT adapts as weights alone")
    return method.dropout if _drops(site) else None


def _drops(site: Site) -> bool:
    """Whether a site's input can be dropped: PEFT drops nothing before an embedding, and a box has no input."""
    return site.via == FUSED and not site.lookup


def _parts(site: Site) -> int:
    """The blocks of a fused weight, of which PEFT has one LoRA; experts have one each."""
    return site.geometry.parts if isinstance(site.geometry, Parts) and not is_stack(site) else 1


def _write_rank(method: LoRA, site: Site, config: Mapping[str, Any]) -> int:
    return method.rank * _parts(site)


def _write_alpha(method: LoRA, site: Site, config: Mapping[str, Any]) -> float:
    """The lora_alpha under which a module has the method's scale."""
    rank, rslora = _write_rank(method, site, config), config["use_rslora"]
    if (method.rank, method.rslora) == (rank, rslora):
        alpha = rank if method.alpha is None else method.alpha
    else:
        alpha = method.scale * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def _window(site: Site) -> tuple[int, ...]:
    return site.geometry.shape[:-2] if isinstance(site.geometry, Convolution) else ()


def _a_to_torch(a: np.ndarray, site: Site) -> np.ndarray:
    """``[r, in]``, for a convolution ``[r, in, window...]``. The matrices of parts stand one below the other."""
    if _parts(site) > 1:
        a = np.concatenate(list(a), axis=-1)
    # Rows of a are (place in the window, channel).
    return np.moveaxis(a.reshape(*_window(site), -1, a.shape[-1]), (-1, -2), (0, 1))


def _a_to_tree(a: np.ndarray, site: Site) -> np.ndarray:
    return np.moveaxis(a, (0, 1), (-1, -2)).reshape(-1, a.shape[0])


def _b_to_torch(b: np.ndarray, site: Site) -> np.ndarray:
    """``[out, r]``, for a convolution ``[out, r, 1...]``. The matrices of parts stand along a diagonal."""
    if _parts(site) > 1:
        count, rank, out = b.shape
        diagonal = np.zeros((count, rank, count, out), b.dtype)
        diagonal[range(count), :, range(count)] = b
        b = diagonal.reshape(count * rank, count * out)
    return b.T.reshape(*b.T.shape, *(1 for _ in _window(site)))


def _b_to_tree(b: np.ndarray, site: Site) -> np.ndarray:
    return b.reshape(b.shape[:2]).T


def _rows_to_torch(a: np.ndarray, site: Site) -> np.ndarray:
    """``[experts, in, r]`` as ``[experts * r, in]``."""
    return a.swapaxes(-1, -2).reshape(-1, a.shape[-2])


def _rows_to_tree(a: np.ndarray, site: Site) -> np.ndarray:
    return a.reshape(*site.batch, -1, a.shape[-1]).swapaxes(-1, -2)


def _columns_to_torch(b: np.ndarray, site: Site) -> np.ndarray:
    """``[experts, r, out]`` as ``[out, r * experts]``: the experts of each rank stand side by side."""
    return np.moveaxis(b, -1, 0).swapaxes(1, -1).reshape(b.shape[-1], -1)


def _columns_to_tree(b: np.ndarray, site: Site) -> np.ndarray:
    return np.moveaxis(b.reshape(b.shape[0], -1, *site.batch).swapaxes(1, -1), 0, -1)


def _transposed(functions: tuple[Convert, Convert]) -> tuple[Convert, Convert]:
    """For the tensor of the transposed matrix: W^T + B^T A^T."""
    to_tree, to_torch = functions
    return lambda x, site: to_tree(x, site).swapaxes(-1, -2), lambda x, site: to_torch(x.swapaxes(-1, -2), site)


_ROWS, _COLUMNS = (_rows_to_tree, _rows_to_torch), (_columns_to_tree, _columns_to_torch)

LoRA.hf = HFSpec(
    peft_type="LORA",
    tensors=(
        Tensor("lora_A.weight", "lora_a", functions=(_a_to_tree, _a_to_torch), kinds=(LINEAR, CONVOLUTION)),
        Tensor("lora_B.weight", "lora_b", functions=(_b_to_tree, _b_to_torch), kinds=(LINEAR, CONVOLUTION)),
        Tensor("lora_A.weight", "lora_a", functions=_ROWS, kinds=(PARAMETER,)),
        Tensor("lora_B.weight", "lora_b", functions=_COLUMNS, kinds=(PARAMETER,)),
        Tensor("lora_A.weight", "lora_b", functions=_transposed(_ROWS), kinds=(SWAPPED,)),
        Tensor("lora_B.weight", "lora_a", functions=_transposed(_COLUMNS), kinds=(SWAPPED,)),
        Tensor("lora_embedding_A", "lora_a", "ri->ir", kinds=(EMBEDDING,)),
        Tensor("lora_embedding_B", "lora_b", "or->ro", kinds=(EMBEDDING,)),
    ),
    fields=(
        Field("r", "rank", 8, POSITIVE_INT, pattern="rank_pattern", write=_write_rank),
        Field("use_rslora", "rslora", False, BOOL, differ=all),
        Field("lora_alpha", "alpha", 8, NUMBER, pattern="alpha_pattern", write=_write_alpha),
        Field("lora_dropout", "dropout", 0.0, RATE, read=_read_dropout, write=_write_dropout),
        Field(
            "init_lora_weights",
            "init_weights",
            True,
            (lambda v: v is None or isinstance(v, bool | str), "true, false or a name"),
            read=_read_init,
            write=_write_init,
            differ=lambda values: True,
        ),
        # PEFT itself sets it from the module's type.
        Field("fan_in_fan_out", write=lambda method, site, config: site.owner == "FlaxConv1D", differ=any),
    ),
    constants=dict.fromkeys((
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
        "monteclora_config", "use_bdlora", "use_dora", "use_qalora", "velora_config",
    )),
    ignored=frozenset({
        "corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    }),
    bias="lora_only",
    # The head multiplies by the transpose of the table: W + A^T B^T against W^T + B A.
    tied={"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"},
    joins_parts=True,
    parameters="target_parameters",
    holds=frozenset({"trainable_token_indices"}),
)  # fmt: skip
