"""What methods reach under one fixed budget: the tasks of `jpeft finetune` by a dozen methods, and by HuggingFace PEFT.

    python benchmarks/quality.py --resume quality.jsonl --json notebooks/data/quality.json
    python benchmarks/quality.py --resume quality.jsonl --json notebooks/data/quality.json --times    # a quiet machine

reviews: MiniLM learns the food reviews. All methods see the same batches, with the optimizer, schedule and clipping of
`jpeft finetune` and the method's own `learning_rate`. HuggingFace PEFT trains the folder that `jpeft.hf.save` writes of
the untrained adapter and head, in torch: the same start, batches, optimizer and schedule. The answer to each test text
is kept, so that two methods are compared text by text.

chat: SmolLM2-135M learns to answer GSM8K's questions, in float32. Measured are the loss of held-out answers, and that
of text that has nothing to do with the task (WikiText-2's test part): what a method forgets.

Each run has a process of its own. `--resume` holds a JSON line for each finished one, of which none is repeated, so the
command can be stopped at any time. "Memory" is what training adds to the base: the leaves that train, the optimizer's
state, and the growth of the resident size while two steps run. Bytes are of the folder that `jpeft.save` writes.
Seconds are only measured with `--times`, in rounds of their own: training on a busy machine says nothing about them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from common import machine, markdown

import jpeft
from jpeft.core.tree import count
from jpeft.models.classifier import HEAD
from jpeft.recipes import assets
from jpeft.recipes.config import Config
from jpeft.recipes.optimizer import learning_rate, optimizer, training_step
from jpeft.recipes.prepare import prepare
from jpeft.recipes.tasks import chat, classification
from jpeft.training.step import TrainState

PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft")
JPEFT, TORCH, BASE = "jpeft", "torch", "base"

# Fields of `jpeft finetune`'s configuration by the name of a row; what is not given is the method's default.
METHODS: dict[str, Mapping[str, Any]] = {
    "LoRA": {"method": "lora"},
    "rsLoRA, rank 64": {"method": "lora", "rank": 64, "alpha": 16, "settings": {"rslora": True}},
    "PiSSA": {"method": "lora", "settings": {"init_weights": "pissa"}},
    **{
        kind: {"method": kind.lower()}
        for kind in (
            "DoRA", "AdaLoRA", "VeRA", "LoHa", "LoKr", "MiSS", "OFT", "HRA", "RoAd", "IA3", "BitFit", "SHiRA",
            "FourierFT", "C3A", "Bottleneck",
        )
    },
    "full": {"method": "full"},
}  # fmt: skip
NO_TORCH = {
    "PiSSA": "in a folder of PEFT its start is a part of the factors, and would train",
    "BitFit": "is no method of its own in PEFT",
    "Bottleneck": "is not in PEFT",
}
CHAT_METHODS = (BASE, "LoRA", "DoRA", "VeRA", "OFT", "SHiRA", "IA3", "full")
REVIEWS = {"task": "classify", "model": "minilm", "data": "food-reviews", "batch_size": 16, "max_length": 64}
CHAT = {"task": "chat", "model": "smollm2", "data": "gsm8k", "batch_size": 2, "max_length": 256, "quantize": "none"}
BUDGETS: dict[str, dict[str, Any]] = {
    "reviews": {**REVIEWS, "steps": 125, "epochs": 1, "eval_examples": 0},
    "chat": {**CHAT, "steps": 60, "epochs": 1, "eval_examples": 64, "samples": 0, "general_rows": 64},
}
TINY: dict[str, dict[str, Any]] = {
    "reviews": {"steps": 2, "max_length": 16, "eval_examples": 64},
    "chat": {"steps": 1, "max_length": 256, "eval_examples": 2, "general_rows": 2},
}


def _as_text(folder: Path) -> None:
    import pyarrow.parquet as parquet

    rows = parquet.read_table(folder / "test.parquet")["text"].to_pylist()
    (folder / "test.txt").write_text("".join(rows), encoding="utf-8")


WIKITEXT = assets.Asset(
    package="cpu-llm",
    version="1.9.1",
    sha256="cb9260a5e6973f6e40340192effa5a674c64be4c45df893030e76534291c6bbc",
    megabytes=5,
    inside="cpu_llm/data/wikitext-2-raw-v1",
    only=("test.parquet",),
    convert=_as_text,
)


@dataclass(frozen=True)
class Unit:
    """A run in a process of its own.

    Attributes:
      task: "reviews" or "chat".
      side: "jpeft" or "torch".
      method: a name in `METHODS`, or "base": nothing is trained.
      seed: of initialization and data order.
      what: "quality" or "times".
      budget: the fields of the configuration that all methods share.
    """

    task: str
    side: str
    method: str
    seed: int
    what: str
    budget: dict[str, Any]

    def config(self) -> Config:
        fields = {name: value for name, value in self.budget.items() if name != "general_rows"}
        return Config(**fields, seed=self.seed, **METHODS.get(self.method, {}))

    def is_of(self, record: Mapping[str, Any]) -> bool:
        return all(record.get(name) == value for name, value in vars(self).items())


# --- training ---


@dataclass
class Trained:
    """A way to train, with jpeft or in torch.

    Attributes:
      step: trains on a batch.
      facts: sizes, and what else the record holds.
    """

    step: Callable[[Any], None]
    facts: dict[str, Any]


class Trainer:
    """jpeft's side: the steps of `jpeft finetune`."""

    def __init__(self, job: Any):
        self.job = job
        key, self.rng = jax.random.split(jax.random.key(job.config.seed))
        self.fresh = job.peft.init(key, job.params)
        self.tx = optimizer(job.config, job.steps, job.peft)
        self.programs: dict[Any, Any] = {}
        self.begin()

    def begin(self) -> None:
        """Starts from the fresh adapter."""
        self.state = TrainState.create(self.job.peft, self.fresh, self.tx, self.rng)

    def compile(self, batch: Any) -> Any:
        shape = batch.input_ids.shape
        if shape not in self.programs:
            step = training_step(self.job.peft, self.job.loss_fn(), self.tx, self.job.config)
            self.programs[shape] = step.lower(self.state, self.job.params, batch).compile()
        return self.programs[shape]

    def step(self, batch: Any) -> float:
        self.state, metrics = self.compile(batch)(self.state, self.job.params, batch)
        return float(metrics["loss"])

    def facts(self) -> dict[str, Any]:
        """Parameters that train, with and without the head, bytes on disk and in memory, without the activations."""
        job = self.job
        trained, _ = jpeft.partition(self.fresh, job.peft.labels(self.fresh))
        with tempfile.TemporaryDirectory() as scratch:
            jpeft.save(Path(scratch) / "adapter", job.peft, self.fresh, job.params)
            disk = sum(file.stat().st_size for file in (Path(scratch) / "adapter").iterdir())
        held = sum(x.nbytes for x in jax.tree.leaves((self.state.adapter, self.state.opt_state)))
        head = count(job.params[HEAD]) if HEAD in job.params else 0
        return {"trained": count(trained), "head": head, "disk_bytes": disk, "state_bytes": held}

    def predictions(self) -> np.ndarray:
        score = classification.scorer(self.job.peft)
        found = classification.probabilities(score, self.job.params, self.state.adapter, self.job.test)
        return found.argmax(-1)


class TorchTrainer:
    """HuggingFace PEFT's side: the same start in torch, and the same optimizer and schedule."""

    def __init__(self, job: Any, threads: int):
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(job.config.seed)
        self.job, self.torch = job, torch
        self.begin()

    def begin(self) -> None:
        torch, job = self.torch, self.job
        self.model = self._model()
        self.leaves = [p for p in self.model.parameters() if p.requires_grad]
        rates = np.asarray(learning_rate(job.config, job.steps)(np.arange(job.steps)), float)
        self.adam = torch.optim.AdamW(self.leaves, lr=1.0, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda i: rates[min(i, job.steps - 1)])
        self.done = 0

    def _model(self) -> Any:
        from transformers import AutoModel

        torch, job = self.torch, self.job

        class Classifier(torch.nn.Module):
            """A linear layer on the mean of the states. It returns the loss, to which PEFT's AdaLoRA adds its own."""

            def __init__(self, encoder: Any, head: Any):
                super().__init__()
                self.encoder = encoder
                self.classifier = torch.nn.Linear(*head["kernel"].shape)
                self.classifier.weight.data = torch.tensor(np.array(head["kernel"]).T.copy())
                self.classifier.bias.data = torch.tensor(np.array(head["bias"]))

            def forward(self, ids: Any, mask: Any, labels: Any = None, weight: Any = None) -> Any:
                states, each = self.encoder(ids, attention_mask=mask).last_hidden_state, mask[..., None].float()
                logits = self.classifier((states * each).sum(1) / each.sum(1))
                if labels is None:
                    return logits
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                return argparse.Namespace(loss=(losses * weight).sum() / weight.sum())

        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = AutoModel.from_pretrained(job.model, add_pooling_layer=False, **no_dropout)
        model = Classifier(encoder, job.params[HEAD])
        return model.train() if job.config.method == "full" else self._adapted(model).train()

    def _adapted(self, model: Any) -> Any:
        from peft import PeftModel

        job = self.job
        key, _ = jax.random.split(jax.random.key(job.config.seed))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            jpeft.hf.save(folder, job.peft, job.peft.init(key, job.params), job.params, prefix={"encoder/": "encoder"})
            file = folder / "adapter_config.json"
            config = json.loads(file.read_text())
            if config["peft_type"] == "ADALORA":  # the budget of `jpeft.recipes.optimizer`
                config |= {"target_r": 2 * config["init_r"] // 3, "total_step": job.steps}
                config |= {"tinit": job.steps // 10, "tfinal": 3 * job.steps // 10, "deltaT": 1}
                file.write_text(json.dumps(config))
            return PeftModel.from_pretrained(model, folder, is_trainable=True)

    def compile(self, batch: Any) -> None:
        """Nothing to compile."""

    def step(self, batch: Any) -> float:
        torch = self.torch
        ids, mask, labels = (torch.tensor(x).long() for x in (batch.input_ids, batch.attention_mask, batch.labels))
        # PEFT adds AdaLoRA's own loss in the forward pass of this inner model, which a model without a task type skips.
        allocate = getattr(getattr(self.model, "base_model", None), "update_and_allocate", None)
        model = self.model.base_model if allocate else self.model
        loss = model(ids, mask, labels, torch.tensor(batch.weight)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, 1.0)
        self.adam.step()
        if allocate:
            allocate(self.done)
        self.adam.zero_grad()
        self.schedule.step()
        self.done += 1
        return float(loss.detach())

    def facts(self) -> dict[str, Any]:
        return {"trained": sum(p.numel() for p in self.leaves), "state_bytes": sum(p.nbytes for p in self.leaves)}

    def predictions(self) -> np.ndarray:
        torch, found, rows = self.torch, [], []
        self.model.eval()
        with torch.no_grad():
            for batch in self.job.test:
                ids, mask = (torch.tensor(x).long() for x in (batch.input_ids, batch.attention_mask))
                found.append(self.model(ids, mask).argmax(-1).numpy()[batch.rows >= 0])
                rows.append(batch.rows[batch.rows >= 0])
        return np.concatenate(found)[np.argsort(np.concatenate(rows))]


# --- measurements ---


def widest(job: Any) -> Any:
    """The first batch of full width."""
    batches = [batch for batch, _ in job.batches(0)]
    return max(batches, key=lambda batch: batch.input_ids.shape[-1])


def memory(trainer: Any, batch: Any) -> int:
    """The growth of the resident size while two steps run."""
    trainer.compile(batch)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the resident size
    before = status("VmRSS")
    for _ in range(2):
        trainer.step(batch)
    return status("VmHWM") - before


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"no {field} in /proc/self/status"
    return int(found[1]) * 1024


def timed(trainer: Any, batch: Any, steps: int = 15) -> float:
    """The median time of a step."""
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        trainer.step(batch)
        times.append(time.perf_counter() - start)
    return median(times[2:])


def run_reviews(unit: Unit, threads: int) -> dict[str, Any]:
    """The record of a run on the reviews."""
    job: Any = prepare(unit.config())
    trainer = Trainer(job) if unit.side == JPEFT else TorchTrainer(job, threads)
    facts, batch = trainer.facts(), widest(job)
    growth = memory(trainer, batch)
    if unit.what == "times":
        return {"seconds": timed(trainer, batch)}
    trainer.begin()
    losses = [trainer.step(batch) for _, (batch, _) in zip(range(job.steps), job.batches(0), strict=False)]
    hits = trainer.predictions() == job.test.encoded.labels
    out = {"lr": job.config.rate, "losses": [round(loss, 4) for loss in losses], **facts, "growth_bytes": growth}
    return {**out, "accuracy": float(hits.mean()), "hits": "".join(str(int(hit)) for hit in hits)}


def run_chat(unit: Unit, threads: int) -> dict[str, Any]:
    """The record of a run on the conversations. ``answers`` and ``general`` hold sums of losses, and their counts."""
    job: Any = prepare(unit.config())
    trainer = Trainer(job)
    facts, growth = trainer.facts(), None
    if unit.what == "times":
        batch = widest(job)
        trainer.compile(batch)
        return {"seconds": timed(trainer, batch, 7)}
    if unit.method != BASE:
        growth = memory(trainer, widest(job))
        trainer.begin()
        for _, (batch, _) in zip(range(job.steps), job.batches(0), strict=False):
            trainer.step(batch)
    adapter, score = trainer.state.adapter, chat.scorer(job.peft)
    sums = lambda batches: [[float(x) for x in score(job.params, adapter, each)[::2]] for each in batches]  # noqa: E731
    answers = sums(job.test)
    general = sums(general_text(job, unit.budget["general_rows"]))
    facts = {} if unit.method == BASE else {"lr": job.config.rate, **facts, "growth_bytes": growth}
    return {**facts, "answers": answers, "general": general}


def general_text(job: Any, rows: int) -> Iterator[Any]:
    """Rows of WikiText-2's test part, of the length of a training row, as many a batch as in training."""
    text = (assets.fetch("wikitext-2", WIKITEXT, print_to_log) / "test.txt").read_text(encoding="utf-8")
    length, each = job.config.max_length, job.config.batch_size
    ids = np.array(job.tokenizer.encode(text[: 8 * rows * (length + 1)]), np.int32)
    ids = ids[: rows * length + 1]
    assert len(ids) == rows * length + 1, "too little text"
    inputs, targets = ids[:-1].reshape(-1, each, length), ids[1:].reshape(-1, each, length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (each, length))
    ones = np.ones((each, length), np.int32)
    for row, target in zip(inputs, targets, strict=True):
        yield chat.Batch(row, ones, positions, target, ones.astype(np.float32))


def print_to_log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- results ---


def perplexity(sums: Sequence[Sequence[float]]) -> float:
    total, tokens = np.sum(sums, axis=0)
    return math.exp(total / tokens)


def accuracy_error(rows: Sequence[Mapping[str, Any]]) -> float:
    """The standard error of the mean accuracy of some seeds: of the test texts, each with its mean over the seeds."""
    hits = np.mean([[int(hit) for hit in row["hits"]] for row in rows], axis=0)
    return float(hits.std(ddof=1) / math.sqrt(len(hits)))


def print_tables(records: Sequence[Mapping[str, Any]]) -> None:
    def of(**wanted: Any) -> list[Mapping[str, Any]]:
        return [each for each in records if all(each.get(name) == value for name, value in wanted.items())]

    body = []
    for name in METHODS:
        own = of(task="reviews", what="quality", method=name, side=JPEFT)
        if not own:
            continue
        cells, first = [name], own[0]
        for rows in (own, of(task="reviews", what="quality", method=name, side=TORCH)):
            scores = [row["accuracy"] for row in rows]
            cells.append(f"{np.mean(scores):.1%} ± {accuracy_error(rows):.1%}" if rows else NO_TORCH.get(name, ""))
        held = (first["state_bytes"] + first["growth_bytes"]) / 2**20
        seconds = [f"{1000 * row['seconds']:.0f}" for row in of(task="reviews", what="times", method=name, side=JPEFT)]
        cells += [f"{first['lr']:g}", f"{first['trained'] - first['head']:,}", f"{first['disk_bytes'] / 1e6:.2f}"]
        body.append([*cells, f"{held:.0f}", *(seconds[:1] or [""])])
    if body:
        print("\n### reviews\n")
        markdown(["", "accuracy", "in PEFT", "rate", "trained", "MB on disk", "MiB of memory", "ms"], body)
    body = []
    for row in of(task="chat", what="quality"):
        sizes = [f"{row['trained']:,}", f"{row['disk_bytes'] / 1e6:.2f}"] if "trained" in row else ["", ""]
        body.append([row["method"], f"{perplexity(row['answers']):.3f}", f"{perplexity(row['general']):.2f}", *sizes])
    if body:
        print("\n### chat\n")
        markdown(["", "perplexity of answers", "of general text", "trained", "MB on disk"], body)


# --- the command ---


def budget_of(task: str, tiny: bool) -> dict[str, Any]:
    return BUDGETS[task] | (TINY[task] if tiny else {})


def units(args: argparse.Namespace) -> Iterator[Unit]:
    """The runs, in the order in which they are made."""
    what = "times" if args.times else "quality"
    for task in args.tasks:
        budget = budget_of(task, args.tiny)
        sides = args.sides if task == "reviews" else [JPEFT] * (JPEFT in args.sides)
        names = METHODS if task == "reviews" else CHAT_METHODS
        for seed in args.seeds:
            for side in sides:
                for name in names:
                    left_out = (side == TORCH and name in NO_TORCH) or (name == BASE and args.times)
                    if not left_out and (not args.only or name in args.only):
                        yield Unit(task, side, name, seed, what, budget)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", default=None, help="a JSON line for each finished run; those are not repeated")
    parser.add_argument("--json", default=None, help="write the results to this file")
    parser.add_argument("--only", action="append", default=[], help="a method; may be repeated")
    parser.add_argument("--tasks", default="reviews,chat", help="separated by commas")
    parser.add_argument("--sides", default=f"{JPEFT},{TORCH}", help="separated by commas")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--times", action="store_true", help="measure the times of steps, and train nothing")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--tiny", action="store_true", help="a tiny budget, to try the script")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, known in (("only", [BASE, *METHODS]), ("tasks", [*BUDGETS]), ("sides", [JPEFT, TORCH])):
        given = getattr(args, name) if name == "only" else [each for each in getattr(args, name).split(",") if each]
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name} {', '.join(unknown)}: expected some of {', '.join(known)}")
        setattr(args, name, given)
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    return args


def one(unit: Unit, threads: int) -> dict[str, Any]:
    """The record of a run, in the process that `main` starts for it."""
    run = run_reviews if unit.task == "reviews" else run_chat
    return {**vars(unit), **run(unit, threads), "machine": machine(PACKAGES)}


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if args.one:
        print(json.dumps(one(Unit(**json.loads(args.one)), args.threads)))
        return
    file = Path(args.resume) if args.resume else None
    records = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    for unit in units(args):
        if any(unit.is_of(record) for record in records):
            continue
        start = time.perf_counter()
        command = [sys.executable, __file__, "--threads", str(args.threads), "--one", json.dumps(vars(unit))]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        label = f"{unit.task} {unit.side} {unit.method} {unit.seed} {unit.what}"
        if done.returncode:
            print_to_log(f"{label}: failed with status {done.returncode}")
            continue
        records.append(json.loads(done.stdout.splitlines()[-1]))
        print_to_log(f"{label}: {records[-1].get('accuracy', '')} after {time.perf_counter() - start:.0f} s")
        if file:
            with file.open("a") as out:
                out.write(json.dumps(records[-1]) + "\n")
    records = [each for each in records if each["budget"] == budget_of(each["task"], args.tiny)]
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    print_tables(records)


if __name__ == "__main__":
    main()
