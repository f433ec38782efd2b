"""Prefix tuning is attention over more keys and values, as numpy computes it in float64."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.families.prefixes import prefixes
from jpeft.methods.prefix_start import compose, from_keys_values, from_text
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.kv_cache import init_cache
from tests.zoo import moved, parameters

LENGTH = 3


pytestmark = pytest.mark.usefixtures("quick_compiles")


def attention(query, key, value, prefix_key, prefix_value, mask):
    """softmax(Q [P_k; K]^T / sqrt(d)) [P_v; V] in float64; mask [batch, heads or 1, query, key], True where allowed."""
    query, key, value, prefix_key, prefix_value = (
        np.asarray(x, np.float64) for x in (query, key, value, prefix_key, prefix_value)
    )
    batch = key.shape[0]
    key = np.concatenate([np.broadcast_to(prefix_key, (batch, *prefix_key.shape)), key], axis=1)
    value = np.concatenate([np.broadcast_to(prefix_value, (batch, *prefix_value.shape)), value], axis=1)
    mask = np.concatenate([np.ones((*mask.shape[:-1], len(prefix_key)), bool), np.asarray(mask)], axis=-1)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def leaves(method, model, params, *inputs, **kwargs):
    peft = method.bind(model, params, *inputs, **kwargs)
    return peft, moved(peft, params, scale=1.0)


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("masked", ["none", "padding", "causal"])
def test_flax_attention_over_more_keys(masked):
    model, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), numbers(2, 5, 6)
    padding = jnp.arange(5)[None, None, None, :] < jnp.array([5, 3])[:, None, None, None]
    mask = {"none": None, "padding": padding, "causal": nn.make_causal_mask(x[..., 0])}[masked]
    params = parameters(model, x)
    peft, adapter = leaves(jpeft.PrefixTuning(length=LENGTH), model, params, x, mask=mask)

    def project(name):
        p = params[name]
        return np.einsum("btf,fhd->bthd", x, p["kernel"]) + p["bias"]

    allowed = np.ones((2, 1, 5, 5), bool) if mask is None else np.broadcast_to(np.asarray(mask, bool), (2, 1, 5, 5))
    context = attention(
        project("query"), project("key"), project("value"), adapter["prefix_key"], adapter["prefix_value"], allowed
    )
    expected = np.einsum("bthd,hdf->btf", context, params["out"]["kernel"]) + params["out"]["bias"]
    y = jax.jit(lambda params, adapter: peft.apply(params, adapter, x, mask=mask))(params, adapter)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_bert_over_more_keys_with_padding():
    model = Bert(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    )
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 5)))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    params = parameters(model, ids)
    peft, adapter = leaves(jpeft.PrefixTuning(length=LENGTH), model, params, ids, attention_mask=mask)

    @jax.jit
    def run(params, adapter):
        return peft.apply(
            params, adapter, ids, attention_mask=mask, capture_intermediates=True, mutable=["intermediates"]
        )

    _, state = run(params, adapter)
    seen = state["intermediates"]["encoder"]["layer"]["0"]["attention"]
    query, key, value = (
        np.asarray(seen["self"][n]["__call__"][0]).reshape(2, 5, 2, 4) for n in ("query", "key", "value")
    )
    own = adapter["encoder"]["layer"]["0"]["attention"]["self"]
    allowed = np.broadcast_to(np.asarray(mask, bool)[:, None, None, :], (2, 1, 5, 5))
    context = attention(query, key, value, own["prefix_key"], own["prefix_value"], allowed).reshape(2, 5, 8)
    dense = params["encoder"]["layer"]["0"]["attention"]["output"]["dense"]
    expected = context @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    np.testing.assert_allclose(np.reshape(seen["output"]["dense"]["__call__"][0], (2, 5, 8)), expected, atol=1e-5)


def test_a_reparametrized_prefix_is_the_network_of_the_paper_and_shares_all_but_its_last_layer():
    model, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), jnp.ones((1, 5, 6))
    params = parameters(model, x)
    method = jpeft.PrefixTuning(length=LENGTH, reparametrize=True, hidden=7, embedding=4)
    peft, adapter = leaves(method, model, params, x)
    shared = {k: np.asarray(v, np.float64) for k, v in adapter["prefix_tuning"].items()}
    hidden = np.tanh(shared["embedding"] @ shared["kernel"] + shared["bias"])
    both = hidden @ np.asarray(adapter["prefix_kernel"], np.float64)
    plain = {
        "prefix_key": both[:, :8].reshape(LENGTH, 2, 4) + adapter["prefix_key_bias"],
        "prefix_value": both[:, 8:].reshape(LENGTH, 2, 4) + adapter["prefix_value_bias"],
    }
    direct = jpeft.PrefixTuning(length=LENGTH).bind(model, params, x)
    plain = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), plain)

    @jax.jit
    def run(params, adapter, plain):
        return peft.apply(params, adapter, x), direct.apply(params, plain, x)

    np.testing.assert_allclose(*run(params, adapter, plain), atol=1e-5)


def test_a_bottleneck_is_pfeiffers_adapter_after_the_sublayer():
    model, x = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(2)]), numbers(3, 4)
    params = parameters(model, x)
    peft, adapter = leaves(jpeft.Bottleneck(targets="layers_0", size=2, scale=0.5), model, params, x)
    own = {k: np.asarray(v, np.float64) for k, v in adapter["layers_0"].items()}
    h = np.asarray(x) @ params["layers_0"]["kernel"] + params["layers_0"]["bias"]
    inner = np.maximum(h @ own["bottleneck_down"] + own["bottleneck_down_bias"], 0)
    h = h + 0.5 * (inner @ own["bottleneck_up"] + own["bottleneck_up_bias"])
    expected = np.maximum(h, 0) @ params["layers_2"]["kernel"] + params["layers_2"]["bias"]
    np.testing.assert_allclose(jax.jit(lambda p, a: peft.apply(p, a, x))(params, adapter), expected, atol=1e-5)


# --- positions, starts and cartridges ---------------------------------------------------------------------------------

TEXT = jnp.array([[9, 8, 7, 6]])
IDS = jnp.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
DECODER = DecoderConfig(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=10, pad_token_id=0,
)  # fmt: skip


@functools.cache
def of_text(scan=True, method=None):
    """A decoder after a text, by a prefix of the text's own keys and values."""
    model = Decoder(DECODER, scan_layers=scan)
    params = nn.meta.unbox(parameters(model, IDS))
    method = jpeft.PrefixTuning(length=4, shift_positions=True) if method is None else method
    peft = method.bind(model, params, IDS)
    return model, params, peft, from_text(peft, params, peft.init(jax.random.key(0), params), TEXT)


def after_text(model, params, ids=IDS, mask=None):
    """The same by the text itself."""
    whole = jnp.concatenate([jnp.broadcast_to(TEXT, (len(ids), 4)), ids], axis=1)
    mask = None if mask is None else jnp.concatenate([jnp.ones((len(ids), 4), mask.dtype), mask], axis=1)
    return model.apply({"params": params}, whole, mask)[:, 4:]


@pytest.mark.parametrize("scan", [True, False])
def test_a_text_of_keys_and_values_is_the_text(scan):
    model, params, peft, adapter = of_text(scan)
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = after_text(model, params, mask=mask)
    y = jax.jit(peft.apply)(params, adapter, IDS, mask)
    np.testing.assert_allclose(y[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(y[1, :3], expected[1, :3], atol=1e-5)
    # Given positions count from the first token, as those that are counted.
    given = peft.apply(params, adapter, IDS, mask, jnp.broadcast_to(jnp.arange(5), (2, 5)))
    np.testing.assert_allclose(given, y, atol=1e-5)


def test_a_cache_counts_on_from_the_text():
    model, params, peft, adapter = of_text()
    expected, cache = after_text(model, params), init_cache(model, 2, 5)
    y, cache = peft.apply(params, adapter, IDS[:, :3], cache=cache)
    np.testing.assert_allclose(y, expected[:, :3], atol=1e-5)
    for i in (3, 4):
        y, cache = peft.apply(params, adapter, IDS[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(y[:, 0], expected[:, i], atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoders_own_positions_are_shifted(kind):
    model = Bert(dataclasses.replace(BERT, model_type=kind))
    ids = jnp.array([[3, 1, 4, 0, 0]])
    params = parameters(model, ids)
    plain, shifted = (jpeft.PrefixTuning(length=3, shift_positions=s).bind(model, params, ids) for s in (False, True))
    adapter = moved(plain, params, 1.0)
    positions = np.arange(5)[None] if kind == "bert" else np.array([[1, 2, 3, 0, 0]])
    expected = plain.apply(params, adapter, ids, position_ids=jnp.asarray(positions) + 3)
    np.testing.assert_array_equal(shifted.apply(params, adapter, ids), expected)
    with pytest.raises(
        ValueError, match="3 virtual tokens and 8 of 'input_ids' are 11 positions, and the model has 10"
    ):
        shifted.apply(params, adapter, jnp.ones((1, 8), jnp.int32))


class Positionless(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.MultiHeadDotProductAttention(num_heads=2)(nn.Embed(9, 4)(ids))


def test_positions_of_a_model_that_takes_none_cannot_be_shifted():
    params = parameters(Positionless(), IDS)
    peft = jpeft.PrefixTuning(length=2, shift_positions=True).bind(Positionless(), params, IDS)
    with pytest.raises(ValueError, match=r"Positionless takes none .*set shift_positions=False"):
        peft.apply(params, moved(peft, params), IDS)


def test_a_prefix_may_start_from_zeros():
    model, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), numbers(1, 5, 6)
    params = parameters(model, x)
    for more in ({}, {"reparametrize": True, "hidden": 4, "embedding": 3}):
        peft = jpeft.PrefixTuning(length=LENGTH, init_weights="zero", **more).bind(model, params, x)
        (prefix,) = prefixes(peft, peft.init(jax.random.key(0), params)).values()
        assert not any(np.asarray(value).any() for value in prefix.values())


def test_the_first_tokens_of_a_cartridge_do_not_train_and_two_are_one_after_the_other():
    cartridge = jpeft.methods.Cartridge(length=4, frozen_tokens=2)
    model, params, peft, adapter = of_text(method=cartridge)
    np.testing.assert_allclose(peft.apply(params, adapter, IDS), after_text(model, params), atol=1e-5)
    labels = peft.labels(adapter)["model"]["layers"]["self_attn"]
    assert labels == {
        "frozen_key": "frozen", "frozen_value": "frozen", "prefix_key": "trainable", "prefix_value": "trainable"
    }  # fmt: skip
    short = jpeft.methods.Cartridge(length=2).bind(model, params, IDS)
    second = moved(short, params)
    method, both = compose((peft, adapter), (short, second))
    assert method == dataclasses.replace(cartridge, length=6)
    found = prefixes(method.bind(model, params, IDS), both)["model/layers/self_attn"]
    parts = [prefixes(*pair)["model/layers/self_attn"] for pair in ((peft, adapter), (short, second))]
    for name, whole in found.items():
        np.testing.assert_array_equal(whole, np.concatenate([part[name] for part in parts], axis=1))


def test_starts_that_are_none_are_refused():
    model, params, peft, adapter = of_text()
    for text, message in ((IDS, r"\[2, 5, 1, 4\]"), (TEXT[:, :3], r"\[1, 3, 1, 4\]")):
        with pytest.raises(ValueError, match=rf"keys and values of one text of as many tokens or more.*{message}"):
            from_text(peft, params, adapter, text)
    with pytest.raises(ValueError, match="of 1 layers, and the prefix is at 2 attentions"):
        from_keys_values(peft, adapter, [(jnp.zeros((1, 4, 4)),) * 2])
    network = jpeft.PrefixTuning(length=4, reparametrize=True).bind(model, params, IDS)
    with pytest.raises(ValueError, match="do not give back the network that computes them"):
        from_text(network, params, network.init(jax.random.key(0), params), TEXT)
    lora = jpeft.LoRA(rank=2).bind(model, params, IDS)
    with pytest.raises(ValueError, match="LoRA has no keys and values before an attention's own"):
        from_text(lora, params, lora.init(jax.random.key(0), params), TEXT)
    with pytest.raises(ValueError, match="compose takes two prefixes or more, got 1"):
        compose((peft, adapter))
    with pytest.raises(ValueError, match="frozen_tokens must be fewer than length, 2"):
        jpeft.methods.Cartridge(length=2, frozen_tokens=2)
    with pytest.raises(ValueError, match="reparametrize must be False"):
        jpeft.methods.Cartridge(length=2, reparametrize=True)
