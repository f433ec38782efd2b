"""LoRA-FA: the gradient of B for a frozen A (Zhang et al. 2023, https://arxiv.org/abs/2308.03303).

g_B <- (Aᵀ A)⁻¹ g_B / s²        so that s A g_B is the part of the weight's gradient that A can reach
"""

from __future__ import annotations

from typing import Any

import optax
from flax.core import meta

from jpeft.core.peft import Peft
from jpeft.core.sites import stack_first
from jpeft.core.tree import Tree, flatten, map_with_path
from jpeft.training.optimizers.factors import inverse_of_product, lora_factors, on_matrices
from jpeft.training.rates import ForOneAdapter

_DAMPING = 1e-8  # as in HuggingFace PEFT


def lora_fa(peft: Peft, adapter: Tree) -> optax.GradientTransformation:
    """Corrected gradients of B for ``LoRA(freeze_a=True)``.

    Put it first in a chain, before the optimizer: ``optax.chain(lora_fa(peft, adapter), optax.adamw(1e-4))``.

    Args:
      peft: the bound method.
      adapter: the adapter, at any step: only its frozen A are read.

    Raises:
      ValueError: no LoRA with a frozen A.

    >>> # tx = optax.chain(lora_fa(peft, adapter), optax.adamw(1e-4))
    """
    leaves, frozen = peft.check(adapter), peft.non_trainable_paths
    found = {}
    for action, a, b in lora_factors(peft):
        if a in frozen and b not in frozen:
            factor, stack = meta.unbox(leaves[a]), action.site.stack
            found[b] = stack, inverse_of_product(stack_first(factor, stack), _DAMPING) / action.method.scale**2
    if not found:
        raise ValueError("lora_fa needs a LoRA with a frozen A, as LoRA(freeze_a=True); this adapter has none")

    def init(params: Tree) -> Any:
        del params
        return ForOneAdapter("lora_fa")

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        del params
        gradients, out = flatten(updates), {}
        for b, (stack, inverse) in found.items():
            out[b] = on_matrices(lambda g, inverse=inverse: inverse @ g, stack, gradients[b])
        return map_with_path(lambda path, g: out.get(path, g), updates), state

    return optax.GradientTransformation(init, update)
