"""Attentions of third-party models, found in their traces: prefixes equal keys and values prepended by hand.

The Flax classes of transformers 4.57.6, gemma from its wheel on PyPI, and tunix. Run by .ci/run.
"""

import contextlib
import dataclasses
import functools
import importlib
import sys
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core.tree import flatten
from jpeft.methods.base import AttentionMethod
from jpeft.recipes import assets
from tests.contract import close
from tests.foreign import test_tunix
from tests.foreign.test_transformers import Foreign, _OldNumpy
from tests.foreign.test_tunix import tunix  # noqa: F401
from tests.zoo import moved, parameters

pytestmark = [
    pytest.mark.usefixtures("quick_compiles", "standard_promotion"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:jax.nn.one_hot input should be integer:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    *(pytest.mark.filterwarnings(f"ignore::DeprecationWarning:{name}") for name in ("tunix", "qwix")),
]
PREFIX = 3


# --- transformers -----------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(3, 60, (2, 6)).astype("int32")
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2], "int32")
POSITIONS = np.broadcast_to(np.arange(6, dtype="int32"), IDS.shape)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")
SOUND = np.random.default_rng(2).normal(size=(2, 8, 16)).astype("float32")
WAVES = np.random.default_rng(3).normal(size=(2, 64)).astype("float32")
HEAD_MASK = np.random.default_rng(4).uniform(size=(2, 4)).astype("float32")

_CAUSAL = {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS}
_BERT = {**_CAUSAL, "token_type_ids": 0 * IDS, "head_mask": None}
_TWO = {
    "decoder_input_ids": IDS[:, :4],
    "decoder_attention_mask": MASK[:, :4],
    "decoder_position_ids": POSITIONS[:, :4],
}
_T5 = {"input_ids": IDS, "attention_mask": MASK} | {k: v for k, v in _TWO.items() if "position" not in k}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_TEXT = {**_SMALL, "vocab_size": 64, "max_position_embeddings": 16}
_GPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 16}
_BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_OF_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "local_radius": 3,
          "decoder_start_token_id": 0}  # fmt: skip
_VISION = {**_SMALL, "image_size": 8, "patch_size": 4}
_PIXELS = {"pixel_values": IMAGES}


def _foreign(model, config, fields, inputs):
    return Foreign(model, config, fields, inputs, "")


# By the folder of transformers.models that each is in.
MODELS = {
    "albert": _foreign(
        "FlaxAlbertForMaskedLM", "AlbertConfig", {**_TEXT, "embedding_size": 8},
        {k: v for k, v in _BERT.items() if k != "head_mask"},
    ),
    "bart": _foreign("FlaxBartForConditionalGeneration", "BartConfig", _BART, {**_CAUSAL, **_TWO}),
    "beit": _foreign(
        "FlaxBeitForImageClassification", "BeitConfig", {**_VISION, "use_relative_position_bias": True}, _PIXELS
    ),
    "bert": _foreign("FlaxBertForMaskedLM", "BertConfig", _TEXT, _BERT),
    "big_bird": _foreign(
        "FlaxBigBirdForMaskedLM", "BigBirdConfig", {**_TEXT, "attention_type": "original_full"}, _BERT
    ),
    "blenderbot": _foreign("FlaxBlenderbotForConditionalGeneration", "BlenderbotConfig", _BART, {**_CAUSAL, **_TWO}),
    "bloom": _foreign(
        "FlaxBloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        {"input_ids": IDS, "attention_mask": MASK},
    ),
    "clip": _foreign(
        "FlaxCLIPModel", "CLIPConfig", {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 8},
        {**_CAUSAL, **_PIXELS},
    ),
    "dinov2": _foreign("FlaxDinov2ForImageClassification", "Dinov2Config", _VISION, _PIXELS),
    "electra": _foreign("FlaxElectraForMaskedLM", "ElectraConfig", {**_TEXT, "embedding_size": 8}, _BERT),
    "gemma": _foreign(
        "FlaxGemmaForCausalLM", "GemmaConfig", {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}, _CAUSAL
    ),
    "gpt2": _foreign("FlaxGPT2LMHeadModel", "GPT2Config", _GPT, _CAUSAL),
    "gpt_neo": _foreign(
        "FlaxGPTNeoForCausalLM", "GPTNeoConfig",
        {**_TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 3},
        _CAUSAL,
    ),
    "gptj": _foreign("FlaxGPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}, _CAUSAL),
    "llama": _foreign("FlaxLlamaForCausalLM", "LlamaConfig", {**_TEXT, "num_key_value_heads": 2}, _CAUSAL),
    "longt5": _foreign(
        "FlaxLongT5ForConditionalGeneration", "LongT5Config",
        {**_OF_T5, "encoder_attention_type": "transient-global", "global_block_size": 2}, _T5,
    ),
    "marian": _foreign("FlaxMarianMTModel", "MarianConfig", _BART, {**_CAUSAL, **_TWO}),
    "mbart": _foreign("FlaxMBartForConditionalGeneration", "MBartConfig", _BART, {**_CAUSAL, **_TWO}),
    "mistral": _foreign(
        "FlaxMistralForCausalLM", "MistralConfig", {**_TEXT, "num_key_value_heads": 2, "sliding_window": 4}, _CAUSAL
    ),
    "opt": _foreign("FlaxOPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}, _CAUSAL),
    "pegasus": _foreign("FlaxPegasusForConditionalGeneration", "PegasusConfig", _BART, {**_CAUSAL, **_TWO}),
    "roberta": _foreign("FlaxRobertaForMaskedLM", "RobertaConfig", _TEXT, {**_BERT, "head_mask": HEAD_MASK}),
    "roformer": _foreign(
        "FlaxRoFormerForMaskedLM", "RoFormerConfig", {**_TEXT, "embedding_size": 16},
        {k: v for k, v in _BERT.items() if k != "position_ids"},
    ),
    "t5": _foreign("FlaxT5ForConditionalGeneration", "T5Config", _OF_T5, _T5),
    "vit": _foreign("FlaxViTForImageClassification", "ViTConfig", _VISION, _PIXELS),
    "wav2vec2": _foreign(
        "FlaxWav2Vec2ForCTC", "Wav2Vec2Config",
        {**_TEXT, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        {"input_values": WAVES, "attention_mask": np.ones_like(WAVES, "int32")},
    ),
    "whisper": _foreign(
        "FlaxWhisperForConditionalGeneration", "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 2,
         "suppress_tokens": None, "begin_suppress_tokens": None},
        {"input_features": SOUND, **_TWO},
    ),
    "xglm": _foreign(
        "FlaxXGLMForCausalLM", "XGLMConfig",
        {"vocab_size": 64, "max_position_embeddings": 16, "d_model": 16, "ffn_dim": 24, "num_layers": 2,
         "attention_heads": 4},
        _CAUSAL,
    ),
    "xlm_roberta": _foreign("FlaxXLMRobertaForMaskedLM", "XLMRobertaConfig", _TEXT, _BERT),
}  # fmt: skip
ALWAYS = {"gptj", "roberta", "llama", "t5"}
NAMES = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS]


class _Numpy(_OldNumpy):
    """``jax.numpy`` with another ``einsum``."""

    def __init__(self, einsum):
        self.einsum = einsum


@contextlib.contextmanager
def by_hand(name, prefixes):
    """Lets the modules of a model prepend keys and values: the next pair in every call of an attention.

    All of these call flax's function for the probabilities, and multiply them with values by one einsum.
    """
    module = importlib.import_module(f"transformers.models.{name}.modeling_flax_{name}")
    left, pending = iter(prefixes), []

    def longer(prefix, x):
        prefix = jnp.repeat(prefix, x.shape[-2] // prefix.shape[-2], axis=-2)
        return jnp.concatenate([jnp.broadcast_to(prefix, (*x.shape[:-3], *prefix.shape)), x], axis=-3)

    def weights(query, key, bias=None, **kwargs):
        keys, values = next(left)
        pending.append(values)
        bias = None if bias is None else jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((keys.shape[0], 0),))
        return nn.dot_product_attention_weights(query, longer(keys, key), bias=bias, **kwargs)

    def einsum(spec, x, y, **kwargs):
        if pending and spec == "...hqk,...khd->...qhd":
            y = longer(pending.pop(), y)
        return jnp.einsum(spec, x, y, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dot_product_attention_weights", weights)
        patch.setattr(module, "jnp", _Numpy(einsum))
        yield
    assert not pending and next(left, None) is None


@functools.cache
def loaded(name):
    if name in ("t5", "longt5"):
        importlib.import_module(f"transformers.models.{name}.modeling_flax_{name}").jnp = _OldNumpy()
    hf = MODELS[name].load() if name != "wav2vec2" else MODELS[name].load(input_shape=(1, 64))
    return hf.module, hf.params


def floats(y):
    return [x for x in jax.tree.leaves(y) if jnp.issubdtype(x.dtype, jnp.floating)]


def run_by_hand(name, prefixes):
    module, params = loaded(name)
    with by_hand(name, prefixes):
        return floats(jax.jit(lambda p: module.apply({"params": p}, **MODELS[name].inputs))(params))


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_on_a_model_of_transformers(name):
    (module, params), inputs = loaded(name), MODELS[name].inputs
    peft = jpeft.PrefixTuning(length=PREFIX).bind(module, params, **inputs)
    assert {site.heads[0] for site in peft.sites} == {{"llama": 2, "mistral": 2, "gemma": 1}.get(name, 4)}
    adapter = moved(peft, params, 0.7)
    got = floats(jax.jit(lambda p, a: peft.apply(p, a, **inputs))(params, adapter))
    leaves = flatten(adapter)
    pairs = [(leaves[*site.path, "prefix_key"], leaves[*site.path, "prefix_value"]) for site in peft.sites]
    calls = 2 if name == "albert" else 1  # its layers share their parameters
    want = run_by_hand(name, pairs * calls)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
    plain = floats(module.apply({"params": params}, **inputs))
    assert max(np.abs(a - b).max() for a, b in zip(got, plain, strict=True)) > 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected(AttentionMethod):
    """A prefix of projected states."""

    width: int

    def init(self, key, site, w):
        return {"states": jnp.zeros((PREFIX, self.width))}

    def attend(self, leaves, attend, query, key, value, mask, project):
        return attend(query, key, value, mask, project(leaves["states"]))


def _of_llama(params, path, states):
    return [(states @ params[*path, f"{n}_proj", "kernel"]).reshape(PREFIX, 2, 4) for n in "kv"]


def _of_gpt2(params, path, states):
    y = states @ params[*path, "c_attn", "kernel"].T + params[*path, "c_attn", "bias"]
    return [x.reshape(PREFIX, 4, 8) for x in np.split(np.asarray(y), 3, axis=-1)[1:]]


@pytest.mark.parametrize(("name", "width", "project"), [("llama", 16, _of_llama), ("gpt2", 32, _of_gpt2)])
def test_states_are_projected_by_a_models_own_weights(name, width, project):
    (module, params), inputs = loaded(name), MODELS[name].inputs
    peft = Projected(width=width).bind(module, params, **inputs)
    adapter = moved(peft, params, 0.7)
    got = floats(jax.jit(lambda p, a: peft.apply(p, a, **inputs))(params, adapter))
    pairs = [project(flatten(params), s.path, flatten(adapter)[*s.path, "states"]) for s in peft.sites]
    for a, b in zip(got, run_by_hand(name, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.exhaustive
def test_blocks_of_one_softmax_are_refused():
    fields = {**_TEXT, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    foreign = _foreign("FlaxBigBirdForMaskedLM", "BigBirdConfig", {**fields, "max_position_embeddings": 32}, {})
    hf = foreign.load(input_shape=(1, 24))
    ids = np.tile(IDS, (1, 4))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids,
              "position_ids": np.tile(np.arange(24), (2, 1)), "head_mask": None}  # fmt: skip
    with pytest.raises(jpeft.TargetError, match="the logits of several products"):
        jpeft.PrefixTuning(length=PREFIX).bind(hf.module, hf.params, **inputs)


# --- gemma ------------------------------------------------------------------------------------------------------------

GEMMA = assets.Asset(
    package="gemma",
    version="3.3.0",
    sha256="b76d0a6b0602b5f4ece98dd161400f638ebe84e70e246732e5cba584045b7942",
    megabytes=1,
    inside="gemma",
)


class _Any:
    def __class_getitem__(cls, shape):
        return jax.Array


@pytest.fixture(scope="module")
def gemma():
    """The module of gemma with its attention, without what the package imports."""
    folder = assets.fetch("gemma", GEMMA)
    packages = {name: types.ModuleType(name) for name in ("gemma", "gemma.gm", "gemma.gm.nn", "gemma.gm.math")}
    for name, package in packages.items():
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    kauldron: Any = types.ModuleType("kauldron")
    kauldron.__path__, kauldron.kd = [], types.SimpleNamespace(nn=types.SimpleNamespace(Identity=lambda: lambda x: x))
    typing: Any = types.ModuleType("kauldron.typing")
    typing.Bool = typing.Int = _Any
    before = dict(sys.modules)
    sys.modules |= {**packages, "kauldron": kauldron, "kauldron.typing": typing}
    packages["gemma.gm.math"]._positional_embeddings = importlib.import_module("gemma.gm.math._positional_embeddings")
    packages["gemma.gm.nn"]._layers = importlib.import_module("gemma.gm.nn._layers")
    yield importlib.import_module("gemma.gm.nn._modules")
    for name in [name for name in sys.modules if name not in before]:
        del sys.modules[name]


LENGTH, SLOTS, WIDTH, DIM = 5, 10, 16, 8
FORMS = {
    "grouped, capped": {"num_kv_heads": 2, "attn_logits_soft_cap": 5.0, "use_qk_norm": True},
    "one head, sliding": {"num_kv_heads": 1, "sliding_window_size": 4},
    "fused": {"num_kv_heads": 4},
}


FIRST = "grouped, capped"


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.exhaustive] * (f != FIRST)) for f in FORMS])
def test_a_prefix_in_gemma_equals_one_in_its_own_cache(form, gemma):
    fields = FORMS[form]
    kinds, window = gemma.AttentionType, "sliding_window_size" in fields
    fields = {"num_heads": 4, "head_dim": DIM, "query_pre_attn_scalar": DIM**-0.5, **fields}
    kind = kinds.LOCAL_SLIDING if window else kinds.GLOBAL

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, positions, cache, mask):
            new = {}
            for i in range(2):
                attention = gemma.Attention(features=WIDTH, attn_type=kind, name=f"layer_{i}", **fields)
                new[i], y = attention(x, positions, None if cache is None else cache[i], mask)
                x = x + y
            return x, new

    model, x = Model(), jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH) + PREFIX, (2, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (2, LENGTH, LENGTH))
    params = parameters(model, x, positions, None, mask)
    peft = jpeft.PrefixTuning(length=PREFIX).bind(model, params, x, positions, None, mask)
    adapter = moved(peft, params, 0.7)

    empty = gemma.Attention.init_cache(SLOTS, fields["num_kv_heads"], DIM, 2, jnp.float32)

    def filled(leaves):
        new = {"k": empty["k"].at[:, :PREFIX].set(leaves["prefix_key"]), "end_index": empty["end_index"] + PREFIX}
        new["v"] = empty["v"].at[:, :PREFIX].set(leaves["prefix_value"])
        if "positions" in empty:  # in the window of all queries
            new["positions"] = empty["positions"].at[:, :PREFIX].set(LENGTH)
        return {**empty, **new}

    theirs = {i: filled(adapter[f"layer_{i}"]) for i in range(2)}
    own = jnp.pad(mask, ((0, 0), (0, 0), (0, SLOTS - LENGTH)))
    wider = jnp.pad(mask, ((0, 0), (0, 0), (PREFIX, SLOTS - LENGTH - PREFIX)))
    wider = wider.at[:, :, :PREFIX].set(True)
    plain = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    adapted = jax.jit(lambda *inputs: peft.apply(params, adapter, *inputs))
    want, theirs = plain(x, positions, theirs, wider)
    got, cache = adapted(x, positions, {0: empty, 1: empty}, own)
    close(got, want, 1e-5)
    close(adapted(x, positions, None, mask)[0], want, 1e-5)

    step = x[:, :1], positions[:, -1:] + 1
    seen = [jnp.broadcast_to(jnp.arange(SLOTS) <= n, (2, 1, SLOTS)) for n in (LENGTH, LENGTH + PREFIX)]
    close(adapted(*step, cache, seen[0])[0], plain(*step, theirs, seen[1])[0], 1e-5)


# --- tunix ------------------------------------------------------------------------------------------------------------


def _wide(case):
    """The model with a window that holds all positions: its cache hides a prefix from queries outside."""

    def fields(module):
        own = case.fields(module)
        return own | {"sliding_window_size": 64} if "sliding_window_size" in own else own

    return dataclasses.replace(case, fields=fields)


TUNIX = [name for name in test_tunix.MODELS if "Gemma4" not in name]  # whose layers share caches


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n != "Qwen3")) for n in TUNIX])
def test_a_prefix_in_tunix_equals_one_in_its_own_cache(name, tunix):  # noqa: F811
    model, inputs = _wide(test_tunix.MODELS[name]).make(tunix), test_tunix.INPUTS
    ids, positions, _, mask = inputs
    params = nnx.state(model, nnx.Param)
    peft = jpeft.PrefixTuning(length=PREFIX).bind(model, *inputs)
    adapter = test_tunix.moved(peft, model)
    leaves, length = flatten(adapter), ids.shape[1]

    def filled(cache):
        new = {}
        for site, (name, own) in zip(peft.sites, cache.items(), strict=True):
            k, v = (leaves[*site.path, f"prefix_{n}"] for n in ("key", "value"))
            own = dict(own, k=own["k"].at[:, :PREFIX].set(k), v=own["v"].at[:, :PREFIX].set(v))
            new[name] = {**own, "end_index": own["end_index"] + PREFIX}
        return new

    tuned, _ = jpeft.nnx.attach(model, peft, rngs=nnx.Rngs(0), adapter=adapter)
    got = jax.jit(lambda p, a: peft.apply(p, a, *inputs)[0])(params, adapter)
    np.testing.assert_array_equal(nnx.jit(lambda m: m(*inputs)[0])(tuned), got)
    caches = test_tunix.cache_of(model, length), filled(test_tunix.cache_of(model, length + PREFIX))
    wider = jnp.pad(jnp.asarray(mask), ((0, 0), (0, 0), (PREFIX, 0)), constant_values=True)
    want = nnx.jit(lambda m, c: m(ids, positions, c, wider)[0])(model, caches[1])
    close(got, want, 1e-5)
    close(nnx.jit(lambda m, c: m(ids, positions, c, mask)[0])(tuned, caches[0]), want, 1e-5)
