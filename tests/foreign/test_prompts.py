"""Prompts on the Flax classes of transformers, unchanged: the oracle is the same model with a longer table."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.tree import flatten, unflatten
from tests.foreign.test_transformers import MODELS
from tests.foreign.test_transformers import _as_transformers_runs as _as_transformers_runs
from tests.foreign.test_transformers import pytestmark as pytestmark
from tests.zoo import moved

N, ROWS = 3, 64
VIRTUAL = {"input_ids": ROWS + np.arange(N), "position_ids": np.arange(N), "token_type_ids": 0, "attention_mask": 1}
LENGTH, CAPACITY = 6, 12


@functools.cache
def prompted(name, decoder=False):
    """A model, the bound method and an adapter; and the model with a longer table, and its parameters."""
    foreign = MODELS[name]
    hf = foreign.load()
    method = jpeft.methods.PromptTuning(length=N, decoder=decoder)
    peft = method.bind(hf.module, hf.params, **foreign.inputs)
    adapter = moved(peft, hf.params, 1.0)
    (site,), leaves = peft.sites, flatten(hf.params)
    prompt = flatten(adapter)[*site.path, "prompt"]
    leaves[site.weight_path] = jnp.concatenate([leaves[site.weight_path], prompt])
    if ("lm_head", "kernel") in leaves:
        leaves["lm_head", "kernel"] = jnp.pad(leaves["lm_head", "kernel"], ((0, 0), (0, len(prompt))))
    config = copy.deepcopy(hf.config)
    config.vocab_size = ROWS + len(prompt)
    return hf, peft, adapter, type(hf)(config, _do_init=False), unflatten(leaves)


def grown(inputs, side="", shift=0):
    """The arguments with virtual tokens, by hand."""
    out = dict(inputs)
    for own, value in VIRTUAL.items():
        if (x := inputs.get(side + own)) is not None:
            x = np.asarray(x) + (N if own == "position_ids" else 0)
            value = np.asarray(value) + (shift if own == "input_ids" else 0)
            out[side + own] = np.concatenate([np.broadcast_to(value, (len(x), N)), x], 1).astype(x.dtype)
    return out


@pytest.mark.parametrize(
    "name", ["BERT", "GPT-2", "Llama", "T5", pytest.param("Whisper", marks=pytest.mark.exhaustive)]
)
def test_the_prompt_is_read_before_the_text(name):
    inputs = dict(MODELS[name].inputs)
    if name == "GPT-2":  # padded on the left
        inputs["attention_mask"] = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]], "int32")
    hf, peft, adapter, big, full = prompted(name)
    y = jax.jit(lambda p, a: peft.apply(p, a, **inputs, output_hidden_states=True))(hf.params, adapter)
    longer = grown(inputs, "decoder_" if name == "Whisper" else "")
    expected = jax.jit(lambda p: big.module.apply({"params": p}, **longer, output_hidden_states=True))(full)
    real = slice(2 if name == "GPT-2" else 0, None)
    if name == "BERT":
        np.testing.assert_allclose(y.logits, expected.logits, atol=1e-5)
    else:
        logits = expected.logits[:, 0 if name == "T5" else N :, :ROWS]
        np.testing.assert_allclose(y.logits[:, real], logits[:, real], atol=1e-5)
    kind = {"T5": "encoder_hidden_states", "Whisper": "decoder_hidden_states"}.get(name, "hidden_states")
    for own, other in zip(y[kind], expected[kind], strict=True):
        np.testing.assert_allclose(own[:, real], other[:, N:][:, real], atol=1e-5)


def test_a_decoder_has_a_prompt_of_its_own():
    inputs = MODELS["T5"].inputs
    hf, peft, adapter, big, full = prompted("T5", decoder=True)
    longer = grown(grown(inputs), "decoder_", shift=N)
    y = jax.jit(lambda p, a: peft.apply(p, a, **inputs))(hf.params, adapter)
    expected = jax.jit(lambda p: big.module.apply({"params": p}, **longer))(full)
    np.testing.assert_allclose(y.logits, expected.logits[:, N:, :ROWS], atol=1e-5)


def test_a_cache_of_transformers_begins_with_the_prompt():
    hf, peft, adapter, *_ = prompted("GPT-2")
    ids, mask = MODELS["GPT-2"].inputs["input_ids"], np.array([[1] * 6, [0, 0, 1, 1, 1, 1]], "int32")
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    whole = peft.apply(hf.params, adapter, ids, mask, positions).logits
    held = np.ones((2, CAPACITY), "int32")
    held[:, :LENGTH] = mask
    state = {"cache": hf.init_cache(2, CAPACITY)}

    def step(state, ids, positions):
        variables = {"params": hf.params, **state}
        y, new = peft.apply(variables, adapter, ids, jnp.asarray(held), positions, mutable=["cache"])
        return y.logits, {"cache": new["cache"]}

    y, state = step(state, ids[:, :3], positions[:, :3])
    np.testing.assert_allclose(y[0], whole[0, :3], atol=1e-5)
    run = jax.jit(step)
    for i in range(3, LENGTH):
        y, state = run(state, ids[:, i : i + 1], positions[:, i : i + 1])
        np.testing.assert_allclose(y[:, 0], whole[:, i], atol=1e-5)
    # Virtual tokens take the last places, which is told where it is known, and gives NaN where it is not.
    late = np.full((2, 1), CAPACITY - N)
    assert np.isnan(run(state, ids[:, :1], late)[0]).all()
    with pytest.raises(ValueError, match="the cache has 12 places, of which 3 hold virtual tokens"):
        step(state, ids[:, :1], late)


def test_a_part_of_a_model_that_embeds_by_itself_is_refused():
    hf, peft, adapter, *_ = prompted("T5")
    with peft.intercept(), pytest.raises(ValueError, match="none are among the arguments of the model's own call"):
        hf.encode(MODELS["T5"].inputs["input_ids"], params=peft.overlay(hf.params, adapter))
