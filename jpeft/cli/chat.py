"""`jpeft chat`: a conversation with a language model."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from jpeft.cli.generate import Generation, check_utf8, open_text_generator, print_answer
from jpeft.cli.terminal import print_error, print_json
from jpeft.errors import UserError
from jpeft.recipes.options import WHAT, option

SUMMARY = "Chat with a language model: each line of stdin is a turn, Ctrl-D ends the conversation."


@dataclass(frozen=True, kw_only=True)
class Options(Generation):
    """Options of `jpeft chat`."""

    run: str | None = option("a run to chat with, as --adapter", WHAT, None, metavar="RUN", positional=True)


def run(args: Options) -> None:
    """Answers each line of stdin."""
    from jpeft.serving.text_generator import Conversation

    if sys.stdin is None:
        raise UserError("stdin is closed, but each of its lines is a turn")
    if args.run is not None and args.adapter is not None:
        raise UserError(f"{args.run} and --adapter {args.adapter} name two adapters; give one")
    generator, settings = open_text_generator(dataclasses.replace(args, adapter=args.run or args.adapter))
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
    ids = generator.tokenizer.encode_chat(conversation.messages)
    virtual = 0 if generator.peft is None else generator.peft.virtual_tokens
    limit = generator.model.config.max_position_embeddings - virtual
    if len(ids) >= limit:
        raise UserError(f"the conversation has {len(ids)} tokens, and the model takes at most {limit}: start a new one")
    return ids
