"""Trains one short run at several world sizes, and once with kills; compares the bytes.

    python launch/prove.py [RECIPE] [--processes 1,2,4] [--dir DIR] [--section.field VALUE ...]
    python launch/prove.py --slurm [--nodes 1,2] [--sbatch "OPTIONS"] [--dir DIR] ...

Prints for each run the SHA-256 of model.safetensors, and of the rows of metrics.jsonl without
perf/*. Then prints `equal`, or prints `DIFFERENT` and the first row that differs. If the runs
differ, the exit code is 1 and the runs are kept. The program uses only distvgg's commands and the
files of a run folder, as any user can.

Invariant: the program leaves no process and no job running, however it ends.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

ROOT = Path(__file__).resolve().parent.parent
# Six steps an epoch, with the options that people train with.
SHORT = (
    *("quickstart", "--data.train_size", "1500", "--model.width", "0.1"),
    *("--optim.name", "muon", "--optim.ema_decay", "0.9", "--augment.trivial", "true"),
    *("--augment.cutmix_alpha", "1", "--augment.mix_probability", "0.5"),
)
# Options that the proof needs for any run: a row for each step, no tracker.
WATCHED = (
    *("--track.every_steps", "1"),
    *("--track.wandb", "false", "--track.tensorboard", "false"),
)
FINAL = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED"),
)
Row = dict[str, Any]


class Run(NamedTuple):
    """A run folder, and the number of processes or nodes of each launch.

    Every launch but the last is interrupted in the middle.
    """

    folder: Path
    starts: tuple[int, ...]

    def __str__(self) -> str:
        return " -> ".join(map(str, self.starts))


def main(words: Sequence[str]) -> int:
    """Runs the proof; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--processes", type=numbers, help="on this machine; default: 1,2,4")
    parser.add_argument("--dir", type=Path, help="keep the run folders here; default: nowhere")
    parser.add_argument("--slurm", action="store_true", help="by jobs instead")
    parser.add_argument("--nodes", type=numbers, help="with --slurm; default: 1,2")
    parser.add_argument("--sbatch", default="", help="options of sbatch, with --slurm")
    if "--sbatch" in words[:-1]:  # argparse accepts no value that begins with a hyphen
        at = words.index("--sbatch")
        words = [*words[:at], "=".join(words[at : at + 2]), *words[at + 2 :]]
    named = bool(words) and not words[0].startswith("-")
    options, overrides = parser.parse_known_args(words[named:])
    if any(word.replace("_", "-").startswith("--run-dir") for word in overrides):
        parser.error("--run-dir: each run has a folder of its own; --dir DIR keeps them")
    if options.dir and options.dir.exists() and any(options.dir.iterdir()):
        parser.error(f"--dir {options.dir} is not empty: choose a new folder")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    start = Jobs(shlex.split(options.sbatch)) if options.slurm else Processes()
    counts = (options.nodes if options.slurm else options.processes) or start.counts
    recipe = words[:1] if named else [*SHORT, "--train.epochs", str(start.epochs)]
    train = [*recipe, *overrides, *WATCHED]
    # All nodes see the current directory, as they see a job's log.
    folder = options.dir or Path(
        tempfile.mkdtemp(prefix="prove-", dir=Path.cwd() if options.slurm else None)
    )
    code = 130
    try:
        code = prove(start, train, counts, folder.resolve())
    except KeyboardInterrupt:
        say("stopped")
    finally:
        with suppress(OSError):  # the folder is not empty
            folder.rmdir()
    if code == 1 or (code and options.slurm):  # a cancelled job still saves
        say(f"the runs are kept in {folder}")
    elif options.dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def numbers(text: str) -> list[int]:
    """Parses integers with commas between them."""
    return [int(n) for n in text.split(",")]


def prove(
    start: "Processes | Jobs", train: Sequence[str], counts: Sequence[int], folder: Path
) -> int:
    """Trains all runs and compares them; returns the exit code.

    Args:
        start: launches a run.
        train: arguments of `distvgg train`.
        counts: numbers of processes or nodes.
        folder: parent of all run folders and their logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = [Run(folder / str(n), (n,)) for n in counts]
    # The last count, the first, and the one in the middle.
    killed = Run(folder / "killed", (counts[-1], counts[0], counts[len(counts) // 2]))
    began = time.monotonic()

    def train_on(run: Run, nth: int, until: int | None, *more: str) -> None:
        n = run.starts[nth]
        say(f"{time.monotonic() - began:4.0f} s  {run}: start {nth + 1} on {n}")
        start(run, n, until, [*train, *more, "--run-dir", str(run.folder)])

    for run in whole:
        train_on(run, 0, None)
    # Interrupt after each third. Frequent checkpoints let the run resume nearby; their interval
    # changes no result.
    length = len(rows(whole[0].folder))
    every = str(max(1, length // 8))
    for nth, until in enumerate((length // 3, 2 * length // 3, None)):
        train_on(killed, nth, until, "--checkpoint.every_steps", every)
    return compare([*whole, killed], start.unit)


def compare(runs: Sequence[Run], unit: str) -> int:
    """Prints the digests of all runs and the verdict; returns the exit code."""
    width = max(len(unit), *(len(str(run)) for run in runs))
    print(f"{unit:<{width}}  {'SHA-256 of model.safetensors':<64}  rows  and theirs")
    sums = [digests(run.folder) for run in runs]
    for run, (weights, table) in zip(runs, sums, strict=True):
        print(f"{run!s:<{width}}  {weights}  {len(rows(run.folder)):>4}  {table[:16]}")
    if len(set(sums)) == 1:
        print("equal")
        return 0
    print("DIFFERENT")
    if len({table for _, table in sums}) == 1:
        print("the rows are equal; only the weights differ")
    for run in runs[1:]:
        for ours, first in zip(rows(run.folder), rows(runs[0].folder), strict=False):
            if json.dumps(ours) != json.dumps(first):
                print(f"{runs[0]}: {json.dumps(first)}\n{run}: {json.dumps(ours)}")
                break
    return 1


def digests(folder: Path) -> tuple[str, str]:
    """Returns the SHA-256 of a run's weights, and of its rows."""
    weights = (folder / "model.safetensors").read_bytes()
    table = "\n".join(map(json.dumps, rows(folder))).encode()
    return hashlib.sha256(weights).hexdigest(), hashlib.sha256(table).hexdigest()


def rows(folder: Path) -> list[Row]:
    """Returns the complete rows of metrics.jsonl so far, without timings."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    table = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in table]


def checkpoints(folder: Path) -> set[str]:
    """Returns the names of a run's checkpoints."""
    return {path.name for path in (folder / "checkpoints").glob("step_*")}


def in_the_middle(folder: Path, until: int | None, before: set[str]) -> bool:
    """Returns True if a run has `until` rows, and a checkpoint that is not in `before`."""
    if until is None or not checkpoints(folder) - before:
        return False
    return len(rows(folder)) >= until


class Processes:
    """Launches of a run on this machine by `distvgg launch`, interrupted with SIGKILL.

    Attributes:
        counts: default numbers of processes: 1, 2 and 4, but not more than GPUs if there are two
            or more.
        epochs: enough for a run to be interrupted in its middle.
    """

    unit = "processes"

    def __init__(self) -> None:
        import torch
        from accelerate.utils import parse_flag_from_env

        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        gpus = 0 if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.cuda.device_count()
        self.counts = tuple(n for n in (1, 2, 4) if gpus < 2 or n <= gpus)
        self.epochs = 20 if gpus else 4
        if gpus == 1:
            say("one GPU: all processes share it, and exchange through host memory (gloo)")
            self._env |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cuda:0"}

    def __call__(self, run: Run, n: int, until: int | None, train: Sequence[str]) -> None:
        """Trains to the end, or kills the run after `until` rows."""
        log, before = run.folder.with_suffix(".log"), checkpoints(run.folder)
        node = (sys.executable, "-m", "distvgg", "launch", "--processes", str(n), "--")
        with log.open("a") as output:
            process = psutil.Popen(
                [*node, *train],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this program, which ends its runs
            )
        try:
            while process.poll() is None and not in_the_middle(run.folder, until, before):
                time.sleep(0.01)
        finally:
            cut_off = process.poll() is None
            kill(process)
        if process.returncode and not cut_off:
            fail(f"ended with exit code {process.returncode}", log)
        if until is not None and not cut_off:
            fail("ended before it could be killed: more steps (--train.epochs)", log)


def kill(process: psutil.Popen) -> None:
    """Sends SIGKILL to a process and its descendants, and waits until all have ended."""
    members = []
    with suppress(psutil.NoSuchProcess):
        members = [process, *process.children(recursive=True)]
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members, 30)


class Jobs:
    """Launches of a run as jobs of launch/slurm.sbatch, interrupted with scancel."""

    unit, counts, epochs = "nodes", (1, 2), 80  # cancelling a job takes seconds

    def __init__(self, options: Sequence[str]) -> None:
        self._options = options
        if shutil.which("sbatch") is None:
            raise SystemExit("distvgg: error: no sbatch here: call --slurm on a login node")

    def __call__(self, run: Run, n: int, until: int | None, train: Sequence[str]) -> None:
        """Waits until a job has ended, or cancels the job after `until` rows."""
        log, before = run.folder.with_suffix(".log"), checkpoints(run.folder)
        sbatch = ("sbatch", "--parsable", f"--output={log}", *self._options, f"--nodes={n}")
        job = slurm(*sbatch, str(ROOT / "launch" / "slurm.sbatch"), *train).split(";")[0]
        cut_off, state = False, "PENDING"
        try:
            while state not in FINAL:
                time.sleep(0.5)
                if not cut_off and in_the_middle(run.folder, until, before):
                    slurm("scancel", job)
                    cut_off = True
                shown = slurm("scontrol", "--oneliner", "show", "job", job)
                state = dict(w.split("=", 1) for w in shown.split() if "=" in w)["JobState"]
        finally:
            if state not in FINAL:
                slurm("scancel", job)
        if until is not None and state == "COMPLETED":
            fail(f"ended before job {job} could be cancelled: more steps (--train.epochs)", log)
        if state != ("COMPLETED" if until is None else "CANCELLED"):
            fail(f"ended as {state} (job {job})", log)
        # Files that a node has written appear late on some network file systems (nfs(5)).
        end = time.monotonic() + 65 * (until is None)
        while not (run.folder / "result.json").exists() and time.monotonic() < end:
            os.listdir(run.folder)
            time.sleep(1)


def slurm(*words: str) -> str:
    """Runs a SLURM command and returns its output."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"distvgg: error: {words[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def fail(what: str, log: Path) -> NoReturn:
    """Exits with the last lines of a log and an error message."""
    lines = log.read_text().splitlines()[-20:] if log.exists() else []
    raise SystemExit("\n".join([*lines, f"distvgg: error: a run of the proof {what}; see {log}"]))


def say(line: str) -> None:
    """Prints progress to stderr, apart from the results."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
