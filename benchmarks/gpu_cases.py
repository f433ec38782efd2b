"""One measurement of `benchmarks/gpu.py` in a process of its own: a peak of memory cannot be reset.

    python benchmarks/gpu_cases.py '{"what": "probe"}'

The case is JSON; the result is the last line of the output, JSON too. Weights are random, and made on the device, one
layer at a time, so that making them takes less memory than a step.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, measure, ratio
from methods import BASE, configured

import jpeft
from jpeft.core.tree import count, size_bytes
from jpeft.errors import UserError
from jpeft.hardware import utilization
from jpeft.methods import METHODS, Method
from jpeft.models import loading
from jpeft.recipes.tasks import chat
from jpeft.text.conversations import Batch
from jpeft.training.losses import chunked_cross_entropy

TX = optax.adamw(1e-4)
CHUNK = 1024  # tokens whose logits are held at once, as in `jpeft finetune`


# --- what is measured ---


def lora(case: dict[str, Any]) -> jpeft.LoRA:
    return jpeft.LoRA(rank=case["rank"], alpha=case["alpha"], targets="all-linear")


def abstract_model(case: dict[str, Any]) -> tuple[Any, Any]:
    """The model and its abstract parameters."""
    scheme = "nf4" if case["quantized"] else None
    remat = None if case["remat"] == "none" else case["remat"]
    return loading.abstract(case["config"], param_dtype=jnp.bfloat16, quantize=scheme, remat=remat)


def random_params(shapes: Any) -> Any:
    """Weights of N(0, 0.02²) and norms of 1; a quantized weight gets random codes."""
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    made: dict[int, jax.Array] = {}
    for i in sorted(range(len(paths)), key=lambda i: len(paths[i][1].shape)):  # embeddings first, then stacked layers
        path, leaf = paths[i]
        norm = jax.tree_util.keystr(path).endswith("['scale']")
        key = jax.random.fold_in(jax.random.key(0), i)
        made[i] = jnp.ones(leaf.shape, leaf.dtype) if norm else filled(key, leaf.shape, leaf.dtype)
        jax.block_until_ready(made[i])  # so that the temporaries of two leaves are never there at once
    return jax.tree.unflatten(structure, [made[i] for i in range(len(paths))])


@functools.partial(jax.jit, static_argnums=(1, 2))
def filled(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random values, one layer of a stack after the other."""

    def one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.bits(key, shape, dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    if len(shape) < 3:
        return one(key, shape)
    return jax.lax.map(lambda key: one(key, shape[1:]), jax.random.split(key, shape[0]))


def full_rows(case: dict[str, Any]) -> Batch:
    """Random tokens in rows without padding, every target with a weight."""
    rows, length = case["rows"], case["length"]
    ids = np.random.default_rng(0).integers(0, case["config"]["vocab_size"], (rows, length + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    return chat.balanced(Batch(ids[:, :-1], ones, places, ids[:, 1:], ones.astype(np.float32)))


def peak_bytes() -> int | None:
    """The most memory that this process has held on its device; None where the backend does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# --- the cases ---


def probe(case: dict[str, Any]) -> dict[str, Any]:
    """The device."""
    device = jax.local_devices()[0]
    return {
        "backend": jax.default_backend(),
        "kind": device.device_kind,
        "platform": " ".join(device.client.platform_version.split()),
        "devices": jax.device_count(),
        "peak_flops": utilization.peak_flops(device.device_kind),
    }


def step_of(case: dict[str, Any], model: Any, params: Any, method: Method | None = None) -> tuple[Any, Any]:
    """The step of `jpeft finetune` and its state, abstract if the parameters are. ``method``: by default LoRA."""
    peft, key = (method or lora(case)).bind(model, params, *chat.example_inputs()), jax.random.key(1)
    state = jpeft.TrainState.create(peft, peft.init(key, params), TX, key)
    return jpeft.train_step(peft, chat.loss_fn(peft), TX, clip=1.0), state


def train(case: dict[str, Any]) -> dict[str, Any]:
    """A training step: time, time to the first one, memory and FLOPs."""
    model, shapes = abstract_model(case)
    params, host_batch = random_params(shapes), full_rows(case)
    batch = jax.block_until_ready(jax.device_put(host_batch))
    loading_peak, start = peak_bytes(), time.perf_counter()
    step, state = step_of(case, model, params)
    adapter = jax.eval_shape(lambda x: x, state.adapter)
    compiled = step.lower(state, params, batch).compile()
    compiled_after = time.perf_counter() - start
    state, metrics = jax.block_until_ready(compiled(state, params, batch))
    first, times = time.perf_counter() - start, []
    for _ in range(case["rounds"] + 2):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, params, batch))
        times.append(time.perf_counter() - start)
    if not np.isfinite(loss := float(metrics["loss"])):
        raise FloatingPointError(f"the loss is {loss}")
    memory, tokens = compiled.memory_analysis(), int((host_batch.segment_ids > 0).sum())
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    sizes = {"tokens": host_batch.input_ids.size, "length": case["length"]}
    return {
        "seconds": statistics.median(times[2:]),
        "first_seconds": first,
        "compile_seconds": compiled_after,
        "tokens": tokens,
        "flops_4n": utilization.step_flops(model, params, tokens=sizes["tokens"], length=0),
        "flops": utilization.peft_flops(step.peft, params, adapter, **sizes),
        "loading_peak_bytes": loading_peak,
        "peak_bytes": peak_bytes(),
        "program_bytes": held + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "base_bytes": size_bytes(params),
        "trained": count(adapter),
        "loss": loss,
    }


def plan(case: dict[str, Any]) -> dict[str, Any]:
    """The memory that `jpeft plan` predicts for the step, compiled for the attached device."""
    model, params = abstract_model(case)
    step, state = step_of(case, model, params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), full_rows(case))
    topology = f"{case['backend']}:1"
    try:
        found = jpeft.plan(step, state, params, batch, topology, against_base=False)
    except UserError as error:
        return {"missing": str(error)}
    return {"topology": topology, "bytes": found.memory.total, "compile_seconds": found.compile_seconds}


def forms(case: dict[str, Any]) -> dict[str, Any]:
    """The model without adapter, with it and with it merged: `(model, peft, params, adapter)`."""
    model, shapes = abstract_model(case)
    params = random_params(shapes)
    peft = lora(case).bind(model, params, *chat.example_inputs())
    adapter = peft.init(jax.random.key(1), params)
    merged = jax.block_until_ready(peft.merge(params, adapter))
    return {
        "no adapter": (model, None, params, None),
        "adapter": (model, peft, params, adapter),
        "merged": (model, None, merged, None),
    }


def rates(variants: list[Variant], rounds: int, tokens: int) -> dict[str, Any]:
    """Median seconds of each variant, tokens per second, and its time relative to the first."""
    measure(variants, rounds)
    return {
        v.name: {
            "seconds": (median := statistics.median(v.times)),
            "tokens_per_second": tokens / median,
            "relative": ratio(v, variants[0]),
            **v.facts,
        }
        for v in variants
    }


def forward(case: dict[str, Any]) -> dict[str, Any]:
    """The loss of a batch, without gradients."""
    batch, variants = jax.device_put(full_rows(case)), []
    for name, (model, peft, params, adapter) in forms(case).items():
        base = lambda params, adapter, *inputs, model=model, **more: model.apply({"params": params}, *inputs, **more)  # noqa: E731
        loss = jax.jit(loss_of(types.SimpleNamespace(apply=base) if peft is None else peft))
        start = time.perf_counter()
        compiled = loss.lower(params, adapter, batch).compile()
        facts = {"compile_seconds": time.perf_counter() - start}
        run = functools.partial(compiled, params, adapter, batch)
        variants.append(Variant(name, lambda run=run: run().block_until_ready(), **facts))
    return rates(variants, case["rounds"], batch.input_ids.size)


def loss_of(bound: Any) -> Callable[..., jax.Array]:
    """The loss as a function of `(params, adapter, batch)`."""

    def loss(params: Any, adapter: Any, batch: Batch) -> jax.Array:
        states = bound.apply(
            params,
            adapter,
            batch.input_ids,
            position_ids=batch.position_ids,
            segment_ids=batch.segment_ids,
            method="hidden_states",
        )
        head = functools.partial(bound.apply, params, adapter, method="logits")
        return chunked_cross_entropy(head, states, batch.targets, batch.weight, CHUNK)[0]

    return loss


def decode(case: dict[str, Any]) -> dict[str, Any]:
    """Greedy decoding: prompts of one length, then new tokens; their difference is the time of decoding."""
    new, rng = case["new"], np.random.default_rng(0)
    prompts = rng.integers(0, case["config"]["vocab_size"], (case["prompts"], case["prompt"])).tolist()
    firsts, alls = [], []
    for name, (model, peft, params, adapter) in forms(case).items():
        under = {} if peft is None else {"peft": peft, "adapter": adapter}
        run = functools.partial(jpeft.generate, model, params, prompts, stop_ids=(), **under)
        firsts.append(Variant(name, functools.partial(run, max_new_tokens=1)))
        alls.append(Variant(name, functools.partial(run, max_new_tokens=new)))
    measure(firsts + alls, case["rounds"])
    out: dict[str, Any] = {}
    for one, every in zip(firsts, alls, strict=True):
        prefill, whole = (statistics.median(v.times) for v in (one, every))
        seconds = (whole - prefill) / (new - 1)  # of one step, which makes a token of every row
        out[one.name] = {
            "prefill_seconds": prefill,
            "seconds": seconds,
            "prefill_tokens_per_second": len(prompts) * case["prompt"] / prefill,
            "tokens_per_second": len(prompts) / seconds,
        }
    for row in out.values():
        row["relative"] = row["seconds"] / out["no adapter"]["seconds"]
    return out


def each_method(case: dict[str, Any]) -> dict[str, Any]:
    """A training step of every method, each timed in rounds of its own beside LoRA's."""
    model, shapes = abstract_model(case)
    params, batch = random_params(shapes), jax.block_until_ready(jax.device_put(full_rows(case)))
    end = time.monotonic() + case["seconds"]

    def variant(name: str) -> Variant:
        step, state = step_of(case, model, params, configured(name))
        trained, _ = jpeft.partition(state.adapter, step.peft.labels(state.adapter))
        compiled, holder, size = step.lower(state, params, batch).compile(), [state], count(trained)

        def run() -> None:
            holder[0], metrics = compiled(holder[0], params, batch)
            jax.block_until_ready(metrics)

        return Variant(name, run, trained=size, temporary_bytes=compiled.memory_analysis().temp_size_in_bytes)

    base, out = variant(BASE), {}
    for name in dict.fromkeys((BASE, *METHODS)):
        if time.monotonic() > end:
            out[name] = {"missing": "the time is up"}
            continue
        try:
            own = base if name == BASE else variant(name)
        except ValueError as error:  # the model has nothing that the method can act on
            out[name] = {"missing": str(error)}
            continue
        base.times.clear()
        measure(list(dict.fromkeys((base, own))), case["rounds"])
        relative = {"time": ratio(own, base)}
        relative["temporary_bytes"] = own.facts["temporary_bytes"] / base.facts["temporary_bytes"]
        out[name] = {"seconds": statistics.median(own.times), **own.facts, "relative": relative}
    return out


CASES = {"probe": probe, "train": train, "plan": plan, "forward": forward, "decode": decode, "methods": each_method}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(CASES[asked["what"]](asked)))
