"""Training step of MiniLM, batch 32 x 64 tokens: jpeft, HuggingFace PEFT (torch) and qwix, side by side in one run.

    python benchmarks/step.py [--rounds 24] [--threads 2] [--json step.json]

Every variant trains a two-class head on mean-pooled states and, as named, all weights or LoRA of rank 8 (alpha 16, no
dropout), with AdamW, in float32. Rounds are interleaved: each runs a step of every variant in a shuffled order, so that
other load on the machine affects all alike. Ratios compare the medians and, for shared machines, the fastest steps.
FLOPs, temporary bytes and optimizer bytes are those of the compiled step.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, compiled_facts, cross_entropy, measure, table

import jpeft
from jpeft.core import tree
from jpeft.core.tree import size_bytes
from jpeft.methods import Method
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.tasks.classification import Classifier, load_classifier

BATCH, LENGTH, RANK, ALPHA = 32, 64, 8, 16
QV, ALL = r".*/(query|value)", "all-linear"
HF_QV, HF_ALL = ["query", "value"], ["query", "key", "value", "dense"]


def batch() -> dict[str, np.ndarray]:
    """Random tokens without padding, which no variant skips."""
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(1000, 30000, (BATCH, LENGTH)).astype(np.int32),
        "mask": np.ones((BATCH, LENGTH), np.int32),
        "labels": rng.integers(0, 2, BATCH).astype(np.int32),
    }


def jax_variant(name: str, model: Any, params: Any, method: Method, data: Any) -> Variant:
    """jpeft's training step."""
    peft = method.bind(model, params, data["ids"], data["mask"])
    adapter = peft.init(jax.random.key(0), params)
    tx = optax.adamw(1e-4)
    state = jpeft.TrainState.create(peft, adapter, tx, jax.random.key(1))

    def loss_fn(adapter: Any, params: Any, batch: Any, rng: jax.Array) -> Any:
        return cross_entropy(peft.apply(params, adapter, batch["ids"], batch["mask"]), batch["labels"]), {}

    compiled = jpeft.train_step(peft, loss_fn, tx).lower(state, params, data).compile()
    holder = {"state": state}

    def step() -> None:
        holder["state"], metrics = compiled(holder["state"], params, data)
        jax.block_until_ready(metrics)

    facts = {"adapter_bytes": size_bytes(adapter), "optimizer_bytes": size_bytes(state.opt_state)}
    return Variant(name, step, **compiled_facts(compiled), **facts)


def qwix_variant(name: str, model: Any, params: Any, pattern: str, data: Any) -> Variant:
    """qwix's LoRA on the same Linen model: the same loss, optimizer and trainable head."""
    import qwix

    provider = qwix.LoraProvider(module_path=pattern, rank=RANK, alpha=ALPHA)
    lora = qwix.apply_lora_to_model(model, provider)
    full = jax.jit(lora.init)(jax.random.key(0), data["ids"], data["mask"])["params"]

    def is_trained(path: tuple[str, ...]) -> bool:
        return "lora" in path[-1] or path[0] == "classifier"

    own = tree.unflatten({path: x for path, x in tree.flatten(full).items() if is_trained(path)})
    base = tree.unflatten({path: x for path, x in tree.flatten(params).items() if not is_trained(path)})
    tx = optax.adamw(1e-4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(own: Any, opt_state: Any, base: Any, data: Any) -> Any:
        def loss(own: Any) -> jax.Array:
            logits = lora.apply({"params": jpeft.combine(base, own)}, data["ids"], data["mask"])
            return cross_entropy(logits, data["labels"])

        value, grads = jax.value_and_grad(loss)(own)
        updates, opt_state = tx.update(grads, opt_state, own)
        return optax.apply_updates(own, updates), opt_state, value

    holder = [own, tx.init(own)]
    facts = {"adapter_bytes": size_bytes(own), "optimizer_bytes": size_bytes(holder[1])}
    compiled = step_fn.lower(*holder, base, data).compile()

    def step() -> None:
        holder[0], holder[1], value = compiled(*holder, base, data)
        jax.block_until_ready(value)

    return Variant(name, step, **compiled_facts(compiled), **facts)


def torch_variant(name: str, folder: Any, targets: list[str] | None, data: Any) -> Variant:
    """HuggingFace PEFT, or full fine-tuning without targets."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    if targets is not None:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)
        encoder = get_peft_model(encoder, config)
    for module in encoder.modules():  # no dropout, as in the other variants
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    head = torch.nn.Linear(384, 2)
    trained = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids, mask, labels = (torch.tensor(data[k]).long() for k in ("ids", "mask", "labels"))
    encoder.train()

    def step() -> None:
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        logits = head((states * weights).sum(1) / weights.sum(1))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    step()
    state_bytes = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    return Variant(name, step, adapter_bytes=sum(p.numel() * 4 for p in trained), optimizer_bytes=state_bytes)


def foreign_variants(folder: Any, params: Any, data: Any) -> list[Variant]:
    """transformers' Flax BERT: LoRA, and the same gradient path without an adapter.

    The latter trains biases of the same layers, so that the gradient flows as far back at almost no cost.
    """
    from transformers import BertConfig, FlaxBertModel

    config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bert = FlaxBertModel(config, _do_init=False, add_pooling_layer=False)

    class Adapted(Classifier):
        def __call__(self, ids: Any, mask: Any) -> Any:  # type: ignore[override]
            types, places = jnp.zeros_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            states = self.encoder(ids, mask, types, places)[0]
            return self.head(states.mean(1))

        def setup(self) -> None:
            import flax.linen as nn

            self.head = nn.Dense(2, name="classifier")

    model = Adapted(bert.module, 2)
    out = []
    for kind, targets, biases in [("query,value", QV, r".*/(query|value)/bias"), ("all-linear", ALL, r".*/layer/.*")]:
        head = jpeft.Train("classifier")
        lora = jpeft.Chain(jpeft.LoRA(rank=RANK, alpha=ALPHA, targets=targets), head)
        path = jpeft.Chain(jpeft.BitFit(targets=biases), head)
        out.append(jax_variant(f"flax-bert lora {kind}", model, params, lora, data))
        out.append(jax_variant(f"flax-bert path {kind}", model, params, path, data))
    return out


def forward_variants(model: Any, params: Any, data: Any) -> list[Variant]:
    """Forward passes: the base, with LoRA, and merged."""
    peft = jpeft.LoRA(rank=RANK, alpha=ALPHA).bind(model, params, data["ids"], data["mask"])
    adapter = peft.init(jax.random.key(0), params)
    merged = peft.merge(params, adapter)

    def base(params: Any, ids: Any, mask: Any) -> Any:
        return model.apply({"params": params}, ids, mask)

    calls = [
        ("forward base", base, (params,)),
        ("forward lora all-linear", peft.apply, (params, adapter)),
        ("forward merged", base, (merged,)),
    ]
    out = []
    for name, fn, trees in calls:
        compiled = jax.jit(fn).lower(*trees, data["ids"], data["mask"]).compile()
        run = functools.partial(lambda c, t: jax.block_until_ready(c(*t, data["ids"], data["mask"])), compiled, trees)
        out.append(Variant(name, run, **compiled_facts(compiled)))
    return out


def ratios(rows: list[dict[str, Any]], clock: str) -> dict[str, float]:
    """Ratios of times, by their median or their minimum, and of FLOPs. Below 1 is better."""
    by = {r["name"]: r for r in rows}

    def time_of(name: str) -> float:
        return by[name][clock]

    out = {}
    for kind in ("full", "lora query,value", "lora all-linear"):
        out[f"time jpeft / torch, {kind}"] = time_of(f"jpeft {kind}") / time_of(f"torch {kind}")
    for kind in ("query,value", "all-linear"):
        out[f"time jpeft / qwix, {kind}"] = time_of(f"jpeft lora {kind}") / time_of(f"qwix lora {kind}")
        out[f"FLOPs lora / full, {kind}"] = by[f"jpeft lora {kind}"]["flops"] / by["jpeft full"]["flops"]
        out[f"time on flax-bert, lora / no adapter, {kind}"] = time_of(f"flax-bert lora {kind}") / time_of(
            f"flax-bert path {kind}"
        )
    out["time forward, lora / base"] = time_of("forward lora all-linear") / time_of("forward base")
    out["time forward, merged / base"] = time_of("forward merged") / time_of("forward base")
    out["FLOPs forward, merged / base"] = by["forward merged"]["flops"] / by["forward base"]["flops"]
    return out


def main() -> None:
    """Runs everything, prints the tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    folder, data = resolve_model("minilm"), batch()
    model, params = load_classifier(folder, num_labels=2, seed=0)
    head = jpeft.Train("classifier")

    def lora(targets: str) -> Method:
        return jpeft.Chain(jpeft.LoRA(rank=RANK, alpha=ALPHA, targets=targets), head)

    variants = [
        jax_variant("jpeft full", model, params, jpeft.Train(r".*"), data),
        jax_variant("jpeft lora query,value", model, params, lora(QV), data),
        jax_variant("jpeft lora all-linear", model, params, lora(ALL), data),
        torch_variant("torch full", folder, None, data),
        torch_variant("torch lora query,value", folder, HF_QV, data),
        torch_variant("torch lora all-linear", folder, HF_ALL, data),
        qwix_variant("qwix lora query,value", model, params, QV, data),
        qwix_variant("qwix lora all-linear", model, params, r".*/(query|key|value|dense)", data),
        *foreign_variants(folder, params, data),
        *forward_variants(model, params, data),
    ]
    measure(variants, args.rounds)
    rows = table(variants)
    print(f"{'':32}{'median ms':>10}{'fastest':>9}{'GFLOP':>8}{'temp MB':>9}{'optimizer MB':>14}")
    for r in rows:
        flops = f"{r['flops'] / 1e9:8.1f}" if "flops" in r else " " * 8
        temp = f"{r['temporary_bytes'] / 1e6:9.1f}" if "temporary_bytes" in r else " " * 9
        optimizer = f"{r['optimizer_bytes'] / 1e6:14.2f}" if "optimizer_bytes" in r else ""
        print(f"{r['name']:32}{r['median_ms']:10.1f}{r['fastest_ms']:9.1f}{flops}{temp}{optimizer}")
    compared = {clock: ratios(rows, clock) for clock in ("median_ms", "fastest_ms")}
    print(f"\n{'ratio':52}{'median':>8}{'fastest':>9}")
    for name, value in compared["median_ms"].items():
        print(f"{name:52}{value:8.3f}{compared['fastest_ms'][name]:9.3f}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"rows": rows, "ratios": compared, "rounds": args.rounds, "jax": jax.__version__}, f, indent=1)


if __name__ == "__main__":
    main()
