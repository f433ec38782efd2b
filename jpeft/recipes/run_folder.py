"""Run folders: the files that `jpeft finetune` writes, and how they are read back.

run/config.json      the configuration, and checksums of the base and the data
run/metrics.jsonl    a line for each training step and each evaluation
run/start/           the adapter that it began from, if it was not a fresh one
run/checkpoints/     to resume from
run/adapter/         the trained adapter: this, and the files below, exist once the run is complete
run/loss.png
run/result.json      the results, which the final table shows
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jpeft.errors import UserError
from jpeft.files import new_folder, read_json, write_atomically, write_json
from jpeft.parallel.hosts import is_main_process, on_all_hosts
from jpeft.recipes.config import Config
from jpeft.recipes.loggers import Logger

FORMAT = 1


# ------------------------------------------------------------------------------------------------------------ folders


def create_run(out: Path | None, config: Config, record: Mapping[str, Any]) -> Path:
    """Creates a run folder, named after the configuration if `out` is None.

    It appears with its config.json inside, so that a run can be resumed from its first moment.

    >>> create_run(None, Config(), record) == Path("runs/minilm-lora-1")  # doctest: +SKIP
    """
    stem = f"{Path(config.model).name}-{config.method.lower()}"
    numbered = (Path("runs") / f"{stem}-{number}" for number in itertools.count(1))
    for run in [out] if out is not None else numbered:
        if run.exists():
            continue
        try:
            with new_folder(run) as folder:
                write_json(folder / "config.json", {"format": FORMAT, **record})
            return run
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and run.exists()  # by another process
            if not taken:
                raise UserError(f"{run}: cannot be created: {error.strerror}") from error
    raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")


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
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if "config" not in record:
        raise UserError(f"{run}: not a run of `jpeft finetune` (its config.json is of another kind)")
    if record.get("format") != FORMAT:
        raise UserError(f"{run}: written in format {record.get('format')}; this version reads format {FORMAT}")
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
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def lengthen(run: Path, record: Mapping[str, Any], longer: Mapping[str, Any], step: int) -> None:
    """Records that a run goes on to more steps. It is not complete any more: its adapter is in its checkpoints.

    Args:
        record: the content of its config.json.
        longer: the entries that change, `config` and `steps`.
        step: the steps that it has made.

    >>> lengthen(run, read_record(run), job.record, step=40)  # doctest: +SKIP
    """
    (run / "result.json").unlink(missing_ok=True)  # first: a run that is killed here is resumed, to the same length
    shutil.rmtree(run / "adapter", ignore_errors=True)
    entry = {"from_steps": record["steps"], "to_steps": longer["steps"], "after_step": step}
    entry["learning_rate"] = f"as in a run of {longer['steps']} steps, from step {step + 1} on"
    changed = {"config": longer["config"], "steps": longer["steps"]}
    changed["lengthened"] = [*record.get("lengthened", ()), entry]
    write_json(run / "config.json", {**record, **changed})


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks a run for this process: two that write the same checkpoints would damage both.

    >>> with locked(Path("runs/first")): train()  # doctest: +SKIP
    """
    import filelock

    lock = filelock.FileLock(run / ".lock", timeout=0)

    def acquire() -> None:
        if not is_main_process():
            return
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{run}: another process is writing it; wait, or choose another --out") from None

    on_all_hosts(acquire)
    try:
        yield
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------------------ metrics


@dataclass(frozen=True)
class Log:
    """An open metrics.jsonl, and its lines so far.

    Attributes:
        file: the open file.
        lines: the metrics of training steps (`loss`, …) and of evaluations (`eval_loss`, …).
        logger: receives each line too, or None.
    """

    file: IO[str]
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
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
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
