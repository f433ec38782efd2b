"""`jpeft merge`: a HuggingFace folder with the adapter merged into the model."""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.cli.common import Common, folder_to_write
from jpeft.cli.terminal import print_json, print_note
from jpeft.recipes import tasks
from jpeft.recipes.config import Config, Dtype
from jpeft.recipes.options import MEMORY, OUTPUT, option
from jpeft.storage import as_path, file_sizes
from jpeft.units import format_bytes

SUMMARY = "Write a HuggingFace folder with the adapter merged into the model."


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft merge`."""

    run: str = option("a run; of an unfinished one, a checkpoint", metavar="RUN", positional=True)
    out: str = option("the folder to write; it must not exist", metavar="OUT", positional=True)
    requantize: bool = option(
        "merge into the unquantized weights and quantize the result like the base; for a base that was quantized "
        "before jpeft loaded it, rounding removes small changes", MEMORY, False,
    )  # fmt: skip
    dtype: Dtype | None = option(
        "dtype of weights that are not quantized", MEMORY, None,
        shown="that of each tensor in the model's own files; float32 for what a .gguf file holds quantized",
    )  # fmt: skip
    force: bool = option(
        "write merged weights that hold NaN or infinity, or are beyond the range of their dtype", OUTPUT, False
    )


def run(args: Options) -> None:
    """Writes the folder and prints its size."""
    from jpeft.recipes import run_folder
    from jpeft.recipes.tasks.base import Merging

    out = folder_to_write(args.out)
    config = Config(**run_folder.read_record(as_path(args.run))["config"])
    how = Merging(args.requantize, args.dtype, args.force)
    usage = tasks.find(config.task).export_run(as_path(args.run), out, how, print_note)
    size = sum(file_sizes(out).values())
    if args.json:
        print_json({"folder": str(args.out), "bytes": size})
    else:
        print(f"{args.out}: a HuggingFace folder of {format_bytes(size)} ({size:,} bytes); {usage}")
