"""Prompt tuning: learned embeddings before each text (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

model([P; E(x)])                         P: [length, features], E: the model's own embedding of token ids x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jpeft.checks import BOOL, POSITIVE_INT, Rule, is_int
from jpeft.core.interchange import EMBEDDINGS, Field, HFSpec, Tensor
from jpeft.core.method import Inputs, Leaves
from jpeft.core.sites import Site
from jpeft.methods.families.prompt_method import HF_STARTS, NORMAL, START_RULES, PromptMethod, decoder_ids, start


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """Learned embeddings of virtual tokens before each text.

    The model's call gets longer token ids, attention masks (the virtual tokens are seen by all), position ids (the
    virtual tokens' come first, so that those of tokens grow) and token types; the outputs are cut to the tokens that
    were given. With a cache of keys and values, the virtual tokens come in where it begins: in a call of more than one
    token, see `jpeft.core.entering.continuing`. The cache must have room for them. They come first in rows that are
    padded on the left, too. Texts that are packed in a row share them, where the model has a segment that all see.
    In a model with an encoder and a decoder, they come before the encoder's text.

    Attributes:
      length: number of virtual tokens.
      init_weights: "normal" (of standard deviation ``init_std``) or "vocabulary" (embeddings of random tokens).
      init_ids: token ids whose embeddings the prompt starts from, in place of ``init_weights``; those of a text that
        describes the task. They are repeated, or cut, to ``length``.
      init_std: standard deviation of normal embeddings.
      decoder: whether as many others come before the decoder's text, in a model that has an encoder too.
      pad, keep, dtype, targets, exclude, overrides: see `PromptMethod`.

    Leaves at the table: ``prompt [length, features]``; with ``decoder``, ``[2 * length, features]``.

    It cannot be merged, and a fresh adapter changes the model's outputs.

    >>> import jpeft
    >>> method = jpeft.methods.PromptTuning(length=20, init_weights="vocabulary")
    """

    length: int = 20
    init_weights: str = NORMAL
    init_ids: Sequence[int] | None = None
    init_std: float = 1.0
    decoder: bool = False

    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    rules: ClassVar[Mapping[str, Rule]] = {"length": POSITIVE_INT, "decoder": BOOL, **START_RULES}
    hf: ClassVar[HFSpec] = HFSpec(
        "PROMPT_TUNING",
        (Tensor("prompt_embeddings", "prompt"),),
        (
            Field("num_virtual_tokens", "length", rule=POSITIVE_INT),
            Field(
                "num_transformer_submodules",
                "decoder",
                default=1,
                rule=(lambda v: is_int(v) and v in (1, 2), "1 or 2"),
                read=lambda value, site: value == 2,
                write=lambda m, site, config: 2 if m.decoder else 1,
            ),
        ),
        ignored=HF_STARTS,
        prompt=EMBEDDINGS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_ids is not None:
            object.__setattr__(self, "init_ids", tuple(self.init_ids))

    def rows(self) -> int:
        return 2 * self.length if self.decoder else self.length

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return {"prompt": start(self, self.rows(), key, site, w)}

    def more_tokens(self, inputs: Inputs) -> Mapping[str, Int[Array, " virtual"]]:
        if not self.decoder:
            return {}
        return {decoder_ids(inputs, self.name): self.length + jnp.arange(self.length)}
