"""Kills training at random moments and checks that no committed checkpoint is lost.

    python tests/parallel/kills.py [--kills 100] [--processes 4] [--devices 1] [--steps 40] [--seed 0]

A small model is trained once without interruption. Then the same command, with --resume, is started again and again,
and one of its processes is killed (SIGKILL) after a random time, every second time while a checkpoint is being
written. Each time, the others must exit by themselves with a status other than 0, and the next start must resume from
the last committed checkpoint or a later one. A run that reaches its end must have the adapter and the log of the
uninterrupted run, bit for bit; then another run begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.parallel import many

WORDS = ["red", "green", "blue", "one", "two", "three", "tea", "sun", "rain"]
TIMEOUT = 300  # seconds within which processes must end


def write_job(folder: Path) -> list[str]:
    """Writes a model and training data, in a fork; returns the command line without --out."""
    if not (pid := os.fork()):
        from tests.folders import write_llama

        (folder / "model").mkdir()
        write_llama(folder / "model", 64, 128, 3)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    rows = [{"prompt": f"say {WORDS[i % 9]} {i}", "completion": f"{WORDS[i * 7 % 9]} {i}"} for i in range(200)]
    for name, part in (("train", rows[:184]), ("test", rows[184:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = "--task chat --model model --data train.jsonl --eval test.jsonl --quantize nf4 --samples 0"
    sizes = "--rank 2 --dropout 0.1 --lr 0.01 --max-length 64 --batch-size 4 --checkpoint-every 2"
    return f"finetune {files} {sizes} --resume".split()


def committed(run: Path) -> int:
    """The step of the last committed checkpoint, or 0."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def outcome(run: Path) -> tuple[bytes, list[dict]]:
    """The result of a run: its adapter, and its log without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "compiled", "tokens_per_second")
    return (run / "adapter/adapter.safetensors").read_bytes(), [
        {name: value for name, value in line.items() if name not in timed} for line in lines
    ]


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Saves in progress, and remains of saves that a kill interrupted."""
    found = set()
    for path in (run / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # it was committed meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def disturb(
    run: Path, started: list[many.Process], left: set, chance: random.Random, longest: float, saving: bool
) -> str | None:
    """Kills one process at a random moment.

    Args:
      run: the folder of the run.
      started: its processes.
      left: `unfinished` saves from before they were started.
      chance: the random numbers.
      longest: seconds that an uninterrupted run takes.
      saving: whether to wait for a save first.

    Returns:
      The phase in which the kill fell; None if the run had ended before.
    """

    def until(reached: Callable[[], bool]) -> bool:
        while not reached():
            time.sleep(0.002)
            if not all(process.alive for process in started):
                return False
        return True

    moment = time.monotonic() + chance.uniform(0, 0.8 * longest)
    if not until(lambda: time.monotonic() > moment):
        return None
    if saving:
        latest, pause = time.monotonic() + longest, chance.uniform(0, 0.05)
        if not until(lambda: bool(unfinished(run) - left) or time.monotonic() > latest):
            return None
        time.sleep(pause)
    within = unfinished(run) - left
    chance.choice(started).kill(signal.SIGKILL)
    return "within a save" if within else "between saves" if (run / "metrics.jsonl").exists() else "before training"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, counts, began = random.Random(args.seed), Counter(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="jpeft-kills-"))
    many.cache_compiled(folder / "compiled")
    command = [*write_job(folder), "--steps", str(args.steps)]
    if args.processes * args.devices > 1:
        command += ["--mesh", f"fsdp={args.processes * args.devices}"]

    def start(run: str) -> list[many.Process]:
        return many.launch([*command, "--out", run], folder, args.processes, args.devices)

    longest = 0.0
    for name in ("undisturbed", "again"):  # the second compiles nothing, like those to come
        moment, started = time.monotonic(), start(name)
        assert many.wait(started, TIMEOUT) and not any(p.status for p in started), started[0].output_of("err")
        longest = time.monotonic() - moment
    wanted = outcome(folder / "undisturbed")
    assert outcome(folder / "again") == wanted, "two undisturbed runs differ"
    steps = [line for line in wanted[1] if "loss" in line]
    print(f"undisturbed: {len(steps)} steps, {longest:.1f} s", flush=True)
    kills, runs, run = 0, 0, folder / "run0"
    while kills < args.kills:
        before, left = committed(run), unfinished(run)
        started = start(run.name)
        when = disturb(run, started, left, chance, longest, saving=kills % 2 == 1)
        assert many.wait(started, TIMEOUT), f"{run}: hangs after a kill {when}"
        status = [process.status for process in started]
        output = started[0].output_of("out")
        if (found := re.search(r"continuing after step (\d+)", output)) is not None:
            assert int(found[1]) >= before, f"{run}: resumed from step {found[1]}, but {before} was committed"
        else:
            assert before == 0 or when is not None, f"{run}: started over, but step {before} was committed: {output}"
        assert "cannot be read" not in output, output
        if when is not None and any(status):
            # a process killed while exiting, with all files written, does not make the others fail
            ended = (run / "result.json").exists()
            assert ended or all(status), f"{run}: a process was killed {when}, and the others exited with {status}"
            kills += 1
            counts[when] += 1
        else:
            assert not any(status), f"{status}: {[process.said('err')[-500:] for process in started]}"
        if (run / "result.json").exists():
            assert outcome(run) == wanted, f"{run}: not the result of the undisturbed run"
            counts["runs to the end, bit-identical"] += 1
            shutil.rmtree(run)
            runs += 1
            run = folder / f"run{runs}"
        if kills and kills % 10 == 0 and when is not None:
            print(f"{kills} kills, {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)
    while not (run / "result.json").exists():  # finish the last run
        started = start(run.name)
        assert many.wait(started, TIMEOUT) and not any(process.status for process in started)
    assert outcome(run) == wanted
    counts["runs to the end, bit-identical"] += 1
    shutil.rmtree(folder)
    print(
        f"{kills} kills of {args.processes} process(es), {time.monotonic() - began:.0f} s: {dict(counts)}; nothing lost"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
