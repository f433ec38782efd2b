"""LLaMA-Adapter: a gated prompt in the last layers (Zhang et al. 2023, https://arxiv.org/abs/2303.16199).

o + g softmax(Q P_k^T / sqrt(d)) P_v        P_k, P_v: the attention's own projections of a prompt P: [length, features]

o is the attention's output, and g starts at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jpeft.checks import NUMBER, POSITIVE_INT, Rule, or_none
from jpeft.core.interchange import ATTENTION, Field, HFSpec, Tensor, Tensors
from jpeft.core.method import Attend, Leaves, Project
from jpeft.core.sites import Site, Survey, no_projections
from jpeft.core.tree import natural
from jpeft.methods.base import LAYERS, AttentionMethod, normal


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(AttentionMethod):
    """A learned prompt in each of the last layers, to which all queries attend beside their own keys.

    The attention projects the prompt to keys and values by its own weights, without position encoding. What the queries
    find there is scaled by a gate and added to what they find without it. Other methods on these weights, in a Chain,
    do not change the prompt's keys and values.

    Attributes:
      length: number of virtual tokens.
      last_layers: the number of layers, from the last one; None for all.
      init_std: standard deviation of the prompt at first.
      dtype: dtype of the leaves.
      targets: paths of attention modules; by default all.
      exclude, overrides: see `Method`.

    Leaves at a site: ``adaption_prompt [length, features]``, ``adaption_gate [1]``.

    >>> import jpeft
    >>> method = jpeft.methods.LlamaAdapter(length=10, last_layers=30)
    """

    length: int = 10
    last_layers: int | None = None
    init_std: float = 1.0
    dtype: Any = "float32"

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.16199"
    per_site: ClassVar[tuple[str, ...]] = ("init_std", "dtype")
    learning_rate: ClassVar[float] = 5e-3
    rules: ClassVar[Mapping[str, Rule]] = {
        "length": POSITIVE_INT, "last_layers": or_none(POSITIVE_INT), "init_std": NUMBER
    }  # fmt: skip

    def candidates(self, survey: Survey) -> Sequence[Site]:
        features = {site.path: site.inputs for site in survey.outputs}
        return [dataclasses.replace(site, inputs=features.get(site.path, 0)) for site in survey.attentions]

    def prepare(self, site: Site) -> Site:
        if not site.inputs:
            raise ValueError(
                f"{self.name}: a prompt has the features of the attention's input, and those of {site.name!r} are not "
                f"known; leave it out with exclude=[{site.name!r}]"
            )
        if isinstance(site.projections, str):
            raise ValueError(no_projections(site))
        return site

    def sites(self, survey: Survey) -> list[Site]:
        found = super().sites(survey)
        if self.last_layers is None:
            return found
        if any(LAYERS in fields for fields in self.overrides.values()):
            raise ValueError(f"{self.name}: last_layers and layers in overrides both choose layers; set one of the two")
        stacks = [site for site in found if site.stack]
        count = stacks[0].stack[0][1] if stacks else len(found)
        if stacks and len(found) > 1:
            names = ", ".join(repr(site.name) for site in found)
            raise ValueError(
                f"{self.name}.last_layers is {self.last_layers}, and which are the last of {names} is not clear"
            )
        if self.last_layers > count:
            raise ValueError(f"{self.name}.last_layers is {self.last_layers}, and the model has {count} attentions")
        if not stacks:
            return sorted(found, key=lambda site: natural(site.path))[-self.last_layers :]
        chosen = tuple(range(count - self.last_layers, count))
        return [site if len(chosen) == count else dataclasses.replace(site, layers=chosen) for site in found]

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return {
            "adaption_prompt": normal(key, (self.length, site.inputs), self.init_std, self.dtype),
            "adaption_gate": jnp.zeros((1,), self.dtype),
        }

    def attend(
        self, leaves: Leaves, attend: Attend, query: Array, key: Array, value: Array, mask: Any, project: Project
    ) -> Array:
        out = attend(query, key, value, mask)
        own = attend.over(query, *project(leaves["adaption_prompt"]))
        return out + leaves["adaption_gate"].astype(out.dtype) * own.astype(out.dtype)


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

_LAYERS = "adapter_layers"


def _check_owner(site: Site) -> None:
    if site.owner == "FlaxGPT2Attention":
        raise ValueError(
            f"at {site.name!r}, HuggingFace PEFT adds what GPT-2 finds in the prompt after the output projection, and "
            "LlamaAdapter before it; save it with jpeft.save"
        )


def _prompt_to_tree(x: np.ndarray, site: Site) -> np.ndarray:
    _check_owner(site)
    return x[0]


def _prompt_to_torch(x: np.ndarray, site: Site) -> np.ndarray:
    _check_owner(site)
    return x[None]


def _write_layers(method: LlamaAdapter, site: Site, config: Mapping[str, Any]) -> int | None:
    by_hand = site.layers is not None and method.last_layers is None
    if method.targets is not None or method.exclude is not None or by_hand:
        raise ValueError(
            "HuggingFace PEFT has LLaMA-Adapter in the last attentions of a model; choose them by last_layers, and not "
            "by targets, exclude or layers in overrides"
        )
    return method.last_layers


def _pack(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, Mapping[str, Any]]:
    """PEFT names all attentions by the end that their names share, and counts those that have a prompt."""
    modules = config["target_modules"]
    ends = {module.rpartition(".")[2] for module in modules}
    if len(ends) > 1:
        raise ValueError(f"HuggingFace PEFT has LLaMA-Adapter in modules of one name, this one in {sorted(ends)}")
    return tensors, {**config, "target_modules": ends.pop(), _LAYERS: len(modules)}


LlamaAdapter.hf = HFSpec(
    peft_type="ADAPTION_PROMPT",
    tensors=(
        Tensor("adaption_prompt", "adaption_prompt", functions=(_prompt_to_tree, _prompt_to_torch), kinds=(ATTENTION,)),
        Tensor("adaption_gate", "adaption_gate", kinds=(ATTENTION,)),
    ),
    fields=(
        Field("adapter_len", "length", 10, POSITIVE_INT),
        Field(_LAYERS, "last_layers", None, or_none(POSITIVE_INT), write=_write_layers),
    ),
    own_targets=True,
    saves=False,
    pack=_pack,
)
