"""Content of run folders for the report. Only reads, takes no lock, imports no torch."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distvgg import metrics
from distvgg.commands.compare import SEED, Entry, Group, read
from distvgg.commands.report.series import TIME, WALL, Columns
from distvgg.commands.report.times import WallClock, training_time, wall_clock
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.recipe import load
from distvgg.runs.confusion import Confusion, read_confusion
from distvgg.runs.files import read_bytes
from distvgg.runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    WEIGHTS_FILE,
    checkpoint_dirs,
)
from distvgg.runs.metrics_file import read_columns
from distvgg.runs.preprocessing import read_preprocessing

VAL, TEST = "val/", "test/"
METRICS = (
    *(metrics.STEP, metrics.EPOCH, metrics.TRAIN_LOSS, metrics.TRAIN_TOP1, metrics.TRAIN_LR),
    *(metrics.TRAIN_GRAD_NORM, metrics.IMAGES_PER_SEC, metrics.STEP_MS, metrics.DATA_WAIT_MS),
    *(metrics.UNIX_TIME, metrics.LAUNCH_SECONDS),
    *(VAL + name for name in (metrics.LOSS, metrics.TOP1, metrics.TOP5, metrics.SUPERCLASS_TOP1)),
    *(TEST + name for name in (metrics.LOSS, metrics.TOP1, metrics.TOP5, metrics.SUPERCLASS_TOP1)),
)
# Timings, which no two runs have in common. `step` is the first field of a row.
_TIMINGS = re.compile(rb', "perf/[^"]*": [^,}]*')


@dataclass(frozen=True)
class RunData:
    """The content of a run folder that the report shows.

    Attributes:
        columns: by metric (`metrics_file.read_columns`), with `time`, the seconds of training, and
            `wall`, the seconds since the first launch was ready to train.
        clock: wall time of the rows, and of starts and pauses.
        starts: (step, world size) of each launch, as far as result or checkpoints tell.
        class_names: None for a run of version 0.1 without a confusion matrix.
        rows_sha256: of the complete rows without timings, as `launch/prove.py` computes it.
        weights_sha256: of the final weights; None if there are none.
    """

    folder: Path
    entry: Entry
    config: Config
    columns: Columns
    clock: WallClock
    starts: list[tuple[int, int]]
    confusion: Confusion | None
    class_names: list[str] | None
    rows_sha256: str
    weights_sha256: str | None

    @property
    def name(self) -> str:
        return self.entry.name


class NoRowsError(UserError):
    """A run has nothing to show yet."""


def read_runs(run_dirs: Sequence[Path], say: Callable[[str], None]) -> list[RunData]:
    """Returns the content of run folders, each folder once.

    Args:
        run_dirs: of the runs.
        say: called with a line for each run that is left out because it has no rows yet.

    Raises:
        UserError: a folder is not a run folder, no run has rows, or datasets differ.
    """
    for run_dir in run_dirs:
        if not os.path.exists(run_dir):
            raise UserError(f"run folder {run_dir} does not exist: give folders of distvgg train")
    paths = list(dict.fromkeys(Path(os.path.abspath(p)) for p in run_dirs))
    top = os.path.commonpath([p.parent for p in paths])
    # Parsing and hashing release the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = list(threads.map(lambda p: _read_run(p, str(p.relative_to(top))), paths))
    runs = [run for run in found if isinstance(run, RunData)]
    empty = [run for run in found if isinstance(run, NoRowsError)]
    if not runs:
        raise empty[0]
    for error in empty:
        say(f"left out: {error}")
    _check_one_dataset(runs)
    return runs


def _read_run(run_dir: Path, name: str) -> RunData | NoRowsError:
    entry = read(run_dir, name)
    if not entry.config:
        raise UserError(f"{run_dir}: {entry.state}: give folders of distvgg train")
    content = read_bytes(run_dir / METRICS_FILE) or b""
    columns = read_columns(content, METRICS)
    known = np.isfinite(columns[metrics.STEP])
    columns = {metric: column[known] for metric, column in columns.items()}
    if not known.any():
        return NoRowsError(f"{run_dir} has no rows in {METRICS_FILE} yet ({entry.state}): wait")
    columns[TIME] = training_time(columns)
    clock = wall_clock(columns)
    columns[WALL] = clock.wall
    weights = read_bytes(run_dir / WEIGHTS_FILE)
    preprocessing, confusion = read_preprocessing(run_dir), read_confusion(run_dir)
    named = preprocessing or confusion
    return RunData(
        folder=run_dir,
        entry=entry,
        config=load(str(run_dir / CONFIG_FILE)),
        columns=columns,
        clock=clock,
        starts=entry.result.starts if entry.result else _starts(run_dir),
        confusion=confusion,
        class_names=named.class_names if named else None,
        rows_sha256=rows_digest(content),
        weights_sha256=None if weights is None else hashlib.sha256(weights).hexdigest(),
    )


def rows_digest(content: bytes) -> str:
    """Returns the SHA-256 of the complete rows of a metrics.jsonl, without timings."""
    whole = content[: max(0, content.rfind(b"\n"))]
    return hashlib.sha256(_TIMINGS.sub(b"", whole)).hexdigest()


def _starts(run_dir: Path) -> list[tuple[int, int]]:
    """Returns the launches that led to the newest checkpoint; none if there is no checkpoint."""
    for checkpoint in reversed(checkpoint_dirs(run_dir / CHECKPOINTS)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
            return [(int(s), int(w)) for s, w in manifest["body"]["progress"]["starts"]]
    return []


def _check_one_dataset(runs: Sequence[RunData]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.config.data.name != first.config.data.name:
            what = f"{run.config.data.name} (expected {first.config.data.name}"
        elif run.class_names and first.class_names and run.class_names != first.class_names:
            what = f"{run.config.data.path or run.config.data.name} with other classes (expected"
            what += " the classes"
        else:
            continue
        raise UserError(
            f"dataset of {run.name}: {what} of {first.name}): give the runs of one dataset"
        )


def label_of(group: Group, keys: Sequence[str]) -> str:
    """Returns the name of a group of runs: the values in which it differs from other groups."""
    values = [f"{key} {_short(group.entries[0].config[key])}" for key in keys if key != SEED]
    return f"{', '.join(values) or 'mean'}, {group.seeds} seeds"


def _short(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
