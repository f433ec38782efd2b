"""AdaLoRA's budget: which triples of a singular value and its two vectors are kept (Zhang et al. 2023,
https://arxiv.org/abs/2303.10512).

I <- |p g|                                      for each entry p of A, e and B, and its gradient g
J <- β1 J + (1 - β1) I                          sensitivity
U <- β2 U + (1 - β2) |I - J|                    uncertainty
S_k = (J U)(e_k) + mean (J U)(A_k) + mean (J U)(B_k)
e_k <- 0                                        unless S_k is among the largest of all matrices, as many as the budget
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jaxtyping import Array, Int

from jpeft.core.actions import acts_on
from jpeft.core.peft import Peft
from jpeft.core.sites import stack_back, stack_first
from jpeft.core.tree import Path, Tree, box_as, flatten, map_with_path
from jpeft.methods.adalora import AdaLoRA

_LEAVES = ("adalora_a", "adalora_e", "adalora_b")


class AllocationState(NamedTuple):
    """The state of `allocate_ranks`.

    Attributes:
      step: the number of updates so far.
      inner: the state of the optimizer.
      sensitivity, uncertainty: trees like the parameters, with a 0 for every leaf that is not AdaLoRA's.
    """

    step: Int[Array, ""]
    inner: Any
    sensitivity: Any
    uncertainty: Any


def allocate_ranks(
    peft: Peft,
    inner: optax.GradientTransformation,
    *,
    total_steps: int,
    target_rank: int = 8,
    initial_steps: int = 0,
    final_steps: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that also sets AdaLoRA's least important singular values to zero, as many as a budget says.

    The budget is of all matrices together: from all their triples, it falls with the cube of the steps that remain to
    ``target_rank`` a matrix. It equals HuggingFace PEFT's ``update_and_allocate``, called after each optimizer step
    with its number from 0 on. It needs the gradients of single steps, so it wraps the whole optimizer, inside of any
    accumulation.

    Args:
      peft: the bound method.
      inner: the optimizer.
      total_steps: the number of steps of the run.
      target_rank: the mean number of triples that a matrix keeps (PEFT's ``target_r``).
      initial_steps: steps before the budget falls (``tinit``).
      final_steps: steps at the end with the final choice (``tfinal``).
      interval: between choices; in between, values that were set to zero may grow again (``deltaT``).
      beta1, beta2: decay of sensitivity and uncertainty.

    Raises:
      ValueError: no AdaLoRA, a target that is not below the ranks, or steps that leave the budget no time to fall.

    >>> # tx = allocate_ranks(peft, optax.adamw(1e-3), total_steps=1000, initial_steps=100, final_steps=300)
    """
    actions = [action for action in peft.actions if isinstance(action.method, AdaLoRA)]
    if not actions:
        raise ValueError("allocate_ranks needs an AdaLoRA in the bound method; this adapter has none")
    own = {action: tuple(action.leaf_path(name) for name in _LEAVES) for action in actions}
    paths = {path for three in own.values() for path in three}
    there = {action: acts_on(action.site) for action in actions}
    counts = {action: int(mask.sum()) for action, mask in there.items()}
    triples, matrices = sum(n * action.method.rank for action, n in counts.items()), sum(counts.values())
    stored = sum(mask.size * action.method.rank for action, mask in there.items())
    last, target = total_steps - final_steps, target_rank * matrices
    if not 0 < target < triples:
        mean = triples / matrices
        raise ValueError(f"target_rank must be positive and below the mean rank, {mean:g}, got {target_rank}")
    budgets = _budgets(total_steps, initial_steps, final_steps, triples, target)
    if interval < 1 or not 0 < beta1 < 1 or not 0 < beta2 < 1:
        raise ValueError(f"interval must be positive and betas in (0, 1), got {interval}, {beta1} and {beta2}")
    inner = optax.with_extra_args_support(inner)

    def zeros(params: Tree) -> Any:
        def zero(path: Path, leaf: Any) -> Any:  # jax.tree.map, since a leaf may be in a box
            return jax.tree.map(lambda x: jnp.zeros(x.shape if path in paths else (), jnp.float32), leaf)

        return map_with_path(zero, params)

    def init(params: Tree) -> AllocationState:
        return AllocationState(jnp.zeros((), jnp.int32), inner.init(params), zeros(params), zeros(params))

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, AllocationState]:
        if params is None:
            raise ValueError("allocate_ranks needs the adapter: call tx.update(gradients, state, adapter)")
        gradients = _open(updates)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        leaves = _open(optax.apply_updates(params, updates))
        old_j, old_u, new_j, new_u = _open(state.sensitivity), _open(state.uncertainty), {}, {}
        for path in paths:
            importance = jnp.abs(leaves[path].astype(jnp.float32) * gradients[path].astype(jnp.float32))
            j = beta1 * old_j[path] + (1 - beta1) * importance
            u = beta2 * old_u[path] + (1 - beta2) * jnp.abs(importance - j)
            new_j[path] = jnp.where(state.step < last, j, old_j[path])
            new_u[path] = jnp.where(state.step < last, u, old_u[path])

        scores = {}
        for action in actions:
            a, e, b = (stack_first(new_j[path] * new_u[path], action.site.stack) for path in own[action])
            scores[action] = jnp.where(there[action][..., None], e + a.mean(-2) + b.mean(-1), -jnp.inf)
        budget = jnp.asarray(budgets)[jnp.minimum(state.step, last)]
        limit = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))[stored - budget - 1]
        chooses = (state.step > initial_steps) & ((state.step >= last) | (state.step % interval == 0))
        before, now = _open(params), _open(updates)
        for action, (_, e, _) in own.items():
            drop = stack_back(chooses & (scores[action] <= limit), action.site.stack)
            now[e] = jnp.where(drop, -before[e].astype(now[e].dtype), now[e])
        state = AllocationState(
            state.step + 1, inner_state, put(new_j, state.sensitivity), put(new_u, state.uncertainty)
        )
        return put(now, updates), state

    def put(values: dict[Path, Any], tree: Tree) -> Any:
        return map_with_path(lambda path, leaf: box_as(leaf, values[path]) if path in paths else leaf, tree)

    return optax.GradientTransformationExtraArgs(init, update)


def _open(tree: Tree) -> dict[Path, Any]:
    return {path: meta.unbox(leaf) for path, leaf in flatten(tree).items()}


def _budgets(total_steps: int, initial_steps: int, final_steps: int, triples: int, target: int) -> list[int]:
    """The number of triples to keep after each step up to the last that the budget falls in.

    Raises:
      ValueError: the steps leave the budget no time to fall.
    """
    last = total_steps - final_steps
    if not 0 <= initial_steps < last <= total_steps:
        raise ValueError(
            "initial_steps and final_steps must leave the budget some of total_steps to fall, got "
            f"{initial_steps} and {final_steps} of {total_steps}"
        )
    # In Python's floats, as PEFT counts.
    rest = [1 - max(step - initial_steps, 0) / (last - initial_steps) for step in range(last + 1)]
    return [int((triples - target) * share**3 + target) for share in rest]
