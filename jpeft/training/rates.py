"""Learning rates as data: an optimizer whose learning rate is in its state, so that another one compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jpeft.core.tree import Tree

RATE = "learning_rate"
SCALED = "lambda rate: optax.adamw(lambda count: rate * schedule(count)), for a schedule of peak 1"
Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


class RatedState(NamedTuple):
    """The state of `rated`.

    Attributes:
      learning_rate: the learning rate.
      inner: the state of the optimizer.
    """

    learning_rate: Float[Array, ""]
    inner: Any


@flax.struct.dataclass
class ForOneAdapter:
    """The state of an optimizer that holds values of one adapter, so that it cannot serve another.

    Attributes:
      name: the optimizer's name.
    """

    name: str = flax.struct.field(pytree_node=False)


def is_function(tx: Optimizer) -> bool:
    """Whether an optimizer is a function of the learning rate.

    >>> is_function(optax.adamw), is_function(optax.adamw(1e-3))
    (True, False)
    """
    return not (hasattr(tx, "init") and hasattr(tx, "update"))


def rated(tx: Optimizer, learning_rate: Any = 0.0) -> Any:
    """The optimizer of a function of the learning rate, with that rate in its state; a transformation as it is.

    Args:
      tx: ``learning_rate -> GradientTransformation``, such as ``optax.adamw``, or a transformation.
      learning_rate: the one to start with; it may be traced.

    >>> tx = rated(lambda rate: optax.sgd(rate), 0.5)
    >>> updates, state = tx.update({"w": jnp.ones(())}, tx.init({"w": jnp.ones(())}))
    >>> float(updates["w"]), float(state.learning_rate)
    (-0.5, 0.5)
    """
    if not is_function(tx):
        return tx

    def init(params: Tree) -> RatedState:
        rate = jnp.asarray(learning_rate, jnp.float32)
        return RatedState(rate, tx(rate).init(params))  # type: ignore[operator]

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, RatedState]:
        own = optax.with_extra_args_support(tx(state.learning_rate))  # type: ignore[operator]
        changed, inner = own.update(updates, state.inner, params, **extra)
        # A rate in float32 would widen updates in bfloat16, and with them Adam's moments in the next step.
        changed = jax.tree.map(lambda new, old: new.astype(old.dtype), changed, updates)
        return changed, RatedState(state.learning_rate, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def with_rate(opt_state: Any, learning_rate: Any) -> Any:
    """The optimizer state with another learning rate; NaN leaves the one that is there.

    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    >>> float(with_rate(tx.init({"w": jnp.ones(())}), 0.5).hyperparams["learning_rate"])
    0.5
    """

    def put(path: Any, leaf: Any) -> Any:
        if not _is_rate(path):
            return leaf
        return jnp.where(jnp.isnan(learning_rate), leaf, jnp.asarray(learning_rate, leaf.dtype))

    return jax.tree_util.tree_map_with_path(put, opt_state)


def check_rates(opt_state: Any, given: bool) -> None:
    """Checks that each member of a population can have its own learning rate in an optimizer state.

    Args:
      opt_state: the state of one member; it may be abstract.
      given: whether a member has a learning rate of its own.

    Raises:
      ValueError: the learning rate is a constant or a schedule, or a part of the optimizer is made for one adapter.
    """
    for part in jax.tree.leaves(opt_state, is_leaf=_is_for_one):
        if _is_for_one(part):
            raise ValueError(
                f"tx holds {part.name}, which is made from the leaves of one adapter, and every member has its own; "
                "leave it out, or train such members one by one"
            )
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state) if RATE in map(_name, path)]
    if given and any("hyperparams_states" in map(_name, path) for path in paths):
        raise ValueError(
            "tx sets its learning rate by a schedule at every step, which would replace those of the members; give a "
            f"function of the rate instead: {SCALED}"
        )
    if given and not any(map(_is_rate, paths)):
        raise ValueError(
            "tx has its learning rate as a constant, so the members cannot have their own; give a function of it, such "
            "as optax.adamw, or optax.inject_hyperparams(optax.adamw)(learning_rate=1e-4)"
        )


def _is_for_one(x: Any) -> bool:
    return isinstance(x, ForOneAdapter)


def _is_rate(path: Any) -> bool:
    return bool(path) and _name(path[-1]) == RATE


def _name(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", None))
