"""`jpeft plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jpeft.cli.terminal import setting
from jpeft.recipes.config import CHAT, CLASSIFY, SCHEMES

SUMMARY = "Estimate memory, time and traffic of a training step on hardware you do not have."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several = "; with --sweep several, or tried in several ways if not given"
    words = lambda text: [word.strip() for word in text.split(",") if word.strip()]  # noqa: E731
    parser.add_argument("--model", required=True, help="a size that jpeft knows, such as llama-3-8b, a config.json, a "
                        "folder that has one, or as for finetune; weights are not read")  # fmt: skip
    parser.add_argument("--topology", required=True, type=words, metavar="NAME", help="v5e:4x4, v5p:2x2x4, v6e-16, …, "
                        "cpu:8 or gpu:1; with --sweep several, with commas")  # fmt: skip
    parser.add_argument("--mesh", action="append", default=[], metavar="AXES",
                        help=f"devices by axis, fsdp=8,tensor=2 (all on fsdp); may be repeated{several}")  # fmt: skip
    parser.add_argument("--batch", "--batch-size", type=_counts, default=[], metavar="INT", help=f"rows (16){several}")
    parser.add_argument("--seq", "--max-length", type=int, default=2048, metavar="INT", help="tokens of a row (2048)")
    parser.add_argument("--remat", type=_choices("full", "dots", "offload", "none"), default=[],
                        help=f"as for finetune (full){several}")  # fmt: skip
    parser.add_argument("--quantize", type=_choices("none", *SCHEMES), default=[], metavar="SCHEME",
                        help=f"none (default), {', '.join(SCHEMES)}{several}")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16",
                        help="of the base and the arithmetic (default: bfloat16)")  # fmt: skip
    parser.add_argument("--accumulate", type=int, default=1, metavar="INT", help="micro-batches of a batch (1)")
    parser.add_argument("--task", choices=(CHAT, CLASSIFY), default=CHAT, help=f"of the step (default: {CHAT})")
    parser.add_argument("--method", default="lora", help="as for finetune (default: lora)")
    for name, kind in (("--rank", int), ("--alpha", float), ("--dropout", float), ("--targets", str)):
        parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), help="as for finetune")
    parser.add_argument("--set", dest="settings", action="append", type=setting, default=[], metavar="NAME=VALUE",
                        help="any other field of the method")  # fmt: skip
    parser.add_argument("--no-base", action="store_true", help="do not also compile the step without an adapter, which "
                        "tells what the adapter sends")  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="plan for all choices, and recommend the cheapest")
    parser.add_argument(
        "--jobs", type=int, metavar="INT", help="that compile at once (default: as cores and memory allow)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of a chip-hour (default: the list price)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the memory of a chip (--sweep: plan.png)")


def _choices(*known: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",")]
        if wrong := [word for word in found if word not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return found

    return read


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"expected counts, from 1 on, with commas between them, got {text!r}")
    return [int(word) for word in words]


def run(args: argparse.Namespace) -> None:
    from jpeft.cli import plan_run

    plan_run.run(args)
