"""`jpeft export`: an adapter as a folder of its own, or for a production server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jpeft.checks import POSITIVE_INT, Rule, is_number
from jpeft.cli.common import Common, folder_to_write
from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError
from jpeft.recipes.options import OUTPUT, WHAT, option
from jpeft.storage import as_path, file_size, file_sizes
from jpeft.units import format_bytes

SUMMARY = "Write an adapter as a folder that HuggingFace PEFT or jpeft loads, or that vLLM, SGLang or llama.cpp serves."
_SHARE: Rule = (lambda value: is_number(value) and value >= 0, "at least 0")
_TITLES = {"vllm": "vLLM", "sglang": "SGLang", "gguf": "llama.cpp"}


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft export`."""

    run: str = option(
        "a run, of an unfinished one a checkpoint; or an adapter folder (saved by jpeft or PEFT)",
        metavar="RUN|ADAPTER", positional=True,
    )  # fmt: skip
    out: str = option("the folder to write, or for gguf the file; it must not exist", metavar="OUT", positional=True)
    model: str | None = option(
        "the base of an adapter folder: a named model, a HuggingFace folder, .gguf file or hub id", WHAT, None,
        shown="the run's model", metavar="MODEL",
    )  # fmt: skip
    server: Literal["peft", "vllm", "sglang", "gguf"] | None = option(
        "what runs it: HuggingFace PEFT, vLLM, SGLang, or llama.cpp", OUTPUT, None, shown="see --format", flag="--for"
    )
    format: Literal["hf", "jpeft"] | None = option("for HuggingFace PEFT, or for jpeft", OUTPUT, None, shown="hf")
    rank: int | None = option(
        "largest rank of what is no LoRA, but becomes one for a server", OUTPUT, None, rule=POSITIVE_INT, shown="64"
    )
    max_error: float | None = option(
        "largest error of that, as a share of the change of a weight", OUTPUT, None, rule=_SHARE, shown="0.01"
    )
    dtype: Literal["float32", "float16"] | None = option(
        "dtype of the tensors for a server", OUTPUT, None, shown="float32"
    )


def run(args: Options) -> None:
    """Writes the adapter and prints its size, and the command that serves it."""
    from jpeft.recipes.exporting import HF, export_adapter, export_for

    if args.server and args.format:
        raise UserError(f"`format` {args.format} and `server` {args.server} both say for whom it is: give one")
    given = {n: x for n in ("rank", "max_error", "dtype") if (x := getattr(args, n)) is not None}
    if given and args.server in (None, "peft"):
        name = next(iter(given))
        raise UserError(f"`{name}` is for adapters that a server gets: `server` vllm, sglang or gguf")
    out = folder_to_write(args.out)
    if args.server in (None, "peft"):
        export_adapter(as_path(args.run), out, args.format or HF, print_note, args.model)
        _report(args, out, {}, "an adapter folder")
        return
    done = export_for(args.server, as_path(args.run), out, model=args.model, log=print_note, **given)
    worst = max(done.errors.items(), key=lambda item: item[1], default=None)
    details = {"for": args.server, "rank": done.rank, "modules": done.modules, "command": done.command}
    details["error"] = None if worst is None else {"largest": worst[1], "at": worst[0]}
    _report(args, out, details, f"a LoRA of rank {done.rank} on {done.modules} modules for {_TITLES[args.server]}")
    if not args.json:
        if worst is not None:
            print(f"what was no LoRA became one: relative error at most {worst[1]:.2g}, at {worst[0]}")
        print(f"serve it: {done.command}")
    for note in done.notes:
        print_note(note)


def _report(args: Options, out: Path, details: Mapping[str, Any], what: str) -> None:
    size = sum(file_sizes(out).values()) if out.is_dir() else file_size(out)
    if args.json:
        print_json({"folder": str(args.out), "bytes": size, **details})
    else:
        print(f"{args.out}: {what} of {format_bytes(size)} ({size:,} bytes)")
