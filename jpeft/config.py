"""What a fine-tuning job is asked to do. Imports nothing heavy, so that the command line answers at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpeft.assets import DATA, MODELS, UserError

# What each method wants as a peak; those not listed take LoRA's.
LEARNING_RATES: Mapping[str, float] = {"full": 1e-4, "train": 1e-4, "ia3": 5e-3, "prefix": 5e-3, "bitfit": 2e-3}


@dataclass(frozen=True)
class Config:
    """All that decides what a run computes. `None` is the method's, the data's or the job's own default.

    >>> Config(rank=16, targets="query,value").rate
    0.0005
    """

    model: str = "minilm"
    data: str = "food-reviews"
    eval: str | None = None
    text: str | None = None
    label: str | None = None
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    epochs: int = 2
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        rules = {
            "lr": (self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "a positive number"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "max_length": (self.max_length >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2^32)"),
            "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise UserError(f"{flag(name)} must be {expected}, got {getattr(self, name)}")

    @property
    def rate(self) -> float:
        """The peak learning rate.

        >>> Config().rate, Config(method="ia3").rate, Config(lr=0.1).rate
        (0.0005, 0.005, 0.1)
        """
        return LEARNING_RATES.get(self.method.lower(), 5e-4) if self.lr is None else self.lr

    def located(self) -> Config:
        """The same with absolute paths, so that it holds from any working folder.

        >>> Config(data="/data/../train.csv").located().model
        'minilm'
        """
        found = {name: _locate(name, getattr(self, name)) for name in _PATHS}
        return dataclasses.replace(self, **found)

    def conflict(self, given: Mapping[str, Any]) -> str | None:
        """The first of the given fields that asks for something else than this configuration, if one does.

        >>> Config(lr=1e-3).conflict({"lr": 1e-2})
        'lr'
        """
        return next((name for name, value in given.items() if _locate(name, value) != getattr(self, name)), None)


_PATHS: Mapping[str, Mapping[str, Any]] = {"model": MODELS, "data": DATA, "eval": {}}


def _locate(name: str, value: Any) -> Any:
    if name not in _PATHS or value is None or value in _PATHS[name]:
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value  # else an id on the hub


class Interrupted(Exception):
    """A signal stopped the run, which is saved up to a step (0: not yet). `number` is the signal's."""

    def __init__(self, number: int, step: int, run: Path):
        super().__init__(number, step, run)
        self.number, self.step, self.run = number, step, run


def flag(name: str) -> str:
    """A field of `Config` as typed on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--set" if name == "settings" else f"--{name.replace('_', '-')}"


def parse_targets(text: str) -> str | list[str]:
    """Targets as typed: a regular expression if it has a sign of one, else names separated by commas.

    >>> parse_targets("query,value"), parse_targets(".*/query"), parse_targets("all-linear")
    (['query', 'value'], '.*/query', 'all-linear')
    """
    if text == "all-linear" or any(sign in text for sign in "*+?()[]{}|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
