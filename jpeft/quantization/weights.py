"""The weights of a tree as `jpeft.quantize` sees them: by name or, given the model, by their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jpeft.binding import survey_model
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized
from jpeft.core.sites import BOX, HEAD_NAMES, MERGE, Site
from jpeft.core.tree import Path, Tree, flatten, join, peek

_MERGED = "the model reads it through a function of its parameters, which would see codes"
_UNKNOWN = "the Peft does not act on it, and so does not tell whether the model would see codes; give the model"


@dataclass(frozen=True)
class Weight:
    """A leaf as targets see it.

    Attributes:
      path: its path.
      leaf: the array, without a box.
      site: how the model uses it; None if that is not known, or if it is no weight of two or more axes in a layer.
      surveyed: whether the model was looked at.
      unused: whether it was, and did not use the leaf.
      problem: why the model cannot run on it quantized, as the end of an error message; or None.
    """

    path: Path
    leaf: Any
    site: Site | None = None
    surveyed: bool = False
    unused: bool = False
    problem: str | None = None

    @property
    def name(self) -> str:
        return join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, join(self.path[:-1])

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes along which its layers are stacked, as far as they are known."""
        return tuple(axis for axis, _ in self.site.stack) if self.site is not None else ()

    @property
    def is_vector(self) -> bool:
        """Whether its name is that of a vector, which makes it a stack of vectors if it has two axes."""
        return self.path[-1] in ("bias", "scale")

    @property
    def is_matrix(self) -> bool:
        """Whether it is floating and has two or more axes longer than one."""
        sizes = list(self.leaf.shape)
        for axis in self.stack:
            sizes.pop(axis)
        is_floating = jnp.issubdtype(self.leaf.dtype, jnp.floating)
        return is_floating and not self.is_vector and sum(size != 1 for size in sizes) >= 2

    @property
    def linear(self) -> bool:
        """Whether it is quantized by default."""
        if self.surveyed:
            return self.site is not None and self.site.linear and self.problem is None
        return self.path[-1] == "kernel" and not self._has_name_of_head

    @property
    def expected(self) -> bool:
        """Whether a user would expect it to be quantized by default: a matrix, no embedding and no head."""
        if not self.is_matrix or isinstance(self.leaf, Quantized) or "embed" in self.path[-1]:
            return False
        if self.site is not None:
            return not self.site.lookup and not self.site.head
        return not self._has_name_of_head and (self.unused or not self.surveyed)

    @property
    def _has_name_of_head(self) -> bool:
        return self.path[-1] == "kernel" and bool(HEAD_NAMES & set(self.path[-2:-1]))


def weights_of(tree: Tree) -> list[Weight]:
    """The leaves of a tree, by name.

    Raises:
      TypeError: a leaf is not an array.
    """
    leaves = flatten(tree)
    for path, leaf in leaves.items():
        if not hasattr(peek(leaf), "shape"):
            raise TypeError(f"{join(path)} is a {type(leaf).__name__}, expected an array")
    return [Weight(path, peek(leaf)) for path, leaf in leaves.items()]


def surveyed_weights(
    tree: Tree, params: Tree, model: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Weight]:
    """The leaves of a tree, as a model uses them.

    Args:
      tree: the parameters.
      params: the parameters, or all variables of the model.
      model: a Linen module, or a Peft that was bound to one.
      inputs: of the call of a module.
      kwargs: of the call of a module.

    Raises:
      TypeError: ``model`` is neither, or a Peft with inputs.
      ValueError: the parameters are not those of the model.
    """
    if isinstance(model, Peft):
        if inputs or kwargs:
            raise TypeError("quantize got a Peft and inputs; a Peft was bound with inputs, only a module needs them")
        sites, unknown = model.weights, _UNKNOWN
        opened = {action.site.weight_path for action in model.actions if action.site.via == BOX}
        unused = set(model.left_alone) - {join(site.weight_path) for site in sites}
    else:
        survey = survey_model(model, params, tuple(inputs), kwargs)
        sites, unknown = survey.weights, _MERGED
        boxes = [site.weight_path for site in sites if site.via == BOX]
        opened = set(survey.boxable(boxes)) if boxes else set()
        unused = {join(path) for path in survey.unused}
    problems = {site.weight_path: _MERGED for site in sites if site.via == MERGE}
    problems |= {site.weight_path: unknown for site in sites if site.via == BOX and site.weight_path not in opened}
    by_path = {site.weight_path: site for site in sites}
    weights = weights_of(tree)
    _check_shapes({weight.path: tuple(weight.leaf.shape) for weight in weights}, by_path)
    return [Weight(w.path, w.leaf, by_path.get(w.path), True, w.name in unused, problems.get(w.path)) for w in weights]


def _check_shapes(shapes: Mapping[Path, tuple[int, ...]], sites: Mapping[Path, Site]) -> None:
    for path, site in sites.items():
        if shapes.get(path) != site.stored:
            what = f"have {join(path)!r} of shape {shapes[path]}" if path in shapes else f"lack {join(path)!r}"
            raise ValueError(f"params {what}; the model has it of shape {site.stored}")


def describe_left(left: Sequence[Weight]) -> str:
    """The text of a warning: the weights that stay unquantized, and the arguments that change it."""
    names = [weight.name for weight in left]
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    count = f"{len(names)} weight{'s' if len(names) > 1 else ''} of two or more axes unquantized: {listed}"
    if not left[0].surveyed:
        return (
            f"left {count}; without a model it takes what is named 'kernel': give it the model, "
            "jpeft.quantize(params, scheme, model, *inputs), or name them in targets= or exclude="
        )
    reason = next((f"; of {w.name}, {w.problem}" for w in left if w.problem), "")
    return f"left {count}, which the model does not show to be linear{reason}; name them in targets= or exclude="
