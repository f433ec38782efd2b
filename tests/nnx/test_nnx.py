"""Methods on NNX models, functional and stateful."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.core.tree import flatten
from tests.contract import close, differ
from tests.nnx import models
from tests.nnx.models import LAYERS, MODELS, STACKS, Attention, One, Stack, X, moved, rngs
from tests.zoo import same

LORA = jpeft.LoRA(rank=2, targets=r".*")


def loss_of(y):
    return jnp.sin(y).sum()


@pytest.mark.parametrize("name", MODELS)
def test_functional_stateful_and_merged_are_one_model(name):
    make, x = MODELS[name]
    model = make()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    params, peft = nnx.state(model, nnx.Param), LORA.bind(model, x)
    adapter = moved(peft, params)
    assert {site.via for site in peft.sites} == ({"fused"} if name in LAYERS | STACKS else {"box"})

    @jax.jit
    def functional(params, adapter):
        def loss(adapter):
            y = peft.apply(params, adapter, x)
            return loss_of(y), y

        return jax.grad(loss, has_aux=True)(adapter)

    grads, y = functional(params, adapter)
    merged = peft.merge(model, adapter)
    assert type(merged) is type(model)
    close(y, merged(x))
    assert differ(y, model(x))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))

    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)

    @nnx.jit
    def stateful(tuned):
        def loss(tuned):
            y = tuned(x)
            return loss_of(y), y

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(tuned)

    found, z = stateful(tuned)
    np.testing.assert_array_equal(z, y)
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(grads))
    for path, grad in nnx.to_flat_state(found):
        np.testing.assert_array_equal(grad.get_raw_value(), flatten(grads)[tuple(map(str, path))])
    same(peft.adapter(tuned), adapter)
    plain = peft.detach(tuned)
    assert type(plain) is type(model) and not differ(plain(x), model(x))
    graphdef, state = nnx.split(tuned)
    close(nnx.merge(graphdef, state)(x), y)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("how", models.OPAQUE)
def test_weights_that_are_changed_before_their_layers_run_are_merged(how):
    model = Stack(rngs(), how)
    peft, params = LORA.bind(model, X), nnx.state(model, nnx.Param)
    assert {(site.via, site.stored[0]) for site in peft.sites} == {("merge", 3)}
    adapter = moved(peft, params)
    y = jax.jit(peft.apply)(params, adapter, X)
    close(y, peft.merge(model, adapter)(X))
    assert differ(y, model(X))
    with pytest.raises(
        ValueError, match=r"'layers/down' is not read as it is.*; use peft\.apply, or leave it out with exclude"
    ):
        jpeft.nnx.attach(model, peft, rngs=rngs())


METHODS = {
    "Bottleneck": jpeft.Bottleneck(targets=r".*layers/up", reduction=4),
    "BitFit": jpeft.BitFit(),
    "Chain": jpeft.Chain(jpeft.LoRA(rank=2), jpeft.BitFit()),
    "DoRA": jpeft.DoRA(rank=2, targets=r".*"),
    "VeRA": jpeft.VeRA(rank=4, targets=r".*"),
    "VBLoRA": jpeft.methods.VBLoRA(targets=r".*", num_vectors=8, vector_length=4, topk=2, rank=2),
    "SHiRA": jpeft.methods.SHiRA(rank=2, targets=r".*"),
    "OFT": jpeft.OFT(block_size=4, targets=r".*"),
    "IA3": jpeft.IA3(targets=r".*"),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_every_form_in_a_scan(method):
    model = Stack(rngs(), "nnx.scan, remat")
    peft = METHODS[method].bind(model, X)
    adapter = moved(peft, model)
    y = jax.jit(peft.apply)(nnx.state(model, nnx.Param), adapter, X)
    assert differ(y, model(X))
    if peft.mergeable:
        close(y, peft.merge(model, adapter)(X))
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    close(nnx.jit(lambda m, x: m(x))(tuned, X), y)
    held = {type(v) for _, v in nnx.to_flat_state(nnx.state(tuned)) if type(v).__module__ == "jpeft.nnx.variables"}
    assert (jpeft.nnx.FrozenAdapterParam in held) == bool(peft.non_trainable_paths)
    same(peft.adapter(tuned), adapter)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("reparametrize", [False, True])
def test_prefixes(stacked, reparametrize):
    model = Stack(rngs(), "nnx.scan", layer=Attention) if stacked else Attention(rngs())
    more = {"reparametrize": True, "hidden": 8, "embedding": 4} if reparametrize else {}
    peft = jpeft.PrefixTuning(length=2, **more).bind(model, X)
    adapter = moved(peft, model)
    y = peft.apply(model, adapter, X)
    assert differ(y, model(X))
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    close(tuned(X), y)


def test_a_prefix_is_kept_through_a_cache():
    model = One(nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs()))
    for method in (jpeft.LoRA(rank=2, targets=r".*"), jpeft.PrefixTuning(length=3)):
        peft = method.bind(model, X)
        tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=moved(peft, model))
        mask = nnx.make_causal_mask(X[..., 0])
        whole = tuned.layer(X, mask=mask)
        tuned.layer.init_cache(X.shape)
        step = nnx.jit(lambda m, x: m.layer(x, decode=True))
        close(jnp.concatenate([step(tuned, X[:, i : i + 1]) for i in range(X.shape[1])], 1), whole)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(self.norm(nnx.relu(self.a(x)))))


@pytest.mark.usefixtures("standard_promotion")  # for optax
def test_training_with_nnx_optimizer_moves_the_adapter_and_other_state_alone():
    model = Net(rngs())
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    method = jpeft.Chain(jpeft.LoRA(rank=2, targets=r".*"), jpeft.Train("b/bias"))
    tuned, peft = jpeft.nnx.attach(model, method, X, rngs=rngs(3))
    start = flatten(jax.tree.map(np.array, peft.adapter(tuned)))
    optimizer = nnx.Optimizer(tuned, optax.adam(1e-1), wrt=jpeft.nnx.AdapterParam)

    @nnx.jit
    def step(tuned, optimizer, x):
        def loss(tuned):
            return ((tuned(x) - 1.0) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, jpeft.nnx.AdapterParam))(tuned)
        optimizer.update(tuned, grads)
        return value

    losses = [float(step(tuned, optimizer, X)) for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert all(differ(new, start[path]) for path, new in flatten(peft.adapter(tuned)).items())
    assert differ(tuned.norm.mean[...], model.norm.mean[...])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tuned.eval()
    merged = peft.merge(peft.detach(tuned), peft.adapter(tuned))
    merged.eval()
    close(merged(X), tuned(X))


def test_other_state_comes_back_from_a_functional_call():
    model = Net(rngs())
    peft = LORA.bind(model, X)
    params, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    adapter = moved(peft, model)
    y, new = jax.jit(lambda p, a, r: peft.apply(p, a, X, rest=r, mutable=True))(params, adapter, rest)
    assert differ(new["norm"]["mean"].get_value(), model.norm.mean[...])
    assert not np.any(model.norm.mean[...])
    assert y.shape == X.shape


def test_dropout_differs_by_layer_call_and_key_and_is_off_where_the_model_evaluates():
    model = Stack(rngs(), "nnx.scan")
    peft = jpeft.LoRA(rank=2, targets=r".*up", dropout=0.5).bind(model, X)
    adapter, params = moved(peft, model), nnx.state(model, nnx.Param)
    run = jax.jit(lambda key: peft.apply(params, adapter, X, rngs={"dropout": key}))
    a, b, c = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    still = peft.apply(params, adapter, X)
    assert differ(a, c) and differ(a, still)

    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(4), adapter=adapter)
    call = nnx.jit(lambda m: m(X))
    assert differ(call(tuned), call(tuned))
    tuned.eval()
    close(call(tuned), still)
    np.testing.assert_array_equal(call(tuned), call(tuned))
    tuned.train()
    assert differ(call(tuned), still)


class Dropped(nnx.Module):
    def __init__(self):
        self.layer, self.drop = nnx.Linear(8, 8, rngs=rngs()), nnx.Dropout(0.5, rngs=rngs(1))

    def __call__(self, x, by_state=False):
        if by_state:
            return x @ nnx.state(self.layer)["kernel"][...]
        return self.drop(self.layer(x))


def test_keys_of_a_functional_call_are_for_the_models_dropout_too():
    model = Dropped()
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)
    a, b, c = (peft.apply(model, adapter, X, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert differ(a, c)
    assert model.drop.rngs.count[...] == 0


def test_an_adapters_dropout_has_the_models_mode():
    model, method = Dropped(), jpeft.LoRA(rank=2, targets=r".*", dropout=0.5, init_weights="random")
    tuned, peft = jpeft.nnx.attach(model, method, X, rngs=rngs())
    assert differ(tuned(X), tuned(X))
    still = nnx.view(tuned, deterministic=True)
    np.testing.assert_array_equal(still(X), still(X))
    assert differ(tuned(X), tuned(X))
    model.eval()
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs())
    np.testing.assert_array_equal(tuned(X), tuned(X))
    tuned.train()
    assert differ(tuned(X), tuned(X))


def test_a_call_that_would_not_see_the_change_is_refused():
    model = Dropped()
    model.eval()
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)
    with pytest.raises(ValueError, match=r"reads 'layer/kernel' in another way than the call that LoRA was bound with"):
        jax.jit(lambda a: peft.apply(model, a, X, by_state=True))(adapter)
    merged = LORA.bind(model, X, by_state=True)
    assert [site.via for site in merged.sites] == ["merge"]
    adapter = moved(merged, model)
    close(merged.apply(model, adapter, X, by_state=True), merged.merge(model, adapter)(X, by_state=True))


class Wrapped(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return jnp.tanh(self.inner(x))


class OverOneTrunk(nnx.Module):
    """Modules whose parameters are all of a module that both share."""

    def __init__(self):
        trunk = nnx.Linear(8, 8, rngs=rngs())
        self.actor, self.critic = Wrapped(trunk), Wrapped(trunk)

    def __call__(self, x):
        return self.actor(x) + 2 * self.critic(x)


def test_modules_over_one_trunk():
    model = OverOneTrunk()
    peft = jpeft.Chain(LORA, jpeft.Bottleneck(targets="actor", size=2)).bind(model, X)
    adapter = moved(peft, model)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    np.testing.assert_array_equal(tuned(X), peft.apply(model, adapter, X))
    lora = LORA.bind(model, X)
    close(lora.apply(model, moved(lora, model), X), lora.merge(model, moved(lora, model))(X))


def test_programs_are_told_apart_by_the_method():
    model, call = One(nnx.Linear(8, 8, rngs=rngs())), nnx.jit(lambda m: m.layer(X))
    changes = []
    for alpha in (1.0, 9.0):
        method = jpeft.LoRA(rank=2, alpha=alpha, targets=r".*", init_weights="random")
        tuned, _ = jpeft.nnx.attach(model, method, X, rngs=rngs(1))
        changes.append(call(tuned) - model.layer(X))
    close(changes[1], 9 * changes[0], 1e-4)


def test_stacked_adapters_are_mapped():
    model = Stack(rngs(), "nnx.scan")
    peft, params = LORA.bind(model, X), nnx.state(model, nnx.Param)
    adapters = [moved(peft, model, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    together = jax.jit(jax.vmap(lambda a: peft.apply(params, a, X)))(stacked)
    for own, y in zip(adapters, together, strict=True):
        close(y, peft.apply(params, own, X))


def test_copies_and_pickles_of_an_attached_module_are_equal():
    model = Stack(rngs(), "lax.scan")
    peft = LORA.bind(model, X)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=moved(peft, model))
    assert repr(peft) == f"NnxPeft({LORA!r}, bound to 2 sites of a Stack)"
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned)), nnx.clone(tuned)):
        np.testing.assert_array_equal(other(X), tuned(X))
    assert not differ(pickle.loads(pickle.dumps(peft.detach(tuned)))(X), model(X))


def test_what_cannot_be_right_is_refused():
    model = One(nnx.Linear(8, 6, rngs=rngs()))
    tuned, peft = jpeft.nnx.attach(model, LORA, X, rngs=rngs())
    with pytest.raises(ValueError, match="holds an adapter already"):
        jpeft.nnx.attach(tuned, LORA, X, rngs=rngs())
    with pytest.raises(ValueError, match="holds an adapter already"):
        LORA.bind(tuned, X)
    with pytest.raises(TypeError, match="has its parameters"):
        LORA.bind(model, nnx.state(model, nnx.Param), X)
    with pytest.raises(ValueError, match=r"'layer/bias' of shape \(5,\)"):
        jpeft.nnx.attach(One(nnx.Linear(8, 5, rngs=rngs())), peft, rngs=rngs())
    with pytest.raises(ValueError, match="no leaf 'layer/lora_a'"):
        peft.adapter(model)
    with pytest.raises(ValueError, match="the adapter lacks"):
        peft.apply(model, {}, X)


def test_new_values_for_the_base_reach_a_boxed_weight():
    make, x = models.BOXED["a shared Variable"]
    model = make()
    peft = LORA.bind(model, x)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=moved(peft, model))
    before = tuned(x)
    other = jax.tree.map(lambda v: v * 1.5, nnx.state(model, nnx.Param))
    nnx.update(tuned, other)
    close(tuned(x), peft.apply(other, peft.adapter(tuned), x))
    assert differ(tuned(x), before)


@pytest.mark.parametrize("method", ["LoRA", "VeRA", "SHiRA"])
def test_adapters_come_back_from_disk(method, tmp_path):
    model = Stack(rngs(), "nnx.scan")
    peft = {"LoRA": LORA, **METHODS}[method].bind(model, X)
    adapter = moved(peft, model)
    for given in (model, nnx.state(model, nnx.Param)):
        jpeft.save(tmp_path / "adapter", peft, adapter, given)
    again, loaded = jpeft.load(tmp_path / "adapter", model, X)
    assert again == peft
    same(loaded, adapter)


@pytest.mark.parametrize("how", ["loop", "nnx.scan, remat", "lax.scan"])
def test_over_a_quantized_base(how):
    model = Stack(rngs(), how)
    params = nnx.state(model, nnx.Param)
    base = jpeft.quantize(params, "nf4", model, X, block=8, targets=r".*(up|down)")
    assert isinstance(base, nnx.State) and jpeft.quantization.is_quantized(base)
    plain = jpeft.dequantize(base)
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)

    def loss(adapter, params):
        return loss_of(peft.apply(params, adapter, X))

    (a, of_a), (b, of_b) = (jax.jit(jax.value_and_grad(loss))(adapter, each) for each in (base, plain))
    close(a, b)
    jax.tree.map(close, of_a, of_b)


def test_statistics_of_data():
    model = Stack(rngs(), "nnx.scan")
    method = jpeft.LoRA(rank=2, targets=r".*up", init_weights="eva")

    def loss_fn(adapter, params, batch, rng):
        peft = LORA.bind(model, X)
        return (peft.apply(params, adapter, batch) ** 2).mean(), {}

    statistics = jpeft.observe(method, model, nnx.state(model, nnx.Param), loss_fn, [X, X + 1])
    peft = method.bind(model, X)
    adapter = peft.init(jax.random.key(0), model, statistics)
    assert adapter["layers"]["up"]["lora_a"].shape == (3, 8, 2)


@pytest.mark.parametrize("how", ["loop", "nnx.scan, remat", "lax.scan"])
def test_a_quantized_module_runs_unchanged_and_takes_an_adapter(how):
    model = Stack(rngs(), how)
    small = jpeft.quantize(model, "nf4", model, X, block=8, targets=r".*(up|down)")
    plain = jpeft.dequantize(small)
    close(nnx.jit(lambda m: m(X))(small), plain(X))
    assert differ(small(X), model(X)) and isinstance(small, Stack)
    peft = LORA.bind(small, X)
    tuned, _ = jpeft.nnx.attach(small, peft, rngs=rngs(), adapter=moved(peft, small))
    close(tuned(X), peft.apply(plain, peft.adapter(tuned), X))
    again = peft.detach(tuned)
    close(again(X), plain(X))
    merged = peft.merge(small, peft.adapter(tuned))
    close(merged(X), tuned(X))
