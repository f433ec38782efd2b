"""Generation with a key-value cache against full forward passes; sampling, and the programs that are compiled."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jpeft
from jpeft import models
from jpeft.core import tree
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import FULL, SLIDING, Decoder, DecoderConfig
from jpeft.serving import generation
from jpeft.serving.generation import _decode, _prefill, generate, stream
from jpeft.serving.sampling import GenerationError, most_likely

# A layer with full attention and one with a sliding window that is shorter than the prompts.
CONFIG = DecoderConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window=5,
    layer_types=(FULL, SLIDING),
)
PROMPTS = [np.random.default_rng(n).integers(0, 60, n).tolist() for n in (12, 1, 7)]
NEW = 10
IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
KEY = jax.random.key(0)


pytestmark = pytest.mark.usefixtures("quick_compiles_of_module")


def filled(shapes, seed=0):
    """Random weights, large enough that rounding cannot change the most likely token."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes)


@functools.cache
def tiny(config=CONFIG):
    model = Decoder(config)
    return model, filled(nn.meta.unbox(jax.eval_shape(model.init, KEY, IDS)["params"]))


METHODS = {
    "lora": jpeft.LoRA(rank=2, targets="all-linear"),
    "prefix": jpeft.PrefixTuning(length=3),
    "prompt": jpeft.methods.PromptTuning(length=7),  # longer than the window
    "all": jpeft.Chain(
        jpeft.methods.PromptTuning(length=2),
        jpeft.PrefixTuning(length=3, shift_positions=True),
        jpeft.LoRA(rank=2, targets=r".*_proj"),
    ),
}
VIRTUAL = {"prompt": 7, "all": 5}


@functools.cache
def setup(method=None, scan_layers=True):
    """`(model, params, peft, adapter)`."""
    model, params = tiny()
    peft = adapter = None
    if method is not None:
        peft = METHODS[method].bind(model, params, IDS)
        adapter = filled(jax.eval_shape(peft.init, KEY, params), seed=1)
    return (model, params, peft, adapter) if scan_layers else models.unroll(model, params, peft, adapter)


def run(prompts=PROMPTS, how=generate, method=None, scan_layers=True, **settings):
    model, params, peft, adapter = setup(method, scan_layers)
    return how(model, params, prompts, **{"max_new_tokens": NEW, "peft": peft, "adapter": adapter, **settings})


@functools.cache
def uncached(method=None):
    """A forward pass without a cache: ids `[batch, length]`, padded on the right, to logits."""
    model, params, peft, adapter = setup(method)
    if peft is None:
        return jax.jit(lambda ids: model.apply({"params": params}, ids))
    return jax.jit(lambda ids: peft.apply(params, adapter, ids))


def next_logits(rows, method=None):
    ids = np.zeros((3, CONFIG.context - VIRTUAL.get(method, 8)), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    logits = np.asarray(uncached(method)(ids))
    return [logits[i, len(row) - 1] for i, row in enumerate(rows)]


@functools.cache
def _greedy(prompts, new, method, vocabulary):
    rows = [list(prompt) for prompt in prompts]
    for _ in range(new):
        for row, logits in zip(rows, next_logits(rows, method), strict=True):
            row.append(int(logits[:vocabulary].argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def greedy(prompts=PROMPTS, new=NEW, method=None, vocabulary=None):
    """Greedy decoding without a cache."""
    return [list(row) for row in _greedy(tuple(map(tuple, prompts)), new, method, vocabulary)]


# --- greedy ---


@pytest.mark.parametrize(
    ("method", "scan_layers"),
    [
        (None, True),
        pytest.param(None, False, marks=pytest.mark.exhaustive),
        ("lora", True),
        ("lora", False),
        ("prefix", True),
        ("prompt", True),
        ("prompt", False),
        pytest.param("all", True, marks=pytest.mark.exhaustive),
    ],
)
def test_greedy_decoding_equals_forward_passes_without_a_cache(method, scan_layers):
    want = greedy(method=method)
    assert run(method=method, scan_layers=scan_layers) == want
    assert len({token for row in want for token in row}) > 5  # not one repeated token
    assert method is None or want != greedy()


def test_a_prompt_alone_gives_the_tokens_of_a_batch():
    assert [run([prompt])[0] for prompt in PROMPTS] == greedy()


@pytest.mark.parametrize(
    ("length", "limits"),
    [
        (15, (1, 16)),
        (16, (1, 16)),  # 16 + 16 fill the cache of 32
        (17, (1, 16, 17)),
        pytest.param(15, (17,), marks=pytest.mark.exhaustive),
        pytest.param(16, (17,), marks=pytest.mark.exhaustive),
    ],
)
def test_lengths_around_a_bucket(length, limits):
    prompts = [(PROMPTS[0] * 2)[:length], PROMPTS[1], PROMPTS[2]]
    for new in limits:
        assert run(prompts, max_new_tokens=new) == [row[:new] for row in greedy(prompts, 17)]


@pytest.mark.parametrize("length", [32, pytest.param(38, marks=pytest.mark.exhaustive)])
def test_up_to_the_last_position_of_the_model(length):
    prompts = [PROMPTS[0], PROMPTS[1], (PROMPTS[0] * 4)[:length]]
    for limit in (CONFIG.context - length, None):  # by default, as many as the context leaves
        rows = run(prompts, max_new_tokens=limit)
        assert [row[:10] for row in rows] == greedy(prompts, 10)
        assert [len(row) for row in rows] == [CONFIG.context - length] * 3


@pytest.mark.parametrize("method", ["prompt", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_virtual_tokens_come_in_with_prompts_of_any_length(method):
    """A prompt of one token begins the cache too, alone and among others, also where it is not padded."""
    want, settings = greedy(method=method), {"method": method, "min_prompt_length": 1}
    assert run([PROMPTS[1]], **settings) == [want[1]]
    assert run(**settings) == want
    steps = list(run(how=stream, **settings))
    assert [[step[i] for step in steps] for i in range(3)] == want


@pytest.mark.parametrize("method", ["prompt", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_virtual_tokens_take_positions_of_the_model(method):
    virtual, length = VIRTUAL[method], 40
    prompts = [PROMPTS[1], (PROMPTS[0] * 4)[:length]]
    room = CONFIG.context - virtual - length
    for limit in (room, None):
        rows = run(prompts, max_new_tokens=limit, method=method)
        assert [len(row) for row in rows] == [room] * 2
    with pytest.raises(
        GenerationError, match=rf"prompt 1 has 40 tokens; with {room + 1} new ones and the {virtual} virtual"
    ):
        run(prompts, max_new_tokens=room + 1, method=method)
    whole = prompts[1] + rows[1]
    assert greedy([whole[:-1]] * 3, 1, method)[0] == whole[-1:]


def test_rows_of_several_tasks():
    """Each under its own prompt, as alone without a cache."""
    model, params = tiny()
    peft = jpeft.methods.MultitaskPromptTuning(length=3, tasks=2).bind(model, params, IDS)
    adapter = filled(jax.eval_shape(peft.init, KEY, params), seed=1)
    under = {"peft": peft, "adapter": adapter, "max_new_tokens": 4}
    rows = generate(model, params, PROMPTS, **under, arguments={"task_ids": jnp.array([1, 0, 1])})
    forward = jax.jit(lambda ids, tasks: peft.apply(params, adapter, ids, task_ids=tasks))
    whole = [[*prompt, *row] for prompt, row in zip(PROMPTS, rows, strict=True)]
    ids = jnp.array([[*row, *[0] * (24 - len(row))] for row in whole])
    found = forward(ids, jnp.array([1, 0, 1])).argmax(-1)
    for prompt, row, best in zip(PROMPTS, rows, found, strict=True):
        assert best[len(prompt) - 1 : len(prompt) + 3].tolist() == row
    with pytest.raises(GenerationError, match=r"'tasks' is none of the adapter's own; .* has task_ids"):
        generate(model, params, PROMPTS, **under, arguments={"tasks": 0})


def test_a_longer_bucket_gives_the_same_tokens():
    assert run(min_prompt_length=32) == greedy()


def test_only_ids_of_the_vocabulary_are_generated():
    assert run(vocabulary=9) == greedy(vocabulary=9)
    drawn = {token for row in run(vocabulary=9, temperature=3.0, key=KEY) for token in row}
    assert max(drawn) < 9 and len(drawn) > 4
    assert run(vocabulary=600) == greedy()  # larger than the model's


# --- stop ids ---


def cut(rows, stops):
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


@pytest.mark.parametrize("at", [0, 3, NEW - 1])
def test_a_stop_id_ends_its_row_and_is_included(at):
    want = greedy()
    for stops in ((want[0][at],), (want[0][at], want[2][1], 59)):
        assert run(stop_ids=stops) == cut(want, stops)


def test_decoding_stops_when_all_rows_have_ended():
    want = greedy()
    stops = [row[2] for row in want]
    rows, steps = run(stop_ids=stops), list(run(how=stream, stop_ids=stops))
    assert rows == cut(want, stops) and len(steps) == max(map(len, rows)) <= 3


@pytest.mark.exhaustive
def test_many_stop_ids():
    stops = list(range(0, 60, 3))
    assert run(stop_ids=stops) == cut(greedy(), stops)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8, "key": KEY, "top_k": 20}, {"max_new_tokens": 1}], ids=str
)
def test_stream_gives_the_tokens_of_generate(settings):
    rows = run(**settings)
    for stop in (rows[0][-1], rows[1][len(rows[1]) // 2], 60):
        want = cut(rows, [stop])
        steps = list(run(how=stream, stop_ids=[stop], **settings))
        assert len(steps) == max(map(len, want))
        for i, row in enumerate(want):  # None from its end on
            assert [step[i] for step in steps] == row + [None] * (len(steps) - len(row))
        assert run(stop_ids=[stop], **settings) == want


def test_stream_checks_its_arguments_at_once():
    with pytest.raises(GenerationError, match="no prompts"):
        run([], how=stream)


# --- sampling ---


def test_samples_depend_on_the_key():
    settings = {"temperature": 1.5}
    rows = run(key=KEY, **settings)
    assert rows == run(key=jax.random.key(0), **settings)
    assert rows != run(key=jax.random.key(1), **settings) and rows != greedy()
    same = run([PROMPTS[0]] * 3, key=KEY, **settings)
    assert len(set(map(tuple, same))) == 3  # rows with the same prompt sample independently


def test_the_samples_of_a_row_depend_on_that_row_only():
    settings = {"temperature": 1.0, "top_p": 0.9, "key": KEY}
    want = run(**settings)
    others = [PROMPTS[0], [9, 9, 9], [1, 2]]
    assert run(others, **settings)[0] == want[0]  # other rows
    assert run([*others[:2], PROMPTS[2]], **settings)[2] == want[2]
    assert run([PROMPTS[0]], **settings)[0] == want[0]  # the batch size
    assert run(min_prompt_length=32, **settings) == want  # padding
    assert [row[:4] for row in run(max_new_tokens=4, **settings)] == [row[:4] for row in want]  # the limit
    stop = want[1][0]
    assert run(stop_ids=[stop], **settings) == cut(want, [stop])  # the end of another row


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-6}, {"temperature": 5.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}], ids=str
)
def test_cold_or_narrow_sampling_is_greedy(settings):
    assert run(key=KEY, **settings) == greedy()


def test_no_temperature_is_too_low():
    """Logits divided by it exceed float32."""
    model, params = tiny()
    params = {**params, "lm_head": {"kernel": 50 * params["lm_head"]["kernel"]}}  # the order of tokens stays
    assert generate(model, params, PROMPTS, max_new_tokens=NEW, temperature=1e-37, key=KEY) == greedy()


def huggingface(scores, k, p):
    """transformers' TopKLogitsWarper, then TopPLogitsWarper, in numpy."""
    scores = scores.astype(np.float64)
    if k is not None:
        scores = np.where(scores < np.sort(scores)[-k], -np.inf, scores)
    if p is not None:
        order = np.argsort(scores)
        shares = np.exp(scores[order] - scores.max())
        removed = np.cumsum(shares / shares.sum()) <= 1 - p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    return scores


def test_top_k_and_top_p_keep_the_tokens_of_transformers():
    logits = np.random.default_rng(0).normal(size=(6, 60)).astype(np.float32) * np.array(
        [[0.1], [1], [2], [4], [9], [30]]
    )
    logits = logits.astype(np.float32)
    kept = jax.jit(most_likely)
    for k in (None, 1, 2, 7, 59, 60):
        for p in (None, 1e-4, 0.1, 0.5, 0.9, 0.999):
            got = kept(logits, jnp.int32(k or 60), jnp.float32(p or 1.0))
            want = [huggingface(row, k, p) for row in logits]
            np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=f"top_k={k} top_p={p}")


def test_top_p_of_one_keeps_every_token():
    """Also where the rounded sum of all shares before a token reaches 1."""
    logits = np.random.default_rng(0).normal(size=(16, 5000)).astype(np.float32)
    logits[:, 2000:] -= 20
    kept = jax.jit(most_likely)(logits, jnp.int32(4000), jnp.float32(1.0))
    assert (np.isfinite(kept).sum(axis=1) == 4000).all()


def test_frequencies_of_samples_are_their_probabilities():
    rows = 3000
    logits = next_logits([[5]] * 3)[0].astype(np.float64)

    def frequencies(**settings):
        tokens = run([[5]] * rows, max_new_tokens=1, key=KEY, **settings)
        return np.bincount([token for (token,) in tokens], minlength=60) / rows

    for temperature, k, p in ((2.0, None, None), (4.0, 10, None), (4.0, None, 0.6), (4.0, 10, 0.6)):
        kept = huggingface(logits / temperature, k, p)
        wanted = np.exp(kept - kept.max())
        wanted /= wanted.sum()
        got = frequencies(temperature=temperature, top_k=k, top_p=p)
        assert (got[wanted == 0] == 0).all()
        assert (np.abs(got - wanted) <= 5 * np.sqrt(wanted / rows)).all() and (wanted > 0.02).sum() > 4


# --- compiled programs, parameters ---


def programs():
    return _prefill._cache_size(), _decode._cache_size()


def test_lengths_in_a_bucket_and_settings_compile_nothing_new():
    run(), run(temperature=1.0, key=KEY)
    before = programs()
    for prompts in ([[1]] * 3, [[1] * 16, [2] * 3, [3]], PROMPTS):
        for new in (1, 2, 16):
            run(prompts, max_new_tokens=new)
    for settings in (
        {"temperature": 0.3},
        {"temperature": 2},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 100},
        {"stop_ids": [1]},
        {"stop_ids": range(8)},
        {"vocabulary": 50},
    ):
        run(key=jax.random.key(7), **settings)
    list(run(how=stream))
    assert programs() == before
    run([[1]] * 5, max_new_tokens=1)  # another batch size does compile
    assert programs() == (before[0] + 1, before[1])


@pytest.mark.exhaustive
def test_depth_does_not_change_the_number_of_programs():
    deep = dataclasses.replace(CONFIG, num_hidden_layers=6, layer_types=(FULL, SLIDING) * 3)
    model, params = tiny(deep)
    before = programs()
    assert [len(row) for row in generate(model, params, PROMPTS, max_new_tokens=3)] == [3, 3, 3]
    assert programs() == (before[0] + 1, before[1] + 1)


def test_the_trees_are_unchanged():
    model, params, peft, adapter = setup("lora")
    before = jax.tree.map(np.array, (params, adapter))
    first = run(method="lora")
    assert run(method="lora") == first
    for (path, leaf), old in zip(tree.flatten(params).items(), jax.tree.leaves(before[0]), strict=True):
        assert np.array_equal(leaf, old), path  # also not donated
    assert all(map(np.array_equal, jax.tree.leaves(adapter), jax.tree.leaves(before[1])))
    assert generate(model, before[0], PROMPTS, peft=peft, adapter=before[1], max_new_tokens=NEW) == first  # numpy


def test_parameters_on_a_mesh_give_the_same_tokens():
    model, params = tiny()
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))
    rules = [("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"), ("embed", "fsdp")]
    params = jax.device_put(params, models.logical_shardings(model, mesh, rules))
    assert len(params["lm_head"]["kernel"].sharding.device_set) == 4
    assert generate(model, params, PROMPTS, max_new_tokens=NEW) == greedy()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.5, "key": KEY}], ids=str)
def test_weights_that_are_not_numbers_are_an_error(settings):
    model, params = tiny()
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(GenerationError, match="logits are not finite"):
        generate(model, nan, PROMPTS, max_new_tokens=NEW, **settings)
    with pytest.raises(GenerationError, match="logits are not finite"):
        list(stream(model, nan, PROMPTS, max_new_tokens=NEW, **settings))


def test_the_default_stop_ids_are_the_models():
    model, params = tiny()
    stops = tuple(range(0, 60, 3))  # many
    stopping = model.clone(config=dataclasses.replace(model.config, eos_token_id=stops))
    assert generate(stopping, params, PROMPTS, max_new_tokens=NEW) == cut(greedy(), stops)
    others = [stop + 60 for stop in stops]
    assert generate(stopping, params, PROMPTS, max_new_tokens=NEW, stop_ids=others) == greedy()


@pytest.mark.exhaustive
def test_defaults_are_the_models_stop_ids_and_the_rest_of_the_context():
    model, params = tiny()
    rows = generate(model, params, PROMPTS, stop_ids=())
    assert {len(row) for row in rows} == {model.config.context - max(map(len, PROMPTS))}
    token = rows[0][2]
    stopping = model.clone(config=dataclasses.replace(model.config, eos_token_id=(59, token)))
    assert generate(stopping, params, PROMPTS) == generate(model, params, PROMPTS, stop_ids=(59, token))
    assert generate(stopping, params, PROMPTS, stop_ids=()) == rows


# --- mistakes ---


BAD = {
    "no prompts": ({"prompts": []}, "no prompts"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1 is empty"),
    "one prompt, not in a list": ({"prompts": [1, 2]}, "prompt 0 is not a sequence of token ids"),
    "text": ({"prompts": ["hello"]}, "prompt 0 is not a sequence of token ids"),
    "nested": ({"prompts": [[[1, 2]]]}, "prompt 0 is not a sequence of token ids"),
    "too large": ({"prompts": [[1], [3, 60]]}, "prompt 1 has the token id 60, but the vocabulary is 0 to 59"),
    "negative": ({"prompts": [[-1]]}, "prompt 0 has the token id -1"),
    "floats": ({"prompts": [[1.0, 2.0]]}, "prompt 0 has the dtype float64, expected integer token ids"),
    "booleans": ({"prompts": [[True]]}, "prompt 0 has the dtype bool"),
    "too long": ({"prompts": [[1] * 55]}, "prompt 0 has 55 tokens; with 10 new ones .* context of 64"),
    "too many": ({"max_new_tokens": 64}, "prompt 0 has 12 tokens; with 64 new ones"),
    "none": ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
    "half": ({"max_new_tokens": 1.5}, "max_new_tokens must be .* got 1.5"),
    "true": ({"max_new_tokens": True}, "max_new_tokens must be .* got True"),
    "cold": ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
    "hot": ({"temperature": float("inf"), "key": KEY}, "temperature must be .* got inf"),
    "no number": ({"temperature": float("nan"), "key": KEY}, "temperature must be .* got nan"),
    "on": ({"temperature": True, "key": KEY}, "temperature must be .* got True"),
    "no key": ({"temperature": 0.5}, r"needs a key, e\.g\. key=jax.random.key\(0\)"),
    "top_k": ({"top_k": 0}, "top_k must be a positive integer, got 0"),
    "top_k half": ({"top_k": 2.5}, "top_k must be .* got 2.5"),
    "top_p": ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    "top_p in percent": ({"top_p": 90}, "top_p must be .* got 90"),
    "vocabulary": ({"vocabulary": 0}, "vocabulary must be a positive integer, got 0"),
    "vocabulary negative": ({"vocabulary": -5}, "vocabulary must be .* got -5"),
    "stop id": ({"stop_ids": [2.5]}, r"stop_ids must be token ids, from 0 on, got \[2.5\]"),
    "no stop id": ({"stop_ids": [None]}, r"stop_ids must be token ids, from 0 on, got \[None\]"),
    "one stop id, not in a list": ({"stop_ids": 2}, "stop_ids must be token ids, from 0 on, got 2"),
    "stop text": ({"stop_ids": "2"}, "stop_ids must be token ids, from 0 on, got '2'"),
}


@pytest.mark.parametrize("how", [generate, stream])
@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_reported_before_anything_runs(case, how):
    settings, message = BAD[case]
    before = programs()
    with pytest.raises(GenerationError, match=message):
        run(how=how, **{"prompts": PROMPTS, **settings})
    assert programs() == before


def test_numpy_numbers_are_accepted():
    settings = {
        "max_new_tokens": np.int64(3),
        "temperature": np.float32(0.5),
        "top_k": np.int32(5),
        "top_p": np.float64(0.9),
        "stop_ids": np.array([59]),
    }
    plain = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "stop_ids": [59]}
    assert run([np.array(p) for p in PROMPTS], key=KEY, **settings) == run(key=KEY, **plain)


def test_a_peft_must_belong_to_the_model_and_have_an_adapter():
    model, params, peft, adapter = setup("lora")
    with pytest.raises(GenerationError, match="peft and adapter must be given together"):
        generate(model, params, PROMPTS, peft=peft)
    with pytest.raises(GenerationError, match="peft and adapter must be given together"):
        generate(model, params, PROMPTS, adapter=adapter)
    one_by_one, its_params, _, _ = setup(None, scan_layers=False)
    with pytest.raises(GenerationError, match=r"bound to another model.*jpeft\.models\.unroll"):
        generate(one_by_one, its_params, PROMPTS, peft=peft, adapter=adapter)
    with pytest.raises(TypeError, match=r"a decoder of jpeft\.models, got Bert"):
        generate(Bert(BertConfig()), params, PROMPTS)


def test_generate_and_stream_are_top_level_names():
    assert jpeft.generate is generation.generate and jpeft.stream is generation.stream
