"""`jpeft finetune --sweep`: the combinations of several values, trained together over one base.

    result = sweep(Config(data="train.csv"), {"lr": (1e-4, 3e-4, 1e-3), "rank": (8, 16)}, halving=2)

All combinations see the same batches. After each of `halving` equal parts of the steps, the half with the higher
evaluation loss ends. The best at the end is the run's adapter, and equals that of a run of its values alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft.core.fingerprint import difference
from jpeft.core.peft import Peft
from jpeft.errors import UserError
from jpeft.files import write_json
from jpeft.io import save
from jpeft.parallel.distributed import watched
from jpeft.recipes import run_folder, tasks
from jpeft.recipes.config import Config, Interrupted, Setup
from jpeft.recipes.finetune import Run, checked_record, loggers_of, prepare_again, prepare_new, result_of
from jpeft.recipes.optimizer import learning_rate, optimizer
from jpeft.recipes.options import options
from jpeft.recipes.plots import plot_sweep
from jpeft.recipes.prepare import build_method
from jpeft.recipes.process import reporting_saved_step, saved_step, stop_signal
from jpeft.recipes.run_folder import Log
from jpeft.recipes.run_lock import locked
from jpeft.recipes.tasks.base import Job, NullReporter, Reporter
from jpeft.storage import as_path, check_writable, remove_folder
from jpeft.training import checkpoint
from jpeft.training.checkpoint import Checkpoints, DamagedError
from jpeft.training.population import Member, Population, PopulationState
from jpeft.training.population_step import PopulationStep, population_step
from jpeft.training.programs import as_own

SWEPT = ("method", "rank", "alpha", "dropout", "lr", "seed")  # the fields of `Config` that may have several values
_SETUP = Setup()


def parse_grid(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The values by option from words such as ``lr=1e-4,3e-4``, checked.

    >>> parse_grid(["lr=1e-4,3e-4", "rank=8,16"])
    {'lr': (0.0001, 0.0003), 'rank': (8, 16)}
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or name not in SWEPT:
            raise UserError(f"`sweep` {word}: expected NAME=VALUE,VALUE with one of {', '.join(SWEPT)}")
        if name in grid:
            raise UserError(f"`sweep` {word}: {name} is given twice; give its values in one list")
        grid[name] = tuple(_value(name, value.strip(), word) for value in text.split(","))
    return checked_grid(grid)


def _value(name: str, text: str, word: str) -> Any:
    kind = options(Config)[name].type
    try:
        return text if kind is str else kind(text)
    except ValueError:
        raise UserError(f"`sweep` {word}: {name} must be {options(Config)[name].expected[1]}, got {text!r}") from None


def checked_grid(grid: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """A grid whose values `Config` can have. Raises a UserError for other values, and for less than two combinations.

    >>> checked_grid({"rank": [8, 16]})
    {'rank': (8, 16)}
    """
    out = {name: tuple(values) for name, values in grid.items()}
    for name, values in out.items():
        if name not in SWEPT:
            raise UserError(f"`sweep`: {name!r} is none of {', '.join(SWEPT)}")
        for value in values:
            with _told_of_sweep(out, f"{name}={value}"):
                options(Config)[name].check(value)
        if len(set(values)) < len(values):
            raise UserError(f"`sweep` {name}={','.join(map(str, values))}: a value is given twice")
    if math.prod(map(len, out.values())) < 2:
        raise UserError("`sweep` needs two combinations or more, such as lr=1e-4,3e-4,1e-3")
    return out


@contextlib.contextmanager
def _told_of_sweep(grid: Mapping[str, Any], label: str) -> Iterator[None]:
    """A context whose errors name the swept values in place of their options, which were not given."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"^`method` \S+: ", "", str(error))
        text = re.sub(r"`(\w+)`", lambda found: found[1] if found[1] in grid else found[0], text)
        raise UserError(f"`sweep` {label}: {text}") from error


@dataclass(frozen=True)
class Plan:
    """The combinations of a sweep.

    Attributes:
        config: the other values.
        grid: the values of each field that has several.
        halving: how often the worse half ends.

    >>> plan = Plan(Config(), {"lr": (1e-4, 1e-3), "rank": (8, 16)}, halving=1)
    >>> plan.labels[1], plan.configs[1].rank, plan.marks(10)
    ('lr=0.0001 rank=16', 16, [5])
    """

    config: Config
    grid: Mapping[str, tuple[Any, ...]]
    halving: int = 0

    @cached_property
    def choices(self) -> list[dict[str, Any]]:
        """The fields of each combination."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    @cached_property
    def configs(self) -> list[Config]:
        """The configuration of each combination."""
        return [dataclasses.replace(self.config, **choice) for choice in self.choices]

    @property
    def labels(self) -> list[str]:
        """A name for each combination."""
        return [" ".join(f"{name}={value}" for name, value in choice.items()) for choice in self.choices]

    def marks(self, steps: int) -> list[int]:
        """The steps after which the worse half ends."""
        return [round(steps * part / (self.halving + 1)) for part in range(1, self.halving + 1)]

    def check_methods(self) -> None:
        """Raises a UserError for a combination whose method cannot be, before a model is read."""
        for choice, label in zip(self.choices, self.labels, strict=True):
            with _told_of_sweep(self.grid, label):
                build_method(dataclasses.replace(self.config, **choice))

    def check(self, steps: int) -> None:
        """Raises a UserError if the halvings leave no step between them, or no combination to drop."""
        marks = [0, *self.marks(steps), steps]
        if any(a >= b for a, b in itertools.pairwise(marks)):
            raise UserError(f"`halving` {self.halving}: more often than {steps} steps allow")
        if 2 ** (self.halving - 1) >= len(self.choices) > 0 and self.halving:
            raise UserError(f"`halving` {self.halving}: {len(self.choices)} combinations are one after fewer halvings")


# ----------------------------------------------------------------------------------------------------- start or resume


def sweep(
    config: Config,
    grid: Mapping[str, Sequence[Any]],
    halving: int = 0,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
    setup: Setup = _SETUP,
) -> dict[str, Any]:
    """Trains all combinations of a grid as one population, into a new run folder. Returns its result.json.

    The run is that of the best combination, with a list of all under ``sweep``.

    Args:
        config: the values that all combinations have.
        grid: several values of fields of `SWEPT`, by name.
        halving: how often the half with the higher evaluation loss ends, after equal parts of the steps.
        out, setup: as for `jpeft.recipes.finetune.finetune`; one process.

    >>> sweep(Config(), {"lr": (1e-4, 1e-3)}, halving=1)["sweep"]["kept"]  # doctest: +SKIP
    'lr=0.001'
    """
    reporter, plan = reporter or NullReporter(), Plan(config, checked_grid(grid), halving)
    _check(config)
    plan.check_methods()
    folder = None if out is None else as_path(out)
    job = prepare_new(plan.configs[0], folder, reporter, setup)
    plan = dataclasses.replace(plan, config=job.config)
    plan.check(job.steps)
    work = _Sweep.of(plan, job)  # before there is a folder
    record = {**checked_record(job), "sweep": {"grid": {k: list(v) for k, v in plan.grid.items()}, "halving": halving}}
    run = run_folder.create_run(folder, job.config, record)
    try:
        return _finish(work, run, reporter, setup)
    except (UserError, OSError, Interrupted):
        raise
    except Exception:
        if not saved_step(run):
            remove_folder(run)  # as `finetune` does
        raise


def resume(
    run: str | os.PathLike[str], given: Mapping[str, Any], reporter: Reporter | None = None, setup: Setup = _SETUP
) -> dict[str, Any]:
    """Continues a sweep under its recorded configuration. Returns its result.json, also if it is complete.

    Args:
        given: fields of `Config` to compare with the recorded ones. Any difference raises a UserError.

    >>> resume(Path("runs/sweep"), {})  # doctest: +SKIP
    """
    reporter, folder = reporter or NullReporter(), as_path(run)
    record = run_folder.read_record(folder)
    config = Config(**record["config"])
    swept = record["sweep"]["grid"]
    if name := config.conflict({name: value for name, value in given.items() if name not in swept}):
        raise UserError(f"{folder}: `{name}` {given[name]} is not the sweep's; start another with another `out`")
    if (result := run_folder.read_result(folder)) is not None:
        reporter.say(f"{folder} is complete")
        return result
    check_writable(folder)
    job = prepare_again(folder, record, config, reporter, setup)
    if changed := difference(record["base"], job.params):
        raise UserError(f"{folder}: cannot be resumed: the model {config.model} changed since it began: {changed}")
    plan = Plan(job.config, {k: tuple(v) for k, v in swept.items()}, record["sweep"]["halving"])
    return _finish(_Sweep.of(plan, job), folder, reporter, setup)


def is_sweep(run: Path) -> bool:
    """Whether a folder is that of a sweep.

    >>> is_sweep(Path("runs/none"))
    False
    """
    return run_folder.is_run(run) and "sweep" in run_folder.read_record(run)


def _check(config: Config) -> None:
    """Raises a UserError for what a sweep has no meaning for."""
    given = {"adapter": config.adapter, "init_text": config.init_text}
    if name := next((name for name, value in given.items() if value is not None), None):
        raise UserError(f"`{name}` {given[name]}: the combinations of `sweep` begin from fresh adapters")
    if config.keep == "best":
        raise UserError("`keep` best: a sweep keeps the best combination, as it is at the end")


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class _Sweep:
    """A sweep in progress.

    Attributes:
        plan: its combinations.
        job: what they have in common.
        population: all of them.
    """

    plan: Plan
    job: Job
    population: Population

    @classmethod
    def of(cls, plan: Plan, job: Job) -> _Sweep:
        members = [Member(build_method(c), learning_rate=c.rate, seed=c.seed) for c in plan.configs]
        inputs = tasks.find(job.config.task).text_inputs([0, 0])
        try:
            population = Population(job.peft.model, job.params, inputs, members)
        except ValueError as error:
            raise UserError(str(error)) from error
        if any(peft.observes for peft in population.pefts):
            raise UserError("`sweep`: a method whose start depends on data is trained alone; choose another start")
        return cls(plan, job, population)

    def jobs(self) -> list[Job]:
        """The job of each program."""
        first = [self.population.programs.index(program) for program in range(len(self.population.pefts))]
        pairs = zip(self.population.pefts, first, strict=True)
        return [dataclasses.replace(self.job, peft=peft, config=self.plan.configs[i]) for peft, i in pairs]

    def optimizers(self) -> list[Callable[[Any], Any]]:
        """The optimizer of each program, as a function of the learning rate."""

        def of(peft: Peft) -> Callable[[Any], Any]:
            return lambda rate: optimizer(self.job.config, self.job.steps, peft, rate)

        return [of(peft) for peft in self.population.pefts]

    def step(self) -> PopulationStep:
        losses = [job.loss_fn() for job in self.jobs()]
        accumulate = self.job.config.accumulate
        return population_step(self.population, losses, self.optimizers(), shared=True, clip=1.0, accumulate=accumulate)

    def evaluators(self) -> list[Callable[[Any], dict[str, float]]]:
        """The evaluation of each program."""
        return [job.evaluator() for job in self.jobs()]

    def kept(self, lines: Sequence[Mapping[str, Any]], step: int) -> list[int]:
        """The members that train after a step, from the evaluations in the log, the best first."""
        members = list(range(len(self.population)))
        for mark in self.plan.marks(self.job.steps):
            if mark <= step:
                members = _better_half(members, lines, mark)
        return members


def _better_half(members: Sequence[int], lines: Sequence[Mapping[str, Any]], step: int) -> list[int]:
    losses = {m: _evaluation(lines, m, step)["eval_loss"] for m in members}
    finite = [m for m in members if losses[m] is not None and math.isfinite(losses[m])]
    if not finite:
        raise UserError("training diverged: no combination's loss is finite; start another sweep with lower rates")
    return sorted(finite, key=lambda m: losses[m])[: math.ceil(len(members) / 2)]


def _evaluation(lines: Sequence[Mapping[str, Any]], member: int, step: int) -> Mapping[str, Any]:
    return next(x for x in lines if (x.get("member"), x["step"]) == (member, step) and "eval_loss" in x)


def _finish(work: _Sweep, folder: Path, reporter: Reporter, setup: Setup) -> dict[str, Any]:
    """Trains to the end from the last checkpoint, if there is one, and writes the files of a complete run."""
    plan, job = work.plan, work.job
    programs = len(work.population.pefts)
    reporter.say(f"{len(plan.choices)} combinations in {programs} program{'s' * (programs > 1)}")
    reporter.say(work.population.pefts[0].summary())
    with (
        reporting_saved_step(folder),
        locked(folder, reporter.say) as check_lock,
        watched() as heartbeat,
        checkpoint.open_checkpoints(folder / "checkpoints") as checkpoints,
    ):
        state, population, start = _restore(work, folder, checkpoints, reporter)
        with (
            contextlib.closing(loggers_of(job, folder, setup, start + 1)) as logger,
            run_folder.open_log(folder, start, logger=_ByMember(logger, plan.labels)) as log,
        ):
            run = Run(job, folder, setup, reporter, checkpoints, log, heartbeat, check_lock)
            state, population = _train(work, run, state, population, start)
            result = _conclude(work, run, state, population)
    return result


@dataclass(frozen=True)
class _ByMember:
    """A logger that names a member's metrics after it."""

    logger: Any
    labels: Sequence[str]

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        label = self.labels[metrics["member"]]
        self.logger.log({f"{name}/{label}": x for name, x in metrics.items() if name != "member"}, step)

    def close(self) -> None:
        self.logger.close()


def _restore(
    work: _Sweep, folder: Path, checkpoints: Checkpoints, reporter: Reporter
) -> tuple[PopulationState, Population, int]:
    """The state of the newest checkpoint that is whole, or a new one, its members, and the steps that it has made."""
    lines = run_folder.read_lines(folder / "metrics.jsonl")
    for step in reversed(checkpoints.all_steps()):
        population = work.population.select(work.kept(lines, step))
        like = population.init(work.optimizers(), work.job.params)
        try:
            state, _ = checkpoint.restore(checkpoints, like, step)
        except DamagedError:
            reporter.say(f"the checkpoint of step {step} cannot be read and is left out")
            checkpoints.manager.delete(step)  # otherwise the run could not save that step again
            continue
        reporter.say(f"continuing after step {step} of {work.job.steps}")
        return state, population, step
    try:
        state = work.population.init(work.optimizers(), work.job.params)
    except ValueError as error:
        raise UserError(f"`sweep`: {error}") from error
    return state, work.population, 0


def _train(
    work: _Sweep, run: Run, state: PopulationState, population: Population, start: int
) -> tuple[PopulationState, Population]:
    """Makes the remaining steps, and halves the population on the way."""
    job, config, total = run.job, run.job.config, run.job.steps
    marks, evaluators, step = work.plan.marks(total), work.evaluators(), work.step()
    if not start:
        _evaluate(work, run, state, population, 0, evaluators)
    shape = np.asarray(learning_rate(config, total, 1.0)(np.arange(total)), float)
    batches = itertools.islice(job.batches(start), total - start)
    with stop_signal() as received:
        for done, (batch, count) in enumerate(batches, start + 1):
            began, programs = time.perf_counter(), step.compiled
            state, metrics = step(state, job.params, batch)
            values = {name: np.asarray(value) for name, value in metrics.items()}  # waits for the step
            seconds = time.perf_counter() - began
            usual = {"epoch": round(job.train.epochs_after(done), 4), **count._asdict(), "seconds": round(seconds, 6)}
            usual |= {"tokens_per_second": round(count.tokens / seconds, 1)}
            usual |= {"compiled": True} if step.compiled > programs else {}
            for i, member in enumerate(population.origins):
                own = {name: float(value[i]) for name, value in values.items()}
                own |= {"lr": float(shape[done - 1]) * work.plan.configs[member].rate}
                run.log.write({"step": done, "member": member, **own, **usual})
            run.heartbeat.step = done
            losses = values["loss"][np.isfinite(values["loss"])]
            run.reporter.progress(done, total, float(losses.min()) if losses.size else math.nan, count.tokens / seconds)
            if evaluated := done == total or done in marks or done % (config.eval_every or total) == 0:
                _evaluate(work, run, state, population, done, evaluators)
            if done in marks:
                state, population = _halved(work, run, state, population, done)
            if evaluated or received or done % config.checkpoint_every == 0:
                run.check_lock()
                run.log.sync()
                notes = {"position": done, "origins": list(population.origins)}
                checkpoint.save(run.checkpoints, done, state, notes, wait=bool(received))
            if received:
                raise Interrupted(received[0], done, run.folder)
    return state, population


def _halved(
    work: _Sweep, run: Run, state: PopulationState, population: Population, step: int
) -> tuple[PopulationState, Population]:
    better = work.kept(run.log.lines, step)
    ended = [work.plan.labels[m] for m in population.origins if m not in better]
    run.reporter.say(f"after step {step}: {len(better)} combinations go on; {', '.join(ended)} end")
    return population.select([population.origins.index(m) for m in better], state)


def _evaluate(
    work: _Sweep, run: Run, state: PopulationState, population: Population, step: int, evaluators: Sequence[Any]
) -> None:
    """Evaluates each member after a step. Before training, those of a program start alike: one stands for all."""
    before: dict[int, dict[str, float]] = {}
    for i, member in enumerate(population.origins):
        program, place = state.place(i)
        if step or program not in before:
            before[program] = evaluators[program](_adapter(population, state, program, place))
        run.log.write({"step": step, "member": member, **before[program]})
        if step:
            run.reporter.say(f"after step {step}: {work.plan.labels[member]}: {run.job.describe(before[program])}")


def _adapter(population: Population, state: PopulationState, program: int, place: int) -> Any:
    """A member's adapter in the leaves of its program, so that one evaluation is compiled for all of them."""
    group, peft = state.groups[program], population.pefts[program]
    assert group is not None
    factors, sizes = (None if x is None else x[place] for x in (group.factors, group.sizes))
    one = jax.tree.map(
        lambda axis, x: x if axis is None else x[place],
        peft.axes(group.train.adapter), group.train.adapter, is_leaf=lambda x: x is None,
    )  # fmt: skip
    return as_own(peft, one, factors, sizes)


# ------------------------------------------------------------------------------------------------------------- results


def _conclude(work: _Sweep, run: Run, state: PopulationState, population: Population) -> dict[str, Any]:
    """Writes the adapter of the best member, the picture and the results."""
    plan, total, lines = work.plan, run.job.steps, run.log.lines
    best = _better_half(population.origins, lines, total)[0]
    peft, adapter = population.member(state, population.origins.index(best))
    job = dataclasses.replace(run.job, peft=peft, config=plan.configs[best])
    run.check_lock()
    save(run.folder / "adapter", peft, adapter, job.params)
    own = Log(run.log.file, [line for line in lines if line["member"] == best])
    key, _ = population.members[population.origins.index(best)].keys()
    result = result_of(dataclasses.replace(run, job=job, log=own), peft.init(key, job.params), adapter, total)
    rows = [{**choice, **_outcome(lines, i, best)} for i, choice in enumerate(plan.choices)]
    result["sweep"] = {"kept": plan.labels[best], "halving": plan.halving, "combinations": rows}
    plot_sweep(lines, plan.labels, best, run.folder / "sweep.png")
    record = run_folder.read_record(run.folder)
    changed = {"config": dataclasses.asdict(job.config), "method": peft.method.to_dict()}
    write_json(run.folder / "config.json", {**record, **changed})
    run_folder.write_result(run.folder, result)
    return result


def _outcome(lines: Sequence[Mapping[str, Any]], member: int, best: int) -> dict[str, Any]:
    """How far a combination came, and its last evaluation."""
    own = [line for line in lines if line["member"] == member]
    last = [line for line in own if "eval_loss" in line][-1]
    metrics = {name: value for name, value in last.items() if name.startswith("eval_")}
    return {"steps": max(line["step"] for line in own), **metrics, "kept": member == best}


def rows_of(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of a sweep's table, the best combinations first: a name and what became of it.

    >>> rows = [{"lr": 0.1, "steps": 9, "eval_loss": 0.5, "kept": True}, {"lr": 1.0, "steps": 3, "eval_loss": None}]
    >>> list(rows_of({"sweep": {"combinations": rows}}))
    [('lr=0.1', 'loss 0.5000 after 9 steps, kept'), ('lr=1.0', 'diverged after 3 steps')]
    """
    known = {"steps", "kept"}

    def order(row: Mapping[str, Any]) -> tuple[int, float]:
        return -row["steps"], math.inf if row["eval_loss"] is None else row["eval_loss"]

    for row in sorted(result["sweep"]["combinations"], key=order):
        label = " ".join(f"{k}={v}" for k, v in row.items() if k not in known and not k.startswith("eval_"))
        loss = "diverged" if row["eval_loss"] is None else f"loss {row['eval_loss']:.4f}"
        yield label, f"{loss} after {row['steps']} steps{', kept' if row.get('kept') else ''}"
