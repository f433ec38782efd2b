"""`jpeft predict`: labels for texts, from a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError

SUMMARY = "Label texts with a run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run; of an unfinished one, a checkpoint")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="a .csv or .jsonl file; default: stdin, a text per line"
    )
    parser.add_argument("--text-arg", action="append", metavar="TEXT", help="a text to label; may be repeated")
    parser.add_argument("--text", metavar="COLUMN", help="FILE's text column (default: the run's)")


def run(args: argparse.Namespace) -> None:
    from jpeft.recipes.tasks import classification

    if args.text_arg and args.file:
        raise UserError("give texts by --text-arg or a FILE, not both")
    trained = classification.open_run(args.run, print_note)
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


def _texts(args: argparse.Namespace, column: str) -> Sequence[str]:
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
