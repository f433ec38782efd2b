"""Bytes that instructions read from main memory and write to it."""

from __future__ import annotations

from jpeft.planning.hlo.collectives import async_results, continues_collective
from jpeft.planning.hlo.parse import Computation, Instruction, Module

# These move no data: they name or group what exists, or call computations that are counted by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "while", "call",
    "conditional", "optimization-barrier", "partition-id", "replica-id", "domain", "async-update", "async-start",
}  # fmt: skip
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AsyncCollectiveDone", "Sharding", "AssumeGatherIndicesInBound")


def computation_bytes(module: Module, computation: Computation) -> int:
    """Bytes of one run of a computation, without what it calls."""
    return sum(instruction_bytes(module, i, computation) for i in computation.instructions.values())


def instruction_bytes(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes that one instruction reads and writes."""
    opcode, operands = instruction.opcode, computation.operands(instruction)
    if opcode in _FREE or opcode.endswith("-done") or instruction.target in _FREE_CALLS:
        return 0
    if opcode == "fusion":
        return _fusion_bytes(module, instruction, operands)
    written = sum(leaf.hbm for leaf in instruction.leaves)
    if opcode in ("slice-start", "dynamic-slice-start"):
        result = instruction.leaves[len(operands[0].leaves)]
        return result.hbm + (result.padded if operands[0].array.space == 0 else 0)
    if opcode.endswith("-start"):
        return sum(leaf.hbm for leaf in async_results(instruction)) + sum(o.array.hbm for o in operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        read = instruction.array.padded if operands[0].array.space == 0 else 0
        return written + read + sum(leaf.hbm for o in operands[1:] for leaf in o.leaves)
    if opcode == "dynamic-update-slice":
        update = operands[1].array
        return update.hbm + (update.padded if instruction.array.space == 0 else 0)
    if opcode == "scatter":
        updates = operands[2 * (len(operands) // 3) + 1 :] or operands[2:]
        return sum(2 * leaf.padded for o in updates for leaf in o.leaves if instruction.array.space == 0)
    return written + sum(leaf.hbm for o in operands for leaf in o.leaves)


def _fusion_bytes(module: Module, fusion: Instruction, operands: list[Instruction]) -> int:
    body = module.fusion_body(fusion)
    total = 0
    for parameter, operand in zip(body.parameters, operands, strict=False):
        if operand.array.space == 0:
            total += min(_bytes_read(module, body, parameter), sum(leaf.hbm for leaf in operand.leaves))
    if body.root.target == "AsyncCollectiveStart":
        return total + sum(leaf.hbm for leaf in fusion.leaves[1:])
    results = body.results()
    if len(results) != len(fusion.leaves):
        return total + sum(leaf.hbm for leaf in fusion.leaves)
    for result, leaf in zip(results, fusion.leaves, strict=True):
        result = body.skip_bitcasts(result)
        if leaf.space or result.opcode == "parameter" or _is_free(result, body):
            continue
        if result.opcode == "dynamic-update-slice":
            total += body.operands(result)[1].array.padded
        else:
            total += leaf.hbm
    return total


def _is_free(instruction: Instruction, computation: Computation) -> bool:
    return instruction.target in _FREE_CALLS or continues_collective(instruction, computation)


def _bytes_read(module: Module, body: Computation, source: Instruction) -> int:
    """Bytes of a fusion's parameter that the fusion reads: only the slices, if it slices."""
    total = 0
    for user in body.users.get(source.name, ()):
        if user.opcode in ("tuple", "get-tuple-element") or _is_free(user, body):
            continue
        first = user.operands[0] == source.name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += user.array.padded
        elif user.opcode == "dynamic-update-slice" and first and user.operands.count(source.name) == 1:
            continue
        elif user.opcode == "bitcast" and not user.root:
            total += _bytes_read(module, body, user)
        elif user.opcode == "fusion":
            callee = module.fusion_body(user)
            at = [i for i, name in enumerate(user.operands) if name == source.name]
            total += sum(_bytes_read(module, callee, callee.parameters[i]) for i in at)
        else:
            return sum(leaf.padded for leaf in source.leaves)
    return total
