"""jpeft.cli.inspect."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jpeft.cli.terminal import result_rows

SUMMARY = "Show what a run or an adapter folder holds; needs no model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN|ADAPTER", type=Path)


def run(args: argparse.Namespace) -> None:
    from jpeft.recipes import run_folder

    about = run_folder.describe(args.path)
    if args.json:
        print(json.dumps(about, ensure_ascii=False))
        return
    leaves, result, sites = about.pop("leaves", {}), about.pop("result", None), about.pop("sites", [])
    config = about.pop("config", {})
    about |= {f"config.{name}": value for name, value in config.items() if value not in (None, {})}
    about |= {} if result is None else dict(result_rows(result))
    for name, value in about.items():
        print(f"{name:24}  {value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)}")
    if leaves:
        print(f"{'sites':24}  {len(sites)}")
        width = max(map(len, leaves))
        print("\n".join(f"  {name:{width}}  {'×'.join(map(str, shape))}" for name, shape in sorted(leaves.items())))
