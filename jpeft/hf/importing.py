"""`jpeft.hf.load`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.binding import bind_survey
from jpeft.core import stacking
from jpeft.core.actions import Action, layer_mask
from jpeft.core.geometry.base import Parts
from jpeft.core.interchange import ATTENTION, BIAS, MODULES_TO_SAVE, HFSpec, Role, form, is_stack, role
from jpeft.core.loaded import check_loaded
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import matches_entry
from jpeft.core.tree import Path, flatten, join, like, nearest, peek, unflatten
from jpeft.errors import AdapterError
from jpeft.frontends import arguments
from jpeft.hf import layout, prompts
from jpeft.hf.config import CONFIG, named, read_config
from jpeft.hf.experts import check_layout
from jpeft.hf.matching import Folder, Matched, match, stacked
from jpeft.hf.names import ROOT, Names, Prefix, find, of_model
from jpeft.hf.tensors import TensorFile
from jpeft.hf.tied import merge_heads, tied_names
from jpeft.methods import METHODS
from jpeft.methods.base import LAYERS, Method
from jpeft.methods.chain import Chain
from jpeft.storage import as_path


def load(
    path: str | PathLike[str],
    model: Any,
    /,
    *inputs: Any,
    prefix: Prefix | None = None,
    ignore: Sequence[str] = (),
    experts: str | None = None,
    **kwargs: Any,
) -> tuple[Peft, Any]:
    """Reads an adapter that HuggingFace PEFT saved, and binds it to a model. Inverse of `jpeft.hf.save`.

    The methods of `jpeft.methods.METHODS` that declare a form in such folders can be read. Where a decoder of
    `jpeft.models` stacks its layers, so is the adapter, which must then be alike in the layers that have one; in the
    others it is zero, changes nothing and never trains. For others, load the model with ``scan_layers=False``.

    Args:
      path: the folder.
      model, *inputs, **kwargs: as for ``method.bind``; a Linen module's parameters are the first of the inputs.
      prefix: as in `save`; found from the names in the file if it is not given.
      ignore: torch modules to leave out because the model lacks them, whole names or suffixes at a ".", e.g.
        ``["pooler.dense"]``.

    Returns:
      ``(peft, adapter)``; trained biases and ``modules_to_save`` are `BitFit` and `Train` in a `Chain` with the method.

    Raises:
      AdapterError: no adapter there, a pickle, a truncated file; a field that is unknown or not supported; a tensor
        that is missing, extra or misshapen; a module that the model lacks, or that only one of file and
        ``target_modules`` names; NaN or infinities; layers that differ where the model stacks them; a tied embedding or
        head that changes without the other.
      ValueError: a weight of the model that no torch module can be like, such as one stacked by a scan.

    Warns:
      UserWarning: the adapter is known to change nothing, as one that was never trained.

    >>> # peft, adapter = jpeft.hf.load("adapter", model, params, input_ids, attention_mask); see jpeft.hf.save
    """
    config = read_config(as_path(path) / CONFIG, METHODS.values())
    file = TensorFile.read(as_path(path), config, ignore)
    merge_heads(model, config, file)
    frontend, params, inputs = arguments(model, inputs, "jpeft.hf.load(path, model, params, *inputs)")
    tree = frontend.tree(params)
    base = flatten(tree)
    survey, at = frontend.survey(model, params, inputs, kwargs), stacking.stacked_at(model)
    each = stacking.unroll_survey(survey, at)  # unstacked layers, as the file has them
    owners = {s.path[:-1] for s in each.leaves} | _parameter_owners(each)
    owners |= {s.path for s in each.attentions} if config.spec.acts_on == ATTENTION else set()
    names = find(as_path(path), file.modules, owners, of_model(model)) if prefix is None else Names.of(prefix)
    folder = Folder(config, file, names, at, tuple(ignore), check_layout(experts))
    matched = match(folder, _without_absent_parts(model, folder, each))
    tied = tied_names(model, names)
    method = _method(folder, stacked(folder, matched, survey), survey, tied)
    try:
        peft = bind_survey(method, model, params, survey, frontend)
    except ValueError as error:  # a size in the configuration does not suit a weight
        raise AdapterError(f"{as_path(path)}: {error}") from error
    leaves = _leaves(peft, folder, matched.adapted)
    _check_rest(folder, survey, {s.path for s in (*matched.copied, *matched.biases, *matched.saved)}, base)
    with np.errstate(over="ignore"):  # what float64 holds and a narrower dtype does not is infinite then
        leaves = {path: leaves[path].astype(dtype) for path, (_, dtype) in peft.structure}
    check_loaded(file.path, peft, leaves, base)
    adapter = {path: jnp.asarray(x) for path, x in leaves.items()}
    return peft, like(unflatten(peft.place_like_base(adapter, base)), tree)


def _parameter_owners(survey: Survey) -> set[Path]:
    """The modules for which a file may have tensors of experts: those around a stack, and those of single experts."""
    stacks = [(tuple(s.name.split("/")), layout.as_stack(s)) for s in survey.weights]
    found = [(path, s.batch[0]) for path, s in stacks if is_stack(s)]
    return {path[:-1] for path, _ in found} | {
        (*path[:-1], str(i), path[-1]) for path, count in found for i in range(count)
    }


def _without_absent_parts(model: Any, folder: Folder, survey: Survey) -> Survey:
    """A survey without the parts of a model, such as a pooler, that torch's model need not have and the file has not.

    A model says by an attribute ``optional_parts`` which they are.
    """
    owners = {site.path[:-1] for site in survey.leaves}
    there = {path[0] for module in folder.file.modules if (path := folder.names.tree(module, owners))}
    absent = set(getattr(model, "optional_parts", ())) - there
    weights, leaves = ([s for s in sites if s.path[0] not in absent] for sites in (survey.weights, survey.leaves))
    return dataclasses.replace(survey, weights=tuple(weights), leaves=tuple(leaves))


# --- the method -------------------------------------------------------------------------------------------------------


def _method(folder: Folder, matched: Matched, survey: Survey, tied: Collection[str]) -> Method:
    """The method that acts on the matched sites and no others. ``tied``: heads that are their embedding."""
    if folder.config.spec.prompt:
        members = [prompts.method_of(folder.config, folder.file)]
    elif matched.copied:
        members = [_training(folder.config.method, matched.copied, survey)]
    else:
        members = [_adapting(folder, matched.adapted, survey)]
    members += [_beside(folder, method, value, survey, tied) for method, value in folder.config.beside.items()]
    if biases := matched.biases:
        every = len(biases) == sum(s.path[-1] == "bias" for s in survey.leaves)
        targets = None if every else _exactly([s.name for s in biases], biases, survey.leaves)
        members.append(_with_role(BIAS)(targets=targets))
    if matched.saved:
        members.append(_training(_with_role(MODULES_TO_SAVE), matched.saved, survey))
    return Chain(*members) if len(members) > 1 else members[0]


def _training(method: Any, leaves: Sequence[Site], survey: Survey) -> Method:
    """A method that trains the leaves of whole modules."""
    owners = sorted({join(s.path[:-1]) for s in leaves})
    return method(targets=_exactly(owners, leaves, survey.leaves))


def _adapting(folder: Folder, sites: Mapping[str, Site], survey: Survey) -> Method:
    """The method with the settings of the configuration: those of most modules, and overrides at the others."""
    config = folder.config
    settings, overrides = config.settings(), {}
    if config.spec.own_targets:
        return _by_fields(folder, config.method(**settings, dtype=folder.file.dtype), survey)
    for field in config.spec.fields:
        if field.chooses:
            own = [site for module, site in sites.items() if config.value(field, folder.named(module))]
            settings[field.name] = _exactly([s.name for s in own], own, sites.values()) if own else None
    for module, site in sites.items():
        own = {k: v for k, v in config.settings(folder.named(module), site).items() if v != settings[k]}
        if is_stack(site) and isinstance(site.geometry, Parts):
            own["parts"] = site.geometry.parts  # a matrix for each expert, though all share their input
        if site.layers is not None:
            own[LAYERS] = site.layers
        if own:
            clash = any(s is not site and matches_entry(site.name, s.name) for s in sites.values())
            overrides["^" + re.escape(site.name) if clash else site.name] = own
    targets = _exactly([s.name for s in sites.values()], sites.values(), survey.weights)
    try:
        return config.method(**settings, dtype=folder.file.dtype, targets=targets, overrides=overrides)
    except ValueError as error:
        raise AdapterError(f"{folder.file.path.parent / CONFIG}: {error}") from error


def _by_fields(folder: Folder, method: Method, survey: Survey) -> Method:
    """The method, whose own fields say which modules it acts on.

    Raises:
      AdapterError: the file has other modules.
    """
    each = [own for site in method.sites(survey) for own in stacking.unroll_site(site, folder.at)]
    chosen, found = {folder.module(site) for site in each if site.layers != ()}, set(folder.file.adapted)
    if chosen != found:
        raise AdapterError(
            f"{folder.file.path} has a {method.name} for {', '.join(map(repr, sorted(found)))}, and {CONFIG} asks for "
            f"{', '.join(map(repr, sorted(chosen)))}"
        )
    return method


def _beside(folder: Folder, method: Any, value: Any, survey: Survey, tied: Collection[str]) -> Method:
    """A method that stands beside the folder's own, with the settings of the configuration.

    Raises:
      AdapterError: a module that the model lacks, or that only one of file and configuration names.
    """
    file, spec = folder.file, form(method)
    assert isinstance(spec, HFSpec)
    weights = {folder.module(s): s for s in survey.weights}
    settings: dict[str, Any] = {}
    for module in sorted(file.beside):
        if module not in weights:
            hint = nearest(module, weights)
            raise AdapterError(f"{file.path} has a {method.__name__} for {module!r}, not a weight of this model{hint}")
        own = value if isinstance(value, list) else next((v for k, v in value.items() if named([k], module)), None)
        if own is None:
            raise AdapterError(f"{file.path} has a {method.__name__} for {module!r}, which {spec.beside} does not name")
        layout.check_site(weights[module], spec)
        settings[module] = spec.fields[0].read(own, weights[module])
    missing = (
        [k for k in value if not any(named([k], m) for m in (*settings, *tied))] if isinstance(value, dict) else []
    )
    if missing or not settings:
        where = f" for {missing[0]!r}" if missing else ""
        raise AdapterError(f"{file.path} has no {method.__name__}{where}, which {spec.beside} asks for")
    sites = [weights[module] for module in settings]
    name, common = spec.fields[0].name, next(iter(settings.values()))
    overrides = {weights[m].name: {name: own} for m, own in settings.items() if own != common}
    targets = _exactly([s.name for s in sites], sites, survey.weights)
    return method(**{name: common}, dtype=file.dtype_beside, targets=targets, overrides=overrides)


def _with_role(wanted: Role) -> Any:
    return next(method for method in METHODS.values() if role(method) is wanted)


def _exactly(entries: Sequence[str], wanted: Iterable[Site], candidates: Iterable[Site]) -> str | tuple[str, ...]:
    """Targets that choose the wanted sites alone: the entries, unless another site's path ends like one of them."""
    wanted = list(wanted)
    taken = [s for s in candidates if any(matches_entry(e, n) for e in entries for n in s.names)]
    return tuple(entries) if len(taken) == len(wanted) else "|".join(re.escape(s.name) for s in wanted)


# --- the leaves -------------------------------------------------------------------------------------------------------


def _leaves(peft: Peft, folder: Folder, adapted: Collection[str]) -> dict[Path, np.ndarray]:
    """The adapter's leaves from the file's tensors."""
    spec, structure = folder.config.spec, dict(peft.structure)
    out = prompts.read_leaves(peft, folder.file, folder.config) if spec.prompt else {}
    for action in peft.actions:
        if prompts.is_prompt(action):
            continue
        each = stacking.unroll_site(action.site, folder.at)
        is_stacked = each[0].path != action.site.path
        if action.site.kind == "leaf":
            read = [{"": _trained_leaf(folder, action, site, adapted)} for site in each]
        else:
            expected = {name: structure[action.leaf_path(name)] for name in action.stored}
            shapes = {n: (s[1:] if is_stacked else s, dtype) for n, (s, dtype) in expected.items()}
            mask = shapes.pop(action.mask, None)
            read = [
                _site_leaves(folder, type(action.method), site, shapes)
                if site.layers != ()
                else {name: np.zeros(*shape) for name, shape in shapes.items()}
                for site in each
            ]
            if mask is not None:
                out[action.leaf_path(action.mask)] = layer_mask(action.site)
        for name, first in read[0].items():
            out[action.leaf_path(name)] = np.stack([own[name] for own in read]) if is_stacked else first
    return out if spec.prompt else out | _shared_leaves(peft, folder)


def _trained_leaf(folder: Folder, action: Action, site: Site, adapted: Collection[str]) -> np.ndarray:
    if action.member == 0 and folder.config.spec.copies:
        suffix, setting = folder.config.spec.copies + layout.leaf_name(site.path[-1]), "target_modules"
    else:
        suffix = layout.leaf_suffix(folder.names, site, adapted)
        setting = f"bias={folder.config.bias}" if role(type(action.method)) is BIAS else "modules_to_save"
    tensor = folder.file.take(folder.module(site), suffix, layout.leaf_shape(site), f"which {setting} asks for")
    return layout.leaf_to_tree(site, tensor)


def _site_leaves(
    folder: Folder, method: type, site: Site, shapes: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, np.ndarray]:
    """A method's leaves of one torch module, by name. ``shapes`` has the shape and dtype that each must have."""
    file, module, out, spec = folder.file, folder.module(site), {}, form(method)
    assert isinstance(spec, HFSpec)
    wrapper = spec.wrapper if method in folder.config.beside else ""
    tensors = layout.tensors_at(site, spec, shapes, module in folder.experts.swapped)
    for tensor in tensors:
        shape, dtype = shapes[tensor.leaf]
        expected = tensor.to_torch(_abstract(shape), site).shape
        why = f"which {method.__name__} needs there"
        floating = jnp.issubdtype(dtype, jnp.floating)
        x = file.take(module, wrapper + tensor.key, expected, why, floating=floating)
        out[tensor.leaf] = tensor.to_tree(x, site)
    keys = [wrapper + tensor.key for tensor in tensors]
    if extra := sorted((file.beside if wrapper else file.adapted)[module].keys() - set(keys)):
        raise AdapterError(f"{file.path} has {f'{ROOT}{module}.{extra[0]}'!r} beside {', '.join(keys)}")
    return out


def _abstract(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros of any shape without their memory: a rank may be mistaken by orders of magnitude."""
    return np.broadcast_to(np.float32(0), shape)


def _shared_leaves(peft: Peft, folder: Folder) -> dict[Path, np.ndarray]:
    """The leaves that all sites share: from the file or, where the configuration says so, from the method's seed."""
    spec, structure, out = folder.config.spec, dict(peft.structure), {}
    tensors = {tensor.leaf: tensor for tensor in spec.shared}
    absent = [t.leaf for t in spec.shared if t.field and not folder.config.own.get(t.field, True)]
    drawn = peft.init_shared(jax.random.key(0)) if absent else {}
    for path in peft.shared_paths:
        tensor, (shape, _) = tensors[path[-1]], structure[path]
        if tensor.leaf in absent:
            out[path] = np.asarray(drawn[path])
            continue
        expected = tensor.to_torch(_abstract(shape)).shape
        x = folder.file.take_shared(tensor.key, expected, f"which {folder.config.method.__name__} needs")
        out[path] = tensor.to_tree(x)
    return out


# --- other tensors ----------------------------------------------------------------------------------------------------


def _check_rest(folder: Folder, survey: Survey, used: Collection[Path], base: Mapping[Path, Any]) -> None:
    """Checks that all other tensors are base weights as they are: PEFT adds those of embeddings.

    Raises:
      AdapterError: a tensor that nothing accounts for, or that differs from the base's.
    """
    file = folder.file
    rest = {(module, suffix) for module, own in file.others.items() for suffix in own}
    for stored in survey.leaves:
        for i, site in enumerate(stacking.unroll_site(stored, folder.at)):
            module, leaf = folder.module(site), layout.leaf_name(site.path[-1])
            for suffix in {leaf, f"base_layer.{leaf}"} & file.others.get(module, {}).keys():
                rest.discard((module, suffix))
                weight = _base_weight(base[stored.path], None if stored.path == site.path else i)
                if site.path not in used and not _is_equal(site, file.others[module][suffix], weight):
                    raise AdapterError(
                        f"{file.path} has {f'{ROOT}{module}.{suffix}'!r}, a base weight that differs from "
                        f"{site.name!r}: resized or trained; load the base with it, or train it with modules_to_save"
                    )
    for module, suffix in sorted(rest):
        raise AdapterError(f"{file.path} has {f'{ROOT}{module}.{suffix}'!r}, which {CONFIG} does not account for")


def _base_weight(boxed: Any, layer: int | None) -> Any:
    """A base weight, or its shape if its numbers are not there. ``layer``: the layer, if it is a stack of them."""
    weight = peek(boxed)
    if isinstance(weight, jax.ShapeDtypeStruct | Quantized):  # a quantized one has lost what could be compared
        return jax.ShapeDtypeStruct(weight.shape if layer is None else weight.shape[1:], weight.dtype)
    return weight if layer is None else weight[layer]


def _is_equal(site: Site, tensor: np.ndarray, weight: Any) -> bool:
    """Whether a tensor of the file is the base weight, as far as an abstract one can tell."""
    if tensor.shape != layout.leaf_shape(site):
        return False
    if isinstance(weight, jax.ShapeDtypeStruct):
        return True
    return np.array_equal(layout.leaf_to_tree(site, tensor), np.asarray(jax.device_get(weight)).astype(tensor.dtype))
