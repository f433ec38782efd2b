"""One device to eight, checkpoints, and a GPU: what is held, what is sent, and what a step is kept waiting for.

    python benchmarks/scale.py [--only devices,checkpoint,levers,gpu] [--rounds 8] [--layers 4] [--width 512]

LoRA of rank 8 (alpha 16, no dropout) on all linear layers of a Llama with random weights, AdamW, jpeft's own loss.
Three steps are compared. "base" has no adapter and no optimizer: the loss and its gradient with respect to the
embeddings' output, which goes as far back as LoRA's and belongs to no weight. "lora" and "full" are `jpeft.train_step`.

devices     meshes of 1, 2, 4 and 8 CPU devices. Bytes are a device's share, as XLA says of the compiled program. On
            shapes of 1B and 8B the programs are compiled and nothing is allocated: in float16, as XLA CPU sends
            bfloat16 as float32. Collectives are read out of the optimized HLO; those in a loop's body count as often as
            it runs. Their bytes are, for a device, its operands ("operands") and the whole arrays, twice where they are
            added up, as that scatters and gathers ("moved", of which a device receives 1 - 1/n): the adapter's are what
            "lora" has more than "base". "On weights" are those that gather no weight, yet send an array of the shape of
            one, or of a device's piece: gradients of weights; "full" shows that they are seen. The tokens are one
            chunk of the loss: for each, a sharded head is gathered, in "base" too, next to which an adapter is nothing.
            Devices share this machine's cores: times only show that nothing goes wrong.
checkpoint  bytes on disk over those of trainable leaves and optimizer, and how long training stands still for a save:
            "blocked" until `save` returns, "slowed" is what the steps beside the write take longer than others do. What
            a file adds is measured on random bits, without a base: it grows with the number of leaves.
levers      what each way to need less does to the compiled LoRA step: temporaries and weights of scanned layers, the
            state that is trained and saved, and FLOPs, of layers one by one (of a scan XLA counts the body once).
gpu         steps at 1B and 8B in bfloat16 and over NF4, each library in a process of its own, one after the other.
            Model FLOPs are those of `jpeft.utilization.step_flops`: what remat computes again and what dequantizing
            takes are not counted. MFU is over the chip's dense bfloat16 peak. Memory is XLA's
            figure for the program, and what torch's allocator held at most.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import types
from pathlib import Path
from typing import Any

# Before jax is imported: a flag that comes later is ignored.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes take turns on the GPU

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import COLLECTIVES, Variant, collectives, compiled_facts, machine, markdown, measure, ratio

import jpeft
from jpeft import models
from jpeft.core.tree import flatten, size_bytes
from jpeft.hardware import utilization
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.parallel.batches import constrained, layout_of
from jpeft.recipes.tasks import chat
from jpeft.text import conversations
from jpeft.training import checkpoint

RANK, ALPHA, TX, INTERVAL = 8, 16.0, optax.adamw(1e-4), 100
LORA = jpeft.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear")
METHODS = {"lora": LORA, "full": jpeft.Train(".*")}
MESHES: list[dict[str, int]] = [{"fsdp": n} for n in (1, 2, 4, 8)] + [{"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}]
LENGTH = 96  # 3 times a power of two: no activation has the shape of a weight
LLAMA = {
    "1B": DecoderConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "8B": DecoderConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ),
}  # fmt: skip
ROWS = {"1B": 8, "8B": 4}  # of 2,048 tokens, on a GPU


def title(text: str) -> None:
    print(f"\n### {text}\n", flush=True)


def mega(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"


def batch_of(rows: int, length: int, vocabulary: int) -> conversations.Batch:
    """Random tokens, of which every one counts."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    return chat.balanced(conversations.Batch(ids[:, :-1], ones, places, ids[:, 1:], ones.astype(np.float32)))


def small_model(args: argparse.Namespace, **options: Any) -> Decoder:
    config = DecoderConfig(
        vocab_size=4096, hidden_size=args.width, intermediate_size=11 * args.width // 4,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return Decoder(config, **options)


def abstract_params(model: Decoder) -> Any:
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return nn.meta.unbox(init["params"])


def random_params(model: Decoder) -> Any:
    init = lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])  # noqa: E731
    return jax.jit(init)(jax.random.key(0))


# --- steps ---


def train_step(method: Any, model: Any, params: Any, batch: Any, **options: Any) -> tuple[Any, Any]:
    """The compiled step and the state before it, abstract where the parameters are."""
    peft = method.bind(model, params, *chat.example_inputs())
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), params), TX, jax.random.key(1))
    step = jpeft.train_step(peft, chat.loss_fn(peft), TX, **options)
    return step.lower(state, params, batch).compile(), state


def base_step(model: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    """The same without an adapter; what it differentiates by is added to the embeddings and is zero."""

    def apply(params: Any, shift: Any, *inputs: Any, **options: Any) -> Any:
        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            looked_up = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
            return call(*args, **kwargs) + shift if looked_up else call(*args, **kwargs)

        with nn.intercept_methods(add):
            return model.apply({"params": params}, *inputs, **options)

    loss = chat.loss_fn(types.SimpleNamespace(apply=apply))  # type: ignore[arg-type]

    def step(shift: Any, params: Any, batch: Any) -> Any:
        with constrained(layout_of(batch)):
            return jax.value_and_grad(loss, has_aux=True)(shift, params, batch, jax.random.key(0))

    dtype, at = jax.tree.leaves(params)[0].dtype, batch.input_ids.sharding
    shift = jax.ShapeDtypeStruct((*batch.input_ids.shape, model.config.hidden_size), dtype, sharding=at)
    compiled = jax.jit(step, out_shardings=(None, at)).lower(shift, params, batch).compile()
    concrete = isinstance(batch.input_ids, jax.Array)
    return compiled, jax.device_put(jnp.zeros(shift.shape, dtype), at) if concrete else shift


# --- what is sent ---


def weight_shapes(params: Any) -> set[tuple[int, ...]]:
    """Of weights and of a device's pieces of them along any of their axes, of a layer and of all, as `spelled`."""
    out = set()
    for path, leaf in flatten(params).items():
        piece = leaf.sharding.shard_shape(leaf.shape)
        for shape in itertools.product(*zip(leaf.shape, piece, strict=True)):
            out |= {spelled(shape), spelled(shape[1:])} if "layers" in path else {spelled(shape)}
    return out - {()}


def spelled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """However it is turned, and whatever axes of 1 there are."""
    return tuple(sorted(size for size in shape if size > 1))


def sent(compiled: Any, params: Any) -> dict[str, Any]:
    """What a step sends, by kind, and how much of it has the shape of a weight and is none."""
    found, weights = collectives(compiled.as_text()), weight_shapes(params)
    by_kind = {k: [c for c in found if c.kind == k] for k in COLLECTIVES}
    reduced = [c for c in found if c.kind != "all-gather" and any(spelled(s) in weights for s in c.shapes)]
    return {
        "operands": sum(c.times * c.operands for c in found),
        "moved": sum(c.times * c.moved for c in found),
        "kinds": {k: [sum(c.times for c in of), sum(c.times * c.moved for c in of)] for k, of in by_kind.items()},
        "on_weights": [sum(c.times for c in reduced), sum(c.times * c.moved for c in reduced)],
    }


# --- the parts ---


def devices(args: argparse.Namespace) -> Any:
    """What a device holds and sends."""
    if jax.default_backend() != "cpu":
        return print("\ndevices: counts on CPU devices; run it with JAX_PLATFORMS=cpu")
    small = small_model(args)
    params, batch = jax.device_get(random_params(small)), batch_of(8, LENGTH, small.config.vocab_size)
    head = ["mesh", "step", "arguments", "temporaries", "fresh outputs", *COLLECTIVES, "operands", "moved"]
    head += ["moved, more than base", "operands, more than base", "on weights"]
    variants = [v for axes in MESHES for v in on_mesh(axes, small, params, batch, ("base", *METHODS))]
    measure(variants, args.rounds, warm_up=1)
    title(f"{args.layers} layers of {args.width}, float32, 8 x {LENGTH} tokens; a device's share")
    first = {v.facts["kind"]: v for v in variants[: 1 + len(METHODS)]}
    body = []
    for v in variants:
        v.facts["median_ms"] = 1000 * statistics.median(v.times)
        v.facts["ratio"] = ratio(v, first[v.facts["kind"]])
        body.append([*cells_of(v), f"{v.facts['median_ms']:.0f}", f"{v.facts['ratio']:.2f}"])
    markdown([*head, "median ms", "/ one device"], body)
    rows = [v.facts for v in variants]
    for name in args.shapes:
        large = Decoder(LLAMA[name], param_dtype=jnp.float16, remat="full")
        shapes = abstract_params(large)
        batch = jax.eval_shape(lambda x: x, batch_of(8, LENGTH, large.config.vocab_size))
        title(f"Llama {name}, float16, remat, 8 x {LENGTH} tokens; a device's share, compiled only")
        found = [v for axes in MESHES[3:] for v in on_mesh(axes, large, shapes, batch, ("base", "lora"))]
        markdown(head, [cells_of(v) for v in found])
        rows += [{"shape": name} | v.facts for v in found]
    return rows


def on_mesh(axes: dict[str, int], model: Decoder, params: Any, batch: Any, steps: tuple[str, ...]) -> list[Variant]:
    """Each step on a mesh of the first devices; abstract parameters make it one that cannot be run."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[: math.prod(axes.values())])
    placed, batch = jpeft.shard(params, mesh, names=models.logical_names(model)), jpeft.shard_batch(batch, mesh)
    out, name = [], " x ".join(f"{axis} {n}" for axis, n in axes.items())
    for kind in steps:
        if kind == "base":
            compiled, first = base_step(model, placed, batch)
        else:
            compiled, first = train_step(METHODS[kind], model, placed, batch)
        facts = {"mesh": name, "kind": kind, **compiled_facts(compiled), **sent(compiled, placed)}
        base = out[0].facts if out else facts
        facts |= {f"{key} / base": facts[key] / base[key] if base[key] else None for key in ("moved", "operands")}
        run = functools.partial(run_step, compiled, [first], placed, batch, kind == "base")
        out.append(Variant(f"{name} {kind}", run, **facts))
    return out


def run_step(compiled: Any, holder: list[Any], params: Any, batch: Any, keeps: bool) -> None:
    """One step, whose new state is the next one's, but for the base step, which has none."""
    new = jax.block_until_ready(compiled(holder[0], params, batch))
    if not keeps:
        holder[0] = new[0]


def cells_of(v: Variant) -> list[str]:
    f = v.facts
    cells = [f["mesh"], f["kind"], *(mega(f[k]) for k in ("argument_bytes", "temporary_bytes", "fresh_bytes"))]
    cells += [f"{n} of {mega(b)}" if n else "" for n, b in f["kinds"].values()]
    cells += [mega(f["operands"]), mega(f["moved"])]
    cells += ["" if f[k] is None else f"{f[k] - 1:+.2%}" for k in ("moved / base", "operands / base")]
    return [*cells, f"{f['on_weights'][0]} of {mega(f['on_weights'][1])}" if f["on_weights"][0] else "none"]


def saved(args: argparse.Namespace) -> Any:
    """What a checkpoint takes, on disk and of the time."""
    title(f"Checkpoints of {args.layers} layers of {args.width}, float32; shares are of {INTERVAL} steps")
    timed = {name: waits(method, small_model(args), args.rounds) for name, method in METHODS.items()}
    body = []
    for name, r in timed.items():
        cells = [mega(r["state"]), mega(r["disk"]), f"{r['disk'] / timed['full']['disk']:.4f}"]
        cells += [f"{1000 * r['step']:.0f} ms"]
        cells += [
            f"{1000 * r[k]:+.0f} ms ({r[k] / (INTERVAL * r['step']):+.2%})" for k in ("first", "blocked", "slowed")
        ]
        body.append([name, *cells])
    head = [
        "",
        "trainable and optimizer",
        "on disk",
        "/ full",
        "step",
        "first save blocked",
        "others blocked",
        "slowed",
    ]
    markdown(head, body)
    models_of = {"here": small_model(args), "1B": Decoder(LLAMA["1B"])}
    models_of |= {f"{n}, layers one by one": m.clone(scan_layers=False) for n, m in models_of.items()}
    sizes = {name: incompressible(model) for name, model in models_of.items()}
    title("Checkpoints of LoRA of random bits, which do not compress")
    body = [[name, str(r["leaves"]), mega(r["state"]), mega(r["disk"]), f"{(r['disk'] - r['state']) / 1024:+,.1f} KiB"]
            for name, r in sizes.items()]  # fmt: skip
    markdown(["", "leaves", "trainable and optimizer", "on disk", "more"], body)
    return {"timed": timed, "sizes": sizes}


def waits(method: Any, model: Decoder, rounds: int) -> dict[str, float]:
    """Seconds that a save takes from the steps before and beside it."""
    params, batch = random_params(model), batch_of(8, LENGTH, model.config.vocab_size)
    compiled, state = train_step(method, model, params, batch)
    holder = [state]
    run = functools.partial(run_step, compiled, holder, params, batch, False)
    alone, blocked, slowed = [], [], []
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_checkpoints(folder) as checkpoints:
        for i in range(rounds + 1):
            alone += [seconds(run) for _ in range(5)][1:]
            blocked.append(seconds(functools.partial(checkpoint.save, checkpoints, i, holder[0], {"step": i})))
            beside = []
            while checkpoints.manager.is_saving_in_progress():
                beside.append(seconds(run))
            slowed.append(sum(beside) - len(beside) * statistics.median(alone))
        disk = bytes_of_save(checkpoints, rounds)
    return {"state": state_bytes(holder[0]), "disk": disk, "step": statistics.median(alone), "first": blocked[0],
            "blocked": statistics.median(blocked[1:]), "slowed": statistics.median(slowed[1:])}  # fmt: skip


def incompressible(model: Decoder) -> dict[str, int]:
    """Bytes of a checkpoint of LoRA; the base is not needed and stays abstract."""
    params = abstract_params(model)
    peft = LORA.bind(model, params, *chat.example_inputs())
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), params), TX, jax.random.key(1))
    rng = np.random.default_rng(0)

    def fill(x: Any) -> jax.Array:
        if x.dtype == jnp.float32:
            return jnp.asarray(rng.integers(0, 1 << 32, x.shape, np.uint32).view(np.float32))
        return jax.random.key(0) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros(x.shape, x.dtype)

    state = jax.tree.map(fill, state)
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.save(checkpoints, 0, state, {"step": 0}, wait=True)
        disk = bytes_of_save(checkpoints, 0)
    return {"leaves": len(jax.tree.leaves(state)), "state": state_bytes(state), "disk": disk}


def state_bytes(state: Any) -> int:
    return size_bytes(state.adapter) + size_bytes(state.opt_state)


def bytes_of_save(checkpoints: Any, step: int) -> int:
    checkpoints.wait()
    return sum(path.stat().st_size for path in (checkpoints.folder / str(step)).rglob("*") if path.is_file())


def seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def levers(args: argparse.Namespace) -> Any:
    """What each way to need less memory, or less arithmetic, does."""
    half = dataclasses.replace(LORA, dtype="bfloat16")
    upper = rf"model/layers/({'|'.join(map(str, range(3 * args.layers // 4, args.layers)))})/.*"
    kinds: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "LoRA": (LORA, {}, {}),
        'remat="dots"': (LORA, {"remat": "dots"}, {}),
        'remat="full"': (LORA, {"remat": "full"}, {}),
        'remat="offload"': (LORA, {"remat": "offload"}, {}),
        "accumulate=4": (LORA, {}, {"accumulate": 4}),
        "base in bfloat16": (LORA, {"param_dtype": jnp.bfloat16}, {}),
        "base in NF4": (LORA, {}, {}),
        "adapter in bfloat16": (half, {}, {}),
        "adapter in the upper quarter": (dataclasses.replace(LORA, targets=upper), {"scan_layers": False}, {}),
    }
    rows, body, flops = [], [], {}
    for name, (method, options, stepping) in kinds.items():
        for scan in (True, False):
            if scan and "scan_layers" in options:
                continue
            model = small_model(args, **{"scan_layers": scan, **options})
            params, batch = abstract_params(model), batch_of(8, 4 * LENGTH, model.config.vocab_size)
            if "NF4" in name:
                params = jax.eval_shape(functools.partial(jpeft.quantize, scheme="nf4"), params)
            compiled, state = train_step(method, model, params, batch, **stepping)
            facts = compiled_facts(compiled)
            if scan:
                row = {"name": name, "temporaries": facts["temporary_bytes"], "weights": size_bytes(params)}
            elif "scan_layers" in options:
                row = {"name": name, "temporaries": None, "weights": size_bytes(params)}
        flops.setdefault("LoRA", facts["flops"])
        row |= {"state": state_bytes(state), "flops": facts["flops"] / flops["LoRA"]}
        if "accumulate" in stepping:
            row["flops"] = None  # its micro-batches are a scan
        rows.append(row)
        show = lambda value, kind: "" if value is None else kind(value)  # noqa: E731
        body.append([name, show(row["temporaries"], mega), mega(row["weights"]), mega(row["state"]),
                     show(row["flops"], "{:.2f}".format)])  # fmt: skip
    title(f"{args.layers} layers of {args.width}, 8 x {4 * LENGTH} tokens, on {jax.default_backend()}")
    markdown(["", "temporaries", "weights", "adapter and optimizer", "FLOPs / LoRA's"], body)
    return rows


# --- on a GPU ---


def gpu(args: argparse.Namespace) -> Any:
    """How much of the chip a step uses."""
    if jax.default_backend() != "gpu":
        return print(f"\ngpu: there is none, JAX runs on {jax.default_backend()}")
    kind, rows = jax.devices()[0].device_kind, []
    peak = utilization.peak_flops(kind)
    for name in args.shapes:
        shape = ROWS[name], 2048
        flops = model_flops(LLAMA[name], shape)
        for library, worker in (("jpeft", jpeft_steps), ("torch PEFT", torch_steps)):
            # Its memory comes back with the end of the process.
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                for step, found in process.submit(worker, LLAMA[name], shape, args.rounds).result().items():
                    row = {"shape": name, "step": step, "library": library, "flops": flops}
                    rows.append(row | (found if isinstance(found, dict) else {"missing": found}))
    title(f"{kind}, {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'of unknown peak'} in bfloat16; torch runs eagerly")
    times, body = {(r["shape"], r["step"], r["library"]): r["seconds"] for r in rows if "seconds" in r}, []
    for r in rows:
        row = [r["shape"], r["step"], r["library"]]
        if "missing" in r:
            body.append([*row, r["missing"], "", "", "", "", ""])
            continue
        r["mfu"] = r["flops"] / r["seconds"] / peak if peak else None
        torch_time = times.get((r["shape"], r["step"], "torch PEFT"))
        row += [f"{1000 * r['seconds']:.0f} ms", f"{r['tokens'] / r['seconds']:,.0f}"]
        row += [f"{r['flops'] / r['seconds'] / 1e12:.0f}", f"{r['mfu']:.1%}" if peak else ""]
        body.append([*row, f"{r['seconds'] / torch_time:.2f}" if torch_time else "", f"{r['peak_bytes'] / 1e9:.1f} GB"])
    head = ["shape", "step", "library", "median", "tokens/s", "model TFLOP/s", "MFU", "time / torch", "peak memory"]
    markdown(head, body)
    return rows


def model_flops(config: DecoderConfig, shape: tuple[int, int]) -> float:
    """Of a step: the same for both libraries and both bases."""
    model = Decoder(config)
    params = abstract_params(model)
    adapter = LORA.bind(model, params, *chat.example_inputs()).init(jax.random.key(0), params)
    trained = jpeft.core.tree.count(adapter)
    return utilization.step_flops(model, params, tokens=math.prod(shape), length=shape[1], trained=trained)


def median_of(run: Any, rounds: int) -> float:
    for _ in range(3):
        run()
    return statistics.median(seconds(run) for _ in range(rounds))


def jpeft_steps(config: DecoderConfig, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    model = Decoder(config, param_dtype=jnp.bfloat16, remat="full")
    params, batch, out = random_params(model), jax.device_put(batch_of(*shape, config.vocab_size)), {}
    for name in ("LoRA", "QLoRA"):
        if name == "QLoRA":
            params = jpeft.quantize(params, "nf4")
        compiled, state = train_step(LORA, model, params, batch)
        time_of = median_of(functools.partial(run_step, compiled, [state], params, batch, False), rounds)
        # XLA's own figure: the allocator's high-water mark would be that of making and quantizing the weights.
        facts = compiled_facts(compiled)
        held = facts["argument_bytes"] + facts["temporary_bytes"] + facts["fresh_bytes"]
        out[name] = {"seconds": time_of, "tokens": math.prod(shape), "peak_bytes": held}
    return out


def torch_steps(config: DecoderConfig, shape: tuple[int, int], rounds: int, device: str = "cuda") -> dict[str, Any]:
    """The same with HuggingFace's model and PEFT: checkpointed layers, SDPA, adapters in float32."""
    if missing := [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]:
        return {"LoRA": f"no {missing[0]}"}
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"LoRA": "torch has no CUDA"}
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    ids = torch.randint(0, config.vocab_size, shape, device=device)
    out: dict[str, Any] = {}
    for name in ("LoRA", "QLoRA"):
        if name == "QLoRA" and importlib.util.find_spec("bitsandbytes") is None:
            return out | {name: "no bitsandbytes"}
        torch.set_default_dtype(torch.bfloat16)
        theirs = LlamaConfig(**{f: getattr(config, f) for f in shared}, use_cache=False, attn_implementation="sdpa")
        with torch.device(device):
            model = LlamaForCausalLM(theirs)
        torch.set_default_dtype(torch.float32)
        if name == "QLoRA":
            in_four_bits(model, device)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if device == "cuda":
                torch.cuda.synchronize()

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        time_of = median_of(step, rounds)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        out[name] = {"seconds": time_of, "tokens": math.prod(shape), "peak_bytes": peak}
        del model, optimizer, step
        gc.collect()  # before the next base is made
    return out


def in_four_bits(model: Any, device: str) -> None:
    """Linear layers but the head become bitsandbytes' NF4, which `from_pretrained` does only to what it reads."""
    import bitsandbytes as bnb
    import torch

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                                    compress_statistics=True, quant_type="nf4", device="meta")  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
            )
            owner, own = name.rsplit(".", 1)
            setattr(model.get_submodule(owner), own, new.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT knows


def main() -> None:
    parts = {"devices": devices, "checkpoint": saved, "levers": levers, "gpu": gpu}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas between them")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4, help="of devices and checkpoint")
    parser.add_argument("--width", type=int, default=512, help="of devices and checkpoint")
    parser.add_argument("--shapes", default=",".join(LLAMA), help="of devices' compiled programs, and of gpu")
    parser.add_argument("--json", default=None, help="write the numbers there")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - parts.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    args.shapes = [name for name in args.shapes.split(",") if name]
    if unknown := set(args.shapes) - LLAMA.keys():
        parser.error(f"--shapes {', '.join(sorted(unknown))}: expected some of {', '.join(LLAMA)}, or none")
    out: dict[str, Any] = {"machine": machine(["jax", "flax", "optax"]), "arguments": vars(args)}
    print(", ".join(f"{k} {v}" for k, v in out["machine"].items()))
    for name in args.only.split(","):
        out[name] = parts[name](args)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
