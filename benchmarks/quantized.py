"""Quantized bases on SmolLM2-135M: size, error, the cost of a training step, and a comparison with qwix.

    python benchmarks/quantized.py [--only bits,error,step,memory,qwix,loss] [--rounds 8] [--layers 6] [--json FILE]

Blocks have 64 weights. A step is LoRA of rank 8 (alpha 16, no dropout) on all linear layers with AdamW; adapter, tokens
and loss are the same in all rows. `step`, `memory` and `qwix` use the first few of the model's 30 layers, with their
weights and the whole vocabulary of 49,152. Rounds are interleaved in a shuffled order, as in `benchmarks/step.py`; a
ratio of times is the median over rounds, each of which ran both. Temporaries, arguments and FLOPs are XLA's figures for
the compiled program. XLA counts the body of a scan once, so FLOPs are extrapolated from one and two unrolled layers.

bits    Bits per quantized weight, without the checksum of a leaf (8 bytes per matrix); bytes of leaves and of the tree.
error   ||W' - W|| / ||W||, and ||x W' - x W|| / ||x W|| for the inputs of each layer on a text (GSM8K) and for normal
        x, means over the 210 linear layers; the loss of the text; mean |W' - W| for 1024 x 1024 weights of N(0, 1).
step    jpeft's loss and training step on each base.
memory  Temporaries as layers are added, and those of the chunked loss against the whole logits.
qwix    QLoRA of qwix on the same model and weights. qwix does not quantize scales: "single" is jpeft without double
        quantization.
loss    Training of the whole model on the answers of GSM8K on each base, with the same batches and, except for LoftQ,
        the same initial adapter. Losses are means over 20 steps; perplexity is of held-out answers. Half an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import zlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, compiled_facts, cross_entropy, machine, markdown, measure, ratio, table
from decoder import abstract, mega, tokens

import jpeft
from jpeft.core.quantized import Quantized, dequantize_leaf, quantize_array
from jpeft.core.schemes import SCHEMES
from jpeft.core.tree import flatten, join, size_bytes, unflatten
from jpeft.models.decoder import Decoder
from jpeft.recipes.assets import resolve_conversations, resolve_model
from jpeft.recipes.tasks import chat
from jpeft.text import chat_template, conversations
from jpeft.training.losses import chunked_cross_entropy

BLOCK, RANK, ALPHA, TX = 64, 8, 16.0, optax.adamw(1e-4)
LORA = jpeft.LoRA(
    rank=RANK, alpha=ALPHA, targets="all-linear", init_weights="random"
)  # B is not zero, so that it has an effect
STATED = {
    "nf4": 0.072792
}  # mean error of normal weights in blocks of 64, as stated in bitsandbytes 0.50, tests/test_functional.py
DEPTHS = (2, 6, 12)
BF16 = jnp.bfloat16
PACKAGES = ("jax", "flax", "optax")


def as_text(path: Any, batch: int, length: int) -> np.ndarray:
    """Ids of questions and answers, one more per row than the length."""
    pairs = [json.loads(line) for line in resolve_conversations("gsm8k")[1].read_text().splitlines()[:200]]
    ids = chat_template.read(path).encode("\n\n".join(f"{p['question']}\n{p['answer']}" for p in pairs))
    return np.asarray(ids[: batch * (length + 1)], np.int32).reshape(batch, length + 1)


def as_batch(ids: np.ndarray) -> conversations.Batch:
    """A batch whose rows are one example each, with a weight of 1 for every target."""
    inputs = ids[:, :-1]
    places = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    weight = np.ones(inputs.shape, np.float32)
    return chat.balanced(conversations.Batch(inputs, np.ones_like(inputs), places, ids[:, 1:], weight))


def first_layers(model: Any, params: Any, layers: int) -> tuple[Any, Any]:
    """The model with only its first layers."""
    config = dataclasses.replace(model.config, num_hidden_layers=layers, layer_types=())
    inner = params["model"]
    cut = jax.tree.map(lambda x: x[:layers], inner["layers"])
    return Decoder(config), {**params, "model": {**inner, "layers": cut}}


def cast(params: Any, dtype: Any) -> Any:
    """The tree in another dtype; abstract leaves stay abstract."""

    def cast_leaf(x: Any) -> Any:
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree.map(cast_leaf, params)


def quantized_leaves(params: Any) -> dict[str, Quantized]:
    return {join(path): leaf for path, leaf in flatten(params).items() if isinstance(leaf, Quantized)}


def title(text: str) -> None:
    print(f"\n### {text}\n", flush=True)


# --- training steps ---


def lowered_step(model: Any, params: Any, batch: Any, plain: Any = None) -> tuple[Any, Any]:
    """jpeft's lowered training step and its state, abstract if the parameters are.

    Args:
      model: the model.
      params: its base weights.
      batch: the batch.
      plain: the weights before quantization, for `bind`, which does not accept abstract quantized weights.
    """
    peft = LORA.bind(model, params if plain is None else plain, *chat.example_inputs())
    adapter = peft.init(jax.random.key(0), params)
    state = jpeft.TrainState.create(peft, adapter, TX, jax.random.key(1))
    return jpeft.train_step(peft, chat.loss_fn(peft), TX).lower(state, params, batch), state


def step_over(name: str, model: Any, params: Any, batch: Any) -> Variant:
    """A training step of jpeft. Its facts include the losses before and after a step."""
    lowered, state = lowered_step(model, params, batch)
    compiled, holder = lowered.compile(), [state]

    def step() -> float:
        holder[0], metrics = compiled(holder[0], params, batch)
        return float(metrics["loss"])

    return Variant(name, step, **compiled_facts(compiled), losses=[step(), step()])


def flops_of(config: Any, batch: Any, change: Any, **options: Any) -> float:
    """FLOPs of a step, extrapolated from one and two unrolled layers: XLA counts the body of a scan once."""
    one, two = (abstract(config, n, scan_layers=False, **options) for n in (1, 2))
    one, two = (
        lowered_step(model, change(params), batch, params)[0].compile().cost_analysis()["flops"]
        for model, params in (one, two)
    )
    return one + (config.num_hidden_layers - 1) * (two - one)


# --- the parts ---


def bits(args: argparse.Namespace, path: Path) -> Any:
    """Bits per weight, and bytes."""
    _, params = jpeft.models.load(path)
    names = quantized_leaves(jpeft.quantize(params, block=BLOCK))
    plain = {join(p): leaf for p, leaf in flatten(params).items()}
    count, other = sum(leaf.size for leaf in names.values()), sum(plain[n].size for n in plain.keys() - names.keys())
    rows = []
    for name, wide in (("float32", 4), ("bfloat16", 2)):
        leaves = count * wide
        rows.append({"name": name, "bits": 8.0 * wide, "leaf_bytes": leaves, "tree_bytes": leaves + other * 4})
        rows[-1]["tree_bytes_bf16_rest"] = leaves + other * 2
    for scheme in SCHEMES:
        for double in (False, True):
            base = jpeft.quantize(params, scheme, block=BLOCK, double=double)
            leaves = quantized_leaves(base).values()
            own = sum(leaf.nbytes for leaf in leaves)
            rows.append(
                {
                    "name": f"{scheme}, double" if double else scheme,
                    "bits": sum(leaf.bits * leaf.size for leaf in leaves) / count,
                    "leaf_bytes": own,
                    "tree_bytes": size_bytes(base),
                    "tree_bytes_bf16_rest": own + other * 2,
                }
            )
            assert rows[-1]["tree_bytes"] == own + other * 4
    title(f"Bits: {count:,} quantized weights of {count + other:,} (without the tied embedding and the norms)")
    head = ["", "bits / weight", "quantized leaves", "/ bfloat16", "/ float32"]
    head += ["whole tree, rest float32", "/ float32 tree", "whole tree, rest bfloat16", "/ bfloat16 tree"]
    wide, narrow = rows[:2]
    body = []
    for r in rows:
        leaves, tree, rest = r["leaf_bytes"], r["tree_bytes"], r["tree_bytes_bf16_rest"]
        cells = [mega(leaves), f"{leaves / narrow['leaf_bytes']:.4f}", f"{leaves / wide['leaf_bytes']:.4f}"]
        cells += [mega(tree), f"{tree / wide['tree_bytes']:.3f}"]
        cells += [mega(rest), f"{rest / narrow['tree_bytes_bf16_rest']:.3f}"]
        body.append([r["name"], f"{r['bits']:.4f}", *cells])
    markdown(head, body)
    return rows


def inputs_of_layers(model: Any, params: Any, ids: np.ndarray) -> dict[str, jax.Array]:
    """The inputs of each linear layer, `[layers, tokens, in]`, by the path of its kernel."""
    flat = model.clone(scan_layers=False)

    @jax.jit
    def run(params: Any, ids: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        seen = {}

        def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                seen[context.module.path] = args[0].reshape(-1, args[0].shape[-1])
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            flat.apply({"params": params}, ids, logits_to_keep=1)
        return seen

    seen = run(jpeft.models.unstack(params), ids)
    tree = jpeft.models.stack(unflatten({(*path, "kernel"): x for path, x in seen.items()}))
    return {join(path): x for path, x in flatten(tree).items()}


@jax.jit
def errors_of(weight: jax.Array, moved: jax.Array, x: jax.Array, normal: jax.Array) -> jax.Array:
    """Relative errors of stacked weights and of their products with two inputs, summed over the stack."""

    def norm(a: jax.Array) -> jax.Array:
        return jnp.sqrt((a * a).sum((-2, -1)))

    off = moved - weight
    of = [(off, weight), (x @ off, x @ weight), (normal @ off, normal @ weight)]
    return jnp.stack([(norm(a) / norm(b)).sum() for a, b in of])


def error(args: argparse.Namespace, path: Path) -> Any:
    """The error of quantization."""
    model, params = jpeft.models.load(path)
    ids = as_text(path, 1, args.length)
    inputs, names = inputs_of_layers(model, params, ids[:, :-1]), quantized_leaves(jpeft.quantize(params))
    plain = {join(p): leaf for p, leaf in flatten(params).items()}
    assert inputs.keys() == names.keys()
    layers = sum(plain[n].shape[0] for n in names)
    rng = np.random.default_rng(0)
    normal = {n: rng.normal(size=(args.length, x.shape[-1])).astype(np.float32) for n, x in inputs.items()}
    random = rng.normal(size=(1024, 1024)).astype(np.float32)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return cross_entropy(model.apply({"params": params}, ids[:, :-1]), ids[:, 1:])

    def row(name: str, base: Any, moved: jax.Array) -> dict[str, Any]:
        leaves = {join(p): leaf for p, leaf in flatten(base).items()}
        errors = jnp.zeros(3)
        for n in names:
            errors += errors_of(plain[n], dequantize_leaf(leaves[n]).astype(jnp.float32), inputs[n], normal[n])
        weight, text, noise = (float(e) for e in errors / layers)
        gauss = float(jnp.abs(moved.astype(jnp.float32) - random).mean())
        return {"name": name, "weight": weight, "text": text, "normal": noise, "loss": float(loss(base)), "mae": gauss}

    base_loss = float(loss(params))
    rounded = {p: x.astype(BF16).astype(jnp.float32) if join(p) in names else x for p, x in flatten(params).items()}
    rows = [row("bfloat16", unflatten(rounded), jnp.asarray(random).astype(BF16))]
    for scheme in SCHEMES:
        for double in (False, True):
            base = jpeft.quantize(params, scheme, block=BLOCK, double=double)
            moved = quantize_array(random, scheme, BLOCK, double).unbox()
            rows.append(row(f"{scheme}, double" if double else scheme, base, moved))
            rows[-1] |= bitsandbytes_errors(random, moved, scheme, double)
    title(f"Error, means over {layers} linear layers, blocks of {BLOCK}; loss of the text in float32: {base_loss:.4f}")
    head = ["", "W", "x W, x of a text", "x W, normal x", "loss of the text", "above float32"]
    head += ["mean abs error, N(0, 1)", "stated by bitsandbytes", "of bitsandbytes", "largest difference from it"]
    body = []
    for r in rows:
        known = ["", "", ""]
        if "bitsandbytes" in r:
            known = [f"{r['stated']:.6f}" if r["stated"] else "", f"{r['bitsandbytes']:.6f}", f"{r['largest']:.1e}"]
        cells = [f"{r[k]:.5f}" for k in ("weight", "text", "normal")]
        cells += [f"{r['loss']:.4f}", f"{r['loss'] - base_loss:+.4f}", f"{r['mae']:.6f}"]
        body.append([r["name"], *cells, *known])
    markdown(head, body)
    return {"rows": rows, "loss": base_loss}


def bitsandbytes_errors(weight: np.ndarray, ours: jax.Array, scheme: str, double: bool) -> dict[str, Any]:
    """Errors of bitsandbytes on the same weights, if it is installed and supports the scheme in blocks."""
    if scheme != "nf4" or importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes.functional as bnb
    import torch

    held = torch.tensor(weight.T.copy())  # [out, in]: blocks run along the inputs
    codes, state = bnb.quantize_4bit(held, blocksize=BLOCK, compress_statistics=double, quant_type=scheme)
    moved = bnb.dequantize_4bit(codes, state).numpy().T
    largest = float(np.abs(moved - np.asarray(ours)).max())
    stated = None if double else STATED[scheme]
    return {"bitsandbytes": float(np.abs(moved - weight).mean()), "largest": largest, "stated": stated}


def step(args: argparse.Namespace, path: Path) -> Any:
    """The cost of a training step on each base."""
    model, params = first_layers(*jpeft.models.load(path), args.layers)
    batch = as_batch(as_text(path, args.batch, args.length))
    narrow = functools.partial(cast, dtype=BF16)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "float32": (lambda tree: tree, {}),
        "bfloat16 base, float32 products": (narrow, {"dtype": jnp.float32, "param_dtype": BF16}),
        "bfloat16": (narrow, {"param_dtype": BF16}),
    }
    for scheme in SCHEMES:
        kinds[scheme] = (functools.partial(jpeft.quantize, scheme=scheme, block=BLOCK), {})
    variants = [step_over(n, model.clone(**options), change(params), batch) for n, (change, options) in kinds.items()]
    for v in variants:
        change, options = kinds[v.name]
        options = {k: x for k, x in options.items() if k != "param_dtype"}  # done by `change`
        v.facts["flops"] = flops_of(model.config, batch, change, **options)
    measure(variants, args.rounds, warm_up=1)
    rows, base = table(variants), variants[0]
    shape = f"{args.batch} x {args.length} tokens"
    title(f"Training step, LoRA rank {RANK}, {shape}, the first {args.layers} of 30 layers (double quantization)")
    head = ["", "median ms", "time / float32", "temporaries", "- float32's", "arguments", "GFLOP", "/ float32"]
    head += ["loss", "after a step"]
    body = []
    for r, v in zip(rows, variants, strict=True):
        r["ratio"] = ratio(v, base)
        more = v.facts["temporary_bytes"] - base.facts["temporary_bytes"]
        cells = [f"{r['median_ms']:.0f}", f"{r['ratio']:.2f}", mega(r["temporary_bytes"]), f"{more / 1e6:+,.1f} MB"]
        cells += [mega(r["argument_bytes"]), f"{r['flops'] / 1e9:.1f}", f"{r['flops'] / base.facts['flops']:.3f}"]
        body.append([r["name"], *cells, *(f"{x:.4f}" for x in r["losses"])])
    markdown(head, body)
    return rows


def memory(args: argparse.Namespace, path: Path) -> Any:
    """Temporaries of a step."""
    model, params = jpeft.models.load(path)
    return {"depth": depth(args, model.config), "loss": losses(args, model, params, path)}


def depth(args: argparse.Namespace, config: Any) -> Any:
    """Temporaries as layers are added. Programs are only compiled."""
    batch = as_batch(tokens(args.batch, args.length, config.vocab_size))
    weights = sum(leaf.size for leaf in quantized_leaves(jpeft.quantize(abstract(config, 1)[1])).values()) * 4
    rows = []
    for scan in (True, False):
        for base in ("float32", "nf4", "int8", "fp8") if scan else ("float32", "nf4"):
            change = (lambda tree: tree) if base == "float32" else functools.partial(jpeft.quantize, scheme=base)
            row: dict[str, Any] = {"layers": "scanned" if scan else "unrolled", "base": base, "bytes": {}}
            for n in DEPTHS:
                deep, shapes = abstract(config, n, scan_layers=scan)
                compiled = lowered_step(deep, change(shapes), batch, shapes)[0].compile()
                row["bytes"][n] = compiled_facts(compiled)["temporary_bytes"]
            row["growth"] = (row["bytes"][DEPTHS[-1]] - row["bytes"][DEPTHS[0]]) / (DEPTHS[-1] - DEPTHS[0])
            rows.append(row)
    plain = {r["layers"]: r for r in rows if r["base"] == "float32"}
    title(
        f"Temporaries with depth, {args.batch} x {args.length} tokens; the weights of a layer take "
        f"{weights / 1e6:.2f} MB in float32"
    )
    head = ["layers", "base", *(f"{n} layers" for n in DEPTHS), "growth per layer", "- float32's"]
    head += ["/ float weights of a layer", *(f"- float32's, {n} layers" for n in DEPTHS)]
    body = []
    for r in rows:
        less = r["growth"] - plain[r["layers"]]["growth"]
        cells = [mega(x) for x in r["bytes"].values()]
        cells += [f"{r['growth'] / 1e6:.2f} MB", f"{less / 1e6:+.3f} MB", f"{less / weights:+.4f}"]
        cells += [f"{(x - plain[r['layers']]['bytes'][n]) / 1e6:+.2f} MB" for n, x in r["bytes"].items()]
        body.append([r["layers"], r["base"], *cells])
    markdown(head, body)
    return {"rows": rows, "layer_bytes": weights}


def losses(args: argparse.Namespace, model: Any, params: Any, path: Path) -> Any:
    """The chunked loss, and the loss of the whole logits."""
    rows, length = 4, 512
    model, params = first_layers(model, params, 2)
    batch = as_batch(as_text(path, rows, length))
    peft = LORA.bind(model, params, *chat.example_inputs())
    adapter = peft.init(jax.random.key(0), params)
    options = {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids}

    def whole(adapter: Any, params: Any) -> jax.Array:
        logits = peft.apply(params, adapter, batch.input_ids, **options)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return (each * batch.weight).sum() / rows

    def chunked(adapter: Any, params: Any, chunk: int) -> jax.Array:
        states = peft.apply(params, adapter, batch.input_ids, **options, method="hidden_states")
        head = functools.partial(peft.apply, params, adapter, method="logits")
        return chunked_cross_entropy(head, states, batch.targets, batch.weight, chunk)[0] / rows

    def own(adapter: Any, params: Any) -> jax.Array:
        return chat.loss_fn(peft)(adapter, params, batch, jax.random.key(0))[0]

    kinds = {"whole logits": whole, "chat.loss_fn": own}
    kinds |= {f"chunks of {n}": functools.partial(chunked, chunk=n) for n in (512, 256)}
    variants, results = [], {}
    for name, fn in kinds.items():
        compiled = jax.jit(jax.value_and_grad(fn)).lower(adapter, params).compile()
        results[name] = jax.device_get(compiled(adapter, params))
        run = functools.partial(lambda c: jax.block_until_ready(c(adapter, params)), compiled)
        variants.append(Variant(name, run, **compiled_facts(compiled)))
    measure(variants, max(1, args.rounds // 2), warm_up=1)
    out, (loss, gradient) = table(variants), results["whole logits"]
    leaves = jax.tree.leaves(gradient)
    top = float(np.max([np.abs(x).max() for x in leaves]))
    logits = rows * length * model.config.vocab_size * 4
    title(
        f"Loss and gradient, {rows} x {length} tokens, 2 layers: the logits are {mega(logits)}; the largest gradient "
        f"is {top:.2e}"
    )
    body = []
    for r, v in zip(out, variants, strict=True):
        r["loss"], r["ratio"] = float(results[v.name][0]), ratio(v, variants[0])
        r["loss_off"] = abs(float(results[v.name][0]) - float(loss))
        pairs = zip(jax.tree.leaves(results[v.name][1]), leaves, strict=True)
        r["gradient_off"] = float(np.max([np.abs(a - b).max() for a, b in pairs]))  # max keeps NaN
        cells = [mega(r["temporary_bytes"]), f"{r['temporary_bytes'] / variants[0].facts['temporary_bytes']:.2f}"]
        cells += [f"{r['ratio']:.2f}", f"{r['loss']:.6f}", f"{r['loss_off']:.1e}", f"{r['loss_off'] / loss:.1e}"]
        body.append([v.name, *cells, f"{r['gradient_off']:.1e}", f"{r['gradient_off'] / top:.1e}"])
    head = ["", "temporaries", "/ whole", "time / whole", "loss", "loss difference", "/ loss", "gradient difference"]
    markdown([*head, "/ largest"], body)
    return out


# --- qwix ---


def qwix_base(model: Any, params: Any, ids: np.ndarray) -> tuple[Any, Any]:
    """qwix's model and its quantized tree. qwix reads `tiled_axes` by position, so layers are quantized unrolled."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*_proj", rank=RANK, alpha=ALPHA, weight_qtype="nf4", tile_size=BLOCK)
    unrolled = model.clone(scan_layers=False)
    flat = params if model.scan_layers is False else jpeft.models.unstack(params)
    shapes = jax.eval_shape(qwix.apply_lora_to_model(unrolled, provider).init, jax.random.key(0), ids)["params"]
    base = qwix.quantize_params(flat, shapes)
    if model.scan_layers:
        inner = base["model"]
        layers = [inner["layers"][str(i)] for i in range(model.config.num_hidden_layers)]
        base = {**base, "model": {**inner, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}
    return qwix.apply_lora_to_model(model, provider), base


def packed_bytes(tree: Any) -> int:
    """Bytes of arrays, with two 4-bit numbers per byte, as XLA stores them."""

    def bits(dtype: Any) -> int:
        return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize

    return sum(-(-leaf.size * bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


def plain_loss(logits: jax.Array, ids: Any) -> jax.Array:
    return cross_entropy(logits, ids[:, 1:])


def jpeft_step(name: str, model: Any, params: Any, ids: np.ndarray) -> tuple[Variant, Any]:
    """jpeft with a plain loss, and its initial adapter."""
    peft = LORA.bind(model, params, *chat.example_inputs())
    adapter = peft.init(jax.random.key(0), params)

    def loss_fn(adapter: Any, params: Any, ids: Any, rng: jax.Array) -> Any:
        return plain_loss(peft.apply(params, adapter, ids[:, :-1]), ids), {}

    state = jpeft.TrainState.create(peft, adapter, TX, jax.random.key(1))
    compiled, holder = jpeft.train_step(peft, loss_fn, TX).lower(state, params, ids).compile(), [state]

    def run() -> float:
        holder[0], metrics = compiled(holder[0], params, ids)
        return float(metrics["loss"])

    leaves = quantized_leaves(params)
    facts = {"leaf_bytes": packed_bytes(leaves), "tree_bytes": packed_bytes(params)}
    return Variant(name, run, **compiled_facts(compiled), **facts, losses=[run(), run(), run()]), adapter


def qwix_step(name: str, model: Any, params: Any, ids: np.ndarray, adapter: Any) -> Variant:
    """qwix with the same initial adapter."""
    lora, base = qwix_base(model, params, ids[:, :-1])
    own = unflatten({(*p[:-1], f"kernel_{p[-1]}"): jnp.copy(x) for p, x in flatten(adapter).items()})

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(own: Any, opt_state: Any, base: Any, ids: Any) -> Any:
        def loss(own: Any) -> jax.Array:
            return plain_loss(lora.apply({"params": jpeft.combine(base, own)}, ids[:, :-1]), ids)

        value, grads = jax.value_and_grad(loss)(own)
        updates, opt_state = TX.update(grads, opt_state, own)
        return optax.apply_updates(own, updates), opt_state, value

    holder = [own, TX.init(own)]
    compiled = step_fn.lower(*holder, base, ids).compile()

    def run() -> float:
        holder[0], holder[1], value = compiled(*holder, base, ids)
        return float(value)

    leaves = [x for p, x in flatten(base).items() if not isinstance(x, jax.Array)]  # WithAux
    facts = {"leaf_bytes": packed_bytes(leaves), "tree_bytes": packed_bytes(base)}
    return Variant(name, run, **compiled_facts(compiled), **facts, losses=[run(), run(), run()])


def qwix(args: argparse.Namespace, path: Path) -> Any:
    """QLoRA of qwix and jpeft on an NF4 base of the same model."""
    model, params = first_layers(*jpeft.models.load(path), args.layers)
    ids = as_text(path, args.batch, args.length)
    variants, pairs = [], []
    for scan in (True, False):
        kind = "scanned" if scan else "unrolled"
        layout = model.clone(scan_layers=scan)
        weights = params if scan else jpeft.models.unstack(params)
        bases = {
            "": jpeft.quantize(weights, "nf4", block=BLOCK),
            ", single": jpeft.quantize(weights, "nf4", block=BLOCK, double=False),
        }
        ours = [jpeft_step(f"jpeft{suffix}, {kind}", layout, base, ids) for suffix, base in bases.items()]
        theirs = qwix_step(f"qwix, {kind}", layout, weights, ids, ours[0][1])
        np.testing.assert_allclose(theirs.facts["losses"], ours[1][0].facts["losses"], atol=2e-3, err_msg="losses")
        variants += [*(v for v, _ in ours), theirs]
        pairs += [(v, theirs) for v, _ in ours]
    measure(variants, args.rounds, warm_up=1)
    rows, by = table(variants), {v.name: t for v, t in pairs}
    shape = f"{args.batch} x {args.length} tokens"
    title(f"QLoRA of qwix and jpeft, NF4, rank {RANK}, {shape}, the first {args.layers} of 30 layers")
    head = ["", "median ms", "time / qwix", "temporaries", "/ qwix", "quantized leaves", "/ qwix", "whole base"]
    head += ["arguments", "loss", "after two steps"]
    body = []
    for r, v in zip(rows, variants, strict=True):
        against = by.get(v.name, v)
        r["ratio"] = ratio(v, against)
        cells = [f"{r['median_ms']:.0f}", f"{r['ratio']:.2f}"]
        for key in ("temporary_bytes", "leaf_bytes"):
            cells += [f"{r[key] / 1e6:,.1f} MB", f"{r[key] / against.facts[key]:.3f}"]
        cells += [mega(r["tree_bytes"]), mega(r["argument_bytes"]), f"{r['losses'][0]:.6f}", f"{r['losses'][-1]:.6f}"]
        body.append([v.name, *cells])
    markdown(head, body)
    return rows


# --- training ---


def checksums(params: Any) -> list[int]:
    return [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(params)]


def loss(args: argparse.Namespace, path: Path) -> Any:
    """Losses of training on each base."""
    model, full = jpeft.models.load(path)
    tokenizer, (train_file, test_file) = chat_template.read(path), resolve_conversations("gsm8k")
    assert test_file is not None
    train, test = (
        conversations.encode(conversations.read(file).take(range(size), str(file)), tokenizer, args.length)
        for file, size in ((train_file, 4000), (test_file, 64))
    )
    batches = conversations.Batches(train, 1, args.length, seed=0)
    held_out = list(conversations.Batches(test, 1, args.length))
    lora = dataclasses.replace(LORA, rank=args.rank, alpha=2.0 * args.rank, init_weights="kaiming")
    peft = lora.bind(model, full, *chat.example_inputs())
    first = peft.init(jax.random.key(0), full)
    loftq = functools.partial(jpeft.loftq, peft, full, jax.random.key(0), "nf4", iterations=5)
    kinds = {
        "float32": lambda: (full, first),
        "nf4": lambda: (jpeft.quantize(full, "nf4", block=BLOCK), first),
        "nf4+loftq": lambda: loftq(block=BLOCK),
        "nf4/32+loftq": lambda: loftq(block=32),  # 4.254 bits per weight
        "int8": lambda: (jpeft.quantize(full, "int8", block=BLOCK), first),
    }
    bases = {name: kinds[name]() for name in args.bases.split(",")}
    score, tx = chat.scorer(peft), optax.adamw(optax.linear_schedule(5e-4, 0, args.steps))
    step = jpeft.train_step(peft, chat.loss_fn(peft), tx, clip=1.0)
    runs, states = {}, {}
    for name, (base, adapter) in bases.items():
        before = chat.evaluate(score, base, adapter, held_out).perplexity
        runs[name] = {"name": name, "before": before, "losses": [], "checksums": checksums(base)}
        states[name] = jpeft.TrainState.create(peft, jax.tree.map(jnp.copy, adapter), tx, jax.random.key(1))
    for i in range(args.steps):
        batch = chat.balanced(batches[i])
        for name, (base, _) in bases.items():
            states[name], metrics = step(states[name], base, batch)
            runs[name]["losses"].append(float(metrics["loss"]))
    for name, (base, _) in bases.items():
        runs[name]["after"] = chat.evaluate(score, base, states[name].adapter, held_out).perplexity
        runs[name]["unchanged"] = runs[name].pop("checksums") == checksums(base)
    window = min(20, args.steps)
    ends = sorted({window, args.steps // 4, args.steps // 2, args.steps})

    def mean_loss(row: Any, end: int) -> float:
        return float(np.mean(row["losses"][max(0, end - window) : end]))

    title(
        f"Loss of {args.steps} steps of LoRA, rank {args.rank}, on answers of GSM8K, 1 x {args.length} tokens per step"
    )
    head = ["", *(f"up to step {end}" for end in ends), "all steps", "/ float32", "perplexity before", "after"]
    body, plain = [], next(iter(runs.values()))
    for r in runs.values():
        mean = float(np.mean(r["losses"]))
        r["ratio"] = mean / float(np.mean(plain["losses"]))
        cells = [f"{mean_loss(r, end):.3f} ({mean_loss(r, end) / mean_loss(plain, end) - 1:+.1%})" for end in ends]
        cells += [f"{mean:.3f}", f"{r['ratio']:.3f}", f"{r['before']:.3f}", f"{r['after']:.3f}"]
        body.append([r["name"], *cells, "identical" if r["unchanged"] else "CHANGED"])
    markdown([*head, "base afterwards"], body)
    return list(runs.values())


def main() -> None:
    parts = {"bits": bits, "error": error, "step": step, "memory": memory, "qwix": qwix, "loss": loss}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts to run, separated by commas")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", default=None, help="a HuggingFace folder or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model, in step and qwix")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200, help="training steps, in loss")
    parser.add_argument("--rank", type=int, default=RANK, help="rank of LoRA, in loss")
    parser.add_argument(
        "--bases", default="float32,nf4,nf4+loftq,nf4/32+loftq,int8", help="bases in loss; ratios are to the first"
    )
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - parts.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    used = {"qwix": "qwix", "error": "bitsandbytes"}
    packages = [p for part, p in used.items() if part in args.only.split(",") and importlib.util.find_spec(p)]
    out: dict[str, Any] = {"machine": machine([*PACKAGES, *packages]), "arguments": vars(args)}
    print(", ".join(f"{k} {v}" for k, v in out["machine"].items()))
    path = resolve_model("smollm2") if args.model is None else Path(args.model)
    for name in args.only.split(","):
        out[name] = parts[name](args, path)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
