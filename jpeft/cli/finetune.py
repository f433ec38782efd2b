"""`jpeft finetune`: a run, new or resumed."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.checks import Rule, is_int
from jpeft.cli.common import Common
from jpeft.cli.terminal import Terminal, print_json
from jpeft.errors import UserError
from jpeft.recipes.config import Config, Execution, Setup
from jpeft.recipes.options import ANY_TEXT, OUTPUT, TRAINING, WHAT, option, options
from jpeft.storage import as_path

SUMMARY = "Fine-tune a classifier (by default MiniLM on reviews) or, with --task chat, a language model."
_PROFILED = 3  # steps
_TIMES: Rule = (lambda value: is_int(value) and 0 <= value < 32, "an integer, at least 0")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft finetune` beside the run's configuration and its execution."""

    overrides: tuple[str, ...] = option(
        "any option, such as lr=1e-3, as in a configuration file", WHAT, (), metavar="NAME=VALUE", positional=True
    )
    config: str | None = option(
        "read options from a YAML or JSON file, or from a run's config.json; those of the command line win", WHAT, None,
        metavar="FILE",
    )  # fmt: skip
    resume: str | None = option(
        "resume RUN, or the run at --out, or the latest in runs/; a larger --steps or --epochs lengthens it (not a "
        "sweep): the learning rate of its remaining steps is then that of a run of the new length, which decays to "
        "zero at its end",
        OUTPUT, None, rule=ANY_TEXT, metavar="RUN", implied="",
    )  # fmt: skip
    sweep: tuple[str, ...] = option(
        "train all combinations of several values together, such as lr=1e-4,3e-4,1e-3 rank=8,16, and keep the best; of "
        "method, rank, alpha, dropout, lr and seed, where batches come in the order of one seed", TRAINING, (),
        metavar="NAME=VALUES",
    )  # fmt: skip
    halving: int = option(
        "with --sweep, how often the half with the higher evaluation loss ends, after equal parts of the steps",
        TRAINING, 0, rule=_TIMES,
    )  # fmt: skip
    tensorboard: bool = option("the same as --log tensorboard", OUTPUT, False)


# The options of the command line, of which a configuration file may hold the first two dataclasses'.
OPTIONS = (Config, Execution, Options)


def run(given: Mapping[str, Any]) -> None:
    """Trains, and prints the result."""
    args = Options(**_of(Options, given))
    given = _with_file(args.config, given)
    configured = _of(Config, given)
    config = _config(configured, args.config)  # reports mistakes before a model is read
    execution = Execution(**_of(Execution, given))
    log_to, profile, out = _log_to(args, execution), _profile(execution.profile), _run_folder(args, execution)
    if config.adapter is not None:
        from jpeft.recipes.start import inherited

        config = Config(**{**inherited(config.adapter), **configured})
    joined = execution.is_distributed
    _check_sweep(args, given, joined)
    if joined:
        from jpeft.parallel import distributed

        distributed.join(execution.coordinator, execution.processes, execution.process, execution.join_within)
        _reserve_stdout()
    from jpeft.cli.arguments import as_flags, known_options
    from jpeft.parallel import hosts

    mesh = _mesh(args, execution, configured) if joined or execution.mesh is not None else None
    setup = Setup(mesh, log_to, profile, None if execution.remat == "none" else execution.remat)
    is_main = hosts.is_main_process()
    with Terminal(args.json, not is_main, functools.partial(as_flags, known=known_options(OPTIONS))) as terminal:
        result = _train(args, out, config, configured, terminal, setup)
        if not args.json:
            _show(result, terminal)
    if args.json and is_main:
        print_json(result)


def _of(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in options(cls) if name in given}


def _with_file(path: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the command line, over those of a configuration file."""
    if path is None:
        return dict(given)
    from jpeft.recipes.config_file import read_config_file

    found = read_config_file(path, {**options(Config), **options(Execution)}, [*options(Options)])
    merged = {name: {**found.get(name, {}), **given[name]} for name in ("settings",) if name in given}
    return {**found, **given, **merged}


def _config(given: Mapping[str, Any], path: str | None) -> Config:
    try:
        return Config(**given)
    except UserError as error:
        if path is None:
            raise
        raise UserError(f"{error} (with the options of {path})") from error


def _log_to(args: Options, execution: Execution) -> tuple[str, ...]:
    named = [name.strip() for name in (execution.log or "").split(",") if name.strip()]
    return tuple(dict.fromkeys([*named, *(["tensorboard"] if args.tensorboard else [])]))


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, count = (int(found[1]), int(found[2] or _PROFILED)) if found else (0, 0)
    if not (first and count):
        raise UserError(f"`profile` {text}: expected STEP or STEP:COUNT, from 1 on")
    return first, count


def _run_folder(args: Options, execution: Execution) -> Any:
    """The folder that --out or --resume names."""
    out = None if execution.out is None else as_path(execution.out)
    if not args.resume:
        return out
    if out is not None and out != as_path(args.resume):
        raise UserError(f"`resume` {args.resume} and `out` {execution.out} name two runs; give one")
    return as_path(args.resume)


def _mesh(args: Options, execution: Execution, configured: Mapping[str, Any]) -> Any:
    """The device mesh, once all processes have been found to run with the same options."""
    from jpeft.parallel import hosts
    from jpeft.parallel.mesh import device_mesh

    same = {name: configured.get(name) for name in options(Config)}
    same |= {name: getattr(execution, name) for name in ("mesh", "out", "remat", "log")} | {"resume": args.resume}
    hosts.check_same({f"`{name}`": repr(value) for name, value in same.items()})
    return device_mesh(execution.mesh)


def _check_sweep(args: Options, given: Mapping[str, Any], joined: bool) -> None:
    """Raises a UserError for options that contradict --sweep, before a model is read."""
    if args.halving and not args.sweep and args.resume is None:
        raise UserError(f"`halving` {args.halving} has no meaning without `sweep`")
    if not args.sweep:
        return
    from jpeft.recipes.sweep import parse_grid

    if joined:
        raise UserError("`sweep` trains in one process; leave out `distributed` and its options")
    if twice := [name for name in parse_grid(args.sweep) if name in given]:
        raise UserError(f"`{twice[0]}` {given[twice[0]]} contradicts `sweep`; give one")


def _train(
    args: Options, out: Any, config: Config, given: Mapping[str, Any], terminal: Terminal, setup: Setup
) -> dict[str, Any]:
    """Starts a run, or resumes the one that is named or the latest. Returns its result."""
    from jpeft.parallel import hosts
    from jpeft.recipes import finetune, run_folder, sweep

    def start() -> dict[str, Any]:
        if args.sweep:
            return sweep.sweep(config, sweep.parse_grid(args.sweep), args.halving, out, terminal, setup)
        return finetune.finetune(config, out, terminal, setup)

    if args.resume is None:
        return start()
    name = hosts.broadcast(str(out or run_folder.latest_run() or ""))
    if name and (args.resume or hosts.on_all_hosts(as_path(name).exists)):
        again = sweep if sweep.is_sweep(as_path(name)) else finetune
        return again.resume(as_path(name), given, terminal, setup)
    # The same command line, repeated, survives a kill at any moment.
    terminal.say("nothing to resume yet: starting")
    return start()


def _show(result: Mapping[str, Any], terminal: Terminal) -> None:
    from jpeft.cli.results import format_sample, result_rows

    for sample in result.get("samples", ()):
        terminal.say(format_sample(sample))
    if "sweep" in result:
        from jpeft.recipes.sweep import rows_of

        terminal.table([*rows_of(result)])
    terminal.table(result_rows(result))


def _reserve_stdout() -> None:
    """Keeps stdout for this command's output; what Gloo (CPU collectives) prints there goes to stderr."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")
