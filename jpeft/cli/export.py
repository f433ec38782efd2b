"""`jpeft export`: the adapter of a run as a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jpeft.cli.common import Common, folder_to_write
from jpeft.cli.terminal import print_json, print_note
from jpeft.recipes.options import OUTPUT, option
from jpeft.storage import as_path, file_sizes
from jpeft.units import format_bytes

SUMMARY = "Write the adapter of a run, finished or not, as a folder that HuggingFace PEFT or jpeft loads."


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft export`."""

    run: str = option("a run; of an unfinished one, a checkpoint", metavar="RUN", positional=True)
    out: str = option("the folder to write; it must not exist", metavar="OUT", positional=True)
    format: Literal["hf", "jpeft"] = option("for HuggingFace PEFT, or for jpeft", OUTPUT, "hf")


def run(args: Options) -> None:
    """Writes the folder and prints its size."""
    from jpeft.recipes.exporting import export_adapter

    out = folder_to_write(args.out)
    export_adapter(as_path(args.run), out, args.format, print_note)
    size = sum(file_sizes(out).values())
    if args.json:
        print_json({"folder": str(args.out), "bytes": size})
    else:
        print(f"{args.out}: an adapter folder of {format_bytes(size)} ({size:,} bytes)")
