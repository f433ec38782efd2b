"""The chunked loss: value and gradients equal those of the whole loss, without its logits in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.training.losses import chunked_cross_entropy

HIDDEN, VOCABULARY = 8, 40


def case(batch, length, dtype=jnp.float32):
    rng = np.random.default_rng(0)  # not jax.random, which would compile for each shape
    states = jnp.asarray(rng.normal(size=(batch, length, HIDDEN)), dtype)
    head = jnp.asarray(rng.normal(size=(HIDDEN, VOCABULARY)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, (batch, length)), jnp.int32)
    return states, head, targets, jnp.asarray(rng.uniform(size=(batch, length)) > 0.4, jnp.float32)


def whole(states, head, targets, weight):
    logits = (states @ head).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weight).sum(), jnp.where(logits.argmax(-1) == targets, weight, 0).sum()


def in_chunks(states, head, targets, weight, chunk):
    return chunked_cross_entropy(lambda h: h @ head, states, targets, weight, chunk)


@functools.partial(jax.jit, static_argnums=(4,))
def value_and_gradients(states, head, targets, weight, chunk=None):
    """Both sums, and the gradients of the mean loss; of the whole loss without a chunk."""

    def mean(states, head):
        sums = (
            whole(states, head, targets, weight) if chunk is None else in_chunks(states, head, targets, weight, chunk)
        )
        return sums[0] / jnp.maximum(weight.sum(), 1.0), sums

    gradients, sums = jax.grad(mean, (0, 1), has_aux=True)(states, head)
    return *sums, *gradients


# Chunks that divide the tokens, do not, are one token, all of them, and more.
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((2, 16), 1), ((2, 16), 4), ((2, 16), 7), ((2, 16), 1000), ((3, 7), 4), ((3, 7), 21), ((1, 1), 4)],
)
def test_it_equals_the_whole_loss(shape, chunk):
    inputs = case(*shape)
    for a, b in zip(value_and_gradients(*inputs), value_and_gradients(*inputs, chunk), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


def test_targets_with_weight_0_are_ignored():
    states, head, targets, weight = case(2, 16)
    invalid = jnp.where(weight == 0, -1000, targets)
    loss = jax.jit(lambda targets, weight: in_chunks(states, head, targets, weight, 4)[0])
    assert loss(invalid, weight) == loss(targets, weight)
    assert loss(targets, jnp.zeros_like(weight)) == 0


def test_the_logits_are_never_in_memory_as_a_whole():
    batch, length, vocabulary = 4, 128, 4096
    states, targets = jnp.ones((batch, length, HIDDEN)), jnp.ones((batch, length), int)
    head, weight = jnp.ones((HIDDEN, vocabulary)), jnp.ones((batch, length))

    def temporaries(loss):
        grad = jax.jit(jax.grad(lambda s, h: loss(s, h, targets, weight)[0], (0, 1)))
        return grad.lower(states, head).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocabulary
    needed = temporaries(whole)
    assert needed > logits and needed - temporaries(lambda *a: in_chunks(*a, 64)) > 0.75 * logits


def test_a_chunk_of_0_tokens_raises():
    with pytest.raises(ValueError, match="at least 1 token"):
        in_chunks(*case(1, 1), 0)
