"""The known architectures have as many parameters as their authors publish."""

import math

import jax
import jax.numpy as jnp
import pytest

from jpeft.errors import UserError
from jpeft.models import decoder_hf
from jpeft.planning import sizes

VISION = 416_866_032  # Gemma 3's tower; the projection from its 1152 to the text's width, and a norm, come on top

PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - VISION - 1152 * (2560 + 1),
    "gemma-3-12b": 12_187_325_040 - VISION - 1152 * (3840 + 1),
    "gemma-3-27b": 27_432_406_640 - VISION - 1152 * (5376 + 1),
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-small": 23_572_403_200,
    "mistral-small-24b": 23_572_403_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_every_known_model_is_checked():
    assert set(sizes.known()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_those_published(name):
    model = decoder_hf.from_config(sizes.config(name))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Llama-3-8B", "llama-3-8b"),
        ("llama3-8b", "llama-3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("TINYLLAMA_1.1B", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"),
    ],
)
def test_spellings_of_names(name, meant):
    assert sizes.config(name) == sizes.config(meant)


def test_windows_are_those_of_the_models():
    window = {name: decoder_hf.from_config(sizes.config(name)).config.sliding_window for name in PUBLISHED}
    assert window["mistral-7b-v0.1"] == 4096 and window["mistral-7b-v0.3"] is None and window["gemma-3-4b"] == 1024


@pytest.mark.parametrize("name", ["qwen3-17b", "llama-8b", "", "../models/llama-3-8b.json"])
def test_an_unknown_model_error_lists_the_known_models(name):
    with pytest.raises(UserError, match=r"unknown model .*Known models: .*gemma-2-27b") as error:
        sizes.config(name)
    assert "\n" not in str(error.value)


def test_an_unknown_model_error_suggests_similar_names():
    with pytest.raises(UserError, match=r"did you mean .*qwen3-1.7b.*\?"):
        sizes.config("qwen3-17b")
