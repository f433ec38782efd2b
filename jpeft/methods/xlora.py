"""X-LoRA: trained LoRAs mixed by token (Buehler & Buehler 2024, https://arxiv.org/abs/2402.07148).

y = x W + c Σ_i g_i (x A_i) B_i          g = softmax(f(h) / τ), h: the token's last hidden state in a pass of the base

f is linear or, with more layers, a network with ReLUs; with ``layerwise``, its last layer is each weight's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, Rule, or_none
from jpeft.core.entering import CACHED
from jpeft.core.method import Inputs, Leaves, Linear
from jpeft.core.nested import first_array
from jpeft.core.sites import Site
from jpeft.core.tree import is_array
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.experts import POSITIVE, check_top_k, init_experts, mixed, top_k
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.tokens import check_sees_tokens, like_input

HIDDEN_STATES = "hidden_states"  # the method by which jpeft's decoders give them
CACHE, FIRST_PASS = "cache", "first_pass"
_STATES, _OWN_CACHE = "xlora_states", "xlora_cache"  # in the context


@dataclass(frozen=True, kw_only=True)
class XLoRA(WeightMethod):
    """Trained LoRAs whose shares a classifier gives each token, from the last hidden states of the base.

    The model runs twice: first without the LoRAs, for the states. Of other methods in a Chain, this pass has only base
    weights that they train. The classifier trains without a gradient of the first pass. In a causal model, a token's
    gates depend on the tokens up to it alone. With a cache of keys and values that is an argument of the call, such as
    that of `jpeft.models`, the first pass has one of its own: it begins where the model's does, and lies in the
    returned cache as ``"first_pass"``.

    Put the LoRAs into a fresh adapter with `jpeft.methods.with_experts`; until then, experts that do not train are
    random.

    Attributes:
      n_experts: number of LoRAs.
      hidden_size: width of the hidden states.
      rank: r, the largest rank of the LoRAs. Their scales are parts of their leaves B.
      layerwise: whether each weight has gates of its own.
      depth: number of layers of the classifier.
      size: width of the layers between.
      softmax: whether the gates of a token sum to one, before ``top_k``.
      temperature: τ, the divisor of the logits.
      top_k: number of experts that count for a token, with their gates as they are; None for all.
      softmax_top_k: whether the gates that count go through another softmax.
      scale: c, the factor on the experts' outputs.
      train_experts: whether the LoRAs train too.
      states: path of the module whose output holds the hidden states, such as "model/norm"; "" for the model's own
        output. By default the model's method ``hidden_states``, as jpeft's decoders have it, or else its output.
      dtype: dtype of the leaves.
      targets, exclude, overrides, parts: see `WeightMethod`. Weights that see all tokens of the call: no embeddings,
        convolutions or experts.

    Leaves at a site: ``xlora_a [in, experts * r]``, ``xlora_b [experts * r, out]``; with ``layerwise``
    ``xlora_head [width, experts]`` and ``xlora_head_bias [experts]``, which are else shared by all sites, as are
    ``kernel_0``, ``bias_0``, ... of the layers before. A weight's own head is a part of PEFT's last layer.

    It cannot be merged.

    >>> import jpeft
    >>> method = jpeft.methods.XLoRA(n_experts=3, hidden_size=2048, rank=16, targets=["q_proj", "v_proj"])
    """

    n_experts: int
    hidden_size: int
    rank: int = 8
    layerwise: bool = False
    depth: int = 1
    size: int = 2048
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    scale: float = 1.0
    train_experts: bool = False
    states: str | None = None
    dtype: Any = "float32"

    family: ClassVar[str] = "routing"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.07148"
    reads_context: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {"xlora_a": ("in", None), "xlora_b": (None, "out")}
    uncast: ClassVar[frozenset[str]] = frozenset({"xlora_head", "xlora_head_bias"})
    expert_leaves: ClassVar[tuple[str, str]] = ("xlora_a", "xlora_b")
    per_site: ClassVar[tuple[str, ...]] = ("rank", "scale", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "n_experts": POSITIVE_INT, "hidden_size": POSITIVE_INT, "rank": POSITIVE_INT, "layerwise": BOOL,
        "depth": POSITIVE_INT, "size": POSITIVE_INT, "softmax": BOOL, "temperature": POSITIVE,
        "top_k": or_none(POSITIVE_INT), "softmax_top_k": BOOL, "scale": NUMBER, "train_experts": BOOL,
        "states": or_none((lambda value: isinstance(value, str), "the path of a module")),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_k(self.name, self.top_k, self.n_experts)

    @property
    def identity_at_init(self) -> bool:
        """Whether B starts at zero: where the LoRAs train."""
        return self.train_experts

    @property
    def non_trainable(self) -> frozenset[str]:
        return frozenset(() if self.train_experts else self.expert_leaves)

    def mergeable(self, site: Site) -> bool:
        return False

    def prepare(self, site: Site) -> Site:
        check_sees_tokens(self.name, site)
        return super().prepare(site)

    # --- leaves ---

    @property
    def _width(self) -> int:
        """The width of the input of the classifier's last layer."""
        return self.hidden_size if self.depth == 1 else self.size

    def _head(self, key: Key[Array, ""]) -> Leaves:
        key_k, key_b = jax.random.split(key)
        n, width = self.n_experts, self._width
        return {
            "xlora_head": kaiming(key_k, (width, n), width, self.dtype),
            "xlora_head_bias": kaiming(key_b, (n,), width, self.dtype),
        }

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_e, key_h = jax.random.split(key)
        a, b = init_experts(key_e, site, self.n_experts, self.rank, self.dtype, self.train_experts)
        return {"xlora_a": a, "xlora_b": b, **(self._head(key_h) if self.layerwise else {})}

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        leaves: dict[str, Any] = {} if self.layerwise else dict(self._head(jax.random.fold_in(key, 0)))
        width = self.hidden_size
        for i in range(self.depth - 1):
            key_k, key_b = jax.random.split(jax.random.fold_in(key, i + 1))
            leaves[f"kernel_{i}"] = kaiming(key_k, (width, self.size), width, self.dtype)
            leaves[f"bias_{i}"] = kaiming(key_b, (self.size,), width, self.dtype)
            width = self.size
        return leaves

    # --- the first pass ---

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        cache = inputs.arguments.get(CACHE)
        cache = cache if isinstance(cache, Mapping) else None
        if inputs.context[CACHED] and cache is None:
            raise ValueError(
                f"{self.name}: this call keeps keys and values in the model or in an argument that is no mapping "
                f"called {CACHE!r}, where the first pass has none of its own; run the model on all tokens"
            )
        found = self._first_pass(inputs, cache)
        if found is None:
            return inputs.arguments, {}
        states, own = found
        x = jax.lax.stop_gradient(states).astype(jnp.float32)
        for i in range(self.depth - 1):
            x = jax.nn.relu(
                x @ inputs.shared[f"kernel_{i}"].astype(x.dtype) + inputs.shared[f"bias_{i}"].astype(x.dtype)
            )
        if not self.layerwise:
            x = self._gates(inputs.shared, x)
        if cache is None:
            return inputs.arguments, {_STATES: x}
        held = {name: value for name, value in cache.items() if name != FIRST_PASS}
        return {**inputs.arguments, CACHE: held}, {_STATES: x, _OWN_CACHE: own}

    def _first_pass(self, inputs: Inputs, cache: Mapping[str, Any] | None) -> tuple[Any, Any] | None:
        """The hidden states of the base, and the cache of the first pass; None for a call of a part of the model."""
        arguments, own = inputs.arguments, None
        if not any(map(is_array, jax.tree.leaves(arguments))):  # a helper, such as one that a module's setup calls
            return None
        method = HIDDEN_STATES if self.states is None and hasattr(type(inputs.model), HIDDEN_STATES) else ""
        if cache is not None:
            own = cache.get(FIRST_PASS)
            if own is None and inputs.continues:
                raise ValueError(
                    f"{self.name}: this call continues a cache without {FIRST_PASS!r}, the keys and values of the "
                    "first pass; begin it in a call with this method, or within jpeft.core.entering.continuing(False)"
                )
            own = cache if own is None else own
            arguments = {**arguments, CACHE: own}
        found = inputs.run(arguments, method, at=self.states or "")
        if found is None:
            return None
        output, states = found[0], first_array(found[1])
        if states is None or states.shape[-1] != self.hidden_size:
            shape = "no array" if states is None else list(states.shape)
            where = f"of {self.states!r}" if self.states else f"by {HIDDEN_STATES!r}" if method else "of the model"
            raise ValueError(
                f"{self.name}.hidden_size is {self.hidden_size}, and the output {where} is {shape}; say which module's "
                "output holds the last hidden states, as in states='model/norm'"
            )
        return states, None if own is None else _cache_in(output, own, self.name)

    def leave(self, output: Any, context: Mapping[str, Any]) -> Any:
        if (own := context.get(_OWN_CACHE)) is None:
            return output
        return tuple({**x, FIRST_PASS: own} if _is_cache(x, own) else x for x in output)

    # --- at a weight ---

    def _gates(self, leaves: Leaves, x: Float[Array, "*tokens width"]) -> Float[Array, "*tokens experts"]:
        gates = x @ leaves["xlora_head"].astype(x.dtype) + leaves["xlora_head_bias"].astype(x.dtype)
        if self.softmax:
            gates = jax.nn.softmax(gates / float(self.temperature))
        if self.top_k is not None:
            gates = jnp.where(top_k(gates, self.top_k), gates, 0)
        if self.softmax_top_k:  # of gates that are not zero, as in PEFT
            counts = gates != 0
            gates = jnp.where(counts, jax.nn.softmax(jnp.where(counts, gates, -jnp.inf)), 0)
        return gates

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if (found := base.context.get(_STATES)) is None:
            raise ValueError(
                f"{self.name}: this call has no hidden states of a first pass; call the whole model on its tokens"
            )
        gates = like_input(self.name, self._gates(leaves, found) if self.layerwise else found, x)
        return mixed(base, x, leaves["xlora_a"], float(self.scale) * leaves["xlora_b"], gates)


def _is_cache(value: Any, like: Mapping[str, Any]) -> bool:
    return isinstance(value, Mapping) and value.keys() == like.keys()


def _cache_in(output: Any, like: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The cache among the outputs of a call."""
    found = [x for x in output if _is_cache(x, like)] if isinstance(output, tuple) else []
    if len(found) != 1:
        raise ValueError(f"{name}: the model returns no tuple with one cache of {sorted(like)}, as it was given")
    return found[0]
