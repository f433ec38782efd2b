"""Parallel adapters beside a sublayer (He et al. 2022, https://arxiv.org/abs/2110.04366).

y <- y + B(x)                    B(x) = s (f(x D + d) U + u),  x: the sublayer's input, y: its output
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from jpeft.core.method import Leaves, ModuleContext
from jpeft.core.sites import Site
from jpeft.methods.families.bottleneck import MAM, BottleneckMethod, layer_norm
from jpeft.methods.families.steps import Tokens
from jpeft.methods.families.sublayers import MODULE


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(BottleneckMethod):
    """A small two-layer network beside a module, from its input to its output.

    By default it is beside the feed-forward sublayers, which are found by the names of modules, such as ``mlp`` in
    Llama. The network sees what the module sees: in models whose norms are before sublayers, a normalized state where
    the target is ``mlp``, and the state itself where it is a module that normalizes inside, as T5's ``layer/1``. In
    BERT no module is a whole sublayer.

    Attributes:
      targets: paths of modules, e.g. ``r".*/mlp"``.
      sublayers: the sublayers that it acts at where ``targets`` is None: "feed_forward", "attention" or "both".
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

    reduction: float = 2
    scale: float | str = 4.0
    init_weights: str = MAM

    prefix: ClassVar[str] = "parallel"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.04366"

    @property
    def place(self) -> str:
        return MODULE

    def features(self, site: Site) -> int:
        return site.inputs

    def prepare(self, site: Site) -> Site:
        if not site.inputs:
            raise ValueError(
                f"{self.name}: {site.name!r} is a {site.owner} whose input is not floating; leave it out with "
                f"exclude=[{site.name!r}]"
            )
        return super().prepare(site)

    def change(self, leaves: Leaves, x: Any, y: Tokens, context: ModuleContext) -> Tokens:
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"{self.name} acts on modules with one output for each input, and one of its targets has inputs "
                f"{jnp.shape(x)} and outputs {y.shape}; leave it out of targets"
            )
        change = self.network(leaves, x.astype(y.dtype), context).reshape(y.shape)
        return layer_norm(change, self.own(leaves), "ln_after") if self.ln_after else change
