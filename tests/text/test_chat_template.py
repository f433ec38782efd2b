"""Chat tokenizers: prompts, chat templates, and streaming text from ids."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors

from jpeft.errors import UserError
from jpeft.text import chat_template, template
from jpeft.text.chat_template import ChatError, ChatTokenizer, Stream
from tests.text.tiny_tokenizers import ASK, CHATML, CORPUS, TALK, TOKENIZERS, byte_level, chat_tokenizer, word_piece


@pytest.fixture
def chat():
    return chat_tokenizer("byte-level", stop_ids=(2,))


@pytest.fixture
def folder(tmp_path):
    """A model folder: a tokenizer that truncates, pads and adds a BOS token, configs, and a template."""
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


def test_encode_and_decode(chat):
    text = CORPUS[0]
    ids = chat.encode(text)
    assert chat.decode(ids) == text == chat.decode([1, *ids, 2])
    assert chat.size == 321 and chat.tokenizer.id_to_token(320) == "<think>"
    assert chat.decode([*ids, 320]) == text + "<think>"


def test_encode_chat_gives_the_special_tokens_once(folder):
    chat = chat_template.read(folder)
    ids = chat.encode_chat(ASK)
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == chat.render(ASK)
    assert ids[0] == 1 and ids[1] != 1 and ids.count(1) == 3
    assert chat.encode("Tea?")[0] == 1 and len(chat.encode("Tea? " * 9)) > 9


def test_a_prompt_without_tokens_is_an_error(chat):
    with pytest.raises(ChatError, match="the prompt '' has no tokens"):
        chat.encode("")
    with pytest.raises(ChatError, match="half a surrogate pair at character 4"):
        chat.encode("tea \udcff")
    with pytest.raises(ChatError, match="surrogate"):
        chat.encode_chat([{"role": "user", "content": "\ud83e"}])
    stripped = word_piece(None)
    stripped.normalizer = normalizers.Strip()
    with pytest.raises(ChatError, match="the prompt '  ' has no tokens; give some text"):
        ChatTokenizer(stripped, None, {}, (), "./tiny").encode("  ")


@pytest.mark.parametrize("id", [-1, 321, 1 << 40])
def test_an_unknown_id_is_an_error(chat, id):
    with pytest.raises(ChatError, match=rf"\./tiny: the tokenizer has no id {id}; its ids are 0 to 320"):
        chat.decode([5, id])
    with pytest.raises(ChatError, match=f"no id {id}"):
        Stream(chat).push(id)


def test_an_id_in_a_gap_is_an_error():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    chat = ChatTokenizer(tokenizer, None, {}, (), "./tiny")
    assert chat.size == 8 and chat.decode([7]) == "b"
    with pytest.raises(ChatError, match="no id 5"):
        chat.decode([5])


def test_check_vocabulary(chat):
    chat_template.check_vocabulary(chat, 321)
    with pytest.raises(ChatError, match="gives '<think>' the id 320, but the embedding has 320 rows"):
        chat_template.check_vocabulary(chat, 320)


# -------------------------------------------------------------------------------------------------------- templates


def test_render(chat):
    head = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert chat.render(ASK) == head + "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(tuple(ASK), add_generation_prompt=False) == head + "<|im_start|>user\nTea?<|im_end|>\n"
    assert chat.render(TALK).count("<|im_start|>system") == 1


def test_variables_of_a_template():
    template = "{{ bos_token }}|{{ pad_token }}|{{ tools is none }}|{{ documents is none }}|{{ thinking }}"
    chat = chat_tokenizer("byte-level", template, {"bos_token": "<s>"})
    assert chat.render(ASK) == "<s>||True|True|"
    assert chat.render(ASK, thinking=False, tools=[1], bos_token="B") == "B||False|True|False"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n  {% if m.role == 'user' %}\nU\n  {% endif %}\n{% endfor %}\n", "U\n"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "02",
        ),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1, separators=(',', ':')) }}", '{\n "a":2,\n "b":1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}{{ messages[0].content | e }}", '"\\u00e9"Tea?'),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{% set n = namespace(v=1) %}{% set n.v = 2 %}{{ f(n.v) }}", "<2>"),
    ],
)
def test_the_environment(template, text):
    assert chat_tokenizer("byte-level", template).render(ASK) == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "template rejects the messages: roles must alternate$"),
        ("{% for m in messages %}", "template is not valid Jinja, line 1: Unexpected end of template"),
        ("{% generation %}x", "template is not valid Jinja, line 1"),
        ("{{ 'x' | no_such_filter }}", "template is not valid Jinja, line 1: No filter named"),
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
def test_a_failing_template_is_an_error_of_one_line(template, error):
    with pytest.raises(ChatError, match=error) as raised:
        chat_tokenizer("byte-level", template).render(ASK)
    assert str(raised.value).startswith("./tiny: the chat template ") and "\n" not in str(raised.value)


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(template, "_MAX_CHARACTERS", 1000)
    endless = "{% for i in range(100000) %}{% for i in range(100000) %}x{% endfor %}{% endfor %}"
    with pytest.raises(ChatError, match="the chat template wrote more than 1000 characters"):
        chat_tokenizer("byte-level", endless).render(ASK)


@pytest.mark.parametrize("template", [None, ""])
def test_without_a_template(template):
    with pytest.raises(ChatError, match=r"\./tiny: no chat template.*give a plain prompt "):
        chat_tokenizer("byte-level", template).encode_chat(ASK)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages; expected a list"),
        ("Tea?", "no messages; expected a list"),
        ({"role": "user", "content": "Tea?"}, "no messages; expected a list"),
        ([*ASK, "Tea?"], "message 1: expected an object with 'role' and 'content', got 'Tea\\?'"),
        ([{"role": "user"}], "message 0: expected an object with 'role' and 'content', got {'role': 'user'}"),
        ([{"role": "usr", "content": ""}], "message 0: the role is 'usr', expected system, user, assistant, tool$"),
        ([{"role": ["user"], "content": ""}], "message 0: the role is \\['user'\\], expected"),
        ([*ASK, {"role": "user", "content": None}], "message 1: 'content' must be text, got None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: 'content' must be text, got \\[{"),
    ],
)
def test_malformed_messages(chat, messages, error):
    with pytest.raises(ChatError, match=error):
        chat.render(messages)


def test_roles_that_the_template_compares_are_accepted():
    template = """{% if messages[0]["role"] == "developer" or messages[0].role == 'ipython' %}D{% endif %}"""
    for role in ("developer", "ipython"):
        assert chat_tokenizer("byte-level", template).render([{"role": role, "content": ""}]) == "D"
    with pytest.raises(ChatError, match="is 'dev', expected system, user, assistant, tool, developer, ipython"):
        chat_tokenizer("byte-level", template).render([{"role": "dev", "content": ""}])


def test_content_may_be_parts_of_text_or_absent_beside_tool_calls(chat):
    parts = [{"type": "text", "text": "Te"}, {"type": "text", "text": "a?"}]
    assert chat.render([{"role": "user", "content": parts}]) == chat.render(ASK)
    calls = chat_tokenizer(
        "byte-level", "{% for m in messages %}{{ m.content is none }}{{ m.tool_calls[0].name }}{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "boil"}]}
    assert calls.render([{**call, "content": None}]) == "Trueboil" and calls.render([call]) == "Falseboil"
    with pytest.raises(ChatError, match="message 0: 'content' has a part of the type 'image_url'; only parts of"):
        chat.render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


@pytest.mark.parametrize("arguments", [{"cups": 2, "of": "thé"}, '{"cups": 2, "of": "thé"}'])
@pytest.mark.parametrize(
    "written", ["c.arguments | tojson", "c.arguments", "'' + c.arguments + ''", "c.arguments ~ ''", "c | tojson"]
)
def test_arguments_of_tool_calls_are_an_object_or_its_text_as_the_template_takes_them(arguments, written):
    chat = chat_tokenizer("byte-level", "{% set c = messages[0].tool_calls[0].function %}{{ " + written + " }}")
    call = {"type": "function", "function": {"arguments": arguments}}
    text = chat.render([{"role": "assistant", "content": None, "tool_calls": [call]}])
    expected = {"cups": 2, "of": "thé"}
    assert json.loads(text) == ({"arguments": expected} if written == "c | tojson" else expected)


def test_another_template(chat):
    other = chat.with_template("{{ messages[0].content }}!")
    assert other.render(ASK) == "Tea?!" and chat.with_template(None) is chat and other.tokenizer is chat.tokenizer
    with pytest.raises(ChatError, match=r"^\./tiny with `chat_template`: the chat template is not valid Jinja, line 1"):
        other.with_template("{% for %}")


def test_other_keys_reach_the_template():
    template = "{{ messages[0].tool_calls[0].name }}"
    assert chat_tokenizer("byte-level", template).render([{**ASK[0], "tool_calls": [{"name": "boil"}]}]) == "boil"


# ----------------------------------------------------------------------------------------------------------- stream


def streamed(chat, ids):
    """The pieces of a stream, checked to add up to the decoded text."""
    stream = Stream(chat)
    pieces = [stream.push(id) for id in ids]
    whole = chat.decode(ids)
    assert "".join(pieces) == whole[: len("".join(pieces))]
    assert "".join(pieces) + stream.finish() == whole
    assert stream.finish() == ""
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(draw=st.data())
def test_a_stream_gives_the_decoded_text(name, draw):
    chat = chat_tokenizer(name)
    last = chat.size - 1
    few = st.integers(0, last) | st.integers(max(0, last - 14), last) | st.integers(0, 2)
    streamed(chat, draw.draw(st.lists(few, max_size=40)))


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1))
def test_a_stream_gives_the_encoded_text(text):
    for name in ("byte-level", "gemma"):
        chat = chat_tokenizer(name)
        assert chat.decode(chat.encode(text)) == (text.replace("▁", " ") if name == "gemma" else text)
        streamed(chat, chat.encode(text))


def test_a_stream_holds_back_partial_characters(chat):
    pieces = streamed(chat, chat.encode("🫖 tea"))
    assert "".join(pieces) == "🫖 tea" and not any("\ufffd" in piece for piece in pieces)
    half = Stream(chat)
    assert half.push(chat.encode("🦊")[0]) == "" and half.finish() == "\ufffd"


def test_a_stream_gives_text_early(chat):
    assert all(streamed(chat, chat.encode("the tea is hot")))
    llama = chat_tokenizer("llama-2")
    ids = [llama.tokenizer.token_to_id(token) for token in ["▁tea", "</s>", "▁hot", "<0xC3>", "<0xA9>", "tea"]]
    assert streamed(llama, ids) == ["tea", "", " hot", "", "", "étea"]
    ids = [llama.tokenizer.token_to_id(token) for token in ["▁tea", "", "▁hot", "▁", "", "▁hot"]]
    assert streamed(llama, ids) == ["tea", "", " hot", " ", "", " hot"]  # only the first blank of the text is removed


def test_a_stream_can_be_reused_after_finish():
    llama = chat_tokenizer("llama-2")
    stream, tea = Stream(llama), llama.tokenizer.token_to_id("▁tea")
    assert [stream.push(tea), stream.push(tea), stream.finish(), stream.push(tea)] == ["tea", " tea", "", "tea"]


def test_a_long_stream_decodes_few_ids_per_token(chat, monkeypatch):
    lengths = []
    decode = ChatTokenizer.decode
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    stream = Stream(chat)
    for id in chat.encode("the tea is hot " * 50):
        stream.push(id)
    assert max(lengths) == 2


# ---------------------------------------------------------------------------------------------------------- reading


def test_read_a_folder(folder):
    chat = chat_template.read(str(folder))
    assert (chat.template, chat.special, chat.stop_ids, chat.where) == (
        CHATML,
        {"bos_token": "<|im_start|>"},
        (0,),
        str(folder),
    )
    assert chat.tokenizer.truncation is None and chat.tokenizer.padding is None


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


def test_a_token_that_only_the_config_declares_special_is_one_token(folder):
    write(folder, "tokenizer_config.json", {"eos_token": "<think>", "unk_token": "the", "pad_token": "<new>"})
    chat = chat_template.read(folder)
    the = chat.tokenizer.token_to_id("the")
    assert the is not None and chat.size == 321
    assert chat.decode([320, the, chat.encode("a")[1]]) == "a" and chat.stop_ids == (0, 320)


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config.json": {}}, None),
        ({"chat_template.jinja": "J", "chat_template.json": {"chat_template": "P"}}, "J"),
        ({"chat_template.json": {"chat_template": "P"}}, CHATML),
        ({"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "P"}}, "P"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
                }
            },
            "D",
        ),
    ],
)
def test_files_that_may_hold_the_template(folder, files, template):
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
        ("config.json", {"eos_token_id": "</s>"}, r"config\.json: eos_token_id must be an id .* got '</s>'"),
        ("generation_config.json", {"eos_token_id": [True]}, r"generation_config\.json: eos_token_id must be"),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "R"}]}, "the chat templates are rag"),
        ("tokenizer_config.json", {"chat_template": []}, "the chat templates are none; expected one named 'default'"),
        ("tokenizer_config.json", {"chat_template": 1}, r"tokenizer_config\.json: chat_template must be text"),
        ("chat_template.jinja", None, r"chat_template\.jinja: not UTF-8 \(byte offset 0\)"),
    ],
)
def test_malformed_files(folder, name, content, error):
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
    with pytest.raises(ChatError, match=r"x\.bin: not a model"):
        chat_template.read(tmp_path / "x.bin")


def test_a_missing_package_is_named(chat, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        chat.render(ASK)
    assert raised.value.name == "jinja2"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        chat_template.read(folder)
    assert raised.value.name == "tokenizers"
