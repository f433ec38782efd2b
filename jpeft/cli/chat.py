"""`jpeft chat`: a conversation with a language model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jpeft.cli.arguments import add_generation
from jpeft.cli.generate import check_utf8, open_text_generator, print_answer
from jpeft.cli.terminal import print_error, print_json
from jpeft.errors import UserError

SUMMARY = "Chat with a language model: each line of stdin is a turn, Ctrl-D ends the conversation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="RUN", nargs="?", default=argparse.SUPPRESS, help="a run to chat with")
    add_generation(parser)


def run(args: argparse.Namespace) -> None:
    from jpeft.serving.text_generator import Conversation

    if sys.stdin is None:
        raise UserError("stdin is closed, but each of its lines is a turn")
    generator, settings = open_text_generator(args)
    conversation, interactive = Conversation(args.system), sys.stdin.isatty()
    while (line := _read_line(interactive)) is not None:
        if not line.strip():
            continue
        try:
            conversation.add("user", check_utf8(line.strip()))
            text, _ = print_answer(generator, _encode(generator, conversation), settings, quiet=args.json)
        except ValueError as error:
            if not interactive:
                raise
            conversation.take_back()  # earlier turns stay
            print_error(str(error))
            continue
        conversation.add("assistant", text)
        if args.json:
            print_json(conversation.messages[-1])


def _read_line(interactive: bool) -> str | None:
    """The next line of stdin, after a prompt sign in a terminal; None at its end."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline() or None


def _encode(generator: Any, conversation: Any) -> Any:
    ids, limit = generator.tokenizer.encode_chat(conversation.messages), generator.model.config.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(f"the conversation has {len(ids)} tokens, and the model takes at most {limit}: start a new one")
    return ids
