"""Adapter folders: bit-exact round trips, atomic saves, and errors for everything that does not match."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.core.fingerprint import _on_host, checksum, difference, fingerprint
from jpeft.core.tree import flatten, join
from jpeft.errors import AdapterError
from jpeft.files import serialize
from jpeft.io import read_config


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="up")(x)))


MODEL, X = Model(), jnp.ones((2, 4))
METHOD = jpeft.Chain(jpeft.LoRA(rank=2, alpha=4, targets=["up"], overrides={"up": {"rank": 3}}), jpeft.Train("head"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    params = MODEL.init(jax.random.key(0), X)["params"]
    peft = METHOD.bind(MODEL, params, X)
    adapter = jax.tree.map(lambda x: x + 0.5, peft.init(jax.random.key(1), params))
    jpeft.save(folder, peft, adapter, params)
    return folder, params, peft, adapter


@pytest.fixture
def saved(trained, tmp_path):
    """`(folder, params, peft, adapter)`, in a folder of the test's own."""
    folder, *others = trained
    shutil.copytree(folder, tmp_path / "adapter")
    return tmp_path / "adapter", *others


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) and a[p].dtype == b[p].dtype for p in a)


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


def test_round_trip_is_bit_exact_and_saves_only_the_adapter(saved):
    path, params, peft, adapter = saved
    found, loaded = jpeft.load(path, MODEL, params, X)
    assert found == peft and found.method == METHOD and same(loaded, adapter)
    assert sorted(os.listdir(path)) == ["adapter.safetensors", "config.json"]
    assert set(load_file(path / "adapter.safetensors")) == {join(p) for p, _ in peft.structure}
    size = sum(x.nbytes for x in jax.tree.leaves(adapter))
    assert sum(f.stat().st_size for f in path.iterdir()) <= size + 64 * 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_leaves_round_trip(trained, tmp_path, dtype):
    params = trained[1]
    peft = jpeft.LoRA(rank=2, targets=["up"], dtype=dtype, init_weights="random").bind(MODEL, params, X)
    adapter = peft.init(jax.random.key(1), params)
    jpeft.save(tmp_path / "a", peft, adapter, params)
    assert same(jpeft.load(tmp_path / "a", MODEL, params, X)[1], adapter)


def test_targets_given_as_a_function_are_saved_as_site_names(trained, tmp_path):
    params = trained[1]
    method = jpeft.LoRA(rank=2, targets=lambda path, site: path == "up", init_weights="random")
    peft = method.bind(MODEL, params, X)
    jpeft.save(tmp_path / "a", peft, peft.init(jax.random.key(1), params), params)
    assert [s.name for s in jpeft.load(tmp_path / "a", MODEL, params, X)[0].sites] == ["up"]


def test_another_base_is_an_error_that_names_a_leaf(saved):
    path, params, _, _ = saved
    other = jpeft.combine(params, {"up": {"kernel": params["up"]["kernel"].at[1, 2].add(1e-3)}})
    with pytest.raises(AdapterError, match=r"another base: the values of 'up/kernel' differ"):
        jpeft.load(path, MODEL, other, X)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(AdapterError, match=r"'head/bias' is bfloat16\[3\], expected float32\[3\]"):
        jpeft.load(path, MODEL, low, X)
    with pytest.raises(AdapterError, match="lacks 'up/bias'"):
        jpeft.load(path, MODEL, {**params, "up": {"kernel": params["up"]["kernel"]}}, X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"base": ...}, "missing field 'base'"),
        ({"format": 99}, "format 99"),
        ({"format": ...}, "no 'format'"),
        ({"sites": "up"}, "'sites' must be a JSON list"),
        ({"sites": ["down"]}, "differs: "),
        ({"method": {"method": "Lora"}}, "unknown method 'Lora'"),
        ({"method": {"method": "LoRA", "targets": "up", "ranks": 3}}, "LoRA has no field 'ranks'"),
        ({"method": {"method": "LoRA", "targets": "up", "rank": -1}}, "LoRA.rank must be a positive integer"),
        ({"sha256": "0" * 64}, "SHA-256 differs"),
    ],
)
def test_an_invalid_configuration_is_an_error_that_names_the_field(saved, change, message):
    path, params, _, _ = saved
    edit(path, **change)
    with pytest.raises(AdapterError, match=message):
        jpeft.load(path, MODEL, params, X)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("up/lora_a"), "lacks 'up/lora_a'"),
        (lambda t: t.update({"up/lora_c": t["up/lora_a"]}), "has 'up/lora_c', unknown to"),
        (lambda t: t.update({"up/lora_a": t["up/lora_a"][:, :1]}), r"float32\[4, 1\], expected float32\[4, 3\]"),
        (lambda t: t.update({"up/lora_a": t["up/lora_a"].astype(np.float16)}), r"float16\[4, 3\], expected float32"),
        (lambda t: t.update({"up/lora_a": t["up/lora_a"] + 1}), "SHA-256 differs"),
    ],
)
def test_tensors_that_do_not_match_are_an_error_that_names_them(saved, damage, message):
    path, params, _, _ = saved
    tensors = load_file(path / "adapter.safetensors")
    damage(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=message):
        jpeft.load(path, MODEL, params, X)


FLOAT8 = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda b: b[: len(b) // 2], "truncated"),
        (lambda b: b"", "truncated"),
        (lambda b: b"\xff" * 8 + b, "truncated, or of another format"),
        (lambda b: len(FLOAT8).to_bytes(8, "little") + FLOAT8 + bytes(4), "a dtype that is not read"),
        (lambda b: b"\x80\x04\x95" + b, "is a pickle"),
        (lambda b: b"PK\x03\x04" + b, "is a pickle"),
    ],
)
def test_a_damaged_or_unsafe_file_is_an_error(saved, content, message):
    path, params, _, _ = saved
    file = path / "adapter.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(AdapterError, match=message):
        jpeft.load(path, MODEL, params, X)


@pytest.mark.parametrize("length", [384, 640, 896, 1152, 1408, 19280])
def test_a_header_whose_length_reads_like_a_pickle_is_no_pickle(saved, length):
    """The first two bytes of safetensors are those of its header's length: 80 02, 80 04, "PK"."""
    path, params, _, adapter = saved
    file = path / "adapter.safetensors"
    tensors = load_file(file)
    blobs = (serialize(tensors, {"note": "x" * padding}) for padding in range(length))
    blob = next(blob for blob in blobs if blob[:8] == length.to_bytes(8, "little"))
    file.write_bytes(blob)
    edit(path, sha256=hashlib.sha256(blob).hexdigest())
    assert same(jpeft.load(path, MODEL, params, X)[1], adapter)
    file.write_bytes(blob[:-1])
    with pytest.raises(AdapterError, match="truncated"):
        jpeft.load(path, MODEL, params, X)


def test_an_adapter_that_is_zero_or_not_finite_is_told(saved):
    path, params, peft, adapter = saved
    fresh = peft.init(jax.random.key(0), params)
    jpeft.save(path, peft, fresh, params)
    with pytest.warns(
        UserWarning, match=r"adapter\.safetensors: this Chain changes nothing: every update in it is zero"
    ):
        assert same(jpeft.load(path, MODEL, params, X)[1], fresh)
    broken = jpeft.combine(adapter, {"up": {"lora_b": adapter["up"]["lora_b"].at[0, 1].set(jnp.nan)}})
    jpeft.save(path, peft, broken, params)
    with pytest.raises(AdapterError, match=r"adapter\.safetensors: 'up/lora_b' holds NaN or infinity"):
        jpeft.load(path, MODEL, params, X)


# fmt: off
VALUES = [
    None, True, 0, -1, 3.5, float("nan"), 1e308, 10**30, 10**400, "", "up", "(", "a{9999999999}", "all-linear", "x",
    [], [1], ["up"], [["up"]], [{}], {}, {"up": 4}, {"up": {"rank": None}}, {"(": {}}, {"method": "LoRA"},
]
# fmt: on


def places(value, path=()):
    """The path of every value in a configuration, below its first level."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def load_mutated(path, params, place, value):
    """Loads a folder with one value of its config.json changed: that must work, or end in one line that names it."""
    text = (path / "config.json").read_text()
    inner = config = json.loads(text)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (path / "config.json").write_text(json.dumps(config))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a scale of 0 changes nothing
            peft, adapter = jpeft.load(path, MODEL, params, X)
        assert np.isfinite(np.asarray(peft.apply(params, adapter, X))).all(), (place, value)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, (place, value)
    (path / "config.json").write_text(text)


@pytest.mark.parametrize(
    "place", [("sites", 0), ("base", "up/bias"), ("method", "methods", 0, "overrides"), ("method",)]
)
def test_a_value_of_any_type_in_the_configuration_is_read_or_refused(saved, place):
    path, params, _, _ = saved
    for value in VALUES:
        load_mutated(path, params, place, value)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "method", [METHOD, jpeft.Bottleneck(targets="up", size=2), jpeft.IA3(targets="up"), jpeft.BitFit()]
)
def test_every_value_of_any_type_in_the_configuration_is_read_or_refused(trained, tmp_path, method):
    params = trained[1]
    peft = method.bind(MODEL, params, X)
    adapter = jax.tree.map(lambda x: x + 0.5, peft.init(jax.random.key(1), params))
    jpeft.save(tmp_path / "a", peft, adapter, params)
    for place in places(json.loads((tmp_path / "a" / "config.json").read_text())):
        for value in VALUES:
            load_mutated(tmp_path / "a", params, place, value)


def test_missing_files(saved, tmp_path):
    path, params, _, _ = saved
    with pytest.raises(AdapterError, match="is not a folder"):
        jpeft.load(tmp_path / "nowhere", MODEL, params, X)
    (path / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter\.safetensors does not exist"):
        jpeft.load(path, MODEL, params, X)
    (path / "config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"config\.json: not JSON"):
        read_config(path)
    (path / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no config\.json"):
        read_config(path)


# Repeatedly replaces an adapter of ones by an adapter of twos, each time in a process that is killed one file operation
# later than before, until one finishes.
_KILLED = """
    import json, os, signal, sys
    import jax, numpy as np, jpeft
    from tests.test_io import METHOD, MODEL, X
    path = sys.argv[1]
    params = MODEL.init(jax.random.key(0), X)["params"]
    peft = METHOD.bind(MODEL, params, X)
    fresh = peft.init(jax.random.key(1), params)
    of = lambda value: jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), fresh)
    numbers = jax.tree.map(np.asarray, params)  # a forked process must not need JAX's threads

    def killing(real, at, calls):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for at in range(1, 20):
        jpeft.save(path, peft, of(1), numbers)
        child = os.fork()
        if child == 0:
            calls = []
            os.replace, os.fsync = killing(os.replace, at, calls), killing(os.fsync, at, calls)
            jpeft.save(path, peft, of(2), numbers)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        leaves = jax.tree.leaves(jpeft.load(path, MODEL, params, X)[1])
        print(json.dumps([status, sorted({float(v) for x in leaves for v in np.unique(x)})]), flush=True)
        if status != signal.SIGKILL:
            break
"""


def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(saved):
    path, _, _, _ = saved
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_KILLED), str(path)],
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, _ in seen] == [signal.SIGKILL] * (len(seen) - 1) + [0] and len(seen) > 4
    values = [value for _, found in seen for value in found]
    assert len(values) == len(seen), "half old, half new"
    assert values == sorted(values) and (values[0], values[-1]) == (1, 2)
    assert sorted(os.listdir(path))[-2:] == ["adapter.safetensors", "config.json"]


def fails_on_a_full_disk_and_keeps(path, adapter, params, peft, monkeypatch):
    """Saving other numbers over an adapter fails and leaves only the old adapter."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jpeft.save(path, peft, jax.tree.map(lambda x: x * 2, adapter), params)
    monkeypatch.undo()
    assert same(jpeft.load(path, MODEL, params, X)[1], adapter)
    assert sorted(os.listdir(path)) == ["adapter.safetensors", "config.json"]


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    path, params, peft, adapter = saved
    fails_on_a_full_disk_and_keeps(path, adapter, params, peft, monkeypatch)


def test_a_failed_save_keeps_the_adapter_of_a_killed_one(saved, monkeypatch):
    path, params, peft, adapter = saved
    # Killed between the renames: config.json is new, and its tensors have their temporary name next to the old ones.
    os.replace(path / "adapter.safetensors", path / "adapter.safetensors.new")
    (path / "adapter.safetensors").write_bytes(b"the old tensors")
    fails_on_a_full_disk_and_keeps(path, adapter, params, peft, monkeypatch)


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', '{"format": 1, "config": {}}', "not JSON", "[]"])
def test_the_config_of_something_else_is_not_overwritten(saved, tmp_path, content):
    _, params, peft, adapter = saved
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"holds a config\.json that is not an adapter's; choose another folder"):
        jpeft.save(tmp_path / "model", peft, adapter, params)
    assert os.listdir(tmp_path / "model") == ["config.json"]
    assert (tmp_path / "model" / "config.json").read_text() == content


def test_saving_with_another_base_is_an_error(saved, tmp_path):
    _, params, peft, adapter = saved
    wide = {**params, "up": {**params["up"], "kernel": jnp.ones((5, 8))}}
    more = {**params, "other": {"kernel": jnp.ones(3)}}
    for base, message in [
        ({"head": params["head"]}, "'up/kernel' is missing, expected"),
        (wide, r"'up/kernel' has shape \(5, 8\), expected \(4, 8\)"),
        (more, "params have 70 numbers, expected 67 as in the model of this Peft"),
    ]:
        with pytest.raises(ValueError, match=message):
            jpeft.save(tmp_path / "a", peft, adapter, base)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool"])
def test_fingerprint_is_equal_on_host_and_device_and_depends_on_places(dtype):
    x = (8 * jax.random.normal(jax.random.key(0), (7, 5, 3))).astype("int8")
    x = x > 0 if dtype == "bool" else x.astype(dtype)
    host = np.asarray(x)
    assert np.array_equal(_on_host(host), checksum(x))
    assert not np.array_equal(_on_host(host), _on_host(np.roll(host, 1, 0)))
    assert not np.array_equal(_on_host(host), _on_host(np.swapaxes(host, 0, 2)))


def test_fingerprint_does_not_depend_on_container_box_or_sharding(trained):
    params = trained[1]
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), params)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    up = {"up": {"kernel": jax.device_put(params["up"]["kernel"].T, spec).T}}
    for other in (boxed, freeze(params), jax.tree.map(np.asarray, params), jpeft.combine(params, up)):
        assert fingerprint(other) == fingerprint(params) and difference(fingerprint(params), other) is None
    abstract = jax.eval_shape(lambda: params)
    assert difference(fingerprint(params), abstract) is None


class Pooled(nn.Module):
    """`Model` with a part that its output does, or does not, depend on."""

    used: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(8, name="up")(x))
        pooled = nn.Dense(8, name="pooler")(y)
        return nn.Dense(3, name="head")(pooled if self.used else y)


@pytest.mark.parametrize(
    ("targets", "exclude"), [(["up"], None), ("all-linear", None), (r"up|pooler", r"hea."), ("all-linear", ["head"])]
)
def test_an_adapter_of_a_base_without_a_part_loads_where_the_part_does_not_matter(tmp_path, targets, exclude):
    grown = Pooled().init(jax.random.key(0), X)["params"]
    params = {name: grown[name] for name in ("up", "head")}
    method = jpeft.Chain(jpeft.LoRA(rank=2, targets=targets, exclude=exclude), jpeft.BitFit(exclude=exclude))
    peft = method.bind(MODEL, params, X)
    adapter = jax.tree.map(lambda x: x + 0.5, peft.init(jax.random.key(1), params))
    jpeft.save(tmp_path / "old", peft, adapter, params)
    again, read = jpeft.load(tmp_path / "old", Pooled(), grown, X)
    assert same(read, adapter) and [s.name for s in again.sites] == [s.name for s in peft.sites]
    np.testing.assert_allclose(again.apply(grown, read, X), peft.apply(params, adapter, X), atol=1e-6)
    jpeft.save(tmp_path / "new", again, read, grown)
    assert jpeft.load(tmp_path / "new", Pooled(), grown, X)[0] == again
    with pytest.raises(AdapterError, match="trained on another base: it has 'pooler/bias', which the other lacks"):
        jpeft.load(tmp_path / "old", Pooled(used=True), grown, X)
    with pytest.raises(AdapterError, match="trained on another base"):
        jpeft.load(tmp_path / "old", Pooled(), jax.tree.map(lambda x: x + 1, grown), X)


@pytest.mark.parametrize("saved", [["up"], ["up", "head"], ["up", "head", "BitFit"]], ids="-".join)
def test_an_adapter_of_other_linear_weights_than_this_version_takes_loads_with_its_own(tmp_path, saved):
    """What "all-linear" takes differs between versions: raw weights that reach a product, outputs that are heads."""

    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="up")(x) @ self.param("raw", nn.initializers.normal(), (8, 8))
            return nn.Dense(3, name="head")(x).astype(jnp.float16)

    params = Raw().init(jax.random.key(0), X)["params"]
    method = jpeft.LoRA(rank=2, targets=saved[:2], init_weights="random")
    method = jpeft.Chain(method, jpeft.BitFit()) if "BitFit" in saved else method
    peft = method.bind(Raw(), params, X)
    adapter = peft.init(jax.random.key(1), params)
    jpeft.save(tmp_path / "old", peft, adapter, params)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    members = config["method"].get("methods", [config["method"]])
    members[0]["targets"] = None
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert {s.name for s in jpeft.LoRA().bind(Raw(), params, X).sites} == {"up", "raw"}
    again, read = jpeft.load(tmp_path / "old", Raw(), params, X)
    assert same(read, adapter) and again.sites == peft.sites
