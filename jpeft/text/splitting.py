"""Train/test splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from jpeft.errors import UserError


class _Examples(Protocol):
    """Examples of one file."""

    @property
    def source(self) -> str: ...

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int], source: str) -> Any: ...


ExamplesT = TypeVar("ExamplesT", bound=_Examples)


def split_groups(
    examples: ExamplesT, groups: Sequence[np.ndarray], seed: int, share: float
) -> tuple[ExamplesT, ExamplesT]:
    """A random split into training and evaluation examples, both in the order of the file.

    Args:
        groups: the rows of each group, such as a class. Each gives `share` of its rows to the evaluation set, at least
            one, but keeps one for training.

    Raises:
        UserError: every group has a single row.
    """
    rng = np.random.default_rng(seed)
    held_out: set[int] = set()
    for rows in groups:
        size = min(len(rows) - 1, max(1, round(share * len(rows))))
        held_out.update(rng.permutation(rows)[:size].tolist())
    if not held_out:
        raise UserError(f"{examples.source}: too few examples to hold some out; give an evaluation file (`eval`)")
    train = [row for row in range(len(examples)) if row not in held_out]
    return (
        examples.take(train, examples.source),
        examples.take(sorted(held_out), f"{examples.source} (held out)"),
    )
