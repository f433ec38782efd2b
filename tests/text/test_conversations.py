"""Conversations: reading, which tokens are answers, packing, batches, and the number an answer comes to."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from jpeft.errors import UserError
from jpeft.text import conversations as talks
from jpeft.text import scoring
from jpeft.text.chat_template import ChatTokenizer
from jpeft.text.conversations import Batch, Batches, Conversations, Encoded
from tests.test_chat import ASK, CHATML, GEMMA, LLAMA_2, TALK, byte_level, codec_of, sentencepiece

TEA = ({"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes, hot."})
# As Llama-2's: no head before an answer, and a blank between the two.
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# As Gemma's (`<s>` for its `<start_of_turn>`): the token that ends a turn is followed by a line break.
TURNS = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CODECS = {
    "byte-level": codec_of("byte-level", stop_ids=(2,)),
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


def test_all_forms_become_messages_and_may_be_mixed(tmp_path):
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
    read = talks.read(path)
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
        ("[1]", "line 2: expected an object, found list"),
        ({"text": "a", "label": 1}, "line 2: the keys are 'text', 'label'; expected 'messages', 'prompt' and"),
        ({"prompt": "a"}, "line 2: the keys are 'prompt'; expected"),
        (
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            "line 2: which is meant, prompt and completion or question and answer",
        ),
        ({}, "line 2: the keys are none; expected"),
        ({"messages": "tea"}, "line 2: 'messages' should be a list, found \"tea\""),
        (
            {"messages": ["tea"]},
            r"line 2: 'messages\[0\]' should be an object with 'role' and 'content', found \"tea\"",
        ),
        ({"messages": [{"role": "user"}]}, "should be an object with 'role' and 'content'"),
        (turn("bot", "Yes."), r"line 2: the role \"bot\" in 'messages\[1\]' is none of system, user, assistant, tool"),
        (turn([1], "Yes."), r"line 2: the role \[1\] in 'messages\[1\]' is none of"),
        (turn("assistant", None), r"line 2: 'messages\[1\].content' should be a text, found null"),
        (turn("user", [{"type": "text"}]), r"line 2: 'messages\[1\].content' should be a text, found \[\{"),
        (turn("assistant", " \n"), r"line 2: the text in 'messages\[1\].content' is empty"),
        (turn("user", "Hot?"), "line 2: no message of the assistant in 'messages'"),
        ({"messages": []}, "line 2: no message of the assistant"),
        ({"prompt": "a", "completion": ""}, "line 2: the text in 'completion' is empty"),
        ({"instruction": "a", "output": "\n"}, "line 2: the text in 'output' is empty"),
        ({"instruction": "a", "input": [1], "output": "b"}, r"line 2: 'input' should be a text, found \[1\]"),
        ({"question": "a", "answer": 4}, "line 2: 'answer' should be a text, found 4"),
        ({"question": "a\ud800", "answer": "4"}, "line 2: 'question' holds half a surrogate pair"),
        (turn("assistant", "a\udfff"), r"line 2: 'messages\[1\].content' holds half a surrogate pair"),
        (turn("user", "a\udfff"), r"line 2: 'messages\[1\]' holds half a surrogate pair"),
        ({"messages": TALK, "tools": [{"name": "kettle"}]}, "line 2: 'tools' are not supported"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path, row, message):
    path = write(tmp_path, {"messages": TALK, "tools": None}, row)
    with pytest.raises(UserError, match=message) as caught:
        talks.read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("a.json", "expected a .jsonl file"), ("a.jsonl", "the file is empty; expected a row")]
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        talks.read(write(tmp_path, " ", name=name))


def test_held_out_examples_are_of_no_training():
    whole = of(*[TEA] * 30)
    train, test = talks.train_test_split(whole, seed=3)
    assert len(test) == 3 and sorted(train.lines + test.lines) == list(whole.lines)
    assert talks.train_test_split(whole, seed=3)[1] == test != talks.train_test_split(whole, seed=4)[1]
    assert [len(part) for part in talks.train_test_split(whole.take([0, 1], "two"), seed=0, share=1.0)] == [1, 1]
    with pytest.raises(UserError, match=r"train\.jsonl: too few examples to hold some out"):
        talks.train_test_split(of(TEA), seed=0)


def test_prompts_end_before_the_last_answer():
    talk = [*TALK, {"role": "user", "content": "More?"}]
    assert talks.prompts(of(talk, TEA)) == [(tuple(TALK[:4]), "Yes, hot."), (TEA[:1], "Yes, hot.")]
    with pytest.raises(UserError, match=r"train\.jsonl: line 2: nothing stands before the answer"):
        talks.prompts(of(TEA, TEA[1:]))


# ------------------------------------------------------------------------------------------------------- tokenizing


def answers(encoded, codec, row):
    """The text of each run of answer tokens, special tokens and all."""
    ids, answer = encoded.ids[row], encoded.answer[row]
    cuts = np.flatnonzero(np.diff(answer)) + 1
    runs = zip(np.split(ids, cuts), np.split(answer, cuts), strict=True)
    return [codec.tokenizer.decode(run.tolist(), skip_special_tokens=False) for run, chosen in runs if chosen[0]]


@pytest.mark.parametrize(("name", "end"), [("byte-level", "<|im_end|>"), ("llama-2", "</s>"), ("gemma", "</s>")])
def test_the_tokens_of_answers_are_the_assistants_text_and_its_end(name, end):
    codec = CODECS[name]
    hard = [*ASK, {"role": "assistant", "content": "  Grüße, 你好 🫖\n\n  a b "}, *ASK]
    talk = TALK if name != "llama-2" else TALK[1:]
    encoded = talks.encode(of(talk, TEA, hard), codec, 500)
    assert [len(ids) for ids in encoded.ids] == [len(answer) for answer in encoded.answer]
    for row, messages in enumerate((talk, TEA, hard)):
        replies = [message["content"] + end for message in messages if message["role"] == "assistant"]
        assert answers(encoded, codec, row) == replies  # Llama-2's decoder takes off the blank of its template
        whole = codec.encode_chat(messages, add_generation_prompt=False)
        assert encoded.ids[row].tolist() == whole[: len(encoded.ids[row])] and len(encoded.ids[row]) < len(whole) + 1
        assert encoded.ids[row].dtype == np.int32 and encoded.ids[row][-1] == 2 and encoded.answer[row][-1]
    assert encoded.lines == (1, 2, 3) and encoded.left_out == ()


def test_a_token_that_begins_before_an_answer_is_not_of_it():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_level()
    assert "Ġho" in tokenizer.get_vocab()
    for trim in (False, True):  # `trim_offsets`, the default, would have " ho" begin at its `h`
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        codec = ChatTokenizer(tokenizer, template, {}, (2,), "./tiny")
        messages = [*ASK, {"role": "assistant", "content": "hot"}]
        encoded = talks.encode(of(messages), codec, 99)
        assert answers(encoded, codec, 0) == ["t<|im_end|>"]
        assert "".join(tokenizer.decode(encoded.ids[0].tolist(), skip_special_tokens=False)).endswith(": hot<|im_end|>")
        blank = talks.encode(of([*ASK, {"role": "assistant", "content": "Yes"}]), codec, 99)
        assert answers(blank, codec, 0) == ["Yes<|im_end|>"]  # a blank alone is a token here, and the prompt's
        assert tokenizer.post_processor is not None


@pytest.mark.parametrize("inside", ["", "<|im_end|>"])
def test_the_end_of_a_turn_is_learnt_though_the_template_leaves_it_out(inside):
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}INSIDE"
        "{% endgeneration %}OUTSIDE{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    template = template.replace("INSIDE", inside).replace("OUTSIDE", "" if inside else "<|im_end|>")
    codec = codec_of("byte-level", template, stop_ids=(2,))
    assert answers(talks.encode(of(TALK), codec, 99), codec, 0) == ["Yes.<|im_end|>", "Yes, hot.<|im_end|>"]


def test_an_example_whose_answers_do_not_fit_is_left_out_whole():
    codec = CODECS["byte-level"]
    trailing = [*TEA, {"role": "user", "content": "x" * 500}]
    whole = talks.encode(of(TEA), codec, 999)
    fits = len(whole.ids[0])
    longer = [*TEA, ASK[0], {"role": "assistant", "content": "No."}]
    encoded = talks.encode(of(longer, TEA, trailing, longer), codec, fits)
    assert encoded.lines == (2, 3) and encoded.left_out == (1, 4) and len(encoded) == 2
    assert encoded.ids[0].tolist() == encoded.ids[1].tolist() == whole.ids[0].tolist()
    with pytest.raises(UserError, match=rf"train\.jsonl: none of the 2 .* shortest takes {fits}: raise --max-length"):
        talks.encode(of(longer, TEA), codec, fits - 1)


def test_what_the_template_cannot_do_is_said_with_the_line():
    with pytest.raises(UserError, match=r"^\./tiny: no chat template, so no chat model; conversations need one"):
        talks.encode(of(TEA), codec_of("byte-level", None), 99)
    refuses = "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"^train\.jsonl: line 2: \./tiny: the chat template refuses .*two turns only"):
        talks.encode(of(TEA, TALK), codec_of("byte-level", refuses, stop_ids=(2,)), 99)
    for marks in ("", "{% generation %}{% endgeneration %}"):
        silent = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}"
        silent += "{% endif %}" + marks
        with pytest.raises(UserError, match=r"^train\.jsonl: line 1: an answer has no token of its own, as \./tiny"):
            talks.encode(of(TEA), codec_of("byte-level", silent), 99)


def test_padding_is_the_tokenizers_own():
    assert talks.encode(of(TEA), codec_of("byte-level", CHATML, {"pad_token": "<|im_end|>"}), 200).pad_id == 2
    assert talks.encode(of(TEA), CODECS["byte-level"], 200).pad_id == 0


# --------------------------------------------------------------------------------------------------------- batching


def encoded(lengths):
    """Each example's ids tell which it is and where in it they stand; every third token and the last is an answer's."""
    ids = [100 + 1000 * row + np.arange(length, dtype=np.int32) for row, length in enumerate(lengths)]
    answer = [(each % 3 == 0) | (np.arange(len(each)) == len(each) - 1) for each in ids]
    return Encoded(tuple(ids), tuple(answer), tuple(range(len(ids))), pad_id=7)


def examples_in(batch, source):
    """The examples of a batch, each checked token by token against the batch's arrays."""
    found = []
    for ids, segments, positions, targets, weight in zip(*batch, strict=True):
        end = int((segments > 0).sum())
        assert (ids[end:] == 7).all() and not positions[end:].any() and not weight[end:].any()
        starts = [0, *(np.flatnonzero(np.diff(segments[:end])) + 1), end] if end else [0]
        for segment, (start, stop) in enumerate(pairwise(starts), start=1):
            example = (int(ids[start]) - 100) // 1000
            found.append(example)
            assert (segments[start:stop] == segment).all()
            assert ids[start:stop].tolist() == source.ids[example].tolist()  # whole, so neither cut nor overlapped
            assert positions[start:stop].tolist() == list(range(stop - start))
            for place in range(start, stop):
                weighs = place + 1 < stop and source.answer[example][place + 1 - start]
                assert weight[place] == float(weighs)
                assert not weighs or targets[place] == ids[place + 1]
    return found


def same(one, other):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
SETTINGS = settings(deadline=None, max_examples=40)


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
        assert {each.shape for each in batch} <= talks.shapes(batches)
        seen[batches.epoch(step)] += examples_in(batch, source)
    assert all(sorted(each) == list(range(len(lengths))) for each in seen)
    assert batches.epoch(len(batches)) == epochs
    assert talks.shapes(batches) == {batch.input_ids.shape for batch in made}
    assert talks.shapes(batches) == {(size, 60)} if packed else talks.shapes(batches) <= {(size, 48), (size, 60)}
    held = [(int(batch.segment_ids.max(axis=1).sum()), int((batch.segment_ids > 0).sum()), int(batch.weight.sum()),
             batch.segment_ids.size) for batch in made]  # fmt: skip
    assert list(batches.counts(0)) == held and list(batches.counts(1)) == held[1:]
    totals = [sum(column) for column in zip(*held, strict=True)]
    assert totals == list(batches.count) and batches.count.tokens == epochs * sum(lengths)


@SETTINGS
@given(LENGTHS, st.integers(1, 4), st.booleans(), st.data())
def test_the_batch_of_a_step_does_not_depend_on_what_ran_before(lengths, size, packed, draw):
    arguments = (encoded(lengths), size, 60, 5, 3, packed)
    whole = list(Batches(*arguments))
    step = draw.draw(st.integers(0, len(whole)))
    resumed = list(Batches(*arguments).start(step))
    assert len(resumed) == len(whole) - step
    assert all(same(one, other) for one, other in zip(resumed, whole[step:], strict=True))
    if step < len(whole):
        assert same(Batches(*arguments)[step], whole[step])
    rows = np.array(sorted(draw.draw(st.sets(st.integers(0, size - 1), min_size=1))))  # a host's own
    for part, batch in zip(Batches(*arguments).start(step, rows), whole[step:], strict=True):
        assert same(part, Batch(*(column[rows] for column in batch)))


@SETTINGS
@given(st.lists(st.integers(1, 100), max_size=200))
def test_rows_hold_what_fits_and_none_could_be_spared(lengths):
    rows = talks.pack(lengths, range(len(lengths)), 100)
    filled = [sum(lengths[example] for example in row) for row in rows]
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(0 < tokens <= 100 for tokens in filled)
    for row, tokens in enumerate(filled):  # no row was begun while its first example fitted into another
        assert all(tokens + lengths[later[0]] > 100 for later in rows[row + 1 :])


def test_packing_fills_rows_where_padding_wastes_them():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.6, 3000), 10, 512).astype(int)
    source = Encoded(tuple(np.zeros(n, np.int32) for n in lengths), tuple(np.ones(n, bool) for n in lengths), (1,))
    packed, single = (Batches(source, 8, 512, 0, 2, packed) for packed in (True, False))
    assert packed.count.padding < 0.02 < 0.1 < single.count.padding < 0.3
    assert packed.count[:3] == single.count[:3] and len(packed) < len(single) / 3
    assert talks.shapes(packed) == {(8, 512)} and len(talks.shapes(single)) <= 8


@pytest.mark.parametrize("packed", [True, False])
def test_order_differs_by_epoch_and_by_seed(packed):
    def order(seed, epochs=2):
        return [batch.input_ids.tolist() for batch in Batches(encoded([9] * 64), 4, 20, seed, epochs, packed)]

    first = order(0)
    assert first == order(0) != order(1)
    assert first[: len(first) // 2] != first[len(first) // 2 :]
    assert order(None, 1) == order(None)[: len(first) // 2] == order(None)[len(first) // 2 :]


def test_the_number_of_batches_may_differ_by_epoch(monkeypatch):
    monkeypatch.setattr(talks, "_PACKED_TOGETHER", 4)  # so few that the packings differ
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


def test_the_first_batch_does_not_wait_for_the_arrays_to_be_printed():
    """grain names a step of its pipeline by the repr of the function, and so by that of whom it is bound to."""
    assert len(repr(Batches(encoded([5] * 500), 2, 60, 0)._lay_out)) < 300


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
