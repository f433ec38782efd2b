"""What a fine-tuning job is asked to do. Imports nothing heavy, so that the command line answers at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpeft.errors import UserError
from jpeft.recipes.assets import CONVERSATIONS, DATA, MODELS

CLASSIFY, CHAT = "classify", "chat"
DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("nf4", "int4", "int8", "fp8")  # of `jpeft.quantization`, which is not imported here


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_COUNT = (_count, "at least 1")
_WHOLE = (lambda v: _count(v) or (v == 0 and not isinstance(v, bool)), "a whole number")
_TEXT = (lambda v: v is None or isinstance(v, str), "a text")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "task": (lambda v: v in (CLASSIFY, CHAT), f"{CLASSIFY} or {CHAT}"),
    **dict.fromkeys(("model", "data", "method"), (lambda v: isinstance(v, str), "a text")),
    **dict.fromkeys(("eval", "text", "label", "targets"), _TEXT),
    **dict.fromkeys(("epochs", "batch_size", "max_length", "checkpoint_every", "accumulate"), _COUNT),
    **dict.fromkeys(("steps", "eval_every"), (lambda v: v is None or _count(v), "at least 1")),
    "keep": (lambda v: v in ("last", "best"), "last or best"),
    **dict.fromkeys(("eval_examples", "samples"), _WHOLE),
    "quantize": (lambda v: v in (*SCHEMES, "none"), f"none, {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}"),
    "dtype": (lambda v: v in DTYPES, f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"),
    "packed": (lambda v: isinstance(v, bool), "true or false"),
    "lr": (lambda v: v is None or (_number(v) and v > 0), "a positive number"),
    "warmup": (lambda v: _number(v) and 0 <= v < 1, "a share of the steps in [0, 1)"),
    "weight_decay": (lambda v: _number(v) and v >= 0, "a number, at least 0"),
    "seed": (lambda v: isinstance(v, int) and 0 <= v < 2**32, "a whole number in [0, 2^32)"),
    "settings": (lambda v: isinstance(v, Mapping), "fields by name"),
}

# What each method wants as a peak; those not listed take LoRA's.
LEARNING_RATES: Mapping[str, float] = {"full": 1e-4, "train": 1e-4, "ia3": 5e-3, "prefix": 5e-3, "bitfit": 2e-3}


# What a field is where nobody says, by task. An evaluation on 0 examples is one on all.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    CLASSIFY: {"model": "minilm", "data": "food-reviews", "epochs": 2, "batch_size": 16, "max_length": 128,
               "steps": None, "eval_examples": 0, "samples": 0, "quantize": "none", "checkpoint_every": 50},
    # Minutes on two cores: a part of an epoch, and of the examples to evaluate on.
    CHAT: {"model": "smollm2", "data": "gsm8k", "epochs": 1, "batch_size": 2, "max_length": 512,
           "steps": 60, "eval_examples": 64, "samples": 4, "quantize": "nf4", "checkpoint_every": 20},
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All that decides what a run computes. `None` is the method's, the data's or the job's own default.

    A field that differs by task is filled from `DEFAULTS` where it is not given.

    >>> Config(rank=16, targets="query,value").rate, Config().model, Config(task="chat").model
    (0.0005, 'minilm', 'smollm2')
    """

    task: str = CLASSIFY
    model: str = None  # type: ignore[assignment]  # filled below, as all that are None here
    data: str = None  # type: ignore[assignment]
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
    epochs: int = None  # type: ignore[assignment]
    steps: int | None = None
    batch_size: int = None  # type: ignore[assignment]
    accumulate: int = 1
    max_length: int = None  # type: ignore[assignment]
    packed: bool = True
    quantize: str = None  # type: ignore[assignment]
    dtype: str = "float32"
    eval_examples: int = None  # type: ignore[assignment]
    eval_every: int | None = None
    keep: str = "last"
    samples: int = None  # type: ignore[assignment]
    seed: int = 0
    checkpoint_every: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # Own data or epochs that were asked for are not cut short by the demonstration's budget.
        whole = self.task == CHAT and (self.data not in (None, *CONVERSATIONS) or self.epochs is not None)
        for name, value in DEFAULTS.get(self.task, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, None if name == "steps" and whole else value)
        for name, (good, expected) in _RULES.items():
            value = getattr(self, name)
            if not good(value):
                raise UserError(f"{flag(name)} must be {expected}, got {value!r}")
        if self.task == CLASSIFY and (not self.packed or self.samples):
            raise UserError(
                f"{flag('samples' if self.packed else 'packed')} is for --task {CHAT}, not for labels of texts"
            )
        if self.batch_size % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}")

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

        >>> Config(lr=1e-3).conflict({"lr": 1e-2}), Config().conflict({"lr": 5e-4})
        ('lr', None)
        """
        mine = {"lr": self.rate} if self.lr is None else {}
        return next((n for n, v in given.items() if _locate(n, v) != mine.get(n, getattr(self, n))), None)


_PATHS: Mapping[str, Mapping[str, Any]] = {"model": MODELS, "data": {**DATA, **CONVERSATIONS}, "eval": {}}


def _locate(name: str, value: Any) -> Any:
    if name not in _PATHS or value is None or value in _PATHS[name]:
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value  # else an id on the hub


@dataclass(frozen=True)
class Setup:
    """Where and how a run is carried out: what does not change what it computes, and may differ when it is resumed.

    Attributes:
        mesh: a `jax.sharding.Mesh` to train on, of axes that `jpeft.shard` knows; None is one device.
        tensorboard: also write what is logged as TensorBoard events, to `RUN/tensorboard`.
        profile: the first step and how many to trace with `jax.profiler`, to `RUN/profile`.
        remat: what a language model's backward pass computes again, see `jpeft.models.decoder.Decoder`.

    >>> Setup(profile=(10, 3)).mesh is None
    True
    """

    mesh: Any = None
    tensorboard: bool = False
    profile: tuple[int, int] | None = None
    remat: str | None = None


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
    special = {"settings": "--set", "packed": "--no-packing"}
    return special.get(name, f"--{name.replace('_', '-')}")


def parse_targets(text: str) -> str | list[str]:
    """Targets as typed: a regular expression if it has a sign of one, else names separated by commas.

    >>> parse_targets("query,value"), parse_targets(".*/query"), parse_targets("all-linear")
    (['query', 'value'], '.*/query', 'all-linear')
    """
    if text == "all-linear" or any(sign in text for sign in "*+?()[]{}|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
