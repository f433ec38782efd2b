"""Adapters as LoRA: what any mergeable method does to a weight, as a product A B with its error.

    W' = merge(W)           the weight under the adapter
    D = W' - W = A B + E    A: [in, r], B: [r, out], error ‖E‖ / ‖D‖ in Frobenius' norm

A LoRA is copied, its scale folded into B. Of any other method D is decomposed, one matrix at a time: exactly where D
has a low rank (VeRA, AdaLoRA, a few trained rows of an embedding), else as its best approximation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft.core import stacking
from jpeft.core.actions import Action, merge_layer
from jpeft.core.geometry.base import Parts
from jpeft.core.interchange import HFSpec
from jpeft.core.peft import Peft
from jpeft.core.quantized import dequantize_leaf
from jpeft.core.sites import Site
from jpeft.core.tree import Path, Tree, flatten, unflatten
from jpeft.errors import UserError
from jpeft.methods.lora import LoRA

MAX_ERROR = 0.01
MAX_RANK = 64
_EXACT = 1e-6  # relative errors that float32 makes anyway
_FULL = 1024  # matrices with more rows and columns are decomposed by a random projection
_EXTRA, _ROUNDS = 16, 4  # its additional columns, and its power iterations


class Factors(NamedTuple):
    """A change of a matrix, ``A B + E``.

    Attributes:
      a: ``[in, r]`` in float32.
      b: ``[r, out]`` in float32.
      error: ‖E‖ / ‖A B + E‖; None for factors that were not computed but copied.
    """

    a: np.ndarray
    b: np.ndarray
    error: float | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[1]


@dataclass(frozen=True)
class Converted:
    """An adapter as LoRA with a scale of 1 everywhere, for the model with unstacked layers.

    Attributes:
      peft: a `LoRA` bound to the model, whose layers are unstacked.
      adapter: its leaves.
      params: the abstract base.
      errors: of the sites that are no copies of a LoRA, the relative errors by path.
    """

    peft: Peft
    adapter: Any
    params: Any
    errors: Mapping[str, float]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(factors.rank for _, factors in factors_of(self).values())


def to_lora(
    peft: Peft,
    params: Tree,
    adapter: Tree,
    *,
    rank: int = MAX_RANK,
    max_error: float = MAX_ERROR,
    uniform: Sequence[int] | bool = False,
) -> Converted:
    """An adapter of any mergeable method as LoRA, with the error that this makes.

    Dropout and other matters of training are left behind. Of a change that has a low rank all of it is kept; of any
    other, such as DoRA's, the ``rank`` largest singular values.

    Args:
      peft: the bound method.
      params: the base, of which only weights are read whose change has to be decomposed.
      adapter: the adapter.
      rank: the largest rank of what is decomposed. Copies of a LoRA keep theirs.
      max_error: the largest error at a site, relative to the norm of its change.
      uniform: whether all sites get the largest rank, filled up with zeros; or the ranks to choose from, ascending.

    Raises:
      UserError: a part of the adapter changes something else than a matrix, an error is above ``max_error``, or the
        rank above those to choose from; the message names method and site.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.VeRA(rank=2, targets="layers_0").bind(model, params, x)
    >>> lora = to_lora(peft, params, peft.init(jax.random.key(1), params))
    >>> lora.peft.method.name, max(lora.errors.values())
    ('LoRA', 0.0)
    """
    peft.check_order(params, adapter, "to_lora(peft, params, adapter)")
    check_matrices(peft)
    at, leaves = stacking.stacked_at(peft.model), peft.check(adapter)
    base = flatten(peft.frontend.tree(params))
    by_path: dict[Path, list[Action]] = {}
    for action in stacking.unroll_peft(peft).actions:
        if action.site.layers != ():
            by_path.setdefault(action.site.weight_path, []).append(action)
    found: dict[Path, tuple[Site, Factors]] = {}
    for path, actions in by_path.items():
        read = functools.partial(stacking.leaf_of, at=at)
        own = [{n: _array(read(leaves, a.leaf_path(n))) for n in a.stored if n != a.mask} for a in actions]
        if len(actions) == 1 and type(actions[0].method) is LoRA:
            factors = _copied(actions[0], own[0])
        else:
            factors = _decomposed(peft, actions, leaves, own, functools.partial(read, base), rank)
        _check_finite(factors, actions)
        found[path] = whole(actions[0].site), factors
    _check_errors(found, by_path, max_error)
    return _as_lora(peft, base, at, found, uniform)


# --- what has no form as a matrix -------------------------------------------------------------------------------------


def check_matrices(peft: Peft) -> None:
    """Raises a UserError if a part of a method changes anything but a matrix; the message names it.

    >>> check_matrices(peft)  # doctest: +SKIP
    """
    at = stacking.stacked_at(peft.model)
    for action in peft.actions:
        if problem := _problem(action, at):
            raise UserError(f"{action.method.name} at {action.site.name!r} cannot become a LoRA: {problem}")


def _problem(action: Action, at: str | None) -> str:
    site = action.site
    if site.kind == "leaf":
        what = "a bias" if site.path[-1] == "bias" else "a whole parameter"
        return f"{what} trains there; jpeft merge writes the whole model"
    if site.kind != "weight" or not action.mergeable:
        return "it changes the model's computation, as no change of a weight does; jpeft itself runs it"
    if any(own.stack for own in stacking.unroll_site(site, at)) or (site.batch and not _is_split(site)):
        return "the weight is a stack of matrices, such as those of experts; jpeft merge writes the whole model"
    return ""


def _is_split(site: Site) -> bool:
    return isinstance(site.geometry, Parts) and site.batch == (site.geometry.parts,)


def whole(site: Site) -> Site:
    """The site of a weight as one matrix, if a method sees it as several parts.

    >>> whole(Site(("dense",), "weight")).name
    'dense'
    """
    geometry = site.geometry
    if not isinstance(geometry, Parts):
        return site
    return replace(site, geometry=geometry.inner, outputs=site.outputs * geometry.parts)


# --- factors ----------------------------------------------------------------------------------------------------------


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(jax.device_get(meta.unbox(leaf)))


def _copied(action: Action, leaves: Mapping[str, np.ndarray]) -> Factors:
    """The factors of a LoRA: those of fused parts as one, and of a start as twice the rank."""
    spec = LoRA.hf
    assert isinstance(spec, HFSpec) and spec.exported is not None
    method, own = spec.exported(action.method, action.site, leaves)
    a, b = (np.asarray(own[name], np.float32) for name in ("lora_a", "lora_b"))
    if _is_split(action.site):  # the parts' matrices stand side by side in A, and along a diagonal in B
        parts, r, out = b.shape
        diagonal = np.zeros((parts, r, parts, out), np.float32)
        diagonal[range(parts), :, range(parts)] = b
        a, b = np.concatenate(list(a), -1), diagonal.reshape(parts * r, parts * out)
    return Factors(a, np.float32(method.scale) * b)


def _decomposed(
    peft: Peft,
    actions: Sequence[Action],
    leaves: Mapping[Path, Any],
    own: Sequence[Mapping[str, np.ndarray]],
    read: Any,
    rank: int,
) -> Factors:
    site = whole(actions[0].site)
    w = jnp.asarray(dequantize_leaf(read(site.weight_path)), jnp.float32)
    bias = read(site.bias_path) if site.bias_path and any(a.changes_bias for a in actions) else None
    b = None if bias is None else jnp.asarray(meta.unbox(bias), jnp.float32)
    shared = [peft.shared(a, leaves) for a in actions]
    merge = functools.partial(_merged, tuple(map(_placeless, actions)), shared, own)
    merged, new_bias = merge(w, b)
    if b is not None and not np.allclose(new_bias, b, rtol=1e-6, atol=0):
        raise UserError(
            f"{actions[-1].method.name} at {site.name!r} cannot become a LoRA: it also changes the bias; jpeft merge "
            "writes the whole model"
        )
    assert site.geometry is not None
    old, new = (np.asarray(site.geometry.view(x)) for x in (w, merged))
    # W' - W loses what is small beside W. A method that adds the same to any weight tells it from a weight of zero.
    alone = np.asarray(site.geometry.view(merge(jnp.zeros_like(w), b)[0]))
    rounding = np.finfo(np.float32).eps
    if np.all(np.abs(new - old - alone) <= 8 * rounding * (np.abs(old) + np.abs(alone))):
        return decompose(alone, rank)
    return decompose(new - old, rank, float(rounding * np.linalg.norm(old)))


@functools.partial(jax.jit, static_argnums=0)
def _merged(
    actions: tuple[Action, ...], shared: Sequence[Any], leaves: Sequence[Any], w: jax.Array, b: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    # Layers that differ only in their path share the compiled function.
    return merge_layer(actions, shared, leaves, w, b)


def _placeless(action: Action) -> Action:
    return replace(action, site=replace(action.site, path=(), layers=None, projections=""))


def decompose(change: np.ndarray, rank: int, noise: float = 0.0) -> Factors:
    """The factors of a change of a matrix: of the lowest rank that is exact, at most ``rank``.

    Args:
      change: the matrix ``[in, out]``.
      rank: the largest rank.
      noise: the norm of what rounding put into the change.

    >>> a, b, error = decompose(np.outer(np.arange(3), np.ones(4)), rank=2)
    >>> a.shape, b.shape, error < 1e-6
    ((3, 1), (1, 4), True)
    """
    change = np.asarray(change, np.float64)
    total = float(np.linalg.norm(change))
    if not np.isfinite(total):
        return Factors(np.full((len(change), 1), np.nan), np.zeros((1, change.shape[1])), float("nan"))
    if total <= noise or total == 0:
        return Factors(np.zeros((len(change), 1), np.float32), np.zeros((1, change.shape[1]), np.float32), 0.0)
    u, s, vt = _svd(change, rank)
    left = float(np.linalg.norm(change - (u * s) @ vt)) if len(s) < min(change.shape) else 0.0
    tails = np.sqrt(np.append(np.cumsum((s**2)[::-1])[::-1], 0.0) + left**2)  # the error of each rank
    enough = np.flatnonzero(tails <= max(_EXACT * total, noise))
    r = min(rank, len(s), int(enough[0]) if len(enough) else rank)
    root = np.sqrt(s[:r])
    a, b = (u[:, :r] * root).astype(np.float32), (root[:, None] * vt[:r]).astype(np.float32)
    return Factors(a, b, float(np.linalg.norm(change - a.astype(np.float64) @ b)) / total)


def _svd(m: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values and vectors; of a large matrix the first ones (Halko et al. 2011, https://arxiv.org/abs/0909.4061)."""
    if min(m.shape) <= max(_FULL, rank + _EXTRA):
        return np.linalg.svd(m, full_matrices=False)
    q = m @ np.random.default_rng(0).normal(size=(m.shape[1], rank + _EXTRA))
    for _ in range(_ROUNDS):
        q = np.linalg.qr(m @ np.linalg.qr(m.T @ np.linalg.qr(q)[0])[0])[0]
    u, s, vt = np.linalg.svd(q.T @ m, full_matrices=False)
    return q @ u, s, vt


def _names(actions: Sequence[Action]) -> str:
    return " and ".join(dict.fromkeys(a.method.name for a in actions))


def _check_finite(factors: Factors, actions: Sequence[Action]) -> None:
    if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
        raise UserError(f"the adapter's {_names(actions)} at {actions[0].site.name!r} holds NaN or infinity")


def _check_errors(
    found: Mapping[Path, tuple[Site, Factors]], actions: Mapping[Path, Sequence[Action]], max_error: float
) -> None:
    """Raises a UserError that names the site with the largest error, if that is too large."""
    errors = {path: factors.error for path, (_, factors) in found.items() if factors.error is not None}
    worst = max(errors, key=lambda path: errors[path], default=None)
    if worst is not None and errors[worst] > max_error:
        site, factors = found[worst]
        raise UserError(
            f"{_names(actions[worst])} at {site.name!r}: a LoRA of rank {factors.rank} misses {errors[worst]:.2%} of "
            f"its change, above `max_error` {max_error:g}; give a larger `rank` or `max_error`, or write the "
            "whole model with jpeft merge"
        )


# --- the LoRA ---------------------------------------------------------------------------------------------------------


def _as_lora(
    peft: Peft,
    base: Mapping[Path, Any],
    at: str | None,
    found: Mapping[Path, tuple[Site, Factors]],
    uniform: Sequence[int] | bool,
) -> Converted:
    ranks = {path: factors.rank for path, (_, factors) in found.items()}
    if uniform is not False:
        ranks = dict.fromkeys(ranks, _one_rank(max(ranks.values()), uniform))
    shapes = unflatten(jax.eval_shape(lambda: dict(base)))
    errors = {site.name: f.error for site, f in found.values() if f.error is not None}
    unrolled = replace(stacking.unroll_peft(peft), shared_paths=(), matched=())
    sites = {path: (site, _padded(factors, ranks[path])) for path, (site, factors) in found.items()}
    return _bound(Converted(unrolled, {}, stacking.unstack(shapes, at) if at else shapes, errors), sites.values())


def _padded(factors: Factors, rank: int) -> Factors:
    more = rank - factors.rank
    return Factors(np.pad(factors.a, ((0, 0), (0, more))), np.pad(factors.b, ((0, more), (0, 0))))


def _bound(lora: Converted, found: Iterable[tuple[Site, Factors]]) -> Converted:
    """The conversion with these factors as its only ones."""
    actions, leaves = [], {}
    for site, factors in sorted(found, key=lambda item: item[0].name):
        action = Action(LoRA(rank=factors.rank), replace(site, layers=None), ("lora_a", "lora_b"))
        leaves |= {action.leaf_path("lora_a"): factors.a, action.leaf_path("lora_b"): factors.b}
        actions.append(action)
    ranks = {a.site.name: a.method.rank for a in actions}
    largest = max(ranks.values())
    overrides = {name: {"rank": rank} for name, rank in ranks.items() if rank != largest}
    method = LoRA(rank=largest, targets=tuple(ranks), overrides=overrides)
    structure = tuple(sorted((p, (x.shape, str(x.dtype))) for p, x in leaves.items()))
    peft = replace(lora.peft, method=method, actions=tuple(actions), structure=structure)
    return replace(lora, peft=peft, adapter=unflatten(leaves))


def factors_of(lora: Converted) -> dict[str, tuple[Site, Factors]]:
    """The factors of a conversion, by the paths of their sites.

    >>> factors_of(lora)["model/layers/0/self_attn/q_proj"][1].rank  # doctest: +SKIP
    8
    """
    leaves = flatten(lora.adapter)
    return {
        a.site.name: (a.site, Factors(leaves[a.leaf_path("lora_a")], leaves[a.leaf_path("lora_b")]))
        for a in lora.peft.actions
    }


def with_zeros(lora: Converted, sites: Sequence[Site]) -> Converted:
    """A conversion with further sites, at which it changes nothing.

    >>> with_zeros(lora, [site]).peft.sites[-1] == site  # doctest: +SKIP
    True
    """
    rank = lora.rank
    empty = [
        (s, Factors(np.zeros((s.inputs, rank), np.float32), np.zeros((rank, s.outputs), np.float32))) for s in sites
    ]
    return _bound(lora, [*factors_of(lora).values(), *empty]) if sites else lora


def cast(lora: Converted, dtype: str) -> Converted:
    """A conversion with factors of another dtype.

    Raises:
      UserError: a number is beyond the range of the dtype.

    >>> cast(lora, "float16").adapter  # doctest: +SKIP
    """
    if dtype == "float32":
        return lora
    found = []
    for name, (site, factors) in factors_of(lora).items():
        with np.errstate(over="ignore"):
            a, b = factors.a.astype(dtype), factors.b.astype(dtype)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"`dtype` {dtype}: the adapter at {name!r} is beyond its range; give float32")
        found.append((site, Factors(a, b)))
    return _bound(lora, found)


def _one_rank(largest: int, choices: Sequence[int] | bool) -> int:
    if isinstance(choices, bool):
        return largest
    fitting = [rank for rank in choices if rank >= largest]
    if not fitting:
        raise UserError(f"the adapter has a LoRA of rank {largest}, and the largest that is served is {max(choices)}")
    return fitting[0]
