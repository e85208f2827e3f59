"""Names of the files of a run folder, which no output of a command may take."""

import re
from pathlib import Path

from distvgg.errors import UserError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSING_FILE = "preprocessing.json"
CONFUSION_FILE = "confusion.json"
RESULT_FILE = "result.json"
INITIAL_WEIGHTS_FILE = "initial_weights.json"
REPORT_FILE = "report.html"
TRACKERS_FILE = "trackers.json"
FAILURE_FILE = "failure.json"
PROFILE_FILE = "profile.json"
CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"  # of a checkpoint
STATE_FILE = "state.safetensors"  # of a checkpoint
STOP_FILE = "STOP"
REQUEUE_FILE = "REQUEUE"
LOCK_FILE = ".lock"
LOCK_HOLDER = ".lock.holder"  # where the file system has no flock
LOGS = "logs"

# Files that no other program may overwrite in a run folder or a checkpoint.
RUN_FILES = frozenset(
    [
        *(CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE, PREPROCESSING_FILE, CONFUSION_FILE, RESULT_FILE),
        *(INITIAL_WEIGHTS_FILE, REPORT_FILE, TRACKERS_FILE, FAILURE_FILE, PROFILE_FILE),
        *(MANIFEST_FILE, STOP_FILE, REQUEUE_FILE, LOCK_FILE, STATE_FILE),
    ]
)


def refuse_to_overwrite(out: Path, *allowed: str) -> None:
    """Checks that an output of a command is no file of a run or checkpoint.

    Args:
        out: the file to write.
        allowed: names of files that this command makes.

    Raises:
        UserError: it is one.
    """
    beside = (out.parent / name for name in (CONFIG_FILE, MANIFEST_FILE))
    if out.name in RUN_FILES.difference(allowed) and any(file.exists() for file in beside):
        raise UserError(f"{out} belongs to a run: choose another place with --out")


def run_of(path: Path) -> Path:
    """Returns the run folder of a path: the path itself or, for a checkpoint, the run's folder."""
    absolute = path.absolute()
    if (path / CONFIG_FILE).exists() or absolute.parent.name != CHECKPOINTS:
        return path
    return absolute.parent.parent if _is_checkpoint(absolute) else path


def checkpoint_dirs(folder: Path) -> list[Path]:
    """Lists the checkpoints in `checkpoints/`, oldest first.

    Checkpoints that a kill left unfinished are omitted.
    """
    return sorted(filter(_is_checkpoint, folder.glob("step_*")))


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step_\d{8}", path.name) is not None
