"""Plans for one choice or many (`jpeft plan`), several compilations at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jpeft.errors import PlanError, UserError
from jpeft.hardware.topologies import parse
from jpeft.parallel.mesh import abstract_mesh, format_axes
from jpeft.planning.compiling import Compilation, available_memory
from jpeft.planning.plan import Prepared, prepare
from jpeft.planning.result import Plan
from jpeft.recipes import plan_job, tasks
from jpeft.recipes.config import Config, Setup

_MEMORY_PER_JOB = 3 << 30  # bytes that must be free to start another compilation: one of a 405B model took 2.1 GiB
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Choice:
    """A configuration and the hardware to plan it for.

    Attributes:
        config: the configuration.
        topology: such as `v5e:4x4`.
        mesh: such as `fsdp=8,tensor=2`; None is one axis, `fsdp`.
        remat: rematerialization of a language model's backward pass.
    """

    config: Config
    topology: str
    mesh: str | None = None
    remat: str | None = None

    def label(self, others: Sequence[Choice] = ()) -> str:
        """The properties that differ among this choice and others; all of them if there are no others.

        >>> choice = Choice(Config(task="chat"), "v5e:4x4", "fsdp=16")
        >>> choice.label([replace(choice, mesh="fsdp=8,tensor=2")])
        'fsdp=16'
        """
        own, rest = self._words(), [other._words() for other in others]
        return " ".join(word for name, word in own.items() if not rest or any(each[name] != word for each in rest))

    def _words(self) -> dict[str, str]:
        return {
            "topology": self.topology,
            "mesh": self.mesh or "fsdp",
            "quantize": self.config.quantize,
            "batch": f"batch {self.config.batch_size}",
            "remat": f"remat {self.remat or 'none'}",
        }


class Outcome(NamedTuple):
    """A choice with its plan, or with the error that prevents one."""

    choice: Choice
    plan: Plan | None
    error: str = ""


@dataclass(frozen=True)
class Grid:
    """The values to combine; an empty sequence is one default, or with `widen` several values.

    Attributes:
        topologies: at least one.
        meshes: such as `fsdp=8,tensor=2`.
        batch_sizes: rows per step.
        remats: None is no rematerialization.
        quantize: schemes, or `none`.
        widen: tries several values of whatever is not given, except the batch size.
    """

    topologies: Sequence[str]
    meshes: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()
    remats: Sequence[str | None] = ()
    quantize: Sequence[str] = ()
    widen: bool = False

    def choices(self, config: Config) -> list[Choice]:
        """All combinations, with the other fields from a configuration.

        >>> [choice.mesh for choice in Grid(["cpu:2"], ["fsdp=2", "tensor=2"]).choices(Config(task="chat"))]
        ['fsdp=2', 'tensor=2']
        """
        remats = tasks.find(config.task).REMATS
        remats = self.remats or (remats if self.widen else remats[:1])
        schemes = self.quantize or (("none", "nf4") if self.widen else (config.quantize,))
        batch_sizes = self.batch_sizes or (config.batch_size,)
        return [
            Choice(replace(config, batch_size=batch, quantize=scheme), topology, mesh, remat)
            for topology in self.topologies
            for mesh in self.meshes or (_common_meshes(parse(topology).devices) if self.widen else (None,))
            for batch, remat, scheme in itertools.product(batch_sizes, remats, schemes)
        ]


def _common_meshes(devices: int) -> list[str]:
    out = [f"fsdp={devices}"]
    if devices >= 4 and devices % 2 == 0:
        out += [f"fsdp={devices // 2},tensor=2", f"data=2,fsdp={devices // 2}"]
    return out


def trace(choice: Choice, against_base: bool = True) -> Prepared:
    """Traces a choice's training step, ready to compile.

    Raises:
        UserError: the mesh, batch size or method does not suit the model.
    """
    topology = parse(choice.topology)
    mesh = abstract_mesh(choice.mesh, topology.devices, topology.name)
    work = plan_job.build(choice.config, mesh, Setup(remat=choice.remat))
    inputs = work.state, work.params, work.batch
    try:
        return prepare(work.step, inputs, topology, mesh, names=work.names, against_base=against_base)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise PlanError(f"`mesh` {format_axes(mesh.shape)}: {choice.config.model}: {error}") from error


class _Running(NamedTuple):
    index: int
    prepared: Prepared
    compilations: list[Compilation]
    end: Callable[[], Any]


def run(
    choices: Sequence[Choice],
    jobs: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    against_base: bool = False,
) -> list[Outcome]:
    """Plans all choices, several at a time, and returns the outcomes in their order.

    Args:
        jobs: compilations at a time; None is the number of cores, as far as memory allows.
        progress: receives the number of choices that are done.
        against_base: also find the adapter's share of the traffic, see `jpeft.plan`.
    """
    outcomes: dict[int, Outcome] = {}
    queue, running = list(enumerate(choices)), []
    limit = jobs or os.cpu_count() or 1
    try:
        while queue or running:
            while queue and len(running) < limit and (not running or _has_memory()):
                index, choice = queue.pop(0)
                try:
                    running.append(_start(index, trace(choice, against_base)))
                except UserError as error:
                    outcomes[index] = Outcome(choice, None, str(error))
            for each in [each for each in running if all(c.done() for c in each.compilations)]:
                running.remove(each)
                outcomes[each.index] = _conclude(each, choices[each.index])
            progress(len(outcomes))
            time.sleep(_POLL_SECONDS)
    finally:
        for each in running:
            each.end()
    return [outcomes[index] for index in range(len(choices))]


def _has_memory() -> bool:
    free = available_memory()
    return free is None or free > _MEMORY_PER_JOB


def _start(index: int, prepared: Prepared) -> _Running:
    stack = contextlib.ExitStack()
    return _Running(index, prepared, stack.enter_context(prepared.compiling()), stack.close)


def _conclude(running: _Running, choice: Choice) -> Outcome:
    try:
        return Outcome(choice, running.prepared.conclude(*running.compilations))
    except UserError as error:
        return Outcome(choice, None, str(error))
    finally:
        running.end()


def cheapest_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with a plan, by the lower bound of a token's cost; those that do not fit come last."""

    def cost(outcome: Outcome) -> tuple[bool, float, int]:
        plan = outcome.plan
        assert plan is not None
        seconds = plan.chip_seconds_per_token()
        dollars = plan.chip.usd_per_chip_hour if plan.chip is not None else None
        return plan.fits is False, math.inf if seconds is None else seconds * (dollars or 1.0), plan.memory.total

    return sorted((o for o in outcomes if o.plan is not None), key=cost)


def failed(outcomes: Sequence[Outcome]) -> Iterator[tuple[Choice, str]]:
    """The choices that cannot be planned, and why."""
    return ((o.choice, o.error) for o in outcomes if o.plan is None)
