"""jpeft.cli.generate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft.errors import UserError


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="smollm2 (default, or the run's), a HuggingFace folder, .gguf or hub id")
    parser.add_argument("--adapter", metavar="RUN", help="a run, or an adapter's folder (jpeft's or PEFT's)")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--max-new-tokens", type=int, metavar="INT",
                        help="(default: 256, or what is left of the context)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, metavar="FLOAT", help="0 (default): no chance")
    parser.add_argument("--top-k", type=int, metavar="INT", help="draw from the so many likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="FLOAT", help="draw from the likeliest that make up this share")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of what is drawn (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights and the arithmetic (default: float32)")  # fmt: skip


def open_text_generator(args: argparse.Namespace) -> tuple[Any, Any]:
    from jpeft.recipes import finished
    from jpeft.serving.text_generator import Settings, keep_compiled

    keep_compiled()
    names = [field.name for field in dataclasses.fields(Settings)]
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed {args.seed}: expected a number from 0 to 2^63 - 1")
    settings = Settings(**{name: getattr(args, name) for name in names})
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    return finished.open_text_generator(args.model, args.adapter, args.dtype, say), settings


SUMMARY = "Generate text from a prompt, in the model's chat template."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_arguments(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="several are a batch; without any, stdin is one")
    parser.add_argument("--raw", action="store_true", help="go on from the text itself, without a chat template")
    parser.add_argument("--messages", metavar="FILE", help='a JSON list of {"role", "content"} instead; - is stdin')


def run(args: argparse.Namespace) -> None:
    if args.messages and (args.prompts or args.raw or args.system):
        raise UserError("--messages holds the whole conversation; give no PROMPT, --raw or --system with it")
    if args.raw and args.system:
        raise UserError("--raw goes on from the text itself; there is no place for --system")
    prompts = [_messages(args.messages)] if args.messages else args.prompts or [_stdin().rstrip("\n")]
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some text")
    speaker, settings = open_text_generator(args)
    raw = args.raw or (not speaker.codec.template and not args.messages and not args.system)
    ids = [speaker.codec.encode(p) if raw else speaker.codec.encode_chat(_as_messages(p, args.system)) for p in prompts]
    if len(ids) > 1:
        texts = speaker.answers(ids, settings)
        if args.json:
            print(
                json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)], ensure_ascii=False)
            )
        else:
            print("\n\n".join(texts))
        return
    text, speed = speak(speaker, ids[0], settings, quiet=args.json)
    if args.json:
        numbers = {"prompt_tokens": speed.prompt, "new_tokens": speed.new, "tokens_per_second": speed.tokens_per_second}
        print(json.dumps({"prompt": prompts[0], "text": text, **numbers}, ensure_ascii=False))
    elif (rate := speed.tokens_per_second) is not None:
        print(f"({speed.new} tokens, {rate:.1f} tokens/s after the second)", file=sys.stderr)


def _stdin() -> str:
    """All of stdin as text."""
    if sys.stdin is None:
        raise UserError("no prompt was given, and stdin is closed")
    return as_text(sys.stdin.read())


def as_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("stdin is not UTF-8 text") from None
    return text


def speak(speaker: Any, ids: Sequence[int], settings: Any, quiet: bool) -> tuple[str, Any]:
    """An answer, printed as it comes unless `quiet`."""
    from jpeft.serving.text_generator import Speed

    speed, pieces = Speed(), []
    for piece in speaker.answer(ids, settings, speed):
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return "".join(pieces), speed


def _as_messages(prompt: Any, system: str | None) -> list[dict[str, str]]:
    if not isinstance(prompt, str):
        return prompt
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _messages(file: str) -> Any:
    try:
        return json.loads(_stdin() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--messages {file}: not JSON ({error})") from None
