"""`jpeft export`: the adapter of a run, or another one, as a folder of its own or for a production server."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpeft.conversion import MAX_ERROR, MAX_RANK, Converted, factors_of
from jpeft.core.peft import Peft
from jpeft.errors import UserError
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.io import save
from jpeft.models.families import is_decoder
from jpeft.models.gguf import write_adapter
from jpeft.models.loading import load as load_model
from jpeft.models.sources import is_gguf
from jpeft.recipes import run_folder, tasks
from jpeft.recipes.adapters import load_adapter
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.config import CHAT, Config
from jpeft.recipes.tasks import chat
from jpeft.recipes.tasks.base import writing
from jpeft.storage import as_path, check_writable

HF, JPEFT = "hf", "jpeft"
PEFT, VLLM, SGLANG, GGUF = "peft", "vllm", "sglang", "gguf"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """An adapter with its model.

    Attributes:
        peft: the bound method.
        adapter: its leaves.
        params: the base.
        base: the base as the user named it.
        source: the folder or `.gguf` file that it was loaded from.
        options: the arguments of `jpeft.hf.save`, from a function that may refuse.
        config: the configuration of the run; None for an adapter of no run.
    """

    peft: Peft
    adapter: Any
    params: Any
    base: str
    source: Path | None
    options: Callable[[], Mapping[str, Any]]
    config: Config | None = None


@dataclass(frozen=True)
class Exported:
    """The result of `export_for`.

    Attributes:
        command: the command that serves it; empty for PEFT itself.
        rank: the rank of its LoRA; None for PEFT itself, whose folders have any.
        modules: the number of modules with a LoRA.
        errors: the relative errors by site, where the adapter was no LoRA.
        notes: what the command's user should know.
    """

    command: str = ""
    rank: int | None = None
    modules: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export_adapter(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: str = HF,
    log: Log = lambda line: None,
    model: str | None = None,
) -> None:
    """Writes the adapter of a run or, while it is not finished, that of a checkpoint; or an adapter of no run.

    Args:
        run: the run, or an adapter folder that jpeft or HuggingFace PEFT saved.
        out: the folder to write; it must not exist.
        form: "hf" is a HuggingFace PEFT folder, "jpeft" one that `jpeft.load` reads.
        log: receives which checkpoint is used.
        model: the base of an adapter of no run.

    Raises:
        UserError: there is no adapter or checkpoint, or the folder's form cannot hold it.

    >>> export_adapter("runs/smollm2-lora-1", "adapter")  # doctest: +SKIP
    """
    from jpeft import hf

    target = as_path(out)
    check_writable(target)
    opened = _open(as_path(run), model, log)
    with writing(target):
        if form == JPEFT:
            save(target, opened.peft, opened.adapter, opened.params)
            return
        options = opened.options()
        try:
            hf.save(target, opened.peft, opened.adapter, opened.params, base_model=opened.base, **options)
        except ValueError as error:
            raise UserError(f"`format` {HF}: {error}; `format` {JPEFT} holds any adapter") from error


def export_for(
    server: str,
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    rank: int = MAX_RANK,
    max_error: float = MAX_ERROR,
    dtype: str = "float32",
    log: Log = lambda line: None,
) -> Exported:
    """Writes an adapter as a production server computes it right.

    Args:
        server: "peft" is a HuggingFace PEFT folder, "vllm" and "sglang" one with LoRA of one rank and scale, "gguf" a
            file for llama.cpp.
        adapter: a run, or an adapter folder that jpeft or HuggingFace PEFT saved.
        out: the folder or file to write; it must not exist.
        model: the base of an adapter of no run.
        rank: the largest rank of what is no LoRA, but becomes one.
        max_error: the largest error of that, relative to the norm of the change of a weight.
        dtype: that of the tensors, "float32" or "float16".
        log: receives what the user should know.

    Raises:
        UserError: there is no adapter, or the server cannot compute it; the message names method and site.

    >>> export_for("vllm", "runs/smollm2-lora-1", "adapter").command  # doctest: +SKIP
    'vllm serve MODEL --enable-lora --max-lora-rank 16 --lora-modules adapter=adapter'
    """
    if server == PEFT:
        export_adapter(adapter, out, HF, log, model)
        return Exported()
    target = as_path(out)
    check_writable(target)
    opened = _open(as_path(adapter), model, log)
    _check_base(server, opened)
    try:
        with writing(target):
            lora = _write(server, target, opened, rank, max_error, dtype)
    except ValueError as error:  # of a name or module that has no place in the folder
        raise UserError(str(error)) from error
    command, notes = _command(server, out, opened, lora.rank)
    return Exported(command, lora.rank, len(lora.peft.sites), lora.errors, notes)


def _write(server: str, target: Path, opened: Opened, rank: int, max_error: float, dtype: str) -> Converted:
    from jpeft.hf import servers

    given: dict[str, Any] = {"rank": rank, "max_error": max_error, "dtype": dtype}
    own = (opened.peft, opened.adapter, opened.params)
    if server != GGUF:
        return servers.save_for(server, target, *own, base_model=opened.base, **given)
    lora = servers.as_lora(server, *own, **given)
    factors = {name.replace("/", "."): (own.a, own.b) for name, (_, own) in factors_of(lora).items()}
    write_adapter(target, opened.peft.model.config, factors, name=target.stem)
    return lora


# --- the adapter ------------------------------------------------------------------------------------------------------


def _open(path: Path, model: str | None, log: Log) -> Opened:
    """The adapter of a run on the run's base, or that of a folder on the model that is named."""
    if run_folder.is_run(path):
        if model is not None:
            raise UserError(f"{path} is a run, which has a base of its own: leave `model` out")
        config = Config(**run_folder.usable(path)["config"])
        task = tasks.find(config.task)
        trained = task.open_run(path, log)
        source = getattr(trained, "source", None)
        own = (trained.peft, trained.adapter, trained.params)
        return Opened(*own, config.model, source, lambda: task.hf_options(trained), config)
    if not path.exists():
        raise UserError(f"{path}: no such run or adapter")
    if model is None:
        raise UserError(f"{path} is no run, so its base is not known: give `model`")
    source = resolve_model(model, log)
    if not is_decoder(source):
        raise UserError(f"`model` {model}: not a language model, but an encoder; only a run of one can be exported")
    # PEFT's layers are separate, and may differ.
    options: dict[str, Any] = {"scan_layers": False} if (path / HF_CONFIG).is_file() else {}
    module, params = load_model(source, **options)
    peft, adapter = load_adapter(path, module, params, chat.example_inputs(), log)
    return Opened(peft, adapter, params, model, source, lambda: {"task_type": "CAUSAL_LM"})


def _check_base(server: str, opened: Opened) -> None:
    """Raises a UserError for a base that a server does not have."""
    config = opened.config
    if config is None:
        return
    if config.task != CHAT:
        raise UserError(
            f"`server` {server}: it serves language models, and the run trained a classifier; use jpeft merge"
        )
    for name in ("resize_embeddings", "untie_head"):
        if getattr(config, name):
            raise UserError(
                f"`server` {server}: the run's `{name}` changed the base, which the server has not; use jpeft merge"
            )


# --- the command ------------------------------------------------------------------------------------------------------


def _command(server: str, out: str | os.PathLike[str], opened: Opened, rank: int) -> tuple[str, tuple[str, ...]]:
    """The command that serves an adapter, and what its user should know."""
    file, notes = opened.source is not None and is_gguf(opened.source), []
    name, base = as_path(out).name, opened.base
    if server == GGUF:
        model = str(opened.source) if file else "MODEL.gguf"
        if not file:
            notes.append(f"MODEL.gguf is the base: convert_hf_to_gguf.py {base} --outfile MODEL.gguf")
        words = ["llama-server", "-m", model, "--lora", str(out)]
    else:
        model = "MODEL" if file else base
        if file:
            notes.append("MODEL is the base as a HuggingFace folder or hub id")
        served = f"{name}={out}"
        words = {
            VLLM: ["vllm", "serve", model, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", served],
            SGLANG: ["python", "-m", "sglang.launch_server", "--model-path", model, "--enable-lora", "--max-lora-rank",
                     str(rank), "--lora-paths", served],
        }[server]  # fmt: skip
    if opened.config is not None and opened.config.quantize != "none":
        notes.append(f"trained over a base in {opened.config.quantize}: over another base its answers differ a little")
    return shlex.join(words), tuple(notes)
