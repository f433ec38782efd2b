"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jpeft.recipes.config import DTYPES


def name_value(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE, where VALUE is JSON or else a string.

    >>> name_value("length=32"), name_value("word=a b")
    (('length', 32), ('word', 'a b'))
    """
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, parse_value(value)


def parse_value(text: str) -> Any:
    """The value of a text that is JSON, else the text itself.

    >>> parse_value("true"), parse_value("word")
    (True, 'word')
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def add_dtype(parser: argparse.ArgumentParser, summary: str, default: str = "float32") -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=f"{summary} (default: {default})")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `generate` and `chat` share."""
    add = parser.add_argument
    add("--model", help="smollm2 (default, or the run's model), a HuggingFace folder, .gguf file or hub id")
    add("--adapter", metavar="RUN", help="a run, or an adapter folder (saved by jpeft or PEFT)")
    add("--chat-template", metavar="FILE", help="a Jinja template (default: the run's, else the model's)")
    add("--system", metavar="TEXT", help="system message")
    add("--max-new-tokens", type=int, metavar="INT", help="(default: 256, or as many as the context has room for)")
    add("--temperature", type=float, default=0.0, metavar="FLOAT", help="0 (default): greedy decoding")
    add("--top-k", type=int, metavar="INT", help="sample from the k most likely tokens")
    add("--top-p", type=float, metavar="FLOAT", help="sample from the smallest set of tokens with this probability")
    add("--seed", type=int, default=0, metavar="INT", help="seed for sampling (default: 0)")
    add_dtype(parser, "of weights and activations")
