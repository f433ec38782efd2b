"""`jpeft export`: the adapter of a run as a folder of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError
from jpeft.units import format_bytes

SUMMARY = "Write the adapter of a run, finished or not, as a folder that HuggingFace PEFT or jpeft loads."
_FORMS = ("hf", "jpeft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run; of an unfinished one, a checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--format", choices=_FORMS, default="hf", help="hf (default): for HuggingFace PEFT; or jpeft")


def run(args: argparse.Namespace) -> None:
    from jpeft.recipes.exporting import export_adapter

    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    export_adapter(args.run, args.out, args.format, print_note)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    if args.json:
        print_json({"folder": str(args.out), "bytes": size})
    else:
        print(f"{args.out}: an adapter folder of {format_bytes(size)} ({size:,} bytes)")
