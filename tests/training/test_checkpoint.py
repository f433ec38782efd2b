"""Training checkpoints: states are restored bit for bit, and a killed save leaves no trace."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.training import checkpoint
from jpeft.training.checkpoint import CheckpointError, open_checkpoints, restore, restore_newest, save


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Objects of earlier test files are left out of the collections below, which they would make slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _collected(_frozen):
    """A read that fails half-way leaves coroutines behind. Collected here, they are errors of the test at fault."""
    yield
    gc.collect()


@struct.dataclass
class State:
    step: jax.Array
    adapter: dict
    opt_state: object
    rng: jax.Array


def state(seed, rng=None):
    """Like `TrainState`: named tuples, empty states, holes, a bfloat16 leaf and a typed key."""
    keys = jax.random.split(jax.random.key(seed), 3)
    adapter = {
        "query": {"lora_a": jax.random.normal(keys[0], (5, 2)), "lora_b": jnp.full((2, 3), jnp.nan)},
        "bias": jax.random.normal(keys[1], (3,), jnp.bfloat16),
    }
    trained = {"query": {"lora_a": False, "lora_b": True}, "bias": True}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trained))
    return State(jnp.int32(seed), adapter, tx.init(adapter), keys[2] if rng is None else rng)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def bits(tree):
    leaves, structure = jax.tree.flatten(tree)
    plain = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    return structure, [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in plain], [x.dtype for x in leaves]


KEYS = {
    "threefry": jax.random.key,
    "rbg": lambda seed: jax.random.key(seed, impl="rbg"),
    "legacy": jax.random.PRNGKey,
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_state_is_restored_bit_for_bit(tmp_path, kind):
    wanted = state(4, KEYS[kind](7))
    with open_checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 4, wanted, {"position": 4})
    with open_checkpoints(tmp_path / "c") as checkpoints:
        found, notes = restore(checkpoints, like=state(0, KEYS[kind](0)))
    assert bits(found) == bits(wanted) and notes == {"position": 4}
    assert isinstance(found, State)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_state_is_restored_on_another_mesh(tmp_path, kind):
    """Leaves of one shape with several shardings: the stacks that were saved are not those of the new mesh."""
    devices = np.array(jax.devices())

    def placed(seed, rows, specs):
        mesh = Mesh(devices.reshape(rows, -1), ("data", "fsdp"), axis_types=(kind,) * 2)
        keys = jax.random.split(jax.random.key(seed), len(specs))
        leaves = {name: jax.random.normal(key, (8, 8)) for name, key in zip(specs, keys, strict=True)}
        return {
            "rng": jax.random.key(seed),
            "step": jnp.int32(seed),
            **{name: jax.device_put(leaf, NamedSharding(mesh, P(*specs[name]))) for name, leaf in leaves.items()},
        }

    saved = placed(1, 1, {"a": ("fsdp",), "b": (None, "fsdp"), "c": ("fsdp",), "d": ()})
    like = placed(0, 2, {"a": (None, "data"), "b": (None, "fsdp"), "c": (("data", "fsdp"),), "d": ("data",)})
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, saved, {})
        found, _ = restore(checkpoints, like)
    assert bits(found) == bits(saved)
    assert {name: leaf.sharding for name, leaf in found.items()} == {name: leaf.sharding for name, leaf in like.items()}


def test_many_leaves_add_little_to_the_size_of_a_checkpoint(tmp_path):
    layers = {
        f"layer_{i}": {name: {"lora_a": jnp.ones((16, 4)), "lora_b": jnp.ones((4, 8))} for name in ("query", "value")}
        for i in range(200)
    }
    states = [jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), layers) for _ in range(2)]
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, states, {}, wait=True)
    disk = sum(path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert disk <= sum(leaf.nbytes for leaf in jax.tree.leaves(states)) + 256 * 2**10


def test_the_latest_two_are_kept_and_the_latest_is_restored(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 10):
            save(checkpoints, step, state(step), {})
        assert sorted(checkpoints.all_steps()) == [2, 10]
        assert int(restore(checkpoints, state(0))[0].step) == 10
        assert int(restore(checkpoints, state(0), step=2)[0].step) == 2


def test_the_best_is_kept_beside_the_latest(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5, None], start=1):
            save(checkpoints, step, state(step), {}, loss=loss)
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 5, 6] and checkpoints.best_step() == 2
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 2
        assert int(restore(checkpoints, state(0), checkpoints.best_step())[0].step) == 2


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x if is_key(x) else x + 1, s), donate_argnums=0)
    with open_checkpoints(tmp_path) as checkpoints:
        now = jax.tree.map(jnp.copy, state(1))
        save(checkpoints, 1, now, {})
        for _ in range(20):
            now = change(now)
        assert bits(restore(checkpoints, state(0))[0]) == bits(state(1))


def test_a_checkpoint_never_exists_without_its_manifest(tmp_path, monkeypatch):
    had_manifest = []
    rename = os.rename

    def watch(source, target, **options):
        if os.path.basename(target) == "1":
            had_manifest.append(os.path.exists(os.path.join(source, "manifest.json")))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", watch)
    with open_checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1, state(1), {}, wait=True)
        assert had_manifest == [True]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint to resume from"),
    ):
        restore(checkpoints, state(0))


@pytest.mark.parametrize("change", ["structure", "shape", "dtype"])
def test_another_state_than_expected_raises(tmp_path, change):
    like = state(0)
    if change == "structure":
        like.adapter["new"] = jnp.ones(2)
    elif change == "shape":
        like.adapter["bias"] = jnp.ones((4,), jnp.bfloat16)
    else:
        like.adapter["bias"] = jnp.ones((3,))
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {})
        with pytest.raises(
            CheckpointError,
            match=r"1: does not hold the expected state: .* at \.adapter\['(new|bias)'\], expected \w+\[",
        ):
            restore(checkpoints, like)


def test_nothing_is_printed(tmp_path, capfd):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {})
        restore(checkpoints, state(0))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_raises_its_error_and_leaves_no_partial_checkpoint(tmp_path, monkeypatch, number):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {})

        def full(step, args, **options):
            (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
            raise ValueError(f"OUT_OF_RANGE: Failed writing: {os.strerror(number)} [os_error_code='{number}']")

        monkeypatch.setattr(checkpoints.manager, "save", full)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            save(checkpoints, 2, state(2), {})
        assert caught.value.errno == number
        assert not list(tmp_path.glob("*tmp*"))
        assert int(restore(checkpoints, state(0))[0].step) == 1


def damage(folder):
    """Cuts every array file of a checkpoint short."""
    for file in (folder / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def test_a_damaged_checkpoint_is_deleted_and_the_one_before_is_restored(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, state(step), {"position": step}, wait=True)
        damage(tmp_path / "2")
        found, notes, damaged = restore_newest(checkpoints, state(0))
        assert bits(found) == bits(state(1)) and notes == {"position": 1} and damaged == [2]
        save(checkpoints, 2, state(2), {"position": 2}, wait=True)
        assert bits(restore_newest(checkpoints, state(0))[0]) == bits(state(2))


def test_a_newer_checkpoint_of_another_state_raises_and_is_kept(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {})
        save(checkpoints, 2, {"other": jnp.ones(3)}, {}, wait=True)
        with pytest.raises(CheckpointError, match="2: does not hold the expected state"):
            restore_newest(checkpoints, state(0))
        assert checkpoints.all_steps() == [1, 2]


REFUSED = {
    "a number": (1, {"w": 1.5}, {}, {}, TypeError, r"\['w'\] is a float, expected an array"),
    "an empty array": (1, {"w": jnp.ones((0, 3))}, {}, {}, TypeError, r"\['w'\] has shape \(0, 3\)"),
    "int64": (1, {"w": np.arange(3)}, {}, {}, TypeError, r"\['w'\] is int64, which JAX narrows"),
    "notes that are not JSON": (
        1,
        {"w": jnp.ones(3)},
        {"loss": np.float32(1)},
        {},
        TypeError,
        "float32 is not JSON serializable",
    ),
    "a loss that is not a number": (1, {"w": jnp.ones(3)}, {}, {"loss": "low"}, ValueError, "low"),
    "a step below 0": (-1, {"w": jnp.ones(3)}, {}, {}, CheckpointError, "step -1 is below 0"),
    "a step that was saved": (5, {"w": jnp.ones(3)}, {}, {}, CheckpointError, "step 5 was saved already"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_saved_raises_before_anything_is_written(tmp_path, what):
    step, refused, notes, options, kind, message = REFUSED[what]
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5, {"w": jnp.ones(3)}, {})
        with pytest.raises(kind, match=message):
            save(checkpoints, step, refused, notes, **options)
        save(checkpoints, 6, {"w": jnp.zeros(3)}, {}, loss=jnp.float32(0.5))
        checkpoints.wait()
        assert checkpoints.all_steps() == [5, 6] and checkpoints.best_step() == 6
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; the saved steps are \[5, 6\]"):
            restore(checkpoints, {"w": jnp.ones(3)}, step=7)
    with pytest.raises(CheckpointError, match="was closed"):
        save(checkpoints, 7, {"w": jnp.ones(3)}, {})


def test_folders_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), open_checkpoints(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="keep=0"), open_checkpoints(tmp_path, keep=0):
        pass


def test_if_all_are_damaged_none_is_deleted(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, state(step), {}, wait=True)
            damage(tmp_path / str(step))
        with pytest.raises(CheckpointError, match=r"2: damaged: state/.* was changed since it was written"):
            restore_newest(checkpoints, state(0))
        assert checkpoints.all_steps() == [1, 2]
    with open_checkpoints(tmp_path / "none") as checkpoints, pytest.raises(CheckpointError, match="no checkpoint"):
        restore_newest(checkpoints, state(0))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit": (flip, "was changed"),
    "a missing file": (lambda file: file.unlink(), "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_anything_is_read(tmp_path, kind):
    harm, message = DAMAGE[kind]
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {}, wait=True)
        harm(next(path for path in (tmp_path / "1" / "state").rglob("d/*") if path.stat().st_size))
        with pytest.raises(CheckpointError, match=f"1: damaged: state/.* {message}"):
            restore(checkpoints, state(0))


@pytest.mark.parametrize("content", ["", "[1]", "null", "{"])
def test_a_damaged_manifest_raises(tmp_path, content):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {}, wait=True)
        (tmp_path / "1" / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"1: damaged: manifest\.json cannot be read"):
            restore(checkpoints, state(0))


def test_a_missing_manifest_raises(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state(1), {}, wait=True)
        (tmp_path / "1" / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=r"1: damaged: manifest.json is missing"):
            restore(checkpoints, state(0))


class Usage(NamedTuple):
    free: int


def test_no_save_starts_on_a_full_disk(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: Usage(2**20))
        with pytest.raises(OSError, match="No space left on device"):
            save(checkpoints, 1, state(1), {}, wait=True)
        assert checkpoints.all_steps() == [] and not list(tmp_path.glob("*tmp*"))


SAVING = """
from tests.training.test_checkpoint import open_checkpoints, save, state
with open_checkpoints({folder!r}) as checkpoints:
    step = (checkpoints.latest_step() or 0) + 1
    while True:
        save(checkpoints, step, state(step), {{"position": step}}, wait=True)
        print(step, flush=True)
        step += 1
"""


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SAVING.format(folder=str(tmp_path / "c"))]
    wait, reached = random.Random(0), 0
    for _ in range(2):
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            saved = int(process.stdout.readline())
            time.sleep(wait.uniform(0.05, 0.6))  # somewhere inside a save
            process.send_signal(signal.SIGKILL)
        with open_checkpoints(tmp_path / "c") as checkpoints:
            found, notes = restore(checkpoints, state(0))
            assert notes["position"] == int(found.step) >= saved > reached
            assert bits(found) == bits(state(int(found.step)))
            assert not list((tmp_path / "c").glob("*tmp*"))
        reached = int(found.step)


def test_orbax_is_only_imported_when_it_is_used():
    code = "import sys, jpeft, jpeft.training.checkpoint; print('orbax.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and checkpoint.__doc__
