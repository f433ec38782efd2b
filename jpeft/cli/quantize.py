"""`jpeft quantize`: a HuggingFace folder with quantized linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from jpeft.checks import Rule, is_size
from jpeft.cli.common import Common, folder_to_write
from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import ModelError, UserError
from jpeft.recipes.config import Config, Dtype, Scheme
from jpeft.recipes.options import MEMORY, option, same
from jpeft.units import format_bytes

SUMMARY = "Write a HuggingFace folder with a model's linear layers quantized."

_EVEN: Rule = (lambda value: is_size(value) and value % 2 == 0, "an even number of weights")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft quantize`."""

    model: str = option("a named model, HuggingFace folder, .gguf file or hub id", metavar="MODEL", positional=True)
    out: str = option("the folder to write; it must not exist", metavar="OUT", positional=True)
    scheme: Scheme = option("the scheme; transformers loads nf4", MEMORY, "nf4")
    block: int = option("weights per scale", MEMORY, 64, rule=_EVEN)
    double: bool = option("quantize the scales too, or keep them in float32", MEMORY, True)
    targets: str | None = option(
        "names such as q_proj, or a regular expression", MEMORY, None, shown="all linear layers", metavar="TARGETS"
    )
    dtype: Dtype = same(Config, "dtype", help="dtype to load the weights in; other weights are saved in it")


def run(args: Options) -> None:
    """Writes the folder, and prints its sizes and the layers that are not quantized."""
    out = folder_to_write(args.out)
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
    options = {"scheme": args.scheme, "block": args.block, "double": args.double, "targets": targets}
    try:
        model, params = load(path, param_dtype=jnp.dtype(args.dtype), quantize=options)
    except ModelError:
        raise
    except ValueError as error:  # the options do not suit the model
        raise UserError(str(error)) from error
    save(out, model, params, source=path)
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
