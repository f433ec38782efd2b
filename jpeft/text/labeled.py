"""Labeled texts for classification: read from CSV or JSONL, tokenized, and batched.

train = read("train.csv", text="review", label="score")
names = label_names(train)
encoded = encode(train.texts, load_tokenizer(folder, 128), 128, label_ids(train, names))
for batch in Batches(encoded, batch_size=32, seed=0).start(step=40): ...
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jpeft.errors import UserError
from jpeft.storage import as_path
from jpeft.text import batching
from jpeft.text.reading import Row, check_text, check_unicode, csv_rows, json_rows, jsonl_rows, read_text
from jpeft.text.splitting import split_groups

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# No tokenizer makes one token of more characters, except from runs of blanks. Text beyond is not tokenized.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Examples:
    """Texts and their labels.

    Attributes:
        source: the file they were read from.
        texts: one per example.
        labels: one per example; empty if the file was read without labels.
        lines: the line of each example in the file.
        unused: the other columns of the file, of which nothing is read.
    """

    source: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...]
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int], source: str) -> Examples:
        """The given rows.

        >>> Examples("train.csv", ("good", "stale"), (), (2, 3)).take([1], "the second").texts
        ('stale',)
        """
        texts, lines = tuple(self.texts[row] for row in rows), tuple(self.lines[row] for row in rows)
        labels = tuple(self.labels[row] for row in rows) if self.labels else ()
        return Examples(source, texts, labels, lines, self.unused)


class Encoded(NamedTuple):
    """Tokenized texts.

    Attributes:
        ids: int32 token ids, an array per text.
        labels: int32 label ids; zeros if there are no labels.
        max_length: the length that no text exceeds.
        pad_id: the padding token.
        truncated: the number of texts that were longer.
    """

    ids: tuple[np.ndarray, ...]
    labels: np.ndarray
    max_length: int
    pad_id: int
    truncated: int = 0


class Batch(NamedTuple):
    """Texts padded to one width.

    Attributes:
        input_ids: int32 `[rows, length]`.
        attention_mask: int32 `[rows, length]`; 1 for tokens, 0 for padding.
        labels: int32 `[rows]`.
        weight: float32 `[rows]`; 1 for texts, 0 for the empty rows that fill up a last batch.
        rows: int32 `[rows]`; the index of each text, -1 for empty rows.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    rows: np.ndarray


class Count(NamedTuple):
    """The number of texts and tokens in a batch."""

    examples: int
    tokens: int


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path, text: str, label: str | None = None) -> Examples:
    """Reads texts and labels from a .csv or .jsonl file, or a .json file that holds an array, in UTF-8.

    Args:
        text: the column of the texts.
        label: the column of the labels; none are read by default.

    Raises:
        UserError: the file cannot be read or a row is malformed; the message names the line.

    >>> read("reviews.csv", text="review", label="stars")  # doctest: +SKIP
    """
    path = as_path(path)
    if text == label:
        raise UserError(f"the column {text!r} cannot be both the text and the label (`text` and `label`)")
    readers = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a .csv, .jsonl or .json file, got the suffix {path.suffix or '(none)'!r}")
    return _examples(path, readers[path.suffix.lower()](path, read_text(path)), text, label)


def _examples(path: Path, rows: Iterator[Row], text: str, label: str | None) -> Examples:
    texts, labels, lines, columns = [], [], [], {}
    for number, row in rows:
        columns |= dict.fromkeys(row)
        for column in (text, label):
            if column is not None and column not in row:
                raise UserError(
                    f"{path}: no column {column!r} at line {number}; the columns are {', '.join(map(repr, row))} "
                    "(choose with `text` and `label`)"
                )
        texts.append(check_text(path, number, text, row[text]))
        lines.append(number)
        if label is not None:
            labels.append(_label(path, number, label, row[label]))
    if not texts:
        raise UserError(f"{path}: no examples; expected rows below the header")
    unused = tuple(column for column in columns if column not in (text, label))
    return Examples(str(path), tuple(texts), tuple(labels), tuple(lines), unused)


def _label(path: Path, line: int, column: str, value: Any) -> str:
    name = value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
    malformed = isinstance(value, (dict, list)) or (isinstance(value, float) and not math.isfinite(value))
    if not name or malformed or name.lower() == "nan":  # as a spreadsheet or pandas writes a missing value
        raise UserError(f"{path}: line {line}: expected a label in {column!r}, got {json.dumps(value)[:40]}")
    return check_unicode(path, line, column, name)


# ----------------------------------------------------------------------------------------------------------- labels


def label_names(train: Examples) -> tuple[str, ...]:
    """The classes of a training set, sorted; whole numbers are sorted by value.

    Raises:
        UserError: there is only one class, every example has a class of its own, or two names are the same number.

    >>> label_names(Examples("train.csv", ("tea", "stale", "tea"), ("10", "9", "10"), (2, 3, 4)))
    ('9', '10')
    """
    names = sorted(set(train.labels), key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    if len(names) < 2:
        raise UserError(f"{train.source}: every example has the label {names[0]!r}; at least two classes are needed")
    if len(names) == len(train) > 20:
        raise UserError(f"{train.source}: {len(names)} examples, each with a label of its own; no class can be learned")
    numbers: dict[float, str] = {}
    for name in names:
        if (number := _number(name)) is not None and numbers.setdefault(number, name) != name:
            raise UserError(
                f"{train.source}: the labels {numbers[number]!r} and {name!r} are the same number, which would be two "
                f"classes (first {name!r} at line {train.lines[train.labels.index(name)]}); write it in one way"
            )
    return tuple(names)


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def label_ids(examples: Examples, names: Sequence[str]) -> np.ndarray:
    """Labels as indices into `names`.

    Raises:
        UserError: a label is not among the names, so training has never seen it.

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
    """Holds out a share of every class for evaluation. A class with one example stays in training.

    >>> train, test = train_test_split(Examples("train.csv", tuple("abcd"), ("x", "x", "y", "y"), (2, 3, 4, 5)), seed=0)
    >>> len(train), test.labels
    (2, ('x', 'y'))
    """
    labels = np.asarray(examples.labels)
    classes = [np.flatnonzero(labels == name) for name in label_names(examples)]
    return split_groups(examples, classes, seed, share)


# ------------------------------------------------------------------------------------------------------- tokenizing


def length_limit(config: Any) -> int:
    """The longest input that a model's configuration allows, in tokens.

    >>> import types
    >>> length_limit(types.SimpleNamespace(max_position_embeddings=512, model_type="bert"))
    512
    """
    limit = int(getattr(config, "max_position_embeddings", 512))
    if "roberta" in str(getattr(config, "model_type", "")) or getattr(config, "model_type", "") == "camembert":
        limit -= int(getattr(config, "pad_token_id", 1)) + 1  # their positions begin after the padding's
    return limit


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    labels: np.ndarray | None = None,
    pad_id: int = 0,
    vocab_size: int | None = None,
) -> Encoded:
    """Tokenizes texts and truncates them to `max_length`. A long text costs no more than the part that is kept.

    Args:
        labels: label ids; zeros by default.
        pad_id: the token that pads batches.
        vocab_size: the model's vocabulary size; a token id outside it is an error.

    Raises:
        UserError: the tokenizer produces ids outside the model's vocabulary.

    >>> encode(["good tea", "stale"], load_tokenizer(folder, 128), 128)  # doctest: +SKIP
    """
    characters = _CHARACTERS_PER_TOKEN * max_length
    encodings = tokenizer.encode_batch([text[:characters] for text in texts])
    ids = tuple(np.asarray(encoding.ids, np.int32) for encoding in encodings)
    top = max((int(row.max()) for row in ids if row.size), default=0)
    if vocab_size is not None and top >= vocab_size:  # an embedding lookup would give NaN
        raise UserError(
            f"the tokenizer gives {tokenizer.id_to_token(top)!r} the id {top}, but the model's vocabulary is "
            f"{vocab_size}: tokenizer.json belongs to another model, or tokens were added to it (jpeft finetune "
            "--resize-embeddings trains rows for them)"
        )
    cut = sum(len(text) > characters or bool(e.overflowing) for text, e in zip(texts, encodings, strict=True))
    return Encoded(ids, np.zeros(len(ids), np.int32) if labels is None else labels, max_length, pad_id, cut)


# --------------------------------------------------------------------------------------------------------- batching


@dataclass(frozen=True, eq=False, repr=False)
class Batches(batching.Batches[Batch, Count]):
    """The batches of all epochs, each padded to a few widths.

    Every epoch shows every text once. It is shuffled, sorted by length a few batches at a time to save padding, and
    its batches are shuffled. Without a seed, all texts are sorted by length, for evaluation.

    >>> encoded = Encoded((np.ones(5, np.int32),) * 7, np.zeros(7, np.int32), 128, 0)
    >>> batches = Batches(encoded, batch_size=4, epochs=2)
    >>> [int(batch.weight.sum()) for batch in batches.start(1)]
    [3, 4, 3]
    >>> list(batches.counts(2))
    [Count(examples=4, tokens=20), Count(examples=3, tokens=15)]
    >>> batches.per_epoch, batches.epochs_after(3)
    ((2, 2), 1.5)
    """

    encoded: Encoded
    batch_size: int
    seed: int | None = None
    epochs: int = 1

    @property
    def per_epoch(self) -> tuple[int, ...]:
        """The number of batches in each epoch.

        >>> batches.per_epoch  # doctest: +SKIP
        (311, 311, 311)
        """
        return (-(-len(self.encoded.ids) // self.batch_size),) * self.epochs

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        return self._cached_plan(epoch)

    @cached_property
    def _cached_plan(self) -> Callable[[int], list[np.ndarray]]:
        return lru_cache(maxsize=2)(self._plan)  # `start` and `counts` walk through the same epochs

    def _plan(self, epoch: int) -> list[np.ndarray]:
        lengths = np.asarray([len(ids) for ids in self.encoded.ids])
        return batching.by_length(lengths, self.batch_size, None if self.seed is None else (self.seed, epoch))

    def _make(self, planned: np.ndarray, rows: np.ndarray | None) -> Batch:
        ids = [self.encoded.ids[row] for row in planned]
        shape = (self.batch_size, batching.bucket(max(map(len, ids)), self.encoded.max_length))
        input_ids, mask = np.full(shape, self.encoded.pad_id, np.int32), np.zeros(shape, np.int32)
        for slot, row in enumerate(ids):
            input_ids[slot, : len(row)] = row
            mask[slot, : len(row)] = 1
        mask[len(planned) :, 0] = 1  # an empty row attends to something, so that its output is finite
        fill = (0, self.batch_size - len(planned))
        labels = np.pad(self.encoded.labels[planned], fill)
        weight = np.pad(np.ones(len(planned), np.float32), fill)
        index = np.pad(planned.astype(np.int32), fill, constant_values=-1)
        batch = Batch(input_ids, mask, labels, weight, index)
        return batch if rows is None else Batch(*(column[rows] for column in batch))

    def _count(self, planned: np.ndarray) -> Count:
        return Count(len(planned), sum(len(self.encoded.ids[row]) for row in planned))
