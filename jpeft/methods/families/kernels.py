"""Factors of convolution kernels, here and in torch.

Here the rows of a kernel's matrix are (position in the window, channel), in torch (channel, position).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft.core.interchange import window
from jpeft.core.sites import Site


def positions(site: Site) -> int:
    """The number of positions in a convolution's window; 1 for another weight."""
    return math.prod(window(site))


# --- low-rank factors in torch ----------------------------------------------------------------------------------------


def rows_to_torch(a: np.ndarray, site: Site) -> np.ndarray:
    """``[rank, in]`` from a factor ``[in, rank]``; for a convolution ``[rank, channels, window...]``."""
    return np.moveaxis(a.reshape(*window(site), -1, a.shape[-1]), (-1, -2), (0, 1))


def rows_to_tree(a: np.ndarray, site: Site) -> np.ndarray:
    """Inverse of `rows_to_torch`."""
    return np.moveaxis(a, (0, 1), (-1, -2)).reshape(-1, a.shape[0])


def columns_to_torch(b: np.ndarray, site: Site) -> np.ndarray:
    """``[out, rank]`` from a factor ``[rank, out]``; for a convolution ``[out, rank, 1...]``."""
    return b.T.reshape(*b.T.shape, *(1 for _ in window(site)))


def columns_to_tree(b: np.ndarray, site: Site) -> np.ndarray:
    """Inverse of `columns_to_torch`."""
    return b.reshape(b.shape[:2]).T


def flat_rows_to_torch(a: np.ndarray, site: Site) -> np.ndarray:
    """``[rank, in]`` from a factor ``[in, rank]``; for a convolution ``[rank, channels * window]``."""
    return rows_to_torch(a, site).reshape(a.shape[-1], -1)


def flat_rows_to_tree(a: np.ndarray, site: Site) -> np.ndarray:
    """Inverse of `flat_rows_to_torch`."""
    return rows_to_tree(a.reshape(a.shape[0], -1, *window(site)), site)


# --- kernels in three factors (FedPara's proposition 3): [channels, rank], [positions, rank, rank], [rank, out] ------


def joined(
    b: Float[Array, "channels rank"], t: Float[Array, "positions rank rank"]
) -> Float[Array, "positions channels rank"]:
    """The first factor of a kernel, from its two for channels and for positions."""
    return jnp.einsum("cj,pji->pci", b, t)


def core_to_torch(t: np.ndarray, site: Site) -> np.ndarray:
    """``[rank, rank, window...]`` from ``[positions, rank, rank]``. PEFT's window has two axes for 1-D kernels too."""
    sizes = (*window(site), 1)[:2]
    return np.moveaxis(t.reshape(*sizes, *t.shape[1:]), (-1, -2), (0, 1))


def core_to_tree(t: np.ndarray, site: Site) -> np.ndarray:
    """Inverse of `core_to_torch`."""
    return np.moveaxis(t, (0, 1), (-1, -2)).reshape(-1, *t.shape[1::-1])
