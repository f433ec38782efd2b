"""AdaLoRA: updates in the form of a singular value decomposition, whose ranks a budget decides (Zhang et al. 2023,
https://arxiv.org/abs/2303.10512).

y = x W + s ((x A) * e) B        A: [in, r], e: [r], B: [r, out], s = alpha / (r + 1e-5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from jpeft.checks import NUMBER, POSITIVE_INT, RATE, Rule, or_none
from jpeft.core.interchange import CONVOLUTION, FAN_IN_FAN_OUT, LINEAR, Field, HFSpec, Tensor, Tensors, window
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod, normal
from jpeft.methods.families.dropout import dropout_field
from jpeft.methods.families.low_rank import low_rank

_POSITIVE: Rule = (lambda value: NUMBER[0](value) and value > 0, "a positive number")
_WEIGHT: Rule = (lambda value: NUMBER[0](value) and value >= 0, "a number that is not negative")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(WeightMethod):
    """Low-rank updates of which training keeps the triples (column of A, entry of e, row of B) that matter most.

    By itself it trains all r triples. `jpeft.training.optimizers.adalora.allocate_ranks` wraps an optimizer, and sets
    the entries of e of the least important triples to zero. The penalty keeps A and B near orthogonal. It is that of
    HuggingFace PEFT: ``orth_reg_weight`` times the mean of ‖AᵀA - I‖ and ‖BBᵀ - I‖ over all matrices. PEFT itself adds
    it only where a ``task_type`` is given and the model computes the loss. The 1e-5 in the scale is PEFT's, too.

    Attributes:
      rank: r, the number of triples at first (PEFT's ``init_r``).
      alpha: numerator of the scale; by default the rank.
      orth_reg_weight: weight of the penalty.
      dropout: rate on the adapter's input, while the caller trains.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`.

    Leaves at a site: ``adalora_a [in, r]``, ``adalora_e [r]``, ``adalora_b [r, out]``.

    >>> import jpeft
    >>> method = jpeft.methods.AdaLoRA(rank=12, alpha=32, targets=r".*/(query|value)")
    """

    rank: int = 12
    alpha: float | None = None
    orth_reg_weight: float = 0.5
    dropout: float = 0.0
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.10512"
    learning_rate: ClassVar[float] = 1e-3
    penalty_reduction: ClassVar[str] = "mean"
    inert: ClassVar[frozenset[str]] = WeightMethod.inert | {"orth_reg_weight"}
    resizable: ClassVar[frozenset[str]] = frozenset({"rank"})
    rescaled: ClassVar[frozenset[str]] = frozenset({"alpha"})
    neutral: ClassVar[float | None] = 0.0
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "adalora_a": ("in", None),
        "adalora_e": (None,),
        "adalora_b": (None, "out"),
    }
    per_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "alpha": or_none(_POSITIVE), "dropout": RATE, "orth_reg_weight": _WEIGHT
    }  # fmt: skip

    @property
    def scale(self) -> float:
        """s, the factor on the update."""
        return (self.rank if self.alpha is None else self.alpha) / (self.rank + 1e-5)

    def factors(self, other: AdaLoRA) -> Mapping[str, float]:
        return {"adalora_e": other.scale / self.scale}

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_a, key_b = jax.random.split(key)
        return {
            "adalora_a": normal(key_a, (site.inputs, self.rank), 0.02, self.dtype),
            "adalora_e": jnp.zeros((self.rank,), self.dtype),
            "adalora_b": normal(key_b, (self.rank, site.outputs), 0.02, self.dtype),
        }

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        return {"adalora_a": self.scale * leaves["adalora_a"] * leaves["adalora_e"], "adalora_b": leaves["adalora_b"]}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        return low_rank(base, x, leaves["adalora_a"], leaves["adalora_b"], self.dropout)

    def merge(
        self, leaves: Leaves, w: Float[Array, "in out"], b: Float[Array, " out"] | None
    ) -> tuple[Float[Array, "in out"], Float[Array, " out"] | None]:
        return w + leaves["adalora_a"] @ leaves["adalora_b"], b

    def penalty(self, leaves: Leaves) -> Float[Array, ""]:
        """The weighted mean of ‖AᵀA - I‖ and ‖BBᵀ - I‖. Triples that a folder left out, all 0, do not count."""

        def distance(rows: Float[Array, "rank size"]) -> Float[Array, ""]:
            there = jnp.any(rows != 0, axis=1)
            return optax.safe_norm(rows @ rows.T - jnp.diag(there.astype(rows.dtype)), 0.0)

        return self.orth_reg_weight * (distance(leaves["adalora_a"].T) + distance(leaves["adalora_b"])) / 2


def _a_to_torch(a: np.ndarray, site: Site) -> np.ndarray:
    """``[r, in]``; a convolution's inputs are (channel, place in the window) in torch."""
    return np.moveaxis(a.reshape(*window(site), -1, a.shape[-1]), (-1, -2), (0, 1)).reshape(a.shape[::-1])


def _a_to_tree(a: np.ndarray, site: Site) -> np.ndarray:
    return np.moveaxis(a.reshape(a.shape[0], -1, *window(site)), (0, 1), (-1, -2)).reshape(a.shape[::-1])


_E = ".lora_E"  # after the name of a module
_IN_FILE = "base_model.model."


def _are_masks(masks: Any) -> bool:
    if masks is None:
        return True
    lists = masks.values() if isinstance(masks, Mapping) else [None]
    return all(isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask) for mask in lists)


_MASKS: Rule = (_are_masks, "an object with a list of true and false for each module")


def _axes(prefix: str) -> dict[str, int]:
    """A module's tensors, and their axes of triples."""
    return {f"{prefix}{_E}": 0, f"{prefix}.lora_A": 0, f"{prefix}.lora_B": 1}


def _unpack(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The tensors with zeros for the triples that ``rank_pattern`` leaves out."""
    out, rank = dict(tensors), config.get("init_r", 12)
    for name, mask in (config.get("rank_pattern") or {}).items():
        if len(mask) != rank:
            raise ValueError(f"rank_pattern has {len(mask)} entries for {name!r}, expected init_r={rank}")
        for key, axis in _axes(_IN_FILE + name.rpartition(_E)[0]).items():
            if key not in out:
                raise ValueError(f"{key!r} is missing, which rank_pattern names")
            if (found := out[key].shape[axis]) != sum(mask):
                raise ValueError(f"{key!r} has {found} triples, expected the {sum(mask)} that rank_pattern keeps")
            shape = list(out[key].shape)
            shape[axis] = rank
            whole = np.zeros(shape, out[key].dtype)
            whole[(slice(None),) * axis + (np.flatnonzero(mask),)] = out[key]
            out[key] = whole
    return out


def _pack(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, Mapping[str, Any]]:
    """The tensors without the triples whose singular value is zero; all of them if all are, as of a fresh adapter."""
    masks = {key.removesuffix(_E): x[:, 0] != 0 for key, x in tensors.items() if key.endswith(_E)}
    if all(mask.all() for mask in masks.values()) or not any(mask.any() for mask in masks.values()):
        return tensors, config
    out = dict(tensors)
    for prefix, mask in masks.items():
        for key, axis in _axes(prefix).items():
            out[key] = np.compress(mask, out[key], axis)
    pattern = {prefix.removeprefix(_IN_FILE) + _E: mask.tolist() for prefix, mask in masks.items()}
    return out, {**config, "rank_pattern": pattern}


_KINDS = (LINEAR, CONVOLUTION)
AdaLoRA.hf = HFSpec(
    peft_type="ADALORA",
    tensors=(
        Tensor("lora_A", "adalora_a", functions=(_a_to_tree, _a_to_torch), kinds=_KINDS),
        Tensor("lora_B", "adalora_b", "or->ro", kinds=_KINDS),
        Tensor("lora_E", "adalora_e", functions=(lambda e, site: e[:, 0], lambda e, site: e[:, None]), kinds=_KINDS),
    ),
    fields=(
        Field("init_r", "rank", 12, POSITIVE_INT),
        Field("lora_alpha", "alpha", 8, _POSITIVE, write=lambda method, site, config: method.alpha or method.rank),
        Field("orth_reg_weight", "orth_reg_weight", 0.5, _WEIGHT),
        dropout_field("lora_dropout"),
        FAN_IN_FAN_OUT,
        # PEFT makes no adapter without it, even to load one.
        Field("total_step", write=lambda method, site, config: 1),
        Field("rank_pattern", rule=_MASKS, write=lambda method, site, config: None),
    ),
    constants=dict.fromkeys((
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
        "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
        "use_dora", "use_qalora", "velora_config",
    )),
    ignored=frozenset({
        "beta1", "beta2", "deltaT", "tinit", "tfinal", "target_r", "r", "init_lora_weights", "megatron_core",
        "qalora_group_size", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
        # LoRA's, which PEFT's AdaLoRA does not look at.
        "alpha_pattern", "use_rslora",
    }),
    bias="lora_only",
    unpack=_unpack,
    pack=_pack,
)  # fmt: skip
