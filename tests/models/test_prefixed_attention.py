"""Attention with a prefix of keys and values, as `ops.attention` splits it, against attention over longer keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.core.backend import compiling_for
from jpeft.models import ops
from jpeft.models.bert import BertConfig, SelfAttention
from tests.models.test_decoder import attended

N, QUERIES, SCALE = 3, 6, 0.4
PATHS = {"cpu": ("cpu", 512), "tpu": ("tpu", 512), "blocks": ("tpu", 3)}

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(params=["cpu", pytest.param("tpu", marks=pytest.mark.exhaustive), "blocks"])
def path(request, monkeypatch):
    """The backend that the operation is traced for: on TPUs whole, and in blocks of queries."""
    target, block = PATHS[request.param]
    monkeypatch.setattr(ops, "_MIN_BLOCK", block)
    return target


def operands(keys=QUERIES, kv=2, seed=0):
    """Queries, keys, values, and the keys and values of the prefix."""
    draw = np.random.default_rng(seed)
    shapes = (2, QUERIES, 4, 8), (2, keys, kv, 8), (2, keys, kv, 8), (N, kv, 8), (N, kv, 8)
    return [draw.normal(size=shape) for shape in shapes]


def run(target, *x, dtype=jnp.float32, **options):
    with compiling_for(target):
        query, key, value, *prefix = (jnp.asarray(each, dtype) for each in x)
        return ops.attention(query, key, value, scale=SCALE, prefix=tuple(prefix), **options)


def longer(query, key, value, *prefix):
    """The operands with the prefix before the keys and values, in each row."""
    rows = [np.broadcast_to(each, (len(key), *each.shape)) for each in prefix]
    return query, *(np.concatenate(pair, axis=1) for pair in zip(rows, (key, value), strict=True))


def padding(lengths):
    return np.arange(QUERIES)[None] < np.asarray(lengths)[:, None]


@pytest.mark.parametrize("keys", [QUERIES, QUERIES + 2])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 1.5}], ids=str)
def test_all_queries_attend_to_a_prefix(path, options, keys):
    """Also beyond a window; the soft cap and the scale act on it too. Earlier keys are seen by all, as those are."""
    x = operands(keys)
    want = [attended(*row, SCALE, **options) for row in zip(*longer(*x), strict=True)]
    np.testing.assert_allclose(jax.jit(functools.partial(run, path, **options))(*x), want, atol=3e-6)


@pytest.mark.parametrize("masked", ["causal", "padding", "segments"])
def test_gradients_are_those_of_longer_keys(path, masked):
    x = operands()
    causal = np.tril(np.ones((QUERIES, QUERIES), bool))
    mask = {
        "causal": None,
        "padding": causal & padding([6, 4])[:, None, None],
        "segments": causal & (np.arange(6) // 2 == np.arange(6)[:, None] // 2),
    }[masked]
    if mask is not None:
        mask = jnp.asarray(mask.reshape(-1, 1, QUERIES, QUERIES))
    seen = np.broadcast_to(causal[None, None] if mask is None else mask, (2, 1, QUERIES, QUERIES))
    seen = np.concatenate([np.ones((2, 1, QUERIES, N), bool), seen], axis=-1)

    def over_longer(query, key, value, *prefix):
        rows = [jnp.broadcast_to(each, (2, *each.shape)) for each in prefix]
        key, value = (jnp.concatenate(pair, axis=1) for pair in zip(rows, (key, value), strict=True))
        return jax.nn.dot_product_attention(query, key, value, mask=seen, scale=SCALE)

    @jax.jit
    def both(*x):
        split = functools.partial(run, path, mask=mask, causal=mask is not None)
        return [jax.vjp(f, *x)[1](jnp.cos(jnp.arange(8.0)) * jnp.ones_like(x[0])) for f in (split, over_longer)]

    for got, want in zip(*both(*(jnp.asarray(each, jnp.float32) for each in x)), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6)


def test_a_query_that_sees_nothing_else_attends_to_the_prefix_alone(path):
    x = operands()
    mask = jnp.asarray(padding([6, 0]))[:, None, None]
    got = jax.jit(functools.partial(run, path, mask=mask))(*x)
    query, _, _, key, value = (each[1:2] if each.ndim == 4 else each[None] for each in x)
    alone = jax.nn.dot_product_attention(*(jnp.asarray(each, jnp.float32) for each in (query, key, value)), scale=SCALE)
    np.testing.assert_allclose(got[1:], alone, atol=3e-6)
    gradient = jax.jit(jax.grad(lambda *x: run(path, *x, mask=mask).sum(), argnums=(1, 2, 3, 4)))(*map(jnp.asarray, x))
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    assert not np.any(gradient[0][1]) and not np.any(gradient[1][1])


def test_half_precision_rounds_no_more_than_over_longer_keys(path):
    x = [np.asarray(jnp.asarray(each, jnp.bfloat16), np.float64) for each in operands(kv=4)]
    want = np.stack([attended(*row, SCALE) for row in zip(*longer(*x), strict=True)])
    with compiling_for(path), jax.numpy_dtype_promotion("standard"):  # for JAX's own function
        attend = jax.jit(functools.partial(ops.attention, scale=SCALE))
        whole = attend(*(jnp.asarray(each, jnp.bfloat16) for each in longer(*x)))
    got = jax.jit(functools.partial(run, path, dtype=jnp.bfloat16))(*x)
    assert got.dtype == jnp.bfloat16
    error, theirs = (np.abs(np.asarray(each, np.float64) - want) for each in (got, whole))
    assert error.mean() < 1.2 * theirs.mean() and error.max() < 2 * theirs.max()


def test_dropout_acts_on_the_weights_of_a_prefix_too():
    module = SelfAttention(BertConfig(attention_probs_dropout_prob=0.3))
    query, key, value, *prefix = (jnp.asarray(each, jnp.float32) for each in operands(kv=4))

    def run(prefix, deterministic, rng):
        rngs = {"dropout": rng}
        return module.apply(
            {}, query, key, value, None, deterministic, tuple(prefix), rngs=rngs, method="attend"
        )  # fmt: skip

    want = jax.nn.dot_product_attention(*(jnp.asarray(x, jnp.float32) for x in longer(query, key, value, *prefix)))
    rngs = jax.random.split(jax.random.key(0), 2000)
    np.testing.assert_allclose(jax.jit(run, static_argnums=1)(prefix, True, rngs[0]), want, atol=3e-6)
    runs = np.asarray(jax.jit(jax.vmap(functools.partial(run, prefix, False)))(rngs))
    np.testing.assert_allclose(runs.mean(0), want, atol=0.1)
    only = jax.jit(lambda values: run((prefix[0], values), False, rngs[0]) - run(prefix, False, rngs[0]))
    dropped = np.asarray([only(prefix[1].at[i].add(100.0)) for i in range(N)])
    assert (np.abs(dropped) < 1e-3).mean() > 0.1  # as many of its weights are 0


def test_flash_attention_gets_longer_keys_of_an_even_number(monkeypatch):
    """cuDNN's takes no prefix. What runs here in its place is XLA's."""
    plain, seen = jax.nn.dot_product_attention, []

    def attend(query, key, value, implementation, **options):
        seen.append((implementation, key.shape[1]))
        return plain(query, key, value, **options)

    monkeypatch.setattr(ops, "_implementation", lambda *_: "cudnn")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    for keys in (QUERIES, QUERIES + 1):
        x = operands(keys)
        want = [attended(*row, SCALE, window=2) for row in zip(*longer(*x), strict=True)]
        np.testing.assert_allclose(run("tpu", *x, window=2), want, atol=3e-6)
    assert seen == [("cudnn", 10), ("cudnn", 10)]
