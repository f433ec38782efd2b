"""What is written down as an example runs: in docstrings and in the README."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
from jpeft import _moved
from jpeft.linen import registry
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig

MODULES = [m.name for m in pkgutil.walk_packages(jpeft.__path__, "jpeft.") if not m.name.endswith("__main__")]
# Their examples compile whole models.
SLOW = {
    "jpeft.core.quantized", "jpeft.core.stacking", "jpeft.models.bert", "jpeft.models.decoder", "jpeft.models.loading",
    "jpeft.models.saving", "jpeft.serving.generation",
}  # fmt: skip
README = (Path(__file__).parent.parent / "README.md").read_text()


def readme(holding):
    """The one Python block of the README that holds a text."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if holding in block)
    return code


@pytest.fixture(autouse=True)
def _as_users_do():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in SLOW else name for name in MODULES
])  # fmt: skip
def test_docstrings(name, registries):
    assert not doctest.testmod(importlib.import_module(name)).failed


def test_slow_examples_are_of_modules_that_exist():
    assert set(MODULES) >= SLOW


@pytest.mark.parametrize(("old", "new"), _moved.MOVED.items())
def test_old_submodule_names_give_the_module_that_has_their_content(old, new):
    assert getattr(jpeft, old) is importlib.import_module(new)


@pytest.mark.parametrize("old", _moved.SPLIT)
def test_old_names_of_modules_that_were_split_are_refused_with_the_new_ones(old):
    with pytest.raises(ImportError, match=f"jpeft.{old} has moved: see jpeft"):
        getattr(jpeft, old)
    for name in re.findall(r"jpeft[a-z._]+[a-z]", _moved.SPLIT[old]):
        importlib.import_module(name)


def test_an_import_that_a_notebook_showed_keeps_working():
    from jpeft.conversations import Batch

    assert Batch is importlib.import_module("jpeft.text.conversations").Batch


@pytest.mark.parametrize("name", [n for n, v in vars(jpeft).items() if n[0] != "_" and callable(v)])
def test_every_name_of_the_surface_says_what_it_does(name):
    assert getattr(jpeft, name).__doc__


def test_the_surface_in_twenty_lines(tmp_path, monkeypatch):
    code = readme("path/to/bert")
    monkeypatch.chdir(tmp_path)
    model = Bert(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=32, max_position_embeddings=16))  # fmt: skip
    ids = jnp.array([[1, 5, 7, 2]])
    jpeft.models.save(tmp_path / "path" / "to" / "bert", model, model.init(jax.random.key(0), ids)["params"])
    scope = {"ids": ids, "batch": {"ids": ids}}
    exec(code, scope)
    assert int(scope["state"].step) == 1 and scope["states"].shape == (1, 4, 16)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.safetensors", "config.json"]


@pytest.mark.exhaustive
def test_language_models(tmp_path, monkeypatch):
    code = readme("path/to/llama")
    monkeypatch.chdir(tmp_path)
    model = Decoder(DecoderConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                  num_attention_heads=2, max_position_embeddings=64))  # fmt: skip
    ids = jnp.array([[1, 5, 7, 2]])
    jpeft.models.save(tmp_path / "path" / "to" / "llama", model, model.init(jax.random.key(0), ids)["params"])
    scope = {"jax": jax, "jpeft": jpeft, "ids": ids, "mask": jnp.ones_like(ids)}
    exec(code, scope)
    assert scope["logits"].shape == (1, 4, 30) and [len(row) for row in scope["rows"]] == [16, 16]
    assert (tmp_path / "hf" / "adapter_config.json").is_file()


@pytest.mark.exhaustive
def test_quantized_bases(tmp_path, monkeypatch):
    code = readme("path/to/qwen")
    monkeypatch.chdir(tmp_path)
    model = Decoder(DecoderConfig(vocab_size=30, hidden_size=64, intermediate_size=128,
                                  num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64))  # fmt: skip
    ids = jnp.array([[1, 5, 7, 2]])
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids)["params"])
    jpeft.models.save(tmp_path / "path" / "to" / "qwen", model, params)
    scope = {"jax": jax, "jpeft": jpeft, "ids": ids, "params": params}
    exec(code, scope)
    assert scope["logits"].shape == (1, 4, 30)
    assert jpeft.quantization.is_quantized(scope["base"]) and not jpeft.quantization.is_quantized(scope["merged"])


@pytest.mark.exhaustive
def test_meshes(tmp_path, monkeypatch):
    code = readme("path/to/mistral")
    monkeypatch.chdir(tmp_path)
    model = Decoder(DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
                                  num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64))  # fmt: skip
    batch = {"ids": jnp.ones((8, 4), int)}
    base = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), batch["ids"])["params"])
    jpeft.models.save(tmp_path / "path" / "to" / "mistral", model, base)
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(model, base, batch["ids"])
    tx = optax.sgd(0.1)
    loss_fn = lambda adapter, params, batch, rng: ((peft.apply(params, adapter, batch["ids"]) ** 2).mean(), {})  # noqa: E731
    scope = {"jax": jax, "jpeft": jpeft, "model": model, "base": base, "peft": peft, "batch": batch, "tx": tx,
             "step": jpeft.train_step(peft, loss_fn, tx)}  # fmt: skip
    exec(code, scope)
    exec(readme("open_checkpoints"), scope)
    plan = readme("found = jpeft.plan").replace("v5e:4x4", "cpu:4").replace("fsdp=16", "fsdp=4")  # without libtpu
    scope["params"] = scope["base"]
    exec(plan, scope)
    assert scope["found"].devices == 4 and scope["found"].memory.arguments["base"] > 0
    spec = lambda tree: tree["model"]["layers"]["mlp"]["up_proj"]["kernel"].sharding.spec  # noqa: E731
    assert spec(scope["base"]) == jax.sharding.PartitionSpec(None, "fsdp") and int(scope["state"].step) == 1


def test_the_method_and_the_geometry_that_the_readme_adds(registries):
    shift, geometry = readme("class Shift"), readme("TheirLinear")
    scope: dict = {}
    exec("from dataclasses import dataclass\nimport jax.numpy as jnp\nfrom jpeft.methods import WeightMethod", scope)
    exec(shift, scope)
    model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    peft = scope["Shift"](targets=["layers_0"]).bind(model, params, x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.5, peft.init(jax.random.key(1), params))
    merged = model.apply({"params": peft.merge(params, adapter)}, x)
    assert jnp.allclose(peft.apply(params, adapter, x), merged, atol=1e-6)
    assert not jnp.allclose(merged, model.apply({"params": params}, x))
    exec(geometry, {"jpeft": jpeft})
    assert "TheirLinear" in registry.REGISTRY
