"""Numbers of torch's CPU generator, without torch: HuggingFace folders name a seed for what they leave out.

torch and numpy have the same generator, a Mersenne twister, and start it alike. What differs is how its 32-bit numbers
become permutations and floats, see ``aten/src/ATen/core/TransformationHelper.h`` and ``TensorFactories.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jpeft.checks import Rule, is_int

SEED: Rule = (lambda value: is_int(value) and -(2**63) <= value < 2**64, "an integer of 64 bits")  # as torch takes them
_FEW = (2**32 - 1) // 20  # from this length on, torch draws a permutation in another way
_CHUNK = 1 << 22


class Generator:
    """``torch.Generator("cpu").manual_seed(seed)``. Each call takes the numbers that follow those of the last.

    >>> Generator(0).uniform((3,), 0.0, 1.0)  # torch.rand(3)
    array([0.4962566 , 0.7682218 , 0.08847743], dtype=float32)
    """

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed % 2**32)

    def bits(self, count: int) -> np.ndarray:
        """The next numbers, each of 32 random bits."""
        return self._state.randint(0, 2**32, count, dtype=np.uint32)

    def uniform(self, shape: Sequence[int], low: float, high: float, dtype: str = "float32") -> np.ndarray:
        """``torch.empty(shape, dtype=dtype).uniform_(low, high)``, for float32 and narrower dtypes.

        Equal to torch's where its compiled code multiplies and adds in one rounding, as on processors with AVX2;
        otherwise within one rounding.
        """
        start, end = np.float32(low), np.float32(high)
        unit = (self.bits(math.prod(shape)) & np.uint32(2**24 - 1)) * 2.0**-24
        out = (unit * np.float64(end - start) + np.float64(start)).astype(np.float32).astype(dtype)
        out[out >= end.astype(dtype)] = start.astype(dtype)  # the interval is half open
        return out.reshape(shape)

    def kaiming_uniform(self, shape: Sequence[int], gain: float = math.sqrt(2), dtype: str = "float32") -> np.ndarray:
        """``torch.nn.init.kaiming_uniform_`` of a weight ``[out, in, ...]``, by its fan-in.

        Args:
          shape: the weight's shape.
          gain: sqrt(2 / (1 + a²)) for torch's argument ``a``, which is 0 by default.
          dtype: its dtype.
        """
        bound = math.sqrt(3.0) * (gain / math.sqrt(math.prod(shape[1:])))
        return self.uniform(shape, -bound, bound, dtype)


def randperm(n: int, count: int, seed: int) -> np.ndarray:
    """``torch.randperm(n, generator=torch.Generator("cpu").manual_seed(seed))[:count]``.

    >>> randperm(10, 4, seed=0)
    array([4, 1, 7, 5])
    """
    count, generator = min(count, n), Generator(seed)
    return _head(generator, n, count) if n < _FEW else _head_of_many(generator, n, count)


def _head(generator: Generator, n: int, count: int) -> np.ndarray:
    """Each place, from the first on, is swapped with one at or behind it; a dict holds the few that were."""
    swaps = min(count, n - 1)
    others = np.arange(swaps) + generator.bits(swaps) % (n - np.arange(swaps))
    head, moved = np.arange(count), {}
    for place, other in enumerate(others.tolist()):
        head[place] = moved.get(other, other)
        moved[other] = moved.pop(place, place)
    for place in range(swaps, count):
        head[place] = moved.get(place, place)
    return head


def _head_of_many(generator: Generator, n: int, count: int) -> np.ndarray:
    """Place i takes what a place before it holds, which takes i: from ``count`` on, only these can change the head."""
    head = np.arange(count)
    for start in range(0, n, _CHUNK):
        places = np.arange(start, min(start + _CHUNK, n))
        high, low = generator.bits(2 * places.size).astype(np.uint64).reshape(-1, 2).T
        others = ((high << np.uint64(32) | low) % (places + 1).astype(np.uint64)).astype(np.int64)
        few = np.searchsorted(places, count)
        for place, other in zip(places[:few].tolist(), others[:few].tolist(), strict=True):
            head[place], head[other] = head[other], place
        late = others[few:] < count
        head[others[few:][late]] = places[few:][late]  # of equal indices, numpy keeps the last
    return head
