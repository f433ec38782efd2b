"""From a step to a compiled program, in a process of its own.

A step is traced here, on a mesh without devices, and serialized by `jax.export`; `jpeft.planning.worker` compiles it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jpeft.core.backend import compiling_for
from jpeft.core.frontend import bypassed
from jpeft.core.peft import adapter_shardings
from jpeft.core.placement import place
from jpeft.core.tree import flatten, like, named_sharding, unflatten
from jpeft.errors import UserError
from jpeft.hardware.topologies import QUIET, Topology
from jpeft.parallel.batches import batch_shardings, constrained, layout_of
from jpeft.parallel.rules import param_shardings
from jpeft.training.step import Step, TrainState, as_laid_out, cast_floating

#: Names a Python that has jpeft and libtpu, where the one that plans shall not have libtpu.
PYTHON = "JPEFT_PLAN_PYTHON"
_NEEDED = 2 << 30  # bytes of memory, without which no compilation is begun: one of 8B takes 1.7 GiB
_POLL = 0.1


class PlanError(UserError):
    """What stands against a plan: in one line."""


# ---------------------------------------------------------------------------------------------------- abstract inputs


def abstract(tree: Any, mesh: AbstractMesh) -> Any:
    """A tree without its values; shardings are kept, for another mesh whose axes have these names."""

    def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(x)
        if sharding is None:
            return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype if hasattr(x, "dtype") else jnp.result_type(x))
        named = {n for entry in sharding.spec for n in ((entry,) if isinstance(entry, str) else entry or ())}
        if lacking := named - set(mesh.axis_names):
            raise PlanError(
                f"{jax.tree_util.keystr(path)} of shape {x.shape} is sharded over {sorted(lacking)[0]!r}, which the "
                f"mesh {dict(mesh.shape)} lacks"
            )
        there = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    return jax.tree_util.tree_map_with_path(one, tree)


def laid_out(
    step: Any, state: Any, params: Any, batch: Any, mesh: AbstractMesh, rules: Any = None, names: Any = None
) -> tuple[Any, Any, Any]:
    """A step's inputs, abstract and in their places. What has one already stays there; the rest goes as
    `jpeft.shard`, `jpeft.shard_batch` and `Peft.init` would put it."""
    state, params, batch = (abstract(tree, mesh) for tree in (state, params, batch))
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.tree.leaves(params) and all(named_sharding(x) is None for x in jax.tree.leaves(params)):
        params = _placed(params, param_shardings(params, mesh, rules, names=names))
    if jax.tree.leaves(batch) and all(named_sharding(x) is None for x in jax.tree.leaves(batch)):
        batch = _placed(batch, batch_shardings(batch, mesh))
    ours = isinstance(step, Step) and isinstance(state, TrainState)
    if ours and all(named_sharding(x) is None for x in jax.tree.leaves(state.adapter)):
        own = flatten(adapter_shardings(step.peft, params))  # leaves of the adapter may be in boxes
        leaves = {
            p: jax.tree.map(lambda x, to=own[p]: place(x, to), leaf) for p, leaf in flatten(state.adapter).items()
        }
        adapter = like(unflatten(leaves), state.adapter)
        state = as_laid_out(dataclasses.replace(state, adapter=adapter), adapter, step.tx, step.peft, everywhere)
    return tuple(
        jax.tree.map(lambda x: x if named_sharding(x) is not None else place(x, everywhere), tree)
        for tree in (state, params, batch)
    )  # type: ignore[return-value]


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(place, tree, shardings)


# ------------------------------------------------------------------------------------------------------------- tracing


@dataclass(frozen=True)
class Program:
    """What is to be compiled: serialized, and how many of its arguments are of what."""

    data: bytes
    groups: Mapping[str, int]  # arguments in order: so many of the adapter, the optimizer, …
    specs: tuple[PartitionSpec, ...] = ()  # of the arguments: an exported program forgets those of what it never reads
    donated: tuple[int, ...] = ()  # of the arguments
    times: int = 1  # that a step runs it


def trace_step(step: Any, state: Any, params: Any, batch: Any, platform: str) -> Program:
    """A step, `(state, params, batch) -> (state, metrics)`, on inputs as `laid_out` gives them."""
    trees = (state, params, batch)
    leaves, structure = jax.tree.flatten(trees)
    with compiling_for(platform):
        run = step.program(state, batch) if isinstance(step, Step) else step
        run = run if hasattr(run, "trace") else jax.jit(run)
        traced = run.trace(*trees)
        shapes = traced.out_info
        state_like = isinstance(shapes, tuple) and len(shapes) == 2
        state_like = state_like and jax.tree.structure(shapes[0]) == jax.tree.structure(state)

        def flat(*flat_leaves: Any) -> list[Any]:
            return jax.tree.leaves(run(*jax.tree.unflatten(structure, flat_leaves)))

        out = [None] * len(jax.tree.leaves(shapes))
        if state_like:
            own = [leaf.sharding for leaf in jax.tree.leaves(state)]
            out = [*own, *[None] * (len(out) - len(own))]
        data = _exported(flat, leaves, out, platform)
    donated = tuple(i for i, leaf in enumerate(jax.tree.leaves(traced.args_info)) if leaf.donated)
    return Program(data, _groups(state, params, batch), _specs(leaves), donated)


def trace_base(step: Step, state: Any, params: Any, batch: Any, platform: str) -> Program | None:
    """The same loss and backward pass without an adapter and an optimizer: what the step costs is seen against it.

    It is differentiated by something of the size of the embeddings' output that is added there and is zero, so that the
    backward pass goes as far back as an adapter's in the lowest layer. It is of one micro-batch, where the step
    accumulates. None where the model embeds nothing, or a micro-batch does not divide over the mesh.
    """
    parts = step.parts
    if any(
        x.shape[0] % parts or x.sharding.shard_shape(x.shape)[0] % parts for x in jax.tree.leaves(batch) if parts > 1
    ):
        return None
    trees = (params, jax.tree.map(lambda x: _first_part(x, parts), batch))
    with compiling_for(platform):
        found: list[Any] = []
        run = _run_base(step, state, found)
        layout = layout_of(trees[1])
        jax.eval_shape(lambda *trees: run(None, *trees), *trees)
        if not found:
            return None
        shape, dtype = found[0]
        like = jax.tree.leaves(trees[1])[0]
        spec = named_sharding(like).spec if shape[:1] == like.shape[:1] else PartitionSpec()  # type: ignore[union-attr]
        shift = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(like.sharding.mesh, spec))
        leaves, structure = jax.tree.flatten((shift, *trees))

        def flat(*flat_leaves: Any) -> list[Any]:
            with constrained(layout):
                value, gradient = jax.value_and_grad(run)(*jax.tree.unflatten(structure, flat_leaves))
            return [value, gradient]

        data = _exported(flat, leaves, [None, shift.sharding], platform)
    return Program(data, {"shift": 1, **_groups(None, *trees)}, _specs(leaves), times=parts)


def _specs(leaves: Sequence[Any]) -> tuple[PartitionSpec, ...]:
    return tuple(leaf.sharding.spec for leaf in leaves)


def _first_part(x: Any, parts: int) -> Any:
    return x if parts == 1 else jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _run_base(step: Step, state: Any, found: list[Any]) -> Any:
    def run(shift: Any, params: Any, batch: Any) -> Any:
        done: list[bool] = []

        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = call(*args, **kwargs)
            if not isinstance(context.module, nn.Embed) or context.method_name != "__call__" or done:
                return y
            done.append(True)
            found.append((y.shape, y.dtype))
            return y if shift is None else y + shift

        adapter = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.adapter)  # which nothing reads
        with bypassed(), nn.intercept_methods(add):
            params = cast_floating(params, step.compute_dtype)
            return step.loss_fn(adapter, params, batch, jax.random.key(0))[0].astype(jnp.float32)

    return run


def _exported(flat: Any, leaves: Sequence[Any], out: Sequence[Any], platform: str) -> bytes:
    from jax import export

    platforms = [{"gpu": "cuda"}.get(platform, platform)]
    # Whatever a program calls is compiled here: nothing has to run elsewhere, where custom calls are promised to stay.
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("Sharding", "annotate_device_placement")]
    try:
        found = export.export(jax.jit(flat, out_shardings=list(out)), platforms=platforms, disabled_checks=checks)(
            *leaves
        )
        return bytes(found.serialize())
    except NotImplementedError as error:
        raise PlanError(
            f"the step calls back to Python, as jax.debug.print and io_callback do, which no other process can: {error}"
        ) from error
    except ImportError as error:
        raise PlanError(f'a plan needs flatbuffers: pip install "jpeft[plan]" ({error})') from error


def _groups(state: Any, params: Any, batch: Any) -> dict[str, int]:
    count = lambda tree: len(jax.tree.leaves(tree))  # noqa: E731
    groups = {"base": count(params), "batch": count(batch)}
    if isinstance(state, TrainState):  # in the order of its fields
        own = {"step": 1, "adapter": count(state.adapter), "optimizer": count(state.opt_state)}
        return {**own, "rest": count(state) - sum(own.values()), **groups}
    return {"state": count(state), **groups} if state is not None else groups


# ----------------------------------------------------------------------------------------------------------- compiling


@dataclass
class Compilation:
    """A compilation that goes on in a process of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    topology: Topology
    began: float = field(default_factory=time.monotonic)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.process.poll() is not None

    def wait(self) -> None:
        """Until it has ended."""
        while not self.done():
            time.sleep(_POLL)

    def result(self) -> dict[str, Any]:
        """What the worker found, and `text`, the program's.

        Raises:
            PlanError: it could not be compiled, for another reason than the chip's memory.
        """
        self.wait()
        try:
            found = json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, ValueError):  # ended before it was written, or while
            raise PlanError(_ended(self.process.returncode, self.folder / "stderr", self.topology)) from None
        if "error" in found:
            error, name = _one_line(found["error"]), self.topology.name
            raise PlanError(error if error.startswith(name) else f"{name}: {error}")
        text = self.folder / "program.hlo"
        return {**found, "text": text.read_text() if text.exists() else ""}


@contextlib.contextmanager
def compiling(program: Program, topology: Topology, mesh: AbstractMesh, python: str | None) -> Iterator[Compilation]:
    """Compiles in another process; ends it at the end."""
    _check_memory()
    folder = Path(tempfile.mkdtemp(prefix="jpeft-plan-"))
    try:
        (folder / "program.bin").write_bytes(program.data)
        specs = [[list(e) if isinstance(e, tuple) else e for e in spec] for spec in program.specs]
        job: dict[str, Any] = {"specs": specs}
        job |= {"topology": topology.name, "mesh": dict(mesh.shape), "donated": list(program.donated)}
        (folder / "job.json").write_text(json.dumps(job))
        compiler = python or _python(topology)
        with open(folder / "stderr", "wb") as stderr:
            try:
                process = subprocess.Popen(
                    [compiler, "-m", "jpeft.planning.worker", str(folder)],
                    env=_environment(topology), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                )  # fmt: skip
            except OSError as error:
                raise PlanError(f"{compiler}: is no Python to compile with ({error.strerror}); see {PYTHON}") from error
        try:
            yield Compilation(process, folder, topology)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _python(topology: Topology) -> str:
    """The Python that compiles for a topology."""
    if topology.kind != "tpu":
        return sys.executable
    if python := os.environ.get(PYTHON):
        return python
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f'{topology.name} needs libtpu: pip install "jpeft[plan]", or set {PYTHON} to a Python of another '
            "environment that has it"
        )
    return sys.executable


def _environment(topology: Topology) -> dict[str, str]:
    theirs = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    own = {name: value for name, value in os.environ.items() if name not in theirs}
    # This very jpeft, wherever it was imported from.
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), own.get("PYTHONPATH"))))
    if topology.kind == "gpu":
        return {**own, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    own["JAX_PLATFORMS"] = "cpu"
    if topology.kind == "cpu":
        # LLVM's optimizer changes neither FLOPs nor bytes.
        own["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={topology.devices} --xla_backend_optimization_level=0"
        )
    return {**own, **QUIET} if topology.kind == "tpu" else own


def available_memory() -> int | None:
    """Bytes of memory that are free on this machine; None where the system does not tell.

    >>> available_memory() is None or available_memory() > 0
    True
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _check_memory() -> None:
    free = available_memory()
    if free is not None and free < _NEEDED:
        raise PlanError(f"not enough memory to compile: {free / 2**30:.1f} GiB are free, {_NEEDED >> 30} are needed")


def _ended(status: int, stderr: Path, topology: Topology) -> str:
    if -status == signal.SIGKILL:
        return f"{topology.name}: the compiler was killed, most likely for want of memory on this machine"
    said = [line for line in stderr.read_text(errors="replace").splitlines() if line.strip()]
    internal = [line for line in said if "Check failed" in line or "FATAL" in line or line.startswith("F0")]
    if not said:
        return f"{topology.name}: the compiler ended with status {status} and said nothing: is it a Python ({PYTHON})?"
    return f"{topology.name}: the compiler ended with status {status}: {_one_line((internal or said)[-1])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
