"""`jpeft export`: the adapter of a run as a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

from jpeft.errors import UserError
from jpeft.io import save
from jpeft.recipes import run_folder, tasks
from jpeft.recipes.config import Config
from jpeft.recipes.tasks.base import writing
from jpeft.storage import as_path, check_writable

HF, JPEFT = "hf", "jpeft"


def export_adapter(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: str = HF,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes the adapter of a run or, while it is not finished, that of a checkpoint.

    Args:
        run: the run.
        out: the folder to write; it must not exist.
        form: "hf" is a HuggingFace PEFT folder, "jpeft" one that `jpeft.load` reads.
        log: receives which checkpoint is used.

    Raises:
        UserError: there is no adapter or checkpoint, or the folder's form cannot hold it.

    >>> export_adapter("runs/smollm2-lora-1", "adapter")  # doctest: +SKIP
    """
    from jpeft import hf

    folder, target = as_path(run), as_path(out)
    check_writable(target)
    config = Config(**run_folder.usable(folder)["config"])
    task = tasks.find(config.task)
    trained = task.open_run(folder, log)
    with writing(target):
        if form == JPEFT:
            save(target, trained.peft, trained.adapter, trained.params)
            return
        options = task.hf_options(trained)
        try:
            hf.save(target, trained.peft, trained.adapter, trained.params, base_model=config.model, **options)
        except ValueError as error:
            raise UserError(f"`format` {HF}: {error}; `format` {JPEFT} holds any adapter") from error
