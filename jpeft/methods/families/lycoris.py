"""The fields that LoHa and LoKr have in common, and their form in HuggingFace PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jpeft.checks import BOOL, NONZERO, POSITIVE_INT, Rule, or_none
from jpeft.core.interchange import Field, window
from jpeft.core.sites import Site


@dataclass(frozen=True, kw_only=True)
class LyCORIS:
    """The fields of a method of the LyCORIS library (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).

    A method inherits them beside `WeightMethod`, and documents them.
    """

    rank: int = 8
    alpha: float | None = None
    effective_conv: bool = False
    dtype: Any = "float32"

    family: ClassVar[str] = "low rank"
    per_site: ClassVar[tuple[str, ...]] = ("rank", "alpha", "effective_conv", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {
        "rank": POSITIVE_INT, "alpha": or_none(NONZERO), "effective_conv": BOOL
    }  # fmt: skip

    @property
    def scale(self) -> float:
        """s, the factor on the update."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def splits(self, site: Site) -> bool:
        """Whether factors of a site's kernel are split over channels and positions."""
        return self.effective_conv and math.prod(window(site)) > 1


def _write_alpha(method: LyCORIS, site: Site, config: Mapping[str, Any]) -> float:
    return method.rank if method.alpha is None else method.alpha


def _write_effective(method: LyCORIS, site: Site, config: Mapping[str, Any]) -> bool | None:
    return method.effective_conv if math.prod(window(site)) > 1 else None


FIELDS = (
    Field("r", "rank", 8, POSITIVE_INT, pattern="rank_pattern"),
    Field("alpha", "alpha", 8, NONZERO, pattern="alpha_pattern", write=_write_alpha),
    Field("use_effective_conv2d", "effective_conv", False, BOOL, write=_write_effective),
)
DROPOUTS = {"rank_dropout": 0.0, "module_dropout": 0.0}
