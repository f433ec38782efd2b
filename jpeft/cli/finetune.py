"""jpeft.cli.finetune."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from jpeft.cli.terminal import Terminal, format_sample, result_rows, setting
from jpeft.errors import UserError
from jpeft.recipes.assets import CONVERSATIONS, DATA, MODELS
from jpeft.recipes.config import CHAT, CLASSIFY, DEFAULTS, SCHEMES, Config, Setup, flag

SUMMARY = "Fine-tune a classifier (without arguments: MiniLM on reviews) or, with --task chat, a language model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Config()

    def option(name: str, kind: Any, summary: str) -> None:
        # Suppressed where not given: a resumed run is compared with what was typed alone.
        parser.add_argument(name, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=summary)

    def by_task(name: str) -> str:
        values = [DEFAULTS[task][name] for task in (CLASSIFY, CHAT)]
        return f"default: {values[0]}" + (f", with --task {CHAT} {values[1]}" if values[0] != values[1] else "")

    option("--task", str, f"{CLASSIFY} (default): label texts; {CHAT}: answer in conversations")
    option("--model", str, f"{', '.join(MODELS)}, a HuggingFace folder, .gguf file or hub id ({by_task('model')})")
    option("--data", str, f"{', '.join((*DATA, *CONVERSATIONS))}, or a .csv or .jsonl file ({by_task('data')})")
    option("--eval", str, "a .csv or .jsonl file to evaluate on (default: a tenth of --data is held out)")
    option("--quantize", str, f"{', '.join(SCHEMES)} or none: how the base is held ({by_task('quantize')})")
    option("--dtype", str, "float32 (default), bfloat16 or float16: what the base is held and computed in")
    option("--text", str, "column of the texts (default: text)")
    option("--label", str, "column of the labels (default: label)")
    option("--method", str, "lora, bitfit, prefix, bottleneck, ia3, train or full (default: lora)")
    option("--rank", int, "rank, for methods that have one (default: 8)")
    option("--alpha", float, "numerator of the scale alpha/rank (default: twice the rank)")
    option("--dropout", float, "rate on the adapter's input; also turns the model's own dropout on (default: none)")
    option("--targets", str, "all-linear, names like query,value, or a regular expression over whole paths")
    parser.add_argument("--set", dest="settings", action="append", type=setting, default=argparse.SUPPRESS,
                        metavar="NAME=VALUE", help="any other field of the method, e.g. --set length=32")  # fmt: skip
    option("--lr", float, f"peak learning rate (default: by method, {defaults.rate:g} for lora)")
    option("--warmup", float, f"share of the steps that warm up (default: {defaults.warmup:g})")
    option("--weight-decay", float, f"(default: {defaults.weight_decay:g})")
    option("--epochs", int, f"({by_task('epochs')})")
    option("--steps", int, f"stop after so many (default: all, with --task {CHAT} alone {DEFAULTS[CHAT]['steps']})")
    option("--batch-size", int, f"texts, or rows of conversations ({by_task('batch_size')})")
    option("--accumulate", int, "micro-batches that a batch is split into, to need less memory (default: 1)")
    option("--max-length", int, f"tokens kept of a text, or in a row of conversations ({by_task('max_length')})")
    parser.add_argument("--no-packing", dest="packed", action="store_false", default=argparse.SUPPRESS,
                        help="a row for each conversation, instead of as many as fit")  # fmt: skip
    option("--eval-examples", int, f"how many to evaluate on, 0 for all ({by_task('eval_examples')})")
    option("--eval-every", int, "steps between evaluations (default: those at the end of each epoch alone)")
    option("--keep", str, "last (default), or best: the adapter of the evaluation with the least loss")
    option("--samples", int, f"prompts to answer before and after ({by_task('samples')})")
    option("--seed", int, f"of the head, the adapter and the order of the data (default: {defaults.seed})")
    option("--checkpoint-every", int, f"steps between checkpoints ({by_task('checkpoint_every')})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: a new one below runs/)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN",
                        help="continue RUN, or the run at --out, or the latest below runs/")  # fmt: skip
    parser.add_argument("--remat", choices=("full", "dots", "offload"), help="what a language model's backward pass "
                        "computes again: all, all but products, or all from what the host keeps")  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", help="also log to RUN/tensorboard")
    parser.add_argument("--profile", type=_profile, metavar="STEP[:COUNT]",
                        help="trace COUNT steps (3) from STEP on with jax.profiler, to RUN/profile")  # fmt: skip
    parser.add_argument("--mesh", metavar="AXES", help="devices to train on, by axis: data=2,fsdp=4,tensor=2 (default: "
                        "one device; with --distributed, all on fsdp)")  # fmt: skip
    parser.add_argument("--distributed", action="store_true", help="one of several processes, as Cloud TPU, SLURM or "
                        "Open MPI say, or the next three; --out is on storage that all share")  # fmt: skip
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    parser.add_argument("--processes", type=int, metavar="INT", help="how many there are")
    parser.add_argument("--process", type=int, metavar="INT", help="which this is, from 0")
    parser.add_argument("--join-within", type=float, default=300.0, metavar="SECONDS",
                        help="how long to wait for all of them at the start (default: 300)")  # fmt: skip


def _profile(text: str) -> tuple[int, int]:
    first, _, count = text.partition(":")
    if not (first.isdecimal() and (count or "3").isdecimal() and int(first) and int(count or 3)):
        raise argparse.ArgumentTypeError(f"expected STEP or STEP:COUNT, from 1 on, got {text!r}")
    return int(first), int(count or 3)


# --------------------------------------------------------------------------------------------------------- commands


def run(args: argparse.Namespace) -> None:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if field.name in args}
    if "settings" in given:
        given["settings"] = dict(given["settings"])
    fresh = Config(**given)  # its mistakes are told before anything heavy is imported
    run, out = args.resume, args.out
    if isinstance(run, str):
        if out is not None and out != Path(run):
            raise UserError(f"--resume {run} and --out {out} name two runs; give one")
        out = Path(run)
    several = args.distributed or any(x is not None for x in (args.coordinator, args.processes, args.process))
    if several:
        from jpeft.parallel import distributed
        from jpeft.parallel.mesh import device_mesh

        distributed.join(args.coordinator, args.processes, args.process, args.join_within)
        _keep_stdout()
    from jpeft.parallel import hosts
    from jpeft.recipes import finetune, run_folder

    mesh = None
    if several or args.mesh is not None:
        from jpeft.parallel import distributed
        from jpeft.parallel.mesh import device_mesh

        asked = {field.name: given.get(field.name) for field in dataclasses.fields(Config)}
        asked |= {"mesh": args.mesh, "out": str(out), "resume": run, "remat": args.remat}
        hosts.check_same({flag(name): repr(value) for name, value in asked.items()})
        mesh = device_mesh(args.mesh)
    setup = Setup(mesh, args.tensorboard, args.profile, args.remat)
    with Terminal(to_stderr=args.json, quiet=not hosts.is_main_process()) as terminal:
        found = Path(hosts.broadcast(str(out or run_folder.latest_run() or ""))) if run else Path()
        if isinstance(run, str) or (run and found != Path() and hosts.on_all_hosts(found.exists)):
            result = finetune.resume(found, given, terminal, setup)
        else:
            if run:  # so that one command line, repeated, survives a kill at any moment
                terminal.say("nothing to resume yet: starting")
            result = finetune.finetune(fresh, out, terminal, setup)
        if not args.json:
            for sample in result.get("samples", ()):
                terminal.say(format_sample(sample))
            terminal.table(result_rows(result))
    if args.json and hosts.is_main_process():
        print(json.dumps(result, ensure_ascii=False))


def _keep_stdout() -> None:
    """stdout for what is printed here: Gloo, which connects CPU processes, says on it who came. That is stderr's."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")
