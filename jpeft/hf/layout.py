"""How torch lays out what Flax keeps otherwise: LoRA factors and trained leaves, in pairs of inverse functions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jpeft.core.geometry import Convolution, Parts, Raw
from jpeft.core.sites import MERGE, Site

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_WEIGHT = ("kernel", "scale", "embedding")  # what Flax modules call torch's "weight"


def check_site(site: Site) -> Site:
    """The site, if a torch module with a LoRA can be like it.

    Raises:
      ValueError: it cannot; the message says why.
    """
    geometry = site.geometry
    why = ""
    if isinstance(geometry, Raw):
        why = "is a parameter of no linear module"
    elif site.stack:
        sizes = "×".join(str(n) for _, n in site.stack)
        why = f"is stacked over {sizes} layers, each a torch module of its own; use the model without scan"
    elif isinstance(geometry, Convolution) and (geometry.groups > 1 or geometry.transposed):
        why = "is a grouped or transposed convolution, whose LoRA in PEFT is another function"
    elif site.lookup and site.via == MERGE:
        why = "is an embedding that the model also uses elsewhere, as a tied head: PEFT leaves that as it was"
    elif site.batch and not (isinstance(geometry, Parts) and not geometry.inner.batch):
        why = "is a batch of matrices"
    if why:
        raise ValueError(f"{site.name!r} has no counterpart in HuggingFace PEFT: it {why}")
    return site


def parts(site: Site) -> int:
    """Into how many blocks of outputs a fused weight is split: there the rank in a file is that many times ours."""
    return site.geometry.parts if isinstance(site.geometry, Parts) else 1


def lora_shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a site in a file, by suffix: of ``rank`` in the file, which `parts` multiplies."""
    outputs = site.outputs * parts(site)
    if site.lookup:
        return dict(zip(EMBEDDING, ((rank, site.inputs), (outputs, rank)), strict=True))
    window = site.geometry.shape[:-2] if isinstance(site.geometry, Convolution) else ()
    shapes = ((rank, site.channels, *window), (outputs, rank, *(1 for _ in window)))
    return dict(zip(LINEAR, shapes, strict=True))


def lora_to_torch(site: Site, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """``lora_a [in, r]``, ``lora_b [r, out]`` as in a file. Inverse of `lora_to_tree`."""
    if parts(site) > 1:
        a, b = _joined(a, b)
    (suffix_a, shape_a), (suffix_b, shape_b) = lora_shapes(site, a.shape[-1]).items()
    # Rows of a are (place in the window, channel), torch's axes (rank, channel, window).
    a = np.moveaxis(a.reshape(*shape_a[2:], shape_a[1], -1), (-1, -2), (0, 1))
    return {suffix_a: a, suffix_b: b.T.reshape(shape_b)}


def lora_to_tree(site: Site, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `lora_to_torch`, for a site that is not split into parts."""
    a, b = (tensors[suffix] for suffix in (EMBEDDING if site.lookup else LINEAR))
    rank = a.shape[0]
    return {"lora_a": np.moveaxis(a, (0, 1), (-1, -2)).reshape(-1, rank), "lora_b": b.reshape(-1, rank).T}


def _joined(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[parts, in, r]`` and ``[parts, r, out]`` as one pair: A's side by side, B's along a diagonal."""
    count, rank, out = b.shape
    wide = np.zeros((count * rank, count * out), b.dtype)
    for i in range(count):
        wide[i * rank : (i + 1) * rank, i * out : (i + 1) * out] = b[i]
    return np.concatenate(list(a), axis=-1), wide


def leaf_name(leaf: str) -> str:
    """What torch calls a parameter that Flax calls ``leaf``."""
    return "weight" if leaf in _WEIGHT else leaf


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
    """Inverse of `leaf_to_torch`."""
    return np.transpose(tensor, np.argsort(_axes(site)))
