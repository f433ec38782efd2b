"""Virtual tokens before texts that are packed in a row: as before each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models.decoder import FULL, SLIDING, Decoder, DecoderConfig
from jpeft.text.conversations import Batches, Encoded
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEXTS = [np.random.default_rng(n).integers(0, 60, n) for n in (5, 7, 3, 6)]
KINDS = {
    "full": {},
    "window": {"sliding_window": 4, "layer_types": (SLIDING, SLIDING)},  # shorter than the virtual tokens and a text
    "both": {"sliding_window": 9, "layer_types": (FULL, SLIDING)},
}
PROMPTS = {
    "prompt": jpeft.methods.PromptTuning(length=5),
    "prompt and prefix": jpeft.Chain(jpeft.methods.PromptTuning(length=2), jpeft.PrefixTuning(length=3)),
    "prefix": jpeft.PrefixTuning(length=5),
    "prefix, shifted": jpeft.PrefixTuning(length=5, shift_positions=True),
}


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("full", "prompt"),
        ("window", "prompt"),
        ("both", "prompt"),
        pytest.param("both", "prompt and prefix", marks=pytest.mark.exhaustive),
        pytest.param("both", "prefix", marks=pytest.mark.exhaustive),
        ("full", "prefix, shifted"),
    ],
)
def test_packed_texts_share_virtual_tokens(kind, prompt):
    cfg = DecoderConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **KINDS[kind],
    )  # fmt: skip
    model = Decoder(cfg)
    params = parameters(model, jnp.zeros((1, 4), jnp.int32))
    peft = PROMPTS[prompt].bind(model, params, jnp.zeros((1, 4), jnp.int32))
    adapter = moved(peft, params, scale=1.0)
    every = tuple(np.ones(len(text), bool) for text in TEXTS)
    encoded = Encoded(tuple(text.astype(np.int32) for text in TEXTS), every, tuple(range(4)))
    (batch,) = Batches(encoded, batch_size=2, max_length=14)
    assert batch.segment_ids.max() == 2  # two texts in a row

    @jax.jit
    def packed(params, adapter):
        return peft.apply(
            params, adapter, batch.input_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids
        )

    @jax.jit
    def alone(params, adapter, ids):
        return peft.apply(params, adapter, ids)[0]

    logits, seen = np.asarray(packed(params, adapter)), []
    assert logits.shape[:2] == batch.input_ids.shape
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            ids = batch.input_ids[row, at]
            seen.append(ids.tolist())
            want = alone(params, adapter, jnp.pad(ids, (0, 7 - ids.size))[None])[: ids.size]
            np.testing.assert_allclose(logits[row, at], want, atol=1e-5)
    assert sorted(seen) == sorted(text.tolist() for text in TEXTS)
