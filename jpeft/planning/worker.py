"""A process that compiles one program and says what became of it: `python -m jpeft.planning.worker FOLDER`.

It alone loads libtpu, which would otherwise take part in the process that plans. The folder holds `job.json` and
`program.bin` (`jax.export`); `result.json` and, where it compiled, `program.hlo` are written beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.errors import UserError
from jpeft.hardware import topologies
from jpeft.hardware.topologies import Topology
from jpeft.parallel.mesh import make_mesh


def compile_program(folder: Path) -> dict[str, Any]:
    """Compile what a folder holds, and write the program's text there. Returns what the compiler says of it."""
    job = json.loads((folder / "job.json").read_text())
    import jax
    from jax import export

    topology = topologies.parse(job["topology"])
    exported = export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    began = time.perf_counter()
    found: dict[str, Any] = {"jax": jax.__version__}
    try:
        compiled = _compiled(exported, job, topology)
        compiled = _tighter(compiled, exported, job, topology)
    except _Refused as refusal:
        found["refused"] = str(refusal)
        compiled, found["seen_on"] = _with_more_room(exported, job, topology)
    found["seconds"] = time.perf_counter() - began
    if compiled is not None:
        found["memory"] = _memory(compiled)
        (folder / "program.hlo").write_text(compiled.as_text() or "")
    return found


_TRIES = 2  # to pack a program that does not fit more tightly


class _Refused(Exception):
    """The compiler finds that a device's memory does not suffice, and says so."""


def _compiled(exported: Any, job: Mapping[str, Any], topology: Topology, limit: int | None = None) -> Any:
    """The program, for a topology. Compilers pack what lives within a step as tightly as a limit asks them to."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = make_mesh(job["mesh"], topologies.describe(topology))
    specs = [PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in spec)) for spec in job["specs"]]
    arguments = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, spec))
        for aval, spec in zip(exported.in_avals, specs, strict=True)
    ]
    program = jax.jit(
        exported.call,
        out_shardings=list(exported.out_shardings_jax(mesh)),
        donate_argnums=tuple(job["donated"]),
        keep_unused=True,  # what is not used lies there all the same
    )
    options: Any = None if limit is None else {"xla_tpu_max_hbm_size_mib": str(limit >> 20)}
    try:
        return program.lower(*arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _Refused(str(error)) from error


def _memory(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_output", "host_temp")
    return {name: getattr(found, f"{name}_size_in_bytes") for name in names}


def _tighter(compiled: Any, exported: Any, job: Mapping[str, Any], topology: Topology) -> Any:
    """The same, or one whose temporaries fit beside its arguments, where these did not.

    XLA compares what lives at once with its limit, and reserves more than that where there are loops.
    """
    usable = topology.chip and topology.chip.hbm_usable
    if usable is None or topology.kind != "tpu":
        return compiled
    limit = usable
    for _ in range(_TRIES):
        over = _total(compiled) - usable
        if over <= 0:
            break
        limit -= over
        if limit < _memory(compiled)["argument"]:
            break
        try:
            compiled = min(compiled, _compiled(exported, job, topology, limit), key=_total)
        except _Refused:
            break
    return compiled


def _total(compiled: Any) -> int:
    memory = _memory(compiled)
    return sum(memory[name] for name in ("argument", "output", "temp", "generated_code")) - memory["alias"]


def _with_more_room(exported: Any, job: Mapping[str, Any], topology: Topology) -> tuple[Any, str]:
    """The same step for as many devices that have more memory, to see what takes it; None where none has enough."""
    for other in topologies.larger(topology):
        try:
            return _compiled(exported, job, other), other.name
        except _Refused:
            continue
    return None, ""


def _peak_host_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _end_with_parent(folder: Path) -> None:
    """Nobody waits for what is compiled once the process that asked is gone, however it went."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(folder: Path) -> None:
    """Compile, and write `result.json`, errors included."""
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        result = compile_program(folder)
    except Exception as error:  # whatever stops it is told by the process that asked
        told = isinstance(error, UserError)
        result = {"error": str(error) if told else f"{type(error).__name__}: {error}"}
    (folder / "result.json").write_text(json.dumps({**result, "host_bytes": _peak_host_bytes()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
