"""SmolLM2-135M with LoRA of rank 8 on all linear layers: jpeft and HuggingFace PEFT (torch), side by side in one run.

    python benchmarks/decoder.py [--rounds 8] [--only train,decode,growth] [--model DIR-or-GGUF] [--json decoder.json]

Float32, no dropout, AdamW, the same weights, adapter and tokens on both sides. Rounds are interleaved in a shuffled
order, as in `benchmarks/step.py`; ratios compare the medians and, for shared machines, the fastest.

train   A step on 4 x 256 random tokens with cross-entropy at every position, and its memory. Memory is measured for
        each side in a process of its own: after loading and compiling, the kernel's high-water mark is reset and two
        steps run. "Peak growth" is VmHWM minus VmRSS before them. "Peak RSS" is the highest VmHWM of the process,
        including libraries, loading and compilation. (ru_maxrss would start from the parent's.) "Compiled" is XLA's
        figure for the program.
decode  Greedy decoding of one prompt of 256 tokens. Prefill is the time to generate one token; decoding is the
        additional time to generate 64, divided by 63.
growth  FLOPs, bytes and time of jpeft's training step as rank, length and depth grow, of the compiled program. XLA
        counts the body of a scan once, so FLOPs are extrapolated, exactly, from one and two unrolled layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, compiled_facts, cross_entropy, machine, markdown, measure, table

import jpeft
from jpeft.models.decoder import Decoder
from jpeft.recipes.assets import resolve_model
from jpeft.serving.generation import generate

RANK, LR, DECAY = 8, 1e-4, 0.01
PROJECTIONS = r".*_proj"
RANKS, LENGTHS, DEPTHS = (1, 4, 16, 64, 256), (128, 256, 512, 1024), (1, 2, 4)
MEMORY_OF = ("torch", "torch checkpointed", "jpeft", "jpeft remat=dots", "jpeft remat=full")
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft")
NORMS = jpeft.Train(r".*layernorm/scale")  # the gradient path of LoRA, at almost no cost


def lora(rank: int = RANK) -> jpeft.LoRA:
    return jpeft.LoRA(rank=rank, targets=PROJECTIONS)


def tokens(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Random ids, one more than the length, so that all positions have a target."""
    return np.random.default_rng(0).integers(10, vocabulary, (batch, length + 1)).astype(np.int32)


def mega(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


# --- torch ---


def torch_model(folder: Any, adapter: Any = None) -> Any:
    """The base model, or with an adapter.

    Args:
      folder: the base model.
      adapter: the folder of an adapter, or "new" for a new one, whose B is not zero, so that it has an effect.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # generate all tokens
    model.generation_config.pad_token_id = 0
    if adapter is None:
        return model.eval()
    if adapter != "new":
        return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, leaf in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(leaf, std=0.01)
    return model


def torch_step(folder: Any, adapter: Any, ids: np.ndarray, checkpointed: bool = False) -> Variant:
    import torch

    model = torch_model(folder, adapter).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY)
    data = torch.tensor(ids).long()
    sum(p.detach().sum() for p in model.parameters())  # reads the weights, which safetensors only maps

    def step() -> float:
        logits = model(input_ids=data[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Variant("torch", step)


# --- jpeft ---


def lowered_step(model: Any, params: Any, method: Any, ids: Any, adapter: Any = None) -> tuple[Any, Any]:
    """The lowered training step and its state, abstract if the parameters and ids are."""
    inputs = jax.ShapeDtypeStruct((ids.shape[0], ids.shape[1] - 1), ids.dtype)
    peft, tx = method.bind(model, params, inputs), optax.adamw(LR, weight_decay=DECAY)
    if adapter is None:
        abstract = isinstance(ids, jax.ShapeDtypeStruct)
        adapter = (jax.eval_shape if abstract else lambda f, *a: f(*a))(peft.init, jax.random.key(0), params)

    def loss_fn(adapter: Any, params: Any, ids: Any, rng: jax.Array) -> Any:
        return cross_entropy(peft.apply(params, adapter, ids[:, :-1]), ids[:, 1:]), {}

    state = jpeft.TrainState.create(peft, adapter, tx, jax.random.key(1))
    return jpeft.train_step(peft, loss_fn, tx).lower(state, params, ids), state


def jax_step(name: str, model: Any, params: Any, method: Any, ids: np.ndarray, adapter: Any = None) -> Variant:
    lowered, state = lowered_step(model, params, method, ids, adapter)
    compiled, holder = lowered.compile(), [state]

    def step() -> float:
        holder[0], metrics = compiled(holder[0], params, ids)
        return float(metrics["loss"])

    return Variant(name, step, **compiled_facts(compiled))


def adapter_of(folder: Any, adapter: Any) -> tuple[Any, Any, Any, Any]:
    """The unrolled model with torch's adapter: `(model, params, peft, adapter)`."""
    model, params = jpeft.models.load(folder, scan_layers=False)
    peft, leaves = jpeft.hf.load(adapter, model, params, jnp.zeros((1, 1), jnp.int32))
    return model, params, peft, leaves


# --- the parts ---


def train(args: argparse.Namespace, folder: Path, adapter: Path) -> dict[str, Any]:
    """Time and memory of a training step."""
    model, params = jpeft.models.load(folder)
    ids = tokens(args.batch, args.length, model.config.vocab_size)
    leaves = jpeft.models.stack(adapter_of(folder, adapter)[3])
    variants = [torch_step(folder, adapter, ids)]
    for remat in (None, "dots", "full"):
        name = "jpeft" if remat is None else f"jpeft remat={remat}"
        variants.append(jax_step(name, model.clone(remat=remat), params, lora(), ids, leaves))
    losses = {v.name: [v.step(), v.step()] for v in variants}  # before and after a step
    for name, pair in losses.items():
        np.testing.assert_allclose(pair, losses["torch"], atol=1e-3, err_msg=f"losses of {name} and torch")
    apart = np.abs(np.subtract(losses["jpeft"], losses["torch"]))
    measure(variants, args.rounds, warm_up=0)
    rows = {r["name"]: r for r in table(variants)}
    for name in MEMORY_OF:
        child = {"side": name, "folder": str(folder), "adapter": str(adapter), "threads": args.threads}
        child |= {"batch": args.batch, "length": args.length}
        rows[name] = rows.get(name, {}) | run_child(child)
    print(f"\n### Training step, {args.batch} x {args.length} tokens\n")
    print(f"Losses of jpeft and torch differ by {apart[0]:.1e} before a step and {apart[1]:.1e} after it.\n")
    head = ["", "median s", "fastest s", "/ torch", "/ torch (fastest)", "compiled: temporary", "arguments"]
    head += ["fresh outputs", "peak growth", "/ torch", "peak RSS"]
    body, base = [], rows["torch"]
    for name, r in rows.items():
        seconds = [f"{r[k] / 1000:.2f}" if k in r else "" for k in ("median_ms", "fastest_ms")]
        ratios = [f"{r[k] / base[k]:.2f}" if k in r else "" for k in ("median_ms", "fastest_ms")]
        compiled = [""] * 3
        if "temporary_bytes" in r:
            compiled = [mega(r[f"{kind}_bytes"]) for kind in ("temporary", "argument", "fresh")]
        growth = f"{r['growth_bytes'] / base['growth_bytes']:.2f}"
        body.append([name, *seconds, *ratios, *compiled, mega(r["growth_bytes"]), growth, mega(r["peak_bytes"])])
    markdown(head, body)
    return {"rows": rows, "losses": losses}


def run_child(what: dict[str, Any]) -> dict[str, int]:
    """The memory of a step of one side, measured in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(what)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def child(what: dict[str, Any]) -> None:
    """Measures the memory of a step and prints it, in the process that `run_child` starts."""
    vocabulary = json.loads((Path(what["folder"]) / "config.json").read_text())["vocab_size"]
    ids = tokens(what["batch"], what["length"], vocabulary)
    side, _, option = what["side"].partition(" ")
    if side == "torch":
        import torch

        torch.set_num_threads(what["threads"])
        variant = torch_step(what["folder"], what["adapter"], ids, checkpointed=bool(option))
    else:
        model, params = jpeft.models.load(what["folder"], remat=option.removeprefix("remat=") or None)
        variant = jax_step("jpeft", model, params, lora(), ids)
    loading = status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the resident size
    before = status("VmRSS")
    variant.step()
    variant.step()
    peak = status("VmHWM")
    print(json.dumps({"before_bytes": before, "growth_bytes": peak - before, "peak_bytes": max(peak, loading)}))


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"no {field} in /proc/self/status"
    return int(found[1]) * 1024


def decode(args: argparse.Namespace, folder: Path, adapter: Path) -> dict[str, Any]:
    """Tokens per second of prefill and decoding."""
    import torch

    (model, params, peft, leaves), new = adapter_of(folder, adapter), args.new
    prompt = tokens(1, args.length - 1, model.config.vocab_size)
    stacked, stack = model.clone(scan_layers=True), jpeft.models.stack
    calls, merged = {}, peft.merge(params, leaves)
    kinds = {"no adapter": {}, "unmerged": {"peft": peft, "adapter": leaves}, "merged": {}}
    for kind, under in kinds.items():
        weights = merged if kind == "merged" else params
        calls[f"jpeft, {kind}"] = functools.partial(generate, model, weights, [prompt[0].tolist()], **under)
        if kind == "no adapter":
            calls["jpeft scanned, no adapter"] = functools.partial(
                generate, stacked, stack(weights), [prompt[0].tolist()]
            )
        theirs = torch_model(folder, None if kind == "no adapter" else adapter)
        theirs = theirs.merge_and_unload() if kind == "merged" else theirs
        calls[f"torch, {kind}"] = functools.partial(torch_generate, theirs, torch.tensor(prompt).long())
    rows = {name: call(max_new_tokens=new) for name, call in calls.items()}
    rows = {name: row if name.startswith("torch") else row[0] for name, row in rows.items()}
    same = {n: int(np.cumprod(np.equal(row, rows["torch, " + n.split(", ")[1]])).sum()) for n, row in rows.items()}
    runs = {f"{name}, {n}": functools.partial(call, max_new_tokens=n) for name, call in calls.items() for n in (1, new)}
    variants = [Variant(name, run) for name, run in runs.items()]
    measure(variants, args.rounds, warm_up=1)
    times = {r["name"]: r for r in table(variants)}
    rates: dict[str, dict[str, float]] = {}
    for name in calls:
        first, all_of = times[f"{name}, 1"], times[f"{name}, {new}"]
        rates[name] = {"equal tokens": same[name]}
        for clock in ("median", "fastest"):
            at = f"{clock}_ms"
            rates[name][f"prefill {clock}"] = 1000 * args.length / first[at]
            rates[name][f"decode {clock}"] = 1000 * (new - 1) / (all_of[at] - first[at])
    print(f"\n### Greedy decoding, {args.length} tokens of prompt and {new} new ones: tokens per second\n")
    clocks = [f"{what} {clock}" for what in ("prefill", "decode") for clock in ("median", "fastest")]
    markdown(
        ["", *clocks, "tokens equal to torch's"],
        [[n, *(f"{r[c]:.1f}" for c in clocks), f"{same[n]} of {new}"] for n, r in rates.items()],
    )
    pairs = {f"jpeft / torch, {kind}": (f"jpeft, {kind}", f"torch, {kind}") for kind in kinds}
    pairs |= {
        f"{side}, {kind} / no adapter": (f"{side}, {kind}", f"{side}, no adapter")
        for side in ("jpeft", "torch")
        for kind in ("unmerged", "merged")
    }
    pairs["jpeft / jpeft scanned"] = ("jpeft, no adapter", "jpeft scanned, no adapter")
    ratios = {name: {c: rates[a][c] / rates[b][c] for c in clocks} for name, (a, b) in pairs.items()}
    print("\nRatios of speed; above 1 is faster:\n")
    markdown(["", *clocks], [[n, *(f"{r[c]:.2f}" for c in clocks)] for n, r in ratios.items()])
    return {"rates": rates, "ratios": ratios, "times": times}


def torch_generate(model: Any, prompt: Any, max_new_tokens: int) -> list[int]:
    import torch

    with torch.inference_mode():
        mask = torch.ones_like(prompt)
        out = model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
        )
    return out[0, prompt.shape[1] :].tolist()


def abstract(config: Any, layers: int | None = None, **options: Any) -> tuple[Any, Any]:
    """A model with this config, and its abstract parameters."""
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=())
    model = Decoder(config, **options)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return model, nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])


def cost(config: Any, method: Any, batch: int, length: int) -> dict[str, float]:
    """FLOPs and bytes of a training step."""
    ids = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    compiled = lowered_step(*abstract(config), method, ids)[0].compile()
    one, two = (
        lowered_step(*abstract(config, n, scan_layers=False), method, ids)[0].compile().cost_analysis()["flops"]
        for n in (1, 2)
    )
    return compiled_facts(compiled) | {"flops": one + (config.num_hidden_layers - 1) * (two - one)}


def growth(args: argparse.Namespace, folder: Path, adapter: Path) -> dict[str, Any]:
    """FLOPs, bytes and time of a training step as rank, length and depth grow."""
    model, params = jpeft.models.load(folder)
    config, rounds = model.config, max(1, args.rounds // 2)
    methods = {f"LoRA rank {rank}": lora(rank) for rank in RANKS}
    methods = {"no adapter (norms train)": NORMS, "full fine-tuning": jpeft.Train(r".*")} | methods
    ranks = {name: cost(config, method, args.batch, args.length) for name, method in methods.items()}
    ids = tokens(args.batch, args.length, config.vocab_size)
    timed = [name for name in methods if name not in ("full fine-tuning", "LoRA rank 4", "LoRA rank 64")]
    add_times(ranks, [jax_step(name, model, params, methods[name], ids) for name in timed], rounds)
    print(f"\n### Growth with the rank, {args.batch} x {args.length} tokens\n")
    growth_table(ranks, {"rank 1": ranks["LoRA rank 1"], "no adapter": ranks["no adapter (norms train)"]})

    lengths = {f"1 x {n}": cost(config, lora(), 1, n) for n in LENGTHS}
    steps = [jax_step(f"1 x {n}", model, params, lora(), tokens(1, n, config.vocab_size)) for n in LENGTHS]
    add_times(lengths, steps, rounds)
    print(f"\n### Growth with the length, LoRA rank {RANK}\n")
    growth_table(lengths, {f"1 x {LENGTHS[0]}": lengths[f"1 x {LENGTHS[0]}"]})

    layers = [config.num_hidden_layers * times for times in DEPTHS]
    depth_of(config, layers[0], args)  # one-time costs of the first trace
    depths = {str(n): depth_of(config, n, args) for n in layers}
    print(f"\n### Growth with the depth, LoRA rank {RANK}, {args.batch} x {args.length} tokens\n")
    head = ["layers", "trace and lower s", "compile s", "StableHLO characters", "HLO characters", "temporary"]
    body = []
    for name, d in depths.items():
        whole = [f"{d['hlo_before']:,}", f"{d['hlo_after']:,}", mega(d["temporary_bytes"])]
        body.append([name, f"{d['trace_s']:.2f}", f"{d['compile_s']:.2f}", *whole])
    markdown(head, body)
    return {"ranks": ranks, "lengths": lengths, "depths": depths}


def add_times(rows: dict[str, dict[str, Any]], variants: list[Variant], rounds: int) -> None:
    measure(variants, rounds, warm_up=1)
    for r in table(variants):
        rows[r["name"]] |= {"median_ms": r["median_ms"], "fastest_ms": r["fastest_ms"]}


def growth_table(rows: dict[str, dict[str, Any]], bases: dict[str, dict[str, Any]]) -> None:
    kinds = {"GFLOP": ("flops", 1e9), "temporary MB": ("temporary_bytes", 1e6), "fastest s": ("fastest_ms", 1e3)}
    head = [""]
    for kind in kinds:
        head += [kind, *(f"/ {base}" for base in bases)]
    body = []
    for name, r in rows.items():
        body.append([name])
        for key, unit in kinds.values():
            known = key in r
            body[-1] += [f"{r[key] / unit:,.2f}" if known else ""]
            body[-1] += [f"{r[key] / base[key]:.3f}" if known and key in base else "" for base in bases.values()]
    markdown(head, body)


def depth_of(config: Any, layers: int, args: argparse.Namespace) -> dict[str, float]:
    """Time to trace and to compile a step with this many layers, and its size. Nothing is allocated."""
    ids = jax.ShapeDtypeStruct((args.batch, args.length + 1), jnp.int32)
    model, params = abstract(config, layers)
    start = time.perf_counter()
    lowered, _ = lowered_step(model, params, lora(), ids)
    traced = time.perf_counter()
    compiled = lowered.compile()
    facts = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    return (
        facts | compiled_facts(compiled) | {"hlo_before": len(lowered.as_text()), "hlo_after": len(compiled.as_text())}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="train,decode,growth", help="parts to run, separated by commas")
    parser.add_argument("--model", default=None, help="a HuggingFace folder or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    parts = {"train": train, "decode": decode, "growth": growth}
    if unknown := set(args.only.split(",")) - parts.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    import torch

    torch.set_num_threads(args.threads)
    out: dict[str, Any] = {"machine": machine(PACKAGES) | {"torch threads": args.threads}, "arguments": vars(args)}
    print(", ".join(f"{k} {v}" for k, v in out["machine"].items()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve_model("smollm2") if args.model is None else Path(args.model)
        if folder.suffix == ".gguf":  # torch reads the float32 weights that jpeft writes
            model, params = jpeft.models.load(folder)
            folder = Path(scratch) / "model"
            jpeft.models.save(folder, model, params)
            del model, params
        adapter = Path(scratch) / "adapter"
        torch_model(folder, "new").save_pretrained(adapter)
        for name in args.only.split(","):
            out[name] = parts[name](args, folder, adapter)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
