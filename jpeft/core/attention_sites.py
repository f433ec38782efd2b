"""The attentions of a model: those of registered modules, and those that the trace of its call shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jpeft.core.dataflow.attention import find
from jpeft.core.sites import FoundAttention, HiddenAttention, Site
from jpeft.core.survey import Record, scope_stack
from jpeft.core.tree import Path, join

_UNSEEN_CALL = "it lies in no call of a module that is seen"
_UNSEEN = "no softmax over its keys is seen"
Sites = tuple[tuple[Site, ...], tuple[HiddenAttention, ...]]


def attention_sites(record: Record, jaxpr: Any, origins: Sequence[str]) -> Sites:
    """The attentions of a model, and those that cannot be acted on.

    Args:
      record: the record of its call.
      jaxpr: the trace of the call.
      origins: what each input of the jaxpr is, see `jpeft.core.dataflow.attention.find`.
    """
    hidden: dict[Path, str] = {}
    calls: dict[int, list[Any]] = {}
    registered: dict[Path, Any] = {}
    outside = False
    for found in find(jaxpr, origins, {number: call.path for number, call in record.calls.items()}):
        if found.call is None:
            outside |= found.layout is not None
            continue
        caller = record.callers[found.call]
        if found.place < 0:  # followed no further, or in a kernel
            if not caller.hooked and (
                not found.kernel or _is_like_attention(found.kernel + _owner(record, caller.path))
            ):
                hidden.setdefault(caller.path, found.reason)
        elif not caller.hooked:
            calls.setdefault(found.call, []).append(found)
        elif found.layout is not None:
            registered.setdefault(caller.path, found.projections)
    sites = [_registered_site(record, path, registered.get(path, "")) for path in record.heads]
    by_method: dict[tuple[Path, str], list[tuple[Any, ...]]] = {}
    projections: dict[Path, list[Any]] = {}
    for number, own in calls.items():
        caller = record.callers[number]
        by_method.setdefault((caller.path, caller.name), []).append(tuple(a.layout for a in own))
        projections.setdefault(caller.path, [a.projections for a in own])
        for found in own:
            if found.reason:
                hidden.setdefault(caller.path, found.reason)
    for path in {path: None for path, _ in by_method}:
        methods = {name: layouts for (at, name), layouts in by_method.items() if at == path}
        if any(len(set(layouts)) > 1 for layouts in methods.values()):
            hidden[path] = "its calls attend in different ways"
        else:
            own = {name: layouts[0] for name, layouts in methods.items()}
            sites += _found_sites(record, path, own, projections[path] if len(methods) == 1 else ())
    if outside and not sites:  # all lie outside of the calls of modules
        hidden.setdefault((), _UNSEEN_CALL)
    sites = [site for site in sites if site.path not in record.flow.transformed and site.path not in hidden]
    known = {site.path for site in sites} | hidden.keys()
    for path, module in record.modules.items():
        if _is_like_attention(module.owner) and not any(p[: len(path)] == path for p in known):
            hidden[path] = _UNSEEN
    rest = [HiddenAttention(join(p), _owner(record, p), reason, reason != _UNSEEN) for p, reason in hidden.items()]
    return tuple(sites), tuple(rest)


def _registered_site(record: Record, path: Path, projections: Any) -> Site:
    site = Site(path=path, kind="attention", owner=_owner(record, path), stack=scope_stack(record, path))
    return dataclasses.replace(site, heads=record.heads[path], projections=_inside(path, projections))


def _found_sites(
    record: Record, path: Path, methods: dict[str, tuple[Any, ...]], projections: Sequence[Any]
) -> list[Site]:
    """The sites in one module: with a name of its own each, if there are several."""
    places = [(name, layouts, i) for name, layouts in methods.items() for i, layout in enumerate(layouts) if layout]
    return [
        Site(
            path=path,
            kind="attention",
            owner=_owner(record, path),
            leaf=f"attention_{i}" if len(places) > 1 else "",
            named=len(places) > 1,
            heads=layouts[place].heads,
            stack=scope_stack(record, path),
            attention=FoundAttention(name, layouts, place),
            projections=_inside(path, projections[place]) if projections else "",
        )
        for i, (name, layouts, place) in enumerate(places)
    ]


def _inside(path: Path, projections: Any) -> Any:
    """Projections whose parameters a module can read: those in the module and below; else why it cannot."""
    for one in () if isinstance(projections, str) else projections:
        for parameter in (one.weight, *(() if one.bias is None else (one.bias,))):
            if parameter[: len(path)] != path:
                return f"{join(parameter)!r} lies outside of it"
    return projections


def _owner(record: Record, path: Path) -> str:
    return record.modules[path].owner if path in record.modules else "Attention"


def _is_like_attention(name: str) -> bool:
    return any(part in name.lower() for part in ("attention", "attn", "mha", "flash"))
