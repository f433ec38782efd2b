"""Model folders in the forms that people have, against transformers: the same outputs, or one clear error.

Folders of AutoModel have no prefix and no head, old ones hold buffers, and classifiers bring a pooler and a head.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jpeft import models
from tests.zoo import same

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
TOLERANCE = 2e-5

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "initializer_range": 0.2}  # fmt: skip
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
DECODERS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-linear": transformers.LlamaConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama3": transformers.LlamaConfig(**SIZES, rope_theta=5e5, rope_scaling=LLAMA3),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=6),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": transformers.Gemma2Config(**GEMMA),
    "gemma3_text": transformers.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2),
}  # fmt: skip
BERT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 20, "initializer_range": 0.3}  # fmt: skip
DISTIL = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 20}
ENCODERS = {
    "bert": transformers.BertConfig(**BERT, num_labels=3),
    "roberta": transformers.RobertaConfig(**BERT, type_vocab_size=1, num_labels=3),
    "xlm-roberta": transformers.XLMRobertaConfig(**BERT, num_labels=2),
    "camembert": transformers.CamembertConfig(**BERT, num_labels=1),
    "electra": transformers.ElectraConfig(**BERT, embedding_size=16, num_labels=4),
    "distilbert": transformers.DistilBertConfig(**DISTIL, num_labels=3),
}
POOLED = ("bert", "roberta", "xlm-roberta", "camembert")
IDS = np.random.default_rng(0).integers(5, 61, (2, 9))
MASK = (np.arange(9)[None] < np.array([[9], [6]])).astype(np.int64)


def made(kind, config, folder):
    """A torch model with random parameters, saved to a folder."""
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh biases are zero and norms one
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def rewrite(folder, change, **fields):
    """Changes the tensors of a folder, and fields of its config."""
    tensors, config = load_file(folder / "model.safetensors"), folder / "config.json"
    changed = {key: np.asarray(value) for key, value in change(dict(tensors)).items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def in_torch(model, name="logits"):
    with torch.no_grad():
        return getattr(model.eval()(torch.tensor(IDS), attention_mask=torch.tensor(MASK)), name).numpy()


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params):
    """One program for all folders of a model."""
    return model.apply({"params": params}, jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))


def here(folder, **options):
    return np.asarray(apply(*models.load(folder, **options)))


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(got, want):
    real = MASK.astype(bool) if got.ndim == 3 else slice(None)
    np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE)


# --- decoders ---


def inv_freqs(model):
    """The rotary buffers of a torch model by name."""
    return {name: value.numpy() for name, value in model.named_buffers() if "original" not in name}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_folders_with_buffers_and_without_a_prefix(name, tmp_path):
    config = DECODERS[name]
    config.tie_word_embeddings = True
    model = made(transformers.AutoModelForCausalLM, config, tmp_path)
    want = in_torch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))
    close(here(tmp_path), want)
    shared = inv_freqs(model)
    assert any(key.endswith("inv_freq") for key in shared)
    main = shared["model.rotary_emb.inv_freq"]
    layers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": main for i in range(config.num_hidden_layers)}
    half = {key: torch.tensor(value).half().numpy() for key, value in shared.items()}
    for buffers in (shared, layers, half):
        rewrite(tmp_path, lambda t, b=buffers: {k: v for k, v in t.items() if "inv_freq" not in k} | b)
        close(here(tmp_path), want)

    rewrite(tmp_path, lambda t: {key.removeprefix("model."): value for key, value in t.items()})
    if name != "gemma3_text":  # transformers 4.57 expects another prefix there, and loads nothing
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        np.testing.assert_array_equal(in_torch(again), want)
    close(here(tmp_path), want)
    linen, params = models.load(tmp_path)
    models.save(tmp_path / "saved", linen, params, source=tmp_path)  # keeps the names
    assert "embed_tokens.weight" in load_file(tmp_path / "saved" / "model.safetensors")
    same(models.load(tmp_path / "saved")[1], params)

    rewrite(tmp_path, lambda t: t | {key.removeprefix("model."): value * 1.5 for key, value in shared.items()})
    with pytest.raises(models.ModelError, match=r"the buffer .* has .* but config.json gives .*: correct the config"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_folders_of_automodel_need_a_tied_head(name, tmp_path):
    config = DECODERS[name]
    config.tie_word_embeddings = False
    made(transformers.AutoModel, config, tmp_path)
    with pytest.raises(models.ModelError, match=r"no lm_head\.weight to compute logits with.* has no head; save"):
        models.load(tmp_path)
    rewrite(tmp_path, dict, tie_word_embeddings=True)
    want = in_torch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))
    close(here(tmp_path), want)


# --- encoders ---


@pytest.mark.parametrize("name", ENCODERS)
def test_classifiers_bring_their_head(name, tmp_path):
    """States and logits are those of torch; what jpeft saves, transformers loads with difference 0."""
    folder = tmp_path / "torch"
    torch_model = made(transformers.AutoModelForSequenceClassification, ENCODERS[name], folder)
    want = in_torch(torch_model)
    close(here(folder, output="logits"), want)
    close(here(folder), in_torch(torch_model.base_model, "last_hidden_state"))

    linen, params = models.load(folder)
    assert linen.num_labels == ENCODERS[name].num_labels and linen.pooler is (name == "bert")
    assert models.abstract(folder)[0] == linen == models.abstract(folder / "config.json")[0]
    for source in (None, folder):
        out = tmp_path / f"out {source is None}"
        models.save(out, linen, params, source=source)
        again, info = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert_same_state(again, torch_model)
        same(models.load(out)[1], params)
    encoder, own = models.load(folder, head=False, pooler=False)
    assert encoder.num_labels == 0 and own.keys() == params.keys() - {"pooler", "classifier", "pre_classifier"}
    models.save(tmp_path / "kept", encoder, own, source=folder)  # the head stays in the file
    same(models.load(tmp_path / "kept")[1], params)


@pytest.mark.parametrize("name", POOLED)
def test_poolers(name, tmp_path):
    folder = tmp_path / "torch"
    torch_model = made(transformers.AutoModel, ENCODERS[name], folder)
    want = in_torch(torch_model, "pooler_output")
    close(here(folder, output="pooler_output"), want)
    close(here(folder), in_torch(torch_model, "last_hidden_state"))
    linen, params = models.load(folder)
    for source in (None, folder):
        out = tmp_path / f"out {source is None}"
        models.save(out, linen, params, source=source)
        again, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same_state(again, torch_model)
