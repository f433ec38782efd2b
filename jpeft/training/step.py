"""The training step: its state, and the jitted function that updates it.

Only trainable adapter leaves get gradients and optimizer state; the base has neither. The step is sharded like its
inputs, on whatever mesh they are: the new state like the old one, activations like the batch.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from jpeft.core.backend import backend
from jpeft.core.frontend import is_bypassed
from jpeft.core.peft import Peft
from jpeft.core.placement import place, replicated_like
from jpeft.core.quantized import Quantized
from jpeft.core.tree import Tree, combine, join, map_with_path, named_sharding, partition
from jpeft.parallel.batches import Layout, constrained, layout_of

LossFn = Callable[[Tree, Tree, Any, jax.Array], tuple[jax.Array, dict[str, Any]]]
_METRICS = {"loss", "grad_norm", "skipped", "penalty"}


@flax.struct.dataclass
class TrainState:
    """Everything that training changes. It holds nothing of the base.

    Attributes:
      step: optimizer steps taken, skipped ones included.
      adapter: the adapter.
      opt_state: the optimizer state, for trainable leaves only.
      rng: the key of the run; each step folds its number in.
      skipped: steps whose loss or gradient was not finite, which changed nothing.
    """

    step: Int[Array, ""]
    adapter: Any
    opt_state: Any
    rng: jax.Array
    skipped: Int[Array, ""]

    @classmethod
    def create(cls, peft: Peft, adapter: Tree, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
        """The state before the first step.

        The adapter and the key are copied, because `train_step` donates its state. An abstract adapter gives an
        abstract state. Optimizer state is sharded like the leaves that it belongs to.
        """
        peft.check(adapter)
        if not _is_key(rng):
            raise TypeError(f"rng must be a PRNG key, as from jax.random.key(0), got {rng!r}")

        def make(adapter: Tree, rng: jax.Array) -> TrainState:
            trainable, _ = partition(adapter, peft.labels(adapter))
            step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two arrays, as donation needs
            return cls(step=step, adapter=adapter, opt_state=tx.init(trainable), rng=rng, skipped=skipped)

        replicated = replicated_like(jax.tree.leaves(adapter))
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapter)):
            state = jax.eval_shape(make, adapter, rng)
            return state if replicated is None else with_shardings(state, adapter, tx, peft, replicated)
        state = make(jax.tree.map(jnp.copy, adapter), jnp.copy(rng))
        if replicated is None:
            return state
        # Counters and keys are created on one device. Left there, the second step would compile again, because the
        # first one returns them on the mesh.
        return jax.tree.map(lambda x: x if named_sharding(x) is not None else place(x, replicated), state)


def with_shardings(state: TrainState, adapter: Tree, tx: Any, peft: Peft, replicated: NamedSharding) -> TrainState:
    """An abstract state with the shardings that `TrainState.create` gives a concrete one.

    Args:
      state: the abstract state.
      adapter: its adapter, abstract, with shardings.
      tx: the optimizer.
      peft: the bound method.
      replicated: the sharding of what does not follow the adapter.
    """

    def put(x: Any, sharding: Any = replicated) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def put_like(x: Any, leaf: Any) -> Any:
        return put(x, named_sharding(leaf) if x.shape == leaf.shape else replicated)

    trainable, _ = partition(adapter, peft.labels(adapter))
    return TrainState(
        step=put(state.step),
        adapter=jax.tree.map(lambda x: put(x, named_sharding(x) or replicated), adapter),
        opt_state=optax.tree_utils.tree_map_params(tx, put_like, state.opt_state, trainable, transform_non_params=put),
        rng=put(state.rng),
        skipped=put(state.skipped),
    )


def _is_key(rng: Any) -> bool:
    dtype = getattr(rng, "dtype", np.dtype(object))
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == np.uint32 and np.ndim(rng) == 1)


def train_step(
    peft: Peft,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    compute_dtype: Any = None,
    donate: bool = True,
) -> Step:
    """A jitted training step ``(state, params, batch) -> (state, metrics)``.

    Args:
      peft: the bound method.
      loss_fn: ``(adapter, params, batch, rng) -> (loss, metrics)``: a scalar, the mean over the batch, and a dict.
      tx: the optimizer, plain or `jpeft.masked`.
      accumulate: the number of micro-batches that the batch's leading axis is split into. Gradients and metrics are
        their means.
      clip: the largest global norm of the trainable leaves' gradient; None: no clipping.
      compute_dtype: floating base leaves are cast to it inside the step; adapter and optimizer state keep their own.
      donate: let the step reuse the state's memory; the state passed in is then deleted.

    Returns:
      The step; ``step.lower(...)`` is jit's. Its metrics are those of ``loss_fn`` and ``loss``, ``grad_norm`` (before
      clipping) and ``skipped`` (so far). A method's own loss, see `Peft.penalty`, is added to that of ``loss_fn`` and
      reported as ``penalty``; ``loss`` is without it. A step whose loss or gradient is not finite changes neither
      adapter nor optimizer state, and is counted.

    Raises:
      ValueError: an ``accumulate`` or ``clip`` that is not positive; when the step is traced, an ``accumulate`` that
        does not divide the batch, or a ``loss_fn`` that does not depend on the adapter.

    >>> # step = jpeft.train_step(peft, loss_fn, optax.adamw(1e-4), clip=1.0)
    >>> # state, metrics = step(state, params, batch)
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip must be a positive number, or None for no clipping, got {clip}")
    return Step(peft, loss_fn, tx, accumulate, clip, compute_dtype, donate)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A training step ``(state, params, batch) -> (state, metrics)``. See `train_step` for its fields.

    It is compiled once for each sharding of its inputs.
    """

    peft: Peft
    loss_fn: LossFn
    tx: optax.GradientTransformation
    accumulate: int
    clip: float | None
    compute_dtype: Any
    donate: bool
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __call__(self, state: TrainState, params: Tree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return self.program(state, batch)(state, params, batch)

    def lower(self, state: TrainState, params: Tree, batch: Any) -> jax.stages.Lowered:
        """Like ``jax.jit(...).lower``; inputs may be abstract."""
        return self.program(state, batch).lower(state, params, batch)

    @property
    def compiled(self) -> int:
        """The number of programs compiled so far: one for each combination of shardings, shapes and dtypes."""
        return sum(program._cache_size() for program in self._programs.values())

    def program(self, state: TrainState, batch: Any) -> Any:
        """The jitted function for a state and a batch with these shardings. Both may be abstract."""
        leaves, treedef = jax.tree.flatten(state)
        shardings, layout = tuple(map(named_sharding, leaves)), layout_of(batch, self.accumulate)
        key = (treedef, shardings, layout, backend())
        if key not in self._programs:
            # XLA might choose other shardings for the new state, and the next step would compile again.
            out_shardings = (jax.tree.unflatten(treedef, shardings), None)
            donate = (0,) if self.donate else ()
            self._programs[key] = jax.jit(self._traced(layout), out_shardings=out_shardings, donate_argnums=donate)
        return self._programs[key]

    def _traced(self, layout: Layout | None) -> Callable[..., Any]:
        def step(state: TrainState, params: Tree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            with constrained(layout):
                return self.update(state, params, batch)

        return step

    def update(self, state: TrainState, params: Tree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """What the step does, as a function to trace: under ``jax.vmap``, for one."""
        trainable, frozen = partition(state.adapter, self.peft.labels(state.adapter))
        rng = jax.random.fold_in(state.rng, state.step)

        def gradient(batch: Any, rng: jax.Array) -> Any:
            return self._gradient(trainable, frozen, params, batch, rng)

        (total, metrics), grads = _mean_over_parts(gradient, batch, rng, self.accumulate)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        if self.clip is not None:
            factor = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, opt_state = self.tx.update(grads, state.opt_state, trainable)
        # Both. Sorted, since XLA fuses a sort into nothing: for CPUs it would repeat the sum of all terms of the loss
        # in the program of each leaf, which makes AdaLoRA's step 3 times slower to compile.
        finite = jnp.sort(jnp.stack([jnp.isfinite(total), jnp.isfinite(norm)]))[0]
        # Leaves that do not train stay the same values: under vmap, those that are held once stay so.
        moved = select(finite, optax.apply_updates(trainable, updates), trainable)
        state = TrainState(
            step=state.step + 1,
            adapter=combine(moved, frozen),
            opt_state=select(finite, opt_state, state.opt_state),
            rng=state.rng,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        return state, {**metrics, "grad_norm": norm, "skipped": state.skipped}

    def _gradient(self, trainable: Tree, frozen: Tree, params: Tree, batch: Any, rng: jax.Array) -> Any:
        """``((loss, metrics), gradient)`` for the trainable leaves."""

        def loss(trainable: Tree) -> Any:
            base = cast_floating(params, self.compute_dtype)
            out = self.loss_fn(combine(trainable, frozen), base, batch, rng)
            if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[1], dict):
                raise TypeError(f"loss_fn must return (loss, metrics: dict), got {type(out).__name__}")
            value, metrics = out
            if taken := sorted(_METRICS & metrics.keys()):
                raise ValueError(f"loss_fn returns a metric called {taken[0]!r}, which is the step's own; rename it")
            if jnp.shape(value) != ():
                raise ValueError(f"the loss must be a scalar, got shape {jnp.shape(value)}: take its mean")
            value = value.astype(jnp.float32)
            metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics) | {"loss": value}
            if not self.peft.penalized:
                return value, metrics
            penalty = self.peft.penalty(combine(trainable, frozen))
            return value + penalty, metrics | {"penalty": penalty}

        traced, shapes = jax.make_jaxpr(loss, return_shape=True)(trainable)
        is_loss = [path[-1] == jax.tree_util.DictKey("loss") for path, _ in jax.tree.leaves_with_path(shapes)]
        _check_used(traced, is_loss, self.peft, trainable)

        def again(trainable: Tree) -> Any:  # the same operations, without running loss_fn a second time
            return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(traced)(*jax.tree.leaves(trainable)))

        return jax.value_and_grad(again, has_aux=True)(trainable)


def _check_used(traced: Any, is_loss: list[bool], peft: Peft, trainable: Tree) -> None:
    """Raises a ValueError unless the user's loss, one of the outputs of a traced function, depends on the adapter.

    A leaf that it does not depend on gives a `UserWarning`.
    """
    names = jax.tree.leaves(map_with_path(lambda path, leaf: None if leaf is None else join(path), trainable))
    if not names or is_bypassed():
        return
    _, used = dce_jaxpr(traced.jaxpr, is_loss)
    if not any(used):
        raise ValueError(
            f"loss_fn does not depend on the adapter, so nothing would train ({len(names)} leaves of "
            f"{peft.method.name}): call peft.apply in it, or enter peft.intercept() around the call of the model"
        )
    if unused := [name for name, is_used in zip(names, used, strict=True) if not is_used]:
        warnings.warn(
            f"loss_fn does not depend on {len(unused)} of the {len(names)} leaves that train, which will stay as they "
            f"are: first {unused[0]!r}; leave it out with exclude=, or use its module in the loss",
            stacklevel=2,
        )


def _mean_over_parts(fn: Callable[[Any, jax.Array], Any], batch: Any, rng: jax.Array, n: int) -> Any:
    """The mean of ``fn(micro_batch, rng)`` over ``n`` micro-batches, computed one after another."""
    if n == 1:
        return fn(batch, rng)

    def split(x: Any) -> jax.Array:
        if jnp.ndim(x) == 0:
            raise ValueError(
                f"accumulate={n} splits every leaf of the batch along its leading axis, and one is a scalar"
            )
        if x.shape[0] % n:
            raise ValueError(f"accumulate={n} does not divide the batch, whose leading axis is {x.shape[0]}")
        # Every n-th example makes a micro-batch: the leading axis keeps its sharding, which blocks would lose.
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    def add(total: Any, part: Any) -> Any:
        i, micro_batch = part
        return jax.tree.map(jnp.add, total, fn(micro_batch, jax.random.fold_in(rng, i))), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(lambda p: fn(p, rng), jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), parts))
    return jax.tree.map(lambda x: x / n, total)


def select(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """The leaves of one of two trees.

    >>> select(jnp.array(False), {"w": jnp.ones(())}, {"w": jnp.zeros(())})["w"].item()
    0.0
    """
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def cast_floating(tree: Tree, dtype: Any) -> Tree:
    """The tree with floating leaves cast to a dtype; unchanged if it is None."""
    if dtype is None:
        return tree

    def cast(x: Any) -> Any:
        if isinstance(x, Quantized):  # its scales stay in float32; the dequantized weight is cast
            return dataclasses.replace(x, dtype=np.dtype(dtype))
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree, is_leaf=lambda x: isinstance(x, Quantized))
