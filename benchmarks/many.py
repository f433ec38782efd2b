"""Many adapters over one base: in one batch, in one training step, behind one engine; beside HuggingFace PEFT.

    python benchmarks/many.py [--rounds 6] [--only prefill,decode,population,engine,gpu] [--no-torch] [--tiny]

A decoder of 8 layers of width 384 with random weights, in float32, unrolled, and LoRA of rank 8 on all its linear
layers. Rounds are interleaved in a shuffled order, as in `benchmarks/step.py`; a ratio is the median over rounds, each
of which ran both, and that of the fastest.

prefill     The first token of 64 prompts of 128 tokens under 1, 8 and 64 adapters of a bank, `jpeft.generate(…,
            adapter_ids=[…])`; "loop": one call for each adapter. torch: `generate(…, adapter_names=[…])` of HuggingFace
            PEFT, its mixed batch.
decode      A token of each of these rows: the time to generate 17 tokens less that to generate
            one, divided by 16. "temporaries" are those of the compiled program.
population  Eight adapters of `jpeft.Population` in one step, against eight steps one after the other, at 16, 128 and
            512 tokens a member.
engine      64 requests of 32 tokens under 8 adapters through `jpeft.Engine` with 16 rows, and one by one.
gpu         Decoding at the shape of Llama 3.1 8B in bfloat16, 64 rows under 64 and under 8 adapters: a copy for each
            row, groups of rows that share one, and all adapters as one LoRA of their ranks together, whose other
            columns are masked in each row. It runs where there is a GPU, or on a tiny model with --tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, machine, markdown, measure, ratio, table
from decoder import tokens
from gpu import SMALL
from gpu_cases import random_params

import jpeft
from jpeft.models import loading
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.planning import sizes
from jpeft.serving import generation

RANK = 8
SHAPE = DecoderConfig(
    vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip
TINY = dataclasses.replace(
    SHAPE,
    vocab_size=64,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    layer_types=(),
)
LORA = jpeft.LoRA(rank=RANK, init_weights="random", targets="all-linear")
Call = Callable[..., Any]  # (max_new_tokens) -> tokens


def random_model(config: DecoderConfig, **options: Any) -> tuple[Any, Any]:
    """An unrolled decoder, and parameters for it."""
    model = Decoder(config, scan_layers=False, **options)
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"])


def fresh(peft: Any, params: Any, count: int) -> dict[str, Any]:
    """Random adapters by name."""
    init = jax.jit(lambda key: peft.init(key, params))
    return {f"a{i}": init(jax.random.key(i)) for i in range(count)}


def report(variants: list[Variant], base: str, *facts: str) -> dict[str, Any]:
    """Prints the times, their ratios to one of them, and facts; returns the rows."""
    named, rows = {v.name: v for v in variants}, {r["name"]: r for r in table(variants)}
    body = []
    for name, row in rows.items():
        row["ratio"] = {
            "median": ratio(named[name], named[base]), "fastest": row["fastest_ms"] / rows[base]["fastest_ms"]
        }  # fmt: skip
        found = [f"{row['ratio']['median']:.2f} ({row['ratio']['fastest']:.2f})"]
        body.append([name, f"{row['median_ms']:.2f}", *found, *(str(row.get(fact, "")) for fact in facts)])
    markdown(["", "median ms", f"/ {base} (fastest)", *facts], body)
    return rows


# --- one batch --------------------------------------------------------------------------------------------------------


def jax_calls(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Call]:
    """Generation by jpeft: without an adapter, with one, with a bank of several, and with a call for each."""
    model, params = random_model(args.config)
    peft = LORA.bind(model, params, jnp.zeros((1, 8), int))
    run = functools.partial(jpeft.generate, model, params, stop_ids=())
    calls = {"base": functools.partial(run, prompts)}
    own = fresh(peft, params, max(args.adapters))
    for count in args.adapters:
        names = [f"a{i * count // args.rows}" for i in range(args.rows)]
        if count == 1:
            calls["1 adapter"] = functools.partial(run, prompts, peft=peft, adapter=own["a0"])
            continue
        bank = jpeft.stack(peft, {n: own[n] for n in dict.fromkeys(names)})
        calls[f"{count} adapters"] = functools.partial(run, prompts, peft=peft, adapter=bank, adapter_ids=names)
        each = {n: [p for p, who in zip(prompts, names, strict=True) if who == n] for n in dict.fromkeys(names)}
        calls[f"{count} adapters, loop"] = functools.partial(_loop, run, peft, own, each)
    return calls


def _loop(run: Call, peft: Any, own: dict[str, Any], each: dict[str, Any], max_new_tokens: int) -> Any:
    return [run(p, peft=peft, adapter=own[n], max_new_tokens=max_new_tokens) for n, p in each.items()]


def torch_calls(args: argparse.Namespace, prompts: list[list[int]], scratch: Path) -> dict[str, Call]:
    """The same by HuggingFace PEFT, whose mixed batch runs each adapter on its rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, params = random_model(args.config)
    jpeft.models.save(scratch / "model", model, params)
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    ids = torch.tensor(prompts)

    def loaded() -> Any:
        found = AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=torch.float32).eval()
        found.generation_config.eos_token_id = None
        found.generation_config.pad_token_id = 0
        return found

    def run(theirs: Any, ids: Any, max_new_tokens: int, **kwargs: Any) -> Any:
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            return theirs.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, **kwargs
            )

    calls = {"torch base": functools.partial(run, loaded(), ids)}
    for count in args.adapters:
        theirs = get_peft_model(loaded(), config, adapter_name="a0").eval()
        for i in range(1, count):
            theirs.add_adapter(f"a{i}", config)
        names = {"adapter_names": [f"a{i * count // args.rows}" for i in range(args.rows)]} if count > 1 else {}
        calls[f"torch {count} adapter{'s' * (count > 1)}"] = functools.partial(run, theirs, ids, **names)
    return calls


def batch_calls(args: argparse.Namespace, scratch: Path) -> dict[str, Call]:
    prompts = tokens(args.rows, args.length - 1, args.config.vocab_size).tolist()
    calls = jax_calls(args, prompts)
    return {**calls, **torch_calls(args, prompts, scratch)} if args.torch else calls


def prefill(args: argparse.Namespace, scratch: Path) -> Any:
    """The time of the first token of each row."""
    calls = batch_calls(args, scratch)
    variants = [Variant(name, functools.partial(call, max_new_tokens=1)) for name, call in calls.items()]
    measure(variants, args.rounds, warm_up=1)
    print(f"\n### The first token of {args.rows} prompts of {args.length} tokens\n")
    return report(variants, "base")


def decode(args: argparse.Namespace, scratch: Path) -> Any:
    """The time of a further token of each row."""
    variants = []
    for name, call in batch_calls(args, scratch).items():
        if name.startswith("torch"):
            variants.append(Variant(name, _torch_tokens(call, args.new)))
        else:
            run, facts = _tokens(call, args.new)
            variants.append(Variant(name, run, **facts))
    measure(variants, args.rounds, warm_up=1)
    for variant in variants:
        variant.times = [t / args.new for t in variant.times]
    print(f"\n### A token of {args.rows} rows, after {args.length} tokens\n")
    return report(variants, "base", "temporaries MB")


_decoding = jax.jit(generation._decode.__wrapped__, static_argnames="forward")  # keeps its state, to begin again


def _tokens(call: Any, new: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Generates so many tokens after the prompts of a call; and the temporaries of the program, of one that is one."""
    calls = _calls_of(call)
    begun = []
    for model, params, prompts, given in calls:
        trees = [given.get(name) for name in ("peft", "adapter", "adapter_ids")]
        settings = generation.Settings(max_new_tokens=new + 1, stop_ids=())
        begun.append(generation._Decoding.of(model, params, *trees, None, prompts, settings))
    programs = [(b.forward, b.trees, b.state, b.sampling, jnp.int32(new)) for b in begun]
    memory = _decoding.lower(*programs[0]).compile().memory_analysis().temp_size_in_bytes
    facts = {"temporaries MB": f"{memory / 1e6:.1f}"} if len(programs) == 1 else {}
    return lambda: jax.block_until_ready([_decoding(*program).tokens for program in programs]), facts


def _calls_of(call: Any) -> list[tuple[Any, Any, Any, Any]]:
    """The model, parameters, prompts and keywords of a call, or of each in a loop."""
    if call.func is not _loop:
        return [(*call.args, call.keywords)]
    run, peft, own, each = call.args
    return [(*run.args, prompts, {"peft": peft, "adapter": own[name]}) for name, prompts in each.items()]


def _torch_tokens(call: Any, new: int) -> Callable[[], Any]:
    """The same of a call by torch."""
    import torch
    from transformers import DynamicCache

    model, ids = call.args
    with torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=DynamicCache(config=model.config), **call.keywords).past_key_values

    def run() -> None:
        token = ids[:, -1:]
        with torch.inference_mode():
            for _ in range(new):
                logits = model(input_ids=token, past_key_values=cache, **call.keywords).logits
                token = logits[:, -1:].argmax(-1)
        cache.crop(ids.shape[1])

    return run


# --- one training step ------------------------------------------------------------------------------------------------


def population(args: argparse.Namespace, scratch: Path) -> Any:
    """The time of a step of eight members, against that of eight steps."""
    model, params = random_model(args.config)
    method = jpeft.LoRA(rank=RANK, targets="all-linear")
    rates = [float(rate) for rate in np.geomspace(1e-4, 1e-2, 8)]
    members = [jpeft.Member(method, learning_rate=rate, seed=seed) for seed, rate in enumerate(rates)]
    found = jpeft.Population(model, params, jnp.zeros((1, 8), int), members)
    peft, tx = found.peft, optax.adamw

    def loss_fn(adapter: Any, params: Any, batch: Any, rng: Any) -> Any:
        logits = peft.apply(params, adapter, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean(), {}

    out = {}
    for length in args.tokens:
        together = _Held(jpeft.population_step(found, loss_fn, tx), found.init(tx, params))
        one_by_one = []
        for member in members:
            key, rng = member.keys()
            own_tx = optax.inject_hyperparams(tx)(learning_rate=member.learning_rate)
            state = jpeft.TrainState.create(peft, peft.init(key, params), own_tx, rng)
            one_by_one.append(_Held(jpeft.train_step(peft, loss_fn, own_tx), state))
        batches = jnp.asarray(np.stack([tokens(1, length, args.config.vocab_size)] * 8))

        def each(one_by_one: Any = one_by_one, batches: Any = batches) -> None:
            jax.block_until_ready([held(params, batch) for held, batch in zip(one_by_one, batches, strict=True)])

        def all_of(together: Any = together, batches: Any = batches) -> None:
            jax.block_until_ready(together(params, batches))

        variants = [Variant("8 steps", each), Variant("8 members in one step", all_of)]
        measure(variants, args.rounds)
        print(f"\n### A step of 8 members, {length} tokens each\n")
        out[str(length)] = report(variants, "8 steps")
    return out


class _Held:
    """A training step that keeps its state."""

    def __init__(self, step: Any, state: Any):
        self.step, self.state = step, state

    def __call__(self, params: Any, batch: Any) -> Any:
        self.state, metrics = self.step(self.state, params, batch)
        return metrics["loss"]


# --- one engine -------------------------------------------------------------------------------------------------------


def engine(args: argparse.Namespace, scratch: Path) -> Any:
    """The time of many requests through an engine, and one by one."""
    model, params = random_model(args.config)
    peft = LORA.bind(model, params, jnp.zeros((1, 8), int))
    own = fresh(peft, params, 8)
    prompts = tokens(args.rows, args.length - 1, args.config.vocab_size).tolist()
    requests = [(prompt, f"a{i % 8}") for i, prompt in enumerate(prompts)]
    started = jpeft.Engine(
        model, params, peft, bank=jpeft.stack(peft, own), rows=args.engine_rows, capacity=args.length + 2 * args.new
    )

    def together() -> None:
        running = [started.submit(p, adapter=who, max_new_tokens=2 * args.new, stop_ids=()) for p, who in requests]
        assert all(len(list(request)) == 2 * args.new for request in running)

    def one_by_one() -> None:
        for prompt, who in requests:
            jpeft.generate(
                model, params, [prompt], peft=peft, adapter=own[who], max_new_tokens=2 * args.new, stop_ids=()
            )

    with started:
        variants = [Variant("one by one", one_by_one), Variant("engine", together)]
        measure(variants, max(2, args.rounds // 2), warm_up=1)
    for variant in variants:
        variant.facts["tokens/s"] = f"{len(requests) * 2 * args.new / statistics.median(variant.times):,.0f}"
    print(f"\n### {len(requests)} requests of {2 * args.new} tokens, {args.engine_rows} rows\n")
    return report(variants, "one by one", "tokens/s")


# --- an accelerator ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concatenated(jpeft.LoRA):
    """LoRAs of several adapters as one of all their ranks, of which a row uses its own: the others are masked.

    Attributes:
      count: the number of adapters.
    """

    count: int = 1

    reads_context: ClassVar[bool] = True
    arguments: ClassVar[tuple[str, ...]] = ("slots",)

    def apply(self, leaves: Any, base: Any, x: Any) -> jax.Array:
        y, hidden = base(x), x @ leaves["lora_a"]
        own = jnp.repeat(jax.nn.one_hot(base.context["slots"], self.count, dtype=x.dtype), self.rank // self.count, 1)
        masked = hidden.reshape(len(own), -1, self.rank) * own[:, None]
        return y + masked.reshape(hidden.shape) @ leaves["lora_b"]


def gpu(args: argparse.Namespace, scratch: Path) -> Any:
    """The time of a token of each row, with the adapters in three layouts."""
    device = jax.devices()[0]
    if device.platform == "cpu" and not args.tiny:
        print("\n### Llama 3.1 8B: missing, since there is no accelerator\n")
        return None
    config = SMALL if args.tiny else sizes.config("llama-3.1-8b")
    model, shapes = loading.abstract(config, param_dtype=jnp.bfloat16)
    params = random_params(shapes)
    prompts = tokens(args.rows, args.length - 1, config["vocab_size"]).tolist()
    run = functools.partial(jpeft.generate, model, params, prompts, stop_ids=())
    method = dataclasses.replace(LORA, dtype="bfloat16")
    peft = method.bind(model, params, jnp.zeros((1, 8), int))
    calls = {"base": run}
    for count in (args.rows, max(2, args.rows // 8)):
        bank = jpeft.stack(peft, fresh(peft, params, count))
        side_by_side = [f"a{i * count // args.rows}" for i in range(args.rows)]
        apart = [f"a{i}" for i in range(count) for _ in range(args.rows // count)]
        apart[0], apart[-1] = apart[-1], apart[0]
        apart = apart if count == args.rows else [*apart[1:], apart[1]]  # groups of several sizes: a copy for each row
        calls[f"{count}, a copy for each row"] = functools.partial(run, peft=peft, adapter=bank, adapter_ids=apart)
        if count < args.rows:
            calls[f"{count}, groups"] = functools.partial(run, peft=peft, adapter=bank, adapter_ids=side_by_side)
        fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)} | {"rank": RANK * count}
        together = Concatenated(**fields, count=count).bind(
            model, params, jnp.zeros((args.rows, 8), int), slots=jnp.zeros((args.rows,), int)
        )
        slots = jnp.arange(args.rows) * count // args.rows
        calls[f"{count}, ranks together"] = functools.partial(
            run, peft=together, adapter=together.init(jax.random.key(0), params), arguments={"slots": slots}
        )
    variants = [Variant(name, functools.partial(call, max_new_tokens=args.new)) for name, call in calls.items()]
    measure(variants, args.rounds, warm_up=1)
    print(f"\n### {args.new} tokens of {args.rows} rows, {device.device_kind}\n")
    return report(variants, "base")


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
    "prefill": prefill, "decode": decode, "population": population, "engine": engine, "gpu": gpu
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections to run, separated by commas")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="also measure PEFT")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few rows")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - SECTIONS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    args.config, args.rows, args.length, args.new, args.engine_rows = SHAPE, 64, 128, 17, 16
    args.adapters, args.tokens = (1, 8, 64), (16, 128, 512)
    if args.tiny:
        args.config, args.rows, args.length, args.new, args.engine_rows = TINY, 4, 8, 3, 2
        args.adapters, args.tokens = (1, 2, 4), (4,)
    packages = ["jax", "flax", "optax"]
    if args.torch:
        import torch

        torch.set_num_threads(args.threads)
        packages += ["torch", "transformers", "peft"]
    out: dict[str, Any] = {"machine": machine(packages)}
    print(", ".join(f"{k} {v}" for k, v in out["machine"].items()))
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            out[name] = SECTIONS[name](args, Path(scratch))
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
