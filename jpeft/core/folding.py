"""Folding of repeated names: ``layer/0/query``, ``layer/1/query``, ``layer/2/query`` are ``layer/{0..2}/query``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from itertools import product
from typing import NamedTuple

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]*)(?![0-9])")  # one with a leading zero is text: {0..9} does not say it
_SET = re.compile(r"\{([0-9]+(?:\.\.[0-9]+)?(?:,[0-9]+(?:\.\.[0-9]+)?)*)\}")
_RUN = 3  # how many numbers in a row are written as a range

# Names that differ in numbers alone, as the set of numbers at each place, and their positions in the given sequence.
_Blocks = dict[tuple[frozenset[int], ...], list[int]]


class Fold(NamedTuple):
    """Names that are written as one.

    Attributes:
      name: the name, with sets such as ``{0..3,7}`` for numbers. Several sets stand for all their combinations.
      members: the positions of the names that it stands for. Where there is only one, ``name`` is that name.
    """

    name: str
    members: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ×{len(self.members)}" if len(self.members) > 1 else self.name


def fold(names: Sequence[str], keys: Sequence[Hashable] | None = None) -> list[Fold]:
    """Folds names that differ in numbers alone, in the order of their first members.

    Names fold only if a set of numbers at each place says exactly them. A name that has braces itself is left as it is.

    Args:
      names: the names.
      keys: a key for each name; only names with equal keys fold.

    >>> [str(x) for x in fold(["layer/0/q", "layer/1/q", "layer/2/q", "layer/0/k", "layer/2/k", "head"])]
    ['layer/{0..2}/q ×3', 'layer/{0,2}/k ×2', 'head']
    >>> [str(x) for x in fold(["a/0/b/0", "a/1/b/1"])]
    ['a/0/b/0', 'a/1/b/1']
    """
    groups: dict[tuple[tuple[tuple[str, ...], Hashable], int], _Blocks] = {}
    seen: dict[Hashable, int] = {}
    for i, name in enumerate(names):
        pieces = [name] if "{" in name or "}" in name else _NUMBER.split(name)
        key = (tuple(pieces[::2]), keys[i] if keys else None)
        again = seen[key, name] = seen.get((key, name), -1) + 1  # a name that is given twice is two
        numbers = tuple(frozenset([int(number)]) for number in pieces[1::2])
        groups.setdefault((key, again), {})[numbers] = [i]
    folds = []
    for ((texts, _), _), blocks in groups.items():
        for numbers, members in _folded(blocks).items():
            name = names[members[0]] if len(members) == 1 else _written(texts, numbers)
            folds.append(Fold(name, tuple(sorted(members))))
    return sorted(folds, key=lambda found: found.members[0])


def unfold(name: str) -> list[str]:
    """The names that a folded name stands for. Inverse of `fold`.

    >>> unfold("layer/{0..2,5}/q")
    ['layer/0/q', 'layer/1/q', 'layer/2/q', 'layer/5/q']
    """
    pieces = _SET.split(name)
    choices = [[piece] if i % 2 == 0 else [str(n) for n in _numbers(piece)] for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def _folded(blocks: _Blocks) -> _Blocks:
    """Blocks with as many as possible joined, each time at the place where most join."""
    while len(blocks) > 1:
        places = range(len(next(iter(blocks))))
        joined = min((_joined(blocks, place) for place in places), key=len, default=blocks)
        if len(joined) == len(blocks):
            break
        blocks = joined
    return blocks


def _joined(blocks: _Blocks, place: int) -> _Blocks:
    """Blocks that differ at one place alone as one, so that a block stays a product of its sets."""
    together: dict[tuple[tuple[frozenset[int], ...], ...], list[tuple[frozenset[int], list[int]]]] = {}
    for numbers, members in blocks.items():
        rest = (numbers[:place], numbers[place + 1 :])
        together.setdefault(rest, []).append((numbers[place], members))
    return {
        (*before, frozenset().union(*(own for own, _ in found)), *after): [i for _, own in found for i in own]
        for (before, after), found in together.items()
    }


def _written(texts: Sequence[str], numbers: Sequence[Iterable[int]]) -> str:
    written = [_written_set(sorted(found)) for found in numbers]
    return "".join(text + number for text, number in zip(texts, [*written, ""], strict=True))


def _written_set(numbers: Sequence[int]) -> str:
    """Numbers in order, as ``{0..3,7}``, or a number alone.

    >>> _written_set([0, 1, 2, 3, 7, 8]), _written_set([4])
    ('{0..3,7,8}', '4')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"{{{','.join(f'{r[0]}..{r[-1]}' if len(r) >= _RUN else ','.join(map(str, r)) for r in runs)}}}"


def _numbers(text: str) -> list[int]:
    """The numbers of a set, without its braces. Inverse of `_written_set`."""
    found: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("..")
        found += range(int(first), int(last or first) + 1)
    return found


def listed(names: Sequence[str], limit: int | None = None) -> str:
    """Names as text, folded; beyond ``limit`` folds, how many names are left.

    >>> listed(["h/0/b", "h/1/b", "wte", "wpe"], 2)
    'h/{0,1}/b ×2, wte and 1 more'
    """
    folds = fold(names)
    shown = folds[:limit]
    rest = sum(len(found.members) for found in folds[len(shown) :])
    return ", ".join(map(str, shown)) + (f" and {rest} more" if rest else "")
