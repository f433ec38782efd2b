"""The chunked loss: the number and gradients of the whole one, without its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.training.losses import chunked_cross_entropy

HIDDEN, VOCABULARY = 8, 40


def case(batch, length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.random.normal(keys[0], (batch, length, HIDDEN), dtype)
    head = jax.random.normal(keys[1], (HIDDEN, VOCABULARY), dtype)
    targets = jax.random.randint(keys[2], (batch, length), 0, VOCABULARY)
    return states, head, targets, (jax.random.uniform(keys[3], (batch, length)) > 0.4).astype(jnp.float32)


def whole(states, head, targets, weight):
    logits = (states @ head).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weight).sum(), jnp.where(logits.argmax(-1) == targets, weight, 0).sum()


def in_chunks(states, head, targets, weight, chunk):
    return chunked_cross_entropy(lambda h: h @ head, states, targets, weight, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 1000])
@pytest.mark.parametrize("shape", [(2, 16), (3, 7), (1, 1)])
def test_it_equals_the_whole_loss(shape, chunk):
    states, head, targets, weight = case(*shape)
    total = max(float(weight.sum()), 1.0)
    for wanted, got in (
        (whole(states, head, targets, weight), in_chunks(states, head, targets, weight, chunk)),
        (
            jax.grad(lambda s, h: whole(s, h, targets, weight)[0] / total, (0, 1))(states, head),
            jax.grad(lambda s, h: in_chunks(s, h, targets, weight, chunk)[0] / total, (0, 1))(states, head),
        ),
    ):
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


def test_targets_that_do_not_count_are_not_looked_at():
    states, head, targets, weight = case(2, 16)
    wild = jnp.where(weight == 0, -1000, targets)
    assert in_chunks(states, head, wild, weight, 4)[0] == in_chunks(states, head, targets, weight, 4)[0]
    assert in_chunks(states, head, targets, jnp.zeros_like(weight), 4)[0] == 0


def test_the_logits_are_never_whole():
    batch, length, vocabulary = 4, 128, 4096
    states, targets = jnp.ones((batch, length, HIDDEN)), jnp.ones((batch, length), int)
    head, weight = jnp.ones((HIDDEN, vocabulary)), jnp.ones((batch, length))

    def temporaries(loss):
        grad = jax.jit(jax.grad(lambda s, h: loss(s, h, targets, weight)[0], (0, 1)))
        return grad.lower(states, head).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocabulary
    saved = temporaries(whole) - temporaries(lambda *a: in_chunks(*a, 64))
    assert temporaries(whole) > logits and saved > 0.75 * logits


def test_a_chunk_of_no_token():
    with pytest.raises(ValueError, match="at least 1 token"):
        in_chunks(*case(1, 1), 0)
