"""Training checkpoints through Orbax: adapter, optimizer, step and rng, and where the data stood. Never the base.

    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, step, state, {"seed": 0})
        state, notes = restore(checkpoints, like=state)

A save goes on in the background while training does. A checkpoint appears whole or not at all; what a killed save left
behind is cleared when the folder is next opened. It may be restored on another mesh and another number of hosts.

Leaves of one dtype, shape and sharding are written as one array, `state/0`, `state/1`, …: Orbax spends half a KiB of
text, and time, on each array, and adapters have many small ones. `manifest.json` names the leaves of each stack in
order, and has a SHA-256 of every file; nothing is read before they agree: a read that fails half-way leaves
tensorstore's threads reporting to an event loop that is gone, which has ended in a segmentation fault.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import json
import logging
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.files import write_atomically
from jpeft.parallel.hosts import HostError, is_main_process, on_all_hosts

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


class CheckpointError(ValueError):
    """Checkpoints that cannot be read, or that hold another state than the one expected."""


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written."""


@dataclass
class Checkpoints:
    """The checkpoints of a run: Orbax's manager, and what the save that is under way holds."""

    folder: Path
    manager: CheckpointManager = None  # type: ignore[assignment]  # made by `open_checkpoints`, which it calls back
    saving: tuple[int, list[dict[str, Any]]] | None = None
    closed: bool = False

    def all_steps(self) -> list[int]:
        """Steps that have one, in order."""
        return sorted(self.manager.all_steps())

    def latest_step(self) -> int | None:
        """The last of them."""
        return self.manager.latest_step()

    def check_open(self) -> None:
        """Raises a `CheckpointError` after the end of `open_checkpoints`."""
        if self.closed:
            raise CheckpointError(f"{self.folder}: was closed; save and restore within `with open_checkpoints(...)`")

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
        if self.saving is None or not is_main_process():
            return
        step, stacks = self.saving
        for scratch in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            manifest = {"stacks": stacks, "files": _digests(scratch)}
            write_atomically(scratch / _MANIFEST, json.dumps(manifest).encode())


@contextlib.contextmanager
def open_checkpoints(folder: str | os.PathLike[str], keep: int = 2) -> Iterator[Checkpoints]:
    """The checkpoints of a run, of which the latest `keep` and the one with the least loss stay on disk.

    What is being saved at the end is waited for. One job at a time writes to a folder, on however many hosts: opening
    it clears away what an unfinished save left there.

    Raises:
        ValueError: `keep` is not at least 1.
        NotADirectoryError: the folder is a file.

    >>> with open_checkpoints(run / "checkpoints") as checkpoints: print(checkpoints.latest_step())  # doctest: +SKIP
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the latest checkpoint has to stay")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with _quiet():
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        checkpoints = Checkpoints(Path(folder).absolute())
        if is_main_process():
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
        finally:
            checkpoints.closed = True
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
        state: a tree of arrays. It is copied first: the next step may donate it.
        loss: by which the best is found.
        wait: return when it is on disk.

    Raises:
        OSError: the disk refuses this save, or refused the last one, e.g. with `ENOSPC`.
        TypeError: a leaf of the state cannot be saved, or notes that are not JSON.
        CheckpointError: there is a checkpoint of this step already, or the folder was closed.

    >>> save(checkpoints, 100, state, {"epoch": 2})  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    checkpoints.check_open()
    metrics = None if loss is None else {"loss": float(loss)}
    json.dumps(notes := dict(notes))  # now: a mistake there would come up in Orbax's thread, when the step is forgotten
    _check_savable(state)
    checkpoints.wait()
    if step < 0 or step in checkpoints.all_steps():
        raise CheckpointError(f"{checkpoints.folder}: step {step} {'is below 0' if step < 0 else 'was saved already'}")
    # Orbax writes the state twice, then drops one copy. A disk that fills meanwhile makes tensorstore's threads print
    # tracebacks, so the room is looked for first.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    on_all_hosts(lambda: _find_room(checkpoints.folder, 2 * size + 2**20))
    alike = _alike(state)
    checkpoints.saving = step, [{"leaf": _kind(leaves[0]), "paths": paths} for paths, leaves in alike]
    stacks = {str(index): _stack_to(_stacked(leaves[0]))(leaves) for index, (_, leaves) in enumerate(alike)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(stacks), notes=ocp.args.JsonSave(notes))
    try:
        checkpoints.manager.save(step, args=args, metrics=metrics, force=True)
    except Exception as error:
        raise _refused(error, checkpoints.folder) from error
    if wait:
        checkpoints.wait()


def _check_savable(state: Any) -> None:
    """Raises a `TypeError` that names a leaf which Orbax cannot write, or would not give back as it was."""
    for path, leaf in _by_path(state).items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{path} is a {type(leaf).__name__}, expected an array; make it one with jnp.asarray")
        if not leaf.size:
            raise TypeError(f"{path} has shape {leaf.shape}: Orbax saves no empty arrays; leave it out")
        if not isinstance(leaf, jax.Array) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(f"{path} is {leaf.dtype}, which JAX narrows; enable jax_enable_x64, or give a narrower one")


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
        CheckpointError: there is none, what is there does not fit `like`, or (`DamagedError`) is not as it was written.

    >>> state, notes = restore(checkpoints, like=fresh)  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    checkpoints.check_open()
    checkpoints.wait()
    there = checkpoints.all_steps()
    if not there:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint to resume from")
    if (step := there[-1] if step is None else step) not in there:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint of step {step}; there are {there}")
    folder = checkpoints.folder / str(step)
    stacks = on_all_hosts(lambda: _verify(folder, like, files=is_main_process()))
    leaves, structure = _by_path(like), jax.tree.structure(like)
    wanted = {
        str(index): jax.ShapeDtypeStruct((len(paths), *first.shape), first.dtype, sharding=_stacked(first) or _here())
        for index, paths in enumerate(stacks)
        for first in [leaves[paths[0]]]
    }
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), notes=ocp.args.JsonRestore())
    try:
        found = checkpoints.manager.restore(step, args=args)
    except Exception as error:  # Orbax and tensorstore raise a bare one for some damage
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
    """The newest state that is whole, its notes, and the steps of newer ones that were damaged, which are deleted.

    Raises:
        CheckpointError: there is none, all are damaged, or the newest that is not does not fit `like` (then all stay
            where they are).

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
                checkpoints.manager.delete(bad)  # or the run could not save that step again
            return state, notes, damaged
    raise failure or CheckpointError(f"{checkpoints.folder}: no checkpoint to resume from")


_MANIFEST = "manifest.json"
_UNSEALED = (_MANIFEST, "_CHECKPOINT_METADATA")  # Orbax notes there when it gave the checkpoint its name


def _by_path(state: Any) -> dict[str, Any]:
    """The leaves of a state, in order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _alike(state: Any) -> list[tuple[list[str], list[Any]]]:
    """Paths and leaves of a state, those together that have dtype, shape and sharding in common."""
    found: dict[Any, tuple[list[str], list[Any]]] = {}
    for path, leaf in _by_path(state).items():
        paths, leaves = found.setdefault((_kind(leaf), getattr(leaf, "sharding", None)), ([], []))
        paths.append(path)
        leaves.append(leaf)
    return list(found.values())


def _stacked(leaf: Any) -> NamedSharding | None:
    """The sharding of a stack of such leaves."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@functools.cache
def _stack_to(sharding: NamedSharding | None) -> Callable[[list[Any]], jax.Array]:
    return jax.jit(lambda leaves: jnp.stack(leaves), out_shardings=sharding)


@jax.jit
def _unstack(stack: jax.Array) -> list[jax.Array]:
    return list(stack)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its path inside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _UNSEALED:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _verify(folder: Path, like: Any, files: bool) -> list[list[str]]:
    """The paths of the leaves of each stack.

    Raises `CheckpointError` with the first leaf that is not as in `like`, or, if `files` are looked at, which takes
    reading them whole, with the first that is not as it was written.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        leaves = {path: stack["leaf"] for stack in manifest["stacks"] for path in stack["paths"]}
        digests = dict(manifest["files"])
        found = _digests(folder) if files else digests
    except FileNotFoundError:
        raise DamagedError(f"{folder}: damaged: {_MANIFEST} is missing") from None
    except OSError as error:  # the disk's fault, perhaps for a moment
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder}: damaged: {_MANIFEST} cannot be read ({error})") from error
    wanted = {path: _kind(leaf) for path, leaf in _by_path(like).items()}
    for path in sorted(leaves.keys() | wanted.keys()):
        if leaves.get(path) != wanted.get(path):
            held, asked = leaves.get(path, "nothing"), wanted.get(path, "nothing")
            raise CheckpointError(f"{folder}: does not hold the expected state: {held} at {path}, expected {asked}")
    for path, digest in digests.items():
        if found.get(path) != digest:
            change = "was changed since it was written" if path in found else "is missing"
            raise DamagedError(f"{folder}: damaged: {path} {change}")
    return [stack["paths"] for stack in manifest["stacks"]]


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
