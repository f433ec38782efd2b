"""The decoder against its formulas in numpy float64: every family, with and without a cache, scanned or not."""

import functools
import itertools
import json
import math
import tracemalloc

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft import models
from jpeft.core import tree
from jpeft.models import decoder, decoder_hf, ops
from jpeft.models.decoder import FULL, SLIDING
from jpeft.models.kv_cache import init_cache
from jpeft.models.rotary import Rotary
from tests.zoo import save_tensors

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}
# Together they cover full, sliding and mixed layers, soft-caps, normalized queries and keys, biases, a tied head.
KINDS = {
    "llama": {"model_type": "llama", "rope_theta": 500.0},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2, "rope_local_base_freq": 50.0},
}
LENGTHS, WIDTH = (11, 7, 2), 11
ROWS = [np.random.default_rng(n).integers(0, 60, n) for n in LENGTHS]


def build(config, **options):
    return decoder_hf.from_config({**SIZES, **config}, **options)


def shapes(model):
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int)))["params"]


@functools.cache
def tiny(kind, **options):
    """A model and its tree in numpy; no two layers, norms or biases are equal."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        spread, middle = (0.25, 0.0) if path[-1] in ("kernel", "embedding") else (0.1, 0.5)
        return (middle + spread * rng.normal(size=shape.shape)).astype(np.float32)

    model = build(KINDS[kind], **options)
    params = tree.map_with_path(leaf, shapes(build(KINDS[kind])))
    return model, params if model.scan_layers else models.unstack(params)


@functools.cache
def jitted(model):
    """One compiled program for all tests of equal models and shapes."""
    return jax.jit(model.apply, static_argnames="logits_to_keep")


def exhaustive(*values, **options):
    return pytest.param(*values, marks=pytest.mark.exhaustive, **options)


def padded(side, rows=ROWS, width=WIDTH):
    """The rows as one batch with padding on one side, and its mask."""
    ids, mask = np.zeros((len(rows), width), int), np.zeros((len(rows), width), int)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


# --- the formulas ---


def normed(x, scale, cfg):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.rms_norm_eps) * (scale + cfg.gemma)


def linear(x, leaves):
    return x @ leaves["kernel"] + leaves.get("bias", 0.0)


def rotated(x, theta):
    """Rotary embedding of `[length, heads, head_dim]`: pairs (i, i + head_dim / 2) as complex numbers, rotated."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def attended(query, key, value, scale, window=None, softcap=None, allowed=None):
    """Attention of one row, `[length, heads, head_dim]`. Keys before the queries' own are a prefix for all queries."""
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, key) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    before = len(key) - len(query)
    for q in range(len(query)):
        for k in range(len(query)):
            seen = k <= q and (window is None or q - k < window) and (allowed is None or allowed[q, k])
            if not seen:
                scores[:, q, before + k] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


def reference(model, params, row, prefix=None):
    """The logits of one row of tokens. `prefix`: keys and values `[length, kv_heads, head_dim]` of each layer."""
    cfg = model.config
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers = params["model"]["layers"]
    if "0" not in layers:
        layers = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(cfg.num_hidden_layers)}
    act = {"silu": lambda x: x / (1 + np.exp(-x)), "gelu_pytorch_tanh": lambda x: x / 2 * (1 + np.tanh(
        np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))}[cfg.hidden_act]  # fmt: skip
    x = params["model"]["embed_tokens"]["embedding"][row]
    if cfg.gemma:
        x = x * np.sqrt(cfg.hidden_size)
    for i, kind in enumerate(cfg.layer_types):
        own = layers[str(i)]
        attention, mlp = own["self_attn"], own["mlp"]
        h = normed(x, own["input_layernorm"]["scale"], cfg)
        query, key, value = (linear(h, attention[f"{n}_proj"]).reshape(len(row), -1, cfg.head_dim) for n in "qkv")
        if cfg.qk_norm:
            query = normed(query, attention["q_norm"]["scale"], cfg)
            key = normed(key, attention["k_norm"]["scale"], cfg)
        theta = (cfg.rotary_sliding if kind == SLIDING and cfg.rotary_sliding else cfg.rotary).theta
        query, key = rotated(query, theta), rotated(key, theta)
        if prefix is not None:
            key, value = np.concatenate([prefix[i][0], key]), np.concatenate([prefix[i][1], value])
        window = cfg.sliding_window if kind == SLIDING else None
        out = attended(query, key, value, cfg.query_pre_attn_scalar**-0.5, window, cfg.attn_logit_softcapping)
        out = linear(out.reshape(len(row), -1), attention["o_proj"])
        if cfg.gemma:
            out = normed(out, own["post_attention_layernorm"]["scale"], cfg)
        x = x + out
        h = normed(x, own["pre_feedforward_layernorm" if cfg.gemma else "post_attention_layernorm"]["scale"], cfg)
        out = linear(act(linear(h, mlp["gate_proj"])) * linear(h, mlp["up_proj"]), mlp["down_proj"])
        if cfg.gemma:
            out = normed(out, own["post_feedforward_layernorm"]["scale"], cfg)
        x = x + out
    x = normed(x, params["model"]["norm"]["scale"], cfg)
    tied = cfg.tie_word_embeddings
    logits = x @ params["model"]["embed_tokens"]["embedding"].T if tied else linear(x, params["lm_head"])
    cap = cfg.final_logit_softcapping
    return cap * np.tanh(logits / cap) if cap else logits


def assert_rows(logits, mask, want, err_msg=""):
    """Compares the logits of each row's tokens with those of the row alone."""
    for i, row in enumerate(want):
        got = np.asarray(logits[i])[np.asarray(mask[i]) == 1]
        np.testing.assert_allclose(got, row, atol=2e-4, rtol=1e-4, err_msg=f"row {i} {err_msg}")


@pytest.mark.parametrize(
    ("kind", "scan_layers"),
    [*((kind, True) for kind in KINDS), exhaustive("mistral", False), exhaustive("qwen2", False), ("gemma3", False)],
)
def test_logits_are_those_of_the_formulas_with_padding_on_either_side(kind, scan_layers):
    model, params = tiny(kind, scan_layers=scan_layers)
    want = [reference(model, params, row) for row in ROWS]
    apply = jitted(model)
    for side in ("left", "right"):
        ids, mask = padded(side)
        assert_rows(apply({"params": params}, ids, mask), mask, want, side)
    if kind in ("llama", "mistral"):  # models with layers of one kind run without a mask
        assert_rows(apply({"params": params}, ids, None)[:1], mask[:1], want[:1], "no mask")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "kind", [exhaustive(kind) if kind in ("mistral", "qwen3", "gemma2") else kind for kind in KINDS]
)
def test_a_cache_filled_in_chunks_and_token_by_token_gives_the_same_logits(kind, side):
    """Three chunks of four slots with padding on one side, then three tokens; the window is shorter than the text."""
    scan_layers = kind not in ("llama", "gemma3")
    model, params = tiny(kind, scan_layers=scan_layers)
    rows = [np.concatenate([row, [5, 8, 9]]) for row in ROWS]
    ids, mask = padded(side, ROWS, 12)
    apply = _with_cache(model)
    cache, pieces, seen = init_cache(model, 3, 20), [], []
    for at in range(0, 12, 4):
        seen.append(mask[:, at : at + 4])
        logits, cache = apply(params, ids[:, at : at + 4], cache, seen[-1])
        pieces.append(np.asarray(logits))
    for token in (5, 8, 9):
        seen.append(np.ones((3, 1), int))
        logits, cache = apply(params, token * seen[-1], cache, seen[-1])
        pieces.append(np.asarray(logits))
    assert int(cache["index"]) == 15
    want = [reference(model, params, row) for row in rows]
    assert_rows(np.concatenate(pieces, axis=1), np.concatenate(seen, axis=1), want)


@functools.cache
def _with_cache(model):
    return jax.jit(lambda p, ids, cache, mask: model.apply({"params": p}, ids, attention_mask=mask, cache=cache))


def test_a_cache_of_another_dtype():
    model, params = tiny("llama", scan_layers=False)
    ids, mask = (x[:, -4:] for x in padded("left"))
    want = _with_cache(model)(params, ids, init_cache(model, 3, 20), mask)[0]
    logits, cache = _with_cache(model)(params, ids, init_cache(model, 3, 20, jnp.bfloat16), mask)
    assert cache["key"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert 0 < np.abs(logits - want).max() < 0.1 * np.abs(want).max()


def test_logits_depend_on_differences_of_positions_only():
    model, params = tiny("llama")
    ids, counted = ROWS[0][None], np.arange(WIDTH)[None]
    apply = jax.jit(lambda positions: model.apply({"params": params}, ids, position_ids=positions))
    want = reference(model, params, ROWS[0])[None]
    np.testing.assert_allclose(apply(counted + 9), want, atol=2e-4, rtol=1e-4)
    assert np.abs(apply(2 * counted) - want).max() > 0.1


def test_logits_to_keep_returns_the_last_logits():
    model, params = tiny("gemma2")
    ids, mask = padded("left")
    apply = jitted(model)
    last = apply({"params": params}, ids, mask, logits_to_keep=2)
    np.testing.assert_allclose(last, apply({"params": params}, ids, mask)[:, -2:], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_segments_have_the_logits_of_separate_rows(kind):
    model, params = tiny(kind)
    ids = np.concatenate(ROWS)[None]
    segments = np.repeat(np.arange(3), LENGTHS)[None]
    restarted = np.concatenate([np.arange(n) for n in LENGTHS])[None]
    want = np.concatenate([reference(model, params, row) for row in ROWS])[None]
    apply = jitted(model)
    for positions in (np.arange(sum(LENGTHS))[None], restarted):
        logits = apply({"params": params}, ids, segment_ids=segments, position_ids=positions)
        np.testing.assert_allclose(logits, want, atol=2e-4, rtol=1e-4)
        one = apply({"params": params}, ids, segment_ids=0 * segments, position_ids=positions)
        assert np.abs(one - want).max() > 0.1
    with pytest.raises(ValueError, match="segment_ids cannot be combined with a cache"):
        model.apply({"params": params}, ids, segment_ids=segments, cache=init_cache(model, 1, 20))


def test_value_and_gradient_of_a_row_of_padding_only_are_finite():
    model, params = tiny("gemma3")
    ids, mask = padded("left")
    mask[1] = 0
    loss, grads = jax.jit(jax.value_and_grad(lambda p: model.apply({"params": p}, ids, mask).std()))(params)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# --- stacked layers, layers one by one, rematerialization ---


def loss_of(model):
    ids, mask = padded("left")

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, ids, mask)[:, :-1])
        picked = jnp.take_along_axis(log_p, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.mean(picked, where=mask[:, :-1] == 1)

    return loss


@functools.cache
def gradient(kind, **options):
    model, params = tiny(kind, **options)
    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss_of(model)))(params))


def assert_trees_close(a, b, atol=1e-6):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        x, y = (np.asarray(leaves[path], np.float32) for leaves in (a, b))
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4 if atol else 0, err_msg=tree.join(path))


def test_stacked_layers_have_the_gradients_of_layers_one_by_one():
    stacked, one_by_one = gradient("qwen2", scan_layers=True), gradient("qwen2", scan_layers=False)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one_by_one))
    assert_trees_close(stacked, models.stack(one_by_one))
    assert_trees_close(models.unstack(stacked), one_by_one)


@pytest.mark.parametrize("remat", ["full", exhaustive("dots"), exhaustive("dots_saveable"), "offload"])
def test_remat_changes_no_gradient(remat):
    assert_trees_close(gradient("qwen2", remat=remat), gradient("qwen2", scan_layers=True))


def test_remat_saves_less_for_the_backward_pass():
    ids = jnp.zeros((4, 64), int)

    def residuals(remat):
        model = build({"model_type": "llama", "num_hidden_layers": 6}, remat=remat)
        saved = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply({"params": p}, ids).std(), p)[1], shapes(model))
        return tree.size_bytes(saved) - tree.size_bytes(shapes(model))

    everything, dots, full = residuals(None), residuals("dots"), residuals("full")
    assert full < dots < everything and full < everything / 2


@pytest.mark.exhaustive
def test_remat_uses_less_memory_in_a_gradient_step():
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def temporary(remat):
        model = build({"model_type": "llama", "num_hidden_layers": 6}, remat=remat)
        step = jax.jit(jax.grad(lambda p, ids: model.apply({"params": p}, ids).std()))
        return step.lower(shapes(model), ids).compile().memory_analysis().temp_size_in_bytes

    everything, dots, full = temporary(None), temporary("dots"), temporary("full")
    assert full < dots < everything and full < everything / 2


def equations(jaxpr):
    """The number of equations at all depths."""
    inner = [x for eqn in jaxpr.eqns for p in eqn.params.values() for x in (p if isinstance(p, tuple) else (p,))]
    inner = [getattr(x, "jaxpr", x) for x in inner]
    return len(jaxpr.eqns) + sum(equations(x) for x in inner if hasattr(x, "eqns"))


@pytest.mark.parametrize("kind", ["llama", exhaustive("qwen2"), "gemma3"])
def test_the_program_does_not_grow_with_depth(kind):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def sizes(layers, **options):
        model = build({**KINDS[kind], "num_hidden_layers": layers}, remat="full", **options)
        assert len(set(model.config.layer_types)) == (1 if kind == "llama" else 2)
        step = jax.value_and_grad(lambda p, ids: model.apply({"params": p}, ids).std())
        traced = jax.jit(step).trace(shapes(model), ids)
        return equations(traced.jaxpr.jaxpr), len(traced.lower().as_text())

    (few, short), (many, long) = sizes(2), sizes(8)
    assert many == few
    assert abs(long - short) < 0.01 * short  # longer lists of flags and more digits only
    assert kind != "llama" or sizes(3, scan_layers=False)[0] > few  # the count does grow with layers one by one


def test_bfloat16_is_close_to_float32():
    model, params = tiny("qwen3")
    ids, mask = padded("left")
    want = np.concatenate([reference(model, params, row) for row in ROWS])
    for half, tree_ in (
        (build(KINDS["qwen3"], dtype=jnp.bfloat16), params),
        (build(KINDS["qwen3"], param_dtype=jnp.bfloat16), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)),
    ):
        logits = jax.jit(half.apply)({"params": tree_}, ids, mask)
        assert logits.dtype == jnp.float32
        difference = np.concatenate([x[m == 1] for x, m in zip(np.asarray(logits), mask, strict=True)]) - want
        assert 0 < np.sqrt((difference**2).mean()) < 0.05 * want.std()
        states = functools.partial(half.apply, method="hidden_states")
        assert jax.eval_shape(states, {"params": tree_}, ids, mask).dtype == jnp.bfloat16
        assert init_cache(half, 1, 8)["key"].dtype == jnp.bfloat16
    grads = jax.eval_shape(jax.grad(lambda p: half.apply({"params": p}, ids, mask).std()), tree_)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_attention_dropout_follows_the_caller():
    model = build({**KINDS["llama"], "attention_dropout": 0.5})
    params = tiny("llama")[1]
    ids = ROWS[0][None]
    drop = jax.jit(functools.partial(model.apply, deterministic=False))

    def run(seed):
        return drop({"params": params}, ids, rngs={"dropout": jax.random.key(seed)})

    plain = reference(*tiny("llama"), ROWS[0])[None]
    np.testing.assert_allclose(jitted(model)({"params": params}, ids), plain, atol=2e-4, rtol=1e-4)
    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 0.1 and np.abs(run(0) - plain).max() > 0.1
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        drop({"params": params}, ids)


def test_attention_dropout_is_right_on_average():
    """Dropout acts on the weights after the softmax, in which the output is linear."""
    module = decoder.SelfAttention(build({"model_type": "llama", "attention_dropout": 0.3}).config, deterministic=False)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 5, heads, 8)), jnp.float32) for heads in (4, 2, 2))

    def run(rng):
        return module.apply({}, query, key, value, None, rngs={"dropout": rng}, method="attend")

    runs = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), 2000)))
    np.testing.assert_allclose(runs.mean(0), ops.attention(query, key, value, scale=8**-0.5), atol=0.08)
    assert runs.std(0).max() > 0.3


# --- attention and rotary embedding ---


@pytest.fixture(params=["here", "jax"])
def path(request, monkeypatch):
    """The attention that runs on CPUs, and `jax.nn.dot_product_attention`, which runs elsewhere."""
    if request.param == "jax":
        monkeypatch.setattr("jpeft.core.backend.flatten_tokens", lambda: False)
    return request.param


def attention_cases():
    """All combinations. Outside of an orthogonal array, in which all pairs of values occur, they are exhaustive."""
    for a, b, c, d, e in itertools.product((0, 1), repeat=5):
        case = (("here", "jax")[a], (2, 4)[b], bool(c), (None, 3)[d], (None, 2.0)[e])
        yield pytest.param(*case, marks=() if (d, e) == (a ^ b, a ^ c) else pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("path", "kv_heads", "masked", "window", "softcap"), list(attention_cases()), indirect=["path"]
)
def test_attention_is_the_formula(path, kv_heads, masked, window, softcap):
    """With as many keys as queries, and with a prefix of three more keys, to which all attend whatever the window."""
    attend = jax.jit(functools.partial(ops.attention, scale=0.4, window=window, softcap=softcap))
    rng = np.random.default_rng(0)
    for before in (0, 3):
        query = rng.normal(size=(2, 6, 4, 8))
        key, value = (rng.normal(size=(2, 6 + before, kv_heads, 8)) for _ in range(2))
        allowed = np.tril(rng.random((2, 6, 6)) < 0.6) | np.eye(6, dtype=bool) if masked else [None, None]
        mask = None
        if masked:  # an explicit mask contains causality and window
            near = np.subtract.outer(np.arange(6), np.arange(6)) < (window or 6)
            mask = np.concatenate([np.ones((2, 6, before), bool), allowed & near], axis=-1)[:, None]
        operands = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
        mask = None if mask is None else jnp.asarray(mask)
        got = attend(*operands, mask)
        want = [attended(*row, 0.4, window, softcap, a) for *row, a in zip(query, key, value, allowed, strict=True)]
        np.testing.assert_allclose(got, want, atol=3e-6, err_msg=f"{before} before")


@pytest.mark.parametrize("path", [exhaustive("here"), "jax"], indirect=True)
def test_a_decoder_runs_on_either_attention(path):
    model, params = tiny("mistral")
    ids, mask = padded("left")
    want = [reference(model, params, row) for row in ROWS]
    # a function of its own, because one traced on the other path would be found in the cache
    apply = jax.jit(lambda p, ids, mask: model.apply({"params": p}, ids, mask))
    assert_rows(apply(params, ids, mask), mask, want)
    assert_rows(apply(params, ids, None)[:1], mask[:1], want[:1])


def llama3(f, factor, low, high, trained):
    """The frequencies by wavelength, as in Meta's code."""
    out = []
    for x in f:
        wavelength = 2 * math.pi / x
        if wavelength < trained / high:
            out.append(x)
        elif wavelength > trained / low:
            out.append(x / factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            out.append((1 - smooth) * x / factor + smooth * x)
    return np.array(out)


def yarn(f, factor, fast, slow, trained, theta, truncate=True):
    """As in the paper's code: divided for pairs that turn less than `slow` times, unchanged above `fast` times."""
    dim = 2 * len(f)
    low, high = (dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(f)) - low) / (high - low), 0, 1)
    return f / factor * ramp + f * (1 - ramp)


PLAIN = 500.0 ** (-np.arange(8) / 8)
FREQUENCIES = {
    "default": ({}, PLAIN, 1.0),
    "linear": ({"rope_type": "linear", "factor": 2.5}, PLAIN / 2.5, 1.0),
    "llama3": ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                "original_max_position_embeddings": 32}, llama3(PLAIN, 8, 1, 4, 32), 1.0),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
             yarn(PLAIN, 4, 32, 1, 256, 500.0), 0.1 * math.log(4) + 1),
    "yarn of the config's length": ({"type": "yarn", "factor": 4.0}, yarn(PLAIN, 4, 32, 1, 1024, 500.0),
                                    0.1 * math.log(4) + 1),
    "yarn with all": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 20,
                       "beta_slow": 2, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4},
                      yarn(PLAIN, 4, 20, 2, 256, 500.0, truncate=False),
                      (0.07 * math.log(4) + 1) / (0.04 * math.log(4) + 1)),
    "yarn with its factor": ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
                             yarn(PLAIN, 4, 32, 1, 1024, 500.0), 1.25),
}  # fmt: skip


@pytest.mark.parametrize("name", FREQUENCIES)
def test_rotary_frequencies_are_the_formulas(name):
    scaling, frequencies, scale = FREQUENCIES[name]
    config = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": scaling, "max_position_embeddings": 1024}
    rotary = build(config).config.rotary
    if name not in ("default", "linear"):  # some frequencies are divided, some are not
        assert (ratio := PLAIN / frequencies).max() > 1 and ratio.min() == 1
    positions = np.array([[0, 3, 70]])
    cos, sin = rotary.table(jnp.asarray(positions), 16, 1024)
    np.testing.assert_allclose(rotary.frequencies(16, 1024), frequencies, rtol=1e-6)
    np.testing.assert_allclose(cos, np.cos(positions[..., None] * frequencies) * scale, atol=2e-5)
    np.testing.assert_allclose(sin, np.sin(positions[..., None] * frequencies) * scale, atol=2e-5)


def test_dynamic_rotary_depends_on_the_length_of_each_row():
    rotary = Rotary(theta=500.0, rope_type="dynamic", factor=3.0)
    positions = jnp.array([[0, 1, 7], [0, 1, 19]])  # within the trained 8, and beyond
    cos, _ = rotary.table(positions, 16, 8)
    theta = 500.0 * (3 * 20 / 8 - 2) ** (16 / 14)
    for row, base in zip((0, 1), (500.0, theta), strict=True):
        want = np.cos(np.asarray(positions)[row, :, None] * base ** (-np.arange(8) / 8))
        np.testing.assert_allclose(cos[row], want, atol=1e-5)


# --- prefixes ---


def with_prefix(kind, method, **options):
    """A Peft, its adapter, and the keys and values that it adds to each layer, in numpy."""
    model, params = tiny(kind, **options)
    peft = method.bind(model, params, jnp.zeros((1, 4), int))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(peft.init, jax.random.key(1), params)
    adapter = jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapter)
    layers = wide["model"]["layers"]
    if model.scan_layers:
        layers = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(3)}
    own = [layers[str(i)]["self_attn"] for i in range(3)]
    if not method.reparametrize:
        return peft, params, adapter, [(leaves["prefix_key"], leaves["prefix_value"]) for leaves in own]
    shared = wide["prefix_tuning"]
    hidden, prefix = np.tanh(shared["embedding"] @ shared["kernel"] + shared["bias"]), []
    for leaves in own:
        shape = (method.length, *leaves["prefix_key_bias"].shape)
        key, value = np.split(hidden @ leaves["prefix_kernel"], 2, axis=-1)
        prefix.append((key.reshape(shape) + leaves["prefix_key_bias"],
                       value.reshape(shape) + leaves["prefix_value_bias"]))  # fmt: skip
    return peft, params, adapter, prefix


PREFIX = jpeft.PrefixTuning(length=5)  # longer than the window
NETWORK = jpeft.PrefixTuning(length=5, reparametrize=True, hidden=6, embedding=7)


@pytest.mark.parametrize(
    ("kind", "scan_layers", "method"),
    [
        exhaustive("llama", True, PREFIX, id="full"),
        pytest.param("mistral", True, NETWORK, id="window, network"),
        exhaustive("mistral", False, PREFIX, id="window, one by one"),
        pytest.param("gemma2", True, PREFIX, id="mixed"),
        exhaustive("qwen2", False, NETWORK, id="mixed, one by one, network"),
    ],
)
def test_a_prefix_adds_keys_and_values_for_all_queries(kind, scan_layers, method):
    """With padding on either side, beyond the window, and with a cache, in chunks and token by token."""
    peft, params, adapter, prefix = with_prefix(kind, method, scan_layers=scan_layers)
    want = [reference(peft.model, params, row, prefix) for row in ROWS]
    assert np.abs(want[0] - reference(peft.model, params, ROWS[0])).max() > 0.1
    apply = jax.jit(peft.apply)
    for side in ("right", "left"):
        ids, mask = padded(side)
        counted = np.maximum(mask.cumsum(axis=1) - 1, 0)  # the prefix is before the tokens, not before the padding
        assert_rows(apply(params, adapter, ids, mask, counted), mask, want, side)
    if kind in ("llama", "mistral"):  # models with layers of one kind run without a mask
        assert_rows(apply(params, adapter, ids, None)[:1], mask[:1], want[:1], "no mask")
    cache, pieces = init_cache(peft.model, 3, 16), []
    step = jax.jit(lambda p, a, ids, mask, cache: peft.apply(p, a, ids, mask, cache=cache))
    for at in (0, 4, 8, 9, 10):
        new = slice(at, at + 4 if at < 8 else at + 1)
        logits, cache = step(params, adapter, ids[:, new], mask[:, new], cache)
        pieces.append(np.asarray(logits))
    assert_rows(np.concatenate(pieces, axis=1), mask, want, "cache")


# --- axis names, placing ---


RULES = [("vocab", "tensor"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"), ("embed", "fsdp")]


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_axis_names(kind, scan_layers):
    model = build(KINDS[kind], scan_layers=scan_layers)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
    specs = tree.flatten(nn.get_partition_spec(boxed)["params"])
    leaves = tree.flatten(nn.meta.unbox(boxed)["params"])
    known = {"vocab", "embed", "heads", "kv_heads", "mlp", "head_dim", "layers"}
    sizes = {"vocab": 60, "embed": 32, "mlp": 48, "layers": 3, "head_dim": model.config.head_dim}
    sizes |= {"heads": 4 * model.config.head_dim, "kv_heads": model.config.num_key_value_heads * model.config.head_dim}
    assert specs.keys() == leaves.keys()
    for path, leaf in leaves.items():
        spec = specs[path]
        assert len(spec) == leaf.ndim and set(spec) <= known, tree.join(path)
        assert [sizes[name] for name in spec] == list(leaf.shape), tree.join(path)
        assert ("layers" in spec) == (scan_layers and path[:2] == ("model", "layers")), tree.join(path)


def torch_tensors(model, params):
    """The tensors of a HuggingFace folder, with names that this file derives itself."""
    layers = {} if "0" in params["model"]["layers"] else {"layers": {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params["model"]["layers"])
        for i in range(model.config.num_hidden_layers)}}  # fmt: skip
    tensors = {}
    for path, leaf in tree.flatten({**params, "model": {**params["model"], **layers}}).items():
        value = np.asarray(leaf)
        name = ".".join((*path[:-1], "bias" if path[-1] == "bias" else "weight"))
        tensors[name] = np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
    return tensors


def write(folder, kind="llama", tensors=None, shards=1, **fields):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **KINDS[kind], **fields}))
    tensors = torch_tensors(*tiny(kind)) if tensors is None else tensors
    save_tensors(folder, tensors, shards)
    return folder


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))


@pytest.mark.parametrize("scan_layers", [True, exhaustive(False)])
def test_parameters_loaded_onto_a_mesh_give_the_same_logits(tmp_path, mesh, scan_layers):
    folder = write(tmp_path / "m", "qwen2")
    model, params = models.load(
        folder, scan_layers=scan_layers, shardings=lambda m: models.logical_shardings(m, mesh, RULES)
    )
    wanted = tree.flatten(models.logical_shardings(model, mesh, RULES))
    for path, leaf in tree.flatten(params).items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), tree.join(path)
        held = {"kernel": 8, "embedding": 8, "scale": 2, "bias": 4}[path[-1]]
        assert leaf.addressable_shards[0].data.size * held == leaf.size, tree.join(path)
    ids, mask = padded("left")
    logits = jax.jit(model.apply)({"params": params}, ids, mask)
    assert_rows(logits, mask, [reference(*tiny("qwen2"), row) for row in ROWS])


def test_layers_can_be_sharded(tmp_path, mesh):
    tensors = torch_tensors(*tiny("llama"))
    tensors = {name: value for name, value in tensors.items() if ".layers.2." not in name}
    folder = write(tmp_path / "m", tensors=tensors, num_hidden_layers=2)
    rules = [("layers", "fsdp"), ("mlp", "tensor")]
    _, params = models.load(folder, shardings=lambda m: models.logical_shardings(m, mesh, rules))
    up = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert up.addressable_shards[0].data.shape == (1, 32, 12)
    for i in range(2):
        np.testing.assert_array_equal(up[i], tensors[f"model.layers.{i}.mlp.up_proj.weight"].T)


def test_load_with_one_sharding_and_with_a_tree(tmp_path, mesh):
    folder = write(tmp_path / "m")
    everywhere = NamedSharding(mesh, P())
    model, params = models.load(folder, shardings=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(params))
    shardings = models.logical_shardings(model, mesh, RULES)
    _, again = models.load(folder, shardings=shardings)
    assert_trees_close(again, params, atol=0)
    del shardings["model"]["norm"]
    shardings["head"] = everywhere
    with pytest.raises(
        models.ModelError, match="does not match the parameters: head, model/norm/scale in one of them only"
    ):
        models.load(folder, shardings=shardings)


# --- folders ---


@pytest.mark.parametrize("kind", [kind if kind in ("qwen2", "qwen3", "gemma2") else exhaustive(kind) for kind in KINDS])
def test_a_folder_loads_as_stacked_tree_and_round_trips(tmp_path, kind):
    want_model, want = tiny(kind)
    model, params = models.load(write(tmp_path / "m", kind))
    assert model == want_model
    assert_trees_close(params, want, atol=0)
    models.save(tmp_path / "again", model, params)
    written, tensors = load_file(tmp_path / "again" / "model.safetensors"), torch_tensors(want_model, want)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)


def test_shards_load_one_by_one_in_bfloat16(tmp_path):
    want = models.unstack(tiny("gemma2")[1])
    folder = write(tmp_path / "m", "gemma2", shards=3)
    model, params = models.load(folder, scan_layers=False, param_dtype=jnp.bfloat16)
    assert not model.scan_layers and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_trees_close(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), want), atol=0)


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        pytest.param({}, 1, id="stacked"),
        exhaustive({"shardings": "one"}, 1, id="placed"),
        pytest.param({"scan_layers": False}, 2, id="one by one"),
    ],
)
def test_host_memory_holds_one_or_two_tensors_beside_the_leaves(tmp_path, options, tensors):
    """Measured by the allocations of numpy and safetensors; one by one, JAX frees a tensor only with the next one."""
    size = 32 * 2**16 * 4
    config = {**KINDS["llama"], "intermediate_size": 2**16}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(build(config)))
    folder = write(tmp_path / "m", tensors=torch_tensors(build(config), zeros), intermediate_size=2**16)
    if "shardings" in options:
        options = {"shardings": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    models.load(folder, **options)  # traces and imports, which happen once, are not counted
    tracemalloc.start()
    try:
        models.load(folder, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= peak < (tensors + 0.25) * size


UP = "model.layers.1.mlp.up_proj.weight"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name, value):
    return lambda tensors: {**tensors, name: value}


BAD_TENSORS = {
    "missing": (without(UP), "missing model/layers/1/mlp/up_proj/kernel$"),
    "a layer is missing": (lambda tensors: {k: v for k, v in tensors.items() if ".layers.2." not in k},
                           "missing model/layers/2/input_layernorm/scale, .* and 6 more"),
    "head": (without("lm_head.weight"), "missing lm_head/kernel$"),
    "one layer more": (with_tensor("model.layers.3.mlp.up_proj.weight", np.ones((48, 32), np.float32)),
                       "not part of the model: model.layers.3.mlp.up_proj.weight"),
    "a bias": (with_tensor("model.layers.1.self_attn.q_proj.bias", np.ones(32, np.float32)),
               "not part of the model: model.layers.1.self_attn.q_proj.bias"),
    "misshapen": (with_tensor(UP, np.ones((48, 31), np.float32)),
                  r"model/layers/1/mlp/up_proj/kernel has shape \(31, 48\), the model needs \(32, 48\)"),
    "another rank": (with_tensor(UP, np.ones((48, 32, 1), np.float32)), r"up_proj/kernel has shape \(1, 32, 48\)"),
    "quantized": (with_tensor(UP, np.ones((48, 32), np.int8)), f"{UP} is int8; quantized"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "scan_layers"),
    [
        *((case, True) for case in BAD_TENSORS),
        *((case, False) for case in ("missing", "misshapen")),
        *(exhaustive(case, False) for case in BAD_TENSORS if case not in ("missing", "misshapen")),
    ],
)
def test_a_bad_tensor_is_named_with_its_layer(tmp_path, case, scan_layers):
    change, message = BAD_TENSORS[case]
    folder = write(tmp_path / "m", tensors=change(torch_tensors(*tiny("llama"))))
    with pytest.raises(models.ModelError, match=message):
        models.load(folder, scan_layers=scan_layers)


def test_a_truncated_shard_is_named(tmp_path):
    folder = write(tmp_path / "m", shards=3)
    shard = folder / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(models.ModelError, match=r"model-00001\.safetensors: not a whole safetensors file"):
        models.load(folder)


def test_buffers_and_a_tied_head_may_be_in_the_file_if_they_are_right(tmp_path):
    model, params = tiny("qwen3")
    tensors, inv_freq = torch_tensors(model, params), 1e4 ** -(np.arange(0, 12, 2) / 12)
    buffers = {"model.layers.2.self_attn.rotary_emb.inv_freq": inv_freq.astype(np.float16),
               "model.rotary_emb.inv_freq": inv_freq.astype(np.float32),
               "model.layers.0.self_attn.bias": np.tri(8, dtype=bool)[None, None],
               "model.layers.0.self_attn.masked_bias": np.float32(-1e9)[None]}  # fmt: skip
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = write(tmp_path / "m", "qwen3", tensors=tensors | buffers | head)
    loaded, again = models.load(folder)
    assert_trees_close(again, params, atol=0)
    models.save(tmp_path / "saved", loaded, jax.tree.map(lambda x: x + 1, again), source=folder)
    assert_trees_close(models.load(tmp_path / "saved")[1], jax.tree.map(lambda x: x + 1, params), atol=0)

    bare = {name.removeprefix("model."): value for name, value in (tensors | buffers).items()}
    assert_trees_close(models.load(write(tmp_path / "bare", "qwen3", tensors=bare))[1], params, atol=0)

    wrong = {
        "the buffer model.rotary_emb.inv_freq has 0.5 at": {"model.rotary_emb.inv_freq": inv_freq / 2},
        r"inv_freq has shape \(5,\), but config.json gives \(6,\)": {"model.rotary_emb.inv_freq": inv_freq[:5]},
        r"bias has 1 at \[0, 1\], but config": {"model.layers.0.self_attn.bias": np.ones((8, 8))},
        "lm_head.weight differs from model.embed_tokens.weight, to which config.json ties it": {
            name: value + 1 for name, value in head.items()
        },
    }
    for number, (message, change) in enumerate(wrong.items()):
        change = {name: value.astype(np.float32) for name, value in change.items()}
        folder = write(tmp_path / str(number), "qwen3", tensors=tensors | change)
        with pytest.raises(models.ModelError, match=message):
            models.load(folder)


def test_names_of_other_versions_and_tools(tmp_path):
    model, params = tiny("gemma3")
    tensors = torch_tensors(model, params)
    for prefix in ("model.language_model.", "language_model."):  # transformers 5, and its AutoModel
        renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        vision = {f"{prefix.removesuffix('language_model.')}vision_tower.x": np.ones(2, np.float32)}
        folder = write(tmp_path / prefix, "gemma3", tensors=renamed | vision)
        assert_trees_close(models.load(folder)[1], params, atol=0)
    compiled = {f"_orig_mod.{name}": value for name, value in tensors.items()}
    with pytest.raises(
        models.ModelError, match=r"but there is _orig_mod\..*: rename .* without the prefix '_orig_mod.'"
    ):
        models.load(write(tmp_path / "compiled", "gemma3", tensors=compiled))
    folder = write(tmp_path / "twice", "gemma3", tensors=tensors, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name] + 1}, second)
    with pytest.raises(models.ModelError, match=rf"{name} is in {first.name} and in {second.name}; remove one"):
        models.load(folder)


def test_the_text_part_of_a_vision_language_model_loads(tmp_path):
    model, params = tiny("gemma3")
    tensors = {f"language_model.{name}": value for name, value in torch_tensors(model, params).items()}
    folder = write(tmp_path / "m", tensors=tensors | {"vision_tower.x.weight": np.ones((2, 2), np.float32)})
    text = {name: value for name, value in {**SIZES, **KINDS["gemma3"]}.items() if name != "model_type"}
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    (folder / "config.json").write_text(json.dumps(outer))
    loaded, again = models.load(folder)
    assert loaded.config.layer_types == model.config.layer_types and loaded.config.eos_token_id == (1, 106)
    assert_trees_close(again, params, atol=0)


# --- configs ---


LLAMA3 = FREQUENCIES["llama3"][0]
BAD_CONFIGS = {
    "unknown type": ("llama", {"model_type": "mamba"},
                     r"model_type 'mamba' is not one of bert, .*llama, mistral, qwen2"),
    "no type": ("llama", {"model_type": None}, "model_type None is not one of"),
    "bidirectional": ("gemma3", {"use_bidirectional_attention": True},
                      "use_bidirectional_attention=True is not supported, only False"),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "its weights are quantized"),
    "quantized outside": ("gemma3", {"model_type": "gemma3", "text_config": SIZES, "quantization_config": {"bits": 4}},
                          "quantized"),
    "text_config": ("gemma3", {"model_type": "gemma3", "text_config": None}, "text_config=None is not an object"),
    "rope type": ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
                  "rope_type 'longrope' is not supported, only default, linear"),
    "rope type no string": ("llama", {"rope_scaling": {"type": ["linear"], "factor": 2}},
                            "rope_type .* is not supported"),
    "rope field missing": ("llama", {"rope_scaling": {"rope_type": "linear"}}, "linear rope scaling lacks factor"),
    "rope field unknown": ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}},
                           "linear rope scaling has no beta_fast, only factor"),
    "rope number": ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}},
                    "factor='2' in the rope scaling is not a positive number"),
    "rope negative": ("llama", {"rope_scaling": {"type": "linear", "factor": -2}}, "factor=-2"),
    "rope order": ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor < high_freq_factor"),
    "rope no object": ("llama", {"rope_scaling": 5}, "rope_scaling=5 is not an object"),
    "rope no object by kind": ("gemma3", {"rope_parameters": {FULL: 5}}, "rope_scaling=5 is not an object"),
    "rope_theta twice": ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
                         "rope_theta=10000.0, but the rope scaling has rope_theta=500000.0"),
    "rope scaling twice": ("llama", {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
                           "rope_scaling=.* and rope_parameters=.* differ; keep the right one"),
    "rope_theta": ("llama", {"rope_theta": "big"}, "rope_theta='big'"),
    "layer_types too short": ("qwen2", {"layer_types": [FULL]}, "layer_types=.* must list .* for each of 3 layers"),
    "layer_types unknown": ("gemma2", {"layer_types": [FULL, "chunked_attention", FULL]},
                            "chunked_attention.* must list"),
    "layer_types no strings": ("gemma2", {"layer_types": [[FULL], 1, None]},
                               "must list sliding_attention or full_attention"),
    "layer_types no list": ("gemma2", {"layer_types": FULL}, "must list sliding_attention or full_attention"),
    "layer_types mixed": ("mistral", {"layer_types": [FULL, SLIDING, FULL]}, "mistral with layers of both kinds"),
    "no window for types": ("qwen2", {"use_sliding_window": False, "layer_types": [SLIDING] * 3},
                            "there is no sliding_window"),
    "no window": ("gemma2", {"sliding_window": None}, "there is no sliding_window"),
    "window zero": ("mistral", {"sliding_window": 0}, "sliding_window=0 is not a positive integer"),
    "window true": ("mistral", {"sliding_window": True}, "sliding_window=True is not a positive integer"),
    "window string": ("gemma3", {"sliding_window": "4"}, "sliding_window='4' is not a positive integer"),
    "pattern": ("gemma3", {"sliding_window_pattern": "2"}, "sliding_window_pattern='2' is not an integer"),
    "pattern zero": ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0 is not an integer"),
    "window layers": ("qwen2", {"max_window_layers": "1"}, "max_window_layers='1' is not an integer"),
    "heads do not split": ("llama", {"num_key_value_heads": 3}, "4 query heads do not divide over 3"),
    "no heads": ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 is not a positive integer"),
    "odd head": ("llama", {"head_dim": 7}, "head_dim=7 is not even"),
    "narrow": ("llama", {"hidden_size": 2}, "head_dim=0 is not even"),
    "string": ("llama", {"hidden_size": "big"}, "hidden_size='big' is not a positive integer"),
    "string heads": ("llama", {"num_attention_heads": "4"}, "num_attention_heads='4' is not a positive integer"),
    "fraction": ("llama", {"vocab_size": 60.5}, "vocab_size=60.5 is not a positive integer"),
    "negative": ("llama", {"head_dim": -8}, "head_dim=-8 is not a positive integer"),
    "layers": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 10,000"),
    "layers true": ("llama", {"num_hidden_layers": True}, "num_hidden_layers=True is not a positive integer"),
    "epsilon": ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' is not a non-negative number"),
    "epsilon not finite": ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps=inf"),
    "epsilon not a number": ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
    "bias": ("llama", {"attention_bias": "yes"}, "attention_bias='yes' is not true or false"),
    "cap": ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0"),
    "cap zero": ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping=0 would cap every value to 0"),
    "activation": ("llama", {"hidden_act": "mish"}, "hidden_act='mish' is not supported, only gelu"),
    "activation no string": ("gemma2", {"hidden_activation": ["silu"]}, "hidden_act=.* is not supported"),
    "eos": ("llama", {"eos_token_id": "</s>"}, "eos_token_id='</s>' is not a token id"),
    "eos nested": ("llama", {"eos_token_id": [[2]]}, "eos_token_id=.* is not a token id"),
    "bos": ("llama", {"bos_token_id": [1]}, "bos_token_id=.* is not a token id"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_an_unsupported_config_names_the_field(tmp_path, case):
    kind, fields, message = BAD_CONFIGS[case]
    folder = write(tmp_path / "m", kind, tensors={}, **fields)
    with pytest.raises(models.ModelError, match=f"config.json: .*{message}") as error:
        models.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"scan_layer": True}, "llama models have no option scan_layer, only remat, scan_layers"),
    ({"remat": "ful"}, "remat='ful' is not one of full, dots, offload, everything_saveable"),
    ({"remat": "save_only_these_names"}, "remat='save_only_these_names' is not one of"),  # needs names
    ({"remat": True}, "remat=True is not one of"),
    ({"remat": ["full"]}, "remat=.* is not one of"),
])  # fmt: skip
def test_an_unknown_option_is_an_error(tmp_path, options, message):
    with pytest.raises(models.ModelError, match=message):
        models.load(write(tmp_path / "m", tensors={}), **options)


def test_null_fields_have_the_defaults_of_the_family():
    fields = ("vocab_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "hidden_act", "tie_word_embeddings",
              "rope_scaling", "rope_theta", "layer_types", "quantization_config", "attention_bias")  # fmt: skip
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"):
        plain = decoder_hf.from_config({"model_type": kind})
        assert decoder_hf.from_config({"model_type": kind, **dict.fromkeys(fields)}) == plain


MORE_CONFIGS = {
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "eos_token_id": [1, 2], "attention_bias": True,
               "mlp_bias": True, "head_dim": 12, "attention_dropout": 0.25, "tie_word_embeddings": True},
    "yarn": {"model_type": "qwen3", "rope_scaling": FREQUENCIES["yarn with all"][0], "attention_bias": True},
    "dynamic": {"model_type": "mistral", "rope_scaling": {"type": "dynamic", "factor": 2.0}, "sliding_window": None},
    "transformers 5": {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 77.0}},
    "transformers 5, two": {"model_type": "gemma3_text", **GEMMA, "layer_types": [FULL, SLIDING, FULL],
                            "rope_parameters": {
                                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                                SLIDING: {"rope_type": "yarn", "factor": 2.0, "rope_theta": 20.0}}},
    "all full": {"model_type": "gemma2", **GEMMA, "layer_types": [FULL] * 3, "attn_logit_softcapping": None},
    "all sliding": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", [*KINDS, *MORE_CONFIGS])
def test_to_config_is_the_inverse_of_from_config(name):
    config = {**KINDS, **MORE_CONFIGS}[name]
    model = build(config)
    assert model != build({"model_type": config["model_type"], "sliding_window": 7, "rope_theta": 3.0})
    written = json.loads(json.dumps(decoder_hf.to_config(model)))
    assert decoder_hf.from_config(written) == model
    assert decoder_hf.to_config(decoder_hf.from_config(written)) == written
    assert written["architectures"] and written["model_type"] == config["model_type"]
