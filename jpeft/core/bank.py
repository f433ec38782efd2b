"""Bank: many adapters over one base, stacked on an axis of slots, so that each row of a batch runs under its own."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer
from jax.sharding import NamedSharding

from jpeft.checks import is_int, shown
from jpeft.core.actions import Action, cast_leaves, layer_mask
from jpeft.core.fitting import leaf_factors, padded, pairs, scaled
from jpeft.core.peft import Peft
from jpeft.core.placement import place, trimmed
from jpeft.core.rows import PerRow
from jpeft.core.tree import Path, Tree, all_finite, flatten, join, named_sharding, nearest, unflatten

Given = Any  # an adapter, or a pair of its own Peft and the adapter

_TREE = functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "on"],
    meta_fields=["peft", "source", "slots"],
    drop_fields=["names"],
)


@_TREE
@dataclass(frozen=True, eq=False)
class Bank(PerRow):
    """Adapters of one Peft in slots, of which slot 0 is the base and changes nothing. `stack` makes it.

    A bank is a tree, and its leaves are arrays with an axis of slots in front; another adapter in it compiles nothing
    new. The names of adapters are not part of the tree: in a function that is jitted over a bank, rows are chosen by
    the integers of `ids`.

    Attributes:
      leaves: the tree of the adapters' leaves, ``[slots, ...]``. What the configuration alone gives is held once,
        without the axis.
      on: for each slot and action of ``source``, whether the adapter acts there, ``[slots, actions]``.
      peft: the Peft under which the model runs with the adapter of a slot, see `row`.
      source: the Peft that the bank was made with.
      slots: the number of slots, that of the base among them.
      names: the slot of each adapter, by its name; None in a function that is jitted over the bank.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((3, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.LoRA(rank=2, init_weights="random", targets="layers_0").bind(model, params, x)
    >>> fr, de, it = (peft.init(jax.random.key(seed), params) for seed in (1, 2, 3))
    >>> bank = jpeft.stack(peft, {"fr": fr, "de": de}, slots=8)
    >>> y = peft.apply(params, bank, x, adapter_ids=["fr", None, "de"])
    >>> bool(jnp.allclose(y[:1], peft.apply(params, fr, x[:1]), atol=1e-6))
    True
    >>> bank = bank.unload("fr").load("it", it)
    >>> bank.names == {"de": 2, "it": 1}, bank.ids([None, "it"]).tolist()
    (True, [0, 1])
    """

    leaves: Any
    on: Any
    peft: Peft
    source: Peft
    slots: int
    names: Mapping[str, int] | None = None

    # --- loading --------------------------------------------------------------------------------------------------

    def load(self, name: str, adapter: Given) -> Bank:
        """The bank with one more adapter, or another one under a name that it has.

        Args:
          name: its name.
          adapter: an adapter of the bank's Peft; or ``(peft, adapter)`` with a Peft of its own, whose ranks are
            smaller, whose scales differ, or which has some of the bank's methods or sites alone.

        Raises:
          ValueError: no slot is free; the adapter does not fit, or holds NaN or infinities.
        """
        names = self._names()
        slot = names.get(_checked(name)) or self._free_slot(name)
        try:
            leaves, on = _fitted(self.source, adapter)
            self._check_held(leaves)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        own = {p: leaves.get(p, x) for p, x in self._neutral.items()}
        return self._with(slot, own, on, {**names, name: slot})

    def unload(self, name: str) -> Bank:
        """The bank without an adapter, whose slot is free.

        Raises:
          ValueError: there is no adapter of this name.
        """
        slot = self._slot(name)
        others = {n: other for n, other in self._names().items() if n != name}
        return self._with(slot, self._neutral, np.zeros(self.on.shape[1:], bool), others)

    def _with(self, slot: int, leaves: Mapping[Path, Any], on: Any, names: Mapping[str, int]) -> Bank:
        stacked = {p: self._flat[p] for p in leaves}
        changed, on = _put(stacked, self.on, dict(leaves), jnp.asarray(on), jnp.int32(slot))
        return replace(self, leaves=unflatten({**self._flat, **changed}), on=on, names=MappingProxyType(dict(names)))

    def _names(self) -> Mapping[str, int]:
        if self.names is None:
            raise ValueError(
                "the names of a bank's adapters are not known inside of jax.jit: take slots = bank.ids([...]) outside, "
                "and give the function these integers"
            )
        return self.names

    def _free_slot(self, name: str) -> int:
        taken = set(self._names().values())
        free = next((slot for slot in range(1, self.slots) if slot not in taken), None)
        if free is None:
            raise ValueError(
                f"the bank is full: its {self.slots - 1} slots beside the base's hold {_listed(self._names())}; unload "
                f"one before {name!r}, or stack with more slots"
            )
        return free

    def _check_held(self, leaves: Mapping[Path, Any]) -> None:
        for path, held in self._flat.items():
            if path not in self._stacked and path in leaves and not _same(held, leaves[path]):
                raise ValueError(
                    f"its leaf {join(path)!r} is another than that of the bank, which holds it once for all adapters: "
                    "it is of another configuration, or not as that gives it; stack it with the others from the start"
                )

    @functools.cached_property
    def _stacked(self) -> frozenset[Path]:
        """The paths of the leaves that have an axis of slots."""
        sizes = dict(self.source.structure)
        return frozenset(p for p, x in self._flat.items() if np.ndim(x) == len(sizes[p][0]) + 1)

    @functools.cached_property
    def _flat(self) -> dict[Path, Any]:
        return flatten(self.leaves)

    @functools.cached_property
    def _neutral(self) -> dict[Path, Any]:
        """The leaves of a free slot, but for those that are held once."""
        shapes = {p: (x.shape[1:], x.dtype) for p, x in self._flat.items() if p in self._stacked}
        return _neutral(self.source, shapes)

    # --- rows -----------------------------------------------------------------------------------------------------

    def ids(self, names: Iterable[Any]) -> np.ndarray:
        """The slots of adapters by their names; None is the base.

        Args:
          names: names, None, or integers, which are slots.

        Raises:
          ValueError: a name or a slot that the bank does not have; None, where the method has no neutral adapter.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(f"adapter_ids must have the name of an adapter or None for each row, got {shown(names)}")
        return np.asarray([self._slot(name) for name in names], np.int32)

    def _slot(self, name: Any) -> int:
        if isinstance(name, str):
            names = self._names()
            if name not in names:
                hint = nearest(name, names) or f"; it holds {_listed(names)}"
                raise ValueError(f"the bank has no adapter {name!r}{hint}")
            return names[name]
        if name is not None and (not isinstance(name, numbers.Integral) or isinstance(name, bool)):
            raise ValueError(f"adapter_ids must be names of adapters, None or slots, got {shown(name)}")
        slot = 0 if name is None else int(name)
        known = range(1, self.slots) if self.names is None else self.names.values()
        if slot and slot not in known:
            raise ValueError(f"the bank has no adapter in slot {slot}, of {self.slots}")
        if not slot and (added := _unmaskable(self.source)):
            raise ValueError(
                f"{added} puts virtual tokens before every text, and has no neutral adapter for rows of the base: run "
                "those by themselves, without the bank"
            )
        return slot

    def row(self, slot: Any, params: Tree = None) -> dict[str, Any]:
        """The adapter in a slot, for ``peft``.

        Args:
          slot: the slot, an integer or a traced one.
          params: the base; needed where adapters hold leaves in place of the base's.
        """
        return self.take(jnp.asarray(slot), params)

    def take(self, slots: jax.Array, params: Tree = None) -> dict[str, Any]:
        """The adapters in slots, for ``peft``: the axes of ``slots`` in front of leaves that are not held once.

        Args:
          slots: integers ``[...]``.
          params: as for `row`.
        """
        sites = [a.site.path for a in self.source.actions if a.site.kind == "leaf"]
        if sites and params is None:
            raise ValueError("the adapters hold leaves in place of the base's: give params, too")
        base = flatten(self.source.frontend.tree(params)) if sites else {}
        return _take(self, slots, {path: meta.unbox(base[path]) for path in sites})

    @property
    def axes(self) -> Any:
        """The ``in_axes`` of the adapters that `take` gives, for `jax.vmap`: 0, and None for leaves held once."""
        masks = {a.leaf_path(a.mask) for a in self.source.actions if _is_masked(a)}
        held = self._flat.keys() - self._stacked - masks
        return unflatten({p: None if p in held else 0 for p, _ in self.peft.structure})


@jax.jit
def _take(bank: Bank, slots: jax.Array, base: Mapping[Path, Any]) -> dict[str, Any]:
    """See `Bank.take`; ``base`` are the base's leaves in whose place adapters have theirs."""
    # A slot that is not there gives NaN, not the adapter of another one; what is traced cannot raise.
    known = jnp.where((slots >= 0) & (slots < bank.slots), slots, bank.slots)
    leaves = {p: x.at[known].get(mode="fill") if p in bank._stacked else x for p, x in bank._flat.items()}
    on = bank.on.at[known].get(mode="fill", fill_value=True)
    for i, action in enumerate(bank.source.actions):
        here = on[..., i]
        if action.site.kind == "leaf":
            path = action.site.path
            own = base[path].astype(leaves[path].dtype)
            leaves[path] = jnp.where(_wide(here, own.ndim), leaves[path], own)
        elif _is_masked(action):
            path, whole = action.leaf_path(action.mask), layer_mask(action.site)
            leaves[path] = _wide(here, whole.ndim) & leaves.get(path, whole)
    return unflatten(leaves)


def stack(peft: Peft, adapters: Mapping[str, Given], slots: int | None = None, dtype: Any = None) -> Bank:
    """Adapters over one base in a `Bank`, to run each row of a batch under its own.

    Ranks and sizes of bottlenecks pad to those of ``peft``, and scales are folded into leaves; methods that differ are
    members of a `jpeft.Chain`, of which an adapter may have some alone. All of this is exact.

    Args:
      peft: the bound method.
      adapters: by name, adapters of ``peft``; or pairs ``(peft, adapter)`` of others, see `Bank.load`.
      slots: the number of slots, one for the base among them; by default as many as there are adapters, and one.
      dtype: the dtype of floating leaves; None keeps theirs. Decoding reads all of them at each step, so that the dtype
        of the computation is faster.

    Raises:
      ValueError: there are more adapters than slots; an adapter does not fit, or holds NaN or infinities.

    >>> # bank = jpeft.stack(peft, {"fr": fr, "de": (peft_of_rank_4, de)}, slots=8)
    >>> # peft.apply(params, bank, x, adapter_ids=["fr", None, "de"])
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"stack(peft, adapters): adapters must be a mapping by name, got {shown(adapters)}")
    slots = len(adapters) + 1 if slots is None else slots
    if not is_int(slots) or slots < len(adapters) + 1:
        raise ValueError(
            f"slots must be at least {len(adapters) + 1}, for {len(adapters)} adapters and the base, got {shown(slots)}"
        )
    found = {}
    for name, given in adapters.items():
        try:
            found[name] = _fitted(peft, given)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
    leaves, on = _stacked_leaves(peft, list(found.values()), slots, dtype)
    names = {_checked(name): slot for slot, name in enumerate(found, start=1)}
    return Bank(unflatten(leaves), on, _masked(peft), peft, slots, MappingProxyType(names))


def _stacked_leaves(peft: Peft, found: list[Any], slots: int, dtype: Any) -> tuple[dict[Path, Any], Any]:
    structure = {p: (shape, np.dtype(d)) for p, (shape, d) in peft.structure}
    neutral, once = _neutral(peft, structure), _held_once(peft, [leaves for leaves, _ in found])
    uncast = _uncast(peft)
    out: dict[Path, Any] = {}
    for path in structure:
        if path in once:
            out[path] = once[path]
            continue
        rows = [neutral[path], *(leaves.get(path, neutral[path]) for leaves, _ in found)]
        rows += [neutral[path]] * (slots - len(rows))
        rows = [jnp.asarray(x, structure[path][1]) for x in rows]
        stacked = jnp.stack(rows)
        if dtype is not None and path not in uncast:
            stacked = cast_leaves({"": stacked}, dtype)[""]
        sharding = next((s for leaves, _ in found if (s := named_sharding(leaves.get(path))) is not None), None)
        out[path] = stacked if sharding is None else place(stacked, _behind_slots(sharding))
    on = np.zeros((slots, len(peft.actions)), bool)
    for slot, (_, own) in enumerate(found, start=1):
        on[slot] = own
    return out, jnp.asarray(on)


def _behind_slots(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, trimmed([None, *sharding.spec]))


def _fitted(peft: Peft, given: Given) -> tuple[dict[Path, Any], np.ndarray]:
    """The leaves of an adapter in the shapes of ``peft``, and the actions that it has."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Peft):
        other, adapter = given
    else:
        other, adapter = peft, given
    _check_finite(other.check(adapter))
    if other == peft:
        leaves = {p: meta.unbox(x) for p, x in peft.check(adapter).items()}
        return leaves, np.ones(len(peft.actions), bool)
    leaves = scaled(padded(peft, other, adapter), leaf_factors(peft, other))
    has = {id(action) for action, _ in pairs(peft, other)}
    on = np.asarray([id(action) in has for action in peft.actions], bool)
    if left := [a for a, is_on in zip(peft.actions, on, strict=True) if not is_on and a.method.virtual_tokens()]:
        raise ValueError(f"it has no {left[0].method.name}, whose virtual tokens come before every text of the bank")
    return leaves, on


def _check_finite(leaves: Mapping[Path, Any]) -> None:
    for path, leaf in leaves.items():
        leaf = meta.unbox(leaf)
        if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if not bool(all_finite(leaf)):
            raise ValueError(f"its leaf {join(path)!r} holds NaN or infinities")


@functools.partial(jax.jit, donate_argnums=())
def _put(stacked: Any, on: jax.Array, leaves: Any, own: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array]:
    changed = jax.tree.map(lambda bank, x: bank.at[slot].set(x.astype(bank.dtype)), stacked, leaves)
    return changed, on.at[slot].set(own)


def _held_once(peft: Peft, adapters: list[Mapping[Path, Any]]) -> dict[Path, Any]:
    """The leaves that the configuration gives, if all adapters have them so."""
    base = {
        a.site.weight_path: jax.ShapeDtypeStruct(a.site.stored, np.dtype(a.site.dtype))
        for a in peft.actions
        if a.site.stored
    }
    own = peft.regenerated(base)
    return {p: jnp.asarray(x) for p, x in own.items() if all(_same(a[p], x) for a in adapters if p in a)}


def _same(a: Any, b: Any) -> bool:
    a, b = meta.unbox(a), meta.unbox(b)
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return a is b
    return np.shape(a) == np.shape(b) and np.array_equal(np.asarray(a), np.asarray(b))


def _neutral(peft: Peft, shapes: Mapping[Path, Any]) -> dict[Path, Any]:
    """Leaves under which nothing changes, where methods have such a number, and otherwise any finite ones."""
    fills: dict[Path, float] = {}
    for action in peft.actions:
        fills |= {action.leaf_path(n): action.method.neutral or 0.0 for n in action.stored}
    return {p: np.full(shape, fills.get(p, 0.0), dtype) for p, (shape, dtype) in shapes.items()}


def _uncast(peft: Peft) -> frozenset[Path]:
    return frozenset(a.leaf_path(n) for a in peft.actions for n in a.stored if n in a.method.uncast)


def _is_masked(action: Action) -> bool:
    """Whether an action in a bank has a mask, by which it does nothing in some rows."""
    return action.site.kind != "leaf" and action.method.neutral is None and not action.method.virtual_tokens()


def _unmaskable(peft: Peft) -> str:
    """The name of a method that adds virtual tokens; empty without one."""
    return next((m.name for m in peft.method.methods() if m.virtual_tokens()), "")


def _masked(peft: Peft) -> Peft:
    """The Peft with a mask at each site of a method that has no neutral leaves."""
    actions, structure = [], dict(peft.structure)
    for action in peft.actions:
        if _is_masked(action) and action.mask not in action.stored:
            site = replace(action.site, layers=tuple(range(action.site.stack[0][1] if action.site.stack else 1)))
            action = replace(action, site=site, stored=(*action.stored, action.mask))
            structure[action.leaf_path(action.mask)] = (layer_mask(site).shape, "bool")
        actions.append(action)
    return replace(peft, actions=tuple(actions), structure=tuple(structure.items()))


def _wide(on: jax.Array, ndim: int) -> jax.Array:
    return on.reshape(*on.shape, *(1 for _ in range(ndim)))


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"an adapter's name must be a string that is not empty, got {shown(name)}")
    return name


def _listed(names: Mapping[str, int]) -> str:
    shown_names = [repr(name) for name in names]
    more = f" and {len(shown_names) - 8} more" if len(shown_names) > 8 else ""
    return ", ".join(shown_names[:8]) + more if shown_names else "none"
