"""What is said of an adapter when it is loaded: that it changes nothing, or is not finite."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.loaded import changes_nothing, check_loaded
from jpeft.core.tree import flatten
from jpeft.errors import AdapterError


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="up")(nn.MultiHeadDotProductAttention(2, name="attention")(x, x)), None


class Model(nn.Module):
    """Embedding, convolution, and scanned blocks of attention and a dense layer."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Conv(6, (3,), name="mix")(nn.Embed(9, 6, name="words")(ids))
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3, name="head")(scanned(name="layers")(x, None)[0])


IDS = jnp.asarray([[1, 2, 3, 4]])
EVERY = r"words|mix|head|layers/up|layers/attention/(query|out)"
NEUTRAL = {
    "lora": jpeft.LoRA(rank=2, targets=EVERY),
    "gaussian": jpeft.LoRA(rank=2, targets=["up"], init_weights="gaussian", dtype="bfloat16"),
    "ia3": jpeft.IA3(targets=EVERY, feedforward=["up"]),
    "bottleneck": jpeft.Bottleneck(targets=["up"], size=2),
    "biases": jpeft.BitFit(),
    "leaves": jpeft.Train(["head", "mix"]),
    "chain": jpeft.Chain(jpeft.LoRA(rank=2, targets=["up"]), jpeft.Train(["head"])),
}
OTHER = {
    "random": jpeft.LoRA(rank=2, targets=["up"], init_weights="random"),
    "prefix": jpeft.PrefixTuning(length=2),
}


@functools.cache
def parameters():
    rng = np.random.default_rng(0)  # made by numpy, so that nothing is compiled
    shapes = jax.eval_shape(Model().init, jax.random.key(0), IDS)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), shapes)


def bound(method):
    peft = method.bind(Model(), parameters(), IDS)
    return peft, {p: np.asarray(x) for p, x in flatten(peft.init(jax.random.key(1), parameters())).items()}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_fresh_adapter_changes_nothing_and_one_changed_number_does(name):
    peft, leaves = bound(NEUTRAL[name])
    base = flatten(parameters())
    assert changes_nothing(peft, leaves, base)
    with pytest.warns(UserWarning, match=f"folder: this {peft.method.name} changes nothing: every update .* is zero"):
        check_loaded("folder", peft, leaves, base)
    last = ("lora_b", "ia3_out", "bottleneck_up_bias", "bias")
    path = next(
        p for p, x in leaves.items() if p[-1] in last and p[0] != "words"
    )  # an embedding's A is zero, not its B
    changed = leaves[path].copy()
    changed.flat[-1] += 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_loaded("folder", peft, {**leaves, path: changed}, base)


@pytest.mark.parametrize("name", OTHER)
def test_an_adapter_that_may_change_something_is_not_told(name):
    peft, leaves = bound(OTHER[name])
    assert not changes_nothing(peft, leaves, flatten(parameters()))


def test_zeros_change_nothing_however_they_began():
    peft, leaves = bound(OTHER["random"])
    for leaf in ("lora_a", "lora_b"):
        zero = {p: x * 0 if p[-1] == leaf else x for p, x in leaves.items()}
        assert changes_nothing(peft, zero, flatten(parameters()))


def test_leaves_are_not_compared_with_an_abstract_base():
    peft, leaves = bound(NEUTRAL["leaves"])
    assert not changes_nothing(peft, leaves, flatten(jax.eval_shape(parameters)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["gaussian", "leaves"])
def test_a_leaf_that_is_not_finite_is_refused_by_name(name, value):
    peft, leaves = bound(NEUTRAL[name])
    path = list(leaves)[1]
    leaves[path] = leaves[path].copy()
    leaves[path].flat[1] = value
    with pytest.raises(AdapterError, match=f"folder: '{'/'.join(path)}' holds NaN or infinity"):
        check_loaded("folder", peft, leaves, flatten(parameters()))
