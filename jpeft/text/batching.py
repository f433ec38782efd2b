"""Batches of tokenized examples: grouped by length, padded to few widths, resumable at any step."""

from __future__ import annotations

import abc
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np

# Padded lengths that a batch may take, below the maximum. Each costs a compilation and saves padding on every step: on
# the food reviews at 128 tokens, these three pad 20 % (32, 64 and 128: 25 %, one length alone: 68 %).
_BUCKETS = (48, 80, 128, 192, 256, 384, 512, 1024)

# Batches that are sorted by length together: enough to pad little, few enough that batches stay mixed over the data.
_SORTED_TOGETHER = 32

BatchT = TypeVar("BatchT")
CountT = TypeVar("CountT")


class Batches(abc.ABC, Generic[BatchT, CountT]):
    """The batches of all epochs.

    The batch of a step depends on the data, the seed and the step alone, so that a run can resume at any step.
    Subclasses plan the batches of an epoch (`_epoch`), make the arrays of a planned batch (`_make`) and count its
    content (`_count`).

    Attributes:
        batch_size: rows of a batch.
        epochs: passes over the data.
    """

    batch_size: int
    epochs: int

    @property
    @abc.abstractmethod
    def per_epoch(self) -> tuple[int, ...]:
        """The number of batches in each epoch."""

    @abc.abstractmethod
    def _epoch(self, epoch: int) -> Sequence[Any]:
        """The planned batches of an epoch, a function of the seed and the epoch."""

    @abc.abstractmethod
    def _make(self, planned: Any, rows: np.ndarray | None) -> BatchT:
        """The arrays of a planned batch, or of some of its rows."""

    @abc.abstractmethod
    def _count(self, planned: Any) -> CountT:
        """The content of a planned batch."""

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, step: int) -> BatchT:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self._make(self._planned(step), None)

    def __iter__(self) -> Iterator[BatchT]:
        return self.start(0)

    def start(self, step: int, rows: np.ndarray | None = None) -> Iterator[BatchT]:
        """The batches from a step on; the next ones are prefetched.

        Args:
            rows: the rows of each batch to make, on a host that feeds only these; all by default.

        >>> next(batches.start(40))  # doctest: +SKIP
        """
        import grain

        if not 0 <= step <= len(self):
            raise IndexError(f"step {step} of {len(self)}")

        # Not a bound method: grain prints what it maps, and with it every array that the method is bound to.
        def make(step: int) -> BatchT:
            return self._make(self._planned(step), rows)

        # One thread: it computes while the step runs on the device; more would only wait for each other (the GIL).
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.range(step, len(self)).map(make).to_iter_dataset(options))

    def counts(self, step: int) -> Iterator[CountT]:
        """The content of each batch from a step on, on all hosts together.

        >>> next(batches.counts(40))  # doctest: +SKIP
        """
        return (self._count(self._planned(step)) for step in range(step, len(self)))

    def epoch(self, step: int) -> int:
        """The epoch of a step, from 0; the number of epochs past the last step.

        >>> batches.epoch(311)  # doctest: +SKIP
        1
        """
        return bisect_right(self._ends, step)

    def epochs_after(self, step: int) -> float:
        """The number of epochs after so many steps.

        >>> batches.epochs_after(467)  # doctest: +SKIP
        1.5
        """
        epoch = self.epoch(step)
        position = self._position(step, epoch)
        return epoch + (position / self.per_epoch[epoch] if position else 0.0)

    def _planned(self, step: int) -> Any:
        epoch = self.epoch(step)
        return self._epoch(epoch)[self._position(step, epoch)]

    def _position(self, step: int, epoch: int) -> int:
        """The index of a step in its epoch."""
        return step - (self._ends[epoch - 1] if epoch else 0)

    @cached_property
    def _ends(self) -> list[int]:
        """The first step after each epoch."""
        return list(accumulate(self.per_epoch))


def by_length(lengths: np.ndarray, batch_size: int, seed: Sequence[int] | None = None) -> list[np.ndarray]:
    """The examples of each batch of an epoch: shuffled, sorted by length a few batches at a time, batches shuffled.

    Without a seed, all are sorted by length and nothing is shuffled.

    >>> [rows.tolist() for rows in by_length(np.array([50, 3, 70, 4, 9]), 2)]
    [[1, 3], [4, 0], [2]]
    """
    if seed is None:
        return chunks(np.argsort(lengths, kind="stable"), batch_size)
    rng = np.random.default_rng(seed)
    together = chunks(rng.permutation(len(lengths)), batch_size * _SORTED_TOGETHER)
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in together])
    batches = chunks(order, batch_size)
    return [batches[position] for position in rng.permutation(len(batches))]


def bucket(length: int, max_length: int) -> int:
    """The padded length of a batch whose longest row has `length` tokens.

    >>> bucket(50, 128), bucket(100, 100)
    (80, 100)
    """
    return next((size for size in _BUCKETS if length <= size < max_length), max_length)


def chunks(rows: Any, size: int) -> list[Any]:
    """Consecutive slices of `size`; the last may be shorter.

    >>> [piece.tolist() for piece in chunks(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    return [rows[start : start + size] for start in range(0, len(rows), size)]
