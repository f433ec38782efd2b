"""The task `classify`: an encoder with a linear head on its mean-pooled states labels texts.

    classifier, params = load_classifier(folder, num_labels=2, seed=0)
    method = jpeft.Chain(jpeft.LoRA(rank=8, alpha=16), jpeft.Train(HEAD))
    peft = method.bind(classifier, params, *example_inputs())
    scores = evaluate(scorer(peft), params, adapter, Batches(encoded, 64))

    open_run("runs/minilm-lora-1").predict(["good tea"])

The parameter tree is `{"encoder": …, "classifier": …}`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jpeft.core.placement import AnyMesh, replicated
from jpeft.errors import UserError
from jpeft.files import file_sha256, new_folder, read_json, serialize, write_json
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.methods.base import LeafMethod, Method
from jpeft.methods.chain import Chain
from jpeft.methods.train import Train
from jpeft.models.axes import logical_names, logical_shardings
from jpeft.models.classifier import HEAD, Classifier, as_loaded, with_own_head, without_parts
from jpeft.models.decoder import Decoder
from jpeft.models.families import is_decoder
from jpeft.models.loading import abstract as abstract_model
from jpeft.models.loading import load as load_model
from jpeft.models.saving import save as save_model
from jpeft.parallel.batches import constrained, data_ways, layout_on, shard_batch
from jpeft.parallel.rules import shard
from jpeft.recipes import run_folder
from jpeft.recipes.adapters import load_of_run
from jpeft.recipes.assets import DataSource, resolve_data, resolve_model
from jpeft.recipes.config import Config, Setup
from jpeft.recipes.start import begin
from jpeft.recipes.tasks import base
from jpeft.recipes.tasks.base import AbstractModel, Job, Merging, Reporter, abstract_ids, quantizing
from jpeft.recipes.vocabulary import reshape, with_rows
from jpeft.storage import absolute, as_path, check_writable
from jpeft.text import labeled, reading
from jpeft.text.labeled import Batch, Batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jpeft.core.peft import Peft

METRIC = ("eval_accuracy", "test accuracy")
REMATS = (None,)
_EVAL_BATCH = 64
_PLANNED_LABELS = 2
FOLDER_HEAD, NEW_HEAD = "folder", "new"  # where a classifier's head comes from
_MERGING = Merging()

Scorer = Callable[[Any, Any, Any, Any], Float[Array, "batch labels"]]


# ------------------------------------------------------------------------------------------------------------- model


def load_classifier(
    folder: Path,
    num_labels: int,
    seed: int,
    scheme: str = "none",
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    head: str = NEW_HEAD,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Classifier, dict[str, Any]]:
    """The encoder of a HuggingFace folder, quantized unless the scheme is "none", under a head.

    On a mesh the encoder is sharded by its logical axis names (`jpeft.models.logical_shardings`) and a new head is
    replicated.

    Args:
        head: "new" is a linear layer from the seed, on the mean of the states; "folder" is that of a
            `…ForSequenceClassification` with as many labels, and a new one for other folders.
        say: receives why the head of a folder does not fit.

    >>> classifier, params = load_classifier(resolve_model("minilm"), num_labels=2, seed=0)  # doctest: +SKIP
    """
    if is_decoder(folder):
        raise UserError(f"{folder}: a language model; expected an encoder such as BERT, to classify texts with")
    shardings = None if mesh is None else lambda encoder: logical_shardings(encoder, mesh)
    found = getattr(abstract_model(folder)[0], "num_labels", None)  # None: the family knows no heads
    fits = head == FOLDER_HEAD and found == num_labels
    if head == FOLDER_HEAD and found and not fits:
        say(f"{folder}: its head has {found} labels, the data {num_labels}: the head is a new one")
    options = {} if fits or found is None else {"pooler": False, "head": False}
    quantize = None if scheme == "none" else {"scheme": scheme, **({"exclude": r".*classifier(/.*)?"} if fits else {})}
    with quantizing(scheme):
        encoder, params = load_model(
            folder, param_dtype=jnp.dtype(dtype), quantize=quantize, shardings=shardings, **options
        )
    if fits:
        return with_own_head(encoder, params)
    states = _abstract_states(encoder, params)
    if states.ndim != 3:
        raise UserError(f"{folder}: expected an encoder with states [batch, length, hidden], found {states.shape}")
    new = _new_head(states, num_labels, seed)
    new = new if mesh is None else shard(new, mesh, [])
    return Classifier(encoder, num_labels), {"encoder": params, HEAD: new}


def _in_order_of_head(labels: tuple[str, ...], folder: Path, head: str, say: Callable[[str], None]) -> tuple[str, ...]:
    """The labels of the data in the order of the logits: that of the folder's head, if it is used."""
    if head != FOLDER_HEAD or is_decoder(folder):
        return labels
    model, _ = abstract_model(folder)
    if getattr(model, "num_labels", 0) != len(labels):
        return labels
    given = read_json(folder / "config.json", UserError).get("id2label") or {}
    names = [str(given.get(str(i), f"LABEL_{i}")) for i in range(len(labels))]
    for key in (str, str.casefold):
        own = {key(label): label for label in labels}
        if sorted(own) == sorted(map(key, names)) and len(own) == len(labels):
            say(f"{folder}: the run starts from its head, of the labels {', '.join(names)}")
            return tuple(own[key(name)] for name in names)
    say(
        f"{folder}: the run starts from its head, of the labels {', '.join(names)}; the data's have other names and "
        f"take their places in this order: {', '.join(labels)}"
    )
    return labels


def _reshape(
    classifier: Classifier,
    params: Mapping[str, Any],
    config: Config,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Classifier, dict[str, Any], range]:
    """The classifier with rows for all tokens, its parameters, and the new rows; see `jpeft.recipes.vocabulary`."""

    def tokens() -> int:
        return max(reading.load_tokenizer(folder, config.max_length).get_vocab().values()) + 1

    encoder, own, rows = reshape(classifier.encoder, params["encoder"], config, tokens, say)
    return classifier.clone(encoder=encoder), {**params, "encoder": own}, rows


def _abstract_states(encoder: Any, params: Any) -> Any:
    def run(params: Any, ids: Any, mask: Any) -> Any:
        return encoder.apply({"params": params}, ids, attention_mask=mask)

    return jax.eval_shape(run, params, *example_inputs())


def _new_head(states: Any, num_labels: int, seed: int) -> dict[str, jax.Array]:
    # By numpy and without a transcendental function, so that every machine computes the same bits: an adapter is loaded
    # on the base that it was trained on.
    width, rng = states.shape[-1], np.random.default_rng(seed)
    kernel = rng.uniform(-1, 1, (width, num_labels)) * math.sqrt(3 / width)  # variance 1 / width
    return {"kernel": jnp.asarray(kernel, states.dtype), "bias": jnp.zeros(num_labels, states.dtype)}


def example_inputs(batch: int = 2, length: int = 8) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Abstract `(input_ids, attention_mask)`, enough to bind a method.

    >>> [inputs.shape for inputs in example_inputs()]
    [(2, 8), (2, 8)]
    """
    return abstract_ids(batch, length), abstract_ids(batch, length)


def load_tokenizer(folder: Path, classifier: Classifier, max_length: int) -> Tokenizer:
    """The model's tokenizer, if the model takes texts of `max_length` tokens.

    >>> load_tokenizer(folder, classifier, max_length=128)  # doctest: +SKIP
    """
    base.check_length(max_length, labeled.length_limit(cast(Any, classifier.encoder).config))
    return reading.load_tokenizer(folder, max_length)


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    classifier: Classifier,
    max_length: int,
    labels: np.ndarray | None = None,
) -> labeled.Encoded:
    """The token ids of texts, with the padding and the vocabulary of the classifier.

    >>> encode(["good tea"], tokenizer, classifier, max_length=128).ids  # doctest: +SKIP
    """
    config = cast(Any, classifier.encoder).config
    pad_id = int(getattr(config, "pad_token_id", None) or 0)  # 0 for BERT, 1 for RoBERTa
    return labeled.encode(texts, tokenizer, max_length, labels, pad_id, getattr(config, "vocab_size", None))


# --------------------------------------------------------------------------------------------------- loss and scores


def loss_fn(
    peft: Peft, train_mode: bool = True, mesh: AnyMesh | None = None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Mean cross-entropy over the rows of a batch with a weight, as `jpeft.train_step` takes it.

    Args:
        train_mode: turns dropout on, the model's and the adapter's.
        mesh: ignored; batches may be on any.

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
    """The compiled `(params, adapter, input_ids, attention_mask) -> logits`. Compiles once per shape; keep it.

    >>> logits = scorer(peft)(params, adapter, batch.input_ids, batch.attention_mask)  # doctest: +SKIP
    """

    def logits(params: Any, adapter: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        with constrained(layout_on(mesh, ids)):
            return peft.apply(params, adapter, ids, mask)

    return jax.jit(logits, out_shardings=None if mesh is None else replicated(mesh))


class Scores(NamedTuple):
    """The accuracy and the mean cross-entropy of an evaluation."""

    accuracy: float
    loss: float


def probabilities(
    score: Scorer, params: Any, adapter: Any, batches: Batches, mesh: Mesh | None = None
) -> Float[np.ndarray, "rows labels"]:
    """The class probabilities of every text, in the order of the data.

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
    """The accuracy and the mean cross-entropy over labeled batches.

    >>> evaluate(scorer(peft), params, adapter, Batches(encoded, 64)).accuracy  # doctest: +SKIP
    """
    found, labels = probabilities(score, params, adapter, batches, mesh), batches.encoded.labels
    likelihood = np.maximum(found[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
    return Scores(float((found.argmax(-1) == labels).mean()), float(-np.log(likelihood).mean()))


# --------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationJob(Job):
    """A `Job` that trains a classifier.

    Attributes:
        source: the data files and their columns.
        labels: the classes, in the order of the logits.
        test: the evaluation batches.
    """

    source: DataSource
    labels: tuple[str, ...]
    test: Batches

    @property
    def task_record(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "columns": {"text": self.source.text, "label": self.source.label}}

    def loss_fn(self) -> Any:
        return loss_fn(self.peft, train_mode=bool(self.config.dropout))

    def evaluator(self) -> Callable[[Any], dict[str, float]]:
        score = scorer(self.peft, self.mesh)

        def run(adapter: Any) -> dict[str, float]:
            scores = evaluate(score, self.params, adapter, self.test, self.mesh)
            return {"eval_accuracy": scores.accuracy, "eval_loss": scores.loss}

        return run

    def describe(self, metrics: Mapping[str, Any]) -> str:
        return f"accuracy {metrics['eval_accuracy']:.1%}, loss {metrics['eval_loss']:.4f}"

    def result(self, fresh: Any, adapter: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        counts = np.bincount(self.test.encoded.labels, minlength=len(self.labels))
        return {
            "accuracy_before": before["eval_accuracy"],
            "accuracy_after": after["eval_accuracy"],
            "majority_baseline": float(counts.max() / counts.sum()),
            "train_examples": len(self.train.encoded.ids),
            "eval_examples": len(self.test.encoded.ids),
            "labels": list(self.labels),
        }


def method_defaults(kind: type[Method]) -> dict[str, Any]:
    """Methods that train base leaves leave the head out: `complete` trains it."""
    return {"exclude": HEAD} if issubclass(kind, LeafMethod) else {}


def complete(method: Method) -> Method:
    """The method, with the head trained beside it.

    >>> import jpeft
    >>> complete(jpeft.BitFit(exclude=HEAD)).members[1].targets
    'classifier'
    """
    return Chain(method, Train(HEAD))


def text_ids(folder: Path, text: str) -> list[int]:
    """The token ids of a text, without special tokens.

    >>> text_ids(resolve_model("minilm"), "Is the review good?")  # doctest: +SKIP
    """
    tokenizer = reading.load_tokenizer(folder, len(text) + 8)  # special tokens, which are not counted then
    return tokenizer.encode(text, add_special_tokens=False).ids


def text_inputs(ids: Sequence[int]) -> tuple[Any, ...]:
    """The inputs of a classifier for one text, all of whose tokens are seen.

    >>> [x.shape for x in text_inputs([5, 6])]
    [(1, 2), (1, 2)]
    """
    return jnp.asarray([ids], jnp.int32), jnp.ones((1, len(ids)), jnp.int32)


def prepare(config: Config, method: Method | None, reporter: Reporter, setup: Setup) -> ClassificationJob:
    """Reads the data, loads the encoder under its head, and binds the method."""
    _check_remat(setup)
    source = resolve_data(config.data, config.eval, config.text, config.label, reporter.say)
    read = functools.partial(labeled.read, text=source.text, label=source.label)
    examples = read(source.train)
    labels = labeled.label_names(examples)
    train, test = base.evaluation_data(examples, source.eval, read, labeled.train_test_split, config, reporter)
    folder = resolve_model(config.model, reporter.say)
    labels = _in_order_of_head(labels, folder, config.head, reporter.say)
    _check_labels(config, labels)
    ids = [labeled.label_ids(part, labels) for part in (train, test)]
    classifier, params = load_classifier(
        folder,
        len(labels),
        _head_seed(config),
        config.quantize,
        mesh=setup.mesh,
        dtype=config.dtype,
        head=config.head,
        say=reporter.say,
    )
    classifier, params, rows = _reshape(classifier, params, config, folder, reporter.say)
    tokenizer = load_tokenizer(folder, classifier, config.max_length)

    def whole(own: Method) -> Method:
        own = own if method is not None else _with_head(own, config, classifier, params)
        return with_rows(own, classifier.encoder, rows, "encoder/")

    config, peft, start = begin(config, method, classifier, params, example_inputs(), whole, reporter.say)
    positions = labeled.length_limit(cast(Any, classifier.encoder).config)
    base.check_length(config.max_length, positions, peft.virtual_tokens)
    encoded, test_encoded = (
        encode(part.texts, tokenizer, classifier, config.max_length, part_ids)
        for part, part_ids in zip((train, test), ids, strict=True)
    )
    if unused := dict.fromkeys((*examples.unused, *test.unused)):
        reporter.say(f"{examples.source}: columns that are not read: {', '.join(unused)}")
    for part, result in ((train, encoded), (test, test_encoded)):
        if result.truncated:
            reporter.say(
                f"{part.source}: {result.truncated:,} of {len(part):,} texts are longer than {config.max_length} "
                "tokens and truncated; see `max_length`"
            )
    batch = math.lcm(_EVAL_BATCH, 1 if setup.mesh is None else data_ways(setup.mesh))
    return ClassificationJob(
        config=config.located(),
        model=folder,
        files={"train": source.train, "eval": source.eval},
        params=params,
        peft=peft,
        train=Batches(encoded, config.batch_size, config.seed, config.epochs),
        mesh=setup.mesh,
        start=start,
        source=source,
        labels=labels,
        test=Batches(test_encoded, batch),
    )


def _head_seed(config: Config) -> int:
    return config.seed if config.head_seed is None else config.head_seed


def _check_labels(config: Config, labels: Sequence[str]) -> None:
    """Raises a UserError if a run begins from the adapter of one with other labels."""
    if config.adapter is None or not run_folder.is_run(run := as_path(config.adapter)):
        return
    if (own := run_folder.read_record(run).get("labels")) is not None and list(labels) != own:
        raise UserError(
            f"`adapter` {config.adapter} was trained on the labels {', '.join(own)}, and the data's are "
            f"{', '.join(labels)}: its head has no meaning for them"
        )


def _with_head(method: Method, config: Config, classifier: Classifier, params: Any) -> Method:
    """The method of an adapter, with the head trained beside it."""
    published = config.adapter is not None and (as_path(config.adapter) / HF_CONFIG).is_file()
    trained = [member for member in method.methods() if isinstance(member, Train)] if published else []
    sites = [site for member in trained for site in base.bind(member, classifier, params, example_inputs()).sites]
    if any(site.path[0] == HEAD for site in sites) and not classifier.pretrained:
        raise UserError(
            f"`adapter` {config.adapter} holds a head, {HEAD!r}, for HuggingFace's pooled state, but this run's is on "
            "the mean of the states: give a `model` with a sequence classifier's head of as many labels"
        )
    return complete(method)


def abstract(config: Config, model: Any, params: Any, setup: Setup) -> AbstractModel:
    """A classifier of two classes on an abstract encoder, and a batch for it."""
    if isinstance(model, Decoder):
        raise UserError(f"`model` {config.model}: a language model; plan for it with `task` chat")
    _check_remat(setup)
    model, params = without_parts(model, params)
    head = jax.eval_shape(lambda: _new_head(_abstract_states(model, params), _PLANNED_LABELS, config.seed))
    ids, row = abstract_ids(config.batch_size, config.max_length), abstract_ids(config.batch_size)
    weight = cast(Any, jax.ShapeDtypeStruct(row.shape, jnp.float32))
    return AbstractModel(
        model=Classifier(model, _PLANNED_LABELS),
        params={"encoder": params, HEAD: head},
        inputs=example_inputs(),
        names={"encoder": logical_names(model)},
        batch=Batch(ids, ids, labels=row, weight=weight, rows=row),
        positions=labeled.length_limit(model.config),
    )


def _check_remat(setup: Setup) -> None:
    if setup.remat is not None:
        raise UserError(f"`remat` {setup.remat}: is for language models, not for encoders")


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The accuracies, and that of always predicting the most frequent class."""
    names = ("accuracy_before", "accuracy_after", "majority_baseline")
    return [(name.replace("_", " "), f"{result[name]:.1%}") for name in names]


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, eq=False)
class Trained:
    """The classifier of a run with its adapter, ready for use.

    Attributes:
        record: the content of the run's config.json.
        source: the folder that the encoder was loaded from.
        classifier: the module.
        params: its base weights.
        peft: the bound method.
        adapter: the trained adapter.
        tokenizer: the encoder's tokenizer.
    """

    record: Mapping[str, Any]
    source: Path
    classifier: Classifier
    params: Any
    peft: Peft
    adapter: Any
    tokenizer: Any

    @property
    def config(self) -> Config:
        """The configuration of the run.

        >>> run.config.method  # doctest: +SKIP
        'lora'
        """
        return Config(**self.record["config"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the logits.

        >>> run.labels  # doctest: +SKIP
        ('great', 'other')
        """
        return tuple(self.record["labels"])

    def predict(self, texts: Sequence[str], batch_size: int = 64) -> list[tuple[str, float]]:
        """The most likely label of every text, and its probability.

        >>> run.predict(["good tea"])  # doctest: +SKIP
        """
        encoded = encode(texts, self.tokenizer, self.classifier, self.config.max_length)
        batches = Batches(encoded, min(batch_size, len(texts)))
        found = probabilities(scorer(self.peft), self.params, self.adapter, batches)
        if (bad := np.flatnonzero(~np.isfinite(found).all(axis=-1))).size:
            raise UserError(f"text {bad[0] + 1}: the model's output is not finite; was the run's `lr` too high?")
        return [(self.labels[row.argmax()], float(row.max())) for row in found]

    def export(self, out: Path, how: Merging = _MERGING) -> None:
        """Writes a HuggingFace folder with the adapter merged in.

        >>> run.export(Path("merged"))  # doctest: +SKIP
        """
        config = self.config

        def reload() -> Any:
            classifier, params = load_classifier(self.source, len(self.labels), _head_seed(config), head=config.head)
            return _reshape(classifier, params, config, self.source)[1]

        params = base.unrounded(self.params, self.source, config.dtype, reload)
        merged = base.merge(self.peft, params, self.adapter, how)
        about = f"{config.model} fine-tuned on {config.data} with {config.method} by jpeft."
        with base.writing(out):
            export(out, self.classifier, merged, self.labels, self.source, config.max_length, about, how)


def open_run(run: str | Path, log: Callable[[str], None] = lambda line: None) -> Trained:
    """The classifier of a run, with its adapter or, while it is not finished, that of a checkpoint.

    >>> open_run("runs/minilm-lora-1").labels  # doctest: +SKIP
    ('great', 'other')
    """
    record = run_folder.usable(run := as_path(run))
    config = Config(**record["config"])
    if config.task != "classify":
        raise UserError(f"{run}: was trained to chat, not to label texts; use jpeft chat {run}")
    folder = resolve_model(config.model, log)
    classifier, params = load_classifier(
        folder, len(record["labels"]), _head_seed(config), config.quantize, dtype=config.dtype, head=config.head
    )
    classifier, params, _ = _reshape(classifier, params, config, folder)
    tokenizer = load_tokenizer(folder, classifier, config.max_length)
    if file_sha256(folder / "tokenizer.json") != record["tokenizer"]:
        raise UserError(
            f"{folder}/tokenizer.json changed since {run} was trained, so texts would get other token ids; restore it"
        )
    peft, adapter = load_of_run(run, record, classifier, params, example_inputs(), log)
    return Trained(record, folder, classifier, params, peft, adapter, tokenizer)


def hf_options(trained: Trained) -> dict[str, Any]:
    """The arguments of `jpeft.hf.save` for the adapter of an opened run.

    Raises:
        UserError: the head is not one of HuggingFace's.

    >>> hf_options(open_run("runs/bert-lora-1"))["task_type"]  # doctest: +SKIP
    'SEQ_CLS'
    """
    if not trained.classifier.pretrained:
        raise UserError(
            "`format` hf: the head is on the mean of the states, as that of no class of transformers: use jpeft merge, "
            "or `format` jpeft"
        )
    names = as_loaded(trained.classifier, trained.params)[0].torch_names
    return {"task_type": "SEQ_CLS", "prefix": {tree or "encoder/": torch for tree, torch in names.items()}}


def export_run(run: Path, out: Path, how: Merging = _MERGING, log: Callable[[str], None] = lambda line: None) -> str:
    """Writes a HuggingFace folder of a run, its adapter merged in. Returns how to use the folder.

    >>> export_run(Path("runs/minilm-lora-1"), Path("merged"))  # doctest: +SKIP
    'its README.md shows how to load it with the head'
    """
    if how.requantize:
        raise UserError("`requantize`: a classifier's folder holds plain weights")
    check_writable(out := as_path(out))
    open_run(run, log).export(out, how)
    return "its README.md shows how to load it with the head"


def export(
    out: Path,
    classifier: Any,
    merged: Any,
    labels: Sequence[str],
    source: Path,
    max_length: int,
    about: str,
    how: Merging = _MERGING,
) -> None:
    """Writes a merged classifier: a HuggingFace folder of encoder and tokenizer, and the head.

    A head from the folder is written as its own. A new one, which no class of transformers has, is a file of its own.

    Args:
        classifier: the classifier, or its encoder if the head is new.
        merged: `peft.merge(params, adapter)`.
        source: the folder that the encoder was loaded from.
        max_length: tokens of a text, for the folder's README.md.
        about: a line on how the model was trained, for the folder's README.md.
        how: the dtype of the encoder's weights. The head is float32.

    >>> export(out, classifier, merged, ("bad", "good"), folder, max_length=128, about="LoRA.")  # doctest: +SKIP
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder, nothing was written")
    own = isinstance(classifier, Classifier) and classifier.pretrained
    readme = (_README_OF_OWN_HEAD if own else _README).format(
        about=about, labels=", ".join(labels), folder=repr(str(absolute(out))), max_length=max_length
    )
    extra = {"README.md": readme.encode()}
    if own:
        model, params = as_loaded(classifier, merged)
    else:
        model, params = getattr(classifier, "encoder", classifier), merged["encoder"]
        kernel, bias = (np.asarray(merged[HEAD][name], np.float32) for name in ("kernel", "bias"))
        extra["classifier.safetensors"] = serialize({"weight": kernel.T, "bias": bias}, {"format": "pt"})
    with new_folder(out) as folder:
        save_model(folder, model, params, source=source, extra_files=extra, **how.saving)
        config = read_json(folder / "config.json", UserError)
        config["id2label"] = {str(index): name for index, name in enumerate(labels)}
        config["label2id"] = {name: index for index, name in enumerate(labels)}
        write_json(folder / "config.json", config)


_README_OF_OWN_HEAD = """\
# A classifier merged by jpeft

{about}

Labels: {labels}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model={folder})
print(classify(["a text", "another"], truncation=True, max_length={max_length}))
```
"""

_README = """\
# A classifier merged by jpeft

{about}

Labels: {labels}.

`config.json`, `model.safetensors` and the tokenizer are an ordinary encoder with the adapter merged into its weights:
`AutoModel` and `AutoTokenizer` load them. The head works on the mean of the states over all tokens. No class of
transformers does that (`AutoModelForSequenceClassification` would put a new, untrained head on it), so the head's
weight and bias are in `classifier.safetensors`, and these lines apply them:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = {folder}
tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
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
