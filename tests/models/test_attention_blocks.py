"""Attention computed in blocks of queries, as it is traced for TPUs, against attention computed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jpeft.core.backend import compiling_for
from jpeft.models import ops
from jpeft.parallel.batches import Layout, constrained


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(ops, "_MIN_BLOCK", 4)


def heads(queries, keys, count, kv, seed=0):
    draw = np.random.default_rng(seed)
    shapes = (2, queries, count, 8), (2, keys, kv, 8), (2, keys, kv, 8)
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


SEGMENTS = jnp.asarray([[0] * 3 + [1] * 6 + [2] * 2, [0] * 11])
SEEN = (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None]) & jnp.tril(jnp.ones((11, 11), bool))
BLOCKS = {
    "causal": ((11, 11), {}),
    "window": ((11, 11), {"window": 3}),
    "prefix": ((11, 14), {}),
    "prefix and window": ((11, 14), {"window": 3}),
    "segments": ((11, 11), {"mask": SEEN, "causal": True}),
    "segments, not known to be causal": ((11, 11), {"mask": SEEN}),
    "both ways": ((11, 11), {"mask": SEEN | SEEN.swapaxes(2, 3)}),
    "keys that all see": ((11, 11), {"mask": (SEGMENTS < 2)[:, None, None]}),
    "keys that all see, in a causal call": ((11, 11), {"mask": (SEGMENTS < 2)[:, None, None], "causal": True}),
    "whole blocks": ((12, 12), {}),
}


QUICK = {("prefix and window", 2), ("segments", 2), ("keys that all see", 2), ("window", 1)}
CASES = [*((name, 2) for name in BLOCKS), ("window", 1), ("segments", 4)]


@pytest.mark.parametrize(
    "name, kv", [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.exhaustive) for case in CASES]
)
def test_attention_in_blocks_equals_attention(name, kv):
    """Values and gradients, compared with `jax.nn.dot_product_attention`."""
    (queries, keys), options = BLOCKS[name]
    mask = options.get("mask")
    if mask is None:
        mask = ops.causal_mask(queries, keys, options.get("window"))[None, None]

    def split(*operands):
        with compiling_for("tpu"):
            return ops.attention(*operands, scale=0.4, **options)

    def whole(*operands):
        return jax.nn.dot_product_attention(*operands, mask=mask, scale=0.4, implementation="xla")

    @jax.jit
    def both(*operands):
        def gradients(function):
            return jax.grad(lambda *o: (function(*o) * jnp.arange(8.0)).sum(), argnums=(0, 1, 2))(*operands)

        return [(function(*operands), *gradients(function)) for function in (split, whole)]

    operands = heads(queries, keys, 4, kv)
    assert str(jax.make_jaxpr(split)(*operands)).count("optimization_barrier") == -(-queries // 4) - 1
    for got, expected in zip(*both(*operands), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_query_without_keys_changes_no_other():
    operands = heads(11, 11, 4, 2)
    masked = SEEN & (jnp.arange(11) != 5)[None, None, :, None]
    with compiling_for("tpu"):
        got = ops.attention(*operands, masked, scale=0.4, causal=True)
        expected = ops.attention(*operands, SEEN, scale=0.4, causal=True)
    others = np.arange(11) != 5
    np.testing.assert_allclose(got[:, others], expected[:, others], atol=1e-6)
    assert np.isfinite(got).all()


def test_attention_over_sharded_tokens_is_not_split():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"))

    def barriers(*spec):
        def attend(*operands):
            with compiling_for("tpu"), constrained(Layout(mesh, P(*spec), (2, 16))):
                return ops.attention(*operands, scale=0.4)

        return str(jax.make_jaxpr(attend)(*heads(16, 16, 4, 2))).count("optimization_barrier")

    assert barriers("data", "sequence") == 0 and barriers("data") == 3
