"""One to eight devices, and checkpoints: memory, collectives, and the time that saving takes.

    python benchmarks/scale.py [--only devices,checkpoint,levers] [--rounds 8] [--layers 4] [--width 512]

LoRA of rank 8 (alpha 16, no dropout) on all linear layers of a Llama with random weights, AdamW, jpeft's chat loss.
Three steps are compared. "base" has no adapter and no optimizer: the loss and its gradient with respect to the output
of the embeddings, which goes as far back as LoRA's but belongs to no weight. "lora" and "full" are `jpeft.train_step`.

devices     Meshes of 1, 2, 4 and 8 CPU devices. Bytes are XLA's figures for one device. Programs of 1B and 8B shapes
            are only compiled, in float16, since XLA's CPU backend communicates bfloat16 as float32. Collectives are
            read from the optimized HLO; those in the body of a loop count once per iteration. "Operands" are the bytes
            of a device's operands; "moved" the bytes of the whole arrays, twice for an all-reduce, which scatters and
            gathers (a device receives 1 - 1/n of them). The adapter's traffic is the difference of "lora" and "base".
            "On weights" are collectives other than all-gathers on arrays with the shape of a weight or of its shard:
            gradients of weights, as "full" shows. The tokens fit one chunk of the loss: each chunk all-gathers a
            sharded head, also in "base", and would hide the adapter's traffic. The devices share the cores of this
            machine: times only show that nothing goes wrong.
checkpoint  Bytes on disk, relative to those of trainable leaves and optimizer state, and the time that a save takes
            from training: "blocked" until `save` returns, "slowed" by longer steps during the write. The overhead of
            files is measured on random bits, without a base; it grows with the number of leaves.
levers      The effect of each way to save memory on the compiled LoRA step: temporaries and weights with scanned
            layers, the trained and saved state, and FLOPs with unrolled layers (XLA counts the body of a scan once).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import tempfile
import time
import types
from pathlib import Path
from typing import Any

# Set before jax is imported, which reads it once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import COLLECTIVES, Variant, collectives, compiled_facts, machine, markdown, measure, ratio

import jpeft
from jpeft import models
from jpeft.core.tree import flatten, size_bytes
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
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "8B": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}


def title(text: str) -> None:
    print(f"\n### {text}\n", flush=True)


def mega(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"


def batch_of(rows: int, length: int, vocabulary: int) -> conversations.Batch:
    """Random tokens with a weight of 1."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    return chat.balanced(conversations.Batch(ids[:, :-1], ones, places, ids[:, 1:], ones.astype(np.float32)))


def small_model(args: argparse.Namespace, **options: Any) -> Decoder:
    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=args.width,
        intermediate_size=11 * args.width // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return Decoder(config, **options)


def abstract_params(model: Decoder) -> Any:
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return nn.meta.unbox(init["params"])


def random_params(model: Decoder) -> Any:
    @jax.jit
    def init(key: jax.Array) -> Any:
        return nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])

    return init(jax.random.key(0))


# --- steps ---


def train_step(method: Any, model: Any, params: Any, batch: Any, **options: Any) -> tuple[Any, Any]:
    """The compiled step and its initial state, abstract if the parameters are."""
    peft = method.bind(model, params, *chat.example_inputs())
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), params), TX, jax.random.key(1))
    step = jpeft.train_step(peft, chat.loss_fn(peft), TX, **options)
    return step.lower(state, params, batch).compile(), state


def base_step(model: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    """The step without an adapter. It differentiates with respect to zeros that are added to the embeddings."""

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


# --- collectives ---


def weight_shapes(params: Any) -> set[tuple[int, ...]]:
    """Canonical shapes of weights and of their shards along any axes, of one layer and of all."""
    out = set()
    for path, leaf in flatten(params).items():
        piece = leaf.sharding.shard_shape(leaf.shape)
        for shape in itertools.product(*zip(leaf.shape, piece, strict=True)):
            out |= {canonical(shape), canonical(shape[1:])} if "layers" in path else {canonical(shape)}
    return out - {()}


def canonical(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without order and axes of size 1."""
    return tuple(sorted(size for size in shape if size > 1))


def traffic(compiled: Any, params: Any) -> dict[str, Any]:
    """The collectives of a step by kind, and those on gradients of weights."""
    found, weights = collectives(compiled.as_text()), weight_shapes(params)
    by_kind = {k: [c for c in found if c.kind == k] for k in COLLECTIVES}
    reduced = [c for c in found if c.kind != "all-gather" and any(canonical(s) in weights for s in c.shapes)]
    return {
        "operands": sum(c.times * c.operands for c in found),
        "moved": sum(c.times * c.moved for c in found),
        "kinds": {k: [sum(c.times for c in of), sum(c.times * c.moved for c in of)] for k, of in by_kind.items()},
        "on_weights": [sum(c.times for c in reduced), sum(c.times * c.moved for c in reduced)],
    }


# --- the parts ---


def devices(args: argparse.Namespace) -> Any:
    """Memory and collectives of a device."""
    if jax.default_backend() != "cpu":
        return print("\ndevices: needs CPU devices; run it with JAX_PLATFORMS=cpu")
    small = small_model(args)
    params, batch = jax.device_get(random_params(small)), batch_of(8, LENGTH, small.config.vocab_size)
    head = ["mesh", "step", "arguments", "temporaries", "fresh outputs", *COLLECTIVES, "operands", "moved"]
    head += ["moved, above base", "operands, above base", "on weights"]
    variants = [v for axes in MESHES for v in on_mesh(axes, small, params, batch, ("base", *METHODS))]
    measure(variants, args.rounds, warm_up=1)
    title(f"{args.layers} layers of {args.width}, float32, 8 x {LENGTH} tokens; per device")
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
        title(f"Llama {name}, float16, remat, 8 x {LENGTH} tokens; per device, only compiled")
        found = [v for axes in MESHES[3:] for v in on_mesh(axes, large, shapes, batch, ("base", "lora"))]
        markdown(head, [cells_of(v) for v in found])
        rows += [{"shape": name} | v.facts for v in found]
    return rows


def on_mesh(axes: dict[str, int], model: Decoder, params: Any, batch: Any, steps: tuple[str, ...]) -> list[Variant]:
    """Each step on a mesh of the first devices. With abstract parameters it is compiled but cannot run."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[: math.prod(axes.values())])
    placed, batch = jpeft.shard(params, mesh, names=models.logical_names(model)), jpeft.shard_batch(batch, mesh)
    out, name = [], " x ".join(f"{axis} {n}" for axis, n in axes.items())
    for kind in steps:
        if kind == "base":
            compiled, first = base_step(model, placed, batch)
        else:
            compiled, first = train_step(METHODS[kind], model, placed, batch)
        facts = {"mesh": name, "kind": kind, **compiled_facts(compiled), **traffic(compiled, placed)}
        base = out[0].facts if out else facts
        facts |= {f"{key} / base": facts[key] / base[key] if base[key] else None for key in ("moved", "operands")}
        run = functools.partial(run_step, compiled, [first], placed, batch, kind == "base")
        out.append(Variant(f"{name} {kind}", run, **facts))
    return out


def run_step(compiled: Any, holder: list[Any], params: Any, batch: Any, keeps: bool) -> None:
    """Runs one step. `keeps` is True for the base step, which has no state to update."""
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


def save(args: argparse.Namespace) -> Any:
    """The size of checkpoints, and the time to save them."""
    title(f"Checkpoints of {args.layers} layers of {args.width}, float32; percentages are of {INTERVAL} steps")
    timed = {name: save_times(method, small_model(args), args.rounds) for name, method in METHODS.items()}
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
    models_of |= {f"{n}, unrolled": m.clone(scan_layers=False) for n, m in models_of.items()}
    sizes = {name: incompressible(model) for name, model in models_of.items()}
    title("Checkpoints of LoRA with random bits, which do not compress")
    body = []
    for name, r in sizes.items():
        overhead = f"{(r['disk'] - r['state']) / 1024:+,.1f} KiB"
        body.append([name, str(r["leaves"]), mega(r["state"]), mega(r["disk"]), overhead])
    markdown(["", "leaves", "trainable and optimizer", "on disk", "overhead"], body)
    return {"timed": timed, "sizes": sizes}


def save_times(method: Any, model: Decoder, rounds: int) -> dict[str, float]:
    """Seconds by which a save delays training."""
    params, batch = random_params(model), batch_of(8, LENGTH, model.config.vocab_size)
    compiled, state = train_step(method, model, params, batch)
    holder = [state]
    run = functools.partial(run_step, compiled, holder, params, batch, False)
    alone, blocked, slowed = [], [], []
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_checkpoints(folder) as checkpoints:
        for i in range(rounds + 1):
            alone += [seconds(run) for _ in range(5)][1:]
            blocked.append(seconds(functools.partial(checkpoint.save, checkpoints, i, holder[0], {"step": i})))
            during = []
            while checkpoints.manager.is_saving_in_progress():
                during.append(seconds(run))
            slowed.append(sum(during) - len(during) * statistics.median(alone))
        disk = bytes_of_save(checkpoints, rounds)
    return {
        "state": state_bytes(holder[0]),
        "disk": disk,
        "step": statistics.median(alone),
        "first": blocked[0],
        "blocked": statistics.median(blocked[1:]),
        "slowed": statistics.median(slowed[1:]),
    }


def incompressible(model: Decoder) -> dict[str, int]:
    """Bytes of a checkpoint of LoRA with random bits. The base stays abstract."""
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
    """The effect of each way to save memory or FLOPs."""
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
        temporaries = "" if row["temporaries"] is None else mega(row["temporaries"])
        relative = "" if row["flops"] is None else f"{row['flops']:.2f}"
        body.append([name, temporaries, mega(row["weights"]), mega(row["state"]), relative])
    title(f"{args.layers} layers of {args.width}, 8 x {4 * LENGTH} tokens, on {jax.default_backend()}")
    markdown(["", "temporaries", "weights", "adapter and optimizer", "FLOPs / LoRA"], body)
    return rows


def main() -> None:
    parts = {"devices": devices, "checkpoint": save, "levers": levers}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts to run, separated by commas")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4, help="layers, in devices, checkpoint and levers")
    parser.add_argument("--width", type=int, default=512, help="hidden size, in devices, checkpoint and levers")
    parser.add_argument("--shapes", default=",".join(LLAMA), help="models that devices compiles")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
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
