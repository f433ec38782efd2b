"""Bottleneck adapters, Compacter and representation fine-tuning, as numpy computes them in float64.

`tests/parity/test_adapters_torch.py` has AdapterHub's library for an oracle.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core import stacking
from jpeft.core.targets import TargetError
from jpeft.core.tree import flatten
from jpeft.methods import Compacter, Houlsby, LoReFT, ParallelAdapter
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.kv_cache import init_cache
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
BERT = Bert(BertConfig(**SIZES))
LLAMA = Decoder(DecoderConfig(**SIZES))
IDS = np.random.default_rng(0).integers(0, 20, (2, 5))


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def float64(tree):
    return {k: float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def norm(x, scale=1.0, bias=0.0, epsilon=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


# --- where ------------------------------------------------------------------------------------------------------------


def sites(method, model, *inputs):
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return [site.name for site in method.bind(model, params, *inputs).sites]


@pytest.mark.parametrize(("method", "model", "expected"), [
    (jpeft.Bottleneck(), BERT, ["output/dense"]),
    (Houlsby(), BERT, ["attention/output/dense", "output/dense"]),
    (Houlsby(original_ln_before=True), BERT, ["attention/output/LayerNorm", "output/LayerNorm"]),
    (Houlsby(), Bert(BertConfig(**SIZES, model_type="distilbert")), ["attention", "ffn"]),
    (jpeft.Bottleneck(sublayers="attention"), LLAMA.unrolled(), ["self_attn"]),
    (ParallelAdapter(sublayers="both"), LLAMA.unrolled(), ["self_attn", "mlp"]),
], ids=["BERT", "BERT, both", "BERT, norms", "DistilBERT", "Llama, attention", "Llama, both"])  # fmt: skip
def test_sublayers_are_found_by_the_names_of_modules(method, model, expected):
    found = sites(method, model, IDS)
    assert [name.split("/0/")[1] for name in found if "/0/" in name] == expected
    assert len(found) == 2 * len(expected)


def test_a_model_whose_sublayers_have_other_names_needs_targets():
    model = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    with pytest.raises(TargetError, match="name the modules in targets, of layers_0, layers_1"):
        sites(jpeft.Bottleneck(), model, jnp.ones((1, 3)))
    with pytest.raises(TargetError, match="ParallelAdapter: no module has a name that tells that it is the whole of a"):
        sites(ParallelAdapter(), BERT, IDS)


# --- what -------------------------------------------------------------------------------------------------------------


class PostNorm(nn.Module):
    """A layer whose norm follows its residual connection."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.LayerNorm(epsilon=1e-3, name="LayerNorm")(x + nn.Dense(6, name="dense")(x)), None


class PostNormStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(nn.remat(PostNorm), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="output")(x, None)[0]


class PostNormNnx(nnx.Module):
    def __init__(self, params):
        self.dense = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(6, epsilon=1e-3, rngs=nnx.Rngs(0))
        for module, name in ((self.dense, "dense"), (self.norm, "LayerNorm")):
            for leaf, value in params[name].items():
                getattr(module, leaf).set_value(value[0])

    def __call__(self, x):
        return self.norm(x + self.dense(x))


def post_norm(x, params, own, layer):
    """``LN(x + B(LN(x)))`` of one layer."""
    dense, scale, bias = params["dense"], params["LayerNorm"]["scale"][layer], params["LayerNorm"]["bias"][layer]
    total = x + x @ dense["kernel"][layer] + dense["bias"][layer]
    seen = norm(total, scale, bias, 1e-3)
    inner = np.tanh(seen @ own["bottleneck_down"] + own["bottleneck_down_bias"])
    change = inner @ own["bottleneck_up"] + own["bottleneck_up_bias"]
    return norm(total + 0.5 * change, scale, bias, 1e-3)


def test_a_bottleneck_at_a_norm_is_added_before_it():
    x, model = numbers(3, 6), PostNormStack()
    params = parameters(model, x)
    method = jpeft.Bottleneck(
        targets=r"output/LayerNorm", original_ln_before=True, size=3, activation="tanh", scale=0.5
    )
    peft = method.bind(model, params, x)
    adapter = moved(peft, params, 1.0)
    own, tree = float64(adapter["output"]["LayerNorm"]), float64(params["output"])
    expected = np.asarray(x, np.float64)
    for layer in range(2):
        expected = post_norm(expected, tree, {name: leaf[layer] for name, leaf in own.items()}, layer)
    np.testing.assert_allclose(jax.jit(peft.apply)(params, adapter, x), expected, atol=1e-5)

    twin = PostNormNnx(params["output"])
    peft = jpeft.Bottleneck(
        targets=["norm"], original_ln_before=True, size=3, activation="tanh", scale=0.5
    ).bind(twin, x)  # fmt: skip
    adapter = {"norm": {name: leaf[0] for name, leaf in adapter["output"]["LayerNorm"].items()}}
    expected = post_norm(np.asarray(x, np.float64), tree, float64(adapter["norm"]), 0)
    np.testing.assert_allclose(peft.apply(nnx.state(twin, nnx.Param), adapter, x), expected, atol=1e-5)


def test_only_a_norm_can_run_again():
    x, model = numbers(3, 6), PostNormStack()
    params = parameters(model, x)
    peft = jpeft.Bottleneck(targets="output", original_ln_before=True).bind(model, params, x)
    with pytest.raises(ValueError, match="cannot run again on another input: only a module without others inside"):
        jax.eval_shape(peft.apply, params, moved(peft, params), x)
    with pytest.raises(ValueError, match="targets are norms, and 'layers_0' is a Dense of 6 features to 4"):
        jpeft.Bottleneck(targets="layers_0", original_ln_before=True).bind(
            (dense := nn.Sequential([nn.Dense(4)])), parameters(dense, x), x
        )


class AddNorm(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(4, 6, rngs=nnx.Rngs(0))

    def __call__(self, x, residual, scale=2):
        return jnp.tanh(self.dense(x) + scale * residual)


class Sublayer(nnx.Module):
    def __init__(self):
        self.output = AddNorm()

    def __call__(self, x, residual):
        return self.output(x, residual=residual)


def test_a_parallel_adapter_is_added_to_a_residual_connection():
    model, x, residual = Sublayer(), numbers(3, 4), numbers(3, 6)
    peft = ParallelAdapter(residual=True, size=2).bind(model, x, residual)
    adapter = moved(peft, params := nnx.state(model, nnx.Param))
    own, h = float64(adapter["output"]), np.asarray(residual, np.float64)
    hidden = np.maximum(h @ own["parallel_down"] + own["parallel_down_bias"], 0)
    expected = model(x, residual + 4 * (hidden @ own["parallel_up"] + own["parallel_up_bias"]))
    np.testing.assert_allclose(peft.apply(params, adapter, x, residual), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"second floating input is a residual .* of 6 features, and .* gets \(3, 4\)"):
        dense = ParallelAdapter(residual=True, targets=["dense"]).bind(model, x, residual)
        dense.apply(params, moved(dense, params), x, residual)


def test_dropout_is_on_the_change_and_off_without_a_key():
    model, x = nn.Sequential([nn.Dense(64)]), numbers(8, 4)
    params = parameters(model, x)
    peft = jpeft.Bottleneck(targets="layers_0", size=2, dropout=0.25).bind(model, params, x)
    adapter = moved(peft, params, 1.0)
    plain = model.apply({"params": params}, x)
    change = peft.apply(params, adapter, x) - plain
    dropped = peft.apply(params, adapter, x, rngs={"dropout": jax.random.key(0)}) - plain
    kept = np.abs(dropped) > 1e-6
    assert 0.15 < 1 - kept.mean() < 0.35
    np.testing.assert_allclose(dropped[kept], (change / 0.75)[kept], atol=1e-5)


def test_starts():
    model, x = nn.Sequential([nn.Dense(64)]), jnp.ones((1, 64))
    params = parameters(model, x)

    def start(**fields):
        peft = jpeft.Bottleneck(targets="layers_0", **{"size": 32, **fields}).bind(model, params, x)
        return peft.init(jax.random.key(0), params)["layers_0"]

    down = {
        name: np.asarray(start(init_weights=name)["bottleneck_down"]) for name in ("bert", "mam_adapter", "houlsby")
    }
    assert abs(down["bert"].std() - 0.02) < 1e-3 and abs(down["houlsby"].std() - 0.0088) < 5e-4
    assert np.abs(down["houlsby"]).max() <= 0.02 and 0.12 < np.abs(down["mam_adapter"]).max() <= 0.125
    assert (
        not start(init_weights="mam_adapter")["bottleneck_up"].any()
        and start(init_weights="bert")["bottleneck_up"].any()
    )
    assert flatten(start(size=None, reduction=0.5))[("bottleneck_down",)].shape == (64, 128)


def test_fields_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"adapter_residual_before_ln normalizes h .* it needs ln_after"):
        jpeft.Bottleneck(adapter_residual_before_ln=True)
    with pytest.raises(ValueError, match="original_ln_before adds to a norm's input"):
        jpeft.Bottleneck(adapter_residual_before_ln=True, ln_after=True, original_ln_before=True)
    with pytest.raises(ValueError, match="scale must be a finite number, 'learned' or 'channel', got 'row'"):
        jpeft.Bottleneck(scale="row")
    with pytest.raises(ValueError, match="is a Embed whose input is not floating"):
        sites(ParallelAdapter(targets=["word_embeddings"]), BERT, IDS)


# --- Compacter --------------------------------------------------------------------------------------------------------


def test_sizes_that_a_compacter_cannot_divide():
    with pytest.raises(ValueError, match=r"phm_dim is 3, which does not divide the features 8 at 'encoder/layer/0/att"):
        sites(Compacter(phm_dim=3, size=3), BERT, IDS)
    with pytest.raises(ValueError, match=r"phm_dim is 4, which does not divide the size 6 .* set size=8"):
        sites(Compacter(size=6), BERT, IDS)
    with pytest.raises(ValueError, match="sites of different sizes cannot share W_i"):
        sites(Compacter(size=4, shared_w_phm=True, targets=[r"intermediate", "output"]), BERT, IDS)


# --- representation fine-tuning ---------------------------------------------------------------------------------------


def test_blocks_are_found_one_by_one_or_scanned():
    assert sites(LoReFT(), BERT, IDS) == ["encoder/layer/0", "encoder/layer/1"]
    assert sites(LoReFT(), LLAMA, IDS) == ["model/layers"]
    assert sites(LoReFT(), LLAMA.unrolled(), IDS) == ["model/layers/0", "model/layers/1"]
    with pytest.raises(TargetError, match=r"target 'blocks .* matches nothing; candidates: Dense_0"):
        sites(LoReFT(), Mlp(), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="'encoder/layer/0' has 8 features, which hold no 9 orthogonal directions"):
        sites(LoReFT(rank=9), BERT, IDS)
    with pytest.raises(ValueError, match="LoReFT acts at no position"):
        LoReFT(prefix_positions=0)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def tuned(method, model=LLAMA):
    params = nn.meta.unbox(parameters(model, IDS))
    peft = method.bind(model, params, IDS)
    return peft, params, moved(peft, params, 0.5)


def test_texts_packed_in_a_row_have_their_own_first_and_last_tokens():
    peft, params, adapter = tuned(LoReFT(rank=2, prefix_positions=2, suffix_positions=1))
    texts = IDS[:1, :2], IDS[1:, :4]
    row = np.concatenate([*texts, np.zeros((1, 1), int)], axis=1)
    packed = {
        "segment_ids": np.array([[1, 1, 2, 2, 2, 2, 0]]),
        "position_ids": np.array([[0, 1, 0, 1, 2, 3, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1, 1, 1, 0]]),
    }
    run = jax.jit(lambda ids, kwargs: peft.apply(params, adapter, ids, **kwargs))
    expected = np.concatenate([run(text, {}) for text in texts], axis=1)
    np.testing.assert_allclose(run(row, packed)[:, :6], expected, atol=1e-5)


def test_tokens_after_a_prompt_with_a_cache_stay_as_they_are():
    peft, params, adapter = tuned(LoReFT(rank=2, prefix_positions=3))
    run = jax.jit(lambda ids, kwargs: peft.apply(params, adapter, ids, **kwargs))
    expected = run(IDS, {})
    logits, cache = run(IDS[:, :4], {"cache": init_cache(LLAMA, batch=2, capacity=6)})
    np.testing.assert_allclose(logits, expected[:, :4], atol=1e-5)
    logits, _ = run(IDS[:, 4:], {"cache": cache})
    np.testing.assert_allclose(logits, expected[:, 4:], atol=1e-5)


def test_some_of_a_scans_layers_are_changed():
    peft, params, adapter = tuned(LoReFT(rank=2, overrides={"model/layers": {"layers": [1]}}))
    own = {name: leaf[1] for name, leaf in adapter["model"]["layers"].items() if leaf.dtype != bool}
    model, plain, *_ = stacking.unroll(LLAMA, params)
    one = LoReFT(rank=2, targets=["model/layers/1"]).bind(model, plain, IDS)
    expected = one.apply(plain, {"model": {"layers": {"1": own}}}, IDS)
    np.testing.assert_allclose(jax.jit(peft.apply)(params, adapter, IDS), expected, atol=1e-5)


def test_positions_that_cannot_be_told():
    model, x = nn.Sequential([Mlp()]), jnp.ones((4, 3))
    params = parameters(model, x)
    peft = LoReFT(targets=[r"Dense_0"]).bind(model, params, x)
    with pytest.raises(ValueError, match=r"LoReFT needs the positions of tokens, and no argument .* shape \(4, 2\)"):
        peft.apply(params, moved(peft, params), x)
    peft, params, adapter = tuned(LoReFT(), BERT)
    with pytest.raises(
        ValueError, match=r"needs an attention mask \[batch, length\] = \[2, 5\] here, got attention_mask"
    ):
        jax.eval_shape(lambda: peft.apply(params, adapter, IDS, attention_mask=np.ones((1, 5), int)))
