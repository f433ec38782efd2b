"""`jpeft.hf.load`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.binding import bind_survey, survey_model
from jpeft.core import stacking
from jpeft.core.actions import Action
from jpeft.core.geometry import Contraction, Raw
from jpeft.core.peft import Peft, split_variables
from jpeft.core.quantized import Quantized
from jpeft.core.sites import FUSED, Site, Survey
from jpeft.core.targets import matches_entry
from jpeft.core.tree import Path, Tree, flatten, join, like, nearest, peek, unflatten
from jpeft.errors import AdapterError
from jpeft.files import read_safetensors
from jpeft.hf import config as hf
from jpeft.hf import layout, tied
from jpeft.hf.exporting import leaf_suffix
from jpeft.hf.names import ROOT, Names, Prefix, find
from jpeft.methods import BitFit, Chain, LoRA, Method, Train


def load(
    path: str | PathLike[str],
    model: Any,
    params: Tree,
    *inputs: Any,
    prefix: Prefix | None = None,
    ignore: Sequence[str] = (),
    **kwargs: Any,
) -> tuple[Peft, Any]:
    """Reads a LoRA that HuggingFace PEFT saved, and binds it to a model. Inverse of `jpeft.hf.save`.

    Where a decoder of `jpeft.models` stacks its layers, so is the adapter, which must then be alike in all of them;
    one that is not takes the model loaded with ``scan_layers=False``.

    Args:
      path: the folder. model, params, *inputs, **kwargs: as for ``method.bind``.
      prefix: as in `save`; found from the names in the file where it is not given.
      ignore: torch modules to leave out because the model lacks them, whole names or suffixes at a ".", e.g.
        ``["pooler.dense"]``.

    Returns:
      ``(peft, adapter)``; trained biases and ``modules_to_save`` are `BitFit` and `Train` in a `Chain` with the `LoRA`.

    Raises:
      AdapterError: no adapter there, a pickle, a truncated file; a field that is unknown or not supported; a tensor
        that is missing, extra or misshapen; a module that the model lacks, or that only one of file and
        ``target_modules`` names; layers that differ where the model stacks them; a tied embedding or head that changes
        without the other.
      ValueError: a weight of the model that no torch module can be like, such as one stacked by a scan.

    >>> # peft, adapter = jpeft.hf.load("adapter", model, params, input_ids, attention_mask); see jpeft.hf.save
    """
    folder = FilePath(path)
    config = hf.read(folder / hf.CONFIG)
    file = _File.read(folder, ignore)
    tied.merge_head(model, config, file.path, file.lora, file.others)
    tree, _ = split_variables(params)
    base = flatten(tree)
    seen, at = survey_model(model, params, inputs, kwargs), stacking.stacked_at(model)
    each = stacking.unroll_survey(seen, at)  # with the layers one by one, as the file has them
    names = find(folder, file.modules, {s.path[:-1] for s in each.leaves}) if prefix is None else Names.of(prefix)
    found = _Found(file, config, names, each, tuple(ignore))
    sites, saved = found.lora(), found.saved()
    biases = found.biases(sites, saved)
    whole = _Whole(file, config, names, at)
    method = _method(
        file, config, seen, whole.lora(sites, seen.weights), whole.leaves(biases, seen), whole.leaves(saved, seen)
    )
    peft = bind_survey(method, model, params, seen)
    leaves = {p: jnp.asarray(x) for p, x in _leaves(peft, file, config, names, sites, at).items()}
    _check_rest(file, names, seen, {s.path for s in (*biases, *saved)}, base, at)
    leaves = {p: leaves[p].astype(dtype) for p, (_, dtype) in peft.structure}
    return peft, like(unflatten(peft.place_like_base(leaves, base)), tree)


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """The tensors of a folder, by torch module and then by what they are called within it."""

    path: FilePath
    lora: dict[str, dict[str, np.ndarray]]
    others: dict[str, dict[str, np.ndarray]]  # e.g. {"classifier": {"weight": …}, "….query": {"base_layer.bias": …}}

    @classmethod
    def read(cls, folder: FilePath, ignore: Sequence[str]) -> _File:
        """Sorts the tensors, without those of modules to ``ignore``."""
        path = folder / hf.TENSORS
        if not path.is_file() and (folder / hf.PICKLE).is_file():
            raise AdapterError(
                f"{folder} has only {hf.PICKLE}, a pickle, which may run code when opened and is refused; save it in "
                "PEFT with save_pretrained(folder, safe_serialization=True)"
            )
        tensors = read_safetensors(path)
        file, left_out = cls(path, {}, {}), set()
        for key, x in tensors.items():
            if not key.startswith(ROOT):
                raise AdapterError(f"{path} has {key!r}; expected names that start with {ROOT!r}")
            # With bias="all", PEFT writes the biases of modules_to_save three times.
            plain = key.replace(".original_module.", ".").replace(".modules_to_save.", ".")
            if plain != key and plain in tensors:
                continue
            module, suffix = _split(key.removeprefix(ROOT))
            if hf.named(ignore, module):
                left_out.add(module)
                continue
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise AdapterError(f"{path}: {key!r} is {x.dtype.name}, expected floating numbers")
            kind = file.lora if suffix in layout.LINEAR + layout.EMBEDDING else file.others
            kind.setdefault(module, {})[suffix] = x
        for entry in ignore:
            if not any(hf.named([entry], module) for module in left_out):
                raise AdapterError(f"{path} has no module {entry!r} to ignore{nearest(entry, file.modules)}")
        if not file.lora:
            raise AdapterError(f"{path} holds no LoRA: none of its {len(tensors)} tensors is a lora_A or lora_B")
        return file

    @property
    def modules(self) -> set[str]:
        return {*self.lora, *self.others}

    @property
    def dtype(self) -> str:
        """What the LoRA's leaves are held in: as in the file, where that is one type and a usual one."""
        found = {x.dtype.name for own in self.lora.values() for x in own.values()}
        return found.pop() if len(found) == 1 and found <= {"float32", "bfloat16", "float16"} else "float32"

    def take(self, module: str, suffix: str, shape: tuple[int, ...], why: str) -> np.ndarray:
        """A tensor that must be there, in this shape."""
        name = f"{ROOT}{module}.{suffix}"
        x = {**self.lora.get(module, {}), **self.others.get(module, {})}.get(suffix)
        if x is None:
            raise AdapterError(f"{self.path} lacks {name!r}, {why}")
        if x.shape != shape:
            raise AdapterError(f"{self.path}: {name!r} has shape {list(x.shape)}, expected {list(shape)}")
        return x


def _split(name: str) -> tuple[str, str]:
    """``"a.b.lora_A.weight"`` to ``("a.b", "lora_A.weight")``; likewise before ``base_layer`` and the last part."""
    parts = name.split(".")
    inner = next((i for i, p in enumerate(parts) if i and (p == "base_layer" or p.startswith("lora_"))), len(parts) - 1)
    return ".".join(parts[:inner]), ".".join(parts[inner:])


# --- what of the model it is for --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The sites of a model that a file and its configuration speak of."""

    file: _File
    config: hf.LoraConfig
    names: Names
    seen: Survey
    ignore: tuple[str, ...]

    def lora(self) -> dict[str, Site]:
        """The weights with a LoRA by torch module: those in the file, which must be those that are targeted."""
        weights = {self.names.torch(s.path): s for s in self.seen.weights if not isinstance(s.geometry, Raw)}
        file, config = self.file, self.config
        for module in sorted(file.lora):
            if module not in weights:
                hint = nearest(module, weights)
                raise AdapterError(f"{file.path} has a LoRA for {module!r}, which is no weight of this model{hint}")
            if not config.targets(module, isinstance(weights[module].geometry, Contraction)):
                raise AdapterError(
                    f"{file.path} has a LoRA for {module!r}, which {hf.CONFIG} does not target: target_modules is "
                    f"{config.target_modules!r}"
                )
        for module, site in weights.items():
            linear = isinstance(site.geometry, Contraction) and not site.head
            known = module in file.lora or hf.named(self.ignore, module) or not self.names.covers(site.path)
            if not known and config.targets(module, linear):
                raise AdapterError(f"{file.path} has no LoRA for {module!r}, which target_modules names")
        return {module: layout.check_site(weights[module]) for module in sorted(file.lora)}

    def saved(self) -> list[Site]:
        """The leaves of ``modules_to_save``."""
        in_file = {site.path for site in self.seen.leaves if self._in_file(site)}
        found = [s for s in self.seen.leaves if self.config.saves(self._module(s)) or s.path in in_file]
        for entry in self.config.modules_to_save:
            ends = [s for s in found if re.match(rf"(^|.*\.){entry}($|\..*)", self._module(s))]
            if not ends and entry not in self.config.optional_heads() and not hf.named(self.ignore, entry):
                raise AdapterError(f"{self.file.path.parent}: modules_to_save has {entry!r}, which this model lacks")
        return found

    def biases(self, lora: Mapping[str, Site], saved: Sequence[Site]) -> list[Site]:
        """The biases that train beside."""
        kept = {s.path for s in saved}
        beside = {s.bias_path for s in lora.values() if s.bias}
        return [
            site
            for site in self.seen.leaves
            if site.path[-1] == "bias"
            and site.path not in kept
            and (self.config.bias == "all" or (self.config.bias == "lora_only" and site.path in beside))
        ]

    def _module(self, site: Site) -> str:
        return self.names.torch(site.path[:-1])

    def _in_file(self, site: Site) -> bool:
        """Whether the file has a leaf as PEFT saves it: PEFT also takes names that only end like an entry."""
        module, own = self._module(site), self.file.others.get(self._module(site), {})
        ends = [".".join(module.split(".")[: n + 1]) for n in range(module.count(".") + 1)]
        return layout.leaf_name(site.path[-1]) in own and any(
            end.endswith(entry) for end in ends for entry in self.config.modules_to_save
        )


# --- what of it is whole where layers are stacked ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Whole:
    """From sites of single layers to the model's own, which hold those of all layers where it stacks them."""

    file: _File
    config: hf.LoraConfig
    names: Names
    at: str | None

    def lora(self, sites: Mapping[str, Site], weights: Iterable[Site]) -> dict[str, Site]:
        """The weights by the first of the torch modules that each stands for.

        Raises:
          AdapterError: layers of which only some have a LoRA, or whose ranks or alphas differ.
        """
        out = {}
        for site, modules in self._gather(
            sites.values(), weights, "has a LoRA for", lambda s: self.names.torch(s.path)
        ):
            for what, of in (("rank", self.config.rank), ("alpha", self.config.alpha)):
                other = next((m for m in modules if of(m) != of(modules[0])), None)
                if other is not None:
                    raise AdapterError(
                        f"{self.file.path.parent}: {modules[0]!r} has {what} {of(modules[0])}, {other!r} has "
                        f"{of(other)}; {stacking.DIFFER}"
                    )
            out[modules[0]] = site
        return out

    def leaves(self, sites: Iterable[Site], seen: Survey) -> list[Site]:
        """The leaves that train.

        Raises:
          AdapterError: layers in only some of which they do.
        """

        def name(site: Site) -> str:
            return f"{self.names.torch(site.path[:-1])}.{layout.leaf_name(site.path[-1])}"

        return [site for site, _ in self._gather(sites, seen.leaves, "trains", name)]

    def _gather(
        self, sites: Iterable[Site], candidates: Iterable[Site], verb: str, name: Callable[[Site], str]
    ) -> Iterator[tuple[Site, list[str]]]:
        """The candidates that the sites make up, each with the torch names of the sites."""
        chosen = {s.weight_path for s in sites}
        for site in candidates:
            each = stacking.unroll_site(site, self.at)
            there = [s for s in each if s.weight_path in chosen]
            if there and len(there) < len(each):
                lacking = next(s for s in each if s.weight_path not in chosen)
                raise AdapterError(
                    f"{self.file.path.parent} {verb} {name(there[0])!r} and not {name(lacking)!r}; {stacking.DIFFER}"
                )
            if there:
                yield site, [name(s) for s in there]


# --- the method and its leaves ----------------------------------------------------------------------------------------


def _method(
    file: _File,
    config: hf.LoraConfig,
    seen: Survey,
    sites: Mapping[str, Site],
    biases: Sequence[Site],
    saved: Sequence[Site],
) -> Method:
    """The method that acts on these sites and no others."""
    overrides: dict[str, dict[str, Any]] = {}
    for module, site in sites.items():
        fields: dict[str, Any] = {"rank": config.rank(module), "alpha": config.alpha(module)}
        fields = {k: v for k, v in fields.items() if v != {"rank": config.r, "alpha": config.lora_alpha}[k]}
        if config.lora_dropout and (site.lookup or site.via != FUSED):
            fields["dropout"] = 0.0  # PEFT has none before an embedding either
        if fields:
            clash = any(s is not site and matches_entry(site.name, s.name) for s in sites.values())
            overrides["^" + re.escape(site.name) if clash else site.name] = fields
    lora = LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        init_weights=hf.INITS.get(config.init_lora_weights, "kaiming"),
        dtype=file.dtype,
        targets=_exactly([s.name for s in sites.values()], sites.values(), seen.weights),
        overrides=overrides,
    )
    members: list[Method] = [lora]
    if biases:
        every = len(biases) == sum(s.path[-1] == "bias" for s in seen.leaves)
        targets = None if every else _exactly([s.name for s in biases], biases, seen.leaves)
        members.append(BitFit(targets=targets))
    if saved:
        owners = sorted({join(s.path[:-1]) for s in saved})
        members.append(Train(_exactly(owners, saved, seen.leaves)))
    return Chain(*members) if len(members) > 1 else lora


def _exactly(entries: Sequence[str], wanted: Iterable[Site], candidates: Iterable[Site]) -> str | tuple[str, ...]:
    """Targets that choose the wanted sites alone: the entries, unless another site's path ends like one of them."""
    wanted = list(wanted)
    taken = [s for s in candidates if any(matches_entry(e, n) for e in entries for n in s.names)]
    return tuple(entries) if len(taken) == len(wanted) else "|".join(re.escape(s.name) for s in wanted)


def _leaves(
    peft: Peft, file: _File, config: hf.LoraConfig, names: Names, sites: Mapping[str, Site], at: str | None
) -> dict[Path, np.ndarray]:
    """The adapter's leaves from the file's tensors."""
    out: dict[Path, np.ndarray] = {}
    for action in peft.actions:
        each = stacking.unroll_site(action.site, at)
        read = [_site_leaves(action, site, file, config, names, sites) for site in each]
        for name, first in read[0].items():
            stacked = each[0].path != action.site.path
            out[action.leaf_path(name)] = np.stack([own[name] for own in read]) if stacked else first
    return out


def _site_leaves(
    action: Action, site: Site, file: _File, config: hf.LoraConfig, names: Names, sites: Mapping[str, Site]
) -> dict[str, np.ndarray]:
    """The leaves of one torch module, by name."""
    if site.kind == "leaf":
        module, suffix = names.torch(site.path[:-1]), leaf_suffix(names, site, sites)
        why = f"which {'bias=' + config.bias if isinstance(action.method, BitFit) else 'modules_to_save'} asks for"
        return {"": layout.leaf_to_tree(site, file.take(module, suffix, layout.leaf_shape(site), why))}
    module = names.torch(site.path)
    shapes = layout.lora_shapes(site, config.rank(module))
    own = {suffix: file.take(module, suffix, shape, "the other half is there") for suffix, shape in shapes.items()}
    if extra := sorted(file.lora[module].keys() - shapes.keys()):
        raise AdapterError(f"{file.path} has {ROOT + module + '.' + extra[0]!r} beside {', '.join(shapes)}")
    return layout.lora_to_tree(site, own)


def _check_rest(
    file: _File, names: Names, seen: Survey, used: Collection[Path], base: Mapping[Path, Any], at: str | None
) -> None:
    """What else the file holds may be only base weights as they are: PEFT adds those of embeddings.

    Raises:
      AdapterError: a tensor that nothing accounts for, or one that is not the base's.
    """
    rest = {(module, suffix) for module, own in file.others.items() for suffix in own}
    leaves = [(site, own, i) for own in seen.leaves for i, site in enumerate(stacking.unroll_site(own, at))]
    for site, own, i in leaves:
        module, leaf = names.torch(site.path[:-1]), layout.leaf_name(site.path[-1])
        for suffix in (leaf, "base_layer." + leaf):
            if (module, suffix) not in rest:
                continue
            rest.remove((module, suffix))
            if site.path in used:
                continue
            weight = peek(base[own.path])
            if isinstance(weight, Quantized):  # what is left of it cannot be compared
                weight = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
            if own.path != site.path and not isinstance(weight, jax.ShapeDtypeStruct):
                weight = weight[i]
            if not _same(site, file.others[module][suffix], weight):
                raise AdapterError(
                    f"{file.path} has {f'{ROOT}{module}.{suffix}'!r}, a base weight that differs from {site.name!r}: "
                    "resized or trained; load the base with it, or train it with modules_to_save"
                )
    for module, suffix in sorted(rest):
        raise AdapterError(f"{file.path} has {f'{ROOT}{module}.{suffix}'!r}, which {hf.CONFIG} does not account for")


def _same(site: Site, tensor: np.ndarray, leaf: Any) -> bool:
    """Whether a base weight is what the file has, as far as an abstract one can tell."""
    if tensor.shape != layout.leaf_shape(site):
        return False
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    return np.array_equal(layout.leaf_to_tree(site, tensor), np.asarray(jax.device_get(leaf)).astype(tensor.dtype))
