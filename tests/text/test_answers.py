"""The texts that conversations are learned from, with templates of every kind."""

import pytest

from jpeft.errors import UserError
from jpeft.text import answers, conversations
from jpeft.text.chat_template import ChatError
from tests.text.tiny_tokenizers import ASK, CHATML, TALK, chat_tokenizer

END = "<|im_end|>"
HEAD = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% if m.role == 'assistant' %}"
# As DeepSeek-R1's: thinking is taken out of every answer. Its later versions begin the thinking in the prompt.
R1 = (
    HEAD + "{% if m.content is none %}<bot>{{ m.tool_calls[0].function.name }}{{ eos_token }}{% else %}"
    "<bot>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
R1_BEGUN = R1.removesuffix("{% endif %}") + "{{ '<think>\n' }}{% endif %}"
# As Qwen3's: the last answer has its thinking, which may be empty; the others have none.
QWEN = (
    HEAD + "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set before = m.content.split('</think>')[0] if '</think>' in m.content else '' %}"
    "{% set thought = before.split('<think>')[-1].strip('\n') %}"
    "<bot>{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}{{ eos_token + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% if thinking is defined and not thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)


def of(template, stop_ids=(2,)):
    return chat_tokenizer("byte-level", template, {"eos_token": END}, stop_ids)


def user(content):
    return {"role": "user", "content": content}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


def thought(thinking, answer):
    return bot(f"<think>\n{thinking}\n</think>\n\n{answer}")


def learned(chat, messages, *args):
    """The answers of each text, checked to follow the prompts that the model is given for them."""
    found = answers.texts(chat, messages, *args)
    if "generation %}" not in chat.template:
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (not args or args[0][i])]
        variables = args[1] if len(args) > 1 else {}
        prompts = [chat.render(messages[:index], **variables) for index in places]
        assert [text.text[:start] for text in found for start, _ in text.spans] == prompts
    return [text.answers for text in found]


PLAIN = [user("Tea?"), bot("Yes."), user("Hot?"), bot("Hot.")]
THINK = [user("Tea?"), thought("hm", "Yes."), user("Hot?"), thought("ho", "Hot.")]
FOUND = {
    "chatml": (CHATML, PLAIN, [["Yes." + END, "Hot." + END]]),
    "chatml, thinking": (CHATML, THINK, [[m["content"] + END for m in THINK[1::2]]]),
    "r1": (R1, PLAIN, [["Yes." + END, "Hot." + END]]),
    "r1, thinking": (R1, THINK, [[m["content"] + END] for m in THINK[1::2]]),
    "r1, begun thinking": (R1_BEGUN, THINK, [["hm\n</think>\n\nYes." + END], ["ho\n</think>\n\nHot." + END]]),
    "r1, tool call": (
        R1,
        [*PLAIN[:3], bot(None, tool_calls=[{"function": {"name": "boil"}}])],
        [["Yes." + END, "boil" + END]],
    ),
    "qwen": (QWEN, PLAIN, [["<think>\n\n</think>\n\nYes." + END], ["<think>\n\n</think>\n\nHot." + END]]),
    "qwen, thinking": (QWEN, THINK, [[m["content"] + END] for m in THINK[1::2]]),
    "marked": (MARKED, PLAIN, [["Yes.</s>", "Hot.</s>"]]),
}


@pytest.mark.parametrize("name", FOUND)
def test_each_answer_is_learned_once_after_its_own_prompt(name):
    template, messages, expected = FOUND[name]
    chat = of(template)
    assert learned(chat, messages) == expected
    assert learned(chat, messages[:2]) == [expected[0][:1]]


@pytest.mark.parametrize("template", [CHATML, R1, QWEN, MARKED])
def test_answers_of_weight_0_are_context_only(template):
    chat = of(template)
    both = [answer for text in learned(chat, PLAIN) for answer in text]
    assert learned(chat, PLAIN, [False, False, False, True]) == [both[1:]]
    (first,) = answers.texts(chat, PLAIN, [False, True, False, False])
    assert first.answers == both[:1]


def test_variables_reach_the_template():
    assert learned(of(QWEN), PLAIN, [False, True, False, True], {"thinking": False}) == [["Yes." + END], ["Hot." + END]]
    with pytest.raises(
        ChatError, match=r"^\./tiny: the chat template does not read 'tools', so its content would be lo"
    ):
        answers.texts(of(QWEN), PLAIN, None, {"tools": [{}]})
    only_system = "{% if tools and messages[0].role == 'system' %}{{ tools }}{% endif %}" + CHATML
    assert learned(of(only_system), TALK, [True] * 5, {"tools": [{}]})[0][0] == "Yes." + END
    with pytest.raises(ChatError, match="the chat template does not write 'tools' for these messages, so its content"):
        answers.texts(of(only_system), PLAIN, None, {"tools": [{}]})


def test_without_stop_ids_an_answer_ends_with_its_turn():
    assert learned(of(CHATML, ()), TALK) == [["Yes.<|im_end|>\n", "Yes, hot.<|im_end|>\n"]]
    assert learned(of(CHATML, (0, 2, 1 << 40)), TALK)[0][0] == "Yes.<|im_end|>"
    assert learned(of(CHATML), [*ASK, bot("<|im_end|> ends it")]) == [["<|im_end|> ends it<|im_end|>"]]
    assert learned(of(CHATML), ASK) == []


REFUSED = {
    "thinking that no prompt begins": (R1_BEGUN, PLAIN, r"message 3: .* ends in '<think>\\n', and the answer does not"),
    "thinking apart": (
        R1,
        [*ASK, bot("Yes.", reasoning_content="hm")],
        "message 1: .* does not read 'reasoning_content'",
    ),
    "a tool call": (CHATML, [*ASK, bot(None, tool_calls=[{}])], "message 1: .* does not read 'tool_calls' of the role"),
    "another key": (
        CHATML,
        [{**ASK[0], "name": "A"}, bot("Yes.")],
        "message 0: .* does not read 'name' of the role user",
    ),
    "a key that says no": (CHATML, [ASK[0], bot("Yes.", learn=False)], "message 1: .* does not read 'learn' of the"),
    "a system message": (
        R1,
        TALK,
        "message 0: the chat template does not read 'content' of the role system.*; remove the message, or give",
    ),
    "a template cut off": ("{% for m in messages %}", PLAIN, "the chat template is not valid Jinja, line 1"),
    "a template that refuses": ("{{ raise_exception('no') }}", PLAIN, "rejects the messages: no"),
    "a part that is left out": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | truncate(12) }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        [*ASK, bot("It is hot, and with milk.")],
        "message 1: the chat template renders the answer without a part of it",
    ),
    "another beginning": (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last %}<think></think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
        TALK,
        "message 4: the chat template renders the answer without a part of it, or after another text",
    ),
    "an answer that begins": (
        "{{ messages[0].role }}{% for m in messages %}{{ m.content }}{% endfor %}",
        TALK[2:],
        'message 0: an answer that begins the conversation has no prompt.*"weight": 0',
    ),
    "marks in a macro": (
        "a{% macro f() %}b{% generation %}{{ messages[0].content }}{% endgeneration %}{% endmacro %}{{ f() }}",
        PLAIN,
        r"\{% generation %\} is inside a macro",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_located_or_would_be_lost_is_refused(name):
    template, messages, message = REFUSED[name]
    with pytest.raises(ChatError, match=message) as caught:
        answers.texts(of(template), messages)
    assert str(caught.value).startswith("./tiny: ") and "\n" not in str(caught.value)


def test_marks_that_do_not_match_the_messages_cannot_be_weighed():
    only_last = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    assert learned(of(only_last), PLAIN) == [["Hot.</s>"]]
    with pytest.raises(ChatError, match=r"marks 1 parts by .*, and the assistant has 2 messages, so those of weight 0"):
        answers.texts(of(only_last), PLAIN, [False, False, False, True])


def test_what_templates_read_by_other_means_counts_as_read():
    for written in ("m | tojson", "m.get('name') ~ m.content", "m.items() | list", "dict(m)", "m.values() | list"):
        template = "{% for m in messages %}{% if m.role == 'user' %}{{ " + written + " }}{% else %}<{{ m.content }}>"
        chat = of(template + "{% endif %}{% endfor %}{% if add_generation_prompt %}<{% endif %}")
        assert learned(chat, [{**ASK[0], "name": "A"}, bot("Yes.")]) == [["Yes.>"]]
    tool = {"role": "tool", "content": "done", "tool_call_id": "c1", "name": "boil"}  # the order says the same
    assert learned(of(CHATML), [*ASK, tool, bot("Yes.")]) == [["Yes.<|im_end|>"]]


def test_a_prompt_is_checked_as_well():
    answers.check_prompt(of(CHATML), TALK[:4])
    with pytest.raises(ChatError, match="message 0: the chat template does not read 'weight' of the role user"):
        answers.check_prompt(of(CHATML), [{**ASK[0], "weight": 1}])


# --- tokens ---------------------------------------------------------------------------------------------------------


def encode(template, *talks, stop_ids=(2,), trained=()):
    chat = of(template, stop_ids)
    read = conversations.Conversations("a.jsonl", talks, tuple(range(1, len(talks) + 1)), trained)
    return chat, conversations.encode(read, chat, 400)


def test_a_conversation_may_make_several_examples():
    chat, encoded = encode(QWEN, tuple(THINK), tuple(THINK[:2]))
    assert encoded.lines == (1, 1, 2) and len(encoded) == 3
    for ids, mask, prompt in zip(encoded.ids, encoded.assistant_mask, (THINK[:1], THINK[:3], THINK[:1]), strict=True):
        begin = len(chat.encode_chat(prompt))
        assert ids[:begin].tolist() == chat.encode_chat(prompt) and not mask[:begin].any() and mask[begin:].all()
        assert ids[-1] == 2


def test_tokens_of_weight_0_have_no_weight():
    chat, encoded = encode(CHATML, tuple(PLAIN), trained=((False, False, False, True),))
    assert chat.decode(encoded.ids[0][encoded.assistant_mask[0]]) == "Hot."


def test_answers_without_a_stop_token_are_told():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    turns += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat, encoded = encode(turns, tuple(PLAIN))
    warning = conversations.stop_warning(encoded, chat)
    assert warning.startswith(
        f"no answer ends in a stop token ({END}), as the chat template renders them, but often in"
    )
    assert "`chat_template` FILE" in warning and "\n" not in warning
    chat, encoded = encode(CHATML, tuple(PLAIN))
    assert conversations.stop_warning(encoded, chat) is None
    chat, encoded = encode(CHATML, tuple(PLAIN), stop_ids=(0,))  # as a base model's <|endoftext|>
    assert "no answer ends in a stop token (<|endoftext|>)" in conversations.stop_warning(encoded, chat)
    chat, encoded = encode(CHATML, tuple(PLAIN), stop_ids=())
    assert "no answer ends in a stop token (the model names none)" in conversations.stop_warning(encoded, chat)
    first = R1.replace("{{ eos_token }}{% endif %}", "{% if loop.index == 2 %}{{ eos_token }}{% endif %}{% endif %}")
    chat, encoded = encode(first, tuple(PLAIN))
    assert conversations.stop_warning(encoded, chat).startswith("1 of 2 answers do not end in a stop token")


def test_an_error_names_the_line():
    with pytest.raises(
        UserError, match=r"^a\.jsonl: line 2: \./tiny: message 0: the chat template does not read 'conte"
    ):
        encode(R1, tuple(PLAIN), tuple(TALK))
