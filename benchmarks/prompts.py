"""Prefix and prompt tuning of SmolLM2-135M beside LoRA and beside HuggingFace PEFT (torch), in one run.

    python benchmarks/prompts.py [--rounds 8] [--only train,decode] [--no-torch] [--tiny] [--json prompts.json]

Float32, no dropout, AdamW, the same weights and tokens for all. Rounds are interleaved in a shuffled order, as in
`benchmarks/step.py`; a ratio is the median over rounds, each of which ran both, and that of the fastest.

train   A step on 4 x 256 random tokens: LoRA of rank 8 on the query and value projections, a prefix of 16, one that a
        network computes, and a prompt of 16.
decode  Greedy decoding of one prompt of 256 tokens with the unrolled model, as it is, under each of these. Decoding is
        the time to generate 64 tokens less that to generate one, divided by 63.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import Variant, machine, markdown, measure, ratio, table
from decoder import jax_step, tokens, torch_generate

import jpeft
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.recipes.assets import resolve_model

LENGTH, LORA = 16, "LoRA q, v"
METHODS = {
    LORA: jpeft.LoRA(rank=8, targets=r".*/[qv]_proj"),
    "prefix": jpeft.PrefixTuning(length=LENGTH),
    "prefix, network": jpeft.PrefixTuning(length=LENGTH, reparametrize=True),
    "prompt": jpeft.methods.PromptTuning(length=LENGTH),
}
TINY = DecoderConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def torch_model(folder: Path, name: str | None) -> Any:
    """The model under the counterpart of a method in PEFT; None: as it is."""
    import torch
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # generate all tokens
    model.generation_config.pad_token_id = 0
    if name is None:
        return model.eval()
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
    configs = {
        LORA: lambda: LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prefix": lambda: PrefixTuningConfig(**virtual),
        "prefix, network": lambda: PrefixTuningConfig(**virtual, prefix_projection=True, encoder_hidden_size=256),
        "prompt": lambda: PromptTuningConfig(**virtual),
    }
    torch.manual_seed(0)
    return get_peft_model(model, configs[name]())


def torch_step(folder: Path, name: str, ids: np.ndarray) -> Variant:
    import torch

    model = torch_model(folder, name).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data = torch.tensor(ids).long()
    sum(p.detach().sum() for p in model.parameters())  # reads the weights, which safetensors only maps

    def step() -> float:
        logits = model(input_ids=data[:, :-1]).logits[:, -(ids.shape[1] - 1) :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Variant(f"torch {name}", step)


def report(variants: list[Variant], bases: dict[str, str]) -> dict[str, Any]:
    """Prints the times and their ratios to each of some bases, by name of a variant; returns the rows."""
    named, rows = {v.name: v for v in variants}, {r["name"]: r for r in table(variants)}
    body = []
    for name, row in rows.items():
        row["ratios"] = {}
        for base in {base: None for base in bases.values() if base in named}:
            fastest = row["fastest_ms"] / rows[base]["fastest_ms"]
            row["ratios"][base] = {"median": ratio(named[name], named[base]), "fastest": fastest}
        body.append([name, f"{row['median_ms']:.1f}", f"{row['fastest_ms']:.1f}"])
        body[-1] += [f"{r['median']:.3f} ({r['fastest']:.3f})" for r in row["ratios"].values()]
    heads = [f"/ {base}" for base in dict.fromkeys(bases.values()) if base in named]
    markdown(["", "median ms", "fastest ms", *heads], body)
    return rows


def train(args: argparse.Namespace, folder: Path, model: Any, params: Any) -> dict[str, Any]:
    """The time of a training step under each method."""
    ids = tokens(args.batch, args.length, model.config.vocab_size)
    variants = [jax_step(name, model, params, method, ids) for name, method in METHODS.items()]
    if args.torch:
        variants += [torch_step(folder, name, ids) for name in METHODS]
    measure(variants, args.rounds)
    print(f"\n### Training step, {args.batch} x {args.length} tokens\n")
    return report(variants, {"jpeft": LORA, "torch": f"torch {LORA}"})


def decode(args: argparse.Namespace, folder: Path, model: Any, params: Any) -> dict[str, Any]:
    """The time to decode a token under each method."""
    prompt = tokens(1, args.length - 1, model.config.vocab_size)
    model, params, _, _ = jpeft.models.unroll(model, params)
    calls = {"base": functools.partial(jpeft.generate, model, params, [prompt[0].tolist()], stop_ids=())}
    for name, method in METHODS.items():
        peft = method.bind(model, params, jnp.zeros((1, 8), jnp.int32))
        under = {"peft": peft, "adapter": peft.init(jax.random.key(0), params)}
        calls[name] = functools.partial(calls["base"], **under)
    if args.torch:
        import torch

        for name in (None, *METHODS):
            theirs = torch_model(folder, name).eval()
            calls[f"torch {name or 'base'}"] = functools.partial(torch_generate, theirs, torch.tensor(prompt).long())
    pairs = {
        name: [Variant(f"{name}, {n}", functools.partial(call, max_new_tokens=n)) for n in (1, args.new)]
        for name, call in calls.items()
    }
    measure([variant for pair in pairs.values() for variant in pair], args.rounds, warm_up=1)
    variants = []
    for name, (first, all_of) in pairs.items():
        variant = Variant(name, all_of.step)
        once = statistics.median(first.times)
        variant.times = [(t - once) / (args.new - 1) for t in all_of.times]
        variants.append(variant)
    print(f"\n### Decoding a token, after {args.length} tokens of prompt\n")
    return report(variants, {"jpeft": "base", "torch": "torch base"})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="train,decode", help="parts to run, separated by commas")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="also measure PEFT")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args(argv)
    parts = {"train": train, "decode": decode}
    if unknown := set(args.only.split(",")) - parts.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    packages = ["jax", "flax", "optax"]
    if args.torch:
        import torch

        torch.set_num_threads(args.threads)
        packages += ["torch", "transformers", "peft"]
    out: dict[str, Any] = {"machine": machine(packages), "arguments": vars(args)}
    print(", ".join(f"{k} {v}" for k, v in out["machine"].items()))
    with tempfile.TemporaryDirectory() as scratch:
        if args.tiny:
            args.batch, args.length, args.new = 2, 12, 4
            model = Decoder(TINY)
            params = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"])
        else:
            model, params = jpeft.models.load(resolve_model("smollm2"))
        folder = Path(scratch) / "model"  # torch reads the float32 weights that jpeft writes
        if args.torch:
            jpeft.models.save(folder, model, params)
        for name in args.only.split(","):
            out[name] = parts[name](args, folder, model, params)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
