"""Starts distvgg as a user does: in processes of its own, by the real launcher."""

import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

import warm
from benchmarks.runs import DISTVGG, ROOT, Training, command, differences, measured, rows

__all__ = ["DISTVGG", "ROOT", "command", "measured", "rows"]

FLOAT64 = (str(ROOT / "tests" / "support" / "float64.py"),)
# A run of seconds that still has BatchNorm, dropout, augmentation and several micro-batches a step.
TINY = (
    *("--data.train_size", "600", "--data.val_size", "103", "--model.width", "0.05"),
    *("--train.epochs", "1", "--train.global_batch_size", "64", "--train.micro_batch_size", "16"),
    *("--train.precision", "no", "--track.wandb", "false", "--track.every_steps", "1"),
    *("--track.report", "false"),  # a second of each run
)


# One thread each: on busy cores, threads of tiny steps wait for each other most of the time.
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def tiny(run_dir: Path, *args: str, recipe: str = "quickstart") -> list[str]:
    """The arguments of a tiny run."""
    return ["train", recipe, "--run-dir", str(run_dir), *TINY, *args]


def run(
    args: list[str] | tuple[str, ...],
    *,
    processes: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    program: tuple[str, ...] = DISTVGG,
) -> subprocess.CompletedProcess[str]:
    """Runs a command of distvgg's to its end."""
    whole_env = os.environ | CPU | (env or {})
    _, *words = command(args, processes, program=program)
    if words[0] == "-m":
        done = warm.run(words[1], words[2:], whole_env, cwd, timeout)
        if done is not None:
            return done
    return subprocess.run(
        [sys.executable, *words],
        env=whole_env,
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


class Started(Training):
    """A tiny training that is under way."""

    def __init__(
        self,
        run_dir: Path,
        *args: str,
        recipe: str = "quickstart",
        env: dict[str, str] | None = None,
        **how: Any,
    ) -> None:
        words = ["train", recipe, *TINY, *args]
        super().__init__(run_dir, words, env=CPU | (env or {}), **how)

    def _start(self, words: Sequence[str], env: dict[str, str], output: IO[str]) -> Any:
        if words[1] == "-m":
            with open(os.devnull) as stdin:
                files = (stdin.fileno(), output.fileno(), output.fileno())
                started = warm.start(words[2], words[3:], env, ROOT, files, new_session=True)
            if started is not None:
                return started
        return super()._start(words, env, output)


def train(run_dir: Path, *args: str, recipe: str = "quickstart", **how: Any) -> str:
    """Trains into a folder, must succeed; returns what was printed."""
    done = run(tiny(run_dir, *args, recipe=recipe), **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_run(one: Path, other: Path) -> None:
    """Every row, and every byte of the weights."""
    assert measured(one) == measured(other)
    assert differences(one, other) == []


def descendants(pid: int, word: str = "") -> list[psutil.Process]:
    """The processes below one whose command line has a word; one that has just ended has none."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # W&B's client starts some that live for milliseconds
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_all(first: subprocess.Popen[str]) -> None:
    """Kills a process and all below it, as the end of a machine does."""
    for process in (psutil.Process(first.pid), *descendants(first.pid)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            process.kill()


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
