"""A method projects states as the attention itself does, by parameters that the trace shows."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import jpeft
from jpeft.core.tree import flatten, unflatten
from jpeft.methods.base import AttentionMethod
from jpeft.models.decoder import Decoder, DecoderConfig
from tests.linen.foreign_attentions import CASES, WIDTH
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles", "standard_promotion")
ROWS = 3
IDS = np.random.default_rng(0).integers(3, 40, (2, 6))
CONFIG = DecoderConfig(
    vocab_size=41, hidden_size=WIDTH, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, qk_norm=True,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Projected(AttentionMethod):
    """A prefix of projected states."""

    def init(self, key, site, w):
        return {"states": jnp.zeros((ROWS, WIDTH))}

    def attend(self, leaves, attend, query, key, value, mask, project):
        return attend(query, key, value, mask, project(leaves["states"]))


def check(model, params, inputs, by_hand, plain=None):
    """Compares it with a prefix that ``by_hand(params, path, states)`` computes."""
    peft = Projected().bind(model, params, *inputs)
    adapter = moved(peft, params, 0.7)
    prefix = jpeft.PrefixTuning(length=ROWS).bind(model, params, *inputs)
    leaves = {}
    for path, states in flatten(adapter).items():
        keys_values = by_hand(flatten(params if plain is None else plain), path[:-1], np.asarray(states))
        leaves |= {(*path[:-1], f"prefix_{n}"): x for n, x in zip(("key", "value"), keys_values, strict=True)}
    got = jax.jit(lambda a: peft.apply(params, a, *inputs))(adapter)
    want = jax.jit(lambda a: prefix.apply(params, a, *inputs))(unflatten(leaves))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
    grads = jax.jit(jax.grad(lambda a: sum(jnp.sin(y).sum() for y in jax.tree.leaves(peft.apply(params, a, *inputs)))))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads(adapter)))


def einsum(*names):
    """Keys and values from weights ``[..., heads, inputs, features]``, of which the last two places are theirs."""

    def by_hand(params, path, states):
        w = params[*path, *names]
        return [np.einsum("...nf,...hfd->...nhd", states, w[..., i, :, :, :]) for i in (-2, -1)]

    return by_hand


def dense(params, path, states, names=("k_proj", "v_proj"), heads=2):
    """Keys and values from dense layers."""
    out = []
    for name in names:
        y = states @ np.asarray(params[*path, name, "kernel"])
        if (*path, name, "bias") in params:
            y = y + np.asarray(params[*path, name, "bias"])[..., None, :]
        out.append(y.reshape(*y.shape[:-1], heads, -1))
    return out


def t5x(params, path, states):
    return [(states @ np.asarray(params[*path, name])).reshape(ROWS, 4, -1) for name in ("key", "value")]


def easylm(params, path, states):
    return dense(params, path, states, ("wk", "wv"), 4)


BY_HAND = {
    "big_vision": einsum("kv_einsum", "w"),
    "big_vision, fused": einsum("qkv_einsum", "w"),
    "gemma": einsum("kv_einsum", "w"),
    "t5x": t5x,
    "easylm": easylm,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_found_attentions_project_by_their_own_weights(name):
    case = CASES[name]
    params = parameters(case.model, *case.inputs)
    check(case.model, params, case.inputs, BY_HAND[name])


@pytest.mark.parametrize(("scan", "quantized"), [(True, True), (False, False)])
def test_registered_attentions_project_by_their_own_weights(scan, quantized):
    model = Decoder(CONFIG, scan_layers=scan)
    params = meta.unbox(parameters(model, IDS))
    frozen = jpeft.quantize(params, "nf4", model, IDS, block=16) if quantized else params
    check(model, frozen, (IDS,), dense, jpeft.dequantize(frozen))


def test_attentions_of_several_streams_are_refused():
    case = CASES["openpi"]
    params = parameters(case.model, *case.inputs)
    peft = Projected().bind(case.model, params, *case.inputs)
    with pytest.raises(ValueError, match=r"'layers/attn'.*they come from 2 products with parameters.*exclude"):
        peft.apply(params, peft.init(jax.random.key(0), params), *case.inputs)
