"""`jpeft inspect`: the contents of a run or an adapter folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jpeft.cli.terminal import print_json

SUMMARY = "Show the contents of a run or an adapter folder, without loading a model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN|ADAPTER", type=Path)


def run(args: argparse.Namespace) -> None:
    from jpeft.cli.results import result_rows
    from jpeft.recipes.describing import describe

    summary = describe(args.path)
    if args.json:
        print_json(summary)
        return
    leaves, result, sites = summary.pop("leaves", {}), summary.pop("result", None), summary.pop("sites", [])
    config = summary.pop("config", {})
    summary |= {f"config.{name}": value for name, value in config.items() if value not in (None, {})}
    summary |= {} if result is None else dict(result_rows(result))
    for name, value in summary.items():
        print(f"{name:24}  {value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)}")
    if leaves:
        print(f"{'sites':24}  {len(sites)}")
        width = max(map(len, leaves))
        print("\n".join(f"  {name:{width}}  {'×'.join(map(str, shape))}" for name, shape in sorted(leaves.items())))
