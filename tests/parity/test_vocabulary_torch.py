"""Resized and untied folders against transformers' torch models, which load them with the same outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import jpeft
from jpeft import models
from tests.parity.test_decoder_torch import TINY

EXHAUSTIVE = pytest.mark.exhaustive
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


@pytest.mark.parametrize(
    "folder",
    ["llama3", pytest.param("qwen2", marks=EXHAUSTIVE), pytest.param("gemma2", marks=EXHAUSTIVE)],
    indirect=True,
)
def test_a_resized_decoder_is_the_same_in_transformers(folder, tmp_path):
    model, params = models.resize_embeddings(*models.load(folder), NEW)
    models.save(tmp_path / "out", model, params, source=folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == NEW
    theirs, logits = torch_logits(tmp_path / "out", IDS)
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.get_output_embeddings().weight.shape[0] == NEW
    np.testing.assert_allclose(model.apply({"params": params}, jnp.asarray(IDS)), logits, atol=2e-4)
    again, _ = models.load(tmp_path / "out")
    assert again.config == model.config


@pytest.mark.parametrize("folder", ["gemma2", pytest.param("qwen3", marks=EXHAUSTIVE)], indirect=True)
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


# --- trainable tokens in HuggingFace PEFT's folders ---------------------------------------------------------------

TOKENS = [18, 5, 90]  # not in order: a file's rows are in that of the indices
TIED, UNTIED = "llama3", "qwen2"
BOTH = {"embed_tokens": TOKENS, "lm_head": [5, 7]}
CONFIGS = [
    (TIED, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    pytest.param(
        TIED,
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=dict.fromkeys(BOTH, TOKENS)),
        marks=EXHAUSTIVE,
    ),
    (TIED, peft.TrainableTokensConfig(token_indices=TOKENS)),
    (UNTIED, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BOTH)),
    pytest.param(
        UNTIED,
        peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens", "lm_head"]),
        marks=EXHAUSTIVE,
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("folder", "config"), CONFIGS, indirect=["folder"])
def test_trained_tokens_are_the_same_in_peft_both_ways(folder, config, tmp_path):
    ids = np.array([[5, 18, 90, 3, 7]])
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "trainable_tokens_delta" in name or "lora_" in name:
                p.add_(0.3 * torch.randn_like(p))
        want = theirs(torch.tensor(ids)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")

    model, params = models.load(folder)
    bound, adapter = jpeft.hf.load(tmp_path / "theirs", model, params, jnp.asarray(ids))
    np.testing.assert_allclose(bound.apply(params, adapter, jnp.asarray(ids)), want, atol=2e-4)
    merged = bound.merge(params, adapter)
    np.testing.assert_allclose(model.apply({"params": merged}, jnp.asarray(ids)), want, atol=2e-4)

    jpeft.hf.save(tmp_path / "ours", bound, adapter, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(ids)).logits.numpy(), want, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", [TIED], indirect=True)
def test_an_adapter_of_a_resized_model_loads_in_peft_on_a_resized_model(folder, tmp_path):
    model, params = models.resize_embeddings(*models.load(folder), NEW)
    method = jpeft.Chain(
        jpeft.LoRA(rank=2, targets=["q_proj"]), jpeft.methods.TrainableTokens(indices=range(ROWS, NEW))
    )
    bound = method.bind(model, params, jnp.asarray(IDS))
    adapter = bound.init(jax.random.key(0), params)
    adapter = jax.tree.map(lambda x: x + 0.2 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapter)
    jpeft.hf.save(tmp_path / "adapter", bound, adapter, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(NEW)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(bound.apply(params, adapter, jnp.asarray(IDS)), logits, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", [UNTIED], indirect=True)
def test_what_a_folder_does_not_hold_of_its_tokens_is_named(folder, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BOTH)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    fields, loaded = json.loads(file.read_text()), models.load(folder)
    for indices, error in (
        ({"embed_tokens": TOKENS}, "'lm_head', which trainable_token_indices does not name"),
        ({**BOTH, "wte": TOKENS}, "no TrainableTokens for 'wte'"),
        ({**BOTH, "lm_head": [5]}, r"shape \[2, 32\], expected \[1, 32\]"),
        ({**BOTH, "lm_head": [5, 97]}, "has 97 tokens, but indices has 97"),
        ("all", "trainable_token_indices must be different token ids"),
        ([], "has tensors for 'lm_head.token_adapter', which this model lacks"),
    ):
        file.write_text(json.dumps({**fields, "trainable_token_indices": indices}))
        with pytest.raises(ValueError, match=error):
            jpeft.hf.load(tmp_path / "theirs", *loaded, jnp.asarray(IDS % ROWS))
