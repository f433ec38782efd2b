"""A process that compiles one program and says what became of it: `python -m jpeft.planning.worker FOLDER`.

It alone loads libtpu, which would otherwise take part in the process that plans. The folder holds `job.json` and
`program.bin` (`jax.export`); `result.json` and, where it compiled, `program.hlo` are written beside them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def compile_program(folder: Path) -> dict[str, Any]:
    """Compile what a folder holds, and write the program's text there. Returns what the compiler says of it."""
    job = json.loads((folder / "job.json").read_text())
    import jax
    from jax import export

    from jpeft.planning import topologies

    topology = topologies.parse(job["topology"])
    exported = export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    devices = topologies.describe(topology)
    kinds = (jax.sharding.AxisType.Auto,) * len(job["mesh"])
    mesh = jax.make_mesh(tuple(job["mesh"].values()), tuple(job["mesh"]), devices=devices, axis_types=kinds)
    arguments = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval, sharding in zip(exported.in_avals, exported.in_shardings_jax(mesh), strict=True)
    ]
    program = jax.jit(
        exported.call,
        out_shardings=list(exported.out_shardings_jax(mesh)),
        donate_argnums=tuple(range(job["donated"])),
        keep_unused=True,  # what is not used lies there all the same
    )
    lowered = program.lower(*arguments)
    began = time.perf_counter()
    found: dict[str, Any] = {"device_kind": devices[0].device_kind, "jax": jax.__version__}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "seconds": time.perf_counter() - began, "refused": str(error)}
    found["seconds"] = time.perf_counter() - began
    memory = compiled.memory_analysis()
    assert memory is not None
    names = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_output", "host_temp")
    found["memory"] = {name: getattr(memory, f"{name}_size_in_bytes") for name in names}
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost or {}
    found["cost"] = {name: cost[name] for name in ("flops", "bytes accessed") if name in cost}
    (folder / "program.hlo").write_text(compiled.as_text() or "")
    return found


def _peak_host_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(folder: Path) -> None:
    """Compile, and write `result.json`, errors included."""
    try:
        result = compile_program(folder)
    except Exception as error:  # whatever stops it is told by the process that asked
        result = {"error": f"{type(error).__name__}: {error}"}
    result["host_bytes"] = _peak_host_bytes()
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
