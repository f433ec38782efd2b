"""`jpeft.hf.save`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from flax.core import meta

from jpeft.core import stacking
from jpeft.core.actions import Action
from jpeft.core.interchange import BIAS, MODULES_TO_SAVE, PARAMETER, Field, HFSpec, form, is_stack, role
from jpeft.core.peft import Peft
from jpeft.core.sites import Site
from jpeft.core.tree import Path, Tree, flatten, join, peek, unflatten
from jpeft.files import new_folder, write_atomically, write_safetensors
from jpeft.hf import layout, prompts
from jpeft.hf.config import CONFIG, TASK_HEADS, TENSORS, patterns
from jpeft.hf.experts import check_layout, modules, nesting, single
from jpeft.hf.names import PLAIN_ROOT, ROOT, Names, Prefix, of_model
from jpeft.hf.tied import head_tensors, tied_names
from jpeft.methods import METHODS
from jpeft.storage import as_path

_README = "README.md"


def save(
    path: str | PathLike[str],
    peft: Peft,
    adapter: Tree,
    params: Tree,
    *,
    prefix: Prefix | None = None,
    task_type: str | None = None,
    base_model: str | None = None,
    experts: str = "stacked",
) -> None:
    """Writes an adapter as a folder that ``peft.PeftModel.from_pretrained`` loads. Inverse of `jpeft.hf.load`.

    It takes a method that declares a form in such folders (`LoRA`), alone or in a `Chain` with `BitFit` (of all biases,
    or of those where the method is) and `Train` (of whole modules); or `Train` alone, as LN_TUNING. A part of a
    model, such as a classifier's encoder, is saved alone with its own peft and trees. Layers that a decoder of
    `jpeft.models` stacks are written one by one, as torch has them. Of virtual tokens a folder holds the embeddings, or
    the keys and values, without a network that computes them; PEFT runs them by ``task_type``, which must be given.

    Args:
      path: the folder; it appears whole or not at all. An adapter that is there is replaced.
      peft: the bound method.
      adapter: its leaves.
      params: the base, of which nothing is written.
      prefix: put before the names of torch's modules, e.g. ``"bert."`` for a BertForSequenceClassification; or a
        mapping by where modules lie in the tree, e.g. ``{"encoder/": "bert."}``. By default names are the paths or, for
        an encoder of `jpeft.models` with a head, those of its ``…ForSequenceClassification``.
      task_type: HuggingFace's, e.g. "SEQ_CLS"; by default none, unless PEFT needs one for the method.
      base_model: the base's name or folder, for whoever reads the configuration.
      experts: how torch has stacked matrices ``[experts, in, out]``: "stacked", as parameters of one module that are
        ``[experts, out, in]`` or of one that says ``is_transposed`` (transformers 5); "swapped", as parameters
        ``[experts, in, out]`` of a module that does not say so, where PEFT takes one axis for the other (GPT-OSS of
        transformers 4); "modules", as one module an expert (other mixtures of transformers 4).

    Raises:
      ValueError: an adapter that a PEFT folder cannot hold; the message names the method or site.
      FileExistsError: ``path`` holds other files.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft, tempfile
    >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.LoRA(rank=2, targets=["layers_0"], init_weights="random").bind(model, params, x)
    >>> folder = tempfile.mkdtemp()
    >>> jpeft.hf.save(folder, peft, peft.init(jax.random.key(1), params), params)
    >>> peft, adapter = jpeft.hf.load(folder, model, params, x)
    >>> peft.method.targets
    ('layers_0',)
    """
    peft.check_order(params, adapter, "jpeft.hf.save(path, peft, adapter, params)", values=False)
    check_layout(experts)
    name, spec, beside = _specs(peft)
    task_type = task_type or spec.task_type or None
    prompt = prompts.contents(peft, adapter, task_type) if spec.prompt else None
    leaves = {p: np.asarray(jax.device_get(meta.unbox(x))) for p, x in peft.check(adapter).items()}
    peft = prompt.rest if prompt else peft
    peft, leaves, base = _one_by_one(peft, leaves, flatten(peft.frontend.tree(params)))
    peft, leaves = _in_their_form(peft, leaves)
    names = of_model(peft.model) if prefix is None else Names.of(prefix)
    weights = [a for a in peft.actions if a.site.kind in ("weight", spec.acts_on)]
    adapted, others = (
        {layout.module_of(names, a.site): a for a in weights if form(type(a.method)) is form_}
        for form_ in (spec, beside)
    )
    for action in (*adapted.values(), *others.values()):
        layout.check_site(action.site, _form_at(action))
    if both := sorted(adapted.keys() & others.keys()):
        raise ValueError(f"HuggingFace PEFT changes {both[0]!r} by one method, and this chain by two")
    copied = _copied(peft, base, spec)
    contents = _Contents(names, spec, adapted, copied, experts)
    tensors = _tensors(peft, leaves, contents)
    tied = tied_names(peft.model, names)
    heads = head_tensors(tied, spec, {k: x for k, x in tensors.items() if not _is_beside(k, beside)})
    settings = contents.modules | {head: adapted[own] for head, own in tied.items() if own in adapted}
    fields = dict(prompt.config) if prompt else _method_fields(name, spec, settings)
    config = fields | {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_type": spec.peft_type,
        "task_type": task_type,
    }
    if prompt:  # whose tensors belong to no module; PEFT leaves the names of others as they are
        tensors = {PLAIN_ROOT + key.removeprefix(ROOT): x for key, x in tensors.items()} | dict(prompt.tensors)
    else:
        every = {*contents.modules, *(names.torch(p[:-1]) for p in copied)}
        config["target_modules"] = sorted(every - contents.starts.keys())
    if contents.starts:
        config[spec.parameters] = sorted(contents.starts)
    if saved := _modules_to_save(peft, base, names, task_type, copied):
        if not spec.saves:
            raise ValueError(f"HuggingFace trains no modules beside {spec.peft_type}; leave {saved[0]!r} out")
        config["modules_to_save"] = saved
    if (bias := _bias(peft, base, name, spec)) != "none" or spec.bias:
        config["bias"] = bias
    if beside is not None:
        field = beside.fields[0]
        config[beside.beside] = {m: field.of(a.method, a.site, config) for m, a in sorted(others.items())}
    if heads and not spec.ties:
        config["ensure_weight_tying"] = True
    tensors, config = _without_drawn(peft, leaves, spec, tensors, config)
    if spec.pack:
        tensors, config = spec.pack(tensors, config)
    _check_free(target := as_path(path))
    with new_folder(target, replace=True, marker=CONFIG) as folder:
        write_safetensors(folder / TENSORS, {**tensors, **heads}, {"format": "pt"})
        write_atomically(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        write_atomically(folder / _README, _card(name, spec, config).encode())


def _form_at(action: Action) -> HFSpec:
    spec = form(type(action.method))
    assert isinstance(spec, HFSpec)
    return spec


def _is_beside(name: str, beside: HFSpec | None) -> bool:
    return beside is not None and any(name.endswith(f".{beside.wrapper}{t.key}") for t in beside.tensors)


def _specs(peft: Peft) -> tuple[str, HFSpec, HFSpec | None]:
    """The name and the form of the one method with a ``peft_type``, and the form of one that can stand beside it.

    Raises:
      ValueError: a method without a form in PEFT folders, no method with a ``peft_type``, or several.
    """
    found: dict[str, HFSpec] = {}
    for method in peft.method.methods():
        declared = form(type(method))
        if declared is None:
            raise ValueError(f"{method.name} has no form in a HuggingFace PEFT folder; save it with jpeft.save")
        if isinstance(declared, HFSpec):
            found[method.name] = declared
    # One that other folders can hold has a folder of its own only where no other has.
    found = {name: spec for name, spec in found.items() if spec.role is None} or found
    if not found:
        known = ", ".join(name for name, method in METHODS.items() if isinstance(form(method), HFSpec))
        raise ValueError(
            f"a HuggingFace PEFT folder needs one of {known} in the chain; save this adapter with jpeft.save"
        )
    held = {spec.beside for spec in found.values() if spec.beside} & {f for s in found.values() for f in s.holds}
    others = [name for name, spec in found.items() if spec.beside in held]
    own = [name for name in found if name not in others]
    if len(own) != 1 or len(others) > 1:
        raise ValueError(f"a HuggingFace PEFT folder has one method, this chain has {' and '.join(found)}")
    return own[0], found[own[0]], found[others[0]] if others else None


def _copied(peft: Peft, base: Collection[Path], spec: HFSpec) -> set[Path]:
    """The paths of the leaves that a method trains as copies of whole modules: the first member of its chain does.

    Raises:
      ValueError: a part of a module trains.
    """
    if not spec.copies:
        return set()
    first = next(i for i, method in enumerate(peft.method.methods()) if form(type(method)) is spec)
    copied = {a.site.path for a in peft.actions if a.member == first}
    for path in sorted(copied):
        if missing := [p for p in base if p[: len(path) - 1] == path[:-1] and p not in copied]:
            raise ValueError(_is_partial(f"modules of {spec.peft_type}", path, min(missing)))
    return copied


def _is_partial(holder: str, leaf: Path, missing: Path) -> str:
    return (
        f"HuggingFace's {holder} are whole modules that nothing else adapts; this chain trains {join(leaf)!r} without "
        f"{join(missing)!r}"
    )


def _one_by_one(
    peft: Peft, leaves: dict[Path, np.ndarray], base: Mapping[Path, Any]
) -> tuple[Peft, dict[Path, np.ndarray], list[Path]]:
    """The Peft, its leaves and the paths of the base, with unstacked layers where the model stacks them."""
    at = stacking.stacked_at(peft.model)
    if at is None:
        return peft, leaves, list(base)
    leaves = flatten(stacking.unstack(unflatten(leaves), at))
    paths = [own for p, x in base.items() for own in stacking.numbered(p, at, (*np.shape(peek(x)), 0)[0])]
    unrolled = stacking.unroll_peft(peft)
    actions = [
        dataclasses.replace(a, stored=tuple(name for name in a.stored if name != a.mask))
        for a in unrolled.actions
        if a.site.layers != ()
    ]
    return dataclasses.replace(unrolled, actions=tuple(actions)), leaves, paths


@dataclasses.dataclass(frozen=True)
class _Contents:
    """The contents of a folder.

    Attributes:
      names: the names of torch's modules.
      spec: the form of the folder's method.
      adapted: the weights that it changes, by torch module or parameter.
      copied: the leaves of which it trains copies.
      experts: how torch has stacks of experts.
    """

    names: Names
    spec: HFSpec
    adapted: Mapping[str, Action]
    copied: Collection[Path]
    experts: str

    @functools.cached_property
    def modules(self) -> dict[str, Action]:
        """The weights that the method changes, with those of single experts where torch has a module for each."""
        return {own: action for name, action in self.adapted.items() for own in self.each(name, action.site)}

    @functools.cached_property
    def starts(self) -> dict[str, str]:
        """The parameters that are adapted by their own names, and the beginnings of their tensors' names."""
        return nesting(
            [n for n, a in self.modules.items() if layout.kind_of(a.site) == PARAMETER and n in self.adapted]
        )

    def each(self, name: str, site: Site) -> list[str]:
        """The torch modules that hold a weight: those of its experts, or one."""
        return modules(name, site.batch[0]) if self.experts == "modules" and is_stack(site) else [name]

    def weight(self, action: Action, leaves: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of an action on a weight by name."""
        site, spec = action.site, _form_at(action)
        name, wrapper = layout.module_of(self.names, site), "" if spec is self.spec else spec.wrapper
        own = {leaf: leaves[action.leaf_path(leaf)] for leaf in action.stored}
        each = self.each(name, site)
        if each == [name]:
            start = self.starts.get(name, name)
            tensors = layout.tensors_at(site, spec, own, self.experts == "swapped" and name in self.starts)
            return {f"{start}.{wrapper}{t.key}": t.to_torch(own[t.leaf], site) for t in tensors}
        tensors = layout.tensors_at(single(site), spec, own)
        return {f"{m}.{t.key}": t.to_torch(own[t.leaf][i], single(site)) for i, m in enumerate(each) for t in tensors}

    def leaf(self, site: Site, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """The tensor of a base leaf that trains by name."""
        suffix = layout.leaf_suffix(self.names, site, self.adapted)
        suffix = self.spec.copies + layout.leaf_name(site.path[-1]) if site.path in self.copied else suffix
        module = layout.module_of(self.names, site)
        return {f"{module}.{suffix}": layout.leaf_to_torch(site, leaf)}


def _in_their_form(peft: Peft, leaves: Mapping[Path, np.ndarray]) -> tuple[Peft, dict[Path, np.ndarray]]:
    """The Peft and its leaves, with actions that PEFT has in another form in that form."""
    out, actions = dict(leaves), []
    for action in peft.actions:
        spec = form(type(action.method))
        if isinstance(spec, HFSpec) and spec.exported:
            own = {name: out.pop(action.leaf_path(name)) for name in action.stored}
            method, own = spec.exported(action.method, action.site, own)
            action = dataclasses.replace(action, method=method, stored=tuple(own))
            out |= {action.leaf_path(name): np.asarray(leaf) for name, leaf in own.items()}
        actions.append(action)
    return dataclasses.replace(peft, actions=tuple(actions)), out


def _tensors(peft: Peft, leaves: Mapping[Path, np.ndarray], contents: _Contents) -> dict[str, np.ndarray]:
    """The tensors of the file by name, but for those of tied heads."""
    out: dict[str, np.ndarray] = {}
    for action in peft.actions:
        site = action.site
        own = contents.leaf(site, leaves[site.path]) if site.kind == "leaf" else contents.weight(action, leaves)
        by_name, module = {f"{ROOT}{name}": x for name, x in own.items()}, layout.module_of(contents.names, site)
        if not module or by_name.keys() & out.keys():
            raise ValueError(f"prefix gives {site.name!r} the name {module!r}, which is empty or another module's")
        out |= by_name
    for tensor in contents.spec.shared:
        paths = [path for path in peft.shared_paths if path[-1] == tensor.leaf]
        if len(paths) > 1:
            raise ValueError(f"a HuggingFace PEFT folder has one {tensor.key}, this chain has {len(paths)}")
        if paths:
            names = [f"{ROOT}{module}.{tensor.key.rpartition('.')[2]}" for module in contents.adapted if tensor.copied]
            out |= dict.fromkeys([tensor.key, *names], tensor.to_torch(leaves[paths[0]]))
    return out


def _without_drawn(
    peft: Peft,
    leaves: Mapping[Path, np.ndarray],
    spec: HFSpec,
    tensors: Mapping[str, np.ndarray],
    config: dict[str, Any],
) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """Tensors and configuration without the shared tensors that its seed gives back, if a field says so."""
    absent = {t.leaf: t for t in spec.shared if t.field and not config[t.field]}
    if not absent:
        return tensors, config
    drawn = {path: x for path, x in peft.init_shared(jax.random.key(0)).items() if path[-1] in absent}
    if not all(np.array_equal(leaves[path], x) for path, x in drawn.items()):
        return tensors, config | {t.field: True for t in absent.values()}
    names = tuple(t.key.rpartition(".")[2] for t in absent.values())
    return {key: x for key, x in tensors.items() if key.rpartition(".")[2] not in names}, config


# --- the configuration ------------------------------------------------------------------------------------------------


def _method_fields(name: str, spec: HFSpec, adapted: Mapping[str, Action]) -> dict[str, Any]:
    """The fields of the configuration that the method depends on.

    Modules are named whole, not by suffix or "all-linear": the torch model may have more than this one, such as a
    pooler, and would get new adapters there.
    """
    out = dict(spec.when) | {k: v for k, v in spec.constants.items() if v is not None}
    for field in spec.fields:
        values = {module: field.of(a.method, a.site, out) for module, a in adapted.items()}
        values = {module: value for module, value in values.items() if value is not None}
        if field.chooses:
            out[field.key] = sorted(module for module, chosen in values.items() if chosen)
        elif field.pattern:
            out[field.key], out[field.pattern] = patterns(values)
        else:
            out[field.key] = _one_value(name, field, list(values.values()))
    return out


def _one_value(name: str, field: Field, values: Sequence[Any]) -> Any:
    """The value of a field without a pattern: the one that all modules have."""
    if not values:
        return field.default
    if all(value == values[0] for value in values):
        return values[0]
    if field.differ is None:
        raise ValueError(f"HuggingFace has one {field.key} for all modules; this {name} has {sorted(set(values))}")
    return field.differ(values)


def _bias(peft: Peft, base: Collection[Path], name: str, spec: HFSpec) -> str:
    """PEFT's word for the biases that train."""
    trained = {a.site.path for a in peft.actions if a.site.kind == "leaf"}
    chosen = {a.site.path for a in peft.actions if role(type(a.method)) is BIAS}
    if not chosen:
        return "none"
    if not spec.bias:
        raise ValueError(f"HuggingFace trains no biases beside {spec.peft_type}; leave {join(min(chosen))!r} out")
    if {p for p in base if p[-1] == "bias"} <= trained:
        return "all"
    beside = {p for a in peft.actions if a.site.kind == "weight" and (p := a.site.bias_path) is not None}
    if chosen == beside:
        return spec.bias
    odd = join(min(chosen ^ beside))
    raise ValueError(
        f"HuggingFace trains all biases or those of the modules with a {name}, this chain neither: see {odd!r}"
    )


def _modules_to_save(
    peft: Peft, base: Collection[Path], names: Names, task_type: str | None, copied: Collection[Path]
) -> list[str]:
    """The torch modules that are trained as a whole: the outermost of which all leaves train.

    Raises:
      ValueError: a part of a module trains, or one that is adapted; or PEFT would look for another module too.
    """
    trained = {a.site.path for a in peft.actions if a.site.kind == "leaf"} - set(copied)
    chosen = [p for a in peft.actions if role(type(a.method)) is MODULES_TO_SAVE and (p := a.site.path) not in copied]
    saved = {names.torch(_whole_module(path, base, trained)) for path in chosen}
    for leaf in base:
        for n in range(1, len(leaf)):
            name = names.torch(leaf[:n])
            if leaf not in trained and any(name.endswith(module) for module in saved):
                raise ValueError(
                    f"PEFT takes {name!r} for one of modules_to_save={sorted(saved)}, as it ends alike; train it too"
                )
    heads = TASK_HEADS.get(task_type or "", set())
    if heads and not any(heads & set(module.split(".")) for module in saved):
        raise ValueError(
            f"with task_type={task_type!r} PEFT looks for a saved {' or '.join(sorted(heads))}, which this adapter "
            "lacks; leave task_type out, or train the head too"
        )
    return sorted(saved)


def _whole_module(leaf: Path, base: Collection[Path], trained: Collection[Path]) -> Path:
    """The outermost module around a leaf that is trained as a whole."""
    for n in range(1, len(leaf)):
        if all(p in trained for p in base if p[:n] == leaf[:n]):
            return leaf[:n]
    missing = min(p for p in base if p[:-1] == leaf[:-1] and p not in trained)
    raise ValueError(_is_partial("modules_to_save", leaf, missing))


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_free(path: FilePath) -> None:
    """Raises if anything but an adapter of HuggingFace's layout has this name."""
    if not path.exists():
        return
    held = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
    others = held - {CONFIG, TENSORS, _README} if CONFIG in held else held
    if others:
        raise FileExistsError(f"{path} holds {min(others)!r}, which is not part of an adapter; choose another folder")


def _card(name: str, spec: HFSpec, config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    tags = f"tags: [{spec.peft_type.lower()}, jpeft]"
    header = ["library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), tags]
    settings = [f"{f.name} {config[f.key]}" for f in spec.fields if f.pattern]
    where = (
        f"{config['num_virtual_tokens']} virtual tokens"
        if spec.prompt
        else f"on {len(config['target_modules'])} modules"
    )
    line = ", ".join([*settings, where]).capitalize()
    return "\n".join(
        [
            "---",
            *header,
            "---",
            f"# A {name} adapter",
            "",
            line + (f" of {base}" if base else "") + "; trained in JAX with jpeft.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "this folder")',
            "```",
            "",
        ]
    )
