"""The field of HuggingFace configurations for dropout on the input of an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpeft.checks import RATE
from jpeft.core.interchange import Field
from jpeft.core.sites import FUSED, Site


def dropout_field(key: str) -> Field:
    """The field of a PEFT configuration that holds a method's ``dropout``."""
    return Field(key, "dropout", 0.0, RATE, read=_read, write=write_dropout)


def _read(rate: float, site: Site | None) -> float:
    return rate if site is None or _drops(site) else 0.0


def write_dropout(method: Any, site: Site, config: Mapping[str, Any]) -> float | None:
    """PEFT's value at a site; None where it drops nothing."""
    return method.dropout if _drops(site) else None


def _drops(site: Site) -> bool:
    """Whether a site's input can be dropped: PEFT drops nothing before an embedding, and a box has no input."""
    return site.via == FUSED and not site.lookup
