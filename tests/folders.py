"""Small HuggingFace folders that more than one test file works in: models, a tokenizer of bytes, a chat template."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from jpeft import models
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig

VOCABULARY = 260  # bytes, `</s>`, and some ids that stand for nothing
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer():
    """An id for each byte; 256 is `</s>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def write_tokenizer(folder, template=TEMPLATE):
    """Beside a model that is there already."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))


def new_params(model, shape):
    """Initial weights on the host: eager operations on them, such as slices of layers, need no compiler."""
    ids = jnp.ones(shape, jnp.int32)
    return jax.device_get(nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids)["params"]))


def write_llama(folder, hidden_size, intermediate_size, scale=1):
    """Two layers, weights as they are initialized times `scale`; returns the model and them."""
    config = DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=256,
    )  # fmt: skip
    model = Decoder(config)
    params = jax.tree.map(lambda x: x * np.float32(scale), new_params(model, (1, 4)))
    models.save(folder, model, params)
    write_tokenizer(folder)
    return model, params


def write_bert(folder):
    """One layer, with the tokenizer alone: what is no language model."""
    model = Bert(BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=32, max_position_embeddings=40))  # fmt: skip
    models.save(folder, model, new_params(model, (1, 4)))
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def work_in(folder, home, monkeypatch):
    """Makes a folder, with links to everything in `home`, the working directory; nothing compiled is kept on disk."""
    link(home, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("jpeft.serving.text_generator.keep_compiled", lambda: None)


def link(home, folder):
    """Makes everything in `home` seen in a folder of the test's own."""
    for path in home.iterdir():
        (folder / path.name).symlink_to(path)
