"""Ownership of a run folder: its config, its lock, and the markers of a stop.

Invariant: a folder belongs to one config, and to one living run at a time. A kill at any instant
leaves a folder that the same command can take up.
"""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from distvgg.config import Config, load
from distvgg.errors import RunError, UserError
from distvgg.runs.files import atomic_write
from distvgg.runs.layout import CONFIG_FILE, FAILURE_FILE, LOCK_FILE, LOGS, REQUEUE_FILE, STOP_FILE

AUTO = "train.precision"  # the one field whose value a run resolves
# What may lie in a folder that is not a run's yet: a start that was cut off, a user in a hurry.
_BEFORE_CONFIG = {LOCK_FILE, LOGS, STOP_FILE, REQUEUE_FILE, f".{CONFIG_FILE}.tmp"}


def check_same_config(run_dir: Path, config: Config) -> Config:
    """The config to run in a folder: the given one where the folder is new, else the folder's own,
    which may differ only in that `precision: auto` has been resolved there.

    Raises:
        UserError: the folder was made with another config; the message names the keys that differ.
    """
    path = run_dir / CONFIG_FILE
    if not path.exists():
        return config
    kept = load(str(path))
    theirs, ours = kept.flat(), config.flat()
    if ours[AUTO] == "auto":
        ours[AUTO] = theirs[AUTO]
    differ = [f"{k} is {theirs[k]} there, {v} here" for k, v in ours.items() if theirs[k] != v]
    if differ:
        raise UserError(
            f"run folder {run_dir} was made with another config ({'; '.join(differ)}): choose"
            " another --run-dir or the same values"
        )
    return kept


def check_is_run_dir(run_dir: Path) -> None:
    """Checks that a folder is a run's, or empty.

    Raises:
        UserError: it holds something else.
        OSError: it cannot be read.
    """
    strangers = {p.name for p in run_dir.iterdir()} - _BEFORE_CONFIG
    if strangers and not (run_dir / CONFIG_FILE).exists():
        raise UserError(
            f"run folder {run_dir} holds files but no {CONFIG_FILE}: choose a new or empty folder"
            " with --run-dir"
        )


def claim_run_dir(run_dir: Path, config: Config) -> int:
    """Makes a folder a config's own and this process's alone; for the main process.

    Returns:
        The lock, a file descriptor: the folder is taken until it is closed, at the latest by the
        kernel when the process dies.

    Raises:
        UserError: the folder holds something else than a run, cannot be written, or another run
            is at work in it.
    """
    path = run_dir / CONFIG_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        check_is_run_dir(run_dir)
        lock = _locked(run_dir)
        if not path.exists():
            atomic_write(path, config.to_yaml().encode())
        check_same_config(run_dir, config)  # of two that found it new, one came first
        (run_dir / REQUEUE_FILE).unlink(missing_ok=True)
        (run_dir / FAILURE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write run folder {run_dir} ({error.strerror}): choose another with --run-dir"
        ) from error
    return lock


def mark_stopped(run_dir: Path, *, requeue: bool) -> None:
    """Marks a run that stopped early as one to be started again, then consumes the stop file.

    Raises:
        RunError: the marker cannot be written.
    """
    try:
        if requeue:
            atomic_write(run_dir / REQUEUE_FILE, b"stopped early: the same command goes on\n")
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{run_dir / REQUEUE_FILE} cannot be written ({error.strerror}): the run stopped early,"
            " and the same command goes on"
        ) from error


def _locked(run_dir: Path) -> int:
    lock = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 1000).decode(errors="replace") or "another process"
        os.close(lock)
        raise UserError(
            f"run folder {run_dir} is in use by {holder}: wait for it, stop it, or choose another"
            " --run-dir"
        ) from error
    with suppress(OSError):  # a courtesy, which a full disk may refuse
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock
