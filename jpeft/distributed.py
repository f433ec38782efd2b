"""Several processes as one: joining them, agreeing, and noticing who stopped.

The same command runs on every host. All compute the same program over one mesh; process 0 speaks and writes.

    join("10.0.0.1:8476", processes=4, process=2)  # or join() on a Cloud TPU pod, under SLURM or Open MPI
    mesh = mesh_of("data=2,fsdp=4")
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jpeft.assets import UserError
from jpeft.hosts import leads
from jpeft.io import write_atomically

_FAREWELL = 2.0  # seconds that process 0, when it fails, gives the others to do so as well
BEAT = 2.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one, after which a process counts as stopped


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: float = 300.0
) -> None:
    """Makes this process one of several, before JAX has touched a device.

    Args:
      coordinator: `host:port` of process 0; processes: how many there are; process: which this is. All None asks the
        environment: Cloud TPU, SLURM, Open MPI, as `jax.distributed.initialize` knows them.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the environment does not tell, or what was given is not understood.

    The process ends with status 1 and a line on stderr where others do not join in time.

    >>> join("127.0.0.1:8476", processes=2, process=0)  # doctest: +SKIP
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise UserError("--coordinator, --processes and --process belong together; without any the environment tells")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process {process} must be from 0 to {processes - 1}, as there are --processes {processes}")
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
        raise UserError(f"--distributed: {who} could not join{where}: {reason}") from error
    finally:
        watch.cancel()


def mesh_of(text: str | None) -> Mesh:
    """The mesh that `data=2,fsdp=4` asks for, over all devices of all processes; None is one axis, `fsdp`.

    >>> mesh_of(None).axis_names
    ('fsdp',)
    """
    from jpeft.sharding import DATA_AXES, SEQUENCE_AXIS

    known = (*DATA_AXES, "tensor", SEQUENCE_AXIS)
    count = jax.device_count()
    axes: dict[str, int] = {}
    for part in (text or f"fsdp={count}").split(","):
        name, sign, size = (x.strip() for x in part.partition("="))
        if not sign or name not in known or name in axes or not (size.isdecimal() and int(size) > 0):
            raise UserError(f"--mesh {text}: expected axes such as data=2,fsdp=4, each once, of {', '.join(known)}")
        axes[name] = int(size)
    if math.prod(axes.values()) != count:
        product = " × ".join(map(str, axes.values()))
        raise UserError(f"--mesh {text}: {product} is {math.prod(axes.values())}, but there are {count} devices")
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def leave(status: int) -> None:
    """Ends this process with a status, if it is one of several: an orderly end would wait for those that go on.

    >>> leave(0)
    """
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if leads():  # most fail together: the one that the others depend on goes last
        time.sleep(_FAREWELL)
    os._exit(status)


# --------------------------------------------------------------------------------------------------- signs of life


class Pulse:
    """This process's signs of life, in a folder that all see, and its look at those of the others."""

    def __init__(self, folder: Path):
        self.folder, self.step, self._stop = folder, 0, threading.Event()
        # By process: when its last sign came, and what it said.
        self._seen: dict[int, tuple[float, dict[str, Any]]] = {}

    def beat(self) -> None:
        """Leaves one."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), "step": self.step, "time": time.time()}
        write_atomically(self.folder / f"{jax.process_index()}.json", json.dumps(about).encode())

    def silent(self, limit: float) -> dict[int, str]:
        """Processes that have left none for so many seconds by this process's clock, in words."""
        found, now = {}, time.monotonic()
        for i in range(jax.process_count()):
            with contextlib.suppress(OSError, ValueError):  # it has not begun, or the disk does not answer just now
                about = json.loads((self.folder / f"{i}.json").read_text())
                if i not in self._seen or self._seen[i][1] != about:
                    self._seen[i] = (now, about)
            if i in self._seen and (age := now - self._seen[i][0]) > limit:
                about = self._seen[i][1]
                found[i] = (f"process {i} (host {about['host']}, pid {about['pid']}) has stopped: no sign of it for "
                            f"{age:.0f} s, after step {about['step']}")  # fmt: skip
        return found

    def run(self, silence: float) -> None:
        """Until `close`: beats, and leaves where another is silent for too long."""
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that is full for a moment
                self.beat()
            if silent := self.silent(silence):
                _leave(silent)

    def close(self) -> None:
        """No more."""
        self._stop.set()


@contextlib.contextmanager
def watched(folder: Path, silence: float = SILENCE) -> Iterator[Pulse]:
    """Signs of life in `folder` while this lasts. A process that stops takes the others with it, and is named: one
    that waits in a collective for a host that is gone would wait for ever.

    >>> with watched(Path("run/processes")) as pulse: pulse.step = 1  # doctest: +SKIP
    """
    pulse = Pulse(folder)
    if jax.process_count() == 1:
        yield pulse
        return
    folder.mkdir(parents=True, exist_ok=True)
    pulse.beat()
    multihost_utils.sync_global_devices("jpeft: signs of life")  # what an earlier run left there is overwritten
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
    if leads() or 0 in silent:
        print(f"jpeft: error: {'; '.join(silent.values())}; the same command with --resume goes on from the last "
              "checkpoint", file=sys.stderr, flush=True)  # fmt: skip
    os._exit(1)
