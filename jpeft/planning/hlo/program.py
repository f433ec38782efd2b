"""Facts about a compiled program, read from its text: FLOPs, bytes, collectives, and the buffers at peak memory.

The text is one device's program, optimized and scheduled, as ``jax.jit(f).lower(...).compile().as_text()`` returns it
for CPUs, GPUs and TPUs, also for TPUs that are not attached. XLA's own ``cost_analysis`` counts a loop's body once;
here it counts as often as it runs. Nothing is executed, and jax is not imported.

    program = read(compiled.as_text())
    program.flops, program.hbm_bytes
    [c for c in program.collectives if c.kind == "all-gather"]
    program.live(10)
"""

from __future__ import annotations

import functools
from collections import Counter

from jpeft.planning.hlo.collectives import Collective, find_collectives
from jpeft.planning.hlo.flops import computation_flops
from jpeft.planning.hlo.hbm import computation_bytes
from jpeft.planning.hlo.liveness import Buffer, Peak, argument_buffers, find_peak, output_buffers
from jpeft.planning.hlo.parse import Module, read_module
from jpeft.planning.hlo.runs import Runs


def read(text: str) -> Program:
    """Reads a program.

    Args:
      text: the result of ``compiled.as_text()``.

    Raises:
      ValueError: it is not optimized HLO.

    >>> program = read('''HloModule f, is_scheduled=true
    ... ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
    ...   %x = f32[8,4]{1,0} parameter(0)
    ...   %w = f32[4,2]{1,0} parameter(1)
    ...   ROOT %dot = f32[8,2]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }''')
    >>> program.flops, program.hbm_bytes
    (128.0, 224.0)
    """
    return Program(read_module(text))


class Program:
    """The FLOPs, bytes, collectives and memory of one run of a program on one device.

    Attributes:
      trips: trip counts of the loops that run, by name.
      unknown_loops: loops whose trip count the text does not determine; they count once.
    """

    def __init__(self, module: Module):
        self._module = module
        self._runs = Runs(module, lambda counts: (self._flops(counts), self._bytes(counts)))
        self.trips, self.unknown_loops = self._runs.trips, self._runs.unknown_loops

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of dots and convolutions, two per multiply-add."""
        return self._flops(self._runs.counts)

    @functools.cached_property
    def flops_once(self) -> float:
        """The same with every loop's body counted once, as XLA's ``cost_analysis`` counts."""
        return self._flops(self._runs.counts_once)

    def _flops(self, counts: Counter[str]) -> float:
        return float(sum(n * self._own_flops(name) for name, n in counts.items()))

    @functools.cache  # noqa: B019  # as long as the program lives
    def _own_flops(self, name: str) -> int:
        return computation_flops(self._module.computations[name])

    @functools.cached_property
    def hbm_bytes(self) -> float:
        """Bytes read from and written to main memory by every instruction outside fusions, and by the fusions."""
        return self._bytes(self._runs.counts)

    def _bytes(self, counts: Counter[str]) -> float:
        return float(sum(n * self._own_bytes(name) for name, n in counts.items() if name not in self._module.fused))

    @functools.cache  # noqa: B019
    def _own_bytes(self, name: str) -> int:
        return computation_bytes(self._module, self._module.computations[name])

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives that run, in the order of the text. One that spans several fusions counts where it starts."""
        return find_collectives(self._module, self._runs.counts)

    @functools.cached_property
    def parameters(self) -> list[tuple[str, int]]:
        """The program's arguments: their names, and the bytes that a device holds of each."""
        return [(p.op_name or p.name, sum(leaf.hbm for leaf in p.leaves)) for p in self._module.entry.parameters]

    @functools.cached_property
    def peak_bytes(self) -> int:
        """Peak bytes of what the program allocates besides its arguments and results.

        Together with the arguments and the results that take no argument's place, this is what the TPU compiler
        compares with a chip's memory, to within 1 %. The temporaries that ``memory_analysis`` reports may be half as
        large again: XLA packs only as tightly as it has to.
        """
        return self._peak[0]

    def live(self, n: int | None = None, *, arguments: bool = False) -> list[Buffer]:
        """The buffers in main memory at the peak, the largest first.

        Args:
          n: how many kinds; None returns all.
          arguments: also the program's arguments, and results that do not reuse an argument's memory.
        """
        found = list(self._peak[1])
        if arguments:
            found += argument_buffers(self._module) + output_buffers(self._module)
        merged = [buffer._replace(count=count) for buffer, count in Counter(found).items()]
        return sorted(merged, key=lambda b: -b.bytes * b.count)[:n]

    @functools.cached_property
    def _peak(self) -> Peak:
        return find_peak(self._module)
