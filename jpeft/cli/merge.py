"""jpeft.cli.merge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jpeft.cli.terminal import format_bytes
from jpeft.errors import UserError
from jpeft.recipes.config import CHAT, Config

SUMMARY = "Write a HuggingFace folder with the adapter merged into the model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, which must not exist")
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="merge into the unquantized model, and quantize the result as the base was; codes that came without one "
        "are quantized again, which rounds small changes away",
    )


def run(args: argparse.Namespace) -> None:
    from jpeft.recipes import run_folder

    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    record = run_folder.read_record(args.run)
    chat = Config(**record["config"]).task == CHAT
    if args.requantize and not chat:
        raise UserError("--requantize: a classifier's folder holds plain weights")
    if chat:
        from jpeft.recipes import finished

        finished.export(args.run, args.out, args.requantize)
    else:
        run_folder.open_run(args.run).export(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    if args.json:
        print(json.dumps({"folder": str(args.out), "bytes": size}))
    else:
        how = f"jpeft chat --model {args.out}" if chat else "its README.md shows how to load it with the head"
        print(f"{args.out}: {format_bytes(size)}, a HuggingFace folder; {how}")
