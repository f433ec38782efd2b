"""jpeft's BERT against transformers' torch models: the same states from the same folder, loaded and saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jpeft import models

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 20, "initializer_range": 0.3}  # fmt: skip
DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 20,
          "initializer_range": 0.3}  # fmt: skip
TINY = {
    "bert": transformers.BertConfig(**SIZES),
    "bert-gelu-new": transformers.BertConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-3),
    "bert-tanh-gelu": transformers.BertConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "bert-relu": transformers.BertConfig(**SIZES, hidden_act="relu"),
    "bert-silu": transformers.BertConfig(**SIZES, hidden_act="silu"),
    "roberta": transformers.RobertaConfig(**SIZES, type_vocab_size=1),
    "roberta-pad-5": transformers.RobertaConfig(**SIZES, pad_token_id=5),
    "xlm-roberta": transformers.XLMRobertaConfig(**SIZES),
    "camembert": transformers.CamembertConfig(**SIZES),
    "electra-generator": transformers.ElectraConfig(**SIZES, embedding_size=16),
    "electra-discriminator": transformers.ElectraConfig(**SIZES, embedding_size=32),
    "distilbert": transformers.DistilBertConfig(**DISTIL),
    "distilbert-sinusoidal": transformers.DistilBertConfig(**DISTIL, sinusoidal_pos_embds=True, activation="relu"),
}


def batch(vocabulary, pad, shape=(3, 9), lengths=(9, 4, 1), seed=0):
    """Ids padded on the right, and their mask."""
    mask = (np.arange(shape[1])[None] < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(seed).integers(6, vocabulary, shape)
    return np.where(mask == 1, ids, pad), mask


def torch_states(model, ids, mask, **kwargs):
    tensors = {name: torch.tensor(value) for name, value in kwargs.items()}
    with torch.no_grad():
        return model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask), **tensors).last_hidden_state.numpy()


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, ids, mask, extra):
    """One program for all folders of a model."""
    return model.apply({"params": params}, ids, attention_mask=mask, **extra)


def jax_states(folder, ids, mask, **kwargs):
    return apply(*models.load(folder), ids, mask, kwargs)


def tiny(name, folder):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(TINY[name])
    with torch.no_grad():
        for parameter in model.parameters():  # initial LayerNorms of 1 and biases of 0 would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", TINY)
def test_states_of_tiny_models(tmp_path, name):
    model = tiny(name, tmp_path / name)
    ids, mask = batch(60, TINY[name].pad_token_id)
    np.testing.assert_allclose(jax_states(tmp_path / name, ids, mask), torch_states(model, ids, mask), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "electra-generator"])
def test_token_types(tmp_path, name):
    model = tiny(name, tmp_path / name)
    ids, mask = batch(60, 0)
    types = np.random.default_rng(1).integers(0, 2, ids.shape)
    got = jax_states(tmp_path / name, ids, mask, token_type_ids=types)
    np.testing.assert_allclose(got, torch_states(model, ids, mask, token_type_ids=types), atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_export(tmp_path, name):
    """transformers loads all that jpeft saves, with and without a source, and computes the same states."""
    tiny(name, tmp_path / name)
    model, params = models.load(tmp_path / name)
    params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    ids, mask = batch(60, TINY[name].pad_token_id)
    for folder, source in ((tmp_path / "alone", None), (tmp_path / "sourced", tmp_path / name)):
        models.save(folder, model, params, source=source)
        again, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        np.testing.assert_allclose(jax_states(folder, ids, mask), torch_states(again, ids, mask), atol=1e-5)


def test_a_head_survives_the_round_trip(tmp_path):
    torch.manual_seed(0)
    classifier = transformers.RobertaForSequenceClassification(TINY["roberta"]).eval()
    classifier.save_pretrained(tmp_path / "a")
    model, params = models.load(tmp_path / "a")
    models.save(tmp_path / "b", model, params, source=tmp_path / "a")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    for key, value in classifier.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_minilm(minilm_folder, tmp_path):
    """Real weights, 64 tokens with padding: the states equal transformers', and saving gives the original file."""
    ids, mask = batch(30000, 0, shape=(4, 64), lengths=(64, 40, 12, 1))
    torch_model = transformers.AutoModel.from_pretrained(minilm_folder)
    want = torch_states(torch_model, ids, mask)
    got = jax_states(minilm_folder, ids, mask)
    np.testing.assert_allclose(got, want, atol=2e-5)

    model, params = models.load(minilm_folder)
    models.save(tmp_path / "again", model, params, source=minilm_folder)
    for name in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (minilm_folder / name).read_bytes()


def test_minilm_gradients(minilm_folder):
    """Gradients equal those of torch within float32."""
    ids, mask = batch(30000, 0, shape=(2, 16), lengths=(16, 7), seed=3)
    torch_model = transformers.AutoModel.from_pretrained(minilm_folder, add_pooling_layer=False).eval()
    states = torch_model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    (states.square() * torch.tensor(mask)[..., None]).mean().backward()

    model, params = models.load(minilm_folder)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = model.apply({"params": params}, jnp.asarray(ids), attention_mask=jnp.asarray(mask))
        return (jnp.square(out) * jnp.asarray(mask, out.dtype)[..., None]).mean()

    grads = gradient(params)["encoder"]["layer"]
    for i, layer in enumerate(torch_model.encoder.layer):
        ours = grads[str(i)]
        pairs = [
            (ours["attention"]["self"]["query"]["kernel"].T, layer.attention.self.query.weight),
            (ours["attention"]["self"]["value"]["bias"], layer.attention.self.value.bias),
            (ours["intermediate"]["dense"]["kernel"].T, layer.intermediate.dense.weight),
            (ours["output"]["LayerNorm"]["scale"], layer.output.LayerNorm.weight),
        ]
        for got, want in pairs:
            scale = float(want.grad.abs().max())
            np.testing.assert_allclose(np.asarray(got) / scale, want.grad.numpy() / scale, atol=2e-5)
