"""Parity with transformers' tokenizers: chat templates as published, special tokens and ids."""

# ruff: noqa: E501 (lines of templates)

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jpeft.text import answers, chat_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA_3 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You have access to the following functions. To call a function, please respond with JSON for a function call." }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{#- Custom tools are passed in a user message with some extra guidance #}
{%- if tools_in_user_message and not tools is none %}
    {#- Extract the first user message so we can plug it in here #}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call " }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}"
    "{%- endif %}{%- if message['role'] == 'user' %}{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}{%- else %}"
    "{{- raise_exception('Only user and assistant roles are supported, with the exception of an initial optional "
    "system message!') }}{%- endif %}{%- endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

QWEN_3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object.<|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

LOOP_CONTROLS = """
{% for message in messages %}
  {% if message.role == 'system' %}
    {% continue %}
  {% endif %}
  {% if loop.index0 > 3 %}
    {% break %}
  {% endif %}
  {{ loop.index }} {{ message.content | upper | tojson }} {{ message | tojson(indent=2, sort_keys=true) }}
{% endfor %}
{% for key, value in (messages | last).items() %}{{ key }}={{ value }};{% endfor %}
"""

GENERATION = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}"
    "<|{{ message.role }}|>\n{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen-3": QWEN_3,
    "loop-controls": LOOP_CONTROLS,
    "generation": GENERATION,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "boil",
        "description": "Boils <water> & 茶",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = {"type": "function", "function": {"name": "boil", "arguments": {"cups": 2, "what": "thé"}}}
USER, ANSWER = (
    {"role": "user", "content": " Tea?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes 🫖"},
)
CONVERSATIONS = {
    "question": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "talk": [USER, ANSWER, {"role": "user", "content": "Hot?"}, ANSWER],
    "two-questions": [USER, USER],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"done": true}', "name": "boil"},
        ANSWER,
    ],
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer saved by transformers, which adds a BOS token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEMPLATES.values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


def both(folder):
    return chat_template.read(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(folder, name, conversation):
    ours, theirs = both(folder)
    ours = chat_template.ChatTokenizer(ours.tokenizer, TEMPLATES[name], ours.special, ours.stop_ids, ours.where)
    messages, texts = CONVERSATIONS[conversation], 0
    tools = [TOOL] if conversation == "tools" else None
    for prompt in (True, False):
        for variables in (
            {},
            {"enable_thinking": False, "date_string": "1 Jan 2025"},
            {"tools_in_user_message": False},
        ):
            options = {"add_generation_prompt": prompt, "tools": tools, **variables}
            try:
                expected = theirs.apply_chat_template(
                    messages, chat_template=TEMPLATES[name], tokenize=False, **options
                )
            except Exception as error:
                with pytest.raises(chat_template.ChatError) as raised:
                    ours.render(messages, **options)
                assert " ".join(str(error).split()) in str(raised.value)
                continue
            assert ours.render(messages, **options) == expected
            ids = theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], **options)
            assert ours.encode_chat(messages, **options) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            texts += 1
    assert texts or name in {"mistral", "gemma"}


@pytest.mark.parametrize("conversation", ["question", "talk", "system"])
def test_generation_blocks_give_the_assistant_mask_of_transformers(folder, conversation):
    ours, theirs = both(folder)
    ours = chat_template.ChatTokenizer(ours.tokenizer, GENERATION, ours.special, ours.stop_ids, ours.where)
    (found,) = answers.texts(ours, CONVERSATIONS[conversation])
    encoded = theirs.apply_chat_template(
        CONVERSATIONS[conversation], chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    offsets = ours.tokenizer.encode(found.text, add_special_tokens=False).offsets
    inside = [int(any(start <= first and last <= end for start, end in found.spans)) for first, last in offsets]
    assert inside == encoded["assistant_masks"] and any(inside) == (conversation == "talk")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["<think>\nhm\n</think>\n\nYes 🫖<|im_end|>", "Hot.<|im_end|>"]),
        ("llama-3", ["<think>\nhm\n</think>\n\nYes 🫖<|im_end|>", "Hot.<|im_end|>"]),
        ("mistral", [" <think>\nhm\n</think>\n\nYes 🫖<|im_end|>", " Hot.<|im_end|>"]),
        ("gemma", ["<think>\nhm\n</think>\n\nYes 🫖<|im_end|>", "Hot.<|im_end|>"]),
        ("generation", ["<think>\nhm\n</think>\n\nYes 🫖<|im_end|>", "Hot.<|im_end|>"]),
        ("qwen-3", ["<think>\nhm\n</think>\n\nYes 🫖<|im_end|>", "<think>\n\n</think>\n\nHot.<|im_end|>"]),
    ],
)
def test_answers_in_published_templates_follow_the_prompts_of_transformers(folder, name, expected):
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    template = TEMPLATES[name].replace("<|eot_id|>", "<|im_end|>").replace("<end_of_turn>", "<|im_end|>")
    _, theirs = both(folder)
    ours = chat_template.ChatTokenizer(chat_template.read(folder).tokenizer, template, special, (4,), "./tiny")
    talk = [USER, ANSWER, {"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "Hot."}]
    found = answers.texts(ours, talk)
    assert [answer for text in found for answer in text.answers] == expected
    assert len(found) == (2 if name == "qwen-3" else 1)  # Qwen 3 takes the thinking out of all answers but the last
    prompts = [
        theirs.apply_chat_template(
            talk[:index], chat_template=template, tokenize=False, add_generation_prompt=True, **special
        )
        for index in (1, 3)
    ]
    assert [text.text[:start] for text in found for start, _ in text.spans] == prompts


@pytest.mark.parametrize(("name", "form"), [("llama-3", dict), ("qwen-3", str), ("qwen-3", dict)])
def test_tool_calls_of_openai_are_learned_as_transformers_renders_them(folder, name, form):
    """OpenAI's arguments are JSON text. Templates of transformers take an object, or both."""
    arguments = CALL["function"]["arguments"]
    given = json.dumps(arguments, ensure_ascii=False)
    call = {"id": "c1", "type": "function", "function": {"name": "boil", "arguments": given}}
    talk = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ours, theirs = both(folder)
    ours = chat_template.ChatTokenizer(ours.tokenizer, TEMPLATES[name], ours.special, ours.stop_ids, ours.where)
    variables = {"tools": [TOOL]} | ({"date_string": "1 Jan 2025"} if name == "llama-3" else {})
    (found,) = answers.texts(ours, talk, variables=variables)
    options = {"chat_template": TEMPLATES[name], "tokenize": False, **variables}
    as_form = {**call, "function": {"name": "boil", "arguments": arguments if form is dict else given}}
    expected = theirs.apply_chat_template([talk[0], {**talk[1], "tool_calls": [as_form]}], **options)
    assert found.text == expected and found.spans


def test_a_folder_reads_as_in_transformers(folder):
    ours, theirs = both(folder)
    assert ours.special == theirs.special_tokens_map
    assert ours.template == theirs.chat_template and ours.stop_ids == (theirs.eos_token_id,)
    for text in ("Why is the sky blue?", "<s> <|im_end|>\n🫖", "\ufffd é"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_a_token_that_only_the_config_declares_special(folder, tmp_path):
    fast = transformers.AutoTokenizer.from_pretrained(folder, pad_token="the")
    fast.save_pretrained(tmp_path)
    ours, theirs = both(tmp_path)
    assert ours.special == theirs.special_tokens_map and ours.special["pad_token"] == "the"
    ids = ours.encode("see the tea")
    assert ids == theirs("see the tea")["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_smollm2_reads_as_in_transformers(smollm2_file):
    path = smollm2_file
    ours, theirs = (
        chat_template.read(path),
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
    )
    assert ours.template == CHATML and 2 in ours.stop_ids
    for messages in CONVERSATIONS.values():
        expected = theirs.apply_chat_template(
            messages, chat_template=CHATML, tokenize=False, add_generation_prompt=True
        )
        assert ours.render(messages) == expected
        assert ours.encode_chat(messages) == theirs(expected, add_special_tokens=False)["input_ids"]
    for ids in np.random.default_rng(0).integers(0, ours.size, (50, 60)):
        stream = chat_template.Stream(ours)
        assert "".join(map(stream.push, ids)) + stream.finish() == theirs.decode(ids, skip_special_tokens=True)
