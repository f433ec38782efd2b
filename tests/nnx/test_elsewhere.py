"""Adapters that pass to and from other libraries: qwix's trees, and functions that are no Flax module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import qwix as exchange
from jpeft.core.tree import flatten
from jpeft.errors import AdapterError
from tests.contract import close, differ
from tests.nnx.models import X, moved, rngs
from tests.zoo import numbers


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.b = nnx.Einsum("btd,dnh->btnh", (16, 2, 4), rngs=rngs)
        self.c = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.c(jnp.tanh(self.b(jnp.tanh(self.a(x)))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of qwix
def test_adapters_of_qwix():
    qwix = pytest.importorskip("qwix")
    model = Net(rngs())
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
    with jax.numpy_dtype_promotion("standard"):
        theirs = qwix.apply_lora_to_model(model, provider, X, rngs=rngs(3))
        state = jax.tree.map(lambda x: x + 0.1, nnx.state(theirs, nnx.LoRAParam))
        nnx.update(theirs, state)
        want = theirs(X)
    peft, adapter = exchange.adopt(state, model, X, alpha=8.0)
    close(peft.apply(model, adapter, X), want)
    back = flatten(exchange.export(peft, adapter, state))
    found = {tuple(map(str, path)): v.get_raw_value() for path, v in nnx.to_flat_state(state)}
    assert back.keys() == found.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(back[path], x)


def test_what_is_no_adapter_of_qwix_is_refused():
    model = Net(rngs())
    peft = jpeft.LoRA(rank=2, targets=r".*").bind(model, X)
    adapter = moved(peft, model)
    with pytest.raises(AdapterError, match="holds no adapter of qwix"):
        exchange.adopt(adapter, model, X, alpha=1.0)
    with pytest.raises(AdapterError, match="no weight 'd/kernel'"):
        exchange.adopt({"d": {"kernel_lora_a": np.ones((8, 2))}}, model, X, alpha=1.0)
    with pytest.raises(AdapterError, match="lacks 'a/kernel_lora_b'"):
        exchange.adopt({"a": {"kernel_lora_a": np.ones((8, 2))}}, model, X, alpha=1.0)
    with pytest.raises(ValueError, match="like lacks it"):
        exchange.export(peft, adapter, {})
    dora = jpeft.DoRA(rank=2, targets="a").bind(model, X)
    with pytest.raises(ValueError, match="nothing for DoRA at 'a'"):
        exchange.export(dora, moved(dora, model), {})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A layer as Equinox has it: the weight is stored (out, in)."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight.T + self.bias


METHODS = {
    "LoRA": jpeft.LoRA(rank=2, targets=r".*weight"),
    "DoRA": jpeft.DoRA(rank=2, targets=r".*weight"),
    "IA3": jpeft.IA3(targets=r".*weight"),
    "BitFit": jpeft.BitFit(targets=r".*"),
}


@pytest.mark.parametrize("method", METHODS)
def test_functions_of_any_pytree(method, tmp_path):
    layers = [Layer(*numbers((jnp.zeros((8, 4)), jnp.zeros(8)))), Layer(*numbers((jnp.zeros((3, 8)), jnp.zeros(3))))]
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)

    def fn(layers, x):
        return layers[1](jnp.tanh(layers[0](x)))

    peft = METHODS[method].bind_function(fn, layers, x)
    assert {(s.name, s.inputs, s.outputs) for s in peft.sites if s.kind == "weight"} <= {
        ("0/weight", 4, 8), ("1/weight", 8, 3)
    }  # fmt: skip
    shapes = jax.eval_shape(lambda: peft.init(jax.random.key(0), layers))
    adapter = numbers(shapes, 0.3, 1)
    merged = peft.merge(layers, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(layers)
    y, grads = jax.jit(jax.value_and_grad(lambda a: peft.apply(layers, a, x).sum()))(adapter)
    close(y, fn(merged, x).sum(), 1e-5)
    assert differ(y, fn(layers, x).sum())
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(TypeError, match=r"got function; a function of parameters takes method\.bind_function"):
        METHODS[method].bind(fn, layers, x)
    jpeft.save(tmp_path / "adapter", peft, adapter, layers)
    for same_fn in (fn, jax.jit(fn)):
        loaded, leaves = jpeft.load(tmp_path / "adapter", same_fn, layers, x)
        close(loaded.apply(layers, leaves, x), fn(merged, x), 1e-5)
    again = METHODS[method].bind_function(fn, layers)  # without inputs, weights are as they are stored
    assert method == "BitFit" or {s.inputs for s in again.sites} == {8, 3}


def test_folders_of_huggingface(tmp_path):
    torch = pytest.importorskip("torch")
    peft_torch = pytest.importorskip("peft")

    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    model, twin = Mlp(rngs()), Twin()
    for own, theirs in zip(model.layers, twin.layers, strict=True):
        theirs.weight.data = torch.tensor(np.asarray(own.kernel[...]).T.copy())
        theirs.bias.data = torch.tensor(np.asarray(own.bias[...]).copy())
    for method in (jpeft.LoRA(rank=2, alpha=4, targets=r".*"), jpeft.DoRA(rank=2, targets=r".*")):
        peft = method.bind(model, X)
        adapter = moved(peft, model, 0.3)
        y = peft.apply(model, adapter, X)
        folder = tmp_path / type(method).__name__
        jpeft.hf.save(folder, peft, adapter, model)
        tuned = peft_torch.PeftModel.from_pretrained(Twin(), folder)
        tuned.base_model.model.load_state_dict(
            {k.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"): v
             for k, v in twin.state_dict().items()}, strict=False,
        )  # fmt: skip
        with torch.no_grad():
            close(y, tuned(torch.tensor(X)).numpy(), 1e-5)
        again, loaded = jpeft.hf.load(folder, model, X)
        close(again.apply(model, loaded, X), y, 1e-6)
