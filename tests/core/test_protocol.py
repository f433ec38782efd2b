"""What a method says of itself: what merges where, its own loss, and names of earlier versions."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods import WeightMethod
from tests.contract import bound, close
from tests.zoo import Entry, numbers, parameters

X = numbers(jax.ShapeDtypeStruct((3, 4), jnp.float32))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, use_bias=False, name="bare")(x) @ jnp.ones((5, 4)) + nn.Dense(4, name="biased")(x)


@dataclass(frozen=True, kw_only=True)
class Shift(WeightMethod):
    """y + c."""

    def init(self, key, site, w):
        return {"c": jnp.zeros((site.outputs,))}

    def apply(self, leaves, base, x):
        y = base(x)
        return y + leaves["c"]

    def merge(self, leaves, w, b):
        return w, leaves["c"] if b is None else b + leaves["c"]


@dataclass(frozen=True, kw_only=True)
class HonestShift(Shift):
    def mergeable(self, site):
        return site.bias


@dataclass(frozen=True, kw_only=True)
class FromWeight(Shift):
    """The bias takes a part of the weight."""

    def apply(self, leaves, base, x):
        return super(Shift, self).apply(leaves, base, x)

    def merge(self, leaves, w, b):
        return 2 * w, None if b is None else b + leaves["c"] * w.sum(0)


def test_a_bias_that_would_be_added_where_there_is_none_is_refused_by_path():
    params = parameters(Net(), X)
    with pytest.raises(ValueError, match=r"Shift adds a bias at 'bare', whose module has none .* exclude=\['bare'\]"):
        Shift(targets=["bare", "biased"]).bind(Net(), params, X)
    Shift(targets=["biased"]).bind(Net(), params, X)


def test_a_site_says_whether_it_merges():
    params = parameters(Net(), X)
    peft = HonestShift(targets=["bare", "biased"]).bind(Net(), params, X)
    adapter = numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)))
    assert not peft.mergeable
    with pytest.raises(ValueError, match="HonestShift at 'bare' cannot be merged"):
        peft.merge(params, adapter)
    c = adapter["bare"]["c"] @ jnp.ones((5, 4)) + adapter["biased"]["c"]
    close(peft.apply(params, adapter, X), Net().apply({"params": params}, X) + c)
    with pytest.raises(ValueError, match=r"HonestShift cannot be merged at 'block/op/w', which is reached only as a"):
        bound(Entry(lambda use: HonestShift(targets=use.targets)), "raw, in a loop")


@pytest.mark.parametrize(("use", "mode"), [
    ("dense", "scan"), ("fused qkv", "plain"), ("conv 2-D strided", "plain"), ("mapped variables", "plain"),
])  # fmt: skip
def test_a_bias_may_depend_on_the_weight(use, mode):
    peft, model, params, x = bound(Entry(lambda use: FromWeight(targets=use.targets, parts=use.parts)), use, mode)
    adapter = numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)))
    close(peft.apply(params, adapter, x), model.apply({"params": peft.merge(params, adapter)}, x))


@dataclass(frozen=True, kw_only=True)
class Penalized(HonestShift):
    def penalty(self, leaves):
        return (leaves["c"] ** 2).sum()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_of_its_own_is_added_and_reported(reduction):
    cls = type("Own", (Penalized,), {"penalty_reduction": reduction})
    params = parameters(Net(), X)
    peft = cls(targets=["bare", "biased"]).bind(Net(), params, X)
    adapter = numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)))
    squares = sum(float((x**2).sum()) for x in jax.tree.leaves(adapter))
    want = squares / (2 if reduction == "mean" else 1)
    np.testing.assert_allclose(float(peft.penalty(adapter)), want, rtol=1e-6)

    def loss_fn(adapter, params, batch, rng):
        return (peft.apply(params, adapter, batch) ** 2).mean(), {}

    tx = optax.sgd(0.1)
    state, metrics = jpeft.train_step(peft, loss_fn, tx, donate=False)(
        jpeft.TrainState.create(peft, adapter, tx, jax.random.key(0)), params, X
    )
    np.testing.assert_allclose(float(metrics["penalty"]), want, rtol=1e-6)
    np.testing.assert_allclose(float(metrics["loss"]), float(loss_fn(adapter, params, X, None)[0]), rtol=1e-6)
    whole = jax.grad(lambda a: loss_fn(a, params, X, None)[0] + peft.penalty(a))(adapter)
    jax.tree.map(close, state.adapter, jax.tree.map(lambda a, g: a - 0.1 * g, adapter, whole))


def test_a_method_without_a_loss_of_its_own_has_none():
    params = parameters(Net(), X)
    peft = HonestShift(targets=["biased"]).bind(Net(), params, X)
    assert float(peft.penalty(peft.init(jax.random.key(0), params))) == 0
    with pytest.raises(ValueError, match="does not depend on the adapter"):
        own = Penalized(targets=["biased"]).bind(Net(), params, X)
        adapter = own.init(jax.random.key(0), params)
        state = jpeft.TrainState.create(own, adapter, optax.sgd(0.1), jax.random.key(0))
        # The penalty depends on the adapter, the user's loss does not.
        jpeft.train_step(own, lambda a, p, b, r: ((b**2).mean(), {}), optax.sgd(0.1))(state, params, X)


@pytest.mark.parametrize(("body", "message"), [
    ({"fixed": frozenset()}, "is called non_trainable now"),
    ({"merge_bias": lambda self, leaves, b: b}, r"is a part of merge now"),
    ({"mergeable": False}, r"is a function of a site now"),
    ({"merge": lambda self, leaves, w: w}, r"merge takes \(leaves, w, b\), got \(leaves, w\)"),
    ({"expand": lambda self, shared, leaves: leaves}, r"expand takes \(site, shared, leaves\)"),
])  # fmt: skip
def test_forms_of_earlier_versions_are_refused(body, message):
    with pytest.raises(TypeError, match=message):
        type("Old", (WeightMethod,), body)


def test_a_merge_that_gives_back_something_else_is_refused():
    wrong = type("Wrong", (HonestShift,), {"merge": lambda self, leaves, w, b: w})
    with pytest.raises(TypeError, match=r"Wrong\.merge\(leaves, w, b\) must return \(w, b\)"):
        wrong(targets=["biased"]).bind(Net(), parameters(Net(), X), X)
    turned = type("Turned", (HonestShift,), {"merge": lambda self, leaves, w, b: (w[1:], b)})
    with pytest.raises(TypeError, match=r"the weight of 'biased' is \(4, 4\), got \(3, 4\)"):
        turned(targets=["biased"]).bind(Net(), parameters(Net(), X), X)
