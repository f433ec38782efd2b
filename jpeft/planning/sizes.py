"""Architectures of known models, as their `config.json`: enough to plan with, without a file of theirs at hand.

    model = jpeft.models.decoder.from_config(config("llama-3-8b"))

Gemma 3's are of the text model. The numbers are those that the authors published on the HuggingFace hub.
"""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from typing import Any

from jpeft.errors import UserError

_ALIASES = {"llama-3-405b": "llama-3.1-405b", "mistral-7b": "mistral-7b-v0.1", "mistral-small": "mistral-small-24b"}


def known() -> tuple[str, ...]:
    """The names that `config` knows.

    >>> "llama-3-8b" in known()
    True
    """
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted([name.removesuffix(".json") for name in files if name.endswith(".json")] + list(_ALIASES)))


def config(name: str) -> dict[str, Any]:
    """The `config.json` of a model. Case and separators do not count, nor do an owner or that it is tuned.

    Raises:
      UserError: it is not a known one.

    >>> config("meta-llama/Meta-Llama-3-8B-Instruct")["num_hidden_layers"], config("llama3 8b")["hidden_size"]
    (32, 4096)
    """
    names = {_key(entry): entry for entry in known()}
    found = names.get(_key(name))
    if found is None:
        near = [names[key] for key in difflib.get_close_matches(_key(name), names, n=3)]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"{name!r} is no known model{hint}. Known: {', '.join(known())}")
    return json.loads((_folder() / f"{_ALIASES.get(found, found)}.json").read_text(encoding="utf-8"))


def _folder() -> Any:
    return resources.files("jpeft.planning") / "models"


def _key(name: str) -> str:
    # Dots stay: without them, a 17b that does not exist would be the 1.7b.
    name = re.sub(r"[-_ ](instruct|it|pt|base|hf|chat)$", "", name.rpartition("/")[2].lower())
    return re.sub(r"[-_ ]", "", name.removeprefix("meta-"))
