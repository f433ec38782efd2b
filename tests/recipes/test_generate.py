"""`jpeft generate` and `jpeft chat` on a tiny Llama: their output, and user errors."""

import functools
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.files import read_safetensors, serialize
from jpeft.recipes import generate
from jpeft.serving import text_generator
from jpeft.text import chat_template
from tests.folders import byte_tokenizer, link, work_in, write_bert, write_llama

pytestmark = pytest.mark.usefixtures("keep_compiled")
SMALL = ["--max-new-tokens", "6"]
IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a language model (`llama`), adapters of it, and an encoder (`bert`)."""
    folder = tmp_path_factory.mktemp("home")
    model, params = write_llama(
        folder / "llama", 32, 48, scale=20
    )  # logits far from uniform, so that there are no ties
    peft = jpeft.LoRA(rank=2, targets="all-linear", init_weights="random").bind(model, params, IDS)
    adapter = jax.tree.map(lambda x: 3 * np.asarray(x), jax.jit(peft.init)(jax.random.key(1), params))
    jpeft.save(folder / "lora", peft, adapter, params)
    shutil.copytree(folder / "lora", folder / "run" / "adapter")
    jpeft.hf.save(folder / "hf", peft, adapter, params)
    prefix = jpeft.PrefixTuning(length=3, init_std=30.0).bind(model, params, IDS)
    jpeft.save(folder / "prefix", prefix, jax.jit(prefix.init)(jax.random.key(2), params), params)
    write_bert(folder / "bert")
    return folder


@pytest.fixture(autouse=True)
def working_directory(home, monkeypatch, tmp_path):
    """A directory of its own for each test, with links to the models and adapters."""
    work_in(tmp_path, home, monkeypatch)


def output_of(capsys, *arguments, stdin=None, monkeypatch=None):
    """The output of a command that succeeds."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    status = main(list(arguments))
    out = capsys.readouterr()
    assert status == 0, out.err
    return out.out


@functools.cache
def load(folder):
    """A model, its parameters, and its tokenizer."""
    return *models.load(folder), chat_template.read(folder)


def expected(prompt, new=6, **settings):
    """The output of `jpeft.generate` on the model that `models.load` gives."""
    model, params, tokenizer = load(Path("llama").resolve())
    ids = tokenizer.encode_chat(prompt) if isinstance(prompt, list) else tokenizer.encode(prompt)
    (tokens,) = jpeft.generate(
        model,
        params,
        [ids],
        max_new_tokens=new,
        stop_ids=tokenizer.stop_ids,
        vocabulary=tokenizer.size,
        min_prompt_length=128,  # one program for all prompts
        **settings,
    )
    return tokenizer.decode(tokens)


def user(text):
    return [{"role": "user", "content": text}]


def test_a_prompt_goes_through_the_models_chat_template_unless_raw(capsys):
    base = ("generate", "--model", "llama", *SMALL, "hi there")
    assert output_of(capsys, *base) == expected(user("hi there")) + "\n"
    assert output_of(capsys, *base, "--raw") == expected("hi there") + "\n"
    with_system = [{"role": "system", "content": "be brief"}, *user("hi there")]
    assert output_of(capsys, *base, "--system", "be brief") == expected(with_system) + "\n"
    assert expected(user("hi there")) != expected("hi there")


def test_a_prompt_on_stdin_and_messages_in_a_file(capsys, monkeypatch):
    base = ("generate", "--model", "llama", *SMALL)
    assert output_of(capsys, *base, stdin="hi there\n", monkeypatch=monkeypatch) == expected(user("hi there")) + "\n"
    messages = [*user("hi"), {"role": "assistant", "content": "yes"}, *user("so?")]
    with open("messages.json", "w") as file:
        json.dump(messages, file)
    assert output_of(capsys, *base, "--messages", "messages.json") == expected(messages) + "\n"


def test_several_prompts_are_one_batch(capsys):
    base = ("generate", "--model", "llama", *SMALL, "--json", "--raw")
    found = json.loads(output_of(capsys, *base, "hi there", "a", "good day"))
    assert [row["text"] for row in found] == [expected("hi there"), expected("a"), expected("good day")]


def test_json_includes_the_speed(capsys):
    found = json.loads(output_of(capsys, "generate", "--model", "llama", *SMALL, "--json", "hi"))
    assert found["text"] == expected(user("hi")) and found["new_tokens"] == 6
    assert found["prompt_tokens"] == len(chat_template.read("llama").encode_chat(user("hi")))
    assert found["tokens_per_second"] > 0


def test_sampling_depends_only_on_the_seed(capsys):
    base = ("generate", "--model", "llama", *SMALL, "hi", "--temperature", "2", "--top-k", "50", "--top-p", "0.95")
    first, again, other = (output_of(capsys, *base, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other
    by_hand = expected(user("hi"), temperature=2.0, top_k=50, top_p=0.95, key=jax.random.key(1))
    assert first == by_hand + "\n"


@pytest.mark.parametrize("folder", ["lora", "run", "hf", pytest.param("prefix", marks=pytest.mark.exhaustive)])
def test_with_an_adapter(capsys, folder):
    model, params, _ = load(Path("llama").resolve())
    if folder == "hf":
        peft, adapter = jpeft.hf.load("hf", model, params, IDS)
    else:
        peft, adapter = jpeft.load("prefix" if folder == "prefix" else "lora", model, params, IDS)
    adapted = expected(user("hi"), peft=peft, adapter=adapter)
    assert output_of(capsys, "generate", "--model", "llama", "--adapter", folder, *SMALL, "hi") == adapted + "\n"
    assert adapted != expected(user("hi"))


def test_an_adapter_of_peft_for_one_layer():
    shutil.copytree("hf", "one")
    file = Path("one/adapter_model.safetensors")
    file.write_bytes(serialize({name: x for name, x in read_safetensors(file).items() if ".layers.1." in name}))
    config = json.loads(Path("one/adapter_config.json").read_text())
    Path("one/adapter_config.json").write_text(json.dumps({**config, "layers_to_transform": [1]}))
    model, params = models.load("llama", scan_layers=False)
    peft, adapter = jpeft.hf.load("one", model, params, IDS)
    generator = generate.open_text_generator("llama", "one")
    expected, found = peft.merge(params, adapter), generator.peft.merge(generator.params, generator.adapter)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), expected["model"], params["model"])
    assert changed["layers"]["1"]["mlp"]["up_proj"]["kernel"] and not any(jax.tree.leaves(changed["layers"]["0"]))


def test_half_precision(capsys):
    generator = generate.open_text_generator("llama", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(generator.params)} == {jnp.dtype("bfloat16")}
    assert "".join(generator.stream(generator.tokenizer.encode("hi"), text_generator.Settings(max_new_tokens=3)))


def test_a_chat_remembers_earlier_turns(capsys, monkeypatch):
    out = output_of(capsys, "chat", "--model", "llama", *SMALL, "--system", "be kind", stdin="hi\n\nand?\n",
              monkeypatch=monkeypatch)  # fmt: skip
    messages = [{"role": "system", "content": "be kind"}, *user("hi")]
    first = expected(messages)
    second = expected([*messages, {"role": "assistant", "content": first}, *user("and?")])
    assert out == f"{first}\n{second}\n"


MISTAKES = {
    "a model for an adapter": (["llama", "hi", "--adapter", "bert"], "bert: a model, with no adapter.*--model bert"),
    "a prompt longer than the context": (["llama", "x" * 130], "exceeds the model's context of 128"),
    "no room for new tokens": (["llama", "hi", "--max-new-tokens", "200"], "exceeds the model's context of 128"),
    "an empty prompt": (["llama", ""], "the prompt is empty"),
    "an empty raw prompt": (["llama", "--raw", " "], "the prompt is empty"),
    "an empty prompt among others": (["llama", "hi", ""], "the prompt is empty"),
    "weights that are not numbers": (["nan", "hi"], "logits are not finite"),
    "a seed that is too large": (["llama", "hi", "--seed", "9" * 30], "--seed must be a number from 0"),
    "an unknown role": (["llama", "--messages", "role.json"], "'robot'"),
    "a template that raises": (["llama", "--messages", "tool.json"], "no tools here"),
    "a broken template": (["broken", "hi"], "chat template"),
    "messages that are not JSON": (["llama", "--messages", "llama/tokenizer_config.json/none"], "Not a directory"),
    "messages that are half JSON": (["llama", "--messages", "half.json"], "not JSON"),
    "messages that are not a list": (["llama", "--messages", "object.json"], "messages"),
    "no template for a system message": (["plain", "hi", "--system", "x"], "template"),
    "a truncated shard": (["short", "hi"], "model.safetensors: not a whole safetensors file"),
    "a file that is not GGUF": (["none.gguf", "hi"], "none.gguf"),
    "an unsupported quantization": (["quant.gguf", "hi"], "not.*(supported|dequantize)"),
    "another model's tokenizer": (["larger", "hi"], "the tokenizer belongs to another model"),
    "no tokenizer": (["bare", "hi"], "no tokenizer.json"),
    "an encoder": (["bert", "hi"], "not a language model"),
    "an encoder, with an adapter": (["bert", "hi", "--adapter", "lora"], "not a language model"),
    "no such model": (["nowhere", "hi"], "no such folder"),
    "another family": (["other", "hi"], "'mamba' is not one of .*llama.*gemma2"),
    "no adapter there": (["llama", "hi", "--adapter", "bert"], "bert"),
    "a run as the prompt": (["llama", "started"], "started is a run, not a prompt; give it as --adapter st"),
    "an adapter of PEFT as the model": (["hf", "hi"], "--model hf: an adapter, not a model; give it as --adapter hf"),
    "an adapter of jpeft as the model": (["lora", "hi"], "--model lora: an adapter, not a model"),
    "top_k for greedy decoding": (["llama", "hi", "--top-k", "5"], "--top-k 5 is for sampling, and --temperature is 0"),
    "top_p for greedy decoding": (["llama", "hi", "--top-p", "0.5"], "--top-p 0.5 is for sampling"),
    "an adapter of another model": (["shifted", "hi", "--adapter", "lora"], "base"),
    "a negative temperature": (
        ["llama", "hi", "--temperature", "-1"],
        "temperature must be a finite number of at least 0",
    ),
    "a top_p above 1": (["llama", "hi", "--top-p", "1.5"], "--top-p must be above 0 and at most 1"),
    "a top_k of 0": (["llama", "hi", "--top-k", "0"], "--top-k must be a positive integer"),
    "no new tokens": (["llama", "hi", "--max-new-tokens", "0"], "--max-new-tokens must be a positive integer"),
    "raw and a system message": (["llama", "hi", "--raw", "--system", "x"], "no place for --system"),
    "two sources of prompts": (["llama", "hi", "--messages", "role.json"], "no PROMPT"),
}


@pytest.fixture(scope="module")
def broken(home, tmp_path_factory):
    """A folder with the broken files that the errors are about."""
    folder = tmp_path_factory.mktemp("broken")
    conversations = {
        "role": [{"role": "robot", "content": "x"}],
        "tool": [{"role": "tool", "content": "x"}],
        "object": {"role": "user"},
    }
    for name, value in conversations.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "half.json").write_text('[{"role"')
    (folder / "started").mkdir()
    (folder / "started" / "config.json").write_text('{"config": {}}')
    for name in ("broken", "plain", "short", "larger", "bare", "other"):
        shutil.copytree(home / "llama", folder / name)
    (folder / "broken" / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    (folder / "plain" / "tokenizer_config.json").write_text("{}")
    whole = (folder / "short" / "model.safetensors").read_bytes()
    (folder / "short" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    tokenizer.save(str(folder / "larger" / "tokenizer.json"))
    (folder / "bare" / "tokenizer.json").unlink()
    config = json.loads((home / "llama" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    model, params, _ = load(home / "llama")
    params = jax.tree.map(np.asarray, params)
    models.save(folder / "nan", model, jax.tree.map(lambda x: x * np.float32("nan"), params), source=home / "llama")
    models.save(folder / "shifted", model, jax.tree.map(lambda x: x + 1, params), source=home / "llama")
    (folder / "none.gguf").write_bytes(b"not a gguf file")
    write_unreadable(folder / "quant.gguf")
    return folder


def write_unreadable(path):
    """A complete GGUF file whose matrices have an unsupported type."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name, rows in {"token_embd": 3, **{f"blk.0.{name}": 256 for name in matrices}}.items():
        raw = np.zeros((rows, 292), np.uint8)  # 292 bytes hold 256 numbers
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", MISTAKES)
def test_an_error_is_one_line(name, broken, tmp_path, capsys):
    link(broken, tmp_path)
    (model, *arguments), message = MISTAKES[name]
    status = main(["generate", "--model", model, *arguments])
    out = capsys.readouterr()
    assert status != 0 and out.out == ""
    assert out.err.count("\n") == 1 and out.err.startswith("jpeft: error: ")

    assert re.search(message, out.err) and "unexpected" not in out.err, out.err


def test_a_closed_pipe_is_not_an_error(home):
    """`jpeft generate ... | head -c 1`, in a process of its own."""
    code = "import sys; from jpeft.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", "--model", str(home / "llama"), "--max-new-tokens", "90", "hi"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 141) and "Traceback" not in err
