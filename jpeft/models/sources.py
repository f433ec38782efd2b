"""Model files on disk behind one interface: a HuggingFace folder or a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jpeft.models import folder
from jpeft.models.gguf import config as gguf_config
from jpeft.models.gguf import tensors as gguf_tensors


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its suffix.

    >>> is_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    True
    """
    return path.suffix.lower() == ".gguf"


def has_safetensors(path: Path) -> bool:
    """Whether a path is a folder with weights in safetensors.

    >>> has_safetensors(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    False
    """
    return any((path / name).is_file() for name in (folder.WEIGHTS, folder.INDEX))


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a folder, or the equivalent of a GGUF file's metadata.

    Raises:
        FileNotFoundError: there is no such folder or file, or no `config.json`.
        ModelError: it cannot be read.
    """
    return gguf_config.read_config(path) if is_gguf(path) else folder.read_config(path)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, folder.Tensor]]:
    """The tensors of a folder or a GGUF file by HuggingFace's names, readable inside the `with`.

    Raises:
        FileNotFoundError: there is no such file, no weights, or a shard is missing.
        ModelError: a file cannot be read.
    """
    if is_gguf(path):
        with gguf_tensors.open_tensors(path) as tensors:
            yield tensors
    else:
        yield folder.read_tensors(path)
