"""`jpeft plan`: a training step on hardware that is not attached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jpeft.checks import Rule, is_int, is_number
from jpeft.cli.common import Common
from jpeft.cli.terminal import print_note, progress_bar
from jpeft.errors import UserError
from jpeft.recipes.config import CHAT, SCHEMES, Config, Dtype
from jpeft.recipes.options import MACHINES, MEMORY, OUTPUT, WHAT, option, options, same

SUMMARY = "Estimate memory, time and traffic of a training step on hardware you do not have."
_PICTURES = (".png", ".svg", ".pdf")


_SEVERAL = "; with --sweep a list, or several values if none is given"
_REMATS = ("full", "dots", "offload", "none")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _list_of(*known: str) -> Rule:
    return lambda value: isinstance(value, str) and {*_words(value)} <= {*known} and bool(_words(value)), (
        f"one or several of {', '.join(known)}"
    )


_COUNTS: Rule = (
    lambda value: all(word.isdecimal() and int(word) for word in map(str.strip, value.split(","))),
    "comma-separated numbers from 1 on",
)
_AT_LEAST_1: Rule = (lambda value: is_int(value) and value >= 1, "at least 1")
_DOLLARS: Rule = (lambda value: is_number(value) and value > 0, "a positive number of dollars")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft plan`. Those of the method are as for `jpeft finetune`."""

    model: str = option(
        "a known size such as llama-3-8b, a config.json, a folder with one, or as for finetune; weights are not read",
        WHAT, metavar="MODEL",
    )  # fmt: skip
    task: Literal["chat", "classify"] = same(Config, "task", default=CHAT)
    max_length: int = option("tokens per row", WHAT, 2048, rule=_AT_LEAST_1, alias="--seq")
    batch_size: str | None = option(
        "rows per step; with --sweep a list", WHAT, None, shown="16", rule=_COUNTS, metavar="INT", alias="--batch"
    )
    accumulate: int = same(Config, "accumulate", group=WHAT)
    method: str | None = same(Config, "method")
    rank: int | None = same(Config, "rank")
    alpha: float | None = same(Config, "alpha")
    dropout: float | None = same(Config, "dropout")
    targets: str | None = same(Config, "targets")
    settings: Mapping[str, Any] = same(Config, "settings", default={})
    remat: str | None = option(
        f"{', '.join(_REMATS)}: rematerialization, as for finetune{_SEVERAL}", MEMORY, None, shown="full",
        rule=_list_of(*_REMATS), metavar="REMAT",
    )  # fmt: skip
    quantize: str | None = option(
        f"none, {', '.join(SCHEMES)}: scheme of the base{_SEVERAL}", MEMORY, None, shown="none",
        rule=_list_of("none", *SCHEMES), metavar="SCHEME",
    )  # fmt: skip
    dtype: Dtype = same(Config, "dtype", default="bfloat16")
    topology: str = option(
        "v5e:4x4, v5p:2x2x4, v6e-16, …, cpu:8 or gpu:1; with --sweep a list", MACHINES, metavar="NAME"
    )
    mesh: tuple[str, ...] = option(
        f"device mesh, such as fsdp=8,tensor=2; may be repeated{_SEVERAL}", MACHINES, (),
        shown="all devices on fsdp", metavar="AXES",
    )  # fmt: skip
    price: float | None = option(
        "dollars per chip-hour", MACHINES, None, shown="the list price", rule=_DOLLARS, metavar="USD"
    )
    base: bool = option(
        "compile the step without an adapter as well, which shows the adapter's share of the traffic", OUTPUT, True
    )
    sweep: bool = option("plan all combinations and recommend the cheapest that fits", OUTPUT, False)
    jobs: int | None = option(
        "compilations at a time", OUTPUT, None, shown="as cores and memory allow", rule=_AT_LEAST_1
    )
    picture: str | None = option(
        "draw the memory of a device", OUTPUT, None, shown="none; plan.png with --sweep", metavar="PNG"
    )


# --------------------------------------------------------------------------------------------------------- command


def run(args: Options) -> None:
    """Prints a plan, or a table of plans."""
    _check(args)
    topologies = _words(args.topology)
    _choose_backend(topologies)
    from jpeft.cli import plan_output
    from jpeft.cli.arguments import as_flags
    from jpeft.recipes import plan_job, plan_sweep

    remats = [None if remat == "none" else remat for remat in _words(args.remat or "")]
    batch_sizes = [int(word) for word in _words(args.batch_size or "")]
    grid = plan_sweep.Grid(topologies, args.mesh, batch_sizes, remats, _words(args.quantize or ""), args.sweep)
    choices = grid.choices(_config(args))
    if len(choices) > 1 and not args.sweep:
        raise UserError(f"{len(choices)} combinations are given; --sweep plans all of them")
    if missing := plan_job.missing_sizes(args.model):
        print_note(f"jpeft: note: {args.model} does not define {', '.join(missing)}; defaults are used")
    if args.sweep:
        known = options(Options)
        outcomes = [o._replace(error=as_flags(o.error, known)) for o in _plan_all(choices, args.jobs)]
        plan_output.draw(outcomes, _picture(args))
        plan_output.show_sweep(outcomes, args.price, args.json)
    else:
        (outcome,) = plan_sweep.run(choices, args.jobs, against_base=args.base)
        if outcome.plan is None:
            raise UserError(outcome.error)
        plan_output.draw([outcome], _picture(args))
        plan_output.show_plan(outcome, args.json)


def _check(args: Options) -> None:
    """Reports mistakes before minutes of compilation."""
    if not _words(args.topology):
        raise UserError("`topology` is empty; expected a name such as v5e:4x4 or cpu:8")
    if (path := _picture(args)) is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise UserError(f"{path}: expected a file name that ends with {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.absolute()}: cannot be written")


def _picture(args: Options) -> Path | None:
    return Path(args.picture) if args.picture else (Path("plan.png") if args.sweep else None)


def _choose_backend(topologies: list[str]) -> None:
    import jax

    from jpeft.hardware.topologies import parse

    if any(parse(name).kind == "gpu" for name in topologies):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the compiling process needs the GPU, too
    else:
        jax.config.update("jax_platforms", "cpu")  # an installed libtpu must not become a backend of this process


def _config(args: Options) -> Config:
    """The configuration of `jpeft finetune` with these arguments."""
    names = ("task", "model", "method", "rank", "alpha", "dropout", "targets", "settings", "dtype", "max_length")
    return Config(
        **{name: getattr(args, name) for name in (*names, "accumulate")},
        **{"quantize": _words(args.quantize or "none")[0], "batch_size": int(_words(args.batch_size or "16")[0])},
    )


def _plan_all(choices: list[Any], jobs: int | None) -> list[Any]:
    """Plans the choices, with a progress bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import TimeElapsedColumn

    from jpeft.recipes import plan_sweep

    console = Console(stderr=True)
    hidden = not console.is_terminal
    with progress_bar(console, "compiling", TimeElapsedColumn(), disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=len(choices))
        return plan_sweep.run(choices, jobs, lambda done: bar.update(task, completed=done))
