"""Statistics of data for methods that start from them: the inputs of weights, or the gradient of the loss there.

A probe is a weight method whose leaf's gradient is the statistic. It therefore passes scans, remat, meshes and
quantized bases as every method does, and one gradient of the user's own loss function observes all sites at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jpeft.binding import bind_survey, survey_model
from jpeft.core.fingerprint import fingerprint
from jpeft.core.frontend import bypassed
from jpeft.core.method import Leaves, Linear
from jpeft.core.peft import Peft
from jpeft.core.sites import BOX, MERGE, Site, Survey, map_axes, stack_first
from jpeft.core.statistics import COVARIANCE, GRADIENT, LowRank, Statistics, is_traced
from jpeft.core.tree import Tree, flatten
from jpeft.frontends import front_end
from jpeft.methods.base import Method, WeightMethod
from jpeft.methods.chain import Chain
from jpeft.training.step import LossFn


def observe(
    method: Method,
    model: Any,
    params: Tree,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rng: jax.Array | None = None,
    widest: int = 4096,
    columns: int = 256,
) -> Statistics:
    """Statistics of data from which a method starts, for ``peft.init(key, params, statistics=...)``.

    Nothing of the method runs: the statistics are those of the base. Tokens whose outputs have no gradient, such as
    padding, do not count as inputs. It compiles its step itself; inside of a `jax.jit` of yours, what it raises about
    values is not raised.

    Args:
      method: the method, such as ``jpeft.LoRA(init_weights="eva")``.
      model: the model, as for ``method.bind``.
      params: its parameters; may be quantized or on a mesh.
      loss_fn: as for `train_step`: ``(adapter, params, batch, rng) -> (loss, metrics)``. It runs the model by
        ``peft.apply`` or by itself.
      batches: a few batches of the training data; all count alike, and all of one shape share a compiled program.
      rng: the key that ``loss_fn`` gets, folded with the batch's number; by default ``jax.random.key(0)``.
      widest: the largest number of inputs of a weight whose statistics are held in full. Those of wider ones are
        sketched: multiplied by random matrices of ``columns`` columns (Tropp et al. 2017, 1609.00048 and 1706.05736),
        which tell their main directions, as many as a fraction of the columns, in ``columns / inputs`` of the memory.
      columns: see ``widest``.

    Raises:
      ValueError: no batches; a method that needs no data; a ``loss_fn`` that does not call the model, or whose loss is
        no floating scalar or does not depend on a site; a weight whose input is not seen, as that of an embedding
        table; infinite statistics, or a gradient of zero.

    >>> import flax.linen as nn, jax.numpy as jnp, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8)]), jnp.arange(12.0).reshape(3, 4)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = jpeft.LoRA(rank=2, init_weights="eva", targets="layers_0")
    >>> peft = method.bind(model, params, x)
    >>> loss_fn = lambda adapter, params, batch, rng: ((peft.apply(params, adapter, batch) ** 2).mean(), {})
    >>> found = jpeft.observe(method, model, params, loss_fn, [x])
    >>> bool(jnp.allclose(found["layers_0"]["covariance"], x.T @ x / 3))
    True
    >>> adapter = peft.init(jax.random.key(0), params, statistics=found)
    """
    batches, rng = iter(batches), jax.random.key(0) if rng is None else rng
    first = next(batches, None)
    if first is None:
        raise ValueError("batches is empty; observing needs at least one batch")

    def sketch(site: Site) -> int:
        return columns if site.inputs > max(widest, columns) else 0

    probes = _probes(method, model, params, lambda p, b: loss_fn({}, p, b, rng), first, sketch)
    step = jax.jit(functools.partial(_gradient, probes, loss_fn))
    total, count = step(params, first, jax.random.fold_in(rng, 0)), 1
    for count, batch in enumerate(batches, 2):
        own = step(params, batch, jax.random.fold_in(rng, count - 1))
        total = jax.tree.map(jnp.add, total, own)
    return _statistics(probes, total, count, flatten(probes.frontend.tree(params)))


def _probes(method: Method, model: Any, params: Tree, loss: Any, batch: Any, sketch: Callable[[Site], int]) -> Peft:
    """The probes for what the members of a method observe, bound to the model in the form of the loss's own call."""
    with bypassed():
        inputs, kwargs = front_end(model).called(model, loss, params, batch)
    survey = survey_model(model, params, inputs, kwargs)
    sites: dict[tuple[str, int], dict[str, Site]] = {}
    for member in method.methods():
        for site in member.sites(survey):
            if (kind := member.at(site).observes) is not None:
                _check_site(member.name, kind, site)
                # Probes see all layers of a stack, also those that the method does not act on.
                sites.setdefault((kind, sketch(site)), {})[site.name] = replace(site, layers=None)
    if not sites:
        raise ValueError(f"{method.name} starts without data: there is nothing to observe for its init_weights")
    members = [_PROBES[kind](chosen=tuple(own.values()), columns=n) for (kind, n), own in sites.items()]
    return bind_survey(Chain(*members), model, params, survey)


def _check_site(name: str, kind: str, site: Site) -> None:
    if kind == COVARIANCE and (site.lookup or site.via in (BOX, MERGE)):
        why = "an embedding table" if site.lookup else f"reached only as a weight (path taken: {site.via})"
        raise ValueError(
            f"{name} starts from the inputs of {site.name!r}, which are not seen: it is {why}; leave it out with "
            f"exclude=[{site.name!r}], or give it another start with overrides"
        )


def _gradient(probes: Peft, loss_fn: LossFn, params: Tree, batch: Any, rng: jax.Array) -> Tree:
    """The gradients of the probes' leaves, which are zero."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: probes.init(rng, params)))

    def loss(leaves: Tree) -> jax.Array:
        with bypassed(), probes.intercept():
            value = loss_fn({}, probes.overlay(params, leaves), batch, rng)
        value = value[0] if isinstance(value, tuple) else value
        if jnp.shape(value) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"the loss that loss_fn returns must be a floating scalar, got {value.dtype} of shape {value.shape}: "
                "take its mean"
            )
        return value.astype(jnp.float32)

    return jax.grad(loss)(zeros)


def _statistics(probes: Peft, total: Tree, count: int, base: Mapping[Any, Any]) -> Statistics:
    leaves = flatten(total)
    found: dict[str, dict[str, Any]] = {}
    for action in probes.actions:
        site, kind = action.site, action.method.kind
        own = {name: stack_first(x, site.stack) for name, x in probes.own(action, leaves).items()}
        divisor = count
        if kind == COVARIANCE:
            divisor = own.pop("probe_tokens")[..., None]
            if not is_traced(divisor) and float(divisor.min()) == 0:
                raise ValueError(f"the loss does not depend on the output at {site.name!r}; observe another loss")
        value = action.method.read({name: x / divisor for name, x in own.items()}, site)
        known = not is_traced(own)
        if known and kind == GRADIENT and not any(bool(x.any()) for x in own.values()):
            raise ValueError(f"the gradient of the loss at {site.name!r} is zero; observe other batches or losses")
        if known and not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(value)):
            raise ValueError(f"the {kind} at {site.name!r} is not finite; look at the loss of these batches")
        found.setdefault(site.name, {})[kind] = value
    weights = {a.site.name: base[a.site.weight_path] for a in probes.actions}
    known = {name: fingerprint({"w": w})["w"] for name, w in weights.items() if not is_traced(w)}
    return Statistics(found, known)


# --- the probes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Probe(WeightMethod):
    """A method at given sites that leaves the outputs as they are.

    Attributes:
      chosen: the sites.
      columns: of the sketch; 0 for the whole statistic.
    """

    chosen: tuple[Site, ...] = ()
    columns: int = 0

    kind: ClassVar[str]
    uncast: ClassVar[frozenset[str]] = frozenset(
        {"probe_covariance", "probe_tokens", "probe_gradient", "probe_left", "probe_right"}
    )

    def sites(self, survey: Survey) -> list[Site]:
        return list(self.chosen)

    def matched(self, survey: Survey, sites: Sequence[Site]) -> list[Any]:
        return []

    def read(self, leaves: Leaves, site: Site) -> Any:
        """The statistic from the leaves' gradients, whose stacked axes are in front."""
        (value,) = leaves.values()
        return value


class _Covariance(_Probe):
    """Its leaf's gradient is xᵀx, whatever the loss, or xᵀx Ω with a random Ω."""

    kind = COVARIANCE

    def mergeable(self, site: Site) -> bool:
        return False

    def init(self, key: jax.Array, site: Site, w: Any) -> Leaves:
        shape = (site.inputs, self.columns or site.inputs)
        return {"probe_covariance": jnp.zeros(shape), "probe_tokens": jnp.zeros((1,))}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> jax.Array:
        inputs = leaves["probe_covariance"].shape[0]
        rows = x if isinstance(x, jax.Array) else x @ jnp.eye(inputs, dtype=x.dtype)
        return _observed(self.columns, rows, base(x), leaves["probe_covariance"], leaves["probe_tokens"][0])

    def read(self, leaves: Leaves, site: Site) -> Any:
        value = leaves["probe_covariance"]
        return _mapped(_from_sketch, site)(value) if self.columns else value


class _WeightGradient(_Probe):
    """Its leaves are added to the weight, and have its gradient G, or G Ω and Ψᵀ G with random Ω and Ψ."""

    kind = GRADIENT

    def init(self, key: jax.Array, site: Site, w: Any) -> Leaves:
        if not self.columns:
            return {"probe_gradient": jnp.zeros((site.inputs, site.outputs))}
        left, right = jnp.zeros((site.inputs, self.columns)), jnp.zeros((2 * self.columns, site.outputs))
        return {"probe_left": left, "probe_right": right}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> jax.Array:
        y = base(x)
        change = {name: leaf.astype(x.dtype) for name, leaf in leaves.items()}
        if not self.columns:
            return y + (x @ change["probe_gradient"]).astype(y.dtype)
        omega, psi = (m.astype(x.dtype) for m in _two_sides(leaves))
        return y + ((x @ change["probe_left"]) @ omega.T + (x @ psi) @ change["probe_right"]).astype(y.dtype)

    def merge(self, leaves: Leaves, w: jax.Array, b: Any) -> tuple[jax.Array, Any]:
        if not self.columns:
            return w + leaves["probe_gradient"], b
        omega, psi = _two_sides(leaves)
        return w + leaves["probe_left"] @ omega.T + psi @ leaves["probe_right"], b

    def read(self, leaves: Leaves, site: Site) -> Any:
        return _mapped(_from_two_sides, site)(dict(leaves)) if self.columns else super().read(leaves, site)


_PROBES: dict[str, Any] = {COVARIANCE: _Covariance, GRADIENT: _WeightGradient}


def _mapped(fn: Callable[[Any], Any], site: Site) -> Callable[[Any], Any]:
    """A function of one matrix's leaves, for those of all of a site's matrices."""
    return jax.jit(map_axes(fn, len(site.stack) + len(site.batch)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed(columns: int, x: jax.Array, y: jax.Array, covariance: jax.Array, tokens: jax.Array) -> jax.Array:
    return y


def _observed_forward(columns: int, x: jax.Array, y: jax.Array, covariance: jax.Array, tokens: jax.Array) -> Any:
    return y, x


def _observed_backward(columns: int, x: jax.Array, dy: jax.Array) -> Any:
    # A token that the loss does not depend on, as padding, has no gradient.
    counts = (dy != 0).any(-1).reshape(-1).astype(jnp.float32)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    other = rows @ _random(0, rows.shape[-1], columns) if columns else rows
    return jnp.zeros_like(x), dy, (rows * counts[:, None]).T @ other, counts.sum()


_observed.defvjp(_observed_forward, _observed_backward)


# --- sketches ---------------------------------------------------------------------------------------------------------


def _random(seed: int, rows: int, columns: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, columns), jnp.float32)


def _from_sketch(product: jax.Array) -> LowRank:
    """The Nyström approximation F Fᵀ of a positive semidefinite C, from C Ω."""
    omega = _random(0, *product.shape)
    shift = jnp.finfo(jnp.float32).eps * jnp.linalg.norm(product)  # so that the Cholesky factor exists
    product = product + shift * omega
    core = omega.T @ product
    lower = jnp.linalg.cholesky((core + core.T) / 2)
    left = jax.scipy.linalg.solve_triangular(lower, product.T, lower=True).T
    return LowRank(left, left.T)


def _two_sides(leaves: Leaves) -> tuple[jax.Array, jax.Array]:
    (inputs, columns), (rows, outputs) = leaves["probe_left"].shape, leaves["probe_right"].shape
    return _random(1, outputs, columns), _random(2, inputs, rows)


def _from_two_sides(leaves: Leaves) -> LowRank:
    """The approximation Q (Ψᵀ Q)⁺ Ψᵀ G of a matrix G, where Q is a basis of G Ω."""
    _, psi = _two_sides(leaves)
    q, _ = jnp.linalg.qr(leaves["probe_left"])
    right, *_ = jnp.linalg.lstsq(psi.T @ q, leaves["probe_right"])
    return LowRank(q, right)
