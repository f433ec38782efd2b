"""Stacked, averaged and fused adapters, against their members by themselves.

`tests/parity/test_adapters_torch.py` has AdapterHub's library for an oracle.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.targets import TargetError
from jpeft.core.tree import flatten
from jpeft.methods import AdapterFusion, Average, LoReFT, Stack, VeRA, from_dict, with_members
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(6)])
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
PARAMS = parameters(MODEL, X)
FR, DE = (jpeft.Bottleneck(targets="layers_2", size=n, activation="tanh") for n in (2, 3))
BASE = MODEL.apply({"params": PARAMS}, X)


def trained(method, seed):
    peft = method.bind(MODEL, PARAMS, X)
    return peft, moved(peft, PARAMS, 1.0, seed)


def composed(method, **adapters):
    peft = method.bind(MODEL, PARAMS, X)
    return peft, with_members(peft, peft.init(jax.random.key(0), PARAMS), adapters)


def outputs(pair):
    peft, adapter = pair
    return peft.apply(PARAMS, adapter, X)


def test_an_average_is_that_of_the_changes():
    fr, de = trained(FR, 1), trained(DE, 2)
    got = outputs(composed(Average(members={"fr": FR, "de": DE}, weights=[3, 1]), fr=fr[1], de=de[1]))
    expected = BASE + 0.75 * (outputs(fr) - BASE) + 0.25 * (outputs(de) - BASE)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [Average, Stack])
def test_members_drop_apart(kind):
    """Of two members with the same leaves, an average without dropout is that of one."""
    half = dataclasses.replace(FR, dropout=0.5)
    _, own = trained(half, 1)
    peft, adapter = composed(kind(members={"a": half, "b": half}), a=own, b=own)
    key = {"dropout": jax.random.key(3)}
    single = half.bind(MODEL, PARAMS, X)
    both = peft.apply(PARAMS, adapter, X, rngs=key) - BASE
    one = single.apply(PARAMS, own, X, rngs=key) - BASE
    kept = jnp.abs(one) > 0
    assert 0.2 < kept.mean() < 0.8
    assert 0.2 < ((both != 0) & ~kept).sum() / (~kept).sum() < 0.95


@pytest.mark.parametrize("targets", ["layers_2", r"layers_\d"])
def test_an_average_of_methods_of_weights_is_that_of_the_outputs_and_merges(targets):
    kinds = {"lora": jpeft.LoRA(rank=2, targets=targets), "vera": VeRA(rank=3, targets=targets),
             "ia3": jpeft.IA3(targets=targets)}  # fmt: skip
    each = {name: trained(method, i) for i, (name, method) in enumerate(kinds.items())}
    weights = {"lora": 0.5, "vera": 0.2, "ia3": 0.4}
    method = Average(members=kinds, weights=list(weights.values()), normalize_weights=False)
    peft, adapter = composed(method, **{name: own for name, (_, own) in each.items()})
    merged = peft.merge(PARAMS, adapter)
    np.testing.assert_allclose(outputs((peft, adapter)), MODEL.apply({"params": merged}, X), atol=1e-5)
    for layer in peft.sites:
        plain = PARAMS[layer.name]
        expected = {key: np.array(leaf, np.float64) for key, leaf in plain.items()}
        for name, (own, leaves) in each.items():
            alone = own.merge(PARAMS, leaves)[layer.name]
            expected = {key: x + weights[name] * (alone[key] - plain[key]) for key, x in expected.items()}
        for key, leaf in expected.items():
            np.testing.assert_allclose(merged[layer.name][key], leaf, atol=1e-5)


def test_weights_of_an_average_have_a_gradient_and_train_if_they_are_learned():
    peft, adapter = composed(Average(members={"fr": FR, "de": DE}), fr=trained(FR, 1)[1], de=trained(DE, 2)[1])
    grads = jax.grad(lambda a: peft.apply(PARAMS, a, X).sum())(adapter)["layers_2"]["average_weights"]
    alone = [(outputs(trained(m, seed)) - BASE).sum() for m, seed in ((FR, 1), (DE, 2))]
    np.testing.assert_allclose(grads, alone, rtol=1e-4)
    trainable = {
        learned: {path[-1] for path, label in flatten(
            Average(members={"fr": FR, "de": DE}, learn_weights=learned).bind(MODEL, PARAMS, X).labels(adapter)
        ).items() if label == "trainable"} for learned in (False, True)
    }  # fmt: skip
    assert trainable == {False: set(), True: {"average_weights"}}


def test_a_stack_is_one_adapter_after_the_other_and_some_may_be_frozen():
    fr, de = trained(FR, 1), trained(DE, 2)
    peft, adapter = composed(Stack(members={"fr": FR, "de": DE}, frozen=["fr"]), fr=fr[1], de=de[1])
    own = {name: np.asarray(leaf, np.float64) for name, leaf in {**de[1]["layers_2"]}.items()}
    h = np.asarray(outputs(fr), np.float64)
    hidden = np.tanh(h @ own["bottleneck_down"] + own["bottleneck_down_bias"])
    expected = h + hidden @ own["bottleneck_up"] + own["bottleneck_up_bias"]
    np.testing.assert_allclose(outputs((peft, adapter)), expected, atol=1e-5)
    assert {path[-1][:2] for path in peft.non_trainable_paths} == {"fr"}
    assert len(peft.non_trainable_paths) == 4


def test_compositions_nest_with_members_of_any_kind_and_come_back_from_json():
    reft = LoReFT(targets="layers_2", prefix_positions=1, suffix_positions=1, dropout=0.0)
    fusion = AdapterFusion(members={"de": DE, "reft": reft})
    method = Stack(members={"fr": FR, "both": fusion}, frozen=["fr"])
    assert from_dict(method.to_dict()) == method != Stack(members={"both": fusion, "fr": FR}, frozen=["fr"])
    peft = method.bind(MODEL, PARAMS, X)
    adapter = moved(peft, PARAMS, 1.0)
    trains = {path[-1] for path in flatten(adapter) if path not in peft.non_trainable_paths}
    fusions = {"query", "query_bias", "key", "value"}
    assert trains == {f"both_fusion_{name}" for name in fusions}
    assert np.abs(outputs((peft, adapter)) - BASE).max() > 1e-2
    half = Average(members={"stack": method, "none": FR})
    pair = half.bind(MODEL, PARAMS, X)
    fresh = pair.init(jax.random.key(0), PARAMS)
    both = with_members(pair, fresh, {"stack": adapter})
    np.testing.assert_allclose(outputs((pair, both)), (outputs((peft, adapter)) + BASE) / 2, atol=1e-5)


def test_a_fusion_of_equal_adapters_is_that_adapter():
    fr = trained(FR, 1)
    pair = composed(AdapterFusion(members={"a": FR, "b": FR}), a=fr[1], b=fr[1])
    np.testing.assert_allclose(outputs(pair), outputs(fr), atol=1e-4)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Stack(), "Stack.members must be methods by name"),
    (lambda: Stack(members={"fr": FR, "fr_de": DE}), "leaves of 'fr' and 'fr_de' could have the same names"),
    (lambda: Stack(members={"a b": FR}), "must be identifiers; got 'a b'"),
    (lambda: Stack(members=[("a", FR), ("a", DE)]), "two have the same name"),
    (lambda: Stack(members={"a": FR}, frozen=["b"]), "Stack.frozen names 'b', which is no member: a"),
    (lambda: Stack(members={"a": jpeft.Chain(FR, DE)}), "Chain cannot be a member, as 'a' is"),
    (lambda: Stack(members={"a": FR}, targets="layers_2"), "Stack acts where its members do; give targets to them"),
    (lambda: Average(members={"a": FR}, weights=[1, 2]), "a number for each of a"),
    (lambda: Average(members={"a": FR, "b": DE}, weights=[1, -1]), "sum to 0 and cannot be normalized"),
    (lambda: AdapterFusion(members={"a": jpeft.Bottleneck(original_ln_before=True)}, residual_before=True),
     "its members must be without original_ln_before"),
])  # fmt: skip
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("method", "message"), [
    (Stack(members={"a": jpeft.LoRA()}), "the member 'a' acts on weights; its members act on the outputs of modules"),
    (Average(members={"a": FR, "b": jpeft.Bottleneck(targets="layers_0")}), "'a' and 'b' differ at 'layers_2'"),
    (jpeft.Chain(FR, DE), r"both keep a leaf at 'layers_2/bottleneck_down' .* can be members of jpeft.methods.Stack"),
    (Average(members={"a": jpeft.LoRA(dropout=0.1)}), r"'a' \(LoRA\) at 'layers_0' drops entries of its input"),
])  # fmt: skip
def test_members_that_cannot_be_together(method, message):
    with pytest.raises((ValueError, TargetError), match=message):
        method.bind(MODEL, PARAMS, X)


def test_adapters_that_do_not_fit_their_member():
    peft = Stack(members={"fr": FR, "de": DE}).bind(MODEL, PARAMS, X)
    fresh, (_, fr), (_, de) = peft.init(jax.random.key(0), PARAMS), trained(FR, 1), trained(DE, 2)
    with pytest.raises(ValueError, match="Stack has no member 'it'; its members are fr, de"):
        with_members(peft, fresh, {"it": fr})
    with pytest.raises(ValueError, match=r"has 'layers_2/bottleneck_down' of shape \(6, 3\), and the member \(6, 2\)"):
        with_members(peft, fresh, {"fr": de})
    with pytest.raises(ValueError, match="the adapter of 'fr' lacks 'layers_2/bottleneck_up'"):
        with_members(peft, fresh, {"fr": {"layers_2": {k: v for k, v in fr["layers_2"].items() if k[-2:] != "up"}}})
    with pytest.raises(ValueError, match="Bottleneck has no members"):
        with_members(FR.bind(MODEL, PARAMS, X), fr, {})
