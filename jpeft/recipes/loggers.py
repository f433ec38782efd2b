"""Loggers: where a run sends its metrics beside its own `metrics.jsonl`.

RUN/tensorboard      TensorBoard's events
RUN/loggers.json     which runs of Weights & Biases and Trackio a resumed run goes on with
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jpeft.errors import UserError
from jpeft.files import read_json, write_json
from jpeft.storage import is_remote

PROJECT = "jpeft"
RECORD = "loggers.json"

Lines = Sequence[Mapping[str, Any]]


class Logger(Protocol):
    """Receives the metrics of a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Receives the metrics of a training step, or those of the evaluation after it."""
        ...

    def close(self) -> None:
        """Sends what is left, and ends."""
        ...


class TensorBoard:
    """Events for TensorBoard. Those that a killed run wrote after its last checkpoint are purged."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int, sent: Lines):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Remote:
    """A run of a service, which a resumed run goes on with. What the service has already is not sent again."""

    name = ""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int, sent: Lines):
        record = _read_record(run)
        known = record.get(self.name)
        identity = known or secrets.token_hex(4)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
            self.run = self.start(run, identity, dict(config))
        write_json(run / RECORD, {**record, self.name: identity})
        self.sent = {_key(line, line["step"]) for line in sent} if known else set()
        if (step := self.next_step()) is not None:  # a killed process may have logged here what it did not send
            self.sent = {key for key in self.sent if key[0] < step}

    def start(self, run: Path, identity: str, config: dict[str, Any]) -> Any:
        """The service's run of this identity, new or as it was."""
        raise TypeError(f"{type(self).__name__} does not define start")

    def next_step(self) -> int | None:
        """The step after the last that the service has, if it says that."""
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if _key(metrics, step) not in self.sent:
            self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


class WandB(_Remote):
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, or "jpeft"."""

    name = "wandb"

    def next_step(self) -> int | None:
        return self.run.step if self.run.resumed else None

    def start(self, run: Path, identity: str, config: dict[str, Any]) -> Any:
        import wandb  # pyright: ignore[reportMissingImports]

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=identity,
            resume="allow",
            config=config,
            dir=None if is_remote(run) else str(run),
            settings=wandb.Settings(console="off"),
        )


class Trackio(_Remote):
    """A run of Trackio, in its project "jpeft": on this machine, or on the Space that TRACKIO_SPACE_ID names."""

    name = "trackio"

    def start(self, run: Path, identity: str, config: dict[str, Any]) -> Any:
        import trackio  # pyright: ignore[reportMissingImports]

        return trackio.init(project=PROJECT, name=f"{run.name}-{identity}", config=config, resume="allow")

    def next_step(self) -> int | None:
        return getattr(self.run, "_next_step", None)  # nothing public says it


# By name: what opens it, the package it needs, and what to do where it does not start.
LOGGERS: Mapping[str, tuple[Callable[[Path, Mapping[str, Any], int, Lines], Logger], str, str]] = {
    "tensorboard": (TensorBoard, "tensorboardX", "choose another logger"),
    "wandb": (WandB, "wandb", "log in, or set WANDB_MODE=offline"),
    "trackio": (Trackio, "trackio", "choose another logger"),
}


class Loggers:
    """Several loggers as one. One that fails is left out from then on, with a warning: it does not end the run.

    >>> with contextlib.closing(Loggers({})) as loggers:
    ...     loggers.log({"loss": 0.5}, step=1)
    """

    def __init__(self, loggers: Mapping[str, Logger]):
        self._loggers = dict(loggers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Passes the metrics that are numbers on to every logger."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._each(lambda logger: logger.log(numbers, step), f"at step {step}")

    def close(self) -> None:
        """Closes every logger."""
        self._each(lambda logger: logger.close(), "when it was closed")
        self._loggers.clear()

    def _each(self, call: Callable[[Logger], None], when: str) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:
                del self._loggers[name]
                warnings.warn(
                    f"`log` {name} failed {when}, and gets nothing more of this run; metrics.jsonl has everything: "
                    f"{_line(error)}",
                    stacklevel=3,
                )


def check_loggers(names: Sequence[str]) -> None:
    """Checks that loggers are there, before a run begins.

    Raises:
        UserError: there is no logger of a name, or its package is not installed.

    >>> check_loggers(["tensorboard"])
    """
    for name in names:
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, 1)
            meant = f"; nearest: {near[0]}" if near else ""
            raise UserError(f"`log` {name}: no such logger{meant}; choose from {', '.join(LOGGERS)}")
        package = LOGGERS[name][1]
        try:
            importlib.import_module(package)
        except ImportError as error:
            wanted = f'`log` {name} needs {package}: pip install "jpeft[{name}]"'
            raise UserError(wanted if error.name == package else f"{wanted} ({_line(error)})") from error


def open_loggers(
    names: Sequence[str], run: Path, config: Mapping[str, Any], first_step: int, sent: Lines = ()
) -> Loggers:
    """Opens the named loggers for a run.

    Args:
        run: the run folder.
        config: the run's configuration, which the services show beside its metrics.
        first_step: the step that the run goes on with.
        sent: the lines that the run logged before it was resumed, also those after its last checkpoint: they are
            logged again, and services that have them do not get them twice.

    Raises:
        UserError: a logger does not start, e.g. without a login.

    >>> open_loggers(["tensorboard"], Path("runs/first"), {"lr": 1e-3}, first_step=1)  # doctest: +SKIP
    """
    check_loggers(names)
    opened: dict[str, Logger] = {}
    for name in dict.fromkeys(names):
        start, _, otherwise = LOGGERS[name]
        try:
            opened[name] = start(run, config, first_step, sent)
        except Exception as error:
            Loggers(opened).close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"`log` {name} does not start: {_line(error)}; {otherwise}, and continue with: "
                f"jpeft finetune --out {run} --resume"
            ) from error
    return Loggers(opened)


def _read_record(run: Path) -> dict[str, Any]:
    try:
        return read_json(run / RECORD, UserError)
    except FileNotFoundError:
        return {}


def _key(metrics: Mapping[str, Any], step: int) -> tuple[int, bool]:
    """The key of a line of a run: the step, and whether it is its evaluation."""
    return step, "eval_loss" in metrics


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
