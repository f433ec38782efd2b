"""Summaries of runs and adapter folders, from their files alone."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jpeft.errors import UserError
from jpeft.files import read_json
from jpeft.io import CONFIG, TENSORS, read_config
from jpeft.recipes.config import Config
from jpeft.recipes.run_folder import has_adapter, read_lines, read_record, read_result, saved_steps
from jpeft.storage import as_path, file_sizes, local_copy

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "I64": "int64"}


def describe(path: str | Path) -> dict[str, Any]:
    """A summary of a run or an adapter folder, from its files alone.

    >>> describe("runs/minilm-lora-1")["method"]  # doctest: +SKIP
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or adapter")
    if (path / PEFT_CONFIG).exists():
        return {"kind": "PEFT adapter", "folder": str(path), **_describe_peft(path)}
    if (path / TENSORS).exists() or not (path / CONFIG).exists():
        return {"kind": "adapter", "folder": str(path), "files": file_sizes(path), **_describe_adapter(path)}
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
        "learning_rate": Config(**record["config"]).rate,
        "result": result,
        "files": _contents(path),
    }
    if has_adapter(path):
        return summary | _describe_adapter(path / "adapter")
    return summary | {"method": record["method"]}


def _describe_adapter(folder: Path) -> dict[str, Any]:
    config, (shapes, dtypes) = read_config(folder), _leaves(folder / TENSORS)
    return {
        "jpeft": config["jpeft"],
        "method": config["method"],
        "sites": config["sites"],
        "leaves": shapes,
        "dtypes": dtypes,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes": sum(file_sizes(folder).values()),
        "base_leaves": len(config["base"]),
        "base_fingerprint": hashlib.sha256(json.dumps(config["base"], sort_keys=True).encode()).hexdigest()[:16],
    }


def _describe_peft(folder: Path) -> dict[str, Any]:
    """A folder that HuggingFace PEFT wrote, or `jpeft.hf.save`."""
    config = read_json(folder / PEFT_CONFIG, UserError)
    fields = {key: value for key, value in config.items() if key not in ("peft_type", "base_model_name_or_path")}
    found: dict[str, Any] = {
        "method": {"method": config.get("peft_type", "unknown"), **fields},
        "base_model": config.get("base_model_name_or_path"),
        "files": file_sizes(folder),
    }
    if (folder / PEFT_TENSORS).exists():  # older ones hold a pickle, which is not opened
        shapes, dtypes = _leaves(folder / PEFT_TENSORS)
        found |= {"leaves": shapes, "dtypes": dtypes, "parameters": sum(map(math.prod, shapes.values()))}
    return found | {"bytes": sum(found["files"].values())}


def _leaves(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes and the dtypes of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with local_copy(file) as local, safe_open(local, framework="numpy") as found:
            slices = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
            return shapes, {name: _dtype(part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from error


def _dtype(name: str) -> str:
    """A dtype's usual name, from that in a safetensors file."""
    return _DTYPES.get(name, name)


def _contents(run: Path) -> dict[str, int]:
    """The sizes in bytes of what lies in a run folder: files, and folders with all that is in them."""
    sizes: dict[str, int] = {}
    for name, size in file_sizes(run).items():
        top, slash, _ = name.partition("/")
        if not top.startswith("."):
            sizes[top + slash] = sizes.get(top + slash, 0) + size
    return dict(sorted(sizes.items()))
