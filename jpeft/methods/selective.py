"""Selective methods: the adapter holds copies of base leaves, which train in their place.

`Train` names any leaves; `BitFit` (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199) trains the biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jpeft.methods.base import LeafMethod
from jpeft.sites import Site
from jpeft.survey import Survey
from jpeft.targets import Targets


@dataclass(frozen=True)
class Train(LeafMethod):
    """Trains base leaves: all below an owner that ``targets`` names, or leaves by their full path.

    >>> import jpeft
    >>> head, norms = jpeft.Train(r"classifier"), jpeft.Train(r".*/LayerNorm/(scale|bias)")
    """

    targets: Targets = field(default=None, kw_only=False)

    def __post_init__(self) -> None:
        if self.targets is None:
            raise ValueError('Train needs a target, e.g. Train(r"classifier") or Train(r".*/bias")')
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class BitFit(LeafMethod):
    """Trains the leaves called ``bias``: all of them, or those that ``targets`` names.

    >>> import jpeft
    >>> every, some = jpeft.BitFit(), jpeft.BitFit(targets=r".*/attention/.*")
    """

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return [s for s in survey.leaves if s.path[-1] == "bias"]

    def default_targets(self) -> Targets:
        return r".*"
