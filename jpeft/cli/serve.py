"""`jpeft serve`: a language model and its adapters behind OpenAI's interface."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jpeft.checks import POSITIVE_INT, Rule, is_int, is_number
from jpeft.cli.common import Common
from jpeft.cli.terminal import print_note
from jpeft.recipes.config import Config, Dtype
from jpeft.recipes.options import MACHINES, MEMORY, WHAT, option, same

SUMMARY = "Serve a language model, each request under an adapter of its own, with OpenAI's interface."
_PORT: Rule = (lambda value: is_int(value) and 0 <= value < 1 << 16, "a port from 0 to 65535")
_COUNT: Rule = (lambda value: is_int(value) and value >= 0, "an integer of at least 0")
_SECONDS: Rule = (lambda value: is_number(value) and value > 0, "a number of seconds above 0")
_KEY = "JPEFT_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Options of `jpeft serve`."""

    model: str = option("a named model, a HuggingFace folder, .gguf file or hub id", WHAT, "smollm2", metavar="MODEL")
    adapters: str | None = option(
        "a folder with a folder for each adapter, which has its name", WHAT, None, metavar="FOLDER"
    )
    name: str | None = option("the name of the model without an adapter", WHAT, None, shown="its folder's")
    chat_template: str | None = option("a Jinja template", WHAT, None, shown="the model's", metavar="FILE")
    dtype: Dtype = same(Config, "dtype", help="dtype of weights and activations")
    rows: int = option("requests that run at once", MEMORY, 16, rule=POSITIVE_INT)
    capacity: int = option("most tokens of a prompt and its answer", MEMORY, 2048, rule=POSITIVE_INT)
    slots: int | None = option(
        "adapters that are held at once, with the base", MEMORY, None, rule=POSITIVE_INT, shown="twice those in FOLDER"
    )
    rank: int = option("largest rank of adapters that are loaded later", MEMORY, 0, rule=_COUNT)
    chunk: int = option("tokens of a prompt that are read at once", MEMORY, 128, rule=POSITIVE_INT)
    queue: int = option("requests that wait for a row; others get the status 429", MEMORY, 256, rule=_COUNT)
    host: str = option("address to listen at", MACHINES, "127.0.0.1", metavar="ADDRESS")
    port: int = option("port to listen at", MACHINES, 8000, rule=_PORT)
    api_key: str | None = option(
        "key that clients must give", MACHINES, None, shown=f"${_KEY}, else none", metavar="KEY"
    )
    timeout: float = option("most seconds for an answer", MACHINES, 600.0, rule=_SECONDS)
    drain: float = option("most seconds for answers under way after SIGTERM", MACHINES, 30.0, rule=_SECONDS)


def run(args: Options) -> None:
    """Serves until SIGINT or SIGTERM."""
    from jpeft.recipes.serve import Sizes, open_served
    from jpeft.serving.http.app import make_app
    from jpeft.serving.http.app import run as run_app
    from jpeft.serving.text_generator import keep_compiled

    keep_compiled()
    sizes = Sizes(args.rows, args.capacity, args.slots, args.rank, args.queue, args.chunk)
    served, folder = open_served(
        args.model,
        args.adapters,
        sizes,
        dtype=args.dtype,
        template=args.chat_template,
        served_name=args.name,
        log=print_note,
    )
    app = make_app(served, folder, args.api_key or os.environ.get(_KEY) or None, args.timeout)
    print_note(f"serving at http://{args.host}:{args.port}/v1")
    run_app(app, args.host, args.port, args.drain)
    print_note("stopped")
