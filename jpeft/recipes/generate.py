"""The text generator behind `jpeft generate` and `jpeft chat`: a language model, its tokenizer and an adapter.

Example::

    generator = open_text_generator("smollm2", adapter="runs/mine")
    ids = generator.tokenizer.encode_chat([{"role": "user", "content": "Who are you?"}])
    for piece in generator.stream(ids, Settings()):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.stacking import unroll
from jpeft.errors import UserError
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.models.families import is_decoder
from jpeft.models.loading import load as load_model
from jpeft.quantization.tree import dequantize
from jpeft.recipes import run_folder
from jpeft.recipes.adapters import load_adapter
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.config import Config, read_chat_template
from jpeft.recipes.tasks import chat
from jpeft.recipes.vocabulary import reshape
from jpeft.serving.text_generator import TextGenerator
from jpeft.storage import as_path
from jpeft.text import chat_template


def open_text_generator(
    name: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    log: Callable[[str], None] = lambda line: None,
    template: str | None = None,
) -> TextGenerator:
    """A text generator for a named model, a HuggingFace folder or a `.gguf` file, with or without an adapter.

    Args:
        name: the model. None is the base of the run that `adapter` names, quantized as it was trained on, else smollm2.
        adapter: a run, finished or not, or a folder that jpeft or HuggingFace PEFT saved.
        template: the file of a chat template; None is the one that the run was trained with, else the model's.

    Raises:
        UserError: the model is not a language model, there is no adapter, or the adapter belongs to another model.

    >>> open_text_generator("smollm2")  # doctest: +SKIP
    """
    folder = None if adapter is None else as_path(adapter)
    template = None if template is None else read_chat_template(template)
    if folder is not None and name is None and run_folder.is_run(folder):
        run = chat.open_run(folder, log)
        return TextGenerator.of(run.peft, run.params, run.adapter, run.tokenizer.with_template(template))
    path = resolve_model(name or "smollm2", log)
    if template is None and folder is not None and run_folder.is_run(folder):
        template = run_folder.read_record(folder)["config"].get("chat_template")
    tokenizer = chat_template.read(path).with_template(template)
    if not is_decoder(path):
        raise UserError(f"{path}: not a language model, but an encoder; it cannot generate text")
    # A CPU decodes faster with unrolled layers. An adapter is loaded onto layers as it was trained, and unrolled then;
    # PEFT's layers are separate, and may differ.
    on_cpu = jax.default_backend() == "cpu"
    separate = (folder / HF_CONFIG).is_file() if folder is not None else on_cpu
    options: dict[str, Any] = {"scan_layers": False} if separate else {}
    model, params = load_model(path, param_dtype=jnp.dtype(dtype), **options)
    if folder is not None and run_folder.is_run(folder):
        config = Config(**run_folder.read_record(folder)["config"])
        model, params, _ = reshape(model, params, config, lambda: tokenizer.size)
    chat_template.check_vocabulary(tokenizer, model.config.vocab_size)
    peft = leaves = None
    if folder is not None:
        peft, leaves = load_adapter(folder, model, params, chat.example_inputs(), log)
    if on_cpu:
        model, params, peft, leaves = unroll(model, dequantize(params), peft, leaves)
    return TextGenerator(model, params, tokenizer, peft, leaves)
