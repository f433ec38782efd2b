"""What is written down as an example runs: in docstrings, in the README, and in quick pages of the book.

The other pages run when the book is built.
"""

import doctest
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import jax
import pytest

import jpeft
from jpeft import _moved

MODULES = [m.name for m in pkgutil.walk_packages(jpeft.__path__, "jpeft.") if not m.name.endswith("__main__")]
# Their examples compile whole models.
SLOW = {
    "jpeft.core.quantized", "jpeft.core.stacking", "jpeft.models.bert", "jpeft.models.decoder", "jpeft.models.loading",
    "jpeft.models.saving", "jpeft.serving.engine", "jpeft.serving.generation",
}  # fmt: skip
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BOOK = ROOT / "notebooks"
QUICK_PAGES = ("extending/method.md", "extending/geometry.md", "extending/attention.md")


def blocks(text, kind):
    """The code of the fenced blocks of a kind in a Markdown page, as one program."""
    code = re.findall(rf"^```{re.escape(kind)}\n(.*?)^```", text, re.S | re.M)
    assert code
    return "\n".join(re.sub(r"^(:\w+:.*\n)+", "", block) for block in code)


@pytest.fixture(autouse=True)
def _as_users_do():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in SLOW else name for name in MODULES
])  # fmt: skip
def test_docstrings(name, registries):
    assert not doctest.testmod(importlib.import_module(name)).failed


def test_slow_examples_are_of_modules_that_exist():
    assert set(MODULES) >= SLOW


@pytest.mark.parametrize(("old", "new"), _moved.MOVED.items())
def test_old_submodule_names_give_the_module_that_has_their_content(old, new):
    assert getattr(jpeft, old) is importlib.import_module(new)


@pytest.mark.parametrize("old", _moved.SPLIT)
def test_old_names_of_modules_that_were_split_are_refused_with_the_new_ones(old):
    with pytest.raises(ImportError, match=f"jpeft.{old} has moved: see jpeft"):
        getattr(jpeft, old)
    for name in re.findall(r"jpeft[a-z._]+[a-z]", _moved.SPLIT[old]):
        importlib.import_module(name)


def test_an_import_that_a_notebook_showed_keeps_working():
    from jpeft.conversations import Batch

    assert Batch is importlib.import_module("jpeft.text.conversations").Batch


@pytest.mark.parametrize("name", [name for name in jpeft.__all__ if callable(getattr(jpeft, name))])
def test_every_name_of_the_surface_says_what_it_does(name):
    assert getattr(jpeft, name).__doc__


def test_the_quickstart_of_the_readme_ends_with_merged_equal_to_unmerged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, scope = blocks(README, "python"), {}
    assert "assert_allclose(merged, peft.apply(" in code.strip().splitlines()[-1]
    exec(code, scope)
    assert int(scope["state"].step) == 100 and float(scope["metrics"]["loss"]) < 0.1
    assert isinstance(scope["peft"], jpeft.nnx.NnxPeft)  # the half for NNX, which takes one step
    assert abs(scope["merged"] - scope["net"](scope["x"])).max() > 1e-3
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("page", QUICK_PAGES)
def test_pages_that_add_to_jpeft_run(page, registries):
    exec(blocks((BOOK / page).read_text(), "{code-cell} python"), {"__name__": "page"})


def test_links_of_the_readme_lead_to_files():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^):]+)\)", README)}
    assert len(links) > 10 and [link for link in links if not (ROOT / link).is_file()] == []


def test_every_extra_is_listed_where_installing_is_explained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = (BOOK / "get_started.md").read_text().partition("| extra | for |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row))) == set(extras)
