"""jpeft.cli.quantize."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jpeft.cli.terminal import format_bytes
from jpeft.errors import UserError
from jpeft.recipes.config import SCHEMES

SUMMARY = "Write a HuggingFace folder with a model's linear layers quantized."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as for generate: a name, a folder, .gguf or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--scheme", choices=SCHEMES, default="nf4",
                          help="nf4 (default; transformers reads it too), int4, int8 or fp8")  # fmt: skip
    parser.add_argument("--block", type=int, default=64, metavar="INT", help="weights to a scale (default: 64)")
    parser.add_argument("--no-double", action="store_true", help="keep the scales in float32")
    parser.add_argument("--targets", metavar="STR",
                          help="names like q_proj, or a regular expression (default: all linear layers)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                          help="that the weights are read in, and that the others stay in")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    import jax.numpy as jnp

    from jpeft import models
    from jpeft.core import tree
    from jpeft.core.quantized import Quantized
    from jpeft.recipes.assets import resolve_model
    from jpeft.recipes.config import parse_targets

    path = resolve_model(args.model, lambda line: print(line, file=sys.stderr))
    targets = None if args.targets is None else parse_targets(args.targets)
    options = {"scheme": args.scheme, "block": args.block, "double": not args.no_double, "targets": targets}
    try:
        model, params = models.load(path, param_dtype=jnp.dtype(args.dtype), quantize=options)
    except models.ModelError:
        raise
    except ValueError as error:  # of what was asked
        raise UserError(str(error)) from error
    models.save(args.out, model, params, source=path)
    leaves = tree.flatten(params).values()
    quantized = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    size = sum(leaf.size for leaf in quantized)
    about = {
        "scheme": args.scheme,
        "bits": sum(leaf.bits * leaf.size for leaf in quantized) / size,
        "quantized": size,
        "bytes_before": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "bytes_after": tree.size_bytes(params),
        "folder": str(args.out),
    }
    if args.json:
        print(json.dumps(about))
    else:
        print(f"{about['scheme']}, {about['bits']:.3f} bits a quantized weight: {format_bytes(about['bytes_before'])} in "
              f"{args.dtype} -> {format_bytes(about['bytes_after'])}, {args.out}")  # fmt: skip
