"""The file metrics.jsonl: one JSON object a line, each row exactly once.

Invariant: over any number of kills, the file is a prefix of what an uninterrupted run would have
written. A checkpoint records the length of the file (`Mark`), and a resume truncates the file to
that length.

A row that a full disk rejects waits in memory and is written with the next row. No checkpoint is
written meanwhile, because the checkpoint would rely on that row.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from distvgg.errors import UserError
from distvgg.metrics import STEP, Row
from distvgg.runs.files import read_bytes
from distvgg.runs.layout import CONFIG_FILE, METRICS_FILE

if TYPE_CHECKING:
    import numpy as np


class Mark(BaseModel, frozen=True, extra="forbid"):
    """A length of the file in bytes, and the SHA-256 of the file up to that length."""

    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class MetricsFile:
    """The file of one run, truncated to the length that its checkpoint records.

    For the main process.

    Args:
        mark: the recorded length.
        say: prints a line for the user when rows have to wait, and when all rows are written.
    """

    def __init__(self, path: Path, mark: Mark, say: Callable[[str], None]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._path, self._say = path, say
        os.ftruncate(self._file, mark.bytes)
        self._on_disk = self._length = mark.bytes
        self._digest = hashlib.sha256(path.read_bytes())
        self._waiting: list[bytes] = []
        self._writing = threading.Lock()  # a checkpoint flushes from its own thread

    def append(self, row: Row) -> None:
        """Writes a row, after the rows that had to wait.

        NaN and infinity are written as null, because JSON has neither.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._digest.update(line)
        self._length += len(line)
        with self._writing:
            waited = bool(self._waiting)
            self._waiting.append(line)
            try:
                self._write()
            except OSError as error:
                if not waited:
                    self._say(f"{self._path}: {error.strerror}; rows wait in memory for room")
            else:
                if waited:
                    self._say(f"{self._path}: all rows are written")

    def mark(self) -> Mark:
        """Returns the end of the file, waiting rows included."""
        return Mark(bytes=self._length, sha256=self._digest.hexdigest())

    def flush(self) -> None:
        """Flushes the file, and returns when every row is on the disk.

        Raises:
            OSError: the disk rejects the rows.
        """
        with self._writing:
            self._write()
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _write(self) -> None:
        content, written = b"".join(self._waiting), 0
        try:
            while written < len(content):  # an almost full disk accepts a part first
                written += os.pwrite(self._file, content[written:], self._on_disk + written)
        except OSError:
            os.ftruncate(self._file, self._on_disk)  # readers must not see a partial row
            raise
        self._on_disk += written
        self._waiting.clear()


def holds(path: Path, mark: Mark) -> bool:
    """Returns True if the beginning of a file matches a mark."""
    try:
        with path.open("rb") as file:
            head = file.read(mark.bytes)
    except OSError:
        head = b""
    return len(head) == mark.bytes and hashlib.sha256(head).hexdigest() == mark.sha256


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; none if there is no such file.

    Skips lines that are half written, by a running launch or a power loss.

    Raises:
        UserError: the file cannot be read.
    """
    return parse_rows(read_bytes(path) or b"")


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    """Returns the rows in the content of a metrics file, as `read_rows` does."""
    rows = []
    for line in content.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and STEP in row:
                rows.append(row)
    return rows


def read_metrics(run: str | os.PathLike[str]) -> list[Row]:
    """Returns the rows of a run in any state, in the order of their steps.

    Each row has `step`, `epoch` and the time, `perf/unix_time` and `perf/launch_seconds`; and the
    metrics that were measured then: `train/*` and the other `perf/*` at the interval
    `track.every_steps`, `val/*` and `test/*` at an evaluation. Losses are in nats per image,
    accuracies in 0..1, `perf/step_ms` in milliseconds. Numbers that were not finite are NaN. A last
    line that is half written is left out.

    `pandas.DataFrame(read_metrics(run))` has a column for each metric, with NaN where a row lacks
    the metric.

    Args:
        run: the run folder.

    Raises:
        UserError: there is no such run folder, or its rows cannot be read.
    """
    folder = Path(run)
    if not os.path.exists(folder / METRICS_FILE) and not os.path.exists(folder / CONFIG_FILE):
        raise UserError(f"{folder} is not the folder of a run: it has no {METRICS_FILE}")
    try:
        rows = read_rows(folder / METRICS_FILE)
    except OSError as error:
        raise UserError(f"cannot read {folder / METRICS_FILE}: {error.strerror}") from error
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def read_columns(content: bytes, names: Sequence[str]) -> "dict[str, np.ndarray]":
    """Returns metrics of a file's content as columns, much faster than row by row.

    Args:
        content: of metrics.jsonl. Lines that are half written are skipped.
        names: of the metrics.

    Returns:
        [rows] float64 by name; NaN where a row lacks the metric or its value is not finite.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import json as arrow_json

    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        return {name: np.empty(0) for name in names}
    options = arrow_json.ParseOptions(
        explicit_schema=pa.schema([(name, pa.float64()) for name in names]),
        unexpected_field_behavior="ignore",
    )
    try:
        table = arrow_json.read_json(pa.BufferReader(whole), parse_options=options)
        return {name: table[name].to_numpy() for name in names}
    except pa.ArrowInvalid:  # a line within the file is damaged
        rows = parse_rows(whole)
        # A value of another type than a number becomes NaN, and so does None.
        return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
