"""Folders that an earlier version wrote (commit e16389d, Python 3.11, jax 0.10.2) still load.

``tests/data/old/adapter`` is of `jpeft.save`, with the numbers that the old version computed in ``expected.npz``.
``interrupted_run`` is a run of `jpeft finetune` that was stopped after step 7 of 20, ``finished_adapter`` the adapter
that it ends with.
"""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft.cli import main
from jpeft.core.tree import flatten, unflatten
from jpeft.methods import from_dict

OLD = Path(__file__).parent / "data" / "old"


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.tanh(nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(8, name="down")(y), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")
        x, _ = layers(x, None)
        return nn.Dense(3, name="head")(x)


METHOD = jpeft.Chain(
    jpeft.LoRA(rank=2, alpha=4, targets=["up", "down"], overrides={"layers/down": {"rank": 3, "rslora": True}}),
    jpeft.IA3(targets=["up", "down"], feedforward=["down"]),
    jpeft.BitFit(targets=r"layers/.*/bias"),
    jpeft.Train("head"),
)


def expected():
    """Trees by name (params, init, adapter, merged, gradient), and the output for the input ``inputs/0``."""
    with np.load(OLD / "adapter" / "expected.npz") as file:
        return unflatten({tuple(name.split("/")): file[name] for name in file.files})


def close(got, want, tolerance=1e-5):
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path in got:
        np.testing.assert_allclose(got[path], want[path], rtol=0, atol=tolerance, err_msg="/".join(path))


def test_an_adapter_loads_and_computes_what_it_did(tmp_path):
    old = expected()
    params, x = old["params"], old["inputs"]["0"]
    peft, adapter = jpeft.load(OLD / "adapter", Scanned(), params, x)
    assert peft.method == METHOD and peft == METHOD.bind(Scanned(), params, x)
    for path, leaf in flatten(adapter).items():
        np.testing.assert_array_equal(leaf, flatten(old["adapter"])[path])
    close(peft.init(jax.random.key(1), params), old["init"])

    @jax.jit
    def run(adapter):
        loss = lambda a: (peft.apply(params, a, x) ** 2).mean()  # noqa: E731
        return peft.apply(params, adapter, x), peft.merge(params, adapter), jax.grad(loss)(adapter)

    output, merged, gradient = run(adapter)
    np.testing.assert_allclose(output, old["output"], rtol=0, atol=1e-5)
    close(merged, old["merged"])
    close(gradient, old["gradient"])

    jpeft.save(tmp_path / "again", peft, adapter, params)
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (
        OLD / "adapter/adapter.safetensors"
    ).read_bytes()
    again, before = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", OLD / "adapter")
    )
    # A later version may have more fields, with defaults that compute the same.
    assert from_dict(again.pop("method")) == from_dict(before.pop("method"))
    assert again == before


def test_an_interrupted_run_resumes_from_its_checkpoint(tmp_path, monkeypatch, standard_promotion, capsys):
    for name in ("model_bert", "train.csv", "test.jsonl", "interrupted_run"):
        (shutil.copytree if (OLD / name).is_dir() else shutil.copy)(OLD / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "interrupted_run" / "config.json"
    record = json.loads(file.read_text())
    for field in ("model", "data", "eval"):  # which are absolute, where the old version ran
        record["config"][field] = str(tmp_path / Path(record["config"][field]).name)
    file.write_text(json.dumps(record))
    assert main(["finetune", "--resume", "interrupted_run"]) == 0
    assert "continuing after step 7 of 20" in capsys.readouterr().out
    found = load_file("interrupted_run/adapter/adapter.safetensors")
    wanted = load_file(OLD / "finished_adapter" / "adapter.safetensors")
    assert found.keys() == wanted.keys()
    for name in found:  # to the bit only under the flags, jax and CPU that it began with
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["adapter", "finished_adapter"])
def test_inspect_reads_it(name, capsys):
    assert main(["inspect", "--json", str(OLD / name)]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "adapter" and about["leaves"].keys() == load_file(OLD / name / "adapter.safetensors").keys()
