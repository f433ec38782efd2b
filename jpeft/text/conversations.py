"""Conversations: read from JSONL, laid out by a model's chat template, packed into batches for fine-tuning on answers.

    train, test = train_test_split(read("gsm8k.jsonl"), seed=0)
    encoded = encode(train, chat.read(folder), max_length=512)
    for batch in Batches(encoded, batch_size=8, max_length=512, seed=0, epochs=3).start(step=40): ...
    for messages, answer in prompts(test): final_number(generate(messages)) == final_number(answer)

The batch of a step is a pure function of the data, the seed and the step: a run can be taken up anywhere.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jpeft.errors import UserError
from jpeft.text import batching, reading
from jpeft.text.chat_template import ChatError, ChatTokenizer, Message, Span

if TYPE_CHECKING:
    import grain
    from tokenizers import Tokenizer

_ROLES = ("system", "user", "assistant", "tool")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_EXPECTED = (
    "'messages', 'prompt' and 'completion', 'instruction' and 'output' (with or without 'input'), "
    "or 'question' and 'answer'"
)
# Texts that are tokenized at once: enough to keep the cores busy; the offsets of many more would take gigabytes.
_ENCODED_TOGETHER = 1024
# Examples that are packed together: the fuller the rows, the more there are to choose from, but beyond this by little.
_PACKED_TOGETHER = 2048


@dataclass(frozen=True)
class Conversations:
    """Messages of every example, each with a `role` and a `content`, as read from `lines` of the file `source`."""

    source: str
    messages: tuple[tuple[Message, ...], ...]
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.messages)

    def take(self, rows: Sequence[int], source: str) -> Conversations:
        """The given rows.

        >>> Conversations("train.jsonl", (({"role": "user"},), ()), (2, 3)).take([1], "the second").lines
        (3,)
        """
        return Conversations(source, tuple(self.messages[row] for row in rows), tuple(self.lines[row] for row in rows))


@dataclass(frozen=True, eq=False, repr=False)  # grain asks for the repr of all that it maps: of arrays it takes seconds
class Encoded:
    """Token ids of every example, and which of them belong to an answer.

    Attributes:
        ids: int32, an array per example, up to the end of its last answer.
        answer: as `ids`, true for the tokens that the assistant writes, those that end its turns among them.
        lines: where each example stands in the file.
        left_out: the lines of the examples whose answers do not fit.
        pad_id: what fills a row.
    """

    ids: tuple[np.ndarray, ...]
    answer: tuple[np.ndarray, ...]
    lines: tuple[int, ...]
    left_out: tuple[int, ...] = ()
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Batch(NamedTuple):
    """Arrays of one shape, `[rows, length]`.

    Attributes:
        input_ids: int32; behind the examples of a row, padding.
        segment_ids: int32; 1, 2, … for the examples of a row, 0 for padding. A token attends within its own alone.
        position_ids: int32; from 0 within each example, 0 for padding.
        targets: int32; the next token of the same example, 0 where there is none.
        weight: float32; 1 where the target belongs to an answer, else 0.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    weight: np.ndarray


class Count(NamedTuple):
    """What batches hold: examples, their tokens, the targets that weigh, and positions with the padding."""

    examples: int
    tokens: int
    answer_tokens: int
    positions: int

    @property
    def padding(self) -> float:
        """The share of positions that hold no token.

        >>> Count(examples=1, tokens=6, answer_tokens=2, positions=8).padding
        0.25
        """
        return 1 - self.tokens / self.positions


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | Path) -> Conversations:
    """The conversations of a .jsonl file, in UTF-8. Whatever is not as it should be is a `UserError`.

    A row is `{"messages": [{"role": …, "content": …}, …]}`, `{"prompt", "completion"}`, `{"instruction", "input",
    "output"}` where the input may be missing, or `{"question", "answer"}`. Other keys beside these are not looked at.

    >>> read("gsm8k.jsonl")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: expected a .jsonl file, found the suffix {path.suffix or '(none)'!r}")
    lines, messages = [], []
    for line, row in reading.jsonl_rows(path, reading.decode(path)):
        lines.append(line)
        messages.append(_messages(path, line, row))
    return Conversations(str(path), tuple(messages), tuple(lines))


def _messages(path: Path, line: int, row: Mapping[str, Any]) -> tuple[Message, ...]:
    if row.get("tools"):  # the template would have to name them: without, the model learns to call what it never saw
        raise UserError(f"{path}: line {line}: 'tools' are not supported")
    if "messages" in row:
        return _turns(path, line, row["messages"])
    if len(forms := [" and ".join(pair) for pair in _PAIRS if all(key in row for key in pair)]) > 1:
        raise UserError(f"{path}: line {line}: which is meant, {' or '.join(forms)}? keep one of them")
    for ask, answer in _PAIRS:
        if ask in row and answer in row:
            request = reading.check_text(path, line, ask, row[ask])
            if ask == "instruction" and row.get("input") not in (None, "") and str(row["input"]).strip():
                request += "\n\n" + reading.check_text(path, line, "input", row["input"])
            reply = reading.check_text(path, line, answer, row[answer])
            return {"role": "user", "content": request}, {"role": "assistant", "content": reply}
    found = ", ".join(repr(key)[:40] for key in list(row)[:8]) or "none"
    raise UserError(f"{path}: line {line}: the keys are {found}; expected {_EXPECTED}")


def _turns(path: Path, line: int, messages: Any) -> tuple[Message, ...]:
    where = f"{path}: line {line}"
    if not isinstance(messages, list):
        raise UserError(f"{where}: 'messages' should be a list, found {json.dumps(messages)[:40]}")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = json.dumps(message)[:60]
            raise UserError(f"{where}: {name!r} should be an object with 'role' and 'content', found {found}")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise UserError(f"{where}: the role {json.dumps(role)[:40]} in {name!r} is none of {', '.join(_ROLES)}")
        if role == "assistant":
            reading.check_text(path, line, f"{name}.content", content)
        elif not isinstance(content, str):  # a system prompt may well be blank
            raise UserError(f"{where}: '{name}.content' should be a text, found {json.dumps(content)[:40]}")
        reading.check_unicode(path, line, name, json.dumps(message, ensure_ascii=False))  # and in keys for the template
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no message of the assistant in 'messages', so nothing to learn")
    return tuple(messages)


def train_test_split(
    conversations: Conversations, seed: int, share: float = 0.1
) -> tuple[Conversations, Conversations]:
    """Split off a share for evaluation, one example at least; both parts stay in the order of the file.

    >>> train, test = train_test_split(Conversations("train.jsonl", ((),) * 20, tuple(range(20))), seed=0)
    >>> len(train), len(test)
    (18, 2)
    """
    size = len(conversations)
    if size < 2:
        raise UserError(f"{conversations.source}: too few examples to hold some out; give an evaluation file (--eval)")
    held = min(size - 1, max(1, round(share * size)))
    order = np.random.default_rng(seed).permutation(size).tolist()
    return (
        conversations.take(sorted(order[held:]), conversations.source),
        conversations.take(sorted(order[:held]), f"{conversations.source} (held out)"),
    )


def prompts(conversations: Conversations) -> list[tuple[tuple[Message, ...], str]]:
    """Of every example the messages before its last answer, and that answer.

    >>> tea = ({"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."})
    >>> prompts(Conversations("test.jsonl", (tea,), (1,)))
    [(({'role': 'user', 'content': 'Tea?'},), 'Yes.')]
    """
    pairs = []
    for line, messages in zip(conversations.lines, conversations.messages, strict=True):
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        if last == 0:
            raise UserError(f"{conversations.source}: line {line}: nothing stands before the answer, so no prompt")
        pairs.append((messages[:last], messages[last]["content"]))
    return pairs


# ------------------------------------------------------------------------------------------------------- tokenizing


def encode(conversations: Conversations, codec: ChatTokenizer, max_length: int) -> Encoded:
    """Token ids, as `codec.encode_chat` gives them, and which are an answer's. What follows the last answer is cut.

    An example with an answer that does not end within `max_length` tokens is left out as a whole: cut short, it would
    teach to stop anywhere or never.

    Raises:
        UserError: there is no chat template, it cannot lay out an example or say where its answers are, or not one
            example fits.

    >>> encode(read("gsm8k.jsonl"), chat.read(folder), 512)  # doctest: +SKIP
    """
    if not codec.template:
        raise UserError(
            f"{codec.where}: no chat template, so no chat model; conversations need one, such as an -Instruct model"
        )
    ids, answer, lines, left_out, shortest = [], [], [], [], None
    for line, row, chosen in _tokenized(conversations, codec):
        end = int(np.flatnonzero(chosen)[-1]) + 1
        if end <= max_length:
            ids.append(row[:end])
            answer.append(chosen[:end])
            lines.append(line)
        else:
            left_out.append(line)
            shortest = min(end, shortest or end)
    if not ids:
        raise UserError(
            f"{conversations.source}: none of the {len(conversations)} examples fits into {max_length} tokens with its "
            f"answers; the shortest takes {shortest}: raise --max-length"
        )
    pad_id = codec.tokenizer.token_to_id(codec.special.get("pad_token", ""))
    return Encoded(tuple(ids), tuple(answer), tuple(lines), tuple(left_out), pad_id or 0)


def _tokenized(conversations: Conversations, codec: ChatTokenizer) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of every example its line, its ids, and which are an answer's."""
    tokenizer = _with_true_offsets(codec.tokenizer)
    for rows in batching.chunks(np.arange(len(conversations)), _ENCODED_TOGETHER):
        rendered = [_render(conversations, row, codec) for row in rows]
        encodings = tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for row, (_, spans), encoding in zip(rows, rendered, encodings, strict=True):
            ids = np.asarray(encoding.ids, np.int32)
            begin = np.asarray([start for start, _ in encoding.offsets], np.int64)
            line = conversations.lines[row]
            if not spans or any(not _inside(begin, span).any() for span in spans):
                raise UserError(
                    f"{conversations.source}: line {line}: an answer has no token of its own, as {codec.where} lays it "
                    "out; see its chat template, or take the example out"
                )
            chosen = np.any([_inside(begin, span) for span in spans], axis=0)
            # {% generation %} often ends before the token that ends the turn; untaught, the model would never stop.
            ends = np.isin(ids, codec.stop_ids)
            chosen[1:] |= chosen[:-1] & ~ends[:-1] & ends[1:]
            yield line, ids, chosen


def _render(conversations: Conversations, row: int, codec: ChatTokenizer) -> tuple[str, list[Span]]:
    try:
        return codec.render_with_spans(conversations.messages[row])
    except ChatError as error:
        raise UserError(f"{conversations.source}: line {conversations.lines[row]}: {error}") from error


def _with_true_offsets(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of the same ids, whose offsets say where each token begins.

    A `ByteLevel` post-processor takes blanks off them (`trim_offsets`): a blank before an answer would begin within
    it. All else that post-processors do is to add special tokens, which the template has put already.
    """
    bare = copy.deepcopy(tokenizer)
    bare.post_processor = None
    return bare


def _inside(begin: np.ndarray, span: Span) -> np.ndarray:
    return (begin >= span[0]) & (begin < span[1])


# --------------------------------------------------------------------------------------------------------- batching

_Row = tuple[int, tuple[int, ...]]  # its width, and the examples in it


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of all epochs: that of a step depends on the data, the seed and the step, and on nothing before it.

    Every epoch shows every example once, whole. Packed, shuffled examples share rows of `max_length` tokens, and the
    rows are shuffled: one shape, little padding, and a number of steps that may differ by epoch. Not packed, each has a
    row, as in `data.Batches`: shuffled, sorted by length a few batches at a time, padded to a bucket. Without a seed
    nothing is shuffled, for evaluation. The last batch of an epoch is filled with rows that weigh nothing.

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

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):  # grain would begin again
            raise IndexError(f"step {step} of {len(self)}")
        batch = self._dataset()[step]
        assert batch is not None  # which grain gives for what was filtered out
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)

    def start(self, step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches from a step on; or those of their rows that are given, which are this host's. The next ones are
        made while one is used.

        >>> next(batches.start(40))  # doctest: +SKIP
        """
        import grain

        if not 0 <= step <= len(self):
            raise IndexError(f"step {step} of {len(self)}")
        # One thread: it computes while the step runs on the device; more would only wait for each other (the GIL).
        return iter(
            self._dataset(rows)[step:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        )

    @property
    def per_epoch(self) -> tuple[int, ...]:
        """The number of batches in each epoch.

        >>> batches.per_epoch  # doctest: +SKIP
        (311, 312, 311)
        """
        return tuple(len(rows) // self.batch_size for rows in self._plan)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0; past the last step, the number of epochs.

        >>> batches.epoch(311)  # doctest: +SKIP
        1
        """
        return bisect_right(self._ends, step)

    def epochs_after(self, step: int) -> float:
        """How many epochs so many steps make.

        >>> batches.epochs_after(467)  # doctest: +SKIP
        1.5
        """
        epoch = self.epoch(step)
        begun = step - (self._ends[epoch - 1] if epoch else 0)
        return epoch + (begun / self.per_epoch[epoch] if begun else 0.0)

    @cached_property
    def count(self) -> Count:
        """What all epochs hold together.

        >>> example = np.arange(5, dtype=np.int32)
        >>> Batches(Encoded((example,) * 7, (example > 2,) * 7, tuple(range(7))), batch_size=2, max_length=12).count
        Count(examples=7, tokens=35, answer_tokens=14, positions=48)
        """
        positions = sum(width for rows in self._plan for width, _ in rows)
        answer_tokens = sum(int(answer[1:].sum()) for answer in self.encoded.answer)
        tokens, epochs = int(self._lengths.sum()), self.epochs
        return Count(epochs * len(self.encoded), epochs * tokens, epochs * answer_tokens, positions)

    def counts(self, step: int) -> Iterator[Count]:
        """What the batches from a step on hold, on all hosts together.

        >>> next(batches.counts(40))  # doctest: +SKIP
        """
        for batch in batching.chunks(self._rows, self.batch_size)[step:]:
            examples = [example for _, row in batch for example in row]
            answer_tokens = sum(int(self.encoded.answer[example][1:].sum()) for example in examples)
            tokens, positions = int(self._lengths[examples].sum()), sum(width for width, _ in batch)
            yield Count(len(examples), tokens, answer_tokens, positions)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.asarray([len(ids) for ids in self.encoded.ids])

    @cached_property
    def _plan(self) -> tuple[list[_Row], ...]:
        """The rows of each epoch, by (seed, epoch) alone: as many as fill its batches, equally wide in each."""
        return tuple(map(self._packed_rows if self.packed else self._single_rows, range(self.epochs)))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.per_epoch))

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

    @cached_property
    def _rows(self) -> list[_Row]:
        return [row for epoch in self._plan for row in epoch]

    def _dataset(self, rows: np.ndarray | None = None) -> grain.MapDataset:
        """All batches, or these rows of each."""
        import grain

        source, size = self._rows, self.batch_size
        if rows is not None:
            firsts = range(0, len(source), size)
            source, size = [source[first + int(row)] for first in firsts for row in rows], len(rows)
        return grain.MapDataset.source(source).map(self._lay_out).batch(size)

    def _lay_out(self, row: _Row) -> Batch:
        """One row of a batch: its examples one behind the other."""
        width, examples = row
        segment_ids, position_ids, targets = np.zeros((3, width), np.int32)
        input_ids = np.full(width, self.encoded.pad_id, np.int32)
        made = Batch(input_ids, segment_ids, position_ids, targets, np.zeros(width, np.float32))
        start = 0
        for segment, example in enumerate(examples, start=1):
            ids, answer = self.encoded.ids[example], self.encoded.answer[example]
            end = start + len(ids)
            made.input_ids[start:end] = ids
            made.segment_ids[start:end] = segment
            made.position_ids[start:end] = np.arange(len(ids))
            made.targets[start : end - 1] = ids[1:]
            made.weight[start : end - 1] = answer[1:]
            start = end
        return made


def pack(lengths: Sequence[int] | np.ndarray, examples: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Examples put together into rows of at most `size` tokens, the longest first, each where it leaves least room.

    >>> pack([3, 6, 4, 2, 5], range(5), 10)
    [(1, 2), (4, 0, 3)]
    """
    rows: list[list[int]] = []
    open: list[tuple[int, int]] = []  # the room that is left, and in which row; sorted
    for example in sorted(examples, key=lambda example: -lengths[example]):  # equal ones stay in their order
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
    """All shapes that batches take: each costs a compilation. One when packed, else one a bucket at most.

    >>> example = np.ones(5, np.int32)
    >>> shapes(Batches(Encoded((example,), (example > 0,), (1,)), batch_size=4, max_length=128, packed=False))
    {(4, 48)}
    """
    return {(batches.batch_size, width) for rows in batches._plan for width, _ in rows}
