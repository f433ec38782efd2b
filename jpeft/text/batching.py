"""Batches by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Padded lengths that a batch may take, below the maximum. Each costs a compilation, and saves padding on every step: on
# the food reviews at 128 tokens, these three pad 20 % (32, 64 and 128: 25 %, one length alone: 68 %).
_BUCKETS = (48, 80, 128, 192, 256, 384, 512, 1024)


# Batches that are sorted by length together: enough to pad little, few enough that batches stay mixed over the data.
_SORTED_TOGETHER = 32


def by_length(lengths: np.ndarray, batch_size: int, seed: Sequence[int] | None = None) -> list[np.ndarray]:
    """The rows of each batch of an epoch: shuffled, sorted by length a few batches at a time, the batches shuffled
    again. Without a seed, in order of length.

    >>> [rows.tolist() for rows in by_length(np.array([50, 3, 70, 4, 9]), 2)]
    [[1, 3], [4, 0], [2]]
    """
    if seed is None:
        return chunks(np.argsort(lengths, kind="stable"), batch_size)
    rng = np.random.default_rng(seed)
    together = chunks(rng.permutation(len(lengths)), batch_size * _SORTED_TOGETHER)
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in together])
    cuts = chunks(order, batch_size)
    return [cuts[position] for position in rng.permutation(len(cuts))]


def bucket(length: int, max_length: int) -> int:
    """The padded length for a batch whose longest row has `length` tokens.

    >>> bucket(50, 128), bucket(100, 100)
    (80, 100)
    """
    return next((size for size in _BUCKETS if length <= size < max_length), max_length)


def chunks(rows: Any, size: int) -> list[Any]:
    """Consecutive pieces of `size`, the last may be smaller.

    >>> [piece.tolist() for piece in chunks(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    return [rows[start : start + size] for start in range(0, len(rows), size)]
