"""Training checkpoints through Orbax: adapter, optimiser, step and rng, and where the data stood. Never the base.

    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, step, state, {"seed": 0})
        state, notes = restore(checkpoints, like=state)

A checkpoint appears whole or not at all; what a killed save left behind is cleared when the folder is next opened.
`manifest.json` beside its state names its leaves and has a SHA-256 of every file; nothing is read before they agree: a
read that fails half-way leaves tensorstore's threads reporting to an event loop that is gone, which has ended in a
segmentation fault.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jpeft.io import write_atomically

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


class CheckpointError(ValueError):
    """Checkpoints that cannot be read, or that hold another state than the one expected."""


@contextlib.contextmanager
def open_checkpoints(folder: str | os.PathLike[str], keep: int = 2) -> Iterator[CheckpointManager]:
    """The checkpoints of a run, of which the latest `keep` stay on disk.

    >>> with open_checkpoints(run / "checkpoints") as checkpoints: print(checkpoints.latest_step())  # doctest: +SKIP
    """
    with _quiet():
        import orbax.checkpoint as ocp

        _drop_partial(Path(folder))  # what a killed save left; Orbax clears it away in its own time
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            # A background save reads buffers that the next step donates; an adapter is small enough to wait for.
            enable_async_checkpointing=False,
        )
        manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        try:
            yield manager
        finally:
            manager.close()


def save(checkpoints: CheckpointManager, step: int, state: Any, notes: Mapping[str, Any]) -> None:
    """Write the state of a step, and notes in JSON beside it. A disk that refuses is an `OSError`, e.g. with `ENOSPC`.

    >>> save(checkpoints, 100, state, {"epoch": 2})  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    folder = Path(checkpoints.directory)
    # Orbax writes the state twice, then drops one copy. A disk that fills meanwhile makes tensorstore's threads print
    # tracebacks, so the room is looked for first.
    if shutil.disk_usage(folder).free < 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(dict(notes)))
    try:
        checkpoints.save(step, args=args, force=True)
        checkpoints.wait_until_finished()
        _seal(folder / str(step), state)
        return
    except Exception as error:
        _drop_partial(folder)
        # tensorstore reports what the system refused as a ValueError with the system's number in its text
        said = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number is None:
            raise
    gc.collect()  # now, while asyncio is quiet: the other writes that failed say so when they are collected
    raise OSError(number, os.strerror(number), str(folder))


def restore(checkpoints: CheckpointManager, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The latest state (or that of `step`) and its notes. Inverse of `save`.

    Args:
        like: a state of the same structure, shapes, dtypes and shardings, for instance a fresh one.

    Raises:
        CheckpointError: there is none, or what is there does not fit `like`.

    >>> state, notes = restore(checkpoints, like=fresh)  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    step = checkpoints.latest_step() if step is None else step
    if step is None:
        raise CheckpointError(f"{checkpoints.directory}: no checkpoint to resume from")
    _verify(folder := Path(checkpoints.directory) / str(step), like)
    wanted = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), notes=ocp.args.JsonRestore())
    try:
        found = checkpoints.restore(step, args=args)
    except Exception as error:  # Orbax and tensorstore raise a bare one for some damage
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: does not hold the expected state ({reason})") from error
    return found["state"], found["notes"]


def restore_newest(checkpoints: CheckpointManager, like: Any) -> tuple[Any, dict[str, Any], list[int]]:
    """The newest state that can be read, its notes, and the steps of newer ones that could not, which are deleted.

    Raises:
        CheckpointError: there is none, or none can be read (then all stay where they are).

    >>> state, notes, damaged = restore_newest(checkpoints, like=fresh)  # doctest: +SKIP
    """
    damaged: list[int] = []
    reason = f"{checkpoints.directory}: no checkpoint to resume from"
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state, notes = restore(checkpoints, like, step)
        except CheckpointError as error:
            reason = reason if damaged else str(error)
            damaged.append(step)
        else:
            for bad in damaged:
                checkpoints.delete(bad)  # or the run could not save that step again
            return state, notes, damaged
    raise CheckpointError(reason)


_MANIFEST = "manifest.json"


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
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _seal(folder: Path, state: Any) -> None:
    """Write a finished checkpoint's manifest. Killed before that, it is whole but cannot be verified."""
    manifest = {"leaves": _leaves(state), "files": _digests(folder)}
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())


def _verify(folder: Path, like: Any) -> None:
    """Raises `CheckpointError` with the first leaf that is not as in `like`, or file that is not as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        leaves, files = dict(manifest["leaves"]), dict(manifest["files"])
        found = _digests(folder)
    except FileNotFoundError:
        return
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
