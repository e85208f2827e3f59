"""Kills a training again and again, damages its checkpoints, and compares what it ends with.

    python -m benchmarks.chaos [--kills 100] [--seed 0] [--processes 1,2,4] [--epochs 8] [--dir DIR]

Trains the quickstart recipe once undisturbed. Then starts it over and over, on a number of
processes drawn anew each time, and sends SIGKILL, to all of its processes or to one, at moments
drawn at random: in the start, in training, in an evaluation, while a checkpoint is written. Between
two starts a checkpoint may lose a file, bytes or a bit. A run that comes to its end all the same
must equal the undisturbed one: every row of metrics.jsonl but perf/*, and every byte of
model.safetensors. Then the next begins in a new folder, until all kills are done. Prints, as one
JSON object, what was hit; exits with 1 where anything differs.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runs import Training, differences, rows
from distvgg.data.plan import BatchPlan
from distvgg.recipe import load
from distvgg.training.trainer import evaluation_due

CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
AIMS = ("start", "training", "evaluation", "checkpoint")
DAMAGES = ("flipped bit", "truncated file", "missing file", "empty folder")
TRAIN_SIZE = 9000  # of the synthetic set, without its validation images


class Start(Training):
    """One start of the run."""

    def __init__(self, run_dir: Path, options: argparse.Namespace, processes: int) -> None:
        # Many rows and checkpoints, so that much can go wrong; else the recipe as it is.
        words = [
            *("train", "quickstart", "--train.epochs", str(options.epochs)),
            *("--track.wandb", "false", "--track.every_steps", "1"),
            *("--checkpoint.every_steps", "10"),
        ]
        self.before = len(rows(run_dir))
        self.epochs = options.epochs
        super().__init__(run_dir, words, processes=processes, env=CPU)

    def finish(self) -> None:
        """Waits for the end, which must be a good one."""
        self.process.wait(600)
        self.ended()

    def kill_some(self, victims: list[psutil.Process]) -> str:
        """Kills processes; returns what the run was doing, while all of them are suspended."""
        everyone = self.workers()
        for process in everyone:
            with suppress(psutil.Error):
                process.suspend()
        doing = self._doing()
        for process in victims:
            with suppress(psutil.Error):
                process.kill()
        for process in everyone:
            with suppress(psutil.Error):
                process.resume()
        if len(victims) == len(everyone) and self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=20)
        psutil.wait_procs(everyone, timeout=20)
        # Outside training a process may have nothing left to hear from the others.
        survived = len(victims) < len(everyone) and doing == "training"
        if survived and not re.search("lost contact|another process died", self.output()):
            raise SystemExit(f"a process died, and no other said so:\n{self.output()}")
        return doing

    def _doing(self) -> str:
        if any((self.run_dir / "checkpoints").glob(".step_*")):
            return "checkpoint"
        if evaluating(self.rows(), self.epochs):
            return "evaluation"
        if any("test/loss" in row for row in self.rows()[-1:]):
            return "end"
        return "training" if len(self.rows()) > self.before else "start"


def main() -> int:
    """Runs the whole experiment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", default="1,2,4", help="of which one is drawn at each start")
    parser.add_argument("--epochs", type=float, default=8.0, help="of the quickstart recipe")
    parser.add_argument("--dir", type=Path, help="where to keep the runs; default: nowhere")
    options = parser.parse_args()
    folder = options.dir or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    counts = [int(n) for n in options.processes.split(",")]
    Start(folder / "undisturbed", options, counts[0]).finish()
    chaos = random.Random(options.seed)
    starts: Counter[int] = Counter()
    hits: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    damages: Counter[str] = Counter()
    runs, differing, kills = 0, [], 0
    aims: list[str] = []

    def start(run: Path) -> Start:
        processes = chaos.choice(counts)
        starts[processes] += 1
        return Start(run, options, processes)

    while kills < options.kills or runs == 0:
        run = folder / f"run{runs}"
        while kills < options.kills:
            aims = aims or chaos.sample(AIMS, len(AIMS))
            training = start(run)
            if not wait_for(aims.pop(), training, chaos):
                training.finish()  # it came to its end first, which must be a good one
                break
            everyone = training.workers()
            one = chaos.random() < 0.5
            doing = training.kill_some([chaos.choice(everyone)] if one and everyone else everyone)
            kills += 1
            hits[doing] += 1
            victims["one process" if one else "all processes"] += 1
            show(f"kill {kills}: {doing}, {len(rows(run))} rows")
            if chaos.random() < 0.3 and (damage := damage_a_checkpoint(run, chaos)):
                damages[damage] += 1
        start(run).finish()
        runs += 1
        differing += [f"{run.name}: {what}" for what in differences(folder / "undisturbed", run)]
        show(f"run {runs} is over: {differing or 'no difference'}")
    report = {
        "kills": kills,
        "hit": dict(sorted(hits.items())),
        "killed": dict(sorted(victims.items())),
        "damaged": dict(sorted(damages.items())),
        "runs": runs,
        "rows_compared": len(rows(folder / "undisturbed")),
        "differences": differing,
        "starts_by_processes": dict(sorted(starts.items())),
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(report, indent=2))
    if options.dir is None and not differing:
        shutil.rmtree(folder)
    return 1 if differing else 0


def wait_for(aim: str, training: Start, chaos: random.Random) -> bool:
    """Waits for a moment of a kind; False where the run ends before."""
    folder = training.run_dir
    moments: dict[str, tuple[Callable[[], Any], float]] = {
        "start": (training.workers, 4.0),
        "training": (lambda: len(rows(folder)) > training.before, 3.0),
        "evaluation": (lambda: evaluating(rows(folder), training.epochs), 0.2),
        "checkpoint": (lambda: any((folder / "checkpoints").glob(".step_*.tmp")), 0.01),
    }
    seen, longest = moments[aim]
    old = len(rows(folder)) if aim == "evaluation" else 0
    while not seen() or (aim == "evaluation" and len(rows(folder)) <= old):
        if training.ended():
            return False
        time.sleep(0.001)
    end = time.monotonic() + chaos.uniform(0, longest)
    while time.monotonic() < end:
        if training.ended():
            return False
        time.sleep(0.001)
    return not training.ended()


def evaluating(found: list[dict[str, Any]], epochs: float) -> bool:
    """Whether the last row is followed by an evaluation's."""
    if not found or "test/loss" in found[-1]:
        return False
    config = load("quickstart").replace(train__epochs=epochs)
    plan = BatchPlan(TRAIN_SIZE, config.train.global_batch_size, config.train.micro_batch_size)
    steps, last = plan.steps(config.train.epochs), found[-1]["step"]
    if "val/loss" in found[-1]:
        return bool(last == steps)  # test is next
    return evaluation_due(last, config.eval.every_epochs, plan, steps)


def damage_a_checkpoint(run: Path, chaos: random.Random) -> str | None:
    """Spoils one of a run's checkpoints; what was done, None where there is none."""
    found = sorted((run / "checkpoints").glob("step_*"))
    if not found:
        return None
    victim, damage = chaos.choice(found), chaos.choice(DAMAGES)
    file = chaos.choice(sorted(victim.iterdir()) or [victim / "manifest.json"])
    content = bytearray(file.read_bytes()) if file.exists() else bytearray()
    if damage == "flipped bit" and content:
        content[chaos.randrange(len(content))] ^= 1 << chaos.randrange(8)
        file.write_bytes(content)
    elif damage == "truncated file" and content:
        file.write_bytes(content[: chaos.randrange(len(content))])
    elif damage == "missing file":
        file.unlink(missing_ok=True)
    else:
        shutil.rmtree(victim)
        victim.mkdir()
    return damage


def show(line: str) -> None:
    """Progress, apart from the report."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
