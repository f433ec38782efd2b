"""The torch modules of sites, and torch's layout of base leaves, in pairs of inverse functions."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from jpeft.core.geometry.base import Parts
from jpeft.core.geometry.contraction import Contraction
from jpeft.core.geometry.convolution import Convolution
from jpeft.core.geometry.traced import Traced
from jpeft.core.interchange import (
    ATTENTION,
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    PARAMETER,
    SWAPPED,
    HFSpec,
    Tensor,
    is_stack,
    own_axes,
)
from jpeft.core.sites import MERGE, Site
from jpeft.hf.names import Names

_WEIGHT = ("kernel", "scale", "embedding")  # the names that Flax modules give to torch's "weight"


def check_site(site: Site, spec: HFSpec) -> Site:
    """Checks that a site corresponds to a torch module that PEFT can adapt, and returns it.

    Raises:
      ValueError: none can; the message says why.
    """
    if problem := _problem(site, spec):
        raise ValueError(f"{site.name!r} has no counterpart in HuggingFace PEFT: it {problem}")
    return site


def _problem(site: Site, spec: HFSpec) -> str:
    geometry, kind = site.geometry, kind_of(site)
    if any("." in part or "/" in part for part in site.path):
        return "has a '.' or '/' within the name of a module, which separates modules in torch"
    if site.named and not spec.parameters:
        return "is a parameter of no linear module"
    if site.stack:
        sizes = "×".join(str(n) for _, n in site.stack)
        return f"is stacked over {sizes} layers, each a torch module of its own; use the model without scan"
    if isinstance(geometry, Convolution) and (geometry.groups > 1 or geometry.transposed):
        return "is a grouped or transposed convolution, whose adapter in PEFT is another function"
    if site.lookup and site.via == MERGE and not spec.ties:
        return "is an embedding that the model also uses elsewhere, as a tied head: PEFT leaves that as it was"
    if kind == PARAMETER and spec.parameters:
        if not is_stack(site) and (site.batch or len(site.stored) != 2):
            parts = (
                f": set overrides={{{site.name!r}: {{'parts': {site.stored[0]}}}}}" if is_stack(as_stack(site)) else ""
            )
            return f"is a parameter {list(site.stored)}, neither one matrix nor a stack, one for each expert{parts}"
    elif isinstance(geometry, Parts):
        if not spec.joins_parts or not isinstance(geometry.inner, Contraction | Traced) or geometry.inner.batch:
            return f"is split into parts, which {spec.peft_type} has not"
    elif site.batch:
        return "is a batch of matrices"
    if kind not in {kind for tensor in spec.tensors for kind in tensor.kinds}:
        return f"is a module of another kind than {spec.peft_type} acts on: {kind}"
    return ""


def kind_of(site: Site) -> str:
    """The kind of torch module that a site is."""
    if site.kind == "attention":
        return ATTENTION
    if site.named or is_stack(site):
        return PARAMETER
    if site.lookup:
        return EMBEDDING
    return CONVOLUTION if isinstance(site.geometry, Convolution) else LINEAR


def as_stack(site: Site) -> Site:
    """A weight ``[experts, in, out]`` with leaves for each expert, also where all experts share their input."""
    own = own_axes(site)
    shared = len(own) == 3 and not site.batch and (site.inputs, site.outputs) == (own[1], own[0] * own[2])
    return site.split(own[0]) if shared else site


def module_of(names: Names, site: Site) -> str:
    """The torch module of a weight or, for a bare parameter, its own name; for a leaf, its module."""
    return names.torch(site.path[:-1] if site.kind == "leaf" else tuple(site.name.split("/")))


def tensors_at(site: Site, spec: HFSpec, stored: Collection[str], swapped: bool = False) -> list[Tensor]:
    """The tensors of a site's torch module, of those whose leaves are stored there."""
    kind = SWAPPED if swapped else kind_of(site)
    return [t for t in spec.tensors if kind in t.kinds and t.leaf in stored]


# --- base leaves that train -------------------------------------------------------------------------------------------


def leaf_name(leaf: str) -> str:
    """Torch's name of a parameter that Flax calls ``leaf``."""
    return "weight" if leaf in _WEIGHT else leaf


def leaf_suffix(names: Names, site: Site, adapted: Collection[str]) -> str:
    """A trained leaf's name within its module. PEFT moves an adapted module one level down."""
    moved = "base_layer." if names.torch(site.path[:-1]) in adapted else ""
    return moved + leaf_name(site.path[-1])


def _axes(site: Site) -> tuple[int, ...]:
    """The axes of a trained leaf in torch's order."""
    n, leaf = len(site.stored), site.path[-1]
    if leaf == "kernel" and (n == 2 or site.owner == "Conv"):
        return (n - 1, n - 2, *range(n - 2))
    if n <= 1 or (leaf == "embedding" and n == 2) or leaf not in (*_WEIGHT, "bias"):
        return tuple(range(n))
    raise ValueError(
        f"{site.name!r} {list(site.stored)} of {site.owner or 'this model'} has no counterpart in HuggingFace PEFT: "
        "modules_to_save hold the weights of linear layers, convolutions, embeddings and norms"
    )


def leaf_shape(site: Site) -> tuple[int, ...]:
    """The shape of a trained leaf in a file."""
    return tuple(site.stored[axis] for axis in _axes(site))


def leaf_to_torch(site: Site, leaf: np.ndarray) -> np.ndarray:
    """A trained leaf as in a file. Inverse of `leaf_to_tree`."""
    return np.transpose(leaf, _axes(site))


def leaf_to_tree(site: Site, tensor: np.ndarray) -> np.ndarray:
    """A trained leaf from a file. Inverse of `leaf_to_torch`."""
    return np.transpose(tensor, np.argsort(_axes(site)))
