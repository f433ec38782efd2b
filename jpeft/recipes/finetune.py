"""`jpeft finetune`: a run from a configuration to a finished run folder, resumable at any moment.

    config = Config(data="train.csv", eval="test.csv", text="review", label="stars")
    result = finetune(config, Path("runs/stars"))

A training step depends only on the configuration and the step before it, so a run that was killed and resumed ends
with the same adapter, bit for bit, as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.fingerprint import difference, fingerprint
from jpeft.core.tree import combine, flatten, peek, size_bytes
from jpeft.errors import UserError
from jpeft.hardware import utilization
from jpeft.io import CONFIG as ADAPTER_CONFIG
from jpeft.io import save
from jpeft.methods import from_dict, prefix_start
from jpeft.methods.base import Method
from jpeft.methods.prefix import PrefixTuning
from jpeft.parallel.distributed import Heartbeat, watched
from jpeft.parallel.hosts import broadcast, check_same, is_main_process, largest, on_all_hosts
from jpeft.recipes import run_folder, tasks
from jpeft.recipes.adapters import damaged_error
from jpeft.recipes.config import Config, Interrupted, Setup
from jpeft.recipes.loggers import Loggers, check_loggers, open_loggers
from jpeft.recipes.optimizer import learning_rate, optimizer, training_step
from jpeft.recipes.plots import plot
from jpeft.recipes.prepare import prepare
from jpeft.recipes.process import Profiler, peak_memory, reporting_saved_step, saved_step, stop_signal
from jpeft.recipes.run_folder import Log
from jpeft.recipes.run_lock import locked
from jpeft.recipes.tasks.base import Job, NullReporter, Reporter
from jpeft.storage import absolute, as_path, check_writable, file_size, file_sizes, remove_folder
from jpeft.training import checkpoint
from jpeft.training.checkpoint import Checkpoints, DamagedError
from jpeft.training.observe import observe
from jpeft.training.step import TrainState

T = TypeVar("T")
_SETUP = Setup()
_OBSERVED = 8  # batches, for a method whose start depends on data
_SHARED_WITHIN = 30.0  # seconds for a new folder to become visible to all hosts

# Entries of a run's record that must not change before it is resumed, and their names in the error.
UNCHANGED: Mapping[str, str] = {
    "data": "its data",
    "labels": "its labels",
    "method": "its method",
    "steps": "its number of steps",
    "tokenizer": "its model's tokenizer.json",
    "chat_template": "its model's chat template",
    "start": "the adapter it begins from",
}
START = "start"  # the folder in a run of the adapter that it begins from
# Fields of a configuration that a resumed run may have more of.
LENGTHS = ("steps", "epochs")
# Entries of the record that must be the same on all processes, and their names in the error.
_SAME: Mapping[str, str] = {
    "config": "the configuration",
    "base": "the model",
    "tokenizer": "the model's tokenizer",
    "data": "the data",
    "method": "the method",
    "start": "the adapter to begin from",
}


# ----------------------------------------------------------------------------------------------------- start or resume


def finetune(
    config: Config, out: str | os.PathLike[str] | None = None, reporter: Reporter | None = None, setup: Setup = _SETUP
) -> dict[str, Any]:
    """Trains from the beginning, into a new run folder. Returns the content of its result.json.

    Args:
        out: the run folder, local or on `gs://`; None is a new one in `runs/`.
        setup: where and how to run. On several hosts (`jpeft.parallel.distributed.join`) all call this with the same
            arguments, and `out` is on storage that they share.

    >>> finetune(Config(epochs=1), Path("runs/first"))["accuracy_after"]  # doctest: +SKIP
    """
    reporter, folder = _main_reporter(reporter), None if out is None else as_path(out)
    job = on_all_hosts(lambda: prepare_new(config, folder, reporter, setup))
    record = checked_record(job)
    run = as_path(broadcast(str(_on_main_process(lambda: run_folder.create_run(folder, job.config, record)))))
    on_all_hosts(lambda: _check_shared(run))
    try:
        return _finish(job, run, reporter, setup)
    except (UserError, OSError, Interrupted):
        raise
    except Exception:  # out of memory, perhaps
        if is_main_process() and not saved_step(run):
            remove_folder(run)  # nothing to resume, so the name is free for another attempt
        raise


def resume(
    run: str | os.PathLike[str], given: Mapping[str, Any], reporter: Reporter | None = None, setup: Setup = _SETUP
) -> dict[str, Any]:
    """Continues a run under its recorded configuration. Returns the content of its result.json, also if it is complete.

    Larger `steps` or `epochs` lengthen the run, also a complete one: it goes on after its last checkpoint with the data
    in the order that a run of that length has. The learning rate of the remaining steps is that of the new length: it
    decays to zero at the new end, so that it rises where a run had come near its old one. config.json records it, as
    `lengthened`.

    Args:
        given: fields of `Config` to compare with the recorded configuration. Any other difference raises a UserError.
        setup: where and how to run, as for `finetune`. It may differ from the run's earlier setup.

    >>> resume(Path("runs/first"), {})  # doctest: +SKIP
    """
    reporter, folder = _main_reporter(reporter), as_path(run)
    record, config, result = on_all_hosts(lambda: _read_run(folder, given))
    if "sweep" in record:
        raise UserError(f"{folder}: a sweep; continue it with: jpeft finetune --out {folder} --resume")
    longer = config != Config(**record["config"])
    if result is not None and not longer:
        reporter.say(f"{folder} is complete")
        return result
    _on_main_process(lambda: check_writable(folder))
    with locked(folder, reporter.say):  # raises before the model is loaded
        pass
    job = on_all_hosts(lambda: prepare_again(folder, record, config, reporter, setup))
    checked_record(job)
    if changed := difference(record["base"], job.params):
        raise UserError(f"{folder}: cannot be resumed: the model {job.config.model} changed since it began: {changed}")
    return _finish(job, folder, reporter, setup, record if longer else None)


def prepare_new(config: Config, out: Path | None, reporter: Reporter, setup: Setup) -> Job:
    """The job of a new run, once its folder and its loggers have been found to be free.

    >>> prepare_new(Config(), None, NullReporter(), Setup()).steps  # doctest: +SKIP
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another `out`, or continue that run with `resume`")
    check_loggers(setup.log_to if is_main_process() else ())
    if out is not None and is_main_process():
        check_writable(out)
    job = prepare(config, reporter, setup)
    if setup.profile is not None and setup.profile[0] > job.steps:
        raise UserError(f"`profile` {setup.profile[0]}: the run has only {job.steps} steps")
    return job


def prepare_again(run: Path, record: Mapping[str, Any], config: Config, reporter: Reporter, setup: Setup) -> Job:
    """The job of a run that goes on. Raises a UserError if what it depends on has changed.

    >>> prepare_again(run, read_record(run), config, NullReporter(), Setup()).steps  # doctest: +SKIP
    """
    check_loggers(setup.log_to if is_main_process() else ())
    job = prepare(dataclasses.replace(config, adapter=_copy_of_start(run) or config.adapter), reporter, setup)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, adapter=config.adapter))
    longer = config != Config(**record["config"])
    for name, words in UNCHANGED.items():
        if name in record and _entry(job.record, name) != _entry(record, name) and not (longer and name == "steps"):
            raise UserError(f"{run}: cannot be resumed: {words} changed since it began")
    if longer and job.steps <= record["steps"]:
        raise UserError(
            f"{run}: {_length(job.config)} makes {job.steps:,} steps, and the run has {record['steps']:,}: it may only "
            "become longer, and ends with its `epochs` or its `steps`, whichever comes first; give both"
        )
    return job


def _entry(record: Mapping[str, Any], name: str) -> Any:
    """An entry of a run's record; a method as it is read, since an earlier version may have had fewer fields."""
    value: Any = record.get(name)
    if name != "method":
        return value
    try:
        return from_dict(value)
    except (ValueError, TypeError):
        return value


def _copy_of_start(run: Path) -> str | None:
    """The run's own copy of the adapter that it begins from, if it has one."""
    return str(run / START) if (run / START / ADAPTER_CONFIG).is_file() else None


def _length(config: Config) -> str:
    return f"`epochs` {config.epochs}" + ("" if config.steps is None else f" with `steps` {config.steps}")


def _read_run(run: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], Config, dict[str, Any] | None]:
    """A run's record, the configuration to continue it with, and its result if it is complete."""
    record = run_folder.read_record(run)
    config = Config(**record["config"])
    now = {"epochs": config.epochs, "steps": config.steps or record["steps"]}
    longer = {name: given[name] for name in LENGTHS if (given.get(name) or 0) > now[name]}
    if name := config.conflict({name: value for name, value in given.items() if name not in longer}):
        recorded = "default" if getattr(config, name) is None else " ".join(str(getattr(config, name)).split())[:60]
        may = "; only `steps` and `epochs` may become more" if name in LENGTHS else ""
        raise UserError(
            f"{run}: `{name}` {given[name]} conflicts with the run's {recorded}: a resumed run keeps its "
            f"configuration{may}; start another with another `out`"
        )
    return record, dataclasses.replace(config, **longer), run_folder.read_result(run)


def checked_record(job: Job) -> dict[str, Any]:
    """The record of the job with the fingerprint of its base; processes that would train on other things raise.

    >>> sorted(checked_record(job))  # doctest: +SKIP
    """
    record = {**job.record, "base": fingerprint(job.params)}
    paths = ("model", "data", "eval", "adapter")  # these may differ between hosts; the content of the files may not
    config = {name: value for name, value in record["config"].items() if name not in paths}
    seen = {**record, "config": config}
    check_same({words: json.dumps(seen.get(name), sort_keys=True) for name, words in _SAME.items()})
    return record


def _check_shared(run: Path) -> None:
    deadline = time.monotonic() + _SHARED_WITHIN
    while not (run / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(f"{absolute(run)}: not seen here; `out` must be on storage that all hosts share")
        time.sleep(0.2)


def _main_reporter(reporter: Reporter | None) -> Reporter:
    """The reporter on the main process; the others report nothing."""
    return reporter if reporter is not None and is_main_process() else NullReporter()


def _on_main_process(fn: Callable[[], T]) -> T | None:
    """Runs `fn` on the main process; if it raises, all raise."""
    return on_all_hosts(lambda: fn() if is_main_process() else None)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Run:
    """A run in progress.

    >>> Run(job, folder, setup, reporter, checkpoints, log, heartbeat, check_lock)  # doctest: +SKIP

    Attributes:
        job: what it works on.
        folder: the run folder.
        setup: where and how it runs.
        reporter: receives messages and progress.
        checkpoints: the open checkpoints.
        log: the open metrics.jsonl.
        heartbeat: this process's heartbeat.
        check_lock: raises if another process has taken over the run.
    """

    job: Job
    folder: Path
    setup: Setup
    reporter: Reporter
    checkpoints: Checkpoints
    log: Log
    heartbeat: Heartbeat
    check_lock: Callable[[], None]


def _finish(
    job: Job, folder: Path, reporter: Reporter, setup: Setup, shorter: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Trains to the end from the last checkpoint, if there is one, and writes the files of a complete run.

    Args:
        shorter: the record of the run before it is lengthened, if it is.
    """
    reporter.say(job.peft.summary())
    adapter_key, rng = jax.random.split(jax.random.key(job.config.seed))
    fresh = _fresh(job, adapter_key, reporter) if job.start is None else job.start
    with (
        reporting_saved_step(folder),
        locked(folder, reporter.say) as check_lock,
        watched() as heartbeat,
        checkpoint.open_checkpoints(folder / "checkpoints") as checkpoints,
    ):
        if job.start is not None and not _copy_of_start(folder):
            save(folder / START, job.peft, job.start, job.params)  # the original may be trained on, or go
        state, start = _restore(job, folder, fresh, rng, checkpoints, reporter)
        if shorter is not None:
            if not start and run_folder.has_adapter(folder):
                raise UserError(
                    f"{folder}: its checkpoints are gone, so it cannot be lengthened; start another run from its "
                    f"adapter with: jpeft finetune --adapter {folder}"
                )
            _on_main_process(lambda: run_folder.lengthen(folder, shorter, job.record, start))
            reporter.say(
                f"lengthened from {shorter['steps']:,} to {job.steps:,} steps; from step {start + 1:,} on the learning "
                f"rate is that of a run of {job.steps:,} steps"
            )
        with (
            contextlib.closing(on_all_hosts(lambda: loggers_of(job, folder, setup, start + 1))) as logger,
            run_folder.open_log(folder, start, write=is_main_process(), logger=logger) as log,
        ):
            run = Run(job, folder, setup, reporter, checkpoints, log, heartbeat, check_lock)
            state = _train(run, fresh, state, start)
            on_all_hosts(lambda: _check_converged(run))
            on_all_hosts(lambda: _check_moved(run, fresh, state.adapter))
            check_lock()
            adapter, step = _chosen_adapter(run, state)
            save(folder / "adapter", job.peft, adapter, job.params)
            result = result_of(run, fresh, adapter, step)
            _on_main_process(lambda: _write(run, result))
    return result


def loggers_of(job: Job, folder: Path, setup: Setup, first_step: int) -> Loggers:
    """The open loggers of a run from a step on, on the main process.

    >>> loggers_of(job, folder, Setup(), 1).close()  # doctest: +SKIP
    """
    names = setup.log_to if is_main_process() else ()
    sent = run_folder.read_lines(folder / "metrics.jsonl") if names else []
    return open_loggers(names, folder, dataclasses.asdict(job.config), first_step, sent)


def _fresh(job: Job, key: jax.Array, reporter: Reporter) -> Any:
    """A new adapter; where its method starts from data, from the first training batches."""
    if not job.peft.observes:
        fresh = job.peft.init(key, job.params)
        return fresh if job.config.init_text is None else _from_text(job, fresh)
    reporter.say(f"observing {_OBSERVED} batches for the start of {job.peft.method.name}")
    batches = [batch for batch, _ in itertools.islice(job.batches(0), _OBSERVED)]
    found = observe(cast(Method, job.peft.method), job.peft.model, job.params, job.loss_fn(), batches)
    return job.peft.init(key, job.params, statistics=found)


def _from_text(job: Job, fresh: Any) -> Any:
    """The adapter, with the keys and values of the text that a prefix starts from; embeddings start from it already."""
    method = cast(Method, job.peft.method).methods()[0]
    if not isinstance(method, PrefixTuning):
        return fresh
    task, text = tasks.find(job.config.task), job.config.init_text
    inputs = task.text_inputs(task.text_ids(job.model, text))
    try:
        return prefix_start.from_text(job.peft, job.params, fresh, *inputs)
    except ValueError as error:
        raise UserError(f"`init_text`: {error}") from error


def _restore(
    job: Job, folder: Path, fresh: Any, rng: jax.Array, checkpoints: Checkpoints, reporter: Reporter
) -> tuple[Any, int]:
    """The training state of the newest checkpoint, or a new one, and the number of steps it has made."""
    state = TrainState.create(job.peft, fresh, optimizer(job.config, job.steps, job.peft), rng)
    if checkpoints.latest_step() is None:
        return state, 0
    try:
        state, notes, damaged = checkpoint.restore_newest(checkpoints, like=state)
    except DamagedError as error:
        raise damaged_error(folder, error) from error
    for step in damaged:
        reporter.say(f"the checkpoint of step {step} cannot be read and is left out")
    reporter.say(f"continuing after step {notes['position']} of {job.steps}")
    return state, notes["position"]


def _train(run: Run, fresh: Any, state: Any, start: int) -> Any:
    """Makes the remaining training steps. Returns the final state."""
    job, config, total = run.job, run.job.config, run.job.steps
    evaluate = job.evaluator()
    _evaluate(run, 0, evaluate, fresh)
    _check_begins_finite(run)
    step = training_step(job.peft, job.loss_fn(), optimizer(config, total, job.peft), config)
    rates, usage = np.asarray(learning_rate(config, total)(np.arange(total)), float), _usage(job, state)
    batches = itertools.islice(job.batches(start), total - start)
    with stop_signal() as received, Profiler(run.folder / "profile", run.setup.profile) as profiler:
        for done, (batch, count) in enumerate(batches, start + 1):
            profiler.before(done)
            began, programs = time.perf_counter(), step.compiled
            state, metrics = step(state, job.params, batch)
            metrics = {name: float(value) for name, value in metrics.items()}  # waits for the step
            seconds = time.perf_counter() - began
            line = {"step": done, "epoch": round(job.train.epochs_after(done), 4), **metrics}
            line |= {"lr": float(rates[done - 1]), **count._asdict(), "seconds": round(seconds, 6)}
            line |= {"tokens_per_second": round(count.tokens / seconds, 1), **usage(batch.input_ids.shape, seconds)}
            if step.compiled > programs:  # the first step of a shape includes its compilation
                line["compiled"] = True
            run.log.write(line)
            run.heartbeat.step = done
            run.reporter.progress(done, total, metrics["loss"], count.tokens / seconds)
            epoch_ends = job.train.epochs_after(done).is_integer()
            if evaluated := epoch_ends or done == total or done % (config.eval_every or total) == 0:
                _evaluate(run, done, evaluate, state.adapter)
            stop = largest(received[0] if received else 0)  # a signal to one process stops all after the same step
            if evaluated or stop or done % config.checkpoint_every == 0:
                loss = (run.log.evaluation(done) or {}).get("eval_loss")
                run.check_lock()
                run.log.sync()
                checkpoint.save(run.checkpoints, done, state, {"position": done}, loss=loss, wait=bool(stop))
            if stop:
                raise Interrupted(stop, done, run.folder)
    return state


def _evaluate(run: Run, step: int, evaluate: Callable[[Any], dict[str, float]], adapter: Any) -> None:
    """Evaluates after a step, unless the log has it already."""
    if run.log.evaluation(step) is None:
        metrics = evaluate(adapter)
        run.log.write({"step": step, **metrics})
        when = f"after step {step}" if step else "before training"
        run.reporter.say(f"{when}: {run.job.describe(metrics)}")


def _usage(job: Job, state: Any) -> Callable[[tuple[int, ...], float], dict[str, float]]:
    """A function from a batch's shape and a step's seconds to the model FLOPs utilization, if the peak is known."""
    devices = jax.devices()[:1] if job.mesh is None else job.mesh.devices.flat
    peak = utilization.peak_flops(devices[0].device_kind)
    adapter = jax.eval_shape(lambda x: x, state.adapter)  # abstract, because the first step donates the state

    def usage(shape: tuple[int, ...], seconds: float) -> dict[str, float]:
        if peak is None:
            return {}
        flops = utilization.peft_flops(job.peft, job.params, adapter, tokens=math.prod(shape), length=shape[1])
        return {"mfu": round(flops / seconds / (len(devices) * peak), 4)}

    return usage


# ------------------------------------------------------------------------------------------------------------- results


def _check_begins_finite(run: Run) -> None:
    """Raises a UserError if the loss is not finite before training, which no learning rate mends."""
    before = run.log.evaluation(0)
    if before is None or before["eval_loss"] is None:
        raise UserError(
            f"{run.folder}: the loss is not finite before training: the weights of `model` {run.job.config.model} "
            f"hold NaN or infinity, or its activations overflow in `dtype` {run.job.config.dtype or 'float32'}; choose "
            "another"
        )


def _check_converged(run: Run) -> None:
    """Raises a UserError if the loss is not finite: such a run gets no result."""
    last, total = run.log.evaluation(run.job.steps), run.job.steps
    skipped = [line for line in run.log.lines if "skipped" in line][-1]["skipped"]
    if last is None or last["eval_loss"] is None or skipped == total:
        raise UserError(
            f"{run.folder}: training diverged: the loss is not finite, and {skipped:g} of {total} steps were skipped "
            "for that; start another with a lower `lr`"
        )


def _check_moved(run: Run, fresh: Any, adapter: Any) -> None:
    """Raises a UserError if a method's leaves are all as before training: it had no gradient in any step."""
    before, after, peft = flatten(fresh), flatten(adapter), run.job.peft
    for member, method in enumerate(peft.method.methods()):
        own = {a.leaf_path(name) for a in peft.actions if a.member == member for name in a.stored}
        pairs = [jax.tree.leaves((before[path], after[path])) for path in own - peft.non_trainable_paths]
        if pairs and all(bool(jnp.array_equal(old, new)) for old, new in pairs):
            raise UserError(
                f"{run.folder}: nothing of {method.name} trained: its gradient was zero in every step; what it acts "
                "on, such as invocation tokens or rows of an embedding, does not occur in the training data"
            )


def _chosen_adapter(run: Run, state: Any) -> tuple[Any, int]:
    """The adapter that the run keeps, the last or the best, and its step."""
    best = run.checkpoints.best_step() if run.job.config.keep == "best" else None
    if best in (None, run.job.steps):
        return state.adapter, run.job.steps
    run.reporter.say(f"the adapter of step {best} is kept, whose evaluation was the best")
    state, _ = checkpoint.restore(run.checkpoints, like=state, step=best)
    return state.adapter, best


def result_of(run: Run, fresh: Any, adapter: Any, step: int) -> dict[str, Any]:
    """The content of result.json, from the log and the files: the same whether the run was interrupted or not.

    >>> result_of(run, fresh, adapter, step=60)["loss_after"]  # doctest: +SKIP
    """
    job, log = run.job, run.log
    before, after = log.evaluation(0), log.evaluation(step)
    assert before and after
    files = list(job.model.glob("*.safetensors")) if job.model.is_dir() else [job.model]
    labels, leaves = flatten(job.peft.labels(adapter)), flatten(adapter)
    trainable = [leaves[path] for path, label in labels.items() if label == "trainable"]
    return {
        "task": job.config.task,
        **job.result(fresh, adapter, before, after),
        "loss_before": before["eval_loss"],
        "loss_after": after["eval_loss"],
        "trainable_parameters": sum(int(np.size(leaf)) for leaf in trainable),
        "total_parameters": sum(peek(leaf).size for leaf in flatten(combine(job.params, adapter)).values()),
        "adapter_bytes": sum(file_sizes(run.folder / "adapter").values()),
        "base_bytes": sum(map(file_size, files)),
        "base_memory_bytes": size_bytes(job.params),
        **_timing([line for line in log.lines if "loss" in line]),
        "step_kept": step,
        "run": str(run.folder),
        "config": dataclasses.asdict(job.config),
    }


def _timing(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the training steps that compiled nothing, and totals."""
    usual = [line for line in steps if "compiled" not in line] or steps

    def median(name: str) -> float:
        return statistics.median([line[name] for line in usual])

    return {
        "seconds_per_step": median("seconds"),
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu") if "mfu" in usual[0] else None,
        "training_seconds": round(sum(line["seconds"] for line in steps), 3),
        "peak_memory_bytes": peak_memory(),
        "skipped_steps": int(steps[-1]["skipped"]),
        "steps": len(steps),
    }


def _write(run: Run, result: Mapping[str, Any]) -> None:
    plot(run.log.lines, run.folder / "loss.png", *tasks.find(run.job.config.task).METRIC)
    run_folder.write_result(run.folder, result)
