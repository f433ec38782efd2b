"""Adapters that a server may read: those inside one folder."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpeft.errors import AdapterError, UserError
from jpeft.serving.engine import Engine
from jpeft.serving.http.errors import HTTPError
from jpeft.serving.request import ClosedError


@dataclass
class AdapterFolder:
    """The folder of a server's adapters, and the loading of them into its engine.

    Attributes:
      root: the folder. Nothing outside of it is read, whatever links or `..` a path has. None: nothing is.
      read: reads an adapter from a folder: `(peft, adapter)`.
      base: the name of the base, which no adapter may have.
    """

    root: Path | None
    read: Callable[[Path], tuple[Any, Any]]
    base: str
    _busy: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self, engine: Engine, name: str, path: str) -> None:
        """Loads an adapter into an engine, in the place of one of the same name.

        Raises:
          HTTPError: the path is outside (403) or holds no adapter (404); another call loads or unloads this name (409);
            the adapter is of another base, cannot be read, or does not fit the bank (400); the engine is closed (503).
        """
        if not is_name(name) or name == self.base:
            raise HTTPError(400, f"an adapter cannot have the name {name!r}", "lora_name")
        folder = self.resolve(path)
        with self._alone(name):
            try:
                engine.load(name, self.read(folder))
            except ClosedError as error:
                raise HTTPError(503, "the server is stopping") from error
            except (AdapterError, UserError, ValueError, KeyError, OSError) as error:
                told = _message(error).removeprefix(f"{folder}: ").replace(str(folder), path)
                raise HTTPError(400, f"{path}: {told}", "lora_path") from error

    def unload(self, engine: Engine, name: str) -> None:
        """Frees the place of an adapter.

        Raises:
          HTTPError: there is none of this name (404), no adapter can have it (400), another call loads it (409), or the
            engine is closed (503).
        """
        if not is_name(name):
            raise HTTPError(400, f"no adapter has the name {name!r}", "lora_name")
        with self._alone(name):
            if engine.bank is None or name not in engine.bank.names:
                raise HTTPError(404, f"there is no adapter {name!r}", "lora_name")
            try:
                engine.unload(name)
            except ClosedError as error:
                raise HTTPError(503, "the server is stopping") from error

    def resolve(self, path: str) -> Path:
        """The folder of an adapter, from its path, which may be relative to the root. No link in it leads outside.

        >>> AdapterFolder(Path("/adapters"), lambda path: (None, None), "base").resolve("../etc")
        Traceback (most recent call last):
        jpeft.serving.http.errors.HTTPError: '../etc' is outside of the server's folder of adapters
        """
        if self.root is None:
            raise HTTPError(403, "this server was started without a folder of adapters (--adapters)", "lora_path")
        if not path or "\0" in path:
            raise HTTPError(400, f"{path!r} is no path", "lora_path")
        root = self.root.resolve()
        try:
            found = (root / path).resolve()
            is_folder = found.is_dir()
            outside = not found.is_relative_to(root) or found == root or _leads_out(found, root)
        except (OSError, RuntimeError, ValueError):  # too long, not Unicode, or links in a circle
            raise HTTPError(400, f"{path[:100]!r} is no path that can be read", "lora_path") from None
        if outside:
            raise HTTPError(403, f"{path!r} is outside of the server's folder of adapters", "lora_path")
        if not is_folder:
            raise HTTPError(404, f"{path!r}: there is no such folder among the server's adapters", "lora_path")
        return found

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """A context in which no other call loads or unloads this name."""
        with self._lock:
            if name in self._busy:
                raise HTTPError(409, f"the adapter {name!r} is being loaded or unloaded by another call", "lora_name")
            self._busy.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(name)


def is_name(text: str) -> bool:
    """Whether a model can have a text as its name: not blank, valid Unicode, and without control characters.

    >>> is_name("fr"), is_name("f\\n"), is_name(" "), is_name("\\ud800")
    (True, False, False, False)
    """
    return bool(text.strip()) and not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def _leads_out(folder: Path, root: Path) -> bool:
    """Whether a link in a folder, or in one that a link leads to, leads out of the root."""
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        found = waiting.pop().resolve()
        if not found.is_relative_to(root):
            return True
        if found.is_dir() and found not in seen:
            seen.add(found)
            waiting += found.iterdir()
    return False


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
