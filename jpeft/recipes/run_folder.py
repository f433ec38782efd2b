"""Run folders: the files that `jpeft finetune` writes, and how they are read back.

run/config.json      the configuration, and checksums of the base and the data
run/metrics.jsonl    a line for each training step and each evaluation
run/start/           the adapter that it began from, if it was not a fresh one
run/checkpoints/     to resume from
run/adapter/         the trained adapter: this, and the files below, exist once the run is complete
run/loss.png
run/result.json      the results, which the final table shows

A run may be on `gs://`. Its config.json is then created on the condition that there is none, so that of two processes
that take the same name one fails. A store cannot append to metrics.jsonl, which is therefore written again as a whole:
before each checkpoint, and in between every half minute.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jpeft.errors import UserError
from jpeft.files import new_folder, read_json, write_atomically, write_json
from jpeft.recipes.config import Config
from jpeft.recipes.loggers import Logger
from jpeft.storage import as_path, is_remote, reason, remove_folder
from jpeft.training import checkpoint

FORMAT = 1


# ------------------------------------------------------------------------------------------------------------ folders


def create_run(out: Path | None, config: Config, record: Mapping[str, Any]) -> Path:
    """Creates a run folder, named after the configuration if `out` is None.

    It appears with its config.json inside, so that a run can be resumed from its first moment.

    >>> create_run(None, Config(), record) == Path("runs/minilm-lora-1")  # doctest: +SKIP
    """
    stem = f"{Path(config.model).name}-{str(config.method).lower()}"
    numbered = (Path("runs") / f"{stem}-{number}" for number in itertools.count(1))
    for run in [as_path(out)] if out is not None else numbered:
        if run.exists():
            continue
        try:
            with new_folder(run) as folder:
                write_json(folder / "config.json", {"format": FORMAT, **record})
            return run
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and run.exists()  # by another process
            if not taken:
                raise UserError(f"{run}: cannot be created: {reason(error)}") from error
    raise UserError(f"{out} exists; choose another `out`, or continue that run with `resume`")


def latest_run(folder: Path = Path("runs")) -> Path | None:
    """The most recently created run below a folder, if there is one.

    >>> latest_run(Path("no/runs")) is None
    True
    """
    found = [path for path in folder.glob("*/config.json") if not path.parent.name.startswith(".")]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


def read_record(run: Path) -> dict[str, Any]:
    """The content of a run's config.json, validated.

    >>> Config(**read_record(run)["config"])  # doctest: +SKIP
    """
    path = run / "config.json"
    try:
        record = read_json(path, UserError)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run here (no config.json); start one with: jpeft finetune --out {run}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    if "config" not in record:
        raise UserError(f"{run}: not a run of `jpeft finetune` (its config.json is of another kind)")
    if (form := record.get("format")) != FORMAT:
        newer = type(form) is int and form > FORMAT
        raise UserError(
            f"{run}: written in format {form}{' by a newer jpeft' if newer else ''}; this version reads format "
            f"{FORMAT}{': pip install --upgrade jpeft' if newer else ''}"
        )
    for name, kind in (("config", dict), ("steps", int), ("method", dict), ("base", dict)):
        if not isinstance(record.get(name), kind):
            found = type(record[name]).__name__ if name in record else "nothing"
            raise UserError(
                f"{path}: {name!r} must be a JSON {kind.__name__}, got {found}: the file is damaged; restore it, or "
                "start another run"
            )
    record["config"] = {"head": "new"} | record["config"]  # earlier versions had no other
    try:
        Config(**record["config"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: not a configuration of this version: {error}") from error
    return record


def read_result(run: Path) -> dict[str, Any] | None:
    """The content of a run's result.json; None while the run is not complete.

    >>> read_result(Path("runs/none")) is None
    True
    """
    try:
        return read_json(run / "result.json", UserError)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}; remove it, and write it again with: jpeft finetune --out {run} --resume") from error


def write_result(run: Path, result: Mapping[str, Any]) -> None:
    """Writes result.json. Write it last: its presence marks the run as complete."""
    write_json(run / "result.json", dict(result))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, finished or not.

    >>> is_run(Path("runs/none"))
    False
    """
    try:
        return "config" in read_json(folder / "config.json", UserError)
    except (OSError, UserError):
        return False


def has_adapter(run: Path) -> bool:
    """Whether a run has its adapter: it is finished.

    >>> has_adapter(Path("runs/none"))
    False
    """
    return (run / "adapter" / "config.json").exists()


def usable(run: Path) -> dict[str, Any]:
    """The record of a run that has an adapter or a checkpoint.

    >>> usable(Path("runs/smollm2-lora-1"))["steps"]  # doctest: +SKIP
    60
    """
    record = read_record(run)
    if "sweep" in record and not has_adapter(run):
        raise UserError(f"{run}: the sweep is not finished; continue it with: jpeft finetune --out {run} --resume")
    if not has_adapter(run) and not saved_steps(run):
        raise UserError(
            f"{run}: the run is not finished, and has no checkpoint yet; resume it with: "
            f"jpeft finetune --out {run} --resume"
        )
    return record


def saved_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, in order.

    >>> saved_steps(Path("runs/none"))
    []
    """
    return checkpoint.saved_steps(run / "checkpoints")


def lengthen(run: Path, record: Mapping[str, Any], longer: Mapping[str, Any], step: int) -> None:
    """Records that a run goes on to more steps. It is not complete any more: its adapter is in its checkpoints.

    Args:
        record: the content of its config.json.
        longer: the entries that change, `config` and `steps`.
        step: the steps that it has made.

    >>> lengthen(run, read_record(run), job.record, step=40)  # doctest: +SKIP
    """
    (run / "result.json").unlink(missing_ok=True)  # first: a run that is killed here is resumed, to the same length
    (run / "adapter" / "config.json").unlink(missing_ok=True)  # then the rest is no adapter
    remove_folder(run / "adapter")
    entry = {"from_steps": record["steps"], "to_steps": longer["steps"], "after_step": step}
    entry["learning_rate"] = f"as in a run of {longer['steps']} steps, from step {step + 1} on"
    changed = {"config": longer["config"], "steps": longer["steps"]}
    changed["lengthened"] = [*record.get("lengthened", ()), entry]
    write_json(run / "config.json", {**record, **changed})


# ------------------------------------------------------------------------------------------------------------ metrics


_UPLOAD_EVERY = 30.0  # seconds between two uploads of a log to an object store


class _ObjectFile:
    """A text file on an object store, which is uploaded as a whole."""

    def __init__(self, path: Path, text: str):
        self.path, self._parts, self._uploaded, self._at = path, [text], 1, time.monotonic()

    def write(self, text: str) -> None:
        self._parts.append(text)

    def flush(self) -> None:
        """Uploads it if it was not for a while."""
        if time.monotonic() - self._at >= _UPLOAD_EVERY:
            self.sync()

    def sync(self) -> None:
        """Uploads it."""
        if self._uploaded < len(self._parts):
            write_atomically(self.path, "".join(self._parts).encode())
        self._uploaded, self._at = len(self._parts), time.monotonic()


@dataclass(frozen=True)
class Log:
    """An open metrics.jsonl, and its lines so far.

    Attributes:
        file: the open file.
        lines: the metrics of training steps (`loss`, …) and of evaluations (`eval_loss`, …).
        logger: receives each line too, or None.
    """

    file: IO[str] | _ObjectFile
    lines: list[dict[str, Any]]
    logger: Logger | None = None

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, in memory and on disk. Numbers that are not finite become null, which JSON lacks.

        >>> log.write({"step": 1, "loss": 0.7})  # doctest: +SKIP
        """
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.logger is not None:
            self.logger.log({name: value for name, value in line.items() if name != "step"}, line["step"])

    def sync(self) -> None:
        """Uploads the lines to an object store. Call it before a checkpoint, which a resumed run expects them up to."""
        if isinstance(self.file, _ObjectFile):
            self.file.sync()

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The metrics of the evaluation after a step, if there was one.

        >>> log.evaluation(0)["eval_loss"]  # doctest: +SKIP
        """
        return next((line for line in self.lines if line["step"] == step and "eval_loss" in line), None)


@contextlib.contextmanager
def open_log(run: Path, step: int, write: bool = True, logger: Logger | None = None) -> Iterator[Log]:
    """The log of a run as it was after a step; lines that a killed run wrote after its last checkpoint are dropped.

    Args:
        write: False keeps lines in memory only, for all processes but the main one.
        logger: receives the lines that are written from now on too. The caller closes it.

    >>> with open_log(run, step=100) as log: log.write({"step": 101, "loss": 0.4})  # doctest: +SKIP
    """
    path = run / "metrics.jsonl"
    lines = [line for line in read_lines(path) if line["step"] <= step]
    if not write:
        yield Log(io.StringIO(), lines)
        return
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, text.encode())
    if is_remote(path):
        log = Log(_ObjectFile(path, text), lines, logger)
        try:
            yield log
        finally:
            log.sync()
        return
    with path.open("a", encoding="utf-8") as file:
        yield Log(file, lines, logger)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a kill cut short.

    >>> read_lines(Path("runs/none/metrics.jsonl"))
    []
    """
    lines: list[Any] = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # UnicodeDecodeError is one
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
