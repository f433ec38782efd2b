"""jpeft's decoder against transformers' torch models: the same logits from the same folder, loaded and saved."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from jpeft import models

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}

Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 = (
    getattr(transformers, f"{name}Config") for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text")
)
TINY = {
    "llama2": Llama(**{**SIZES, "num_key_value_heads": 4}),
    "llama3": Llama(**SIZES, rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True, head_dim=12),
    "llama-linear": Llama(**SIZES, rope_scaling={"type": "linear", "factor": 2.5}),
    "llama-dynamic": Llama(**{**SIZES, "max_position_embeddings": 8}, rope_scaling={"type": "dynamic", "factor": 3.0}),
    "llama-yarn": Llama(**SIZES, rope_scaling=YARN),
    "llama-yarn-mscale": Llama(**SIZES, rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 3.0,
                                                      "beta_slow": 0.5, "truncate": False}),
    "llama-yarn-factor": Llama(**SIZES, rope_scaling={**YARN, "attention_factor": 1.3}),
    "llama-biases": Llama(**SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu", rms_norm_eps=1e-2),
    "smollm2": Llama(**SIZES, tie_word_embeddings=True, rope_theta=1e5),
    "mistral": Mistral(**SIZES, sliding_window=4),
    "mistral-no-window": Mistral(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": Qwen2(**SIZES),
    "qwen2-window": Qwen2(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-biases": Qwen3(**SIZES, head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=3,
                          layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "gemma2": Gemma2(**GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
    "gemma2-no-caps": Gemma2(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": Gemma3(**{**GEMMA, "num_hidden_layers": 7}),
    "gemma3-linear": Gemma3(**GEMMA, rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=2,
                            rope_local_base_freq=500.0, attention_bias=True),
}  # fmt: skip


def batch(padding, shape=(3, 11), lengths=(11, 6, 2), seed=0):
    """Ids padded on one side, and their mask."""
    mask = (np.arange(shape[1])[None] < np.array(lengths)[:, None]).astype(np.int64)
    mask = mask[:, ::-1].copy() if padding == "left" else mask
    ids = np.random.default_rng(seed).integers(3, 97, shape)
    return np.where(mask == 1, ids, 0), mask


def tiny(name, folder):
    torch.manual_seed(0)
    # "eager", because sdpa omits gemma 2's soft-cap
    model = transformers.AutoModelForCausalLM.from_config(TINY[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial norms of 1 and biases of 0 would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def torch_logits(model, ids, mask):
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, ids, mask=None):
    """One program for all folders of a model."""
    return model.apply({"params": params}, ids, attention_mask=mask)


def jax_logits(folder, ids, mask, **options):
    return np.asarray(apply(*models.load(folder, **options), ids, mask))


@pytest.mark.parametrize("name", TINY)
def test_logits(tmp_path, name):
    torch_model = tiny(name, tmp_path)
    for scan_layers in (True, False):
        model, params = models.load(tmp_path, scan_layers=scan_layers)
        for padding in ("right", "left"):
            ids, mask = batch(padding)
            got, want = np.asarray(apply(model, params, ids, mask)), torch_logits(torch_model, ids, mask)
            np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=1e-4, err_msg=f"{padding} {scan_layers}")
    ids = ids[:1]
    model, params = models.load(tmp_path)
    want = torch_logits(torch_model, ids, np.ones_like(ids))
    np.testing.assert_allclose(apply(model, params, ids), want, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_export(tmp_path, name):
    """transformers loads all that jpeft saves, with and without a source, and computes the same logits."""
    tiny(name, tmp_path / name)
    model, params = models.load(tmp_path / name)
    params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    ids, mask = batch("left")
    for folder, source in ((tmp_path / "alone", None), (tmp_path / "sourced", tmp_path / name)):
        models.save(folder, model, params, source=source)
        assert models.load(folder)[0] == model
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        want = torch_logits(again.eval(), ids, mask)
        np.testing.assert_allclose(jax_logits(folder, ids, mask)[mask == 1], want[mask == 1], atol=1e-4)
