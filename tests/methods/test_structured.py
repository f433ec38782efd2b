"""Low-rank updates with structure against their papers' equations, written out in numpy and float64."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.extend.core
import numpy as np
import pytest

from jpeft.methods import DeLoRA, GraLoRA, HiRA, LoHa, LoKr, MiSS
from jpeft.methods.lokr import factorized
from tests.zoo import moved, numbers

INPUTS, OUTPUTS, CHANNELS, WINDOW = 24, 16, 4, (3, 2)


class Modules(nn.Module):
    """A linear layer, an embedding table and a convolution: weights of 24 x 16, as matrices."""

    @nn.compact
    def __call__(self, x, ids, image):
        table = nn.Embed(INPUTS, OUTPUTS, name="table")(ids)
        kernel = nn.Conv(OUTPUTS, WINDOW, padding="VALID", name="kernel")(image)
        return nn.Dense(OUTPUTS, name="dense")(x), table, kernel


MODEL = Modules()
X = np.random.default_rng(0).normal(size=(2, 5, INPUTS)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, INPUTS, (2, 3))
IMAGE = np.random.default_rng(2).normal(size=(1, 4, 3, CHANNELS)).astype(np.float32)
CALL = (X, IDS, IMAGE)
LEAF = {"dense": "kernel", "table": "embedding", "kernel": "kernel"}


@functools.cache
def parameters():
    return numbers(jax.eval_shape(MODEL.init, jax.random.key(0), *CALL)["params"])


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# --- the equations: the change of a weight [in, out], from a module's leaves ------------------------------------------


def hadamard(method, leaves, w):
    scale = 1.0 if method.alpha is None else method.alpha / method.rank
    change = np.zeros_like(w)
    for i, o in np.ndindex(w.shape):
        first = sum(leaves["loha_w1_b"][i, k] * leaves["loha_w1_a"][k, o] for k in range(method.rank))
        second = sum(leaves["loha_w2_b"][i, k] * leaves["loha_w2_a"][k, o] for k in range(method.rank))
        change[i, o] = scale * first * second
    return change


def split_hadamard(method, leaves, w):
    """FedPara's proposition 3: each kernel is a core tensor, multiplied along its inputs and its outputs."""
    change = np.ones_like(w)
    for n in "12":
        t, inputs, outputs = (leaves[f"loha_t{n}{end}"] for end in ("", "_b", "_a"))
        kernel = np.zeros((math.prod(WINDOW), CHANNELS, OUTPUTS))
        for p, c, o, j, i in np.ndindex(*kernel.shape, method.rank, method.rank):
            kernel[p, c, o] += inputs[c, j] * t[p, j, i] * outputs[i, o]
        change *= kernel.reshape(w.shape)
    return change


def kronecker(method, leaves, w):
    def matrix(n):
        if f"lokr_w{n}" in leaves:
            return leaves[f"lokr_w{n}"]
        return leaves[f"lokr_w{n}_b"] @ leaves[f"lokr_w{n}_a"]

    scale = 1.0 if method.alpha is None else method.alpha / method.rank
    return scale * np.kron(matrix(1), matrix(2))


def kronecker_kernel(method, leaves, w):
    """Position by position, over the channels."""
    first = leaves["lokr_w1"]
    if "lokr_t2" in leaves:
        second = [leaves["lokr_t2_b"] @ t @ leaves["lokr_t2_a"] for t in leaves["lokr_t2"]]
    else:
        second = leaves["lokr_w2"] if "lokr_w2" in leaves else leaves["lokr_w2_b"] @ leaves["lokr_w2_a"]
    return np.concatenate([np.kron(first, w2) for w2 in second])


def shared_shards(method, leaves, w):
    change = np.zeros_like(w)
    for i, o in np.ndindex(w.shape):
        block = leaves["miss_block"] if method.variant == "miss" else leaves["miss_mini"]
        change[i, o] = block[i % method.rank, o % block.shape[1]]
    return change


def block_affine(method, leaves, w):
    r, change = method.rank, np.zeros_like(w)
    for g, n in itertools.product(range(INPUTS // r), range(OUTPUTS // r)):
        at = slice(g * r, g * r + r), slice(n * r, n * r + r)
        change[at] = leaves["miss_bat"][n] @ w[at] + leaves["miss_bat"][n]
    return change


def granular(method, leaves, w):
    k, change = method.blocks, np.zeros_like(w)
    rows, cols, share = INPUTS // k, OUTPUTS // k, method.rank // k
    for i, j in itertools.product(range(k), range(k)):
        a = leaves["gralora_a"][i][:, j * share : (j + 1) * share]
        b = leaves["gralora_b"][j][i * share : (i + 1) * share]
        change[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols] = a @ b
    if method.hybrid_rank:
        change += leaves["gralora_whole_a"] @ leaves["gralora_whole_b"]
    return method.alpha / (method.rank + method.hybrid_rank) * change


def entrywise(method, leaves, w):
    return w * (leaves["hira_a"] @ leaves["hira_b"])


def bounded(method, leaves, w):
    change = np.zeros_like(w)
    for k in range(method.rank):
        a, b = leaves["delora_a"][:, k], leaves["delora_b"][k]
        change += np.outer(a, b) / max(np.linalg.norm(a), 1e-4) / max(np.linalg.norm(b), 1e-4)
    return leaves["delora_lambda"] / method.rank * leaves["delora_w_norm"][:, None] * change


CASES = {
    "LoHa": (LoHa(rank=2, alpha=3), hadamard),
    "LoHa, as one product": (LoHa(rank=1), hadamard),
    "LoHa, table": (LoHa(rank=2, targets="table"), hadamard),
    "LoHa, kernel": (LoHa(rank=2, targets="kernel"), hadamard),
    "LoHa, split kernel": (LoHa(rank=2, effective_conv=True, targets="kernel"), split_hadamard),
    "LoKr": (LoKr(rank=1, alpha=3), kronecker),
    "LoKr, whole": (LoKr(rank=3, alpha=2), kronecker),
    "LoKr, both products": (LoKr(rank=1, decompose_both=True), kronecker),
    "LoKr, by 2": (LoKr(rank=2, decompose_factor=2), kronecker),
    "LoKr, table": (LoKr(rank=1, alpha=3, targets="table"), kronecker),
    "LoKr, kernel": (LoKr(rank=1, targets="kernel"), kronecker_kernel),
    "LoKr, whole kernel": (LoKr(rank=4, targets="kernel"), kronecker_kernel),
    "LoKr, split kernel": (LoKr(rank=1, effective_conv=True, targets="kernel"), kronecker_kernel),
    "MiSS": (MiSS(rank=4), shared_shards),
    "MiSS, padded": (MiSS(rank=7), shared_shards),
    "MiSS, table": (MiSS(rank=7, targets="table"), shared_shards),
    "MiSS, kernel": (MiSS(rank=7, targets="kernel"), shared_shards),
    "MiSS, mini": (MiSS(rank=5, variant="mini", mini_rank=4), shared_shards),
    "MiSS, bat": (MiSS(rank=8, variant="bat"), block_affine),
    "GraLoRA": (GraLoRA(rank=4), granular),
    "GraLoRA, hybrid": (GraLoRA(rank=8, blocks=4, hybrid_rank=3, alpha=5), granular),
    "GraLoRA, table": (GraLoRA(rank=4, alpha=4, targets="table"), granular),
    "GraLoRA, kernel": (GraLoRA(rank=4, targets="kernel"), granular),
    "HiRA": (HiRA(rank=2), entrywise),
    "HiRA, table": (HiRA(rank=2, targets="table"), entrywise),
    "HiRA, kernel": (HiRA(rank=2, targets="kernel"), entrywise),
    "DeLoRA": (DeLoRA(rank=3), bounded),
    "DeLoRA, table": (DeLoRA(rank=3, boundary=2, targets="table"), bounded),
}


def bound(method):
    """The method on the linear layer, unless it has targets."""
    return dataclasses.replace(method, targets=method.targets or "dense").bind(MODEL, parameters(), *CALL)


@pytest.fixture(scope="module")
def ran():
    """For each case: its leaves, the outputs under the adapter, and the merged parameters. In one program."""
    params, pefts = parameters(), {name: bound(method) for name, (method, _) in CASES.items()}
    adapters = {name: moved(peft, params, scale=0.7) for name, peft in pefts.items()}

    @jax.jit
    def run(params, adapters):
        return {n: (pefts[n].apply(params, own, *CALL), pefts[n].merge(params, own)) for n, own in adapters.items()}

    out = run(params, adapters)
    return {name: (adapters[name], *out[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_equations(name, ran):
    adapter, outputs, merged = ran[name]
    method, equation = CASES[name]
    (module,) = adapter
    params, w = wide(parameters()), wide(parameters()[module][LEAF[module]])
    matrix = w.reshape(INPUTS, OUTPUTS)
    changed = matrix + equation(method, wide(adapter[module]), matrix)
    assert np.abs(changed - matrix).max() > 1e-2
    np.testing.assert_allclose(merged[module][LEAF[module]], changed.reshape(w.shape), rtol=1e-5, atol=1e-5)
    want = {
        "dense": lambda: X @ changed + params["dense"]["bias"],
        "table": lambda: changed[IDS],
        "kernel": lambda: convolved(changed) + params["kernel"]["bias"],
    }
    np.testing.assert_allclose(
        outputs[["dense", "table", "kernel"].index(module)], want[module](), rtol=1e-4, atol=1e-4
    )


def convolved(matrix):
    out = np.zeros((1, IMAGE.shape[1] - WINDOW[0] + 1, IMAGE.shape[2] - WINDOW[1] + 1, OUTPUTS))
    for h, v in np.ndindex(out.shape[1:3]):
        out[0, h, v] = IMAGE[0, h : h + WINDOW[0], v : v + WINDOW[1]].reshape(-1) @ matrix
    return out


# --- starts -----------------------------------------------------------------------------------------------------------

ZERO = {
    "loha_w2_b", "loha_t2_b", "lokr_w1", "lokr_w1_a", "miss_block", "miss_mini", "miss_bat", "gralora_b",
    "gralora_whole_b", "hira_b", "delora_b",
}  # fmt: skip
# The fan-in of every other leaf that HuggingFace draws, as torch counts it: the sizes of all axes but the first.
FAN_IN = {
    "LoHa": {"loha_w1_a": 2, "loha_w1_b": INPUTS, "loha_w2_a": 2},
    "LoHa, split kernel": {
        "loha_t1_a": OUTPUTS, "loha_t1_b": CHANNELS, "loha_t1": 2 * 6, "loha_t2_a": OUTPUTS, "loha_t2": 2 * 6,
    },
    "LoKr, whole": {"lokr_w2": 6},
    "LoKr, both products": {"lokr_w1_b": 4, "lokr_w2_a": 1, "lokr_w2_b": 6},
    "LoKr, whole kernel": {"lokr_w2": 2 * 6},
    "LoKr, kernel": {"lokr_w2_a": 1, "lokr_w2_b": 2 * 6},
    "LoKr, split kernel": {"lokr_t2_a": 4, "lokr_t2_b": 2, "lokr_t2": 6},
    "GraLoRA, hybrid": {"gralora_a": INPUTS // 4, "gralora_whole_a": INPUTS},
    "HiRA": {"hira_a": INPUTS},
    "DeLoRA": {"delora_a": INPUTS},
}  # fmt: skip


@pytest.fixture(scope="module")
def fresh():
    """Fresh adapters, made in one program."""
    pefts = {name: bound(CASES[name][0]) for name in FAN_IN}
    make = jax.jit(lambda params: {n: peft.init(jax.random.key(0), params) for n, peft in pefts.items()})
    return {name: next(iter(adapter.values())) for name, adapter in make(parameters()).items()}


@pytest.mark.parametrize("name", FAN_IN)
def test_starts(name, fresh):
    leaves = {leaf: np.asarray(x) for leaf, x in fresh[name].items()}
    assert leaves.keys() - ZERO == FAN_IN[name].keys() | (leaves.keys() & {"delora_lambda", "delora_w_norm"})
    for leaf, x in leaves.items():
        if leaf in ZERO:
            assert not x.any()
        elif leaf in FAN_IN[name]:
            limit = FAN_IN[name][leaf] ** -0.5
            assert 0.5 * limit < np.abs(x).max() <= limit, leaf
    if name == "DeLoRA":
        assert leaves["delora_lambda"] == [15.0]
        w = parameters()["dense"]["kernel"]
        np.testing.assert_allclose(leaves["delora_w_norm"], np.linalg.norm(w, axis=1), rtol=1e-6)


def test_first_gradient_of_delora(fresh):
    """B starts at zero, where the root in its norm has an infinite slope."""
    peft, w = bound(DeLoRA(rank=3)), parameters()["dense"]["kernel"]
    (action,) = peft.actions

    def loss(leaves):
        return (action.method.merge(action.method.expand(action.site, {}, leaves), w, None)[0] ** 2).sum()

    grads = jax.jit(jax.grad(loss))(fresh["DeLoRA"])
    assert all(np.isfinite(g).all() for g in grads.values())
    assert np.abs(grads["delora_b"]).max() > 1e-3
    labels = peft.labels({"dense": fresh["DeLoRA"]})["dense"]
    assert [leaf for leaf, label in labels.items() if label != "trainable"] == ["delora_w_norm"]


def hf_factorization(dimension, factor):
    """PEFT's search, of which `factorized` is the result."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    factor = dimension if factor == -1 else factor
    m, n = 1, dimension
    while m < n:
        new_m = next(k for k in itertools.count(m + 1) if dimension % k == 0)
        if new_m + dimension // new_m > 1 + dimension or new_m > factor:
            break
        m, n = new_m, dimension // new_m
    return min(m, n), max(m, n)


def test_factorized():
    for dimension, factor in itertools.product([1, 2, 3, 12, 16, 36, 97, 120, 768, 1000], [-1, 1, 2, 4, 5, 7, 40, 800]):
        assert factorized(dimension, factor) == hf_factorization(dimension, factor)


# --- cost -------------------------------------------------------------------------------------------------------------


def sizes(jaxpr):
    """The shapes of all that a program computes, in its inner programs too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from sizes(inner)


@pytest.mark.parametrize("name", [
    "LoHa, as one product", "LoHa, table", "LoKr", "LoKr, whole", "LoKr, both products", "LoKr, table", "MiSS",
    "MiSS, mini", "MiSS, table", "GraLoRA", "GraLoRA, hybrid", "GraLoRA, table", "HiRA, table", "DeLoRA",
])  # fmt: skip
def test_no_matrix_of_the_weights_size_is_computed(name):
    peft, params = bound(CASES[name][0]), parameters()

    def loss(adapter, x, ids):
        dense, table, _ = peft.apply(params, adapter, x, ids, IMAGE)
        return (dense**2).sum() + (table**2).sum()

    adapter = moved(peft, params)
    few = X[:1, :2], IDS[:1, :1]  # outputs of another size than the weight's
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter, *few).jaxpr
    assert INPUTS * OUTPUTS not in {math.prod(shape) for shape in sizes(jaxpr)}


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_input_of_the_update():
    """A unit vector is dropped, or its row of the change is scaled up."""
    cases = [MiSS(rank=7, dropout=0.25), GraLoRA(rank=4, hybrid_rank=2, dropout=0.25), HiRA(rank=2, dropout=0.25)]
    params, pefts = parameters(), [bound(method) for method in cases]
    adapters = [moved(peft, params) for peft in pefts]
    units = np.eye(INPUTS, dtype=np.float32)

    @jax.jit
    def run(adapters):
        rngs = {"dropout": jax.random.key(0)}
        return [
            (peft.apply(params, a, units, IDS, IMAGE, rngs=rngs)[0], peft.merge(params, a)["dense"]["kernel"])
            for peft, a in zip(pefts, adapters, strict=True)
        ]

    base = params["dense"]
    for y, merged in run(adapters):
        got, change = np.asarray(y - base["kernel"] - base["bias"]), np.asarray(merged - base["kernel"])
        dropped = np.abs(got).max(axis=1) < 1e-5
        assert 0 < dropped.sum() < INPUTS
        np.testing.assert_allclose(got[~dropped], change[~dropped] / 0.75, atol=1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, expected", [
    (lambda: LoHa(rank=0), "LoHa.rank must be a positive integer, got 0"),
    (lambda: LoHa(alpha=0), "LoHa.alpha must be a finite number other than 0 or None, got 0"),
    (lambda: LoHa(effective_conv=1), "LoHa.effective_conv must be true or false, got 1"),
    (lambda: LoKr(decompose_factor=0), "LoKr.decompose_factor must be a positive integer, or -1 for the square root"),
    (lambda: LoKr(decompose_both="yes"), "LoKr.decompose_both must be true or false, got 'yes'"),
    (lambda: MiSS(variant="bone"), "MiSS.variant must be one of miss, mini, bat, got 'bone'"),
    (lambda: MiSS(variant="bat", dropout=0.1), "MiSS: variant 'bat' changes the weight and drops no inputs"),
    (lambda: MiSS(mini_rank=-1), "MiSS.mini_rank must be a positive integer, got -1"),
    (lambda: GraLoRA(rank=8, blocks=3), "GraLoRA: rank must be divisible by blocks, got 8 and 3"),
    (lambda: GraLoRA(hybrid_rank=-1), "GraLoRA.hybrid_rank must be an integer, 0 or more, got -1"),
    (lambda: HiRA(dropout=1.0), r"HiRA.dropout must be a rate in \[0, 1\), got 1.0"),
    (lambda: DeLoRA(boundary=0), "DeLoRA.boundary must be a finite number other than 0, got 0"),
    (lambda: DeLoRA(dtype="int32"), "adapter leaves must be floating, got dtype 'int32'"),
    (lambda: bound(MiSS(rank=25)), "MiSS: 'dense' is 24 x 16, but rank is 25; it can be at most the number of inputs"),
    (lambda: bound(MiSS(rank=3, variant="bat")), "for variant 'bat', rank must divide both, and is 3"),
    (lambda: bound(MiSS(rank=4, variant="mini", mini_rank=3)), "mini_rank must divide the outputs, and is 3"),
    (lambda: bound(GraLoRA(rank=6, blocks=3)), "GraLoRA: 'dense' is 24 x 16; blocks must divide both, and is 3"),
])  # fmt: skip
def test_bad_input(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
