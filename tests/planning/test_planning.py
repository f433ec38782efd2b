"""`jpeft plan` and `jpeft.plan`, compared with the same step compiled in this process on real arrays."""

import contextlib
import functools
import json
import os
import re
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
from jpeft.cli import app, main
from jpeft.cli.plan_output import command_of
from jpeft.core.backend import compiling_for
from jpeft.errors import UserError
from jpeft.hardware import topologies
from jpeft.hardware.topologies import parse
from jpeft.models.decoder import DecoderConfig
from jpeft.parallel.mesh import abstract_mesh
from jpeft.planning import PlanError, compiling, hlo
from jpeft.planning.plan import prepare
from jpeft.recipes import plan_sweep
from jpeft.recipes.config import Config, Execution
from jpeft.recipes.options import options
from jpeft.recipes.plan_sweep import Choice, Grid
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
    """Workers that compile with the flags of this process (conftest.py), which halve their time."""
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


def mesh_for(topology, mesh=None):
    return abstract_mesh(mesh, topology.devices, topology.name)


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
    inputs = state_of(step, params), params, batch_of()
    prepared = prepare(step, inputs, topology, mesh_for(topology), names=names)
    with prepared.compiling() as compilations:
        plan = prepared.conclude(*compilations)
        texts = [each.result()["text"] for each in compilations]
    mesh = mesh_of((4,), ("fsdp",))
    base = jpeft.shard(zeros(params), mesh, names=names)
    state, batch = state_of(step, base), jpeft.shard_batch(batch_of(), mesh)
    return plan, texts, step.lower(state, base, batch).compile(), (state, base, batch)


# ------------------------------------------------------------------------------------------- what a step needs and does


def test_memory_equals_that_of_the_compiled_step(llama):
    plan, _, real, _ = llama
    told = real.memory_analysis()
    assert sum(plan.memory.arguments.values()) == told.argument_size_in_bytes
    assert plan.memory.temporaries == told.temp_size_in_bytes > 0
    assert plan.memory.outputs == told.output_size_in_bytes - told.alias_size_in_bytes
    assert plan.memory.total == told.argument_size_in_bytes + plan.memory.temporaries + plan.memory.outputs
    assert plan.fits is None and "the memory of cpu:4 is unknown" in str(plan)


def test_arguments_are_the_bytes_on_one_device(llama):
    plan, _, _, (state, base, batch) = llama
    counters = (state.step, state.rng, state.skipped)
    assert plan.memory.arguments == {
        "base": held(base), "adapter": held(state.adapter), "optimizer": held(state.opt_state, counters),
        "batch": held(batch),
    }  # fmt: skip


def by_hand(devices, scanned):
    """FLOPs of a device: LoRA on all linear layers, remat of layers, attention as CPUs compute it.

    Two values: attention has its own checkpoint, and not every XLA version shares the recomputation of QK'.
    """
    cfg, tokens = DecoderConfig(**LLAMA), ROWS * LENGTH // devices
    heads, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    hidden, wide = cfg.hidden_size, cfg.intermediate_size
    shapes = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden), (hidden, wide), (hidden, wide),
              (wide, hidden)]  # fmt: skip
    weights = sum(i * o for i, o in shapes)
    linear = 2 * weights + 2 * weights + 2 * (weights - wide * hidden)  # y; dx; y again, where needed
    # xA again, dy B', and the two gradients. W + AB is computed before a product, for the device's shard, twice.
    lora = sum(4 * RANK * (i + o) for i, o in shapes)
    sums = 2 * 2 * RANK * weights / devices
    scores = 2 * LENGTH * heads
    attention = 2 * scores + 2 * scores + 4 * scores  # QK' and PV; again; four products backward
    more = tokens * cfg.num_hidden_layers * scores
    head = 3 * 2 * hidden * cfg.vocab_size  # a chunk's logits, again, dx
    total = tokens * (cfg.num_hidden_layers * (linear + lora + attention) + head) + cfg.num_hidden_layers * sums
    # The first layer's input needs no gradient, which XLA sees only in unrolled layers.
    total -= 0 if scanned else tokens * 2 * (hidden * heads + 2 * hidden * kv)
    return pytest.approx(total, rel=0.005), pytest.approx(total + more, rel=0.005)


def test_flops_equal_a_count_by_hand(llama):
    plan, _, real, _ = llama
    assert plan.flops in by_hand(4, scanned=True)
    assert real.cost_analysis()["flops"] < 0.6 * plan.flops  # XLA counts one of three layers
    assert 0.5 < plan.model_flops / (plan.flops * 4) < 1


@pytest.mark.exhaustive
def test_flops_of_unrolled_layers(llama):
    step, params, names = job(scan_layers=False)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of())
    plan = jpeft.plan(step, state_of(step, params), params, batch, "cpu:4", {"fsdp": 4}, names=names,
                      against_base=False)  # fmt: skip
    assert plan.flops in by_hand(4, scanned=False)
    assert plan.memory.arguments == llama[0].memory.arguments and plan.adapter_share is None


def test_the_adapter_share_is_its_additional_traffic(llama):
    plan, texts, _, _ = llama
    total, base = (sum(c.times * c.bytes for c in hlo.read(text).collectives) for text in texts)
    assert 0 < plan.adapter_share < 0.5 and plan.adapter_share == pytest.approx(1 - base / total)
    assert sum(t.bytes for t in plan.collectives) == total and {t.axes for t in plan.collectives} == {"fsdp"}
    assert f"the adapter causes {plan.adapter_share:.2%}" in str(plan)


def test_no_adapter_share_for_one_device_or_without_against_base():
    step, params, names = job()
    for topology, how in (("cpu:1", {}), ("cpu:4", {"against_base": False})):
        topology = parse(topology)
        inputs = state_of(step, params), params, batch_of()
        found = prepare(step, inputs, topology, mesh_for(topology), names=names, **how)
        assert not found.comparison


@pytest.mark.exhaustive
def test_a_quantized_base_on_another_mesh_with_gradient_accumulation(llama):
    """Arrays on eight devices, planned for four with axes of the same names."""
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


@pytest.mark.parametrize("donate, on_arrays", [(True, False), (False, True)])
def test_a_custom_step(donate, on_arrays, caplog, monkeypatch):
    """Planned from unsharded inputs, or from arrays that are sharded over eight devices for four of them."""
    step, *inputs = own(donate)
    mesh, axes = mesh_of((2, 2), ("data", "fsdp")), "data=2,fsdp=2"
    state, params, batch = inputs
    if on_arrays:
        larger = mesh_of((2, 4), ("data", "fsdp"))
        state = jax.device_put(state, NamedSharding(larger, P()))
        inputs = state, jpeft.shard(params, larger), jpeft.shard_batch(batch, larger)
    # Settings for other devices must not reach the compiler.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    arrays = {id(x) for x in jax.live_arrays()}
    with jax.log_compiles():
        plan = jpeft.plan(step, *inputs, "cpu:4", axes)
    assert not {id(x) for x in jax.live_arrays()} - arrays and not any(x.is_deleted() for x in jax.tree.leaves(state))
    assert "Finished tracing" in caplog.text and "XLA compilation" not in caplog.text  # nothing is compiled here
    replicated = jax.device_put(state, NamedSharding(mesh, P()))
    sharded = jpeft.shard(params, mesh), jpeft.shard_batch(batch, mesh)
    assert plan.memory.arguments == {"state": held(replicated), "base": held(sharded[0]), "batch": held(sharded[1])}
    assert plan.memory.outputs >= 4 + (0 if donate else held(replicated))
    assert plan.memory.outputs <= 64 + (0 if donate else held(replicated) + 64)
    assert plan.model_flops is None and plan.adapter_share is None and plan.tokens == 32
    assert (
        plan.flops == 2 * 8 * (16 * 256 + 256 * 8) and plan.devices == 4 and dict(plan.mesh) == {"data": 2, "fsdp": 2}
    )


def test_spellings_of_meshes():
    topology = parse("cpu:8")
    concrete, abstract = jax.make_mesh((2, 4), ("data", "fsdp")), AbstractMesh((2, 4), ("data", "fsdp"))
    asked = ["data=2,fsdp=4", " data = 2, fsdp = 4", {"data": 2, "fsdp": 4}, concrete, abstract]
    kinds = (AxisType.Auto,) * 2  # whatever the given mesh has, XLA propagates shardings
    assert {mesh_for(topology, mesh) for mesh in asked} == {abstract.update(axis_types=kinds)}
    assert mesh_for(topology).shape_tuple == (("fsdp", 8),)


@pytest.mark.parametrize("mesh, says", [
    ("fsdp=3", "`mesh` fsdp=3: a mesh of 3, but cpu:4 has 4 devices"),
    ({"data": 2, "fsdp": 4}, "`mesh` data=2,fsdp=4: 2 × 4 is 8, but cpu:4 has 4 devices"),
    ("fsdp", "expected axes such as"), ("fsdp=2,fsdp=2", "each once"), ("", "expected axes"), ({}, "has 4 devices"),
])  # fmt: skip
def test_meshes_that_do_not_suit_the_devices(mesh, says):
    with pytest.raises(UserError) as error:
        jpeft.plan(*own(True), "cpu:4", mesh)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_axes_that_do_not_divide():
    step, state, params, batch = own(True)
    with pytest.raises(ValueError, match=r"batch's \['x'\] of shape \(30, 16\): 30 does not divide over 'fsdp'"):
        jpeft.plan(step, state, params, {"x": batch["x"][:30], "y": batch["y"][:30]}, "cpu:4")
    with pytest.raises(ValueError, match=r"Dense_0/kernel: an axis of 8 does not divide over 'fsdp', which is 16 wide"):
        jpeft.plan(step, state, params, batch, "cpu:16", rules=[(".*/kernel", P(None, "fsdp"))])
    there = jpeft.shard(params, jax.make_mesh((8,), ("rows",)), [(".*/kernel", P(None, "rows"))])
    with pytest.raises(PlanError, match=r"is sharded over 'rows', which the mesh .*'fsdp': 4.* does not have"):
        jpeft.plan(step, state, there, batch, "cpu:4")


# ----------------------------------------------------------------------------------------------- compilers that fail


BROKEN = {
    "killed": ("kill -9 $$", "cpu:4: the compiler was killed, most likely because this machine ran out of memory"),
    "aborts": ("echo 'F0101 Check failed: a == b' >&2; echo last >&2; exit 3", "ended with status 3: F0101 Check fail"),
    "silent": ("exit 5", "cpu:4: the compiler ended with status 5 and no message"),
    "garbage": ("echo '{\"seco' > $3/result.json; exit 1", "cpu:4: the compiler ended with status 1"),
    "told": ("""printf '%s' '{"error": "Boom:\\n a  b"}' > $3/result.json""", "cpu:4: Boom: a b"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_failing_compiler_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    text, says = BROKEN[name]
    with pytest.raises(PlanError) as error:
        jpeft.plan(*own(True), "cpu:4", python=script(tmp_path / "python", text))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


@pytest.mark.parametrize("seen_on", ["", "v5p:2x2x1"])
def test_a_program_that_the_compiler_rejects(seen_on, llama):
    said = (Path(__file__).parent / "data" / "hlo_refused.txt").read_text()
    if seen_on:  # newer compilers name no buffers; they are listed for chips with more memory
        said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 739.76M of 738.00M hbm."
    topology = parse("v5e:2x2")
    step, *inputs = own(True)
    prepared = prepare(step, tuple(inputs), topology, mesh_for(topology))

    class Refused:
        def result(self):
            text = llama[1][0] if seen_on else ""
            return {"refused": said, "seconds": 1.0, "host_bytes": 1, "text": text, "seen_on": seen_on}

    plan = prepared.conclude(Refused())
    assert plan.memory.total == round(739.76 * 2**20) and plan.capacity == 738 * 2**20
    assert plan.refused and plan.fits is False and plan.seconds is None and plan.chip.name == "v5e"
    told = str(plan)
    assert "does not fit: 0.72 of 0.72 GiB, 0.00 over (rejected by the compiler)" in told
    assert ("from the same step on v5p:2x2x1" if seen_on else "bf16[8192,8192]") in told and "matmuls" not in told
    assert json.loads(json.dumps(plan.to_dict()))["fits"] is False


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A working folder with a Llama's `config.json` as a file and a BERT's in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    (tmp_path / "odd.json").write_text(json.dumps({**LLAMA, "vocab_size": 513}))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps(BERT))
    return tmp_path


CHAT = "plan --model llama.json --topology cpu:4 --batch 8 --seq 64 --no-base --rank 2"
LABELS = "plan --task classify --model bert --topology cpu:4 --batch 8 --seq 32 --targets query"


def run(text):
    return main(shlex.split(text))


def config_of(command):
    """The configuration and arguments that `jpeft finetune` parses."""
    _, given, _ = app._parse(shlex.split(command)[1:])
    parts = [{name: given[name] for name in options(kind) if name in given} for kind in (Config, Execution)]
    return Config(**parts[0]), Execution(**parts[1])


def test_the_command_prints_a_plan_and_how_to_run_it(there, capsys):
    targets = ".*/(q|v)_proj"
    assert run(f"{CHAT} --targets '{targets}' --dtype float32 --picture memory.png") == 0
    out, err = capsys.readouterr()
    assert "cpu:4: 4 devices, mesh fsdp=4; 512 tokens per step" in out and err == ""
    assert all(name in out for name in ("base", "adapter", "optimizer", "batch", "temporaries", "total", "matmuls"))
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
def test_the_printed_command_has_the_planned_configuration(config, topology):
    choice = Choice(config, topology, "data=2,fsdp=2", "dots")
    found, args = config_of(command_of(choice))
    assert found == config and (args.mesh, args.remat) == (choice.mesh, "dots")
    assert args.distributed == topology.startswith("v5e")


@pytest.fixture(scope="module")
def compiled_once():
    """Compiles every choice only once."""
    real, known = plan_sweep.run, {}

    def once(choices, *args, **options):
        if new := [choice for choice in choices if repr(choice) not in known]:
            known.update(zip(map(repr, new), real(new, *args, **options), strict=True))
        return [known[repr(choice)] for choice in choices]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_sweep, "run", once)
        yield


def test_a_classifier_as_json(there, capsys, compiled_once):
    assert run(f"{LABELS} --json --mesh data=2,fsdp=2 --no-base") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 2, "fsdp": 2} and found["tokens"] == 8 * 32 and found["config"]["model"] == "bert"
    assert found["remat"] is None and found["fits"] is None and found["adapter_share"] is None
    memory = found["memory"]
    parts = [*memory["arguments"].values(), *(memory[name] for name in ("temporaries", "outputs", "program"))]
    assert memory["total"] == sum(parts) and set(memory["arguments"]) == {"base", "adapter", "optimizer", "batch"}


def test_a_sweep_prints_a_table_and_the_errors_of_the_rest(there, capsys, compiled_once):
    asked = (
        f"{LABELS.replace('--batch 8', '--batch 16,6,8')} --sweep --mesh data=2,fsdp=2 --mesh fsdp=3 --quantize none"
    )
    assert run(asked) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    rows = [line for line in lines if line.startswith("data=2,fsdp=2 batch ")]
    assert [row.split()[2] for row in rows] == ["8", "16"]  # by memory, because the cost is unknown
    missing = [line for line in lines if line.startswith("left out: ")]
    assert (
        len(missing) == 4
        and sum("--mesh fsdp=3: a mesh of 3, but cpu:4 has 4 devices" in line for line in missing) == 3
    )
    assert any("data=2,fsdp=2 batch 6: --batch-size 6 does not divide over the 4 parts" in line for line in missing)
    assert (
        "needs the least memory: cpu:4 data=2,fsdp=2 none batch 8 remat none" in out
        and "none fits" not in out
        and not err
    )
    config, args = config_of(lines[-1].removeprefix("to run it: ").removesuffix(" --data …"))
    assert (config.batch_size, args.mesh, args.remat) == (8, "data=2,fsdp=2", "none")
    assert (there / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert run(f"{asked} --json --picture other.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert [plan["config"]["batch_size"] for plan in found["plans"]] == [8, 16] and len(found["failed"]) == 4
    assert found["best"] == found["plans"][0]["choice"] and (there / "other.png").exists()


def test_a_sweep_widens_what_is_not_given():
    config = Config(task="chat", batch_size=8, quantize="int8")
    found = Grid(["cpu:4"], widen=True).choices(config)
    assert {(c.mesh, c.remat, c.config.quantize) for c in found} == {
        (mesh, remat, scheme) for mesh in ("fsdp=4", "fsdp=2,tensor=2", "data=2,fsdp=2")
        for remat in ("full", "dots") for scheme in ("none", "nf4")
    }  # fmt: skip
    (only,) = Grid(["cpu:4"]).choices(config)
    assert (only.config, only.mesh, only.remat) == (config, None, "full")


@pytest.mark.parametrize("more, says", [
    ("--topology v9:2x2", "unknown topology 'v9:2x2': unknown chip 'v9'. Known: v2:{"),
    ("--mesh fsdp=3", "--mesh fsdp=3: a mesh of 3, but cpu:4 has 4 devices"),
    ("--mesh rows=4", "--mesh: finetune has no axis 'rows'; its axes are data, fsdp, tensor, sequence"),
    ("--mesh tensor=4 --model odd.json", "--mesh tensor=4: odd.json: lm_head/kernel: an axis of 513 does not divide"),
    ("--batch 6", "--batch-size 6 does not divide over the 4 parts that the mesh's fsdp make; a multiple of 4 does"),
    ("--batch 8 --accumulate 4", "in each of 4 micro-batches; a multiple of 16 does"),
    ("--model llama-3-9b", "unknown model 'llama-3-9b'; did you mean llama-3"),
    ("--model ./nothing.json", "nothing.json"),
    ("--model bert", "--model bert: an encoder; plan for it with --task classify"),
    ("--task classify", "--model llama.json: a language model; plan for it with --task chat"),
    ("--task classify --model bert --remat full", "--remat full: is for language models"),
    ("--task classify --model bert --quantize nf4", "--model bert: cannot quantize 'encoder/layer/0/"),
    ("--seq 129", "--max-length 129: the model takes at most 128 tokens"),
    ("--seq 0", "at least 1"),
    ("--targets nothing", "nothing"),
    ("--rank 0", "rank"),
    ("--jobs 0", "--jobs must be at least 1, got 0"),
    ("--batch 0", "--batch-size must be comma-separated numbers from 1 on, got '0'"),
    ("--quantize nf5", "--quantize must be one or several of none, nf4, int4, int8, fp8, got 'nf5'"),
    ("--quantize ,", "--quantize must be one or several of none"),
    ("--remat all", "--remat must be one or several of full, dots, offload, none, got 'all'"),
    ("--batch 4,8", "2 combinations are given; --sweep plans all of them"),
    ("--topology cpu:2,cpu:4", "2 combinations are given; --sweep plans all of them"),
])  # fmt: skip
def test_mistakes_in_planning(there, capsys, more, says):
    assert run(f"{CHAT} {more}") == 1
    out, err = capsys.readouterr()
    assert says in err and err.startswith("jpeft: error: ") and err.count("\n") == 1 and not out
    assert "unexpected" not in err


@pytest.mark.parametrize("more, says", [
    ("--dtype half", "--dtype must be one of float32, bfloat16, float16, got 'half'"),
    ("--method loraa", "did you mean 'lora'?"),
    ("--set length", "expected NAME=VALUE"), ("--seq many", "--seq must be an integer, got 'many'"),
])  # fmt: skip
def test_mistakes_in_typing(capsys, more, says):
    with pytest.raises(SystemExit) as stop:
        run(f"{CHAT} {more}")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1


def test_a_sweep_without_any_plan(there, capsys):
    assert run(f"{CHAT} --sweep --mesh fsdp=3 --quantize none --remat full,dots") == 1
    err = capsys.readouterr().err
    assert "none of 2 combinations can be planned; the first: --mesh fsdp=3: a mesh of 3" in err


# --------------------------------------------------------------------------------------------------- what it runs on


def test_too_little_memory_to_compile(monkeypatch):
    monkeypatch.setattr(compiling, "available_memory", lambda: 3 << 29)
    with pytest.raises(PlanError, match=r"^not enough memory to compile: 1\.5 GiB are free, 2 GiB are needed$"):
        jpeft.plan(*own(True), "cpu:4")


def test_a_tpu_topology_needs_libtpu(monkeypatch):
    monkeypatch.delenv(compiling.PYTHON, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    says = 'v5e:2x2 needs libtpu: pip install "jpeft[plan]", or set JPEFT_PLAN_PYTHON to the Python of an environment'
    with pytest.raises(PlanError, match=re.escape(says)) as error:
        jpeft.plan(*own(True), "v5e:2x2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("there_is, says", [
    (None, "libtpu is not installed for "), ("0.0.41", "libtpu 0.0.41 does not belong to jax 9.9, which needs 0.0.42"),
    ("0.0.420", "libtpu 0.0.420 does not belong to jax 9.9"), ("0.0.42", ""), ("0.0.42.1", ""),
])  # fmt: skip
def test_libtpu_must_belong_to_jax(monkeypatch, there_is, says):
    def version(name):
        if name == "libtpu" and there_is is None:
            raise metadata.PackageNotFoundError(name)
        return {"jax": "9.9", "libtpu": there_is}[name]

    monkeypatch.setattr(topologies.metadata, "version", version)
    monkeypatch.setattr(topologies.metadata, "requires", lambda name: ["numpy", "libtpu==0.0.42.*; extra == 'tpu'"])
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext() as error:
        topologies.check_libtpu()
    assert not says or 'pip install "jax[tpu]==9.9"' in str(error.value)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_ends_its_compilers(there, number, status):
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
        time.sleep(1)  # the command waits for both
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:  # Python loses an interrupt during a finalizer; users press again
            process.send_signal(number)
        assert process.wait(60) == status
        assert "interrupted" in process.stderr.read()
    assert not any(map(alive, pids)) and not list((there / "tmp").glob("jpeft-plan-*"))


def test_a_step_for_another_backend_is_another_program():
    step, params, _ = job()
    state, batch = state_of(step, params), batch_of()
    here = step.program(state, batch)
    with compiling_for("tpu"):
        there = step.program(state, batch)
        assert there is step.program(state, batch) is not here
    assert here is step.program(state, batch)


def test_a_program_for_a_gpu_is_the_one_that_runs_there(monkeypatch):
    """On a GPU, cuDNN computes attention in half precision: it is lowered for devices, and its calls are serialized."""
    from jax import export
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from jpeft.models import ops

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(ops, "_implementation", lambda *operands: "cudnn")
    monkeypatch.setattr(sys.modules[prepare.__module__], "describe", lambda topology: jax.devices()[: topology.devices])
    step, params, names = job(param_dtype=jnp.bfloat16)
    inputs, alone = (state_of(step, params), params, batch_of()), parse("gpu:1")
    program = prepare(step, inputs, alone, mesh_for(alone), names=names).program
    text = export.deserialize(bytearray(program.data)).mlir_module()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    two = parse("gpu:2")
    with pytest.raises(PlanError, match="cuDNN's attention over several GPUs"):
        prepare(step, inputs, two, mesh_for(two), names=names)
