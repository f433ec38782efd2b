"""The two forms of a low-rank update: chosen by size, equal in value and in every derivative."""

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import backend
from jpeft.core.tree import flatten
from tests.zoo import moved

IN, OUT, SCALE = 24, 16, 2.0
FEW, MANY = 4, 96  # tokens for which x w + (x a) b is less work, and x (w + a b)


def numbers(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape), jnp.float32)


@pytest.fixture(autouse=True)
def cpu(monkeypatch, quick_compiles):
    """The forms of the CPU backend."""
    monkeypatch.setattr(backend, "flatten_tokens", lambda: True)


def bound(tokens, dense=None, method=None):
    model = nn.Sequential([dense or nn.Dense(OUT)])
    x = numbers((tokens, IN), 0)
    params = {"layers_0": {"kernel": numbers((IN, OUT), 1), "bias": numbers((OUT,), 2)}}
    method = method or jpeft.LoRA(rank=4, alpha=8, targets="layers_0", init_weights="random")
    peft = method.bind(model, params, x)
    return peft, params, moved(peft, params, scale=0.5), x


def products(fn, *args):
    """The shapes of all matrix products in a function: (left, right, contracted axes)."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (left, _), _ = eqn.params["dimension_numbers"]
                shapes = [v.aval.shape for v in eqn.invars]
                found.append((*shapes, shapes[0][left[0]]))
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(sub)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_value_and_derivatives_are_those_of_the_formula(tokens):
    peft, params, adapter, x = bound(tokens)
    t = numbers((tokens, OUT), 3)

    @jax.jit
    def run(adapter, params, x):
        y, pull = jax.vjp(lambda *args: peft.apply(args[1], args[0], args[2]), adapter, params, x)
        return peft.apply(params, adapter, x), y, pull(t)

    y, y_differentiated, (grads, base_grads, dx) = run(adapter, params, x)

    own, site = adapter["layers_0"], params["layers_0"]
    x, t, w, bias, a, b = (
        np.asarray(v, np.float64) for v in (x, t, site["kernel"], site["bias"], own["lora_a"], own["lora_b"])
    )

    def near(got, want):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    near(y, x @ w + bias + SCALE * x @ a @ b)
    near(y_differentiated, y)
    near(dx, t @ w.T + SCALE * t @ b.T @ a.T)
    near(grads["layers_0"]["lora_a"], SCALE * x.T @ t @ b.T)
    near(grads["layers_0"]["lora_b"], SCALE * a.T @ x.T @ t)
    near(base_grads["layers_0"]["kernel"], x.T @ t)
    near(base_grads["layers_0"]["bias"], t.sum(0))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_forward_mode_and_second_derivatives(tokens):
    peft, params, adapter, x = bound(tokens)
    direction = jax.tree.map(np.ones_like, adapter)
    cotangent = numbers((tokens, OUT), 5)

    @jax.jit
    def derivatives(adapter):
        def run(adapter):
            return peft.apply(params, adapter, x)

        def directional(adapter):
            return jax.jvp(run, (adapter,), (direction,))[1]

        _, pull = jax.vjp(run, adapter)
        return *jax.jvp(directional, (adapter,), (direction,)), pull(cotangent)[0]

    forward, second, backward = derivatives(adapter)
    inner = sum(np.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (direction, backward)), strict=True))
    np.testing.assert_allclose(np.vdot(forward, cotangent), inner, rtol=1e-4)
    # y is bilinear in A and B: along (1, 1) its second derivative is 2 s x 1 1.
    ones = (np.asarray(x, np.float64) @ np.ones((IN, 4))) @ np.ones((4, OUT))
    np.testing.assert_allclose(second, 2 * SCALE * ones, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_no_gradient_of_the_size_of_the_weight_is_made(tokens):
    peft, params, adapter, x = bound(tokens)
    gradient = jax.grad(lambda a, x: (peft.apply(params, a, x) ** 2).sum(), argnums=(0, 1))
    made = products(gradient, adapter, x)
    assert ((tokens, IN), (IN, OUT), IN) in made
    assert not [p for p in made if p[2] == tokens and {IN, OUT} <= {*p[0], *p[1]} - {tokens}]


def test_the_sum_of_weights_is_taken_only_where_it_is_less_work_and_rounds_no_worse(monkeypatch):
    def summed(**kwargs):
        peft, params, adapter, x = bound(**kwargs)
        run = lambda adapter: peft.apply(params, adapter, x)  # noqa: E731
        assert ((IN, 4), (4, OUT), 4) not in products(run, adapter)  # nor where nothing is differentiated
        return ((IN, 4), (4, OUT), 4) in products(lambda adapter: jax.vjp(run, adapter)[0], adapter)

    assert summed(tokens=MANY) and not summed(tokens=FEW)
    assert not summed(tokens=MANY, dense=nn.Dense(OUT, dtype=jnp.bfloat16))
    assert not summed(tokens=MANY, dense=nn.Dense(OUT, dot_general=jax.lax.dot_general))
    assert not summed(tokens=MANY, dense=nn.Dense(OUT, precision="highest"))
    after = jpeft.Chain(jpeft.IA3(targets="layers_0"), jpeft.LoRA(rank=4, targets="layers_0"))
    assert not summed(tokens=MANY, method=after)
    monkeypatch.setattr(backend, "flatten_tokens", lambda: False)
    assert not summed(tokens=MANY)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_stack_of_adapters_is_one_after_the_other(tokens):
    peft, params, _, x = bound(tokens)
    adapters = [moved(peft, params, scale=0.3, seed=seed) for seed in range(3)]
    value_and_grad = jax.value_and_grad(lambda adapter: (peft.apply(params, adapter, x) ** 2).sum())
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *adapters)
    many, one = jax.jit(jax.vmap(value_and_grad))(stacked), jax.jit(value_and_grad)
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, adapters))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3), many, want)


def test_dropout_acts_on_the_adapters_input_alone():
    method = jpeft.LoRA(rank=4, alpha=8, targets="layers_0", init_weights="random", dropout=0.5)
    peft, params, adapter, x = bound(MANY, method=method)
    zero = jax.tree.map(np.zeros_like, adapter)

    @jax.jit
    def run(key):
        quiet = peft.apply(params, adapter, x)
        dropped, base = (peft.apply(params, a, x, rngs={"dropout": key}) for a in (adapter, zero))
        return quiet, dropped, base, peft.model.apply({"params": params}, x)

    quiet, dropped, base, want = run(jax.random.key(1))
    assert np.abs(dropped - quiet).max() > 0.1
    np.testing.assert_allclose(base, want, rtol=1e-6, atol=1e-6)
    assert set(flatten(adapter)) == {("layers_0", "lora_a"), ("layers_0", "lora_b")}
