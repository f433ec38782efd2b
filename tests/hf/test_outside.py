"""Methods from outside of jpeft in HuggingFace PEFT folders, by the form that they declare; without torch.

tests/parity/test_hf_decoder.py compares the same two methods with PEFT itself.
"""

import ast
import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.core.interchange import HFSpec, SharedTensor, Tensor
from jpeft.errors import AdapterError
from jpeft.methods import METHODS
from tests.hf.outside import DoRA, VeRA
from tests.hf.test_hf import filled
from tests.zoo import same

X = jnp.ones((2, 4))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.relu(nn.Dense(6, name="up")(nn.LayerNorm(name="norm")(x))))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for method in (VeRA, DoRA):
        monkeypatch.setitem(METHODS, method.__name__, method)


@pytest.fixture(scope="module")
def params():
    return filled(jax.eval_shape(Layers().init, jax.random.key(0), X)["params"], 0)


def made(method, params):
    peft = method.bind(Layers(), params, X)
    return peft, filled(peft.init(jax.random.key(1), jax.eval_shape(lambda: params)), 1)


def edit(folder, change=lambda tensors: None, **fields):
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


SAVED = {
    "shared tensors": VeRA(rank=2, seed=3, targets=["up", "down"]),
    "and biases": jpeft.Chain(VeRA(rank=2, targets=["up"]), jpeft.BitFit(targets=r"up/bias"), jpeft.Train("norm")),
    "one peft_type": DoRA(rank=2, alpha=3, targets=["up", "down"], overrides={"up": {"rank": 4}}),
}


@pytest.mark.parametrize("name", SAVED)
def test_load_is_the_inverse_of_save(name, params, tmp_path):
    peft, adapter = made(SAVED[name], params)
    jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    again, read = jpeft.hf.load(tmp_path / "hf", Layers(), params, X)
    same(read, adapter)
    assert type(again.method) is type(peft.method)
    same(again.merge(params, read), peft.merge(params, adapter))
    jpeft.hf.save(tmp_path / "again", again, read, params)
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_config_and_tensors_on_disk(params, tmp_path):
    jpeft.hf.save(tmp_path, *made(SAVED["and biases"], params), params)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": None,
        "bias": "vera_only",
        "d_initial": 0.1,
        "inference_mode": True,
        "modules_to_save": ["norm"],
        "peft_type": "VERA",
        "projection_prng_key": 0,
        "r": 2,
        "save_projection": True,
        "target_modules": ["up"],
        "task_type": None,
        "vera_dropout": 0.0,
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {
        "base_model.vera_A": (2, 4),
        "base_model.vera_B": (6, 2),
        "base_model.model.up.vera_lambda_b": (6,),
        "base_model.model.up.vera_lambda_d": (2,),
        "base_model.model.up.base_layer.bias": (6,),
        "base_model.model.norm.weight": (4,),
        "base_model.model.norm.bias": (4,),
    }


def test_required_fields_choose_among_methods_of_one_type(params, tmp_path):
    jpeft.hf.save(tmp_path, *made(SAVED["one peft_type"], params), params)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    assert type(jpeft.hf.load(tmp_path, Layers(), params, X)[0].method) is DoRA
    edit(tmp_path, lambda t: [t.pop(k) for k in list(t) if k.endswith("vector")], use_dora=False)
    assert type(jpeft.hf.load(tmp_path, Layers(), params, X)[0].method) is jpeft.LoRA


def changing(adapter):
    """A fresh adapter with scales that are not zero, so that it changes something."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x + 0.5 if path[-1].key == "lambda_b" else x, adapter)


def test_shared_tensors_that_a_file_leaves_out_are_regenerated(params, tmp_path):
    peft = SAVED["shared tensors"].bind(Layers(), params, X)
    adapter = changing(peft.init(jax.random.key(0), params))
    jpeft.hf.save(tmp_path, peft, adapter, params)
    edit(tmp_path, lambda t: [t.pop(f"base_model.vera_{x}") for x in "AB"], save_projection=False)
    same(jpeft.hf.load(tmp_path, Layers(), params, X)[1], adapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied(VeRA):
    """A VeRA whose file has A again under every module, and integers."""

    hf = dataclasses.replace(
        VeRA.hf,
        peft_type="COPIED",
        tensors=(*VeRA.hf.tensors, Tensor("vera_order", "order")),
        shared=tuple(SharedTensor(t.key, t.leaf, t.axes, copied=True) for t in VeRA.hf.shared),
    )

    def init(self, key, site, w):
        return {**super().init(key, site, w), "order": jnp.arange(3, dtype="int32")}


def test_copies_of_shared_tensors_are_ignored(params, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "Copied", Copied)
    peft = Copied(rank=2, targets=["up"]).bind(Layers(), params, X)
    adapter = changing(peft.init(jax.random.key(0), params))
    jpeft.hf.save(tmp_path, peft, adapter, params)
    edit(tmp_path, lambda t: t.update({"base_model.model.up.vera_A": t["base_model.vera_A"]}))
    same(jpeft.hf.load(tmp_path, Layers(), params, X)[1], adapter)
    original = load_file(tmp_path / "adapter_model.safetensors")
    for change, match in (
        (lambda t: t["base_model.model.up.vera_A"].fill(7), r"up\.vera_A' differs from 'base_model\.vera_A'"),
        (
            lambda t: t.update({"base_model.model.up.vera_order": np.full(3, 0.5, "f")}),
            r"up\.vera_order' is float32, expected integers",
        ),
        (lambda t: t.pop("base_model.vera_A"), "lacks 'base_model.vera_A', which Copied needs"),
    ):
        save_file(original, tmp_path / "adapter_model.safetensors")
        edit(tmp_path, change)
        with pytest.raises(AdapterError, match=match):
            jpeft.hf.load(tmp_path, Layers(), params, X)


REFUSED = {
    "vera_dropout=0.5 is not supported": {"vera_dropout": 0.5},
    "d_initial must be a finite number, got null": {"d_initial": None},
    "bias must be one of none, all, vera_only, got 'lora_only'": {"bias": "lora_only"},
    "unknown field 'lora_alpha'": {"lora_alpha": 1},
    "peft_type is 'NEW'; jpeft reads .*'LORA'.*'VERA'": {"peft_type": "NEW"},
    "ensure_weight_tying=True is not supported": {"ensure_weight_tying": True},
    r"vera_A' has shape \[2, 4\], expected \[3, 4\]": {"r": 3},
    "has no VeRA for 'down', which target_modules names": {"target_modules": ["up", "down"]},
}


@pytest.mark.parametrize("match", REFUSED)
def test_field_that_is_refused_is_named(match, params, tmp_path):
    jpeft.hf.save(tmp_path, *made(VeRA(rank=2, targets=["up"]), params), params)
    if "vera_A" in match:
        edit(tmp_path, lambda t: t.update({"base_model.model.up.vera_lambda_d": np.ones(3, "f")}))
    edit(tmp_path, **REFUSED[match])
    with pytest.raises(AdapterError, match=match):
        jpeft.hf.load(tmp_path, Layers(), params, X)


def test_engine_imports_no_method():
    """Adding a method touches no file of `jpeft.hf`."""
    allowed = {"jpeft.methods", "jpeft.methods.base", "jpeft.methods.chain"}
    for file in Path(jpeft.hf.__file__).parent.glob("*.py"):
        imports = (n.module for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom))
        found = {name for name in imports if name and name.startswith("jpeft.methods")}
        # What several methods share, such as the keys and values of prefixes, is none of them.
        assert {name for name in found if not name.startswith("jpeft.methods.families.")} <= allowed, file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subclass(jpeft.LoRA):
    """A method that declares nothing, and may compute something else than its base class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoBias(VeRA):
    hf = HFSpec("NO_BIAS", VeRA.hf.tensors, VeRA.hf.fields, shared=VeRA.hf.shared)


NOT_HELD = {
    "Subclass has no form": Subclass(rank=2, targets=["up"]),
    "one method, this chain has VeRA and LoRA": jpeft.Chain(
        VeRA(rank=2, targets=["up"]), jpeft.LoRA(rank=2, targets=["down"])
    ),
    r"one base_model\.vera_A, this chain has 2": jpeft.Chain(
        VeRA(rank=2, targets=["up"]), VeRA(rank=2, targets=["down"])
    ),
    "trains no biases beside NO_BIAS": jpeft.Chain(NoBias(rank=2, targets=["up"]), jpeft.BitFit()),
    "'up' has no counterpart.*split into parts": VeRA(rank=2, targets=["up"], parts=2),
}


@pytest.mark.parametrize("match", NOT_HELD)
def test_method_that_peft_cannot_hold(match, params, tmp_path):
    with pytest.raises(ValueError, match=match):
        jpeft.hf.save(tmp_path / "hf", *made(NOT_HELD[match], params), params)
    assert not list(tmp_path.iterdir())


def test_kind_of_module_that_a_method_does_not_adapt(tmp_path):
    class Word(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(5, 4, name="words")(ids)

    ids = jnp.ones((1, 2), int)
    tree = jax.eval_shape(Word().init, jax.random.key(0), ids)["params"]
    peft = VeRA(rank=2, targets=["words"]).bind(Word(), tree, ids)
    with pytest.raises(ValueError, match=r"'words' has no counterpart.*VERA acts on: embedding"):
        jpeft.hf.save(tmp_path / "hf", peft, filled(peft.init(jax.random.key(0), tree), 1), tree)
