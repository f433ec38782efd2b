"""Adapters of a base that has grown: a model whose tree has parts that the base of an adapter did not have.

An earlier version read encoders without their pooler. An adapter from then is valid as it is if the model's output does
not depend on the new parts, and it says nothing about them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval as pe

from jpeft.core.fingerprint import difference
from jpeft.core.peft import Peft
from jpeft.core.targets import ALL_LINEAR
from jpeft.core.tree import Path, Tree, flatten, join, split_arrays, split_variables, unflatten
from jpeft.methods.base import Method
from jpeft.methods.chain import Chain


def new_leaves(saved: Mapping[str, str], params: Tree) -> dict[Path, Any]:
    """The leaves that the base with the fingerprint ``saved`` lacks, if it has all others.

    >>> new_leaves({}, {"pooler": jax.numpy.zeros(2)}).keys()
    dict_keys([('pooler',)])
    """
    leaves = flatten(params)
    new = {path: leaf for path, leaf in leaves.items() if join(path) not in saved}
    old = unflatten({path: leaf for path, leaf in leaves.items() if path not in new})
    return {} if new and difference(dict(saved), old) else new


def with_sites(method: Method, peft: Peft, names: Sequence[str]) -> Method:
    """The method of a Peft, acting on the sites that an adapter names.

    Sites that the adapter lacks are excluded. Those that it has beside them go to the first member that takes all
    linear weights: what these are differs between versions.
    """
    missing = [name for name in names if name not in {a.site.name for a in peft.actions}]
    members: list[Method] = []
    for i, member in enumerate(method.methods()):
        own = [a.site.name for a in peft.actions if a.member == i]
        if missing and (member.targets or member.default_targets()) == ALL_LINEAR:
            kept = [name for name in own if name in names]
            members.append(dataclasses.replace(member, targets=(*kept, *missing)))
            missing = []
        else:
            members.append(_without(member, [name for name in own if name not in names]))
    return Chain(*members) if len(members) > 1 else members[0]


def _without(member: Method, names: Collection[str]) -> Method:
    """A method that excludes sites by name."""
    given: Any = getattr(member, "exclude", None)
    if not names:
        return member
    if isinstance(given, str):
        given = "|".join(f"(?:{pattern})" for pattern in (given, *map(re.escape, names)))
    else:
        given = (*(given or ()), *names)
    return dataclasses.replace(member, exclude=given)  # type: ignore[type-var]


def depends_on(peft: Peft, variables: Tree, leaves: Mapping[Path, Any], inputs: Sequence[Any], kwargs: Any) -> bool:
    """Whether the output of a Peft depends on some leaves of the base."""
    arrays, restore = split_arrays((tuple(inputs), dict(kwargs)))
    params, others = peft.frontend.tree(variables), {}
    if not peft.frontend.holds_params:
        params, others = split_variables(variables)
    rest = {path: leaf for path, leaf in flatten(params).items() if path not in leaves}

    def run(new: Any, rest: Any, adapter: Any, arrays: Sequence[Any]) -> Any:
        inputs, kwargs = restore(arrays)
        tree = unflatten({**rest, **new})
        return peft.apply({**others, "params": tree} if others else tree, adapter, *inputs, **kwargs)

    new, rest = jax.eval_shape(lambda: (dict(leaves), rest))
    adapter = peft.init(jax.random.key(0), unflatten({**rest, **new}))
    jaxpr = jax.make_jaxpr(run)(new, rest, adapter, arrays).jaxpr
    _, used = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used[: len(jax.tree.leaves(new))])
