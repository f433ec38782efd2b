"""The job behind `jpeft finetune`: from a configuration to a run folder, resumable at any moment.

    result = finetune(Config(data="train.csv", eval="test.csv", text="review", label="stars"), Path("runs/stars"))

A run folder holds `config.json` (all that was chosen), `metrics.jsonl` (a line a step and an evaluation),
`checkpoints/`, and at the end `adapter/`, `loss.png` and `result.json`. A step depends on the configuration, the seed
and the step before it alone, so a run that was killed and resumed ends with the adapter of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

import jpeft
from jpeft import checkpoint, classify, data
from jpeft.assets import DATA, MODELS, DataSource, UserError, resolve_data, resolve_model
from jpeft.methods import METHODS, LeafMethod, Method, from_dict
from jpeft.tree import flatten

FORMAT = 1
# Where a method's name on the command line is not its class's in lower case.
ALIASES: Mapping[str, str] = {"prefix": "PrefixTuning", "full": "Train"}
# What each method wants; those not listed take LoRA's.
LEARNING_RATES: Mapping[str, float] = {"full": 1e-4, "train": 1e-4, "ia3": 5e-3, "prefix": 5e-3, "bitfit": 2e-3}
_EVAL_BATCH = 64


@dataclass(frozen=True)
class Config:
    """All that decides what a run computes. `None` is the method's, the data's or the job's own default.

    Example: `Config(method="lora", rank=16, targets="query,value", epochs=3)`.
    """

    model: str = "minilm"
    data: str = "food-reviews"
    eval: str | None = None
    text: str | None = None
    label: str | None = None
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    epochs: int = 2
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        rules = {
            "lr": (self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "a positive number"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "max_length": (self.max_length >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2^32)"),
            "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

    @property
    def rate(self) -> float:
        """The peak learning rate. Example: 1e-3 for LoRA unless `lr` says otherwise."""
        return LEARNING_RATES.get(self.method.lower(), 1e-3) if self.lr is None else self.lr


class Reporter(Protocol):
    """How a job speaks to whoever started it."""

    def say(self, text: str) -> None:
        """A line or a table, for people."""

    def progress(self, done: int, total: int, loss: float, examples_per_second: float) -> None:
        """A step was made."""


class Silent:
    """A `Reporter` that says nothing. Example: `finetune(config, out, Silent())`."""

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, loss: float, examples_per_second: float) -> None:
        """Nothing."""


class Interrupted(Exception):
    """A signal stopped the run after a step, whose state is saved. `number` is the signal's."""

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.number, self.step = number, step


# ----------------------------------------------------------------------------------------------------------- method


def build_method(config: Config) -> Method:
    """The method that a configuration names, with the classification head trained beside it.

    Example: `build_method(Config())` is `Chain(LoRA(rank=8, alpha=16, targets="all-linear"), Train("classifier"))`.
    """
    known = {name.lower(): name for name in METHODS} | ALIASES
    asked = config.method.lower()
    if asked not in known:
        raise UserError(f"--method {config.method}: unknown; there are {', '.join(sorted(known))}")
    kind = METHODS[known[asked]]
    allowed = {entry.name for entry in dataclasses.fields(kind)}
    fields = {name: getattr(config, name) for name in ("rank", "alpha", "dropout")}
    fields = {name: value for name, value in fields.items() if value is not None}
    if config.targets is not None:
        fields["targets"] = parse_targets(config.targets)
    elif asked == "full":
        fields["targets"] = ".*"
    fields |= config.settings
    for name in fields:
        if name not in allowed:
            raise UserError(f"{kind.__name__} has no {name!r}; its fields are {', '.join(sorted(allowed))}")
    if {"rank", "alpha"} <= allowed:
        fields = {"rank": 8} | fields
        fields = {"alpha": 2 * fields["rank"]} | fields
    if issubclass(kind, LeafMethod) and asked != "full":
        fields = {"exclude": classify.HEAD} | fields  # the head is Train's below
    try:
        method = from_dict({"method": kind.__name__, **fields})
    except (ValueError, TypeError) as error:
        raise UserError(f"--method {config.method}: {error}") from error
    return method if asked == "full" else jpeft.Chain(method, jpeft.Train(classify.HEAD))


def parse_targets(text: str) -> str | list[str]:
    """Targets as typed: a regular expression if it has a sign of one, else names separated by commas.

    Example: `parse_targets("query,value") == ["query", "value"]`; `parse_targets("all-linear") == "all-linear"`.
    """
    if text == "all-linear" or any(sign in text for sign in "*+?()[]{}|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def optimizer(config: Config, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW under a linear warm-up and a linear decay to zero. Example: `tx, schedule = optimizer(config, 250)`."""
    warm = min(steps - 1, max(1, round(config.warmup * steps))) if config.warmup else 0
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, config.rate, warm), optax.linear_schedule(config.rate, 0.0, max(1, steps - warm))],
        [warm],
    )
    return optax.adamw(lambda count: schedule(count + 1), weight_decay=config.weight_decay), schedule


# -------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that a run needs, in memory and checked."""

    config: Config
    folder: Path
    source: DataSource
    labels: tuple[str, ...]
    params: Any
    peft: jpeft.Peft
    train: data.Batches
    test: data.Batches

    @property
    def record(self) -> dict[str, Any]:
        """What config.json says: the choices, and fingerprints of all that they led to."""
        files = {"train": self.source.train, "eval": self.source.eval}
        return {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "labels": list(self.labels),
            "columns": {"text": self.source.text, "label": self.source.label},
            "method": self.peft.method.to_dict(),
            "steps": len(self.train),
            "sha256": {name: None if path is None else _sha256(path) for name, path in files.items()},
        }


def prepare(config: Config, reporter: Reporter) -> Job:
    """Read, check and bind everything a configuration names; no file is written but in the cache of assets.

    Example: `prepare(Config(), Silent()).peft.summary()`.
    """
    method = build_method(config)
    source = resolve_data(config.data, config.eval, config.text, config.label, reporter.say)
    train = data.read(source.train, source.text, source.label)
    labels = data.label_names(train)
    if source.eval is None:
        train, test = data.hold_out(train, config.seed)
        reporter.say(f"no --eval: {len(test):,} of the examples are held out to evaluate on")
    else:
        test = data.read(source.eval, source.text, source.label)
    train_ids, test_ids = data.label_ids(train, labels), data.label_ids(test, labels)
    folder = resolve_model(config.model, reporter.say)
    classifier, params = classify.load_classifier(folder, len(labels), config.seed)
    tokenizer = load_tokenizer(folder, classifier, config.max_length)
    peft = bind(method, classifier, params)
    pad = pad_id(classifier)
    length = config.max_length
    return Job(
        dataclasses.replace(config, model=_reference(config.model, MODELS), data=_reference(config.data, DATA),
                            eval=None if config.eval is None else str(Path(config.eval).expanduser().absolute())),
        folder,
        source,
        labels,
        params,
        peft,
        data.Batches(data.encode(train.texts, tokenizer, length, train_ids, pad), config.batch_size, config.seed,
                     config.epochs),
        data.Batches(data.encode(test.texts, tokenizer, length, test_ids, pad), _EVAL_BATCH),
    )  # fmt: skip


def bind(method: Method, classifier: classify.Classifier, params: Any) -> jpeft.Peft:
    """`method.bind`, where what the method cannot do is the user's to mend. Example: `bind(LoRA(), model, params)`."""
    try:
        return method.bind(classifier, params, *classify.example_inputs())
    except ValueError as error:
        raise UserError(str(error)) from error


def load_tokenizer(folder: Path, classifier: classify.Classifier, max_length: int) -> Any:
    """The model's tokenizer, if the model takes texts of `max_length`.

    Example: `load_tokenizer(folder, classifier, 128)`.
    """
    limit = data.length_limit(classifier.encoder.config)
    if max_length > limit:
        raise UserError(f"--max-length {max_length}: the model takes at most {limit} tokens")
    return data.load_tokenizer(folder, max_length)


def pad_id(classifier: classify.Classifier) -> int:
    """The id that fills a row. Example: 0 for BERT, 1 for RoBERTa."""
    return int(getattr(classifier.encoder.config, "pad_token_id", 0) or 0)


def finetune(config: Config, out: Path | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train from the beginning, into a folder that is not there yet. The result is what the final table shows.

    Example: `finetune(Config(epochs=1), Path("runs/first"))["accuracy_after"]`.
    """
    reporter = reporter or Silent()
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")
    job = prepare(config, reporter)
    return _finish(job, _create_run(out, job), reporter)


def resume(run: Path, given: Mapping[str, Any], reporter: Reporter | None = None) -> dict[str, Any]:
    """Continue a run under the configuration it recorded; a finished one only tells its result.

    Args:
        given: what the user asks for now, by field of `Config`: it must be what the run recorded.

    Example: `resume(Path("runs/first"), {})`.
    """
    reporter = reporter or Silent()
    record = read_record(run)
    config = Config(**record["config"])
    for name, value in given.items():
        if _comparable(name, value) != _comparable(name, getattr(config, name)):
            raise UserError(
                f"{run}: --{name.replace('_', '-')} {value} conflicts with the run's {getattr(config, name)}: "
                "a resumed run keeps its configuration; start another with --out"
            )
    with contextlib.suppress(FileNotFoundError):
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        reporter.say(f"{run} is complete")
        return result
    job = prepare(config, reporter)
    now = job.record
    for name in ("labels", "method", "steps", "sha256"):
        if now[name] != record[name]:
            raise UserError(f"{run}: cannot resume: {_CHANGED[name]} changed since the run began")
    return _finish(job, run, reporter)


_CHANGED = {"labels": "the labels", "method": "the method", "steps": "the number of steps", "sha256": "a data file"}


# ------------------------------------------------------------------------------------------------------ the run itself


def _finish(job: Job, run: Path, reporter: Reporter) -> dict[str, Any]:
    """Train to the end from wherever the run folder stands, then write what a finished run has."""
    reporter.say(job.peft.summary())
    adapter_key, rng = jax.random.split(jax.random.key(job.config.seed))
    fresh = job.peft.init(adapter_key, job.params)
    with _full_disk(run), checkpoint.open_checkpoints(run / "checkpoints") as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            reporter.say(f"continuing {run} after step {start} of {len(job.train)}")
        with _Log.open(run / "metrics.jsonl", start) as log:
            adapter = _train(job, fresh, rng, checkpoints, log, reporter)
            jpeft.save(run / "adapter", job.peft, adapter, job.params)
            plot(log.lines, run / "loss.png")
            result = _result(job, run, adapter, log.lines)
    _write_json(run / "result.json", result)  # last: its presence means that the run is complete
    return result


def _train(job: Job, fresh: Any, rng: jax.Array, checkpoints: Any, log: _Log, reporter: Reporter) -> Any:
    """The steps that are left. Returns the trained adapter."""
    params, total = job.params, len(job.train)
    score = classify.scorer(job.peft)
    if not log.has("eval_accuracy", 0):
        log.evaluation(0, classify.evaluate(score, params, fresh, job.test), reporter)
    tx, schedule = optimizer(job.config, total)
    state = jpeft.TrainState.create(job.peft, fresh, tx, rng)
    start = checkpoints.latest_step() or 0
    if start:
        state, _ = checkpoint.restore(checkpoints, like=state)
    loss = classify.loss_fn(job.peft, train_mode=bool(job.config.dropout))
    step = jpeft.train_step(job.peft, loss, tx, clip=1.0)
    rates = np.asarray(jax.vmap(schedule)(np.arange(1, total + 1)), float).tolist()
    seen: set[tuple[int, ...]] = set()
    with _stop_signal() as stop:
        for done in range(start + 1, total + 1):
            batch = job.train[done - 1]
            began = time.perf_counter()
            state, metrics = step(state, params, batch)
            metrics = {name: float(value) for name, value in metrics.items()}  # waits for the step
            seconds = time.perf_counter() - began
            examples = int(batch.weight.sum())
            first = batch.input_ids.shape not in seen  # such a step compiles
            seen.add(batch.input_ids.shape)
            log.step(done, job, metrics, {"lr": rates[done - 1], "seconds": seconds, "examples": examples}, first)
            reporter.progress(done, total, metrics["loss"], examples / seconds)
            last = done % job.train.per_epoch == 0
            if last and not stop:
                log.evaluation(done, classify.evaluate(score, params, state.adapter, job.test), reporter)
            if last or stop or done % job.config.checkpoint_every == 0:
                checkpoint.save(checkpoints, done, state, {"position": done})
            if stop:
                raise Interrupted(stop[0], done)
    if not log.has("eval_accuracy", total):
        log.evaluation(total, classify.evaluate(score, params, state.adapter, job.test), reporter)
    return state.adapter


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or a polite kill asks to stop; a second Ctrl-C does not wait for the step."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's
        return

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _full_disk(run: Path) -> Iterator[None]:
    """Say of a full disk what is safe on it and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        steps = sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())
        kept = f"the run is saved up to step {steps[-1]}" if steps else "no checkpoint was written yet"
        raise UserError(
            f"no space left on device, writing {error.filename or run}: {kept}; "
            f"free some and continue with: jpeft finetune --out {run} --resume"
        ) from error


class _Log:
    """metrics.jsonl: a line a step and an evaluation, none beyond the step that the run stands at."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]):
        self.path, self.lines = path, lines

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, step: int) -> Iterator[_Log]:
        """The log as it was at a step: what a killed run wrote after its last checkpoint is dropped."""
        lines = [line for line in read_lines(path) if line["step"] <= step]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        scratch.replace(path)
        log = cls(path, lines)
        with path.open("a", encoding="utf-8") as log._file:
            yield log

    def has(self, name: str, step: int) -> bool:
        return any(name in line and line["step"] == step for line in self.lines)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def step(self, done: int, job: Job, metrics: Mapping[str, float], more: Mapping[str, Any], first: bool) -> None:
        epoch = round(done / job.train.per_epoch, 4)
        line = {"step": done, "epoch": epoch, **metrics, **more}
        self.write({**line, "compiled": True} if first else line)

    def evaluation(self, done: int, scores: classify.Scores, reporter: Reporter) -> None:
        self.write({"step": done, "eval_accuracy": scores.accuracy, "eval_loss": scores.loss})
        when = f"after step {done}" if done else "before training"
        reporter.say(f"{when}: accuracy {scores.accuracy:.1%}, loss {scores.loss:.4f}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a kill cut short is left out.

    Example: `[line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]`.
    """
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


# ----------------------------------------------------------------------------------------------------- what is written


def _result(job: Job, run: Path, adapter: Any, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluations = {line["step"]: line for line in lines if "eval_accuracy" in line}
    steps = [line for line in lines if "loss" in line]
    timed = [line["seconds"] for line in steps if not line.get("compiled")] or [line["seconds"] for line in steps]
    labels = np.bincount(job.test.encoded.labels, minlength=len(job.labels))
    trainable, everything = job.peft.labels(adapter), jpeft.combine(job.params, adapter)
    sizes = {path: np.size(leaf) for path, leaf in flatten(adapter).items()}
    return {
        "accuracy_before": evaluations[0]["eval_accuracy"],
        "accuracy_after": evaluations[len(job.train)]["eval_accuracy"],
        "loss_before": evaluations[0]["eval_loss"],
        "loss_after": evaluations[len(job.train)]["eval_loss"],
        "majority_baseline": float(labels.max() / labels.sum()),
        "trainable_parameters": sum(sizes[path] for path, word in flatten(trainable).items() if word == "trainable"),
        "total_parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(everything)),
        "adapter_bytes": sum(path.stat().st_size for path in (run / "adapter").rglob("*") if path.is_file()),
        "base_bytes": sum(path.stat().st_size for path in job.folder.glob("*.safetensors")),
        "seconds_per_step": statistics.median(timed) if timed else None,
        "training_seconds": sum(line["seconds"] for line in steps),
        "peak_memory_bytes": peak_memory(),
        "skipped_steps": int(sum(line.get("skipped", 0) for line in steps)),
        "steps": len(job.train),
        "train_examples": len(job.train.encoded.ids),
        "eval_examples": len(job.test.encoded.ids),
        "labels": list(job.labels),
        "run": str(run),
        "config": dataclasses.asdict(job.config),
    }


def peak_memory() -> int | None:
    """The most memory that this process held, in bytes; None where the system does not tell. Example: 1_500_000_000."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of every step, its running mean, and the accuracy of every evaluation.

    Example: `plot(read_lines(run / "metrics.jsonl"), run / "loss.png")`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scores = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot(xlabel="step", ylabel="training loss")
    left.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
    mean = itertools.accumulate((loss for _, loss in steps), lambda mean, loss: 0.9 * mean + 0.1 * loss)
    left.plot([step for step, _ in steps], list(mean), color="tab:blue", label="loss (running mean)")
    right = left.twinx()
    right.set_ylabel("test accuracy")
    right.plot(*zip(*scores, strict=True), "o-", color="tab:orange", label="test accuracy")
    left.legend(handles=[*left.lines[1:], *right.lines], loc="center right", frameon=False)
    with _replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def _create_run(out: Path | None, job: Job) -> Path:
    """A new run folder, which appears with its config.json inside: a run is resumable from its first moment."""
    names: Iterator[Path]
    if out is not None:
        names = iter([out])
    else:
        stem = f"{Path(job.config.model).name}-{job.config.method.lower()}"
        names = (Path("runs") / f"{stem}-{number}" for number in itertools.count(1))
    for run in names:
        if run.exists():
            continue
        run.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{run.name}-", dir=run.parent))
        try:
            scratch.chmod(0o755)  # mkdtemp's is private
            _write_json(scratch / "config.json", job.record)
            scratch.rename(run)
            return run
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    with _replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reference(name: str, table: Mapping[str, Any]) -> str:
    """A name to find the same thing by from another working folder."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in table and path.exists() else name


def _comparable(name: str, value: Any) -> Any:
    return _reference(value, {**MODELS, **DATA}) if name in ("model", "data", "eval") and value is not None else value
