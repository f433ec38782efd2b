"""Starts of LoRA: at random, from the base weight or from data, for one matrix ``W: [in, out]``.

Each gives ``(a, b)``, ``[in, rank]`` and ``[rank, out]``, in float32, as HuggingFace PEFT does for ``Wᵀ``.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Float, Key

from jpeft.core.statistics import LowRank

Matrix = Float[Array, "rows columns"]
Factors = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]

RANDOM = ("kaiming", "gaussian", "orthogonal", "random")
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def random(start: str, key: Key[Array, ""], inputs: int, outputs: int, rank: int, lookup: bool) -> Factors:
    """One of the starts ``RANDOM``, see `jpeft.LoRA`. All dtypes of leaves start from the same numbers.

    Args:
      start: its name.
      key: a PRNG key.
      inputs: the number of rows of W.
      outputs: the number of its columns.
      rank: r.
      lookup: whether W is an embedding table, which starts from A = 0 and a normal B unless B is to be random.
    """
    key_a, key_b = jax.random.split(key)
    normal = jax.random.normal
    if lookup and start != "random":
        return jnp.zeros((inputs, rank)), normal(key_b, (rank, outputs), jnp.float32)
    if start == "gaussian":
        return normal(key_a, (inputs, rank), jnp.float32) * float(1 / rank), jnp.zeros((rank, outputs))
    if start == "orthogonal":
        # A is in the span of every other row of an orthogonal Q, B in that of the rest, so A B = 0.
        key_q, key_a = jax.random.split(key_a)
        q, _ = jnp.linalg.qr(normal(key_q, (rank, rank), jnp.float32))
        a = normal(key_a, (inputs, rank // 2), jnp.float32) @ q[0::2] / 10
        return a, q[1::2].T @ normal(key_b, (rank // 2, outputs), jnp.float32) / 10

    def uniform(key: Key[Array, ""], shape: tuple[int, int]) -> Array:
        # As torch's kaiming_uniform with a = sqrt(5): uniform in ±1/sqrt(fan_in).
        bound = 1 / math.sqrt(shape[0])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    b = (rank, outputs)
    return uniform(key_a, (inputs, rank)), uniform(key_b, b) if start == "random" else jnp.zeros(b)


def pissa(w: Matrix, rank: int, scale: float) -> Factors:
    """PiSSA (2404.02948): the largest singular values and vectors of W, so that scale A B is the best approximation."""
    return _halves(*_svd(w), rank, scale)


def pissa_fast(key: Key[Array, ""], w: Matrix, rank: int, scale: float, iterations: int) -> Factors:
    """PiSSA by a randomized decomposition."""
    return _halves(*randomized_svd(key, w, rank, iterations), rank, scale)


def olora(w: Matrix, rank: int) -> Factors:
    """OLoRA (2406.01775): the first columns of Q and rows of R, where Wᵀ = Q R."""
    q, r = jnp.linalg.qr(_wide(w).T)
    return r[:rank].T, q[:, :rank].T


def mica(w: Matrix, rank: int) -> Factors:
    """MiCA (2604.01694): B is the singular vectors of the outputs with the smallest singular values, A is zero."""
    _, _, vt = _svd(w)
    return jnp.zeros((w.shape[0], rank), jnp.float32), vt[-rank:]


def eva(w: Matrix, covariance: Matrix | LowRank, rank: int) -> Factors:
    """EVA (2410.07170): A is the main directions of the inputs, B is zero."""
    if isinstance(covariance, LowRank):  # F Fᵀ
        vectors, _, _ = _svd(covariance.left)
    else:
        vectors = jnp.linalg.eigh(_wide(covariance))[1][:, ::-1]
    return vectors[:, :rank], jnp.zeros((rank, w.shape[1]), jnp.float32)


def corda(w: Matrix, covariance: Matrix, rank: int, scale: float, corda_method: str = "ipm") -> Factors:
    """CorDA (2406.05223): as PiSSA, for the decomposition of C W, whose left side is multiplied by C⁻¹ then.

    C is the covariance of the inputs. Its scale decides how large A is beside B: here its mean variance is 1.

    Args:
      w: the weight.
      covariance: C.
      rank: the number of components.
      scale: the adapter's.
      corda_method: "ipm" adapts the components that matter most to these inputs, "kpm" those that matter least, where
        the inputs are of what is to be kept.
    """
    cov = _wide(covariance)
    cov = cov / jnp.mean(jnp.diagonal(cov))
    eye = jnp.eye(len(cov), dtype=cov.dtype)

    def more(state: Any) -> Any:
        fixed = cov + 2 * state[0] * eye
        return 2 * state[0], jnp.linalg.norm(fixed @ jnp.linalg.inv(fixed) - eye)

    def is_singular(state: Any) -> jax.Array:
        damping, error = state
        return ~(error < 0.05) & (damping < 100)

    damping, _ = jax.lax.while_loop(is_singular, more, (jnp.float32(0.005), jnp.float32(jnp.inf)))
    fixed = cov + damping * eye
    u, s, vt = _svd(fixed @ _wide(w))
    chosen = slice(None, rank) if corda_method == "ipm" else slice(-rank, None)
    left = jax.scipy.linalg.solve(fixed, u[:, chosen], assume_a="pos")
    return _halves(left, s[chosen], vt[chosen], rank, scale)


def lora_ga(
    key: Key[Array, ""],
    w: Matrix,
    gradient: Matrix,
    rank: int,
    adapter_scale: float,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
) -> Factors:
    """LoRA-GA (2407.05000): A and B are singular vectors of the gradient, so that a step moves A B as it would move W.

    Args:
      key: for the randomized decomposition.
      w: the weight.
      gradient: the gradient of the loss with respect to it.
      rank: r; the first 2 r components are used.
      adapter_scale: the adapter's factor on A B.
      direction: the components of A and of B: "ArB2r" the first and the second r, "A2rBr" the other way round, "ArBr"
        every other one, "random" the same r for both.
      scale: "stable" multiplies B by the fourth root of its outputs over the square root of ``stable_gamma``,
        "weight_svd" by the ratio of the largest singular values of W and of B, "gd_scale" divides A and B by
        ``adapter_scale``, "unit" leaves them.
      stable_gamma: for "stable".
    """
    key, key_order, key_w = jax.random.split(key, 3)
    u, s, vt = randomized_svd(key, gradient, min(4 * rank, *w.shape), 4)
    order = jnp.arange(2 * rank)
    if direction == "random":
        order = jnp.tile(jax.random.permutation(key_order, 2 * rank)[:rank], 2)
    elif direction == "ArBr":
        order = jnp.concatenate([order[1::2], order[0::2]])
    elif direction == "A2rBr":
        order = jnp.roll(order, rank)
    of_a, of_b = order[:rank], order[rank:]
    a, b = u[:, of_a], s[of_b, None] * vt[of_b]
    if scale == "stable":
        b = b * (w.shape[1] ** 0.25 / stable_gamma**0.5)
    elif scale == "weight_svd":
        largest = randomized_svd(key_w, w, rank, 4)[1][0]
        b = b * jnp.where(s[of_b[0]] > 0, largest / s[of_b[0]], 1.0)
    elif scale == "gd_scale":
        a, b = a / adapter_scale, b / adapter_scale
    return a, b


def randomized_svd(key: Key[Array, ""], w: Matrix, size: int, iterations: int) -> tuple[Array, Array, Array]:
    """About the ``size`` largest singular values of a matrix and their vectors (Halko et al. 2009, 0909.4061).

    As `torch.svd_lowrank` computes them.
    """
    w = _wide(w)
    q, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], size), jnp.float32))
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(w.T @ q)
        q, _ = jnp.linalg.qr(w @ q)
    u, s, vt = _svd(q.T @ w)
    return q @ u, s, vt


def _halves(u: Array, s: Array, vt: Array, rank: int, scale: float) -> Factors:
    """A and B of which each has the root of the singular values, with ``scale A B = u s vt``."""
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _svd(w: Matrix) -> tuple[Array, Array, Array]:
    u, s, vt = jnp.linalg.svd(_wide(w), full_matrices=False)
    return u, s, vt


def _wide(w: Matrix | LowRank) -> Matrix:
    return (w.dense() if isinstance(w, LowRank) else w).astype(jnp.float32)
