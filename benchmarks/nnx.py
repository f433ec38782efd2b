"""Training steps of Flax NNX models: jpeft's two forms, qwix's LoRA, `nnx.LoRA` and full fine-tuning, in one run.

    python benchmarks/nnx.py [--models own,tunix] [--length 128] [--rounds 15] [--json nnx.json]

A small transformer of `nnx.Linear`, and tunix's Qwen3: 4 layers of width 256, 4 x 128 random tokens, float32. LoRA of
rank 8 (alpha 8, no dropout) on all projections, AdamW, the same adapter at the start.

functional  `method.bind` and `peft.apply`.
attached    `jpeft.nnx.attach` and `nnx.Optimizer`.
qwix        `qwix.apply_lora_to_model` and `nnx.Optimizer`; needs `pip install qwix==0.1.8`.
wrappers    `nnx.LoRA` put around each layer by hand; tunix's attention has layers that it cannot wrap.
full        all parameters, with `nnx.Optimizer`.

FLOPs and temporary bytes are of the compiled step. "Set up" are the seconds from the model to one with an adapter.
A round runs each step once, in a shuffled order; ratios of time are medians of the ratios within a round. tunix's wheel
is downloaded once, and only its models are imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Variant, compiled_facts, cross_entropy, machine, markdown, measure, ratio
from flax import nnx

import jpeft
from jpeft import qwix as exchange
from jpeft.core.tree import flatten
from jpeft.recipes.assets import Asset, fetch

LR, BASE = 1e-3, "qwix"
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = f".*({'|'.join(ATTENTION + FEED_FORWARD)})"
PACKAGES = ("jax", "flax", "optax", "qwix")
WHEEL = Asset(
    package="google-tunix",
    version="0.1.7",
    sha256="857b893b8ba71a61cce8cb9de2301218d311f72044de94aa2b826275968033b4",
    megabytes=1,
    inside="tunix",
)


class Sizes(NamedTuple):
    """The sizes of a model and of a batch."""

    layers: int = 4
    width: int = 256
    hidden: int = 768
    heads: int = 4
    vocabulary: int = 512
    rank: int = 8
    rows: int = 4
    length: int = 128


TINY = Sizes(layers=1, width=16, hidden=32, heads=2, vocabulary=32, rank=2, rows=2, length=8)


# --- models ---


class Block(nnx.Module):
    """Attention and a gated feed-forward layer."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.q_proj, self.k_proj = linear(sizes.width, sizes.width), linear(sizes.width, sizes.width)
        self.v_proj, self.o_proj = linear(sizes.width, sizes.width), linear(sizes.width, sizes.width)
        self.gate_proj, self.up_proj = linear(sizes.width, sizes.hidden), linear(sizes.width, sizes.hidden)
        self.down_proj = linear(sizes.hidden, sizes.width)
        self.norm1, self.norm2 = nnx.RMSNorm(sizes.width, rngs=rngs), nnx.RMSNorm(sizes.width, rngs=rngs)
        self.heads = sizes.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm1(x)
        projected = (linear(h) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1) for y in projected)
        x = x + self.o_proj(nnx.dot_product_attention(q, k, v).reshape(x.shape))
        h = self.norm2(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h))


class Transformer(nnx.Module):
    """A small model of `nnx.Linear` layers."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        self.embedder = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
        self.layers = nnx.List([Block(sizes, rngs) for _ in range(sizes.layers)])
        self.lm_head = nnx.Linear(sizes.width, sizes.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Work(NamedTuple):
    """A model to train.

    Attributes:
      model: the model.
      inputs: the arguments of its call, the first being ids ``[rows, length]``.
      logits: takes the logits from its outputs.
    """

    model: Any
    inputs: tuple[Any, ...]
    logits: Callable[[Any], jax.Array]

    def loss(self, outputs: Any) -> jax.Array:
        """The mean cross-entropy of the next token."""
        return cross_entropy(self.logits(outputs)[:, :-1].astype(jnp.float32), self.inputs[0][:, 1:])


def ids(sizes: Sizes) -> np.ndarray:
    shape = (sizes.rows, sizes.length)
    return np.random.default_rng(0).integers(1, sizes.vocabulary, shape).astype(np.int32)


def own(sizes: Sizes) -> Work:
    return Work(Transformer(sizes, nnx.Rngs(0)), (ids(sizes),), lambda logits: logits)


def tunix(sizes: Sizes) -> Work:
    """tunix's Qwen3."""
    package = types.ModuleType("tunix")  # without what the package itself imports, as its trainers
    package.__path__ = [str(fetch("tunix", WHEEL, lambda line: print(line, file=sys.stderr)))]
    sys.modules["tunix"] = package
    qwen3: Any = importlib.import_module("tunix.models.qwen3.model")
    config = qwen3.ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
        embed_dim=sizes.width,
        hidden_dim=sizes.hidden,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads,
        head_dim=sizes.width // sizes.heads,
        rope_theta=10000,
        norm_eps=1e-6,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        use_tied_embedding=False,
        remat_config=qwen3.RematConfig.NONE,
    )
    shape = (sizes.rows, sizes.length)
    positions = np.broadcast_to(np.arange(sizes.length, dtype=np.int32), shape)
    mask = np.broadcast_to(np.tril(np.ones((sizes.length, sizes.length), bool)), (*shape, sizes.length))
    return Work(qwen3.Qwen3(config, rngs=nnx.Rngs(0)), (ids(sizes), positions, None, mask), lambda outputs: outputs[0])


MODELS: dict[str, Callable[[Sizes], Work]] = {"own": own, "tunix": tunix}


# --- steps ---


def variant(name: str, step: Callable[..., Any], moving: Any, frozen: Any, seconds: float) -> Variant:
    """A step ``(moving, frozen) -> (moving, loss)``, with the facts of its program and the loss before a step."""
    holder = [jax.tree.map(jnp.copy, moving)]  # donated
    compiled = jax.jit(step, donate_argnums=0).lower(holder[0], frozen).compile()
    facts = {**compiled_facts(compiled), "set_up_seconds": seconds, "losses": []}

    def run() -> None:
        holder[0], loss = compiled(holder[0], frozen)
        facts["losses"].append(float(loss))

    return Variant(name, run, **facts)


def functional(work: Work, peft: Any, adapter: Any, seconds: float) -> Variant:
    """A step of `peft.apply`."""
    tx, params = optax.adamw(LR), nnx.state(work.model, nnx.Param)

    def step(moving: Any, params: Any) -> Any:
        adapter, opt_state = moving
        loss, grads = jax.value_and_grad(lambda a: work.loss(peft.apply(params, a, *work.inputs)))(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return (optax.apply_updates(adapter, updates), opt_state), loss

    return variant("functional", step, (adapter, tx.init(adapter)), params, seconds)


def stateful(name: str, work: Work, model: Any, wrt: Any, seconds: float) -> Variant:
    """A step of `nnx.Optimizer`, as `nnx.jit` would run it: of the state of the model and the optimizer."""
    moves = nnx.Any(wrt, nnx.OptState)
    optimizer = nnx.Optimizer(model, optax.adamw(LR), wrt=wrt)
    graphdef, moving, frozen = nnx.split((model, optimizer), moves, ...)

    def step(moving: Any, frozen: Any) -> Any:
        # nnx.merge would put the Variables of the caller into the module.
        moving, frozen = jax.tree.map(lambda x: x, (moving, frozen))
        model, optimizer = nnx.merge(graphdef, moving, frozen)
        loss, grads = nnx.value_and_grad(lambda m: work.loss(m(*work.inputs)), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer), moves), loss

    return variant(name, step, moving, frozen, seconds)


def qwix_model(work: Work, rank: int) -> Any:
    """The model with qwix's LoRA in it."""
    import qwix

    provider = qwix.LoraProvider(module_path=TARGETS, rank=rank, alpha=float(rank))
    return qwix.apply_lora_to_model(work.model, provider, *work.inputs, rngs=nnx.Rngs(0))


def wrapped_model(work: Work, adapter: Any, rank: int) -> Any:
    """A copy of the model with `nnx.LoRA` around its projections, and the numbers of an adapter."""
    model, leaves = nnx.clone(work.model), flatten(adapter)
    for path, module in list(nnx.iter_modules(model)):
        for name in ATTENTION + FEED_FORWARD:
            if isinstance(base := getattr(module, name, None), nnx.Linear):
                lora = nnx.LoRA(base.in_features, rank, base.out_features, base_module=base, rngs=nnx.Rngs(0))
                for leaf in ("lora_a", "lora_b"):
                    getattr(lora, leaf)[...] = leaves[(*map(str, path), name, leaf)]
                setattr(module, name, lora)
    return model


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    return function(*args, **kwargs), time.perf_counter() - start


def steps(kind: str, sizes: Sizes) -> Iterator[Variant]:
    """The steps of one model."""
    work = MODELS[kind](sizes)
    yield stateful("full", work, work.model, nnx.Param, 0.0)  # first: it traces the model for the first time
    method = jpeft.LoRA(rank=sizes.rank, targets=TARGETS)
    peft, seconds = timed(method.bind, work.model, *work.inputs)
    # B is zero at the start; where it is not, the losses show that all compute the same.
    fresh = peft.init(jax.random.key(1), nnx.state(work.model, nnx.Param))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    adapter = tree.unflatten(
        x + 0.05 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)
    )
    yield functional(work, peft, adapter, seconds)
    (tuned, _), seconds = timed(jpeft.nnx.attach, work.model, method, *work.inputs, rngs=nnx.Rngs(0), adapter=adapter)
    yield stateful("attached", work, tuned, nnx.LoRAParam, seconds)
    theirs, seconds = timed(qwix_model, work, sizes.rank)
    nnx.update(theirs, exchange.export(peft, adapter, nnx.state(theirs, nnx.LoRAParam)))
    yield stateful("qwix", work, theirs, nnx.LoRAParam, seconds)
    if kind == "own":
        wrapped, seconds = timed(wrapped_model, work, adapter, sizes.rank)
        yield stateful("wrappers", work, wrapped, nnx.LoRAParam, seconds)


def measured(kind: str, sizes: Sizes, rounds: int) -> dict[str, dict[str, Any]]:
    """The facts and times of each step by its name, with their ratios to qwix's."""
    by = {each.name: each for each in steps(kind, sizes)}
    measure([*by.values()], rounds)
    rows, base = {}, by[BASE]
    for name, each in by.items():
        relative = {key: each.facts[key] / base.facts[key] for key in ("flops", "temporary_bytes")}
        relative |= {"time": ratio(each, base), "fastest": min(each.times) / min(base.times)}
        losses = each.facts.pop("losses")
        rows[name] = {**each.facts, "loss": losses[0], "seconds": statistics.median(each.times), "relative": relative}
    return rows


# --- the command ---


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    head = ["", "GFLOP", "/ qwix", "temporaries MiB", "/ qwix", "set up s", "ms", "/ qwix"]
    body = []
    for name, row in rows.items():
        flops, temporaries, time_ = (row["relative"][key] for key in ("flops", "temporary_bytes", "time"))
        cells = [name, f"{row['flops'] / 1e9:.3f}", f"{flops:.3f}"]
        cells += [f"{row['temporary_bytes'] / 2**20:.1f}", f"{temporaries:.3f}"]
        cells += ["" if name == "full" else f"{row['set_up_seconds']:.2f}"]
        body.append([*cells, f"{1000 * row['seconds']:.0f}", f"{time_:.2f}"])
    print(f"\n### {title}\n")
    markdown(head, body)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="models to train, separated by commas")
    parser.add_argument("--length", type=int, default=None, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    args = parser.parse_args(argv)
    args.models = [each for each in args.models.split(",") if each]
    if unknown := sorted(set(args.models) - set(MODELS)):
        parser.error(f"--models {', '.join(unknown)}: expected some of {', '.join(MODELS)}")
    if importlib.util.find_spec("qwix") is None:
        parser.error("the steps are compared with qwix's: pip install qwix==0.1.8")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    facts = machine(PACKAGES)
    out: dict[str, Any] = {"machine": facts, "arguments": vars(args), "models": {}}
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    sizes = TINY if args.tiny else Sizes()
    sizes = sizes._replace(length=args.length or sizes.length)
    for kind in args.models:
        out["models"][kind] = rows = measured(kind, sizes, args.rounds)
        if args.json:  # after each model: what is measured stays
            Path(args.json).write_text(json.dumps(out, indent=1))
        print_table(f"{kind}, {sizes.rows} x {sizes.length} tokens", rows)


if __name__ == "__main__":
    main()
