"""Tiny tokenizers of every kind, and conversations, for the tests of text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jpeft.text.chat_template import ChatTokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Why is the sky blue? Grüße, 你好, 🫖🍵!",
    "the tea is hot, the tea is cold\n\n  indented",
    "ñandú — “quoted”",
]
ASK = [{"role": "user", "content": "Tea?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tea?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Hot?"},
    {"role": "assistant", "content": "Yes, hot."},
]


def byte_level():
    """Byte-level BPE, as in SmolLM2, Llama 3 and Qwen: `<|im_start|>` is a special token, `<think>` is not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece(decoder):
    """SentencePiece, as in Llama 2, Gemma and Mistral: `▁` for a blank, and byte tokens `<0x00>` to `<0xFF>`."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁tea", "tea", "hot", "▁hot", "a▁b", "é", "▁你", "\ufffd", ".", "▁.", ""]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece(decoder):
    pieces = ["[UNK]", "[SEP]", "tea", "##s", "hot", "##</w>", "hot</w>", "tea</w>", ".", "don", "'", "##t"]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
TOKENIZERS = {
    "byte-level": byte_level(),
    "llama-2": sentencepiece(LLAMA_2),
    "gemma": sentencepiece(GEMMA),
    "metaspace": sentencepiece(decoders.Metaspace()),
    "metaspace-first": sentencepiece(decoders.Metaspace(prepend_scheme="first")),
    "metaspace-never": sentencepiece(decoders.Metaspace(prepend_scheme="never")),
    "metaspace-bytes": sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "word-piece": word_piece(decoders.WordPiece()),
    "bpe-suffix": word_piece(decoders.BPEDecoder()),
    "no-decoder": word_piece(None),
}


def chat_tokenizer(name, template=CHATML, special=None, stop_ids=()):
    return ChatTokenizer(TOKENIZERS[name], template, special or {}, stop_ids, "./tiny")
