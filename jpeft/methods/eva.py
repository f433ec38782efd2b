"""EVA's ranks: the sites whose inputs have many large directions get more (Paischl et al. 2024,
https://arxiv.org/abs/2410.07170). Its start of A is ``LoRA(init_weights="eva")``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.checks import is_number
from jpeft.core.sites import Site
from jpeft.core.statistics import LowRank
from jpeft.core.targets import Targets, matches_entry
from jpeft.methods.base import LAYERS, override_matches
from jpeft.methods.lora import LoRA


def redistribute(method: LoRA, statistics: Mapping[str, Mapping[str, Any]], rho: float = 2.0) -> LoRA:
    """The method with other ranks for its sites, of the same sum.

    All sites' directions compete by the part of their inputs' variance that they explain; the best get the ranks. A
    site has at most ``rho`` times its rank, and is excluded where it gets none. Where a model stacks layers, those of a
    site that it acts on have one rank, by their mean. The scales stay what they are. Sketched statistics tell the main
    directions, and so the ranks, as well.

    Args:
      method: a LoRA, mostly with ``init_weights="eva"``.
      statistics: as from `jpeft.observe`, with the covariance of the inputs of every site.
      rho: 1 leaves the ranks as they are.

    Raises:
      ValueError: a ``rho`` below 1; statistics without covariances; an ``exclude`` that is a function.

    >>> import jpeft, numpy as np
    >>> seen = {"query": {"covariance": np.diag([8.0, 1, 1])}, "value": {"covariance": np.diag([4.0, 4, 2])}}
    >>> {name: dict(own) for name, own in redistribute(jpeft.LoRA(rank=2), seen).overrides.items()}
    {'query': {'rank': 1}, 'value': {'rank': 3}}
    """
    if not is_number(rho) or rho < 1:
        raise ValueError(f"rho must be a number of at least 1, got {rho!r}")
    own: dict[str, Any] = {}
    candidates: list[tuple[float, str, int]] = []
    layers: dict[str, tuple[int, ...]] = {}
    budget = 0
    for name, found in statistics.items():
        if "covariance" not in found:
            raise ValueError(f"the statistics of {name!r} hold {', '.join(found)}, ranks depend on the covariance")
        site = _site(name)
        own[name] = method.at(site)
        variances = _variances(found["covariance"])
        if (chosen := method.fields_at(site).get(LAYERS)) is not None:
            layers[name] = chosen
            variances = variances[list(chosen)]
        explained = (variances / variances.sum(-1, keepdims=True)).reshape(-1, variances.shape[-1])
        budget += own[name].rank * len(explained)
        best = explained.mean(0)[: round(own[name].rank * rho)]
        candidates += [(float(part), name, len(explained)) for part in best]
    ranks = dict.fromkeys(own, 0)
    for _, name, matrices in sorted(candidates, key=lambda c: -c[0]):
        if matrices <= budget:
            ranks[name], budget = ranks[name] + 1, budget - matrices
    overrides = {
        _key(name, own): _fields(method, own[name], n) | ({LAYERS: layers[name]} if name in layers else {})
        for name, n in ranks.items()
        if n
    }
    without = _excluding(method.exclude, [name for name, n in ranks.items() if not n])
    left_out = [pattern for pattern in method.overrides if _only(pattern, ranks)]
    others = {p: fields for p, fields in method.overrides.items() if p not in overrides and p not in left_out}
    return dataclasses.replace(method, overrides={**overrides, **others}, exclude=without)


def _site(name: str) -> Site:
    return Site(tuple(name.split("/")), "weight")


def _variances(covariance: Any) -> np.ndarray:
    """The variances of inputs along their main directions, the largest first."""
    if isinstance(covariance, LowRank):  # F Fᵀ
        return np.linalg.svd(np.asarray(covariance.left, np.float64), compute_uv=False) ** 2
    return np.linalg.eigvalsh(np.asarray(covariance, np.float64))[..., ::-1]


def _only(pattern: str, ranks: Mapping[str, int]) -> bool:
    """Whether a pattern matches sites without rank, and no others."""
    matched = [n for name, n in ranks.items() if override_matches(pattern, _site(name))]
    return bool(matched) and not any(matched)


def _key(name: str, names: Mapping[str, Any]) -> str:
    """A pattern that matches one of several names."""
    clash = any(other != name and matches_entry(name, other) for other in names)
    return f"^{re.escape(name)}" if clash else name


def _fields(method: LoRA, own: Any, rank: int) -> dict[str, Any]:
    """The fields of a site's own, with another rank and the same scale but for rsLoRA's root of the rank."""
    fields = {name: getattr(own, name) for name in method.per_site if getattr(own, name) != getattr(method, name)}
    alpha = {} if own.alpha is None else {"alpha": own.alpha * rank / own.rank}
    return {**fields, **alpha, "rank": rank}


def _excluding(exclude: Targets, names: list[str]) -> Targets:
    if not names:
        return exclude
    if callable(exclude):
        raise ValueError(f"{names[0]!r} gets no rank, which cannot be added to an exclude that is a function")
    before = [f"(?:{exclude})"] if isinstance(exclude, str) else [f"(?:.*/)?{re.escape(e)}" for e in exclude or ()]
    return "|".join([*before, *map(re.escape, names)])
