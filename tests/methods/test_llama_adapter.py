"""LLaMA-Adapter: its equation, the layers that it is in, and attention methods in some layers of a scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import meta

import jpeft
from jpeft.core import stacking
from jpeft.core.attending import Attention
from jpeft.core.tree import flatten, unflatten
from jpeft.methods import LlamaAdapter
from jpeft.models.decoder import Decoder, DecoderConfig
from tests.contract import close, differ
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

IDS = jnp.asarray(np.random.default_rng(0).integers(3, 40, (2, 6)))
CONFIG = DecoderConfig(
    vocab_size=41, hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def decoder(scan_layers=True):
    model = Decoder(CONFIG, scan_layers=scan_layers)
    return model, meta.unbox(parameters(model, IDS))


def attended(query, key, value, mask, prefix=None):
    """An attention with as many key heads as query heads, which is scaled by 1 / sqrt(d)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), value)


def test_a_gate_adds_what_queries_find_in_the_projected_prompt():
    draw = np.random.default_rng(0).normal
    query, key, value, prompt = (draw(size=shape) for shape in ((2, 5, 3, 4), (2, 6, 3, 4), (2, 6, 3, 7), (3, 8)))
    k, v, gate = draw(size=(8, 3, 4)), draw(size=(8, 3, 7)), np.array([0.7])
    mask = np.tri(5, 6)[None, None] > 0

    def softmax(scores):
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    own_k, own_v = np.einsum("nf,fhd->nhd", prompt, k), np.einsum("nf,fhd->nhd", prompt, v)
    shares = softmax(np.einsum("bqhd,nhd->bhqn", query, own_k) / 2)
    want = 0.7 * np.einsum("bhqn,nhd->bqhd", shares, own_v)
    scores = np.where(mask, np.einsum("bqhd,bkhd->bhqk", query, key) / 2, -np.inf)
    want += np.einsum("bhqk,bkhd->bqhd", softmax(scores), value)

    def project(states):
        return jnp.einsum("nf,fhd->nhd", states, k.astype(np.float32)), jnp.einsum(
            "nf,fhd->nhd", states, v.astype(np.float32)
        )

    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    leaves = {"adaption_prompt": jnp.asarray(prompt, jnp.float32), "adaption_gate": jnp.asarray(gate, jnp.float32)}
    found = LlamaAdapter(length=3).attend(leaves, Attention(attended), *arrays, mask, project)
    close(found, want)
    shut = LlamaAdapter(length=3).attend(
        leaves | {"adaption_gate": jnp.zeros(1)}, Attention(attended), *arrays, mask, project
    )
    close(shut, attended(*arrays, mask))


def test_flax_attentions_find_what_they_find_in_a_prompt_by_themselves():
    """The oracle is the module itself, called with the prompt as its keys and values."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    mask = nn.make_causal_mask(x[..., 0], dtype=bool)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, prompt=None):
            attention = nn.MultiHeadDotProductAttention(2, qkv_features=12, out_features=6, name="attention")
            return attention(x, mask=mask) if prompt is None else attention(x, prompt, prompt)

    class Nnx(nnx.Module):
        def __init__(self):
            self.attention = nnx.MultiHeadAttention(2, 8, 12, 6, decode=False, rngs=nnx.Rngs(0))

        def __call__(self, x, prompt=None):
            return self.attention(x, mask=mask) if prompt is None else self.attention(x, prompt, prompt)

    def check(peft, params, call, bias):
        adapter = moved(peft, params, 0.8)
        (prompt, gate) = (adapter["attention"][f"adaption_{name}"] for name in ("prompt", "gate"))
        alone = call(x, jnp.broadcast_to(prompt, (2, 3, 8)))
        want = call(x) + gate * (alone - bias)
        assert differ(want, call(x))
        close(jax.jit(peft.apply)(params, adapter, x), want)

    model = Net()
    params = parameters(model, x)
    method = LlamaAdapter(length=3)
    bias = params["attention"]["out"]["bias"]
    check(method.bind(model, params, x), params, lambda *args: model.apply({"params": params}, *args), bias)
    own = Nnx()
    own.attention.out.bias.set_value(bias)
    check(method.bind(own, x), nnx.state(own, nnx.Param), own, bias)


@pytest.mark.parametrize("last_layers", [None, 1, 2, 3])
def test_it_is_in_the_last_layers(last_layers):
    chosen = [0, 1, 2][-(last_layers or 3) :]
    model, params = decoder()
    peft = LlamaAdapter(length=2, last_layers=last_layers).bind(model, params, IDS)
    (site,) = peft.sites
    assert site.layers == (None if len(chosen) == 3 else tuple(chosen))
    leaves = flatten(peft.init(jax.random.key(0), params))
    own = {path[-1]: x for path, x in leaves.items()}
    assert own["adaption_prompt"].shape == (3, 2, 16) and own["adaption_gate"].shape == (3, 1)
    if len(chosen) < 3:
        np.testing.assert_array_equal(own["llama_adapter_layers"][:, 0], [i in chosen for i in range(3)])
    model, params = decoder(scan_layers=False)
    peft = LlamaAdapter(length=2, last_layers=last_layers).bind(model, params, IDS)
    assert [site.name for site in peft.sites] == [f"model/layers/{i}/self_attn" for i in chosen]


def test_layers_that_cannot_be_chosen_are_refused():
    model, params = decoder()
    for fields, expected in [
        ({"last_layers": 4}, "LlamaAdapter.last_layers is 4, and the model has 3 attentions"),
        ({"last_layers": 1, "overrides": {".*": {"layers": [0]}}}, "last_layers and layers in overrides both choose"),
        ({"last_layers": 0}, "last_layers must be a positive integer or None, got 0"),
    ]:
        with pytest.raises(ValueError, match=expected):
            LlamaAdapter(**fields).bind(model, params, IDS)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(2, name="attention")(x), None

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("encoder", "decoder"):
                scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
                x, _ = scan(name=name)(x, None)
            return x

    model, x = Two(), jnp.ones((1, 3, 4))
    with pytest.raises(ValueError, match="which are the last of 'encoder/attention', 'decoder/attention' is not clear"):
        LlamaAdapter(last_layers=1).bind(model, parameters(model, x), x)


@pytest.mark.parametrize("chosen", [pytest.param((1,), marks=pytest.mark.exhaustive), (0, 2)])
def test_an_attention_method_in_some_layers_of_a_scan_is_that_in_single_layers(chosen):
    model, params = decoder()
    method = jpeft.PrefixTuning(length=2, overrides={".*": {"layers": list(chosen)}})
    peft = method.bind(model, params, IDS)
    adapter = moved(peft, params, 0.5)
    single, alone = decoder(scan_layers=False)[0], stacking.unstack(params, "model/layers")
    each = jpeft.PrefixTuning(length=2, targets=rf"model/layers/[{''.join(map(str, chosen))}]/self_attn")
    plain = each.bind(single, alone, IDS)
    own = {
        path: x
        for path, x in flatten(stacking.unstack(adapter, "model/layers")).items()
        if path in dict(plain.structure)
    }
    want = plain.apply(alone, unflatten(own), IDS)
    assert differ(want, model.apply({"params": params}, IDS))
    close(jax.jit(peft.apply)(params, adapter, IDS), want)
    grads = flatten(jax.grad(lambda a: jnp.sin(peft.apply(params, a, IDS)).sum(), allow_int=True)(adapter))
    for path, g in grads.items():
        if path[-1].startswith("prefix_") and path[-1] != "prefix_tuning_layers":
            for layer in range(3):
                assert bool(g[layer].any()) == (layer in chosen)


def test_numbers_are_drawn_as_in_the_paper():
    model, params = decoder()
    leaves = flatten(LlamaAdapter(length=500).bind(model, params, IDS).init(jax.random.key(0), params))
    prompt = next(x for path, x in leaves.items() if path[-1] == "adaption_prompt")
    assert abs(float(prompt.std()) - 1) < 0.02 and abs(float(prompt.mean())) < 0.02
