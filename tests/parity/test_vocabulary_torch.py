"""Resized and untied folders against transformers' torch models, which load them with the same outputs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jpeft import models
from tests.parity.test_decoder_torch import TINY

ROWS, NEW = 97, 101
IDS = np.array([[5, 98, 3, 100, 96, 7]])


@pytest.fixture
def folder(tmp_path, request):
    """A tiny model as transformers saves it, in whole with its heads."""
    torch.manual_seed(0)
    if request.param == "bert":
        config = transformers.BertConfig(
            vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        model = transformers.BertForMaskedLM(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(TINY[request.param], attn_implementation="eager")
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def torch_logits(folder, ids, kind=transformers.AutoModelForCausalLM):
    model, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model, model.eval()(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("folder", ["llama3", "qwen2", "gemma2"], indirect=True)
def test_a_resized_decoder_is_the_same_in_transformers(folder, tmp_path):
    model, params = models.resize_embeddings(*models.load(folder), NEW)
    models.save(tmp_path / "out", model, params, source=folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == NEW
    theirs, logits = torch_logits(tmp_path / "out", IDS)
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.get_output_embeddings().weight.shape[0] == NEW
    np.testing.assert_allclose(model.apply({"params": params}, jnp.asarray(IDS)), logits, atol=2e-4)
    again, _ = models.load(tmp_path / "out")
    assert again.config == model.config


@pytest.mark.parametrize("folder", ["llama3", "qwen3", "gemma2"], indirect=True)
def test_an_untied_head_is_the_same_in_transformers(folder, tmp_path):
    model, params = models.untie_head(*models.load(folder))
    models.save(tmp_path / "same", model, params, source=folder)
    apart = {**params, "lm_head": {"kernel": params["lm_head"]["kernel"] * 1.5}}
    models.save(tmp_path / "apart", model, apart, source=folder)
    ids = IDS % ROWS
    _, before = torch_logits(folder, ids)
    _, same = torch_logits(tmp_path / "same", ids)
    theirs, different = torch_logits(tmp_path / "apart", ids)
    assert theirs.config.tie_word_embeddings is False
    np.testing.assert_allclose(same, before, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": apart}, jnp.asarray(ids)), different, atol=2e-4)
    assert np.abs(different - before).max() > 0.1


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_the_head_beside_an_encoder_grows_with_it(folder, tmp_path):
    model, params = models.resize_embeddings(*models.load(folder), NEW)
    models.save(tmp_path / "out", model, params, source=folder)
    theirs, logits = torch_logits(tmp_path / "out", IDS, transformers.AutoModelForMaskedLM)
    _, before = torch_logits(folder, IDS % ROWS, transformers.AutoModelForMaskedLM)
    assert logits.shape[-1] == NEW
    with torch.no_grad():
        states = theirs.bert(torch.tensor(IDS)).last_hidden_state.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, jnp.asarray(IDS)), states, atol=2e-5)
    assert np.isfinite(logits).all() and before.shape[-1] == ROWS
