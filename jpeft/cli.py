"""The command line: `jpeft finetune | plan | predict | merge | inspect | generate | chat | quantize`.

Results go to stdout, errors to stderr as one line. Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jpeft.assets import CONVERSATIONS, DATA, MODELS, UserError
from jpeft.config import CHAT, CLASSIFY, DEFAULTS, SCHEMES, Config, Interrupted, Setup, flag

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_EXTRAS = {"orbax", "tokenizers", "jinja2", "gguf", "rich", "matplotlib", "flatbuffers"}  # what the extra [demo] brings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    >>> main(["inspect", "runs/minilm-lora-1"])  # doctest: +SKIP
    """
    status = _run(_parser().parse_args(arguments))
    if status and (distributed := sys.modules.get("jpeft.distributed")) is not None:
        distributed.leave(status)
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        with _terminable():
            args.run_command(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        return _fail("interrupted; nothing was left half-written", 128 + (stop.args[0] if stop.args else signal.SIGINT))
    except BrokenPipeError:  # the reader of a pipe had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message, status = _explain(error)
        return status if _told_elsewhere(error) else _fail(message, status)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill is a Ctrl-C that says which signal it was."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _told_elsewhere(error: Exception) -> bool:
    """Whether process 0 of several says what this process would."""
    hosts = sys.modules.get("jpeft.hosts")
    if hosts is None or hosts.leads():
        return False
    return isinstance(error, (Interrupted, hosts.HostError)) or getattr(error, "told", False)


def _explain(error: Exception) -> tuple[str, int]:
    """An error in words, and the exit status for it."""
    if isinstance(error, Interrupted):
        saved = f"saved up to step {error.step}" if error.step else "before its first checkpoint"
        return f"stopped, {saved}; continue with: jpeft finetune --out {error.run} --resume", 128 + error.number
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        return f'this command needs {error.name}: pip install "jpeft[demo]"', 1
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorboardX":
        return '--tensorboard needs tensorboardX: pip install "jpeft[tensorboard]"', 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, OSError) or (isinstance(error, ValueError) and type(error) is not ValueError):
        return str(error), 1
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return f"out of memory ({str(error)[:120]}); a smaller --batch-size, --max-length or --rank needs less", 1
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1


def _fail(message: str, status: int) -> int:
    print(f"jpeft: error: {' '.join(message.split())}", file=sys.stderr)
    return status


# -------------------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, where argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jpeft: error: {message} ({self.prog} --help lists what there is)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jpeft", description="Parameter-efficient fine-tuning for JAX and Flax.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[common], help=summary, description=summary)
        made.set_defaults(run_command=run)
        return made

    about = "Fine-tune a classifier (without arguments, MiniLM on reviews) or, with --task chat, a language model."
    _finetune_arguments(command("finetune", _finetune, about))
    plan = command(
        "plan", _plan, "Say what a fine-tuning step needs of chips that are not here: memory, time, traffic."
    )
    _plan_arguments(plan)
    predict = command("predict", _predict, "Label texts with a finished run.")
    predict.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    predict.add_argument("file", metavar="FILE", nargs="?", help=".csv or .jsonl; else texts on stdin, one a line")
    predict.add_argument("--text-arg", action="append", metavar="TEXT", help="a text to label; may be repeated")
    predict.add_argument("--text", metavar="COLUMN", help="FILE's column of texts (default: the one trained on)")
    merge = command("merge", _merge, "Write a HuggingFace folder with the adapter merged into the model.")
    merge.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    merge.add_argument("out", metavar="OUT", type=Path, help="the folder to write, which must not exist")
    merge.add_argument(
        "--requantize",
        action="store_true",
        help="merge into the unquantised model, and quantise the result as the base was; codes that came without one "
        "are quantised again, which rounds small changes away",
    )
    generate = command("generate", _generate, "Let a language model go on from a prompt, in its own chat template.")
    _speaker_arguments(generate)
    generate.add_argument("prompts", metavar="PROMPT", nargs="*", help="several are a batch; without any, stdin is one")
    generate.add_argument("--raw", action="store_true", help="go on from the text itself, without a chat template")
    generate.add_argument("--messages", metavar="FILE", help='a JSON list of {"role", "content"} instead; - is stdin')
    talk = command("chat", _chat, "Talk with a language model: a line from stdin is a turn, Ctrl-D ends it.")
    talk.add_argument("adapter", metavar="RUN", nargs="?", default=argparse.SUPPRESS, help="a run to talk with")
    _speaker_arguments(talk)
    quantize = command("quantize", _quantize, "Write a HuggingFace folder with a model's linear layers quantised.")
    quantize.add_argument("model", metavar="MODEL", help="as for generate: a name, a folder, .gguf or hub id")
    quantize.add_argument("out", metavar="OUT", type=Path, help="the folder to write, which must not exist")
    quantize.add_argument("--scheme", choices=SCHEMES, default="nf4",
                          help="nf4 (default; transformers reads it too), int4, int8 or fp8")  # fmt: skip
    quantize.add_argument("--block", type=int, default=64, metavar="INT", help="weights to a scale (default: 64)")
    quantize.add_argument("--no-double", action="store_true", help="keep the scales in float32")
    quantize.add_argument("--targets", metavar="STR",
                          help="names like q_proj, or a regular expression (default: all linear layers)")  # fmt: skip
    quantize.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                          help="that the weights are read in, and that the others stay in")  # fmt: skip
    inspect = command("inspect", _inspect, "Say what a run or an adapter is; needs no model.")
    inspect.add_argument("path", metavar="RUN|ADAPTER", type=Path)
    return parser


def _finetune_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--set", dest="settings", action="append", type=_setting, default=argparse.SUPPRESS,
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


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    several = "; with --sweep several, or tried in several ways if not given"
    words = lambda text: [word.strip() for word in text.split(",") if word.strip()]  # noqa: E731
    parser.add_argument("--model", required=True, help="a size that jpeft knows, such as llama-3-8b, a config.json, a "
                        "folder that has one, or as for finetune; weights are not read")  # fmt: skip
    parser.add_argument("--topology", required=True, type=words, metavar="NAME", help="v5e:4x4, v5p:2x2x4, v6e-16, …, "
                        "cpu:8 or gpu:1; with --sweep several, with commas")  # fmt: skip
    parser.add_argument("--mesh", action="append", default=[], metavar="AXES",
                        help=f"devices by axis, fsdp=8,tensor=2 (all on fsdp); may be repeated{several}")  # fmt: skip
    parser.add_argument("--batch", "--batch-size", type=_counts, default=[], metavar="INT", help=f"rows (16){several}")
    parser.add_argument("--seq", "--max-length", type=int, default=2048, metavar="INT", help="tokens of a row (2048)")
    parser.add_argument("--remat", type=_choices("full", "dots", "offload", "none"), default=[],
                        help=f"as for finetune (full){several}")  # fmt: skip
    parser.add_argument("--quantize", type=_choices("none", *SCHEMES), default=[], metavar="SCHEME",
                        help=f"none (default), {', '.join(SCHEMES)}{several}")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16",
                        help="of the base and the arithmetic (default: bfloat16)")  # fmt: skip
    parser.add_argument("--accumulate", type=int, default=1, metavar="INT", help="micro-batches of a batch (1)")
    parser.add_argument("--task", choices=(CHAT, CLASSIFY), default=CHAT, help=f"of the step (default: {CHAT})")
    parser.add_argument("--method", default="lora", help="as for finetune (default: lora)")
    for name, kind in (("--rank", int), ("--alpha", float), ("--dropout", float), ("--targets", str)):
        parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), help="as for finetune")
    parser.add_argument("--set", dest="settings", action="append", type=_setting, default=[], metavar="NAME=VALUE",
                        help="any other field of the method")  # fmt: skip
    parser.add_argument("--no-base", action="store_true", help="do not also compile the step without an adapter, which "
                        "tells what the adapter sends")  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="plan for all choices, and recommend the cheapest")
    parser.add_argument(
        "--jobs", type=int, metavar="INT", help="that compile at once (default: as cores and memory allow)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of a chip-hour (default: the list price)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the memory of a chip (--sweep: plan.png)")


def _choices(*known: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",")]
        if wrong := [word for word in found if word not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return found

    return read


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"expected counts, from 1 on, with commas between them, got {text!r}")
    return [int(word) for word in words]


def _speaker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="smollm2 (default, or the run's), a HuggingFace folder, .gguf or hub id")
    parser.add_argument("--adapter", metavar="RUN", help="a run, or an adapter's folder (jpeft's or PEFT's)")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--max-new-tokens", type=int, metavar="INT",
                        help="(default: 256, or what is left of the context)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, metavar="FLOAT", help="0 (default): no chance")
    parser.add_argument("--top-k", type=int, metavar="INT", help="draw from the so many likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="FLOAT", help="draw from the likeliest that make up this share")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of what is drawn (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights and the arithmetic (default: float32)")  # fmt: skip


def _profile(text: str) -> tuple[int, int]:
    first, _, count = text.partition(":")
    if not (first.isdecimal() and (count or "3").isdecimal() and int(first) and int(count or 3)):
        raise argparse.ArgumentTypeError(f"expected STEP or STEP:COUNT, from 1 on, got {text!r}")
    return int(first), int(count or 3)


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# --------------------------------------------------------------------------------------------------------- commands


def _finetune(args: argparse.Namespace) -> None:
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
        from jpeft import distributed

        distributed.join(args.coordinator, args.processes, args.process, args.join_within)
        _keep_stdout()
    from jpeft import finetune, hosts, runs

    mesh = None
    if several or args.mesh is not None:
        from jpeft import distributed

        asked = {field.name: given.get(field.name) for field in dataclasses.fields(Config)}
        asked |= {"mesh": args.mesh, "out": str(out), "resume": run, "remat": args.remat}
        hosts.check_same({flag(name): repr(value) for name, value in asked.items()})
        mesh = distributed.mesh_of(args.mesh)
    setup = Setup(mesh, args.tensorboard, args.profile, args.remat)
    with _Terminal(to_stderr=args.json, quiet=not hosts.leads()) as terminal:
        found = Path(hosts.from_leader(str(out or runs.latest_run() or ""))) if run else Path()
        if isinstance(run, str) or (run and found != Path() and hosts.together(found.exists)):
            result = finetune.resume(found, given, terminal, setup)
        else:
            if run:  # so that one command line, repeated, survives a kill at any moment
                terminal.say("nothing to resume yet: starting")
            result = finetune.finetune(fresh, out, terminal, setup)
        if not args.json:
            for sample in result.get("samples", ()):
                terminal.say(_sample(sample))
            terminal.table(_rows(result))
    if args.json and hosts.leads():
        print(json.dumps(result, ensure_ascii=False))


def _plan(args: argparse.Namespace) -> None:
    from jpeft.planning import command

    command.run(args)


def _keep_stdout() -> None:
    """stdout for what is printed here: Gloo, which connects CPU processes, says on it who came. That is stderr's."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")


def _predict(args: argparse.Namespace) -> None:
    from jpeft import data, runs

    if args.text_arg and args.file:
        raise UserError("give texts by --text-arg or a FILE, not both")
    run = runs.open_run(args.run)
    if args.text_arg:
        texts: Sequence[str] = args.text_arg
    elif args.file:
        texts = data.read(args.file, args.text or run.record["columns"]["text"]).texts
    else:
        texts = _stdin_texts()
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise UserError(f"text {empty[0]} is empty")
    found = run.predict(texts)
    if args.json:
        rows = [{"text": text, "label": label, "probability": p} for text, (label, p) in zip(texts, found, strict=True)]
        print(json.dumps({"predictions": rows}, ensure_ascii=False))
        return
    for text, (label, probability) in zip(texts, found, strict=True):
        print(f"{label}\t{probability:.4f}\t{' '.join(text.split())[:100]}")


def _stdin_texts() -> list[str]:
    if sys.stdin.isatty():
        raise UserError("no texts: give --text-arg TEXT, a FILE, or texts on stdin, one a line")
    try:
        lines = sys.stdin.buffer.read().decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8: byte offset {error.start}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError("no texts on stdin; expected one a line")
    return texts


def _merge(args: argparse.Namespace) -> None:
    from jpeft import runs

    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    record = runs.read_record(args.run)
    chat = Config(**record["config"]).task == CHAT
    if args.requantize and not chat:
        raise UserError("--requantize: a classifier's folder holds plain weights")
    if chat:
        from jpeft import talk

        talk.export(args.run, args.out, args.requantize)
    else:
        runs.open_run(args.run).export(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    if args.json:
        print(json.dumps({"folder": str(args.out), "bytes": size}))
    else:
        how = f"jpeft chat --model {args.out}" if chat else "its README.md shows how to load it with the head"
        print(f"{args.out}: {_bytes(size)}, a HuggingFace folder; {how}")


def _quantize(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder, nothing was written")
    import jax.numpy as jnp

    from jpeft import models, tree
    from jpeft.assets import resolve_model
    from jpeft.config import parse_targets
    from jpeft.quantization import Quantized

    path = resolve_model(args.model, lambda line: print(line, file=sys.stderr))
    targets = None if args.targets is None else parse_targets(args.targets)
    options = {"scheme": args.scheme, "block": args.block, "double": not args.no_double, "targets": targets}
    try:
        model, params = models.load(path, param_dtype=jnp.dtype(args.dtype), quantize=options)
    except models.ModelError:
        raise
    except ValueError as error:  # of what was asked
        raise UserError(str(error)) from error
    models.save(args.out, model, params, source=path)
    leaves = tree.flatten(params).values()
    quantised = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    size = sum(leaf.size for leaf in quantised)
    about = {
        "scheme": args.scheme,
        "bits": sum(leaf.bits * leaf.size for leaf in quantised) / size,
        "quantised": size,
        "bytes_before": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "bytes_after": tree.size_bytes(params),
        "folder": str(args.out),
    }
    if args.json:
        print(json.dumps(about))
    else:
        print(f"{about['scheme']}, {about['bits']:.3f} bits a quantised weight: {_bytes(about['bytes_before'])} in "
              f"{args.dtype} -> {_bytes(about['bytes_after'])}, {args.out}")  # fmt: skip


def _open_speaker(args: argparse.Namespace) -> tuple[Any, Any]:
    from jpeft import talk

    talk.keep_compiled()
    names = [field.name for field in dataclasses.fields(talk.Settings)]
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed {args.seed}: expected a number from 0 to 2^63 - 1")
    settings = talk.Settings(**{name: getattr(args, name) for name in names})
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    return talk.open_speaker(args.model, args.adapter, args.dtype, say), settings


def _generate(args: argparse.Namespace) -> None:
    if args.messages and (args.prompts or args.raw or args.system):
        raise UserError("--messages holds the whole conversation; give no PROMPT, --raw or --system with it")
    if args.raw and args.system:
        raise UserError("--raw goes on from the text itself; there is no place for --system")
    prompts = [_messages(args.messages)] if args.messages else args.prompts or [_stdin().rstrip("\n")]
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some text")
    speaker, settings = _open_speaker(args)
    raw = args.raw or (not speaker.codec.template and not args.messages and not args.system)
    ids = [speaker.codec.encode(p) if raw else speaker.codec.encode_chat(_as_messages(p, args.system)) for p in prompts]
    if len(ids) > 1:
        texts = speaker.answers(ids, settings)
        if args.json:
            print(
                json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)], ensure_ascii=False)
            )
        else:
            print("\n\n".join(texts))
        return
    text, speed = _speak(speaker, ids[0], settings, quiet=args.json)
    if args.json:
        numbers = {"prompt_tokens": speed.prompt, "new_tokens": speed.new, "tokens_per_second": speed.tokens_per_second}
        print(json.dumps({"prompt": prompts[0], "text": text, **numbers}, ensure_ascii=False))
    elif (rate := speed.tokens_per_second) is not None:
        print(f"({speed.new} tokens, {rate:.1f} tokens/s after the second)", file=sys.stderr)


def _chat(args: argparse.Namespace) -> None:
    from jpeft.talk import Conversation

    if sys.stdin is None:
        raise UserError("stdin is closed, but each of its lines is a turn")
    speaker, settings = _open_speaker(args)
    talk, watched = Conversation(args.system), sys.stdin.isatty()
    while True:
        if watched:
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if not line.strip():
            continue
        try:
            talk.add("user", _as_text(line.strip()))
            ids, limit = speaker.codec.encode_chat(talk.messages), speaker.model.config.max_position_embeddings
            if len(ids) >= limit:
                raise UserError(
                    f"the conversation has {len(ids)} tokens by now, and the model takes {limit}: begin another"
                )
            text, _ = _speak(speaker, ids, settings, quiet=args.json)
        except ValueError as error:
            if not watched:
                raise
            talk.take_back()  # what was said before stands
            _fail(str(error), 1)
            continue
        talk.add("assistant", text)
        if args.json:
            print(json.dumps(talk.messages[-1], ensure_ascii=False), flush=True)


def _stdin() -> str:
    """All of stdin as text."""
    if sys.stdin is None:
        raise UserError("no prompt was given, and stdin is closed")
    return _as_text(sys.stdin.read())


def _as_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("stdin is not UTF-8 text") from None
    return text


def _speak(speaker: Any, ids: Sequence[int], settings: Any, quiet: bool) -> tuple[str, Any]:
    """An answer, printed as it comes unless `quiet`."""
    from jpeft.talk import Speed

    speed, pieces = Speed(), []
    for piece in speaker.answer(ids, settings, speed):
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return "".join(pieces), speed


def _as_messages(prompt: Any, system: str | None) -> list[dict[str, str]]:
    if not isinstance(prompt, str):
        return prompt
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _messages(file: str) -> Any:
    try:
        return json.loads(_stdin() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--messages {file}: not JSON ({error})") from None


def _inspect(args: argparse.Namespace) -> None:
    from jpeft import runs

    about = runs.describe(args.path)
    if args.json:
        print(json.dumps(about, ensure_ascii=False))
        return
    leaves, result, sites = about.pop("leaves", {}), about.pop("result", None), about.pop("sites", [])
    config = about.pop("config", {})
    about |= {f"config.{name}": value for name, value in config.items() if value not in (None, {})}
    about |= {} if result is None else dict(_rows(result))
    for name, value in about.items():
        print(f"{name:24}  {value if isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)}")
    if leaves:
        print(f"{'sites':24}  {len(sites)}")
        width = max(map(len, leaves))
        print("\n".join(f"  {name:{width}}  {'×'.join(map(str, shape))}" for name, shape in sorted(leaves.items())))


# --------------------------------------------------------------------------------------------------------- printing


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The final table of a run."""
    peak, skipped, mfu = result["peak_memory_bytes"], result["skipped_steps"], result["mfu"]
    held = result.get("base_memory_bytes")
    rows = [
        *(_chat_rows(result) if result.get("task") == CHAT else _label_rows(result)),
        ("trainable parameters", f"{result['trainable_parameters']:,}"),
        ("total parameters", f"{result['total_parameters']:,}"),
        ("adapter on disk", _bytes(result["adapter_bytes"])),
        ("base on disk", _bytes(result["base_bytes"])),
        *([] if held is None else [("base in memory", _bytes(held))]),
        ("time per step", f"{1000 * result['seconds_per_step']:.0f} ms (median of {result['steps']})"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s" + ("" if mfu is None else f", MFU {mfu:.1%}")),
        ("peak memory", "unknown" if peak is None else _bytes(peak)),
        ("run", result["run"]),
    ]
    if skipped:
        rows.insert(-1, ("skipped steps", f"{skipped}: loss or gradient was not finite; a lower --lr may help"))
    return rows


def _label_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("accuracy before", f"{result['accuracy_before']:.1%}"),
        ("accuracy after", f"{result['accuracy_after']:.1%}"),
        ("majority baseline", f"{result['majority_baseline']:.1%}"),
    ]


def _chat_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    shapes = ", ".join(f"{rows}×{width}" for rows, width in result["shapes"])
    rows = [
        ("perplexity before", f"{result['perplexity_before']:.3f} (of {result['eval_examples']:,} held-out answers)"),
        ("perplexity after", f"{result['perplexity_after']:.3f}"),
        ("batches", f"{len(result['shapes'])} shape{'s' * (len(result['shapes']) > 1)} ({shapes}), "
                    f"{result['padding']:.1%} padding"),
    ]  # fmt: skip
    if scored := [s for s in result["samples"] if s["right_after"] is not None]:
        before, after = (sum(s[key] for s in scored) for key in ("right_before", "right_after"))
        rows.insert(2, ("right final number", f"{before} of {len(scored)} before, {after} after"))
    return rows


def _sample(sample: Mapping[str, Any]) -> str:
    """A prompt with its answers, for people."""
    marks = {True: " (right)", False: " (wrong)", None: ""}
    parts = [("prompt", sample["prompt"]), ("expected", sample["reference"])]
    parts += [(f"{when}{marks[sample[f'right_{when}']]}", sample[when]) for when in ("before", "after")]
    return "".join(f"\n--- {name}\n{text.strip()}" for name, text in parts) + "\n"


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit} ({size:,} bytes)"
    return f"{size:,} bytes"


class _Terminal:
    """Prints what a job says, and its progress: a bar where somebody watches, else a line now and then."""

    def __init__(self, to_stderr: bool, quiet: bool = False):
        self._stderr, self._quiet = to_stderr, quiet
        self._bar: Progress | None = None
        self._mean: float | None = None
        self._began: tuple[int, float] | None = None

    _console: Console

    def __enter__(self) -> _Terminal:
        from rich.console import Console

        self._console = Console(stderr=self._stderr, quiet=self._quiet, highlight=False, soft_wrap=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        if math.isfinite(loss):  # a step that is not is skipped, and what a bar shows should not jump
            self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
        mean = loss if self._mean is None else self._mean
        if not self._console.is_terminal:
            self._line(done, total, mean, tokens_per_second)
            return
        if self._bar is None:
            self._bar = self._start(done - 1, total)
        self._bar.update(self._task, completed=done, loss=mean, speed=tokens_per_second)
        if done == total:
            self._close()

    def _line(self, done: int, total: int, loss: float, speed: float) -> None:
        now = time.monotonic()
        first, began = self._began = self._began or (done, now)
        if done == total or done % -(-total // 20) == 0:  # some twenty lines in all
            left = (now - began) / max(1, done - first) * (total - done)
            eta = f"{int(left) // 60}:{int(left) % 60:02}"
            self.say(f"step {done}/{total}  loss {loss:.4f}  {speed:,.0f} tokens/s  ETA {eta}")

    def _start(self, done: int, total: int) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        ]
        bar = Progress(*columns, console=self._console, speed_estimate_period=120)
        self._task = bar.add_task("training", total=total, completed=done, loss=0.0, speed=0.0)
        bar.start()
        return bar

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        self._close()
        table = Table(show_header=False)
        for name, value in rows:
            table.add_row(name, Text(value))  # as it is: a path may look like markup
        self._console.print(table)


if __name__ == "__main__":
    sys.exit(main())
