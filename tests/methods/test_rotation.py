"""OFT, BOFT and HRA against their papers' formulas in numpy, at float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.core import backend
from jpeft.methods import BOFT, HRA, OFT

ROWS, COLUMNS = 12, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, ROWS)).astype(np.float32)
PARAMS = {"kernel": RNG.normal(size=(ROWS, COLUMNS)).astype(np.float32), "bias": RNG.normal(size=COLUMNS).astype("f")}


def outputs(method, leaves):
    """A layer's outputs under an adapter with these leaves, and of the merged layer."""
    model = nn.Dense(COLUMNS)
    peft = method.bind(model, PARAMS, X)
    adapter = jax.tree.map(np.asarray, peft.init(jax.random.key(0), PARAMS))
    assert {n: x.shape for n, x in adapter.items()} == {n: x.shape for n, x in leaves.items()}
    adapter = {n: x.astype(np.float32) for n, x in leaves.items()}
    applied, merged = jax.jit(lambda p, a: (peft.apply(p, a, X), model.apply({"params": peft.merge(p, a)}, X)))(
        PARAMS, adapter
    )
    np.testing.assert_allclose(applied, merged, atol=1e-5)
    return np.asarray(applied)


def expected(rotation, scale=1.0):
    return scale * (X.astype(float) @ rotation @ PARAMS["kernel"]) + PARAMS["bias"]


def block_diagonal(blocks):
    n = len(blocks[0])
    out = np.zeros((n * len(blocks), n * len(blocks)))
    for i, block in enumerate(blocks):
        out[i * n : (i + 1) * n, i * n : (i + 1) * n] = block
    return out


def skew(entries, n):
    q, at = np.zeros((n, n)), iter(entries)
    for i in range(n):
        for j in range(i + 1, n):
            q[i, j] = next(at)
            q[j, i] = -q[i, j]
    return q


def cayley(q):
    return (np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q)


def series(q, coefficients):
    return sum(c * np.linalg.matrix_power(q, i) for i, c in enumerate(coefficients))


# The coefficients of I, Q, Q², ... that PEFT's loop adds up.
SERIES = {2: (1, 2), 3: (1, 2, 2, 1), 4: (1, 2, 2, 1), 5: (1, 2, 2, 2, 1), 7: (1, 2, 2, 2, 2, 2, 1)}


@pytest.mark.parametrize("terms", SERIES)
def test_oft_sums_the_series_as_peft_counts_its_terms(terms):
    q = RNG.normal(0, 0.3, (3, 6))
    want = block_diagonal([series(skew(own, 4), SERIES[terms]) for own in q])
    got = outputs(OFT(block_size=4, terms=terms, targets=".*"), {"oft_q": q})
    np.testing.assert_allclose(got, expected(want), atol=1e-5)


def test_exact_oft_turns_in_the_opposite_direction():
    q = RNG.normal(0, 0.02, (2, 15))
    exact = block_diagonal([cayley(skew(own, 6)) for own in q])
    np.testing.assert_allclose(exact @ exact.T, np.eye(ROWS), atol=1e-12)
    got = outputs(OFT(blocks=2, exact=True, targets=".*"), {"oft_q": q})
    np.testing.assert_allclose(got, expected(exact), atol=1e-5)
    series_of_minus = outputs(OFT(blocks=2, targets=".*"), {"oft_q": -q})
    np.testing.assert_allclose(series_of_minus, got, atol=1e-4)


def test_oft_shares_a_block_and_cuts_its_length():
    q, eps = RNG.normal(0, 0.3, (1, 6)), 0.25
    cut = skew(q[0], 4)
    assert np.linalg.norm(cut) > eps
    want = block_diagonal([cayley(cut * eps / np.linalg.norm(cut))] * 3)
    got = outputs(OFT(block_size=4, share=True, exact=True, coft=True, eps=eps, targets=".*"), {"oft_q": q})
    np.testing.assert_allclose(got, expected(want), atol=1e-5)


@pytest.mark.parametrize("blocks, size, factors", [(3, 4, 1), (4, 3, 1), (6, 2, 2), (2, 6, 2)])
def test_boft_multiplies_butterfly_factors(blocks, size, factors):
    m, s = RNG.normal(size=(factors, blocks, size, size)), RNG.normal(size=COLUMNS)
    total = np.eye(ROWS)
    for i in range(factors):  # the permutation that brings together what the paper's B(d, i) mixes
        half, stride = size // 2, 2**i
        order = np.arange(ROWS)
        if stride > 1:
            halves = [np.arange(h, h + half) for h in range(0, ROWS, half)]
            group = [[g + k, g + k + stride] for g in range(0, 2 * blocks, 2 * stride) for k in range(stride)]
            order = np.concatenate([halves[h] for pair in group for h in pair])
        factor = np.zeros((ROWS, ROWS))
        factor[np.ix_(order, order)] = block_diagonal([cayley((own - own.T) / 2) for own in m[i]])
        total = factor @ total
    np.testing.assert_allclose(total @ total.T, np.eye(ROWS), atol=1e-12)
    got = outputs(BOFT(block_size=size, factors=factors, targets=".*"), {"boft_m": m, "boft_s": s})
    np.testing.assert_allclose(got, expected(total, s), atol=2e-5)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_hra_is_the_product_of_its_reflections(rank):
    u, total = RNG.normal(size=(ROWS, rank)), np.eye(ROWS)
    for v in u.T:
        total = (np.eye(ROWS) - 2 * np.outer(v, v) / (v @ v)) @ total
    got = outputs(HRA(rank=rank, targets=".*"), {"hra_u": u})
    np.testing.assert_allclose(got, expected(total), atol=2e-5)


def test_orthogonal_hra_reflects_at_the_gram_schmidt_vectors():
    u, basis = RNG.normal(size=(ROWS, 3)), []
    for v in u.T:
        for own in basis:
            v = v - (own @ v) * own
        basis.append(v / np.linalg.norm(v))
    got = outputs(HRA(rank=3, orthogonal=True, targets=".*"), {"hra_u": u})
    np.testing.assert_allclose(got, expected(np.eye(ROWS) - 2 * sum(np.outer(v, v) for v in basis)), atol=2e-5)


def test_a_fresh_hra_is_the_identity_only_for_an_even_rank():
    assert HRA(rank=4).identity_at_init
    assert not HRA(rank=3).identity_at_init and not HRA(rank=4, orthogonal=True).identity_at_init


BAD_FIELDS = [
    (OFT, {"block_size": 0}, "OFT.block_size must be a positive integer or None, got 0"),
    (OFT, {"blocks": 2, "block_size": 4}, "OFT takes block_size or blocks, .* got block_size=4 and blocks=2"),
    (OFT, {"terms": 1}, "OFT.terms must be an integer from 2 to 100, got 1"),
    (OFT, {"eps": 0.0}, "OFT.eps must be a positive number, got 0.0"),
    (BOFT, {"factors": 0}, "BOFT.factors must be an integer from 1 to 31, got 0"),
    (HRA, {"rank": 0}, "HRA.rank must be a positive integer, got 0"),
    (HRA, {"orthogonal": 1}, "HRA.orthogonal must be true or false, got 1"),
]


@pytest.mark.parametrize("kind, fields, message", BAD_FIELDS)
def test_bad_fields(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


BAD_SITES = [
    (OFT(targets="op"), r"OFT: block_size=32 does not divide the 12 inputs of 'op' .*\{'op': \{'block_size': 12\}\}"),
    (OFT(blocks=5, targets="op"), r"OFT: blocks=5 does not divide the 12 inputs .*\{'op': \{'blocks': 4\}\}"),
    (BOFT(block_size=1, targets="op"), r"BOFT: block_size=1 does not divide .* into blocks of 2 or more"),
    (BOFT(factors=2, targets="op"), r"BOFT: 2 factors need .* multiple of 2 of them; 'op' has 3 of size 4"),
    (BOFT(block_size=3, factors=2, targets="op"), r"even size, .* 'op' has 4 of size 3"),
    (HRA(rank=13, orthogonal=True, targets="op"), r"HRA: 'op' has 12 inputs, which hold no 13 orthogonal vectors"),
]


@pytest.mark.parametrize("method, message", BAD_SITES)
def test_sites_that_do_not_fit(method, message):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(COLUMNS, name="op")(x)

    with pytest.raises(ValueError, match=message):
        method.bind(Model(), {"op": PARAMS}, jnp.ones((1, ROWS)))


def test_overrides_take_the_other_of_size_and_number():
    method = OFT(block_size=4, targets=".*", overrides={".*": {"block_size": None, "blocks": 6}})
    assert jax.eval_shape(lambda: method.bind(nn.Dense(COLUMNS), PARAMS, X).init(jax.random.key(0), PARAMS))[
        "oft_q"
    ].shape == (6, 1)


METHODS = [OFT(block_size=4, targets=".*"), BOFT(factors=2, block_size=2, targets=".*"), HRA(rank=2, targets=".*")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_turning_the_weight_is_turning_its_input(method, monkeypatch):
    x = RNG.normal(size=(2 * COLUMNS, ROWS)).astype(np.float32)
    peft = method.bind(nn.Dense(COLUMNS), PARAMS, x)
    adapter = {
        n: RNG.normal(0, 0.3, leaf.shape).astype("f") for n, leaf in peft.init(jax.random.key(0), PARAMS).items()
    }

    def values_and_gradients():
        def loss(adapter, params, x):
            return jnp.sin(peft.apply(params, adapter, x)).sum()

        of_adapter = jax.jit(jax.value_and_grad(loss))(adapter, PARAMS, x)
        return of_adapter, jax.jit(jax.grad(loss, argnums=(1, 2)))(adapter, PARAMS, x)

    turned = values_and_gradients()
    monkeypatch.setattr(backend, "flatten_tokens", lambda: False)  # as on an accelerator, where only inputs are turned
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), turned, values_and_gradients())
