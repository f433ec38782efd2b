"""A plan: what each chip will hold, compute and send in a training step, from the program compiled for it."""

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
from jpeft.hardware.topologies import Topology, parse
from jpeft.parallel.mesh import abstract_mesh
from jpeft.planning import hlo
from jpeft.planning.compiling import Compilation, Program, compiling, laid_out, trace_base, trace_step
from jpeft.planning.result import Memory, Plan, Traffic
from jpeft.training.step import Step

_LARGEST = 8  # buffers that are told where a step does not fit


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
    """Compiles a training step for chips that need not be there, and says what it will need of them.

    Nothing is computed and nothing is allocated: inputs are arrays of which only shapes, dtypes and shardings are read,
    or `jax.ShapeDtypeStruct`s. The compiler runs in a process of its own.

    Args:
        step: `(state, params, batch) -> (state, metrics)`: of `jpeft.train_step`, or any jitted function.
        state, params, batch: its inputs. What carries no sharding is laid out as `jpeft.shard`, `jpeft.shard_batch` and
            `Peft.init` would; another function's state is replicated.
        topology: `v5e:4x4`, `v5p:2x2x4`, `v6e-16`, …, which needs libtpu (`pip install "jpeft[plan]"`, or a Python that
            has it in `JPEFT_PLAN_PYTHON`); `cpu:8`; `gpu:1`, for GPUs of this machine.
        mesh: `"fsdp=16"`, a mapping, or a mesh of as many devices; None is one axis, `fsdp`.
        rules, names: as for `jpeft.shard`.
        against_base: also compile the step with and without the adapter for as many CPU devices, to tell what share of
            the traffic is the adapter's. Needs a step of `jpeft.train_step`, and a model that embeds.
        python: the Python that compiles, instead of this one.

    Raises:
        UserError: an unknown topology, a mesh that is not of its devices, no libtpu or another than jax's, too little
            memory on this machine, a step that calls back to Python.
        ValueError: an axis of a weight or of the batch that does not divide over the mesh.

    >>> jpeft.plan(step, state, params, batch, "v5e:4x4", mesh="fsdp=16").fits  # doctest: +SKIP
    True
    """
    found = parse(topology)
    prepared = prepare(step, state, params, batch, found, abstract_mesh(mesh, found.devices, found.name), rules=rules, names=names,
                       against_base=against_base)  # fmt: skip
    with prepared.compiling(python) as compilations:
        return prepared.conclude(*compilations)


@dataclass(frozen=True)
class Prepared:
    """A step that is traced, and what its plan needs beside the compiled program."""

    topology: Topology
    mesh: AbstractMesh
    trees: tuple[Any, Any, Any]  # state, params, batch
    program: Program
    # To tell the adapter's share of what is sent: the step, unless it is `program`, and the step without an adapter.
    beside: tuple[Program, ...]
    needed: float | None  # FLOPs

    @contextlib.contextmanager
    def compiling(self, python: str | None = None) -> Iterator[list[Compilation]]:
        """The processes that compile it; they are ended at the end."""
        cpus = parse(f"cpu:{self.topology.devices}")
        with contextlib.ExitStack() as stack:
            main = stack.enter_context(compiling(self.program, self.topology, self.mesh, python))
            yield [main, *(stack.enter_context(compiling(p, cpus, self.mesh, None)) for p in self.beside)]

    def conclude(self, main: Compilation, *beside: Compilation) -> Plan:
        """The plan, once they have ended."""
        return _conclude(self, main, beside)


def prepare(
    step: Any,
    state: Any,
    params: Any,
    batch: Any,
    topology: Topology,
    mesh: AbstractMesh,
    *,
    rules: Any = None,
    names: Any = None,
    against_base: bool = True,
) -> Prepared:
    """The first half of `plan`: all that is done in this process."""
    trees = laid_out(step, state, params, batch, mesh, rules, names)
    program = trace_step(step, *trees, topology.kind)
    beside: tuple[Program, ...] = ()
    if against_base and isinstance(step, Step) and topology.devices > 1:
        # Compared on CPU devices: for TPUs XLA sends the same weights in another way in the one and in the other.
        base = trace_base(step, *trees, "cpu")
        same = () if topology.kind == "cpu" else (trace_step(step, *trees, "cpu"),)
        beside = () if base is None else (*same, base)
    return Prepared(topology, mesh, trees, program, beside, model_flops(step, *trees))


def model_flops(step: Any, state: Any, params: Tree, batch: Any) -> float | None:
    """FLOPs that a step needs whose model is known, for all of a batch of tokens."""
    shape = batch_shape(batch)
    if not isinstance(step, Step) or len(shape) < 2:
        return None
    return utilization.peft_flops(step.peft, params, state.adapter, tokens=math.prod(shape), length=shape[1])


def batch_shape(batch: Any) -> tuple[int, ...]:
    """Rows and, if it has whole numbers in rows, tokens of a row."""
    leaves = [leaf for leaf in jax.tree.leaves(batch) if leaf.ndim]
    ids = [leaf for leaf in leaves if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)]
    return tuple(ids[0].shape) if ids else tuple(leaves[0].shape[:1]) if leaves else ()


def _conclude(prepared: Prepared, main: Compilation, beside: Sequence[Compilation]) -> Plan:
    result, topology, program, mesh = main.result(), prepared.topology, prepared.program, prepared.mesh
    chip, trees = topology.chip, prepared.trees
    about: dict[str, Any] = {
        "topology": topology.name, "chip": chip, "devices": topology.devices, "mesh": dict(mesh.shape),
        "capacity": None if chip is None else chip.hbm_usable, "model_flops": prepared.needed,
        "tokens": math.prod(batch_shape(trees[2])), "compile_seconds": round(result["seconds"], 1),
        "host_bytes": result["host_bytes"],
    }  # fmt: skip
    if "refused" in result:
        return _refused(result, program, trees, about)
    read = hlo.read(result["text"])
    sizes, found = [size for _, size in read.parameters], result["memory"]
    groups, at = {}, 0
    for name, count in program.groups.items():
        groups[name], at = groups.get(name, 0) + sum(sizes[at : at + count]), at + count
    memory = Memory(
        _in_words(groups), found["temp"], found["output"] - found["alias"], found["generated_code"],
        found["host_argument"] + found["host_temp"], min(found["temp"], read.peak_bytes),
    )  # fmt: skip
    traffic = _traffic(read.collectives, mesh)
    share = None
    if beside:
        *step, base = (hlo.read(each.result()["text"]) for each in beside)
        total = _sent(step[0] if step else read)
        found_share = 1 - prepared.beside[-1].times * _sent(base) / total if total else 0.0
        share = found_share if found_share >= 0 else None  # else they were not laid out alike
    over = about["capacity"] is not None and memory.total > about["capacity"]
    return Plan(
        **about, memory=memory, refused=False, largest=read.live(_LARGEST) if over else (), flops=read.flops,
        hbm_bytes=read.hbm_bytes, collectives=traffic, adapter_share=share,
    )  # fmt: skip


def _sent(program: hlo.Program) -> float:
    return float(sum(each.times * each.bytes for each in program.collectives))


def _in_words(groups: Mapping[str, int]) -> dict[str, int]:
    """Arguments by what they are; counters and keys are of the optimizer."""
    out = {name: groups[name] for name in ("base", "adapter", "optimizer", "state", "batch") if name in groups}
    if "optimizer" in out:
        out["optimizer"] += groups.get("step", 0) + groups.get("rest", 0)
    return out


def _refused(
    result: Mapping[str, Any], program: Program, trees: tuple[Any, Any, Any], about: Mapping[str, Any]
) -> Plan:
    """What the compiler says of a program that it does not make. Arguments are counted without padding."""
    leaves, at, groups = jax.tree.leaves(trees), 0, {}
    for name, count in program.groups.items():
        groups[name], at = sum(map(_piece_bytes, leaves[at : at + count])), at + count
    told = hlo.refused(result["refused"])
    # What it calls temporaries has the arguments in it: with 4 GiB more of these, it asks for 4 GiB more.
    memory = Memory(_in_words(groups), max(0, told.used - sum(groups.values())), 0, 0)
    largest, seen_on = told.buffers[:_LARGEST], ""
    if not largest and result["text"]:
        largest, seen_on = hlo.read(result["text"]).live(_LARGEST), result["seen_on"]
    return Plan(
        **{**about, "capacity": told.available or about["capacity"]}, memory=memory, refused=True,
        largest=largest, seen_on=seen_on, flops=0.0, hbm_bytes=0.0, collectives=(), adapter_share=None,
    )  # fmt: skip


def _piece_bytes(leaf: Any) -> int:
    sharding, is_key = named_sharding(leaf), jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * (8 if is_key else np.dtype(leaf.dtype).itemsize)


def _traffic(collectives: Sequence[hlo.Collective], mesh: AbstractMesh) -> list[Traffic]:
    """Collectives by kind and by the axes that they cross, the largest first."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for each in collectives:
        key = (each.kind, crossed(each.groups, mesh))
        count, size = found.get(key, (0, 0.0))
        found[key] = (count + each.times, size + each.times * each.bytes)
    rows = [Traffic(kind, axes, count, size) for (kind, axes), (count, size) in found.items()]
    return sorted(rows, key=lambda t: -t.bytes)


def crossed(groups: Sequence[Sequence[int]], mesh: AbstractMesh) -> str:
    """The axes of a mesh along which the devices of a group differ.

    >>> crossed([[0, 1], [2, 3]], AbstractMesh((2, 2), ("data", "fsdp")))
    'fsdp'
    """
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.axis_sizes), axis=-1)
    differ = np.zeros(len(mesh.axis_names), bool)
    for group in groups or [range(mesh.size)]:
        own = places[list(group)]
        differ |= (own != own[:1]).any(axis=0)
    return "+".join(name for name, differs in zip(mesh.axis_names, differ, strict=True) if differs) or "none"
