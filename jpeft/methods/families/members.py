"""Compositions: methods whose members are methods at the same places, as AdapterHub's library composes adapters."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from jpeft.checks import shown
from jpeft.core.method import Leaves, ModuleContext
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import Matched, TargetError
from jpeft.core.tree import Path, flatten, join, like, peek, unflatten
from jpeft.methods.base import Method, OutputMethod

if TYPE_CHECKING:
    from jpeft.core.peft import Peft

Members = tuple[tuple[str, Any], ...]  # names and methods
Tokens = Float[Array, "*tokens features"]


@dataclass(frozen=True, kw_only=True)
class Composition(OutputMethod):
    """The base class of methods that are made of members, each with a name.

    A member's leaf ``down`` is ``<name>_down`` here, at a site and among those that sites share.
    """

    members: Any = ()  # given as a mapping, kept as pairs of name and method, since their order matters

    family: ClassVar[str] = "composition"
    kinds: ClassVar[tuple[str, ...]] = ("output",)  # of the sites that members may act at

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", _members(self.name, self.members))
        super().__post_init__()
        for field in ("targets", "exclude", "overrides"):
            if getattr(self, field):
                raise ValueError(f"{self.name} acts where its members do; give {field} to them")

    @property
    def named(self) -> dict[str, Method]:
        """The members by name."""
        return dict(self.members)

    @property
    def frozen_members(self) -> tuple[str, ...]:
        """The names of the members whose leaves never train."""
        return ()

    # --- where --------------------------------------------------------------------------------------------------------

    def sites(self, survey: Survey) -> list[Site]:
        (first, sites), *others = [(name, member.sites(survey)) for name, member in self.members]
        for site in sites:
            if site.kind not in self.kinds:
                raise ValueError(f"{self.name}: the member {first!r} acts on {_KINDS[site.kind]}; {self._hint}")
        for name, found in others:
            if found != sites:
                differing = [s.name for s in (*sites, *found) if s not in sites or s not in found]
                raise TargetError(
                    f"{self.name}: its members must act at the same places; {first!r} and {name!r} differ at "
                    f"{', '.join(map(repr, dict.fromkeys(differing[:8])))}: give both the same targets"
                )
        return sites

    _hint: ClassVar[str] = "its members act on the outputs of modules"

    def matched(self, survey: Survey, sites: Sequence[Site]) -> list[Matched]:
        return [found for _, member in self.members for found in member.matched(survey, sites)]

    def at(self, site: Site) -> Method:
        members = tuple((name, member.at(site)) for name, member in self.members)
        return self if members == self.members else dataclasses.replace(self, members=members)

    # --- leaves -------------------------------------------------------------------------------------------------------

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        out = dict(self.init_own(jax.random.fold_in(key, 0), site))
        for name, member in self.members:
            out |= _prefixed(name, member.init(_fold(key, name), site, w))
        return out

    def init_own(self, key: Key[Array, ""], site: Site) -> Leaves:
        """Fresh leaves at a site that are no member's."""
        return {}

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        out: dict[str, Any] = {}
        for name, member in self.members:
            out |= _prefixed(name, member.shared(_fold(key, name), sites))
        return out

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        out = {n: x for n, x in leaves.items() if self._member_of(n) is None}
        for name, member in self.members:
            own = part(leaves, name)
            out |= _prefixed(name, member.expand(site, part(shared, name), own) if member.expands else own)
        return out

    def check(self, site: Site, leaves: Leaves) -> None:
        for name, member in self.members:
            member.check(site, part(leaves, name))

    def trains(self, leaf: str) -> bool:
        name = self._member_of(leaf)
        if name is None:
            return super().trains(leaf)
        return name not in self.frozen_members and self.named[name].trains(leaf.removeprefix(f"{name}_"))

    def _member_of(self, leaf: str) -> str | None:
        return next((name for name, _ in self.members if leaf.startswith(f"{name}_")), None)

    def _names(self, attribute: str) -> frozenset[str]:
        """The members' leaves that one of their attributes names."""
        return frozenset(f"{name}_{leaf}" for name, member in self.members for leaf in getattr(member, attribute))

    @property
    def uncast(self) -> frozenset[str]:  # type: ignore[override]
        return self._names("uncast")

    @property
    def regenerated(self) -> frozenset[str]:  # type: ignore[override]
        return self._names("regenerated")

    @property
    def roles(self) -> Mapping[str, Any]:  # type: ignore[override]
        return FrozenDict({f"{n}_{leaf}": roles for n, member in self.members for leaf, roles in member.roles.items()})

    # --- what the members are -----------------------------------------------------------------------------------------

    @property
    def identity_at_init(self) -> bool:
        return all(member.identity_at_init for _, member in self.members)

    @property
    def reads_context(self) -> bool:  # type: ignore[override]
        return any(member.reads_context for _, member in self.members)

    @property
    def input_dropout(self) -> float:
        return max(member.input_dropout for _, member in self.members)

    @property
    def draws(self) -> bool:
        return any(member.draws for _, member in self.members)

    @property
    def expands(self) -> bool:
        return any(member.expands for _, member in self.members)

    @property
    def penalized(self) -> bool:
        return any(member.penalized for _, member in self.members)

    def penalty(self, leaves: Leaves) -> Float[Array, ""] | float:
        terms = [member.penalty(part(leaves, name)) for name, member in self.members if member.penalized]
        return sum(terms, 0.0)

    def to_dict(self) -> dict[str, Any]:
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "members"
        }
        members = [[name, member.to_dict()] for name, member in self.members]
        plain = {
            name: list(x) if isinstance(x, tuple) else dict(x) if isinstance(x, Mapping) else x
            for name, x in fields.items()
        }
        return {"method": self.name, "members": members, **plain}


_KINDS = {"weight": "weights", "attention": "attentions", "leaf": "leaves of the base"}


def _members(what: str, given: Any) -> Members:
    """Members as pairs, from a mapping or from pairs."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [tuple(pair) for pair in given]
    members: Members = tuple(pairs)  # type: ignore[assignment]
    if not members or not all(isinstance(member, Method) for _, member in members):
        raise ValueError(f"{what}.members must be methods by name, as in {{'fr': Bottleneck()}}; got {shown(given)}")
    names = [name for name, _ in members]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{what}.members: names become those of leaves, and must be identifiers; got {name!r}")
        if clash := next((other for other in names if other.startswith(f"{name}_")), None):
            raise ValueError(f"{what}.members: leaves of {name!r} and {clash!r} could have the same names; rename one")
    if len(set(names)) < len(names):
        raise ValueError(f"{what}.members: two have the same name; got {names}")
    for name, member in members:
        beyond = member.enters or member.arguments or getattr(member, "feeds", False)
        if len(member.methods()) != 1 or beyond or member.observes is not None:
            raise ValueError(
                f"{what}: {member.name} cannot be a member, as {name!r} is: a member is one method, which changes what "
                "leaves a module, not what enters it or the model, and starts without data"
            )
    return members


def changes(method: Composition, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> list[Tokens]:
    """The change of an output by each member alone."""
    return [member.change(part(leaves, name), x, y, context.part(i)) for i, (name, member) in enumerate(method.members)]


def part(leaves: Leaves, name: str) -> dict[str, Any]:
    """The leaves of one member, under its own names."""
    return {n.removeprefix(f"{name}_"): x for n, x in leaves.items() if n.startswith(f"{name}_")}


def _prefixed(name: str, leaves: Leaves) -> dict[str, Any]:
    return {f"{name}_{n}": x for n, x in leaves.items()}


def _fold(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


# --- trees ------------------------------------------------------------------------------------------------------------


def with_members(peft: Peft, adapter: Any, trained: Mapping[str, Any]) -> Any:
    """An adapter of a composition, with leaves of adapters that were trained for its members by themselves.

    Args:
      peft: a composition that is bound.
      adapter: an adapter of it, as from ``peft.init``.
      trained: for some or all of its members, by name, an adapter of the member's method on the same model.

    Raises:
      ValueError: there is no such member, or an adapter has other leaves than the member.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> fr, de = (jpeft.Bottleneck(targets="layers_0", size=n) for n in (2, 3))
    >>> members = {"fr": fr, "de": de}
    >>> trained = {name: m.bind(model, params, x).init(jax.random.key(1), params) for name, m in members.items()}
    >>> peft = jpeft.methods.AdapterFusion(members=members).bind(model, params, x)
    >>> adapter = jpeft.methods.with_members(peft, peft.init(jax.random.key(2), params), trained)
    >>> adapter["layers_0"]["de_bottleneck_down"].shape
    (8, 3)
    """
    method: Any = peft.method
    if not isinstance(method, Composition):
        raise ValueError(f"{peft.method.name} has no members; with_members is for Stack, Average and AdapterFusion")
    if unknown := sorted(set(trained) - set(method.named)):
        raise ValueError(f"{method.name} has no member {unknown[0]!r}; its members are {', '.join(method.named)}")
    out = flatten(adapter)
    for name, own in trained.items():
        given = flatten(own)
        places = _places(peft, name)
        if places.keys() != given.keys():
            path = min(places.keys() ^ given.keys())
            raise ValueError(
                f"the adapter of {name!r} {'lacks' if path in places else 'has no use for'} {join(path)!r}"
            )
        for path, place in places.items():
            if np.shape(peek(given[path])) != np.shape(peek(out[place])):
                raise ValueError(
                    f"the adapter of {name!r} has {join(path)!r} of shape {np.shape(peek(given[path]))}, and the "
                    f"member {np.shape(peek(out[place]))}"
                )
            out[place] = given[path].astype(jnp.dtype(peek(out[place]).dtype))
    return like(unflatten(out), adapter)


def _places(peft: Peft, name: str) -> dict[Path, Path]:
    """The paths of a member's leaves in the composition, by those that they have in an adapter of the member alone."""
    method: Any = peft.method
    prefix, own = f"{name}_", method.named[name].slug
    places = {
        action.leaf_path(leaf.removeprefix(prefix)): action.leaf_path(leaf)
        for action in peft.actions
        for leaf in action.stored
        if leaf.startswith(prefix)
    }
    shared = [path for path in peft.shared_paths if path[1].startswith(prefix)]
    return places | {(own, path[1].removeprefix(prefix)): path for path in shared}
