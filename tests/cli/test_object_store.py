"""The command line with everything on an object store: a local server of Google Cloud Storage's protocol."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jpeft import files, storage
from jpeft.cli import main
from jpeft.errors import UserError
from jpeft.recipes import run_lock
from jpeft.storage import as_path
from tests import object_store
from tests.cli.runs import failure, job, trained

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")


@pytest.fixture
def bucket(store, home):
    """A folder of the bucket with the model and the data."""
    folder = as_path(f"{object_store.BUCKET}/{secrets.token_hex(4)}")
    for name in storage.file_sizes(home):
        if name.startswith(("bert/", "train.csv", "test.jsonl")):
            storage.upload(home / name, folder / name)
    return folder


def there(bucket, out, *more):
    """As `job`, with model, data and run in the bucket."""
    names = {"bert", "train.csv", "test.jsonl"}
    return [f"{bucket}/{word}" if word in names else word for word in job(f"{bucket}/{out}", *more)]


def trained_there(run):
    """As `trained`, of a run in the bucket."""
    local = Path(f"copy-{secrets.token_hex(4)}")
    for name in ("adapter/adapter.safetensors", "metrics.jsonl"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(run / name, local / name)
    return trained(local)


def test_a_run_on_a_store_is_that_on_a_disk(bucket, finished, capsys):
    run = bucket / "run"
    seldom = there(bucket, "run")
    seldom[seldom.index("--checkpoint-every") + 1] = "20"  # each checkpoint is some fifty requests
    assert main(seldom) == 0
    assert trained_there(run) == trained(finished)
    held = storage.file_sizes(run)
    assert held.keys() > {"config.json", "result.json", "loss.png", "metrics.jsonl"} and ".lock" not in held
    assert "exists" in failure(capsys, *there(bucket, "run"))
    assert main(["inspect", str(run)]) == 0 and str(run) in capsys.readouterr().out


@pytest.mark.exhaustive
def test_the_commands_that_read_a_run_give_on_a_store_what_they_give_on_a_disk(bucket, finished, capsys):
    run = bucket / "run"
    for name in storage.file_sizes(finished):
        storage.upload(finished / name, run / name)
    for command in (["predict", run, "--text-arg", "good tea"], ["predict", finished, "--text-arg", "good tea"]):
        assert main([str(word) for word in command]) == 0
    there_and_here = capsys.readouterr().out.splitlines()
    assert there_and_here[: len(there_and_here) // 2] == there_and_here[len(there_and_here) // 2 :]
    for place, source in ((bucket / "merged", run), (Path("merged"), finished)):
        assert main(["merge", str(source), str(place)]) == 0
    assert (bucket / "merged" / "model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    assert main(["export", str(run), f"{bucket}/adapter", "--format", "jpeft"]) == 0
    assert (bucket / "adapter/adapter.safetensors").read_bytes() == (run / "adapter/adapter.safetensors").read_bytes()


@pytest.mark.parametrize("out, said", [("gs://none/run", "there is no bucket gs://none"),
                                       ("gs://read-only/run", "cannot be written.*gcloud auth")])  # fmt: skip
def test_a_bucket_that_cannot_be_written_is_refused_before_the_model_is_loaded(bucket, out, said, capsys, monkeypatch):
    monkeypatch.setattr("jpeft.recipes.finetune.prepare", None)  # which loads the model
    line = failure(capsys, *job(out))
    assert re.search(said, line), line


def test_a_run_of_a_newer_format_is_refused(bucket, capsys):
    files.write_json(bucket / "new" / "config.json", {"format": 2, "config": {}})
    line = failure(capsys, "inspect", f"{bucket}/new")
    assert "format 2 by a newer jpeft; this version reads format 1: pip install --upgrade jpeft" in line


@pytest.mark.exhaustive
def test_a_run_that_is_killed_at_any_moment_is_resumed_to_the_same_adapter(bucket, finished):
    """Killed by SIGKILL again and again, later in each life; the last one ends as the run that was not killed."""
    command, run = [sys.executable, "-m", "jpeft.cli", *there(bucket, "killed", "--resume")], bucket / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills = 0
    for seconds in (0.1, 0.7, 1.3, 1.9, 2.5):
        before = len(storage.file_sizes(run))
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ends = time.monotonic() + 120
        while len(storage.file_sizes(run)) <= before and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        time.sleep(seconds)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 3
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert trained_there(run) == trained(finished)
    assert ".lock" not in storage.file_sizes(run)


# ------------------------------------------------------------------------------------------------------------ the lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW", 0.05)
    monkeypatch.setattr(run_lock, "DEAD", 0.6)
    monkeypatch.setattr(run_lock, "_SETTLE", 0.01)


def write_lock(run, **about):
    own = {"host": socket.gethostname(), "processes": run_lock._namespace(), "pid": os.getpid(), "token": "theirs"}
    files.write_json(run / ".lock", own | about)


def test_a_run_is_written_by_one_process_at_a_time(bucket, quick):
    with run_lock.locked(bucket) as check:
        with pytest.raises(UserError, match="another process is writing it"), run_lock.locked(bucket):
            pass  # it is renewed meanwhile
        check()
    with run_lock.locked(bucket):
        pass
    assert ".lock" not in storage.file_sizes(bucket)


def test_the_lock_of_a_killed_process_is_taken_over(bucket, quick):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_lock(bucket, pid=ended.pid)
    said = []
    with run_lock.locked(bucket, said.append):
        assert not said  # at once: it was of this machine
    write_lock(bucket, host="another")
    with run_lock.locked(bucket, said.append):
        assert len(said) == 1 and "on another still writes" in said[0]
    write_lock(bucket, pid=os.getppid())
    with pytest.raises(UserError, match=rf"writing it \(process {os.getppid()} on"), run_lock.locked(bucket):
        pass


def test_a_process_whose_lock_was_taken_over_stops(bucket, quick):
    with run_lock.locked(bucket) as check:
        write_lock(bucket, host="another")
        time.sleep(0.4)
        with pytest.raises(UserError, match="on another has taken over this run"):
            check()
    assert json.loads((bucket / ".lock").read_bytes())["host"] == "another"
