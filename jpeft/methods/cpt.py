"""Context-aware prompt tuning: examples before each text, whose embeddings move a little (Blau et al. 2024,
https://arxiv.org/abs/2410.17222).

model([C + D; E(x)]),  |D_i| <= eps_i                C: the embeddings of the examples' tokens, D: [length, features]
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

from jpeft.checks import Rule, is_ids, is_number
from jpeft.core.interchange import EMBEDDINGS, Field, HFSpec, Tensor
from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.core.tree import Path, Tree, flatten, map_with_path
from jpeft.methods.families.prompt_method import PromptMethod, embeddings

# Kinds of tokens, modulo 4: the template of an input, the input, the template of an output, the output (its label).
_INPUT_TEMPLATE, _INPUT, _OUTPUT_TEMPLATE, _OUTPUT = 1, 2, 3, 0
_EPSILON: Rule = (lambda value: is_number(value) and 0 < value < 2.0**64, "a positive number")
_IDS: Rule = (is_ids, "token ids, one or more")


@dataclass(frozen=True, kw_only=True)
class CPT(PromptMethod):
    """Examples of the task before each text: their tokens' embeddings, which training moves within small balls.

    A token's ball has a radius that its kind gives; labels do not move. The radii are for 2048 features and grow with
    the root of their number. The change is projected into its ball where it is used, and its gradient passes the
    projection as it is: `projected` keeps the leaf itself there, as HuggingFace's implementation does at every call.
    What grows with the virtual tokens, and what does not, is as for `PromptTuning`; `loss_weights` are the weights that
    the paper gives the labels of examples, in a loss over them and the text.

    Attributes:
      token_ids: the token ids of the examples.
      token_types: the kind of each token: of example i, 4 i + 1 for the template of its input, 4 i + 2 for its input,
        4 i + 3 for the template of its output, 4 i + 4 for its output; 0 for what does not move. By default all are 1.
      epsilon: radius for tokens of inputs.
      format_epsilon: radius for those of templates.
      pad, keep, dtype, targets, exclude, overrides: see `PromptMethod`.

    Leaves at the table: ``context [length, features]``, which does not train, and ``delta``, which starts at zero.

    A HuggingFace folder holds their sum: it loads with that as its context.

    >>> import jpeft
    >>> method = jpeft.methods.CPT(token_ids=[5, 7, 8, 9], token_types=[1, 2, 3, 4])
    """

    token_ids: Sequence[int]
    token_types: Sequence[int] | None = None
    epsilon: float = 0.1
    format_epsilon: float = 0.1

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17222"
    non_trainable: ClassVar[frozenset[str]] = frozenset({"context"})
    learning_rate: ClassVar[float] = 1e-3
    rules: ClassVar[Mapping[str, Rule]] = {
        "token_ids": _IDS,
        "token_types": (lambda value: value is None or is_ids(value), "integers, one for each of token_ids, or None"),
        "epsilon": _EPSILON,
        "format_epsilon": _EPSILON,
    }
    hf: ClassVar[HFSpec] = HFSpec(
        "CPT",
        (Tensor("prompt_embeddings", "context"),),
        (
            Field("cpt_token_ids", "token_ids", default=(0,), rule=_IDS, write=lambda m, site, c: list(m.token_ids)),
            Field("cpt_tokens_type_mask", "token_types", write=lambda m, site, c: list(m.types)),
            Field("opt_projection_epsilon", "epsilon", default=0.1, rule=_EPSILON),
            Field("opt_projection_format_epsilon", "format_epsilon", default=0.1, rule=_EPSILON),
            Field("num_virtual_tokens", write=lambda m, site, c: m.length),
        ),
        task_type="CAUSAL_LM",
        constants={"num_transformer_submodules": 1},
        # The loss is the user's own, see `loss_weights`; PEFT itself does not read the mask.
        ignored=frozenset({"cpt_mask", "opt_loss_decay_factor", "opt_weighted_loss_type", "tokenizer_name_or_path"}),
        prompt=EMBEDDINGS,
        read=lambda method, site, leaves: {**leaves, "delta": np.zeros_like(leaves["context"])},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("token_ids", "token_types"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        if self.token_types is not None and len(self.token_types) != self.length:
            raise ValueError(
                f"CPT.token_types must have one for each of {self.length} token_ids, got {len(self.token_types)}"
            )

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        return len(self.token_ids)

    @property
    def types(self) -> tuple[int, ...]:
        """The kind of each token."""
        return (_INPUT_TEMPLATE,) * self.length if self.token_types is None else tuple(self.token_types)

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        context = embeddings(self.name, self.token_ids, site, w).astype(self.dtype)
        return {"context": context, "delta": jnp.zeros_like(context)}

    def radii(self, features: int) -> Float[np.ndarray, "length 1"]:
        """The radius of each token's ball; 0 for one that does not move."""
        by_kind = {_INPUT: self.epsilon, _INPUT_TEMPLATE: self.format_epsilon, _OUTPUT_TEMPLATE: self.format_epsilon}
        found = [by_kind.get(kind % 4, 0.0) if kind else 0.0 for kind in self.types]
        return np.asarray(found, np.float32)[:, None] * np.sqrt(features / 2048).astype(np.float32)

    def project(self, delta: Float[Array, "length features"]) -> Float[Array, "length features"]:
        """The change within its balls: ``d min(1, eps / |d|)``."""
        radii = jnp.asarray(self.radii(delta.shape[-1]), delta.dtype)
        norm = jnp.linalg.norm(delta, axis=-1, keepdims=True)
        return jnp.where(norm > radii, delta * (radii / jnp.where(norm > 0, norm, 1)), delta)

    def prompt(self, site: Site, leaves: Leaves) -> Float[Array, "rows features"]:
        delta = leaves["delta"]
        moves = jnp.asarray(self.radii(delta.shape[-1]) > 0)
        # The value is the projection's, the gradient that of the change itself.
        passed = jnp.where(moves, delta, jax.lax.stop_gradient(delta))
        change = passed + jax.lax.stop_gradient(self.project(delta) - delta)
        return leaves["context"] + change


def projected(method: CPT, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer after whose steps the changes of the embeddings lie within their balls.

    Args:
      method: the method.
      tx: the optimizer. Its updates need the adapter, as ``tx.update(gradients, state, adapter)``.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> from jpeft.methods.cpt import projected
    >>> method = jpeft.methods.CPT(token_ids=[1], epsilon=0.5, format_epsilon=0.5)
    >>> tx, delta = projected(method, optax.sgd(1.0)), {"embed": {"delta": jnp.zeros((1, 2048))}}
    >>> gradient = jax.tree.map(jnp.ones_like, delta)
    >>> updates, _ = tx.update(gradient, tx.init(delta), delta)
    >>> float(jnp.linalg.norm(updates["embed"]["delta"]).round(4))
    0.5
    """

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("projected(method, tx).update needs the adapter as its third argument")

        own = flatten(params)

        def within(path: Path, u: Any) -> Any:
            return method.project(own[path] + u) - own[path] if path[-1] == "delta" else u

        updates, state = optax.with_extra_args_support(tx).update(updates, state, params, **extra)
        return map_with_path(within, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def loss_weights(token_types: Any, decay: float = 1.0) -> Float[Array, "*batch length"]:
    """The weight of each token's loss: 1 for the last output, ``decay`` for the one before, its square for that before.

    The loss is the mean over the tokens of outputs of these weights times the losses of each as the next token, in a
    call with ``keep=True`` over the examples' tokens and the text's.

    Args:
      token_types: ``[..., length]``, as for `CPT`; the text's own number goes on after the examples'.
      decay: the factor.

    >>> loss_weights(np.array([1, 2, 3, 4, 5, 6, 7, 8]), decay=0.5).tolist()
    [0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0]
    """
    types = jnp.asarray(token_types)
    is_output = (types > 0) & (types % 4 == _OUTPUT)
    begins = is_output & (types != jnp.concatenate([jnp.zeros_like(types[..., :1]), types[..., :-1]], axis=-1))
    later = (begins[..., None, :] & (types[..., None, :] > types[..., :, None])).sum(-1)
    return jnp.where(is_output, jnp.asarray(decay, jnp.float32) ** later.astype(jnp.float32), 0.0)
