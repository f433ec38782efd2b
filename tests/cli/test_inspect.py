"""`jpeft inspect` for people: grouped, in words, with repeated layers folded. Its JSON is tested in `test_cli` too."""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft.cli import main
from jpeft.core.folding import unfold

OLD = Path(__file__).parents[1] / "data" / "old"
RESULT = {
    "task": "classify", "accuracy_before": 0.5, "accuracy_after": 0.875, "majority_baseline": 0.5,
    "trainable_parameters": 1234, "total_parameters": 56789, "adapter_bytes": 2**20, "base_bytes": 2**21,
    "base_memory_bytes": 2**21, "seconds_per_step": 0.0123, "tokens_per_second": 4567.0, "mfu": None, "steps": 7,
    "peak_memory_bytes": None, "skipped_steps": 0, "step_kept": 7, "loss_before": 0.7, "loss_after": 0.3, "run": "x",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def home():
    """No model and no data: nothing here looks at them."""


@pytest.fixture(autouse=True)
def there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def shown(capsys, path):
    """The title, and each section's names and values; the lines of leaves are one."""
    assert main(["inspect", str(path)]) == 0
    title, *blocks = capsys.readouterr().out.rstrip().split("\n\n")
    sections = {}
    for block in blocks:
        if block.startswith("  "):
            sections["leaves"] = [line.strip() for line in block.splitlines()]
        else:
            head, *lines = block.splitlines()
            sections[head] = [tuple(line.strip().split("  ", 1)) for line in lines]
            sections[head] = {name: rest[0].strip() if rest else "" for name, *rest in sections[head]}
    return title, sections


def test_an_unfinished_run(capsys):
    title, found = shown(capsys, OLD / "interrupted_run")
    assert title.endswith(f"an unfinished run; continue with: jpeft finetune --out {OLD / 'interrupted_run'} --resume")
    assert found["What it is"]["steps"] == "7 of 20; checkpoints of 7" and found["What it is"]["task"] == "classify"
    assert found["What trains"]["method"].startswith("LoRA: targets query, value, dense; rank 2; alpha 4; dropout 0.1;")
    assert "Train: targets classifier" in found["What trains"]
    assert found["Data"]["evaluation examples"] == "all" and found["Data"]["labels"] == "down, up"
    assert found["Training"]["warm-up"] == "6% of the steps" and found["Training"]["peak learning rate"] == "0.06"
    assert set(found["Files"]) == {"checkpoints/", "config.json", "metrics.jsonl"} and "Result" not in found


def test_a_finished_run_shows_its_result_and_folds_its_leaves(capsys):
    shutil.copytree(OLD / "interrupted_run", "run")
    shutil.copytree(OLD / "finished_adapter", "run/adapter")
    Path("run/result.json").write_text(json.dumps(RESULT))
    title, found = shown(capsys, "run")
    assert title == "run: a finished run"
    assert found["Result"]["accuracy after"] == "87.5%" and found["Result"]["time per step"] == "12 ms (median)"
    assert found["Result"]["trainable parameters"] == "1,234 of 56,789 (2.17%)"
    assert "adapter/" in found["Files"] and not {"run", "use it"} & found["Result"].keys()
    assert found["What it is"]["written by"].startswith("jpeft ")
    leaves = load_file("run/adapter/adapter.safetensors")
    named = {name: line for line in found["leaves"] for name in unfold(line.split("  ")[0].split(" ×")[0])}
    assert named.keys() == leaves.keys()
    for name, line in named.items():
        assert line.endswith(f"  {'×'.join(map(str, leaves[name].shape))} {leaves[name].dtype}")
    assert main(["inspect", "run", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["result"] == RESULT and about["files"]["result.json"] == Path("run/result.json").stat().st_size
    assert about["dtypes"] == {name: str(leaf.dtype) for name, leaf in leaves.items()}


def test_an_adapter(capsys):
    title, found = shown(capsys, OLD / "adapter")
    assert title == f"{OLD / 'adapter'}: an adapter of jpeft"
    assert found["What trains"]["sites"] == "9" and found["What trains"]["parameters"] == "267"
    assert "Train: targets head" in found["What trains"] and "layers/down/lora_a  2×8×3 float32" in found["leaves"]
    assert found["What it is"]["base"].startswith("8 leaves, fingerprint ")


def test_a_folder_of_huggingface_peft(capsys):
    model, x = nn.Sequential([nn.Dense(8), nn.Dense(8)]), jnp.ones((1, 8))
    params = model.init(jax.random.key(0), x)["params"]
    peft = jpeft.LoRA(rank=2, targets=["layers_0", "layers_1"]).bind(model, params, x)
    jpeft.hf.save("hf", peft, peft.init(jax.random.key(1), params), params, base_model="path/to/base")
    title, found = shown(capsys, "hf")
    assert title == "hf: an adapter of HuggingFace PEFT"
    assert found["What it is"] == {"base": "path/to/base"}
    assert found["What trains"]["method"] == "LORA" and found["What trains"]["r"] == "2"
    assert found["What trains"]["parameters"] == "64" and "adapter_model.safetensors" in found["Files"]
    assert "base_model.model.layers_{0,1}.lora_A.weight ×2  2×8 float32" in found["leaves"]
    assert main(["inspect", "hf", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "PEFT adapter" and about["parameters"] == 64 and about["base_model"] == "path/to/base"
    Path("hf/adapter_model.safetensors").unlink()  # as older ones, which hold a pickle
    assert "leaves" not in shown(capsys, "hf")[1]
    Path("hf/adapter_config.json").write_text("[")
    assert main(["inspect", "hf"]) == 1 and "adapter_config.json" in capsys.readouterr().err
