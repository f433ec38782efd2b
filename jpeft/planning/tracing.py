"""A training step traced on a mesh without devices and serialized by `jax.export`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core.backend import compiling_for
from jpeft.core.frontend import bypassed
from jpeft.core.peft import adapter_shardings
from jpeft.core.placement import AnyMesh, place
from jpeft.core.tree import abstract_array, flatten, like, named_sharding, unflatten
from jpeft.errors import PlanError
from jpeft.parallel.batches import batch_shardings, constrained, layout_of
from jpeft.parallel.rules import param_shardings
from jpeft.training.step import Step, TrainState, cast_floating, with_shardings

Inputs = tuple[Any, Any, Any]  # state, params, batch

# jax.export promises that custom calls stay stable across versions; here the same version compiles the program.
_ATTENTIONS = ("Softmax", "SoftmaxDropout", "ScaleBiasSoftmax", "ScaleBiasSoftmaxDropout")
_CUSTOM_CALLS = (
    "Sharding",
    "annotate_device_placement",
    *(f"__cudnn$fmha{name}{direction}" for name in _ATTENTIONS for direction in ("", "Backward")),
)

# ---------------------------------------------------------------------------------------------------- abstract inputs


def abstract(tree: Any, mesh: AnyMesh) -> Any:
    """The shapes and dtypes of a tree, with its shardings moved to a mesh that has axes of the same names.

    Raises:
        PlanError: a leaf is sharded over an axis that the mesh does not have.
    """

    def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(x)
        if sharding is None:
            return abstract_array(x)
        names = {n for entry in sharding.spec for n in ((entry,) if isinstance(entry, str) else entry or ())}
        if missing := sorted(names - set(mesh.axis_names)):
            raise PlanError(
                f"{jax.tree_util.keystr(path)} of shape {x.shape} is sharded over {missing[0]!r}, which the mesh "
                f"{dict(mesh.shape)} does not have"
            )
        moved = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=moved)

    return jax.tree_util.tree_map_with_path(one, tree)


def shard_inputs(step: Any, inputs: Inputs, mesh: AnyMesh, rules: Any = None, names: Any = None) -> Inputs:
    """A step's inputs as abstract arrays with shardings on a mesh.

    Leaves that have a sharding keep it. The rest is sharded as `jpeft.shard`, `jpeft.shard_batch` and `Peft.init` do.
    """
    state, params, batch = (abstract(tree, mesh) for tree in inputs)
    replicated = NamedSharding(mesh, PartitionSpec())
    if jax.tree.leaves(params) and _unsharded(params):
        params = jax.tree.map(place, params, param_shardings(params, mesh, rules, names=names))
    if jax.tree.leaves(batch) and _unsharded(batch):
        batch = jax.tree.map(place, batch, batch_shardings(batch, mesh))
    if isinstance(step, Step) and isinstance(state, TrainState) and _unsharded(state.adapter):
        state = _shard_state(step, state, params, replicated)
    return tuple(
        jax.tree.map(lambda x: x if named_sharding(x) is not None else place(x, replicated), tree)
        for tree in (state, params, batch)
    )  # type: ignore[return-value]


def _unsharded(tree: Any) -> bool:
    return all(named_sharding(x) is None for x in jax.tree.leaves(tree))


def _shard_state(step: Step, state: TrainState, params: Any, replicated: NamedSharding) -> TrainState:
    shardings = flatten(adapter_shardings(step.peft, params))
    leaves = {
        # A leaf may be a box of several arrays.
        path: jax.tree.map(lambda x, sharding=shardings[path]: place(x, sharding), leaf)
        for path, leaf in flatten(state.adapter).items()
    }
    adapter = like(unflatten(leaves), state.adapter)
    return with_shardings(dataclasses.replace(state, adapter=adapter), adapter, step.tx, step.peft, replicated)


# ------------------------------------------------------------------------------------------------------------- tracing


@dataclass(frozen=True)
class ExportedProgram:
    """A serialized program, and how many arguments belong to each group (adapter, optimizer, base, batch).

    Attributes:
        data: the output of `jax.export`.
        groups: the number of arguments in each group, in order.
        specs: partition specs of the arguments; `jax.export` drops those of arguments that the program never reads.
        donated: indices of the donated arguments.
        times: how often a step runs the program.
    """

    data: bytes
    groups: Mapping[str, int]
    specs: tuple[PartitionSpec, ...] = ()
    donated: tuple[int, ...] = ()
    times: int = 1


def trace_step(step: Any, inputs: Inputs, platform: str) -> ExportedProgram:
    """Traces a step, `(state, params, batch) -> (state, metrics)`.

    Args:
        inputs: from `shard_inputs`.
        platform: the platform that it will be compiled for.
    """
    state, _, batch = inputs
    leaves, structure = jax.tree.flatten(inputs)
    with compiling_for(platform):
        run = step.program(state, batch) if isinstance(step, Step) else step
        run = run if hasattr(run, "trace") else jax.jit(run)
        traced = run.trace(*inputs)

        def flat(*flat_leaves: Any) -> list[Any]:
            return jax.tree.leaves(run(*jax.tree.unflatten(structure, flat_leaves)))

        data = _export(flat, leaves, _out_shardings(traced.out_info, state), platform)
    donated = tuple(i for i, leaf in enumerate(jax.tree.leaves(traced.args_info)) if leaf.donated)
    return ExportedProgram(data, _groups(inputs), _specs(leaves), donated)


def _out_shardings(outputs: Any, state: Any) -> list[Any]:
    """The state's shardings for the new state, if the outputs are `(state, metrics)`; None where XLA chooses."""
    count = len(jax.tree.leaves(outputs))
    is_pair = isinstance(outputs, tuple) and len(outputs) == 2
    if not is_pair or jax.tree.structure(outputs[0]) != jax.tree.structure(state):
        return [None] * count
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state)]
    return shardings + [None] * (count - len(shardings))


def trace_base(step: Step, inputs: Inputs, platform: str) -> ExportedProgram | None:
    """Traces the loss and its backward pass without adapter and optimizer, to compare the step with.

    The gradient is with respect to a zero array that is added to the embeddings' output, so that the backward pass
    reaches as deep as with an adapter in the lowest layer. With gradient accumulation it is one micro-batch's.

    Returns:
        None if the model embeds nothing, or if a micro-batch does not divide over the mesh.
    """
    state, params, batch = inputs
    parts = step.accumulate
    if parts > 1 and any(
        x.shape[0] % parts or x.sharding.shard_shape(x.shape)[0] % parts for x in jax.tree.leaves(batch)
    ):
        return None
    batch = jax.tree.map(lambda x: _first_part(x, parts), batch)
    with compiling_for(platform):
        shape, dtype = _embedding_output(step, state, params, batch)
        if shape is None:
            return None
        ids = jax.tree.leaves(batch)[0]
        spec = ids.sharding.spec if shape[:1] == ids.shape[:1] else PartitionSpec()
        shift = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(ids.sharding.mesh, spec))
        leaves, structure = jax.tree.flatten((shift, params, batch))
        layout = layout_of(batch)

        def flat(*flat_leaves: Any) -> list[Any]:
            with constrained(layout):
                loss = jax.value_and_grad(lambda *args: _base_loss(step, state, [], *args))
                value, gradient = loss(*jax.tree.unflatten(structure, flat_leaves))
            return [value, gradient]

        data = _export(flat, leaves, [None, shift.sharding], platform)
    return ExportedProgram(data, {"shift": 1, **_groups((None, params, batch))}, _specs(leaves), times=parts)


def _first_part(x: Any, parts: int) -> Any:
    return x if parts == 1 else jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _embedding_output(step: Step, state: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    """The shape and dtype of the first embedding's output; (None, None) if the model embeds nothing."""
    found: list[Any] = []
    jax.eval_shape(lambda *trees: _base_loss(step, state, found, None, *trees), params, batch)
    return found[0] if found else (None, None)


def _base_loss(step: Step, state: Any, found: list[Any], shift: Any, params: Any, batch: Any) -> Any:
    """The loss without an adapter, with `shift` added to the embeddings' output."""
    adapter = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.adapter)  # never read
    with bypassed(), step.peft.frontend.shift_embedding(shift, found):
        params = cast_floating(params, step.compute_dtype)
        return step.loss_fn(adapter, params, batch, jax.random.key(0))[0].astype(jnp.float32)


def _specs(leaves: Sequence[Any]) -> tuple[PartitionSpec, ...]:
    return tuple(leaf.sharding.spec for leaf in leaves)


def _export(fn: Callable[..., Any], leaves: Sequence[Any], out: Sequence[Any], platform: str) -> bytes:
    from jax import export

    platforms = [{"gpu": "cuda"}.get(platform, platform)]
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    jitted = jax.jit(fn, out_shardings=list(out))
    try:
        return bytes(export.export(jitted, platforms=platforms, disabled_checks=checks)(*leaves).serialize())
    except NotImplementedError as error:
        raise PlanError(
            "the step calls back to Python (jax.debug.print, io_callback, or cuDNN's attention over several GPUs), "
            f"which cannot be serialized for the compiling process: {error}"
        ) from error
    except ImportError as error:
        raise PlanError(f'a plan needs flatbuffers: pip install "jpeft[plan]" ({error})') from error


def _groups(inputs: Inputs) -> dict[str, int]:
    state, params, batch = inputs
    groups = {"base": _count(params), "batch": _count(batch)}
    if isinstance(state, TrainState):  # in the order of its fields
        own = {"step": 1, "adapter": _count(state.adapter), "optimizer": _count(state.opt_state)}
        return {**own, "rest": _count(state) - sum(own.values()), **groups}
    return {"state": _count(state), **groups} if state is not None else groups


def _count(tree: Any) -> int:
    return len(jax.tree.leaves(tree))
