"""jpeft.cli.predict."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jpeft.errors import UserError

SUMMARY = "Label texts with a finished run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("file", metavar="FILE", nargs="?", help=".csv or .jsonl; else texts on stdin, one a line")
    parser.add_argument("--text-arg", action="append", metavar="TEXT", help="a text to label; may be repeated")
    parser.add_argument("--text", metavar="COLUMN", help="FILE's column of texts (default: the one trained on)")


def run(args: argparse.Namespace) -> None:
    from jpeft.recipes import run_folder
    from jpeft.text import labeled

    if args.text_arg and args.file:
        raise UserError("give texts by --text-arg or a FILE, not both")
    run = run_folder.open_run(args.run)
    if args.text_arg:
        texts: Sequence[str] = args.text_arg
    elif args.file:
        texts = labeled.read(args.file, args.text or run.record["columns"]["text"]).texts
    else:
        texts = _stdin_texts()
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise UserError(f"text {empty[0]} is empty")
    found = run.predict(texts)
    if args.json:
        rows = [{"text": text, "label": label, "probability": p} for text, (label, p) in zip(texts, found, strict=True)]
        print(json.dumps({"predictions": rows}, ensure_ascii=False))
        return
    for text, (label, probability) in zip(texts, found, strict=True):
        print(f"{label}\t{probability:.4f}\t{' '.join(text.split())[:100]}")


def _stdin_texts() -> list[str]:
    if sys.stdin.isatty():
        raise UserError("no texts: give --text-arg TEXT, a FILE, or texts on stdin, one a line")
    try:
        lines = sys.stdin.buffer.read().decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8: byte offset {error.start}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError("no texts on stdin; expected one a line")
    return texts
