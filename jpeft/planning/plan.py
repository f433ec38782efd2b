"""A plan: memory, compute and traffic of each device in a training step, from the program compiled for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jpeft.core.tree import Tree, named_sharding
from jpeft.hardware import utilization
from jpeft.hardware.topologies import Topology, describe, parse
from jpeft.parallel.mesh import abstract_mesh, make_mesh
from jpeft.planning.compiling import Compilation, compiling
from jpeft.planning.hlo.collectives import Collective
from jpeft.planning.hlo.program import Program, read
from jpeft.planning.hlo.refusals import read_refusal
from jpeft.planning.result import Memory, Plan, Traffic
from jpeft.planning.tracing import ExportedProgram, Inputs, shard_inputs, trace_base, trace_step
from jpeft.training.step import Step

_LARGEST = 8  # buffers to list if a step does not fit


def plan(
    step: Any,
    state: Tree,
    params: Tree,
    batch: Any,
    topology: str,
    mesh: Any = None,
    *,
    rules: Any = None,
    names: Tree | None = None,
    against_base: bool = True,
    python: str | None = None,
) -> Plan:
    """Compiles a training step for chips that need not be attached, and reports its memory, compute and traffic.

    Nothing is executed or allocated: only shapes, dtypes and shardings of the inputs are read, so they may be arrays or
    `jax.ShapeDtypeStruct`s. The compiler runs in a process of its own.

    Args:
        step: `(state, params, batch) -> (state, metrics)`, from `jpeft.train_step` or any jitted function.
        state: its first input. Without shardings, a `TrainState` is sharded as `Peft.init` does, another is replicated.
        params: its second input. Without shardings, sharded as `jpeft.shard` does.
        batch: its third input. Without shardings, sharded as `jpeft.shard_batch` does.
        topology: `v5e:4x4`, `v5p:2x2x4`, `v6e-16`, …, which need libtpu (`pip install "jpeft[plan]"`, or a Python that
            has it in `JPEFT_PLAN_PYTHON`); `cpu:8`; `gpu:1`, for the GPUs of this machine.
        mesh: `"fsdp=16"`, a mapping, or a mesh of as many devices; None is one axis, `fsdp`.
        rules: as for `jpeft.shard`.
        names: as for `jpeft.shard`.
        against_base: also compile the step with and without the adapter for as many CPU devices, to find the adapter's
            share of the traffic. Needs a step from `jpeft.train_step` and a model with an embedding.
        python: the Python that compiles, instead of this one.

    Raises:
        UserError: an unknown topology, a mesh of another number of devices, no libtpu or one that does not belong to
            this jax, too little memory on this machine, or a step that calls back to Python.
        ValueError: an axis of a weight or of the batch does not divide over the mesh.

    >>> jpeft.plan(step, state, params, batch, "v5e:4x4", mesh="fsdp=16").fits  # doctest: +SKIP
    True
    """
    target = parse(topology)
    placed = abstract_mesh(mesh, target.devices, target.name)
    prepared = prepare(
        step, (state, params, batch), target, placed, rules=rules, names=names, against_base=against_base
    )
    with prepared.compiling(python) as compilations:
        return prepared.conclude(*compilations)


@dataclass(frozen=True)
class Prepared:
    """A traced step, ready to compile.

    Attributes:
        topology: the devices to plan for.
        mesh: of those devices.
        inputs: the step's inputs as abstract arrays.
        program: the step.
        comparison: programs for CPU devices that show the adapter's share of the traffic: the step, unless `program` is
            for CPUs itself, and the step without an adapter.
        model_flops: see `Plan`.
    """

    topology: Topology
    mesh: AbstractMesh
    inputs: Inputs
    program: ExportedProgram
    comparison: tuple[ExportedProgram, ...]
    model_flops: float | None

    @contextlib.contextmanager
    def compiling(self, python: str | None = None) -> Iterator[list[Compilation]]:
        """Starts the processes that compile its programs, and ends them on exit."""
        cpus = parse(f"cpu:{self.topology.devices}")
        with contextlib.ExitStack() as stack:
            main = stack.enter_context(compiling(self.program, self.topology, self.mesh, python))
            yield [main, *(stack.enter_context(compiling(p, cpus, self.mesh, None)) for p in self.comparison)]

    def conclude(self, main: Compilation, *comparison: Compilation) -> Plan:
        """Waits for the compilations and makes the plan."""
        result, topology = main.result(), self.topology
        common: dict[str, Any] = {
            "topology": topology.name,
            "chip": topology.chip,
            "devices": topology.devices,
            "mesh": dict(self.mesh.shape),
            "model_flops": self.model_flops,
            "tokens": math.prod(batch_shape(self.inputs[2])),
            "compile_seconds": round(result["seconds"], 1),
            "host_bytes": result["host_bytes"],
        }
        if "refused" in result:
            return _refused_plan(self, result, common)
        program = read(result["text"])
        capacity = None if topology.chip is None else topology.chip.hbm_usable
        memory = _memory(self.program, program, result["memory"])
        return Plan(
            **common,
            capacity=capacity,
            memory=memory,
            refused=False,
            largest=program.live(_LARGEST) if capacity is not None and memory.total > capacity else (),
            flops=program.flops,
            hbm_bytes=program.hbm_bytes,
            collectives=_traffic(program.collectives, self.mesh),
            adapter_share=self._adapter_share(program, [read(each.result()["text"]) for each in comparison]),
        )

    def _adapter_share(self, program: Program, comparison: Sequence[Program]) -> float | None:
        """The share of the traffic that the step without an adapter does not have; None if unknown."""
        if not comparison:
            return None
        *step, base = comparison
        total = _bytes_sent(step[0] if step else program)
        share = 1 - self.comparison[-1].times * _bytes_sent(base) / total if total else 0.0
        return share if share >= 0 else None  # negative: XLA sharded the two programs differently


def prepare(
    step: Any,
    inputs: Inputs,
    topology: Topology,
    mesh: AbstractMesh,
    *,
    rules: Any = None,
    names: Any = None,
    against_base: bool = True,
) -> Prepared:
    """The part of `plan` that runs in this process: shards the inputs and traces the programs."""
    # Attached GPUs: their attention kernels need devices to be lowered.
    placed = make_mesh(dict(mesh.shape), describe(topology)) if topology.kind == "gpu" else mesh
    inputs = shard_inputs(step, inputs, placed, rules, names)
    program = trace_step(step, inputs, topology.kind)
    comparison: tuple[ExportedProgram, ...] = ()
    if against_base and isinstance(step, Step) and topology.devices > 1:
        # On CPU devices, because for TPUs XLA may send the same weights in different ways in the two programs.
        base = trace_base(step, inputs, "cpu")
        same = () if topology.kind == "cpu" else (trace_step(step, inputs, "cpu"),)
        comparison = () if base is None else (*same, base)
    return Prepared(topology, mesh, inputs, program, comparison, _model_flops(step, inputs))


def _model_flops(step: Any, inputs: Inputs) -> float | None:
    """The FLOPs that the model needs for a batch of tokens; None for a step that is not from `jpeft.train_step`."""
    state, params, batch = inputs
    shape = batch_shape(batch)
    if not isinstance(step, Step) or len(shape) < 2:
        return None
    return utilization.peft_flops(step.peft, params, state.adapter, tokens=math.prod(shape), length=shape[1])


def batch_shape(batch: Any) -> tuple[int, ...]:
    """The shape of a batch's token ids, or only its number of rows if it has none.

    >>> batch_shape({"ids": np.zeros((8, 128), int)}), batch_shape({"x": np.zeros((32, 16))})
    ((8, 128), (32,))
    """
    leaves = [leaf for leaf in jax.tree.leaves(batch) if leaf.ndim]
    ids = [leaf for leaf in leaves if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)]
    return tuple(ids[0].shape) if ids else tuple(leaves[0].shape[:1]) if leaves else ()


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(exported: ExportedProgram, program: Program, analysis: Mapping[str, int]) -> Memory:
    """The memory of a compiled program, from XLA's analysis and the program's text."""
    return Memory(
        arguments=_by_group(exported, [size for _, size in program.parameters]),
        temporaries=analysis["temp"],
        outputs=analysis["output"] - analysis["alias"],
        program=analysis["generated_code"],
        host=analysis["host_argument"] + analysis["host_temp"],
        alive=min(analysis["temp"], program.peak_bytes),
    )


def _by_group(exported: ExportedProgram, sizes: Sequence[int]) -> dict[str, int]:
    """Bytes of the arguments by kind; the state's counters and keys count as the optimizer's."""
    groups, start = {}, 0
    for name, count in exported.groups.items():
        groups[name], start = sum(sizes[start : start + count]), start + count
    out = {name: groups[name] for name in ("base", "adapter", "optimizer", "state", "batch") if name in groups}
    if "optimizer" in out:
        out["optimizer"] += groups.get("step", 0) + groups.get("rest", 0)
    return out


def _refused_plan(prepared: Prepared, result: Mapping[str, Any], common: Mapping[str, Any]) -> Plan:
    """The plan of a step that the compiler rejected for its size. Arguments are counted without padding."""
    chip = prepared.topology.chip
    arguments = _by_group(prepared.program, [_shard_bytes(leaf) for leaf in jax.tree.leaves(prepared.inputs)])
    refusal = read_refusal(result["refused"])
    largest, seen_on = refusal.buffers[:_LARGEST], ""
    if not largest and result["text"]:
        largest, seen_on = read(result["text"]).live(_LARGEST), result["seen_on"]
    return Plan(
        **common,
        capacity=refusal.available or (None if chip is None else chip.hbm_usable),
        # The message counts arguments as temporaries: with 4 GiB more of arguments it reports 4 GiB more.
        memory=Memory(arguments, max(0, refusal.used - sum(arguments.values())), 0, 0),
        refused=True,
        largest=largest,
        seen_on=seen_on,
        flops=0.0,
        hbm_bytes=0.0,
        collectives=(),
        adapter_share=None,
    )


def _shard_bytes(leaf: Any) -> int:
    """The bytes of one device's shard."""
    sharding, is_key = named_sharding(leaf), jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * (8 if is_key else np.dtype(leaf.dtype).itemsize)


# ------------------------------------------------------------------------------------------------------------- traffic


def _bytes_sent(program: Program) -> float:
    return float(sum(each.times * each.bytes for each in program.collectives))


def _traffic(collectives: Sequence[Collective], mesh: AbstractMesh) -> list[Traffic]:
    """Collectives summed by kind and by the mesh axes that they cross, the largest first."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for each in collectives:
        key = (each.kind, crossed_axes(each.groups, mesh))
        count, size = found.get(key, (0, 0.0))
        found[key] = (count + each.times, size + each.times * each.bytes)
    rows = [Traffic(kind, axes, count, size) for (kind, axes), (count, size) in found.items()]
    return sorted(rows, key=lambda t: -t.bytes)


def crossed_axes(groups: Sequence[Sequence[int]], mesh: AbstractMesh) -> str:
    """The mesh axes along which the devices of a group differ.

    >>> crossed_axes([[0, 1], [2, 3]], AbstractMesh((2, 2), ("data", "fsdp")))
    'fsdp'
    """
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.axis_sizes), axis=-1)
    crossed = np.zeros(len(mesh.axis_names), bool)
    for group in groups or [range(mesh.size)]:
        own = coordinates[list(group)]
        crossed |= (own != own[:1]).any(axis=0)
    return "+".join(name for name, is_crossed in zip(mesh.axis_names, crossed, strict=True) if is_crossed) or "none"
