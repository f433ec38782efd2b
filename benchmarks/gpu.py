"""One script for an accelerator: training steps, forward passes and decoding at the shapes of Llama 3.2 1B and 3.1 8B.

    python benchmarks/gpu.py [--only lora,qlora,torch,forward,decode,methods] [--shapes 1B,8B] [--json gpu.json]

It needs this checkout, jax, flax and optax; weights are random. On a CPU, or with --tiny, the shapes are tiny and the
code is the same. Each measurement has a process of its own, whose peak of memory is therefore its own, and which leaves
the device empty for the next. After --minutes, what is left is not started.

lora, qlora   The step of `jpeft finetune --task chat`: LoRA of rank 8 (alpha 16, no dropout) on all linear layers, in
              float32, over a base in bfloat16 or NF4, AdamW, clipped gradients, rows of 4,096 tokens without padding.
              "first step" is the time from the weights to the end of the first step: binding, tracing, compiling and
              running. MFU is relative to the chip's dense peak in bfloat16: "4 N" counts 4 FLOPs per token and weight
              in a product (the base is frozen: 2 forward, 2 backward), "all" also attention and the adapter, as
              `jpeft.hardware.utilization`. What is recomputed counts in neither. "peak" is the most that JAX's
              allocator held, "planned" the figure of `jpeft.plan(..., topology="gpu:1")`, as `jpeft plan` prints it.
torch         The same steps with HuggingFace's model and PEFT, where torch, transformers and peft (and, for NF4,
              bitsandbytes) are installed: same rank, targets, dtypes and rows, layers checkpointed if jpeft's are,
              SDPA, eager. "torch / jpeft" is its step time or peak memory in units of jpeft's.
forward       The loss of those rows without gradients: without adapter, with it, and with it merged.
decode        Greedy decoding of 8 prompts of 512 tokens: tokens of the prompts per second until the first new token,
              and new tokens per second after it.
methods       The step over a base in bfloat16 for every method of `jpeft.methods.METHODS`, in the configurations of
              `benchmarks/methods.py`, timed in turn with LoRA's, and the temporary bytes of its program. Only if asked
              for: each method compiles.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import machine, markdown

HERE = Path(__file__).resolve().parent
SECTIONS = ("lora", "qlora", "torch", "forward", "decode", "methods")
MODELS = {"1B": ("llama-3.2-1b", 4), "8B": ("llama-3.1-8b", 2)}  # the configuration and the rows of a batch
FULL = {"length": 4096, "prompts": 8, "prompt": 512, "new": 128}
TINY = {"length": 64, "rows": 2, "prompts": 2, "prompt": 16, "new": 4}
SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
STAND_IN = '''"""Stands in for jaxtyping where that is not installed: annotations without checks."""

import typing


class _Annotation:
    def __class_getitem__(cls, item):
        return typing.Any


def __getattr__(name):
    return _Annotation
'''


def config_of(shape: str, tiny: bool) -> dict[str, Any]:
    if tiny:
        return {**SMALL, "num_hidden_layers": 1 + list(MODELS).index(shape)}
    return json.loads((HERE.parent / "jpeft" / "planning" / "models" / f"{MODELS[shape][0]}.json").read_text())


def cases(args: argparse.Namespace, backend: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What to run, the most wanted first: its section, its shape, and the case."""
    wanted = set(args.only)
    trained = [name for name in ("lora", "qlora") if name in wanted] or ["lora", "qlora"]
    common = {"backend": backend, "rank": 8, "alpha": 16.0, "rounds": args.rounds}
    sizes = {
        shape: {"rows": MODELS[shape][1], **(TINY if args.tiny else FULL), "config": config_of(shape, args.tiny)}
        for shape in args.shapes
    }
    for kind in trained:
        for shape in args.shapes:
            case = {**common, **sizes[shape], "quantized": kind == "qlora", "remat": args.remat}
            if kind in wanted:
                yield kind, shape, {**case, "what": "train"}
            if "torch" in wanted:
                yield f"torch {kind}", shape, case
            if kind in wanted:
                yield f"plan {kind}", shape, {**case, "what": "plan"}
    for kind in ("forward", "decode"):
        for shape in args.shapes if kind in wanted else ():
            yield kind, shape, {**common, **sizes[shape], "quantized": False, "remat": "none", "what": kind}
    for shape in args.shapes if "methods" in wanted else ():
        yield "methods", shape, {**common, **sizes[shape], "quantized": False, "remat": args.remat, "what": "methods"}


# --- processes ---


def environment(folder: Path) -> dict[str, str]:
    """The environment of a case: it finds jpeft in this checkout, and takes the device's memory as it needs it."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("jaxtyping") is None:
        (folder / "jaxtyping.py").write_text(STAND_IN)
        paths.append(str(folder))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the first step compiles
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }


def run(script: str, case: dict[str, Any], env: dict[str, str], limit: float) -> dict[str, Any]:
    """The result of a case, or why there is none."""
    command = [sys.executable, str(HERE / script), json.dumps(case)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"missing": "stopped: the time is up"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def driver() -> str | None:
    """The driver of NVIDIA's GPUs; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


# --- tables ---


def gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.4g}"


def why(result: dict[str, Any]) -> str | None:
    return result.get("missing") or result.get("failed")


def train_table(found: dict[str, dict[str, Any]], peak: float | None) -> None:
    """Steps of jpeft and torch, and memory beside the plan."""
    head = ["step", "shape", "library", "ms", "tokens/s", "MFU 4 N", "MFU all", "first step s", "peak GiB"]
    head += ["planned GiB", "torch / jpeft: time", "memory"]
    body = []
    for name, result in found.items():
        kind, shape = name.split("/")
        library, _, kind = ("torch", "", kind[6:]) if kind.startswith("torch ") else ("jpeft", "", kind)
        if kind not in ("lora", "qlora"):
            continue
        if reason := why(result):
            body.append([kind, shape, library, reason, *[""] * (len(head) - 4)])
            continue
        ours, planned = found.get(f"{kind}/{shape}", {}), found.get(f"plan {kind}/{shape}", {})
        flops = [ours.get(key) for key in ("flops_4n", "flops")]
        row = [kind, shape, library, f"{1000 * result['seconds']:.1f}", f"{result['tokens'] / result['seconds']:,.0f}"]
        row += [f"{each / result['seconds'] / peak:.1%}" if each and peak else "" for each in flops]
        row += [f"{result['first_seconds']:.1f}", gib(memory_of(result))]
        row += [gib(planned.get("bytes")) or why(planned) or ""] if library == "jpeft" else [""]
        body.append([*row, *(ratios(result, ours) if library == "torch" else ("", ""))])
    if body:
        print("\n### Training steps\n")
        markdown(head, body)


def memory_of(result: dict[str, Any]) -> float | None:
    """The peak of the allocator, or, where it does not tell, that of the compiled program."""
    return result.get("peak_bytes") or result.get("program_bytes")


def ratios(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, str]:
    """Step time and memory of torch in units of jpeft's."""
    if "seconds" not in ours:
        return "", ""
    memory = memory_of(theirs)
    return f"{theirs['seconds'] / ours['seconds']:.2f}", f"{memory / memory_of(ours):.2f}" if memory else ""


def speed_table(kind: str, found: dict[str, dict[str, Any]]) -> None:
    """Forward passes or decoding, with and without the adapter."""
    head = ["shape", "model", *(["prompt tokens/s"] if kind == "decode" else []), "ms", "tokens/s", "time / no adapter"]
    body = []
    for name, result in found.items():
        section, shape = name.split("/")
        if section != kind:
            continue
        if reason := why(result):
            body.append([shape, reason, *[""] * (len(head) - 2)])
            continue
        for form, r in result.items():
            prefill = [f"{r['prefill_tokens_per_second']:,.0f}"] if kind == "decode" else []
            row = [shape, form, *prefill, f"{1000 * r['seconds']:.2f}", f"{r['tokens_per_second']:,.0f}"]
            body.append([*row, f"{r['relative']:.3f}"])
    if body:
        print(f"\n### {kind.capitalize()}\n")
        markdown(head, body)


def methods_table(found: dict[str, dict[str, Any]]) -> None:
    """A step of every method beside LoRA's."""
    head, body = ["method", "shape", "trained", "ms", "time / LoRA", "temporary GiB", "/ LoRA"], []
    for name, result in found.items():
        section, shape = name.split("/")
        rows = {"": result} if why(result) else result
        for method, row in rows.items() if section == "methods" else ():
            if reason := why(row):
                body.append([method, shape, reason, *[""] * (len(head) - 3)])
                continue
            cells = [method, shape, f"{row['trained']:,}", f"{1000 * row['seconds']:.1f}"]
            cells += [f"{row['relative']['time']:.3f}", gib(row["temporary_bytes"])]
            body.append([*cells, f"{row['relative']['temporary_bytes']:.3f}"])
    if body:
        print("\n### Methods\n")
        markdown(head, body)


# --- the command ---


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ",".join(SECTIONS[:-1])
    parser.add_argument("--only", default=sections, help="sections to run, separated by commas")
    parser.add_argument("--shapes", default=",".join(MODELS), help="shapes to run, separated by commas")
    parser.add_argument("--remat", default="full", choices=("full", "dots", "none"), help="checkpointing of layers")
    parser.add_argument("--rounds", type=int, default=8, help="measured steps")
    parser.add_argument("--minutes", type=float, default=8, help="time for all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which a CPU always gets")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args(argv)
    for name, known in (("only", SECTIONS), ("shapes", tuple(MODELS))):
        given = [each for each in getattr(args, name).split(",") if each]
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name} {', '.join(unknown)}: expected some of {', '.join(known)}")
        setattr(args, name, given)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        env = environment(Path(scratch))
        device = run("gpu_cases.py", {"what": "probe"}, env, 60 * args.minutes)
        if why(device):
            return 1
        args.tiny = args.tiny or device["backend"] == "cpu"
        facts = {**machine(["jax", "jaxlib", "flax", "optax"]), **device, "driver": driver()}
        out: dict[str, Any] = {"machine": facts, "arguments": vars(args), "results": {}}
        print(", ".join(f"{k} {v}" for k, v in facts.items() if v is not None), flush=True)
        if args.tiny:
            print("tiny shapes: these numbers only show that the script runs", flush=True)
        results = out["results"]
        for section, shape, case in cases(args, device["backend"]):
            left, began = end - time.monotonic(), time.monotonic()
            script = "torch_lora.py" if section.startswith("torch") else "gpu_cases.py"
            late = {"missing": f"not run: {args.minutes:g} minutes are over"}
            case["seconds"] = left - 60  # for a case of many measurements to end in time
            result = results[f"{section}/{shape}"] = run(script, case, env, left) if left > 5 else late
            state = why(result) or f"{time.monotonic() - began:.0f} s"
            print(f"{section} {shape}: {state}", file=sys.stderr, flush=True)
            if args.json:  # after each case: what is measured stays
                Path(args.json).write_text(json.dumps(out, indent=1))
    train_table(results, device["peak_flops"])
    for kind in ("forward", "decode"):
        speed_table(kind, results)
    methods_table(results)
    return 1 if any("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
