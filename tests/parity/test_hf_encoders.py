"""HuggingFace PEFT in torch as the oracle of `jpeft.hf` on encoders with a pooler and a head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import jpeft
from tests.parity.test_model_folders_torch import ENCODERS, IDS, MASK, in_torch, made

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own
INPUTS = (jnp.asarray(IDS), jnp.asarray(MASK))
CLASSIFIER, ENCODER = transformers.AutoModelForSequenceClassification, transformers.AutoModel
POOLER = {"target_modules": ["query", "pooler.dense"], "bias": "all"}
CASES = {
    "pooler": ("bert", ENCODER, POOLER, "pooler_output"),
    "all-linear": ("bert", ENCODER, {"target_modules": "all-linear", "r": 4}, "pooler_output"),
    "saved": ("roberta", ENCODER, {"target_modules": ["key"], "modules_to_save": ["pooler"]}, "pooler_output"),
    "classifier": ("bert", CLASSIFIER, {**POOLER, "task_type": "SEQ_CLS"}, "logits"),
    "all of a classifier": ("roberta", CLASSIFIER, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, "logits"),
    "distilbert": ("distilbert", CLASSIFIER, {"target_modules": ["q_lin", "lin2"], "bias": "all",
                                              "task_type": "SEQ_CLS"}, "logits"),
    "electra": ("electra", CLASSIFIER, {"target_modules": ["value", "dense"], "bias": "lora_only",
                                        "task_type": "SEQ_CLS"}, "logits"),
}  # fmt: skip


def adapted(torch_model, folder, config):
    """A LoRA that is made and perturbed in PEFT, and saved."""
    torch.manual_seed(1)
    model = get_peft_model(torch_model, LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def run(model, params):
    return np.asarray(jax.jit(model.apply)({"params": params}, *INPUTS))


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_poolers_and_heads(case, tmp_path):
    """Through `jpeft.hf` and back, bound to the call for states and to that for the pooled output or logits."""
    name, kind, config, output = CASES[case]
    made(kind, ENCODERS[name], tmp_path / "model")
    want = in_torch(adapted(kind.from_pretrained(tmp_path / "model"), tmp_path / "torch", config), output)
    model, params = jpeft.models.load(tmp_path / "model")
    whole = model.clone(output=output)
    peft, adapter = jpeft.hf.load(tmp_path / "torch", whole, params, *INPUTS)
    got = np.asarray(peft.apply(params, adapter, *INPUTS))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(run(whole, params) - want).max() > 1e-2

    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, *INPUTS)
    assert peft.apply(params, adapter, *INPUTS).shape == (2, 9, 32)
    np.testing.assert_allclose(run(whole, peft.merge(params, adapter)), want, atol=1e-4)
    jpeft.hf.save(tmp_path / "back", peft, adapter, params, task_type=config.get("task_type"))
    back = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "model"), tmp_path / "back")
    np.testing.assert_allclose(in_torch(back, output), want, atol=1e-4)


@pytest.mark.parametrize("config", [{"target_modules": "all-linear"}, {"target_modules": ["query"], "bias": "all"}])
def test_adapters_of_models_without_the_parts(config, tmp_path):
    """An adapter of a model without pooler and head leaves those of ours as they are."""
    made(CLASSIFIER, ENCODERS["bert"], tmp_path / "model")
    bare = transformers.BertModel.from_pretrained(tmp_path / "model", add_pooling_layer=False)
    want = in_torch(adapted(bare, tmp_path / "torch", config), "last_hidden_state")
    model, params = jpeft.models.load(tmp_path / "model")
    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, *INPUTS)
    got = np.asarray(peft.apply(params, adapter, *INPUTS))
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    assert not {"pooler", "classifier"} & adapter.keys()
