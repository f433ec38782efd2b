"""Text files: rows of CSV and JSONL with their line numbers, checked values, and tokenizers."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import UserError
from jpeft.storage import as_path, reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer


Row = tuple[int, Mapping[str, Any]]  # its line in the file, and its values by column


def read_text(path: Path) -> str:
    """The content of a file in UTF-8, without a byte-order mark.

    Raises:
        UserError: the file is missing, empty, or has another encoding.

    >>> read_text(Path("reviews.csv"))  # doctest: +SKIP
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16, expected UTF-8; convert the file: iconv -f utf-16 -t utf-8")
    try:
        content = raw.decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}, line {line}; "
            "convert the file, e.g. iconv -f latin1 -t utf-8"
        ) from error
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected a row per example")
    return content


def csv_rows(path: Path, content: str) -> Iterator[Row]:
    """The rows of a CSV file, whose first line names the columns.

    Args:
        path: the file, for error messages.
        content: its text.

    Raises:
        UserError: the file is malformed; the message names the line.

    >>> list(csv_rows(Path("a.csv"), "text,label\\ntea,good\\n"))
    [(2, {'text': 'tea', 'label': 'good'})]
    """
    limit = csv.field_size_limit(max(len(content), 131072))  # the default refuses a text over 128 KiB
    try:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        header = next(reader)
        if not header:
            raise UserError(f"{path}: the first line is empty; expected the names of the columns")
        if len(set(header)) < len(header):
            twice = next(name for name, count in Counter(header).items() if count > 1)
            raise UserError(f"{path}: the header names the column {twice!r} twice")
        for row in reader:
            if not row:
                continue
            if row == header:
                raise UserError(f"{path}: line {reader.line_num} repeats the header; are these two files in one?")
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} fields, the header has {len(header)}; "
                    "text with commas, quotes or line breaks must be in double quotes"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: malformed CSV near line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def jsonl_rows(path: Path, content: str) -> Iterator[Row]:
    """The objects in a JSONL file.

    Args:
        path: the file, for error messages.
        content: its text.

    Raises:
        UserError: a line is not a JSON object, or an object has a key twice.

    >>> list(jsonl_rows(Path("a.jsonl"), '{"text": "tea"}\\n\\n{"text": "stale"}'))
    [(1, {'text': 'tea'}), (3, {'text': 'stale'})]
    """
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines: JSON may contain U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} {_not_json(error)}{_array_hint(number, line)}") from error
        yield number, _object(path, number, row, _array_hint(number, line))


def json_rows(path: Path, content: str) -> Iterator[Row]:
    """The objects in a JSON file: one array of them, or one after the other.

    Args: as for `jsonl_rows`.

    >>> list(json_rows(Path("a.json"), '[{"text": "tea"},\\n {"text": "stale"}]'))
    [(1, {'text': 'tea'}), (2, {'text': 'stale'})]
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    position = _skip_blanks(content, 0)
    is_array = content[position] == "["
    position, line, counted = _skip_blanks(content, position + is_array), 1, 0
    while position < len(content) and not (is_array and content[position] == "]"):
        line, counted = line + content.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: the row at line {line} {_not_json(error)}") from error
        yield line, _object(path, line, row)
        position = _skip_blanks(content, position)
        if is_array:
            position = _after_item(path, content, position)
    if is_array and content[position + 1 :].strip():
        raise UserError(f"{path}: there is text after the end of the JSON array; expected one array, or a row per line")
    if is_array and position >= len(content):
        raise UserError(f"{path}: the JSON array has no end; the file is cut off")


def _after_item(path: Path, content: str, position: int) -> int:
    """The position of the next item of an array, or of its end."""
    if content[position : position + 1] == ",":
        position = _skip_blanks(content, position + 1)
        if content[position : position + 1] != "]":
            return position
    elif position >= len(content) or content[position] == "]":
        return position
    line = content.count("\n", 0, position) + 1
    raise UserError(f"{path}: line {line} is not JSON: expected ',' and another row, or ']'")


def _skip_blanks(content: str, position: int) -> int:
    found = re.compile(r"[^ \t\r\n]").search(content, position)
    return found.start() if found else len(content)


def _object(path: Path, line: int, row: Any, hint: str = "") -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {line}: expected a JSON object, got {type(row).__name__}{hint}")
    return row


def _array_hint(number: int, line: str) -> str:
    is_array = number == 1 and line.lstrip().startswith("[")
    return "; a file that is one JSON array has the suffix .json" if is_array else ""


class _KeyTwice(ValueError):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which Python's reader would keep the last of equal keys."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _KeyTwice(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return row


def _not_json(error: Exception) -> str:
    return f"has the key {str(error)[:40]!r} twice" if isinstance(error, _KeyTwice) else f"is not JSON: {error}"


def check_text(path: str | Path, line: int, column: str, value: Any) -> str:
    """Returns a value if it is text that is not blank, else raises a `UserError` that names its line.

    >>> check_text("a.jsonl", 3, "review", "tea")
    'tea'
    """
    if not isinstance(value, str):
        raise UserError(f"{path}: line {line}: {column!r} must be text, got {json.dumps(value)[:40]}")
    if not value.strip():
        raise UserError(f"{path}: line {line}: the text in {column!r} is empty")
    return check_unicode(path, line, column, value)


def check_unicode(path: str | Path, line: int, column: str, value: str) -> str:
    """Returns text if it is valid Unicode. JSON may contain half a surrogate pair, which no tokenizer accepts.

    >>> check_unicode("a.jsonl", 3, "review", "tea")
    'tea'
    """
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{path}: line {line}: {column!r} contains half a surrogate pair, which is not valid Unicode")
    return value


# ------------------------------------------------------------------------------------------------------- tokenizing


def load_tokenizer(folder: str | Path, max_length: int) -> Tokenizer:
    """The tokenizer of a HuggingFace folder, set to truncate at `max_length` tokens and not to pad.

    Raises:
        UserError: there is no tokenizer, or `max_length` leaves no room for text.

    >>> load_tokenizer(folder, 128).encode("good tea").ids  # doctest: +SKIP
    """
    from tokenizers import Tokenizer

    path = as_path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokenizer = Tokenizer.from_str(path.read_bytes().decode("utf-8"))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:120]}") from error
    if tokenizer.num_special_tokens_to_add(is_pair=False) >= max_length:
        raise UserError(f"`max_length` {max_length} leaves no room for text next to the special tokens")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer
