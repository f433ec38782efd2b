"""The README's table of plans: Llama 3 8B, 70B and 405B with LoRA and QLoRA on slices of TPU v5e, v6e and v5p.

    python benchmarks/plans.py [--only 8b,v5p] [--json FILE]

Each row is `jpeft plan --rank 16 --batch 16 --seq 2048` with the options that it shows: LoRA of rank 16 on all linear
layers, 16 rows of 2,048 tokens, a base in bfloat16 or NF4, `remat="full"`. libtpu compiles each in about a minute
(`pip install "jpeft[plan]"`, or JPEFT_PLAN_PYTHON); all rows take more than 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from common import markdown

COMMON = ("--rank", "16", "--batch", "16", "--seq", "2048")
ROWS = (
    "--model llama-3-8b --topology v5e:2x2",
    "--model llama-3-8b --topology v5e:1x2 --quantize nf4",
    "--model llama-3-8b --topology v5e:1x1 --quantize nf4 --accumulate 16",
    "--model llama-3-8b --topology v6e:1x2",
    "--model llama-3-8b --topology v6e:1x1 --quantize nf4",
    "--model llama-3-8b --topology v5p:1x1x1",
    "--model llama-3-8b --topology v5p:1x1x1 --quantize nf4",
    "--model llama-3-70b --topology v5e:4x8 --mesh fsdp=16,tensor=2",
    "--model llama-3-70b --topology v5e:2x4 --quantize nf4 --accumulate 2",
    "--model llama-3-70b --topology v6e:4x4",
    "--model llama-3-70b --topology v6e:2x4 --quantize nf4",
    "--model llama-3-70b --topology v5p:2x2x4",
    "--model llama-3-70b --topology v5p:1x1x1 --quantize nf4 --accumulate 4",
    "--model llama-3.1-405b --topology v5e:16x16 --mesh fsdp=16,tensor=16",
    "--model llama-3.1-405b --topology v5e:8x8 --mesh fsdp=16,tensor=4 --quantize nf4",
    "--model llama-3.1-405b --topology v6e:8x8 --mesh fsdp=16,tensor=4",
    "--model llama-3.1-405b --topology v6e:4x8 --mesh fsdp=16,tensor=2 --quantize nf4",
    "--model llama-3.1-405b --topology v5p:2x4x4 --mesh fsdp=16,tensor=2",
    "--model llama-3.1-405b --topology v5p:2x2x4 --quantize nf4",
)
HEAD = [
    "row",
    "chips",
    "GiB per chip",
    "of",
    "base",
    "temporaries",
    "minimum step time",
    "bound by",
    "$/M tokens",
    "compile time",
]


def measured(row: str) -> dict[str, Any]:
    """The output of `jpeft plan` for a row, and `seconds_in_all`, the time of the command."""
    began = time.perf_counter()
    command = ["jpeft", "plan", *COMMON, *row.split(), "--no-base", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()}
    return {**json.loads(done.stdout), "seconds_in_all": time.perf_counter() - began}


def cells(row: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"`{row}`", found["error"], *[""] * (len(HEAD) - 2)]
    memory, floor = found["memory"], found["floor_seconds"]
    slowest = max(floor, key=floor.get, default="")
    cost = found["usd_per_million_tokens"]
    return [
        f"`{row}`",
        str(found["devices"]),
        gib(memory["total"]) + ("" if found["fits"] else ", does not fit"),
        gib(found["capacity"]),
        gib(memory["arguments"]["base"]),
        gib(memory["temporaries"]),
        f"{floor[slowest]:.2f} s" if floor else "",
        slowest,
        "" if cost is None else f"{cost:.2f}",
        f"{found['compile_seconds']:.0f} s",
    ]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows that contain one of these words, separated by commas")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args()
    words = [word for word in args.only.split(",") if word]
    rows = [row for row in ROWS if not words or any(word in row for word in words)]
    found = {row: measured(row) for row in rows}
    markdown(HEAD, [cells(row, facts) for row, facts in found.items()])
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
