"""Conversations: reading, assistant masks, packing, batches, and scoring of numbers."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from jpeft.errors import UserError
from jpeft.text import conversations, scoring
from jpeft.text.chat_template import ChatTokenizer
from jpeft.text.conversations import Batch, Batches, Conversations, Encoded
from tests.text.tiny_tokenizers import ASK, CHATML, GEMMA, LLAMA_2, TALK, byte_level, chat_tokenizer, sentencepiece

TEA = ({"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes, hot."})
# As Llama 2's: answers follow prompts without a header, after a blank.
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# As Gemma's (`<s>` for its `<start_of_turn>`): a line break follows the token that ends a turn.
TURNS = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CHAT_TOKENIZERS = {
    "byte-level": chat_tokenizer("byte-level", stop_ids=(2,)),
    "llama-2": ChatTokenizer(sentencepiece(LLAMA_2), INST, {}, (2,), "./tiny"),
    "gemma": ChatTokenizer(sentencepiece(GEMMA), TURNS, {}, (2,), "./tiny"),
}


def of(*messages):
    return Conversations("train.jsonl", tuple(map(tuple, messages)), tuple(range(1, len(messages) + 1)))


def write(folder, *rows, name="a.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


# ---------------------------------------------------------------------------------------------------------- reading


def test_all_row_formats_may_be_mixed(tmp_path):
    path = write(
        tmp_path,
        {"messages": TALK, "id": 7},
        {"prompt": "Tea? ", "completion": " Yes."},
        "",
        {"instruction": "Translate.", "input": "thé\u2028", "output": "tea"},
        {"instruction": "Name a tea.", "input": " ", "output": "Assam"},
        {"instruction": "Name a tea.", "output": "Assam", "text": "…"},
        {"instruction": "Name a tea.", "input": None, "output": "Assam"},
        {"question": "2 + 2?", "answer": "It is 4.\n#### 4"},
    )
    read = conversations.read(path)
    assert read.source == str(path) and read.lines == (1, 2, 4, 5, 6, 7, 8) and len(read) == 7
    assert read.messages[0] == tuple(TALK)
    assert all([turn["role"] for turn in messages] == ["user", "assistant"] for messages in read.messages[1:])
    assert [tuple(turn["content"] for turn in messages) for messages in read.messages[1:]] == [
        ("Tea? ", " Yes."),
        ("Translate.\n\nthé\u2028", "tea"),
        ("Name a tea.", "Assam"),
        ("Name a tea.", "Assam"),
        ("Name a tea.", "Assam"),
        ("2 + 2?", "It is 4.\n#### 4"),
    ]


def turn(role, content):
    return {"messages": [{"role": "user", "content": "Tea?"}, {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "line 2 is not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        (
            {"text": "a", "label": 1},
            "line 2: the keys are 'text', 'label'; expected 'messages', 'conversations', 'prompt'",
        ),
        ({"prompt": "a"}, "line 2: the keys are 'prompt'; expected"),
        (
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            "line 2: ambiguous keys, prompt and completion or question and answer",
        ),
        ({}, "line 2: the keys are none; expected"),
        ({"messages": "tea"}, "line 2: 'messages' must be a list, got \"tea\""),
        (
            {"messages": ["tea"]},
            r"line 2: 'messages\[0\]' must be an object with 'role' and 'content', got \"tea\"",
        ),
        ({"messages": [{"role": "user"}]}, "must be an object with 'role' and 'content'"),
        (turn("bot", "Yes."), r"line 2: 'messages\[1\]' has the role \"bot\", expected system, user, assistant, tool"),
        (turn([1], "Yes."), r"line 2: 'messages\[1\]' has the role \[1\], expected"),
        (turn("assistant", None), r"line 2: 'messages\[1\].content' must be text, got null"),
        (turn("user", [{"type": "text"}]), r"line 2: 'messages\[1\].content' must be text, got \[\{"),
        (turn("assistant", " \n"), r"line 2: the text in 'messages\[1\].content' is empty"),
        (turn("user", "Hot?"), "line 2: 'messages' has no message of the assistant"),
        ({"messages": []}, "line 2: 'messages' has no message of the assistant"),
        ({"prompt": "a", "completion": ""}, "line 2: the text in 'completion' is empty"),
        ({"instruction": "a", "output": "\n"}, "line 2: the text in 'output' is empty"),
        ({"instruction": "a", "input": [1], "output": "b"}, r"line 2: 'input' must be text, got \[1\]"),
        ({"question": "a", "answer": 4}, "line 2: 'answer' must be text, got 4"),
        ({"question": "a\ud800", "answer": "4"}, "line 2: 'question' contains half a surrogate pair"),
        (turn("assistant", "a\udfff"), r"line 2: 'messages\[1\].content' contains half a surrogate pair"),
        (turn("user", "a\udfff"), r"line 2: 'messages\[1\].content' contains half a surrogate pair"),
    ],
)
def test_malformed_rows(tmp_path, row, message):
    path = write(tmp_path, {"messages": TALK, "tools": None}, row)
    with pytest.raises(UserError, match=message) as caught:
        conversations.read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.txt", "expected a .jsonl or .json file"), ("a.jsonl", "the file is empty; expected a row per example")],
)
def test_malformed_files(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        conversations.read(write(tmp_path, " ", name=name))


def test_train_and_test_are_disjoint():
    whole = of(*[TEA] * 30)
    train, test = conversations.train_test_split(whole, seed=3)
    assert len(test) == 3 and sorted(train.lines + test.lines) == list(whole.lines)
    assert conversations.train_test_split(whole, seed=3)[1] == test != conversations.train_test_split(whole, seed=4)[1]
    assert [len(part) for part in conversations.train_test_split(whole.take([0, 1], "two"), seed=0, share=1.0)] == [
        1,
        1,
    ]
    with pytest.raises(UserError, match=r"train\.jsonl: too few examples to hold some out"):
        conversations.train_test_split(of(TEA), seed=0)


def test_prompts_end_before_the_last_answer():
    talk = [*TALK, {"role": "user", "content": "More?"}]
    assert conversations.prompts(of(talk, TEA)) == [(tuple(TALK[:4]), "Yes, hot."), (TEA[:1], "Yes, hot.")]
    with pytest.raises(UserError, match=r"train\.jsonl: line 2: no message before the answer, so there is no prompt"):
        conversations.prompts(of(TEA, TEA[1:]))


# ------------------------------------------------------------------------------------------------------- tokenizing


def answers(encoded, chat, row):
    """The text of each run of masked tokens, with special tokens."""
    ids, mask = encoded.ids[row], encoded.assistant_mask[row]
    cuts = np.flatnonzero(np.diff(mask)) + 1
    runs = zip(np.split(ids, cuts), np.split(mask, cuts), strict=True)
    return [chat.tokenizer.decode(run.tolist(), skip_special_tokens=False) for run, chosen in runs if chosen[0]]


@pytest.mark.parametrize(("name", "end"), [("byte-level", "<|im_end|>"), ("llama-2", "</s>"), ("gemma", "</s>")])
def test_the_assistant_mask_covers_answers_and_their_stop_tokens(name, end):
    chat = CHAT_TOKENIZERS[name]
    hard = [*ASK, {"role": "assistant", "content": "  Grüße, 你好 🫖\n\n  a b "}, *ASK]
    talk = TALK if name != "llama-2" else TALK[1:]
    encoded = conversations.encode(of(talk, TEA, hard), chat, 500)
    assert [len(ids) for ids in encoded.ids] == [len(mask) for mask in encoded.assistant_mask]
    for row, messages in enumerate((talk, TEA, hard)):
        replies = [message["content"] + end for message in messages if message["role"] == "assistant"]
        assert answers(encoded, chat, row) == replies  # Llama 2's decoder removes the blank of its template
        whole = chat.encode_chat(messages, add_generation_prompt=False)
        assert encoded.ids[row].tolist() == whole[: len(encoded.ids[row])] and len(encoded.ids[row]) < len(whole) + 1
        assert encoded.ids[row].dtype == np.int32 and encoded.ids[row][-1] == 2 and encoded.assistant_mask[row][-1]
    assert encoded.lines == (1, 2, 3) and encoded.left_out == ()


def test_a_token_that_begins_before_an_answer_is_not_masked():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_level()
    assert "Ġho" in tokenizer.get_vocab()
    for trim in (False, True):  # with `trim_offsets`, the default, " ho" would begin at its `h`
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        chat = ChatTokenizer(tokenizer, template, {}, (2,), "./tiny")
        messages = [*ASK, {"role": "assistant", "content": "hot"}]
        encoded = conversations.encode(of(messages), chat, 99)
        assert answers(encoded, chat, 0) == ["t<|im_end|>"]
        assert "".join(tokenizer.decode(encoded.ids[0].tolist(), skip_special_tokens=False)).endswith(": hot<|im_end|>")
        blank = conversations.encode(of([*ASK, {"role": "assistant", "content": "Yes"}]), chat, 99)
        assert answers(blank, chat, 0) == [
            "Yes<|im_end|>"
        ]  # a blank is a token of its own here, and part of the prompt
        assert tokenizer.post_processor is not None


@pytest.mark.parametrize("inside", ["", "<|im_end|>"])
def test_the_stop_token_is_learned_even_if_the_template_does_not_mark_it(inside):
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}INSIDE"
        "{% endgeneration %}OUTSIDE{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    template = template.replace("INSIDE", inside).replace("OUTSIDE", "" if inside else "<|im_end|>")
    chat = chat_tokenizer("byte-level", template, stop_ids=(2,))
    assert answers(conversations.encode(of(TALK), chat, 99), chat, 0) == ["Yes.<|im_end|>", "Yes, hot.<|im_end|>"]


def test_an_example_that_does_not_fit_is_left_out():
    chat = CHAT_TOKENIZERS["byte-level"]
    trailing = [*TEA, {"role": "user", "content": "x" * 500}]
    whole = conversations.encode(of(TEA), chat, 999)
    fits = len(whole.ids[0])
    longer = [*TEA, ASK[0], {"role": "assistant", "content": "No."}]
    encoded = conversations.encode(of(longer, TEA, trailing, longer), chat, fits)
    assert encoded.lines == (2, 3) and encoded.left_out == (1, 4) and len(encoded) == 2
    assert encoded.ids[0].tolist() == encoded.ids[1].tolist() == whole.ids[0].tolist()
    with pytest.raises(UserError, match=rf"train\.jsonl: none of the 2 .* shortest takes {fits}: raise `max_length`"):
        conversations.encode(of(longer, TEA), chat, fits - 1)


def test_errors_of_the_template_name_the_line():
    with pytest.raises(UserError, match=r"^\./tiny: no chat template, so not a chat model; conversations need one"):
        conversations.encode(of(TEA), chat_tokenizer("byte-level", None), 99)
    refuses = "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"^train\.jsonl: line 2: \./tiny: the chat template rejects .*two turns only"):
        conversations.encode(of(TEA, TALK), chat_tokenizer("byte-level", refuses, stop_ids=(2,)), 99)
    for marks in ("", "{% generation %}{% endgeneration %}"):
        silent = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}"
        silent += "{% endif %}" + marks
        with pytest.raises(UserError, match=r"^train\.jsonl: line 1: no token begins inside an answer, as \./tiny"):
            conversations.encode(of(TEA), chat_tokenizer("byte-level", silent), 99)


def test_the_padding_token_is_the_tokenizers():
    assert (
        conversations.encode(of(TEA), chat_tokenizer("byte-level", CHATML, {"pad_token": "<|im_end|>"}), 200).pad_id
        == 2
    )
    assert conversations.encode(of(TEA), CHAT_TOKENIZERS["byte-level"], 200).pad_id == 0


# --------------------------------------------------------------------------------------------------------- batching


def encoded(lengths):
    """Ids encode their example and position; every third token and the last one belong to an answer."""
    ids = [100 + 1000 * row + np.arange(length, dtype=np.int32) for row, length in enumerate(lengths)]
    masks = [(each % 3 == 0) | (np.arange(len(each)) == len(each) - 1) for each in ids]
    return Encoded(tuple(ids), tuple(masks), tuple(range(len(ids))), pad_id=7)


def examples_in(batch, source):
    """The examples of a batch, checked token by token against its arrays."""
    found = []
    for ids, segments, positions, targets, weight in zip(*batch, strict=True):
        end = int((segments > 0).sum())
        assert (ids[end:] == 7).all() and not positions[end:].any() and not weight[end:].any()
        starts = [0, *(np.flatnonzero(np.diff(segments[:end])) + 1), end] if end else [0]
        for segment, (start, stop) in enumerate(pairwise(starts), start=1):
            example = (int(ids[start]) - 100) // 1000
            found.append(example)
            assert (segments[start:stop] == segment).all()
            assert ids[start:stop].tolist() == source.ids[example].tolist()  # neither truncated nor overlapped
            assert positions[start:stop].tolist() == list(range(stop - start))
            for place in range(start, stop):
                weighs = place + 1 < stop and source.assistant_mask[example][place + 1 - start]
                assert weight[place] == float(weighs)
                assert not weighs or targets[place] == ids[place + 1]
    return found


def same(one, other):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
SETTINGS = settings(deadline=None, max_examples=25)


@SETTINGS
@given(LENGTHS, st.integers(1, 4), st.none() | st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans())
def test_every_epoch_shows_every_example_once_and_whole(lengths, size, seed, epochs, packed):
    source = encoded(lengths)
    batches = Batches(source, size, 60, seed, epochs, packed)
    made = list(batches)
    assert len(made) == len(batches) == sum(batches.per_epoch) and len(batches.per_epoch) == epochs
    seen = [[] for _ in range(epochs)]
    for step, batch in enumerate(made):
        assert [each.dtype for each in batch] == [np.int32] * 4 + [np.float32]
        assert {each.shape for each in batch} <= conversations.shapes(batches)
        seen[batches.epoch(step)] += examples_in(batch, source)
    assert all(sorted(each) == list(range(len(lengths))) for each in seen)
    assert batches.epoch(len(batches)) == epochs
    assert conversations.shapes(batches) == {batch.input_ids.shape for batch in made}
    assert (
        conversations.shapes(batches) == {(size, 60)}
        if packed
        else conversations.shapes(batches) <= {(size, 48), (size, 60)}
    )
    held = [
        (
            int(batch.segment_ids.max(axis=1).sum()),
            int((batch.segment_ids > 0).sum()),
            int(batch.weight.sum()),
            batch.segment_ids.size,
        )
        for batch in made
    ]
    assert list(batches.counts(0)) == held and list(batches.counts(1)) == held[1:]
    totals = [sum(column) for column in zip(*held, strict=True)]
    assert totals == list(batches.count) and batches.count.tokens == epochs * sum(lengths)


@SETTINGS
@given(LENGTHS, st.integers(1, 4), st.booleans(), st.data())
def test_a_resumed_run_sees_the_same_batches(lengths, size, packed, draw):
    arguments = (encoded(lengths), size, 60, 5, 3, packed)
    whole = list(Batches(*arguments))
    step = draw.draw(st.integers(0, len(whole)))
    resumed = list(Batches(*arguments).start(step))
    assert len(resumed) == len(whole) - step
    assert all(same(one, other) for one, other in zip(resumed, whole[step:], strict=True))
    if step < len(whole):
        assert same(Batches(*arguments)[step], whole[step])
    rows = np.array(sorted(draw.draw(st.sets(st.integers(0, size - 1), min_size=1))))  # those that a host feeds
    for part, batch in zip(Batches(*arguments).start(step, rows), whole[step:], strict=True):
        assert same(part, Batch(*(column[rows] for column in batch)))


@SETTINGS
@given(st.lists(st.integers(1, 100), max_size=200))
def test_packed_rows_fit_and_none_is_superfluous(lengths):
    rows = conversations.pack(lengths, range(len(lengths)), 100)
    filled = [sum(lengths[example] for example in row) for row in rows]
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(0 < tokens <= 100 for tokens in filled)
    for row, tokens in enumerate(filled):  # no row was opened while its first example fit into another
        assert all(tokens + lengths[later[0]] > 100 for later in rows[row + 1 :])


def test_packing_leaves_less_padding():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.6, 3000), 10, 512).astype(int)
    source = Encoded(tuple(np.zeros(n, np.int32) for n in lengths), tuple(np.ones(n, bool) for n in lengths), (1,))
    packed, single = (Batches(source, 8, 512, 0, 2, packed) for packed in (True, False))
    assert packed.count.padding < 0.02 < 0.1 < single.count.padding < 0.3
    assert packed.count[:3] == single.count[:3] and len(packed) < len(single) / 3
    assert conversations.shapes(packed) == {(8, 512)} and len(conversations.shapes(single)) <= 8


@pytest.mark.parametrize("packed", [True, False])
def test_order_differs_by_epoch_and_by_seed(packed):
    def order(seed, epochs=2):
        return [batch.input_ids.tolist() for batch in Batches(encoded([9] * 64), 4, 20, seed, epochs, packed)]

    first = order(0)
    assert first == order(0) != order(1)
    assert first[: len(first) // 2] != first[len(first) // 2 :]
    assert order(None, 1) == order(None)[: len(first) // 2] == order(None)[len(first) // 2 :]


def test_the_number_of_batches_may_differ_by_epoch(monkeypatch):
    monkeypatch.setattr(conversations, "_PACKED_TOGETHER", 4)  # few enough that the epochs differ
    batches = Batches(encoded([30, 30, 20, 40, 60, 10, 50, 25, 35, 15, 45, 5] * 2), 1, 60, 1, 8)
    assert len(set(batches.per_epoch)) > 1
    assert [batches.epoch(step) for step in range(len(batches))] == [
        epoch for epoch, steps in enumerate(batches.per_epoch) for _ in range(steps)
    ]


def test_there_is_no_batch_beyond_the_last():
    batches = Batches(encoded([5, 6]), 2, 60, 0)
    assert len(batches) == 1 and list(batches.start(1)) == []
    for step in (-1, 1):
        with pytest.raises(IndexError, match=f"step {step} of 1"):
            batches[step]
    with pytest.raises(IndexError, match="step 2 of 1"):
        batches.start(2)


def test_grain_does_not_print_the_arrays():
    """grain names a pipeline step by the repr of its function, and so of the object that a method is bound to."""
    assert len(repr(Batches(encoded([5] * 500), 2, 60, 0)._make)) < 300


def test_an_example_longer_than_a_row():
    with pytest.raises(UserError, match="an example of 61 tokens does not fit into rows of 60"):
        Batches(encoded([5, 61]), 2, 60, 0)


# ---------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("#### 18.00", "18"),
        ("#### $1,234.50 a week, in 2 weeks twice that", "1234.5"),
        ("#### 5\nNo, wait: #### 6.", "6"),
        ("####-3", "-3"),
        ("#### -$3", "-3"),
        ("#### $-3.10", "-3.1"),
        ("The answer is 1,000,000.", "1000000"),
        ("It is 1,00,000", "100000"),
        ("choose 1,2,3", "3"),
        ("10-3", "3"),
        ("(10)-3", "3"),
        ("so −3 degrees", "-3"),
        ("-0.0", "0"),
        ("007", "7"),
        (".50", "0.5"),
        ("so ...5", "5"),
        ("20%.", "20"),
        ("200 km", "200"),
        ("0", "0"),
        ("12345678901234567890123456789012345678901.10", "12345678901234567890123456789012345678901.1"),
        ("18 at first, #### none", "18"),
        ("no number", None),
        ("####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert scoring.final_number(text) == number
