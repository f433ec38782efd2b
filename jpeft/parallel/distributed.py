"""Several processes as one run: joining them, leaving, and detecting a process that has stopped.

The same command runs on every host. All compute the same program over one mesh; process 0 alone prints and writes.

    join("10.0.0.1:8476", processes=4, process=2)  # or join() on a Cloud TPU pod, under SLURM or Open MPI
    mesh = device_mesh("data=2,fsdp=4")
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from jpeft.errors import UserError
from jpeft.parallel.hosts import is_main_process

BEAT = 2.0  # seconds between heartbeats
SILENCE = 20.0  # seconds without a heartbeat after which a process counts as stopped
_KEY = "jpeft/heartbeats"  # where heartbeats are kept in JAX's coordination service
_LAST_TO_LEAVE = 2.0  # seconds that process 0, when it fails, waits for the others to leave


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: float = 300.0
) -> None:
    """Joins this process to the others of a run. Call it before JAX uses a device.

    With all of ``coordinator``, ``processes`` and ``process`` None, the environment gives them: Cloud TPU, SLURM or
    Open MPI, as `jax.distributed.initialize` supports them.

    Args:
      coordinator: `host:port` of process 0.
      processes: the number of processes.
      process: the index of this one.
      timeout: seconds to wait for the others. When it is over, this process exits with status 1 and a line on stderr.

    Raises:
      UserError: no supported environment, an invalid argument, or process 0's port is in use.

    >>> join("127.0.0.1:8476", processes=2, process=0)  # doctest: +SKIP
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise UserError("`coordinator`, `processes` and `process` belong together; give all of them or none")
    if processes is not None and processes < 1:
        raise UserError(f"`processes` {processes}: expected at least 1")
    if not timeout > 0:
        raise UserError(f"`join_within` {timeout:g}: expected seconds, above 0")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"`process` {process} must be from 0 to {processes - 1}, with `processes` {processes}")
    if coordinator is not None:
        _check_address(coordinator, listens=process == 0)
    who = f"process {process} of {processes}" if processes is not None else "this process"
    where = f" at {coordinator}" if coordinator else ""

    def give_up() -> None:
        # Not an exception: this thread cannot raise in the waiting one, and JAX itself would abort with a dump.
        message = (
            f"{who} waited {timeout:g} s{where}, and some processes have not joined; is the same command running on "
            "every host, and can every host reach process 0?"
        )
        print(f"jpeft: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # required by several CPU processes
    watchdog = threading.Timer(timeout, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(timeout) + 60)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if coordinator is None:
            raise UserError(
                f"`distributed`: no environment that JAX supports (Cloud TPU, SLURM, Open MPI) was found ({reason}); "
                "give `coordinator`, `processes` and `process`"
            ) from error
        raise UserError(f"{who} could not join{where}: {reason}") from error
    finally:
        watchdog.cancel()


def _check_address(coordinator: str, listens: bool) -> None:
    """Raises a UserError if it is not `host:port` or, for the process that `listens` there, if the port is in use."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"`coordinator` {coordinator}: expected HOST:PORT, such as 10.0.0.1:8476")
    if not listens:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the coordination service does
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(f"`coordinator` {coordinator}: {error.strerror or error}; choose another port") from error


def leave(status: int) -> None:
    """Exits at once if this is one of several processes: a normal exit would wait for those still running.

    >>> leave(0)
    """
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():  # processes mostly fail together; the others depend on process 0, so it leaves last
        time.sleep(_LAST_TO_LEAVE)
    os._exit(status)


# --- heartbeats -----------------------------------------------------------------------------------------------------


class Heartbeat:
    """The heartbeats of this process, and a view of those of the others.

    They are kept in JAX's coordination service, which process 0 runs: a shared disk would show them late.

    Attributes:
      step: the last training step, for the message about a process that has stopped.
    """

    def __init__(self) -> None:
        from jax._src import distributed  # there is no public access to the client; Orbax imports it from here too

        self.step = 0
        self._client: Any = distributed.global_state.client
        self._stop = threading.Event()
        # By process: the time when its last heartbeat was seen, by this process's clock, and the heartbeat.
        self._seen: dict[int, tuple[float, dict[str, Any]]] = {}

    def beat(self) -> None:
        """Sends one heartbeat."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), "step": self.step, "time": time.time()}
        with contextlib.suppress(RuntimeError):  # process 0 is gone, which `silent` reports
            self._client.key_value_set(f"{_KEY}/{jax.process_index()}", json.dumps(about), allow_overwrite=True)

    def silent(self, limit: float) -> dict[int, str]:
        """A message for each process that has sent no heartbeat for longer than ``limit`` seconds."""
        now = time.monotonic()
        with contextlib.suppress(RuntimeError):
            for key, value in self._client.key_value_dir_get(_KEY):
                i, about = int(key.rsplit("/", 1)[1]), json.loads(value)
                if i not in self._seen or self._seen[i][1] != about:
                    self._seen[i] = (now, about)
        messages = {
            i: f"process {i} (host {about['host']}, pid {about['pid']}) has stopped: no heartbeat for {now - seen:.0f} "
            f"s, after step {about['step']}"
            for i, (seen, about) in self._seen.items()
            if now - seen > limit
        }
        # Without process 0 nobody's heartbeats arrive.
        return {0: messages[0]} if 0 in messages else messages

    def run(self, silence: float) -> None:
        """Sends a heartbeat every `BEAT` seconds until closed; exits if a peer is silent longer than ``silence``."""
        while not self._stop.wait(BEAT):
            self.beat()
            if silent := self.silent(silence):
                _exit(silent)

    def close(self) -> None:
        """Ends `run`."""
        self._stop.set()


@contextlib.contextmanager
def watched(silence: float = SILENCE) -> Iterator[Heartbeat]:
    """A context in which the processes exchange heartbeats.

    If one stops, the others exit with a message that names it, instead of waiting for it in a collective forever.

    >>> with watched() as heartbeat: heartbeat.step = 1  # doctest: +SKIP
    """
    heartbeat = Heartbeat()
    if jax.process_count() == 1:
        yield heartbeat
        return
    heartbeat.beat()
    multihost_utils.sync_global_devices("jpeft: heartbeats")
    thread = threading.Thread(target=heartbeat.run, args=(silence,), daemon=True)
    thread.start()
    try:
        yield heartbeat
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        if not _is_lost_peer(error):
            raise
        deadline = time.monotonic() + 5 * BEAT
        while not (silent := heartbeat.silent(2 * BEAT)) and time.monotonic() < deadline:
            time.sleep(BEAT / 4)
        _exit(silent or {-1: f"another process has stopped: {' '.join(str(error).split())[:200]}"})
    finally:
        heartbeat.close()


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error).lower()
    return any(sign in text for sign in ("gloo", "by peer", "unavailable", "heartbeat", "aborted", "coordination serv"))


def _exit(silent: Mapping[int, str]) -> None:
    """Exits at once: a normal exit would wait for the processes that are gone. Only process 0 prints, while it runs."""
    if is_main_process() or 0 in silent:
        message = f"{'; '.join(silent.values())}; resume from the last checkpoint (--resume)"
        print(f"jpeft: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
