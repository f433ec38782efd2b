"""The server, asked by OpenAI's client over loopback: answers as `generate` gives them, adapters, errors, its end."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import uvicorn

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.errors import UserError
from jpeft.files import read_safetensors, serialize
from jpeft.recipes import serve
from jpeft.serving.http.app import make_app
from jpeft.serving.http.bodies import read_ask
from jpeft.serving.http.errors import HTTPError
from jpeft.serving.http.folder import AdapterFolder
from jpeft.serving.http.texts import TextUntil
from jpeft.text import chat_template
from tests.folders import write_bert, write_llama
from tests.text.tiny_tokenizers import chat_tokenizer

pytestmark = [
    pytest.mark.usefixtures("quick_compiles_of_module"),
    # Sockets that are still open when a server ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
METHODS = {
    "fr": jpeft.LoRA(rank=2, targets="all-linear", init_weights="random"),
    "it": jpeft.LoRA(rank=3, alpha=9.0, targets=r".*q_proj", init_weights="random"),
    "ia3": jpeft.IA3(targets=r".*(k_proj|v_proj)"),
    "prefix": jpeft.PrefixTuning(length=3, init_std=30.0),
}
SIZES = serve.Sizes(rows=4, capacity=100, slots=8, queue=64, chunk=32)


def adapter_of(peft, params, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype),
        jax.eval_shape(peft.init, jax.random.key(0), params),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model (`llama`), and adapters of it: those served from the start, and others (`more`)."""
    folder = tmp_path_factory.mktemp("home")
    model, params = write_llama(folder / "llama", 32, 48, scale=20)
    for place, (name, method) in enumerate(METHODS.items()):
        peft = method.bind(model, params, IDS)
        scale = 30.0 if name == "prefix" else 3.0
        jpeft.save(folder / "adapters" / name, peft, adapter_of(peft, params, place, scale), params)
    peft = jpeft.LoRA(rank=2, targets=r".*(q|v)_proj").bind(model, params, IDS)
    jpeft.hf.save(folder / "adapters" / "hf", peft, adapter_of(peft, params, 9), params)
    more = folder / "more"
    fr = METHODS["fr"].bind(model, params, IDS)
    jpeft.save(more / "late", fr, adapter_of(fr, params, 20), params)
    large = jpeft.LoRA(rank=6, targets=r".*q_proj").bind(model, params, IDS)
    jpeft.save(more / "large", large, adapter_of(large, params, 21), params)
    other = jax.tree.map(lambda x: x + 1, params)
    jpeft.save(more / "other", fr, adapter_of(fr, params, 22), other)
    nan = jax.tree.map(lambda x: x * jnp.nan, adapter_of(fr, params, 23))
    jpeft.save(more / "nan", fr, nan, params)
    write_bert(folder / "bert")
    return folder


@contextlib.contextmanager
def serving(app):
    """The address of an application that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def served(home):
    """`(Served, AdapterFolder)`: one engine for the whole file, which each server's end would close."""
    folder = home / "served"
    shutil.copytree(home / "adapters", folder)
    return serve.open_served(str(home / "llama"), folder, SIZES)


@pytest.fixture(scope="module")
def address(served):
    with serving(make_app(*served)) as at:
        yield at


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@functools.cache
def load(folder):
    return *models.load(folder, scan_layers=False), chat_template.read(folder)


@functools.cache
def adapter(folder):
    """A method and its adapter, on the model with unrolled layers."""
    model, params, _ = load(folder.parents[1] / "llama")
    if (folder / "adapter_config.json").is_file():
        return jpeft.hf.load(folder, model, params, IDS)
    stacked = models.load(folder.parents[1] / "llama")
    return models.unroll(*stacked, *jpeft.load(folder, *stacked, IDS))[2:]


def alone(home, prompt, name=None, new=6, stops=True, **settings):
    """The text of `jpeft.generate`, and its tokens."""
    model, params, tokenizer = load(home / "llama")
    ids = tokenizer.encode_chat(prompt) if isinstance(prompt, list) else tokenizer.encode(prompt)
    if name is not None:
        folder = home / "adapters" / name
        settings["peft"], settings["adapter"] = adapter(folder if folder.exists() else home / "more" / name)
    (tokens,) = jpeft.generate(
        model, params, [ids], max_new_tokens=new, stop_ids=tokenizer.stop_ids, vocabulary=tokenizer.size,
        min_prompt_length=64, **settings,
    )  # fmt: skip
    return tokenizer.decode(tokens)


def user(text):
    return [{"role": "user", "content": text}]


def chat(client, name, text="hi there", **more):
    given = {"temperature": 0, "max_tokens": 6, **more}
    return client.chat.completions.create(model=name, messages=user(text), **given)


# --- answers ---


def test_models_are_the_base_and_the_adapters(client, served):
    found = {model.id: model for model in client.models.list()}
    assert [*found] == ["llama", "fr", "hf", "ia3", "it", "prefix"]
    assert found["fr"].parent == "llama" and found["llama"].parent is None
    assert client.models.retrieve("hf").id == "hf"
    with pytest.raises(openai.NotFoundError, match="'de' does not exist"):
        client.models.retrieve("de")


@pytest.mark.parametrize("name", ["llama", "fr", "hf", "it", "ia3", "prefix"])
def test_a_chat_under_each_adapter_is_that_of_generate(client, home, name):
    want = alone(home, user("hi there"), None if name == "llama" else name)
    answer = chat(client, name)
    (choice,) = answer.choices
    assert choice.message.content == want and choice.message.role == "assistant"
    assert answer.model == name and answer.object == "chat.completion"
    _, _, tokenizer = load(home / "llama")
    assert answer.usage.prompt_tokens == len(tokenizer.encode_chat(user("hi there")))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == 6 else "stop")
    assert name == "llama" or want != alone(home, user("hi there"))


def test_a_stream_gives_the_same_text_in_pieces(client):
    whole = chat(client, "fr", max_tokens=20)
    chunks = list(chat(client, "fr", max_tokens=20, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[0].object == "chat.completion.chunk"
    assert [p.choices[0].finish_reason for p in pieces if p.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert last.choices == [] and last.usage == whole.usage and len({p.id for p in chunks}) == 1


def test_completions_of_several_prompts(client, home):
    ids = load(home / "llama")[2].encode("hi there")
    for prompt, wants in (
        ("hi there", ["hi there"]),
        (ids, ["hi there"]),
        (["hi there", "a", "good day"], ["hi there", "a", "good day"]),
        ([ids, ids], ["hi there"] * 2),
    ):
        answer = client.completions.create(model="it", prompt=prompt, temperature=0, max_tokens=6)
        assert [c.text for c in answer.choices] == [alone(home, want, "it") for want in wants]
        assert [c.index for c in answer.choices] == [*range(len(wants))] and answer.object == "text_completion"
    pieces = client.completions.create(model="it", prompt=["hi there", "a"], temperature=0, max_tokens=6, stream=True)
    texts = ["", ""]
    for piece in pieces:
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [alone(home, "hi there", "it"), alone(home, "a", "it")]


def test_samples_depend_on_the_seed(client, home):
    warm = {"temperature": 20.0, "top_p": 0.9, "extra_body": {"top_k": 50}}
    first, again, other = (chat(client, "llama", seed=seed, **warm).choices[0].message.content for seed in (1, 1, 2))
    key = jax.random.key(1)
    assert first == again == alone(home, user("hi there"), temperature=20.0, top_p=0.9, top_k=50, key=key) != other
    many = chat(client, "llama", seed=1, n=2, **warm)
    assert [c.message.content for c in many.choices] == [first, other]
    assert many.usage.prompt_tokens == chat(client, "llama").usage.prompt_tokens
    unseeded = {chat(client, "llama", temperature=20.0, max_tokens=12).choices[0].message.content for _ in range(3)}
    assert len(unseeded) > 1


def test_stop_texts_end_an_answer_and_are_not_in_it(client, home):
    whole = alone(home, user("hi there"), "fr", new=20)
    stop = whole[4:7]
    want = whole[: whole.index(stop)]
    for stream in (False, True):
        answer = chat(client, "fr", max_tokens=20, stop=[stop, "not there"], stream=stream)
        if stream:
            answer = list(answer)
            text = "".join(p.choices[0].delta.content or "" for p in answer)
            reason = answer[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert answer.usage.completion_tokens <= 7
        assert (text, reason) == (want, "stop")


def test_text_is_held_back_while_it_may_begin_a_stop_text():
    tokenizer = chat_tokenizer("byte-level")
    ids = tokenizer.encode("the tea is hot, the tea is cold")
    for stop, want in (
        (["tea is c"], "the tea is hot, the "),
        (["xyz", " is"], "the tea"),
        (["cold!"], "the tea is hot, the tea is cold"),
        ([], "the tea is hot, the tea is cold"),
        (["the"], ""),
    ):
        until = TextUntil(tokenizer, stop)
        pieces = [until.push([token]) for token in ids] + [until.finish()]
        assert "".join(pieces) == want, stop
        assert until.ended == (want != "the tea is hot, the tea is cold")
        assert stop or all(pieces[:-1])


def test_many_clients_at_once_each_get_their_own(client, home):
    names = ["llama", *sorted(METHODS), "hf"]
    asked = [(names[i % len(names)], f"question {i % 5}") for i in range(30)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda one: chat(client, *one).choices[0].message.content, asked))
    for (name, text), answer in zip(asked, answers, strict=True):
        assert answer == alone(home, user(text), None if name == "llama" else name)


# --- adapters that come and go ---


def post(client, path, **body):
    """The answer of a route that OpenAI's client does not know."""
    return client.post(path, body=body, cast_to=str)


def test_adapters_are_loaded_replaced_and_unloaded(client, served, home):
    root = served[1].root
    shutil.copytree(home / "more" / "late", root / "late")
    assert "added" in post(client, "/load_lora_adapter", lora_name="new", lora_path="late")
    assert chat(client, "new").choices[0].message.content == alone(home, user("hi there"), "late")
    post(client, "/load_lora_adapter", lora_name="new", lora_path=str(root / "fr"))  # in its place
    assert chat(client, "new").choices[0].message.content == alone(home, user("hi there"), "fr")
    assert "removed" in post(client, "/unload_lora_adapter", lora_name="new")
    with pytest.raises(openai.NotFoundError, match="'new' does not exist"):
        chat(client, "new")
    with pytest.raises(openai.NotFoundError, match="no adapter 'new'"):
        post(client, "/unload_lora_adapter", lora_name="new")


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("../llama", openai.PermissionDeniedError, "outside"),
        ("/etc", openai.PermissionDeniedError, "outside"),
        (".", openai.PermissionDeniedError, "outside"),
        ("link", openai.PermissionDeniedError, "outside"),
        ("fr/../../llama", openai.PermissionDeniedError, "outside"),
        ("nothing", openai.NotFoundError, "no such folder"),
        ("a\0b", openai.BadRequestError, "no path"),
        ("x" * 5000, openai.BadRequestError, "no path"),
        ("empty", openai.BadRequestError, "no adapter there"),
        ("large", openai.BadRequestError, "above"),
        ("other", openai.BadRequestError, "another base"),
        ("nan", openai.BadRequestError, "NaN"),
        ("damaged", openai.BadRequestError, "SHA-256|truncated|damaged"),
        ("linked", openai.PermissionDeniedError, "outside"),
        ("deep", openai.PermissionDeniedError, "outside"),
    ],
)
def test_what_cannot_be_loaded_is_told_and_changes_nothing(client, served, home, path, error, message):
    root = served[1].root
    for name in ("large", "other", "nan"):
        shutil.copytree(home / "more" / name, root / name, dirs_exist_ok=True)
    (root / "empty").mkdir(exist_ok=True)
    if not (root / "link").exists():
        (root / "link").symlink_to(home / "more" / "late")
        for place in (root / "linked", root / "fr2" / "adapter"):  # real folders, of links to files
            place.mkdir(parents=True)
            for file in (home / "more" / "late").iterdir():
                (place / file.name).symlink_to(file)
        (root / "deep").mkdir()
        (root / "deep" / "in").symlink_to(root / "fr2")
        shutil.copytree(root / "fr", root / "damaged")
        file = root / "damaged" / "adapter.safetensors"
        file.write_bytes(serialize({name: x + 1 for name, x in read_safetensors(file).items()}))
    with pytest.raises(error, match=message) as told:
        post(client, "/load_lora_adapter", lora_name="fr", lora_path=path)
    assert str(root) not in str(told.value)
    assert chat(client, "fr").choices[0].message.content == alone(home, user("hi there"), "fr")


def test_a_bank_that_is_full(client):
    for i in range(2):
        post(client, "/load_lora_adapter", lora_name=f"n{i}", lora_path="fr")
    with pytest.raises(openai.BadRequestError, match="full"):
        post(client, "/load_lora_adapter", lora_name="n2", lora_path="fr")
    for i in range(2):
        post(client, "/unload_lora_adapter", lora_name=f"n{i}")


def test_names_and_bodies_of_loads(client):
    for body, error in (
        ({"lora_name": "llama", "lora_path": "fr"}, "cannot have the name 'llama'"),
        ({"lora_name": " ", "lora_path": "fr"}, "cannot have the name"),
        ({"lora_name": "a"}, "`lora_path` must be a text"),
        ({"lora_name": 3, "lora_path": "fr"}, "`lora_name` must be a text"),
        ({"lora_name": "a\nb", "lora_path": "fr"}, "cannot have the name"),
    ):
        with pytest.raises(openai.BadRequestError, match=error):
            post(client, "/load_lora_adapter", **body)
    with pytest.raises(openai.BadRequestError, match="no adapter has the name"):
        post(client, "/unload_lora_adapter", lora_name="a\0")
    assert "a\nb" not in [model.id for model in client.models.list()]


def test_links_inside_the_folder_are_followed(served):
    folder = served[1]
    (folder.root / "same").mkdir()
    (folder.root / "same" / "adapter").symlink_to(folder.root / "it")
    (folder.root / "same" / "again").symlink_to(folder.root / "same")  # in a circle
    assert folder.resolve("same") == (folder.root / "same").resolve()


def test_two_loads_of_one_name_at_once(client, served, monkeypatch):
    folder, entered, go = served[1], threading.Event(), threading.Event()
    read = folder.read

    def slow(path):
        entered.set()
        assert go.wait(60)
        return read(path)

    monkeypatch.setattr(folder, "read", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, client, "/load_lora_adapter", lora_name="twice", lora_path="fr")
        assert entered.wait(60)
        for path in ("/load_lora_adapter", "/unload_lora_adapter"):
            with pytest.raises(openai.ConflictError, match="by another call"):
                post(client, path, lora_name="twice", lora_path="it")
        chat(client, "it")  # others go on
        go.set()
        first.result(60)
    post(client, "/unload_lora_adapter", lora_name="twice")


def test_without_a_folder_nothing_is_loaded():
    folder = AdapterFolder(None, lambda path: (None, None), "base")
    with pytest.raises(HTTPError, match="without a folder of adapters"):
        folder.resolve("fr")


# --- bad input ---


def test_requests_that_cannot_be_are_told(client):
    for given, error, message in (
        ({"name": "de"}, openai.NotFoundError, "the model 'de' does not exist; there are 'llama', 'fr'"),
        ({"text": "x" * 80}, openai.BadRequestError, "capacity of 100"),
        ({"max_tokens": 99}, openai.BadRequestError, "capacity of 100; .* reduce max_tokens"),
        ({"max_tokens": 200}, openai.BadRequestError, "capacity of 100; .* reduce max_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "`max_tokens` must be a positive integer, got 0"),
        ({"temperature": -1}, openai.BadRequestError, "`temperature` must be a number of at least 0"),
        ({"top_p": 0}, openai.BadRequestError, "`top_p` must be above 0"),
        ({"stop": 3}, openai.BadRequestError, "`stop` must be a text or a list"),
        ({"n": 500}, openai.BadRequestError, "500 choices in one call"),
        ({"logprobs": True}, openai.BadRequestError, "this server has no logprobs"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "this server has no presence_penalty"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown field 'temprature'.*temperature"),
        ({"extra_body": {"messages": []}}, openai.BadRequestError, "one or more messages"),
        ({"extra_body": {"messages": [{"role": "x", "content": "a"}]}}, openai.BadRequestError, "the role is 'x'"),
        ({"extra_body": {"messages": [{"role": "tool", "content": "a"}]}}, openai.BadRequestError, "no tools here"),
    ):
        with pytest.raises(error, match=message):
            chat(client, **{"name": "fr", **given})
    assert chat(client, "fr", presence_penalty=0, frequency_penalty=0.0, user="me", logprobs=False).choices
    for prompt in ([], [[]], 3, [1, "a"], [[999]], ""):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="fr", prompt=prompt)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"\xff\xfe", 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"[]", 400, "must be a JSON object, got list"),
        ("POST", "/v1/completions", b"{}", 400, "`model` is missing"),
        ("POST", "/v1/completions", b'{"model": null, "prompt": "a"}', 400, "`model` must be a text"),
        ("POST", "/v1/completions", b'{"model": "fr", "prompt": "\\ud800"}', 400, "`prompt` is not valid Unicode"),
        ("POST", "/v1/chat/completions", b'{"messages": [{"a": "\\ud800"}]}', 400, "`messages` is not valid Unicode"),
        ("POST", "/v1/completions", b'{"\\ud800": 1}', 400, r"the field '\ud800' is not valid Unicode"),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": "\\ud800", "lora_path": "fr"}', 400, "`lora_name` is not"),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": "a", "lora_path": "\\ud800"}', 400, "`lora_path` is not"),
        ("POST", "/v1/unload_lora_adapter", b'{"lora_name": "\\ud800"}', 400, "`lora_name` is not valid Unicode"),
        (
            "POST",
            "/v1/completions",
            b'{"model": "fr", "prompt": [73786976294838206464]}',
            400,
            "id 73786976294838206464",
        ),
        ("POST", "/v1/completions", b" " * (17 << 20), 413, "more than 16 MiB"),
        ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
        ("GET", "/v2/models", b"", 404, "Not Found"),
    ],
)
def test_malformed_calls_have_errors_of_openais_form(address, method, path, body, status, message):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a body of which the rest is not read
        connection.request(method, path, body)
    answer = connection.getresponse()
    found = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == status and message in found["message"] and found["code"] == status


def test_an_error_of_the_server_has_the_form_too(client, served, monkeypatch):
    def broken(*args, **more):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(served[0].engine, "submit_many", broken)
    with pytest.raises(openai.InternalServerError, match="the server failed") as found:
        chat(client, "fr")
    assert "secret" not in str(found.value)


def test_fields_that_change_nothing_are_taken():
    body = {"model": "a", "prompt": "b", "user": "me", "logit_bias": {}, "suffix": None, "n": None, "top_k": -1}
    ask = read_ask(body, chat=False)
    assert (ask.n, ask.top_k, ask.max_tokens, ask.temperature) == (1, None, 16, 1.0)


def test_an_error_of_the_template_names_the_model_and_not_its_path(served):
    tokenizer = dataclasses.replace(served[0].tokenizer, template="{{ raise_exception('no') }}")
    ask = read_ask({"model": "fr", "messages": user("a")}, chat=True)
    with pytest.raises(HTTPError, match=r"^llama: the chat template rejects the messages: no"):
        dataclasses.replace(served[0], tokenizer=tokenizer).encode(ask)


# --- floods, time, and clients that go away ---


def test_a_flood_gets_the_status_429(client, served, monkeypatch):
    engine = served[0].engine
    with monkeypatch.context() as patch, engine._stepping:  # nothing is computed meanwhile
        patch.setattr(engine, "_room", 2)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(chat, client, "fr") for _ in range(12)]
            refused = next(concurrent.futures.as_completed(waiting, 60))
            assert isinstance(refused.exception(), openai.RateLimitError)
            patch.undo()
            engine._stepping.release()
            try:
                done = [one.exception(60) for one in waiting]
            finally:
                engine._stepping.acquire()
    assert {type(error) for error in done} == {type(None), openai.RateLimitError}
    assert "the server is busy" in str(next(error for error in done if error))
    assert engine.stats.refused > 0


def test_choices_that_fit_an_idle_server_are_taken_and_more_never_fit(client, served, monkeypatch):
    engine = served[0].engine
    monkeypatch.setattr(engine, "_room", 2)
    until(lambda: engine.running == engine.queued == 0)
    assert len(chat(client, "fr", n=6, max_tokens=2).choices) == 6
    with pytest.raises(openai.BadRequestError, match="7 choices in one call; this server takes at most 6"):
        chat(client, "fr", n=7)
    with pytest.raises(openai.BadRequestError, match="8 choices in one call"):
        client.completions.create(model="fr", prompt=["a", "b"], n=4)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_that_goes_away_ends_its_request(client, address, served):
    engine = served[0].engine
    with engine._stepping:  # so that neither ends before its client goes
        before = engine.stats.finished["cancelled"]
        stream = chat(client, "llama", max_tokens=60, stream=True)
        next(iter(stream))
        whole = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        body = {"model": "llama", "prompt": "a", "max_tokens": 60, "temperature": 0}
        whole.request("POST", "/v1/completions", json.dumps(body))
        until(lambda: engine.queued == 2)
        stream.close()
        whole.close()
        until(lambda: engine.stats.finished["cancelled"] == before + 2)
        assert engine.queued == 0


def test_answers_that_take_too_long_are_ended(client, served, monkeypatch):
    engine = served[0].engine
    with engine._stepping, serving(make_app(*not_closed(served), timeout=0.2)) as at:
        slow = openai.OpenAI(base_url=f"{at}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match=r"no whole answer within 0\.2 seconds"):
            chat(slow, "fr")
        with pytest.raises(openai.APIError, match=r"no whole answer within 0\.2 seconds"):
            list(chat(slow, "fr", stream=True))
        slow.close()
    until(lambda: engine.queued == 0)


class NotClosed:
    """An engine that a server's end leaves running."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def close(self, drain=False):
        pass


def not_closed(served):
    return dataclasses.replace(served[0], engine=NotClosed(served[0].engine)), served[1]


# --- keys, health, metrics ---


def test_a_key_is_needed_for_all_but_health_and_metrics(served):
    with serving(make_app(*not_closed(served), api_key="sécret")) as at:
        given = ("Bearer wrong", "", "sécret", "Basic sécret", "Bearer", "Bearer sécret", "bearer  sécret")
        for header, ok in ((header, "earer" in header and "sécret" in header) for header in given):
            headers = {"Authorization": header.encode()} if header else {}
            for path, method in (("/v1/models", "GET"), ("/v1/load_lora_adapter", "POST"), ("/health", "GET")):
                connection = http.client.HTTPConnection(at.removeprefix("http://"), timeout=60)
                connection.request(method, path, b"{}" if method == "POST" else None, headers=headers)
                answer = connection.getresponse()
                text = answer.read().decode()
                connection.close()
                if path == "/health":
                    assert answer.status == 200
                elif ok:
                    assert answer.status in (200, 400)
                else:
                    assert answer.status == 401 and "API key" in json.loads(text)["error"]["message"]


def test_metrics_count_what_was_done(client, address, served):
    def read():
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = read()
    answer = chat(client, "fr", max_tokens=4)
    after = read()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["jpeft_requests_submitted_total"] == 1
    assert change["jpeft_generated_tokens_total"] == answer.usage.completion_tokens
    assert change["jpeft_prompt_tokens_total"] == answer.usage.prompt_tokens
    assert after["jpeft_rows"] == 4 and after["jpeft_adapters"] == 5 and after["jpeft_queue_length"] == 0


# --- folders and the command ---


def test_folders_that_cannot_be_served(home, tmp_path):
    with pytest.raises(UserError, match="not a language model"):
        serve.open_served(str(home / "bert"))
    with pytest.raises(UserError, match="no such folder"):
        serve.open_served(str(home / "llama"), tmp_path / "none", SIZES)
    shutil.copytree(home / "adapters" / "fr", tmp_path / "a" / "llama")
    with pytest.raises(UserError, match="has the name of the base, 'llama'"):
        serve.open_served(str(home / "llama"), tmp_path / "a", SIZES)
    (tmp_path / "b" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="no adapter there"):
        serve.open_served(str(home / "llama"), tmp_path / "b", SIZES)
    with pytest.raises(UserError, match="hold 4 adapters beside the base, and there are 5"):
        serve.open_served(str(home / "llama"), home / "adapters", serve.Sizes(slots=5))


@pytest.mark.parametrize("name", ["a\nb", os.fsdecode(b"\xff")])
def test_folders_whose_names_cannot_be_sent_are_told(home, tmp_path, name):
    shutil.copytree(home / "adapters" / "fr", tmp_path / name)
    with pytest.raises(UserError, match="cannot be a model's name"):
        serve.open_served(str(home / "llama"), tmp_path, SIZES)


def test_adapters_that_cannot_share_a_bank_are_told(home, tmp_path):
    model, params = models.load(home / "llama")
    prompt = jpeft.methods.PromptTuning(length=2).bind(model, params, IDS)
    shutil.copytree(home / "adapters" / "fr", tmp_path / "fr")
    jpeft.save(tmp_path / "prompt", prompt, adapter_of(prompt, params, 0), params)
    with pytest.raises(UserError, match=r"'fr' cannot be in one bank with the others: .*PromptTuning"):
        serve.open_served(str(home / "llama"), tmp_path, SIZES)


def test_an_empty_folder_takes_adapters_later(home, tmp_path):
    served, folder = serve.open_served(str(home / "llama"), tmp_path, serve.Sizes(rows=2, rank=4, slots=3, chunk=32))
    shutil.copytree(home / "adapters" / "it", tmp_path / "it")
    folder.load(served.engine, "it", "it")
    assert served.names() == ["llama", "it"]


def test_the_command_serves_and_finishes_answers_after_sigterm(home, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jpeft.cli", "serve", "--model", str(home / "llama"), "--port", str(port)]
    sizes = ["--adapters", str(home / "adapters"), "--rows", "2", "--capacity", "100", "--chunk", "32"]
    environment = {**os.environ, "JPEFT_CACHE": str(tmp_path), "JPEFT_API_KEY": "secret"}
    process = subprocess.Popen([*command, *sizes], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
            _wait_for(client, process)
            whole = chat(client, "fr", max_tokens=40).choices[0].message.content  # also compiles
            stream = iter(chat(client, "fr", max_tokens=40, stream=True))
            text = next(stream).choices[0].delta.content or ""
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == whole
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "llama with 5 adapters: fr, hf, ia3, it, prefix" in err and f"http://127.0.0.1:{port}/v1" in err
    assert err.endswith("stopped\n") and "Traceback" not in err


def _wait_for(client, process):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        with contextlib.suppress(openai.APIConnectionError):
            client.models.list()
            return
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_the_command_tells_what_is_wrong(capsys, home):
    assert main(["serve", "--model", str(home / "llama"), "--adapters", str(home / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["serve", "--port", "70000"]) == 1
    assert "a port from 0 to 65535" in capsys.readouterr().err
