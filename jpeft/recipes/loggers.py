"""Loggers: where a run sends its metrics beside its own `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jpeft.errors import UserError


class Logger(Protocol):
    """Receives the metrics of a run."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Receives the metrics of a training step, or of the evaluation after it. Values that are no numbers are left
        out.
        """
        ...

    def close(self) -> None:
        """Sends what is left, and ends."""
        ...


class TensorBoard:
    """Writes TensorBoard events to `RUN/tensorboard`."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Loggers:
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger] = ()):
        self.loggers = tuple(loggers)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


LOGGERS: Mapping[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {"tensorboard": TensorBoard}


def open_loggers(names: Sequence[str], run: Path, config: Mapping[str, Any], first_step: int) -> Loggers:
    """Opens the named loggers for a run that goes on with a step.

    >>> open_loggers(["tensorboard"], Path("runs/first"), {"lr": 1e-3}, first_step=1)  # doctest: +SKIP
    """
    if unknown := [name for name in names if name not in LOGGERS]:
        raise UserError(f"--log {unknown[0]}: choose from {', '.join(LOGGERS)}")
    return Loggers([LOGGERS[name](run, config, first_step) for name in names])
