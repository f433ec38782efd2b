"""The chat task on a tiny Llama: its loss, a whole run, resuming it, using it, and user errors."""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.core.quantized import Quantized
from jpeft.core.tree import flatten
from jpeft.recipes import run_folder
from jpeft.recipes.config import Config
from jpeft.recipes.describing import describe
from jpeft.recipes.generate import open_text_generator
from jpeft.recipes.prepare import NullReporter, build_method, prepare
from jpeft.recipes.tasks import chat
from jpeft.text import chat_template, conversations
from jpeft.text.conversations import Batches
from tests.folders import work_in, write_bert, write_llama

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")
WIDTH = 64


def sums(count, seed):
    rng = np.random.default_rng(seed)
    pairs = rng.integers(1, 9, (count, 2)).tolist()
    return [{"question": f"{a}+{b}?", "answer": f"It is {a + b}.\n#### {a + b}"} for a, b in pairs]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_llama(folder / "llama", 64, 128)
    write_bert(folder / "bert")
    write(folder / "train.jsonl", sums(40, 0))
    write(folder / "test.jsonl", sums(6, 1))
    return folder


@pytest.fixture(autouse=True)
def working_directory(home, monkeypatch, tmp_path):
    """A directory of its own for each test, with links to the models and the data."""
    work_in(tmp_path, home, monkeypatch)


def job(out, *more):
    files = ["--task", "chat", "--model", "llama", "--data", "train.jsonl", "--eval", "test.jsonl", "--out", str(out)]
    sizes = ["--batch-size", "2", "--max-length", str(WIDTH * 2), "--epochs", "2", "--samples", "2"]
    return ["finetune", *files, *sizes, "--lr", "1e-2", "--checkpoint-every", "5", *more]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.chdir(home):
        assert main(job(out)) == 0
    return out


@pytest.fixture(scope="module")
def short(home, tmp_path_factory):
    """A run of three steps on data with an example that is too long, and its output."""
    out = tmp_path_factory.mktemp("short") / "run"
    write(out.parent / "long.jsonl", [*sums(24, 0), {"question": "1?", "answer": "x" * 200}])
    data = ["--data", str(out.parent / "long.jsonl"), "--quantize", "none", "--samples", "0", "--steps", "3"]
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(job(out, *data)) == 0
    return out, output.getvalue()


@pytest.fixture(scope="module")
def prepared(home):
    """A function from a quantization scheme to a job, prepared once for each."""

    @functools.cache
    def prepared(quantize):
        options = {"task": "chat", "model": "llama", "data": "train.jsonl", "eval": "test.jsonl", "batch_size": 2}
        with contextlib.chdir(home):
            return prepare(Config(**options, max_length=WIDTH * 2, quantize=quantize), NullReporter())

    return prepared


# --- the loss -------------------------------------------------------------------------------------------------------


def by_hand(job, adapter):
    """The mean over all answer tokens, from the complete logits of each example alone."""
    examples = [np.pad(ids, (0, WIDTH - len(ids))) for ids in job.train.encoded.ids]
    logits = np.asarray(jax.jit(job.peft.apply)(job.params, adapter, np.stack(examples)))
    total, count = 0.0, 0
    for row, ids, answer in zip(logits, job.train.encoded.ids, job.train.encoded.assistant_mask, strict=True):
        row = np.asarray(row[: len(ids) - 1], np.float64)
        losses = np.log(np.exp(row).sum(axis=-1)) - row[np.arange(len(row)), ids[1:]]
        total, count = total + float(losses[answer[1:]].sum()), count + int(answer[1:].sum())
    return total / count, count


def noisy_adapter(job):
    @jax.jit
    def make(params):
        adapter = job.peft.init(jax.random.key(0), params)
        return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), adapter)

    return make(job.params)


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=pytest.mark.exhaustive)])
def test_packed_loss_equals_the_loss_of_every_example_alone(prepared, quantize):
    job = prepared(quantize)
    adapter, score = noisy_adapter(job), chat.scorer(job.peft)
    expected, count = by_hand(job, adapter)
    for packed in (True, False):
        batches = Batches(job.train.encoded, 2, WIDTH * 2, seed=3, packed=packed)
        assert batches.count.answer_tokens == count
        assert chat.evaluate(score, job.params, adapter, batches).loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("accumulate", [4, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_accumulated_gradients_equal_those_of_the_whole_batch(prepared, accumulate):
    job = prepared("none")
    adapter, batch = noisy_adapter(job), chat.balanced(next(iter(job.train)))
    batch = jax.tree.map(lambda x: np.concatenate([x, np.roll(x, 3, 0)[::-1]]), batch)
    batch.weight[0, :50] = 0  # rows with different weights
    batch, tx = chat.balanced(batch), optax.sgd(1.0)

    def run(accumulate):
        step = jpeft.train_step(job.peft, chat.loss_fn(job.peft), tx, accumulate=accumulate, donate=False)
        state, metrics = step(jpeft.TrainState.create(job.peft, adapter, tx, jax.random.key(0)), job.params, batch)
        return metrics, state.adapter

    (expected, whole), (metrics, accumulated) = run(1), run(accumulate)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(float(expected["accuracy"]), abs=1e-6)
    for a, b in zip(jax.tree.leaves(accumulated), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_loss_promotes_nothing(prepared):
    job = prepared("nf4")
    batch = chat.balanced(next(iter(job.train)))
    adapter = jax.eval_shape(job.peft.init, jax.random.key(0), job.params)
    with jax.numpy_dtype_promotion("strict"):
        loss = jax.value_and_grad(chat.loss_fn(job.peft), has_aux=True)
        jax.eval_shape(loss, adapter, job.params, batch, jax.random.key(0))


def test_no_array_holds_all_logits(prepared):
    job = prepared("none")
    batch = chat.balanced(next(iter(Batches(job.train.encoded, 40, WIDTH * 2))))
    adapter = jax.eval_shape(job.peft.init, jax.random.key(0), job.params)
    grad = jax.grad(chat.loss_fn(job.peft), has_aux=True)
    text = jax.jit(grad).lower(adapter, job.params, batch, jax.random.key(0)).as_text()
    assert f"{40 * WIDTH * 2}x260x" not in text and f"40x{WIDTH * 2}x260x" not in text and "x260xf32" in text


def test_the_default_is_lora_on_all_linear_layers():
    assert build_method(Config(task="chat")) == jpeft.LoRA(rank=8, alpha=16, targets="all-linear")


# --- runs -----------------------------------------------------------------------------------------------------------


def trained(run):
    clock = {"seconds", "compiled", "tokens_per_second"}
    log = [
        {k: v for k, v in line.items() if k not in clock} for line in run_folder.read_lines(Path(run) / "metrics.jsonl")
    ]
    return (Path(run) / "adapter" / "adapter.safetensors").read_bytes(), log


def tensorboard_scalars(folder):
    """The scalars in TensorBoard's files, by step and name."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:  # a record: its length, a checksum of 4 bytes, the event, another checksum
            size = int.from_bytes(content[:8], "little")
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    return found


def test_the_best_adapter_events_and_a_trace(capsys):
    more = ["--epochs", "1", "--samples", "0", "--eval-every", "3", "--keep", "best", "--tensorboard"]
    write(Path("other.jsonl"), [{"question": "1+1?", "answer": "QXZ~^{}|"}] * 2)  # more likely before than after
    assert main([*job("run"), *more, "--profile", "2:2", "--eval", "other.jsonl"]) == 0
    lines = run_folder.read_lines(Path("run/metrics.jsonl"))
    found = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}
    result, best = run_folder.read_result(Path("run")), min(found, key=found.get)
    assert best != max(found), "the last evaluation is the best, so this tests nothing"
    assert result["step_kept"] == best and result["loss_after"] == found[best]
    assert f"the adapter of step {best} is kept" in capsys.readouterr().out
    scalars = tensorboard_scalars(Path("run/tensorboard"))
    assert scalars[best, "eval_loss"] == pytest.approx(found[best], rel=1e-6)
    assert {(line["step"], "loss") for line in lines if "loss" in line} <= scalars.keys()
    assert list(Path("run/profile").rglob("*.xplane.pb"))


def test_training_lowers_the_perplexity(finished):
    result = run_folder.read_result(finished)
    assert result["perplexity_after"] < 0.7 * result["perplexity_before"]
    assert result["perplexity_before"] == pytest.approx(math.exp(result["loss_before"]))
    assert result["steps"] == len(
        [line for line in run_folder.read_lines(finished / "metrics.jsonl") if "loss" in line]
    )
    assert result["shapes"] == [[2, WIDTH * 2]] and 0 < result["padding"] < 0.3
    assert (result["train_examples"], result["eval_examples"], result["left_out"]) == (40, 6, 0)
    assert [sample["prompt"] for sample in result["samples"]] == [row["question"] for row in sums(2, 1)]
    assert all(sample["right_after"] in (True, False) for sample in result["samples"])
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert result["total_parameters"] - result["trainable_parameters"] == layers + 2 * 260 * 64 + 64 * 5
    # 4.127 bits for a weight of a layer, 32 for one of an embedding or a norm; small matrices fill groups only in part
    assert result["base_memory_bytes"] < layers * 4.4 / 8 + (2 * 260 * 64 + 64 * 5) * 4
    for name in ("loss.png", "metrics.jsonl", "adapter/adapter.safetensors"):
        assert (finished / name).stat().st_size


def test_a_run_ends_with_a_table_and_samples(finished, capsys):
    assert main(["finetune", "--out", str(finished), "--resume"]) == 0
    output = capsys.readouterr().out
    assert all(words in output for words in ("perplexity before", "--- prompt", "--- after", "1 shape (2×128)"))


def test_a_stopped_run_resumes_to_the_same_adapter(finished, capsys, monkeypatch):
    count = itertools.count(1)

    def progress(self, *arguments):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("jpeft.cli.terminal.Terminal.progress", progress)
    assert main(job("run")) == 128 + signal.SIGINT
    assert "saved up to step 7" in capsys.readouterr().err
    assert main(job("run", "--resume")) == 0
    assert trained("run") == trained(finished)
    resumed, other = (run_folder.read_result(run)["samples"] for run in (Path("run"), finished))
    assert resumed == other


def test_a_maximum_of_steps(short, capsys):
    run, output = short
    assert run_folder.read_result(run)["steps"] == 3 and "--- prompt" not in output
    assert main(["finetune", "--out", str(run), "--resume", "--steps", "2"]) == 1
    assert "--steps 2 conflicts with the run's 3" in capsys.readouterr().err
    longer = Path(shutil.copytree(run, "longer"))
    assert main(["finetune", "--out", str(longer), "--resume", "--steps", "4"]) == 0
    assert "lengthened from 3 to 4 steps" in capsys.readouterr().out
    assert run_folder.read_result(longer)["steps"] == 4
    assert describe(longer)["lengthened"][0]["after_step"] == 3


def test_a_run_generates_and_is_merged(finished, capsys, monkeypatch, tmp_path):
    question = sums(1, 1)[0]["question"]
    expected = run_folder.read_result(finished)["samples"][0]["after"]

    def output(*arguments):
        assert main([*arguments]) == 0
        return capsys.readouterr().out

    options = ["--max-new-tokens", "20"]
    assert expected.startswith(output("generate", "--adapter", str(finished), *options, question).rstrip("\n"))
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    assert expected.startswith(output("chat", str(finished), *options).rstrip("\n"))
    output("merge", str(finished), "merged")
    assert expected.startswith(output("generate", "--model", "merged", *options, question).rstrip("\n"))
    _, params = models.load("merged")
    assert not jpeft.quantization.is_quantized(params) and (Path("merged") / "tokenizer.json").is_file()
    output("merge", str(finished), "small", "--requantize")
    _, params = models.load("small")
    assert jpeft.quantization.is_quantized(params)
    small, whole = (sum(f.stat().st_size for f in Path(p).glob("*.safetensors")) for p in ("small", "merged"))
    assert small < 0.5 * whole


def test_training_on_a_quantized_folder(capsys):
    assert main(["quantize", "llama", "codes", "--scheme", "int8", "--block", "32", "--no-double"]) == 0
    few = ("--steps", "1", "--samples", "0", "--model", "codes")
    capsys.readouterr()
    assert main(job("run", *few)) == 1
    assert "--quantize nf4: codes is quantized already; give --quantize int8" in capsys.readouterr().err
    assert main(job("run", *few, "--quantize", "int8")) == 0
    assert main(["merge", "run", "again", "--requantize"]) == 0
    kinds = {(leaf.scheme, leaf.block, leaf.groups is None) for leaf in flatten(models.load("again")[1]).values()
             if isinstance(leaf, Quantized)}  # fmt: skip
    assert kinds == {("int8", 32, True)}


def test_the_adapter_loads_on_the_unquantized_base_and_exports_to_huggingface(finished):
    model, params = models.load("llama")
    ids = chat.example_inputs()
    peft, adapter = jpeft.load(
        finished / "adapter", model, params, *ids
    )  # its fingerprint is of the unquantized weights
    jpeft.hf.save(Path("hf"), peft, adapter, params)
    assert (Path("hf") / "adapter_model.safetensors").is_file()


def test_an_unfinished_run_chats_and_is_exported_and_merged(finished, capsys, monkeypatch):
    run, question = Path(shutil.copytree(finished, "killed")), sums(1, 1)[0]["question"]
    shutil.rmtree(run / "adapter")
    os.unlink(run / "result.json")
    expected = run_folder.read_result(finished)["samples"][0]["after"]
    last = run_folder.read_result(finished)["steps"]
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    assert main(["chat", "killed", "--max-new-tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert expected.startswith(out.rstrip("\n"))
    assert f"killed is not finished: using its newest checkpoint, of step {last} of {last}" in err
    assert main(["export", "killed", "hf"]) == main(["export", "killed", "own", "--format", "jpeft"]) == 0
    assert (Path("own") / "adapter.safetensors").read_bytes() == trained(finished)[0]
    capsys.readouterr()
    assert main(["export", "killed", "served", "--for", "vllm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"].endswith(" --max-lora-rank 8 --lora-modules served=served")
    assert main(["export", "killed", "other", "--for", "vllm", "--model", "llama"]) == 1
    assert "killed is a run, which has a base of its own: leave --model out" in capsys.readouterr().err
    model, params = models.load("llama")
    _, adapter = jpeft.hf.load("hf", model, params, *chat.example_inputs())
    _, own = jpeft.load("own", model, params, *chat.example_inputs())
    for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)
    capsys.readouterr()
    assert main(["export", "killed", "own"]) == 1 and "own exists" in capsys.readouterr().err
    begun = Config(task="chat", model="llama", data="train.jsonl", max_length=WIDTH * 2, adapter="hf", rank=8)
    start = flatten(prepare(begun, NullReporter()).start)
    assert all(np.array_equal(start[path], leaf) for path, leaf in flatten(own).items())


def test_predict_names_the_command_for_a_chat_run(finished, capsys):
    assert main(["predict", str(finished), "--text-arg", "x"]) == 1
    assert f"use jpeft chat {finished}" in capsys.readouterr().err


METHODS = {"prefix": (), "ia3": ("--targets", "k_proj,v_proj"), "bottleneck": ()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_quantized_weights(method):
    assert main(job("run", "--steps", "1", "--method", method, "--samples", "1", "--lr", "1e-3", *METHODS[method])) == 0
    assert Config(**run_folder.read_record(Path("run"))["config"]).quantize == "nf4"


# --- errors ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "encoder": (["--model", "bert"], "bert: not a language model, but an encoder"),
    "data": (["--data", "none.jsonl"], "--data none.jsonl: no such file; expected 'gsm8k', or a .jsonl or .json file"),
    "reviews": (["--data", "food-reviews"], "--data food-reviews: no such file; expected 'gsm8k'"),
    "column": (["--text", "question"], "--text is for --task classify, not for --task chat"),
    "length": (["--max-length", "4096"], "--max-length 4096: the model takes at most 128 tokens"),
    "short": (["--max-length", "8"], "none of the 40 examples fits into 8 tokens"),
    "full": (["--method", "full"], "--method full: quantized weights have no gradient; it needs --quantize none"),
    "train": (["--method", "train", "--targets", ".*/kernel"], "which is quantized (nf4)"),
    "accumulate": (["--accumulate", "3"], "--accumulate 3 does not divide --batch-size 2"),
    "template": (["--chat-template", "no.jinja"], "--chat-template no.jinja: No such file or directory; expected"),
    "no template": (["--chat-template", "train.jsonl"], "--chat-template train.jsonl: holds no Jinja template"),
    "steps": (["--steps", "0"], "--steps must be at least 1, got 0"),
}
BAD_ROWS = {
    "json": ('{"question": ', "bad.jsonl: line 2 is not JSON"),
    "empty answer": ('{"question": "1?", "answer": " "}', "bad.jsonl: line 2: the text in 'answer' is empty"),
    "keys": ('{"text": "1"}', "bad.jsonl: line 2: the keys are 'text'; expected"),
    "another key": (
        '{"question": "1?", "answer": "1", "score": 2}',
        "bad.jsonl: line 2: the key 'score' means nothing here, and what it holds would be lost",
    ),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "1"}]}',
        "line 2: 'messages' has no message of the assistant",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_makes_no_run(name, capsys):
    arguments, message = MISTAKES[name]
    assert main(job("run", *arguments)) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("run").exists()


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(name, capsys):
    row, message = BAD_ROWS[name]
    Path("bad.jsonl").write_text(json.dumps(sums(1, 0)[0]) + "\n" + row + "\n")
    assert main(job("run", "--data", "bad.jsonl")) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("run").exists()


def test_answers_longer_than_a_row_are_left_out_and_counted(short):
    run, output = short
    assert "1 of 25 examples are longer than 128 tokens and left out (at line 25" in output
    assert run_folder.read_result(run)["left_out"] == 1


THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}<b>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<b>{% endif %}"
)


def test_a_run_with_another_template_keeps_it(capsys):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>hm</think>It is 1."}]
    rows = [{"id": row, "messages": [*turns, turns[0], {**turns[1], "weight": row % 2}]} for row in range(6)]
    Path("talks.json").write_text(json.dumps(rows))
    Path("thinking.jinja").write_text(THINKING)
    data = ["--data", "talks.json", "--eval", "talks.json", "--quantize", "none", "--samples", "0", "--steps", "1"]
    assert main(job("run", *data, "--chat-template", "thinking.jinja")) == 0
    output = capsys.readouterr().out
    assert "talks.json: 6 conversations make 9 examples" in output and "are not read: id" in output
    Path("thinking.jinja").unlink()
    assert chat.open_run("run").tokenizer.template == THINKING
    assert main(["finetune", "--out", "run", "--resume"]) == 0
    assert main(["merge", "run", "merged"]) == 0
    assert chat_template.read("merged").template == THINKING
    Path("other.jinja").write_text("{{ messages[0].content }}")
    assert open_text_generator("llama", "run").tokenizer.template == THINKING
    assert open_text_generator("llama", template="other.jinja").tokenizer.template == "{{ messages[0].content }}"
    capsys.readouterr()
    assert main(["finetune", "--task", "chat", "--out", "run", "--resume", "--chat-template", "other.jinja"]) == 1
    error = capsys.readouterr().err
    assert (
        "--chat-template other.jinja conflicts with the run's {% for m in messages" in error and error.count("\n") == 1
    )


def test_answers_that_do_not_end_in_a_stop_token_are_told_before_training(home):
    said, open_ended = [], "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    open_ended += "{% if add_generation_prompt %}assistant: {% endif %}"
    files = {"task": "chat", "model": "llama", "data": "train.jsonl", "eval": "test.jsonl", "chat_template": open_ended}
    reporter = NullReporter()
    reporter.say = said.append
    prepare(Config(**files, max_length=WIDTH * 2, quantize="none"), reporter)
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert "no answer ends in a stop token (</s>)" in warning and "often in '\\n'" in warning and "\n" not in warning


def test_a_tokenizer_without_chat_template(home, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (home / "llama").iterdir():
        if file.name != "tokenizer_config.json":
            (bare / file.name).symlink_to(file)
    assert main(job("run", "--model", "bare")) == 1
    assert "no chat template" in capsys.readouterr().err
    assert chat_template.read("llama").template and conversations.read("test.jsonl")


@pytest.mark.exhaustive
def test_a_sweep_trains_combinations_over_one_quantized_base(capsys):
    words = ["--steps", "2", "--samples", "1", "--mesh", "data=2,fsdp=4", "--batch-size", "8"]
    assert main(job("swept", *words, "--sweep", "rank=2,4", "seed=0,1", "--halving", "1")) == 0
    result = run_folder.read_result(Path("swept"))
    assert sorted(row["steps"] for row in result["sweep"]["combinations"]) == [1, 1, 2, 2]
    assert len(result["samples"]) == 1 and result["config"]["quantize"] == "nf4"
    assert "rank=4 seed=1" in capsys.readouterr().out
