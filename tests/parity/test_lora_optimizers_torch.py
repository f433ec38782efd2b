"""Optimizers for LoRA's factors against HuggingFace PEFT's in torch, over several steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer, lorafa

import jpeft
from jpeft.training.optimizers.lora_fa import lora_fa
from jpeft.training.optimizers.lora_plus import lora_plus
from jpeft.training.optimizers.riemannian import riemannian

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("standard_promotion")]
LAYERS, SIZE, RANK, STEPS, RATE = 2, 6, 2, 4, 1e-2
rng = np.random.default_rng(0)
W = rng.normal(0, 0.5, (LAYERS, SIZE, SIZE)).astype(np.float32)
A = rng.normal(0, 0.5, (LAYERS, SIZE, RANK)).astype(np.float32)
B = rng.normal(0, 0.5, (LAYERS, RANK, SIZE)).astype(np.float32)
X = rng.normal(0, 1, (8, SIZE)).astype(np.float32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(SIZE, use_bias=False, name="dense")(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="layers")(x, None)[0]


def in_torch(make):
    """A and B of every layer after some steps, ``[layers, in, r]`` and ``[layers, r, out]``."""
    layers = [torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)]
    config = LoraConfig(r=RANK, lora_alpha=3, target_modules=["0", "2"])
    net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh())
    for layer, w in zip(layers, W, strict=True):
        layer.weight.data = torch.tensor(w.T.copy())
    net = get_peft_model(net, config)
    adapted = [net.base_model.model[n] for n in (0, 2)]
    for layer, a, b in zip(adapted, A, B, strict=True):
        layer.lora_A["default"].weight.data = torch.tensor(a.T.copy())
        layer.lora_B["default"].weight.data = torch.tensor(b.T.copy())
    tx = make(net)
    for _ in range(STEPS):
        tx.zero_grad()
        (net(torch.tensor(X)) ** 2).mean().backward()
        tx.step()
    return [
        np.stack([getattr(m, n)["default"].weight.detach().numpy().T for m in adapted]) for n in ("lora_A", "lora_B")
    ]


def here(make, masked, **options):
    """The same by `jpeft.train_step` or, ``masked``, in a loop that carries the whole tree."""
    model, params, x = Model(), {"layers": {"dense": {"kernel": jnp.asarray(W)}}}, jnp.asarray(X)
    peft = jpeft.LoRA(rank=RANK, alpha=3, targets=r".*dense", **options).bind(model, params, x)
    adapter = {"layers": {"dense": {"lora_a": jnp.asarray(A), "lora_b": jnp.asarray(B)}}}
    tx = make(peft, adapter)

    def loss(adapter):
        return (peft.apply(params, adapter, x) ** 2).mean()

    if masked:
        tx = jpeft.masked(tx, peft.labels(adapter))
        state = tx.init(adapter)
        for _ in range(STEPS):
            updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
            adapter = optax.apply_updates(adapter, updates)
    else:
        step = jpeft.train_step(peft, lambda adapter, *_: (loss(adapter), {}), tx)
        state = jpeft.TrainState.create(peft, adapter, tx, jax.random.key(0))
        for _ in range(STEPS):
            state, _ = step(state, params, jnp.zeros(1))
        adapter = state.adapter
    return [np.asarray(adapter["layers"]["dense"][n]) for n in ("lora_a", "lora_b")]


def close(got, want):
    for g, w, start in zip(got, want, (A, B), strict=True):
        print(f"max difference {np.abs(g - w).max():.1e}, moved {np.abs(w - start).max():.1e}")
        np.testing.assert_allclose(g, w, atol=2e-5)


def adam(rate=RATE, **options):
    return optax.adam(rate, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_riemannian_gradients(masked):
    want = in_torch(lambda net: create_riemannian_optimizer(net, torch.optim.Adam, lr=RATE, reg=1e-2))
    close(here(lambda peft, _: optax.chain(riemannian(peft), adam()), masked), want)
    want = in_torch(lambda net: create_riemannian_optimizer(net, torch.optim.SGD, lr=RATE, reg=0.1))
    close(here(lambda peft, _: optax.chain(riemannian(peft, 0.1), optax.sgd(RATE)), masked), want)


@pytest.mark.parametrize("masked", [False, True])
def test_lora_fa_gradients(masked, monkeypatch):
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would multiply in bfloat16

    def theirs(net):
        tx = create_lorafa_optimizer(net, r=RANK, lora_alpha=3, lr=RATE)
        tx.param_groups[0]["eps"] = 1e-30  # its Adam adds epsilon before the correction of the second moment
        return tx

    want = in_torch(theirs)
    got = here(lambda peft, adapter: optax.chain(lora_fa(peft, adapter), adam(eps=1e-30)), masked, freeze_a=True)
    np.testing.assert_array_equal(got[0], A)
    close(got, want)


def test_a_frozen_a_without_the_correction_is_another_path():
    corrected = here(lambda peft, adapter: optax.chain(lora_fa(peft, adapter), optax.sgd(RATE)), False, freeze_a=True)
    plain = here(lambda peft, adapter: optax.sgd(RATE), False, freeze_a=True)
    assert np.abs(corrected[1] - plain[1]).max() > 1e-3


def test_each_needs_the_factors_that_it_is_for():
    model, params, x = Model(), {"layers": {"dense": {"kernel": jnp.asarray(W)}}}, jnp.asarray(X)
    trained = jpeft.LoRA(targets=r".*dense", rank=RANK).bind(model, params, x)
    frozen = jpeft.LoRA(targets=r".*dense", rank=RANK, freeze_a=True).bind(model, params, x)
    adapter = trained.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="of which A and B both train"):
        riemannian(frozen)
    with pytest.raises(ValueError, match=r"LoRA\(freeze_a=True\)"):
        lora_fa(trained, adapter)
    tx = riemannian(trained)
    with pytest.raises(ValueError, match="needs the adapter"):
        tx.update(adapter, tx.init(adapter))
    assert lora_plus(2.0).update(adapter, ())[0]["layers"]["dense"]["lora_b"].shape == (LAYERS, RANK, SIZE)
