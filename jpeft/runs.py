"""Run folders: what a fine-tuning job writes, and how prediction, merging and inspection read it back.

    run/config.json      what was chosen, and fingerprints of the data      run/adapter/      the trained adapter
    run/metrics.jsonl    a line a step and an evaluation                    run/result.json   the final table
    run/checkpoints/     to resume from                                     run/loss.png

    run = open_run("runs/minilm-lora-1")
    label, probability = run.predict(["good tea"])[0]
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jpeft.assets import DATA, MODELS, UserError

FORMAT = 1
# What each method wants as a peak; those not listed take LoRA's.
LEARNING_RATES: Mapping[str, float] = {"full": 1e-4, "train": 1e-4, "ia3": 5e-3, "prefix": 5e-3, "bitfit": 2e-3}


@dataclass(frozen=True)
class Config:
    """All that decides what a run computes. `None` is the method's, the data's or the job's own default.

    Example: `Config(method="lora", rank=16, targets="query,value", epochs=3)`.
    """

    model: str = "minilm"
    data: str = "food-reviews"
    eval: str | None = None
    text: str | None = None
    label: str | None = None
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    epochs: int = 2
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        rules = {
            "lr": (self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "a positive number"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "max_length": (self.max_length >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2^32)"),
            "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise UserError(f"{flag(name)} must be {expected}, got {getattr(self, name)}")

    @property
    def rate(self) -> float:
        """The peak learning rate. Example: 1e-3 for LoRA unless `lr` says otherwise."""
        return LEARNING_RATES.get(self.method.lower(), 1e-3) if self.lr is None else self.lr

    def located(self) -> Config:
        """The same with absolute paths, so that it holds from any working folder. Example: `Config().located()`."""
        found = {name: _locate(name, getattr(self, name)) for name in _PATHS}
        return dataclasses.replace(self, **found)

    def conflict(self, given: Mapping[str, Any]) -> str | None:
        """The first of the given fields that asks for something else than this configuration, if one does.

        Example: `Config(lr=1e-3).conflict({"lr": 1e-2}) == "lr"`.
        """
        return next((name for name, value in given.items() if _locate(name, value) != getattr(self, name)), None)


_PATHS: Mapping[str, Mapping[str, Any]] = {"model": MODELS, "data": DATA, "eval": {}}


def _locate(name: str, value: Any) -> Any:
    if name not in _PATHS or value is None or value in _PATHS[name]:
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value  # else an id on the hub


def flag(name: str) -> str:
    """A field of `Config` as typed on the command line. Example: `flag("batch_size") == "--batch-size"`."""
    return "--set" if name == "settings" else f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------------------- folders


def create_run(out: Path | None, config: Config, record: Mapping[str, Any]) -> Path:
    """A new run folder, named after the job where no name is given.

    It appears with its config.json inside, so that a run is resumable from its first moment.

    Example: `create_run(None, Config(), record) == Path("runs/minilm-lora-1")`.
    """
    stem = f"{Path(config.model).name}-{config.method.lower()}"
    numbered = (Path("runs") / f"{stem}-{number}" for number in itertools.count(1))
    for run in [out] if out is not None else numbered:
        if run.exists():
            continue
        run.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{run.name}-", dir=run.parent))
        try:
            scratch.chmod(0o755)  # mkdtemp's is private
            write_json(scratch / "config.json", dict(record))
            scratch.rename(run)
            return run
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process took the name
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")


def latest_run(folder: Path = Path("runs")) -> Path | None:
    """The run begun last below a folder, if there is one. Example: `latest_run(Path("runs"))`."""
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None


def read_record(run: Path) -> dict[str, Any]:
    """What a run's config.json holds. Example: `Config(**read_record(run)["config"])`."""
    path = run / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run here (no config.json); `jpeft finetune --out {run}` makes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(f"{run}: not a run of `jpeft finetune` (its config.json says something else)")
    if record.get("format") != FORMAT:
        raise UserError(f"{run}: written in format {record.get('format')}; this version reads format {FORMAT}")
    try:
        Config(**record["config"])
    except TypeError as error:
        raise UserError(f"{path}: not a configuration of this version: {error}") from error
    return record


def read_result(run: Path) -> dict[str, Any] | None:
    """The final table of a run, None while it is not complete. Example: `read_result(run)["accuracy_after"]`."""
    try:
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. Example: `write_json(run / "result.json", result)`."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end if nothing went wrong.

    Example: `with replacing(path) as scratch: scratch.write_text("whole")`.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Log:
    """metrics.jsonl, and its lines: of steps (`loss`, …) and of evaluations (`eval_accuracy`, …)."""

    file: IO[str]
    lines: list[dict[str, Any]]

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, to memory and to disk. Example: `log.write({"step": 1, "loss": 0.7})`."""
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation after a step, if it was made. Example: `log.evaluation(0)["eval_accuracy"]`."""
        return next((line for line in self.lines if line["step"] == step and "eval_accuracy" in line), None)


@contextlib.contextmanager
def open_log(path: Path, step: int) -> Iterator[Log]:
    """The log as it was at a step: what a killed run wrote after its last checkpoint is dropped.

    Example: `with open_log(run / "metrics.jsonl", step=100) as log: log.write({"step": 101, "loss": 0.4})`.
    """
    lines = [line for line in read_lines(path) if line["step"] <= step]
    with replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        yield Log(file, lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out.

    Example: `[line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]`.
    """
    lines: list[Any] = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of every step, its running mean, and the accuracy of every evaluation.

    Example: `plot(read_lines(run / "metrics.jsonl"), run / "loss.png")`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scores = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot: no state, no window
    FigureCanvasAgg(figure)
    left = figure.add_subplot(xlabel="step", ylabel="training loss")
    left.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
    mean = itertools.accumulate((loss for _, loss in losses), lambda mean, loss: 0.95 * mean + 0.05 * loss)
    left.plot([step for step, _ in losses], list(mean), color="tab:blue", label="training loss, running mean")
    right = left.twinx()
    right.set_ylabel("test accuracy")
    right.plot(*zip(*scores, strict=True), "o-", color="tab:orange", label="test accuracy")
    left.legend(handles=[*left.lines[1:], *right.lines], loc="center right", frameon=False)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
