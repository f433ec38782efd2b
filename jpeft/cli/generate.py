"""`jpeft generate`: text from a prompt or a conversation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft.cli.arguments import add_generation
from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError

SUMMARY = "Generate text from a prompt, in the model's chat template."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="several form a batch; default: one from stdin")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without a chat template")
    parser.add_argument("--messages", metavar="FILE", help='a JSON list of {"role", "content"} instead; - is stdin')


def run(args: argparse.Namespace) -> None:
    if args.messages and (args.prompts or args.raw or args.system):
        raise UserError("--messages holds the whole conversation; give no PROMPT, --raw or --system with it")
    if args.raw and args.system:
        raise UserError("--raw uses no chat template, so there is no place for --system")
    prompts = [_read_messages(args.messages)] if args.messages else args.prompts or [_read_stdin().rstrip("\n")]
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some text")
    generator, settings = open_text_generator(args)
    tokenizer = generator.tokenizer
    if args.messages:
        from jpeft.text import answers

        answers.check_prompt(tokenizer, _as_messages(prompts[0], None))
    raw = args.raw or (not tokenizer.template and not args.messages and not args.system)
    ids = [tokenizer.encode(p) if raw else tokenizer.encode_chat(_as_messages(p, args.system)) for p in prompts]
    if len(ids) > 1:
        texts = generator.generate(ids, settings)
        if args.json:
            print_json([{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)])
        else:
            print("\n\n".join(texts))
        return
    text, speed = print_answer(generator, ids[0], settings, quiet=args.json)
    if args.json:
        numbers = {"prompt_tokens": speed.prompt, "new_tokens": speed.new, "tokens_per_second": speed.tokens_per_second}
        print_json({"prompt": prompts[0], "text": text, **numbers})
    elif (rate := speed.tokens_per_second) is not None:
        print_note(f"({speed.new} tokens, {rate:.1f} tokens/s after the second)")


def open_text_generator(args: argparse.Namespace) -> tuple[Any, Any]:
    """The text generator that the arguments name, and its settings."""
    from jpeft.recipes import generate
    from jpeft.serving.text_generator import Settings, keep_compiled

    keep_compiled()
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed {args.seed}: expected a number from 0 to 2^63 - 1")
    for option, value, most in (("--top-k", args.top_k, float("inf")), ("--top-p", args.top_p, 1)):
        if args.temperature == 0 and 0 < (value or 0) <= most:  # others are errors of their own
            raise UserError(f"{option} {value} is for sampling, and --temperature is 0: give one above 0")
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    generator = generate.open_text_generator(args.model, args.adapter, args.dtype, print_note, args.chat_template)
    return generator, settings


def print_answer(generator: Any, ids: Sequence[int], settings: Any, quiet: bool) -> tuple[str, Any]:
    """Generates text and prints it piece by piece, unless `quiet`. Returns the text and its `Speed`."""
    from jpeft.serving.text_generator import Speed

    speed, pieces = Speed(), []
    for piece in generator.stream(ids, settings, speed):
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return "".join(pieces), speed


def check_utf8(text: str) -> str:
    """A text from stdin, if it is valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("stdin is not UTF-8 text") from None
    return text


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UserError("no prompt was given, and stdin is closed")
    return check_utf8(sys.stdin.read())


def _as_messages(prompt: Any, system: str | None) -> list[dict[str, str]]:
    if not isinstance(prompt, str):
        return prompt
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _read_messages(file: str) -> Any:
    try:
        return json.loads(_read_stdin() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--messages {file}: not JSON ({error})") from None
