"""Bottleneck adapters after both sublayers (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).

h <- h + s (f(h D + d) U + u)        D: [features, size], U: [size, features]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jpeft.methods.families.bottleneck import SequentialBottleneck
from jpeft.methods.families.sublayers import BOTH


@dataclass(frozen=True, kw_only=True)
class Houlsby(SequentialBottleneck):
    """Bottlenecks after both sublayers, attention and feed-forward: AdapterHub's "double_seq_bn".

    A `jpeft.Bottleneck` with other defaults; its fields and leaves are the same.

    Attributes:
      sublayers: by default "both".
      activation: by default "swish".
      targets, reduction, size, scale, gating, dropout, init_weights, init_std, dtype: see `jpeft.Bottleneck`.
      original_ln_before, ln_before, ln_after, adapter_residual_before_ln, exclude, overrides: see `jpeft.Bottleneck`.

    >>> import jpeft
    >>> method = jpeft.methods.Houlsby(reduction=16)
    """

    sublayers: str = BOTH
    activation: str = "swish"

    paper: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
