"""Attentions found in a trace: prefixed, they equal the same attention of keys and values prepended by hand."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.core.dataflow import marks
from jpeft.core.dataflow.attention import evaluate, find
from jpeft.core.dataflow.axes import DATA, WEIGHT
from jpeft.models.ops import masked_softmax

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, QUERIES, HEADS, GROUPS, DIM, PREFIX = 2, 5, 2, 3, 4, 3


def weights(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": (8, HEADS * GROUPS, DIM), "k": (8, HEADS, DIM), "v": (8, HEADS, DIM), "o": (HEADS * GROUPS, DIM, 8)}
    return {n: 0.7 * jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


X = jax.random.normal(jax.random.key(7), (BATCH, QUERIES, 8))
KEYS, VALUES = jax.random.normal(jax.random.key(8), (2, PREFIX, HEADS, DIM))
CAUSAL = jnp.tril(jnp.ones((QUERIES, QUERIES), bool))
BIAS = jax.random.normal(jax.random.key(9), (HEADS * GROUPS, QUERIES, QUERIES))


def padded(x, value):
    """A mask or a bias ``[..., queries, keys]`` with the prefix's columns."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((PREFIX, 0),), constant_values=value)


def model(core, w, x, prefix=None):
    """Projections around ``core(q, k, v, mask, bias)``; with a prefix, on longer keys: the oracle."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, w[n]) for n in "qkv")
    mask, bias = CAUSAL, BIAS.astype(x.dtype)
    if prefix is not None:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(p.astype(y.dtype), (len(y), *p.shape)), y], 1)
            for p, y in zip(prefix, (k, v), strict=True)
        )
        mask, bias = padded(mask, True), padded(bias, 0)
    return jnp.einsum("bthk,hkd->btd", core(q, k, v, mask, bias), w["o"])


def traced(function, w, x):
    return jax.make_jaxpr(function)(w, x)


def origins(w):
    return [WEIGHT] * len(jax.tree.leaves(w)) + [DATA]


def changed(function, change, w, x):
    """The outputs of a function whose attentions are found, and changed."""
    closed = traced(function, w, x)
    found = find(closed.jaxpr, origins(w))
    assert found and not any(a.reason for a in found), found
    layouts = [a.layout for a in found]
    return evaluate(closed.jaxpr, closed.consts, layouts, change, [*jax.tree.leaves(w), x])[0]


def prefixed(function, w, x, prefix=(KEYS, VALUES)):
    return changed(function, lambda n, attention: attention.prefixed(*prefix), w, x)


def repeated(k):
    return jnp.repeat(k, GROUPS, axis=2)


# --- ways to write an attention ---------------------------------------------------------------------------------------


def grouped(q, k, v, mask, bias, softmax=jax.nn.softmax, cap=None):
    """Grouped queries, as in Gemma: ``BTKGH,BSKH->BKGTS``."""
    q = q.reshape(*q.shape[:2], HEADS, GROUPS, DIM) * DIM**-0.5
    s = jnp.einsum("btkgh,bskh->bkgts", q, k)
    s = s if cap is None else jnp.tanh(s / cap) * cap
    p = softmax(jnp.where(mask, s, -1e30))
    return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(*q.shape[:2], -1, DIM)


def by_hand(s, shift=True):
    e = jnp.exp(s - s.max(-1, keepdims=True)) if shift else jnp.exp(s)
    return e / e.sum(-1, keepdims=True)


def with_inverse(s):
    e = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    return e * (1 / jnp.sum(e, axis=-1, keepdims=True))


def biased(q, k, v, mask, bias):
    """T5's: repeated keys, a bias, no scaling."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)) + bias + jnp.where(mask, 0.0, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), repeated(v))


def folded(q, k, v, mask, bias):
    """Diffusers': heads folded into the batch."""

    def fold(y):
        return y.transpose(0, 2, 1, 3).reshape(-1, y.shape[1], DIM)

    s = jnp.einsum("bid,bjd->bij", fold(q), fold(repeated(k))) * 0.5
    o = jnp.einsum("bij,bjd->bid", jax.nn.softmax(s, axis=-1), fold(repeated(v)))
    return o.reshape(-1, HEADS * GROUPS, o.shape[1], DIM).transpose(0, 2, 1, 3)


def keys_first(q, k, v, mask, bias):
    """A softmax over an axis that is not the last, with ``where``."""
    s = jnp.einsum("bkhd,bqhd->khqb", repeated(k), q)
    p = jax.nn.softmax(s, axis=0, where=mask.T[:, None, :, None])
    return jnp.einsum("khqb,bkhd->bqhd", p, repeated(v))


def scaled_per_head(q, k, v, mask, bias):
    """Swin's: a temperature of each head."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)) * jnp.arange(1.0, 1 + HEADS * GROUPS)[:, None, None] + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), repeated(v))


def in_half_precision(q, k, v, mask, bias):
    """Logits in float32 of queries and keys in bfloat16."""
    q, k, v = (y.astype(jnp.bfloat16) for y in (q, repeated(k), repeated(v)))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(mask, s, -1e30)).astype(jnp.bfloat16)
    return jnp.einsum("bhqk,bkhd->bqhd", p, v, preferred_element_type=jnp.float32)


def multi_query(q, k, v, mask, bias):
    """One head of keys and values."""
    s = jnp.einsum("bqhd,bkd->bqhk", q, k[:, :, 0])
    return jnp.einsum("bqhk,bkd->bqhd", jax.nn.softmax(s), v[:, :, 0])


def over_heads(q, k, v, mask, bias):
    """One head at a time, under ``vmap``."""

    def one(q, k, v):
        return jax.nn.softmax(jnp.where(mask, q @ k.mT, -1e30)) @ v

    return jax.vmap(one, in_axes=2, out_axes=2)(q, repeated(k), repeated(v))


def in_blocks(q, k, v, mask, bias):
    """One query at a time, in a scan."""

    def one(_, operands):
        q, mask = operands
        s = jnp.einsum("bhd,bkhd->bhk", q, repeated(k))
        return None, jnp.einsum("bhk,bkhd->bhd", jax.nn.softmax(jnp.where(mask, s, -1e30)), repeated(v))

    return jax.lax.scan(one, None, (q.swapaxes(0, 1), mask))[1].swapaxes(0, 1)


def checkpointed(q, k, v, mask, bias):
    return jax.checkpoint(functools.partial(grouped, softmax=by_hand))(q, k, v, mask, bias)


def in_branch(q, k, v, mask, bias):
    return jax.lax.cond(jnp.sum(q) < jnp.inf, grouped, lambda q, *_: q, q, k, v, mask, bias)


def flax_attention(q, k, v, mask, bias):
    return nn.dot_product_attention(q, repeated(k), repeated(v), bias=bias, mask=mask, dtype=jnp.float32)


def jax_attention(q, k, v, mask, bias):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], bias=bias[None])


CORES = {
    "jax.nn.softmax": grouped,
    "soft-cap": functools.partial(grouped, cap=2.0),
    "exp / sum": functools.partial(grouped, softmax=by_hand),
    "without shift": functools.partial(grouped, softmax=functools.partial(by_hand, shift=False)),
    "exp * (1 / sum)": functools.partial(grouped, softmax=with_inverse),
    "log_softmax": functools.partial(grouped, softmax=lambda s: jnp.exp(jax.nn.log_softmax(s))),
    "logsumexp": functools.partial(grouped, softmax=lambda s: jnp.exp(s - jax.nn.logsumexp(s, -1, keepdims=True))),
    "custom_jvp": functools.partial(grouped, softmax=lambda s: masked_softmax(s, None)),
    "bias": biased,
    "folded": folded,
    "keys first": keys_first,
    "scaled per head": scaled_per_head,
    "bfloat16": in_half_precision,
    "multi-query": multi_query,
    "vmap": over_heads,
    "scan": in_blocks,
    "checkpoint": checkpointed,
    "cond": in_branch,
    "flax": flax_attention,
    "jax.nn.dot_product_attention": jax_attention,
}


def prefix_of(name):
    """The prefix in the form in which an attention shares it between heads."""
    return (KEYS[:, :1], VALUES[:, :1]) if name == "multi-query" else (KEYS, VALUES)


def close(got, want, tolerance=1e-5):
    """Equal within a tolerance on the scale of the whole array."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.parametrize("name", CORES)
def test_prefixed_attention_equals_prepended_keys(name):
    w, function = weights(), functools.partial(model, CORES[name])
    want = function(w, X, (KEYS, VALUES))
    got = jax.jit(functools.partial(prefixed, function))(w, X, prefix_of(name))
    assert float(jnp.abs(want - function(w, X)).max()) > 0.1
    close(got, want, 2e-2 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", ["jax.nn.softmax", "custom_jvp", "checkpoint", "scan", "folded"])
def test_gradients_equal_those_of_prepended_keys(name):
    w, function = weights(), functools.partial(model, CORES[name])

    def loss(run, prefix, w, x):
        return jnp.sum(jnp.sin(run(w, x, prefix)))

    want = jax.grad(functools.partial(loss, function), (0, 1))((KEYS, VALUES), w, X)
    got = jax.jit(jax.grad(functools.partial(loss, functools.partial(prefixed, function)), (0, 1)))(
        (KEYS, VALUES), w, X
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["jax.nn.softmax", "folded", "keys first", "jax.nn.dot_product_attention", "scan"])
def test_rerun_and_the_arrays_of_an_attention(name):
    w, function = weights(), functools.partial(model, CORES[name])
    seen = {}

    def change(n, attention):
        q, k, v = attention.query, attention.key, attention.value
        seen.update(query=q.shape, key=k.shape, value=v.shape, out=attention.out.shape, lse=attention.lse.shape)
        return attention.rerun(2 * q, k + 1, v - 1) + attention.rerun(value=v) - attention.out

    got = changed(function, change, w, X)
    scaled = functools.partial(model, lambda q, k, v, mask, bias: CORES[name](2 * q, k + 1, v - 1, mask, bias))
    np.testing.assert_allclose(got, scaled(w, X), rtol=0, atol=1e-5)
    n = 1 if name == "scan" else QUERIES
    assert seen == {
        "query": (BATCH, n, HEADS * GROUPS, DIM), "key": (BATCH, QUERIES, HEADS, DIM),
        "lse": (BATCH, n, HEADS * GROUPS), "value": (BATCH, QUERIES, HEADS, DIM),
        "out": (BATCH, n, HEADS * GROUPS, DIM),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["jax.nn.softmax", "folded", "scan", "jax.nn.dot_product_attention"])
def test_layouts_found_for_one_example_serve_others(name):
    w, function = weights(), functools.partial(model, CORES[name])
    layouts = [a.layout for a in find(traced(function, w, X[:1]).jaxpr, origins(w))]
    closed = traced(function, w, X)
    change = lambda n, attention: attention.prefixed(KEYS, VALUES)  # noqa: E731
    got = evaluate(closed.jaxpr, closed.consts, layouts, change, [*jax.tree.leaves(w), X])[0]
    np.testing.assert_allclose(got, function(w, X, (KEYS, VALUES)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bound", "run"), [(1, BATCH), (BATCH, 1)])
def test_a_batch_of_one_that_matmul_leaves_out(bound, run):
    def core(q, k, v, mask, bias):
        q, k, v = (y.swapaxes(1, 2) for y in (q, repeated(k), repeated(v)))
        return (jax.nn.softmax(jnp.where(mask, q @ k.mT, -1e30)) @ v).swapaxes(1, 2)

    w, function = weights(), functools.partial(model, core)
    layouts = [a.layout for a in find(traced(function, w, X[:bound]).jaxpr, origins(w))]
    closed = traced(function, w, X[:run])
    change = lambda n, attention: attention.prefixed(KEYS, VALUES)  # noqa: E731
    got = evaluate(closed.jaxpr, closed.consts, layouts, change, [*jax.tree.leaves(w), X[:run]])[0]
    np.testing.assert_allclose(got, function(w, X[:run], (KEYS, VALUES)), rtol=0, atol=1e-5)


def test_prefixes_of_examples():
    w, function = weights(), functools.partial(model, grouped)
    keys, values = jax.random.normal(jax.random.key(3), (2, BATCH, PREFIX, HEADS, DIM))
    got = prefixed(function, w, X, (keys, values))
    want = [function(w, X[i : i + 1], (keys[i], values[i]))[0] for i in range(BATCH)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=0, atol=1e-5)


def test_queries_that_see_nothing_else_see_the_prefix():
    def core(q, k, v, mask, bias):
        none = jnp.zeros_like(mask) if k.shape[1] == QUERIES else padded(jnp.zeros_like(CAUSAL), True)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k))
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, where=none), repeated(v))

    w, function = weights(), functools.partial(model, core)
    got = prefixed(function, w, X)
    np.testing.assert_allclose(got, function(w, X, (KEYS, VALUES)), rtol=0, atol=1e-5)
    gradient = jax.grad(lambda w: jnp.sum(prefixed(function, w, X)))(w)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_softmaxes_that_are_no_attention():
    def router(w, x):
        experts = jax.nn.softmax(x @ w["gate"])
        return jnp.einsum("bte,bted->btd", experts, jnp.einsum("btd,edf->btef", x, w["experts"]))

    def vocabulary(w, x):
        return jax.nn.softmax(x @ w["table"].T) @ w["table"]

    w = {"experts": jnp.ones((3, 8, 4)), "gate": jnp.ones((8, 3))}
    (found,) = find(traced(router, w, X).jaxpr, origins(w))
    assert found.layout is None and not found.reason
    w = {"table": jnp.ones((11, 8))}
    (found,) = find(traced(vocabulary, w, X).jaxpr, origins(w))
    assert found.layout is None and not found.reason


def test_attentions_belong_to_the_innermost_call_and_vmaps_add_no_axis():
    def attention(w, x):
        marks.begin_call(1, [x])
        y = model(grouped, w, x)
        marks.end_call(1)
        return y

    def twice(w, x):
        marks.begin_call(0, [x])
        y = jax.vmap(attention, in_axes=(None, 0))(w, jnp.stack([x, 2 * x]))
        z = model(biased, w, x)
        marks.end_call(0)
        return y, z

    w = weights()
    found = find(traced(twice, w, X).jaxpr, origins(w))
    alone = [find(traced(functools.partial(model, core), w, X).jaxpr, origins(w))[0] for core in (grouped, biased)]
    assert [(a.call, a.place) for a in found] == [(1, 0), (0, 0)]
    assert [a.layout for a in found] == [a.layout for a in alone]


def test_another_number_of_attentions_is_refused():
    w, function = weights(), functools.partial(model, grouped)
    closed = traced(function, w, X)
    with pytest.raises(ValueError, match="this call has 1 attentions, but 2 where it was bound"):
        evaluate(closed.jaxpr, closed.consts, [None, None], lambda n, attention: attention.out, [])


# --- a softmax in other forms -----------------------------------------------------------------------------------------


def with_sink(q, k, v, mask, bias, how="slice"):
    """A logit of each head that no key has, as in gpt-oss."""
    s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)), -1e30)
    sink = jnp.broadcast_to(jnp.arange(1.0, 1 + HEADS * GROUPS)[:, None, None], (*s.shape[:-1], 1))
    p = jax.nn.softmax(jnp.concatenate([s, sink], axis=-1), axis=-1)
    p = p[..., :-1] if how == "slice" else jnp.split(p, [s.shape[-1]], axis=-1)[0]
    return jnp.einsum("bhqk,bkhd->bqhd", p, repeated(v))


def divided_last(q, k, v, mask, bias):
    """The product with values before the division."""
    s = jnp.where(mask[:, None], jnp.einsum("bqhd,bkhd->bqhk", q, repeated(k)), -1e30)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return jnp.einsum("bqhk,bkhd->bqhd", e, repeated(v)) / e.sum(-1)[..., None]


def per_head(q, k, v, mask, bias):
    """Probabilities scaled by head."""
    s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)), -1e30)
    scale = jnp.arange(1.0, 1 + HEADS * GROUPS) / 6
    p = jnp.einsum("bhqk,h->bhqk", jax.nn.softmax(s), scale)
    return jnp.einsum("bhqk,bkhd->bqhd", p * scale[:, None, None], repeated(v))


OTHER_CORES = {
    "sink": with_sink, "sink, split": functools.partial(with_sink, how="split"), "divided last": divided_last,
    "scaled": per_head,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CORES)
def test_prefixed_attention_of_another_form(name):
    w, function = weights(), functools.partial(model, OTHER_CORES[name])
    want, got = function(w, X, (KEYS, VALUES)), jax.jit(functools.partial(prefixed, function))(w, X)
    close(got, want)
    again = changed(
        function, lambda n, attention: attention.rerun(2 * attention.query, value=attention.value + 1), w, X
    )
    scaled = functools.partial(model, lambda q, k, v, mask, bias: OTHER_CORES[name](2 * q, k, v + 1, mask, bias))
    close(again, scaled(w, X))


def blockwise(q, k, v, mask, bias):
    """A softmax over one block of keys after the other."""

    def one(carry, operands):
        m, total, y = carry
        k, v = operands
        s = jnp.einsum("bqhd,bkhd->bqhk", q, k)
        new = jnp.maximum(m, s.max(-1))
        e, old = jnp.exp(s - new[..., None]), jnp.exp(m - new)
        y = y * old[..., None] + jnp.einsum("bqhk,bkhd->bqhd", e, v)
        return (new, total * old + e.sum(-1), y), None

    start = jnp.full(q.shape[:-1], -1e30), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
    blocks = [repeated(y)[:, :, None].swapaxes(0, 1) for y in (k, v)]
    (_, total, y), _ = jax.lax.scan(one, start, tuple(blocks))
    return y / total[..., None]


def of_two_products(q, k, v, mask, bias):
    """A softmax over the logits of a cache and of own keys."""
    halves = [(k[:, :2], v[:, :2]), (k[:, 2:], v[:, 2:])]
    s = jnp.concatenate([jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)) for k, _ in halves], axis=-1)
    p = jnp.split(jax.nn.softmax(s), [2], axis=-1)
    return sum(jnp.einsum("bhqk,bkhd->bqhd", p, repeated(v)) for p, (_, v) in zip(p, halves, strict=True))


def in_rule(q, k, v, mask, bias):
    attention = jax.custom_vjp(lambda q, k, v: grouped(q, k, v, CAUSAL, None))
    attention.defvjp(lambda *xs: (attention(*xs), xs), lambda xs, g: xs)
    return attention(q, k, v)


def of_several_values(q, k, v, mask, bias):
    p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)))
    return sum(jnp.einsum("bhqk,bkhd->bqhd", p, repeated(y)) for y in (v, jnp.tanh(v)))


REASONS = {
    "several values": (of_several_values, "one softmax meet several values"),
    "blocks": (blockwise, "an online softmax"),
    "two products": (of_two_products, "the logits of several products"),
    "rule": (in_rule, "lies in a 'custom_vjp_call.*', which has a derivative of its own"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_an_attention_cannot_change(name):
    core, reason = REASONS[name]
    w, function = weights(), functools.partial(model, core)
    found = find(traced(function, w, X).jaxpr, origins(w))
    assert found and all(a.layout is None for a in found)
    assert any(re.search(reason, a.reason) for a in found), found


def with_probabilities(function, prepare=lambda s: s):
    """An attention whose probabilities are a function of its logits and its mask, which no prefix can follow."""

    def core(q, k, v, mask, bias):
        s = jnp.where(mask, prepare(jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k))), -1e9)
        return jnp.einsum("bhqk,bkhd->bqhd", function(s, mask), repeated(v))

    return core


def renormalized(p):
    return p / (p.sum(-1, keepdims=True) + 1e-13)


def of_more_queries(q, k, v, mask, bias):
    q, k = (jnp.stack([y, jnp.tanh(y)]) for y in (q, repeated(k)))
    s = jnp.einsum("bqhd,bkhd->bhqk", q[0], k[0]) + jnp.einsum("bqhd,bkhd->bhqk", q[1], k[1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, s, -1e9)), repeated(v))


MIX = jnp.eye(HEADS * GROUPS) + 0.1
LIKE_SOFTMAX = {
    "one more in the sum": with_probabilities(lambda s, m: (e := jnp.exp(s)) / (1 + e.sum(-1, keepdims=True))),
    "the sum or more": with_probabilities(lambda s, m: (e := jnp.exp(s)) / jnp.maximum(e.sum(-1, keepdims=True), 20)),
    "normalized twice": with_probabilities(lambda s, m: renormalized(jax.nn.softmax(s) * m.astype(s.dtype))),
    "squared": with_probabilities(lambda s, m: renormalized(jax.nn.softmax(s) ** 2)),
    "less the mean": with_probabilities(lambda s, m: jax.nn.softmax(s), lambda s: s - s.mean(-1, keepdims=True)),
    "less the largest of heads": with_probabilities(
        lambda s, m: (e := jnp.exp(s - s.max(1, keepdims=True))) / e.sum(-1, keepdims=True)
    ),
    "times the entropy": with_probabilities(
        lambda s, m: (p := jax.nn.softmax(s)) * -(p * jnp.log(p + 1e-9)).sum(-1, keepdims=True)
    ),
    "above a threshold": with_probabilities(lambda s, m: jnp.where((p := jax.nn.softmax(s)) > 0.1, p, 0.0)),
    "the largest two": with_probabilities(
        lambda s, m: jax.nn.softmax(jnp.where(s >= jax.lax.top_k(s, 2)[0][..., -1:], s, -1e9))
    ),
    "heads mixed before": with_probabilities(
        lambda s, m: jax.nn.softmax(s), lambda s: jnp.einsum("bhqk,hg->bgqk", s, MIX)
    ),
    "heads mixed after": with_probabilities(lambda s, m: jnp.einsum("bhqk,hg->bgqk", jax.nn.softmax(s), MIX)),
    "powers of two": with_probabilities(lambda s, m: (e := jnp.exp2(s)) / e.sum(-1, keepdims=True)),
    "with the uniform": with_probabilities(lambda s, m: 0.9 * jax.nn.softmax(s) + 0.1 / QUERIES),
    "two products of queries and keys": of_more_queries,
}


@pytest.mark.parametrize("name", LIKE_SOFTMAX)
def test_what_is_no_softmax_of_its_logits_alone_is_told(name):
    w, function = weights(), functools.partial(model, LIKE_SOFTMAX[name])
    found = find(traced(function, w, X).jaxpr, origins(w))
    assert found and all(a.layout is None and "changed by what depends on them" in a.reason for a in found), found


def test_rows_that_are_masked_everywhere_see_the_prefix_alone():
    """Their logits are -inf, and the module's own outputs of them nan."""

    def core(q, k, v, mask, bias):
        own = jnp.arange(mask.shape[1]) >= mask.shape[1] - QUERIES
        mask = mask & ~(own & (jnp.arange(QUERIES) < 2)[:, None])
        s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k)), -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), repeated(v))

    w, function = weights(), functools.partial(model, core)
    assert jnp.isnan(function(w, X)).any()
    runs = [jax.jit(jax.value_and_grad(lambda prefix, run=run: jnp.sin(run(w, X, prefix)).sum()))
            for run in (functools.partial(prefixed, function), function)]  # fmt: skip
    for a, b in zip(*(jax.tree.leaves(run((KEYS, VALUES))) for run in runs), strict=True):
        close(a, b)


# --- jax.nn.dot_product_attention -------------------------------------------------------------------------------------

LENGTHS = jnp.array([QUERIES, QUERIES - 2])
NEAR = jnp.abs(jnp.arange(QUERIES)[:, None] - jnp.arange(QUERIES)) <= 1
OPTIONS = {
    "causal": ({"is_causal": True}, CAUSAL),
    "window": ({"local_window_size": (1, 1)}, NEAR),
    "causal window": ({"is_causal": True, "local_window_size": 1}, NEAR & CAUSAL),
    "key lengths": ({"key_value_seq_lengths": LENGTHS}, (jnp.arange(QUERIES) < LENGTHS[:, None])[:, None, None]),
    "query lengths": ({"query_seq_lengths": LENGTHS}, jnp.ones_like(CAUSAL)),
    "xla": ({"implementation": "xla", "scale": 0.3}, jnp.ones_like(CAUSAL)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_arguments_of_jax_attention(name):
    options, mask = OPTIONS[name]

    def by_hand(q, k, v, _, bias):
        seen = jnp.broadcast_to(mask, (BATCH, 1, QUERIES, QUERIES))
        scale = {"scale": options["scale"]} if "scale" in options else {}
        return jax.nn.dot_product_attention(q, k, v, mask=padded(seen, True), **scale)

    def core(q, k, v, _, bias):
        return jax.nn.dot_product_attention(q, k, v, **options)

    w = weights()
    want = model(by_hand, w, X, (KEYS, VALUES))
    got = jax.jit(functools.partial(prefixed, functools.partial(model, core)))(w, X)
    seen = jnp.arange(QUERIES) < (LENGTHS if name == "query lengths" else LENGTHS[:1])[:, None]
    got, want = (jnp.where(seen[..., None], y, 0.0) for y in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_cudnn_is_refused_by_name(monkeypatch):
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 90500)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda *_: True, raising=False)

    def attention(w, x):
        q = jnp.einsum("btd,dhk->bthk", x, w["q"]).astype(jnp.bfloat16)
        return jax.nn.dot_product_attention(q, q, q, implementation="cudnn")

    w = {"q": jnp.ones((8, HEADS, 64))}
    x = jnp.ones((BATCH, 64, 8))
    (found,) = find(traced(attention, w, x).jaxpr, origins(w))
    assert found.layout is None and "of cuDNN" in found.reason and "implementation='xla'" in found.reason


def test_a_kernel_is_named():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def flash_attention_kernel(x, y):
        y[...] = jnp.exp(x[...])

    def attention(w, x):
        return pallas.pallas_call(flash_attention_kernel, out_shape=x, interpret=True)(x)

    (found,) = find(traced(attention, {}, X).jaxpr, origins({}))
    assert found.layout is None and "flash_attention_kernel" in found.reason and found.kernel
