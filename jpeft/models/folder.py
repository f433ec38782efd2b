"""The files of a HuggingFace model folder: `config.json`, and safetensors in one file or several shards.

Tensors have torch's names and layout; nothing here depends on a model. Of files on an object store, the bytes of one
tensor at a time are fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jpeft.errors import ModelError
from jpeft.files import read_json
from jpeft.storage import file_size, is_remote, read_range

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_METADATA = "__metadata__"


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
        remote: the open file, if it is on an object store.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    metadata: Mapping[str, str]
    remote: _RemoteFile | None = None

    def read(self) -> np.ndarray:
        # The file is mapped for one tensor at a time: pages that were read count as ours until it is unmapped.
        with _open_safetensors(self.path, self.remote) as file:
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
            metadata, remote = file.metadata() or {}, file if isinstance(file, _RemoteFile) else None
        if twice := sorted(tensors.keys() & kinds.keys()):  # readers of such folders disagree on which one counts
            raise ModelError(
                f"{folder}: {twice[0]} is in {tensors[twice[0]].path.name} and in {path.name}; remove one of them"
            )
        tensors |= {name: SafeTensor(path, name, *kind, metadata, remote) for name, kind in kinds.items()}
    return tensors


def _dtype_name(code: str) -> str:
    """The name of a dtype from safetensors' code: bfloat16 for BF16."""
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
    kind = code.rstrip("0123456789")
    return f"{kinds[kind]}{code.removeprefix(kind)}" if kind in kinds and kind != code else code.lower()


@contextlib.contextmanager
def _open_safetensors(path: Path, remote: _RemoteFile | None = None) -> Iterator[Any]:
    import safetensors

    try:
        if is_remote(path):
            yield remote or _RemoteFile(path)
            return
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from None


class _RemoteFile:
    """A safetensors file on an object store, with the methods of the library's open file that are used here.

    A tensor is fetched as a file of its own, which the library reads.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header, self.start = _remote_header(path, file_size(path))

    def keys(self) -> list[str]:
        return [name for name in self.header if name != _METADATA]

    def metadata(self) -> dict[str, str] | None:
        return self.header.get(_METADATA)

    def get_slice(self, name: str) -> Any:
        return _RemoteSlice(self.header[name])

    def get_tensor(self, name: str) -> np.ndarray:
        import safetensors

        entry = self.header[name]
        start, stop = entry["data_offsets"]
        content = read_range(self.path, self.start + start, self.start + stop) if stop > start else b""
        header = json.dumps({name: {**entry, "data_offsets": [0, stop - start]}}).encode()
        with tempfile.TemporaryDirectory(prefix="jpeft-") as folder:
            (file := Path(folder) / "tensor").write_bytes(struct.pack("<Q", len(header)) + header + content)
            with safetensors.safe_open(file, framework="numpy") as opened:
                return opened.get_tensor(name)


class _RemoteSlice:
    """The shape and dtype of a tensor in a header."""

    def __init__(self, entry: Mapping[str, Any]):
        self._entry = entry

    def get_shape(self) -> list[int]:
        return self._entry["shape"]

    def get_dtype(self) -> str:
        return self._entry["dtype"]


def _remote_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the bytes of its tensors begin. The library checks it.

    Args:
        size: the file's, which the header must agree with.
    """
    import safetensors

    (length,) = struct.unpack("<Q", read_range(path, 0, 8).ljust(8, b"\0"))
    if length > size - 8:
        raise safetensors.SafetensorError("truncated, or of another format")
    start = read_range(path, 0, 8 + length)
    with tempfile.TemporaryDirectory(prefix="jpeft-") as folder:
        file = Path(folder) / "header"
        with file.open("wb") as sink:
            sink.write(start)
            sink.truncate(size)  # a hole, which takes no space
        with safetensors.safe_open(file, framework="numpy"):
            return json.loads(start[8:]), 8 + length


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
