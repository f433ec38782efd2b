"""The lock of a run: two processes that write the same checkpoints would damage both.

On a disk the operating system locks `run/.lock` and releases it when the process ends, however it ends. An object store
has no such lock. There `.lock` is an object that is created only if there is none, by an operation that one of two
processes wins. It holds who wrote it, and its writer renews it every few seconds:

- the lock of a process that was killed on this machine is taken over at once;
- that of another machine is watched, and taken over if it is not renewed for `DEAD` seconds;
- a process that was suspended for so long finds its lock taken, and stops before it saves another checkpoint.

A store cannot exclude a second writer altogether: a process that awakes after `DEAD` seconds may write until it looks
at its lock, which is before each checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jpeft.errors import UserError
from jpeft.files import write_atomically
from jpeft.parallel.hosts import is_main_process, on_all_hosts
from jpeft.storage import create_object, is_remote

RENEW = 15.0  # seconds between two renewals
DEAD = 90.0  # seconds without one after which a lock is taken over
_SETTLE = 1.0  # seconds after a takeover in which another one of the same lock shows


@contextlib.contextmanager
def locked(run: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[Callable[[], None]]:
    """Locks a run for this process.

    Args:
        say: receives why it waits.

    Yields:
        A function that raises a UserError if the lock was lost. On several hosts, all call it.

    Raises:
        UserError: another process has the lock.

    >>> with locked(Path("runs/first")) as check: train()  # doctest: +SKIP
    """
    lock = _StoreLock(run, say) if is_remote(run) else _DiskLock(run)
    on_all_hosts(lambda: lock.acquire() if is_main_process() else None)
    try:
        yield lambda: on_all_hosts(lock.check)
    finally:
        if is_main_process():
            lock.release()


class _DiskLock:
    """A lock that the operating system keeps."""

    def __init__(self, run: Path):
        import filelock

        self.run, self._lock = run, filelock.FileLock(run / ".lock", timeout=0)

    def acquire(self) -> None:
        import filelock

        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.run}: another process is writing it; wait, or choose another `out`") from None

    def check(self) -> None:
        """It cannot be lost."""

    def release(self) -> None:
        self._lock.release()


class _StoreLock:
    """An object that this process renews."""

    def __init__(self, run: Path, say: Callable[[str], None]):
        self.run, self.say, self.path = run, say, run / ".lock"
        self.about = {"host": socket.gethostname(), "processes": _namespace(), "pid": os.getpid()}
        self.about["token"] = secrets.token_hex(8)
        self._lost: str = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        try:
            create_object(self.path, self._content())
        except FileExistsError:
            self._take_over()
        self._thread = threading.Thread(target=self._keep_renewing, name="jpeft-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost:
            raise UserError(f"{self.run}: {self._lost} has taken over this run, which was not written for {DEAD:.0f} s")

    def release(self) -> None:
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join()
        with contextlib.suppress(OSError):
            if not self._lost and self._is_ours(self._read()):
                self.path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        holder = self._read()
        if holder is not None and not self._is_dead(holder):
            raise UserError(
                f"{self.run}: another process is writing it ({_name(holder)}); wait, or choose another `out`"
            )
        self.path.unlink(missing_ok=True)
        try:
            create_object(self.path, self._content())
            time.sleep(_SETTLE)
            if self._is_ours(self._read()):
                return
        except FileExistsError:
            pass
        raise UserError(f"{self.run}: another process has just begun to write it; wait, or choose another `out`")

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether the process that wrote a lock is gone. It is watched if it cannot be known at once."""
        here = all(holder.get(name) == self.about[name] for name in ("host", "processes"))
        if here and holder.get("pid") != os.getpid():
            return not _is_alive(holder.get("pid"))
        self.say(f"watching whether {_name(holder)} still writes {self.run}, for up to {DEAD:.0f} s")
        ends = time.monotonic() + DEAD
        while time.monotonic() < ends:
            time.sleep(min(1.0, DEAD / 10))
            if (now := self._read()) != holder:
                return now is None
        return True

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(OSError):  # the next renewal may succeed
                now = self._read()
                if not self._is_ours(now):
                    self._lost = "another process" if now is None else _name(now)
                    return
                write_atomically(self.path, self._content())

    def _content(self) -> bytes:
        return json.dumps(self.about | {"time": time.time()}).encode()

    def _read(self) -> dict[str, Any] | None:
        """The content of the lock; None if there is none."""
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self.about["token"]


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _namespace() -> str:
    """The namespace of this process's number: the numbers of two containers may be equal."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    if os.name == "nt":  # signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
