"""`jpeft finetune` on meshes and in several processes: the results equal those of one, and every mistake is reported.

The launches of several processes take minutes and are exhaustive, except the first.
"""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
from safetensors.numpy import load_file

from jpeft.cli import main
from tests.folders import link, write_bert, write_llama

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")
WORDS = ["red", "green", "blue", "one", "two", "three", "tea", "sun", "rain"]
CHAT = """finetune --task chat --model llama --data train.jsonl --eval test.jsonl --quantize none --samples 0 --rank 2
 --max-length 64 --batch-size 8 --steps 6 --checkpoint-every 3 --lr 1e-3"""
LABELS = """finetune --model bert --data labeled.jsonl --eval labelled_test.jsonl --batch-size 8 --epochs 1 --lr 1e-2
 --max-length 32"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversations(first, last):
    return [{"prompt": f"say {WORDS[i % 9]} {i}", "completion": f"{WORDS[i * 7 % 9]} {i}"} for i in range(first, last)]


def labeled(first, last):
    return [{"text": f"{WORDS[i % 9]} {WORDS[i * 7 % 9]}", "label": "ab"[i % 2]} for i in range(first, last)]


def chat(out, more=""):
    return f"{CHAT} --out {out} {more}".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    write_llama(folder / "llama", 64, 128, 3)
    write_bert(folder / "bert")
    write(folder / "train.jsonl", conversations(0, 48))
    write(folder / "test.jsonl", conversations(48, 60))
    write(folder / "labeled.jsonl", labeled(0, 44))
    write(folder / "labelled_test.jsonl", labeled(44, 60))
    return folder


LONG = "--steps 12 --epochs 2 --checkpoint-every 2"
SMOKE = {
    "labels": {"arguments": [*LABELS.split(), "--out", "labels"]},
    "labels of two": {"arguments": [*LABELS.split(), "--mesh", "data=2", "--out", "labels of two"], "processes": 2},
}


def kill(run, number):
    """Sends process 1 a signal at step 8, when two checkpoints have certainly been committed."""
    return {"file": f"{run}/metrics.jsonl", "holds": '"step": 8,', "process": 1, "signal": number}


PLAN = {
    "one": {"arguments": chat("one", "--samples 1")},
    "two": {
        "arguments": chat("two", "--mesh data=2,fsdp=2 --accumulate 2 --samples 1 --json"),
        "processes": 2,
        "devices": 2,
    },
    "four": {"arguments": chat("four", "--mesh fsdp=2,tensor=2"), "processes": 4},
    "long": {"arguments": chat("long", LONG)},
    "stopped": {"arguments": chat("stopped", LONG), "processes": 2, "kill": kill("stopped", signal.SIGTERM)},
    "stopped, resumed": {"arguments": chat("stopped", f"{LONG} --resume --mesh data=2,tensor=2"), "devices": 4},
    "killed": {"arguments": chat("killed", LONG), "processes": 2, "kill": kill("killed", signal.SIGKILL)},
    "killed, resumed": {"arguments": chat("killed", f"{LONG} --resume"), "processes": 2, "truncate": "killed"},
    "absent": {"arguments": chat("absent", "--join-within 4"), "processes": 2, "absent": 1},
    "other data": {"arguments": chat("other"), "processes": 2, "folders": ["here", "there"]},
    "not shared": {"arguments": chat("apart"), "processes": 2, "folders": ["here", "alike"]},
    "wrong file": {"arguments": chat("wrong"), "processes": 2, "folders": ["here", "bare"]},
    "other flags": {"arguments": chat("flags"), "processes": 2, "more": [[], ["--lr", "1"]]},
}


def launch(plan, folder):
    """Runs the launches of a plan in a folder; their results by name."""
    path = folder / "plan.json"
    path.write_text(json.dumps(list(plan.values())))
    subprocess.run([sys.executable, str(Path(__file__).with_name("many.py")), str(path)], check=True)
    return dict(zip(plan, json.loads(path.read_text()), strict=True))


@pytest.fixture(scope="module")
def launched(home, tmp_path_factory):
    """The results of all launches of `PLAN` by name, and the folder that they ran in."""
    folder = tmp_path_factory.mktemp("many")
    for name in ("", "here", "there", "alike", "bare"):
        (folder / name).mkdir(exist_ok=True)
        link(home, folder / name)
    (folder / "there/train.jsonl").unlink()
    write(folder / "there/train.jsonl", conversations(1, 49))
    (folder / "bare/test.jsonl").unlink()
    return launch(PLAN, folder), folder


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def check_same_result(run, reference):
    np.testing.assert_allclose(losses(run), losses(reference), rtol=1e-5)
    mine, theirs = (load_file(folder / "adapter/adapter.safetensors") for folder in (run, reference))
    for path, leaf in theirs.items():
        np.testing.assert_allclose(mine[path], leaf, atol=2e-5, err_msg=path)


def test_two_processes_give_the_result_of_one(home, tmp_path):
    link(home, tmp_path)
    done = launch(SMOKE, tmp_path)
    assert done["labels of two"]["status"] == [0, 0], done["labels of two"]["err"]
    assert done["labels of two"]["out"][0] and not done["labels of two"]["out"][1]
    check_same_result(tmp_path / "labels of two", tmp_path / "labels")


ALIKE = {"two": "one", "four": "one", "stopped": "long", "killed": "long"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ALIKE)
def test_many_devices_and_processes_give_the_result_of_one(launched, name):
    done, folder = launched
    last = done.get(f"{name}, resumed", done[name])
    assert set(last["status"]) == {0}, last["err"]
    check_same_result(folder / name, folder / ALIKE[name])


@pytest.mark.exhaustive
def test_only_process_0_prints(launched):
    done, folder = launched
    result = json.loads(done["two"]["out"][0])  # stdout holds nothing else
    assert result["samples"] == json.loads((folder / "one/result.json").read_text())["samples"]
    assert "perplexity" in done["four"]["out"][0] and not any(done["four"]["out"][1:])


@pytest.mark.exhaustive
def test_sigterm_to_one_process_stops_all(launched):
    done, _ = launched
    stopped = done["stopped"]
    assert stopped["ended"] and stopped["status"] == [143, 143]
    assert "jpeft: error: stopped, saved up to step" in stopped["err"][0] and "jpeft: error" not in stopped["err"][1]
    assert "continuing after step" in done["stopped, resumed"]["out"][0]


@pytest.mark.exhaustive
def test_a_killed_process_is_named_and_ends_all(launched):
    done, _ = launched
    killed = done["killed"]
    assert killed["ended"] and killed["status"] == [1, -9] and killed["seconds"] < 30
    assert "process 1 (host " in killed["err"][0] and "has stopped" in killed["err"][0]
    assert "resume from the last checkpoint (--resume)" in killed["err"][0]


@pytest.mark.exhaustive
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(launched):
    done, _ = launched
    output = done["killed, resumed"]["out"][0]
    assert re.search(r"the checkpoint of step \d+ cannot be read and is left out", output)
    assert "continuing after step" in output


MISTAKES = {
    "absent": "process 0 of 2 waited 4 s at 127.0.0.1",
    "other data": "processes differ in the data: process 1 has another one than process 0",
    "not shared": "process 1: {folder}/alike/apart: not seen here; --out must be on storage that all hosts share",
    "wrong file": "process 1: --eval test.jsonl: no such file",
    "other flags": "processes differ in --lr: process 1 has another one than process 0",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_once_and_ends_all(launched, name):
    done, folder = launched
    one = done[name]
    assert one["ended"] and all(one["status"]), one["err"]
    lines = [line for line in one["err"][0].splitlines() if line.startswith("jpeft: error: ")]
    assert len(lines) == 1 and MISTAKES[name].format(folder=folder) in lines[0], one["err"]
    assert not list(folder.glob("other*")) and not (folder / "here/other").exists()


MESHES = {
    "fsdp=3": "--mesh fsdp=3: a mesh of 3, but there are 8 devices",
    "data=2,fsdp=2": "2 × 2 is 4, but there are 8 devices",
    "rows=8": "--mesh rows=8: unknown axis 'rows'; expected data, fsdp, tensor, sequence",
    "data": "expected axes such as",
    "data=2,data=4": "each once",
    "data=0,fsdp=8": "expected axes",
    "data=8,fsdp=1": "",
    "tensor=8": "--mesh: llama: lm_head/kernel: an axis of 260 does not divide over 'tensor', which is 8 wide",
}


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if MESHES[mesh] else pytest.mark.exhaustive) for mesh in MESHES]
)
def test_meshes_that_do_not_fit(home, monkeypatch, tmp_path, capsys, mesh):
    link(home, tmp_path)
    monkeypatch.chdir(tmp_path)
    status = main(chat("run", f"--mesh {mesh} --steps 1 --eval-examples 8"))
    error = capsys.readouterr().err
    assert (status == 1 and MESHES[mesh] in error and error.count("\n") == 1) if MESHES[mesh] else status == 0
    assert (tmp_path / "run").exists() == (not MESHES[mesh])


INCOMPATIBLE = {
    "--batch-size 6 --mesh data=4,fsdp=2": "--batch-size 6 does not divide over the 8 parts that the mesh's data and",
    "--accumulate 2 --mesh fsdp=8": "in each of 2 micro-batches; a multiple of 16 does",
    "--max-length 60 --mesh sequence=8": "--max-length 60 does not divide over the 8 devices of the mesh's axis seq",
    "--processes 2": "--coordinator, --processes and --process belong together",
    "--coordinator a:1 --processes 2 --process 2": "--process 2 must be from 0 to 1",
    "--coordinator a:1 --processes 0 --process 0": "--processes must be at least 1, got 0",
    "--coordinator a --processes 2 --process 1": "--coordinator a: expected HOST:PORT",
    "--coordinator a:99999 --processes 2 --process 1": "--coordinator a:99999: expected HOST:PORT",
    "--coordinator a:1 --processes 2 --process 1 --join-within 0": "--join-within must be seconds, above 0, got 0",
}


@pytest.mark.parametrize("more", INCOMPATIBLE)
def test_incompatible_arguments(home, monkeypatch, tmp_path, capsys, more):
    link(home, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(chat("run", more)) == 1
    error = capsys.readouterr().err
    assert INCOMPATIBLE[more] in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_port_that_is_in_use(home, monkeypatch, tmp_path, capsys):
    link(home, tmp_path)
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(chat("run", f"--coordinator 127.0.0.1:{port} --processes 2 --process 0")) == 1
    assert f"--coordinator 127.0.0.1:{port}: Address already in use; choose another" in capsys.readouterr().err


def test_a_run_that_another_process_is_writing(home, monkeypatch, tmp_path, capsys):
    link(home, tmp_path)
    monkeypatch.chdir(tmp_path)
    run = [*LABELS.split(), "--out", "run"]
    assert main(run) == 0
    (tmp_path / "run/result.json").unlink()
    with filelock.FileLock("run/.lock"):
        assert main([*run, "--resume"]) == 1
    assert "run: another process is writing it" in capsys.readouterr().err
    assert main([*run, "--resume"]) == 0
