"""Prefix tuning is attention over more keys and values, as numpy computes it in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models.bert import Bert, BertConfig
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
