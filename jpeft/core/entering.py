"""The outermost call of a model under methods that change its arguments and outputs: the same for every front end."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jpeft.core.actions import Action
from jpeft.core.method import Inputs, Leaves, Method, slugs
from jpeft.core.nested import first_array
from jpeft.core.signatures import signature_of
from jpeft.core.sites import Site, is_of_positions
from jpeft.core.tree import Path, join

CACHED = "cached"  # in the context: whether the model keeps keys and values of earlier calls
CONTINUES = "continues"  # whether the call continues a cache that an earlier call has begun

_continuing: contextvars.ContextVar[bool | None] = contextvars.ContextVar("continuing", default=None)


@contextlib.contextmanager
def continuing(continues: bool = True) -> Iterator[None]:
    """A context in which calls with a cache of keys and values continue it, or begin it: no matter how many tokens.

    Outside of it, a call with one token continues, and any other begins. A method that puts virtual tokens before a
    text does so where a cache begins. Enter it inside the function that is jitted.
    """
    token = _continuing.set(continues)
    try:
        yield
    finally:
        _continuing.reset(token)


@dataclass(frozen=True)
class Entry:
    """A method that has to do with the outermost call of its model. Static.

    Attributes:
      method: the method.
      sites: its sites.
      positions: the number of positions in the model's smallest table of positions; None without one.
      slug: the key of the leaves that its sites share.
    """

    method: Method
    sites: tuple[Site, ...]
    positions: int | None
    slug: str = ""


def entries(method: Method, actions: Sequence[Action], weights: Sequence[Site]) -> tuple[Entry, ...]:
    """The members of a method that have to do with the outermost call of a model.

    Args:
      method: the method.
      actions: its actions.
      weights: the model's weights, among which are its tables of positions.
    """
    tables = [site.inputs for site in weights if site.lookup and is_of_positions(site.name)]
    return tuple(
        Entry(member, tuple(a.site for a in actions if a.member == i), min(tables, default=None), slug)
        for i, (member, slug) in enumerate(zip(method.methods(), slugs(method), strict=True))
        if member.enters or member.arguments
    )


def model_kwargs(method: Method, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments without those that are the method's own."""
    own = {name for member in method.methods() for name in member.arguments}
    return {name: value for name, value in kwargs.items() if name not in own}


@dataclass(frozen=True)
class RootCall:
    """The outermost call of a model.

    Attributes:
      function: the method, with the module as its first argument.
      module: the module.
      has_cache: whether the module itself keeps keys and values of earlier calls.
      run: runs it: ``(args, kwargs, context) -> output``.
      outputs: computes the shapes of its outputs without methods: ``(args, kwargs) -> shapes``.
      plain: runs a method of the module without methods: ``(name, args, kwargs, path) -> outputs``, of the called one
        where the name is empty. With the path of a module, ``(outputs, output of the module)``.
      shared: the leaves that a member's sites share, by their key.
    """

    function: Any
    module: Any
    has_cache: bool
    run: Callable[[tuple[Any, ...], dict[str, Any], Mapping[str, Any]], Any]
    outputs: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    plain: Callable[[str, tuple[Any, ...], dict[str, Any], Path | None], Any]
    shared: Callable[[str], Leaves]


def run_root(call: RootCall, members: Sequence[Entry], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The outputs of a model's own call, which each member enters in turn, and leaves in the opposite order.

    Args:
      call: the call.
      members: the members that have to do with it.
      args: its positional arguments.
      kwargs: its keyword arguments, with those that are the members' own.
    """
    own = {name: kwargs[name] for entry in members for name in entry.method.arguments if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in own}
    named = _Named.of(call.function, call.module, args, kwargs)
    if named is None:  # no arguments of this method, which it says itself
        return call.run(args, kwargs, own)
    cached = call.has_cache or _holds_cache(named.arguments)
    continues = cached and _continues(named.arguments)
    arguments, context = named.arguments, {CACHED: cached, CONTINUES: continues, **own}
    entered = []
    for entry in members:
        if entry.method.enters:
            inputs = Inputs(
                arguments=arguments,
                model=call.module,
                accepted=named.accepted,
                sites=entry.sites,
                context=context,
                continues=continues,
                positions=_positions(entry, call.module),
                outputs=lambda given=arguments: call.outputs(*named.back(given)),
                shared=call.shared(entry.slug),
                run=functools.partial(_run_plain, call, named),
            )
            arguments, found = entry.method.enter(inputs)
            context |= found
            entered.append((entry.method, found))
    y = call.run(*named.back(arguments), {**arguments, **context})
    for method, found in reversed(entered):
        y = method.leave(y, {**context, **found})
    return y


def _run_plain(
    call: RootCall, named: _Named, arguments: Mapping[str, Any], method: str = "", at: str | None = None
) -> Any:
    """See `jpeft.core.method.Run`."""
    path = tuple(at.split("/")) if at else None
    if at == "":
        y = _run_plain(call, named, arguments, method)
        return None if y is None else (y, y)
    if not method:
        return call.plain("", *named.back(arguments), path)
    signature = signature_of(getattr(type(call.module), method))
    assert signature is not None
    given = {name: arguments[name] for name in signature.parameters if name in arguments}
    try:
        signature.bind(call.module, **given)
    except TypeError:
        return None
    return call.plain(method, (), given, path)


def not_called(path: Path) -> str:
    """The error of a pass that does not call a module."""
    return f"the model's call does not call a module {join(path)!r}; give the path of one that it calls"


def _positions(entry: Entry, module: Any) -> int | None:
    """The number of positions that a model has, by its tables and its configuration."""
    config = getattr(module, "config", None)
    # A configuration that scales its positions says how many it has then.
    own = (getattr(config, name, None) for name in ("context", "max_position_embeddings"))
    known = [entry.positions, next((n for n in own if isinstance(n, int)), None)]
    return min((n for n in known if n is not None), default=None)


def context_of(function: Any, module: Any, has_cache: bool, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, and whether the model keeps keys and values of earlier calls."""
    named = _Named.of(function, module, args, kwargs)
    found = dict(kwargs) if named is None else dict(named.arguments)
    cached = has_cache or _holds_cache(found)
    return {**found, CACHED: cached, CONTINUES: cached and _continues(found)}


@dataclass(frozen=True)
class _Named:
    """The arguments of a call by name.

    Attributes:
      arguments: those that were given.
      accepted: all that the function takes.
      signature: the function's signature.
      module: its first argument.
    """

    arguments: dict[str, Any]
    accepted: tuple[str, ...]
    signature: inspect.Signature
    module: Any

    @classmethod
    def of(cls, function: Any, module: Any, args: Any, kwargs: Mapping[str, Any]) -> _Named | None:
        """None for arguments that the function does not take."""
        signature = signature_of(getattr(function, "func", function))
        if signature is None:
            return None
        try:
            bound = signature.bind(module, *args, **kwargs)
        except TypeError:
            return None
        own, *names = signature.parameters
        found = dict(bound.arguments)
        found.pop(own)
        found |= found.pop(_kind(signature, inspect.Parameter.VAR_KEYWORD), {})
        found |= {f"{_MORE}{i}": x for i, x in enumerate(found.pop(_kind(signature, _VAR_POSITIONAL), ()))}
        return cls(found, tuple(names), signature, module)

    def back(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by name as positional and keyword arguments."""
        bound = self.signature.bind_partial(self.module)
        many, more = _kind(self.signature, _VAR_POSITIONAL), _kind(self.signature, inspect.Parameter.VAR_KEYWORD)
        rest = {}
        for name, value in arguments.items():
            if name.startswith(_MORE):
                bound.arguments[many] = (*bound.arguments.get(many, ()), value)
            elif name in self.accepted:
                bound.arguments[name] = value
            else:
                rest[name] = value
        if rest:
            bound.arguments[more] = rest
        return bound.args[1:], bound.kwargs


_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_MORE = "*"  # prefix of the names of arguments that a function takes by ``*args``


def _kind(signature: inspect.Signature, kind: Any) -> str:
    """The name of the parameter of this kind; empty without one."""
    return next((p.name for p in signature.parameters.values() if p.kind == kind), "")


def _holds_cache(arguments: Mapping[str, Any]) -> bool:
    held = (value for name, value in arguments.items() if "cache" in name or "past_key_values" in name)
    return any(value is not None and value is not False for value in held)


def _continues(arguments: Mapping[str, Any]) -> bool:
    if (given := _continuing.get()) is not None:
        return given
    tokens = first_array([x for x in arguments.values() if _is_tokens(x)], floating=False)
    return tokens is not None and tokens.shape[-1] == 1


def _is_tokens(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)
