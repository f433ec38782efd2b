"""Warnings of the library, as the command line prints them."""

import subprocess
import sys

CODE = """
import types, warnings
from jpeft.cli.app import _run
from jpeft.cli.arguments import known_options
from jpeft.recipes.config import Config
def run(args):
    warnings.warn("this LoRA changes nothing:\\n every update in it is zero, see `rank`", stacklevel=1)
print(_run(types.SimpleNamespace(run=run, Options=dict), {}, known_options([Config])))
"""


def test_a_warning_is_one_line_without_a_place_in_the_code():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr == "jpeft: warning: this LoRA changes nothing: every update in it is zero, see --rank\n"
    assert done.stdout == "0\n"
