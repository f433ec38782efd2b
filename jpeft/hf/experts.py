"""Parameters that PEFT adapts by their own names, such as the stacked matrices ``[experts, in, out]`` of a mixture.

PEFT wraps the module around them once for each, so their tensors are nested: of ``mlp.experts.gate_up_proj`` and
``mlp.experts.down_proj``, ``mlp.experts.base_layer.lora_A.weight`` belongs to the first that the module declares and
``mlp.experts.lora_A.weight`` to the last. Those of all experts are one tensor: A ``[rank * experts, in]``, B
``[out, rank * experts]``. Where torch has a module for each expert, as in transformers 4, the tensors are those of
``mlp.experts.0.down_proj``, ``mlp.experts.1.down_proj``, …
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jpeft.checks import shown
from jpeft.core.interchange import LINEAR, PARAMETER, SWAPPED, HFSpec, is_stack
from jpeft.core.sites import Site
from jpeft.errors import AdapterError
from jpeft.hf import layout
from jpeft.hf.config import Config, named
from jpeft.hf.tensors import TensorFile

LAYOUTS = ("stacked", "swapped", "modules")
_WRAPPED = "base_layer."


@dataclass(frozen=True)
class Experts:
    """The parameters of a folder that hold experts, once their tensors are found.

    Attributes:
      named: the torch module that the configuration names, by parameter: where each expert is one, the first.
      swapped: the parameters of which PEFT swaps the axes.
    """

    named: dict[str, str] = field(default_factory=dict)
    swapped: set[str] = field(default_factory=set)


def check_layout(experts: str | None) -> str | None:
    """Raises unless ``experts`` is a layout of stacks or None."""
    if experts is not None and experts not in LAYOUTS:
        raise ValueError(f"experts must be {', '.join(map(repr, LAYOUTS))} or None, got {shown(experts)}")
    return experts


def single(site: Site) -> Site:
    """One matrix of a stack."""
    return replace(site, geometry=None, stored=(site.inputs, site.outputs), named=False)


def modules(parameter: str, count: int) -> list[str]:
    """The torch modules of single experts.

    >>> modules("mlp.experts.down_proj", 2)
    ['mlp.experts.0.down_proj', 'mlp.experts.1.down_proj']
    """
    parent, _, name = parameter.rpartition(".")
    return [f"{parent}.{i}.{name}" for i in range(count)]


def collect(config: Config, file: TensorFile, weights: dict[str, Site], swapped: bool | None) -> Experts:
    """Gives each parameter of the file its own tensors, under its own name, in place; and its site one of a stack.

    Args:
      config: the folder's configuration.
      file: its tensors.
      weights: the sites of the model by torch module.
      swapped: whether PEFT swaps the axes of stacks; None to tell from the shapes.

    Raises:
      AdapterError: tensors of some parameters of a module, or of some experts, only.
    """
    found, nested = Experts(), defaultdict(list)
    for entry in config.parameters:
        if not any(named([entry], own) for name in weights for own in (name, f"{name}.weight")):
            raise AdapterError(f"{file.path.parent}: {config.spec.parameters} has {entry!r}, which this model lacks")
    for name, site in weights.items():
        stack = layout.as_stack(site)
        if is_stack(stack) and file.adapted.keys() & set(each := modules(name, stack.batch[0])):
            _join(config, file, name, stack, each)
            found.named[name], weights[name] = each[0], stack
        elif config.targets_parameter(name):
            nested[name.rpartition(".")[0]].append(name)
            weights[name] = stack
    for parent, names in nested.items():
        levels = list(_levels(parent, config.spec, file))[::-1]
        if len(levels) != len(names):
            raise AdapterError(
                f"{file.path} has tensors for {len(levels)} parameters of {parent!r}, but {config.spec.parameters} "
                f"names {len(names)}: {', '.join(sorted(names))}"
            )
        order, kinds = _assign(config, levels, names, weights, swapped)
        for name, kind, level in zip(order, kinds, levels, strict=True):
            file.adapted[name] = level
            if kind == SWAPPED:
                found.swapped.add(name)
    return found


def _levels(parent: str, spec: HFSpec, file: TensorFile) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of the parameters of a module, from the outermost wrapper."""
    keys = {tensor.key for tensor in spec.tensors if PARAMETER in tensor.kinds}
    for depth in itertools.count():
        there, start = (file.others if depth else file.adapted).get(parent, {}), _WRAPPED * depth
        own = {key: there.pop(start + key) for key in keys if start + key in there}
        if not own:
            break
        yield own
    for kind in (file.adapted, file.others):
        if not kind.get(parent, True):
            del kind[parent]


def _assign(
    config: Config, levels: Sequence[Mapping[str, np.ndarray]], names: Sequence[str], weights: Mapping[str, Site],
    swapped: bool | None,
) -> tuple[Sequence[str], Sequence[str]]:  # fmt: skip
    """The parameters in the order of their tensors, which is that of their declaration, unless the shapes forbid it."""
    every = {None: (PARAMETER, SWAPPED), False: (PARAMETER,), True: (SWAPPED,)}[swapped]
    for order in itertools.permutations(names):
        for kinds in itertools.product(every, repeat=len(names)):
            if all(_fits(config, *each) for each in zip(kinds, levels, (weights[n] for n in order), strict=True)):
                return order, kinds
    return names, [every[0]] * len(names)  # a shape is wrong, which is told when the tensor is taken


def _fits(config: Config, kind: str, tensors: Mapping[str, np.ndarray], site: Site) -> bool:
    """Whether tensors have the sizes of a site, as far as the roles of their axes tell."""
    sizes: dict[Any, int] = {"in": site.inputs, "out": site.outputs}
    for tensor in config.spec.tensors:
        if kind in tensor.kinds and tensor.key in tensors:
            try:
                shape = tensor.to_tree(tensors[tensor.key], site).shape
            except ValueError:
                return False
            roles = config.method.roles.get(tensor.leaf, ())  # type: ignore[attr-defined]
            own = shape[len(site.batch) :]
            if any(role in sizes and size != sizes[role] for role, size in zip(roles, own, strict=False)):
                return False
    return True


def _join(config: Config, file: TensorFile, name: str, site: Site, each: Sequence[str]) -> None:
    """Makes the tensors of single experts those of their stack, in place."""
    where = file.path.parent
    for module in each:
        if module not in file.adapted:
            raise AdapterError(f"{file.path} has no {config.method.__name__} for {module!r}, only for other experts")
        if not config.targets(module, linear=True):
            raise AdapterError(f"{where}: target_modules does not name {module!r}, for which there are tensors")
        if difference := config.difference(each[0], module):
            raise AdapterError(f"{where}: {difference}; experts of one stack must be alike")
    for tensor in config.spec.tensors:
        if PARAMETER in tensor.kinds:
            one = next(t for t in config.spec.tensors if t.leaf == tensor.leaf and LINEAR in t.kinds)
            if missing := [module for module in each if one.key not in file.adapted[module]]:
                raise AdapterError(f"{file.path} lacks {f'{missing[0]}.{one.key}'!r}, which other experts have")
            found = [file.adapted[module].pop(one.key) for module in each]
            if len({x.shape for x in found}) > 1:
                raise AdapterError(f"{file.path}: {one.key!r} of {', '.join(each)} differ in their shapes")
            leaves = [one.to_tree(x, single(site)) for x in found]
            file.adapted.setdefault(name, {})[tensor.key] = tensor.to_torch(np.stack(leaves), site)
    for module in each:
        if extra := sorted(file.adapted.pop(module)):
            raise AdapterError(f"{file.path} has {f'{module}.{extra[0]}'!r}, which no expert of a stack has")


def nesting(parameters: Sequence[str]) -> dict[str, str]:
    """The beginning of the names of each parameter's tensors in a file. Inverse of `collect`.

    Args:
      parameters: their names, in the order of their declaration.

    Raises:
      ValueError: a parameter of the model itself.

    >>> nesting(["experts.gate_up_proj", "experts.down_proj"])
    {'experts.gate_up_proj': 'experts.base_layer', 'experts.down_proj': 'experts'}
    """
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        parent = name.rpartition(".")[0]
        if not parent:
            raise ValueError(f"{name!r} has no counterpart in HuggingFace PEFT: it is a parameter of the model itself")
        by_module[parent].append(name)
    return {
        name: ".".join([parent, *["base_layer"] * (len(names) - 1 - i)])
        for parent, names in by_module.items()
        for i, name in enumerate(names)
    }
