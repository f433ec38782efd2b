"""Statistics of data, from which some methods start, and the check that they belong to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpeft.core.fingerprint import difference
from jpeft.core.tree import Path, nearest

COVARIANCE, GRADIENT = "covariance", "gradient"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A matrix ``left @ right`` that is too large to hold for every site, as one that was observed by a sketch.

    Attributes:
      left: ``[..., rows, rank]``.
      right: ``[..., rank, columns]``.
    """

    left: Any
    right: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (*np.shape(self.left)[:-1], np.shape(self.right)[-1])

    def dense(self) -> jax.Array:
        """The matrix itself."""
        return self.left @ self.right


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, Mapping[str, Any]]):
    """The result of `jpeft.observe`: statistics at each site, by the site's name.

    At a site it is ``{"covariance": [..., in, in]}``, the mean of xᵀx over tokens, or ``{"gradient": [..., in, out]}``,
    the mean gradient of the loss with respect to the weight, in float32. The leading axes are those of the weight's
    stack (scanned layers, wherever the model stacks them) and batch (experts, heads). Of a wide weight it may be a
    `LowRank`.

    Attributes:
      found: the statistics.
      weights: the fingerprint of the weight at each site, so that they are not taken for those of another model.
    """

    found: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def tree_flatten(self) -> tuple[Any, Any]:
        """The statistics are leaves, so that ``peft.init`` may be jitted."""
        return ({name: dict(own) for name, own in self.found.items()},), tuple(self.weights.items())

    @classmethod
    def tree_unflatten(cls, weights: Any, found: Any) -> Statistics:
        return cls(found[0], dict(weights))


def is_traced(tree: Any) -> bool:
    """Whether a leaf's values are not known, under `jax.jit`."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def check_statistics(actions: Sequence[Any], statistics: Mapping[str, Any] | None, base: Mapping[Path, Any]) -> None:
    """Checks that there are statistics where a method's start depends on data, and that they are of this model.

    Raises:
      TypeError: they are something else.
      ValueError: there are none, or none are needed; or they are of other sites, shapes, kinds or weights, by name.
        Values that are traced are not looked at.
    """
    observing = [action for action in actions if action.method.observes is not None]
    if statistics is not None and not observing:
        raise ValueError("statistics are given, but nothing of this method starts from data; see init_weights or mask")
    for action in observing:
        kind, site = action.method.observes, action.site
        if statistics is None:
            raise ValueError(
                f"{action.method.name} at {site.name!r} starts from data; give init what was observed: "
                "peft.init(key, params, statistics=jpeft.observe(method, model, params, loss_fn, batches))"
            )
        if not isinstance(statistics, Mapping) or not all(isinstance(own, Mapping) for own in statistics.values()):
            raise TypeError(
                "statistics must be those that jpeft.observe returned, a mapping of a mapping for each site, got a "
                f"{type(statistics).__name__}"
            )
        if site.name not in statistics:
            raise ValueError(
                f"the statistics lack {site.name!r}; they are of another model or method"
                f"{nearest(site.name, statistics)}"
            )
        if kind not in statistics[site.name]:
            held = ", ".join(statistics[site.name]) or "nothing"
            raise ValueError(f"the statistics of {site.name!r} hold {held}, {action.method.name} needs {kind}")
        matrix = (site.inputs, site.inputs) if kind == COVARIANCE else (site.inputs, site.outputs)
        lead = tuple(n for _, n in site.stack) + site.batch
        if (shape := np.shape(statistics[site.name][kind])) != lead + matrix:
            raise ValueError(
                f"the {kind} of {site.name!r} has shape {shape}, expected {lead + matrix}; it is of another model"
            )
        found = statistics[site.name][kind]
        if not is_traced(found) and not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found)):
            raise ValueError(f"the {kind} of {site.name!r} holds NaN or infinity; observe other batches")
        expected = getattr(statistics, "weights", {}).get(site.name)
        weight = base[site.weight_path]
        if expected is not None and not is_traced(weight) and difference({"w": expected}, {"w": weight}):
            raise ValueError(f"the statistics were observed on another weight at {site.name!r}; observe this base")
