"""Adapters of HuggingFace PEFT that `tests/parity/test_methods_torch.py` moves from torch to jpeft and back.

A module here holds the cases of a few methods, ``CASES: dict[str, Case]``. To run one: ``-k "<part of its name>"``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TARGETS = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True)
class Case:
    """A configuration of PEFT, tried on each of some bases.

    The matrices of `TARGETS` are, in x out, 32 x 32, 32 x 32 and 32 x 64 in the BERT, and 32 x 32, 32 x 16 and 64 x 32
    in the Llama.

    Attributes:
      method: the class of jpeft that the folder must be read as; of a chain, the first member.
      config: PEFT's configuration, from the names of the modules to adapt.
      bases: "bert" (an encoder without a pooler) and "llama" (stacked layers).
      targets: other modules to adapt, by base.
      merges: whether merged weights must give the same outputs.
      scale: the standard deviation of what is added to every tensor that trains.
      differ: fields of the configuration that jpeft writes otherwise, with a reason in a comment.
      extra_keys: endings of tensors that PEFT writes and jpeft leaves out, such as copies of shared ones.
      missing_keys: endings of names that PEFT misses in its own folders too, as a model holds shared ones many times.
    """

    method: str
    config: Callable[[list[str]], Any]
    bases: tuple[str, ...] = ("bert", "llama")
    targets: dict[str, list[str]] = field(default_factory=dict)
    merges: bool = True
    scale: float = 0.1
    differ: tuple[str, ...] = ()
    extra_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()


def collect() -> list[tuple[str, str, Case]]:
    """All cases: name, base, case."""
    out = []
    for module in pkgutil.iter_modules(__path__):
        cases = importlib.import_module(f"{__name__}.{module.name}").CASES
        out += [(name, base, case) for name, case in cases.items() for base in case.bases]
    return out
