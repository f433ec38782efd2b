"""BitFit: training of the biases alone (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199).

y = x W + b           b is trained, W is frozen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jpeft.core.interchange import BIAS, HFSpec, Role
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import Targets
from jpeft.methods.base import LeafMethod


@dataclass(frozen=True, kw_only=True)
class BitFit(LeafMethod):
    """Trains the leaves called ``bias``.

    Attributes:
      targets: paths of biases or of modules around them; by default all.
      exclude, overrides: see `Method`.

    >>> import jpeft
    >>> every, some = jpeft.BitFit(), jpeft.BitFit(targets=r".*/attention/.*")
    """

    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    hf: ClassVar[HFSpec | Role | None] = BIAS
    learning_rate: ClassVar[float] = 2e-3

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return [s for s in survey.leaves if s.path[-1] == "bias"]

    def default_targets(self) -> Targets:
        return r".*"
