"""Object stores (`gs://bucket/…`) beside local disks: paths, whole objects, byte ranges, and listings.

Paths on a store are `etils.epath.Path`, as Orbax's, which has the methods of `pathlib.Path` that jpeft uses. What a
store does otherwise than a disk is here:

- an object appears whole, when its upload ends, or not at all, so a write needs no temporary file;
- there are no folders: one is there while an object has its name as a prefix, and nothing can be renamed in one step;
- an object can be created on the condition that there is none of its name (`create_object`); of two that try, one
  fails;
- libraries that map a file into memory need a copy of it on the disk (`local_copy`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The schemes of etils.epath, and the packages of their fsspec back ends: module, and what to install.
_BACKENDS = {
    "gs": ("gcsfs", '"jpeft[gcs]"'),
    "s3": ("s3fs", "s3fs"),
    "az": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", '"jpeft[hub]"'),
}
# pathlib makes one slash of two, so that a `Path("gs://bucket/run")` is still recognized.
_URL = re.compile(rf"({'|'.join(_BACKENDS)}):/{{1,2}}(?!/)")
_LOGGERS = ("gcsfs", "google.auth._default", "google.auth.compute_engine._metadata")


class StorageError(OSError):
    """A path on an object store that cannot be used: its message says why, and what to do."""


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path object for a path that a user gave: on an object store if it has a scheme, such as `gs://`, else local.

    A `~` of a local path is expanded. The result of a URL is an `etils.epath.Path`.

    Raises:
        StorageError: the scheme is unknown, or the package for it is not installed.

    >>> as_path("runs/first")
    PosixPath('runs/first')
    >>> str(as_path("gs://bucket") / "runs" / "first")  # doctest: +SKIP
    'gs://bucket/runs/first'
    """
    text = os.fspath(path)
    if (url := _URL.match(text)) is None:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
            known = ", ".join(f"{scheme}://" for scheme in _BACKENDS)
            raise StorageError(f"{text}: expected a local path, or one that starts with {known}")
        return Path(text).expanduser()
    scheme = url[1]
    module, wanted = _BACKENDS[scheme]
    if importlib.util.find_spec(module) is None:
        raise StorageError(f"{text}: {scheme}:// needs {module}: pip install {wanted}")
    from etils import epath

    found: Any = epath.Path(f"{scheme}://{text[url.end() :]}")
    _store(str(found))
    return found


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path from `as_path` is on an object store.

    >>> is_remote("gs://bucket/run"), is_remote("runs/first")
    (True, False)
    """
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    """A path that is valid from any working directory.

    >>> absolute(Path("runs")).is_absolute()
    True
    """
    return path if is_remote(path) else path.absolute()


def reason(error: OSError) -> str:
    """The cause of an error, in the words of the operating system; those of a store have none.

    >>> reason(FileNotFoundError("gs://bucket/rows.csv")), reason(PermissionError(13, "Permission denied"))
    ('no such file', 'Permission denied')
    """
    if error.strerror:
        return error.strerror
    return "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:200]


def check_writable(folder: Path) -> None:
    """Creates and deletes a small object in a folder of a store. Local folders are not checked.

    Raises:
        StorageError: the bucket does not exist, may not be written, or cannot be reached.

    >>> check_writable(Path("runs"))
    """
    if not is_remote(folder):
        return
    probe, bucket = f"{folder}/.jpeft-{secrets.token_hex(4)}", "/".join(os.fspath(folder).split("/")[:3])
    try:
        put_object(probe, b"")
        with _errors(probe):
            _store(probe).rm_file(probe)
    except FileNotFoundError:
        raise StorageError(f"{folder}: there is no bucket {bucket}; create it, or choose another") from None
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written: {reason(error)}; your account must create and delete objects in {bucket} "
            "(for gs://, log in with: gcloud auth application-default login)"
        ) from error


# ------------------------------------------------------------------------------------------------------------- objects


def put_object(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes an object. Killed at any moment, the old one is there or the new one, never a part of it.

    >>> put_object("gs://bucket/result.json", b"{}")  # doctest: +SKIP
    """
    with _errors(path):
        _store(path).pipe_file(os.fspath(path), data)


def create_object(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes an object on the condition that there is none of this name: of two that try, one fails.

    Raises:
        FileExistsError: there is one.

    >>> create_object("gs://bucket/run/.lock", b"{}")  # doctest: +SKIP
    """
    with _errors(path):
        _store(path).pipe_file(os.fspath(path), data, mode="create")


def upload(local: Path, path: str | os.PathLike[str]) -> None:
    """Copies a local file to a store, as one object.

    >>> upload(Path("model.safetensors"), "gs://bucket/model/model.safetensors")  # doctest: +SKIP
    """
    with _errors(path):
        _store(path).put_file(str(local), os.fspath(path))


def read_range(path: str | os.PathLike[str], start: int, stop: int) -> bytes:
    """Some bytes of an object.

    >>> read_range("gs://bucket/model/model.safetensors", 0, 8)  # doctest: +SKIP
    """
    with _errors(path):
        return _store(path).cat_file(os.fspath(path), start=start, end=stop)


def move(source: Path, target: Path) -> None:
    """Renames a file. On a store, which cannot, it is copied and deleted: killed between, both are there.

    >>> move(Path("adapter.safetensors.new"), Path("adapter.safetensors"))  # doctest: +SKIP
    """
    if not is_remote(source):
        return os.replace(source, target)
    with _errors(source):
        _store(source).cp_file(os.fspath(source), os.fspath(target))
        _store(source).rm_file(os.fspath(source))


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A local file with the content of a file, for libraries that need one. A copy is deleted at the end.

    >>> with local_copy(Path("adapter.safetensors")) as file: print(file)
    adapter.safetensors
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jpeft-") as folder:
        copy = Path(folder) / path.name
        download(path, copy)
        yield copy


def download(path: Path, local: Path) -> None:
    """Copies an object to a local file.

    Raises:
        FileNotFoundError: there is none.

    >>> download(as_path("gs://bucket/rows.csv"), Path("rows.csv"))  # doctest: +SKIP
    """
    with _errors(path), path.open("rb") as source, local.open("wb") as sink:
        shutil.copyfileobj(source, sink, 2**24)


# ------------------------------------------------------------------------------------------------------------- folders


def file_sizes(folder: Path) -> dict[str, int]:
    """The files below a folder, in order: their sizes in bytes by their paths in it.

    >>> file_sizes(Path("no/folder"))
    {}
    """
    if not is_remote(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    root = f"{os.fspath(folder).partition('://')[2].rstrip('/')}/"
    with _errors(folder):
        found = _store(folder).find(os.fspath(folder), detail=True)
    return {name.removeprefix(root): found[name]["size"] for name in sorted(found) if name.startswith(root)}


def file_size(path: Path) -> int:
    """The size of a file.

    >>> file_size(Path(os.devnull))
    0
    """
    stat: Any = path.stat()
    return stat.length if is_remote(path) else stat.st_size


def modified_seconds(path: Path) -> float:
    """The time of a file's last change, in seconds since the epoch.

    >>> modified_seconds(Path(os.devnull)) > 0
    True
    """
    stat: Any = path.stat()
    return stat.mtime if is_remote(path) else stat.st_mtime


def remove_folder(folder: Path) -> None:
    """Deletes a folder and what is in it, if it is there.

    >>> remove_folder(Path("no/folder"))
    """
    if not is_remote(folder):
        return shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError), _errors(folder):
        _store(folder).rm(os.fspath(folder), recursive=True)


# ----------------------------------------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """The folder for downloads and compiled programs: `$JPEFT_CACHE`, else the platform's (`~/.cache/jpeft` on Linux).

    Raises:
        StorageError: `$JPEFT_CACHE` is on an object store.

    >>> cache_folder().is_absolute()
    True
    """
    if chosen := os.environ.get("JPEFT_CACHE"):
        if is_remote(chosen):
            raise StorageError(f"JPEFT_CACHE={chosen}: the cache must be a local folder")
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("jpeft", appauthor=False)


def cached_copy(path: Path) -> Path:
    """A local copy of a file on an object store, kept in the cache until the file changes; a local file itself.

    >>> cached_copy(Path("model.gguf"))
    PosixPath('model.gguf')
    """
    if not is_remote(path):
        return path
    version = f"{path} {file_size(path)} {modified_seconds(path)}"
    folder = cache_folder() / "objects" / hashlib.sha256(version.encode()).hexdigest()[:16]
    copy = folder / path.name
    if not copy.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}")
        try:
            download(path, scratch)
            scratch.replace(copy)
        finally:
            scratch.unlink(missing_ok=True)
    return copy


# ----------------------------------------------------------------------------------------------------------- the store


@functools.cache
def _file_system(scheme: str) -> Any:
    """The fsspec file system that etils.epath uses for a scheme, without its cache of listings.

    The cache would hide what others wrote since: other hosts, and tensorstore, which writes the checkpoints.
    """
    from etils.epath import backend

    for name in _LOGGERS:  # they print the traceback of an error that is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    system = backend.fsspec_backend.fs(f"{scheme}://")
    system.dircache.use_listings_cache = False
    system.invalidate_cache()
    return system


def _store(path: str | os.PathLike[str]) -> Any:
    return _file_system(os.fspath(path).partition("://")[0])


@contextlib.contextmanager
def _errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which the errors of a store's client are OSErrors that name the path."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = " ".join((str(error) or type(error).__name__).split())[:200]
        denied = said.startswith("Forbidden") or getattr(error, "code", None) in (401, 403)
        number = errno.EACCES if denied else errno.EIO
        raise OSError(number, f"{os.strerror(number).lower()} ({said})", os.fspath(path)) from error
