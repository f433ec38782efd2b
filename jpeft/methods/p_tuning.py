"""P-tuning: embeddings before each text that a small network computes (Liu et al. 2021, https://arxiv.org/abs/2103.10385).

model([P; E(x)]),  P = MLP(H) or MLP(LSTM(H))        H: [length, features], E: the model's embedding of token ids x
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import NUMBER, POSITIVE_INT, Rule, one_of
from jpeft.core.interchange import EMBEDDINGS, Field, HFSpec, Tensor
from jpeft.core.method import Leaves
from jpeft.core.sites import Site
from jpeft.methods.base import normal
from jpeft.methods.families.prompt_method import PromptMethod

_MLP, _LSTM = "mlp", "lstm"
_DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """Embeddings of virtual tokens before each text, which a small network computes from others.

    The network is HuggingFace's: an MLP of three layers with ReLU, or a bidirectional LSTM and an MLP of two. It is
    computed in float32 or wider. What grows with the virtual tokens, and what does not, is as for `PromptTuning`.

    Attributes:
      length: number of virtual tokens.
      encoder: "mlp" or "lstm".
      hidden: width of the network; of each direction of the LSTM.
      layers: number of layers of the LSTM.
      init_std: standard deviation of the network's input at first.
      pad, keep, dtype, targets, exclude, overrides: see `PromptMethod`.

    Leaves at the table: ``prompt_input [length, features]``; ``prompt_kernel_0 [in, hidden]``, ``prompt_bias_0`` and so
    on for each layer of the MLP; and for each layer and direction of the LSTM, ``lstm_0_forward_input [in, 4 *
    hidden]``, ``lstm_0_forward_recurrent [hidden, 4 * hidden]`` and ``lstm_0_forward_bias``, the gates in the order
    input, forget, cell, output.

    A HuggingFace folder holds the embeddings that the network computes, without it: they load as `PromptTuning`.

    >>> import jpeft
    >>> method = jpeft.methods.PTuning(length=20, encoder="lstm", hidden=64)
    """

    length: int = 20
    encoder: str = _MLP
    hidden: int = 128
    layers: int = 2
    init_std: float = 1.0

    paper: ClassVar[str] = "https://arxiv.org/abs/2103.10385"
    learning_rate: ClassVar[float] = 1e-3
    rules: ClassVar[Mapping[str, Rule]] = {
        "length": POSITIVE_INT, "encoder": one_of((_MLP, _LSTM)), "hidden": POSITIVE_INT, "layers": POSITIVE_INT,
        "init_std": NUMBER,
    }  # fmt: skip
    hf: ClassVar[HFSpec] = HFSpec(
        "P_TUNING",
        (Tensor("prompt_embeddings", "prompt"),),
        (
            Field("num_virtual_tokens", "length", rule=POSITIVE_INT),
            Field("encoder_hidden_size", "hidden"),
            Field("encoder_num_layers", "layers", default=2),
            Field("encoder_reparameterization_type", "encoder", default="MLP", rule=one_of(("MLP", "LSTM")),
                  read=lambda value, site: value.lower(), write=lambda method, site, config: method.encoder.upper()),
        ),
        constants={"num_transformer_submodules": 1},
        ignored=frozenset({"encoder_dropout"}),
        prompt=EMBEDDINGS,
        read_as="PromptTuning",
    )  # fmt: skip

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        keys = iter(jax.random.split(key, 64 + 6 * self.layers))
        found = {"prompt_input": normal(next(keys), (self.length, site.outputs), self.init_std, self.dtype)}
        for i, (inputs, outputs) in enumerate(self._sizes(site.outputs)):
            bound = inputs**-0.5
            found[f"prompt_kernel_{i}"] = self._uniform(next(keys), (inputs, outputs), bound)
            found[f"prompt_bias_{i}"] = self._uniform(next(keys), (outputs,), bound)
        bound, gates = self.hidden**-0.5, 4 * self.hidden
        for i, name in self._cells():
            inputs = 2 * self.hidden if i else site.outputs
            found[f"{name}_input"] = self._uniform(next(keys), (inputs, gates), bound)
            found[f"{name}_recurrent"] = self._uniform(next(keys), (self.hidden, gates), bound)
            # torch's two biases, of which only the sum counts.
            first, second = (self._uniform(next(keys), (gates,), bound) for _ in range(2))
            found[f"{name}_bias"] = first + second
        return found

    def _sizes(self, features: int) -> tuple[tuple[int, int], ...]:
        """The inputs and outputs of the MLP's layers."""
        if self.encoder == _LSTM:
            return (2 * self.hidden, 2 * self.hidden), (2 * self.hidden, features)
        return (features, self.hidden), (self.hidden, self.hidden), (self.hidden, features)

    def _cells(self) -> Iterator[tuple[int, str]]:
        """The layer of each cell of the LSTM, and the beginning of its leaves' names."""
        for i in range(self.layers if self.encoder == _LSTM else 0):
            for direction in _DIRECTIONS:
                yield i, f"lstm_{i}_{direction}"

    def _uniform(self, key: Key[Array, ""], shape: tuple[int, ...], bound: float) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(self.dtype)

    def prompt(self, site: Site, leaves: Leaves) -> Float[Array, "rows features"]:
        x = leaves["prompt_input"]
        for i in range(self.layers if self.encoder == _LSTM else 0):
            found = [_run(leaves, f"lstm_{i}_{direction}", x, direction == "backward") for direction in _DIRECTIONS]
            x = jnp.concatenate(found, axis=-1)
        count = len(self._sizes(site.outputs))
        for i in range(count):
            x = x @ leaves[f"prompt_kernel_{i}"] + leaves[f"prompt_bias_{i}"]
            x = jax.nn.relu(x) if i < count - 1 else x
        return x


def _run(leaves: Leaves, name: str, x: Float[Array, "length in"], reverse: bool) -> Float[Array, "length hidden"]:
    """The hidden states of one direction of an LSTM's layer."""
    recurrent = leaves[f"{name}_recurrent"]
    given = x @ leaves[f"{name}_input"] + leaves[f"{name}_bias"]

    def step(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = state
        i, f, g, o = jnp.split(gates + hidden @ recurrent, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)  # c' = f c + i g
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)  # h' = o tanh(c')
        return (hidden, cell), hidden

    zeros = jnp.zeros(recurrent.shape[:1], given.dtype)
    return jax.lax.scan(step, (zeros, zeros), given, reverse=reverse)[1]
