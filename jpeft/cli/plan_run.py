"""`jpeft plan`: what is asked for on the command line, planned for and told."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jpeft.errors import UserError
from jpeft.hardware.topologies import parse
from jpeft.planning import report, result
from jpeft.planning.result import Plan
from jpeft.recipes import plan_job, plan_sweep
from jpeft.recipes.assets import MODELS
from jpeft.recipes.config import Config
from jpeft.recipes.plan_sweep import Choice, Outcome


def run(args: argparse.Namespace) -> None:
    """Carry out the command."""
    _check(args)
    if any(parse(name).kind == "gpu" for name in args.topology):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the process that compiles needs it too
    else:
        jax.config.update("jax_platforms", "cpu")  # nothing is computed here; libtpu, if it is there, stays out of it
    wanted = plan_sweep.choices(
        _config(args), args.topology, args.mesh, args.batch, [None if r == "none" else r for r in args.remat],
        args.quantize, args.sweep,
    )  # fmt: skip
    if len(wanted) > 1 and not args.sweep:
        raise UserError(f"{len(wanted)} choices are given; --sweep plans for each")
    if unsaid := plan_job.unsaid(args.model):
        told = f"jpeft: note: {args.model} does not say {', '.join(unsaid)}: what such models have by default is taken"
        print(told, file=sys.stderr)
    if args.sweep:
        _many(wanted, args)
    else:
        _one(wanted[0], args)


def _check(args: argparse.Namespace) -> None:
    """What can be told before minutes are spent on compiling."""
    if not args.topology:
        raise UserError("--topology names none; expected one such as v5e:4x4 or cpu:8")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    if args.seq < 1:
        raise UserError(f"--seq {args.seq}: expected at least 1 token")
    if args.price is not None and not args.price > 0:
        raise UserError(f"--price {args.price:g}: expected dollars, more than 0")
    if (path := _picture(args)) is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: expected a picture's name, with .png, .svg or .pdf")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.absolute()}: cannot be written")


def _picture(args: argparse.Namespace) -> Path | None:
    return args.picture or (Path("plan.png") if args.sweep else None)


def _config(args: argparse.Namespace) -> Config:
    """As `finetune` would have it; batch and quantization are filled in by choice."""
    fields: dict[str, Any] = {"task": args.task, "model": args.model, "method": args.method, "dtype": args.dtype,
              "max_length": args.seq, "accumulate": args.accumulate, "quantize": (args.quantize or ["none"])[0],
              "batch_size": (args.batch or [16])[0], "settings": dict(args.settings)}  # fmt: skip
    given = {name: getattr(args, name) for name in ("rank", "alpha", "dropout", "targets")}
    return Config(**fields, **{name: value for name, value in given.items() if value is not None})


def command_of(choice: Choice) -> str:
    """The `finetune` that a choice is a plan of, but for its data.

    >>> command_of(Choice(Config(task="chat", model="llama-3-8b", batch_size=16), "v5e:4x4", "fsdp=16", "full"))
    'jpeft finetune --task chat --model llama-3-8b --batch-size 16 --remat full --distributed --mesh fsdp=16'
    """
    defaults = Config(task=choice.config.task)
    words = ["jpeft", "finetune", "--task", choice.config.task]
    for field in dataclasses.fields(Config):
        value = getattr(choice.config, field.name)
        if (
            field.name not in ("task", "settings", "steps")
            and value is not None
            and value != getattr(defaults, field.name)
        ):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    for name, value in choice.config.settings.items():
        words += ["--set", f"{name}={value if _is_bare(value) else json.dumps(value)}"]
    words += [] if choice.remat is None else ["--remat", choice.remat]
    topology = parse(choice.topology)
    words += ["--distributed"] if topology.kind == "tpu" else []  # of others, all are this host's
    words += (
        [] if choice.mesh is None and topology.kind == "tpu" else ["--mesh", choice.mesh or f"fsdp={topology.devices}"]
    )
    return shlex.join(words)


def _weights(choice: Choice) -> str:
    """That a size has no weights: `finetune` wants a folder that does."""
    known = choice.config.model in MODELS or Path(choice.config.model).is_dir()
    return "" if known else f", with a folder of weights in the place of {choice.config.model}"


def _is_bare(value: Any) -> bool:
    """Whether it is a text that is read as itself."""
    try:
        json.loads(value)
    except ValueError:
        return True
    except TypeError:
        pass
    return False


def _one(choice: Choice, args: argparse.Namespace) -> None:
    outcome = plan_sweep.run([choice], args.jobs, against_base=not args.no_base)[0]
    if outcome.plan is None:
        raise UserError(outcome.error)
    _draw([outcome], args)
    if args.json:
        print(json.dumps(_facts(outcome), default=str))
        return
    print(f"{choice.config.model}, {choice.config.method}, {choice.config.batch_size} x {choice.config.max_length:,} "
          f"tokens, quantize {choice.config.quantize}, remat {choice.remat or 'none'}")  # fmt: skip
    print(outcome.plan)
    print(f"  to run it{_weights(choice)}: {command_of(choice)} --data …")


def _many(wanted: list[Choice], args: argparse.Namespace) -> None:
    with _progress(len(wanted)) as told:
        outcomes = plan_sweep.run(wanted, args.jobs, told, against_base=False)
    sorted_ = plan_sweep.cheapest(outcomes)
    _draw(sorted_, args)
    best = next((o for o in sorted_ if o.plan is not None and o.plan.fits is not False), None)
    if args.json:
        failed = [{"choice": o.choice.label(), "error": o.error} for o in outcomes if o.plan is None]
        found = {"plans": [_facts(o) for o in sorted_], "failed": failed, "best": best and best.choice.label()}
        print(json.dumps(found, default=str))
        return
    if not sorted_:
        raise UserError(f"none of {len(wanted)} choices can be planned for; the first: {outcomes[0].error}")
    from rich.console import Console

    console = Console(highlight=False)
    console.print(report.table([(o.choice.label(wanted), o.plan) for o in sorted_ if o.plan], args.price))
    for choice, error in plan_sweep.left_out(outcomes):
        console.print(f"left out: {choice.label(wanted)}: {error}", markup=False, soft_wrap=True)
    if best is None:
        console.print("none fits: more chips, --quantize nf4, --accumulate or a smaller --batch need less a device")
    else:
        which = "cheapest that fits" if best.plan is not None and best.plan.fits else "needs the least memory"
        console.print(f"{which}: {best.choice.label()}", markup=False, soft_wrap=True)
        told = f"to run it{_weights(best.choice)}: {command_of(best.choice)} --data …"
        console.print(told, markup=False, soft_wrap=True)


def _facts(outcome: Outcome) -> dict[str, Any]:
    plan: Plan = outcome.plan  # type: ignore[assignment]
    choice = outcome.choice
    config = {name: value for name, value in dataclasses.asdict(choice.config).items() if value is not None}
    return {"choice": choice.label(), "config": config, "remat": choice.remat, **plan.to_dict(),
            "usd_per_million_tokens": result.dollars_per_million(plan)}  # fmt: skip


def _draw(outcomes: list[Outcome], args: argparse.Namespace) -> None:
    path = _picture(args)
    if path is None or not outcomes:
        return
    everyone = [o.choice for o in outcomes]
    rows = [(o.choice.label(everyone if len(everyone) > 1 else ()), o.plan) for o in outcomes if o.plan is not None]
    report.picture(rows, path)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
