"""`jpeft quantize`: a HuggingFace folder with quantized linear layers."""

from __future__ import annotations

import argparse
from pathlib import Path

from jpeft.cli.arguments import add_dtype
from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import ModelError, UserError
from jpeft.recipes.config import SCHEMES
from jpeft.units import format_bytes

SUMMARY = "Write a HuggingFace folder with a model's linear layers quantized."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name, HuggingFace folder, .gguf file or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    schemes = "nf4 (default; transformers can load it), int4, int8 or fp8"
    parser.add_argument("--scheme", choices=SCHEMES, default="nf4", help=schemes)
    parser.add_argument("--block", type=int, default=64, metavar="INT", help="weights per scale (default: 64)")
    parser.add_argument("--no-double", action="store_true", help="keep the scales in float32")
    targets = "names such as q_proj, or a regular expression (default: all linear layers)"
    parser.add_argument("--targets", metavar="STR", help=targets)
    add_dtype(parser, "to load the weights in; other weights are saved in it")


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    import jax.numpy as jnp

    from jpeft.core import tree
    from jpeft.core.quantized import Quantized
    from jpeft.models.loading import load
    from jpeft.models.saving import save
    from jpeft.quantization.tree import unquantized
    from jpeft.recipes.assets import resolve_model
    from jpeft.recipes.config import parse_targets

    path = resolve_model(args.model, print_note)
    targets = None if args.targets is None else parse_targets(args.targets)
    options = {"scheme": args.scheme, "block": args.block, "double": not args.no_double, "targets": targets}
    try:
        model, params = load(path, param_dtype=jnp.dtype(args.dtype), quantize=options)
    except ModelError:
        raise
    except ValueError as error:  # the options do not suit the model
        raise UserError(str(error)) from error
    save(args.out, model, params, source=path)
    leaves, left = tree.flatten(params).values(), unquantized(params)
    quantized = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    size = sum(leaf.size for leaf in quantized)
    bits = sum(leaf.bits * leaf.size for leaf in quantized) / size
    before, after = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), tree.size_bytes(params)
    if args.json:
        sizes = {"bits": bits, "quantized": size, "bytes_before": before, "bytes_after": after}
        print_json({"scheme": args.scheme, **sizes, "left": left, "folder": str(args.out)})
    else:
        print(
            f"{args.scheme}, {bits:.3f} bits per quantized weight: {format_bytes(before)} ({before:,} bytes) in "
            f"{args.dtype} -> {format_bytes(after)} ({after:,} bytes), {args.out}"
        )
        if left:
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            print(f"left in {args.dtype}: {', '.join(left[:8])}{more}")
