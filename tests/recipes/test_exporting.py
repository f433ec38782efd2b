"""`jpeft export` of adapter folders: for HuggingFace PEFT, for jpeft, and for servers."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.cli import main
from tests.folders import work_in, write_bert, write_llama

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiles")
IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A language model (`llama`), adapters of it, and an encoder (`bert`)."""
    folder = tmp_path_factory.mktemp("home")
    with jax.numpy_dtype_promotion("standard"):
        model, params = write_llama(folder / "llama", 16, 24)
        for name, method in {
            "lora": jpeft.LoRA(rank=2, alpha=6, targets=["q_proj", "up_proj"], init_weights="random"),
            "dora": jpeft.DoRA(rank=2, targets=["q_proj"], init_weights="random"),
            "prefix": jpeft.PrefixTuning(length=3),
        }.items():
            peft = method.bind(model, params, IDS)
            adapter = jax.tree.map(lambda x: 1.5 * np.asarray(x), jax.jit(peft.init)(jax.random.key(1), params))
            jpeft.save(folder / name, peft, adapter, params)
            if name == "lora":
                jpeft.hf.save(folder / "hf", peft, adapter, params)
    write_bert(folder / "bert")
    return folder


@pytest.fixture(autouse=True)
def working_directory(home, monkeypatch, tmp_path):
    work_in(tmp_path, home, monkeypatch)


def exported(capsys, *arguments):
    """What a command prints that succeeds: its JSON, or its text."""
    assert main(["export", *arguments]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


def failure(capsys, *arguments):
    assert main(["export", *arguments]) == 1 and not Path("out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["lora", "hf"])
def test_an_adapter_folder_for_vllm_and_sglang(adapter, capsys):
    found = exported(capsys, adapter, "out", "--for", "vllm", "--model", "llama", "--json")
    size = sum(file.stat().st_size for file in Path("out").iterdir())
    assert found == {
        "folder": "out", "bytes": size, "for": "vllm", "rank": 8, "modules": 4, "error": None,
        "command": "vllm serve llama --enable-lora --max-lora-rank 8 --lora-modules out=out",
    }  # fmt: skip
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, "llama")
    text = exported(capsys, adapter, "my adapter", "--for", "sglang", "--model", "llama", "--dtype", "float16")
    first, *rest = text.splitlines()
    assert first.startswith("my adapter: a LoRA of rank 2 on 10 modules for SGLang of ") and rest == [
        "serve it: python -m sglang.launch_server --model-path llama --enable-lora --max-lora-rank 2 --lora-paths "
        "'my adapter=my adapter'"
    ]


def test_an_adapter_that_is_no_lora_states_its_error(capsys):
    said = failure(capsys, "dora", "out", "--for", "vllm", "--model", "llama", "--rank", "3")
    assert "DoRA at 'model/layers/" in said and "/self_attn/q_proj': a LoRA of rank 3 misses" in said
    assert (
        "above --max-error 0.01; give a larger --rank or --max-error, or write the whole model with jpeft merge" in said
    )
    options = ["--for", "vllm", "--model", "llama", "--rank", "3", "--max-error", "1"]
    found = exported(capsys, "dora", "out", *options, "--json")
    assert 0.01 < found["error"]["largest"] < 1 and found["error"]["at"].endswith("self_attn/q_proj")
    text = exported(capsys, "dora", "again", *options)
    worst = found["error"]
    said = f"what was no LoRA became one: relative error at most {worst['largest']:.2g}, at {worst['at']}"
    assert said in text.splitlines()


def test_an_adapter_for_llama_cpp(capsys):
    assert main(["export", "hf", "out.gguf", "--for", "gguf", "--model", "llama"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == "serve it: llama-server -m MODEL.gguf --lora out.gguf"
    assert "MODEL.gguf is the base: convert_hf_to_gguf.py llama --outfile MODEL.gguf" in err
    reader = gguf.GGUFReader("out.gguf")
    assert reader.fields["general.architecture"].contents() == "llama" and len(reader.tensors) == 8
    assert reader.fields["adapter.lora.alpha"].contents() == 2.0


def test_an_adapter_folder_for_peft_and_jpeft(home, capsys):
    for i, options in enumerate((["--for", "peft"], ["--format", "hf"], [])):
        exported(capsys, "lora", f"out{i}", "--model", "llama", *options)
        weights = (Path(f"out{i}") / "adapter_model.safetensors").read_bytes()
        assert weights == (home / "hf" / "adapter_model.safetensors").read_bytes()
    assert "own: an adapter folder of " in exported(capsys, "hf", "own", "--model", "llama", "--format", "jpeft")
    assert jpeft.load("own", *jpeft.models.load("llama", scan_layers=False), IDS)


def test_user_errors(capsys):
    for arguments, said in {
        ("lora", "--for", "vllm"): "lora is no run, so its base is not known: give --model",
        ("lora", "--for", "vllm", "--model", "bert"): "--model bert: not a language model, but an encoder",
        ("lora", "--for", "vllm", "--format", "hf", "--model", "llama"): "--format hf and --for vllm both say for whom",
        ("lora", "--rank", "4", "--model", "llama"): "--rank is for adapters that a server gets: --for vllm, sglang",
        ("lora", "--for", "peft", "--dtype", "float16", "--model", "llama"): "--dtype is for adapters that a server",
        ("absent", "--for", "vllm", "--model", "llama"): "absent: no such run or adapter",
        ("llama", "--for", "vllm", "--model", "llama"): "llama: a model, with no adapter of its own",
        ("prefix", "--for", "gguf", "--model", "llama"): "PrefixTuning at 'model/layers/self_attn' cannot become",
    }.items():  # fmt: skip
        assert said in failure(capsys, arguments[0], "out", *arguments[1:])
    Path("taken").mkdir()
    assert main(["export", "lora", "taken", "--for", "vllm", "--model", "llama"]) == 1
    assert "taken exists" in capsys.readouterr().err
