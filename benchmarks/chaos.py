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
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from distvgg.config import load
from distvgg.data.plan import BatchPlan
from distvgg.training.trainer import evaluation_due

ROOT = Path(__file__).parent.parent
AIMS = ("start", "training", "evaluation", "checkpoint")
DAMAGES = ("flipped bit", "truncated file", "missing file", "empty folder")
TRAIN_SIZE = 9000  # of the synthetic set, without its validation images


class Training:
    """One start of the run, in processes of its own under the real launcher."""

    def __init__(self, folder: Path, options: argparse.Namespace, processes: int) -> None:
        self.folder = folder
        self.processes = processes
        self.before = len(rows(folder))
        self._options = options
        self._log = folder.with_name(f"{folder.name}.log").open("a+")
        self._log_start = self._log.tell()
        self._launcher = subprocess.Popen(
            command(folder, options, processes),
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        with suppress(psutil.Error):
            launcher = psutil.Process(self._launcher.pid)
            return list(launcher.children()) if self.processes > 1 else [launcher]
        return []

    def ended(self) -> bool:
        return self._launcher.poll() is not None

    def finish(self) -> None:
        """Waits for the end, which must be a good one."""
        code = self._launcher.wait(timeout=600)
        if code != 0:
            raise SystemExit(f"the run in {self.folder} ended with {code}:\n{self.said()}")

    def kill(self, victims: list[psutil.Process]) -> str:
        """SIGKILL; returns what the run was doing, looked at with all of it held still."""
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
        if len(victims) == len(everyone) and self._launcher.poll() is None:
            self._launcher.kill()
        self._launcher.wait(timeout=20)
        psutil.wait_procs(everyone, timeout=20)
        # Outside training a process may have nothing left to hear from the others.
        survived = len(victims) < len(everyone) and doing == "training"
        if survived and not re.search("lost contact|another process died", self.said()):
            raise SystemExit(f"a process died, and no other said so:\n{self.said()}")
        return doing

    def said(self) -> str:
        self._log.seek(self._log_start)
        return self._log.read()

    def _doing(self) -> str:
        if any((self.folder / "checkpoints").glob(".step_*")):
            return "checkpoint"
        if evaluating(rows(self.folder), self._options):
            return "evaluation"
        if any("test/loss" in row for row in rows(self.folder)[-1:]):
            return "end"
        return "training" if len(rows(self.folder)) > self.before else "start"


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
    Training(folder / "undisturbed", options, counts[0]).finish()
    chaos = random.Random(options.seed)
    starts: Counter[int] = Counter()
    hits: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    damages: Counter[str] = Counter()
    runs, differing, kills = 0, [], 0
    aims: list[str] = []

    def start(run: Path) -> Training:
        processes = chaos.choice(counts)
        starts[processes] += 1
        return Training(run, options, processes)

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
            doing = training.kill([chaos.choice(everyone)] if one and everyone else everyone)
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


def command(folder: Path, options: argparse.Namespace, processes: int) -> list[str]:
    """Many rows and checkpoints, so that much can go wrong; else the recipe as it is."""
    launcher = [
        *("-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "accelerate_config.yaml")),
        *("--num_processes", str(processes)),
    ]
    return [
        *(sys.executable, *(launcher if processes > 1 else ())),
        *("-m", "distvgg", "train", "quickstart"),
        *("--run-dir", str(folder), "--train.epochs", str(options.epochs)),
        *("--track.wandb", "false", "--track.every_steps", "1", "--checkpoint.every_steps", "10"),
    ]


def wait_for(aim: str, training: Training, chaos: random.Random) -> bool:
    """Waits for a moment of a kind; False where the run ends before."""
    folder, options = training.folder, training._options
    moments: dict[str, tuple[Callable[[], Any], float]] = {
        "start": (training.workers, 4.0),
        "training": (lambda: len(rows(folder)) > training.before, 3.0),
        "evaluation": (lambda: evaluating(rows(folder), options), 0.2),
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


def evaluating(found: list[dict[str, Any]], options: argparse.Namespace) -> bool:
    """Whether the last row is followed by an evaluation's."""
    if not found or "test/loss" in found[-1]:
        return False
    config = load("quickstart").replace(train__epochs=options.epochs)
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


def differences(whole: Path, run: Path) -> list[str]:
    """Where a run differs from the undisturbed one."""
    found = []
    expected, got = (
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(folder)]
        for folder in (whole, run)
    )
    if len(expected) != len(got):
        found.append(f"{len(got)} rows of {len(expected)}")
    found += [f"{b} is not {a}" for a, b in zip(expected, got, strict=False) if a != b][:3]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, run)]
    if weights[0] != weights[1]:
        found.append("model.safetensors")
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def show(line: str) -> None:
    """Progress, apart from the report."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
