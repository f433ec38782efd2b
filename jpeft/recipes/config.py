"""The configuration of a fine-tuning run. Imports nothing heavy, so that the command line starts fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpeft.checks import Rule, is_int, is_number, is_positive_int, is_rate, or_none
from jpeft.errors import UserError
from jpeft.recipes.assets import CONVERSATIONS, DATA, MODELS

CLASSIFY, CHAT = "classify", "chat"
DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("nf4", "int4", "int8", "fp8")  # of `jpeft.quantization`, which is not imported here

# Defaults that differ by task. 0 evaluation examples are all of them.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    CLASSIFY: {
        "model": "minilm",
        "data": "food-reviews",
        "epochs": 2,
        "batch_size": 16,
        "max_length": 128,
        "steps": None,
        "eval_examples": 0,
        "samples": 0,
        "quantize": "none",
        "checkpoint_every": 50,
    },
    # Minutes on two cores: a part of an epoch, and a part of the evaluation examples.
    CHAT: {
        "model": "smollm2",
        "data": "gsm8k",
        "epochs": 1,
        "batch_size": 2,
        "max_length": 512,
        "steps": 60,
        "eval_examples": 64,
        "samples": 4,
        "quantize": "nf4",
        "checkpoint_every": 20,
    },
}
# Fields that a task does not use, and the only value that they may have.
_UNUSED: Mapping[str, Mapping[str, Any]] = {
    CLASSIFY: {"packed": True, "samples": 0, "chat_template": None, "ignore_keys": None, "untie_head": False}
}
# Peak learning rates by method; the others take that of LoRA.
LEARNING_RATES: Mapping[str, float] = {"full": 1e-4, "train": 1e-4, "ia3": 5e-3, "prefix": 5e-3, "bitfit": 2e-3}


def _one_of(names: Collection[str]) -> Rule:
    *first, last = names
    return lambda value: isinstance(value, str) and value in names, f"{', '.join(first)} or {last}"


_COUNT: Rule = (is_positive_int, "at least 1")
_COUNT_OR_DEFAULT: Rule = (lambda value: value is None or is_positive_int(value), "at least 1")
_SIZE: Rule = (lambda value: is_int(value) and value >= 0, "an integer, at least 0")
_TEXT: Rule = (lambda value: isinstance(value, str), "a text")
_SEED: Rule = (lambda value: is_int(value) and 0 <= value < 2**32, "an integer in [0, 2^32)")
_RULES: Mapping[str, Rule] = {
    "task": _one_of(DEFAULTS),
    **dict.fromkeys(("model", "data"), _TEXT),
    **dict.fromkeys(
        ("method", "adapter", "eval", "text", "label", "targets", "chat_template", "ignore_keys"), or_none(_TEXT)
    ),
    **dict.fromkeys(("epochs", "batch_size", "max_length", "checkpoint_every", "accumulate"), _COUNT),
    **dict.fromkeys(("steps", "eval_every"), _COUNT_OR_DEFAULT),
    "keep": _one_of(("last", "best")),
    **dict.fromkeys(("eval_examples", "samples", "resize_embeddings"), _SIZE),
    "quantize": _one_of(("none", *SCHEMES)),
    "dtype": _one_of(DTYPES),
    "head": _one_of(("folder", "new")),
    **dict.fromkeys(("packed", "untie_head"), (lambda value: isinstance(value, bool), "true or false")),
    "lr": (lambda value: value is None or (is_number(value) and value > 0), "a positive number"),
    "warmup": (is_rate, "a share of the steps in [0, 1)"),
    "weight_decay": (lambda value: is_number(value) and value >= 0, "a number, at least 0"),
    "seed": _SEED,
    "head_seed": or_none(_SEED),
    "settings": (lambda value: isinstance(value, Mapping), "fields by name"),
}


@dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on. None selects the default of the method, the data or the task.

    Fields in `DEFAULTS` that are not given take the task's default.

    >>> Config(rank=16, targets="query,value").rate, Config().model, Config(task="chat").model
    (0.0005, 'minilm', 'smollm2')
    """

    task: str = CLASSIFY
    model: str = None  # type: ignore[assignment]  # filled below, as all that are None here
    data: str = None  # type: ignore[assignment]
    eval: str | None = None
    text: str | None = None
    label: str | None = None
    chat_template: str | None = None
    ignore_keys: str | None = None
    adapter: str | None = None
    method: str = None  # type: ignore[assignment]  # that of the adapter to begin from, else "lora"
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
    head: str = "folder"  # of a classifier: that of the folder if it fits, or "new"
    resize_embeddings: int = 0  # a multiple to round the number of rows up to; 0 keeps the model's
    untie_head: bool = False
    eval_examples: int = None  # type: ignore[assignment]
    eval_every: int | None = None
    keep: str = "last"
    samples: int = None  # type: ignore[assignment]
    seed: int = 0
    head_seed: int | None = None  # of a classifier's untrained head, as it was for the adapter to begin from
    checkpoint_every: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.method is None and self.adapter is None:
            object.__setattr__(self, "method", "lora")
        # The demonstration's limit of steps must not cut other data short, or a given number of epochs.
        limited = self.data in (None, *CONVERSATIONS) and self.epochs is None
        for name, value in DEFAULTS.get(self.task, {}).items():
            if getattr(self, name) is None and (name != "steps" or limited):
                object.__setattr__(self, name, value)
        for name, (accepts, expected) in _RULES.items():
            value = getattr(self, name)
            if not accepts(value):
                raise UserError(f"{flag(name)} must be {expected}, got {value!r}")
        for name, value in _UNUSED.get(self.task, {}).items():
            if getattr(self, name) != value:
                raise UserError(f"{flag(name)} is for --task {CHAT}, not for --task {self.task}")
        if self.batch_size % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}")

    @property
    def rate(self) -> float:
        """The peak learning rate.

        >>> Config().rate, Config(method="ia3").rate, Config(lr=0.1).rate
        (0.0005, 0.005, 0.1)
        """
        return LEARNING_RATES.get((self.method or "").lower(), 5e-4) if self.lr is None else self.lr

    def located(self) -> Config:
        """The same configuration with absolute paths, which are valid from any working directory.

        >>> Config(data="/data/../train.csv").located().model
        'minilm'
        """
        found = {name: _locate(name, getattr(self, name)) for name in _PATHS}
        return dataclasses.replace(self, **found)

    def conflict(self, given: Mapping[str, Any]) -> str | None:
        """The name of the first given field that differs from this configuration, or None.

        >>> Config(lr=1e-3).conflict({"lr": 1e-2}), Config().conflict({"lr": 5e-4})
        ('lr', None)
        """
        own = dataclasses.asdict(self) | {"lr": self.rate}
        return next((name for name, value in given.items() if _locate(name, value) != own[name]), None)


_PATHS: Mapping[str, Mapping[str, Any]] = {
    "model": MODELS, "data": {**DATA, **CONVERSATIONS}, "eval": {}, "chat_template": {}, "adapter": {}
}  # fmt: skip


def _locate(name: str, value: Any) -> Any:
    if name == "chat_template" and value is not None:
        return read_chat_template(value)
    if name not in _PATHS or value is None or value in _PATHS[name]:
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value  # else an id on the hub


@dataclass(frozen=True)
class Setup:
    """Placement and execution of a run. It does not change the result, and may differ when a run is resumed.

    Attributes:
        mesh: a `jax.sharding.Mesh` to train on, with axes that `jpeft.shard` knows; None is one device.
        log_to: names of loggers that receive the metrics too, see `jpeft.recipes.loggers`.
        profile: the first step to trace with `jax.profiler`, and how many, to `RUN/profile`.
        remat: what a language model's backward pass recomputes, see `jpeft.models.decoder.Decoder`.

    >>> Setup(profile=(10, 3)).mesh is None
    True
    """

    mesh: Any = None
    log_to: tuple[str, ...] = ()
    profile: tuple[int, int] | None = None
    remat: str | None = None


class Interrupted(Exception):
    """A signal stopped a run.

    Attributes:
        number: the signal's number.
        step: the step that the run is saved up to; 0 if it has no checkpoint.
        run: the run folder.
    """

    def __init__(self, number: int, step: int, run: Path):
        super().__init__(number, step, run)
        self.number, self.step, self.run = number, step, run


def flag(name: str) -> str:
    """The command-line option of a field of `Config`.

    >>> flag("batch_size")
    '--batch-size'
    """
    special = {"settings": "--set", "packed": "--no-packing"}
    return special.get(name, f"--{name.replace('_', '-')}")


def read_chat_template(given: str) -> str:
    """A chat template from a file, or the text itself if it has Jinja's braces. A run records the text.

    >>> read_chat_template("{{ messages[0].content }}")
    '{{ messages[0].content }}'
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--chat-template {given}: {error.strerror}; expected a file with a Jinja template") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {given}: not UTF-8 (byte offset {error.start})") from error
    if "{{" not in text and "{%" not in text:
        raise UserError(f"--chat-template {given}: holds no Jinja template")
    return text


def parse_targets(text: str) -> str | list[str]:
    """Targets from the command line: a regular expression if it has a metacharacter, else comma-separated names.

    >>> parse_targets("query,value"), parse_targets(".*/query"), parse_targets("all-linear")
    (['query', 'value'], '.*/query', 'all-linear')
    """
    if text == "all-linear" or any(sign in text for sign in "*+?()[]{}|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
