"""Run folders: what a fine-tuning job writes, and how prediction, merging and inspection read it back.

    run/config.json      what was chosen, and fingerprints of base and data
    run/metrics.jsonl    a line a step and an evaluation
    run/checkpoints/     to resume from
    run/adapter/         the trained adapter: here, and in the files below, once the run is complete
    run/loss.png
    run/result.json      the final table

`open_run("runs/minilm-lora-1").predict(["good tea"])` takes a finished run into use.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jpeft.core.peft import Peft
from jpeft.errors import UserError
from jpeft.files import file_sha256, new_folder, read_json, write_atomically, write_json
from jpeft.io import CONFIG as ADAPTER_CONFIG
from jpeft.io import TENSORS, load, read_config
from jpeft.parallel.hosts import is_main_process, on_all_hosts
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.config import CLASSIFY, Config
from jpeft.recipes.tasks import classification
from jpeft.text import labeled

FORMAT = 1


# ---------------------------------------------------------------------------------------------------------- folders


def create_run(out: Path | None, config: Config, record: Mapping[str, Any]) -> Path:
    """A new run folder, named after the job where no name is given.

    It appears with its config.json inside, so that a run is resumable from its first moment.

    >>> create_run(None, Config(), record) == Path("runs/minilm-lora-1")  # doctest: +SKIP
    """
    stem = f"{Path(config.model).name}-{config.method.lower()}"
    numbered = (Path("runs") / f"{stem}-{number}" for number in itertools.count(1))
    for run in [out] if out is not None else numbered:
        if run.exists():
            continue
        try:
            with new_folder(run) as folder:
                write_json(folder / "config.json", dict(record))
            return run
        except OSError as error:
            if not run.exists():  # else another process took the name
                raise UserError(f"{run}: cannot be made: {error.strerror}") from error
    raise UserError(f"{out} exists; choose another --out, or continue that run with --resume")


def latest_run(folder: Path = Path("runs")) -> Path | None:
    """The run begun last below a folder, if there is one.

    >>> latest_run(Path("no/runs")) is None
    True
    """
    found = [path for path in folder.glob("*/config.json") if not path.parent.name.startswith(".")]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


def read_record(run: Path) -> dict[str, Any]:
    """What a run's config.json holds.

    >>> Config(**read_record(run)["config"])  # doctest: +SKIP
    """
    path = run / "config.json"
    try:
        record = read_json(path, UserError)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no run here (no config.json); `jpeft finetune --out {run}` makes one") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    if "config" not in record:
        raise UserError(f"{run}: not a run of `jpeft finetune` (its config.json says something else)")
    if record.get("format") != FORMAT:
        raise UserError(f"{run}: written in format {record.get('format')}; this version reads format {FORMAT}")
    try:
        Config(**record["config"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: not a configuration of this version: {error}") from error
    return record


def read_result(run: Path) -> dict[str, Any] | None:
    """The final table of a run, None while it is not complete.

    >>> read_result(Path("runs/none")) is None
    True
    """
    try:
        return read_json(run / "result.json", UserError)
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Log:
    """metrics.jsonl, and its lines: of steps (`loss`, …) and of evaluations (`eval_loss`, …)."""

    file: IO[str]
    lines: list[dict[str, Any]]
    events: Any = None  # TensorBoard's writer, if there is one

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, to memory and to disk. What is not finite has no JSON form and becomes null.

        >>> log.write({"step": 1, "loss": 0.7})  # doctest: +SKIP
        """
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self.events.add_scalar(name, value, line["step"])

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation after a step, if it was made.

        >>> log.evaluation(0)["eval_loss"]  # doctest: +SKIP
        """
        return next((line for line in self.lines if line["step"] == step and "eval_loss" in line), None)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """A run to oneself, as long as this process lives: two that write the same checkpoints would spoil both.

    >>> with locked(Path("runs/first")): train()  # doctest: +SKIP
    """
    import filelock

    lock = filelock.FileLock(run / ".lock", timeout=0)

    def acquire() -> None:
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{run}: another process is writing it; wait, or choose another --out") from None

    on_all_hosts(lambda: acquire() if is_main_process() else None)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def open_log(run: Path, step: int, write: bool = True, tensorboard: bool = False) -> Iterator[Log]:
    """The log of a run as it was at a step: what a killed run wrote after its last checkpoint is dropped.

    Args:
        write: False keeps lines in memory alone: of several hosts, one writes.
        tensorboard: also write them as TensorBoard events.

    >>> with open_log(run, step=100) as log: log.write({"step": 101, "loss": 0.4})  # doctest: +SKIP
    """
    path = run / "metrics.jsonl"
    lines = [line for line in read_lines(path) if line["step"] <= step]
    if not write:
        yield Log(io.StringIO(), lines)
        return
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    with contextlib.ExitStack() as stack:
        events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            events = stack.enter_context(SummaryWriter(str(run / "tensorboard"), purge_step=step + 1))
        yield Log(stack.enter_context(path.open("a", encoding="utf-8")), lines, events)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out.

    >>> read_lines(Path("runs/none/metrics.jsonl"))
    []
    """
    lines: list[Any] = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # UnicodeDecodeError is one
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


_PLOTTED = {"eval_accuracy": "test accuracy", "eval_perplexity": "perplexity of held-out answers"}


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of every step, its running mean, and what every evaluation found: accuracy, else perplexity.

    >>> plot(read_lines(run / "metrics.jsonl"), run / "loss.png")  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    kind, name = next(((key, name) for key, name in _PLOTTED.items() if any(key in line for line in lines)))
    scores = [(line["step"], line[kind]) for line in lines if line.get(kind) is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot: no state, no window
    FigureCanvasAgg(figure)
    left = figure.add_subplot(xlabel="step", ylabel="training loss")
    left.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
    mean = itertools.accumulate((loss for _, loss in losses), lambda mean, loss: 0.95 * mean + 0.05 * loss)
    left.plot([step for step, _ in losses], list(mean), color="tab:blue", label="training loss, running mean")
    right = left.twinx()
    right.set_ylabel(name)
    right.plot(*zip(*scores, strict=True), "o-", color="tab:orange", label=name)
    left.legend(handles=[*left.lines[1:], *right.lines], loc="center right", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_atomically(path, image.getvalue())


# -------------------------------------------------------------------------------------------------- a finished run


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run, ready for use."""

    record: Mapping[str, Any]
    model_folder: Path
    classifier: classification.Classifier
    params: Any
    peft: Peft
    adapter: Any
    tokenizer: Any

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the logits.

        >>> ("great", "other")  # doctest: +SKIP
        """
        return tuple(self.record["labels"])

    def predict(self, texts: Sequence[str], batch_size: int = 64) -> list[tuple[str, float]]:
        """The likeliest label of every text, and its probability.

        >>> run.predict(["good tea"])  # doctest: +SKIP
        """
        length = Config(**self.record["config"]).max_length
        encoded = classification.encode(texts, self.tokenizer, self.classifier, length)
        batches = labeled.Batches(encoded, min(batch_size, len(texts)))
        found = classification.probabilities(classification.scorer(self.peft), self.params, self.adapter, batches)
        if (bad := np.flatnonzero(~np.isfinite(found).all(axis=-1))).size:
            raise UserError(f"text {bad[0] + 1}: the model's output is not finite; was the run's --lr too high?")
        return [(self.labels[row.argmax()], float(row.max())) for row in found]

    def export(self, out: Path) -> None:
        """Write a HuggingFace folder with the adapter merged in.

        >>> run.export(Path("merged"))  # doctest: +SKIP
        """
        try:
            merged = self.peft.merge(self.params, self.adapter)
        except ValueError as error:  # a method that is no change of weights
            raise UserError(str(error)) from error
        config = Config(**self.record["config"])
        about = f"{config.model} fine-tuned on {config.data} with {config.method} by jpeft."
        try:
            classification.export(
                out, self.classifier.encoder, merged, self.labels, self.model_folder,
                max_length=config.max_length, about=about,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{out}: {error.strerror or error}; nothing was kept of it") from error


def open_run(run: str | Path) -> Trained:
    """The model of a finished run, with its adapter.

    >>> open_run("runs/minilm-lora-1").labels  # doctest: +SKIP
    """
    record, folder_of_adapter = finished(run)
    config = Config(**record["config"])
    if config.task != CLASSIFY:
        raise UserError(f"{run}: was trained to chat, not to label texts; talk to it: jpeft chat {run}")
    folder = resolve_model(config.model)
    classifier, params = classification.load_classifier(
        folder, len(record["labels"]), config.seed, config.quantize, dtype=config.dtype
    )
    tokenizer = classification.load_tokenizer(folder, classifier, config.max_length)
    if file_sha256(folder / "tokenizer.json") != record["tokenizer"]:
        raise UserError(f"{folder}/tokenizer.json changed since {run} was trained: it would read other tokens")
    peft, adapter = load(folder_of_adapter, classifier, params, *classification.example_inputs())
    return Trained(record, folder, classifier, params, peft, adapter, tokenizer)


def finished(run: str | Path) -> tuple[dict[str, Any], Path]:
    """The record of a finished run, and the folder of its adapter.

    >>> finished("runs/smollm2-lora-1")[1]  # doctest: +SKIP
    PosixPath('runs/smollm2-lora-1/adapter')
    """
    run = Path(run)
    record = read_record(run)
    if not (run / "adapter" / ADAPTER_CONFIG).exists():
        raise UserError(f"{run}: the run is not finished; `jpeft finetune --out {run} --resume` goes on")
    return record, run / "adapter"


def describe(path: str | Path) -> dict[str, Any]:
    """What a run or an adapter folder is, from its files alone.

    >>> describe("runs/minilm-lora-1")["method"]  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or adapter")
    if (path / TENSORS).exists() or not (path / ADAPTER_CONFIG).exists():
        return {"kind": "adapter", "folder": str(path), **_describe_adapter(path)}
    record = read_record(path)
    result, lines = read_result(path), read_lines(path / "metrics.jsonl")
    about = {
        "kind": "run",
        "folder": str(path),
        "complete": result is not None,
        "step": max((line["step"] for line in lines), default=0),
        "steps": record["steps"],
        "labels": record.get("labels"),
        "config": record["config"],
        "result": result,
    }
    if (path / "adapter" / ADAPTER_CONFIG).exists():
        return about | _describe_adapter(path / "adapter")
    return about | {"method": record["method"]}


def _describe_adapter(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    try:
        with safe_open(folder / TENSORS, framework="numpy") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{folder / TENSORS} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / TENSORS}: not a whole safetensors file ({error})") from error
    return {
        "jpeft": config["jpeft"],
        "method": config["method"],
        "sites": config["sites"],
        "leaves": shapes,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "base_leaves": len(config["base"]),
        "base_fingerprint": hashlib.sha256(json.dumps(config["base"], sort_keys=True).encode()).hexdigest()[:16],
    }
