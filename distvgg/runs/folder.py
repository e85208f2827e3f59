"""Ownership of a run folder: its config, its lock, and the markers of a stop.

Invariant: a folder belongs to one config, and to one living run at a time. After a kill at any
instant, the same command can resume in the folder.
"""

import os
from contextlib import suppress
from pathlib import Path

from distvgg import file_lock
from distvgg.config import Config
from distvgg.errors import RunError, UserError
from distvgg.file_lock import FileLock
from distvgg.recipe import load
from distvgg.runs.files import atomic_write
from distvgg.runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    FAILURE_FILE,
    LOCK_FILE,
    LOCK_HOLDER,
    LOGS,
    REQUEUE_FILE,
    RUN_FILES,
    STOP_FILE,
)

AUTO = "train.precision"  # the only field whose value a run resolves
WITHOUT_EFFECT_ON_RESULTS = (
    *("train.cuda_graphs", "train.detect_anomaly", "train.profile_steps"),
    *("data.store", "data.loader", "data.workers", "checkpoint.every_steps", "checkpoint.keep"),
    *("track.wandb", "track.wandb_artifact", "track.tensorboard", "track.report", "track.also"),
)
_OF_RANKS = b"stop request of a process to the others of its launch\n"
# Files that may exist before the config of a run: left by an interrupted launch, or created early
# by the user.
_BEFORE_CONFIG = {LOCK_FILE, LOCK_HOLDER, LOGS, STOP_FILE, REQUEUE_FILE, f".{CONFIG_FILE}.tmp"}


def check_same_config(run_dir: Path, config: Config) -> Config:
    """Returns the config to run in a folder, and checks that it belongs to the folder.

    A folder in which nothing was trained takes the given config. Otherwise the folder's own config
    is returned, with the given values of the fields that change no result. Only these and a
    resolved `precision: auto` may differ from the given config.

    Raises:
        UserError: the folder was made with another config. The message names the different keys.
    """
    path = run_dir / CONFIG_FILE
    # `exists` is False also for a name that no file can have.
    if not os.path.exists(path) or _is_unused(run_dir):
        return config
    kept = load(str(path))
    theirs, ours = kept.flat(), config.flat()
    if ours[AUTO] == "auto":
        ours[AUTO] = theirs[AUTO]
    free = {name: ours.pop(name) for name in WITHOUT_EFFECT_ON_RESULTS}
    differ = [f"{k} is {theirs[k]} there, {v} here" for k, v in ours.items() if theirs[k] != v]
    if differ:
        raise UserError(
            f"run folder {run_dir} was made with another config ({'; '.join(differ)}): choose"
            " another --run-dir or the same values"
        )
    return kept.replace(**{name.replace(".", "__"): value for name, value in free.items()})


def _is_unused(run_dir: Path) -> bool:
    """Returns True if nothing was trained in a folder, e.g. since its data could not be read."""
    try:
        return set(os.listdir(run_dir)) <= _BEFORE_CONFIG | {CONFIG_FILE}
    except OSError:
        return False


def check_is_run_dir(run_dir: Path) -> None:
    """Checks that a folder is a run folder or empty.

    Raises:
        UserError: the folder holds unknown files.
        OSError: the folder cannot be read.
    """
    strangers = {p.name for p in run_dir.iterdir()} - _BEFORE_CONFIG
    if strangers and not (run_dir / CONFIG_FILE).exists():
        raise UserError(
            f"run folder {run_dir} holds files but no {CONFIG_FILE}: choose a new or empty folder"
            " with --run-dir"
        )


def _check_kinds(run_dir: Path) -> None:
    """Checks that what has the name of a file of a run is one, before hours of training.

    Raises:
        UserError: it is a folder, a broken link or a pipe.
    """
    kinds = dict.fromkeys(sorted(RUN_FILES), ("file", os.path.isfile))
    for name, (kind, is_one) in (kinds | {CHECKPOINTS: ("folder", os.path.isdir)}).items():
        path = run_dir / name
        if os.path.lexists(path) and not is_one(path):
            raise UserError(f"{path} is not a {kind} (expected in a run folder): move it away")


def claim_run_dir(run_dir: Path, config: Config) -> FileLock:
    """Assigns a folder to a config and locks the folder for this process. For the main process.

    Returns:
        The lock. The folder is locked until the lock is released, at the latest when the process
        dies.

    Raises:
        UserError: the folder is not a run folder, has another config, cannot be written, is in use
            by another run, or has something else in the place of a file.
    """
    path = run_dir / CONFIG_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        check_is_run_dir(run_dir)
        _check_kinds(run_dir)
        lock = _locked(run_dir)
        try:
            if not path.exists() or _is_unused(run_dir):
                atomic_write(path, config.to_yaml().encode())
            # Two launches may have found the folder new, and the other may have written its config.
            check_same_config(run_dir, config)
            (run_dir / REQUEUE_FILE).unlink(missing_ok=True)
            (run_dir / FAILURE_FILE).unlink(missing_ok=True)
            forget_request_of_ranks(run_dir)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise UserError(
            f"cannot write run folder {run_dir} ({error.strerror}): choose another with --run-dir"
        ) from error
    return lock


def ask_ranks_to_stop(run_dir: Path) -> None:
    """Writes the stop file, for ranks that decode data and wait for nobody.

    It has a content, by which the next launch knows it from the request of a user: a launch that is
    killed leaves it behind.
    """
    with suppress(OSError):
        (run_dir / STOP_FILE).write_bytes(_OF_RANKS)


def forget_request_of_ranks(run_dir: Path) -> None:
    """Deletes the stop file of `ask_ranks_to_stop`, and leaves that of a user."""
    stop_file = run_dir / STOP_FILE
    if stop_file.is_file() and stop_file.read_bytes() == _OF_RANKS:
        stop_file.unlink(missing_ok=True)


def mark_stopped(run_dir: Path, *, requeue: bool) -> None:
    """Writes the requeue marker if `requeue`, then deletes the stop file.

    The marker means that the run stopped early and is to be launched again.

    Raises:
        RunError: the run folder cannot be written.
    """
    try:
        if requeue:
            atomic_write(run_dir / REQUEUE_FILE, b"stopped early: the same command resumes\n")
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"run folder {run_dir} cannot be written ({error.strerror}): make room; the same"
            " command resumes from the last checkpoint"
        ) from error


def _locked(run_dir: Path) -> FileLock:
    try:
        lock = file_lock.hold(run_dir / LOCK_FILE, wait=False)
    except file_lock.HeldError as error:
        raise UserError(
            f"run folder {run_dir} is in use by {error.holder}: wait for it, stop it, or choose"
            f" another --run-dir{error.remedy()}"
        ) from error
    if not lock.exclusive:
        print(
            f"note: the file system of {run_dir / LOCK_FILE} has no file locks, so that two"
            " launches in one run folder are not detected",
            flush=True,
        )
    elif lock.link is not None:
        print(
            f"note: the file system of {run_dir / LOCK_FILE} has no file locks: {lock.link} stands"
            " for the lock",
            flush=True,
        )
    return lock
