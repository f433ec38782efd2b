"""jpeft.cli.chat."""

from __future__ import annotations

import argparse
import json
import sys

from jpeft.cli.generate import add_generation_arguments, as_text, open_text_generator, speak
from jpeft.cli.terminal import fail
from jpeft.errors import UserError

SUMMARY = "Chat with a language model: each line of stdin is a turn, Ctrl-D ends it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="RUN", nargs="?", default=argparse.SUPPRESS, help="a run to talk with")
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from jpeft.serving.text_generator import Conversation

    if sys.stdin is None:
        raise UserError("stdin is closed, but each of its lines is a turn")
    speaker, settings = open_text_generator(args)
    talk, watched = Conversation(args.system), sys.stdin.isatty()
    while True:
        if watched:
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if not line.strip():
            continue
        try:
            talk.add("user", as_text(line.strip()))
            ids, limit = speaker.codec.encode_chat(talk.messages), speaker.model.config.max_position_embeddings
            if len(ids) >= limit:
                raise UserError(
                    f"the conversation has {len(ids)} tokens by now, and the model takes {limit}: begin another"
                )
            text, _ = speak(speaker, ids, settings, quiet=args.json)
        except ValueError as error:
            if not watched:
                raise
            talk.take_back()  # what was said before stands
            fail(str(error), 1)
            continue
        talk.add("assistant", text)
        if args.json:
            print(json.dumps(talk.messages[-1], ensure_ascii=False), flush=True)
