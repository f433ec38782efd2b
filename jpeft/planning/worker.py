"""The process that compiles one program: `python -m jpeft.planning.worker FOLDER`.

Only this process loads libtpu, so that libtpu does not become a backend of the process that plans. The folder holds
`job.json` and `program.bin` (from `jax.export`); the worker writes `result.json` and, if it compiled, `program.hlo`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jpeft.errors import UserError
from jpeft.hardware import topologies
from jpeft.hardware.topologies import Topology
from jpeft.parallel.mesh import make_mesh

_ATTEMPTS = 2  # to pack a program that does not fit more tightly


class _Refused(Exception):
    """The compiler rejected the program, because a device's memory does not suffice."""


def compile_program(folder: Path) -> dict[str, Any]:
    """Compiles the program of a folder, writes its text there, and returns the compiler's figures."""
    import jax

    job = _Job(folder)
    began = time.perf_counter()
    found: dict[str, Any] = {"jax": jax.__version__}
    try:
        compiled = _fit(job)
    except _Refused as refusal:
        found["refused"] = str(refusal)
        compiled, found["seen_on"] = _compile_for_larger(job)
    found["seconds"] = time.perf_counter() - began
    if compiled is not None:
        found["memory"] = _memory(compiled)
        (folder / "program.hlo").write_text(compiled.as_text() or "")
    return found


class _Job:
    """A serialized program, and the devices to compile it for."""

    def __init__(self, folder: Path):
        from jax import export

        job = json.loads((folder / "job.json").read_text())
        self.topology: Topology = topologies.parse(job["topology"])
        self._mesh, self._donated, self._specs = job["mesh"], tuple(job["donated"]), job["specs"]
        self._exported = export.deserialize(bytearray((folder / "program.bin").read_bytes()))

    def compile(self, topology: Topology | None = None, limit: int | None = None) -> Any:
        """The compiled program.

        Args:
          topology: None is the job's own.
          limit: the bytes of memory that the compiler may use; it packs as tightly as the limit requires.

        Raises:
          _Refused: the program does not fit.
        """
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = make_mesh(self._mesh, topologies.describe(topology or self.topology))
        specs = [PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in spec)) for spec in self._specs]
        arguments = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, spec))
            for aval, spec in zip(self._exported.in_avals, specs, strict=True)
        ]
        program = jax.jit(
            self._exported.call,
            out_shardings=list(self._exported.out_shardings_jax(mesh)),
            donate_argnums=self._donated,
            keep_unused=True,  # unused arguments take memory, too
        )
        options: Any = None if limit is None else {"xla_tpu_max_hbm_size_mib": str(limit >> 20)}
        try:
            return program.lower(*arguments).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _Refused(str(error)) from error


def _fit(job: _Job) -> Any:
    """Recompiles with a smaller memory limit if the program does not fit; returns the smallest found.

    XLA compares its limit with what is live at once, but reserves more than that where there are loops.
    """
    compiled, topology = job.compile(), job.topology
    usable = topology.chip and topology.chip.hbm_usable
    if usable is None or topology.kind != "tpu":
        return compiled
    limit = usable
    for _ in range(_ATTEMPTS):
        over = _total(compiled) - usable
        if over <= 0:
            break
        limit -= over
        if limit < _memory(compiled)["argument"]:
            break
        try:
            compiled = min(compiled, job.compile(limit=limit), key=_total)
        except _Refused:
            break
    return compiled


def _compile_for_larger(job: _Job) -> tuple[Any, str]:
    """The program for as many devices with more memory, to see which buffers are large; (None, "") if none suffice."""
    for other in topologies.larger(job.topology):
        try:
            return job.compile(other), other.name
        except _Refused:
            continue
    return None, ""


def _memory(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_output", "host_temp")
    return {name: getattr(found, f"{name}_size_in_bytes") for name in names}


def _total(compiled: Any) -> int:
    memory = _memory(compiled)
    return sum(memory[name] for name in ("argument", "output", "temp", "generated_code")) - memory["alias"]


def _peak_host_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _exit_with_parent(folder: Path) -> None:
    """Ends this process once the one that started it is gone, also if that was killed."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(folder: Path) -> None:
    """Compiles, and writes `result.json`, also for an error."""
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    try:
        result = compile_program(folder)
    except Exception as error:  # reported by the process that started this one
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        result = {"error": message}
    (folder / "result.json").write_text(json.dumps({**result, "host_bytes": _peak_host_bytes()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
