"""`jpeft plan` and `jpeft.plan`: what they say of a step against that step, compiled here on real arrays."""

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.cli.plan import command_of
from jpeft.core.backend import compiling_for
from jpeft.errors import UserError
from jpeft.hardware import topologies
from jpeft.hardware.topologies import parse
from jpeft.models import ops
from jpeft.models.decoder import DecoderConfig
from jpeft.parallel.batches import Layout, constrained
from jpeft.parallel.mesh import read_mesh
from jpeft.planning import compiling, hlo
from jpeft.planning.compiling import PlanError
from jpeft.planning.plan import prepare
from jpeft.recipes import plan_sweep
from jpeft.recipes import plan_sweep as sweep
from jpeft.recipes.config import Config
from jpeft.recipes.plan_sweep import Choice
from jpeft.recipes.tasks import chat
from jpeft.text import conversations

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick")
LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
ROWS, LENGTH, RANK = 8, 128, 4
TX = optax.adam(1e-3)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Workers that compile under the flags of this process (conftest.py), which also save them half of their time."""
    flags = "--xla_backend_optimization_level=0"
    path = tmp_path_factory.mktemp("quick") / "python"
    text = f'XLA_FLAGS="$XLA_FLAGS {flags}" exec {shlex.quote(sys.executable)} "$@"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", script(path, text))
        yield


def job(quantize=None, accumulate=1, **options):
    """A LoRA step on a small Llama, its abstract weights, and the names of their axes."""
    model, params = models.abstract(LLAMA, quantize=quantize, remat="full", **options)
    peft = jpeft.LoRA(rank=RANK, targets="all-linear").bind(model, params, *chat.example_inputs())
    step = jpeft.train_step(peft, chat.loss_fn(peft), TX, accumulate=accumulate)
    return step, params, models.logical_names(model)


def state_of(step, params):
    return jpeft.TrainState.create(step.peft, step.peft.init(jax.random.key(0), params), TX, jax.random.key(0))


def batch_of(rows=ROWS):
    ids = np.zeros((rows, LENGTH), np.int32)
    return conversations.Batch(ids, ids, ids, ids, weight=np.ones((rows, LENGTH), np.float32))


def mesh_of(dims, names):
    devices = jax.devices()[: np.prod(dims)]
    return jax.make_mesh(dims, names, devices=devices, axis_types=(AxisType.Auto,) * len(dims))


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def held(*trees):
    """Bytes that the first device has of them."""
    leaves = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
              for x in jax.tree.leaves(trees)]  # fmt: skip
    return sum(x.addressable_shards[0].data.nbytes for x in leaves)


@pytest.fixture(scope="module")
def llama():
    """A plan from abstract inputs, the texts of its two programs, and the step compiled here on real arrays."""
    step, params, names = job()
    topology = parse("cpu:4")
    prepared = prepare(step, state_of(step, params), params, batch_of(), topology, read_mesh(None, topology),
                       names=names)  # fmt: skip
    with prepared.compiling() as compilations:
        plan = prepared.conclude(*compilations)
        texts = [each.result()["text"] for each in compilations]
    mesh = mesh_of((4,), ("fsdp",))
    base = jpeft.shard(zeros(params), mesh, names=names)
    state, batch = state_of(step, base), jpeft.shard_batch(batch_of(), mesh)
    return plan, texts, step.lower(state, base, batch).compile(), (state, base, batch)


# ------------------------------------------------------------------------------------------- what a step needs and does


def test_memory_is_that_of_the_real_step(llama):
    plan, _, real, _ = llama
    told = real.memory_analysis()
    assert sum(plan.memory.arguments.values()) == told.argument_size_in_bytes
    assert plan.memory.temporaries == told.temp_size_in_bytes > 0
    assert plan.memory.outputs == told.output_size_in_bytes - told.alias_size_in_bytes
    assert plan.memory.total == told.argument_size_in_bytes + plan.memory.temporaries + plan.memory.outputs
    assert plan.fits is None and "the memory of cpu:4 is not known" in str(plan)


def test_arguments_are_the_bytes_that_a_device_holds(llama):
    plan, _, _, (state, base, batch) = llama
    counters = (state.step, state.rng, state.skipped)
    assert plan.memory.arguments == {
        "base": held(base), "adapter": held(state.adapter), "optimizer": held(state.opt_state, counters),
        "batch": held(batch),
    }  # fmt: skip


def by_hand(devices, scanned):
    """FLOPs of a device: LoRA on all linear layers, layers computed again, attention as CPUs run it. There are two,
    for attention has a checkpoint of its own, and not every version of XLA sees that QK' has been computed again."""
    cfg, tokens = DecoderConfig(**LLAMA), ROWS * LENGTH // devices
    heads, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    hidden, wide = cfg.hidden_size, cfg.intermediate_size
    shapes = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden), (hidden, wide), (hidden, wide),
              (wide, hidden)]  # fmt: skip
    weights = sum(i * o for i, o in shapes)
    linear = 2 * weights + 2 * weights + 2 * (weights - wide * hidden)  # y; dx; again, where something needs y
    # xA again, dy B', and the two gradients. Before a product there is W + AB, of the weight's own piece, twice.
    lora = sum(4 * RANK * (i + o) for i, o in shapes)
    sums = 2 * 2 * RANK * weights / devices
    scores = 2 * LENGTH * heads
    attention = 2 * scores + 2 * scores + 4 * scores  # QK' and PV; again; four products backward
    more = tokens * cfg.num_hidden_layers * scores
    head = 3 * 2 * hidden * cfg.vocab_size  # a chunk's logits, again, dx
    total = tokens * (cfg.num_hidden_layers * (linear + lora + attention) + head) + cfg.num_hidden_layers * sums
    # What comes into the first layer needs no gradient: told where that layer stands for itself.
    total -= 0 if scanned else tokens * 2 * (hidden * heads + 2 * hidden * kv)
    return pytest.approx(total, rel=0.005), pytest.approx(total + more, rel=0.005)


def test_flops_are_those_of_a_count_by_hand(llama):
    plan, _, real, _ = llama
    assert plan.flops in by_hand(4, scanned=True)
    assert real.cost_analysis()["flops"] < 0.6 * plan.flops  # XLA counts one of three layers
    assert 0.5 < plan.model_flops / (plan.flops * 4) < 1


def test_flops_of_layers_one_by_one(llama):
    step, params, names = job(scan_layers=False)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of())
    plan = jpeft.plan(step, state_of(step, params), params, batch, "cpu:4", {"fsdp": 4}, names=names,
                      against_base=False)  # fmt: skip
    assert plan.flops in by_hand(4, scanned=False)
    assert plan.memory.arguments == llama[0].memory.arguments and plan.adapter_share is None


def test_the_share_of_the_adapter_is_what_it_adds_to_the_traffic(llama):
    plan, texts, _, _ = llama
    total, base = (sum(c.times * c.bytes for c in hlo.read(text).collectives) for text in texts)
    assert 0 < plan.adapter_share < 0.5 and plan.adapter_share == pytest.approx(1 - base / total)
    assert sum(t.bytes for t in plan.collectives) == total and {t.axes for t in plan.collectives} == {"fsdp"}
    assert f"the adapter causes {plan.adapter_share:.2%}" in str(plan)


def test_the_share_is_not_told_of_one_device_or_where_it_is_not_asked_for():
    step, params, names = job()
    for topology, options in (("cpu:1", {}), ("cpu:4", {"against_base": False})):
        topology = parse(topology)
        found = prepare(step, state_of(step, params), params, batch_of(), topology, read_mesh(None, topology),
                        names=names, **options)  # fmt: skip
        assert not found.beside


def test_a_quantized_base_on_another_mesh_in_micro_batches(llama):
    """Real arrays on eight devices; planned for four, on axes of the same names."""
    step, params, names = job(quantize="nf4", accumulate=2)
    there, four = mesh_of((2, 4), ("data", "fsdp")), mesh_of((2, 2), ("data", "fsdp"))
    base = jpeft.shard(zeros(params), there, names=names)
    given = state_of(step, base), base, jpeft.shard_batch(batch_of(), there)
    plan = jpeft.plan(step, *given, "cpu:4", AbstractMesh((2, 2), ("data", "fsdp")))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    smaller = jpeft.shard(zeros(params), four, names=names)
    assert plan.memory.arguments["base"] == held(smaller) < held(llama[3][1])  # over two, not four
    assert plan.memory.arguments["batch"] == held(jpeft.shard_batch(batch_of(), four))
    assert plan.memory.temporaries < llama[0].memory.temporaries
    # Each micro-batch gathers the base, with an adapter or without.
    assert 0 < plan.adapter_share < 0.6 and dict(plan.mesh) == {"data": 2, "fsdp": 2}


# ----------------------------------------------------------------------------------------------- steps of one's own


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.tanh(nn.Dense(256)(x)))


def own(donate):
    model, tx = Net(), optax.sgd(0.1, momentum=0.9)
    params = model.init(jax.random.key(0), jnp.ones((1, 16)))["params"]

    @functools.partial(jax.jit, donate_argnums=0 if donate else ())
    def step(state, params, batch):
        def loss(shift):
            return jnp.square(model.apply({"params": params}, batch["x"]) + shift - batch["y"]).mean()

        value, gradient = jax.value_and_grad(loss)(state["shift"])
        updates, slots = tx.update(gradient, state["slots"])
        return {"shift": state["shift"] + updates, "slots": slots}, {"loss": value}

    shift = jnp.zeros(8)
    batch = {"x": np.ones((32, 16), np.float32), "y": np.ones((32, 8), np.float32)}
    return step, {"shift": shift, "slots": tx.init(shift)}, params, batch


@pytest.mark.parametrize("donate", [True, False])
def test_a_step_of_ones_own(donate, caplog):
    step, state, params, batch = own(donate)
    arrays = {id(x) for x in jax.live_arrays()}
    with jax.log_compiles():
        plan = jpeft.plan(step, state, params, batch, "cpu:4")
    assert not {id(x) for x in jax.live_arrays()} - arrays and not jax.tree.leaves(state)[0].is_deleted()
    assert "Finished tracing" in caplog.text and "XLA compilation" not in caplog.text  # nothing is compiled here
    mesh = mesh_of((4,), ("fsdp",))
    everywhere = jax.device_put(state, NamedSharding(mesh, P()))
    there = jpeft.shard(params, mesh), jpeft.shard_batch(batch, mesh)
    assert plan.memory.arguments == {"state": held(everywhere), "base": held(there[0]), "batch": held(there[1])}
    assert plan.memory.outputs >= 4 + (0 if donate else held(everywhere))
    assert plan.memory.outputs <= 64 + (0 if donate else held(everywhere) + 64)
    assert plan.model_flops is None and plan.adapter_share is None and plan.tokens == 32
    assert plan.flops == 2 * 8 * (16 * 256 + 256 * 8)


def test_a_mesh_in_any_spelling():
    topology = parse("cpu:8")
    concrete, abstract = jax.make_mesh((2, 4), ("data", "fsdp")), AbstractMesh((2, 4), ("data", "fsdp"))
    asked = ["data=2,fsdp=4", " data = 2, fsdp = 4", {"data": 2, "fsdp": 4}, concrete, abstract]
    kinds = (AxisType.Auto,) * 2  # whatever the mesh's own: XLA spreads what the step leaves open
    assert {read_mesh(mesh, topology) for mesh in asked} == {abstract.update(axis_types=kinds)}
    assert read_mesh(None, topology).shape_tuple == (("fsdp", 8),)


@pytest.mark.parametrize("mesh, says", [
    ("fsdp=3", "but cpu:4 has 4 devices"),
    ({"data": 2, "fsdp": 4}, "data=2,fsdp=4: 2 x 4 is 8, but cpu:4 has 4 devices"),
    ("fsdp", "expected axes such as"), ("fsdp=2,fsdp=2", "each once"), ("", "expected axes"), ({}, "has 4 devices"),
])  # fmt: skip
def test_meshes_that_are_not_of_the_devices(mesh, says):
    with pytest.raises(PlanError) as error:
        jpeft.plan(*own(True), "cpu:4", mesh)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_divide():
    step, state, params, batch = own(True)
    with pytest.raises(ValueError, match=r"batch's \['x'\] of shape \(30, 16\): 30 does not divide over 'fsdp'"):
        jpeft.plan(step, state, params, {"x": batch["x"][:30], "y": batch["y"][:30]}, "cpu:4")
    with pytest.raises(ValueError, match=r"Dense_0/kernel: an axis of 8 does not divide over 'fsdp', which is 16 wide"):
        jpeft.plan(step, state, params, batch, "cpu:16", rules=[(".*/kernel", P(None, "fsdp"))])
    there = jpeft.shard(params, jax.make_mesh((8,), ("rows",)), [(".*/kernel", P(None, "rows"))])
    with pytest.raises(PlanError, match=r"is sharded over 'rows', which the mesh .*'fsdp': 4.* lacks"):
        jpeft.plan(step, state, there, batch, "cpu:4")


# ----------------------------------------------------------------------------------------------- compilers that fail


BROKEN = {
    "killed": ("kill -9 $$", "cpu:4: the compiler was killed, most likely for want of memory on this machine"),
    "aborts": ("echo 'F0101 Check failed: a == b' >&2; echo last >&2; exit 3", "ended with status 3: F0101 Check fail"),
    "silent": ("exit 5", "cpu:4: the compiler ended with status 5"),
    "garbage": ("echo '{\"seco' > $3/result.json; exit 1", "cpu:4: the compiler ended with status 1"),
    "told": ("""printf '%s' '{"error": "Boom:\\n a  b"}' > $3/result.json""", "cpu:4: Boom: a b"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_compiler_that_fails_is_told_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text, says = BROKEN[name]
    with pytest.raises(PlanError) as error:
        jpeft.plan(*own(True), "cpu:4", python=script(tmp_path / "python", text))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


@pytest.mark.parametrize("seen_on", ["", "v5p:2x2x1"])
def test_a_program_that_the_compiler_refuses(seen_on, llama):
    said = (Path(__file__).parent / "data" / "hlo_refused.txt").read_text()
    if seen_on:  # newer compilers name no buffers: the same step is seen on chips that have more room
        said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 739.76M of 738.00M hbm."
    topology = parse("v5e:2x2")
    prepared = prepare(*own(True), topology, read_mesh(None, topology))

    class Refused:
        def result(self):
            text = llama[1][0] if seen_on else ""
            return {"refused": said, "seconds": 1.0, "host_bytes": 1, "text": text, "seen_on": seen_on}

    plan = prepared.conclude(Refused())
    assert plan.memory.total == round(739.76 * 2**20) and plan.capacity == 738 * 2**20
    assert plan.refused and plan.fits is False and plan.seconds is None and plan.chip.name == "v5e"
    told = str(plan)
    assert "does not fit: 0.72 GiB, 0.00 more than there are (the compiler refused it)" in told
    assert ("of the same step on v5p:2x2x1" if seen_on else "bf16[8192,8192]") in told and "products" not in told
    assert json.loads(json.dumps(plan.to_dict()))["fits"] is False


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder of the test's own, with a Llama's `config.json` as a file and a BERT's in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    (tmp_path / "odd.json").write_text(json.dumps({**LLAMA, "vocab_size": 513}))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps(BERT))
    return tmp_path


CHAT = "plan --model llama.json --topology cpu:4 --batch 8 --seq 64 --no-base --rank 2"
LABELS = "plan --task classify --model bert --topology cpu:4 --batch 8 --seq 32"


def run(text):
    return main.main(shlex.split(text))


def config_of(command):
    """As `jpeft finetune` reads it."""
    args = main._parser().parse_args(shlex.split(command)[1:])
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}
    return Config(**{**given, "settings": dict(given.get("settings", {}))}), args


def test_the_command_says_what_a_step_needs_and_how_to_run_it(there, capsys):
    targets = ".*/(q|v)_proj"
    assert run(f"{CHAT} --targets '{targets}' --dtype float32 --picture memory.png") == 0
    out, err = capsys.readouterr()
    assert "cpu:4: 4 devices, mesh fsdp=4; 512 tokens a step" in out and err == ""
    assert all(name in out for name in ("base", "adapter", "optimizer", "batch", "temporaries", "total", "products"))
    assert (there / "memory.png").read_bytes().startswith(b"\x89PNG") and not (there / "plan.png").exists()
    line = next(line for line in out.splitlines() if "to run it" in line)
    config, args = config_of(line.partition(": ")[2].removesuffix(" --data …"))
    assert config == Config(task="chat", model="llama.json", batch_size=8, max_length=64, rank=2, quantize="none",
                            targets=targets)  # fmt: skip
    assert (args.remat, args.mesh, args.distributed) == ("full", "fsdp=4", False)


@pytest.mark.parametrize("config, topology", [
    (Config(task="chat", model="a b", targets="q_proj,v_proj", batch_size=16, accumulate=4, dropout=0.1), "v5e:4x4"),
    (Config(task="chat", method="prefix", settings={"length": 4, "flag": True, "text": "3", "word": "a b"}), "cpu:4"),
    (Config(model="bert", method="lora", alpha=8.0, dtype="bfloat16", max_length=32, quantize="int8"), "gpu:2"),
])  # fmt: skip
def test_what_is_to_be_run_is_what_was_planned(config, topology):
    choice = Choice(config, topology, "data=2,fsdp=2", "dots")
    found, args = config_of(command_of(choice))
    assert found == config and (args.mesh, args.remat) == (choice.mesh, "dots")
    assert args.distributed == topology.startswith("v5e")


def test_a_classifier_as_json(there, capsys):
    assert run(f"{LABELS} --json --mesh data=2,fsdp=2 --no-base") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 2, "fsdp": 2} and found["tokens"] == 8 * 32 and found["config"]["model"] == "bert"
    assert found["remat"] is None and found["fits"] is None and found["adapter_share"] is None
    memory = found["memory"]
    parts = [*memory["arguments"].values(), *(memory[name] for name in ("temporaries", "outputs", "program"))]
    assert memory["total"] == sum(parts) and set(memory["arguments"]) == {"base", "adapter", "optimizer", "batch"}


@pytest.fixture
def remembered(monkeypatch):
    """Compiles once what is planned for twice."""
    real, known = plan_sweep.run, {}

    def once(wanted, *args, **options):
        key = repr(wanted)
        known[key] = known.get(key) or real(wanted, *args, **options)
        return known[key]

    monkeypatch.setattr(sweep, "run", once)


def test_a_sweep_is_a_table_of_what_can_be_and_why_the_rest_cannot(there, capsys, remembered):
    asked = f"{LABELS.replace('--batch 8', '--batch 16,6,8')} --sweep --mesh fsdp=4 --mesh fsdp=3 --quantize none"
    assert run(asked) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    rows = [line for line in lines if line.startswith("fsdp=4 batch ")]
    assert [row.split()[2] for row in rows] == ["8", "16"]  # by memory, where nothing is known of cost
    missing = [line for line in lines if line.startswith("left out: ")]
    assert len(missing) == 4 and sum("but cpu:4 has 4 devices" in line for line in missing) == 3
    assert any("fsdp=4 batch 6: --batch-size 6 does not divide over the 4 parts" in line for line in missing)
    assert "needs the least memory: cpu:4 fsdp=4 none batch 8 remat none" in out and "none fits" not in out and not err
    config, args = config_of(lines[-1].removeprefix("to run it: ").removesuffix(" --data …"))
    assert (config.batch_size, args.mesh, args.remat) == (8, "fsdp=4", None)
    assert (there / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert run(f"{asked} --json --picture other.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert [plan["config"]["batch_size"] for plan in found["plans"]] == [8, 16] and len(found["failed"]) == 4
    assert found["best"] == found["plans"][0]["choice"] and (there / "other.png").exists()


def test_what_is_not_given_is_swept():
    config = Config(task="chat", batch_size=8, quantize="int8")
    found = plan_sweep.choices(config, ["cpu:4"], [], [], [], [], widen=True)
    assert {(c.mesh, c.remat, c.config.quantize) for c in found} == {
        (mesh, remat, scheme) for mesh in ("fsdp=4", "fsdp=2,tensor=2", "data=2,fsdp=2")
        for remat in ("full", "dots") for scheme in ("none", "nf4")
    }  # fmt: skip
    (only,) = plan_sweep.choices(config, ["cpu:4"], [], [], [], [], widen=False)
    assert (only.config, only.mesh, only.remat) == (config, None, "full")


@pytest.mark.parametrize("more, says", [
    ("--topology v9:2x2", "'v9:2x2' is no known topology: 'v9' is no known chip. Known: v2:{"),
    ("--mesh fsdp=3", "but cpu:4 has 4 devices"),
    ("--mesh rows=4", "'rows' is no axis that finetune spreads over, only data, fsdp, tensor, sequence"),
    ("--mesh tensor=4 --model odd.json", "--mesh tensor=4: odd.json: lm_head/kernel: an axis of 513 does not divide"),
    ("--batch 6", "--batch-size 6 does not divide over the 4 parts that the mesh's fsdp make; a multiple of 4 does"),
    ("--batch 8 --accumulate 4", "in each of 4 micro-batches; a multiple of 16 does"),
    ("--model llama-3-9b", "'llama-3-9b' is no known model; near it: llama-3"),
    ("--model ./nothing.json", "nothing.json"),
    ("--model bert", "--model bert: an encoder; it is planned for with --task classify"),
    ("--task classify", "--model llama.json: a language model; it is planned for with --task chat"),
    ("--task classify --model bert --remat full", "--remat full: is for language models"),
    ("--task classify --model bert --quantize nf4", "--model bert: cannot quantize 'encoder/layer/0/"),
    ("--seq 129", "--seq 129: the model takes at most 128 tokens"),
    ("--seq 0", "at least 1"),
    ("--targets nothing", "nothing"),
    ("--method lore", "lore"),
    ("--rank 0", "rank"),
    ("--jobs 0", "--jobs 0: expected at least 1"),
    ("--batch 4,8", "2 choices are given; --sweep plans for each"),
    ("--topology cpu:2,cpu:4", "2 choices are given; --sweep plans for each"),
])  # fmt: skip
def test_what_cannot_be_planned_for(there, capsys, more, says):
    assert run(f"{CHAT} {more}") == 1
    out, err = capsys.readouterr()
    assert says in err and err.startswith("jpeft: error: ") and err.count("\n") == 1 and not out
    assert "unexpected" not in err


@pytest.mark.parametrize("more, says", [
    ("--batch 0", "expected counts, from 1 on"), ("--quantize nf5", "'nf5' is none of none, nf4"),
    ("--remat all", "'all' is none of full, dots"), ("--dtype half", "invalid choice: 'half'"),
    ("--set length", "expected NAME=VALUE"), ("--seq many", "invalid int value"),
])  # fmt: skip
def test_what_is_no_command(capsys, more, says):
    with pytest.raises(SystemExit) as stop:
        run(f"{CHAT} {more}")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1


def test_a_sweep_of_nothing_that_can_be_says_why(there, capsys):
    assert run(f"{CHAT} --sweep --mesh fsdp=3 --quantize none --remat full,dots") == 1
    err = capsys.readouterr().err
    assert "none of 2 choices can be planned for; the first: --mesh fsdp=3: 3" in err


# --------------------------------------------------------------------------------------------------- what it runs on


def test_too_little_memory_to_compile(there, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "available_memory", lambda: 3 << 29)
    assert run(CHAT) == 1
    assert "not enough memory to compile: 1.5 GiB are free, 2 are needed" in capsys.readouterr().err


def test_libtpu_is_asked_for_where_it_is_missing(there, capsys, monkeypatch):
    monkeypatch.delenv(compiling.PYTHON, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(CHAT.replace("cpu:4", "v5e:2x2")) == 1
    assert 'v5e:2x2 needs libtpu: pip install "jpeft[plan]", or set JPEFT_PLAN_PYTHON' in capsys.readouterr().err


@pytest.mark.parametrize("there_is, says", [
    (None, "libtpu is not installed for "), ("0.0.41", "libtpu 0.0.41 is not the one that jax 9.9 is made for, 0.0.42"),
    ("0.0.420", "is not the one"), ("0.0.42", ""), ("0.0.42.1", ""),
])  # fmt: skip
def test_libtpu_has_to_be_the_one_that_jax_is_made_for(monkeypatch, there_is, says):
    def version(name):
        if name == "libtpu" and there_is is None:
            raise metadata.PackageNotFoundError(name)
        return {"jax": "9.9", "libtpu": there_is}[name]

    monkeypatch.setattr(topologies.metadata, "version", version)
    monkeypatch.setattr(topologies.metadata, "requires", lambda name: ["numpy", "libtpu==0.0.42.*; extra == 'tpu'"])
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext() as error:
        topologies.check_libtpu()
    assert not says or 'pip install "jax[tpu]==9.9"' in str(error.value)


def test_settings_for_other_devices_do_not_reach_the_compiler(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert jpeft.plan(*own(True), "cpu:4").devices == 4


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_that_is_stopped_ends_those_that_compile_for_it(there, number, status):
    slow = script(there / "slow", f'echo $$ > "{there}/$$.part"; mv "{there}/$$.part" "{there}/$$.pid"; exec sleep 600')
    more = "--sweep --batch 4,8 --mesh fsdp=4 --quantize none --jobs 2"
    code = f"import sys; sys.executable = {slow!r}; from jpeft.cli import main; sys.exit(main(sys.argv[1:]))"
    (there / "tmp").mkdir()
    told = {**os.environ, "TMPDIR": str(there / "tmp")}
    command = [sys.executable, "-c", code, *shlex.split(LABELS.replace("--batch 8", "")), *more.split()]
    with subprocess.Popen(command, env=told, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while len(found := list(there.glob("*.pid"))) < 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        pids = [int(path.stem) for path in found]
        assert len(pids) == 2 and all(map(alive, pids)) and len(list((there / "tmp").glob("jpeft-plan-*"))) == 2
        time.sleep(1)  # both are known to who waits for them
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:  # Python loses an interrupt that falls into a finalizer; people press again
            process.send_signal(number)
        assert process.wait(60) == status
        assert "interrupted" in process.stderr.read()
    assert not any(map(alive, pids)) and not list((there / "tmp").glob("jpeft-plan-*"))


# ---------------------------------------------------------------------------------------- what is traced for a backend


def heads(queries, keys, count, kv, seed=0):
    draw = np.random.default_rng(seed)
    shapes = (2, queries, count, 8), (2, keys, kv, 8), (2, keys, kv, 8)
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


SEGMENTS = jnp.asarray([[0] * 3 + [1] * 6 + [2] * 2, [0] * 11])
SEEN = (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None]) & jnp.tril(jnp.ones((11, 11), bool))
BLOCKS = {
    "causal": ((11, 11), {}),
    "window": ((11, 11), {"window": 3}),
    "prefix": ((11, 14), {}),
    "prefix and window": ((11, 14), {"window": 3}),
    "segments": ((11, 11), {"mask": SEEN, "causal": True}),
    "segments, not known to be causal": ((11, 11), {"mask": SEEN}),
    "both ways": ((11, 11), {"mask": SEEN | SEEN.swapaxes(2, 3)}),
    "keys that all see": ((11, 11), {"mask": (SEGMENTS < 2)[:, None, None]}),
    "whole blocks": ((12, 12), {}),
}


@pytest.mark.parametrize("name, kv", [*((name, 2) for name in BLOCKS), ("window", 1), ("segments", 4)])
def test_attention_in_blocks_is_attention(name, kv, monkeypatch):
    """As `jax.nn.dot_product_attention` of the whole has it, values and gradients."""
    monkeypatch.setattr(ops, "_BLOCK", 4)
    (queries, keys), options = BLOCKS[name]
    mask = options.get("mask")
    if mask is None:
        mask = ops.causal_mask(queries, keys, options.get("window"))[None, None]

    def cut(*operands):
        with compiling_for("tpu"):
            return ops.attention(*operands, scale=0.4, **options)

    def whole(*operands):
        return jax.nn.dot_product_attention(*operands, mask=mask, scale=0.4, implementation="xla")

    @jax.jit
    def both(*operands):
        weigh = lambda f: jax.grad(lambda *o: (f(*o) * jnp.arange(8.0)).sum(), argnums=(0, 1, 2))  # noqa: E731
        return [(f(*operands), *weigh(f)(*operands)) for f in (cut, whole)]

    operands = heads(queries, keys, 4, kv)
    assert str(jax.make_jaxpr(cut)(*operands)).count("optimization_barrier") == -(-queries // 4) - 1
    for got, expected in zip(*both(*operands), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_query_that_sees_nothing_changes_no_other(monkeypatch):
    monkeypatch.setattr(ops, "_BLOCK", 4)
    operands = heads(11, 11, 4, 2)
    blind = SEEN & (jnp.arange(11) != 5)[None, None, :, None]
    with compiling_for("tpu"):
        got = ops.attention(*operands, blind, scale=0.4, causal=True)
        expected = ops.attention(*operands, SEEN, scale=0.4, causal=True)
    others = np.arange(11) != 5
    np.testing.assert_allclose(got[:, others], expected[:, others], atol=1e-6)
    assert np.isfinite(got).all()


def test_attention_whose_tokens_are_spread_is_not_cut(monkeypatch):
    monkeypatch.setattr(ops, "_BLOCK", 4)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"))

    def barriers(*spec):
        def attend(*operands):
            with compiling_for("tpu"), constrained(Layout(mesh, P(*spec), (2, 16))):
                return ops.attention(*operands, scale=0.4)

        return str(jax.make_jaxpr(attend)(*heads(16, 16, 4, 2))).count("optimization_barrier")

    assert barriers("data", "sequence") == 0 and barriers("data") == 3


def test_a_step_for_another_backend_is_another_program():
    step, params, _ = job()
    state, batch = state_of(step, params), batch_of()
    here = step.program(state, batch)
    with compiling_for("tpu"):
        there = step.program(state, batch)
        assert there is step.program(state, batch) is not here
    assert here is step.program(state, batch)
