"""The tokenizer, special tokens and chat template in the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import ModelError
from jpeft.files import write_json
from jpeft.models.gguf.config import SPECIAL, special_token_id
from jpeft.models.gguf.file import GGUFFile, Source, open_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The pre-tokenization of each `tokenizer.ggml.pre`, as in the models' own tokenizer.json; llama.cpp quotes these where
# its own patterns differ (src/llama-vocab.cpp). `_GPT2`: ByteLevel's own pattern; `_DIGITS`: single digits, then that.
_GPT2, _DIGITS = "gpt2", "digits"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "default": _GPT2,  # a converter that did not recognize the tokenizer; transformers uses GPT-2's too
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")  # a word of the vocabulary is never split
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # `tokenizer.ggml.token_type`
# Chat models end a turn with these. Converters often write the id of eos only, so llama.cpp looks for them too.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")


def read_tokenizer(path: Source) -> Tokenizer:
    """The tokenizer in the file's metadata: byte-level BPE (`gpt2`), or SentencePiece's BPE (`llama`).

    Control tokens become special tokens and user-defined ones added tokens. bos and eos are added to an encoded text
    as the file specifies.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: there is no tokenizer, its model or pre-tokenizer is not supported, or it has more tokens than
            there are embeddings.

    >>> read_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf").encode("Hello world").ids  # doctest: +SKIP
    [19556, 905]
    """
    file = open_file(path)
    kind, tokens, types = file.get("tokenizer.ggml.model", str), _tokens(file), _token_types(file)
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: tokenizer.ggml.model {kind!r} is not one of gpt2, llama")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens contains a token twice")
    if "token_embd.weight" in file.tensors and (rows := file.tensors["token_embd.weight"].shape[0]) < len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens, but token_embd.weight has {rows} rows")
    from tokenizers import AddedToken

    try:
        tokenizer = _byte_level_bpe(file, tokens) if kind == "gpt2" else _sentencepiece_bpe(file, tokens, types)
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
            ]
        )
        _add_post_processor(file, tokenizer, tokens)
    except ModelError:
        raise
    except Exception as error:  # tokenizers has no exception class of its own
        message = " ".join(str(error).split())
        raise ModelError(f"{file.path}: tokenizers rejects the metadata under tokenizer.ggml: {message}") from None
    return tokenizer


def read_special_tokens(path: Source) -> dict[str, str]:
    """The defined ones of `bos_token`, `eos_token`, `unk_token` and `pad_token`, as chat templates name them.

    >>> read_special_tokens("SmolLM2-135M-Instruct.Q4_1.gguf")["eos_token"]  # doctest: +SKIP
    '<|im_end|>'
    """
    file = open_file(path)
    tokens, ids = _tokens(file), {name: special_token_id(file, name) for name in SPECIAL}
    return {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}


def read_chat_template(path: Source) -> str | None:
    """The file's Jinja chat template, or None.

    >>> read_chat_template("SmolLM2-135M-Instruct.Q4_1.gguf")[:26]  # doctest: +SKIP
    '{% for message in messages'
    """
    return open_file(path).get("tokenizer.chat_template", str, None)


def stop_ids(path: Source) -> tuple[int, ...]:
    """The ids of the tokens that end a text or a turn, eos first.

    >>> stop_ids("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    (2,)
    """
    file = open_file(path)
    tokens, types = _tokens(file), _token_types(file)
    ids = [special_token_id(file, name) for name in ("eos", "eot", "eom")]
    ids += [i for i, token in enumerate(tokens) if token in _END_OF_TURN and types[i] in (_CONTROL, _USER_DEFINED)]
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def write_tokenizer(path: Source, folder: Path) -> None:
    """Writes the tokenizer, special tokens, chat template and stop ids as the files of a HuggingFace folder.

    >>> write_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf", Path("smollm2"))  # doctest: +SKIP
    """
    file = open_file(path)
    read_tokenizer(file).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **read_special_tokens(file)}
    if (template := read_chat_template(file)) is not None:
        config["chat_template"] = template
    generation_config = {"eos_token_id": list(stop_ids(file))}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", generation_config)


# --- byte-level BPE ---


def _byte_level_bpe(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre", str)
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(f"{file.path}: tokenizer.ggml.pre {pre!r} is not one of {', '.join(_PRE_TOKENIZERS)}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=pre in _WHOLE_WORDS))
    split = _PRE_TOKENIZERS[pre]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (_GPT2, _DIGITS))]
    if split == _DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split != _GPT2:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as in Qwen's tokenizer.json, unlike llama.cpp
    return tokenizer


def _merges(file: GGUFFile) -> list[tuple[str, ...]]:
    return [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list)]


# --- SentencePiece's BPE ---


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str], types: Sequence[int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    has_merges = "tokenizer.ggml.merges" in file.metadata
    merges: Any = _merges(file) if has_merges else _merges_by_score(file, tokens, types)
    unknown = special_token_id(file, "unk")
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalize: list[Any] = [normalizers.Replace(" ", "▁")]
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges_by_score(file: GGUFFile, tokens: list[str], types: Sequence[int]) -> list[tuple[str, str]]:
    """BPE merges, best first: every split of a piece in two, because SentencePiece joins the best-scored neighbors."""
    scores = _check_one_per_token(file, "tokenizer.ggml.scores", file.get("tokenizer.ggml.scores", list))
    pieces = {t: score for t, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    if len(pieces) > 1 and len(set(pieces.values())) == 1:  # placeholders of some converters
        raise ModelError(f"{file.path}: all tokenizer.ggml.scores are equal, and there are no tokenizer.ggml.merges")
    splits = [
        (score, piece[:at], piece[at:])
        for piece, score in pieces.items()
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    splits.sort(
        key=lambda split: (split[0], len(split[1])), reverse=True
    )  # ties in the order of transformers' converter
    return [(left, right) for _, left, right in splits]


# --- both ---


def _add_post_processor(file: GGUFFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Makes the tokenizer add bos and eos as the file specifies."""
    from tokenizers import processors

    # llama.cpp's defaults: a bos with the vocabularies of SentencePiece, Llama 3 and Mistral, never an eos.
    bos = file.metadata["tokenizer.ggml.model"] == "llama" or file.metadata["tokenizer.ggml.pre"] in _WHOLE_WORDS
    ids: dict[str, int] = {}
    for name, default in (("bos", bos), ("eos", False)):
        if file.get(f"tokenizer.ggml.add_{name}_token", bool, default):
            if (index := special_token_id(file, name)) is None:
                raise ModelError(f"{file.path}: no tokenizer.ggml.{name}_token_id, which add_{name}_token needs")
            ids[name] = index
    if ids:
        first, last = ([tokens[ids[name]]] if name in ids else [] for name in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
            special_tokens=[(tokens[index], index) for index in set(ids.values())],
        )


def _tokens(file: GGUFFile) -> list[str]:
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens or type(tokens[0]) is not str:
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens holds no strings")
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as in llama.cpp


def _token_types(file: GGUFFile) -> list[int]:
    types = file.get("tokenizer.ggml.token_type", list, None)
    if types is None:
        special = {special_token_id(file, name) for name in SPECIAL}
        return [_CONTROL if index in special else _NORMAL for index in range(len(_tokens(file)))]
    return _check_one_per_token(file, "tokenizer.ggml.token_type", types)


def _check_one_per_token(file: GGUFFile, key: str, values: list[Any]) -> list[Any]:
    if len(values) != (count := len(file.get("tokenizer.ggml.tokens", list))):
        raise ModelError(f"{file.path}: {count} tokens, but {key} has {len(values)} entries")
    return values
