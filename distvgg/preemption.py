"""Conversion of signals and the stop file into a stop request.

The training loop honours a stop request at the next step boundary. The loop also saves the run and
agrees with the other ranks.

Invariant: a handler only sets a flag. Signals after the first, except Ctrl-C, are ignored, also
while the interpreter exits. A handler raises only where nothing can be lost (`interruptible`).

This module imports nothing heavy, so that the handlers are in place before any slow import.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# Seconds between two checks for the stop file. On a network file system each check is a request.
LOOK_EVERY = 0.5
# Seconds that the main thread has to detect the death of another process by itself.
SECONDS_TO_NOTICE = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Preempted(BaseException):
    """The exit of a run after a stop request.

    Preempted is not an error and therefore not an Exception: no handler of errors may catch it.

    Attributes:
        interrupted: True if the stop request was Ctrl-C.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.interrupted = _stop_reason == "SIGINT"


# A process has one set of signal handlers, and therefore one stop request.
_installed = False
_stop_reason: str | None = None
_interruptible = False
_stop_file: Path | None = None
_looking = True
_looked = -LOOK_EVERY


def install() -> None:
    """Installs handlers for SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C. A second Ctrl-C aborts.

    When a launcher dies, Linux sends SIGTERM to its workers. The launcher of a single process does
    not forward signals, so a signal to that launcher reaches its worker in this way.
    """
    global _installed
    if _installed:
        return
    _installed = True
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)
    if launched and sys.platform == "linux":
        threading.Thread(target=_exit_if_peer_died, args=_signal_pipe(), daemon=True).start()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # After the pipe: a SIGTERM between the two would count as a preemption even if a worker died.
    for number in SIGNALS:
        signal.signal(number, _heard)


def ignore() -> None:
    """Ignores all signals except Ctrl-C from now on, because the run is exiting.

    Python removes its own handlers at exit. Without this call, a late signal would then kill a
    process that has saved everything. Does nothing in a program that calls `distvgg.train` itself,
    whose signals are its own.
    """
    if not _installed:
        return
    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def watch_stop_file(stop_file: Path) -> None:
    """Treats the appearance of a file as a stop request as well.

    Forgets the request of the file of an earlier run in this process.
    """
    global _stop_file, _looking, _stop_reason
    if _stop_file is not None and _stop_reason == _stop_file.name:
        _stop_reason = None
    _stop_file, _looking = stop_file, True


def stop_watching() -> None:
    """Stops checking for the stop file.

    One checking process per run is enough if all ranks agree in each step. A thousand processes
    would send a file system two thousand requests a second.
    """
    global _looking
    _looking = False


def requested() -> bool:
    """Returns True if this process has a stop request."""
    global _looked, _stop_reason
    now = time.monotonic()
    if _stop_reason is None and _looking and _stop_file and now - _looked >= LOOK_EVERY:
        _looked = now
        # Unlike Path.exists, os.path.exists is False on a transient network file system error.
        if os.path.exists(_stop_file):
            _stop_reason = _stop_file.name
    return _stop_reason is not None


def stop_reason() -> str:
    """Returns the source of the stop request: a signal's name, STOP, or another process."""
    if _stop_reason is None and _stop_file is not None and os.path.exists(_stop_file):
        return _stop_file.name  # another rank saw it first
    return _stop_reason or "another process"


def check() -> None:
    """Raises Preempted on a stop request, for code that has nothing to save.

    Raises:
        Preempted: this process has a stop request.
    """
    if requested():
        raise Preempted


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes a signal inside the block raise Preempted at once.

    For long work of which nothing needs saving and during which no other rank waits for this rank.
    """
    global _interruptible
    check()
    _interruptible = True
    try:
        yield
    finally:
        _interruptible = False


def wait(seconds: float) -> bool:
    """Sleeps until a stop request, for at most `seconds`.

    Returns:
        True if this process has a stop request.
    """
    end = time.monotonic() + seconds
    while not requested():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _heard(number: int, frame: FrameType | None) -> None:
    global _stop_reason
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    ignore()
    if _stop_reason is None:
        _stop_reason = signal.Signals(number).name
    if _interruptible:
        raise Preempted


def _signal_pipe() -> tuple[int]:
    """Returns the read end of a pipe that receives the number of each signal as one byte.

    The byte arrives even while the main thread is blocked in a C call, where no Python handler
    runs.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return (read,)


def _exit_if_peer_died(signals: int) -> None:
    """Exits if the launcher's SIGTERM was caused by the death of another worker.

    The main thread may wait for that worker forever, in NCCL or during rendezvous. At a preemption,
    all workers of the launcher are alive when the signal arrives.
    """
    while number := os.read(signals, 1):
        if number[0] == signal.SIGTERM and _workers() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            time.sleep(SECONDS_TO_NOTICE)
            rank = os.environ.get("RANK")
            print(f"distvgg: error on process {rank}: another process died", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)


def _workers() -> int:
    """Returns the number of living children of this process's parent, this process included."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = file.read().split()
    except OSError:  # a kernel without this file: no worker counts as dead
        return sys.maxsize
    living = 0
    for child in children:
        with suppress(OSError), open(f"/proc/{child}/stat") as file:
            living += file.read().rpartition(")")[2].split()[0] != "Z"
    return living
