"""Riemannian preconditioning of LoRA's gradients (Zhang and Pilanci 2024, https://arxiv.org/abs/2402.02347).

g_A <- g_A (B Bᵀ + d)⁻¹
g_B <- (Aᵀ A + d)⁻¹ g_B        d: the damping
"""

from __future__ import annotations

import optax

from jpeft.core.peft import Peft
from jpeft.core.tree import Tree, flatten, map_with_path
from jpeft.training.optimizers.factors import inverse_of_product, lora_factors, on_matrices


def riemannian(peft: Peft, damping: float = 1e-2) -> optax.GradientTransformation:
    """Gradients of LoRA's A and B in the metric of their product, which makes steps independent of its scaling.

    Put it first in a chain, before the optimizer: ``optax.chain(riemannian(peft), optax.adamw(1e-4))``. What is not a
    trained pair of factors (embeddings, DoRA's magnitudes, other methods) keeps its gradient.

    Args:
      peft: the bound method.
      damping: added to the diagonals of the r by r products; HuggingFace PEFT's ``reg``.

    Raises:
      ValueError: no LoRA of which A and B both train.

    >>> # tx = optax.chain(riemannian(peft), optax.adamw(1e-4))
    """
    frozen = peft.non_trainable_paths
    found = [(action.site.stack, a, b) for action, a, b in lora_factors(peft) if not {a, b} & frozen]
    if not found:
        raise ValueError("riemannian needs a LoRA of which A and B both train; this adapter has none")

    def update(updates: Tree, params: Tree | None = None) -> Tree:
        if params is None:
            raise ValueError("riemannian needs the adapter: call tx.update(gradients, state, adapter)")
        gradients, leaves, out = flatten(updates), flatten(params), {}
        for stack, a, b in found:
            out[a] = on_matrices(
                lambda g, b: g @ inverse_of_product(b.swapaxes(-1, -2), damping), stack, gradients[a], leaves[b]
            )
            out[b] = on_matrices(lambda g, a: inverse_of_product(a, damping) @ g, stack, gradients[b], leaves[a])
        return map_with_path(lambda path, g: out.get(path, g), updates)

    return optax.stateless(update)
