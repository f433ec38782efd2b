"""A training step of every method: against LoRA's, and beside it HuggingFace PEFT's (torch) for the same method.

    python benchmarks/methods.py [--only LoRA,OFT] [--models decoder,encoder] [--rounds 7] [--json methods.json]

The methods are those of `jpeft.methods.METHODS`, each in its default configuration on all linear layers (see `OPTIONS`
for the others), in float32, with AdamW, on models of random weights: a Llama whose layers are scanned and
rematerialized, and a BERT. HuggingFace's side is the adapter that `jpeft.hf.save` writes, trained in torch on the same
tokens, with checkpointed layers where jpeft rematerializes.

FLOPs and temporary bytes are of the compiled step, relative to LoRA's. FLOPs are those of matrix products, counted
by `jpeft.planning` as often as a loop's body runs, which XLA's own figure is not; those inside LAPACK are not counted.
Times of a method are measured in rounds of their own that run a step of it and of LoRA, on both sides, in a shuffled
order: "time / LoRA" and "torch / jpeft" are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, compiled_facts, cross_entropy, machine, markdown, measure, ratio

import jpeft
from jpeft.core.interchange import form
from jpeft.core.tree import count
from jpeft.methods import METHODS, Method
from jpeft.models import loading
from jpeft.planning.hlo import program

LR = 1e-4
BASE = "LoRA"
PACKAGES = ("jax", "flax", "optax")
TORCH_PACKAGES = ("torch", "transformers", "peft")
# Arguments of methods that need some.
OPTIONS: dict[str, Mapping[str, Any]] = {
    "AdapterFusion": {"members": {"a": jpeft.Bottleneck(), "b": jpeft.Bottleneck()}},
    "ALoRA": {"invocation_tokens": (1,)},
    "Average": {"members": {"a": jpeft.LoRA(), "b": jpeft.LoRA()}, "train_members": True},
    "CPT": {"token_ids": tuple(range(16))},
    "ParallelAdapter": {"targets": r".*/(mlp|attention/self)"},
    "PrefixTuning": {"shift_positions": True},  # as PEFT counts positions
    "Stack": {"members": {"a": jpeft.Bottleneck(), "b": jpeft.Bottleneck()}},
    "TrainableTokens": {"indices": tuple(range(16)), "targets": r".*(embed_tokens|word_embeddings)"},
    "Train": {"targets": r".*[nN]orm.*"},
    "XLoRA": {"n_experts": 4, "hidden_size": 512},
}
COMMON = {"vocab_size": 2048, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA = {**COMMON, "model_type": "llama", "intermediate_size": 1536, "tie_word_embeddings": False}
BERT = {**COMMON, "model_type": "bert", "intermediate_size": 2048}
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Workload:
    """A model to train on random tokens. Its outputs ``[rows, length, classes]`` are logits of the next token.

    Attributes:
      config: HuggingFace's ``config.json``.
      rows, length: the sizes of a batch.
      options: arguments of `jpeft.models.load`.
    """

    config: Mapping[str, Any]
    rows: int
    length: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def remat(self) -> bool:
        return bool(self.options.get("remat"))

    def ids(self) -> np.ndarray:
        """Random ids, one more than the length, so that all positions have a target."""
        shape = (self.rows, self.length + 1)
        return np.random.default_rng(0).integers(10, self.config["vocab_size"], shape).astype(np.int32)

    def model(self) -> tuple[Any, Any]:
        """The model, and its abstract parameters."""
        return loading.abstract(dict(self.config), **self.options)


def workloads(tiny: bool) -> dict[str, Workload]:
    """The models by name."""
    rows, length, sizes = (2, 16, TINY) if tiny else (4, 256, {})
    remat = {"scan_layers": True, "remat": "full"}
    return {
        "decoder": Workload({**LLAMA, **sizes}, rows, length, remat),
        "encoder": Workload({**BERT, **sizes}, rows, length, {"pooler": False}),
    }


def configured(name: str) -> Method:
    """A method in the configuration that is measured."""
    return METHODS[name](**OPTIONS.get(name, {}))


# --- steps ---


def lowered_step(model: Any, params: Any, method: Method, ids: Any) -> tuple[Any, Any, Any]:
    """The lowered training step, its state and the bound method; abstract if the parameters are."""
    peft, tx = method.bind(model, params, jax.ShapeDtypeStruct((1, 8), jnp.int32)), optax.adamw(LR)

    def loss_fn(adapter: Any, params: Any, ids: Any, rng: jax.Array) -> Any:
        logits = peft.apply(params, adapter, ids[:, :-1])
        return cross_entropy(logits, ids[:, 1:] % logits.shape[-1]), {}

    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), params), tx, jax.random.key(1))
    return jpeft.train_step(peft, loss_fn, tx).lower(state, params, ids), state, peft


def jax_step(work: Workload, model: Any, params: Any, method: Method) -> tuple[Variant, Any, Any]:
    """jpeft's step with the facts of its program, the bound method and its adapter."""
    ids = work.ids()
    lowered, state, peft = lowered_step(model, params, method, ids)
    compiled, holder, adapter = lowered.compile(), [state], jax.tree.map(np.asarray, state.adapter)
    trained, _ = jpeft.partition(adapter, peft.labels(adapter))
    facts = {**compiled_facts(compiled), "trained": count(trained), "flops": program.read(compiled.as_text()).flops}

    def step() -> None:
        holder[0], metrics = compiled(holder[0], params, ids)
        jax.block_until_ready(metrics)

    return Variant(f"jpeft {method.name}", step, **facts), peft, adapter


def torch_step(name: str, work: Workload, folder: Path, adapter: Path) -> Variant:
    """HuggingFace PEFT's step, from the folders of the base and of the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    if work.config["model_type"] == "bert":
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False, **no_dropout)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False)
    if work.remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    is_prompt = bool(getattr(form(METHODS[name]), "prompt", ""))
    model = PeftModel.from_pretrained(model, adapter, is_trainable=not is_prompt).train()
    if is_prompt:  # which PEFT does not load to be trained
        for parameter in model.prompt_encoder.parameters():
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    ids = torch.tensor(work.ids()).long()

    # PEFT's outermost model alone takes the virtual tokens in, and drops the arguments of other methods.
    run = model if is_prompt else model.base_model
    tasks = {"task_ids": torch.zeros(work.rows).long()} if "task_ids" in METHODS[name].arguments else {}

    def step() -> None:
        logits = run(input_ids=ids[:, :-1], **tasks)[0][:, -work.length :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), (ids[:, 1:] % logits.shape[-1]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Variant(f"torch {name}", step)


# --- a model ---


class Steps:
    """The steps of one model: those of jpeft, and of torch where it is installed and knows the method."""

    def __init__(self, work: Workload, scratch: Path, torch: bool):
        self.work, self.scratch = work, scratch
        self.model, _ = work.model()
        self.params = nn.meta.unbox(jax.jit(self.model.init)(jax.random.key(0), jnp.asarray(work.ids()))["params"])
        self.base = scratch / "base" if torch else None
        if self.base is not None:
            jpeft.models.save(self.base, self.model, self.params)

    def of(self, name: str) -> list[Variant]:
        """jpeft's step of a method, and torch's if there is one."""
        step, peft, adapter = jax_step(self.work, self.model, self.params, configured(name))
        if self.base is None:
            return [step]
        spec, is_encoder = form(type(peft.method)), self.work.config["model_type"] == "bert"
        if getattr(spec, "task_type", "") and is_encoder:
            step.facts["no_torch"] = "PEFT computes it in causal language models alone"
            return [step]
        if getattr(spec, "prompt", "") and peft.method.arguments and is_encoder:
            step.facts["no_torch"] = "PEFT gives no task ids to models for features"
            return [step]
        try:
            task = "FEATURE_EXTRACTION" if is_encoder else "CAUSAL_LM"
            more = {"task_type": task} if getattr(spec, "prompt", "") else {}
            jpeft.hf.save(self.scratch / name, peft, adapter, self.params, **more)
            return [step, torch_step(name, self.work, self.base, self.scratch / name)]
        except ValueError as error:  # no form in a folder of HuggingFace's, or none for this model
            step.facts["no_torch"] = str(error)
            return [step]


def measured(steps: Steps, names: Sequence[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method's name, with its facts and times."""
    base = steps.of(BASE)
    for name in names:
        try:
            own = base if name == BASE else steps.of(name)
        except ValueError as error:  # the model has nothing that the method can act on
            yield name, {"missing": str(error)}
            continue
        for variant in (group := list(dict.fromkeys((*base, *own)))):
            variant.times.clear()
        measure(group, rounds)
        ours, theirs = own[0], own[1:]
        relative = {key: ours.facts[key] / base[0].facts[key] for key in ("flops", "temporary_bytes")}
        row = {**ours.facts, "seconds": statistics.median(ours.times), "relative": relative}
        relative["time"] = ratio(ours, base[0])
        for variant in theirs:
            of_torch = {"relative": ratio(variant, base[1]), "over_jpeft": ratio(variant, ours)}
            row["torch"] = {"seconds": statistics.median(variant.times), **of_torch}
        yield name, row


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    head = ["", "trained", "ms", "FLOPs / LoRA", "temporary / LoRA", "time / LoRA", "torch ms", "torch / jpeft"]
    head.append("torch / its LoRA")
    body = []
    for name, row in rows.items():
        if "missing" in row:
            body.append([name, row["missing"], *[""] * (len(head) - 2)])
            continue
        cells = [name, f"{row['trained']:,}", f"{1000 * row['seconds']:.1f}"]
        cells += [f"{row['relative'][key]:.3f}" for key in ("flops", "temporary_bytes", "time")]
        if theirs := row.get("torch"):
            cells += [f"{1000 * theirs['seconds']:.1f}", *(f"{theirs[k]:.2f}" for k in ("over_jpeft", "relative"))]
        body.append(cells + [""] * (len(head) - len(cells)))
    print(f"\n### {title}\n")
    markdown(head, body)


# --- the command ---


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [*workloads(tiny=True)]
    parser.add_argument("--only", default=",".join(METHODS), help="methods to measure, separated by commas")
    parser.add_argument("--models", default=",".join(models), help="models to train, separated by commas")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--no-torch", action="store_true", help="jpeft alone")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args(argv)
    for name, known in (("only", [*METHODS]), ("models", models)):
        given = [each for each in getattr(args, name).split(",") if each]
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name} {', '.join(unknown)}: expected some of {', '.join(known)}")
        setattr(args, name, given)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if not args.no_torch:
        import torch

        torch.set_num_threads(args.threads)
    facts = machine(PACKAGES if args.no_torch else PACKAGES + TORCH_PACKAGES)
    out: dict[str, Any] = {"machine": facts, "arguments": vars(args), "models": {}}
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    for kind in args.models:
        work, rows = workloads(args.tiny)[kind], out["models"].setdefault(kind, {})
        with tempfile.TemporaryDirectory() as scratch:
            for name, row in measured(Steps(work, Path(scratch), not args.no_torch), args.only, args.rounds):
                rows[name] = row
                print(f"{kind} {name}: {row.get('missing') or row['relative']}", file=sys.stderr, flush=True)
                if args.json:  # after each method: what is measured stays
                    Path(args.json).write_text(json.dumps(out, indent=1))
        sizes = ", ".join(f"{key} {value}" for key, value in work.config.items())
        print_table(f"{kind.capitalize()}, {work.rows} x {work.length} tokens ({sizes})", rows)


if __name__ == "__main__":
    main()
