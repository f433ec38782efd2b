"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199)."""

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
    """Trains the leaves called ``bias``: all of them, or those that ``targets`` names.

    >>> import jpeft
    >>> every, some = jpeft.BitFit(), jpeft.BitFit(targets=r".*/attention/.*")
    """

    hf: ClassVar[HFSpec | Role | None] = BIAS

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return [s for s in survey.leaves if s.path[-1] == "bias"]

    def default_targets(self) -> Targets:
        return r".*"
