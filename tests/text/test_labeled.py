"""Labeled texts: reading, labels, tokenizing, and batches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jpeft.errors import UserError
from jpeft.text import batching, labeled, reading


@pytest.fixture
def folder(tmp_path):
    """A model folder with a tokenizer of words, which adds [CLS] (2) and [SEP] (3)."""
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "tea", "stale"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_padding(length=200)  # as all-MiniLM's: it must be disabled
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def encoded(lengths, max_length=128):
    ids = tuple(np.full(length, 10 + row, np.int32) for row, length in enumerate(lengths))
    return labeled.Encoded(ids, np.arange(len(lengths), dtype=np.int32) % 3, max_length, 0)


# ---------------------------------------------------------------------------------------------------------- reading


def test_csv_and_jsonl_give_the_same_examples(tmp_path):
    rows = [('good "tea", twice\na day', "up"), ("stale\u2028tea", "down"), ("Grüße 🫖", "up")]
    quoted = "".join(f'"{text.replace(chr(34), chr(34) * 2)}",7,{label}\r\n' for text, label in rows)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + f"review,id,stars\r\n{quoted}".encode())
    lines = [json.dumps({"review": text, "id": 7, "stars": label}, ensure_ascii=False) for text, label in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    from_csv, from_jsonl = (labeled.read(tmp_path / name, "review", "stars") for name in ("a.csv", "a.jsonl"))
    assert from_csv.texts == from_jsonl.texts == tuple(text for text, _ in rows)
    assert from_csv.labels == from_jsonl.labels == ("up", "down", "up")
    assert from_csv.lines == (3, 4, 5) and from_jsonl.lines == (1, 3, 5)


def test_a_json_array_gives_the_rows_of_jsonl(tmp_path):
    rows = [{"text": f"tea {index}\u2028", "label": index % 2} for index in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text("\ufeff\n" + json.dumps(rows, indent=1).replace("\n", "\r\n"))
    one, other = (labeled.read(tmp_path / name, "text", "label") for name in ("a.json", "a.jsonl"))
    assert (one.texts, one.labels) == (other.texts, other.labels) and one.lines == (3, 7, 11)
    (tmp_path / "b.json").write_text((tmp_path / "a.jsonl").read_text())  # rows, one after the other
    assert labeled.read(tmp_path / "b.json", "text", "label").lines == (1, 2, 3)


def test_one_column_is_not_both_text_and_label(tmp_path):
    with pytest.raises(UserError, match="the column 'text' cannot be both the text and the label"):
        labeled.read(tmp_path / "a.csv", "text", "text")


def test_columns_that_are_not_read_are_listed(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,label,weight\n1,tea,up,0.5\n2,hot,down,1\n")
    read = labeled.read(tmp_path / "a.csv", "text", "label")
    assert read.unused == read.take([1], "b").unused == ("id", "weight")


def test_json_numbers_give_the_labels_of_csv(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": true}\n')
    (tmp_path / "a.csv").write_text("text,label\na,1\nb, true\n")
    found = [labeled.read(tmp_path / name, "text", "label").labels for name in ("a.jsonl", "a.csv")]
    assert found == [("1", "true"), ("1", "true")]


def test_a_long_text_is_read_completely(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "good tea " * 50_000 + ",up\n")
    assert len(labeled.read(tmp_path / "a.csv", "text", "label").texts[0]) == 450_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
        ("a.csv", b"text,label\n", "no examples"),
        ("a.csv", b"\ntext,label\n", "the first line is empty; expected the names of the columns"),
        ("a.csv", b"title,stars\nx,1\n", r"no column 'text' at line 2; the columns are 'title', 'stars'"),
        ("a.csv", b"text,stars\nx,1\n", "no column 'label'.*choose with `text` and `label`"),
        ("a.csv", b"text,text\nx,1\n", "names the column 'text' twice"),
        ("a.csv", b"text,label\ngood, tea,up\n", "line 2 has 3 fields, the header has 2"),
        ("a.csv", b'text,label\n"good tea,up\n', "malformed CSV near line 2"),
        ("a.csv", b"text,label\ntea,up\n ,up\n", "line 3: the text in 'text' is empty"),
        ("a.csv", b"text,label\ntea,\n", "line 2: expected a label in 'label', got \"\""),
        ("a.csv", b"text,label\ntea,up\ncaf\xe9,up\n", "not UTF-8: byte 0xe9 at offset 21, line 3"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"label": "b"}\n', "no column 'text' at line 1; the columns are 'label'"),
        ("a.jsonl", b'{"text": 3, "label": "b"}\n', "line 1: 'text' must be text, got 3"),
        ("a.jsonl", b'{"text": "a", "label": null}\n', "line 1: expected a label in 'label', got null"),
        ("a.jsonl", b'{"text": "a", "label": [1]}\n', r"got \[1\]"),
        ("a.jsonl", rb'{"text": "a\ud800", "label": "b"}', "half a surrogate pair"),
        ("a.jsonl", rb'{"text": "a", "label": "b\ud800"}', "'label' contains half a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "label": NaN}', "expected a label in 'label', got NaN"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        (
            "a.csv",
            "text,label\ntea,up\n".encode("utf-16"),
            "is UTF-16, expected UTF-8; convert the file: iconv -f utf-16",
        ),
        ("a.tsv", b"text\tlabel\n", "expected a .csv, .jsonl or .json file"),
        (
            "a.csv",
            b"text,label\ntea,up\ntext,label\nhot,down\n",
            "line 3 repeats the header; are these two files in one",
        ),
        ("a.csv", b"text,label\ntea,nan\n", "line 2: expected a label in 'label', got \"nan\""),
        ("a.jsonl", b'{"text": "a", "label": "b", "text": "c"}\n', "line 1 has the key 'text' twice"),
        ("a.jsonl", b'[{"text": "a", "label": "b"}]\n', "got list; a file that is one JSON array has the suffix .json"),
        ("a.json", b'[{"text": "a", "label": "b"},\n 7]', "line 2: expected a JSON object, got int"),
        (
            "a.json",
            b'[{"text": "a", "label": "b"}\n {"text": "c"}]',
            "line 2 is not JSON: expected ',' and another row",
        ),
        ("a.json", b'[{"text": "a", "label": "b"},\n]', "line 2 is not JSON: expected ',' and another row"),
        ("a.json", b'[{"text": "a", "label": "b"}', "the JSON array has no end; the file is cut off"),
        ("a.json", b'[{"text": "a", "label": "b"}] {"text": "c"}', "text after the end of the JSON array"),
        ("a.json", b'[{"text": "a",\n "label": "b"},\n {"text": ]', "the row at line 3 is not JSON"),
        ("a.json", b"[]", "no examples"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        labeled.read(tmp_path / name, "text", "label")
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: No such file"):
        labeled.read(tmp_path / "none.csv", "text")


# ----------------------------------------------------------------------------------------------------------- labels


def examples(labels, source="train.csv"):
    return labeled.Examples(
        source, tuple(map(str, range(len(labels)))), tuple(labels), tuple(range(2, len(labels) + 2))
    )


def test_classes_are_sorted_and_numbers_by_value():
    assert labeled.label_names(examples(["10", "9", "b", "9", "-1"])) == ("9", "10", "-1", "b")
    assert labeled.label_ids(examples(["b", "a"]), ("a", "b")).tolist() == [1, 0]


def test_one_class_only():
    with pytest.raises(UserError, match=r"train\.csv: every example has the label 'up'; at least two classes"):
        labeled.label_names(examples(["up", "up"]))


def test_every_example_with_its_own_label_is_an_error():
    with pytest.raises(UserError, match="30 examples, each with a label of its own"):
        labeled.label_names(examples([str(n) for n in range(30)]))


@pytest.mark.parametrize("pair", [("1", "1.0"), ("1", "01"), ("0.5", ".5"), ("1000", "1e3")])
def test_one_number_in_two_spellings_is_not_two_classes(pair):
    with pytest.raises(UserError, match="are the same number, which would be two classes") as caught:
        labeled.label_names(examples([*pair, "7"]))
    assert repr(pair[0]) in str(caught.value) and repr(pair[1]) in str(caught.value)
    assert labeled.label_names(examples(["up", "1", "2.5"])) == ("1", "2.5", "up")


def test_labels_unseen_in_training():
    with pytest.raises(UserError, match=r"test\.csv: 3 of 4 .*: 'meh', 'new' \(first 'meh' at line 3"):
        labeled.label_ids(examples(["up", "meh", "new", "meh"], "test.csv"), ("down", "up"))


def test_every_class_is_split_and_the_parts_are_disjoint():
    whole = examples(["a"] * 40 + ["b"] * 11 + ["c"])
    train, test = labeled.train_test_split(whole, seed=3)
    assert sorted(train.texts + test.texts) == sorted(whole.texts)
    assert (test.labels.count("a"), test.labels.count("b"), test.labels.count("c")) == (4, 1, 0)
    assert labeled.train_test_split(whole, seed=3)[1] == test != labeled.train_test_split(whole, seed=4)[1]


def test_too_few_to_hold_out():
    with pytest.raises(UserError, match="too few examples to hold some out"):
        labeled.train_test_split(examples(["a", "b"]), seed=0)


# ------------------------------------------------------------------------------------------------------- tokenizing


def test_texts_are_truncated_but_not_padded(folder):
    tokenizer = reading.load_tokenizer(folder, 5)
    found = labeled.encode(["good tea", "good tea stale tea good", "green"], tokenizer, 5)
    assert [ids.tolist() for ids in found.ids] == [[2, 4, 5, 3], [2, 4, 5, 6, 3], [2, 1, 3]] and found.truncated == 1


def test_only_the_beginning_of_a_long_text_is_tokenized(folder):
    tokenizer, seen = reading.load_tokenizer(folder, 16), []

    class Watched:
        def encode_batch(self, texts):
            seen.extend(map(len, texts))
            return tokenizer.encode_batch(texts)

    (ids,) = labeled.encode(["good tea " * 12_000], Watched(), 16).ids
    assert ids.tolist() == [2, *([4, 5] * 7), 3]
    assert seen == [16 * 64]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no tokenizer.json; write one with transformers"), ("{", "not a tokenizer")]
)
def test_a_folder_without_a_tokenizer(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        reading.load_tokenizer(tmp_path, 16)


def test_no_room_for_text(folder):
    with pytest.raises(UserError, match="`max_length` 1 leaves no room"):
        reading.load_tokenizer(folder, 1)


def test_positions_of_roberta_begin_after_the_padding():
    class Config:
        max_position_embeddings, model_type, pad_token_id = 514, "xlm-roberta", 1

    assert labeled.length_limit(Config) == 512
    assert labeled.length_limit(object()) == 512


# --------------------------------------------------------------------------------------------------------- batching

lengths = st.lists(st.integers(1, 128), min_size=1, max_size=90)


@settings(deadline=None, max_examples=35)
@given(lengths, st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_every_epoch_shows_every_example_once(lengths, size, seed, epochs):
    batches = labeled.Batches(encoded(lengths), size, seed, epochs)
    made = list(batches)
    assert len(made) == len(batches) == sum(batches.per_epoch) and len(batches.per_epoch) == epochs
    per_epoch = len(made) // epochs
    for epoch in range(epochs):
        rows = np.concatenate([b.rows for b in made[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(rows[rows >= 0]) == list(range(len(lengths)))


@settings(deadline=None, max_examples=35)
@given(lengths, st.integers(1, 9), st.data())
def test_a_resumed_run_sees_the_same_batches(lengths, size, draw):
    batches = labeled.Batches(encoded(lengths), size, seed=5, epochs=3)
    step = draw.draw(st.integers(0, len(batches)))
    resumed, whole = list(batches.start(step)), list(batches)[step:]
    assert len(resumed) == len(whole)
    for one, other in zip(resumed, whole, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@settings(deadline=None, max_examples=35)
@given(lengths, st.integers(1, 9))
def test_rows_are_padded_and_empty_rows_have_no_weight(lengths, size):
    source = encoded(lengths)
    for batch in labeled.Batches(source, size, seed=0):
        assert batch.input_ids.shape == batch.attention_mask.shape == (size, batch.input_ids.shape[1])
        assert batch.input_ids.shape[1] in (48, 80, 128)
        for slot, row in enumerate(batch.rows):
            ids = source.ids[row] if row >= 0 else np.zeros(1, np.int32)
            assert batch.weight[slot] == float(row >= 0)
            assert batch.attention_mask[slot].sum() == len(ids)
            assert batch.input_ids[slot, : len(ids)].tolist() == ids.tolist()
            assert not batch.input_ids[slot, len(ids) :].any()
            if row >= 0:
                assert batch.labels[slot] == source.labels[row]


def test_order_differs_by_epoch_and_by_seed():
    def rows(seed):
        return [batch.rows.tolist() for batch in labeled.Batches(encoded([9] * 64), 8, seed, epochs=2)]

    assert rows(0) == rows(0) != rows(1)
    assert rows(0)[:8] != rows(0)[8:]


def test_sorting_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(5, 128, 2000)
    batches = list(labeled.Batches(encoded(lengths), 16, seed=0))
    padded = sum(batch.input_ids.size for batch in batches)
    assert padded < 1.35 * lengths.sum() < 0.75 * 2000 * 128


def test_evaluation_is_one_epoch_sorted_by_length():
    batches = labeled.Batches(encoded([50, 3, 70, 4]), 2)
    assert [batch.rows.tolist() for batch in batches] == [[1, 3], [0, 2]]
    assert [batch.input_ids.shape for batch in batches] == [(2, 48), (2, 80)]


@pytest.mark.parametrize(("length", "limit", "padded"), [(1, 128, 48), (49, 128, 80), (81, 100, 100), (32, 32, 32)])
def test_buckets(length, limit, padded):
    assert batching.bucket(length, limit) == padded
