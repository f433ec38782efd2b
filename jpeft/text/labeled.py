"""Labeled texts: read from CSV or JSONL, tokenized, cut into batches.

    train = read("train.csv", text="review", label="score")
    names = label_names(train)
    encoded = encode(train.texts, load_tokenizer(folder, 128), 128, label_ids(train, names))
    for batch in Batches(encoded, batch_size=32, seed=0).start(step=40): ...

The batch of a step is a pure function of the data, the seed and the step: a run can be taken up anywhere.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jpeft.errors import UserError
from jpeft.text.batching import bucket, by_length
from jpeft.text.reading import Row, check_text, check_unicode, csv_rows, decode, jsonl_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
# No tokenizer makes one token of more characters than this, but for runs of blanks: what lies beyond is not read.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Examples:
    """Texts and their labels (empty where none were asked for), as read from `lines` of the file `source`."""

    source: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int], source: str) -> Examples:
        """The given rows.

        >>> Examples("train.csv", ("good", "stale"), (), (2, 3)).take([1], "the second").texts
        ('stale',)
        """
        pick = lambda values: tuple(values[row] for row in rows) if values else ()  # noqa: E731
        return Examples(source, pick(self.texts), pick(self.labels), pick(self.lines))


class Encoded(NamedTuple):
    """Token ids (one array per text) and label ids (zeros where there are no labels)."""

    ids: tuple[np.ndarray, ...]
    labels: np.ndarray
    max_length: int
    pad_id: int


class Batch(NamedTuple):
    """Rows padded to a bucket's length: `weight` is 0 for the rows that only fill a last batch, `rows` is -1 there."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    rows: np.ndarray


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path, text: str, label: str | None = None) -> Examples:
    """Texts and labels of a .csv or .jsonl file, in UTF-8. Whatever is not as it should be is a `UserError`.

    >>> read("reviews.csv", text="review", label="stars")  # doctest: +SKIP
    """
    path = Path(path)
    readers = {".csv": csv_rows, ".jsonl": jsonl_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a .csv or .jsonl file, found the suffix {path.suffix or '(none)'!r}")
    return _examples(path, readers[path.suffix.lower()](path, decode(path)), text, label)


def _examples(path: Path, rows: Iterator[Row], text: str, label: str | None) -> Examples:
    texts, labels, lines = [], [], []
    for number, row in rows:
        for column in (text, label):
            if column is not None and column not in row:
                raise UserError(
                    f"{path}: no column {column!r} at line {number}; the columns are {', '.join(map(repr, row))} "
                    "(--text and --label choose)"
                )
        texts.append(check_text(path, number, text, row[text]))
        lines.append(number)
        if label is not None:
            labels.append(_label(path, number, label, row[label]))
    if not texts:
        raise UserError(f"{path}: no examples; expected a row for each below the header")
    return Examples(str(path), tuple(texts), tuple(labels), tuple(lines))


def _label(path: Path, line: int, column: str, value: Any) -> str:
    name = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
    no_label = isinstance(value, (dict, list)) or (isinstance(value, float) and not math.isfinite(value))
    if not name or no_label:
        raise UserError(f"{path}: line {line}: expected a label in {column!r}, found {json.dumps(value)[:40]}")
    return check_unicode(path, line, column, name)


# ----------------------------------------------------------------------------------------------------------- labels


def label_names(train: Examples) -> tuple[str, ...]:
    """The classes of a training set, sorted, whole numbers by value.

    >>> label_names(Examples("train.csv", ("tea", "stale", "tea"), ("10", "9", "10"), (2, 3, 4)))
    ('9', '10')
    """
    names = sorted(set(train.labels), key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    if len(names) < 2:
        raise UserError(f"{train.source}: every example has the label {names[0]!r}; two classes or more are needed")
    if len(names) == len(train) > 20:
        raise UserError(f"{train.source}: {len(names)} examples, each with a label of its own: no class to learn")
    return tuple(names)


def label_ids(examples: Examples, names: Sequence[str]) -> np.ndarray:
    """Labels as positions in `names`; one that training never showed is an error.

    >>> label_ids(Examples("test.csv", ("tea",), ("good",), (2,)), ("bad", "good"))
    array([1], dtype=int32)
    """
    index = {name: position for position, name in enumerate(names)}
    unseen = Counter(name for name in examples.labels if name not in index)
    if unseen:
        name, _ = unseen.most_common(1)[0]
        line = examples.lines[examples.labels.index(name)]
        raise UserError(
            f"{examples.source}: {unseen.total()} of {len(examples)} examples have a label unseen in training: "
            f"{', '.join(map(repr, list(unseen)[:5]))} (first {name!r} at line {line}); training has {', '.join(names)}"
        )
    return np.asarray([index[name] for name in examples.labels], np.int32)


def train_test_split(examples: Examples, seed: int, share: float = 0.1) -> tuple[Examples, Examples]:
    """Split off a share of every class for evaluation; a class of one stays in training.

    >>> train, test = train_test_split(Examples("train.csv", tuple("abcd"), ("x", "x", "y", "y"), (2, 3, 4, 5)), seed=0)
    >>> len(train), test.labels
    (2, ('x', 'y'))
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(examples.labels)
    held = []
    for name in label_names(examples):
        rows = np.flatnonzero(labels == name)
        held.append(rng.permutation(rows)[: min(len(rows) - 1, max(1, round(share * len(rows))))])
    chosen = {int(row) for row in np.concatenate(held)}
    if not chosen:
        raise UserError(f"{examples.source}: too few examples to hold some out; give an evaluation file (--eval)")
    kept = [row for row in range(len(examples)) if row not in chosen]
    return examples.take(kept, examples.source), examples.take(sorted(chosen), f"{examples.source} (held out)")


def length_limit(config: Any) -> int:
    """The longest input that a model's configuration allows.

    >>> import types
    >>> length_limit(types.SimpleNamespace(max_position_embeddings=512, model_type="bert"))
    512
    """
    limit = int(getattr(config, "max_position_embeddings", 512))
    if "roberta" in str(getattr(config, "model_type", "")) or getattr(config, "model_type", "") == "camembert":
        limit -= int(getattr(config, "pad_token_id", 1)) + 1  # their positions begin behind the padding's
    return limit


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    labels: np.ndarray | None = None,
    pad_id: int = 0,
    vocab_size: int | None = None,
) -> Encoded:
    """Token ids of texts, cut to `max_length`. A text of any size costs no more than what is kept of it.

    Args:
        labels: label ids, zeros by default. pad_id: what will fill a row.
        vocab_size: of the model: an id that it has no row for is a `UserError`.

    >>> encode(["good tea", "stale"], load_tokenizer(folder, 128), 128)  # doctest: +SKIP
    """
    cut = _CHARACTERS_PER_TOKEN * max_length
    encodings = tokenizer.encode_batch([text[:cut] for text in texts])
    ids = tuple(np.asarray(encoding.ids, np.int32) for encoding in encodings)
    top = max((int(row.max()) for row in ids if row.size), default=0)
    if vocab_size is not None and top >= vocab_size:  # looked up, it would give NaN
        raise UserError(
            f"the tokenizer gives {tokenizer.id_to_token(top)!r} the id {top}, but the model's vocabulary is "
            f"{vocab_size}: tokenizer.json belongs to another model"
        )
    return Encoded(ids, np.zeros(len(ids), np.int32) if labels is None else labels, max_length, pad_id)


# --------------------------------------------------------------------------------------------------------- batching


class Count(NamedTuple):
    """What a batch holds: texts, and their tokens."""

    examples: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of all epochs: that of a step depends on the data, the seed and the step, and on nothing before it.

    Every epoch shows every example once. It is shuffled, sorted by length a few batches at a time so that little is
    padding, and the batches are shuffled again. Without a seed it is one pass in order of length, for evaluation.

    >>> encoded = Encoded((np.ones(5, np.int32),) * 7, np.zeros(7, np.int32), 128, 0)
    >>> [int(batch.weight.sum()) for batch in Batches(encoded, batch_size=4, epochs=2).start(1)]
    [3, 4, 3]
    """

    encoded: Encoded
    batch_size: int
    seed: int | None = None
    epochs: int = 1

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch, the last padded.

        >>> encoded = Encoded((np.ones(5, np.int32),) * 7, np.zeros(7, np.int32), 128, 0)
        >>> Batches(encoded, batch_size=4).per_epoch
        2
        """
        return -(-len(self.encoded.ids) // self.batch_size)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def epochs_after(self, step: int) -> float:
        """How many epochs so many steps make.

        >>> encoded = Encoded((np.ones(5, np.int32),) * 7, np.zeros(7, np.int32), 128, 0)
        >>> Batches(encoded, batch_size=4).epochs_after(1)
        0.5
        """
        return step / self.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)

    def start(self, step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches from a step on; or those of their rows that are given, which are this host's.

        >>> next(batches.start(40))  # doctest: +SKIP
        """
        for texts in self._from(step):
            batch = self._pad(texts)
            yield batch if rows is None else Batch(*(column[rows] for column in batch))

    def counts(self, step: int) -> Iterator[Count]:
        """What the batches from a step on hold, on all hosts together.

        >>> encoded = Encoded((np.ones(5, np.int32),) * 7, np.zeros(7, np.int32), 128, 0)
        >>> list(Batches(encoded, batch_size=4).counts(0))
        [Count(examples=4, tokens=20), Count(examples=3, tokens=15)]
        """
        for texts in self._from(step):
            yield Count(len(texts), sum(len(self.encoded.ids[row]) for row in texts))

    def _from(self, step: int) -> Iterator[np.ndarray]:
        """The texts of each batch from a step on."""
        first, position = divmod(step, self.per_epoch)
        for epoch in range(first, self.epochs):
            yield from self._order(epoch)[position:]
            position = 0

    def _order(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch, by (seed, epoch) alone."""
        lengths = np.asarray([len(ids) for ids in self.encoded.ids])
        return by_length(lengths, self.batch_size, None if self.seed is None else (self.seed, epoch))

    def _pad(self, rows: np.ndarray) -> Batch:
        """The rows as one batch of a bucket's width; missing rows are filled with ones that weigh nothing."""
        ids = [self.encoded.ids[row] for row in rows]
        shape = (self.batch_size, bucket(max(map(len, ids)), self.encoded.max_length))
        input_ids, mask = np.full(shape, self.encoded.pad_id, np.int32), np.zeros(shape, np.int32)
        for slot, row in enumerate(ids):
            input_ids[slot, : len(row)] = row
            mask[slot, : len(row)] = 1
        mask[len(rows) :, 0] = 1  # a filler row attends to something, so that it is finite
        fill = (0, self.batch_size - len(rows))
        labels = np.pad(self.encoded.labels[rows], fill)
        weight = np.pad(np.ones(len(rows), np.float32), fill)
        return Batch(input_ids, mask, labels, weight, np.pad(rows.astype(np.int32), fill, constant_values=-1))
