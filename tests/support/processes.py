"""Starts distvgg as a user does: in processes of its own, by the real launcher."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
FLOAT64 = (str(ROOT / "tests" / "support" / "float64.py"),)
# A run of seconds that still has BatchNorm, dropout, augmentation and several micro-batches a step.
TINY = (
    *("--data.train_size", "600", "--data.val_size", "103", "--model.width", "0.05"),
    *("--train.epochs", "1", "--train.global_batch_size", "64", "--train.micro_batch_size", "16"),
    *("--train.precision", "no", "--track.wandb", "false", "--track.every_steps", "1"),
)


CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # see `command`


def tiny(run_dir: Path, *args: str, recipe: str = "quickstart") -> list[str]:
    """The arguments of a tiny run."""
    return ["train", recipe, "--run-dir", str(run_dir), *TINY, *args]


def command(
    args: list[str] | tuple[str, ...],
    processes: int = 1,
    *,
    program: tuple[str, ...] = ("-m", "distvgg"),
    launcher: tuple[str, ...] = (),
) -> list[str]:
    """`python -m distvgg ARGS`, or the same under `accelerate launch` on CPU processes.

    One thread each: on busy cores, threads of tiny steps wait for each other most of the time.
    """
    if processes == 1:
        return [sys.executable, *program, *args]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)),
        *("--config_file", str(ROOT / "accelerate_config.yaml"), "--main_process_port", "0"),
        *launcher,
        *program,
        *args,
    ]


def run(
    args: list[str] | tuple[str, ...],
    *,
    processes: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    program: tuple[str, ...] = ("-m", "distvgg"),
) -> subprocess.CompletedProcess[str]:
    """Runs a command of distvgg's to its end."""
    return subprocess.run(
        command(args, processes, program=program),
        env=os.environ | CPU | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )


def run_module(*words: str) -> str:
    """What `python -m WORDS` prints from the root of the checkout; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | CPU,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Started:
    """A training that is under way, its launcher and workers in a session of their own."""

    def __init__(
        self,
        run_dir: Path,
        *args: str,
        processes: int = 1,
        recipe: str = "quickstart",
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "distvgg"),
        launcher: tuple[str, ...] = (),
        log: Path | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._output = log or run_dir.with_name(f"{run_dir.name}.log")
        words = tiny(run_dir, *args, recipe=recipe)
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command(words, processes, program=program, launcher=launcher),
                env=os.environ | CPU | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def workers(self) -> list[psutil.Process]:
        """The processes that train, in order of rank."""
        me = psutil.Process(self.process.pid)
        found = [p for p in (me, *me.children()) if "train" in _words(p)]
        return [p for p in found if "accelerate.commands.launch" not in _words(p)]

    def until(self, condition: Callable[[], bool], within: float = 60) -> None:
        """Waits for something that the run does."""
        end = time.monotonic() + within
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)

    def until_step(self, step: int) -> None:
        """Waits for a row of this step or a later one."""
        self.until(lambda: any(row["step"] >= step for row in rows(self.run_dir)[-1:]))

    def kill(self) -> None:
        """SIGKILL to all of it at once, and waits until no process is left."""
        members = [self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children())]
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        psutil.wait_procs([psutil.Process(p) for p in members if psutil.pid_exists(p)], 10)

    def end(self, within: float = 60) -> tuple[int, str]:
        """Waits for the end: exit code and all that was said."""
        code = self.process.wait(within)
        return code, self.output()

    def output(self) -> str:
        return self._output.read_text()


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:  # it has just ended
        return []
    return words


def train(run_dir: Path, *args: str, recipe: str = "quickstart", **how: Any) -> str:
    """Trains into a folder, must succeed; returns what was printed."""
    done = run(tiny(run_dir, *args, recipe=recipe), **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl, also while it is being written."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The rows without what a clock measured, which no two runs have in common."""
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows(run_dir)]


def assert_same_run(one: Path, other: Path) -> None:
    """Every row, and every byte of the weights."""
    assert measured(one) == measured(other)
    weights = [(d / "model.safetensors").read_bytes() for d in (one, other)]
    assert weights[0] == weights[1]


def at_a_terminal(args: list[str]) -> str:
    """What a terminal shows of `python -m distvgg ARGS`, which must succeed."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    with subprocess.Popen(
        [sys.executable, "-m", "distvgg", *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | CPU | {"TQDM_MININTERVAL": "0"},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        shown = _read_terminal(ours, process, within=120)
    os.close(ours)
    assert process.returncode == 0, shown
    return shown


def _read_terminal(ours: int, process: subprocess.Popen[bytes], within: float) -> str:
    """All that a process shows; one that is still there at the end, waiting, is killed."""
    os.set_blocking(ours, False)
    shown, end = b"", time.monotonic() + within
    while time.monotonic() < end:
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # the other side is closed
            break
    else:
        process.kill()
    return shown.decode()
