"""Prompt tuning: learned embeddings before each text (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

model([P; E(x)])                         P: [length, features], E: the model's own embedding of token ids x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, Rule, is_ids, one_of, or_none
from jpeft.core.geometry import Lookup
from jpeft.core.method import Inputs, Leaves, Linear
from jpeft.core.sites import FUSED, Site, Survey
from jpeft.core.targets import Targets
from jpeft.methods.base import WeightMethod, normal
from jpeft.methods.families.prompts import cut, find_ids, with_tokens

# What models call the table of token embeddings; others, such as one of positions, are looked up too.
TABLES = (
    "word_embeddings", "embed_tokens", "wte", "shared", "token_embedder", "token_embed", "tok_embeddings", "embedder",
    "input_embedding", "word_embedding", "token_embedding", "embed",
)  # fmt: skip
_NORMAL, _VOCABULARY = "normal", "vocabulary"
_NEXT = "next_virtual_id"  # in the context: the id of the first virtual token of another method


@dataclass(frozen=True, kw_only=True)
class PromptTuning(WeightMethod):
    """Learned embeddings of virtual tokens before each text.

    The model's call gets longer token ids, attention masks (the virtual tokens are seen by all), position ids (the
    virtual tokens' come first, so that those of tokens grow) and token types; the outputs are cut to the tokens that
    were given. With a cache of keys and values, the virtual tokens come in where it begins: in a call of more than one
    token, see `jpeft.core.entering.continuing`. The cache must have room for them. They come first in rows that are
    padded on the left, too. Texts that are packed in a row share them, where the model has a segment that all see.

    Attributes:
      length: number of virtual tokens.
      init_weights: "normal" (of standard deviation ``init_std``) or "vocabulary" (embeddings of random tokens).
      init_ids: token ids whose embeddings the prompt starts from, in place of ``init_weights``; those of a text that
        describes the task. They are repeated, or cut, to ``length``.
      init_std: standard deviation of normal embeddings.
      pad: for arguments of the model's call that are shaped like the token ids and that are not known: what they hold
        for virtual tokens, by name, as in ``{"language_ids": 0}``.
      keep: whether outputs keep the places of the virtual tokens.
      dtype: dtype of the leaves.
      targets: path of the table of token embeddings; by default it is known by its name, or the only one.
      exclude, overrides: see `Method`.

    Leaves at the table: ``prompt [length, features]``.

    It cannot be merged, and a fresh adapter changes the model's outputs.

    >>> import jpeft
    >>> method = jpeft.methods.PromptTuning(length=20, init_weights="vocabulary")
    """

    length: int = 20
    init_weights: str = _NORMAL
    init_ids: Sequence[int] | None = None
    init_std: float = 1.0
    pad: Mapping[str, Any] = FrozenDict()
    keep: bool = False
    dtype: Any = "float32"

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    reads_context: ClassVar[bool] = True
    per_site: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 3e-2
    rules: ClassVar[Mapping[str, Rule]] = {
        "length": POSITIVE_INT,
        "init_weights": one_of((_NORMAL, _VOCABULARY)),
        "init_ids": or_none((is_ids, "token ids, one or more")),
        "init_std": NUMBER,
        "pad": (lambda value: isinstance(value, Mapping), "a mapping from names of arguments to numbers"),
        "keep": BOOL,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pad", FrozenDict(self.pad))
        if self.init_ids is not None:
            object.__setattr__(self, "init_ids", tuple(self.init_ids))

    @property
    def identity_at_init(self) -> bool:
        """False: no prompt leaves the outputs unchanged."""
        return False

    def virtual_tokens(self) -> int:
        return self.length

    def mergeable(self, site: Site) -> bool:
        return False

    # --- the table of token embeddings ---

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return [site for site in survey.weights if site.lookup]

    def default_targets(self) -> Targets:
        return lambda path, site: True

    def sites(self, survey: Survey) -> list[Site]:
        found = self._tables(survey) if self.targets is None else super().sites(survey)
        if len(found) != 1:
            names = ", ".join(repr(site.name) for site in found or self.candidates(survey))
            why = "looks up no table of embeddings" if not names else f"looks up several tables of embeddings: {names}"
            raise ValueError(
                f"{self.name} acts where token ids are embedded, and this call {why}"
                + ("; say which by targets=[...]" if names else ": give the model token ids")
            )
        return found

    def _tables(self, survey: Survey) -> list[Site]:
        tables = self.candidates(survey)
        for name in TABLES:
            if found := [site for site in tables if name in (site.path[-1:] or ("",))[0].lower()]:
                return [self.prepare(site) for site in found]
        return [self.prepare(site) for site in tables]

    def prepare(self, site: Site) -> Site:
        if site.via != FUSED:
            raise ValueError(
                f"{self.name}: the lookups in {site.name!r} are not seen (path taken: {site.via}), and no embedding "
                "can take their place"
            )
        return super().prepare(site)

    # --- the prompt ---

    @property
    def _first(self) -> str:
        """In the context, the id of the method's first virtual token."""
        return f"{self.slug}_first_id"

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return {"prompt": self.start(key, site, w)}

    def start(self, key: Key[Array, ""], site: Site, w: Any) -> Float[Array, "length features"]:
        """The embeddings of virtual tokens at first."""
        if self.init_ids is not None:
            if (largest := max(self.init_ids)) >= site.inputs:
                raise ValueError(f"{self.name}: init_ids hold {largest}, and {site.name!r} has {site.inputs} rows")
            return w[jnp.resize(jnp.asarray(self.init_ids), (self.length,))].astype(self.dtype)
        if self.init_weights == _VOCABULARY:
            rows = jax.random.choice(key, site.inputs, (self.length,), replace=self.length > site.inputs)
            return w[rows].astype(self.dtype)
        return normal(key, (self.length, site.outputs), self.init_std, self.dtype)

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        argument = None if inputs.continues else find_ids(inputs, self.name)
        if argument is None:
            return inputs.arguments, {}
        # Ids beyond the table stand for virtual tokens: models that hide id 0, or that of padding, do not hide these.
        first = inputs.context.get(_NEXT, inputs.sites[0].inputs)
        tokens = first + jnp.arange(self.length)
        longer = with_tokens(inputs, self.name, argument, tokens, self.pad)
        plain = None if self.keep else inputs.outputs()
        return longer, {self._first: first, _NEXT: first + self.length, "plain": plain}

    def leave(self, output: Any, context: Mapping[str, Any]) -> Any:
        plain = context.get("plain")
        return output if plain is None else cut(self.name, output, plain, self.length)

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        y = base(x)
        if not isinstance(x, Lookup) or (first := base.context.get(self._first)) is None:
            return y
        place = x.ids - first
        prompt = jnp.take(leaves["prompt"].astype(y.dtype), jnp.clip(place, 0, self.length - 1), axis=0)
        is_own = (place >= 0) & (place < self.length)
        return jnp.where(is_own[..., None], prompt, y)
