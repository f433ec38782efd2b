"""Training checkpoints through Orbax: adapter, optimiser, step and rng, and where the data stood. Never the base.

    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, step, state, {"seed": 0})
        state, notes = restore(checkpoints, like=state)

A save goes on in the background while training does. A checkpoint appears whole or not at all; what a killed save left
behind is cleared when the folder is next opened. It may be restored on another mesh and another number of hosts.
`manifest.json` in it names its leaves and has a SHA-256 of every file; nothing is read before they agree: a read that
fails half-way leaves tensorstore's threads reporting to an event loop that is gone, which has ended in a segmentation
fault.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import operator
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jpeft.hosts import leads, together
from jpeft.io import write_atomically

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


class CheckpointError(ValueError):
    """Checkpoints that cannot be read, or that hold another state than the one expected."""


@dataclass
class Checkpoints:
    """The checkpoints of a run: Orbax's manager, and what the save that is under way holds."""

    folder: Path
    manager: CheckpointManager = None  # type: ignore[assignment]  # made by `open_checkpoints`, which it calls back
    saving: tuple[int, dict[str, str]] | None = None

    def all_steps(self) -> list[int]:
        """Steps that have one, in order."""
        return sorted(self.manager.all_steps())

    def latest_step(self) -> int | None:
        """The last of them."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """That with the least loss, of those that were saved with one."""
        self.wait()
        found = {step: told for step in self.all_steps() if (told := self.manager.metrics(step))}
        return min(found, key=lambda step: found[step]["loss"], default=None)

    def wait(self) -> None:
        """Until what was begun is on disk. Raises an `OSError` where the disk refused it."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise _refused(error, self.folder) from error

    def _seal(self) -> None:
        """Write the manifest of a save, the last thing before it gets its name. In a thread of Orbax's."""
        if self.saving is None or not leads():
            return
        step, leaves = self.saving
        for scratch in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            manifest = {"leaves": leaves, "files": _digests(scratch)}
            write_atomically(scratch / _MANIFEST, json.dumps(manifest, indent=1).encode())


@contextlib.contextmanager
def open_checkpoints(folder: str | os.PathLike[str], keep: int = 2) -> Iterator[Checkpoints]:
    """The checkpoints of a run, of which the latest `keep` and the one with the least loss stay on disk.

    What is being saved at the end is waited for.

    >>> with open_checkpoints(run / "checkpoints") as checkpoints: print(checkpoints.latest_step())  # doctest: +SKIP
    """
    with _quiet():
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        checkpoints = Checkpoints(Path(folder).absolute())
        if leads():
            _drop_partial(checkpoints.folder)  # what a killed save left; Orbax clears it away in its own time
        loss = operator.itemgetter("loss")
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy(
                [LatestN(keep), BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)]
            ),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=checkpoints._seal),
        )
        checkpoints.manager = ocp.CheckpointManager(checkpoints.folder, options=options)
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(Exception):  # what happened first is told
                checkpoints.manager.close()
            raise
        try:
            checkpoints.manager.close()
        except Exception as error:
            raise _refused(error, checkpoints.folder) from error


def save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    notes: Mapping[str, Any],
    *,
    loss: float | None = None,
    wait: bool = False,
) -> None:
    """Write the state of a step, and notes in JSON beside it, in the background; on several hosts, all call it.

    Args:
        state: is copied first: the next step may donate it.
        loss: by which the best is found.
        wait: return when it is on disk.

    Raises:
        OSError: the disk refuses this save, or refused the last one, e.g. with `ENOSPC`.

    >>> save(checkpoints, 100, state, {"epoch": 2})  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    checkpoints.wait()
    # Orbax writes the state twice, then drops one copy. A disk that fills meanwhile makes tensorstore's threads print
    # tracebacks, so the room is looked for first.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    together(lambda: _find_room(checkpoints.folder, 2 * size + 2**20))
    checkpoints.saving = step, _leaves(state)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)), notes=ocp.args.JsonSave(dict(notes))
    )
    try:
        checkpoints.manager.save(step, args=args, metrics=None if loss is None else {"loss": loss}, force=True)
    except Exception as error:
        raise _refused(error, checkpoints.folder) from error
    if wait:
        checkpoints.wait()


def _find_room(folder: Path, size: int) -> None:
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _refused(error: Exception, folder: Path) -> Exception:
    """What a save that failed says: an `OSError`, if the system refused it."""
    _drop_partial(folder)
    # tensorstore reports what the system refused as a ValueError with the system's number in its text
    said = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    if number is None:
        return error
    gc.collect()  # now, while asyncio is quiet: the other writes that failed say so when they are collected
    return OSError(number, os.strerror(number), str(folder))


def restore(checkpoints: Checkpoints, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The latest state (or that of `step`) and its notes. Inverse of `save`.

    Args:
        like: a state of the same structure, shapes, dtypes and shardings, for instance a fresh one.

    Raises:
        CheckpointError: there is none, or what is there does not fit `like`.

    >>> state, notes = restore(checkpoints, like=fresh)  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    checkpoints.wait()
    step = checkpoints.latest_step() if step is None else step
    if step is None:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint to resume from")
    _verify(folder := checkpoints.folder / str(step), like)
    wanted = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), notes=ocp.args.JsonRestore())
    try:
        found = checkpoints.manager.restore(step, args=args)
    except Exception as error:  # Orbax and tensorstore raise a bare one for some damage
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: does not hold the expected state ({reason})") from error
    return found["state"], found["notes"]


def restore_newest(checkpoints: Checkpoints, like: Any) -> tuple[Any, dict[str, Any], list[int]]:
    """The newest state that can be read, its notes, and the steps of newer ones that could not, which are deleted.

    Raises:
        CheckpointError: there is none, or none can be read (then all stay where they are).

    >>> state, notes, damaged = restore_newest(checkpoints, like=fresh)  # doctest: +SKIP
    """
    damaged: list[int] = []
    reason = f"{checkpoints.folder}: no checkpoint to resume from"
    for step in reversed(checkpoints.all_steps()):
        try:
            state, notes = restore(checkpoints, like, step)
        except CheckpointError as error:
            reason = reason if damaged else str(error)
            damaged.append(step)
        else:
            for bad in damaged:
                checkpoints.manager.delete(bad)  # or the run could not save that step again
            return state, notes, damaged
    raise CheckpointError(reason)


_MANIFEST = "manifest.json"
_UNSEALED = (_MANIFEST, "_CHECKPOINT_METADATA")  # Orbax notes there when it gave the checkpoint its name


def _leaves(state: Any) -> dict[str, str]:
    """Dtype and shape of every leaf of a state, by its path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its path inside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _UNSEALED:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _verify(folder: Path, like: Any) -> None:
    """Raises `CheckpointError` with the first leaf that is not as in `like`, or file that is not as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        leaves, files = dict(manifest["leaves"]), dict(manifest["files"])
        found = _digests(folder)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: damaged: {_MANIFEST} is missing") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    wanted = _leaves(like)
    for path in sorted(leaves.keys() | wanted.keys()):
        if leaves.get(path) != wanted.get(path):
            held, asked = leaves.get(path, "nothing"), wanted.get(path, "nothing")
            raise CheckpointError(f"{folder}: does not hold the expected state: {held} at {path}, expected {asked}")
    for path, digest in files.items():
        if found.get(path) != digest:
            change = "was changed since it was written" if path in found else "is missing"
            raise CheckpointError(f"{folder}: damaged: {path} {change}")


def _drop_partial(folder: Path) -> None:
    """Give back the space that an unfinished save took, so that the rest of the run can still be written."""
    for left in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Orbax logs, through absl and asyncio, off the user's terminal: what matters of it is raised."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
