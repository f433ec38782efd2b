"""Parallel adapters beside a sublayer (He et al. 2022, https://arxiv.org/abs/2110.04366).

y <- y + B(x)                    B(x) = s (f(x D + d) U + u),  x: the sublayer's input, y: its output
y <- M(h, x + B(x))              at a module M that adds a residual connection x and normalizes, with ``residual``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jpeft.checks import BOOL, Rule
from jpeft.core.method import Leaves, ModuleContext
from jpeft.core.sites import Site
from jpeft.methods.families.bottleneck import MAM, BottleneckMethod, Tokens, layer_norm
from jpeft.methods.families.sublayers import ADD_NORM, MODULE


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(BottleneckMethod):
    """A small two-layer network beside a module, from its input to its output.

    By default it is beside the feed-forward sublayers, which are found by the names of modules, such as ``mlp`` in
    Llama. The network sees what the module sees: in models whose norms are before sublayers, a normalized state where
    the target is ``mlp``, and the state itself where it is a module that normalizes inside, as T5's ``layer/1``. In
    BERT no module is a whole sublayer: with ``residual``, the network is beside it all the same.

    Attributes:
      targets: paths of modules, e.g. ``r".*/mlp"``.
      sublayers: the sublayers that it acts at where ``targets`` is None: "feed_forward", "attention" or "both".
      residual: whether the targets are modules that get a sublayer's output and its input, add and normalize them, as
        BERT's ``output``. The network then sees their second floating input, and is added to it.
      reduction: features / size, if ``size`` is None; below 1, the network widens.
      size: width of the network.
      activation: f, a name in HuggingFace's models: "relu", "gelu", "silu", "tanh", ….
      scale: s, a number; "learned" for one that trains (AdapterHub's "scaled_par_bn"), "channel" for one of each
        feature; both start at 1.
      ln_before, ln_after: whether there is a layer norm of its own before D, and one after U.
      gating, dropout, init_weights, init_std, dtype: see `jpeft.Bottleneck`.
      exclude, overrides: see `Method`.

    Leaves at a site: those of `jpeft.Bottleneck`, called ``parallel_down [inputs, size]``, ….

    >>> import jpeft
    >>> method = jpeft.methods.ParallelAdapter(targets=r".*/mlp", scale="learned")
    """

    residual: bool = False
    reduction: float = 2
    scale: float | str = 4.0
    init_weights: str = MAM

    prefix: ClassVar[str] = "parallel"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.04366"
    rules: ClassVar[Mapping[str, Rule]] = {"residual": BOOL}

    @property
    def place(self) -> str:
        return ADD_NORM if self.residual else MODULE

    @property
    def feeds(self) -> bool:
        return self.residual

    def features(self, site: Site) -> int:
        return site.outputs if self.residual else site.inputs

    def prepare(self, site: Site) -> Site:
        if not site.inputs:
            raise ValueError(
                f"{self.name}: {site.name!r} is a {site.owner} whose input is not floating; leave it out with "
                f"exclude=[{site.name!r}]"
            )
        return super().prepare(site)

    def feed(self, leaves: Leaves, inputs: tuple[Array, ...], context: ModuleContext) -> tuple[Array, ...]:
        size = leaves["parallel_up"].shape[-1]
        if len(inputs) < 2 or inputs[1].shape[-1] != size:
            shapes = ", ".join(str(x.shape) for x in inputs)
            raise ValueError(
                f"{self.name}: with residual, targets are modules whose second floating input is a residual connection "
                f"of {size} features, and one of them gets {shapes or 'none'}"
            )
        first, residual, *others = inputs
        return first, residual + self._of(leaves, residual, context), *others

    def apply(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        return y if self.residual else super().apply(leaves, x, y, context)

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"{self.name} acts on modules with one output for each input, and one of its targets has inputs "
                f"{jnp.shape(x)} and outputs {y.shape}; leave it out of targets"
            )
        return self._of(leaves, x.astype(y.dtype), context).reshape(y.shape)

    def _of(self, leaves: Leaves, x: Tokens, context: ModuleContext) -> Tokens:
        """B(x)."""
        change = self.network(leaves, x, context)
        change = layer_norm(change, self.own(leaves), "ln_after") if self.ln_after else change
        return change.reshape(*x.shape[:-1], -1)
