"""Sources of a model: a HuggingFace folder or a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jpeft.errors import ModelError
from jpeft.files import read_json
from jpeft.models.files import CONFIG, SafeTensor, Tensor, open_safetensors, weight_files


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name.

    >>> is_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    True
    """
    return path.suffix.lower() == ".gguf"


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a folder, or what the metadata of a `.gguf` file say in its words."""
    if is_gguf(path):
        from jpeft.models import gguf

        _need_file(path)
        return gguf.read_config(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path}: no {CONFIG} (is this a HuggingFace model folder?)")
    return read_json(path / CONFIG, ModelError)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a folder or a `.gguf` file by name, readable inside the `with`."""
    if is_gguf(path):
        from jpeft.models import gguf

        _need_file(path)
        with gguf.open_tensors(path) as found:
            yield found
        return
    tensors: dict[str, Tensor] = {}
    for file_path in weight_files(path):
        with open_safetensors(file_path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        tensors |= {name: SafeTensor(file_path, name, shape, metadata) for name, shape in shapes.items()}
    yield tensors


def _need_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
