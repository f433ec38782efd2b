"""Files written atomically, safetensors, JSON and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from jpeft.errors import AdapterError, ModelError

# --- files, shared with jpeft.hf and jpeft.models ---------------------------------------------------------------------


def serialize(tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.numpy import save as serialize

    # safetensors writes an array's buffer as it lies, so a transposed view would be scrambled.
    return serialize({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}, metadata=metadata)


def write_safetensors(
    file: FilePath, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically. Inverse of `read_safetensors`."""
    write_atomically(file, serialize(tensors, metadata))


def read_safetensors(file: FilePath) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file. Inverse of `write_safetensors`.

    Raises:
      AdapterError: no such file, a pickle, or a truncated or malformed one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as f:
            magic = f.read(2)
    except FileNotFoundError:
        raise AdapterError(f"{file} does not exist") from None
    if magic in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise AdapterError(f"{file} is a pickle, which may run code when opened and is refused; save it as safetensors")
    try:
        # Not safetensors.numpy.load, which does not know bfloat16.
        with safe_open(file, framework="numpy") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as e:
        raise AdapterError(f"{file} is no complete safetensors file ({e}): truncated, or of another kind") from e


def write_atomically(file: FilePath, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part.

    Raises:
      OSError: it cannot be written, e.g. a full disk; the old one is intact and no temporary file is left.
    """
    with _temporary(file) as (descriptor, temporary):
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)


@contextlib.contextmanager
def _temporary(file: FilePath) -> Iterator[tuple[int, str]]:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would keep the file from everyone else
        yield descriptor, name
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: FilePath) -> None:
    """Makes renames in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # json's and UTF-8's errors alike
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is filled inside the `with` and then takes its name in one step, or is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.mkdir()
    try:
        yield new
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    >>> file_sha256(run / "config.json")  # doctest: +SKIP
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all.

    >>> write_json(run / "result.json", result)  # doctest: +SKIP
    """
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
