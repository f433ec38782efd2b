"""The GGUF container: header, metadata and tensor directory."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


_FLOAT32, _STRING, _ARRAY = 6, 8, 9


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "an array"}


@dataclasses.dataclass(frozen=True)
class _Info:
    """A tensor's shape in torch's order, which is GGUF's reversed, its `gguf.GGMLQuantizationType` and its bytes."""

    shape: tuple[int, ...]
    type: Any
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class File:
    """An open file: memory-mapped, with its header read."""

    path: Path
    data: np.ndarray
    metadata: dict[str, Any]
    tensors: dict[str, _Info]

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of `key`; a ModelError if it is of another kind, or missing without a default."""
        if key not in self.metadata:
            if default is ...:
                raise ModelError(f"{self.path}: no {key} in the metadata")
            return default
        value = self.metadata[key]
        if kind in (int, float) and isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one for each layer, all alike
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.path}: {key} is {str(value)[:40]!r}, expected {_KINDS[kind]}")
        return value

    def field(self, key: str, kind: type, default: Any = ...) -> Any:
        """`get` of a key of the architecture's own."""
        return self.get(f"{self.metadata['general.architecture']}.{key}", kind, default)


Source = str | os.PathLike[str] | File  # a path, or the open file


def open_file(path: Source) -> File:
    """The file with its header read, which takes a while: what else is read here takes it in place of the path.

    Raises:
        FileNotFoundError, ModelError: there is no such file, or it is no whole GGUF file.

    >>> open_file("SmolLM2-135M-Instruct.Q4_1.gguf").get("general.architecture", str)  # doctest: +SKIP
    'llama'
    """
    if isinstance(path, File):
        return path
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)  # nothing cannot be mapped
    magic, version = bytes(data[:4]), int.from_bytes(bytes(data[4:8]), "little")
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r})")
    if version and version & 0xFFFF == 0:
        raise ModelError(f"{path}: big-endian; convert it with gguf-convert-endian {path} little")
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version}, expected 2 or 3")
    try:
        file = File(path, data, *_Header(data.data).read())
    except ValueError as error:
        raise ModelError(f"{path}: not a whole GGUF file ({error})") from None
    if (count := file.get("split.count", int, 1)) > 1:
        raise ModelError(f"{path}: one of {count} parts; join them with llama-gguf-split --merge")
    return file


class _Header:
    """Reads what stands before the tensors. Bytes that are missing or make no sense are a ValueError."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 8  # behind the magic number and the version

    def read(self) -> tuple[dict[str, Any], dict[str, _Info]]:
        tensor_count, key_count = self.take("QQ")
        metadata, found = {}, []
        for _ in range(key_count):
            key = self.text()
            metadata[key] = self.value(*self.take("I"))
        for _ in range(tensor_count):
            name, (dimensions,) = self.text(), self.take("I")
            shape = self.take(f"{dimensions}Q")[::-1] if dimensions <= 4 else ()
            found.append((name, shape, *self.take("IQ")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, shape, number, base + offset) for name, shape, number, offset in found}
        if len(tensors) != len(found):
            raise ValueError("two tensors have the same name")
        return metadata, tensors

    def tensor(self, name: str, shape: tuple[int, ...], number: int, start: int) -> _Info:
        import gguf

        if not math.prod(shape) or not shape:
            raise ValueError(f"tensor {name!r} has shape {shape}, expected one to four sizes above 0")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"tensor {name!r} is of type {number}, which gguf does not know") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, expected multiples of {kind.name}'s {block}")
        stop = start + math.prod(shape) // block * size
        if stop > len(self.data):
            raise ValueError(f"cut short: tensor {name!r} needs byte {stop:,}, the file ends at {len(self.data):,}")
        return _Info(shape, kind, start, stop - start)

    def take(self, layout: str) -> tuple[Any, ...]:
        start, self.at = self.at, self.at + struct.calcsize(f"<{layout}")
        if self.at > len(self.data):
            raise ValueError(f"cut short: byte {self.at:,} is needed, the file ends at {len(self.data):,}")
        return struct.unpack_from(f"<{layout}", self.data, start)

    def many(self, count: int, code: str) -> tuple[Any, ...]:
        return self.take(f"{min(count, len(self.data))}{code}")  # a count that no file holds is no layout either

    def text(self) -> str:
        (length,) = self.take("Q")
        return str(self.many(length, "s")[0], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.take("IQ")
            if kind == _STRING:
                return [self.text() for _ in range(count)]
            return list(self.many(count, self.code(kind)))
        (value,) = self.take(self.code(kind))
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-05, and not 9.999999747378752e-06

    @staticmethod
    def code(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}, which GGUF does not have")
        return _SCALARS[kind]
