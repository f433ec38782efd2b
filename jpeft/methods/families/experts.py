"""LoRA experts at one weight, whose shares differ from token to token.

y = x W + Σ_i g_i (x A_i) B_i = x W + (repeat(g) * (x A)) B         A = [A_1 … A_n]: [in, n r], B: [n r, out] likewise
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jpeft.checks import NUMBER, Rule
from jpeft.core.method import Linear
from jpeft.core.sites import Site
from jpeft.methods.families.kaiming import kaiming
from jpeft.methods.families.low_rank import narrow

POSITIVE: Rule = (lambda value: NUMBER[0](value) and value > 0, "a positive number")


def check_top_k(name: str, k: int | None, count: int) -> None:
    """Checks that there are as many experts as are to be chosen."""
    if k is not None and k > count:
        raise ValueError(f"{name}.top_k is {k}, more than the {count} experts of n_experts")


def init_experts(
    key: Key[Array, ""], site: Site, count: int, rank: int, dtype: str, zero: bool
) -> tuple[Float[Array, "in ranks"], Float[Array, "ranks out"]]:
    """A and B of fresh experts, each as a LoRA's; B is ``zero``, or as torch's linear layers start."""
    key_a, key_b = jax.random.split(key)
    a = kaiming(key_a, (site.inputs, count * rank), site.inputs, dtype)
    shape = (count * rank, site.outputs)
    return a, jnp.zeros(shape, dtype) if zero else kaiming(key_b, shape, rank, dtype)


def mixed(
    base: Linear,
    x: Float[Array, "*tokens in"],
    a: Float[Array, "in ranks"],
    b: Float[Array, "ranks out"],
    gates: Float[Array, "*tokens experts"],
    dropout: float = 0.0,
) -> Float[Array, "*tokens out"]:
    """The weight's outputs with those of the experts, each times its gate."""
    dropped = base.dropout(x, dropout)
    y = base(x)
    shares = jnp.repeat(gates.astype(x.dtype), a.shape[1] // gates.shape[-1], axis=-1)
    return y + ((narrow(dropped, a) * shares) @ b).astype(y.dtype)


def top_k(values: Float[Array, "*tokens experts"], k: int) -> jax.Array:
    """Whether each expert is one of the ``k`` with the largest values; of equal ones the first."""
    _, places = jax.lax.top_k(values, k)
    return (jax.nn.one_hot(places, values.shape[-1], dtype=jnp.int32) > 0).any(-2)
