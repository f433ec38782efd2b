"""SmolLM2 from its GGUF file against transformers: tensors, logits on real text, and greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jpeft
from jpeft import models
from jpeft.models.gguf import open_tensors, read_config
from jpeft.text import chat_template

TEXT = (
    "Adapters are small. A language model has some hundred million weights or some hundred billion, and what a new "
    "task asks of them is little: in 2021, Hu et al. wrote the change of each matrix as the product of two thin ones, "
    "W' = W + (alpha / r) * A @ B, and trained these alone.\n\ndef f(x):\n    return x ** 2 + 1\n\n"
    "« Où est la gare ? » 日本 🙂"
)
PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|im_start|>user\nWrite a haiku about tea.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nWhat is 12 times 12?<|im_end|>\n"
    "<|im_start|>assistant\n",
]
NEW = 32


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    path = smollm2_file
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return models.load(path, scan_layers=False), chat_template.read(path), torch_model.eval()


def test_tensors_of_the_file_equal_those_of_transformers(smollm2, smollm2_file):
    _, _, torch_model = smollm2
    theirs = torch_model.state_dict()
    assert theirs.pop("lm_head.weight").data_ptr() == theirs["model.embed_tokens.weight"].data_ptr()  # tied
    with open_tensors(smollm2_file) as ours:
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].shape == tuple(tensor.shape)
            np.testing.assert_array_equal(ours[name].read(), tensor.numpy())
    config = read_config(smollm2_file)
    assert np.float32(config.pop("rms_norm_eps")) == np.float32(torch_model.config.rms_norm_eps)
    assert config == {key: getattr(torch_model.config, key) for key in config}


def test_logits_on_real_text(smollm2):
    (model, params), tokenizer, torch_model = smollm2
    ids = np.array([tokenizer.encode(TEXT)])
    with torch.no_grad():
        want = torch_model(torch.tensor(ids)).logits.numpy()
    got = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(ids)))
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-4)
    assert np.abs(got - want).mean() < 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_greedy_generation_token_for_token(smollm2):
    """One prompt at a time, as a ragged batch, and without a cache, where each token has the highest logit."""
    (model, params), tokenizer, torch_model = smollm2
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    want = []
    for ids in prompts:
        tensor = torch.tensor([ids])
        with torch.no_grad():
            out = torch_model.generate(
                tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=NEW, do_sample=False, pad_token_id=2
            )
        want.append(out[0, len(ids) :].tolist())
    settings = {"max_new_tokens": NEW, "stop_ids": tokenizer.stop_ids}
    batch = jpeft.generate(model, params, prompts, **settings)
    alone = [jpeft.generate(model, params, [ids], **settings, min_prompt_length=64)[0] for ids in prompts[:2]]
    assert any(len(new) < NEW for new in want)  # one ends by itself
    assert batch == want
    assert alone == want[:2]
    whole = np.zeros((len(prompts), max(map(len, prompts)) + NEW), np.int32)  # causal: later tokens have no effect
    for row, ids, new in zip(whole, prompts, want, strict=True):
        row[: len(ids) + len(new)] = ids + new
    highest = jax.jit(lambda params, ids: model.apply({"params": params}, ids).argmax(-1))(params, whole)
    for row, ids, new in zip(np.asarray(highest), prompts, want, strict=True):
        assert row[len(ids) - 1 :][: len(new)].tolist() == new


def test_export_to_transformers(smollm2, smollm2_file, tmp_path):
    """The folder saved from the GGUF file has the weights that transformers reads from that file."""
    (model, params), tokenizer, torch_model = smollm2
    models.save(tmp_path / "hf", model, params, source=smollm2_file)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT) == chat_template.read(tmp_path / "hf").encode(TEXT)
    turn = [{"role": "user", "content": "Who are you?"}]
    rendered = theirs.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert rendered == tokenizer.encode_chat(turn) == chat_template.read(tmp_path / "hf").encode_chat(turn)
    assert chat_template.read(tmp_path / "hf").stop_ids == tokenizer.stop_ids
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in torch_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for field in ("rope_theta", "max_position_embeddings", "eos_token_id", "bos_token_id", "rms_norm_eps"):
        assert np.float32(getattr(again.config, field)) == np.float32(getattr(torch_model.config, field)), field
