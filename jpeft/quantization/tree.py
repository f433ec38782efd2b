"""Quantized weights: leaves of a parameter tree that hold codes and scales, and are weights again when Flax opens them.

    base = jpeft.quantize(params, "nf4")                    # 4.127 bits for each weight of the linear layers
    logits = model.apply({"params": base}, input_ids)       # the model is unchanged

NF4 and its double quantization are those of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), with the
codebooks, blocks and byte order of bitsandbytes: the same weights give the same codes and scales to the bit. Quantized
scales have the nearest code, which on a CPU bitsandbytes misses by one for two in a thousand.

A block is a run of weights along one axis that share a scale, their largest absolute value. It runs along the second to
last axis, which is a Dense kernel's inputs as in bitsandbytes, where that is a multiple of the block, else along the
last. Codes and scales keep the weight's axes, so that scans slice them and shardings fit them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.core.quantized import Quantized, check_scheme, dequantize_leaf, quantize_leaf
from jpeft.core.sites import HEAD_NAMES
from jpeft.core.targets import Targets, select
from jpeft.core.tree import Path, Tree, flatten, join, map_with_path, peek

# --- trees ----------------------------------------------------------------------------------------------------------


def quantize(
    params: Tree,
    scheme: str = "nf4",
    *,
    block: int = 64,
    double: bool = True,
    targets: Targets = None,
    exclude: Targets = None,
) -> Any:
    """A tree whose linear weights are `Quantized`: any Linen model runs on it unchanged, any method trains over it.

    Flax dequantizes a weight when its module asks for it, a layer at a time under a scan. `Peft.apply` does it again in
    the backward pass instead of keeping what it made. ``params`` are not changed; the rest of the tree is shared.

    The last two axes of a weight are a matrix, and what stands before them a stack. Layers that ``nn.scan`` stacks
    along another axis than the first (``variable_axes={"params": 1}``) do not run on it, nor do wrappers that map a
    function over their parameters (``nn.WeightNorm``).

    Args:
      params: the base tree, plain or boxed (`nn.Partitioned`), on one device or sharded, concrete or abstract.
      scheme: "nf4" (4-bit quantiles of the normal distribution, QLoRA's), "int4", "int8" (evenly spaced) or "fp8"
        (float8_e4m3fn).
      block: weights that share a scale.
      double: quantize the scales too, to 8 bits: a scale then costs 0.127 bits a weight instead of 0.5, in matrices of
        256 blocks or more. Smaller ones, such as the heads of a ``[576, 9, 64]`` kernel, may do better without.
      targets: which weights, as for a method, by the path of their owner or their own. None is every ``kernel`` of two
        or more axes but that of an output head (``lm_head``, ``classifier``, ...).
      exclude: takes the same forms and wins.

    Raises:
      ValueError: an unknown scheme; a target that matches nothing; a weight that is quantized already, not floating,
        not finite, or that the block does not divide, by path.

    >>> base = quantize({"dense": {"kernel": jnp.ones((128, 64)), "bias": jnp.zeros(64)}}, "nf4")
    >>> round(base["dense"]["kernel"].bits, 2), base["dense"]["bias"].dtype.name
    (4.13, 'float32')
    """
    check_scheme(scheme, block)
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a tree of mappings, got {type(params).__name__}")
    tree = params["params"] if isinstance(params.get("params"), Mapping) else params
    leaves = flatten(tree)
    if bad := next((path for path, leaf in leaves.items() if not hasattr(peek(leaf), "shape")), None):
        raise TypeError(f"{join(bad)!r} is no array, but a {type(leaves[bad]).__name__}")
    candidates = [_Weight(path, peek(leaf)) for path, leaf in leaves.items()]
    # A bias or a scale of two axes is a stack of them, and answers to its owner's name beside the kernel.
    wide = [w for w in candidates if len(w.leaf.shape) >= 2 and w.path[-1] not in ("bias", "scale")]
    chosen = select(wide, "all-linear" if targets is None else targets, exclude, what="quantize",
                    others=[weight.name for weight in candidates])  # fmt: skip
    paths = {weight.path for weight in chosen}

    def replace(path: Path, leaf: Any) -> Any:
        if path not in paths:
            return leaf
        try:
            return quantize_leaf(leaf, scheme, block, double)
        except ValueError as error:
            raise ValueError(f"cannot quantize {join(path)!r}: it {error}; exclude= leaves it out") from None

    new = map_with_path(replace, tree)
    return new if tree is params else {**params, "params": new}


def dequantize(params: Tree) -> Any:
    """The tree with plain weights in place of the quantized ones: in their own dtype, with the quantization's error.

    >>> plain = dequantize(quantize({"dense": {"kernel": jnp.ones((64, 64))}}))
    >>> type(plain["dense"]["kernel"]).__name__, plain["dense"]["kernel"].shape
    ('ArrayImpl', (64, 64))
    """
    return map_with_path(
        lambda _, leaf: leaf.replace_boxed(dequantize_leaf(leaf)) if isinstance(leaf, Quantized) else leaf, params
    )


def is_quantized(params: Tree) -> bool:
    """Whether any leaf is `Quantized`.

    >>> is_quantized({"dense": {"kernel": jnp.ones((64, 64))}})
    False
    """
    return any(isinstance(leaf, Quantized) for leaf in flatten(params).values())


@dataclass(frozen=True)
class _Weight:
    """What targets see of a leaf."""

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
