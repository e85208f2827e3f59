"""Trains one short run on several numbers of processes, and once with kills; compares the bytes.

    python launch/prove.py [RECIPE] [--processes 1,2,4] [--dir DIR] [--section.field VALUE ...]
    python launch/prove.py --slurm [--nodes 1,2] [--sbatch "OPTIONS"] [--dir DIR] ...

Prints for each run the SHA-256 of its model.safetensors, and of its rows of metrics.jsonl without
perf/*; then `equal`, or `DIFFERENT` and the first row that is, with exit code 1. Knows of distvgg
what any user does: its commands and the files of a run folder.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
# 24 steps of what people train with, in seconds on a core.
SHORT = (
    *("quickstart", "--train.epochs", "4", "--data.train_size", "1500", "--model.width", "0.1"),
    *("--optim.name", "muon", "--optim.ema_decay", "0.9", "--augment.trivial", "true"),
    *("--augment.cutmix_alpha", "1", "--augment.mix_probability", "0.5"),
)
# What a proof needs of any run: rows to kill it by, checkpoints to go on from, no tracker.
WATCHED = (
    *("--track.every_steps", "1", "--checkpoint.every_steps", "4"),
    *("--track.wandb", "false", "--track.tensorboard", "false"),
)
ROWS_BEFORE_A_KILL = 7
PATIENCE = 3600.0
Row = dict[str, Any]


class Run(NamedTuple):
    """A run folder, and the numbers of processes or nodes of its starts; all but the last are cut
    off in the middle."""

    folder: Path
    starts: tuple[int, ...]

    def __str__(self) -> str:
        return " -> ".join(map(str, self.starts))


def main(words: Sequence[str]) -> int:
    """Runs the proof; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", default="1,2,4", help="on this machine")
    parser.add_argument("--dir", type=Path, help="keep the run folders here; default: nowhere")
    parser.add_argument("--slurm", action="store_true", help="by jobs instead")
    parser.add_argument("--nodes", default="1,2", help="with --slurm")
    parser.add_argument("--sbatch", default="", help="options of sbatch, with --slurm")
    named = bool(words) and not words[0].startswith("-")
    options, overrides = parser.parse_known_args(words[named:])
    train = [*(words[:1] if named else SHORT), *WATCHED, *overrides]
    if options.dir and options.dir.exists() and any(options.dir.iterdir()):
        parser.error(f"--dir {options.dir} is not empty: choose a new folder")
    counts = [int(n) for n in (options.nodes if options.slurm else options.processes).split(",")]
    with tempfile.TemporaryDirectory(dir=Path.cwd() if options.slurm else None) as temporary:
        folder = (options.dir or Path(temporary)).resolve()
        if options.slurm:
            start: Callable[[Run, int, bool], None] = Jobs(train, shlex.split(options.sbatch))
        else:
            start = Processes(train, counts)
            counts = start.counts
        runs = [Run(folder / str(n), (n,)) for n in counts]
        # The most, the fewest, and those between.
        killed = (counts[-1], counts[0], counts[len(counts) // 2])
        runs.append(Run(folder / "killed", killed))
        began = time.monotonic()
        for run in runs:
            for nth, n in enumerate(run.starts):
                whole = nth == len(run.starts) - 1
                say(f"{time.monotonic() - began:4.0f} s  {run}: start {nth + 1} on {n}")
                start(run, n, not whole)
        return compare(runs, "nodes" if options.slurm else "processes")


def compare(runs: Sequence[Run], unit: str) -> int:
    """Prints the sums of all runs and whether they are equal; returns the exit code."""
    width = max(len(unit), *(len(str(run)) for run in runs))
    print(f"{unit:<{width}}  {'SHA-256 of model.safetensors':<64}  rows  and theirs")
    sums = [digests(run.folder) for run in runs]
    for run, (weights, table) in zip(runs, sums, strict=True):
        print(f"{run!s:<{width}}  {weights}  {len(rows(run.folder)):>4}  {table[:16]}")
    if len(set(sums)) == 1:
        print("equal")
        return 0
    print("DIFFERENT")
    for run in runs[1:]:
        for ours, first in zip(rows(run.folder), rows(runs[0].folder), strict=False):
            if ours != first:
                print(f"{runs[0]}: {json.dumps(first)}\n{run}: {json.dumps(ours)}")
                break
    return 1


def digests(folder: Path) -> tuple[str, str]:
    """The SHA-256 of a run's weights, and of its rows."""
    weights = (folder / "model.safetensors").read_bytes()
    table = "\n".join(map(json.dumps, rows(folder))).encode()
    return hashlib.sha256(weights).hexdigest(), hashlib.sha256(table).hexdigest()


def rows(folder: Path) -> list[Row]:
    """The whole rows of metrics.jsonl so far, without what a clock measured."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    table = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in table]


def in_the_middle(folder: Path, before: int) -> bool:
    """Whether a start has come some rows and a checkpoint further."""
    saved = any((folder / "checkpoints").glob("step_*"))
    return saved and len(rows(folder)) >= before + ROWS_BEFORE_A_KILL


class Processes:
    """Starts of a run on this machine, by launch/node.py; SIGKILL cuts one off.

    Attributes:
        counts: the numbers of processes that this machine has devices for.
    """

    def __init__(self, train: Sequence[str], counts: Sequence[int]) -> None:
        import torch

        self._train, self._env = train, dict(os.environ)
        gpus = 0 if os.environ.get("ACCELERATE_USE_CPU") else torch.cuda.device_count()
        self.counts = [n for n in counts if gpus < 2 or n <= gpus]
        if gpus == 1:
            say("one GPU: all processes share it, and exchange through host memory (gloo)")
            self._env |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cuda:0"}

    def __call__(self, run: Run, n: int, cut_off: bool) -> None:
        """Runs to the end, or to a kill in the middle."""
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        before, log = len(rows(run.folder)), run.folder.with_suffix(".log")
        node = (sys.executable, str(ROOT / "launch" / "node.py"), "--processes", str(n), "--")
        with log.open("w") as output:
            process = subprocess.Popen(
                [*node, *self._train, "--run-dir", str(run.folder)],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        while process.poll() is None:
            if cut_off and in_the_middle(run.folder, before):
                tree = psutil.Process(process.pid)
                killed = [tree, *tree.children(recursive=True)]
                for one in killed:
                    one.kill()
                process.wait()
                psutil.wait_procs(killed, 30)
                return
            time.sleep(0.01)
        if process.returncode or cut_off:
            fail(f"ended with {process.returncode}" + ", too early" * cut_off, log)


class Jobs:
    """Starts of a run as jobs of launch/slurm.sbatch; scancel cuts one off."""

    def __init__(self, train: Sequence[str], options: Sequence[str]) -> None:
        self._train, self._options = train, options

    def __call__(self, run: Run, n: int, cut_off: bool) -> None:
        """Waits for the end of a job, or cancels it in the middle."""
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        before, log = len(rows(run.folder)), run.folder.with_suffix(".log")
        script = (str(ROOT / "launch" / "slurm.sbatch"), *self._train, "--run-dir", str(run.folder))
        sbatch = ("sbatch", "--parsable", f"--output={log}", *self._options, f"--nodes={n}")
        job = slurm(*sbatch, *script).split(";")[0]
        end = time.monotonic() + PATIENCE
        state, cancelled = "PENDING", False
        while state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            if cut_off and not cancelled and in_the_middle(run.folder, before):
                slurm("scancel", job)
                cancelled = True
            if time.monotonic() > end:
                fail(f"job {job} is still {state}", log)
            time.sleep(0.2)
            shown = slurm("scontrol", "--oneliner", "show", "job", job)
            state = dict(w.split("=", 1) for w in shown.split() if "=" in w)["JobState"]
        if state != ("CANCELLED" if cut_off else "COMPLETED"):
            fail(f"job {job} ended as {state}", log)


def slurm(*words: str) -> str:
    """What a command of SLURM's prints."""
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def fail(what: str, log: Path) -> None:
    """Ends with what went wrong, and the end of a log."""
    lines = log.read_text().splitlines()[-20:] if log.exists() else []
    raise SystemExit("\n".join([*lines, f"distvgg: error: a run of the proof {what}"]))


def say(line: str) -> None:
    """Progress, apart from the sums."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
