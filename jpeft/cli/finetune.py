"""`jpeft finetune`: a run, new or resumed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.cli.arguments import name_value
from jpeft.cli.terminal import Terminal, print_json
from jpeft.errors import UserError
from jpeft.recipes.assets import CONVERSATIONS, DATA, MODELS
from jpeft.recipes.config import CHAT, CLASSIFY, DEFAULTS, SCHEMES, Config, Setup, flag

SUMMARY = "Fine-tune a classifier (by default MiniLM on reviews) or, with --task chat, a language model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_job(parser)
    _add_method(parser)
    _add_training(parser)
    _add_execution(parser)


def _option(parser: argparse.ArgumentParser, name: str, kind: Any, summary: str) -> None:
    # Absent from the namespace unless given: a resumed run is compared with the given options only.
    parser.add_argument(name, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=summary)


def _default(name: str) -> str:
    """The default of a field of `Config`, by task."""
    values = [DEFAULTS[task][name] for task in (CLASSIFY, CHAT)]
    return f"default: {values[0]}" + (f", with --task {CHAT} {values[1]}" if values[0] != values[1] else "")


def _add_job(parser: argparse.ArgumentParser) -> None:
    models, data = ", ".join(MODELS), ", ".join((*DATA, *CONVERSATIONS))
    _option(parser, "--task", str, f"{CLASSIFY} (default): label texts; {CHAT}: answer in conversations")
    _option(parser, "--model", str, f"{models}, a HuggingFace folder, .gguf file or hub id ({_default('model')})")
    _option(parser, "--data", str, f"{data}, or a .csv, .jsonl or .json file ({_default('data')})")
    _option(parser, "--eval", str, "a .csv, .jsonl or .json file to evaluate on (default: a held-out tenth of --data)")
    _option(parser, "--quantize", str, f"{', '.join(SCHEMES)} or none: quantizes the base ({_default('quantize')})")
    _option(parser, "--dtype", str, "float32 (default), bfloat16 or float16: dtype of base weights and activations")
    parser.add_argument("--resize-embeddings", nargs="?", const=1, type=int, default=argparse.SUPPRESS,
                        metavar="MULTIPLE", help="for tokens that were added to the tokenizer: new rows of the "
                        "embedding and the head, which train; their number is rounded up to MULTIPLE")  # fmt: skip
    parser.add_argument("--untie-head", action="store_true", default=argparse.SUPPRESS,
                        help="gives a head that is tied to the embedding a weight of its own")  # fmt: skip
    _option(parser, "--chat-template", str, "a file with a Jinja template to use instead of the model's chat template")
    _option(parser, "--ignore-keys", str, "keys of conversations that may be left out, such as score,notes")
    _option(parser, "--text", str, "column of the texts (default: text)")
    _option(parser, "--label", str, "column of the labels (default: label)")


def _add_method(parser: argparse.ArgumentParser) -> None:
    _option(parser, "--adapter", str, "begin from an adapter: a run (whose model it also takes), or a folder that "
            "jpeft or PEFT saved; the method is the adapter's")  # fmt: skip
    _option(parser, "--method", str, "lora, bitfit, prefix, bottleneck, ia3, train or full (default: lora)")
    _option(parser, "--rank", int, "rank, for methods that have one (default: 8)")
    _option(parser, "--alpha", float, "numerator of the scale alpha/rank (default: twice the rank)")
    _option(parser, "--dropout", float, "dropout rate on the adapter's input; also enables the model's own dropout "
            "(default: none)")  # fmt: skip
    _option(parser, "--targets", str, "all-linear, names such as query,value, or a regular expression for whole paths")
    parser.add_argument("--set", dest="settings", action="append", type=name_value, default=argparse.SUPPRESS,
                        metavar="NAME=VALUE", help="any other field of the method, e.g. --set length=32")  # fmt: skip


def _add_training(parser: argparse.ArgumentParser) -> None:
    defaults = Config()
    _option(parser, "--lr", float, f"peak learning rate (default: by method, {defaults.rate:g} for lora)")
    _option(parser, "--warmup", float, f"fraction of the steps for warm-up (default: {defaults.warmup:g})")
    _option(parser, "--weight-decay", float, f"(default: {defaults.weight_decay:g})")
    _option(parser, "--epochs", int, f"({_default('epochs')})")
    steps = f"default: all epochs, with --task {CHAT} alone {DEFAULTS[CHAT]['steps']}"
    _option(parser, "--steps", int, f"maximum training steps ({steps})")
    _option(parser, "--batch-size", int, f"texts, or rows of packed conversations ({_default('batch_size')})")
    _option(parser, "--accumulate", int, "gradient accumulation: micro-batches per batch (default: 1)")
    _option(parser, "--max-length", int, f"tokens of a text, or of a row of conversations ({_default('max_length')})")
    parser.add_argument("--no-packing", dest="packed", action="store_false", default=argparse.SUPPRESS,
                        help="one conversation per row, instead of as many as fit")  # fmt: skip
    _option(parser, "--eval-examples", int, f"number of evaluation examples, 0 for all ({_default('eval_examples')})")
    _option(parser, "--eval-every", int, "steps between evaluations (default: only at the end of each epoch)")
    _option(parser, "--keep", str, "last (default), or best: the adapter with the lowest evaluation loss")
    _option(parser, "--samples", int, f"prompts to complete before and after training ({_default('samples')})")
    _option(parser, "--seed", int, f"seed for initialization and data order (default: {defaults.seed})")
    _option(parser, "--checkpoint-every", int, f"steps between checkpoints ({_default('checkpoint_every')})")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="the run folder (default: a new one in runs/)")
    add(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN",
        help="resume RUN, or the run at --out, or the latest in runs/; a larger --steps or --epochs lengthens it: the "
        "learning rate of its remaining steps is then that of a run of the new length, which decays to zero at its end",
    )
    add(
        "--remat",
        choices=("full", "dots", "offload"),
        help="rematerialization in a language model's backward pass: "
        "full recomputes everything, dots all but matrix products, offload everything from inputs kept on the host",
    )
    add("--tensorboard", action="store_true", help="also log to RUN/tensorboard")
    add(
        "--profile",
        type=_profile,
        metavar="STEP[:COUNT]",
        help="trace COUNT steps (default: 3) from STEP on with jax.profiler, to RUN/profile",
    )
    add(
        "--mesh",
        metavar="AXES",
        help="device mesh, such as data=2,fsdp=4,tensor=2 (default: one device; with "
        "--distributed, all devices on fsdp)",
    )
    add(
        "--distributed",
        action="store_true",
        help="run as one of several processes, configured by Cloud TPU, SLURM, "
        "Open MPI or the next three options; --out must be on shared storage",
    )
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=int, metavar="INT", help="number of processes")
    add("--process", type=int, metavar="INT", help="index of this process, from 0")
    add("--join-within", type=float, default=300.0, metavar="SECONDS",
        help="how long to wait for all processes at launch (default: 300)")  # fmt: skip


def _profile(text: str) -> tuple[int, int]:
    first, _, count = text.partition(":")
    if not (first.isdecimal() and (count or "3").isdecimal() and int(first) and int(count or 3)):
        raise argparse.ArgumentTypeError(f"expected STEP or STEP:COUNT, from 1 on, got {text!r}")
    return int(first), int(count or 3)


# --------------------------------------------------------------------------------------------------------- command


def run(args: argparse.Namespace) -> None:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if field.name in args}
    if "settings" in given:
        given["settings"] = dict(given["settings"])
    config = Config(**given)  # reports mistakes before anything heavy is imported
    if config.adapter is not None:
        from jpeft.recipes.start import inherited

        config = Config(**{**inherited(config.adapter), **given})
    out = _run_folder(args)
    joined = args.distributed or any(x is not None for x in (args.coordinator, args.processes, args.process))
    if joined:
        from jpeft.parallel import distributed

        distributed.join(args.coordinator, args.processes, args.process, args.join_within)
        _reserve_stdout()
    from jpeft.parallel import hosts

    mesh = _mesh(args, given, out) if joined or args.mesh is not None else None
    setup = Setup(mesh, ("tensorboard",) if args.tensorboard else (), args.profile, args.remat)
    is_main = hosts.is_main_process()
    with Terminal(to_stderr=args.json, quiet=not is_main) as terminal:
        result = _train(args.resume, out, config, given, terminal, setup)
        if not args.json:
            _show(result, terminal)
    if args.json and is_main:
        print_json(result)


def _run_folder(args: argparse.Namespace) -> Path | None:
    """The folder that --out or --resume names."""
    if not isinstance(args.resume, str):
        return args.out
    if args.out is not None and args.out != Path(args.resume):
        raise UserError(f"--resume {args.resume} and --out {args.out} name two runs; give one")
    return Path(args.resume)


def _mesh(args: argparse.Namespace, given: Mapping[str, Any], out: Path | None) -> Any:
    """The device mesh, once all processes have been found to run with the same options."""
    from jpeft.parallel import hosts
    from jpeft.parallel.mesh import device_mesh

    options = {field.name: given.get(field.name) for field in dataclasses.fields(Config)}
    options |= {"mesh": args.mesh, "out": str(out), "resume": args.resume, "remat": args.remat}
    hosts.check_same({flag(name): repr(value) for name, value in options.items()})
    return device_mesh(args.mesh)


def _train(
    resume: bool | str | None,
    out: Path | None,
    config: Config,
    given: Mapping[str, Any],
    terminal: Terminal,
    setup: Setup,
) -> dict[str, Any]:
    """Starts a run, or resumes the one that is named or the latest. Returns its result."""
    from jpeft.parallel import hosts
    from jpeft.recipes import finetune, run_folder

    if not resume:
        return finetune.finetune(config, out, terminal, setup)
    found = Path(hosts.broadcast(str(out or run_folder.latest_run() or "")))
    if isinstance(resume, str) or (found != Path() and hosts.on_all_hosts(found.exists)):
        return finetune.resume(found, given, terminal, setup)
    # The same command line, repeated, survives a kill at any moment.
    terminal.say("nothing to resume yet: starting")
    return finetune.finetune(config, out, terminal, setup)


def _show(result: Mapping[str, Any], terminal: Terminal) -> None:
    from jpeft.cli.results import format_sample, result_rows

    for sample in result.get("samples", ()):
        terminal.say(format_sample(sample))
    terminal.table(result_rows(result))


def _reserve_stdout() -> None:
    """Keeps stdout for this command's output; what Gloo (CPU collectives) prints there goes to stderr."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")
