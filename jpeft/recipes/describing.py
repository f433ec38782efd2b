"""Summaries of runs and adapter folders, from their files alone."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jpeft.errors import UserError
from jpeft.io import CONFIG, TENSORS, read_config
from jpeft.recipes.run_folder import has_adapter, read_lines, read_record, read_result, saved_steps


def describe(path: str | Path) -> dict[str, Any]:
    """A summary of a run or an adapter folder, from its files alone.

    >>> describe("runs/minilm-lora-1")["method"]  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or adapter")
    if (path / TENSORS).exists() or not (path / CONFIG).exists():
        return {"kind": "adapter", "folder": str(path), **_describe_adapter(path)}
    record = read_record(path)
    result, lines = read_result(path), read_lines(path / "metrics.jsonl")
    summary = {
        "kind": "run",
        "folder": str(path),
        "complete": result is not None,
        "step": max((line["step"] for line in lines), default=0),
        "checkpoints": saved_steps(path),
        "steps": record["steps"],
        "lengthened": record.get("lengthened", []),
        "labels": record.get("labels"),
        "config": record["config"],
        "result": result,
    }
    if has_adapter(path):
        return summary | _describe_adapter(path / "adapter")
    return summary | {"method": record["method"]}


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
