"""Run counts of a program's computations: a loop's body counts once per trip."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from jpeft.planning.hlo.parse import Instruction, Module
from jpeft.planning.hlo.scalars import Frame, UnknownValue, Value, evaluate, loop_invariant, opaque, trip_count


class Runs:
    """Runs of each computation in one run of a program.

    Attributes:
      counts: runs by name of the computation.
      counts_once: the same with every loop's body counted once, as XLA's ``cost_analysis`` counts.
      trips: trip counts of the loops that run.
      unknown_loops: loops whose trip count the text does not determine; they count once.

    Args:
      cost: ranks the branches of a conditional, which counts as its most expensive branch.
    """

    def __init__(self, module: Module, cost: Callable[[Counter[str]], Any]):
        self._module, self._cost = module, cost
        self.trips: dict[str, int] = {}
        self.unknown_loops: list[str] = []
        self.counts = self._count(opaque(module.entry), self._trips)
        self.counts_once = self._count(opaque(module.entry), lambda loop, init: 1)

    def _count(self, frame: Frame, trips_of: Callable[[Instruction, Value], int]) -> Counter[str]:
        """Runs of each computation in one run of `frame`, itself included."""
        computations = self._module.computations
        own = Counter({frame.computation.name: 1})
        for instruction in frame.computation.instructions.values():
            if instruction.opcode == "while":
                init = functools.partial(evaluate, self._module, frame, instruction.operands[0])
                trips = trips_of(instruction, init)
                body = computations[instruction.attribute("body")]
                inside = Frame(body, [functools.partial(loop_invariant, body, init)])
                own.update({name: n * trips for name, n in self._count(inside, trips_of).items()})
                own[instruction.attribute("condition")] += trips + 1
            elif instruction.opcode == "conditional":
                branches = [self._count(opaque(computations[name]), trips_of) for name in instruction.branches]
                own.update(max(branches, key=self._cost))
            else:
                for name in self._module.callees(instruction):
                    own.update(self._count(opaque(computations[name]), trips_of))
        return own

    def _trips(self, loop: Instruction, init: Value) -> int:
        try:
            trips = trip_count(self._module, loop, init)
        except (UnknownValue, RecursionError):
            trips = 1
            if loop.name not in self.unknown_loops:
                self.unknown_loops.append(loop.name)
        self.trips[loop.name] = trips
        return trips
