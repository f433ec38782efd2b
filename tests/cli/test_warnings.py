"""Warnings of the library, as the command line prints them."""

import subprocess
import sys

CODE = """
import argparse, warnings
from jpeft.cli.app import _run
def command(args):
    warnings.warn("this LoRA changes nothing:\\n every update in it is zero", stacklevel=1)
print(_run(argparse.Namespace(run_command=command, debug=False)))
"""


def test_a_warning_is_one_line_without_a_place_in_the_code():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr == "jpeft: warning: this LoRA changes nothing: every update in it is zero\n"
    assert done.stdout == "0\n"
