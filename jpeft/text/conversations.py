"""Conversations for fine-tuning: read from JSONL or JSON, tokenized with the chat template, and batched.

train, test = train_test_split(read("gsm8k.jsonl"), seed=0)
encoded = encode(train, chat_template.read(folder), max_length=512)       # rows become tokens here
for batch in Batches(encoded, batch_size=8, max_length=512, seed=0, epochs=3).start(step=40): ...
for messages, answer in prompts(test): final_number(generate(messages)) == final_number(answer)
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jpeft.errors import UserError
from jpeft.storage import as_path
from jpeft.text import answers, batching, reading, rows
from jpeft.text.chat_template import ChatTokenizer
from jpeft.text.splitting import split_groups
from jpeft.text.template import ChatError, Message, Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Texts tokenized in one call: enough to keep all cores busy; the offsets of many more would take gigabytes.
_ENCODED_TOGETHER = 1024
# Examples packed together. The more there are to choose from, the fuller the rows, but beyond this it gains little.
_PACKED_TOGETHER = 2048


@dataclass(frozen=True)
class Conversations:
    """Messages of every example.

    Attributes:
        source: the file they were read from.
        messages: the messages of each example, each with a `role` and a `content`.
        lines: the line of each example in the file.
        trained: by example and message, whether it is an answer to learn; if empty, all of the assistant's are.
        variables: by example, variables of the chat template, such as `tools`; if empty, there are none.
        ignored: keys of rows that were left out because they only describe the row.
    """

    source: str
    messages: tuple[tuple[Message, ...], ...]
    lines: tuple[int, ...]
    trained: tuple[tuple[bool, ...], ...] = ()
    variables: tuple[Mapping[str, Any], ...] = ()
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.messages)

    def take(self, rows: Sequence[int], source: str) -> Conversations:
        """The given rows.

        >>> Conversations("train.jsonl", (({"role": "user"},), ()), (2, 3)).take([1], "the second").lines
        (3,)
        """

        def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[row] for row in rows) if values else ()

        trained, variables = some(self.trained), some(self.variables)
        return Conversations(source, some(self.messages), some(self.lines), trained, variables, self.ignored)


@dataclass(frozen=True, eq=False, repr=False)
class Encoded:
    """Tokenized conversations.

    Attributes:
        ids: int32 token ids, an array per example, up to the end of its last answer. A conversation makes several
            examples if its chat template renders answers differently once more messages follow.
        assistant_mask: True for the tokens that the assistant writes, including those that end its turns. An array per
            example.
        lines: the line of each example in the file.
        left_out: the lines of the examples that do not fit, one for each.
        pad_id: the padding token.
    """

    ids: tuple[np.ndarray, ...]
    assistant_mask: tuple[np.ndarray, ...]
    lines: tuple[int, ...]
    left_out: tuple[int, ...] = ()
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Batch(NamedTuple):
    """Packed or padded examples, `[rows, length]`.

    Attributes:
        input_ids: int32; the examples of a row, then padding.
        segment_ids: int32; 1, 2, … for the examples of a row, 0 for padding. A token attends within its segment only.
        position_ids: int32; from 0 within each example, 0 for padding.
        targets: int32; the next token of the same example, 0 if there is none.
        weight: float32; 1 if the target belongs to an answer, else 0.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    weight: np.ndarray


class Count(NamedTuple):
    """The content of one or more batches.

    Attributes:
        examples: the number of examples.
        tokens: their tokens.
        answer_tokens: targets with a weight.
        positions: tokens and padding.
    """

    examples: int
    tokens: int
    answer_tokens: int
    positions: int

    @property
    def padding(self) -> float:
        """The share of positions that hold padding.

        >>> Count(examples=1, tokens=6, answer_tokens=2, positions=8).padding
        0.25
        """
        return 1 - self.tokens / self.positions


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path, ignore: Collection[str] = ()) -> Conversations:
    """Reads conversations from a .jsonl file, or a .json file that holds an array, in UTF-8.

    A row is one of
    - `{"messages": [{"role", "content"}, …]}`, or `"conversations"` with ShareGPT's `from` and `value`;
    - `{"prompt", "completion"}` or `{"prompt", "response"}`, each a text or a list of messages; only the completion is
      learned;
    - `{"instruction", "input", "output"}` with an optional input, or with `"response"` for its output;
    - `{"question", "answer"}`, or `"question"` or `"query"` with `"response"`.

    Contents are texts or lists of text parts. An assistant's message with `tool_calls` may have none, and one with
    `"weight": 0`, `"train": false` or `"loss": false` is not learned. `system` holds a system message; `tools`,
    `documents` and `chat_template_kwargs` are passed to the chat template.

    Args:
        ignore: keys of rows and messages to leave out, whatever they hold. Keys that only describe a row
            (`jpeft.text.rows.METADATA`) are left out as well; any other one is an error.

    Raises:
        UserError: the file cannot be read or a row is malformed; the message names the line.

    >>> read("gsm8k.jsonl")  # doctest: +SKIP
    """
    path = as_path(path)
    readers = {".jsonl": reading.jsonl_rows, ".json": reading.json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a .jsonl or .json file, got the suffix {path.suffix or '(none)'!r}")
    parsed = [
        (line, rows.read(path, line, row, ignore))
        for line, row in readers[path.suffix.lower()](path, reading.read_text(path))
    ]
    if not parsed:
        raise UserError(f"{path}: no examples; expected a row per example")
    return Conversations(
        str(path),
        tuple(row.messages for _, row in parsed),
        tuple(line for line, _ in parsed),
        tuple(row.trained for _, row in parsed),
        tuple(row.variables for _, row in parsed),
        tuple(dict.fromkeys(key for _, row in parsed for key in row.ignored)),
    )


def train_test_split(
    conversations: Conversations, seed: int, share: float = 0.1
) -> tuple[Conversations, Conversations]:
    """Holds out a share for evaluation, at least one example.

    >>> train, test = train_test_split(Conversations("train.jsonl", ((),) * 20, tuple(range(20))), seed=0)
    >>> len(train), len(test)
    (18, 2)
    """
    return split_groups(conversations, [np.arange(len(conversations))], seed, share)


def prompts(conversations: Conversations) -> list[tuple[tuple[Message, ...], str]]:
    """The messages before the last answer of every example, and that answer: its content, else its tool calls as JSON.

    Raises:
        UserError: an example begins with its last answer.

    >>> tea = ({"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."})
    >>> prompts(Conversations("test.jsonl", (tea,), (1,)))
    [(({'role': 'user', 'content': 'Tea?'},), 'Yes.')]
    """
    pairs = []
    for row, (line, messages) in enumerate(zip(conversations.lines, conversations.messages, strict=True)):
        if (last := _last_answer(conversations, row)) == 0:
            raise UserError(f"{conversations.source}: line {line}: no message before the answer, so there is no prompt")
        answer = messages[last]
        pairs.append((messages[:last], answer.get("content") or json.dumps(answer.get("tool_calls"))))
    return pairs


def with_prompts(conversations: Conversations) -> Conversations:
    """The conversations that do not begin with their last answer.

    >>> tea = ({"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."})
    >>> with_prompts(Conversations("test.jsonl", (tea[1:], tea), (1, 2))).lines
    (2,)
    """
    rows = [row for row in range(len(conversations)) if _last_answer(conversations, row)]
    return conversations.take(rows, conversations.source)


def _last_answer(conversations: Conversations, row: int) -> int:
    messages = conversations.messages[row]
    trained = conversations.trained[row] if conversations.trained else (True,) * len(messages)
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant" and trained[index])


# ------------------------------------------------------------------------------------------------------- tokenizing


def encode(conversations: Conversations, tokenizer: ChatTokenizer, max_length: int) -> Encoded:
    """Tokenizes conversations with the chat template and marks the tokens of their answers.

    The ids equal those of `tokenizer.encode_chat`, without the text after the last answer. An example whose last answer
    ends after `max_length` tokens is left out: truncated, it would teach the model to stop anywhere or never.

    Raises:
        UserError: there is no chat template, the template fails on an example or hides where its answers are, or no
            example fits.

    >>> encode(read("gsm8k.jsonl"), chat_template.read(folder), 512)  # doctest: +SKIP
    """
    if not tokenizer.template:
        raise UserError(
            f"{tokenizer.where}: no chat template, so not a chat model; conversations need one, such as an -Instruct "
            "model"
        )
    ids, masks, lines, left_out, shortest = [], [], [], [], None
    for line, row, mask in _tokenized(conversations, tokenizer):
        end = int(np.flatnonzero(mask)[-1]) + 1
        if end <= max_length:
            ids.append(row[:end])
            masks.append(mask[:end])
            lines.append(line)
        else:
            left_out.append(line)
            shortest = min(end, shortest or end)
    if not ids:
        raise UserError(
            f"{conversations.source}: none of the {len(left_out)} examples fits into {max_length} tokens with its "
            f"answers; the shortest takes {shortest}: raise `max_length`"
        )
    pad_id = tokenizer.tokenizer.token_to_id(tokenizer.special.get("pad_token", ""))
    return Encoded(tuple(ids), tuple(masks), tuple(lines), tuple(left_out), pad_id or 0)


def _tokenized(conversations: Conversations, tokenizer: ChatTokenizer) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The line, the token ids and the assistant mask of every example."""
    bare = _with_exact_offsets(tokenizer.tokenizer)
    for together in batching.chunks(np.arange(len(conversations)), _ENCODED_TOGETHER):
        rendered = [
            (conversations.lines[row], text) for row in together for text in _texts(conversations, row, tokenizer)
        ]
        encodings = bare.encode_batch([text.text for _, text in rendered], add_special_tokens=False)
        for (line, text), encoding in zip(rendered, encodings, strict=True):
            ids = np.asarray(encoding.ids, np.int32)
            begin = np.asarray([start for start, _ in encoding.offsets], np.int64)
            if not text.spans or any(not _inside(begin, span).any() for span in text.spans):
                raise UserError(
                    f"{conversations.source}: line {line}: no token begins inside an answer, as {tokenizer.where} "
                    "renders it; check the chat template, or remove the example"
                )
            mask = np.any([_inside(begin, span) for span in text.spans], axis=0)
            # {% generation %} often ends before the token that ends the turn. Untrained, the model would never stop.
            ends = np.isin(ids, tokenizer.stop_ids)
            mask[1:] |= mask[:-1] & ~ends[:-1] & ends[1:]
            yield line, ids, mask


def _texts(conversations: Conversations, row: int, tokenizer: ChatTokenizer) -> list[answers.Text]:
    trained = conversations.trained[row] if conversations.trained else None
    variables = conversations.variables[row] if conversations.variables else None
    try:
        return answers.texts(tokenizer, conversations.messages[row], trained, variables)
    except ChatError as error:
        raise UserError(f"{conversations.source}: line {conversations.lines[row]}: {error}") from error


def stop_warning(encoded: Encoded, tokenizer: ChatTokenizer) -> str | None:
    """A warning if answers do not end in a stop token, so that the model does not learn to stop; else None.

    >>> example = np.arange(5, dtype=np.int32)
    >>> stop_warning(Encoded((example,), (example > 2,), (1,)), tokenizer)  # doctest: +SKIP
    'no answer ends in a stop token (<|im_end|>), as the chat template renders them, …'
    """
    last = [ids[:-1][mask[:-1] & ~mask[1:]] for ids, mask in zip(encoded.ids, encoded.assistant_mask, strict=True)]
    ends = np.concatenate([*last, *(ids[-1:] for ids in encoded.ids)])
    missing = ends[~np.isin(ends, tokenizer.stop_ids)]
    if not len(missing):
        return None
    usual = tokenizer.tokenizer.decode([int(np.bincount(missing).argmax())], skip_special_tokens=False)
    stops = ", ".join(tokenizer.stop_tokens)
    count = "no answer ends" if len(missing) == len(ends) else f"{len(missing):,} of {len(ends):,} answers do not end"
    return (
        f"{count} in a stop token ({stops or 'the model names none'}), as the chat template renders them, but often in "
        f"{usual!r}, so the model does not learn to stop; give a template that ends the assistant's turn in "
        f"{stops or 'the eos_token'} (`chat_template` FILE)"
    )


def _with_exact_offsets(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same ids, whose offsets are where each token begins.

    A `ByteLevel` post-processor removes blanks from them (`trim_offsets`), so that a blank before an answer would begin
    inside it. Otherwise post-processors only add special tokens, which the chat template has added already.
    """
    bare = copy.deepcopy(tokenizer)
    bare.post_processor = None
    return bare


def _inside(begin: np.ndarray, span: Span) -> np.ndarray:
    return (begin >= span[0]) & (begin < span[1])


# --------------------------------------------------------------------------------------------------------- batching

_Row = tuple[int, tuple[int, ...]]  # its width, and the examples in it


@dataclass(frozen=True, eq=False, repr=False)
class Batches(batching.Batches[Batch, Count]):
    """The batches of all epochs, packed or padded.

    Every epoch shows every example once, whole. Packed, shuffled examples share rows of `max_length` tokens, and the
    rows are shuffled: one shape and little padding, but the number of batches may differ by epoch. Not packed, each
    example has a row, padded to a few widths as in `labeled.Batches`. Without a seed nothing is shuffled, for
    evaluation. The last batch of an epoch is filled up with rows without weight.

    >>> example = np.arange(5, dtype=np.int32)
    >>> batches = Batches(Encoded((example,) * 7, (example > 2,) * 7, tuple(range(7))), batch_size=2, max_length=12)
    >>> batches.per_epoch, [batch.segment_ids.max(axis=1).tolist() for batch in batches]
    ((2,), [[2, 2], [2, 1]])
    >>> batches[0].weight[0].astype(int).tolist()
    [0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    """

    encoded: Encoded
    batch_size: int
    max_length: int
    seed: int | None = None
    epochs: int = 1
    packed: bool = True

    def __post_init__(self) -> None:
        longest = int(self._lengths.max())
        if longest > self.max_length:
            raise UserError(f"an example of {longest} tokens does not fit into rows of {self.max_length}")

    @property
    def per_epoch(self) -> tuple[int, ...]:
        """The number of batches in each epoch.

        >>> batches.per_epoch  # doctest: +SKIP
        (311, 312, 311)
        """
        return tuple(map(len, self._plan))

    @cached_property
    def count(self) -> Count:
        """The content of all epochs.

        >>> example = np.arange(5, dtype=np.int32)
        >>> Batches(Encoded((example,) * 7, (example > 2,) * 7, tuple(range(7))), batch_size=2, max_length=12).count
        Count(examples=7, tokens=35, answer_tokens=14, positions=48)
        """
        counts = np.asarray(list(self.counts(0)), np.int64)
        return Count(*counts.sum(axis=0).tolist())

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.asarray([len(ids) for ids in self.encoded.ids])

    @cached_property
    def _answer_lengths(self) -> np.ndarray:
        """The number of targets with a weight in each example."""
        return np.asarray([int(mask[1:].sum()) for mask in self.encoded.assistant_mask])

    @cached_property
    def _plan(self) -> tuple[list[list[_Row]], ...]:
        """The rows of each batch of each epoch, a function of the seed and the epoch."""
        rows = map(self._packed_rows if self.packed else self._single_rows, range(self.epochs))
        return tuple(batching.chunks(epoch, self.batch_size) for epoch in rows)

    def _packed_rows(self, epoch: int) -> list[_Row]:
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        order = np.arange(len(self.encoded)) if rng is None else rng.permutation(len(self.encoded))
        together = batching.chunks(order, _PACKED_TOGETHER)
        rows = [row for window in together for row in pack(self._lengths, window.tolist(), self.max_length)]
        if rng is not None:
            rows = [rows[position] for position in rng.permutation(len(rows))]
        rows += [()] * (-len(rows) % self.batch_size)
        return [(self.max_length, row) for row in rows]

    def _single_rows(self, epoch: int) -> list[_Row]:
        seed, rows = None if self.seed is None else (self.seed, epoch), []
        for batch in batching.by_length(self._lengths, self.batch_size, seed):
            width = batching.bucket(int(self._lengths[batch].max()), self.max_length)
            rows += [(width, (example,)) for example in batch.tolist()]
            rows += [(width, ())] * (self.batch_size - len(batch))
        return rows

    def _epoch(self, epoch: int) -> list[list[_Row]]:
        return self._plan[epoch]

    def _make(self, planned: list[_Row], rows: np.ndarray | None) -> Batch:
        chosen = planned if rows is None else [planned[row] for row in rows]
        shape = (len(chosen), planned[0][0])
        segment_ids, position_ids, targets = np.zeros((3, *shape), np.int32)
        input_ids, weight = np.full(shape, self.encoded.pad_id, np.int32), np.zeros(shape, np.float32)
        for row, (_, examples) in enumerate(chosen):
            start = 0
            for segment, example in enumerate(examples, start=1):
                ids = self.encoded.ids[example]
                end = start + len(ids)
                input_ids[row, start:end] = ids
                segment_ids[row, start:end] = segment
                position_ids[row, start:end] = np.arange(len(ids))
                targets[row, start : end - 1] = ids[1:]
                weight[row, start : end - 1] = self.encoded.assistant_mask[example][1:]
                start = end
        return Batch(input_ids, segment_ids, position_ids, targets, weight)

    def _count(self, planned: list[_Row]) -> Count:
        examples = [example for _, row in planned for example in row]
        tokens, answer_tokens = int(self._lengths[examples].sum()), int(self._answer_lengths[examples].sum())
        return Count(len(examples), tokens, answer_tokens, sum(width for width, _ in planned))


def pack(lengths: Sequence[int] | np.ndarray, examples: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Packs examples into rows of at most `size` tokens: best-fit decreasing bin packing.

    >>> pack([3, 6, 4, 2, 5], range(5), 10)
    [(1, 2), (4, 0, 3)]
    """
    rows: list[list[int]] = []
    open: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in sorted(examples, key=lambda example: -lengths[example]):  # stable: equal lengths keep their order
        length = int(lengths[example])
        if (fits := bisect_left(open, (length, 0))) < len(open):
            room, row = open.pop(fits)
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(open, (room - length, row))
    return [tuple(row) for row in rows]


def shapes(batches: Batches) -> set[tuple[int, int]]:
    """The shapes of all batches, each of which costs a compilation: one if packed, else at most one per bucket.

    >>> example = np.ones(5, np.int32)
    >>> shapes(Batches(Encoded((example,), (example > 0,), (1,)), batch_size=4, max_length=128, packed=False))
    {(4, 48)}
    """
    return {(batches.batch_size, rows[0][0]) for epoch in batches._plan for rows in epoch}
