"""AdaLoRA's budget against its paper's equations, written out in numpy and float64. See also tests/parity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core.tree import flatten, map_with_path
from jpeft.methods import AdaLoRA
from jpeft.training.optimizers import allocate_ranks
from tests.zoo import numbers

LAYERS, RANK, RATE = 3, 4, 0.05
X = jnp.ones((2, 6))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(6, name="dense")(x), None


class Model(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS)
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(2, name="other")(nn.Dense(4, name="head")(x))


def bound(axis=0, **fields):
    model = Model(axis)
    params = numbers(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    method = jpeft.Chain(AdaLoRA(rank=RANK, targets=["dense", "head"], **fields), jpeft.LoRA(rank=2, targets="other"))
    return method.bind(model, params, X), params


class Budget:
    """Of matrices, each a dict of arrays ``a [in, r]``, ``e [r]`` and ``b [r, out]``."""

    def __init__(self, matrices, target, initial, last, interval):
        self.smooth = [{k: np.zeros_like(x) for k, x in m.items()} for m in matrices]
        self.spread = [{k: np.zeros_like(x) for k, x in m.items()} for m in matrices]
        self.whole, self.target = RANK * len(matrices), target * len(matrices)
        self.initial, self.last, self.interval = initial, last, interval

    def step(self, number, matrices, gradients):
        if number < self.last:
            for n, (values, grads) in enumerate(zip(matrices, gradients, strict=True)):
                for k, x in values.items():
                    now = np.abs(x * grads[k])
                    self.smooth[n][k] = 0.85 * self.smooth[n][k] + 0.15 * now
                    self.spread[n][k] = 0.85 * self.spread[n][k] + 0.15 * np.abs(now - self.smooth[n][k])
        if number <= self.initial or (number < self.last and number % self.interval):
            return
        scores = []
        for smooth, spread in zip(self.smooth, self.spread, strict=True):
            a, e, b = (smooth[k] * spread[k] for k in "aeb")
            scores.append([e[k] + a[:, k].mean() + b[k].mean() for k in range(RANK)])
        rest = max(0.0, 1 - (number - self.initial) / (self.last - self.initial))
        kept = int((self.whole - self.target) * rest**3 + self.target)
        limit = sorted(np.ravel(scores))[self.whole - kept - 1]
        for values, own in zip(matrices, scores, strict=True):
            values["e"][np.asarray(own) <= limit] = 0


@pytest.mark.parametrize("axis, layers", [(0, (0, 2)), (1, None)])
def test_budget(axis, layers):
    peft, params = bound(axis, overrides={"dense": {"layers": layers}} if layers else {})
    tx = allocate_ranks(
        peft, optax.sgd(RATE), total_steps=14, target_rank=2, initial_steps=2, final_steps=3, interval=2
    )
    rng, frozen = np.random.default_rng(0), peft.non_trainable_paths
    adapter = peft.init(jax.random.key(0), params)

    def draw():
        return map_with_path(lambda p, x: x if p in frozen else jnp.asarray(rng.normal(size=x.shape), "f4"), adapter)

    def trained(tree):
        return jpeft.partition(tree, peft.labels(tree))[0]

    def matrices(tree):
        """Those on which AdaLoRA acts."""
        head = {path[-1][-1]: x for path, x in flatten(tree).items() if path[0] == "head"}
        stack = {
            path[-1][-1]: np.moveaxis(x, axis, 0)
            for path, x in flatten(tree).items()
            if "adalora" in path[-1] and path[0] == "layers"
        }
        return [{k: np.array(x, np.float64) for k, x in own.items()} for own in (
            head, *({k: x[n] for k, x in stack.items()} for n in layers or range(LAYERS))
        )]  # fmt: skip

    values = trained(draw())
    ours, state, update = matrices(values), tx.init(values), jax.jit(tx.update)
    budget = Budget(ours, target=2, initial=2, last=11, interval=2)
    for number in range(18):
        grads = trained(draw())
        updates, state = update(grads, state, values)
        before, values = values, optax.apply_updates(values, updates)
        for own, grad in zip(ours, matrices(grads), strict=True):
            for k in own:
                own[k] -= RATE * grad[k]
        budget.step(number, ours, matrices(grads))
        for own, got in zip(ours, matrices(values), strict=True):
            for k in own:
                np.testing.assert_allclose(got[k], own[k], atol=1e-5)
            np.testing.assert_array_equal(got["e"] == 0, own["e"] == 0)
        lora = values["other"]["lora_a"] - before["other"]["lora_a"]
        np.testing.assert_allclose(lora, -RATE * grads["other"]["lora_a"], atol=1e-6)
    assert sum((own["e"] == 0).sum() for own in ours) == 2 * len(ours)
    held = {path: x.shape for path, x in flatten(state.sensitivity).items()}
    assert held["other", "lora_a"] == () and held["head", "adalora_a"] == (6, RANK)


@pytest.mark.parametrize("fields, expected", [
    ({"total_steps": 10, "target_rank": 4}, "target_rank must be positive and below the mean rank, 4, got 4"),
    ({"total_steps": 10, "target_rank": 0}, "target_rank must be positive"),
    ({"total_steps": 10, "target_rank": 2, "initial_steps": 6, "final_steps": 4}, "got 6 and 4 of 10"),
    ({"total_steps": 10, "target_rank": 2, "final_steps": -1}, "got 0 and -1 of 10"),
    ({"total_steps": 10, "target_rank": 2, "interval": 0}, "interval must be positive"),
    ({"total_steps": 10, "target_rank": 2, "beta2": 1.0}, r"betas in \(0, 1\)"),
])  # fmt: skip
def test_bad_budgets(fields, expected):
    with pytest.raises(ValueError, match=expected):
        allocate_ranks(bound()[0], optax.sgd(RATE), **fields)


def test_a_budget_needs_triples():
    model = Model(0)
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match="needs an AdaLoRA in the bound method"):
        allocate_ranks(jpeft.LoRA(targets="head").bind(model, params, X), optax.sgd(RATE), total_steps=2)
