"""Quantized bases: the values of codes, models and methods that run on them unchanged, memory, LoftQ."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.core import injection
from jpeft.core.fingerprint import difference, fingerprint
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized, block_axis, dequantize_leaf, quantize_array
from jpeft.core.schemes import NF4, SCHEMES
from jpeft.core.stacking import unstack
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.quantization.tree import is_quantized
from tests.zoo import moved

# The largest error of each scheme, relative to the largest weight of the block: half the widest gap between levels.
BOUND = {"nf4": max(np.diff(NF4)) / 2, "int4": 1 / 14, "int8": 1 / 254, "fp8": 1 / 28}
CODES = {"nf4": 4, "int4": 4, "int8": 8, "fp8": 8}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def expected(w, scheme, block):
    """The weight after quantization without double quantization, one block at a time in float64."""
    axis = block_axis(w.shape, block)
    moved = np.moveaxis(np.asarray(w, np.float64), axis, -1)
    out = np.empty_like(moved)
    for at in np.ndindex(*moved.shape[:-1]):
        for start in range(0, moved.shape[-1], block):
            run = moved[at][start : start + block]
            scale = np.abs(run).max() or 1.0
            levels = {
                "nf4": np.asarray(NF4),
                "int4": np.arange(-7, 8) / 7,
                "int8": np.arange(-127, 128) / 127,
                "fp8": np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64) / 448,
            }[scheme]
            levels = levels[np.isfinite(levels)]
            nearest = levels[np.abs(run[:, None] / scale - levels).argmin(-1)]
            out[at][start : start + block] = nearest * scale
    return np.moveaxis(out, -1, axis)


# --- one array ------------------------------------------------------------------------------------------------------


SHAPES = [(128, 6), (10, 128), (2, 64, 5), (3, 2, 4, 64), (64, 1)]


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        pytest.param(scheme, shape, marks=[] if scheme == "nf4" or shape in SHAPES[:2] else pytest.mark.exhaustive)
        for scheme in SCHEMES
        for shape in SHAPES
    ],
)
def test_every_weight_is_the_nearest_level(scheme, shape):
    w = normal(*shape)
    q = quantize_array(w, scheme, double=False)
    assert q.shape == shape and q.dtype == w.dtype
    np.testing.assert_allclose(q.unbox(), expected(w, scheme, 64), rtol=0, atol=1e-6)


CASES = [
    ("nf4", 64, (2, 64, 64), True),
    ("int4", 2, (64, 3), False),
    ("int8", 4, (3, 64), True),
    ("fp8", 32, (64, 64), True),
    ("nf4", 32, (3, 64), True),
]


@given(case=st.sampled_from(CASES), scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_no_error_exceeds_the_bound(case, scale, seed):
    scheme, block, shape, double = case
    w = normal(*shape, seed=seed) * np.float32(scale)
    q = quantize_array(w, scheme, block, double)
    axis = block_axis(shape, block)
    blocks = np.moveaxis(np.abs(w), axis, -1).reshape(-1, block)
    moved = np.moveaxis(np.abs(np.asarray(dequantize_leaf(q)) - w), axis, -1).reshape(-1, block)
    largest = blocks.max(-1, keepdims=True)
    # The error of a quantized scale is at most half the widest gap of its code, 0.8 % of the range of the scales.
    slack = 0.008 * (largest.max() - largest.min() + 1e-38) if double else 0
    assert (moved <= BOUND[scheme] * largest * (1 + 1e-5) + slack).all()


def test_the_mean_error_of_nf4_on_normal_weights():
    # bitsandbytes' tests/test_functional.py expects 0.072792 at blocks of 64.
    w = normal(1024, 1024)
    assert abs(np.abs(dequantize_leaf(quantize_array(w)) - w).mean() - 0.072792) < 2e-4


@pytest.mark.parametrize(("double", "scale_bits"), [(True, 8 / 64 + 32 / 64 / 256), (False, 32 / 64)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_per_weight(scheme, double, scale_bits):
    q = quantize_array(normal(1024, 512), scheme, double=double)
    assert q.bits == pytest.approx(CODES[scheme] + scale_bits, abs=1e-3)
    assert q.size == 1024 * 512 and q.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(q))


def test_bits_per_weight_with_an_axis_for_heads():
    q = quantize_array(normal(576, 9, 64))
    assert q.axis == -1 and q.bits < 4.3


def test_zeros_and_constants_are_exact():
    for value in (0.0, 3.0, -3.0):
        assert (dequantize_leaf(quantize_array(np.full((128, 4), value, np.float32))) == value).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_is_kept(dtype):
    w = jnp.asarray(normal(128, 4)).astype(dtype)
    q = quantize_array(w, "int8")
    assert q.dtype == q.unbox().dtype == dtype
    wide = quantize_array(w.astype(jnp.float32), "int8").unbox()
    assert (q.unbox() == wide.astype(dtype)).all()  # rounded once, at the end


def test_each_matrix_of_a_stack_is_quantized_by_itself():
    w = normal(3, 128, 4) * np.array([1.0, 50.0, 0.01], np.float32)[:, None, None]
    together = quantize_array(w)
    for i in range(3):
        alone, sliced = quantize_array(w[i]), jax.tree.map(lambda x, i=i: x[i], together)
        assert (sliced.unbox() == alone.unbox()).all() and sliced.shape == alone.shape


def test_vmap_and_jit_and_abstract_shapes_agree():
    w = jnp.asarray(normal(2, 128, 4))
    q, jitted = quantize_array(w), jax.jit(quantize_array)(w)
    abstract = quantize_array(jax.ShapeDtypeStruct(w.shape, w.dtype))
    assert jax.tree.structure(q) == jax.tree.structure(jitted) == jax.tree.structure(abstract)
    for a, b, c in zip(*map(jax.tree.leaves, (q, jitted, abstract)), strict=True):
        assert (a == b).all() and (a.shape, a.dtype) == (c.shape, c.dtype)
    assert (jax.vmap(lambda leaf: leaf.unbox())(q) == q.unbox()).all()
    assert dequantize_leaf(abstract).shape == w.shape


# --- trees ----------------------------------------------------------------------------------------------------------

SMALL = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
IDS = jax.random.randint(jax.random.key(1), (2, 16), 0, 96)


@functools.cache
def weights(scan_layers=True):
    stacked = nn.meta.unbox(jax.jit(Decoder(SMALL).init)(jax.random.key(0), IDS)["params"])
    return stacked if scan_layers else unstack(stacked)


def decoder(**options):
    return Decoder(SMALL, **options), weights(options.get("scan_layers", True))


@functools.cache
def quantized(scheme="nf4", scan_layers=True):
    """The quantized weights of `decoder`."""
    return jpeft.quantize(weights(scan_layers), scheme)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, ids):
    return model.apply({"params": params}, ids)


# Peft is static: one program for all adapters and bases of one structure.
apply = jax.jit(Peft.apply, static_argnums=0)


def arrays(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def quantized_paths(tree):
    return {jpeft.core.tree.join(p) for p, leaf in jpeft.core.tree.flatten(tree).items() if isinstance(leaf, Quantized)}


def test_default_targets_are_the_linear_layers_without_the_head():
    _, params = decoder()
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    wanted = {f"model/layers/self_attn/{n}/kernel" for n in attention} | {f"model/layers/mlp/{n}/kernel" for n in mlp}
    assert quantized_paths(jpeft.quantize(params)) == wanted
    assert quantized_paths(jpeft.quantize(params, targets=["q_proj"])) == {"model/layers/self_attn/q_proj/kernel"}
    assert quantized_paths(jpeft.quantize(params, targets=r".*/q_proj/kernel")) == {
        "model/layers/self_attn/q_proj/kernel"
    }
    assert "model/layers/self_attn/k_proj/kernel" not in quantized_paths(jpeft.quantize(params, exclude=["k_proj"]))
    assert quantized_paths(jpeft.quantize(params, targets=["lm_head"])) == {"lm_head/kernel"}
    assert is_quantized(jpeft.quantize(params)) and not is_quantized(params)


def test_params_are_not_changed_and_unquantized_leaves_are_shared():
    _, params = decoder()
    before = arrays(params)
    q = jpeft.quantize({"params": params, "cache": {"x": jnp.ones(2)}})
    assert arrays(params) == before and q["params"]["model"]["norm"] is not None
    assert q["params"]["lm_head"]["kernel"] is params["lm_head"]["kernel"] and (q["cache"]["x"] == 1).all()


OPTIONS = {"scan": {}, "layers": {"scan_layers": False}, "remat": {"remat": "full"}, "bf16": {"dtype": jnp.bfloat16}}


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("nf4", "scan"),
        ("nf4", "remat"),
        ("nf4", "bf16"),
        *((scheme, "mlp") for scheme in SCHEMES if scheme != "nf4"),
        *(pytest.param(scheme, "scan", marks=pytest.mark.exhaustive) for scheme in SCHEMES if scheme != "nf4"),
        pytest.param("nf4", "layers", marks=pytest.mark.exhaustive),
    ],
)
def test_the_model_runs_as_on_the_dequantized_weights(scheme, kind):
    options = OPTIONS.get(kind, {})
    model, params = mlp()[:2] if kind == "mlp" else decoder(**options)
    base = jpeft.quantize(params, scheme)
    plain = jpeft.dequantize(base)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    got, wanted = (np.asarray(run(model, p, IDS)) for p in (base, plain))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 if options.get("dtype") is None else 0.03)
    assert not np.allclose(got, run(model, params, IDS), atol=1e-4)


METHODS = {
    "lora": jpeft.LoRA(rank=4, targets="all-linear"),
    "dropout": jpeft.LoRA(rank=4, targets="all-linear", dropout=0.5),
    "ia3": jpeft.IA3(targets=["k_proj", "v_proj", "down_proj"]),
    "prefix": jpeft.PrefixTuning(length=3),
    "bottleneck": jpeft.Bottleneck(size=4, targets=["mlp"]),
    "bitfit": jpeft.Train(r".*norm.*"),
    "chain": jpeft.Chain(jpeft.LoRA(rank=2, targets=["q_proj"]), jpeft.IA3(targets=["q_proj", "v_proj"])),
}


class Mlp(nn.Module):
    """A model that compiles fast."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(96, 64, name="embed")(ids)
        return nn.Dense(96, name="out")(jnp.tanh(nn.Dense(64, name="hidden")(x)))


@functools.cache
def mlp():
    """The model, its weights, the quantized weights, and a LoRA for them."""
    params = jax.jit(Mlp().init)(jax.random.key(0), IDS)["params"]
    base = jpeft.quantize(params)
    return Mlp(), params, base, jpeft.LoRA(rank=4, targets=["hidden", "out"]).bind(Mlp(), base, IDS)


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("chain", True),
        *(pytest.param(n, True, marks=pytest.mark.exhaustive) for n in METHODS if n != "chain"),
        pytest.param("lora", False, marks=pytest.mark.exhaustive),
    ],
)
def test_every_method_trains_over_it_with_the_gradients_of_the_dequantized_base(name, scan):
    model, base = Decoder(SMALL, scan_layers=scan), quantized(scan_layers=scan)
    peft = METHODS[name].bind(model, base, IDS)
    adapter = moved(peft, base, 0.1)

    def loss(adapter, base):
        logits = peft.apply(base, adapter, IDS, deterministic=False, rngs={"dropout": jax.random.key(9)})
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()

    got, wanted = (jax.jit(jax.value_and_grad(loss))(adapter, p) for p in (base, jpeft.dequantize(base)))
    assert float(got[0]) == pytest.approx(float(wanted[0]), abs=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 + 1e-4 * np.abs(b).max())
        assert np.abs(b).max() > 0


def test_training_steps_lower_the_loss_and_do_not_change_the_base():
    _, _, base, peft = mlp()
    before = arrays(base)

    def loss_fn(adapter, params, batch, rng):
        logits = peft.apply(params, adapter, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean(), {}

    tx = optax.sgd(2.0)  # optax's Adam mixes dtypes, which strict promotion refuses
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), base), tx, jax.random.key(1))
    step = jpeft.train_step(peft, loss_fn, tx)
    losses = []
    for _ in range(8):
        state, metrics = step(state, base, IDS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02 and arrays(base) == before


def test_a_step_in_low_precision_casts_weights_not_scales():
    _, params, base, peft = mlp()
    tx, seen = optax.sgd(1.0), []

    def loss_fn(adapter, params, batch, rng):
        seen.append(jax.tree.map(lambda x: x, params["hidden"]["kernel"]))
        return (peft.apply(params, adapter, batch).astype(jnp.float32) ** 2).mean(), {}

    step = jpeft.train_step(peft, loss_fn, tx, compute_dtype=jnp.bfloat16)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), base), tx, jax.random.key(1))
    state, metrics = step(state, base, IDS)
    assert seen[0].dtype == jnp.bfloat16 and seen[0].groups.dtype == jnp.float32
    assert np.isfinite(float(metrics["loss"])) and jpeft.core.tree.count(base) == jpeft.core.tree.count(params)


def test_abstract_bases_give_abstract_adapters():
    model, params = decoder()
    abstract = jpeft.quantize(jax.eval_shape(lambda: params))
    peft = METHODS["lora"].bind(model, abstract, IDS)
    assert peft == METHODS["lora"].bind(model, quantized(), IDS)
    adapter = peft.init(jax.random.key(0), abstract)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapter))
    assert jax.eval_shape(peft.apply, abstract, adapter, IDS).shape == (*IDS.shape, 96)
    merged = jax.eval_shape(peft.merge, abstract, adapter)
    assert not is_quantized(merged) and merged["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (2, 64, 128)


def temporaries(peft, base, adapter, ids):
    """The bytes of temporaries of a loss and its gradient."""
    step = jax.jit(jax.value_and_grad(lambda adapter, base: (peft.apply(base, adapter, ids) ** 2).mean()))
    return step.lower(adapter, base).compile().memory_analysis().temp_size_in_bytes


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(256, name="q_proj")(jnp.tanh(nn.Dense(512, name="up_proj")(x))), None


class Stack(nn.Module):
    """Scanned layers that compile fast."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(96, 256, name="embed")(ids)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        return layers(name="layers")(x, None)[0]


DEEP = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512, num_hidden_layers=8)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        (Stack(), "nf4"),
        pytest.param(Decoder(DEEP), "nf4", marks=pytest.mark.exhaustive),
        pytest.param(Decoder(DEEP), "fp8", marks=pytest.mark.exhaustive),
    ],
    ids=["stack-nf4", "decoder-nf4", "decoder-fp8"],
)
def test_a_step_never_holds_the_weights_of_more_than_a_layer(monkeypatch, model, scheme):
    ids = jnp.ones((1, 8), int)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    base = jpeft.quantize(params, scheme)
    targets = ["q_proj"] if isinstance(model, Stack) else "all-linear"
    peft = jpeft.LoRA(rank=2, targets=targets).bind(model, base, ids)
    adapter = peft.init(jax.random.key(0), base)
    layer = 4 * sum(leaf.size for leaf in jpeft.core.tree.flatten(base).values() if isinstance(leaf, Quantized)) / 8
    over_float, over_codes = temporaries(peft, params, adapter, ids), temporaries(peft, base, adapter, ids)
    assert over_codes - over_float < layer
    # Without recomputation in the backward pass, all layers would be held.
    monkeypatch.setattr(injection, "_recomputed", lambda call, run: run())
    assert temporaries(peft, base, adapter, ids) - over_float > 6 * layer


def test_merging_gives_plain_weights_with_the_outputs_of_the_adapter():
    model, params = decoder()
    base = jpeft.quantize(params, exclude=["up_proj"])
    peft = jpeft.LoRA(rank=4, targets=["q_proj", "up_proj"]).bind(model, base, IDS)
    adapter = moved(peft, base, 0.1)
    merged = jax.jit(peft.merge)(base, adapter)
    assert not any("q_proj" in path for path in quantized_paths(merged))
    assert any("k_proj" in path for path in quantized_paths(merged))
    want = apply(peft, base, adapter, IDS)
    np.testing.assert_allclose(run(model, merged, IDS), want, rtol=0, atol=2e-6)
    again = jax.jit(functools.partial(peft.merge, requantize=True))(base, adapter)
    assert quantized_paths(again) == quantized_paths(base)
    for path, leaf in jpeft.core.tree.flatten(again).items():
        if isinstance(leaf, Quantized) and "q_proj" in path:
            whole = jpeft.core.tree.flatten(merged)[path]
            blocks = np.abs(np.asarray(whole)).reshape(-1, 64, whole.shape[-1])
            rounded = np.abs(np.asarray(leaf.unbox()) - whole).reshape(-1, 64, whole.shape[-1])
            assert (rounded <= 1.02 * BOUND["nf4"] * blocks.max(1, keepdims=True)).all() and rounded.max() > 0
    with pytest.raises(ValueError, match="no weight that the adapter changes is quantized"):
        peft.merge(params, adapter, requantize=True)


class Raw(nn.Module):
    """A weight that is used outside of any module call: a box changes and dequantizes it."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (64, 8))
        return nn.Dense(3)(jnp.tanh(x @ w))


def test_a_quantized_raw_weight_is_adapted():
    x = jnp.asarray(normal(5, 64))
    params = jax.jit(Raw().init)(jax.random.key(0), x)["params"]
    base = jpeft.quantize(params, targets=["w"])
    peft = jpeft.LoRA(rank=2, targets=["w"]).bind(Raw(), base, x)
    adapter = moved(peft, base, 0.1)
    plain = jpeft.dequantize(base)
    got, wanted = (apply(peft, b, adapter, x) for b in (base, plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(peft.merge(base, adapter)["w"], jax.Array)


@pytest.mark.exhaustive
def test_flax_attention_and_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
            return nn.Conv(64, (3,))(x)

    x = jnp.asarray(normal(2, 8, 256))
    params = jax.jit(Net().init)(jax.random.key(0), x)["params"]
    base = jpeft.quantize(params)
    assert len(quantized_paths(base)) == 5
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(Net(), base, x)
    adapter = moved(peft, base, 0.1)
    gradient = jax.jit(jax.grad(lambda adapter, base: (peft.apply(base, adapter, x) ** 2).sum()))
    both = (jax.tree.leaves(gradient(adapter, b)) for b in (base, jpeft.dequantize(base)))
    for p, q in zip(*both, strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-3, atol=1e-3 * np.abs(q).max())


@pytest.mark.parametrize("kind", ["mlp", pytest.param("decoder", marks=pytest.mark.exhaustive)])
def test_vmap_over_adapters(kind):
    if kind == "mlp":
        _, _, base, peft = mlp()
    else:
        base = quantized()
        peft = METHODS["lora"].bind(Decoder(SMALL), base, IDS)
    many = [moved(peft, base, 0.1, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    together = jax.jit(jax.vmap(lambda adapter: peft.apply(base, adapter, IDS)))(stacked)
    for got, adapter in zip(together, many, strict=True):
        np.testing.assert_allclose(got, apply(peft, base, adapter, IDS), rtol=0, atol=1e-5)


@pytest.mark.exhaustive
def test_generation_is_as_on_the_dequantized_weights():
    model, base = Decoder(SMALL), quantized()
    options = {"max_new_tokens": 8, "stop_ids": ()}
    got, wanted = (jpeft.generate(model, p, [[1, 2, 3]], **options) for p in (base, jpeft.dequantize(base)))
    assert got == wanted and len(got[0]) == 8


# --- fingerprints ------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_original_weights(tmp_path):
    (model, params), base = decoder(), quantized()
    assert fingerprint(base) == fingerprint(params) == fingerprint(jax.jit(jpeft.quantize)(params))
    other = jax.tree.map(lambda x: x * 1.001, params)
    assert "values" in difference(fingerprint(params), jpeft.quantize(other))
    peft = jpeft.LoRA(rank=4, targets=["q_proj"]).bind(model, base, IDS)
    adapter = moved(peft, base, 0.1)
    jpeft.save(tmp_path / "a", peft, adapter, base)
    for over in (base, params, quantized("int8")):  # trained over codes, served on any form of the same weights
        loaded, again = jpeft.load(tmp_path / "a", model, over, IDS)
        assert arrays(again) == arrays(adapter)
        assert np.isfinite(apply(loaded, over, again, IDS)).all()
    with pytest.raises(ValueError, match="values of"):
        jpeft.load(tmp_path / "a", model, jpeft.quantize(other), IDS)


def test_dequantized_weights_have_another_fingerprint():
    assert difference(fingerprint(weights()), jpeft.dequantize(quantized()))


# --- shardings and boxes --------------------------------------------------------------------------------------------


def shard(params, spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))

    def put(path, leaf):
        own = spec.get(path[-2], PartitionSpec()) if path[-1] == "kernel" else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, own))

    return jpeft.core.tree.map_with_path(put, params)


def test_codes_and_scales_are_sharded_like_the_weight():
    model, params = decoder()
    spec = {"q_proj": PartitionSpec(None, "fsdp", "tensor"), "down_proj": PartitionSpec(None, "tensor", "fsdp")}
    placed, targets = shard(params, spec), list(spec)
    base = jpeft.quantize(placed, block=16, targets=targets)
    leaf = base["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.codes.sharding.spec == leaf.scales.sharding.spec == spec["q_proj"]
    assert leaf.codes.addressable_shards[0].data.shape == (2, 16, 16)
    down = base["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert down.scales.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    unsharded = jpeft.quantize(params, block=16, targets=targets)
    for got, wanted in zip(*map(jax.tree.leaves, (base, unsharded)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)  # a mean over shards is summed in another order
    peft = jpeft.LoRA(rank=4, targets=targets).bind(model, base, IDS)
    lora_b = peft.init(jax.random.key(0), base)["model"]["layers"]["self_attn"]["q_proj"]["lora_b"]
    assert lora_b.sharding.spec == PartitionSpec(None, None, "tensor")
    # An axis with too few blocks for the mesh is not sharded.
    wide = jpeft.quantize(placed, block=64, targets=["q_proj"])["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert wide.scales.sharding.spec == PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize("kind", ["mlp", pytest.param("decoder", marks=pytest.mark.exhaustive)])
def test_a_sharded_base_gives_the_outputs_of_an_unsharded_one(kind):
    if kind == "mlp":
        model, params, _, _ = mlp()
        spec = {"hidden": PartitionSpec("fsdp", "tensor"), "out": PartitionSpec("tensor", "fsdp")}
    else:
        model, params = decoder()
        spec = {"q_proj": PartitionSpec(None, "fsdp", "tensor"), "down_proj": PartitionSpec(None, "tensor", "fsdp")}
    base = jpeft.quantize(shard(params, spec), block=16)
    peft = jpeft.LoRA(rank=4, targets="all-linear").bind(model, base, IDS)
    adapter = moved(peft, base, 0.1)
    got = apply(peft, base, adapter, IDS)
    wanted = apply(peft, jpeft.quantize(params, block=16), adapter, IDS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_logical_axis_names_are_kept():
    model = Decoder(SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    boxed = jax.tree.map(nn.meta.replace_boxed, shapes, weights(), is_leaf=lambda x: isinstance(x, nn.Partitioned))
    base = jpeft.quantize(boxed)
    leaf = base["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert leaf.codes.names == leaf.scales.names == boxed["model"]["layers"]["mlp"]["up_proj"]["kernel"].names
    plain = jpeft.dequantize(base)["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert plain.names == leaf.codes.names and isinstance(plain.value, jax.Array)
    peft = jpeft.LoRA(rank=4, targets=["up_proj"]).bind(model, base, IDS)
    adapter = peft.init(jax.random.key(0), base)
    assert adapter["model"]["layers"]["mlp"]["up_proj"]["lora_b"].names == ("layers", None, "mlp")
    want = run(model, nn.meta.unbox(jpeft.dequantize(base)), IDS)
    np.testing.assert_allclose(apply(peft, base, adapter, IDS), want, rtol=0, atol=1e-5)


# --- mistakes -------------------------------------------------------------------------------------------------------

TREE = {"a": {"kernel": np.ones((64, 64), np.float32), "bias": np.ones(64, np.float32)}, "n": {"kernel": np.ones(64)}}


def one_of(value):
    """Normal weights, one of them replaced by a value."""
    weight = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    weight[3, 5] = value
    return weight


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"scheme": "nf5"}, "unknown scheme 'nf5'; expected one of nf4, int4, int8, fp8"),
        ({}, {"block": 63}, "block must be an even number of weights, got 63"),
        ({}, {"block": True}, "block must be"),
        ({}, {"block": 128}, r"'a/kernel': it has shape \(64, 64\): a block of 128 divides neither"),
        ({}, {"targets": ["b"]}, "target 'b' matches nothing"),
        ({}, {"targets": r"a/bias"}, "cannot act on 'a/bias'"),
        ({}, {"exclude": ["b"]}, "exclude 'b' matches nothing"),
        ({"kernel": np.ones((64, 64), np.int8)}, {}, "'a/kernel': it is int8, expected a floating dtype"),
        ({"kernel": one_of(np.nan)}, {}, "'a/kernel': it holds NaN or infinity"),
        ({"kernel": one_of(np.nan)}, {"double": False}, "'a/kernel': it holds NaN or infinity"),
        ({"kernel": one_of(-np.inf)}, {"scheme": "fp8"}, "'a/kernel': it holds NaN or infinity"),
        ({"kernel": quantize_array(np.ones((64, 64), np.float32))}, {}, "'a/kernel': it is quantized already, as nf4"),
        ({"kernel": np.ones((64, 0), np.float32)}, {}, r"'a/kernel': it has shape \(64, 0\), which holds no elements"),
        ({}, {"scheme": ["nf4"]}, "scheme must be one of nf4, int4, int8, fp8, got an object of type list"),
    ],
)
def test_mistakes_raise_and_name_the_path(change, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.quantize({**TREE, "a": {**TREE["a"], **change}}, **options)


@pytest.mark.parametrize(
    "params, message", [(None, "got NoneType"), ([1], "got list"), ({"a": [1]}, "a is a list, expected an array")]
)
def test_anything_but_a_tree_of_arrays_is_a_type_error(params, message):
    with pytest.raises(TypeError, match=message):
        jpeft.quantize(params)


@pytest.mark.parametrize("size", [1e-34, 1e37])
def test_quantization_is_scale_invariant(size):
    weight = one_of(1.0)
    plain, scaled = (quantize_array(w).unbox() for w in (weight, (weight * np.float32(size))))
    np.testing.assert_allclose(np.asarray(scaled) / np.float32(size), plain, rtol=1e-2, atol=1e-2)


def test_get_partition_spec_gives_the_axis_names():
    params = {"d": {"kernel": nn.Partitioned(jnp.ones((128, 64)), names=("embed", "mlp"))}}
    specs = nn.get_partition_spec(jpeft.quantize(params))["d"]["kernel"]
    assert specs.codes == specs.scales == PartitionSpec("embed", "mlp") and specs.groups == PartitionSpec()


def test_training_a_quantized_weight_raises():
    model, base = Decoder(SMALL), quantized()
    with pytest.raises(ValueError, match=re.escape("would train 'model/layers/mlp/down_proj/kernel', which is quant")):
        jpeft.Train(r".*").bind(model, base, IDS)


# --- LoftQ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_loftq_comes_closer_to_the_weights_with_every_iteration(scan):
    model, params = decoder(scan_layers=scan)
    peft = jpeft.LoRA(rank=8, alpha=16, targets=["q_proj", "down_proj"]).bind(model, params, IDS)
    merge = jax.jit(lambda base, adapter: jpeft.dequantize(peft.merge(base, adapter)))

    def gap(base, adapter):
        merged, total = jpeft.core.tree.flatten(merge(base, adapter)), 0.0
        for path, leaf in jpeft.core.tree.flatten(params).items():
            if path[-2] in ("q_proj", "down_proj"):
                total += float(((np.asarray(merged[path]) - leaf) ** 2).sum())
        return math.sqrt(total)

    plain = gap(quantized(scan_layers=scan), peft.init(jax.random.key(0), params))
    gaps = [gap(*jpeft.loftq(peft, params, jax.random.key(0), iterations=n)) for n in (1, 3)]
    assert gaps[1] < gaps[0] < 0.9 * plain
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0))
    for path, leaf in jpeft.core.tree.flatten(base).items():
        assert isinstance(leaf, Quantized) == (path[-1] == "kernel" and path[0] != "lm_head")
    # One iteration, computed by NumPy: the best approximation of the rounding error.
    layer = (lambda x: x[0]) if scan else (lambda x: x)
    at = ("model", "layers", *(() if scan else ("0",)), "self_attn", "q_proj")
    w, q = (layer(np.asarray(jpeft.core.tree.flatten(t)[*at, "kernel"])) for t in (params, jpeft.dequantize(base)))
    a, b = (layer(np.asarray(jpeft.core.tree.flatten(adapter)[*at, name])) for name in ("lora_a", "lora_b"))
    u, s, vt = np.linalg.svd((w - q).astype(np.float64))
    np.testing.assert_allclose(2 * a @ b, (u[:, :8] * s[:8]) @ vt[:8], atol=1e-5)
    wanted, with_loftq, rounded = (
        run(model, p, IDS) for p in (params, merge(base, adapter), jpeft.dequantize(quantized(scan_layers=scan)))
    )
    assert np.linalg.norm(with_loftq - wanted) < np.linalg.norm(rounded - wanted)


def test_a_loftq_adapter_fits_its_own_base_only(tmp_path):
    model, params = decoder()
    peft = jpeft.LoRA(rank=8, targets=["q_proj"]).bind(model, params, IDS)
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0))
    jpeft.save(tmp_path / "a", peft, adapter, base)
    jpeft.load(tmp_path / "a", model, base, IDS)
    for other in (params, quantized(), quantized("int8")):
        with pytest.raises(ValueError, match="q_proj/kernel' differ"):
            jpeft.load(tmp_path / "a", model, other, IDS)


def test_loftq_rounds_the_layers_that_lora_does_not_act_on():
    model, params = decoder()
    method = jpeft.LoRA(rank=8, targets=["q_proj"], overrides={"q_proj": {"layers": [1]}})
    base, adapter = jpeft.loftq(
        method.bind(model, params, IDS), params, jax.random.key(0), targets=["q_proj"], iterations=2
    )
    at = ("model", "layers", "self_attn", "q_proj")
    rounded, fitted = (jpeft.core.tree.flatten(jpeft.dequantize(tree))[*at, "kernel"] for tree in (quantized(), base))
    np.testing.assert_array_equal(fitted[0], rounded[0])
    assert np.abs(np.asarray(fitted[1] - rounded[1])).max() > 0
    leaves = jpeft.core.tree.flatten(adapter)
    for name in ("lora_a", "lora_b"):
        assert not leaves[*at, name][0].any() and leaves[*at, name][1].any()


def test_loftq_of_full_rank_is_exact():
    params = {"params": {"kernel": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}}["params"]
    model, x = nn.Dense(32, use_bias=False), jnp.ones((2, 64))
    peft = jpeft.LoRA(rank=48, alpha=48, targets=".*").bind(model, params, x)
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0), targets=".*")
    np.testing.assert_allclose(jpeft.dequantize(peft.merge(base, adapter))["kernel"], params["kernel"], atol=1e-5)


def test_mistakes_with_loftq_raise():
    model, params = decoder()
    peft = jpeft.IA3(targets=["q_proj"]).bind(model, params, IDS)
    with pytest.raises(ValueError, match=r"needs exactly one LoRA at each quantized weight; .*q_proj/kernel' has IA3"):
        jpeft.loftq(peft, params, jax.random.key(0))
    activated = jpeft.methods.ALoRA(rank=2, invocation_tokens=(3,), targets=["q_proj"]).bind(model, params, IDS)
    with pytest.raises(ValueError, match=r"q_proj/kernel' has ALoRA"):
        jpeft.loftq(activated, params, jax.random.key(0))
    with pytest.raises(ValueError, match="iterations must be a whole number, at least 1, got 0"):
        jpeft.loftq(peft, params, jax.random.key(0), iterations=0)
