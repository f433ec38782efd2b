"""Bottleneck adapters after a sublayer (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247; Houlsby et al. 2019).

h <- h + B(h)                    B(h) = s (f(h D + d) U + u),  D: [features, size], U: [size, features]
y <- LN(x + B(LN(x)))            at a norm LN after a residual connection x, with ``original_ln_before``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jpeft.methods.families.bottleneck import SequentialBottleneck


@dataclass(frozen=True, kw_only=True)
class Bottleneck(SequentialBottleneck):
    """A small two-layer network after a sublayer, before the model's own residual connection.

    By default it is at the feed-forward sublayers, which are found by the names of modules: ``output/dense`` in BERT,
    ``mlp`` in Llama. AdapterHub's "seq_bn" (Pfeiffer's adapter) is this in models whose norms are before sublayers; in
    BERT, it is this with ``original_ln_before``.

    Attributes:
      targets: paths of modules, e.g. ``r".*/layer/[0-9]+/output/dense"``.
      sublayers: the sublayers that it acts at where ``targets`` is None: "feed_forward", "attention" or "both".
      original_ln_before: whether the targets are norms that follow a residual connection, as BERT's
        ``output/LayerNorm``. The network then sees the norm's output, and is added to its input: AdapterHub's
        ``original_ln_before`` with its default ``original_ln_after`` and ``residual_before_ln``. Without the norm after
        it (``original_ln_after=False``), it is a plain bottleneck whose targets are the norms. The forms that add the
        sublayer's own residual a second time have no counterpart: a norm sees only the sum.
      reduction: features / size, if ``size`` is None; below 1, the network widens.
      size: width of the bottleneck.
      activation: f, a name in HuggingFace's models: "relu", "gelu", "gelu_new", "silu" (or "swish"), "tanh", ….
      scale: s, a number; "learned" for one that trains, "channel" for one of each feature; both start at 1.
      ln_before, ln_after: whether there is a layer norm of its own before D, and one after U.
      adapter_residual_before_ln: whether ``ln_after`` normalizes the sum h + B(h), rather than B(h) alone.
      gating: whether B(h) is multiplied by a learned gate, the mean over a row of all its positions (UniPELT).
      dropout: the rate on B(h), while the caller trains.
      init_weights: "identity": D is normal with ``init_std``, U zero; "mam_adapter": D is uniform in ±1/sqrt(features),
        U zero; "bert": both are normal with ``init_std``; "houlsby": both are normal with 0.01, cut off at twice that.
        The last two, AdapterHub's default and Houlsby's, change the model's outputs from the start.
      init_std: a standard deviation.
      dtype: dtype of the leaves.
      exclude, overrides: see `Method`.

    Leaves at a site: ``bottleneck_down [features, size]``, ``bottleneck_down_bias [size]``,
    ``bottleneck_up [size, features]``, ``bottleneck_up_bias [features]``; where they are asked for,
    ``bottleneck_scale``, ``bottleneck_gate [features, 1]`` and ``bottleneck_gate_bias``, and the scale and bias of
    ``bottleneck_ln_before`` and ``bottleneck_ln_after``.

    >>> import jpeft
    >>> method = jpeft.Bottleneck(targets=r".*/output/dense", reduction=16)
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2005.00247"
