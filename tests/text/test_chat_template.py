"""Prompts, chat templates, answers' spans, and ids to text one by one."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jpeft.errors import UserError
from jpeft.text import chat_template
from jpeft.text import chat_template as chat
from jpeft.text.chat_template import ChatError, ChatTokenizer, Stream

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
    """As SmolLM2's, Llama-3's and Qwen's: bytes below, `<|im_start|>` special, `<think>` not."""
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
    """As Llama-2's, Gemma's and Mistral's: `▁` for a blank, `<0x00>` to `<0xFF>` for what has no token."""
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


def codec_of(name, template=CHATML, special=None, stop_ids=()):
    return ChatTokenizer(TOKENIZERS[name], template, special or {}, stop_ids, "./tiny")


@pytest.fixture
def codec():
    return codec_of("byte-level", stop_ids=(2,))


@pytest.fixture
def folder(tmp_path):
    """A model's folder: a tokenizer that cuts and pads and begins with a BOS, configs, a template."""
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<|im_start|>", "chat_template": CHATML})
    write(tmp_path, "config.json", {"eos_token_id": 0})
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- text


def test_encode_and_decode(codec):
    text = CORPUS[0]
    ids = codec.encode(text)
    assert codec.decode(ids) == text == codec.decode([1, *ids, 2])
    assert codec.size == 321 and codec.tokenizer.id_to_token(320) == "<think>"
    assert codec.decode([*ids, 320]) == text + "<think>"


def test_encode_chat_gives_the_special_tokens_once(folder):
    codec = chat_template.read(folder)
    ids = codec.encode_chat(ASK)
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) == codec.render(ASK)
    assert ids[0] == 1 and ids[1] != 1 and ids.count(1) == 3
    assert codec.encode("Tea?")[0] == 1 and len(codec.encode("Tea? " * 9)) > 9


def test_a_prompt_without_text_is_an_error(codec):
    with pytest.raises(ChatError, match="the prompt '' is empty"):
        codec.encode("")
    with pytest.raises(ChatError, match="half a surrogate pair at character 4"):
        codec.encode("tea \udcff")
    with pytest.raises(ChatError, match="surrogate"):
        codec.encode_chat([{"role": "user", "content": "\ud83e"}])
    stripped = word_piece(None)
    stripped.normalizer = normalizers.Strip()
    with pytest.raises(ChatError, match="the prompt '  ' is empty, or nothing to the tokenizer"):
        ChatTokenizer(stripped, None, {}, (), "./tiny").encode("  ")


@pytest.mark.parametrize("id", [-1, 321, 1 << 40])
def test_an_id_that_the_tokenizer_does_not_have_is_an_error(codec, id):
    with pytest.raises(ChatError, match=rf"\./tiny: the tokenizer has no id {id}; its ids are 0 to 320"):
        codec.decode([5, id])
    with pytest.raises(ChatError, match=f"no id {id}"):
        Stream(codec).push(id)


def test_an_id_in_a_gap_is_an_error():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    codec = ChatTokenizer(tokenizer, None, {}, (), "./tiny")
    assert codec.size == 8 and codec.decode([7]) == "b"
    with pytest.raises(ChatError, match="no id 5"):
        codec.decode([5])


def test_check_vocabulary(codec):
    chat_template.check_vocabulary(codec, 321)
    with pytest.raises(ChatError, match="gives '<think>' the id 320, but the embedding has 320 rows"):
        chat_template.check_vocabulary(codec, 320)


# -------------------------------------------------------------------------------------------------------- templates


def test_render(codec):
    head = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert codec.render(ASK) == head + "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    assert codec.render(tuple(ASK), add_generation_prompt=False) == head + "<|im_start|>user\nTea?<|im_end|>\n"
    assert codec.render(TALK).count("<|im_start|>system") == 1


def test_what_a_template_sees():
    template = "{{ bos_token }}|{{ pad_token }}|{{ tools is none }}|{{ documents is none }}|{{ thinking }}"
    codec = codec_of("byte-level", template, {"bos_token": "<s>"})
    assert codec.render(ASK) == "<s>||True|True|"
    assert codec.render(ASK, thinking=False, tools=[1], bos_token="B") == "B||False|True|False"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n  {% if m.role == 'user' %}\nU\n  {% endif %}\n{% endfor %}\n", "U\n"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1, separators=(',', ':')) }}", '{\n "a":2,\n "b":1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}{{ messages[0].content | e }}", '"\\u00e9"Tea?'),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{% set n = namespace(v=1) %}{% set n.v = 2 %}{{ f(n.v) }}", "<2>"),
    ],
)  # fmt: skip
def test_the_environment(template, text):
    assert codec_of("byte-level", template).render(ASK) == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "template refuses the messages: roles must alternate$"),
        ("{% for m in messages %}", "template is not Jinja, line 1: Unexpected end of template"),
        ("{% generation %}x", "template is not Jinja, line 1"),
        ("{{ 'x' | no_such_filter }}", "template is not Jinja, line 1: No filter named"),
        ("{{ date.today() }}", "template failed \\(UndefinedError: 'date' is undefined"),
        ("{{ messages[0].content + 1 }}", "template failed \\(TypeError: can only concatenate str"),
        ("{{ messages.append(1) }}", "template failed \\(SecurityError: "),
        ("{{ ''.__class__.__mro__ }}", "template failed \\(SecurityError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template failed \\(RecursionError: "),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "template failed \\(OverflowError: Range too big"),
        ("{% include 'x' %}", "template failed \\(TypeError: no loader"),
        ("{{ 1 / 0 }}", "template failed \\(ZeroDivisionError: "),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(template, error):
    with pytest.raises(ChatError, match=error) as raised:
        codec_of("byte-level", template).render(ASK)
    assert str(raised.value).startswith("./tiny: the chat template ") and "\n" not in str(raised.value)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "_MAX_CHARACTERS", 1000)
    endless = "{% for i in range(100000) %}{% for i in range(100000) %}x{% endfor %}{% endfor %}"
    with pytest.raises(ChatError, match="the chat template wrote more than 1000 characters"):
        codec_of("byte-level", endless).render(ASK)


@pytest.mark.parametrize("template", [None, ""])
def test_without_a_template(template):
    with pytest.raises(ChatError, match=r"\./tiny: no chat template.*give a plain prompt instead"):
        codec_of("byte-level", template).encode_chat(ASK)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages; expected a list"),
        ("Tea?", "no messages; expected a list"),
        ({"role": "user", "content": "Tea?"}, "no messages; expected a list"),
        ([*ASK, "Tea?"], "message 1: expected an object with 'role' and 'content', found 'Tea\\?'"),
        ([{"role": "user"}], "message 0: expected an object with 'role' and 'content', found {'role': 'user'}"),
        ([{"role": "usr", "content": ""}], "message 0: the role 'usr' is none of system, user, assistant, tool$"),
        ([{"role": ["user"], "content": ""}], "message 0: the role \\['user'\\] is none of"),
        ([*ASK, {"role": "user", "content": None}], "message 1: 'content' should be a text, found None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: 'content' should be a text, found \\[{"),
    ],
)
def test_malformed_messages(codec, messages, error):
    with pytest.raises(ChatError, match=error):
        codec.render(messages)


def test_a_role_that_the_template_asks_about_may_be_used():
    template = """{% if messages[0]["role"] == "developer" or messages[0].role == 'ipython' %}D{% endif %}"""
    for role in ("developer", "ipython"):
        assert codec_of("byte-level", template).render([{"role": role, "content": ""}]) == "D"
    with pytest.raises(ChatError, match="'dev' is none of system, user, assistant, tool, developer, ipython"):
        codec_of("byte-level", template).render([{"role": "dev", "content": ""}])


def test_other_keys_reach_the_template():
    template = "{{ messages[0].tool_calls[0].name }}"
    assert codec_of("byte-level", template).render([{**ASK[0], "tool_calls": [{"name": "boil"}]}]) == "boil"


# ------------------------------------------------------------------------------------------------------------ spans


def marked(codec, messages, **variables):
    text, spans = codec.render_with_spans(messages, **variables)
    assert text == codec.render(messages, add_generation_prompt=False, **variables)
    return [text[start:end] for start, end in spans]


def test_spans_by_prefixes(codec):
    assert marked(codec, TALK) == ["Yes.<|im_end|>", "Yes, hot.<|im_end|>"]
    assert marked(codec_of("byte-level"), TALK) == ["Yes.<|im_end|>\n", "Yes, hot.<|im_end|>\n"]  # nothing stops
    assert marked(codec, ASK) == []
    assert marked(codec, [*ASK, {"role": "assistant", "content": "<|im_end|> ends it"}]) == [
        "<|im_end|> ends it<|im_end|>"
    ]
    assert marked(codec_of("byte-level", stop_ids=(0, 2, 1 << 40)), TALK)[0] == "Yes.<|im_end|>"


def test_spans_by_generation_blocks():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    codec = codec_of("byte-level", template)
    assert marked(codec, TALK) == ["Yes.</s>", "Yes, hot.</s>"]
    assert marked(codec, TALK[2:3]) == ["Yes.</s>"]  # transformers 4.57 misses one that the text begins with
    assert codec.render(TALK[:3]) == "[Be brief.][Tea?]Yes.</s>"


def test_a_generation_block_whose_place_is_unknown_is_an_error():
    template = "a{% macro f() %}b{% generation %}c{% endgeneration %}{% endmacro %}{{ f() }}"
    with pytest.raises(ChatError, match=r"\{% generation %\} stands in a macro"):
        codec_of("byte-level", template).render_with_spans(ASK)


def test_answers_that_the_template_changes_later_have_no_span():
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    codec = codec_of("byte-level", template)
    assert marked(codec, TALK[:3]) == ["<think></think>Yes."]
    with pytest.raises(ChatError, match=r"message 2: .* otherwise once more messages follow; end the conversation"):
        codec.render_with_spans(TALK)
    codec = codec_of("byte-level", template + "{% if add_generation_prompt %}<think>\n{% endif %}")
    with pytest.raises(ChatError, match="message 2: the chat template asks for an answer otherwise than it renders"):
        codec.render_with_spans(TALK)


# ----------------------------------------------------------------------------------------------------------- stream


def streamed(codec, ids):
    """The pieces, after checking that at every moment their sum begins the final text."""
    stream = Stream(codec)
    pieces = [stream.push(id) for id in ids]
    whole = codec.decode(ids)
    assert "".join(pieces) == whole[: len("".join(pieces))]
    assert "".join(pieces) + stream.finish() == whole
    assert stream.finish() == ""
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_a_stream_is_the_whole_text(name, draw):
    codec = codec_of(name)
    last = codec.size - 1
    few = st.integers(0, last) | st.integers(max(0, last - 14), last) | st.integers(0, 2)
    streamed(codec, draw.draw(st.lists(few, max_size=40)))


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_a_stream_of_text_is_the_text(text):
    for name in ("byte-level", "gemma"):
        codec = codec_of(name)
        assert codec.decode(codec.encode(text)) == (text.replace("▁", " ") if name == "gemma" else text)
        streamed(codec, codec.encode(text))


def test_a_stream_never_gives_half_a_character(codec):
    pieces = streamed(codec, codec.encode("🫖 tea"))
    assert "".join(pieces) == "🫖 tea" and not any("\ufffd" in piece for piece in pieces)
    half = Stream(codec)
    assert half.push(codec.encode("🦊")[0]) == "" and half.finish() == "\ufffd"


def test_a_stream_gives_text_at_once(codec):
    assert all(streamed(codec, codec.encode("the tea is hot")))
    llama = codec_of("llama-2")
    ids = [llama.tokenizer.token_to_id(token) for token in ["▁tea", "</s>", "▁hot", "<0xC3>", "<0xA9>", "tea"]]
    assert streamed(llama, ids) == ["tea", "", " hot", "", "", "étea"]
    ids = [llama.tokenizer.token_to_id(token) for token in ["▁tea", "", "▁hot", "▁", "", "▁hot"]]
    assert streamed(llama, ids) == ["tea", "", " hot", " ", "", " hot"]  # only a text's first blank is dropped


def test_a_stream_begins_anew_after_finish():
    llama = codec_of("llama-2")
    stream, tea = Stream(llama), llama.tokenizer.token_to_id("▁tea")
    assert [stream.push(tea), stream.push(tea), stream.finish(), stream.push(tea)] == ["tea", " tea", "", "tea"]


def test_a_long_stream_decodes_few_ids_each_time(codec, monkeypatch):
    lengths = []
    decode = ChatTokenizer.decode
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    stream = Stream(codec)
    for id in codec.encode("the tea is hot " * 50):
        stream.push(id)
    assert max(lengths) == 2


# ---------------------------------------------------------------------------------------------------------- reading


def test_read_a_folder(folder):
    codec = chat_template.read(str(folder))
    assert (codec.template, codec.special, codec.stop_ids, codec.where) == (
        CHATML,
        {"bos_token": "<|im_start|>"},
        (0,),
        str(folder),
    )
    assert codec.tokenizer.truncation is None and codec.tokenizer.padding is None


@pytest.mark.parametrize(
    ("generation", "config", "eos", "stop_ids"),
    [
        ({}, {}, None, ()),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 0}, None, (2, 0)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [1, 5]}}, None, (1, 5)),
        ({}, {"eos_token_id": -1, "text_config": None}, "<|im_end|>", (2,)),
        ({"eos_token_id": 7}, {}, {"content": "<|im_end|>", "lstrip": False}, (7, 2)),
        ({"eos_token_id": 7}, {}, "<no such token>", (7,)),
    ],
)
def test_stop_ids(folder, generation, config, eos, stop_ids):
    write(folder, "generation_config.json", generation)
    write(folder, "config.json", config)
    write(folder, "tokenizer_config.json", {"eos_token": eos})
    assert chat_template.read(folder).stop_ids == stop_ids


def test_special_tokens(folder):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "pad_token": None, "add_bos_token": True}
    write(folder, "tokenizer_config.json", tokens)
    assert chat_template.read(folder).special == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    write(folder, "special_tokens_map.json", {"bos_token": {"content": "<S>"}, "additional_special_tokens": ["<a>"]})
    assert chat_template.read(folder).special == {"bos_token": "<S>", "eos_token": "<|im_end|>"}
    write(folder, "tokenizer_config.json", tokens | {"added_tokens_decoder": {}})
    assert chat_template.read(folder).special["bos_token"] == "<s>"


def test_a_token_that_is_special_only_by_the_config_is_one_token(folder):
    write(folder, "tokenizer_config.json", {"eos_token": "<think>", "unk_token": "the", "pad_token": "<new>"})
    codec = chat_template.read(folder)
    the = codec.tokenizer.token_to_id("the")
    assert the is not None and codec.size == 321
    assert codec.decode([320, the, codec.encode("a")[1]]) == "a" and codec.stop_ids == (0, 320)


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config.json": {}}, None),
        ({"chat_template.jinja": "J", "chat_template.json": {"chat_template": "P"}}, "J"),
        ({"chat_template.json": {"chat_template": "P"}}, CHATML),
        ({"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "P"}}, "P"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"},
                                                      {"name": "default", "template": "D"}]}}, "D"),
    ],
)  # fmt: skip
def test_where_a_template_is_found(folder, files, template):
    for name, content in files.items():
        write(folder, name, content)
    assert chat_template.read(folder).template == template


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer: "),
        ("tokenizer.json", {}, r"tokenizer\.json: not a tokenizer: "),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON: "),
        ("config.json", "[]", r"config\.json: expected a JSON object, got list"),
        ("config.json", {"eos_token_id": "</s>"}, r"config\.json: eos_token_id should be an id .* found '</s>'"),
        ("generation_config.json", {"eos_token_id": [True]}, r"generation_config\.json: eos_token_id should be"),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "R"}]}, "the chat templates are rag"),
        ("tokenizer_config.json", {"chat_template": []}, "the chat templates are none; expected one named default"),
        ("tokenizer_config.json", {"chat_template": 1}, r"tokenizer_config\.json: chat_template should be a text"),
        ("chat_template.jinja", None, r"chat_template\.jinja: not UTF-8 \(byte offset 0\)"),
    ],
)
def test_files_that_cannot_be_understood(folder, name, content, error):
    if content is None:
        (folder / name).write_bytes(b"\xff")
    else:
        write(folder, name, content)
    with pytest.raises(UserError, match=error) as raised:
        chat_template.read(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        chat_template.read(tmp_path)
    with pytest.raises(ChatError, match=r"x: no such path; expected a HuggingFace folder or a \.gguf file"):
        chat_template.read(tmp_path / "x")
    with pytest.raises(ChatError, match=r"x\.gguf: no such path"):
        chat_template.read(tmp_path / "x.gguf")
    write(tmp_path, "x.bin", "")
    with pytest.raises(ChatError, match=r"x\.bin: is another file"):
        chat_template.read(tmp_path / "x.bin")


def test_a_missing_package_is_named(codec, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        codec.render(ASK)
    assert raised.value.name == "jinja2"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        chat_template.read(folder)
    assert raised.value.name == "tokenizers"
