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
LAZY = ("generate", "hf", "models", "plan", "stream")


def names_for_editors():
    """The names in the block that type checkers read, with where they come from."""
    (block,) = (
        node for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )  # fmt: skip
    return {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}


def test_editors_see_what_there_is_at_run_time():
    seen = names_for_editors()
    for name, (module, member) in seen.items():
        found = importlib.import_module("jpeft." + member if module == "jpeft" else module)
        assert getattr(jpeft, name) is (found if module == "jpeft" else getattr(found, member)), name
    at_once = {name for name in seen if name not in LAZY}
    code = f"import jpeft; assert {at_once!r} <= vars(jpeft).keys(); assert not {set(LAZY)!r} & vars(jpeft).keys()\n"
    code += f"assert {set(LAZY)!r} <= set(dir(jpeft))\n"
    code += "import sys; heavy = {'orbax', 'matplotlib', 'tokenizers', 'torch', 'pandas', 'jpeft.models'}"
    code += "\nassert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    code += "from jpeft import hf, generate; assert jpeft.hf is hf and jpeft.generate is generate"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", LAZY)
def test_names_that_are_imported_late_have_help(name):
    assert inspect.getdoc(getattr(jpeft, name)) and name in dir(jpeft)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jpeft' has no attribute 'lora'"):
        jpeft.lora  # noqa: B018
    assert not hasattr(jpeft, "nothing")


def test_type_checkers_are_told_that_the_package_has_types():
    assert (SOURCE.parent / "py.typed").is_file()
