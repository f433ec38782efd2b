"""aLoRA: a LoRA that invocation tokens activate (Greenewald et al. 2025, https://arxiv.org/abs/2504.12397).

y_t = x_t W + s (x_t A) B    for t at or after the last occurrence of the invocation tokens
y_t = x_t W                  before it, and in rows without them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jpeft.checks import Rule, is_ids
from jpeft.core.interchange import LINEAR, Field, HFSpec
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.families.tokens import check_sees_tokens, like_input
from jpeft.methods.lora import LoRA

_IDS: Rule = (is_ids, "token ids, one or more")


@dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
    """LoRA that acts from the last occurrence of some tokens on, so that what stands before them is the base's.

    A cache of keys and values of a prompt, made by the base, is then valid for the adapter too. The token ids are the
    first argument of the model's call that is an integer array ``[batch, length]``. In a call that continues a cache,
    the ids before it are not known: it is refused, so generate without a cache. Where several texts are packed in a
    row, and the call's ``segment_ids`` tell them apart, each is activated by its own tokens.

    Attributes:
      invocation_tokens: the ids that activate the adapter, in order.
      rank, alpha, rslora, dropout, init_weights, init_options, freeze_a, dtype: see `jpeft.LoRA`.
      targets, exclude, overrides: see `WeightMethod`. Weights that see tokens: no embeddings, convolutions or experts.

    Leaves at a site: those of `jpeft.LoRA`.

    It cannot be merged.

    >>> import jpeft
    >>> method = jpeft.methods.ALoRA(rank=32, invocation_tokens=[1, 733, 16289], targets=r".*/[qkv]_proj")
    """

    invocation_tokens: Sequence[int]

    paper: ClassVar[str] = "https://arxiv.org/abs/2504.12397"
    reads_context: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule]] = {"invocation_tokens": _IDS}

    def __post_init__(self) -> None:
        if isinstance(self.invocation_tokens, np.ndarray | jax.Array):
            object.__setattr__(self, "invocation_tokens", self.invocation_tokens.tolist())
        super().__post_init__()
        object.__setattr__(self, "invocation_tokens", tuple(self.invocation_tokens))

    def prepare(self, site: Site) -> Site:
        check_sees_tokens(self.name, site)
        return super().prepare(site)

    def mergeable(self, site: Site) -> bool:
        return False

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        y = base(x)
        ids = _token_ids(base.context)
        segments = base.context.get("segment_ids")
        if segments is not None and jnp.shape(segments) != ids.shape:
            raise ValueError(
                f"{self.name}: segment_ids must be like the token ids, {ids.shape}, got {jnp.shape(segments)}"
            )
        active = like_input(self.name, activated(ids, self.invocation_tokens, segments)[..., None], x)
        update = (base.dropout(x, self.dropout) @ (self.scale * leaves["lora_a"])) @ leaves["lora_b"]
        return y + jnp.where(active, update, jnp.zeros_like(update)).astype(y.dtype)


def activated(
    ids: Int[Array, "batch length"], tokens: Sequence[int], segments: Int[Array, "batch length"] | None = None
) -> Bool[Array, "batch length"]:
    """Whether each token stands at or after the start of the last occurrence of ``tokens`` in its row or segment.

    >>> activated(jnp.array([[5, 7, 8, 1], [7, 1, 8, 2]]), (7, 8)).tolist()
    [[False, True, True, True], [False, False, False, False]]
    >>> activated(jnp.array([[7, 1, 2, 7]]), (7,), jnp.array([[1, 1, 2, 2]])).tolist()
    [[True, True, False, True]]
    """
    length, count = ids.shape[1], len(tokens)
    place = jnp.arange(length)
    if count > length:
        return jnp.zeros(ids.shape, bool)
    starts = length - count + 1
    found = jnp.stack([ids[:, i : i + starts] == token for i, token in enumerate(tokens)]).all(0)
    if segments is None:
        last = jnp.where(found, place[:starts], -1).max(1, keepdims=True)
    else:
        part = jnp.cumsum(segments != jnp.roll(segments, 1, axis=1), axis=1)
        found &= part[:, :starts] == part[:, count - 1 :]
        at = jnp.where(found, place[:starts], -1)
        latest = jax.vmap(lambda at, part: jax.ops.segment_max(at, part, num_segments=length + 1))(at, part[:, :starts])
        last = jnp.take_along_axis(latest, part, axis=1)
    return (last >= 0) & (place >= last)


def _token_ids(context: Mapping[str, Any]) -> jax.Array:
    if context.get("cached"):
        raise ValueError(
            "ALoRA: this call continues a cache of keys and values; the tokens before it, which may be the invocation "
            "tokens, are not known: run the model on all tokens without a cache"
        )
    for value in context.values():
        if isinstance(value, jax.Array | np.ndarray) and value.ndim == 2 and jnp.issubdtype(value.dtype, jnp.integer):
            return jnp.asarray(value)
    raise ValueError(f"ALoRA: no argument of the model's call holds token ids [batch, length]; got {sorted(context)}")


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

_KEY = "alora_invocation_tokens"
assert isinstance(LoRA.hf, HFSpec)
ALoRA.hf = dataclasses.replace(
    LoRA.hf,
    tensors=tuple(t for t in LoRA.hf.tensors if LINEAR in t.kinds),
    fields=(*LoRA.hf.fields, Field(_KEY, "invocation_tokens", (), _IDS, read=lambda ids, site: tuple(ids))),
    given=frozenset({_KEY}),
    task_type="CAUSAL_LM",  # only its models look for the tokens
    constants={key: value for key, value in LoRA.hf.constants.items() if key != _KEY} | {"target_parameters": None},
    parameters="",
    tied={},
)
