"""The command line: `jpeft finetune | plan | predict | merge | export | inspect | generate | chat | serve | quantize`.

Results go to stdout, errors to stderr as one line. A command imports its heavy modules only when it runs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jpeft.checks import nearest
from jpeft.cli import chat, export, finetune, generate, inspect, merge, plan, predict, quantize, serve
from jpeft.cli.terminal import print_error
from jpeft.recipes.config import Interrupted

if TYPE_CHECKING:
    from cyclopts import App

    from jpeft.recipes.options import Option

# Modules of extras; an error about a missing one names the command that installs them.
_EXTRAS: dict[str, str] = dict.fromkeys(("prometheus_client", "starlette", "uvicorn"), "serve")
_EXTRAS |= dict.fromkeys((
    "cyclopts", "filelock", "gguf", "grain", "jinja2", "matplotlib", "orbax", "pandas", "rich", "ruamel", "tokenizers",
), "demo")  # fmt: skip
COMMANDS: Mapping[str, Any] = {
    module.__name__.rpartition(".")[2]: module
    for module in (finetune, plan, predict, merge, export, generate, chat, serve, quantize, inspect)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Raises:
        SystemExit: the command line cannot be parsed (2), or asks for help (0).

    >>> main(["inspect", "runs/minilm-lora-1"])  # doctest: +SKIP
    """
    try:
        with _handling_signals():
            command, given, known = _parse(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt as stop:
        return _report_interrupt(stop)
    except (ModuleNotFoundError, OSError) as error:  # an extra, or where the help goes
        print_error(_explain(error)[0])
        return 1
    status = _run(COMMANDS[command], given, known)
    if status and (distributed := sys.modules.get("jpeft.parallel.distributed")) is not None:
        distributed.leave(status)
    return status


def _parse(arguments: Sequence[str]) -> tuple[str, Mapping[str, Any], Mapping[str, Option]]:
    """The command, what is given to it, and its options."""
    from jpeft.cli.arguments import UsageError, known_options, parse

    name, *words = arguments or [""]
    if name in (*_HELP, "help"):
        if not words:
            _show(make_app(), ["--help"])
        name, words = words[0], ["--help"]
    before = set(itertools.takewhile(lambda word: word != "--", [name, *words]))
    if "--version" in before:
        _show(make_app(), ["--version"])
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        problem = f"unknown {kind} {name!r}" if name else "no command"
        _exit(problem + (nearest(name, [*COMMANDS]) or f"; the commands are {', '.join(COMMANDS)}"), "jpeft")
    app, known = make_app(name), known_options(classes_of(name))
    if before & {*_HELP}:
        _show(app, [name, "--help"])
    try:
        return name, parse(app, [name, *words], known), known
    except UsageError as error:
        _exit(str(error), f"jpeft {name}")


_HELP = ("--help", "-h")


def make_app(*built: str) -> App:
    """The cyclopts app, with the options of the commands that are named; the others have their summary alone.

    >>> list(make_app("merge")["merge"].help_flags)
    ['--help', '-h']
    """
    from cyclopts import App

    from jpeft.cli.arguments import make_command

    app = App(
        name="jpeft",
        help="Parameter-efficient fine-tuning for JAX and Flax.",
        version=lambda: importlib.metadata.version("jpeft"),
        help_flags=_HELP,
        result_action="return_value",
    )
    for place, (name, module) in enumerate(COMMANDS.items()):
        make_command(app, name, module.SUMMARY, classes_of(name) if name in built else (), sort_key=place)
    return app


def classes_of(name: str) -> Sequence[type]:
    """The dataclasses with a command's options.

    >>> [cls.__name__ for cls in classes_of("finetune")]
    ['Config', 'Execution', 'Options']
    """
    module = COMMANDS[name]
    return getattr(module, "OPTIONS", (module.Options,))


def _show(app: App, arguments: Sequence[str]) -> NoReturn:
    app(list(arguments))
    sys.exit(0)


def _exit(message: str, command: str) -> NoReturn:
    """Ends with status 2 and one line about a mistyped command line."""
    print_error(f"{message.rstrip()} (see {command} --help)")
    sys.exit(2)


def _run(module: Any, given: Mapping[str, Any], known: Mapping[str, Option]) -> int:
    from jpeft.cli.arguments import as_flags

    try:
        with _handling_signals(), _warnings_in_one_line(known):
            module.run(given if hasattr(module, "OPTIONS") else module.Options(**given))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        return _report_interrupt(stop)
    except BrokenPipeError:  # the reader of a pipe closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if given.get("debug"):
            traceback.print_exc()
        message, status = _explain(error)
        if not _is_reported_elsewhere(error):
            print_error(as_flags(message, known))
        return status


def _report_interrupt(stop: KeyboardInterrupt) -> int:
    print_error("interrupted; no file was left incomplete")
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextlib.contextmanager
def _handling_signals() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM raise a KeyboardInterrupt that holds the signal's number.

    SIGINT too: a process that a shell starts in the background (`nohup jpeft … &`) inherits that SIGINT is ignored, and
    Python then installs no handler of its own. `kill -INT` stops the command there as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def _warnings_in_one_line(known: Mapping[str, Option]) -> Iterator[None]:
    """A context in which a warning is one line, without the place in the code that gave it."""
    from jpeft.cli.arguments import as_flags

    def in_one_line(message: Any, *_: Any, **__: Any) -> str:
        return f"jpeft: warning: {as_flags(' '.join(str(message).split()), known)}\n"

    before, warnings.formatwarning = warnings.formatwarning, in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _is_reported_elsewhere(error: Exception) -> bool:
    """True if process 0 of several reports this error."""
    hosts = sys.modules.get("jpeft.parallel.hosts")
    if hosts is None or hosts.is_main_process():
        return False
    return isinstance(error, (Interrupted, hosts.HostError)) or getattr(error, "reported", False)


def _explain(error: Exception) -> tuple[str, int]:
    """The message and the exit status for an error."""
    if isinstance(error, Interrupted):
        saved = f"saved up to step {error.step}" if error.step else "before its first checkpoint"
        return f"stopped, {saved}; continue with: jpeft finetune --out {error.run} --resume", 128 + error.number
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
        return f'this command needs {error.name}: pip install "jpeft[{extra}]"', 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, OSError) or (isinstance(error, ValueError) and type(error) is not ValueError):
        return str(error), 1
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return f"out of memory ({str(error)[:120]}); use a smaller `batch_size`, `max_length` or `rank`", 1
    return f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)", 1


if __name__ == "__main__":
    sys.exit(main())
