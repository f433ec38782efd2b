"""What `import jpeft` gives: the same names at run time and to editors, and nothing heavy."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jpeft

SOURCE = Path(jpeft.__file__)


def test_editors_see_what_there_is_at_run_time():
    """The stub that type checkers read is where the names come from."""
    for node in ast.parse(SOURCE.with_suffix(".pyi").read_text()).body[1:]:
        for alias in node.names:
            where = f"jpeft.{node.module}" if node.module else f"jpeft.{alias.name}"
            found = importlib.import_module(where)
            assert getattr(jpeft, alias.name) is (getattr(found, alias.name) if node.module else found)
            assert alias.name in dir(jpeft) and inspect.getdoc(getattr(jpeft, alias.name)), alias.name


def test_nothing_is_imported_before_it_is_used():
    code = "import jpeft, sys; assert 'jax' not in sys.modules and 'LoRA' in dir(jpeft); jpeft.LoRA(rank=2)\n"
    code += "heavy = {'orbax', 'matplotlib', 'tokenizers', 'torch', 'pandas', 'jpeft.models'} & set(sys.modules)\n"
    code += "assert not heavy, heavy\nfrom jpeft import hf, generate\n"
    code += "assert jpeft.hf is hf and jpeft.generate is generate"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jpeft' has no attribute 'lora'"):
        jpeft.lora  # noqa: B018
    assert not hasattr(jpeft, "nothing")


def test_type_checkers_are_told_that_the_package_has_types():
    assert (SOURCE.parent / "py.typed").is_file()
