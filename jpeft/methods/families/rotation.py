"""Rotations of a weight's inputs: orthogonal matrices from free numbers, and products with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jpeft.checks import POSITIVE_INT, Rule, is_int, or_none
from jpeft.core import backend
from jpeft.core.geometry.convolution import Patches
from jpeft.core.interchange import Field, window
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod

_FEATURES, _ROWS = "features_", "rows"
# Also where a device multiplies float32 in lower precision: the products must stay orthogonal.
_matmul = functools.partial(jnp.matmul, precision="highest")


@dataclass(frozen=True, kw_only=True)
class Rotation(WeightMethod):
    """The base class of methods that rotate a weight's inputs, y = (x R) W + b; of an embedding, its features.

    A subclass defines `rotation` and `rotate`.
    """

    def size(self, site: Site) -> int:
        """The number of rows of R."""
        return site.outputs if site.lookup else site.inputs

    def rotation(self, site: Site, leaves: Leaves) -> Leaves:
        """The factors of R that `rotate` takes."""
        raise TypeError(f"{self.name} does not define rotation")

    def rotate(self, factors: Leaves, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        """x R."""
        raise TypeError(f"{self.name} does not define rotate")

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        factors = self.rotation(site, leaves)
        return {_FEATURES + name: x for name, x in factors.items()} if site.lookup else factors

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if factors := _of_features(leaves):
            return self.rotate(factors, base(x))
        if isinstance(x, Patches):
            return super().apply(leaves, base, x)
        if not _turns_weight(base, x):
            return base(self.rotate(leaves, x))
        y = _times_turned(self, x, base.weight, dict(leaves))
        return y if base.bias is None else y + base.bias

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        if factors := _of_features(leaves):
            return self.rotate(factors, w), b
        rows = leaves.get(_ROWS)
        if rows is None:
            return self.turn(leaves, w), b
        return jnp.zeros_like(w).at[rows].set(self.turn(leaves, w[rows]), unique_indices=True), b

    def turn(self, factors: Leaves, w: Float[Array, "size out"]) -> Float[Array, "size out"]:
        """R W."""
        (turned,) = jax.linear_transpose(functools.partial(self.rotate, factors), w.T)(w.T)  # Wᵀ Rᵀ
        return turned.T


def _turns_weight(base: Linear, x: Any) -> bool:
    """Whether a forward pass turns the weight, x (R W), since it has fewer columns than there are tokens.

    Measured on CPU only. Never in low precision, where the changed weight would be rounded.
    """
    plain = base.plain and backend.flatten_tokens() and x.dtype.itemsize >= 4
    return plain and x.size // x.shape[-1] > base.weight.shape[-1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _times_turned(method: Rotation, x: jax.Array, w: jax.Array, factors: dict[str, Any]) -> jax.Array:
    return x @ method.turn(factors, w)


def _times_turned_jvp(method: Rotation, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    # That of (x R) W: the derivative of R W by itself would compute a gradient of the size of W.
    x, w, factors = primals
    dx, dw, moved = tangents
    moved = jax.tree.map(_instantiated, moved, is_leaf=lambda t: type(t) is SymbolicZero)
    if type(dx) is SymbolicZero:
        rotated, tangent = jax.jvp(lambda f: method.rotate(f, x), (factors,), (moved,))
    else:
        rotated, tangent = jax.jvp(method.rotate, (factors, x), (moved, dx))
    out = tangent @ w
    return _times_turned(method, x, w, factors), out if type(dw) is SymbolicZero else out + rotated @ dw


def _instantiated(tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    aval: Any = tangent.aval
    return jnp.zeros(aval.shape, aval.dtype)


_times_turned.defjvp(_times_turned_jvp, symbolic_zeros=True)


def _of_features(leaves: Leaves) -> dict[str, Any]:
    """The factors of an embedding's rotation; empty for another weight."""
    return {name.removeprefix(_FEATURES): x for name, x in leaves.items() if name.startswith(_FEATURES)}


@dataclass(frozen=True, kw_only=True)
class BlockRotation(Rotation):
    """The base class of rotations within blocks of equal size.

    Attributes:
      block_size: the size of a block.
      blocks: the number of blocks, in place of their size.
    """

    block_size: int | None = None
    blocks: int | None = None
    dtype: Any = "float32"

    default_size: ClassVar[int] = 32
    per_site: ClassVar[tuple[str, ...]] = ("block_size", "blocks", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(("block_size", "blocks"), or_none(POSITIVE_INT))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and self.block_size is not None:
            raise ValueError(
                f"{self.name} takes block_size or blocks, since one gives the other; got block_size={self.block_size} "
                f"and blocks={self.blocks}"
            )

    def prepare(self, site: Site) -> Site:
        site, given = super().prepare(site), self.blocks or self.block_size or self.default_size
        size, what = self.size(site), "blocks" if self.blocks else "block_size"
        least = 1 if self.blocks else 2  # a block of one row does not turn
        fit = [n for n in range(least, size // (3 - least) + 1) if size % n == 0]
        if given not in fit:
            near = min(fit, key=lambda n: abs(n - given), default=None)
            help_ = f"set overrides={{{site.name!r}: {{{what!r}: {near}}}}}" if near else "leave it out with exclude"
            raise ValueError(
                f"{self.name}: {what}={given} does not divide the {size} {'features' if site.lookup else 'inputs'} of "
                f"{site.name!r} into blocks of 2 or more; {help_}"
            )
        return site

    def shape(self, site: Site) -> tuple[int, int]:
        """The number of blocks at a site, and their size."""
        size = self.size(site)
        block = size // self.blocks if self.blocks else self.block_size or self.default_size
        return size // block, block

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        out = super().expand(site, shared, leaves)
        # As in PEFT, the blocks of a kernel's rows are in torch's order: (channel, position in the window).
        order = np.arange(site.inputs, dtype=np.int32).reshape(-1, site.channels).T.reshape(-1)
        return {**out, _ROWS: jnp.asarray(order)} if window(site) else out


def times_blocks(x: Float[Array, "*rows size"], r: Float[Array, "blocks n n"]) -> Float[Array, "*rows size"]:
    """``x`` times the matrix with the blocks ``r`` on its diagonal. A single block stands for all of them."""
    blocks = x.reshape(*x.shape[:-1], -1, r.shape[-1])
    if len(r) == 1:
        return (blocks @ r[0]).reshape(x.shape)
    turned = jnp.matmul(jnp.moveaxis(blocks, -2, 0).reshape(len(r), -1, r.shape[-1]), r)  # XLA would copy more
    return jnp.moveaxis(turned.reshape(len(r), *x.shape[:-1], -1), 0, -2).reshape(x.shape)


def times_butterfly(
    x: Float[Array, "*rows size"], r: Float[Array, "blocks n n"], stride: int
) -> Float[Array, "*rows size"]:
    """`times_blocks` where a block acts on two halves of blocks that lie ``stride`` halves apart."""
    if stride == 1:
        return times_blocks(x, r)
    lead, half = x.shape[:-1], r.shape[-1] // 2
    near = jnp.swapaxes(x.reshape(*lead, -1, 2, stride, half), -2, -3)
    turned = times_blocks(near.reshape(x.shape), r)
    return jnp.swapaxes(turned.reshape(*lead, -1, stride, 2, half), -2, -3).reshape(x.shape)


def skew(v: Float[Array, "*batch entries"], size: int) -> Float[Array, "*batch n n"]:
    """The skew-symmetric matrices with ``v`` above the diagonal, row by row."""
    rows, cols = np.triu_indices(size, 1)
    upper = jnp.zeros((*v.shape[:-1], size, size), v.dtype)
    upper = upper.at[..., rows, cols].set(v, unique_indices=True, indices_are_sorted=True)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley(q: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """(I - Q) (I + Q)⁻¹, a rotation for a skew-symmetric Q."""
    eye = jnp.eye(q.shape[-1], dtype=q.dtype)
    return jnp.linalg.solve(eye + q, eye - q)  # the two commute


def neumann(q: Float[Array, "*batch n n"], terms: int) -> Float[Array, "*batch n n"]:
    """I + 2 Q + 2 Q² + ... + Qᵈ, which is near (I + Q) (I - Q)⁻¹: a rotation for a small skew-symmetric Q.

    As PEFT counts ``terms``: d is ``terms - 1``, but 3 for three terms, and the sum of two is I + 2 Q.
    """
    eye = jnp.eye(q.shape[-1], dtype=q.dtype)
    if terms == 2:
        return eye + 2 * q
    total = 2 * eye + q
    for _ in range(max(terms - 1, 3) - 2):
        total = 2 * eye + _matmul(q, total)
    return eye + _matmul(q, total)


def reflections(
    u: Float[Array, "size r"], orthogonal: bool = False
) -> tuple[Float[Array, "size r"], Float[Array, "r size"]]:
    """A and B with I - A B = H_r ... H_1, the product of the reflections at the columns of ``u`` (its WY form).

    Args:
      u: the vectors; H_i = I - 2 u_i u_iᵀ / |u_i|².
      orthogonal: whether the columns are made orthogonal to each other first, by the Gram-Schmidt process.
    """
    u = u / jnp.linalg.norm(u, axis=0)
    inner = _matmul(u.T, u)
    if orthogonal:
        return u, jnp.linalg.solve(inner / 2, u.T)
    return u, jax.scipy.linalg.solve_triangular(
        jnp.tril(inner) - jnp.eye(len(inner), dtype=u.dtype) / 2, u.T, lower=True
    )


# --- the form in HuggingFace PEFT -------------------------------------------------------------------------------------

_COUNT: Rule = (lambda value: is_int(value) and 0 <= value < 2**31, "an integer, 0 for none")


def block_fields(
    blocks: str, size: str, default: int, fit: Callable[[int, int], int] = lambda rows, given: given
) -> tuple[Field, Field]:
    """PEFT's fields for the number of blocks and for their size, of which one is 0.

    Args:
      blocks, size: PEFT's names.
      default: the size where the configuration lacks the field.
      fit: ``(rows, given) -> value`` that PEFT takes for a given value.
    """

    def read(given: int, site: Site | None) -> int | None:
        return (given if site is None else fit(site.outputs if site.lookup else site.inputs, given)) if given else None

    def write_blocks(method: BlockRotation, site: Site, config: Mapping[str, Any]) -> int:
        return method.blocks or 0

    def write_size(method: BlockRotation, site: Site, config: Mapping[str, Any]) -> int:
        return 0 if method.blocks else method.block_size or method.default_size

    return (
        Field(blocks, "blocks", 0, _COUNT, read=read, write=write_blocks),
        Field(size, "block_size", default, _COUNT, read=read, write=write_size),
    )
