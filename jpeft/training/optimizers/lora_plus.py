"""LoRA+: a higher learning rate for B than for A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

A <- A + u_A, B <- B + ratio u_B        u: the optimizer's updates
"""

from __future__ import annotations

import jax
import optax

from jpeft.core.tree import Tree, map_with_path


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of every ``lora_b`` by ``ratio``.

    Put it last in a chain. It then scales finished updates, including weight decay, which has the effect of a learning
    rate ``ratio`` times as high.

    >>> import optax
    >>> tx = optax.chain(optax.adamw(1e-4), lora_plus(16.0))
    """

    def update(updates: Tree, params: Tree | None = None) -> Tree:
        del params
        # jax.tree.map, since a leaf may be in a box.
        scaled = lambda u: jax.tree.map(lambda x: x * ratio, u)  # noqa: E731
        return map_with_path(lambda p, u: scaled(u) if p[-1].endswith("lora_b") else u, updates)

    return optax.stateless(update)
