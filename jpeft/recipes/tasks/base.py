"""The protocol of a task's module, and `Job`, which holds all that a run works on."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jpeft.core.fingerprint import fingerprint
from jpeft.core.peft import Peft
from jpeft.core.placement import AnyMesh
from jpeft.core.quantized import Quantized
from jpeft.core.tree import flatten, unflatten
from jpeft.errors import ModelError, UserError
from jpeft.files import file_sha256
from jpeft.methods.base import Method
from jpeft.models.dtypes import SOURCE, narrows, stored_dtypes
from jpeft.parallel.batches import local_rows, shard_batch
from jpeft.recipes.config import Config, Setup


class Reporter(Protocol):
    """Receives the messages and the progress of a run."""

    def say(self, text: str) -> None:
        """Shows a line or a table."""

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `done` of `total` training steps are complete."""


class NullReporter:
    """A `Reporter` that ignores everything.

    >>> NullReporter().say("nothing is printed")
    """

    def say(self, text: str) -> None:
        """Ignores the text."""

    def progress(self, done: int, total: int, loss: float, tokens_per_second: float) -> None:
        """Ignores the progress."""


# -------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class AbstractModel:
    """The inputs of a training step without weights or data.

    Attributes:
        model: the module that is trained.
        params: its parameters, as `jax.ShapeDtypeStruct`s.
        inputs: abstract inputs, enough to bind a method.
        names: the logical axis names of the parameters.
        batch: an abstract training batch.
        positions: the number of tokens that the model takes.
    """

    model: Any
    params: Any
    inputs: tuple[Any, ...]
    names: Any
    batch: Any
    positions: int


class Task(Protocol):
    """The contents of a task's module: all that differs by task."""

    METRIC: tuple[str, str]
    """The metric that loss.png plots beside the loss, and its label."""

    REMATS: tuple[str | None, ...]
    """Values of `--remat` that `jpeft plan --sweep` tries; the first is the default of a single plan."""

    def method_defaults(self, kind: type[Method]) -> dict[str, Any]:
        """The fields of a method that have another default for this task."""
        ...

    def complete(self, method: Method) -> Method:
        """The method together with whatever else this task trains."""
        ...

    def text_ids(self, folder: Path, text: str) -> list[int]:
        """The token ids of a text under the tokenizer of a model's folder, without special tokens."""
        ...

    def text_inputs(self, ids: Sequence[int]) -> tuple[Any, ...]:
        """The inputs of the model for one text."""
        ...

    def prepare(self, config: Config, method: Method | None, reporter: Reporter, setup: Setup) -> Job:
        """Reads the data, loads the model and binds the method, or that of the adapter that the run begins from."""
        ...

    def abstract(self, config: Config, model: Any, params: Any, setup: Setup) -> AbstractModel:
        """The abstract counterpart of `prepare`, from the abstract model of `config.model`."""
        ...

    def loss_fn(self, peft: Peft, train_mode: bool = False, mesh: AnyMesh | None = None) -> Any:
        """The loss, as `jpeft.train_step` takes it."""
        ...

    def open_run(self, run: Path, log: Callable[[str], None] = lambda line: None) -> Any:
        """The model of a run with its adapter, ready for use; of an unfinished run, with that of a checkpoint."""
        ...

    def export_run(self, run: Path, out: Path, how: Merging, log: Callable[[str], None] = lambda line: None) -> str:
        """Writes a HuggingFace folder with the adapter merged in. Returns how to use the folder, in a few words."""
        ...

    def hf_options(self, trained: Any) -> dict[str, Any]:
        """The arguments of `jpeft.hf.save` for the adapter of an opened run."""
        ...

    def result_rows(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The rows of the final table that only this task has."""
        ...


# --------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True, eq=False, kw_only=True)
class Job(ABC):
    """All that a run works on, in memory and validated.

    Attributes:
        config: the configuration, with absolute paths.
        model: the folder or `.gguf` file that the base was loaded from.
        files: the data files by role; None where there is no such file.
        params: the base weights.
        peft: the bound method.
        train: the training batches.
        mesh: the device mesh that batches are sharded over; None for one device.
        start: the adapter to begin from; None for a fresh one.
    """

    config: Config
    model: Path
    files: Mapping[str, Path | None]
    params: Any
    peft: Peft
    train: Any
    mesh: Mesh | None = None
    start: Any = None

    @property
    def steps(self) -> int:
        """The number of training steps: all epochs, or `config.steps` if that is fewer.

        >>> job.steps  # doctest: +SKIP
        """
        return min(len(self.train), self.config.steps or len(self.train))

    def batches(self, start: int) -> Iterator[tuple[Any, Any]]:
        """The training batches from a step on, ready for the loss and placed on the mesh, each with its count.

        >>> next(job.batches(40))  # doctest: +SKIP
        """
        return place_batches(self.train, self.mesh, start, self.prepare_batch)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The entries of a run's config.json besides the fingerprint of the base.

        >>> job.record["steps"]  # doctest: +SKIP
        """
        tokenizer = self.model / "tokenizer.json" if self.model.is_dir() else self.model
        return {
            "config": dataclasses.asdict(self.config),
            "steps": self.steps,
            "method": self.peft.method.to_dict(),
            "data": {name: None if path is None else file_sha256(path) for name, path in self.files.items()},
            "tokenizer": file_sha256(tokenizer),
            **({} if self.start is None else {"start": fingerprint(self.start)}),
            **self.task_record,
        }

    @property
    def task_record(self) -> dict[str, Any]:
        """The entries of `record` that only this task has."""
        return {}

    @abstractmethod
    def loss_fn(self) -> Any:
        """The training loss, as `jpeft.train_step` takes it."""

    def prepare_batch(self, batch: Any, count: Any) -> Any:
        """This process's rows of a batch as the loss takes them; `count` is of the whole batch."""
        return batch

    @abstractmethod
    def evaluator(self) -> Callable[[Any], dict[str, float]]:
        """A function from an adapter to its metrics, `eval_loss` among them. Compiles once; keep it."""

    @abstractmethod
    def describe(self, metrics: Mapping[str, Any]) -> str:
        """An evaluation's metrics in a few words."""

    @abstractmethod
    def result(self, fresh: Any, adapter: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of result.json that only this task has.

        Args:
            fresh: the adapter before training, and `before`, its metrics.
            adapter: the adapter after training, and `after`, its metrics.
        """


def place_batches(
    batches: Any,
    mesh: Mesh | None,
    start: int = 0,
    prepare: Callable[[Any, Any], Any] = lambda batch, count: batch,
) -> Iterator[tuple[Any, Any]]:
    """The batches from a position on, each with its count, sharded over a mesh. Each process reads only its own rows.

    >>> [count.examples for _, count in place_batches(job.train, None)]  # doctest: +SKIP
    [16, 16, 9]
    """
    rows = None if mesh is None else local_rows(batches.batch_size, mesh)
    for batch, count in zip(batches.start(start, rows), batches.counts(start), strict=True):
        prepared = prepare(batch, count)
        yield prepared if mesh is None else shard_batch(prepared, mesh, batches.batch_size), count


# ------------------------------------------------------------------------------------------------------------ pieces


def evaluation_data(
    train: Any,
    file: Path | None,
    read: Callable[[Path], Any],
    split: Callable[[Any, int], tuple[Any, Any]],
    config: Config,
    reporter: Reporter,
) -> tuple[Any, Any]:
    """Training and evaluation examples: those of a file, else a part of the training examples that is held out.

    Args:
        train: all training examples.
        file: the evaluation file, if there is one.
        read: reads the examples of a file.
        split: splits examples by a seed into training and held-out ones.
    """
    if file is None:
        train, test = split(train, config.seed)
        reporter.say(f"no `eval`: {len(test):,} of the examples are held out for evaluation")
    else:
        test = read(file)
    if 0 < config.eval_examples < len(test):
        test = test.take(range(config.eval_examples), test.source)
    return train, test


def check_length(length: int, limit: int, virtual: int = 0) -> None:
    """Raises a UserError if rows of `length` tokens are longer than the model takes.

    Args:
        virtual: the number of virtual tokens that a method puts before each row.

    >>> check_length(128, limit=512, virtual=20)
    """
    if length + virtual > limit:
        beside = f" beside the {virtual} virtual tokens of the method" if virtual else ""
        raise UserError(f"`max_length` {length}: the model takes at most {limit - virtual} tokens{beside}")


def bind(method: Method, model: Any, params: Any, inputs: Sequence[Any]) -> Peft:
    """The method bound to the model; targets that match nothing and unsuitable fields raise a UserError.

    So does a method that refuses the model's call, such as one that needs arguments of its own.
    """
    try:
        peft = method.bind(model, params, *inputs)
        if peft.entries:
            leaves = {path: jax.ShapeDtypeStruct(*leaf) for path, leaf in peft.structure}
            jax.eval_shape(peft.apply, params, unflatten(leaves), *inputs)
    except ValueError as error:
        raise UserError(str(error)) from error
    return peft


@dataclass(frozen=True)
class Merging:
    """How `jpeft merge` merges.

    Attributes:
        requantize: quantize the merged weights like the base.
        dtype: the dtype of weights that are not quantized; None is that of each tensor in the model's files.
        force: also write weights that are not finite.

    >>> Merging(dtype="bfloat16").force
    False
    """

    requantize: bool = False
    dtype: str | None = None
    force: bool = False

    @property
    def saving(self) -> dict[str, Any]:
        """The arguments of `jpeft.models.save`.

        >>> Merging().saving
        {'dtype': 'source', 'safe': True}
        """
        return {"dtype": self.dtype or SOURCE, "safe": not self.force}


@contextlib.contextmanager
def quantizing(scheme: str) -> Iterator[None]:
    """Around the loading of a model: a weight that cannot be quantized raises a UserError that names the option."""
    try:
        yield
    except ModelError:
        raise
    except ValueError as error:  # or one that does not fit on the mesh
        if scheme == "none" or "does not divide over" in str(error):
            raise
        raise UserError(f"`quantize` {scheme}: {error}") from error


def merge(peft: Peft, params: Any, adapter: Any, how: Merging, requantize: bool = False) -> Any:
    """The merged weights; a method that cannot be merged, and weights that are not finite, raise a UserError."""
    try:
        return peft.merge(params, adapter, requantize=requantize, safe=not how.force)
    except ValueError as error:
        raise UserError(str(error).replace("safe=False merges it", "`force` writes it")) from error


def unrounded(params: Any, source: Path, dtype: str, reload: Callable[[], Any]) -> Any:
    """The base weights in which to merge: without the rounding to a run's dtype that is narrower than the files'.

    Args:
        params: the base of the run.
        source: the folder or `.gguf` file that it was loaded from.
        dtype: the run's dtype.
        reload: loads the base in float32.
    """
    if not any(narrows(stored, dtype) for stored in set(stored_dtypes(source).values())):
        return params
    wide = flatten(reload())
    leaves = {path: x if isinstance(x, Quantized) else wide[path] for path, x in flatten(params).items()}
    return unflatten(leaves)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns an OSError while a folder is written into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was written") from error


def abstract_ids(*shape: int) -> Any:
    """Abstract int32 token ids.

    >>> abstract_ids(2, 8)
    ShapeDtypeStruct(shape=(2, 8), dtype=int32)
    """
    return jax.ShapeDtypeStruct(shape, np.int32)
