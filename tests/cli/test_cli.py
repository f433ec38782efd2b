"""The command line on a tiny BERT: runs, their folders, the commands that use them, and users' mistakes."""

import ast
import errno
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft import models
from jpeft.cli import app, main
from jpeft.recipes import assets, finetune, prepare, run_folder
from jpeft.recipes.config import Config, parse_targets
from jpeft.recipes.tasks import classification
from jpeft.recipes.tasks.base import NullReporter
from jpeft.training import checkpoint
from tests.cli.runs import failure, job, trained

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")


# ------------------------------------------------------------------------------------------------------ the run folder


def test_contents_of_a_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {".lock", "adapter", "checkpoints", "config.json", "loss.png", "metrics.jsonl", "result.json"}
    lines = run_folder.read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 10, 20, 30, 40]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert 0 < rates[0] < rates[2] == max(rates) == pytest.approx(3e-2) and 0 < rates[-1] < 1e-3
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((finished / "config.json").read_text())
    assert record["labels"] == ["down", "up"] and Path(record["config"]["model"]).is_absolute()
    assert [member["method"] for member in record["method"]["methods"]] == ["LoRA", "Train"]


def test_it_learns_and_reports_it(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["majority_baseline"] == pytest.approx(2 / 3)
    assert result["accuracy_after"] >= 0.9 > result["accuracy_before"]
    assert result["loss_after"] < result["loss_before"]
    tensors = load_file(finished / "adapter" / "adapter.safetensors")
    assert result["trainable_parameters"] == sum(tensor.size for tensor in tensors.values())
    weights = sum(tensor.size for tensor in load_file("bert/model.safetensors").values())
    extra = sum(tensor.size for name, tensor in tensors.items() if "lora" in name)
    assert result["total_parameters"] == weights + extra + 16 * 2 + 2
    assert result["base_bytes"] == os.path.getsize("bert/model.safetensors")
    assert result["steps"] == 40 and result["seconds_per_step"] > 0 and result["peak_memory_bytes"] > 2**20


def test_checkpoints_hold_no_base(finished):
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert steps == [39, 40]
    stacks = json.loads((finished / "checkpoints" / "40" / "manifest.json").read_text())["stacks"]
    leaves = " ".join(leaf for stack in stacks for leaf in stack["paths"])
    assert "lora_a" in leaves and "opt_state" in leaves and "rng" in leaves and "embedding" not in leaves


def test_the_result_is_printed_as_a_table(finished, capsys):
    assert main(["finetune", "--resume", str(finished)]) == 0
    out, err = capsys.readouterr()
    for words in ("is complete", "accuracy before", "accuracy after", "majority baseline", "66.7%", "peak memory"):
        assert words in out
    assert err == ""


def test_json_is_one_object_on_stdout(capsys):
    assert main(job("run", "--epochs", "1", "--json")) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == json.loads(Path("run/result.json").read_text()) and result["run"] == "run"
    assert "trainable" in err and "before training: accuracy" in err and "step 10/10" in err and "ETA" in err


def test_default_run_folders_are_numbered_and_evaluation_examples_held_out(capsys):
    few = ["finetune", "--model", "bert", "--data", "train.csv", "--epochs", "1", "--max-length", "24"]
    assert main(few) == main(few) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["bert-lora-1", "bert-lora-2"]
    assert "8 of the examples are held out" in capsys.readouterr().out
    assert trained("runs/bert-lora-1") == trained("runs/bert-lora-2")
    assert run_folder.latest_run() == Path("runs/bert-lora-2")


METHODS = {
    "prefix": (["--set", "length=4"], "encoder/encoder/layer/0/attention/self/prefix_key"),
    "full": ([], "encoder/embeddings/word_embeddings/embedding"),
    "bitfit": ([], "encoder/embeddings/LayerNorm/bias"),
    "bottleneck": (["--targets", "output/dense", "--set", "size=2"], "encoder/encoder/layer/0/output/dense/bott"),
    "ia3": (["--targets", "key,value"], "encoder/encoder/layer/0/attention/self/key/ia3_out"),
    "train": (["--targets", ".*/LayerNorm"], "encoder/embeddings/LayerNorm/scale"),
    "LoRA": (["--rank", "2", "--dropout", "0.1", "--targets", "query"], "encoder/encoder/layer/0/attention/self/query"),
}
QUICK = ("prefix",)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.exhaustive) for m in METHODS]
)
def test_every_method_trains_with_the_head(method, capsys):
    more, leaf = METHODS[method]
    assert main([*job("run", "--epochs", "1", "--json"), "--method", method, *more]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 10
    tensors = load_file("run/adapter/adapter.safetensors")
    assert any(name.startswith(leaf) for name in tensors)
    assert {"classifier/kernel", "classifier/bias"} <= tensors.keys()
    fresh = prepare.prepare(Config(**json.loads(Path("run/config.json").read_text())["config"]), NullReporter())
    assert not np.array_equal(tensors["classifier/kernel"], fresh.params["classifier"]["kernel"])
    if method == "prefix":  # no change of weights
        assert "cannot be merged" in failure(capsys, "merge", "run", "merged")
        assert not Path("merged").exists() and not list(Path().glob(".merged*"))


def test_loss_and_scores_under_strict_promotion():
    config = Config(model="bert", data="train.csv", batch_size=4, max_length=24, targets="query", dropout=0.1)
    made = prepare.prepare(config, NullReporter())
    adapter = made.peft.init(jax.random.key(0), made.params)
    batch = next(iter(made.train))
    with jax.numpy_dtype_promotion("strict"):
        score = jax.eval_shape(
            classification.scorer(made.peft), made.params, adapter, batch.input_ids, batch.attention_mask
        )
        loss = jax.value_and_grad(classification.loss_fn(made.peft), has_aux=True)
        (value, metrics), _ = jax.eval_shape(loss, adapter, made.params, batch, jax.random.key(1))
    assert value.dtype == metrics["accuracy"].dtype == score.dtype == jnp.float32


def test_the_default_is_lora_on_all_linear_layers_and_the_head():
    method = prepare.build_method(Config())
    assert method == jpeft.Chain(jpeft.LoRA(rank=8, alpha=16), jpeft.Train("classifier"))
    assert prepare.build_method(Config(rank=4)).members[0].alpha == 8
    assert prepare.build_method(Config(method="full")) == jpeft.Train(".*")


@pytest.mark.parametrize(
    ("text", "targets"),
    [("all-linear", "all-linear"), ("query,value", ["query", "value"]), ("query", ["query"]), (".*/query", ".*/query")],
)
def test_parsing_of_targets(text, targets):
    assert parse_targets(text) == targets


# -------------------------------------------------------------------------------------------- kills, crashes and Ctrl-C


def start(arguments):
    """The command in a process of its own, which reads compiled programs from this one's cache."""
    env = os.environ | {
        "PYTHONWARNINGS": "error",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    code = "import sys; from jpeft.cli import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=env, **pipes)


def wait_for_lines(run, count, process):
    """Waits until the log of a run has so many lines."""
    log = run / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)  # the process imports and compiles first
    while process.poll() is None and len(run_folder.read_lines(log)) < count:
        time.sleep(0.002)


def test_a_killed_run_resumes_to_the_same_adapter(finished):
    run = Path("run")
    for lines in (2, 14):  # before the first checkpoint, and between two
        with start([*job(run), "--resume"]) as process:
            wait_for_lines(run, lines, process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (run / "adapter").exists()
    assert main(["finetune", "--resume", "run"]) == 0
    assert trained("run") == trained(finished)


def test_ctrl_c_saves_the_step_and_prints_how_to_resume(finished):
    run = Path("run")
    with start(job(run)) as process:
        wait_for_lines(run, 5, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (line,) = err.strip().splitlines()
    step = run_folder.read_lines(run / "metrics.jsonl")[-1]["step"]
    assert line == f"jpeft: error: stopped, saved up to step {step}; continue with: jpeft finetune --out run --resume"
    assert 4 <= step < 40 and (run / "checkpoints" / str(step)).is_dir()
    assert main([*job(run), "--resume"]) == 0
    assert trained("run") == trained(finished)


class Crash(BaseException):
    """Like a kill: nothing catches it."""


@pytest.mark.parametrize(
    ("where", "call"), [("finetune.save", 1), pytest.param("run_folder.write_json", 2, marks=pytest.mark.exhaustive)]
)
def test_a_crash_resumes_to_the_same_adapter(finished, monkeypatch, where, call):
    module, name = where.split(".")
    owner = {"finetune": finetune, "run_folder": run_folder}[module]
    whole, calls = getattr(owner, name), []

    def crash(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Crash
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(Crash):
            main(job("run"))
    assert run_folder.read_result(Path("run")) is None
    assert main(["finetune", "--out", "run", "--resume"]) == 0
    assert trained("run") == trained(finished)


def test_resume_starts_a_new_run_and_leaves_a_finished_one_unchanged(finished, capsys):
    assert main([*job("run"), "--resume"]) == 0
    assert "nothing to resume yet" in capsys.readouterr().out
    assert trained("run") == trained(finished)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert main([*job("run"), "--resume"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


def test_a_run_moved_elsewhere_resumes(stopped, finished):
    assert main(["finetune", "--resume", "stopped"]) == 0
    assert trained("stopped") == trained(finished)


def test_a_truncated_log_is_repaired(stopped, finished):
    log = stopped / "metrics.jsonl"
    log.write_text(log.read_text().rstrip("\n")[:-7])
    assert main(["finetune", "--resume", "stopped"]) == 0
    assert trained("stopped") == trained(finished)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, finished, capsys):
    newest = Path(shutil.copytree(stopped / "checkpoints" / "39", stopped / "checkpoints" / "40"))
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    assert main(["finetune", "--resume", "stopped"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint of step 40 cannot be read" in said and "continuing after step 39 of 40" in said
    assert trained("stopped") == trained(finished)


def test_sigterm_before_training_is_one_line_and_resumed(capsys, monkeypatch, finished):
    run = Path("run").absolute()

    def killed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(classification, "evaluate", killed)
    assert main(job("run")) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "stopped, before its first checkpoint; continue with" in err
    monkeypatch.undo()
    monkeypatch.chdir(run.parent)
    assert main(["finetune", "--out", "run", "--resume"]) == 0  # as the message says, without the other options
    assert trained("run") == trained(finished)


def test_flags_that_conflict_with_the_run(stopped, capsys):
    assert "--rank 4 conflicts with the run's default" in failure(capsys, "finetune", "--resume", stopped, "--rank", 4)
    assert "--lr 0.5 conflicts with the run's 0.03" in failure(capsys, "finetune", "--resume", stopped, "--lr", 0.5)
    assert "--model minilm conflicts" in failure(capsys, "finetune", "--resume", stopped, "--model", "minilm")
    assert "name two runs" in failure(capsys, "finetune", "--resume", stopped, "--out", "other")


def test_data_changed_since_the_run_began(stopped, capsys, home):
    os.unlink("train.csv")
    Path("train.csv").write_text((home / "train.csv").read_text().replace("tea", "cup", 1))
    record = json.loads((stopped / "config.json").read_text())
    record["config"]["data"] = str(Path("train.csv").absolute())
    (stopped / "config.json").write_text(json.dumps(record))
    assert "cannot be resumed: its data changed" in failure(capsys, "finetune", "--resume", stopped)
    assert not (stopped / "adapter").exists()


def change_base(folder):
    """A copy of the model with one weight changed."""
    shutil.copytree("bert", folder)
    model, params = models.load("bert")
    params["embeddings"]["LayerNorm"]["bias"] += 1
    shutil.rmtree(folder)
    models.save(folder, model, params, source="bert")
    return str(Path(folder).absolute())


def swapped_tokenizer(folder):
    """A copy of the model whose tokenizer has two words swapped."""
    shutil.copytree("bert", folder)
    file = Path(folder) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    file.write_text(json.dumps(tokenizer))
    return str(Path(folder).absolute())


def test_another_tokenizer(stopped, finished, capsys):
    other = swapped_tokenizer("other")
    for run in (stopped, Path(shutil.copytree(finished, "done"))):
        record = json.loads((run / "config.json").read_text())
        record["config"]["model"] = other
        (run / "config.json").write_text(json.dumps(record))
    assert "its model's tokenizer.json changed" in failure(capsys, "finetune", "--resume", stopped)
    assert "tokenizer.json changed since done was trained" in failure(capsys, "predict", "done", "--text-arg", "tea")


def test_a_tokenizer_of_a_larger_model(capsys):
    shutil.copytree("bert", "other")
    file = Path("other/tokenizer.json")
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["tea"] = 99
    file.write_text(json.dumps(tokenizer))
    said = failure(capsys, *job("run", "--model", "other"))
    assert "the tokenizer gives 'tea' the id 99, but the model's vocabulary is 15" in said
    assert not Path("run").exists()


def test_a_diverged_run_has_no_result(capsys):
    said = failure(capsys, *job("run", "--lr", "1e38", "--epochs", "1"))
    assert "run: training diverged: the loss is not finite" in said and "lower --lr" in said
    assert not Path("run/adapter").exists()


def test_a_run_in_which_a_method_did_not_train_has_no_result(capsys):
    said = failure(capsys, *job("run", "--method", "alora", "--epochs", "1"), "--set", "invocation_tokens=[99]")
    assert "run: nothing of ALoRA trained" in said and "invocation tokens" in said
    assert not Path("run/adapter").exists()


def test_a_weight_that_cannot_be_quantized(capsys):
    said = failure(capsys, *job("run", "--quantize", "int8"))
    assert "--quantize int8: " in said and "divides neither of its last two axes" in said


def test_out_of_memory_leaves_the_name_free(capsys, monkeypatch):
    def large(*args):
        raise MemoryError("Unable to allocate 59.6 GiB")

    monkeypatch.setattr(finetune, "_train", large)
    said = failure(capsys, *job("run"))
    assert "out of memory (Unable to allocate 59.6 GiB); use a smaller --batch-size" in said
    assert not Path("run").exists()


def test_another_base(stopped, finished, capsys):
    other = change_base("other")
    for run in (stopped, Path(shutil.copytree(finished, "done"))):
        record = json.loads((run / "config.json").read_text())
        record["config"]["model"] = other
        (run / "config.json").write_text(json.dumps(record))
    changed = "encoder/embeddings/LayerNorm/bias"
    assert changed in failure(capsys, "finetune", "--resume", stopped)
    assert changed in failure(capsys, "predict", "done", "--text-arg", "good tea")


# ------------------------------------------------------------------------------------------------------------- mistakes


def bad_file(name, content):
    Path(name).write_bytes(content)
    return name


MISTAKES = {
    "packing": (["--no-packing"], "--packing is for --task chat"),
    "samples": (["--samples", "2"], "--samples is for --task chat"),
    "unknown target": (["--targets", "quarry"], "'quarry' matches nothing"),
    "malformed target": (["--targets", "(query"], "not a regular expression"),
    "misplaced field": (["--set", "lr=1e-3"], "--method lora has no field 'lr'; --lr is an option of its own"),
    "field of another method": (
        ["--method", "bitfit", "--rank", "4"],
        "--method bitfit has no field 'rank'; its fields are",
    ),
    "rank of zero": (["--rank", "0"], "LoRA.rank must be a positive integer, got 0"),
    "train what?": (["--method", "train"], "Train needs a target"),
    "no epochs": (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    "rate": (["--lr", "nan"], "--lr must be a positive number, got nan"),
    "length": (["--max-length", "41"], "--max-length 41: the model takes at most 40 tokens"),
    "no column": (["--text", "review"], "no column 'review' at line 2; the columns are 'text', 'label'"),
    "no file": (["--data", "none.csv"], "--data none.csv: no such file"),
    "no model": (["--model", "none"], "--model none: no such folder"),
    "no weights": (["--model", "."], "no config.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_makes_no_run(capsys, mistake):
    more, message = MISTAKES[mistake]
    assert message in failure(capsys, *job("run"), *more)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"text,label\ngood,up\nfine,up\n", "every example has the label 'up'"),
        (b"text,label\ngood,up\nbad,left\n", "have a label unseen in training: 'down'"),
        (b"text,label\n\xff,up\n", "not UTF-8: byte 0xff at offset 11, line 2"),
    ],
)
def test_bad_data_is_one_line_and_makes_no_run(capsys, content, message):
    assert message in failure(capsys, *job("run"), "--data", bad_file("bad.csv", content))
    assert not Path("run").exists()


def test_a_long_text_is_truncated():
    Path("long.csv").write_text("text,label\ngood,up\n" + "bad " * 25_000 + ",down\n")
    made = prepare.prepare(Config(model="bert", data="long.csv", eval="long.csv", max_length=24), NullReporter())
    assert sorted(map(len, made.train.encoded.ids)) == [3, 24]


def test_a_folder_without_weights_and_a_pickle(capsys):
    shutil.copytree("bert", "bare")
    os.unlink("bare/model.safetensors")
    assert "no weights" in failure(capsys, *job("run"), "--model", "bare")
    Path("bare/pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "a pickle" in failure(capsys, *job("run"), "--model", "bare")
    shutil.copy("bare/pytorch_model.bin", "bare/model.safetensors")
    assert "not a whole safetensors file" in failure(capsys, *job("run"), "--model", "bare")


def test_an_output_folder_that_exists_is_left_alone(capsys):
    Path("run").mkdir()
    Path("run/mine").write_text("mine")
    assert "run exists; choose another --out" in failure(capsys, *job("run"))
    assert "run: no run here" in failure(capsys, *job("run"), "--resume")
    assert [path.name for path in Path("run").iterdir()] == ["mine"]


def test_a_full_disk(capsys, monkeypatch, finished):
    save, calls = checkpoint.save, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoints")
        save(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        said = failure(capsys, *job("run"))
    assert "no space left on device" in said and "saved up to step 6" in said and "finetune --out run --resume" in said
    assert main(["finetune", "--out", "run", "--resume"]) == 0
    assert trained("run") == trained(finished)


def test_a_folder_that_looks_like_markup(finished, capsys):
    run = Path("run [b]/x[/i]1")
    shutil.copytree(finished, run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "run": str(run)}))
    assert main(["finetune", "--resume", str(run)]) == 0
    assert capsys.readouterr().out.count("run [b]/x[/i]1") == 3  # in a message and twice in the table


def test_typing_errors_are_one_line(capsys):
    mistakes = (["--epochs", "many"], ["--set", "length"], ["--method", "dora2"], ["--taks", "chat"], ["lrr=1"], ["x"])
    for arguments in (
        *(["finetune", *words] for words in mistakes),
        ["predict"],
        ["merge", "a", "b", "c"],
        ["fintune"],
        [],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("jpeft: error: ")


def test_an_interrupt_and_a_full_disk_while_parsing_are_one_line(capsys, monkeypatch):
    stops = {
        KeyboardInterrupt(signal.SIGTERM): (143, "interrupted; no file was left incomplete"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)): (1, "No space left on device"),
    }
    for error, (status, message) in stops.items():
        monkeypatch.setattr(app, "_parse", Mock(side_effect=error))
        assert main(["--help"]) == status
        assert capsys.readouterr().err == f"jpeft: error: {message}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate --top-p 2 tea", "--top-p must be above 0 and at most 1, got 2.0"),
        ("generate --top-k 0 tea", "--top-k must be a positive integer, got 0"),
        ("generate --max-new-tokens -1 tea", "--max-new-tokens must be a positive integer, got -1"),
        ("generate --temperature nan tea", "--temperature must be a finite number of at least 0, got nan"),
        ("generate --top-k 3 tea", "--top-k 3 is for sampling, and --temperature is 0"),
        ("generate --messages none.json", "--messages none.json: No such file or directory; expected a JSON file"),
        ("quantize bert small --block 7", "--block must be an even number of weights, got 7"),
    ],
)
def test_values_that_a_command_cannot_take(capsys, line, message):
    assert message in failure(capsys, *line.split())


def test_debug_shows_the_traceback(capsys):
    assert main([*job("run", "--data", "none.csv"), "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("jpeft: error: --data none.csv")


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert 'pip install "jpeft[demo]"' in failure(capsys, *job("run"))


# ------------------------------------------------------------------------------------------- predict, merge and inspect


def test_predict_from_arguments_files_and_stdin(finished, capsys, monkeypatch):
    run, texts = str(finished), ["good tea", "stale stale tea"]
    assert main(["predict", run, "--text-arg", texts[0], "--text-arg", texts[1]]) == 0
    plain = capsys.readouterr().out
    assert [line.split("\t")[::2] for line in plain.splitlines()] == [["up", "good tea"], ["down", "stale stale tea"]]
    Path("texts.csv").write_text("text\n" + "\n".join(texts) + "\n")
    Path("texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode() + b"\n")))
    for more in (["texts.csv"], ["texts.jsonl", "--text", "body"], []):
        assert main(["predict", run, *more]) == 0
        assert capsys.readouterr().out == plain
    assert main(["predict", run, "texts.csv", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [row["label"] for row in found] == ["up", "down"] and all(row["probability"] > 0.5 for row in found)


def test_predict_agrees_with_the_evaluation(finished):
    rows = [json.loads(line) for line in Path("test.jsonl").read_text().splitlines()]
    found = classification.open_run(finished).predict([row["text"] for row in rows], batch_size=7)
    hits = np.mean([label == row["label"] for (label, _), row in zip(found, rows, strict=True)])
    assert hits == json.loads((finished / "result.json").read_text())["accuracy_after"]


def test_mistakes_in_predicting(finished, capsys, monkeypatch):
    assert "not a run of `jpeft finetune`" in failure(capsys, "predict", "bert", "--text-arg", "tea")
    assert "not both" in failure(capsys, "predict", finished, "test.jsonl", "--text-arg", "tea")
    column = failure(capsys, "predict", finished, "--text-arg", "tea", "--text", "body")
    assert "--text body is a column of a FILE, and none is given" in column
    assert "text 2 is empty" in failure(capsys, "predict", finished, "--text-arg", "tea", "--text-arg", " ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"tea\xff")))
    assert "stdin is not UTF-8" in failure(capsys, "predict", finished)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "no texts on stdin" in failure(capsys, "predict", finished)


def test_merge_writes_a_folder_that_computes_the_same(finished, capsys):
    assert main(["merge", str(finished), "merged"]) == 0
    run, (encoder, params) = classification.open_run(finished), models.load("merged")
    head = load_file("merged/classifier.safetensors")
    ids = jnp.asarray([[2, 4, 10, 3], [2, 7, 3, 0]])
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0]])
    states = encoder.apply({"params": params}, ids, attention_mask=mask)
    pooled = (states * mask[..., None].astype(jnp.float32)).sum(1) / mask.sum(1, keepdims=True).astype(jnp.float32)
    logits = run.peft.apply(run.params, run.adapter, ids, mask)
    np.testing.assert_allclose(pooled @ head["weight"].T + head["bias"], logits, atol=1e-5)
    config = json.loads(Path("merged/config.json").read_text())
    assert config["id2label"] == {"0": "down", "1": "up"} and config["label2id"] == {"down": 0, "up": 1}
    assert config["model_type"] == "bert" and Path("merged/tokenizer.json").is_file()
    assert "AutoModelForSequenceClassification" in Path("merged/README.md").read_text()
    assert "merged exists" in failure(capsys, "merge", finished, "merged")
    assert not list(Path().glob(".merged*"))


def test_inspect_a_run_and_an_adapter(finished, stopped, capsys, monkeypatch):
    monkeypatch.setattr(assets, "resolve_model", None)  # no model is looked for
    about = {}
    for name, path in {"run": finished, "adapter": finished / "adapter", "stopped": stopped}.items():
        assert main(["inspect", str(path)]) == 0
        assert "LoRA" in capsys.readouterr().out
        assert main(["inspect", str(path), "--json"]) == 0
        about[name] = json.loads(capsys.readouterr().out)
    assert about["run"]["complete"] and not about["stopped"]["complete"] and about["stopped"]["step"] == 40
    assert about["run"]["result"]["steps"] == 40 and about["run"]["config"]["lr"] == 3e-2
    for name in ("method", "sites", "leaves", "parameters", "bytes", "base_fingerprint"):
        assert about["run"][name] == about["adapter"][name]
    assert about["adapter"]["kind"] == "adapter" and len(about["adapter"]["sites"]) == 8


def test_inspect_neither_a_run_nor_an_adapter(capsys):
    Path("empty").mkdir()
    assert "expected an adapter" in failure(capsys, "inspect", "empty")
    assert "no such run or adapter" in failure(capsys, "inspect", "none")
    assert "not a run" in failure(capsys, "inspect", "bert")


def test_help_imports_only_light_modules():
    code = """
        import sys
        from jpeft.cli import app, main
        try:
            main(["--help"])
        except SystemExit:
            print(sorted(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    imported = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert not {"jax", "flax", "orbax", "tokenizers", "matplotlib", "pandas", "etils", "jpeft.models"} & imported


def test_the_command_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jpeft", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("jpeft.cli", run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and out.startswith("Usage: jpeft ") and "finetune" in out and not err
