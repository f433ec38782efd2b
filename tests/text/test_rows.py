"""Rows of conversation files: the forms that people have, and what is refused because it would be lost."""

import json

import pytest

from jpeft.errors import UserError
from jpeft.text import conversations, rows


def user(content):
    return {"role": "user", "content": content}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


TEA = (user("Tea?"), bot("Yes."))
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "boil", "arguments": {"cups": 2}}}
TOOLS = [{"type": "function", "function": {"name": "boil", "parameters": {}}}]


def read(row, ignore=()):
    return rows.read("a.jsonl", 3, json.loads(json.dumps(row)), ignore)


FORMS = {
    "messages": ({"messages": TEA}, TEA),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Tea?"},
                           {"from": "gpt", "value": "Yes."}]},
        (SYSTEM, *TEA),
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Tea?"},
                {"from": "function_call", "value": '{"name": "boil", "arguments": {"cups": 2}}'},
                {"from": "observation", "value": "done"},
                {"from": "gpt", "value": "Yes."},
            ],
            "system": "Be brief.",
            "tools": json.dumps(TOOLS),
        },
        (SYSTEM, TEA[0], bot(None, tool_calls=[CALL]), {"role": "tool", "content": "done"}, TEA[1]),
    ),
    "OpenAI's functions": (
        {
            "messages": [
                TEA[0],
                {"role": "assistant", "content": None, "function_call": {"name": "boil", "arguments": {"cups": 2}}},
                {"role": "function", "name": "boil", "content": "done"},
                TEA[1],
            ]
        },
        (TEA[0], bot(None, tool_calls=[CALL]), {"role": "tool", "content": "done", "name": "boil"}, TEA[1]),
    ),
    "roles in conversations": ({"conversations": TEA}, TEA),
    "prompt and completion as messages": ({"prompt": [SYSTEM, TEA[0]], "completion": [TEA[1]]}, (SYSTEM, *TEA)),
    "prompt as messages, completion as text": ({"prompt": [TEA[0]], "completion": "Yes."}, TEA),
    "prompt and response": ({"prompt": "Tea?", "response": "Yes."}, TEA),
    "instruction and response": ({"instruction": "Tea?", "response": "Yes."}, TEA),
    "query and response": ({"query": "Tea?", "response": "Yes."}, TEA),
    "question and response": ({"question": "Tea?", "response": "Yes."}, TEA),
    "system beside a prompt": ({"system": "Be brief.", "prompt": "Tea?", "completion": "Yes."}, (SYSTEM, *TEA)),
    "system beside an instruction": (
        {"system_prompt": "Be brief.", "instruction": "Tea?", "output": "Yes."},
        (SYSTEM, *TEA),
    ),
    "a blank system": ({"system": " ", "system_prompt": None, "question": "Tea?", "answer": "Yes."}, TEA),
    "system twice the same": ({"system": "Be brief.", "messages": (SYSTEM, *TEA)}, (SYSTEM, *TEA)),
    "parts": (
        {"messages": [user([{"type": "text", "text": "Te"}, {"type": "text", "text": "a?"}]),
                      bot([{"type": "text", "text": "Yes.", "annotations": []}])]},
        TEA,
    ),
    "a tool call without content": (
        {"messages": [TEA[0], {"role": "assistant", "tool_calls": [CALL], "refusal": None}]},
        (TEA[0], bot(None, tool_calls=[CALL])),
    ),
    "a prompt beside its messages": ({"prompt": "Tea?", "prompt_id": "x1", "messages": TEA}, TEA),  # UltraChat's
    "nulls": ({"messages": TEA, "tools": None, "documents": [], "history": [], "chat_template_kwargs": {}}, TEA),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read(form, tmp_path):
    row, messages = FORMS[form]
    assert read(row).messages == messages
    assert read(row).trained == tuple(message["role"] == "assistant" for message in messages)
    (tmp_path / "a.json").write_text(json.dumps([row, row], indent=2))
    assert conversations.read(tmp_path / "a.json").messages == (messages, messages)


def test_variables_of_the_template_are_kept():
    given = {"tools": TOOLS, "documents": [{"text": "d"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert read({"messages": TEA, **given}).variables == {
        "tools": TOOLS,
        "documents": [{"text": "d"}],
        "enable_thinking": False,
    }
    assert read({"question": "Tea?", "answer": "Yes.", "tools": json.dumps(TOOLS)}).variables == {"tools": TOOLS}


@pytest.mark.parametrize(
    "said", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}, {"loss": False}]
)
def test_answers_of_weight_0_are_not_learned(said):
    row = read({"messages": [user("Tea?"), bot("No.", **said), user("Tea?"), bot("Yes.", weight=1)]})
    assert row.messages == (user("Tea?"), bot("No."), user("Tea?"), bot("Yes."))  # the template never sees the weight
    assert row.trained == (False, False, False, True)
    with pytest.raises(UserError, match=r"line 3: every message of the assistant has the weight 0"):
        read({"messages": [user("Tea?"), bot("No.", **said)]})
    shared = read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **said},
                                     {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]})  # fmt: skip
    assert shared.trained == (False, False, False, True)


def test_only_the_completion_is_learned():
    row = read({"prompt": [*TEA, user("Hot?")], "completion": [bot("Yes, hot."), user("Thanks"), bot("!")]})
    assert row.trained == (False, False, False, True, False, True)


def test_keys_that_describe_a_row_are_listed_and_others_refused():
    row = read({"messages": TEA, "id": 7, "source": "a", "conversation_id": "x", "score": None})
    assert row.ignored == ("id", "source", "conversation_id")
    with pytest.raises(UserError, match=r"a\.jsonl: line 3: the key 'score' .* would be lost; .*`ignore_keys` score$"):
        read({"messages": TEA, "score": 0})
    assert read({"messages": [{**TEA[0], "notes": "x"}, TEA[1]], "score": 0}, {"score", "notes"}).messages == TEA


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [TEA[0], bot("Yes.", weight=0.5)]}, r"'messages\[1\].weight' must be 0 .* or 1, got 0.5"),
        ({"messages": [TEA[0], bot("Yes.", weight=True)]}, r"'messages\[1\].weight' must be 0 .* or 1, got true"),
        ({"messages": [TEA[0], bot("Yes.", weight="0")]}, r"must be 0 .* or 1, got \"0\""),
        ({"messages": [TEA[0], bot("Yes.", train="no")]}, r"'messages\[1\].train' must be true or false, got \"no\""),
        ({"messages": [TEA[0], bot("Yes.", weight=0, train=True)]}, "has weight 0 and train true, which contradict"),
        ({"messages": [TEA[0], bot("Yes.", loss=0.5)]}, r"'messages\[1\].loss' must be true or false, got 0.5"),
        ({"messages": [{**TEA[0], "train": True}, TEA[1]]}, r"'messages\[0\]' asks to train on .* the role user"),
        ({"messages": TEA, "weight": 0.5}, "the key 'weight' means nothing here"),
        ({"prompt": "Tea?", "completion": "Yes.", "input": "Milk"}, "the key 'input' means nothing here"),
        ({"question": "Tea?", "answer": "Yes.", "context": "A shop."}, "the key 'context' means nothing here"),
        ({"instruction": "Tea?", "output": "Yes.", "history": [["a", "b"]]}, "the key 'history' means nothing here"),
        ({"prompt": "Milk?", "messages": TEA}, "the key 'prompt' means nothing here"),
        ({"messages": TEA, "conversations": TEA}, "ambiguous keys, messages or conversations"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "ambiguous keys, prompt and completion or prompt and"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the keys are .*; rows of preferences have no"),
        ({"system": "Be long.", "messages": (SYSTEM, *TEA)}, "'system' is a system message beside another one"),
        ({"system": "a", "system_prompt": "b", "messages": TEA}, "ambiguous keys, system or system_prompt"),
        ({"system": ["a"], "messages": TEA}, "'system' must be text"),
        ({"messages": TEA, "tools": "boil"}, "'tools' must hold JSON"),
        ({"messages": TEA, "tools": ["boil"]}, "'tools' must be a list of objects"),
        ({"messages": TEA, "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        ({"messages": TEA, "chat_template_kwargs": {"messages": []}}, "has the key 'messages', which jpeft gives"),
        ({"messages": TEA, "tools": [{"name": "a\ud800"}]}, "'tools' contains half a surrogate pair"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), TEA[1]]},
            r"'messages\[0\].content' has a part of the type 'image_url'; only parts of the type 'text' can be read",
        ),
        (
            {"messages": [user([{"type": "text", "text": "a", "cache_control": {"a": 1}}]), TEA[1]]},
            "has a part with the key 'cache_control'",
        ),
        ({"messages": [user(["Tea?"]), TEA[1]]}, r"'messages\[0\].content' must be text, got \[\"Tea"),
        ({"conversations": [{"from": "bard", "value": "a"}]}, "has the role \"bard\", expected system, user"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "boil()"}]},
            r"'conversations\[1\].value' must hold JSON",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "b"}'}]},
            r"'conversations\[1\].value' must hold a call with 'name' and 'arguments'",
        ),
        (
            {"messages": [{**TEA[0], "value": "Milk?"}, TEA[1]]},
            r"'messages\[0\]' has the keys 'content' and 'value', which mean the same; keep one",
        ),
        ({"prompt": [TEA[0]], "completion": [TEA[0]]}, "'completion' has no message of the assistant"),
        ({"question": [TEA[0]], "answer": "Yes."}, "'question' must be text"),
        ({"messages": [TEA[0], bot(None, tool_calls=[])]}, r"'messages\[1\].content' must be text, got null"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(row, message):
    with pytest.raises(UserError, match=message) as caught:
        read(row)
    assert str(caught.value).startswith("a.jsonl: line 3: ") and "\n" not in str(caught.value)


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}')
    with pytest.raises(UserError, match=r"line 1 has the key 'role' twice"):
        conversations.read(tmp_path / "a.jsonl")
