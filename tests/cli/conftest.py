"""The folder that the tests of the command line work in, and a run in it."""

import contextlib
import os
import shutil
from pathlib import Path

import jax
import pytest

from jpeft.cli import main
from tests.cli.runs import job, write_home
from tests.folders import link


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    """A folder with a model (`bert`) and data (`train.csv`, `test.jsonl`)."""
    folder = tmp_path_factory.mktemp("home")
    with jax.numpy_dtype_promotion("standard"):
        write_home(folder)
    return folder


@pytest.fixture(autouse=True)
def there(home, monkeypatch, tmp_path):
    """Every test has its own working folder, with links to the model and the data."""
    link(home, tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="package")
def finished(home, tmp_path_factory):
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.chdir(home), jax.numpy_dtype_promotion("standard"):
        assert main(job(out)) == 0
    return out


@pytest.fixture
def stopped(finished):
    """A run in the state of a kill after its 39th step."""
    shutil.copytree(finished, "stopped")
    for name in ("adapter", "checkpoints/40"):
        shutil.rmtree(Path("stopped") / name)
    os.unlink("stopped/result.json")
    return Path("stopped")
