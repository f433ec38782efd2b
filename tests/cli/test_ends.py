"""The ends of a run: merging it, and using one that is not finished."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jpeft import models
from jpeft.cli import main
from jpeft.core.tree import flatten
from jpeft.models.dtypes import stored_dtypes
from jpeft.recipes.tasks import classification
from tests.cli.runs import failure

pytestmark = pytest.mark.usefixtures("keep_compiled", "standard_promotion")
TEXT = ["--text-arg", "good tea", "--text-arg", "stale cup of tea"]


# ------------------------------------------------------------------------------------------------------------ unfinished


@pytest.fixture
def killed(finished):
    """A run that was killed after its last checkpoint, before it wrote a result."""
    run = Path(shutil.copytree(finished, "killed"))
    shutil.rmtree(run / "adapter")
    os.unlink(run / "result.json")
    return run


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_killed_run_is_used_as_its_newest_checkpoint(killed, finished, capsys):
    (killed / "checkpoints" / "41.orbax-checkpoint-tmp").mkdir()  # of a run that is just saving
    before = content(killed)
    assert main(["predict", str(killed), *TEXT]) == 0
    out, err = capsys.readouterr()
    assert err == "killed is not finished: using its newest checkpoint, of step 40 of 40\n"
    assert main(["merge", str(killed), "merged"]) == 0
    assert "newest checkpoint, of step 40" in capsys.readouterr().err
    assert content(killed) == before
    assert main(["predict", str(finished), *TEXT]) == 0
    assert capsys.readouterr() == (out, "")  # the last checkpoint holds the adapter of the result
    assert main(["merge", str(finished), "expected"]) == 0
    for name in ("model", "classifier"):
        assert (Path("merged") / f"{name}.safetensors").read_bytes() == Path(f"expected/{name}.safetensors").read_bytes()


def test_the_best_checkpoint_of_a_run_that_keeps_the_best(killed, capsys):
    record = json.loads((killed / "config.json").read_text())
    (killed / "config.json").write_text(json.dumps({**record, "config": {**record["config"], "keep": "best"}}))
    # step 40 alone was evaluated; 41 is newer and was not
    shutil.copytree(killed / "checkpoints" / "39", killed / "checkpoints" / "41")
    assert main(["predict", str(killed), *TEXT]) == 0
    assert "using its best checkpoint, of step 40 of 40" in capsys.readouterr().err


def damage(checkpoint):
    for file in checkpoint.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def test_damaged_and_missing_checkpoints(killed, capsys):
    damage(killed / "checkpoints" / "40")
    assert main(["predict", str(killed), *TEXT]) == 0
    err = capsys.readouterr().err
    assert "the checkpoint of step 40 is damaged and left out" in err and "newest checkpoint, of step 39 of 40" in err
    damage(killed / "checkpoints" / "39")
    for command in (["predict", killed, "--text-arg", "tea"], ["merge", killed, "out"]):
        capsys.readouterr()
        assert main([str(word) for word in command]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "killed: not finished, and its checkpoints are damaged (" in line and "finetune --out killed" in line
    shutil.rmtree(killed / "checkpoints")
    said = failure(capsys, "predict", killed, *TEXT)
    assert "the run is not finished, and has no checkpoint yet; resume it with: jpeft finetune --out killed" in said
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------------- merge


@pytest.fixture(scope="module")
def mixed(home, tmp_path_factory):
    """The model in bfloat16, but for a float32 norm, and a short run over it."""
    folder = tmp_path_factory.mktemp("mixed")
    model, params = models.load(home / "bert")
    params = {"embeddings": params["embeddings"], "encoder": jax_cast(params["encoder"], jnp.bfloat16)}
    models.save(folder / "bert", model, params, source=home / "bert")
    return folder


def jax_cast(tree, dtype):
    import jax

    return jax.tree.map(lambda x: x.astype(dtype), tree)
