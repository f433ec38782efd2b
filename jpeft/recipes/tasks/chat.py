"""The task `chat`: a language model, usually over a quantized base, learns the assistant's turns in conversations.

model, params = load_base(resolve_model("smollm2"), "nf4")
peft = jpeft.LoRA(rank=8, targets="all-linear").bind(model, params, *example_inputs())
step = jpeft.train_step(peft, loss_fn(peft), optax.adamw(5e-4))
state, metrics = step(state, params, balanced(batch))
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jpeft.core.placement import AnyMesh, replicated
from jpeft.core.quantized import Quantized
from jpeft.core.tree import flatten
from jpeft.errors import UserError
from jpeft.files import write_atomically
from jpeft.methods.base import Method
from jpeft.models.axes import logical_names, logical_shardings
from jpeft.models.decoder import Decoder
from jpeft.models.families import is_decoder
from jpeft.models.loading import load as load_model
from jpeft.models.saving import save as save_model
from jpeft.models.sources import read_config
from jpeft.models.vocabulary import reshape_like
from jpeft.parallel.batches import constrained, data_ways, layout_on
from jpeft.quantization.tree import dequantize, quantize
from jpeft.recipes import run_folder
from jpeft.recipes.adapters import load_of_run
from jpeft.recipes.assets import resolve_conversations, resolve_model
from jpeft.recipes.config import Config, Setup, read_chat_template
from jpeft.recipes.start import begin
from jpeft.recipes.tasks import base
from jpeft.recipes.tasks.base import AbstractModel, Job, Merging, Reporter, abstract_ids, place_batches, quantizing
from jpeft.recipes.vocabulary import reshape, with_rows
from jpeft.serving.text_generator import Settings, TextGenerator
from jpeft.storage import as_path, check_writable
from jpeft.text import chat_template, conversations
from jpeft.text.conversations import Batch
from jpeft.text.scoring import final_number
from jpeft.training.losses import chunked_cross_entropy

if TYPE_CHECKING:
    from jpeft.core.peft import Peft

METRIC = ("eval_perplexity", "perplexity of held-out answers")
REMATS = ("full", "dots")
# By the class of the method. Runs record it, so leaving it out would keep older runs from being resumed.
_METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"LoRA": {"targets": "all-linear"}}
_CHUNK = 1024  # tokens whose logits are held at once
_SAMPLE_TOKENS = 200
_MERGING = Merging()

Scorer = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]


# ------------------------------------------------------------------------------------------------------------- model


def load_base(
    path: Path, scheme: str = "none", *, mesh: Mesh | None = None, dtype: str = "float32", remat: str | None = None
) -> tuple[Any, Any]:
    """A language model and its parameters, sharded over a mesh by their logical axis names.

    Weights are quantized as they are read, unless the scheme is "none". A folder that holds quantized weights stays as
    it is, and any other scheme raises a UserError.

    >>> model, params = load_base(resolve_model("smollm2"), "nf4")  # doctest: +SKIP
    """
    if not is_decoder(path):
        raise UserError(f"{path}: not a language model, but an encoder; it cannot learn to answer")
    quantized = is_quantized(path)
    shardings = None if mesh is None else lambda model: logical_shardings(model, mesh)
    quantize_as = None if scheme == "none" or quantized else scheme
    with quantizing(scheme):
        model, params = load_model(
            path, param_dtype=jnp.dtype(dtype), quantize=quantize_as, shardings=shardings, remat=remat
        )
    if quantized and scheme not in ("none", *(schemes := schemes_of(params))):
        raise UserError(f"`quantize` {scheme}: {path} is quantized already; give `quantize` {min(schemes)}")
    return model, params


def is_quantized(path: Path) -> bool:
    """Whether a model folder holds quantized weights, from its config.json alone.

    >>> is_quantized(resolve_model("smollm2"))  # doctest: +SKIP
    False
    """
    return "quantization_config" in read_config(path)


def schemes_of(params: Any) -> set[str]:
    """The quantization schemes of a parameter tree's leaves.

    >>> schemes_of({"a": {"kernel": np.ones((64, 64))}})
    set()
    """
    return {leaf.scheme for leaf in flatten(params).values() if isinstance(leaf, Quantized)}


def load_chat_tokenizer(
    path: Path, model: Any, max_length: int, template: str | None = None
) -> chat_template.ChatTokenizer:
    """The tokenizer and the chat template of a model, if the model takes rows of `max_length` tokens.

    Args:
        template: the text of another chat template to use instead of the model's.

    >>> load_chat_tokenizer(resolve_model("smollm2"), model, 512).stop_ids  # doctest: +SKIP
    (2,)
    """
    tokenizer = chat_template.read(path).with_template(template)
    chat_template.check_vocabulary(tokenizer, model.config.vocab_size)
    base.check_length(max_length, model.config.max_position_embeddings)
    return tokenizer


def example_inputs(batch: int = 2, length: int = 8) -> tuple[jax.ShapeDtypeStruct]:
    """Abstract `input_ids`, enough to bind a method.

    >>> example_inputs()[0].shape
    (2, 8)
    """
    return (abstract_ids(batch, length),)


# --------------------------------------------------------------------------------------------------- loss and scores


def balanced(batch: Batch, answer_tokens: int | None = None, rows: int | None = None) -> Batch:
    """Rescales token weights so that the mean over rows equals the mean over answer tokens.

    Micro-batches then count by the answer tokens they hold, and accumulated gradients equal those of the whole batch.

    Args:
        answer_tokens: the answer tokens of the whole batch, if `batch` is one process's part of it.
        rows: the rows of the whole batch, likewise.

    >>> weight = np.float32([[0, 1, 1, 1], [0, 0, 0, 1]])
    >>> balanced(Batch(weight, weight, weight, weight, weight)).weight.tolist()
    [[0.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.5]]
    """
    total = max(float(batch.weight.sum()) if answer_tokens is None else answer_tokens, 1.0)
    return batch._replace(weight=batch.weight * np.float32((rows or batch.weight.shape[0]) / total))


def _sums(
    peft: Peft, adapter: Any, params: Any, batch: Batch, mesh: AnyMesh | None, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """The weighted sums of the cross-entropies and of the correct predictions."""
    states = peft.apply(
        params,
        adapter,
        batch.input_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        method="hidden_states",
        **options,
    )

    def head(states: jax.Array) -> jax.Array:
        return peft.apply(params, adapter, states, method="logits")

    # A device holds the logits of its own rows only, so a chunk grows with the number of shards of the batch.
    chunk = _CHUNK * (1 if mesh is None else data_ways(mesh))
    return chunked_cross_entropy(head, states, jnp.asarray(batch.targets), jnp.asarray(batch.weight), chunk)


def loss_fn(
    peft: Peft, train_mode: bool = False, mesh: AnyMesh | None = None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Mean cross-entropy over the answer tokens of a `balanced` batch, as `jpeft.train_step` takes it.

    Args:
        train_mode: turns dropout on.
        mesh: the mesh that batches are sharded over. Each chunk of tokens all-gathers a sharded head; with more devices
            to share a chunk's logits, a chunk has more tokens.

    >>> step = jpeft.train_step(peft, loss_fn(peft), optax.adamw(5e-4))  # doctest: +SKIP
    """

    def loss(adapter: Any, params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"deterministic": False, "rngs": {"dropout": rng}} if train_mode else {}
        total, correct = _sums(peft, adapter, params, batch, mesh, **options)
        rows = batch.weight.shape[0]
        return total / rows, {"accuracy": correct / rows}

    return loss


def scorer(peft: Peft, mesh: Mesh | None = None) -> Scorer:
    """The compiled `(params, adapter, batch) -> (sum of losses, correct predictions, answer tokens)`; keep it.

    >>> scorer(peft)(params, adapter, batch)  # doctest: +SKIP
    """

    def sums(params: Any, adapter: Any, batch: Batch) -> Any:
        with constrained(layout_on(mesh, batch)):
            return *_sums(peft, adapter, params, batch, mesh), batch.weight.sum()

    return jax.jit(sums, out_shardings=None if mesh is None else replicated(mesh))


class Scores(NamedTuple):
    """The mean cross-entropy and the accuracy over answer tokens."""

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss.

        >>> round(Scores(loss=0.6931, accuracy=0.5).perplexity, 2)
        2.0
        """
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(score: Scorer, params: Any, adapter: Any, batches: Iterable[Batch]) -> Scores:
    """Means over the answer tokens of all batches.

    >>> evaluate(scorer(peft), params, adapter, batches).perplexity  # doctest: +SKIP
    """
    loss, correct, count = np.sum([[np.float64(x) for x in score(params, adapter, batch)] for batch in batches], axis=0)
    return Scores(float(loss / count), float(correct / count))


# ----------------------------------------------------------------------------------------------------------- samples


class Sample(NamedTuple):
    """A prompt, the reference answer from the data, and the model's answer."""

    prompt: str
    reference: str
    answer: str

    @property
    def right(self) -> bool | None:
        """Whether both answers end in the same number; None if the reference marks none by `####`.

        >>> Sample("3 * 6?", "#### 18", "It is 18.").right, Sample("Tea?", "Yes.", "Yes.").right
        (True, None)
        """
        if "####" not in self.reference:
            return None
        return final_number(self.answer) == final_number(self.reference)


def samples(
    peft: Peft,
    params: Any,
    adapter: Any,
    tokenizer: chat_template.ChatTokenizer,
    prompts: Sequence[tuple[Any, str]],
    new_tokens: int,
    variables: Sequence[Mapping[str, Any]] = (),
) -> list[Sample]:
    """Greedy answers to `conversations.prompts`, of at most `new_tokens` tokens or what the context has left.

    Args:
        variables: of the chat template, by prompt, such as `tools`; none by default.

    >>> samples(peft, params, adapter, tokenizer, conversations.prompts(test)[:4], 200)[0].answer  # doctest: +SKIP
    """
    generator = TextGenerator.of(peft, params, adapter, tokenizer)
    ids = [
        tokenizer.encode_chat(list(messages), **more)
        for (messages, _), more in zip(prompts, variables or [{}] * len(prompts), strict=True)
    ]
    room = peft.model.config.max_position_embeddings - peft.virtual_tokens - max(map(len, ids))
    texts = generator.generate(ids, Settings(min(new_tokens, room)))
    return [
        Sample(messages[-1].get("content") or "", reference, text)
        for (messages, reference), text in zip(prompts, texts, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True, eq=False, kw_only=True)
class ChatJob(Job):
    """A `Job` that trains a language model on conversations.

    Attributes:
        tokenizer: the model's tokenizer and chat template.
        test: the evaluation batches.
        held_out: the conversations that `test` was made of.
    """

    tokenizer: chat_template.ChatTokenizer
    test: conversations.Batches
    held_out: conversations.Conversations

    def loss_fn(self) -> Any:
        return loss_fn(self.peft, train_mode=bool(self.config.dropout), mesh=self.mesh)

    def prepare_batch(self, batch: Batch, count: conversations.Count) -> Batch:
        return balanced(batch, count.answer_tokens, self.config.batch_size)

    def evaluator(self) -> Callable[[Any], dict[str, float]]:
        score = scorer(self.peft, self.mesh)

        def run(adapter: Any) -> dict[str, float]:
            placed = (batch for batch, _ in place_batches(self.test, self.mesh))
            scores = evaluate(score, self.params, adapter, placed)
            return {
                "eval_loss": scores.loss,
                "eval_token_accuracy": scores.accuracy,
                "eval_perplexity": scores.perplexity,
            }

        return run

    def describe(self, metrics: Mapping[str, Any]) -> str:
        return f"perplexity of held-out answers {metrics['eval_perplexity']:.3f}, loss {metrics['eval_loss']:.4f}"

    def result(self, fresh: Any, adapter: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "perplexity_before": before["eval_perplexity"],
            "perplexity_after": after["eval_perplexity"],
            "train_examples": len(self.train.encoded),
            "left_out": len(self.train.encoded.left_out),
            "eval_examples": len(self.test.encoded),
            "padding": self.train.count.padding,
            "shapes": sorted(conversations.shapes(self.train)),
            "samples": self._samples(fresh, adapter),
        }

    def _samples(self, fresh: Any, adapter: Any) -> list[dict[str, Any]]:
        """The first held-out prompts, answered before and after training."""
        if not self.config.samples or not (chosen := self._sampled):
            return []
        prompts, variables = conversations.prompts(chosen), chosen.variables
        before, after = (
            samples(self.peft, self.params, leaves, self.tokenizer, prompts, _SAMPLE_TOKENS, variables)
            for leaves in (fresh, adapter)
        )
        return [
            {
                "prompt": first.prompt,
                "reference": first.reference,
                "before": first.answer,
                "after": last.answer,
                "right_before": first.right,
                "right_after": last.right,
            }
            for first, last in zip(before, after, strict=True)
        ]

    @cached_property
    def _sampled(self) -> conversations.Conversations:
        """The first held-out conversations that have a prompt, and all of whose answers fit into a row."""
        fitting = set(self.test.encoded.lines) - set(self.test.encoded.left_out)
        rows = [row for row, line in enumerate(self.held_out.lines) if line in fitting]
        some = conversations.with_prompts(self.held_out.take(rows, self.held_out.source))
        return some.take(range(min(self.config.samples, len(some))), some.source)

    @property
    def task_record(self) -> dict[str, Any]:
        template = self.tokenizer.template or ""
        return {"chat_template": hashlib.sha256(template.encode()).hexdigest()}


def method_defaults(kind: type[Method]) -> dict[str, Any]:
    """The fields of a method that have another default than the method's own.

    >>> import jpeft
    >>> method_defaults(jpeft.LoRA)
    {'targets': 'all-linear'}
    """
    return dict(_METHOD_DEFAULTS.get(kind.__name__, {}))


def complete(method: Method) -> Method:
    """The method itself: nothing else is trained."""
    return method


def text_ids(folder: Path, text: str) -> list[int]:
    """The token ids of a text, without special tokens.

    >>> text_ids(resolve_model("smollm2"), "Solve the problem.")  # doctest: +SKIP
    """
    return chat_template.read(folder).tokenizer.encode(text, add_special_tokens=False).ids


def text_inputs(ids: Sequence[int]) -> tuple[Any, ...]:
    """The inputs of a language model for one text.

    >>> text_inputs([5, 6])[0].shape
    (1, 2)
    """
    return (jnp.asarray([ids], jnp.int32),)


def prepare(config: Config, method: Method | None, reporter: Reporter, setup: Setup) -> ChatJob:
    """Reads the conversations, loads the language model, and binds the method."""
    train_file, eval_file = resolve_conversations(config.data, config.eval, reporter.say)
    template = None if config.chat_template is None else read_chat_template(config.chat_template)
    ignore = [key.strip() for key in (config.ignore_keys or "").split(",")]
    read = functools.partial(conversations.read, ignore=ignore)
    train, test = base.evaluation_data(
        read(train_file), eval_file, read, conversations.train_test_split, config, reporter
    )
    if ignored := dict.fromkeys((*train.ignored, *test.ignored)):
        reporter.say(f"{train.source}: keys that only describe a row, and are not read: {', '.join(ignored)}")
    path = resolve_model(config.model, reporter.say)
    model, params = load_base(path, config.quantize, mesh=setup.mesh, dtype=config.dtype, remat=setup.remat)
    model, params, rows = reshape(model, params, config, lambda: chat_template.read(path).size, reporter.say)
    tokenizer = load_chat_tokenizer(path, model, config.max_length, template)
    complete = functools.partial(with_rows, model=model, rows=rows)
    config, peft, start = begin(config, method, model, params, example_inputs(), complete, reporter.say)
    base.check_length(config.max_length, model.config.max_position_embeddings, peft.virtual_tokens)
    encoded, test_encoded = (_encode(part, tokenizer, config.max_length, reporter) for part in (train, test))
    batches = conversations.Batches(
        encoded, config.batch_size, config.max_length, config.seed, config.epochs, config.packed
    )
    if warning := conversations.stop_warning(encoded, tokenizer):
        reporter.say(f"warning: {warning}")
    shapes = _format_shapes(conversations.shapes(batches))
    reporter.say(
        f"{len(encoded):,} examples in {len(batches):,} batches of {shapes}, {batches.count.padding:.1%} padding"
    )
    return ChatJob(
        config=config.located(),
        model=path,
        files={"train": train_file, "eval": eval_file},
        params=params,
        peft=peft,
        train=batches,
        mesh=setup.mesh,
        start=start,
        tokenizer=tokenizer,
        test=conversations.Batches(test_encoded, config.batch_size, config.max_length),
        held_out=test,
    )


def _encode(
    examples: conversations.Conversations, tokenizer: chat_template.ChatTokenizer, max_length: int, reporter: Reporter
) -> conversations.Encoded:
    """The token ids of conversations; reports those that are too long, and conversations that make several examples."""
    encoded = conversations.encode(examples, tokenizer, max_length)
    total = len(encoded) + len(encoded.left_out)
    if total > len(examples):
        reporter.say(
            f"{examples.source}: {len(examples):,} conversations make {total:,} examples: the chat template changes "
            "answers once more messages follow, so each is learned as the last one"
        )
    if encoded.left_out:
        first = ", ".join(map(str, encoded.left_out[:3]))
        reporter.say(
            f"{examples.source}: {len(encoded.left_out):,} of {total:,} examples are longer than "
            f"{max_length} tokens and left out (at line {first}, …); see `max_length`"
        )
    return encoded


def _format_shapes(shapes: Iterable[Sequence[int]]) -> str:
    listed = [f"{rows}×{width}" for rows, width in sorted(map(tuple, shapes))]
    return f"{len(listed)} shape{'s' * (len(listed) > 1)} ({', '.join(listed)})"


def abstract(config: Config, model: Any, params: Any, setup: Setup) -> AbstractModel:
    """An abstract language model, and a batch for it."""
    if not isinstance(model, Decoder):
        raise UserError(f"`model` {config.model}: an encoder; plan for it with `task` classify")
    ids = abstract_ids(config.batch_size, config.max_length)
    return AbstractModel(
        model=model.clone(remat=setup.remat),
        params=params,
        inputs=example_inputs(),
        names=logical_names(model),
        batch=Batch(ids, ids, ids, ids, weight=cast(Any, jax.ShapeDtypeStruct(ids.shape, jnp.float32))),
        positions=model.config.max_position_embeddings,
    )


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The perplexities, the correct samples if the data mark their final numbers, and the shapes of the batches."""
    rows = [
        ("perplexity before", f"{result['perplexity_before']:.3f} (of {result['eval_examples']:,} held-out answers)"),
        ("perplexity after", f"{result['perplexity_after']:.3f}"),
    ]
    if scored := [sample for sample in result["samples"] if sample["right_after"] is not None]:
        before, after = (sum(sample[key] for sample in scored) for key in ("right_before", "right_after"))
        rows.append(("right final number", f"{before} of {len(scored)} before, {after} after"))
    return [*rows, ("batches", f"{_format_shapes(result['shapes'])}, {result['padding']:.1%} padding")]


# --------------------------------------------------------------------------------------------------------------- runs


class Trained(NamedTuple):
    """The language model of a run with its adapter.

    Attributes:
        peft: the bound method; `peft.model` is the module.
        params: the base weights, quantized as for training.
        adapter: the trained adapter.
        tokenizer: the model's tokenizer and chat template.
        source: the folder or `.gguf` file that the model was loaded from.
    """

    peft: Peft
    params: Any
    adapter: Any
    tokenizer: chat_template.ChatTokenizer
    source: Path


def open_run(run: str | Path, log: Callable[[str], None] = lambda line: None) -> Trained:
    """The language model of a run, with its adapter or, while it is not finished, that of a checkpoint.

    >>> open_run("runs/smollm2-lora-1").source  # doctest: +SKIP
    """
    record = run_folder.usable(run := as_path(run))
    config = Config(**record["config"])
    if config.task != "chat":
        raise UserError(f"{run}: was trained to label texts, not to chat; use jpeft predict {run}")
    source = resolve_model(config.model, log)
    model, params = load_base(source, config.quantize, dtype=config.dtype)
    model, params, _ = reshape(model, params, config, lambda: chat_template.read(source).size)
    tokenizer = load_chat_tokenizer(source, model, 1, config.chat_template)
    peft, adapter = load_of_run(run, record, model, params, example_inputs(), log)
    return Trained(peft, params, adapter, tokenizer, source)


def hf_options(trained: Trained) -> dict[str, Any]:
    """The arguments of `jpeft.hf.save` for the adapter of an opened run.

    >>> hf_options(open_run("runs/smollm2-lora-1"))  # doctest: +SKIP
    {'task_type': 'CAUSAL_LM'}
    """
    return {"task_type": "CAUSAL_LM"}


def export_run(run: Path, out: Path, how: Merging = _MERGING, log: Callable[[str], None] = lambda line: None) -> str:
    """Writes a HuggingFace folder of a run, its adapter merged in. Returns how to use the folder.

    >>> export_run(Path("runs/smollm2-lora-1"), Path("merged"))  # doctest: +SKIP
    'jpeft chat --model merged'
    """
    run, out = as_path(run), as_path(out)
    check_writable(out)
    trained, config = open_run(run, log), Config(**run_folder.read_record(run)["config"])
    schemes = schemes_of(trained.params)
    if how.requantize and not schemes:
        raise UserError(f"`requantize`: {run} was trained over plain weights; merge without it, then jpeft quantize")
    reload = lambda: reshape_like(*load_base(trained.source), trained.peft.model)[1]  # noqa: E731
    params = base.unrounded(trained.params, trained.source, config.dtype, reload)
    scheme = min(schemes) if how.requantize else None
    with base.writing(out):
        export(out, trained.peft, params, trained.adapter, trained.source, scheme, how)
        if template := config.chat_template:
            write_atomically(out / chat_template.TEMPLATE, template.encode())
    return f"jpeft chat --model {out}"


def export(
    out: Path,
    peft: Peft,
    params: Any,
    adapter: Any,
    source: Path,
    scheme: str | None = None,
    how: Merging = _MERGING,
) -> None:
    """Writes a HuggingFace folder of the model with its adapter merged in, with tokenizer and chat template.

    Args:
        source: the folder or `.gguf` file that the model was loaded from.
        scheme: quantizes what is written; None writes plain weights. The adapter is then merged into the source's
            weights, not into the codes that it was trained over: rounding to the levels of a code undoes a change of
            less than half the gap between two. A source that is quantized itself has no other weights, so its own are
            merged and quantized again as they were.
        how: the dtype of what is not quantized, and whether it may be not finite.

    >>> export(Path("merged"), peft, params, adapter, resolve_model("smollm2"))  # doctest: +SKIP
    """
    again = scheme is not None and is_quantized(source)
    if scheme is not None and not again:
        _, params = reshape_like(*load_base(source), peft.model)
    merged = base.merge(peft, params, adapter, how, requantize=again)
    if not again:
        merged = dequantize(merged) if scheme is None else quantize(merged, scheme)
    save_model(out, peft.model, merged, source=source, **how.saving)
