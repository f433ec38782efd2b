"""Text classification: an encoder with a head on its mean-pooled states, its loss, evaluation and export.

    classifier, params = load_classifier(folder, num_labels=2, seed=0)
    method = jpeft.Chain(jpeft.LoRA(rank=8, alpha=16), jpeft.Train(HEAD))
    peft = method.bind(classifier, params, *example_inputs())
    scores = evaluate(scorer(peft), params, adapter, Batches(encoded, 64))

The parameter tree is `{"encoder": …, "classifier": …}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jpeft import models
from jpeft.core.placement import replicated
from jpeft.errors import UserError
from jpeft.files import new_folder, read_json, write_json
from jpeft.parallel.batches import constrained, layout_on, shard_batch
from jpeft.parallel.rules import shard
from jpeft.text import labeled, reading
from jpeft.text.labeled import Batch, Batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jpeft.core.peft import Peft

HEAD = "classifier"  # where the head lies in the parameter tree: the target that trains it

Scorer = Callable[[Any, Any, Any, Any], Float[Array, "batch labels"]]


class Classifier(nn.Module):
    """Logits from the mean of an encoder's states over the tokens that are no padding.

    Attributes:
        encoder: any Linen module `(input_ids, attention_mask=, deterministic=) -> [batch, length, hidden]`.
        num_labels: width of the head.

    >>> Classifier(encoder, num_labels=2).apply({"params": params}, input_ids, attention_mask)  # doctest: +SKIP
    """

    encoder: nn.Module
    num_labels: int

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Int[Array, "batch length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"]:
        states = self.encoder(input_ids, attention_mask=attention_mask, deterministic=deterministic)
        return nn.Dense(self.num_labels, name=HEAD)(mean_pool(states, attention_mask))


def mean_pool(
    states: Float[Array, "batch length hidden"], mask: Int[Array, "batch length"]
) -> Float[Array, "batch hidden"]:
    """The mean of each row's states where the mask is 1.

    >>> mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    weights = mask.astype(states.dtype)[..., None]
    return (states * weights).sum(axis=1) / weights.sum(axis=1)


def load_classifier(
    folder: Path, num_labels: int, seed: int, scheme: str = "none", *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[Classifier, dict[str, Any]]:
    """The encoder of a HuggingFace folder, quantized unless the scheme is "none", under a fresh head from the seed.

    On a mesh the encoder is sharded as its axes' names say (`jpeft.models.logical_shardings`), the head is everywhere.

    >>> classifier, params = load_classifier(resolve_model("minilm"), num_labels=2, seed=0)  # doctest: +SKIP
    """
    if models.is_decoder(folder):
        raise UserError(f"{folder}: a language model; expected an encoder such as BERT, to classify texts with")
    shardings = None if mesh is None else lambda encoder: models.logical_shardings(encoder, mesh)
    asked = None if scheme == "none" else scheme
    encoder, params = models.load(folder, param_dtype=jnp.dtype(dtype), quantize=asked, shardings=shardings)
    classifier = Classifier(encoder, num_labels)
    states = jax.eval_shape(lambda p, ids, mask: encoder.apply({"params": p}, ids, attention_mask=mask),
                            params, *example_inputs())  # fmt: skip
    if states.ndim != 3:
        raise UserError(f"{folder}: expected an encoder with states [batch, length, hidden], found {states.shape}")
    # Only the head is initialized: the encoder's parameters are the folder's. By numpy and without a transcendental
    # function, so that it is the same to the bit on every machine: an adapter is loaded on the base it was trained on.
    width, rng = states.shape[-1], np.random.default_rng(seed)
    kernel = rng.uniform(-1, 1, (width, num_labels)) * math.sqrt(3 / width)  # variance 1 / width
    head = {"kernel": jnp.asarray(kernel, states.dtype), "bias": jnp.zeros(num_labels, states.dtype)}
    head = head if mesh is None else shard(head, mesh, [])
    return classifier, {"encoder": params, HEAD: head}


def example_inputs(batch: int = 2, length: int = 8) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Abstract `(input_ids, attention_mask)`, enough to bind a method.

    >>> [inputs.shape for inputs in example_inputs()]
    [(2, 8), (2, 8)]
    """
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return ids, ids


def load_tokenizer(folder: Path, classifier: Classifier, max_length: int) -> Tokenizer:
    """The model's tokenizer, if the model takes texts of that many tokens.

    >>> load_tokenizer(folder, classifier, max_length=128)  # doctest: +SKIP
    """
    limit = labeled.length_limit(classifier.encoder.config)
    if max_length > limit:
        raise UserError(f"--max-length {max_length}: the model takes at most {limit} tokens")
    return reading.load_tokenizer(folder, max_length)


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    classifier: Classifier,
    max_length: int,
    labels: np.ndarray | None = None,
) -> labeled.Encoded:
    """Texts as the classifier takes them.

    >>> encode(["good tea"], tokenizer, classifier, max_length=128).ids  # doctest: +SKIP
    """
    config: Any = classifier.encoder.config  # type: ignore[attr-defined]
    pad_id = int(getattr(config, "pad_token_id", None) or 0)  # 0 for BERT, 1 for RoBERTa
    return labeled.encode(texts, tokenizer, max_length, labels, pad_id, getattr(config, "vocab_size", None))


def loss_fn(peft: Peft, train_mode: bool = True) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Mean cross-entropy over the rows of a batch that count, as `jpeft.train_step` takes it.

    Args:
        train_mode: whether dropout is on, the model's own and the adapter's.

    >>> step = jpeft.train_step(peft, loss_fn(peft), optax.adamw(1e-3))  # doctest: +SKIP
    """

    def loss(adapter: Any, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"deterministic": False, "rngs": {"dropout": rng}} if train_mode else {}
        logits = peft.apply(params, adapter, batch.input_ids, batch.attention_mask, **options)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        hits = (logits.argmax(-1) == batch.labels).astype(losses.dtype)
        count = batch.weight.sum()
        return (losses * batch.weight).sum() / count, {"accuracy": (hits * batch.weight).sum() / count}

    return loss


def scorer(peft: Peft, mesh: Mesh | None = None) -> Scorer:
    """The compiled `(params, adapter, input_ids, attention_mask) -> logits`; keep it, so that it compiles once a shape.

    >>> logits = scorer(peft)(params, adapter, batch.input_ids, batch.attention_mask)  # doctest: +SKIP
    """

    def logits(params: Any, adapter: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        with constrained(layout_on(mesh, ids)):
            return peft.apply(params, adapter, ids, mask)

    return jax.jit(logits, out_shardings=None if mesh is None else replicated(mesh))


class Scores(NamedTuple):
    """What an evaluation found."""

    accuracy: float
    loss: float


def probabilities(
    score: Scorer, params: Any, adapter: Any, batches: Batches, mesh: Mesh | None = None
) -> Float[np.ndarray, "rows labels"]:
    """Class probabilities of every text, in the order of the data.

    >>> probabilities(scorer(peft), params, adapter, Batches(encoded, 64)).argmax(-1)  # doctest: +SKIP
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in batches:
        inputs = (batch.input_ids, batch.attention_mask)
        inputs = inputs if mesh is None else shard_batch(inputs, mesh)
        logits = np.asarray(score(params, adapter, *inputs), np.float64)
        real = batch.rows >= 0
        found.append((batch.rows[real], logits[real]))
    rows, logits = (np.concatenate(parts) for parts in zip(*found, strict=True))
    logits = logits[np.argsort(rows)]
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def evaluate(score: Scorer, params: Any, adapter: Any, batches: Batches, mesh: Mesh | None = None) -> Scores:
    """Accuracy and mean cross-entropy over labeled batches.

    >>> evaluate(scorer(peft), params, adapter, Batches(encoded, 64)).accuracy  # doctest: +SKIP
    """
    found, labels = probabilities(score, params, adapter, batches, mesh), batches.encoded.labels
    likelihood = np.maximum(found[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
    return Scores(float((found.argmax(-1) == labels).mean()), float(-np.log(likelihood).mean()))


# ----------------------------------------------------------------------------------------------------------- export


def export(
    out: Path, encoder: nn.Module, merged: Any, labels: Sequence[str], source: Path, *, max_length: int, about: str
) -> None:
    """A HuggingFace folder of a merged classifier: encoder and tokenizer for transformers, the head in a file beside.

    Args:
        merged: `peft.merge(params, adapter)`. source: the folder that the encoder came from.
        max_length, about: tokens of a text, and a line on how it was trained, for the folder's README.md.

    >>> export(out, encoder, merged, ("bad", "good"), folder, max_length=128, about="LoRA.")  # doctest: +SKIP
    """
    from safetensors.numpy import save

    if out.exists():
        raise UserError(f"{out} exists; choose another folder, nothing was written")
    kernel, bias = (np.asarray(merged[HEAD][name], np.float32) for name in ("kernel", "bias"))
    where = json.dumps(str(out.absolute()))
    readme = _README.format(about=about, labels=", ".join(labels), folder=where, max_length=max_length)
    extra = {
        "README.md": readme.encode(),
        "classifier.safetensors": save({"weight": np.ascontiguousarray(kernel.T), "bias": bias}, {"format": "pt"}),
    }
    with new_folder(out) as folder:
        models.save(folder, encoder, merged["encoder"], source=source, extra_files=extra)
        config = read_json(folder / "config.json", UserError)
        config["id2label"] = {str(index): name for index, name in enumerate(labels)}
        config["label2id"] = {name: index for index, name in enumerate(labels)}
        write_json(folder / "config.json", config)


_README = """\
# A classifier merged by jpeft

{about}

Labels: {labels}.

`config.json`, `model.safetensors` and the tokenizer are an ordinary encoder with the adapter merged into its weights:
`AutoModel` and `AutoTokenizer` load them. The head works on the mean of the states over all tokens, which is no stock
class of transformers (`AutoModelForSequenceClassification` would put a new, untrained head on it), so its weight and
bias lie in `classifier.safetensors`, for these lines:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = {folder}
tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
head = load_file(f"{{folder}}/classifier.safetensors")
texts = ["a text", "another"]
batch = tokenizer(texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    states, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    logits = pooled @ head["weight"].T + head["bias"]
print([encoder.config.id2label[int(row)] for row in logits.argmax(-1)])
```
"""
