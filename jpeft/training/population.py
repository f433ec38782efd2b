"""Populations: many adapters, trained in one step over one base.

    rates = (1e-4, 3e-4, 1e-3)
    members = [jpeft.Member(jpeft.LoRA(rank=8), learning_rate=rate, seed=seed) for rate in rates for seed in (0, 1)]
    population = jpeft.Population(model, params, inputs, members)
    state = population.init(optax.adamw, params)
    step = jpeft.population_step(population, loss_fn, optax.adamw)

The step is `jpeft.train_step` under ``jax.vmap``, so that a member's run is its own run, at the speed of one large
batch. Members that differ in the rate, the seed, the rank or the scale of their method share a program, in which these
are data; members of other methods have a program of their own.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jpeft.binding import bind_survey
from jpeft.checks import is_int, shown
from jpeft.core.entering import model_kwargs
from jpeft.core.fitting import crop, pad
from jpeft.core.method import Method
from jpeft.core.peft import Peft, adapter_shardings
from jpeft.core.placement import automatic, place, replicated_like, trimmed
from jpeft.core.tree import Path, Tree, flatten, join, like, map_with_path, named_sharding, partition, peek, unflatten
from jpeft.frontends import arguments
from jpeft.parallel.batches import batch_shardings
from jpeft.training.programs import factors_of, grouped, sizes_of, why_not
from jpeft.training.rates import SCALED, Optimizer, check_rates, is_function, rated, with_rate
from jpeft.training.step import TrainState


@dataclass(frozen=True)
class Member:
    """A member of a population.

    Attributes:
      method: its method.
      learning_rate: its learning rate; None for that of the optimizer.
      seed: the seed of its fresh adapter and of its dropout; also for the order of its data, which is the caller's.

    >>> import jpeft
    >>> Member(jpeft.LoRA(rank=8), learning_rate=1e-4, seed=1).learning_rate
    0.0001
    """

    method: Method
    _: KW_ONLY
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(getattr(self.method, "sites", None)):
            raise TypeError(f"Member.method must be a method, such as jpeft.LoRA(rank=8), got {shown(self.method)}")
        if not is_int(self.seed) or self.seed < 0:
            raise ValueError(f"Member.seed must be an integer from 0 on, got {shown(self.seed)}")
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", _rate(self.learning_rate))

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """The key of its fresh adapter and that of its training state, which makes its dropout."""
        adapter, rng = jax.random.split(jax.random.key(self.seed))
        return adapter, rng


def _rate(value: Any) -> float:
    try:
        rate = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise ValueError(f"Member.learning_rate must be a number from 0 on, or None, got {shown(value)}")
    return rate


@flax.struct.dataclass
class Group:
    """The members of a population that share a program, one after another on the first axis of each array.

    Attributes:
      train: their training states; a leaf of the adapter that all have alike is held once, without that axis.
      active: whether each takes part in a step.
      factors: the factors by which their scales differ, see `jpeft.training.programs`; None if they cannot.
      sizes: the sizes of their leaves; None if they cannot differ.
    """

    train: TrainState
    active: Bool[Array, " members"]
    factors: Float[Array, "members paths"] | None
    sizes: Int[Array, "members axes"] | None


@flax.struct.dataclass
class PopulationState:
    """Everything that training a population changes. It holds nothing of the base.

    Attributes:
      groups: the members by program; None for a program that has none left.
      order: for each member the index of its program. Within a program they have this order.
    """

    groups: tuple[Group | None, ...]
    order: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def active(self) -> Bool[Array, " members"]:
        """Whether each member takes part in a step."""
        return self.gathered([group.active for group in self.groups if group is not None])

    @property
    def step(self) -> Int[Array, " members"]:
        """The steps that each member has taken, skipped ones included."""
        return self.gathered([group.train.step for group in self.groups if group is not None])

    @property
    def skipped(self) -> Int[Array, " members"]:
        """The steps of each member that were skipped since its loss or gradient was not finite."""
        return self.gathered([group.train.skipped for group in self.groups if group is not None])

    def place(self, i: int) -> tuple[int, int]:
        """The program of a member, and its place among those that share it."""
        return self.order[i], self.order[:i].count(self.order[i])

    def indices(self, program: int) -> list[int]:
        """The members of a program."""
        return [i for i, own in enumerate(self.order) if own == program]

    def gathered(self, values: Sequence[Any]) -> Any:
        """An array over all members in their order, from one for each program that has members."""
        if len(values) < 2:
            return next(iter(values))
        members = np.concatenate([self.indices(program) for program in sorted(set(self.order))])
        return jnp.concatenate(values)[np.argsort(members)]


@dataclass(frozen=True, eq=False, init=False)
class Population:
    """Methods that are bound to a model, to be trained together.

    Attributes:
      members: the members.
      pefts: the Pefts that train them, one for each program. Its ranks are the largest of its members.
      own: each member's own Peft.
      programs: for each member the index in ``pefts``.
      origins: the index that each member had at first: JSON values from which `select` makes the same population.
      axis: the axis of the device mesh over which the members are sharded, if there is one.
    """

    members: Sequence[Member]
    pefts: Sequence[Peft]
    own: Sequence[Peft]
    programs: tuple[int, ...]
    origins: tuple[int, ...]
    axis: str | None
    _bind: Any

    def __init__(
        self,
        model: Any,
        params: Tree,
        inputs: Any,
        members: Sequence[Member],
        *,
        axis: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Binds the members' methods to a model. Each method is bound once, and the model is traced once.

        Args:
          model: as for ``method.bind``: a Linen or NNX module, or a plain function of parameters.
          params: its parameters.
          inputs: what it is called with: a tuple of arguments, or the only one.
          members: at least one.
          axis: an axis of the mesh that ``params`` are on, such as "population", for the members; its size
            divides those of each program.
          kwargs: keyword arguments of the call.

        Raises:
          TypeError: ``members`` are no `Member`\\ s, or the model is none.
          TargetError: a target matches nothing.
          ValueError: there are no members, or a method cannot act on a site.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
        >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> members = [Member(jpeft.LoRA(rank=r, targets="layers_0"), learning_rate=0.1) for r in (2, 4)]
        >>> population = jpeft.Population(model, params, x, members)
        >>> population.peft.method.rank, [peft.method.rank for peft in population.own]
        (4, [2, 4])
        """
        members = tuple(members)
        if not members:
            raise ValueError("a population needs at least one member")
        for member in members:
            if not isinstance(member, Member):
                raise TypeError(f"members must be jpeft.Members, got {shown(member)}")
        bind = _Binder(model, inputs if isinstance(inputs, tuple) else (inputs,), kwargs or {})
        bound = {member.method: bind(member.method, params) for member in members}
        own = tuple(bound[member.method] for member in members)
        pefts, programs = grouped(own)
        self._set(members=members, pefts=pefts, own=own, programs=programs)
        self._set(origins=tuple(range(len(members))), axis=axis, _bind=bind)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _with(self, **fields: Any) -> Population:
        new = copy.copy(self)
        new._set(**fields)
        return new

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        names = ", ".join(peft.method.name for peft in self.pefts)
        return f"Population({len(self.members)} members; programs of {names})"

    @property
    def peft(self) -> Peft:
        """The Peft that trains all members.

        Raises:
          ValueError: there is one for each of several programs, see ``pefts``.
        """
        if len(self.pefts) > 1:
            names = ", ".join(peft.method.name for peft in self.pefts)
            raise ValueError(
                f"this population has {len(self.pefts)} programs ({names}) and so as many Pefts: make one loss "
                "function for each, [loss_with(peft) for peft in population.pefts]"
            )
        return self.pefts[0]

    # --- state ------------------------------------------------------------------------------------------------------

    def init(
        self, tx: Optimizer | Sequence[Optimizer], params: Tree, statistics: Mapping[str, Any] | None = None
    ) -> PopulationState:
        """The state before the first step: each member's fresh adapter, from its seed, and its optimizer state.

        Member i starts as its own run does from the two keys of ``member.keys()``: ``TrainState.create(own,
        own.init(key, params), tx, rng)``, with ``own`` its Peft.

        Args:
          tx: the optimizer, with the learning rate as data: a function of it, such as ``optax.adamw`` or ``lambda rate:
            optax.adamw(lambda count: rate * schedule(count))``, or a transformation with one in its state,
            ``optax.inject_hyperparams(optax.adamw)(learning_rate=1e-4)``. Members without a rate of their own take any
            transformation. A sequence has one for each of ``pefts``.
          params: the base tree. The adapters take over its shardings.
          statistics: for methods whose start depends on data, what `jpeft.observe` found.

        Raises:
          ValueError: the optimizer cannot give each member its own learning rate, is made for one adapter, or does not
            treat a smaller rank like that rank alone; or the members do not divide over the mesh axis.
        """
        groups = []
        for program, own_tx in enumerate(per_program(tx, len(self.pefts), "tx")):
            indices = [i for i, own in enumerate(self.programs) if own == program]
            groups.append(self._group(program, indices, own_tx, params, statistics) if indices else None)
        return PopulationState(tuple(groups), self.programs)

    def _group(self, program: int, indices: Sequence[int], tx: Optimizer, params: Tree, statistics: Any) -> Group:
        peft, own = self.pefts[program], [self.own[i] for i in indices]
        members = [self.members[i] for i in indices]
        _check_optimizer(peft, own, members, tx)
        keys = [member.keys() for member in members]
        adapters = [
            pad(peft, each, each.init(key, params, statistics)) for each, (key, _) in zip(own, keys, strict=True)
        ]
        adapter = _stacked(adapters, _alike(peft, own, params))
        rngs, rates = jnp.stack([rng for _, rng in keys]), jnp.asarray([_rate_or_nan(m) for m in members])
        train = _created(peft, adapter, tx, rngs, rates)
        factors, sizes = ([fn(peft, each) for each in own] for fn in (factors_of, sizes_of))
        group = Group(train, jnp.ones(len(own), bool), _all(factors), _all(sizes))
        return self._placed(group, peft, params)

    def _placed(self, group: Group, peft: Peft, params: Tree) -> Group:
        """The group with the shardings that follow from the base's, and with its members over their mesh axis."""
        replicated = replicated_like(jax.tree.leaves(flatten(peft.frontend.tree(params))))
        if replicated is None:
            if self.axis is not None:
                raise ValueError(f"axis={self.axis!r}, but no leaf of params is on a mesh; use jpeft.shard")
            return group
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(group)):
            return group
        leaves = {p: s.spec for p, s in flatten(adapter_shardings(peft, params)).items()}
        shapes = dict(peft.structure)
        check_divides(len(group.active), replicated.mesh, self.axis)

        def put(keys: Any, x: Any) -> Any:
            path = tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
            found = next((p for i in range(len(path)) if (p := path[i:]) in leaves), None)
            like_leaf = found is not None and x.shape[-len(shapes[found][0]) or x.ndim :] == shapes[found][0]
            spec = leaves[found] if found is not None and like_leaf else ()
            once = found is not None and x.shape == shapes[found][0] and keys[1].name == "adapter"
            own = spec if once else (self.axis, *spec)
            return place(x, NamedSharding(replicated.mesh, trimmed(own)))

        return jax.tree_util.tree_map_with_path(put, group)

    # --- members ----------------------------------------------------------------------------------------------------

    def member(self, state: PopulationState, i: int) -> tuple[Peft, Any]:
        """A member's own Peft and its adapter, cropped to its own rank: for `jpeft.save` and everything else.

        Raises:
          IndexError: there is no such member.
        """
        i = self._index(i)
        program, place = state.place(i)
        group = _held(state, program)
        adapter = _one_of(group.train.adapter, self.pefts[program], place)
        return self.own[i], crop(self.pefts[program], self.own[i], adapter)

    def keep(self, state: PopulationState, *, best: int, by: Any) -> tuple[PopulationState, Population]:
        """The state and the population of the best members, the best one first: a step of successive halving.

        The step of the larger population takes the new state; it compiles once more, for the smaller number.

        Args:
          state: the state.
          best: how many to keep.
          by: a number for each member, lower is better; such as its loss on held-out data.

        Raises:
          ValueError: ``by`` has not one number for each member, or fewer than ``best`` active members have a finite
            one.
        """
        try:
            scores = np.asarray(by, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"by must have one number for each of the {len(self)} members, got {shown(by)}") from None
        if scores.shape != (len(self),):
            raise ValueError(f"by must have one number for each of the {len(self)} members, got shape {scores.shape}")
        scores = np.where(np.asarray(state.active) & np.isfinite(scores), scores, np.inf)
        finite = int(np.isfinite(scores).sum())
        if not is_int(best) or not 1 <= best <= finite:
            raise ValueError(
                f"best={best!r}: expected 1 to {finite}, the number of active members whose `by` is finite"
            )
        return self.select(np.argsort(scores, kind="stable")[:best].tolist(), state)

    def select(self, indices: Sequence[int], state: PopulationState | None = None) -> Any:
        """The population of some members, in this order; with a state, ``(state, population)`` of them.

        A run resumes after `keep` with ``Population(...).select(origins)``, where ``origins`` are those of the
        population that it had: the ``like`` of its checkpoint is the `init` of this one.

        Raises:
          IndexError: there is no such member.
          ValueError: no members, or one twice.
        """
        indices = [self._index(i) for i in indices]
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(f"select takes each member once, and at least one, got {indices}")

        def of(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[i] for i in indices)

        population = self._with(
            members=of(self.members), own=of(self.own), programs=of(self.programs), origins=of(self.origins)
        )
        if state is None:
            return population
        groups = []
        for program, group in enumerate(state.groups):
            places = [state.place(i)[1] for i in indices if state.order[i] == program]
            groups.append(self._taken(group, program, places) if group is not None and places else None)
        return PopulationState(tuple(groups), of(state.order)), population

    def _taken(self, group: Group, program: int, places: Sequence[int]) -> Group:
        taken, index = axes_of(group, self.pefts[program]), np.asarray(places)

        def take(axis: int | None, x: Any) -> Any:
            if axis is None:
                return x if x is None else jnp.copy(x)  # the old state keeps its own, which a step may donate
            sharding = named_sharding(x)
            if sharding is None:
                return x[index]
            check_divides(len(index), sharding.mesh, self.axis)
            return place(x[index], sharding)

        return jax.tree.map(take, spread(taken, group), group, is_leaf=lambda x: x is None)

    def leave(self, state: PopulationState, i: int) -> PopulationState:
        """The state with a member that takes no part: it stays as it is, and its metrics are NaN. Nothing compiles.

        Raises:
          IndexError: there is no such member.
        """
        program, place = state.place(self._index(i))
        group: Any = _held(state, program)
        return _replaced(state, program, group.replace(active=_set_at(group.active, place, jnp.asarray(False))))

    def join(
        self,
        state: PopulationState,
        i: int,
        member: Member,
        tx: Optimizer | Sequence[Optimizer],
        params: Tree,
        *,
        adapter: Tree | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> tuple[PopulationState, Population]:
        """The state and the population with a new member in the place of one that left. The step compiles nothing.

        Args:
          state: the state.
          i: the place.
          member: the new member; its method must fit the program of that place, with a rank of at most its Peft's.
          tx: as for `init`.
          params: the base tree.
          adapter: its adapter, in its own rank; None for a fresh one.
          statistics: as for `init`.

        Raises:
          IndexError: there is no such place.
          ValueError: the place is taken, or the program cannot train the member.
        """
        i = self._index(i)
        program, place = state.place(i)
        group, peft = _held(state, program), self.pefts[program]
        if bool(group.active[place]):
            raise ValueError(f"member {i} takes part; let it leave first: state = population.leave(state, {i})")
        own = self._bind(member.method, params)
        if problem := why_not(peft, own):
            raise ValueError(f"member {i} cannot join the program of {peft.method.name}: {problem}")
        own_tx = per_program(tx, len(self.pefts), "tx")[program]
        _check_optimizer(peft, [own], [member], own_tx)
        key, rng = member.keys()
        padded = pad(peft, own, own.init(key, params, statistics) if adapter is None else adapter)
        _check_alike(group.train.adapter, padded, peft)
        rates, stacked = jnp.asarray([_rate_or_nan(member)]), _stacked([padded], _once(group.train.adapter, peft))
        train = _created(peft, stacked, own_tx, rng[None], rates)
        new = Group(train, jnp.ones(1, bool), _all([factors_of(peft, own)]), _all([sizes_of(peft, own)]))
        axes = spread(axes_of(group, peft), group)

        def put_in(axis: int | None, old: Any, x: Any) -> Any:
            return old if axis is None else _set_at(old, place, x[0])

        joined = jax.tree.map(put_in, axes, group, new, is_leaf=lambda x: x is None)

        def put(values: Sequence[Any], value: Any) -> tuple[Any, ...]:
            return (*values[:i], value, *values[i + 1 :])

        population = self._with(
            members=put(self.members, member), own=put(self.own, own), origins=put(self.origins, len(self.origins))
        )
        return _replaced(state, program, joined), population

    def _index(self, i: Any) -> int:
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(f"a member is named by its index, got {shown(i)}") from None
        if not 0 <= i < len(self):
            raise IndexError(f"there is no member {i}: this population has {len(self)}, from 0 on")
        return i

    # --- data -------------------------------------------------------------------------------------------------------

    def shard_batches(self, batches: Any, mesh: Mesh) -> Any:
        """Batches with the members on their first axis, on a mesh: these over ``axis``, rows as by `jpeft.shard_batch`.

        Raises:
          ValueError: members, rows or tokens that do not divide over the mesh.
        """
        check_divides(len(self), mesh, self.axis)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
        shardings = batch_shardings(one, mesh)
        return jax.tree.map(
            lambda x, s: place(x, NamedSharding(automatic(mesh), trimmed((self.axis, *s.spec)))), batches, shardings
        )


class _Binder:
    """Binds methods to a model that is traced once for all that take the same arguments."""

    def __init__(self, model: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model, self.inputs, self.kwargs = model, inputs, kwargs
        self.surveys: dict[tuple[str, ...], Any] = {}

    def __call__(self, method: Method, params: Tree) -> Peft:
        found, tree, inputs = self._arguments(params)
        kwargs = model_kwargs(method, self.kwargs)
        if (names := tuple(kwargs)) not in self.surveys:
            self.surveys[names] = found.survey(self.model, tree, inputs, kwargs)
        return bind_survey(method, self.model, tree, self.surveys[names], found)

    def _arguments(self, params: Tree) -> tuple[Any, Any, tuple[Any, ...]]:
        found, tree, rest = arguments(self.model, (params, *self.inputs), "Population(model, params, inputs, members)",
                                      functions=True)  # fmt: skip
        return found, tree, self.inputs if found.holds_params else rest


# --- pieces ---------------------------------------------------------------------------------------------------------


def per_program(value: Any, programs: int, name: str) -> tuple[Any, ...]:
    """A value for each program, from one for all or a sequence of them.

    Raises:
      ValueError: a sequence of another length.

    >>> per_program("loss", 2, "loss_fn"), per_program(["a", "b"], 2, "loss_fn")
    (('loss', 'loss'), ('a', 'b'))
    """
    if not isinstance(value, list | tuple) or hasattr(value, "update"):  # a transformation of optax is a tuple
        return (value,) * programs
    if len(value) != programs:
        raise ValueError(f"{name} has {len(value)} entries, and the population {programs} programs: one for each")
    return tuple(value)


def check_divides(members: int, mesh: Any, axis: str | None) -> None:
    """Checks that a program's members divide over the mesh axis.

    Raises:
      ValueError: they do not, or the mesh has no such axis.

    >>> check_divides(4, jax.sharding.AbstractMesh((2,), ("members",)), "members")
    """
    if axis is None:
        return
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r}, but the mesh has {', '.join(map(str, mesh.axis_names))}")
    if members % mesh.shape[axis]:
        raise ValueError(
            f"{members} members of a program do not divide over the mesh's axis {axis!r}, which is {mesh.shape[axis]} "
            "wide"
        )


def axes_of(group: Group, peft: Peft) -> Group:
    """The ``in_axes`` of a group for `jax.vmap`: None for leaves that are held once, else 0."""
    train = TrainState(step=0, adapter=peft.axes(group.train.adapter), opt_state=0, rng=0, skipped=0)  # type: ignore[arg-type]
    return Group(train=train, active=0, factors=0, sizes=0)  # type: ignore[arg-type]


def spread(axes: Group, group: Group) -> Group:
    """`axes_of` with an entry for every array of the group."""
    fill = lambda tree: jax.tree.map(lambda _: 0, tree)  # noqa: E731
    every: Any = fill(group)
    return every.replace(train=every.train.replace(adapter=axes.train.adapter))


def _all(values: Sequence[Any]) -> Any:
    return None if values[0] is None else jnp.stack(values)


def _held(state: PopulationState, program: int) -> Group:
    group = state.groups[program]
    assert group is not None, "the program of a member has members"
    return group


def _replaced(state: PopulationState, program: int, group: Group) -> PopulationState:
    return state.replace(groups=(*state.groups[:program], group, *state.groups[program + 1 :]))  # type: ignore[attr-defined]


def _rate_or_nan(member: Member) -> float:
    return math.nan if member.learning_rate is None else member.learning_rate


def _set_at(x: jax.Array, i: int, value: jax.Array) -> jax.Array:
    """The array with another value at a place, on the same shards."""
    sharding = named_sharding(x)
    out = _set(x, i, value)
    return out if sharding is None else place(out, sharding)


@jax.jit
def _set(x: jax.Array, i: Any, value: jax.Array) -> jax.Array:
    return x.at[i].set(value)


def _alike(peft: Peft, own: Sequence[Peft], params: Tree) -> frozenset[Path]:
    """The leaves that the configuration gives all members alike, whatever their seeds, so that one copy will do."""
    base = flatten(peft.frontend.tree(params))
    found = jax.eval_shape(lambda: peft.regenerated({p: _abstract(x) for p, x in base.items()}))
    shapes = [dict(each.structure) for each in own]
    return frozenset(path for path in found if len({each.get(path) for each in shapes}) == 1)


def _abstract(leaf: Any) -> Any:
    own = peek(leaf)
    return jax.ShapeDtypeStruct(own.shape, own.dtype)


def _once(adapter: Tree, peft: Peft) -> frozenset[Path]:
    """The leaves that a stack of adapters holds once."""
    return frozenset(set(flatten(adapter)) - set(flatten(peft.axes(adapter))))


def _stacked(adapters: Sequence[Tree], once: frozenset[Path]) -> Any:
    leaves = [flatten(adapter) for adapter in adapters]
    out = {p: x if p in once else jnp.stack([own[p] for own in leaves]) for p, x in leaves[0].items()}
    return like(unflatten(out), adapters[0])


def _one_of(adapter: Tree, peft: Peft, place: int) -> Any:
    once = _once(adapter, peft)
    return map_with_path(lambda path, x: x if path in once else x[place], adapter)


def _check_alike(held: Tree, adapter: Tree, peft: Peft) -> None:
    leaves, there = flatten(adapter), flatten(held)
    for path in _once(held, peft):
        if not np.array_equal(there[path], leaves[path]):
            raise ValueError(
                f"the new member's {join(path)!r} differs from the population's, which holds it once for all members"
            )


def _created(peft: Peft, adapter: Tree, tx: Optimizer, rngs: jax.Array, rates: jax.Array) -> TrainState:
    """`TrainState.create` for stacked adapters, with the members' learning rates."""
    axes = peft.axes(adapter)

    def create(adapter: Tree, rng: jax.Array, rate: jax.Array) -> TrainState:
        state = TrainState.create(peft, adapter, rated(tx, rate), rng)
        return state.replace(opt_state=with_rate(state.opt_state, rate))  # type: ignore[attr-defined]

    out: Any = TrainState(step=0, adapter=axes, opt_state=0, rng=0, skipped=0)  # type: ignore[arg-type]
    return jax.jit(jax.vmap(create, in_axes=(axes, 0, 0), out_axes=out))(adapter, rngs, rates)


# --- optimizers -----------------------------------------------------------------------------------------------------


def _check_optimizer(peft: Peft, own: Sequence[Peft], members: Sequence[Member], tx: Optimizer) -> None:
    """Raises a ValueError if the optimizer cannot serve each member as it would alone."""
    missing = [i for i, member in enumerate(members) if member.learning_rate is None]
    if is_function(tx) and missing:
        raise ValueError(
            f"tx is a function of the learning rate, and member {missing[0]} of {peft.method.name}'s program has none: "
            "give Member(..., learning_rate=...)"
        )
    shapes = {path: jax.ShapeDtypeStruct(*leaf) for path, leaf in peft.structure}
    labels = peft.labels(unflatten(shapes))
    try:
        state = jax.eval_shape(lambda x: rated(tx).init(partition(x, labels)[0]), unflatten(shapes))
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "tx looks at the value of its learning rate, as some of optax's schedules do, and here that is data of a "
            f"program; scale a schedule instead: {SCALED}"
        ) from error
    check_rates(state, given=len(missing) < len(members))
    smaller = min(own, key=lambda each: sum(math.prod(shape) for _, (shape, _) in each.structure))
    if smaller.structure != peft.structure:
        _check_sizes(peft, smaller, tx)


def _check_sizes(peft: Peft, small: Peft, tx: Optimizer) -> None:
    """Raises a ValueError if the optimizer treats a smaller rank in the leaves of a larger one otherwise than alone."""

    def updates(rate: jax.Array, mine: Peft, gradient: Tree, adapter: Tree) -> Tree:
        labels = mine.labels(adapter)
        (gradient, _), (leaves, _) = partition(gradient, labels), partition(adapter, labels)
        own = optax.with_extra_args_support(rated(tx, rate))
        state = own.init(leaves)
        for _ in range(2):
            change, state = own.update(gradient, state, leaves)
            leaves = optax.apply_updates(leaves, change)
        return leaves

    @jax.jit
    def error(key: jax.Array) -> jax.Array:
        values = [_normal(small, k) for k in jax.random.split(key)]
        alone = updates(jnp.float32(0.1), small, *values)
        inside = updates(jnp.float32(0.1), peft, *(pad(peft, small, tree) for tree in values))
        wanted = flatten(pad(peft, small, unflatten(flatten(values[1]) | flatten(alone))))
        errors = [
            jnp.abs(x.astype(jnp.float32) - wanted[p].astype(jnp.float32)).max() for p, x in flatten(inside).items()
        ]
        return jnp.stack(errors).max()

    found = float(error(jax.random.key(0)))
    if not found <= 1e-3:
        raise ValueError(
            "tx does not treat a smaller rank in the leaves of a larger one as it would alone: its updates depend on "
            f"the size of a leaf, as Adafactor's and Muon's do (they differ by {found:.2g}); give all members of "
            f"{peft.method.name} one rank, or another optimizer"
        )


def _normal(peft: Peft, key: jax.Array) -> Any:
    """An adapter of random values."""
    keys = jax.random.split(key, len(peft.structure))
    return unflatten(
        {
            path: (0.02 * jax.random.normal(k, shape)).astype(dtype)
            for k, (path, (shape, dtype)) in zip(keys, peft.structure, strict=True)
        }
    )
