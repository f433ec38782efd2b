"""The ends of a run: merging it, and using one that is not finished."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.core.tree import flatten
from jpeft.files import read_safetensors as load_file
from jpeft.files import serialize
from jpeft.models.dtypes import stored_dtypes
from jpeft.recipes import prepare, run_folder
from jpeft.recipes.config import Config
from jpeft.recipes.optimizer import learning_rate, optimizer, training_step
from jpeft.recipes.tasks import classification
from jpeft.recipes.tasks.base import NullReporter
from jpeft.training import checkpoint
from jpeft.training.step import TrainState
from tests.cli.runs import failure, job

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")
TEXT = ["--text-arg", "good tea", "--text-arg", "stale cup of tea"]


# ----------------------------------------------------------------------------------------------------------- unfinished


@pytest.fixture
def killed(finished):
    """A run that was killed after its last checkpoint, before it wrote a result."""
    run = Path(shutil.copytree(finished, "killed"))
    shutil.rmtree(run / "adapter")
    os.unlink(run / "result.json")
    return run


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_killed_run_is_used_as_its_newest_checkpoint(killed, finished, capsys):
    (killed / "checkpoints" / "41.orbax-checkpoint-tmp").mkdir()  # of a run that is just saving
    before = content(killed)
    assert main(["predict", str(killed), *TEXT]) == 0
    out, err = capsys.readouterr()
    assert err == "killed is not finished: using its newest checkpoint, of step 40 of 40\n"
    assert main(["merge", str(killed), "merged"]) == 0
    assert "newest checkpoint, of step 40" in capsys.readouterr().err
    assert content(killed) == before
    assert main(["predict", str(finished), *TEXT]) == 0
    assert capsys.readouterr() == (out, "")  # the last checkpoint holds the adapter of the result
    assert main(["merge", str(finished), "expected"]) == 0
    for name in ("model", "classifier"):
        assert (Path("merged") / f"{name}.safetensors").read_bytes() == Path(
            f"expected/{name}.safetensors"
        ).read_bytes()


def test_the_best_checkpoint_of_a_run_that_keeps_the_best(killed, capsys):
    record = json.loads((killed / "config.json").read_text())
    (killed / "config.json").write_text(json.dumps({**record, "config": {**record["config"], "keep": "best"}}))
    # step 40 alone was evaluated; 41 is newer and was not
    shutil.copytree(killed / "checkpoints" / "39", killed / "checkpoints" / "41")
    assert main(["predict", str(killed), *TEXT]) == 0
    assert "using its best checkpoint, of step 40 of 40" in capsys.readouterr().err


def damage(checkpoint):
    for file in checkpoint.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def test_damaged_and_missing_checkpoints(killed, capsys):
    damage(killed / "checkpoints" / "40")
    assert main(["predict", str(killed), *TEXT]) == 0
    err = capsys.readouterr().err
    assert "the checkpoint of step 40 is damaged and left out" in err and "newest checkpoint, of step 39 of 40" in err
    damage(killed / "checkpoints" / "39")
    resume = ["finetune", "--resume", killed]
    for command in (["predict", killed, "--text-arg", "tea"], ["merge", killed, "out"], resume):
        capsys.readouterr()
        assert main([str(word) for word in command]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "killed: not finished, and its checkpoints are damaged (" in line and "finetune --out killed" in line
        assert "remove killed/checkpoints and call: " in line
    shutil.rmtree(killed / "checkpoints")
    said = failure(capsys, "predict", killed, *TEXT)
    assert "the run is not finished, and has no checkpoint yet; resume it with: jpeft finetune --out killed" in said
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["config", "steps", "method", "base"])
@pytest.mark.parametrize("value", [None, "x"])
def test_a_record_that_lost_an_entry(killed, name, value, capsys):
    record = json.loads((killed / "config.json").read_text())
    record = {key: old for key, old in record.items() if key != name} | ({name: value} if value else {})
    (killed / "config.json").write_text(json.dumps(record))
    for command in (["merge", killed, "out"], ["finetune", "--resume", killed], ["inspect", killed]):
        said = failure(capsys, *command)
        assert "killed" in said and ("config.json: " + repr(name) in said or "not a run" in said)


def test_a_base_with_nan_is_told_before_training(capsys):
    shutil.copytree("bert", "broken")
    file = Path("broken/model.safetensors")
    tensors = load_file(file)
    tensors["embeddings.LayerNorm.weight"] = np.full_like(tensors["embeddings.LayerNorm.weight"], np.nan)
    file.write_bytes(serialize(tensors))
    said = failure(capsys, *job("run", "--model", "broken"))
    assert "run: the loss is not finite before training: the weights of --model " in said and "broken hold NaN" in said


def test_a_run_folder_that_cannot_be_made(capsys):
    Path("runs").touch()  # a file: no name below it is ever free
    assert "runs/bert-lora-1: cannot be created: " in failure(capsys, *job("x")[:7], "--max-length", "24")


# ---------------------------------------------------------------------------------------------------------- lengthening


def continued(run, config, start):
    """The adapter after the rest of a run, by hand from a checkpoint; and the counts of each step's data."""
    job = prepare.prepare(config, NullReporter())
    tx = optimizer(config, job.steps, job.peft)
    state = TrainState.create(job.peft, job.peft.init(jax.random.key(0), job.params), tx, jax.random.key(0))
    with checkpoint.open_checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoint.restore(checkpoints, state, start)
    step = training_step(job.peft, job.loss_fn(), tx, config)
    for batch, _ in job.batches(start):
        state, _ = step(state, job.params, batch)
    return flatten(state.adapter), [count._asdict() for count in job.train.counts(0)]


@pytest.mark.parametrize("start", [40, pytest.param(39, marks=pytest.mark.exhaustive)])
def test_a_resumed_run_may_become_longer(finished, killed, start, capsys):
    run = killed if start == 39 else Path(shutil.copytree(finished, "run"))
    if start == 39:
        shutil.rmtree(run / "checkpoints" / "40")
    config = dataclasses.replace(Config(**run_folder.read_record(run)["config"]), epochs=5)
    expected, counts = continued(run, config, start)
    assert main(["finetune", "--resume", str(run), "--epochs", "5"]) == 0
    said = "lengthened from 40 to 50 steps; from step {} on the learning rate is that of a run of 50 steps"
    assert said.format(start + 1) in capsys.readouterr().out
    record, lines = run_folder.read_record(run), run_folder.read_lines(run / "metrics.jsonl")
    assert (record["steps"], record["config"]["epochs"]) == (50, 5)
    (entry,) = record["lengthened"]
    assert (entry["from_steps"], entry["to_steps"], entry["after_step"]) == (40, 50, start)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 51))
    assert [{name: line[name] for name in count} for line, count in zip(trained, counts, strict=True)] == counts
    rates = [float(learning_rate(config, 50)(step)) for step in range(start, 50)]
    assert [line["lr"] for line in trained[start:]] == pytest.approx(rates, rel=1e-6)
    found = load_file(run / "adapter" / "adapter.safetensors")
    assert all(np.array_equal(found["/".join(path)], leaf) for path, leaf in expected.items())
    assert run_folder.read_result(run)["steps"] == 50
    before = content(run)
    assert main(["finetune", "--resume", str(run), "--epochs", "5"]) == 0
    assert content(run) == before and "is complete" in capsys.readouterr().out


def test_a_resumed_run_may_not_become_shorter(finished, capsys):
    run = Path(shutil.copytree(finished, "run"))
    before = content(run)
    for more, said in {
        ("--epochs", "3"): "--epochs 3 conflicts with the run's 4: a resumed run keeps its configuration; only --steps",
        ("--steps", "30"): "--steps 30 conflicts with the run's default",
        ("--epochs", "5", "--steps", "40"): "--steps 40 conflicts with the run's default",
        ("--steps", "45"): "--epochs 4 with --steps 45 makes 40 steps, and the run has 40: it may only become longer",
        ("--epochs", "5", "--batch-size", "4"): "--batch-size 4 conflicts with the run's 8: a resumed run keeps",
    }.items():
        assert said in failure(capsys, "finetune", "--resume", run, *more)
    shutil.rmtree(run / "checkpoints")
    said = failure(capsys, "finetune", "--resume", run, "--epochs", "5")
    assert "its checkpoints are gone" in said and "jpeft finetune --adapter run" in said
    assert all(before.get(path) == time for path, time in content(run).items() if path.is_file())


def test_an_adapter_is_exported_where_its_head_has_a_place(killed, finished, capsys):
    assert "use jpeft merge, or --format jpeft" in failure(capsys, "export", finished, "out")
    assert not Path("out").exists()
    assert main(["export", str(killed), "out", "--format", "jpeft"]) == 0
    assert Path("out/adapter.safetensors").read_bytes() == (finished / "adapter/adapter.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ beginning elsewhere


def again(adapter, *more):
    """A short run that begins from an adapter, on data in another order."""
    data = ["--data", "train.csv", "--eval", "test.jsonl", "--max-length", "24", "--seed", "3", "--epochs", "1"]
    return ["finetune", "--adapter", str(adapter), "--out", "again", *data, *more]


def start_of(run):
    return load_file(Path(run) / "start" / "adapter.safetensors")


def test_a_run_begins_from_another_and_resumes_without_it(finished, killed, capsys):
    same = ["--rank", "8", "--method", "lora", "--targets", "all-linear"]
    assert main(again(killed, *same, "--steps", "4", "--batch-size", "8", "--checkpoint-every", "2")) == 0
    assert "using its newest checkpoint, of step 40 of 40" in capsys.readouterr().out
    first, found = load_file(finished / "adapter" / "adapter.safetensors"), start_of("again")
    assert found.keys() == first.keys() and all(np.array_equal(found[name], first[name]) for name in first)
    record = run_folder.read_record(Path("again"))
    assert record["config"]["adapter"].endswith("killed") and record["start"]
    assert record["method"] == run_folder.read_record(finished)["method"]
    result, before = run_folder.read_result(Path("again")), run_folder.read_result(finished)
    assert result["accuracy_before"] == before["accuracy_after"]
    assert result["loss_before"] == pytest.approx(before["loss_after"], rel=1e-6)
    assert main(["predict", "again", *TEXT]) == 0  # the untrained head is that of the first run
    expected = load_file(Path("again/adapter/adapter.safetensors"))
    shutil.rmtree(killed)
    for path in ("again/adapter", "again/checkpoints/4"):
        shutil.rmtree(path)
    os.unlink("again/result.json")
    assert main(["finetune", "--resume", "again"]) == 0
    found = load_file(Path("again/adapter/adapter.safetensors"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    start = Path("again/start/config.json")
    start.write_text(start.read_text().replace('"alpha": 16', '"alpha": 4'))
    for path in ("again/adapter", "again/checkpoints/4"):
        shutil.rmtree(path)
    os.unlink("again/result.json")
    assert "its method changed since it began" in failure(capsys, "finetune", "--resume", "again")


def test_flags_that_contradict_the_adapter(finished, capsys):
    for more, said in {
        ("--rank", "4"): f"--rank 4 contradicts --adapter {finished}, which has 8: leave it out",
        ("--method", "ia3"): f"--method ia3 contradicts --adapter {finished}, whose method is lora, train",
        ("--targets", "query"): f"--targets ['query'] contradicts --adapter {finished}, which has other sites",
        ("--set", "rslora=true"): f"--set rslora True contradicts --adapter {finished}, which has False",
        ("--set", "length=4"): f"--set length: --adapter {finished} is a LoRA, which has no field 'length'",
        ("--model", "no/such"): "no/such",
    }.items():
        assert said in failure(capsys, *again(finished, *more))
    assert "--adapter none: no such folder" in failure(capsys, *again("none", "--model", "bert"))
    assert "bert: a model, with no adapter of its own" in failure(capsys, *again("bert", "--model", "bert"))
    other = Path("other.csv")
    other.write_text(Path("train.csv").read_text().replace("down", "worse"))
    said = failure(capsys, *again(finished), "--data", other, "--eval", other)
    assert "was trained on the labels down, up, and the data's are up, worse" in said
    assert not Path("again").exists()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"])
def test_a_run_begins_from_a_huggingface_folder(dtype, capsys):
    encoder, params = models.load("bert")
    inputs = classification.example_inputs()
    peft = jpeft.LoRA(rank=2, targets=["query"], init_weights="random", dtype=dtype).bind(encoder, params, inputs[0])
    adapter = peft.init(jax.random.key(5), params)
    jpeft.hf.save("hf", peft, adapter, params)
    assert main(again("hf", "--model", "bert", "--rank", "2", "--targets", "query", "--steps", "1")) == 0
    found = start_of("again")
    (own,) = (leaf for path, leaf in flatten(adapter).items() if path[-1] == "lora_a")
    leaf = found["encoder/encoder/layer/0/attention/self/query/lora_a"]
    assert leaf.dtype == np.float32 and np.array_equal(leaf, np.asarray(own, np.float32))
    assert "classifier/kernel" in found and len(found) == 4
    result = run_folder.read_result(Path("again"))
    assert result["trainable_parameters"] == 2 * (16 * 2) + 16 * 2 + 2
    assert "rank 3 contradicts" in failure(capsys, *again("hf", "--model", "bert", "--rank", "3", "--out", "no"))


# ---------------------------------------------------------------------------------------------------------------- merge


@pytest.fixture(scope="module")
def mixed(home, tmp_path_factory):
    """A run whose model is in bfloat16 but for its embeddings, and trained in float32 as it is by default."""
    folder = tmp_path_factory.mktemp("mixed")
    model, params = models.load(home / "bert")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["encoder"])
    models.save(folder / "model", model, {**params, "encoder": low}, source=home / "bert")
    with contextlib.chdir(home):
        assert main(job(folder / "run", "--model", str(folder / "model"), "--steps", "2")) == 0
    return folder


def merged_by_hand(folder):
    """The merged encoder in float64, from the adapter's file and the model's."""
    base = {name: np.asarray(x, np.float64) for name, x in load_file(folder / "model" / "model.safetensors").items()}
    adapter = load_file(folder / "run" / "adapter" / "adapter.safetensors")
    for name in adapter:
        if name.endswith("lora_a"):
            a, b = (np.asarray(adapter[name[:-1] + half], np.float64) for half in "ab")
            base[name.removeprefix("encoder/").removesuffix("lora_a").replace("/", ".") + "weight"] += 2 * (a @ b).T
    return base


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_merged_model_has_the_dtypes_of_its_files_or_the_chosen_one(mixed, dtype):
    assert main(["merge", str(mixed / "run"), "out", *([] if dtype is None else ["--dtype", dtype])]) == 0
    found, stored = stored_dtypes("out"), stored_dtypes(mixed / "model")
    assert found == (stored if dtype is None else dict.fromkeys(stored, jnp.dtype(dtype)))
    assert len(set(stored.values())) == 2
    config = json.loads(Path("out/config.json").read_text())
    assert config["torch_dtype"] == (dtype or json.loads((mixed / "model/config.json").read_text())["torch_dtype"])
    written, by_hand = load_file(Path("out/model.safetensors")), merged_by_hand(mixed)
    for name, x in written.items():
        exact, rounding = by_hand[name], float(jnp.finfo(x.dtype).eps)
        np.testing.assert_allclose(np.asarray(x, np.float64), exact, rtol=rounding, atol=1e-7, err_msg=name)


def test_a_run_in_low_precision_does_not_round_what_it_did_not_change(home, capsys):
    assert main(job("run", "--dtype", "bfloat16", "--steps", "1", "--targets", "query")) == 0
    assert main(["merge", "run", "out"]) == 0
    before, after = load_file(home / "bert/model.safetensors"), load_file(Path("out/model.safetensors"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"encoder.layer.0.attention.self.query.weight"}
    assert {x.dtype for x in after.values()} == {np.dtype("float32")}


def test_a_merge_that_is_not_finite_is_refused_unless_forced(mixed, capsys):
    run = Path(shutil.copytree(mixed / "run", "run"))
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    name = next(name for name in tensors if name.endswith("query/lora_b"))
    for value, more, said in (
        (3e38, [], "beyond the range of float32, the dtype of the base's weight; --force writes it all the same"),
        (1e6, ["--dtype", "float16"], "beyond the range of float16 (at most 6.55e+04)"),
    ):
        rewrite(run / "adapter", {**tensors, name: np.full_like(tensors[name], value)})
        assert said in failure(capsys, "merge", run, "out", *more)
        assert not Path("out").exists() and not list(Path().glob(".out*"))
        assert main(["merge", str(run), f"forced{len(more)}", "--force", *more]) == 0
    query = load_file(Path("forced2/model.safetensors"))["encoder.layer.0.attention.self.query.weight"]
    assert query.dtype == np.float16 and np.isinf(query).any()


def rewrite(folder, tensors):
    """Replaces the tensors of an adapter folder."""
    blob = serialize(tensors)
    (folder / "adapter.safetensors").write_bytes(blob)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sha256": hashlib.sha256(blob).hexdigest()}))
