"""Configuration files: the options of `jpeft finetune` in YAML or JSON, or the config.json of a run.

model: minilm
data: train.csv
lr: 1e-3
"""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jpeft.checks import nearest, shown
from jpeft.errors import UserError
from jpeft.recipes.options import Option, nearest_option
from jpeft.storage import as_path, reason


def read_config_file(path: str | Path, known: Mapping[str, Option], elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """The options that a configuration file gives; keys whose value is null are left out.

    Args:
        path: a .json file, or one in YAML; a run's own config.json gives the run's configuration.
        known: the options that the file may have.
        elsewhere: names of options that only the command line has.

    Raises:
        UserError: the file cannot be read, or holds an unknown key or a value that its option cannot have.

    >>> import tempfile
    >>> from jpeft.recipes.config import Config
    >>> from jpeft.recipes.options import options
    >>> path = Path(tempfile.mkdtemp()) / "run.yaml"
    >>> _ = path.write_text("lr: 1e-3")
    >>> read_config_file(path, options(Config))
    {'lr': 0.001}
    """
    path = as_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte offset {error.start}") from error
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}; expected a YAML or JSON file with options") from error
    found = _load(path, text)
    if found is None:  # an empty file
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected options such as `lr: 1e-3`, got {_kind(found)}")
    if isinstance(found.get("config"), dict) and "format" in found:
        found = _of_run(path, found)
    for name, value in found.items():
        _check(path, name, value, known, elsewhere)
    return {name: value for name, value in found.items() if value is not None}


def _load(path: Path, text: str) -> Any:
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_without_repeats)
        from ruamel.yaml import YAML  # YAML 1.2: 1e-3 is a number, no is a text, and a key given twice is an error

        return YAML(typ="safe", pure=True).load(text)
    except ModuleNotFoundError:
        raise
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except Exception as error:  # ruamel's errors have several bases
        raise UserError(f"{path}{_problem(error)}") from error


def _problem(error: Exception) -> str:
    """The line and the words of an error of ruamel's."""
    where, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', '')}, {problem}"
    return f"{'' if where is None else f', line {where.line + 1}'}: {' '.join(problem.split())}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the key {repeated[0]!r} is given twice")
    return dict(pairs)


def _of_run(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    from jpeft.recipes.run_folder import FORMAT

    if record["format"] != FORMAT:
        raise UserError(f"{path}: of a run in format {record['format']}; this version of jpeft reads format {FORMAT}")
    if lengthened := record.get("lengthened"):
        warnings.warn(
            f"{path}: this run was lengthened after step {lengthened[-1]['after_step']}, which a new run with its "
            "options is not: it has the learning rate of its whole length from the start on",
            stacklevel=4,
        )
    return dict(record["config"])


def _check(path: Path, name: Any, value: Any, known: Mapping[str, Option], elsewhere: Collection[str]) -> None:
    if name in elsewhere:
        raise UserError(f"{path}: {name!r} is an option of the command line, which a file cannot give")
    if not isinstance(name, str) or name not in known:
        near = nearest_option(str(name), known)
        raise UserError(f"{path}: unknown key {shown(name)}{near or '; jpeft finetune --help lists the options'}")
    if value is None:
        return
    entry = known[name]
    try:
        entry.check(value)
    except UserError as error:
        is_text = entry.type is str and not entry.literals and isinstance(value, int | float | datetime.date)
        hint = "; in quotes it is a text" if is_text and not isinstance(value, bool) else ""
        raise UserError(f"{path}: {str(error).replace('`', chr(39))}{hint}") from error
    if entry.choices is not None and entry.spelled(value) not in entry.values:
        listed = ", ".join(entry.values)
        raise UserError(f"{path}: {name!r} must be one of {listed}, got {shown(value)}{nearest(value, entry.values)}")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text"}.get(type(value), type(value).__name__)
