"""Several processes as one: joining them, agreeing, and noticing who stopped.

The same command runs on every host. All compute the same program over one mesh; process 0 speaks and writes.

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

_FAREWELL = 2.0  # seconds that process 0, when it fails, gives the others to do so as well
BEAT = 2.0  # seconds between signs of life
SILENCE = 20.0  # seconds without one, after which a process counts as stopped
_SIGNS = "jpeft/signs_of_life"


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: float = 300.0
) -> None:
    """Makes this process one of several, before JAX has touched a device.

    Args:
      coordinator: `host:port` of process 0; processes: how many there are; process: which this is. All None asks the
        environment: Cloud TPU, SLURM, Open MPI, as `jax.distributed.initialize` knows them.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the environment does not tell, what was given is not understood, or process 0's port is in use.

    The process ends with status 1 and a line on stderr where others do not join in time.

    >>> join("127.0.0.1:8476", processes=2, process=0)  # doctest: +SKIP
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise UserError("--coordinator, --processes and --process belong together; without any the environment tells")
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: there is at least 1")
    if not timeout > 0:
        raise UserError(f"--join-within {timeout:g}: expected seconds, more than 0")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process {process} must be from 0 to {processes - 1}, as there are --processes {processes}")
    if coordinator is not None:
        _check_address(coordinator, listens=process == 0)
    who = f"process {process} of {processes}" if processes is not None else "this process"
    where = f" at {coordinator}" if coordinator else ""

    def give_up() -> None:
        # Not an exception: this thread cannot raise in the one that waits, and JAX itself would abort with a dump.
        print(f"jpeft: error: {who} waited {timeout:g} s{where}, and not all have joined: is the same command running "
              "on every host, and can they reach process 0?", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # what several CPU processes need
    watch = threading.Timer(timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(timeout) + 60)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if coordinator is None:
            raise UserError("--distributed: no environment that JAX knows (Cloud TPU, SLURM, Open MPI) tells who is "
                            f"who ({reason}); give --coordinator, --processes and --process") from error  # fmt: skip
        raise UserError(f"{who} could not join{where}: {reason}") from error
    finally:
        watch.cancel()


def _check_address(coordinator: str, listens: bool) -> None:
    """Raises a UserError for what is no `host:port`, and, to who `listens` there, for a port that is in use."""
    host, sign, port = coordinator.rpartition(":")
    if not (sign and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.1:8476")
    if not listens:
        return
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the service does
        try:
            trial.bind(("", int(port)))
        except OSError as error:
            raise UserError(f"--coordinator {coordinator}: {error.strerror or error}; choose another port") from error


def leave(status: int) -> None:
    """Ends this process with a status, if it is one of several: an orderly end would wait for those that go on.

    >>> leave(0)
    """
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():  # most fail together: the one that the others depend on goes last
        time.sleep(_FAREWELL)
    os._exit(status)


# --------------------------------------------------------------------------------------------------- signs of life


class Heartbeat:
    """This process's signs of life, and its look at those of the others.

    They are left with JAX's coordination service, which process 0 runs: a shared disk shows what others write late.
    """

    def __init__(self) -> None:
        from jax._src import distributed  # nothing public gives it; Orbax takes it from there too

        self._service: Any = distributed.global_state.client
        self.step, self._stop = 0, threading.Event()
        # By process: when its last sign came, and what it said.
        self._seen: dict[int, tuple[float, dict[str, Any]]] = {}

    def beat(self) -> None:
        """Leaves one."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), "step": self.step, "time": time.time()}
        with contextlib.suppress(RuntimeError):  # process 0 is gone: `silent` tells
            self._service.key_value_set(f"{_SIGNS}/{jax.process_index()}", json.dumps(about), allow_overwrite=True)

    def silent(self, limit: float) -> dict[int, str]:
        """Processes that have left none for so many seconds by this process's clock, in words."""
        found, now = {}, time.monotonic()
        with contextlib.suppress(RuntimeError):
            for key, said in self._service.key_value_dir_get(_SIGNS):
                i, about = int(key.rsplit("/", 1)[1]), json.loads(said)
                if i not in self._seen or self._seen[i][1] != about:
                    self._seen[i] = (now, about)
        for i, (when, about) in self._seen.items():
            if (age := now - when) > limit:
                found[i] = (f"process {i} (host {about['host']}, pid {about['pid']}) has stopped: no sign of it for "
                            f"{age:.0f} s, after step {about['step']}")  # fmt: skip
        # Without process 0 there is no sign of any other.
        return {0: found[0]} if 0 in found else found

    def run(self, silence: float) -> None:
        """Until `close`: beats, and leaves where another is silent for too long."""
        while not self._stop.wait(BEAT):
            self.beat()
            if silent := self.silent(silence):
                _leave(silent)

    def close(self) -> None:
        """No more."""
        self._stop.set()


@contextlib.contextmanager
def watched(silence: float = SILENCE) -> Iterator[Heartbeat]:
    """Signs of life while this lasts. A process that stops takes the others with it, and is named: one
    that waits in a collective for a host that is gone would wait for ever.

    >>> with watched() as pulse: pulse.step = 1  # doctest: +SKIP
    """
    pulse = Heartbeat()
    if jax.process_count() == 1:
        yield pulse
        return
    pulse.beat()
    multihost_utils.sync_global_devices("jpeft: signs of life")
    thread = threading.Thread(target=pulse.run, args=(silence,), daemon=True)
    thread.start()
    try:
        yield pulse
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        if not _is_lost_peer(error):
            raise
        deadline = time.monotonic() + 5 * BEAT
        while not (silent := pulse.silent(2 * BEAT)) and time.monotonic() < deadline:
            time.sleep(BEAT / 4)
        _leave(silent or {-1: f"another process has stopped: {' '.join(str(error).split())[:200]}"})
    finally:
        pulse.close()


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another process went away."""
    said = str(error).lower()
    return any(sign in said for sign in ("gloo", "by peer", "unavailable", "heartbeat", "aborted", "coordination serv"))


def _leave(silent: Mapping[int, str]) -> None:
    """Ends this process at once: an orderly end would wait for those that are gone. Process 0 speaks, if it can."""
    if is_main_process() or 0 in silent:
        print(f"jpeft: error: {'; '.join(silent.values())}; the same command with --resume goes on from the last "
              "checkpoint", file=sys.stderr, flush=True)  # fmt: skip
    os._exit(1)
