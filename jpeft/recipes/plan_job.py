"""From a configuration to its abstract training step: no weights, data or devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jpeft.errors import PlanError, UserError
from jpeft.files import read_json
from jpeft.models import loading
from jpeft.models.families import FAMILIES
from jpeft.models.sources import is_gguf, read_config
from jpeft.parallel.mesh import AXES
from jpeft.planning import sizes
from jpeft.recipes import tasks
from jpeft.recipes.assets import MODELS, resolve_model
from jpeft.recipes.config import Config, Setup
from jpeft.recipes.optimizer import optimizer, training_step
from jpeft.recipes.prepare import build_method, check_mesh
from jpeft.recipes.tasks import base
from jpeft.storage import as_path
from jpeft.training.step import TrainState

_STEPS = 1000  # the number of steps of the run; only the learning rate depends on it
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Work:
    """A training step and its abstract inputs.

    Attributes:
        step: the step.
        state: its training state.
        params: the base weights.
        batch: a batch.
        names: the logical axis names of `params`.
    """

    step: Any
    state: Any
    params: Any
    batch: Any
    names: Any


def build(config: Config, mesh: AbstractMesh, setup: Setup) -> Work:
    """The training step that `jpeft finetune` would run under a configuration, on a mesh.

    Raises:
        UserError: the error that `jpeft finetune` would raise for the configuration.

    >>> build(Config(task="chat", model="llama-3-8b"), mesh, Setup()).params  # doctest: +SKIP
    """
    method, task = build_method(config), tasks.find(config.task)
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise PlanError(f"`mesh`: finetune has no axis {unknown[0]!r}; its axes are {', '.join(AXES)}")
    check_mesh(config, mesh)
    abstract = task.abstract(config, *_abstract_model(config), setup)
    peft = base.bind(method, abstract.model, abstract.params, abstract.inputs)
    base.check_length(config.max_length, abstract.positions, peft.virtual_tokens)
    tx, key = optimizer(config, _STEPS, peft), jax.random.key(0)
    step = training_step(peft, task.loss_fn(peft, train_mode=bool(config.dropout), mesh=mesh), tx, config)
    state = TrainState.create(peft, peft.init(key, abstract.params), tx, key)
    return Work(step, state, abstract.params, abstract.batch, abstract.names)


def _abstract_model(config: Config) -> tuple[Any, Any]:
    """The module of `config.model` and its abstract parameters."""
    try:
        return loading.abstract(
            architecture(config.model),
            param_dtype=jnp.dtype(config.dtype),
            quantize=None if config.quantize == "none" else config.quantize,
        )
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise PlanError(f"`model` {config.model}: {error}") from error


def architecture(name: str) -> Mapping[str, Any] | Path:
    """The configuration behind `--model`: a size that jpeft includes, a `config.json`, a model folder, or an asset.

    >>> architecture("llama-3-8b")["num_hidden_layers"]
    32
    """
    path = as_path(name)
    if name and path.exists():
        return path
    if path.is_absolute() or path.suffix == ".json":
        raise PlanError(f"`model` {name}: no such file or folder")
    if name in MODELS or "/" in name:
        return resolve_model(name)
    return sizes.config(name)


def missing_sizes(name: str) -> list[str]:
    """The sizes that a decoder's configuration leaves to defaults, perhaps because they are misspelled.

    >>> missing_sizes("llama-3-8b")
    []
    """
    config = architecture(name)
    if isinstance(config, Path):
        if is_gguf(config):
            return []
        config = read_json(config, UserError) if config.is_file() else read_config(config)
    if FAMILIES.get(str(config.get("model_type"))) != FAMILIES["llama"]:
        return []
    config = config.get("text_config", config)
    return [size for size in _SIZES if size not in config]
