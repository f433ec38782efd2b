"""`jpeft generate`: text from a prompt or a conversation."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpeft.checks import POSITIVE_INT, Rule, is_int, is_number
from jpeft.cli.common import Common
from jpeft.cli.terminal import print_json, print_note
from jpeft.errors import UserError
from jpeft.recipes.config import Config, Dtype
from jpeft.recipes.options import ANY_TEXT, SAMPLING, WHAT, option, same
from jpeft.storage import as_path, reason

SUMMARY = "Generate text from a prompt, in the model's chat template."
_SEED: Rule = (lambda value: is_int(value) and 0 <= value < 1 << 63, "a number from 0 to 2^63 - 1")
_TEMPERATURE: Rule = (lambda value: is_number(value) and value >= 0, "a finite number of at least 0")
_SHARE: Rule = (lambda value: is_number(value) and 0 < value <= 1, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Generation(Common):
    """Options that `generate` and `chat` share."""

    model: str | None = option(
        "a named model, a HuggingFace folder, .gguf file or hub id", WHAT, None, shown="the run's model, or smollm2",
        metavar="MODEL",
    )  # fmt: skip
    adapter: str | None = option("a run, or an adapter folder (saved by jpeft or PEFT)", WHAT, None, metavar="FOLDER")
    chat_template: str | None = option(
        "a Jinja template", WHAT, None, shown="the run's, else the model's", metavar="FILE"
    )
    system: str | None = option("system message", WHAT, None, rule=ANY_TEXT, metavar="TEXT")
    max_new_tokens: int | None = option(
        "most tokens to generate",
        SAMPLING,
        None,
        rule=POSITIVE_INT,
        shown="256, or as many as the context has room for",
    )
    temperature: float = option("0 is greedy decoding", SAMPLING, 0.0, rule=_TEMPERATURE)
    top_k: int | None = option("sample from the k most likely tokens", SAMPLING, None, rule=POSITIVE_INT)
    top_p: float | None = option(
        "sample from the smallest set of tokens with this probability", SAMPLING, None, rule=_SHARE
    )
    seed: int = option("seed for sampling", SAMPLING, 0, rule=_SEED)
    dtype: Dtype = same(Config, "dtype", help="dtype of weights and activations")


@dataclass(frozen=True, kw_only=True)
class Options(Generation):
    """Options of `jpeft generate`."""

    prompts: tuple[str, ...] = option(
        "several form a batch", WHAT, (), shown="one from stdin", metavar="PROMPT", positional=True
    )
    raw: bool = option("continue the text itself, without a chat template", WHAT, False)
    messages: str | None = option(
        'a JSON list of {"role", "content"} instead of prompts; - is stdin', WHAT, None, metavar="FILE"
    )


def run(args: Options) -> None:
    """Prints the generated text."""
    if args.messages and (args.prompts or args.raw or args.system):
        raise UserError("--messages holds the whole conversation; give no PROMPT, --raw or --system with it")
    if args.raw and args.system:
        raise UserError("--raw uses no chat template, so there is no place for --system")
    prompts = [_read_messages(args.messages)] if args.messages else args.prompts or [_read_stdin().rstrip("\n")]
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give some text")
    if run := next((prompt for prompt in prompts if isinstance(prompt, str) and _is_run(prompt)), None):
        raise UserError(f"{run} is a run, not a prompt; give it as `adapter` {run}")
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


def _is_run(prompt: str) -> bool:
    from jpeft.recipes.run_folder import is_run

    return "\0" not in prompt and is_run(Path(prompt))


def open_text_generator(args: Generation) -> tuple[Any, Any]:
    """The text generator that the arguments name, and its settings."""
    from jpeft.recipes import generate
    from jpeft.serving.text_generator import Settings, keep_compiled

    keep_compiled()
    for name in ("top_k", "top_p"):
        if args.temperature == 0 and getattr(args, name) is not None:
            raise UserError(f"`{name}` {getattr(args, name)} is for sampling, and `temperature` is 0: give one above 0")
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
        return json.loads(_read_stdin() if file == "-" else as_path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--messages {file}: {reason(error)}; expected a JSON file") from error
    except ValueError as error:
        raise UserError(f"--messages {file}: not JSON ({error})") from None
