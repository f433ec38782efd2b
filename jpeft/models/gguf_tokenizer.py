"""The tokenizer in a GGUF file's metadata, for `jpeft.models.gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jpeft.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jpeft.models.gguf_file import File

# The split of each `tokenizer.ggml.pre`, as the models' own tokenizer.json has it; llama.cpp quotes them where its own
# differ (src/llama-vocab.cpp).
_GPT2, _DIGITS = "ByteLevel's own", "each digit alone, then ByteLevel's own"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": _GPT2,
    "default": _GPT2,  # of a converter that did not recognize the tokenizer; transformers goes by GPT-2's as well
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")  # these never split a word that the vocabulary has
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # `tokenizer.ggml.token_type`
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' word: GGUF's
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # llama.cpp's, where a file does not say
# Chat models end a turn with these, and converters often write the id of eos alone: llama.cpp looks for them, too.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")


def build(file: File) -> Tokenizer:
    """See `gguf.read_tokenizer`."""
    kind, tokens, types = file.get("tokenizer.ggml.model", str), _tokens(file), _token_types(file)
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: tokenizer.ggml.model {kind!r} is not one of gpt2, llama")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    if "token_embd.weight" in file.tensors and (rows := file.tensors["token_embd.weight"].shape[0]) < len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens, but token_embd.weight has {rows} rows")
    from tokenizers import AddedToken

    try:
        tokenizer = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, types)
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
            ]
        )
        _add_bos_and_eos(file, tokenizer, tokens)
    except ModelError:
        raise
    except Exception as error:  # tokenizers has no class of its own
        said = " ".join(str(error).split())
        raise ModelError(f"{file.path}: tokenizers rejects what tokenizer.ggml says: {said}") from None
    return tokenizer


def special_tokens(file: File) -> dict[str, str]:
    """See `gguf.read_special`."""
    tokens, ids = _tokens(file), {name: special_id(file, name) for name in _SPECIAL}
    return {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}


def stop_ids(file: File) -> tuple[int, ...]:
    """See `gguf.stop_ids`."""
    tokens, types = _tokens(file), _token_types(file)
    ids = [special_id(file, name) for name in ("eos", "eot", "eom")]
    ids += [i for i, token in enumerate(tokens) if token in _END_OF_TURN and types[i] in (_CONTROL, _USER_DEFINED)]
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def special_id(file: File, name: str) -> int | None:
    """The id of `bos`, `eos`, `unk`, `pad`, `eot` or `eom`."""
    key, tokens = f"tokenizer.ggml.{_SPECIAL.get(name, name)}_token_id", file.get("tokenizer.ggml.tokens", list, None)
    default = _SENTENCEPIECE_IDS.get(name) if file.get("tokenizer.ggml.model", str, None) == "llama" else None
    index = file.get(key, int, default)
    if index is not None and tokens is not None and not 0 <= index < len(tokens):
        raise ModelError(f"{file.path}: {key} is {index}, but there are {len(tokens)} tokens")
    return index


# --- byte-level BPE ---


def _byte_level(file: File, tokens: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre", str)
    if pre not in _SPLITS:
        raise ModelError(f"{file.path}: tokenizer.ggml.pre {pre!r} is not one of {', '.join(_SPLITS)}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=pre in _WHOLE_WORDS))
    split = _SPLITS[pre]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (_GPT2, _DIGITS))]
    if split == _DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split != _GPT2:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as in Qwen's tokenizer.json; llama.cpp goes without
    return tokenizer


def _merges(file: File) -> list[tuple[str, ...]]:
    return [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list)]


# --- SentencePiece's BPE ---


def _sentencepiece(file: File, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    written = "tokenizer.ggml.merges" in file.metadata
    merges: Any = _merges(file) if written else _merges_by_score(file, tokens, types)
    unknown = special_id(file, "unk")
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_blocks: list[Any] = [normalizers.Replace(" ", "▁")]
    to_text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        to_blocks.insert(0, normalizers.Prepend("▁"))
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_blocks)
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _merges_by_score(file: File, tokens: list[str], types: Sequence[int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbors whose union scores highest: every way to split a piece in two, best first."""
    scores = _of_each_token(file, "tokenizer.ggml.scores", file.get("tokenizer.ggml.scores", list))
    pieces = {t: score for t, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    if len(pieces) > 1 and len(set(pieces.values())) == 1:  # placeholders, which some converters write
        raise ModelError(f"{file.path}: tokenizer.ggml.scores are all alike, and there are no tokenizer.ggml.merges")
    splits = [
        (score, piece[:at], piece[at:])
        for piece, score in pieces.items()
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    splits.sort(key=lambda split: (split[0], len(split[1])), reverse=True)  # ties as transformers' converter has them
    return [(left, right) for _, left, right in splits]


# --- both ---


def _add_bos_and_eos(file: File, tokenizer: Tokenizer, tokens: list[str]) -> None:
    from tokenizers import processors

    # llama.cpp's default: SentencePiece's, Llama 3's and Mistral's vocabularies come with a bos, no text with an eos.
    bos = file.metadata["tokenizer.ggml.model"] == "llama" or file.metadata["tokenizer.ggml.pre"] in _WHOLE_WORDS
    ids: dict[str, int] = {}
    for name, default in (("bos", bos), ("eos", False)):
        if file.get(f"tokenizer.ggml.add_{name}_token", bool, default):
            if (index := special_id(file, name)) is None:
                raise ModelError(f"{file.path}: no tokenizer.ggml.{name}_token_id, which add_{name}_token asks for")
            ids[name] = index
    if ids:
        first, last = ([tokens[ids[name]]] if name in ids else [] for name in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
            special_tokens=[(tokens[index], index) for index in set(ids.values())],
        )


def _tokens(file: File) -> list[str]:
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens or type(tokens[0]) is not str:
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens holds no texts")
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp


def _token_types(file: File) -> list[int]:
    types = file.get("tokenizer.ggml.token_type", list, None)
    if types is None:
        special = {special_id(file, name) for name in _SPECIAL}
        return [_CONTROL if index in special else _NORMAL for index in range(len(_tokens(file)))]
    return _of_each_token(file, "tokenizer.ggml.token_type", types)


def _of_each_token(file: File, key: str, values: list[Any]) -> list[Any]:
    if len(values) != (count := len(file.get("tokenizer.ggml.tokens", list))):
        raise ModelError(f"{file.path}: {count} tokens, but {key} has {len(values)} entries")
    return values
