"""From a configuration to a `Job`: the method, the model and the data that a run works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jpeft.checks import is_int, nearest
from jpeft.core.placement import AnyMesh
from jpeft.errors import UserError
from jpeft.methods import from_dict
from jpeft.methods.base import Method
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.train import Train
from jpeft.parallel.batches import data_ways
from jpeft.parallel.mesh import DATA_AXES, SEQUENCE_AXIS
from jpeft.recipes import tasks
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.config import Config, Setup, parse_targets
from jpeft.recipes.method_names import FULL, method_class, method_names
from jpeft.recipes.options import options
from jpeft.recipes.tasks.base import Job, NullReporter, Reporter
from jpeft.storage import as_path

_SETUP = Setup()
_IDS = ("init_ids", "token_ids")  # the fields of methods that hold the tokens a prompt starts from


def prepare(config: Config, reporter: Reporter | None = None, setup: Setup = _SETUP) -> Job:
    """Reads, checks and binds all that a configuration names. Writes only to the cache of assets.

    >>> prepare(Config()).peft.summary()  # doctest: +SKIP
    """
    if config.adapter is not None and not as_path(config.adapter).is_dir():
        raise UserError(f"`adapter` {config.adapter}: no such folder; expected a run, or one that jpeft or PEFT saved")
    ids = None if config.init_text is None else _init_ids(config, (reporter or NullReporter()).say)
    method, mesh = None if config.adapter is not None else build_method(config, ids), setup.mesh
    if mesh is not None:
        check_mesh(config, mesh)
    try:
        return tasks.find(config.task).prepare(config, method, reporter or NullReporter(), setup)
    except ValueError as error:
        if mesh is None or type(error) is not ValueError:
            raise
        raise UserError(f"`mesh`: {config.model}: {error}") from error  # an axis of a weight that does not divide


def _init_ids(config: Config, say: Callable[[str], None]) -> Sequence[int]:
    """The token ids of the text that a prompt starts from."""
    if config.adapter is not None:
        raise UserError(f"`init_text`: the run begins from `adapter` {config.adapter}, not from a text")
    ids = tasks.find(config.task).text_ids(resolve_model(config.model, say), config.init_text)
    if not ids:
        raise UserError(f"`init_text` {config.init_text!r} has no tokens; give some text")
    return ids


def build_method(config: Config, init_ids: Sequence[int] | None = None) -> Method:
    """The method of a configuration, with what its task trains beside it, such as a classification head.

    Args:
        config: the configuration.
        init_ids: the token ids of its `init_text`.

    >>> import jpeft
    >>> build_method(Config()) == jpeft.Chain(jpeft.LoRA(rank=8, alpha=16), jpeft.Train("classifier"))
    True
    """
    assert config.method is not None, "the method is that of an adapter"
    kind, name = method_class(config.method), config.method
    fields = _method_fields(config, kind) | _ids_field(config, kind, init_ids)
    if name == FULL:
        if "targets" in fields:
            raise UserError("`method` full trains everything; `method` train takes `targets`")
        if config.quantize != "none":
            raise UserError(
                f"`method` full: quantized weights have no gradient; it needs `quantize` none, got {config.quantize}"
            )
        return Train(".*", **fields)
    task = tasks.find(config.task)
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise UserError(f"`method` {config.method} needs {missing[0]}: give it in `settings`, as {missing[0]}=...")
    try:
        method = from_dict({"method": kind.__name__, **task.method_defaults(kind), **fields})
    except (ValueError, TypeError) as error:
        raise UserError(f"`method` {config.method}: {error}") from error
    return task.complete(method)


def _ids_field(config: Config, kind: type[Method], init_ids: Sequence[int] | None) -> dict[str, Any]:
    """The field of a method that holds the tokens a prompt starts from; none without them."""
    if init_ids is None:
        return {}
    if issubclass(kind, PrefixTuning):  # from the keys and values of the text, see `finetune`
        return {}
    if not (allowed := _ids_fields(kind)):
        kinds = [name for name, cls in method_names().items() if issubclass(cls, PrefixTuning) or _ids_fields(cls)]
        raise UserError(f"`init_text`: `method` {config.method} starts from no text; {', '.join(kinds)} do")
    field = allowed[0]
    if field in config.settings:
        raise UserError(f"`init_text` contradicts `settings` {field}; give one")
    return {field: list(init_ids)}


def _ids_fields(kind: type[Method]) -> list[str]:
    """The fields of a method that hold the tokens a prompt starts from."""
    return [entry.name for entry in dataclasses.fields(kind) if entry.name in _IDS]


def _method_fields(config: Config, kind: type[Method]) -> dict[str, Any]:
    """The method's fields that the configuration gives, with defaults for a rank and its alpha."""
    fields: dict[str, Any] = {name: getattr(config, name) for name in ("rank", "alpha", "dropout", "targets")}
    fields = {name: value for name, value in fields.items() if value is not None} | dict(config.settings)
    if isinstance(fields.get("targets"), str):
        fields["targets"] = parse_targets(fields["targets"])
    allowed = {entry.name for entry in dataclasses.fields(kind)}
    for name in fields:
        if name not in allowed:
            misplaced = name in config.settings and name in options(Config)
            own = f"; `{name}` is an option of its own" if misplaced else nearest(name, allowed)
            raise UserError(
                f"`method` {config.method} has no field {name!r}{own}; its fields are {', '.join(sorted(allowed))} "
                "(`settings`)"
            )
    own = {entry.name: entry.default for entry in dataclasses.fields(kind)}
    if {"rank", "alpha"} <= allowed and "alpha" not in fields and is_int(rank := fields.get("rank", own["rank"])):
        # Twice the rank; or the ratio of the method's own default, if that has one.
        alpha = 2 * rank if own["alpha"] is None else own["alpha"] * rank / own["rank"]
        fields |= {"rank": rank, "alpha": int(alpha) if alpha == int(alpha) else alpha}
    return fields


def check_mesh(config: Config, mesh: AnyMesh) -> None:
    """Raises a UserError if the batch size or the row length does not divide over a mesh.

    >>> check_mesh(Config(batch_size=8), jax.sharding.AbstractMesh((4,), ("fsdp",)))  # doctest: +SKIP
    """
    shards = data_ways(mesh)
    if config.batch_size % (multiple := shards * config.accumulate):
        parts = f" in each of {config.accumulate} micro-batches" * (config.accumulate > 1)
        axes = " and ".join(name for name in DATA_AXES if name in mesh.axis_names)
        raise UserError(
            f"`batch_size` {config.batch_size} does not divide over the {shards} parts that the mesh's {axes} make"
            f"{parts}; a multiple of {multiple} does"
        )
    if config.max_length % (parts := mesh.shape.get(SEQUENCE_AXIS, 1)):
        raise UserError(
            f"`max_length` {config.max_length} does not divide over the {parts} devices of the mesh's axis "
            f"{SEQUENCE_AXIS}"
        )
