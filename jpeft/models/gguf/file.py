"""The GGUF container: header, metadata, tensor directory and tensor data.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package dequantizes, but the header is
parsed here: `gguf.GGUFReader` takes 4.5 s for SmolLM2's vocabulary of 49,152 tokens where this takes 0.2, and a corrupt
count keeps it busy until memory runs out.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jpeft.errors import ModelError
from jpeft.storage import as_path, cached_copy

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # for `struct`
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "an array"}
UNQUANTIZED: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """An entry of the tensor directory.

    Attributes:
        shape: in torch's order, which is GGUF's reversed.
        type: the `gguf.GGMLQuantizationType`.
        start: the first byte in the file.
        nbytes: the number of bytes in the file.
    """

    shape: tuple[int, ...]
    type: Any
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: memory-mapped, with its header parsed."""

    path: Path
    data: np.ndarray
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The metadata value of `key`.

        Raises:
            ModelError: the value has another type, or the key is missing and there is no default.
        """
        if key not in self.metadata:
            if default is ...:
                raise ModelError(f"{self.path}: no {key} in the metadata")
            return default
        value = self.metadata[key]
        if kind in (int, float) and isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one per layer, all equal
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.path}: {key} is {str(value)[:40]!r}, expected {_KINDS[kind]}")
        return value

    def field(self, key: str, kind: type, default: Any = ...) -> Any:
        """`get` for a key below the architecture's own prefix, e.g. `llama.`."""
        return self.get(f"{self.metadata['general.architecture']}.{key}", kind, default)

    def read_tensor(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype, or dequantized to float32. The array does not refer to the mapped file.

        Raises:
            ModelError: the `gguf` package cannot dequantize the tensor's type.
        """
        info = self.tensors[name]
        raw = self.data[info.start : info.start + info.nbytes]
        if info.type.name in UNQUANTIZED:
            return np.array(raw).view(UNQUANTIZED[info.type.name]).reshape(info.shape)
        import gguf

        try:
            return gguf.dequantize(raw.reshape(math.prod(info.shape[:-1]), -1), info.type).reshape(info.shape)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: {name} is of type {info.type.name}, which gguf does not dequantize; "
                "use a file with another quantization"
            ) from None


Source = str | os.PathLike[str] | GGUFFile  # a path or an open file


def open_file(path: Source) -> GGUFFile:
    """Opens a GGUF file and parses its header. The other readers accept the result in place of the path.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: the file is not a complete little-endian GGUF file of version 2 or 3 in one part.

    >>> open_file("SmolLM2-135M-Instruct.Q4_1.gguf").get("general.architecture", str)  # doctest: +SKIP
    'llama'
    """
    if isinstance(path, GGUFFile):
        return path
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    local = cached_copy(path)
    data = np.memmap(local, mode="r") if local.stat().st_size else np.zeros(0, np.uint8)  # mmap rejects an empty file
    magic, version = bytes(data[:4]), int.from_bytes(bytes(data[4:8]), "little")
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r})")
    if version and version & 0xFFFF == 0:
        raise ModelError(f"{path}: big-endian; convert it with gguf-convert-endian {path} little")
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version}, expected 2 or 3")
    try:
        file = GGUFFile(path, data, *_HeaderParser(data.data).parse())
    except ValueError as error:
        raise ModelError(f"{path}: not a complete GGUF file ({error})") from None
    if (count := file.get("split.count", int, 1)) > 1:
        raise ModelError(f"{path}: one of {count} parts; join them with llama-gguf-split --merge")
    return file


class _HeaderParser:
    """Parses metadata and tensor directory. Raises ValueError for missing or invalid bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 8  # after the magic number and the version

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        tensor_count, key_count = self.unpack("QQ")
        metadata, entries = {}, []
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(*self.unpack("I"))
        for _ in range(tensor_count):
            name, (dimensions,) = self.string(), self.unpack("I")
            shape = self.unpack(f"{dimensions}Q")[::-1] if dimensions <= 4 else ()
            entries.append((name, shape, *self.unpack("IQ")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-self.position // alignment) * alignment
        tensors = {name: self.tensor_info(name, shape, type_, base + at) for name, shape, type_, at in entries}
        if len(tensors) != len(entries):
            raise ValueError("two tensors have the same name")
        return metadata, tensors

    def tensor_info(self, name: str, shape: tuple[int, ...], type_: int, start: int) -> TensorInfo:
        import gguf

        if not math.prod(shape) or not shape:
            raise ValueError(f"tensor {name!r} has shape {shape}, expected one to four sizes above 0")
        try:
            kind = gguf.GGMLQuantizationType(type_)
        except ValueError:
            raise ValueError(f"tensor {name!r} is of type {type_}, which gguf does not know") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, expected multiples of {kind.name}'s {block}")
        stop = start + math.prod(shape) // block * size
        if stop > len(self.data):
            raise ValueError(f"truncated: tensor {name!r} needs byte {stop:,}, the file ends at {len(self.data):,}")
        return TensorInfo(shape, kind, start, stop - start)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        start, self.position = self.position, self.position + struct.calcsize(f"<{layout}")
        if self.position > len(self.data):
            raise ValueError(f"truncated: byte {self.position:,} is needed, the file ends at {len(self.data):,}")
        return struct.unpack_from(f"<{layout}", self.data, start)

    def unpack_array(self, count: int, code: str) -> tuple[Any, ...]:
        # `struct` cannot take a corrupt count of 2**60, so it is limited to one that is just as truncated.
        return self.unpack(f"{min(count, len(self.data))}{code}")

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return str(self.unpack_array(length, "s")[0], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.unpack("IQ")
            if kind == _STRING:
                return [self.string() for _ in range(count)]
            return list(self.unpack_array(count, self.struct_code(kind)))
        (value,) = self.unpack(self.struct_code(kind))
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-05, not 9.999999747378752e-06

    @staticmethod
    def struct_code(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}, which GGUF does not define")
        return _SCALARS[kind]
