"""`jpeft finetune --task classify` on a `…ForSequenceClassification`: it starts from the folder's head."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from jpeft.cli import main
from jpeft.recipes.tasks import classification
from tests.parity.test_model_folders_torch import made

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
OLD = Path(__file__).parents[1] / "data" / "old"
SIZES = {"vocab_size": 15, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
NAMES = {0: "up", 1: "down"}  # not in the order of the alphabet
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES, id2label=NAMES),
    "roberta": transformers.RobertaConfig(**SIZES, id2label=NAMES),
    "distilbert": transformers.DistilBertConfig(vocab_size=15, dim=16, n_layers=1, n_heads=2, hidden_dim=32,
                                                max_position_embeddings=40, id2label=NAMES),
}  # fmt: skip
TEXTS = [json.loads(line) for line in (OLD / "test.jsonl").read_text().splitlines()]


def folder_of(name, path):
    model = made(transformers.AutoModelForSequenceClassification, CONFIGS[name], path)
    shutil.copy(OLD / "model_bert" / "tokenizer.json", path)
    return model


def torch_logits(model, folder):
    tokenizer, rows = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    with torch.no_grad():
        for row in TEXTS:
            ids = torch.tensor([tokenizer.encode(row["text"]).ids])
            rows.append(model.eval()(ids, attention_mask=torch.ones_like(ids)).logits[0].numpy())
    return np.stack(rows)


def finetune(model, *more):
    data = ["--data", str(OLD / "train.csv"), "--eval", str(OLD / "test.jsonl")]
    return main(["finetune", "--model", str(model), *data, "--epochs", "1", "--max-length", "24", *more])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_starts_from_the_head_of_its_folder(name, tmp_path, standard_promotion, capsys):
    model = folder_of(name, tmp_path / "model")
    assert finetune(tmp_path / "model", "--out", str(tmp_path / "run"), "--batch-size", "8", "--lr", "0.05") == 0
    assert "the run starts from its head, of the labels up, down" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["labels"] == ["up", "down"]
    guesses = torch_logits(model, tmp_path / "model").argmax(-1)
    hits = [NAMES[i] == row["label"] for i, row in zip(guesses, TEXTS, strict=True)]
    assert result["accuracy_before"] == pytest.approx(np.mean(hits))

    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == NAMES
    logits = torch_logits(merged, tmp_path / "merged")
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    trained = classification.open_run(tmp_path / "run")
    for (label, p), row in zip(trained.predict([row["text"] for row in TEXTS]), odds, strict=True):
        assert label == NAMES[row.argmax()] and p == pytest.approx(row.max(), abs=1e-4)
    changed = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert changed.keys() == before.keys() and any(not torch.equal(changed[k], before[k]) for k in changed)


def test_a_head_of_other_labels_is_said(tmp_path, standard_promotion, capsys):
    folder_of("bert", tmp_path / "model")
    with (OLD / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "three.csv").open("w") as file:
        file.write("text,label\n" + "".join(f"{row['text']},{i % 3}\n" for i, row in enumerate(rows)))
    args = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "three.csv"), "--steps", "1"]
    assert main(["finetune", *args, "--max-length", "24", "--out", str(tmp_path / "run")]) == 0
    assert "its head has 2 labels, the data 3: the head is a new one" in capsys.readouterr().out
