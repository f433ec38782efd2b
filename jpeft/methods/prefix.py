"""Prefix tuning: learned keys and values before each attention's own (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

softmax(Q [P_k; K]^T) [P_v; V]           P_k, P_v: [length, heads, head_dim], after any position encoding

With ``reparametrize``, a small network computes the prefix, which trains more stably. All layers share it, except for
its last layer:  [P_k; P_v] = tanh(E W_1 + b_1) W_2 + b_2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, Rule, one_of
from jpeft.core.interchange import KEYS_VALUES, Field, HFSpec, Tensor
from jpeft.core.method import Attend, Inputs, Leaves, Project
from jpeft.core.sites import Site
from jpeft.methods.base import AttentionMethod, normal
from jpeft.methods.families.prompts import shifted_positions

_NORMAL, _ZERO = "normal", "zero"
PREFIX_TENSORS = (Tensor("prompt_embeddings", "prefix_key"), Tensor("prompt_embeddings", "prefix_value"))
PREFIX_FIELDS = (Field("num_virtual_tokens", "length", rule=POSITIVE_INT),)
PREFIX_CONSTANTS = {"num_transformer_submodules": 1}
# PEFT gives the model a cache that holds the prefix, after which the model counts its positions.
PREFIX_IMPLIED = {"shift_positions": True}


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(AttentionMethod):
    """Learned keys and values that every query attends to.

    Attributes:
      length: number of virtual tokens.
      reparametrize: whether a network computes them.
      hidden: width of the network.
      embedding: width of its input.
      init_weights: "normal" (of standard deviation ``init_std``) or "zero"; see `jpeft.methods.prefix_start.from_text`
        for keys and values of a text.
      init_std: standard deviation of keys and values at first.
      shift_positions: whether positions of tokens begin at ``length``, after the prefix, as in HuggingFace PEFT; or at
        0, as without it. A prefix of a text's own keys and values wants them shifted.
      dtype: dtype of the leaves.
      targets: paths of attention modules; by default all.
      exclude, overrides: see `Method`.

    Leaves at a site: ``prefix_key [length, kv_heads, head_dim]`` and ``prefix_value``. With ``reparametrize``:
    ``prefix_kernel [hidden, kv_heads * (key_dim + value_dim)]``, ``prefix_key_bias``, ``prefix_value_bias`` and, shared
    by all sites, ``embedding [length, embedding]``, ``kernel [embedding, hidden]``, ``bias [hidden]``.

    A fresh adapter changes the model's outputs: no prefix leaves them unchanged. A HuggingFace folder holds keys and
    values, without the network that computes them.

    >>> import jpeft
    >>> method = jpeft.PrefixTuning(length=16, reparametrize=True, hidden=256)
    """

    length: int = 16
    reparametrize: bool = False
    hidden: int = 256
    embedding: int = 128
    init_weights: str = _NORMAL
    init_std: float = 0.02
    shift_positions: bool = False
    dtype: Any = "float32"

    family: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    per_site = ("init_weights", "init_std", "dtype")
    learning_rate: ClassVar[float] = 5e-3
    rules: ClassVar[Mapping[str, Rule]] = {
        "length": POSITIVE_INT, "hidden": POSITIVE_INT, "embedding": POSITIVE_INT,
        "reparametrize": BOOL, "init_weights": one_of((_NORMAL, _ZERO)), "init_std": NUMBER, "shift_positions": BOOL,
    }  # fmt: skip
    hf: ClassVar[HFSpec] = HFSpec(
        "PREFIX_TUNING",
        PREFIX_TENSORS,
        (*PREFIX_FIELDS, Field("prefix_projection", default=False, write=lambda method, site, config: False)),
        constants=PREFIX_CONSTANTS,
        ignored=frozenset({"encoder_hidden_size", "init_weights"}),
        prompt=KEYS_VALUES,
        implied=PREFIX_IMPLIED,
    )

    @property
    def identity_at_init(self) -> bool:
        """False: no prefix leaves the outputs unchanged."""
        return False

    # --- positions ---

    @property
    def enters(self) -> bool:
        """Whether it changes the positions in the model's own call."""
        return self.shift_positions

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return shifted_positions(inputs, self.name, self.length), {}

    def virtual_tokens(self) -> int:
        """The positions before the first token. The prefix itself takes no place in a cache."""
        return self.length if self.shift_positions else 0

    # --- keys and values ---

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        heads, key_dim, value_dim = site.heads
        if self.reparametrize:
            width = heads * (key_dim + value_dim)
            bound = self.hidden**-0.5 if self.init_weights == _NORMAL else 0.0
            kernel = jax.random.uniform(key, (self.hidden, width), jnp.float32, -bound, bound)
            return {
                "prefix_kernel": kernel.astype(self.dtype),
                "prefix_key_bias": jnp.zeros((heads, key_dim), self.dtype),
                "prefix_value_bias": jnp.zeros((heads, value_dim), self.dtype),
            }
        std = self.init_std if self.init_weights == _NORMAL else 0.0
        key_k, key_v = jax.random.split(key)
        return {
            "prefix_key": normal(key_k, (self.length, heads, key_dim), std, self.dtype),
            "prefix_value": normal(key_v, (self.length, heads, value_dim), std, self.dtype),
        }

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        if not self.reparametrize:
            return {}
        key_e, key_k = jax.random.split(key)
        bound = self.embedding**-0.5
        kernel = jax.random.uniform(key_k, (self.embedding, self.hidden), jnp.float32, -bound, bound)
        return {
            "embedding": normal(key_e, (self.length, self.embedding), 1.0, self.dtype),
            "kernel": kernel.astype(self.dtype),
            "bias": jnp.zeros((self.hidden,), self.dtype),
        }

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        if not self.reparametrize:
            return leaves
        # [P_k; P_v] = tanh(E W_1 + b_1) W_2 + b_2
        hidden = jnp.tanh(shared["embedding"] @ shared["kernel"] + shared["bias"])
        both = hidden @ leaves["prefix_kernel"]
        bias_k, bias_v = leaves["prefix_key_bias"], leaves["prefix_value_bias"]
        return {
            "prefix_key": both[:, : bias_k.size].reshape(-1, *bias_k.shape) + bias_k,
            "prefix_value": both[:, bias_k.size :].reshape(-1, *bias_v.shape) + bias_v,
        }

    def stored(self, prefix: Leaves) -> Leaves:
        """The leaves at a site from ``prefix_key`` and ``prefix_value``. Inverse of `expand`.

        Raises:
          ValueError: a network computes them.
        """
        if self.reparametrize:
            raise ValueError(
                f"{self.name}: keys and values do not give back the network that computes them; set reparametrize=False"
            )
        return prefix

    def attend(
        self, leaves: Leaves, attend: Attend, query: Array, key: Array, value: Array, mask: Any, project: Project
    ) -> Array:
        return attend(query, key, value, mask, (leaves["prefix_key"], leaves["prefix_value"]))
