"""The model of `jpeft serve`, its tokenizer, and a folder of adapters in one bank.

Example::

    served, folder = open_served("smollm2", "adapters", Sizes(rows=8))
    run(make_app(served, folder), "127.0.0.1", 8000)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import hf
from jpeft.core.bank import stack
from jpeft.core.stacking import unroll
from jpeft.errors import AdapterError, UserError
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.methods.chain import Chain
from jpeft.methods.lora import LoRA
from jpeft.models.families import is_decoder
from jpeft.models.loading import load as load_model
from jpeft.quantization.tree import dequantize
from jpeft.recipes.adapters import load_adapter
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.config import read_chat_template
from jpeft.recipes.tasks.chat import example_inputs
from jpeft.serving.engine import Engine
from jpeft.serving.http.answering import Served
from jpeft.serving.http.folder import AdapterFolder, is_name
from jpeft.serving.uniting import unite
from jpeft.storage import as_path
from jpeft.text import chat_template

Log = Callable[[str], None]
_RANK = 16  # of the bank of a folder without adapters


@dataclass(frozen=True)
class Sizes:
    """How much a server holds at once.

    Attributes:
      rows: requests that run at once.
      capacity: tokens of a prompt and its answer.
      slots: adapters; None: twice those in the folder, at least 8.
      rank: the largest rank of adapters that are loaded later; 0: that of those in the folder.
      queue: requests that wait.
      chunk: tokens of a prompt that are read at once.
    """

    rows: int = 16
    capacity: int = 2048
    slots: int | None = None
    rank: int = 0
    queue: int = 256
    chunk: int = 128


@dataclass(frozen=True)
class Base:
    """A model, as adapters were trained on it, and as it is served.

    On a CPU it is served with unrolled layers and dequantized weights, which decode faster.

    Attributes:
      model: the model.
      params: its parameters.
      served: the model and the parameters that are served.
    """

    model: Any
    params: Any
    served: tuple[Any, Any]

    @classmethod
    def of(cls, model: Any, params: Any) -> Base:
        if jax.default_backend() != "cpu":
            return cls(model, params, (model, params))
        return cls(model, params, unroll(model, dequantize(params))[:2])

    def read(self, folder: Path) -> tuple[Any, Any]:
        """The adapter in a folder, with its method, bound to the model that is served.

        Raises:
          UserError: there is no adapter, or it does not fit the model.
          AdapterError: it cannot be read, or was trained on another base.
        """
        model, params = self.served
        if (folder / HF_CONFIG).is_file():  # PEFT's layers are separate, and may differ
            return hf.load(folder, model, params, *example_inputs())
        peft, adapter = load_adapter(folder, self.model, self.params, example_inputs())
        if model.scan_layers:
            return peft, adapter
        _, _, peft, adapter = unroll(self.model, jax.eval_shape(lambda: self.params), peft, adapter)
        return peft, adapter


def open_served(
    name: str,
    adapters: str | Path | None = None,
    sizes: Sizes | None = None,
    *,
    dtype: str = "float32",
    template: str | None = None,
    served_name: str | None = None,
    log: Log = lambda line: None,
) -> tuple[Served, AdapterFolder]:
    """An engine for a model and the adapters in a folder, and the folder, from which more can be loaded.

    Args:
      name: a named model, a HuggingFace folder or a `.gguf` file.
      adapters: the folder: each folder in it is an adapter that jpeft or PEFT saved, or a run, and has its name.
      sizes: how much is held at once.
      dtype: of weights and activations.
      template: the file of a chat template; None: the model's.
      served_name: the name of the base; None: that of its folder or file.

    Raises:
      UserError: the model is not a language model, an adapter cannot be read, or the adapters cannot be in one bank.

    >>> served, folder = open_served("smollm2", "adapters")  # doctest: +SKIP
    """
    sizes = sizes or Sizes()
    path = resolve_model(name, log)
    if not is_decoder(path):
        raise UserError(f"{path}: not a language model, but an encoder; it cannot generate text")
    tokenizer = chat_template.read(path).with_template(None if template is None else read_chat_template(template))
    base = Base.of(*load_model(path, param_dtype=jnp.dtype(dtype)))
    model, params = base.served
    chat_template.check_vocabulary(tokenizer, model.config.vocab_size)
    root = None if adapters is None else as_path(adapters)
    found = {} if root is None else _read_all(root, base)
    called = served_name or (as_path(name).stem if as_path(name).exists() else name)
    if bad := [text for text in (called, *found) if not is_name(text)]:
        raise UserError(f"{bad[0]!r} cannot be a model's name: it is blank, not UTF-8, or has control characters")
    if called in found:
        raise UserError(f"an adapter has the name of the base, {called!r}: give the base another one (--name)")
    bank = None if root is None else make_bank(base, found, sizes)
    log(f"{called} with {len(found)} adapters{': ' if found else ''}{', '.join(found)}")
    engine = Engine(
        model, params, bank=bank, rows=sizes.rows, capacity=sizes.capacity, chunk=sizes.chunk, queue=sizes.queue,
        vocabulary=tokenizer.size,
    )  # fmt: skip
    tokenizer = replace(tokenizer, where=called)  # clients are told of errors in a template, and not where its file is
    return Served(engine, tokenizer, called), AdapterFolder(root, base.read, called)


def _read_all(root: Path, base: Base) -> dict[str, tuple[Any, Any]]:
    """The adapters in a folder, by name."""
    if not root.is_dir():
        raise UserError(f"`adapters` {root}: no such folder; expected one with a folder for each adapter")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return {folder.name: base.read(folder) for folder in folders}


def make_bank(base: Base, adapters: Mapping[str, tuple[Any, Any]], sizes: Sizes) -> Any:
    """A bank with the adapters, of a method that can do what each of theirs does.

    Args:
      base: the base.
      adapters: for each name, a bound method and its adapter.
      sizes: how much it holds.

    Raises:
      UserError: an adapter cannot be in one bank with those before it.

    >>> bank = make_bank(base, {"fr": (peft, adapter)}, Sizes())  # doctest: +SKIP
    """
    model, params = base.served
    members = unite([peft for peft, _ in adapters.values()], sizes.rank)
    members = members or [LoRA(rank=sizes.rank or _RANK, targets="all-linear")]
    slots = sizes.slots or max(8, 2 * len(adapters)) + 1
    if len(adapters) >= slots:
        raise UserError(f"`slots` {slots} hold {slots - 1} adapters beside the base, and there are {len(adapters)}")
    name = ""
    try:
        method = members[0] if len(members) == 1 else Chain(*members)
        bank = stack(method.bind(model, params, *example_inputs()), {}, slots=slots)
        for name, adapter in adapters.items():
            bank = bank.load(name, adapter)
    except (ValueError, AdapterError) as error:
        where = f"the adapter {name!r}" if name else f"a bank of {', '.join(member.name for member in members)}"
        raise UserError(f"{where} cannot be in one bank with the others: {error}; serve it by itself") from error
    return bank
