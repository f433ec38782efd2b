"""FLOPs of dot products, convolutions and library calls."""

from __future__ import annotations

import functools
import itertools
import math
import re

from jpeft.planning.hlo.parse import Computation, Instruction


def computation_flops(computation: Computation) -> int:
    """FLOPs of one run of a computation, without what it calls: two per multiply-add."""
    counts = {"dot": _dot_flops, "convolution": _convolution_flops, "custom-call": _custom_call_flops}
    return sum(
        counts[instruction.opcode](instruction, computation)
        for instruction in computation.instructions.values()
        if instruction.opcode in counts
    )


def _dot_flops(dot: Instruction, computation: Computation) -> int:
    left = computation.operands(dot)[0].array
    return 2 * math.prod(dot.array.dims) * math.prod(left.dims[i] for i in dot.integers("lhs_contracting_dims"))


def _convolution_flops(convolution: Instruction, computation: Computation) -> int:
    """Counted as XLA's ``HloCostAnalysis`` does: positions in padding or in a dilation's holes do not count."""
    left, right = (operand.array for operand in computation.operands(convolution)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if not labels:
        return 0
    lhs, rhs, result = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    spatial = [label for label in rhs if label.isdigit()]
    fields = _window(window[1] if window else "", len(spatial))
    positions = 1
    for i, label in enumerate(sorted(spatial, key=int)):
        sizes = left.dims[lhs.index(label)], convolution.array.dims[result.index(label)]
        positions *= _valid_positions(*sizes, *(fields[key][i] for key in ("size", "stride", "low", "lhs", "rhs")))
    groups = {name: re.search(rf"{name}_group_count=(\d+)", convolution.attributes) for name in ("feature", "batch")}
    feature, batch = (int(found[1]) if found else 1 for found in groups.values())
    features = left.dims[lhs.index("f")] // feature * right.dims[rhs.index("o")]
    return 2 * features * (left.dims[lhs.index("b")] // batch) * positions


def _window(text: str, n: int) -> dict[str, list[int]]:
    """The fields of a convolution's ``window={size=3x3 pad=1_1x1_1}``, one value per spatial dimension."""
    given = dict(part.split("=") for part in text.split())

    def numbers(key: str, default: int) -> list[int]:
        return [int(x) for x in given[key].split("x")] if key in given else [default] * n

    low = [int(pair.split("_")[0]) for pair in given["pad"].split("x")] if "pad" in given else [0] * n
    return {
        "size": numbers("size", 1),
        "stride": numbers("stride", 1),
        "low": low,
        "lhs": numbers("lhs_dilate", 1),
        "rhs": numbers("rhs_dilate", 1),
    }


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    size: int, out: int, window: int, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Pairs of kernel and output positions that read an element of the input."""
    if (
        stride == lhs_dilation == rhs_dilation == 1
    ):  # for each kernel position w: outputs k with 0 <= k - low + w < size
        return sum(max(0, min(out, size + low - w) - max(0, low - w)) for w in range(window))
    if lhs_dilation == 1:
        starts = [low - w * rhs_dilation for w in range(window)]
        return sum(max(0, min(out, -(-(size + s) // stride)) - max(0, -(-s // stride))) for s in starts)
    count = 0
    for w, o in itertools.product(range(window), range(out)):
        at, hole = divmod(o * stride - low + w * rhs_dilation, lhs_dilation)
        count += hole == 0 and 0 <= at < size
    return count


def _custom_call_flops(call: Instruction, computation: Computation) -> int:
    """FLOPs of a library's product, or of a kernel that states its cost; 0 if unknown."""
    stated = re.search(r'"?cost_estimate"?\s*:\s*\{[^}]*?"?flops"?\s*:\s*"?(\d+)', call.attributes)
    if stated:
        return int(stated[1])
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    if (contracted and "matmul" in call.target) or (contracted and "gemm" in call.target):
        left = computation.operands(call)[0].array
        return 2 * math.prod(call.array.dims) * math.prod(left.dims[int(i)] for i in re.findall(r"\d+", contracted[1]))
    if call.target == "__cudnn$convForward" or call.target.startswith("__cudnn$convBiasActivation"):
        return _convolution_flops(call, computation)
    return 0
