"""How a method maps to HuggingFace PEFT: its configuration fields and tensors, declared beside its maths.

A method class sets ``hf`` to an `HFSpec` if it has a ``peft_type`` of its own, or to `BIAS` or `MODULES_TO_SAVE` if
only folders of other types can hold it. `jpeft.hf` reads and writes folders by these declarations and knows no method.
Only a class's own ``hf`` counts, see `form`: a subclass may compute something else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jpeft.checks import Rule
from jpeft.core.sites import Site

# The kinds of torch modules that a tensor can belong to.
LINEAR, EMBEDDING, CONVOLUTION = "linear layer", "embedding", "convolution"
# A parameter of a module of any other kind: a matrix, or those of experts [experts, in, out]. SWAPPED: PEFT takes the
# axes of such a stack for [experts, out, in] unless its module has an attribute is_transposed.
PARAMETER, SWAPPED = "parameter", "parameter with its axes swapped"
ATTENTION = "attention"  # a module whose attention a method changes


# What a folder of virtual tokens holds, whose tensors belong to no module: their embeddings, or their keys and values.
EMBEDDINGS, KEYS_VALUES = "embeddings", "keys and values"


class Role(enum.Enum):
    """The configuration field for methods that train copies of base weights."""

    BIAS = "bias"
    MODULES_TO_SAVE = "modules_to_save"


BIAS, MODULES_TO_SAVE = Role.BIAS, Role.MODULES_TO_SAVE

# A tensor at a site, and the leaf that it becomes, or the other way round.
Convert = Callable[[np.ndarray, Site], np.ndarray]
Tensors = Mapping[str, np.ndarray]


def _transposed(x: np.ndarray, axes: str, inverse: bool = False) -> np.ndarray:
    """``x`` with its axes moved from one side of ``"ri->ir"`` to the other; as it is where ``axes`` is empty."""
    if not axes:
        return x
    torch, tree = axes.split("->")
    source, target = (tree, torch) if inverse else (torch, tree)
    return np.transpose(x, [source.index(axis) for axis in target])


@dataclass(frozen=True)
class Tensor:
    """A tensor of every adapted torch module, and the adapter leaf that holds it.

    Attributes:
      key: the tensor's name within its module, e.g. ``"lora_A.weight"``.
      leaf: the leaf's name.
      axes: torch's axes and the leaf's, e.g. ``"ri->ir"``; empty if both have the same.
      functions: ``(to_tree, to_torch)`` where a transposition is not enough. ``to_torch`` is also called on zeros, to
        learn the expected shape.
      kinds: the torch modules that have it.

    >>> tensor = Tensor("lora_A.weight", "lora_a", "ri->ir")
    >>> tensor.to_tree(np.zeros((2, 6)), None).shape
    (6, 2)
    """

    key: str
    leaf: str
    axes: str = ""
    functions: tuple[Convert, Convert] | None = None
    kinds: tuple[str, ...] = (LINEAR,)

    def to_tree(self, x: np.ndarray, site: Any) -> np.ndarray:
        """The leaf from the tensor. Inverse of `to_torch`."""
        return self.functions[0](x, site) if self.functions else _transposed(x, self.axes)

    def to_torch(self, x: np.ndarray, site: Any) -> np.ndarray:
        """The tensor from the leaf. Inverse of `to_tree`."""
        return self.functions[1](x, site) if self.functions else _transposed(x, self.axes, inverse=True)


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that all modules share, and the shared leaf that holds it.

    Attributes:
      key: the tensor's whole name in the file, e.g. ``"base_model.vera_A"``.
      leaf: the shared leaf's name.
      axes: as for `Tensor`.
      copied: whether PEFT writes the tensor again under every module.
      field: the field of the configuration that says whether folders have the tensor at all, rather than a seed.
    """

    key: str
    leaf: str
    axes: str = ""
    copied: bool = False
    field: str = ""

    def to_tree(self, x: np.ndarray) -> np.ndarray:
        """The leaf from the tensor. Inverse of `to_torch`."""
        return _transposed(x, self.axes)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """The tensor from the leaf. Inverse of `to_tree`."""
        return _transposed(x, self.axes, inverse=True)


def _unchanged(value: Any, site: Site | None) -> Any:
    return value


@dataclass(frozen=True)
class Field:
    """A field of a PEFT configuration, and the field of the method that holds it.

    Attributes:
      key: PEFT's name.
      name: the method's name; empty if nothing of the method depends on the field.
      default: PEFT's value where the configuration lacks the field.
      rule: the values that can be read; None for any.
      pattern: PEFT's field of exceptions by module, e.g. ``"rank_pattern"``; empty if it has none.
      read: ``(value, site) -> value`` of the method at a site; the site is None for the method's own field. It raises
        ValueError on a value that the method does not have.
      write: ``(method, site, config) -> value`` of PEFT at a site, where it is not the method's own. ``config`` holds
        the fields that are declared before this one. None at a site where the field has no effect.
      differ: combines the values of sites if PEFT has no pattern for the field; None: differing values are an error.
      chooses: whether it chooses some of the adapted modules: PEFT's value is a regular expression or a list of names'
        ends, the method's a target, and ``write`` tells whether a site is among them.
    """

    key: str
    name: str = ""
    default: Any = None
    rule: Rule | None = None
    pattern: str = ""
    read: Callable[[Any, Site | None], Any] = _unchanged
    write: Callable[[Any, Site, Mapping[str, Any]], Any] | None = None
    differ: Callable[[Collection[Any]], Any] | None = None
    chooses: bool = False

    def of(self, method: Any, site: Site, config: Mapping[str, Any]) -> Any:
        """PEFT's value for a method at a site."""
        return self.write(method, site, config) if self.write else getattr(method, self.name)


# For types that have it; PEFT itself sets it from the module's class.
FAN_IN_FAN_OUT = Field("fan_in_fan_out", write=lambda method, site, config: site.owner == "FlaxConv1D", differ=any)


def window(site: Site) -> tuple[int, ...]:
    """The sizes of a convolution's window, whose axes stand last in torch; ``()`` for another site."""
    return site.geometry.window if site.geometry is not None else ()


def own_axes(site: Site) -> tuple[int, ...]:
    """The sizes of a weight's axes, but for those of scanned layers."""
    sizes = list(site.stored)
    for axis, _ in site.stack:
        sizes.pop(axis)
    return tuple(sizes)


def is_stack(site: Site) -> bool:
    """Whether a weight is a stack of matrices ``[experts, in, out]``, each with leaves of its own."""
    own = own_axes(site)
    return len(own) == 3 and site.batch == own[:1] and (site.inputs, site.outputs) == own[1:]


@dataclass(frozen=True)
class HFSpec:
    """A method's form in a PEFT folder. The method takes ``targets``, ``overrides`` and ``dtype`` beside its fields.

    Attributes:
      peft_type: PEFT's name of the method, e.g. ``"LORA"``.
      tensors: those of every adapted module.
      fields: those of the configuration that the method depends on.
      when: fields and values that tell this method from others of the same ``peft_type``.
      task_type: the ``task_type`` without which PEFT does not compute the method; empty if it does without.
      given: fields that tell it apart by having a value at all.
      shared: tensors that all modules share.
      constants: fields that must have one value for this method; other values are rejected. None stands for "off".
      ignored: fields that say nothing about the function, such as settings of an initialization.
      bias: the value of ``bias`` for the biases of the adapted modules, e.g. ``"lora_only"``; empty if the type has no
        such field.
      tied: for methods that act on an embedding and on the head that is tied to it: a tensor of the head by name, and
        the tensor of the embedding that is its transpose.
      joins_parts: whether ``functions`` of the tensors join the leaves of a fused weight's parts.
      ties: whether PEFT itself changes a head with the embedding to which it is tied. ``tied`` tensors are then equal.
      beside: the field of configurations of other types by which their folders hold this method too: what its first
        field says, for all modules or by module; e.g. ``"trainable_token_indices"``.
      wrapper: what then stands before its tensors' names, e.g. ``"token_adapter."``.
      holds: the fields ``beside`` of other methods that folders of this type can have.
      saves: whether folders of this type can have ``modules_to_save``.
      copies: for a method that trains all leaves of its modules: what stands before their names, e.g.
        ``"ln_tuning_layers."``. It has no ``tensors``.
      role: the field by which folders of other types can hold the method too.
      parameters: the field that names parameters to adapt, e.g. ``"target_parameters"``; empty if the type has none.
      own_targets: whether the method's own fields say which modules it acts on, and its targets nothing.
      unpack: ``(tensors, config) -> tensors`` for a type that can write its tensors in a smaller form: all tensors by
        whole name, in the form that ``tensors`` declare. ``config`` has the type's fields. It raises ValueError.
      pack: ``(tensors, config) -> (tensors, config)``, its inverse: the tensors and the whole configuration to write.
      exported: ``(method, site, leaves) -> (method, leaves)``: the same function at a site in the form that PEFT has,
        for a configuration whose leaves, numpy arrays by name, are not those of ``tensors``.
      prompt: for a type whose tensors have no module, `EMBEDDINGS` or `KEYS_VALUES`; empty for another. The keys and
        values of all layers are one tensor, which leaves ``prefix_key`` and ``prefix_value`` hold at each.
      expanded: whether the tensors of a ``prompt`` hold what ``expand`` gives, not the leaves as they are stored.
      read: for a ``prompt``, ``(method, site, leaves) -> leaves``: a site's stored leaves from those of the tensors.
      read_as: for a type whose folders hold less than the method, the name of that which they hold.
      implied: fields of the method that have one value in every folder, without a field there.
    """

    peft_type: str
    tensors: tuple[Tensor, ...]
    fields: tuple[Field, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    task_type: str = ""
    shared: tuple[SharedTensor, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    bias: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    joins_parts: bool = False
    ties: bool = False
    beside: str = ""
    wrapper: str = ""
    holds: frozenset[str] = frozenset()
    saves: bool = True
    copies: str = ""
    role: Role | None = None
    parameters: str = ""
    own_targets: bool = False
    unpack: Callable[[Tensors, Mapping[str, Any]], Tensors] | None = None
    pack: Callable[[Tensors, Mapping[str, Any]], tuple[Tensors, Mapping[str, Any]]] | None = None
    exported: Callable[[Any, Site, Mapping[str, Any]], tuple[Any, Mapping[str, Any]]] | None = None
    prompt: str = ""
    expanded: bool = True
    read: Callable[[Any, Site, Tensors], Tensors] | None = None
    read_as: str = ""
    implied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def acts_on(self) -> str:
        """The kind of its sites: "weight" or "attention"."""
        return "attention" if any(ATTENTION in tensor.kinds for tensor in self.tensors) else "weight"

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the method's tensors within their modules."""
        copied = [f"{self.copies}{leaf}" for leaf in ("weight", "bias")] if self.copies else []
        return (*(tensor.key for tensor in self.tensors), *copied)

    @property
    def known(self) -> set[str]:
        """The fields of a configuration that the declaration covers."""
        own = {name for f in self.fields for name in (f.key, f.pattern) if name}
        return own | {*self.when, *self.constants, *self.ignored, *self.holds, *filter(None, [self.parameters])}


def form(method: type) -> HFSpec | Role | None:
    """The ``hf`` that a method class itself declares, or None.

    >>> from jpeft.methods.bitfit import BitFit
    >>> form(BitFit)
    <Role.BIAS: 'bias'>
    """
    return vars(method).get("hf")


def role(method: type) -> Role | None:
    """The field by which folders of other types hold a method, or None.

    >>> from jpeft.methods.train import Train
    >>> role(Train)
    <Role.MODULES_TO_SAVE: 'modules_to_save'>
    """
    declared = form(method)
    return declared.role if isinstance(declared, HFSpec) else declared
