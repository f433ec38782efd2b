"""A method on some of the layers that a scan stacks: `overrides` with ``layers``."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.stacking import stack, unroll
from jpeft.core.tree import flatten, partition
from jpeft.models.decoder import Decoder, DecoderConfig
from tests.contract import close
from tests.zoo import moved, numbers, parameters, same

IDS = jnp.asarray([[1, 2, 3, 4, 5]])
CONFIG = DecoderConfig(
    vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=8,
)  # fmt: skip
METHODS = {
    "LoRA": lambda **fields: jpeft.LoRA(rank=2, **fields),
    "IA3": lambda **fields: jpeft.IA3(feedforward=["down_proj"], **fields),
    "HRA": lambda **fields: jpeft.methods.HRA(rank=2, **fields),  # has no gradient at zero
    "VeRA": lambda **fields: jpeft.methods.VeRA(rank=2, **fields),
}
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG)
    return decoder, numbers(nn.meta.unbox(jax.eval_shape(decoder.init, jax.random.key(0), IDS)["params"]), 0.3)


def bound(model, make, **fields):
    """A Peft, and an adapter away from its start, zero where the method does not act."""
    decoder, params = model
    peft = make(targets=TARGETS, overrides={"q_proj": {"layers": [0, 2]}, "down_proj": {"layers": (1,)}}).bind(
        decoder, params, IDS
    )
    adapter, frozen = peft.init(jax.random.key(0), params), peft.non_trainable_paths
    leaves, rng = flatten(adapter), np.random.default_rng(1)
    for action in peft.actions:
        for name in action.stored:
            path = action.leaf_path(name)
            if path not in frozen:
                on = np.isin(np.arange(3), action.site.layers).reshape(3, *(1 for _ in leaves[path].shape[1:]))
                moved = leaves[path] + rng.normal(0, 0.3, leaves[path].shape).astype(np.float32)
                leaves[path] = jnp.asarray(np.where(on, moved, 0))
    return peft, jpeft.core.tree.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params):
    return decoder.apply({"params": params}, IDS)


SLOW = pytest.mark.exhaustive


@pytest.mark.parametrize("name", ["IA3", "HRA", pytest.param("LoRA", marks=SLOW), pytest.param("VeRA", marks=SLOW)])
def test_other_layers_stay_and_never_train(name, model):
    decoder, params = model
    peft, adapter = bound(model, METHODS[name])
    trainable, frozen = partition(adapter, peft.labels(adapter))

    def loss(trainable):
        logits = peft.apply(params, jpeft.combine(trainable, frozen), IDS)
        return (logits**2).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    merged = peft.merge(params, adapter)
    np.testing.assert_allclose(run(decoder, merged), logits, atol=2e-4)
    for path, gradient in flatten(gradients).items():
        layers = (0, 2) if "q_proj" in path else (1,)
        for i in range(3):
            assert np.isfinite(gradient[i]).all() and bool(np.any(gradient[i])) is (i in layers), path
    # In layers of their own, the method acts on just those.
    _, own, each, apart = unroll(decoder, params, peft, adapter)
    same(stack(each.merge(own, apart)), merged)
    for path, w in flatten(params).items():
        layers = (0, 2) if "q_proj" in path else (1,) if "down_proj" in path else ()
        for i in range(3 if "layers" in path else 0):
            assert bool(np.any(flatten(merged)[path][i] != w[i])) is (i in layers)


def test_layers_are_kept_in_folders(model, tmp_path):
    decoder, params = model
    peft, adapter = bound(model, METHODS["LoRA"])
    jpeft.save(tmp_path, peft, adapter, params)
    again, read = jpeft.load(tmp_path, decoder, params, IDS)
    assert again == peft and hash(again) == hash(peft)
    same(read, adapter)
    assert jpeft.methods.from_dict(peft.method.to_dict()) == peft.method


REFUSED = {
    r"overrides give 'model/layers/self_attn/q_proj' the layers \[3\], but it has 3 layers": {"q_proj": [3]},
    r"overrides give 'lm_head' the layers \[0\], but it is no weight or module that a scan stacks": {"lm_head": [0]},
    r"overrides\['q_proj'\] sets layers, which must be indices, got \(\)": {"q_proj": []},
    r"overrides\['q_proj'\] sets layers, which must be indices, got \(0, 0\)": {"q_proj": [0, 0]},
    r"overrides\['q_proj'\] sets layers, which must be indices, got 'all'": {"q_proj": "all"},
    r"overrides\['q_proj'\] sets layers, which must be indices, got \(-1,\)": {"q_proj": [-1]},
}


@pytest.mark.parametrize("match", REFUSED)
def test_layers_that_are_none(match, model):
    overrides = {name: {"layers": layers} for name, layers in REFUSED[match].items()}
    with pytest.raises(ValueError, match=match):
        jpeft.LoRA(rank=2, targets=["q_proj", "lm_head"], overrides=overrides).bind(*model, IDS)


def test_layers_that_are_stacked_along_another_axis():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4, name="op")(x)) + x, None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    x = numbers(jax.ShapeDtypeStruct((5, 4), jnp.float32))
    params = parameters(Net(), x)
    peft = jpeft.LoRA(rank=2, targets=["op"], overrides={"op": {"layers": [0, 2]}}).bind(Net(), params, x)
    adapter = moved(peft, params)
    assert adapter["layers"]["op"]["lora_layers"].shape == (1, 3)
    merged = peft.merge(params, adapter)
    close(peft.apply(params, adapter, x), Net().apply({"params": merged}, x))
    same = (np.asarray(merged["layers"]["op"]["kernel"]) == params["layers"]["op"]["kernel"]).all((0, 2))
    assert same.tolist() == [False, True, False]
