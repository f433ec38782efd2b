"""Puts an adapter into a copy of an NNX model, and takes it out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft.core.actions import Action, by_weight, merge_stored
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized, unreadable
from jpeft.core.sites import BOX, FUSED, MERGE, derive_entries
from jpeft.core.tree import Path, Tree, flatten, join, unflatten
from jpeft.nnx import attention
from jpeft.nnx.adapted import methods_of, original, subclass
from jpeft.nnx.dropout import KEY, RNGS, key_data
from jpeft.nnx.inject import CHANGES, ROOT, Changes, Read, Root, Token, read, run
from jpeft.nnx.state import (
    become,
    copied,
    is_opaque,
    modules,
    own_metadata,
    put,
    raw,
    remove,
    sharding_names,
    to_tree,
    variables,
)
from jpeft.nnx.variables import AdapterParam, DropoutKey, FrozenAdapterParam


class Plain(Protocol):
    """The maker of a model without an adapter over some parameters."""

    def plain(self, params: Any, rest: Any = None) -> Any: ...


def adapted_module(
    peft: Peft,
    model: Plain,
    params: Any,
    adapter: Tree,
    *,
    rest: Any = None,
    dropout: Any = None,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """A new module like the model, over the same arrays, with an adapter in it.

    Args:
      peft: the bound method.
      model: makes the model without an adapter.
      params: the parameters.
      adapter: the adapter.
      rest: the model's other state; None for that with which the method was bound.
      dropout: a PRNG key for the dropout of one call.
      rngs: for the dropout of all calls, in place of ``dropout``: each draws from it, while the model trains.
    """
    base, leaves = flatten(to_tree(params)), peft.check(adapter)
    _merge(peft, base, leaves, stateful=rngs is not None)
    module = model.plain(unflatten(base), rest)
    return _Builder(peft, module, base, leaves, rngs is not None).build(dropout, rngs)


def _merge(peft: Peft, base: dict[Path, Any], leaves: Mapping[Path, Any], stateful: bool) -> None:
    """Merges weights that the model reads through no attribute of a module.

    Raises:
      ValueError: a weight is quantized, or the adapter is to train in the module.
    """
    for path, actions in by_weight(peft.actions, (MERGE,)).items():
        site = actions[0].site
        if stateful:
            raise ValueError(
                f"{join(path)!r} is not read as it is, as an attribute of its module, so that its change cannot be "
                f"computed where it is read; use peft.apply, or leave it out with exclude=[{site.name!r}]"
            )
        if isinstance(base[path], Quantized):
            raise ValueError(unreadable(path, base[path]))
        bias = base.get(site.bias_path) if site.bias_path else None
        own, shared = [peft.own(a, leaves) for a in actions], [peft.shared(a, leaves) for a in actions]
        base[path], added = merge_stored(actions, shared, own, base[path], bias)
        if site.bias_path is not None and added is not None:
            base[site.bias_path] = added


class _Builder:
    """Changes the modules of a copy of a model."""

    def __init__(self, peft: Peft, model: Any, base: Mapping[Path, Any], leaves: Mapping[Path, Any], stateful: bool):
        self.peft, self.model, self.base, self.leaves, self.stateful = peft, model, base, leaves, stateful
        self.modules = dict(modules(model))
        modes = [held["deterministic"] for m in self.modules.values() if "deterministic" in (held := vars(m))]
        self.evaluates = bool(modes) and all(mode is True for mode in modes)
        self.actions: dict[Path, list[Action]] = {}
        self.reads: dict[Path, list[Read]] = {}
        self.added: dict[Path, list[str]] = {}

    def build(self, dropout: Any, rngs: nnx.Rngs | None) -> Any:
        peft = self.peft
        for action in peft.actions:
            if action.site.kind == "leaf":
                self.replace(action)
            elif action.site.via != MERGE:
                self.hold(action)
        for path, actions in by_weight(peft.actions, (BOX,)).items():
            self.box(path, actions)
        self.guard()
        self.quantized()
        has_dropout = [a for a in peft.actions if a.method.draws]
        if dropout is not None or rngs is not None:
            self.drop(has_dropout, dropout if dropout is not None else jax.random.key(0))
        draws = rngs is not None and bool(has_dropout)
        needs_root = draws or bool(peft.entries) or any(a.needs_call and a.site.via != MERGE for a in peft.actions)
        if draws:
            assert rngs is not None
            self.put((), RNGS, nnx.Rngs(dropout=rngs.dropout()))
        if needs_root:
            self.root()
        self.change(Token() if needs_root else None)
        return self.model

    # --- what modules hold ---

    def put(self, path: Path, name: str, value: Any) -> None:
        """Adds an attribute to a module.

        Raises:
          ValueError: it has one of that name.
        """
        module = self.modules[path]
        if name in vars(module):
            raise ValueError(f"{join((*path, name))!r} is an attribute of the model, which an adapter needs")
        put(module, name, value)
        self.added.setdefault(path, []).append(name)

    def hold(self, action: Action) -> None:
        """Puts an action's leaves into its module."""
        path = action.site.path
        if action.site.via == FUSED:
            self.actions.setdefault(path, []).append(action)
        for name in action.stored:
            leaf = action.leaf_path(name)
            kind = FrozenAdapterParam if name in action.non_trainable else AdapterParam
            self.put(path, leaf[-1], kind(self.leaves[leaf], **_metadata(action, name, self.modules[path])))

    def replace(self, action: Action) -> None:
        """Puts a leaf that trains in the place of one of the base, in all modules that hold that."""
        path = action.site.path
        if path[:-1] not in self.modules:
            raise ValueError(
                f"{join(path)!r} is in no module but in a tuple or a dict of one, where nothing can take its place; "
                f"hold it in a nnx.List or nnx.Dict, or leave it out with exclude=[{join(path)!r}]"
            )
        old = vars(self.modules[path[:-1]])[path[-1]]
        new, dtype = AdapterParam(self.leaves[path], **own_metadata(old)), jnp.dtype(self.base[path].dtype)
        for own, name in self.holders(old):
            vars(self.modules[own])[name] = new
            self.reads.setdefault(own, []).append(Read(name, dtype=dtype))

    def holders(self, variable: nnx.Variable) -> list[tuple[Path, str]]:
        """The modules that hold a Variable, and its name in each."""
        return [(p, n) for p, module in self.modules.items() for n, v in variables(module).items() if v is variable]

    def box(self, path: Path, actions: Sequence[Action]) -> None:
        """Has a weight, and a bias that changes with it, merged whenever a module reads it."""
        owner, bias = path[:-1], actions[0].site.bias_path
        changed = {path[-1]} | ({bias[-1]} if bias and any(a.changes_bias for a in actions) else set())
        held = vars(self.modules[owner])
        for own, weight in self.holders(held[path[-1]]):
            # Another module that holds the weight needs the leaves too, and a bias that it shares.
            if own != owner:
                for action in actions:
                    for name in action.stored:
                        leaf = action.leaf_path(name)[-1]
                        self.put(own, leaf, held[leaf])
            names = {n: n for n in changed} if own == owner else {path[-1]: weight}
            beside = bias[-1] if bias and own == owner else None
            for name in names.values():
                self.reads.setdefault(own, []).append(Read(name, weight, beside, tuple(actions)))

    def guard(self) -> None:
        """Has weights that actions change in calls merged where the model reads them outside of these."""
        for path, actions in self.actions.items():
            known = {how.leaf for how in self.reads.get(path, ())}
            for leaf in dict.fromkeys(a.site.leaf for a in actions if a.site.kind == "weight"):
                own = tuple(a for a in actions if a.site.kind == "weight" and a.site.leaf == leaf)
                if leaf in known or not all(a.mergeable for a in own):
                    continue
                bias = own[0].site.bias_path
                names = [leaf, *([bias[-1]] if bias and any(a.changes_bias for a in own) else [])]
                reads = [Read(name, leaf, bias[-1] if bias else None, own, fused=True) for name in names]
                self.reads.setdefault(path, []).extend(reads)

    def quantized(self) -> None:
        """Has quantized weights dequantized as they are read."""
        for path, module in self.modules.items():
            known = {r.leaf for r in self.reads.get(path, ())}
            for name, variable in variables(module).items():
                if isinstance(raw(variable), Quantized) and name not in known:
                    self.reads.setdefault(path, []).append(Read(name))

    def drop(self, actions: Iterable[Action], key: Any) -> None:
        """Puts PRNG keys for dropout into the modules, and a flag that turns it off."""
        for action in actions:
            module = self.modules[action.site.path]
            if KEY not in vars(module):
                self.put(action.site.path, KEY, DropoutKey(key_data(key, action.site)))
            if self.stateful and "deterministic" not in vars(module):
                self.put(action.site.path, "deterministic", self.evaluates)

    def root(self) -> None:
        """Puts the leaves that sites share into the root."""
        shared = []
        frozen = self.peft.non_trainable_paths
        for path in self.peft.shared_paths:
            attribute = f"jpeft_{path[0]}_{path[1]}"
            self.put((), attribute, (FrozenAdapterParam if path in frozen else AdapterParam)(self.leaves[path]))
            shared.append((attribute, *path))
        context = any(a.method.reads_context for a in self.peft.actions)
        self.put((), ROOT, nnx.static(Root(tuple(shared), context, self.peft.entries)))

    # --- classes ---

    def change(self, token: Token | None) -> None:
        """Gives the modules their classes, and what these need."""
        changed = {*self.actions, *self.reads, *self.added}
        if not is_opaque(self.model):  # so that its modules find that it runs
            changed.add(())
        for path in changed:
            module, actions, reads = self.modules[path], self.actions.get(path, ()), self.reads.get(path, ())
            uses_token = (
                path == () or any(a.needs_call for a in actions) or any(a.needs_call for r in reads for a in r.actions)
            )
            added = tuple(self.added.get(path, ()))
            own = Changes(tuple(actions), tuple(reads), token if uses_token else None, added)
            put(module, CHANGES, nnx.static(own))
            attributes = [r.leaf for r in reads]
            if any(a.site.kind == "attention" for a in actions) and attention.ATTENTION_FN in vars(module):
                attributes.append(attention.ATTENTION_FN)
            cls = type(module)
            become(module, subclass(cls, run, tuple(methods_of(cls)), read, tuple(dict.fromkeys(attributes))))


def _metadata(action: Action, name: str, module: Any) -> dict[str, Any]:
    """The sharding names of an adapter's leaf, from its weight's."""
    site, roles = action.site, action.method.roles.get(name)
    if site.kind != "weight" or roles is None:
        return {}
    if (names := sharding_names(vars(module)[site.leaf])) is None:
        return {}
    return {"out_sharding": derive_entries(site, roles, names), "eager_sharding": False}


def readable(model: Any) -> Any:
    """A model whose quantized weights are dequantized as its modules read them; itself, changed, if it has some.

    Raises:
      ValueError: the model holds an adapter.
    """
    check_plain(model)
    for _, module in list(modules(model)):
        reads = tuple(Read(name) for name, v in variables(module).items() if isinstance(raw(v), Quantized))
        if reads and CHANGES not in vars(module):
            put(module, CHANGES, nnx.static(Changes(reads=reads)))
            cls, names = type(module), tuple(how.leaf for how in reads)
            become(module, subclass(cls, run, tuple(methods_of(cls)), read, names))
    return model


def check_plain(model: Any) -> None:
    """Checks that no module of a model has an adapter in it.

    Raises:
      ValueError: one has.
    """
    if any(own.holds_adapter for _, m in modules(model) if (own := vars(m).get(CHANGES)) is not None):
        raise ValueError(
            f"this {type(model).__name__} holds an adapter already; take it out with peft.detach(model), or bind a "
            "Chain of both methods"
        )


def of_own_classes(model: Any) -> Any:
    """A copy of a model without an adapter, of its own classes, over the same arrays."""
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, copied(state))
    for _, module in list(modules(copy)):
        if CHANGES in vars(module):
            become(module, original(type(module)))
            remove(module, CHANGES)
    return copy


# --- the way back -----------------------------------------------------------------------------------------------------


def adapter_variables(peft: Peft, model: Any) -> dict[Path, nnx.Variable]:
    """The Variables of an adapter in a module, by the path of the leaf.

    Raises:
      ValueError: the module holds no adapter of this Peft.
    """
    held, shapes = dict(modules(model)), {path: shape for path, (shape, _) in peft.structure}
    out: dict[Path, nnx.Variable] = {}
    places: dict[Path, tuple[Path, str]] = {p: ((), f"jpeft_{p[0]}_{p[1]}") for p in peft.shared_paths}
    for action in peft.actions:
        for name in action.stored:
            *owner, leaf = action.leaf_path(name)
            places[action.leaf_path(name)] = tuple(owner), leaf
    for path, (owner, name) in places.items():
        module = held.get(owner)
        variable = vars(module).get(name) if module is not None else None
        shape = shapes[path]
        fits = isinstance(variable, (AdapterParam, FrozenAdapterParam))
        if not fits or np.shape(raw(variable))[-len(shape) :] != shape:  # several that are stacked have an axis more
            raise ValueError(
                f"this {type(model).__name__} has no leaf {join(path)!r} of {peft.method.name} with shape {shape}; "
                "give a module that jpeft.nnx.attach made with this Peft"
            )
        out[path] = variable
    return out


def without_adapter(peft: Peft, model: Any) -> Any:
    """A new module of the model's own classes, over the same arrays, without the adapter."""
    adapter_variables(peft, model)
    graphdef, state = nnx.split(model)
    plain = nnx.merge(graphdef, copied(state))
    types = {path: type(v) for path, v in nnx.to_flat_state(peft.frontend.state)}  # type: ignore[attr-defined]
    types = {tuple(str(key) for key in path): kind for path, kind in types.items()}
    for path, module in list(modules(plain)):
        changes = vars(module).get(CHANGES)
        if changes is None:
            continue
        for how in changes.reads:
            if how.dtype is not None:
                old = vars(module)[how.leaf]
                value = raw(old).astype(how.dtype)
                kind = types.get((*path, how.leaf), nnx.Param)
                vars(module)[how.leaf] = kind(value, **own_metadata(old))
        become(module, original(type(module)))
        for name in (*changes.added, CHANGES):
            remove(module, name)
    return readable(plain)
