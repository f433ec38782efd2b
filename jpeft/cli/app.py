"""The command line: `jpeft finetune | plan | predict | merge | export | inspect | generate | chat | quantize`.

Results go to stdout, errors to stderr as one line. A command imports its heavy modules only when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jpeft.cli import chat, export, finetune, generate, inspect, merge, plan, predict, quantize
from jpeft.cli.terminal import print_error
from jpeft.recipes.config import Interrupted

# Modules of the extra [demo]; an error about a missing one names the command that installs them.
_EXTRAS = {"orbax", "tokenizers", "jinja2", "gguf", "rich", "matplotlib", "flatbuffers"}
_COMMANDS = (finetune, plan, predict, merge, export, generate, chat, quantize, inspect)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    >>> main(["inspect", "runs/minilm-lora-1"])  # doctest: +SKIP
    """
    status = _run(_parser().parse_args(arguments))
    if status and (distributed := sys.modules.get("jpeft.parallel.distributed")) is not None:
        distributed.leave(status)
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        with _handling_signals(), _warnings_in_one_line():
            args.run_command(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        print_error("interrupted; no file was left incomplete")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message, status = _explain(error)
        if not _is_reported_elsewhere(error):
            print_error(message)
        return status


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
def _warnings_in_one_line() -> Iterator[None]:
    """A context in which a warning is one line, without the place in the code that gave it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"jpeft: warning: {' '.join(str(message).split())}\n"
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
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        return f'this command needs {error.name}: pip install "jpeft[demo]"', 1
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorboardX":
        return '--tensorboard needs tensorboardX: pip install "jpeft[tensorboard]"', 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, OSError) or (isinstance(error, ValueError) and type(error) is not ValueError):
        return str(error), 1
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return f"out of memory ({str(error)[:120]}); use a smaller --batch-size, --max-length or --rank", 1
    return f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)", 1


# ------------------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jpeft: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jpeft", description="Parameter-efficient fine-tuning for JAX and Flax.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    common.add_argument("--debug", action="store_true", help="print the traceback of an error")
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        subparser = commands.add_parser(name, parents=[common], help=command.SUMMARY, description=command.SUMMARY)
        subparser.set_defaults(run_command=command.run)
        command.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
