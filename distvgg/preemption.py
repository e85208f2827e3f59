"""A signal or a stop file -> the wish to stop, which the training loop grants at its next boundary.

Invariant: a handler only sets a flag, and signals after the first are ignored, also while the
interpreter exits. To save, and to agree with the other ranks, is the loop's business. Only where
nothing can be lost (`interruptible`) does a signal raise. Imports nothing heavy, so that it is in
place before all that does.
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
# Seconds between two looks for the stop file: on a network file system each is a request.
LOOK_EVERY = 0.5
# Seconds for the main thread to notice by itself that another process died.
SECONDS_TO_NOTICE = 3.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Preempted(BaseException):
    """The run was told to stop. Not an error, and so not an Exception: nothing on the way out may
    take it for one. `interrupted` where it was Ctrl-C."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.interrupted = _stop_reason == "SIGINT"


# A process has one set of signal handlers, and so one wish.
_installed = False
_stop_reason: str | None = None
_interruptible = False
_stop_file: Path | None = None
_looking = True
_looked = -LOOK_EVERY


def install() -> None:
    """Hears SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C from here on; the second Ctrl-C aborts.

    A launcher that dies takes its workers along: Linux sends them SIGTERM then. The launcher of a
    single process does not forward signals, so this is how one sent to it arrives.
    """
    global _installed
    if _installed:
        return
    _installed = True
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)
    if launched and sys.platform == "linux":
        threading.Thread(target=_exit_if_peer_died, args=_signal_pipe(), daemon=True).start()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # After the pipe, or a SIGTERM between the two would be a preemption where a worker died.
    for number in SIGNALS:
        signal.signal(number, _heard)


def ignore() -> None:
    """Ignores all but Ctrl-C from here on: the run is on its way out. A handler of Python's would
    be taken away at exit, and a late signal kill a process that has saved everything."""
    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def watch_stop_file(stop_file: Path) -> None:
    """Takes a file's appearance for the wish to stop as well."""
    global _stop_file, _looking
    _stop_file, _looking = stop_file, True


def stop_watching() -> None:
    """Stops looking for the stop file, for which one process of a run is enough where all agree in
    each step: a thousand would ask a file system two thousand times a second."""
    global _looking
    _looking = False


def requested() -> bool:
    """Whether this process was told to stop."""
    global _looked, _stop_reason
    now = time.monotonic()
    due = _looking and _stop_file is not None and now - _looked >= LOOK_EVERY
    if _stop_reason is None and _stop_file is not None and due:
        _looked = now
        if os.path.exists(_stop_file):  # unlike Path's, false on a network file system's hiccup
            _stop_reason = _stop_file.name
    return _stop_reason is not None


def stop_reason() -> str:
    """What told this process to stop: a signal's name, STOP, or another rank."""
    if _stop_reason is None and _stop_file is not None and os.path.exists(_stop_file):
        return _stop_file.name  # another rank saw it first
    return _stop_reason or "another process"


def check() -> None:
    """Leaves, if told to, from where nothing needs saving.

    Raises:
        Preempted: this process was told to stop.
    """
    if requested():
        raise Preempted


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal raises Preempted at once: for long work of which nothing need be saved, and
    in which no other rank waits for this one."""
    global _interruptible
    check()
    _interruptible = True
    try:
        yield
    finally:
        _interruptible = False


def wait(seconds: float) -> bool:
    """Sleeps until told to stop, at most so long; whether it was told."""
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
    """The end to read of a pipe that gets a byte, its number, as each signal comes: also while the
    main thread is in a call of C that does not return, where no handler of Python's is run."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return (read,)


def _exit_if_peer_died(signals: int) -> None:
    """Ends this process where its launcher's SIGTERM means that another worker died, and the main
    thread waits for that one for ever, as it does in NCCL and while the processes find each other.

    At a preemption all workers of the launcher are alive when the signal comes.
    """
    while number := os.read(signals, 1):
        if number[0] == signal.SIGTERM and _workers() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            time.sleep(SECONDS_TO_NOTICE)
            rank = os.environ.get("RANK")
            print(f"distvgg: error on process {rank}: another process died", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)


def _workers() -> int:
    """The living children of this process's parent, this one among them."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = file.read().split()
    except OSError:  # a kernel without this file: then nobody is known to be dead
        return sys.maxsize
    living = 0
    for child in children:
        with suppress(OSError), open(f"/proc/{child}/stat") as file:
            living += file.read().rpartition(")")[2].split()[0] != "Z"
    return living
