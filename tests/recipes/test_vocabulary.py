"""Tokens that were added to a tokenizer, and heads of their own, from `jpeft finetune` to the merged folder."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.core.tree import flatten
from jpeft.errors import UserError
from jpeft.recipes import vocabulary
from jpeft.recipes.config import Config
from jpeft.recipes.generate import open_text_generator
from jpeft.recipes.prepare import prepare
from jpeft.recipes.tasks import chat, classification
from tests.folders import VOCABULARY, byte_tokenizer, write_bert, write_llama

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion", "quick_compiles_of_module")
SIZE = VOCABULARY + 3  # `<new0>` to `<new5>` begin at 257


def add_tokens(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(6)])
    assert tokenizer.get_vocab_size() == SIZE
    tokenizer.save(str(folder / "tokenizer.json"))


def tie(folder):
    """The same weights with the embedding as head."""
    model, params = models.load(folder)
    tied = model.clone(config=model.config.__class__(**{**vars(model.config), "tie_word_embeddings": True}))
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    shutil.rmtree(folder)
    models.save(folder, tied, {"model": params["model"]}, extra_files=files)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_llama(folder / "llama", 32, 48)
    tie(folder / "llama")
    write_llama(folder / "untied", 32, 48)
    write_bert(folder / "bert")
    (folder / "plain").mkdir()
    shutil.copytree(folder / "llama", folder / "plain", dirs_exist_ok=True)
    for name in ("llama", "untied", "bert"):
        add_tokens(folder / name)
    rows = [{"question": f"{i}?", "answer": f"<new4>{i}<new5>"} for i in range(8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = "".join(f"<new4> is good {i},good\n<new5> is bad {i},bad\n" for i in range(8))
    (folder / "texts.csv").write_text("text,label\n" + texts)
    return folder


@pytest.fixture(autouse=True)
def working_directory(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr("jpeft.serving.text_generator.keep_compiled", lambda: None)


def job(out, *more, model="llama"):
    data = ["--task", "chat", "--model", model, "--data", "chat.jsonl", "--eval", "chat.jsonl", "--out", str(out)]
    sizes = ["--batch-size", "2", "--max-length", "64", "--steps", "2", "--samples", "0", "--quantize", "none"]
    return ["finetune", *data, *sizes, "--lr", "1e-2", "--no-packing", "--checkpoint-every", "1", *more]


@pytest.fixture(scope="module")
def resized(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("resized") / "run"
    with contextlib.chdir(home):
        assert main(job(out, "--resize-embeddings", "8")) == 0
    return out


def test_new_rows_train_and_nothing_else_of_the_embedding(resized, tmp_path):
    trained = chat.open_run(resized)
    leaf = flatten(trained.adapter)["model", "embed_tokens", "tokens_in"]
    assert leaf.shape == (SIZE - VOCABULARY, 32)  # the rows that only round up to a multiple of 8 do not train
    assert main(["merge", str(resized), str(tmp_path / "merged")]) == 0
    model, params = models.load(tmp_path / "merged")
    assert model.config.vocab_size == 264 and model.config.tie_word_embeddings
    (before,), after = (flatten(models.load("llama")[1])[p] for p in [("model", "embed_tokens", "embedding")]), params
    table = after["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(table[:VOCABULARY], before)
    np.testing.assert_array_equal(table[VOCABULARY:SIZE], leaf)
    mean = np.asarray(before, np.float64).mean(0)
    np.testing.assert_allclose(table[SIZE:], mean[None], atol=1e-7)
    assert np.abs(np.asarray(leaf) - mean).max(axis=1).min() > 1e-4  # each of the three moved
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == Path("llama/tokenizer.json").read_bytes()


def _logits(generator, ids):
    if generator.peft is None:
        return jax.jit(generator.model.apply)({"params": generator.params}, ids)
    return jax.jit(generator.peft.apply)(generator.params, generator.adapter, ids)


def test_a_run_is_resumed_and_used_with_its_rows(resized, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(resized, again)
    for path in (again / "adapter", again / "checkpoints" / "2"):
        shutil.rmtree(path)
    (again / "result.json").unlink()
    assert main(["finetune", "--out", str(again), "--resume"]) == 0
    a, b = (flatten(chat.open_run(run).adapter) for run in (resized, again))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])

    assert main(["merge", str(resized), str(tmp_path / "merged")]) == 0
    generators = [
        open_text_generator(adapter=resized),
        open_text_generator("llama", adapter=resized),
        open_text_generator(str(tmp_path / "merged")),
    ]
    ids = generators[0].tokenizer.encode_chat([{"role": "user", "content": "<new5>?"}])
    assert SIZE - 1 in ids
    one, two, three = (_logits(g, np.array([ids])) for g in generators)
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(one, three, atol=1e-4)


def test_a_run_goes_to_a_peft_folder_and_back(resized, tmp_path):
    run = chat.open_run(resized)
    jpeft.hf.save(tmp_path / "hf", run.peft, run.adapter, run.params)
    fields = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert fields["trainable_token_indices"] == {"model.embed_tokens": [260, 261, 262]}
    model, params = models.resize_embeddings(*models.load("llama"), 264)
    _, adapter = jpeft.hf.load(tmp_path / "hf", model, params, *chat.example_inputs())
    jax.tree.map(np.testing.assert_array_equal, adapter, run.adapter)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        (
            {"model": "llama", "untie_head": True},
            {"lm_head/tokens_out": (3, 32), "model/embed_tokens/tokens_in": (3, 32)},
        ),
        ({"model": "llama", "method": "full"}, {}),
        ({"model": "bert", "data": "texts.csv"}, {"encoder/embeddings/word_embeddings/tokens_in": (3, 16)}),
    ],
)
def test_every_weight_with_a_row_for_each_token_is_trained_there(fields, rows):
    task = {} if "data" in fields else {"task": "chat", "data": "chat.jsonl", "quantize": "none"}
    job = prepare(Config(**task, **fields, max_length=32, resize_embeddings=1))
    found = {"/".join(path): shape for path, (shape, _) in job.peft.structure if path[-1].startswith("tokens_")}
    assert found == rows


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model", "options", "targets"),
    [
        ("llama", ["--untie-head"], {"lm_head", "model/embed_tokens"}),
        ("untied", ["--dtype", "bfloat16"], {"lm_head", "model/embed_tokens"}),
        ("llama", ["--method", "full"], set()),
    ],
)
def test_heads_of_their_own_train_their_rows_too(model, options, targets, tmp_path):
    assert main(job(tmp_path / "run", *options, "--resize-embeddings", model=model)) == 0
    run = chat.open_run(tmp_path / "run")
    tokens = [path for path in flatten(run.adapter) if path[-1].startswith("tokens_")]
    assert {"/".join(path[:-1]) for path in tokens} == targets
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged, params = models.load(tmp_path / "merged")
    assert merged.config.vocab_size == SIZE
    assert ("lm_head" in params) == (model == "untied" or "--untie-head" in options)


@pytest.mark.exhaustive
def test_a_classifier_has_rows_for_added_tokens(home, tmp_path):
    options = ["--model", "bert", "--data", "texts.csv", "--epochs", "1", "--batch-size", "4", "--max-length", "32"]
    assert main(["finetune", *options, "--out", str(tmp_path / "run"), "--resize-embeddings"]) == 0
    run = classification.open_run(tmp_path / "run")
    rows = flatten(run.adapter)["encoder", "embeddings", "word_embeddings", "tokens_in"]
    assert rows.shape == (3, 16)
    assert len(run.predict(["<new4> is good", "<new5> is bad"])) == 2
    run.export(tmp_path / "merged")
    _, params = models.load(tmp_path / "merged")
    np.testing.assert_array_equal(params["embeddings"]["word_embeddings"]["embedding"][VOCABULARY:], rows)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "'<new5>' the id 262, but the embedding has 260 rows.*--resize-embeddings"),
        (["--model", "untied", "--resize-embeddings", "--untie-head"], "--untie-head: .*own already"),
        (["--resize-embeddings", "-1"], "--resize-embeddings must be an integer, at least 0"),
    ],
)
def test_mistakes_are_told(options, error, capsys, tmp_path):
    assert main(job(tmp_path / "run", *options)) != 0
    assert re.search(error, capsys.readouterr().err), error


def test_an_encoder_has_no_head_to_untie():
    with pytest.raises(UserError, match="`untie_head` is for `task` chat"):
        Config(untie_head=True)


def test_an_embedding_with_rows_enough_is_told_and_stays():
    said, config = [], Config(task="chat", resize_embeddings=1)
    model, _, rows = vocabulary.reshape(*models.load("plain"), config, lambda: 257, said.append)
    assert "has 260 rows, enough for 257 tokens" in said[0]
    assert model.config.vocab_size == VOCABULARY and not rows
    assert vocabulary.with_rows(jpeft.LoRA(), model, rows) == jpeft.LoRA()
