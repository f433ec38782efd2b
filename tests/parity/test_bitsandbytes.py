"""jpeft's NF4 against bitsandbytes: the same codes and scales, and folders that each loads from the other."""

import json

import bitsandbytes
import bitsandbytes.functional as F
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jpeft
from jpeft import models
from jpeft.core.fingerprint import fingerprint
from jpeft.core.quantized import Quantized, quantize_array
from jpeft.core.schemes import NF4, SCALE_CODES
from jpeft.core.tree import flatten

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 97, (2, 9))


def pair(shape, block, double, seed=0):
    """A weight quantized by both: bitsandbytes' codes and state; ours, and ours in torch's layout and order."""
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if shape[0] > 1:
        weight[1, :block] = 0
    codes, state = F.quantize_4bit(torch.tensor(weight), blocksize=block, quant_type="nf4", compress_statistics=double)
    ours = quantize_array(weight.T, "nf4", block, double)
    flat = {"codes": np.asarray(ours.codes).T.reshape(-1, 1), "scales": np.asarray(ours.scales).T.reshape(-1)}
    return codes, state, ours, flat


def test_codebooks():
    np.testing.assert_array_equal(np.float32(NF4), F.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(SCALE_CODES, F.create_dynamic_map().numpy())


SHAPES = [((192, 576), 64), ((5, 64), 64), ((100, 640), 128), ((1, 64), 64), ((333, 192), 64), ((16, 512), 256)]


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_codes_and_scales_are_the_same_to_the_bit(shape, block):
    codes, state, ours, flat = pair(shape, block, double=False)
    np.testing.assert_array_equal(flat["codes"], codes.numpy())
    np.testing.assert_array_equal(flat["scales"], state.absmax.numpy())
    np.testing.assert_array_equal(np.asarray(ours.unbox()).T, F.dequantize_4bit(codes, state).numpy())


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_quantized_scales(shape, block):
    """The order of the sum in the mean differs. bitsandbytes on a CPU finds codes through a coarse table and may take
    the farther one for a scale near the middle of two; jpeft always takes the nearest."""
    codes, state, ours, flat = pair(shape, block, double=True)
    np.testing.assert_array_equal(flat["codes"], codes.numpy())
    np.testing.assert_allclose(np.asarray(ours.offset), state.offset.numpy(), rtol=5e-7)
    np.testing.assert_allclose(np.asarray(ours.groups), state.state2.absmax.numpy(), rtol=0, atol=2e-6)
    if state.absmax.numel() == 1:  # the only scale is the mean: any code times zero
        return
    moved = np.abs(flat["scales"].astype(int) - state.absmax.numpy())
    assert moved.max() <= 1 and (moved > 0).mean() < 0.005


@pytest.mark.parametrize(("shape", "block"), SHAPES[-2:])
def test_the_same_codes_are_the_same_weights(shape, block):
    codes, state, ours, _ = pair(shape, block, double=True)
    theirs = Quantized(
        codes=ours.codes, scales=jnp.asarray(state.absmax.numpy().reshape(shape[0], -1).T),
        groups=jnp.asarray(state.state2.absmax.numpy()), offset=jnp.asarray(state.offset.numpy()), origin=ours.origin,
        scheme="nf4", block=block, axis=-2, dtype=ours.dtype,
    )  # fmt: skip
    want = F.dequantize_4bit(codes, state).numpy()
    np.testing.assert_array_equal(np.asarray(theirs.unbox()).T, want)  # one operation at a time
    np.testing.assert_allclose(np.asarray(jax.jit(Quantized.unbox)(theirs)).T, want, rtol=3e-7, atol=3e-7)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama with biases, saved by transformers."""
    folder = tmp_path_factory.mktemp("llama") / "plain"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def torch_logits(model):
    """Logits in float32. On CPUs with AVX512-BF16, bitsandbytes would multiply by 4-bit weights in bfloat16."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def logits(folder, **options):
    model, params = models.load(folder, **options)
    return jax.jit(model.apply)({"params": params}, jnp.asarray(IDS)), params


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("double", [True, False])
def test_jpeft_loads_a_folder_that_transformers_saved(plain, tmp_path, double):
    about = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=about, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "bnb")
    got, params = logits(tmp_path / "bnb")
    np.testing.assert_allclose(got, torch_logits(theirs), rtol=1e-4, atol=1e-4)
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, Quantized) and (kernel.groups is not None) == double
    ours = flatten(jpeft.quantize(models.load(plain)[1], double=double))
    for path, leaf in flatten(params).items():
        if isinstance(leaf, Quantized):
            np.testing.assert_array_equal(np.asarray(leaf.codes), np.asarray(ours[path].codes))


SOME = {"double": False, "block": 128, "targets": ["down_proj"]}


@pytest.mark.parametrize("options", [{}, SOME], ids=["all", "some"])
def test_transformers_loads_a_folder_that_jpeft_saved(plain, tmp_path, options):
    model, params = models.load(plain, quantize=options)
    models.save(tmp_path / "ours", model, params, source=plain)
    theirs = opened(tmp_path / "ours")
    layer = theirs.model.layers[1]
    assert isinstance(layer.mlp.down_proj, bitsandbytes.nn.Linear4bit)
    assert isinstance(layer.mlp.up_proj, bitsandbytes.nn.Linear4bit) == (not options)
    assert not isinstance(theirs.lm_head, bitsandbytes.nn.Linear4bit)
    want, _ = logits(tmp_path / "ours")
    np.testing.assert_allclose(want, torch_logits(theirs), rtol=1e-4, atol=1e-4)
    if not options:  # a round trip through transformers loses only the checksums of the original weights
        theirs.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
        again, read = logits(tmp_path / "again")
        np.testing.assert_array_equal(again, want)
        assert fingerprint(read).keys() == fingerprint(params).keys()
