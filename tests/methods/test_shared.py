"""VeRA, VB-LoRA, RandLoRA and AdaLoRA against their papers' equations, written out in numpy and float64."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft.methods import AdaLoRA, RandLoRA, VBLoRA, VeRA
from tests.zoo import moved, numbers

NAMES = {"down": (24, 16), "up": (16, 40), "square": (24, 24)}


class Modules(nn.Module):
    """Weights with fewer, more and as many outputs as inputs."""

    @nn.compact
    def __call__(self, x):
        return {name: nn.Dense(outputs, name=name)(x[..., :inputs]) for name, (inputs, outputs) in NAMES.items()}


MODEL = Modules()
X = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)


@functools.cache
def parameters():
    return numbers(jax.eval_shape(MODEL.init, jax.random.key(0), X)["params"])


def bound(method):
    return dataclasses.replace(method, targets=tuple(NAMES)).bind(MODEL, parameters(), X)


# --- the equations: the change of a weight [in, out], from the shared leaves and a module's own -----------------------


def two_vectors(method, shared, own, change):
    for i, o in np.ndindex(change.shape):
        inner = sum(
            shared["vera_a"][i, k] * own["vera_lambda_d"][k] * shared["vera_b"][k, o] for k in range(method.rank)
        )
        change[i, o] = own["vera_lambda_b"][o] * inner


def mixtures(method, shared, own, change):
    v, bank = method.vector_length, shared["vblora_vector_bank"]

    def mixed(logits):
        top = np.argsort(-logits)[: method.topk]
        weights = np.exp(logits[top]) / np.exp(logits[top]).sum()
        return sum(weight * bank[j] for weight, j in zip(weights, top, strict=True))

    a, b = np.zeros((change.shape[0], method.rank)), np.zeros((method.rank, change.shape[1]))
    for k in range(method.rank):
        for n in range(change.shape[0] // v):
            a[n * v : n * v + v, k] = mixed(own["vblora_logits_a"][k, n])
        for n in range(change.shape[1] // v):
            b[k, n * v : n * v + v] = mixed(own["vblora_logits_b"][n, k])
    change += a @ b


def as_hf_pairs(method, shared, own, change):
    """HuggingFace's order: ranks before products in one factor, products before ranks in the other."""
    r, m, wide = method.rank, min(change.shape), change.shape[0] <= change.shape[1]
    n = math.ceil(m / r)
    for p in range(n * r):
        k, j = divmod(p, n)
        short = own["randlora_lambda"][k, j] * shared["randlora_a"][k, 0, :m] * own["randlora_gamma"][j]
        j, k = divmod(p, r)
        long = shared["randlora_b"][: max(change.shape), j, k]
        change += method.scale * (np.outer(short, long) if wide else np.outer(long, short))


def as_the_paper_pairs(method, shared, own, change):
    """Σ_j B_j Λ_j A Γ_j, which is the same as HuggingFace's where r is 1."""
    m, wide = min(change.shape), change.shape[0] <= change.shape[1]
    for j in range(math.ceil(m / method.rank)):
        a = shared["randlora_a"][:, 0, :m] * own["randlora_gamma"][j]
        b = shared["randlora_b"][: max(change.shape), j]
        product = b @ np.diag(own["randlora_lambda"][:, j]) @ a
        change += method.scale * (product.T if wide else product)


def triples(method, shared, own, change):
    alpha = method.rank if method.alpha is None else method.alpha
    for k in range(method.rank):
        value = alpha / (method.rank + 1e-5) * own["adalora_e"][k]
        change += value * np.outer(own["adalora_a"][:, k], own["adalora_b"][k])


CASES = {
    "VeRA": (VeRA(rank=5), two_vectors),
    "VB-LoRA": (VBLoRA(rank=3, num_vectors=7, vector_length=4, topk=3), mixtures),
    "RandLoRA": (RandLoRA(rank=5, alpha=3), as_hf_pairs),
    "RandLoRA, wide": (RandLoRA(rank=30), as_hf_pairs),
    "RandLoRA, rank 1": (RandLoRA(rank=1), as_the_paper_pairs),
    "AdaLoRA": (AdaLoRA(rank=3, alpha=9), triples),
}


@pytest.fixture(scope="module")
def ran():
    """For each case: its leaves, the outputs under the adapter, and the merged parameters. In one program."""
    params, pefts = parameters(), {name: bound(method) for name, (method, _) in CASES.items()}
    adapters = {name: moved(peft, params, scale=0.7) for name, peft in pefts.items()}

    @jax.jit
    def run(params, adapters):
        return {n: (pefts[n].apply(params, own, X), pefts[n].merge(params, own)) for n, own in adapters.items()}

    out = run(params, adapters)
    return {name: (adapters[name], *out[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_equations(name, ran):
    adapter, outputs, merged = jax.tree.map(lambda x: np.asarray(x, np.float64), ran[name])
    method, equation = CASES[name]
    shared = next((leaves for module, leaves in adapter.items() if module not in NAMES), {})
    for module, shape in NAMES.items():
        kernel, bias = (np.asarray(parameters()[module][leaf], np.float64) for leaf in ("kernel", "bias"))
        equation(method, shared, adapter[module], change := np.zeros(shape))
        assert np.abs(change).max() > 1e-2
        scale = np.abs(kernel + change).max()
        np.testing.assert_allclose(merged[module]["kernel"], kernel + change, atol=1e-5 * scale)
        want = X[..., : shape[0]] @ (kernel + change) + bias
        np.testing.assert_allclose(outputs[module], want, atol=1e-5 * np.abs(want).max())


# --- starts, and what the seed gives back -----------------------------------------------------------------------------


def test_starts():
    names = ("VeRA", "VB-LoRA", "RandLoRA", "AdaLoRA")
    make = jax.jit(lambda params: [bound(CASES[name][0]).init(jax.random.key(0), params) for name in names])
    vera, bank, rand, ada = make(parameters())
    assert (vera["up"]["vera_lambda_d"] == np.float32(0.1)).all() and not vera["up"]["vera_lambda_b"].any()
    assert not rand["up"]["randlora_lambda"].any() and (rand["up"]["randlora_gamma"] == np.float32(1 / 16)).all()
    assert not ada["up"]["adalora_e"].any() and 0.015 < ada["up"]["adalora_b"].std() < 0.025
    assert 0.015 < np.abs(bank["vblora"]["vblora_vector_bank"]).max() <= 0.02
    assert 0.07 < bank["up"]["vblora_logits_a"].std() < 0.13


def test_projections_are_drawn_from_the_seed_for_the_widest_weights():
    """Uniform in ±sqrt(6 / fan-in), and as torch draws them: the numbers are those of torch 2.13."""
    shared = bound(VeRA(rank=2, seed=3)).init(jax.random.key(0), parameters())["vera"]
    assert shared["vera_a"].shape == (24, 2) and shared["vera_b"].shape == (2, 40)
    np.testing.assert_allclose(shared["vera_a"][:3, 0], [-0.49573648, -0.39443064, -0.21415752], atol=6e-8)
    again = bound(VeRA(rank=2, seed=3)).init(jax.random.key(1), parameters())["vera"]
    jax.tree.map(np.testing.assert_array_equal, again, shared)
    other = bound(VeRA(rank=2, seed=4)).init(jax.random.key(0), parameters())["vera"]
    assert np.abs(other["vera_a"] - shared["vera_a"]).max() > 0.1


@pytest.mark.parametrize("kind, chance", [({"sparse": True}, 1 / 6), ({"very_sparse": True}, 1 / (2 * 24**0.5))])
def test_sparse_bases_have_three_values_of_unit_deviation(kind, chance):
    shared = bound(RandLoRA(rank=8, **kind)).init(jax.random.key(0), parameters())["rand_lora"]
    for base in map(np.asarray, shared.values()):
        assert len(np.unique(base)) == 3 and (np.unique(base) == -np.unique(base)[::-1]).all()
        assert abs(base.std(ddof=1) - 1) < 1e-6
        assert abs((base > 0).mean() - chance) < 3 * (chance / base.size) ** 0.5


@pytest.mark.parametrize("method", [VeRA(rank=2), RandLoRA(rank=2, alpha=1)])
def test_a_folder_has_no_projections_unless_they_are_anothers(method, tmp_path):
    peft, params = bound(method), parameters()
    own = moved(peft, params)
    another = own | {method.slug: jax.tree.map(lambda x: 2 * x, own[method.slug])}
    for folder, adapter in (("own", own), ("another's", another)):
        jpeft.save(tmp_path / folder, peft, adapter, params)
        names = load_file(next((tmp_path / folder).glob("*.safetensors"))).keys()
        assert any(name.startswith(f"{method.slug}/") for name in names) == (folder == "another's")
        _, loaded = jpeft.load(tmp_path / folder, MODEL, params, X)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


# --- AdaLoRA's penalty ------------------------------------------------------------------------------------------------


def test_penalty_is_the_mean_distance_from_orthogonal_factors():
    peft = bound(AdaLoRA(rank=3, orth_reg_weight=0.3))
    adapter = moved(peft, parameters())
    factors = [f for own in adapter.values() for f in (np.asarray(own["adalora_a"]).T, np.asarray(own["adalora_b"]))]
    distances = [np.linalg.norm(rows @ rows.T - np.eye(3)) for rows in factors]
    np.testing.assert_allclose(jax.jit(peft.penalty)(adapter), 0.3 * np.mean(distances), rtol=1e-6)


def test_triples_that_a_folder_left_out_do_not_count():
    peft = bound(AdaLoRA(rank=2))
    whole = jax.tree.map(jnp.zeros_like, moved(peft, parameters()))
    value, grads = jax.jit(jax.value_and_grad(peft.penalty))(whole)
    assert value == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, expected", [
    (lambda: VeRA(rank=0), "VeRA.rank must be a positive integer, got 0"),
    (lambda: VeRA(seed=0.5), "VeRA.seed must be an integer of 64 bits, got 0.5"),
    (lambda: VeRA(d_initial=0), "VeRA.d_initial must be a finite number other than 0, got 0"),
    (lambda: VeRA(dropout=1), "VeRA.dropout must be a rate in [0, 1), got 1"),
    (lambda: VeRA(overrides={"up": {"rank": 2}}), "sets 'rank', which cannot differ per site"),
    (lambda: VBLoRA(topk=5, num_vectors=4), "VBLoRA.topk is 5, more than the 4 vectors of the bank"),
    (lambda: VBLoRA(vector_length=-1), "VBLoRA.vector_length must be a positive integer, got -1"),
    (lambda: bound(VBLoRA(vector_length=16)), "VBLoRA.vector_length is 16, which does not divide both sides of 'down'"),
    (lambda: RandLoRA(alpha=0), "RandLoRA.alpha must be a finite number other than 0 or None, got 0"),
    (lambda: RandLoRA(sparse=1), "RandLoRA.sparse must be true or false, got 1"),
    (
        lambda: bound(RandLoRA(rank=1, very_sparse=True, seed=162)).init(jax.random.key(0), parameters()),
        "with seed 162, a sparse base for weights of up to 24 x 40 is all 0",
    ),
    (lambda: AdaLoRA(alpha=-1), "AdaLoRA.alpha must be a positive number or None, got -1"),
    (lambda: AdaLoRA(orth_reg_weight=-1), "AdaLoRA.orth_reg_weight must be a number that is not negative, got -1"),
])  # fmt: skip
def test_bad_input(make, expected):
    with pytest.raises(ValueError) as error:
        make()
    assert expected in str(error.value)
