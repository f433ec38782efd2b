"""jpeft.models.gguf against transformers: SmolLM2's file, and tiny models of each architecture written in the form of
llama.cpp's converter, which round-trip."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

from jpeft.models.gguf import open_tensors, read_chat_template, read_config, read_special_tokens, read_tokenizer

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256,
         "initializer_range": 0.3, "head_dim": 8}  # fmt: skip
GEMMA = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0}
# Heads of 32: Llama 3's scaling needs slow frequencies.
TINY = {
    "llama": transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_scaling=LINEAR),
    "llama-3.1": transformers.LlamaConfig(
        **SIZES | {"head_dim": 32, "hidden_size": 64}, rope_theta=5e5, rope_scaling=LLAMA3
    ),
    "llama-bias": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SIZES, rope_theta=1e6, rope_scaling=YARN),
    "qwen3": transformers.Qwen3Config(**SIZES | {"head_dim": 16}, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA, rope_scaling=LINEAR),
}


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world", "The quick brown fox, it's 3.14159 metres -- isn't it?", "naïve café — 東京 🙂🚀 e\u0301 ½ Ⅷ ١٢٣",
    "def f(x):\n    return x ** 2  # square\n\n\tif  x:\n", "123 4567 89,000.01 1e-10 0xFF", "   5 apples  and   12",
    "tab\tnew\n\n\nline \r\n   ", "", " ", "\n", "        ", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\n\n<repo_name>a/b<file_sep><|endoftext|>x", "<|im_start", "a<|im_end|><|im_end|> b",
]  # fmt: skip


def random_texts(count=500):
    rng, parts = (
        random.Random(0),
        ["the ", "in", " 12", "7", "  ", "\n", "\t", "é", "🙂", "東", "'ll", "<|im_end|>", "_x(", "."],
    )
    return ["".join(rng.choices(parts, k=rng.randint(1, 30))) for _ in range(count)]


def source_texts():
    return [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))]


@pytest.mark.filterwarnings("ignore")
def test_tokens_of_smollm2_equal_those_of_transformers(smollm2_file):
    """transformers ignores `tokenizer.ggml.pre` and uses GPT-2's, which splits spaces before digits differently, so the
    pre-tokenizer of SmolLM2's tokenizer.json replaces it. It also adds a bos whatever `add_bos_token` is."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = read_tokenizer(smollm2_file)
    for text in [*TEXTS, *random_texts(), *source_texts()]:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    special = read_special_tokens(smollm2_file)
    assert special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
                       "pad_token": "<|im_end|>"}  # fmt: skip
    assert read_chat_template(smollm2_file) == theirs.chat_template


# --- tiny models ------------------------------------------------------------------------------------------------------


def permuted(weight, heads):
    """`LlamaModel.permute` of llama.cpp's converter."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(config):
    """`rope_freqs.weight`: the divisors of transformers' frequencies."""
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    return (plain / scaled).numpy()


def write(path, model, kind=gguf.GGMLQuantizationType.F32):
    """Writes a file as llama.cpp's convert_hf_to_gguf.py does; the names are from `gguf`'s own map."""
    config, family = model.config, model.config.model_type
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(family, family)
    writer, scaling = gguf.GGUFWriter(path, arch), getattr(config, "rope_scaling", None)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)  # transformers needs it if there is no tokenizer
    if family != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch != "gemma2":
        writer.add_rope_freq_base(config.rope_theta)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family in ("mistral", "gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if scaling and scaling["rope_type"] != "llama3":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling and scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if scaling and scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 99)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = permuted(value, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        as_it_is = value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32
        packed, packed_kind = (value, None) if as_it_is else (gguf.quantize(value, kind), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), packed, raw_dtype=packed_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(TINY[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial norms of 1 and biases of 0 would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_round_trips(name, tmp_path):
    model = tiny(name)
    path = write(tmp_path / "model.gguf", model)
    fields = read_config(path)
    theirs = model.config.to_dict()
    for key, value in fields.items():
        if key == "rms_norm_eps":
            assert np.float32(value) == np.float32(theirs[key])
        elif not key.endswith("_token_id") and key in theirs:  # no tokenizer in the file
            assert value == theirs[key], key
    rounding = 3e-7 if name.startswith("gemma") else 0  # of 1 + x - 1
    with open_tensors(path) as tensors:
        state = {key: torch.from_numpy(tensor.read()) for key, tensor in tensors.items()}
    for key, value in state.items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=rounding)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "eager"
    again = transformers.AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    ids = torch.arange(40)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids).logits, model(ids).logits, rtol=1e-4 if rounding else 0, atol=1e-3 if rounding else 0
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_a_quantized_tiny_model_has_the_tensors_of_transformers(name, kind, tmp_path):
    path = write(tmp_path / "model.gguf", tiny(name), gguf.GGMLQuantizationType[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    with open_tensors(path) as tensors:
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(tensor.read().astype(np.float32), theirs[key].numpy())


# --- tokenizers -------------------------------------------------------------------------------------------------------


def trained(folder, texts):
    """Trains a byte-level BPE and writes `vocab.json` and `merges.txt`, as GPT-2 and Qwen publish."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False,
                                             special_tokens=["<|endoftext|>"])  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(folder))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def write_tokenizer(path, model, pre, tokens, types, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("pre", "theirs"), [("gpt-2", transformers.GPT2TokenizerFast), ("qwen2", transformers.Qwen2TokenizerFast)]
)
def test_byte_level_tokens_equal_those_of_transformers(pre, theirs, tmp_path):
    texts = [*TEXTS, *source_texts()]
    tokens, merges = trained(tmp_path, texts)
    types = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    path = write_tokenizer(tmp_path / "t.gguf", "gpt2", pre, tokens, types, token_merges=merges)
    ours, theirs = read_tokenizer(path), theirs(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in [*texts, *random_texts()]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_pattern_of_llama3_equals_that_of_transformers():
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from jpeft.models.gguf.tokenizer import _PRE_TOKENIZERS

    assert _PRE_TOKENIZERS["llama-bpe"] == TikTokenConverter(vocab_file="").pattern


@pytest.mark.filterwarnings("ignore")
def test_sentencepiece_tokens_equal_those_of_transformers(tmp_path):
    rng = random.Random(0)
    letters = ["▁", *"etainhrsoldu.,\n"]
    words = ["".join(rng.choices(letters[:10], k=rng.randint(2, 6))) for _ in range(300)]
    pieces = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *letters]
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    types += [kinds.NORMAL] * (len(tokens) - len(types))
    scores = [0.0] * 259 + [float(-i) for i in range(len(tokens) - 259)]
    path = tmp_path / "t.gguf"
    write_tokenizer(path, "llama", "default", tokens, types, token_scores=scores, bos_token_id=1, eos_token_id=2,
                    unk_token_id=0, add_bos_token=True)  # fmt: skip
    ours = read_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    texts = ["".join(rng.choices("etainhrs   .é🙂\nx", k=rng.randint(1, 60))) for _ in range(500)]
    for text in [*texts, "the</s>an", "", " "]:
        ids = ours.encode(text).ids
        assert ids[0] == 1 and ids[1:] == theirs(text, add_special_tokens=False)["input_ids"], text
