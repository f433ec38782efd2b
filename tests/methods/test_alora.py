"""aLoRA: which tokens activate it, in every way to run a model, and where it is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods import ALoRA
from jpeft.methods.alora import activated
from tests.contract import close, differ
from tests.zoo import numbers, parameters

IDS = jnp.array([[3, 1, 2, 4, 1, 2, 0], [3, 1, 4, 2, 1, 1, 2], [2, 1, 3, 1, 3, 2, 1]])
TOKENS = (1, 2)
START = (4, 5, 7)  # of the last pair in each row; the last row has none


class Layer(nn.Module):
    kind: type = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(self.kind(6, name="op")(x)) + x, None


class Net(nn.Module):
    """Layers whose tokens do not see each other, so that a token's output says whether the adapter acted on it."""

    transform: str = ""

    @nn.compact
    def __call__(self, input_ids, scale=1.0, train=False):
        x = nn.Embed(5, 6, name="table")(input_ids)
        if "jit" in self.transform:
            for i in range(2):
                x, _ = Layer(nn.jit(nn.Dense), name=f"layer_{i}")(x)
            return x * scale
        layer = nn.remat(Layer) if "remat" in self.transform else Layer
        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="layers")(x, None)[0] * scale


def setting(transform="", **fields):
    model = Net(transform)
    params = parameters(model, IDS)
    peft = ALoRA(rank=2, invocation_tokens=TOKENS, targets=r".*/op", **fields).bind(model, params, IDS)
    return model, params, peft, numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)), 0.5)


def expected(model, params, peft, adapter, ids=IDS):
    """The outputs of a LoRA of the same leaves where the adapter is active, and of the base elsewhere."""
    lora = jpeft.LoRA(rank=2, targets=r".*/op").bind(model, params, ids)
    place = np.arange(ids.shape[1])
    active = place >= np.asarray(START)[:, None]
    return jnp.where(active[..., None], lora.apply(params, adapter, ids), model.apply({"params": params}, ids))


@pytest.mark.parametrize("transform", ["scan", "scan, remat", "jit"])
def test_it_acts_from_the_last_invocation_on(transform):
    model, params, peft, adapter = setting(transform)
    want = expected(model, params, peft, adapter)
    assert differ(want[:2], model.apply({"params": params}, IDS)[:2])

    @jax.jit
    def run(params, adapter, ids):
        with peft.intercept():
            inside = model.apply({"params": peft.overlay(params, adapter)}, ids)
        full = jpeft.combine(params, adapter)
        return peft.apply(params, adapter, ids), peft.module.apply({"params": full}, input_ids=ids), inside

    for y in run(params, adapter, IDS):
        close(y, want)
    # A module under nn.jit must not reuse what it has captured of another call, traced or not.
    for ids in (IDS, jnp.roll(IDS, 1, 0), IDS):
        for y in (peft.apply(params, adapter, ids), run(params, adapter, ids)[0]):
            close(y, jnp.roll(want, 1, 0) if ids is not IDS else want)


def test_the_start_is_that_of_a_search_by_hand():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        ids, tokens = rng.integers(0, 3, (50, 6)), tuple(rng.integers(0, 3, count).tolist())
        for row, found in zip(ids, np.asarray(activated(jnp.asarray(ids), tokens)), strict=True):
            starts = [t for t in range(6) if tuple(row[t : t + count]) == tokens]
            np.testing.assert_array_equal(found, np.arange(6) >= (starts[-1] if starts else 6))
    assert not activated(jnp.zeros((2, 1), jnp.int32), (0, 0)).any()


def test_texts_packed_in_a_row_are_activated_each_by_its_own_tokens():
    class Packed(nn.Module):
        @nn.compact
        def __call__(self, input_ids, segment_ids=None):
            return nn.Dense(4, name="op")(nn.Embed(8, 6)(input_ids))

    texts = ([1, 2, 4, 5], [3, 1, 2, 6, 1], [2, 7, 7])  # the last pair is of two texts
    packed = jnp.array([[token for text in texts for token in text]])
    segments = jnp.array([[1] * 4 + [2] * 5 + [3] * 3])
    active = np.array([True] * 4 + [False] + [True] * 4 + [False] * 3)
    model = Packed()
    params = parameters(model, packed)
    peft = ALoRA(rank=2, invocation_tokens=TOKENS, targets=["op"]).bind(model, params, packed)
    adapter = numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)), 0.5)
    before = model.apply({"params": params}, packed)

    def changed(**kwargs):
        return np.abs(peft.apply(params, adapter, packed, **kwargs) - before).max(-1)[0]

    np.testing.assert_array_equal(changed(segment_ids=segments) > 1e-3, active)
    np.testing.assert_array_equal(changed() > 1e-3, np.arange(12) >= 8)
    with pytest.raises(ValueError, match=r"segment_ids must be like the token ids, \(1, 12\), got \(1, 1\)"):
        changed(segment_ids=segments[:, :1])


def test_a_row_without_invocation_gives_no_gradient():
    _, params, peft, adapter = setting()
    grads = jax.grad(lambda a: jnp.sin(peft.apply(params, a, IDS[2:])).sum())(adapter)
    assert not any(np.abs(g).any() for g in jax.tree.leaves(grads))


def test_what_it_cannot_know_is_refused():
    model, params, peft, adapter = setting()
    with pytest.raises(ValueError, match="ALoRA at 'layers/op' cannot be merged"):
        peft.merge(params, adapter)
    with (
        peft.intercept(),
        pytest.raises(ValueError, match=r"'layers/op' depends on the arguments of the model's call .* peft\.overlay"),
    ):
        model.apply({"params": jpeft.combine(params, adapter)}, IDS)
    with pytest.raises(ValueError, match=r"'table' is an embedding, whose tokens cannot be told apart"):
        ALoRA(invocation_tokens=TOKENS, targets=["table"]).bind(model, params, IDS)
    with pytest.raises(ValueError, match=r"invocation_tokens must be token ids, one or more, got \[\]"):
        ALoRA(invocation_tokens=[])

    class Embedded(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="op")(x)

    x = jnp.ones((2, 3, 4))
    inner = parameters(Embedded(), x)
    bound = ALoRA(rank=2, invocation_tokens=TOKENS, targets="op").bind(Embedded(), inner, x)
    with pytest.raises(ValueError, match=r"no argument of the model's call holds token ids \[batch, length\]; got"):
        bound.apply(inner, bound.init(jax.random.key(0), inner), x)


def test_a_call_that_continues_a_cache_is_refused():
    from jpeft.models.decoder import Decoder, DecoderConfig

    config = DecoderConfig(
        vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = Decoder(config)
    params = parameters(model, IDS)
    peft = ALoRA(rank=2, invocation_tokens=TOKENS, targets=["q_proj"]).bind(model, params, IDS)
    adapter = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="continues a cache of keys and values"):
        jpeft.generate(model, params, [[1, 2, 3]], peft=peft, adapter=adapter, max_new_tokens=2)
