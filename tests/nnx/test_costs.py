"""What methods on NNX models cost: bytes, products, traces."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from tests.contract import differ
from tests.nnx.models import Experts, Lookup, One, rngs
from tests.zoo import numbers

WIDTH, INNER, COUNT = 64, 256, 8
LORA = jpeft.LoRA(rank=2, targets=r".*")
X = np.random.default_rng(0).normal(size=(1, 4, WIDTH)).astype(np.float32)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, INNER, rngs=rngs), nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Raw(nnx.Module):
    """As `Layer`, with weights that are no layers."""

    def __init__(self, rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, INNER)) * 0.1)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (INNER, WIDTH)) * 0.1)

    def __call__(self, x):
        return x + nnx.gelu(x @ self.up[...]) @ self.down[...]


class Stacked(nnx.Module):
    """Stacked layers that a scan runs."""

    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=COUNT)(nnx.vmap(Layer, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Listed(nnx.Module):
    def __init__(self, rngs, layer):
        self.layers = nnx.List([layer(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return 2 * x


# --- bytes ------------------------------------------------------------------------------------------------------------


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_each_further_adapter_of_a_program_costs_its_own_bytes_alone():
    model = Stacked(rngs())
    params, peft = nnx.state(model, nnx.Param), LORA.bind(model, X)
    adapter = peft.init(jax.random.key(0), params)
    own = size(adapter)
    assert own < size(params) / 10

    def memory(adapters, run):
        found = jax.jit(run).lower(params, adapters).compile().memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes

    def each(params, adapters):
        return [peft.apply(params, own, X) for own in adapters]

    def mapped(params, adapters):
        return jax.vmap(lambda own: peft.apply(params, own, X))(adapters)

    stacked = {n: jax.tree.map(lambda x, n=n: jnp.stack([x] * n), adapter) for n in (1, 3)}
    for few, many, run in (([adapter], [adapter] * 3, each), (stacked[1], stacked[3], mapped)):
        (one, temporaries), (three, more) = memory(few, run), memory(many, run)
        assert one == size(params) + own and three == one + 2 * own
        # No copy of the stacked weights: those of one layer, and activations.
        assert temporaries < size(params) / 4 and more < temporaries + size(params) / 4


@pytest.mark.usefixtures("standard_promotion")  # for optax
def test_attached_copies_share_the_arrays_of_the_model_also_after_steps():
    model = Stacked(rngs())
    peft = LORA.bind(model, X)
    adapters = [numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), model)), 0.1, seed) for seed in range(2)]
    copies = [jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)[0] for adapter in adapters]
    base = nnx.to_flat_state(nnx.state(model))

    def share(tuned):
        held = dict(nnx.to_flat_state(nnx.state(tuned)))
        return all(held[path].get_raw_value() is x.get_raw_value() for path, x in base)

    assert all(share(tuned) for tuned in copies)

    # By default nnx.jit gives a module new arrays for all that it holds.
    @functools.partial(nnx.jit, graph_updates=False)
    def step(tuned, optimizer):
        grads = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, jpeft.nnx.AdapterParam))(tuned)
        optimizer.update(tuned, grads)

    before = [jax.tree.map(np.array, peft.adapter(tuned)) for tuned in copies]
    for tuned in copies:
        optimizer = nnx.Optimizer(tuned, optax.sgd(1e-4), wrt=jpeft.nnx.AdapterParam)
        for _ in range(2):
            step(tuned, optimizer)
    assert all(share(tuned) for tuned in copies)
    for tuned, old in zip(copies, before, strict=True):
        assert all(jax.tree.leaves(jax.tree.map(differ, peft.adapter(tuned), old)))


# --- products ---------------------------------------------------------------------------------------------------------

LISTS = {"layers": lambda: Listed(rngs(), Layer), "raw weights": lambda: Listed(rngs(), Raw)}


@pytest.mark.parametrize("kind", [*LISTS, "a scan"])
def test_a_step_takes_the_products_of_lora_alone(kind):
    x = jnp.ones((8, 32, WIDTH))
    model = (LISTS | {"a scan": lambda: Stacked(rngs())})[kind]()
    peft, params = LORA.bind(model, x), nnx.state(model, nnx.Param)
    assert {site.via for site in peft.sites} == {"fused"}

    def flops(loss, *args):
        return jax.jit(jax.grad(loss)).lower(*args).compile().cost_analysis()["flops"]

    graphdef = nnx.graphdef(model)
    full = flops(lambda p: (nnx.merge(graphdef, p)(x) ** 2).sum(), params)
    functional = flops(lambda a, p: (peft.apply(p, a, x) ** 2).sum(), peft.init(jax.random.key(0), params), params)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs())
    definition, trained, rest = nnx.split(tuned, nnx.LoRAParam, ...)
    stateful = flops(lambda a, r: (nnx.merge(definition, a, nnx.clone(r))(x) ** 2).sum(), trained, rest)
    assert functional == stateful
    # Products of the weights forward and for the gradients of inputs, which in a scan the first weight has too, and
    # LoRA's own; all, in addition those for the gradients of the weights.
    rank, weight, inputs = 2, WIDTH * INNER, 1 if kind == "a scan" else 3 / 4
    least = ((1 + inputs) * weight + 3 * rank * (WIDTH + INNER)) / ((2 + inputs) * weight)
    assert functional / full <= 1.01 * least, (functional / full, least)


# --- traces -----------------------------------------------------------------------------------------------------------

UNBOXED = {
    "layers": (lambda: Listed(rngs(), Layer), X),
    "a scan": (lambda: Stacked(rngs()), X),
    "raw experts": (lambda: One(Experts(rngs())), np.ones((3, 5, 8), np.float32)),
    "a table that is read twice": (lambda: Lookup(rngs()), np.arange(6).reshape(2, 3)),
}


@pytest.mark.parametrize("name", UNBOXED)
def test_binding_traces_the_model_once_and_compiles_nothing(name, caplog):
    make, x = UNBOXED[name]
    model, calls = make(), []

    class Counted(type(model)):
        def __call__(self, *args):
            calls.append(args)
            return super().__call__(*args)

    model.__class__ = Counted
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        peft = LORA.bind(model, x)
        compiled = [record.message for record in caplog.records if "ompil" in record.message]
        jax.block_until_ready(jax.jit(lambda x: x + len(calls))(jnp.ones(3)))
    assert len(calls) == 1 and isinstance(calls[0][0], jax.core.Tracer)
    assert not compiled and any("Compiling" in record.message for record in caplog.records)
    assert peft.sites
