"""The reference of the command line and of configuration files, from the dataclasses that make both."""

from __future__ import annotations

from jpeft.cli import reference

_COMMANDS = """\
# Command line

`jpeft COMMAND`, or `python -m jpeft.cli COMMAND`. Results go to stdout, errors to stderr as one line, with a status
other than zero. `jpeft COMMAND --help` shows the same as this page.
"""
_CONFIGURATION = """\
# Configuration

`jpeft finetune --config run.yaml lr=1e-3` reads these keys from a YAML or JSON file. `NAME=VALUE` and flags on the
command line win over the file. A key that is unknown, given twice, or of another type than its option is an error. The
`config.json` of a run is a configuration file too, and repeats the run. From Python, the keys of the first four tables
are the fields of `jpeft.recipes.config.Config`, but for `remat`.

```yaml
model: minilm
data: train.csv # with the columns review and stars
text: review
label: stars
method: lora
rank: 16
targets: [query, value]
settings: {rslora: true} # any other field of the method
lr: 1e-3
```
"""


def pages() -> dict[str, str]:
    """The two pages."""
    commands = [f"## jpeft {name}\n\n{text}" for name, text in reference.commands().items()]
    return {
        "reference/command_line.md": "\n".join([_COMMANDS, *commands]),
        "reference/configuration.md": f"{_CONFIGURATION}\n{reference.configuration()}",
    }
