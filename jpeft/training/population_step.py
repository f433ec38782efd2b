"""The training step of a population: `jpeft.train_step`, mapped over its members."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core.backend import backend
from jpeft.core.peft import Peft
from jpeft.core.placement import place
from jpeft.core.tree import Tree, combine, named_sharding, partition
from jpeft.parallel.batches import Layout, constrained, layout_of
from jpeft.training.population import Group, Population, PopulationState, axes_of, per_program
from jpeft.training.programs import as_own
from jpeft.training.rates import Optimizer, rated
from jpeft.training.step import LossFn, TrainState, select, train_step


def population_step(
    population: Population,
    loss_fn: LossFn | Sequence[LossFn],
    tx: Optimizer | Sequence[Optimizer],
    *,
    shared: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    compute_dtype: Any = None,
    donate: bool = True,
) -> PopulationStep:
    """A jitted step ``(state, params, batches) -> (state, metrics)`` that trains every member on its batch.

    A member is trained as `jpeft.train_step` trains it alone: it has its own learning rate, gradient norm, clipping and
    dropout. One whose loss or gradient is not finite skips the step alone.

    Args:
      population: the population. What it becomes by `Population.keep`, `Population.leave` and `Population.join` is
        trained by the same step.
      loss_fn: ``(adapter, params, batch, rng) -> (loss, metrics)`` for one member and its batch. It runs
        ``population.peft``; a population of several programs needs one for each of ``population.pefts``, in a list.
      tx: the optimizer, as for `Population.init`.
      shared: whether all members train on one batch, that has no axis for them. Otherwise ``batches`` has the members
        on the first axis of every leaf, in their order.
      accumulate, clip, compute_dtype, donate: as for `jpeft.train_step`.

    Returns:
      The step. Its metrics are those of `jpeft.train_step`, of shape ``[members]``; NaN for a member that has left, and
      for one whose program has no such metric.

    Raises:
      ValueError: one loss function for several programs, or as for `jpeft.train_step`; when the step is called, batches
        whose first axis is not the members.

    >>> import flax.linen as nn, optax, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((4, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> members = [jpeft.Member(jpeft.LoRA(rank=r, targets="layers_0"), learning_rate=0.1) for r in (2, 4)]
    >>> population = jpeft.Population(model, params, x, members)
    >>> def loss_fn(adapter, params, batch, rng):
    ...     return (population.peft.apply(params, adapter, batch) ** 2).mean(), {}
    >>> step = population_step(population, loss_fn, optax.sgd, shared=True)
    >>> state, metrics = step(population.init(optax.sgd, params), params, x)
    >>> metrics["loss"].shape
    (2,)
    """
    programs = len(population.pefts)
    if programs > 1 and callable(loss_fn):
        names = ", ".join(peft.method.name for peft in population.pefts)
        raise ValueError(
            f"the population has {programs} programs ({names}), and a loss function runs the Peft of one: give a list, "
            "[loss_with(peft) for peft in population.pefts]"
        )
    losses, optimizers = per_program(loss_fn, programs, "loss_fn"), per_program(tx, programs, "tx")
    options: dict[str, Any] = {"accumulate": accumulate, "clip": clip, "compute_dtype": compute_dtype}
    train_step(population.pefts[0], losses[0], optax.identity(), **options)  # raises for a bad option
    made = zip(population.pefts, losses, optimizers, strict=True)
    steps = tuple(_Program(*each, population.axis, shared, options, donate) for each in made)
    return PopulationStep(steps, shared)


@dataclasses.dataclass(frozen=True, eq=False)
class PopulationStep:
    """A step ``(state, params, batches) -> (state, metrics)`` of a population. See `population_step`.

    Each of its programs is compiled once for each number of members and sharding of its inputs.
    """

    programs: tuple[_Program, ...]
    shared: bool

    def __call__(
        self, state: PopulationState, params: Tree, batches: Any
    ) -> tuple[PopulationState, dict[str, jax.Array]]:
        groups, metrics = list(state.groups), []
        for number, (program, group) in enumerate(zip(self.programs, state.groups, strict=True)):
            if group is not None:
                groups[number], found = program(group, params, self._own(state, number, batches))
                metrics.append(found)
        return state.replace(groups=tuple(groups)), _gathered(state, metrics)  # type: ignore[attr-defined]

    def lower(self, state: PopulationState, params: Tree, batches: Any) -> tuple[jax.stages.Lowered, ...]:
        """The lowered programs, of those that have members."""
        return tuple(
            program.of(group, own).lower(group, params, own)
            for number, (program, group) in enumerate(zip(self.programs, state.groups, strict=True))
            if group is not None and (own := self._own(state, number, batches)) is not None
        )

    @property
    def compiled(self) -> int:
        """The number of programs compiled so far."""
        return sum(one._cache_size() for program in self.programs for one in program.jitted.values())

    def _own(self, state: PopulationState, program: int, batches: Any) -> Any:
        """The batches of a program's members."""
        if self.shared:
            return batches
        members = len(state.order)
        for path, x in jax.tree_util.tree_leaves_with_path(batches):
            if np.ndim(x) == 0 or x.shape[0] != members:
                where = jax.tree_util.keystr(path) or "array"
                raise ValueError(
                    f"the batches' {where} has shape {np.shape(x)}: expected a first axis of {members}, one for each "
                    "member; shared=True trains all on one batch"
                )
        indices = state.indices(program)
        if len(indices) == members:
            return batches
        return jax.tree.map(lambda x: _taken(x, np.asarray(indices)), batches)


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The step of the members that one program trains."""

    peft: Peft
    loss_fn: LossFn
    tx: Optimizer
    axis: str | None
    shared: bool
    options: dict[str, Any]
    donate: bool
    jitted: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __call__(self, group: Group, params: Tree, batches: Any) -> tuple[Group, dict[str, jax.Array]]:
        return self.of(group, batches)(group, params, batches)

    def of(self, group: Group, batches: Any) -> Any:
        """The jitted function for a group and batches with these shardings."""
        leaves, treedef = jax.tree.flatten(group)
        shardings, layout = tuple(map(named_sharding, leaves)), self._layout(batches)
        once = tuple(jax.tree.leaves(axes_of(group, self.peft)))  # a leaf may be held once, or by each
        key = (treedef, shardings, layout, once, backend())
        if key not in self.jitted:
            out_shardings = (jax.tree.unflatten(treedef, shardings), None)
            donate = (0,) if self.donate else ()
            self.jitted[key] = jax.jit(self._traced(layout), out_shardings=out_shardings, donate_argnums=donate)
        return self.jitted[key]

    def _layout(self, batches: Any) -> Layout | None:
        """The layout of one member's batch."""
        if not self.shared:
            batches = jax.tree.map(_without_members, batches)
        return layout_of(batches, self.options["accumulate"])

    def _traced(self, layout: Layout | None) -> Callable[..., Any]:
        def step(group: Group, params: Tree, batches: Any) -> tuple[Group, dict[str, jax.Array]]:
            axes = axes_of(group, self.peft)
            mapped = jax.vmap(
                self._update,
                in_axes=(axes, None, None if self.shared else 0),
                out_axes=(axes, 0),
                spmd_axis_name=self.axis,
            )
            with constrained(layout):
                return mapped(group, params, batches)

        return step

    def _update(self, one: Group, params: Tree, batch: Any) -> tuple[Group, dict[str, jax.Array]]:
        """The step of one member."""

        def loss(adapter: Tree, params: Tree, batch: Any, rng: jax.Array) -> Any:
            return self.loss_fn(as_own(self.peft, adapter, one.factors, one.sizes), params, batch, rng)

        old = one.train
        new, metrics = train_step(self.peft, loss, rated(self.tx), **self.options).update(old, params, batch)
        (moved, frozen), (before, _) = (partition(x.adapter, self.peft.labels(x.adapter)) for x in (new, old))
        train = TrainState(
            step=select(one.active, new.step, old.step),
            adapter=combine(select(one.active, moved, before), frozen),
            opt_state=select(one.active, new.opt_state, old.opt_state),
            rng=old.rng,
            skipped=select(one.active, new.skipped, old.skipped),
        )
        metrics = {**metrics, "skipped": train.skipped.astype(jnp.float32)}
        return one.replace(train=train), {  # type: ignore[attr-defined]
            name: jax.tree.map(lambda m: jnp.where(one.active, m, jnp.full_like(m, jnp.nan)), value)
            for name, value in metrics.items()
        }


def _without_members(x: Any) -> Any:
    sharding = named_sharding(x)
    rest = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=rest)


def _taken(x: Any, indices: np.ndarray) -> Any:
    """The entries of some members, on the mesh axes of all."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(indices), *x.shape[1:]), x.dtype, sharding=x.sharding)
    sharding = named_sharding(x)
    return x[indices] if sharding is None else place(x[indices], sharding)


def _gathered(state: PopulationState, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of all members in their order, from those of the programs that have members."""
    if len(metrics) == 1:
        return metrics[0]
    out = {}
    for name in dict.fromkeys(name for own in metrics for name in own):
        some = next(own[name] for own in metrics if name in own)
        values = [own[name] if name in own else _nan_like(some, own["loss"].shape[0]) for own in metrics]
        out[name] = jax.tree.map(lambda *each: state.gathered(each), *values)
    return out


def _nan_like(metric: Any, members: int) -> Any:
    return jax.tree.map(lambda x: jnp.full((members, *x.shape[1:]), jnp.nan, x.dtype), metric)
