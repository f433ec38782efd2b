"""Adapters from wherever they are: a run, finished or not, or a folder that jpeft or HuggingFace PEFT saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jpeft.core.fingerprint import difference
from jpeft.core.peft import Peft
from jpeft.errors import AdapterError, UserError
from jpeft.io import CONFIG, load
from jpeft.methods import from_dict
from jpeft.recipes import run_folder
from jpeft.recipes.config import Config
from jpeft.recipes.optimizer import optimizer
from jpeft.recipes.tasks.base import bind
from jpeft.training import checkpoint
from jpeft.training.checkpoint import Checkpoints, DamagedError
from jpeft.training.step import TrainState


def load_adapter(
    path: Path, model: Any, params: Any, inputs: Sequence[Any], log: Callable[[str], None] = lambda line: None
) -> tuple[Peft, Any]:
    """The adapter at a path, and its method bound to a model.

    Args:
        path: a run, an adapter folder, or a folder with one in `adapter/`.
        model: the model, its parameters, and abstract `inputs`, as for `method.bind`.
        log: receives what the user should know, such as which checkpoint of an unfinished run is used.

    Raises:
        UserError: there is no adapter, or it does not fit the model.
        AdapterError: it cannot be read, or was trained on another base.

    >>> peft, adapter = load_adapter(Path("runs/mine"), model, params, example_inputs())  # doctest: +SKIP
    """
    from jpeft import hf
    from jpeft.hf.config import CONFIG as HF_CONFIG

    try:
        if (path / HF_CONFIG).is_file():
            return hf.load(path, model, params, *inputs)
        if run_folder.is_run(path):
            return load_of_run(path, run_folder.usable(path), model, params, inputs, log)
        if any(path.glob("model*.safetensors")):
            raise UserError(f"{path}: a model, with no adapter of its own: `model` {path}")
        folder = path / "adapter" if (path / "adapter").is_dir() else path
        if not (folder / CONFIG).is_file():
            raise UserError(f"`adapter` {path}: no adapter there; expected a run, or a folder that jpeft or PEFT saved")
        return load(folder, model, params, *inputs)
    except (AdapterError, UserError):
        raise
    except (ValueError, KeyError) as error:
        raise UserError(f"`adapter` {path}: does not fit {type(model).__name__}: {error}") from error


def load_of_run(
    run: Path,
    record: Mapping[str, Any],
    model: Any,
    params: Any,
    inputs: Sequence[Any],
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Peft, Any]:
    """The adapter of a run: its result or, while it is not finished, that of a checkpoint, which is logged.

    The checkpoint is the best one of a run with `--keep best`, and else the newest; if it is damaged, the next newest.
    The run is only read, so that it may be training meanwhile.

    Args:
        record: the content of the run's config.json.

    Raises:
        UserError: the base changed, or no checkpoint can be read.
        AdapterError: the adapter cannot be read, or was trained on another base.

    >>> peft, adapter = load_of_run(run, read_record(run), model, params, example_inputs())  # doctest: +SKIP
    """
    if run_folder.has_adapter(run):
        return load(run / "adapter", model, params, *inputs)
    config = Config(**record["config"])
    if changed := difference(record["base"], params):
        raise UserError(f"{run}: the model {config.model} changed since the run began: {changed}")
    peft = bind(from_dict(record["method"]), model, params, inputs)
    key, abstract = jax.random.key(0), jax.eval_shape(lambda: params)
    like = TrainState.create(
        peft, peft.init(key, abstract), optimizer(config, record["steps"], peft), jax.eval_shape(lambda: key)
    )
    with checkpoint.open_checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        state, step, kind = _restored(run, checkpoints, like, config.keep, log)
    log(f"{run} is not finished: using its {kind} checkpoint, of step {step} of {record['steps']}")
    return peft, state.adapter


def _restored(
    run: Path, checkpoints: Checkpoints, like: Any, keep: str, log: Callable[[str], None]
) -> tuple[Any, int, str]:
    """The state of the preferred checkpoint that is not damaged, its step, and "best" or "newest"."""
    steps = checkpoints.all_steps()[::-1]
    best = checkpoints.best_step() if keep == "best" else None
    failure: Exception | None = None
    for step in sorted(steps, key=lambda step: step != best):  # the best first, then the newest
        try:
            return checkpoint.restore(checkpoints, like, step)[0], step, "best" if step == best else "newest"
        except DamagedError as error:
            failure = failure or error
            log(f"the checkpoint of step {step} is damaged and left out")
    if failure:
        raise damaged_error(run, failure)
    raise UserError(
        f"{run}: not finished, and it has no checkpoint; resume it with: jpeft finetune --out {run} --resume"
    )


def damaged_error(run: Path, failure: Exception) -> UserError:
    """The error for a run none of whose checkpoints can be read.

    >>> damaged_error(Path("run"), DamagedError("run/checkpoints/3: damaged")).args[0][:40]
    'run: not finished, and its checkpoints a'
    """
    return UserError(
        f"{run}: not finished, and its checkpoints are damaged ({failure}); to train it from the beginning, remove "
        f"{run / 'checkpoints'} and call: jpeft finetune --out {run} --resume"
    )
