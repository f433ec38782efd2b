"""Training checkpoints through Orbax: adapter, optimizer state, step, rng and notes. Never the base.

    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, step, state, {"seed": 0})
        state, notes = restore(checkpoints, like=state)

Saves run in the background while training continues. A checkpoint appears whole or not at all; remains of a killed
save are deleted when the folder is next opened. A checkpoint may be restored on another mesh and another number of
hosts. On `gs://` Orbax writes a checkpoint where it stays and `commit_success.txt` in it last, without which it is not
one; nothing checks that a bucket has space.

Leaves with the same dtype, shape and sharding are written as one stacked array, `state/0`, `state/1`, …: Orbax spends
half a KiB of metadata, and time, on each array, and adapters have many small ones. `manifest.json` lists the leaves of
each stack in order and the SHA-256 of every file. `verify_checkpoint` compares them before anything is read: a read
that fails half-way leaves tensorstore's threads reporting to an event loop that is gone, which has ended in a
segmentation fault.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import logging
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.files import file_sha256, write_atomically
from jpeft.parallel.hosts import HostError, is_main_process, on_all_hosts
from jpeft.storage import absolute, as_path, file_sizes, is_remote, remove_folder

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or read, or that holds another state than the expected one."""


class DamagedError(CheckpointError):
    """A checkpoint whose files changed since they were written."""


@dataclass
class Checkpoints:
    """The checkpoints of a run. `open_checkpoints` makes it.

    Attributes:
      folder: where they are.
      manager: Orbax's manager.
      saving: the step and the manifest's stacks of the save in progress.
      closed: whether the `with open_checkpoints(...)` block has ended.
    """

    folder: Path
    manager: CheckpointManager = None  # type: ignore[assignment]  # set afterwards: its options refer to this object
    saving: tuple[int, list[dict[str, Any]]] | None = None
    closed: bool = False

    def all_steps(self) -> list[int]:
        """The saved steps, in order."""
        return sorted(self.manager.all_steps())

    def latest_step(self) -> int | None:
        """The last saved step, or None."""
        return self.manager.latest_step()

    def check_open(self) -> None:
        """Raises a `CheckpointError` if the `with open_checkpoints(...)` block has ended."""
        if self.closed:
            raise CheckpointError(f"{self.folder}: was closed; save and restore within `with open_checkpoints(...)`")

    def best_step(self) -> int | None:
        """The saved step with the lowest loss, or None if none recorded a loss."""
        self.wait()
        metrics = {step: found for step in self.all_steps() if (found := self.manager.metrics(step))}
        return min(metrics, key=lambda step: metrics[step]["loss"], default=None)

    def wait(self) -> None:
        """Waits until the save in progress is on disk. Raises an `OSError` if it failed there."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise _save_error(error, self.folder) from error

    def _write_manifest(self) -> None:
        """Writes the manifest of the save in progress. Orbax calls it last, before it renames the folder."""
        if self.saving is None or not is_main_process():
            return
        step, stacks = self.saving
        remote = is_remote(self.folder)
        for scratch in [self.folder / str(step)] if remote else self.folder.glob(f"{step}{_TEMPORARY}*"):
            names = [name for name in file_sizes(scratch) if name.rpartition("/")[2] not in _UNVERIFIED]
            manifest = {"stacks": stacks, "files": _digests(scratch, names)}
            write_atomically(scratch / _MANIFEST, json.dumps(manifest).encode())


@contextlib.contextmanager
def open_checkpoints(
    folder: str | os.PathLike[str], keep: int = 2, *, read_only: bool = False
) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run, on a disk or `gs://`, and at the end waits for the save in progress.

    Only one job at a time may write to a folder, on however many hosts: opening it deletes the remains of an
    unfinished save.

    Args:
        folder: where checkpoints are kept; created if it does not exist.
        keep: how many of the latest stay on disk, beside the one with the lowest loss.
        read_only: nothing is written or deleted, so that another job may write meanwhile.

    Raises:
        ValueError: `keep` is below 1.
        NotADirectoryError: the folder is a file.
        CheckpointError: the folder is on an object store on which Orbax cannot commit a checkpoint.

    >>> with open_checkpoints(run / "checkpoints") as checkpoints: print(checkpoints.latest_step())  # doctest: +SKIP
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1")
    folder = absolute(as_path(folder))
    if is_remote(folder) and not os.fspath(folder).startswith("gs://"):
        raise CheckpointError(
            f"{folder}: checkpoints are written to local folders and gs:// alone; copy them elsewhere"
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with _quiet():
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        checkpoints = Checkpoints(folder)
        if is_main_process() and not read_only:
            _delete_unfinished(checkpoints.folder)  # Orbax would delete it too, but later
        loss = operator.itemgetter("loss")
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy(
                [LatestN(keep), BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)]
            ),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=checkpoints._write_manifest),
        )
        checkpoints.manager = ocp.CheckpointManager(checkpoints.folder, options=options)
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is raised
                checkpoints.manager.close()
            raise
        finally:
            checkpoints.closed = True
        try:
            checkpoints.manager.close()
        except Exception as error:
            raise _save_error(error, checkpoints.folder) from error


def save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    notes: Mapping[str, Any],
    *,
    loss: float | None = None,
    wait: bool = False,
) -> None:
    """Saves the state of a step, and notes as JSON, in the background. On several hosts, all must call it.

    Args:
        checkpoints: from `open_checkpoints`.
        step: the step, at least 0.
        state: a tree of arrays. It is copied before this returns, so that the next step may donate it.
        notes: JSON values to keep with the state, such as the position in the data.
        loss: the loss by which `best_step` chooses.
        wait: return only when the checkpoint is on disk.

    Raises:
        OSError: this save, or the one before, failed on disk, e.g. with `ENOSPC`.
        TypeError: a leaf of the state cannot be saved, or the notes are not JSON.
        CheckpointError: the step was saved before, or the folder was closed.

    >>> save(checkpoints, 100, state, {"epoch": 2})  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    checkpoints.check_open()
    metrics = None if loss is None else {"loss": float(loss)}
    json.dumps(notes := dict(notes))  # raises here; in Orbax's thread the error would come up in a later call
    _check_savable(state)
    checkpoints.wait()
    if step < 0 or step in checkpoints.all_steps():
        raise CheckpointError(f"{checkpoints.folder}: step {step} {'is below 0' if step < 0 else 'was saved already'}")
    # Orbax writes the state twice, then deletes one copy. On a disk that fills up, tensorstore's threads would print
    # tracebacks, so the free space is checked first.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    on_all_hosts(lambda: _check_free_space(checkpoints.folder, 2 * size + 2**20))
    groups = _stackable(state)
    checkpoints.saving = step, [{"leaf": _shape_text(leaves[0]), "paths": paths} for paths, leaves in groups]
    stacks = {str(index): _stack_to(_stack_sharding(leaves[0]))(leaves) for index, (_, leaves) in enumerate(groups)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(stacks), notes=ocp.args.JsonSave(notes))
    try:
        checkpoints.manager.save(step, args=args, metrics=metrics, force=True)
    except Exception as error:
        raise _save_error(error, checkpoints.folder) from error
    if wait:
        checkpoints.wait()


def _check_savable(state: Any) -> None:
    """Raises a `TypeError` for a leaf that Orbax cannot write, or would not restore bit for bit."""
    for path, leaf in _by_path(state).items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{path} is a {type(leaf).__name__}, expected an array; make it one with jnp.asarray")
        if not leaf.size:
            raise TypeError(
                f"{path} has shape {leaf.shape}: Orbax cannot save an empty array; remove it from the state"
            )
        if not isinstance(leaf, jax.Array) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(f"{path} is {leaf.dtype}, which JAX narrows; enable jax_enable_x64, or cast it first")


def _check_free_space(folder: Path, size: int) -> None:
    if not is_remote(folder) and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _save_error(error: Exception, folder: Path) -> Exception:
    """The error to raise for a failed save: an `OSError` if the operating system failed it."""
    _delete_unfinished(folder)
    # tensorstore raises a ValueError with the system's error number in its text.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number is None and not is_remote(folder):
        return error
    gc.collect()  # now, while asyncio's log is off: it reports the other failed writes when they are collected
    if number is None:  # the clients of a store have errors of their own
        cause = " ".join(str(error).partition("[source locations")[0].split())[-300:]  # the cause is said last
        return OSError(errno.EIO, f"cannot be written ({cause})", str(folder))
    return OSError(number, os.strerror(number), str(folder))


def restore(checkpoints: Checkpoints, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The state and notes of a step, by default the latest. Inverse of `save`.

    Args:
        checkpoints: from `open_checkpoints`.
        like: a state with the same structure, shapes, dtypes and shardings, for instance a fresh one.
        step: the step; None is the latest.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit `like`.
        DamagedError: its files changed since they were written.

    >>> state, notes = restore(checkpoints, like=fresh)  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    checkpoints.check_open()
    checkpoints.wait()
    steps = checkpoints.all_steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint to resume from")
    if (step := steps[-1] if step is None else step) not in steps:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint of step {step}; the saved steps are {steps}")
    folder = checkpoints.folder / str(step)
    stacks = on_all_hosts(lambda: verify_checkpoint(folder, like, files=is_main_process()))
    leaves, structure = _by_path(like), jax.tree.structure(like)
    wanted = {str(index): _abstract_stack(leaves[paths[0]], len(paths)) for index, paths in enumerate(stacks)}
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), notes=ocp.args.JsonRestore())
    try:
        found = checkpoints.manager.restore(step, args=args)
    except Exception as error:  # for some damage Orbax and tensorstore raise a plain Exception
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: does not hold the expected state ({reason})") from error
    restored = {}
    for index, paths in enumerate(stacks):
        restored |= zip(paths, _unstack(found["state"].pop(str(index))), strict=True)
    placed = [
        jax.device_put(restored[path], leaf.sharding) if getattr(leaf, "sharding", None) else restored[path]
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(structure, placed), found["notes"]


def restore_newest(checkpoints: Checkpoints, like: Any) -> tuple[Any, dict[str, Any], list[int]]:
    """Restores the newest checkpoint that is not damaged, and deletes the newer, damaged ones.

    Returns:
        The state, its notes, and the steps of the deleted checkpoints.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or the newest undamaged one does not fit `like`. Then
            none is deleted.

    >>> state, notes, damaged = restore_newest(checkpoints, like=fresh)  # doctest: +SKIP
    """
    damaged: list[int] = []
    failure: Exception | None = None
    for step in reversed(checkpoints.all_steps()):
        try:
            state, notes = restore(checkpoints, like, step)
        except (DamagedError, HostError) as error:
            if isinstance(error, HostError) and error.kind != DamagedError.__name__:
                raise
            failure = failure or error
            damaged.append(step)
        else:
            for bad in damaged:
                checkpoints.manager.delete(bad)  # otherwise the run could not save that step again
            return state, notes, damaged
    raise failure or CheckpointError(f"{checkpoints.folder}: no checkpoint to resume from")


# --- verifying a checkpoint -----------------------------------------------------------------------------------------

_MANIFEST = "manifest.json"
_COMMITTED = "commit_success.txt"
_UNVERIFIED = (_MANIFEST, "_CHECKPOINT_METADATA", _COMMITTED)  # Orbax writes the others when it commits the checkpoint


def verify_checkpoint(folder: Path, like: Any, files: bool = True) -> list[list[str]]:
    """Compares a checkpoint with its manifest and with the expected state.

    Args:
        folder: the checkpoint.
        like: the expected state.
        files: whether to verify the SHA-256 of every file, which reads them whole.

    Returns:
        The paths of the leaves of each stack.

    Raises:
        CheckpointError: the first leaf that is not as in `like`.
        DamagedError: the first file that changed since it was written.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        leaves = {path: stack["leaf"] for stack in manifest["stacks"] for path in stack["paths"]}
        digests = dict(manifest["files"])
        found = _digests(folder, [name for name in file_sizes(folder) if name in digests]) if files else digests
    except FileNotFoundError:
        raise DamagedError(f"{folder}: damaged: {_MANIFEST} is missing") from None
    except OSError as error:  # the disk's fault, perhaps for a moment only
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder}: damaged: {_MANIFEST} cannot be read ({error})") from error
    expected = {path: _shape_text(leaf) for path, leaf in _by_path(like).items()}
    for path in sorted(leaves.keys() | expected.keys()):
        if leaves.get(path) != expected.get(path):
            held, wanted = leaves.get(path, "nothing"), expected.get(path, "nothing")
            raise CheckpointError(f"{folder}: does not hold the expected state: {held} at {path}, expected {wanted}")
    for path, digest in digests.items():
        if found.get(path) != digest:
            change = "was changed since it was written" if path in found else "is missing"
            raise DamagedError(f"{folder}: damaged: {path} {change}")
    return [stack["paths"] for stack in manifest["stacks"]]


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files of a checkpoint, by their paths inside."""
    return {name: file_sha256(folder / name) for name in names}


# --- stacks of leaves -----------------------------------------------------------------------------------------------


def _by_path(state: Any) -> dict[str, Any]:
    """The leaves of a state by path, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _shape_text(leaf: Any) -> str:
    """Dtype and shape, such as ``float32[8,16]``."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _stackable(state: Any) -> list[tuple[list[str], list[Any]]]:
    """The paths and leaves of a state, grouped by dtype, shape and sharding."""
    groups: dict[Any, tuple[list[str], list[Any]]] = {}
    for path, leaf in _by_path(state).items():
        paths, leaves = groups.setdefault((_shape_text(leaf), getattr(leaf, "sharding", None)), ([], []))
        paths.append(path)
        leaves.append(leaf)
    return list(groups.values())


def _stack_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a stack of leaves like this one; None for leaves that are on no mesh."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)


def _abstract_stack(leaf: Any, size: int) -> jax.ShapeDtypeStruct:
    """A stack of ``size`` leaves like this one."""
    sharding = _stack_sharding(leaf) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=sharding)


@functools.cache
def _stack_to(sharding: NamedSharding | None) -> Callable[[list[Any]], jax.Array]:
    return jax.jit(lambda leaves: jnp.stack(leaves), out_shardings=sharding)


@jax.jit
def _unstack(stack: jax.Array) -> list[jax.Array]:
    return list(stack)


# --- Orbax ----------------------------------------------------------------------------------------------------------


_TEMPORARY = ".orbax-checkpoint-tmp"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order. Needs no Orbax.

    >>> saved_steps(Path("runs/none/checkpoints"))
    []
    """
    if not is_remote(folder):
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    return sorted(step for step, whole in _remote_steps(folder).items() if whole)


def _remote_steps(folder: Path) -> dict[int, bool]:
    """The steps in a folder of a store, and whether their checkpoints are whole."""
    names = {name.partition("/")[::2] for name in file_sizes(folder)}
    # A kill while Orbax deletes one, object by object, may leave either.
    return {int(step): {(step, _COMMITTED), (step, _MANIFEST)} <= names for step, _ in names if step.isdigit()}


def _delete_unfinished(folder: Path) -> None:
    """Deletes what an unfinished save wrote, so that the disk has space for the rest of the run."""
    if is_remote(folder):
        left = [folder / str(step) for step, whole in _remote_steps(folder).items() if not whole]
    else:
        left = list(folder.glob(f"*{_TEMPORARY}*"))
    for path in left:
        remove_folder(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context in which absl and asyncio, through which Orbax logs, print nothing: errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
