"""The base class of methods that put learned embeddings of virtual tokens before each text.

The model's call gets longer token ids. Those of virtual tokens lie beyond the table of embeddings: where the table is
looked up, they get the method's own rows. So a model that hides id 0, or that of padding, does not hide them, and a
table that is used again as the output head keeps its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int, Key

from jpeft.checks import BOOL, NUMBER, Rule, is_ids, one_of, or_none
from jpeft.core.geometry.embedding import Embedding, Lookup, TracedTable
from jpeft.core.method import Inputs, Leaves, Linear
from jpeft.core.sites import FUSED, Site, Survey, is_of_positions
from jpeft.core.targets import Matched, Targets
from jpeft.methods.base import WeightMethod, normal
from jpeft.methods.families.prompts import DECODER, continued, cut, find_ids, with_tokens

# What models call the table of token embeddings; others, such as one of positions, are looked up too.
TABLES = (
    "word_embeddings", "embed_tokens", "wte", "shared", "token_embedder", "token_embed", "tok_embeddings", "embedder",
    "input_embedding", "word_embedding", "token_embedding", "embed",
)  # fmt: skip
NORMAL, VOCABULARY = "normal", "vocabulary"
_READ_ELSEWHERE = "read elsewhere"
_ONE_HOT = "one_hot"  # a leaf that is there where rows are multiplied by the table, which is not looked up
_NEXT = "next_virtual_id"  # in the context: the id of the first virtual token of another method


@dataclass(frozen=True, kw_only=True)
class PromptMethod(WeightMethod):
    """The base class of methods that put learned embeddings before each text.

    A subclass has a field or property ``length``, and defines `init` and, unless it is a leaf, `prompt`. Of its rows,
    `tokens` says which come before a text: by default all, in order.

    Attributes:
      pad: for arguments of the model's call that are shaped like the token ids and that are not known: what they hold
        for virtual tokens, by name, as in ``{"language_ids": 0}``.
      keep: whether outputs keep the places of the virtual tokens. Those in a cache of keys and values, an output with
        "cache" or "past_key_values" in its name, are kept in any case.
      dtype: dtype of the leaves.
      targets: path of the table of token embeddings; by default it is known by its name, or the only one.
      exclude, overrides: see `Method`.
    """

    pad: Mapping[str, Any] = FrozenDict()
    keep: bool = False
    dtype: Any = "float32"

    family: ClassVar[str] = "prompt"
    reads_context: ClassVar[bool] = True
    per_site: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 3e-2
    rules: ClassVar[Mapping[str, Rule]] = {
        "pad": (lambda value: isinstance(value, Mapping), "a mapping from names of arguments to numbers"),
        "keep": BOOL,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pad", FrozenDict(self.pad))

    @property
    def identity_at_init(self) -> bool:
        """False: no prompt leaves the outputs unchanged."""
        return False

    def virtual_tokens(self) -> int:
        return self.length  # type: ignore[attr-defined]

    def mergeable(self, site: Site) -> bool:
        return False

    # --- the table of token embeddings ---

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.weights

    def default_targets(self) -> Targets:
        return lambda path, site: True

    def sites(self, survey: Survey) -> list[Site]:
        found = _tables(survey) if self.targets is None else super().sites(survey)
        if len(found) == 1:
            (site,) = found
            if reason := survey.lost_ids(site.weight_path, site.inputs):
                raise ValueError(f"{self.name}: virtual tokens are ids beyond the table {site.name!r}, and {reason}")
            return [self.prepare(site)]
        names = ", ".join(repr(site.name) for site in found)
        what = f"looks up several tables of embeddings: {names}" if names else "looks up no table of embeddings"
        if self.targets is not None:
            what = f"has several weights that targets name: {names}"
        hint = (
            "say which one by targets=[...]"
            if names
            else ("give the model token ids; a table that is multiplied by one-hot rows is named by targets=[...]")
        )
        raise ValueError(f"{self.name} acts where token ids are embedded, and this model {what}; {hint}")

    def matched(self, survey: Survey, sites: Sequence[Site]) -> list[Matched]:
        if self.targets is not None:
            return super().matched(survey, sites)
        return [Matched("targets", "the table of token embeddings (the default)", len(sites))]

    def prepare(self, site: Site) -> Site:
        site = dataclasses.replace(site, calls_alone=site.lookup)
        if site.via != FUSED and isinstance(site.geometry, Embedding) and not isinstance(site.geometry, TracedTable):
            # Read elsewhere too, as by a tied head: only the lookups in calls of the table's module matter.
            return dataclasses.replace(super().prepare(site), via=FUSED, role=_READ_ELSEWHERE)
        if site.via != FUSED:
            raise ValueError(
                f"{self.name}: the lookups in {site.name!r} are not seen (path taken: {site.via}), and no embedding "
                "can take their place"
            )
        return super().prepare(site)

    # --- the prompt ---

    def prompt(self, site: Site, leaves: Leaves) -> Float[Array, "rows features"]:
        """The embeddings of virtual tokens, from the leaves in at least float32."""
        return leaves["prompt"]

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        found = self.prompt(site, leaves)
        return {"prompt": found} if site.lookup else {"prompt": found, _ONE_HOT: found[:1]}

    def rows(self) -> int:
        """The number of rows of the prompt."""
        return self.length  # type: ignore[attr-defined]

    def tokens(self, inputs: Inputs, ids: Int[Array, "*batch length"]) -> Int[Array, "*batch virtual"]:
        """The rows of the prompt that come before each text, ``[n]`` or ``[*batch, n]``."""
        return jnp.arange(self.length)  # type: ignore[attr-defined]

    def more_tokens(self, inputs: Inputs) -> Mapping[str, Int[Array, " virtual"]]:
        """The rows that come before other token ids of the call, by the argument's name."""
        return {}

    @property
    def _entered(self) -> str:
        """In the context, the id of the method's first row; None in a call that continues a cache."""
        return f"{self.slug}_first_id"

    @property
    def _seen(self) -> str:
        """In the context, a list that is not empty once the table's module was called."""
        return f"{self.slug}_seen"

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if inputs.continues:
            given, full = continued(inputs, self.name, self.virtual_tokens())
            return given, {self._entered: None, "full": full}
        if (argument := find_ids(inputs, self.name)) is None:
            return inputs.arguments, {}
        first = inputs.context.get(_NEXT, inputs.sites[0].inputs)
        found = {argument: self.tokens(inputs, inputs.arguments[argument]), **self.more_tokens(inputs)}
        longer = inputs
        for name, rows in found.items():
            given = with_tokens(longer, self.name, name, first + rows, self.pad)
            longer = dataclasses.replace(longer, arguments=given)
        context = {self._entered: first, _NEXT: first + self.rows()}
        context[_ids(self)] = tuple(longer.arguments[name] for name in found)
        context |= {"added": tuple(rows.shape[-1] for rows in found.values()), self._seen: []}
        context["token_axes"] = jnp.ndim(inputs.arguments[argument])
        context |= {"is_read_elsewhere": inputs.sites[0].role == _READ_ELSEWHERE}
        return longer.arguments, {**context, "plain": None if self.keep else inputs.outputs()}

    def leave(self, output: Any, context: Mapping[str, Any]) -> Any:
        if context.get(self._seen) == [] and context["is_read_elsewhere"]:
            raise ValueError(
                f"{self.name}: the model reads its table of embeddings without calling the table's module, and virtual "
                "tokens have no rows there; call the module in the model, as nn.Embed is"
            )
        if (full := context.get("full")) is not None:  # and traced: NaN, not the output of an overwritten cache
            return jax.tree.map(
                lambda y: jnp.where(full, jnp.nan, y) if jnp.issubdtype(y.dtype, jnp.floating) else y, output
            )
        plain = context.get("plain")
        return output if plain is None else cut(self.name, output, plain, context["added"], context["token_axes"])

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        y = base(x)
        if not (isinstance(x, Lookup) or _ONE_HOT in leaves):  # the output head
            return y
        base.context.get(self._seen, []).append(True)
        if self._entered not in base.context:
            raise ValueError(
                f"{self.name}: token ids are embedded, and none are among the arguments of the model's own call, where "
                "virtual tokens could come before them: call the model itself, or a method of it that takes the ids"
            )
        if (first := base.context[self._entered]) is None:
            return y
        ids = x.ids if isinstance(x, Lookup) else self._ids_of_rows(x, base.context[_ids(self)])
        if ids is None:
            return y
        place = ids - first
        prompt = jnp.take(leaves["prompt"].astype(y.dtype), jnp.clip(place, 0, self.rows() - 1), axis=0)
        is_own = (place >= 0) & (place < self.rows())
        if not isinstance(x, Lookup):
            is_own = is_own & (x == 0).all(-1)  # ids beyond the table give rows of zeros
        return jnp.where(is_own[..., None], prompt, y)

    def _ids_of_rows(self, x: Any, longer: Sequence[Any]) -> Any:
        """The token ids whose one-hot rows ``x [..., table]`` are; None for those of other token ids.

        Args:
          x: the rows.
          longer: the call's token ids with those of virtual tokens.

        Raises:
          ValueError: it is not clear which they are.
        """
        found = [ids for ids in longer if np.size(ids) == math.prod(x.shape[:-1])]
        if len(found) > 1:
            raise ValueError(
                f"{self.name}: one-hot rows {x.shape} are those of an encoder or of a decoder of as many tokens; "
                "give texts of different lengths, or look the table up by token ids"
            )
        return found[0].reshape(x.shape[:-1]) if found else None


def _ids(method: PromptMethod) -> str:
    """In the context, the token ids with those of virtual tokens, of each argument that has some."""
    return f"{method.slug}_ids"


def _tables(survey: Survey) -> list[Site]:
    """The tables of token embeddings by their names; without such a name all that are looked up, but for positions."""
    lookups = [site for site in survey.weights if site.lookup and not is_of_positions(site.name)]
    for name in TABLES:
        if found := [site for site in lookups if name in (site.path[-1:] or ("",))[0].lower()]:
            return found
    return lookups


# --- starts -----------------------------------------------------------------------------------------------------------

START_RULES: Mapping[str, Rule] = {
    "init_weights": one_of((NORMAL, VOCABULARY)),
    "init_ids": or_none((is_ids, "token ids, one or more")),
    "init_std": NUMBER,
}
# The same in HuggingFace PEFT.
HF_STARTS = frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"})


def start(method: Any, count: int, key: Key[Array, ""], site: Site, w: Any) -> Float[Array, "count features"]:
    """The embeddings of virtual tokens at first, by a method's ``init_weights``, ``init_ids`` and ``init_std``.

    Raises:
      ValueError: an id that the table does not have.
    """
    if method.init_ids is not None:
        return embeddings(method.name, np.resize(method.init_ids, count), site, w).astype(method.dtype)
    if method.init_weights == VOCABULARY:
        ids = jax.random.choice(key, site.inputs, (count,), replace=count > site.inputs)
        return w[ids].astype(method.dtype)
    return normal(key, (count, site.outputs), method.init_std, method.dtype)


def embeddings(name: str, ids: Any, site: Site, w: Any) -> Float[Array, "count features"]:
    """The rows of a table.

    Raises:
      ValueError: an id that the table does not have.
    """
    if (largest := int(max(ids))) >= site.inputs:
        raise ValueError(f"{name}: the ids hold {largest}, and {site.name!r} has {site.inputs} rows")
    return w[jnp.asarray(ids)]


def decoder_ids(inputs: Inputs, name: str) -> str:
    """The name of the argument that holds a decoder's token ids.

    Raises:
      ValueError: there is none.
    """
    found = next((n for n in inputs.arguments if n.startswith(DECODER) and n.endswith(("ids", "tokens"))), None)
    if found is None or "position" in found:
        raise ValueError(f"{name}: decoder=True, and the call has no token ids of a decoder; set decoder=False")
    return found
