"""Compiling a traced step in a process of its own, `jpeft.planning.worker`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from jpeft.errors import PlanError
from jpeft.hardware.topologies import QUIET, Topology
from jpeft.planning.tracing import ExportedProgram

#: The environment variable that names a Python with jpeft and libtpu, for planning from a Python without libtpu.
PYTHON = "JPEFT_PLAN_PYTHON"
_MIN_FREE_MEMORY = 2 << 30  # bytes needed to start a compilation: one of an 8B model takes 1.7 GiB
_POLL_SECONDS = 0.1


@dataclass
class Compilation:
    """A compilation in a process of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    topology: Topology

    def done(self) -> bool:
        """True once the process has ended, with or without a result."""
        return self.process.poll() is not None

    def result(self) -> dict[str, Any]:
        """Waits for the worker, and returns its `result.json` with the program's text as `text`.

        Raises:
            PlanError: the compilation failed for another reason than the chip's memory.
        """
        while not self.done():
            time.sleep(_POLL_SECONDS)
        try:
            found = json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, ValueError):  # the process ended before or while it wrote the file
            raise PlanError(_failure(self.process.returncode, self.folder / "stderr", self.topology)) from None
        if "error" in found:
            error, name = _one_line(found["error"]), self.topology.name
            raise PlanError(error if error.startswith(name) else f"{name}: {error}")
        text = self.folder / "program.hlo"
        return {**found, "text": text.read_text() if text.exists() else ""}


@contextlib.contextmanager
def compiling(
    program: ExportedProgram, topology: Topology, mesh: AbstractMesh, python: str | None
) -> Iterator[Compilation]:
    """Starts compiling a program in another process, and ends that process on exit.

    Raises:
        PlanError: this machine has too little free memory, or the Python that compiles cannot be started.
    """
    _check_memory()
    folder = Path(tempfile.mkdtemp(prefix="jpeft-plan-"))
    try:
        _write_job(folder, program, topology, mesh)
        process = _start(folder, topology, python or _python(topology))
        try:
            yield Compilation(process, folder, topology)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_job(folder: Path, program: ExportedProgram, topology: Topology, mesh: AbstractMesh) -> None:
    (folder / "program.bin").write_bytes(program.data)
    job = {
        "specs": [[list(e) if isinstance(e, tuple) else e for e in spec] for spec in program.specs],
        "topology": topology.name,
        "mesh": dict(mesh.shape),
        "donated": list(program.donated),
    }
    (folder / "job.json").write_text(json.dumps(job))


def _start(folder: Path, topology: Topology, python: str) -> subprocess.Popen[bytes]:
    command = [python, "-m", "jpeft.planning.worker", str(folder)]
    null = subprocess.DEVNULL
    with open(folder / "stderr", "wb") as stderr:
        try:
            return subprocess.Popen(command, env=_environment(topology), stdin=null, stdout=null, stderr=stderr)
        except OSError as error:
            raise PlanError(f"{python}: cannot be run as Python to compile ({error.strerror}); see {PYTHON}") from error


def _python(topology: Topology) -> str:
    """The Python that compiles for a topology."""
    if topology.kind != "tpu":
        return sys.executable
    if python := os.environ.get(PYTHON):
        return python
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f'{topology.name} needs libtpu: pip install "jpeft[plan]", or set {PYTHON} to the Python of an '
            "environment that has it"
        )
    return sys.executable


def _environment(topology: Topology) -> dict[str, str]:
    dropped = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    out = {name: value for name, value in os.environ.items() if name not in dropped}
    # The worker imports the same jpeft as this process.
    out["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), out.get("PYTHONPATH"))))
    if topology.kind == "gpu":
        return {**out, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    out["JAX_PLATFORMS"] = "cpu"
    if topology.kind == "cpu":
        # LLVM's optimizer changes neither FLOPs nor bytes.
        out["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={topology.devices} --xla_backend_optimization_level=0"
        )
    return {**out, **QUIET} if topology.kind == "tpu" else out


def available_memory() -> int | None:
    """Bytes of free memory on this machine; None if the system does not report it.

    >>> available_memory() is None or available_memory() > 0
    True
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _check_memory() -> None:
    free, needed = available_memory(), _MIN_FREE_MEMORY
    if free is not None and free < needed:
        raise PlanError(f"not enough memory to compile: {free / 2**30:.1f} GiB are free, {needed >> 30} GiB are needed")


def _failure(status: int, stderr: Path, topology: Topology) -> str:
    """An error message for a worker that ended without a result."""
    if -status == signal.SIGKILL:
        return f"{topology.name}: the compiler was killed, most likely because this machine ran out of memory"
    lines = [line for line in stderr.read_text(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if "Check failed" in line or "FATAL" in line or line.startswith("F0")]
    if not lines:
        return f"{topology.name}: the compiler ended with status {status} and no message; is {PYTHON} a Python?"
    return f"{topology.name}: the compiler ended with status {status}: {_one_line((fatal or lines)[-1])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
