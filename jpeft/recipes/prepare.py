"""What a job works on: from a configuration to a model, an adapter's method, data and how to judge them.

A task is one of `Classification` and `Chat`. They differ in the model that they load, in their batches and loss, and in
what an evaluation finds; `jpeft.finetune` trains either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from jpeft.core.fingerprint import fingerprint
from jpeft.core.peft import Peft
from jpeft.core.placement import AnyMesh
from jpeft.errors import UserError
from jpeft.files import file_sha256
from jpeft.methods import METHODS, LeafMethod, Method, from_dict
from jpeft.methods.chain import Chain
from jpeft.methods.lora import LoRA
from jpeft.methods.train import Train
from jpeft.parallel.batches import data_ways, local_rows, shard_batch
from jpeft.parallel.mesh import DATA_AXES, SEQUENCE_AXIS
from jpeft.recipes import finished, run_folder
from jpeft.recipes.assets import DataSource, resolve_conversations, resolve_data, resolve_model
from jpeft.recipes.config import CHAT, Config, Setup, parse_targets
from jpeft.recipes.tasks import chat, classification
from jpeft.text import conversations, labeled

# Where a method's name on the command line is not its class's in lower case.
ALIASES: Mapping[str, str] = {"prefix": "PrefixTuning", "full": "Train"}
_PLAIN = Setup()
_EVAL_BATCH = 64
_SAMPLE_TOKENS = 200


class Reporter(Protocol):
    """How a job speaks to whoever started it."""

    def say(self, text: str) -> None:
        """A line or a table, for people."""

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        """A step was made."""


class NullReporter:
    """A `Reporter` that says nothing.

    >>> NullReporter().say("nothing is printed")
    """

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        """Nothing."""


# ----------------------------------------------------------------------------------------------------------- method


def build_method(config: Config) -> Method:
    """The method that a configuration names; a classification head is trained beside it.

    >>> build_method(Config()) == jpeft.Chain(jpeft.LoRA(rank=8, alpha=16), jpeft.Train("classifier"))
    True
    """
    known = {**{name.lower(): name for name in METHODS}, **ALIASES}
    asked = config.method.lower()
    if asked not in known:
        raise UserError(f"--method {config.method}: unknown; there are {', '.join(sorted(known))}")
    kind = METHODS[known[asked]]
    fields = _given_fields(config, kind)
    if asked == "full":
        if "targets" in fields:
            raise UserError("--method full trains everything; --method train takes --targets")
        if config.quantize != "none":
            raise UserError(f"--method full: codes have no gradient; it needs --quantize none, not {config.quantize}")
        return Train(".*", **fields)
    if config.task == CHAT:
        fields = {"targets": "all-linear"} | fields if kind is LoRA else fields
    elif issubclass(kind, LeafMethod):
        fields = {"exclude": classification.HEAD} | fields  # the head is the other method's
    try:
        method = from_dict({"method": kind.__name__, **fields})
    except (ValueError, TypeError) as error:
        raise UserError(f"--method {config.method}: {error}") from error
    return method if config.task == CHAT else Chain(method, Train(classification.HEAD))


def _given_fields(config: Config, kind: type[Method]) -> dict[str, Any]:
    """The fields of a method that were asked for, and the job's defaults for the rank and its scale."""
    fields: dict[str, Any] = {name: getattr(config, name) for name in ("rank", "alpha", "dropout", "targets")}
    fields = {name: value for name, value in fields.items() if value is not None} | dict(config.settings)
    if isinstance(fields.get("targets"), str):
        fields["targets"] = parse_targets(fields["targets"])
    allowed = {entry.name for entry in dataclasses.fields(kind)}
    for name in fields:
        if name not in allowed:
            raise UserError(f"--method {config.method} has no {name!r}; it has {', '.join(sorted(allowed))} (--set)")
    if {"rank", "alpha"} <= allowed:
        fields = {"rank": 8} | fields
        fields = {"alpha": 2 * fields["rank"]} | fields
    return fields


# -------------------------------------------------------------------------------------------------------------- job


class Task(Protocol):
    """What differs between jobs."""

    @property
    def record(self) -> dict[str, Any]:
        """What config.json says beside what every job's does."""
        ...

    def loss_fn(self, job: Job) -> Any:
        """As `jpeft.train_step` takes it."""
        ...

    def prepare_batch(self, batch: Any, count: Any) -> Any:
        """This host's part of a batch as the loss takes it; `count` is of the whole."""
        ...

    def evaluator(self, job: Job) -> Callable[[Any], dict[str, float]]:
        """Of an adapter, `eval_loss` and whatever else is found."""
        ...

    def say(self, found: Mapping[str, Any]) -> str:
        """An evaluation in words."""
        ...

    def result(self, job: Job, fresh: Any, adapter: Any, first: Mapping[str, Any], last: Mapping[str, Any]) -> dict:
        """What the final table shows of the first and the last evaluation."""
        ...


# What a resumed run must find as it was, by its name in the record.
UNCHANGED: Mapping[str, str] = {
    "data": "its data",
    "labels": "its labels",
    "method": "its method",
    "steps": "its number of steps",
    "tokenizer": "its model's tokenizer.json",
}


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that a run needs, in memory and checked. `model` is the folder or file it came from."""

    config: Config
    model: Path
    files: Mapping[str, Path | None]
    params: Any
    peft: Peft
    train: Any
    task: Task
    mesh: Mesh | None = None

    @property
    def steps(self) -> int:
        """All that the run makes: of every epoch, or as many as were asked for.

        >>> job.steps  # doctest: +SKIP
        """
        return min(len(self.train), self.config.steps or len(self.train))

    def batches(self, start: int) -> Iterator[tuple[Any, Any]]:
        """The training batches from a step on, as the loss takes them and in their place, and what each holds.

        >>> next(job.batches(40))  # doctest: +SKIP
        """
        return spread(self.train, self.mesh, start, self.task.prepare_batch)

    @property
    def record(self) -> dict[str, Any]:
        """What config.json says: the choices, and what they led to.

        >>> job.record["labels"]  # doctest: +SKIP
        """
        tokenizer = self.model / "tokenizer.json" if self.model.is_dir() else self.model
        return {
            "format": run_folder.FORMAT,
            "config": dataclasses.asdict(self.config),
            "steps": self.steps,
            "method": self.peft.method.to_dict(),
            "data": {name: None if path is None else file_sha256(path) for name, path in self.files.items()},
            "tokenizer": file_sha256(tokenizer),
            "base": fingerprint(self.params),
            **self.task.record,
        }


def prepare(config: Config, reporter: Reporter, setup: Setup = _PLAIN) -> Job:
    """Read, check and bind all that a configuration names. Writes nothing but the cache of assets.

    Args:
        setup: what it will run on, and how.

    >>> prepare(Config(), NullReporter()).peft.summary()  # doctest: +SKIP
    """
    method, mesh = build_method(config), setup.mesh
    if mesh is not None:
        check_mesh(config, mesh)
    try:
        return (_prepare_chat if config.task == CHAT else _prepare_classification)(config, method, reporter, setup)
    except ValueError as error:
        if mesh is None or type(error) is not ValueError:
            raise
        raise UserError(f"--mesh: {config.model}: {error}") from error  # an axis of a weight that does not divide


def check_mesh(config: Config, mesh: AnyMesh) -> None:
    """Raises a UserError where a batch does not divide over a mesh.

    >>> check_mesh(Config(batch_size=8), jax.sharding.AbstractMesh((4,), ("fsdp",)))  # doctest: +SKIP
    """
    if config.batch_size % (ways := data_ways(mesh) * config.accumulate):
        parts = f" in each of {config.accumulate} micro-batches" * (config.accumulate > 1)
        axes = " and ".join(name for name in DATA_AXES if name in mesh.axis_names)
        raise UserError(f"--batch-size {config.batch_size} does not divide over the {data_ways(mesh)} parts that the "
                        f"mesh's {axes} make{parts}; a multiple of {ways} does")  # fmt: skip
    if config.max_length % (parts := mesh.shape.get(SEQUENCE_AXIS, 1)):
        raise UserError(f"--max-length {config.max_length} does not divide over the {parts} devices of the mesh's axis "
                        f"{SEQUENCE_AXIS}")  # fmt: skip


def spread(
    batches: Any, mesh: Mesh | None, start: int = 0, prepare: Callable[[Any, Any], Any] = lambda batch, count: batch
) -> Iterator[tuple[Any, Any]]:
    """Batches from one on, each host reading its own rows alone and putting them in their place, and what each holds.

    >>> [count.examples for _, count in spread(job.train, None)]  # doctest: +SKIP
    [16, 16, 9]
    """
    rows = None if mesh is None else local_rows(batches.batch_size, mesh)
    for batch, count in zip(batches.start(start, rows), batches.counts(start), strict=True):
        made = prepare(batch, count)
        yield made if mesh is None else shard_batch(made, mesh, batches.batch_size), count


def _bind(method: Method, model: Any, params: Any, inputs: tuple[Any, ...]) -> Peft:
    try:
        return method.bind(model, params, *inputs)
    except ValueError as error:  # a target that names nothing, a field that does not fit
        raise UserError(str(error)) from error


def _some(examples: Any, limit: int) -> Any:
    """The first of the examples to evaluate on, or all where there is no limit."""
    return examples.take(range(limit), examples.source) if 0 < limit < len(examples) else examples


# ---------------------------------------------------------------------------------------------------- classification


@dataclass(frozen=True, eq=False)
class Classification:
    """Labels of texts."""

    config: Config
    source: DataSource
    labels: tuple[str, ...]
    test: labeled.Batches

    @property
    def record(self) -> dict[str, Any]:
        """Labels in the order of the logits, and where the data have texts and labels."""
        return {"labels": list(self.labels), "columns": {"text": self.source.text, "label": self.source.label}}

    def loss_fn(self, job: Job) -> Any:
        return classification.loss_fn(job.peft, train_mode=bool(self.config.dropout))

    def prepare_batch(self, batch: labeled.Batch, count: labeled.Count) -> labeled.Batch:
        return batch

    def evaluator(self, job: Job) -> Callable[[Any], dict[str, float]]:
        score = classification.scorer(job.peft, job.mesh)

        def evaluate(adapter: Any) -> dict[str, float]:
            scores = classification.evaluate(score, job.params, adapter, self.test, job.mesh)
            return {"eval_accuracy": scores.accuracy, "eval_loss": scores.loss}

        return evaluate

    def say(self, found: Mapping[str, Any]) -> str:
        return f"accuracy {found['eval_accuracy']:.1%}, loss {found['eval_loss']:.4f}"

    def result(self, job: Job, fresh: Any, adapter: Any, first: Mapping[str, Any], last: Mapping[str, Any]) -> dict:
        counts = np.bincount(self.test.encoded.labels, minlength=len(self.labels))
        return {
            "accuracy_before": first["eval_accuracy"],
            "accuracy_after": last["eval_accuracy"],
            "majority_baseline": float(counts.max() / counts.sum()),
            "train_examples": len(job.train.encoded.ids),
            "eval_examples": len(self.test.encoded.ids),
            "labels": list(self.labels),
        }


def _prepare_classification(config: Config, method: Method, reporter: Reporter, setup: Setup) -> Job:
    if setup.remat is not None:
        raise UserError(f"--remat {setup.remat}: is for language models, not for encoders")
    source = resolve_data(config.data, config.eval, config.text, config.label, reporter.say)
    train = labeled.read(source.train, source.text, source.label)
    labels = labeled.label_names(train)
    if source.eval is None:
        train, test = labeled.train_test_split(train, config.seed)
        reporter.say(f"no --eval: {len(test):,} of the examples are held out to evaluate on")
    else:
        test = labeled.read(source.eval, source.text, source.label)
    test = _some(test, config.eval_examples)
    train_ids, test_ids = labeled.label_ids(train, labels), labeled.label_ids(test, labels)
    folder = resolve_model(config.model, reporter.say)
    classifier, params = classification.load_classifier(
        folder, len(labels), config.seed, config.quantize, mesh=setup.mesh, dtype=config.dtype
    )
    tokenizer = classification.load_tokenizer(folder, classifier, config.max_length)
    peft = _bind(method, classifier, params, classification.example_inputs())
    encoded, test_encoded = (
        classification.encode(examples.texts, tokenizer, classifier, config.max_length, ids)
        for examples, ids in ((train, train_ids), (test, test_ids))
    )
    batches = labeled.Batches(encoded, config.batch_size, config.seed, config.epochs)
    rows = math.lcm(_EVAL_BATCH, 1 if setup.mesh is None else data_ways(setup.mesh))
    task = Classification(config, source, labels, labeled.Batches(test_encoded, rows))
    files = {"train": source.train, "eval": source.eval}
    return Job(config.located(), folder, files, params, peft, batches, task, setup.mesh)


# -------------------------------------------------------------------------------------------------------------- chat


@dataclass(frozen=True, eq=False)
class Chat:
    """Answers in conversations."""

    config: Config
    codec: Any
    test: conversations.Batches
    held_out: conversations.Conversations

    @property
    def record(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def loss_fn(self, job: Job) -> Any:
        return chat.loss_fn(job.peft, train_mode=bool(self.config.dropout), mesh=job.mesh)

    def prepare_batch(self, batch: conversations.Batch, count: conversations.Count) -> conversations.Batch:
        return chat.balanced(batch, count.answer_tokens, self.config.batch_size)

    def evaluator(self, job: Job) -> Callable[[Any], dict[str, float]]:
        score = chat.scorer(job.peft, job.mesh)

        def evaluate(adapter: Any) -> dict[str, float]:
            placed = (batch for batch, _ in spread(self.test, job.mesh))
            scores = chat.evaluate(score, job.params, adapter, placed)
            return {"eval_loss": scores.loss, "eval_token_accuracy": scores.accuracy,
                    "eval_perplexity": scores.perplexity}  # fmt: skip

        return evaluate

    def say(self, found: Mapping[str, Any]) -> str:
        return f"perplexity of held-out answers {found['eval_perplexity']:.3f}, loss {found['eval_loss']:.4f}"

    def result(self, job: Job, fresh: Any, adapter: Any, first: Mapping[str, Any], last: Mapping[str, Any]) -> dict:
        held = job.train.count
        return {
            "perplexity_before": first["eval_perplexity"],
            "perplexity_after": last["eval_perplexity"],
            "train_examples": len(job.train.encoded),
            "left_out": len(job.train.encoded.left_out),
            "eval_examples": len(self.test.encoded),
            "padding": held.padding,
            "shapes": sorted(conversations.shapes(job.train)),
            "samples": self._samples(job, fresh, adapter),
        }

    def _samples(self, job: Job, fresh: Any, adapter: Any) -> list[dict[str, Any]]:
        """The first held-out prompts, answered before training and after."""
        if not self.config.samples:
            return []
        asked = self._prompts[: self.config.samples]
        before, after = (
            finished.samples(job.peft, job.params, leaves, self.codec, asked, _SAMPLE_TOKENS)
            for leaves in (fresh, adapter)
        )
        return [
            {"prompt": a.prompt, "reference": a.reference, "before": a.answer, "after": b.answer,
             "right_before": a.right, "right_after": b.right}
            for a, b in zip(before, after, strict=True)
        ]  # fmt: skip

    @cached_property
    def _prompts(self) -> list[Any]:
        return conversations.prompts(self.held_out)


def _prepare_chat(config: Config, method: Method, reporter: Reporter, setup: Setup) -> Job:
    train_file, eval_file = resolve_conversations(config.data, config.eval, reporter.say)
    for name in ("text", "label"):
        if getattr(config, name) is not None:
            raise UserError(f"--{name} names a column of labeled texts; --task chat reads conversations")
    train = conversations.read(train_file)
    if eval_file is None:
        train, test = conversations.train_test_split(train, config.seed)
        reporter.say(f"no --eval: {len(test):,} of the examples are held out to evaluate on")
    else:
        test = conversations.read(eval_file)
    test = _some(test, config.eval_examples)
    path = resolve_model(config.model, reporter.say)
    model, params = chat.load_base(path, config.quantize, mesh=setup.mesh, dtype=config.dtype, remat=setup.remat)
    codec = chat.load_chat_tokenizer(path, model, config.max_length)
    peft = _bind(method, model, params, chat.example_inputs())
    encoded, test_encoded = (conversations.encode(examples, codec, config.max_length) for examples in (train, test))
    for examples, made in ((train, encoded), (test, test_encoded)):
        if made.left_out:
            first = ", ".join(map(str, made.left_out[:3]))
            reporter.say(f"{examples.source}: {len(made.left_out):,} of {len(examples):,} examples are longer than "
                         f"{config.max_length} tokens and left out (at line {first}, …); see --max-length")  # fmt: skip
    batches = conversations.Batches(
        encoded, config.batch_size, config.max_length, config.seed, config.epochs, config.packed
    )
    shapes = sorted(conversations.shapes(batches))
    reporter.say(
        f"{len(encoded):,} examples in {len(batches):,} batches of {len(shapes)} shape{'s' * (len(shapes) > 1)} "
        f"({', '.join(f'{rows}×{width}' for rows, width in shapes)}), {batches.count.padding:.1%} padding"
    )
    test_batches = conversations.Batches(test_encoded, config.batch_size, config.max_length)
    task = Chat(config, codec, test_batches, test)
    files = {"train": train_file, "eval": eval_file}
    return Job(config.located(), path, files, params, peft, batches, task, setup.mesh)
