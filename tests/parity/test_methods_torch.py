"""Every method against HuggingFace PEFT in torch, both ways, on a BERT and on a Llama with stacked layers.

The cases are in `tests.parity.cases`.
"""

import copy
import functools
import json
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors import safe_open

import jpeft
from jpeft.core.interchange import HFSpec, form
from jpeft.linen.frontend import LinenFrontEnd
from jpeft.methods import METHODS
from tests.parity.cases import TARGETS, collect

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own
TOLERANCE = 1e-4
IDS = np.random.default_rng(0).integers(3, 61, (2, 9))
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 32, "initializer_range": 0.2}  # fmt: skip


@dataclass
class Base:
    """A torch model, and its twin here."""

    torch: Any
    model: Any
    params: Any
    run: Any  # of parameters, jitted

    def fresh(self) -> Any:
        return copy.deepcopy(self.torch)


def _bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Bases by name, each made once, and surveyed once for all folders that are read onto it."""
    made, surveys, survey = {}, {}, LinenFrontEnd.survey

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            model, folder = {"bert": _bert, "llama": _llama}[name]().eval(), tmp_path_factory.mktemp(name)
            with torch.no_grad():
                for p in model.parameters():  # fresh biases are zero and norms one
                    p.add_(0.1 * torch.randn_like(p))
            model.save_pretrained(folder)
            linen, params = jpeft.models.load(folder, **({"scan_layers": True} if name == "llama" else {}))
            run = jax.jit(lambda params: linen.apply({"params": params}, jnp.asarray(IDS)))
            made[name] = Base(model, linen, params, run)
        return made[name]

    def surveyed(self, model, *rest):
        if model not in surveys:
            surveys[model] = survey(self, model, *rest)
        return surveys[model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinenFrontEnd, "survey", surveyed)
        yield get


@pytest.fixture
def loaded(monkeypatch):
    """What PEFT's `load_adapter` tells about keys, of which it only warns."""
    results, load = [], PeftModel.load_adapter

    @functools.wraps(load)
    def kept(self, *args, **kwargs):
        results.append(load(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(PeftModel, "load_adapter", kept)
    return results


def torch_output(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS))[0].numpy()


def made_in_torch(case, name, base, folder):
    """The outputs of an adapter that is made and moved from its start in PEFT, and saved."""
    torch.manual_seed(1)
    adapted = get_peft_model(base.fresh(), case.config(case.targets.get(name, TARGETS[name])))
    with torch.no_grad():
        # Tied parameters share their storage, which must not be moved twice.
        for p in {p.data_ptr(): p for p in adapted.parameters() if p.requires_grad}.values():
            p.add_(case.scale * torch.randn_like(p))
    want = torch_output(adapted)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return want


def tensor_names(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return set(file.keys())


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def close(got, want, what):
    print(f"{what}: max difference {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
    np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=what)


COLLECTED = [pytest.param(base, case, id=f"{name} {base}") for name, base, case in collect()]


@pytest.mark.parametrize("name, case", COLLECTED)
def test_folder_from_torch_and_back(name, case, base, loaded, tmp_path):
    base, ours, theirs = base(name), tmp_path / "back", tmp_path / "torch"
    want = made_in_torch(case, name, base, theirs)
    assert np.abs(want - torch_output(base.torch)).max() > 1e-2

    peft, adapter = jpeft.hf.load(theirs, base.model, base.params, jnp.asarray(IDS))
    member = peft.method.methods()[0]
    assert type(member) is METHODS[case.method]
    # In one program: a method's operations would be compiled one by one.
    applied, merged = jax.jit(
        lambda params, own: (
            peft.apply(params, own, jnp.asarray(IDS)),
            peft.merge(params, own) if case.merges else params,
        )
    )(base.params, adapter)
    close(np.asarray(applied), want, "read from torch")
    if case.merges:
        close(np.asarray(base.run(merged)), want, "merged")

    jpeft.hf.save(ours, peft, adapter, base.params)
    assert tensor_names(ours) == {k for k in tensor_names(theirs) if not k.endswith(case.extra_keys or "\0")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = PeftModel.from_pretrained(base.fresh(), ours)
    told = [str(w.message) for w in caught]
    assert not [text for text in told if "missing" in text.lower() or "unexpected" in text.lower()]
    missing = [k for k in loaded[0].missing_keys if not k.endswith(case.missing_keys or "\0")]
    assert (len(loaded), missing, loaded[0].unexpected_keys) == (1, [], [])
    close(torch_output(back), want, "written to torch")

    spec, here, there = form(type(member)), read_config(ours), read_config(theirs)
    assert isinstance(spec, HFSpec)
    own = {f.key for f in spec.fields if not f.chooses and not (f.pattern and there.get(f.pattern))}
    if any(key.endswith(".bias") for key in tensor_names(theirs)):  # without biases, none of them trains
        own |= {"bias"}
    for key in (own | {"peft_type"}) & here.keys() & there.keys() - set(case.differ):
        assert here[key] == there[key], key
    again, read = jpeft.hf.load(ours, base.model, base.params, jnp.asarray(IDS))
    assert again.method == peft.method
    jax.tree.map(np.testing.assert_array_equal, read, adapter)
