"""A method may change the arguments and the outputs of the model's own call, in whichever way that runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core.entering import continuing
from jpeft.core.nested import first_array, replace_first
from jpeft.methods import OutputMethod

pytestmark = pytest.mark.usefixtures("quick_compiles")


@dataclass(frozen=True, kw_only=True)
class Shifted(OutputMethod):
    """Adds its own argument ``shift`` to the input, takes it off the outputs again, and doubles a module's output."""

    arguments: ClassVar[tuple[str, ...]] = ("shift",)
    reads_context: ClassVar[bool] = True

    def init(self, key, site, w):
        return {"scale": jnp.ones((site.outputs,))}

    def apply(self, leaves, x, y, context):
        return y * leaves["scale"] * context["double"]

    def enter(self, inputs):
        shift = inputs.context.get("shift", 0.0)
        return {**inputs.arguments, "x": inputs.arguments["x"] + shift}, {"double": 2.0, "plain": inputs.outputs()}

    def leave(self, output, context):
        assert jax.tree.map(jnp.shape, context["plain"]) == jax.tree.map(jnp.shape, output)
        return jax.tree.map(lambda y: y - context.get("shift", 0.0), output)


class Net(nn.Module):
    mode: str = "plain"

    @nn.compact
    def __call__(self, x, factor=1.0):
        layer = {"plain": nn.Dense, "remat": nn.remat(nn.Dense), "jit": nn.jit(nn.Dense)}[self.mode]
        return {"y": layer(4, name="hidden")(x) * factor, "aux": (x.sum(-1),)}


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)


def bound(mode="plain"):
    model = Net(mode)
    params = model.init(jax.random.key(0), X)["params"]
    peft = Shifted(targets="hidden").bind(model, params, X, shift=1.0)
    return model, params, peft, peft.init(jax.random.key(1), params)


def expected(params, shift, factor=1.0):
    x, w = np.asarray(X, np.float64) + shift, params["hidden"]
    y = (x @ np.asarray(w["kernel"], np.float64) + np.asarray(w["bias"])) * 2 * factor
    return {"y": y - shift, "aux": (x.sum(-1) - shift,)}


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


@pytest.mark.parametrize("mode", ["plain", "remat", "jit"])
def test_the_model_gets_the_changed_arguments_and_the_caller_the_changed_outputs(mode):
    _, params, peft, adapter = bound(mode)
    close(peft.apply(params, adapter, X, shift=3.0), expected(params, 3.0))
    close(peft.apply(params, adapter, x=X), expected(params, 0.0))
    close(jax.jit(peft.apply)(params, adapter, X, factor=2.0, shift=3.0), expected(params, 3.0, 2.0))


def test_the_module_and_the_bare_interceptor_do_so_too():
    model, params, peft, adapter = bound()
    full = jpeft.combine(params, adapter)
    close(peft.module.apply({"params": peft.overlay(params, adapter)}, X, shift=3.0), expected(params, 3.0))
    close(peft.module.apply({"params": full}, X, shift=3.0), expected(params, 3.0))
    with peft.intercept():
        close(model.apply({"params": peft.overlay(params, adapter)}, X, shift=3.0), expected(params, 3.0))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return type(peft.module)(peft, name="inner")(x, shift=3.0)

    y = Outer().apply({"params": {"inner": full}}, X)
    close(y, expected(params, 3.0))


def test_gradients_pass_through():
    _, params, peft, adapter = bound()
    grads = jax.grad(lambda a: peft.apply(params, a, X, shift=3.0)["y"].sum())(adapter)
    np.testing.assert_allclose(grads["hidden"]["scale"], (expected(params, 3.0)["y"] + 3).sum(0), rtol=1e-5)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, factor=1.0):
        return {"y": self.hidden(x) * factor, "aux": (x.sum(-1),)}


def test_on_nnx_functional_and_attached():
    model = NnxNet(nnx.Rngs(0))
    params = {"hidden": {"kernel": model.hidden.kernel[...], "bias": model.hidden.bias[...]}}
    method = Shifted(targets="hidden")
    peft = method.bind(model, X)
    adapter = peft.init(jax.random.key(1), model)
    close(peft.apply(model, adapter, X, shift=3.0), expected(params, 3.0))
    close(jax.jit(lambda a, s: peft.apply(model, a, X, 2.0, shift=s))(adapter, 3.0), expected(params, 3.0, 2.0))
    tuned, _ = jpeft.nnx.attach(model, method, X, rngs=nnx.Rngs(1))
    close(tuned(X, shift=3.0), expected(params, 3.0))
    close(nnx.jit(lambda m, x: m(x, shift=3.0))(tuned, X), expected(params, 3.0))


def test_arguments_that_the_model_does_not_take_are_its_own_error():
    _, params, peft, adapter = bound()
    with pytest.raises(TypeError, match="other"):
        peft.apply(params, adapter, X, other=1)


@dataclass(frozen=True, kw_only=True)
class Seen(OutputMethod):
    """Tells what it finds in the context."""

    reads_context: ClassVar[bool] = True

    def init(self, key, site, w):
        return {"zero": jnp.zeros(())}

    def apply(self, leaves, x, y, context: Mapping[str, Any]):
        return y + 10.0 * context["cached"] + 100.0 * context["continues"]


class Cached(nn.Module):
    @nn.compact
    def __call__(self, ids, cache=None):
        return nn.Embed(5, 2, embedding_init=nn.initializers.zeros, name="embed")(ids)


def test_a_call_of_one_token_continues_a_cache_unless_it_is_told_otherwise():
    model, ids, cache = Cached(), jnp.ones((1, 3), jnp.int32), {"key": jnp.zeros(2)}
    params = model.init(jax.random.key(0), ids)["params"]
    peft = Seen(targets="embed").bind(model, params, ids)
    adapter = peft.init(jax.random.key(0), params)

    def seen(ids, cache=None):
        return float(peft.apply(params, adapter, ids, cache).max())

    assert [seen(ids), seen(ids, cache), seen(ids[:, :1]), seen(ids[:, :1], cache)] == [0, 10, 0, 110]
    with continuing():
        assert [seen(ids, cache), seen(ids)] == [110, 0]
    with continuing(False):
        assert seen(ids[:, :1], cache) == 10


def test_the_first_array_is_the_least_nested_floating_one():
    y, flat = np.ones((2, 3)), np.zeros(1)
    assert first_array(({"key": flat}, y)) is y
    assert first_array((1.0, np.float32(2), np.arange(3), [y, flat])) is y
    assert first_array({"ids": np.arange(3)}) is None
    assert first_array((None, {"ids": (ids := np.arange(3))}), floating=False) is ids

    cache = {"key": flat}
    out = replace_first((cache, y, "name"), 2 * y)
    assert out[0] is cache and out[2] == "name" and out[1].max() == 2

    nested = replace_first(((y, cache), None), flat)
    assert nested[0][0] is flat and nested[0][1] is cache and nested[1] is None
