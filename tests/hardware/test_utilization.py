"""FLOPs of a step against XLA's own count, which needs no compilation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.core.tree import size_bytes
from jpeft.hardware.utilization import peak_flops, step_flops
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig

ROWS, LENGTH = 2, 128
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def decoder(**options):
    config = DecoderConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=LENGTH, **options)
    return Decoder(config, scan_layers=False)  # XLA counts the body of a scan once


def bert():
    return Bert(BertConfig(**SIZES, max_position_embeddings=LENGTH))


@functools.cache
def gradient_flops(kind, targets):
    """The FLOPs that XLA counts in the gradient of an adapter, and those of `step_flops`."""
    model = MODELS[kind]()
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    peft = jpeft.LoRA(rank=4, targets=targets).bind(model, params, ids)
    adapter = peft.init(jax.random.key(1), params)
    gradient = jax.jit(jax.grad(lambda a, p, ids: jnp.square(peft.apply(p, a, ids)).mean()))
    counted = gradient.lower(adapter, params, ids).cost_analysis()["flops"]
    return counted, step_flops(model, params, tokens=ROWS * LENGTH, length=LENGTH, trained=size_bytes(adapter) // 4)


MODELS = {"decoder": decoder, "tied": lambda: decoder(tie_word_embeddings=True), "bert": bert}


@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_close_to_xlas_count(kind):
    counted, expected = gradient_flops(kind, "all-linear")
    assert expected == pytest.approx(counted, rel=0.1)


def test_no_backward_pass_below_the_lowest_adapter():
    every, _ = gradient_flops("decoder", "all-linear")
    last, _ = gradient_flops("decoder", "model/layers/3/.*")
    head = 2 * 64 * 300 * ROWS * LENGTH  # the output head's product, forward and backward as in the other
    forward = (every - 2 * head) / 2
    # The whole forward pass, and the backward pass of the last of four layers.
    assert last < 2 * head + forward * (1 + 0.3)


def test_peaks_are_found_by_device_kind():
    kinds = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA L40S": 362e12,
             "NVIDIA L4": 121e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A10G": 125e12, "Tesla T4": 65e12,
             "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
             "cpu": None}  # fmt: skip
    assert {kind: peak_flops(kind) for kind in kinds} == kinds
