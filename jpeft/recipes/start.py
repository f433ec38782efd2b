"""The adapter that a run begins from: a fresh one, or one that was trained before.

config, peft, start = begin(config, method, model, params, example_inputs(), complete, reporter.say)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from jpeft.core.peft import Peft
from jpeft.core.tree import flatten, like, unflatten
from jpeft.errors import UserError
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.methods import from_dict
from jpeft.methods.base import Method
from jpeft.methods.chain import Chain
from jpeft.recipes import run_folder
from jpeft.recipes.adapters import load_adapter
from jpeft.recipes.config import Config, parse_targets
from jpeft.recipes.method_names import FULL, method_class, name_of
from jpeft.recipes.tasks.base import bind
from jpeft.storage import as_path

_HALF = ("bfloat16", "float16")  # of published adapters: a step of training is too small for them
# What an adapter was trained with, and a run that begins from it has too, unless another is given.
_INHERITED = ("task", "model", "quantize", "dtype", "chat_template", "resize_embeddings", "untie_head", "head")


def inherited(adapter: str | Path) -> dict[str, Any]:
    """Fields of `Config` that a run takes over from the run whose adapter it begins from; none for other folders.

    >>> inherited("runs/none")
    {}
    """
    run = as_path(adapter)
    if not run_folder.is_run(run):
        return {}
    config = run_folder.usable(run)["config"]
    head_seed = config["seed"] if config.get("head_seed") is None else config["head_seed"]
    return {name: config[name] for name in _INHERITED if config.get(name) is not None} | {"head_seed": head_seed}


def begin(
    config: Config,
    method: Method | None,
    model: Any,
    params: Any,
    inputs: Sequence[Any],
    complete: Callable[[Method], Method] = lambda method: method,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Config, Peft, Any]:
    """The bound method of a run, and the adapter to begin from.

    Args:
        config: the configuration.
        method: the method; None is that of `config.adapter`.
        model: the model, its parameters, and abstract `inputs`, as for `method.bind`.
        complete: adds what the run trains beside a method, such as a head.
        say: receives what the user should know about the adapter.

    Returns:
        The configuration with the method's name and dropout; the bound method; and the adapter, None for a fresh one.

    Raises:
        UserError: the method's fields that the configuration gives are not those of the adapter, or it does not fit.
        AdapterError: the adapter cannot be read, or was trained on another base.

    >>> begin(Config(adapter="runs/first"), None, model, params, example_inputs())  # doctest: +SKIP
    """
    if method is not None:
        return config, bind(complete(method), model, params, inputs), None
    assert config.adapter is not None
    path = as_path(config.adapter)
    found, adapter = load_adapter(path, model, params, inputs, say)
    main = _main_member(config, found.method)
    _check_fields(config, main, lambda method: bind(method, model, params, inputs))
    published = (path / HF_CONFIG).is_file()
    peft = bind(_whole(found, published, complete, model, params, inputs), model, params, inputs)
    key, _ = jax.random.split(jax.random.key(config.seed))
    loaded = flatten(adapter)
    added = cast(Sequence[Method], peft.method.methods()[len(found.method.methods()) :])  # after the adapter's
    fresh = flatten(bind(Chain(*added), model, params, inputs).init(key, params)) if added else {}
    start = {path: loaded[path] if path in loaded else fresh[path] for path, _ in peft.structure}
    start = {path: start[path].astype(jnp.dtype(dtype)) for path, (_, dtype) in peft.structure}
    dropout = max((getattr(member, "dropout", None) or 0.0 for member in peft.method.methods()), default=0.0)
    config = dataclasses.replace(config, method=name_of(main), dropout=dropout or None)
    say(f"beginning from the {main.name} of {config.adapter}")
    return config, peft, like(unflatten(peft.place_like_base(start, flatten(params))), params)


def _main_member(config: Config, method: Any) -> Method:
    """The member of an adapter's method that a configuration's fields are about."""
    members = method.methods()
    if config.method is None:
        return members[0]
    kind = method_class(config.method)
    for member in members:
        if type(member) is kind and (config.method.lower() != FULL or name_of(member) == FULL):
            return member
    names = ", ".join(name_of(member) for member in members)
    raise UserError(f"`method` {config.method} contradicts `adapter` {config.adapter}, whose method is {names}")


def _check_fields(config: Config, main: Method, bound: Callable[[Method], Peft]) -> None:
    """Raises a UserError for a field that the configuration gives and the adapter's method has otherwise."""
    given = {name: getattr(config, name) for name in ("rank", "alpha", "dropout", "targets")}
    given = {name: value for name, value in given.items() if value is not None}
    known = {entry.name for entry in dataclasses.fields(main)}
    for name, value in (given | dict(config.settings)).items():
        option = f"`{name}`" if name in given else f"`settings` {name}"
        if name not in known:
            raise UserError(f"{option}: `adapter` {config.adapter} is a {main.name}, which has no field {name!r}")
        value = parse_targets(value) if name == "targets" and isinstance(value, str) else value
        try:
            other = from_dict({**main.to_dict(), name: value})
        except (ValueError, TypeError) as error:
            raise UserError(f"{option}: {error}") from error
        same = other == main
        if not same and name == "targets":  # other words, perhaps for the same sites
            same = {site.name for site in bound(other).sites} == {site.name for site in bound(main).sites}
        if not same:
            has = "other sites" if name == "targets" else getattr(main, name)
            raise UserError(
                f"{option} {value} contradicts `adapter` {config.adapter}, which has {has}: leave it out, or start "
                "without `adapter`"
            )


def _whole(
    found: Peft,
    widen: bool,
    complete: Callable[[Method], Method],
    model: Any,
    params: Any,
    inputs: Sequence[Any],
) -> Method:
    """The adapter's method, in float32 or wider if asked, with what the run trains beside it."""
    members: list[Any] = [_widened(member) if widen else member for member in found.method.methods()]
    trained = {site.name for site in found.sites if site.kind == "leaf"}
    for member in complete(cast(Method, found.method)).methods():
        if member in found.method.methods():
            continue
        if not {site.name for site in bind(member, model, params, inputs).sites} <= trained:
            members.append(member)
    return Chain(*members) if len(members) > 1 else members[0]


def _widened(method: Any) -> Any:
    def wide(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: "float32" if name == "dtype" and value in _HALF else value for name, value in fields.items()}

    own = wide({"dtype": getattr(method, "dtype", None)})
    overrides = {pattern: wide(fields) for pattern, fields in method.overrides.items()}
    own = {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(method, **own, overrides=overrides)
