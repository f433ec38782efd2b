"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

y = x W + s (x A) B             A: [in, r], B: [r, out], s = alpha / r, or alpha / sqrt(r) for rsLoRA (2312.03732)
y = x W + s (x A B - x A₀ B₀)   from a start A₀ B₀ that is not zero, such as PiSSA's: the base stays as it is
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, RATE, Rule, one_of, or_none, shown
from jpeft.core.geometry.base import Parts
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
    window,
)
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families import starts
from jpeft.methods.families.dropout import dropout_field, write_dropout
from jpeft.methods.families.low_rank import low_rank

_INITS = ("kaiming", "gaussian", "orthogonal", "random", "pissa", "olora", "mica", "eva", "corda", "lora_ga")
_PISSA = re.compile(r"pissa(_niter_([1-9]\d?))?")
_INIT: Rule = (
    lambda v: isinstance(v, str) and (v in _INITS or bool(_PISSA.fullmatch(v))),
    f"one of {', '.join(_INITS)}, pissa_niter_<n>",
)
_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")  # starts that are not zero: the adapter carries them
_OBSERVED = {"eva": "covariance", "corda": "covariance", "lora_ga": "gradient"}
_OPTIONS: dict[str, dict[str, Rule]] = {
    "corda": {"corda_method": one_of(("ipm", "kpm"))},
    "lora_ga": {
        "direction": one_of(starts.DIRECTIONS),
        "scale": one_of(starts.SCALES),
        "stable_gamma": (lambda v: NUMBER[0](v) and v > 0, "a positive number"),
    },
}


@dataclass(frozen=True, kw_only=True)
class LoRA(WeightMethod):
    """Low-rank updates of weights.

    ``init_weights`` says where A and B start. At random, with B zero:

    - "kaiming": A uniform in ±1/sqrt(in), HuggingFace's default; "gaussian": A normal with std 1/r;
    - "orthogonal": A and B on orthogonal subspaces, so that A B = 0 (r must be even);
    - "random": A as for kaiming, B not zero: a fresh adapter changes the model.

    From the weight:

    - "pissa" (2404.02948): the largest singular vectors; "pissa_niter_4": the same by a fast randomized decomposition;
    - "olora" (2406.01775): the first columns of a QR decomposition;
    - "mica" (2604.01694): B is the smallest singular vectors and never trains, A is zero.

    From data, which `jpeft.observe` sees before ``init``:

    - "eva" (2410.07170): A is the main directions of the inputs, B is zero; see `jpeft.methods.eva` for ranks by site;
    - "corda" (2406.05223): as PiSSA, for the weight as these inputs use it;
    - "lora_ga" (2407.05000): singular vectors of the weight's gradient.

    PiSSA, OLoRA, CorDA and LoRA-GA start from A₀ B₀ that is not zero. PEFT subtracts it from the base; here the adapter
    carries it and the base is untouched. In a HuggingFace folder such an adapter is an ordinary LoRA of rank 2 r.
    ``dropout`` then acts on the difference. Embedding tables start from A = 0 and a normal B where the start is random.

    Attributes:
      rank: r, the number of columns of A and of rows of B.
      alpha: numerator of the scale; by default the rank, for a scale of 1.
      rslora: whether the scale is alpha / sqrt(r).
      dropout: rate on the adapter's input, while the caller trains.
      init_weights: the start, see above.
      init_options: HuggingFace's ``corda_config`` or ``lora_ga_config``: {"corda_method": "ipm" or "kpm"} for "corda",
        {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16} for "lora_ga"; `jpeft.methods.families.starts`.
      freeze_a: whether only B trains, as in LoRA-FA (2308.03303); `jpeft.training.optimizers.lora_fa` is its gradient.
      dtype: dtype of the leaves; they are cast to the activation's dtype once.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``lora_a [in, r]``, ``lora_b [r, out]``; for a start that is carried, ``lora_start_a`` and
    ``lora_start_b``, which never train.

    >>> import jpeft
    >>> jpeft.LoRA(rank=8, alpha=16, targets=r".*/(query|value)").scale
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    init_weights: str = "kaiming"
    init_options: Mapping[str, Any] = FrozenDict()
    freeze_a: bool = False
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "lora_a": ("in", None), "lora_b": (None, "out"), "lora_start_a": ("in", None), "lora_start_b": (None, "out")
    }  # fmt: skip
    per_site: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "rslora", "dropout", "init_weights", "init_options", "freeze_a", "dtype", "parts"
    )  # fmt: skip

    inert: ClassVar[frozenset[str]] = WeightMethod.inert | {"freeze_a"}
    resizable: ClassVar[frozenset[str]] = frozenset({"rank"})
    rescaled: ClassVar[frozenset[str]] = frozenset({"alpha", "rslora"})
    neutral: ClassVar[float | None] = 0.0
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT,
        "dropout": RATE,
        "alpha": or_none(NUMBER),
        "rslora": BOOL,
        "init_weights": _INIT,
        "init_options": (lambda v: isinstance(v, Mapping), "a mapping"),
        "freeze_a": BOOL,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "init_options", FrozenDict(self.init_options))
        known = _OPTIONS.get(self._start, {})
        for option, value in self.init_options.items():
            accepts, expected = known.get(option, (lambda _: False, f"one of {', '.join(known) or 'none'}"))
            if not accepts(value):
                what = f"init_options[{option!r}]" if option in known else f"init_options of {self.init_weights!r}"
                raise ValueError(
                    f"{self.name}.{what} must be {expected}, got {shown(value if option in known else option)}"
                )
        if self.alpha == 0:
            raise ValueError(f"{self.name}.alpha is 0: the update would always be 0; None gives a scale of 1")
        if self.init_weights == "orthogonal" and self.rank % 2:
            raise ValueError(f"{self.name}: orthogonal initialization needs an even rank, got {self.rank}")
        if self.init_weights == "mica" and self.freeze_a:
            raise ValueError(
                f"{self.name}: init_weights='mica' freezes B, and freeze_a=True freezes A: nothing would train"
            )

    @property
    def scale(self) -> float:
        """s, the factor on A B."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def factors(self, other: LoRA) -> Mapping[str, float]:
        # Of A B - A₀ B₀, both products.
        ratio = other.scale / self.scale
        return {"lora_b": ratio, "lora_start_b": ratio} if self._start in _SUBTRACTED else {"lora_b": ratio}

    @property
    def identity_at_init(self) -> bool:
        """False for "random", where B is not zero."""
        return self.init_weights != "random"

    @property
    def non_trainable(self) -> frozenset[str]:
        frozen = {"lora_b"} if self.init_weights == "mica" else {"lora_a"} if self.freeze_a else set()
        return frozenset(frozen | ({"lora_start_a", "lora_start_b"} if self._start in _SUBTRACTED else set()))

    @property
    def observes(self) -> str | None:
        return _OBSERVED.get(self._start)

    @property
    def _start(self) -> str:
        return "pissa" if self.init_weights.startswith("pissa") else self.init_weights

    def prepare(self, site: Site) -> Site:
        if site.lookup and (self.observes or self.freeze_a):
            field, plain = ("init_weights", "kaiming") if self.observes else ("freeze_a", False)
            raise ValueError(
                f"{self.name}: {field}={getattr(self, field)!r} has no meaning for the embedding {site.name!r}; "
                f"set overrides={{{site.name!r}: {{{field!r}: {plain!r}}}}}"
            )
        site = super().prepare(site)
        taken = self.rank * (2 if self._start == "lora_ga" else 1)
        there = site.inputs if self._start == "eva" else min(site.inputs, site.outputs)
        if self._start in (*_SUBTRACTED, *_OBSERVED, "mica") and taken > there:
            raise ValueError(
                f"{self.name}: init_weights={self.init_weights!r} with rank {self.rank} takes {taken} directions, but "
                f"{site.name!r} has {there} ({site.inputs}×{site.outputs}); give it a smaller rank in overrides"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any, statistics: Leaves | None = None) -> Leaves:
        a, b = (x.astype(self.dtype) for x in self._factors(key, site, w, statistics))
        start = {"lora_start_a": a, "lora_start_b": b} if self._start in _SUBTRACTED else {}
        return {"lora_a": a, "lora_b": b, **start}

    def _factors(self, key: Key[Array, ""], site: Site, w: Any, statistics: Leaves | None) -> starts.Factors:
        """A and B at the start, in float32."""
        start, rank, scale, options = self._start, self.rank, abs(self.scale), self.init_options
        if start in starts.RANDOM:
            return starts.random(start, key, site.inputs, site.outputs, rank, site.lookup)
        if start == "pissa" and (found := _PISSA.fullmatch(self.init_weights)) and found[2]:
            return starts.pissa_fast(key, w, rank, scale, int(found[2]))
        if start == "pissa":
            return starts.pissa(w, rank, scale)
        if start == "olora":
            return starts.olora(w, rank)
        if start == "mica":
            return starts.mica(w, rank)
        if statistics is None:
            raise ValueError(
                f"{self.name}: init_weights={start!r} at {site.name!r} needs statistics, see jpeft.observe"
            )
        seen = statistics[_OBSERVED[start]]
        if start == "eva":
            return starts.eva(w, seen, rank)
        if start == "corda":
            return starts.corda(w, seen, rank, scale, **options)
        return starts.lora_ga(key, w, seen, rank, scale, **options)

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        if "lora_start_a" not in leaves:
            return leaves
        # A B - A₀ B₀ as (A - A₀) B + A₀ (B - B₀): small differences, which a low precision would lose in the products.
        own = {n: x for n, x in leaves.items() if n not in ("lora_start_a", "lora_start_b")}
        a, b, a0, b0 = (leaves[n] for n in ("lora_a", "lora_b", "lora_start_a", "lora_start_b"))
        return {**own, "lora_a": jnp.concatenate([a - a0, a0], -1), "lora_b": jnp.concatenate([b, b - b0], -2)}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        # y = x W + s (x A) B
        return low_rank(base, x, self.scale * leaves["lora_a"], leaves["lora_b"], self.dropout)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        # W' = W + s A B
        return w + self.scale * (leaves["lora_a"] @ leaves["lora_b"]), b


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

# PEFT's initializations, and ours. They matter only to a new adapter, unless they moved a part of the base into it.
_HF_INITS = {True: "kaiming", False: "random", "gaussian": "gaussian", "orthogonal": "orthogonal", "mica": "mica"}
_HF_INITS_OF_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _read_init(init: bool | str | None, site: Site | None) -> str:
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, str) and name.startswith(_HF_INITS_OF_BASE):
        raise ValueError(
            f"init_lora_weights={shown(init)} took a part of the base weights into the adapter, so it does not fit the "
            "original base; save it in PEFT with path_initial_model_for_weight_conversion, as an ordinary LoRA"
        )
    if name in (None, "eva"):  # EVA needs data again, and leaves the base as it is
        return "kaiming"
    if name not in _HF_INITS:
        raise ValueError(f"init_lora_weights={shown(init)} is unknown: it may have changed the base")
    return _HF_INITS[name]


def _write_init(method: LoRA, site: Site, config: Mapping[str, Any]) -> bool | str:
    own = next((key for key, ours in _HF_INITS.items() if ours == method.init_weights), True)
    # PEFT has MiCA for linear layers and embeddings, and not beside DoRA.
    has_mica = not config.get("use_dora") and not window(site) and _parts(site) == 1
    return own if own != "mica" or has_mica else True


def _without_start(method: LoRA, site: Site, leaves: Leaves) -> tuple[LoRA, Leaves]:
    """The same change as an ordinary LoRA of twice the rank, as PEFT's ``subtract_mutated_init`` gives it."""
    if "lora_start_a" not in leaves:
        return method, leaves
    alpha = method.scale * (math.sqrt(2 * method.rank) if method.rslora else 2 * method.rank)
    plain = dataclasses.replace(
        method, rank=2 * method.rank, alpha=alpha, init_weights="kaiming", init_options={}, freeze_a=False
    )
    return plain, LoRA.expand(method, site, {}, leaves)


def _write_dropout(method: LoRA, site: Site, config: Mapping[str, Any]) -> float | None:
    if method.dropout and is_stack(site):
        raise ValueError(f"HuggingFace has no dropout before {site.name!r}, whose experts PEFT adapts as weights alone")
    return write_dropout(method, site, config)


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


def _a_to_torch(a: np.ndarray, site: Site) -> np.ndarray:
    """``[r, in]``, for a convolution ``[r, in, window...]``. The matrices of parts stand one below the other."""
    if _parts(site) > 1:
        a = np.concatenate(list(a), axis=-1)
    # Rows of a are (place in the window, channel).
    return np.moveaxis(a.reshape(*window(site), -1, a.shape[-1]), (-1, -2), (0, 1))


def _a_to_tree(a: np.ndarray, site: Site) -> np.ndarray:
    return np.moveaxis(a, (0, 1), (-1, -2)).reshape(-1, a.shape[0])


def _b_to_torch(b: np.ndarray, site: Site) -> np.ndarray:
    """``[out, r]``, for a convolution ``[out, r, 1...]``. The matrices of parts stand along a diagonal."""
    if _parts(site) > 1:
        count, rank, out = b.shape
        diagonal = np.zeros((count, rank, count, out), b.dtype)
        diagonal[range(count), :, range(count)] = b
        b = diagonal.reshape(count * rank, count * out)
    return b.T.reshape(*b.T.shape, *(1 for _ in window(site)))


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
        dataclasses.replace(dropout_field("lora_dropout"), write=_write_dropout),
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
    exported=_without_start,
    holds=frozenset({"trainable_token_indices"}),
)  # fmt: skip
