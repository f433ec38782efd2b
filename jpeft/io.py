"""Adapter folders: ``adapter.safetensors`` and ``config.json``, without the base weights.

A save is atomic. The new tensors are written next to the old ones, then ``config.json``, which holds their SHA-256, is
replaced in one step, then the tensors get their name. Killed before that step, the folder holds the old adapter; killed
after it, `load` finds the new tensors under their temporary name. It is the same on an object store, where each of the
steps is the upload of an object or a copy within the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft.binding import bind_survey
from jpeft.checks import shown
from jpeft.core.fingerprint import difference, fingerprint
from jpeft.core.loaded import check_loaded
from jpeft.core.peft import Peft
from jpeft.core.targets import TargetError
from jpeft.core.tree import Path, Tree, flatten, join, like, nearest, peek, unflatten
from jpeft.errors import AdapterError
from jpeft.files import file_sha256, read_json, read_safetensors, serialize, sync_folder, write_atomically
from jpeft.frontends import arguments
from jpeft.grown import depends_on, new_leaves, with_sites
from jpeft.methods import Chain, from_dict
from jpeft.parallel.hosts import is_main_process, on_all_hosts, on_host
from jpeft.storage import as_path, move

FORMAT = 1
TENSORS = "adapter.safetensors"
CONFIG = "config.json"
_PENDING = TENSORS + ".new"
_FIELDS = {"format", "jpeft", "method", "sites", "base", "sha256"}


def save(path: str | os.PathLike[str], peft: Peft, adapter: Tree, params: Tree) -> None:
    """Writes an adapter to a folder. Inverse of `load`, bit exact.

    Args:
      path: the folder, on a disk or an object store (``gs://``), made if it does not exist. An adapter in it is
        replaced atomically. With several processes, all must call this; the main process writes.
      peft: the bound method.
      adapter: the adapter.
      params: the base weights. Only their fingerprint is saved.

    Raises:
      ValueError: the adapter or the base weights do not belong to this Peft.
      FileExistsError: the folder holds a config.json of something else, such as a model.
      OSError: the folder cannot be written. In each case, files in it stay as they are.
    """
    peft.check_order(params, adapter, "jpeft.save(path, peft, adapter, params)")
    leaves = peft.check(adapter)
    tree = peft.frontend.tree(params)
    _check_base(peft, flatten(tree))
    tensors = {join(p): np.asarray(on_host(meta.unbox(x))) for p, x in leaves.items()}
    for place, leaf in peft.regenerated(flatten(tree)).items():
        if np.array_equal(tensors[join(place)], leaf):  # others, as from another library's generator, are kept
            del tensors[join(place)]
    config = {
        "format": FORMAT,
        "jpeft": _version(),
        "method": _serializable(peft).to_dict(),
        "sites": [site.name for site in peft.sites],
        "base": fingerprint(tree),
    }
    on_all_hosts(lambda: _write(as_path(path), config, tensors) if is_main_process() else None)


def _write(folder: FilePath, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _finish_killed_save(folder)
    blob = serialize(tensors)
    config["sha256"] = hashlib.sha256(blob).hexdigest()
    try:
        write_atomically(folder / _PENDING, blob)
        write_atomically(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    except BaseException:
        _finish_killed_save(folder)  # if config.json was replaced already, the new adapter is complete
        (folder / _PENDING).unlink(missing_ok=True)
        raise
    move(folder / _PENDING, folder / TENSORS)
    sync_folder(folder)


def _check_base(peft: Peft, base: Mapping[Path, Any]) -> None:
    """Raises a ValueError if the parameters are not those of the model that the Peft was bound to."""
    for site in peft.sites:
        if site.stored and (found := np.shape(peek(base.get(site.weight_path, ())))) != site.stored:
            raise ValueError(
                f"params are not those that this Peft was bound to: {join(site.weight_path)!r} "
                f"{f'has shape {found}' if site.weight_path in base else 'is missing'}, expected {site.stored}"
            )
    size = sum(math.prod(np.shape(peek(x))) for x in base.values())
    if size != peft.base_size:
        raise ValueError(f"params have {size:,} numbers, expected {peft.base_size:,} as in the model of this Peft")


def _finish_killed_save(folder: FilePath) -> None:
    """Renames the tensors that a killed save left under their temporary name, if config.json is theirs.

    Raises:
      FileExistsError: the folder holds a config.json that is not an adapter's.
    """
    if not (folder / CONFIG).exists():
        return
    try:
        sha256 = read_config(folder)["sha256"]
    except AdapterError as e:
        raise FileExistsError(f"{folder} holds a {CONFIG} that is not an adapter's; choose another folder ({e})") from e
    if (found := _tensor_file(folder, sha256)).name == _PENDING:
        move(found, folder / TENSORS)


def load(path: str | os.PathLike[str], model: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Peft, Any]:
    """Reads an adapter from a folder and binds its method to a model. Inverse of `save`.

    Args:
      path: the folder.
      model: the model, as for ``method.bind``, or the function of ``method.bind_function``.
      *inputs: as there: the base weights, except of an NNX module, and what the model is called with.
      **kwargs: as for ``method.bind``.

    A base may have more leaves than the one that it was trained on, such as a pooler that an earlier version did not
    read, if the model's output does not depend on them. Where "all-linear" takes other weights in this version than in
    the one that saved the adapter, the method names those of the adapter.

    Returns:
      ``(peft, adapter)``. The adapter has the container, shardings and boxes that ``peft.init`` would give it.

    Raises:
      AdapterError: there is no adapter; a file is truncated or changed; a field is unknown; the base weights are not
        those it was trained on (names the first leaf that differs); a leaf is missing, unknown or has another shape, or
        holds NaN or infinities.

    Warns:
      UserWarning: the adapter is known to change nothing, as one that was never trained.
    """
    folder = as_path(path)
    config = read_config(folder)
    try:
        method = from_dict(config["method"])
    except (ValueError, TypeError) as e:
        raise AdapterError(f"{folder / CONFIG}: {e}") from e
    call = "jpeft.load(path, model, params, *inputs)"
    frontend, params, inputs = arguments(model, inputs, call, functions=True)
    tree = frontend.tree(params)
    new = new_leaves(config["base"], tree)
    if (found := difference(config["base"], tree)) and not new:
        raise AdapterError(f"{folder} was trained on another base: {found}")
    survey = frontend.survey(model, params, inputs, kwargs)
    peft = bind_survey(method, model, params, survey, frontend)
    names = [site.name for site in peft.sites]
    if names != config["sites"]:
        with contextlib.suppress(TargetError):
            method = with_sites(method, peft, config["sites"])
            peft = bind_survey(method, model, params, survey, frontend)
            names = [site.name for site in peft.sites]
    if new and depends_on(peft, params, new, inputs, kwargs):
        raise AdapterError(f"{folder} was trained on another base: {found}")
    if names != config["sites"]:
        first = next(iter(set(names) ^ set(config["sites"])), "their order")
        raise AdapterError(f"{folder}: its sites are not those of {method.name} in this model; differs: {first}")
    return peft, _leaves(folder, config, peft, tree)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked ``config.json`` of an adapter folder. Needs no model.

    Raises:
      AdapterError: the folder or the file does not exist, or this version cannot read a field of it.
    """
    folder = as_path(path)
    file = folder / CONFIG
    if not file.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise AdapterError(f"{folder} {what}: expected an adapter written by jpeft.save")
    config = read_json(file, AdapterError)
    if "format" not in config:
        raise AdapterError(f"{file} has no 'format': it was not written by jpeft.save")
    if type(config["format"]) is not int or config["format"] != FORMAT:
        raise AdapterError(f"{file} has format {config['format']!r}; this jpeft reads {FORMAT}: upgrade jpeft")
    if wrong := sorted(config.keys() ^ _FIELDS):
        what = "unknown" if wrong[0] in config else "missing"
        raise AdapterError(f"{file}: {what} field {wrong[0]!r}; the fields are {', '.join(sorted(_FIELDS))}")
    kinds = {"method": dict, "sites": list, "base": dict, "sha256": str}
    for field, kind in kinds.items():
        if not isinstance(config[field], kind):
            raise AdapterError(f"{file}: {field!r} must be a JSON {kind.__name__}, got {type(config[field]).__name__}")
    for field, texts in (("sites", config["sites"]), ("base", config["base"].values())):
        for text in texts:
            if not isinstance(text, str) or (field == "base" and ":" not in text):
                expected = "names" if field == "sites" else "fingerprints, such as 'float32[2]:0a1b…'"
                raise AdapterError(f"{file}: {field!r} must hold {expected}, got {shown(text)}")
    return config


def _leaves(folder: FilePath, config: Mapping[str, Any], peft: Peft, params: Tree) -> Any:
    file = _tensor_file(folder, config["sha256"])
    tensors = read_safetensors(file)
    expected = {join(p): (p, shape, dtype) for p, (shape, dtype) in peft.structure}
    base = flatten(params)
    if missing := expected.keys() - tensors.keys():
        own = peft.regenerated(base)
        tensors |= {name: np.asarray(own[path]) for name in missing if (path := expected[name][0]) in own}
    for name in sorted(expected.keys() - tensors.keys()):
        raise AdapterError(f"{file} lacks {name!r}, which {peft.method.name} needs")
    for name in sorted(tensors.keys() - expected.keys()):
        raise AdapterError(f"{file} has {name!r}, unknown to {peft.method.name}{nearest(name, expected)}")
    for name, (_, shape, dtype) in expected.items():
        got = tensors[name]
        if (got.shape, got.dtype.name) != (shape, dtype):
            raise AdapterError(f"{file}: {name!r} is {got.dtype.name}{list(got.shape)}, expected {dtype}{list(shape)}")
    if file_sha256(file) != config["sha256"]:
        raise AdapterError(f"{file} is not the file that {CONFIG} was saved with: its SHA-256 differs; save it again")
    read = {path: tensors[name] for name, (path, _, _) in expected.items()}
    check_loaded(file, peft, read, base)
    leaves = {path: jnp.asarray(x) for path, x in read.items()}
    return like(unflatten(peft.place_like_base(leaves, base)), params)


def _tensor_file(folder: FilePath, sha256: str) -> FilePath:
    """The file of the tensors with this SHA-256: under its name, or a temporary one after a killed save."""
    pending = folder / _PENDING
    if pending.is_file() and file_sha256(pending) == sha256:
        return pending
    return folder / TENSORS


def _serializable(peft: Peft) -> Any:
    """The method, with targets that are functions replaced by the sites that they chose."""

    def by_name(index: int, member: Any) -> Any:
        if not (callable(member.targets) or callable(member.exclude)):
            return member
        names = [a.site.name for a in peft.actions if a.member == index]
        return dataclasses.replace(member, targets="|".join(map(re.escape, names)), exclude=None)

    members = [by_name(i, m) for i, m in enumerate(peft.method.methods())]
    return Chain(*members) if isinstance(peft.method, Chain) else members[0]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jpeft")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
