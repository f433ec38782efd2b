"""The job behind `jpeft finetune`: from a configuration to a run folder, resumable at any moment.

    config = Config(data="train.csv", eval="test.csv", text="review", label="stars")
    result = finetune(config, Path("runs/stars"))

A step depends on the configuration and the step before it alone, so a run that was killed and resumed ends with the
adapter, bit for bit, of one that was not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.core.fingerprint import difference
from jpeft.core.tree import combine, flatten, peek, size_bytes
from jpeft.errors import UserError
from jpeft.files import write_json
from jpeft.hardware import utilization
from jpeft.io import save
from jpeft.parallel.distributed import Heartbeat, watched
from jpeft.parallel.hosts import broadcast, check_same, is_main_process, largest, on_all_hosts
from jpeft.recipes import run_folder
from jpeft.recipes.config import Config, Interrupted, Setup, flag
from jpeft.recipes.prepare import UNCHANGED, Job, NullReporter, Reporter, prepare
from jpeft.recipes.process import Profiler, peak_memory, saved_step, stop_signal, stopping_well
from jpeft.recipes.run_folder import Log
from jpeft.training import checkpoint
from jpeft.training.checkpoint import Checkpoints
from jpeft.training.step import TrainState, train_step


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


def training_step(peft: Any, loss_fn: Any, config: Config, steps: int) -> tuple[Any, optax.GradientTransformation]:
    """The step that a run makes, and its optimizer.

    >>> step, tx = training_step(job.peft, job.task.loss_fn(job), job.config, job.steps)  # doctest: +SKIP
    """
    tx, _ = optimizer(config, steps)
    return train_step(peft, loss_fn, tx, clip=1.0, accumulate=config.accumulate), tx


_PLAIN = Setup()
_SHARED_WITHIN = 30.0  # seconds for a new folder to be seen on all hosts


# -------------------------------------------------------------------------------------------------------------- job


def finetune(
    config: Config, out: Path | None = None, reporter: Reporter | None = None, setup: Setup = _PLAIN
) -> dict[str, Any]:
    """Train from the beginning, into a folder that is not there yet. Returns what the final table shows.

    Args:
        setup: where and how. On several hosts (`jpeft.distributed.join`) all call this alike, and `out` is on storage
            that they share.

    >>> finetune(Config(epochs=1), Path("runs/first"))["accuracy_after"]  # doctest: +SKIP
    """
    reporter = _speaker(reporter)
    job = on_all_hosts(lambda: _prepare_new(config, out, reporter, setup))
    record = job.record
    _check_same(record)
    run = Path(
        broadcast(
            str(on_all_hosts(lambda: run_folder.create_run(out, job.config, record) if is_main_process() else ""))
        )
    )
    on_all_hosts(lambda: _check_shared(run))
    try:
        return _finish(job, run, reporter, setup)
    except (UserError, OSError):
        raise
    except Exception:  # too large for the memory, perhaps
        if is_main_process() and not saved_step(run):
            shutil.rmtree(run, ignore_errors=True)  # nothing to resume: leave the name free for another try
        raise


def _prepare_new(config: Config, out: Path | None, reporter: Reporter, setup: Setup) -> Job:
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")
    job = prepare(config, reporter, setup)
    if setup.profile is not None and setup.profile[0] > job.steps:
        raise UserError(f"--profile {setup.profile[0]}: there are {job.steps} steps")
    return job


def _speaker(reporter: Reporter | None) -> Reporter:
    """One process speaks."""
    return reporter if reporter is not None and is_main_process() else NullReporter()


def _check_same(record: Mapping[str, Any]) -> None:
    """Raises a UserError where hosts would train on something else than process 0."""
    paths = ("model", "data", "eval")  # hosts may have them in different places; what is there is compared
    record = {**record, "config": {name: value for name, value in record["config"].items() if name not in paths}}
    words = {"config": "the configuration", "base": "the model", "tokenizer": "the model's tokenizer",
             "data": "the data", "method": "the method"}  # fmt: skip
    check_same({told: json.dumps(record[name], sort_keys=True) for name, told in words.items()})


def _check_shared(run: Path) -> None:
    deadline = time.monotonic() + _SHARED_WITHIN
    while not (run / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(f"{run.absolute()}: not seen here; --out must be on storage that all hosts share")
        time.sleep(0.2)


def resume(
    run: Path, given: Mapping[str, Any], reporter: Reporter | None = None, setup: Setup = _PLAIN
) -> dict[str, Any]:
    """Continue a run under the configuration that it recorded; a complete one only tells its result.

    Args:
        given: what is asked for now, by field of `Config`: it must be what the run recorded.
        setup: as for `finetune`; it may be another than the run had until now.

    >>> resume(Path("runs/first"), {})  # doctest: +SKIP
    """
    reporter = _speaker(reporter)
    record, result = on_all_hosts(lambda: _read_run(run, given))
    if result:
        reporter.say(f"{run} is complete")
        return result
    with run_folder.locked(run):  # told before anything is loaded
        pass
    config = Config(**record["config"])
    job = on_all_hosts(lambda: prepare(config, reporter, setup))
    now = job.record
    on_all_hosts(lambda: _check_unchanged(run, record, now))
    _check_same(now)
    if changed := difference(record["base"], job.params):
        raise UserError(f"{run}: cannot be resumed: the model {config.model} changed since it began: {changed}")
    return _finish(job, run, reporter, setup)


def _check_unchanged(run: Path, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, words in UNCHANGED.items():
        if now.get(name) != record.get(name):
            raise UserError(f"{run}: cannot be resumed: {words} changed since it began")


def _read_run(run: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    record = run_folder.read_record(run)
    config = Config(**record["config"])
    if name := config.conflict(given):
        mine = getattr(config, name)
        raise UserError(
            f"{run}: {flag(name)} {given[name]} conflicts with the run's {'default' if mine is None else mine}: a "
            "resumed run keeps its configuration; start another with another --out"
        )
    return record, run_folder.read_result(run)


# ------------------------------------------------------------------------------------------------------ the run itself


@dataclass(frozen=True)
class _Run:
    """A run that is going on: what it works on, and where it writes."""

    job: Job
    folder: Path
    setup: Setup
    reporter: Reporter
    checkpoints: Checkpoints
    log: Log
    pulse: Heartbeat


def _finish(job: Job, folder: Path, reporter: Reporter, setup: Setup) -> dict[str, Any]:
    """Train to the end from wherever the run folder stands, then write what a complete run has."""
    reporter.say(job.peft.summary())
    adapter_key, rng = jax.random.split(jax.random.key(job.config.seed))
    fresh = job.peft.init(adapter_key, job.params)
    with (
        stopping_well(folder),
        run_folder.locked(folder),
        watched() as pulse,
        checkpoint.open_checkpoints(folder / "checkpoints") as checkpoints,
    ):
        state, start = _begin(job, fresh, rng, checkpoints, reporter)
        with run_folder.open_log(folder, start, write=is_main_process(), tensorboard=setup.tensorboard) as log:
            run = _Run(job, folder, setup, reporter, checkpoints, log, pulse)
            state = _train(run, fresh, state, start)
            on_all_hosts(lambda: _check_converged(run))
            adapter, step = _chosen(run, state)
            save(folder / "adapter", job.peft, adapter, job.params)
            result = _result(run, fresh, adapter, step)
            on_all_hosts(lambda: _write_result(run, result) if is_main_process() else None)
    return result


def _write_result(run: _Run, result: Mapping[str, Any]) -> None:
    run_folder.plot(run.log.lines, run.folder / "loss.png")
    write_json(run.folder / "result.json", result)  # last: its presence says that the run is complete


def _check_converged(run: _Run) -> None:
    """A run that learned nothing but infinities is no result."""
    total, log = run.job.steps, run.log
    last, skipped = log.evaluation(total), [line for line in log.lines if "skipped" in line][-1]["skipped"]
    if last is None or last["eval_loss"] is None or skipped == total:
        raise UserError(
            f"{run.folder}: training diverged: the loss is not finite, and {skipped:g} of {total} steps were skipped "
            "for that; start another with a lower --lr"
        )


def _chosen(run: _Run, state: Any) -> tuple[Any, int]:
    """The adapter that the run results in, and the step that it is of."""
    best = run.checkpoints.best_step() if run.job.config.keep == "best" else None
    if best in (None, run.job.steps):
        return state.adapter, run.job.steps
    run.reporter.say(f"the adapter of step {best} is kept, whose evaluation was the best")
    state, _ = checkpoint.restore(run.checkpoints, like=state, step=best)
    return state.adapter, best


def _begin(job: Job, fresh: Any, rng: jax.Array, checkpoints: Checkpoints, reporter: Reporter) -> tuple[Any, int]:
    """The state to go on from, and the steps behind it."""
    total = job.steps
    state = TrainState.create(job.peft, fresh, optimizer(job.config, total)[0], rng)
    if checkpoints.latest_step() is None:
        return state, 0
    state, notes, damaged = checkpoint.restore_newest(checkpoints, like=state)
    for step in damaged:
        reporter.say(f"the checkpoint of step {step} cannot be read and is left out")
    reporter.say(f"continuing after step {notes['position']} of {total}")
    return state, notes["position"]


def _train(run: _Run, fresh: Any, state: Any, start: int) -> Any:
    """The steps that are left. Returns the last state."""
    job, config, total = run.job, run.job.config, run.job.steps
    score = job.task.evaluator(job)
    _evaluate(run, 0, score, fresh)
    step, _ = training_step(job.peft, job.task.loss_fn(job), config, total)
    schedule = optimizer(config, total)[1]
    rates, usage = np.asarray(schedule(np.arange(total)), float), _usage(job, state)
    batches = itertools.islice(job.batches(start), total - start)
    with stop_signal() as asked, Profiler(run.folder / "profile", run.setup.profile) as profiler:
        for done, (batch, count) in enumerate(batches, start + 1):
            profiler.before(done)
            began, programs = time.perf_counter(), step.compiled
            state, metrics = step(state, job.params, batch)
            metrics = {name: float(value) for name, value in metrics.items()}  # waits for the step
            seconds = time.perf_counter() - began
            line = {"step": done, "epoch": round(job.train.epochs_after(done), 4), **metrics}
            line |= {"lr": float(rates[done - 1]), **count._asdict(), "seconds": round(seconds, 6)}
            line |= {"tokens_per_second": round(count.tokens / seconds, 1), **usage(batch.input_ids.shape, seconds)}
            if step.compiled > programs:  # the first of a shape waits for the compiler
                line["compiled"] = True
            run.log.write(line)
            run.pulse.step = done
            run.reporter.progress(done, total, metrics["loss"], count.tokens / seconds)
            epoch_ends = job.train.epochs_after(done).is_integer()
            if evaluated := epoch_ends or done == total or done % (config.eval_every or total) == 0:
                _evaluate(run, done, score, state.adapter)
            stop = largest(asked[0] if asked else 0)  # asked of any process, all stop after the same step
            if evaluated or stop or done % config.checkpoint_every == 0:
                loss = (run.log.evaluation(done) or {}).get("eval_loss")
                checkpoint.save(run.checkpoints, done, state, {"position": done}, loss=loss, wait=bool(stop))
            if stop:
                raise Interrupted(stop, done, run.folder)
    return state


def _evaluate(run: _Run, step: int, score: Any, adapter: Any) -> None:
    """Evaluate after a step, unless the log has it."""
    if run.log.evaluation(step) is None:
        found = score(adapter)
        run.log.write({"step": step, **found})
        run.reporter.say(f"{f'after step {step}' if step else 'before training'}: {run.job.task.say(found)}")


def _usage(job: Job, state: Any) -> Callable[[tuple[int, ...], float], dict[str, float]]:
    """The share of the devices' peak that a step of a shape takes, where the peak is known."""
    devices = jax.devices()[:1] if job.mesh is None else job.mesh.devices.flat
    peak = utilization.peak_flops(devices[0].device_kind)

    adapter = jax.eval_shape(lambda x: x, state.adapter)  # the first step donates the state

    def usage(shape: tuple[int, ...], seconds: float) -> dict[str, float]:
        if peak is None:
            return {}
        needed = utilization.peft_flops(job.peft, job.params, adapter, tokens=math.prod(shape), length=shape[1])
        return {"mfu": round(needed / seconds / (len(devices) * peak), 4)}

    return usage


def _result(run: _Run, fresh: Any, adapter: Any, step: int) -> dict[str, Any]:
    """The final table, from the log and the files of the run: the same whether it was interrupted or not."""
    job, log = run.job, run.log
    first, last = log.evaluation(0), log.evaluation(step)
    assert first and last
    files = job.model.glob("*.safetensors") if job.model.is_dir() else [job.model]
    steps = [line for line in log.lines if "loss" in line]
    usual = [line for line in steps if "compiled" not in line] or steps
    middle = lambda name: statistics.median([line[name] for line in usual])  # noqa: E731
    words, leaves = flatten(job.peft.labels(adapter)), flatten(adapter)
    return {
        "task": job.config.task,
        **job.task.result(job, fresh, adapter, first, last),
        "loss_before": first["eval_loss"],
        "loss_after": last["eval_loss"],
        "trainable_parameters": sum(int(np.size(leaves[path])) for path, word in words.items() if word == "trainable"),
        "total_parameters": sum(peek(leaf).size for leaf in flatten(combine(job.params, adapter)).values()),
        "adapter_bytes": sum(path.stat().st_size for path in (run.folder / "adapter").iterdir() if path.is_file()),
        "base_bytes": sum(path.stat().st_size for path in files),
        "base_memory_bytes": size_bytes(job.params),
        "seconds_per_step": middle("seconds"),
        "tokens_per_second": middle("tokens_per_second"),
        "mfu": middle("mfu") if "mfu" in usual[0] else None,
        "training_seconds": round(sum(line["seconds"] for line in steps), 3),
        "peak_memory_bytes": peak_memory(),
        "skipped_steps": int(steps[-1]["skipped"]),
        "steps": len(steps),
        "step_kept": step,
        "run": str(run.folder),
        "config": dataclasses.asdict(job.config),
    }
