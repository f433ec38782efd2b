"""The factors of LoRA in an adapter's tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float

from jpeft.core.actions import Action
from jpeft.core.peft import Peft
from jpeft.core.sites import Stack, stack_back, stack_first
from jpeft.core.tree import Path, box_as
from jpeft.methods.lora import LoRA


def lora_factors(peft: Peft) -> Iterator[tuple[Action, Path, Path]]:
    """LoRA's actions with the paths of A and B there. Embeddings are left out, as by PEFT's optimizers."""
    for action in peft.actions:
        if isinstance(action.method, LoRA) and not action.site.lookup:
            yield action, action.leaf_path("lora_a"), action.leaf_path("lora_b")


def inverse_of_product(x: Float[Array, "... n rank"], damping: float) -> Float[Array, "... rank rank"]:
    """``(xᵀ x + damping)⁻¹``, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    product = jnp.swapaxes(wide, -1, -2) @ wide
    return jnp.linalg.pinv(product + damping * jnp.eye(product.shape[-1], dtype=wide.dtype), hermitian=True)


def on_matrices(function: Callable[..., Array], stack: Stack, *leaves: Any) -> Any:
    """A function of matrices, mapped over leaves as they are stored; in the box and the dtype of the first."""
    own = meta.unbox(leaves[0])
    out = function(*(stack_first(meta.unbox(leaf), stack) for leaf in leaves))
    return box_as(leaves[0], stack_back(out.astype(own.dtype), stack))
