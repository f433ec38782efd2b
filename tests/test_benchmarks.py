"""`benchmarks/gpu.py` on a CPU: its cases, limits and tables, and the whole script with jax, flax and optax alone; and
`benchmarks/methods.py`, `benchmarks/nnx.py`, `benchmarks/prompts.py` and `benchmarks/many.py` on tiny models."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
# What jpeft, its command line and its comparisons import besides jax, flax and optax.
ABSENT = ("jaxtyping", "safetensors", "orbax", "tokenizers", "jinja2", "grain", "gguf", "pandas", "matplotlib", "torch")


@pytest.fixture(scope="module")
def scripts():
    """Imports a script of the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


@pytest.fixture(scope="module")
def gpu(scripts):
    return scripts("gpu")


def names(gpu, *argv):
    args = gpu.parsed([*argv, "--tiny"])
    return [f"{section}/{shape}" for section, shape, _ in gpu.cases(args, "cpu")]


def test_sections_and_shapes_choose_what_runs(gpu):
    assert names(gpu, "--only", "torch", "--shapes", "1B") == ["torch lora/1B", "torch qlora/1B"]
    assert names(gpu, "--only", "qlora,torch,decode", "--shapes", "8B") == [
        "qlora/8B", "torch qlora/8B", "plan qlora/8B", "decode/8B"
    ]  # fmt: skip
    assert len(names(gpu)) == len(set(names(gpu))) == 16
    cases = {section: case for section, _, case in gpu.cases(gpu.parsed(["--shapes", "8B"]), "gpu")}
    weights = cases["lora"]["config"]
    assert (weights["hidden_size"], weights["num_hidden_layers"], cases["lora"]["length"]) == (4096, 32, 4096)
    assert cases["torch lora"]["config"] == weights and cases["torch lora"]["rows"] == cases["lora"]["rows"]


def test_an_unknown_section_is_one_line(gpu, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.parsed(["--only", "lora,backward"])
    assert "--only backward: expected some of lora, qlora" in capsys.readouterr().err.splitlines()[-1]


def test_tables_state_utilization_ratios_and_what_is_missing(gpu, capsys):
    ours = {
        "seconds": 0.5,
        "first_seconds": 9.0,
        "tokens": 4096,
        "flops_4n": 2e14,
        "flops": 2.5e14,
        "peak_bytes": 2**31,
    }
    theirs = {"seconds": 0.75, "first_seconds": 1.0, "tokens": 4096, "peak_bytes": 3 * 2**30}
    found = {"lora/1B": ours, "torch lora/1B": theirs, "plan lora/1B": {"bytes": 2**30}, "qlora/1B": {"failed": "OOM"}}
    gpu.train_table(found, 1e15)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    head, mine, torch, failed = rows[0], *rows[2:]
    row = dict(zip(head, mine, strict=True))
    assert (row["tokens/s"], row["MFU 4 N"], row["MFU all"]) == ("8,192", "40.0%", "50.0%")
    assert (row["peak GiB"], row["planned GiB"], row["torch / jpeft: time"]) == ("2", "1", "")
    row = dict(zip(head, torch, strict=True))
    assert (row["MFU 4 N"], row["torch / jpeft: time"], row["memory"]) == ("26.7%", "1.50", "1.50")
    assert failed[:4] == ["qlora", "1B", "jpeft", "OOM"]


def test_what_is_left_after_the_minutes_is_not_started(gpu, capsys, monkeypatch, tmp_path):
    device = {"backend": "cpu", "kind": "cpu", "peak_flops": None}
    started = []
    monkeypatch.setattr(gpu, "run", lambda script, case, env, limit: started.append(case["what"]) or device)
    assert gpu.main(["--minutes", "0.05", "--json", str(tmp_path / "out.json")]) == 0
    assert started == ["probe"]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {each["missing"] for each in results.values()} == {"not run: 0.05 minutes are over"}


def test_methods_are_measured_against_lora(scripts, tmp_path, capsys):
    file = tmp_path / "methods.json"
    argv = ["--tiny", "--no-torch", "--rounds", "1", "--models", "encoder", "--only", "Train,LoRA"]
    with jax.numpy_dtype_promotion("standard"):  # for optax
        scripts("methods").main([*argv, "--json", str(file)])
    rows = json.loads(file.read_text())["models"]["encoder"]
    assert list(rows) == ["Train", "LoRA"]
    assert rows["LoRA"]["relative"] == {"flops": 1, "temporary_bytes": 1, "time": 1}
    assert 0 < rows["Train"]["relative"]["flops"] < 1 and rows["Train"]["trained"] < rows["LoRA"]["trained"]
    head, _, train, *_ = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    row = dict(zip(map(str.strip, head), map(str.strip, train), strict=True))
    assert row["trained"] == f"{rows['Train']['trained']:,}" and row["torch ms"] == ""


@pytest.mark.exhaustive  # a step of each, here and in torch
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.filterwarnings("ignore")  # torch's and peft's own
def test_every_method_is_measured(scripts, tmp_path):
    from jpeft.core.interchange import HFSpec, form
    from jpeft.methods import METHODS

    file = tmp_path / "methods.json"
    specs = {name: spec for name, cls in METHODS.items() if isinstance(spec := form(cls), HFSpec)}
    causal = [name for name, spec in specs.items() if spec.task_type]  # in torch on decoders alone
    for model, names in (("encoder", [*METHODS]), ("decoder", ["LoRA", *causal])):
        argv = ["--tiny", "--rounds", "1", "--models", model, "--only", ",".join(names), "--json", str(file)]
        with jax.numpy_dtype_promotion("standard"):  # for optax
            scripts("methods").main(argv)
        rows = json.loads(file.read_text())["models"][model]
        assert list(rows) == names
        for name, row in rows.items():
            decoders = {*causal, "LlamaAdapter", "MultitaskPromptTuning"}
            in_torch = name in specs and not (name in decoders and model == "encoder")
            assert "missing" in row or "torch" in row or not in_torch, name


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of qwix and tunix
@pytest.mark.exhaustive  # with qwix, which the README's test command does not install
@pytest.mark.parametrize("model", ["own", "tunix"])
def test_steps_of_nnx_models_compute_the_same(scripts, tmp_path, capsys, model):
    pytest.importorskip("qwix")
    file = tmp_path / "nnx.json"
    with jax.numpy_dtype_promotion("standard"):  # for optax, qwix and tunix
        scripts("nnx").main(["--tiny", "--rounds", "1", "--models", model, "--json", str(file)])
    rows = json.loads(file.read_text())["models"][model]
    assert list(rows) == ["full", "functional", "attached", "qwix", *(["wrappers"] if model == "own" else [])]
    losses = {name: row["loss"] for name, row in rows.items()}
    base, theirs = losses.pop("full"), losses["qwix"]
    assert abs(base - theirs) > 1e-3  # the adapter changes the model, and is the same in all
    assert losses == {name: pytest.approx(theirs, abs=1e-5) for name in losses}
    ours = rows["functional"]
    assert rows["attached"]["relative"]["flops"] == pytest.approx(ours["relative"]["flops"], rel=1e-3)
    assert ours["relative"]["flops"] < rows["qwix"]["relative"]["flops"] == 1 < rows["full"]["relative"]["flops"]
    head, _, _, functional, *_ = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    row = dict(zip(map(str.strip, head), map(str.strip, functional), strict=True))
    assert row["temporaries MiB"] == f"{ours['temporary_bytes'] / 2**20:.1f}" and float(row["set up s"]) > 0


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.exhaustive  # nine programs; with torch another eight models
@pytest.mark.filterwarnings("ignore")  # torch's and peft's own
@pytest.mark.parametrize("torch", [False, True])
def test_prompts_and_prefixes_are_measured_against_lora_and_the_base(scripts, tmp_path, capsys, torch):
    if torch:
        pytest.importorskip("peft")
    file = tmp_path / "prompts.json"
    argv = ["--tiny", "--rounds", "1", "--json", str(file), *([] if torch else ["--no-torch"])]
    with jax.numpy_dtype_promotion("standard"):  # for optax
        scripts("prompts").main(argv)
    found = json.loads(file.read_text())
    methods = ["LoRA q, v", "prefix", "prefix, network", "prompt"]
    for part, base in (("train", []), ("decode", ["base"])):
        ours = [*base, *methods]
        assert list(found[part]) == ours + [f"torch {name}" for name in ours if torch]
        first = ours[0]
        assert found[part][first]["ratios"][first] == {"median": 1, "fastest": 1}
    flops = {name: found["train"][name]["flops"] for name in methods}
    assert flops["prefix"] < 1.1 * flops["LoRA q, v"]
    assert "### Decoding a token" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # torch's and peft's own
@pytest.mark.parametrize("torch", [False, True])
def test_many_adapters_are_measured_in_a_batch_a_step_and_an_engine(scripts, tmp_path, capsys, torch):
    if torch:
        pytest.importorskip("peft")
    file = tmp_path / "many.json"
    argv = ["--tiny", "--rounds", "1", "--json", str(file)]
    argv += ["--only", "decode"] if torch else ["--no-torch"]
    with jax.numpy_dtype_promotion("standard"):  # for optax
        scripts("many").main(argv)
    found = json.loads(file.read_text())
    ours = ["base", "1 adapter", "2 adapters", "2 adapters, loop", "4 adapters", "4 adapters, loop"]
    theirs = ["torch base", "torch 1 adapter", "torch 2 adapters", "torch 4 adapters"]
    assert list(found["decode"]) == ours + (theirs if torch else [])
    assert found["decode"]["base"]["ratio"] == {"median": 1, "fastest": 1}
    if not torch:
        assert list(found["population"]["4"]) == ["8 steps", "8 members in one step"]
        assert list(found["engine"]) == ["one by one", "engine"]
        assert next(iter(found["gpu"])) == "base" and len(found["gpu"]) == 6
        assert "### A token of 4 rows" in capsys.readouterr().out


def unit_record(quality, method, side, hits):
    unit = quality.Unit("reviews", side, method, 0, "quality", quality.BUDGETS["reviews"])
    sizes = {"trained": 900, "head": 100, "disk_bytes": 2e6, "state_bytes": 2**20, "growth_bytes": 2**21}
    score = {"accuracy": sum(map(int, hits)) / len(hits), "hits": hits}
    return {**vars(unit), **sizes, **score, "lr": 5e-4, "machine": {}}


def test_finished_runs_of_the_quality_benchmark_are_not_repeated(scripts, tmp_path, capsys, monkeypatch):
    quality, file, out = scripts("quality"), tmp_path / "runs.jsonl", tmp_path / "out.json"
    argv = ["--resume", str(file), "--json", str(out), "--tasks", "reviews", "--only", "LoRA", "--only", "PiSSA"]
    other = unit_record(quality, "IA3", "jpeft", "11") | {"budget": {"steps": 1}}
    file.write_text(json.dumps(unit_record(quality, "LoRA", "jpeft", "1110")) + "\n" + json.dumps(other) + "\n")
    started = []

    def run(command, **_):
        unit = json.loads(command[-1])
        started.append((unit["method"], unit["side"]))
        record = json.dumps(unit_record(quality, unit["method"], unit["side"], "1100"))
        return subprocess.CompletedProcess(command, unit["side"] == "torch", stdout=f"a line\n{record}\n")

    monkeypatch.setattr(quality.subprocess, "run", run)
    quality.main(argv)
    assert started == [("PiSSA", "jpeft"), ("LoRA", "torch")]  # torch cannot train PiSSA's folder as PiSSA
    done = [(each["method"], each["side"]) for each in json.loads(out.read_text())]
    assert done == [("LoRA", "jpeft"), ("PiSSA", "jpeft")]  # neither what failed nor runs of another budget
    told = capsys.readouterr()
    assert "LoRA 0 quality: failed" in told.err
    assert "| LoRA | 75.0% ± 25.0% |  | 0.0005 | 800 | 2.00 | 3 |  |" in told.out
    quality.main(argv)
    assert started[2:] == [("LoRA", "torch")]


def test_the_notebook_on_choosing_a_method_shows_runs_of_the_benchmarks_budgets(scripts):
    quality = scripts("quality")
    records = json.loads((FOLDER.parent / "notebooks/data/quality.json").read_text())
    assert {each["method"] for each in records} <= {*quality.METHODS, quality.BASE}
    assert all(each["budget"] == quality.BUDGETS[each["task"]] for each in records)


BARE = f"""
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in {ABSENT}:
            path = [folder for folder in sys.path if "site-packages" not in folder]
        return super().find_spec(name, path, target)

sys.meta_path = [Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
"""


@pytest.mark.exhaustive  # eight processes that import jax and compile
def test_the_script_runs_on_a_cpu_with_nothing_but_jax_flax_and_optax(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--shapes", "8B", "--rounds", "1", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found["torch lora/8B"] == found["torch qlora/8B"] == {"missing": "no torch"}
    for kind in ("lora", "qlora"):
        step, plan = found[f"{kind}/8B"], found[f"plan {kind}/8B"]
        assert step["tokens"] == 2 * 64 and step["seconds"] > 0
        assert 0 < step["compile_seconds"] < step["first_seconds"]  # the first step is compiled, and run
        assert plan["bytes"] == pytest.approx(step["program_bytes"], rel=0.02)  # the plan counts the code, too
        assert 0 < step["flops_4n"] < step["flops"]
    assert found["qlora/8B"]["base_bytes"] < found["lora/8B"]["base_bytes"]
    assert found["qlora/8B"]["flops"] == found["lora/8B"]["flops"]
    for kind, tokens in (("forward", "tokens_per_second"), ("decode", "prefill_tokens_per_second")):
        assert list(found[f"{kind}/8B"]) == ["no adapter", "adapter", "merged"]
        assert all(row[tokens] > 0 for row in found[f"{kind}/8B"].values())
    assert "| lora | 8B | torch | no torch |" in done.stdout and "### Decode" in done.stdout
