"""A run of the command line on a tiny BERT, which the files of this folder share."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from jpeft import models
from jpeft.cli import main
from jpeft.models.bert import Bert, BertConfig
from jpeft.recipes import run_folder
from tests.folders import new_params

GOOD, BAD, OTHER = ["good", "nice", "fine"], ["bad", "stale", "poor"], ["tea", "the", "cup", "of", "very"]
JOB = ["--epochs", "4", "--batch-size", "8", "--lr", "3e-2", "--max-length", "24", "--checkpoint-every", "3"]


def write_home(folder):
    """Writes a model (`bert`) and data (`train.csv`, `test.jsonl`)."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER]
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40,
    )  # fmt: skip
    model = Bert(config)
    models.save(folder / "bert", model, new_params(model, (1, 4)))
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "bert" / "tokenizer.json"))
    rows = reviews(77, seed=0)
    (folder / "train.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    lines = [json.dumps({"text": text, "label": label}) for text, label in reviews(30, seed=1)]
    (folder / "test.jsonl").write_text("\n".join(lines))


def reviews(count, seed):
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = [draw.choice(GOOD if number % 3 else BAD), *draw.choices(OTHER, k=draw.randint(1, 5))]
        rows.append((" ".join(draw.sample(words, len(words))), "up" if number % 3 else "down"))
    return rows


def job(out, *more):
    return [
        "finetune",
        "--model",
        "bert",
        "--data",
        "train.csv",
        "--eval",
        "test.jsonl",
        "--out",
        str(out),
        *JOB,
        *more,
    ]


def trained(run):
    """The parts of a run that must not depend on interruptions: the adapter's bytes, and the log without times."""
    clock = {"seconds", "compiled", "tokens_per_second"}
    log = [
        {k: v for k, v in line.items() if k not in clock} for line in run_folder.read_lines(Path(run) / "metrics.jsonl")
    ]
    return (Path(run) / "adapter" / "adapter.safetensors").read_bytes(), log


def failure(capsys, *arguments):
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 1 and err.startswith("jpeft: error: ") and err.count("\n") == 1, (status, out, err)
    return err
