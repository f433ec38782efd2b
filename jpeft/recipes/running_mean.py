"""The running mean of a run's loss, as its progress and its picture show it."""

from __future__ import annotations

_SHARE, _LEAST = 1 / 40, 5  # of the run's steps, and steps, that count for most of the mean


class RunningMean:
    """The mean of the values so far, in which earlier ones count exponentially less: about a 40th of all count.

    Args:
        total: how many values there are in all.

    >>> mean = RunningMean(3)
    >>> [round(mean.add(x), 3) for x in (1.0, 0.0, 0.0)]
    [1.0, 0.444, 0.262]
    """

    def __init__(self, total: int):
        self._kept = 1 - 1 / max(_LEAST, _SHARE * total)
        self._sum, self._weight = 0.0, 0.0

    def add(self, value: float) -> float:
        """Takes the next value. Returns the mean."""
        self._sum = self._kept * self._sum + value
        self._weight = self._kept * self._weight + 1
        return self._sum / self._weight
