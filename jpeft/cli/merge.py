"""`jpeft merge`: a HuggingFace folder with the adapter merged into the model."""

from __future__ import annotations

import argparse
from pathlib import Path

from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError
from jpeft.recipes import tasks
from jpeft.recipes.config import DTYPES, Config
from jpeft.units import format_bytes

SUMMARY = "Write a HuggingFace folder with the adapter merged into the model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run; of an unfinished one, a checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="merge into the unquantized weights and quantize the result like the base; for a base that was quantized "
        "before jpeft loaded it, rounding removes small changes",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of weights that are not quantized (default: that of each tensor in the model's own files; float32 "
        "for what a .gguf file holds quantized)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write merged weights that hold NaN or infinity, or are beyond the range of their dtype",
    )


def run(args: argparse.Namespace) -> None:
    from jpeft.recipes import run_folder
    from jpeft.recipes.tasks.base import Merging

    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    config = Config(**run_folder.read_record(args.run)["config"])
    how = Merging(args.requantize, args.dtype, args.force)
    usage = tasks.find(config.task).export_run(args.run, args.out, how, print_note)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    if args.json:
        print_json({"folder": str(args.out), "bytes": size})
    else:
        print(f"{args.out}: a HuggingFace folder of {format_bytes(size)} ({size:,} bytes); {usage}")
