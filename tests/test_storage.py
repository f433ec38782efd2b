"""Paths on an object store: against a local server of Google Cloud Storage's protocol, and against local folders."""

import contextlib
import hashlib
import secrets
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import files, storage
from jpeft.errors import AdapterError
from jpeft.storage import StorageError, as_path
from jpeft.training import checkpoint
from tests import object_store


@pytest.fixture
def folder(store):
    return as_path(f"{object_store.BUCKET}/{secrets.token_hex(4)}")


def test_a_path_is_local_unless_it_has_a_scheme(store, monkeypatch):
    assert as_path("runs/a") == Path("runs/a") and as_path("~/a") == Path.home() / "a"
    for given in ("gs://bucket/a/b", Path("gs://bucket/a/b"), as_path("gs://bucket/a/b")):
        assert str(as_path(given)) == "gs://bucket/a/b" and storage.is_remote(as_path(given))
    assert not storage.is_remote(as_path("gs:")) and not storage.is_remote(Path("a/gs:/b"))
    with pytest.raises(StorageError, match=r"ftp://host/a: expected a local path, or one that starts with gs://"):
        as_path("ftp://host/a")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match=r'gs://a/b: gs:// needs gcsfs: pip install "jpeft\[gcs\]"'):
        as_path("gs://a/b")


@pytest.mark.parametrize("bucket, said", [("gs://none", "there is no bucket gs://none"),
                                          (object_store.READ_ONLY, "gs://read-only .*auth.*login")])  # fmt: skip
def test_a_bucket_that_cannot_be_written_is_refused(store, bucket, said, capfd):
    with pytest.raises(StorageError, match=said):
        storage.check_writable(as_path(f"{bucket}/run"))
    with pytest.raises(OSError, match=f"{bucket}/run/a.txt"):
        files.write_atomically(as_path(f"{bucket}/run/a.txt"), b"tea")
    assert capfd.readouterr().err == ""


def test_files_of_a_store_are_as_those_of_a_disk(folder, tmp_path):
    for place in (folder, tmp_path / "a"):
        with files.new_folder(place) as new:
            (new / "inner").mkdir()
            files.write_json(new / "config.json", {"é": 1})
            (new / "inner" / "tea.bin").write_bytes(bytes(range(256)) * 40)
        assert storage.file_sizes(place) == {"config.json": 14, "inner/tea.bin": 10240}
        assert files.read_json(place / "config.json", ValueError) == {"é": 1}
        assert files.file_sha256(place / "inner" / "tea.bin") == hashlib.sha256(bytes(range(256)) * 40).hexdigest()
        with storage.local_copy(place / "inner" / "tea.bin") as copy:
            assert copy.read_bytes() == bytes(range(256)) * 40
        with pytest.raises(FileExistsError), files.new_folder(place) as new:
            files.write_json(new / "config.json", {})
            if place == folder:  # another process was first, while this one uploaded
                files.write_json(place / "config.json", {"é": 2})
            else:
                raise FileExistsError
        with files.new_folder(place, replace=True) as new:
            files.write_json(new / "config.json", {})
        assert storage.file_sizes(place) == {"config.json": 3}
        storage.remove_folder(place)
        assert not place.exists() and storage.file_sizes(place) == {}


def test_of_two_that_create_an_object_one_fails(folder):
    storage.create_object(folder / "a", b"first")
    with pytest.raises(FileExistsError):
        storage.create_object(folder / "a", b"second")
    assert (folder / "a").read_bytes() == b"first"


def test_what_another_process_wrote_is_seen_at_once(folder, store):
    """gcsfs keeps the listings that it saw, which would hide what other hosts, or tensorstore, wrote since."""
    files.write_atomically(folder / "a", b"")
    assert [path.name for path in folder.iterdir()] == ["a"] and not (folder / "b").exists()
    bucket, _, name = str(folder / "b").removeprefix("gs://").partition("/")
    from gcp_storage_emulator.handlers.objects import _checksums, _make_object_resource

    store.held.create_file(bucket, name, b"x", _checksums(b"x", _make_object_resource("", bucket, name, "", "1")))
    assert (folder / "b").exists() and [path.name for path in folder.iterdir()] == ["a", "b"]


@pytest.fixture(scope="module")
def small():
    model, x = nn.Sequential([nn.Dense(4), nn.Dense(2)]), jnp.ones((1, 3))
    params = model.init(jax.random.key(0), x)["params"]
    peft = jpeft.LoRA(rank=2, targets=["layers_0"]).bind(model, params, x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.5, peft.init(jax.random.key(1), params))
    return model, params, x, peft, adapter


def test_an_adapter_is_saved_and_loaded(folder, small):
    model, params, x, peft, adapter = small
    for value in (adapter, jax.tree.map(lambda leaf: leaf * 2, adapter)):
        jpeft.save(str(folder), peft, value, params)
        _, found = jpeft.load(str(folder), model, params, x)
        jax.tree.map(np.testing.assert_array_equal, value, found)
    assert storage.file_sizes(folder).keys() == {"adapter.safetensors", "config.json"}
    with pytest.raises(AdapterError, match=r"gs://bucket/.*/none is not a folder"):
        jpeft.load(folder / "none", model, params, x)


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after(requests):
    """A context that ends when a process has made this many requests that write, and can make no more."""
    system, made = storage._file_system("gs"), []

    def limited(original):
        def call(*args, **kwargs):
            if len(made) >= requests:
                raise Killed
            made.append(args)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        for name in ("pipe_file", "put_file", "cp_file", "rm_file"):
            patch.setattr(system, name, limited(getattr(system, name)))
        yield


def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(folder, small):
    model, params, x, peft, old = small
    new, outcomes = jax.tree.map(lambda leaf: leaf * 2, old), []
    for requests in range(6):
        place = folder / str(requests)
        jpeft.save(place, peft, old, params)
        with killed_after(requests):
            jpeft.save(place, peft, new, params)
        _, found = jpeft.load(place, model, params, x)
        which = [all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(value))) for value in (old, new)]
        assert sum(which) == 1
        outcomes.append(which[1])
    assert outcomes == [False, False, True, True, True, True]


def test_a_folder_whose_upload_is_killed_is_not_taken_for_whole(folder):
    for requests in range(4):
        place = folder / str(requests)
        with killed_after(requests), files.new_folder(place) as new:
            for name in ("config.json", "a", "b"):
                files.write_json(new / name, {})
        assert (place / "config.json").exists() == (requests == 3)
        if requests < 3:  # the next try is not hindered by what was left
            with files.new_folder(place) as new:
                files.write_json(new / "config.json", {})
            assert storage.file_sizes(place).keys() == {"config.json"}


def test_checkpoints_are_saved_and_restored(folder):
    """As on a disk; and what a killed save, or a killed deletion, left is no checkpoint and goes."""
    state = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(12.0).reshape(3, 4) + 1, "step": jnp.int32(0)}
    with checkpoint.open_checkpoints(folder) as checkpoints:
        for step in range(1, 5):
            now = jax.tree.map(lambda leaf, step=step: leaf + step, state)
            checkpoint.save(checkpoints, step, now, {"position": step}, loss=abs(step - 2))
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 3, 4] and checkpoints.best_step() == 2
    assert checkpoint.saved_steps(folder) == [2, 3, 4]
    objects = storage.file_sizes(folder)
    for name in objects:
        if name.startswith("4/") and name != "4/commit_success.txt":
            files.write_atomically(folder / "7" / name.removeprefix("4/"), (folder / name).read_bytes())
    (folder / "2" / "manifest.json").unlink()
    assert checkpoint.saved_steps(folder) == [3, 4]
    with checkpoint.open_checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 4  # and leaves the save of another job that goes on
    assert (folder / "7").is_dir()
    with checkpoint.open_checkpoints(folder) as checkpoints:
        assert not (folder / "7").exists() and not (folder / "2").exists() and checkpoints.best_step() == 3
        file = max((name for name in objects if name.startswith("4/state")), key=objects.get)
        files.write_atomically(folder / file, bytes(objects[file]))
        restored, notes, damaged = checkpoint.restore_newest(checkpoints, state)
        assert damaged == [4] and notes == {"position": 3} and checkpoints.all_steps() == [3]
        jax.tree.map(np.testing.assert_array_equal, restored, jax.tree.map(lambda leaf: leaf + 3, state))
    assert checkpoint.saved_steps(folder) == [3]


def test_checkpoints_are_refused_where_orbax_cannot_commit_them(monkeypatch):
    monkeypatch.setattr(storage, "_file_system", lambda scheme: None)
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: True)
    with (
        pytest.raises(checkpoint.CheckpointError, match=r"s3://a/b: .* local folders and gs:// alone"),
        checkpoint.open_checkpoints("s3://a/b"),
    ):
        pass


@pytest.fixture(scope="module")
def llama():
    model, _ = jpeft.models.abstract({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2,
                                      "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 32})  # fmt: skip
    return model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]


def test_a_model_is_saved_and_loaded_one_tensor_at_a_time(folder, tmp_path, llama, monkeypatch):
    model, params = llama
    for place in (folder, tmp_path / "local"):
        jpeft.models.save(place, model, params, dtype="bfloat16", extra_files={"tokenizer.json": b"{}"})
    assert storage.file_sizes(folder) == storage.file_sizes(tmp_path / "local")
    fetched = []

    def read_range(path, start, stop):
        fetched.append(stop - start)
        return storage.read_range(path, start, stop)

    monkeypatch.setattr("jpeft.models.folder.read_range", read_range)
    _, there = jpeft.models.load(str(folder))
    _, here = jpeft.models.load(tmp_path / "local")
    jax.tree.map(np.testing.assert_array_equal, there, here)
    assert len(fetched) > 10 and max(fetched) < storage.file_size(folder / "model.safetensors") / 2
    jpeft.models.save(folder / "again", model, there, source=folder)  # with the files beside the weights
    assert (folder / "again" / "tokenizer.json").read_bytes() == b"{}"
    content = (folder / "model.safetensors").read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"\x80\x02" + content):
        files.write_atomically(folder / "model.safetensors", damaged)
        with pytest.raises(jpeft.errors.ModelError, match=r"model.safetensors: not a whole safetensors file"):
            jpeft.models.load(folder)


def test_an_adapter_of_peft_is_saved_and_loaded(folder, llama):
    model, params = llama
    ids = jnp.ones((1, 2), jnp.int32)
    peft = jpeft.LoRA(rank=2, targets=["q_proj"]).bind(model, params, ids)
    for scale in (1.0, 2.0):  # the second replaces the first
        adapter = jax.tree.map(lambda leaf, scale=scale: leaf + scale, peft.init(jax.random.key(1), params))
        jpeft.hf.save(folder, peft, adapter, params)
        _, found = jpeft.hf.load(str(folder), model, params, ids)
        jax.tree.map(np.testing.assert_array_equal, adapter, found)


def test_a_file_is_copied_to_the_cache_once_and_again_when_it_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path))
    files.write_atomically(folder / "a.gguf", b"one")
    first = storage.cached_copy(folder / "a.gguf")
    assert first.read_bytes() == b"one" and first.name == "a.gguf" and tmp_path in first.parents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "download", None)
        assert storage.cached_copy(folder / "a.gguf") == first
    files.write_atomically(folder / "a.gguf", b"three")
    assert storage.cached_copy(folder / "a.gguf").read_bytes() == b"three"
    monkeypatch.setenv("JPEFT_CACHE", "gs://bucket/cache")
    with pytest.raises(StorageError, match="JPEFT_CACHE=gs://bucket/cache: the cache must be a local folder"):
        storage.cache_folder()
