"""Leaves that all sites share: held once, whatever transforms the model or the caller uses."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jpeft
from jpeft.core.tree import flatten
from jpeft.linen.module import PeftModule
from jpeft.methods import WeightMethod
from tests.contract import close, differ
from tests.zoo import numbers, parameters

WIDTH, RANK, LAYERS, MANY = 6, 5, 3, 7
X = numbers(jax.ShapeDtypeStruct((2, 4, WIDTH), jnp.float32))


@dataclass(frozen=True, kw_only=True)
class Scaled(WeightMethod):
    """W + A diag(d) B, where A and B train and are shared."""

    def init(self, key, site, w):
        return {"d": jnp.ones((RANK,))}

    def shared(self, key, sites):
        shape = (2, max(max(s.inputs, s.outputs) for s in sites), RANK)
        both = jax.random.normal(key, shape)
        return {"a": both[0], "b": both[1].T}

    def expand(self, site, shared, leaves):
        assert shared["a"].dtype == leaves["d"].dtype == jnp.float32
        assert shared["a"].ndim == 2 and leaves["d"].ndim == 1
        return {"a": shared["a"][: site.inputs] * leaves["d"], "b": shared["b"][:, : site.outputs]}

    def apply(self, leaves, base, x):
        return base(x) + (x @ leaves["a"]) @ leaves["b"]

    def merge(self, leaves, w, b):
        return w + leaves["a"] @ leaves["b"], b


class Loop(nn.Module):
    """A weight that is reached only as a weight."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (x.shape[-1], x.shape[-1]))
        return jax.lax.scan(lambda h, x: (h := nn.tanh(h @ w + x), h), x[0], x)[1]


class Layer(nn.Module):
    kind: Any = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(self.kind(WIDTH, name="op")(x)) + Loop(name="loop")(x), None


class Net(nn.Module):
    transform: str = "scan"

    @nn.compact
    def __call__(self, x):
        if self.transform == "jit":
            for i in range(2):
                x, _ = Layer(nn.jit(nn.Dense), name=f"layer_{i}")(x)
            return x
        layer = nn.remat(Layer) if "remat" in self.transform else Layer
        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="layers")(x, None)[0]


def setting(transform="scan", targets=r".*/(op|loop/w)"):
    model = Net(transform)
    params = parameters(model, X)
    peft = Scaled(targets=targets).bind(model, params, X)
    return model, params, peft, numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)), 0.3)


@pytest.mark.parametrize("transform", ["scan", "scan, remat", "jit"])
def test_every_way_to_run_it_is_running_the_merged_model(transform):
    model, params, peft, adapter = setting(transform)
    assert {site.via for site in peft.sites} == {"fused", "box"}

    @jax.jit
    def run(params, adapter):
        full = jpeft.combine(params, adapter)
        with peft.intercept():
            inside = model.apply({"params": peft.overlay(params, adapter)}, X)
        ways = [peft.apply(params, adapter, X), peft.module.apply({"params": full}, X), inside]
        ways.append(peft.module.bind({"params": full})(X))
        return ways, model.apply({"params": peft.merge(params, adapter)}, X)

    # Twice, and differentiated: a module under nn.jit must not keep what it captured in another trace.
    for scale in (1.0, 2.0):
        ways, merged = run(params, jax.tree.map(lambda x, s=scale: s * x, adapter))
        for y in ways:
            close(y, merged)
    eager = [peft.apply(params, jax.tree.map(lambda x, s=s: s * x, adapter), X) for s in (1.0, 2.0)]
    close(eager[1], merged)
    assert differ(*eager)
    got = jax.grad(lambda a: jnp.sin(peft.apply(params, a, X)).sum())(adapter)
    want = jax.grad(lambda a: jnp.sin(model.apply({"params": peft.merge(params, a)}, X)).sum())(adapter)
    jax.tree.map(close, got, want)


def test_the_plain_tree_under_the_bare_interceptor_is_refused():
    model, params, peft, adapter = setting(targets=r".*/op")
    with (
        peft.intercept(),
        pytest.raises(ValueError, match=r"'layers/op' has leaves that other sites share .* peft\.overlay"),
    ):
        model.apply({"params": jpeft.combine(params, adapter)}, X)


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all arrays in a program, those of its inner ones too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from shapes(inner)


def test_no_program_holds_them_more_than_once():
    _, params, peft, adapter = setting(targets=r".*/op")
    axes = peft.axes(adapter)
    many = jax.tree.map(
        lambda axis, x: x if axis is None else jnp.stack([x] * MANY), axes, adapter, is_leaf=lambda axis: axis is None
    )
    leaves = flatten(many)
    assert leaves["scaled", "a"].shape == (WIDTH, RANK)
    assert leaves["layers", "op", "d"].shape == (MANY, LAYERS, RANK)
    traced = jax.make_jaxpr(jax.vmap(peft.apply, in_axes=(None, axes, None)))(params, many, X)
    stacked = {s for s in shapes(traced.jaxpr) if s[-2:] == (WIDTH, RANK) and s[:1] == (LAYERS,)}
    assert not stacked
    ys = jax.vmap(peft.apply, in_axes=(None, axes, None))(params, many, X)
    close(ys, jnp.stack([peft.apply(params, adapter, X)] * MANY))


def test_two_adapted_models_in_one_call_keep_their_own():
    _, params, peft, adapter = setting(targets=r".*/op")
    other = jax.tree.map(lambda x: -x, adapter)

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return PeftModule(peft, name="one")(x), PeftModule(peft, name="two")(x)

    full = {"one": jpeft.combine(params, adapter), "two": jpeft.combine(params, other)}
    one, two = Both().apply({"params": full}, X)
    close(one, peft.apply(params, adapter, X))
    close(two, peft.apply(params, other, X))
    assert differ(one, two)


def test_they_compute_in_float32_in_a_model_that_computes_in_bfloat16():
    class Low(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, dtype=jnp.bfloat16, name="op")(x)

    params = parameters(Low(), X)
    peft = Scaled(targets="op").bind(Low(), params, X)
    adapter = numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), params)), 0.3)
    y = peft.apply(params, adapter, X)  # Scaled.expand asserts its dtypes
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float32),
        Low().apply({"params": peft.merge(params, adapter)}, X).astype(jnp.float32),
        atol=0.05,
    )
