"""The sites of a model that a HuggingFace PEFT folder acts on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jpeft.checks import shown
from jpeft.core import stacking
from jpeft.core.interchange import ATTENTION, LINEAR, PARAMETER, is_stack
from jpeft.core.sites import Site, Survey
from jpeft.core.tree import nearest
from jpeft.errors import AdapterError
from jpeft.hf import experts, layout
from jpeft.hf.config import CONFIG, Config, named, within
from jpeft.hf.names import Names
from jpeft.hf.tensors import TensorFile


@dataclass(frozen=True)
class Folder:
    """A folder as it is read onto a model.

    Attributes:
      config: its configuration.
      file: its tensors.
      names: the names of torch's modules.
      at: the path below which the model stacks its layers, or None.
      ignore: torch modules that are left out.
      layout: how the folder holds stacks of experts, one of `experts.LAYOUTS`; None to tell from the file.
      experts: what `match` finds of them.
    """

    config: Config
    file: TensorFile
    names: Names
    at: str | None
    ignore: tuple[str, ...] = ()
    layout: str | None = None
    experts: experts.Experts = field(default_factory=experts.Experts)

    def module(self, site: Site) -> str:
        """The torch module of a site: for a leaf, its owner; for a bare parameter, its own name."""
        return layout.module_of(self.names, site)

    def candidates(self, survey: Survey) -> Sequence[Site]:
        """The sites that the method can act on."""
        return survey.attentions if self.config.spec.acts_on == ATTENTION else survey.weights

    def named(self, module: str) -> str:
        """The module by which the configuration knows one, where it is a stack of several."""
        return self.experts.named.get(module, module)

    def targets(self, module: str, site: Site, linear: bool) -> bool:
        """Whether the configuration names a module. ``linear``: whether "all-linear" means it."""
        if site.kind == "weight" and layout.kind_of(site) == PARAMETER:
            return self.config.targets_parameter(module) or module in self.experts.named
        return self.config.targets(module, linear) or self.config.targets_parameter(f"{module}.weight")


@dataclass(frozen=True)
class Matched:
    """The sites that a folder acts on, with unstacked layers, as the file has them.

    Attributes:
      adapted: the weights that the method changes, by torch module.
      copied: the leaves of which the method trains copies.
      saved: the leaves of ``modules_to_save``.
      biases: the other biases that train.
    """

    adapted: Mapping[str, Site]
    copied: Sequence[Site]
    saved: Sequence[Site]
    biases: Sequence[Site]


def match(folder: Folder, survey: Survey) -> Matched:
    """The sites of a model, surveyed with unstacked layers, that a folder acts on.

    Raises:
      AdapterError: a module that the model lacks, or that only one of file and configuration names.
      ValueError: a weight that no torch module can be like.
    """
    saved = _saved(folder, survey)
    copied = _copied(folder, survey) if folder.config.spec.copies else []
    adapted = {} if copied else _adapted(folder, survey)
    kept, beside = {s.path for s in saved}, {s.bias_path for s in adapted.values() if s.bias}
    bias = folder.config.bias
    biases = [
        site
        for site in survey.leaves
        if site.path[-1] == "bias"
        and site.path not in kept
        and (bias == "all" or (bias != "none" and site.path in beside))
    ]
    return Matched(adapted, copied, saved, biases)


def _adapted(folder: Folder, survey: Survey) -> dict[str, Site]:
    """The weights that the method changes by torch module: those in the file must be those that are targeted."""
    spec = folder.config.spec
    weights = {folder.module(s): s for s in folder.candidates(survey) if spec.parameters or not s.named}
    if spec.parameters:
        swapped = None if folder.layout is None else folder.layout == "swapped"
        collected = experts.collect(folder.config, folder.file, weights, swapped)
        folder.experts.named.update(collected.named)
        folder.experts.swapped.update(collected.swapped)
    _check_modules(folder, weights, spec.acts_on)
    return {module: layout.check_site(weights[module], spec) for module in sorted(folder.file.adapted)}


def _copied(folder: Folder, survey: Survey) -> list[Site]:
    """The leaves of the modules that the method trains whole: those in the file must be those that are targeted."""
    _check_modules(folder, {folder.module(s): s for s in survey.leaves}, "module")
    return [s for s in survey.leaves if folder.module(s) in folder.file.adapted]


def _check_modules(folder: Folder, sites: Mapping[str, Site], noun: str) -> None:
    """Raises unless the modules that the method changes are the same in the file and by the configuration.

    Args:
      folder: the folder.
      sites: those of the model by torch module.
      noun: what one of them is called.
    """
    file, config, name = folder.file, folder.config, folder.config.method.__name__
    linear = {m for m, site in sites.items() if site.kind == "weight" and layout.kind_of(site) == LINEAR}
    for module in sorted(file.adapted):
        if module not in sites:
            hint = nearest(module, sites)
            raise AdapterError(f"{file.path} has a {name} for {module!r}, which is not a {noun} of this model{hint}")
        if not (config.spec.own_targets or folder.targets(module, sites[module], module in linear)):
            raise AdapterError(
                f"{file.path} has a {name} for {module!r}, which {CONFIG} does not target: target_modules is "
                f"{shown(config.target_modules)}"
            )
    for module, site in sites.items():
        known = module in file.adapted or named(folder.ignore, module) or not folder.names.covers(site.path)
        own = config.spec.own_targets
        if not (known or own) and folder.targets(module, site, module in linear and not site.head):
            raise AdapterError(f"{file.path} has no {name} for {module!r}, which target_modules names")


def _saved(folder: Folder, survey: Survey) -> list[Site]:
    """The leaves of ``modules_to_save``."""
    config = folder.config
    found = [s for s in survey.leaves if config.saves(folder.module(s)) or _is_saved_in_file(folder, s)]
    for entry in config.modules_to_save:
        optional = entry in config.optional_heads() or named(folder.ignore, entry)
        if not optional and not any(within(entry, folder.module(s)) for s in found):
            raise AdapterError(f"{folder.file.path.parent}: modules_to_save has {entry!r}, which this model lacks")
    return found


def _is_saved_in_file(folder: Folder, site: Site) -> bool:
    """Whether the file has a leaf as PEFT saves it. PEFT also takes modules whose names only end like an entry."""
    module = folder.module(site)
    parts = module.split(".")
    around = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return layout.leaf_name(site.path[-1]) in folder.file.others.get(module, {}) and any(
        name.endswith(entry) for name in around for entry in folder.config.modules_to_save
    )


# --- layers that the model stacks -------------------------------------------------------------------------------------


def stacked(folder: Folder, matched: Matched, survey: Survey) -> Matched:
    """The model's own sites, each of which holds those of all layers where the model stacks them.

    The adapted ones are given by the first of the torch modules that each stands for, and say on which of its layers.

    Raises:
      AdapterError: layers of which only some train leaves of the base, or whose settings differ.
    """
    adapted = {}
    sites = matched.adapted.values()
    for site, found in _gather(folder, sites, folder.candidates(survey)):
        modules, layers = [folder.module(s) for s in found if s], tuple(i for i, s in enumerate(found) if s)
        for other in modules[1:]:
            if difference := folder.config.difference(folder.named(modules[0]), folder.named(other)):
                raise AdapterError(f"{folder.file.path.parent}: {difference}; {stacking.DIFFER}")
        site = layout.as_stack(site) if is_stack(matched.adapted[modules[0]]) else site
        adapted[modules[0]] = replace(site, layers=layers) if len(layers) < len(found) else site

    def leaves(sites: Sequence[Site]) -> list[Site]:
        out = []
        for site, found in _gather(folder, sites, survey.leaves):
            if None in found:
                names = [
                    f"{folder.module(s)}.{layout.leaf_name(s.path[-1])}" for s in stacking.unroll_site(site, folder.at)
                ]
                there, lacking = names[[*map(bool, found)].index(True)], names[found.index(None)]
                raise AdapterError(f"{folder.file.path.parent} trains {there!r} and not {lacking!r}; {stacking.DIFFER}")
            out.append(site)
        return out

    return Matched(adapted, leaves(matched.copied), leaves(matched.saved), leaves(matched.biases))


def _gather(
    folder: Folder, sites: Iterable[Site], candidates: Iterable[Site]
) -> Iterator[tuple[Site, list[Site | None]]]:
    """The stacked sites that those of single layers belong to, each with them, or None for a layer without."""
    chosen = {s.weight_path: s for s in sites}
    for site in candidates:
        found = [chosen.get(s.weight_path) for s in stacking.unroll_site(site, folder.at)]
        if any(found):
            yield site, found
