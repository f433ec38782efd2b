"""Instruction tuning: a chat model over a quantized base, the loss of its answers, evaluation and export.

model, params = load_base(resolve_model("smollm2"), "nf4")
peft = jpeft.LoRA(rank=8, targets="all-linear").bind(model, params, *example_inputs())
step = jpeft.train_step(peft, loss_fn(peft), optax.adamw(5e-4))
state, metrics = step(state, params, balanced(batch))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jpeft import models
from jpeft.core.placement import AnyMesh, replicated
from jpeft.core.quantized import Quantized
from jpeft.core.tree import flatten
from jpeft.errors import UserError
from jpeft.models.sources import read_config
from jpeft.parallel.batches import constrained, data_ways, layout_on
from jpeft.quantization.tree import dequantize, quantize
from jpeft.text import chat_template
from jpeft.text.conversations import Batch
from jpeft.training.losses import chunked_cross_entropy

if TYPE_CHECKING:
    from jpeft.core.peft import Peft

Scorer = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]


def load_base(
    path: Path, scheme: str = "none", *, mesh: Mesh | None = None, dtype: str = "float32", remat: str | None = None
) -> tuple[Any, Any]:
    """A language model and its parameters, quantized while they are read unless the scheme is "none", and sharded on a
    mesh as their axes' names say.

    A folder that holds quantized weights stays as it is, and no other scheme may be asked for.

    >>> model, params = load_base(resolve_model("smollm2"), "nf4")  # doctest: +SKIP
    """
    if not models.is_decoder(path):
        raise UserError(f"{path}: not a language model, but an encoder; it cannot learn to answer")
    quantized = holds_codes(path)
    try:
        shardings = None if mesh is None else lambda model: models.logical_shardings(model, mesh)
        asked = None if scheme == "none" or quantized else scheme
        model, params = models.load(
            path, param_dtype=jnp.dtype(dtype), quantize=asked, shardings=shardings, remat=remat
        )
        if quantized and scheme not in ("none", *(held := schemes_of(params))):
            raise UserError(f"--quantize {scheme}: {path} is quantized already; give --quantize {min(held)}")
        return model, params
    except models.ModelError:
        raise
    except ValueError as error:  # a weight that cannot be quantized; else one that does not fit on the mesh
        if scheme == "none" or "does not divide over" in str(error):
            raise
        raise UserError(f"--quantize {scheme}: {error}") from error


def holds_codes(path: Path) -> bool:
    """Whether a folder's weights are quantized.

    >>> holds_codes(resolve_model("smollm2"))  # doctest: +SKIP
    False
    """
    return "quantization_config" in read_config(path)


def schemes_of(params: Any) -> set[str]:
    """What the weights of a tree are quantized as.

    >>> schemes_of({"a": {"kernel": np.ones((64, 64))}})
    set()
    """
    return {leaf.scheme for leaf in flatten(params).values() if isinstance(leaf, Quantized)}


def load_chat_tokenizer(path: Path, model: Any, max_length: int) -> chat_template.ChatTokenizer:
    """The tokenizer and chat template of a model that takes so many tokens.

    >>> load_chat_tokenizer(resolve_model("smollm2"), model, 512).stop_ids  # doctest: +SKIP
    (2,)
    """
    codec = chat_template.read(path)
    chat_template.check_vocabulary(codec, model.config.vocab_size)
    if max_length > (limit := model.config.max_position_embeddings):
        raise UserError(f"--max-length {max_length}: the model takes at most {limit} tokens")
    return codec


def example_inputs(batch: int = 2, length: int = 8) -> tuple[jax.ShapeDtypeStruct]:
    """Abstract `input_ids`, enough to bind a method.

    >>> example_inputs()[0].shape
    (2, 8)
    """
    return (jax.ShapeDtypeStruct((batch, length), jnp.int32),)


# --------------------------------------------------------------------------------------------------- loss and scores


def balanced(batch: Batch, answer_tokens: int | None = None, rows: int | None = None) -> Batch:
    """The batch with its weights scaled to a mean of 1 for each row, so that the mean over rows is that over answers.

    Micro-batches then count as much as they hold, and accumulated gradients are those of the whole batch.

    Args:
        answer_tokens, rows: of the whole batch, where this is a host's part of it.

    >>> weight = np.float32([[0, 1, 1, 1], [0, 0, 0, 1]])
    >>> balanced(Batch(weight, weight, weight, weight, weight)).weight.tolist()
    [[0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.5]]
    """
    total = max(float(batch.weight.sum()) if answer_tokens is None else answer_tokens, 1.0)
    return batch._replace(weight=batch.weight * np.float32((rows or batch.weight.shape[0]) / total))


_CHUNK = 1024


def _sums(
    peft: Peft, adapter: Any, params: Any, batch: Batch, mesh: AnyMesh | None, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the cross-entropies and of the right guesses."""
    states = peft.apply(
        params, adapter, batch.input_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids,
        method="hidden_states", **options,
    )  # fmt: skip
    head = lambda states: peft.apply(params, adapter, states, method="logits")  # noqa: E731
    # A device holds the logits of its own rows, so a chunk has as many more tokens as there are parts of a batch.
    chunk = _CHUNK * (1 if mesh is None else data_ways(mesh))
    return chunked_cross_entropy(head, states, jnp.asarray(batch.targets), jnp.asarray(batch.weight), chunk)


def loss_fn(
    peft: Peft, train_mode: bool = False, mesh: AnyMesh | None = None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Mean cross-entropy over the answers of a `balanced` batch, as `jpeft.train_step` takes it.

    Args:
        train_mode: whether dropout is on.
        mesh: that which batches are spread over. Every chunk of tokens gathers a sharded head, and the more devices
            share a chunk's logits, the more tokens it may have.

    >>> step = jpeft.train_step(peft, loss_fn(peft), optax.adamw(5e-4))  # doctest: +SKIP
    """

    def loss(adapter: Any, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"deterministic": False, "rngs": {"dropout": rng}} if train_mode else {}
        total, right = _sums(peft, adapter, params, batch, mesh, **options)
        rows = batch.weight.shape[0]
        return total / rows, {"accuracy": right / rows}

    return loss


def scorer(peft: Peft, mesh: Mesh | None = None) -> Scorer:
    """The compiled `(params, adapter, batch) -> (sum of losses, right guesses, answer tokens)`; keep it.

    >>> scorer(peft)(params, adapter, batch)  # doctest: +SKIP
    """

    def sums(params: Any, adapter: Any, batch: Batch) -> Any:
        with constrained(layout_on(mesh, batch)):
            return *_sums(peft, adapter, params, batch, mesh), batch.weight.sum()

    return jax.jit(sums, out_shardings=None if mesh is None else replicated(mesh))


class Scores(NamedTuple):
    """Of the answers' tokens: how likely the model finds them, and how many it would have guessed."""

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """What the loss is the logarithm of.

        >>> round(Scores(loss=0.6931, accuracy=0.5).perplexity, 2)
        2.0
        """
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(score: Scorer, params: Any, adapter: Any, batches: Iterable[Batch]) -> Scores:
    """Mean over the answer tokens of all batches.

    >>> evaluate(scorer(peft), params, adapter, batches).perplexity  # doctest: +SKIP
    """
    loss, right, count = np.sum([[np.float64(x) for x in score(params, adapter, batch)] for batch in batches], axis=0)
    return Scores(float(loss / count), float(right / count))


# ------------------------------------------------------------------------------------------------------------- export


def export(out: Path, peft: Peft, params: Any, adapter: Any, source: Path, scheme: str | None = None) -> None:
    """A HuggingFace folder of the model with its adapter merged in, tokenizer and chat template beside it.

    Args:
        source: the folder or .gguf file that the model came from.
        scheme: quantize what is written; None writes plain weights. The adapter is then merged into the weights that
            the source holds, not into the codes that it was trained over: those stand on the levels of a code, to which
            a change of less than half a gap would be rounded back. A source that holds codes has no other weights: its
            own are quantized again as they were.

    >>> export(Path("merged"), peft, params, adapter, resolve_model("smollm2"))  # doctest: +SKIP
    """
    again = scheme is not None and holds_codes(source)
    if scheme is not None and not again:
        _, params = load_base(source)
    try:
        merged = peft.merge(params, adapter, requantize=again)
    except ValueError as error:  # a method that is no change of weights
        raise UserError(str(error)) from error
    if not again:
        merged = dequantize(merged) if scheme is None else quantize(merged, scheme)
    models.save(out, peft.model, merged, source=source)
