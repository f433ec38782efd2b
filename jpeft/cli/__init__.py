"""The command line: `app.py` is the parser and explains errors, and every command has a file."""

from jpeft.cli.app import main as main
