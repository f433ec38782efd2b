"""`jpeft inspect`: the contents of a run or an adapter folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jpeft.cli.common import Common
from jpeft.cli.terminal import print_json
from jpeft.recipes.config import Config
from jpeft.recipes.options import option, options
from jpeft.units import format_bytes

SUMMARY = "Show the contents of a run or an adapter folder, without loading a model."

WHAT, TRAINS, DATA, TRAINING = "What it is", "What trains", "Data", "Training"
RESULT, FILES = "Result", "Files"
# Where fields of a run's configuration stand, and their names there. The others stand under Training, by name.
_PLACES: Mapping[str, tuple[str, str]] = {
    "task": (WHAT, "task"),
    "model": (WHAT, "model"),
    "adapter": (WHAT, "begins from"),
    "quantize": (WHAT, "quantized base"),
    "dtype": (WHAT, "dtype of the model"),
    "data": (DATA, "training data"),
    "eval": (DATA, "evaluation data"),
    "eval_examples": (DATA, "evaluation examples"),
    "text": (DATA, "column of texts"),
    "label": (DATA, "column of labels"),
    "chat_template": (DATA, "chat template"),
    "ignore_keys": (DATA, "ignored keys"),
    "max_length": (DATA, "tokens in a row"),
    "packed": (DATA, "packed"),
    "lr": (TRAINING, "peak learning rate"),
    "warmup": (TRAINING, "warm-up"),
    "weight_decay": (TRAINING, "weight decay"),
    "batch_size": (TRAINING, "batch size"),
    "accumulate": (TRAINING, "micro-batches"),
    "steps": (TRAINING, "at most, steps"),
    "eval_every": (TRAINING, "steps between evaluations"),
    "checkpoint_every": (TRAINING, "steps between checkpoints"),
    "keep": (TRAINING, "adapter that is kept"),
}
# Fields that the method's own line says, and where the head of a classifier comes from.
_SAID = ("method", "rank", "alpha", "dropout", "targets", "settings", "head", "head_seed")

Rows = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft inspect`."""

    path: str = option("a run, or an adapter folder", metavar="RUN|ADAPTER", positional=True)


def run(args: Options) -> None:
    """Prints the contents."""
    from jpeft.recipes.describing import describe

    summary = describe(args.path)
    if args.json:
        print_json(summary)
    else:
        print("\n".join(lines_of(summary)))


def lines_of(summary: Mapping[str, Any]) -> list[str]:
    """A summary from `describe` as text: a title, and sections of names and values."""
    sections: dict[str, Rows] = {name: [] for name in (WHAT, TRAINS, DATA, TRAINING, RESULT, FILES)}
    if summary["kind"] == "run":
        _add_run(sections, summary)
    else:
        sections[WHAT] += _origin(summary)
    sections[TRAINS] += _methods(summary)
    sections[FILES] += [(name, format_bytes(size)) for name, size in summary["files"].items()]
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = [_title(summary)]
    for title, rows in sections.items():
        if rows:
            lines += ["", title, *(f"  {name:{width}}  {value}".rstrip() for name, value in rows)]
        if title == TRAINS and "leaves" in summary:
            lines += ["", *_leaf_lines(summary["leaves"], summary["dtypes"])]
    return lines


def _title(summary: Mapping[str, Any]) -> str:
    folder = summary["folder"]
    if summary["kind"] != "run":
        return f"{folder}: an adapter of {'jpeft' if summary['kind'] == 'adapter' else 'HuggingFace PEFT'}"
    if summary["complete"]:
        return f"{folder}: a finished run"
    return f"{folder}: an unfinished run; continue with: jpeft finetune --out {folder} --resume"


def _origin(summary: Mapping[str, Any]) -> Rows:
    """The rows of an adapter's origin and its base."""
    rows = [("written by", f"jpeft {summary['jpeft']}")] if "jpeft" in summary else []
    if "base_fingerprint" in summary:
        rows.append(("base", f"{summary['base_leaves']:,} leaves, fingerprint {summary['base_fingerprint']}"))
    if summary.get("base_model"):
        rows.append(("base", str(summary["base_model"])))
    return rows


def _is_unused(name: str, task: str | None) -> bool:
    """Whether a field of a configuration is for other tasks."""
    entry = options(Config).get(name)
    return entry is not None and bool(entry.tasks) and task not in (None, *entry.tasks)


def _add_run(sections: dict[str, Rows], summary: Mapping[str, Any]) -> None:
    from jpeft.cli.results import result_rows

    rate = summary["learning_rate"]
    for name, value in {**summary["config"], "lr": rate}.items():
        if name in _SAID or _is_unused(name, summary["config"].get("task")):
            continue
        if (name != "eval_examples" and _says_nothing(value)) or (name, value) == ("accumulate", 1):
            continue
        section, label = _PLACES.get(name, (TRAINING, name.replace("_", " ")))
        sections[section].append((label, _written(name, value)))
    progress = f"{summary['step']:,} of {summary['steps']:,}"
    saved = ", ".join(f"{step:,}" for step in summary["checkpoints"])
    sections[WHAT] += _origin(summary)
    sections[WHAT].append(("steps", progress + (f"; checkpoints of {saved}" if saved else "; no checkpoint")))
    for entry in summary["lengthened"]:
        after = f"after step {entry['after_step']:,}"
        sections[WHAT].append(("lengthened", f"from {entry['from_steps']:,} to {entry['to_steps']:,} steps, {after}"))
    if summary["labels"]:
        sections[DATA].append(("labels", ", ".join(map(str, summary["labels"]))))
    if summary["result"] is not None:
        sections[RESULT] += [row for row in result_rows(summary["result"]) if row[0] not in ("run", "use it")]


def _says_nothing(value: Any) -> bool:
    """Whether a value means that something is not done: zero, "no", nothing."""
    return not value or value == "none"


def _written(name: str, value: Any) -> str:
    """The value of a field of a configuration, for people."""
    if name == "warmup":
        return f"{value:.0%} of the steps"
    if name == "eval_examples":
        return f"{value:,}" if value else "all"
    if name == "chat_template":
        return f"one of {len(value):,} characters, in config.json"
    if isinstance(value, bool):
        return "yes"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _methods(summary: Mapping[str, Any]) -> Rows:
    """The method or the members of a chain, each with its fields, and what they act on."""
    method = summary["method"]
    if summary["kind"] == "PEFT adapter":
        fields = {k: v for k, v in method.items() if k != "method" and not _says_nothing(v)}
        rows = [("method", method["method"]), *((name, _listed(value)) for name, value in fields.items())]
    else:
        members = method.get("methods", [method])
        rows = [("" if i else "method", _member(member)) for i, member in enumerate(members)]
    if "sites" in summary:
        rows.append(("sites", f"{len(summary['sites']):,}"))
    if "parameters" in summary:
        rows.append(("parameters", f"{summary['parameters']:,}"))
    return rows


def _member(method: Mapping[str, Any]) -> str:
    fields = {k: v for k, v in method.items() if k != "method" and not _says_nothing(v) and (k, v) != ("parts", 1)}
    shown = [f"{name} {_listed(value)}" for name, value in fields.items()]
    return f"{method['method']}: {'; '.join(shown)}" if shown else str(method["method"])


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _leaf_lines(shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str]) -> Iterable[str]:
    """The leaves, those of repeated layers in one line."""
    from jpeft.core.folding import fold

    names = sorted(shapes)
    folds = fold(names, [(*shapes[name], dtypes[name]) for name in names])
    width = max((len(str(found)) for found in folds), default=0)
    for found in folds:
        name = names[found.members[0]]
        yield f"  {found!s:{width}}  {'×'.join(map(str, shapes[name])) or 'scalar'} {dtypes[name]}"
