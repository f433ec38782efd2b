"""Quantized bases: what codes stand for, that models and methods run on them unchanged, and what they cost."""

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
from jpeft.core.fingerprint import difference, fingerprint
from jpeft.core.quantized import NF4, SCHEMES, Quantized, block_axis, dequantize_leaf, quantize_array
from jpeft.core.stacking import unstack
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.quantization.tree import is_quantized

# The furthest that a scheme moves a weight, as a share of the largest in its block: half its widest gap.
BOUND = {"nf4": max(np.diff(NF4)) / 2, "int4": 1 / 14, "int8": 1 / 254, "fp8": 1 / 28}
CODES = {"nf4": 4, "int4": 4, "int8": 8, "fp8": 8}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def reckoned(w, scheme, block):
    """What quantization without double quantization gives, one block at a time in float64."""
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


@pytest.mark.parametrize("shape", [(128, 6), (10, 128), (2, 64, 5), (3, 2, 4, 64), (64, 1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_the_nearest_that_a_code_stands_for(scheme, shape):
    w = normal(*shape)
    q = quantize_array(w, scheme, double=False)
    assert q.shape == shape and q.dtype == w.dtype
    np.testing.assert_allclose(q.unbox(), reckoned(w, scheme, 64), rtol=0, atol=1e-6)


@given(
    case=st.sampled_from([("nf4", 64, (2, 64, 64), True), ("int4", 2, (64, 3), False), ("int8", 4, (3, 64), True),
                          ("fp8", 32, (64, 64), True), ("nf4", 32, (3, 64), True)]),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_no_weight_moves_further_than_the_bound(case, scale, seed):
    scheme, block, shape, double = case
    w = normal(*shape, seed=seed) * np.float32(scale)
    q = quantize_array(w, scheme, block, double)
    axis = block_axis(shape, block)
    blocks = np.moveaxis(np.abs(w), axis, -1).reshape(-1, block)
    moved = np.moveaxis(np.abs(np.asarray(q.unbox()) - w), axis, -1).reshape(-1, block)
    largest = blocks.max(-1, keepdims=True)
    # A quantized scale is off by at most half its code's widest gap, 0.8 % of the furthest scale from their mean.
    slack = 0.008 * (largest.max() - largest.min() + 1e-38) if double else 0
    assert (moved <= BOUND[scheme] * largest * (1 + 1e-5) + slack).all()


def test_mean_error_of_nf4_on_normal_weights():
    # bitsandbytes' tests/test_functional.py expects 0.072792 at blocks of 64.
    w = normal(1024, 1024)
    assert abs(np.abs(quantize_array(w).unbox() - w).mean() - 0.072792) < 2e-4


@pytest.mark.parametrize(("double", "scale_bits"), [(True, 8 / 64 + 32 / 64 / 256), (False, 32 / 64)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_for_each_weight(scheme, double, scale_bits):
    q = quantize_array(normal(1024, 512), scheme, double=double)
    assert q.bits == pytest.approx(CODES[scheme] + scale_bits, abs=1e-3)
    assert q.size == 1024 * 512 and q.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(q))


def test_bits_where_heads_are_an_axis():
    q = quantize_array(normal(576, 9, 64))
    assert q.axis == -1 and q.bits < 4.3


def test_zeros_and_constants():
    for value in (0.0, 3.0, -3.0):
        assert (quantize_array(np.full((128, 4), value, np.float32)).unbox() == value).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_is_kept(dtype):
    w = jnp.asarray(normal(128, 4)).astype(dtype)
    q = quantize_array(w, "int8")
    assert q.dtype == q.unbox().dtype == dtype
    wide = quantize_array(w.astype(jnp.float32), "int8").unbox()
    assert (q.unbox() == wide.astype(dtype)).all()  # rounded once, at the end


def test_each_matrix_of_a_stack_is_quantized_alone():
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
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
IDS = jax.random.randint(jax.random.key(1), (2, 16), 0, 96)


@functools.cache
def weights(scan_layers=True):
    stacked = nn.meta.unbox(jax.jit(Decoder(SMALL).init)(jax.random.key(0), IDS)["params"])
    return stacked if scan_layers else unstack(stacked)


def decoder(**options):
    return Decoder(SMALL, **options), weights(options.get("scan_layers", True))


def arrays(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def quantized_paths(tree):
    return {jpeft.core.tree.join(p) for p, leaf in jpeft.core.tree.flatten(tree).items() if isinstance(leaf, Quantized)}


def test_default_targets_are_the_linear_layers_but_the_head():
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


def test_the_tree_given_is_left_alone_and_what_is_not_quantized_is_shared():
    _, params = decoder()
    before = arrays(params)
    q = jpeft.quantize({"params": params, "cache": {"x": jnp.ones(2)}})
    assert arrays(params) == before and q["params"]["model"]["norm"] is not None
    assert q["params"]["lm_head"]["kernel"] is params["lm_head"]["kernel"] and (q["cache"]["x"] == 1).all()


OPTIONS = {"scan": {}, "layers": {"scan_layers": False}, "remat": {"remat": "full"}, "bf16": {"dtype": jnp.bfloat16}}


@pytest.mark.parametrize(("scheme", "kind"), [*((s, "scan") for s in SCHEMES), *(("nf4", kind) for kind in OPTIONS)])
def test_the_model_runs_as_on_the_dequantized_weights(scheme, kind):
    options = OPTIONS[kind]
    model, params = decoder(**options)
    base = jpeft.quantize(params, scheme)
    plain = jpeft.dequantize(base)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    got, wanted = (np.asarray(jax.jit(model.apply)({"params": p}, IDS)) for p in (base, plain))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 if options.get("dtype") is None else 0.03)
    assert not np.allclose(got, jax.jit(model.apply)({"params": params}, IDS), atol=1e-4)


METHODS = {
    "lora": jpeft.LoRA(rank=4, targets="all-linear"),
    "dropout": jpeft.LoRA(rank=4, targets="all-linear", dropout=0.5),
    "ia3": jpeft.IA3(targets=["k_proj", "v_proj", "down_proj"]),
    "prefix": jpeft.PrefixTuning(length=3),
    "bottleneck": jpeft.Bottleneck(size=4, targets=["mlp"]),
    "bitfit": jpeft.Train(r".*norm.*"),
    "chain": jpeft.Chain(jpeft.LoRA(rank=2, targets=["q_proj"]), jpeft.IA3(targets=["q_proj", "v_proj"])),
}


def noisy(tree, seed=3):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [x + 0.05 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


@pytest.mark.parametrize(("name", "scan"), [*((name, True) for name in METHODS), ("lora", False)])
def test_every_method_trains_over_it_with_the_gradients_of_the_dequantized_base(name, scan):
    model, params = decoder(scan_layers=scan)
    base = jpeft.quantize(params)
    peft = METHODS[name].bind(model, base, IDS)
    adapter = noisy(peft.init(jax.random.key(2), base))

    def loss(adapter, base):
        logits = peft.apply(base, adapter, IDS, deterministic=False, rngs={"dropout": jax.random.key(9)})
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()

    got, wanted = (jax.jit(jax.value_and_grad(loss))(adapter, p) for p in (base, jpeft.dequantize(base)))
    assert float(got[0]) == pytest.approx(float(wanted[0]), abs=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 + 1e-4 * np.abs(b).max())
        assert np.abs(b).max() > 0


def test_a_training_step_leaves_the_base_as_it_is_and_lowers_the_loss():
    model, params = decoder()
    base = jpeft.quantize(params)
    before = arrays(base)
    peft = METHODS["lora"].bind(model, base, IDS)

    def loss_fn(adapter, params, batch, rng):
        logits = peft.apply(params, adapter, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean(), {}

    tx = optax.sgd(2.0)  # optax's Adam mixes dtypes, which the tests do not let pass
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), base), tx, jax.random.key(1))
    step = jpeft.train_step(peft, loss_fn, tx)
    losses = []
    for _ in range(8):
        state, metrics = step(state, base, IDS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02 and arrays(base) == before


def test_a_step_in_low_precision_rounds_weights_not_scales():
    model, params = decoder()
    base = jpeft.quantize(params)
    peft, tx, seen = METHODS["lora"].bind(model, base, IDS), optax.sgd(1.0), []

    def loss_fn(adapter, params, batch, rng):
        seen.append(jax.tree.map(lambda x: x, params["model"]["layers"]["mlp"]["up_proj"]["kernel"]))
        return (peft.apply(params, adapter, batch).astype(jnp.float32) ** 2).mean(), {}

    step = jpeft.train_step(peft, loss_fn, tx, compute_dtype=jnp.bfloat16)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), base), tx, jax.random.key(1))
    state, metrics = step(state, base, IDS)
    assert seen[0].dtype == jnp.bfloat16 and seen[0].groups.dtype == jnp.float32
    assert np.isfinite(float(metrics["loss"])) and jpeft.core.tree.count(base) == jpeft.core.tree.count(params)


def temporaries(peft, base, adapter, ids, wrap=lambda f: f):
    loss = wrap(lambda adapter, base: (peft.apply(base, adapter, ids) ** 2).mean())
    return jax.jit(jax.value_and_grad(loss)).lower(adapter, base).compile().memory_analysis().temp_size_in_bytes


def test_abstract_bases_are_planned_with():
    model, params = decoder()
    abstract = jpeft.quantize(jax.eval_shape(lambda: params))
    peft = METHODS["lora"].bind(model, abstract, IDS)
    assert peft == METHODS["lora"].bind(model, jpeft.quantize(params), IDS)
    adapter = peft.init(jax.random.key(0), abstract)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapter))
    assert jax.eval_shape(peft.apply, abstract, adapter, IDS).shape == (*IDS.shape, 96)
    merged = jax.eval_shape(peft.merge, abstract, adapter)
    assert not is_quantized(merged) and merged["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (2, 64, 128)


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_a_step_never_holds_the_weights_of_more_than_a_layer(monkeypatch, scheme):
    config = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    model, ids = Decoder(config), jnp.ones((1, 8), int)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids)["params"])
    base = jpeft.quantize(params, scheme)
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(model, base, ids)
    adapter = peft.init(jax.random.key(0), base)
    layer = 4 * sum(leaf.size for leaf in jpeft.core.tree.flatten(base).values() if isinstance(leaf, Quantized)) / 8
    over_float, over_codes = temporaries(peft, params, adapter, ids), temporaries(peft, base, adapter, ids)
    assert over_codes - over_float < layer
    monkeypatch.setattr(jpeft.inject, "_recomputed", lambda run, own: run())
    assert temporaries(peft, base, adapter, ids) - over_float > 6 * layer  # what it would be, were it not recomputed


def test_merging_gives_plain_weights_that_equal_the_adapter():
    model, params = decoder()
    base = jpeft.quantize(params, exclude=["up_proj"])
    peft = jpeft.LoRA(rank=4, targets=["q_proj", "up_proj"]).bind(model, base, IDS)
    adapter = noisy(peft.init(jax.random.key(0), base))
    merged = peft.merge(base, adapter)
    assert not any("q_proj" in path for path in quantized_paths(merged))
    assert any("k_proj" in path for path in quantized_paths(merged))
    want = peft.apply(base, adapter, IDS)
    np.testing.assert_allclose(model.apply({"params": merged}, IDS), want, rtol=0, atol=2e-6)
    again = peft.merge(base, adapter, requantize=True)
    assert quantized_paths(again) == quantized_paths(base)
    for path, leaf in jpeft.core.tree.flatten(again).items():
        if isinstance(leaf, Quantized) and "q_proj" in path:
            whole = jpeft.core.tree.flatten(merged)[path]
            blocks = np.abs(np.asarray(whole)).reshape(-1, 64, whole.shape[-1])
            moved = np.abs(np.asarray(leaf.unbox()) - whole).reshape(-1, 64, whole.shape[-1])
            assert (moved <= 1.02 * BOUND["nf4"] * blocks.max(1, keepdims=True)).all() and moved.max() > 0
    with pytest.raises(ValueError, match="no weight that the adapter changes is quantized"):
        peft.merge(params, adapter, requantize=True)


class Raw(nn.Module):
    """A weight that no module call explains: it is changed, and opened, in a box."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (64, 8))
        return nn.Dense(3)(jnp.tanh(x @ w))


def test_a_raw_weight_that_is_quantized_is_adapted_too():
    x = jnp.asarray(normal(5, 64))
    params = Raw().init(jax.random.key(0), x)["params"]
    base = jpeft.quantize(params, targets=["w"])
    peft = jpeft.LoRA(rank=2, targets=["w"]).bind(Raw(), base, x)
    adapter = noisy(peft.init(jax.random.key(0), base))
    plain = jpeft.dequantize(base)
    np.testing.assert_allclose(peft.apply(base, adapter, x), peft.apply(plain, adapter, x), rtol=1e-5, atol=1e-6)
    assert isinstance(peft.merge(base, adapter)["w"], jax.Array)


def test_attention_of_flax_and_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
            return nn.Conv(64, (3,))(x)

    x = jnp.asarray(normal(2, 8, 256))
    params = Net().init(jax.random.key(0), x)["params"]
    base = jpeft.quantize(params)
    assert len(quantized_paths(base)) == 5
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(Net(), base, x)
    adapter = noisy(peft.init(jax.random.key(0), base))
    for p, q in zip(*(jax.tree.leaves(jax.jit(jax.grad(lambda a, b: (peft.apply(b, a, x) ** 2).sum()))(adapter, b))
                      for b in (base, jpeft.dequantize(base))), strict=True):  # fmt: skip
        np.testing.assert_allclose(p, q, rtol=1e-3, atol=1e-3 * np.abs(q).max())


def test_vmap_over_adapters():
    model, params = decoder()
    base = jpeft.quantize(params)
    peft = METHODS["lora"].bind(model, base, IDS)
    many = [noisy(peft.init(jax.random.key(i), base), i) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    one = jax.jit(lambda adapter: peft.apply(base, adapter, IDS))
    for got, adapter in zip(jax.jit(jax.vmap(one))(stacked), many, strict=True):
        np.testing.assert_allclose(got, one(adapter), rtol=0, atol=1e-5)


def test_generation_over_codes_is_that_over_the_weights():
    model, params = decoder()
    base = jpeft.quantize(params)
    options = {"max_new_tokens": 8, "stop_ids": ()}
    got, wanted = (jpeft.generate(model, p, [[1, 2, 3]], **options) for p in (base, jpeft.dequantize(base)))
    assert got == wanted and len(got[0]) == 8


# --- which base it is -----------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_what_was_quantized(tmp_path):
    model, params = decoder()
    base = jpeft.quantize(params)
    assert fingerprint(base) == fingerprint(params) == fingerprint(jax.jit(jpeft.quantize)(params))
    other = jax.tree.map(lambda x: x * 1.001, params)
    assert "values" in difference(fingerprint(params), jpeft.quantize(other))
    peft = METHODS["lora"].bind(model, base, IDS)
    adapter = noisy(peft.init(jax.random.key(0), base))
    jpeft.save(tmp_path / "a", peft, adapter, base)
    for over in (base, params, jpeft.quantize(params, "int8")):  # trained over codes, served on whatever fits
        loaded, again = jpeft.load(tmp_path / "a", model, over, IDS)
        assert arrays(again) == arrays(adapter)
        assert np.isfinite(loaded.apply(over, again, IDS)).all()
    with pytest.raises(ValueError, match="values of"):
        jpeft.load(tmp_path / "a", model, jpeft.quantize(other), IDS)


def test_weights_that_went_through_codes_have_another_fingerprint():
    _, params = decoder()
    assert difference(fingerprint(params), jpeft.dequantize(jpeft.quantize(params)))


# --- shardings and boxes --------------------------------------------------------------------------------------------


def test_shardings_follow_the_weight():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    model, params = decoder()
    spec = {"q_proj": PartitionSpec(None, "fsdp", "tensor"), "down_proj": PartitionSpec(None, "tensor", "fsdp")}
    placed = jpeft.core.tree.map_with_path(
        lambda p, x: jax.device_put(x, NamedSharding(mesh, spec.get(p[-2], PartitionSpec()))), params
    )
    base = jpeft.quantize(placed, block=16)
    leaf = base["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.codes.sharding.spec == leaf.scales.sharding.spec == spec["q_proj"]
    assert leaf.codes.addressable_shards[0].data.shape == (2, 16, 16)
    down = base["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert down.scales.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    for got, wanted in zip(*map(jax.tree.leaves, (base, jpeft.quantize(params, block=16))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)  # a mean over shards is added up in another order
    peft = METHODS["lora"].bind(model, base, IDS)
    adapter = peft.init(jax.random.key(0), base)
    assert adapter["model"]["layers"]["self_attn"]["q_proj"]["lora_b"].sharding.spec == PartitionSpec(
        None, None, "tensor"
    )
    got = jax.jit(peft.apply)(base, adapter, IDS)
    np.testing.assert_allclose(got, peft.apply(jpeft.quantize(params, block=16), adapter, IDS), rtol=0, atol=1e-5)
    # An axis that is too short in blocks for the mesh is not cut there.
    wide = jpeft.quantize(placed, block=64)["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert wide.scales.sharding.spec == PartitionSpec(None, None, "tensor")


def test_names_of_axes_stay():
    model = Decoder(SMALL)
    boxed = model.init(jax.random.key(0), IDS)["params"]
    base = jpeft.quantize(boxed)
    leaf = base["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert leaf.codes.names == leaf.scales.names == boxed["model"]["layers"]["mlp"]["up_proj"]["kernel"].names
    plain = jpeft.dequantize(base)["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert plain.names == leaf.codes.names and isinstance(plain.value, jax.Array)
    peft = METHODS["lora"].bind(model, base, IDS)
    adapter = peft.init(jax.random.key(0), base)
    assert adapter["model"]["layers"]["mlp"]["up_proj"]["lora_b"].names == ("layers", None, "mlp")
    want = model.apply({"params": nn.meta.unbox(jpeft.dequantize(base))}, IDS)
    np.testing.assert_allclose(peft.apply(base, adapter, IDS), want, rtol=0, atol=1e-5)


# --- mistakes -------------------------------------------------------------------------------------------------------

TREE = {"a": {"kernel": np.ones((64, 64), np.float32), "bias": np.ones(64, np.float32)}, "n": {"kernel": np.ones(64)}}


def one_of(value):
    """Weights of which one is not like the others."""
    weight = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    weight[3, 5] = value
    return weight


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"scheme": "nf5"}, "unknown scheme 'nf5'; there are nf4, int4, int8, fp8"),
        ({}, {"block": 63}, "block must be an even number of weights, got 63"),
        ({}, {"block": True}, "block must be"),
        ({}, {"block": 128}, r"'a/kernel': it has shape \(64, 64\): a block of 128 divides neither"),
        ({}, {"targets": ["b"]}, "target 'b' matches nothing"),
        ({}, {"targets": r"a/bias"}, "cannot act on 'a/bias'"),
        ({}, {"exclude": ["b"]}, "exclude 'b' matches nothing"),
        ({"kernel": np.ones((64, 64), np.int8)}, {}, "'a/kernel': it is int8, not floating"),
        ({"kernel": one_of(np.nan)}, {}, "'a/kernel': it holds NaN or infinity"),
        ({"kernel": one_of(np.nan)}, {"double": False}, "'a/kernel': it holds NaN or infinity"),
        ({"kernel": one_of(-np.inf)}, {"scheme": "fp8"}, "'a/kernel': it holds NaN or infinity"),
        ({"kernel": quantize_array(np.ones((64, 64), np.float32))}, {}, "'a/kernel': it is quantized already, as nf4"),
        ({"kernel": np.ones((64, 0), np.float32)}, {}, r"'a/kernel': it has shape \(64, 0\), with nothing in it"),
        ({}, {"scheme": ["nf4"]}, "unknown scheme"),
    ],
)
def test_mistakes_are_named(change, options, says):
    with pytest.raises(ValueError, match=says):
        jpeft.quantize({**TREE, "a": {**TREE["a"], **change}}, **options)


@pytest.mark.parametrize("params, says", [(None, "got NoneType"), ([1], "got list"), ({"a": [1]}, "'a' is no array")])
def test_what_is_no_tree_is_a_type_error(params, says):
    with pytest.raises(TypeError, match=says):
        jpeft.quantize(params)


@pytest.mark.parametrize("size", [1e-34, 1e37])
def test_very_small_and_very_large_weights_keep_their_proportions(size):
    weight = one_of(1.0)
    plain, scaled = (quantize_array(w).unbox() for w in (weight, (weight * np.float32(size))))
    np.testing.assert_allclose(np.asarray(scaled) / np.float32(size), plain, rtol=1e-2, atol=1e-2)


def test_flax_finds_the_names_of_axes():
    params = {"d": {"kernel": nn.Partitioned(jnp.ones((128, 64)), names=("embed", "mlp"))}}
    specs = nn.get_partition_spec(jpeft.quantize(params))["d"]["kernel"]
    assert specs.codes == specs.scales == PartitionSpec("embed", "mlp") and specs.groups == PartitionSpec()


def test_a_quantized_weight_cannot_train():
    model, params = decoder()
    base = jpeft.quantize(params)
    with pytest.raises(ValueError, match=re.escape("would train 'model/layers/mlp/down_proj/kernel', which is quant")):
        jpeft.Train(r".*").bind(model, base, IDS)


# --- LoftQ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
def test_loftq_comes_nearer_to_the_weights_with_every_iteration(scan):
    model, params = decoder(scan_layers=scan)
    peft = jpeft.LoRA(rank=8, alpha=16, targets=["q_proj", "down_proj"]).bind(model, params, IDS)

    def gap(base, adapter):
        merged, total = jpeft.core.tree.flatten(jpeft.dequantize(peft.merge(base, adapter))), 0.0
        for path, leaf in jpeft.core.tree.flatten(params).items():
            if path[-2] in ("q_proj", "down_proj"):
                total += float(((np.asarray(merged[path]) - leaf) ** 2).sum())
        return math.sqrt(total)

    plain = gap(jpeft.quantize(params), peft.init(jax.random.key(0), params))
    gaps = [gap(*jpeft.loftq(peft, params, jax.random.key(0), iterations=n)) for n in (1, 3)]
    assert gaps[1] < gaps[0] < 0.9 * plain
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0))
    for path, leaf in jpeft.core.tree.flatten(base).items():
        assert isinstance(leaf, Quantized) == (path[-1] == "kernel" and path[0] != "lm_head")
    # One iteration, by numpy: the best approximation of what the codes leave over.
    layer = (lambda x: x[0]) if scan else (lambda x: x)
    at = ("model", "layers", *(() if scan else ("0",)), "self_attn", "q_proj")
    w, q = (layer(np.asarray(jpeft.core.tree.flatten(t)[*at, "kernel"])) for t in (params, jpeft.dequantize(base)))
    a, b = (layer(np.asarray(jpeft.core.tree.flatten(adapter)[*at, name])) for name in ("lora_a", "lora_b"))
    u, s, vt = np.linalg.svd((w - q).astype(np.float64))
    np.testing.assert_allclose(2 * a @ b, (u[:, :8] * s[:8]) @ vt[:8], atol=1e-5)
    run = jax.jit(lambda p: model.apply({"params": p}, IDS))
    got = np.linalg.norm(run(jpeft.dequantize(peft.merge(base, adapter))) - run(params))
    assert got < np.linalg.norm(run(jpeft.dequantize(jpeft.quantize(params))) - run(params))


def test_an_adapter_of_loftq_belongs_to_its_base_alone(tmp_path):
    model, params = decoder()
    peft = jpeft.LoRA(rank=8, targets=["q_proj"]).bind(model, params, IDS)
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0))
    jpeft.save(tmp_path / "a", peft, adapter, base)
    jpeft.load(tmp_path / "a", model, base, IDS)
    for other in (params, jpeft.quantize(params), jpeft.quantize(params, "int8")):
        with pytest.raises(ValueError, match="q_proj/kernel' differ"):
            jpeft.load(tmp_path / "a", model, other, IDS)


def test_loftq_of_a_rank_above_the_weights_leaves_nothing_over():
    params = {"params": {"kernel": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}}["params"]
    model, x = nn.Dense(32, use_bias=False), jnp.ones((2, 64))
    peft = jpeft.LoRA(rank=48, alpha=48, targets=".*").bind(model, params, x)
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0), targets=".*")
    np.testing.assert_allclose(jpeft.dequantize(peft.merge(base, adapter))["kernel"], params["kernel"], atol=1e-5)


def test_mistakes_of_loftq():
    model, params = decoder()
    peft = jpeft.IA3(targets=["q_proj"]).bind(model, params, IDS)
    with pytest.raises(ValueError, match="q_proj/kernel' has IA3"):
        jpeft.loftq(peft, params, jax.random.key(0))
    with pytest.raises(ValueError, match="iterations must be a whole number, at least 1, got 0"):
        jpeft.loftq(peft, params, jax.random.key(0), iterations=0)
