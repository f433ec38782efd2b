"""Files and folders: written atomically, read with errors that name the path; safetensors, JSON and checksums.

Paths are from `jpeft.storage.as_path`: local, or on an object store.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import AdapterError
from jpeft.storage import (
    create_object,
    file_sizes,
    is_remote,
    local_copy,
    put_object,
    upload,
)

# ------------------------------------------------------------------------------------------------- files and folders


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old content or the new one, never a part of it.

    An object store keeps that promise by itself: an object appears when its upload ends.

    Raises:
        OSError: the file cannot be written, e.g. the disk is full. The old file is intact and no temporary file stays.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write_atomically(folder / "notes.txt", b"tea")
    >>> (folder / "notes.txt").read_bytes()
    b'tea'
    """
    if is_remote(path):
        return put_object(path, data)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from other users
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """A folder that is filled inside the `with` and then takes its name in one step, or leaves nothing behind.

    An object store cannot rename a folder in one step. There the folder is filled on the local disk and uploaded, the
    marker last, without which no reader takes it for whole. Of two that make the same folder, one fails, as on a disk.
    Killed during the upload, files without the marker are left, which the next `new_folder` of this name replaces; and
    with `replace`, the old marker is deleted first, so that neither the old folder nor the new one is there.

    Args:
        path: the folder to make; its parents are made too. An empty folder of this name is replaced.
        replace: also replace a folder that holds files. It is deleted only after the new one has its name.
        marker: the file that makes the folder a whole one; readers ask for it first.

    Raises:
        OSError: the folder cannot be made, or `path` is taken and `replace` is False. What was there is intact.

    >>> path = Path(tempfile.mkdtemp()) / "run"
    >>> with new_folder(path) as folder:
    ...     write_json(folder / "result.json", {"loss": 0.5})
    >>> [file.name for file in path.iterdir()]
    ['result.json']
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="jpeft-") as staging:
            yield Path(staging)
            _publish(Path(staging), path, replace, marker)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        sync_folder(new)
        if replace and path.exists():
            path.rename(old)
        new.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _publish(new: Path, path: Path, replace: bool, marker: str) -> None:
    """Uploads a local folder to a store, the marker last."""
    there, names = set(file_sizes(path)), list(file_sizes(new))
    if marker in there:
        if not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        (path / marker).unlink()
    for name in names:
        if name != marker:
            upload(new / name, path / name)
    for name in there - {*names, marker}:  # of the old folder, or of a killed upload
        (path / name).unlink()
    if marker in names:
        create_object(path / marker, (new / marker).read_bytes())


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, on systems that can.

    >>> sync_folder(Path(tempfile.mkdtemp()))
    """
    if is_remote(folder):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    >>> path = Path(tempfile.mkdtemp()) / "empty"
    >>> path.touch()
    >>> file_sha256(path)[:12]
    'e3b0c44298fc'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------- JSON


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Writes a JSON file atomically. Inverse of `read_json`.

    >>> write_json(Path(tempfile.mkdtemp()) / "result.json", {"loss": 0.5})
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    write_atomically(path, f"{text}\n".encode())


def read_json(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The object in a JSON file. Inverse of `write_json`.

    Args:
        error: the class of the error for a file that does not hold a JSON object.

    Raises:
        OSError: the file cannot be read, e.g. it does not exist.

    >>> path = Path(tempfile.mkdtemp()) / "result.json"
    >>> write_json(path, {"loss": 0.5})
    >>> read_json(path, ValueError)
    {'loss': 0.5}
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as cause:  # malformed JSON, malformed UTF-8, or JSON nested too deeply
        raise error(f"{path}: not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------------- safetensors


def serialize(tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file.

    >>> len(serialize({"bias": np.zeros(2, np.float32)}))
    80
    """
    from safetensors.numpy import save

    # safetensors writes an array's buffer as it lies in memory, so a transposed view would be scrambled.
    return save({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}, metadata=metadata)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Inverse of `read_safetensors`.

    >>> write_safetensors(Path(tempfile.mkdtemp()) / "a.safetensors", {"bias": np.zeros(2, np.float32)})
    """
    write_atomically(path, serialize(tensors, metadata))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter's safetensors file. Inverse of `write_safetensors`.

    Raises:
        AdapterError: the file does not exist, is a pickle, or is truncated or malformed.

    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_safetensors(path, {"bias": np.zeros(2, np.float32)})
    >>> read_safetensors(path)
    {'bias': array([0., 0.], dtype=float32)}
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AdapterError(f"{path} does not exist")
    try:
        # Not safetensors.numpy.load, which does not know bfloat16.
        with local_copy(path) as local, safe_open(local, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        if _is_pickle(path):
            raise AdapterError(
                f"{path} is a pickle, which may run code when opened and is refused; save it as safetensors"
            ) from None
        if isinstance(error, AttributeError):  # safetensors looks a dtype up in numpy, which lacks float8
            raise AdapterError(
                f"{path} holds tensors of a dtype that is not read ({error}); save it in float32, bfloat16 or float16"
            ) from error
        raise AdapterError(
            f"{path} is not a complete safetensors file ({error}): truncated, or of another format"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file that is not safetensors looks like a pickle, as it is or in torch's zip archive.

    The first bytes of safetensors are the length of its header and can be any, also these: ask only after it failed.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors, and damaged
        return False
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05")
