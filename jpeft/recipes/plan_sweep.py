"""Several plans: what `jpeft plan` does, of one choice or of many."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jpeft.errors import UserError
from jpeft.hardware.topologies import parse
from jpeft.parallel.mesh import abstract_mesh
from jpeft.planning.compiling import Compilation, PlanError, available_memory
from jpeft.planning.plan import Prepared, prepare
from jpeft.planning.result import Plan
from jpeft.recipes import plan_job
from jpeft.recipes.config import CHAT, Config, Setup

_EACH = 3 << 30  # bytes of memory that a compilation is given: one of 405B has taken 2.1 GiB
_TICK = 0.1


@dataclass(frozen=True)
class Choice:
    """What is planned for."""

    config: Config
    topology: str
    mesh: str | None = None
    remat: str | None = None

    def label(self, others: Sequence[Choice] = ()) -> str:
        """What tells it from others; all that it is, where there are none.

        >>> choice = Choice(Config(task="chat"), "v5e:4x4", "fsdp=16")
        >>> choice.label([replace(choice, mesh="fsdp=8,tensor=2")])
        'fsdp=16'
        """

        def words(choice: Choice) -> dict[str, str]:
            config = choice.config
            return {
                "topology": choice.topology, "mesh": choice.mesh or "fsdp", "quantize": config.quantize,
                "batch": f"batch {config.batch_size}", "remat": f"remat {choice.remat or 'none'}",
            }  # fmt: skip

        own = words(self)
        told = [word for name, word in own.items() if not others or any(words(o)[name] != word for o in others)]
        return " ".join(told)


class Outcome(NamedTuple):
    """A choice, and its plan or what stands against it."""

    choice: Choice
    plan: Plan | None
    error: str = ""


def choices(
    config: Config, topologies: Sequence[str], meshes: Sequence[str], batches: Sequence[int],
    remats: Sequence[str | None], schemes: Sequence[str], widen: bool,
) -> list[Choice]:  # fmt: skip
    """All that is to be tried. With `widen`, what was not given (an empty sequence) is tried in several ways."""
    batches = batches or (config.batch_size,)
    schemes = schemes or (("none", "nf4") if widen else (config.quantize,))
    if config.task != CHAT:
        remats = remats or (None,)
    remats = remats or (("full", "dots") if widen else ("full",))
    found = []
    for topology in topologies:
        for mesh in meshes or (_meshes(parse(topology).devices) if widen else (None,)):
            for batch, remat, scheme in itertools.product(batches, remats, schemes):
                changed = replace(config, batch_size=batch, quantize=scheme)
                found.append(Choice(changed, topology, mesh, remat))
    return found


def _meshes(devices: int) -> list[str | None]:
    out: list[str | None] = [f"fsdp={devices}"]
    if devices >= 4 and devices % 2 == 0:
        out += [f"fsdp={devices // 2},tensor=2", f"data=2,fsdp={devices // 2}"]
    return out


def traced(choice: Choice, against_base: bool = True) -> Prepared:
    """A choice's step, ready to be compiled.

    Raises:
        UserError: a mesh, batch or method that does not fit.
    """
    topology = parse(choice.topology)
    mesh = abstract_mesh(choice.mesh, topology.devices, topology.name)
    work = plan_job.build(choice.config, mesh, Setup(remat=choice.remat))
    try:
        return prepare(work.step, work.state, work.params, work.batch, topology, mesh, names=work.names,
                       against_base=against_base)  # fmt: skip
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        told = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise PlanError(f"--mesh {told}: {choice.config.model}: {error}") from error


class _Running(NamedTuple):
    index: int
    prepared: Prepared
    compilations: list[Compilation]
    end: Callable[[], Any]


def run(
    wanted: Sequence[Choice],
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    against_base: bool = False,
) -> list[Outcome]:
    """Plans for all, in their order, several at a time.

    Args:
        jobs: how many compile at once; None is as many as there are cores, while there is memory for them.
        progress: told how many are done, of how many.
    """
    outcomes: dict[int, Outcome] = {}
    queue, running = list(enumerate(wanted)), []
    limit = jobs or os.cpu_count() or 1
    try:
        while queue or running:
            while queue and len(running) < limit and (not running or _room()):
                index, choice = queue.pop(0)
                try:
                    prepared = traced(choice, against_base)
                    running.append(_started(index, prepared))
                except UserError as error:
                    outcomes[index] = Outcome(choice, None, str(error))
            for each in [each for each in running if all(c.done() for c in each.compilations)]:
                running.remove(each)
                outcomes[each.index] = _ended(each, wanted[each.index])
            progress(len(outcomes), len(wanted))
            time.sleep(_TICK)
    finally:
        for each in running:
            each.end()
    return [outcomes[index] for index in range(len(wanted))]


def _room() -> bool:
    free = available_memory()
    return free is None or free > _EACH


def _started(index: int, prepared: Prepared) -> _Running:
    stack = contextlib.ExitStack()
    return _Running(index, prepared, stack.enter_context(prepared.compiling()), stack.close)


def _ended(each: _Running, choice: Choice) -> Outcome:
    try:
        return Outcome(choice, each.prepared.conclude(*each.compilations))
    except UserError as error:
        return Outcome(choice, None, str(error))
    finally:
        each.end()


def cheapest(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those with a plan, by what a token costs at least; those that do not fit come last."""

    def cost(outcome: Outcome) -> tuple[bool, float, int]:
        plan = outcome.plan
        assert plan is not None
        seconds = plan.chip_seconds_per_token()
        dollars = plan.chip.usd_per_chip_hour if plan.chip is not None else None
        return plan.fits is False, math.inf if seconds is None else seconds * (dollars or 1.0), plan.memory.total

    return sorted((o for o in outcomes if o.plan is not None), key=cost)


def left_out(outcomes: Sequence[Outcome]) -> Iterator[tuple[Choice, str]]:
    """Choices that could not be planned for, and why."""
    return ((o.choice, o.error) for o in outcomes if o.plan is None)
