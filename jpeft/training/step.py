"""Training: the state, the jitted step, and LoRA+.

The gradient is taken for trainable adapter leaves alone, so the base has no gradient and no optimizer slot. The step is
sharded when its inputs are: meshes are the user's. The new state is laid out as the old one, and activations as the
batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from jpeft.core.backend import backend
from jpeft.core.peft import Peft
from jpeft.core.placement import everywhere, place
from jpeft.core.quantized import Quantized
from jpeft.core.tree import Tree, combine, named_sharding, partition
from jpeft.parallel.batches import Layout, constrained, layout_of

_METRICS = {"loss", "grad_norm", "skipped"}
LossFn = Callable[[Tree, Tree, Any, jax.Array], tuple[jax.Array, dict[str, Any]]]


@flax.struct.dataclass
class TrainState:
    """What training changes, and nothing of the base.

    Attributes:
      step: optimizer steps taken, skipped ones included. adapter: the small tree. opt_state: the optimizer's, for
      trainable leaves alone. rng: the key of the run; each step folds its number in. skipped: steps whose loss or
      gradient was not finite, which changed nothing.
    """

    step: Int[Array, ""]
    adapter: Any
    opt_state: Any
    rng: jax.Array
    skipped: Int[Array, ""]

    @classmethod
    def create(cls, peft: Peft, adapter: Tree, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
        """The state before the first step.

        The adapter and the key are copied, because `train_step` donates its state: yours stay usable. An abstract
        adapter gives an abstract state. Optimizer slots take the sharding of the leaves they belong to.
        """
        peft.check(adapter)
        if not _is_key(rng):
            raise TypeError(f"rng must be a PRNG key, as from jax.random.key(0), got {rng!r}")
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapter))

        def make(adapter: Tree, rng: jax.Array) -> TrainState:
            trainable, _ = partition(adapter, peft.labels(adapter))
            zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
            return cls(step=zero(), adapter=adapter, opt_state=tx.init(trainable), rng=rng, skipped=zero())

        replicated = everywhere(jax.tree.leaves(adapter))
        if abstract:
            state = jax.eval_shape(make, adapter, rng)
            return state if replicated is None else as_laid_out(state, adapter, tx, peft, replicated)
        state = make(jax.tree.map(jnp.copy, adapter), jnp.copy(rng))
        if replicated is None:
            return state
        # Counters and keys are made on one device; left there, the second step, which finds them on the mesh, would
        # compile again.
        return jax.tree.map(lambda x: x if named_sharding(x) is not None else place(x, replicated), state)


def as_laid_out(state: TrainState, adapter: Tree, tx: Any, peft: Peft, replicated: NamedSharding) -> TrainState:
    """An abstract state with the shardings that a state of such an adapter has."""
    on = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    trainable, _ = partition(adapter, peft.labels(adapter))
    slots = optax.tree_utils.tree_map_params(
        tx, lambda x, leaf: on(x, named_sharding(leaf) if x.shape == leaf.shape else replicated),
        state.opt_state, trainable, transform_non_params=lambda x: on(x, replicated),
    )  # fmt: skip
    rest = jax.tree.map(lambda x: on(x, replicated), (state.step, state.rng, state.skipped))
    leaves = jax.tree.map(lambda x: on(x, named_sharding(x) or replicated), adapter)
    return TrainState(rest[0], leaves, slots, rest[1], rest[2])


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
      accumulate: micro-batches that the batch's leading axis is split into; gradients and metrics are their means.
      clip: largest global norm of the trainable leaves' gradient.
      compute_dtype: floating base leaves are cast to it inside the step; adapter and optimizer keep their own.
      donate: let the step reuse the state's memory; the state passed in is then gone.

    Returns:
      The step; ``step.lower(...)`` is jit's. Its metrics are the loss function's and ``loss``, ``grad_norm`` (before
      clipping) and ``skipped`` (so far). A step whose loss or gradient is not finite changes neither adapter nor
      optimizer, and is counted.

    Raises:
      ValueError: an ``accumulate`` or ``clip`` that is not positive; an ``accumulate`` that does not divide the batch,
        when the step is traced.

    >>> # step = jpeft.train_step(peft, loss_fn, optax.adamw(1e-4), clip=1.0)
    >>> # state, metrics = step(state, params, batch)
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip must be a positive number, or None for no clipping, got {clip}")

    def gradient(trainable: Tree, frozen: Tree, params: Tree, batch: Any, rng: jax.Array) -> Any:
        def loss(trainable: Tree) -> Any:
            base = cast_floating(params, compute_dtype)
            out = loss_fn(combine(trainable, frozen), base, batch, rng)
            if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[1], dict):
                raise TypeError(f"loss_fn must return (loss, metrics: dict), got {type(out).__name__}")
            value, metrics = out
            if taken := sorted(_METRICS & metrics.keys()):
                raise ValueError(f"loss_fn returns a metric called {taken[0]!r}, which is the step's own; rename it")
            if jnp.shape(value) != ():
                raise ValueError(f"the loss must be a scalar, got shape {jnp.shape(value)}: take its mean")
            return value.astype(jnp.float32), jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    def step(layout: Layout | None, state: TrainState, params: Tree, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        with constrained(layout):
            return update(state, params, batch)

    def update(state: TrainState, params: Tree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable, frozen = partition(state.adapter, peft.labels(state.adapter))
        rng = jax.random.fold_in(state.rng, state.step)
        if accumulate == 1:
            (loss, metrics), grads = gradient(trainable, frozen, params, batch, rng)
        else:
            (loss, metrics), grads = _accumulated(gradient, trainable, frozen, params, batch, rng, accumulate)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        if clip is not None:
            factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        adapter = combine(optax.apply_updates(trainable, updates), frozen)
        state = TrainState(
            step=state.step + 1,
            adapter=_select(finite, adapter, state.adapter),
            opt_state=_select(finite, opt_state, state.opt_state),
            rng=state.rng,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        return state, {**metrics, "loss": loss, "grad_norm": norm, "skipped": state.skipped}

    return Step(step, accumulate, donate, peft, loss_fn, tx, compute_dtype)


class Step:
    """A training step ``(state, params, batch) -> (state, metrics)``, compiled for each way that its inputs are laid
    out: see `train_step`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        parts: int,
        donate: bool,
        peft: Peft,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        compute_dtype: Any = None,
    ):
        self._fn, self._donate = fn, donate
        self.peft, self.loss_fn, self.tx, self.parts, self.compute_dtype = peft, loss_fn, tx, parts, compute_dtype
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, params: Tree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return self.program(state, batch)(state, params, batch)

    def lower(self, state: TrainState, params: Tree, batch: Any) -> jax.stages.Lowered:
        """As ``jax.jit(...).lower``: inputs may be abstract."""
        return self.program(state, batch).lower(state, params, batch)

    @property
    def compiled(self) -> int:
        """How many programs it has been compiled to: one for each layout, and shapes and dtypes, of its inputs."""
        return sum(program._cache_size() for program in self._programs.values())

    def program(self, state: TrainState, batch: Any) -> Any:
        """The jitted function for a state and a batch laid out as these, which may be abstract."""
        leaves, treedef = jax.tree.flatten(state)
        shardings, layout = tuple(map(named_sharding, leaves)), layout_of(batch, self.parts)
        key = (treedef, shardings, layout, backend())
        if key not in self._programs:
            self._programs[key] = jax.jit(
                functools.partial(self._fn, layout),
                # Left to itself XLA may lay out the new state otherwise, and the next step would compile again.
                out_shardings=(jax.tree.unflatten(treedef, shardings), None),
                donate_argnums=(0,) if self._donate else (),
            )
        return self._programs[key]


def _accumulated(gradient: Any, trainable: Tree, frozen: Tree, params: Tree, batch: Any, rng: Any, n: int) -> Any:
    """The mean of the gradient over ``n`` micro-batches, one at a time."""

    def split(x: Any) -> jax.Array:
        if jnp.ndim(x) == 0:
            raise ValueError(
                f"accumulate={n} splits every leaf of the batch along its leading axis, and one is a scalar"
            )
        if x.shape[0] % n:
            raise ValueError(f"accumulate={n} does not divide the batch, whose leading axis is {x.shape[0]}")
        # Every n-th example makes a micro-batch: the leading axis keeps its sharding, where blocks would lose it.
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    def one(total: Any, micro: Any) -> Any:
        i, part = micro
        new = gradient(trainable, frozen, params, part, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, new), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(lambda p: gradient(trainable, frozen, params, p, rng), jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(one, zeros, (jnp.arange(n), parts))
    return jax.tree.map(lambda x: x / n, total)


def _select(finite: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def cast_floating(tree: Tree, dtype: Any) -> Tree:
    """The tree with its floating leaves in a dtype; None is their own."""
    if dtype is None:
        return tree

    def cast(x: Any) -> Any:
        if isinstance(x, Quantized):  # its scales stay in float32: what it gives is cast
            return dataclasses.replace(x, dtype=np.dtype(dtype))
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree, is_leaf=lambda x: isinstance(x, Quantized))
