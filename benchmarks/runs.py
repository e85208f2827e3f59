"""Trainings in processes of their own, started as a user starts them, for benchmarks and tests.

Invariant: they are observed by the files that they write and by what the kernel knows of their
processes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from distvgg.metrics import STEP, Row
from distvgg.runs.layout import METRICS_FILE, STOP_FILE, WEIGHTS_FILE

ROOT = Path(__file__).parent.parent
# `fast` without what it has beyond its peers: VGG-16 on CIFAR by SGD, 4 micro-batches of 64 a step.
PLAIN: dict[str, Any] = {
    "model.max_pools": "1,2,3,4,5",
    "model.dropout": 0.5,
    "model.init": "he",
    "train.global_batch_size": 256,
    "train.micro_batch_size": 64,
    "optim.name": "sgd",
    "optim.lr": 0.1,
    "augment.flip": "random",
    "augment.cutmix_alpha": 0,
}
POLL = 0.002  # seconds: of what is timed here, seconds long, it is a thousandth
ROW_TIMEOUT = 600.0  # seconds for a row to come
DISTVGG = ("-m", "distvgg")


def words_of(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as they are typed on a command line."""
    return [word for name, value in overrides.items() for word in (f"--{name}", str(value))]


def command(
    words: Sequence[str],
    processes: int = 1,
    *,
    program: Sequence[str] = DISTVGG,
    launcher: Sequence[str] = (),
) -> list[str]:
    """Returns the command `python PROGRAM WORDS`, under `accelerate launch` for several processes.

    `launcher` holds more options of `accelerate launch`.
    """
    if processes == 1:
        return [sys.executable, *program, *words]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)),
        *("--config_file", str(ROOT / "accelerate_config.yaml"), "--main_process_port", "0"),
        *launcher,
        *program,
        *words,
    ]


def rows(run_dir: Path) -> list[Row]:
    """Returns the complete rows of a run's metrics.jsonl, also while it is being written."""
    path = run_dir / METRICS_FILE
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def measured(run_dir: Path) -> list[Row]:
    """Returns the rows without perf/*, which no two runs have in common."""
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows(run_dir)]


def differences(expected: Path, run_dir: Path) -> list[str]:
    """Lists where a run differs from another, by its rows and the bytes of its weights."""
    one, other = measured(expected), measured(run_dir)
    found = [] if len(one) == len(other) else [f"{len(other)} rows of {len(one)}"]
    found += [f"{b} is not {a}" for a, b in zip(one, other, strict=False) if a != b][:3]
    weights = [(folder / WEIGHTS_FILE).read_bytes() for folder in (expected, run_dir)]
    return found + [WEIGHTS_FILE] * (weights[0] != weights[1])


class Training:
    """A training under way, its first process in a session of its own.

    As a context manager, it leaves no process behind.

    Args:
        words: command line of distvgg, without --run-dir.
        log: file for its output; by default beside the run folder.
        command_options: of `command`.

    Attributes:
        began: start of its first process, by `time.perf_counter`.
    """

    def __init__(
        self,
        run_dir: Path,
        words: Sequence[str],
        *,
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        **command_options: Sequence[str],
    ) -> None:
        self.run_dir = run_dir
        self.log = log or run_dir.with_name(f"{run_dir.name}.log")
        with self.log.open("a") as output:
            self._log_begin = output.tell()
            self.began = time.perf_counter()
            self.process = self._start(
                command([*words, "--run-dir", str(run_dir)], processes, **command_options),
                os.environ | dict(env or {}),
                output,
            )
        self._has_launcher = processes > 1

    def _start(
        self, words: Sequence[str], env: dict[str, str], output: IO[str]
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            words,
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def workers(self) -> list[psutil.Process]:
        """Lists the processes that train, in order of rank."""
        with suppress(psutil.Error):
            first = psutil.Process(self.process.pid)
            return [p for p in first.children() if _trains(p)] if self._has_launcher else [first]
        return []

    def rows(self) -> list[Row]:
        """Returns the complete rows so far."""
        return rows(self.run_dir)

    def until(self, condition: Callable[[], Any], within: float = 60, poll: float = 0.005) -> None:
        """Waits for something that the run does.

        Raises:
            RuntimeError: it ended before, or did not do it in time.
        """
        end = time.monotonic() + within
        while not condition():
            over = self.process.poll() is not None or time.monotonic() > end
            if over and not condition():  # the last thing that it did may be what was awaited
                raise RuntimeError(f"{self.run_dir}: ended or timed out:\n{self.output()}")
            time.sleep(poll)

    def until_step(self, step: int, within: float = 60) -> list[Row]:
        """Waits for a row of this step or a later one, and returns all rows by then."""
        self.until(lambda: any(row[STEP] >= step for row in self.rows()[-1:]), within, POLL)
        return self.rows()

    def ended(self) -> bool:
        """Returns True if it ended, which must be with exit code 0.

        Raises:
            RuntimeError: it ended with another code.
        """
        code = self.process.poll()
        if code:
            raise RuntimeError(f"{self.run_dir}: exit code {code}:\n{self.output()}")
        return code == 0

    def kill(self) -> None:
        """Sends SIGKILL to all of it at once, and waits until no process is left."""
        first = psutil.Process(self.process.pid)
        members = [first, *first.children()]  # torch gives each worker a session of its own
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(10)
        _, alive = psutil.wait_procs(members[1:], 10)
        if alive:
            raise RuntimeError(f"{self.run_dir}: alive after SIGKILL: {alive}")

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def end(self, within: float = 60) -> tuple[int, str]:
        """Waits for the end, and returns the exit code and the output."""
        code = self.process.wait(within)
        return code, self.output()

    def output(self) -> str:
        """Returns what it printed so far."""
        with self.log.open() as file:
            file.seek(self._log_begin)
            return file.read()


def _trains(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # it has just ended
        return False
    return "train" in words


@contextmanager
def training(
    words: Sequence[str], processes: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[Training]:
    """Trains in a temporary folder; requests a stop when the block ends.

    `words` are recipe and options, without --run-dir.
    """
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary) / "run"
        with Training(run_dir, ["train", *words], processes=processes, env=env) as started:
            yield started
            (run_dir / STOP_FILE).touch()
            started.process.wait(ROW_TIMEOUT)
            started.ended()
