"""LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

import optax

from jpeft.core.tree import Tree, map_with_path


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): B learns ``ratio`` times as fast as A.

    Put it last: it scales the finished update of every ``lora_b``, weight decay included, which is a learning rate
    ``ratio`` times as high.

    >>> import optax
    >>> tx = optax.chain(optax.adamw(1e-4), lora_plus(16.0))
    """

    def update(updates: Tree, params: Tree | None = None) -> Tree:
        del params
        return map_with_path(lambda p, u: u * ratio if p[-1].endswith("lora_b") else u, updates)

    return optax.stateless(update)
