"""Runs the command line in one or several processes, each a fork of this one, which imports everything once.

    python tests/parallel/many.py PLAN.json     runs the launches of a plan in turn, and adds their results to it

Only the forks touch devices.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax  # imported here for the forks

import jpeft.parallel.distributed
import jpeft.recipes.finetune  # noqa: F401
from jpeft.cli import main as run_jpeft


@dataclass
class Process:
    """A fork, and the path of its output files."""

    pid: int
    output: Path
    status: int | None = None

    @property
    def alive(self) -> bool:
        """Whether it still runs. Sets `status` when it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def output_of(self, stream: str) -> str:
        return Path(f"{self.output}.{stream}").read_text(errors="replace")


def launch(
    arguments: list[str],
    folder: Path,
    processes: int = 1,
    devices: int = 1,
    name: str = "log",
    absent: int = 0,
    folders: list[str] | None = None,
    more: list[list[str]] | None = None,
) -> list[Process]:
    """Starts `jpeft ARGUMENTS` as several processes.

    Args:
      folder: the working directory.
      processes: how many.
      devices: CPU devices of each.
      name: of the output files.
      absent: how many of the last processes are not started.
      folders: the working directories, if they differ; relative to `folder`.
      more: further arguments of each process.
    """
    started = []
    address = f"127.0.0.1:{free_port()}"
    for i in range(processes - absent):
        joining = ["--coordinator", address, "--processes", str(processes), "--process", str(i)]
        where = folder / folders[i] if folders else folder
        output = folder / f"{name}.{i}"
        own = arguments + joining * (processes > 1) + (more[i] if more else [])
        started.append(Process(fork(own, where, devices, output), output))
    return started


def fork(arguments: list[str], folder: Path, devices: int, output: Path) -> int:
    """Starts one `jpeft ARGUMENTS`; its process id."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        # A shell that starts its commands in the background lets them ignore interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        for stream, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        let_all_processes_write_the_cache()
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        status = run_jpeft(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        if not status and jax.process_count() > 1:
            jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def cache_compiled(folder: Path) -> None:
    """Keeps compiled programs in a folder, for all forks."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def let_all_processes_write_the_cache() -> None:
    """Lets every process write compiled programs to the cache.

    JAX lets process 0 alone. On CPU each process has its own keys, so the others would compile at every start.
    """
    from jax._src import compiler, distributed

    write = compiler._cache_write

    def write_as_first(*args: object, **options: object) -> None:
        state = distributed.global_state
        process, state.process_id = state.process_id, 0
        try:
            write(*args, **options)
        finally:
            state.process_id = process

    compiler._cache_write = write_as_first


def wait(processes: list[Process], within: float) -> bool:
    """Whether all end within so many seconds. Kills them if not."""
    deadline = time.monotonic() + within
    while any(process.alive for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            return False
        time.sleep(0.02)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def truncate(run: Path) -> None:
    """Truncates the array files of a run's newest checkpoint."""
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    for file in (newest / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def main(plan: Path) -> None:
    cache_compiled(plan.parent / "compiled")
    launches = json.loads(plan.read_text())
    for number, each in enumerate(launches):
        began, after = time.monotonic(), each.pop("kill", None)
        within = each.pop("within", 240)
        if run := each.pop("truncate", None):
            truncate(plan.parent / run)
        started = launch(folder=plan.parent, name=f"log{number}", **each)
        if after:  # {"file": path, "holds": text, "process": index, "signal": number}
            path = plan.parent / after["file"]
            while time.monotonic() < began + within and not (path.exists() and after["holds"] in path.read_text()):
                time.sleep(0.02)
            started[after["process"]].kill(after["signal"])
            began = time.monotonic()
        each["ended"] = wait(started, within)
        each["seconds"] = time.monotonic() - began
        each["status"] = [process.status for process in started]
        each["out"], each["err"] = ([process.output_of(stream) for process in started] for stream in ("out", "err"))
    plan.write_text(json.dumps(launches))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
