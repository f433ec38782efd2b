"""Quantizing parameter trees: `quantize`, `dequantize` and `is_quantized`.

    base = jpeft.quantize(params, "nf4")                    # 4.127 bits per weight of the linear layers
    logits = model.apply({"params": base}, input_ids)       # the model is unchanged

NF4 and its double quantization are those of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), with the
codebooks, blocks and byte order of bitsandbytes: the same weights give the same codes and scales bit for bit. The one
difference is in quantized scales. They have the nearest code here; on CPU, bitsandbytes misses it by one for two in a
thousand.

A block is a run of weights along one axis that share a scale, their largest absolute value. Blocks run along the second
to last axis (the inputs of a Dense kernel, as in bitsandbytes) if its size is a multiple of the block, otherwise along
the last. Codes and scales keep the weight's axes, so that scans slice them and shardings fit them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jpeft.core.quantized import Quantized, check_scheme, dequantize_leaf, quantize_leaf
from jpeft.core.sites import HEAD_NAMES
from jpeft.core.targets import Targets, select
from jpeft.core.tree import Path, Tree, flatten, join, map_with_path, peek, split_variables


def quantize(
    params: Tree,
    scheme: str = "nf4",
    *,
    block: int = 64,
    double: bool = True,
    targets: Targets = None,
    exclude: Targets = None,
) -> Any:
    """Quantizes the linear weights of a tree. The model runs on the result unchanged; any method trains over it.

    Flax dequantizes a weight when its module reads it, one layer at a time under a scan. `Peft.apply` dequantizes again
    in the backward pass instead of keeping the weight. ``params`` are not changed; the other leaves are shared.

    The last two axes of a weight are a matrix, the axes before them a stack. Layers that ``nn.scan`` stacks along
    another axis than the first (``variable_axes={"params": 1}``) do not run on a quantized tree, nor do wrappers that
    map a function over their parameters (``nn.WeightNorm``).

    Args:
      params: the base tree, plain or boxed (`nn.Partitioned`), on one device or sharded, concrete or abstract.
      scheme: "nf4" (4-bit quantiles of the normal distribution, as in QLoRA), "int4", "int8" (evenly spaced) or "fp8"
        (float8_e4m3fn).
      block: the number of weights that share a scale.
      double: quantize the scales too, to 8 bits. A scale then costs 0.127 instead of 0.5 bits per weight, in matrices
        of at least 256 blocks. Smaller matrices, such as the heads of a ``[576, 9, 64]`` kernel, may be better off
        without.
      targets: which weights, in the same forms as for a method, by the path of the weight or its owner. None: every
        ``kernel`` with two or more axes, except output heads (``lm_head``, ``classifier``, ...).
      exclude: takes the same forms and wins.

    Returns:
      A tree like ``params`` with a `Quantized` in place of each target.

    Raises:
      TypeError: ``params`` is not a tree of arrays.
      ValueError: an unknown scheme, a target that matches nothing, or a weight that is already quantized, not floating,
        not finite, or not divisible into blocks. The message names its path.

    >>> import jax.numpy as jnp
    >>> base = quantize({"dense": {"kernel": jnp.ones((128, 64)), "bias": jnp.zeros(64)}}, "nf4")
    >>> round(base["dense"]["kernel"].bits, 2), base["dense"]["bias"].dtype.name
    (4.13, 'float32')
    """
    check_scheme(scheme, block)
    tree, _ = split_variables(params)
    leaves = flatten(tree)
    for path, leaf in leaves.items():
        if not hasattr(peek(leaf), "shape"):
            raise TypeError(f"{join(path)} is a {type(leaf).__name__}, expected an array")
    candidates = [_Weight(path, peek(leaf)) for path, leaf in leaves.items()]
    # A bias or scale with two axes is a stack of vectors. It has its owner's name, as the kernel has.
    matrices = [w for w in candidates if len(w.leaf.shape) >= 2 and w.path[-1] not in ("bias", "scale")]
    others = [weight.name for weight in candidates]
    chosen = select(matrices, "all-linear" if targets is None else targets, exclude, what="quantize", others=others)
    paths = {weight.path for weight in chosen}

    def replace(path: Path, leaf: Any) -> Any:
        if path not in paths:
            return leaf
        try:
            return quantize_leaf(leaf, scheme, block, double)
        except ValueError as error:
            raise ValueError(f"cannot quantize {join(path)!r}: it {error}; exclude= skips it") from None

    new = map_with_path(replace, tree)
    return new if tree is params else {**params, "params": new}


def dequantize(params: Tree) -> Any:
    """Replaces quantized weights by plain ones in their original dtype, rounding errors included.

    >>> import jax.numpy as jnp
    >>> plain = dequantize(quantize({"dense": {"kernel": jnp.ones((64, 64))}}))
    >>> type(plain["dense"]["kernel"]).__name__, plain["dense"]["kernel"].shape
    ('ArrayImpl', (64, 64))
    """

    def replace(_: Path, leaf: Any) -> Any:
        return leaf.replace_boxed(dequantize_leaf(leaf)) if isinstance(leaf, Quantized) else leaf

    return map_with_path(replace, params)


def is_quantized(params: Tree) -> bool:
    """Whether any leaf is `Quantized`.

    >>> import jax.numpy as jnp
    >>> is_quantized({"dense": {"kernel": jnp.ones((64, 64))}})
    False
    """
    return any(isinstance(leaf, Quantized) for leaf in flatten(params).values())


@dataclass(frozen=True)
class _Weight:
    """A leaf as targets see it."""

    path: Path
    leaf: Any

    @property
    def name(self) -> str:
        return join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, join(self.path[:-1])

    @property
    def linear(self) -> bool:
        return self.path[-1] == "kernel" and not HEAD_NAMES & set(self.path[-2:-1])
