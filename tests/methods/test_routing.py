"""Poly, MoLE and X-LoRA: against the base with weights that numpy has merged, and against the experts by themselves."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import jpeft
from jpeft.core.tree import flatten, unflatten
from jpeft.methods import MoLE, Poly, XLoRA, with_experts
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.kv_cache import init_cache
from tests.contract import close, differ
from tests.zoo import moved, numbers, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

IDS = jnp.asarray(np.random.default_rng(0).integers(3, 40, (3, 7)))
TASKS = (2, 0, 2)
CONFIG = DecoderConfig(
    vocab_size=41, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None,
)  # fmt: skip
TARGETS = ["q_proj", "down_proj"]


@functools.cache
def decoder(boxed=False, **fields):
    model = Decoder(CONFIG, **fields)
    params = parameters(model, IDS)
    return model, params if boxed else meta.unbox(params)


def bound(method, model, params):
    peft = method.bind(model, params, IDS)
    return peft, moved(peft, params, 0.5)


# --- Poly -------------------------------------------------------------------------------------------------------------


def mixed_by_hand(model, params, peft, adapter, task, splits):
    """The base with the mixture of a task added to its weights, by numpy in float64."""
    tree, own = flatten(params), flatten(adapter)
    for site in peft.sites:
        a, b, z = (np.asarray(own[*site.path, f"poly_{name}"], np.float64) for name in ("a", "b", "router"))
        kernel = np.asarray(tree[site.weight_path], np.float64)
        for layer in range(len(kernel)):
            gates = 1 / (1 + np.exp(-z[layer, task].reshape(splits, -1)))
            gates /= gates.sum(-1, keepdims=True)
            whole_a = np.concatenate([np.tensordot(gates[q], a[layer, q], 1) for q in range(splits)], 0)
            whole_b = np.concatenate([np.tensordot(gates[q], b[layer, q], 1) for q in range(splits)], 1)
            kernel[layer] += whole_a @ whole_b / a.shape[-1]
        tree[site.weight_path] = jnp.asarray(kernel, jnp.float32)
    return unflatten(tree)


@pytest.mark.parametrize("remat", [pytest.param(None, marks=pytest.mark.exhaustive), "full"])
def test_each_row_runs_under_the_mixture_of_its_task(remat):
    model, params = decoder(remat=remat)
    peft, adapter = bound(Poly(rank=2, n_tasks=3, n_skills=3, n_splits=2, targets=TARGETS), model, params)

    @jax.jit
    def run(params, adapter, tasks):
        with peft.intercept():
            inside = model.apply({"params": peft.overlay(params, adapter)}, IDS, task_ids=tasks)
        full = {"params": jpeft.combine(params, adapter)}
        return peft.apply(params, adapter, IDS, task_ids=tasks), peft.module.apply(full, IDS, task_ids=tasks), inside

    by_task = [mixed_by_hand(model, params, peft, adapter, task, 2) for task in range(3)]
    want = jnp.stack([model.apply({"params": by_task[t]}, IDS[i : i + 1])[0] for i, t in enumerate(TASKS)])
    assert differ(want, model.apply({"params": params}, IDS))
    for y in run(params, adapter, jnp.array(TASKS)):
        close(y, want, 2e-5)
    close(peft.apply(params, adapter, IDS, task_ids=1), model.apply({"params": by_task[1]}, IDS), 2e-5)
    unknown = jnp.isnan(run(params, adapter, jnp.array([2, 3, -1]))[0]).any((1, 2))
    assert unknown.tolist() == [False, True, True]


def test_mixtures_are_sampled_while_the_caller_trains():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=False):
            return nn.Dense(6, name="op")(x)

    model, x = Net(), numbers(jax.ShapeDtypeStruct((400, 5, 4), jnp.float32))
    params = parameters(model, x)
    peft = Poly(rank=2, n_tasks=2, n_skills=2, targets="op").bind(model, params, x)
    tree = flatten(moved(peft, params))
    tree["op", "poly_b"] = tree["op", "poly_b"].at[:, 1].set(-tree["op", "poly_b"][:, 0])  # y = (2 w_1 - 1) of it
    tree["op", "poly_a"] = jnp.broadcast_to(tree["op", "poly_a"][:, :1], tree["op", "poly_a"].shape)
    tree["op", "poly_router"] = jnp.array([[1.5, -0.5], [60.0, 60.0]])
    adapter, base = unflatten(tree), model.apply({"params": params}, x)

    def factors(task, **kwargs):
        a, b = tree["op", "poly_a"][0, 0], tree["op", "poly_b"][0, 0]
        change = peft.apply(params, adapter, x, task_ids=jnp.full(400, task), **kwargs) - base
        whole = (x @ a) @ b / 2
        return np.asarray((change * whole).sum((1, 2)) / (whole * whole).sum((1, 2)))

    rng = {"dropout": jax.random.key(3)}
    found = factors(0, rngs=rng)
    # w_1 = s_1 / (s_1 + s_2) of two relaxed Bernoullis; a row's tokens have one sample
    u = np.random.default_rng(0).uniform(size=(2, 200_000))
    s = 1 / (1 + np.exp(-(np.array([[1.5], [-0.5]]) + np.log(u) - np.log1p(-u))))
    want = 2 * s[0] / s.sum(0) - 1
    assert abs(found.mean() - want.mean()) < 4 * want.std() / 20
    assert 0.85 < found.std() / want.std() < 1.15
    np.testing.assert_array_equal(found, factors(0, rngs=rng))
    sure = 1 / (1 + np.exp(-np.array([1.5, -0.5])))
    for off in ({}, {"rngs": rng, "deterministic": True}):
        np.testing.assert_allclose(factors(0, **off), 2 * sure[0] / sure.sum() - 1, atol=1e-5)
    np.testing.assert_allclose(factors(1, rngs=rng), 0, atol=1e-5)  # certain skills are sampled as certain


def test_a_batch_gives_no_gradient_to_the_tasks_that_it_lacks():
    model, params = decoder()
    peft, adapter = bound(Poly(rank=2, n_tasks=3, targets=TARGETS), model, params)
    loss = jax.jit(lambda a: jnp.sin(peft.apply(params, a, IDS, task_ids=jnp.array(TASKS))).sum())
    for path, g in flatten(jax.grad(loss)(adapter)).items():
        assert jnp.abs(g).max() > 0
        if path[-1] == "poly_router":  # [layers, tasks, skills]
            assert not g[:, 1].any() and g[:, 0].any() and g[:, 2].any()


def test_bad_tasks_and_weights_are_refused():
    model, params = decoder()
    peft, adapter = bound(Poly(rank=2, n_tasks=3, targets=TARGETS), model, params)
    for tasks, expected in [
        (None, "the call needs task_ids, which of the 3 tasks each row is of"),
        ([0, 3, 1], r"task_ids must be in 0\.\.2, of n_tasks=3, got 3"),
        ([0, -1, 1], r"task_ids must be in 0\.\.2, of n_tasks=3, got -1"),
        ([0, 1], r"task_ids are of 2 rows, and no argument of the model's call has so many: they are \[3, 7\]"),
        ([[0, 1, 2]], r"must be integers \[batch\], or one for all rows, got int32\[1, 3\]"),
        ([0.0, 1.0, 2.0], r"must be integers \[batch\], or one for all rows, got float32\[3\]"),
    ]:
        given = {} if tasks is None else {"task_ids": jnp.array(tasks)}
        with pytest.raises(ValueError, match=expected):
            peft.apply(params, adapter, IDS, **given)
    with pytest.raises(ValueError, match="'model/embed_tokens' is an embedding, whose tokens cannot be told apart"):
        Poly(targets="model/embed_tokens").bind(model, params, IDS)
    with pytest.raises(ValueError, match="is 20 x 16; n_splits must divide both, and is 3"):
        Poly(n_splits=3, targets=TARGETS).bind(model, params, IDS)

    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(4, name="op")(jnp.eye(x.shape[1], 4))

    model, x = Positions(), jnp.ones((3, 5, 4))
    params = parameters(model, x)
    peft, adapter = (peft := Poly(n_tasks=2, targets="op").bind(model, params, x)), moved(peft, params)
    with pytest.raises(ValueError, match=r"sees tokens \[5\], and which of them are of which of the 3 rows"):
        peft.apply(params, adapter, x, task_ids=jnp.array([0, 1, 0]))
    assert peft.apply(params, adapter, x, task_ids=1).shape == x.shape


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_weights_input_mixes_its_experts(top_k):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="op")(x)

    model, x = Net(), numbers(jax.ShapeDtypeStruct((2, 6, 4), jnp.float32), 1.0)
    params = parameters(model, x)
    method = MoLE(rank=2, alpha=3, n_experts=3, top_k=top_k, temperature=0.5, targets="op")
    peft = method.bind(model, params, x)
    own = moved(peft, params, 0.7)
    a, b, gate = (np.asarray(own["op"][f"mole_{n}"], np.float64) for n in ("a", "b", "gate"))
    tokens = np.asarray(x, np.float64)
    logits = tokens @ gate / 0.5
    if top_k:
        logits[logits < np.sort(logits, -1)[..., -top_k, None]] = -np.inf
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    change = sum(
        shares[..., i, None] * (tokens @ a[:, 2 * i : 2 * i + 2] @ b[2 * i : 2 * i + 2]) * 3 / 2 for i in range(3)
    )
    close(jax.jit(peft.apply)(params, own, x) - model.apply({"params": params}, x), change)


@functools.cache
def trained():
    """Three LoRAs of other ranks, scales, weights, layers and starts; and the outputs of each and of the base."""
    model, params = decoder()
    methods = [
        jpeft.LoRA(rank=2, alpha=3, targets=TARGETS),
        jpeft.LoRA(rank=1, targets=["q_proj"], overrides={"q_proj": {"layers": [1]}}),
        jpeft.LoRA(rank=1, rslora=True, init_weights="pissa", targets=["down_proj"]),
    ]
    loras = [bound(method, model, params) for method in methods]
    run = jax.jit(
        lambda params, adapters: [peft.apply(params, x, IDS) for (peft, _), x in zip(loras, adapters, strict=True)]
    )
    return loras, run(params, [adapter for _, adapter in loras]), model.apply({"params": params}, IDS)


def chosen(adapter, index, count):
    """A mixture's adapter whose gates choose one expert."""
    tree = flatten(adapter)
    for path, x in tree.items():
        if path[-1] in ("mole_gate", "xlora_head"):
            tree[path] = jnp.zeros_like(x)
        if path[-1] == "xlora_head_bias":
            tree[path] = jnp.broadcast_to(1e3 * jax.nn.one_hot(index, count), x.shape)
    return unflatten(tree)


MIXTURES = {
    "xlora": XLoRA(n_experts=3, hidden_size=16, rank=2, targets=TARGETS),
    "xlora, layerwise": XLoRA(n_experts=3, hidden_size=16, rank=2, layerwise=True, depth=2, size=5, targets=TARGETS),
    "mole": MoLE(n_experts=3, rank=2, freeze_experts=True, top_k=1, targets=TARGETS),
}


@functools.cache
def mixture(name):
    return bound(MIXTURES[name], *decoder())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_chosen_expert_is_the_lora_that_was_trained(name):
    (peft, fresh), (loras, outputs, base) = mixture(name), trained()
    run = jax.jit(peft.apply)
    for index, want in enumerate(outputs):
        order = loras if name != "mole" else loras[index:] + loras[:index]  # of equal gates, the first is chosen
        adapter = with_experts(peft, chosen(fresh, index, 3), order)
        assert differ(want, base)
        close(run(decoder()[1], adapter, IDS), want, 2e-5)
    labels = flatten(peft.labels(fresh))
    frozen = {path[-1] for path, label in labels.items() if label == "frozen"}
    assert frozen == set(peft.method.expert_leaves)


def test_what_is_no_expert_is_refused():
    model, params = decoder(boxed=True)
    peft, adapter = bound(MIXTURES["mole"], model, params)
    loras, *_ = trained()
    assert jax.tree.structure(with_experts(peft, adapter, loras)) == jax.tree.structure(adapter)  # with its boxes
    with pytest.raises(ValueError, match="MoLE has n_experts=3, and with_experts got 2 LoRAs"):
        with_experts(peft, adapter, loras[:2])
    for index, method, expected in [
        (
            0,
            jpeft.LoRA(rank=3, targets=TARGETS),
            r"factors \[2, 20, 3\] .* takes \[2, 20, 2\] and \[2, 2, 16\], or a sma",
        ),
        (1, jpeft.LoRA(rank=2, targets=["k_proj"]), "has a LoRA at 'model/layers/self_attn/k_proj', where the mixture"),
        (2, jpeft.methods.DoRA(rank=2, targets=["q_proj"]), "has DoRA at 'model/layers/self_attn/q_proj'; with_exp"),
    ]:
        others = [*loras[:index], bound(method, model, params), *loras[index + 1 :]]
        with pytest.raises(ValueError, match=f"expert {index} .*{expected}"):
            with_experts(peft, adapter, others)
    with pytest.raises(ValueError, match="fills a MoLE or an XLoRA, and this is LoRA"):
        with_experts(*loras[0], loras)
    with pytest.raises(ValueError, match=r"MoLE.top_k is 5, more than the 4 experts of n_experts"):
        MoLE(top_k=5)


# --- the first pass ---------------------------------------------------------------------------------------------------


PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


@functools.cache
def base_tokens():
    return jpeft.generate(*decoder(), PROMPTS, max_new_tokens=6, min_prompt_length=4)


@pytest.mark.parametrize("name", ["xlora", "mole", pytest.param("xlora, layerwise", marks=pytest.mark.exhaustive)])
def test_greedy_decoding_with_a_cache_is_that_without(name):
    (model, params), (peft, fresh), (loras, *_) = decoder(), mixture(name), trained()
    adapter = with_experts(peft, fresh, loras)
    whole = jax.jit(lambda ids: peft.apply(params, adapter, ids))
    new = jpeft.generate(model, params, PROMPTS, peft=peft, adapter=adapter, max_new_tokens=6, min_prompt_length=4)
    for prompt, found in zip(PROMPTS, new, strict=True):
        ids = np.zeros((1, 16), np.int32)
        ids[0, : len(prompt)] = prompt
        for i in range(len(prompt), len(prompt) + 6):  # of one length, as later tokens change nothing
            ids[0, i] = np.asarray(whole(jnp.asarray(ids)))[0, i - 1].argmax()
        assert found == ids[0, len(prompt) : len(prompt) + 6].tolist()
    assert new != base_tokens()


def test_the_first_pass_sees_the_base_alone():
    model, params = decoder(scan_layers=False)
    method = XLoRA(n_experts=2, hidden_size=16, rank=2, targets=TARGETS)
    peft, adapter = bound(method, model, params)
    other = dataclasses.replace(method, states="model/norm").bind(model, params, IDS)
    close(other.apply(params, adapter, IDS), jax.jit(peft.apply)(params, adapter, IDS))
    # The gates of a first token, which attends to itself alone, as parts of a LoRA; beside a method that changes it.
    ia3 = jpeft.IA3(targets=["up_proj"])
    both, beside = jpeft.Chain(ia3, method).bind(model, params, IDS), ia3.bind(model, params, IDS)
    tree = {**flatten(adapter), **flatten(moved(beside, params))}
    states = model.apply({"params": params}, IDS[:, :1], method="hidden_states")
    gates = jax.nn.softmax(states @ adapter["xlora"]["xlora_head"] + adapter["xlora"]["xlora_head_bias"])[0, 0]
    loras = jpeft.Chain(ia3, jpeft.LoRA(rank=4, targets=TARGETS)).bind(model, params, IDS)
    fixed = {
        (*path[:-1], path[-1].replace("xlora", "lora")): x * jnp.repeat(gates, 2)[:, None] if "xlora_b" in path else x
        for path, x in tree.items()
        if path[0] != "xlora"
    }
    got = both.apply(params, unflatten(tree), IDS)[0, 0]
    close(got, loras.apply(params, unflatten(fixed), IDS)[0, 0], 2e-5)
    assert differ(got, peft.apply(params, adapter, IDS)[0, 0])


def test_what_has_no_first_pass_is_refused():
    (model, params), (peft, adapter) = decoder(), mixture("xlora")
    cache = init_cache(model, 3, 16)
    with pytest.raises(ValueError, match="this call continues a cache without 'first_pass'"):
        peft.apply(params, adapter, IDS[:, :1], cache=cache)
    states = model.apply({"params": params}, IDS, method="hidden_states")
    assert peft.apply(params, adapter, states, method="logits").shape == (3, 7, 41)  # a part without a site
    for fields, expected in [
        ({"hidden_size": 8}, r"hidden_size is 8, and the output by 'hidden_states' is \[3, 7, 16\]"),
        ({"states": "model/normal"}, "does not call a module 'model/normal'; give the path of one that it calls"),
        ({"states": ""}, r"hidden_size is 16, and the output of the model is \[3, 7, 41\]; say which module's"),
    ]:
        own, tree = bound(dataclasses.replace(MIXTURES["xlora"], **fields), model, params)
        with pytest.raises(ValueError, match=expected):
            own.apply(params, tree, IDS)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(4, name="op")(x))
            return nn.MultiHeadDotProductAttention(2, decode=True, name="attention")(x)

    model, x = Net(), jnp.ones((2, 3, 4))
    variables = model.init(jax.random.key(0), x)
    peft = XLoRA(n_experts=2, hidden_size=4, targets="op").bind(model, variables, x[:, :1], mutable=["cache"])
    adapter = peft.init(jax.random.key(0), variables["params"])
    with pytest.raises(ValueError, match="keeps keys and values in the model or in an argument that is no mapping"):
        peft.apply(variables, adapter, x[:, :1], mutable=["cache"])
