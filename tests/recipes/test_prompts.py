"""Fine-tuning with virtual tokens from the command line: room for them, packing, resuming, use, and user errors."""

import contextlib
import itertools
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jpeft.cli import main
from jpeft.core.tree import flatten
from jpeft.errors import UserError
from jpeft.methods.prompt_tuning import PromptTuning
from jpeft.recipes import plan_job, run_folder
from jpeft.recipes.config import Config, Setup
from jpeft.recipes.generate import open_text_generator
from jpeft.recipes.prepare import NullReporter, build_method, prepare
from jpeft.recipes.tasks import chat, classification
from jpeft.serving.text_generator import Settings
from jpeft.text.conversations import Batches
from tests.cli import runs
from tests.folders import work_in, write_llama
from tests.recipes.test_chat_task import by_hand, noisy_adapter, sums, trained, write

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")
WIDTH, VIRTUAL = 96, 20  # of 128 positions
TEXT = "Add the numbers."


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_llama(folder / "llama", 64, 128)
    runs.write_home(folder)  # an encoder of 40 positions, and reviews
    write(folder / "sums.jsonl", sums(40, 0))
    write(folder / "more.jsonl", sums(6, 1))
    return folder


@pytest.fixture(autouse=True)
def working_directory(home, monkeypatch, tmp_path):
    work_in(tmp_path, home, monkeypatch)


def job(out, *more):
    files = ["--task", "chat", "--model", "llama", "--data", "sums.jsonl", "--eval", "more.jsonl", "--out", str(out)]
    sizes = ["--batch-size", "2", "--max-length", str(WIDTH), "--steps", "6", "--samples", "1", "--quantize", "none"]
    method = () if "--method" in more else ("--method", "prompt_tuning", "--init-text", TEXT)
    return ["finetune", *files, *sizes, "--checkpoint-every", "2", *method, *more]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.chdir(home):
        assert main(job(out)) == 0
    return out


def failure(capsys, *arguments):
    assert main([*arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", pytest.param("prefix", marks=pytest.mark.exhaustive)])
def test_the_loss_of_packed_rows_is_that_of_every_example_alone(method):
    config = Config(
        task="chat", model="llama", data="sums.jsonl", eval="more.jsonl", batch_size=2, max_length=WIDTH,
        quantize="none", method=method, settings={"length": 5},
    )  # fmt: skip
    job = prepare(config, NullReporter())
    adapter, score = noisy_adapter(job), chat.scorer(job.peft)
    expected, count = by_hand(job, adapter)
    batches = Batches(job.train.encoded, 2, WIDTH, seed=3)
    assert batches.count.answer_tokens == count and max(batch.segment_ids.max() for batch in batches) > 1
    assert chat.evaluate(score, job.params, adapter, batches).loss == pytest.approx(expected, abs=1e-5)


def test_a_prompt_starts_from_a_text_and_trains(finished):
    config = Config(**run_folder.read_record(finished)["config"])
    assert (config.method, config.init_text) == ("prompt", TEXT)
    fresh = prepare(config, NullReporter())
    tokenizer = tokenizers.Tokenizer.from_file("llama/tokenizer.json")
    ids = np.resize(tokenizer.encode(TEXT, add_special_tokens=False).ids, VIRTUAL)
    assert fresh.peft.method == PromptTuning(init_ids=chat.text_ids(Path("llama"), TEXT))
    start = fresh.peft.init(jax.random.key(5), fresh.params)["model"]["embed_tokens"]["prompt"]
    np.testing.assert_array_equal(start, fresh.params["model"]["embed_tokens"]["embedding"][jnp.asarray(ids)])
    (tensor,) = flatten(chat.open_run(finished).adapter).values()
    assert np.abs(tensor - start).max() > 1e-3
    result = run_folder.read_result(finished)
    assert result["trainable_parameters"] == tensor.size == VIRTUAL * 64


def test_a_cartridge_starts_from_the_keys_and_values_of_a_text(capsys):
    """Its first token stays that of the text."""
    start = ["--method", "cartridge", "--set", "length=4", "--init-text", "good nice tea of the cup", "--steps", "1"]
    assert main([*runs.job("run"), *start]) == 0
    run = classification.open_run("run")
    ids = jnp.asarray([classification.text_ids(Path("bert"), start[5])])
    variables, options = {"params": run.params["encoder"]}, {"capture_intermediates": True}
    _, seen = run.classifier.encoder.apply(variables, ids, mutable=["intermediates"], **options)
    (value,) = (x[0] for path, x in flatten(seen["intermediates"]).items() if path[-2:] == ("value", "__call__"))
    (kept,) = (x for path, x in flatten(run.adapter).items() if path[-1] == "frozen_value")
    np.testing.assert_allclose(kept.reshape(-1), value[0], atol=1e-5)
    assert "--init-text: " in failure(capsys, *runs.job("short"), *start, "--set", "length=9")


def test_a_stopped_run_resumes_to_the_same_adapter(finished, capsys, monkeypatch):
    count = itertools.count(1)

    def progress(self, *arguments):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("jpeft.cli.terminal.Terminal.progress", progress)
    assert main(job("run")) == 128 + signal.SIGINT
    assert main(job("run", "--resume")) == 0
    assert trained("run") == trained(finished)


# --- using a run ----------------------------------------------------------------------------------------------------


def test_a_run_generates_what_forward_passes_give(finished, capsys):
    question = sums(1, 1)[0]["question"]
    assert main(["generate", "--adapter", str(finished), "--max-new-tokens", "6", question]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    run = chat.open_run(finished)
    ids = run.tokenizer.encode_chat([{"role": "user", "content": question}])
    run_model = jax.jit(run.peft.apply)
    for _ in range(6):
        row = jnp.asarray([*ids, *[0] * (64 - len(ids))])[None]
        ids.append(int(run_model(run.params, run.adapter, row)[0, len(ids) - 1].argmax()))
    assert text == run.tokenizer.decode(ids[-6:]).rstrip("\n")
    assert "cannot be merged" in failure(capsys, "merge", str(finished), "merged")


def test_generation_counts_virtual_tokens_among_the_positions(finished):
    generator = open_text_generator(adapter=finished)
    ids = [5] * (128 - VIRTUAL - 3)
    assert len(generator.generate([ids], Settings())) == 1
    with pytest.raises(ValueError, match=f"and the {VIRTUAL} virtual tokens of the adapter it exceeds"):
        generator.generate([ids], Settings(max_new_tokens=4))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("p-tuning", ("--set", "length=3", "--set", "hidden=8")),
        # positions of tokens begin after it
        pytest.param("Cartridge", ("--set", "length=3"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_classifier_predicts_as_it_was_evaluated(method, more):
    assert main([*runs.job("run"), "--method", method, *more, "--epochs", "1"]) == 0
    trained, result = classification.open_run("run"), run_folder.read_result(Path("run"))
    texts, labels = zip(*runs.reviews(30, seed=1), strict=True)
    found = [label for label, _ in trained.predict(texts)]
    assert trained.peft.virtual_tokens == 3
    assert np.mean(np.equal(found, labels)) == pytest.approx(result["accuracy_after"])


# --- plans and errors -----------------------------------------------------------------------------------------------


def planned(**fields):
    config = Config(task="chat", model="llama", quantize="none", settings={"length": VIRTUAL}, **fields)
    return plan_job.build(config, jax.sharding.AbstractMesh((1,), ("data",)), Setup())


def test_a_step_with_virtual_tokens_is_planned():
    work = planned(method="prompt_tuning", max_length=128 - VIRTUAL)
    state, metrics = jax.eval_shape(work.step, work.state, work.params, work.batch)
    assert metrics["loss"].shape == () and jax.tree.leaves(state.adapter)[0].shape == (VIRTUAL, 64)
    with pytest.raises(UserError, match="takes at most 108 tokens beside the 20"):
        planned(method="prompt")


MISTAKES = {
    "length": (["--max-length", "109"], "--max-length 109: the model takes at most 108 tokens beside the 20 virtual"),
    "text": (["--method", "lora", "--init-text", TEXT], "--init-text: --method lora starts from no text; "),
    "twice": (["--set", "init_ids=[5,6]"], "--init-text contradicts --set init_ids; give one"),
    "tasks": (["--method", "multitask_prompt", "--set", "tasks=2"], "task_ids must be integers, the task of each text"),
    "empty": (["--init-text", ""], "--init-text '' has no tokens; give some text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_makes_no_run(name, capsys):
    arguments, message = MISTAKES[name]
    assert message in failure(capsys, *job("run", *arguments)) and not Path("run").exists()


def test_virtual_tokens_of_an_encoder_need_room(capsys):
    error = failure(capsys, *runs.job("run"), "--method", "prompt")
    assert "--max-length 24: the model takes at most 20 tokens beside the 20 virtual tokens of the method" in error


def test_cpt_starts_from_a_text():
    config = Config(task="chat", method="cpt", init_text=TEXT)
    assert build_method(config, [5, 6]).token_ids == (5, 6)
