"""The files of a model: `config.json` and safetensors, one file or many. A `.gguf` file is read by `jpeft.models.gguf`.

Nothing here knows a model: tensors have torch's names and layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jpeft.errors import ModelError
from jpeft.files import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensor(Protocol):
    """A tensor in a file: its shape costs nothing, its bytes are read when asked for."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch has it."""
        ...

    def read(self) -> np.ndarray:
        """The whole tensor, in memory of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    path: Path
    name: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str]  # of the file

    def read(self) -> np.ndarray:
        # The file is mapped for one tensor at a time: pages of it that were read count as ours until it is unmapped.
        with open_safetensors(self.path) as file:
            try:
                return file.get_tensor(self.name)
            except (AttributeError, TypeError) as error:  # a dtype that numpy does not have, such as float8
                raise ModelError(f"{self.path}: {self.name} has a dtype that is not read here ({error})") from None


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: only {pickles[0]}, a pickle, which may run code when opened and is refused; if you trust it, "
            "convert it with transformers.AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder}: no weights (neither {WEIGHTS} nor {INDEX})")


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX, ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # an index may not point out of its folder
            raise ModelError(f"{folder / INDEX}: {name!r} is not a file name")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}, which {INDEX} lists")
    return [folder / name for name in names]
