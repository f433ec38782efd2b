"""`jpeft predict`: labels for texts, from a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jpeft.cli.common import Common
from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError
from jpeft.recipes.options import WHAT, option
from jpeft.storage import as_path

SUMMARY = "Label texts with a run."


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft predict`."""

    run: str = option("a run; of an unfinished one, a checkpoint", metavar="RUN", positional=True)
    file: str | None = option(
        "a .csv or .jsonl file", WHAT, None, shown="stdin, a text per line", metavar="FILE", positional=True
    )
    text_arg: tuple[str, ...] = option("a text to label; may be repeated", WHAT, (), metavar="TEXT")
    text: str | None = option("column of the file's texts", WHAT, None, shown="the run's", metavar="COLUMN")


def run(args: Options) -> None:
    """Prints a label and its probability for each text."""
    from jpeft.recipes.tasks import classification

    if args.text_arg and args.file:
        raise UserError("give texts by --text-arg or a FILE, not both")
    if args.text is not None and not args.file:
        raise UserError(f"`text` {args.text} is a column of a FILE, and none is given")
    trained = classification.open_run(as_path(args.run), print_note)
    texts = _texts(args, trained.record["columns"]["text"])
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise UserError(f"text {empty[0]} is empty")
    found = trained.predict(texts)
    if args.json:
        rows = [{"text": text, "label": label, "probability": p} for text, (label, p) in zip(texts, found, strict=True)]
        print_json({"predictions": rows})
        return
    for text, (label, probability) in zip(texts, found, strict=True):
        print(f"{label}\t{probability:.4f}\t{' '.join(text.split())[:100]}")


def _texts(args: Options, column: str) -> Sequence[str]:
    from jpeft.text import labeled

    if args.text_arg:
        return args.text_arg
    if args.file:
        return labeled.read(args.file, args.text or column).texts
    return _stdin_texts()


def _stdin_texts() -> list[str]:
    if sys.stdin.isatty():
        raise UserError("no texts: give --text-arg TEXT, a FILE, or texts on stdin, one per line")
    try:
        lines = sys.stdin.buffer.read().decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8: byte offset {error.start}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError("no texts on stdin; expected one per line")
    return texts
