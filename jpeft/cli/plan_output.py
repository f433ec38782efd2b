"""The output of `jpeft plan`: text, JSON, a picture, and the `jpeft finetune` command of a plan."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.cli.arguments import flag, parse_value
from jpeft.cli.terminal import print_json
from jpeft.errors import UserError
from jpeft.hardware.topologies import parse
from jpeft.recipes.assets import MODELS
from jpeft.recipes.config import Config
from jpeft.recipes.options import options
from jpeft.storage import as_path

if TYPE_CHECKING:
    from jpeft.recipes.plan_sweep import Choice, Outcome


def show_plan(outcome: Outcome, as_json: bool) -> None:
    """Prints one plan."""
    if as_json:
        print_json(_to_dict(outcome), default=str)
        return
    choice, config = outcome.choice, outcome.choice.config
    print(
        f"{config.model}, {config.method}, {config.batch_size} x {config.max_length:,} tokens, "
        f"quantize {config.quantize}, remat {choice.remat or 'none'}"
    )
    print(outcome.plan)
    print(f"  {_how_to_run(choice)}")


def show_sweep(outcomes: Sequence[Outcome], price: float | None, as_json: bool) -> None:
    """Prints several plans, the cheapest first, and recommends one."""
    from jpeft.recipes.plan_sweep import cheapest_first, failed

    planned = cheapest_first(outcomes)
    best = next((o for o in planned if o.plan is not None and o.plan.fits is not False), None)
    if as_json:
        errors = [{"choice": choice.label(), "error": error} for choice, error in failed(outcomes)]
        plans = [_to_dict(outcome) for outcome in planned]
        print_json({"plans": plans, "failed": errors, "best": best and best.choice.label()}, default=str)
        return
    if not planned:
        raise UserError(f"none of {len(outcomes)} combinations can be planned; the first: {outcomes[0].error}")
    from rich.console import Console

    from jpeft.planning import report

    everyone = [outcome.choice for outcome in outcomes]
    console = Console(highlight=False)
    console.print(report.table([(o.choice.label(everyone), o.plan) for o in planned if o.plan is not None], price))
    lines = [f"left out: {choice.label(everyone)}: {error}" for choice, error in failed(outcomes)]
    if best is None:
        lines.append("none fits: use more chips, --quantize nf4, --accumulate or a smaller --batch")
    else:
        kind = "cheapest that fits" if best.plan is not None and best.plan.fits else "needs the least memory"
        lines += [f"{kind}: {best.choice.label()}", _how_to_run(best.choice)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def draw(outcomes: Sequence[Outcome], path: Path | None) -> None:
    """Draws the plans, the cheapest first. Does nothing without a path or without a plan."""
    from jpeft.planning import report
    from jpeft.recipes.plan_sweep import cheapest_first

    planned = cheapest_first(outcomes)
    if path is None or not planned:
        return
    others = [outcome.choice for outcome in planned] if len(planned) > 1 else []
    report.picture([(o.choice.label(others), o.plan) for o in planned if o.plan is not None], path)


def _to_dict(outcome: Outcome) -> dict[str, Any]:
    choice, plan = outcome.choice, outcome.plan
    assert plan is not None
    config = {name: value for name, value in dataclasses.asdict(choice.config).items() if value is not None}
    cost = {"usd_per_million_tokens": plan.usd_per_million_tokens()}
    return {"choice": choice.label(), "config": config, "remat": choice.remat, **plan.to_dict(), **cost}


def _how_to_run(choice: Choice) -> str:
    model = choice.config.model
    has_weights = model in MODELS or as_path(model).is_dir()
    hint = "" if has_weights else f", with a folder of weights in place of {model}"
    return f"to run it{hint}: {command_of(choice)} --data …"


def command_of(choice: Choice) -> str:
    """The `jpeft finetune` command that a choice plans, except its data.

    >>> from jpeft.recipes.plan_sweep import Choice
    >>> command_of(Choice(Config(task="chat", model="llama-3-8b", batch_size=16), "v5e:4x4", "fsdp=16", "full"))
    'jpeft finetune --task chat --model llama-3-8b --batch-size 16 --remat full --distributed --mesh fsdp=16'
    """
    config, defaults = choice.config, Config(task=choice.config.task)
    words = ["jpeft", "finetune", "--task", config.task]
    for name, entry in options(Config).items():
        value = getattr(config, name)
        if name not in ("task", "settings", "steps") and value not in (None, getattr(defaults, name)):
            words += [f"{flag(entry)}={str(value).lower()}"] if entry.type is bool else [flag(entry), str(value)]
    for name, value in config.settings.items():
        is_plain = isinstance(value, str) and parse_value(value) == value
        words += ["--set", f"{name}={value if is_plain else json.dumps(value)}"]
    words += [] if choice.remat is None else ["--remat", choice.remat]
    topology = parse(choice.topology)
    if topology.kind == "tpu":  # CPU and GPU topologies are this host's own devices
        words.append("--distributed")
    if choice.mesh is not None or topology.kind != "tpu":
        words += ["--mesh", choice.mesh or f"fsdp={topology.devices}"]
    return shlex.join(words)
