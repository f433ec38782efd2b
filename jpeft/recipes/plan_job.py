"""The step that `jpeft finetune` would run under a configuration, without weights, data or devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jpeft import models
from jpeft.errors import ModelError, UserError
from jpeft.files import read_json
from jpeft.models.loading import FAMILIES
from jpeft.models.sources import is_gguf, read_config
from jpeft.parallel.mesh import AXES
from jpeft.planning import sizes
from jpeft.planning.compiling import PlanError
from jpeft.recipes import finetune, prepare
from jpeft.recipes.assets import MODELS, resolve_model
from jpeft.recipes.config import CHAT, Config, Setup
from jpeft.recipes.tasks import chat, classification
from jpeft.text import conversations, labeled
from jpeft.training.step import TrainState

_STEPS = 1000  # of a run, which its schedule of learning rates depends on, and nothing else here
_LABELS = 2


@dataclass(frozen=True)
class Work:
    """A step and its inputs, abstract; `names` are those of the axes of `params`."""

    step: Any
    state: Any
    params: Any
    batch: Any
    names: Any


def architecture(name: str) -> Mapping[str, Any] | Path:
    """What `--model` says: a size that ships with jpeft, a `config.json` or a folder that has one, or an asset.

    >>> architecture("llama-3-8b")["num_hidden_layers"]
    32
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if path.is_absolute() or path.suffix == ".json":
        raise PlanError(f"--model {name}: no such file or folder")
    if name in MODELS or "/" in name:
        return resolve_model(name)
    return sizes.config(name)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def unsaid(name: str) -> list[str]:
    """The sizes that a decoder's configuration leaves to the defaults of its kind: a misspelled one is such.

    >>> unsaid("llama-3-8b")
    []
    """
    found = architecture(name)
    if isinstance(found, Path):
        if is_gguf(found):
            return []
        found = read_json(found, ModelError) if found.is_file() else read_config(found)
    if FAMILIES.get(str(found.get("model_type"))) != FAMILIES["llama"]:
        return []
    found = found.get("text_config", found)
    return [size for size in _SIZES if size not in found]


def build(config: Config, mesh: AbstractMesh, setup: Setup) -> Work:
    """The step of a configuration on a mesh.

    Raises:
        UserError: what `finetune` would say of the configuration.

    >>> build(Config(task="chat", model="llama-3-8b"), mesh, Setup()).params  # doctest: +SKIP
    """
    method = prepare.build_method(config)
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise PlanError(f"--mesh: {unknown[0]!r} is no axis that finetune spreads over, only {', '.join(AXES)}")
    prepare.check_mesh(config, mesh)
    about = architecture(config.model)
    quantize = None if config.quantize == "none" else config.quantize
    options = {"param_dtype": jnp.dtype(config.dtype), "quantize": quantize}
    try:
        model, params = models.abstract(about, **options)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise PlanError(f"--model {config.model}: {error}") from error
    if config.task == CHAT:
        if not isinstance(model, models.Decoder):
            raise PlanError(f"--model {config.model}: an encoder; it is planned for with --task classify")
        model = model.clone(remat=setup.remat)
        limit = model.config.max_position_embeddings
        if config.max_length > limit:
            raise PlanError(f"--seq {config.max_length}: the model takes at most {limit} tokens")
        inputs, names = chat.example_inputs(), models.logical_names(model)
        batch: Any = _conversations(config)
    else:
        if isinstance(model, models.Decoder):
            raise PlanError(f"--model {config.model}: a language model; it is planned for with --task chat")
        if setup.remat is not None:
            raise PlanError(f"--remat {setup.remat}: is for language models, not for encoders")
        names = {"encoder": models.logical_names(model)}
        model, inputs = classification.Classifier(model, _LABELS), classification.example_inputs()
        head = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"][classification.HEAD]
        params, batch = {"encoder": params, classification.HEAD: nn.meta.unbox(head)}, _texts(config)
    try:
        peft = method.bind(model, params, *inputs)
    except ValueError as error:  # a target that names nothing, a field that does not fit
        raise UserError(str(error)) from error
    if config.task == CHAT:
        loss: Any = chat.loss_fn(peft, train_mode=bool(config.dropout), mesh=mesh)
    else:
        loss = classification.loss_fn(peft, train_mode=bool(config.dropout))
    step, tx = finetune.training_step(peft, loss, config, _STEPS)
    key = jax.random.key(0)
    state = TrainState.create(peft, peft.init(key, params), tx, key)
    return Work(step, state, params, batch, names)


def _conversations(config: Config) -> conversations.Batch:
    shape = (config.batch_size, config.max_length)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    return conversations.Batch(ids, ids, ids, ids, weight=cast(Any, jax.ShapeDtypeStruct(shape, jnp.float32)))


def _texts(config: Config) -> labeled.Batch:
    rows, shape = (config.batch_size,), (config.batch_size, config.max_length)
    ids, own = cast(Any, jax.ShapeDtypeStruct(shape, jnp.int32)), cast(Any, jax.ShapeDtypeStruct(rows, jnp.int32))
    return labeled.Batch(ids, ids, own, weight=cast(Any, jax.ShapeDtypeStruct(rows, jnp.float32)), rows=own)
