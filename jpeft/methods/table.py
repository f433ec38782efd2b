"""The table of methods: what each does and acts on, and how many parameters it trains on a model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.core.interchange import HFSpec, form
from jpeft.core.sites import Site
from jpeft.methods.base import AttentionMethod, LeafMethod, Method, OutputMethod, WeightMethod

_ACTS_ON = (
    (WeightMethod, "weights"),
    (OutputMethod, "a module's output"),
    (AttentionMethod, "an attention's keys and values"),
    (LeafMethod, "base leaves"),
)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
      name: its class's name.
      family: the kind of method, such as "low rank".
      does: what it does, in a line.
      paper: the address of its paper; empty if it has none.
      acts_on: the kind of place in a model that it acts on.
      merges: "yes", "no", or "where there is a bias".
      hf: the name of its form in folders of HuggingFace PEFT; empty if there is none.
      learning_rate: the peak learning rate that `jpeft finetune` takes for it by default.
      parameters: the number of parameters that it trains on a model by default; None without a model, or if the method
        needs arguments to act on it.
    """

    name: str
    family: str
    does: str
    paper: str
    acts_on: str
    merges: str
    hf: str
    learning_rate: float
    parameters: int | None = None


class Table(tuple[Row, ...]):
    """Rows that are shown as a table."""

    def __repr__(self) -> str:
        columns = ["method", "family", "parameters", "merges", "HuggingFace PEFT", "acts on"]
        rows = [[r.name, r.family, _count(r.parameters), r.merges, r.hf, r.acts_on] for r in self]
        if all(row.parameters is None for row in self):
            columns, rows = columns[:2] + columns[3:], [row[:2] + row[3:] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [columns, ["-" * width for width in widths], *rows]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table(methods: Mapping[str, type[Method]], model: Any, params: Any, inputs: Any, kwargs: Any) -> Table:
    """The rows of some methods by name. With a model, the parameters that each trains on it by default."""
    count = _counter(model, params, inputs, kwargs) if model is not None else lambda cls: None
    rows = [
        Row(
            name=name,
            family=cls.family,
            does=(inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").rstrip("."),
            paper=cls.paper,
            acts_on=next((acts_on for base, acts_on in _ACTS_ON if issubclass(cls, base)), ""),
            merges=merges(cls),
            hf=_form_name(cls),
            learning_rate=cls.learning_rate,
            parameters=count(cls),
        )
        for name, cls in sorted(methods.items(), key=lambda item: (item[1].family, item[0].lower()))
    ]
    return Table(rows)


def merges(cls: type[Method]) -> str:
    """Whether a method merges into the weights by default: "yes", "no", or "where there is a bias".

    >>> from jpeft.methods.bitfit import BitFit
    >>> merges(BitFit)
    'yes'
    """
    method = _default(cls) or object.__new__(cls)  # without the arguments that it needs, which change nothing of this
    with_bias, without = (method.mergeable(Site((), "weight", bias=bias)) for bias in (True, False))
    return "yes" if without else "where there is a bias" if with_bias else "no"


def _default(cls: type[Method]) -> Method | None:
    try:
        return cls()
    except (TypeError, ValueError):  # it needs arguments
        return None


def _form_name(cls: type[Method]) -> str:
    declared = form(cls)
    return declared.peft_type if isinstance(declared, HFSpec) else declared.value if declared else ""


def _counter(model: Any, params: Any, inputs: Any, kwargs: Any) -> Any:
    from jpeft.binding import bind_survey, survey_model

    survey = survey_model(model, params, inputs, kwargs)

    def count(cls: type[Method]) -> int | None:
        if (method := _default(cls)) is None:
            return None
        try:
            peft = bind_survey(method, model, params, survey)
        except ValueError:  # nothing to act on, or sizes that do not divide
            return None
        sizes = dict(peft.structure)
        return sum(math.prod(sizes[path][0]) for path in sizes.keys() - peft.non_trainable_paths)

    return count


def _count(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters:,}"
