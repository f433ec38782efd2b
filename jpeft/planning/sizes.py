"""Architectures of well-known models, as their `config.json`: enough to plan without any of the model's files.

    model = jpeft.models.decoder_hf.from_config(config("llama-3-8b"))

For Gemma 3 it is the text model. The numbers are those that the authors published on the HuggingFace hub.
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
    """The names that `config` accepts.

    >>> "llama-3-8b" in known()
    True
    """
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted([name.removesuffix(".json") for name in files if name.endswith(".json")] + list(_ALIASES)))


def config(name: str) -> dict[str, Any]:
    """The `config.json` of a model. Case, separators, the owner and suffixes such as `-instruct` are ignored.

    Raises:
      UserError: the name is unknown.

    >>> config("meta-llama/Meta-Llama-3-8B-Instruct")["num_hidden_layers"], config("llama3 8b")["hidden_size"]
    (32, 4096)
    """
    names = {_key(entry): entry for entry in known()}
    found = names.get(_key(name))
    if found is None:
        near = [names[key] for key in difflib.get_close_matches(_key(name), names, n=3)]
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise UserError(f"unknown model {name!r}{hint} Known models: {', '.join(known())}")
    return json.loads((_folder() / f"{_ALIASES.get(found, found)}.json").read_text(encoding="utf-8"))


def _folder() -> Any:
    return resources.files("jpeft.planning") / "models"


def _key(name: str) -> str:
    # Dots stay: without them a mistyped qwen3-17b would match qwen3-1.7b.
    name = re.sub(r"[-_ ](instruct|it|pt|base|hf|chat)$", "", name.rpartition("/")[2].lower())
    return re.sub(r"[-_ ]", "", name.removeprefix("meta-"))
