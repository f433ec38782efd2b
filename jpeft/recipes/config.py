"""The configuration of a fine-tuning run. Imports nothing heavy, so that the command line starts fast."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jpeft.checks import NUMBER, Rule, is_int, is_rate, is_size
from jpeft.errors import UserError
from jpeft.recipes import options
from jpeft.recipes.assets import CONVERSATIONS, DATA, MODELS
from jpeft.recipes.options import ANY_TEXT, MACHINES, MEMORY, METHOD, OUTPUT, TRAINING, WHAT, option
from jpeft.recipes.spelling import spelled
from jpeft.storage import absolute, as_path, is_remote, reason

CLASSIFY, CHAT = "classify", "chat"
Dtype = Literal["float32", "bfloat16", "float16"]
Scheme = Literal["nf4", "int4", "int8", "fp8"]  # of `jpeft.quantization`, which is not imported here
SCHEMES: tuple[str, ...] = typing.get_args(Scheme)
Remat = Literal["none", "full", "dots", "offload"]

_DEMONSTRATION_STEPS = 60  # of chat's own data, a part of an epoch: minutes on two cores
_COUNT: Rule = (is_size, "at least 1")
_SIZE: Rule = (lambda value: is_int(value) and 0 <= value < 2**31, "an integer, at least 0")
_SEED: Rule = (lambda value: is_int(value) and 0 <= value < 2**32, "an integer in [0, 2^32)")
_is_number = NUMBER[0]  # one of float32
_RATE: Rule = (lambda value: _is_number(value) and value > 0, "a positive number")
_DECAY: Rule = (lambda value: _is_number(value) and value >= 0, "a number, at least 0")
_SECONDS: Rule = (lambda value: _is_number(value) and value > 0, "seconds, above 0")
_TARGETS: Rule = (
    lambda value: (
        isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))
    ),
    "a text or a list of texts",
)
_SHARE: Rule = (is_rate, "a share of the steps in [0, 1)")


def _are_settings(value: Any) -> bool:
    """Whether a value is fields by name that a run's config.json can hold."""
    try:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and bool(json.dumps(value))
    except (TypeError, ValueError, RecursionError):  # a date, say, or a mapping within itself
        return False


_SETTINGS: Rule = (_are_settings, "fields by name, with texts, numbers, true, false or lists of them")


def _by_task(classify: Any, chat: Any) -> Mapping[str, Any]:
    return {CLASSIFY: classify, CHAT: chat}


def _method_names() -> Collection[str]:
    from jpeft.recipes.method_names import method_names

    return method_names()


@dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on. None selects the default of the method, the data or the task.

    Every field is stated here alone: its flag, its key in a configuration file, its check, its help and its place in
    the reference page are made from it.

    >>> Config(rank=16, targets="query,value").rate, Config().model, Config(task="chat").model
    (0.0005, 'minilm', 'smollm2')
    """

    task: Literal["classify", "chat"] = option("label texts, or answer in conversations", WHAT, CLASSIFY)
    model: str = option(
        "a named model, a HuggingFace folder, .gguf file or hub id", WHAT, by_task=_by_task("minilm", "smollm2"),
        names=tuple(MODELS), path=True, metavar="MODEL",
    )  # fmt: skip
    data: str = option(
        "a named data set, or a .csv, .jsonl or .json file", WHAT, by_task=_by_task("food-reviews", "gsm8k"),
        names=(*DATA, *CONVERSATIONS), path=True, metavar="DATA",
    )  # fmt: skip
    eval: str | None = option(
        "a file to evaluate on",
        WHAT,
        None,
        shown="that of a named data set, else a held-out tenth of the data",
        path=True,
        metavar="FILE",
    )
    text: str | None = option("column of the texts", WHAT, None, shown="text", tasks=(CLASSIFY,), metavar="COLUMN")
    label: str | None = option("column of the labels", WHAT, None, shown="label", tasks=(CLASSIFY,), metavar="COLUMN")
    chat_template: str | None = option(
        "a file with a Jinja template to use instead of the model's chat template", WHAT, None, tasks=(CHAT,),
        path=True, metavar="FILE",
    )  # fmt: skip
    ignore_keys: str | None = option(
        "keys of conversations that may be left out, such as score,notes", WHAT, None, tasks=(CHAT,), metavar="KEYS"
    )
    adapter: str | None = option(
        "begin from an adapter: a run (whose model it also takes), or a folder that jpeft or PEFT saved; the method is "
        "the adapter's", METHOD, None, path=True, metavar="FOLDER",
    )  # fmt: skip
    method: str | None = option("how to fine-tune", METHOD, None, shown="lora", choices=_method_names, spelled=spelled)
    rank: int | None = option("rank, for methods that have one", METHOD, None, shown="by method, 8 for lora")
    alpha: float | None = option(
        "numerator of the scale alpha/rank", METHOD, None, shown="twice the rank, or the ratio of the method's default"
    )
    dropout: float | None = option(
        "dropout rate on the adapter's input; also enables the model's own dropout", METHOD, None
    )
    targets: str | Sequence[str] | None = option(
        "all-linear, names such as query,value, or a regular expression for whole paths", METHOD, None,
        shown="those of the method", rule=_TARGETS, metavar="TARGETS",
    )  # fmt: skip
    init_text: str | None = option(
        "a text that a prompt starts from, or a prefix, from the first of its tokens", METHOD, None, rule=ANY_TEXT,
        metavar="TEXT",
    )  # fmt: skip
    settings: Mapping[str, Any] = option(
        "any other field of the method, such as length=32; may be repeated", METHOD, {}, rule=_SETTINGS,
        flag="--set", metavar="NAME=VALUE",
    )  # fmt: skip
    head: Literal["folder", "new"] = option(
        "a classifier's head: that of the model's folder if it fits, or a new one", METHOD, "folder"
    )
    head_seed: int | None = option("seed of a new head", METHOD, None, rule=_SEED, shown="the seed")
    resize_embeddings: int = option(
        "for tokens that were added to the tokenizer: new rows of the embedding and the head, which train; their "
        "number is rounded up to this multiple", METHOD, 0, rule=_SIZE, implied="1", metavar="MULTIPLE",
    )  # fmt: skip
    untie_head: bool = option(
        "give a head that is tied to the embedding a weight of its own", METHOD, False, tasks=(CHAT,)
    )
    lr: float | None = option("peak learning rate", TRAINING, None, rule=_RATE, shown="by method, 5e-4 for lora")
    warmup: float = option("fraction of the steps for warm-up", TRAINING, 0.06, rule=_SHARE)
    weight_decay: float = option("decay of the weights that train", TRAINING, 0.0, rule=_DECAY)
    epochs: int = option("passes over the data", TRAINING, by_task=_by_task(2, 1), rule=_COUNT)
    # The limit is the demonstration's: `__post_init__` gives it to no other data.
    steps: int | None = option(
        "stop after so many training steps",
        TRAINING,
        None,
        rule=_COUNT,
        shown=f"all epochs; {_DEMONSTRATION_STEPS} of chat's own data",
    )
    batch_size: int = option(
        "texts, or rows of packed conversations, per step", TRAINING, by_task=_by_task(16, 2), rule=_COUNT
    )
    max_length: int = option(
        "tokens of a text, or of a row of conversations", TRAINING, by_task=_by_task(128, 512), rule=_COUNT
    )
    packed: bool = option(
        "pack as many conversations into a row as fit, or one a row", TRAINING, True, tasks=(CHAT,), flag="--packing"
    )
    eval_examples: int = option(
        "number of evaluation examples, 0 for all", TRAINING, by_task=_by_task(0, 64), rule=_SIZE
    )
    eval_every: int | None = option(
        "steps between evaluations", TRAINING, None, rule=_COUNT, shown="only at the end of each epoch"
    )
    keep: Literal["last", "best"] = option(
        "the adapter to keep: the last, or that with the lowest evaluation loss", TRAINING, "last"
    )
    samples: int = option(
        "prompts to complete before and after training", TRAINING, by_task=_by_task(0, 4), rule=_SIZE, tasks=(CHAT,)
    )
    seed: int = option("seed for initialization and data order", TRAINING, 0, rule=_SEED)
    quantize: Literal["none", "nf4", "int4", "int8", "fp8"] = option(
        "quantize the base", MEMORY, by_task=_by_task("none", "nf4")
    )
    dtype: Dtype = option("dtype of base weights and activations", MEMORY, "float32")
    accumulate: int = option("gradient accumulation: micro-batches per batch", MEMORY, 1, rule=_COUNT)
    checkpoint_every: int = option("steps between checkpoints", OUTPUT, by_task=_by_task(50, 20), rule=_COUNT)

    def __post_init__(self) -> None:
        if self.method is None and self.adapter is None:
            object.__setattr__(self, "method", "lora")
        if isinstance(self.method, str):
            object.__setattr__(self, "method", spelled(self.method))
        # The demonstration's limit of steps must not cut other data short, or a given number of epochs.
        if self.task == CHAT and self.steps is None and self.epochs is None and self.data in (None, *CONVERSATIONS):
            object.__setattr__(self, "steps", _DEMONSTRATION_STEPS)
        options.fill(self, self.task)
        options.check(self)
        if self.dropout is None and "dropout" in self.settings:  # it also decides whether anything is dropped at all
            options.options(type(self))["dropout"].check(dropout := self.settings["dropout"])
            object.__setattr__(self, "dropout", dropout)
        for name, entry in options.options(type(self)).items():
            unused = entry.by_task.get(self.task, entry.default)
            if entry.tasks and self.task not in entry.tasks and getattr(self, name) != unused:
                raise UserError(f"`{name}` is for `task` {' or '.join(entry.tasks)}, not for `task` {self.task}")
        for name in ("rank", "alpha", "dropout", "targets"):
            value = getattr(self, name)
            if value is not None and self.settings.get(name, value) != value:
                raise UserError(f"`{name}` {value} contradicts `settings` {name}={self.settings[name]}; give one")
        if self.batch_size % self.accumulate:
            raise UserError(f"`accumulate` {self.accumulate} does not divide `batch_size` {self.batch_size}")

    @property
    def rate(self) -> float:
        """The peak learning rate.

        >>> Config().rate, Config(method="ia3").rate, Config(lr=0.1).rate
        (0.0005, 0.005, 0.1)
        """
        if self.lr is not None:
            return self.lr
        from jpeft.recipes.method_names import method_class

        return method_class(self.method or "lora").learning_rate

    def located(self) -> Config:
        """The same configuration with absolute paths, which are valid from any working directory.

        >>> Config(data="/data/../train.csv").located().model
        'minilm'
        """
        names = [name for name, entry in options.options(type(self)).items() if entry.path]
        return dataclasses.replace(self, **{name: _locate(name, getattr(self, name)) for name in names})

    def conflict(self, given: Mapping[str, Any]) -> str | None:
        """The name of the first given field that differs from this configuration, or None.

        >>> Config(lr=1e-3).conflict({"lr": 1e-2}), Config().conflict({"lr": 5e-4})
        ('lr', None)
        """
        own = dataclasses.asdict(self) | {"lr": self.rate}
        return next((name for name, value in given.items() if _locate(name, value) != own[name]), None)


def _locate(name: str, value: Any) -> Any:
    if name == "chat_template" and value is not None:
        return read_chat_template(value)
    entry = options.options(Config)[name]
    if not entry.path or value is None or value in entry.names:
        return value
    path = as_path(value)
    return str(absolute(path)) if is_remote(path) or path.exists() else value  # else an id on the hub


@dataclass(frozen=True)
class Execution:
    """The execution of a run: its devices, processes and output. It does not change the result.

    A run that is resumed may have other values, and a configuration file may hold them beside those of `Config`.

    >>> Execution(mesh="fsdp=8").out is None
    True
    """

    remat: Remat = option(
        "rematerialization in a language model's backward pass: full recomputes all of a layer's activations, dots all "
        "but matrix products, offload all from inputs kept in host memory", MEMORY, "none",
    )  # fmt: skip
    mesh: str | None = option(
        "train on all devices, as a mesh with axes such as data=2,fsdp=4", MACHINES, None, shown="one device",
        metavar="AXES",
    )  # fmt: skip
    distributed: bool = option(
        "run as one of several processes, configured by Cloud TPU, SLURM, Open MPI or the next three options; the run "
        "folder must be on shared storage", MACHINES, False,
    )  # fmt: skip
    coordinator: str | None = option("address of process 0", MACHINES, None, metavar="HOST:PORT")
    processes: int | None = option("number of processes, on all machines together", MACHINES, None, rule=_COUNT)
    process: int | None = option("index of this process, from 0", MACHINES, None)
    join_within: float = option(
        "how long to wait for all processes at launch", MACHINES, 300.0, rule=_SECONDS, metavar="SECONDS"
    )
    out: str | None = option("the run folder", OUTPUT, None, shown="a new one in runs/", metavar="FOLDER")
    log: str | None = option(
        "also log to tensorboard, wandb or trackio; several are separated by commas", OUTPUT, None, metavar="NAMES"
    )
    profile: str | None = option(
        "trace steps with jax.profiler, from STEP on (default COUNT: 3)", OUTPUT, None, metavar="STEP:COUNT"
    )

    def __post_init__(self) -> None:
        options.check(self)

    @property
    def is_distributed(self) -> bool:
        """Whether this process is one of several."""
        return self.distributed or any(x is not None for x in (self.coordinator, self.processes, self.process))


@dataclass(frozen=True)
class Setup:
    """Placement and execution of a run. It does not change the result, and may differ when a run is resumed.

    Attributes:
        mesh: a `jax.sharding.Mesh` to train on, with axes that `jpeft.shard` knows; None is one device.
        log_to: names of `jpeft.recipes.loggers.LOGGERS` that also receive the metrics.
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


def read_chat_template(given: str) -> str:
    """A chat template from a file, or the text itself if it has Jinja's braces. A run records the text.

    >>> read_chat_template("{{ messages[0].content }}")
    '{{ messages[0].content }}'
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        text = as_path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"`chat_template` {given}: {reason(error)}; expected a file with a Jinja template") from error
    except UnicodeDecodeError as error:
        raise UserError(f"`chat_template` {given}: not UTF-8 (byte offset {error.start})") from error
    if "{{" not in text and "{%" not in text:
        raise UserError(f"`chat_template` {given}: holds no Jinja template")
    return text


def parse_targets(text: str) -> str | list[str]:
    """Targets from the command line: a regular expression if it has a metacharacter, else comma-separated names.

    >>> parse_targets("query,value"), parse_targets(".*/query"), parse_targets("all-linear")
    (['query', 'value'], '.*/query', 'all-linear')
    """
    if text == "all-linear" or any(sign in text for sign in "*+?()[]{}|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
