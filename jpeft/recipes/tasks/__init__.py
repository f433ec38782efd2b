"""Tasks of `jpeft finetune`: each module owns everything that differs by task (`base.Task` lists it)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

# Modules by name: they import JAX and the models, and the command line has to start fast.
TASKS: Mapping[str, str] = {
    "classify": "jpeft.recipes.tasks.classification",
    "chat": "jpeft.recipes.tasks.chat",
}


def find(name: str) -> Any:
    """The module of a task, a `jpeft.recipes.tasks.base.Task`.

    >>> find("chat").METRIC
    ('eval_perplexity', 'perplexity of held-out answers')
    """
    return importlib.import_module(TASKS[name])
