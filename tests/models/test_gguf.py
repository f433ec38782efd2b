"""jpeft.models.gguf on files that this test writes with `gguf`, in the form of llama.cpp's converter."""

import itertools
import json
import random
import re
import struct
import sys
import unicodedata
import warnings

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from jpeft.errors import ModelError
from jpeft.models.gguf import (
    open_tensors,
    read_chat_template,
    read_config,
    read_special_tokens,
    read_tokenizer,
    stop_ids,
)
from jpeft.text import chat_template

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, ROWS, LAYERS = 32, 4, 2, 8, 64, 20, 2
TYPE = gguf.TokenType
FIELDS = {"context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": INNER, "block_count": LAYERS,
          "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
          "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
ALL_READERS = (read_config, read_tokenizer, read_special_tokens, stop_ids, read_chat_template)


def shapes(arch):
    """GGUF name → torch shape, which this file derives itself."""
    layer = {"attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN), "attn_v": (KV_HEADS * HEAD, HIDDEN),
             "attn_output": (HIDDEN, HEADS * HEAD), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
             "ffn_down": (HIDDEN, INNER), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}  # fmt: skip
    if arch in ("qwen3", "gemma3"):
        layer |= {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
    if arch.startswith("gemma"):
        layer |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    named = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd.weight": (ROWS, HIDDEN), "output_norm.weight": (HIDDEN,), **named}


def tensors_of(arch, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(arch).items()}


def write(path, arch="llama", tensors=None, fields=(), keys=(), drop=(), endianess=gguf.GGUFEndian.LITTLE):
    """Writes a file. `fields`: metadata of the architecture, `keys`: others; values may be `(GGUFValueType, value)`."""
    writer = gguf.GGUFWriter(path, arch, endianess=endianess)
    for key, value in ({f"{arch}.{k}": v for k, v in {**FIELDS, **dict(fields)}.items()} | dict(keys)).items():
        kind, value = value if isinstance(value, tuple) else (gguf.GGUFValueType.get_type(value), value)
        if key.removeprefix(f"{arch}.") not in drop:
            writer.add_array(key, value) if kind == gguf.GGUFValueType.ARRAY else writer.add_key_value(key, value, kind)
    for name, value in (tensors_of(arch) if tensors is None else tensors).items():
        value, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


# --- the config -------------------------------------------------------------------------------------------------------

COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 20, "max_position_embeddings": 128,
          "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": True,
          "attention_bias": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None}
SLIDE, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("arch", "fields", "expected"),
    [
        ("llama", {"rope.dimension_count": 8, "rope.freq_base": 500000.0},
         {"model_type": "llama", "rope_theta": 5e5, "hidden_act": "silu", "mlp_bias": False}),
        ("llama", {"attention.sliding_window": 64},
         {"model_type": "mistral", "sliding_window": 64, "hidden_act": "silu"}),
        ("llama", {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16},
         {"model_type": "llama", "head_dim": 16, "hidden_act": "silu", "mlp_bias": False}),
        ("llama", {"attention.head_count_kv": [2, 2], "feed_forward_length": [64, 64]},
         {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False}),
        ("qwen2", {}, {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False,
                       "sliding_window": None}),
        ("qwen3", {"attention.key_length": 8, "attention.value_length": 8},
         {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}),
        ("gemma2", {"attention.key_length": 8, "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
         {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0,
          "sliding_window": 4096, "layer_types": [SLIDE, FULL], "query_pre_attn_scalar": 8}),
        ("gemma2", {}, {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 50.0,
                        "final_logit_softcapping": 30.0, "sliding_window": 4096, "layer_types": [SLIDE, FULL],
                        "query_pre_attn_scalar": 8}),
        ("gemma3", {"attention.sliding_window": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
         {**GEMMA, "model_type": "gemma3_text", "rope_theta": 1e6, "sliding_window": 16, "query_pre_attn_scalar": 8,
          "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4,
          "layer_types": [SLIDE, SLIDE]}),
        ("gemma3", {"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4},
         {**GEMMA, "model_type": "gemma3_text", "rope_theta": 5e5, "sliding_window": None, "query_pre_attn_scalar": 8,
          "rope_local_base_freq": 2e4, "layer_types": [FULL, FULL]}),
    ],
)  # fmt: skip
def test_read_config(file, arch, fields, expected):
    assert read_config(write(file, arch, fields=fields)) == COMMON | expected


def test_period_of_sliding_layers_and_query_scale_of_the_27b_models(file):
    fields = {"block_count": 62, "attention.sliding_window": 16, "attention.head_count": 2}
    tensors = tensors_of("gemma3") | {f"blk.{i}.spare": np.zeros(1, np.float32) for i in range(62)}
    config = read_config(write(file, "gemma3", tensors, fields | {"attention.key_length": 8}))
    assert config["layer_types"][:7] == [SLIDE] * 5 + [FULL, SLIDE]
    assert config["query_pre_attn_scalar"] == HIDDEN / 2 and config["head_dim"] == 8


def test_config_of_heads_biases_and_special_ids(file):
    more = {"output.weight": (ROWS, HIDDEN), "blk.0.attn_q.bias": (HIDDEN,), "blk.0.ffn_up.bias": (INNER,)}
    tensors = tensors_of("llama") | {name: np.zeros(shape, np.float32) for name, shape in more.items()}
    keys = {f"tokenizer.ggml.{name}_token_id": value for name, value in (("bos", 3), ("eos", 4), ("padding", 5))}
    config = read_config(write(file, "llama", tensors, keys=keys))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [3, 4, 5]
    assert not config["tie_word_embeddings"] and config["attention_bias"] and config["mlp_bias"]


def llama3_divisors(factor, theta=5e5, head=128, low=1.0, high=4.0, length=8192):
    """`LlamaModel.generate_extra_tensors` of llama.cpp's converter."""
    divisors = []
    for frequency in 1.0 / (theta ** (np.arange(0, head, 2, dtype=np.float32) / head)):
        wave = 2 * np.pi / frequency
        smooth = (length / wave - low) / (high - low)
        divisors.append(1 if wave < length / high else factor if wave > length / low else
                        1 / ((1 - smooth) / factor + smooth))  # fmt: skip
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_follows_from_its_tensor(file, factor):
    tensors = tensors_of("llama") | {"rope_freqs.weight": llama3_divisors(factor)}
    fields = {"rope.freq_base": 5e5}
    config = read_config(write(file, "llama", tensors, fields))
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    with open_tensors(file) as opened:
        assert "rope_freqs.weight" not in opened
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert read_config(write(file, "llama", tensors | ones, fields))["rope_scaling"] is None
    with pytest.raises(ModelError, match="not llama3's scaling"):
        other = {"rope_freqs.weight": llama3_divisors(factor, length=4096)}
        read_config(write(file, "llama", tensors | other, fields))


def test_yarn_scaling_and_unsupported_fields(file):
    fields = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
            "beta_slow": 1.0}  # fmt: skip
    assert read_config(write(file, "qwen2", fields=fields))["rope_scaling"] == yarn
    for key, value in (("rope.scaling.attn_factor", 0.5), ("rope.scaling.type", "longrope")):
        with pytest.raises(ModelError, match=re.escape(key)):
            read_config(write(file, "qwen2", fields=fields | {key: value}))
    none = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
    assert read_config(write(file, "qwen2", fields=none))["rope_scaling"] is None


# --- tensors ----------------------------------------------------------------------------------------------------------


def permuted(weight, heads):
    """`LlamaModel.permute` of llama.cpp's converter."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_tensors_have_huggingface_names_and_values(file, arch):
    plain = tensors_of(arch) | {f"blk.1.attn_{x}.bias": np.arange(n, dtype=np.float32)
                                for x, n in (("q", HEADS * HEAD), ("k", KV_HEADS * HEAD))}  # fmt: skip
    written = dict(plain)
    for name, value in plain.items():
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            written[name] = permuted(value, HEADS if ".attn_q." in name else KV_HEADS)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            written[name] = value + 1
    layer = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # fmt: skip
    if arch.startswith("gemma"):
        layer |= {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
                  "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for name in plain.keys() - names.keys():
        _, i, owner, leaf = name.split(".")
        names[name] = f"model.layers.{i}.{layer[owner]}.{leaf}"
    with open_tensors(write(file, arch, written)) as tensors:
        assert tensors.keys() == set(names.values())
        values = {name: tensors[name].read() for name in tensors}
        assert all(tensors[name].path == file and tensors[name].shape == values[name].shape for name in tensors)
    for name, value in plain.items():  # 1 + x - 1 is x up to rounding
        np.testing.assert_allclose(values[names[name]], value, rtol=0, atol=3e-7 if arch.startswith("gemma") else 0)


@pytest.mark.parametrize("quantized", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights_are_dequantized_and_unpermuted(file, quantized):
    kind = gguf.GGMLQuantizationType[quantized]
    weight = tensors_of("llama")["blk.0.attn_q.weight"]
    packed = gguf.quantize(permuted(weight, HEADS), kind)
    with open_tensors(write(file, "llama", tensors_of("llama") | {"blk.0.attn_q.weight": (packed, kind)})) as tensors:
        value = tensors["model.layers.0.self_attn.q_proj.weight"].read()
    np.testing.assert_array_equal(value, gguf.dequantize(gguf.quantize(weight, kind), kind))
    assert value.dtype == np.float32


def test_stored_dtypes_and_unknown_names_are_kept(file):
    half, brain = np.arange(6, dtype=np.float16).reshape(2, 3), np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    extra = {"blk.0.attn_v.weight": half, "blk.0.ffn_up.weight": (brain.view(np.uint8), gguf.GGMLQuantizationType.BF16),
             "blk.0.attn_sinks.weight": np.ones(4, np.float32), "output.weight": half}  # fmt: skip
    with open_tensors(write(file, "llama", tensors_of("llama") | extra)) as tensors:
        for name, value in (("lm_head.weight", half), ("model.layers.0.mlp.up_proj.weight", brain)):
            read = tensors[name].read()
            assert read.dtype == value.dtype and read.shape == (2, 3) and (read == value).all()
        assert tensors["blk.0.attn_sinks.weight"].name == "blk.0.attn_sinks.weight"
        kept = tensors["model.norm.weight"].read()
    assert kept.flags.owndata or kept.base.flags.owndata  # not a view of the file
    assert kept.flags.writeable


# --- the tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = ["Hello world", "  two  spaces ", "def f(x):\n    return x ** 2  # ok\n", "1234 5.6e-7", "a 12  345",
         "naïve café", "東京 🙂", "\t\n\n\n \r\n", "", " ", "it's I'LL we'Ve", "e\u0301 ½ Ⅷ"]  # fmt: skip


def byte_level(special=("<|end|>", "<|im_start|>", "<|im_end|>", "<tool>")):
    """The tokens and merges of a small vocabulary: special tokens, all bytes, words learned from `TEXTS`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    parsed = json.loads(tokenizer.to_str())["model"]
    return sorted(parsed["vocab"], key=parsed["vocab"].get), [" ".join(pair) for pair in parsed["merges"]]


def gpt2_keys(pre="gpt-2", **more):
    tokens, merges = byte_level()
    types = [TYPE.CONTROL] * 3 + [TYPE.USER_DEFINED] + [TYPE.NORMAL] * (len(tokens) - 4)
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [int(kind) for kind in types],
            "merges": merges, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items() if value is not None}


def vocabulary(path, keys, arch="llama"):
    """A file of the tokenizer alone."""
    return write(path, arch, {}, keys=keys)


SMALL = "a 12  345x\n\nI'LL go"
SPLITS = {
    "gpt-2": ["a", " 12", " ", " 345", "x", "\n", "\n", "I", "'", "LL", " go"],
    "default": ["a", " 12", " ", " 345", "x", "\n", "\n", "I", "'", "LL", " go"],
    "smollm": ["a", " ", "1", "2", "  ", "3", "4", "5", "x", "\n", "\n", "I", "'", "LL", " go"],
    "starcoder": ["a", " ", "1", "2", "  ", "3", "4", "5", "x", "\n", "\n", "I", "'", "LL", " go"],
    "refact": ["a", " ", "1", "2", "  ", "3", "4", "5", "x", "\n", "\n", "I", "'", "LL", " go"],
    "qwen2": ["a", " ", "1", "2", " ", " ", "3", "4", "5", "x", "\n\n", "I", "'LL", " go"],
    "llama-bpe": ["a", " ", "12", " ", " ", "345", "x", "\n\n", "I", "'LL", " go"],
    "llama3": ["a", " ", "12", " ", " ", "345", "x", "\n\n", "I", "'LL", " go"],
    "llama-v3": ["a", " ", "12", " ", " ", "345", "x", "\n\n", "I", "'LL", " go"],
    "tekken": ["a", " ", "1", "2", " ", " ", "3", "4", "5", "x", "\n\n", "I", "'LL", " go"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level(file, pre):
    tokenizer = read_tokenizer(vocabulary(file, gpt2_keys(pre, add_bos_token=False)))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(SMALL)]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces] == SPLITS[pre]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == (
            text if pre != "qwen2" else unicodedata.normalize("NFC", text)
        )
    ids = tokenizer.encode("<|im_start|>user<tool><|im_end|>").ids
    assert (ids[0], ids[-2], ids[-1]) == (1, 3, 2)
    assert tokenizer.decode(ids) == "user<tool>"


def test_whole_words_of_the_vocabulary_are_kept_by_llama3(file):
    keys = gpt2_keys("llama-bpe", add_bos_token=False)
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "zzz"]  # no merges produce it
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], int(TYPE.NORMAL)]
    assert len(read_tokenizer(vocabulary(file, keys)).encode("zzz").ids) == 1
    assert len(read_tokenizer(vocabulary(file, keys | {"tokenizer.ggml.pre": "gpt-2"})).encode("zzz").ids) == 3


@pytest.mark.parametrize(
    ("pre", "bos", "eos", "around"),
    [("gpt-2", None, None, ([], [])), ("gpt-2", True, None, ([1], [])), ("gpt-2", None, True, ([], [2])),
     ("smollm", True, True, ([1], [2])), ("llama-bpe", None, None, ([1], [])), ("llama-bpe", False, None, ([], []))],
)  # fmt: skip
def test_bos_and_eos(file, pre, bos, eos, around):
    tokenizer = read_tokenizer(vocabulary(file, gpt2_keys(pre, add_bos_token=bos, add_eos_token=eos)))
    plain = tokenizer.encode("go", add_special_tokens=False).ids
    assert tokenizer.encode("go").ids == around[0] + plain + around[1]
    assert tokenizer.encode("go", "go").ids == (around[0] + plain + around[1]) * 2


def spm_keys(user_defined=(), **more):
    """A vocabulary as SentencePiece trains it: pieces that were learned later have lower scores."""
    pieces = ["▁t", "he", "▁the", "in", "▁a", "an", "▁an", "th", "the", "▁▁", "▁▁▁▁", "er", "in▁", "the▁", "nin", "ni"]
    letters = ["▁", *"etainhrsx.,é1"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *user_defined, *pieces, *letters]
    types = [TYPE.UNKNOWN, TYPE.CONTROL, TYPE.CONTROL, *[TYPE.BYTE] * 256, *[TYPE.USER_DEFINED] * len(user_defined),
             *[TYPE.NORMAL] * (len(pieces) + len(letters))]  # fmt: skip
    scores = [0.0] * (259 + len(user_defined)) + [float(-i) for i in range(len(pieces) + len(letters))]
    keys = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores,
            "token_type": [int(kind) for kind in types], "add_bos_token": False}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items() if value is not None}


def sentencepiece(keys, text):
    """SentencePiece's BPE by definition: joins the best neighbors, leftmost first, until no pair is a piece."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    score = {t: s for t, s, kind in zip(tokens, keys["tokenizer.ggml.scores"], types, strict=True) if kind == 1}
    symbols = list(text.replace(" ", "▁"))
    while joined := [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score]:
        _, at = min(joined)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    ids = [[tokens.index(s)] if s in score else [byte + 3 for byte in s.encode()] for s in symbols]
    return [index for each in ids for index in each]


def random_texts(count=300):
    rng = random.Random(0)
    return ["".join(rng.choices("the an in  .xéß🙂\n1", k=rng.randint(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece(file, prefix):
    keys = spm_keys(add_space_prefix=prefix)
    tokenizer = read_tokenizer(vocabulary(file, keys))
    for text in [*random_texts(), "", " ", "<0x0A> the"]:
        ids = tokenizer.encode(text).ids
        assert ids == sentencepiece(keys, " " + text if text and prefix is not False else text)
        assert tokenizer.decode(ids) == text
    bos = read_tokenizer(vocabulary(file, spm_keys(add_bos_token=None))).encode("the</s>an")
    assert bos.tokens == ["<s>", "▁the", "</s>", "▁an"]  # a bos by default, and a space prefix for each text


def test_sentencepiece_with_user_defined_pieces_as_in_gemma(file):
    """Runs of spaces are user-defined pieces, written with spaces, and matched before pieces are joined."""
    keys = spm_keys(user_defined=("\n\n", "  ", "    ", "<start_of_turn>"), add_space_prefix=False)
    tokenizer = read_tokenizer(vocabulary(file, keys, "gemma3"))
    tokens = tokenizer.encode("the\n\n     an<start_of_turn> the  an").tokens
    assert tokens == ["the", "\n\n", "    ", "▁an", "<start_of_turn>", "▁the", "  ", "an"]
    text = "the\n\n     an the\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_merges_in_the_file_are_used(file):
    keys = spm_keys(scores=None, merges=["t h", "th e"], add_space_prefix=False)
    assert read_tokenizer(vocabulary(file, keys)).encode("thean").tokens == ["the", "a", "n"]


def test_special_tokens_chat_template_and_stop_ids(file):
    keys = gpt2_keys(eot_token_id=0) | {"tokenizer.chat_template": "{{ messages }}"}
    vocabulary(file, keys)
    assert read_special_tokens(file) == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|end|>"}
    assert read_chat_template(file) == "{{ messages }}" and stop_ids(file) == (2, 0)
    vocabulary(file, gpt2_keys(eos_token_id=0))
    assert read_chat_template(file) is None and stop_ids(file) == (0, 2)  # <|im_end|> always ends a turn
    vocabulary(file, spm_keys())
    assert read_special_tokens(file) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    keys = gpt2_keys(token_type=None)
    assert read_tokenizer(vocabulary(file, keys)).encode("<|im_end|><tool>").ids[0] == 2 and stop_ids(file) == (2,)


def test_chat_tokenizer_of_the_file(file):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = chat_template.read(vocabulary(file, gpt2_keys(eot_token_id=0) | {"tokenizer.chat_template": template}))
    ids = tokenizer.encode_chat([{"role": "user", "content": "I go"}])
    assert (ids[0], ids[-1]) == (1, 2) and tokenizer.decode(ids) == "I go"
    assert tokenizer.stop_ids == (2, 0) and tokenizer.where == str(file)


# --- errors -----------------------------------------------------------------------------------------------------------


def read_all(path):
    for reader in ALL_READERS:
        reader(path)
    with open_tensors(path) as tensors:
        for tensor in tensors.values():
            tensor.read()


def tiny(path):
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
            "tokenizer.ggml.token_type": [1, 1, 1], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{{ x }}"}  # fmt: skip
    tensors = {name: value for name, value in tensors_of("llama").items() if ".ffn_" not in name}
    return write(path, "llama", tensors, keys=keys)


def test_a_file_truncated_anywhere_is_an_error(file):
    read_all(tiny(file))
    content = file.read_bytes()
    for length in [*range(0, 1500, 3), len(content) // 2, len(content) - 64]:
        file.write_bytes(content[:length])
        with pytest.raises(ModelError) as error:
            read_all(file)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"{file}: ")


def test_corrupt_bytes_raise_a_model_error_or_nothing(file):
    tiny(file)
    content, rng = file.read_bytes(), random.Random(0)
    errors = 0
    for _ in range(600):
        bad = bytearray(content)
        for at in rng.sample(range(8, 1800), 2):
            bad[at] = rng.randrange(256)
        file.write_bytes(bytes(bad))
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                read_all(file)
        except ModelError as error:
            errors += 1
            assert "\n" not in str(error) and str(error).startswith(f"{file}: ")
    assert errors > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"not a GGUF file \(it starts with b''\)"), (b"GGU", "not a GGUF file"), (b"PK\3\4" * 9, "not a GGUF file"),
     (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1, expected 2 or 3"),
     (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "truncated: byte 32 is needed, the file ends at 24"),
     (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "not a complete GGUF file"),
     (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 7, 2**62), "not a complete GGUF file"),
     (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "a value of type 99"),
     (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 0, 1, b"t", 2**31, 0, 0), r"shape \(\)"),
     (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0), r"shape \(0,\)"),
     (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 4, 77, 0), "type 77, which gguf does not know"),
     (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 3, 0), "rows of 33, expected multiples of Q4_1"),
     (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2**60, 0, 0), "truncated: tensor 't'")],
)  # fmt: skip
def test_malformed_headers_are_an_error(file, content, message):
    file.write_bytes(content)
    for reader in ALL_READERS:
        with pytest.raises(ModelError, match=message):
            reader(file)


def test_a_missing_file_and_a_folder_are_not_found(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_config(path)


def test_big_endian_is_an_error(file):
    with pytest.raises(ModelError, match="big-endian"):
        read_config(write(file, tensors={}, endianess=gguf.GGUFEndian.BIG))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"arch": "falcon"}, "architecture 'falcon' is not one of llama, qwen2, qwen3, gemma2, gemma3"),
     ({"drop": ["embedding_length"]}, "no llama.embedding_length in the metadata"),
     ({"drop": ["attention.layer_norm_rms_epsilon"]}, "no llama.attention.layer_norm_rms_epsilon in the metadata"),
     ({"fields": {"block_count": "two"}}, "llama.block_count is 'two', expected an integer"),
     ({"fields": {"block_count": 2**30}}, "block_count is 1,073,741,824, but there are"),
     ({"fields": {"attention.head_count_kv": [1, 2]}}, r"head_count_kv is '\[1, 2\]', expected an integer"),
     ({"fields": {"expert_count": 8}}, "llama.expert_count is 8, only 0 is supported"),
     ({"fields": {"rope.dimension_count": 4, "attention.key_length": 8}}, "dimension_count is 4, only 8 is supported"),
     ({"fields": {"attention.value_length": 4}}, "value_length is 4, only 8 is supported"),
     ({"keys": {"split.count": 3}}, "one of 3 parts; join them"),
     ({"keys": {"tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.tokens": ["a", "b"]}}, "eos_token_id is 9, but"),
     ({"tensors": {}}, "no tensor token_embd.weight")],
)  # fmt: skip
def test_unsupported_metadata_is_an_error(file, change, message):
    with pytest.raises(ModelError, match=message):
        read_config(write(file, **change))


def test_unsupported_tensors_are_an_error(file):
    kind = next(k for k in gguf.GGMLQuantizationType if k.name == "Q8_K")
    block, size = gguf.GGML_QUANT_SIZES[kind]
    unknown = {"blk.0.attn_v.weight": (np.zeros((4, size), np.uint8), kind)}
    with open_tensors(write(file, tensors=tensors_of("llama") | unknown)) as tensors:
        tensor = tensors["model.layers.0.self_attn.v_proj.weight"]
        assert tensor.shape == (4, block)
        with pytest.raises(ModelError, match=r"blk\.0\.attn_v\.weight is of type Q8_K, which gguf does not dequantize"):
            tensor.read()
    odd = tensors_of("llama") | {"blk.1.attn_k.weight": np.zeros((6, HIDDEN), np.float32)}
    with (
        pytest.raises(ModelError, match=r"blk\.1\.attn_k\.weight has 6 rows, which do not divide into 2 heads"),
        open_tensors(write(file, tensors=odd)),
    ):
        pass


@pytest.mark.parametrize(
    ("keys", "message"),
    [(gpt2_keys("viking"), "tokenizer.ggml.pre 'viking' is not one of gpt-2"),
     (gpt2_keys(None), "no tokenizer.ggml.pre in the metadata"),
     (gpt2_keys(model="t5"), "tokenizer.ggml.model 't5' is not one of gpt2, llama"),
     (gpt2_keys(model=None), "no tokenizer.ggml.model in the metadata"),
     (gpt2_keys(tokens=None), "no tokenizer.ggml.tokens in the metadata"),
     (gpt2_keys(tokens=[1, 2]), "tokenizer.ggml.tokens holds no strings"),
     (gpt2_keys(tokens=["a", "a"], token_type=None, bos_token_id=0, eos_token_id=0), "contains a token twice"),
     (gpt2_keys(merges=None), "no tokenizer.ggml.merges in the metadata"),
     (gpt2_keys(merges=["q qqq"]), "tokenizers rejects the metadata under tokenizer.ggml: .*qqq"),
     (gpt2_keys(token_type=[1]), "tokens, but tokenizer.ggml.token_type has 1 entries"),
     (gpt2_keys(add_bos_token=True, bos_token_id=None), "no tokenizer.ggml.bos_token_id, which add_bos_token needs"),
     (gpt2_keys(add_bos_token=1), "add_bos_token is '1', expected true or false"),
     (spm_keys(scores=None), "no tokenizer.ggml.scores in the metadata"),
     (spm_keys(scores=[0.0]), "tokens, but tokenizer.ggml.scores has 1 entries"),
     (spm_keys(scores=[-1000.0] * len(spm_keys()["tokenizer.ggml.tokens"])), "all tokenizer.ggml.scores are equal")],
)  # fmt: skip
def test_invalid_tokenizer_metadata_is_an_error(file, keys, message):
    with pytest.raises(ModelError, match=message):
        read_tokenizer(vocabulary(file, keys))


def test_more_tokens_than_embeddings_is_an_error(file):
    count = len(gpt2_keys()["tokenizer.ggml.tokens"])
    with pytest.raises(ModelError, match=f"{count} tokens, but token_embd.weight has {ROWS} rows"):
        read_tokenizer(write(file, keys=gpt2_keys()))


def test_the_missing_gguf_package_is_named(file, monkeypatch):
    write(file, keys=gpt2_keys())
    monkeypatch.setitem(sys.modules, "gguf", None)
    for reader in ALL_READERS:
        with pytest.raises(ModuleNotFoundError) as error:
            reader(file)
        assert error.value.name == "gguf"
