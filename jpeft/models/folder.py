"""The files of a HuggingFace model folder: `config.json`, and safetensors in one file or several shards.

Tensors have torch's names and layout; nothing here depends on a model.
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
    """A tensor in a file. Only `read` reads its bytes."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in torch's order."""
        ...

    @property
    def dtype(self) -> str:
        """The name of the dtype of the weight: that of the file or, if it is quantized, that of the original."""
        ...

    def read(self) -> np.ndarray:
        """The whole tensor, in memory of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file.

    Attributes:
        path: the file.
        name: the tensor's name in the file.
        shape: the shape in torch's order.
        dtype: the name of the dtype, numpy's or ml_dtypes' if they have it.
        metadata: the file's metadata.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    metadata: Mapping[str, str]

    def read(self) -> np.ndarray:
        # The file is mapped for one tensor at a time: pages that were read count as ours until it is unmapped.
        with _open_safetensors(self.path) as file:
            try:
                return file.get_tensor(self.name)
            except (AttributeError, TypeError) as error:  # a dtype that numpy lacks, such as float8
                raise ModelError(f"{self.path}: the dtype of {self.name} is not supported ({error})") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
        FileNotFoundError: there is no such folder, or no `config.json` in it.
        ModelError: the file is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG} (is this a HuggingFace model folder?)")
    return read_json(folder / CONFIG, ModelError)


def read_tensors(folder: Path) -> dict[str, SafeTensor]:
    """The tensors of a folder by name. Their bytes are not read yet.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ModelError: the weights are pickles only, or a file is damaged.
    """
    tensors: dict[str, SafeTensor] = {}
    for path in _weight_files(folder):
        with _open_safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (tuple(x.get_shape()), _dtype_name(x.get_dtype())) for name, x in slices.items()}
            metadata = file.metadata() or {}
        if twice := sorted(tensors.keys() & kinds.keys()):  # readers of such folders disagree on which one counts
            raise ModelError(
                f"{folder}: {twice[0]} is in {tensors[twice[0]].path.name} and in {path.name}; remove one of them"
            )
        tensors |= {name: SafeTensor(path, name, *kind, metadata) for name, kind in kinds.items()}
    return tensors


def _dtype_name(code: str) -> str:
    """The name of a dtype from safetensors' code: bfloat16 for BF16."""
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
    kind = code.rstrip("0123456789")
    return f"{kinds[kind]}{code.removeprefix(kind)}" if kind in kinds and kind != code else code.lower()


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: only {pickles[0]}, a pickle, which may run code when opened and is refused; if you trust it, "
            "convert it with transformers.AutoModelForCausalLM (or AutoModel, for an encoder): "
            ".from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder}: no weights (neither {WEIGHTS} nor {INDEX})")


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX, ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # an index must not point outside its folder
            raise ModelError(f"{folder / INDEX}: {name!r} is not a file name")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}, which {INDEX} lists")
    return [folder / name for name in names]
