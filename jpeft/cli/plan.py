"""`jpeft plan`: a training step on hardware that is not attached."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jpeft.cli.arguments import add_dtype, name_value
from jpeft.cli.terminal import print_note, progress_bar
from jpeft.errors import UserError
from jpeft.recipes.config import CHAT, CLASSIFY, SCHEMES, Config

SUMMARY = "Estimate memory, time and traffic of a training step on hardware you do not have."
_PICTURES = (".png", ".svg", ".pdf")


_SEVERAL = "; with --sweep a list, or several values if not given"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_hardware(parser)
    _add_job(parser)
    _add_output(parser)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="a known size such as llama-3-8b, a config.json, a folder with one, or as for "
        "finetune; weights are not read",
    )
    add(
        "--topology",
        required=True,
        type=_words,
        metavar="NAME",
        help="v5e:4x4, v5p:2x2x4, v6e-16, …, cpu:8 or gpu:1; with --sweep a comma-separated list",
    )
    add(
        "--mesh",
        action="append",
        default=[],
        metavar="AXES",
        help=f"device mesh, such as fsdp=8,tensor=2 (default: all devices on fsdp); may be repeated{_SEVERAL}",
    )


def _add_job(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rows = "rows per step (default: 16); with --sweep a list"
    add("--batch", "--batch-size", type=_counts, default=[], metavar="INT", help=rows)
    add("--seq", "--max-length", type=int, default=2048, metavar="INT", help="tokens per row (default: 2048)")
    add(
        "--remat",
        type=_choices("full", "dots", "offload", "none"),
        default=[],
        help=f"as for finetune (default: full){_SEVERAL}",
    )
    add(
        "--quantize",
        type=_choices("none", *SCHEMES),
        default=[],
        metavar="SCHEME",
        help=f"none (default), {', '.join(SCHEMES)}{_SEVERAL}",
    )
    add_dtype(parser, "dtype of base weights and activations", default="bfloat16")
    add("--accumulate", type=int, default=1, metavar="INT", help="micro-batches per batch (default: 1)")
    add("--task", choices=(CHAT, CLASSIFY), default=CHAT, help=f"as for finetune (default: {CHAT})")
    add("--method", default="lora", help="as for finetune (default: lora)")
    for name, kind in (("--rank", int), ("--alpha", float), ("--dropout", float), ("--targets", str)):
        add(name, type=kind, metavar=kind.__name__.upper(), help="as for finetune")
    add(
        "--set",
        dest="settings",
        action="append",
        type=name_value,
        default=[],
        metavar="NAME=VALUE",
        help="any other field of the method",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--no-base",
        action="store_true",
        help="do not compile the step without an adapter as well, which shows the adapter's share of the traffic",
    )
    add("--sweep", action="store_true", help="plan all combinations and recommend the cheapest that fits")
    add("--jobs", type=int, metavar="INT", help="compilations at a time (default: as cores and memory allow)")
    add("--price", type=float, metavar="USD", help="dollars per chip-hour (default: the list price)")
    add("--picture", type=Path, metavar="PNG", help="draw the memory of a device (default with --sweep: plan.png)")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _choices(*known: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",")]
        if wrong := [word for word in found if word not in known]:
            raise argparse.ArgumentTypeError(f"invalid choice: {wrong[0]!r}; expected {', '.join(known)}")
        return found

    return read


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"expected comma-separated numbers from 1 on, got {text!r}")
    return [int(word) for word in words]


# --------------------------------------------------------------------------------------------------------- command


def run(args: argparse.Namespace) -> None:
    _check(args)
    _choose_backend(args.topology)
    from jpeft.cli import plan_output
    from jpeft.recipes import plan_job, plan_sweep

    remats = [None if remat == "none" else remat for remat in args.remat]
    grid = plan_sweep.Grid(args.topology, args.mesh, args.batch, remats, args.quantize, args.sweep)
    choices = grid.choices(_config(args))
    if len(choices) > 1 and not args.sweep:
        raise UserError(f"{len(choices)} combinations are given; --sweep plans all of them")
    if missing := plan_job.missing_sizes(args.model):
        print_note(f"jpeft: note: {args.model} does not define {', '.join(missing)}; defaults are used")
    if args.sweep:
        outcomes = _plan_all(choices, args.jobs)
        plan_output.draw(outcomes, _picture(args))
        plan_output.show_sweep(outcomes, args.price, args.json)
    else:
        (outcome,) = plan_sweep.run(choices, args.jobs, against_base=not args.no_base)
        if outcome.plan is None:
            raise UserError(outcome.error)
        plan_output.draw([outcome], _picture(args))
        plan_output.show_plan(outcome, args.json)


def _check(args: argparse.Namespace) -> None:
    """Reports mistakes before minutes of compilation."""
    if not args.topology:
        raise UserError("--topology is empty; expected a name such as v5e:4x4 or cpu:8")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    if args.seq < 1:
        raise UserError(f"--seq {args.seq}: expected at least 1 token")
    if args.price is not None and not args.price > 0:
        raise UserError(f"--price {args.price:g}: expected a positive number of dollars")
    if (path := _picture(args)) is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise UserError(f"{path}: expected a file name that ends with {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.absolute()}: cannot be written")


def _picture(args: argparse.Namespace) -> Path | None:
    return args.picture or (Path("plan.png") if args.sweep else None)


def _choose_backend(topologies: list[str]) -> None:
    import jax

    from jpeft.hardware.topologies import parse

    if any(parse(name).kind == "gpu" for name in topologies):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the compiling process needs the GPU, too
    else:
        jax.config.update("jax_platforms", "cpu")  # an installed libtpu must not become a backend of this process


def _config(args: argparse.Namespace) -> Config:
    """The configuration of `jpeft finetune` with these arguments."""
    optional = {name: getattr(args, name) for name in ("rank", "alpha", "dropout", "targets")}
    return Config(
        task=args.task,
        model=args.model,
        method=args.method,
        dtype=args.dtype,
        max_length=args.seq,
        accumulate=args.accumulate,
        quantize=(args.quantize or ["none"])[0],
        batch_size=(args.batch or [16])[0],
        settings=dict(args.settings),
        **{name: value for name, value in optional.items() if value is not None},
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
