"""Plans from libtpu's compiler, without a TPU: `JPEFT_PLAN_PYTHON=… pytest -n 0 tests/tpu`."""

import json
import os
import subprocess
import sys

import pytest

from jpeft.cli import main
from jpeft.planning.compiling import PYTHON
from jpeft.planning.result import Memory
from jpeft.recipes import plan_sweep
from jpeft.recipes.config import CHAT, Config
from jpeft.recipes.plan_sweep import Choice

pytestmark = pytest.mark.usefixtures("libtpu", "standard_promotion")
LLAMA = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1536,
         "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 4096}  # fmt: skip


@pytest.fixture(scope="module")
def libtpu():
    """These tests fail without libtpu: its output is what they check."""
    python = os.environ.get(PYTHON, sys.executable)
    code = "from jpeft.hardware.topologies import check_libtpu; check_libtpu()"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        pytest.fail(f"{python}: {found.stderr.strip().splitlines()[-1]}; set {PYTHON} to a Python that has libtpu")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a small decoder on a topology, and the compiler's result; each compiled once."""
    known = {}

    def plan(topology, **sizes):
        key = topology, json.dumps(sizes)
        if key not in known:
            path = tmp_path_factory.mktemp("model") / "config.json"
            path.write_text(json.dumps({**LLAMA, **sizes.get("model", {})}))
            config = Config(task=CHAT, model=str(path), batch_size=sizes.get("rows", 16), rank=8, dtype="bfloat16",
                            max_length=sizes.get("length", 512), quantize="none", targets="q_proj,v_proj")  # fmt: skip
            prepared = plan_sweep.trace(Choice(config, topology, remat=sizes.get("remat")), against_base=False)
            with prepared.compiling() as (compilation,):
                known[key] = prepared.conclude(compilation), compilation.result()
        return known[key]

    return plan


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1"])
def test_memory_is_what_the_compiler_reports(planned, topology):
    plan, result = planned(topology)
    said, memory = result["memory"], plan.memory
    assert sum(memory.arguments.values()) == said["argument"] and memory.temporaries == said["temp"] > 0
    assert memory.outputs == said["output"] - said["alias"] and memory.program == said["generated_code"] > 0
    assert memory.total == sum(said[name] for name in ("argument", "temp", "output", "generated_code")) - said["alias"]
    assert plan.fits and not plan.refused and plan.capacity == plan.chip.hbm_usable
    assert plan.seconds == max(plan.floor.values()) > 0 and set(plan.floor) == {"matmul", "memory", "interconnect"}
    assert {traffic.axes for traffic in plan.collectives} == {"fsdp"}
    assert (
        0.6 < plan.model_flops / (plan.flops * plan.devices) < 1.1
    )  # without remat; half of causal attention may be skipped


def test_more_chips_need_less_each(planned):
    few, many = planned("v5e:2x2")[0].memory, planned("v5e:4x4")[0].memory
    assert isinstance(few, Memory) and many.total < 0.5 * few.total
    assert many.arguments["base"] < 0.5 * few.arguments["base"] and many.temporaries < 0.5 * few.temporaries


def test_a_rejected_step_lists_its_largest_buffers(planned):
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
    plan, _ = planned("v5e:2x2", model=wide, rows=2048, length=256)
    assert plan.refused and plan.fits is False and plan.memory.total > 1.5 * plan.capacity > 2**34
    told = str(plan)
    assert "rejected by the compiler" in told and plan.largest[0].shape in told and "jpeft/models/" in told
    assert plan.seen_on in told and [b.bytes * b.count for b in plan.largest] > [2**30]


def test_lora_on_8b_fits_four_v5e(capsys):
    # As many tokens as in rows of 2048, whose attention is compiled in more blocks.
    command = "plan --model llama-3-8b --topology v5e:2x2 --batch 32 --seq 1024 --rank 16 --no-base --json"
    assert main(command.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["capacity"] > found["memory"]["total"] > 8 * 2**30
    assert found["memory"]["arguments"]["base"] == pytest.approx(2 * 8_030_261_248 / 4, rel=0.01)
    assert found["model_flops"] > 4 * 7.5e9 * 32 * 1024 and found["host_bytes"] < 8 * 2**30
