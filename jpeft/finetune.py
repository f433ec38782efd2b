"""The job behind `jpeft finetune`: from a configuration to a run folder, resumable at any moment.

    config = Config(data="train.csv", eval="test.csv", text="review", label="stars")
    result = finetune(config, Path("runs/stars"))

A step depends on the configuration and the step before it alone, so a run that was killed and resumed ends with the
adapter, bit for bit, of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import checkpoint, classify, data, runs
from jpeft.assets import DataSource, UserError, resolve_data, resolve_model
from jpeft.config import Config, Interrupted, flag, parse_targets
from jpeft.fingerprint import difference, fingerprint
from jpeft.methods import METHODS, LeafMethod, Method, from_dict
from jpeft.runs import Log
from jpeft.tree import flatten

# Where a method's name on the command line is not its class's in lower case.
ALIASES: Mapping[str, str] = {"prefix": "PrefixTuning", "full": "Train"}
_EVAL_BATCH = 64


class Reporter(Protocol):
    """How a job speaks to whoever started it."""

    def say(self, text: str) -> None:
        """A line or a table, for people."""

    def progress(self, done: int, total: int, loss: float, examples_per_second: float) -> None:
        """A step was made."""


class Silent:
    """A `Reporter` that says nothing.

    >>> Silent().say("nothing is printed")
    """

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, loss: float, examples_per_second: float) -> None:
        """Nothing."""


# ----------------------------------------------------------------------------------------------------------- method


def build_method(config: Config) -> Method:
    """The method that a configuration names, with the classification head trained beside it.

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
        return jpeft.Train(".*", **fields)
    if issubclass(kind, LeafMethod):
        fields = {"exclude": classify.HEAD} | fields  # the head is the other method's
    try:
        method = from_dict({"method": kind.__name__, **fields})
    except (ValueError, TypeError) as error:
        raise UserError(f"--method {config.method}: {error}") from error
    return jpeft.Chain(method, jpeft.Train(classify.HEAD))


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


def optimizer(config: Config, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW, and its learning rate by step: a linear warm-up, then a linear decay to zero.

    >>> _, schedule = optimizer(Config(lr=1.0, warmup=0.5), 4)
    >>> [round(float(schedule(step)), 2) for step in range(4)]
    [0.33, 0.67, 1.0, 0.5]
    """
    warm = min(steps - 1, round(config.warmup * steps))

    def schedule(count: Any) -> jax.Array:
        # No step is wasted on a rate of zero: the first has already risen, the last has not yet fallen to it.
        done = jnp.asarray(count, jnp.float32)
        return config.rate * jnp.minimum((done + 1) / (warm + 1), (steps - done) / (steps - warm))

    return optax.adamw(schedule, weight_decay=config.weight_decay), schedule


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
        """What config.json says: the choices, and what they led to.

        >>> job.record["labels"]  # doctest: +SKIP
        """
        files = {"train": self.source.train, "eval": self.source.eval}
        return {
            "format": runs.FORMAT,
            "config": dataclasses.asdict(self.config),
            "labels": list(self.labels),
            "columns": {"text": self.source.text, "label": self.source.label},
            "steps": len(self.train),
            "method": self.peft.method.to_dict(),
            "data": {name: None if path is None else runs.file_sha256(path) for name, path in files.items()},
            "tokenizer": runs.file_sha256(self.folder / "tokenizer.json"),
            "base": fingerprint(self.params),
        }


def prepare(config: Config, reporter: Reporter) -> Job:
    """Read, check and bind all that a configuration names. Writes nothing but the cache of assets.

    >>> prepare(Config(), Silent()).peft.summary()  # doctest: +SKIP
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
    tokenizer = classify.load_tokenizer(folder, classifier, config.max_length)
    try:
        peft = method.bind(classifier, params, *classify.example_inputs())
    except ValueError as error:  # a target that names nothing, a field that does not fit
        raise UserError(str(error)) from error
    encoded, test_encoded = (
        classify.encode(examples.texts, tokenizer, classifier, config.max_length, ids)
        for examples, ids in ((train, train_ids), (test, test_ids))
    )
    batches = data.Batches(encoded, config.batch_size, config.seed, config.epochs)
    test_batches = data.Batches(test_encoded, _EVAL_BATCH)
    return Job(config.located(), folder, source, labels, params, peft, batches, test_batches)


def finetune(config: Config, out: Path | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train from the beginning, into a folder that is not there yet. Returns what the final table shows.

    >>> finetune(Config(epochs=1), Path("runs/first"))["accuracy_after"]  # doctest: +SKIP
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")
    job = prepare(config, reporter or Silent())
    run = runs.create_run(out, job.config, job.record)
    try:
        return _finish(job, run, reporter or Silent())
    except (UserError, OSError):
        raise
    except Exception:  # too large for the memory, perhaps
        if not _saved_step(run):
            shutil.rmtree(run, ignore_errors=True)  # nothing to resume: leave the name free for another try
        raise


def resume(run: Path, given: Mapping[str, Any], reporter: Reporter | None = None) -> dict[str, Any]:
    """Continue a run under the configuration that it recorded; a complete one only tells its result.

    Args:
        given: what is asked for now, by field of `Config`: it must be what the run recorded.

    >>> resume(Path("runs/first"), {})  # doctest: +SKIP
    """
    reporter, record = reporter or Silent(), runs.read_record(run)
    config = Config(**record["config"])
    if name := config.conflict(given):
        mine = getattr(config, name)
        raise UserError(
            f"{run}: {flag(name)} {given[name]} conflicts with the run's {'default' if mine is None else mine}: a "
            "resumed run keeps its configuration; start another with another --out"
        )
    if result := runs.read_result(run):
        reporter.say(f"{run} is complete")
        return result
    job = prepare(config, reporter)
    now = job.record
    what = {
        "data": "its data",
        "labels": "its labels",
        "method": "its method",
        "steps": "its number of steps",
        "tokenizer": "its model's tokenizer.json",
    }
    for name, words in what.items():
        if now[name] != record.get(name):
            raise UserError(f"{run}: cannot be resumed: {words} changed since it began")
    if changed := difference(record["base"], job.params):
        raise UserError(f"{run}: cannot be resumed: the model {config.model} changed since it began: {changed}")
    return _finish(job, run, reporter)


# ------------------------------------------------------------------------------------------------------ the run itself


def _finish(job: Job, run: Path, reporter: Reporter) -> dict[str, Any]:
    """Train to the end from wherever the run folder stands, then write what a complete run has."""
    reporter.say(job.peft.summary())
    adapter_key, rng = jax.random.split(jax.random.key(job.config.seed))
    fresh = job.peft.init(adapter_key, job.params)
    with _stopping_well(run), checkpoint.open_checkpoints(run / "checkpoints") as checkpoints:
        state, start = _begin(job, fresh, rng, checkpoints, reporter)
        with runs.open_log(run / "metrics.jsonl", start) as log:
            adapter = _train(job, fresh, state, start, run, checkpoints, log, reporter)
            _check_converged(run, log, len(job.train))
            jpeft.save(run / "adapter", job.peft, adapter, job.params)
            runs.plot(log.lines, run / "loss.png")
            result = _result(job, run, adapter, log)
            runs.write_json(run / "result.json", result)  # last: its presence says that the run is complete
    return result


def _check_converged(run: Path, log: Log, total: int) -> None:
    """A run that learnt nothing but infinities is no result."""
    last, skipped = log.evaluation(total), [line for line in log.lines if "skipped" in line][-1]["skipped"]
    if last is None or last["eval_loss"] is None or skipped == total:
        raise UserError(
            f"{run}: training diverged: the loss is not finite, and {skipped:g} of {total} steps were skipped for that;"
            " start another with a lower --lr"
        )


def _begin(job: Job, fresh: Any, rng: jax.Array, checkpoints: Any, reporter: Reporter) -> tuple[Any, int]:
    """The state to go on from, and the steps behind it."""
    total = len(job.train)
    state = jpeft.TrainState.create(job.peft, fresh, optimizer(job.config, total)[0], rng)
    if checkpoints.latest_step() is None:
        return state, 0
    state, notes, damaged = checkpoint.restore_newest(checkpoints, like=state)
    for step in damaged:
        reporter.say(f"the checkpoint of step {step} cannot be read and is left out")
    reporter.say(f"continuing after step {notes['position']} of {total}")
    return state, notes["position"]


def _train(
    job: Job, fresh: Any, state: Any, start: int, run: Path, checkpoints: Any, log: Log, reporter: Reporter
) -> Any:
    """The steps that are left. Returns the trained adapter."""
    config, params, total = job.config, job.params, len(job.train)
    score = classify.scorer(job.peft)
    _evaluate(0, score, fresh, job, log, reporter)
    tx, schedule = optimizer(config, total)
    step = jpeft.train_step(job.peft, classify.loss_fn(job.peft, train_mode=bool(config.dropout)), tx, clip=1.0)
    rates = np.asarray(schedule(np.arange(total)), float)
    compiled: set[tuple[int, ...]] = set()
    with _stop_signal() as stop:
        for done, batch in enumerate(job.train.start(start), start + 1):
            began = time.perf_counter()
            state, metrics = step(state, params, batch)
            metrics = {name: float(value) for name, value in metrics.items()}  # waits for the step
            seconds, examples = time.perf_counter() - began, int(batch.weight.sum())
            line = {"step": done, "epoch": round(done / job.train.per_epoch, 4), **metrics}
            line |= {"lr": float(rates[done - 1]), "examples": examples, "seconds": round(seconds, 6)}
            if batch.input_ids.shape not in compiled:  # the first of a shape waits for the compiler
                compiled.add(batch.input_ids.shape)
                line["compiled"] = True
            log.write(line)
            reporter.progress(done, total, metrics["loss"], examples / seconds)
            if epoch_ends := done % job.train.per_epoch == 0:
                _evaluate(done, score, state.adapter, job, log, reporter)
            if epoch_ends or stop or done % config.checkpoint_every == 0:
                checkpoint.save(checkpoints, done, state, {"position": done})
            if stop:
                raise Interrupted(stop[0], done, run)
    _evaluate(total, score, state.adapter, job, log, reporter)
    return state.adapter


def _evaluate(step: int, score: classify.Scorer, adapter: Any, job: Job, log: Log, reporter: Reporter) -> None:
    """Evaluate after a step, unless the log has it."""
    if log.evaluation(step) is None:
        scores = classify.evaluate(score, job.params, adapter, job.test)
        log.write({"step": step, "eval_accuracy": scores.accuracy, "eval_loss": scores.loss})
        when = f"after step {step}" if step else "before training"
        reporter.say(f"{when}: accuracy {scores.accuracy:.1%}, loss {scores.loss:.4f}")


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or a polite kill asks to stop; a second one does not wait for the step."""
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
def _stopping_well(run: Path) -> Iterator[None]:
    """Say of a full disk, or of a Ctrl-C that did not wait, what is safe and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(stop.args[0] if stop.args else signal.SIGINT, _saved_step(run), run) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        step = _saved_step(run)
        raise UserError(
            f"{(error.strerror or 'no space').lower()}, writing to {run}: "
            f"{f'the run is saved up to step {step}' if step else 'no checkpoint was written yet'}; "
            f"free some and continue with: jpeft finetune --out {run} --resume"
        ) from error


def _saved_step(run: Path) -> int:
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def _result(job: Job, run: Path, adapter: Any, log: Log) -> dict[str, Any]:
    """The final table, from the log and the files of the run: the same whether it was interrupted or not."""
    first, last = log.evaluation(0), log.evaluation(len(job.train))
    assert first and last
    steps = [line for line in log.lines if "loss" in line]
    seconds = [line["seconds"] for line in steps]
    counts = np.bincount(job.test.encoded.labels, minlength=len(job.labels))
    words, leaves = flatten(job.peft.labels(adapter)), flatten(adapter)
    return {
        "accuracy_before": first["eval_accuracy"],
        "accuracy_after": last["eval_accuracy"],
        "majority_baseline": float(counts.max() / counts.sum()),
        "loss_before": first["eval_loss"],
        "loss_after": last["eval_loss"],
        "trainable_parameters": sum(int(np.size(leaves[path])) for path, word in words.items() if word == "trainable"),
        "total_parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(jpeft.combine(job.params, adapter))),
        "adapter_bytes": sum(path.stat().st_size for path in (run / "adapter").iterdir() if path.is_file()),
        "base_bytes": sum(path.stat().st_size for path in job.folder.glob("*.safetensors")),
        "seconds_per_step": statistics.median([line["seconds"] for line in steps if "compiled" not in line] or seconds),
        "training_seconds": round(sum(seconds), 3),
        "peak_memory_bytes": peak_memory(),
        "skipped_steps": int(steps[-1]["skipped"]),
        "steps": len(steps),
        "train_examples": len(job.train.encoded.ids),
        "eval_examples": len(job.test.encoded.ids),
        "labels": list(job.labels),
        "run": str(run),
        "config": dataclasses.asdict(job.config),
    }


def peak_memory() -> int | None:
    """The most memory that this process held, in bytes; None where the system does not tell.

    >>> peak_memory() is None or peak_memory() > 2**20
    True
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
