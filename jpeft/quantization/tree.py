"""Quantizing parameter trees: `quantize`, `dequantize`, `is_quantized` and `unquantized`.

    base = jpeft.quantize(params, "nf4", model, input_ids)  # the linear layers, at 4.127 bits per weight
    logits = model.apply({"params": base}, input_ids)       # the model is unchanged

NF4 and its double quantization are those of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), with the
codebooks, blocks and byte order of bitsandbytes: the same weights give the same codes and scales bit for bit. The one
difference is in quantized scales. They have the nearest code here; on CPU, bitsandbytes misses it by one for two in a
thousand.

A block is a run of weights along one axis that share a scale, their largest absolute value. Blocks run along the second
to last axis of a layer (the inputs of a Dense kernel, as in bitsandbytes) if its size is a multiple of the block,
otherwise along the last. Codes and scales keep the weight's axes, so that scans slice them and shardings fit them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from jpeft.core.quantized import Quantized, check_scheme, dequantize_leaf, quantize_leaf
from jpeft.core.targets import ALL_LINEAR, TargetError, Targets, matches, select
from jpeft.core.tree import Path, Tree, flatten, join, like, map_with_path, split_variables
from jpeft.frontends import as_tree
from jpeft.quantization.weights import Weight, describe_left, surveyed_weights, weights_of


def quantize(
    params: Tree,
    scheme: str = "nf4",
    model: Any = None,
    *inputs: Any,
    block: int = 64,
    double: bool = True,
    targets: Targets = None,
    exclude: Targets = None,
    **kwargs: Any,
) -> Any:
    """Quantizes the linear weights of a tree. The model runs on the result unchanged; any method trains over it.

    Flax dequantizes a weight when its module reads it, one layer at a time under a scan. `Peft.apply` dequantizes again
    in the backward pass instead of keeping the weight. ``params`` are not changed; the other leaves are shared.

    Give the model: it shows which parameters are linear weights, whatever their names, and along which axes ``nn.scan``
    and ``nn.vmap`` stack its layers. Each matrix then has its own blocks and scales. Without it, weights go by the name
    ``kernel``, their last two axes are a matrix, and the axes before them a stack.

    Args:
      params: the base tree, plain or boxed (`nn.Partitioned`), on one device or sharded, concrete or abstract.
      scheme: "nf4" (4-bit quantiles of the normal distribution, as in QLoRA), "int4", "int8" (evenly spaced) or "fp8"
        (float8_e4m3fn).
      model: a Linen module, with inputs for its call, or a Peft that was bound to one.
      *inputs: as for ``model.apply``; abstract ones will do.
      block: the number of weights that share a scale.
      double: quantize the scales too, to 8 bits. A scale then costs 0.127 instead of 0.5 bits per weight, in matrices
        of at least 256 blocks. Smaller matrices, such as the heads of a ``[576, 9, 64]`` kernel, may be better off
        without.
      targets: which weights, in the same forms as for a method, by the path of the weight or its owner. None: the
        linear weights, except output heads and embeddings.
      exclude: takes the same forms and wins.
      **kwargs: keyword arguments of ``model.apply``.

    Returns:
      A tree like ``params`` with a `Quantized` in place of each target. `unquantized` lists what is left.

    Raises:
      TypeError: ``params`` is not a tree of arrays, or inputs without a module.
      ValueError: an unknown scheme, a target that matches nothing, or a weight that is already quantized, not floating,
        not finite, not divisible into blocks, or read through a function of the tree. The message names its path.

    Warns:
      UserWarning: without targets, weights of two or more axes stay unquantized that are no embeddings or heads.

    >>> import jax.numpy as jnp
    >>> base = quantize({"dense": {"kernel": jnp.ones((128, 64)), "bias": jnp.zeros(64)}}, "nf4")
    >>> round(base["dense"]["kernel"].bits, 2), base["dense"]["bias"].dtype.name
    (4.13, 'float32')
    """
    check_scheme(scheme, block)
    params, restore = as_tree(params)
    tree, _ = split_variables(params)
    if model is None:
        if inputs or kwargs:
            raise TypeError(f"quantize got {', '.join(kwargs) or 'inputs'} without a model to call with them")
        weights = weights_of(tree)
    else:
        weights = surveyed_weights(tree, params, model, inputs, kwargs)
    stacks = {weight.path: weight.stack for weight in _chosen(weights, targets, exclude)}

    def replace(path: Path, leaf: Any) -> Any:
        if path not in stacks:
            return leaf
        try:
            return quantize_leaf(leaf, scheme, block, double, stacks[path])
        except ValueError as error:
            raise ValueError(f"cannot quantize {join(path)!r}: it {error}; exclude= skips it") from None

    new = map_with_path(replace, tree)
    return restore(new if tree is params else like({**params, "params": new}, params))


def dequantize(params: Tree) -> Any:
    """Replaces quantized weights by plain ones in their original dtype, rounding errors included.

    >>> import jax.numpy as jnp
    >>> plain = dequantize(quantize({"dense": {"kernel": jnp.ones((64, 64))}}))
    >>> type(plain["dense"]["kernel"]).__name__, plain["dense"]["kernel"].shape
    ('ArrayImpl', (64, 64))
    """

    def replace(_: Path, leaf: Any) -> Any:
        return leaf.replace_boxed(dequantize_leaf(leaf)) if isinstance(leaf, Quantized) else leaf

    params, restore = as_tree(params)
    return restore(map_with_path(replace, params))


def is_quantized(params: Tree) -> bool:
    """Whether any leaf is `Quantized`.

    >>> import jax.numpy as jnp
    >>> is_quantized({"dense": {"kernel": jnp.ones((64, 64))}})
    False
    """
    return any(isinstance(leaf, Quantized) for leaf in flatten(as_tree(params)[0]).values())


def unquantized(params: Tree) -> list[str]:
    """The paths of the floating weights of two or more axes that are not quantized, embeddings and heads included.

    Leaves named ``bias`` or ``scale`` are not listed: with two axes, they are stacks of vectors.

    >>> import jax.numpy as jnp
    >>> unquantized(quantize({"dense": {"kernel": jnp.ones((64, 64))}, "embed": {"embedding": jnp.ones((9, 64))}}))
    ['embed/embedding']
    """
    weights = weights_of(split_variables(as_tree(params)[0])[0])
    return [weight.name for weight in weights if weight.is_matrix and not isinstance(weight.leaf, Quantized)]


def _chosen(weights: Sequence[Weight], targets: Targets, exclude: Targets) -> list[Weight]:
    """The weights to quantize.

    Raises:
      TargetError: a target matches nothing.
      ValueError: the model cannot run on a target quantized.

    Warns:
      UserWarning: see `quantize`.
    """
    # A bias or scale with two axes has its owner's name, as the kernel has.
    matrices = [weight for weight in weights if len(weight.leaf.shape) >= 2 and not weight.is_vector]
    left = [weight for weight in matrices if targets is None and weight.expected and not weight.linear]
    left = [weight for weight in left if not matches(exclude, weight)]
    if left and not any(weight.linear for weight in matrices):
        raise TargetError(f"quantize {describe_left(left)}")
    others = [weight.name for weight in weights]
    chosen = select(matrices, ALL_LINEAR if targets is None else targets, exclude, what="quantize", others=others)
    for weight in chosen:
        if weight.problem is not None:
            raise ValueError(f"cannot quantize {weight.name!r}: {weight.problem}; exclude= skips it")
    if left:
        warnings.warn(f"jpeft.quantize {describe_left(left)}", stacklevel=3)
    return chosen
